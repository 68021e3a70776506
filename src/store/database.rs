//! One open database: the transaction that writes a batch, and the upkeep between transactions.

use std::collections::HashMap;
use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, params};
use tracing::{debug, error};

use super::batch::{Batch, Change, Row};
use super::op::{self, first_sequence};
use super::queue::{self, Count};
use super::ranges::Ranges;
use super::row::{Content, encode_extra, encode_flags};
use super::schema::{ALL_LANES, MAX_SLOT};
use super::state::{Lanes, Queue, State};
use super::sums;
use super::topics::Topics;
use super::wal;
use super::{Cleared, SessionId, SessionRecord, Sweep, Swept};
use crate::clock::UnixMillis;
use crate::message::Message;

/// How much of the queues of dropped sessions is deleted along with a commit, in bytes.
const PURGE_ALONG: u64 = 256 << 10;
/// How much of them is deleted in one go while nothing else is due.
const PURGE_IDLE: u64 = 4 << 20;
/// Once this much was appended since summaries were written, they are written again; it bounds the count at the start.
const MAX_UNCOUNTED: u64 = 16 << 20;
const PUT_SESSION: &str = "INSERT OR REPLACE INTO session VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
/// Numbered topics are forgotten when all queues are empty and there are more than this.
const KEEP_TOPICS: usize = 1024;

#[derive(Debug)]
pub(super) struct Database {
    pub connection: Connection,
    pub state: State,
    /// A rollback has left `state` behind, and it could not be read again yet.
    stale: bool,
    page_bytes: u64,
    /// How often SQLite has synced a file: what its source says of a transaction that writes, of one that begins the log
    /// anew (`walWriteFrames`), and of a checkpoint (`walCheckpoint`).
    pub syncs: u64,
    /// How many frames of the log are in the database.
    moved: i64,
    /// All of them are: the next transaction begins the log anew.
    begins_log: bool,
    /// What failed may stand in the log still, and come back at the next start.
    pub is_unsure: bool,
}

/// What a commit did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Committed {
    pub messages_written: u64,
    pub messages_removed: u64,
}

/// Sizes of the database, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub total: u64,
    /// Of `total`, what holds nothing and can be used again.
    pub free: u64,
    /// What the write-ahead log holds that is not checkpointed or not yet overwritten.
    pub wal: u64,
}

impl Database {
    pub fn new(connection: Connection) -> rusqlite::Result<Self> {
        connection.set_prepared_statement_cache_capacity(64);
        let page_bytes = connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
        let state = State::read(&connection)?;
        Ok(Self {
            connection,
            state,
            stale: false,
            page_bytes,
            syncs: 0,
            moved: 0,
            begins_log: false,
            is_unsure: false,
        })
    }

    /// Lets go of the file without touching it any more; nothing can be read or written until the whole is replaced.
    pub fn close(&mut self) -> rusqlite::Result<()> {
        self.connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        let closed = std::mem::replace(&mut self.connection, Connection::open_in_memory()?);
        closed.close().map_err(|(_, error)| error)
    }

    /// Writes everything in `batch` in one transaction, or nothing of it.
    pub fn commit(&mut self, batch: &Batch) -> rusqlite::Result<Committed> {
        self.transaction(|connection, state| {
            let mut committed = Committed::default();
            let (mut rows, mut releases) = (Rows::new(), Releases::new());
            for slot in batch.slots() {
                apply(connection, state, &slot.change, &mut rows, &mut releases)?;
            }
            for ((session, _), mut rows) in rows {
                rows.sort_by_key(|row| row.sequence);
                committed.messages_written += queue::append(connection, state, session, &rows)?;
            }
            for (session, ranges) in releases {
                for (first, last) in ranges.iter() {
                    queue::release(connection, state, session, first, last)?;
                }
            }
            for (&session, ranges) in batch.removals() {
                for (first, last) in ranges.iter() {
                    committed.messages_removed += queue::remove(connection, state, session, first, last)?;
                }
            }
            queue::purge(connection, state, PURGE_ALONG)?;
            write_summaries(connection, state, state.uncounted > MAX_UNCOUNTED)?;
            Ok(committed)
        })
    }

    /// Deletes rows of dropped sessions; true while there are more.
    pub fn purge(&mut self) -> rusqlite::Result<bool> {
        if !self.state.draining.is_empty() {
            self.transaction(|connection, state| queue::purge(connection, state, PURGE_IDLE))?;
        }
        Ok(!self.state.draining.is_empty())
    }

