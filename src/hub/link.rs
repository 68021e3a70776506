//! One attached connection's hold on its session.

mod inbound;
mod subscriptions;

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::MutexGuard;
use thiserror::Error;

use super::attach::WillDue;
use super::attachment::{Attachment, Fate};
use super::delivery::Targets;
use super::pressure::Pressure;
use super::queue::Age;
use super::session::{Session, SessionExpiry, State, submit};
use super::{Hub, Outbound, PacketId, Priority, Unanswered, Will};
use crate::clock::UnixMillis;
use crate::message::{Message, Properties, QoS};
use crate::store::{Due, Line, Op, Receipt};
use crate::topic::TopicName;
use crate::via::{GatewayId, Introduction};

pub use inbound::Released;
pub use subscriptions::{SubscribeError, Subscribed};

/// A connection attached to its session. Dropping it is losing the connection: the will fires.
///
/// Publishes and acknowledgements are collected and take effect together with [`Link::flush`], so that a batch that was
/// read at once locks and wakes each receiver once.
#[derive(Debug)]
pub struct Link {
    hub: Hub,
    session: Arc<Session>,
    pub(super) attachment: Arc<Attachment>,
    present: bool,
    detached: bool,
    /// Topics this connection has published on lately.
    routes: HashMap<Box<str>, Route>,
    runs: Vec<Run>,
    in_batch: bool,
    acknowledged: Vec<PacketId>,
    /// What the journal must learn of QoS 2 deliveries.
    handshakes: Vec<Op>,
    ops: Vec<Op>,
    accepted: u64,
    /// See [`Link::keep_in_line`].
    line: Option<Arc<Line>>,
    /// When the first message of the batch was accepted: the clock is asked once a batch, not once a message.
    batch_began: Option<UnixMillis>,
}

/// What a connection publishes.
#[derive(Clone, Debug)]
pub struct Publish<'a> {
    pub topic: &'a str,
    pub payload: Bytes,
    pub qos: QoS,
    pub retain: bool,
    /// The peer may have sent it before.
    pub dup: bool,
    /// The peer's packet identifier, which tells a repeated QoS 2 message from a new one.
    pub packet_id: Option<PacketId>,
    pub properties: Option<Box<Properties>>,
    pub expiry_interval: Option<Duration>,
}

impl<'a> Publish<'a> {
    /// A QoS 0 message, not retained.
    pub fn new(topic: &'a str, payload: impl Into<Bytes>) -> Self {
        Self {
            topic,
            payload: payload.into(),
            qos: QoS::AtMostOnce,
            retain: false,
            dup: false,
            packet_id: None,
            properties: None,
            expiry_interval: None,
        }
    }
}

/// The exchange of packets that a QoS 2 message is part of.
#[derive(Clone, Copy, Debug)]
struct Exchange {
    packet_id: PacketId,
    dup: bool,
}

impl Publish<'_> {
    fn exchange(&self) -> Option<Exchange> {
        let packet_id = self.packet_id.filter(|_| self.qos == QoS::ExactlyOnce)?;
        Some(Exchange { packet_id, dup: self.dup })
    }
}

/// What became of a publish.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Acknowledge after the flush. `matched` tells whether anybody gets it (MQTT 5.0 reason code 0x10).
    Done {
        matched: bool,
    },
    /// Acknowledge when the receipt is done; refuse when it has failed.
    Pending(Arc<Receipt>),
    Refused(Refusal),
}

/// Why a publish is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("the topic is not a valid topic name, or goes over `limits.max_topic_levels` or `limits.max_topic_length`")]
    TopicInvalid,
    #[error("the access rules do not allow this client to publish on this topic")]
    NotAuthorized,
    #[error("a receiver's queue is full and configured to refuse what it cannot keep")]
    QuotaExceeded,
    #[error("a message before it could not be kept, and its publisher has not been told yet")]
    Behind,
    #[error("the store cannot be used yet, and may hold sessions that are to get the message")]
    StoreUnavailable,
}

