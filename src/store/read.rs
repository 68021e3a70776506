//! From rows to what the hub gets back: sessions, retained messages, pages of a queue.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, Row};
use tracing::error;

use super::batch::{Batch, Effect};
use super::op::{first_sequence, number};
use super::packed::Packing;
use super::queue::{self, FRAMES, HEAD, Head};
use super::row::{Content, Grant, Malformed, parse_topic};
use super::run::{Frame, Frames};
use super::schema::{ALL_LANES, queue_key, slot_keys};
use super::state::{Queue, State};
use super::topics::Topics;
use super::{
    Cleared, Page, PageLimit, QueueSummary, SessionId, SessionRecord, StoredMessage, StoredSession, StoredState,
    StoredSubscription, WillRecord,
};
use crate::clock::UnixMillis;
use crate::message::{Message, QoS};
use crate::topic::TopicName;

/// All sessions, in the order of their ids. What cannot be understood is left out and logged.
pub(super) fn sessions(connection: &Connection, state: &State) -> rusqlite::Result<Vec<StoredSession>> {
    let mut subscriptions = subscriptions(connection)?;
    let mut inbound = inbound(connection)?;
    let mut in_doubt = in_doubt(connection)?;
    let mut wills = wills(connection)?;
    let mut statement =
        connection.prepare("SELECT id, face, client_id, user, expiry_millis, detached_at FROM session ORDER BY id")?;
    let mut rows = statement.query([])?;
    let mut sessions = Vec::new();
    while let Some(row) = rows.next()? {
        let id = SessionId(row.get(0)?);
        let record = SessionRecord {
            id,
            face: row.get(1)?,
            client_id: text(row, 2)?,
            user: row.get::<_, Option<String>>(3)?.map(Arc::from),
            expiry_interval: row.get::<_, Option<u64>>(4)?.map(Duration::from_millis),
            detached_at: row.get::<_, Option<i64>>(5)?.map(UnixMillis),
            will: wills.remove(&id),
        };
        let queues = match state.sessions.get(&id) {
            Some(lanes) => lanes.iter().map(|queue| summary(connection, queue)).collect::<rusqlite::Result<_>>()?,
            None => Vec::new(),
        };
        let (subscriptions, inbound) =
            (subscriptions.remove(&id).unwrap_or_default(), inbound.remove(&id).unwrap_or_default());
        sessions.push(StoredSession { record, subscriptions, inbound, queues, in_doubt: in_doubt.remove(&id) });
    }
    Ok(sessions)
}

/// Hands every retained message to `each`. What cannot be understood is left out and logged.
pub(super) fn retained(connection: &Connection, each: &mut dyn FnMut(Message)) -> rusqlite::Result<()> {
    let mut statement = connection.prepare("SELECT topic, payload, flags, accepted_at, extra, sum FROM retained")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        match whole_message(row)? {
            Ok(message) => each(message.retained()),
            Err(error) => error!(%error, "a retained message in the store cannot be read and is left out"),
        }
    }
    Ok(())
}

/// The lane of `session` that sequence `from` is in, from there on, as it will be once `pending` is written too; and the
/// keys of the runs in which a message is damaged.
pub(super) fn page(
    connection: &Connection,
    state: &State,
    session: SessionId,
    from: u64,
    limit: PageLimit,
    pending: &Batch,
) -> rusqlite::Result<(Page, Vec<i64>)> {
    let Some(queue) = state.queue(session, from) else {
        return Ok((Page { complete: true, ..Page::default() }, Vec::new()));
    };
    let (lane, page) = (queue.lane, Page::default());
    let mut reader = PageReader { session, lane, limit, pending, page, bytes: 0, damaged: Vec::new() };
    reader.read(connection, queue, &state.topics, from)?;
    Ok((reader.page, reader.damaged))
}

struct PageReader<'a> {
    session: SessionId,
    lane: u8,
    limit: PageLimit,
    pending: &'a Batch,
    page: Page,
    bytes: usize,
    damaged: Vec<i64>,
}

/// Nothing more fits into the page.
struct Full;

