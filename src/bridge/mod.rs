//! Upstreams: the client side of MQTT, over TLS, fed by a durable session.
//!
//! Each upstream is a component of its own: a session on the hub, whose durable queue is the store-and-forward buffer,
//! and a task that connects to the upstream and streams that queue. Nothing is kept here that must survive: what was
//! not acknowledged is still in the session. Messages from the upstream enter the hub through the same session, so that
//! they are not sent back.
//!
//! | file | what |
//! | --- | --- |
//! | `settings` `rules` `url` | what the operator says, checked; pure |
//! | `backoff` `schedule` | when to try again, and when at all; pure |
//! | `rate` `drain` | how fast to send, and when a backlog will be gone; pure |
//! | `sas` `words` | Azure's passwords, what refusals mean; pure |
//! | `marks` `origin` | what is written on messages; pure |
//! | `uplink` `terms` | the task: connect on the upstream's terms, stream, wait, again |
//! | `dial` `proxy` `handshake` `stream` | one connection: TCP, proxy, TLS, WebSocket, CONNECT, messages |
//! | `condition` `reporter` | what people and scrapes see |
//! | `manners` | what is said before messages flow, and what of it an upstream closes the connection on; pure |
//! | `suspicion` `trial` | which message an upstream may keep closing the connection on, and the proof of it; pure |
//! | `former` | what waits for upstreams that are not configured any more |
//!
//! Deliberately absent: mapping of response topics (a reply goes where the request says, on this side), and more than
//! one delivery where several rules match one message.

pub mod backoff;
mod condition;
mod dial;
mod drain;
mod former;
mod handshake;
mod manners;
mod marks;
mod origin;
pub mod proxy;
pub mod rate;
mod reporter;
pub mod rules;
pub mod sas;
pub mod schedule;
mod settings;
mod stream;
mod suspicion;
mod terms;
mod trial;
mod uplink;
pub mod url;
mod words;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

use crate::clock::Clock;
use crate::hub::access::Identity;
use crate::hub::{
    Attach, AttachError, Face, Hub, Link, QueueLimits, RetainHandling, SessionExpiry, SubscribeError, SubscribeOptions,
};
use crate::observe::{Metrics, Observe, Status};
use crate::topic::SharedFilter;
use condition::{Condition, Counters, Shared, Wish};
use schedule::Window;

pub use condition::{DropReason, Phase};
pub use drain::Progress;
pub use former::{Former, let_go};
pub use settings::{AddressOrder, Checked, Connection, Settings, SettingsError, VersionChoice};

/// One upstream, bound: its session exists and keeps what is published from now on.
pub struct Upstream {
    settings: Settings,
    rules: Checked,
    /// The session was made now: whatever the upstream remembers of an earlier one does not fit it.
    is_new: bool,
    shared: Arc<Shared>,
}

/// Why an upstream cannot be bound.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("the settings of the upstream cannot be used")]
    Settings(#[from] SettingsError),
    #[error("the upstream's session cannot be made")]
    Session(#[from] AttachError),
    #[error("the upstream's session cannot subscribe to `{filter}`")]
    Subscribe { filter: String, source: SubscribeError },
}

impl Upstream {
    /// Makes the upstream's session on `hub`, or takes up the stored one, and lets it subscribe to what the `out` rules
    /// want. Opens no connection.
    ///
    /// # Errors
    /// [`BindError`]: the settings, or a limit of the hub.
    pub fn bind(settings: Settings, gateway: &str, hub: Hub) -> Result<Self, BindError> {
        let rules = settings.check(gateway)?;
        let shared = Arc::new(Shared {
            name: settings.name.clone(),
            session: settings.name.as_str().into(),
            condition: Mutex::new(Condition::new(hub.clock().now())),
            tls: Mutex::new(None),
            hub,
            connection: settings.connection.clone(),
            wish: watch::Sender::new(Wish::AsConfigured),
            changed: Notify::new(),
            counters: Counters::default(),
            told_of_version: AtomicBool::new(false),
        });
        let mut upstream = Self { settings, rules, is_new: false, shared };
        let mut link = upstream.attach(1, None)?;
        upstream.is_new = !link.session_present();
        upstream.subscribe(&mut link)?;
        link.detach(false, None);
        Ok(upstream)
    }

    /// What others see of the upstream and do to it while it runs.
    pub fn handle(&self) -> Handle {
        Handle { shared: self.shared.clone(), limits: self.settings.queue }
    }

    /// Keeps the upstream connected until `shutdown` holds true, then takes leave of it.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        uplink::run(self, shutdown).await;
    }

    fn attach(&self, receive_maximum: u16, peer: Option<String>) -> Result<Link, AttachError> {
        let receive_maximum = receive_maximum.min(self.settings.max_inflight);
        attach(&self.shared.hub, &self.shared.session, receive_maximum, self.settings.queue, peer)
    }

    /// Makes the session's subscriptions those of the `out` rules.
    fn subscribe(&self, link: &mut Link) -> Result<(), BindError> {
        let rules = &self.rules.outgoing;
        for old in link.subscriptions() {
            if old.group.is_some() || rules.iter().all(|rule| rule.filter != old.filter) {
                link.unsubscribe(&old);
            }
        }
        for (priority, share) in &self.rules.live_shares {
            link.set_live_share(*priority, *share);
        }
        for rule in rules.iter() {
            // Two rules may share a filter; the session then gets what the higher QoS lets through, and the first decides
            // over the rest.
            let first = rules.iter().position(|other| other.filter == rule.filter).unwrap_or_default();
            let same = rules.iter().filter(|other| other.filter == rule.filter);
            let options = SubscribeOptions {
                qos: same.map(|other| other.qos).max().unwrap_or(rule.qos),
                no_local: true,
                retain_as_published: true,
                retain_handling: RetainHandling::SendIfNew,
                identifier: None,
                precedence: self.settings.precedence(first),
            };
            let filter = SharedFilter { group: None, filter: rule.filter.clone() };
            link.subscribe(&filter, options)
                .map_err(|source| BindError::Subscribe { filter: rule.filter.to_string(), source })?;
        }
        Ok(())
    }
}

