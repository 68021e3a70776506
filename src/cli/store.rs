//! `fieldgate store`: a look at the database from outside, also while the gateway runs.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;

use super::terminal::{complain, printable, say};
use super::{DEFAULT_CONFIG, SYSTEM_ERROR, USER_ERROR, check, run};
use crate::clock::Clock;
use crate::config::Loaded;
use crate::config::summary::count;
use crate::store::inspect::{self, InspectError, Overview, Verdict};
use crate::store::{Settings, StoredSession};
use crate::supervise::describe;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// The configuration that says where the database is.
    #[arg(short, long, global = true, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    /// The directory of the store, or a database file, in place of what the configuration says.
    #[arg(short, long, global = true, value_name = "PATH")]
    database: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Action {
    /// List the stored sessions and what waits in their queues.
    Show,
    /// Read everything and say what is wrong.
    Verify,
    /// Write the queued messages to standard output, one JSON object a line; what a damaged database still gives.
    Export {
        /// Only those of this client.
        client: Option<String>,
    },
    /// Delete queued messages. The gateway must not be running.
    Purge {
        /// Those of this client.
        #[arg(required_unless_present = "all")]
        client: Option<String>,
        /// Those of all clients.
        #[arg(long, conflicts_with = "client")]
        all: bool,
    },
}

pub fn store(Arguments { action, config, database }: Arguments) -> ExitCode {
    let settings = match database {
        Some(path) => Settings::new(path),
        None => match check::load(&config) {
            Ok(Loaded { config, .. }) => config.store,
            Err(code) => return code,
        },
    };
    let path = &settings.directory;
    let done = match action {
        Action::Show => show(path),
        Action::Verify => verify(path),
        Action::Export { client } => export(path, client.as_deref()),
        Action::Purge { client, .. } => purge(&settings, client.as_deref()),
    };
    match done {
        Ok(code) => code,
        // A reader that has seen enough, as `head`, is no error.
        Err(InspectError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            complain(&describe(&error));
            let users_error =
                matches!(error, InspectError::Missing(_) | InspectError::File(_) | InspectError::NoSession(_));
            ExitCode::from(if users_error { USER_ERROR } else { SYSTEM_ERROR })
        }
    }
}

fn show(path: &Path) -> Result<ExitCode, InspectError> {
    let Overview { sessions, oldest, retained, database, free, log } = inspect::show(path)?;
    let names: Vec<_> = sessions.iter().map(|session| printable(&session.record.client_id)).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).clamp(24, 64);
    say(&format!("{:<width$} {:>10} {:>10}  {:<20}  subscriptions", "client", "messages", "size", "oldest"));
    for (client, StoredSession { record, subscriptions, queues, .. }) in names.iter().zip(&sessions) {
        let (messages, bytes) =
            queues.iter().fold((0, 0), |(messages, bytes), queue| (messages + queue.messages, bytes + queue.bytes));
        // To the second.
        let oldest = oldest.get(&record.id).map_or("-".into(), |at| format!("{}Z", &at.to_string()[..19]));
        let filters: Vec<&str> = subscriptions.iter().map(|subscription| &*subscription.filter).collect();
        let (size, filters) = (readable(bytes), printable(&filters.join(" ")));
        say(&format!("{client:<width$} {messages:>10} {size:>10}  {oldest:<20}  {filters}"));
    }
    say(&format!(
        "{}, {}; the database has {}, of which {} are free, and its log {}",
        count(sessions.len() as u64, "session"),
        count(retained, "retained message"),
        readable(database),
        readable(free),
        readable(log)
    ));
    Ok(ExitCode::SUCCESS)
}

/// Three or four digits of a size.
fn readable(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes}B");
    }
    let (mut size, mut unit) = (bytes as f64 / 1024.0, 0);
    while size >= 1000.0 && unit + 1 < units.len() {
        (size, unit) = (size / 1024.0, unit + 1);
    }
    format!("{size:.1}{}", units[unit])
}

fn verify(path: &Path) -> Result<ExitCode, InspectError> {
    let Verdict { sessions, messages, findings } = inspect::verify(path)?;
    if findings.is_empty() {
        say(&format!("whole: {}, {}", count(sessions, "session"), count(messages, "message")));
        return Ok(ExitCode::SUCCESS);
    }
    findings.iter().for_each(|finding| say(finding));
    complain("damaged; the gateway saves what can be read when it starts, and `fieldgate store export` shows it");
    Ok(ExitCode::from(SYSTEM_ERROR))
}

fn export(path: &Path, client: Option<&str>) -> Result<ExitCode, InspectError> {
    let mut out = BufWriter::new(io::stdout().lock());
    let exported = inspect::export(path, client, &mut out)?;
    out.flush().map_err(InspectError::Output)?;
    complain(&format!("{} exported, {} unreadable", count(exported.messages, "message"), exported.unreadable));
    Ok(ExitCode::SUCCESS)
}

fn purge(settings: &Settings, client: Option<&str>) -> Result<ExitCode, InspectError> {
    let purged = inspect::purge(settings, client, &Clock::start(&run::boot_id()))?;
    say(&format!("{} deleted", count(purged, "message")));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        let check = |bytes, expected| assert_eq!(readable(bytes), expected);
        check(0, "0B");
        check(1023, "1023B");
        check(1024, "1.0KiB");
        check(1_023_900, "999.9KiB");
        check(1 << 20, "1.0MiB");
        check(5 << 40, "5.0TiB");
        check(u64::MAX, "16777216.0TiB");
    }
}
