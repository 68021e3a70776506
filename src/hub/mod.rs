//! The hub: everything that receives messages is a session here.
//!
//! Access rules, the subscription tree, retained messages, sessions and their queues. Routing runs on the publisher's
//! task under short locks; there is no central actor. What must survive goes to the [`Store`] as it happens, and an
//! acknowledgement waits for its [`Receipt`](crate::store::Receipt) (promise 1 in the crate's map).
//!
//! Locks are taken in this order, and none is held across an `.await`: sessions, one session's state, routes, rights.

pub mod access;
mod link;
mod queue;
mod retained;
mod routes;
mod session;
mod sys;

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::clock::{Clock, UnixMillis};
use crate::message::{Message, QoS};
use crate::observe::{Metrics, Observe, Status};
use crate::store::{Due, Op, Opened, Receipt, SessionId, Store, StoredSession};
use crate::topic::SharedFilter;
use access::{Access, Identity};
use queue::Queue;
use retained::{Change, Retained};
use routes::Routes;
use session::{Attachment, Session, State, Target, submit};

pub use link::{Link, Outcome, Pressure, Publish, Refusal, Released, SubscribeError, Subscribed};
pub use queue::{Delivery, Outbound, PacketId, QueueLimits, WhenFull};
pub use session::{Face, Fate, SessionExpiry};

/// How the hub is set up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    pub limits: Limits,
    pub access: access::Settings,
}

/// What one client, and all of them together, may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// QoS 1 and 2 messages sent to one client and not yet acknowledged.
    pub max_inflight: u16,
    /// The same towards an upstream, which is far away and takes everything: the window is what a round trip can carry.
    pub max_inflight_upstream: u16,
    pub queue: QueueLimits,
    pub max_subscriptions: usize,
    /// Levels of a topic name or filter.
    pub max_topic_levels: usize,
    pub max_retained_messages: usize,
    pub max_retained_bytes: usize,
    /// Sessions kept, connected or not.
    pub max_sessions: usize,
    /// The longest a session may ask to be kept after its connection is gone; `None` is for ever.
    pub max_session_expiry: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_inflight: 100,
            max_inflight_upstream: 2000,
            queue: QueueLimits::default(),
            max_subscriptions: 1000,
            max_topic_levels: 200,
            max_retained_messages: 1_000_000,
            max_retained_bytes: 256 << 20,
            max_sessions: 100_000,
            max_session_expiry: None,
        }
    }
}

impl Limits {
    /// The most that may be sent to a session and not yet be acknowledged.
    fn window(&self, face: Face) -> u16 {
        if face == Face::Upstream { self.max_inflight_upstream } else { self.max_inflight }
    }
}

/// A connection that wants to attach to its session.
#[derive(Clone, Debug)]
pub struct Attach {
    pub face: Face,
    /// Not empty; the listener makes one up where the client leaves it to the server.
    pub client_id: Arc<str>,
    pub identity: Identity,
    pub clean_start: bool,
    pub expiry: SessionExpiry,
    pub will: Option<Will>,
    /// How many unacknowledged QoS 1 and 2 messages the peer can take.
    pub receive_maximum: u16,
    /// The peer's address, for people.
    pub peer: Option<String>,
    /// Limits of this session's queue where they differ from the hub's.
    pub queue: Option<QueueLimits>,
}

impl Attach {
    /// A session of the gateway's own that ends when it is detached.
    pub fn internal(face: Face, name: &str) -> Self {
        Self {
            face,
            client_id: name.into(),
            identity: Identity::gateway(),
            clean_start: true,
            expiry: SessionExpiry::OnDetach,
            will: None,
            receive_maximum: u16::MAX,
            peer: None,
            queue: None,
        }
    }
}

/// The message that is published for a client that is lost (MQTT 5.0 §3.1.2.5).
#[derive(Clone, Debug, PartialEq)]
pub struct Will {
    pub message: Message,
    /// How long after the loss; not at all when the client is back by then.
    pub delay: Duration,
}

