//! Operations that wait for one commit, with what cancels out taken away. Pure: no I/O, no threads.
//!
//! Operations keep the order in which they were submitted, with one exception that cannot be told apart from it: where
//! a later operation of the same key makes an earlier one moot, the earlier one goes. The rules:
//! - `Remove` after a pending `Enqueue`: nothing is written; sequences are never used twice, so the row is not on disk.
//! - `Release` after a pending `Enqueue`: the row is written without its content.
//! - `PutSession` after a pending one takes its place, before what was submitted in between for the session.
//! - Any other operation replaces a pending one of the same key and takes over its receipts. So `RemoveInbound` after
//!   `AddInbound` deletes a row that is not there, which writes nothing, but both receipts still wait for the commit: a
//!   PUBCOMP that went out before the messages of the same PUBLISH are on disk would lose them in a crash.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::op::{MAX_NUMBER, first_sequence, lane};
use super::ranges::Ranges;
use super::{Cleared, Op, Receipt, SessionId, SessionRecord};
use crate::message::{Message, QoS};
use crate::topic::{SharedFilter, TopicName};

/// What an operation costs in memory beside the message, in bytes; an estimate for the inbox limit.
const OP_BYTES: usize = 200;

/// How many holes of cancelled changes a small batch may carry before they are closed.
const MAX_HOLES: usize = 1024;

/// What is to be written together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    slots: Vec<Option<Slot>>,
    index: HashMap<Key, usize>,
    /// Rows to delete, after everything in `slots`.
    removals: HashMap<SessionId, Ranges>,
    removed: usize,
    /// When the first of `removals` is due.
    removals_due: Option<Instant>,
    live: usize,
    bytes: usize,
    cancelled: u64,
}

/// One thing to write, and the receipts that wait for it.
#[derive(Debug)]
pub(super) struct Slot {
    pub change: Change,
    pub receipts: Receipts,
    due: Instant,
    /// The change took the place of a removal that was not written: where it is refused, the removal comes back.
    over_removal: bool,
}

/// An [`Op`] without its receipts. `Remove` is not here: see [`Batch::removals`].
#[derive(Clone, Debug)]
pub(super) enum Change {
    PutSession(Box<SessionRecord>),
    DropSession(SessionId),
    PutSubscription {
        session: SessionId,
        filter: Arc<str>,
        options: u8,
        identifier: Option<u32>,
    },
    DropSubscription {
        session: SessionId,
        filter: Arc<str>,
    },
    Enqueue(Row),
    /// Inserts a row that is released already.
    EnqueueReleased {
        session: SessionId,
        sequence: u64,
    },
    Release {
        session: SessionId,
        sequence: u64,
    },
    Clear {
        session: SessionId,
        cleared: Cleared,
    },
    AddInbound {
        session: SessionId,
        packet_id: u16,
    },
    RemoveInbound {
        session: SessionId,
        packet_id: u16,
    },
    PutRetained(Arc<Message>),
    DropRetained(TopicName),
}

/// A row of a queue that is to be written.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub session: SessionId,
    pub sequence: u64,
    pub qos: QoS,
    pub retain: bool,
    pub identifiers: Option<Arc<[u32]>>,
    pub shared: Option<Arc<SharedFilter>>,
    pub message: Arc<Message>,
}

/// Mostly none or one; more where an operation replaced others.
#[derive(Clone, Debug, Default)]
pub(super) struct Receipts {
    first: Option<Arc<Receipt>>,
    more: Vec<Arc<Receipt>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Session(SessionId),
    Subscription(SessionId, Arc<str>),
    Row(SessionId, u64),
    Cleared(SessionId, u8),
    Inbound(SessionId, u16),
    Retained(TopicName),
}

impl Batch {
    /// A batch that deletes the rows of a session from sequence `first` to `last`.
    pub fn removing(session: SessionId, first: u64, last: u64) -> Self {
        Self { removals: HashMap::from([(session, Ranges::from_range(first, last))]), ..Self::default() }
    }

