//! Serving an open port: what is read becomes readings, what is commanded is written, silence has its meaning.

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep_until, timeout};
use tracing::{debug, trace, warn};

use super::{Adapter, Decoder};
use crate::field::SerialStream;
use crate::field::codec::Uplink;
use crate::field::device::show_bytes;
use crate::field::mapping::Command;
use crate::observe::Health;
use crate::proto::serial::PointValue;

/// What one read takes from the port: about what the kernel keeps for a serial line.
const READ_BYTES: usize = 4096;

/// How many frames in a row may be unreadable before the device counts as unwell: a line cut in half when the gateway
/// starts, or a burst of noise, is no reason.
const UNREADABLE_FRAMES: u32 = 3;

/// How many requests in a row may go unanswered before the device counts as down.
const UNANSWERED_REQUESTS: u32 = 3;

/// What a write may take beyond the time its bytes need on the line. More means that flow control holds it up.
const WRITE_MARGIN: Duration = Duration::from_secs(1);

/// Why a port is no longer served.
pub(super) enum End {
    Stopped,
    Lost(String),
}

/// The timers of an open port.
struct Timers {
    /// When the next request is due; `None` without requests.
    request: Option<Instant>,
    /// Until when an answer is awaited.
    answer: Option<Instant>,
    unanswered: u32,
    silence: Option<Instant>,
    unreadable: u32,
}

enum Event {
    Stop,
    Read(std::io::Result<usize>),
    Command(Command),
    Timer,
}

/// A frame that gave no values.
struct Unreadable {
    error: String,
    /// Whether one such frame is enough for the device to count as unwell.
    serious: bool,
}

