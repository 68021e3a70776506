//! The check of a row in a small table, in its last column: CRC-32C of the table's name and of all its other values.
//!
//! Messages have checks of their own, see `run` and `row`. Without one here, a session whose client id, slot or number
//! was damaged would be another session: its queue would be lost without a word, or delivered to somebody else.

use crc32c::crc32c_append;
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params_from_iter};

/// The tables whose rows have such a check.
pub(super) const TABLES: [&str; 7] = ["session", "lane", "subscription", "inbound", "released", "summary", "doubt"];

/// The check of a row of `table` with these values.
pub(super) fn sum<'a>(table: &str, values: impl IntoIterator<Item = ValueRef<'a>>) -> i64 {
    let mut sum = 0;
    // A length goes before each text, so that no byte can move between two.
    let mut add = |kind: u8, bytes: &[u8]| {
        sum = crc32c_append(sum, &[kind]);
        sum = crc32c_append(sum, &(bytes.len() as u64).to_le_bytes());
        sum = crc32c_append(sum, bytes);
    };
    add(b't', table.as_bytes());
    for value in values {
        match value {
            ValueRef::Null => add(b'n', &[]),
            ValueRef::Integer(number) => add(b'i', &number.to_le_bytes()),
            ValueRef::Real(number) => add(b'r', &number.to_le_bytes()),
            ValueRef::Text(text) => add(b's', text),
            ValueRef::Blob(bytes) => add(b'b', bytes),
        }
    }
    i64::from(sum)
}

/// Executes `sql`, which writes a row of `table` and takes its check behind the `values`.
pub(super) fn write<const N: usize>(
    connection: &Connection,
    table: &str,
    sql: &str,
    values: [ValueRef<'_>; N],
) -> rusqlite::Result<usize> {
    let sum = ValueRef::Integer(sum(table, values));
    let values = values.into_iter().chain([sum]).map(ToSqlOutput::Borrowed);
    connection.prepare_cached(sql)?.execute(params_from_iter(values))
}

/// Reads all rows of `table`; how many of them are not what was written.
pub(super) fn count_damaged(connection: &Connection, table: &str) -> rusqlite::Result<u64> {
    let mut statement = connection.prepare_cached(&format!("SELECT * FROM {table}"))?;
    let columns = statement.column_count() - 1;
    let mut rows = statement.query([])?;
    let mut damaged = 0;
    while let Some(row) = rows.next()? {
        let values: Vec<ValueRef<'_>> = (0..columns).map(|column| row.get_ref(column)).collect::<Result<_, _>>()?;
        damaged += u64::from(row.get_ref(columns)? != ValueRef::Integer(sum(table, values)));
    }
    Ok(damaged)
}

/// Says as SQLite does that the database is damaged, where a row of a small table is.
pub(super) fn check_all(connection: &Connection) -> rusqlite::Result<()> {
    for table in TABLES {
        let damaged = count_damaged(connection, table)?;
        if damaged > 0 {
            let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
            let reason = format!("{damaged} rows of table `{table}` are damaged");
            return Err(rusqlite::Error::SqliteFailure(code, Some(reason)));
        }
    }
    Ok(())
}

/// A number or nothing.
pub(super) fn optional<'a>(number: Option<i64>) -> ValueRef<'a> {
    number.map_or(ValueRef::Null, ValueRef::Integer)
}
