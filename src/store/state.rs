//! What the writer knows of the database without asking: where sessions are, what their queues hold, numbered topics.
//!
//! It is read when the database is opened and after every rollback, and follows every change within a transaction.

use std::collections::{BTreeSet, HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension};
use tracing::error;

use super::SessionId;
use super::op::{self, first_sequence};
use super::queue::{Count, gone_check};
use super::ranges::Ranges;
use super::schema::{MAX_SLOT, key_number, key_sequence, key_slot, queue_key, slot_keys};
use super::sums;
use super::topics::Topics;

#[derive(Debug, Default)]
pub(super) struct State {
    pub sessions: HashMap<SessionId, Lanes>,
    pub topics: Topics,
    /// Sums over all queues.
    pub messages: u64,
    pub bytes: u64,
    /// Appended since all summaries were written, in bytes.
    pub uncounted: u64,
    /// Lanes that lost messages in this transaction: their summaries must be written with it.
    pub shrunk: HashSet<(SessionId, u8)>,
    /// Slots of dropped sessions that may still have rows.
    pub draining: Vec<i64>,
    /// Slots below `next_slot` that hold nothing.
    pub free: Vec<i64>,
    next_slot: i64,
}

/// The queue of a session as it is on disk, lane by lane. Lane 0 is there as long as the session is, any other from its
/// first message on.
#[derive(Debug)]
pub(super) struct Lanes {
    first: Queue,
    others: Vec<Queue>,
}

impl Lanes {
    pub fn new(first: Queue) -> Self {
        Self { first, others: Vec::new() }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Queue> {
        std::iter::once(&self.first).chain(&self.others)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Queue> {
        std::iter::once(&mut self.first).chain(&mut self.others)
    }
}

/// Which slot a lane of a session has, and what it holds: as [`Queue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub session: SessionId,
    pub lane: u8,
    pub slot: i64,
    pub last: Option<u64>,
    pub messages: u64,
}

/// One lane of a queue.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    pub lane: u8,
    pub slot: i64,
    /// The highest sequence known to have been on disk.
    pub last: Option<u64>,
    pub messages: u64,
    pub bytes: u64,
    /// The summary on disk does not know all rows.
    pub uncounted: bool,
    /// Numbers within runs that are done with.
    pub gone: Ranges,
    /// Numbers of QoS 2 messages whose receiver has taken them.
    pub released: BTreeSet<u64>,
}

impl Queue {
    pub fn empty(lane: u8, slot: i64) -> Self {
        let (gone, released) = (Ranges::default(), BTreeSet::new());
        Self { lane, slot, last: None, messages: 0, bytes: 0, uncounted: false, gone, released }
    }
}

