//! A look at a database from outside: what the `fieldgate store` command shows, verifies, exports and purges.
//!
//! All but [`purge`] only read, and may do so while a gateway is running on the same database. They also take a database
//! that was moved aside, and get out of a damaged one what can be read.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row};
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::batch::Batch;
use super::open::{self, OpenError, open_read_only, quick_check};
use super::queue::{Count, FRAMES, HEAD, Head, gone_check};
use super::ranges::Ranges;
use super::read::{queued, released_message, sessions};
use super::row::Malformed;
use super::run::Frames;
use super::schema::{APPLICATION_ID, VERSION, key_number, key_sequence, key_slot, slot_keys};
use super::state::{Lanes, Queue, State};
use super::topics::Topics;
use super::{SessionId, Settings, StoredMessage, StoredSession, StoredState, first_sequence, lane, number};
use crate::clock::{Clock, UnixMillis};
use crate::message::{Message, Properties};
use crate::topic::TopicName;

/// How long [`verify`] may take for the structure of the database.
const VERIFY_TIME: Duration = Duration::from_secs(600);
/// How many runs, of 8 KiB mostly, [`export`] reads at a time.
const PART_RUNS: u32 = 256;

/// Why a database could not be looked at.
#[derive(Debug, Error)]
pub enum InspectError {
    #[error("there is no database {0}; give the directory of the store, or the file itself")]
    Missing(PathBuf),
    #[error("{0} is not a database of this program, or of a newer one, or its beginning is damaged")]
    Foreign(PathBuf),
    #[error("{0} is of an older version; start the gateway once, it brings the database up to date")]
    Older(PathBuf),
    #[error("the database {path} cannot be read; export what can be saved with `fieldgate store export`")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error(
        "the database could not be used and was moved to {0}; what could be saved of it is kept, nothing was purged"
    )]
    Quarantined(PathBuf),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(
        "the store in {directory} is in use by {holder}; stop it first, or let it purge while it runs: \
         `POST /api/v1/clients/FACE/CLIENT/purge`, or the button on the page of its web UI"
    )]
    InUse { directory: PathBuf, holder: String },
    #[error("{0} is a file; give the directory of the store, nothing is purged elsewhere")]
    File(PathBuf),
    #[error("no session of the client {0:?} is stored; `fieldgate store show` lists them")]
    NoSession(String),
    #[error("the output cannot be written")]
    Output(#[source] std::io::Error),
}

/// What [`show`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overview {
    pub sessions: Vec<StoredSession>,
    /// Since when the oldest message of a session's queue waits.
    pub oldest: HashMap<SessionId, UnixMillis>,
    pub retained: u64,
    /// Sizes in bytes: of the database, of what is free in it, and of the write-ahead log's file beside it.
    pub database: u64,
    pub free: u64,
    pub log: u64,
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
    /// Messages that could not be read, as far as they can be counted.
    pub unreadable: u64,
}

/// All sessions with what hangs on them, how much their queues hold, and how large the database is.
///
/// # Errors
/// [`InspectError`] where `path`, a database or its directory, cannot be read.
pub fn show(path: &Path) -> Result<Overview, InspectError> {
    let (path, connection) = connect(path)?;
    let log = open::with_suffix(&path, "-wal").metadata().map_or(0, |file| file.len());
    look(&connection)
        .map(|overview| Overview { log, ..overview })
        .map_err(|source| InspectError::Database { path, source })
}

