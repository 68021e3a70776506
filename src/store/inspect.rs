//! A look at a database from outside: what the `fieldgate store` command shows, verifies, exports and purges.
//!
//! All but [`purge`] only read, and may do so while a gateway is running on the same database. They also take a database
//! that was moved aside, and get out of a damaged one what can be read.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, Row};
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::batch::Batch;
use super::open::{self, OpenError, open_read_only, quick_check};
use super::read::{QUEUE_COLUMNS, queue_row, sessions};
use super::row::Malformed;
use super::schema::{APPLICATION_ID, VERSION, key_sequence, key_slot};
use super::state::{Queue, State};
use super::topics::Topics;
use super::{Settings, StoredMessage, StoredSession, StoredState, lane, number};
use crate::clock::Clock;
use crate::message::{Message, Properties};
use crate::topic::TopicName;

/// The first version of the database with a table of lanes; an older one is read as if it had an empty one.
const LANES_SINCE: i32 = 2;

/// How long [`verify`] may take for the structure of the database.
const VERIFY_TIME: Duration = Duration::from_secs(600);

/// Why a database could not be looked at.
#[derive(Debug, Error)]
pub enum InspectError {
    #[error("there is no database {0}; give the directory of the store, or the file itself")]
    Missing(PathBuf),
    #[error("{0} is not a database of this program, or of a newer one")]
    Foreign(PathBuf),
    #[error("the database {path} cannot be read; export what can be saved with `fieldgate store export`")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("the database could not be used and was moved to {0}; nothing was purged")]
    Quarantined(PathBuf),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("no session of the client {0:?} is stored; `fieldgate store show` lists them")]
    NoSession(String),
    #[error("the output cannot be written")]
    Output(#[source] std::io::Error),
}

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub sessions: u64,
    pub messages: u64,
    /// One sentence for each thing that is wrong; empty for a database that is whole.
    pub findings: Vec<String>,
}

/// What [`export`] wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    pub messages: u64,
    /// Rows, or parts of a damaged database, that could not be read.
    pub unreadable: u64,
}

/// All sessions with what hangs on them, and how much their queues hold.
///
/// # Errors
/// [`InspectError`] where `path`, a database or its directory, cannot be read.
pub fn show(path: &Path) -> Result<Vec<StoredSession>, InspectError> {
    let (path, connection) = connect(path)?;
    State::read(&connection)
        .and_then(|state| sessions(&connection, &state))
        .map_err(|source| InspectError::Database { path, source })
}

/// Reads everything and says what is wrong.
///
/// # Errors
/// As [`show`].
pub fn verify(path: &Path) -> Result<Verdict, InspectError> {
    let (path, mut connection) = connect(path)?;
    verify_all(&mut connection).map_err(|source| InspectError::Database { path, source })
}

/// Writes the queued messages as JSON, one on each line, in the order of their sequences, all or those of one client.
/// A payload that is not text stands in `payload_base64`.
///
/// # Errors
/// As [`show`]; [`InspectError::NoSession`] for an unknown client; [`InspectError::Output`] where `out` fails. A damaged database is read as far as it goes.
pub fn export(path: &Path, client_id: Option<&str>, out: &mut dyn Write) -> Result<Exported, InspectError> {
    let (_, connection) = connect(path)?;
    let topics = readable_topics(&connection);
    let clients = readable_clients(&connection);
    let mut exported = Exported::default();
    let mut write = |row: &Row<'_>| -> Result<bool, InspectError> {
        let Ok(key) = row.get::<_, i64>(0) else { return Ok(false) };
        let (client, lane) = clients.get(&key_slot(key)).map_or((None, 0), |(client, lane)| (Some(&**client), *lane));
        let Ok(row) = queue_row(row, lane, &topics) else { return Ok(false) };
        if client_id.is_some() && client_id != client {
            return Ok(true);
        }
        match row {
            Ok((message, _)) => {
                let line = to_json(client, &message);
                writeln!(out, "{line}").map_err(InspectError::Output)?;
                exported.messages += 1;
            }
            Err(Malformed(_)) => exported.unreadable += 1,
        }
        Ok(true)
    };
    let mut last = -1;
    let forward = each_row(&connection, "key >= 0 ORDER BY key", |row| {
        last = row.get(0).unwrap_or(last);
        write(row)
    })?;
    if forward.is_err() {
        // Behind the damage there may be more; it can only be reached from the end.
        let backward = each_row(&connection, &format!("key > {last} ORDER BY key DESC"), &mut write)?;
        exported.unreadable += 1 + u64::from(backward.is_err());
    }
    match client_id {
        // In a damaged database the session may be what cannot be read.
        Some(client_id)
            if exported == Exported::default() && !clients.values().any(|(known, _)| known == client_id) =>
        {
            Err(InspectError::NoSession(client_id.to_owned()))
        }
        _ => Ok(exported),
    }
}

