//! Properties: which there are, of which type, and in which packets they may stand (MQTT 5.0 §2.2.2.2).

use std::num::{NonZeroU16, NonZeroU32};

use super::wire::{Reader, put_binary, put_string, put_u16, put_u32, put_variable, put_with_length};
use super::{EncodeError, ProtocolError, ReasonCode};
use crate::message::QoS;
use crate::topic::TopicName;

/// One property of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property<'a> {
    PayloadFormatIndicator(bool),
    /// Seconds.
    MessageExpiryInterval(u32),
    ContentType(&'a str),
    ResponseTopic(&'a str),
    CorrelationData(&'a [u8]),
    /// 1 to 268,435,455.
    SubscriptionIdentifier(NonZeroU32),
    /// Seconds; `u32::MAX` is for ever.
    SessionExpiryInterval(u32),
    AssignedClientIdentifier(&'a str),
    /// Seconds.
    ServerKeepAlive(u16),
    AuthenticationMethod(&'a str),
    AuthenticationData(&'a [u8]),
    RequestProblemInformation(bool),
    /// Seconds.
    WillDelayInterval(u32),
    RequestResponseInformation(bool),
    ResponseInformation(&'a str),
    ServerReference(&'a str),
    ReasonString(&'a str),
    ReceiveMaximum(NonZeroU16),
    TopicAliasMaximum(u16),
    TopicAlias(NonZeroU16),
    MaximumQoS(QoS),
    RetainAvailable(bool),
    UserProperty(&'a str, &'a str),
    /// Bytes.
    MaximumPacketSize(NonZeroU32),
    WildcardSubscriptionAvailable(bool),
    SubscriptionIdentifierAvailable(bool),
    SharedSubscriptionAvailable(bool),
}

/// Where a list of properties stands: one bit each, for the table of what is allowed where.
pub(super) mod place {
    pub const CONNECT: u16 = 1;
    pub const CONNACK: u16 = 1 << 1;
    pub const PUBLISH: u16 = 1 << 2;
    pub const WILL: u16 = 1 << 3;
    /// PUBACK, PUBREC, PUBREL and PUBCOMP.
    pub const ACK: u16 = 1 << 4;
    pub const SUBSCRIBE: u16 = 1 << 5;
    /// SUBACK and UNSUBACK.
    pub const SUBACK: u16 = 1 << 6;
    pub const UNSUBSCRIBE: u16 = 1 << 7;
    pub const DISCONNECT: u16 = 1 << 8;
    pub const AUTH: u16 = 1 << 9;
}

const USER_PROPERTY: u8 = 0x26;
const SUBSCRIPTION_IDENTIFIER: u8 = 0x0B;

impl<'a> Property<'a> {
    /// The places where the property `id` may stand (MQTT 5.0 table 2-4); none for an unknown identifier.
    fn places(id: u8) -> u16 {
        use place::*;
        match id {
            0x01 | 0x02 | 0x03 | 0x08 | 0x09 => PUBLISH | WILL,
            SUBSCRIPTION_IDENTIFIER => PUBLISH | SUBSCRIBE,
            0x11 => CONNECT | CONNACK | DISCONNECT,
            0x12 | 0x13 | 0x1A => CONNACK,
            0x15 | 0x16 => CONNECT | CONNACK | AUTH,
            0x17 | 0x19 => CONNECT,
            0x18 => WILL,
            0x1C => CONNACK | DISCONNECT,
            0x1F => CONNACK | ACK | SUBACK | DISCONNECT | AUTH,
            0x21 | 0x22 | 0x27 => CONNECT | CONNACK,
            0x23 => PUBLISH,
            0x24 | 0x25 | 0x28 | 0x29 | 0x2A => CONNACK,
            USER_PROPERTY => {
                CONNECT | CONNACK | PUBLISH | WILL | ACK | SUBSCRIBE | SUBACK | UNSUBSCRIBE | DISCONNECT | AUTH
            }
            _ => 0,
        }
    }

    fn decode(id: u8, from: &mut Reader<'a>) -> Result<Self, ProtocolError> {
        Ok(match id {
            0x01 => Self::PayloadFormatIndicator(flag(from)?),
            0x02 => Self::MessageExpiryInterval(from.u32()?),
            0x03 => Self::ContentType(from.string()?),
            0x08 => {
                let topic = from.string()?;
                TopicName::check(topic)
                    .map_err(|_| ProtocolError::protocol("a response topic is not a valid topic name"))?;
                Self::ResponseTopic(topic)
            }
            0x09 => Self::CorrelationData(from.binary()?),
            SUBSCRIPTION_IDENTIFIER => {
                let id = NonZeroU32::new(from.variable()?);
                Self::SubscriptionIdentifier(id.ok_or(ProtocolError::protocol("a subscription identifier is zero"))?)
            }
            0x11 => Self::SessionExpiryInterval(from.u32()?),
            0x12 => Self::AssignedClientIdentifier(from.string()?),
            0x13 => Self::ServerKeepAlive(from.u16()?),
            0x15 => Self::AuthenticationMethod(from.string()?),
            0x16 => Self::AuthenticationData(from.binary()?),
            0x17 => Self::RequestProblemInformation(flag(from)?),
            0x18 => Self::WillDelayInterval(from.u32()?),
            0x19 => Self::RequestResponseInformation(flag(from)?),
            0x1A => Self::ResponseInformation(from.string()?),
            0x1C => Self::ServerReference(from.string()?),
            0x1F => Self::ReasonString(from.string()?),
            0x21 => {
                let maximum = NonZeroU16::new(from.u16()?);
                Self::ReceiveMaximum(maximum.ok_or(ProtocolError::protocol("a receive maximum is zero"))?)
            }
            0x22 => Self::TopicAliasMaximum(from.u16()?),
            0x23 => {
                let zero = ProtocolError::with(ReasonCode::TopicAliasInvalid, "a topic alias is zero");
                Self::TopicAlias(NonZeroU16::new(from.u16()?).ok_or(zero)?)
            }
            0x24 => Self::MaximumQoS(if flag(from)? { QoS::AtLeastOnce } else { QoS::AtMostOnce }),
            0x25 => Self::RetainAvailable(flag(from)?),
            USER_PROPERTY => Self::UserProperty(from.string()?, from.string()?),
            0x27 => {
                let size = NonZeroU32::new(from.u32()?);
                Self::MaximumPacketSize(size.ok_or(ProtocolError::protocol("a maximum packet size is zero"))?)
            }
            0x28 => Self::WildcardSubscriptionAvailable(flag(from)?),
            0x29 => Self::SubscriptionIdentifierAvailable(flag(from)?),
            0x2A => Self::SharedSubscriptionAvailable(flag(from)?),
            _ => return Err(ProtocolError::malformed("a property identifier is unknown")),
        })
    }

    /// Appends identifier and value.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        out.push(self.id());
        match *self {
            Self::PayloadFormatIndicator(value)
            | Self::RequestProblemInformation(value)
            | Self::RequestResponseInformation(value)
            | Self::RetainAvailable(value)
            | Self::WildcardSubscriptionAvailable(value)
            | Self::SubscriptionIdentifierAvailable(value)
            | Self::SharedSubscriptionAvailable(value) => out.push(value.into()),
            Self::MaximumQoS(qos) => out.push(qos.level()),
            Self::ServerKeepAlive(value) | Self::TopicAliasMaximum(value) => put_u16(out, value),
            Self::ReceiveMaximum(value) | Self::TopicAlias(value) => put_u16(out, value.get()),
            Self::MessageExpiryInterval(value)
            | Self::SessionExpiryInterval(value)
            | Self::WillDelayInterval(value) => put_u32(out, value),
            Self::MaximumPacketSize(value) => put_u32(out, value.get()),
            Self::SubscriptionIdentifier(value) => put_variable(out, value.get()),
            Self::CorrelationData(bytes) | Self::AuthenticationData(bytes) => put_binary(out, bytes)?,
            Self::ContentType(text)
            | Self::ResponseTopic(text)
            | Self::AssignedClientIdentifier(text)
            | Self::AuthenticationMethod(text)
            | Self::ResponseInformation(text)
            | Self::ServerReference(text)
            | Self::ReasonString(text) => put_string(out, text)?,
            Self::UserProperty(name, value) => {
                put_string(out, name)?;
                put_string(out, value)?;
            }
        }
        Ok(())
    }

    fn id(&self) -> u8 {
        match self {
            Self::PayloadFormatIndicator(_) => 0x01,
            Self::MessageExpiryInterval(_) => 0x02,
            Self::ContentType(_) => 0x03,
            Self::ResponseTopic(_) => 0x08,
            Self::CorrelationData(_) => 0x09,
            Self::SubscriptionIdentifier(_) => SUBSCRIPTION_IDENTIFIER,
            Self::SessionExpiryInterval(_) => 0x11,
            Self::AssignedClientIdentifier(_) => 0x12,
            Self::ServerKeepAlive(_) => 0x13,
            Self::AuthenticationMethod(_) => 0x15,
            Self::AuthenticationData(_) => 0x16,
            Self::RequestProblemInformation(_) => 0x17,
            Self::WillDelayInterval(_) => 0x18,
            Self::RequestResponseInformation(_) => 0x19,
            Self::ResponseInformation(_) => 0x1A,
            Self::ServerReference(_) => 0x1C,
            Self::ReasonString(_) => 0x1F,
            Self::ReceiveMaximum(_) => 0x21,
            Self::TopicAliasMaximum(_) => 0x22,
            Self::TopicAlias(_) => 0x23,
            Self::MaximumQoS(_) => 0x24,
            Self::RetainAvailable(_) => 0x25,
            Self::UserProperty(..) => USER_PROPERTY,
            Self::MaximumPacketSize(_) => 0x27,
            Self::WildcardSubscriptionAvailable(_) => 0x28,
            Self::SubscriptionIdentifierAvailable(_) => 0x29,
            Self::SharedSubscriptionAvailable(_) => 0x2A,
        }
    }
}

/// The properties of one packet: as they stand in a decoded packet, checked, or as they are given to be encoded.
#[derive(Clone, Copy)]
pub struct PropertyList<'a>(Source<'a>);

#[derive(Clone, Copy)]
enum Source<'a> {
    /// Bytes that `decode` has walked once to the end.
    Checked(&'a [u8]),
    Given(&'a [Property<'a>]),
}

impl<'a> PropertyList<'a> {
    pub const EMPTY: Self = Self(Source::Given(&[]));

    /// Takes a property length and that many bytes, and checks all of it for `place`.
    pub(super) fn decode(from: &mut Reader<'a>, place: u16) -> Result<Self, ProtocolError> {
        let length = from.variable()?;
        if length == 0 {
            return Ok(Self::EMPTY);
        }
        let bytes = from.bytes(length as usize)?;
        let mut reader = Reader(bytes);
        let mut seen = 0_u64;
        while !reader.is_empty() {
            // Identifiers are variable byte integers, but none above 0x7F is defined.
            let id = reader.u8()?;
            let places = Property::places(id);
            if places == 0 {
                return Err(ProtocolError::malformed("a property identifier is unknown"));
            }
            if places & place == 0 {
                return Err(ProtocolError::protocol("a property is not allowed in this packet"));
            }
            Property::decode(id, &mut reader)?;
            let may_repeat = id == USER_PROPERTY || (id == SUBSCRIPTION_IDENTIFIER && place == place::PUBLISH);
            if seen & (1 << id) != 0 && !may_repeat {
                return Err(ProtocolError::protocol("a property appears twice in one packet"));
            }
            seen |= 1 << id;
        }
        Ok(Self(Source::Checked(bytes)))
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        put_with_length(out, |out| {
            match self.0 {
                Source::Checked(bytes) => out.extend_from_slice(bytes),
                Source::Given(list) => list.iter().try_for_each(|property| property.encode(out))?,
            }
            Ok(())
        })
    }

    pub fn is_empty(&self) -> bool {
        match self.0 {
            Source::Checked(bytes) => bytes.is_empty(),
            Source::Given(list) => list.is_empty(),
        }
    }

    /// The properties in the order of the packet.
    pub fn iter(&self) -> impl Iterator<Item = Property<'a>> + use<'a> {
        let (mut reader, mut given) = match self.0 {
            Source::Checked(bytes) => (Reader(bytes), [].iter()),
            Source::Given(list) => (Reader(&[]), list.iter()),
        };
        std::iter::from_fn(move || {
            if let Some(property) = given.next() {
                return Some(*property);
            }
            let id = reader.u8().ok()?;
            Property::decode(id, &mut reader).ok()
        })
    }

    /// What the peer says about the reason code beside this list.
    pub fn reason_string(&self) -> Option<&'a str> {
        self.iter().find_map(|property| match property {
            Property::ReasonString(text) => Some(text),
            _ => None,
        })
    }
}

impl<'a> From<&'a [Property<'a>]> for PropertyList<'a> {
    fn from(list: &'a [Property<'a>]) -> Self {
        Self(Source::Given(list))
    }
}

impl Default for PropertyList<'_> {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl PartialEq for PropertyList<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl std::fmt::Debug for PropertyList<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

fn flag(from: &mut Reader<'_>) -> Result<bool, ProtocolError> {
    match from.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(ProtocolError::protocol("a property that is 0 or 1 has another value")),
    }
}
