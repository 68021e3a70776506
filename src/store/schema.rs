//! The tables, and how an older database becomes a current one.
//!
//! Layout, measured on 2026-11-21: bytes written to log and database per byte of payload and topic (21 bytes,
//! numbered), taken in and then removed, at 10 / 100 / 1000 messages in a commit.
//!
//! | payload | page | one row each, in | out | in runs, in | out |
//! | --- | --- | --- | --- | --- | --- |
//! | 20 | 1024 | 8.4 / 3.5 / 2.4 | 12.7 / 3.8 / 2.5 | 6.2 / 2.4 / 1.6 | 8.6 / 1.6 / 0.2 |
//! | 20 | 2048 | 10.5 / 4.4 / 2.5 | 15.0 / 5.3 / 2.5 | 8.6 / 3.1 / 1.7 | 12.7 / 2.6 / 0.3 |
//! | 100 | 1024 | 5.8 / 2.7 / 2.2 | 6.1 / 1.7 / 1.2 | 4.6 / 2.2 / 1.9 | 4.0 / 0.6 / 0.1 |
//! | 100 | 2048 | 7.1 / 2.9 / 2.3 | 10.6 / 3.2 / 2.3 | 8.9 / 2.4 / 1.9 | 10.4 / 0.9 / 0.1 |
//! | 1000 | 1024 | 2.7 / 2.4 / 2.3 | 0.8 / 0.2 / 0.2 | 2.4 / 2.1 / 2.0 | 0.7 / 0.1 / 0.0 |
//! | 1000 | 2048 | 4.9 / 4.2 / 4.1 | 1.3 / 0.2 / 0.1 | 2.7 / 2.1 / 2.0 | 1.3 / 0.1 / 0.0 |
//!
//! So messages of one session that are committed together are packed into one row. Such a row is mostly overflow pages,
//! which are full, and which are freed without being written; what a commit costs beside them is a handful of pages,
//! which should be small: 4096 is worse everywhere. What reaches the device, in blocks of the file system, has the same
//! order (100 bytes at 100 in a commit: 2.5 with pages of 1024 against 2.7 with 2048 and 3.4 with 4096).
//!
//! With all of the store around it (`examples/store.rs`, at the number of messages in a commit): 20 bytes: 2.9 at 52,
//! 2.1 at 106, 1.6 at 448; 100 bytes: 2.3 at 54, 2.1 at 101, 1.8 at 410; 1000 bytes: 2.1 at 42, 2.0 at 561.

use std::collections::HashMap;

use rusqlite::{Connection, TransactionBehavior};

use super::migrate;
use super::op::{MAX_NUMBER, NUMBER_BITS, first_sequence, number};

/// `PRAGMA application_id`: "FGAT". A database with another number is not ours.
pub(super) const APPLICATION_ID: i32 = 0x4647_4154;

/// Fits new databases; an old one keeps what it has.
pub(super) const PAGE_BYTES: u32 = 1024;

/// 2^23 slots are more lanes of sessions than a gateway can hold at the same time.
pub(super) const MAX_SLOT: i64 = (1 << (63 - NUMBER_BITS)) - 1;

/// Makes the next version of a database.
struct Step {
    sql: &'static str,
    /// What SQL cannot say.
    then: fn(&Connection) -> rusqlite::Result<()>,
}

/// Step `n` makes version `n + 1` (`PRAGMA user_version`) of version `n`. A step that was released never changes.
const MIGRATIONS: &[Step] = &[
    Step { sql: VERSION_1, then: |_| Ok(()) },
    Step { sql: VERSION_2, then: |_| Ok(()) },
    Step { sql: VERSION_3, then: migrate::pack_queues },
    Step { sql: VERSION_4, then: migrate::add_sums },
    Step { sql: VERSION_5, then: |_| Ok(()) },
];

