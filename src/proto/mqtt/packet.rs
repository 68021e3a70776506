//! The packets of MQTT, borrowed: from the bytes they were decoded from, or from what is to be encoded.

use super::wire::Reader;
use super::{PacketId, PropertyList, ReasonCode};
use crate::message::QoS;

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// `MQIsdp`, level 3.
    V3_1,
    V3_1_1,
    V5,
}

impl Version {
    #[inline]
    pub fn is_5(self) -> bool {
        self == Self::V5
    }

    /// The protocol level in a CONNECT.
    pub fn level(self) -> u8 {
        match self {
            Self::V3_1 => 3,
            Self::V3_1_1 => 4,
            Self::V5 => 5,
        }
    }

    /// As people write it: `3.1`, `3.1.1`, `5.0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V3_1 => "3.1",
            Self::V3_1_1 => "3.1.1",
            Self::V5 => "5.0",
        }
    }
}

/// Any packet.
#[derive(Clone, Debug, PartialEq)]
pub enum Packet<'a> {
    Connect(Box<Connect<'a>>),
    Connack(Connack<'a>),
    Publish(Publish<'a>),
    Puback(Ack<'a>),
    Pubrec(Ack<'a>),
    Pubrel(Ack<'a>),
    Pubcomp(Ack<'a>),
    Subscribe(Subscribe<'a>),
    Suback(Suback<'a>),
    Unsubscribe(Unsubscribe<'a>),
    Unsuback(Unsuback<'a>),
    Pingreq,
    Pingresp,
    Disconnect(Disconnect<'a>),
    Auth(Auth<'a>),
}

/// MQTT 5.0 §3.1.
#[derive(Clone, PartialEq)]
pub struct Connect<'a> {
    pub version: Version,
    /// The peer is a Mosquitto bridge, which sets the top bit of the protocol level (3.x only): its subscriptions
    /// do not get its own messages back, and keep their retain flag.
    pub is_bridge: bool,
    /// Clean session in 3.x.
    pub clean_start: bool,
    /// Seconds; zero is no supervision.
    pub keep_alive: u16,
    pub properties: PropertyList<'a>,
    pub client_id: &'a str,
    pub will: Option<LastWill<'a>>,
    pub user_name: Option<&'a str>,
    pub password: Option<&'a [u8]>,
}

/// Without the password.
impl std::fmt::Debug for Connect<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connect")
            .field("version", &self.version)
            .field("is_bridge", &self.is_bridge)
            .field("clean_start", &self.clean_start)
            .field("keep_alive", &self.keep_alive)
            .field("properties", &self.properties)
            .field("client_id", &self.client_id)
            .field("will", &self.will)
            .field("user_name", &self.user_name)
            .finish_non_exhaustive()
    }
}

/// MQTT 5.0 §3.1.2.5.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LastWill<'a> {
    pub qos: QoS,
    pub retain: bool,
    pub properties: PropertyList<'a>,
    /// Checked: a valid topic name.
    pub topic: &'a str,
    pub payload: &'a [u8],
}

/// MQTT 5.0 §3.2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Connack<'a> {
    pub session_present: bool,
    /// A return code of 3.x is given as the reason code that says the same.
    pub reason: ReasonCode,
    pub properties: PropertyList<'a>,
}

/// MQTT 5.0 §3.3. To send one, see [`encode_publish`](super::encode_publish).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Publish<'a> {
    pub dup: bool,
    pub qos: QoS,
    pub retain: bool,
    /// Checked: a valid topic name, or empty in 5.0 where the properties hold a topic alias.
    pub topic: &'a str,
    /// Some for QoS 1 and 2.
    pub packet_id: Option<PacketId>,
    pub properties: PropertyList<'a>,
    pub payload: &'a [u8],
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP (MQTT 5.0 §3.4 to §3.7).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ack<'a> {
    pub packet_id: PacketId,
    /// Always success in 3.x, which has no other.
    pub reason: ReasonCode,
    pub properties: PropertyList<'a>,
}

impl Ack<'_> {
    /// An acknowledgement with no properties.
    pub fn new(packet_id: PacketId, reason: ReasonCode) -> Self {
        Self { packet_id, reason, properties: PropertyList::EMPTY }
    }
}

/// MQTT 5.0 §3.8.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Subscribe<'a> {
    pub packet_id: PacketId,
    pub properties: PropertyList<'a>,
    pub subscriptions: Subscriptions<'a>,
}

/// One entry of a SUBSCRIBE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscription<'a> {
    /// As on the wire: a string; whether it is a topic filter is for the reader to check.
    pub filter: &'a str,
    pub options: SubscriptionOptions,
}

/// MQTT 5.0 §3.8.3.1. 3.x has only the QoS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubscriptionOptions {
    pub qos: QoS,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub retain_handling: RetainHandling,
}

impl SubscriptionOptions {
    /// What a subscription of 3.x means.
    pub fn new(qos: QoS) -> Self {
        Self { qos, no_local: false, retain_as_published: false, retain_handling: RetainHandling::Send }
    }

    /// The options byte, if its values are allowed.
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Some(Self {
            qos: QoS::from_level(byte & 0b11)?,
            no_local: byte & 0b100 != 0,
            retain_as_published: byte & 0b1000 != 0,
            retain_handling: match byte >> 4 {
                0 => RetainHandling::Send,
                1 => RetainHandling::SendIfNew,
                2 => RetainHandling::DoNotSend,
                _ => return None,
            },
        })
    }

    pub(super) fn to_byte(self) -> u8 {
        let handling = match self.retain_handling {
            RetainHandling::Send => 0,
            RetainHandling::SendIfNew => 1,
            RetainHandling::DoNotSend => 2,
        };
        self.qos.level() | u8::from(self.no_local) << 2 | u8::from(self.retain_as_published) << 3 | handling << 4
    }
}

/// Whether retained messages are sent when a subscription is made (MQTT 5.0 §3.8.3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RetainHandling {
    #[default]
    Send,
    SendIfNew,
    DoNotSend,
}

