//! The client's life in packet scripts, statement by statement.

use std::time::{Duration, Instant};

use super::*;
use crate::proto::mqtt::client::{Client, Options};

struct Peer {
    client: Client<u32>,
    out: Vec<u8>,
    now: Instant,
}

impl Peer {
    fn new(options: Options) -> Self {
        let now = Instant::now();
        let mut peer = Self { client: Client::new(options, now), out: Vec::new(), now };
        peer.client.connect(now, &mut peer.out).unwrap();
        peer
    }

    fn connected(connack: &str) -> Self {
        let mut peer = Self::new(Options::new("c"));
        peer.check(connack, "Connected { session_present: false }");
        peer.out.clear();
        peer
    }

    fn receive(&mut self, text: &str) -> Result<String, ProtocolError> {
        let wire = bytes(text);
        let (packet, _) = self.client.decode(&wire)?.expect("a whole packet");
        Ok(format!("{:?}", self.client.handle(packet, self.now)?))
    }

    fn check(&mut self, text: &str, expected: &str) {
        assert_eq!(self.receive(text).unwrap(), expected, "{text}");
    }
}

#[test]
fn the_connect_holds_what_the_options_say() {
    let options = Options {
        clean_start: false,
        keep_alive: 30,
        session_expiry: 3600,
        user_name: Some("u".into()),
        password: Some(b"p".to_vec()),
        receive_maximum: 20,
        topic_alias_maximum: 0,
        max_packet_size: 65_536,
        ..Options::new("gw")
    };
    assert!(!format!("{options:?}").contains("112"));
    let peer = Peer::new(options.clone());
    let expected = r#"10 22 0004 "MQTT" 05 C0 001E 0D 11 00000E10 21 0014 27 00010000 0002 "gw" 0001 "u" 0001 "p""#;
    assert_eq!(peer.out, bytes(expected));
    let peer = Peer::new(Options { version: Version::V3_1_1, is_bridge: true, ..options });
    assert_eq!(peer.out, bytes(r#"10 14 0004 "MQTT" 84 C0 001E 0002 "gw" 0001 "u" 0001 "p""#));
}

#[test]
fn the_limits_of_the_server_are_taken_from_its_connack() {
    let mut peer = Peer::new(Options::new(""));
    peer.check(
        r#"20 1C 01 00 19 21 000A 24 01 25 00 27 00000040 22 0005 13 000A 12 0002 "id" 28 00"#,
        "Connected { session_present: true }",
    );
    let limits = peer.client.limits();
    assert_eq!((limits.receive_maximum, limits.max_packet_size, limits.topic_alias_maximum), (10, 64, 5));
    assert_eq!((limits.maximum_qos, limits.retain_available, limits.keep_alive), (QoS::AtLeastOnce, false, 10));
    assert_eq!((limits.assigned_client_id.as_deref(), limits.wildcard_subscriptions), (Some("id"), false));
    // [MQTT-3.1.2-21], [MQTT-3.2.2-21]: ten seconds, although it asked for sixty.
    assert_eq!(peer.client.deadline(), Some(peer.now + Duration::from_secs(10)));
}

// [MQTT-3.2.2-15], [MQTT-3.2.2-17], [MQTT-3.2.2-18]
#[test]
fn nothing_larger_and_no_more_aliases_than_the_server_takes_are_sent() {
    let mut peer = Peer::connected("20 0B 00 00 08 27 00000010 22 0001");
    let send = |peer: &mut Peer, topic: &str, payload: &str| {
        let topic = crate::topic::TopicName::new(topic).unwrap();
        let message = crate::message::Message::new(topic, payload.to_owned(), QoS::AtMostOnce, Default::default());
        let head = PublishHead::new(&message, QoS::AtMostOnce);
        peer.out.clear();
        peer.client.publish(&head, usize::MAX, peer.now, &mut peer.out).map(|_| peer.out.clone())
    };
    let aliased = r#"30 0D 0004 "t/aa" 03 23 0001 "123""#;
    // Too large, and so the alias has no meaning yet.
    assert_eq!(send(&mut peer, "t/aa", "123456"), Err(EncodeError::PacketTooLarge));
    assert_eq!(send(&mut peer, "t/aa", "123"), Ok(bytes(aliased)));
    assert_eq!(send(&mut peer, "t/aa", "123456"), Ok(bytes(r#"30 0C 0000 03 23 0001 "123456""#)));
    assert_eq!(send(&mut peer, "t/bb", "1"), Ok(bytes(r#"30 08 0004 "t/bb" 00 "1""#)));
    let long = [Subscription { filter: "a/long/filter", options: SubscriptionOptions::new(QoS::AtMostOnce) }];
    assert_eq!(peer.client.subscribe(&long, peer.now, &mut peer.out), Err(EncodeError::PacketTooLarge));
    let mut peer = Peer::connected("20 03 00 00 00");
    assert_eq!(send(&mut peer, "t/aa", "1"), Ok(bytes(r#"30 08 0004 "t/aa" 00 "1""#)));
}

// [MQTT-3.3.2-10]
#[test]
fn aliases_of_the_server_are_taken_up_to_the_number_it_was_told() {
    let mut peer = Peer::new(Options { topic_alias_maximum: 2, ..Options::new("c") });
    peer.receive("20 03 00 00 00").unwrap();
    for (text, topic) in [
        (r#"30 07 0001 "a" 03 23 0001"#, "a"),
        (r#"30 07 0001 "b" 03 23 0002"#, "b"),
        ("30 06 0000 03 23 0001", "a"),
        ("30 06 0000 03 23 0002", "b"),
    ] {
        let event = peer.receive(text).unwrap();
        assert!(event.contains(&format!("topic: {topic:?}")), "{event}");
    }
    assert_eq!(peer.receive(r#"30 07 0001 "a" 03 23 0003"#).unwrap_err().reason, ReasonCode::TopicAliasInvalid);
}

#[test]
fn a_refusal_is_told_with_its_reason() {
    let mut peer = Peer::new(Options::new("c"));
    peer.check(r#"20 07 00 87 04 1F 0001 "x""#, r#"Refused { reason: NotAuthorized, detail: Some("x") }"#);
    let mut peer = Peer::new(Options { version: Version::V3_1_1, ..Options::new("c") });
    peer.check("20 02 00 05", "Refused { reason: NotAuthorized, detail: None }");
}

#[test]
fn messages_are_sent_as_the_server_allows() {
    let mut peer = Peer::connected("20 0A 00 00 07 24 01 25 00 21 000A");
    let topic = crate::topic::TopicName::new("a").unwrap();
    let message = crate::message::Message::new(topic, "1", QoS::ExactlyOnce, Default::default());
    let head = PublishHead { packet_id: Some(id(3)), retain: true, ..PublishHead::new(&message, QoS::ExactlyOnce) };
    let sent = peer.client.publish(&head, usize::MAX, peer.now, &mut peer.out).unwrap();
    assert_eq!((sent.qos, sent.body), (QoS::AtLeastOnce, Body::Copied));
    assert_eq!(peer.out, bytes(r#"32 07 0001 "a" 0003 00 "1""#));
    let mut peer = Peer::connected("20 05 00 00 02 24 00");
    let sent = peer.client.publish(&head, usize::MAX, peer.now, &mut peer.out).unwrap();
    assert_eq!(sent.qos, QoS::AtMostOnce);
    assert_eq!(peer.out, bytes(r#"31 05 0001 "a" 00 "1""#));
}

#[test]
fn an_answer_belongs_to_its_request() {
    let mut peer = Peer::connected("20 03 00 00 00");
    let options = SubscriptionOptions::new(QoS::AtLeastOnce);
    let list = [Subscription { filter: "a", options }, Subscription { filter: "b", options }];
    let first = peer.client.subscribe(&list, peer.now, &mut peer.out).unwrap();
    let second = peer.client.unsubscribe(&["a"], peer.now, &mut peer.out).unwrap();
    assert_ne!(first, second);
    assert_eq!(peer.out, bytes(r#"82 0B FFFF 00 0001 "a" 01 0001 "b" 01 A2 06 FFFE 00 0001 "a""#));
    peer.check("B0 04 FFFE 00 00", "Unsubscribed { packet_id: 65534 }");
    assert!(peer.receive("90 04 FFFF 00 01").is_err());
    assert!(peer.receive("90 05 FFFE 00 01 01").is_err());
    let mut peer = Peer::connected("20 03 00 00 00");
    peer.client.subscribe(&list, peer.now, &mut peer.out).unwrap();
    peer.check("90 05 FFFF 00 01 87", "Subscribed { packet_id: 65535, reasons: [1, 135] }");
}

#[test]
fn pings_keep_the_connection_alive_and_find_a_dead_one() {
    let mut peer = Peer::connected("20 03 00 00 00");
    let start = peer.now;
    assert_eq!(peer.client.deadline(), Some(start + Duration::from_secs(60)));
    peer.client.check_deadline(start + Duration::from_secs(59), &mut peer.out).unwrap();
    assert!(peer.out.is_empty());
    peer.now = start + Duration::from_secs(60);
    peer.client.check_deadline(peer.now, &mut peer.out).unwrap();
    assert_eq!(peer.out, bytes("C0 00"));
    assert_eq!(peer.client.deadline(), Some(start + Duration::from_secs(80)));
    peer.now += Duration::from_secs(1);
    peer.check("D0 00", "None");
    assert_eq!(peer.client.deadline(), Some(start + Duration::from_secs(120)));
    peer.client.check_deadline(start + Duration::from_secs(120), &mut peer.out).unwrap();
    let error = peer.client.check_deadline(start + Duration::from_secs(140), &mut peer.out).unwrap_err();
    assert_eq!(error.reason, ReasonCode::KeepAliveTimeout);
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    let mut peer = Peer::new(Options::new("c"));
    let later = peer.now + Duration::from_secs(20);
    assert_eq!(peer.client.deadline(), Some(later));
    assert!(peer.client.check_deadline(later, &mut peer.out).is_err());
    let mut peer = Peer::connected("20 03 00 00 00");
    let list = [Subscription { filter: "a", options: SubscriptionOptions::new(QoS::AtMostOnce) }];
    peer.client.subscribe(&list, peer.now, &mut peer.out).unwrap();
    assert!(peer.client.check_deadline(peer.now + Duration::from_secs(20), &mut peer.out).is_err());
}

#[test]
fn the_handshakes_of_both_directions_are_told() {
    let mut peer = Peer::connected("20 03 00 00 00");
    peer.check("40 02 0007", "Acknowledged(7, Success)");
    peer.check("50 02 0007", "Received(7)");
    peer.check("70 02 0007", "Completed(7)");
    peer.check("62 02 0007", "Release(7)");
    peer.client.acknowledge(AckKind::Puback, id(1), ReasonCode::Success, Some(1), &mut peer.out);
    assert!(peer.out.is_empty());
    peer.client.flush_acks(|_| AckState::Done, |_, _| {}, &mut peer.out).unwrap();
    peer.client.release(id(7), peer.now, &mut peer.out);
    peer.client.disconnect(peer.now, &mut peer.out);
    assert_eq!(peer.out, bytes("40 02 0001 62 02 0007 E0 00"));
    let mut peer = Peer::connected("20 03 00 00 00");
    peer.check("E0 01 8B", "Disconnected { reason: ServerShuttingDown, detail: None }");
}

#[test]
fn packets_of_a_client_and_packets_before_the_connack_are_refused() {
    for text in ["C0 00", "82 07 0001 00 0001 61 00", CONNECT] {
        assert!(Peer::connected("20 03 00 00 00").receive(text).is_err(), "{text}");
        assert!(Peer::new(Options::new("c")).receive(text).is_err(), "{text}");
    }
    assert!(Peer::new(Options::new("c")).receive("D0 00").is_err());
    let mut peer = Peer::connected("20 03 00 00 00");
    let error = peer.receive("F0 00").unwrap_err();
    peer.client.close(error, peer.now, &mut peer.out);
    assert!(peer.out.starts_with(&bytes("E0")) && peer.out[2] == 0x82);
}

const CONNECT: &str = r#"10 0E 0004 "MQTT" 05 02 003C 00 0001 "c""#;