/// For a message that is not taken up any more. Its sender gets no answer, and sends it again on another connection.
fn never_answered() -> Outcome {
    let receipt = Receipt::new(Arc::default());
    receipt.add();
    Outcome::Pending(receipt)
}

#[derive(Debug)]
struct Route {
    topic: TopicName,
    may_write: bool,
    targets: Arc<Targets>,
}

/// Consecutive messages of a batch that go to the same receivers.
#[derive(Debug)]
struct Run {
    targets: Arc<Targets>,
    messages: Vec<(Arc<Message>, Option<Arc<Receipt>>)>,
}

/// How many topics a connection's routes are remembered for; beyond it they are looked up afresh.
const MAX_ROUTES: usize = 512;

impl Link {
    pub(super) fn new(hub: Hub, session: Arc<Session>, attachment: Arc<Attachment>, present: bool) -> Self {
        Self {
            hub,
            session,
            attachment,
            present,
            detached: false,
            routes: HashMap::new(),
            runs: Vec::new(),
            in_batch: false,
            acknowledged: Vec::new(),
            handshakes: Vec::new(),
            ops: Vec::new(),
            accepted: 0,
            line: None,
            batch_began: None,
        }
    }

    /// Whether an earlier session was resumed.
    pub fn session_present(&self) -> bool {
        self.present
    }

    pub fn client_id(&self) -> &Arc<str> {
        &self.session.client_id
    }

    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// The gateway at the other end, once it is known.
    pub fn peer_gateway(&self) -> Option<GatewayId> {
        self.session.peer.get()
    }

    /// Says which gateway is at the other end, or that none is. What has been there is not sent there from now on; nor is
    /// it sent by two sessions that lead there and both keep the names of messages.
    pub fn set_peer_gateway(&self, peer: Option<Introduction>) {
        self.session.peer.set(peer);
    }

    /// Why this connection must close, once it must.
    pub fn fate(&self) -> Option<Fate> {
        self.attachment.fate()
    }

    /// Ready when there may be something to do: messages to take, a receipt that is done, a [`Link::fate`]. Registers
    /// the task of `cx` otherwise.
    pub fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<()> {
        // The successor of a connection that was taken over waits on the same signal: do not take it away from it.
        if self.fate().is_some() { Poll::Ready(()) } else { self.session.signal.poll_raised(cx) }
    }

    /// Waits for [`Link::poll_wake`].
    ///
    /// # Cancel safety
    /// A wake-up that was not returned for is kept for the next wait.
    pub async fn woken(&self) {
        poll_fn(|cx| self.poll_wake(cx)).await;
    }

