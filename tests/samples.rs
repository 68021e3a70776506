//! The sample configurations are right, complete, and start.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use fieldgate::clock::{Clock, UnixMillis};
use fieldgate::config::report::Look;
use fieldgate::config::{self, Config};
use fieldgate::gateway::Gateway;
use fieldgate::listener::Address;
use fieldgate::tls::issue::{Authority, LOOPBACK_NAMES, Usage};
use fieldgate::web::log::LogRing;
use tokio::sync::{mpsc, watch};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The configuration with its ports left to the system and its database in `directory`.
fn movable(path: &Path, directory: &Path) -> Config {
    let loaded = config::load(path).unwrap_or_else(|reports| panic!("{}", reports.render(Look::Plain)));
    assert!(loaded.warnings.reports.is_empty(), "{}", loaded.warnings.render(Look::Plain));
    let mut config = loaded.config;
    let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    for listener in &mut config.listeners {
        listener.address = Address::Tcp(anywhere);
    }
    config.mqttsn.iter_mut().for_each(|mqttsn| mqttsn.address = anywhere);
    config.web.iter_mut().for_each(|web| web.address = anywhere);
    config.store.directory = directory.to_path_buf();
    // Nobody out there is disturbed.
    for url in config.upstreams.iter_mut().flat_map(|upstream| &mut upstream.urls) {
        (url.host, url.port) = ("localhost".into(), 9);
    }
    config
}

async fn starts_and_stops(config: Config) {
    let clock = Clock::start("test");
    let gateway = Gateway::bind(config, clock.clone(), LogRing::new(clock)).await.unwrap();
    let (stop, shutdown) = watch::channel(false);
    let (_keep, reloads) = mpsc::channel(1);
    let hub = gateway.handle().hub().clone();
    let running = tokio::spawn(gateway.run(shutdown, reloads));
    // The hub is served once the gateway runs: its own session answers.
    assert!(hub.sessions().iter().any(|session| &*session.client_id == "cloud"));
    stop.send(true).unwrap();
    running.await.unwrap();
}

#[tokio::test]
async fn the_minimal_sample_starts() {
    let directory = tempfile::tempdir().unwrap();
    let path = root().join("config/minimal.yaml");
    let lines = fs::read_to_string(&path).unwrap().lines().count();
    assert!(lines <= 10, "{lines} lines are not a ten-line start");
    starts_and_stops(movable(&path, directory.path())).await;
}

#[tokio::test]
async fn the_commented_sample_starts() {
    let directory = tempfile::tempdir().unwrap();
    starts_and_stops(movable(&root().join("config/fieldgate.yaml"), directory.path())).await;
}

#[test]
fn the_commented_sample_names_every_key() {
    let text = fs::read_to_string(root().join("config/fieldgate.yaml")).unwrap();
    for key in config::keys() {
        let name = key.path.rsplit('.').next().unwrap().trim_end_matches("[]");
        // At the beginning of a line or a flow table, switched on or off.
        let named = text.match_indices(&format!("{name}:")).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            matches!(before, Some(' ' | '#' | '\n' | '{'))
        });
        assert!(named, "config/fieldgate.yaml does not show `{}`", key.path);
    }
}

/// The sample with every key that is switched off switched on.
fn switched_on(text: &str) -> String {
    let line = |line: &str| {
        let indent = line.len() - line.trim_start().len();
        match line.trim_start().strip_prefix('#') {
            // `#key: …`, or a line of a switched-off block; prose has one space, and no key after more of them.
            Some(rest) if !rest.starts_with(' ') => format!("{}{rest}", &line[..indent]),
            Some(rest) if rest.starts_with("  ") && is_yaml(rest.trim_start()) => format!("{}{rest}", &line[..indent]),
            _ => line.to_owned(),
        }
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

fn is_yaml(text: &str) -> bool {
    let word = text.split(' ').next().unwrap();
    word == "-" || word.ends_with(':')
}

#[test]
fn every_key_that_is_switched_off_is_right_when_it_is_switched_on() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config");
    write_secrets(&config);
    fs::write(config.join("metrics.token"), "5f0c1a66f0d9c7d2b1e4\n").unwrap();
    fs::write(config.join("cloud.proxy"), "http://plant-7:secret@proxy.example.com:3128\n").unwrap();
    let hash =
        "$6$Vjtl5b0Kxp9BADwc$z8pp6TbiD34mYhP+tEBVUWKJXQVRjVfHhEH7GYyz1qnTe3n+Z+dnC5MpeVg2R7c7ZjICaRkLaYmBmInOTHqT7Q==";
    fs::write(config.join("mosquitto.passwd"), format!("bob:{hash}\n")).unwrap();
    fs::write(config.join("mosquitto.acl"), "user bob\ntopic read #\n").unwrap();
    copy(&root().join("plugins"), &directory.path().join("plugins"));
    let text = fs::read_to_string(root().join("config/fieldgate.yaml")).unwrap();
    let text = switched_on(&text).replace("durability: commit\n", "durability: interval\n");
    let text = text.replace("connection: always\n", "connection: scheduled\n");
    let path = config.join("fieldgate.yaml");
    fs::write(&path, text).unwrap();
    let loaded = config::load(&path).unwrap_or_else(|reports| panic!("{}", reports.render(Look::Plain)));
    assert!(loaded.warnings.reports.is_empty(), "{}", loaded.warnings.render(Look::Plain));
    let config = loaded.config;
    assert_eq!((config.listeners.len(), config.buses.len(), config.serial.len()), (4, 3, 5));
    assert_eq!(config.upstreams.len(), 2);
    assert_eq!((config.hub.access.users.len(), config.hub.access.rules.len()), (2, 5));
    let password = config.upstreams[0].password.as_ref().unwrap();
    assert_eq!(password.reveal(), "secret");
    assert!(!format!("{config:?}").contains("secret\""), "a secret is printed");
}

/// The certificates, keys and passwords that samples name, beside them.
fn write_secrets(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    let now = UnixMillis(1_795_000_000_000);
    let authority = Authority::open(&directory.join("tls"), now).unwrap();
    authority.ensure("server", Usage::Server, &LOOPBACK_NAMES, now).unwrap();
    authority.ensure("client", Usage::Client, &["client"], now).unwrap();
    fs::write(directory.join("cloud.password"), "secret\n").unwrap();
    fs::write(directory.join("azure.key"), "AAECAwQFBgcICQoLDA0ODw==\n").unwrap();
}

#[tokio::test]
async fn the_recipe_for_each_kind_of_upstream_starts_and_is_in_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let recipes = directory.path().join("upstreams");
    copy(&root().join("config/upstreams"), &recipes);
    write_secrets(&recipes);
    let mut started = 0;
    for entry in fs::read_dir(root().join("config/upstreams")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(readme.contains(&format!("(config/upstreams/{name})")), "{name}");
        starts_and_stops(movable(&recipes.join(&name), &directory.path().join(&name).join("data"))).await;
        started += 1;
    }
    assert_eq!(started, 8);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry: PathBuf = entry.unwrap().path();
        let target = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            copy(&entry, &target);
        } else {
            fs::copy(&entry, &target).unwrap();
        }
    }
}