impl Adapter {
    pub(super) async fn serve(&mut self, mut stream: SerialStream, shutdown: &mut watch::Receiver<bool>) -> End {
        let mut buffer = vec![0; READ_BYTES];
        let mut frames = Vec::new();
        let mut timers = Timers {
            request: self.settings.request.as_ref().map(|_| Instant::now()),
            answer: None,
            unanswered: 0,
            silence: self.settings.silent_after.map(|after| Instant::now() + after),
            unreadable: 0,
        };
        loop {
            let due = self.next_timer(&timers);
            let event = tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => Event::Stop,
                read = stream.read(&mut buffer) => Event::Read(read),
                command = self.exchange.next_command(), if timers.answer.is_none() => Event::Command(command),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Event::Timer,
            };
            match event {
                Event::Stop => return End::Stopped,
                Event::Read(Ok(0)) => return End::Lost("it was hung up".into()),
                Event::Read(Err(error)) => return End::Lost(error.to_string()),
                Event::Read(Ok(length)) => {
                    self.framer.handle_bytes(&buffer[..length], Instant::now().into_std(), &mut frames);
                }
                Event::Timer => self.framer.handle_timeout(Instant::now().into_std(), &mut frames),
                Event::Command(command) => {
                    let written = self.execute(&mut stream, &command).await;
                    let lost = written.as_ref().err().and_then(|failure| failure.lost.clone());
                    self.answer(&command, written.map_err(|failure| failure.error));
                    if let Some(reason) = lost {
                        return End::Lost(reason);
                    }
                }
            }
            self.observer.framed(self.framer.counts());
            for frame in frames.drain(..) {
                // A codec may take its time over each of many frames.
                tokio::select! {
                    _ = shutdown.wait_for(|stop| *stop) => return End::Stopped,
                    () = self.handle_frame(frame, &mut timers) => {}
                }
            }
            if let Err(reason) = self.handle_timers(&mut stream, &mut timers).await {
                return End::Lost(reason);
            }
        }
    }

    fn next_timer(&self, timers: &Timers) -> Option<Instant> {
        let request = timers.request.filter(|_| timers.answer.is_none());
        let gap = self.framer.poll_timeout().map(Instant::from_std);
        [request, timers.answer, timers.silence, gap].into_iter().flatten().min()
    }

    async fn handle_frame(&mut self, frame: Bytes, timers: &mut Timers) {
        trace!(device = %self.settings.name, frame = show_bytes(&frame), "frame");
        // Any frame shows that the device is there, also one that cannot be read.
        timers.answer = None;
        timers.unanswered = 0;
        timers.silence = self.settings.silent_after.map(|after| Instant::now() + after);
        match self.decode(&frame).await {
            Ok(values) => {
                timers.unreadable = 0;
                self.observer.received();
                self.observer.device.publish(&self.exchange, values, &self.exchange.time());
                self.observer.device.set(&self.exchange, Health::Good, None);
            }
            Err(Unreadable { error, serious }) => {
                timers.unreadable = timers.unreadable.saturating_add(1);
                let shown = show_bytes(&frame);
                if timers.unreadable == 1 {
                    warn!(device = %self.settings.name, frame = shown, error, "frame cannot be read");
                } else {
                    debug!(device = %self.settings.name, frame = shown, error, "frame cannot be read");
                }
                self.observer.unreadable(&shown, &error);
                if serious || timers.unreadable >= UNREADABLE_FRAMES {
                    let reason = format!("what it sends cannot be read: {error} (in `{shown}`)");
                    self.observer.device.set(&self.exchange, Health::Degraded, Some(&reason));
                }
            }
        }
    }

    async fn decode(&self, frame: &Bytes) -> Result<Vec<PointValue>, Unreadable> {
        match &self.decoder {
            Decoder::Parser(parser) => {
                parser.parse(frame).map_err(|error| Unreadable { error: error.to_string(), serious: false })
            }
            Decoder::Codec(codec) => {
                let uplink = Uplink {
                    bytes: frame.clone(),
                    received_at: self.exchange.clock().now(),
                    device: self.settings.name.clone(),
                    topic: None,
                };
                let decoded = codec.decode(&uplink).await.map_err(|error| Unreadable {
                    serious: error.is_limit(),
                    error: format!("{}: {error}", codec.name()),
                })?;
                for warning in &decoded.warnings {
                    debug!(device = %self.settings.name, codec = codec.name(), warning, "codec warns");
                }
                Ok(decoded.values)
            }
        }
    }

    /// Sends the request that is due, and judges the silence of a device.
    async fn handle_timers(&mut self, stream: &mut SerialStream, timers: &mut Timers) -> Result<(), String> {
        let now = Instant::now();
        if timers.answer.is_some_and(|due| now >= due) {
            timers.answer = None;
            timers.unanswered = timers.unanswered.saturating_add(1);
            if timers.unanswered >= UNANSWERED_REQUESTS {
                self.set_silent("does not answer; is it switched on, and are baud rate and wiring right?");
            }
        }
        if timers.silence.is_some_and(|due| now >= due) {
            timers.silence = None;
            self.set_silent("sends nothing any more; is it switched on and connected?");
        }
        let Some(request) = &self.settings.request else { return Ok(()) };
        if timers.answer.is_none() && timers.request.is_some_and(|due| now >= due) {
            let (bytes, interval, answer) = (request.bytes.clone(), request.interval, request.timeout);
            // Counted from now, not from when it was due: a gateway that was suspended does not catch up on requests.
            timers.request = Some(now + interval);
            match self.write(stream, &bytes).await {
                Ok(()) => timers.answer = Some(Instant::now() + answer),
                Err(Failure { lost: Some(reason), .. }) => return Err(reason),
                Err(Failure { error, .. }) => self.set_silent(&error),
            }
        }
        Ok(())
    }

    fn set_silent(&self, reason: &str) {
        self.observer.device.set(&self.exchange, Health::Down, Some(reason));
        self.observer.device.publish_stale(&self.exchange);
    }

    async fn execute(&self, stream: &mut SerialStream, command: &Command) -> Result<(), Failure> {
        let Command { point, value, .. } = command;
        let rule = self.settings.commands.iter().find(|rule| rule.point == *point);
        let bytes = match (rule, &self.decoder) {
            (Some(rule), _) => rule.template.render(point, value).map_err(|error| error.to_string()),
            (None, Decoder::Codec(codec)) if codec.can_encode() => {
                let encoded = codec.encode(&self.settings.name, point, value).await;
                encoded.map_err(|error| format!("{}: {error}", codec.name()))
            }
            (None, _) => Err(self.no_such_command(point)),
        };
        let bytes = bytes.map_err(|error| Failure { error, lost: None })?;
        self.write(stream, &bytes).await
    }

    fn no_such_command(&self, point: &str) -> String {
        let known: Vec<&str> = self.settings.commands.iter().map(|rule| &*rule.point).collect();
        match known.is_empty() {
            true => format!("`{point}` cannot be set: the device takes no commands"),
            false => format!("`{point}` cannot be set; what can be set is {}", known.join(", ")),
        }
    }

    /// Writes to the port. Not flushed: that would block the thread until the last bit is out.
    async fn write(&self, stream: &mut SerialStream, bytes: &[u8]) -> Result<(), Failure> {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let patience = self.settings.line.character_time() * length + WRITE_MARGIN;
        match timeout(patience, stream.write_all(bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure { error: format!("writing failed: {error}"), lost: Some(error.to_string()) }),
            Err(_) => {
                let error = "the port takes no bytes; check flow control and whether the device is connected".into();
                Err(Failure { error, lost: None })
            }
        }
    }
}

/// A write that failed, and whether the port went with it.
struct Failure {
    error: String,
    lost: Option<String>,
}
