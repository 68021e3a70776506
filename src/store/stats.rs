//! What the store tells about itself: counters, sizes, and the alarm while it cannot write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::ErrorCode;

use super::database::{Committed, Usage};
use super::open::Replaced;
use super::state::State;
use crate::clock::UnixMillis;
use crate::observe::{Health, Kind, Metrics, Status};

/// The bounds between which transactions are counted by how long they took, in milliseconds: from a good disk to an SD card
/// that is busy with itself.
const COMMIT_MILLIS: [u64; 11] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000];

/// Written by the writer (and `cancelled` by submitters), read by whoever looks.
#[derive(Debug, Default)]
pub(super) struct Stats {
    pub commits: AtomicU64,
    pub commit_nanos: AtomicU64,
    /// By how long they took; see [`COMMIT_MILLIS`].
    commit_times: [AtomicU64; COMMIT_MILLIS.len() + 1],
    pub syncs: AtomicU64,
    pub checkpoints: AtomicU64,
    pub checkpoint_nanos: AtomicU64,
    /// Of `bytes_written`, what checkpoints wrote.
    pub checkpoint_bytes: AtomicU64,
    pub changes: AtomicU64,
    pub written: AtomicU64,
    pub removed: AtomicU64,
    /// Messages that vanished before their commit was due.
    pub cancelled: AtomicU64,
    pub refused: AtomicU64,
    /// Messages lost because their bytes on disk are not what was written.
    pub damaged: AtomicU64,
    /// Databases that were damaged and replaced.
    replacements: AtomicU64,
    replaced_while_running: Mutex<Option<u64>>,
    /// Pages of queues that cannot be read at the moment.
    pub unread: AtomicU64,
    pub failures: [AtomicU64; Failure::ALL.len()],
    /// Bytes that the writer's thread passed to the operating system.
    pub bytes_written: AtomicU64,
    queue_messages: AtomicU64,
    queue_bytes: AtomicU64,
    sessions: AtomicU64,
    database_bytes: AtomicU64,
    free_bytes: AtomicU64,
    wal_bytes: AtomicU64,
    /// The database holds as much as it may.
    full: AtomicBool,
    failing: AtomicBool,
    alarm: Mutex<Option<Alarm>>,
    replacement: Mutex<Option<Replacement>>,
}

/// What became of a damaged database.
#[derive(Clone, Debug)]
struct Replacement {
    moved_to: String,
    messages: u64,
    /// Messages that are known to be lost, and there may be more; `None` where nothing was saved.
    lost: Option<u64>,
}

/// The store cannot write, since when and why.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Alarm {
    pub failure: Failure,
    pub error: String,
    pub since: UnixMillis,
    /// Changes refused in this episode.
    pub refused: u64,
}

/// Why something could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Full,
    ReadOnly,
    Io,
    Corrupt,
    Other,
}

impl Failure {
    pub const ALL: [Self; 5] = [Self::Full, Self::ReadOnly, Self::Io, Self::Corrupt, Self::Other];

    pub fn of(error: &rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            Some(ErrorCode::ReadOnly) => Self::ReadOnly,
            Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => Self::Io,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt,
            _ => Self::Other,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::ReadOnly => "read_only",
            Self::Io => "io",
            Self::Corrupt => "corrupt",
            Self::Other => "other",
        }
    }

    /// What a person should do.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Full => "make room on the disk or raise `store.max_size`; what is delivered makes room too",
            Self::ReadOnly => "make the directory of the store writable again",
            Self::Io => "check the disk",
            Self::Corrupt => {
                "check the disk; within a minute the gateway replaces the database by what can be read of it"
            }
            Self::Other => "see the log",
        }
    }
}

impl Stats {
    pub fn committed(&self, committed: Committed, changes: usize, took: Duration) {
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.commit_nanos.fetch_add(nanos(took), Ordering::Relaxed);
        let class = COMMIT_MILLIS.iter().position(|&millis| took <= Duration::from_millis(millis));
        self.commit_times[class.unwrap_or(COMMIT_MILLIS.len())].fetch_add(1, Ordering::Relaxed);
        self.changes.fetch_add(changes as u64, Ordering::Relaxed);
        self.written.fetch_add(committed.messages_written, Ordering::Relaxed);
        self.removed.fetch_add(committed.messages_removed, Ordering::Relaxed);
    }

