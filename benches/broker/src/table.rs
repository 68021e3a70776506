//! The table: every load against every broker, alternating, the median of the rounds, as ratios to mosquitto.

use std::collections::HashMap;
use std::path::Path;

use crate::brokers::{ALL, Broker, Kind};
use crate::load::{self, Load};
use crate::process;

struct Cell {
    name: String,
    values: HashMap<&'static str, Vec<f64>>,
    trouble: HashMap<&'static str, u64>,
    unit: &'static str,
}

pub fn run(fieldgate: &str, rounds: usize) {
    let fieldgate = Path::new(fieldgate);
    let loads = [
        ("1→1", 1, 1, [1_500_000, 800_000, 300_000]),
        ("5→1", 5, 1, [300_000, 150_000, 60_000]),
        ("1→50", 1, 50, [60_000, 30_000, 15_000]),
    ];
    let mut cells = Vec::new();
    for (name, publishers, subscribers, messages) in loads {
        for qos in 0..3u8 {
            let load = Load::new(qos, publishers, subscribers, messages[usize::from(qos)]);
            let mut cell = Cell::new(format!("{name} QoS {qos}"), "msg/s");
            for _ in 0..rounds {
                for kind in ALL {
                    let broker = Broker::start(kind, fieldgate);
                    let result = load::throughput(broker.address, load);
                    cell.add(kind, result.received_per_second);
                    *cell.trouble.entry(kind.name()).or_default() += result.lost + result.reordered;
                }
            }
            cell.print();
            cells.push(cell);
        }
    }
    for rate in [1000, 5000] {
        let mut p50 = Cell::new(format!("QoS 1 at {rate}/s p50"), "µs");
        let mut p99 = Cell::new(format!("QoS 1 at {rate}/s p99"), "µs");
        for _ in 0..rounds {
            for kind in ALL {
                let broker = Broker::start(kind, fieldgate);
                let latency = load::latency(broker.address, rate, 5);
                p50.add(kind, latency.p50.as_nanos() as f64 / 1000.0);
                p99.add(kind, latency.p99.as_nanos() as f64 / 1000.0);
            }
        }
        p50.print();
        p99.print();
    }
    let mut start = Cell::new("RSS at start".into(), "KiB");
    let mut loaded = Cell::new("RSS after load".into(), "KiB");
    let mut idle = Cell::new("per idle connection".into(), "KiB");
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
    for cell in [start, loaded, idle] {
        cell.print();
    }
}

impl Cell {
    fn new(name: String, unit: &'static str) -> Self {
        Self { name, values: HashMap::new(), trouble: HashMap::new(), unit }
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
