//! Byte vectors of the wire codec: what is accepted, what is refused and with which reason.

use super::Version::{V3_1, V3_1_1, V5};
use super::*;

/// The bytes are this packet, and this packet is these bytes.
fn same(version: Version, text: &str, packet: Packet<'_>) {
    let wire = bytes(text);
    assert_eq!(decoded(&wire, version), Ok(packet.clone()), "{text}");
    let mut out = b"before".to_vec();
    packet.encode(version, MAX_PACKET_BYTES, &mut out).unwrap();
    assert_eq!(&out[6..], wire, "{text}");
    for end in 0..wire.len() {
        assert_eq!(decode(&wire[..end], version, MAX_PACKET_BYTES), Ok(None), "{text} cut at {end}");
    }
}

fn wrong(version: Version, text: &str, reason: ReasonCode) {
    let wire = bytes(text);
    let error = decode(&wire, version, MAX_PACKET_BYTES).expect_err(text);
    assert_eq!(error.reason, reason, "{text}: {error}");
}

fn connect(version: Version) -> Connect<'static> {
    Connect {
        version,
        is_bridge: false,
        clean_start: true,
        keep_alive: 60,
        properties: PropertyList::EMPTY,
        client_id: "c",
        will: None,
        user_name: None,
        password: None,
    }
}

