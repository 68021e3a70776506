//! Messages from publisher to subscriber.

use crate::harness::{Broker, CONNACK_5, connect};

#[tokio::test]
async fn every_qos_from_every_version_to_every_version() {
    let broker = Broker::start().await;
    let mut old = broker.connect_3("old").await;
    old.send(r##"82 08 0001 0003 "a/#" 02"##).await;
    old.expect("90 03 0001 02").await;
    let mut new = broker.connect_5("new").await;
    new.send(r#"82 09 0001 00 0003 "+/b" 01"#).await;
    new.expect("90 04 0001 00 01").await;

    let mut from = broker.connect_3("from").await;
    from.send(r#"30 07 0003 "a/b" "q0""#).await;
    old.expect(r#"30 07 0003 "a/b" "q0""#).await;
    new.expect(r#"30 08 0003 "a/b" 00 "q0""#).await;
    from.send(r#"32 09 0003 "a/b" 0007 "q1""#).await;
    from.expect("40 02 0007").await;
    old.expect(r#"32 09 0003 "a/b" 0001 "q1""#).await;
    new.expect(r#"32 0A 0003 "a/b" 0001 00 "q1""#).await;
    old.send("40 02 0001").await;
    new.send("40 02 0001").await;

    // QoS 2 in, exactly once although it is sent again; out at the QoS each was granted.
    from.send(r#"34 09 0003 "a/b" 0008 "q2""#).await;
    from.expect("50 02 0008").await;
    from.send(r#"3C 09 0003 "a/b" 0008 "q2""#).await;
    from.expect("50 02 0008").await;
    from.send("62 02 0008").await;
    from.expect("70 02 0008").await;
    old.expect(r#"34 09 0003 "a/b" 0002 "q2""#).await;
    new.expect(r#"32 0A 0003 "a/b" 0002 00 "q2""#).await;
    new.send("40 02 0002").await;
    old.send("50 02 0002").await;
    old.expect("62 02 0002").await;
    old.send("70 02 0002").await;
    for peer in [&mut old, &mut new, &mut from] {
        peer.expect_nothing().await;
    }

    // And from 5.0, which is told that somebody, or nobody, gets it.
    let mut from = broker.connect_5("from5").await;
    from.send(r#"32 0A 0003 "a/b" 0001 00 "x1""#).await;
    from.expect("40 02 0001").await;
    from.send(r#"32 0A 0003 "z/z" 0002 00 "x2""#).await;
    from.expect("40 03 0002 10").await;
    from.send("62 02 0009").await;
    from.expect("70 03 0009 92").await;
    old.expect(r#"32 09 0003 "a/b" 0003 "x1""#).await;
    new.send("50 02 0063").await;
    new.expect(r#"32 0A 0003 "a/b" 0003 00 "x1" 62 03 0063 92"#).await;
    broker.stop().await;
}

#[tokio::test]
async fn unsubscribed_is_silent() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"82 0B 0001 00 0001 "a" 00 0001 "b" 02"#).await;
    peer.expect("90 05 0001 00 00 02").await;
    peer.send(r#"A2 09 0002 00 0001 "a" 0001 "x""#).await;
    peer.expect("B0 05 0002 00 00 11").await;
    peer.send(r#"30 04 0001 "a" 00 30 05 0001 "b" 00 "1""#).await;
    peer.expect(r#"30 05 0001 "b" 00 "1""#).await;
    peer.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-3.3.1-5] to [MQTT-3.3.1-13]
#[tokio::test]
async fn retained_messages_wait_for_their_subscribers() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"31 05 0001 "r" 00 "1""#).await;
    peer.send(r#"82 07 0001 00 0001 "r" 00"#).await;
    peer.expect(r#"90 04 0001 00 00 31 05 0001 "r" 00 "1""#).await;
    // To those who are there already it is a message like others, unless they want to see the flag.
    peer.send(r#"31 05 0001 "r" 00 "2""#).await;
    peer.expect(r#"30 05 0001 "r" 00 "2""#).await;
    peer.send(r#"82 07 0002 00 0001 "r" 28"#).await;
    peer.expect("90 04 0002 00 00").await;
    peer.send(r#"31 05 0001 "r" 00 "3""#).await;
    peer.expect(r#"31 05 0001 "r" 00 "3""#).await;
    // An empty one takes it away.
    peer.send(r#"31 04 0001 "r" 00"#).await;
    peer.expect(r#"31 04 0001 "r" 00"#).await;
    peer.send(r#"82 07 0003 00 0001 "r" 00"#).await;
    peer.expect("90 04 0003 00 00").await;
    peer.expect_nothing().await;
    broker.stop().await;
}

#[tokio::test]
async fn what_5_0_adds_to_a_message_is_passed_on_and_left_out_for_3_1_1() {
    let broker = Broker::start().await;
    let mut new = broker.connect_5("new").await;
    new.send(r#"82 09 0001 02 0B 07 0001 "a" 00"#).await;
    new.expect("90 04 0001 00 00").await;
    let mut old = broker.connect_3("old").await;
    old.send(r#"82 06 0001 0001 "a" 00"#).await;
    old.expect("90 03 0001 00").await;
    let mut from = broker.connect_5("from").await;
    from.send(
        r#"30 23 0001 "a" 1E 01 01 02 00000064 03 0001 "t" 08 0001 "r" 09 0002 "id" 26 0001 "k" 0001 "v" 23 0001 "1""#,
    )
    .await;
    new.expect(
        r#"30 22 0001 "a" 1D 02 00000064 01 01 03 0001 "t" 08 0001 "r" 09 0002 "id" 26 0001 "k" 0001 "v" 0B 07 "1""#,
    )
    .await;
    old.expect(r#"30 04 0001 "a" "1""#).await;
    // The alias stands for the topic from now on.
    from.send(r#"30 07 0000 03 23 0001 "2""#).await;
    old.expect(r#"30 04 0001 "a" "2""#).await;
    new.expect(r#"30 07 0001 "a" 02 0B 07 "2""#).await;
    broker.stop().await;
}

// [MQTT-3.8.3-3]
#[tokio::test]
async fn a_bridge_and_a_no_local_subscriber_do_not_hear_themselves() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"82 07 0001 00 0001 "a" 04 30 05 0001 "a" 00 "1""#).await;
    peer.expect("90 04 0001 00 00").await;
    peer.expect_nothing().await;
    let mut bridge = broker.open().await;
    bridge.send(&connect("b", 0x84, 2)).await;
    bridge.expect("20 02 00 00").await;
    bridge.send(r#"82 06 0001 0001 "a" 00 31 04 0001 "a" "2""#).await;
    bridge.expect("90 03 0001 00").await;
    bridge.expect_nothing().await;
    peer.expect(r#"30 05 0001 "a" 00 "2""#).await;
    peer.send(r#"31 05 0001 "a" 00 "3""#).await;
    bridge.expect(r#"31 04 0001 "a" "3""#).await;
    broker.stop().await;
}

// [MQTT-3.1.2-24], [MQTT-3.1.2-25]
#[tokio::test]
async fn a_message_larger_than_a_client_takes_is_left_out() {
    let broker = Broker::start().await;
    let mut small = broker.open().await;
    small.send(r#"10 13 0004 "MQTT" 05 02 003C 05 27 00000014 0001 "s""#).await;
    small.expect(CONNACK_5).await;
    small.send(r#"82 07 0001 00 0001 "a" 01"#).await;
    small.expect("90 04 0001 00 01").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"32 14 0001 "a" 0001 "123456789012345" 32 06 0001 "a" 0002 "x""#).await;
    from.expect("40 02 0001 40 02 0002").await;
    small.expect(r#"32 07 0001 "a" 0002 00 "x""#).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_large_message_arrives_whole_between_small_ones() {
    let broker = Broker::start().await;
    let mut to = broker.connect_3("to").await;
    to.send(r#"82 06 0001 0001 "a" 00"#).await;
    to.expect("90 03 0001 00").await;
    let mut from = broker.connect_5("from").await;
    let large = "5A".repeat(900_000);
    // 900,004 bytes of remaining length: A4 F7 36.
    from.send(&format!(r#"30 05 0001 "a" 00 "1" 30 A4 F7 36 0001 "a" 00 {large} 30 05 0001 "a" 00 "2""#)).await;
    to.expect(&format!(r#"30 04 0001 "a" "1" 30 A3 F7 36 0001 "a" {large} 30 04 0001 "a" "2""#)).await;
    broker.stop().await;
}

// [MQTT-4.6.0-5]
#[tokio::test]
async fn a_burst_arrives_complete_and_in_order() {
    const MESSAGES: usize = 5000;
    let broker = Broker::start().await;
    let mut to = broker.connect_3("to").await;
    to.send(r#"82 06 0001 0001 "a" 00"#).await;
    to.expect("90 03 0001 00").await;
    let mut from = broker.connect_3("from").await;
    let message = |index: usize| format!(r#"30 07 0001 "a" {index:08X}"#);
    let script: String = (0..MESSAGES).map(message).collect();
    let (sent, received) = (from.send(&script), to.expect(&script));
    tokio::join!(sent, received);
    broker.stop().await;
}

#[tokio::test]
async fn a_subscriber_that_does_not_read_stops_nobody() {
    const MESSAGES: usize = 10_000;
    let broker = Broker::start().await;
    let mut stuck = broker.connect_3("stuck").await;
    let mut reader = broker.connect_3("reader").await;
    for peer in [&mut stuck, &mut reader] {
        peer.send(r#"82 06 0001 0001 "a" 00"#).await;
        peer.expect("90 03 0001 00").await;
    }
    let mut from = broker.connect_3("from").await;
    let padding = "00".repeat(996);
    // 1,003 bytes of remaining length: EB 07.
    let message = |index: usize| format!(r#"30 EB 07 0001 "a" {index:08X} {padding}"#);
    let send = async {
        for index in 0..MESSAGES {
            from.send(&message(index)).await;
        }
    };
    let receive = async {
        for index in 0..MESSAGES {
            reader.expect(&message(index)).await;
        }
    };
    tokio::join!(send, receive);
    stuck.expect(&message(0)).await;
    broker.stop().await;
}

#[tokio::test]
async fn the_gateways_own_numbers_stand_under_mosquittos_names() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_3("c").await;
    peer.send(r##"82 12 0001 000D "$SYS/broker/#" 00"##).await;
    peer.expect("90 03 0001 00").await;
    let names = [
        "bytes/received",
        "bytes/sent",
        "clients/connected",
        "clients/expired",
        "clients/maximum",
        "clients/total",
        "clients/disconnected",
        "load/bytes/received/5min",
        "load/connections/1min",
        "load/publish/dropped/15min",
        "load/publish/received/1min",
        "load/publish/sent/1min",
        "load/sockets/1min",
        "messages/inflight",
        "messages/received",
        "messages/sent",
        "messages/stored",
        "publish/messages/dropped",
        "publish/messages/received",
        "publish/messages/sent",
        "retained messages/count",
        "store/messages/bytes",
        "store/messages/count",
        "subscriptions/count",
        "uptime",
        "version",
    ];
    let mut missing: std::collections::BTreeSet<_> = names.into_iter().collect();
    while !missing.is_empty() {
        let mut head = [0; 4];
        let read = tokio::io::AsyncReadExt::read_exact(&mut peer.stream, &mut head);
        tokio::time::timeout(crate::harness::PATIENCE, read).await.unwrap_or_else(|_| panic!("{missing:?}")).unwrap();
        assert_eq!(head[0] & 0xFE, 0x30);
        let mut rest = vec![0; usize::from(head[1]) - 2];
        tokio::io::AsyncReadExt::read_exact(&mut peer.stream, &mut rest).await.unwrap();
        let (topic, value) = rest.split_at(head[3].into());
        let topic = str::from_utf8(topic).unwrap().strip_prefix("$SYS/broker/").unwrap();
        let value = str::from_utf8(value).unwrap();
        assert!(matches!(topic, "version" | "uptime") || value.parse::<f64>().is_ok(), "{topic}: {value}");
        missing.remove(topic);
    }
    broker.stop().await;
}
