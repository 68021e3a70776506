//! From bytes to packets, copying nothing (MQTT 5.0 §2, §3; MQTT 3.1.1 §2, §3).
//!
//! Everything that can be said about one packet by itself is checked here; what depends on the packets before it is
//! the business of `server` and `client`.

use super::packet::{
    Ack, Auth, Connack, Connect, Disconnect, Filters, LastWill, Packet, Publish, Suback, Subscribe,
    SubscriptionOptions, Subscriptions, Unsuback, Unsubscribe, Version,
};
use super::property::{Property, PropertyList, place};
use super::wire::{self, Reader};
use super::{PacketId, ProtocolError, ReasonCode};
use crate::message::QoS;
use crate::topic::TopicName;

/// Takes one packet off the front of `bytes`: the packet and its length, or `None` while it is not all there.
///
/// `version` is that of the connection; a CONNECT brings its own. A packet of more than `max_packet_size` bytes is
/// refused as soon as its fixed header is there.
///
/// # Errors
/// The connection cannot go on; [`ProtocolError::reason`] tells the peer why.
#[inline]
pub fn decode(
    bytes: &[u8],
    version: Version,
    max_packet_size: u32,
) -> Result<Option<(Packet<'_>, usize)>, ProtocolError> {
    // Most of what comes from whoever receives messages.
    if let [PUBACK, 2, high, low, ..] = *bytes
        && let Some(packet_id) = PacketId::new(u16::from_be_bytes([high, low]))
        && max_packet_size >= 4
    {
        return Ok(Some((Packet::Puback(Ack::new(packet_id, ReasonCode::Success)), 4)));
    }
    let Some((header, total)) = frame(bytes, version, max_packet_size)? else { return Ok(None) };
    let Some(body) = bytes.get(header..total) else { return Ok(None) };
    Ok(Some((packet(bytes[0], body, version)?, total)))
}

/// The length of the packet at the front of `bytes` once its fixed header is there, to make room for it.
///
/// # Errors
/// As [`decode`].
pub fn packet_length(bytes: &[u8], version: Version, max_packet_size: u32) -> Result<Option<usize>, ProtocolError> {
    Ok(frame(bytes, version, max_packet_size)?.map(|(_, total)| total))
}

/// The version that the CONNECT at the front of `bytes` asks for, even if the rest of it is malformed, so that it can
/// be refused in its own words.
pub fn connect_version(bytes: &[u8]) -> Option<Version> {
    if bytes.first()? >> 4 != CONNECT {
        return None;
    }
    let (_, length) = wire::variable(bytes.get(1..)?).ok()??;
    let mut reader = Reader(bytes.get(1 + length..)?);
    reader.binary().ok()?;
    match reader.u8().ok()? & 0x7F {
        3 => Some(Version::V3_1),
        4 => Some(Version::V3_1_1),
        5.. => Some(Version::V5),
        _ => Some(Version::V3_1_1),
    }
}

/// Header length and total length.
#[inline]
fn frame(bytes: &[u8], version: Version, max_packet_size: u32) -> Result<Option<(usize, usize)>, ProtocolError> {
    let Some(rest) = bytes.get(1..) else { return Ok(None) };
    let Some((remaining, length)) = wire::variable(rest)? else { return Ok(None) };
    // 3.1.1 does not demand the shortest form, and some small clients pad to have a header of fixed size.
    if length > wire::variable_length(remaining) && version.is_5() {
        return Err(ProtocolError::malformed("a remaining length is longer than it needs to be"));
    }
    let header = 1 + length;
    let total = header + remaining as usize;
    if total > max_packet_size as usize {
        return Err(ProtocolError::with(ReasonCode::PacketTooLarge, "a packet is larger than allowed"));
    }
    Ok(Some((header, total)))
}

const CONNECT: u8 = 1;
/// The first byte of a PUBACK.
const PUBACK: u8 = 0x40;
const TRAILING: ProtocolError = ProtocolError::malformed("a packet is longer than its content");
const BAD_FLAGS: ProtocolError = ProtocolError::malformed("the flags of a fixed header are not those of its packet");

