//! What an acknowledgement waits for: everything it promises is on disk, or was delivered before it had to be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::signal::Signal;

/// Counts what must be on disk before one packet may be acknowledged, and wakes its connection when that is so.
///
/// Whoever makes an operation that carries the receipt calls [`Receipt::add`] first; the store calls
/// [`Receipt::satisfy`] or [`Receipt::fail`] exactly once for each. While operations are still being added and some are
/// already submitted, hold one `add` of your own, or the receipt may look done too early.
#[derive(Debug)]
pub struct Receipt {
    pending: AtomicU32,
    failed: AtomicBool,
    signal: Arc<Signal>,
    /// Settled together with this one.
    parent: Option<Arc<Receipt>>,
    /// The publisher's, where what it sends next depends on this.
    line: Option<Arc<Line>>,
}

/// The messages of one publisher in the order it sent them: once one could not be kept, those behind it that are on their
/// way are not kept either, until the publisher knows. It sends them all again then, in their order.
#[derive(Debug, Default)]
pub struct Line(AtomicBool);

impl Line {
    /// Whether a message could not be kept, of which the publisher does not know.
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// The publisher knows.
    pub fn mend(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Where a [`Receipt`] stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiptState {
    Pending,
    /// All of it is safe: acknowledge.
    Done,
    /// Some of it could not be kept: refuse (MQTT 5.0 reason code 0x97), do not acknowledge.
    Failed,
}

impl Receipt {
    /// A receipt that waits for nothing yet; `signal` is raised when it is done and when it fails.
    pub fn new(signal: Arc<Signal>) -> Arc<Self> {
        Self::make(None, None, signal)
    }

    /// As [`Receipt::new`], for a message in a line of them.
    pub fn in_line(line: Arc<Line>, signal: Arc<Signal>) -> Arc<Self> {
        Self::make(Some(line), None, signal)
    }

    /// A receipt that is one part of `parent`: where it ends, done or failed, that part of the parent does too. For an
    /// operation that two connections wait for.
    pub fn following(parent: Option<Arc<Self>>, signal: Arc<Signal>) -> Arc<Self> {
        if let Some(parent) = &parent {
            parent.add();
        }
        Self::make(None, parent, signal)
    }

    fn make(line: Option<Arc<Line>>, parent: Option<Arc<Self>>, signal: Arc<Signal>) -> Arc<Self> {
        Arc::new(Self { pending: AtomicU32::new(0), failed: AtomicBool::new(false), signal, parent, line })
    }

    /// One more thing must be on disk.
    pub fn add(&self) {
        self.pending.fetch_add(1, Ordering::Relaxed);
    }

    /// One thing is on disk, or need not be any more.
    pub fn satisfy(&self) {
        self.settle();
    }

    /// One thing could not be kept.
    pub fn fail(&self) {
        // Before the publisher can see it, and once: it may have been told when the next part fails.
        if let (Some(line), false) = (&self.line, self.failed.load(Ordering::Acquire)) {
            line.0.store(true, Ordering::Release);
        }
        self.failed.store(true, Ordering::Release);
        if !self.settle() {
            self.signal.raise();
        }
    }

    /// Failed as soon as one part has failed, done when all parts are satisfied.
    pub fn state(&self) -> ReceiptState {
        // Counted first: a failure is stored before its count is taken down, so zero with no failure is the truth.
        let pending = self.pending.load(Ordering::Acquire);
        if self.failed.load(Ordering::Acquire) {
            ReceiptState::Failed
        } else if pending == 0 {
            ReceiptState::Done
        } else {
            ReceiptState::Pending
        }
    }

    /// Takes the count down; true where that was the last, and the signal was raised.
    fn settle(&self) -> bool {
        let before = self.pending.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "a receipt is settled once for each `add`");
        if before == 1 {
            self.signal.raise();
            match &self.parent {
                Some(parent) if self.failed.load(Ordering::Acquire) => parent.fail(),
                Some(parent) => parent.satisfy(),
                None => {}
            }
        }
        before == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::task::Poll;

    async fn is_raised(signal: &Signal) -> bool {
        poll_fn(|cx| Poll::Ready(signal.poll_raised(cx).is_ready())).await
    }

    #[tokio::test]
    async fn the_last_part_raises_the_signal() {
        let signal = Arc::new(Signal::default());
        let receipt = Receipt::new(signal.clone());
        receipt.add();
        receipt.add();
        receipt.satisfy();
        assert_eq!(receipt.state(), ReceiptState::Pending);
        assert!(!is_raised(&signal).await);
        receipt.satisfy();
        assert_eq!(receipt.state(), ReceiptState::Done);
        assert!(is_raised(&signal).await);
    }

    #[test]
    fn a_part_that_two_wait_for_settles_both() {
        let parent = Receipt::new(Arc::default());
        let child = Receipt::following(Some(parent.clone()), Arc::default());
        child.add();
        assert_eq!(parent.state(), ReceiptState::Pending);
        child.satisfy();
        assert_eq!((child.state(), parent.state()), (ReceiptState::Done, ReceiptState::Done));
        let child = Receipt::following(Some(parent.clone()), Arc::default());
        child.add();
        child.fail();
        assert_eq!((child.state(), parent.state()), (ReceiptState::Failed, ReceiptState::Failed));
    }

    #[tokio::test]
    async fn the_first_failure_raises_the_signal_and_is_final() {
        let signal = Arc::new(Signal::default());
        let receipt = Receipt::new(signal.clone());
        receipt.add();
        receipt.add();
        receipt.fail();
        assert_eq!(receipt.state(), ReceiptState::Failed);
        assert!(is_raised(&signal).await);
        receipt.satisfy();
        assert_eq!(receipt.state(), ReceiptState::Failed);
    }
}
