//! QoS 1 into an offline persistent session: with us on disk before the acknowledgement, in mosquitto's memory.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{pump, with_metrics};
use crate::brokers::{Broker, Kind, free_port};
use crate::client::{self, Session, Stamp, put_publish};
use crate::process;

pub fn run(fieldgate: &Path, seconds: u64) {
    for (publishers, window) in [(1, 100), (1, 1000), (5, 100), (5, 1000)] {
        let mut base = 0.0;
        for kind in [Kind::Mosquitto, Kind::Fieldgate] {
            let web = free_port();
            let broker = with_metrics(kind, fieldgate, web);
            let web = (kind == Kind::Fieldgate).then_some(web);
            let (rate, text) = measure(&broker, web, publishers, window, seconds);
            if kind == Kind::Mosquitto {
                base = rate;
            }
            println!(
                "{publishers} publishers, window {window}: {:10} {rate:.0} msg/s ×{:.2} {text}",
                kind.name(),
                rate / base
            );
        }
    }
}

fn measure(broker: &Broker, web: Option<u16>, publishers: u32, window: u64, seconds: u64) -> (f64, String) {
    let address = broker.address;
    pump::leave_session(address, "kept", "bench/+").expect("a session");
    let before = web.map(Counters::of);
    let cpu = process::cpu_time(broker.pid());
    let started = Instant::now();
    let end = started + Duration::from_secs(seconds);
    let threads: Vec<_> =
        (0..publishers).map(|number| thread::spawn(move || publish(address, number, window, end))).collect();
    let messages: u64 = threads.into_iter().map(|thread| thread.join().expect("a publisher ends")).sum();
    let took = started.elapsed().as_secs_f64();
    let cpu = (process::cpu_time(broker.pid()) - cpu).as_secs_f64();
    let after = web.map(Counters::of);
    let mut stream = client::attach(address, "kept", Session::Kept).expect("the session is resumed");
    let (received, drained) = pump::receive(&mut stream, messages);
    let mut text = format!(
        "({:.1} µs of processor each; {} lost; drained at {:.0} msg/s)",
        cpu * 1e6 / messages as f64,
        messages - received,
        received as f64 / drained.as_secs_f64()
    );
    if let (Some(before), Some(after)) = (before, after) {
        let commits = after.commits - before.commits;
        text += &format!(
            " {:.0} commits/s of {:.0} messages, {:.0} % of the time in commits, {:.1} bytes written for each byte",
            commits / took,
            messages as f64 / commits,
            (after.commit_seconds - before.commit_seconds) / took * 100.0,
            (after.bytes - before.bytes) / (messages as f64 * 107.0)
        );
    }
    (messages as f64 / took, text)
}

fn publish(address: SocketAddr, number: u32, window: u64, end: Instant) -> u64 {
    let topic = format!("bench/{number}");
    pump::publish(address, &format!("publisher{number}"), window, |out, sequence, id| {
        if sequence % 64 == 0 && Instant::now() >= end {
            return false;
        }
        put_publish(out, &topic, 1, id, 100, Stamp { publisher: number, sequence, sent_nanos: 0 });
        true
    })
}

/// What Fieldgate's metrics say of its store.
struct Counters {
    commits: f64,
    commit_seconds: f64,
    bytes: f64,
}

impl Counters {
    fn of(web: u16) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", web)).expect("the web server listens");
        stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it answers");
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
        };
        Self {
            commits: value("fieldgate_store_commits_total "),
            commit_seconds: value("fieldgate_store_commit_seconds_total "),
            bytes: value("fieldgate_store_written_bytes_total "),
        }
    }
}
