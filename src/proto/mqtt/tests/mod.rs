//! Bytes in, packets out, and back.

mod client;
mod codec;
mod roundtrip;
mod server;

use super::*;
use crate::message::QoS;

/// Bytes written as hex pairs; blanks are for the reader, text stands in quotes.
fn bytes(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, part) in text.split('"').enumerate() {
        if index % 2 == 1 {
            out.extend_from_slice(part.as_bytes());
            continue;
        }
        let digits: String = part.split_whitespace().collect();
        let pairs = (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap());
        out.extend(pairs);
    }
    out
}

fn id(value: u16) -> PacketId {
    PacketId::new(value).unwrap()
}

/// A whole packet with nothing behind it.
fn decoded(bytes: &[u8], version: Version) -> Result<Packet<'_>, ProtocolError> {
    decode(bytes, version, MAX_PACKET_BYTES).map(|packet| {
        let (packet, length) = packet.expect("a whole packet");
        assert_eq!(length, bytes.len());
        packet
    })
}

fn publish<'a>(topic: &'a str, qos: QoS, packet_id: Option<u16>, payload: &'a [u8]) -> Publish<'a> {
    let packet_id = packet_id.map(id);
    Publish { dup: false, qos, retain: false, topic, packet_id, properties: PropertyList::EMPTY, payload }
}
