//! What can be saved of a database that is damaged, written into a new one.
//!
//! Every row and every message that passes its check is taken over, under the key it had: queues keep their order and
//! their sequences, and QoS 2 deliveries go on where they were. Nothing is guessed: a row that fails its check is left
//! out, and what belonged to a session that is lost goes with it.
//!
//! What cannot be read may have been sent. Which packet identifiers the other side holds is not known any more, and every
//! session is marked so: see table `doubt` in `schema`, and what the hub does about it in `hub::queue`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, params_from_iter};
use thiserror::Error;

use super::SessionId;
use super::database::{write_doubt, write_lane, write_summary};
use super::op::number;
use super::pages::Pages;
use super::queue::{self, Count, gone_check};
use super::ranges::Ranges;
use super::row::Content;
use super::run::{self, Frames, Run};
use super::schema::{self, APPLICATION_ID, READABLE_VERSION, VERSION, key_number, key_slot};
use super::state::Place;
use super::sums;
use super::topics::Topics;
use crate::topic::TopicName;

/// How long it may take; what was not read by then stays in the database that is moved aside. The gateway does not
/// serve meanwhile, and whoever supervises it waits no longer than a minute and a half.
const SALVAGE_TIME: Duration = Duration::from_secs(30);

/// What was saved, and what is known to be lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Salvaged {
    pub sessions: u64,
    pub subscriptions: u64,
    pub retained: u64,
    pub messages: u64,
    /// Messages that are lost, as far as they can be counted.
    pub lost: u64,
    /// Of `messages`, those at QoS 2: one whose acknowledgement is lost comes a second time.
    pub may_come_twice: u64,
    /// QoS 2 messages that clients may not have released: one that is sent again is taken for the same, unless it is new and
    /// says so.
    pub in_doubt: u64,
    /// Rows of sessions, subscriptions and the like that are lost, as far as they can be counted.
    pub lost_rows: u64,
    /// Pages that could not be read, each with everything below it.
    pub unreadable_pages: u64,
    /// There was no time to read all of it.
    pub is_unfinished: bool,
    /// Queues that have lost messages, by client id, and how many.
    pub queues: Vec<(Arc<str>, u64)>,
}

/// Why nothing can be saved.
#[derive(Debug, Error)]
pub(super) enum SalvageError {
    #[error("it is not a database of this version of the program")]
    Foreign,
    #[error("nothing that can be read is in it")]
    Nothing,
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    #[error("the new database cannot be written")]
    Write(#[from] rusqlite::Error),
}

/// Writes what can be saved of the database at `path`, with the log beside it, into a new one at `into`. The new one is
/// on disk when this returns. `known` are the lanes of the sessions that a running store has: they get their places also
/// where their rows are lost, so that nothing is lost with them.
pub(super) fn salvage(path: &Path, log: &Path, into: &Path, known: &[Place]) -> Result<Salvaged, SalvageError> {
    let mut pages = Pages::open(path, log, Instant::now() + SALVAGE_TIME)?;
    // A first page that cannot be read says nothing; what is found below has its checks.
    let readable = READABLE_VERSION..=VERSION;
    if pages.version(APPLICATION_ID).is_some_and(|(version, is_ours)| !is_ours || !readable.contains(&version)) {
        return Err(SalvageError::Foreign);
    }
    let mut connection = Connection::open(into)?;
    connection
        .execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;")?;
    schema::make(&mut connection)?;
    let mut roots = schema::roots(&connection)?;
    roots.extend(pages.roots());
    connection.execute_batch("BEGIN")?;
    let mut salvage =
        Salvage { connection: &connection, roots, pages, queues: HashMap::new(), found: Salvaged::default() };
    salvage.run(known)?;
    let found = salvage.finish()?;
    if found.sessions + found.retained == 0 && known.is_empty() {
        return Err(SalvageError::Nothing);
    }
    connection.execute_batch("COMMIT")?;
    connection.close().map_err(|(_, error)| error)?;
    File::open(into)?.sync_all()?;
    Ok(found)
}

struct Salvage<'a> {
    connection: &'a Connection,
    roots: HashMap<String, u32>,
    pages: Pages,
    /// By slot.
    queues: HashMap<i64, Queue>,
    found: Salvaged,
}

/// A lane of a session whose row is whole.
struct Queue {
    client_id: Arc<str>,
    /// The summary: the last number that it counts, and how many messages there are up to that.
    last: Option<u64>,
    expected: u64,
    /// The highest number that was ever used, as far as it is known.
    highest: Option<u64>,
    gone: Ranges,
    released: Ranges,
    /// Numbers of runs that were taken over.
    taken: Ranges,
    /// Of `count`, messages at QoS 2 that are not released.
    exactly_once: u64,
    count: Count,
    /// Of `count`, messages up to `last`.
    counted: u64,
    lost: u64,
}

impl Queue {
    fn new(client_id: Arc<str>) -> Self {
        Self {
            client_id,
            last: None,
            expected: 0,
            highest: None,
            gone: Ranges::default(),
            released: Ranges::default(),
            taken: Ranges::default(),
            exactly_once: 0,
            count: Count::default(),
            counted: 0,
            lost: 0,
        }
    }

