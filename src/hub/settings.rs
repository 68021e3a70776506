//! How the hub is set up, and what a connection asks of it.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use super::access::{self, Identity};
use super::queue::{Precedence, QueueLimits};
use super::session::{Face, SessionExpiry};
use crate::message::{Message, QoS};
use crate::throttle::AddressLimits;

/// How the hub is set up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    pub limits: Limits,
    pub access: access::Settings,
}

/// What one client, and all of them together, may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Connections of clients at a time, on all listeners together.
    pub max_connections: usize,
    /// What one address may do, on all listeners together.
    pub addresses: AddressLimits,
    /// QoS 1 and 2 messages sent to one client and not yet acknowledged.
    pub max_inflight: u16,
    /// The same towards an upstream, which is far away and takes everything: the window is what a round trip can carry.
    pub max_inflight_upstream: u16,
    /// What has waited for longer is given up, whatever the limits of its queue say; `None` is never.
    pub max_age: Option<Duration>,
    pub queue: QueueLimits,
    /// Memory for the messages of all queues together, in bytes.
    pub max_queue_memory: u64,
    pub max_subscriptions: usize,
    /// Levels of a topic name or filter.
    pub max_topic_levels: usize,
    /// Bytes of a topic name or filter; MQTT knows none longer than 65,535.
    pub max_topic_length: usize,
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
            max_connections: 20_000,
            addresses: AddressLimits::default(),
            max_inflight: 100,
            max_inflight_upstream: 2000,
            queue: QueueLimits::default(),
            max_age: None,
            max_queue_memory: 256 << 20,
            max_subscriptions: 1000,
            max_topic_levels: 200,
            max_topic_length: 65_535,
            max_retained_messages: 1_000_000,
            max_retained_bytes: 256 << 20,
            max_sessions: 100_000,
            max_session_expiry: None,
        }
    }
}

impl Limits {
    /// The limits of a queue, with those that hold for all.
    pub(super) fn of_queue(&self, queue: QueueLimits) -> QueueLimits {
        QueueLimits { max_age: [queue.max_age, self.max_age].into_iter().flatten().min(), ..queue }
    }

    /// The most that may be sent to a session and not yet be acknowledged.
    pub(super) fn window(&self, face: Face) -> u16 {
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
    /// The version of its protocol, for people.
    pub version: Option<&'static str>,
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
            version: None,
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
    /// For an upstream's session, and not kept in the journal: it subscribes anew after each start.
    pub precedence: Precedence,
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
            precedence: Precedence::default(),
        }
    }

    /// As in a SUBSCRIBE packet, which is also how the journal keeps it.
    pub(super) fn to_byte(self) -> u8 {
        self.qos.level()
            | u8::from(self.no_local) << 2
            | u8::from(self.retain_as_published) << 3
            | (self.retain_handling as u8) << 4
    }

    pub(super) fn from_byte(byte: u8, identifier: Option<u32>) -> Self {
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
            precedence: Precedence::default(),
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
