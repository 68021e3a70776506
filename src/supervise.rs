//! Keeps components running: start, restart after a fault, stop within a bound.
//!
//! A component is a way to bind it (open its sockets, ports and files) and a task to run. When the task ends before it
//! was told to, or panics, that component alone is bound and run again, after a growing delay and without ever giving
//! up: a gateway in the field has nobody who would start it again. Meanwhile its status says what is wrong.

#[cfg(panic = "abort")]
compile_error!("a panic must unwind: supervise restarts the component it happened in, and nothing else");

use std::any::Any;
use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{error, info, warn};

use crate::clock::Clock;
use crate::observe::{Health, Kind, Metrics, Observe, Status};

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
pub type Failure = Box<dyn Error + Send + Sync>;
/// Reads a component's files again.
type Reread = Arc<dyn Fn() + Send + Sync>;
/// Opens what a component needs; called again for every restart.
pub type Bind = Box<dyn Fn() -> BoxFuture<'static, Result<Bound, Failure>> + Send + Sync>;

/// A component that is bound and not yet running.
pub struct Bound {
    observe: Option<Arc<dyn Observe>>,
    reread: Option<Reread>,
    run: Box<dyn FnOnce(watch::Receiver<bool>) -> BoxFuture<'static, ()> + Send>,
}

impl Bound {
    /// `run` works until its receiver holds true, then cleans up and returns.
    pub fn new<F>(
        observe: Option<Arc<dyn Observe>>,
        run: impl FnOnce(watch::Receiver<bool>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self { observe, reread: None, run: Box::new(move |shutdown| Box::pin(run(shutdown))) }
    }

    /// `reread` reads again what the component reads of files besides its settings, such as certificates; it is quick.
    #[must_use]
    pub fn rereading(self, reread: impl Fn() + Send + Sync + 'static) -> Self {
        Self { reread: Some(Arc::new(reread)), ..self }
    }
}

/// How a component is restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The wait before the first restart; doubled for each further one.
    pub first_delay: Duration,
    pub max_delay: Duration,
    /// A component that ran this long is healthy: its next fault starts with `first_delay` again.
    pub stable_after: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            first_delay: Duration::from_millis(500),
            max_delay: Duration::from_secs(60),
            stable_after: Duration::from_secs(60),
        }
    }
}

/// What a component is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    pub kind: Kind,
    /// As in the configuration.
    pub name: String,
}

/// A component under care. Dropping it ends the component at once.
pub struct Supervised {
    slot: Arc<Slot>,
    stop: watch::Sender<bool>,
    task: JoinSet<()>,
}

impl Supervised {
    /// Runs `first`, what the component was bound to already, and binds it again with `bind` whenever it fails.
    pub fn start(label: Label, first: Result<Bound, Failure>, bind: Bind, policy: Policy, clock: Clock) -> Self {
        let slot = Arc::new(Slot {
            label,
            clock,
            restarts: AtomicU64::new(0),
            reread: Mutex::new(None),
            state: Mutex::new(State::Idle),
        });
        let (stop, stopped) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(tend(slot.clone(), first, bind, policy, stopped));
        Self { slot, stop, task }
    }

    pub fn observe(&self) -> Arc<dyn Observe> {
        self.slot.clone()
    }

    /// Lets the component read its files again; it goes on running.
    pub fn reread(&self) {
        let reread = self.slot.reread.lock().clone();
        if let Some(reread) = reread {
            reread();
        }
    }

    /// Tells the component to stop; returns at once.
    pub fn begin_stop(&self) {
        let _ = self.stop.send(true);
    }

    /// Stops the component and waits for it, at most until `deadline`; then it is cut off.
    pub async fn stop(mut self, deadline: Instant) {
        self.begin_stop();
        if timeout_at(deadline, self.task.join_next()).await.is_err() {
            let Label { kind, name } = &self.slot.label;
            warn!(component = kind.name(), name, "did not stop in time and was cut off");
        }
    }
}

/// The life of one component.
async fn tend(
    slot: Arc<Slot>,
    first: Result<Bound, Failure>,
    bind: Bind,
    policy: Policy,
    mut stop: watch::Receiver<bool>,
) {
    let (component, name) = (slot.label.kind.name(), slot.label.name.clone());
    let mut next = first;
    let mut delay = policy.first_delay;
    loop {
        let fault = match next {
            Ok(bound) => {
                let started = Instant::now();
                *slot.reread.lock() = bound.reread;
                slot.set(bound.observe.map_or(State::Idle, State::Running));
                let fault = run_once(bound.run, &mut stop).await;
                if *stop.borrow() {
                    if let Fault::Panicked(message) = &fault {
                        error!(component, name, message, "panicked while stopping");
                    }
                    slot.set(State::Idle);
                    return;
                }
                if started.elapsed() >= policy.stable_after {
                    delay = policy.first_delay;
                }
                fault
            }
            Err(failure) => Fault::NotBound(describe(&*failure)),
        };
        let reason = format!("{fault}; restarts in {delay:?}");
        match &fault {
            Fault::NotBound(_) => warn!(component, name, %fault, retry_in = ?delay, "cannot start"),
            Fault::Ended | Fault::Panicked(_) => error!(component, name, %fault, retry_in = ?delay, "failed"),
        }
        slot.set(State::Failed { reason, since: slot.clock.now() });
        tokio::select! {
            () = sleep(delay) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        delay = (delay * 2).min(policy.max_delay);
        slot.restarts.fetch_add(1, Ordering::Relaxed);
        next = tokio::select! {
            bound = bind() => bound,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        if next.is_ok() {
            info!(component, name, "started again");
        }
    }
}

/// Runs the task to its end, in a task of its own so that a panic ends there.
async fn run_once(
    run: Box<dyn FnOnce(watch::Receiver<bool>) -> BoxFuture<'static, ()> + Send>,
    stop: &mut watch::Receiver<bool>,
) -> Fault {
    let mut task = JoinSet::new();
    let shutdown = stop.clone();
    task.spawn(async move { run(shutdown).await });
    match task.join_next().await {
        Some(Err(error)) if error.is_panic() => Fault::Panicked(panic_message(&*error.into_panic())),
        _ => Fault::Ended,
    }
}

#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("it ended by itself")]
    Ended,
    #[error("a fault in the program: {0}")]
    Panicked(String),
    #[error("{0}")]
    NotBound(String),
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into())
}

