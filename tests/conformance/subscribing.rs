//! MQTT 5.0 §3.8 to §3.11, §4.7, §4.8: subscriptions, and which messages they bring.

use fieldgate::hub;

use crate::harness::{Broker, CONNACK_5, connect};
use crate::until_away;

// [MQTT-3.8.4-1] to [MQTT-3.8.4-7], [MQTT-3.9.3-1], [MQTT-3.10.4-4] to [MQTT-3.10.4-6], [MQTT-3.11.3-1]
#[tokio::test]
async fn each_filter_is_answered_in_its_place() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"82 0F 1234 00 0001 "a" 02 0001 "b" 00 0001 "c" 01"#).await;
    peer.expect("90 06 1234 00 02 00 01").await;
    peer.send(r#"A2 0C 4321 00 0001 "x" 0001 "b" 0001 "b""#).await;
    peer.expect("B0 06 4321 00 11 00 11").await;
    let mut old = broker.connect_3("d").await;
    old.send(r#"82 0A 1234 0001 "a" 02 0001 "b" 00"#).await;
    old.expect("90 04 1234 02 00").await;
    old.send(r#"A2 08 4321 0001 "x" 0001 "b""#).await;
    old.expect("B0 02 4321").await;
    broker.stop().await;
}

// [MQTT-3.8.4-3], [MQTT-3.8.4-4], [MQTT-3.3.1-9] to [MQTT-3.3.1-11]
#[tokio::test]
async fn the_same_filter_again_replaces_the_subscription() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"33 07 0001 "r" 0001 00 "1""#).await;
    peer.expect("40 03 0001 10").await;
    // Retain handling 0: sent each time; 1: only for what is new; 2: never. At the QoS of the new subscription.
    peer.send(r#"82 07 0001 00 0001 "r" 01"#).await;
    peer.expect(r#"90 04 0001 00 01 33 07 0001 "r" 0001 00 "1""#).await;
    peer.send(r#"40 02 0001 82 07 0002 00 0001 "r" 00"#).await;
    peer.expect(r#"90 04 0002 00 00 31 05 0001 "r" 00 "1""#).await;
    peer.send(r#"82 07 0003 00 0001 "r" 10 82 07 0004 00 0001 "r" 20"#).await;
    peer.expect("90 04 0003 00 00 90 04 0004 00 00").await;
    peer.send(r#"32 07 0001 "r" 0001 00 "2""#).await;
    // One copy, at the last QoS.
    peer.expect("40 02 0001").await;
    peer.expect(r#"30 05 0001 "r" 00 "2""#).await;
    peer.expect_nothing().await;
    // [MQTT-3.3.1-8]: that was not retained, and has not replaced what was.
    peer.send(r#"A2 06 0005 00 0001 "r" 82 07 0006 00 0001 "r" 10"#).await;
    peer.expect(r#"B0 04 0005 00 00 90 04 0006 00 00 31 05 0001 "r" 00 "1""#).await;
    peer.send(r#"A2 06 0005 00 0001 "r" 82 07 0006 00 0001 "r" 20"#).await;
    peer.expect("B0 04 0005 00 00 90 04 0006 00 00").await;
    peer.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-3.3.4-2] to [MQTT-3.3.4-4]; 3.1.1 [MQTT-3.3.5-1]
#[tokio::test]
async fn overlapping_subscriptions_bring_one_copy_at_the_highest_qos_with_all_identifiers() {
    let broker = Broker::start().await;
    let mut to = broker.connect_5("to").await;
    to.send(r#"82 0B 0001 02 0B 01 0003 "a/b" 00"#).await;
    to.expect("90 04 0001 00 00").await;
    to.send(r##"82 0B 0002 02 0B 02 0003 "a/#" 02"##).await;
    to.expect("90 04 0002 00 02").await;
    to.send(r#"82 09 0003 00 0003 "+/b" 01"#).await;
    to.expect("90 04 0003 00 01").await;
    let mut old = broker.connect_3("old").await;
    old.send(r##"82 0E 0001 0003 "a/b" 00 0003 "a/#" 02"##).await;
    old.expect("90 04 0001 00 02").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"34 08 0003 "a/b" 0001 "x""#).await;
    from.expect("50 02 0001").await;
    old.expect(r#"34 08 0003 "a/b" 0001 "x""#).await;
    let mut got = [0; 15];
    tokio::io::AsyncReadExt::read_exact(&mut to.stream, &mut got).await.unwrap();
    // The two identifiers may come in either order.
    if got[11] == 2 {
        got.swap(11, 13);
    }
    assert_eq!(got.to_vec(), crate::harness::bytes(r#"34 0D 0003 "a/b" 0001 04 0B 01 0B 02 "x""#));
    for peer in [&mut to, &mut old] {
        peer.expect_nothing().await;
    }
    broker.stop().await;
}

// [MQTT-4.7.2-1], [MQTT-4.7.1-1], [MQTT-4.7.1-2], [MQTT-4.7.3-4], [MQTT-3.3.2-3]
#[tokio::test]
async fn filters_match_as_the_book_says() {
    let broker = Broker::start().await;
    for (filter, topics) in [
        ("#", vec!["sport", "/", "a//b"]),
        ("+", vec!["sport", "Sport"]),
        ("sport/#", vec!["sport", "sport/", "sport/x", "sport/x/y"]),
        ("sport/+", vec!["sport/", "sport/x"]),
        ("+/+", vec!["/", "sport/", "sport/x"]),
        ("/+", vec!["/"]),
        ("Sport", vec!["Sport"]),
        ("$own/#", vec!["$own/x"]),
        ("a/+/b", vec!["a//b"]),
    ] {
        let mut to = broker.connect_3("to").await;
        let length = filter.len();
        to.send(&format!(r#"82 {:02X} 0001 {length:04X} "{filter}" 00"#, length + 5)).await;
        to.expect("90 03 0001 00").await;
        let mut from = broker.connect_3("from").await;
        for topic in ["sport", "Sport", "sport/", "sport/x", "sport/x/y", "/", "a//b", "$own/x"] {
            let packet = format!(r#"30 {:02X} {:04X} "{topic}""#, topic.len() + 2, topic.len());
            from.send(&packet).await;
            from.expect_nothing().await;
            let wanted = topics.contains(&topic) || filter == "#" && !topic.starts_with('$');
            match wanted {
                true => to.expect(&packet).await,
                false => to.expect_nothing().await,
            }
        }
    }
    broker.stop().await;
}

// [MQTT-3.10.4-1] to [MQTT-3.10.4-3]
#[tokio::test]
async fn what_was_begun_before_an_unsubscribe_is_finished() {
    let broker = Broker::start().await;
    let mut to = broker.connect_5("to").await;
    to.send(r#"82 07 0001 00 0001 "a" 02"#).await;
    to.expect("90 04 0001 00 02").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"34 06 0001 "a" 0001 "1""#).await;
    from.expect("50 02 0001").await;
    to.expect(r#"34 07 0001 "a" 0001 00 "1""#).await;
    // Compared character by character: neither of these is "a".
    to.send(r##"A2 09 0002 00 0001 "A" 0001 "#""##).await;
    to.expect("B0 05 0002 00 11 11").await;
    to.send(r#"A2 06 0003 00 0001 "a""#).await;
    to.expect("B0 04 0003 00 00").await;
    from.send(r#"34 06 0001 "a" 0002 "2""#).await;
    from.expect("50 02 0002").await;
    to.send("50 02 0001").await;
    to.expect("62 02 0001").await;
    to.send("70 02 0001").await;
    to.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-4.8.2-3] to [MQTT-4.8.2-6]
#[tokio::test]
async fn a_shared_message_stays_with_the_member_it_was_given_to() {
    let broker = Broker::start().await;
    let mut one = broker.open().await;
    one.send(r#"10 13 0004 "MQTT" 05 02 003C 05 11 00000064 0001 "1""#).await;
    one.expect(CONNACK_5).await;
    one.send(r#"82 10 0001 00 000A "$share/g/a" 02"#).await;
    one.expect("90 04 0001 00 02").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"34 06 0001 "a" 0001 "1" 62 02 0001"#).await;
    from.expect("50 02 0001 70 02 0001").await;
    one.expect(r#"34 07 0001 "a" 0001 00 "1""#).await;
    let mut two = broker.connect_5("2").await;
    two.send(r#"82 10 0001 00 000A "$share/g/a" 01"#).await;
    two.expect("90 04 0001 00 01").await;
    drop(one);
    until_away(&broker, "1").await;
    // QoS 2 is the first member's alone; what comes now goes to the one who is there, at the QoS it was granted.
    two.expect_nothing().await;
    from.send(r#"34 06 0001 "a" 0002 "2" 62 02 0002"#).await;
    from.expect("50 02 0002 70 02 0002").await;
    two.expect(r#"32 07 0001 "a" 0001 00 "2""#).await;
    // Refused is refused for all.
    two.send("40 03 0001 80").await;
    two.expect_nothing().await;
    let mut one = broker.open().await;
    one.send(r#"10 13 0004 "MQTT" 05 00 003C 05 11 00000064 0001 "1""#).await;
    one.expect(r#"20 0E 01 00 0B 21 0400 27 00100000 22 000A 3C 07 0001 "a" 0001 00 "1""#).await;
    one.expect_nothing().await;
    // It ends: nobody else gets what it had begun.
    let mut clean = broker.open().await;
    clean.send(&connect("1", 5, 2)).await;
    clean.expect(CONNACK_5).await;
    two.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-3.3.1-9]: all of them, whatever the limits of a queue are.
#[tokio::test]
async fn retained_messages_of_any_number_come_whole_and_once() {
    const MESSAGES: usize = 3000;
    let mut settings = hub::Settings::default();
    settings.limits.queue.max_messages = 10;
    settings.limits.queue.max_bytes = 1000;
    settings.limits.max_inflight = 10;
    let broker = Broker::start_with(|_| {}, settings, None).await;
    let mut from = broker.connect_3("from").await;
    for index in 0..MESSAGES {
        let first = if index.is_multiple_of(2) { "31 0A" } else { "33 0C" };
        let id = if index.is_multiple_of(2) { "" } else { "0001" };
        from.send(&format!(r#"{first} 0006 "r/{index:04}" {id} {index:04X}"#)).await;
        if !index.is_multiple_of(2) {
            from.expect("40 02 0001").await;
        }
    }
    let mut to = broker.connect_3("to").await;
    to.send(r##"82 08 0001 0003 "r/#" 01"##).await;
    to.expect("90 03 0001 01").await;
    let mut got = std::collections::BTreeSet::new();
    for _ in 0..MESSAGES {
        let mut head = [0; 10];
        tokio::io::AsyncReadExt::read_exact(&mut to.stream, &mut head).await.unwrap();
        let index: usize = str::from_utf8(&head[6..]).unwrap().parse().unwrap();
        assert!(got.insert(index), "{index} came twice");
        if index.is_multiple_of(2) {
            assert_eq!(head[..2], [0x31, 0x0A]);
        } else {
            assert_eq!(head[..2], [0x33, 0x0C]);
            let mut id = [0; 2];
            tokio::io::AsyncReadExt::read_exact(&mut to.stream, &mut id).await.unwrap();
            to.send(&format!("40 02 {:02X}{:02X}", id[0], id[1])).await;
        }
        to.expect(&format!("{index:04X}")).await;
    }
    to.expect_nothing().await;
    broker.stop().await;
}

// §4.8.2: no retained messages for a shared subscription; both kinds of subscription get a copy of their own.
#[tokio::test]
async fn a_shared_subscription_gets_no_retained_messages() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"31 05 0001 "a" 00 "1""#).await;
    peer.send(r#"82 10 0001 00 000A "$share/g/a" 00"#).await;
    peer.expect("90 04 0001 00 00").await;
    peer.expect_nothing().await;
    peer.send(r#"82 07 0002 00 0001 "a" 20"#).await;
    peer.expect("90 04 0002 00 00").await;
    peer.send(r#"30 05 0001 "a" 00 "2""#).await;
    peer.expect(r#"30 05 0001 "a" 00 "2" 30 05 0001 "a" 00 "2""#).await;
    peer.expect_nothing().await;
    broker.stop().await;
}

// §4.8.2: what a member had not acknowledged, or not been sent, when its session ended is for another one.
#[tokio::test]
async fn what_a_member_leaves_behind_goes_to_another() {
    let broker = Broker::start().await;
    let mut one = broker.open().await;
    one.send(r#"10 11 0004 "MQTT" 05 02 003C 03 21 0002 0001 "1""#).await;
    one.expect(CONNACK_5).await;
    one.send(r#"82 10 0001 00 000A "$share/g/a" 02"#).await;
    one.expect("90 04 0001 00 02").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"32 06 0001 "a" 0001 "1" 34 06 0001 "a" 0002 "2" 34 06 0001 "a" 0003 "3" 32 06 0001 "a" 0004 "4""#)
        .await;
    from.expect("40 02 0001 50 02 0002 50 02 0003 40 02 0004").await;
    one.expect(r#"32 07 0001 "a" 0001 00 "1" 34 07 0001 "a" 0002 00 "2""#).await;
    let mut other = broker.connect_5("other").await;
    other.send(r#"82 10 0001 00 000A "$share/h/a" 01"#).await;
    other.expect("90 04 0001 00 01").await;
    let mut two = broker.connect_5("2").await;
    two.send(r#"82 10 0001 00 000A "$share/g/a" 01"#).await;
    two.expect("90 04 0001 00 01").await;
    drop(one);
    // Not the second: it is QoS 2 and was begun.
    two.expect(r#"32 07 0001 "a" 0001 00 "1" 32 07 0001 "a" 0002 00 "3" 32 07 0001 "a" 0003 00 "4""#).await;
    two.expect_nothing().await;
    other.expect_nothing().await;
    broker.stop().await;
}
