//! What an adapter program's owner tells about it.

use std::ffi::OsString;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::clock::{Clock, UnixMillis};
use crate::field::device::Device;
use crate::observe::{Health, Kind, Metrics, Observe, Status};

/// The state and counters of one program, shared by its task and whoever looks at it.
pub(super) struct Observer {
    name: Arc<str>,
    program: String,
    devices: Vec<Arc<Device>>,
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    health: Health,
    reason: Option<String>,
    since: UnixMillis,
    starts: u64,
    readings: u64,
    ignored: u64,
    /// Why the last line that was ignored was.
    last_ignored: Option<String>,
    slowed: u64,
    commands: u64,
    failed_commands: u64,
}

impl Observer {
    pub(super) fn new(name: Arc<str>, command: &[OsString], devices: Vec<Arc<Device>>, clock: Clock) -> Self {
        let program = command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let state = State {
            health: Health::Starting,
            reason: None,
            since: clock.now(),
            starts: 0,
            readings: 0,
            ignored: 0,
            last_ignored: None,
            slowed: 0,
            commands: 0,
            failed_commands: 0,
        };
        Self { name, program, devices, clock, state: Mutex::new(state) }
    }

    pub(super) fn set(&self, health: Health, reason: Option<&str>) {
        let mut state = self.state.lock();
        if state.health != health {
            state.health = health;
            state.since = self.clock.now();
        }
        state.reason = reason.map(str::to_owned);
    }

    pub(super) fn started(&self) {
        self.state.lock().starts += 1;
    }

    pub(super) fn read(&self) {
        self.state.lock().readings += 1;
    }

    pub(super) fn ignored(&self, why: &str) {
        let mut state = self.state.lock();
        state.ignored += 1;
        state.last_ignored = Some(why.to_owned());
    }

    pub(super) fn slowed(&self) {
        self.state.lock().slowed += 1;
    }

    pub(super) fn commanded(&self, done: bool) {
        let mut state = self.state.lock();
        state.commands += 1;
        state.failed_commands += u64::from(!done);
    }
}

impl Observe for Observer {
    fn statuses(&self) -> Vec<Status> {
        let state = self.state.lock();
        let mut facts = vec![
            ("Program", self.program.clone()),
            ("Times started", state.starts.to_string()),
            ("Readings", state.readings.to_string()),
        ];
        if let Some(why) = &state.last_ignored {
            facts.push(("Ignored lines", state.ignored.to_string()));
            facts.push(("Last ignored", why.clone()));
        }
        if state.slowed > 0 {
            facts.push(("Times slowed down", state.slowed.to_string()));
        }
        let program = Status {
            kind: Kind::Adapter,
            name: self.name.to_string(),
            parent: None,
            health: state.health,
            reason: state.reason.clone(),
            since: state.since,
            facts,
        };
        drop(state);
        let devices = self.devices.iter().map(|device| device.status(&self.name, Vec::new()));
        std::iter::once(program).chain(devices).collect()
    }

    fn collect(&self, metrics: &mut Metrics) {
        let state = self.state.lock();
        let labels = [("adapter", &*self.name)];
        let mut counter = |name, help, value| metrics.counter(name, help, &labels, value);
        counter("fieldgate_program_starts_total", "How often an adapter program was started.", state.starts);
        counter("fieldgate_program_readings_total", "Readings of an adapter program.", state.readings);
        let help = "Lines of an adapter program that could not be used.";
        counter("fieldgate_program_ignored_lines_total", help, state.ignored);
        let help = "How often an adapter program sent too many lines and was read more slowly.";
        counter("fieldgate_program_slowed_total", help, state.slowed);
        counter("fieldgate_program_commands_total", "Commands for an adapter program.", state.commands);
        let help = "Commands for an adapter program that failed.";
        counter("fieldgate_program_failed_commands_total", help, state.failed_commands);
        let up = f64::from(u8::from(state.health == Health::Good));
        metrics.gauge("fieldgate_program_good", "Whether an adapter program runs and has greeted.", &labels, up);
    }
}
