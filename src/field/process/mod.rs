//! Adapter programs: child processes that speak JSON lines on stdin and stdout.
//!
//! A whole new transport, in any language, with a crash of its own: what such a program does wrong ends with it. The
//! gateway starts it, greets it, publishes its readings, hands it commands, keeps its log, slows it down when it
//! talks too much, and starts it again when it ends. `plugins/adapters/README.md` is the protocol.

mod child;
mod observe;
mod protocol;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value as Json;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::field::device::Device;
use crate::field::mapping::{Command, NameError, check_device_name};
use crate::field::{Backoff, Exchange};
use crate::observe::{Health, Observe};
use child::{Child, End};
use observe::Observer;

/// How soon a program that crashed is started again, and how seldom at most.
const FIRST_RESTART: Duration = Duration::from_secs(1);
const MAX_RESTART: Duration = Duration::from_secs(60);

/// A program that ran this long had worked: its next crash is followed by [`FIRST_RESTART`] again.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// How many devices one program may serve.
const MAX_DEVICES: usize = 1000;

/// The exit codes with which a program says that its settings are wrong (`sysexits.h`): starting it again as it is
/// would not help.
const SETTINGS_ARE_WRONG: std::ops::RangeInclusive<i32> = 64..=78;

/// One adapter program.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub name: Arc<str>,
    /// The program and its arguments. No shell: what stands here is what is run.
    pub command: Vec<OsString>,
    /// Where it runs; `None` for the gateway's own directory.
    pub directory: Option<PathBuf>,
    /// What it finds in its environment beside PATH, HOME, LANG, TZ and TMPDIR. Not the gateway's: that may hold secrets.
    pub environment: Vec<(String, String)>,
    /// The devices it may speak for. Readings of others are refused.
    pub devices: Vec<Arc<str>>,
    /// Handed to the program in the greeting, as it stands in the configuration.
    pub settings: Json,
    /// A program that says nothing for this long is taken for dead and started again.
    pub silent_after: Option<Duration>,
    /// When a program that ended with exit code 0 is started again.
    pub rerun_interval: Duration,
}

impl Settings {
    pub const DEFAULT_RERUN_INTERVAL: Duration = Duration::from_secs(60);

    /// A program that serves one device, which has its name.
    pub fn new(name: &str, command: Vec<OsString>) -> Self {
        Self {
            name: name.into(),
            command,
            directory: None,
            environment: Vec::new(),
            devices: vec![name.into()],
            settings: Json::Object(serde_json::Map::new()),
            silent_after: None,
            rerun_interval: Self::DEFAULT_RERUN_INTERVAL,
        }
    }
}

/// What of the settings cannot work.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("there is no command to run")]
    NoCommand,
    #[error("a program serves 1 to {MAX_DEVICES} devices")]
    Devices,
    #[error("the name of device `{device}` cannot be used")]
    Device { device: Arc<str>, source: NameError },
}

/// An adapter program that is ready to be started.
pub struct Adapter {
    settings: Settings,
    exchange: Exchange,
    devices: BTreeMap<Arc<str>, Arc<Device>>,
    observer: Arc<Observer>,
}

impl Adapter {
    /// Checks the settings. The program is started by [`Adapter::run`].
    ///
    /// # Errors
    /// [`BindError`] names the setting that cannot work.
    pub fn bind(settings: Settings, exchange: Exchange) -> Result<Self, BindError> {
        if settings.command.is_empty() {
            return Err(BindError::NoCommand);
        }
        if settings.devices.is_empty() || settings.devices.len() > MAX_DEVICES {
            return Err(BindError::Devices);
        }
        let clock = exchange.clock().clone();
        let mut devices = BTreeMap::new();
        for name in &settings.devices {
            check_device_name(name).map_err(|source| BindError::Device { device: name.clone(), source })?;
            devices.insert(name.clone(), Arc::new(Device::new(name.clone(), clock.clone())));
        }
        let listed = devices.values().cloned().collect();
        let observer = Arc::new(Observer::new(settings.name.clone(), &settings.command, listed, clock));
        Ok(Self { settings, exchange, devices, observer })
    }

    pub fn observe(&self) -> Arc<dyn Observe> {
        self.observer.clone()
    }

    /// Runs the program, over and over, until it is told to stop.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut backoff = Backoff::new(FIRST_RESTART, MAX_RESTART);
        loop {
            let started = Instant::now();
            let end = match Child::start(&self.settings) {
                Ok(child) => {
                    info!(adapter = %self.settings.name, pid = child.pid(), "adapter program started");
                    self.observer.started();
                    self.serve(child, &mut shutdown).await
                }
                Err(error) => End::NotStarted(error),
            };
            if started.elapsed() >= STABLE_AFTER {
                backoff.reset();
            }
            let Some(delay) = self.judge(&end, &mut backoff) else { return };
            if self.is_stopped_within(delay, &mut shutdown).await {
                return;
            }
        }
    }

    /// Says what an end means, and when the program is to be started again; `None` when the gateway stops it.
    fn judge(&self, end: &End, backoff: &mut Backoff) -> Option<Duration> {
        let name = &self.settings.name;
        match end {
            End::Stopped => None,
            End::Done => {
                let again_in = self.settings.rerun_interval;
                info!(adapter = %name, ?again_in, "adapter program is done");
                self.observer.set(Health::Good, None);
                Some(again_in)
            }
            End::Exited { code, last_words } if SETTINGS_ARE_WRONG.contains(code) => {
                error!(adapter = %name, code, last_words, "adapter program refuses its settings and is not started again");
                self.set_down(&format!(
                    "the program says that its settings are wrong (exit code {code}{}); it is started again when the \
                     configuration changes",
                    quoted(last_words)
                ));
                Some(Duration::MAX)
            }
            _ => {
                let delay = backoff.next_delay();
                let reason = format!("{end}; it is started again in {delay:?}");
                warn!(adapter = %name, %end, retry_in = ?delay, "adapter program failed");
                self.set_down(&reason);
                Some(delay)
            }
        }
    }

    fn set_down(&self, reason: &str) {
        self.observer.set(Health::Down, Some(reason));
        for device in self.devices.values() {
            device.set(&self.exchange, Health::Down, Some(reason));
            device.publish_stale(&self.exchange);
        }
    }

    async fn is_stopped_within(&mut self, delay: Duration, shutdown: &mut watch::Receiver<bool>) -> bool {
        // `Duration::MAX` is for ever: tokio's sleep takes it so.
        let sleep = tokio::time::sleep(delay);
        tokio::pin!(sleep);
        loop {
            tokio::select! {
                () = &mut sleep => return false,
                _ = shutdown.wait_for(|stop| *stop) => return true,
                command = self.exchange.next_command() => {
                    self.answer(&command, Err("the adapter program is not running"));
                }
            }
        }
    }

    fn answer(&self, command: &Command, result: Result<Option<crate::reading::Value>, &str>) {
        self.observer.commanded(result.is_ok());
        match result {
            Ok(value) => self.exchange.answer(&command.origin, Ok(value.as_ref().unwrap_or(&command.value))),
            Err(error) => {
                warn!(adapter = %self.settings.name, device = %command.device, point = %command.point, error, "command failed");
                self.exchange.answer(&command.origin, Err(&error));
            }
        }
    }
}

fn quoted(last_words: &str) -> String {
    if last_words.is_empty() { String::new() } else { format!(", “{last_words}”") }
}