    fn saw(&mut self, number: u64) {
        self.highest = self.highest.max(Some(number));
    }

    fn add(&mut self, number: u64, bytes: u64) {
        self.count.add(1, bytes);
        self.counted += u64::from(Some(number) <= self.last);
    }
}

impl Salvage<'_> {
    fn run(&mut self, known: &[Place]) -> rusqlite::Result<()> {
        let mut clients: HashMap<i64, Arc<str>> = HashMap::new();
        let mut queues = HashMap::new();
        self.found.sessions = self.checked("session", |row| {
            let [Value::Integer(id), Value::Integer(slot), _, Value::Text(client_id), ..] = row else { return false };
            let client_id: Arc<str> = client_id.as_str().into();
            queues.insert(*slot, Queue::new(client_id.clone()));
            clients.insert(*id, client_id).is_none()
        })?;
        self.checked("lane", |row| {
            let [Value::Integer(session), _, Value::Integer(slot), ..] = row else { return false };
            let client_id = clients.get(session);
            client_id.is_some_and(|client_id| queues.insert(*slot, Queue::new(client_id.clone())).is_none())
        })?;
        for &Place { session, lane, slot, .. } in known {
            let id = i64::try_from(session.0).unwrap_or(i64::MAX);
            if let Entry::Vacant(place) = queues.entry(slot) {
                let client_id = clients.entry(id).or_insert_with(|| format!("session {id}").into());
                place.insert(Queue::new(client_id.clone()));
                write_lane(self.connection, session, lane, slot)?;
                self.found.lost_rows += 1;
            }
        }
        let is_known = |row: &[Value]| matches!(row, [Value::Integer(session), ..] if clients.contains_key(session));
        self.found.subscriptions = self.checked("subscription", is_known)?;
        self.found.in_doubt = self.checked("inbound", is_known)?;
        self.rows("will", |row| is_known(row) && row.split_at_checked(2).is_some_and(|(_, row)| is_message(row)))?;
        self.found.retained = self.rows("retained", is_message)?;
        self.checked("summary", |row| {
            if let [Value::Integer(slot), Value::Integer(last), Value::Integer(messages), ..] = row
                && let Some(queue) = queues.get_mut(slot)
                && let (Ok(last), Ok(messages)) = (u64::try_from(*last), u64::try_from(*messages))
            {
                (queue.last, queue.expected) = (Some(last), messages);
                queue.saw(last);
            }
            // Counted anew at the end.
            false
        })?;
        // A running store has counted also what its summaries have not.
        for &Place { slot, last, messages, .. } in known {
            if let (Some(queue), Some(last)) = (queues.get_mut(&slot), last) {
                (queue.last, queue.expected) = (Some(number(last)), messages);
                queue.saw(number(last));
            }
        }
        for &session in clients.keys() {
            write_doubt(self.connection, SessionId(session.unsigned_abs()), None)?;
        }
        let mut topics = Topics::default();
        self.rows("topic", |row| {
            let [Value::Integer(number), Value::Text(name)] = row else { return false };
            let name = TopicName::new(name);
            name.is_ok_and(|name| {
                topics.insert(*number, name);
                true
            })
        })?;
        self.rows("gone", |row| {
            if let [Value::Integer(first), Value::Integer(last), Value::Integer(sum)] = row
                && *sum == gone_check(*first, *last)
                && first <= last
                && let Some(queue) = queues.get_mut(&key_slot(*first))
            {
                queue.gone.insert_range(key_number(*first), key_number(*last));
                queue.saw(key_number(*last));
            }
            // The runs are written without what is gone.
            false
        })?;
        self.checked("released", |row| {
            let [Value::Integer(key), ..] = row else { return false };
            let number = key_number(*key);
            queues.get_mut(&key_slot(*key)).is_some_and(|queue| {
                queue.saw(number);
                queue.released.insert_range(number, number);
                queue.add(number, 0);
                true
            })
        })?;
        self.queues = queues;
        self.runs(&topics)
    }

    /// Takes over the runs of the queues, without the messages that are damaged or done with.
    fn runs(&mut self, topics: &Topics) -> rusqlite::Result<()> {
        let Self { connection, queues, .. } = self;
        let mut written = Ok(());
        self.pages.walk(self.roots.get("queue").copied().unwrap_or(0), &mut |row_id, row| {
            if let [
                _,
                Value::Integer(span),
                Value::Integer(messages),
                _,
                Value::Integer(accepted_at),
                _,
                _,
                Value::Blob(frames),
            ] = row
                && let Some(queue) = queues.get_mut(&key_slot(row_id))
                && let Some(first) = u64::try_from(*span).ok().and_then(|span| key_number(row_id).checked_sub(span))
                && written.is_ok()
            {
                let place = run::Place { slot: key_slot(row_id), first, accepted_at: *accepted_at };
                let messages = u64::try_from(*messages).unwrap_or(0).min(key_number(row_id) - first + 1);
                if let Some(run) = queue.take_over(place, key_number(row_id), messages, frames, topics) {
                    written = queue::write(connection, &run);
                }
            }
        });
        written
    }

    /// Takes over the rows of a table that pass the check of [`sums`] and that `wants` wants; returns how many.
    fn checked(&mut self, table: &'static str, mut wants: impl FnMut(&[Value]) -> bool) -> rusqlite::Result<u64> {
        let mut damaged = 0;
        let taken = self.rows(table, |row| {
            let is_whole = row.split_last().is_some_and(|(sum, values)| {
                *sum == Value::Integer(sums::sum(table, values.iter().map(ValueRef::from)))
            });
            damaged += u64::from(!is_whole);
            is_whole && wants(row)
        });
        self.found.lost_rows += damaged;
        taken
    }

    /// Takes over the rows of `table` that `wants` wants; returns how many.
    fn rows(&mut self, table: &str, mut wants: impl FnMut(&[Value]) -> bool) -> rusqlite::Result<u64> {
        let columns = self.connection.prepare(&format!("SELECT * FROM {table}"))?.column_count();
        let places: Vec<_> = (1..=columns).map(|column| format!("?{column}")).collect();
        let sql = format!("INSERT OR IGNORE INTO {table} VALUES ({})", places.join(", "));
        let mut insert = self.connection.prepare(&sql)?;
        let mut taken = Ok(0);
        self.pages.walk(self.roots.get(table).copied().unwrap_or(0), &mut |row_id, row| {
            let mut row = row.to_vec();
            // The row id stands for the column that is the primary key.
            if let Some(key @ Value::Null) = row.first_mut() {
                *key = Value::Integer(row_id);
            }
            if row.len() == columns
                && wants(&row)
                && let Ok(count) = &mut taken
            {
                match insert.execute(params_from_iter(row)) {
                    Ok(inserted) => *count += inserted as u64,
                    Err(error) => taken = Err(error),
                }
            }
        });
        taken
    }

    /// Writes the summaries and says what there is.
    fn finish(self) -> rusqlite::Result<Salvaged> {
        let Self { connection, pages, queues, mut found, .. } = self;
        let mut lost: HashMap<Arc<str>, u64> = HashMap::new();
        for (slot, queue) in queues {
            found.messages += queue.count.messages;
            found.may_come_twice += queue.exactly_once;
            let missing = queue.missing();
            if let Some(highest) = queue.highest {
                write_summary(connection, slot, highest, queue.count)?;
            }
            if missing > 0 {
                *lost.entry(queue.client_id).or_default() += missing;
            }
        }
        found.lost = lost.values().sum();
        found.queues = lost.into_iter().collect();
        found.queues.sort();
        (found.unreadable_pages, found.is_unfinished) = (pages.unreadable, pages.is_late);
        Ok(found)
    }
}