    /// Removes what has expired of a queue.
    pub fn sweep(&mut self, session: SessionId, sweep: Sweep) -> rusqlite::Result<Swept> {
        self.transaction(|connection, state| {
            let swept = queue::sweep(connection, state, session, sweep)?;
            write_summaries(connection, state, false)?;
            Ok(swept)
        })
    }

    /// Takes damaged messages out of the runs with `keys`; returns how many are lost.
    pub fn set_aside(&mut self, session: SessionId, lane: u8, keys: &[i64], now: UnixMillis) -> rusqlite::Result<u64> {
        self.transaction(|connection, state| {
            let mut lost = 0;
            for &key in keys {
                lost += queue::set_aside(connection, state, session, lane, key, now)?;
            }
            write_summaries(connection, state, false)?;
            Ok(lost)
        })
    }

    /// Writes what makes the next start fast, before the database is closed.
    pub fn write_all_summaries(&mut self) -> rusqlite::Result<()> {
        if self.state.uncounted == 0 {
            return Ok(());
        }
        self.transaction(|connection, state| write_summaries(connection, state, true))
    }

    /// Forgets numbered topics that no row can refer to; true where there was something to do.
    pub fn forget_topics(&mut self) -> rusqlite::Result<bool> {
        let used = self.state.messages > 0 || !self.state.draining.is_empty();
        if used || self.state.topics.len() <= KEEP_TOPICS {
            return Ok(false);
        }
        self.transaction(|connection, state| {
            connection.execute("DELETE FROM topic", [])?;
            state.topics = Topics::default();
            Ok(())
        })?;
        Ok(true)
    }

    /// Shows that the disk can be relied on again: `bytes` can be written, and everything that the log holds is read,
    /// written to the database and synced there. After a sync that failed an operating system may hold pages for clean
    /// that never reached the disk: what counts as kept should not rest on a file in which that has happened.
    pub fn settle(&mut self, bytes: u32) -> rusqlite::Result<()> {
        self.probe(bytes)?;
        self.empty_log()
    }

    /// As [`Database::checkpoint`]; the log gives its room back.
    pub fn empty_log(&mut self) -> rusqlite::Result<()> {
        self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        (self.syncs, self.begins_log, self.is_unsure) = (self.syncs + 2, true, false);
        Ok(())
    }

    fn probe(&mut self, bytes: u32) -> rusqlite::Result<()> {
        self.transaction(|connection, _| {
            connection
                .execute("INSERT OR REPLACE INTO queue VALUES (-1, 0, 0, 0, 0, 0, NULL, zeroblob(?1))", [bytes])?;
            Ok(())
        })?;
        self.transaction(|connection, _| connection.execute("DELETE FROM queue WHERE key < 0", []).map(|_| ()))
    }

