//! A database file and its log read without SQLite, which gives up a table at the first page that is wrong
//! (<https://sqlite.org/fileformat2.html>).
//!
//! What cannot be read is passed over: a page, a cell, a chain of overflow pages. Every page of a tree is visited once,
//! so that damaged pointers lead nowhere for ever. What comes out is not trusted: its checks decide.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use rusqlite::types::Value;

use super::schema::PAGE_BYTES;
use super::wal;

/// The header of the database, at the beginning of its first page.
const HEADER_BYTES: usize = 100;
/// The most pages from a root to a leaf; with four billion pages SQLite needs fewer.
const MAX_DEPTH: u32 = 40;
/// The largest row that is read, in bytes: far larger than a message that a client may send.
const MAX_ROW_BYTES: u64 = 300 << 20;

pub(super) struct Pages {
    file: File,
    log: Option<(File, wal::Newest)>,
    page_bytes: usize,
    count: u32,
    visited: HashSet<u32>,
    deadline: Instant,
    /// Pages of trees and chains that could not be read or make no sense.
    pub unreadable: u64,
    /// The deadline came before the end.
    pub is_late: bool,
}

impl Pages {
    /// The database at `path`, with the log beside it. Nothing is read after `deadline`.
    ///
    /// # Errors
    /// A file cannot be opened.
    pub fn open(path: &Path, log: &Path, deadline: Instant) -> io::Result<Self> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        let mut header = [0; HEADER_BYTES];
        let in_header = match file.read_exact_at(&mut header, 0) {
            Ok(()) if header.starts_with(b"SQLite format 3\0") => match u16_at(&header, 16) {
                Some(1) => 65_536,
                Some(page_bytes) if page_bytes.is_power_of_two() && page_bytes >= 512 => usize::from(page_bytes),
                _ => PAGE_BYTES as usize,
            },
            _ => PAGE_BYTES as usize,
        };
        let log = match wal::newest_pages(log, in_header) {
            Ok(newest) => newest.map(|newest| Ok::<_, io::Error>((File::open(log)?, newest))).transpose()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let page_bytes = log.as_ref().map_or(in_header, |(_, newest)| newest.page_bytes);
        let in_file = u32::try_from(bytes.div_ceil(page_bytes as u64)).unwrap_or(u32::MAX);
        let count = log.as_ref().map_or(in_file, |(_, newest)| newest.count.max(in_file));
        let visited = HashSet::new();
        Ok(Self { file, log, page_bytes, count, visited, deadline, unreadable: 0, is_late: false })
    }

    /// The roots of all tables by their names, as far as the schema can be read.
    pub fn roots(&mut self) -> HashMap<String, u32> {
        let mut roots = HashMap::new();
        self.walk(1, &mut |_, row| {
            if let [Value::Text(kind), Value::Text(name), _, Value::Integer(root), ..] = row
                && kind == "table"
                && let Ok(root) = u32::try_from(*root)
            {
                roots.insert(name.clone(), root);
            }
        });
        roots
    }

    /// `PRAGMA user_version`, and whether the file is of the program with `application_id`; `None` where its first page
    /// cannot be read.
    pub fn version(&self, application_id: i32) -> Option<(i32, bool)> {
        let page = self.page(1).filter(|page| page.starts_with(b"SQLite format 3\0"))?;
        let number = |at| u32_at(&page, at).map(u32::cast_signed);
        Some((number(60)?, number(68)? == application_id))
    }

    /// Hands every row of the tree at `root` to `each`, with its row id, which stands for a column that is NULL; a table
    /// without row ids has 0.
    pub fn walk(&mut self, root: u32, each: &mut dyn FnMut(i64, &[Value])) {
        self.walk_below(root, 0, each);
    }

    fn walk_below(&mut self, number: u32, depth: u32, each: &mut dyn FnMut(i64, &[Value])) {
        self.is_late |= Instant::now() >= self.deadline;
        if self.is_late {
            return;
        }
        if depth > MAX_DEPTH || !self.visited.insert(number) {
            self.unreadable += 1;
            return;
        }
        let Some(tree) = self.page(number).and_then(|page| TreePage::new(page, number)) else {
            self.unreadable += 1;
            return;
        };
        let mut whole = true;
        for index in 0..tree.cells {
            let Some(cell) = tree.cell(index) else {
                whole = false;
                continue;
            };
            if let Some(child) = cell.child {
                self.walk_below(child, depth + 1, each);
            }
            if let Some((payload, overflow)) = cell.payload {
                match self.payload(payload, overflow).as_deref().and_then(record) {
                    Some(row) => each(cell.row_id, &row),
                    None => whole = false,
                }
            }
        }
        if let Some(child) = tree.right_child {
            self.walk_below(child, depth + 1, each);
        }
        self.unreadable += u64::from(!whole);
    }

    /// The whole payload of a cell: what lies in its page, and what follows on overflow pages.
    fn payload(&self, Local { bytes, length }: Local<'_>, overflow: Option<u32>) -> Option<Vec<u8>> {
        let mut payload = bytes.to_vec();
        let mut next = overflow;
        while let Some(number) = next {
            let page = self.page(number)?;
            let rest = length - payload.len();
            payload.extend_from_slice(&page[4..page.len().min(4 + rest)]);
            next = if payload.len() < length { Some(u32_at(&page, 0)?).filter(|&next| next != 0) } else { None };
        }
        (payload.len() == length).then_some(payload)
    }

