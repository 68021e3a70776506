//! What a bad disk does to the files of a database while nobody looks: flipped bits, lost sectors, torn ends.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::random::Random;

const DATABASE: &str = "fieldgate.db";
const LOG: &str = "fieldgate.db-wal";
const SECTOR: usize = 512;
const PAGE: usize = 1024;

/// What a damage allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allows {
    /// Nothing may be missing: only what was never acknowledged is hit.
    Nothing,
    /// What the gateway reports may be missing.
    WhatIsReported,
}

/// Damages a database in `directory`; says how, and what may follow from it.
pub fn damage(directory: &Path, random: &mut Random) -> (String, Allows) {
    let (database, log) = (directory.join(DATABASE), directory.join(LOG));
    let mut bytes = fs::read(&database).unwrap();
    let mut log_bytes = fs::read(&log).unwrap_or_default();
    // Cut short before, it may hold next to nothing: all is in the log then.
    let kinds = if bytes.len() < SECTOR { 5..6 } else { 0..6 };
    let (what, allows) = match kinds.start + random.below(kinds.end - kinds.start) {
        0 => (flip(&mut bytes, 0, random), Allows::WhatIsReported),
        1 => (lose_sector(&mut bytes, random), Allows::WhatIsReported),
        2 => (cut(&mut bytes, random), Allows::WhatIsReported),
        3 | 4 => match before_last_commit(&log_bytes) {
            // Of the last transaction nobody can tell a flipped bit from a write that power failure cut short.
            Some(end) => {
                let what = flip(&mut log_bytes[..end], 32, random);
                fs::write(&log, &log_bytes).unwrap();
                return (format!("{LOG}: {what}"), Allows::WhatIsReported);
            }
            None => (flip(&mut bytes, 0, random), Allows::WhatIsReported),
        },
        _ => {
            // A write that was under way: the beginning of a frame, and then what was on the disk before.
            let torn = 1 + random.below(4000) as usize;
            let again = log_bytes.len().saturating_sub(torn);
            log_bytes.extend_from_within(again..);
            log_bytes.extend((0..torn % 700).map(|at| at as u8));
            fs::write(&log, &log_bytes).unwrap();
            return (format!("{LOG}: {torn} bytes of a torn write at its end"), Allows::Nothing);
        }
    };
    fs::write(&database, &bytes).unwrap();
    (format!("{DATABASE}: {what}"), allows)
}

/// Writes over pages of the database in `directory`, which may be in use.
pub fn lose_pages(directory: &Path, pages: std::ops::Range<u64>) {
    let file = fs::OpenOptions::new().write(true).open(directory.join(DATABASE)).unwrap();
    pages.for_each(|number| file.write_all_at(&[0xff; PAGE], (number - 1) * PAGE as u64).unwrap());
}

/// Flips one to eight bits.
fn flip(bytes: &mut [u8], from: usize, random: &mut Random) -> String {
    let mut places = Vec::new();
    for _ in 0..=random.below(8) {
        let at = from + random.below((bytes.len() - from) as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
        places.push(at);
    }
    format!("bits flipped at {places:?} of {}", bytes.len())
}

fn lose_sector(bytes: &mut [u8], random: &mut Random) -> String {
    let at = random.below((bytes.len() / SECTOR) as u64) as usize * SECTOR;
    let filling = *random.choose(&[0, 0xff]);
    bytes[at..at + SECTOR].fill(filling);
    format!("the sector at {at} of {} holds {filling:#x}", bytes.len())
}

fn cut(bytes: &mut Vec<u8>, random: &mut Random) -> String {
    let (before, after) = (bytes.len(), random.below(bytes.len() as u64) as usize);
    bytes.truncate(after);
    format!("cut from {before} to {after} bytes")
}

/// Where the last transaction of a write-ahead log begins; `None` where there is no other before it
/// (<https://sqlite.org/fileformat2.html#the_write_ahead_log>).
fn before_last_commit(log: &[u8]) -> Option<usize> {
    let number = |at: usize| log.get(at..at + 4).map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap()));
    let frame_bytes = 24 + number(8)? as usize;
    let salts = log.get(16..24)?;
    let frames = (32..).step_by(frame_bytes).take_while(|at| log.get(at + 8..at + 16) == Some(salts));
    let commits: Vec<_> = frames.filter(|at| number(at + 4) != Some(0)).collect();
    let before = commits.len().checked_sub(2)?;
    Some(commits[before] + frame_bytes)
}
