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
//! | `backoff` `words` `marks` | when to try again, what refusals mean, what is written on messages; pure |
//! | `uplink` | the task: connect, stream, wait, again; pause |
//! | `dial` `proxy` `handshake` `stream` `inbound` | one connection: TCP, proxy, TLS, WebSocket, CONNECT, messages |
//! | `condition` | what people and scrapes see |
//!
//! Deliberately absent: mapping of response topics (a reply goes where the request says, on this side), and more than
//! one delivery where several rules match one message.

pub mod backoff;
mod condition;
mod dial;
mod handshake;
mod inbound;
mod marks;
pub mod proxy;
pub mod rules;
mod settings;
mod stream;
mod uplink;
pub mod url;
mod words;

use std::sync::Arc;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{Notify, watch};

use crate::hub::access::Identity;
use crate::hub::{
    Attach, AttachError, Face, Hub, Link, Precedence, QueueLimits, RetainHandling, SessionExpiry, SubscribeError,
    SubscribeOptions,
};
use crate::observe::{Metrics, Observe, Status};
use crate::topic::SharedFilter;
use condition::{Condition, Counters, Shared};

pub use condition::{DropReason, Phase};
pub use settings::{AddressOrder, Checked, Settings, SettingsError, VersionChoice};

/// One upstream, bound: its session exists and keeps what is published from now on.
pub struct Upstream {
    settings: Settings,
    rules: Checked,
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
            hub,
            paused: watch::Sender::new(false),
            changed: Notify::new(),
            counters: Counters::default(),
        });
        let upstream = Self { settings, rules, shared };
        let mut link = upstream.attach(1, None)?;
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
        self.shared.hub.attach(Attach {
            face: Face::Upstream,
            client_id: self.shared.session.clone(),
            identity: Identity::gateway(),
            clean_start: false,
            expiry: SessionExpiry::Never,
            will: None,
            receive_maximum: receive_maximum.min(self.settings.max_inflight),
            peer,
            queue: self.settings.queue,
        })
    }

    /// Makes the session's subscriptions those of the `out` rules.
    fn subscribe(&self, link: &mut Link) -> Result<(), BindError> {
        let rules = &self.rules.outgoing;
        for old in link.subscriptions() {
            if old.group.is_some() || rules.iter().all(|rule| rule.filter != old.filter) {
                link.unsubscribe(&old);
            }
        }
        for rule in rules.iter() {
            // Two rules may share a filter; the session then gets what the higher QoS lets through.
            let same = rules.iter().filter(|other| other.filter == rule.filter);
            let options = SubscribeOptions {
                qos: same.map(|other| other.qos).max().unwrap_or(rule.qos),
                no_local: true,
                retain_as_published: true,
                retain_handling: RetainHandling::SendIfNew,
                identifier: None,
                precedence: Precedence::default(),
            };
            let filter = SharedFilter { group: None, filter: rule.filter.clone() };
            link.subscribe(&filter, options)
                .map_err(|source| BindError::Subscribe { filter: rule.filter.to_string(), source })?;
        }
        Ok(())
    }
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

    pub fn is_paused(&self) -> bool {
        *self.shared.paused.borrow()
    }

    /// Cuts the upstream, or restores it at once. What is published while it is cut waits in its queue.
    pub fn set_paused(&self, paused: bool) {
        self.shared.paused.send_if_modified(|now| std::mem::replace(now, paused) != paused);
    }

    /// What the upstream is doing.
    pub fn phase(&self) -> Phase {
        self.shared.condition.lock().phase
    }

    /// Messages and bytes that wait for the upstream.
    pub fn queued(&self) -> (u64, u64) {
        self.shared.queued()
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
    paused: watch::Receiver<bool>,
}

impl Stop {
    /// Waits until the upstream is to be cut or stopped.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    async fn asked(&mut self) {
        tokio::select! {
            () = becomes(&mut self.shutdown, true) => {}
            () = becomes(&mut self.paused, true) => {}
        }
    }

    fn is_shutdown(&self) -> bool {
        *self.shutdown.borrow() || self.shutdown.has_changed().is_err()
    }

    fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }
}

/// Waits until the channel holds `wanted`, or nobody can change it any more.
async fn becomes(receiver: &mut watch::Receiver<bool>, wanted: bool) {
    while *receiver.borrow_and_update() != wanted {
        if receiver.changed().await.is_err() {
            return;
        }
    }
}
