//! What the hub tells the store to keep or forget, and what it gets back after a start.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::message::{Message, QoS};
use crate::store::{Packed, Receipt};
use crate::topic::{SharedFilter, TopicName};

/// Names one session for ever; the hub chooses the number: one more than any it has seen, stored ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// How many low bits of a sequence number a message within its lane; the bits above name the lane.
///
/// At 10,000 messages per second to one lane they last three and a half years without a restart.
pub(super) const NUMBER_BITS: u32 = 40;
/// No message has this number: it is what a lane that has come to its end would give out.
pub(super) const MAX_NUMBER: u64 = (1 << NUMBER_BITS) - 1;

/// The first sequence of a lane. A queue's only lane, and the only one that a session always has, is lane 0.
pub fn first_sequence(lane: u8) -> u64 {
    u64::from(lane) << NUMBER_BITS
}

/// The lane that a sequence belongs to.
pub fn lane(sequence: u64) -> u8 {
    u8::try_from(sequence >> NUMBER_BITS).unwrap_or(u8::MAX)
}

/// The number that a sequence has within its lane.
pub fn number(sequence: u64) -> u64 {
    sequence & MAX_NUMBER
}

/// One change to what is kept. Operations of one key take effect in the order they were submitted.
#[derive(Clone, Debug)]
pub enum Op {
    /// Adds the session, or replaces its record; subscriptions, queue and inbound identifiers stay as they are.
    PutSession(Box<SessionRecord>),
    /// Forgets the session and everything that hangs on it.
    DropSession(SessionId),
    /// Adds the subscription, or replaces the one with the same filter.
    PutSubscription {
        session: SessionId,
        /// As spelled in the SUBSCRIBE, with its `$share/{group}/`.
        filter: Arc<str>,
        /// The hub's own encoding of the subscription options.
        options: u8,
        identifier: Option<u32>,
        receipt: Option<Arc<Receipt>>,
    },
    DropSubscription {
        session: SessionId,
        filter: Arc<str>,
    },
    /// Appends a message to the session's queue, which may consist of several lanes. `sequence` says which one in its
    /// high bits, see [`first_sequence`]; it grows with every message of the lane and is never used twice.
    Enqueue {
        session: SessionId,
        sequence: u64,
        /// As granted to this receiver.
        qos: QoS,
        /// The retain flag that this receiver gets.
        retain: bool,
        /// Subscription identifiers (MQTT 5.0 §3.3.2.3.8).
        identifiers: Option<Arc<[u32]>>,
        /// The shared subscription that brought it: where the session ends first, another member may have it.
        shared: Option<Arc<SharedFilter>>,
        message: Arc<Message>,
        receipt: Option<Arc<Receipt>>,
    },
    /// The receiver of a QoS 2 message owns it now (PUBREC): its content is given up, its row stays until
    /// [`Op::Remove`].
    Release {
        session: SessionId,
        sequence: u64,
        receipt: Option<Arc<Receipt>>,
    },
    /// The messages from sequence `first` to `last`, of one lane, are done with: PUBACK, PUBCOMP, dropped or expired.
    /// Where an `Enqueue` is not committed yet, both vanish, nothing is written and its receipt is satisfied.
    Remove {
        session: SessionId,
        first: u64,
        last: u64,
    },
    /// After damage to the database: so far the receiver is known to hold no packet identifier of a lost message.
    Clear {
        session: SessionId,
        cleared: Cleared,
        receipt: Option<Arc<Receipt>>,
    },
    /// A QoS 2 message with this packet identifier was accepted from the session's client.
    AddInbound {
        session: SessionId,
        packet_id: u16,
        receipt: Option<Arc<Receipt>>,
    },
    /// The client released the packet identifier (PUBREL).
    RemoveInbound {
        session: SessionId,
        packet_id: u16,
        receipt: Option<Arc<Receipt>>,
    },
    /// Replaces the retained message of its topic.
    PutRetained(Arc<Message>, Option<Arc<Receipt>>),
    DropRetained(TopicName, Option<Arc<Receipt>>),
}

impl Op {
    /// Removes one message.
    pub fn remove(session: SessionId, sequence: u64) -> Self {
        Self::Remove { session, first: sequence, last: sequence }
    }
}

/// When operations must be on disk at the latest; `Durability::Interval` and `Durability::Relaxed` put it off further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// As soon as the writer is free.
    Now,
    /// Within the commit delay: the receivers are online and will likely acknowledge first, so it is never written. How
    /// long that is worth waiting for, the store learns from their acknowledgements.
    Soon,
    /// With the next commit that comes anyway, or within a second: losing it costs no more than a repeated delivery.
    Later,
    /// For [`Op::PutRetained`] of a message whose publisher asks for no acknowledgement: after
    /// [`Settings::retained_interval`](super::Settings::retained_interval), so that of many on one topic the last is written
    /// alone. Anything else as [`Due::Later`].
    Eventually,
}

