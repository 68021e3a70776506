//! The table: every load against every broker, alternating, the median of the rounds, as ratios to mosquitto.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use crate::brokers::{ALL, Broker, Kind};
use crate::load::{self, Load};
use crate::{process, scale};

/// Everything, in an order that leaves the longest for the end. `seconds` is for each load of each broker.
pub fn run(fieldgate: &Path, rounds: usize, seconds: u64) {
    rates(fieldgate, rounds, seconds);
    latencies(fieldgate, rounds, 2 * seconds);
    memory(fieldgate);
    scale::tls(fieldgate, 3000);
    scale::subscriptions(fieldgate, seconds);
    scale::durable(fieldgate, seconds);
    scale::restart(fieldgate, 1_000_000);
    scale::retained(fieldgate, 1_000_000);
}

/// One to one, fan-in and fan-out.
pub fn rates(fieldgate: &Path, rounds: usize, seconds: u64) {
    for (name, publishers, subscribers) in [("1→1", 1, 1), ("5→1", 5, 1), ("1→50", 1, 50)] {
        for qos in 0..3 {
            let load = Load::lasting(qos, publishers, subscribers, Duration::from_secs(seconds));
            rate(&format!("{name} QoS {qos}"), load, fieldgate, rounds);
        }
    }
    // Mosquitto 2.0.11 acknowledges QoS 2 faster than one subscriber takes it, and then looks for each PUBREC in the
    // list of what the subscriber has not completed, which grows with the run: 76 % of its time. Here no list grows.
    let load = Load { paced: true, ..Load::lasting(2, 5, 1, Duration::from_secs(seconds)) };
    rate("5→1 QoS 2, paced", load, fieldgate, rounds);
}

fn rate(name: &str, load: Load, fieldgate: &Path, rounds: usize) {
    let mut row = Row::new(name, "msg/s");
    for _ in 0..rounds {
        for kind in ALL {
            let broker = Broker::start(kind, fieldgate);
            let result = load::throughput(broker.address, load);
            row.add(kind, result.received_per_second);
            *row.trouble.entry(kind.name()).or_default() += result.lost + result.reordered;
        }
    }
    row.print();
}

pub fn latencies(fieldgate: &Path, rounds: usize, seconds: u64) {
    for rate in [1000, 5000] {
        let mut p50 = Row::new(&format!("QoS 1 at {rate}/s p50"), "µs");
        let mut p99 = Row::new(&format!("QoS 1 at {rate}/s p99"), "µs");
        for _ in 0..rounds {
            for kind in ALL {
                let broker = Broker::start(kind, fieldgate);
                let latency = load::latency(broker.address, rate, seconds);
                p50.add(kind, latency.p50.as_nanos() as f64 / 1000.0);
                p99.add(kind, latency.p99.as_nanos() as f64 / 1000.0);
            }
        }
        p50.print();
        p99.print();
    }
}

pub fn memory(fieldgate: &Path) {
    let mut start = Row::new("RSS at start", "KiB");
    let mut loaded = Row::new("RSS after load", "KiB");
    let mut idle = Row::new("per idle connection", "KiB");
    for kind in ALL {
        let broker = Broker::start(kind, fieldgate);
        start.add(kind, process::rss_kib(broker.pid()) as f64);
        for qos in 0..3 {
            load::throughput(broker.address, Load::new(qos, 5, 1, 40_000));
        }
        loaded.add(kind, process::rss_kib(broker.pid()) as f64);
        drop(broker);
        let broker = Broker::start(kind, fieldgate);
        idle.add(kind, load::idle(broker.address, 10_000, broker.pid()));
    }
    for row in [start, loaded, idle] {
        row.print();
    }
}

struct Row {
    name: String,
    values: HashMap<&'static str, Vec<f64>>,
    trouble: HashMap<&'static str, u64>,
    unit: &'static str,
}

impl Row {
    fn new(name: &str, unit: &'static str) -> Self {
        Self { name: name.into(), values: HashMap::new(), trouble: HashMap::new(), unit }
    }

    fn add(&mut self, kind: Kind, value: f64) {
        self.values.entry(kind.name()).or_default().push(value);
    }

    fn median(&self, kind: Kind) -> f64 {
        median(&self.values[kind.name()])
    }

    fn print(&self) {
        let base = self.median(Kind::Mosquitto);
        let mut line = format!("{:24}", self.name);
        for kind in ALL {
            let value = self.median(kind);
            let trouble = self.trouble.get(kind.name()).copied().unwrap_or(0);
            let trouble = if trouble > 0 { format!(" ({trouble} lost or reordered)") } else { String::new() };
            line += &format!("  {} {value:.1} {} ×{:.2}{trouble}", kind.name(), self.unit, value / base);
        }
        println!("{line}");
    }
}

/// The middle of `values`, which are not none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
