//! The measurements.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::gateway::{Bridge, Gateway, Line};
use super::limit;
use super::sink::Sink;
use crate::brokers::{Broker, Kind, free_port, mosquitto_basics};
use crate::client::{self, Frames, PUBLISH};
use crate::load::{self, Latency, Load, Trickle};
use crate::process;

/// Clients that fill the queue, and what each leaves unacknowledged: as many devices as make large batches.
const PUBLISHERS: u32 = 16;
const WINDOW: u64 = 1000;
/// Bytes of each message.
pub const PAYLOAD: usize = 100;
/// The topics that frame what is drained into a broker, where only these are subscribed to.
const MARKS: &str = "mark/+";
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
pub enum Upstream {
    Sink,
    Broker(Kind),
}

impl Upstream {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sink => "sink",
            Self::Broker(kind) => kind.name(),
        }
    }
}

/// The uplink is down, messages come; then it returns.
pub struct Outage {
    pub bridge: Bridge,
    pub upstream: Upstream,
    line: Line,
    /// Payload and topic, in bytes.
    pub message_bytes: f64,
    pub taken_per_second: f64,
    pub fsyncs_per_second: f64,
    /// For each message.
    pub disk_bytes: f64,
    pub intake_cpu_micros: f64,
    pub drained_per_second: f64,
    pub drain_cpu_micros: f64,
    pub drain_disk_bytes: f64,
    /// The peak during the drain above what was there when it began.
    pub rss_growth_mib: f64,
    /// From the peer's accept to the first message; a real broker does not tell when it accepted: from when it could.
    pub first_after_millis: f64,
    trouble: String,
}

/// At QoS 0, messages are kept as at QoS 1 and the upstream takes no more than QoS 0.
pub fn outage(bridge: Bridge, fieldgate: &Path, upstream: Upstream, line: Line, messages: u64) -> Outage {
    let qos = line.qos;
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let gateway = Gateway::start(bridge, fieldgate, address, line);
    let pid = gateway.broker.pid();
    let messages = messages / u64::from(PUBLISHERS) * u64::from(PUBLISHERS);
    let each = |sum: f64| sum / messages as f64;

    mark(gateway.broker.address, "first");
    let (counters, disk, cpu) = (gateway.counters(), process::disk_bytes(pid), process::cpu_time(pid));
    let started = Instant::now();
    fill(gateway.broker.address, qos.max(1), messages, PAYLOAD);
    let intake = started.elapsed().as_secs_f64();
    let fsyncs = gateway.counters().syncs - counters.syncs;
    let intake_cpu = process::cpu_time(pid) - cpu;
    let disk_bytes = process::disk_bytes(pid) - disk;
    mark(gateway.broker.address, "last");

    // Let what the intake left to be done be done.
    thread::sleep(Duration::from_secs(1));
    let (disk, cpu) = (process::disk_bytes(pid), process::cpu_time(pid));
    process::forget_peak(pid);
    let rss = process::rss_kib(pid);
    let drain = match upstream {
        Upstream::Sink => into_sink(&gateway, address, messages, qos),
        Upstream::Broker(kind) => into_broker(&gateway, kind, fieldgate, address),
    };
    Outage {
        bridge,
        upstream,
        line,
        message_bytes: (PAYLOAD + "bench/00".len()) as f64,
        taken_per_second: messages as f64 / intake,
        fsyncs_per_second: fsyncs as f64 / intake,
        disk_bytes: each(disk_bytes as f64),
        intake_cpu_micros: each(intake_cpu.as_secs_f64() * 1e6),
        drained_per_second: messages as f64 / drain.took.as_secs_f64(),
        drain_cpu_micros: each((process::cpu_time(pid) - cpu).as_secs_f64() * 1e6),
        drain_disk_bytes: each((process::disk_bytes(pid) - disk) as f64),
        rss_growth_mib: (process::peak_rss_kib(pid) - rss) as f64 / 1024.0,
        first_after_millis: millis(drain.first_after),
        trouble: drain.trouble,
    }
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bridge, upstream, line: Line { protocol, qos, .. }, trouble, .. } = self;
        write!(
            f,
            "{:21} → {:9} in {:5} QoS {qos}: intake {:7.0} msg/s, {:4.1} µs/msg, {:4.0} fsyncs/s, {:4.0} B/msg to disk | \
             drain {:7.0} msg/s, {:4.1} µs/msg, {:4.0} B/msg to disk, {:+.1} MiB, first after {:.0} ms{trouble}",
            bridge.name(),
            upstream.name(),
            protocol.name(),
            self.taken_per_second,
            self.intake_cpu_micros,
            self.fsyncs_per_second,
            self.disk_bytes,
            self.drained_per_second,
            self.drain_cpu_micros,
            self.drain_disk_bytes,
            self.rss_growth_mib,
            self.first_after_millis,
        )
    }
}

