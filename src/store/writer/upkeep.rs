//! Upkeep of the database file: its log is moved into it, free space is given back, and room on the disk is looked after.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Writer;
use crate::store::database::{Database, Usage};

/// The log is moved into the database when it holds this much. Larger would write a little less to flash, and make
/// everyone wait longer while it happens.
const CHECKPOINT_BYTES: u64 = 4 << 20;
/// What must be writable again before the alarm ends, in bytes.
const PROBE_BYTES: u32 = 64 << 10;
/// Less free space than this is kept for the next outage.
const KEEP_FREE_BYTES: u64 = 8 << 20;
/// How much is given back in one go, so that whatever comes in between does not wait. What does not fit into SQLite's cache,
/// which was seen to take some 430 pages of 1 KiB, is written to the log before it is cut off: with 1 MiB in one go 593 of
/// 1029 pages, 0.7 bytes for each byte given back.
const VACUUM_BYTES: u64 = 256 << 10;

impl Writer {
    /// Takes the reserve again, and shows that there is room beside it; the database gives back what it does not need for
    /// that. False while the disk is still full, or fails.
    pub(super) fn resume(&mut self) -> bool {
        loop {
            if !self.reserve.is_spent() || self.reserve.fill().is_ok() {
                match self.database.settle(PROBE_BYTES) {
                    Ok(()) => return true,
                    Err(error) => _ = self.note(&error),
                }
            }
            if !self.reserve.is_spent() || !self.give_back() {
                return false;
            }
        }
    }

    /// Gives free pages of the database back to the disk; false where there are none to speak of.
    fn give_back(&mut self) -> bool {
        let piece = (self.reserve.bytes / 4).min(VACUUM_BYTES);
        let free = |database: &Database| database.usage().map_or(0, |usage| usage.free);
        let before = free(&self.database);
        before >= piece
            && self.database.vacuum(piece).and_then(|()| self.database.empty_log()).is_ok()
            && free(&self.database) < before
    }

    /// One piece of upkeep; true where there is more.
    pub(super) fn keep_up(&mut self) -> rusqlite::Result<bool> {
        if self.database.purge()? || self.database.forget_topics()? {
            return Ok(true);
        }
        let Usage { total, free, .. } = self.database.usage()?;
        // Free pages are used again by the next outage; only what is out of proportion is given back.
        if free > KEEP_FREE_BYTES && free > total / 2 {
            self.database.vacuum(VACUUM_BYTES)?;
            let usage = self.database.usage()?;
            if usage.free < free {
                self.shrinks = true;
                return Ok(true);
            }
        }
        // The file becomes smaller with the next checkpoint, which on a quiet gateway may be days away.
        if std::mem::take(&mut self.shrinks) {
            self.checkpoint();
        }
        Ok(false)
    }

    pub(super) fn checkpoint_if_large(&mut self) {
        // What the log holds must find room in the database with no more than the reserve.
        let most = if self.reserve.bytes > 0 { CHECKPOINT_BYTES.min(self.reserve.bytes / 2) } else { CHECKPOINT_BYTES };
        let is_failing = self.retry.is_some() && !self.reserve.is_spent();
        if self.usage.wal >= most && !is_failing && !self.is_blocked() {
            self.checkpoint();
        }
    }

    pub(super) fn checkpoint(&mut self) {
        let started = Instant::now();
        let written = self.stats.bytes_written.load(Ordering::Relaxed);
        let done = self.database.checkpoint();
        let took = started.elapsed();
        self.look_at_usage();
        match done {
            Ok(()) => {
                let bytes = self.stats.bytes_written.load(Ordering::Relaxed).saturating_sub(written);
                self.stats.checkpointed(took, bytes);
            }
            Err(error) => {
                self.note(&error);
                self.retry_later(false);
            }
        }
    }

    pub(super) fn look_at_usage(&mut self) {
        if let Ok(usage) = self.database.usage() {
            self.usage = usage;
        }
        let used = self.usage.total - self.usage.free.min(self.usage.total);
        let is_full = used >= self.limits.bytes || self.database.state.messages >= self.limits.messages;
        self.stats.holds(&self.database.state, self.usage, is_full);
        self.stats.syncs.store(self.database.syncs, Ordering::Relaxed);
        if let Some(bytes) = bytes_written_by_this_thread() {
            self.stats.bytes_written.store(bytes, Ordering::Relaxed);
        }
    }
}

/// What the calling thread has passed to the operating system to write; `None` where that is not told.
fn bytes_written_by_this_thread() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/io").ok()?;
    text.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok())
}