/// Attaches to the session of the upstream `name`, which is made where there is none.
fn attach(
    hub: &Hub,
    name: &Arc<str>,
    receive_maximum: u16,
    queue: Option<QueueLimits>,
    peer: Option<String>,
) -> Result<Link, AttachError> {
    hub.attach(Attach {
        face: Face::Upstream,
        client_id: name.clone(),
        identity: Identity::gateway(),
        clean_start: false,
        expiry: SessionExpiry::Never,
        will: None,
        receive_maximum,
        peer,
        version: None,
        queue,
    })
}

/// A hold on a running upstream; cheap to clone.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    limits: Option<QueueLimits>,
}

impl Handle {
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether it connects only if the operator says so.
    pub fn is_paused(&self) -> bool {
        match *self.shared.wish.borrow() {
            Wish::Cut => true,
            Wish::Connect => false,
            Wish::AsConfigured => self.shared.connection == Connection::Manual,
        }
    }

    /// Cuts the upstream, or restores it: at once, or when the configuration says so. What is published while it is cut
    /// waits in its queue.
    pub fn set_paused(&self, paused: bool) {
        self.shared.wish(match self.shared.connection {
            _ if paused => Wish::Cut,
            Connection::Manual => Wish::Connect,
            _ => Wish::AsConfigured,
        });
    }

    /// Connects now, also where the configuration says later; a lazy or scheduled one until nothing more crosses.
    pub fn connect(&self) {
        if self.phase() != Phase::Connected {
            self.shared.wish(Wish::Connect);
        }
    }

    /// Takes over what the operator wanted of `former`, which this one replaces.
    pub fn succeed(&self, former: &Self) {
        let wish = *former.shared.wish.borrow();
        self.shared.wish(wish);
    }

    /// What the upstream is doing.
    pub fn phase(&self) -> Phase {
        self.shared.condition.lock().phase
    }

    /// When it is to be connected, in the word of the configuration.
    pub fn connection(&self) -> &'static str {
        self.shared.connection.name()
    }

    /// Messages and bytes that wait for the upstream.
    pub fn queued(&self) -> (u64, u64) {
        self.shared.queued()
    }

    /// Messages that did not cross since the start, by reason.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        self.shared.drops()
    }

    /// How its backlog goes, while it has one and is connected.
    pub fn progress(&self) -> Option<Progress> {
        self.shared.condition.lock().progress
    }

    /// Limits of its queue.
    pub fn limits(&self) -> QueueLimits {
        self.limits.unwrap_or(self.shared.hub.limits().queue)
    }
}

impl Observe for Handle {
    fn statuses(&self) -> Vec<Status> {
        self.shared.statuses()
    }

    fn collect(&self, metrics: &mut Metrics) {
        self.shared.collect(metrics);
    }
}

/// When the connection must end although nothing is wrong with it.
#[derive(Clone)]
struct Stop {
    shutdown: watch::Receiver<bool>,
    wish: watch::Receiver<Wish>,
    connection: Connection,
    clock: Clock,
    /// When the connection is to be made anew, because what it was made with ends.
    renew_at: Option<Instant>,
}

/// The longest that a window is waited for without another look at the clock, which may be set meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

impl Stop {
    /// Waits until the upstream is to be cut, stopped or connected anew, or its window closes.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    async fn asked(&mut self) {
        loop {
            let wish = *self.wish.borrow_and_update();
            let left = match (wish, &self.connection) {
                (Wish::Cut, _) | (Wish::AsConfigured, Connection::Manual) => return,
                (Wish::AsConfigured, Connection::Scheduled(schedule)) => {
                    let now = self.clock.now();
                    let Window::Open { until } = schedule.at(now) else { return };
                    until.since(now).min(LOOK_AGAIN)
                }
                _ => LOOK_AGAIN,
            };
            let renewal = self.renew_at.map_or(left, |at| at.saturating_duration_since(Instant::now()));
            if renewal.is_zero() {
                return;
            }
            tokio::select! {
                () = becomes_true(&mut self.shutdown) => return,
                changed = self.wish.changed() => if changed.is_err() { return },
                () = sleep(left.min(renewal)) => {}
            }
        }
    }

    fn is_shutdown(&self) -> bool {
        *self.shutdown.borrow() || self.shutdown.has_changed().is_err()
    }
}

/// Waits until the channel holds true, or nobody can change it any more.
async fn becomes_true(receiver: &mut watch::Receiver<bool>) {
    let _ = receiver.wait_for(|value| *value).await;
}
