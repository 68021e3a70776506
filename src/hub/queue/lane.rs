//! One lane of a queue: messages in order, with their inflight window and QoS state.
//!
//! **Memory and disk.** The head of a lane is in memory. When the head is full, later messages of a durable queue are
//! journaled only (the *tail*, in `tail`) and paged back in as the head drains.
//!
//! **Packet identifiers** are a function of the lane's sequence, so that a message keeps its identifier through a crash
//! without a write for each send. A QoS 2 message of a durable queue is sent only once it is on disk: after a crash it
//! goes out again under the same identifier and its receiver can tell that it is the same message. Where damage to the
//! database has cost messages, identifiers are first released, in `clearing`.

mod clearing;
mod tail;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::{Age, Delivery, Depth, Incoming, Orphan, Outbound, PacketId, QueueLimits, Unanswered, expires_at};
use crate::clock::UnixMillis;
use crate::message::{Message, QoS};
use crate::signal::Signal;
use crate::store::{Op, Packed, QueueSummary, Receipt, ReceiptState, SessionId, first_sequence, number};
use clearing::Clearing;
use tail::{AT_ONCE, Tail, earliest};

#[derive(Debug)]
struct Entry {
    sequence: u64,
    incoming: Incoming,
    /// A QoS 2 message of a durable queue waits for this before it is sent.
    committed: Option<Arc<Receipt>>,
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

/// One lane of a session's queue, or all of it.
#[derive(Debug)]
pub(super) struct Lane {
    session: SessionId,
    identifiers: Identifiers,
    /// Whether messages are journaled; fixed for the life of the session.
    durable: bool,
    /// QoS 1 and 2 in order, not yet sent.
    waiting: VecDeque<Entry>,
    waiting_bytes: u64,
    /// When something of it may have expired; `None` where nothing ever does.
    waiting_expires_at: Option<UnixMillis>,
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
    /// What was read of the tail and is made messages of when its turn comes. It counts as the tail's until then.
    ahead: Packed,
    loading: Option<u64>,
    /// What was purged: a page that was read before must not bring it back.
    purged: Range<u64>,
    next_sequence: u64,
    /// Messages found on disk at start that may have been sent before the crash.
    maybe_sent: usize,
    /// After damage to the database: packet identifiers that may not be free.
    clearing: Option<Box<Clearing>>,
    /// What the messages in memory weigh.
    held: u64,
}

impl Lane {
    /// An empty lane; `index` is its place among the lanes of its queue.
    pub fn new(session: SessionId, durable: bool, index: u8, identifiers: Identifiers) -> Self {
        Self {
            session,
            identifiers,
            durable,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            waiting_expires_at: None,
            lossy: VecDeque::new(),
            lossy_bytes: 0,
            inflight: VecDeque::new(),
            resent: 0,
            outstanding: 0,
            releases: VecDeque::new(),
            releasing: 0,
            tail: None,
            ahead: Packed::default(),
            loading: None,
            purged: 0..0,
            next_sequence: first_sequence(index),
            maybe_sent: 0,
            clearing: None,
            held: 0,
        }
    }

    /// Takes up what was found on disk. Up to `window` of its first messages may have been sent before the gateway
    /// stopped.
    pub fn restore(&mut self, found: QueueSummary, window: u16) {
        if let Some(last) = found.last {
            self.next_sequence = last + 1;
        }
        if let Some(from) = found.first {
            let (messages, bytes) = (found.messages, found.bytes);
            self.tail = Some(Tail { from, messages, bytes, expires_at: Some(AT_ONCE) });
            self.maybe_sent = usize::from(window);
        }
    }

    /// What another member of a shared subscription may have when the session ends: what was not sent, and QoS 1 that
    /// was not acknowledged (MQTT 5.0 §4.8.2). A QoS 2 delivery that was begun is not begun anew [MQTT-4.8.2-5]. Of what
    /// is in memory; the rest is on disk from [`Lane::tail_from`] on.
    pub fn into_orphans(self) -> impl Iterator<Item = Orphan> {
        let begun = self.inflight.into_iter().filter_map(|entry| match entry.state {
            InflightState::Published(incoming) if incoming.qos == QoS::AtLeastOnce => Some(incoming),
            _ => None,
        });
        let waiting = self.waiting.into_iter().map(|entry| entry.incoming);
        begun.chain(waiting).filter_map(|incoming| Some((incoming.shared?, incoming.message)))
    }

    /// Messages waiting or unacknowledged.
    pub fn len(&self) -> u64 {
        let tail = self.tail.map_or(0, |tail| tail.messages);
        let inflight = self.inflight.iter().filter(|entry| !matches!(entry.state, InflightState::Done)).count();
        (self.waiting.len() + self.lossy.len() + inflight) as u64 + tail
    }

