//! A session's outbound queue and inflight window (MQTT 5.0 §4.3, §4.4, §4.6, §4.9).
//!
//! Pure: no lock, no clock, no task; what must reach the journal is added to a list of operations that the caller
//! submits while it still holds the session's lock, so that the journal sees a session's sequences in order.
//!
//! **Memory and disk.** The head of the queue is in memory. When the head is full, later messages of a durable queue are
//! journaled only (the *tail*) and paged back in as the head drains.
//!
//! **Packet identifiers** are a function of the queue's sequence, so that a message keeps its identifier through a crash
//! without a write for each send. A QoS 2 message of a durable queue is sent only once it is on disk: after a crash it
//! goes out again under the same identifier and its receiver can tell that it is the same message.

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::sync::Arc;

use crate::clock::UnixMillis;
use crate::message::{Message, QoS};
use crate::signal::Signal;
use crate::store::{Op, QueueSummary, Receipt, ReceiptState, SessionId, StoredMessage, StoredState};
use crate::topic::SharedFilter;

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
    /// Its number in the session's queue, the same on each delivery. Set for QoS 1 and 2.
    pub sequence: Option<u64>,
    /// The subscription identifiers of all subscriptions that matched (MQTT 5.0 §3.3.2.3.8).
    pub identifiers: Option<Arc<[u32]>>,
}

/// A message to be queued, with what its subscription makes of it.
#[derive(Clone, Debug)]
pub struct Incoming {
    pub message: Arc<Message>,
    pub qos: QoS,
    pub retain: bool,
    pub identifiers: Option<Arc<[u32]>>,
    /// The shared subscription that brought it; not journaled.
    pub shared: Option<Arc<SharedFilter>>,
    /// How many queues hold the message together, as a power of two.
    pub spread: u8,
}

impl Incoming {
    /// This queue's part of the memory that a message of `size` bytes takes.
    fn weight(&self, size: usize) -> u64 {
        (size_of::<Entry>() + ((size + size_of::<Message>()) >> self.spread)) as u64
    }

    fn own_weight(&self) -> u64 {
        self.weight(self.message.size())
    }
}

/// A message of a shared subscription whose member's session has ended before it had it.
pub type Orphan = (Arc<SharedFilter>, Arc<Message>);

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

#[derive(Debug)]
struct Entry {
    sequence: u64,
    incoming: Incoming,
    /// A QoS 2 message of a durable queue waits for this before it is sent.
    committed: Option<Arc<Receipt>>,
}

#[derive(Debug)]
struct Inflight {
    sequence: u64,
    state: InflightState,
}

#[derive(Debug)]
enum InflightState {
    /// PUBLISH was sent; PUBACK or PUBREC is awaited.
    Published(Incoming),
    /// PUBREC has come and is being journaled; PUBREL may not be sent before.
    Releasing(Arc<Receipt>),
    /// PUBREL was sent; PUBCOMP is awaited.
    Released,
    /// Acknowledged out of order; leaves when it comes to the front.
    Done,
}

/// The part of a durable queue that is on disk only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tail {
    /// The first sequence that is on disk only.
    from: u64,
    messages: u64,
    bytes: u64,
}

/// One session's queue.
#[derive(Debug)]
pub struct Queue {
    session: SessionId,
    /// Whether messages are journaled; fixed for the life of the session.
    durable: bool,
    /// QoS 1 and 2 in order, not yet sent.
    waiting: VecDeque<Entry>,
    waiting_bytes: u64,
    /// QoS 0, not yet sent; beside the window and never journaled.
    lossy: VecDeque<Incoming>,
    lossy_bytes: u64,
    /// QoS 1 and 2 in order, sent and not yet acknowledged.
    inflight: VecDeque<Inflight>,
    /// How many of `inflight` have been sent on this connection; the rest is sent again before anything new.
    resent: usize,
    /// How many of those sent on this connection are not yet acknowledged.
    outstanding: usize,
    /// PUBRELs that may be sent.
    releases: VecDeque<PacketId>,
    /// How many of `inflight` wait for their PUBREC to reach the disk.
    releasing: usize,
    tail: Option<Tail>,
    loading: Option<u64>,
    next_sequence: u64,
    /// Messages found on disk at start that may have been sent before the crash.
    maybe_sent: usize,
    /// What the messages in memory weigh.
    held: u64,
}