    /// Adds an operation that is `due` then. Receipts that are settled by it at once are pushed to `satisfied`.
    pub fn push(&mut self, op: Op, due: Instant, satisfied: &mut Vec<Arc<Receipt>>) {
        match op {
            Op::PutSession(record) => {
                self.replace(Key::Session(record.id), Change::PutSession(record), due, None);
            }
            Op::DropSession(session) => self.replace(Key::Session(session), Change::DropSession(session), due, None),
            Op::PutSubscription { session, filter, options, identifier, receipt } => {
                let key = Key::Subscription(session, filter.clone());
                self.replace(key, Change::PutSubscription { session, filter, options, identifier }, due, receipt);
            }
            Op::DropSubscription { session, filter } => {
                let key = Key::Subscription(session, filter.clone());
                self.replace(key, Change::DropSubscription { session, filter }, due, None);
            }
            Op::Enqueue { session, sequence, qos, retain, identifiers, shared, message, receipt } => {
                let row = Row { session, sequence, qos, retain, identifiers, shared, message };
                self.replace(Key::Row(session, sequence), Change::Enqueue(row), due, receipt);
            }
            Op::Release { session, sequence, receipt } => {
                self.replace(Key::Row(session, sequence), Change::Release { session, sequence }, due, receipt);
            }
            Op::Remove { session, first, last } => self.remove(session, first, last, due, satisfied),
            Op::Clear { session, cleared, receipt } => {
                let key = Key::Cleared(session, cleared.lane());
                self.replace(key, Change::Clear { session, cleared }, due, receipt);
            }
            Op::AddInbound { session, packet_id, receipt } => {
                let key = Key::Inbound(session, packet_id);
                self.replace(key, Change::AddInbound { session, packet_id }, due, receipt);
            }
            Op::RemoveInbound { session, packet_id, receipt } => {
                let key = Key::Inbound(session, packet_id);
                self.replace(key, Change::RemoveInbound { session, packet_id }, due, receipt);
            }
            Op::PutRetained(message, receipt) => {
                self.replace(Key::Retained(message.topic.clone()), Change::PutRetained(message), due, receipt);
            }
            Op::DropRetained(topic, receipt) => {
                self.replace(Key::Retained(topic.clone()), Change::DropRetained(topic), due, receipt);
            }
        }
    }

    /// Appends everything of `later`, which was submitted after everything in `self`.
    pub fn append(&mut self, later: Self) {
        if self.is_empty() {
            *self = later;
            return;
        }
        for slot in later.slots.into_iter().flatten() {
            self.replace(slot.change.key(), slot.change, slot.due, slot.receipts);
        }
        for (session, ranges) in later.removals {
            let mine = self.removals.entry(session).or_default();
            ranges.iter().for_each(|(first, last)| mine.insert_range(first, last));
        }
        self.removed += later.removed;
        self.removals_due = earlier(self.removals_due, later.removals_due);
    }

    /// Gives up a pending change of the topic's retained message, which another one will replace.
    pub fn forget_retained(&mut self, topic: &TopicName) {
        self.take(&Key::Retained(topic.clone()));
    }

    /// Whether a change of the topic's retained message is pending.
    pub fn holds_retained(&self, topic: &TopicName) -> bool {
        self.index.contains_key(&Key::Retained(topic.clone()))
    }

