//! From rows to what the hub gets back: sessions, retained messages, pages of a queue.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row};
use tracing::error;

use super::batch::{Batch, Effect};
use super::row::{Malformed, decode_grant, decode_message};
use super::schema::{key_sequence, queue_key, slot_keys};
use super::state::{Queue, State};
use super::topics::Topics;
use super::{
    Page, PageLimit, QueueSummary, SessionId, SessionRecord, StoredMessage, StoredSession, StoredState,
    StoredSubscription, WillRecord,
};
use crate::clock::UnixMillis;
use crate::message::Message;
use crate::topic::TopicName;

/// All sessions, in the order of their ids. What cannot be understood is left out and logged.
pub(super) fn sessions(connection: &Connection, state: &State) -> rusqlite::Result<Vec<StoredSession>> {
    let mut subscriptions = subscriptions(connection)?;
    let mut inbound = inbound(connection)?;
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
        sessions.push(StoredSession { record, subscriptions, inbound, queues });
    }
    Ok(sessions)
}

/// Hands every retained message to `each`. What cannot be understood is left out and logged.
pub(super) fn retained(connection: &Connection, each: &mut dyn FnMut(Message)) -> rusqlite::Result<()> {
    let mut statement = connection.prepare("SELECT topic, payload, flags, accepted_at, extra FROM retained")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        match whole_message(row)? {
            Ok(message) => each(message.retained()),
            Err(error) => error!(%error, "a retained message in the store cannot be read and is left out"),
        }
    }
    Ok(())
}

/// The lane of `session` that sequence `from` is in, from there on, as it will be once `pending` is written too.
pub(super) fn page(
    connection: &Connection,
    state: &State,
    session: SessionId,
    from: u64,
    limit: PageLimit,
    pending: &Batch,
) -> Page {
    let mut page = Page::default();
    let Some(queue) = state.queue(session, from) else { return Page { complete: true, ..page } };
    let result = fill_page(&mut page, connection, &state.topics, session, (queue, from), limit, pending);
    if let Err(error) = result {
        error!(%error, session = session.0, from, "a queue cannot be read");
        page.failed = true;
        page.complete = false;
    }
    page
}

/// The columns of a queue that [`queue_row`] reads.
pub(super) const QUEUE_COLUMNS: &str = "key, topic, payload, flags, accepted_at, extra";

/// A row of [`QUEUE_COLUMNS`] in `lane`, and its size as `Message::size` gives it.
pub(super) fn queue_row(
    row: &Row<'_>,
    lane: u8,
    topics: &Topics,
) -> rusqlite::Result<Result<(StoredMessage, usize), Malformed>> {
    let (key, flags): (i64, i64) = (row.get(0)?, row.get(3)?);
    let extra = row.get_ref(5)?.as_blob_or_null()?;
    let decode = || {
        let (grant, released) = decode_grant(flags, extra)?;
        let (state, size) = if released {
            (StoredState::Released, 0)
        } else {
            let topic = match row.get_ref(1).map_err(|_| Malformed("topic"))? {
                ValueRef::Integer(number) => topics.name(number).cloned().ok_or(Malformed("topic number"))?,
                ValueRef::Text(text) => parse_topic(text)?,
                _ => return Err(Malformed("topic")),
            };
            let payload = row.get_ref(2).ok().and_then(|value| value.as_blob().ok()).ok_or(Malformed("payload"))?;
            let accepted_at = row.get(4).map_err(|_| Malformed("time"))?;
            let message = decode_message(topic, payload, flags, accepted_at, extra)?;
            let size = message.size();
            (StoredState::Queued(Arc::new(message)), size)
        };
        let sequence = key_sequence(key, lane);
        let (qos, retain, identifiers) = (grant.qos, grant.retain, grant.identifiers);
        Ok((StoredMessage { sequence, qos, retain, identifiers, state }, size))
    };
    Ok(decode())
}

fn fill_page(
    page: &mut Page,
    connection: &Connection,
    topics: &Topics,
    session: SessionId,
    (queue, from): (&Queue, u64),
    limit: PageLimit,
    pending: &Batch,
) -> rusqlite::Result<()> {
    let mut statement = connection
        .prepare_cached(&format!("SELECT {QUEUE_COLUMNS} FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key"))?;
    let mut rows = statement.query([queue_key(queue.slot, from), slot_keys(queue.slot).1])?;
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        let sequence = key_sequence(row.get(0)?, queue.lane);
        let effect = pending.effect_on(session, sequence);
        if effect == Some(Effect::Gone) {
            continue;
        }
        let (mut message, size) = match queue_row(row, queue.lane, topics)? {
            Ok(read) => read,
            Err(error) => {
                error!(%error, session = session.0, sequence, "a queued message cannot be read and is lost");
                continue;
            }
        };
        bytes += size;
        if page.messages.len() >= limit.messages || (bytes > limit.bytes && !page.messages.is_empty()) {
            return Ok(());
        }
        if effect == Some(Effect::Released) {
            message.state = StoredState::Released;
        }
        page.messages.push(message);
    }
    page.complete = true;
    Ok(())
}

fn summary(connection: &Connection, queue: &Queue) -> rusqlite::Result<QueueSummary> {
    let (first, last) = slot_keys(queue.slot);
    let first: Option<i64> = connection
        .prepare_cached("SELECT key FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key LIMIT 1")?
        .query_row([first, last], |row| row.get(0))
        .optional()?;
    let Queue { lane, last, messages, bytes, .. } = *queue;
    Ok(QueueSummary { lane, first: first.map(|key| key_sequence(key, lane)), last, messages, bytes })
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

fn wills(connection: &Connection) -> rusqlite::Result<HashMap<SessionId, Box<WillRecord>>> {
    let mut statement =
        connection.prepare("SELECT topic, payload, flags, accepted_at, extra, session, delay_millis FROM will")?;
    let mut rows = statement.query([])?;
    let mut all = HashMap::new();
    while let Some(row) = rows.next()? {
        let (session, delay) = (row.get(5)?, Duration::from_millis(row.get(6)?));
        match whole_message(row)? {
            Ok(message) => {
                all.insert(SessionId(session), Box::new(WillRecord { message, delay }));
            }
            Err(error) => error!(%error, session, "a will in the store cannot be read and is left out"),
        }
    }
    Ok(all)
}

/// A message from the columns topic, payload, flags, accepted_at, extra.
fn whole_message(row: &Row<'_>) -> rusqlite::Result<Result<Message, Malformed>> {
    let (payload, extra) = (row.get_ref(1)?.as_blob()?, row.get_ref(4)?.as_blob_or_null()?);
    let (flags, accepted_at) = (row.get(2)?, row.get(3)?);
    let topic = parse_topic(row.get_ref(0)?.as_bytes()?);
    Ok(topic.and_then(|topic| decode_message(topic, payload, flags, accepted_at, extra)))
}

fn parse_topic(text: &[u8]) -> Result<TopicName, Malformed> {
    let text = std::str::from_utf8(text).map_err(|_| Malformed("topic"))?;
    TopicName::new(text).map_err(|_| Malformed("topic"))
}

fn text(row: &Row<'_>, column: usize) -> rusqlite::Result<Arc<str>> {
    Ok(row.get_ref(column)?.as_str()?.into())
}
