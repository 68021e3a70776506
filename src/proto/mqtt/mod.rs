//! MQTT 3.1, 3.1.1 and 5.0: the wire codec and the life of one connection, as server and as client.
//!
//! Sans-I/O: a shell feeds bytes and `now`, and writes what lands in its output buffer. [`decode`] borrows from the
//! shell's buffer and copies nothing; [`Packet::encode`] and [`encode_publish`] write straight into a `Vec<u8>`.
//! [`server::Server`] and [`client::Client`] keep the rules of one connection, never its session: what must outlive
//! the connection (queues, packet identifiers in flight, subscriptions) belongs to `hub`.
//!
//! Sources: MQTT 5.0 (OASIS, 7 March 2019), MQTT 3.1.1 (OASIS, 29 October 2014), MQTT V3.1 (IBM, 2010).

pub mod client;
mod decode;
mod encode;
mod flow;
mod packet;
mod property;
mod reason;
mod request;
pub mod server;
mod stored;
mod wire;

pub use decode::{connect_version, decode, packet_length};
pub use encode::{Body, EncodeError, PublishHead, encode_publish, publish_length};
pub use flow::{AckKind, AckState, Acks};
pub use packet::{
    Ack, Auth, Connack, Connect, Disconnect, Filters, LastWill, Packet, Publish, RetainHandling, Suback, Subscribe,
    Subscription, SubscriptionOptions, Subscriptions, Unsuback, Unsubscribe, Version,
};
pub use property::{Property, PropertyList};
pub use reason::{ProtocolError, ReasonCode};
pub use stored::{StoredPropertiesError, decode_properties, encode_properties};

/// Tells apart the packets in flight in one direction; never zero (MQTT 5.0 §2.2.1).
pub type PacketId = std::num::NonZeroU16;

/// The largest packet MQTT can carry, in bytes: five of fixed header and 268,435,455 (MQTT 5.0 §2.1.4).
pub const MAX_PACKET_BYTES: u32 = 5 + 268_435_455;

#[cfg(test)]
mod tests;
