//! The journal: what must survive a crash, in one SQLite database, and the only SQL of the program.
//!
//! The hub submits operations ([`Op`]); one thread writes them in batches, one transaction with one fsync each, and
//! settles their receipts after it ([`Receipt`]). While one batch is written the next one fills. What becomes moot
//! before its batch is due is never written: a message that all receivers have acknowledged costs no flash.
//!
//! What cannot be written, because the disk is full or fails, is told apart: what adds data is refused, so that its
//! publisher is not told a lie; what takes data away is kept in memory and written when the disk recovers, which is
//! tried again all the time. A message that was refused here may still be delivered from the hub's memory, but does not
//! survive a restart.
//!
//! | file | what |
//! | --- | --- |
//! | `op` `receipt` | the words: operations, pages, receipts |
//! | `inbox` `batch` `ranges` `pace` | what waits for the next commit, for how long, and what cancels out |
//! | `writer` | the thread: group commit, failures, upkeep |
//! | `database` `state` `topics` | a batch to SQL, and what is known without asking |
//! | `queue` `run` `row` | the messages of the queues: packed into runs, taken out, swept, checked |
//! | `read` `packed` | SQL to sessions and messages; pages of a queue, packed as they lie |
//! | `open` `wal` `schema` `migrate` `sums` | lock, check, quarantine, tables, migrations, checks of rows |
//! | `reserve` | room for removals on a disk that is full |
//! | `waiting` | a disk that cannot be used at the start |
//! | `salvage` `pages` | what can be saved of a damaged database, read without SQLite |
//! | `stats` `inspect` | what the operator sees, while it runs and from outside |

mod batch;
mod database;
mod inbox;
pub mod inspect;
mod migrate;
mod op;
mod open;
mod pace;
mod packed;
mod pages;
mod queue;
mod ranges;
mod read;
mod receipt;
mod reserve;
mod row;
mod run;
mod salvage;
mod schema;
mod state;
mod stats;
mod sums;
mod topics;
mod waiting;
mod wal;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Mutex, RwLockReadGuard};
use thiserror::Error;
use tracing::error;

use crate::clock::{Clock, UnixMillis};
use crate::message::Message;
use crate::observe::{Metrics, Observe, Status};
use database::Database;
use inbox::{Inbox, Load, Request};
use open::{Lock, Replaced};
use reserve::Reserve;
use stats::Stats;
use waiting::Waiting;
use writer::Writer;

pub use op::{
    Cleared, Due, Op, Page, PageLimit, QueueSummary, SessionId, SessionRecord, StoredMessage, StoredSession,
    StoredState, StoredSubscription, Sweep, Swept, WillRecord, first_sequence, lane, number,
};
pub use packed::{Packed, PackedRun};
pub use receipt::{Line, Receipt, ReceiptState};

/// Where and how hard the store keeps things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub directory: PathBuf,
    pub durability: Durability,
    /// The largest size of the database file, in bytes.
    pub max_bytes: u64,
    /// The most messages in all queues together.
    pub max_messages: u64,
    /// How much room a file holds for when the disk is full, in bytes; on small disks it is less.
    pub reserve_bytes: u64,
    /// How long what is [`Due::Soon`] may wait.
    pub commit_delay: Duration,
    /// How long a message may wait instead where its receiver is known to acknowledge within this time.
    pub max_commit_delay: Duration,
    /// How often [`Durability::Relaxed`] commits.
    pub relaxed_interval: Duration,
    /// How long what is [`Due::Eventually`] may wait.
    pub retained_interval: Duration,
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
            max_messages: u64::MAX,
            reserve_bytes: 8 << 20,
            commit_delay: Duration::from_millis(10),
            max_commit_delay: Duration::from_millis(250),
            relaxed_interval: Duration::from_secs(1),
            retained_interval: Duration::from_secs(30),
            inbox_bytes: 16 << 20,
        }
    }
}

/// When a message counts as kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After its commit, which comes as soon as it is due.
    Commit,
    /// After its commit, and commits come this far apart, or sooner where a batch is full.
    Interval(Duration),
    /// At once: what was accepted during the last `relaxed_interval` is lost in a crash or power cut.
    Relaxed,
}

pub use open::{DATABASE_FILE, OpenError};

