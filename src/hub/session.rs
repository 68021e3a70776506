//! A session: subscriptions, an outbound queue and QoS state that outlive the network connection (MQTT 5.0 §4.1).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tracing::{error, warn};

use super::access::{Identity, Rights};
use super::attachment::{Attachment, Fate};
use super::bridged::PeerGateway;
use super::expiry::Episode;
use super::memory::{Account, Memory};
use super::queue::{Incoming, Layout, Precedence, Pushed, Queue, QueueLimits, WhenFull};
use super::{Counters, Drops, PacketId, SubscribeOptions, Will};
use crate::clock::UnixMillis;
use crate::message::QoS;
use crate::signal::Signal;
use crate::store::{Due, Op, Receipt, ReceiptState, SessionId, SessionRecord, Store, WillRecord};
use crate::topic::SharedFilter;

/// What a session is to the gateway. Client ids are unique within a face.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Face {
    Mqtt = 0,
    MqttSn = 1,
    Upstream = 2,
    Adapter = 3,
    Web = 4,
}

impl Face {
    const ALL: [Self; 5] = [Self::Mqtt, Self::MqttSn, Self::Upstream, Self::Adapter, Self::Web];

    pub(super) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The lanes of its sessions' queues.
    pub(super) fn layout(self) -> Layout {
        if self == Self::Upstream { Layout::ByPriority } else { Layout::One }
    }

    /// The face with this [name](Self::name).
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|face| face.name() == name)
    }

    /// The name used in the API and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mqtt => "mqtt",
            Self::MqttSn => "mqtt-sn",
            Self::Upstream => "upstream",
            Self::Adapter => "adapter",
            Self::Web => "web",
        }
    }
}

/// How long a session is kept after its connection is gone (MQTT 5.0 §3.1.2.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionExpiry {
    OnDetach,
    After(Duration),
    Never,
}

/// A session and everything that outlives its connection.
#[derive(Debug)]
pub(super) struct Session {
    pub id: SessionId,
    pub face: Face,
    pub client_id: Arc<str>,
    pub identity: Identity,
    /// Whether it is journaled; fixed for the session's life.
    pub durable: bool,
    limits: RwLock<QueueLimits>,
    pub rights: RwLock<Rights>,
    pub peer: PeerGateway,
    /// Raised for whoever is attached.
    pub signal: Arc<Signal>,
    pub state: Mutex<State>,
    pub counters: SessionCounters,
    /// Told when the backlog of a receiver that publishers wait for has gone down.
    drained: Notify,
    waited_for: AtomicBool,
    slow: AtomicBool,
    /// Messages given up because the queue is full, or refused, since it last had room; each such episode is logged once.
    overflow: AtomicU64,
    pub expired: Episode,
}

#[derive(Debug, Default)]
pub(super) struct SessionCounters {
    pub sent: AtomicU64,
    pub received: AtomicU64,
    pub dropped: Drops,
}

/// How many messages may wait for a connection that keeps up: about what it takes at once.
const KEEPS_UP: usize = 256;

/// What everybody shares and there is not enough of, beside a queue's own limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortage {
    Memory,
    Disk,
}

#[derive(Debug)]
pub(super) struct State {
    pub attached: Option<Arc<Attachment>>,
    pub detached_at: Option<UnixMillis>,
    pub expiry: SessionExpiry,
    pub will: Option<Will>,
    pub subscriptions: BTreeMap<Arc<str>, Subscribed>,
    /// The journal has a record of the session that says all there is to say: see [`Session::journal`].
    pub is_recorded: bool,
    pub queue: Queue,
    /// What the queue holds of the memory for all queues.
    pub account: Account,
    /// Inbound QoS 2 identifiers that are not released yet, with what their PUBREC waits for.
    pub inbound: HashMap<u16, Option<Arc<Receipt>>>,
    /// Those of them that the peer may have released: the database was damaged since.
    pub inbound_in_doubt: HashSet<u16>,
    /// Set when the session has ended, so that a late delivery does not journal for it.
    pub ended: bool,
}

