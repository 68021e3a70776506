//! What a component tells about itself: its health for people, its metrics for Prometheus.
//!
//! Components keep plain counters and implement [`Observe`]; the web floor asks them when a page or a scrape wants to
//! know. There is no registry: `gateway` hands the web floor the list of what runs.

use std::fmt::Write;
use std::time::Duration;

use crate::clock::UnixMillis;

/// A component that can be looked at while it runs.
pub trait Observe: Send + Sync {
    /// The state of each thing this component looks after, in a stable order.
    fn statuses(&self) -> Vec<Status>;

    /// Adds this component's metrics to a scrape.
    fn collect(&self, metrics: &mut Metrics);
}

/// The state of one listener, adapter, device or upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    pub kind: Kind,
    /// Unique within the kind; the name in the configuration.
    pub name: String,
    /// The adapter a device belongs to.
    pub parent: Option<String>,
    pub health: Health,
    /// What is wrong and what to do about it, for a person; `None` when all is well.
    pub reason: Option<String>,
    /// Since when the health is what it is.
    pub since: UnixMillis,
    /// What else a person wants to see, in display order: label and value.
    pub facts: Vec<(&'static str, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Listener,
    Adapter,
    Device,
    Upstream,
    Store,
}

impl Kind {
    /// The name used in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::Adapter => "adapter",
            Self::Device => "device",
            Self::Upstream => "upstream",
            Self::Store => "store",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    /// Not yet known: starting, connecting for the first time.
    Starting,
    Good,
    /// Working, but a person should look.
    Degraded,
    Down,
    /// Switched off by the operator.
    Paused,
}

impl Health {
    /// The name used in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Good => "good",
            Self::Degraded => "degraded",
            Self::Down => "down",
            Self::Paused => "paused",
        }
    }
}

/// A scrape under construction, in the Prometheus text exposition format 0.0.4.
#[derive(Debug, Default)]
pub struct Metrics {
    families: Vec<Family>,
}

#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    samples: String,
}

impl Metrics {
    /// Adds a sample of a counter; `name` ends in `_total`, `labels` hold name and value.
    pub fn counter(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: u64) {
        debug_assert!(name.ends_with("_total"), "{name} is a counter");
        self.sample("counter", name, help, labels, value as f64);
    }

    /// Adds a sample of a counter of time; `name` ends in `_seconds_total`.
    pub fn seconds(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: Duration) {
        debug_assert!(name.ends_with("_seconds_total"), "{name} counts seconds");
        self.sample("counter", name, help, labels, value.as_secs_f64());
    }

    /// Adds a sample of a gauge, in base units (seconds, bytes).
    pub fn gauge(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: f64) {
        self.sample("gauge", name, help, labels, value);
    }

    /// Adds a histogram; `name` is without the endings of its samples. `counts` are those of the values up to each of
    /// `bounds`, which ascend, and above the bound before; the last is of what is above all of them.
    pub fn histogram(&mut self, name: &'static str, help: &'static str, bounds: &[f64], counts: &[u64], sum: f64) {
        let samples = self.family("histogram", name, help);
        let mut count = 0;
        let bounds = bounds.iter().copied().chain([f64::INFINITY]);
        for (bound, values) in bounds.zip(counts) {
            count += values;
            let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".into() };
            let _ = writeln!(samples, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(samples, "{name}_sum {sum}\n{name}_count {count}");
    }

    fn sample(
        &mut self,
        kind: &'static str,
        name: &'static str,
        help: &'static str,
        labels: &[(&str, &str)],
        value: f64,
    ) {
        let samples = self.family(kind, name, help);
        samples.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let escaped = value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
            let _ = write!(samples, "{}{label}=\"{escaped}\"", if index == 0 { '{' } else { ',' });
        }
        samples.push_str(if labels.is_empty() { " " } else { "} " });
        let _ = if value == f64::INFINITY { writeln!(samples, "+Inf") } else { writeln!(samples, "{value}") };
    }

    /// The samples of a name.
    fn family(&mut self, kind: &'static str, name: &'static str, help: &'static str) -> &mut String {
        let found = self.families.iter().position(|family| family.name == name);
        let index = found.unwrap_or_else(|| {
            self.families.push(Family { name, help, kind, samples: String::new() });
            self.families.len() - 1
        });
        &mut self.families[index].samples
    }

    /// The whole scrape as text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for Family { name, help, kind, samples } in &self.families {
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_family_stand_together_and_labels_are_escaped() {
        let mut metrics = Metrics::default();
        metrics.counter("fieldgate_a_total", "As.", &[("name", "x\"y")], 1);
        metrics.gauge("fieldgate_b", "Bs.", &[], 0.5);
        metrics.gauge("fieldgate_b", "Bs.", &[("name", "y")], f64::INFINITY);
        metrics.counter("fieldgate_a_total", "As.", &[("name", "z"), ("unit", "2")], 7);
        let expected = "# HELP fieldgate_a_total As.\n# TYPE fieldgate_a_total counter\n\
             fieldgate_a_total{name=\"x\\\"y\"} 1\nfieldgate_a_total{name=\"z\",unit=\"2\"} 7\n\
             # HELP fieldgate_b Bs.\n# TYPE fieldgate_b gauge\nfieldgate_b 0.5\nfieldgate_b{name=\"y\"} +Inf\n";
        assert_eq!(metrics.render(), expected);
    }

    #[test]
    fn a_histogram_counts_up_to_each_bound() {
        let mut metrics = Metrics::default();
        metrics.histogram("fieldgate_h_seconds", "Hs.", &[0.001, 1.0], &[3, 0, 2], 7.5);
        let expected = "# HELP fieldgate_h_seconds Hs.\n# TYPE fieldgate_h_seconds histogram\n\
             fieldgate_h_seconds_bucket{le=\"0.001\"} 3\nfieldgate_h_seconds_bucket{le=\"1\"} 3\n\
             fieldgate_h_seconds_bucket{le=\"+Inf\"} 5\nfieldgate_h_seconds_sum 7.5\nfieldgate_h_seconds_count 5\n";
        assert_eq!(metrics.render(), expected);
    }
}