/// What of a session outlives its connection and the process.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRecord {
    pub id: SessionId,
    /// The hub's own encoding of the session's face.
    pub face: u8,
    pub client_id: Arc<str>,
    pub user: Option<Arc<str>>,
    /// How long the session is kept after it is detached; `None` is for ever.
    pub expiry_interval: Option<Duration>,
    /// `None` while a connection is attached.
    pub detached_at: Option<UnixMillis>,
    pub will: Option<Box<WillRecord>>,
}

/// The will of a session (MQTT 5.0 §3.1.2.5).
#[derive(Clone, Debug, PartialEq)]
pub struct WillRecord {
    pub message: Message,
    pub delay: Duration,
}

/// A session as it was found in the store.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredSession {
    pub record: SessionRecord,
    pub subscriptions: Vec<StoredSubscription>,
    /// Packet identifiers of inbound QoS 2 messages that are not released yet.
    pub inbound: Vec<u16>,
    /// The lanes of its queue, lane 0 first.
    pub queues: Vec<QueueSummary>,
    /// Set since the database was damaged: a message may be lost of which the other side holds the packet identifier, and
    /// one of `inbound` may be in use no more. Holds what has been cleared up, by lane.
    pub in_doubt: Option<Vec<Cleared>>,
}

/// How far the packet identifiers of a lane are known to be free, or in use by what the lane holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cleared {
    /// Those of the sequences below are. No message from here on has been sent since the damage.
    pub below: u64,
    /// From this sequence on they have come round: once `below` has come so far there is no doubt.
    pub until: u64,
}

impl Cleared {
    pub fn lane(self) -> u8 {
        lane(self.below)
    }

    /// Whether there is no doubt left.
    pub fn is_over(self) -> bool {
        self.below >= self.until
    }
}

/// A subscription as it was found in the store; the fields are those of [`Op::PutSubscription`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSubscription {
    pub filter: Arc<str>,
    pub options: u8,
    pub identifier: Option<u32>,
}

/// How much one lane of a session's queue holds on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSummary {
    pub lane: u8,
    /// The lowest sequence in the lane; `None` where it is empty.
    pub first: Option<u64>,
    /// The highest sequence known to have been stored, also where its message has gone; the next is larger.
    pub last: Option<u64>,
    /// Released QoS 2 messages count too.
    pub messages: u64,
    /// Sum of [`Message::size`]; a released message has none.
    pub bytes: u64,
}

/// A part of a lane, in the order of its sequences.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub messages: Packed,
    /// Nothing follows the last message.
    pub complete: bool,
    /// Damaged messages were found here, which may have been sent: see [`StoredSession::in_doubt`].
    pub in_doubt: bool,
    /// Reading failed, and the reason is in the log; what was read before stands in `messages`. Try again later.
    pub failed: bool,
}

/// What [`crate::store::Store::sweep`] looks for in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// From this sequence on.
    pub from: u64,
    pub now: UnixMillis,
    /// What was accepted before has expired too, whatever it says itself.
    pub oldest: Option<UnixMillis>,
}

/// What a sweep has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub messages: u64,
    /// Sum of [`Message::size`].
    pub bytes: u64,
    /// There was more than one sweep may take, or it failed: sweep again soon.
    pub more: bool,
    /// The lowest sequence that is left, from where the sweep began; `None` where nothing is, or there was more.
    pub first: Option<u64>,
    /// When something that is in the queue now will have expired; `None` where nothing ever does.
    pub next: Option<UnixMillis>,
}

/// How much a [`Page`] may hold; the first message is given even where it alone is larger than `bytes`.
#[derive(Clone, Copy, Debug)]
pub struct PageLimit {
    pub messages: usize,
    pub bytes: usize,
}

/// One message of a queue as it was found in the store; the fields are those of [`Op::Enqueue`].
#[derive(Clone, Debug, PartialEq)]
pub struct StoredMessage {
    pub sequence: u64,
    pub qos: QoS,
    pub retain: bool,
    pub identifiers: Option<Arc<[u32]>>,
    pub shared: Option<Arc<SharedFilter>>,
    pub state: StoredState,
}

#[derive(Clone, Debug, PartialEq)]
pub enum StoredState {
    /// Not known to have arrived; it may have been sent.
    Queued(Arc<Message>),
    /// QoS 2, PUBREC has arrived: only PUBREL may be sent.
    Released,
}
