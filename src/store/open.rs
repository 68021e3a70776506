//! From a directory to a usable database: the lock, the check, and what happens to a file that cannot be used.
//!
//! The gateway starts even with a damaged database: the file is moved aside, untouched, and a new one with what could be
//! saved of it takes its place.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags};
use thiserror::Error;
use tracing::{error, info, warn};

use super::Settings;
use super::database::Database;
use super::reserve::Reserve;
use super::salvage::{SalvageError, Salvaged, salvage};
use super::schema::{APPLICATION_ID, PAGE_BYTES, VERSION, migrate};
use super::state::Place;
use super::stats::Failure;
use super::wal;
use crate::clock::Clock;

/// The name of the database in its directory.
pub const DATABASE_FILE: &str = "fieldgate.db";
const LOCK_FILE: &str = "fieldgate.lock";

/// How long the integrity check may take; the gateway should be up within two seconds. A larger database than can be
/// read in this time is checked in part.
const CHECK_TIME: Duration = Duration::from_secs(1);
/// Steps of the integrity check between two looks at the clock.
const CHECK_STEPS: i32 = 1000;
/// The log is cut to this size when it starts over, after a transaction that made it larger.
const MAX_WAL_FILE_BYTES: u64 = 8 << 20;
/// How many databases that were moved aside are kept; the oldest goes, or a bad disk would fill itself with them.
const MAX_QUARANTINED: usize = 5;

/// Behind the name of the database, while a new one is written and when it is complete.
const HALF_SUFFIX: &str = ".salvage";
const WHOLE_SUFFIX: &str = ".salvaged";
/// How many queues that lost messages are named one by one.
const MAX_QUEUES_LOGGED: usize = 20;

/// How long another holder of the directory may take to leave.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Why the store could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("the directory {directory} cannot be created; create it, or set `store.directory` to one that can")]
    Directory { directory: PathBuf, source: io::Error },
    #[error("{path} cannot be written; the user that runs the gateway must be allowed to write in this directory")]
    Unwritable { path: PathBuf, source: io::Error },
    #[error("the store in {directory} is in use by {holder}; stop it first, or give this gateway another directory")]
    Locked { directory: PathBuf, holder: String },
    #[error("the damaged database {path} cannot be moved aside; move or delete it")]
    Quarantine { path: PathBuf, source: io::Error },
    #[error("the database {path} cannot be opened; check that its directory is writable and the disk is not full")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("the store's thread cannot be started")]
    Thread(#[source] io::Error),
}

impl OpenError {
    /// Whether it is the disk that cannot be used at the moment, and nobody has done anything wrong.
    pub fn may_pass(&self) -> bool {
        self.failure().is_some()
    }

    /// What is wrong with the disk; `None` where it is something else.
    pub(super) fn failure(&self) -> Option<Failure> {
        match self {
            Self::Directory { source, .. } | Self::Unwritable { source, .. } | Self::Quarantine { source, .. } => {
                failure_of(source)
            }
            Self::Database { path, source } => match Failure::of(source) {
                Failure::Full => Some(Failure::Full),
                // SQLite says the same of a file that may not be opened.
                Failure::Io | Failure::ReadOnly => {
                    try_write(path.parent()?).err().as_ref().and_then(failure_of).or_else(|| {
                        (source.sqlite_error_code() == Some(ErrorCode::SystemIoFailure)).then_some(Failure::Io)
                    })
                }
                _ => None,
            },
            Self::Locked { .. } | Self::Thread(_) => None,
        }
    }
}

fn failure_of(error: &io::Error) -> Option<Failure> {
    const EIO: i32 = 5;
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(Failure::Full),
        io::ErrorKind::ReadOnlyFilesystem => Some(Failure::ReadOnly),
        _ => (error.raw_os_error() == Some(EIO)).then_some(Failure::Io),
    }
}

/// Whether a file can be made in a directory and hold something.
fn try_write(directory: &Path) -> io::Result<()> {
    let path = directory.join("fieldgate.probe");
    let written = fs::write(&path, "?");
    let _ = fs::remove_file(path);
    written
}

/// Held as long as the store is open: no other process can open it.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Whether its file system takes no writes any more, of which SQLite says no more than that writing failed.
    pub fn is_read_only(&self) -> bool {
        let opened = OpenOptions::new().write(true).open(&self.path);
        opened.is_err_and(|error| error.kind() == io::ErrorKind::ReadOnlyFilesystem)
    }
}

