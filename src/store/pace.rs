//! How long the receivers of each session take to acknowledge, which says how long it is worth to wait with a commit: what
//! they have acknowledged by then is never written.
//!
//! One message of a session is timed at a time (as RFC 6298 §3 does), so that this costs next to nothing for each.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::SessionId;

#[derive(Debug, Default)]
pub(super) struct Paces(HashMap<SessionId, Pace>);

/// The pace of one session.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The message that is timed: its sequence, and since when it is on its way.
    timed: Option<(u64, Instant)>,
    /// Follows a slower acknowledgement at once and quicker ones slowly.
    typical: Option<Duration>,
}

impl Paces {
    pub fn of(&mut self, session: SessionId) -> &mut Pace {
        self.0.entry(session).or_default()
    }

    /// Messages of a session are done with, from sequence `first` to `last`.
    pub fn removed(&mut self, session: SessionId, first: u64, last: u64, now: Instant, most: Duration) {
        if let Some(pace) = self.0.get_mut(&session) {
            pace.removed(first, last, now, most);
        }
    }

    pub fn forget(&mut self, session: SessionId) {
        self.0.remove(&session);
    }
}

impl Pace {
    /// A message is on its way to a receiver that is connected.
    pub fn sent(&mut self, sequence: u64, now: Instant) {
        self.timed.get_or_insert((sequence, now));
    }

    /// Nobody is connected: what is timed will tell how long that lasts, and not the pace.
    pub fn parted(&mut self) {
        self.timed = None;
    }

    /// How long a commit may wait for acknowledgements, at most `most`; zero where that is not known, or too short to be of
    /// use.
    pub fn patience(&self, now: Instant, most: Duration) -> Duration {
        let stalls = self.timed.is_some_and(|(_, since)| now.saturating_duration_since(since) > most);
        match self.typical {
            Some(typical) if typical <= most && !stalls => (typical + typical / 2).min(most),
            _ => Duration::ZERO,
        }
    }

    fn removed(&mut self, first: u64, last: u64, now: Instant, most: Duration) {
        let Some((_, since)) = self.timed.take_if(|(sequence, _)| (first..=last).contains(sequence)) else { return };
        // A single stall must not be remembered for long.
        let took = now.saturating_duration_since(since).min(2 * most);
        self.typical = Some(match self.typical {
            Some(typical) if typical > took => typical - (typical - took) / 8,
            _ => took,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: SessionId = SessionId(1);
    const MOST: Duration = Duration::from_millis(500);

    /// Sends and acknowledges messages that take so long, in milliseconds; returns the patience after them.
    fn patience_after(took: &[u64]) -> u128 {
        let (mut paces, mut now) = (Paces::default(), Instant::now());
        for (sequence, &millis) in (1..).zip(took) {
            paces.of(S).sent(sequence, now);
            paces.of(S).sent(sequence + 1000, now);
            now += Duration::from_millis(millis);
            paces.removed(S, sequence, sequence, now, MOST);
        }
        paces.of(S).patience(now, MOST).as_millis()
    }

    #[test]
    fn patience_follows_the_acknowledgements() {
        assert_eq!(patience_after(&[]), 0);
        assert_eq!(patience_after(&[80]), 120);
        assert_eq!(patience_after(&[80, 200]), 300);
        assert_eq!(patience_after(&[400]), 500);
        // To wait for longer than that is not allowed, and for shorter of no use.
        assert_eq!(patience_after(&[600]), 0);
        let mut calm = vec![100_000];
        calm.extend([80; 12]);
        assert!((120..500).contains(&patience_after(&calm)), "{}", patience_after(&calm));
    }

    #[test]
    fn a_receiver_that_stalls_is_not_waited_for() {
        let (mut paces, now) = (Paces::default(), Instant::now());
        let later = |millis| now + Duration::from_millis(millis);
        paces.of(S).sent(1, now);
        paces.removed(S, 1, 1, later(80), MOST);
        paces.of(S).sent(2, later(100));
        assert_eq!(paces.of(S).patience(later(200), MOST), Duration::from_millis(120));
        assert_eq!(paces.of(S).patience(later(601), MOST), Duration::ZERO);
        // Its connection is gone, and comes back.
        paces.of(S).parted();
        assert_eq!(paces.of(S).patience(later(60_000), MOST), Duration::from_millis(120));
        paces.forget(S);
        assert_eq!(paces.of(S).patience(later(60_000), MOST), Duration::ZERO);
    }
}
