//! The hub: everything that receives messages is a session here.
//!
//! Access rules, the subscription tree, retained messages, sessions and their queues. Routing runs on the publisher's
//! task under short locks; there is no central actor. What must survive goes to the [`Store`] as it happens, and an
//! acknowledgement waits for its [`Receipt`] (promise 1 in the crate's map).
//!
//! Locks are taken in this order, and none is held across an `.await`: sessions, one session's state, routes, rights.

pub mod access;
mod admission;
mod again;
mod attach;
mod attachment;
mod bridged;
mod delivery;
mod expiry;
mod housekeeping;
mod link;
mod memory;
mod pressure;
mod purge;
mod queue;
mod report;
mod restore;
mod retained;
mod routes;
mod session;
mod settings;
mod sys;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use thiserror::Error;

use crate::clock::{Clock, UnixMillis};
use crate::message::{Message, QoS};
use crate::store::{self, Due, Op, Opened, Receipt, Store};
use crate::topic::SharedFilter;
use access::Access;
use attach::WillDue;
use delivery::Subscriber;
use memory::Memory;
use retained::{Change, Retained};
use routes::Routes;
use session::{Session, submit};

pub use admission::{Admission, Place, Refused};
pub use attach::AttachError;
pub use attachment::Fate;
pub use link::{Link, Outcome, Publish, Refusal, Released, SubscribeError, Subscribed};
pub use pressure::Pressure;
pub use queue::{
    Delivery, Order, Outbound, PacketId, Precedence, Priority, QueueLimits, Unanswered, WhenFull, stream_name,
};
pub use report::{Counters, Drops, Losses, SessionSummary, Traffic};
pub use session::{Face, SessionExpiry};
pub use settings::{Attach, Limits, RetainHandling, Settings, SubscribeOptions, Will};