/// Why an open store could not be read or started.
#[derive(Debug, Error)]
pub enum ReadError {
    #[error("the database cannot be read")]
    Database(#[from] rusqlite::Error),
    #[error("the store's thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// A store that is open and not yet running.
#[derive(Debug)]
pub struct Opened {
    replaced: Option<Replaced>,
    settings: Settings,
    clock: Clock,
    database: Database,
    lock: Lock,
    reserve: Reserve,
}

impl Opened {
    /// Where a database that could not be used was moved to; the store has what could be saved of it, and a person should
    /// look.
    pub fn quarantined(&self) -> Option<&Path> {
        self.replaced.as_ref().map(|replaced| &*replaced.moved_to)
    }

    /// All sessions with what hangs on them, in the order of their ids. The messages of their queues are read with
    /// [`Store::load`].
    ///
    /// # Errors
    /// [`ReadError::Database`] where the disk fails. A single record that makes no sense is left out and logged.
    pub fn sessions(&mut self) -> Result<Vec<StoredSession>, ReadError> {
        self.mended(|Database { connection, state, .. }| read::sessions(connection, state))
    }

    /// Hands every retained message to `each`.
    ///
    /// # Errors
    /// As [`Opened::sessions`].
    pub fn retained(&mut self, each: &mut dyn FnMut(Message)) -> Result<(), ReadError> {
        self.mended(|database| read::retained(&database.connection, each))
    }

    /// Reads; where that finds the database damaged, which was too large to be checked as a whole, replaces it by what can
    /// be saved of it and reads again.
    fn mended<T>(&mut self, mut read: impl FnMut(&Database) -> rusqlite::Result<T>) -> Result<T, ReadError> {
        let error = match read(&self.database) {
            Err(error) => error,
            Ok(result) => return Ok(result),
        };
        let Some(reason) = open::damage(&error).filter(|_| self.replaced.is_none()) else { return Err(error.into()) };
        match open::repair(&mut self.database, &self.settings, &reason, &self.clock) {
            Ok(replaced) => self.replaced = Some(replaced),
            Err(error) => error!(error = &error as &dyn std::error::Error, reason, "the database is damaged"),
        }
        Ok(read(&self.database)?)
    }

    /// Starts the writer's thread.
    ///
    /// # Errors
    /// [`ReadError::Thread`] where the operating system refuses a thread.
    pub fn run(self) -> Result<Store, ReadError> {
        let Self { replaced, settings, clock, database, lock, reserve } = self;
        let stats = Arc::new(Stats::default());
        stats.replaced(replaced.as_ref());
        let inbox = Arc::new(Inbox::new(&settings, stats.clone()));
        let opened_at = clock.now();
        let writer = Writer::new(database, lock, reserve, inbox.clone(), stats.clone(), clock, settings);
        let thread = std::thread::Builder::new().name("store".into()).spawn(|| writer.run());
        let thread = Mutex::new(Some(thread.map_err(ReadError::Thread)?));
        Ok(Store(Arc::new(Running { inbox, stats, thread, opened_at })))
    }
}

/// What a store held that was opened late.
#[derive(Debug)]
pub struct Contents {
    /// As [`Opened::sessions`] gives them.
    pub sessions: Vec<StoredSession>,
    pub retained: Vec<Message>,
}

/// Takes up what a store holds, on its thread.
pub type TakeUp = Box<dyn FnOnce(Contents) + Send>;

/// Holds commits back; see [`Store::transaction`].
#[derive(Debug)]
#[must_use = "commits are held back while the guard lives"]
pub struct Transaction<'a>(#[expect(dead_code, reason = "held for its drop")] RwLockReadGuard<'a, ()>);

/// A handle to the running store; every clone is the same store. The last one to go closes it.
#[derive(Clone, Debug)]
pub struct Store(Arc<Running>);

#[derive(Debug)]
struct Running {
    inbox: Arc<Inbox>,
    stats: Arc<Stats>,
    thread: Mutex<Option<JoinHandle<()>>>,
    opened_at: UnixMillis,
}

impl Store {
    /// Opens the database in the directory of `settings`, which is created if need be; spawns nothing. A database that
    /// cannot be used is moved aside, see [`Opened::quarantined`].
    ///
    /// # Errors
    /// [`OpenError`] where the directory cannot be used, or another process uses it.
    pub fn bind(settings: Settings, clock: Clock) -> Result<Opened, OpenError> {
        let open::Found { database, lock, reserve, replaced } = open::open(&settings, &clock)?;
        Ok(Opened { replaced, settings, clock, database, lock, reserve })
    }

