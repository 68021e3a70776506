//! What the gateway's state machines want done, and what they are told back.
//!
//! A [`Request`] is for the client's session on the hub. Those with an answer carry what the answer must be matched
//! with, so that one that waits for the disk can come later.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use bytes::Bytes;

use super::codec;
use super::packet::{MsgId, Packet, PacketKind, ReturnCode, TopicId};
use crate::message::{Message, QoS};
use crate::topic::{SharedFilter, TopicName};

/// Names one client of a gateway; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientKey(pub u64);

/// What the shell must do, in this order.
#[derive(Debug)]
pub enum Action {
    Send {
        to: SocketAddr,
        datagram: Vec<u8>,
    },
    /// Send to everyone in reach.
    Broadcast {
        datagram: Vec<u8>,
    },
    Client {
        key: ClientKey,
        request: Request,
    },
    /// A message of QoS −1 from someone who is not connected (§6.8).
    PublishConnectionless {
        from: SocketAddr,
        topic: TopicName,
        payload: Bytes,
        retain: bool,
    },
    Notice(Notice),
}

/// What a client needs from its session on the hub.
#[derive(Debug)]
pub enum Request {
    /// Open a session; one that is open for this client already is given up without its will. Answer: `attached`.
    Attach {
        client_id: Arc<str>,
        clean_start: bool,
        lifetime: SessionLifetime,
        will: Option<Will>,
    },
    /// Go on with the session that is open. Answer: `attached`.
    Resume {
        will: Option<Will>,
    },
    SetWill(Option<Will>),
    /// Answer: `published`, at the latest when the message is on disk.
    Publish {
        topic: TopicName,
        payload: Bytes,
        qos: QoS,
        retain: bool,
        dup: bool,
        answer: PublishAnswer,
    },
    /// The client has completed its QoS 2 message. Answer: `released`.
    Release(MsgId),
    /// Answer: `subscribed`.
    Subscribe {
        filter: SharedFilter,
        qos: QoS,
        answer: SubscribeAnswer,
    },
    Unsubscribe {
        filter: SharedFilter,
    },
    /// Hand over the next message. Answer: `deliver`, `deliver_release` or `drained`.
    Take,
    Acknowledge(NonZeroU16),
    Received(NonZeroU16),
    Completed(NonZeroU16),
    /// The session is closed, or goes on without its client.
    Detach {
        will: WillFate,
        lifetime: SessionLifetime,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionLifetime {
    /// Until the client disconnects or is lost (CleanSession).
    Connection,
    /// Until a client with this id starts a clean one.
    Lasting,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WillFate {
    Publish,
    Discard,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Will {
    pub topic: TopicName,
    pub payload: Bytes,
    pub qos: QoS,
    pub retain: bool,
}

/// Which PUBLISH an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishAnswer {
    pub topic: TopicId,
    pub msg_id: MsgId,
    /// `None` for QoS −1, which is never answered.
    pub qos: Option<QoS>,
}

/// Which SUBSCRIBE an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubscribeAnswer {
    /// What will stand for the topic; `None` for wildcards and short names, and for a refusal.
    pub topic: Option<TopicId>,
    pub msg_id: MsgId,
}

/// A message for a client, as its session gives it.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub message: Arc<Message>,
    pub qos: QoS,
    pub retain: bool,
    pub dup: bool,
    /// There for QoS 1 and 2; the MsgId on the wire.
    pub packet_id: Option<NonZeroU16>,
}

/// Something a person may want to read in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The client said nothing for too long, or did not acknowledge.
    Lost { client_id: Arc<str>, cause: LostCause },
    /// Said once per connection of a client.
    TooBig { client_id: Arc<str>, topic: TopicName, bytes: usize },
    /// Said once per connection of a client: no topic id is left for it.
    TopicsExhausted { client_id: Arc<str>, topic: TopicName },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostCause {
    /// Silent for longer than its keep alive.
    KeepAlive,
    /// Silent for longer than it wanted to sleep.
    Sleep,
    /// No acknowledgement after all retransmissions.
    Retries,
}

/// Why something was not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// The length field does not match the datagram.
    Length,
    /// A message type, flag or form that the specification does not define.
    Undefined,
    /// A message that has no place in the client's state.
    Unexpected,
    /// A message that belongs to no client.
    Stranger,
    /// QoS −1 from where it is not allowed.
    NotAllowed,
    RateLimited,
    /// A topic id that stands for nothing.
    UnknownTopic,
    /// Longer than the link carries.
    TooBig,
    /// The client does not want messages on this topic.
    Refused,
    TopicsExhausted,
    /// The client's address is not known at the moment.
    NoAddress,
    /// QoS 0 that a client did not get before it left.
    Gone,
}

impl DropReason {
    pub const COUNT: usize = 12;

    /// The names in the order of the reasons, as the `reason` label of metrics.
    pub const NAMES: [&'static str; Self::COUNT] = [
        "length",
        "undefined",
        "unexpected",
        "stranger",
        "not_allowed",
        "rate_limited",
        "unknown_topic",
        "too_big",
        "refused",
        "topics_exhausted",
        "no_address",
        "gone",
    ];
}

/// What one client puts out.
#[derive(Debug)]
pub enum Output {
    Send { kind: PacketKind, bytes: Vec<u8> },
    Request(Request),
    Drop(DropReason),
    Notice(Notice),
}

/// The outputs of one step of a client.
#[derive(Debug, Default)]
pub struct Outputs(pub Vec<Output>);

impl Outputs {
    pub fn send(&mut self, packet: &Packet<'_>) {
        let mut bytes = Vec::with_capacity(codec::encoded_len(packet));
        codec::encode(packet, &mut bytes);
        self.0.push(Output::Send { kind: packet.kind(), bytes });
    }

    pub fn request(&mut self, request: Request) {
        self.0.push(Output::Request(request));
    }

    pub fn drop(&mut self, reason: DropReason) {
        self.0.push(Output::Drop(reason));
    }

    pub fn notice(&mut self, notice: Notice) {
        self.0.push(Output::Notice(notice));
    }
}

/// The answer to a PUBLISH: taken over as its QoS promises, or refused with a return code.
pub type Published = Result<(), ReturnCode>;