fn look(connection: &Connection) -> rusqlite::Result<Overview> {
    // One snapshot, also while a gateway writes.
    let snapshot = connection.unchecked_transaction()?;
    let state = State::read(&snapshot)?;
    let mut first =
        snapshot.prepare("SELECT accepted_at FROM queue WHERE key BETWEEN ?1 AND ?2 ORDER BY key LIMIT 1")?;
    let mut oldest = HashMap::new();
    for (&session, queue) in state.sessions.iter().flat_map(|(session, lanes)| lanes.iter().map(move |q| (session, q)))
    {
        let (from, to) = slot_keys(queue.slot);
        let at = first.query_row([from, to], |row| row.get(0).map(UnixMillis)).optional()?;
        if let Some(at) = at.filter(|_| queue.messages > 0) {
            oldest.entry(session).and_modify(|known: &mut UnixMillis| *known = at.min(*known)).or_insert(at);
        }
    }
    let number = |sql: &str| snapshot.query_row(sql, [], |row| row.get::<_, u64>(0));
    let page_bytes = number("PRAGMA page_size")?;
    Ok(Overview {
        sessions: sessions(&snapshot, &state)?,
        oldest,
        retained: number("SELECT count(*) FROM retained")?,
        database: number("PRAGMA page_count")? * page_bytes,
        free: number("PRAGMA freelist_count")? * page_bytes,
        log: 0,
    })
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
    let mut export = Export { client_id, known: Known::default(), exported: Exported::default() };
    let (mut version, mut last, mut text) = (None, -1, Vec::new());
    let is_whole = loop {
        // A snapshot that lasts for as long as somebody reads the output would let the log of a running gateway grow.
        let snapshot = connection.unchecked_transaction();
        let _ = connection.query_row("SELECT 1 FROM sqlite_schema", [], |_| Ok(()));
        let now = connection.pragma_query_value(None, "data_version", |row| row.get::<_, i64>(0)).ok();
        if version.is_none() || version != Some(now) {
            (export.known, version) = (Known::readable(&connection), Some(now));
        }
        let mut runs = 0;
        let part = each_run(&connection, &format!("key > {last} ORDER BY key LIMIT {PART_RUNS}"), |head, frames| {
            (last, runs) = (head.key, runs + 1);
            export.write_run(head, frames, &mut text)
        })?;
        drop(snapshot);
        out.write_all(&text).map_err(InspectError::Output)?;
        text.clear();
        if part.is_err() || runs < PART_RUNS {
            break part.is_ok();
        }
    };
    if !is_whole {
        // Behind the damage there may be more; it can only be reached from the end.
        let mut next = i64::MAX;
        let backward = each_run(&connection, &format!("key > {last} ORDER BY key DESC"), |head, frames| {
            next = head.key;
            export.write_run(head, frames, out)
        })?;
        // What a row says of itself can often be read where its messages cannot.
        let between: rusqlite::Result<u64> = connection.query_row(
            "SELECT coalesce(sum(messages), 0) FROM queue WHERE key > ?1 AND key < ?2",
            [last, next],
            |row| row.get(0),
        );
        export.exported.unreadable += between.unwrap_or(0).max(1 + u64::from(backward.is_err()));
    }
    export.write_released(out)?;
    let Export { known, exported, .. } = export;
    match client_id {
        // In a damaged database the session may be what cannot be read.
        Some(client_id)
            if exported == Exported::default() && !known.clients.values().any(|(known, _)| known == client_id) =>
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
/// [`InspectError::InUse`] while a gateway runs on the store; [`InspectError::NoSession`] for an unknown client;
/// [`InspectError::File`] where the settings do not name a directory.
pub fn purge(settings: &Settings, client_id: Option<&str>, clock: &Clock) -> Result<u64, InspectError> {
    if settings.directory.is_file() {
        return Err(InspectError::File(settings.directory.clone()));
    }
    let path = settings.directory.join(open::DATABASE_FILE);
    if !path.exists() {
        return Err(InspectError::Missing(path));
    }
    let failed = |source| InspectError::Database { path: path.clone(), source };
    let open::Found { mut database, lock: _lock, replaced, .. } =
        open::open(settings, clock).map_err(|error| match error {
            OpenError::Locked { directory, holder } => InspectError::InUse { directory, holder },
            error => error.into(),
        })?;
    if let Some(replaced) = replaced {
        return Err(InspectError::Quarantined(replaced.moved_to));
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
            let Some(last) = queue.last else { continue };
            let batch = Batch::removing(record.id, first_sequence(queue.lane), last);
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
        Ok((connection, application_id == APPLICATION_ID, version))
    });
    match looked {
        Ok((connection, true, VERSION)) => Ok((path, connection)),
        Ok((_, true, ..VERSION)) => Err(InspectError::Older(path)),
        Ok(_) => Err(InspectError::Foreign(path)),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) => Err(InspectError::Foreign(path)),
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
    let mut counted: HashMap<i64, Count> = HashMap::new();
    let gone: HashMap<i64, &Ranges> =
        state.sessions.values().flat_map(Lanes::iter).map(|queue| (queue.slot, &queue.gone)).collect();
    let read = each_run::<std::convert::Infallible>(&snapshot, "key >= 0 ORDER BY key", |head, frames| {
        let slot = key_slot(head.key);
        let (mut all, mut damaged) = (Count::default(), 0);
        for frame in Frames::new(head.place(), frames) {
            let size = frame.size(&state.topics);
            all.add(1, size);
            damaged += u64::from(queued(&frame, 0, &state.topics).is_err());
            if !gone.get(&slot).is_some_and(|gone| gone.contains(frame.number)) {
                counted.entry(slot).or_default().add(1, size);
            }
        }
        if all != (Count { messages: head.messages, bytes: head.bytes }) || damaged > 0 {
            let Head { first, messages, .. } = *head;
            let last = head.last();
            let missing = messages.saturating_sub(all.messages);
            findings.push(format!(
                "slot {slot} numbers {first} to {last}: of {messages} messages {damaged} are damaged and {missing} missing"
            ));
        }
        Ok(())
    });
    if let Ok(Err(error)) = read {
        findings.push(format!("the queues cannot be read to their end: {error}"));
    }
    let mut total = 0;
    let queues = state.sessions.iter().flat_map(|(session, lanes)| lanes.iter().map(move |queue| (session.0, queue)));
    for (session, &Queue { lane, slot, messages, bytes, ref released, .. }) in queues {
        let mut found = counted.get(&slot).copied().unwrap_or_default();
        found.add(released.len() as u64, 0);
        total += found.messages;
        if found != (Count { messages, bytes }) {
            let Count { messages: found, bytes: found_bytes } = found;
            findings.push(format!(
                "session {session} lane {lane}: the summary says {messages} messages and {bytes} bytes, the queue holds \
                 {found} and {found_bytes}"
            ));
        }
    }
    let set_aside: i64 = snapshot.query_row("SELECT count(*) FROM damaged", [], |row| row.get(0))?;
    if set_aside > 0 {
        findings.push(format!("{set_aside} runs of messages were found damaged before; table `damaged` holds them"));
    }
    Ok(Verdict { sessions: state.sessions.len() as u64, messages: total, findings })
}

/// Hands runs to `each` as long as they can be read; the inner error is the database's.
fn each_run<E>(
    connection: &Connection,
    condition: &str,
    mut each: impl FnMut(&Head, &[u8]) -> Result<(), E>,
) -> Result<rusqlite::Result<()>, E> {
    let prepared = connection.prepare(&format!("SELECT {HEAD}, frames FROM queue WHERE {condition}"));
    let mut statement = match prepared {
        Ok(statement) => statement,
        Err(error) => return Ok(Err(error)),
    };
    let mut rows = match statement.query([]) {
        Ok(rows) => rows,
        Err(error) => return Ok(Err(error)),
    };
    loop {
        let run = match rows.next() {
            Ok(None) => return Ok(Ok(())),
            Ok(Some(row)) => Head::read(row).and_then(|head| Ok((head, row.get_ref(FRAMES)?.as_blob()?))),
            Err(error) => Err(error),
        };
        match run {
            Ok((head, frames)) => each(&head, frames)?,
            Err(error) => return Ok(Err(error)),
        }
    }
}

/// An export under way.
struct Export<'a> {
    client_id: Option<&'a str>,
    known: Known,
    exported: Exported,
}

