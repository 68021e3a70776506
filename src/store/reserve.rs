//! Room that is held on the disk for when it is full: removals need some before they give some back.
//!
//! A log that cannot be moved into a database that cannot grow takes no removal either, and then nothing makes room but a
//! person. So a file holds as much as the log may hold, and goes when the disk is full; what is delivered or expires
//! meanwhile is removed, and once there is room for the file again, there is room for new messages.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

/// The name of the file, beside the database.
pub(super) const RESERVE_FILE: &str = "fieldgate.reserve";
/// It takes no more than this part of its file system.
const PART_OF_DISK: u64 = 16;

#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    /// Zero where none is wanted.
    pub bytes: u64,
    is_held: bool,
}

impl Reserve {
    /// The reserve of the store in `directory`, of at most `bytes`; see [`Reserve::fill`].
    pub fn new(directory: &Path, bytes: u64) -> Self {
        let disk = statvfs(directory).map_or(u64::MAX, |disk| disk.f_blocks.saturating_mul(disk.f_frsize));
        let path = directory.join(RESERVE_FILE);
        let is_held = path.exists();
        Self { path, bytes: bytes.min(disk / PART_OF_DISK), is_held }
    }

    /// Whether it has been given up, and is needed.
    pub fn is_spent(&self) -> bool {
        self.bytes > 0 && !self.is_held
    }

    /// Takes the room, as far as it does not have it.
    ///
    /// # Errors
    /// There is not as much, or the disk fails; nothing is held then.
    pub fn fill(&mut self) -> io::Result<()> {
        if self.bytes == 0 {
            self.release();
            return Ok(());
        }
        let filled = self.allocate();
        self.is_held = filled.is_ok();
        if filled.is_err() {
            let _ = fs::remove_file(&self.path);
        }
        filled
    }

    fn allocate(&self) -> io::Result<()> {
        let mut file = File::options().write(true).create(true).truncate(false).open(&self.path)?;
        let found = file.metadata()?;
        if found.len() == self.bytes && found.blocks() * 512 >= self.bytes {
            return Ok(());
        }
        file.set_len(0)?;
        match fallocate(&file, FallocateFlags::empty(), 0, self.bytes) {
            Err(Errno::OPNOTSUPP) => {
                let zeros = [0; 1 << 16];
                let mut left = self.bytes;
                while left > 0 {
                    let part = zeros.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    file.write_all(&zeros[..part])?;
                    left -= part as u64;
                }
                file.sync_data()
            }
            done => Ok(done?),
        }
    }

    /// Gives the room up; true where there was any.
    pub fn release(&mut self) -> bool {
        let removed = fs::remove_file(&self.path);
        self.is_held = removed.as_ref().is_err_and(|error| error.kind() != ErrorKind::NotFound) && self.is_held;
        removed.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_takes_its_room_and_gives_it_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(RESERVE_FILE);
        let mut reserve = Reserve::new(directory.path(), 1 << 20);
        assert!(reserve.is_spent());
        reserve.fill().unwrap();
        assert!(!reserve.is_spent());
        assert!(path.metadata().unwrap().blocks() * 512 >= 1 << 20, "it is not sparse");
        assert!(reserve.release() && reserve.is_spent() && !path.exists());
        assert!(!reserve.release());

        // Found at a start, of another size; and not wanted any more.
        reserve.fill().unwrap();
        let mut smaller = Reserve::new(directory.path(), 1 << 16);
        smaller.fill().unwrap();
        assert_eq!(path.metadata().unwrap().len(), 1 << 16);
        let mut none = Reserve::new(directory.path(), 0);
        none.fill().unwrap();
        assert!(!path.exists() && !none.is_spent());
    }

    #[test]
    fn a_reserve_is_a_small_part_of_its_disk() {
        let directory = tempfile::tempdir().unwrap();
        let disk = statvfs(directory.path()).unwrap();
        let reserve = Reserve::new(directory.path(), u64::MAX);
        assert_eq!(reserve.bytes, disk.f_blocks * disk.f_frsize / PART_OF_DISK);
    }
}
