//! The program as its users meet it: arguments, exit codes, signals, the demo.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(60);

fn fieldgate(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fieldgate"));
    command.args(arguments).stdin(Stdio::null()).env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM");
    command
}

#[track_caller]
fn check(output: &Output, code: i32, stdout: &str, stderr: &str) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "\nstdout: {out}\nstderr: {err}");
    assert!(out.contains(stdout) && err.contains(stderr), "\nstdout: {out}\nstderr: {err}");
}

/// Writes a configuration that disturbs nobody, with `more` in it.
fn write_config(directory: &Path, more: &str) -> String {
    let path = directory.join("fieldgate.yaml");
    fs::write(&path, format!("store: {{ directory: data }}\nweb: {{ enabled: false }}\n{more}")).unwrap();
    path.to_str().unwrap().to_owned()
}

const ANY_PORT: &str = "listeners: [ { name: local, address: 127.0.0.1:0 } ]\n";

/// A running program whose lines are read as they come.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: String,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let _ = sender.send(line);
                }
            });
        }
        Self { child, lines, seen: String::new() }
    }

    /// Waits for a line that contains `part`.
    fn expect(&mut self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(part) {
                return line;
            }
        }
        panic!("no line with {part:?} in:\n{}", self.seen);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end; the exit code, and how long it took.
    fn end(&mut self) -> (Option<i32>, Duration) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), began.elapsed());
            }
            assert!(began.elapsed() < PATIENCE, "still running; so far:\n{}", self.seen);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn help_teaches_by_examples_and_names_the_exit_codes() {
    let help = fieldgate(&["--help"]).output().unwrap();
    check(&help, 0, "Examples:\n  fieldgate demo", "");
    check(&help, 0, "Exit codes: 0 all is well", "");
    check(&fieldgate(&["--version"]).output().unwrap(), 0, concat!("fieldgate ", env!("CARGO_PKG_VERSION")), "");
}

#[test]
fn wrong_arguments_are_the_users_error() {
    check(&fieldgate(&["demno"]).output().unwrap(), 1, "", "demo");
    check(&fieldgate(&[]).output().unwrap(), 1, "", "Usage:");
    check(&fieldgate(&["keys", "no.such.key"]).output().unwrap(), 1, "", "no key holds `no.such.key`");
}

#[test]
fn check_says_what_a_configuration_runs_or_what_is_wrong_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(directory.path(), ANY_PORT);
    check(&fieldgate(&["check", "--config", &config]).output().unwrap(), 0, "fieldgate.yaml: ok\n", "");
    let config = write_config(directory.path(), "listners: []\nlog: { level: loud }\n");
    let output = fieldgate(&["check", "--config", &config]).output().unwrap();
    check(&output, 1, "", "did you mean `listeners`?");
    check(&output, 1, "", "fieldgate.yaml: 2 errors");
    let output = fieldgate(&["check", "--config", "/nonexistent.yaml"]).output().unwrap();
    check(&output, 1, "", "No such file");
    check(&output, 1, "", "name the configuration with `--config FILE`");
}

#[test]
fn check_takes_several_files_and_finds_the_one_that_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let [right, wrong] = ["right", "wrong"].map(|name| directory.path().join(name).to_str().unwrap().to_owned());
    fs::write(&right, "gateway: { name: right }\n").unwrap();
    fs::write(&wrong, "gatway: { name: wrong }\n").unwrap();
    check(&fieldgate(&["check", &right, &right]).output().unwrap(), 0, "right: ok\n", "");
    for files in [[&right, &wrong], [&wrong, &right]] {
        let output = fieldgate(&["check", files[0], files[1]]).output().unwrap();
        check(&output, 1, "right: ok\n", "wrong: 1 error\n");
    }
}

#[test]
fn keys_explains_a_section() {
    let output = fieldgate(&["keys", "store"]).output().unwrap();
    check(&output, 0, "store.max_size\n    The largest size of the database file", "");
    check(&output, 0, "default 1GiB", "");
}

#[test]
fn keys_are_found_without_the_brackets_of_lists_and_by_a_part() {
    let output = fieldgate(&["keys", "modbus.devices.unit_id"]).output().unwrap();
    check(&output, 0, "modbus[].devices[].unit_id\n", "");
    let output = fieldgate(&["keys", "bridge_max_packet_size"]).output().unwrap();
    check(&output, 0, "upstreams[].bridge_max_packet_size\n", "");
}

