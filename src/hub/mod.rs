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
mod delivery;
mod expiry;
mod link;
mod memory;
mod pressure;
mod queue;
mod report;
mod retained;
mod routes;
mod session;
mod settings;
mod sys;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::clock::{Clock, UnixMillis};
use crate::message::{Message, QoS};
use crate::store::{self, Due, Op, Opened, Receipt, SessionId, Store, StoredSession};
use crate::topic::SharedFilter;
use access::{Access, Identity};
use delivery::{Estate, Subscriber};
use memory::Memory;
use queue::{Layout, Queue};
use retained::{Change, Retained};
use routes::Routes;
use session::{Attachment, Session, State, Subscribed as Held, submit};

pub use admission::{Admission, Place, Refused};
pub use link::{Link, Outcome, Publish, Refusal, Released, SubscribeError, Subscribed};
pub use pressure::Pressure;
pub use queue::{Delivery, Order, Outbound, PacketId, Precedence, Priority, QueueLimits, WhenFull, stream_name};
pub use report::{Counters, SessionSummary, Traffic};
pub use session::{Face, Fate, SessionExpiry};
pub use settings::{Attach, Limits, RetainHandling, Settings, SubscribeOptions, Will};

/// Why a connection cannot attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AttachError {
    #[error("the gateway keeps as many sessions as `limits.max_sessions` allows")]
    TooManySessions,
    #[error("the store cannot be used yet: only new sessions that end with their connection are served")]
    StoreUnavailable,
}

