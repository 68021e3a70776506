//! What a bus tells about itself: health of the adapter and of each device, counters, the plan of reads.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Settings;
use super::device::Attendance;
use crate::clock::UnixMillis;
use crate::observe::{Health, Kind, Metrics, Observe, Status};
use crate::proto::modbus::{Span, exception_text};

/// For how long the worst lateness of a poll is shown.
const LATENESS_WINDOW: Duration = Duration::from_secs(60);

/// The state of one bus, shared between its owner and whoever looks.
#[derive(Debug)]
pub struct BusStatus {
    name: String,
    link: String,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    bus: Standing,
    connects: u64,
    discarded_bytes: u64,
    devices: Vec<DeviceRecord>,
}

#[derive(Debug)]
struct Standing {
    health: Health,
    reason: Option<String>,
    since: UnixMillis,
}

#[derive(Debug)]
struct DeviceRecord {
    name: String,
    unit: String,
    standing: Standing,
    last_answer: Option<UnixMillis>,
    last_error: Option<(String, UnixMillis)>,
    plan: Vec<PlanLine>,
    counters: Counters,
    lateness: Lateness,
}

#[derive(Debug, Default)]
struct Counters {
    requests: u64,
    timeouts: u64,
    garbled: u64,
    skipped_polls: u64,
    commands_done: u64,
    commands_failed: u64,
    exceptions: BTreeMap<u8, u64>,
}

/// One request of a device's plan, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanLine {
    pub span: Span,
    pub interval: Duration,
    pub points: Vec<String>,
}

/// What to count of a request or command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Count {
    Request,
    Timeout,
    Garbled,
    Exception(u8),
    SkippedPolls(u32),
    CommandDone,
    CommandFailed,
}

impl BusStatus {
    pub(super) fn new(settings: &Settings, devices: &[Attendance], now: UnixMillis) -> Self {
        let starting = || Standing { health: Health::Starting, reason: None, since: now };
        let record = |attendance: &Attendance| DeviceRecord {
            name: attendance.device.name.to_string(),
            unit: attendance.device.unit_id.to_string(),
            standing: starting(),
            last_answer: None,
            last_error: None,
            plan: plan_lines(attendance),
            counters: Counters::default(),
            lateness: Lateness::default(),
        };
        let devices = devices.iter().map(record).collect();
        let inner = Inner { bus: starting(), connects: 0, discarded_bytes: 0, devices };
        Self { name: settings.name.to_string(), link: settings.link.to_string(), inner: Mutex::new(inner) }
    }

    /// The requests that a device is asked, as planned now; `None` for a device that is not on this bus.
    pub fn plan(&self, device: &str) -> Option<Vec<PlanLine>> {
        let inner = self.inner.lock();
        inner.devices.iter().find(|record| record.name == device).map(|record| record.plan.clone())
    }

    /// Sets the health of the bus itself; tells whether that is a change.
    pub(super) fn set_bus(&self, health: Health, reason: Option<String>, now: UnixMillis) -> bool {
        let mut inner = self.inner.lock();
        inner.connects += u64::from(health == Health::Good);
        inner.bus.set(health, reason, now)
    }

    /// Sets a device's health; `Some` with the time since when if that is a change.
    pub(super) fn set_device(
        &self,
        device: usize,
        health: Health,
        reason: Option<String>,
        now: UnixMillis,
    ) -> Option<UnixMillis> {
        let mut inner = self.inner.lock();
        let standing = &mut inner.devices.get_mut(device)?.standing;
        standing.set(health, reason, now).then_some(standing.since)
    }

    pub(super) fn set_plan(&self, device: usize, attendance: &Attendance) {
        self.with(device, |record| record.plan = plan_lines(attendance));
    }

    pub(super) fn count(&self, device: usize, count: Count) {
        self.with(device, |record| record.counters.count(count));
    }

    pub(super) fn answered(&self, device: usize, now: UnixMillis) {
        self.with(device, |record| record.last_answer = Some(now));
    }

    pub(super) fn failed(&self, device: usize, error: String, now: UnixMillis) {
        self.with(device, |record| record.last_error = Some((error, now)));
    }

    pub(super) fn add_discarded(&self, bytes: u64) {
        self.inner.lock().discarded_bytes += bytes;
    }

    pub(super) fn add_lateness(&self, device: usize, late: Duration, now: Instant) {
        self.with(device, |record| record.lateness.add(late, now));
    }

    fn with(&self, device: usize, change: impl FnOnce(&mut DeviceRecord)) {
        if let Some(record) = self.inner.lock().devices.get_mut(device) {
            change(record);
        }
    }
}

impl Observe for BusStatus {
    fn statuses(&self) -> Vec<Status> {
        let inner = self.inner.lock();
        let bus = Status {
            kind: Kind::Adapter,
            name: self.name.clone(),
            parent: None,
            health: inner.bus.health,
            reason: inner.bus.reason.clone(),
            since: inner.bus.since,
            facts: vec![("protocol", "Modbus".into()), ("link", self.link.clone())],
        };
        let device = |record: &DeviceRecord| Status {
            kind: Kind::Device,
            name: record.name.clone(),
            parent: Some(self.name.clone()),
            health: record.standing.health,
            reason: record.standing.reason.clone(),
            since: record.standing.since,
            facts: record.facts(),
        };
        std::iter::once(bus).chain(inner.devices.iter().map(device)).collect()
    }

