//! `fieldgate run`: the gateway as a service, with signals and systemd's notifications.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use super::signals::{Asked, STOPPED_AT_ONCE, Signals};
use super::{SYSTEM_ERROR, check, log};
use crate::clock::Clock;
use crate::config::{self, Config, Loaded};
use crate::files::{LOOK_INTERVAL, Watched};
use crate::gateway::{Gateway, Reload, Scope};
use crate::supervise::describe;
use crate::web::log::LogRing;

pub fn run(path: &Path) -> ExitCode {
    let Loaded { config, warnings, files } = match check::load(path) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let clock = Clock::start(&boot_id());
    let ring = LogRing::new(clock.clone());
    log::start(config.log, &clock, &ring);
    for line in warnings.lines() {
        warn!(warning = line, "configuration");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "the system gives no threads");
            return ExitCode::from(SYSTEM_ERROR);
        }
    };
    let code = runtime.block_on(serve(path, config, files, clock, ring));
    // What still blocks a thread, such as the name lookup of an upstream, is not worth waiting for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}

async fn serve(path: &Path, config: Config, files: Vec<PathBuf>, clock: Clock, ring: LogRing) -> ExitCode {
    let files = Watched::new(files);
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            error!(%error, "signals cannot be received");
            return ExitCode::from(SYSTEM_ERROR);
        }
    };
    let gateway = match Gateway::bind(config, clock, ring).await {
        Ok(gateway) => gateway,
        Err(error) => {
            error!("{}", describe(&error));
            return ExitCode::from(SYSTEM_ERROR);
        }
    };
    let name = gateway.handle().name().clone();
    let (stop, shutdown) = watch::channel(false);
    let (reload, reloads) = mpsc::channel(1);
    let mut source = Source { path, files, reload, is_wrong: false };
    let running = gateway.run(shutdown, reloads);
    tokio::pin!(running);
    info!(gateway = %name, version = env!("CARGO_PKG_VERSION"), "running");
    notify(&[NotifyState::Ready, NotifyState::Status("running")]);
    let mut watchdog = watchdog();
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = &mut running => return ExitCode::SUCCESS,
            _ = watchdog.tick() => notify(&[NotifyState::Watchdog]),
            _ = look.tick() => if source.files.have_changed() {
                tokio::select! {
                    () = source.reload_access() => {}
                    () = &mut running => return ExitCode::SUCCESS,
                }
            },
            asked = signals.next() => match asked {
                Asked::Reload => {
                    tokio::select! {
                        () = source.reload_all() => {}
                        () = &mut running => return ExitCode::SUCCESS,
                    }
                }
                Asked::Stop(signal) => {
                    info!(signal, "stopping; once more to stop at once");
                    notify(&[NotifyState::Stopping]);
                    let _ = stop.send(true);
                    break;
                }
            },
        }
    }
    loop {
        tokio::select! {
            () = &mut running => {
                info!("stopped");
                return ExitCode::SUCCESS;
            }
            asked = signals.next() => if let Asked::Stop(signal) = asked {
                warn!(signal, "stopping at once");
                std::process::exit(STOPPED_AT_ONCE);
            }
        }
    }
}

/// The configuration's files, which may change while the gateway runs.
struct Source<'a> {
    path: &'a Path,
    files: Watched,
    reload: mpsc::Sender<Reload>,
    /// What was read last was wrong, and is not what runs.
    is_wrong: bool,
}

impl Source<'_> {
    /// Somebody asked: reads the configuration again and hands it to the gateway, if it is right.
    async fn reload_all(&mut self) {
        let mut reloading = vec![NotifyState::Reloading];
        reloading.extend(NotifyState::monotonic_usec_now());
        notify(&reloading);
        if let Some(Loaded { config, warnings, files }) = self.load().await {
            self.files.follow(files);
            for line in warnings.lines() {
                warn!(warning = line, "configuration");
            }
            if let Some(changes) = self.take_over(config, Scope::All).await {
                info!(changes = changes.len(), "configuration read again");
            }
        }
        notify(&[NotifyState::Ready]);
    }

    /// A file of the configuration has changed: its users and rules count from now on, the rest when somebody asks.
    async fn reload_access(&mut self) {
        let was_wrong = self.is_wrong;
        let Some(Loaded { config, files, .. }) = self.load().await else { return };
        self.files.follow(files);
        let changes = self.take_over(config, Scope::Access).await;
        for change in changes.into_iter().flatten() {
            info!(change, "a file of the configuration has changed");
        }
        if was_wrong {
            info!("the configuration is right again; a reload applies what else has changed in it");
        }
    }

    async fn load(&mut self) -> Option<Loaded> {
        let file = self.path.to_path_buf();
        let loaded = tokio::task::spawn_blocking(move || config::load(&file)).await;
        self.is_wrong = !matches!(loaded, Ok(Ok(_)));
        match loaded {
            Ok(Ok(loaded)) => return Some(loaded),
            Ok(Err(reports)) => {
                for line in reports.lines() {
                    error!(problem = line, "configuration");
                }
                error!(path = %self.path.display(), "the configuration is wrong and nothing was changed");
            }
            Err(fault) => error!(%fault, "the configuration could not be read"),
        }
        None
    }

    /// Hands a configuration to the gateway; what has changed.
    async fn take_over(&self, config: Config, scope: Scope) -> Option<Vec<String>> {
        let (done, changes) = oneshot::channel();
        self.reload.send(Reload { config, scope, done }).await.ok()?;
        changes.await.ok()
    }
}

/// Ticks twice as often as systemd wants to hear from us; never, where it does not.
fn watchdog() -> tokio::time::Interval {
    let period = sd_notify::watchdog_enabled().map_or(Duration::from_secs(86_400), |interval| interval / 2);
    let mut interval = tokio::time::interval(period.max(Duration::from_millis(10)));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

/// Tells systemd, if it asked to be told.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "systemd cannot be notified");
    }
}

/// Tells this start from every other one.
pub fn boot_id() -> String {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        // Without randomness the process id and time still differ from start to start.
        Err(_) => format!("{:x}-{:x}", std::process::id(), Clock::start("").now().0),
    }
}
