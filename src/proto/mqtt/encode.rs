//! From packets to bytes, straight into the output buffer (MQTT 5.0 §3, MQTT 3.1.1 §3).

use std::num::NonZeroU16;
use std::time::Duration;

use thiserror::Error;

use super::packet::{Ack, Connect, Filters, LastWill, Packet, Publish, Subscribe, Subscriptions, Unsubscribe, Version};
use super::property::{Property, PropertyList};
use super::wire::{put_binary, put_string, put_u16, put_variable, put_with_length, variable_length};
use super::{PacketId, ReasonCode};
use crate::message::{Message, Properties, QoS};

/// Why a packet was not written; the output buffer is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EncodeError {
    #[error("a string or binary value is longer than the 65535 bytes MQTT can carry")]
    FieldTooLong,
    #[error("the packet is larger than its receiver accepts")]
    PacketTooLarge,
}

impl Packet<'_> {
    /// Appends the packet to `out`. In 3.x, reason codes and properties that have no place there are left out.
    ///
    /// # Errors
    /// [`EncodeError::PacketTooLarge`] for more than `max_packet_size` bytes.
    pub fn encode(&self, version: Version, max_packet_size: u32, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        let result = self.encode_unchecked(version, out).and_then(|()| {
            let fits = out.len() - start <= max_packet_size as usize;
            if fits { Ok(()) } else { Err(EncodeError::PacketTooLarge) }
        });
        if result.is_err() {
            out.truncate(start);
        }
        result
    }

    fn encode_unchecked(&self, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let properties = |list: &PropertyList<'_>, out: &mut Vec<u8>| {
            if version.is_5() { list.encode(out) } else { Ok(()) }
        };
        match self {
            Self::Connect(packet) => {
                out.push(0x10);
                put_with_length(out, |out| connect(packet, out))
            }
            Self::Connack(packet) => {
                out.push(0x20);
                put_with_length(out, |out| {
                    out.push(packet.session_present.into());
                    out.push(packet.reason.connack_value(version));
                    properties(&packet.properties, out)
                })
            }
            Self::Publish(packet) => publish(packet, version, out),
            Self::Puback(packet) => ack(0x40, packet, version, out),
            Self::Pubrec(packet) => ack(0x50, packet, version, out),
            Self::Pubrel(packet) => ack(0x62, packet, version, out),
            Self::Pubcomp(packet) => ack(0x70, packet, version, out),
            Self::Subscribe(Subscribe { packet_id, properties: list, subscriptions }) => {
                out.push(0x82);
                put_with_length(out, |out| {
                    put_u16(out, packet_id.get());
                    properties(list, out)?;
                    put_subscriptions(subscriptions, version, out)
                })
            }
            Self::Suback(packet) => {
                out.push(0x90);
                put_with_length(out, |out| {
                    put_u16(out, packet.packet_id.get());
                    properties(&packet.properties, out)?;
                    let failure = ReasonCode::UnspecifiedError.value();
                    let wide = version.is_5();
                    out.extend(packet.reasons.iter().map(|&code| if wide { code } else { code.min(failure) }));
                    Ok(())
                })
            }
            Self::Unsubscribe(Unsubscribe { packet_id, properties: list, filters }) => {
                out.push(0xA2);
                put_with_length(out, |out| {
                    put_u16(out, packet_id.get());
                    properties(list, out)?;
                    match *filters {
                        Filters::Checked(bytes) => out.extend_from_slice(bytes),
                        Filters::Given(list) => list.iter().try_for_each(|filter| put_string(out, filter))?,
                    }
                    Ok(())
                })
            }
            Self::Unsuback(packet) => {
                out.push(0xB0);
                put_with_length(out, |out| {
                    put_u16(out, packet.packet_id.get());
                    properties(&packet.properties, out)?;
                    out.extend_from_slice(if version.is_5() { packet.reasons } else { &[] });
                    Ok(())
                })
            }
            Self::Pingreq => {
                out.extend_from_slice(&[0xC0, 0]);
                Ok(())
            }
            Self::Pingresp => {
                out.extend_from_slice(&[0xD0, 0]);
                Ok(())
            }
            Self::Disconnect(packet) => ending(0xE0, packet.reason, &packet.properties, version, out),
            Self::Auth(packet) => ending(0xF0, packet.reason, &packet.properties, version, out),
        }
    }
}