    /// When the first of what waits is due: that very time where it is to come, any of them where it has.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        let mut first = self.removals_due.filter(|_| !self.removals.is_empty());
        for due in self.slots().map(|slot| slot.due) {
            if first.is_some_and(|first| first <= now) {
                break;
            }
            first = earlier(first, Some(due));
        }
        first
    }

    /// Takes out what is refused when it cannot be written; what must not be lost stays.
    pub fn take_refusable(&mut self) -> Vec<Slot> {
        let mut refused = Vec::new();
        for entry in &mut self.slots {
            if entry.as_ref().is_some_and(|slot| slot.change.is_refusable()) {
                let slot = entry.take();
                *entry = slot.as_ref().and_then(Slot::removal);
                refused.extend(slot);
            }
        }
        self.compact();
        refused
    }

    /// Takes out what has no effect on disk: changes of sessions that are not there, changes of rows that never were.
    /// `is_there` tells of a session, `last` the highest sequence on disk in the lane of another sequence of it. The
    /// receipts of what goes are satisfied.
    pub fn prune(&mut self, is_there: impl Fn(SessionId) -> bool, last: impl Fn(SessionId, u64) -> Option<u64>) {
        let coming: HashSet<SessionId> = self
            .slots()
            .filter_map(|slot| match &slot.change {
                Change::PutSession(record) => Some(record.id),
                _ => None,
            })
            .collect();
        for entry in &mut self.slots {
            let moot = entry.as_ref().is_some_and(|slot| match &slot.change {
                Change::DropSession(session) => !is_there(*session),
                Change::Release { session, sequence } => last(*session, *sequence) < Some(*sequence),
                Change::PutSubscription { session, .. }
                | Change::DropSubscription { session, .. }
                | Change::EnqueueReleased { session, .. }
                | Change::Clear { session, .. }
                | Change::RemoveInbound { session, .. } => !is_there(*session) && !coming.contains(session),
                _ => false,
            });
            if moot {
                entry.take().inspect(|slot| slot.receipts.satisfy());
            }
        }
        self.removals.retain(|&session, ranges| {
            ranges.clip(|sequence| last(session, sequence));
            ranges.len() > 0
        });
        self.removed = self.removals.values().map(Ranges::count).sum();
        self.compact();
    }

    /// Fails the receipts of subscriptions, which stay: a SUBACK that waits for the disk to recover would come too late.
    pub fn fail_subscriptions(&mut self) {
        for slot in self.slots.iter_mut().flatten() {
            if matches!(slot.change, Change::PutSubscription { .. }) {
                std::mem::take(&mut slot.receipts).fail();
            }
        }
    }

    /// Settles the receipts of everything after a commit.
    pub fn satisfy(&self) {
        self.slots().for_each(|slot| slot.receipts.satisfy());
    }

    /// Fails every receipt, where the store ends before it could write.
    pub fn fail(&self) {
        self.slots().for_each(|slot| slot.receipts.fail());
    }

    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().flatten()
    }

    pub fn removals(&self) -> &HashMap<SessionId, Ranges> {
        &self.removals
    }

    /// What a page read before this batch is written must show for a row: `None` where it stands as it is on disk.
    pub fn effect_on(&self, session: SessionId, sequence: u64) -> Option<Effect> {
        let dropped = matches!(self.pending(&Key::Session(session)), Some(Change::DropSession(_)));
        if dropped || self.removals.get(&session).is_some_and(|ranges| ranges.contains(sequence)) {
            return Some(Effect::Gone);
        }
        let released = matches!(self.pending(&Key::Row(session, sequence)), Some(Change::Release { .. }));
        released.then_some(Effect::Released)
    }

    /// Whether what is on disk of a lane from sequence `from` on will be different once this batch is written, more that is
    /// appended aside.
    pub fn changes_page(&self, session: SessionId, from: u64) -> bool {
        let end = first_sequence(lane(from)) | MAX_NUMBER;
        let is_removed = self.removals.get(&session).is_some_and(|ranges| ranges.touches(from, end));
        is_removed
            || self.slots().any(|slot| match &slot.change {
                Change::DropSession(dropped) => *dropped == session,
                Change::Release { session: of, sequence } => *of == session && (from..=end).contains(sequence),
                _ => false,
            })
    }

    /// Messages that vanished before they were written, since the last call.
    pub fn take_cancelled(&mut self) -> u64 {
        std::mem::take(&mut self.cancelled)
    }

    pub fn is_empty(&self) -> bool {
        self.live == 0 && self.removals.is_empty()
    }

    /// Changes that are waiting.
    pub fn changes(&self) -> usize {
        self.live
    }

    /// Changes and removals that are waiting.
    pub fn len(&self) -> usize {
        self.live + self.removed
    }

    /// An estimate of the memory that the batch holds.
    pub fn bytes(&self) -> usize {
        self.bytes + self.removals.values().map(Ranges::len).sum::<usize>() * 32
    }

    fn remove(&mut self, session: SessionId, first: u64, last: u64, due: Instant, satisfied: &mut Vec<Arc<Receipt>>) {
        if self.index.is_empty() {
            // As while a backlog drains.
            return self.remove_stored(session, first..last + 1, due);
        }
        // What is on disk begins here, as far as the search for what is not has come.
        let mut stored = first;
        // Where a whole queue goes, few of its sequences are pending.
        let is_long = last - first > self.index.len() as u64;
        let listed = if is_long { self.pending_rows(session, first, last) } else { Vec::new() };
        for sequence in (if is_long { 0..0 } else { first..last + 1 }).chain(listed) {
            let Some(slot) = self.take(&Key::Row(session, sequence)) else { continue };
            let is_stored = matches!(slot.change, Change::Release { .. });
            satisfied.extend(slot.receipts);
            if !is_stored {
                self.cancelled += 1;
                self.remove_stored(session, stored..sequence, due);
                stored = sequence + 1;
            }
        }
        self.remove_stored(session, stored..last + 1, due);
    }

    /// The sequences from `first` to `last` that are pending, in their order.
    fn pending_rows(&self, session: SessionId, first: u64, last: u64) -> Vec<u64> {
        let mut rows: Vec<u64> = self
            .index
            .keys()
            .filter_map(|key| match key {
                Key::Row(of, sequence) if *of == session && (first..=last).contains(sequence) => Some(*sequence),
                _ => None,
            })
            .collect();
        rows.sort_unstable();
        rows
    }

    fn remove_stored(&mut self, session: SessionId, sequences: Range<u64>, due: Instant) {
        if !sequences.is_empty() {
            self.removals_due = earlier(self.removals_due, Some(due));
            self.removals.entry(session).or_default().insert_range(sequences.start, sequences.end - 1);
            self.removed += usize::try_from(sequences.end - sequences.start).unwrap_or(usize::MAX);
        }
    }

    fn pending(&self, key: &Key) -> Option<&Change> {
        let at = *self.index.get(key)?;
        self.slots[at].as_ref().map(|slot| &slot.change)
    }

    fn replace(&mut self, key: Key, change: Change, due: Instant, receipts: impl IntoIterator<Item = Arc<Receipt>>) {
        // A session stays where it was first put: what was submitted since hangs on it, and would find none.
        if let (Change::PutSession(_), Some(&at)) = (&change, self.index.get(&key))
            && let Some(Some(slot)) = self.slots.get_mut(at)
            && matches!(slot.change, Change::PutSession(_))
        {
            self.bytes -= slot.bytes();
            slot.due = slot.due.min(due);
            slot.change = change;
            self.bytes += slot.bytes();
            return;
        }
        let mut slot = match self.take(&key) {
            None => Slot { change, receipts: Receipts::default(), due, over_removal: false },
            Some(earlier) => earlier.overtaken_by(change, due),
        };
        slot.receipts.extend(receipts);
        self.bytes += slot.bytes();
        self.live += 1;
        self.index.insert(key, self.slots.len());
        self.slots.push(Some(slot));
    }

    fn take(&mut self, key: &Key) -> Option<Slot> {
        let at = self.index.remove(key)?;
        let slot = self.slots[at].take()?;
        self.live -= 1;
        self.bytes -= slot.bytes();
        if self.slots.len() > 2 * self.live + MAX_HOLES {
            self.compact();
        }
        Some(slot)
    }

    /// Closes the holes that cancelled changes have left.
    fn compact(&mut self) {
        self.slots.retain(Option::is_some);
        self.live = self.slots.len();
        self.bytes = self.slots().map(Slot::bytes).sum();
        self.index.clear();
        for (at, slot) in self.slots.iter().flatten().enumerate() {
            self.index.insert(slot.change.key(), at);
        }
    }
}

