//! What gateway and client say to each other, free of wire numbers (MQTT-SN 1.2 §5.4).
//!
//! A [`Packet`] borrows from the datagram it was decoded from. Names and client ids are octets here: whether they are
//! text is for the receiver to say, who can then answer with a return code. The bytes are the business of
//! [`codec`](super::codec); a codec for MQTT-SN 2.0 would speak the same words.

use crate::message::QoS;

/// Matches an acknowledgement with what it acknowledges; 0 where nothing is acknowledged (§5.3.10).
pub type MsgId = u16;

/// One MQTT-SN message, named as in the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// A gateway is here, and will say so again within `duration` seconds.
    Advertise {
        gateway_id: u8,
        duration: u16,
    },
    SearchGw {
        radius: u8,
    },
    /// `address` is empty when a gateway answers for itself.
    GwInfo {
        gateway_id: u8,
        address: &'a [u8],
    },
    Connect(Connect<'a>),
    ConnAck(ReturnCode),
    WillTopicReq,
    /// `None` deletes the will.
    WillTopic(Option<WillTopic<'a>>),
    WillMsgReq,
    WillMsg(&'a [u8]),
    Register {
        topic_id: u16,
        msg_id: MsgId,
        topic_name: &'a [u8],
    },
    RegAck {
        topic_id: u16,
        msg_id: MsgId,
        code: ReturnCode,
    },
    Publish(Publish<'a>),
    /// `topic_id` are the two octets of the PUBLISH, whatever their type (§5.4.13).
    PubAck {
        topic_id: u16,
        msg_id: MsgId,
        code: ReturnCode,
    },
    PubRec(MsgId),
    PubRel(MsgId),
    PubComp(MsgId),
    Subscribe {
        dup: bool,
        qos: PublishQoS,
        msg_id: MsgId,
        topic: TopicRef<'a>,
    },
    SubAck {
        qos: QoS,
        topic_id: u16,
        msg_id: MsgId,
        code: ReturnCode,
    },
    Unsubscribe {
        msg_id: MsgId,
        topic: TopicRef<'a>,
    },
    UnsubAck(MsgId),
    /// `client_id` is there when a sleeping client wakes (§6.14), empty otherwise.
    PingReq {
        client_id: &'a [u8],
    },
    PingResp,
    /// With a `duration` in seconds: the client goes to sleep.
    Disconnect {
        duration: Option<u16>,
    },
    /// `None` deletes the will.
    WillTopicUpd(Option<WillTopic<'a>>),
    WillTopicResp(ReturnCode),
    WillMsgUpd(&'a [u8]),
    WillMsgResp(ReturnCode),
    /// What a forwarder passes on for a node that the gateway cannot reach itself (§5.5).
    Encapsulated {
        radius: u8,
        node: &'a [u8],
        message: &'a [u8],
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect<'a> {
    /// The client will say its will when asked.
    pub will: bool,
    pub clean_session: bool,
    /// Whether the client speaks the version this codec does.
    pub protocol: Protocol,
    /// Keep alive, in seconds.
    pub duration: u16,
    pub client_id: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Supported,
    Other(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WillTopic<'a> {
    pub qos: QoS,
    pub retain: bool,
    pub topic_name: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish<'a> {
    pub dup: bool,
    pub qos: PublishQoS,
    pub retain: bool,
    pub topic: TopicId,
    /// 0 unless the QoS is 1 or 2.
    pub msg_id: MsgId,
    pub payload: &'a [u8],
}

/// The QoS of a client's PUBLISH: MQTT's three, and "−1", which needs no connection (§6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishQoS {
    Connectionless,
    Connected(QoS),
}

/// What stands for a topic name in a PUBLISH. The three kinds are separate spaces (§5.3.11, §6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TopicId {
    /// Given by REGACK, SUBACK or the gateway's REGISTER; means something to one client only.
    Normal(u16),
    /// Known to client and gateway beforehand.
    Predefined(u16),
    /// A topic name of two octets, itself.
    Short([u8; 2]),
}

impl TopicId {
    /// The two octets as they stand in PUBLISH and PUBACK.
    pub fn number(self) -> u16 {
        match self {
            Self::Normal(id) | Self::Predefined(id) => id,
            Self::Short(name) => u16::from_be_bytes(name),
        }
    }
}

/// What SUBSCRIBE and UNSUBSCRIBE are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicRef<'a> {
    /// A topic filter.
    Name(&'a [u8]),
    Predefined(u16),
    Short([u8; 2]),
}

/// The answer to a request (§5.3.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReturnCode {
    Accepted,
    /// Not now; try again later.
    Congestion,
    InvalidTopicId,
    NotSupported,
}

/// The kinds of message, for counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PacketKind {
    Advertise,
    SearchGw,
    GwInfo,
    Connect,
    ConnAck,
    WillTopicReq,
    WillTopic,
    WillMsgReq,
    WillMsg,
    Register,
    RegAck,
    Publish,
    PubAck,
    PubComp,
    PubRec,
    PubRel,
    Subscribe,
    SubAck,
    Unsubscribe,
    UnsubAck,
    PingReq,
    PingResp,
    Disconnect,
    WillTopicUpd,
    WillTopicResp,
    WillMsgUpd,
    WillMsgResp,
    Encapsulated,
}

impl PacketKind {
    pub const COUNT: usize = 28;

    /// The names in the order of the kinds, as the `type` label of metrics.
    pub const NAMES: [&'static str; Self::COUNT] = [
        "advertise",
        "searchgw",
        "gwinfo",
        "connect",
        "connack",
        "willtopicreq",
        "willtopic",
        "willmsgreq",
        "willmsg",
        "register",
        "regack",
        "publish",
        "puback",
        "pubcomp",
        "pubrec",
        "pubrel",
        "subscribe",
        "suback",
        "unsubscribe",
        "unsuback",
        "pingreq",
        "pingresp",
        "disconnect",
        "willtopicupd",
        "willtopicresp",
        "willmsgupd",
        "willmsgresp",
        "encapsulated",
    ];
}

impl Packet<'_> {
    pub fn kind(&self) -> PacketKind {
        match self {
            Self::Advertise { .. } => PacketKind::Advertise,
            Self::SearchGw { .. } => PacketKind::SearchGw,
            Self::GwInfo { .. } => PacketKind::GwInfo,
            Self::Connect(_) => PacketKind::Connect,
            Self::ConnAck(_) => PacketKind::ConnAck,
            Self::WillTopicReq => PacketKind::WillTopicReq,
            Self::WillTopic(_) => PacketKind::WillTopic,
            Self::WillMsgReq => PacketKind::WillMsgReq,
            Self::WillMsg(_) => PacketKind::WillMsg,
            Self::Register { .. } => PacketKind::Register,
            Self::RegAck { .. } => PacketKind::RegAck,
            Self::Publish(_) => PacketKind::Publish,
            Self::PubAck { .. } => PacketKind::PubAck,
            Self::PubRec(_) => PacketKind::PubRec,
            Self::PubRel(_) => PacketKind::PubRel,
            Self::PubComp(_) => PacketKind::PubComp,
            Self::Subscribe { .. } => PacketKind::Subscribe,
            Self::SubAck { .. } => PacketKind::SubAck,
            Self::Unsubscribe { .. } => PacketKind::Unsubscribe,
            Self::UnsubAck(_) => PacketKind::UnsubAck,
            Self::PingReq { .. } => PacketKind::PingReq,
            Self::PingResp => PacketKind::PingResp,
            Self::Disconnect { .. } => PacketKind::Disconnect,
            Self::WillTopicUpd(_) => PacketKind::WillTopicUpd,
            Self::WillTopicResp(_) => PacketKind::WillTopicResp,
            Self::WillMsgUpd(_) => PacketKind::WillMsgUpd,
            Self::WillMsgResp(_) => PacketKind::WillMsgResp,
            Self::Encapsulated { .. } => PacketKind::Encapsulated,
        }
    }
}