/// A database that could not be used, and what took its place.
#[derive(Clone, Debug)]
pub(super) struct Replaced {
    /// Where it is now.
    pub moved_to: PathBuf,
    /// What the new one has of it; `None` where that is nothing.
    pub salvaged: Option<Salvaged>,
}

/// What stands in a directory that can be used.
pub(super) struct Found {
    pub database: Database,
    pub lock: Lock,
    pub reserve: Reserve,
    /// What had to be replaced.
    pub replaced: Option<Replaced>,
}

/// Opens the database in the directory of `settings`.
pub(super) fn open(settings: &Settings, clock: &Clock) -> Result<Found, OpenError> {
    let directory = &settings.directory;
    fs::create_dir_all(directory).map_err(|source| OpenError::Directory { directory: directory.clone(), source })?;
    let lock = lock(directory)?;
    let mut reserve = Reserve::new(directory, settings.reserve_bytes);
    let path = directory.join(DATABASE_FILE);
    let failed = |source| OpenError::Database { path: path.clone(), source };
    finish_replacing(&path).map_err(|source| OpenError::Quarantine { path: path.clone(), source })?;
    let opened = match open_database(&path) {
        // To read a log takes room too.
        Err(Trouble::System(_)) if reserve.release() => open_database(&path),
        opened => opened,
    };
    let (database, quarantined) = match opened {
        Ok(database) => (database, None),
        Err(Trouble::System(source)) => return Err(failed(source)),
        Err(Trouble::Unusable(reason)) => {
            let replaced = replace(&path, &reason, write_salvage(&path, &[]), clock)?;
            let database = open_database(&path).map_err(|trouble| match trouble {
                Trouble::System(source) => failed(source),
                Trouble::Unusable(_) => failed(rusqlite::Error::InvalidQuery),
            })?;
            (database, Some(replaced))
        }
    };
    database.set_max_bytes(settings.max_bytes).map_err(failed)?;
    if let Err(error) = reserve.fill() {
        warn!(%error, bytes = reserve.bytes, "there is no room on the disk for the store's reserve (`store.reserve`)");
    }
    Ok(Found { database, lock, reserve, replaced: quarantined })
}

/// A connection that only reads, for a look from outside while a gateway may be running.
pub(super) fn open_read_only(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    Ok(connection)
}

/// What `quick_check` has to say; `None` where it did not finish in `time`.
pub(super) fn quick_check(connection: &mut Connection, time: Duration) -> rusqlite::Result<Option<Vec<String>>> {
    let deadline = Instant::now() + time;
    connection.progress_handler(CHECK_STEPS, Some(move || Instant::now() >= deadline))?;
    let result = connection
        .prepare("PRAGMA quick_check(20)")
        .and_then(|mut check| check.query_map([], |row| row.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>());
    connection.progress_handler(0, None::<fn() -> bool>)?;
    match result {
        // The check reports being interrupted as one of its findings.
        _ if Instant::now() >= deadline => Ok(None),
        Ok(findings) => Ok(Some(findings.into_iter().filter(|finding| finding != "ok").collect())),
        Err(error) => Err(error),
    }
}

/// Whose fault it is that a database does not open.
enum Trouble {
    /// The file holds something else than a database of ours that is whole.
    Unusable(String),
    /// The file could not be read or written.
    System(rusqlite::Error),
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        damage(&error).map_or(Self::System(error), Self::Unusable)
    }
}