/// A message on its way to one receiver; what [`encode_publish`] writes.
#[derive(Clone, Copy, Debug)]
pub struct PublishHead<'a> {
    /// Empty where `topic_alias` stands for a topic that the receiver already knows.
    pub topic: &'a str,
    pub qos: QoS,
    pub retain: bool,
    pub dup: bool,
    /// Some for QoS 1 and 2.
    pub packet_id: Option<PacketId>,
    pub properties: Option<&'a Properties>,
    /// Of the subscriptions that match (MQTT 5.0 §3.3.2.3.8).
    pub identifiers: &'a [u32],
    /// The time left; sent in whole seconds, rounded up.
    pub expiry: Option<Duration>,
    pub topic_alias: Option<NonZeroU16>,
    pub payload: &'a [u8],
}

impl<'a> PublishHead<'a> {
    /// `message` at `qos`, with nothing that differs between receivers.
    pub fn new(message: &'a Message, qos: QoS) -> Self {
        let properties = message.properties.as_deref();
        Self { qos, properties, ..Self::bare(message.topic.as_str(), &message.payload) }
    }

    /// A message at QoS 0 that says nothing beside its payload.
    pub fn bare(topic: &'a str, payload: &'a [u8]) -> Self {
        Self {
            topic,
            qos: QoS::AtMostOnce,
            retain: false,
            dup: false,
            packet_id: None,
            properties: None,
            identifiers: &[],
            expiry: None,
            topic_alias: None,
            payload,
        }
    }

    /// Length of the properties, without the length itself.
    fn properties_length(&self) -> usize {
        let mut length = 0;
        if let Some(properties) = self.properties {
            length += 2 * usize::from(properties.payload_is_utf8.is_some());
            length += properties.content_type.as_ref().map_or(0, |text| 3 + text.len());
            length += properties.response_topic.as_ref().map_or(0, |topic| 3 + topic.as_str().len());
            length += properties.correlation_data.as_ref().map_or(0, |bytes| 3 + bytes.len());
            length +=
                properties.user_properties.iter().map(|(name, value)| 5 + name.len() + value.len()).sum::<usize>();
        }
        length += 5 * usize::from(self.expiry.is_some()) + 3 * usize::from(self.topic_alias.is_some());
        length + self.identifiers.iter().map(|&id| 1 + variable_length(id)).sum::<usize>()
    }

    fn put_properties(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if let Some(alias) = self.topic_alias {
            Property::TopicAlias(alias).encode(out)?;
        }
        if let Some(left) = self.expiry {
            let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
            Property::MessageExpiryInterval(seconds.try_into().unwrap_or(u32::MAX)).encode(out)?;
        }
        if let Some(properties) = self.properties {
            put_message_properties(properties, out)?;
        }
        for &id in self.identifiers {
            out.push(0x0B);
            put_variable(out, id);
        }
        Ok(())
    }
}

/// The properties that belong to a message, in a fixed order.
pub(super) fn put_message_properties(properties: &Properties, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    if let Some(is_utf8) = properties.payload_is_utf8 {
        Property::PayloadFormatIndicator(is_utf8).encode(out)?;
    }
    if let Some(text) = &properties.content_type {
        Property::ContentType(text).encode(out)?;
    }
    if let Some(topic) = &properties.response_topic {
        Property::ResponseTopic(topic.as_str()).encode(out)?;
    }
    if let Some(bytes) = &properties.correlation_data {
        Property::CorrelationData(bytes).encode(out)?;
    }
    let mut user = properties.user_properties.iter();
    user.try_for_each(|(name, value)| Property::UserProperty(name, value).encode(out))
}

/// Whether [`encode_publish`] wrote the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a payload that was left out must follow the bytes that were written"]
pub enum Body {
    Copied,
    /// Everything before the payload is written; the payload itself must be sent next, from where it is.
    LeftOut,
}

/// Length of the PUBLISH that [`encode_publish`] would make of `publish`, in bytes.
pub fn publish_length(version: Version, publish: &PublishHead<'_>) -> usize {
    let (remaining, _) = remaining_length(version, publish);
    1 + variable_length(u32::try_from(remaining).unwrap_or(u32::MAX)) + remaining
}

