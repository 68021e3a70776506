//! Store-and-forward beside mosquitto's bridge, in one run: intake while the uplink is down, the drain, the way back,
//! latency while all is well, start-up with a large queue.
//!
//! Mosquitto has its best case: persistence is off, its queue is unbounded and in memory, its window is ours. The same
//! upstreams for both: the [`sink`], which does nothing but acknowledge, and real brokers.

mod flash;
mod gateway;
mod measure;
mod report;
mod sink;

use std::path::Path;

use crate::brokers::Kind;
pub use flash::run as flash;
use gateway::{BRIDGES, Bridge};
use measure::{Forwarding, Outage, Upstream, millis};
use report::Report;

/// What is queued at start-up, in MiB.
const LARGE_QUEUE_MIB: u64 = 1024;

/// Everything, `rounds` times, alternating; then the medians as a table for the README.
pub fn run(fieldgate: &Path, messages: u64, rounds: usize) {
    let mut report = Report::default();
    let sink_limit = measure::sink_limit(messages);
    println!("the sink takes {sink_limit:.0} msg/s from a publisher");
    let loads = [
        (Upstream::Sink, 1, &BRIDGES[..]),
        (Upstream::Sink, 2, &[Bridge::Mosquitto, Bridge::Commit]),
        // Mosquitto does not lower the QoS for a peer that wants it lower.
        (Upstream::Sink, 0, &[Bridge::Commit]),
        (Upstream::Broker(Kind::Mosquitto), 1, &[Bridge::Mosquitto, Bridge::Commit]),
        (Upstream::Broker(Kind::Fieldgate), 1, &[Bridge::Mosquitto, Bridge::Commit]),
    ];
    for _ in 0..rounds {
        for (upstream, qos, bridges) in loads {
            let main = matches!((upstream, qos), (Upstream::Sink, 1));
            let messages = match qos {
                _ if main => messages,
                // Mosquitto's bridge takes the square of their number in time.
                2 => messages / 20,
                _ => messages / 2,
            };
            for &bridge in bridges {
                let outage = measure::outage(bridge, fieldgate, upstream, qos, messages);
                println!("{outage}");
                add_outage(&mut report, &outage, main);
            }
        }
        for bridge in [Bridge::Mosquitto, Bridge::Commit] {
            let forwarding = measure::forwarding(bridge, fieldgate, 1000, 10);
            println!("{forwarding}");
            add_forwarding(&mut report, &forwarding);
        }
    }
    let started = start_up(fieldgate, LARGE_QUEUE_MIB);
    report.add("start-up, killed with 1 GiB queued, cold cache, ms", Bridge::Commit, started);
    println!("\n{report}");
}

fn add_outage(report: &mut Report, outage: &Outage, main: bool) {
    let Outage { bridge, upstream, qos, .. } = *outage;
    let mut add = |name: &str, value: f64| report.add(name, bridge, value);
    if main {
        add("intake, uplink down, QoS 1, msg/s", outage.taken_per_second);
        add("fsyncs a second meanwhile", outage.fsyncs_per_second);
        add("bytes to disk for each byte of message and topic", outage.disk_bytes / outage.message_bytes);
    }
    add(&format!("drain into {} at QoS {qos}, msg/s", upstream.name()), outage.drained_per_second);
    if main {
        add("processor time for it, µs a message", outage.drain_cpu_micros);
        add("memory it takes more, MiB", outage.rss_growth_mib);
        add("from the peer's accept to the first message, ms", outage.first_after_millis);
    }
}

fn add_forwarding(report: &mut Report, forwarding: &Forwarding) {
    let Forwarding { bridge, latency, disk_bytes, .. } = forwarding;
    let mut add = |name: &str, value: f64| report.add(name, *bridge, value);
    add("forwarding 1,000/s at QoS 1: p50, ms", millis(latency.p50));
    add("p99, ms", millis(latency.p99));
    add("bytes to disk in these 10 s", *disk_bytes as f64);
}

/// One outage, for profiling.
pub fn outage(fieldgate: &Path, bridge: &str, upstream: &str, qos: u8, messages: u64) {
    let bridge = match bridge {
        "mosquitto" => Bridge::Mosquitto,
        "commit" => Bridge::Commit,
        _ => Bridge::Interval,
    };
    let upstream = match upstream {
        "mosquitto" => Upstream::Broker(Kind::Mosquitto),
        "fieldgate" => Upstream::Broker(Kind::Fieldgate),
        _ => Upstream::Sink,
    };
    println!("{}", measure::outage(bridge, fieldgate, upstream, qos, messages));
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