    /// Bytes waiting, in memory and on disk, or unacknowledged; for people, who do not ask often.
    pub fn bytes(&self) -> u64 {
        let unacknowledged = self.inflight.iter().map(|inflight| match &inflight.state {
            InflightState::Published(incoming) => incoming.message.size() as u64,
            InflightState::Releasing(_) | InflightState::Released | InflightState::Done => 0,
        });
        self.waiting_bytes + self.lossy_bytes + self.tail.map_or(0, |tail| tail.bytes) + unacknowledged.sum::<u64>()
    }

    /// QoS 1 and 2 messages that are to be sent: those that wait, and those that an earlier connection, or the gateway
    /// before it was restarted, may have sent. For people, who do not ask often.
    pub fn unsent(&self) -> u64 {
        let begun = self.inflight.iter().skip(self.resent);
        self.depth().messages + begun.filter(|entry| matches!(entry.state, InflightState::Published(_))).count() as u64
    }

    /// Messages and bytes that wait in memory: what a slow connection makes grow.
    pub fn pressure(&self) -> (usize, u64) {
        let messages = self.waiting.len() + self.lossy.len() + self.ahead.len();
        (messages, self.waiting_bytes + self.lossy_bytes + self.ahead.bytes() as u64)
    }

    /// This queue's part of the memory that messages take, in bytes.
    pub fn held(&self) -> u64 {
        self.held
    }

    pub fn has_tail(&self) -> bool {
        self.tail.is_some()
    }

    /// The first sequence of the tail.
    pub fn tail_from(&self) -> Option<u64> {
        self.ahead.first().or_else(|| self.tail.map(|tail| tail.from))
    }

    /// Whether one more message waits in memory.
    pub fn fits_in_memory(&self, limits: &QueueLimits) -> bool {
        self.tail.is_none()
            && self.waiting.len() < limits.memory_messages
            && self.waiting_bytes < limits.memory_bytes as u64
    }

    /// QoS 1 and 2 messages that wait, and their bytes: what the limits of the queue are about.
    pub fn depth(&self) -> Depth {
        let tail = self.tail.unwrap_or(Tail::at(0));
        Depth { messages: self.waiting.len() as u64 + tail.messages, bytes: self.waiting_bytes + tail.bytes }
    }

    /// QoS 0 messages that wait, and their bytes.
    pub fn depth_lossy(&self) -> Depth {
        Depth { messages: self.lossy.len() as u64, bytes: self.lossy_bytes }
    }