    /// A page as it was last written; `None` where that cannot be read.
    fn page(&self, number: u32) -> Option<Vec<u8>> {
        if number == 0 || number > self.count {
            return None;
        }
        let mut page = vec![0; self.page_bytes];
        let in_log = self.log.as_ref().and_then(|(log, newest)| Some((log, newest.pages.get(&number)?)));
        match in_log {
            Some((log, &Some(at))) => log.read_exact_at(&mut page, at),
            // An older one would bring back what was removed since.
            Some((_, None)) => return None,
            None => self.file.read_exact_at(&mut page, u64::from(number - 1) * self.page_bytes as u64),
        }
        .ok()?;
        Some(page)
    }
}

/// A page of a tree.
struct TreePage {
    page: Vec<u8>,
    kind: Kind,
    header: usize,
    cells: usize,
    right_child: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    InteriorIndex,
    InteriorTable,
    LeafIndex,
    LeafTable,
}

struct Cell<'a> {
    child: Option<u32>,
    row_id: i64,
    payload: Option<(Local<'a>, Option<u32>)>,
}

/// The part of a payload that lies in the page of its cell.
struct Local<'a> {
    bytes: &'a [u8],
    /// Of the whole payload.
    length: usize,
}

impl TreePage {
    fn new(page: Vec<u8>, number: u32) -> Option<Self> {
        let header = if number == 1 { HEADER_BYTES } else { 0 };
        let kind = match page[header] {
            2 => Kind::InteriorIndex,
            5 => Kind::InteriorTable,
            10 => Kind::LeafIndex,
            13 => Kind::LeafTable,
            _ => return None,
        };
        let cells = usize::from(u16_at(&page, header + 3)?);
        let is_interior = matches!(kind, Kind::InteriorIndex | Kind::InteriorTable);
        let right_child = if is_interior { Some(u32_at(&page, header + 8)?) } else { None };
        Some(Self { page, kind, header, cells, right_child })
    }

    fn cell(&self, index: usize) -> Option<Cell<'_>> {
        let pointers = self.header + if self.right_child.is_some() { 12 } else { 8 };
        let at = usize::from(u16_at(&self.page, pointers + 2 * index)?);
        let mut rest = self.page.get(at..)?;
        let child = match self.right_child {
            Some(_) => Some(u32::from_be_bytes(*rest.split_off(..4)?.as_array()?)),
            None => None,
        };
        if self.kind == Kind::InteriorTable {
            return Some(Cell { child, row_id: 0, payload: None });
        }
        let length = take_varint(&mut rest)?;
        let row_id = if self.kind == Kind::LeafTable { take_varint(&mut rest)?.cast_signed() } else { 0 };
        if length > MAX_ROW_BYTES {
            return None;
        }
        let length = usize::try_from(length).ok()?;
        // No page of ours has reserved bytes at its end.
        let usable = self.page.len();
        let most = if self.kind == Kind::LeafTable { usable - 35 } else { (usable - 12) * 64 / 255 - 23 };
        if length <= most {
            return Some(Cell { child, row_id, payload: Some((Local { bytes: rest.get(..length)?, length }, None)) });
        }
        let least = (usable - 12) * 32 / 255 - 23;
        let fitting = least + (length - least) % (usable - 4);
        let (bytes, rest) = rest.split_at_checked(if fitting <= most { fitting } else { least })?;
        Some(Cell { child, row_id, payload: Some((Local { bytes, length }, Some(u32_at(rest, 0)?))) })
    }
}

/// The values of a record.
fn record(bytes: &[u8]) -> Option<Vec<Value>> {
    let mut kinds = bytes;
    let header = usize::try_from(take_varint(&mut kinds)?).ok()?;
    let mut values = bytes.get(header..)?;
    let mut kinds = bytes.get(bytes.len() - kinds.len()..header)?;
    let mut row = Vec::new();
    while !kinds.is_empty() {
        let kind = take_varint(&mut kinds)?;
        row.push(value(kind, &mut values)?);
    }
    Some(row)
}

fn value(kind: u64, values: &mut &[u8]) -> Option<Value> {
    let mut take = |bytes: u64| values.split_off(..usize::try_from(bytes).ok()?);
    let mut number = |bytes| {
        let bytes = take(bytes)?;
        let sign = i64::from(bytes.first()?.cast_signed() >> 7);
        Some(bytes.iter().fold(sign, |number, &byte| number << 8 | i64::from(byte)))
    };
    Some(match kind {
        0 => Value::Null,
        1..=4 => Value::Integer(number(kind)?),
        5 => Value::Integer(number(6)?),
        6 => Value::Integer(number(8)?),
        7 => Value::Real(f64::from_bits(number(8)?.cast_unsigned())),
        8 | 9 => Value::Integer(kind.cast_signed() - 8),
        10 | 11 => return None,
        _ if kind.is_multiple_of(2) => Value::Blob(take((kind - 12) / 2)?.to_vec()),
        _ => Value::Text(String::from_utf8(take((kind - 13) / 2)?.to_vec()).ok()?),
    })
}

/// Up to nine bytes, seven bits in each but the last, the highest first.
fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for _ in 0..8 {
        let byte = *bytes.split_off_first()?;
        number = number << 7 | u64::from(byte & 0x7f);
        if byte < 0x80 {
            return Some(number);
        }
    }
    Some(number << 8 | u64::from(*bytes.split_off_first()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..at + 2)?.as_array()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..at + 4)?.as_array()?))
}