    /// Takes up a publish; it is routed by the next [`Link::flush`].
    pub fn publish(&mut self, publish: Publish<'_>) -> Outcome {
        if !self.begin_batch() {
            return never_answered();
        }
        let exchange = publish.exchange();
        let route = match self.route(publish.topic) {
            Ok(route) => route,
            Err(refusal) => return self.refuse(exchange, refusal),
        };
        if !route.may_write {
            self.hub.0.counters.denied_publish.fetch_add(1, Ordering::Relaxed);
            return self.refuse(exchange, Refusal::NotAuthorized);
        }
        let (topic, targets) = (route.topic.clone(), route.targets.clone());
        if publish.qos != QoS::AtMostOnce && self.hub.awaits_store() {
            return self.refuse(exchange, Refusal::StoreUnavailable);
        }
        let accepted_at = match self.batch_began {
            Some(began) => began,
            None => *self.batch_began.insert(self.hub.now()),
        };
        let message = Arc::new(Message {
            topic,
            payload: publish.payload,
            qos: publish.qos,
            retain: publish.retain,
            properties: publish.properties,
            expiry_interval: publish.expiry_interval,
            accepted_at,
        });
        if targets.rejecting && publish.qos != QoS::AtMostOnce {
            // What came before it in the batch takes room too.
            self.flush_runs();
            if !self.begin_batch() {
                return never_answered();
            }
            if let Some((receiver, shortage)) = targets.rejecting(&message, self.hub.store()) {
                receiver.note_refused(1, shortage, &self.hub.0.counters);
                return self.refuse(exchange, Refusal::QuotaExceeded);
            }
        }
        let journaled = targets.durable || publish.retain || self.session.durable && publish.qos == QoS::ExactlyOnce;
        // One that refuses may do so still, when another publisher is quicker to take the room there is now.
        let promised = targets.rejecting || journaled && self.hub.store().is_some();
        let mut receipt = None;
        if publish.qos != QoS::AtMostOnce && promised {
            let signal = self.session.signal.clone();
            let pending = match &self.line {
                Some(line) if line.is_broken() => {
                    return self.refuse(exchange, Refusal::Behind);
                }
                Some(line) => Receipt::in_line(line.clone(), signal),
                None => Receipt::new(signal),
            };
            // Held until the flush has added everything that the receipt is for.
            pending.add();
            receipt = Some(pending);
        }
        if let Some(exchange) = exchange
            && let Some(repeated) = self.repeated(exchange, receipt.as_ref())
        {
            return repeated;
        }
        let matched = targets.matches_any();
        self.accepted += 1;
        match self.runs.last_mut() {
            Some(run) if Arc::ptr_eq(&run.targets, &targets) => run.messages.push((message, receipt.clone())),
            _ => self.runs.push(Run { targets, messages: vec![(message, receipt.clone())] }),
        }
        receipt.map_or(Outcome::Done { matched }, Outcome::Pending)
    }

    fn route(&mut self, topic: &str) -> Result<&Route, Refusal> {
        let version = self.hub.0.version.load(Ordering::Acquire);
        let fresh = self.routes.get(topic).is_some_and(|route| route.targets.version == version);
        if !fresh {
            let name = match self.routes.get(topic) {
                Some(route) => route.topic.clone(),
                None => {
                    let name = TopicName::new(topic).ok().filter(|_| self.hub.topic_fits(topic));
                    name.ok_or(Refusal::TopicInvalid)?
                }
            };
            if self.routes.len() >= MAX_ROUTES {
                self.routes.clear();
            }
            let may_write = self.session.rights.read().may_write(topic);
            let route = Route { topic: name, may_write, targets: Arc::new(self.hub.targets(topic)) };
            self.routes.insert(topic.into(), route);
        }
        self.routes.get(topic).ok_or(Refusal::TopicInvalid)
    }

    /// PUBACK, or PUBREC with an error: the receiver has the message, or will not take it. Takes effect with the next
    /// [`Link::flush`] or [`Link::take`].
    pub fn acknowledge(&mut self, packet_id: PacketId) {
        self.acknowledged.push(packet_id);
    }

    /// PUBREC: a later [`Link::take`] yields the release once this is on disk, where it goes with the next
    /// [`Link::flush`] or [`Link::take`]. False for an unknown identifier.
    pub fn received(&mut self, packet_id: PacketId) -> bool {
        let mut ops = std::mem::take(&mut self.handshakes);
        let known = self.state().is_none_or(|mut state| {
            let known = state.queue.receive(packet_id, &self.session.signal, &mut ops);
            state.settle();
            known
        });
        self.handshakes = ops;
        known
    }

    /// PUBCOMP: the QoS 2 delivery is over. False for an unknown identifier.
    pub fn completed(&mut self, packet_id: PacketId) -> bool {
        let mut ops = std::mem::take(&mut self.handshakes);
        let signal = &self.session.signal;
        let known = self.state().is_none_or(|mut state| state.queue.complete(packet_id, signal, &mut ops));
        self.handshakes = ops;
        known
    }