/// Why the hub cannot take up what the store holds.
#[derive(Debug, Error)]
#[error("the stored sessions and retained messages cannot be read")]
pub struct RestoreError(#[from] crate::store::ReadError);

/// How long after a restart a client may take to come back before its will says that it is lost: it was the gateway that
/// was gone. A sleeping sensor knows nothing of it and comes when it wakes.
const RESTART_GRACE: Duration = Duration::from_secs(60);
const SLEEPER_GRACE: Duration = Duration::from_secs(3600);

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
        let next_session = after(&sessions);
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

    /// Goes on from what a store holds that could not be opened before.
    fn take_up(&self, contents: store::Contents) {
        {
            let _nobody_attaches = self.0.sessions.lock();
            self.0.readiness.takes_up.store(true, Ordering::SeqCst);
        }
        let mut retained = self.0.retained.write();
        for message in contents.retained {
            // What was published meanwhile is newer.
            if !retained.contains(message.topic.as_str()) {
                retained.set(Arc::new(message));
            }
        }
        drop(retained);
        self.0.next_session.store(after(&contents.sessions), Ordering::SeqCst);
        for stored in contents.sessions {
            let face = Face::from_number(stored.record.face);
            let key = face.map(|face| (face, stored.record.client_id.clone()));
            // A client that began a new session has ended this one.
            if key.is_some_and(|key| self.0.sessions.lock().contains_key(&key)) {
                submit(self.store(), &mut vec![Op::DropSession(stored.record.id)], Due::Soon);
            } else if let Some(estate) = self.restore(stored) {
                self.settle(estate);
            }
        }
        self.changed();
        self.0.readiness.awaits_store.store(false, Ordering::SeqCst);
        self.0.readiness.takes_up.store(false, Ordering::SeqCst);
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

    /// Takes up a session as it was stored; returns what an older one of the same client has left, which had ended but
    /// not been settled when the gateway stopped.
    fn restore(&self, stored: StoredSession) -> Option<Estate> {
        let record = stored.record;
        let Some(face) = Face::from_number(record.face) else {
            warn!(session = record.id.0, face = record.face, "stored session of an unknown kind is left alone");
            return None;
        };
        let identity = if matches!(face, Face::Mqtt | Face::MqttSn) {
            self.access().restore(record.user)
        } else {
            Identity::gateway()
        };
        let rights = self.access().rights(&identity, &record.client_id);
        let queue = Queue::restored(record.id, face.layout(), &stored.queues, self.0.limits.window(face));
        // An upstream brings its own limits when it attaches; until then nothing may be lost for those of others.
        let limits = match face {
            Face::Upstream => {
                QueueLimits { max_messages: u64::MAX, max_bytes: u64::MAX, max_age: None, ..self.0.limits.queue }
            }
            _ => self.0.limits.queue,
        };
        let session = Arc::new(Session::new(
            record.id,
            face,
            record.client_id.clone(),
            identity,
            true,
            self.0.limits.of_queue(limits),
            rights,
            queue,
            &self.0.memory,
        ));
        {
            let mut state = session.state.lock();
            // A session that was connected when the gateway died is gone since now.
            state.detached_at = Some(record.detached_at.unwrap_or_else(|| self.now()));
            state.expiry = match record.expiry_interval {
                None => SessionExpiry::Never,
                Some(interval) => SessionExpiry::After(interval),
            };
            state.will = record.will.map(|will| Will {
                message: will.message,
                delay: will.delay.max(if face == Face::MqttSn { SLEEPER_GRACE } else { RESTART_GRACE }),
            });
            state.is_recorded = state.expiry == SessionExpiry::Never && state.will.is_none();
            state.inbound = stored.inbound.into_iter().map(|id| (id, None)).collect();
            let mut routes = self.0.routes.write();
            for subscription in stored.subscriptions {
                let Ok(filter) = SharedFilter::split(&subscription.filter) else { continue };
                let options = SubscribeOptions::from_byte(subscription.options, subscription.identifier);
                let subscriber = Subscriber { session: session.clone(), options, filter: filter.clone() };
                routes.insert(&filter, session.id.0, subscriber);
                let text = filter.to_text();
                state.subscriptions.insert(text, Held { filter, options, receipt: None });
            }
        }
        let older = self.0.sessions.lock().insert((face, record.client_id), session)?;
        let mut state = older.state.lock();
        Some(self.end(&older, &mut state))
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

    /// Attaches a connection to its session: the stored one, or a new one. An older connection with the same client id
    /// is told to close.
    ///
    /// # Errors
    /// [`AttachError::TooManySessions`] when a new session would go over `max_sessions`;
    /// [`AttachError::StoreUnavailable`] while it is not known what is stored, for sessions that may be.
    pub fn attach(&self, mut request: Attach) -> Result<Link, AttachError> {
        let now = self.now();
        let key = (request.face, request.client_id.clone());
        let mut wills = Vec::new();
        let mut estate = Estate::default();
        let mut sessions = self.0.sessions.lock();
        if self.awaits_store() {
            let may_be_stored = !request.clean_start || request.expiry != SessionExpiry::OnDetach;
            if may_be_stored || self.0.readiness.takes_up.load(Ordering::SeqCst) {
                return Err(AttachError::StoreUnavailable);
            }
        }
        let (mut resumed, mut earlier) = (None, None);
        if let Some(known) = sessions.get(&key).cloned() {
            let mut state = known.state.lock();
            let was_attached = state.attached.is_some();
            // A session that ends with its connection has ended now (MQTT 5.0 §3.1.2.11.2); one that expired since the
            // last housekeeping has ended before.
            let ends = request.clean_start
                || was_attached && state.expiry == SessionExpiry::OnDetach
                || state.has_expired(now);
            let will_is_due = state.will_is_due(now);
            let resume = !ends && known.identity.user == request.identity.user;
            if let Some(will) = state.will.take()
                && (!resume || will_is_due || was_attached && will.delay.is_zero())
            {
                wills.push((known.clone(), will));
            }
            earlier = state.attached.clone();
            known.condemn(&mut state, Fate::TakenOver);
            if let Some(limits) = request.queue {
                known.set_limits(self.0.limits.of_queue(limits));
                state.queue.sweep_again();
            }
            if resume {
                drop(state);
                *known.rights.write() = self.access().rights(&known.identity, &known.client_id);
                resumed = Some(known);
            } else {
                estate = self.end(&known, &mut state);
                drop(state);
                sessions.remove(&key);
            }
        }
        if let Some(earlier) = earlier {
            earlier.wait_for_batch();
        }
        let present = resumed.is_some();
        let session = match resumed {
            Some(session) => session,
            None if sessions.len() >= self.0.limits.max_sessions => {
                self.0.counters.over_sessions.fetch_add(1, Ordering::Relaxed);
                return Err(AttachError::TooManySessions);
            }
            None => {
                let session = self.new_session(&request);
                sessions.insert(key, session.clone());
                session
            }
        };
        let number = self.0.next_attachment.fetch_add(1, Ordering::Relaxed);
        let window = request.receive_maximum.min(self.0.limits.window(request.face)).max(1);
        let (expiry, will) = (self.allowed_expiry(request.face, request.expiry), request.will.take());
        let attachment = Arc::new(Attachment::new(number, now, request, window));
        {
            let mut state = session.state.lock();
            state.attached = Some(attachment.clone());
            state.detached_at = None;
            state.expiry = expiry;
            state.will = will;
            state.queue.rewind();
            session.journal(&mut state, self.store());
        }
        drop(sessions);
        self.settle(estate);
        for (session, will) in wills {
            self.publish_will(&session, will);
        }
        session.page_in(self.store());
        session.signal.raise();
        Ok(Link::new(self.clone(), session, attachment, present))
    }

    fn new_session(&self, request: &Attach) -> Arc<Session> {
        let id = SessionId(self.0.next_session.fetch_add(1, Ordering::Relaxed));
        let durable = self.0.store.is_some() && request.expiry != SessionExpiry::OnDetach;
        Arc::new(Session::new(
            id,
            request.face,
            request.client_id.clone(),
            request.identity.clone(),
            durable,
            self.0.limits.of_queue(request.queue.unwrap_or(self.0.limits.queue)),
            self.access().rights(&request.identity, &request.client_id),
            Queue::new(id, durable, request.face.layout()),
            &self.0.memory,
        ))
    }

    /// The limit is for clients: what waits for an upstream waits as long as its outage lasts.
    fn allowed_expiry(&self, face: Face, wanted: SessionExpiry) -> SessionExpiry {
        let most = self.0.limits.max_session_expiry.filter(|_| face != Face::Upstream);
        match (wanted, most) {
            (SessionExpiry::Never, Some(most)) => SessionExpiry::After(most),
            (SessionExpiry::After(interval), Some(most)) => SessionExpiry::After(interval.min(most)),
            (wanted, _) => wanted,
        }
    }

    /// Ends a session: its subscriptions and its queue. The caller takes it out of the map, and settles what it leaves
    /// behind, its journal too, once it holds no lock.
    fn end(&self, session: &Session, state: &mut State) -> Estate {
        state.ended = true;
        state.attached = None;
        let is_member = state.subscriptions.values().any(|held| held.filter.group.is_some());
        {
            let mut routes = self.0.routes.write();
            for held in state.subscriptions.values() {
                routes.remove(&held.filter, session.id.0);
            }
        }
        if !state.subscriptions.is_empty() {
            state.subscriptions.clear();
            self.changed();
        }
        let queue = std::mem::replace(&mut state.queue, Queue::new(session.id, false, Layout::One));
        let estate = Estate {
            session: session.durable.then_some(session.id),
            tails: if is_member { queue.tails() } else { Vec::new() },
            orphans: queue.into_orphans(),
        };
        state.settle();
        state.inbound.clear();
        session.tell_drained((0, 0));
        estate
    }

    /// What follows when a session has no connection any more. Takes the lock's guard to let it go in time.
    fn after_detach(&self, session: &Arc<Session>, mut state: parking_lot::MutexGuard<'_, State>, will: WillDue) {
        state.detached_at = Some(self.now());
        let (mut due, mut estate) = (None, Estate::default());
        let ends = state.expiry == SessionExpiry::OnDetach || state.expiry == SessionExpiry::After(Duration::ZERO);
        match will {
            WillDue::No => state.will = None,
            WillDue::Yes if ends || state.will.as_ref().is_some_and(|will| will.delay.is_zero()) => {
                due = state.will.take();
            }
            WillDue::Yes => {}
        }
        if ends {
            estate = self.end(session, &mut state);
        } else {
            session.journal(&mut state, self.store());
        }
        drop(state);
        if ends {
            self.forget(session);
            self.settle(estate);
        }
        if let Some(will) = due {
            self.publish_will(session, will);
        }
    }

    /// Takes an ended session out of the map, unless a new one has taken its place.
    fn forget(&self, session: &Arc<Session>) {
        let mut sessions = self.0.sessions.lock();
        let key = (session.face, session.client_id.clone());
        if sessions.get(&key).is_some_and(|known| Arc::ptr_eq(known, session)) {
            sessions.remove(&key);
        }
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
        self.0.counters.dropped_store_full.fetch_add(u64::from(is_lost), Ordering::Relaxed);
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

    /// Looks after what time changes, once a second, until `shutdown`: sessions and retained messages that expire, wills
    /// that are due, a system clock that was set, the `$SYS` topics.
    pub async fn run(&self, mut shutdown: watch::Receiver<bool>) {
        let mut seconds: u64 = 0;
        let mut figures = sys::Figures::default();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.0.memory.becomes_tight() => {
                    self.relieve_memory();
                    continue;
                }
                changed = shutdown.changed() => {
                    if changed.is_err() || *shutdown.borrow() {
                        return;
                    }
                    continue;
                }
            }
            self.housekeep(seconds);
            if seconds.is_multiple_of(sys::INTERVAL_SECONDS) {
                figures.publish(self);
            }
            seconds += 1;
        }
    }

    fn housekeep(&self, seconds: u64) {
        if let Some(step) = self.0.clock.adjust(Duration::from_secs(2)) {
            info!(step_ms = step, "the system clock was set; wall time follows it");
        }
        self.relieve_memory();
        let now = self.now();
        let sessions: Vec<_> = self.0.sessions.lock().values().cloned().collect();
        if let Some(saved) = self.store().and_then(Store::take_replaced) {
            self.record_again(&sessions, saved);
        }
        for session in sessions {
            self.housekeep_session(&session, now);
            self.sweep(&session, now);
        }
        if seconds.is_multiple_of(60) {
            let expired = self.0.retained.write().expire(now);
            let mut ops = expired.iter().map(|message| Op::DropRetained(message.topic.clone(), None)).collect();
            submit(self.store(), &mut ops, Due::Soon);
        }
    }

    fn housekeep_session(&self, session: &Arc<Session>, now: UnixMillis) {
        let mut state = session.state.lock();
        if state.ended {
            return;
        }
        let (ends, due) = (state.has_expired(now), state.will_is_due(now));
        let will = if due { state.will.take() } else { None };
        let mut estate = Estate::default();
        if ends {
            self.0.counters.expired_sessions.fetch_add(1, Ordering::Relaxed);
            estate = self.end(session, &mut state);
        } else if due {
            session.journal(&mut state, self.store());
        }
        drop(state);
        if ends {
            self.forget(session);
            self.settle(estate);
        }
        if let Some(will) = will {
            self.publish_will(session, will);
        }
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

/// The number of the first session after those that are stored.
fn after(sessions: &[StoredSession]) -> u64 {
    sessions.iter().map(|session| session.record.id.0 + 1).max().unwrap_or(1)
}

/// Whether a lost connection's will must be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WillDue {
    Yes,
    No,
}

/// Whether a peer's address is on this machine, which anonymous access may depend on.
pub fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests;