    fn collect(&self, metrics: &mut Metrics) {
        let inner = self.inner.lock();
        let bus = [("bus", self.name.as_str())];
        let connects = "Connections made to a bus.";
        metrics.counter("fieldgate_modbus_connects_total", connects, &bus, inner.connects);
        let discarded = "Bytes received that belonged to no awaited answer: late answers and noise.";
        metrics.counter("fieldgate_modbus_discarded_bytes_total", discarded, &bus, inner.discarded_bytes);
        for record in &inner.devices {
            record.collect(&self.name, metrics);
        }
    }
}

impl Standing {
    fn set(&mut self, health: Health, reason: Option<String>, now: UnixMillis) -> bool {
        if self.health != health {
            self.since = now;
        }
        let is_change = self.health != health || self.reason != reason;
        (self.health, self.reason) = (health, reason);
        is_change
    }
}

impl Counters {
    fn count(&mut self, count: Count) {
        match count {
            Count::Request => self.requests += 1,
            Count::Timeout => self.timeouts += 1,
            Count::Garbled => self.garbled += 1,
            Count::Exception(code) => *self.exceptions.entry(code).or_default() += 1,
            Count::SkippedPolls(skipped) => self.skipped_polls += u64::from(skipped),
            Count::CommandDone => self.commands_done += 1,
            Count::CommandFailed => self.commands_failed += 1,
        }
    }
}

impl DeviceRecord {
    fn facts(&self) -> Vec<(&'static str, String)> {
        let Counters { requests, timeouts, garbled, exceptions, .. } = &self.counters;
        let refused: u64 = exceptions.values().sum();
        let mut facts = vec![("unit id", self.unit.clone())];
        facts.extend(self.last_answer.map(|at| ("last answer", at.to_string())));
        facts
            .push(("requests", format!("{requests}, {timeouts} without answer, {garbled} garbled, {refused} refused")));
        facts.extend(self.last_error.as_ref().map(|(error, at)| ("last error", format!("{error}, at {at}"))));
        facts.push(("reads", self.plan.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")));
        facts
    }

    fn collect(&self, bus: &str, metrics: &mut Metrics) {
        let labels = [("bus", bus), ("device", self.name.as_str())];
        let counters = &self.counters;
        let mut count = |name, help, value| metrics.counter(name, help, &labels, value);
        count("fieldgate_modbus_requests_total", "Requests sent to a device.", counters.requests);
        count("fieldgate_modbus_timeouts_total", "Requests that no answer came to.", counters.timeouts);
        count("fieldgate_modbus_garbled_total", "Answers that failed their check.", counters.garbled);
        let skipped = "Polls left out because the bus was busy or the device slow.";
        count("fieldgate_modbus_skipped_polls_total", skipped, counters.skipped_polls);
        for (code, value) in &counters.exceptions {
            let code = code.to_string();
            let labels = [labels[0], labels[1], ("code", &code)];
            let help = "Exception responses of a device, by exception code.";
            metrics.counter("fieldgate_modbus_exceptions_total", help, &labels, *value);
        }
        for (result, value) in [("ok", counters.commands_done), ("error", counters.commands_failed)] {
            let labels = [labels[0], labels[1], ("result", result)];
            metrics.counter("fieldgate_modbus_commands_total", "Commands for a device.", &labels, value);
        }
        let late = "How late a poll began at worst in the last one to two minutes.";
        metrics.gauge("fieldgate_modbus_poll_lateness_seconds", late, &labels, self.lateness.worst().as_secs_f64());
        let up = f64::from(u8::from(matches!(self.standing.health, Health::Good | Health::Degraded)));
        metrics.gauge("fieldgate_modbus_device_up", "Whether a device answers.", &labels, up);
    }
}

/// As in `holding_register 0-9 every 1s: voltage, current`.
impl std::fmt::Display for PlanLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} every {:?}: {}", self.span, self.interval, self.points.join(", "))
    }
}

fn plan_lines(attendance: &Attendance) -> Vec<PlanLine> {
    let name = |number: usize| attendance.device.points[number].point.name.to_string();
    let line = |planned: &super::device::PlannedRead| PlanLine {
        span: planned.read.span,
        interval: planned.interval,
        points: planned.read.parts.iter().map(|(number, _)| name(*number)).collect(),
    };
    attendance.reads.iter().map(line).collect()
}

/// As in `exception 2 (illegal data address)`.
pub(super) fn exception_name(code: u8) -> String {
    format!("exception {code} ({})", exception_text(code))
}

/// The worst of this window and the one before.
#[derive(Debug, Default)]
struct Lateness {
    began: Option<Instant>,
    current: Duration,
    previous: Duration,
}

impl Lateness {
    fn add(&mut self, late: Duration, now: Instant) {
        let began = *self.began.get_or_insert(now);
        if now.duration_since(began) >= LATENESS_WINDOW {
            self.began = Some(now);
            self.previous = std::mem::take(&mut self.current);
        }
        self.current = self.current.max(late);
    }

    fn worst(&self) -> Duration {
        self.current.max(self.previous)
    }
}