#[inline]
fn packet(first: u8, body: &[u8], version: Version) -> Result<Packet<'_>, ProtocolError> {
    let kind = first >> 4;
    let flags = first & 0x0F;
    let mut reader = Reader(body);
    let from = &mut reader;
    if kind == 3 {
        return Ok(Packet::Publish(publish(flags, from, version)?));
    }
    // [MQTT-2.1.3-1]; a 3.1 client may set DUP on what it sends again (MQTT V3.1 §2.1).
    let expected = if matches!(kind, 6 | 8 | 10) { 0b0010 } else { 0 };
    let ignored = if version == Version::V3_1 { 0b1000 } else { 0 };
    if flags & !ignored != expected {
        return Err(BAD_FLAGS);
    }
    let packet = match kind {
        CONNECT => Packet::Connect(Box::new(connect(from)?)),
        2 => Packet::Connack(connack(from, version)?),
        4 => Packet::Puback(ack(from, version, PUBACK_REASONS)?),
        5 => Packet::Pubrec(ack(from, version, PUBACK_REASONS)?),
        6 => Packet::Pubrel(ack(from, version, PUBREL_REASONS)?),
        7 => Packet::Pubcomp(ack(from, version, PUBREL_REASONS)?),
        8 => Packet::Subscribe(subscribe(from, version)?),
        9 => {
            let (packet_id, properties, reasons) = suback(from, version, SUBACK_REASONS)?;
            Packet::Suback(Suback { packet_id, properties, reasons })
        }
        10 => Packet::Unsubscribe(unsubscribe(from, version)?),
        11 if version.is_5() => {
            let (packet_id, properties, reasons) = suback(from, version, UNSUBACK_REASONS)?;
            Packet::Unsuback(Unsuback { packet_id, properties, reasons })
        }
        11 => {
            let packet_id = packet_id(from)?;
            Packet::Unsuback(Unsuback { packet_id, properties: PropertyList::EMPTY, reasons: &[] })
        }
        12 => Packet::Pingreq,
        13 => Packet::Pingresp,
        14 => {
            let (reason, properties) = ending(from, version, place::DISCONNECT, DISCONNECT_REASONS)?;
            Packet::Disconnect(Disconnect { reason, properties })
        }
        15 if version.is_5() => {
            let (reason, properties) = ending(from, version, place::AUTH, AUTH_REASONS)?;
            Packet::Auth(Auth { reason, properties })
        }
        _ => return Err(ProtocolError::malformed("a packet type is reserved")),
    };
    if !from.is_empty() {
        return Err(TRAILING);
    }
    Ok(packet)
}

/// MQTT 5.0 §3.3.
#[inline]
fn publish<'a>(flags: u8, from: &mut Reader<'a>, version: Version) -> Result<Publish<'a>, ProtocolError> {
    let level = flags >> 1 & 0b11;
    // [MQTT-3.3.1-4]
    let qos = QoS::from_level(level).ok_or(ProtocolError::malformed("a PUBLISH has QoS 3"))?;
    let dup = flags & 0b1000 != 0;
    // [MQTT-3.3.1-2]
    if dup && qos == QoS::AtMostOnce && version != Version::V3_1 {
        return Err(ProtocolError::malformed("a PUBLISH of QoS 0 has its DUP flag set"));
    }
    let topic = str::from_utf8(from.binary()?)
        .map_err(|_| ProtocolError::malformed("a topic name is not well-formed UTF-8"))?;
    // [MQTT-1.5.4-2] and [MQTT-3.3.2-2] in one pass.
    if topic.bytes().any(|byte| matches!(byte, 0 | b'+' | b'#')) {
        let reason =
            if topic.as_bytes().contains(&0) { ReasonCode::MalformedPacket } else { ReasonCode::TopicNameInvalid };
        return Err(ProtocolError::with(reason, "a PUBLISH has a topic name with a wildcard or U+0000"));
    }
    let packet_id = if qos == QoS::AtMostOnce { None } else { Some(packet_id(from)?) };
    let properties = if version.is_5() { PropertyList::decode(from, place::PUBLISH)? } else { PropertyList::EMPTY };
    if topic.is_empty() {
        let alias = |property| matches!(property, Property::TopicAlias(_));
        if !properties.iter().any(alias) {
            return Err(ProtocolError::protocol("a PUBLISH has neither a topic name nor a topic alias"));
        }
    }
    Ok(Publish { dup, qos, retain: flags & 1 != 0, topic, packet_id, properties, payload: from.rest() })
}