    /// Adds a QoS 1 or 2 message of `size` bytes. `receipt` is the publisher's: it counts the journal entry made here.
    pub fn push(
        &mut self,
        incoming: Incoming,
        size: usize,
        receipt: Option<&Arc<Receipt>>,
        signal: &Arc<Signal>,
        limits: &QueueLimits,
        ops: &mut Vec<Op>,
    ) {
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
                shared: incoming.shared.clone(),
                message: incoming.message.clone(),
                receipt,
            });
            if !self.fits_in_memory(limits) {
                self.tail.get_or_insert(Tail::at(sequence)).add(&incoming.message, size, limits);
                return;
            }
        }
        self.waiting_bytes += size as u64;
        self.waiting_expires_at = earliest(self.waiting_expires_at, expires_at(&incoming.message, limits.max_age));
        self.held += incoming.weight(size);
        self.waiting.push_back(Entry { sequence, incoming, committed });
    }

    /// Adds a QoS 0 message of `size` bytes.
    pub fn push_lossy(&mut self, incoming: Incoming, size: usize) {
        self.lossy_bytes += size as u64;
        self.held += incoming.weight(size);
        self.lossy.push_back(incoming);
    }

    /// Gives up the oldest message that waits: in memory, or on disk where memory holds none. False where none waits.
    pub fn drop_oldest(&mut self, ops: &mut Vec<Op>) -> bool {
        if self.has_waiting()
            && let Some(entry) = self.waiting.pop_front()
        {
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

    /// Gives up everything that was never sent, in memory and on disk; returns how many messages that were. A delivery that
    /// has begun goes on to its end, as its receiver may have the message, or its identifier.
    pub fn purge(&mut self, ops: &mut Vec<Op>) -> u64 {
        let mut purged = (self.waiting.len() + self.lossy.len()) as u64;
        for entry in std::mem::take(&mut self.waiting) {
            self.forget_waiting(&entry, ops);
        }
        self.waiting_expires_at = None;
        self.held -= self.lossy.iter().map(Incoming::own_weight).sum::<u64>();
        self.lossy_bytes = 0;
        self.lossy = VecDeque::new();
        purged += self.purge_tail(ops);
        purged
    }

    fn forget_waiting(&mut self, entry: &Entry, ops: &mut Vec<Op>) {
        let size = entry.incoming.message.size();
        self.waiting_bytes -= size as u64;
        self.held -= entry.incoming.weight(size);
        self.remove_from_journal(entry.sequence, ops);
    }

    fn remove_from_journal(&self, sequence: u64, ops: &mut Vec<Op>) {
        if !self.durable {
            return;
        }
        match ops.last_mut() {
            Some(Op::Remove { session, last, .. }) if *session == self.session && *last + 1 == sequence => {
                *last = sequence;
            }
            _ => ops.push(Op::remove(self.session, sequence)),
        }
    }

    /// Moves up to `max` of what may be sent now to `into`: redeliveries first, then PUBRELs, then QoS 0, then new
    /// messages while fewer than `window` are unacknowledged. Returns how many expired messages were given up.
    pub fn take(&mut self, into: &mut Vec<Outbound>, max: usize, window: u16, age: Age, ops: &mut Vec<Op>) -> u64 {
        let end = into.len() + max;
        self.take_again(into, end, window);
        self.take_releases(into, end);
        self.take_new(into, end, window, age, ops)
    }

    /// Moves what an earlier connection has left unacknowledged to `into`, up to its length `end`.
    pub fn take_again(&mut self, into: &mut Vec<Outbound>, end: usize, window: u16) {
        while into.len() < end && self.resent < self.inflight.len() {
            if self.outstanding >= usize::from(window) || !self.resend_next(into) {
                break;
            }
        }
    }

    /// Moves the PUBRELs that may be sent to `into`, up to its length `end`.
    pub fn take_releases(&mut self, into: &mut Vec<Outbound>, end: usize) {
        self.collect_releases();
        while into.len() < end
            && let Some(packet_id) = self.releases.pop_front()
        {
            into.push(Outbound::Release(packet_id));
        }
    }

    /// Moves messages that were never sent to `into`, up to its length `end`: QoS 0, then the others while fewer than
    /// `window` are unacknowledged. Returns how many expired messages were given up.
    pub fn take_new(&mut self, into: &mut Vec<Outbound>, end: usize, window: u16, age: Age, ops: &mut Vec<Op>) -> u64 {
        let mut expired = 0;
        while into.len() < end
            && let Some(incoming) = self.lossy.pop_front()
        {
            let size = incoming.message.size();
            self.lossy_bytes -= size as u64;
            self.held -= incoming.weight(size);
            if age.is_over(&incoming.message) {
                expired += 1;
            } else {
                into.push(Outbound::Publish(self.delivery(incoming, None, false)));
            }
        }
        if self.lossy.is_empty() {
            give_back(&mut self.lossy);
        }
        while into.len() < end
            && self.resent == self.inflight.len()
            && self.outstanding < usize::from(window)
            && self.has_waiting()
            && (self.clearing.is_none() || self.clear(into, end, window))
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
            if age.is_over(&entry.incoming.message) {
                self.forget_waiting(&entry, ops);
                expired += 1;
                continue;
            }
            self.waiting_bytes -= entry.incoming.message.size() as u64;
            into.push(Outbound::Publish(self.delivery(entry.incoming.clone(), Some(entry.sequence), false)));
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
        let entry = &self.inflight[self.resent];
        let id = self.identifier(entry.sequence);
        match &entry.state {
            InflightState::Published(incoming) => {
                into.push(Outbound::Publish(self.delivery(incoming.clone(), Some(entry.sequence), true)));
            }
            InflightState::Releasing(receipt) if receipt.state() == ReceiptState::Pending => return false,
            InflightState::Releasing(_) | InflightState::Released => {
                self.releasing -= usize::from(matches!(entry.state, InflightState::Releasing(_)));
                self.inflight[self.resent].state = InflightState::Released;
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

    /// Finds the PUBRECs that have reached the disk since the last look, up to the first that has not: PUBRELs go out in
    /// the order of their PUBRECs [MQTT-4.6.0-4], and a commit settles its receipts one by one while this looks at them.
    fn collect_releases(&mut self) {
        if self.releasing == 0 {
            return;
        }
        for entry in self.inflight.iter_mut().take(self.resent) {
            if let InflightState::Releasing(receipt) = &entry.state {
                if receipt.state() == ReceiptState::Pending {
                    break;
                }
                entry.state = InflightState::Released;
                self.releasing -= 1;
                self.releases.push_back(self.identifiers.of(entry.sequence));
            }
        }
    }

    /// The packet identifier of a message of this lane.
    pub fn identifier(&self, sequence: u64) -> PacketId {
        self.identifiers.of(sequence)
    }

    /// The identifiers come round again; the oldest unacknowledged message may still hold this one.
    fn identifier_is_free(&self, sequence: u64) -> bool {
        // What is released may stand further on than what is paged in later.
        self.inflight
            .front()
            .is_none_or(|oldest| sequence.abs_diff(oldest.sequence) < u64::from(self.identifiers.count))
    }

    /// What is not yet acknowledged of what was sent on this connection.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// What was sent, on this connection or an earlier one, and is not over.
    pub fn begun(&self) -> usize {
        self.inflight.len()
    }

    /// The first of what was sent on this connection that the peer has not answered.
    pub fn unanswered(&self) -> Option<Unanswered> {
        self.inflight.iter().take(self.resent).find_map(|entry| {
            let message = match &entry.state {
                InflightState::Published(incoming) => Some(incoming.message.clone()),
                InflightState::Released => None,
                InflightState::Releasing(_) | InflightState::Done => return None,
            };
            Some(Unanswered { packet_id: self.identifier(entry.sequence), message })
        })
    }

    /// Whether there is nothing to send, now or once something has reached the disk.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.ahead.is_empty() && self.lossy.is_empty() && self.resent == self.inflight.len()
    }

    #[inline]
    fn delivery(&self, incoming: Incoming, sequence: Option<u64>, dup: bool) -> Delivery {
        let Incoming { message, qos, retain, identifiers, .. } = incoming;
        let packet_id = sequence.map(|sequence| self.identifier(sequence));
        Delivery { message, qos, retain, dup, packet_id, sequence, identifiers }
    }

    /// PUBACK, or PUBREC with an error: the delivery is over. False for an identifier that is not inflight.
    pub fn acknowledge(&mut self, id: PacketId, ops: &mut Vec<Op>) -> bool {
        self.finish(id, |state| matches!(state, InflightState::Published(_)), ops)
    }

    /// PUBCOMP: the QoS 2 delivery is over. False for an identifier that was not released for one.
    pub fn complete(&mut self, id: PacketId, signal: &Arc<Signal>, ops: &mut Vec<Op>) -> bool {
        if self.clearing.is_some() && self.is_cleared(id, signal, ops) {
            return false;
        }
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

    /// PUBREC: [`Lane::take`] yields the PUBREL once this is on disk. False for an identifier that is not inflight.
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
        let distance = self.identifiers.distance(first, id);
        let sequence = first + distance;
        // Sequences have few holes: it mostly stands where it would without any.
        let guess = usize::try_from(distance).ok()?;
        if self.inflight.get(guess).is_some_and(|entry| entry.sequence == sequence) {
            return Some(guess);
        }
        // What is released may lie further on, behind a hole that damage to the disk has left, or out of line.
        let in_line = self.inflight.binary_search_by_key(&sequence, |entry| entry.sequence);
        in_line.ok().or_else(|| self.inflight.iter().position(|entry| self.identifier(entry.sequence) == id))
    }

    /// A new connection: everything unacknowledged is sent again, in order (MQTT 5.0 §4.4).
    pub fn rewind(&mut self) {
        self.rewind_clearing();
        self.resent = 0;
        self.outstanding = 0;
        self.releases.clear();
    }

    /// The connection is gone: QoS 0 goes with it.
    pub fn disconnect(&mut self) {
        self.lossy_bytes = 0;
        self.lossy = VecDeque::new();
        self.hold_alone();
    }

    /// Counts every message in memory as this queue's alone: those that held it too may have let go of it.
    pub fn hold_alone(&mut self) {
        let begun = self.inflight.iter_mut().filter_map(|entry| match &mut entry.state {
            InflightState::Published(incoming) => Some(incoming),
            _ => None,
        });
        let waiting = self.waiting.iter_mut().map(|entry| &mut entry.incoming);
        self.held = self.ahead.bytes() as u64;
        for incoming in begun.chain(waiting).chain(&mut self.lossy) {
            incoming.spread = 0;
            self.held += incoming.own_weight();
        }
    }
}

/// The packet identifiers of one lane, which come round again and again: `count` of them from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identifiers {
    pub first: PacketId,
    pub count: u16,
}

impl Identifiers {
    /// All there are, for a queue of one lane.
    pub const ALL: Self = Self { first: PacketId::MIN, count: u16::MAX };

    fn of(self, sequence: u64) -> PacketId {
        let place = u16::try_from(number(sequence) % u64::from(self.count)).unwrap_or(0);
        self.first.saturating_add(place)
    }

    /// How many messages after the one numbered `first` the identifier `id` of this lane comes round.
    fn distance(self, first: u64, id: PacketId) -> u64 {
        let count = u64::from(self.count);
        (u64::from(id.get()) + count - u64::from(self.of(first).get())) % count
    }
}

/// Frees the memory that a burst made an empty queue hold.
fn give_back<T>(queue: &mut VecDeque<T>) {
    const KEPT: usize = 64;
    if queue.is_empty() && queue.capacity() > KEPT {
        *queue = VecDeque::new();
    }
}
