//! Serial devices: one port each, read in frames, written by commands.
//!
//! One task owns the port. It opens it for itself alone, cuts what it reads into frames ([`Framing`]), makes readings
//! of them with a [`ParseRule`] or a payload codec, and writes what commands ask for. A port that goes away is opened
//! again when it returns; until then the device is down and its values are stale.

mod observe;
mod port;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio_serial::{ClearBuffer, SerialPort};
use tracing::{debug, info, warn};

use crate::field::codec::{self, Codec};
use crate::field::device::Device;
use crate::field::mapping::{Command, NameError, check_device_name, check_point_name};
use crate::field::{Backoff, Exchange, SerialLine};
use crate::observe::{Health, Observe};
use crate::proto::serial::{Framer, Framing, FramingError, MAX_COMMAND_BYTES, ParseRule, Parser, RuleError, Template};
use observe::Observer;
use port::End;

/// How soon a lost port is looked for, and how seldom at most: someone who replugs a cable waits for the light.
const FIRST_REOPEN: Duration = Duration::from_millis(250);
const MAX_REOPEN: Duration = Duration::from_secs(5);

/// A port that stayed open this long was not lost at once: the next loss is looked at with [`FIRST_REOPEN`] again.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// How many commands a device may have.
const MAX_COMMANDS: usize = 64;

/// One serial device and its port.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The device's name in topics, and the adapter's.
    pub name: Arc<str>,
    pub line: SerialLine,
    pub framing: Framing,
    pub decode: Decode,
    pub commands: Vec<CommandRule>,
    /// For devices that speak only when asked.
    pub request: Option<Request>,
    /// A device that sends nothing readable for this long is down. `None` for devices that send when something
    /// happens, such as a barcode reader.
    pub silent_after: Option<Duration>,
}

/// How frames become values.
#[derive(Clone, Debug, PartialEq)]
pub enum Decode {
    Parse(ParseRule),
    /// `decodeUplink`; its `encodeDownlink`, if it has one, takes the commands that have no [`CommandRule`].
    Codec(codec::Settings),
}

/// What is sent to set a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandRule {
    pub point: Arc<str>,
    pub template: Template,
}

/// What is sent to make the device speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub bytes: Vec<u8>,
    pub interval: Duration,
    /// How long the frame that answers may take. Commands wait for it, so that nothing is sent into an answer.
    pub timeout: Duration,
}

