//! The tables of the queues: runs of messages, and what of them is done with.
//!
//! A message leaves its run in one of three ways. Where all of a run is done with, its row goes. Where a part of it is,
//! as with what was acknowledged last, that part is noted in table `gone` and the run stays as it was written: an
//! acknowledgement does not write the messages around it again. Where messages expire or are damaged, the run is written
//! again without them, so that their room is free.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row as SqlRow, params};
use tracing::error;

use super::batch::Row;
use super::database::{forget_cleared, lane_slot, write_doubt};
use super::op::{self, first_sequence, number};
use super::row::row_check;
use super::run::{Frame, Frames, Place, Run};
use super::schema::{key_number, key_slot, queue_key, slot_keys};
use super::state::{Queue, State};
use super::sums;
use super::topics::Spelling;
use super::{SessionId, Sweep, Swept};
use crate::clock::{RELEASED, UnixMillis};

/// What a run counts towards the next summary beside its content.
const UNCOUNTED_RUN: u64 = 64;
/// How much one sweep for what has expired looks at, in runs and in bytes of their messages.
const SWEEP_RUNS: usize = 4096;
const SWEEP_BYTES: u64 = 8 << 20;
/// How many damaged runs are kept for a person to look at; the oldest goes.
const MAX_DAMAGED: u32 = 64;

/// The columns of a run but its frames, which lie in other pages and are read only where they are needed.
pub(super) const HEAD: &str = "key, span, messages, bytes, accepted_at, lasted";
/// Where the frames stand after [`HEAD`].
pub(super) const FRAMES: usize = 6;

/// A run as its row says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub key: i64,
    /// The number of its first message within the lane.
    pub first: u64,
    pub messages: u64,
    pub bytes: u64,
    accepted_at: i64,
    lasted: i64,
}

/// Messages and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub messages: u64,
    pub bytes: u64,
}

impl Count {
    pub fn add(&mut self, messages: u64, bytes: u64) {
        self.messages = self.messages.saturating_add(messages);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    fn less(self, other: Self) -> Self {
        Self { messages: self.messages.saturating_sub(other.messages), bytes: self.bytes.saturating_sub(other.bytes) }
    }
}

impl Head {
    /// From a row whose first columns are [`HEAD`].
    pub fn read(row: &SqlRow<'_>) -> rusqlite::Result<Self> {
        let key: i64 = row.get(0)?;
        let span: u64 = row.get(1)?;
        let first = key_number(key).saturating_sub(span);
        Ok(Self {
            key,
            first,
            messages: row.get(2)?,
            bytes: row.get(3)?,
            accepted_at: row.get(4)?,
            lasted: row.get(5)?,
        })
    }

    /// No message of the run has a higher number.
    pub fn last(&self) -> u64 {
        key_number(self.key)
    }

    pub fn place(&self) -> Place {
        Place { slot: key_slot(self.key), first: self.first, accepted_at: self.accepted_at }
    }