/// A subscription as the session has it.
#[derive(Debug)]
pub(super) struct Subscribed {
    pub filter: SharedFilter,
    pub options: SubscribeOptions,
    /// What its journal entry waits for; `None` where it was found in the journal, or needs no entry.
    pub receipt: Option<Arc<Receipt>>,
}

impl Subscribed {
    /// Whether the journal has it already just as `options` would have it.
    pub fn is_stored_as(&self, options: SubscribeOptions) -> bool {
        (self.options.to_byte(), self.options.identifier) == (options.to_byte(), options.identifier)
            && self.receipt.as_ref().is_none_or(|receipt| receipt.state() == ReceiptState::Done)
    }
}

impl State {
    /// To be called when messages may have come into the queue's memory or left it.
    pub fn settle(&mut self) {
        self.account.settle(self.queue.held());
    }

    /// What the PUBREC of an inbound QoS 2 message waits for; `None` where no message was accepted under this identifier.
    /// One that could not be kept was not: when it comes again it is new.
    pub fn inbound_of(&self, id: PacketId) -> Option<&Option<Arc<Receipt>>> {
        let is_failed = |receipt: &Arc<Receipt>| receipt.state() == ReceiptState::Failed;
        self.inbound.get(&id.get()).filter(|receipt| !receipt.as_ref().is_some_and(is_failed))
    }

    /// How long the session has been without a connection.
    fn away(&self, now: UnixMillis) -> Option<Duration> {
        self.detached_at.filter(|_| self.attached.is_none()).map(|detached_at| now.since(detached_at))
    }

    /// Whether the session has been without a connection for as long as it may.
    pub fn has_expired(&self, now: UnixMillis) -> bool {
        self.away(now).is_some_and(|away| match self.expiry {
            SessionExpiry::OnDetach => true,
            SessionExpiry::After(interval) => away >= interval,
            SessionExpiry::Never => false,
        })
    }

    /// Whether its will must be published: the delay is over, or the session is (MQTT 5.0 §3.1.3.2.2).
    pub fn will_is_due(&self, now: UnixMillis) -> bool {
        let (Some(will), Some(away)) = (&self.will, self.away(now)) else { return false };
        away >= will.delay || self.has_expired(now)
    }
}

/// How many waiting messages or bytes of a connected receiver make its publishers wait, and where they go on.
const BACKLOG_HIGH: (usize, u64) = (8192, 4 << 20);
const BACKLOG_LOW: (usize, u64) = (2048, 1 << 20);
/// How long a publisher waits for a receiver that makes no headway before it goes on without regard to it. One that is
/// merely slow, on a machine that is busy, is waited for: or a burst that its queue cannot hold would be lost.
const PATIENCE: Duration = Duration::from_millis(250);
/// Headway: so many messages taken, or bytes, in that time. At this rate a backlog has gone down in three seconds.
const HEADWAY: (u64, u64) = (512, 256 << 10);

