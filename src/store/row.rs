//! How a message is written beside its topic: `flags` and `extra`, and back to a [`Message`].
//!
//! `flags` is one byte. `extra` is for what most messages do not have: one byte that says what follows, then in this
//! order the expiry interval in milliseconds (u64), the subscription identifiers (u16 count, u32 each), the shared
//! subscription (u16 length, text), and the properties to the end, as `proto::mqtt` encodes them. All little-endian.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use crc32c::crc32c_append;
use thiserror::Error;

use crate::clock::UnixMillis;
use crate::message::{Message, Properties, QoS};
use crate::proto::mqtt::{decode_properties, encode_properties};
use crate::topic::{SharedFilter, TopicName};

/// Bits 0 and 1: the QoS granted to the receiver.
const GRANTED: u8 = 0b11;
/// The retain flag that the receiver gets.
const RETAIN: u8 = 1 << 2;
/// In a run: `extra` follows.
pub(super) const HAS_EXTRA: u8 = 1 << 3;
/// Bits 4 and 5: the QoS of the message as published.
const PUBLISHED_SHIFT: u32 = 4;
/// The retain flag of the message as published.
const PUBLISHED_RETAIN: u8 = 1 << 6;
/// In a run: the topic stands there as text, not as a number.
pub(super) const TOPIC_IS_TEXT: u8 = 1 << 7;

const HAS_EXPIRY: u8 = 1;
const HAS_IDENTIFIERS: u8 = 1 << 1;
const HAS_PROPERTIES: u8 = 1 << 2;
const HAS_SHARED: u8 = 1 << 3;

/// The most subscription identifiers that are kept with one message; one for each subscription that matched.
const MAX_IDENTIFIERS: usize = u16::MAX as usize;

/// What differs between the receivers of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Grant {
    pub qos: QoS,
    pub retain: bool,
    pub identifiers: Option<Arc<[u32]>>,
    pub shared: Option<Arc<SharedFilter>>,
}

/// A row that does not hold what this program writes: the database was damaged or changed by other hands.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the stored message has an invalid {0}")]
pub(super) struct Malformed(pub &'static str);

/// A stored message without its topic.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content<'a> {
    pub payload: &'a [u8],
    pub flags: u8,
    pub accepted_at: i64,
    pub extra: Option<&'a [u8]>,
}

impl Content<'_> {
    /// What it is for its receiver.
    pub fn grant(&self) -> Result<Grant, Malformed> {
        let qos = self.granted_qos()?;
        let Extra { identifiers, shared, .. } = decode_extra(self.extra)?;
        Ok(Grant { qos, retain: self.flags & RETAIN != 0, identifiers, shared })
    }

    /// Whether a message can be made of it.
    pub fn check_form(&self) -> Result<(), Malformed> {
        self.granted_qos()?;
        self.published_qos()?;
        if self.extra.is_some() {
            decode_extra(self.extra)?.properties()?;
        }
        Ok(())
    }

    fn granted_qos(&self) -> Result<QoS, Malformed> {
        QoS::from_level(self.flags & GRANTED).ok_or(Malformed("QoS"))
    }

    fn published_qos(&self) -> Result<QoS, Malformed> {
        QoS::from_level(self.flags >> PUBLISHED_SHIFT & GRANTED).ok_or(Malformed("published QoS"))
    }

    /// The check of a message whose row stands alone.
    pub fn check(&self, topic: &[u8]) -> i64 {
        let extra = self.extra.unwrap_or_default();
        row_check(&[topic, self.payload, &[self.flags], &self.accepted_at.to_le_bytes(), extra])
    }

    pub fn expiry_interval(&self) -> Option<Duration> {
        decode_extra(self.extra).ok()?.expiry_interval
    }

    pub fn message(&self, topic: TopicName) -> Result<Message, Malformed> {
        self.message_with(topic, Bytes::copy_from_slice(self.payload))
    }

    /// The same, where `payload` is at hand already.
    pub fn message_with(&self, topic: TopicName, payload: Bytes) -> Result<Message, Malformed> {
        let extra = decode_extra(self.extra)?;
        Ok(Message {
            topic,
            payload,
            qos: self.published_qos()?,
            retain: self.flags & PUBLISHED_RETAIN != 0,
            properties: extra.properties()?.map(Box::new),
            expiry_interval: extra.expiry_interval,
            accepted_at: UnixMillis(self.accepted_at),
        })
    }
}

/// The `flags` of a message for a receiver.
pub(super) fn encode_flags(message: &Message, qos: QoS, retain: bool) -> u8 {
    qos.level()
        | if retain { RETAIN } else { 0 }
        | message.qos.level() << PUBLISHED_SHIFT
        | if message.retain { PUBLISHED_RETAIN } else { 0 }
}

