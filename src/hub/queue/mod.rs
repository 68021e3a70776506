//! A session's outbound queue (MQTT 5.0 §4.3, §4.4, §4.6, §4.9).
//!
//! Pure: no lock, no clock, no task; what must reach the journal is added to a list of operations that the caller
//! submits while it still holds the session's lock, so that the journal sees a session's sequences in order.
//!
//! A queue is one [`Lane`], or for an upstream six: three priorities, each with a lane for its stream of messages and
//! one for what is published while the upstream is connected, where a share of the uplink was set aside for that. Order
//! holds within each lane. Limits, the inflight window and the policy when full are the queue's, over all its lanes.

mod lane;

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::message::{Message, QoS};
use crate::signal::Signal;
use crate::store::{self, Cleared, Op, Packed, PageLimit, QueueSummary, Receipt, SessionId, Sweep, Swept};
use crate::topic::SharedFilter;
use lane::{Identifiers, Lane};

/// MQTT's packet identifier: never zero.
pub type PacketId = NonZeroU16;

/// Limits of one session's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// QoS 1 and 2 messages waiting, in memory and on disk; also QoS 0 messages waiting in memory.
    pub max_messages: u64,
    /// Topic, payload and properties of what waits, in bytes, for each of the two.
    pub max_bytes: u64,
    pub when_full: WhenFull,
    /// What has waited for longer is given up; `None` is never.
    pub max_age: Option<Duration>,
    /// How much of a durable queue is kept in memory before the rest stays on disk.
    pub memory_messages: usize,
    pub memory_bytes: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            max_messages: 100_000,
            max_bytes: 64 << 20,
            when_full: WhenFull::DropNewest,
            max_age: None,
            memory_messages: 4096,
            memory_bytes: 4 << 20,
        }
    }
}

/// What happens to a QoS 1 or 2 message for a session whose queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WhenFull {
    DropOldest,
    DropNewest,
    /// The publisher is told: reason code 0x97 in MQTT 5.0, no acknowledgement in 3.1.1.
    Reject,
}

/// What a session hands to its connection, in the order it must be sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Outbound {
    Publish(Delivery),
    /// PUBREL: the second half of a QoS 2 delivery.
    Release(PacketId),
}

/// A message on its way to one receiver.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivery {
    pub message: Arc<Message>,
    /// The lower of what was published and what was granted.
    pub qos: QoS,
    pub retain: bool,
    /// It may have been sent before.
    pub dup: bool,
    /// Set for QoS 1 and 2.
    pub packet_id: Option<PacketId>,
    /// What it is known by in the session's queue, the same on each delivery: [`store::lane`] and [`store::number`] in it.
    /// Set for QoS 1 and 2.
    pub sequence: Option<u64>,
    /// The subscription identifiers of all subscriptions that matched (MQTT 5.0 §3.3.2.3.8).
    pub identifiers: Option<Arc<[u32]>>,
}

/// A packet that was sent on a connection and that the peer has not answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Unanswered {
    pub packet_id: PacketId,
    /// `None` for a PUBREL.
    pub message: Option<Arc<Message>>,
}

/// A message to be queued, with what its subscription makes of it.
#[derive(Clone, Debug)]
pub struct Incoming {
    pub message: Arc<Message>,
    pub qos: QoS,
    pub retain: bool,
    pub identifiers: Option<Arc<[u32]>>,
    /// The shared subscription that brought it.
    pub shared: Option<Arc<SharedFilter>>,
    /// How many queues hold the message together, as a power of two.
    pub spread: u8,
}

/// A message of a shared subscription whose member's session has ended before it had it.
pub type Orphan = (Arc<SharedFilter>, Arc<Message>);

/// How old a message may be that is still worth delivering.
#[derive(Clone, Copy, Debug)]
pub(super) struct Age {
    pub now: UnixMillis,
    /// See [`QueueLimits::max_age`].
    pub max: Option<Duration>,
}

impl Age {
    /// Whether a message has expired, by what it says itself or by the queue's limit.
    fn is_over(self, message: &Message) -> bool {
        message.is_expired(self.now) || self.max.is_some_and(|max| message.age(self.now) >= max)
    }
}

/// When a message expires in a queue with this limit.
fn expires_at(message: &Message, max_age: Option<Duration>) -> Option<UnixMillis> {
    let by_age = max_age.map(|max| message.accepted_at.plus(max));
    [message.expires_at(), by_age].into_iter().flatten().min()
}

/// What became of a message given to [`Queue::push`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    Queued,
    /// The queue is full and this message was given up.
    DroppedNewest,
    /// The queue was full and an older message was given up for this one.
    DroppedOldest,
    /// QoS 0 for a session that is not connected.
    Skipped,
}

