//! A gateway as a process that can be killed and started again on the same port and data.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use crate::PATIENCE;

/// How many of its last lines are shown when something is wrong.
const LINES_KEPT: usize = 60;

pub struct Gateway {
    directory: PathBuf,
    /// The configuration, with `{port}` in place of the port.
    config: String,
    /// What to run the program under, as in `ip netns exec NAME`.
    under: Vec<String>,
    pub port: u16,
    web: Option<u16>,
    child: Option<Child>,
    log: Arc<Mutex<Log>>,
}

/// What the gateway has said, over all its starts.
#[derive(Default)]
struct Log {
    last: VecDeque<String>,
    errors: Vec<String>,
    connections: usize,
}

/// The program to test: that of this build, or what `FIELDGATE` names.
pub fn program() -> PathBuf {
    std::env::var_os("FIELDGATE").map_or_else(|| env!("CARGO_BIN_EXE_fieldgate").into(), PathBuf::from)
}

impl Gateway {
    pub fn start_new(directory: &Path, config: String, under: Vec<String>) -> Self {
        fs::create_dir_all(directory).unwrap();
        let (directory, log) = (directory.to_owned(), Arc::default());
        let mut gateway = Self { directory, config, under, port: 0, web: None, child: None, log };
        gateway.start();
        gateway
    }

    pub fn start(&mut self) {
        let path = self.directory.join("fieldgate.yaml");
        fs::write(&path, self.config.replace("{port}", &self.port.to_string())).unwrap();
        let program = program();
        let (first, rest) = match self.under.split_first() {
            Some((first, rest)) => (first.into(), [rest, &[program.to_string_lossy().into_owned()]].concat()),
            None => (program, Vec::new()),
        };
        let mut child = Command::new(first)
            .args(rest)
            .args(["run", "--config", path.to_str().unwrap()])
            .env_remove("NOTIFY_SOCKET")
            .env_remove("JOURNAL_STREAM")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, ports) = mpsc::channel();
        let (output, log) = (child.stderr.take().unwrap(), self.log.clone());
        let mut file = File::options().append(true).create(true).open(self.directory.join("log")).unwrap();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some(port) = port_in(&line) {
                    let _ = sender.send((line.contains(" serving the web UI "), port));
                }
                let _ = writeln!(file, "{line}");
                log.lock().unwrap().add(line);
            }
        });
        self.child = Some(child);
        let wants_web = self.config.contains("web: { address");
        (self.port, self.web) = (0, None);
        while self.port == 0 || wants_web && self.web.is_none() {
            match ports.recv_timeout(PATIENCE) {
                Ok((true, port)) => self.web = Some(port),
                Ok((false, port)) => self.port = port,
                Err(_) => panic!("does not start:\n{}", self.last_lines()),
            }
        }
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Where its database is.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// How often it has connected to its upstream.
    pub fn connections(&self) -> usize {
        self.log.lock().unwrap().connections
    }

    /// What it has logged as errors so far.
    pub fn errors(&self) -> Vec<String> {
        self.log.lock().unwrap().errors.clone()
    }

    pub fn last_lines(&self) -> String {
        self.log.lock().unwrap().last.iter().map(|line| format!("  {line}\n")).collect()
    }

    /// What the web UI answers, head and body.
    pub fn get(&self, path: &str) -> String {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.web.expect("the web UI is on")));
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    /// The sum of a metric over all its labels that hold `label`.
    pub fn metric(&self, name: &str, label: &str) -> u64 {
        let text = self.get("/metrics");
        let mut values = text.lines().filter(|line| line.starts_with(name) && line.contains(label)).peekable();
        assert!(values.peek().is_some(), "no metric {name} with {label} in:\n{text}");
        values.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Log {
    fn add(&mut self, line: String) {
        self.connections += usize::from(line.contains(" upstream connected "));
        if line.contains(" ERROR ") {
            self.errors.push(line.clone());
        }
        if line.contains(" listener=") {
            // Connections of clients: in the file, and far too many.
            return;
        }
        self.last.push_back(line);
        if self.last.len() > LINES_KEPT {
            self.last.pop_front();
        }
    }
}

/// The port in a line that says where the gateway listens or serves the web UI.
fn port_in(line: &str) -> Option<u16> {
    if !line.contains(" listening ") && !line.contains(" serving the web UI ") {
        return None;
    }
    let (_, rest) = line.split_once("address=")?;
    rest.split(' ').next()?.parse::<SocketAddr>().ok().map(|address| address.port())
}