/// See [`Batch::effect_on`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Gone,
    Released,
}

impl Slot {
    /// What is left to write where `later` follows this change of the same key; see the rules of the module.
    fn overtaken_by(self, later: Change, later_due: Instant) -> Self {
        let Self { change: earlier, receipts, due, over_removal } = self;
        let change = match (&earlier, later) {
            (Change::Enqueue(_) | Change::EnqueueReleased { .. }, Change::Release { session, sequence }) => {
                Change::EnqueueReleased { session, sequence }
            }
            // A dropped session does not come back: its number is never used again.
            (Change::DropSession(session), Change::PutSession(_)) => Change::DropSession(*session),
            (_, later) => later,
        };
        let removal = matches!(earlier, Change::RemoveInbound { .. } | Change::DropRetained(_));
        let over_removal = change.is_refusable() && (removal || over_removal);
        Self { change, receipts, due: due.min(later_due), over_removal }
    }

    /// The removal whose place this change took.
    fn removal(&self) -> Option<Self> {
        let change = match &self.change {
            Change::AddInbound { session, packet_id } if self.over_removal => {
                Change::RemoveInbound { session: *session, packet_id: *packet_id }
            }
            Change::PutRetained(message) if self.over_removal => Change::DropRetained(message.topic.clone()),
            _ => return None,
        };
        Some(Self { change, receipts: Receipts::default(), due: self.due, over_removal: false })
    }