impl Session {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        id: SessionId,
        face: Face,
        client_id: Arc<str>,
        identity: Identity,
        durable: bool,
        limits: QueueLimits,
        rights: Rights,
        queue: Queue,
        memory: &Arc<Memory>,
    ) -> Self {
        let state = State {
            attached: None,
            detached_at: None,
            expiry: SessionExpiry::OnDetach,
            will: None,
            subscriptions: BTreeMap::new(),
            is_recorded: false,
            queue,
            account: Account::new(memory),
            inbound: HashMap::new(),
            inbound_in_doubt: HashSet::new(),
            ended: false,
        };
        Self {
            id,
            face,
            client_id,
            identity,
            durable,
            limits: RwLock::new(limits),
            rights: RwLock::new(rights),
            peer: PeerGateway::default(),
            signal: Arc::default(),
            state: Mutex::new(state),
            counters: SessionCounters::default(),
            drained: Notify::new(),
            waited_for: AtomicBool::new(false),
            slow: AtomicBool::new(false),
            overflow: AtomicU64::new(0),
            expired: Episode::default(),
        }
    }

    /// Limits of the queue.
    pub fn limits(&self) -> QueueLimits {
        *self.limits.read()
    }

    /// Takes over other limits, as after a changed configuration. What waits already stays.
    pub fn set_limits(&self, limits: QueueLimits) {
        *self.limits.write() = limits;
    }

    /// Queues messages for this session under one lock and wakes its connection once. True when publishers should wait
    /// for it.
    pub fn accept(
        &self,
        precedence: Precedence,
        incoming: impl Iterator<Item = (Incoming, Option<Arc<Receipt>>)>,
        store: Option<&Store>,
        ops: &mut Vec<Op>,
        counters: &Counters,
    ) -> bool {
        let mut state = self.state.lock();
        if state.ended {
            return false;
        }
        let connected = state.attached.is_some();
        let limits = self.limits();
        // Memory that only this queue holds is counted as such; see `memory`.
        let alone = !connected || self.slow.load(Ordering::Relaxed);
        let shortage = self.shortage(&state, store);
        let (mut dropped, mut refused, mut lane) = (0, 0, 0);
        for (mut incoming, receipt) in incoming {
            if alone {
                incoming.spread = 0;
            }
            lane = state.queue.lane_for(precedence, connected, &limits);
            let squeezed = shortage.map(|shortage| self.squeezed(limits, shortage, incoming.qos));
            let limits = squeezed.as_ref().unwrap_or(&limits);
            let can_refuse = limits.when_full == WhenFull::Reject && incoming.qos != QoS::AtMostOnce;
            let pushed = state.queue.push(lane, incoming, receipt.as_ref(), connected, &self.signal, limits, ops);
            match (pushed, &receipt) {
                (Pushed::DroppedNewest, Some(receipt)) if can_refuse => {
                    receipt.add();
                    receipt.fail();
                    refused += 1;
                }
                (Pushed::DroppedNewest | Pushed::DroppedOldest, _) => dropped += 1,
                _ => {}
            }
        }
        state.settle();
        if !ops.is_empty() {
            // Whoever is connected and keeps up will likely acknowledge before the commit, and spare it.
            let due = if connected && !state.queue.lane_has_tail(lane) { Due::Soon } else { Due::Now };
            submit(store, ops, due);
        }
        let backlog = state.queue.pressure();
        // Asked only to end an episode of losses, which most queues never have.
        let may_recover = shortage != Some(Shortage::Disk) && !state.account.is_tight();
        let has_room =
            self.overflow.load(Ordering::Relaxed) > 0 && may_recover && { !state.queue.is_full(0, &half(limits)) };
        drop(state);
        if connected {
            self.signal.raise();
        }
        if dropped > 0 {
            for drops in [&self.counters.dropped, &counters.dropped] {
                let counter = match shortage {
                    Some(Shortage::Disk) => &drops.store_full,
                    Some(Shortage::Memory) => &drops.memory_full,
                    None => &drops.queue_full,
                };
                counter.fetch_add(dropped, Ordering::Relaxed);
            }
        }
        if refused > 0 {
            self.note_refused(refused, shortage, counters);
        }
        self.note_overflow(dropped, has_room, shortage, &limits);
        let short = shortage == Some(Shortage::Memory);
        let behind = short || backlog.0 >= BACKLOG_HIGH.0 || backlog.1 >= BACKLOG_HIGH.1;
        connected && behind && !self.slow.load(Ordering::Relaxed)
    }

    /// What is lacking to queue more here. A full disk binds queues that grow on it; one whose receiver keeps up goes on
    /// in what the store holds back for it.
    pub fn shortage(&self, state: &State, store: Option<&Store>) -> Option<Shortage> {
        let behind = || state.queue.has_tail() || state.queue.pressure().0 > KEEPS_UP;
        let grows = self.durable && (state.attached.is_none() || behind());
        if grows && store.is_some_and(Store::is_full) {
            return Some(Shortage::Disk);
        }
        state.account.is_short().then_some(Shortage::Memory)
    }

    /// The limits of a queue in want of memory or disk.
    fn squeezed(&self, limits: QueueLimits, shortage: Shortage, qos: QoS) -> QueueLimits {
        match shortage {
            // Whoever rejects was asked before; what came since then finds room in what the store holds back.
            Shortage::Disk if qos == QoS::AtMostOnce || limits.when_full == WhenFull::Reject => limits,
            Shortage::Memory if self.durable && qos != QoS::AtMostOnce => QueueLimits { memory_messages: 0, ..limits },
            Shortage::Disk | Shortage::Memory => QueueLimits { max_messages: 0, ..limits },
        }
    }

    /// Counts messages that this queue had no room for, of which their publishers are told, and logs the first of an
    /// episode.
    pub fn note_refused(&self, refused: u64, shortage: Option<Shortage>, counters: &Counters) {
        let counter = match shortage {
            Some(Shortage::Disk) => &counters.refused_store_full,
            Some(Shortage::Memory) => &counters.refused_memory_full,
            None => &counters.refused_queue_full,
        };
        counter.fetch_add(refused, Ordering::Relaxed);
        if self.overflow.fetch_add(refused, Ordering::Relaxed) == 0 {
            let (face, client_id, full) = (self.face.name(), &self.client_id, what_is_full(shortage));
            let QueueLimits { max_messages, max_bytes, .. } = self.limits();
            warn!(face, %client_id, max_messages, max_bytes, "{full}, messages are refused to their publishers");
        }
    }

    /// What is full, while messages find no room here. Over once there is room, although nothing has come since to log it.
    pub fn lacking(&self, store: Option<&Store>) -> Option<&'static str> {
        if self.overflow.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let state = self.state.lock();
        let shortage = self.shortage(&state, store);
        let lacks = shortage.is_some() || state.queue.is_full(0, &half(self.limits()));
        lacks.then(|| what_is_full(shortage))
    }

    /// Logs the beginning and the end of an episode in which messages found no room.
    fn note_overflow(&self, dropped: u64, has_room: bool, shortage: Option<Shortage>, limits: &QueueLimits) {
        let (face, client_id) = (self.face.name(), &self.client_id);
        if dropped > 0 {
            if self.overflow.fetch_add(dropped, Ordering::Relaxed) == 0 {
                let (max_messages, max_bytes, full) = (limits.max_messages, limits.max_bytes, what_is_full(shortage));
                error!(face, %client_id, max_messages, max_bytes, "{full}, messages are given up");
            }
        } else if has_room {
            let turned_away = self.overflow.swap(0, Ordering::Relaxed);
            warn!(face, %client_id, turned_away, "the queue has room again");
        }
    }

    /// Waits until the backlog has gone down, the connection is gone, or patience ends.
    pub async fn drained(&self) {
        let mut last_look = None;
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            self.waited_for.store(true, Ordering::SeqCst);
            let pressure = {
                let state = self.state.lock();
                if state.attached.is_none() || !over_low(state.queue.pressure()) {
                    return;
                }
                state.queue.pressure()
            };
            let look = (self.counters.sent.load(Ordering::Relaxed), pressure.1);
            if last_look.is_some_and(|last| !makes_headway(last, look)) {
                break;
            }
            last_look = Some(look);
            if tokio::time::timeout(PATIENCE, drained).await.is_ok() {
                return;
            }
        }
        self.slow.store(true, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.queue.hold_alone();
        state.settle();
    }

    /// To be called, with the lock held or not, when the backlog may have gone down.
    pub fn tell_drained(&self, backlog: (usize, u64)) {
        if self.waited_for.load(Ordering::Relaxed) && !over_low(backlog) {
            self.waited_for.store(false, Ordering::Relaxed);
            self.drained.notify_waiters();
        }
        if self.slow.load(Ordering::Relaxed) && !over_low(backlog) {
            self.slow.store(false, Ordering::Relaxed);
        }
    }

    /// Asks the store for the next pages of the queue's tails, where a head runs low.
    pub fn page_in(self: &Arc<Self>, store: Option<&Store>) {
        let Some(store) = store else { return };
        let limits = self.limits();
        let (wanted, limit) = {
            let mut state = self.state.lock();
            let limit = state.account.page(&limits);
            let wanted: Vec<u64> = std::iter::from_fn(|| state.queue.wants_page(limit)).collect();
            (wanted, limit)
        };
        for from in wanted {
            let session = self.clone();
            let then = move |page: crate::store::Page| {
                let mut state = session.state.lock();
                if page.failed {
                    state.queue.page_failed(from);
                } else {
                    if page.in_doubt {
                        state.queue.doubt(from);
                    }
                    state.queue.page_in(from, page.messages, page.complete);
                    state.settle();
                }
                drop(state);
                session.signal.raise();
            };
            store.load(self.id, from, limit, Box::new(then));
        }
    }

    /// All that the journal keeps of the session, but its queue.
    pub fn records(&self, state: &State) -> Vec<Op> {
        let session = self.id;
        let subscriptions = state.subscriptions.iter().map(|(text, held)| Op::PutSubscription {
            session,
            filter: text.clone(),
            options: held.options.to_byte(),
            identifier: held.options.identifier.map(|identifier| identifier.get()),
            receipt: None,
        });
        let inbound = state.inbound.keys().map(|&packet_id| Op::AddInbound { session, packet_id, receipt: None });
        std::iter::once(self.record(state)).chain(subscriptions).chain(inbound).collect()
    }

    /// Journals what the session has become. Where it is kept for ever, whether and since when it is without a connection
    /// decides nothing: a client that comes back to such a session costs no write.
    pub fn journal(&self, state: &mut State, store: Option<&Store>) {
        if !self.durable {
            return;
        }
        let says_all = state.expiry == SessionExpiry::Never && state.will.is_none();
        if says_all && state.is_recorded {
            return;
        }
        state.is_recorded = says_all;
        submit(store, &mut vec![self.record(state)], Due::Soon);
    }

    fn record(&self, state: &State) -> Op {
        Op::PutSession(Box::new(SessionRecord {
            id: self.id,
            face: self.face as u8,
            client_id: self.client_id.clone(),
            user: self.identity.user.clone(),
            expiry_interval: match state.expiry {
                SessionExpiry::OnDetach => Some(Duration::ZERO),
                SessionExpiry::After(interval) => Some(interval),
                SessionExpiry::Never => None,
            },
            detached_at: state.detached_at,
            will: state
                .will
                .as_ref()
                .map(|will| Box::new(WillRecord { message: will.message.clone(), delay: will.delay })),
        }))
    }

    /// Makes the attached connection close.
    pub fn condemn(&self, state: &mut State, fate: Fate) {
        if let Some(attached) = state.attached.take() {
            attached.condemn(fate);
            self.signal.raise();
        }
        state.queue.disconnect();
        state.settle();
        self.tell_drained((0, 0));
    }
}