    fn newest(&self) -> i64 {
        self.accepted_at.saturating_add(self.lasted)
    }
}

/// Writes `rows` of one lane, in the order of their sequences, as runs. Returns how many messages were written.
pub(super) fn append(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    rows: &[&Row],
) -> rusqlite::Result<u64> {
    let Some(lane) = rows.first().map(|row| op::lane(row.sequence)) else { return Ok(0) };
    // The session was dropped while another task still had a message for it.
    let Some(slot) = lane_slot(connection, state, session, first_sequence(lane))? else { return Ok(0) };
    let mut run: Option<Run> = None;
    let mut written = 0;
    for row in rows {
        let number = topic_number(connection, state, row)?;
        if run.as_mut().is_some_and(|run| run.push(row, number)) {
            continue;
        }
        if let Some(full) = run.replace(Run::new(slot, row, number)) {
            written += insert(connection, state, session, lane, &full)?;
        }
    }
    run.map_or(Ok(written), |run| Ok(written + insert(connection, state, session, lane, &run)?))
}

fn topic_number(connection: &Connection, state: &mut State, row: &Row) -> rusqlite::Result<Option<i64>> {
    let topic = &row.message.topic;
    Ok(match state.topics.spelling(topic) {
        Spelling::Number(number) => Some(number),
        Spelling::NewNumber(number) => {
            let mut insert = connection.prepare_cached("INSERT INTO topic VALUES (?1, ?2)")?;
            insert.execute(params![number, topic.as_str()])?;
            state.topics.insert(number, topic.clone());
            Some(number)
        }
        Spelling::Text => None,
    })
}

fn insert(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    lane: u8,
    run: &Run,
) -> rusqlite::Result<u64> {
    let Run { slot, first, last, messages, bytes, .. } = *run;
    let (first_in, last_in) = (first_sequence(lane) | first, first_sequence(lane) | last);
    let used = state.queue(session, first_in).is_some_and(|queue| queue.last >= Some(first_in));
    if used && runs_over(connection, slot, first, last)?.next().is_some() {
        error!(session = session.0, lane, first, last, "a sequence was used twice, the later messages are not kept");
        return Ok(0);
    }
    write(connection, run)?;
    state.appended(session, first_in, last_in, Count { messages, bytes }, bytes + UNCOUNTED_RUN);
    Ok(messages)
}

/// Inserts the row of a run.
pub(super) fn write(connection: &Connection, run: &Run) -> rusqlite::Result<()> {
    let Run { slot, first, last, messages, bytes, accepted_at, lasted, expires_at, ref frames } = *run;
    connection
        .prepare_cached("INSERT INTO queue VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
        .execute(params![queue_key(slot, last), last - first, messages, bytes, accepted_at, lasted, expires_at, frames])
        .map(|_| ())
}

/// A QoS 2 message that its receiver has taken already.
pub(super) fn append_released(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    sequence: u64,
) -> rusqlite::Result<()> {
    let Some(slot) = lane_slot(connection, state, session, sequence)? else { return Ok(()) };
    if put_released(connection, slot, sequence)? {
        state.appended(session, sequence, sequence, Count { messages: 1, bytes: 0 }, UNCOUNTED_RUN);
        state.mark_released(session, sequence);
    }
    Ok(())
}

/// Gives up the content of the messages from sequence `first` to `last`, both of one lane; that they are released stays
/// known until they are removed.
pub(super) fn release(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    first: u64,
    last: u64,
) -> rusqlite::Result<()> {
    let mut numbers = Vec::new();
    let taken = take_from_runs(connection, state, session, first, last, Some(&mut numbers))?;
    let Some(slot) = state.slot(session, first) else { return Ok(()) };
    for number in numbers {
        let sequence = first_sequence(op::lane(first)) | number;
        put_released(connection, slot, sequence)?;
        state.mark_released(session, sequence);
    }
    state.removed(session, first, Count { messages: 0, ..taken });
    Ok(())
}

/// False where it is noted already.
pub(super) fn put_released(connection: &Connection, slot: i64, sequence: u64) -> rusqlite::Result<bool> {
    let values = [ValueRef::Integer(queue_key(slot, sequence))];
    Ok(sums::write(connection, "released", "INSERT OR IGNORE INTO released VALUES (?1, ?2)", values)? == 1)
}

/// Removes what a session's queue holds from sequence `first` to `last`, both of one lane; returns how many messages there
/// were.
pub(super) fn remove(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    first: u64,
    last: u64,
) -> rusqlite::Result<u64> {
    // What was refused or cancelled is above the last sequence on disk.
    let last = match state.queue(session, first).and_then(|queue| queue.last) {
        Some(stored) if stored >= first => last.min(stored),
        _ => return Ok(0),
    };
    let mut removed = take_from_runs(connection, state, session, first, last, None)?;
    let released = state.take_released(session, first, last);
    if let (Some(from), Some(to)) = (released.first(), released.last()) {
        connection.prepare_cached("DELETE FROM released WHERE key BETWEEN ?1 AND ?2")?.execute([from, to])?;
    }
    removed.add(released.len() as u64, 0);
    if removed.messages > 0 {
        state.removed(session, first, removed);
    }
    Ok(removed.messages)
}

/// Takes messages out of their runs; returns what was there and is not any more. Their numbers are put into `numbers`.
fn take_from_runs(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    first: u64,
    last: u64,
    mut numbers: Option<&mut Vec<u64>>,
) -> rusqlite::Result<Count> {
    let (Some(queue), topics) = state.queue_and_topics(session, first) else { return Ok(Count::default()) };
    let (first, last) = (number(first), number(last));
    let mut taken = Count::default();
    for head in runs_over(connection, queue.slot, first, last)? {
        let is_whole = first <= head.first && head.last() <= last;
        if is_whole && numbers.is_none() && !queue.gone.touches(head.first, head.last()) {
            taken.add(head.messages, head.bytes);
            delete(connection, queue, &head)?;
            continue;
        }
        let frames = frames(connection, &head)?;
        let (mut inside, mut outside) = (Count::default(), Count::default());
        for frame in Frames::new(head.place(), &frames).filter(|frame| !queue.gone.contains(frame.number)) {
            if (first..=last).contains(&frame.number) {
                inside.add(1, frame.size(topics));
                if let Some(numbers) = &mut numbers {
                    numbers.push(frame.number);
                }
            } else {
                outside.add(1, frame.size(topics));
            }
        }
        taken.add(inside.messages, inside.bytes);
        if outside.messages == 0 || is_whole {
            delete(connection, queue, &head)?;
        } else if inside.messages > 0 {
            queue.gone.insert_range(first.max(head.first), last.min(head.last()));
            write_gone(connection, queue, &head)?;
        }
    }
    Ok(taken)
}

/// The runs that hold some number from `first` to `last`.
fn runs_over(
    connection: &Connection,
    slot: i64,
    first: u64,
    last: u64,
) -> rusqlite::Result<impl Iterator<Item = Head>> {
    let mut select =
        connection.prepare_cached(&format!("SELECT {HEAD} FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key"))?;
    let mut rows = select.query([queue_key(slot, first), slot_keys(slot).1])?;
    let mut heads = Vec::new();
    while let Some(row) = rows.next()? {
        let head = Head::read(row)?;
        if head.first > last {
            break;
        }
        heads.push(head);
    }
    Ok(heads.into_iter())
}

fn frames(connection: &Connection, head: &Head) -> rusqlite::Result<Vec<u8>> {
    connection.prepare_cached("SELECT frames FROM queue WHERE key = ?1")?.query_row([head.key], |row| row.get(0))
}

fn delete(connection: &Connection, queue: &mut Queue, head: &Head) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM queue WHERE key = ?1")?.execute([head.key])?;
    forget_gone(connection, queue, head)
}

fn forget_gone(connection: &Connection, queue: &mut Queue, head: &Head) -> rusqlite::Result<()> {
    if queue.gone.touches(head.first, head.last()) {
        queue.gone.remove_range(head.first, head.last());
        write_gone(connection, queue, head)?;
    }
    Ok(())
}

/// Writes what is gone of one run.
fn write_gone(connection: &Connection, queue: &Queue, head: &Head) -> rusqlite::Result<()> {
    let key = |number| queue_key(queue.slot, number);
    let (first, last) = (head.first, head.last());
    connection.prepare_cached("DELETE FROM gone WHERE first BETWEEN ?1 AND ?2")?.execute([key(first), key(last)])?;
    for (first, last) in queue.gone.within(first, last) {
        let (first, last) = (key(first), key(last));
        connection.prepare_cached("INSERT INTO gone VALUES (?1, ?2, ?3)")?.execute([
            first,
            last,
            gone_check(first, last),
        ])?;
    }
    Ok(())
}

/// A range that was damaged would make messages disappear that nobody has.
pub(super) fn gone_check(first: i64, last: i64) -> i64 {
    row_check(&[&first.to_le_bytes(), &last.to_le_bytes()])
}

/// Removes what has expired of the lane that `sweep.from` is in.
pub(super) fn sweep(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    sweep: Sweep,
) -> rusqlite::Result<Swept> {
    let mut swept = Swept::default();
    let Some(slot) = state.slot(session, sweep.from) else { return Ok(swept) };
    let (lane, from) = (op::lane(sweep.from), number(sweep.from));
    let first = queue_key(slot, from);
    // By age, from the oldest end.
    let mut seen = Count::default();
    if let Some(oldest) = sweep.oldest {
        for head in oldest_runs(connection, slot, from)? {
            if head.newest() >= oldest.0 {
                swept.next = Some(UnixMillis(head.newest().saturating_add(sweep.now.0 - oldest.0)));
                break;
            }
            if has_age(head.newest(), sweep.now) {
                let gone = thin(connection, state, (session, lane), &head, None, |frame| frame.number < from)?;
                swept.messages += gone.messages;
                swept.bytes += gone.bytes;
            }
            seen.add(1, head.bytes);
            swept.more |= seen.messages as usize >= SWEEP_RUNS || seen.bytes >= SWEEP_BYTES;
            if swept.more {
                return Ok(swept);
            }
        }
    }
    // By what the messages say themselves.
    const DUE: &str = "key >> 40 = ?1 AND expires_at IS NOT NULL AND key >= ?2";
    let due: Vec<Head> = connection
        .prepare_cached(&format!(
            "SELECT {HEAD} FROM queue WHERE {DUE} AND expires_at <= ?3 ORDER BY expires_at LIMIT {SWEEP_RUNS}"
        ))?
        .query_map([slot, first, sweep.now.0], Head::read)?
        .collect::<rusqlite::Result<_>>()?;
    for head in due {
        let keeps = |frame: &Frame<'_>| {
            let is_due = frame.expires_at().is_some_and(|at| at <= sweep.now.0);
            frame.number < from || !is_due || !has_age(frame.content.accepted_at, sweep.now)
        };
        let gone = thin(connection, state, (session, lane), &head, Some(sweep.now), keeps)?;
        swept.messages += gone.messages;
        swept.bytes += gone.bytes;
        seen.add(1, head.bytes);
        swept.more |= seen.messages as usize >= SWEEP_RUNS || seen.bytes >= SWEEP_BYTES;
        if swept.more {
            return Ok(swept);
        }
    }
    let next: Option<i64> = connection
        .prepare_cached(&format!("SELECT min(expires_at) FROM queue WHERE {DUE} AND expires_at > ?3"))?
        .query_row([slot, first, sweep.now.0], |row| row.get(0))?;
    swept.next = [swept.next, next.map(UnixMillis)].into_iter().flatten().min();
    if let Some(queue) = state.queue(session, sweep.from) {
        swept.first = self::first(connection, queue, from)?.map(|number| first_sequence(lane) | number);
    }
    Ok(swept)
}