    fn bytes(&self) -> usize {
        OP_BYTES
            + match &self.change {
                Change::Enqueue(row) => row.message.size(),
                Change::PutRetained(message) => message.size(),
                Change::PutSession(record) => record.will.as_ref().map_or(0, |will| will.message.size()),
                Change::PutSubscription { filter, .. } | Change::DropSubscription { filter, .. } => filter.len(),
                _ => 0,
            }
    }
}

impl Change {
    fn key(&self) -> Key {
        match self {
            Self::PutSession(record) => Key::Session(record.id),
            Self::DropSession(session) => Key::Session(*session),
            Self::PutSubscription { session, filter, .. } | Self::DropSubscription { session, filter } => {
                Key::Subscription(*session, filter.clone())
            }
            Self::Enqueue(Row { session, sequence, .. })
            | Self::EnqueueReleased { session, sequence }
            | Self::Release { session, sequence } => Key::Row(*session, *sequence),
            Self::Clear { session, cleared } => Key::Cleared(*session, cleared.lane()),
            Self::AddInbound { session, packet_id, .. } | Self::RemoveInbound { session, packet_id } => {
                Key::Inbound(*session, *packet_id)
            }
            Self::PutRetained(message) => Key::Retained(message.topic.clone()),
            Self::DropRetained(topic) => Key::Retained(topic.clone()),
        }
    }

    /// Adds data that an acknowledgement promises. Where such a change cannot be written it is refused; every other
    /// change must not be lost and is kept until it can be.
    pub fn is_refusable(&self) -> bool {
        matches!(self, Self::Enqueue(_) | Self::AddInbound { .. } | Self::PutRetained(_))
    }
}

impl Receipts {
    pub fn satisfy(&self) {
        self.iter().for_each(|receipt| receipt.satisfy());
    }

    pub fn fail(&self) {
        self.iter().for_each(|receipt| receipt.fail());
    }

    fn iter(&self) -> impl Iterator<Item = &Arc<Receipt>> {
        self.first.iter().chain(&self.more)
    }
}

impl Extend<Arc<Receipt>> for Receipts {
    fn extend<T: IntoIterator<Item = Arc<Receipt>>>(&mut self, receipts: T) {
        for receipt in receipts {
            if self.first.is_none() {
                self.first = Some(receipt);
            } else {
                self.more.push(receipt);
            }
        }
    }
}

