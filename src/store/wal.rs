//! SQLite's write-ahead log, looked through before SQLite reads it
//! (<https://sqlite.org/fileformat2.html#the_write_ahead_log>).
//!
//! SQLite reads the log up to the first frame whose checksum is wrong, as a write that a power cut has torn must be
//! ignored. It does the same where the bytes of an old frame have changed, and then takes back without a word every
//! transaction from there on; pages that were copied to the database since stay in it, and do not fit the older ones. A
//! transaction begins only when the one before it is on disk. So a broken frame with a whole transaction and the
//! beginning of another behind it is no torn write: messages that were acknowledged are lost.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;
/// The last bit says how the checksums read words: set for big endian.
const MAGIC: u32 = 0x377f_0682;

/// What a log is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// SQLite reads all of it, or there is none.
    Whole,
    /// Behind what SQLite reads lies what an earlier round through the file has left. It is best cut off, as the next: behind
    /// another crash it could look like damage.
    Rest,
    /// The last transaction is not whole. Mostly the gateway or the machine stopped while it was written, and nobody was told
    /// of it; where the disk has damaged it, or said too early that it was there, it was acknowledged and is lost.
    Torn,
    /// Why it may not be read, for a person.
    Damaged(String),
}

/// Looks through the log at `path`.
///
/// # Errors
/// The file is there and cannot be read.
pub(super) fn check(path: &Path) -> io::Result<Condition> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Condition::Whole),
        file => file?,
    };
    let bytes = file.metadata()?.len();
    let mut file = BufReader::with_capacity(1 << 16, file);
    let mut header = [0; HEADER_BYTES];
    if !read_whole(&mut file, &mut header)? {
        return Ok(Condition::Whole);
    }
    let (magic, page_bytes) = (word(&header, 0), word(&header, 8) as usize);
    let mut sum = Checksum { big_endian: magic & 1 == 1, sums: [0, 0] };
    sum.add(&header[..24]);
    if !sum.agrees(&header[24..]) || magic & !1 != MAGIC {
        // A log is made with its header alone, and is nothing until the first frame.
        if bytes <= HEADER_BYTES as u64 || header == [0; HEADER_BYTES] {
            return Ok(Condition::Whole);
        }
        let reason = format!("the header of its log is damaged, {bytes} bytes of transactions are lost");
        return Ok(Condition::Damaged(reason));
    }
    if !page_bytes.is_power_of_two() || !(512..=65_536).contains(&page_bytes) {
        return Ok(Condition::Whole);
    }
    let salts = &header[16..24];
    let mut frame = vec![0; FRAME_HEADER_BYTES + page_bytes];
    let mut broken_at = None;
    let (mut is_torn, mut committed_behind) = (false, false);
    let mut at = HEADER_BYTES;
    while read_whole(&mut file, &mut frame)? {
        // What an earlier round through the file has left has other salts.
        let is_ours = &frame[8..16] == salts;
        match broken_at {
            None => {
                sum.add(&frame[..8]);
                sum.add(&frame[FRAME_HEADER_BYTES..]);
                if !is_ours || !sum.agrees(&frame[16..24]) {
                    broken_at = Some(at);
                    committed_behind = is_ours && is_commit(&frame);
                }
            }
            Some(broken_at) if is_ours && committed_behind => {
                let reason =
                    format!("its log is damaged at byte {broken_at} of {bytes}, transactions behind that are lost");
                return Ok(Condition::Damaged(reason));
            }
            Some(_) => committed_behind |= is_ours && is_commit(&frame),
        }
        is_torn |= is_ours && broken_at.is_some();
        at += frame.len();
    }
    Ok(match broken_at {
        Some(_) if is_torn => Condition::Torn,
        Some(_) => Condition::Rest,
        None => Condition::Whole,
    })
}

/// Where a log holds the newest versions of pages, for reading a database that SQLite does not.
#[derive(Debug, Default)]
pub(super) struct Newest {
    pub page_bytes: usize,
    /// How many pages the database has.
    pub count: u32,
    /// Where in the log a page begins; `None` where its newest version is damaged.
    pub pages: HashMap<u32, Option<u64>>,
}

