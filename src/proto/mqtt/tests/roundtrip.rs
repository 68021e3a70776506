//! Whatever is encoded decodes to the same, and no bytes panic the decoder.

use proptest::prelude::*;

use super::*;

fn version() -> impl Strategy<Value = Version> {
    prop_oneof![Just(Version::V3_1), Just(Version::V3_1_1), Just(Version::V5)]
}

/// Bytes that look like packets more often than noise does: a plausible first byte and a remaining length that fits.
fn almost_packet() -> impl Strategy<Value = Vec<u8>> {
    (any::<u8>(), prop::collection::vec(any::<u8>(), 0..100)).prop_map(|(first, body)| {
        let mut bytes = vec![first, body.len() as u8];
        bytes.extend(body);
        bytes
    })
}

/// Well-formed packets with one byte changed, cut or added.
fn damaged_packet() -> impl Strategy<Value = Vec<u8>> {
    let packets = [
        r#"10 22 0004 "MQTT" 05 C6 003C 03 21 0014 0001 "c" 00 0001 "w" 0001 "x" 0001 "u" 0001 "p""#,
        r#"20 09 00 00 06 21 0014 22 000A"#,
        r#"33 14 0003 "a/b" 0005 0A 02 00000009 26 0001 "k" 0001 "v" "#,
        r##"82 0A 000A 02 0B 01 0003 "a/#" 2D"##,
        r#"50 09 0007 87 05 1F 0002 "no""#,
        r#"E0 07 00 05 11 00000001"#,
    ];
    (prop::sample::select(packets.to_vec()), any::<prop::sample::Index>(), any::<u8>(), 0..3).prop_map(
        |(text, index, byte, how)| {
            let mut packet = bytes(text);
            let index = index.index(packet.len());
            match how {
                0 => packet[index] = byte,
                1 => packet.truncate(index),
                _ => packet.insert(index, byte),
            }
            packet
        },
    )
}

fn text() -> impl Strategy<Value = String> {
    "[^\0+#]{1,40}"
}

proptest! {
    #[test]
    fn no_bytes_panic_the_decoder_and_what_it_accepts_it_can_write(
        input in prop_oneof![prop::collection::vec(any::<u8>(), 0..200), almost_packet(), damaged_packet()],
        version in version(),
        max_packet_size in prop_oneof![Just(MAX_PACKET_BYTES), 0..300_u32],
    ) {
        let _ = connect_version(&input);
        let _ = decode_properties(&input);
        if let Ok(Some((packet, length))) = decode(&input, version, max_packet_size) {
            prop_assert!(length <= input.len() && length <= max_packet_size as usize);
            let spoken = if let Packet::Connect(connect) = &packet { connect.version } else { version };
            let mut out = Vec::new();
            packet.encode(spoken, MAX_PACKET_BYTES, &mut out).unwrap();
            let (again, _) = decode(&out, spoken, MAX_PACKET_BYTES).unwrap().unwrap();
            // Reserved bits that 3.1 lets pass are not kept.
            if spoken != Version::V3_1 {
                prop_assert_eq!(again, packet);
            }
        }
    }

    #[test]
    fn a_publish_comes_back_as_it_was_sent(
        version in version(),
        topic in text(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
        level in 0..3_u8,
        flags in any::<(bool, bool)>(),
        packet_id in 1..=u16::MAX,
        format in any::<Option<bool>>(),
        content_type in prop::option::of(text()),
        user in prop::collection::vec((text(), text()), 0..4),
        identifiers in prop::collection::vec(1..=268_435_455_u32, 0..3),
        seconds in prop::option::of(any::<u32>()),
    ) {
        let qos = QoS::from_level(level).unwrap();
        let properties = crate::message::Properties {
            payload_is_utf8: format,
            content_type: content_type.map(Into::into),
            response_topic: crate::topic::TopicName::new(&topic).ok(),
            correlation_data: Some(payload.clone().into()),
            user_properties: user.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
        };
        let head = PublishHead {
            topic: &topic,
            qos,
            retain: flags.0,
            dup: flags.1 && level > 0,
            packet_id: (level > 0).then(|| id(packet_id)),
            properties: Some(&properties),
            identifiers: &identifiers,
            expiry: seconds.map(|seconds| std::time::Duration::from_secs(seconds.into())),
            topic_alias: None,
            payload: &payload,
        };
        let mut out = Vec::new();
        prop_assert_eq!(encode_publish(version, &head, MAX_PACKET_BYTES, usize::MAX, &mut out), Ok(Body::Copied));
        prop_assert_eq!(publish_length(version, &head), out.len());
        let Packet::Publish(back) = decoded(&out, version).unwrap() else { panic!() };
        prop_assert_eq!(
            (back.topic, back.qos, back.retain, back.dup, back.packet_id, back.payload),
            (head.topic, head.qos, head.retain, head.dup, head.packet_id, head.payload)
        );
        if version.is_5() {
            let same = back.properties.to_message_properties();
            prop_assert_eq!(same.as_deref(), Some(&properties));
            prop_assert_eq!(back.properties.message_expiry(), head.expiry);
            let got = back.properties.iter().filter_map(|property| match property {
                Property::SubscriptionIdentifier(id) => Some(id.get()),
                _ => None,
            });
            prop_assert_eq!(got.collect::<Vec<_>>(), identifiers);
        } else {
            prop_assert!(back.properties.is_empty());
        }
        let mut stored = Vec::new();
        encode_properties(&properties, &mut stored).unwrap();
        prop_assert_eq!(decode_properties(&stored), Ok(properties));
    }
}