/// What was accepted before the clock was set has no age that anybody knows.
fn has_age(accepted_at: i64, now: UnixMillis) -> bool {
    accepted_at >= RELEASED.0 || now < RELEASED
}

fn oldest_runs(connection: &Connection, slot: i64, from: u64) -> rusqlite::Result<Vec<Head>> {
    let select = format!("SELECT {HEAD} FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key LIMIT {SWEEP_RUNS}");
    connection.prepare_cached(&select)?.query_map([queue_key(slot, from), slot_keys(slot).1], Head::read)?.collect()
}

/// Writes a run again with what `keeps` keeps of it; returns what is gone by that. Where `due_after` is given, the run is
/// not due again for what expires until then.
fn thin(
    connection: &Connection,
    state: &mut State,
    (session, lane): (SessionId, u8),
    head: &Head,
    due_after: Option<UnixMillis>,
    mut keeps: impl FnMut(&Frame<'_>) -> bool,
) -> rusqlite::Result<Count> {
    let (Some(queue), topics) = state.queue_and_topics(session, first_sequence(lane)) else {
        return Ok(Count::default());
    };
    let old = frames(connection, head)?;
    let (mut before, mut after) = (Count { messages: head.messages, bytes: head.bytes }, Count::default());
    let (mut frames, mut expires_at) = (Vec::new(), None);
    for frame in Frames::new(head.place(), &old) {
        if queue.gone.contains(frame.number) {
            before = before.less(Count { messages: 1, bytes: frame.size(topics) });
        } else if keeps(&frame) {
            after.add(1, frame.size(topics));
            frames.extend_from_slice(frame.encoded);
            let at = frame.expires_at().filter(|&at| due_after.is_none_or(|due| at > due.0));
            expires_at = [expires_at, at].into_iter().flatten().min();
        }
    }
    // A sweep writes also where nothing went: what was due is gone already, or has no age that anybody knows.
    if after == before && due_after.is_none() {
        return Ok(Count::default());
    }
    if after.messages == 0 {
        delete(connection, queue, head)?;
    } else {
        connection
            .prepare_cached("UPDATE queue SET messages = ?2, bytes = ?3, expires_at = ?4, frames = ?5 WHERE key = ?1")?
            .execute(params![head.key, after.messages, after.bytes, expires_at, frames])?;
        forget_gone(connection, queue, head)?;
    }
    let gone = before.less(after);
    state.removed(session, first_sequence(lane), gone);
    Ok(gone)
}

/// Takes the damaged messages out of the run with `key`, of which a copy is kept. Returns how many are lost. They may have
/// been sent, and their receiver may hold their identifiers.
pub(super) fn set_aside(
    connection: &Connection,
    state: &mut State,
    session: SessionId,
    lane: u8,
    key: i64,
    now: UnixMillis,
) -> rusqlite::Result<u64> {
    let select = format!("SELECT {HEAD} FROM queue WHERE key = ?1");
    let head = connection.prepare_cached(&select)?.query_row([key], Head::read).optional()?;
    let Some(head) = head else { return Ok(0) };
    connection
        .prepare_cached(
            "INSERT INTO damaged SELECT NULL, ?2, key, span, accepted_at, frames FROM queue WHERE key = ?1",
        )?
        .execute([key, now.0])?;
    connection
        .prepare_cached("DELETE FROM damaged WHERE id <= (SELECT max(id) FROM damaged) - ?1")?
        .execute([MAX_DAMAGED])?;
    forget_cleared(connection, session, lane)?;
    write_doubt(connection, session, None)?;
    let topics = std::mem::take(&mut state.topics);
    let lost = thin(connection, state, (session, lane), &head, None, |frame| frame.checked_topic(&topics).is_ok());
    state.topics = topics;
    Ok(lost?.messages)
}

/// Deletes rows of dropped sessions, `bytes` at most.
pub(super) fn purge(connection: &Connection, state: &mut State, bytes: u64) -> rusqlite::Result<()> {
    let mut left = bytes;
    while let Some(&slot) = state.draining.last() {
        let (first, last) = slot_keys(slot);
        let end = {
            let mut select =
                connection.prepare_cached("SELECT key, bytes FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key")?;
            let mut rows = select.query([first, last])?;
            loop {
                let Some(row) = rows.next()? else { break None };
                let size = row.get::<_, u64>(1)?.saturating_add(UNCOUNTED_RUN);
                if left == 0 {
                    break Some(row.get::<_, i64>(0)?);
                }
                left = left.saturating_sub(size);
            }
        };
        let end_key = end.map_or(last, |end| end - 1);
        connection.prepare_cached("DELETE FROM queue WHERE key BETWEEN ?1 AND ?2")?.execute([first, end_key])?;
        if end.is_some() {
            break;
        }
        connection.prepare_cached("DELETE FROM gone WHERE first BETWEEN ?1 AND ?2")?.execute([first, last])?;
        connection.prepare_cached("DELETE FROM released WHERE key BETWEEN ?1 AND ?2")?.execute([first, last])?;
        state.draining.pop();
        state.free.push(slot);
    }
    Ok(())
}

/// The lowest number that a lane holds, of those from `from` on.
pub(super) fn first(connection: &Connection, queue: &Queue, from: u64) -> rusqlite::Result<Option<u64>> {
    let mut select = connection
        .prepare_cached(&format!("SELECT {HEAD}, frames FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key"))?;
    let mut rows = select.query([queue_key(queue.slot, from), slot_keys(queue.slot).1])?;
    let mut in_runs = None;
    while let (None, Some(row)) = (in_runs, rows.next()?) {
        let head = Head::read(row)?;
        let frames = row.get_ref(FRAMES)?.as_blob()?;
        let mut numbers = Frames::new(head.place(), frames).map(|frame| frame.number).peekable();
        in_runs = match numbers.peek() {
            Some(_) => numbers.find(|&number| number >= from && !queue.gone.contains(number)),
            // A run that cannot be taken apart is set aside when it is read.
            None => Some(head.first.max(from)),
        };
    }
    Ok([in_runs, queue.released.range(from..).next().copied()].into_iter().flatten().min())
}
