//! An application message and its quality of service, free of any wire format (MQTT 5.0 §3.3, §4.3).
//!
//! A [`Message`] is made once, when it is accepted, and shared behind an `Arc` by everything that must get it. What
//! differs between receivers (granted QoS, retain flag, packet identifier) is not in here but in `hub::Delivery`.

use std::time::Duration;

use bytes::Bytes;

use crate::clock::{RELEASED, UnixMillis};
use crate::topic::TopicName;

/// How hard a message is tried to be delivered (MQTT 5.0 §4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum QoS {
    #[default]
    AtMostOnce = 0,
    AtLeastOnce = 1,
    ExactlyOnce = 2,
}

impl QoS {
    /// The QoS with the number `level`, for 0 to 2.
    pub fn from_level(level: u8) -> Option<Self> {
        match level {
            0 => Some(Self::AtMostOnce),
            1 => Some(Self::AtLeastOnce),
            2 => Some(Self::ExactlyOnce),
            _ => None,
        }
    }

    pub fn level(self) -> u8 {
        self as u8
    }
}

/// An application message as its publisher sent it.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub topic: TopicName,
    pub payload: Bytes,
    /// As published; a receiver gets the lower of this and what it was granted.
    pub qos: QoS,
    /// As published: replace the topic's retained message.
    pub retain: bool,
    /// What MQTT 5.0 passes on beside the payload; `None` where all of it is absent.
    pub properties: Option<Box<Properties>>,
    /// How long after `accepted_at` the message is still worth delivering.
    pub expiry_interval: Option<Duration>,
    pub accepted_at: UnixMillis,
}

impl Message {
    /// A message with no properties and no expiry.
    pub fn new(topic: TopicName, payload: impl Into<Bytes>, qos: QoS, accepted_at: UnixMillis) -> Self {
        Self {
            topic,
            payload: payload.into(),
            qos,
            retain: false,
            properties: None,
            expiry_interval: None,
            accepted_at,
        }
    }

    /// The same message, retained.
    #[must_use]
    pub fn retained(mut self) -> Self {
        self.retain = true;
        self
    }

    /// The time left until the message expires: `None` if it never does, zero once it has (MQTT 5.0 §3.3.2.3.3).
    pub fn remaining_expiry(&self, now: UnixMillis) -> Option<Duration> {
        self.expiry_interval.map(|interval| interval.saturating_sub(self.age(now)))
    }

    /// How long ago the message was accepted; zero where the clock was set for the first time in between, and nobody
    /// knows.
    pub fn age(&self, now: UnixMillis) -> Duration {
        if self.accepted_at < RELEASED && now >= RELEASED { Duration::ZERO } else { now.since(self.accepted_at) }
    }

    /// When it expires, if ever.
    pub fn expires_at(&self) -> Option<UnixMillis> {
        self.expiry_interval.map(|interval| self.accepted_at.plus(interval))
    }

    pub fn is_expired(&self, now: UnixMillis) -> bool {
        self.remaining_expiry(now).is_some_and(|left| left.is_zero())
    }

    /// What a queue counts against its byte limit: topic, payload and properties, in bytes.
    pub fn size(&self) -> usize {
        let properties = self.properties.as_ref().map_or(0, |properties| properties.size());
        self.topic.as_str().len() + self.payload.len() + properties
    }
}

/// The properties of a PUBLISH that a server passes on unaltered (MQTT 5.0 §3.3.2.3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties {
    /// Payload format indicator: whether the publisher calls the payload UTF-8 text, if it says anything about it.
    pub payload_is_utf8: Option<bool>,
    pub content_type: Option<Box<str>>,
    pub response_topic: Option<TopicName>,
    pub correlation_data: Option<Bytes>,
    /// In the order of the packet; the same name may appear more than once.
    pub user_properties: Vec<(Box<str>, Box<str>)>,
}

impl Properties {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Writes a user property, in place of those of the same name.
    pub fn set_user(&mut self, name: &str, value: &str) {
        self.user_properties.retain(|(found, _)| **found != *name);
        self.user_properties.push((name.into(), value.into()));
    }

    /// Bytes of text and data held, for limits.
    pub fn size(&self) -> usize {
        let text = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len());
        text(&self.content_type)
            + self.response_topic.as_ref().map_or(0, |topic| topic.as_str().len())
            + self.correlation_data.as_ref().map_or(0, Bytes::len)
            + self.user_properties.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A million retained messages are to stay below 400 MB: each is one of these, its topic and payload, and a place in
    /// a tree.
    #[test]
    fn a_message_is_small() {
        assert!(size_of::<Message>() <= 88, "{} bytes", size_of::<Message>());
    }

    #[test]
    fn expiry_counts_from_acceptance_and_ignores_a_clock_set_back() {
        let topic = TopicName::new("a").unwrap();
        let mut message = Message::new(topic, "x", QoS::AtLeastOnce, UnixMillis(10_000));
        assert_eq!(message.remaining_expiry(UnixMillis(99_000)), None);
        message.expiry_interval = Some(Duration::from_secs(5));
        let check = |now: i64, left: u64| {
            assert_eq!(message.remaining_expiry(UnixMillis(now)), Some(Duration::from_millis(left)), "{now}");
        };
        check(10_000, 5000);
        check(9_000, 5000);
        check(12_500, 2500);
        check(15_000, 0);
        assert!(message.is_expired(UnixMillis(15_000)));
        assert!(!message.is_expired(UnixMillis(14_999)));
        assert_eq!(message.expires_at(), Some(UnixMillis(15_000)));
        // Accepted before the clock was set: how old it is cannot be said.
        check(RELEASED.0 + 60_000, 5000);
    }
}