#[test]
fn a_record_that_is_not_there_is_the_users_error() {
    check(&fieldgate(&["prove", "/no/such/record"]).output().unwrap(), 1, "", "/no/such/record cannot be read");
}

#[test]
fn passwd_makes_an_entry_that_check_takes() {
    let directory = tempfile::tempdir().unwrap();
    let passwd = |arguments: &[&str], input: &str| {
        let mut command = fieldgate(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let output = passwd(&["passwd", "operator"], "correct horse\n");
    check(&output, 0, "- { name: operator, password_hash: \"$argon2id$", "");
    let config = write_config(directory.path(), &(ANY_PORT.to_owned() + &String::from_utf8(output.stdout).unwrap()));
    check(&fieldgate(&["check", "-c", &config]).output().unwrap(), 0, "1 user", "");

    let file = directory.path().join("hash");
    check(&passwd(&["passwd", "x", "--file", file.to_str().unwrap()], "secret\n"), 0, "file:", "");
    assert!(fs::read_to_string(&file).unwrap().starts_with("$argon2id$"));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    check(&passwd(&["passwd", "x"], "\n"), 1, "", "the password is empty");
}

#[test]
fn a_port_that_is_taken_is_the_systems_error() {
    let directory = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let config = write_config(directory.path(), &format!("listeners: [ {{ name: local, address: {address} }} ]\n"));
    let output = fieldgate(&["run", "--config", &config]).output().unwrap();
    check(&output, 2, "", "another program has the address");
    check(&output, 2, "", &address.to_string());
}

#[test]
fn a_database_that_cannot_be_made_is_the_systems_error() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("data"), "a file where a directory should be").unwrap();
    let config = write_config(directory.path(), ANY_PORT);
    check(&fieldgate(&["run", "--config", &config]).output().unwrap(), 2, "", "data");
}

#[test]
fn run_reloads_on_sighup_and_drains_on_sigterm() {
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(directory.path(), ANY_PORT);
    let mut gateway = Running::start(fieldgate(&["run", "--config", &config]));
    gateway.expect("running");
    write_config(directory.path(), &format!("{ANY_PORT}mqttsn: {{ address: 127.0.0.1:0 }}\n"));
    gateway.signal(Signal::HUP);
    gateway.expect("MQTT-SN gateway on 127.0.0.1:0 started");
    write_config(directory.path(), "listners: []\n");
    gateway.signal(Signal::HUP);
    gateway.expect("unknown key `listners` here");
    gateway.expect("nothing was changed");
    let upstream = "{ name: c, url: mqtt://127.0.0.1:1, username: u, password: file:gone, out: [{ filter: a }] }";
    write_config(directory.path(), &format!("{ANY_PORT}upstreams: [{upstream}]\n"));
    gateway.signal(Signal::HUP);
    let problem = gateway.expect("`password` cannot be read");
    assert!(problem.contains("gone: No such file"), "{problem}");
    gateway.signal(Signal::TERM);
    let (code, took) = gateway.end();
    assert_eq!(code, Some(0), "{}", gateway.seen);
    assert!(took < Duration::from_secs(5), "took {took:?}");
}

#[test]
fn changed_users_and_rules_count_without_a_signal_and_nothing_else_changes() {
    let directory = tempfile::tempdir().unwrap();
    let hash =
        "$6$Vjtl5b0Kxp9BADwc$z8pp6TbiD34mYhP+tEBVUWKJXQVRjVfHhEH7GYyz1qnTe3n+Z+dnC5MpeVg2R7c7ZjICaRkLaYmBmInOTHqT7Q==";
    let (passwords, rules) = (directory.path().join("passwd"), directory.path().join("acl"));
    fs::write(&passwords, format!("ann:{hash}\n")).unwrap();
    fs::write(&rules, "topic read a\n").unwrap();
    let files = format!("{ANY_PORT}password_file: passwd\nacl_file: acl\n");
    let config = write_config(directory.path(), &files);
    let mut gateway = Running::start(fieldgate(&["run", "--config", &config]));
    gateway.expect("running");
    fs::write(&passwords, format!("ann:{hash}\nbob:{hash}\n")).unwrap();
    gateway.expect("users and rules taken over");
    fs::write(&rules, "topic nonsense a\n").unwrap();
    gateway.expect("nothing was changed");
    fs::write(&rules, "topic read b\n").unwrap();
    gateway.expect("users and rules taken over");
    gateway.expect("the configuration is right again");
    // What else has changed waits for somebody to ask.
    write_config(directory.path(), &format!("{files}allow_anonymous: never\nmqttsn: {{ address: 127.0.0.1:0 }}\n"));
    gateway.expect("users and rules taken over");
    assert!(!gateway.seen.contains("MQTT-SN gateway"), "{}", gateway.seen);
    gateway.signal(Signal::HUP);
    gateway.expect("MQTT-SN gateway on 127.0.0.1:0 started");
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.end().0, Some(0));
}

