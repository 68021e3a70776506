//! The server's side of a connection in packet scripts, statement by statement.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::proto::mqtt::server::{Accept, ConnectRequest, Event, Expiry, Server, Settings};

/// A connection with the bytes it has written, and a clock that is moved by hand.
struct Peer {
    server: Server<u32>,
    out: Vec<u8>,
    now: Instant,
}

const CONNECT_3: &str = r#"10 0D 0004 "MQTT" 04 02 003C 0001 "c""#;
const CONNECT_5: &str = r#"10 0E 0004 "MQTT" 05 02 003C 00 0001 "c""#;

impl Peer {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self { server: Server::new(Arc::new(settings), now), out: Vec::new(), now }
    }

    fn connected(connect: &str, settings: Settings) -> Self {
        let mut peer = Self::new(settings);
        peer.connect(connect).unwrap();
        peer.server.accept(&Accept::default(), peer.now, &mut peer.out).unwrap();
        peer.out.clear();
        peer
    }

    fn connect(&mut self, connect: &str) -> Result<Box<ConnectRequest>, ProtocolError> {
        let wire = bytes(connect);
        match self.send(&wire)? {
            Event::Connect(request) => Ok(request),
            event => panic!("{event:?}"),
        }
    }

    fn send<'a>(&'a mut self, wire: &'a [u8]) -> Result<Event<'a>, ProtocolError> {
        let (packet, _) = self.server.decode(wire)?.expect("a whole packet");
        self.server.note_input(self.now);
        self.server.handle(packet, &mut self.out)
    }

    /// Sends what is wrong and expects these bytes before the close.
    fn refused(&mut self, text: &str, answer: &str) {
        let wire = bytes(text);
        let error = self.send(&wire).map(|event| format!("{event:?}")).expect_err(text);
        self.server.close(error, &wire, &mut self.out);
        let expected = bytes(answer);
        // A reason string follows where there is one; the words are not part of the contract.
        assert_eq!(without_reason_string(&self.out), expected, "{text}: {error}");
    }
}

/// CONNACK and DISCONNECT with their reason string taken off, lengths mended.
fn without_reason_string(wire: &[u8]) -> Vec<u8> {
    if wire.is_empty() {
        return Vec::new();
    }
    let version = if wire[0] == 0x20 && wire[1] == 2 { Version::V3_1_1 } else { Version::V5 };
    let mut out = Vec::new();
    let packet = match decoded(wire, version).unwrap() {
        Packet::Connack(connack) => Packet::Connack(Connack { properties: PropertyList::EMPTY, ..connack }),
        Packet::Disconnect(disconnect) => {
            Packet::Disconnect(Disconnect { properties: PropertyList::EMPTY, ..disconnect })
        }
        packet => packet,
    };
    packet.encode(version, MAX_PACKET_BYTES, &mut out).unwrap();
    out
}

#[test]
fn a_connect_is_handed_over_and_accepted() {
    let mut peer = Peer::new(Settings::default());
    let request = peer
        .connect(
            r#"10 2E 0004 "MQTT" 05 EE 003C 05 11 0000000A 0001 "c"
               05 18 00000007 0003 "w/t" 0004 "gone" 0004 "user" 0002 "pw""#,
        )
        .unwrap();
    assert_eq!((&*request.client_id, request.clean_start), ("c", true));
    assert_eq!(request.expiry, Expiry::After(Duration::from_secs(10)));
    assert_eq!(request.user_name.as_deref(), Some("user"));
    assert_eq!(request.password.as_deref(), Some(&b"pw"[..]));
    let will = request.will.unwrap();
    assert_eq!(
        (will.topic.as_str(), &will.payload[..], will.qos, will.retain),
        ("w/t", &b"gone"[..], QoS::AtLeastOnce, true)
    );
    assert_eq!(will.delay, Duration::from_secs(7));
    let accept = Accept { session_present: true, ..Accept::default() };
    peer.server.accept(&accept, peer.now, &mut peer.out).unwrap();
    assert_eq!(peer.out, bytes("20 0E 01 00 0B 21 0400 27 00100000 22 000A"));
}

#[test]
fn a_connack_of_3_x_is_four_bytes() {
    let mut peer = Peer::new(Settings::default());
    peer.connect(CONNECT_3).unwrap();
    peer.server.accept(&Accept { session_present: true, ..Accept::default() }, peer.now, &mut peer.out).unwrap();
    assert_eq!(peer.out, bytes("20 02 01 00"));
}

// [MQTT-3.1.0-1], [MQTT-3.1.0-2]
#[test]
fn connect_comes_first_and_once() {
    let mut peer = Peer::new(Settings::default());
    assert!(peer.server.decode(&bytes("C0")).is_err());
    peer.refused("C0 00", "");
    Peer::connected(CONNECT_3, Settings::default()).refused(CONNECT_3, "");
    Peer::connected(CONNECT_5, Settings::default()).refused(CONNECT_5, "E0 01 82");
}

