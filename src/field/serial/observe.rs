//! What a serial adapter tells about itself.

use parking_lot::Mutex;

use crate::clock::{Clock, UnixMillis};
use crate::field::SerialLine;
use crate::field::codec::Codec;
use crate::field::device::Device;
use crate::observe::{Health, Kind, Metrics, Observe, Status};
use crate::proto::serial::FrameCounts;

/// The counters of one port, shared by its task and whoever looks at it.
pub(super) struct Observer {
    pub(super) device: Device,
    line: SerialLine,
    codec: Option<Codec>,
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    health: Health,
    reason: Option<String>,
    since: UnixMillis,
    frames: FrameCounts,
    last_received: Option<UnixMillis>,
    unreadable: u64,
    /// The last frame that could not be read, and why.
    last_unreadable: Option<(String, String, UnixMillis)>,
    opens: u64,
    commands: u64,
    failed_commands: u64,
}

impl Observer {
    pub(super) fn new(device: Device, line: SerialLine, codec: Option<Codec>, clock: Clock) -> Self {
        let state = State {
            health: Health::Starting,
            reason: None,
            since: clock.now(),
            frames: FrameCounts::default(),
            last_received: None,
            unreadable: 0,
            last_unreadable: None,
            opens: 0,
            commands: 0,
            failed_commands: 0,
        };
        Self { device, line, codec, clock, state: Mutex::new(state) }
    }

    pub(super) fn opened(&self) {
        let mut state = self.state.lock();
        state.opens += 1;
        state.set(Health::Good, None, &self.clock);
    }

    pub(super) fn closed(&self, reason: &str) {
        self.state.lock().set(Health::Down, Some(reason), &self.clock);
    }

    pub(super) fn framed(&self, counts: FrameCounts) {
        self.state.lock().frames = counts;
    }

    pub(super) fn received(&self) {
        self.state.lock().last_received = Some(self.clock.now());
    }

    pub(super) fn unreadable(&self, frame: &str, error: &str) {
        let mut state = self.state.lock();
        state.unreadable += 1;
        state.last_unreadable = Some((frame.to_owned(), error.to_owned(), self.clock.now()));
    }

    pub(super) fn commanded(&self, done: bool) {
        let mut state = self.state.lock();
        state.commands += 1;
        state.failed_commands += u64::from(!done);
    }
}

impl State {
    fn set(&mut self, health: Health, reason: Option<&str>, clock: &Clock) {
        if self.health != health {
            self.health = health;
            self.since = clock.now();
        }
        self.reason = reason.map(str::to_owned);
    }
}

impl Observe for Observer {
    fn statuses(&self) -> Vec<Status> {
        let state = self.state.lock();
        let mut facts = vec![("Frames", state.frames.frames.to_string())];
        if let Some(at) = state.last_received {
            facts.push(("Last frame", at.to_string()));
        }
        if let Some((frame, error, at)) = &state.last_unreadable {
            facts.push(("Unreadable frames", state.unreadable.to_string()));
            facts.push(("Last unreadable", format!("{frame} ({error}, {at})")));
        }
        if let Some(codec) = &self.codec {
            facts.push(("Codec", codec.name().to_owned()));
        }
        let name = self.device.name();
        let port = Status {
            kind: Kind::Adapter,
            name: name.to_string(),
            parent: None,
            health: state.health,
            reason: state.reason.clone(),
            since: state.since,
            facts: vec![
                ("Port", format!("{} at {} Bd", self.line.path.display(), self.line.baud_rate)),
                ("Times opened", state.opens.to_string()),
            ],
        };
        vec![port, self.device.status(name, facts)]
    }

    fn collect(&self, metrics: &mut Metrics) {
        let state = self.state.lock();
        let labels = [("adapter", &**self.device.name())];
        let mut counter = |name, help, value| metrics.counter(name, help, &labels, value);
        counter("fieldgate_serial_received_bytes_total", "Bytes read from a serial port.", state.frames.bytes);
        counter("fieldgate_serial_frames_total", "Frames read from a serial port.", state.frames.frames);
        let help = "Frames that no value could be read from.";
        counter("fieldgate_serial_unreadable_frames_total", help, state.unreadable);
        let help = "Frames dropped because they were longer than allowed.";
        counter("fieldgate_serial_overlong_frames_total", help, state.frames.overlong);
        let help = "Frames dropped because they were cut off.";
        counter("fieldgate_serial_incomplete_frames_total", help, state.frames.incomplete);
        counter("fieldgate_serial_noise_bytes_total", "Bytes outside any frame.", state.frames.noise_bytes);
        counter("fieldgate_serial_opens_total", "How often a serial port was opened.", state.opens);
        counter("fieldgate_serial_commands_total", "Commands for a serial device.", state.commands);
        let help = "Commands for a serial device that failed.";
        counter("fieldgate_serial_failed_commands_total", help, state.failed_commands);
        let up = f64::from(u8::from(state.health == Health::Good));
        metrics.gauge("fieldgate_serial_open", "Whether a serial port is open.", &labels, up);
        if let Some(codec) = &self.codec {
            codec.collect(metrics);
        }
    }
}
