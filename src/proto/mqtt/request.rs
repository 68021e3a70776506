//! What a CONNECT asks for, owned: deciding on it takes time (MQTT 5.0 §3.1).

use std::time::Duration;

use bytes::Bytes;

use super::property::Property;
use super::{LastWill, Version};
use crate::clock::UnixMillis;
use crate::message::{Message, Properties, QoS};
use crate::topic::TopicName;
use crate::via::Introduction;

/// How long a session is kept after its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// It ends with the connection.
    AtOnce,
    After(Duration),
    Never,
}

impl Expiry {
    /// From the session expiry interval of 5.0, in seconds.
    pub fn from_seconds(seconds: u32) -> Self {
        match seconds {
            0 => Self::AtOnce,
            u32::MAX => Self::Never,
            _ => Self::After(Duration::from_secs(seconds.into())),
        }
    }

    /// The session expiry interval of 5.0, in seconds.
    pub fn seconds(self) -> u32 {
        match self {
            Self::AtOnce => 0,
            Self::After(after) => u32::try_from(after.as_secs()).unwrap_or(u32::MAX - 1),
            Self::Never => u32::MAX,
        }
    }
}

/// A CONNECT, owned.
pub struct ConnectRequest {
    pub version: Version,
    /// See [`Connect::is_bridge`].
    pub is_bridge: bool,
    /// May be empty: then the client wants one assigned (5.0) or does not care (3.1.1).
    pub client_id: Box<str>,
    pub clean_start: bool,
    pub expiry: Expiry,
    /// How many unacknowledged outbound messages the client takes; at least 1.
    pub receive_maximum: u16,
    pub keep_alive: u16,
    pub will: Option<Will>,
    pub user_name: Option<Box<str>>,
    pub password: Option<Box<[u8]>>,
    /// The gateway whose bridge it is, where it says so.
    pub gateway: Option<Introduction>,
}

/// Without the password.
impl std::fmt::Debug for ConnectRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectRequest")
            .field("version", &self.version)
            .field("client_id", &self.client_id)
            .field("clean_start", &self.clean_start)
            .field("expiry", &self.expiry)
            .field("user_name", &self.user_name)
            .finish_non_exhaustive()
    }
}

/// A will, owned.
#[derive(Clone, Debug, PartialEq)]
pub struct Will {
    pub topic: TopicName,
    pub payload: Bytes,
    pub qos: QoS,
    pub retain: bool,
    pub properties: Option<Box<Properties>>,
    pub expiry_interval: Option<Duration>,
    pub delay: Duration,
}

impl Will {
    /// The will as a message accepted at `at`.
    pub fn into_message(self, at: UnixMillis) -> Message {
        Message {
            topic: self.topic,
            payload: self.payload,
            qos: self.qos,
            retain: self.retain,
            properties: self.properties,
            expiry_interval: self.expiry_interval,
            accepted_at: at,
        }
    }

    pub(super) fn of(will: &LastWill<'_>) -> Option<Self> {
        let delay = will.properties.iter().find_map(|property| match property {
            Property::WillDelayInterval(seconds) => Some(Duration::from_secs(seconds.into())),
            _ => None,
        });
        Some(Self {
            // Checked when the CONNECT was decoded.
            topic: TopicName::new(will.topic).ok()?,
            payload: Bytes::copy_from_slice(will.payload),
            qos: will.qos,
            retain: will.retain,
            properties: will.properties.to_message_properties(),
            expiry_interval: will.properties.message_expiry(),
            delay: delay.unwrap_or_default(),
        })
    }
}