/// What of the settings cannot work.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("the device's name cannot be used")]
    Device(#[source] NameError),
    #[error("the name of point `{point}` cannot be used")]
    Point { point: Arc<str>, source: NameError },
    #[error("the framing cannot work")]
    Framing(#[from] FramingError),
    #[error("the parse rule cannot work")]
    Rule(#[from] RuleError),
    #[error("the codec cannot be used")]
    Codec(#[from] codec::LoadError),
    #[error("a device may have at most {MAX_COMMANDS} commands")]
    Commands,
    #[error(
        "a request has 1 to {MAX_COMMAND_BYTES} bytes, a timeout of at least 1 ms and an interval of at least 10 ms"
    )]
    Request,
}

/// A serial device that is ready to run.
pub struct Adapter {
    settings: Settings,
    exchange: Exchange,
    framer: Framer,
    decoder: Decoder,
    observer: Arc<Observer>,
}

enum Decoder {
    Parser(Parser),
    Codec(Codec),
}

impl Adapter {
    /// Checks the settings and loads the codec. The port is opened by [`Adapter::run`], because a device that is not
    /// plugged in is no reason not to start.
    ///
    /// # Errors
    /// [`BindError`] names the setting that cannot work.
    pub fn bind(settings: Settings, exchange: Exchange) -> Result<Self, BindError> {
        settings.check_names()?;
        let framer = Framer::new(settings.framing.clone())?;
        let decoder = match &settings.decode {
            Decode::Parse(rule) => Decoder::Parser(Parser::new(rule.clone())?),
            Decode::Codec(codec) => Decoder::Codec(Codec::load(codec)?),
        };
        let device = Device::new(settings.name.clone(), exchange.clock().clone());
        let codec = match &decoder {
            Decoder::Codec(codec) => Some(codec.clone()),
            Decoder::Parser(_) => None,
        };
        let clock = exchange.clock().clone();
        let observer = Arc::new(Observer::new(device, settings.line.clone(), codec, clock));
        Ok(Self { settings, exchange, framer, decoder, observer })
    }

    pub fn observe(&self) -> Arc<dyn Observe> {
        self.observer.clone()
    }

    /// Serves the port until it is told to stop.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut backoff = Backoff::new(FIRST_REOPEN, MAX_REOPEN);
        let path = self.settings.line.path.display().to_string();
        loop {
            let reason = match self.settings.line.open() {
                Ok(stream) => {
                    // What waited in the port was sent to nobody; half a line of it would only be misread.
                    let _ = stream.clear(ClearBuffer::Input);
                    info!(device = %self.settings.name, port = path, "serial port opened");
                    self.observer.opened();
                    // Not down any more, and nobody knows better until it speaks.
                    let waiting = "the port is open; nothing was received yet";
                    self.observer.device.set(&self.exchange, Health::Starting, Some(waiting));
                    let opened = tokio::time::Instant::now();
                    let End::Lost(reason) = self.serve(stream, &mut shutdown).await else { return };
                    if opened.elapsed() >= STABLE_AFTER {
                        backoff.reset();
                    }
                    format!("{path} went away ({reason}); it is used again as soon as it is back")
                }
                Err(error) => {
                    debug!(device = %self.settings.name, port = path, %error, "serial port not opened");
                    let source = std::error::Error::source(&error).map(|source| format!(" ({source})"));
                    format!("{path}: {error}{}", source.unwrap_or_default())
                }
            };
            self.framer.reset();
            self.observer.closed(&reason);
            self.observer.device.set(&self.exchange, Health::Down, Some(&reason));
            self.observer.device.publish_stale(&self.exchange);
            if self.is_stopped_within(backoff.next_delay(), &mut shutdown).await {
                return;
            }
        }
    }

    /// Waits for the next try to open the port; commands that come meanwhile are answered with what is wrong.
    async fn is_stopped_within(&mut self, delay: Duration, shutdown: &mut watch::Receiver<bool>) -> bool {
        let sleep = tokio::time::sleep(delay);
        tokio::pin!(sleep);
        loop {
            tokio::select! {
                () = &mut sleep => return false,
                _ = shutdown.wait_for(|stop| *stop) => return true,
                command = self.exchange.next_command() => {
                    self.answer(&command, Err("the serial port is not there".to_owned()));
                }
            }
        }
    }

    fn answer(&self, command: &Command, result: Result<(), String>) {
        self.observer.commanded(result.is_ok());
        match &result {
            Ok(()) => self.exchange.answer(&command.origin, Ok(&command.value)),
            Err(error) => {
                warn!(device = %self.settings.name, point = %command.point, error, "command failed");
                self.exchange.answer(&command.origin, Err(error));
            }
        }
    }
}

impl Settings {
    fn check_names(&self) -> Result<(), BindError> {
        check_device_name(&self.name).map_err(BindError::Device)?;
        if self.commands.len() > MAX_COMMANDS {
            return Err(BindError::Commands);
        }
        let groups = match &self.decode {
            Decode::Parse(ParseRule::Number(point)) => vec![point.point.clone()],
            Decode::Parse(ParseRule::Regex { points, .. } | ParseRule::Json { points }) => {
                points.iter().map(|point| point.point.clone()).collect()
            }
            Decode::Codec(_) => Vec::new(),
        };
        for point in groups.into_iter().chain(self.commands.iter().map(|command| command.point.clone())) {
            check_point_name(&point).map_err(|source| BindError::Point { point, source })?;
        }
        match &self.request {
            Some(Request { bytes, interval, timeout })
                if bytes.is_empty()
                    || bytes.len() > MAX_COMMAND_BYTES
                    || *interval < Duration::from_millis(10)
                    || *timeout < Duration::from_millis(1) =>
            {
                Err(BindError::Request)
            }
            _ => Ok(()),
        }
    }
}