/// The `extra` of a message; `None` where all of it is absent.
pub(super) fn encode_extra(
    message: &Message,
    identifiers: Option<&[u32]>,
    shared: Option<&SharedFilter>,
) -> Option<Vec<u8>> {
    let identifiers = identifiers.map(|all| &all[..all.len().min(MAX_IDENTIFIERS)]).filter(|all| !all.is_empty());
    let properties = message.properties.as_deref().filter(|properties| !properties.is_empty());
    if message.expiry_interval.is_none() && identifiers.is_none() && shared.is_none() && properties.is_none() {
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
    // A filter longer than a SUBSCRIBE can carry cannot have come from one.
    if let Some(text) = shared.map(SharedFilter::to_text)
        && let Ok(length) = u16::try_from(text.len())
    {
        extra[0] |= HAS_SHARED;
        extra.extend(length.to_le_bytes());
        extra.extend(text.as_bytes());
    }
    // Properties that no PUBLISH could carry cannot have come from one; the message goes without them.
    if properties.is_some_and(|properties| encode_properties(properties, &mut extra).is_ok()) {
        extra[0] |= HAS_PROPERTIES;
    }
    Some(extra)
}

/// The check of a row; a length goes before each field, so that no byte can move between two.
pub(super) fn row_check(fields: &[&[u8]]) -> i64 {
    let mut sum = 0;
    for field in fields {
        sum = crc32c_append(sum, &(field.len() as u64).to_le_bytes());
        sum = crc32c_append(sum, field);
    }
    i64::from(sum)
}

pub(super) fn parse_topic(text: &[u8]) -> Result<TopicName, Malformed> {
    let text = std::str::from_utf8(text).map_err(|_| Malformed("topic"))?;
    TopicName::new(text).map_err(|_| Malformed("topic"))
}

/// What [`crate::message::Properties::size`] gave before the message was stored.
pub(super) fn properties_size(extra: Option<&[u8]>) -> usize {
    if extra.is_none() {
        return 0;
    }
    let properties = decode_extra(extra).ok().and_then(|extra| decode_properties(extra.properties?).ok());
    properties.map_or(0, |properties| properties.size())
}

#[derive(Default)]
struct Extra<'a> {
    expiry_interval: Option<Duration>,
    identifiers: Option<Arc<[u32]>>,
    shared: Option<Arc<SharedFilter>>,
    properties: Option<&'a [u8]>,
}

impl Extra<'_> {
    fn properties(&self) -> Result<Option<Properties>, Malformed> {
        self.properties.map(decode_properties).transpose().map_err(|_| Malformed("list of properties"))
    }
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
    if present & HAS_SHARED != 0 {
        let (length, after) = rest.split_first_chunk().ok_or(TOO_SHORT)?;
        let (text, after) = after.split_at_checked(usize::from(u16::from_le_bytes(*length))).ok_or(TOO_SHORT)?;
        let filter = std::str::from_utf8(text).ok().and_then(|text| SharedFilter::split(text).ok());
        decoded.shared = Some(Arc::new(filter.ok_or(Malformed("shared subscription"))?));
        rest = after;
    }
    decoded.properties = (present & HAS_PROPERTIES != 0).then_some(rest);
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Message {
        Message::new(TopicName::new("a/b").unwrap(), "payload", QoS::ExactlyOnce, UnixMillis(1_793_491_200_000))
    }

    fn check(message: &Message, grant: &Grant) {
        let flags = encode_flags(message, grant.qos, grant.retain);
        let extra = encode_extra(message, grant.identifiers.as_deref(), grant.shared.as_deref());
        let extra = extra.as_deref();
        let content = Content { payload: &message.payload, flags, accepted_at: message.accepted_at.0, extra };
        assert_eq!(content.grant().unwrap(), *grant);
        assert_eq!(content.message(message.topic.clone()).unwrap(), *message);
        assert_eq!(properties_size(extra), message.properties.as_ref().map_or(0, |properties| properties.size()));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let plain = Grant { qos: QoS::AtLeastOnce, ..Grant::default() };
        check(&message(), &plain);
        assert_eq!(encode_extra(&message(), None, None), None);
        let mut rich = message().retained();
        rich.expiry_interval = Some(Duration::from_millis(1500));
        check(&rich, &plain);
        let identified = Grant { retain: true, identifiers: Some([1, 268_435_455].into()), ..plain.clone() };
        check(&rich, &identified);
        let shared = Some(Arc::new(SharedFilter::split("$share/g/a/+").unwrap()));
        check(&message(), &Grant { shared: shared.clone(), ..plain });
        let identified = Grant { shared, ..identified };
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
        let check = |flags: u8, extra: &[u8], expected: &str| {
            let content = Content { payload: b"", flags, accepted_at: 0, extra: Some(extra) };
            let grant = content.grant().map(|_| ());
            let decoded = content.message(TopicName::new("a").unwrap()).map(|_| ());
            assert_eq!(grant.and(decoded).unwrap_err(), Malformed(Box::leak(expected.into())));
        };
        check(3, &[], "QoS");
        check(0x30, &[], "published QoS");
        check(0, &[1, 0], "length");
        check(0, &[2, 9, 0, 1], "length");
        check(0, &[4, 0xff, 0xff], "list of properties");
        check(0, &[8, 2, 0, b'a'], "length");
        check(0, &[8, 2, 0, b'a', b'#'], "shared subscription");
    }
}