    /// Moves what the write-ahead log holds into the database, so that the log can be overwritten.
    pub fn checkpoint(&mut self) -> rusqlite::Result<()> {
        let (frames, moved): (i64, i64) =
            self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| Ok((row.get(1)?, row.get(2)?)))?;
        // Where a reader from outside holds the log there may be nothing that can be moved.
        self.syncs += if moved == self.moved { 0 } else { 2 };
        self.moved = moved;
        self.begins_log = moved == frames;
        Ok(())
    }

    /// Gives up to `bytes` of free pages back to the file system; takes effect with the next checkpoint.
    pub fn vacuum(&mut self, bytes: u64) -> rusqlite::Result<()> {
        let pages = bytes / self.page_bytes;
        let mut statement = self.connection.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
        let mut rows = statement.query([])?;
        while rows.next()?.is_some() {}
        drop(rows);
        drop(statement);
        self.count_sync();
        Ok(())
    }

    /// A transaction was written.
    fn count_sync(&mut self) {
        self.syncs += 1;
        if std::mem::take(&mut self.begins_log) {
            (self.syncs, self.moved) = (self.syncs + 1, 0);
        }
    }

    pub fn usage(&self) -> rusqlite::Result<Usage> {
        let pages = |sql: &str| -> rusqlite::Result<u64> {
            self.connection.prepare_cached(sql)?.query_row([], |row| row.get(0))
        };
        Ok(Usage {
            total: pages("PRAGMA page_count")? * self.page_bytes,
            free: pages("PRAGMA freelist_count")? * self.page_bytes,
            // Each frame has a header of 24 bytes.
            wal: self.log_frames()?.unwrap_or(0) * (self.page_bytes + 24),
        })
    }

    /// What SQLite knows of in the log; `None` while there is no log.
    fn log_frames(&self) -> rusqlite::Result<Option<u64>> {
        let mut frames = self.connection.prepare_cached("PRAGMA wal_checkpoint(NOOP)")?;
        frames.query_row([], |row| row.get::<_, i64>(1)).map(|frames| u64::try_from(frames).ok())
    }

    /// Takes out of the log what failed: see [`wal::cut`]. Where even that fails, the next transaction will do it.
    fn cut_log(&mut self) {
        let Some(path) = self.connection.path().map(|path| format!("{path}-wal")) else { return };
        let cut = match self.log_frames() {
            Ok(Some(frames)) => {
                wal::cut(Path::new(&path), frames, self.page_bytes, self.is_unsure).map_err(|e| e.to_string())
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        self.is_unsure = cut.is_err();
        if let Err(error) = cut {
            debug!(error, "what could not be written stays in the log until the next transaction");
        }
    }

    /// Limits the database file; less than it has now only stops growth.
    pub fn set_max_bytes(&self, bytes: u64) -> rusqlite::Result<()> {
        let pages = (bytes / self.page_bytes).clamp(1, u64::from(u32::MAX) - 1);
        self.connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))
    }

    fn transaction<T>(
        &mut self,
        work: impl FnOnce(&Connection, &mut State) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.refresh()?;
        let before = self.connection.total_changes();
        let result = execute(&self.connection, "BEGIN IMMEDIATE")
            .and_then(|()| work(&self.connection, &mut self.state))
            .and_then(|done| execute(&self.connection, "COMMIT").map(|()| done));
        if result.is_ok() && self.connection.total_changes() > before {
            self.count_sync();
            self.is_unsure = false;
        }
        if result.is_err() {
            self.stale = true;
            // SQLite rolls back by itself on some errors; then there is nothing left to roll back.
            if !self.connection.is_autocommit() {
                let _ = execute(&self.connection, "ROLLBACK");
            }
            self.cut_log();
            // Where the disk cannot even be read now, the next use tries again.
            let _ = self.refresh();
        }
        result
    }

    /// Makes `state` follow a rollback.
    ///
    /// # Errors
    /// The database cannot be read, and `state` says what was never committed.
    pub fn refresh(&mut self) -> rusqlite::Result<()> {
        if self.stale {
            self.state = State::read(&self.connection)?;
            self.stale = false;
        }
        Ok(())
    }
}

fn execute(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([]).map(|_| ())
}

/// What is to be queued, by lane.
type Rows<'a> = HashMap<(SessionId, u8), Vec<&'a Row>>;

/// What was released, of messages that are on disk.
type Releases = HashMap<SessionId, Ranges>;

/// Writes a change; what is to be queued is put into `rows` and what is released into `releases`, to be written together.
fn apply<'a>(
    connection: &Connection,
    state: &mut State,
    change: &'a Change,
    rows: &mut Rows<'a>,
    releases: &mut Releases,
) -> rusqlite::Result<()> {
    match change {
        Change::Enqueue(row) => {
            rows.entry((row.session, op::lane(row.sequence))).or_default().push(row);
            Ok(())
        }
        Change::PutSession(record) => put_session(connection, state, record),
        Change::DropSession(session) => drop_session(connection, state, *session),
        Change::PutSubscription { session, filter, options, identifier } if state.has(*session) => {
            let sql = "INSERT OR REPLACE INTO subscription VALUES (?1, ?2, ?3, ?4, ?5)";
            let identifier = sums::optional(identifier.map(i64::from));
            let values = [number(id(*session)), text(filter), number(i64::from(*options)), identifier];
            sums::write(connection, "subscription", sql, values).map(|_| ())
        }
        Change::DropSubscription { session, filter } => connection
            .prepare_cached("DELETE FROM subscription WHERE session = ?1 AND filter = ?2")?
            .execute(params![id(*session), filter])
            .map(|_| ()),
        Change::EnqueueReleased { session, sequence } => queue::append_released(connection, state, *session, *sequence),
        Change::Release { session, sequence } => {
            releases.entry(*session).or_default().insert_range(*sequence, *sequence);
            Ok(())
        }
        Change::Clear { session, cleared } if state.has(*session) => {
            write_doubt(connection, *session, Some(*cleared)).map(|_| ())
        }
        Change::AddInbound { session, packet_id } if state.has(*session) => {
            let sql = "INSERT OR IGNORE INTO inbound VALUES (?1, ?2, ?3)";
            let values = [number(id(*session)), number(i64::from(*packet_id))];
            sums::write(connection, "inbound", sql, values).map(|_| ())
        }
        Change::RemoveInbound { session, packet_id } => connection
            .prepare_cached("DELETE FROM inbound WHERE session = ?1 AND packet_id = ?2")?
            .execute(params![id(*session), packet_id])
            .map(|_| ()),
        Change::PutRetained(message) => put_retained(connection, message),
        Change::DropRetained(topic) => {
            connection.prepare_cached("DELETE FROM retained WHERE topic = ?1")?.execute([topic.as_str()]).map(|_| ())
        }
        // The session was dropped while another task still had something for it.
        Change::PutSubscription { .. } | Change::AddInbound { .. } | Change::Clear { .. } => Ok(()),
    }
}

