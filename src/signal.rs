//! A flag that one task waits for and any thread may raise.
//!
//! The wake-up of a session's connection: cheaper than a channel, keeps no queue, and any number of raises before the
//! task looks count as one.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use atomic_waker::AtomicWaker;

/// One waiting task, any number of raisers.
#[derive(Debug, Default)]
pub struct Signal {
    raised: AtomicBool,
    waker: AtomicWaker,
}

impl Signal {
    /// Wakes the waiting task, or lets its next wait return at once.
    pub fn raise(&self) {
        // A task that has not yet seen the last raise will look at everything when it does; waking it twice is waste.
        if !self.raised.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Takes the flag down if it is up; otherwise registers the task of `cx` to be woken by the next raise.
    pub fn poll_raised(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.raised.swap(false, Ordering::AcqRel) {
            return Poll::Ready(());
        }
        self.waker.register(cx.waker());
        if self.raised.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Waits until the flag is up and takes it down. Only one task may wait at a time.
    ///
    /// # Cancel safety
    /// A raise that this future has not yet returned for is kept for the next wait.
    pub async fn wait(&self) {
        poll_fn(|cx| self.poll_raised(cx)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn raises_before_the_wait_count_as_one() {
        let signal = Signal::default();
        signal.raise();
        signal.raise();
        signal.wait().await;
        assert!(poll_fn(|cx| Poll::Ready(signal.poll_raised(cx).is_pending())).await);
    }

    #[tokio::test]
    async fn a_raise_from_another_thread_wakes_the_waiting_task() {
        let signal = Arc::new(Signal::default());
        let raiser = signal.clone();
        let thread = std::thread::spawn(move || raiser.raise());
        signal.wait().await;
        thread.join().unwrap();
    }
}