/// Deletes the queued messages of a client's sessions, of all clients where `client_id` is `None`. The sessions stay.
/// Returns how many messages went.
///
/// # Errors
/// [`InspectError::Open`] while a gateway runs on the store; [`InspectError::NoSession`] for an unknown client.
pub fn purge(settings: &Settings, client_id: Option<&str>, clock: &Clock) -> Result<u64, InspectError> {
    let path = settings.directory.join(open::DATABASE_FILE);
    if !path.exists() {
        return Err(InspectError::Missing(path));
    }
    let failed = |source| InspectError::Database { path: path.clone(), source };
    let (mut database, _lock, quarantined) = open::open(settings, clock)?;
    if let Some(aside) = quarantined {
        return Err(InspectError::Quarantined(aside));
    }
    let sessions = sessions(&database.connection, &database.state).map_err(failed)?;
    let chosen: Vec<_> = sessions
        .iter()
        .filter(|session| client_id.is_none_or(|client_id| *session.record.client_id == *client_id))
        .collect();
    if let Some(client_id) = client_id.filter(|_| chosen.is_empty()) {
        return Err(InspectError::NoSession(client_id.into()));
    }
    let mut removed = 0;
    for StoredSession { record, queues, .. } in chosen {
        for queue in queues {
            let (Some(first), Some(last)) = (queue.first, queue.last) else { continue };
            let batch = Batch::removing(record.id, first, last);
            removed += database.commit(&batch).map_err(failed)?.messages_removed;
        }
    }
    database
        .checkpoint()
        .and_then(|()| database.vacuum(u64::MAX))
        .and_then(|()| database.checkpoint())
        .map_err(failed)?;
    Ok(removed)
}

fn connect(path: &Path) -> Result<(PathBuf, Connection), InspectError> {
    let path = if path.is_dir() { path.join(open::DATABASE_FILE) } else { path.to_owned() };
    if !path.exists() {
        return Err(InspectError::Missing(path));
    }
    let looked = open_read_only(&path).and_then(|connection| {
        let application_id: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
        let version: i32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if version < LANES_SINCE {
            connection.execute_batch("PRAGMA temp_store = MEMORY; CREATE TEMP TABLE lane (session, lane, slot)")?;
        }
        Ok((connection, application_id == APPLICATION_ID && version <= VERSION))
    });
    match looked {
        Ok((connection, true)) => Ok((path, connection)),
        Ok((_, false)) => Err(InspectError::Foreign(path)),
        Err(source) => Err(InspectError::Database { path, source }),
    }
}

fn verify_all(connection: &mut Connection) -> rusqlite::Result<Verdict> {
    let mut findings = match quick_check(connection, VERIFY_TIME) {
        Ok(Some(findings)) => findings,
        Err(error) => vec![format!("the structure cannot be checked: {error}")],
        Ok(None) => vec!["the check of the structure was not finished in time".into()],
    };
    // One snapshot for everything below, also while a gateway writes.
    let snapshot = connection.unchecked_transaction()?;
    let state = match State::read(&snapshot) {
        Ok(state) => state,
        Err(error) => {
            findings.push(format!("sessions and summaries cannot be read: {error}"));
            return Ok(Verdict { findings, ..Verdict::default() });
        }
    };
    let mut counted: HashMap<i64, (u64, u64)> = HashMap::new();
    let mut messages = 0;
    let read = each_row::<std::convert::Infallible>(&snapshot, "key >= 0 ORDER BY key", |row| {
        let (Ok(key), Ok(row)) = (row.get::<_, i64>(0), queue_row(row, 0, &state.topics)) else { return Ok(false) };
        messages += 1;
        match row {
            Ok((_, size)) => {
                let count = counted.entry(key_slot(key)).or_default();
                *count = (count.0 + 1, count.1 + size as u64);
            }
            Err(error) => findings.push(format!("slot {} number {}: {error}", key_slot(key), key_sequence(key, 0))),
        }
        Ok(true)
    });
    if let Ok(Err(error)) = read {
        findings.push(format!("the queues cannot be read to their end: {error}"));
    }
    let queues = state.sessions.iter().flat_map(|(session, lanes)| lanes.iter().map(move |queue| (session.0, queue)));
    for (session, &Queue { lane, slot, messages, bytes, .. }) in queues {
        let (found, found_bytes) = counted.get(&slot).copied().unwrap_or_default();
        if (found, found_bytes) != (messages, bytes) {
            findings.push(format!(
                "session {session} lane {lane}: the summary says {messages} messages and {bytes} bytes, the queue holds \
                 {found} and {found_bytes}"
            ));
        }
    }
    Ok(Verdict { sessions: state.sessions.len() as u64, messages, findings })
}

