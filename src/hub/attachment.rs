//! One attached connection, as its session sees it: who it is, whether it must close, and its last batch.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::Attach;
use crate::clock::UnixMillis;

/// How long the last batch of a connection that was taken over may take, on a machine where its thread does not run.
pub(super) const LAST_BATCH: Duration = Duration::from_secs(1);

/// One attached connection.
#[derive(Debug)]
pub(super) struct Attachment {
    pub number: u64,
    fate: AtomicU8,
    /// Messages were taken up that are not routed yet, or those of the connection before are waited for.
    is_routing: Mutex<bool>,
    routed: Condvar,
    pub since: UnixMillis,
    pub peer: Option<String>,
    pub version: Option<&'static str>,
    /// The lower of what the peer can take and what the gateway allows.
    pub window: u16,
}

/// Why a connection must close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Another connection attached with the same client id (MQTT 5.0 §3.1.4).
    TakenOver,
    /// An operator's action or a changed configuration.
    Kicked,
}

impl Attachment {
    /// A connection that takes over from another one begins `is_routing`: see [`Attachment::succeed`].
    pub fn new(number: u64, since: UnixMillis, request: Attach, window: u16, is_routing: bool) -> Self {
        Self {
            number,
            fate: AtomicU8::new(0),
            is_routing: Mutex::new(is_routing),
            routed: Condvar::new(),
            since,
            peer: request.peer,
            version: request.version,
            window,
        }
    }

    pub fn fate(&self) -> Option<Fate> {
        match self.fate.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(Fate::TakenOver),
            _ => Some(Fate::Kicked),
        }
    }

    pub fn condemn(&self, fate: Fate) {
        self.fate.store(if fate == Fate::TakenOver { 1 } else { 2 }, Ordering::SeqCst);
    }

    /// Begins to take up messages; false where the connection must close. Either this sees that, or whoever takes the
    /// session over sees the batch and waits for its end.
    pub fn begin_batch(&self) -> bool {
        *self.is_routing.lock() = true;
        let may_begin = self.fate().is_none();
        if !may_begin {
            self.end_batch();
        }
        may_begin
    }

    /// All that was taken up is routed.
    pub fn end_batch(&self) {
        *self.is_routing.lock() = false;
        self.routed.notify_all();
    }

    /// Waits until `earlier`, which was told to close, has routed what it had taken up; it does so without a pause. Whoever
    /// takes over from this connection meanwhile finds it routing, and so waits for the same.
    pub fn succeed(&self, earlier: &Self) {
        let mut is_routing = earlier.is_routing.lock();
        earlier.routed.wait_while_for(&mut is_routing, |is_routing| *is_routing, LAST_BATCH);
        drop(is_routing);
        self.end_batch();
    }
}