impl Export<'_> {
    fn write_run(&mut self, head: &Head, frames: &[u8], out: &mut dyn Write) -> Result<(), InspectError> {
        let Self { client_id, known, exported } = self;
        let (client, lane) = known.owner(head.key);
        if client_id.is_some() && *client_id != client {
            return Ok(());
        }
        let mut left = head.messages;
        for frame in Frames::new(head.place(), frames) {
            left = left.saturating_sub(1);
            if known.is_gone(key_slot(head.key), frame.number) {
                continue;
            }
            match queued(&frame, lane, &known.topics) {
                Ok(message) => {
                    writeln!(out, "{}", to_json(client, &message)).map_err(InspectError::Output)?;
                    exported.messages += 1;
                }
                Err(Malformed(_)) => exported.unreadable += 1,
            }
        }
        exported.unreadable += left;
        Ok(())
    }

    fn write_released(&mut self, out: &mut dyn Write) -> Result<(), InspectError> {
        let Self { client_id, known, exported } = self;
        for &key in &known.released {
            let (client, lane) = known.owner(key);
            if client_id.is_none() || *client_id == client {
                let message = released_message(key_sequence(key, lane));
                writeln!(out, "{}", to_json(client, &message)).map_err(InspectError::Output)?;
                exported.messages += 1;
            }
        }
        Ok(())
    }
}

