//! How a message stands in a row: column values to a [`Message`] and back.
//!
//! Three columns beside topic and payload: `flags`, `accepted_at` in Unix milliseconds, and `extra` for what most
//! messages do not have (NULL then): one byte that says what follows, then in this order the expiry interval in
//! milliseconds (u64), the subscription identifiers (u16 count, u32 each), and the properties to the end, as
//! `proto::mqtt` encodes them. All little-endian.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use crate::clock::UnixMillis;
use crate::message::{Message, QoS};
use crate::proto::mqtt::{decode_properties, encode_properties};
use crate::topic::TopicName;

/// Bits 0 and 1: the QoS granted to the receiver.
const GRANTED: i64 = 0b11;
/// The retain flag that the receiver gets.
const RETAIN: i64 = 1 << 2;
/// The row is released: it has no content.
pub(super) const RELEASED: i64 = 1 << 3;
/// Bits 4 and 5: the QoS of the message as published.
const PUBLISHED_SHIFT: u32 = 4;
/// The retain flag of the message as published.
const PUBLISHED_RETAIN: i64 = 1 << 6;

const HAS_EXPIRY: u8 = 1;
const HAS_IDENTIFIERS: u8 = 1 << 1;
const HAS_PROPERTIES: u8 = 1 << 2;

/// The most subscription identifiers that are kept with one message; one for each subscription that matched.
const MAX_IDENTIFIERS: usize = u16::MAX as usize;

/// What differs between the receivers of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Grant {
    pub qos: QoS,
    pub retain: bool,
    pub identifiers: Option<Arc<[u32]>>,
}

/// A row that does not hold what this program writes: the database was damaged or changed by other hands.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the stored message has an invalid {0}")]
pub(super) struct Malformed(pub &'static str);

/// The `flags` column of a message for a receiver.
pub(super) fn encode_flags(message: &Message, qos: QoS, retain: bool) -> i64 {
    i64::from(qos.level())
        | if retain { RETAIN } else { 0 }
        | i64::from(message.qos.level()) << PUBLISHED_SHIFT
        | if message.retain { PUBLISHED_RETAIN } else { 0 }
}

/// The `extra` column; `None` where all of it is absent.
pub(super) fn encode_extra(message: &Message, identifiers: Option<&[u32]>) -> Option<Vec<u8>> {
    let identifiers = identifiers.map(|all| &all[..all.len().min(MAX_IDENTIFIERS)]).filter(|all| !all.is_empty());
    let properties = message.properties.as_deref().filter(|properties| !properties.is_empty());
    if message.expiry_interval.is_none() && identifiers.is_none() && properties.is_none() {
        return None;
    }
    let mut extra = vec![0];
    if let Some(interval) = message.expiry_interval {
        extra[0] |= HAS_EXPIRY;
        extra.extend(u64::try_from(interval.as_millis()).unwrap_or(u64::MAX).to_le_bytes());
    }
    if let Some(identifiers) = identifiers {
        extra[0] |= HAS_IDENTIFIERS;
        extra.extend(u16::try_from(identifiers.len()).unwrap_or(u16::MAX).to_le_bytes());
        identifiers.iter().for_each(|identifier| extra.extend(identifier.to_le_bytes()));
    }
    // Properties that no PUBLISH could carry cannot have come from one; the message goes without them.
    if properties.is_some_and(|properties| encode_properties(properties, &mut extra).is_ok()) {
        extra[0] |= HAS_PROPERTIES;
    }
    Some(extra)
}

/// The receiver's part of `flags` and `extra`, and whether the row is released.
pub(super) fn decode_grant(flags: i64, extra: Option<&[u8]>) -> Result<(Grant, bool), Malformed> {
    let qos = u8::try_from(flags & GRANTED).ok().and_then(QoS::from_level).ok_or(Malformed("QoS"))?;
    let identifiers = decode_extra(extra)?.identifiers;
    Ok((Grant { qos, retain: flags & RETAIN != 0, identifiers }, flags & RELEASED != 0))
}

/// The message of a row.
pub(super) fn decode_message(
    topic: TopicName,
    payload: &[u8],
    flags: i64,
    accepted_at: i64,
    extra: Option<&[u8]>,
) -> Result<Message, Malformed> {
    let level = u8::try_from(flags >> PUBLISHED_SHIFT & GRANTED).unwrap_or(u8::MAX);
    let extra = decode_extra(extra)?;
    let properties =
        extra.properties.map(decode_properties).transpose().map_err(|_| Malformed("list of properties"))?;
    Ok(Message {
        topic,
        payload: Bytes::copy_from_slice(payload),
        qos: QoS::from_level(level).ok_or(Malformed("published QoS"))?,
        retain: flags & PUBLISHED_RETAIN != 0,
        properties: properties.map(Box::new),
        expiry_interval: extra.expiry_interval,
        accepted_at: UnixMillis(accepted_at),
    })
}

/// What [`crate::message::Properties::size`] gave before the message was stored.
pub(super) fn properties_size(extra: Option<&[u8]>) -> usize {
    let properties = decode_extra(extra).ok().and_then(|extra| decode_properties(extra.properties?).ok());
    properties.map_or(0, |properties| properties.size())
}

#[derive(Default)]
struct Extra<'a> {
    expiry_interval: Option<Duration>,
    identifiers: Option<Arc<[u32]>>,
    properties: Option<&'a [u8]>,
}