fn open_database(path: &Path) -> Result<Database, Trouble> {
    let started = Instant::now();
    // For what cannot be read SQLite will have its own words.
    let log = wal::check(&with_suffix(path, "-wal")).unwrap_or(wal::Condition::Whole);
    if let wal::Condition::Damaged(reason) = log {
        return Err(Trouble::Unusable(reason));
    }
    let mut connection = Connection::open(path)?;
    // Nobody else writes; whoever reads from outside may hold a lock for a moment.
    connection.busy_timeout(Duration::from_millis(200))?;
    connection.execute_batch(
        "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY;
         PRAGMA foreign_keys = OFF;",
    )?;
    let application_id: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let version: i32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let is_new = tables == 0 && application_id == 0 && version == 0;
    if !is_new && application_id != APPLICATION_ID {
        return Err(Trouble::Unusable(format!("it belongs to another program (application id {application_id})")));
    }
    if version > VERSION {
        let reason = format!("a newer fieldgate made it (version {version}, this one reads up to {VERSION})");
        return Err(Trouble::Unusable(reason));
    }
    // Up to here nothing is written: a file that is not ours stays as it is.
    if is_new {
        connection.execute_batch(&format!("PRAGMA page_size = {PAGE_BYTES}; PRAGMA auto_vacuum = INCREMENTAL;"))?;
    }
    connection.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;
         PRAGMA journal_size_limit = {MAX_WAL_FILE_BYTES};"
    ))?;
    if log == wal::Condition::Torn {
        warn!(
            path = %path.display(),
            "the store's last transaction is not whole: it was being written when the gateway or the machine stopped; if neither \
             had, what it held is lost, and the disk is to blame"
        );
    }
    if matches!(log, wal::Condition::Torn | wal::Condition::Rest) {
        // On a full disk it stays as it is.
        let _ = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    }
    if !is_new {
        match quick_check(&mut connection, CHECK_TIME)? {
            Some(findings) if !findings.is_empty() => return Err(Trouble::Unusable(findings.join("; "))),
            Some(_) => {}
            None => info!("the database is too large to check all of it at the start"),
        }
    }
    migrate(&mut connection, version)?;
    let database = Database::new(connection)?;
    info!(
        path = %path.display(),
        sessions = database.state.sessions.len(),
        messages = database.state.messages,
        millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "store opened"
    );
    Ok(database)
}

fn lock(directory: &Path) -> Result<Lock, OpenError> {
    let path = directory.join(LOCK_FILE);
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(unwritable)?;
    // The gateway before this one may still be leaving, and a program that was just started from this process shares its
    // open files until it is running.
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut locked = file.try_lock();
    while matches!(locked, Err(TryLockError::WouldBlock)) && Instant::now() < deadline {
        std::thread::sleep(LOCK_PATIENCE / 50);
        locked = file.try_lock();
    }
    match locked {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let _ = file.take(32).read_to_string(&mut text);
            let holder = match text.trim().parse::<u32>() {
                Ok(pid) => format!("the process {pid}"),
                Err(_) => "another process".into(),
            };
            return Err(OpenError::Locked { directory: directory.into(), holder });
        }
        Err(TryLockError::Error(source)) => return Err(unwritable(source)),
    }
    // The number is only a help for the message above: on a full disk the lock holds without it.
    let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(Lock { _file: file, path })
}

/// What is wrong with a database that gave this error; `None` where something else is to blame.
pub(super) fn damage(error: &rusqlite::Error) -> Option<String> {
    use rusqlite::Error::{
        FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, QueryReturnedNoRows, SqlInputError,
        SqliteFailure, Utf8Error,
    };
    use rusqlite::ffi::{SQLITE_IOERR_READ, SQLITE_IOERR_SHORT_READ};
    match error {
        SqliteFailure(failure, _) => match (failure.code, failure.extended_code) {
            (_, SQLITE_IOERR_SHORT_READ) => Some("the file is cut short".into()),
            (_, SQLITE_IOERR_READ) => Some("a part of the file cannot be read".into()),
            // With an unknown error our statements do not fit its tables.
            (ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown, _) => Some(error.to_string()),
            _ => None,
        },
        FromSqlConversionFailure(..)
        | InvalidColumnType(..)
        | IntegralValueOutOfRange(..)
        | Utf8Error(..)
        | QueryReturnedNoRows
        | SqlInputError { .. } => Some(error.to_string()),
        _ => None,
    }
}

/// Replaces the database of a store that is running, as [`open`] does. Where nothing can be saved, as on a full disk, the
/// old one stays.
pub(super) fn repair(
    database: &mut Database,
    settings: &Settings,
    reason: &str,
    clock: &Clock,
) -> Result<Replaced, RepairError> {
    let path = settings.directory.join(DATABASE_FILE);
    let salvaged = write_salvage(&path, &database.state.places())?;
    database.close()?;
    let replaced = replace(&path, reason, Ok(salvaged), clock)?;
    *database = open_database(&path).map_err(|trouble| match trouble {
        Trouble::System(error) => error,
        Trouble::Unusable(_) => rusqlite::Error::InvalidQuery,
    })?;
    database.set_max_bytes(settings.max_bytes)?;
    Ok(replaced)
}

