//! The bytes of MQTT-SN 1.2 (§5.2 to §5.5): one datagram is one message.
//!
//! Decoding borrows and allocates nothing; it checks the form and leaves the meaning to its caller. Lengths that do
//! not fit, reserved types and reserved topic id types are errors, to be counted by the caller and otherwise ignored.

use thiserror::Error;

use super::packet::{Connect, Packet, Protocol, Publish, PublishQoS, ReturnCode, TopicId, TopicRef, WillTopic};
use crate::message::QoS;

/// The longest MQTT-SN message: its length field has two octets (§5.2.1).
pub const MAX_PACKET_BYTES: usize = 65_535;
/// The longest node id of an encapsulated frame: the outer length has one octet (§5.5).
pub const MAX_NODE_BYTES: usize = 252;

/// What keeps a datagram from being a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    #[error("the length field does not match the datagram")]
    Length,
    #[error("message type {0:#04x} is reserved")]
    Reserved(u8),
    #[error("a {0} message has the wrong form")]
    Malformed(&'static str),
}

const PROTOCOL_ID: u8 = 0x01;

const ADVERTISE: u8 = 0x00;
const SEARCHGW: u8 = 0x01;
const GWINFO: u8 = 0x02;
const CONNECT: u8 = 0x04;
const CONNACK: u8 = 0x05;
const WILLTOPICREQ: u8 = 0x06;
const WILLTOPIC: u8 = 0x07;
const WILLMSGREQ: u8 = 0x08;
const WILLMSG: u8 = 0x09;
const REGISTER: u8 = 0x0A;
const REGACK: u8 = 0x0B;
const PUBLISH: u8 = 0x0C;
const PUBACK: u8 = 0x0D;
const PUBCOMP: u8 = 0x0E;
const PUBREC: u8 = 0x0F;
const PUBREL: u8 = 0x10;
const SUBSCRIBE: u8 = 0x12;
const SUBACK: u8 = 0x13;
const UNSUBSCRIBE: u8 = 0x14;
const UNSUBACK: u8 = 0x15;
const PINGREQ: u8 = 0x16;
const PINGRESP: u8 = 0x17;
const DISCONNECT: u8 = 0x18;
const WILLTOPICUPD: u8 = 0x1A;
const WILLTOPICRESP: u8 = 0x1B;
const WILLMSGUPD: u8 = 0x1C;
const WILLMSGRESP: u8 = 0x1D;
const ENCAPSULATED: u8 = 0xFE;

const DUP: u8 = 0x80;
const QOS: u8 = 0x60;
const RETAIN: u8 = 0x10;
const WILL: u8 = 0x08;
const CLEAN_SESSION: u8 = 0x04;
const TOPIC_ID_TYPE: u8 = 0x03;
const NORMAL: u8 = 0x00;
const PREDEFINED: u8 = 0x01;
const SHORT: u8 = 0x02;

/// Decodes the message that `datagram` is.
///
/// # Errors
/// [`DecodeError::Length`] when the length field counts more or fewer octets than there are,
/// [`DecodeError::Reserved`] and [`DecodeError::Malformed`] for what the specification does not define.
pub fn decode(datagram: &[u8]) -> Result<Packet<'_>, DecodeError> {
    let (length, rest) = match *datagram {
        [1, high, low, ref rest @ ..] => (usize::from(u16::from_be_bytes([high, low])), rest),
        // A first octet of 0 or 1 alone cannot count itself.
        [0 | 1, ..] | [] => return Err(DecodeError::Length),
        [length, ref rest @ ..] => (usize::from(length), rest),
    };
    let header = datagram.len() - rest.len();
    let (&kind, body) = rest.split_first().ok_or(DecodeError::Length)?;
    if kind == ENCAPSULATED {
        // The outer length covers the header up to the node id only; the message follows it.
        let body_length = length.checked_sub(header + 1).ok_or(DecodeError::Length)?;
        let (outer, message) = body.split_at_checked(body_length).ok_or(DecodeError::Length)?;
        let (&control, node) = outer.split_first().ok_or(DecodeError::Malformed("forwarder"))?;
        return Ok(Packet::Encapsulated { radius: control & 0x03, node, message });
    }
    if length != datagram.len() {
        return Err(DecodeError::Length);
    }
    decode_body(kind, body)
}