/// An error with everything that caused it, in one line.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Where a component is looked at, whether it runs or not.
struct Slot {
    label: Label,
    clock: Clock,
    restarts: AtomicU64,
    /// Of the component as it is bound now.
    reread: Mutex<Option<Reread>>,
    state: Mutex<State>,
}

enum State {
    /// Nothing to say: not started, stopped, or a component that has no status.
    Idle,
    Running(Arc<dyn Observe>),
    Failed {
        reason: String,
        since: crate::clock::UnixMillis,
    },
}

impl Slot {
    fn set(&self, state: State) {
        *self.state.lock() = state;
    }

    fn running(&self) -> Option<Arc<dyn Observe>> {
        match &*self.state.lock() {
            State::Running(observe) => Some(observe.clone()),
            _ => None,
        }
    }
}

impl Observe for Slot {
    fn statuses(&self) -> Vec<Status> {
        if let Some(observe) = self.running() {
            return observe.statuses();
        }
        match &*self.state.lock() {
            State::Failed { reason, since } => vec![Status {
                kind: self.label.kind,
                name: self.label.name.clone(),
                parent: None,
                health: Health::Down,
                reason: Some(reason.clone()),
                since: *since,
                facts: Vec::new(),
            }],
            _ => Vec::new(),
        }
    }

    fn collect(&self, metrics: &mut Metrics) {
        if let Some(observe) = self.running() {
            observe.collect(metrics);
        }
        let labels = [("kind", self.label.kind.name()), ("name", self.label.name.as_str())];
        let restarts = self.restarts.load(Ordering::Relaxed);
        metrics.counter("fieldgate_component_restarts_total", "Restarts after a fault.", &labels, restarts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn label() -> Label {
        Label { kind: Kind::Adapter, name: "bus".into() }
    }

    fn start(bind: impl Fn(u32) -> Result<Bound, Failure> + Send + Sync + 'static) -> (Supervised, Arc<AtomicU32>) {
        let count = Arc::new(AtomicU32::new(0));
        let counter = count.clone();
        let bind: Bind = Box::new(move || {
            let bound = bind(counter.fetch_add(1, Ordering::SeqCst));
            Box::pin(async move { bound })
        });
        let first = Err("not yet".into());
        (Supervised::start(label(), first, bind, Policy::default(), Clock::start("test")), count)
    }

    async fn until_stopped(mut shutdown: watch::Receiver<bool>) {
        let _ = shutdown.wait_for(|stop| *stop).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_component_that_panics_or_ends_is_restarted_with_growing_delays() {
        let began = Instant::now();
        let (supervised, count) = start(|round| match round {
            0 => Ok(Bound::new(None, |_| async { panic!("boom") })),
            1 => Ok(Bound::new(None, |_| async {})),
            2 => Err("the port is gone".into()),
            _ => Ok(Bound::new(None, until_stopped)),
        });
        while count.load(Ordering::SeqCst) < 4 {
            sleep(Duration::from_millis(10)).await;
        }
        let waited = began.elapsed().as_millis();
        assert!((7500..7600).contains(&waited), "0.5 + 1 + 2 + 4 s, was {waited} ms");
        supervised.stop(Instant::now() + Duration::from_secs(1)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_component_says_why_and_when_it_restarts() {
        let (supervised, _) = start(|_| Err("the port is gone".into()));
        sleep(Duration::from_millis(600)).await;
        let statuses = supervised.observe().statuses();
        assert_eq!(statuses.len(), 1);
        assert_eq!(statuses[0].health, Health::Down);
        assert_eq!(statuses[0].reason.as_deref(), Some("the port is gone; restarts in 1s"));
        let mut metrics = Metrics::default();
        supervised.observe().collect(&mut metrics);
        let expected = "fieldgate_component_restarts_total{kind=\"adapter\",name=\"bus\"} 1";
        assert!(metrics.render().contains(expected));
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_run_forgives_earlier_faults() {
        let (supervised, count) = start(|round| match round {
            0 | 1 => Ok(Bound::new(None, |_| async {})),
            2 => Ok(Bound::new(None, |_| sleep(Duration::from_secs(61)))),
            _ => Ok(Bound::new(None, until_stopped)),
        });
        while count.load(Ordering::SeqCst) < 3 {
            sleep(Duration::from_millis(10)).await;
        }
        let began = Instant::now();
        while count.load(Ordering::SeqCst) < 4 {
            sleep(Duration::from_millis(10)).await;
        }
        assert!(began.elapsed() < Duration::from_secs(62), "restarted after the first delay");
        supervised.stop(Instant::now() + Duration::from_secs(1)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_component_that_does_not_stop_is_cut_off_at_the_deadline() {
        let bound = Bound::new(None, |_| std::future::pending());
        let bind: Bind = Box::new(|| Box::pin(async { Err("unused".into()) }));
        let supervised = Supervised::start(label(), Ok(bound), bind, Policy::default(), Clock::start("test"));
        let began = Instant::now();
        supervised.stop(began + Duration::from_millis(700)).await;
        assert_eq!(began.elapsed(), Duration::from_millis(700));
    }
}