    /// Routes what was published and acknowledged since the last flush. Returns whom to wait for before reading more.
    pub fn flush(&mut self) -> Option<Pressure> {
        self.flush_acknowledged();
        // Whoever publishes nothing that the disk must keep has nothing to wait for.
        let disk_full = self.hub.store().is_some_and(|store| store.is_full())
            && self.runs.iter().flat_map(|run| &run.messages).any(|(_, receipt)| receipt.is_some());
        let sessions = self.flush_runs();
        (disk_full || !sessions.is_empty()).then(|| Pressure { sessions, disk_full, hub: self.hub.clone() })
    }

    fn flush_acknowledged(&mut self) {
        let is_awaited = self.handshakes.iter().any(|op| matches!(op, Op::Release { .. } | Op::Clear { .. }));
        submit(self.hub.store(), &mut self.handshakes, if is_awaited { Due::Now } else { Due::Later });
        if self.acknowledged.is_empty() {
            return;
        }
        let mut acknowledged = std::mem::take(&mut self.acknowledged);
        if let Some(mut state) = self.state() {
            let mut ops = Vec::new();
            for packet_id in acknowledged.drain(..) {
                state.queue.acknowledge(packet_id, &mut ops);
            }
            state.settle();
            submit(self.hub.store(), &mut ops, Due::Later);
        }
    }

    fn flush_runs(&mut self) -> Vec<Arc<Session>> {
        if self.runs.is_empty() {
            // A PUBLISH that repeats an identifier leaves nothing to route and nothing to journal.
            self.end_batch();
            return Vec::new();
        }
        self.batch_began = None;
        let accepted = std::mem::take(&mut self.accepted);
        self.session.counters.received.fetch_add(accepted, Ordering::Relaxed);
        self.hub.0.counters.received.fetch_add(accepted, Ordering::Relaxed);
        // An inbound identifier and the messages accepted under it must reach the disk in one commit.
        let transaction = match self.hub.store() {
            Some(store) if !self.ops.is_empty() => Some(store.transaction()),
            _ => None,
        };
        submit(self.hub.store(), &mut self.ops, Due::Now);
        let mut pressed = Vec::new();
        for run in &mut self.runs {
            for (message, receipt) in run.messages.iter().filter(|(message, _)| message.retain) {
                self.hub.retain(message, receipt.as_ref(), &mut self.ops);
                let due = if receipt.is_some() { Due::Now } else { Due::Eventually };
                submit(self.hub.store(), &mut self.ops, due);
            }
            // A subscription made since the look-up has read the retained messages before or will get these live.
            if run.targets.version != self.hub.0.version.load(Ordering::Acquire)
                && let Some((message, _)) = run.messages.first()
            {
                run.targets = Arc::new(self.hub.targets(message.topic.as_str()));
            }
            pressed.extend(self.hub.deliver(&run.targets, &run.messages, Some(self.session.id), &mut self.ops));
            for (_, receipt) in &run.messages {
                if let Some(receipt) = receipt {
                    receipt.satisfy();
                }
            }
        }
        drop(transaction);
        self.runs.clear();
        self.end_batch();
        pressed
    }

    /// False once another connection has taken over: what this one routed then would come behind what that one sends,
    /// although it was sent before.
    fn begin_batch(&mut self) -> bool {
        self.in_batch = self.in_batch || self.attachment.begin_batch();
        self.in_batch
    }

    fn end_batch(&mut self) {
        if std::mem::take(&mut self.in_batch) {
            self.attachment.end_batch();
        }
    }