fn decode_body(kind: u8, body: &[u8]) -> Result<Packet<'_>, DecodeError> {
    let malformed = |name| DecodeError::Malformed(name);
    let packet = match (kind, body) {
        (ADVERTISE, &[gateway_id, a, b]) => Packet::Advertise { gateway_id, duration: u16::from_be_bytes([a, b]) },
        (ADVERTISE, _) => return Err(malformed("ADVERTISE")),
        (SEARCHGW, &[radius]) => Packet::SearchGw { radius },
        (SEARCHGW, _) => return Err(malformed("SEARCHGW")),
        (GWINFO, &[gateway_id, ref address @ ..]) => Packet::GwInfo { gateway_id, address },
        (GWINFO, _) => return Err(malformed("GWINFO")),
        (CONNECT, &[flags, protocol, a, b, ref client_id @ ..]) => Packet::Connect(Connect {
            will: flags & WILL != 0,
            clean_session: flags & CLEAN_SESSION != 0,
            protocol: if protocol == PROTOCOL_ID { Protocol::Supported } else { Protocol::Other(protocol) },
            duration: u16::from_be_bytes([a, b]),
            client_id,
        }),
        (CONNECT, _) => return Err(malformed("CONNECT")),
        (CONNACK, &[code]) => Packet::ConnAck(decode_code(code)),
        (CONNACK, _) => return Err(malformed("CONNACK")),
        (WILLTOPICREQ, []) => Packet::WillTopicReq,
        (WILLTOPICREQ, _) => return Err(malformed("WILLTOPICREQ")),
        (WILLTOPIC, _) => Packet::WillTopic(decode_will_topic(body).ok_or(malformed("WILLTOPIC"))?),
        (WILLMSGREQ, []) => Packet::WillMsgReq,
        (WILLMSGREQ, _) => return Err(malformed("WILLMSGREQ")),
        (WILLMSG, _) => Packet::WillMsg(body),
        (REGISTER, &[a, b, c, d, ref topic_name @ ..]) => {
            Packet::Register { topic_id: u16::from_be_bytes([a, b]), msg_id: u16::from_be_bytes([c, d]), topic_name }
        }
        (REGISTER, _) => return Err(malformed("REGISTER")),
        (REGACK, &[a, b, c, d, code]) => Packet::RegAck {
            topic_id: u16::from_be_bytes([a, b]),
            msg_id: u16::from_be_bytes([c, d]),
            code: decode_code(code),
        },
        (REGACK, _) => return Err(malformed("REGACK")),
        (PUBLISH, &[flags, a, b, c, d, ref payload @ ..]) => Packet::Publish(Publish {
            dup: flags & DUP != 0,
            qos: decode_qos(flags),
            retain: flags & RETAIN != 0,
            topic: match flags & TOPIC_ID_TYPE {
                NORMAL => TopicId::Normal(u16::from_be_bytes([a, b])),
                PREDEFINED => TopicId::Predefined(u16::from_be_bytes([a, b])),
                SHORT => TopicId::Short([a, b]),
                _ => return Err(malformed("PUBLISH")),
            },
            msg_id: u16::from_be_bytes([c, d]),
            payload,
        }),
        (PUBLISH, _) => return Err(malformed("PUBLISH")),
        (PUBACK, &[a, b, c, d, code]) => Packet::PubAck {
            topic_id: u16::from_be_bytes([a, b]),
            msg_id: u16::from_be_bytes([c, d]),
            code: decode_code(code),
        },
        (PUBACK, _) => return Err(malformed("PUBACK")),
        (PUBREC, &[a, b]) => Packet::PubRec(u16::from_be_bytes([a, b])),
        (PUBREC, _) => return Err(malformed("PUBREC")),
        (PUBREL, &[a, b]) => Packet::PubRel(u16::from_be_bytes([a, b])),
        (PUBREL, _) => return Err(malformed("PUBREL")),
        (PUBCOMP, &[a, b]) => Packet::PubComp(u16::from_be_bytes([a, b])),
        (PUBCOMP, _) => return Err(malformed("PUBCOMP")),
        (SUBSCRIBE, &[flags, a, b, ref topic @ ..]) => Packet::Subscribe {
            dup: flags & DUP != 0,
            qos: decode_qos(flags),
            msg_id: u16::from_be_bytes([a, b]),
            topic: decode_topic_ref(flags, topic).ok_or(malformed("SUBSCRIBE"))?,
        },
        (SUBSCRIBE, _) => return Err(malformed("SUBSCRIBE")),
        (SUBACK, &[flags, a, b, c, d, code]) => Packet::SubAck {
            qos: connected_qos(flags).ok_or(malformed("SUBACK"))?,
            topic_id: u16::from_be_bytes([a, b]),
            msg_id: u16::from_be_bytes([c, d]),
            code: decode_code(code),
        },
        (SUBACK, _) => return Err(malformed("SUBACK")),
        (UNSUBSCRIBE, &[flags, a, b, ref topic @ ..]) => Packet::Unsubscribe {
            msg_id: u16::from_be_bytes([a, b]),
            topic: decode_topic_ref(flags, topic).ok_or(malformed("UNSUBSCRIBE"))?,
        },
        (UNSUBSCRIBE, _) => return Err(malformed("UNSUBSCRIBE")),
        (UNSUBACK, &[a, b]) => Packet::UnsubAck(u16::from_be_bytes([a, b])),
        (UNSUBACK, _) => return Err(malformed("UNSUBACK")),
        (PINGREQ, client_id) => Packet::PingReq { client_id },
        (PINGRESP, []) => Packet::PingResp,
        (PINGRESP, _) => return Err(malformed("PINGRESP")),
        (DISCONNECT, []) => Packet::Disconnect { duration: None },
        (DISCONNECT, &[a, b]) => Packet::Disconnect { duration: Some(u16::from_be_bytes([a, b])) },
        (DISCONNECT, _) => return Err(malformed("DISCONNECT")),
        (WILLTOPICUPD, _) => Packet::WillTopicUpd(decode_will_topic(body).ok_or(malformed("WILLTOPICUPD"))?),
        (WILLTOPICRESP, &[code]) => Packet::WillTopicResp(decode_code(code)),
        (WILLTOPICRESP, _) => return Err(malformed("WILLTOPICRESP")),
        (WILLMSGUPD, _) => Packet::WillMsgUpd(body),
        (WILLMSGRESP, &[code]) => Packet::WillMsgResp(decode_code(code)),
        (WILLMSGRESP, _) => return Err(malformed("WILLMSGRESP")),
        (reserved, _) => return Err(DecodeError::Reserved(reserved)),
    };
    Ok(packet)
}

