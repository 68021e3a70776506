//! The properties of a message as the bytes the store keeps: as they stand in a PUBLISH, without the length in front.
//!
//! The message expiry interval is not among them; the store has it in a column of its own.

use bytes::Bytes;
use thiserror::Error;

use super::encode::put_message_properties;
use super::property::{Property, PropertyList, place};
use super::wire::{Reader, put_variable};
use super::{EncodeError, ProtocolError};
use crate::message::Properties;
use crate::topic::TopicName;

/// Appends `properties` to `out`.
///
/// # Errors
/// [`EncodeError::FieldTooLong`] for a value that MQTT cannot carry; `out` is as before.
pub fn encode_properties(properties: &Properties, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let start = out.len();
    put_message_properties(properties, out).inspect_err(|_| out.truncate(start))
}

/// Takes apart what [`encode_properties`] wrote.
///
/// # Errors
/// The bytes are not what [`encode_properties`] writes.
pub fn decode_properties(bytes: &[u8]) -> Result<Properties, StoredPropertiesError> {
    let mut with_length = Vec::with_capacity(4 + bytes.len());
    let length = u32::try_from(bytes.len()).ok().filter(|&length| length <= super::wire::MAX_VARIABLE);
    put_variable(&mut with_length, length.ok_or(StoredPropertiesError::TooLong)?);
    with_length.extend_from_slice(bytes);
    let list = PropertyList::decode(&mut Reader(&with_length), place::PUBLISH)?;
    Ok(list.to_message_properties().map_or_else(Properties::default, |properties| *properties))
}

/// Stored properties cannot be read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StoredPropertiesError {
    #[error("the stored properties are longer than a packet can be")]
    TooLong,
    #[error("the stored properties are damaged")]
    Damaged(#[from] ProtocolError),
}

impl PropertyList<'_> {
    /// What of a PUBLISH or a will belongs to the message itself; `None` where all of it is absent.
    pub fn to_message_properties(&self) -> Option<Box<Properties>> {
        if self.is_empty() {
            return None;
        }
        let mut properties = Properties::default();
        for property in self.iter() {
            match property {
                Property::PayloadFormatIndicator(is_utf8) => properties.payload_is_utf8 = Some(is_utf8),
                Property::ContentType(text) => properties.content_type = Some(text.into()),
                // Checked when the list was decoded.
                Property::ResponseTopic(topic) => properties.response_topic = TopicName::new(topic).ok(),
                Property::CorrelationData(bytes) => {
                    properties.correlation_data = Some(Bytes::copy_from_slice(bytes));
                }
                Property::UserProperty(name, value) => {
                    properties.user_properties.push((name.into(), value.into()));
                }
                _ => {}
            }
        }
        if properties.is_empty() { None } else { Some(Box::new(properties)) }
    }

    /// The message expiry interval.
    pub fn message_expiry(&self) -> Option<std::time::Duration> {
        self.iter().find_map(|property| match property {
            Property::MessageExpiryInterval(seconds) => Some(std::time::Duration::from_secs(seconds.into())),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_read_back() {
        let properties = Properties {
            payload_is_utf8: Some(false),
            content_type: Some("application/json".into()),
            response_topic: Some(TopicName::new("reply/to").unwrap()),
            correlation_data: Some(Bytes::from_static(b"\0\xFF")),
            user_properties: vec![("a".into(), "1".into()), ("a".into(), "2".into()), ("".into(), "".into())],
        };
        let mut bytes = b"before".to_vec();
        encode_properties(&properties, &mut bytes).unwrap();
        assert_eq!(decode_properties(&bytes[6..]), Ok(properties));
        assert_eq!(decode_properties(&[]), Ok(Properties::default()));
        assert!(decode_properties(&bytes[6..bytes.len() - 1]).is_err());
        assert!(decode_properties(&[0x7F]).is_err());
    }

    #[test]
    fn a_value_too_long_for_mqtt_leaves_the_buffer_alone() {
        let properties = Properties { content_type: Some("x".repeat(65_536).into()), ..Properties::default() };
        let mut bytes = vec![1];
        assert_eq!(encode_properties(&properties, &mut bytes), Err(EncodeError::FieldTooLong));
        assert_eq!(bytes, [1]);
    }
}