/// The entries of a SUBSCRIBE, at least one.
#[derive(Clone, Copy, Debug)]
pub enum Subscriptions<'a> {
    /// Bytes that `decode` has walked once to the end, and the bits of each options byte that have a meaning.
    Checked(&'a [u8], u8),
    Given(&'a [Subscription<'a>]),
}

impl<'a> Subscriptions<'a> {
    pub fn iter(&self) -> impl Iterator<Item = Subscription<'a>> + use<'a> {
        let (mut reader, meant, mut given) = match *self {
            Self::Checked(bytes, meant) => (Reader(bytes), meant, [].iter()),
            Self::Given(list) => (Reader(&[]), 0, list.iter()),
        };
        std::iter::from_fn(move || {
            if let Some(subscription) = given.next() {
                return Some(*subscription);
            }
            let filter = reader.string().ok()?;
            Some(Subscription { filter, options: SubscriptionOptions::from_byte(reader.u8().ok()? & meant)? })
        })
    }
}

impl PartialEq for Subscriptions<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

/// MQTT 5.0 §3.9.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Suback<'a> {
    pub packet_id: PacketId,
    pub properties: PropertyList<'a>,
    /// One reason code (3.x: return code) per entry of the SUBSCRIBE; each checked to be one that a SUBACK can hold.
    pub reasons: &'a [u8],
}

/// MQTT 5.0 §3.10.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unsubscribe<'a> {
    pub packet_id: PacketId,
    pub properties: PropertyList<'a>,
    pub filters: Filters<'a>,
}

/// The filters of an UNSUBSCRIBE, at least one.
#[derive(Clone, Copy, Debug)]
pub enum Filters<'a> {
    /// Bytes that `decode` has walked once to the end.
    Checked(&'a [u8]),
    Given(&'a [&'a str]),
}

impl<'a> Filters<'a> {
    pub fn iter(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let (mut reader, mut given) = match *self {
            Self::Checked(bytes) => (Reader(bytes), [].iter()),
            Self::Given(list) => (Reader(&[]), list.iter()),
        };
        std::iter::from_fn(move || given.next().copied().or_else(|| reader.string().ok()))
    }
}

impl PartialEq for Filters<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

/// MQTT 5.0 §3.11.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unsuback<'a> {
    pub packet_id: PacketId,
    pub properties: PropertyList<'a>,
    /// One reason code per filter; none in 3.x.
    pub reasons: &'a [u8],
}

/// MQTT 5.0 §3.14.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Disconnect<'a> {
    /// Always success in 3.x.
    pub reason: ReasonCode,
    pub properties: PropertyList<'a>,
}

/// MQTT 5.0 §3.15.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Auth<'a> {
    pub reason: ReasonCode,
    pub properties: PropertyList<'a>,
}