/// Appends the bytes of `packet` to `into`.
///
/// The caller has checked [`encoded_len`] against what its link carries, at most [`MAX_PACKET_BYTES`].
pub fn encode(packet: &Packet<'_>, into: &mut Vec<u8>) {
    if let Packet::Encapsulated { radius, node, message } = *packet {
        let length = header_len(1 + node.len());
        put_header(into, length, ENCAPSULATED);
        into.push(radius & 0x03);
        into.extend_from_slice(node);
        into.extend_from_slice(message);
        return;
    }
    let (kind, fixed, tail) = encode_parts(packet);
    put_header(into, header_len(fixed.as_slice().len() + tail.len()), kind);
    into.extend_from_slice(fixed.as_slice());
    into.extend_from_slice(tail);
}

/// The number of octets that [`encode`] appends for `packet`.
pub fn encoded_len(packet: &Packet<'_>) -> usize {
    if let Packet::Encapsulated { node, message, .. } = packet {
        return header_len(1 + node.len()) + message.len();
    }
    let (_, fixed, tail) = encode_parts(packet);
    header_len(fixed.as_slice().len() + tail.len())
}

/// The whole length of a message with a body of `body` octets: the longer form begins at 256 (§5.2.1).
fn header_len(body: usize) -> usize {
    if body + 2 <= 255 { body + 2 } else { body + 4 }
}

fn put_header(into: &mut Vec<u8>, length: usize, kind: u8) {
    match u8::try_from(length) {
        Ok(length) => into.push(length),
        Err(_) => {
            debug_assert!(length <= MAX_PACKET_BYTES, "the caller checks the length");
            let length = u16::try_from(length).unwrap_or(u16::MAX);
            into.push(1);
            into.extend_from_slice(&length.to_be_bytes());
        }
    }
    into.push(kind);
}

/// The fields of fixed size in front of a message's text or data.
#[derive(Default)]
struct Fixed {
    octets: [u8; 6],
    used: usize,
}