/// Why a running store goes on with a damaged database.
#[derive(Debug, Error)]
pub(super) enum RepairError {
    #[error(transparent)]
    Salvage(#[from] SalvageError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("the new database cannot be opened")]
    Database(#[from] rusqlite::Error),
}

/// Writes what can be saved of the database at `path` beside it, to take its place.
fn write_salvage(path: &Path, known: &[Place]) -> Result<Salvaged, SalvageError> {
    let (half, whole) = (with_suffix(path, HALF_SUFFIX), with_suffix(path, WHOLE_SUFFIX));
    let _ = fs::remove_file(&half);
    let salvaged = salvage(path, &with_suffix(path, "-wal"), &half, known);
    if salvaged.is_ok() {
        fs::rename(&half, &whole)?;
    } else {
        let _ = fs::remove_file(&half);
    }
    salvaged
}

/// Moves the database at `path` aside and puts in its place the one that was written with what could be saved of it, or
/// none. Wherever that is interrupted, the next start comes upon either the old one or the new one as a whole.
fn replace(
    path: &Path,
    reason: &str,
    salvaged: Result<Salvaged, SalvageError>,
    clock: &Clock,
) -> Result<Replaced, OpenError> {
    let failed = |source| OpenError::Quarantine { path: path.into(), source };
    let moved_to = quarantine(path, clock)?;
    finish_replacing(path).map_err(failed)?;
    let path = moved_to.display();
    match &salvaged {
        Ok(salvaged) => {
            let Salvaged { sessions, subscriptions, retained, messages, lost, lost_rows, .. } = *salvaged;
            let Salvaged { may_come_twice, in_doubt, unreadable_pages, is_unfinished, .. } = *salvaged;
            error!(
                %reason, moved_to = %path, sessions, subscriptions, retained, messages, lost, lost_rows, may_come_twice,
                in_doubt, unreadable_pages, is_unfinished,
                "the database is damaged and was moved aside; what could be read of it is kept. Check the disk, and delete \
                 the file when it is not needed any more"
            );
            for (client_id, lost) in salvaged.queues.iter().take(MAX_QUEUES_LOGGED) {
                error!(%client_id, lost, "messages of a queue were lost with the damaged database");
            }
        }
        Err(error) => error!(
            %reason, moved_to = %path, why_nothing_is_saved = %error,
            "the database cannot be used and was moved aside; the gateway starts with an empty store"
        ),
    }
    Ok(Replaced { moved_to, salvaged: salvaged.ok() })
}

/// Puts a database that was written to take the place of a damaged one there, if that has gone; otherwise begins again.
fn finish_replacing(path: &Path) -> io::Result<()> {
    let whole = with_suffix(path, WHOLE_SUFFIX);
    let _ = fs::remove_file(with_suffix(path, HALF_SUFFIX));
    if !whole.exists() {
        return Ok(());
    }
    if path.exists() {
        return fs::remove_file(whole);
    }
    // They belong to the one that has gone.
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(with_suffix(path, suffix));
    }
    fs::rename(whole, path)?;
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Moves the database with its log to a name that says when; returns that name.
fn quarantine(path: &Path, clock: &Clock) -> Result<PathBuf, OpenError> {
    let time: String = clock.now().to_string().chars().take(19).filter(|c| *c != '-' && *c != ':').collect();
    let name = |number: u32| match number {
        0 => with_suffix(path, &format!(".corrupt-{time}Z")),
        _ => with_suffix(path, &format!(".corrupt-{time}Z-{number}")),
    };
    let aside = (0..).map(name).find(|aside| !aside.exists()).unwrap_or_else(|| name(0));
    // The log last: without its database nobody reads it.
    for suffix in ["", "-wal", "-shm"] {
        match fs::rename(with_suffix(path, suffix), with_suffix(&aside, suffix)) {
            Err(source) if suffix.is_empty() || source.kind() != io::ErrorKind::NotFound => {
                return Err(OpenError::Quarantine { path: path.into(), source });
            }
            _ => {}
        }
    }
    remove_oldest_quarantined(path, &aside);
    Ok(aside)
}

/// `newest` is the one that was just moved.
fn remove_oldest_quarantined(path: &Path, newest: &Path) {
    let prefix = format!("{DATABASE_FILE}.corrupt-");
    let Some(entries) = path.parent().and_then(|directory| fs::read_dir(directory).ok()) else { return };
    let mut aside: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path != newest)
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&prefix) && !name.ends_with("-wal") && !name.ends_with("-shm")
        })
        .collect();
    aside.sort();
    for old in &aside[..aside.len().saturating_sub(MAX_QUARANTINED - 1)] {
        warn!(path = %old.display(), limit = MAX_QUARANTINED, "too many databases were moved aside, the oldest is deleted");
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(with_suffix(old, suffix));
        }
    }
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