struct Drain {
    first_after: Duration,
    took: Duration,
    trouble: String,
}

fn into_sink(gateway: &Gateway, address: SocketAddr, messages: u64, qos: u8) -> Drain {
    let sink = Sink::listen(address, qos, Instant::now());
    gateway.connect();
    // With the two marks, which have a publisher of their own.
    let seen = sink.wait(messages + 2, PATIENCE);
    let (Some(accepted), Some(first), Some(last)) = (seen.accepted_at, seen.first_at, seen.last_at) else {
        panic!("nothing came over the bridge");
    };
    let missing = (messages + 2).saturating_sub(seen.messages);
    let mut trouble = String::new();
    if missing + seen.reordered + seen.skipped > 0 {
        trouble = format!("; {missing} LOST, {} repeated or out of order, {} skipped", seen.reordered, seen.skipped);
    }
    Drain { first_after: first - accepted, took: last - first, trouble }
}

fn into_broker(gateway: &Gateway, kind: Kind, fieldgate: &Path, address: SocketAddr) -> Drain {
    // Mosquitto's bridge connects by itself: not before somebody here can see what it sends.
    gateway.broker.freeze();
    let upstream = start_upstream(kind, fieldgate, address.port());
    let mut watcher = client::connect(upstream.address, "watcher").expect("a watcher connects");
    watcher.set_read_timeout(Some(PATIENCE)).expect("a socket");
    client::subscribe(&mut watcher, MARKS, 0).expect("a watcher subscribes");
    let started = Instant::now();
    gateway.broker.thaw();
    gateway.connect();
    let (mut frames, mut marks) = (Frames::default(), Vec::new());
    while marks.len() < 2 {
        let now_seen = &mut marks;
        let read = frames.read(&mut watcher, |frame| {
            if frame.kind == PUBLISH {
                now_seen.push(Instant::now());
            }
        });
        assert!(read.expect("both marks come") > 0, "the upstream closed the watcher");
    }
    Drain { first_after: marks[0] - started, took: marks[1] - marks[0], trouble: String::new() }
}

/// A broker as it is installed.
fn start_upstream(kind: Kind, fieldgate: &Path, port: u16) -> Broker {
    Broker::start_at(kind, fieldgate, port, |port, data| match kind {
        Kind::Fieldgate => format!(
            "gateway: {{ name: upstream }}\nlog: {{ level: warn }}\nstore: {{ directory: \"{}\" }}\n\
             web: {{ enabled: false }}\nlisteners: [ {{ name: bench, address: \"127.0.0.1:{port}\" }} ]\n",
            data.display()
        ),
        _ => mosquitto_basics(port),
    })
}

fn mark(address: SocketAddr, which: &str) {
    // A publisher of its own: it begins to count anew.
    let publisher = if which == "first" { u32::MAX } else { u32::MAX - 1 };
    load::publish_to(address, publisher, &format!("mark/{which}"), Load::new(1, 1, 0, 1));
}

