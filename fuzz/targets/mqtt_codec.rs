//! Any bytes, in any version: what is decoded can be encoded and comes back the same, however it is cut, and the
//! versions agree where they should.
#![no_main]

use arbitrary::Arbitrary;
use fieldgate_fuzz::mqtt::AnyVersion;
use fieldgate_fuzz::proto::mqtt::{
    Body, MAX_PACKET_BYTES, Packet, Property, PublishHead, Version, connect_version, decode, decode_properties,
    encode_properties, encode_publish, packet_length, publish_length,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    version: AnyVersion,
    max_packet_size: u16,
    cut: u16,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let version = Version::from(input.version);
    let bytes = input.bytes;
    let _ = connect_version(bytes);
    stored_properties(bytes);
    let limit = u32::from(input.max_packet_size);
    if let Ok(Some((_, length))) = decode(bytes, version, limit) {
        assert!(length <= limit as usize);
    }
    let length = packet_length(bytes, version, MAX_PACKET_BYTES);
    let decoded = decode(bytes, version, MAX_PACKET_BYTES);
    let Ok(Some((packet, total))) = decoded else {
        if let Ok(None) = decoded {
            assert!(length.is_ok_and(|length| length.is_none_or(|length| length > bytes.len())));
        }
        return;
    };
    assert_eq!(length, Ok(Some(total)));
    // What is behind it does not matter, and a part of it is not a packet.
    let cut = usize::from(input.cut) % total;
    assert_eq!(decode(&bytes[..total], version, MAX_PACKET_BYTES), Ok(Some((packet.clone(), total))));
    assert_eq!(decode(&bytes[..cut], version, MAX_PACKET_BYTES), Ok(None));
    round_trip(&packet, version);
    agree(&packet, &bytes[..total], version);
    if let Packet::Publish(publish) = &packet {
        publish_round_trip(publish, version);
    }
});

/// What 3.1.1 takes, 3.1 takes as the same.
fn agree(packet: &Packet<'_>, bytes: &[u8], version: Version) {
    if version == Version::V3_1_1 {
        let older = decode(bytes, Version::V3_1, MAX_PACKET_BYTES);
        assert_eq!(older, Ok(Some((packet.clone(), bytes.len()))));
    }
    // A CONNECT brings its own version, whatever is spoken.
    if let Packet::Connect(connect) = packet {
        assert_eq!(connect_version(bytes), Some(connect.version));
    }
}

fn round_trip(packet: &Packet<'_>, version: Version) {
    let spoken = if let Packet::Connect(connect) = packet { connect.version } else { version };
    let mut out = Vec::new();
    packet.encode(spoken, MAX_PACKET_BYTES, &mut out).expect("what was decoded can be encoded");
    let (again, length) = decode(&out, spoken, MAX_PACKET_BYTES).expect("a good packet").expect("all of it");
    assert_eq!(length, out.len());
    // 3.1 lets reserved bits pass, which are not kept; of a 3.x server we understand refusals in the words of 5.0.
    let says_more = matches!(packet, Packet::Suback(_)) && !spoken.is_5();
    if spoken != Version::V3_1 && !says_more {
        assert_eq!(&again, packet);
    }
    let mut twice = Vec::new();
    again.encode(spoken, MAX_PACKET_BYTES, &mut twice).expect("again");
    assert_eq!(out, twice);
    // One byte less is too little, and leaves nothing behind.
    let mut none = Vec::new();
    assert!(packet.encode(spoken, out.len() as u32 - 1, &mut none).is_err() && none.is_empty());
}

/// The way of a message through the gateway: from a PUBLISH to a message to a PUBLISH.
fn publish_round_trip(publish: &fieldgate_fuzz::proto::mqtt::Publish<'_>, version: Version) {
    let properties = publish.properties.to_message_properties();
    let identifiers: Vec<u32> = publish
        .properties
        .iter()
        .filter_map(|property| match property {
            Property::SubscriptionIdentifier(identifier) => Some(identifier.get()),
            _ => None,
        })
        .collect();
    let topic_alias = publish.properties.iter().find_map(|property| match property {
        Property::TopicAlias(alias) => Some(alias),
        _ => None,
    });
    let head = PublishHead {
        topic: publish.topic,
        qos: publish.qos,
        retain: publish.retain,
        dup: publish.dup,
        packet_id: publish.packet_id,
        properties: properties.as_deref(),
        identifiers: &identifiers,
        expiry: publish.properties.message_expiry(),
        topic_alias,
        payload: publish.payload,
    };
    let mut out = Vec::new();
    assert_eq!(encode_publish(version, &head, MAX_PACKET_BYTES, usize::MAX, &mut out), Ok(Body::Copied));
    assert_eq!(publish_length(version, &head), out.len());
    let mut without = Vec::new();
    assert_eq!(encode_publish(version, &head, MAX_PACKET_BYTES, 0, &mut without), Ok(Body::LeftOut));
    without.extend_from_slice(publish.payload);
    assert_eq!(out, without);
    let Ok(Some((Packet::Publish(back), length))) = decode(&out, version, MAX_PACKET_BYTES) else { panic!("{out:x?}") };
    assert_eq!(length, out.len());
    assert_eq!(
        (back.topic, back.qos, back.retain, back.dup, back.packet_id, back.payload),
        (publish.topic, publish.qos, publish.retain, publish.dup, publish.packet_id, publish.payload)
    );
    assert_eq!(back.properties.to_message_properties(), properties);
    assert_eq!(back.properties.message_expiry(), head.expiry);
}

fn stored_properties(bytes: &[u8]) {
    if let Ok(properties) = decode_properties(bytes) {
        let mut out = Vec::new();
        encode_properties(&properties, &mut out).expect("what was decoded can be encoded");
        assert_eq!(decode_properties(&out), Ok(properties));
    }
}
