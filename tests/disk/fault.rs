//! A data directory on a disk that fails when it is told to: see `fault.c`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub const EIO: i32 = 5;
pub const ENOSPC: i32 = 28;
pub const EROFS: i32 = 30;

/// For as long as it is not mended.
pub const ALWAYS: u32 = u32::MAX;

/// What fails.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub calls: &'static str,
    pub errno: i32,
    /// The end of the path; `*` for any.
    pub file: &'static str,
    /// How many calls pass first.
    pub skip: u32,
    /// How many fail then.
    pub count: u32,
}

pub struct Disk {
    root: PathBuf,
}

impl Disk {
    /// Below `root`, which a gateway has as its directory.
    pub fn new(root: &Path) -> Self {
        fs::create_dir_all(root.join("shadow")).unwrap();
        fs::create_dir_all(root.join("data")).unwrap();
        // As the kernel spells it.
        Self { root: root.canonicalize().unwrap() }
    }

    /// What to run a program under so that its files below `data` are on this disk.
    pub fn under(&self) -> Vec<String> {
        let set = |name: &str, path: &Path| format!("{name}={}", path.display());
        vec![
            "env".into(),
            set("LD_PRELOAD", library()),
            set("FAULT_DIRECTORY", &self.root.join("data")),
            set("FAULT_CONTROL", &self.root.join("control")),
            set("FAULT_SHADOW", &self.root.join("shadow")),
        ]
    }

    pub fn fail(&self, Fault { calls, errno, file, skip, count }: Fault) {
        let (new, control) = (self.root.join("control.new"), self.root.join("control"));
        fs::write(&new, format!("{calls} {errno} {file} {skip} {count}")).unwrap();
        fs::rename(new, control).unwrap();
    }

    pub fn mend(&self) {
        fs::remove_file(self.root.join("control")).unwrap();
    }

    /// Leaves what a power cut would leave; to be called while no program has the files open.
    pub fn cut_power(&self) {
        let (data, shadow) = (self.root.join("data"), self.root.join("shadow"));
        for entry in fs::read_dir(&data).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for entry in fs::read_dir(&shadow).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), data.join(entry.file_name())).unwrap();
        }
    }
}

/// The library with the faults, which the C compiler makes once; SQLite needed one too.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/disk/fault.c");
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fault-{}.so", std::process::id()));
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let made = Command::new(compiler)
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .status();
        assert!(made.expect("a C compiler").success());
        library
    })
}