/// MQTT 5.0 §3.1.
fn connect<'a>(from: &mut Reader<'a>) -> Result<Connect<'a>, ProtocolError> {
    let unsupported = |what| ProtocolError::with(ReasonCode::UnsupportedProtocolVersion, what);
    let name = from.binary()?;
    let level = from.u8()?;
    let (version, is_bridge) = match (name, level) {
        (b"MQIsdp", 3) => (Version::V3_1, false),
        (b"MQIsdp", 0x83) => (Version::V3_1, true),
        (b"MQTT", 4) => (Version::V3_1_1, false),
        (b"MQTT", 0x84) => (Version::V3_1_1, true),
        (b"MQTT", 5) => (Version::V5, false),
        (b"MQTT" | b"MQIsdp", _) => return Err(unsupported("a CONNECT asks for an unknown protocol level")),
        _ => return Err(ProtocolError::malformed("a CONNECT has an unknown protocol name")),
    };
    let flags = from.u8()?;
    let has = |bit: u8| flags & (1 << bit) != 0;
    // [MQTT-3.1.2-3]
    if has(0) && version != Version::V3_1 {
        return Err(ProtocolError::malformed("a CONNECT has its reserved flag set"));
    }
    // [MQTT-3.1.2-11] to [MQTT-3.1.2-15]
    let will_qos = QoS::from_level(flags >> 3 & 0b11).ok_or(ProtocolError::malformed("a will has QoS 3"))?;
    if !has(2) && flags & 0b0011_1000 != 0 {
        return Err(ProtocolError::malformed("a CONNECT without a will has flags of a will"));
    }
    // MQTT 3.1.1 [MQTT-3.1.2-22]; 5.0 allows a password alone.
    if has(6) && !has(7) && !version.is_5() {
        return Err(ProtocolError::malformed("a CONNECT has a password but no user name"));
    }
    let keep_alive = from.u16()?;
    let properties = if version.is_5() { PropertyList::decode(from, place::CONNECT)? } else { PropertyList::EMPTY };
    let client_id = from.string()?;
    let will = if has(2) { Some(last_will(from, version, will_qos, has(5))?) } else { None };
    // In 3.1 the length of the packet counts for more than these two flags (MQTT V3.1 §3.1).
    let present = |bit, from: &Reader<'_>| has(bit) && !(version == Version::V3_1 && from.is_empty());
    let user_name = if present(7, from) { Some(from.string()?) } else { None };
    let password = if present(6, from) { Some(from.binary()?) } else { None };
    Ok(Connect {
        version,
        is_bridge,
        clean_start: has(1),
        keep_alive,
        properties,
        client_id,
        will,
        user_name,
        password,
    })
}

fn last_will<'a>(
    from: &mut Reader<'a>,
    version: Version,
    qos: QoS,
    retain: bool,
) -> Result<LastWill<'a>, ProtocolError> {
    let properties = if version.is_5() { PropertyList::decode(from, place::WILL)? } else { PropertyList::EMPTY };
    let topic = from.string()?;
    TopicName::check(topic)
        .map_err(|_| ProtocolError::with(ReasonCode::TopicNameInvalid, "a will's topic is not a valid topic name"))?;
    Ok(LastWill { qos, retain, properties, topic, payload: from.binary()? })
}

/// MQTT 5.0 §3.2.
fn connack<'a>(from: &mut Reader<'a>, version: Version) -> Result<Connack<'a>, ProtocolError> {
    let flags = from.u8()?;
    // 3.1 has no flags here: its byte is reserved and unused.
    if flags > 1 && version != Version::V3_1 {
        return Err(ProtocolError::malformed("a CONNACK has a reserved flag set"));
    }
    let reason = ReasonCode::from_connack_value(from.u8()?, version)
        .ok_or(ProtocolError::protocol("a CONNACK has an unknown reason code"))?;
    let properties = if version.is_5() { PropertyList::decode(from, place::CONNACK)? } else { PropertyList::EMPTY };
    Ok(Connack { session_present: flags == 1, reason, properties })
}

/// MQTT 5.0 §3.4 to §3.7.
#[inline]
fn ack<'a>(from: &mut Reader<'a>, version: Version, allowed: &[u8]) -> Result<Ack<'a>, ProtocolError> {
    let packet_id = packet_id(from)?;
    if from.is_empty() {
        return Ok(Ack::new(packet_id, ReasonCode::Success));
    }
    if !version.is_5() {
        return Err(TRAILING);
    }
    let reason = reason(from, allowed)?;
    // The property length may be left out when there is nothing behind the reason code (§3.4.2.2.1).
    let properties = if from.is_empty() { PropertyList::EMPTY } else { PropertyList::decode(from, place::ACK)? };
    Ok(Ack { packet_id, reason, properties })
}

