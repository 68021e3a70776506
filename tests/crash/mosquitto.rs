//! A real mosquitto as the upstream. It runs from the beginning to the end.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::PATIENCE;

pub struct Mosquitto {
    log: PathBuf,
    pub port: u16,
    child: Child,
}

impl Mosquitto {
    pub fn start(directory: &Path, host: Ipv4Addr) -> Self {
        fs::create_dir_all(directory).unwrap();
        // Mosquitto does not say which port it took.
        let port = TcpListener::bind((host, 0)).unwrap().local_addr().unwrap().port();
        let (config, log) = (directory.join("mosquitto.conf"), directory.join("log"));
        let text = format!(
            "user root\nlistener {port} {host}\nallow_anonymous true\nset_tcp_nodelay true\n\
             max_queued_messages 0\nmax_inflight_messages 0\n"
        );
        fs::write(&config, text).unwrap();
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
        let output = File::create(&log).unwrap();
        let child = Command::new("mosquitto")
            .env("PATH", path)
            .arg("-c")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn();
        let mosquitto = Self { log, port, child: child.expect("mosquitto is installed (apt install mosquitto)") };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect((host, port)).is_err() {
            assert!(Instant::now() < deadline, "mosquitto does not start:\n{}", mosquitto.last_lines());
            thread::sleep(Duration::from_millis(10));
        }
        mosquitto
    }

    pub fn last_lines(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
