//! The gateway assembled: what runs, in which order it starts and stops, and what a reload changes.
//!
//! [`Gateway::bind`] opens the database, the sockets and the files and spawns nothing; [`Gateway::run`] does the work.
//! Components start from the inside out (store, hub, listeners, sensors, field, upstreams, web UI) and stop the other
//! way round, so that what is on its way still finds what it needs. Each is [`Supervised`]: a fault restarts it alone.

mod controls;
mod part;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::bridge;
use crate::clock::Clock;
use crate::config::Config;
use crate::hub::{Hub, RestoreError};
use crate::observe::Observe;
use crate::store::{OpenError, Store};
use crate::supervise::{Bound, Failure, Policy, Supervised, describe};
use crate::web::log::LogRing;

pub use controls::Handle;
use part::{Part, Rank};

/// How long the components may take to stop, together: with the store's last commit it stays below 2 s.
const DRAIN: Duration = Duration::from_millis(1500);
/// How long one rank of components may take of it.
const DRAIN_RANK: Duration = Duration::from_millis(500);

/// A gateway whose ports are open and whose database is read, not yet running.
pub struct Gateway {
    config: Config,
    handle: Arc<Handle>,
    bound: Vec<(Part, Result<Bound, Failure>)>,
    former: Vec<Arc<dyn Observe>>,
}

/// A new configuration for a running gateway.
pub struct Reload {
    pub config: Config,
    pub scope: Scope,
    /// Gets what has changed, in words, when the gateway has taken it over.
    pub done: oneshot::Sender<Vec<String>>,
}

/// How much of a new configuration is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of it, as somebody asked.
    All,
    /// Users and rules, whose files have changed; nothing is started or stopped.
    Access,
}

/// Why the gateway cannot start: the system's fault or that of what the configuration asks of it.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("the database in {directory} cannot be opened")]
    Store { directory: String, source: OpenError },
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("{part} cannot start")]
    Part { part: String, source: Failure },
}

impl Gateway {
    /// Opens the database and everything that `config` asks for. `log` is what the web UI shows.
    ///
    /// Devices, buses and upstreams that are not there are no reason not to start; a listen address that is taken is.
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind(config: Config, clock: Clock, log: LogRing) -> Result<Self, BindError> {
        let directory = config.store.directory.display().to_string();
        let hub = match Store::bind(config.store.clone(), clock.clone()) {
            Ok(opened) => Hub::new(config.hub.clone(), clock.clone(), Some(opened))?,
            Err(problem) if problem.may_pass() => {
                Hub::waiting(config.hub.clone(), clock.clone(), config.store.clone(), &problem)?
            }
            Err(source) => return Err(BindError::Store { directory, source }),
        };
        let handle = Arc::new(Handle::new(config.name.as_str().into(), clock, hub, log));
        let mut bound = Vec::new();
        for part in part::parts(&config) {
            let result = part.bind(&handle).await;
            match result {
                Err(source) if part.must_bind() => {
                    return Err(BindError::Part { part: part.describe(), source });
                }
                result => bound.push((part, result)),
            }
        }
        let former = let_go(&handle, &config);
        Ok(Self { config, handle, bound, former })
    }

    /// What others may ask of the gateway while it runs.
    pub fn handle(&self) -> Arc<Handle> {
        self.handle.clone()
    }

    /// Works until `shutdown`, then drains. Takes over new configurations from `reloads`.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>, mut reloads: mpsc::Receiver<Reload>) {
        let Self { mut config, handle, bound, former } = self;
        let (stop_hub, hub_stopped) = watch::channel(false);
        let mut housekeeping = JoinSet::new();
        housekeeping.spawn(keep_house(handle.hub().clone(), hub_stopped));
        let mut running = Vec::new();
        for (part, first) in bound {
            running.push(Running::start(part, first, &handle));
        }
        publish_running(&handle, &running, former);
        loop {
            tokio::select! {
                () = asked_to_stop(&mut shutdown) => break,
                Some(Reload { config: new, scope, done }) = reloads.recv() => {
                    let changes = match scope {
                        Scope::All => {
                            let changes = apply(&handle, &mut running, &config, &new).await;
                            config = new;
                            changes
                        }
                        Scope::Access => {
                            let changes = apply_access(&handle, &config, &new);
                            config.hub.access = new.hub.access;
                            changes
                        }
                    };
                    let _ = done.send(changes);
                }
            }
        }
        let deadline = Instant::now() + DRAIN;
        stop_ranks(running, deadline).await;
        handle.forget();
        let _ = stop_hub.send(true);
        let _ = tokio::time::timeout_at(deadline, housekeeping.join_next()).await;
        if let Some(store) = handle.hub().store().cloned() {
            // The last commit is what acknowledged messages rest on; it is waited for as long as the disk takes.
            let _ = tokio::task::spawn_blocking(move || store.close()).await;
        }
    }
}