    /// A store that cannot be opened for `problem`, and will be as soon as it can; see [`OpenError::may_pass`]. What it
    /// holds is not known until then, and given to what `take_up` brings before anything is written.
    ///
    /// # Errors
    /// [`ReadError::Thread`] where the operating system refuses a thread.
    pub fn wait(
        settings: Settings,
        clock: Clock,
        problem: &OpenError,
        take_up: Receiver<TakeUp>,
    ) -> Result<Self, ReadError> {
        let (stats, opened_at) = (Arc::new(Stats::default()), clock.now());
        let problem_text = waiting::describe(problem);
        error!(
            error = problem_text,
            "the store cannot be used; what needs it is refused until it can, which is tried all the time"
        );
        stats.failed(problem.failure().unwrap_or(stats::Failure::Other), &problem_text, opened_at);
        let inbox = Arc::new(Inbox::new(&settings, stats.clone()));
        let waiting = Waiting::new(settings, clock, inbox.clone(), stats.clone(), take_up);
        let thread = std::thread::Builder::new().name("store".into()).spawn(|| waiting.run());
        let thread = Mutex::new(Some(thread.map_err(ReadError::Thread)?));
        Ok(Self(Arc::new(Running { inbox, stats, thread, opened_at })))
    }

    /// Takes the operations out of `ops`, to be written in their order. Never blocks on the disk. The operations of one
    /// call are in one commit. After [`Store::close`] their receipts fail.
    pub fn submit(&self, ops: &mut Vec<Op>, due: Due) {
        self.0.inbox.submit(ops, due);
    }

    /// While the guard lives no commit begins: what is submitted under it, from however many calls, is in one commit.
    /// Not to be held across an `.await`, nor taken twice by one thread.
    pub fn transaction(&self) -> Transaction<'_> {
        Transaction(self.0.inbox.hold())
    }

    /// Tells whether no more should be queued: the database has reached 15/16 of its limit or holds as many messages as
    /// it may, or the disk is full. What
    /// is submitted nevertheless is kept as long as it fits, and refused then.
    pub fn is_full(&self) -> bool {
        self.0.stats.is_full()
    }

    /// Tells once after the database was damaged and replaced while the store was running how many retained messages were
    /// saved. Rows of sessions and what hangs on them may be lost on disk too, and should be submitted again.
    pub fn take_replaced(&self) -> Option<u64> {
        self.0.stats.take_replaced()
    }

    /// Waits until the inbox has room.
    ///
    /// # Cancel safety
    /// Nothing is lost where the future is dropped.
    pub async fn when_ready(&self) {
        self.0.inbox.ready().await;
    }

    /// Reads a page of a lane of a queue, from sequence `from` on, which names it. `then` runs on the writer's thread and
    /// must be quick. The page shows everything that was submitted before this call. After [`Store::close`] `then` runs at once, with a page
    /// that has failed.
    pub fn load(&self, session: SessionId, from: u64, limit: PageLimit, then: Box<dyn FnOnce(Page) + Send>) {
        self.0.inbox.request(Request::Load(Load { session, from, limit, then }));
    }

    /// Removes what has expired from a lane of a queue, as far as it is on disk: the caller sees to what it has read or
    /// submitted from `sweep.from` on. `then` runs on the writer's thread and must be quick, and runs also where the
    /// store has ended. No more than one sweep or load of a lane should be under way.
    pub fn sweep(&self, session: SessionId, sweep: Sweep, then: Box<dyn FnOnce(Swept) + Send>) {
        self.0.inbox.request(Request::Sweep { session, sweep, then });
    }

    /// Commits everything and waits until the database is closed. Other handles may remain; what they submit is
    /// refused.
    pub fn close(self) {
        self.0.close();
    }
}

impl Running {
    fn close(&self) {
        self.inbox.close();
        let thread = self.thread.lock().take();
        // The last handle may go in a callback on the writer's own thread, which ends by itself.
        let thread = thread.filter(|thread| thread.thread().id() != std::thread::current().id());
        if thread.is_some_and(|thread| thread.join().is_err()) {
            error!("the store's thread panicked; what it had not acknowledged is lost");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.close();
    }
}

impl Observe for Store {
    fn statuses(&self) -> Vec<Status> {
        vec![self.0.stats.status(self.0.opened_at)]
    }

    fn collect(&self, metrics: &mut Metrics) {
        self.0.stats.collect(metrics);
    }
}

#[cfg(test)]
mod tests;