impl Fixed {
    fn octet(mut self, value: u8) -> Self {
        self.octets[self.used] = value;
        self.used += 1;
        self
    }

    fn pair(self, value: u16) -> Self {
        let [high, low] = value.to_be_bytes();
        self.octet(high).octet(low)
    }

    fn as_slice(&self) -> &[u8] {
        &self.octets[..self.used]
    }
}

fn encode_parts<'a>(packet: &'a Packet<'a>) -> (u8, Fixed, &'a [u8]) {
    let fixed = Fixed::default();
    let none: &[u8] = &[];
    match *packet {
        Packet::Advertise { gateway_id, duration } => (ADVERTISE, fixed.octet(gateway_id).pair(duration), none),
        Packet::SearchGw { radius } => (SEARCHGW, fixed.octet(radius), none),
        Packet::GwInfo { gateway_id, address } => (GWINFO, fixed.octet(gateway_id), address),
        Packet::Connect(Connect { will, clean_session, protocol, duration, client_id }) => {
            let flags = flag(will, WILL) | flag(clean_session, CLEAN_SESSION);
            let protocol = match protocol {
                Protocol::Supported => PROTOCOL_ID,
                Protocol::Other(number) => number,
            };
            (CONNECT, fixed.octet(flags).octet(protocol).pair(duration), client_id)
        }
        Packet::ConnAck(code) => (CONNACK, fixed.octet(code_number(code)), none),
        Packet::WillTopicReq => (WILLTOPICREQ, fixed, none),
        Packet::WillTopic(ref will) => encode_will_topic(WILLTOPIC, will.as_ref()),
        Packet::WillMsgReq => (WILLMSGREQ, fixed, none),
        Packet::WillMsg(message) => (WILLMSG, fixed, message),
        Packet::Register { topic_id, msg_id, topic_name } => (REGISTER, fixed.pair(topic_id).pair(msg_id), topic_name),
        Packet::RegAck { topic_id, msg_id, code } => {
            (REGACK, fixed.pair(topic_id).pair(msg_id).octet(code_number(code)), none)
        }
        Packet::Publish(Publish { dup, qos, retain, topic, msg_id, payload }) => {
            let kind = match topic {
                TopicId::Normal(_) => NORMAL,
                TopicId::Predefined(_) => PREDEFINED,
                TopicId::Short(_) => SHORT,
            };
            let flags = flag(dup, DUP) | qos_bits(qos) | flag(retain, RETAIN) | kind;
            (PUBLISH, fixed.octet(flags).pair(topic.number()).pair(msg_id), payload)
        }
        Packet::PubAck { topic_id, msg_id, code } => {
            (PUBACK, fixed.pair(topic_id).pair(msg_id).octet(code_number(code)), none)
        }
        Packet::PubRec(msg_id) => (PUBREC, fixed.pair(msg_id), none),
        Packet::PubRel(msg_id) => (PUBREL, fixed.pair(msg_id), none),
        Packet::PubComp(msg_id) => (PUBCOMP, fixed.pair(msg_id), none),
        Packet::Subscribe { dup, qos, msg_id, ref topic } => {
            let (kind, topic) = topic_ref_parts(topic);
            let fixed = fixed.octet(flag(dup, DUP) | qos_bits(qos) | kind).pair(msg_id);
            with_topic(SUBSCRIBE, fixed, topic)
        }
        Packet::SubAck { qos, topic_id, msg_id, code } => {
            let flags = qos_bits(PublishQoS::Connected(qos));
            (SUBACK, fixed.octet(flags).pair(topic_id).pair(msg_id).octet(code_number(code)), none)
        }
        Packet::Unsubscribe { msg_id, ref topic } => {
            let (kind, topic) = topic_ref_parts(topic);
            with_topic(UNSUBSCRIBE, fixed.octet(kind).pair(msg_id), topic)
        }
        Packet::UnsubAck(msg_id) => (UNSUBACK, fixed.pair(msg_id), none),
        Packet::PingReq { client_id } => (PINGREQ, fixed, client_id),
        Packet::PingResp => (PINGRESP, fixed, none),
        Packet::Disconnect { duration } => {
            (DISCONNECT, duration.map_or(Fixed::default(), |duration| fixed.pair(duration)), none)
        }
        Packet::WillTopicUpd(ref will) => encode_will_topic(WILLTOPICUPD, will.as_ref()),
        Packet::WillTopicResp(code) => (WILLTOPICRESP, fixed.octet(code_number(code)), none),
        Packet::WillMsgUpd(message) => (WILLMSGUPD, fixed, message),
        Packet::WillMsgResp(code) => (WILLMSGRESP, fixed.octet(code_number(code)), none),
        // `encode` and `encoded_len` have taken this one: its length field does not count the message.
        Packet::Encapsulated { radius, node, .. } => (ENCAPSULATED, fixed.octet(radius & 0x03), node),
    }
}