/// Waits until the channel holds true, or nobody can change it any more.
async fn asked_to_stop(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// A component that runs.
struct Running {
    part: Part,
    supervised: Supervised,
}

impl Running {
    fn start(part: Part, first: Result<Bound, Failure>, handle: &Arc<Handle>) -> Self {
        let label = part.label();
        let (again, weak) = (part.clone(), Arc::downgrade(handle));
        let bind = Box::new(move || -> crate::supervise::BoxFuture<'static, Result<Bound, Failure>> {
            let (part, weak) = (again.clone(), weak.clone());
            Box::pin(async move {
                let handle = weak.upgrade().ok_or("the gateway is gone")?;
                part.bind(&handle).await
            })
        });
        let supervised = Supervised::start(label, first, bind, Policy::default(), handle.clock().clone());
        Self { part, supervised }
    }
}

/// The hub's housekeeping, for as long as the gateway runs.
async fn keep_house(hub: Hub, shutdown: watch::Receiver<bool>) {
    loop {
        let mut task = JoinSet::new();
        let (hub, shutdown_once) = (hub.clone(), shutdown.clone());
        task.spawn(async move { hub.run(shutdown_once).await });
        let ended = task.join_next().await;
        if *shutdown.borrow() || shutdown.has_changed().is_err() {
            return;
        }
        error!(?ended, "the hub's housekeeping failed and is started again");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn publish_running(handle: &Handle, running: &[Running], former: Vec<Arc<dyn Observe>>) {
    let running = running.iter().map(|running| running.supervised.observe());
    handle.set_running(running.chain(former).collect());
}

/// Lets go of upstreams that `config` does not have; returns those for which something waits.
fn let_go(handle: &Handle, config: &Config) -> Vec<Arc<dyn Observe>> {
    let former = bridge::let_go(handle.hub(), &upstream_names(config));
    former.into_iter().map(|former| Arc::new(former) as Arc<dyn Observe>).collect()
}

fn upstream_names(config: &Config) -> Vec<&str> {
    config.upstreams.iter().map(|upstream| upstream.name.as_str()).collect()
}

/// Stops components rank by rank, the outermost first; those of one rank together.
async fn stop_ranks(mut running: Vec<Running>, deadline: Instant) {
    let ranks: BTreeSet<Rank> = running.iter().map(|running| running.part.rank()).collect();
    for rank in ranks.into_iter().rev() {
        let (now, later): (Vec<_>, Vec<_>) = running.into_iter().partition(|running| running.part.rank() == rank);
        running = later;
        now.iter().for_each(|running| running.supervised.begin_stop());
        let rank_deadline = deadline.min(Instant::now() + DRAIN_RANK);
        for Running { supervised, .. } in now {
            supervised.stop(rank_deadline).await;
        }
    }
}

/// Takes over changed users and rules; they bind whoever is connected at once.
fn apply_access(handle: &Handle, old: &Config, new: &Config) -> Vec<String> {
    if old.hub.access == new.hub.access {
        return Vec::new();
    }
    handle.hub().set_access(new.hub.access.clone());
    vec!["users and rules taken over".to_owned()]
}

/// Makes the difference between two configurations happen, and says what it was.
async fn apply(handle: &Arc<Handle>, running: &mut Vec<Running>, old: &Config, new: &Config) -> Vec<String> {
    let mut changes = apply_access(handle, old, new);
    for (changed, what) in [
        (old.name != new.name, "gateway.name"),
        (old.store != new.store, "store"),
        (old.hub.limits != new.hub.limits, "limits"),
        (old.log != new.log, "log"),
    ] {
        if changed {
            warn!(section = what, "changed, and takes effect at the next restart");
            changes.push(format!("{what} takes effect at the next restart"));
        }
    }
    let wanted = part::parts(new);
    let (keep, stop): (Vec<_>, Vec<_>) = running.drain(..).partition(|running| wanted.contains(&running.part));
    *running = keep;
    running.iter().for_each(|running| running.supervised.reread());
    for Running { part, .. } in &stop {
        let still_wanted = wanted.iter().any(|wanted| wanted.label() == part.label());
        changes.push(format!("{} {}", part.describe(), if still_wanted { "restarted" } else { "stopped" }));
    }
    let stopped: Vec<_> = stop.iter().map(|running| running.part.label()).collect();
    stop_ranks(stop, Instant::now() + DRAIN).await;
    for part in wanted {
        if running.iter().any(|running| running.part == part) {
            continue;
        }
        if !stopped.contains(&part.label()) {
            changes.push(format!("{} started", part.describe()));
        }
        let first = part.bind(handle).await;
        if let Err(failure) = &first {
            let problem = describe(&**failure);
            error!(part = part.describe(), problem, "cannot start with the new configuration");
            changes.push(format!("{} cannot start: {problem}", part.describe()));
        }
        running.push(Running::start(part, first, handle));
    }
    running.sort_by_key(|running| running.part.rank());
    handle.keep_upstreams(&upstream_names(new));
    publish_running(handle, running, let_go(handle, new));
    for change in &changes {
        info!(change, "configuration reloaded");
    }
    changes
}