impl Queue {
    pub fn new(session: SessionId, durable: bool) -> Self {
        Self {
            session,
            durable,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            lossy: VecDeque::new(),
            lossy_bytes: 0,
            inflight: VecDeque::new(),
            resent: 0,
            outstanding: 0,
            releases: VecDeque::new(),
            releasing: 0,
            tail: None,
            loading: None,
            next_sequence: 0,
            maybe_sent: 0,
            held: 0,
        }
    }

    /// A durable queue found on disk. Up to `window` of its first messages may have been sent before the gateway
    /// stopped.
    pub fn restored(session: SessionId, found: QueueSummary, window: u16) -> Self {
        let mut queue = Self::new(session, true);
        queue.next_sequence = found.last.map_or(0, |last| last + 1);
        if let Some(from) = found.first {
            queue.tail = Some(Tail { from, messages: found.messages, bytes: found.bytes });
            queue.maybe_sent = usize::from(window);
        }
        queue
    }

    /// What another member of a shared subscription may have when the session ends: what was not sent, and QoS 1 that
    /// was not acknowledged (MQTT 5.0 §4.8.2). A QoS 2 delivery that was begun is not begun anew [MQTT-4.8.2-5]. What is
    /// in memory only: what was paged in from the journal does not know its subscription.
    pub fn into_orphans(self) -> Vec<Orphan> {
        let begun = self.inflight.into_iter().filter_map(|entry| match entry.state {
            InflightState::Published(incoming) if incoming.qos == QoS::AtLeastOnce => Some(incoming),
            _ => None,
        });
        let waiting = self.waiting.into_iter().map(|entry| entry.incoming);
        begun.chain(waiting).filter_map(|incoming| Some((incoming.shared?, incoming.message))).collect()
    }

    /// Messages waiting or unacknowledged.
    pub fn len(&self) -> u64 {
        let tail = self.tail.map_or(0, |tail| tail.messages);
        let inflight = self.inflight.iter().filter(|entry| !matches!(entry.state, InflightState::Done)).count();
        (self.waiting.len() + self.lossy.len() + inflight) as u64 + tail
    }

    /// Bytes waiting, in memory and on disk.
    pub fn bytes(&self) -> u64 {
        self.waiting_bytes + self.lossy_bytes + self.tail.map_or(0, |tail| tail.bytes)
    }

    /// Messages and bytes that wait in memory: what a slow connection makes grow.
    pub fn backlog(&self) -> (usize, u64) {
        (self.waiting.len() + self.lossy.len(), self.waiting_bytes + self.lossy_bytes)
    }

    /// This queue's part of the memory that messages take, in bytes.
    pub fn held(&self) -> u64 {
        self.held
    }

    pub fn has_tail(&self) -> bool {
        self.tail.is_some()
    }

    /// Whether one more QoS 1 or 2 message of `size` bytes would go over a limit.
    pub fn is_full(&self, size: usize, limits: &QueueLimits) -> bool {
        let tail = self.tail.unwrap_or(Tail { from: 0, messages: 0, bytes: 0 });
        self.waiting.len() as u64 + tail.messages >= limits.max_messages
            || self.waiting_bytes + tail.bytes + size as u64 > limits.max_bytes
    }

