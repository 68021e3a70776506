//! Files whose changes matter while the gateway runs: certificates, users, rules. Told apart by fingerprints, not by
//! their contents, and looked at from time to time: notifications of the kernel miss network file systems, and renames
//! of directories as Kubernetes makes them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often to look.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Changes when a file is rewritten, replaced by a rename, or when a symbolic link is pointed elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    modified: (i64, i64),
    inode: u64,
    length: u64,
}

impl Fingerprint {
    /// `None` for a file that cannot be looked at.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Some(Self { modified, inode: metadata.ino(), length: metadata.len() })
    }
}

/// Files and how they looked last.
#[derive(Debug)]
pub struct Watched {
    files: Vec<(PathBuf, Option<Fingerprint>)>,
    /// Some file has changed since it was last said.
    restless: bool,
}

impl Watched {
    pub fn new<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Self {
        let look = |path: P| {
            let path = path.into();
            let seen = Fingerprint::of(&path);
            (path, seen)
        };
        Self { files: paths.into_iter().map(look).collect(), restless: false }
    }

    /// Watches these files from now on. For those it watched already, what counts is how they looked last: a change
    /// that came while they were being read is told.
    pub fn follow(&mut self, paths: Vec<PathBuf>) {
        let before = std::mem::take(&mut self.files);
        let known = |path: &PathBuf| before.iter().find(|(known, _)| known == path).map(|(_, seen)| *seen);
        self.files = paths
            .into_iter()
            .map(|path| {
                let seen = known(&path).unwrap_or_else(|| Fingerprint::of(&path));
                (path, seen)
            })
            .collect();
    }

    /// Looks at the files. True once for changes that are over: a file that is being written, or the second of a pair,
    /// is waited for until nothing has changed between two looks.
    pub fn have_changed(&mut self) -> bool {
        let mut moving = false;
        for (path, seen) in &mut self.files {
            let now = Fingerprint::of(path);
            moving |= std::mem::replace(seen, now) != now;
        }
        if moving {
            self.restless = true;
            return false;
        }
        std::mem::take(&mut self.restless)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_change_is_told_once_and_when_it_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
        fs::write(&a, "1").unwrap();
        let mut watched = Watched::new([&a, &b]);
        assert!(!watched.have_changed() && !watched.have_changed());
        fs::write(&a, "12").unwrap();
        assert!(!watched.have_changed(), "it may go on");
        fs::write(&b, "now there").unwrap();
        assert!(!watched.have_changed(), "and it did");
        assert!(watched.have_changed());
        assert!(!watched.have_changed(), "said is said");
        fs::write(directory.path().join("c"), "12").unwrap();
        fs::rename(directory.path().join("c"), &a).unwrap();
        assert!(!watched.have_changed() && watched.have_changed(), "of the same length, but another file");
        fs::remove_file(&b).unwrap();
        assert!(!watched.have_changed() && watched.have_changed());
    }
}