/// What a database says of its runs elsewhere, as far as that can be read.
#[derive(Default)]
struct Known {
    topics: Topics,
    /// Client ids and lanes by slot.
    clients: HashMap<i64, (String, u8)>,
    gone: HashMap<i64, Ranges>,
    /// Keys of released messages.
    released: Vec<i64>,
}

impl Known {
    fn readable(connection: &Connection) -> Self {
        let mut known = Self { topics: readable_topics(connection), ..Self::default() };
        // Each by itself: of a damaged database one may be readable.
        for places in [
            "SELECT slot, client_id, 0 FROM session",
            "SELECT lane.slot, client_id, lane FROM lane JOIN session ON session.id = lane.session",
        ] {
            each_readable(connection, places, |row| {
                known.clients.insert(row.get(0)?, (row.get(1)?, row.get(2)?));
                Ok(())
            });
        }
        each_readable(connection, "SELECT first, last, sum FROM gone", |row| {
            let (first, last): (i64, i64) = (row.get(0)?, row.get(1)?);
            if row.get::<_, i64>(2)? == gone_check(first, last) {
                let gone = known.gone.entry(key_slot(first)).or_default();
                gone.insert_range(key_number(first), key_number(last));
            }
            Ok(())
        });
        each_readable(connection, "SELECT key FROM released", |row| {
            known.released.push(row.get(0)?);
            Ok(())
        });
        known
    }

    fn is_gone(&self, slot: i64, number: u64) -> bool {
        self.gone.get(&slot).is_some_and(|gone| gone.contains(number))
    }

    /// Whose the key is, as far as it is known, and in which lane.
    fn owner(&self, key: i64) -> (Option<&str>, u8) {
        self.clients.get(&key_slot(key)).map_or((None, 0), |(client, lane)| (Some(client), *lane))
    }
}

fn readable_topics(connection: &Connection) -> Topics {
    let mut topics = Topics::default();
    each_readable(connection, "SELECT id, name FROM topic", |row| {
        if let Ok(name) = TopicName::new(&row.get::<_, String>(1)?) {
            topics.insert(row.get(0)?, name);
        }
        Ok(())
    });
    topics
}

/// Hands rows to `each` until the database cannot be read any further; a row that makes no sense is left out.
fn each_readable(connection: &Connection, sql: &str, mut each: impl FnMut(&Row<'_>) -> rusqlite::Result<()>) {
    let Ok(mut statement) = connection.prepare(sql) else { return };
    let Ok(mut rows) = statement.query([]) else { return };
    while let Ok(Some(row)) = rows.next() {
        let _ = each(row);
    }
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