fn encode_will_topic<'a>(kind: u8, will: Option<&WillTopic<'a>>) -> (u8, Fixed, &'a [u8]) {
    match will {
        None => (kind, Fixed::default(), &[]),
        Some(will) => {
            let flags = qos_bits(PublishQoS::Connected(will.qos)) | flag(will.retain, RETAIN);
            (kind, Fixed::default().octet(flags), will.topic_name)
        }
    }
}

enum TopicParts<'a> {
    Text(&'a [u8]),
    Number(u16),
}

fn topic_ref_parts<'a>(topic: &TopicRef<'a>) -> (u8, TopicParts<'a>) {
    match *topic {
        TopicRef::Name(name) => (NORMAL, TopicParts::Text(name)),
        TopicRef::Predefined(id) => (PREDEFINED, TopicParts::Number(id)),
        TopicRef::Short(name) => (SHORT, TopicParts::Number(u16::from_be_bytes(name))),
    }
}

fn with_topic(kind: u8, fixed: Fixed, topic: TopicParts<'_>) -> (u8, Fixed, &[u8]) {
    match topic {
        TopicParts::Text(name) => (kind, fixed, name),
        TopicParts::Number(number) => (kind, fixed.pair(number), &[]),
    }
}

fn decode_topic_ref(flags: u8, topic: &[u8]) -> Option<TopicRef<'_>> {
    match (flags & TOPIC_ID_TYPE, topic) {
        (NORMAL, name) => Some(TopicRef::Name(name)),
        (PREDEFINED, &[a, b]) => Some(TopicRef::Predefined(u16::from_be_bytes([a, b]))),
        (SHORT, &[a, b]) => Some(TopicRef::Short([a, b])),
        _ => None,
    }
}

/// `Some(None)` is the empty form that deletes a will: no octets at all, or flags with no topic.
fn decode_will_topic(body: &[u8]) -> Option<Option<WillTopic<'_>>> {
    match *body {
        [] | [_] => Some(None),
        [flags, ref topic_name @ ..] => {
            let qos = connected_qos(flags)?;
            Some(Some(WillTopic { qos, retain: flags & RETAIN != 0, topic_name }))
        }
    }
}

fn decode_qos(flags: u8) -> PublishQoS {
    connected_qos(flags).map_or(PublishQoS::Connectionless, PublishQoS::Connected)
}

fn connected_qos(flags: u8) -> Option<QoS> {
    QoS::from_level((flags & QOS) >> 5)
}