/// How urgent the messages of a subscription are, to an upstream. Whoever is more urgent goes first, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    High,
    #[default]
    Normal,
    Low,
}

impl Priority {
    const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    /// The lane of the priority's backlog; behind it is that of its live messages.
    fn lane(self) -> usize {
        match self {
            // What is in a database from before there were lanes, or in a queue that has one only.
            Self::Normal => 0,
            Self::High => 2,
            Self::Low => 4,
        }
    }
}

/// Where the messages of a subscription stand in line, in a queue of several lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Precedence {
    /// Where several subscriptions of a session match, the one with the lowest rank decides.
    pub rank: u16,
    pub priority: Priority,
    pub order: Order,
    /// The longest that its messages are worth delivering, where they say no less themselves.
    pub expiry: Option<Duration>,
}

impl Precedence {
    /// The message as it is queued: one that says itself when it expires.
    pub fn limit(self, message: &Arc<Message>) -> Arc<Message> {
        match self.expiry {
            Some(most) if message.expiry_interval.is_none_or(|own| own > most) => {
                Arc::new(Message { expiry_interval: Some(most), ..Message::clone(message) })
            }
            _ => message.clone(),
        }
    }
}

/// What comes first of a stream that was cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// The order in which messages were accepted.
    #[default]
    Strict,
    /// What is published while the receiver is connected does not wait behind the backlog: both share the connection.
    LiveBeside,
}

/// Which lanes a queue has; fixed for the life of its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    One,
    ByPriority,
}

/// How many lanes there are [by priority](Layout::ByPriority).
const LANES: u16 = 6;

impl Layout {
    /// The packet identifiers of each lane. An acknowledgement names the lane by its identifier, and a message has the
    /// same one after a crash: so each lane has its fixed part of them, whatever the configuration says today.
    fn lanes(self, session: SessionId, durable: bool) -> Vec<Lane> {
        let count = u16::MAX / LANES;
        let part = |index: u8| Identifiers { first: PacketId::MIN.saturating_add(u16::from(index) * count), count };
        match self {
            Self::One => vec![Lane::new(session, durable, 0, Identifiers::ALL)],
            Self::ByPriority => (0..LANES as u8).map(|index| Lane::new(session, durable, index, part(index))).collect(),
        }
    }
}

/// The name of the stream in which a message with this sequence is in order, as consumers see it; `None` for the only
/// stream that there is without priorities and shares.
pub fn stream_name(sequence: u64) -> Option<&'static str> {
    const NAMES: [&str; LANES as usize - 1] = ["live", "high", "high-live", "low", "low-live"];
    NAMES.get(usize::from(store::lane(sequence)).checked_sub(1)?).copied()
}

/// Messages and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Depth {
    messages: u64,
    bytes: u64,
}

impl std::iter::Sum for Depth {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            messages: sum.messages + one.messages,
            bytes: sum.bytes + one.bytes,
        })
    }
}

/// One session's queue.
#[derive(Debug)]
pub(super) struct Queue {
    /// One or [`LANES`].
    lanes: Vec<Lane>,
    /// For each priority.
    turns: [Turns; Priority::ALL.len()],
}

/// Whose turn it is where a backlog and live messages wait for one connection.
#[derive(Clone, Copy, Debug)]
struct Turns {
    /// Of a hundred messages, those that are live.
    live_share: u8,
    /// What live messages are owed, in hundredths of a message.
    owed: u8,
}

impl Turns {
    fn is_live(self) -> bool {
        self.owed + self.live_share >= 100
    }

    /// Whoever has the turn has made use of it.
    fn advance(&mut self) {
        self.owed = (self.owed + self.live_share) % 100;
    }
}

impl Queue {
    pub fn new(session: SessionId, durable: bool, layout: Layout) -> Self {
        // A share that nobody set matters only for what waits since it was set.
        let turns = Turns { live_share: 50, owed: 0 };
        Self { lanes: layout.lanes(session, durable), turns: [turns; Priority::ALL.len()] }
    }

    /// A durable queue found on disk. Up to `window` of the first messages of each lane may have been sent before the
    /// gateway stopped. `in_doubt` is that of [`store::StoredSession`].
    pub fn restored(
        session: SessionId,
        layout: Layout,
        found: &[QueueSummary],
        in_doubt: Option<&[Cleared]>,
        window: u16,
    ) -> Self {
        let mut queue = Self::new(session, true, layout);
        if let Some(cleared) = in_doubt {
            for (index, lane) in queue.lanes.iter_mut().enumerate() {
                lane.doubt(cleared.iter().find(|cleared| usize::from(cleared.lane()) == index).copied());
            }
        }
        for found in found {
            if let Some(lane) = queue.lanes.get_mut(usize::from(found.lane)) {
                lane.restore(*found, window);
            }
        }
        queue
    }

