//! The tables, and how an older database becomes a current one.
//!
//! Layout, measured (2026-11-21, 100-byte payloads, 21-byte topics, bytes written to WAL and database per byte of
//! payload and topic, at 100 / 250 / 1000 messages in a commit):
//!
//! | page | topics inline | topics numbered |
//! | --- | --- | --- |
//! | 1024 | 3.4 / 3.1 / 2.9 | 2.6 / 2.4 / 2.2 |
//! | 2048 | 3.4 / 3.0 / 2.7 | 2.9 / 2.4 / 2.2 |
//! | 4096 | 3.9 / 3.1 / 2.7 | 3.4 / 2.5 / 2.3 |
//!
//! So topics are numbered. 1024 is best for the smallest messages and bad for those of 500 to 1000 bytes, of which one
//! page holds one; 2048 is the compromise. One integer key for session and sequence beats a `WITHOUT ROWID` table with
//! two columns (2.0 to 2.6 in the WAL): rows of one session lie together, and appending at the end fills pages. The
//! worst case is a message of just over 1000 bytes, which has a page for itself: 4.1 at 600 messages in a commit.
//!
//! With all of the store around it (`examples/store.rs`, 100 bytes): 3.1 at 72, 2.55 at 178, 2.2 at 379 and more.

use rusqlite::{Connection, TransactionBehavior};

use super::op::{MAX_NUMBER, NUMBER_BITS, first_sequence, number};

/// `PRAGMA application_id`: "FGAT". A database with another number is not ours.
pub(super) const APPLICATION_ID: i32 = 0x4647_4154;

/// Fits new databases; an old one keeps what it has.
pub(super) const PAGE_BYTES: u32 = 2048;

/// 2^23 slots are more lanes of sessions than a gateway can hold at the same time.
pub(super) const MAX_SLOT: i64 = (1 << (63 - NUMBER_BITS)) - 1;

/// Step `n` makes version `n + 1` (`PRAGMA user_version`) of version `n`. A step that was released never changes.
const MIGRATIONS: &[&str] = &[
    // `slot` numbers a session within the keys of its queue and is used again when the session has gone.
    "CREATE TABLE session (
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
         slot INTEGER PRIMARY KEY, last INTEGER NOT NULL, messages INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;",
    // A queue of several lanes has a slot for each, so that each is one range of keys. `session.slot` is that of lane 0.
    "CREATE TABLE lane (
         session INTEGER NOT NULL, lane INTEGER NOT NULL, slot INTEGER NOT NULL,
         PRIMARY KEY (session, lane)) STRICT, WITHOUT ROWID;",
];

/// The version that this program reads and writes.
pub(super) const VERSION: i32 = MIGRATIONS.len() as i32;

/// Brings the database from `version` to [`VERSION`], in one transaction.
pub(super) fn migrate(connection: &mut Connection, version: i32) -> rusqlite::Result<()> {
    let done = usize::try_from(version).unwrap_or(0);
    if done >= MIGRATIONS.len() {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    MIGRATIONS[done..].iter().try_for_each(|step| transaction.execute_batch(step))?;
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

/// The sequence of a key whose slot is that of `lane`.
pub(super) fn key_sequence(key: i64, lane: u8) -> u64 {
    first_sequence(lane) | number(u64::try_from(key).unwrap_or(0))
}

pub(super) fn key_slot(key: i64) -> i64 {
    key >> NUMBER_BITS
}
