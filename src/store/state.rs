//! What the writer knows of the database without asking: where sessions are, what their queues hold, numbered topics.
//!
//! It is read when the database is opened and after every rollback, and follows every change within a transaction.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension};

use super::SessionId;
use super::database::count;
use super::schema::{MAX_SLOT, key_sequence, key_slot, queue_key, slot_keys};
use super::topics::Topics;
use crate::topic::TopicName;

#[derive(Debug, Default)]
pub(super) struct State {
    pub sessions: HashMap<SessionId, Queue>,
    pub topics: Topics,
    /// Sums over all queues.
    pub messages: u64,
    pub bytes: u64,
    /// Appended since all summaries were written, in bytes.
    pub uncounted: u64,
    /// Sessions that lost messages in this transaction: their summaries must be written with it.
    pub shrunk: HashSet<SessionId>,
    /// Slots of dropped sessions that may still have rows.
    pub draining: Vec<i64>,
    /// Slots below `next_slot` that hold nothing.
    pub free: Vec<i64>,
    next_slot: i64,
}

/// The queue of a session as it is on disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    pub slot: i64,
    /// The highest sequence known to have been on disk.
    pub last: Option<u64>,
    pub messages: u64,
    pub bytes: u64,
    /// The summary on disk does not know all rows.
    pub uncounted: bool,
}

impl Queue {
    pub fn empty(slot: i64) -> Self {
        Self { slot, last: None, messages: 0, bytes: 0, uncounted: false }
    }
}

impl State {
    pub fn read(connection: &Connection) -> rusqlite::Result<Self> {
        let mut state = Self::default();
        let mut statement = connection.prepare_cached("SELECT id, name FROM topic")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            // A damaged name leaves its rows without a topic; they are skipped and reported when they are read.
            if let Ok(name) = TopicName::new(row.get_ref(1)?.as_str().unwrap_or_default()) {
                state.topics.insert(row.get(0)?, name);
            }
        }
        let mut statement = connection.prepare_cached(
            "SELECT session.id, session.slot, summary.last, summary.messages, summary.bytes
             FROM session LEFT JOIN summary USING (slot)",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let mut queue = Queue {
                slot: row.get(1)?,
                last: row.get(2)?,
                messages: row.get::<_, Option<u64>>(3)?.unwrap_or(0),
                bytes: row.get::<_, Option<u64>>(4)?.unwrap_or(0),
                uncounted: false,
            };
            let (first, end) = slot_keys(queue.slot);
            let after = queue.last.map_or(first, |last| queue_key(queue.slot, last) + 1);
            let (messages, bytes) = count(connection, &state.topics, after, end)?;
            if messages > 0 {
                let last: i64 = connection
                    .prepare_cached("SELECT max(key) FROM queue WHERE key BETWEEN ?1 AND ?2")?
                    .query_row([after, end], |row| row.get(0))?;
                queue = Queue {
                    last: Some(key_sequence(last)),
                    messages: queue.messages + messages,
                    bytes: queue.bytes + bytes,
                    uncounted: true,
                    ..queue
                };
                state.uncounted += bytes;
            }
            state.messages += queue.messages;
            state.bytes += queue.bytes;
            state.sessions.insert(SessionId(row.get(0)?), queue);
        }
        state.read_slots(connection)?;
        Ok(state)
    }

    pub fn has(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    pub fn slot(&self, session: SessionId) -> Option<i64> {
        self.sessions.get(&session).map(|queue| queue.slot)
    }

    /// A slot that no session has.
    pub fn take_slot(&mut self) -> Option<i64> {
        self.free.pop().or_else(|| {
            let slot = self.next_slot;
            self.next_slot += 1;
            (slot <= MAX_SLOT).then_some(slot)
        })
    }

    /// A row of `size` bytes was written; `uncounted` is what it weighs for the next summary.
    pub fn appended(&mut self, session: SessionId, sequence: u64, size: u64, uncounted: u64) {
        let Some(queue) = self.sessions.get_mut(&session) else { return };
        if queue.last >= Some(sequence) {
            // Below what the summary says: only a summary written now counts it.
            self.shrunk.insert(session);
        }
        queue.last = queue.last.max(Some(sequence));
        queue.messages += 1;
        queue.bytes += size;
        queue.uncounted = true;
        self.messages += 1;
        self.bytes += size;
        self.uncounted += uncounted;
    }

    /// Rows went, or lost their content.
    pub fn removed(&mut self, session: SessionId, messages: u64, bytes: u64) {
        let Some(queue) = self.sessions.get_mut(&session) else { return };
        queue.messages = queue.messages.saturating_sub(messages);
        queue.bytes = queue.bytes.saturating_sub(bytes);
        self.messages = self.messages.saturating_sub(messages);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.shrunk.insert(session);
    }

    /// Finds which slots are free and which belong to dropped sessions, with one step for each slot that has rows.
    fn read_slots(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let used: HashSet<i64> = self.sessions.values().map(|queue| queue.slot).collect();
        self.next_slot = used.iter().max().map_or(1, |slot| slot + 1);
        let mut statement = connection.prepare_cached("SELECT key FROM queue WHERE key >= ?1 ORDER BY key LIMIT 1")?;
        let mut from = Some(0);
        while let Some(start) = from {
            let key: Option<i64> = statement.query_row([start], |row| row.get(0)).optional()?;
            let slot = key.map(key_slot);
            if let Some(slot) = slot.filter(|slot| !used.contains(slot)) {
                self.draining.push(slot);
                self.next_slot = self.next_slot.max(slot + 1);
            }
            from = slot.filter(|&slot| slot < MAX_SLOT).map(|slot| slot_keys(slot + 1).0);
        }
        let taken: HashSet<i64> = self.draining.iter().copied().chain(used).collect();
        self.free = (1..self.next_slot).rev().filter(|slot| !taken.contains(slot)).collect();
        Ok(())
    }
}