impl PageReader<'_> {
    fn read(&mut self, connection: &Connection, queue: &Queue, topics: &Topics, from: u64) -> rusqlite::Result<()> {
        let mut statement = connection
            .prepare_cached(&format!("SELECT {HEAD}, frames FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key"))?;
        let mut rows = statement.query([queue_key(queue.slot, from), slot_keys(queue.slot).1])?;
        let from = number(from);
        let mut released = queue.released.range(from..).copied().peekable();
        while let Some(row) = rows.next()? {
            let head = Head::read(row)?;
            let frames = row.get_ref(FRAMES)?.as_blob()?;
            let mut run = Packing::new(queue.lane, head.place(), frames.len());
            let (mut found, mut whole) = (0, true);
            for frame in Frames::new(head.place(), frames) {
                found += 1;
                if frame.number < from || queue.gone.contains(frame.number) {
                    continue;
                }
                let Ok(size) = run.check(&frame, topics) else {
                    whole = false;
                    continue;
                };
                let mut before = std::iter::from_fn(|| released.next_if(|&number| number < frame.number));
                let is_full = before.any(|number| {
                    run.cut(&mut self.page.messages);
                    self.push_released(number).is_err()
                }) || self.push(&mut run, &frame, size).is_err();
                if is_full {
                    run.finish(&mut self.page.messages);
                    // The next page begins behind what is damaged, and would pass over it.
                    if !whole {
                        self.damaged.push(head.key);
                    }
                    return Ok(());
                }
            }
            run.finish(&mut self.page.messages);
            if !whole || found != head.messages {
                self.damaged.push(head.key);
            }
        }
        for number in released {
            if self.push_released(number).is_err() {
                return Ok(());
            }
        }
        self.page.complete = true;
        Ok(())
    }

    /// Adds a message of `size` bytes.
    fn push(&mut self, run: &mut Packing, frame: &Frame<'_>, size: usize) -> Result<(), Full> {
        match self.effect_on(frame.number) {
            Some(Effect::Gone) => Ok(()),
            Some(Effect::Released) => {
                run.cut(&mut self.page.messages);
                self.push_released(frame.number)
            }
            None => {
                self.make_room(run.len(), size)?;
                run.push(frame);
                Ok(())
            }
        }
    }

    fn push_released(&mut self, number: u64) -> Result<(), Full> {
        if !matches!(self.effect_on(number), Some(Effect::Gone)) {
            self.make_room(0, 0)?;
            self.page.messages.push_released(first_sequence(self.lane) | number);
        }
        Ok(())
    }

    /// What is not written yet but will have become of a message.
    fn effect_on(&self, number: u64) -> Option<Effect> {
        // As nearly always.
        if self.pending.is_empty() {
            return None;
        }
        self.pending.effect_on(self.session, first_sequence(self.lane) | number)
    }

    /// Room for one more message, beside those of a run that are not in the page yet.
    fn make_room(&mut self, in_run: usize, size: usize) -> Result<(), Full> {
        let messages = self.page.messages.len() + in_run;
        self.bytes += size;
        let is_full = messages >= self.limit.messages || (self.bytes > self.limit.bytes && messages > 0);
        if is_full { Err(Full) } else { Ok(()) }
    }
}

/// The message of a frame in `lane`.
pub(super) fn queued(frame: &Frame<'_>, lane: u8, topics: &Topics) -> Result<StoredMessage, Malformed> {
    let topic = frame.checked_topic(topics)?;
    stored_message(frame, lane, topic, Bytes::copy_from_slice(frame.content.payload))
}

/// The message of a frame in `lane` that was checked, with its topic and payload.
pub(super) fn stored_message(
    frame: &Frame<'_>,
    lane: u8,
    topic: TopicName,
    payload: Bytes,
) -> Result<StoredMessage, Malformed> {
    let Grant { qos, retain, identifiers, shared } = frame.content.grant()?;
    let state = StoredState::Queued(Arc::new(frame.content.message_with(topic, payload)?));
    let sequence = first_sequence(lane) | frame.number;
    Ok(StoredMessage { sequence, qos, retain, identifiers, shared, state })
}