fn put_session(connection: &Connection, state: &mut State, record: &SessionRecord) -> rusqlite::Result<()> {
    let Some(slot) = state.slot(record.id, 0).or_else(|| state.take_slot()) else {
        error!(session = record.id.0, limit = MAX_SLOT, "too many sessions, the session is not kept");
        return Ok(());
    };
    state.sessions.entry(record.id).or_insert_with(|| Lanes::new(Queue::empty(0, slot)));
    let millis = |interval: std::time::Duration| i64::try_from(interval.as_millis()).unwrap_or(i64::MAX);
    let values = [
        number(id(record.id)),
        number(slot),
        number(i64::from(record.face)),
        text(&record.client_id),
        record.user.as_deref().map_or(ValueRef::Null, text),
        sums::optional(record.expiry_interval.map(millis)),
        sums::optional(record.detached_at.map(|at| at.0)),
    ];
    sums::write(connection, "session", PUT_SESSION, values)?;
    let Some(will) = &record.will else {
        connection.prepare_cached("DELETE FROM will WHERE session = ?1")?.execute([id(record.id)])?;
        return Ok(());
    };
    let extra = encode_extra(&will.message, None, None);
    let (topic, content) = (will.message.topic.as_str(), content(&will.message, false, extra.as_deref()));
    let Content { payload, flags, accepted_at, extra } = content;
    let sum = content.check(topic.as_bytes());
    connection
        .prepare_cached("INSERT OR REPLACE INTO will VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
        .execute(params![id(record.id), millis(will.delay), topic, payload, flags, accepted_at, extra, sum])
        .map(|_| ())
}

fn put_retained(connection: &Connection, message: &Message) -> rusqlite::Result<()> {
    let extra = encode_extra(message, None, None);
    let (topic, content) = (message.topic.as_str(), content(message, true, extra.as_deref()));
    let Content { payload, flags, accepted_at, extra } = content;
    let sum = content.check(topic.as_bytes());
    connection
        .prepare_cached("INSERT OR REPLACE INTO retained VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
        .execute(params![topic, payload, flags, accepted_at, extra, sum])
        .map(|_| ())
}

fn content<'a>(message: &'a Message, retain: bool, extra: Option<&'a [u8]>) -> Content<'a> {
    let flags = encode_flags(message, message.qos, retain);
    Content { payload: &message.payload, flags, accepted_at: message.accepted_at.0, extra }
}

fn drop_session(connection: &Connection, state: &mut State, session: SessionId) -> rusqlite::Result<()> {
    let Some(lanes) = state.sessions.remove(&session) else { return Ok(()) };
    for table in [
        "DELETE FROM session WHERE id = ?1",
        "DELETE FROM will WHERE session = ?1",
        "DELETE FROM subscription WHERE session = ?1",
        "DELETE FROM inbound WHERE session = ?1",
        "DELETE FROM lane WHERE session = ?1",
        "DELETE FROM doubt WHERE session = ?1",
    ] {
        connection.prepare_cached(table)?.execute([id(session)])?;
    }
    for queue in lanes.iter() {
        connection.prepare_cached("DELETE FROM summary WHERE slot = ?1")?.execute([queue.slot])?;
        state.messages -= queue.messages;
        state.bytes -= queue.bytes;
        state.draining.push(queue.slot);
    }
    Ok(())
}

/// The slot of the lane that `sequence` names; the lane is made where the session does not have it yet. `None` where
/// there is no such session, or no slot is left.
pub(super) fn lane_slot(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    sequence: u64,
) -> rusqlite::Result<Option<i64>> {
    if let Some(slot) = state.slot(session, sequence) {
        return Ok(Some(slot));
    }
    if !state.has(session) {
        return Ok(None);
    }
    let lane = op::lane(sequence);
    let Some(slot) = state.take_slot() else {
        error!(session = session.0, lane, limit = MAX_SLOT, "too many lanes of sessions, its messages are not kept");
        return Ok(None);
    };
    write_lane(connection, session, lane, slot)?;
    state.add_lane(session, lane, slot);
    Ok(Some(slot))
}

fn write_summaries(connection: &Connection, state: &mut State, all: bool) -> rusqlite::Result<()> {
    let mut write = |queue: &mut Queue| -> rusqlite::Result<()> {
        let Some(last) = queue.last else { return Ok(()) };
        write_summary(
            connection,
            queue.slot,
            op::number(last),
            Count { messages: queue.messages, bytes: queue.bytes },
        )?;
        queue.uncounted = false;
        Ok(())
    };
    if all {
        let queues = state.sessions.values_mut().flat_map(Lanes::iter_mut);
        queues.filter(|queue| queue.uncounted).try_for_each(&mut write)?;
        state.uncounted = 0;
    }
    for (session, lane) in std::mem::take(&mut state.shrunk) {
        state.queue_mut(session, first_sequence(lane)).map_or(Ok(()), &mut write)?;
    }
    Ok(())
}

/// Gives a lane of a session its place. For lane 0 that is a row of the session itself, as one whose kind is not known.
pub(super) fn write_lane(connection: &Connection, session: SessionId, lane: u8, slot: i64) -> rusqlite::Result<()> {
    const UNKNOWN_FACE: i64 = 255;
    let (session, lane, slot) = (number(id(session)), number(i64::from(lane)), number(slot));
    if lane != number(0) {
        let sql = "INSERT INTO lane VALUES (?1, ?2, ?3, ?4)";
        return sums::write(connection, "lane", sql, [session, lane, slot]).map(|_| ());
    }
    let nothing = ValueRef::Null;
    let values = [session, slot, number(UNKNOWN_FACE), text(""), nothing, nothing, nothing];
    sums::write(connection, "session", PUT_SESSION, values).map(|_| ())
}

/// Notes that it is in doubt which packet identifiers of a session are in use, or how far that is cleared up in a lane.
pub(super) fn write_doubt(
    connection: &Connection,
    session: SessionId,
    cleared: Option<Cleared>,
) -> rusqlite::Result<usize> {
    let clamped = |number: u64| ValueRef::Integer(i64::try_from(number).unwrap_or(i64::MAX));
    let (lane, below, until) = match cleared {
        Some(cleared) => {
            (i64::from(cleared.lane()), op::number(cleared.below), cleared.until - first_sequence(cleared.lane()))
        }
        None => (ALL_LANES, 0, 0),
    };
    let values = [number(id(session)), number(lane), clamped(below), clamped(until)];
    sums::write(connection, "doubt", "INSERT OR REPLACE INTO doubt VALUES (?1, ?2, ?3, ?4, ?5)", values)
}

/// What was cleared up in a lane is in doubt again.
pub(super) fn forget_cleared(connection: &Connection, session: SessionId, lane: u8) -> rusqlite::Result<()> {
    let mut delete = connection.prepare_cached("DELETE FROM doubt WHERE session = ?1 AND lane = ?2")?;
    delete.execute(params![id(session), lane]).map(|_| ())
}

/// Writes what a slot holds up to the message with number `last`.
pub(super) fn write_summary(connection: &Connection, slot: i64, last: u64, count: Count) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO summary VALUES (?1, ?2, ?3, ?4, ?5)";
    let clamped = |number: u64| ValueRef::Integer(i64::try_from(number).unwrap_or(i64::MAX));
    let values = [number(slot), clamped(last), clamped(count.messages), clamped(count.bytes)];
    sums::write(connection, "summary", sql, values).map(|_| ())
}

fn number<'a>(number: i64) -> ValueRef<'a> {
    ValueRef::Integer(number)
}

fn text(text: &str) -> ValueRef<'_> {
    ValueRef::Text(text.as_bytes())
}

fn id(session: SessionId) -> i64 {
    i64::try_from(session.0).unwrap_or(i64::MAX)
}