#[test]
fn json_logs_are_one_object_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(directory.path(), &format!("{ANY_PORT}log: {{ format: json }}\n"));
    let mut gateway = Running::start(fieldgate(&["run", "--config", &config]));
    let line: serde_json::Value = serde_json::from_str(&gateway.expect("\"running\"")).unwrap();
    assert_eq!(line["level"], "info");
    gateway.signal(Signal::INT);
    assert_eq!(gateway.end().0, Some(0));
}

#[test]
fn the_demo_shows_its_first_values_and_stops_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("demo");
    let mut demo = Running::start(fieldgate(&["demo", "--any-ports", "--directory", path.to_str().unwrap()]));
    demo.expect("http://127.0.0.1:");
    demo.expect("First value: devices/meter/power");
    demo.expect("First value in the cloud: demo/devices/meter/power");
    assert!(path.join("fieldgate.yaml").exists() && path.join("data/fieldgate.db").exists());
    let check_written = fieldgate(&["check", "--config", path.join("fieldgate.yaml").to_str().unwrap()]).output();
    check(&check_written.unwrap(), 0, "ok", "");
    demo.signal(Signal::INT);
    let (code, took) = demo.end();
    assert_eq!(code, Some(0), "{}", demo.seen);
    // 2 s on a machine that has nothing else to do.
    assert!(took < Duration::from_secs(5), "took {took:?}");
}

#[test]
fn the_demo_says_when_a_port_is_taken_and_takes_another() {
    let directory = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let path = directory.path().to_str().unwrap();
    let mut demo = Running::start(fieldgate(&["demo", "--directory", path, "--web-port", &port]));
    demo.expect(&format!("Port {port} is taken, so the web UI is on"));
    demo.expect("http://127.0.0.1:");
    demo.signal(Signal::TERM);
    assert_eq!(demo.end().0, Some(0), "{}", demo.seen);
}

#[test]
fn store_shows_and_verifies_what_a_gateway_left() {
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(
        directory.path(),
        &format!("{ANY_PORT}upstreams: [ {{ name: cloud, url: mqtt://127.0.0.1:9, out: [ {{ filter: 'a/#' }} ] }} ]\n"),
    );
    let store =
        |arguments: &[&str]| fieldgate(&[&["store", "--config", &config], arguments].concat()).output().unwrap();
    check(&store(&["show"]), 1, "", "there is no database");
    let mut gateway = Running::start(fieldgate(&["run", "--config", &config]));
    gateway.expect("running");
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.end().0, Some(0));
    check(&store(&["show"]), 0, "cloud", "");
    check(&store(&["show"]), 0, "a/#", "");
    check(&store(&["show"]), 0, "1 session, 0 retained messages; the database has", "");
    check(&store(&["verify"]), 0, "whole: 1 session, 0 messages", "");
    check(&store(&["export", "cloud"]), 0, "", "0 messages exported, 0 unreadable");
    check(&store(&["export", "nobody"]), 1, "", "no session of the client \"nobody\"");
    check(&store(&["purge", "nobody"]), 1, "", "no session of the client \"nobody\"");
    check(&store(&["purge", "--all"]), 0, "0 messages deleted", "");
    // What is no database of ours is not touched, and is called what it is.
    let text = directory.path().join("notes.txt");
    fs::write(&text, "not a database, and longer than the header that one has: ".repeat(20)).unwrap();
    let text = text.to_str().unwrap();
    check(&store(&["show", "-d", text]), 2, "", "is not a database of this program");
    check(&store(&["purge", "--all", "-d", text]), 1, "", "notes.txt is a file; give the directory of the store");
}
