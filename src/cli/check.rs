//! `fieldgate check` and `fieldgate keys`.

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
    for (label, name, what) in config.summary() {
        say(format!("  {label:<9} {name:<12} {what}").trim_end());
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
            if !path.exists() {
                complain(
                    "name the configuration with `--config FILE`; config/minimal.yaml of the sources is one to begin with",
                );
            }
            Err(ExitCode::from(USER_ERROR))
        }
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

pub fn keys(prefix: &str) -> ExitCode {
    let mut found = false;
    let profile = config::profile_keys().into_iter().map(|key| Key { path: format!("profile:{}", key.path), ..key });
    for key in config::keys().into_iter().chain(profile).filter(|key| key.path.starts_with(prefix)) {
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
    complain(&format!("no key begins with `{prefix}`; `fieldgate keys` lists all"));
    ExitCode::from(USER_ERROR)
}
