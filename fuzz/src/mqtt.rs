//! What the targets for MQTT have in common.

use arbitrary::Arbitrary;

use crate::message::{Message, QoS};
use crate::proto::mqtt::{Ack, AckKind, MAX_PACKET_BYTES, Packet, PacketId, Publish, ReasonCode, Version, decode};
use crate::topic::TopicName;

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum AnyVersion {
    V3_1,
    V3_1_1,
    V5,
}

impl From<AnyVersion> for Version {
    fn from(version: AnyVersion) -> Self {
        match version {
            AnyVersion::V3_1 => Self::V3_1,
            AnyVersion::V3_1_1 => Self::V3_1_1,
            AnyVersion::V5 => Self::V5,
        }
    }
}

/// One of a few topics, so that the same ones come again.
pub fn topic(number: u8) -> TopicName {
    let name = ["a", "a/b", "a/long/topic", "$own/topic"][usize::from(number % 4)];
    TopicName::new(name).expect("a topic name")
}

pub fn qos(number: u8) -> QoS {
    QoS::from_level(number % 3).expect("0, 1 or 2")
}

/// One of a few identifiers.
pub fn packet_id(number: u8) -> PacketId {
    PacketId::MIN.saturating_add(u16::from(number % 8))
}

pub fn message(topic_number: u8, payload: &[u8], level: u8) -> Message {
    Message::new(topic(topic_number), payload.to_vec(), qos(level), Default::default())
}

/// The bytes of a packet.
pub fn encoded(packet: &Packet<'_>, version: Version) -> Vec<u8> {
    let mut out = Vec::new();
    packet.encode(version, MAX_PACKET_BYTES, &mut out).expect("a small packet");
    out
}

pub fn ack_packet(kind: AckKind, packet_id: PacketId) -> Packet<'static> {
    let ack = Ack::new(packet_id, ReasonCode::Success);
    match kind {
        AckKind::Puback => Packet::Puback(ack),
        AckKind::Pubrec => Packet::Pubrec(ack),
        AckKind::Pubcomp => Packet::Pubcomp(ack),
    }
}

pub fn ack_kind(number: u8) -> AckKind {
    [AckKind::Puback, AckKind::Pubrec, AckKind::Pubcomp][usize::from(number % 3)]
}

/// Takes packets off the front of `bytes` as their receiver would, and gives each with its length to `see`.
///
/// # Panics
/// Where the bytes are no packets.
pub fn each_packet(mut bytes: &[u8], version: Version, mut see: impl FnMut(Packet<'_>, usize)) {
    while !bytes.is_empty() {
        let decoded = decode(bytes, version, MAX_PACKET_BYTES).expect("what is written can be read");
        let (packet, length) = decoded.expect("whole packets are written");
        see(packet, length);
        bytes = &bytes[length..];
    }
}

/// The receiver's view of topic aliases.
#[derive(Debug, Default)]
pub struct Aliases(std::collections::HashMap<u16, String>);

impl Aliases {
    /// The topic that a PUBLISH is for; its alias may be `maximum` at most.
    pub fn resolve(&mut self, publish: &Publish<'_>, maximum: u16) -> String {
        let alias = publish.properties.iter().find_map(|property| match property {
            crate::proto::mqtt::Property::TopicAlias(alias) => Some(alias.get()),
            _ => None,
        });
        let Some(alias) = alias else { return publish.topic.to_owned() };
        assert!(alias <= maximum, "alias {alias} of {maximum}");
        if !publish.topic.is_empty() {
            self.0.insert(alias, publish.topic.to_owned());
        }
        self.0.get(&alias).expect("an alias has been given a topic").clone()
    }
}
