//! The owner of one bus: connects, polls by the schedule, runs commands ahead of polls, publishes what comes of it.
//!
//! One task, one request at a time, as the bus itself. A device that does not answer costs its neighbours at most one
//! timeout for every period of its backoff; a lost connection is made again with a backoff of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_modbus::Request;
use tracing::{debug, info, warn};

use super::device::{Attendance, Outcome, Standing, Why};
use super::link::{Answer, CallError, Connection, Heard, Sent};
use super::schedule::{Entry, Next, Schedule};
use super::status::{BusStatus, Count, exception_name};
use super::{Link, Settings};
use crate::field::mapping::DeviceState;
use crate::field::{Backoff, Exchange};
use crate::observe::Health;
use crate::proto::modbus::{Span, Table};
use crate::reading::Reading;

/// How many commands may go ahead of a poll that is due, so that a flood of them cannot stop the polls.
const MAX_COMMANDS_AHEAD: u32 = 8;
/// Waits between tries to connect.
const FIRST_RECONNECT: Duration = Duration::from_millis(500);
const LAST_RECONNECT: Duration = Duration::from_secs(15);
/// A device that is down is asked first after this many timeouts, then ever more rarely: it costs its neighbours at most
/// a sixth of the bus at first and a thirtieth in the end.
const FIRST_RETRY_TIMEOUTS: u32 = 5;
const LAST_RETRY_TIMEOUTS: u32 = 30;
/// After this many requests in a row that nobody on the connection answered, a new one is tried: the peer may have
/// vanished without a word.
const MAX_SILENT_REQUESTS: u32 = 3;

/// One bus and the devices on it.
pub struct Bus {
    settings: Settings,
    exchange: Exchange,
    devices: Vec<Attendance>,
    status: Arc<BusStatus>,
}

impl Bus {
    /// A bus that has not connected yet. `exchange` gets the commands for the devices in `settings`.
    pub fn new(settings: Settings, exchange: Exchange) -> Self {
        let timeout = settings.timeout;
        let has_neighbours = settings.devices.len() > 1;
        let backoff = match has_neighbours {
            true => Backoff::new(timeout * FIRST_RETRY_TIMEOUTS, timeout * LAST_RETRY_TIMEOUTS),
            false => Backoff::new(timeout, timeout * FIRST_RETRY_TIMEOUTS),
        };
        let devices: Vec<Attendance> =
            settings.devices.iter().map(|device| Attendance::new(device.clone(), backoff.clone())).collect();
        let status = Arc::new(BusStatus::new(&settings, &devices, exchange.clock().now()));
        Self { settings, exchange, devices, status }
    }

    /// Health, counters and the plan of reads, to look at while the bus runs.
    pub fn observe(&self) -> Arc<BusStatus> {
        self.status.clone()
    }

    /// Owns the bus until `shutdown`.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        let Self { settings, exchange, devices, status } = self;
        let owner = Owner {
            settings,
            exchange,
            devices,
            schedule: Schedule::default(),
            status,
            connection: None,
            has_answered: false,
            silent_requests: 0,
            shutdown,
        };
        owner.run().await;
    }
}

/// A bus that runs.
pub(super) struct Owner {
    pub settings: Settings,
    pub exchange: Exchange,
    pub devices: Vec<Attendance>,
    pub schedule: Schedule,
    pub status: Arc<BusStatus>,
    connection: Option<Connection>,
    /// Whether anyone answered on this connection.
    has_answered: bool,
    silent_requests: u32,
    shutdown: watch::Receiver<bool>,
}

/// Why a request led to no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The device did not answer; what is to be done about it is done.
    Missed(String),
    /// The connection is gone.
    Broken { error: String, sent: Sent },
    /// The gateway stops.
    Stopping,
}