    /// Moves up to `max` of what may be sent now to `into`, in the order it must be sent.
    pub fn take(&mut self, into: &mut Vec<Outbound>, max: usize) {
        self.flush_acknowledged();
        let before = into.len();
        let now = self.hub.now();
        let window = self.attachment.window;
        let mut ops = Vec::new();
        let Some(mut state) = self.state() else { return };
        let age = Age { now, max: self.session.limits().max_age };
        let mut expired = 0;
        loop {
            let taken = into.len();
            expired += state.queue.take(into, before + max - taken, window, age, &mut ops);
            if !self.session.peer.give_up_returns(&mut state.queue, into, taken, &mut ops) {
                break;
            }
        }
        state.settle();
        submit(self.hub.store(), &mut ops, Due::Later);
        let (backlog, has_tail) = (state.queue.pressure(), state.queue.has_tail());
        drop(state);
        self.session.tell_drained(backlog);
        if has_tail {
            self.session.page_in(self.hub.store());
        }
        let sent = (into.len() - before) as u64;
        if sent > 0 {
            self.session.counters.sent.fetch_add(sent, Ordering::Relaxed);
            self.hub.0.counters.sent.fetch_add(sent, Ordering::Relaxed);
        }
        self.session.note_expired(expired, now, &self.hub.0.counters);
    }

    /// As [`Link::take`], but only what deliveries that have begun still need; returns how many of them are not over. What
    /// was never sent waits for another connection.
    pub fn take_begun(&mut self, into: &mut Vec<Outbound>, max: usize) -> usize {
        self.flush_acknowledged();
        let window = self.attachment.window;
        self.state().map_or(0, |mut state| state.queue.take_begun(into, max, window))
    }

    /// What the peer has not answered of what was taken: the first of each stream of messages that is in order.
    pub fn unanswered(&mut self) -> Vec<Unanswered> {
        self.flush_acknowledged();
        self.state().map_or(Vec::new(), |state| state.queue.unanswered())
    }

    /// QoS 1 and 2 messages that are to be sent on this connection, live ones aside where a share of it is theirs.
    pub fn backlog(&self) -> u64 {
        self.state().map_or(0, |state| state.queue.backlog())
    }

    /// Whether [`Link::take`] would find nothing, however much it were asked for.
    pub fn is_idle(&self) -> bool {
        self.state().is_none_or(|state| state.queue.is_idle())
    }

    /// Waits for something to send, and takes it. Empty when the connection must close.
    ///
    /// # Cancel safety
    /// Nothing is taken until it is returned.
    pub async fn next(&mut self) -> Vec<Outbound> {
        const BATCH: usize = 256;
        let mut taken = Vec::new();
        while self.fate().is_none() {
            self.take(&mut taken, BATCH);
            if !taken.is_empty() {
                break;
            }
            self.woken().await;
        }
        taken
    }

    /// Sets aside a share of an upstream's connection, of a hundred messages, for the live messages of a priority; see
    /// [`super::Order::LiveBeside`].
    pub fn set_live_share(&mut self, priority: Priority, percent: u8) {
        if let Some(mut state) = self.state() {
            state.queue.set_live_share(priority, percent);
        }
    }

    /// Replaces the will (MQTT-SN 1.2 §6.4).
    pub fn set_will(&mut self, will: Option<Will>) {
        let Some(mut state) = self.state() else { return };
        state.will = will;
        self.session.journal(&mut state, self.hub.store());
    }

    /// Ends the connection in good order (DISCONNECT). `expiry` changes how long the session is kept from now on.
    pub fn detach(mut self, publish_will: bool, expiry: Option<SessionExpiry>) {
        self.flush();
        if let (Some(expiry), Some(mut state)) = (expiry, self.state()) {
            state.expiry = self.hub.allowed_expiry(self.session.face, expiry);
        }
        self.leave(if publish_will { WillDue::Yes } else { WillDue::No });
    }

    fn leave(&mut self, will: WillDue) {
        if std::mem::replace(&mut self.detached, true) {
            return;
        }
        if let Some(mut state) = self.state() {
            state.attached = None;
            state.queue.disconnect();
            state.settle();
            self.session.tell_drained((0, 0));
            self.hub.after_detach(&self.session, state, will);
        }
    }

    /// The session's state, while this connection is the attached one.
    fn state(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.session.state.lock();
        let mine = state.attached.as_ref().is_some_and(|attached| attached.number == self.attachment.number);
        mine.then_some(state)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.flush();
        self.leave(WillDue::Yes);
    }
}