/// Reads the log at `path` to its end, also behind frames that are damaged: each frame is checked by what stands in the
/// one before it. Transactions count as far as they are complete; the last one must be whole too, or it may be a write
/// that a power cut has torn. `page_bytes` is for a log whose header is damaged. `None` where it holds nothing.
///
/// # Errors
/// The file is not there, or cannot be read.
pub(super) fn newest_pages(path: &Path, page_bytes: usize) -> io::Result<Option<Newest>> {
    let mut file = BufReader::with_capacity(1 << 16, File::open(path)?);
    let mut header = [0; HEADER_BYTES];
    if !read_whole(&mut file, &mut header)? {
        return Ok(None);
    }
    let is_log = word(&header, 0) & !1 == MAGIC;
    let in_header = word(&header, 8) as usize;
    let is_size = is_log && in_header.is_power_of_two() && (512..=65_536).contains(&in_header);
    let mut newest = Newest { page_bytes: if is_size { in_header } else { page_bytes }, ..Newest::default() };
    let big_endian = if is_log { word(&header, 0) & 1 == 1 } else { cfg!(target_endian = "big") };
    let mut whole = Checksum { big_endian, sums: [0, 0] };
    whole.add(&header[..24]);
    let mut salts = whole.agrees(&header[24..]).then(|| header[16..24].to_vec());
    let mut before = [word(&header, 24), word(&header, 28)];
    let mut frame = vec![0; FRAME_HEADER_BYTES + newest.page_bytes];
    // The transaction being read, and the one before it, of which the next shows that it reached the disk.
    let mut open = HashMap::new();
    let mut last: Option<(u32, HashMap<_, _>)> = None;
    let mut at = HEADER_BYTES as u64;
    while read_whole(&mut file, &mut frame)? {
        if frame[8..16] == *salts.get_or_insert_with(|| frame[8..16].to_vec()) {
            if let Some((count, pages)) = last.take() {
                newest.count = count;
                newest.pages.extend(pages);
            }
            let mut sum = Checksum { big_endian, sums: before };
            sum.add(&frame[..8]);
            sum.add(&frame[FRAME_HEADER_BYTES..]);
            let is_whole = sum.agrees(&frame[16..24]);
            open.insert(word(&frame, 0), is_whole.then_some(at + FRAME_HEADER_BYTES as u64));
            if is_commit(&frame) {
                last = Some((word(&frame, 4), std::mem::take(&mut open)));
            }
        }
        before = [word(&frame, 16), word(&frame, 20)];
        at += frame.len() as u64;
    }
    if let Some((count, pages)) = last.filter(|(_, pages)| pages.values().all(Option::is_some)) {
        newest.count = count;
        newest.pages.extend(pages);
    }
    Ok((newest.count > 0).then_some(newest))
}

/// Cuts the log at `path` off behind its first `frames`, which are all that SQLite knows of. `is_unsure` where that was tried
/// before in vain.
///
/// A transaction that could not be synced stands in the log behind them, whole. SQLite forgets it, and writes the next one
/// over it; but whoever reads the log before that, as the next start does, takes it for committed. Of one that was longer
/// than those after it, the end would stay, and look like damage.
///
/// # Errors
/// The file cannot be read or cut, or it is not sure that a power cut would not bring the rest back.
pub(super) fn cut(path: &Path, frames: u64, page_bytes: u64, is_unsure: bool) -> io::Result<()> {
    // Without a frame there is nothing to know from it: what it held is in the database.
    let end = if frames == 0 { 0 } else { HEADER_BYTES as u64 + frames * (FRAME_HEADER_BYTES as u64 + page_bytes) };
    let bytes = match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata?.len(),
    };
    // Where nothing was written, as on a disk that is read-only, nothing needs to be.
    if is_unsure || bytes > end && (end == 0 || is_continued(path, end)?) {
        let file = File::options().write(true).open(path)?;
        if bytes > end {
            file.set_len(end)?;
        }
        file.sync_data()?;
    }
    Ok(())
}

/// Whether what stands in the log from `end` on was written since it was begun, and so is read on from there.
fn is_continued(path: &Path, end: u64) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let (mut header, mut frame) = ([0; HEADER_BYTES], [0; FRAME_HEADER_BYTES]);
    let has_header = read_whole(&mut file, &mut header)?;
    file.seek(SeekFrom::Start(end))?;
    Ok(has_header && read_whole(&mut file, &mut frame)? && frame[8..16] == header[16..24])
}

/// Whether the frame ends a transaction.
fn is_commit(frame: &[u8]) -> bool {
    word(frame, 4) != 0
}

/// False where the file ends before `buffer` is full.
fn read_whole(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// The checksum that runs through the log.
struct Checksum {
    big_endian: bool,
    sums: [u32; 2],
}

impl Checksum {
    /// Adds bytes, eight at a time.
    fn add(&mut self, bytes: &[u8]) {
        let read = if self.big_endian { u32::from_be_bytes } else { u32::from_le_bytes };
        let [mut first, mut second] = self.sums;
        for (pair, _) in bytes.as_chunks::<8>().0.iter().map(|pair| pair.as_chunks::<4>()) {
            first = first.wrapping_add(read(pair[0])).wrapping_add(second);
            second = second.wrapping_add(read(pair[1])).wrapping_add(first);
        }
        self.sums = [first, second];
    }

    fn agrees(&self, stored: &[u8]) -> bool {
        [word(stored, 0), word(stored, 4)] == self.sums
    }
}