/// `slot` numbers a session within the keys of its queue and is used again when the session has gone.
const VERSION_1: &str = "
     CREATE TABLE session (
         id INTEGER PRIMARY KEY, slot INTEGER NOT NULL, face INTEGER NOT NULL, client_id TEXT NOT NULL,
         user TEXT, expiry_millis INTEGER, detached_at INTEGER) STRICT;
     CREATE TABLE will (
         session INTEGER PRIMARY KEY, delay_millis INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
         flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL, extra BLOB) STRICT;
     CREATE TABLE subscription (
         session INTEGER NOT NULL, filter TEXT NOT NULL, options INTEGER NOT NULL, identifier INTEGER,
         PRIMARY KEY (session, filter)) STRICT, WITHOUT ROWID;
     CREATE TABLE inbound (
         session INTEGER NOT NULL, packet_id INTEGER NOT NULL,
         PRIMARY KEY (session, packet_id)) STRICT, WITHOUT ROWID;
     CREATE TABLE retained (
         topic TEXT PRIMARY KEY, payload BLOB NOT NULL, flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL,
         extra BLOB) STRICT, WITHOUT ROWID;
     -- key: slot << 40 | sequence. topic: a number in table topic, or the text itself; NULL in a released row.
     CREATE TABLE queue (
         key INTEGER PRIMARY KEY, topic ANY, payload BLOB, flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL,
         extra BLOB) STRICT;
     CREATE TABLE topic (id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT;
     -- What a queue holds up to sequence `last`. Rows above it are counted when the database is opened: a commit that
     -- only appends does not write here, one that removes does.
     CREATE TABLE summary (
         slot INTEGER PRIMARY KEY, last INTEGER NOT NULL, messages INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;";

/// A queue of several lanes has a slot for each, so that each is one range of keys. `session.slot` is that of lane 0.
const VERSION_2: &str = "
     CREATE TABLE lane (
         session INTEGER NOT NULL, lane INTEGER NOT NULL, slot INTEGER NOT NULL,
         PRIMARY KEY (session, lane)) STRICT, WITHOUT ROWID;";

/// Messages in runs, with checks.
const VERSION_3: &str = "
     ALTER TABLE queue RENAME TO queue_1;
     -- A run of messages: see `run` for its frames. key: slot << 40 | a sequence that is not below that of the last
     -- message. span: that sequence less the one of the first. lasted: how much later than the first message, in
     -- milliseconds, the newest was accepted.
     CREATE TABLE queue (
         key INTEGER PRIMARY KEY, span INTEGER NOT NULL, messages INTEGER NOT NULL, bytes INTEGER NOT NULL,
         accepted_at INTEGER NOT NULL, lasted INTEGER NOT NULL, expires_at INTEGER, frames BLOB NOT NULL) STRICT;
     CREATE INDEX queue_expiry ON queue (key >> 40, expires_at) WHERE expires_at IS NOT NULL;
     -- Parts of runs that are done with, by the keys that their messages would have.
     CREATE TABLE gone (first INTEGER PRIMARY KEY, last INTEGER NOT NULL, sum INTEGER NOT NULL) STRICT;
     -- QoS 2 messages whose receiver has them, by key.
     CREATE TABLE released (key INTEGER PRIMARY KEY) STRICT;
     -- Runs in which a message was found damaged, as they were.
     CREATE TABLE damaged (
         id INTEGER PRIMARY KEY, found_at INTEGER NOT NULL, key INTEGER NOT NULL, span INTEGER NOT NULL,
         accepted_at INTEGER NOT NULL, frames BLOB NOT NULL) STRICT;
     ALTER TABLE retained ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE will ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;";

/// Checks for the rows of the small tables, see `sums`.
const VERSION_4: &str = "
     ALTER TABLE session ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE subscription ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE inbound ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE lane ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE released ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE summary ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;";

/// What is in doubt since a database was damaged.
const VERSION_5: &str = "
     -- Since then it is not known which packet identifiers a session and its client hold: in all lanes where `lane` is -1,
     -- but for those that have a row of their own. below, until: see `Cleared`, as numbers.
     CREATE TABLE doubt (
         session INTEGER NOT NULL, lane INTEGER NOT NULL, below INTEGER NOT NULL, until INTEGER NOT NULL,
         sum INTEGER NOT NULL, PRIMARY KEY (session, lane)) STRICT, WITHOUT ROWID;";

/// In table `doubt`.
pub(super) const ALL_LANES: i64 = -1;

/// The first version that holds what this one does, in tables that are the same.
pub(super) const READABLE_VERSION: i32 = 4;

/// The version that this program reads and writes.
pub(super) const VERSION: i32 = MIGRATIONS.len() as i32;

/// Makes a database that has nothing in it.
pub(super) fn make(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!("PRAGMA page_size = {PAGE_BYTES}; PRAGMA auto_vacuum = INCREMENTAL;"))?;
    migrate(connection, 0)
}

/// The first page of each table.
pub(super) fn roots(connection: &Connection) -> rusqlite::Result<HashMap<String, u32>> {
    let mut select = connection.prepare("SELECT name, rootpage FROM sqlite_schema WHERE type = 'table'")?;
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// Brings the database from `version` to [`VERSION`], in one transaction.
pub(super) fn migrate(connection: &mut Connection, version: i32) -> rusqlite::Result<()> {
    let done = usize::try_from(version).unwrap_or(0);
    if done >= MIGRATIONS.len() {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for step in &MIGRATIONS[done..] {
        transaction.execute_batch(step.sql)?;
        (step.then)(&transaction)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", VERSION)?;
    transaction.commit()
}

/// The key of a queue's row; `slot` is that of the lane which `sequence` names.
pub(super) fn queue_key(slot: i64, sequence: u64) -> i64 {
    slot << NUMBER_BITS | i64::try_from(number(sequence)).unwrap_or(i64::MAX)
}

/// The first and last key that a slot can have.
pub(super) fn slot_keys(slot: i64) -> (i64, i64) {
    (queue_key(slot, 0), queue_key(slot, MAX_NUMBER))
}

/// The number of a key's message within its lane.
pub(super) fn key_number(key: i64) -> u64 {
    number(u64::try_from(key).unwrap_or(0))
}

/// The sequence of a key whose slot is that of `lane`.
pub(super) fn key_sequence(key: i64, lane: u8) -> u64 {
    first_sequence(lane) | key_number(key)
}

pub(super) fn key_slot(key: i64) -> i64 {
    key >> NUMBER_BITS
}