/// Appends a PUBLISH to `out`, the payload only if it is shorter than `leave_out_from` bytes.
///
/// # Errors
/// [`EncodeError::PacketTooLarge`] for more than `max_packet_size` bytes, payload included.
pub fn encode_publish(
    version: Version,
    publish: &PublishHead<'_>,
    max_packet_size: u32,
    leave_out_from: usize,
    out: &mut Vec<u8>,
) -> Result<Body, EncodeError> {
    let (remaining, properties) = remaining_length(version, publish);
    let fits = u32::try_from(remaining).ok().filter(|&remaining| {
        1 + variable_length(remaining) + remaining as usize <= max_packet_size.min(super::MAX_PACKET_BYTES) as usize
    });
    let length = fits.ok_or(EncodeError::PacketTooLarge)?;
    let start = out.len();
    let body = if publish.payload.len() < leave_out_from { Body::Copied } else { Body::LeftOut };
    out.reserve(5 + remaining - if body == Body::LeftOut { publish.payload.len() } else { 0 });
    let flags = u8::from(publish.dup) << 3 | publish.qos.level() << 1 | u8::from(publish.retain);
    out.push(0x30 | flags);
    put_variable(out, length);
    let result = put_string(out, publish.topic).and_then(|()| {
        if let Some(packet_id) = publish.packet_id {
            put_u16(out, packet_id.get());
        }
        if version.is_5() {
            put_variable(out, properties as u32);
            if properties > 0 {
                publish.put_properties(out)?;
            }
        }
        Ok(())
    });
    if let Err(error) = result {
        out.truncate(start);
        return Err(error);
    }
    if body == Body::Copied {
        out.extend_from_slice(publish.payload);
    }
    Ok(body)
}

/// Remaining length and property length of a PUBLISH.
#[inline]
fn remaining_length(version: Version, publish: &PublishHead<'_>) -> (usize, usize) {
    let fixed = 2 + publish.topic.len() + 2 * usize::from(publish.packet_id.is_some()) + publish.payload.len();
    if !version.is_5() {
        return (fixed, 0);
    }
    let properties = publish.properties_length();
    (fixed + variable_length(u32::try_from(properties).unwrap_or(u32::MAX)) + properties, properties)
}

fn publish(packet: &Publish<'_>, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    out.push(0x30 | u8::from(packet.dup) << 3 | packet.qos.level() << 1 | u8::from(packet.retain));
    put_with_length(out, |out| {
        put_string(out, packet.topic)?;
        if let Some(packet_id) = packet.packet_id {
            put_u16(out, packet_id.get());
        }
        if version.is_5() {
            packet.properties.encode(out)?;
        }
        out.extend_from_slice(packet.payload);
        Ok(())
    })
}

fn connect(packet: &Connect<'_>, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let version = packet.version;
    put_string(out, if version == Version::V3_1 { "MQIsdp" } else { "MQTT" })?;
    out.push(version.level() | if packet.is_bridge && !version.is_5() { 0x80 } else { 0 });
    let will_flags = |will: &LastWill<'_>| 0x04 | will.qos.level() << 3 | u8::from(will.retain) << 5;
    let credentials = u8::from(packet.user_name.is_some()) << 7 | u8::from(packet.password.is_some()) << 6;
    out.push(credentials | packet.will.as_ref().map_or(0, will_flags) | u8::from(packet.clean_start) << 1);
    put_u16(out, packet.keep_alive);
    if version.is_5() {
        packet.properties.encode(out)?;
    }
    put_string(out, packet.client_id)?;
    if let Some(will) = &packet.will {
        if version.is_5() {
            will.properties.encode(out)?;
        }
        put_string(out, will.topic)?;
        put_binary(out, will.payload)?;
    }
    if let Some(user_name) = packet.user_name {
        put_string(out, user_name)?;
    }
    packet.password.map_or(Ok(()), |password| put_binary(out, password))
}

#[inline]
fn ack(first: u8, packet: &Ack<'_>, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let [high, low] = packet.packet_id.get().to_be_bytes();
    if !version.is_5() || (packet.reason == ReasonCode::Success && packet.properties.is_empty()) {
        out.extend_from_slice(&[first, 2, high, low]);
    } else if packet.properties.is_empty() {
        out.extend_from_slice(&[first, 3, high, low, packet.reason.value()]);
    } else {
        out.push(first);
        put_with_length(out, |out| {
            out.extend_from_slice(&[high, low, packet.reason.value()]);
            packet.properties.encode(out)
        })?;
    }
    Ok(())
}

fn put_subscriptions(list: &Subscriptions<'_>, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    for subscription in list.iter() {
        put_string(out, subscription.filter)?;
        let options = subscription.options;
        out.push(if version.is_5() { options.to_byte() } else { options.qos.level() });
    }
    Ok(())
}

fn ending(
    first: u8,
    reason: ReasonCode,
    properties: &PropertyList<'_>,
    version: Version,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    out.push(first);
    if !version.is_5() || (reason == ReasonCode::Success && properties.is_empty()) {
        out.push(0);
        return Ok(());
    }
    put_with_length(out, |out| {
        out.push(reason.value());
        if properties.is_empty() { Ok(()) } else { properties.encode(out) }
    })
}