    /// Sets aside a share of the connection, of a hundred messages, for the live messages of a priority.
    pub fn set_live_share(&mut self, priority: Priority, percent: u8) {
        self.turns[priority as usize].live_share = percent.min(100);
    }

    /// See [`Lane::into_orphans`].
    pub fn into_orphans(self) -> Vec<Orphan> {
        self.lanes.into_iter().flat_map(Lane::into_orphans).collect()
    }

    /// Messages waiting or unacknowledged.
    pub fn len(&self) -> u64 {
        self.lanes.iter().map(Lane::len).sum()
    }

    /// Bytes waiting, in memory and on disk, or unacknowledged.
    pub fn bytes(&self) -> u64 {
        self.lanes.iter().map(Lane::bytes).sum()
    }

    /// Messages and bytes that wait in memory, in the lane with the most: what a slow connection makes grow.
    pub fn pressure(&self) -> (usize, u64) {
        self.lanes.iter().map(Lane::pressure).fold((0, 0), |most, lane| (most.0.max(lane.0), most.1.max(lane.1)))
    }

    /// QoS 1 and 2 messages that are to be sent on this connection, except those that are live.
    pub fn backlog(&self) -> u64 {
        let backlogs = Priority::ALL.iter().filter_map(|priority| self.lanes.get(priority.lane()));
        backlogs.map(Lane::unsent).sum()
    }

    /// Whether there is nothing to send, now or once something has reached the disk.
    pub fn is_idle(&self) -> bool {
        self.lanes.iter().all(Lane::is_idle)
    }

    /// What is not yet acknowledged of what was sent on this connection.
    pub fn outstanding(&self) -> usize {
        self.lanes.iter().map(Lane::outstanding).sum()
    }

    /// The first of each lane that the peer has not answered of what was sent on this connection.
    pub fn unanswered(&self) -> Vec<Unanswered> {
        self.lanes.iter().filter_map(Lane::unanswered).collect()
    }

    /// This queue's part of the memory that messages take, in bytes.
    pub fn held(&self) -> u64 {
        self.lanes.iter().map(Lane::held).sum()
    }

    /// Whether a part of the queue is on disk only.
    pub fn has_tail(&self) -> bool {
        self.lanes.iter().any(Lane::has_tail)
    }

    /// Whether one more QoS 1 or 2 message of `size` bytes would go over a limit.
    pub fn is_full(&self, size: usize, limits: &QueueLimits) -> bool {
        exceeds(self.lanes.iter().map(Lane::depth).sum(), size, limits)
    }

    /// The lane in which a message stands that is accepted now.
    pub fn lane_for(&self, precedence: Precedence, connected: bool, limits: &QueueLimits) -> usize {
        if self.lanes.len() == 1 {
            return 0;
        }
        let lane = precedence.priority.lane();
        // What does not fit in memory is late already: it joins the backlog, and the live messages stay live.
        let live = precedence.order == Order::LiveBeside && connected && self.lanes[lane + 1].fits_in_memory(limits);
        lane + usize::from(live)
    }

    /// Whether a part of a lane is on disk only.
    pub fn lane_has_tail(&self, lane: usize) -> bool {
        self.lanes[lane].has_tail()
    }

    /// Adds a message to `lane`, or gives one up. `receipt` is the publisher's: it counts the journal entry made here.
    #[allow(clippy::too_many_arguments)]
    pub fn push(
        &mut self,
        lane: usize,
        incoming: Incoming,
        receipt: Option<&Arc<Receipt>>,
        connected: bool,
        signal: &Arc<Signal>,
        limits: &QueueLimits,
        ops: &mut Vec<Op>,
    ) -> Pushed {
        let size = incoming.message.size();
        if incoming.qos == QoS::AtMostOnce {
            if !connected {
                return Pushed::Skipped;
            }
            if exceeds(self.lanes.iter().map(Lane::depth_lossy).sum(), size, limits) {
                return Pushed::DroppedNewest;
            }
            self.lanes[lane].push_lossy(incoming, size);
            return Pushed::Queued;
        }
        let mut pushed = Pushed::Queued;
        if self.is_full(size, limits) {
            if limits.when_full != WhenFull::DropOldest || !self.drop_oldest(lane, ops) {
                return Pushed::DroppedNewest;
            }
            pushed = Pushed::DroppedOldest;
        }
        self.lanes[lane].push(incoming, size, receipt, signal, limits, ops);
        pushed
    }

