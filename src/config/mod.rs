//! YAML to checked settings; every error with file:line:column, a snippet and a hint.
//!
//! [`tree`] parses text to a tree that knows places; [`table`] reads it key by key; the section modules say which keys
//! there are and turn them into the components' own settings; `claims` compares sections with each other. `config`
//! knows the components, never the other way round.

mod access;
mod claims;
mod core;
mod listeners;
mod modbus;
mod mqttsn;
mod plugins;
pub mod report;
pub mod scalar;
mod serial;
pub mod source;
pub mod summary;
pub mod table;
mod tls;
mod translators;
pub mod tree;
mod upstreams;
mod web;
mod words;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use self::core::{Format, Level, Log};
use self::report::{Report, Reports, Severity};
use self::table::{Context, Key, Table};
use crate::{bridge, field, hub, listener, sensornet, store};

/// A whole configuration, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Stands for `{gateway}` in upstream topics.
    pub name: String,
    pub log: Log,
    pub store: store::Settings,
    pub hub: hub::Settings,
    pub listeners: Vec<listener::Settings>,
    pub buses: Vec<field::modbus::Settings>,
    pub serial: Vec<field::serial::Settings>,
    pub plugins: Vec<field::process::Settings>,
    pub mqttsn: Option<sensornet::Settings>,
    pub translators: Vec<field::translate::Settings>,
    pub upstreams: Vec<bridge::Settings>,
    pub web: Option<crate::web::Settings>,
}

/// A configuration that can run, and what should still be said about it.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    pub warnings: Reports,
    /// What was read for it: the configuration itself, profiles, users, rules, secrets.
    pub files: Vec<PathBuf>,
}

/// Reads and checks the file at `path` and the files it names. Opens no port and changes nothing.
///
/// # Errors
/// Everything that is wrong, warnings included.
pub fn load(path: &Path) -> Result<Loaded, Reports> {
    load_with(path, &|name| std::env::var(name).ok())
}

/// As [`load`], with the environment variables given.
///
/// # Errors
/// As [`load`].
pub fn load_with(path: &Path, environment: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, Reports> {
    let context = Context::new(environment);
    let directory = path.parent().unwrap_or(Path::new(""));
    let root = context.load(path, None);
    let config = root.and_then(|(_, root)| Table::read_root(&context, &root, directory, read)).flatten();
    finish(context, config)
}

/// Every key there is, in the order of the sections.
pub fn keys() -> Vec<Key> {
    Context::describe(|table| {
        read(table);
    })
}

/// Every key of a device profile.
pub fn profile_keys() -> Vec<Key> {
    Context::describe(|table| {
        modbus::profile_keys(table);
    })
}

fn finish(context: Context<'_>, config: Option<Config>) -> Result<Loaded, Reports> {
    let mut reports = context.reports.into_inner();
    let order = |report: &Report| report.place.map(|place| (place.file, place.start));
    reports.sort_by_key(order);
    let reports = Reports { sources: context.sources.into_inner(), reports };
    match config {
        Some(config) if reports.errors() == 0 => {
            Ok(Loaded { config, warnings: reports, files: context.files.into_inner() })
        }
        _ => {
            debug_assert!(reports.reports.iter().any(|report| report.severity == Severity::Error));
            Err(reports)
        }
    }
}

/// The whole file. Each section reports what is wrong with it; what crosses sections is compared at the end.
fn read(table: &mut Table<'_>) -> Option<Config> {
    let name = core::gateway_name(table);
    let log = core::log(table);
    let (store, max_age) = core::store(table);
    let (limits, connections) = table.table("limits", "What one client, and all of them together, may use.", |table| {
        (access::limits(table), listeners::limits(table))
    });
    let access = access::access(table);
    let listeners = listeners::listeners(table, &connections, &access);
    let mut names = claims::Names::default();
    let config = Config {
        log,
        listeners,
        mqttsn: mqttsn::mqttsn(table),
        buses: modbus::buses(table, &mut names),
        serial: serial::ports(table, &mut names),
        translators: translators::translators(table, &mut names),
        plugins: plugins::programs(table, &mut names),
        upstreams: upstreams::upstreams(table, &name, &store),
        store,
        web: web::web(table, !access.users.is_empty()),
        hub: hub::Settings { limits: hub::Limits { max_age, ..limits }, access },
        name,
    };
    table.cx.unique("adapters", names.adapters.iter().map(|adapter| (adapter.value.as_str(), adapter.span)));
    table.cx.unique("devices", names.devices.iter().map(|device| (device.value.as_str(), device.span)));
    for report in claims::conflicts(&table.cx.claims.borrow()) {
        table.report(report);
    }
    Some(config)
}