impl Owner {
    async fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_RECONNECT, LAST_RECONNECT);
        let mut retry_at = Instant::now();
        while !self.is_stopping() {
            if self.connection.is_some() {
                self.serve().await;
                // A connection on which nobody answers is no success: it is not made anew in a tight loop.
                retry_at = Instant::now();
                if self.has_answered {
                    backoff.reset();
                } else {
                    retry_at += backoff.next_delay();
                }
            } else if !self.wait_disconnected(retry_at).await {
                return;
            } else if !self.connect().await {
                retry_at = Instant::now() + backoff.next_delay();
            }
        }
    }

    /// Polls and commands while the connection lasts.
    async fn serve(&mut self) {
        let mut commands_ahead = 0;
        while self.connection.is_some() {
            self.turn_bad();
            let now = Instant::now();
            let next = self.schedule.next(now);
            if let Next::Run(entry) = next
                && commands_ahead >= MAX_COMMANDS_AHEAD
            {
                commands_ahead = 0;
                self.poll(entry).await;
                continue;
            }
            let wake = match next {
                Next::Run(_) => now,
                Next::Wait(until) => self.earliest_bad().map_or(until, |bad| bad.min(until)),
                // Far enough to be no load, near enough to be no special case.
                Next::Idle => self.earliest_bad().unwrap_or(now + Duration::from_secs(3600)),
            };
            tokio::select! {
                biased;
                () = stopped(&mut self.shutdown) => return,
                command = self.exchange.next_command() => {
                    commands_ahead += 1;
                    self.execute(command).await;
                }
                () = sleep_until(wake) => {
                    commands_ahead = 0;
                    if let Next::Run(entry) = next {
                        self.poll(entry).await;
                    }
                }
            }
        }
    }

    /// Waits until `until` and refuses commands meanwhile. Returns `false` when the gateway stops.
    async fn wait_disconnected(&mut self, until: Instant) -> bool {
        loop {
            self.turn_bad();
            let wake = self.earliest_bad().map_or(until, |bad| bad.min(until));
            tokio::select! {
                biased;
                () = stopped(&mut self.shutdown) => return false,
                () = sleep_until(wake) => {
                    if Instant::now() >= until {
                        return true;
                    }
                }
                command = self.exchange.next_command() => self.refuse_disconnected(&command),
            }
        }
    }

    /// Tries once to connect.
    pub(super) async fn connect(&mut self) -> bool {
        let opened = tokio::select! {
            biased;
            () = stopped(&mut self.shutdown) => return false,
            opened = Connection::open(&self.settings) => opened,
        };
        let now = self.exchange.clock().now();
        match opened {
            Ok(connection) => {
                info!(bus = %self.settings.name, link = %self.settings.link, "bus connected");
                self.connection = Some(connection);
                self.has_answered = false;
                self.silent_requests = 0;
                self.status.set_bus(Health::Good, None, now);
                for number in 0..self.devices.len() {
                    self.devices[number].link_restored();
                    self.reschedule(number);
                }
                true
            }
            Err(error) => {
                let reason = chain(&error);
                if self.status.set_bus(Health::Down, Some(reason.clone()), now) {
                    warn!(bus = %self.settings.name, error = %reason, "bus not connected");
                }
                for number in 0..self.devices.len() {
                    self.devices[number].link_lost(Instant::now());
                    self.tell_down(number, "the bus is not connected");
                }
                false
            }
        }
    }

    /// Serves one entry of the schedule.
    async fn poll(&mut self, entry: Entry) {
        let number = entry.device;
        let Some(planned) = self.devices[number].reads.get(entry.read).cloned() else {
            self.reschedule(number);
            return;
        };
        let now = Instant::now();
        self.status.add_lateness(number, now.duration_since(entry.due), now);
        let answered = self.request(number, read_request(planned.read.span)).await;
        let Ok(Exchanged { answer, came_back }) = answered else {
            return;
        };
        let now = Instant::now();
        let outcome = self.devices[number].answered(&planned.read, &answer, &self.exchange.time(), now);
        if !outcome.replanned && !came_back {
            // The interval of a read that was refused for good has just grown.
            let interval = self.devices[number].reads.get(entry.read).map_or(planned.interval, |read| read.interval);
            if interval != planned.interval {
                self.status.set_plan(number, &self.devices[number]);
            }
            let skipped = self.schedule.done(number, entry.read, interval, now);
            self.status.count(number, Count::SkippedPolls(skipped));
        }
        self.take_in(number, outcome);
    }

    /// Publishes what an answer led to, and follows its new plan.
    pub(super) fn take_in(&mut self, number: usize, outcome: Outcome) {
        outcome.readings.iter().for_each(|reading| self.exchange.publish_reading(reading));
        if outcome.replanned {
            debug!(device = %self.devices[number].device.name, "reads planned anew");
            self.reschedule(number);
        }
        self.tell_health(number);
    }

    /// Sends one request to a device, and takes note of what that says about the device and the connection.
    pub(super) async fn request(&mut self, number: usize, request: Request<'static>) -> Result<Exchanged, NoAnswer> {
        let Some(connection) = &mut self.connection else {
            return Err(NoAnswer::Broken { error: "the bus is not connected".into(), sent: Sent::No });
        };
        self.status.count(number, Count::Request);
        let unit = self.devices[number].device.unit_id;
        let called = tokio::select! {
            biased;
            () = stopped(&mut self.shutdown) => return Err(NoAnswer::Stopping),
            called = connection.call(unit, request) => called,
        };
        self.status.add_discarded(connection.take_discarded());
        match called {
            // These two the gateway in between says, for a device that did not answer it.
            Ok(Answer::Exception(code @ (10 | 11))) => {
                self.has_answered = true;
                self.silent_requests = 0;
                self.status.count(number, Count::Exception(code));
                Err(self.missed(number, exception_name(code)))
            }
            Ok(answer) => {
                self.silent_requests = 0;
                self.has_answered = true;
                self.heard(number, answer)
            }
            Err(CallError::Broken { source, sent }) => {
                self.connection = None;
                let error = source.to_string();
                info!(bus = %self.settings.name, %error, "bus connection lost");
                self.tell_error(number, error.clone());
                if !self.has_answered {
                    // A peer that takes connections and hangs up when asked is no better than a silent one.
                    self.missed(number, error.clone());
                }
                Err(NoAnswer::Broken { error, sent })
            }
            Err(error @ CallError::Timeout { heard, .. }) => {
                self.status.count(number, Count::Timeout);
                self.leave_alone(number);
                if heard == Heard::Nothing {
                    self.suspect_connection();
                }
                Err(self.missed(number, error.to_string()))
            }
            Err(error @ (CallError::Garbled | CallError::Mismatch)) => {
                self.silent_requests = 0;
                self.status.count(number, Count::Garbled);
                Err(self.missed(number, error.to_string()))
            }
        }
    }

    fn heard(&mut self, number: usize, answer: Answer) -> Result<Exchanged, NoAnswer> {
        if let Answer::Exception(code) = answer {
            self.status.count(number, Count::Exception(code));
            self.tell_error(number, exception_name(code));
        }
        self.status.answered(number, self.exchange.clock().now());
        let came_back = self.devices[number].heard();
        if came_back {
            info!(device = %self.devices[number].device.name, "device answers again");
            self.reschedule(number);
        }
        self.tell_health(number);
        Ok(Exchanged { answer, came_back })
    }

    fn missed(&mut self, number: usize, error: String) -> NoAnswer {
        self.tell_error(number, error.clone());
        if self.devices[number].missed(Instant::now()) {
            self.reschedule(number);
            self.tell_down(number, "the device does not answer");
        }
        NoAnswer::Missed(error)
    }

    /// After a timeout the unit is not asked for another one: where its answer is merely late, it is thrown away and
    /// not taken for the answer to the next request, and meanwhile its neighbours have the bus.
    fn leave_alone(&mut self, number: usize) {
        let has_transactions = matches!(self.settings.link, Link::Tcp { .. });
        if !has_transactions || self.devices.len() > 1 {
            let unit = self.devices[number].device.unit_id.number();
            self.schedule.hold(unit, Instant::now() + self.settings.timeout);
        }
    }

    fn suspect_connection(&mut self) {
        self.silent_requests += 1;
        let is_serial = matches!(self.settings.link, Link::Serial(_));
        if !is_serial && self.silent_requests >= MAX_SILENT_REQUESTS {
            debug!(bus = %self.settings.name, "nobody answers on this connection; making a new one");
            self.connection = None;
        }
    }

    fn reschedule(&mut self, number: usize) {
        self.schedule.set_device(number, self.devices[number].entries(number, Instant::now()));
        self.status.set_plan(number, &self.devices[number]);
    }

    /// Publishes a device's health if it changed.
    pub(super) fn tell_health(&mut self, number: usize) -> bool {
        let (health, reason) = self.devices[number].health();
        let now = self.exchange.clock().now();
        let Some(since) = self.status.set_device(number, health, reason.clone(), now) else {
            return false;
        };
        let device = &self.devices[number].device.name;
        if let (Health::Down | Health::Degraded, Some(reason)) = (health, &reason) {
            warn!(%device, bus = %self.settings.name, reason, "device {}", health.name());
        }
        self.exchange.publish_state(device, &DeviceState { health, reason, since });
        true
    }

    fn tell_error(&self, number: usize, error: String) {
        self.status.failed(number, error, self.exchange.clock().now());
    }

    fn tell_down(&mut self, number: usize, reason: &str) {
        if self.tell_health(number) {
            let time = self.exchange.time();
            let readings = self.devices[number].stale_readings(reason, &time, Instant::now());
            self.publish(&readings);
        }
    }

    fn turn_bad(&mut self) {
        let time = self.exchange.time();
        for number in 0..self.devices.len() {
            let readings = self.devices[number].bad_readings(&time, Instant::now());
            self.publish(&readings);
        }
    }

    fn earliest_bad(&self) -> Option<Instant> {
        self.devices.iter().filter_map(Attendance::bad_at).min()
    }

    fn publish(&self, readings: &[Reading]) {
        readings.iter().for_each(|reading| self.exchange.publish_reading(reading));
    }

    /// When a device that is down may be asked again; `None` for one that may be asked now.
    pub(super) fn waits_until(&self, number: usize) -> Option<Instant> {
        match &self.devices[number].standing {
            Standing::Down { why: Why::NoAnswer { retry_at }, .. } if *retry_at > Instant::now() => Some(*retry_at),
            _ => None,
        }
    }

    fn is_stopping(&self) -> bool {
        *self.shutdown.borrow() || self.shutdown.has_changed().is_err()
    }
}

/// An answer, and whether with it the device came back, in which case its plan is a new one.
#[derive(Debug)]
pub(super) struct Exchanged {
    pub answer: Answer,
    pub came_back: bool,
}

pub(super) fn read_request(span: Span) -> Request<'static> {
    match span.table {
        Table::Coil => Request::ReadCoils(span.start, span.count),
        Table::DiscreteInput => Request::ReadDiscreteInputs(span.start, span.count),
        Table::InputRegister => Request::ReadInputRegisters(span.start, span.count),
        Table::HoldingRegister => Request::ReadHoldingRegisters(span.start, span.count),
    }
}

/// Waits until the signal says stop, or whoever could say so is gone.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// An error and its sources in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