/// Hands operations to the store; without one there is nothing to keep.
pub(super) fn submit(store: Option<&Store>, ops: &mut Vec<Op>, due: Due) {
    match store {
        Some(store) if !ops.is_empty() => store.submit(ops, due),
        _ => ops.clear(),
    }
}

/// From one look to the next: messages sent, and bytes that wait.
/// Where room is wanted, with the keys that give more.
/// A queue that was full has room again below half of its limits.
fn half(limits: QueueLimits) -> QueueLimits {
    QueueLimits { max_messages: limits.max_messages / 2, max_bytes: limits.max_bytes / 2, ..limits }
}

fn what_is_full(shortage: Option<Shortage>) -> &'static str {
    match shortage {
        Some(Shortage::Disk) => "the database or its disk is full (`store.max_size`, `store.max_messages`)",
        Some(Shortage::Memory) => "the memory for all queues is used up (`limits.max_queue_memory`)",
        None => "the queue is full",
    }
}

fn makes_headway(last: (u64, u64), now: (u64, u64)) -> bool {
    now.0 - last.0 >= HEADWAY.0 || last.1.saturating_sub(now.1) >= HEADWAY.1
}

fn over_low(backlog: (usize, u64)) -> bool {
    backlog.0 >= BACKLOG_LOW.0 || backlog.1 >= BACKLOG_LOW.1
}