/// Publishes so many, from many clients.
pub fn fill(address: SocketAddr, qos: u8, messages: u64, payload: usize) {
    let messages = messages / u64::from(PUBLISHERS);
    let load = Load { window: WINDOW, payload, ..Load::new(qos, PUBLISHERS, 0, messages) };
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|number| {
            let topic = format!("bench/{number}");
            thread::spawn(move || load::publish_to(address, number, &topic, load))
        })
        .collect();
    publishers.into_iter().for_each(|publisher| publisher.join().expect("a publisher ends"));
}

/// The uplink is up and keeps up.
pub struct Forwarding {
    pub bridge: Bridge,
    rate: u64,
    pub latency: Latency,
    pub disk_bytes: u64,
    missing: u64,
}

/// QoS 1 from a publisher through the broker and its bridge to the sink.
pub fn forwarding(bridge: Bridge, fieldgate: &Path, rate: u64, seconds: u64) -> Forwarding {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let base = Instant::now();
    let sink = Sink::listen(address, 2, base);
    let gateway = Gateway::start(bridge, fieldgate, address, Line::LIVE);
    gateway.connect();
    mark(gateway.broker.address, "first");
    sink.wait(1, PATIENCE);
    // The session, the first topic: what is written once is not what is measured.
    thread::sleep(Duration::from_secs(2));
    let disk = process::disk_bytes(gateway.broker.pid());
    let trickle = Trickle::new(rate, seconds);
    load::publish_at_rate(gateway.broker.address, trickle, base);
    let messages = trickle.messages();
    let mut seen = sink.wait(messages + 1, Duration::from_secs(5));
    thread::sleep(Duration::from_secs(1));
    Forwarding {
        bridge,
        rate,
        latency: Latency::of(&mut seen.latencies),
        disk_bytes: process::disk_bytes(gateway.broker.pid()) - disk,
        missing: (messages + 1).saturating_sub(seen.messages),
    }
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bridge, rate, latency, disk_bytes, missing } = self;
        let name = bridge.name();
        write!(f, "{name:22} forwarding at {rate}/s: {latency}; {disk_bytes} bytes written")?;
        if *missing > 0 { write!(f, "; {missing} LOST") } else { Ok(()) }
    }
}

/// How large the database was, in MiB, and how long the gateway took from its start until it listened, after it was
/// killed and with nothing of its database in the file cache.
pub fn start_up(fieldgate: &Path, bytes: u64) -> (u64, Duration) {
    const STEP_MESSAGES: u64 = 200_000;
    const LARGER_PAYLOAD: usize = 400;
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let mut gateway = Gateway::start(Bridge::Commit, fieldgate, address, Line::LIVE);
    let database = gateway.broker.directory.join("data/fieldgate.db");
    let size = || fs::metadata(&database).map_or(0, |metadata| metadata.len());
    while size() < bytes {
        fill(gateway.broker.address, 1, STEP_MESSAGES, LARGER_PAYLOAD);
    }
    let took = gateway.broker.restart(|directory| {
        for entry in fs::read_dir(directory.join("data")).expect("the store's directory") {
            let file = fs::File::open(entry.expect("an entry").path()).expect("a file of the store");
            file.sync_all().expect("a disk");
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice is taken");
        }
    });
    (size() >> 20, took)
}

/// How many messages a second `upstream` takes, of which no more than `window` are unacknowledged.
pub fn limit_of(upstream: Upstream, fieldgate: &Path, window: u64, messages: u64) -> f64 {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    match upstream {
        Upstream::Sink => {
            let _sink = Sink::listen(address, 2, Instant::now());
            limit::messages_per_second(address, window, messages)
        }
        Upstream::Broker(kind) => {
            let broker = start_upstream(kind, fieldgate, address.port());
            limit::messages_per_second(broker.address, window, messages)
        }
    }
}

pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