fn decode_extra(extra: Option<&[u8]>) -> Result<Extra<'_>, Malformed> {
    const TOO_SHORT: Malformed = Malformed("length");
    let mut decoded = Extra::default();
    let Some((&present, mut rest)) = extra.and_then(<[u8]>::split_first) else { return Ok(decoded) };
    if present & HAS_EXPIRY != 0 {
        let (millis, after) = rest.split_first_chunk().ok_or(TOO_SHORT)?;
        decoded.expiry_interval = Some(Duration::from_millis(u64::from_le_bytes(*millis)));
        rest = after;
    }
    if present & HAS_IDENTIFIERS != 0 {
        let (count, after) = rest.split_first_chunk().ok_or(TOO_SHORT)?;
        let (identifiers, after) =
            after.split_at_checked(4 * usize::from(u16::from_le_bytes(*count))).ok_or(TOO_SHORT)?;
        decoded.identifiers = Some(identifiers.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect());
        rest = after;
    }
    decoded.properties = (present & HAS_PROPERTIES != 0).then_some(rest);
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Properties;

    fn message() -> Message {
        Message::new(TopicName::new("a/b").unwrap(), "payload", QoS::ExactlyOnce, UnixMillis(1_793_491_200_000))
    }

    fn check(message: &Message, grant: &Grant) {
        let flags = encode_flags(message, grant.qos, grant.retain);
        let extra = encode_extra(message, grant.identifiers.as_deref());
        let extra = extra.as_deref();
        assert_eq!(decode_grant(flags, extra).unwrap(), (grant.clone(), false));
        let topic = message.topic.clone();
        let decoded = decode_message(topic, &message.payload, flags, message.accepted_at.0, extra).unwrap();
        assert_eq!(decoded, *message);
        assert_eq!(properties_size(extra), message.properties.as_ref().map_or(0, |properties| properties.size()));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let plain = Grant { qos: QoS::AtLeastOnce, ..Grant::default() };
        check(&message(), &plain);
        assert_eq!(encode_extra(&message(), None), None);
        let mut rich = message().retained();
        rich.expiry_interval = Some(Duration::from_millis(1500));
        check(&rich, &plain);
        let identified = Grant { retain: true, identifiers: Some([1, 268_435_455].into()), ..plain };
        check(&rich, &identified);
        rich.properties = Some(Box::new(Properties {
            payload_is_utf8: Some(true),
            correlation_data: Some(Bytes::from_static(b"\0\x01")),
            user_properties: vec![("a".into(), "b".into()), ("a".into(), "".into())],
            ..Properties::default()
        }));
        check(&rich, &identified);
    }

    #[test]
    fn damaged_columns_are_refused() {
        let check = |flags: i64, extra: &[u8], expected: &str| {
            let grant = decode_grant(flags, Some(extra)).map(|_| ());
            let decoded = decode_message(TopicName::new("a").unwrap(), b"", flags, 0, Some(extra)).map(|_| ());
            assert_eq!(grant.and(decoded).unwrap_err(), Malformed(Box::leak(expected.into())));
        };
        check(3, &[], "QoS");
        check(0x30, &[], "published QoS");
        check(0, &[1, 0], "length");
        check(0, &[2, 9, 0, 1], "length");
        check(0, &[4, 0xff, 0xff], "list of properties");
    }
}
