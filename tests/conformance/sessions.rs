//! MQTT 5.0 §3.3, §4.3, §4.4, §4.8.2, §4.9: what a session owes its client, and the client its session.

use std::time::{Duration, Instant};

use fieldgate::hub;
use tokio::net::TcpStream;

use crate::harness::{Broker, CONNACK_5, Peer, connect};
use crate::{broker_that_rejects, until_away};

/// A CONNECT of 5.0 with properties, as hex.
fn connect_with(client_id: &str, flags: u8, properties: &str) -> String {
    let length = crate::harness::bytes(properties).len();
    let total = 13 + length + client_id.len();
    format!(
        r#"10 {total:02X} 0004 "MQTT" 05 {flags:02X} 003C {length:02X} {properties} {:04X} "{client_id}""#,
        client_id.len()
    )
}

/// A client of 5.0 that connected with these flags and properties, and subscribed to `a` with QoS 2.
async fn subscriber_with(broker: &Broker, flags: u8, properties: &str) -> Peer<TcpStream> {
    let mut to = broker.open().await;
    to.send(&connect_with("to", flags, properties)).await;
    to.expect(CONNACK_5).await;
    to.send(r#"82 07 0001 00 0001 "a" 02"#).await;
    to.expect("90 04 0001 00 02").await;
    to
}

// [MQTT-3.3.4-9], [MQTT-3.3.4-10], [MQTT-4.9.0-1] to [MQTT-4.9.0-3]
#[tokio::test]
async fn no_more_messages_are_unacknowledged_than_the_client_takes() {
    let broker = Broker::start().await;
    let mut to = subscriber_with(&broker, 2, "21 0002").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"32 06 0001 "a" 0001 "1" 34 06 0001 "a" 0002 "2" 32 06 0001 "a" 0003 "3" 62 02 0002"#).await;
    from.expect("40 02 0001 50 02 0002 40 02 0003 70 02 0002").await;
    to.expect(r#"32 07 0001 "a" 0001 00 "1" 34 07 0001 "a" 0002 00 "2""#).await;
    to.expect_nothing().await;
    // QoS 0 and other packets are not held up by it.
    from.send(r#"30 04 0001 "a" "0""#).await;
    to.expect(r#"30 05 0001 "a" 00 "0""#).await;
    to.send(r#"82 07 0002 00 0001 "b" 00"#).await;
    to.expect("90 04 0002 00 00").await;
    // PUBREC gives no place back, PUBCOMP does.
    to.send("50 02 0002").await;
    to.expect("62 02 0002").await;
    to.expect_nothing().await;
    to.send("70 02 0002").await;
    to.expect(r#"32 07 0001 "a" 0003 00 "3""#).await;
    // [MQTT-4.4.0-2]: refused is acknowledged: the place is free again, and it is not sent again.
    from.send(r#"34 06 0001 "a" 0004 "4""#).await;
    from.expect("50 02 0004").await;
    to.expect_nothing().await;
    to.send("40 03 0001 80").await;
    to.expect(r#"34 07 0001 "a" 0004 00 "4""#).await;
    from.send(r#"32 06 0001 "a" 0005 "5""#).await;
    from.expect("40 02 0005").await;
    to.send("50 03 0004 97").await;
    to.expect(r#"32 07 0001 "a" 0005 00 "5""#).await;
    to.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-4.4.0-1], [MQTT-3.3.1-1], [MQTT-3.3.4-9]
#[tokio::test]
async fn what_is_sent_again_keeps_to_the_receive_maximum_of_the_new_connection() {
    let broker = Broker::start().await;
    let mut to = subscriber_with(&broker, 2, "11 00000064").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"32 06 0001 "a" 0001 "1" 34 06 0001 "a" 0002 "2" 32 06 0001 "a" 0003 "3""#).await;
    from.expect("40 02 0001 50 02 0002 40 02 0003").await;
    to.expect(r#"32 07 0001 "a" 0001 00 "1" 34 07 0001 "a" 0002 00 "2" 32 07 0001 "a" 0003 00 "3""#).await;
    drop(to);
    until_away(&broker, "to").await;
    let mut to = broker.open().await;
    to.send(&connect_with("to", 0, "11 00000064 21 0001")).await;
    to.expect(r#"20 0E 01 00 0B 21 0400 27 00100000 22 000A 3A 07 0001 "a" 0001 00 "1""#).await;
    to.expect_nothing().await;
    to.send("40 02 0001").await;
    to.expect(r#"3C 07 0001 "a" 0002 00 "2""#).await;
    // [MQTT-4.3.3-6]: once released it is only the PUBREL that is sent again.
    to.send("50 02 0002").await;
    to.expect("62 02 0002").await;
    to.expect_nothing().await;
    drop(to);
    until_away(&broker, "to").await;
    let mut to = broker.open().await;
    to.send(&connect_with("to", 0, "11 00000064")).await;
    to.expect(r#"20 0E 01 00 0B 21 0400 27 00100000 22 000A 62 02 0002 3A 07 0001 "a" 0003 00 "3""#).await;
    to.send("70 02 0002 40 02 0003").await;
    to.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-4.3.3-8] to [MQTT-4.3.3-12], [MQTT-4.3.2-4], [MQTT-4.3.2-5], [MQTT-3.3.1-3], [MQTT-2.2.1-5]
#[tokio::test]
async fn a_packet_identifier_is_in_use_until_its_handshake_is_over() {
    let broker = Broker::start().await;
    let mut to = broker.connect_3("to").await;
    to.send(r#"82 06 0001 0001 "a" 01"#).await;
    to.expect("90 03 0001 01").await;
    let mut from = broker.open().await;
    from.send(&connect_with("from", 2, "11 00000064")).await;
    from.expect(CONNACK_5).await;
    // The DUP flag is the sender's own affair.
    from.send(r#"3A 07 0001 "a" 0001 00 "1" 32 07 0001 "a" 0001 00 "2""#).await;
    from.expect("40 02 0001 40 02 0001").await;
    to.expect(r#"32 06 0001 "a" 0001 "1" 32 06 0001 "a" 0002 "2""#).await;
    from.send(r#"34 07 0001 "a" 0001 00 "3""#).await;
    from.expect("50 02 0001").await;
    to.expect(r#"32 06 0001 "a" 0003 "3""#).await;
    drop(from);
    until_away(&broker, "from").await;
    let mut from = broker.open().await;
    from.send(&connect_with("from", 0, "11 00000064")).await;
    from.expect("20 0E 01 00 0B 21 0400 27 00100000 22 000A").await;
    from.send(r#"3C 07 0001 "a" 0001 00 "3""#).await;
    from.expect("50 02 0001").await;
    to.expect_nothing().await;
    from.send("62 02 0001").await;
    from.expect("70 02 0001").await;
    // From here on it is a new message.
    from.send(r#"34 07 0001 "a" 0001 00 "4""#).await;
    from.expect("50 02 0001").await;
    to.expect(r#"32 06 0001 "a" 0004 "4""#).await;
    from.send("62 02 0001 62 02 0001").await;
    from.expect("70 02 0001 70 03 0001 92").await;
    broker.stop().await;
}

// [MQTT-4.3.3-10]: what was accepted stays accepted, although it would be refused by now.
#[tokio::test]
async fn a_repeated_message_is_answered_as_the_first_time() {
    let broker = broker_that_rejects(2).await;
    let mut from = broker.connect_5("from").await;
    from.send(r#"34 07 0001 "a" 0001 00 "1""#).await;
    from.expect("50 02 0001").await;
    from.send(r#"3C 07 0001 "a" 0001 00 "1""#).await;
    from.expect("50 02 0001").await;
    // Another one is refused, and [MQTT-4.3.3-9] its identifier is free for the next.
    from.send(r#"34 07 0001 "a" 0002 00 "2""#).await;
    from.expect("50 03 0002 97").await;
    let mut to = broker.open().await;
    to.send(&connect("to", 4, 0)).await;
    to.expect(r#"20 02 01 00 34 06 0001 "a" 0001 "1""#).await;
    to.send("50 02 0001 70 02 0001").await;
    to.expect("62 02 0001").await;
    to.expect_nothing().await;
    from.send(r#"34 07 0001 "a" 0002 00 "3" 62 02 0001"#).await;
    from.expect("50 02 0002 70 02 0001").await;
    to.expect(r#"34 06 0001 "a" 0002 "3""#).await;
    broker.stop().await;
}

// [MQTT-3.3.4-7]: seen by the client before the close.
#[tokio::test]
async fn more_messages_than_the_receive_maximum_end_the_connection() {
    let two = |settings: &mut fieldgate::listener::Settings| settings.limits.receive_maximum = 2;
    let broker = Broker::start_with(two, hub::Settings::default(), None).await;
    let mut peer = broker.open().await;
    peer.send(&connect("c", 5, 2)).await;
    peer.expect("20 0E 00 00 0B 21 0002 27 00100000 22 000A").await;
    peer.send(r#"34 06 0001 "a" 0001 00 34 06 0001 "a" 0002 00 34 06 0001 "a" 0003 00"#).await;
    peer.expect("50 03 0001 10 50 03 0002 10").await;
    peer.expect_close(Some(0x93)).await;
    broker.stop().await;
}

// [MQTT-3.3.2-5], [MQTT-3.3.2-6]
#[tokio::test]
async fn a_message_expires_and_is_forwarded_with_the_time_that_is_left() {
    let broker = Broker::start().await;
    let mut to = broker.open().await;
    to.send(&connect_with("to", 2, "11 00000064")).await;
    to.expect(CONNACK_5).await;
    to.send(r#"82 07 0001 00 0001 "a" 01 E0 00"#).await;
    to.expect("90 04 0001 00 01").await;
    to.expect_close(None).await;
    let mut from = broker.connect_5("from").await;
    let start = Instant::now();
    from.send(r#"33 0C 0001 "a" 0001 05 02 00000001 "1" 32 0C 0001 "a" 0002 05 02 00000064 "2""#).await;
    from.expect("40 02 0001 40 02 0002").await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let mut to = broker.open().await;
    to.send(&connect_with("to", 0, "11 00000064")).await;
    to.expect("20 0E 01 00 0B 21 0400 27 00100000 22 000A").await;
    let mut got = [0; 14];
    tokio::io::AsyncReadExt::read_exact(&mut to.stream, &mut got).await.unwrap();
    let waited = start.elapsed().as_secs() as u8;
    let left = got[12];
    assert!(left <= 99 && left >= 99 - waited.min(99), "{left} after {waited} s");
    got[12] = 0x64;
    // The sequence, and so the identifier, of the expired one is spent.
    assert_eq!(got.to_vec(), crate::harness::bytes(r#"32 0C 0001 "a" 0002 05 02 00000064 "2""#));
    // The retained one has expired as well.
    to.send(r#"40 02 0002 82 07 0002 00 0001 "a" 00"#).await;
    to.expect("90 04 0002 00 00").await;
    to.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-3.3.2-7], [MQTT-3.3.2-12], [MQTT-3.1.2-26], [MQTT-3.1.2-27], [MQTT-3.3.2-11]
#[tokio::test]
async fn topic_aliases_belong_to_their_connection_and_its_limits() {
    let broker = Broker::start().await;
    let mut to = broker.open().await;
    to.send(&connect_with("to", 2, "22 0001")).await;
    to.expect(CONNACK_5).await;
    to.send(r##"82 07 0001 00 0001 "#" 00"##).await;
    to.expect("90 04 0001 00 00").await;
    let mut plain = broker.connect_5("plain").await;
    plain.send(r##"82 07 0001 00 0001 "#" 00"##).await;
    plain.expect("90 04 0001 00 00").await;
    let mut from = broker.connect_5("from").await;
    for alias in 1..=10 {
        from.send(&format!(r#"30 0B 0004 "top{}" 03 23 {alias:04X} "x""#, alias - 1)).await;
        let topic = format!("top{}", alias - 1);
        plain.expect(&format!(r#"30 08 0004 "{topic}" 00 "x""#)).await;
        match alias {
            1 => to.expect(&format!(r#"30 0B 0004 "{topic}" 03 23 0001 "x""#)).await,
            _ => to.expect(&format!(r#"30 08 0004 "{topic}" 00 "x""#)).await,
        }
    }
    from.send(r#"30 07 0000 03 23 0001 "y" 30 07 0000 03 23 000A "z""#).await;
    plain.expect(r#"30 08 0004 "top0" 00 "y" 30 08 0004 "top9" 00 "z""#).await;
    to.expect(r#"30 07 0000 03 23 0001 "y" 30 08 0004 "top9" 00 "z""#).await;
    let mut again = broker.connect_5("from").await;
    again.send(r#"30 07 0000 03 23 0001 "y""#).await;
    again.expect_close(Some(0x82)).await;
    broker.stop().await;
}

// [MQTT-3.3.2-4], [MQTT-3.3.2-15] to [MQTT-3.3.2-18], [MQTT-3.3.2-20], [MQTT-1.5.4-3], [MQTT-4.7.3-4]
#[tokio::test]
async fn a_message_reaches_its_subscriber_unaltered() {
    let broker = Broker::start().await;
    let mut to = broker.connect_5("to").await;
    to.send(r##"82 07 0001 00 0001 "#" 00"##).await;
    to.expect("90 04 0001 00 00").await;
    let mut from = broker.connect_5("from").await;
    // A topic of a byte order mark, an A with a ring in two characters, and empty levels.
    let body = r#"0009 EFBBBF "/A" CC8A "//"
        28 01 01 03 0002 "ct" 08 0003 "r/t" 09 0003 00FF80
        26 0001 "b" 0001 "1" 26 0001 "a" 0001 "2" 26 0001 "b" 0001 "1" "h" C3A9 "!""#;
    from.send(&format!("30 38 {body}")).await;
    to.expect(&format!("30 38 {body}")).await;
    // What says nothing stays as well: a format of 0, an empty content type, correlation data and user property.
    let body = r#"0001 "a" 0D 01 00 03 0000 09 0000 26 0000 0000 "x""#;
    from.send(&format!("30 12 {body}")).await;
    to.expect(&format!("30 12 {body}")).await;
    broker.stop().await;
}

// §3.3.2.3.2, §3.1.3.2.3
#[tokio::test]
async fn a_payload_that_is_not_what_it_is_said_to_be_is_refused_where_configured() {
    let check = |settings: &mut fieldgate::listener::Settings| settings.limits.check_payload_format = true;
    let broker = Broker::start_with(check, hub::Settings::default(), None).await;
    let mut to = broker.connect_3("to").await;
    to.send(r##"82 06 0001 0001 "#" 02"##).await;
    to.expect("90 03 0001 02").await;
    let mut from = broker.connect_5("from").await;
    // At QoS 0 there is no answer; the alias that came with it is good.
    from.send(r#"30 0A 0001 "a" 05 01 01 23 0001 FF 30 08 0000 05 01 01 23 0001"#).await;
    to.expect(r#"30 03 0001 "a""#).await;
    from.send(r#"32 09 0001 "a" 0001 02 01 01 C0 34 09 0001 "a" 0002 02 01 01 ED"#).await;
    from.expect("40 03 0001 99 50 03 0002 99").await;
    // The identifier is free. U+0000 is a character here, and without the word for it anything goes.
    from.send(r#"34 09 0001 "a" 0002 02 01 01 00 32 09 0001 "a" 0001 02 01 00 FF 30 05 0001 "a" 00 FF"#).await;
    from.expect("50 02 0002 40 02 0001").await;
    to.expect(r#"30 04 0001 "a" FF 34 06 0001 "a" 0001 00 32 06 0001 "a" 0002 FF"#).await;
    let mut metrics = fieldgate::observe::Metrics::default();
    broker.observe.collect(&mut metrics);
    assert!(metrics.render().contains("fieldgate_listener_payload_format_invalid_total{listener=\"test\"} 3\n"));
    for (will, answer) in [("FF", 0x99), ("41", 0)] {
        let mut peer = broker.open().await;
        peer.send(&format!(r#"10 17 0004 "MQTT" 05 06 003C 00 0001 "c" 02 01 01 0001 "w" 0001 {will}"#)).await;
        let mut connack = [0; 4];
        tokio::io::AsyncReadExt::read_exact(&mut peer.stream, &mut connack).await.unwrap();
        assert_eq!((connack[0], connack[3]), (0x20, answer));
    }
    broker.stop().await;
    // By default it is between the clients.
    let broker = Broker::start().await;
    let mut from = broker.connect_5("from").await;
    from.send(r#"32 09 0001 "a" 0001 02 01 01 C0"#).await;
    from.expect("40 03 0001 10").await;
    broker.stop().await;
}

// [MQTT-4.5.0-1], [MQTT-4.6.0-5], [MQTT-4.6.0-6]
#[tokio::test]
async fn messages_of_a_topic_stay_in_order() {
    let broker = Broker::start().await;
    let mut to = broker.connect_3("to").await;
    to.send(r#"82 06 0001 0001 "a" 02"#).await;
    to.expect("90 03 0001 02").await;
    let mut from = broker.connect_3("from").await;
    for qos in [0x30, 0x32, 0x34] {
        let id = |index: u16| if qos == 0x30 { String::new() } else { format!("{:04X}", index + 1) };
        let length = if qos == 0x30 { 5 } else { 7 };
        let script: String =
            (0..50).map(|index| format!(r#"{qos:02X} {length:02X} 0001 "a" {} {index:04X}"#, id(index))).collect();
        from.send(&script).await;
        let mut expected = Vec::new();
        for index in 0..50_u16 {
            // The identifiers of the second fifty go on from the first.
            let out = match qos {
                0x34 => format!("{:04X}", index + 51),
                _ => id(index),
            };
            expected.push(format!(r#"{qos:02X} {length:02X} 0001 "a" {out} {index:04X}"#));
        }
        to.expect(&expected.concat()).await;
    }
    broker.stop().await;
}

// [MQTT-4.6.0-4]
#[tokio::test]
async fn pubrels_keep_the_order_of_their_pubrecs() {
    let broker = Broker::start().await;
    let mut to = broker.connect_5("to").await;
    to.send(r#"82 07 0001 00 0001 "a" 02"#).await;
    to.expect("90 04 0001 00 02").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"34 05 0001 "a" 0001 34 05 0001 "a" 0002 34 05 0001 "a" 0003"#).await;
    to.expect(r#"34 06 0001 "a" 0001 00 34 06 0001 "a" 0002 00 34 06 0001 "a" 0003 00"#).await;
    to.send("50 02 0001 50 02 0002 50 02 0003").await;
    to.expect("62 02 0001 62 02 0002 62 02 0003").await;
    broker.stop().await;
}

// [MQTT-4.3.3-7], [MQTT-4.3.3-13]
#[tokio::test]
async fn a_qos_2_delivery_that_was_begun_does_not_expire() {
    let broker = Broker::start().await;
    let mut to = subscriber_with(&broker, 2, "11 00000064").await;
    let mut from = broker.connect_5("from").await;
    from.send(r#"34 0C 0001 "a" 0001 05 02 00000001 "1""#).await;
    from.expect("50 02 0001").await;
    to.expect(r#"34 0C 0001 "a" 0001 05 02 00000001 "1""#).await;
    drop(to);
    until_away(&broker, "to").await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    // Both sides go on with the handshake.
    from.send("62 02 0001").await;
    from.expect("70 02 0001").await;
    let mut to = broker.open().await;
    to.send(&connect_with("to", 0, "11 00000064")).await;
    to.expect(r#"20 0E 01 00 0B 21 0400 27 00100000 22 000A 3C 0C 0001 "a" 0001 05 02 00000000 "1""#).await;
    to.send("50 02 0001").await;
    to.expect("62 02 0001").await;
    to.send("70 02 0001").await;
    to.expect_nothing().await;
    broker.stop().await;
}