    pub fn checkpointed(&self, took: Duration, bytes: u64) {
        self.checkpoint_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.checkpoints.fetch_add(1, Ordering::Relaxed);
        self.checkpoint_nanos.fetch_add(nanos(took), Ordering::Relaxed);
    }

    pub fn holds(&self, state: &State, usage: Usage, full: bool) {
        self.queue_messages.store(state.messages, Ordering::Relaxed);
        self.queue_bytes.store(state.bytes, Ordering::Relaxed);
        self.sessions.store(state.sessions.len() as u64, Ordering::Relaxed);
        self.database_bytes.store(usage.total, Ordering::Relaxed);
        self.free_bytes.store(usage.free, Ordering::Relaxed);
        self.wal_bytes.store(usage.wal, Ordering::Relaxed);
        self.full.store(full, Ordering::Relaxed);
    }

    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
            || self.is_failing() && self.alarm.lock().as_ref().is_some_and(|alarm| alarm.failure == Failure::Full)
    }

    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Counts a failure; true where it begins an episode.
    pub fn failed(&self, failure: Failure, error: &str, now: UnixMillis) -> bool {
        self.failures[failure as usize].fetch_add(1, Ordering::Relaxed);
        let mut alarm = self.alarm.lock();
        let since = alarm.as_ref().map_or(now, |alarm| alarm.since);
        let refused = alarm.as_ref().map_or(0, |alarm| alarm.refused);
        let begins = alarm.is_none();
        *alarm = Some(Alarm { failure, error: error.to_owned(), since, refused });
        self.failing.store(true, Ordering::Relaxed);
        begins
    }

    /// A damaged database was replaced.
    pub fn replaced(&self, replaced: Option<&Replaced>) {
        let Some(Replaced { moved_to, salvaged }) = replaced else { return };
        let lost = salvaged.as_ref().map(|salvaged| salvaged.lost);
        self.damaged.fetch_add(lost.unwrap_or(0), Ordering::Relaxed);
        self.replacements.fetch_add(1, Ordering::Relaxed);
        let messages = salvaged.as_ref().map_or(0, |salvaged| salvaged.messages);
        *self.replacement.lock() = Some(Replacement { moved_to: moved_to.display().to_string(), messages, lost });
    }

    /// The same, while whoever uses the store may have more than what is left.
    pub fn replaced_while_running(&self, replaced: &Replaced) {
        self.replaced(Some(replaced));
        *self.replaced_while_running.lock() = replaced.salvaged.as_ref().map(|salvaged| salvaged.retained);
    }

    /// How many retained messages were saved in the last such replacement; tells it once.
    pub fn take_replaced(&self) -> Option<u64> {
        self.replaced_while_running.lock().take()
    }

    pub fn count_refused(&self, changes: usize) {
        self.refused.fetch_add(changes as u64, Ordering::Relaxed);
        if let Some(alarm) = &mut *self.alarm.lock() {
            alarm.refused += changes as u64;
        }
    }

    /// Whether something was refused in the episode that lasts.
    pub fn has_refused(&self) -> bool {
        self.is_failing() && self.alarm.lock().as_ref().is_some_and(|alarm| alarm.refused > 0)
    }

    /// Ends the episode and returns what it was.
    pub fn recovered(&self) -> Option<Alarm> {
        self.failing.store(false, Ordering::Relaxed);
        self.alarm.lock().take()
    }

    pub fn status(&self, opened_at: UnixMillis) -> Status {
        let alarm = self.alarm.lock().clone();
        let replacement = self.replacement.lock().clone();
        let (health, reason, since) = match (&alarm, &replacement) {
            (Some(Alarm { failure, error, since, .. }), _) => {
                let hint = failure.hint();
                let reason =
                    format!("the store cannot write: {error}; {hint}. What must be kept is refused until then");
                (Health::Down, Some(reason), *since)
            }
            (None, _) if self.unread.load(Ordering::Relaxed) > 0 => {
                let reason = "queues cannot be read from the disk, and their messages wait; check the disk".to_owned();
                (Health::Degraded, Some(reason), opened_at)
            }
            (None, _) if self.is_full() => {
                let reason = "the store is full; restore the uplink, or raise `store.max_size` or `store.max_messages`"
                    .to_owned();
                (Health::Degraded, Some(reason), opened_at)
            }
            (None, Some(Replacement { moved_to, messages, lost })) => {
                let lost = match lost {
                    Some(lost) => format!("{messages} queued messages were saved, at least {lost} are lost"),
                    None => "nothing of it could be saved".to_owned(),
                };
                let reason = format!(
                    "the database was damaged and moved to {moved_to}; {lost}. Check the disk; `fieldgate store export` \
                     shows what the file holds, then delete it"
                );
                (Health::Degraded, Some(reason), opened_at)
            }
            (None, None) => (Health::Good, None, opened_at),
        };
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let facts = vec![
            ("queued messages", get(&self.queue_messages).to_string()),
            ("queued bytes", get(&self.queue_bytes).to_string()),
            ("sessions", get(&self.sessions).to_string()),
            ("database bytes", get(&self.database_bytes).to_string()),
            ("free bytes", get(&self.free_bytes).to_string()),
            ("commits", get(&self.commits).to_string()),
            ("disk syncs", get(&self.syncs).to_string()),
            ("written bytes", get(&self.bytes_written).to_string()),
            ("messages never written", get(&self.cancelled).to_string()),
        ];
        Status { kind: Kind::Store, name: "store".into(), parent: None, health, reason, since, facts }
    }

    pub fn collect(&self, metrics: &mut Metrics) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |counter: &AtomicU64| Duration::from_nanos(get(counter));
        let mut counter = |name, help, value: &AtomicU64| metrics.counter(name, help, &[], get(value));
        counter("fieldgate_store_commits_total", "Transactions that reached the disk.", &self.commits);
        counter("fieldgate_store_changes_total", "Changes in those transactions.", &self.changes);
        counter("fieldgate_store_checkpoints_total", "Times the log was moved into the database.", &self.checkpoints);
        counter("fieldgate_store_messages_written_total", "Queued messages written.", &self.written);
        counter("fieldgate_store_messages_removed_total", "Queued messages deleted.", &self.removed);
        counter(
            "fieldgate_store_messages_never_written_total",
            "Messages that all receivers had before their commit.",
            &self.cancelled,
        );
        counter("fieldgate_store_messages_damaged_total", "Messages lost to damage on the disk.", &self.damaged);
        counter("fieldgate_store_replaced_total", "Damaged databases that were moved aside.", &self.replacements);
        counter("fieldgate_store_refused_total", "Changes that could not be kept.", &self.refused);
        counter("fieldgate_store_written_bytes_total", "Bytes written to files.", &self.bytes_written);
        counter("fieldgate_store_checkpoint_bytes_total", "Of them, by checkpoints.", &self.checkpoint_bytes);
        counter("fieldgate_store_syncs_total", "Times the disk had to keep what was written (fsync).", &self.syncs);
        for (failure, count) in Failure::ALL.iter().zip(&self.failures) {
            let labels = [("kind", failure.name())];
            metrics.counter("fieldgate_store_failures_total", "Transactions that failed.", &labels, get(count));
        }
        let mut timer = |name, help, value: &AtomicU64| metrics.seconds(name, help, &[], seconds(value));
        timer("fieldgate_store_commit_seconds_total", "Time spent in transactions.", &self.commit_nanos);
        timer("fieldgate_store_checkpoint_seconds_total", "Time spent in checkpoints.", &self.checkpoint_nanos);
        metrics.histogram(
            "fieldgate_store_commit_duration_seconds",
            "How long transactions took.",
            &COMMIT_MILLIS.map(|millis| millis as f64 / 1000.0),
            &self.commit_times.each_ref().map(get),
            seconds(&self.commit_nanos).as_secs_f64(),
        );
        let mut gauge = |name, help, value: f64| metrics.gauge(name, help, &[], value);
        let float = |counter: &AtomicU64| get(counter) as f64;
        gauge("fieldgate_store_queue_messages", "Messages in queues on disk.", float(&self.queue_messages));
        gauge("fieldgate_store_queue_bytes", "Their topics, payloads and properties.", float(&self.queue_bytes));
        gauge("fieldgate_store_sessions", "Sessions kept on disk.", float(&self.sessions));
        gauge("fieldgate_store_database_bytes", "Size of the database.", float(&self.database_bytes));
        gauge("fieldgate_store_free_bytes", "Of it, what is free.", float(&self.free_bytes));
        gauge("fieldgate_store_wal_bytes", "What the log holds.", float(&self.wal_bytes));
        gauge("fieldgate_store_unread_pages", "Pages of queues that cannot be read for now.", float(&self.unread));
        gauge("fieldgate_store_failing", "1 while the store cannot write.", f64::from(u8::from(self.is_failing())));
        gauge("fieldgate_store_full", "1 while the store is full.", f64::from(u8::from(self.is_full())));
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
