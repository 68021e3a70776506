//! `fieldgate check` and `fieldgate keys`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::USER_ERROR;
use super::terminal::{complain, say, show_reports};
use crate::config::report::Reports;
use crate::config::table::Key;
use crate::config::{self, Loaded};

/// Checks each file; all of them must be right.
pub fn check(paths: &[PathBuf]) -> ExitCode {
    let mut worst = ExitCode::SUCCESS;
    for path in paths {
        if let Err(code) = check_one(path) {
            worst = code;
        }
    }
    worst
}

fn check_one(path: &Path) -> Result<(), ExitCode> {
    let Loaded { config, warnings, .. } = load(path)?;
    match warnings.reports.len() {
        0 => say(&format!("{}: ok", path.display())),
        1 => say(&format!("{}: ok, 1 warning", path.display())),
        count => say(&format!("{}: ok, {count} warnings", path.display())),
    }
    let lines = config.summary();
    let width = lines.iter().map(|(_, name, _)| name.chars().count()).max().unwrap_or(0).max(12);
    for (label, name, what) in lines {
        say(format!("  {label:<9} {name:<width$} {what}").trim_end());
    }
    Ok(())
}

/// Loads a configuration and shows what is wrong or doubtful.
pub fn load(path: &Path) -> Result<Loaded, ExitCode> {
    match config::load(path) {
        Ok(loaded) => {
            show_reports(&loaded.warnings);
            Ok(loaded)
        }
        Err(reports) => {
            show_reports(&reports);
            complain(&count(path, &reports));
            if let Some(advice) = File::open(path).err().and_then(|error| advice(error.kind())) {
                complain(advice);
            }
            Err(ExitCode::from(USER_ERROR))
        }
    }
}

/// What to do about a configuration that cannot be opened.
fn advice(kind: io::ErrorKind) -> Option<&'static str> {
    match kind {
        io::ErrorKind::NotFound => {
            Some("name the configuration with `--config FILE`; config/minimal.yaml of the sources is one to begin with")
        }
        io::ErrorKind::PermissionDenied => {
            Some("let this user read the file, or ask as the user that runs the gateway")
        }
        _ => None,
    }
}

fn count(path: &Path, reports: &Reports) -> String {
    let plural = |number: usize, what: &str| match number {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    };
    let mut text = format!("{}: {}", path.display(), plural(reports.errors(), "error"));
    if reports.warnings() > 0 {
        text.push_str(&format!(", {}", plural(reports.warnings(), "warning")));
    }
    text
}

/// Explains the keys that begin with `wanted`, or else those that hold it; a list's `[]` may be left out.
pub fn keys(wanted: &str) -> ExitCode {
    let bare = |path: &str| path.replace("[]", "");
    let wanted = bare(wanted);
    let profile = config::profile_keys().into_iter().map(|key| Key { path: format!("profile:{}", key.path), ..key });
    let all: Vec<Key> = config::keys().into_iter().chain(profile).collect();
    let begin = all.iter().any(|key| bare(&key.path).starts_with(&wanted));
    let fits = |path: String| if begin { path.starts_with(&wanted) } else { path.contains(&wanted) };
    let mut found = false;
    for key in all.iter().filter(|key| fits(bare(&key.path))) {
        found = true;
        let default = match (&key.default, key.required) {
            (Some(default), _) if !default.is_empty() => format!("; default {default}"),
            (_, true) => "; required".to_owned(),
            _ => String::new(),
        };
        say(&format!("{}\n    {}\n    {}{default}", key.path, key.meaning, key.shape));
    }
    if found {
        return ExitCode::SUCCESS;
    }
    complain(&format!("no key holds `{wanted}`; `fieldgate keys` lists all"));
    ExitCode::from(USER_ERROR)
}