/// A QoS 2 message that its receiver has taken: all that is known of it is its number.
pub(super) fn released_message(sequence: u64) -> StoredMessage {
    let (qos, state) = (QoS::ExactlyOnce, StoredState::Released);
    StoredMessage { sequence, qos, retain: false, identifiers: None, shared: None, state }
}

fn summary(connection: &Connection, queue: &Queue) -> rusqlite::Result<QueueSummary> {
    let first = queue::first(connection, queue, 0)?;
    let Queue { lane, last, messages, bytes, .. } = *queue;
    Ok(QueueSummary { lane, first: first.map(|number| first_sequence(lane) | number), last, messages, bytes })
}

fn subscriptions(connection: &Connection) -> rusqlite::Result<HashMap<SessionId, Vec<StoredSubscription>>> {
    let mut statement = connection.prepare("SELECT session, filter, options, identifier FROM subscription")?;
    let mut rows = statement.query([])?;
    let mut all: HashMap<_, Vec<_>> = HashMap::new();
    while let Some(row) = rows.next()? {
        let subscription = StoredSubscription { filter: text(row, 1)?, options: row.get(2)?, identifier: row.get(3)? };
        all.entry(SessionId(row.get(0)?)).or_default().push(subscription);
    }
    Ok(all)
}

fn inbound(connection: &Connection) -> rusqlite::Result<HashMap<SessionId, Vec<u16>>> {
    let mut statement = connection.prepare("SELECT session, packet_id FROM inbound")?;
    let mut rows = statement.query([])?;
    let mut all: HashMap<_, Vec<_>> = HashMap::new();
    while let Some(row) = rows.next()? {
        all.entry(SessionId(row.get(0)?)).or_default().push(row.get(1)?);
    }
    Ok(all)
}

/// What has been cleared up of the sessions that are in doubt.
fn in_doubt(connection: &Connection) -> rusqlite::Result<HashMap<SessionId, Vec<Cleared>>> {
    let mut statement = connection.prepare("SELECT session, lane, below, until FROM doubt")?;
    let mut rows = statement.query([])?;
    let mut all: HashMap<_, Vec<_>> = HashMap::new();
    while let Some(row) = rows.next()? {
        let cleared = all.entry(SessionId(row.get(0)?)).or_default();
        if row.get::<_, i64>(1)? != ALL_LANES {
            let first = first_sequence(row.get(1)?);
            cleared.push(Cleared { below: first + row.get::<_, u64>(2)?, until: first + row.get::<_, u64>(3)? });
        }
    }
    Ok(all)
}

fn wills(connection: &Connection) -> rusqlite::Result<HashMap<SessionId, Box<WillRecord>>> {
    let mut statement =
        connection.prepare("SELECT topic, payload, flags, accepted_at, extra, sum, session, delay_millis FROM will")?;
    let mut rows = statement.query([])?;
    let mut all = HashMap::new();
    while let Some(row) = rows.next()? {
        let (session, delay) = (row.get(6)?, Duration::from_millis(row.get(7)?));
        match whole_message(row)? {
            Ok(message) => {
                all.insert(SessionId(session), Box::new(WillRecord { message, delay }));
            }
            Err(error) => error!(%error, session, "a will in the store cannot be read and is left out"),
        }
    }
    Ok(all)
}

/// A message from the columns topic, payload, flags, accepted_at, extra, sum.
fn whole_message(row: &Row<'_>) -> rusqlite::Result<Result<Message, Malformed>> {
    let topic = row.get_ref(0)?.as_bytes()?;
    let content = Content {
        payload: row.get_ref(1)?.as_blob()?,
        flags: row.get(2)?,
        accepted_at: row.get(3)?,
        extra: row.get_ref(4)?.as_blob_or_null()?,
    };
    if row.get::<_, i64>(5)? != content.check(topic) {
        return Ok(Err(Malformed("checksum")));
    }
    Ok(parse_topic(topic).and_then(|topic| content.message(topic)))
}

fn text(row: &Row<'_>, column: usize) -> rusqlite::Result<Arc<str>> {
    Ok(row.get_ref(column)?.as_str()?.into())
}