impl Queue {
    /// How many messages are lost, as far as they can be counted.
    fn missing(&self) -> u64 {
        self.lost.max(self.expected.saturating_sub(self.counted))
    }

    /// What is good of the run at `place`, which ends before or with number `last` and had so many messages.
    fn take_over(
        &mut self,
        place: run::Place,
        last: u64,
        messages: u64,
        frames: &[u8],
        topics: &Topics,
    ) -> Option<Run> {
        let run::Place { slot, first, accepted_at } = place;
        // The key of a run that is there already.
        if self.taken.contains(last) {
            return None;
        }
        let mut run = Run {
            slot,
            first,
            last,
            messages: 0,
            bytes: 0,
            accepted_at,
            lasted: 0,
            expires_at: None,
            frames: Vec::new(),
        };
        let mut whole = 0;
        for frame in Frames::new(place, frames).filter(|frame| frame.checked_topic(topics).is_ok()) {
            whole += 1;
            let number = frame.number;
            // An older version of a run, which a lost page has left behind, may hold what is in another one too.
            if [&self.gone, &self.released, &self.taken].into_iter().any(|ranges| ranges.contains(number)) {
                continue;
            }
            let size = frame.size(topics);
            run.messages += 1;
            run.bytes += size;
            self.exactly_once += u64::from(frame.is_exactly_once());
            run.lasted = run.lasted.max(frame.content.accepted_at.saturating_sub(accepted_at));
            run.expires_at = [run.expires_at, frame.expires_at()].into_iter().flatten().min();
            run.frames.extend_from_slice(frame.encoded);
            self.add(number, size);
        }
        self.lost += messages.saturating_sub(whole);
        // A place that is damaged has no message that is whole.
        if whole > 0 {
            self.saw(last);
        }
        if run.messages == 0 {
            return None;
        }
        self.taken.insert_range(first, last);
        Some(run)
    }
}

/// Whether the columns from the topic on are those of a message that is whole.
fn is_message(row: &[Value]) -> bool {
    let [Value::Text(topic), Value::Blob(payload), Value::Integer(flags), Value::Integer(accepted_at), extra, sum] =
        row
    else {
        return false;
    };
    let (Ok(flags), Ok(extra)) = (u8::try_from(*flags), ValueRef::from(extra).as_blob_or_null()) else { return false };
    let content = Content { payload, flags, accepted_at: *accepted_at, extra };
    *sum == Value::Integer(content.check(topic.as_bytes()))
}