/// How a subscription wants its messages (MQTT 5.0 §3.8.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubscribeOptions {
    pub qos: QoS,
    /// Leave out what this session published itself.
    pub no_local: bool,
    /// Keep the publisher's retain flag instead of clearing it.
    pub retain_as_published: bool,
    pub retain_handling: RetainHandling,
    pub identifier: Option<NonZeroU32>,
}

impl SubscribeOptions {
    /// What an MQTT 3.1.1 subscription means: all retained messages, retain flag cleared on the others.
    pub fn new(qos: QoS) -> Self {
        Self {
            qos,
            no_local: false,
            retain_as_published: false,
            retain_handling: RetainHandling::Send,
            identifier: None,
        }
    }

    /// As in a SUBSCRIBE packet, which is also how the journal keeps it.
    fn to_byte(self) -> u8 {
        self.qos.level()
            | u8::from(self.no_local) << 2
            | u8::from(self.retain_as_published) << 3
            | (self.retain_handling as u8) << 4
    }

    fn from_byte(byte: u8, identifier: Option<u32>) -> Self {
        Self {
            qos: QoS::from_level(byte & 3).unwrap_or_default(),
            no_local: byte & 4 != 0,
            retain_as_published: byte & 8 != 0,
            retain_handling: match byte >> 4 {
                1 => RetainHandling::SendIfNew,
                2 => RetainHandling::DoNotSend,
                _ => RetainHandling::Send,
            },
            identifier: identifier.and_then(NonZeroU32::new),
        }
    }
}

/// Which retained messages a new subscription gets (MQTT 5.0 §3.8.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetainHandling {
    Send = 0,
    SendIfNew = 1,
    DoNotSend = 2,
}

/// Why a connection cannot attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AttachError {
    #[error("the gateway keeps as many sessions as `limits.max_sessions` allows")]
    TooManySessions,
}