impl State {
    /// # Errors
    /// The database cannot be read, or a row that has to do with sessions is damaged.
    pub fn read(connection: &Connection) -> rusqlite::Result<Self> {
        sums::check_all(connection)?;
        let mut state = Self { topics: Topics::read(connection)?, ..Self::default() };
        // Lane 0 of every session comes first.
        let mut statement = connection.prepare_cached(
            "SELECT place.session, place.lane, place.slot, summary.last, summary.messages, summary.bytes
             FROM (SELECT id AS session, 0 AS lane, slot FROM session
                   UNION ALL SELECT session, lane, slot FROM lane) AS place
             LEFT JOIN summary USING (slot) ORDER BY place.lane",
        )?;
        let mut uncounted = connection.prepare_cached(
            "SELECT max(key), coalesce(sum(messages), 0), coalesce(sum(bytes), 0) FROM queue WHERE key BETWEEN ?1 AND ?2",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let lane = row.get(1)?;
            let mut queue = Queue {
                last: row.get::<_, Option<u64>>(3)?.map(|last| first_sequence(lane) | last),
                messages: row.get::<_, Option<u64>>(4)?.unwrap_or(0),
                bytes: row.get::<_, Option<u64>>(5)?.unwrap_or(0),
                ..Queue::empty(lane, row.get(2)?)
            };
            let (first, end) = slot_keys(queue.slot);
            let after = queue.last.map_or(first, |last| queue_key(queue.slot, last) + 1);
            let (last, messages, bytes): (Option<i64>, u64, u64) =
                uncounted.query_row([after, end], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
            if let Some(last) = last {
                queue.last = Some(key_sequence(last, lane));
                queue.messages += messages;
                queue.bytes += bytes;
                queue.uncounted = true;
                state.uncounted += bytes;
            }
            state.messages += queue.messages;
            state.bytes += queue.bytes;
            let session = SessionId(row.get(0)?);
            if lane == 0 {
                state.sessions.insert(session, Lanes::new(queue));
            } else if let Some(lanes) = state.sessions.get_mut(&session) {
                lanes.others.push(queue);
            }
        }
        state.read_marks(connection)?;
        state.read_slots(connection)?;
        Ok(state)
    }

    /// Reads what is done with of the runs that are there.
    fn read_marks(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let mut queues: HashMap<i64, &mut Queue> =
            self.sessions.values_mut().flat_map(Lanes::iter_mut).map(|queue| (queue.slot, queue)).collect();
        let mut statement = connection.prepare_cached("SELECT first, last, sum FROM gone")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (first, last): (i64, i64) = (row.get(0)?, row.get(1)?);
            if row.get::<_, i64>(2)? != gone_check(first, last) || last < first {
                error!(first, last, "a note of what was delivered is damaged; these messages may be delivered again");
            } else if let Some(queue) = queues.get_mut(&key_slot(first)) {
                queue.gone.insert_range(key_number(first), key_number(last));
            }
        }
        let mut statement = connection.prepare_cached("SELECT key FROM released")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let key = row.get(0)?;
            if let Some(queue) = queues.get_mut(&key_slot(key)) {
                queue.released.insert(key_number(key));
            }
        }
        Ok(())
    }

    /// The slots of all lanes.
    pub fn places(&self) -> Vec<Place> {
        let lanes = self.sessions.iter().flat_map(|(&session, lanes)| lanes.iter().map(move |queue| (session, queue)));
        let place = |(session, queue): (SessionId, &Queue)| {
            let Queue { lane, slot, last, messages, .. } = *queue;
            Place { session, lane, slot, last, messages }
        };
        lanes.map(place).collect()
    }

    pub fn has(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    /// The lane that `sequence` of a session belongs to, if it has it.
    pub fn queue(&self, session: SessionId, sequence: u64) -> Option<&Queue> {
        let lane = op::lane(sequence);
        self.sessions.get(&session)?.iter().find(|queue| queue.lane == lane)
    }

    pub fn queue_mut(&mut self, session: SessionId, sequence: u64) -> Option<&mut Queue> {
        let lane = op::lane(sequence);
        self.sessions.get_mut(&session)?.iter_mut().find(|queue| queue.lane == lane)
    }

    /// As [`State::queue_mut`], with what is needed to read its runs.
    pub fn queue_and_topics(&mut self, session: SessionId, sequence: u64) -> (Option<&mut Queue>, &Topics) {
        let lane = op::lane(sequence);
        let lanes = self.sessions.get_mut(&session);
        (lanes.and_then(|lanes| lanes.iter_mut().find(|queue| queue.lane == lane)), &self.topics)
    }

    pub fn slot(&self, session: SessionId, sequence: u64) -> Option<i64> {
        self.queue(session, sequence).map(|queue| queue.slot)
    }

    /// Gives a session one more lane.
    pub fn add_lane(&mut self, session: SessionId, lane: u8, slot: i64) {
        if let Some(lanes) = self.sessions.get_mut(&session) {
            lanes.others.push(Queue::empty(lane, slot));
        }
    }

    /// A slot that no session has.
    pub fn take_slot(&mut self) -> Option<i64> {
        self.free.pop().or_else(|| {
            let slot = self.next_slot;
            self.next_slot += 1;
            (slot <= MAX_SLOT).then_some(slot)
        })
    }

    /// Messages from sequence `first` to `last` were written; `uncounted` is what they weigh for the next summary.
    pub fn appended(&mut self, session: SessionId, first: u64, last: u64, count: Count, uncounted: u64) {
        let Some(queue) = self.queue_mut(session, first) else { return };
        // Below what the summary says: only a summary written now counts it.
        let shrunk = queue.last >= Some(first);
        queue.last = queue.last.max(Some(last));
        queue.messages += count.messages;
        queue.bytes += count.bytes;
        queue.uncounted = true;
        self.messages += count.messages;
        self.bytes += count.bytes;
        self.uncounted += uncounted;
        if shrunk {
            self.shrunk.insert((session, op::lane(first)));
        }
    }

    /// The receiver of a message has taken it. Such a message stands in no run: a summary must count it.
    pub fn mark_released(&mut self, session: SessionId, sequence: u64) {
        let Some(queue) = self.queue_mut(session, sequence) else { return };
        queue.released.insert(op::number(sequence));
        self.shrunk.insert((session, op::lane(sequence)));
    }

    /// Forgets which messages from `first` to `last` were released; returns their keys, in order.
    pub fn take_released(&mut self, session: SessionId, first: u64, last: u64) -> Vec<i64> {
        let Some(queue) = self.queue_mut(session, first) else { return Vec::new() };
        let numbers: Vec<u64> = queue.released.range(op::number(first)..=op::number(last)).copied().collect();
        numbers.iter().for_each(|number| _ = queue.released.remove(number));
        numbers.into_iter().map(|number| queue_key(queue.slot, number)).collect()
    }

    /// Messages of the lane of `sequence` went, or lost their content.
    pub fn removed(&mut self, session: SessionId, sequence: u64, Count { messages, bytes }: Count) {
        let Some(queue) = self.queue_mut(session, sequence) else { return };
        queue.messages = queue.messages.saturating_sub(messages);
        queue.bytes = queue.bytes.saturating_sub(bytes);
        self.messages = self.messages.saturating_sub(messages);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.shrunk.insert((session, op::lane(sequence)));
    }

    /// Finds which slots are free and which belong to dropped sessions, with one step for each slot that has rows.
    fn read_slots(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let used: HashSet<i64> = self.sessions.values().flat_map(Lanes::iter).map(|queue| queue.slot).collect();
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
