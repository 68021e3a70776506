//! The sections about the gateway itself: name, log, store.

use std::path::PathBuf;
use std::time::Duration;

use super::report::Report;
use super::scalar::{Name, Size, words};
use super::table::Table;
use crate::store;

/// What the log looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    pub level: Level,
    pub format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

words!(Level, "a log level", "error" => Level::Error, "warn" => Level::Warn, "info" => Level::Info,
    "debug" => Level::Debug, "trace" => Level::Trace);
words!(Format, "a log format", "text" => Format::Text, "json" => Format::Json);

#[derive(Clone, Copy)]
enum Durability {
    Commit,
    Interval,
    Relaxed,
}
words!(Durability, "a durability", "commit" => Durability::Commit, "interval" => Durability::Interval,
    "relaxed" => Durability::Relaxed);

pub(super) fn gateway_name(table: &mut Table<'_>) -> String {
    table.table("gateway", "The gateway itself.", |table| {
        let meaning = "Names this gateway in upstream topics (`{gateway}`) and client ids.";
        table.value("name", meaning).or_else("the host name", || Name(host_name())).0
    })
}

/// The host name as far as it is one; a gateway is never without a name.
fn host_name() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let legal = |character: &char| character.is_ascii_alphanumeric() || "-_".contains(*character);
    let name: String = text.trim().chars().filter(legal).take(64).collect();
    if name.is_empty() { "fieldgate".into() } else { name }
}

pub(super) fn log(table: &mut Table<'_>) -> Log {
    table.table("log", "What the log holds and how it looks.", |table| Log {
        level: table.value("level", "The least severe events to write; `trace` writes every message.").or(Level::Info),
        format: table.value("format", "`json` writes one object per line, for log collectors.").or(Format::Text),
    })
}

/// The store's settings, and how long a message may wait in whatever queue, which is the hub's business.
pub(super) fn store(table: &mut Table<'_>) -> (store::Settings, Option<Duration>) {
    table.table("store", "The database for everything that must survive a restart or power cut.", |table| {
        let defaults = store::Settings::new("");
        let directory = table
            .value("directory", "Where the database lives.")
            .or_else("`$STATE_DIRECTORY`, else /var/lib/fieldgate", state_directory);
        let mode = table
            .value(
                "durability",
                "When a message is acknowledged: `commit` when it is on disk; `interval` when it is on disk, and disk \
                 writes are gathered over `commit_interval`; `relaxed` at once, which risks the last second.",
            )
            .or(Durability::Commit);
        let interval_place = table.place_of("commit_interval");
        let interval = table
            .value("commit_interval", "How long `durability: interval` gathers writes, of at most 4096 messages.")
            .range(Duration::from_millis(10)..=Duration::from_secs(60))
            .or(Duration::from_millis(250));
        if let (Some(place), false) = (interval_place, matches!(mode, Durability::Interval)) {
            let report = Report::warning(place, "`commit_interval` has no effect without `durability: interval`");
            table.report(report.help("add `durability: interval`, or remove the line"));
        }
        let max_commit_delay = table
            .value(
                "max_commit_delay",
                "How long a message may wait, and its publisher for the acknowledgement, where its connected receivers \
                 mostly acknowledge within this time: then it need not be written at all.",
            )
            .range(defaults.commit_delay..=Duration::from_secs(10))
            .or(defaults.max_commit_delay);
        let retained_interval = table
            .value(
                "retained_interval",
                "How long a retained message that was published with QoS 0 may wait, so that of many on one topic only the \
                 last is written.",
            )
            .range(Duration::from_millis(100)..=Duration::from_secs(86_400))
            .or(defaults.retained_interval);
        let settings = store::Settings {
            directory,
            max_commit_delay,
            retained_interval,
            durability: match mode {
                Durability::Commit => store::Durability::Commit,
                Durability::Interval => store::Durability::Interval(interval),
                Durability::Relaxed => store::Durability::Relaxed,
            },
            max_bytes: table
                .value("max_size", "The largest size of the database file; then `when_full` of each queue applies.")
                .range(Size::mib(1)..=Size::mib(1024 * 1024))
                .or(Size(defaults.max_bytes))
                .0,
            max_messages: table
                .value("max_messages", "Messages in all queues on disk together; then `when_full` applies too.")
                .range(1..=1_000_000_000_000)
                .optional()
                .unwrap_or(defaults.max_messages),
            reserve_bytes: table
                .value(
                    "reserve",
                    "Room on the disk that a file holds for when it is full, so that what is delivered can be removed; 0B \
                     for none, and never more than a sixteenth of the disk.",
                )
                .range(Size(0)..=Size::mib(1024))
                .or(Size(defaults.reserve_bytes))
                .0,
            ..defaults
        };
        let max_age = table
            .value("max_age", "What has waited for longer is given up, in whatever queue; never if absent.")
            .range(Duration::from_secs(1)..=Duration::from_secs(10 * 365 * 86_400))
            .optional();
        (settings, max_age)
    })
}

/// systemd sets the variable for a unit with `StateDirectory=`.
fn state_directory() -> PathBuf {
    let set = std::env::var_os("STATE_DIRECTORY").filter(|path| !path.is_empty());
    set.map_or_else(|| PathBuf::from("/var/lib/fieldgate"), PathBuf::from)
}
