//! `fieldgate passwd`: from a password to the hash that the configuration holds.

use std::fs::OpenOptions;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::terminal::{Keyboard, complain, say};
use super::{SYSTEM_ERROR, USER_ERROR};
use crate::hub::access::hash_password;

/// A longer password than MQTT can carry is a mistake.
const MAX_PASSWORD_BYTES: u64 = 65_535;

#[derive(clap::Args)]
pub struct Arguments {
    /// The user's name.
    name: String,
    /// Write the hash to this file, readable to its owner only, instead of printing an entry.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

pub fn passwd(Arguments { name, file }: &Arguments) -> ExitCode {
    let password = match ask(name) {
        Ok(password) => password,
        Err(problem) => {
            complain(&problem);
            return ExitCode::from(USER_ERROR);
        }
    };
    let hash = match hash_password(password.as_bytes()) {
        Ok(hash) => hash,
        Err(error) => {
            complain(&crate::supervise::describe(&error));
            return ExitCode::from(SYSTEM_ERROR);
        }
    };
    let Some(file) = file else {
        say(&format!("users:\n  - {{ name: {}, password_hash: \"{hash}\" }}", quoted(name)));
        return ExitCode::SUCCESS;
    };
    if let Err(error) = write_private(file, &hash) {
        complain(&format!("{}: {error}", file.display()));
        return ExitCode::from(SYSTEM_ERROR);
    }
    say(&format!("users:\n  - {{ name: {}, password_hash: \"file:{}\" }}", quoted(name), file.display()));
    ExitCode::SUCCESS
}

/// Twice from a terminal, without showing it; once from a pipe.
fn ask(name: &str) -> Result<String, String> {
    let keyboard = Keyboard::without_echo();
    if !keyboard.is_terminal() {
        return read_line();
    }
    let prompt = |text: &str| {
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "{text}: ");
        let _ = stderr.flush();
        drop(stderr);
        let line = read_line();
        complain("");
        line
    };
    let password = prompt(&format!("Password for {name}"))?;
    if prompt("Once more")? != password {
        return Err("the two passwords differ".into());
    }
    Ok(password)
}

fn read_line() -> Result<String, String> {
    let mut line = String::new();
    let read = io::stdin().lock().take(MAX_PASSWORD_BYTES + 2).read_line(&mut line);
    read.map_err(|error| format!("cannot read the password: {error}"))?;
    let line = line.trim_end_matches(['\r', '\n']);
    if line.is_empty() {
        return Err("the password is empty".into());
    }
    Ok(line.to_owned())
}

/// A name as YAML holds it whatever its characters.
fn quoted(name: &str) -> String {
    let plain = name.chars().all(|character| character.is_ascii_alphanumeric() || "-_".contains(character));
    let word = plain && name.chars().next().is_some_and(|first| first.is_ascii_alphabetic());
    if word { name.to_owned() } else { format!("'{}'", name.replace('\'', "''")) }
}

fn write_private(path: &Path, hash: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    writeln!(file, "{hash}")?;
    file.sync_all()
}
