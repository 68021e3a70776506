//! Network and file systems of this test's own, where the kernel itself can do what lines and disks do.
//!
//! The test starts itself again in namespaces: nothing of the machine's network or mounts is touched, everything is gone
//! with the process, and several may run side by side. Needs util-linux, and root or user namespaces.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Set in the process inside.
const INSIDE: &str = "FIELDGATE_CRASH_INSIDE";

/// Whether this process is inside. Where it is not, runs `test` there and passes on how that ended.
pub fn are_ours(test: &str) -> bool {
    if env::var_os(INSIDE).is_some() {
        return true;
    }
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let mut namespaces = vec!["--net", "--mount"];
    if !is_root {
        namespaces.extend(["--user", "--map-root-user"]);
    }
    let tried = Command::new("unshare").args(&namespaces).arg("true").output().expect("unshare, of util-linux");
    assert!(
        tried.status.success(),
        "the kernel gives this user no namespaces: {}; run as root, or leave FIELDGATE_CRASH_LINK and the fault `disk`",
        String::from_utf8_lossy(&tried.stderr).trim()
    );
    let status = Command::new("unshare")
        .args(&namespaces)
        .arg(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(status.unwrap().success(), "{test} has failed in its namespaces; see above");
    false
}

/// Runs a program that the kernel is told with; it must succeed.
pub fn tell<S: AsRef<OsStr>>(program: &str, arguments: &[S], input: &str) {
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error} (apt install iproute2 nftables mount)"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let arguments: Vec<_> = arguments.iter().map(AsRef::as_ref).collect();
    assert!(
        output.status.success(),
        "{program} {arguments:?} {input}: the kernel refuses: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A small file system in memory, that can be filled and freed.
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    pub fn mount(path: &Path, size: &str) -> Self {
        fs::create_dir_all(path).unwrap();
        let size = format!("size={size},mode=700");
        tell(
            "mount",
            &["-t".as_ref(), "tmpfs".as_ref(), "-o".as_ref(), size.as_ref(), "tmpfs".as_ref(), path.as_os_str()],
            "",
        );
        Self { path: path.to_owned() }
    }

    /// Leaves no room, until [`Disk::free`].
    pub fn fill(&self) {
        let mut file = fs::File::options().append(true).create(true).open(self.filling()).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    pub fn free(&self) {
        fs::remove_file(self.filling()).unwrap();
    }

    fn filling(&self) -> PathBuf {
        self.path.join("filling")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}