impl IntoIterator for Receipts {
    type Item = Arc<Receipt>;
    type IntoIter = std::iter::Chain<std::option::IntoIter<Arc<Receipt>>, std::vec::IntoIter<Arc<Receipt>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.more)
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    [one, other].into_iter().flatten().min()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::UnixMillis;
    use crate::signal::Signal;
    use crate::store::ReceiptState;

    const S: SessionId = SessionId(7);

    fn receipt() -> Arc<Receipt> {
        let receipt = Receipt::new(Arc::new(Signal::default()));
        receipt.add();
        receipt
    }

    fn message(topic: &str) -> Arc<Message> {
        let topic = TopicName::new(topic).unwrap();
        Arc::new(Message::new(topic, "payload", QoS::AtLeastOnce, UnixMillis(1)))
    }

    fn enqueue(sequence: u64, receipt: Option<Arc<Receipt>>) -> Op {
        let (qos, message) = (QoS::ExactlyOnce, message("a"));
        Op::Enqueue { session: S, sequence, qos, retain: false, identifiers: None, shared: None, message, receipt }
    }

    fn add_inbound(receipt: Option<Arc<Receipt>>) -> Op {
        Op::AddInbound { session: S, packet_id: 1, receipt }
    }

    fn remove_inbound(receipt: Option<Arc<Receipt>>) -> Op {
        Op::RemoveInbound { session: S, packet_id: 1, receipt }
    }

    fn record() -> Op {
        Op::PutSession(Box::new(SessionRecord {
            id: S,
            face: 0,
            client_id: "c".into(),
            user: None,
            expiry_interval: None,
            detached_at: None,
            will: None,
        }))
    }

    /// Pushes and settles what is settled at once.
    fn batch(ops: Vec<Op>) -> Batch {
        let (mut batch, mut satisfied) = (Batch::default(), Vec::new());
        let due = Instant::now();
        ops.into_iter().for_each(|op| batch.push(op, due, &mut satisfied));
        satisfied.iter().for_each(|receipt| receipt.satisfy());
        batch
    }

    fn names(batch: &Batch) -> Vec<&'static str> {
        let changes = batch.slots().map(|slot| match slot.change {
            Change::PutSession(_) => "put session",
            Change::DropSession(_) => "drop session",
            Change::PutSubscription { .. } => "put subscription",
            Change::DropSubscription { .. } => "drop subscription",
            Change::Enqueue(_) => "enqueue",
            Change::EnqueueReleased { .. } => "enqueue released",
            Change::Release { .. } => "release",
            Change::Clear { .. } => "clear",
            Change::AddInbound { .. } => "add inbound",
            Change::RemoveInbound { .. } => "remove inbound",
            Change::PutRetained(_) => "put retained",
            Change::DropRetained(_) => "drop retained",
        });
        changes.chain(batch.removals.values().map(|_| "remove")).collect()
    }

    #[test]
    fn what_is_moot_is_never_written() {
        let check = |ops: Vec<Op>, expected: &[&str]| {
            let text = format!("{ops:?}");
            assert_eq!(names(&batch(ops)), expected, "{text}");
        };
        let remove = |sequence| Op::remove(S, sequence);
        let release = |sequence| Op::Release { session: S, sequence, receipt: None };
        let put = || Op::PutRetained(message("t"), None);
        let unretain = || Op::DropRetained(TopicName::new("t").unwrap(), None);
        check(vec![enqueue(1, None), remove(1)], &[]);
        check(vec![enqueue(1, None), enqueue(2, None), remove(1)], &["enqueue"]);
        check(vec![remove(1)], &["remove"]);
        let remove_many = || Op::Remove { session: S, first: 1, last: 4 };
        check(vec![enqueue(1, None), enqueue(2, None), enqueue(3, None), enqueue(4, None), remove_many()], &[]);
        check(vec![enqueue(3, None), enqueue(5, None), remove_many()], &["enqueue", "remove"]);
        check(vec![enqueue(1, None), release(1)], &["enqueue released"]);
        check(vec![enqueue(1, None), release(1), remove(1)], &[]);
        check(vec![release(1), remove(1)], &["remove"]);
        check(vec![put(), put()], &["put retained"]);
        check(vec![put(), unretain()], &["drop retained"]);
        check(vec![unretain(), put()], &["put retained"]);
        check(vec![add_inbound(None), remove_inbound(None)], &["remove inbound"]);
        check(vec![remove_inbound(None), add_inbound(None)], &["add inbound"]);
        check(vec![record(), Op::DropSession(S)], &["drop session"]);
        check(vec![enqueue(1, None), Op::DropSession(S), remove(1)], &["drop session"]);
        check(vec![Op::DropSession(S), record()], &["drop session"]);
        check(vec![record(), enqueue(1, None), record()], &["put session", "enqueue"]);
    }

    #[test]
    fn a_release_before_the_commit_waits_for_the_messages_it_belongs_to() {
        let (publish, pubrel) = (receipt(), receipt());
        let held = batch(vec![add_inbound(Some(publish.clone())), remove_inbound(Some(pubrel.clone()))]);
        assert_eq!((publish.state(), pubrel.state()), (ReceiptState::Pending, ReceiptState::Pending));
        held.satisfy();
        assert_eq!((publish.state(), pubrel.state()), (ReceiptState::Done, ReceiptState::Done));
    }

    #[test]
    fn a_removal_satisfies_the_receipt_of_what_it_cancels() {
        let (cancelled, kept) = (receipt(), receipt());
        let ops = vec![enqueue(1, Some(cancelled.clone())), enqueue(2, Some(kept.clone()))];
        batch(ops.into_iter().chain([Op::remove(S, 1)]).collect());
        assert_eq!((cancelled.state(), kept.state()), (ReceiptState::Done, ReceiptState::Pending));
    }

    #[test]
    fn a_refused_change_brings_back_the_removal_whose_place_it_took() {
        let refused = receipt();
        let retained = Op::PutRetained(message("t"), None);
        let unretained = Op::DropRetained(TopicName::new("t").unwrap(), None);
        let ops =
            vec![remove_inbound(None), unretained, retained, add_inbound(Some(refused.clone())), enqueue(1, None)];
        let mut batch = batch(ops);
        assert_eq!(batch.take_refusable().len(), 3);
        assert_eq!(names(&batch), ["drop retained", "remove inbound"]);
    }

    #[test]
    fn what_waits_out_a_full_disk_keeps_its_order_and_loses_what_became_moot() {
        let mut kept = batch(vec![enqueue(3, None), Op::Release { session: S, sequence: 3, receipt: None }]);
        let released = Op::Release { session: S, sequence: 3, receipt: None };
        kept.append(batch(vec![released, Op::remove(S, 2), Op::DropSession(SessionId(9))]));
        assert_eq!(names(&kept), ["enqueue released", "drop session", "remove"]);
        kept.prune(|session| session == S, |session, _| (session == S).then_some(1));
        assert_eq!(names(&kept), ["enqueue released"]);
        kept.prune(|_| false, |_, _| None);
        assert!(kept.is_empty());
    }

    #[test]
    fn holes_do_not_pile_up_behind_a_change_that_stays() {
        let (mut batch, mut satisfied) = (batch(vec![record()]), Vec::new());
        for sequence in 0..100_000 {
            batch.push(enqueue(sequence, None), Instant::now(), &mut satisfied);
            batch.push(Op::remove(S, sequence), Instant::now(), &mut satisfied);
        }
        assert!(batch.slots.len() < 2 * MAX_HOLES, "{}", batch.slots.len());
        assert_eq!(names(&batch), ["put session"]);
        assert_eq!(batch.len(), 1);
    }

    #[test]
    fn a_batch_is_due_when_the_first_of_what_is_left_in_it_is() {
        let now = Instant::now();
        let at = |millis| now + Duration::from_millis(millis);
        let (mut batch, mut satisfied) = (Batch::default(), Vec::new());
        assert_eq!(batch.due(now), None);
        for sequence in 1..=3 {
            batch.push(enqueue(sequence, None), at(100 * sequence), &mut satisfied);
        }
        assert_eq!(batch.due(now), Some(at(100)));
        batch.push(Op::remove(S, 1), at(1000), &mut satisfied);
        assert_eq!(batch.due(now), Some(at(200)));
        // It stays as urgent as it was.
        batch.push(Op::Release { session: S, sequence: 2, receipt: None }, at(1000), &mut satisfied);
        assert_eq!(batch.due(now), Some(at(200)));
        batch.push(Op::Remove { session: S, first: 2, last: 3 }, at(1000), &mut satisfied);
        assert_eq!(batch.due(now), None);
        batch.push(Op::remove(SessionId(8), 1), at(1000), &mut satisfied);
        assert_eq!(batch.due(now), Some(at(1000)));
        batch.push(Op::PutRetained(message("t"), None), at(50), &mut satisfied);
        assert!(batch.due(at(70)) <= Some(at(70)));
    }
}