#[test]
fn a_connect_of_each_version() {
    same(V3_1, r#"10 0F 0006 "MQIsdp" 03 02 003C 0001 "c""#, Packet::Connect(connect(V3_1).into()));
    same(V3_1_1, r#"10 0D 0004 "MQTT" 04 02 003C 0001 "c""#, Packet::Connect(connect(V3_1_1).into()));
    same(V5, r#"10 0E 0004 "MQTT" 05 02 003C 00 0001 "c""#, Packet::Connect(connect(V5).into()));
    let bridge = Connect { is_bridge: true, ..connect(V3_1_1) };
    same(V3_1_1, r#"10 0D 0004 "MQTT" 84 02 003C 0001 "c""#, Packet::Connect(bridge.into()));
}

#[test]
fn a_connect_with_everything() {
    let will_properties = [Property::WillDelayInterval(5), Property::PayloadFormatIndicator(true)];
    let properties = [
        Property::SessionExpiryInterval(3600),
        Property::ReceiveMaximum(20.try_into().unwrap()),
        Property::MaximumPacketSize(65_536.try_into().unwrap()),
        Property::TopicAliasMaximum(10),
        Property::UserProperty("a", "b"),
        Property::UserProperty("a", "b"),
    ];
    let packet = Connect {
        clean_start: false,
        properties: properties.as_slice().into(),
        will: Some(LastWill {
            qos: QoS::ExactlyOnce,
            retain: true,
            properties: will_properties.as_slice().into(),
            topic: "w/t",
            payload: b"\0gone",
        }),
        user_name: Some("user"),
        password: Some(b"\xFFsecret"),
        ..connect(V5)
    };
    assert!(!format!("{packet:?}").contains("secret"));
    same(
        V5,
        r#"10 4F 0004 "MQTT" 05 F4 003C 1E 11 00000E10 21 0014 27 00010000 22 000A 26 0001 "a" 0001 "b" 26 0001 "a" 0001 "b"
           0001 "c" 07 18 00000005 01 01 0003 "w/t" 0005 00 "gone" 0004 "user" 0007 FF "secret""#,
        Packet::Connect(packet.into()),
    );
}

#[test]
fn malformed_connects_are_refused() {
    use ReasonCode::{MalformedPacket, ProtocolError, TopicNameInvalid, UnsupportedProtocolVersion};
    let check = |text, reason| wrong(V3_1_1, text, reason);
    // [MQTT-3.1.2-1], [MQTT-3.1.2-2]
    check(r#"10 0D 0004 "MQTx" 04 02 003C 0001 "c""#, MalformedPacket);
    check(r#"10 0D 0004 "MQTT" 06 02 003C 0001 "c""#, UnsupportedProtocolVersion);
    check(r#"10 0F 0006 "MQIsdp" 04 02 003C 0001 "c""#, UnsupportedProtocolVersion);
    // [MQTT-3.1.2-3]
    check(r#"10 0D 0004 "MQTT" 04 03 003C 0001 "c""#, MalformedPacket);
    // [MQTT-3.1.2-11], [MQTT-3.1.2-12], [MQTT-3.1.2-13]
    check(r#"10 0D 0004 "MQTT" 04 22 003C 0001 "c""#, MalformedPacket);
    check(r#"10 0D 0004 "MQTT" 04 0A 003C 0001 "c""#, MalformedPacket);
    check(r#"10 14 0004 "MQTT" 04 1E 003C 0001 "c" 0001 "t" 0002 "hi""#, MalformedPacket);
    check(r#"10 14 0004 "MQTT" 04 06 003C 0001 "c" 0001 "+" 0002 "hi""#, TopicNameInvalid);
    // 3.1.1 [MQTT-3.1.2-22]
    check(r#"10 10 0004 "MQTT" 04 42 003C 0001 "c" 0001 "p""#, MalformedPacket);
    // Cut short, and too long.
    check(r#"10 0D 0004 "MQTT" 04 82 003C 0001 "c""#, MalformedPacket);
    check(r#"10 0E 0004 "MQTT" 04 02 003C 0001 "c" 00"#, MalformedPacket);
    // Fixed header flags.
    check(r#"11 0D 0004 "MQTT" 04 02 003C 0001 "c""#, MalformedPacket);
    // A receive maximum of zero, a property twice, one that is not for CONNECT, one that does not exist.
    check(r#"10 11 0004 "MQTT" 05 02 003C 03 21 0000 0001 "c""#, ProtocolError);
    check(r#"10 14 0004 "MQTT" 05 02 003C 06 21 0001 21 0001 0001 "c""#, ProtocolError);
    check(r#"10 11 0004 "MQTT" 05 02 003C 03 23 0001 0001 "c""#, ProtocolError);
    check(r#"10 11 0004 "MQTT" 05 02 003C 03 7F 0001 0001 "c""#, MalformedPacket);
    // Well-formed UTF-8 only [MQTT-3.1.3-4].
    check(r#"10 0D 0004 "MQTT" 04 02 003C 0001 FF"#, MalformedPacket);
}

#[test]
fn a_3_1_client_may_announce_a_user_name_and_send_none() {
    let packet = decoded(&bytes(r#"10 0F 0006 "MQIsdp" 03 C2 003C 0001 "c""#), V3_1).unwrap().clone_connect();
    assert_eq!((packet.0, packet.1), (None, None));
}

impl Packet<'_> {
    fn clone_connect(&self) -> (Option<String>, Option<Vec<u8>>) {
        let Packet::Connect(connect) = self else { panic!("{self:?}") };
        (connect.user_name.map(Into::into), connect.password.map(Into::into))
    }
}

#[test]
fn the_version_of_a_malformed_connect_is_still_known() {
    let check = |text, version| assert_eq!(connect_version(&bytes(text)), version, "{text}");
    check(r#"10 0D 0004 "MQTT" 05"#, Some(V5));
    check(r#"10 0D 0004 "MQTT" 09 FF FF"#, Some(V5));
    check(r#"10 0D 0004 "MQTT" 02"#, Some(V3_1_1));
    check(r#"10 0D 0006 "MQIsdp" 03"#, Some(V3_1));
    check(r#"10 0D 0004 "MQTT""#, None);
    check("20 02 0000", None);
    check("", None);
}

#[test]
fn a_connack_speaks_the_words_of_its_version() {
    let plain = |reason| Packet::Connack(Connack { session_present: false, reason, properties: PropertyList::EMPTY });
    same(V3_1_1, "20 02 00 00", plain(ReasonCode::Success));
    same(V3_1_1, "20 02 00 05", plain(ReasonCode::NotAuthorized));
    same(V3_1_1, "20 02 00 01", plain(ReasonCode::UnsupportedProtocolVersion));
    same(V5, "20 03 00 87 00", plain(ReasonCode::NotAuthorized));
    let properties = [
        Property::AssignedClientIdentifier("me"),
        Property::MaximumQoS(QoS::AtLeastOnce),
        Property::RetainAvailable(false),
        Property::ServerKeepAlive(30),
    ];
    let packet =
        Connack { session_present: true, reason: ReasonCode::Success, properties: properties.as_slice().into() };
    same(V5, r#"20 0F 01 00 0C 12 0002 "me" 24 01 25 00 13 001E"#, Packet::Connack(packet));
    wrong(V3_1_1, "20 02 02 00", ReasonCode::MalformedPacket);
    wrong(V3_1_1, "20 02 00 06", ReasonCode::ProtocolError);
}

#[test]
fn a_publish_of_each_qos() {
    let at = |qos, packet_id| publish("a/b", qos, packet_id, b"hi");
    same(V3_1_1, r#"30 07 0003 "a/b" "hi""#, Packet::Publish(at(QoS::AtMostOnce, None)));
    same(V3_1_1, r#"32 09 0003 "a/b" 1234 "hi""#, Packet::Publish(at(QoS::AtLeastOnce, Some(0x1234))));
    let again = Publish { dup: true, retain: true, ..at(QoS::ExactlyOnce, Some(1)) };
    same(V5, r#"3D 0A 0003 "a/b" 0001 00 "hi""#, Packet::Publish(again));
    let properties = [Property::MessageExpiryInterval(9), Property::TopicAlias(2.try_into().unwrap())];
    let aliased = Publish { topic: "", properties: properties.as_slice().into(), ..at(QoS::AtMostOnce, None) };
    same(V5, r#"30 0D 0000 08 02 00000009 23 0002 "hi""#, Packet::Publish(aliased));
}

#[test]
fn malformed_publishes_are_refused() {
    use ReasonCode::{MalformedPacket, ProtocolError, TopicAliasInvalid, TopicNameInvalid};
    // [MQTT-3.3.1-4], [MQTT-3.3.1-2]
    wrong(V3_1_1, r#"36 09 0003 "a/b" 1234 "hi""#, MalformedPacket);
    wrong(V3_1_1, r#"38 07 0003 "a/b" "hi""#, MalformedPacket);
    // [MQTT-2.2.1-3]
    wrong(V3_1_1, r#"32 09 0003 "a/b" 0000 "hi""#, MalformedPacket);
    // [MQTT-3.3.2-2], [MQTT-1.5.4-2], [MQTT-3.3.2-1]
    wrong(V3_1_1, r#"30 07 0003 "a/+" "hi""#, TopicNameInvalid);
    wrong(V5, r##"30 08 0003 "a/#" 00 "hi""##, TopicNameInvalid);
    wrong(V3_1_1, r#"30 07 0003 "a" 00 "b" "hi""#, MalformedPacket);
    wrong(V3_1_1, r#"30 07 0003 "a" C0 80 "hi""#, MalformedPacket);
    wrong(V3_1_1, r#"30 04 0000 "hi""#, ProtocolError);
    wrong(V5, r#"30 05 0000 00 "hi""#, ProtocolError);
    wrong(V3_1_1, r#"30 03 0003 "a""#, MalformedPacket);
    wrong(V5, r#"30 09 0003 "a/b" 03 23 0000"#, TopicAliasInvalid);
    // A response topic with a wildcard [MQTT-3.3.2-14].
    wrong(V5, r#"30 0A 0003 "a/b" 04 08 0001 "+""#, ProtocolError);
    // A payload format that is neither 0 nor 1; a subscription identifier of zero.
    wrong(V5, r#"30 08 0003 "a/b" 02 01 02"#, ProtocolError);
    wrong(V5, r#"30 08 0003 "a/b" 02 0B 00"#, ProtocolError);
    // A property length that reaches beyond the packet.
    wrong(V5, r#"30 07 0003 "a/b" 02 01"#, MalformedPacket);
}

#[test]
fn acknowledgements_are_as_short_as_they_may_be() {
    let ack = |reason| Ack::new(id(7), reason);
    same(V3_1_1, "40 02 0007", Packet::Puback(ack(ReasonCode::Success)));
    same(V3_1_1, "50 02 0007", Packet::Pubrec(ack(ReasonCode::Success)));
    same(V3_1_1, "62 02 0007", Packet::Pubrel(ack(ReasonCode::Success)));
    same(V3_1_1, "70 02 0007", Packet::Pubcomp(ack(ReasonCode::Success)));
    same(V5, "40 02 0007", Packet::Puback(ack(ReasonCode::Success)));
    same(V5, "40 03 0007 97", Packet::Puback(ack(ReasonCode::QuotaExceeded)));
    same(V5, "70 03 0007 92", Packet::Pubcomp(ack(ReasonCode::PacketIdentifierNotFound)));
    let properties = [Property::ReasonString("no")];
    let explained = Ack { properties: properties.as_slice().into(), ..ack(ReasonCode::NotAuthorized) };
    same(V5, r#"50 09 0007 87 05 1F 0002 "no""#, Packet::Pubrec(explained));
    wrong(V3_1_1, "40 03 0007 00", ReasonCode::MalformedPacket);
    wrong(V3_1_1, "40 02 0000", ReasonCode::MalformedPacket);
    wrong(V5, "62 03 0007 97", ReasonCode::ProtocolError);
    wrong(V5, "40 03 0007 92", ReasonCode::ProtocolError);
    // [MQTT-3.6.1-1]; a 3.1 client may set DUP there.
    wrong(V3_1_1, "60 02 0007", ReasonCode::MalformedPacket);
    wrong(V3_1_1, "6A 02 0007", ReasonCode::MalformedPacket);
    assert!(decoded(&bytes("6A 02 0007"), V3_1).is_ok());
}

#[test]
fn a_subscribe_and_its_answer() {
    let options = SubscriptionOptions {
        qos: QoS::AtLeastOnce,
        no_local: true,
        retain_as_published: true,
        retain_handling: RetainHandling::DoNotSend,
    };
    let list = [
        Subscription { filter: "a/#", options },
        Subscription { filter: "$share/g/b", options: SubscriptionOptions::new(QoS::ExactlyOnce) },
    ];
    let properties = [Property::SubscriptionIdentifier(300.try_into().unwrap())];
    let packet = Subscribe {
        packet_id: id(10),
        properties: properties.as_slice().into(),
        subscriptions: Subscriptions::Given(&list),
    };
    same(V5, r##"82 19 000A 03 0B AC02 0003 "a/#" 2D 000A "$share/g/b" 02"##, Packet::Subscribe(packet));
    let list = [Subscription { filter: "a", options: SubscriptionOptions::new(QoS::AtLeastOnce) }];
    let packet =
        Subscribe { packet_id: id(1), properties: PropertyList::EMPTY, subscriptions: Subscriptions::Given(&list) };
    same(V3_1_1, r#"82 06 0001 0001 "a" 01"#, Packet::Subscribe(packet));
    // 3.1 does not use the upper bits: they neither take the entry away nor make it No Local.
    for byte in ["01", "05", "FD"] {
        let wire = bytes(&format!(r#"82 06 0001 0001 "a" {byte}"#));
        assert_eq!(decoded(&wire, V3_1), Ok(Packet::Subscribe(packet)), "{byte}");
    }
    let suback = Suback { packet_id: id(1), properties: PropertyList::EMPTY, reasons: &[0, 2, 0x80] };
    same(V3_1_1, "90 05 0001 00 02 80", Packet::Suback(suback));
    same(V5, "90 06 0001 00 00 02 80", Packet::Suback(suback));
    let mut out = Vec::new();
    let refused = Suback { reasons: &[0x87, 1], ..suback };
    Packet::Suback(refused).encode(V3_1_1, 100, &mut out).unwrap();
    assert_eq!(out, bytes("90 04 0001 80 01"));
}

#[test]
fn malformed_subscribes_are_refused() {
    use ReasonCode::{MalformedPacket, ProtocolError};
    // [MQTT-3.8.1-1], [MQTT-3.8.3-2]
    wrong(V3_1_1, r#"80 06 0001 0001 "a" 01"#, MalformedPacket);
    wrong(V3_1_1, "82 02 0001", ProtocolError);
    wrong(V5, "82 03 0001 00", ProtocolError);
    wrong(V3_1_1, r#"82 05 0001 0001 "a""#, MalformedPacket);
    // [MQTT-3.8.3-5]: reserved bits, QoS 3, retain handling 3.
    wrong(V3_1_1, r#"82 06 0001 0001 "a" 05"#, MalformedPacket);
    wrong(V3_1_1, r#"82 06 0001 0001 "a" 03"#, MalformedPacket);
    wrong(V5, r#"82 07 0001 00 0001 "a" 41"#, MalformedPacket);
    wrong(V5, r#"82 07 0001 00 0001 "a" 30"#, ProtocolError);
    // [MQTT-3.8.3-4]
    wrong(V5, r#"82 0E 0001 00 0008 "$share/g" 04"#, ProtocolError);
    // A subscription identifier twice.
    wrong(V5, r#"82 0B 0001 04 0B 01 0B 02 0001 "a" 00"#, ProtocolError);
}

#[test]
fn an_unsubscribe_and_its_answer() {
    let filters = Filters::Given(&["a", "b/+"]);
    let packet = Unsubscribe { packet_id: id(3), properties: PropertyList::EMPTY, filters };
    same(V3_1_1, r#"A2 0A 0003 0001 "a" 0003 "b/+""#, Packet::Unsubscribe(packet));
    same(V5, r#"A2 0B 0003 00 0001 "a" 0003 "b/+""#, Packet::Unsubscribe(packet));
    let answer = |reasons| Packet::Unsuback(Unsuback { packet_id: id(3), properties: PropertyList::EMPTY, reasons });
    same(V3_1_1, "B0 02 0003", answer(&[]));
    same(V5, "B0 05 0003 00 00 11", answer(&[0, 0x11]));
    // [MQTT-3.10.3-2], [MQTT-3.10.1-1]
    wrong(V3_1_1, "A2 02 0003", ReasonCode::ProtocolError);
    wrong(V3_1_1, r#"A0 05 0003 0001 "a""#, ReasonCode::MalformedPacket);
}

#[test]
fn the_short_packets() {
    for version in [V3_1, V3_1_1, V5] {
        same(version, "C0 00", Packet::Pingreq);
        same(version, "D0 00", Packet::Pingresp);
        let properties = PropertyList::EMPTY;
        same(version, "E0 00", Packet::Disconnect(Disconnect { reason: ReasonCode::Success, properties }));
        wrong(version, "C0 01 00", ReasonCode::MalformedPacket);
        wrong(version, "C1 00", ReasonCode::MalformedPacket);
        wrong(version, "00 00", ReasonCode::MalformedPacket);
    }
    let with_will = Disconnect { reason: ReasonCode::DisconnectWithWill, properties: PropertyList::EMPTY };
    same(V5, "E0 01 04", Packet::Disconnect(with_will));
    let properties = [Property::SessionExpiryInterval(1)];
    let later = Disconnect { reason: ReasonCode::Success, properties: properties.as_slice().into() };
    same(V5, "E0 07 00 05 11 00000001", Packet::Disconnect(later));
    wrong(V3_1_1, "E0 01 00", ReasonCode::MalformedPacket);
    wrong(V5, "E0 01 01", ReasonCode::ProtocolError);
    let properties = [Property::AuthenticationMethod("x")];
    let auth = Auth { reason: ReasonCode::ContinueAuthentication, properties: properties.as_slice().into() };
    same(V5, r#"F0 06 18 04 15 0001 "x""#, Packet::Auth(auth));
    wrong(V3_1_1, "F0 00", ReasonCode::MalformedPacket);
}

#[test]
fn a_packet_is_too_large_before_its_body_comes() {
    let check = |text, max| {
        let wire = bytes(text);
        decode(&wire, V5, max).map(|packet| packet.map(|_| ())).map_err(|error| error.reason)
    };
    assert_eq!(check("30 FF FF 7F", 1000), Err(ReasonCode::PacketTooLarge));
    assert_eq!(check("30 0A", 12), Ok(None));
    assert_eq!(check("30 0A", 11), Err(ReasonCode::PacketTooLarge));
    assert_eq!(check("30 FF", 1), Ok(None));
    assert_eq!(check("30 FF FF FF FF", 1), Err(ReasonCode::MalformedPacket));
    assert_eq!(packet_length(&bytes("30 FF 01"), V5, 1000), Ok(Some(258)));
}

#[test]
fn a_padded_remaining_length_is_for_3_x_only() {
    assert_eq!(decoded(&bytes("C0 80 00"), V3_1_1), Ok(Packet::Pingreq));
    wrong(V5, "C0 80 00", ReasonCode::MalformedPacket);
}

#[test]
fn the_hot_path_writes_what_the_codec_reads() {
    let topic = crate::topic::TopicName::new("a/b").unwrap();
    let mut message =
        crate::message::Message::new(topic, &b"hi"[..], QoS::ExactlyOnce, crate::clock::UnixMillis::default());
    message.properties = Some(Box::new(crate::message::Properties {
        payload_is_utf8: Some(true),
        content_type: Some("t".into()),
        user_properties: vec![("k".into(), "v".into())],
        ..Default::default()
    }));
    let head = PublishHead {
        retain: true,
        packet_id: Some(id(5)),
        identifiers: &[1, 300],
        expiry: Some(std::time::Duration::from_millis(8001)),
        ..PublishHead::new(&message, QoS::AtLeastOnce)
    };
    let check = |version, leave_out_from, text: &str, body| {
        let mut out = Vec::new();
        assert_eq!(encode_publish(version, &head, 100, leave_out_from, &mut out), Ok(body));
        assert_eq!(out, bytes(text));
        assert_eq!(publish_length(version, &head), out.len() + if body == Body::LeftOut { 2 } else { 0 });
    };
    let v5 = r#"33 21 0003 "a/b" 0005 17 02 00000009 01 01 03 0001 "t" 26 0001 "k" 0001 "v" 0B 01 0B AC02"#;
    check(V5, 3, &format!("{v5} \"hi\""), Body::Copied);
    check(V5, 2, v5, Body::LeftOut);
    check(V3_1_1, 3, r#"33 09 0003 "a/b" 0005 "hi""#, Body::Copied);
    let mut out = vec![9];
    assert_eq!(encode_publish(V5, &head, 34, 3, &mut out), Err(EncodeError::PacketTooLarge));
    assert_eq!(out, [9]);
}

#[test]
fn what_does_not_fit_leaves_the_buffer_as_it_was() {
    let mut out = vec![1, 2, 3];
    let packet = Packet::Publish(publish("a/b", QoS::AtMostOnce, None, b"hi"));
    assert_eq!(packet.encode(V3_1_1, 8, &mut out), Err(EncodeError::PacketTooLarge));
    let long = "x".repeat(65_536);
    let packet = Packet::Connect(Connect { client_id: &long, ..connect(V5) }.into());
    assert_eq!(packet.encode(V5, MAX_PACKET_BYTES, &mut out), Err(EncodeError::FieldTooLong));
    assert_eq!(out, [1, 2, 3]);
}