/// Why the hub cannot take up what the store holds.
#[derive(Debug, Error)]
#[error("the stored sessions and retained messages cannot be read")]
pub struct RestoreError(#[from] crate::store::ReadError);

/// Sessions that begin while it is not known which ones are stored have numbers from here on, as none of those has: they
/// are not journaled.
const FIRST_UNSTORED: u64 = 1 << 62;

/// Client ids are unique within a face.
type SessionKey = (Face, Arc<str>);

/// Whether it is known what the store holds.
#[derive(Debug, Default)]
struct Readiness {
    /// Its disk cannot be used yet.
    awaits_store: AtomicBool,
    /// What it holds is being taken up; no session begins meanwhile.
    takes_up: AtomicBool,
}

/// A handle to the hub; every clone is the same hub.
#[derive(Clone, Debug)]
pub struct Hub(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    clock: Clock,
    store: Option<Store>,
    readiness: Readiness,
    memory: Arc<Memory>,
    admission: Arc<Admission>,
    access: RwLock<Arc<Access>>,
    routes: RwLock<Routes<Subscriber>>,
    /// Grows with every change of routes or rights: what was looked up under another version is stale.
    version: AtomicU64,
    retained: RwLock<Retained>,
    sessions: Mutex<HashMap<SessionKey, Arc<Session>>>,
    next_session: AtomicU64,
    next_attachment: AtomicU64,
    counters: Counters,
    /// Of each listener there is or was: what has been counted stays.
    traffic: Mutex<Vec<Arc<Traffic>>>,
}

impl Hub {
    /// A hub with what `store` holds: sessions with their queues, and retained messages. Without a store nothing
    /// survives the process.
    ///
    /// # Errors
    /// [`RestoreError`] when the database cannot be read.
    pub fn new(settings: Settings, clock: Clock, store: Option<Opened>) -> Result<Self, RestoreError> {
        let mut sessions = Vec::new();
        let mut retained = Retained::default();
        let mut running = None;
        if let Some(mut opened) = store {
            sessions = opened.sessions()?;
            opened.retained(&mut |message| {
                retained.set(Arc::new(message));
            })?;
            running = Some(opened.run()?);
        }
        let next_session = restore::first_after(&sessions);
        let hub = Self::make(settings, clock, running, retained, next_session);
        for stored in sessions {
            if let Some(estate) = hub.restore(stored) {
                hub.settle(estate);
            }
        }
        Ok(hub)
    }

    /// A hub whose store cannot be opened for `problem`, for as long as that lasts. It serves what needs no disk: QoS 0,
    /// and sessions that are new and end with their connection. It is not known which stored session wants a message of
    /// QoS 1 or 2, so none is accepted.
    ///
    /// # Errors
    /// As [`Store::wait`].
    pub fn waiting(
        settings: Settings,
        clock: Clock,
        store: store::Settings,
        problem: &store::OpenError,
    ) -> Result<Self, RestoreError> {
        let (sender, take_up) = std::sync::mpsc::channel::<store::TakeUp>();
        let store = Store::wait(store, clock.clone(), problem, take_up)?;
        let hub = Self::make(settings, clock, Some(store), Retained::default(), FIRST_UNSTORED);
        hub.0.readiness.awaits_store.store(true, Ordering::SeqCst);
        let weak = Arc::downgrade(&hub.0);
        let taken_up = sender.send(Box::new(move |contents| {
            if let Some(shared) = weak.upgrade() {
                Self(shared).take_up(contents);
            }
        }));
        taken_up.expect("the store's thread waits for it");
        Ok(hub)
    }

    fn make(settings: Settings, clock: Clock, store: Option<Store>, retained: Retained, next_session: u64) -> Self {
        Self(Arc::new(Shared {
            memory: Memory::new(settings.limits.max_queue_memory),
            admission: Admission::new(settings.limits.addresses.clone(), settings.limits.max_connections),
            limits: settings.limits,
            clock,
            store,
            readiness: Readiness::default(),
            access: RwLock::new(Arc::new(Access::new(settings.access))),
            routes: RwLock::default(),
            version: AtomicU64::new(1),
            retained: RwLock::new(retained),
            sessions: Mutex::default(),
            next_session: AtomicU64::new(next_session),
            next_attachment: AtomicU64::new(1),
            counters: Counters::default(),
            traffic: Mutex::default(),
        }))
    }

    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    pub fn store(&self) -> Option<&Store> {
        self.0.store.as_ref()
    }

    /// Whether it is not known yet what the store holds.
    fn awaits_store(&self) -> bool {
        self.0.readiness.awaits_store.load(Ordering::Acquire)
    }

    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Which connections are taken, on whatever listener.
    pub fn admission(&self) -> &Arc<Admission> {
        &self.0.admission
    }

    pub fn access(&self) -> Arc<Access> {
        self.0.access.read().clone()
    }

    /// Takes over changed users and rules. Connected clients keep their connection where their user still exists, under
    /// the new rules; others are disconnected.
    pub fn set_access(&self, settings: access::Settings) {
        let access = Arc::new(Access::new(settings));
        *self.0.access.write() = access.clone();
        let sessions: Vec<_> = self.0.sessions.lock().values().cloned().collect();
        for session in sessions {
            *session.rights.write() = access.rights(&session.identity, &session.client_id);
            if !access.knows(&session.identity) {
                let mut state = session.state.lock();
                session.condemn(&mut state, Fate::Kicked);
                self.after_detach(&session, state, WillDue::Yes);
            }
        }
        self.changed();
    }

    /// Publishes a message of the gateway's own: adapters' readings, state topics. No rule binds it, and a retained one
    /// is kept in memory only, as its source publishes it again after a start.
    pub fn publish(&self, mut message: Message) {
        message.accepted_at = self.now();
        let message = Arc::new(message);
        if message.retain {
            self.0.retained.write().set(message.clone());
        }
        self.route(message);
    }

    /// Publishes a will, if the rules let its client publish it.
    fn publish_will(&self, session: &Session, will: Will) {
        let mut message = will.message;
        if !session.rights.read().may_write(message.topic.as_str()) {
            self.0.counters.denied_publish.fetch_add(1, Ordering::Relaxed);
            return;
        }
        message.accepted_at = self.now();
        let message = Arc::new(message);
        if message.retain {
            let mut ops = Vec::new();
            self.retain(&message, None, &mut ops);
            submit(self.store(), &mut ops, Due::Now);
        }
        self.route(message);
    }

    fn route(&self, message: Arc<Message>) {
        self.0.counters.received.fetch_add(1, Ordering::Relaxed);
        // There is nobody to refuse it to, and stored sessions that want it cannot have it.
        let is_lost = message.qos != QoS::AtMostOnce && self.awaits_store();
        self.0.counters.dropped.store_full.fetch_add(u64::from(is_lost), Ordering::Relaxed);
        let targets = self.targets(message.topic.as_str());
        self.deliver(&targets, &[(message, None)], None, &mut Vec::new());
    }

    fn now(&self) -> UnixMillis {
        self.0.clock.now()
    }

    /// Routes or rights have changed: what publishers have looked up is stale.
    fn changed(&self) {
        self.0.version.fetch_add(1, Ordering::AcqRel);
    }

    /// Replaces the topic's retained message and journals it; false when there is no room for another one.
    fn retain(&self, message: &Arc<Message>, receipt: Option<&Arc<Receipt>>, ops: &mut Vec<Op>) -> bool {
        let mut retained = self.0.retained.write();
        let limits = &self.0.limits;
        let grows = !message.payload.is_empty() && !retained.contains(message.topic.as_str());
        if grows && retained.len() >= limits.max_retained_messages
            || !message.payload.is_empty() && retained.bytes() + message.size() > limits.max_retained_bytes
        {
            self.0.counters.dropped_retained_full.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let change = retained.set(message.clone());
        // What is not known yet may be there to be removed.
        let is_moot = change == Change::Nothing && !self.awaits_store();
        if self.0.store.is_none() || message.topic.is_reserved() || is_moot {
            return true;
        }
        if let Some(receipt) = receipt {
            receipt.add();
        }
        ops.push(match change {
            Change::Stored => Op::PutRetained(message.clone(), receipt.cloned()),
            Change::Removed | Change::Nothing => Op::DropRetained(message.topic.clone(), receipt.cloned()),
        });
        true
    }

    /// Whether a topic name or filter is within the limits; counts one that is not.
    fn topic_fits(&self, topic: &str) -> bool {
        let (limits, counters) = (&self.0.limits, &self.0.counters);
        let over = if topic.len() > limits.max_topic_length {
            &counters.over_topic_length
        } else if topic.split('/').count() > limits.max_topic_levels {
            &counters.over_topic_levels
        } else {
            return true;
        };
        over.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// The retained messages that match a filter, for a new subscription.
    fn retained_for(&self, filter: &SharedFilter) -> Vec<Arc<Message>> {
        self.0.retained.read().matching(&filter.filter, self.now())
    }
}

/// Whether a peer's address is on this machine, which anonymous access may depend on.
pub fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests;