/// MQTT 5.0 §3.8.
fn subscribe<'a>(from: &mut Reader<'a>, version: Version) -> Result<Subscribe<'a>, ProtocolError> {
    let packet_id = packet_id(from)?;
    let properties = if version.is_5() { PropertyList::decode(from, place::SUBSCRIBE)? } else { PropertyList::EMPTY };
    let entries = from.rest();
    // [MQTT-3.8.3-2]
    if entries.is_empty() {
        return Err(ProtocolError::protocol("a SUBSCRIBE has no topic filter"));
    }
    // In 3.1 the upper bits are not used, whatever they are (MQTT V3.1 §3.8).
    let meant = if version == Version::V3_1 { 0b11 } else { u8::MAX };
    let mut walk = Reader(entries);
    while !walk.is_empty() {
        let filter = walk.string()?;
        let byte = walk.u8()?;
        // [MQTT-3.8.3-5]; MQTT 3.1.1 [MQTT-3-8.3-4]
        let reserved = if version.is_5() { 0b1100_0000 } else { 0b1111_1100 };
        if byte & meant & reserved != 0 {
            return Err(ProtocolError::malformed("a subscription has a reserved option set"));
        }
        let byte = byte & meant;
        if byte & 0b11 == 3 {
            return Err(ProtocolError::malformed("a subscription asks for QoS 3"));
        }
        let options = SubscriptionOptions::from_byte(byte)
            .ok_or(ProtocolError::protocol("a subscription has retain handling 3"))?;
        // [MQTT-3.8.3-4]
        if options.no_local && filter.starts_with("$share/") {
            return Err(ProtocolError::protocol("a shared subscription has No Local set"));
        }
    }
    Ok(Subscribe { packet_id, properties, subscriptions: Subscriptions::Checked(entries, meant) })
}

/// MQTT 5.0 §3.9 and §3.11.
fn suback<'a>(
    from: &mut Reader<'a>,
    version: Version,
    allowed: &[u8],
) -> Result<(PacketId, PropertyList<'a>, &'a [u8]), ProtocolError> {
    let packet_id = packet_id(from)?;
    let properties = if version.is_5() { PropertyList::decode(from, place::SUBACK)? } else { PropertyList::EMPTY };
    let reasons = from.rest();
    if reasons.is_empty() || !reasons.iter().all(|reason| allowed.contains(reason)) {
        return Err(ProtocolError::protocol("a SUBACK or UNSUBACK has no or an unknown reason code"));
    }
    Ok((packet_id, properties, reasons))
}

/// MQTT 5.0 §3.10.
fn unsubscribe<'a>(from: &mut Reader<'a>, version: Version) -> Result<Unsubscribe<'a>, ProtocolError> {
    let packet_id = packet_id(from)?;
    let properties = if version.is_5() { PropertyList::decode(from, place::UNSUBSCRIBE)? } else { PropertyList::EMPTY };
    let filters = from.rest();
    // [MQTT-3.10.3-2]
    if filters.is_empty() {
        return Err(ProtocolError::protocol("an UNSUBSCRIBE has no topic filter"));
    }
    let mut walk = Reader(filters);
    while !walk.is_empty() {
        walk.string()?;
    }
    Ok(Unsubscribe { packet_id, properties, filters: Filters::Checked(filters) })
}

/// DISCONNECT and AUTH: all of it may be left out (MQTT 5.0 §3.14.2.1, §3.15.2.1).
fn ending<'a>(
    from: &mut Reader<'a>,
    version: Version,
    place: u16,
    allowed: &[u8],
) -> Result<(ReasonCode, PropertyList<'a>), ProtocolError> {
    if from.is_empty() || !version.is_5() {
        return Ok((ReasonCode::Success, PropertyList::EMPTY));
    }
    let reason = reason(from, allowed)?;
    let properties = if from.is_empty() { PropertyList::EMPTY } else { PropertyList::decode(from, place)? };
    Ok((reason, properties))
}

/// [MQTT-2.2.1-3], [MQTT-2.2.1-4]
#[inline]
fn packet_id(from: &mut Reader<'_>) -> Result<PacketId, ProtocolError> {
    PacketId::new(from.u16()?).ok_or(ProtocolError::malformed("a packet identifier is zero"))
}

fn reason(from: &mut Reader<'_>, allowed: &[u8]) -> Result<ReasonCode, ProtocolError> {
    let value = from.u8()?;
    let reason = ReasonCode::from_value(value).filter(|_| allowed.contains(&value));
    reason.ok_or(ProtocolError::protocol("a reason code is not one of its packet"))
}

/// The reason codes each packet can hold, from the tables of MQTT 5.0 §3.
const PUBACK_REASONS: &[u8] = &[0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
const PUBREL_REASONS: &[u8] = &[0x00, 0x92];
/// 0x00 to 0x02 and 0x80 are also the return codes of 3.1.1.
const SUBACK_REASONS: &[u8] = &[0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2];
const UNSUBACK_REASONS: &[u8] = &[0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91];
const AUTH_REASONS: &[u8] = &[0x00, 0x18, 0x19];
const DISCONNECT_REASONS: &[u8] = &[
    0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x8F, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98,
    0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x9F, 0xA0, 0xA1, 0xA2,
];
