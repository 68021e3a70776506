//! Store-and-forward beside mosquitto's bridge, in one run: intake while the uplink is down, the drain, the way back,
//! latency while all is well, start-up with a large queue.
//!
//! Mosquitto has its best case: persistence is off, its queue is unbounded and in memory. The same upstreams for both: the
//! [`sink`], which does nothing but acknowledge, and real brokers as they are installed; and what each of these takes
//! from somebody whom messages cost nothing, within the same window, beside which a bridge's rate has its meaning.

mod flash;
mod gateway;
mod limit;
mod measure;
mod report;
mod sink;

use std::path::Path;

use crate::brokers::Kind;
pub use flash::run as flash;
use gateway::{BRIDGES, Bridge, Line, Protocol};
use limit::LARGEST_WINDOW;
use measure::{Forwarding, Outage, Upstream, millis};
use report::{Column, Report};

/// What is queued at start-up, in MiB.
const LARGE_QUEUE_MIB: u64 = 1024;

/// A drain: into whom, and how.
struct Load {
    upstream: Upstream,
    line: Line,
}

const MOSQUITTO: Upstream = Upstream::Broker(Kind::Mosquitto);
const FIELDGATE: Upstream = Upstream::Broker(Kind::Fieldgate);

const LOADS: [Load; 7] = [
    load(Upstream::Sink, Protocol::V5, 1, LARGEST_WINDOW),
    load(Upstream::Sink, Protocol::V5, 2, LARGEST_WINDOW),
    load(Upstream::Sink, Protocol::V5, 0, LARGEST_WINDOW),
    load(MOSQUITTO, Protocol::V5, 1, 20),
    load(MOSQUITTO, Protocol::V3_1_1, 1, LARGEST_WINDOW),
    load(FIELDGATE, Protocol::V5, 1, 1024),
    load(FIELDGATE, Protocol::V3_1_1, 1, LARGEST_WINDOW),
];

const fn load(upstream: Upstream, protocol: Protocol, qos: u8, window: u64) -> Load {
    Load { upstream, line: Line { protocol, qos, window } }
}

impl Load {
    /// The one whose intake and costs are shown too.
    fn is_main(&self) -> bool {
        matches!((self.upstream, self.line.qos), (Upstream::Sink, 1))
    }

    fn bridges(&self) -> &'static [Bridge] {
        match self.line.qos {
            // Mosquitto does not lower the QoS for a peer that wants it lower.
            0 => &[Bridge::Commit],
            _ if self.is_main() => &BRIDGES,
            _ => &[Bridge::Mosquitto, Bridge::Commit],
        }
    }

    fn messages(&self, messages: u64) -> u64 {
        match self.line.qos {
            _ if self.is_main() => messages,
            // Mosquitto's bridge takes the square of their number in time.
            2 => messages / 20,
            _ => messages / 2,
        }
    }

    /// The row of its rates.
    fn name(&self) -> String {
        let Line { protocol, qos, window } = self.line;
        let window = if window == LARGEST_WINDOW { "no window".into() } else { format!("window {window}") };
        format!("drain into {}, QoS {qos}, MQTT {}, {window}, msg/s", self.upstream.name(), protocol.name())
    }
}

/// Everything, `rounds` times, alternating; then the medians as a table for the README.
pub fn run(fieldgate: &Path, messages: u64, rounds: usize) {
    let mut report = Report::default();
    for _ in 0..rounds {
        for load in &LOADS {
            let messages = load.messages(messages);
            if load.line.qos == 1 {
                let limit = measure::limit_of(load.upstream, fieldgate, load.line.window, messages);
                println!("{}: {limit:.0} is what it takes", load.name());
                report.add(&load.name(), Column::Limit, limit);
            }
            for &bridge in load.bridges() {
                let outage = measure::outage(bridge, fieldgate, load.upstream, load.line, messages);
                println!("{outage}");
                add_outage(&mut report, load, &outage);
            }
        }
        for bridge in [Bridge::Mosquitto, Bridge::Commit] {
            let forwarding = measure::forwarding(bridge, fieldgate, 1000, 10);
            println!("{forwarding}");
            add_forwarding(&mut report, &forwarding);
        }
    }
    let started = start_up(fieldgate, LARGE_QUEUE_MIB);
    report.add("start-up, killed with 1 GiB queued, cold cache, ms", Column::Of(Bridge::Commit), started);
    println!("\n{report}");
}

fn add_outage(report: &mut Report, load: &Load, outage: &Outage) {
    let mut add = |name: &str, value: f64| report.add(name, Column::Of(outage.bridge), value);
    if load.is_main() {
        add("intake, uplink down, QoS 1, msg/s", outage.taken_per_second);
        add("fsyncs a second meanwhile", outage.fsyncs_per_second);
        add("bytes to disk for each byte of message and topic", outage.disk_bytes / outage.message_bytes);
    }
    add(&load.name(), outage.drained_per_second);
    if load.is_main() {
        add("processor time for it, µs a message", outage.drain_cpu_micros);
        add("memory it takes more, MiB", outage.rss_growth_mib);
        add("from the peer's accept to the first message, ms", outage.first_after_millis);
    }
}

fn add_forwarding(report: &mut Report, forwarding: &Forwarding) {
    let Forwarding { bridge, latency, disk_bytes, .. } = forwarding;
    let mut add = |name: &str, value: f64| report.add(name, Column::Of(*bridge), value);
    add("forwarding 1,000/s at QoS 1: p50, ms", millis(latency.p50));
    add("p99, ms", millis(latency.p99));
    add("bytes to disk in these 10 s", *disk_bytes as f64);
}

/// One outage, for profiling.
pub fn outage(fieldgate: &Path, bridge: &str, upstream: &str, line: (&str, u8, u64), messages: u64) {
    let bridge = match bridge {
        "mosquitto" => Bridge::Mosquitto,
        "commit" => Bridge::Commit,
        _ => Bridge::Interval,
    };
    let (protocol, qos, window) = line;
    let protocol = if protocol == Protocol::V3_1_1.name() { Protocol::V3_1_1 } else { Protocol::V5 };
    let line = Line { protocol, qos, window };
    println!("{}", measure::outage(bridge, fieldgate, upstream_of(upstream), line, messages));
}

/// How fast an upstream takes messages from somebody whom they cost nothing.
pub fn limit(fieldgate: &Path, upstream: &str, window: u64, messages: u64) {
    println!("{:.0} msg/s", measure::limit_of(upstream_of(upstream), fieldgate, window, messages));
}

fn upstream_of(name: &str) -> Upstream {
    match name {
        "mosquitto" => MOSQUITTO,
        "fieldgate" => FIELDGATE,
        _ => Upstream::Sink,
    }
}

/// Latency while the uplink keeps up.
pub fn forwarding(fieldgate: &Path) {
    for bridge in [Bridge::Mosquitto, Bridge::Commit] {
        println!("{}", measure::forwarding(bridge, fieldgate, 1000, 10));
    }
}

/// Start-up with a queue of `mebibytes`, in milliseconds.
pub fn start_up(fieldgate: &Path, mebibytes: u64) -> f64 {
    let (queued, took) = measure::start_up(fieldgate, mebibytes << 20);
    println!("start-up with a database of {queued} MiB, after a crash and with a cold cache: {:.0} ms", millis(took));
    millis(took)
}