fn qos_bits(qos: PublishQoS) -> u8 {
    match qos {
        PublishQoS::Connectionless => QOS,
        PublishQoS::Connected(qos) => qos.level() << 5,
    }
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

fn decode_code(code: u8) -> ReturnCode {
    match code {
        0 => ReturnCode::Accepted,
        1 => ReturnCode::Congestion,
        2 => ReturnCode::InvalidTopicId,
        // 3 is "not supported"; the reserved ones are refusals too.
        _ => ReturnCode::NotSupported,
    }
}

fn code_number(code: ReturnCode) -> u8 {
    match code {
        ReturnCode::Accepted => 0,
        ReturnCode::Congestion => 1,
        ReturnCode::InvalidTopicId => 2,
        ReturnCode::NotSupported => 3,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bytes: &[u8], packet: Packet<'_>) {
        assert_eq!(decode(bytes), Ok(packet), "{bytes:02x?}");
        let mut encoded = Vec::new();
        encode(&packet, &mut encoded);
        assert_eq!(encoded, bytes, "{packet:?}");
        assert_eq!(encoded_len(&packet), bytes.len(), "{packet:?}");
    }

    // Lines 5 to 7, 13, 21, 26, 37, 42, 47, 50 of the checklist: the form of every message.
    #[test]
    fn every_message_is_the_bytes_of_the_specification() {
        let connected = PublishQoS::Connected;
        check(&[5, 0x00, 7, 0x03, 0x84], Packet::Advertise { gateway_id: 7, duration: 900 });
        check(&[3, 0x01, 2], Packet::SearchGw { radius: 2 });
        check(&[3, 0x02, 7], Packet::GwInfo { gateway_id: 7, address: &[] });
        check(&[5, 0x02, 7, 9, 9], Packet::GwInfo { gateway_id: 7, address: &[9, 9] });
        let connect =
            Connect { will: true, clean_session: true, protocol: Protocol::Supported, duration: 60, client_id: b"dev" };
        check(&[9, 0x04, 0x0C, 1, 0, 60, b'd', b'e', b'v'], Packet::Connect(connect));
        let connect = Connect { will: false, clean_session: false, protocol: Protocol::Other(2), ..connect };
        check(&[9, 0x04, 0x00, 2, 0, 60, b'd', b'e', b'v'], Packet::Connect(connect));
        check(&[3, 0x05, 3], Packet::ConnAck(ReturnCode::NotSupported));
        check(&[2, 0x06], Packet::WillTopicReq);
        check(&[2, 0x07], Packet::WillTopic(None));
        let will = WillTopic { qos: QoS::AtLeastOnce, retain: true, topic_name: b"w" };
        check(&[4, 0x07, 0x30, b'w'], Packet::WillTopic(Some(will)));
        check(&[2, 0x08], Packet::WillMsgReq);
        check(&[5, 0x09, 1, 2, 3], Packet::WillMsg(&[1, 2, 3]));
        check(&[7, 0x0A, 0, 0, 0, 9, b't'], Packet::Register { topic_id: 0, msg_id: 9, topic_name: b"t" });
        check(&[7, 0x0B, 0, 5, 0, 9, 2], Packet::RegAck { topic_id: 5, msg_id: 9, code: ReturnCode::InvalidTopicId });
        let publish = Publish {
            dup: true,
            qos: connected(QoS::ExactlyOnce),
            retain: true,
            topic: TopicId::Predefined(5),
            msg_id: 9,
            payload: b"x",
        };
        check(&[8, 0x0C, 0xD1, 0, 5, 0, 9, b'x'], Packet::Publish(publish));
        let publish = Publish {
            dup: false,
            qos: PublishQoS::Connectionless,
            retain: false,
            topic: TopicId::Short(*b"ab"),
            msg_id: 0,
            payload: b"",
        };
        check(&[7, 0x0C, 0x62, b'a', b'b', 0, 0], Packet::Publish(publish));
        check(&[7, 0x0D, 0, 5, 0, 9, 1], Packet::PubAck { topic_id: 5, msg_id: 9, code: ReturnCode::Congestion });
        check(&[4, 0x0E, 0, 9], Packet::PubComp(9));
        check(&[4, 0x0F, 0, 9], Packet::PubRec(9));
        check(&[4, 0x10, 0, 9], Packet::PubRel(9));
        let subscribe = |qos, topic| Packet::Subscribe { dup: false, qos: connected(qos), msg_id: 9, topic };
        check(&[6, 0x12, 0x20, 0, 9, b't'], subscribe(QoS::AtLeastOnce, TopicRef::Name(b"t")));
        check(&[7, 0x12, 0x41, 0, 9, 0, 5], subscribe(QoS::ExactlyOnce, TopicRef::Predefined(5)));
        check(&[7, 0x12, 0x02, 0, 9, b'a', b'b'], subscribe(QoS::AtMostOnce, TopicRef::Short(*b"ab")));
        let suback = Packet::SubAck { qos: QoS::AtLeastOnce, topic_id: 5, msg_id: 9, code: ReturnCode::Accepted };
        check(&[8, 0x13, 0x20, 0, 5, 0, 9, 0], suback);
        check(&[6, 0x14, 0x00, 0, 9, b't'], Packet::Unsubscribe { msg_id: 9, topic: TopicRef::Name(b"t") });
        check(&[4, 0x15, 0, 9], Packet::UnsubAck(9));
        check(&[2, 0x16], Packet::PingReq { client_id: b"" });
        check(&[5, 0x16, b'd', b'e', b'v'], Packet::PingReq { client_id: b"dev" });
        check(&[2, 0x17], Packet::PingResp);
        check(&[2, 0x18], Packet::Disconnect { duration: None });
        check(&[4, 0x18, 0, 60], Packet::Disconnect { duration: Some(60) });
        check(&[2, 0x1A], Packet::WillTopicUpd(None));
        check(&[4, 0x1A, 0x30, b'w'], Packet::WillTopicUpd(Some(will)));
        check(&[3, 0x1B, 0], Packet::WillTopicResp(ReturnCode::Accepted));
        check(&[3, 0x1C, b'm'], Packet::WillMsgUpd(b"m"));
        check(&[3, 0x1D, 0], Packet::WillMsgResp(ReturnCode::Accepted));
    }

    // Lines 1 and 2.
    #[test]
    fn the_long_length_begins_at_256_octets_and_is_accepted_below() {
        let payload = vec![b'x'; 300];
        let check_length = |payload: &[u8], head: &[u8]| {
            let mut encoded = Vec::new();
            encode(&Packet::WillMsg(payload), &mut encoded);
            assert_eq!(&encoded[..head.len()], head);
            assert_eq!(decode(&encoded), Ok(Packet::WillMsg(payload)));
        };
        check_length(&payload[..253], &[255, 0x09, b'x']);
        check_length(&payload[..254], &[1, 0x01, 0x02, 0x09, b'x']);
        check_length(&payload, &[1, 0x01, 0x30, 0x09, b'x']);
        assert_eq!(decode(&[1, 0, 4, 0x17]), Ok(Packet::PingResp));
    }

    // Lines 3 and 5.
    #[test]
    fn what_the_specification_does_not_define_is_an_error() {
        let check = |bytes: &[u8], error| assert_eq!(decode(bytes), Err(error), "{bytes:02x?}");
        for bytes in [&[][..], &[0], &[1], &[2], &[1, 0, 4], &[3, 0x17], &[2, 0x17, 0], &[1, 0, 3], &[0, 0x17]] {
            check(bytes, DecodeError::Length);
        }
        for kind in [0x03, 0x11, 0x19, 0x1E, 0x80, 0xFD, 0xFF] {
            check(&[2, kind], DecodeError::Reserved(kind));
        }
        check(&[7, 0x0C, 0x03, 0, 5, 0, 0], DecodeError::Malformed("PUBLISH"));
        check(&[6, 0x12, 0x01, 0, 9, 5], DecodeError::Malformed("SUBSCRIBE"));
        check(&[3, 0x18, 0], DecodeError::Malformed("DISCONNECT"));
        check(&[4, 0x05, 0, 0], DecodeError::Malformed("CONNACK"));
        check(&[5, 0x04, 0, 1, 0], DecodeError::Malformed("CONNECT"));
    }

    // Lines 57 and 58.
    #[test]
    fn an_encapsulated_frame_counts_its_header_only() {
        let inner = [2, 0x16];
        let check_node = |node: &[u8]| {
            let packet = Packet::Encapsulated { radius: 2, node, message: &inner };
            let mut encoded = Vec::new();
            encode(&packet, &mut encoded);
            assert_eq!(usize::from(encoded[0]), 3 + node.len());
            assert_eq!(encoded.len(), encoded_len(&packet));
            assert_eq!(decode(&encoded), Ok(packet));
        };
        check_node(&[]);
        check_node(&[0xA, 0xB, 0xC]);
        check_node(&[7; MAX_NODE_BYTES]);
        assert_eq!(decode(&[9, 0xFE, 0, 1, 2]), Err(DecodeError::Length));
        assert_eq!(decode(&[2, 0xFE]), Err(DecodeError::Malformed("forwarder")));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_decodes_encodes_to_the_same_meaning(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            check_round_trip(&bytes);
        }

        #[test]
        fn no_framed_bytes_panic(kind in 0u8..0x20, body in prop::collection::vec(any::<u8>(), 0..20)) {
            let mut bytes = vec![u8::try_from(body.len() + 2).unwrap(), kind];
            bytes.extend(body);
            check_round_trip(&bytes);
        }
    }

    fn check_round_trip(bytes: &[u8]) {
        if let Ok(packet) = decode(bytes) {
            let mut encoded = Vec::new();
            encode(&packet, &mut encoded);
            assert_eq!(decode(&encoded), Ok(packet));
        }
    }
}