#[test]
fn a_connect_that_cannot_be_accepted_is_answered_in_its_version() {
    let check = |connect: &str, answer: &str| Peer::new(Settings::default()).refused(connect, answer);
    check(r#"10 0D 0004 "MQTT" 09 02 003C 0001 "c""#, "20 03 00 84 00");
    check(r#"10 0D 0004 "MQTT" 02 02 003C 0001 "c""#, "20 02 00 01");
    // 3.1.1 [MQTT-3.1.3-8], [MQTT-3.1.3-9]
    check(r#"10 0C 0004 "MQTT" 04 00 003C 0000"#, "20 02 00 02");
    check(r#"10 0E 0006 "MQIsdp" 03 02 003C 0000"#, "20 02 00 02");
    // MQTT 5.0 §4.12: a method we do not know; data without a method.
    check(r#"10 12 0004 "MQTT" 05 02 003C 04 15 0001 "x" 0001 "c""#, "20 03 00 8C 00");
    check(r#"10 12 0004 "MQTT" 05 02 003C 04 16 0001 "x" 0001 "c""#, "20 03 00 82 00");
    // Malformed: 5.0 is told, 3.x is only closed on.
    check(r#"10 0E 0004 "MQTT" 05 03 003C 00 0001 "c""#, "20 03 00 81 00");
    check(r#"10 0D 0004 "MQTT" 04 03 003C 0001 "c""#, "");
    check(r#"10 0D 0004 "HTTP" 04 02 003C 0001 "c""#, "");
}

#[test]
fn an_empty_client_id_is_fine_for_a_clean_session() {
    assert_eq!(&*Peer::new(Settings::default()).connect(r#"10 0C 0004 "MQTT" 04 02 003C 0000"#).unwrap().client_id, "");
    let mut peer = Peer::new(Settings { topic_alias_maximum: 0, ..Settings::default() });
    peer.connect(r#"10 0D 0004 "MQTT" 05 00 003C 00 0000"#).unwrap();
    let accept = Accept { assigned_client_id: Some("x1"), expiry: Some(Expiry::Never), ..Accept::default() };
    peer.server.accept(&accept, peer.now, &mut peer.out).unwrap();
    assert_eq!(peer.out, bytes(r#"20 15 00 00 12 11 FFFFFFFF 21 0400 27 00100000 12 0002 "x1""#));
}

#[test]
fn a_stranger_cannot_send_much() {
    let peer = Peer::new(Settings::default());
    let error = peer.server.decode(&bytes("10 FF FF 3F")).unwrap_err();
    assert_eq!(error.reason, ReasonCode::PacketTooLarge);
}

// [MQTT-3.1.2-22]
#[test]
fn silence_of_one_and_a_half_keep_alives_ends_the_connection() {
    let mut peer = Peer::new(Settings::default());
    assert_eq!(peer.server.deadline(), Some(peer.now + Duration::from_secs(10)));
    peer.connect(CONNECT_5).unwrap();
    peer.server.accept(&Accept::default(), peer.now, &mut peer.out).unwrap();
    let deadline = peer.now + Duration::from_secs(90);
    assert_eq!(peer.server.deadline(), Some(deadline));
    peer.now += Duration::from_secs(80);
    peer.send(&bytes("C0 00")).unwrap();
    assert_eq!(peer.server.check_deadline(deadline), Ok(()));
    let error = peer.server.check_deadline(deadline + Duration::from_secs(80)).unwrap_err();
    assert_eq!(error.reason, ReasonCode::KeepAliveTimeout);
    let quiet = Peer::connected(r#"10 0D 0004 "MQTT" 04 02 0000 0001 "c""#, Settings::default());
    assert_eq!(quiet.server.deadline(), None);
}

// [MQTT-3.2.2-21]
#[test]
fn a_5_0_client_is_given_a_keep_alive_where_its_own_is_too_long() {
    let settings = Settings { max_keep_alive: Some(30), topic_alias_maximum: 0, ..Settings::default() };
    let mut peer = Peer::new(settings.clone());
    peer.connect(CONNECT_5).unwrap();
    peer.server.accept(&Accept::default(), peer.now, &mut peer.out).unwrap();
    assert_eq!(peer.out, bytes("20 0E 00 00 0B 21 0400 27 00100000 13 001E"));
    assert_eq!(peer.server.deadline(), Some(peer.now + Duration::from_secs(45)));
    let peer = Peer::connected(CONNECT_3, settings);
    assert_eq!(peer.server.deadline(), Some(peer.now + Duration::from_secs(90)));
}

// [MQTT-4.6.0-2], [MQTT-4.6.0-3]
#[test]
fn acknowledgements_keep_the_order_of_their_packets() {
    let mut peer = Peer::connected(CONNECT_3, Settings::default());
    let (server, out) = (&mut peer.server, &mut peer.out);
    server.acknowledge(AckKind::Puback, id(1), ReasonCode::Success, None, out);
    assert_eq!(*out, bytes("40 02 0001"));
    out.clear();
    server.acknowledge(AckKind::Puback, id(2), ReasonCode::Success, Some(2), out);
    server.acknowledge(AckKind::Pubrec, id(3), ReasonCode::Success, Some(3), out);
    server.acknowledge(AckKind::Puback, id(4), ReasonCode::Success, None, out);
    assert_eq!(server.acks().len(), 3);
    let done = |up_to: u32| move |&receipt: &u32| if receipt <= up_to { AckState::Done } else { AckState::Pending };
    server
        .flush_acks(|&receipt| if receipt == 3 { AckState::Done } else { AckState::Pending }, |_, _| {}, out)
        .unwrap();
    assert_eq!(*out, bytes(""));
    server.flush_acks(done(2), |_, _| {}, out).unwrap();
    assert_eq!(*out, bytes("40 02 0002"));
    server.flush_acks(done(3), |_, _| {}, out).unwrap();
    assert_eq!(*out, bytes("40 02 0002 50 02 0003 40 02 0004"));
    server.acknowledge(AckKind::Puback, id(5), ReasonCode::Success, Some(5), out);
    assert!(server.flush_acks(|_| AckState::Failed, |_, _| {}, out).is_err());
    let mut peer = Peer::connected(CONNECT_5, Settings::default());
    let (server, out) = (&mut peer.server, &mut peer.out);
    server.acknowledge(AckKind::Pubrec, id(5), ReasonCode::Success, Some(5), out);
    server.suback(id(6), &[ReasonCode::GrantedQoS1], vec![6, 7], out);
    server.acknowledge(AckKind::Puback, id(8), ReasonCode::Success, None, out);
    let state = |&receipt: &u32| if receipt == 5 { AckState::Failed } else { AckState::Pending };
    let mut failed = Vec::new();
    server.flush_acks(state, |kind, packet_id| failed.push((kind, packet_id)), out).unwrap();
    assert_eq!((&**out, failed), (&*bytes("50 03 0005 97"), vec![(AckKind::Pubrec, id(5))]));
    server.flush_acks(done(6), |_, _| {}, out).unwrap();
    assert_eq!(*out, bytes("50 03 0005 97"));
    server.flush_acks(done(7), |_, _| {}, out).unwrap();
    assert_eq!(*out, bytes("50 03 0005 97 90 04 0006 00 01 40 02 0008"));
}

// [MQTT-3.3.4-7]
#[test]
fn a_5_0_client_keeps_to_the_receive_maximum() {
    let settings = Settings { receive_maximum: 2, ..Settings::default() };
    let mut peer = Peer::connected(CONNECT_5, settings);
    peer.send(&bytes(r#"32 06 0001 "a" 0001 00"#)).unwrap();
    peer.send(&bytes(r#"34 06 0001 "a" 0002 00"#)).unwrap();
    peer.send(&bytes(r#"30 04 0001 "a" 00"#)).unwrap();
    // A PUBREC keeps its place in the quota; PUBACK and PUBCOMP give theirs back.
    peer.server.acknowledge(AckKind::Puback, id(1), ReasonCode::Success, None, &mut peer.out);
    peer.server.acknowledge(AckKind::Pubrec, id(2), ReasonCode::Success, None, &mut peer.out);
    peer.send(&bytes(r#"32 06 0001 "a" 0003 00"#)).unwrap();
    peer.out.clear();
    peer.refused(r#"32 06 0001 "a" 0004 00"#, "E0 01 93");
}

#[test]
fn an_inbound_topic_alias_stands_for_its_topic() {
    let mut peer = Peer::connected(CONNECT_5, Settings { topic_alias_maximum: 2, ..Settings::default() });
    let topic = |peer: &mut Peer, text: &str| match peer.send(&bytes(text)).unwrap() {
        Event::Publish(publish) => publish.topic.to_owned(),
        event => panic!("{event:?}"),
    };
    assert_eq!(topic(&mut peer, r#"30 07 0001 "a" 03 23 0002"#), "a");
    assert_eq!(topic(&mut peer, "30 06 0000 03 23 0002"), "a");
    assert_eq!(topic(&mut peer, r#"30 07 0001 "b" 03 23 0002"#), "b");
    assert_eq!(topic(&mut peer, "30 06 0000 03 23 0002"), "b");
    peer.refused("30 06 0000 03 23 0001", "E0 01 82");
    let mut peer = Peer::connected(CONNECT_5, Settings { topic_alias_maximum: 2, ..Settings::default() });
    peer.refused(r#"30 07 0001 "a" 03 23 0003"#, "E0 01 94");
}

#[test]
fn an_outbound_topic_alias_is_used_where_the_client_takes_one() {
    let mut peer = Peer::connected(r#"10 11 0004 "MQTT" 05 02 003C 03 22 0001 0001 "c""#, Settings::default());
    let mut send = |topic, payload: &[u8]| {
        let mut out = Vec::new();
        let head = PublishHead {
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
        };
        let _ = peer.server.publish(&head, usize::MAX, &mut out).unwrap();
        out
    };
    assert_eq!(send("a/b/c", b"1"), bytes(r#"30 0C 0005 "a/b/c" 03 23 0001 "1""#));
    assert_eq!(send("a/b/c", b"2"), bytes(r#"30 07 0000 03 23 0001 "2""#));
    assert_eq!(send("d/e/f", b"3"), bytes(r#"30 09 0005 "d/e/f" 00 "3""#));
}

// [MQTT-3.1.2-24], [MQTT-3.1.2-25], [MQTT-3.14.2-3]
#[test]
fn nothing_larger_than_the_client_takes_is_sent() {
    let mut peer = Peer::connected(r#"10 13 0004 "MQTT" 05 02 003C 05 27 00000010 0001 "c""#, Settings::default());
    let topic = crate::topic::TopicName::new("a").unwrap();
    let message = crate::message::Message::new(topic, "123456789012", QoS::AtMostOnce, Default::default());
    let head = PublishHead::new(&message, QoS::AtMostOnce);
    let sent = peer.server.publish(&head, usize::MAX, &mut peer.out);
    assert_eq!((sent, peer.out.len()), (Err(EncodeError::PacketTooLarge), 0));
    peer.server.close(ProtocolError::protocol("a reason that is too long"), &[], &mut peer.out);
    assert_eq!(peer.out, bytes("E0 01 82"));
}

#[test]
fn a_disconnect_says_what_becomes_of_will_and_session() {
    let check = |connect: &str, text: &str, expected: (bool, Option<Expiry>)| {
        let mut peer = Peer::connected(connect, Settings::default());
        let wire = bytes(text);
        let Ok(Event::Disconnect { publish_will, expiry }) = peer.send(&wire) else { panic!("{text}") };
        assert_eq!((publish_will, expiry), expected, "{text}");
    };
    let lasting = r#"10 13 0004 "MQTT" 05 02 003C 05 11 0000000A 0001 "c""#;
    check(CONNECT_3, "E0 00", (false, None));
    check(CONNECT_5, "E0 00", (false, None));
    check(CONNECT_5, "E0 01 04", (true, None));
    check(lasting, "E0 07 00 05 11 00000000", (false, Some(Expiry::AtOnce)));
    check(lasting, "E0 07 04 05 11 FFFFFFFF", (true, Some(Expiry::Never)));
    let mut peer = Peer::connected(CONNECT_5, Settings::default());
    peer.refused("E0 07 00 05 11 00000001", "E0 01 82");
}

#[test]
fn packets_of_a_server_and_unasked_for_auths_are_refused() {
    for text in ["20 03 00 00 00", "90 04 0001 00 00", "D0 00", "F0 00", "30 06 00 01 61 02 0B 01"] {
        Peer::connected(CONNECT_5, Settings::default()).refused(text, "E0 01 82");
    }
}

#[test]
fn the_handshakes_of_outbound_messages_are_told() {
    let mut peer = Peer::connected(CONNECT_5, Settings::default());
    let mut check = |text, expected: &str| assert_eq!(format!("{:?}", peer.send(&bytes(text)).unwrap()), expected);
    check("40 02 0007", "Acknowledged(7, Success)");
    check("40 03 0007 97", "Acknowledged(7, QuotaExceeded)");
    check("50 02 0007", "Received(7)");
    check("50 03 0007 80", "Acknowledged(7, UnspecifiedError)");
    check("70 02 0007", "Completed(7)");
    check("62 02 0007", "Release(7)");
    check("C0 00", "None");
    peer.server.release(id(7), ReasonCode::Success, &mut peer.out);
    peer.server.suback(id(1), &[ReasonCode::GrantedQoS1, ReasonCode::NotAuthorized], Vec::new(), &mut peer.out);
    peer.server.unsuback(id(2), &[ReasonCode::NoSubscriptionExisted], &mut peer.out);
    assert_eq!(peer.out, bytes("D0 00 62 02 0007 90 05 0001 00 01 87 B0 04 0002 00 11"));
}