/// Hands rows of queues to `each` until it returns false or there are no more; the inner error is the database's.
fn each_row<E>(
    connection: &Connection,
    condition: &str,
    mut each: impl FnMut(&Row<'_>) -> Result<bool, E>,
) -> Result<rusqlite::Result<()>, E> {
    let prepared = connection.prepare(&format!("SELECT {QUEUE_COLUMNS} FROM queue WHERE {condition}"));
    let mut statement = match prepared {
        Ok(statement) => statement,
        Err(error) => return Ok(Err(error)),
    };
    let mut rows = match statement.query([]) {
        Ok(rows) => rows,
        Err(error) => return Ok(Err(error)),
    };
    loop {
        match rows.next() {
            Ok(None) => return Ok(Ok(())),
            Ok(Some(row)) if each(row)? => {}
            Ok(Some(_)) => return Ok(Err(rusqlite::Error::InvalidQuery)),
            Err(error) => return Ok(Err(error)),
        }
    }
}

fn readable_topics(connection: &Connection) -> Topics {
    let mut topics = Topics::default();
    let Ok(mut statement) = connection.prepare("SELECT id, name FROM topic") else { return topics };
    let Ok(mut rows) = statement.query([]) else { return topics };
    while let Ok(Some(row)) = rows.next() {
        if let (Ok(number), Ok(name)) = (row.get(0), row.get::<_, String>(1))
            && let Ok(name) = TopicName::new(&name)
        {
            topics.insert(number, name);
        }
    }
    topics
}

/// Client ids and lanes by slot.
fn readable_clients(connection: &Connection) -> HashMap<i64, (String, u8)> {
    let mut clients = HashMap::new();
    // Each by itself: of a damaged database one may be readable.
    for places in [
        "SELECT slot, client_id, 0 FROM session",
        "SELECT lane.slot, client_id, lane FROM lane JOIN session ON session.id = lane.session",
    ] {
        let Ok(mut statement) = connection.prepare(places) else { continue };
        let Ok(mut rows) = statement.query([]) else { continue };
        while let Ok(Some(row)) = rows.next() {
            if let (Ok(slot), Ok(client_id), Ok(lane)) = (row.get(0), row.get(1), row.get(2)) {
                clients.insert(slot, (client_id, lane));
            }
        }
    }
    clients
}

fn to_json(client_id: Option<&str>, stored: &StoredMessage) -> Value {
    let mut line = Map::new();
    let mut put = |name: &str, value: Value| line.insert(name.into(), value);
    put("client_id", json!(client_id));
    put("lane", json!(lane(stored.sequence)));
    put("sequence", json!(number(stored.sequence)));
    put("qos", json!(stored.qos.level()));
    put("retain", json!(stored.retain));
    let StoredState::Queued(message) = &stored.state else {
        put("state", json!("released"));
        return Value::Object(line);
    };
    let Message { topic, payload, properties, expiry_interval, accepted_at, .. } = &**message;
    put("state", json!("queued"));
    put("accepted_at", json!(accepted_at.to_string()));
    put("topic", json!(topic.as_str()));
    match std::str::from_utf8(payload) {
        Ok(text) => put("payload", json!(text)),
        Err(_) => put("payload_base64", json!(base64(payload))),
    };
    if let Some(interval) = expiry_interval {
        put("expiry_interval_seconds", json!(interval.as_secs_f64()));
    }
    if let Some(identifiers) = stored.identifiers.as_deref() {
        put("subscription_identifiers", json!(identifiers));
    }
    if let Some(properties) = properties {
        let Properties { content_type, response_topic, correlation_data, user_properties, .. } = &**properties;
        if let Some(content_type) = content_type {
            put("content_type", json!(content_type));
        }
        if let Some(topic) = response_topic {
            put("response_topic", json!(topic.as_str()));
        }
        if let Some(data) = correlation_data {
            put("correlation_data_base64", json!(base64(data)));
        }
        if !user_properties.is_empty() {
            put("user_properties", json!(user_properties));
        }
    }
    Value::Object(line)
}

/// RFC 4648 §4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().enumerate().fold(0u32, |group, (at, &byte)| group | u32::from(byte) << (16 - 8 * at));
        for place in 0..4 {
            let index = (group >> (18 - 6 * place) & 63) as usize;
            text.push(if place <= chunk.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_follows_the_test_vectors_of_rfc_4648() {
        let check = |text: &str, expected: &str| assert_eq!(base64(text.as_bytes()), expected);
        check("", "");
        check("f", "Zg==");
        check("fo", "Zm8=");
        check("foo", "Zm9v");
        check("foob", "Zm9vYg==");
        check("fooba", "Zm9vYmE=");
        check("foobar", "Zm9vYmFy");
    }
}