    /// See [`Lane::purge`].
    pub fn purge(&mut self, ops: &mut Vec<Op>) -> u64 {
        self.lanes.iter_mut().map(|lane| lane.purge(ops)).sum()
    }

    /// Gives up the oldest message of the least urgent lane that has one, for one that is to stand in `lane`: never
    /// what is more urgent.
    fn drop_oldest(&mut self, lane: usize, ops: &mut Vec<Op>) -> bool {
        if let [only] = &mut *self.lanes {
            return only.drop_oldest(ops);
        }
        for priority in Priority::ALL.into_iter().rev() {
            let backlog = priority.lane();
            if self.lanes[backlog..=backlog + 1].iter_mut().any(|lane| lane.drop_oldest(ops)) {
                return true;
            }
            if (backlog..=backlog + 1).contains(&lane) {
                break;
            }
        }
        false
    }

    /// Moves up to `max` of what may be sent now to `into`: what is more urgent first, and of one lane redeliveries
    /// first, then PUBRELs, then QoS 0, then new messages while fewer than `window` are unacknowledged. Returns how many
    /// expired messages were given up.
    pub fn take(&mut self, into: &mut Vec<Outbound>, max: usize, window: u16, age: Age, ops: &mut Vec<Op>) -> u64 {
        if let [only] = &mut *self.lanes {
            return only.take(into, max, window, age, ops);
        }
        let end = into.len() + max;
        self.lanes.iter_mut().for_each(|lane| lane.take_releases(into, end));
        let mut expired = 0;
        for (priority, turns) in Priority::ALL.into_iter().zip(&mut self.turns) {
            let backlog = priority.lane();
            while into.len() < end {
                let outstanding = self.lanes.iter().map(Lane::outstanding).sum::<usize>();
                let [backlog, live] = &mut self.lanes[backlog..=backlog + 1] else { break };
                let both = !backlog.is_idle() && !live.is_idle();
                let (turn, other) = if both && turns.is_live() || !both && backlog.is_idle() {
                    (live, backlog)
                } else {
                    (backlog, live)
                };
                let mut take = |lane: &mut Lane, end: usize, into: &mut Vec<Outbound>| {
                    let others = outstanding - lane.outstanding();
                    let window = u16::try_from(usize::from(window).saturating_sub(others)).unwrap_or(u16::MAX);
                    lane.take_again(into, end, window);
                    expired += lane.take_new(into, end, window, age, ops);
                };
                let before = into.len();
                take(turn, if both { before + 1 } else { end }, into);
                if !both {
                    break;
                }
                if into.len() > before {
                    turns.advance();
                    continue;
                }
                // It waits for the disk, or for the window.
                take(other, before + 1, into);
                if into.len() == before {
                    break;
                }
            }
        }
        expired
    }

    /// Moves up to `max` of what deliveries that have begun still need to `into`, and nothing that was never sent. Returns
    /// how many of them are not over.
    pub fn take_begun(&mut self, into: &mut Vec<Outbound>, max: usize, window: u16) -> usize {
        let end = into.len() + max;
        for lane in &mut self.lanes {
            lane.take_again(into, end, window);
            lane.take_releases(into, end);
        }
        self.lanes.iter().map(Lane::begun).sum()
    }

    /// Gives up what has expired of what waits in memory; returns how many messages that were.
    pub fn sweep(&mut self, age: Age, ops: &mut Vec<Op>) -> u64 {
        self.lanes.iter_mut().map(|lane| lane.sweep(age, ops)).sum()
    }

    /// What the store should sweep, of a tail that may hold something that has expired; and again, as there may be
    /// another lane. The caller gives what was found to [`Queue::swept`].
    pub fn wants_sweep(&mut self, age: Age) -> Option<Sweep> {
        self.lanes.iter_mut().find_map(|lane| lane.wants_sweep(age))
    }

    /// Takes note of what a sweep has removed.
    pub fn swept(&mut self, sweep: Sweep, swept: Swept) {
        if let Some(lane) = self.lanes.get_mut(usize::from(store::lane(sweep.from))) {
            lane.swept(sweep, swept);
        }
    }

    /// Other limits hold: what expires when is not known any more.
    pub fn sweep_again(&mut self) {
        self.lanes.iter_mut().for_each(Lane::sweep_again);
    }

    /// The first sequence of each part that is on disk only.
    pub fn tails(&self) -> Vec<u64> {
        self.lanes.iter().filter_map(Lane::tail_from).collect()
    }

