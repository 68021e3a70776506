//! How much may be on its way to an upstream unacknowledged. Pure.

use std::time::Instant;

/// What was sent and what came back for it.
///
/// The window opens as acknowledgements come: a line that keeps breaking before a whole window is through would
/// otherwise carry the same messages for ever and never an acknowledgement.
pub struct Window {
    /// Packets of QoS 1 and 2 that wait for their next acknowledgement.
    pub unacknowledged: usize,
    /// How many may wait.
    size: usize,
    pub acknowledged_at: Instant,
    /// Whether anything was acknowledged.
    pub is_fruitful: bool,
    /// When a message or an acknowledgement last crossed, either way.
    pub crossed_at: Instant,
}

impl Window {
    /// One that begins with `size` messages.
    pub fn new(size: usize, now: Instant) -> Self {
        Self { unacknowledged: 0, size, acknowledged_at: now, is_fruitful: false, crossed_at: now }
    }

    pub fn sent(&mut self, now: Instant) {
        if self.unacknowledged == 0 {
            self.acknowledged_at = now;
        }
        self.unacknowledged += 1;
    }

    pub fn acknowledged(&mut self, now: Instant) {
        self.acknowledged_at = now;
        self.is_fruitful = true;
        self.crossed_at = now;
        self.unacknowledged = self.unacknowledged.saturating_sub(1);
        self.size = (self.size + 1).min(usize::from(u16::MAX));
    }

    /// How many more may be sent.
    pub fn room(&self) -> usize {
        self.size.saturating_sub(self.unacknowledged)
    }
}
