//! Which of many sessions want attention, for the one task that serves them all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

use parking_lot::Mutex;

use crate::proto::mqttsn::action::ClientKey;
use crate::signal::Signal;

/// Collects the keys of what was woken. A key is in the list once, however often it is woken.
#[derive(Clone, Debug, Default)]
pub struct Wakes(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    signal: Signal,
    keys: Mutex<Vec<ClientKey>>,
}

/// The waker of one session.
#[derive(Debug)]
pub struct KeyWaker {
    key: ClientKey,
    listed: AtomicBool,
    shared: Arc<Shared>,
}

impl Wakes {
    pub fn waker(&self, key: ClientKey) -> Arc<KeyWaker> {
        Arc::new(KeyWaker { key, listed: AtomicBool::new(false), shared: self.0.clone() })
    }

    /// Waits until [`Wakes::take`] has something.
    ///
    /// # Cancel safety
    /// A wake-up that was not returned for is kept for the next wait.
    pub async fn woken(&self) {
        self.0.signal.wait().await;
    }

    pub fn take(&self) -> Vec<ClientKey> {
        std::mem::take(&mut *self.0.keys.lock())
    }
}

impl KeyWaker {
    /// To be called before looking at the session: what happens from now on is listed again.
    pub fn rearm(&self) {
        self.listed.store(false, Ordering::Release);
    }

    pub fn waker(self: &Arc<Self>) -> Waker {
        Waker::from(self.clone())
    }
}

impl Wake for KeyWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.listed.swap(true, Ordering::AcqRel) {
            self.shared.keys.lock().push(self.key);
            self.shared.signal.raise();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_woken_key_is_listed_once_until_it_is_looked_at() {
        let wakes = Wakes::default();
        let (one, two) = (wakes.waker(ClientKey(1)), wakes.waker(ClientKey(2)));
        one.waker().wake();
        one.waker().wake();
        two.waker().wake_by_ref();
        wakes.woken().await;
        assert_eq!(wakes.take(), [ClientKey(1), ClientKey(2)]);
        one.waker().wake();
        assert!(wakes.take().is_empty());
        one.rearm();
        one.waker().wake();
        wakes.woken().await;
        assert_eq!(wakes.take(), [ClientKey(1)]);
    }
}