    /// Adds a message, or gives one up. `receipt` is the publisher's: it counts the journal entry made here.
    pub fn push(
        &mut self,
        incoming: Incoming,
        receipt: Option<&Arc<Receipt>>,
        connected: bool,
        signal: &Arc<Signal>,
        limits: &QueueLimits,
        ops: &mut Vec<Op>,
    ) -> Pushed {
        let size = incoming.message.size();
        if incoming.qos == QoS::AtMostOnce {
            return self.push_lossy(incoming, size, connected, limits);
        }
        let mut pushed = Pushed::Queued;
        if self.is_full(size, limits) {
            if limits.when_full != WhenFull::DropOldest || !self.drop_oldest(ops) {
                return Pushed::DroppedNewest;
            }
            pushed = Pushed::DroppedOldest;
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let mut committed = None;
        if self.durable {
            let mut receipt = receipt.cloned();
            if incoming.qos == QoS::ExactlyOnce {
                let own = Receipt::following(receipt.take(), signal.clone());
                committed = Some(own.clone());
                receipt = Some(own);
            }
            if let Some(receipt) = &receipt {
                receipt.add();
            }
            ops.push(Op::Enqueue {
                session: self.session,
                sequence,
                qos: incoming.qos,
                retain: incoming.retain,
                identifiers: incoming.identifiers.clone(),
                message: incoming.message.clone(),
                receipt,
            });
            if self.tail.is_some()
                || self.waiting.len() >= limits.memory_messages
                || self.waiting_bytes >= limits.memory_bytes as u64
            {
                let tail = self.tail.get_or_insert(Tail { from: sequence, messages: 0, bytes: 0 });
                tail.messages += 1;
                tail.bytes += size as u64;
                return pushed;
            }
        }
        self.waiting_bytes += size as u64;
        self.held += incoming.weight(size);
        self.waiting.push_back(Entry { sequence, incoming, committed });
        pushed
    }

    fn push_lossy(&mut self, incoming: Incoming, size: usize, connected: bool, limits: &QueueLimits) -> Pushed {
        if !connected {
            return Pushed::Skipped;
        }
        if self.lossy.len() as u64 >= limits.max_messages || self.lossy_bytes + size as u64 > limits.max_bytes {
            return Pushed::DroppedNewest;
        }
        self.lossy_bytes += size as u64;
        self.held += incoming.weight(size);
        self.lossy.push_back(incoming);
        Pushed::Queued
    }

    /// Gives up the oldest message that waits: in memory, or on disk where memory holds none.
    fn drop_oldest(&mut self, ops: &mut Vec<Op>) -> bool {
        if let Some(entry) = self.waiting.pop_front() {
            self.forget_waiting(&entry, ops);
            return true;
        }
        let Some(tail) = self.tail.as_mut().filter(|tail| tail.messages > 0) else { return false };
        let sequence = tail.from;
        tail.from += 1;
        // Its size is on disk too; the average of what is there will do for a limit.
        tail.bytes -= tail.bytes / tail.messages;
        tail.messages -= 1;
        self.remove_from_journal(sequence, ops);
        true
    }

    fn forget_waiting(&mut self, entry: &Entry, ops: &mut Vec<Op>) {
        let size = entry.incoming.message.size();
        self.waiting_bytes -= size as u64;
        self.held -= entry.incoming.weight(size);
        self.remove_from_journal(entry.sequence, ops);
    }

    fn remove_from_journal(&self, sequence: u64, ops: &mut Vec<Op>) {
        if self.durable {
            ops.push(Op::Remove { session: self.session, sequence });
        }
    }

    /// Moves up to `max` of what may be sent now to `into`: redeliveries first, then PUBRELs, then QoS 0, then new
    /// messages while fewer than `window` are unacknowledged. Returns how many expired messages were given up.
    pub fn take(
        &mut self,
        into: &mut Vec<Outbound>,
        max: usize,
        window: u16,
        now: UnixMillis,
        ops: &mut Vec<Op>,
    ) -> u64 {
        let end = into.len() + max;
        while into.len() < end && self.resent < self.inflight.len() {
            if self.outstanding >= usize::from(window) || !self.resend_next(into) {
                break;
            }
        }
        self.collect_releases();
        while into.len() < end
            && let Some(packet_id) = self.releases.pop_front()
        {
            into.push(Outbound::Release(packet_id));
        }
        let mut expired = 0;
        while into.len() < end
            && let Some(incoming) = self.lossy.pop_front()
        {
            let size = incoming.message.size();
            self.lossy_bytes -= size as u64;
            self.held -= incoming.weight(size);
            if incoming.message.is_expired(now) {
                expired += 1;
            } else {
                into.push(Outbound::Publish(delivery(incoming, None, false)));
            }
        }
        if self.lossy.is_empty() {
            give_back(&mut self.lossy);
        }
        while into.len() < end
            && self.resent == self.inflight.len()
            && self.outstanding < usize::from(window)
            && let Some(entry) = self.waiting.front()
        {
            let state = entry.committed.as_ref().map_or(ReceiptState::Done, |receipt| receipt.state());
            if state == ReceiptState::Pending || !self.identifier_is_free(entry.sequence) {
                break;
            }
            let Some(entry) = self.waiting.pop_front() else { break };
            if state == ReceiptState::Failed {
                // Its publisher was told that it could not be kept.
                self.forget_waiting(&entry, ops);
                continue;
            }
            if entry.incoming.message.is_expired(now) {
                self.forget_waiting(&entry, ops);
                expired += 1;
                continue;
            }
            self.waiting_bytes -= entry.incoming.message.size() as u64;
            into.push(Outbound::Publish(delivery(entry.incoming.clone(), Some(entry.sequence), false)));
            self.inflight
                .push_back(Inflight { sequence: entry.sequence, state: InflightState::Published(entry.incoming) });
            self.resent += 1;
            self.outstanding += 1;
        }
        if self.waiting.is_empty() {
            give_back(&mut self.waiting);
        }
        expired
    }

    /// Sends the next unacknowledged message of an earlier connection again. False when it must wait.
    fn resend_next(&mut self, into: &mut Vec<Outbound>) -> bool {
        let entry = &mut self.inflight[self.resent];
        let id = packet_id(entry.sequence);
        match &entry.state {
            InflightState::Published(incoming) => {
                into.push(Outbound::Publish(delivery(incoming.clone(), Some(entry.sequence), true)));
            }
            InflightState::Releasing(receipt) if receipt.state() == ReceiptState::Pending => return false,
            InflightState::Releasing(_) | InflightState::Released => {
                self.releasing -= usize::from(matches!(entry.state, InflightState::Releasing(_)));
                entry.state = InflightState::Released;
                into.push(Outbound::Release(id));
            }
            InflightState::Done => {
                self.resent += 1;
                return true;
            }
        }
        self.resent += 1;
        self.outstanding += 1;
        true
    }

    /// Finds the PUBRECs that have reached the disk since the last look.
    fn collect_releases(&mut self) {
        if self.releasing == 0 {
            return;
        }
        for entry in self.inflight.iter_mut().take(self.resent) {
            if let InflightState::Releasing(receipt) = &entry.state
                && receipt.state() != ReceiptState::Pending
            {
                entry.state = InflightState::Released;
                self.releasing -= 1;
                self.releases.push_back(packet_id(entry.sequence));
            }
        }
    }

    /// An identifier comes round again after 65,535 messages; the oldest unacknowledged one may still hold it.
    fn identifier_is_free(&self, sequence: u64) -> bool {
        self.inflight.front().is_none_or(|oldest| sequence - oldest.sequence < IDENTIFIERS)
    }

    /// PUBACK, or PUBREC with an error: the delivery is over. False for an identifier that is not inflight.
    pub fn acknowledge(&mut self, id: PacketId, ops: &mut Vec<Op>) -> bool {
        self.finish(id, |state| matches!(state, InflightState::Published(_)), ops)
    }

    /// PUBCOMP: the QoS 2 delivery is over. False for an identifier that was not released.
    pub fn complete(&mut self, id: PacketId, ops: &mut Vec<Op>) -> bool {
        self.finish(id, |state| matches!(state, InflightState::Released | InflightState::Releasing(_)), ops)
    }

    fn finish(&mut self, id: PacketId, expected: impl Fn(&InflightState) -> bool, ops: &mut Vec<Op>) -> bool {
        let Some(index) = self.find(id).filter(|&index| expected(&self.inflight[index].state)) else {
            return false;
        };
        let Inflight { sequence, state } = &mut self.inflight[index];
        let sequence = *sequence;
        let before = std::mem::replace(state, InflightState::Done);
        if let InflightState::Published(incoming) = &before {
            self.held -= incoming.own_weight();
        }
        self.releasing -= usize::from(matches!(before, InflightState::Releasing(_)));
        self.outstanding -= usize::from(index < self.resent);
        self.remove_from_journal(sequence, ops);
        while self.inflight.front().is_some_and(|entry| matches!(entry.state, InflightState::Done)) {
            self.inflight.pop_front();
            self.resent = self.resent.saturating_sub(1);
        }
        if self.inflight.is_empty() {
            give_back(&mut self.inflight);
        }
        true
    }

    /// PUBREC: [`Queue::take`] yields the PUBREL once this is on disk. False for an identifier that is not inflight.
    pub fn receive(&mut self, id: PacketId, signal: &Arc<Signal>, ops: &mut Vec<Op>) -> bool {
        let Some(index) = self.find(id) else { return false };
        let sequence = self.inflight[index].sequence;
        match &self.inflight[index].state {
            InflightState::Published(incoming) if incoming.qos == QoS::ExactlyOnce => {
                self.held -= incoming.own_weight();
                self.inflight[index].state = if self.durable {
                    let receipt = Receipt::new(signal.clone());
                    receipt.add();
                    ops.push(Op::Release { session: self.session, sequence, receipt: Some(receipt.clone()) });
                    self.releasing += 1;
                    InflightState::Releasing(receipt)
                } else {
                    self.releases.push_back(id);
                    InflightState::Released
                };
                true
            }
            InflightState::Releasing(_) => true,
            InflightState::Released => {
                // Once is enough, however often the peer asks before it reads the answer.
                if !self.releases.contains(&id) {
                    self.releases.push_back(id);
                }
                true
            }
            InflightState::Published(_) | InflightState::Done => false,
        }
    }

    fn find(&self, id: PacketId) -> Option<usize> {
        let first = self.inflight.front()?.sequence;
        let distance = (u64::from(id.get()) + IDENTIFIERS - u64::from(packet_id(first).get())) % IDENTIFIERS;
        self.inflight.binary_search_by_key(&(first + distance), |entry| entry.sequence).ok()
    }

    /// A new connection: everything unacknowledged is sent again, in order (MQTT 5.0 §4.4).
    pub fn rewind(&mut self) {
        self.resent = 0;
        self.outstanding = 0;
        self.releases.clear();
    }

    /// The connection is gone: QoS 0 goes with it.
    pub fn disconnect(&mut self) -> u64 {
        self.lossy_bytes = 0;
        let lost = std::mem::take(&mut self.lossy).len() as u64;
        self.hold_alone();
        lost
    }

    /// Counts every message in memory as this queue's alone: those that held it too may have let go of it.
    pub fn hold_alone(&mut self) {
        let begun = self.inflight.iter_mut().filter_map(|entry| match &mut entry.state {
            InflightState::Published(incoming) => Some(incoming),
            _ => None,
        });
        let waiting = self.waiting.iter_mut().map(|entry| &mut entry.incoming);
        self.held = 0;
        for incoming in begun.chain(waiting).chain(&mut self.lossy) {
            incoming.spread = 0;
            self.held += incoming.own_weight();
        }
    }

    /// Lets go of what waits in memory and is in the journal too, except the first `kept` messages.
    pub fn page_out(&mut self, kept: usize) {
        // A page that is on its way goes behind what waits now.
        if !self.durable || self.loading.is_some() || self.waiting.len() <= kept {
            return;
        }
        let paged = self.waiting.split_off(kept);
        self.waiting.shrink_to_fit();
        let Some(from) = paged.front().map(|entry| entry.sequence) else { return };
        let mut tail = self.tail.unwrap_or(Tail { from, messages: 0, bytes: 0 });
        tail.from = from;
        for entry in paged {
            let size = entry.incoming.message.size();
            self.waiting_bytes -= size as u64;
            self.held -= entry.incoming.weight(size);
            tail.messages += 1;
            tail.bytes += size as u64;
        }
        self.tail = Some(tail);
    }

    /// The sequence to page in from, when the head runs low for pages of `messages` and there is a tail. The caller asks
    /// the store and gives the page to [`Queue::page_in`].
    pub fn wants_page(&mut self, messages: usize) -> Option<u64> {
        let tail = self.tail?;
        if self.loading.is_some() || self.waiting.len() > messages / 2 {
            return None;
        }
        self.loading = Some(self.next_sequence);
        Some(tail.from)
    }

    /// Appends a page of the tail. `complete` says that nothing followed it on disk when it was read.
    pub fn page_in(&mut self, messages: Vec<StoredMessage>, complete: bool) {
        let Some(next_at_request) = self.loading.take() else { return };
        let Some(mut tail) = self.tail.take() else { return };
        for stored in messages {
            let sequence = stored.sequence;
            if sequence < tail.from {
                // Given up while the page was being read.
                continue;
            }
            tail.from = sequence + 1;
            tail.messages = tail.messages.saturating_sub(1);
            let message = match stored.state {
                StoredState::Released => {
                    self.inflight.push_back(Inflight { sequence, state: InflightState::Released });
                    continue;
                }
                StoredState::Queued(message) => message,
            };
            let size = message.size() as u64;
            tail.bytes = tail.bytes.saturating_sub(size);
            let incoming = Incoming {
                message,
                qos: stored.qos,
                retain: stored.retain,
                identifiers: stored.identifiers,
                shared: None,
                spread: 0,
            };
            self.held += incoming.own_weight();
            if self.maybe_sent > 0 {
                self.maybe_sent -= 1;
                self.inflight.push_back(Inflight { sequence, state: InflightState::Published(incoming) });
            } else {
                self.waiting_bytes += size;
                self.waiting.push_back(Entry { sequence, incoming, committed: None });
            }
        }
        if complete {
            tail.from = tail.from.max(next_at_request);
            // What is paged in later was queued by this process; ahead of what waits it would be out of order.
            self.maybe_sent = 0;
        }
        self.tail = (tail.from < self.next_sequence).then_some(tail);
    }

    /// The page could not be read; [`Queue::wants_page`] asks again.
    pub fn page_failed(&mut self) {
        self.loading = None;
    }
}

/// How many packet identifiers there are.
const IDENTIFIERS: u64 = 65_535;

fn packet_id(sequence: u64) -> PacketId {
    let id = u16::try_from(sequence % IDENTIFIERS).unwrap_or(0);
    PacketId::MIN.saturating_add(id)
}

fn delivery(incoming: Incoming, sequence: Option<u64>, dup: bool) -> Delivery {
    let Incoming { message, qos, retain, identifiers, .. } = incoming;
    Delivery { message, qos, retain, dup, packet_id: sequence.map(packet_id), sequence, identifiers }
}

/// Frees the memory that a burst made an empty queue hold.
fn give_back<T>(queue: &mut VecDeque<T>) {
    const KEPT: usize = 64;
    if queue.is_empty() && queue.capacity() > KEPT {
        *queue = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topic::TopicName;

    /// A queue with what it needs around it, and a tiny notation: `1a` is QoS 1 with payload `a`.
    struct Bench {
        queue: Queue,
        limits: QueueLimits,
        ops: Vec<Op>,
        signal: Arc<Signal>,
        connected: bool,
        window: u16,
    }

    impl Bench {
        fn new(durable: bool) -> Self {
            Self {
                queue: Queue::new(SessionId(7), durable),
                limits: QueueLimits::default(),
                ops: Vec::new(),
                signal: Arc::default(),
                connected: true,
                window: 100,
            }
        }

        fn push(&mut self, spelled: &'static str) -> Pushed {
            let (qos, payload) = spelled.split_at(1);
            let qos = QoS::from_level(qos.parse().unwrap()).unwrap();
            let message = Arc::new(Message::new(TopicName::new("t").unwrap(), payload, qos, UnixMillis(0)));
            let incoming = Incoming { message, qos, retain: false, identifiers: None, shared: None, spread: 0 };
            self.queue.push(incoming, None, self.connected, &self.signal, &self.limits, &mut self.ops)
        }

        /// What may be sent: `a#1` a publish with its identifier, `+` marks a repeated one, `!1` a release.
        fn take(&mut self) -> String {
            let mut taken = Vec::new();
            self.queue.take(&mut taken, 100, self.window, UnixMillis(0), &mut self.ops);
            let spell = |outbound: &Outbound| match outbound {
                Outbound::Release(id) => format!("!{id}"),
                Outbound::Publish(delivery) => {
                    let text = String::from_utf8(delivery.message.payload.to_vec()).unwrap();
                    let id = delivery.packet_id.map_or(String::new(), |id| format!("#{id}"));
                    format!("{text}{id}{}", if delivery.dup { "+" } else { "" })
                }
            };
            taken.iter().map(spell).collect::<Vec<_>>().join(" ")
        }

        /// Settles what the journal was given, as its commit would.
        fn commit(&mut self) {
            for op in self.ops.drain(..) {
                if let Op::Enqueue { receipt: Some(receipt), .. } | Op::Release { receipt: Some(receipt), .. } = op {
                    receipt.satisfy();
                }
            }
        }

        fn acknowledge(&mut self, number: u16) -> bool {
            self.queue.acknowledge(id(number), &mut self.ops)
        }
    }

    fn id(number: u16) -> PacketId {
        PacketId::new(number).unwrap()
    }

    #[test]
    fn messages_leave_in_order_within_the_window_and_qos_0_does_not_wait_for_it() {
        let mut bench = Bench::new(false);
        bench.window = 2;
        for spelled in ["1a", "1b", "1c", "0x"] {
            bench.push(spelled);
        }
        assert_eq!(bench.take(), "x a#1 b#2");
        assert_eq!(bench.take(), "");
        assert!(bench.acknowledge(2), "acknowledgements may come out of order");
        assert_eq!(bench.take(), "c#3");
        assert!(bench.acknowledge(1) && bench.acknowledge(3));
        assert!(!bench.acknowledge(3), "an identifier is acknowledged once");
        assert_eq!(bench.queue.len(), 0);
    }

    #[test]
    fn a_new_connection_gets_the_unacknowledged_again_in_order_and_marked() {
        let mut bench = Bench::new(false);
        for spelled in ["1a", "2b", "1c"] {
            bench.push(spelled);
        }
        assert_eq!(bench.take(), "a#1 b#2 c#3");
        assert!(bench.queue.receive(id(2), &bench.signal, &mut bench.ops));
        assert_eq!(bench.take(), "!2");
        bench.push("1d");
        bench.window = 2;
        bench.queue.rewind();
        assert_eq!(bench.take(), "a#1+ !2");
        assert!(bench.acknowledge(1));
        assert_eq!(bench.take(), "c#3+");
        assert!(bench.queue.complete(id(2), &mut bench.ops));
        assert_eq!(bench.take(), "d#4");
    }

    #[test]
    fn a_durable_qos_2_message_is_sent_only_once_it_is_on_disk_and_so_is_its_release() {
        let mut bench = Bench::new(true);
        bench.push("2a");
        bench.push("1b");
        assert_eq!(bench.take(), "", "and what is behind it waits, to keep the order");
        bench.commit();
        assert_eq!(bench.take(), "a#1 b#2");
        assert!(bench.queue.receive(id(1), &bench.signal, &mut bench.ops));
        assert_eq!(bench.take(), "");
        bench.commit();
        assert_eq!(bench.take(), "!1");
        for _ in 0..3 {
            assert!(bench.queue.receive(id(1), &bench.signal, &mut bench.ops));
        }
        assert_eq!(bench.take(), "!1", "a repeated PUBREC is answered again, but nobody can pile up answers");
        assert!(bench.queue.complete(id(1), &mut bench.ops));
        assert!(!bench.queue.complete(id(1), &mut bench.ops));
    }

    #[test]
    fn a_message_that_could_not_be_kept_is_not_sent() {
        let mut bench = Bench::new(true);
        bench.push("2a");
        bench.push("1b");
        let Some(Op::Enqueue { receipt: Some(receipt), .. }) = bench.ops.first() else { panic!("no journal entry") };
        receipt.fail();
        assert_eq!(bench.take(), "b#2");
    }

    #[test]
    fn a_full_queue_does_what_its_policy_says() {
        let check = |when_full, pushed, left: &str| {
            let mut bench = Bench::new(false);
            bench.limits.max_messages = 2;
            bench.limits.when_full = when_full;
            bench.push("1a");
            bench.push("1b");
            assert_eq!(bench.push("1c"), pushed, "{when_full:?}");
            assert_eq!(bench.take(), left, "{when_full:?}");
        };
        check(WhenFull::DropNewest, Pushed::DroppedNewest, "a#1 b#2");
        check(WhenFull::DropOldest, Pushed::DroppedOldest, "b#2 c#3");
    }

    #[test]
    fn a_full_queue_gives_up_its_oldest_on_disk_too_and_also_while_a_page_is_read() {
        let mut bench = Bench::new(true);
        bench.limits.memory_messages = 1;
        bench.limits.max_messages = 4;
        bench.limits.when_full = WhenFull::DropOldest;
        for spelled in ["1a", "1b", "1c", "1d"] {
            bench.push(spelled);
        }
        assert_eq!(bench.push("1e"), Pushed::DroppedOldest, "a, from memory");
        assert_eq!(bench.push("1f"), Pushed::DroppedOldest, "b, from disk");
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), Some(2));
        let page = stored(&bench.ops, 2..5);
        assert_eq!(bench.push("1g"), Pushed::DroppedOldest, "c, on its way from disk");
        bench.queue.page_in(page, false);
        assert_eq!(bench.take(), "d#4 e#5");
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), Some(5));
        bench.queue.page_in(stored(&bench.ops, 5..7), true);
        assert_eq!(bench.take(), "f#6 g#7");
        let removed = bench.ops.iter().filter_map(|op| match op {
            Op::Remove { sequence, .. } => Some(*sequence),
            _ => None,
        });
        assert_eq!(removed.collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn qos_0_is_for_the_connected_only() {
        let mut bench = Bench::new(true);
        bench.connected = false;
        assert_eq!(bench.push("0a"), Pushed::Skipped);
        assert_eq!(bench.push("1b"), Pushed::Queued);
        assert_eq!(bench.take(), "b#1");
    }

    #[test]
    fn what_does_not_fit_in_memory_waits_on_disk_and_is_paged_in_order() {
        let mut bench = Bench::new(true);
        bench.limits.memory_messages = 2;
        for spelled in ["1a", "1b", "1c", "1d"] {
            bench.push(spelled);
        }
        assert_eq!(bench.queue.len(), 4);
        assert_eq!(bench.take(), "a#1 b#2");
        let from = bench.queue.wants_page(bench.limits.memory_messages).unwrap();
        assert_eq!(from, 2);
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), None, "one page at a time");
        // Published while the page is being read: it stays behind it.
        bench.push("1e");
        let page = stored(&bench.ops, 2..4);
        bench.queue.page_in(page, true);
        assert_eq!(bench.take(), "c#3 d#4");
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), Some(4));
        bench.queue.page_in(stored(&bench.ops, 4..5), true);
        bench.push("1f");
        assert_eq!(bench.take(), "e#5 f#6");
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), None);
    }

    #[test]
    fn a_restored_queue_repeats_what_may_have_been_sent_under_the_same_identifiers() {
        let found = QueueSummary { first: Some(8), last: Some(12), messages: 4, bytes: 4 };
        let mut bench = Bench { queue: Queue::restored(SessionId(7), found, 2), ..Bench::new(true) };
        let mut source = Bench::new(true);
        for _ in 0..13 {
            source.push("2x");
        }
        let mut page = stored(&source.ops, 8..13);
        page[0].state = StoredState::Released;
        page.remove(2);
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), Some(8));
        bench.queue.page_in(page, true);
        bench.queue.rewind();
        assert_eq!(bench.take(), "!9 x#10+ x#12+ x#13");
        bench.push("1y");
        assert_eq!(bench.take(), "y#14");
    }

    #[test]
    fn what_is_paged_in_after_the_restored_part_goes_behind_what_waits() {
        let found = QueueSummary { first: Some(0), last: Some(1), messages: 2, bytes: 2 };
        // More may have been sent than there is.
        let mut bench = Bench { queue: Queue::restored(SessionId(7), found, 9), ..Bench::new(true) };
        let mut source = Bench::new(true);
        for spelled in ["1a", "1b"] {
            source.push(spelled);
        }
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), Some(0));
        bench.queue.page_in(stored(&source.ops, 0..2), true);
        bench.queue.rewind();
        (bench.limits.memory_messages, bench.window) = (4, 4);
        for spelled in ["1c", "1d", "1e", "1f", "1g", "1h"] {
            bench.push(spelled);
        }
        assert_eq!(bench.take(), "a#1+ b#2+ c#3 d#4");
        assert_eq!(bench.queue.wants_page(bench.limits.memory_messages), Some(6));
        bench.queue.page_in(stored(&bench.ops, 6..8), true);
        (1..=4).for_each(|id| assert!(bench.acknowledge(id)));
        assert_eq!(bench.take(), "e#5 f#6 g#7 h#8");
    }

    #[test]
    fn an_identifier_in_use_is_not_given_out_again() {
        let mut bench = Bench::new(false);
        bench.window = u16::MAX;
        bench.push("1a");
        bench.take();
        bench.queue.next_sequence = IDENTIFIERS;
        bench.push("1b");
        assert_eq!(bench.take(), "");
        assert!(bench.acknowledge(1));
        assert_eq!(bench.take(), "b#1");
    }

    /// What the journal holds of `sequences`.
    fn stored(ops: &[Op], sequences: std::ops::Range<u64>) -> Vec<StoredMessage> {
        let row = |op: &Op| match op {
            Op::Enqueue { sequence, qos, retain, identifiers, message, .. } => Some(StoredMessage {
                sequence: *sequence,
                qos: *qos,
                retain: *retain,
                identifiers: identifiers.clone(),
                state: StoredState::Queued(message.clone()),
            }),
            _ => None,
        };
        ops.iter().filter_map(row).filter(|row| sequences.contains(&row.sequence)).collect()
    }
}