/// Why the hub cannot take up what the store holds.
#[derive(Debug, Error)]
#[error("the stored sessions and retained messages cannot be read")]
pub struct RestoreError(#[from] crate::store::ReadError);

/// A session as people and the API see it.
#[derive(Clone, Debug)]
pub struct SessionSummary {
    pub face: Face,
    pub client_id: Arc<str>,
    pub user: Option<Arc<str>>,
    pub peer: Option<String>,
    pub connected: bool,
    /// Since when it is connected, or not.
    pub since: Option<UnixMillis>,
    pub durable: bool,
    pub subscriptions: Vec<Arc<str>>,
    pub queued_messages: u64,
    pub queued_bytes: u64,
    pub sent: u64,
    pub received: u64,
    pub dropped: u64,
}

/// What the hub has counted since the start.
#[derive(Debug, Default)]
pub struct Counters {
    pub received: AtomicU64,
    pub sent: AtomicU64,
    pub dropped_queue_full: AtomicU64,
    pub dropped_expired: AtomicU64,
    pub dropped_retained_full: AtomicU64,
    pub denied_publish: AtomicU64,
    pub denied_subscribe: AtomicU64,
}

/// A handle to the hub; every clone is the same hub.
#[derive(Clone, Debug)]
pub struct Hub(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    clock: Clock,
    store: Option<Store>,
    access: RwLock<Arc<Access>>,
    routes: RwLock<Routes<Subscriber>>,
    /// Grows with every change of routes or rights: what was looked up under another version is stale.
    version: AtomicU64,
    retained: RwLock<Retained>,
    sessions: Mutex<HashMap<(Face, Arc<str>), Arc<Session>>>,
    next_session: AtomicU64,
    next_attachment: AtomicU64,
    counters: Counters,
}

/// A subscription in the routes.
#[derive(Debug)]
struct Subscriber {
    session: Arc<Session>,
    options: SubscribeOptions,
    filter: SharedFilter,
}

/// Who gets the messages of one topic.
#[derive(Debug)]
struct Targets {
    version: u64,
    direct: Vec<Target>,
    groups: Vec<Group>,
    /// Some receiver is journaled: an acknowledgement may have to wait.
    durable: bool,
    /// Some receiver wants to refuse messages rather than lose them.
    rejecting: bool,
}

/// One shared subscription: each message goes to one of its members (MQTT 5.0 §4.8.2).
#[derive(Debug)]
struct Group {
    members: Vec<Target>,
    next: AtomicUsize,
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
            running = Some(opened.run());
        }
        let next_session = sessions.iter().map(|session| session.record.id.0 + 1).max().unwrap_or(1);
        let hub = Self(Arc::new(Shared {
            limits: settings.limits,
            clock,
            store: running,
            access: RwLock::new(Arc::new(Access::new(settings.access))),
            routes: RwLock::default(),
            version: AtomicU64::new(1),
            retained: RwLock::new(retained),
            sessions: Mutex::default(),
            next_session: AtomicU64::new(next_session),
            next_attachment: AtomicU64::new(1),
            counters: Counters::default(),
        }));
        for stored in sessions {
            hub.restore(stored);
        }
        Ok(hub)
    }

    fn restore(&self, stored: StoredSession) {
        let record = stored.record;
        let Some(face) = Face::from_number(record.face) else {
            warn!(session = record.id.0, face = record.face, "stored session of an unknown kind is left alone");
            return;
        };
        let identity =
            if matches!(face, Face::Mqtt | Face::MqttSn) { Identity::user(record.user) } else { Identity::gateway() };
        let rights = self.access().rights(&identity, &record.client_id);
        let queue = Queue::restored(record.id, stored.queue, self.0.limits.window(face));
        let session = Arc::new(Session::new(
            record.id,
            face,
            record.client_id.clone(),
            identity,
            true,
            self.0.limits.queue,
            rights,
            queue,
        ));
        {
            let mut state = session.state.lock();
            // A session that was connected when the gateway died is gone since now.
            state.detached_at = Some(record.detached_at.unwrap_or_else(|| self.now()));
            state.expiry = match record.expiry_interval {
                None => SessionExpiry::Never,
                Some(interval) => SessionExpiry::After(interval),
            };
            state.will = record.will.map(|will| Will { message: will.message, delay: will.delay });
            state.inbound = stored.inbound.into_iter().map(|id| (id, None)).collect();
            let mut routes = self.0.routes.write();
            for subscription in stored.subscriptions {
                let Ok(filter) = SharedFilter::split(&subscription.filter) else { continue };
                let options = SubscribeOptions::from_byte(subscription.options, subscription.identifier);
                let subscriber = Subscriber { session: session.clone(), options, filter: filter.clone() };
                routes.insert(&filter, session.id.0, subscriber);
                state.subscriptions.insert(subscription.filter, filter);
            }
        }
        self.0.sessions.lock().insert((face, record.client_id), session);
    }

    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    pub fn store(&self) -> Option<&Store> {
        self.0.store.as_ref()
    }

    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub fn counters(&self) -> &Counters {
        &self.0.counters
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
    /// [`AttachError::TooManySessions`] when a new session would go over `max_sessions`.
    pub fn attach(&self, request: Attach) -> Result<Link, AttachError> {
        let now = self.now();
        let key = (request.face, request.client_id.clone());
        let mut wills = Vec::new();
        let mut sessions = self.0.sessions.lock();
        let mut resumed = None;
        if let Some(known) = sessions.get(&key).cloned() {
            let mut state = known.state.lock();
            let was_attached = state.attached.is_some();
            let resume = !request.clean_start
                && !(was_attached && state.expiry == SessionExpiry::OnDetach)
                && known.identity.user == request.identity.user;
            if let Some(will) = state.will.take()
                && (!resume || was_attached && will.delay.is_zero())
            {
                wills.push((known.clone(), will));
            }
            known.condemn(&mut state, Fate::TakenOver);
            if let Some(limits) = request.queue {
                known.set_limits(limits);
            }
            if resume {
                drop(state);
                resumed = Some(known);
            } else {
                self.end(&known, &mut state);
                drop(state);
                sessions.remove(&key);
            }
        }
        let present = resumed.is_some();
        let session = match resumed {
            Some(session) => session,
            None if sessions.len() >= self.0.limits.max_sessions => return Err(AttachError::TooManySessions),
            None => {
                let session = self.new_session(&request);
                sessions.insert(key, session.clone());
                session
            }
        };
        let rights = self.access().rights(&session.identity, &session.client_id);
        *session.rights.write() = rights;
        let number = self.0.next_attachment.fetch_add(1, Ordering::Relaxed);
        let window = request.receive_maximum.min(self.0.limits.window(request.face)).max(1);
        let attachment = Arc::new(Attachment::new(number, now, request.peer, window));
        {
            let mut state = session.state.lock();
            state.attached = Some(attachment.clone());
            state.detached_at = None;
            state.expiry = self.allowed_expiry(request.face, request.expiry);
            state.will = request.will;
            state.queue.rewind();
            if session.durable {
                submit(self.store(), &mut vec![session.record(&state)], Due::Soon);
            }
        }
        drop(sessions);
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
            request.queue.unwrap_or(self.0.limits.queue),
            self.access().rights(&request.identity, &request.client_id),
            Queue::new(id, durable),
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

    /// Ends a session: its subscriptions, its queue and its journal. The caller takes it out of the map.
    fn end(&self, session: &Session, state: &mut State) {
        state.ended = true;
        state.attached = None;
        {
            let mut routes = self.0.routes.write();
            for filter in state.subscriptions.values() {
                routes.remove(filter, session.id.0);
            }
        }
        if !state.subscriptions.is_empty() {
            state.subscriptions.clear();
            self.changed();
        }
        state.queue = Queue::new(session.id, false);
        state.inbound.clear();
        if session.durable {
            submit(self.store(), &mut vec![Op::DropSession(session.id)], Due::Soon);
        }
        session.tell_drained((0, 0));
    }

    /// What follows when a session has no connection any more. Takes the lock's guard to let it go in time.
    fn after_detach(&self, session: &Arc<Session>, mut state: parking_lot::MutexGuard<'_, State>, will: WillDue) {
        state.detached_at = Some(self.now());
        let mut due = None;
        let ends = state.expiry == SessionExpiry::OnDetach || state.expiry == SessionExpiry::After(Duration::ZERO);
        match will {
            WillDue::No => state.will = None,
            WillDue::Yes if ends || state.will.as_ref().is_some_and(|will| will.delay.is_zero()) => {
                due = state.will.take();
            }
            WillDue::Yes => {}
        }
        if ends {
            self.end(session, &mut state);
        } else if session.durable {
            submit(self.store(), &mut vec![session.record(&state)], Due::Soon);
        }
        drop(state);
        if ends {
            self.forget(session);
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

    /// Looks up who gets the messages of `topic`: each session once, with the highest QoS of its subscriptions that
    /// match and the identifiers of all of them (MQTT 5.0 §3.3.4).
    fn targets(&self, topic: &str) -> Targets {
        let version = self.0.version.load(Ordering::Acquire);
        let mut direct: Vec<Target> = Vec::new();
        let mut shared: HashMap<&SharedFilter, Vec<Target>> = HashMap::new();
        let routes = self.0.routes.read();
        routes.matches(topic, |entry| {
            let Subscriber { session, options, filter } = &entry.value;
            if !session.rights.read().may_read(topic) {
                return;
            }
            let target = Target {
                session: session.clone(),
                qos: options.qos,
                no_local: options.no_local,
                retain_as_published: options.retain_as_published,
                identifiers: options.identifier.map(|identifier| Arc::from([identifier.get()])),
            };
            match filter.group {
                Some(_) => shared.entry(filter).or_default().push(target),
                None => direct.push(target),
            }
        });
        let groups: Vec<_> = shared.into_values().map(|members| Group { members, next: AtomicUsize::new(0) }).collect();
        drop(routes);
        direct.sort_by_key(|target| target.session.id);
        direct.dedup_by(|next, kept| {
            let same = next.session.id == kept.session.id;
            if same {
                kept.merge(next);
            }
            same
        });
        let mut all = direct.iter().chain(groups.iter().flat_map(|group| &group.members));
        let durable = all.clone().any(|target| target.session.durable);
        let rejecting = all.any(|target| target.session.limits().when_full == WhenFull::Reject);
        Targets { version, direct, groups, durable, rejecting }
    }

    /// Queues `messages`, in order, for everybody who gets them: each receiver is locked once and woken once. Returns
    /// the receivers that publishers should wait for.
    fn deliver(
        &self,
        targets: &Targets,
        messages: &[(Arc<Message>, Option<Arc<Receipt>>)],
        from: Option<SessionId>,
        ops: &mut Vec<Op>,
    ) -> Vec<Arc<Session>> {
        let mut pressed = Vec::new();
        let store = self.store();
        let mut give = |target: &Target, messages: &[(Arc<Message>, Option<Arc<Receipt>>)]| {
            if target.no_local && from == Some(target.session.id) {
                return;
            }
            let incoming = messages.iter().map(|(message, receipt)| (target.incoming(message), receipt.clone()));
            if target.session.accept(incoming, store, ops, &self.0.counters) {
                pressed.push(target.session.clone());
            }
        };
        for target in &targets.direct {
            give(target, messages);
        }
        for group in &targets.groups {
            for message in messages {
                give(group.choose(), std::slice::from_ref(message));
            }
        }
        pressed
    }

    /// Every session, for people and the API.
    pub fn sessions(&self) -> Vec<SessionSummary> {
        let sessions: Vec<_> = self.0.sessions.lock().values().cloned().collect();
        let mut summaries: Vec<_> = sessions.iter().map(|session| summary(session)).collect();
        summaries.sort_by(|a, b| (a.face, &a.client_id).cmp(&(b.face, &b.client_id)));
        summaries
    }

    /// Messages waiting or unacknowledged in one session's queue, and their bytes; `None` where there is no such session.
    pub fn queued(&self, face: Face, client_id: &str) -> Option<(u64, u64)> {
        let session = self.0.sessions.lock().get(&(face, client_id.into())).cloned()?;
        let state = session.state.lock();
        Some((state.queue.len(), state.queue.bytes()))
    }

    /// Looks after what time changes, once a second, until `shutdown`: sessions and retained messages that expire, wills
    /// that are due, a system clock that was set, the `$SYS` topics.
    pub async fn run(&self, mut shutdown: watch::Receiver<bool>) {
        let mut seconds: u64 = 0;
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                changed = shutdown.changed() => {
                    if changed.is_err() || *shutdown.borrow() {
                        return;
                    }
                    continue;
                }
            }
            self.housekeep(seconds);
            seconds += 1;
        }
    }

    fn housekeep(&self, seconds: u64) {
        if let Some(step) = self.0.clock.adjust(Duration::from_secs(2)) {
            info!(step_ms = step, "the system clock was set; wall time follows it");
        }
        let now = self.now();
        let sessions: Vec<_> = self.0.sessions.lock().values().cloned().collect();
        for session in sessions {
            self.housekeep_session(&session, now);
        }
        if seconds.is_multiple_of(60) {
            let expired = self.0.retained.write().expire(now);
            let mut ops = expired.iter().map(|message| Op::DropRetained(message.topic.clone(), None)).collect();
            submit(self.store(), &mut ops, Due::Soon);
        }
        if seconds.is_multiple_of(sys::INTERVAL_SECONDS) {
            sys::publish(self);
        }
    }

    fn housekeep_session(&self, session: &Arc<Session>, now: UnixMillis) {
        let mut state = session.state.lock();
        let Some(detached_at) = state.detached_at.filter(|_| state.attached.is_none() && !state.ended) else { return };
        let gone = now.since(detached_at);
        let ends = match state.expiry {
            SessionExpiry::OnDetach => true,
            SessionExpiry::After(interval) => gone >= interval,
            SessionExpiry::Never => false,
        };
        let due = state.will.as_ref().is_some_and(|will| ends || gone >= will.delay);
        let will = if due { state.will.take() } else { None };
        if ends {
            self.end(session, &mut state);
        } else if due && session.durable {
            submit(self.store(), &mut vec![session.record(&state)], Due::Soon);
        }
        drop(state);
        if ends {
            self.forget(session);
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
        if self.0.store.is_none() || message.topic.is_reserved() || change == Change::Nothing {
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

    /// The retained messages that match a filter, for a new subscription.
    fn retained_for(&self, filter: &SharedFilter) -> Vec<Arc<Message>> {
        self.0.retained.read().matching(&filter.filter, self.now())
    }
}

/// Whether a lost connection's will must be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WillDue {
    Yes,
    No,
}

impl Target {
    /// Takes in another subscription of the same session that matches too.
    fn merge(&mut self, other: &Self) {
        self.qos = self.qos.max(other.qos);
        self.no_local &= other.no_local;
        self.retain_as_published |= other.retain_as_published;
        self.identifiers = match (&self.identifiers, &other.identifiers) {
            (Some(mine), Some(others)) => Some(mine.iter().chain(others.iter()).copied().collect()),
            (mine, others) => mine.clone().or_else(|| others.clone()),
        };
    }
}

impl Group {
    /// The member whose turn it is: one that is connected, or failing that one whose session keeps messages.
    fn choose(&self) -> &Target {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let ring = || (0..self.members.len()).map(|offset| &self.members[(turn + offset) % self.members.len()]);
        let connected = |target: &&Target| target.session.state.lock().attached.is_some();
        ring()
            .find(connected)
            .or_else(|| ring().find(|target| target.session.durable))
            .unwrap_or(&self.members[turn % self.members.len()])
    }
}

fn summary(session: &Session) -> SessionSummary {
    let state = session.state.lock();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    SessionSummary {
        face: session.face,
        client_id: session.client_id.clone(),
        user: session.identity.user.clone(),
        peer: state.attached.as_ref().and_then(|attached| attached.peer.clone()),
        connected: state.attached.is_some(),
        since: state.attached.as_ref().map(|attached| attached.since).or(state.detached_at),
        durable: session.durable,
        subscriptions: state.subscriptions.keys().cloned().collect(),
        queued_messages: state.queue.len(),
        queued_bytes: state.queue.bytes(),
        sent: count(&session.counters.sent),
        received: count(&session.counters.received),
        dropped: count(&session.counters.dropped),
    }
}

impl Observe for Hub {
    fn statuses(&self) -> Vec<Status> {
        Vec::new()
    }

    fn collect(&self, metrics: &mut Metrics) {
        let counters = &self.0.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let received = "Messages accepted from clients, devices and upstreams.";
        metrics.counter("fieldgate_hub_messages_received_total", received, &[], count(&counters.received));
        let sent = "Messages handed to receivers.";
        metrics.counter("fieldgate_hub_messages_sent_total", sent, &[], count(&counters.sent));
        let dropped = "Messages given up, by reason.";
        for (reason, counter) in [
            ("queue_full", &counters.dropped_queue_full),
            ("expired", &counters.dropped_expired),
            ("retained_full", &counters.dropped_retained_full),
        ] {
            metrics.counter("fieldgate_hub_messages_dropped_total", dropped, &[("reason", reason)], count(counter));
        }
        let denied = "Requests that the access rules denied.";
        for (request, counter) in [("publish", &counters.denied_publish), ("subscribe", &counters.denied_subscribe)] {
            metrics.counter("fieldgate_hub_denied_total", denied, &[("request", request)], count(counter));
        }
        let sessions = self.sessions();
        for (state, connected) in [("connected", true), ("detached", false)] {
            let number = sessions.iter().filter(|session| session.connected == connected).count();
            let labels = [("state", state)];
            metrics.gauge("fieldgate_hub_sessions", "Sessions, by state.", &labels, number as f64);
        }
        let queued: u64 = sessions.iter().map(|session| session.queued_messages).sum();
        metrics.gauge("fieldgate_hub_queued_messages", "Messages waiting in all queues.", &[], queued as f64);
        let bytes: u64 = sessions.iter().map(|session| session.queued_bytes).sum();
        metrics.gauge("fieldgate_hub_queued_bytes", "Bytes waiting in all queues.", &[], bytes as f64);
        let subscriptions = self.0.routes.read().len();
        metrics.gauge("fieldgate_hub_subscriptions", "Subscriptions.", &[], subscriptions as f64);
        let (messages, bytes) = {
            let retained = self.0.retained.read();
            (retained.len(), retained.bytes())
        };
        metrics.gauge("fieldgate_hub_retained_messages", "Retained messages.", &[], messages as f64);
        metrics.gauge("fieldgate_hub_retained_bytes", "Bytes of retained messages.", &[], bytes as f64);
    }
}

/// Whether a peer's address is on this machine, which anonymous access may depend on.
pub fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests;