    /// The lane that an identifier belongs to.
    fn lane_of(&mut self, id: PacketId) -> Option<&mut Lane> {
        let lane = if self.lanes.len() == 1 { 0 } else { usize::from((id.get() - 1) / (u16::MAX / LANES)) };
        self.lanes.get_mut(lane)
    }

    /// PUBACK, or PUBREC with an error: the delivery is over. False for an identifier that is not inflight.
    pub fn acknowledge(&mut self, id: PacketId, ops: &mut Vec<Op>) -> bool {
        self.lane_of(id).is_some_and(|lane| lane.acknowledge(id, ops))
    }

    /// PUBCOMP: the QoS 2 delivery is over. False for an identifier that was not released for one.
    pub fn complete(&mut self, id: PacketId, signal: &Arc<Signal>, ops: &mut Vec<Op>) -> bool {
        self.lane_of(id).is_some_and(|lane| lane.complete(id, signal, ops))
    }

    /// PUBREC: [`Queue::take`] yields the PUBREL once this is on disk. False for an identifier that is not inflight.
    pub fn receive(&mut self, id: PacketId, signal: &Arc<Signal>, ops: &mut Vec<Op>) -> bool {
        self.lane_of(id).is_some_and(|lane| lane.receive(id, signal, ops))
    }

    /// A new connection: everything unacknowledged is sent again, in order (MQTT 5.0 §4.4).
    pub fn rewind(&mut self) {
        self.lanes.iter_mut().for_each(Lane::rewind);
    }

    /// The receiver has begun a new session: it holds no identifiers.
    pub fn clear_all(&mut self, signal: &Arc<Signal>, ops: &mut Vec<Op>) {
        self.lanes.iter_mut().for_each(|lane| lane.clear_all(signal, ops));
    }

    /// The connection is gone: QoS 0 goes with it.
    pub fn disconnect(&mut self) {
        self.lanes.iter_mut().for_each(Lane::disconnect);
    }

    /// Counts every message in memory as this queue's alone: those that held it too may have let go of it.
    pub fn hold_alone(&mut self) {
        self.lanes.iter_mut().for_each(Lane::hold_alone);
    }

    /// Lets go of what waits in memory and is in the journal too, except the first `kept` messages of each lane.
    pub fn page_out(&mut self, kept: usize, limits: &QueueLimits) {
        self.lanes.iter_mut().for_each(|lane| lane.page_out(kept, limits));
    }

    /// The sequence to page in from, when no more than one `page` of a lane waits in memory and it has a tail. The caller
    /// asks the store and gives the page to [`Queue::page_in`]; and asks again here, as there may be another lane.
    pub fn wants_page(&mut self, page: PageLimit) -> Option<u64> {
        if let [only] = &mut *self.lanes {
            return only.wants_page(page);
        }
        for priority in Priority::ALL {
            let lanes = &mut self.lanes[priority.lane()..=priority.lane() + 1];
            if let Some(from) = lanes.iter_mut().find_map(|lane| lane.wants_page(page)) {
                return Some(from);
            }
            // What is less urgent comes after all of it; its turn to fill memory comes then too.
            if lanes.iter().any(Lane::has_tail) {
                return None;
            }
        }
        None
    }

    /// Appends the page of a tail that was asked for from sequence `from` on. `complete` says that nothing followed it
    /// on disk when it was read.
    pub fn page_in(&mut self, from: u64, messages: Packed, complete: bool) {
        if let Some(lane) = self.lanes.get_mut(usize::from(store::lane(from))) {
            lane.page_in(messages, complete);
        }
    }

    /// A message of the lane of sequence `from` is lost, and its receiver may hold its identifier.
    pub fn doubt(&mut self, from: u64) {
        if let Some(lane) = self.lanes.get_mut(usize::from(store::lane(from))) {
            lane.doubt(None);
        }
    }

    /// As [`Queue::doubt`], of any lane.
    pub fn doubt_all(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.doubt(None));
    }

    /// The page from sequence `from` on could not be read; [`Queue::wants_page`] asks again.
    pub fn page_failed(&mut self, from: u64) {
        if let Some(lane) = self.lanes.get_mut(usize::from(store::lane(from))) {
            lane.page_failed();
        }
    }
}

/// Whether one more message of `size` bytes is more than `limits` allow beside what is there.
fn exceeds(held: Depth, size: usize, limits: &QueueLimits) -> bool {
    held.messages >= limits.max_messages || held.bytes + size as u64 > limits.max_bytes
}

#[cfg(test)]
mod tests;
