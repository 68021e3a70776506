//! What older versions of the database held, and what becomes of it. Only `schema` runs this, once for each database.

use std::collections::HashMap;

use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, Row as SqlRow, params, params_from_iter};
use tracing::error;

use super::SessionId;
use super::batch::Row;
use super::queue;
use super::row::{Content, Grant, Malformed, parse_topic};
use super::run::Run;
use super::schema::{key_number, key_slot};
use super::sums;
use super::topics::Topics;

/// Up to version 2: the row is a QoS 2 message that its receiver has taken, without content.
const RELEASED: i64 = 1 << 3;

/// From version 2, where each message had a row of its own, to 3, where they are packed into runs and have checks.
pub(super) fn pack_queues(connection: &Connection) -> rusqlite::Result<()> {
    let topics = Topics::read(connection)?;
    let mut counts: HashMap<i64, Held> = HashMap::new();
    let mut run: Option<Run> = None;
    let mut lost = 0;
    let mut statement = connection
        .prepare("SELECT key, topic, payload, flags, accepted_at, extra FROM queue_1 WHERE key >= 0 ORDER BY key")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let key: i64 = row.get(0)?;
        let (slot, sequence) = (key_slot(key), key_number(key));
        let held = counts.entry(slot).or_default();
        held.last = sequence;
        if row.get::<_, i64>(3)? & RELEASED != 0 {
            connection.prepare_cached("INSERT INTO released VALUES (?1)")?.execute([key])?;
            held.count.add(1, 0);
            continue;
        }
        let Ok((message, number)) = message(row, sequence, &topics)? else {
            lost += 1;
            continue;
        };
        held.count.add(1, u64::try_from(message.message.size()).unwrap_or(u64::MAX));
        if run.as_mut().is_some_and(|run| run.slot == slot && run.push(&message, number)) {
            continue;
        }
        if let Some(full) = run.replace(Run::new(slot, &message, number)) {
            queue::write(connection, &full)?;
        }
    }
    drop(rows);
    run.map_or(Ok(()), |run| queue::write(connection, &run))?;
    if lost > 0 {
        error!(lost, "messages in the database of an older version cannot be read and are lost");
    }
    for (slot, Held { last, count }) in counts {
        connection
            .prepare_cached(
                "INSERT INTO summary VALUES (?1, ?2, ?3, ?4) ON CONFLICT (slot) DO UPDATE SET
                 last = max(last, ?2), messages = ?3, bytes = ?4",
            )?
            .execute(params![slot, last, count.messages, count.bytes])?;
    }
    add_checks(connection, "retained", "topic")?;
    add_checks(connection, "will", "session")?;
    connection.execute_batch("DROP TABLE queue_1")
}

/// From version 3 to 4, where the rows of the small tables have checks.
pub(super) fn add_sums(connection: &Connection) -> rusqlite::Result<()> {
    for table in ["session", "lane", "subscription", "inbound", "released", "summary"] {
        let mut statement = connection.prepare(&format!("SELECT * FROM {table}"))?;
        let columns = statement.column_count();
        let rows = statement.query_map([], |row| (0..columns - 1).map(|column| row.get(column)).collect())?;
        let rows: Vec<Vec<Value>> = rows.collect::<rusqlite::Result<_>>()?;
        let places: Vec<_> = (1..=columns).map(|column| format!("?{column}")).collect();
        let mut replace =
            connection.prepare(&format!("INSERT OR REPLACE INTO {table} VALUES ({})", places.join(", ")))?;
        for mut row in rows {
            let sum = sums::sum(table, row.iter().map(ValueRef::from));
            row.push(Value::Integer(sum));
            replace.execute(params_from_iter(row))?;
        }
    }
    Ok(())
}

/// What a slot holds.
#[derive(Default)]
struct Held {
    last: u64,
    count: queue::Count,
}

fn message(
    row: &SqlRow<'_>,
    sequence: u64,
    topics: &Topics,
) -> rusqlite::Result<Result<(Row, Option<i64>), Malformed>> {
    let extra = row.get_ref(5)?.as_blob_or_null()?;
    let decode = || {
        let (topic, number) = match row.get_ref(1).map_err(|_| Malformed("topic"))? {
            ValueRef::Integer(number) => (topics.name(number).cloned().ok_or(Malformed("topic number"))?, Some(number)),
            ValueRef::Text(text) => (parse_topic(text)?, None),
            _ => return Err(Malformed("topic")),
        };
        let payload = row.get_ref(2).ok().and_then(|value| value.as_blob().ok()).ok_or(Malformed("payload"))?;
        let accepted_at = row.get(4).map_err(|_| Malformed("time"))?;
        let flags = row.get(3).map_err(|_| Malformed("flags"))?;
        let content = Content { payload, flags, accepted_at, extra };
        let Grant { qos, retain, identifiers, shared } = content.grant()?;
        let message = content.message(topic)?.into();
        // The session does not stand in a run.
        let session = SessionId(0);
        Ok((Row { session, sequence, qos, retain, identifiers, shared, message }, number))
    };
    Ok(decode())
}

/// Gives the messages of `table` their checks; `key` is the column that tells its rows apart.
fn add_checks(connection: &Connection, table: &str, key: &str) -> rusqlite::Result<()> {
    let sql = format!("SELECT {key}, topic, payload, flags, accepted_at, extra FROM {table}");
    let mut statement = connection.prepare(&sql)?;
    let sums = statement.query_map([], |row| {
        let (payload, extra) = (row.get_ref(2)?.as_blob()?, row.get_ref(5)?.as_blob_or_null()?);
        let content = Content { payload, flags: row.get(3)?, accepted_at: row.get(4)?, extra };
        Ok((row.get::<_, Value>(0)?, content.check(row.get_ref(1)?.as_bytes()?)))
    })?;
    let sums: Vec<_> = sums.collect::<rusqlite::Result<_>>()?;
    let mut update = connection.prepare(&format!("UPDATE {table} SET sum = ?2 WHERE {key} = ?1"))?;
    sums.into_iter().try_for_each(|(key, sum)| update.execute(params![key, sum]).map(|_| ()))
}
