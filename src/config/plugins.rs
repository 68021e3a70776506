//! The section `plugins`: adapter programs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::claims::Names;
use super::report::Report;
use super::scalar::Name;
use super::source::Located;
use super::table::Table;
use crate::field::process::Settings;

pub(super) fn programs(table: &mut Table<'_>, names: &mut Names) -> Vec<Settings> {
    table.list("plugins", "Adapter programs: child processes that speak JSON lines.", |table| {
        let name = table.value::<Name>("name", "Names the adapter in the log and the UI.").required_at();
        names.adapters.extend(name.iter().map(Located::text));
        let meaning = "The program and its arguments. No shell; a path with `/` starts at this file.";
        let command = table.values::<String>("command", meaning);
        if command.is_empty() && table.place_of("command").is_none() {
            table.missing("command", "add `command: [./plugins/adapters/NAME.py]`");
        }
        let program = command.first().map(|program| program_path(&program.value, table.directory));
        if let (Some(first), Some(path)) = (command.first(), &program)
            && path.contains('/')
            && !Path::new(path).exists()
        {
            table.report(Report::error(first.span, "there is no such program").label(path.clone()));
        }
        let own = table.values::<Name>("devices", "The devices it speaks for; one with the adapter's name if absent.");
        let listed = own.iter().map(Located::text);
        let fallback = name.iter().filter(|_| own.is_empty());
        let fallback = fallback.map(Located::text);
        let own: Vec<_> = listed.chain(fallback).collect();
        names.devices.extend(own.iter().cloned());
        let directory =
            table.value::<PathBuf>("directory", "Where it runs; the gateway's directory if absent.").optional();
        let environment =
            table.pairs::<String, String>("environment", "Variables for it, beside PATH, HOME, LANG, TZ and TMPDIR.");
        let settings = table.json("settings", "Handed to the program when it starts; what it means is the program's.");
        let silent_after = table
            .value("silent_after", "A program that says nothing for this long is started again; never if absent.")
            .range(Duration::from_secs(1)..=Duration::from_secs(86_400))
            .optional();
        let rerun_interval = table
            .value("rerun_interval", "When a program that ended well is started again.")
            .range(Duration::from_secs(1)..=Duration::from_secs(86_400))
            .or(Settings::DEFAULT_RERUN_INTERVAL);
        let arguments = command.into_iter().skip(1).map(|argument| OsString::from(argument.value));
        let command: Vec<_> = program.into_iter().map(OsString::from).chain(arguments).collect();
        if command.is_empty() {
            return None;
        }
        Some(Settings {
            name: name?.value.0.into(),
            command,
            directory,
            environment: environment.into_iter().map(|(name, value)| (name.value, value.value)).collect(),
            devices: own.into_iter().map(|device| Arc::from(device.value)).collect(),
            settings,
            silent_after,
            rerun_interval,
        })
    })
}

/// A bare name is looked up in PATH; anything else is a path from the configuration's directory.
fn program_path(program: &str, directory: &Path) -> String {
    if !program.contains('/') || program.starts_with('/') {
        return program.to_owned();
    }
    let path = directory.join(program);
    let path = std::path::absolute(&path).unwrap_or(path);
    path.to_string_lossy().into_owned()
}
