//! What MQTT 3.1 and 3.1.1 say in their own words, or in bytes that 5.0 has otherwise.

use std::time::{Duration, Instant};

use fieldgate::hub;
use fieldgate::hub::access::{self, Pattern, Rule, Subject, User, hash_password};

use crate::harness::{Broker, connect};
use crate::{broker_that_rejects, until_away};

// 3.1.1 [MQTT-3.1.3-1], [MQTT-3.1.2-9], [MQTT-3.1.2-19], [MQTT-3.1.2-21]; 5.0 [MQTT-3.1.3-1]
#[tokio::test]
async fn the_fields_of_a_connect_come_in_their_order() {
    let user = User { name: "ann".into(), password_hash: hash_password(b"secret").unwrap().into() };
    let access = access::Settings { users: vec![user], ..access::Settings::default() };
    let broker = Broker::start_with(|_| {}, hub::Settings { access, ..hub::Settings::default() }, None).await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "w" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    for (connect, connack) in [
        (r#"10 22 0006 "MQIsdp" 03 C6 003C 0001 "c" 0001 "w" 0001 "x" 0003 "ann" 0006 "secret""#, "20 02 00 00"),
        (r#"10 20 0004 "MQTT" 04 C6 003C 0001 "c" 0001 "w" 0001 "x" 0003 "ann" 0006 "secret""#, "20 02 00 00"),
        (
            r#"10 22 0004 "MQTT" 05 C6 003C 00 0001 "c" 00 0001 "w" 0001 "x" 0003 "ann" 0006 "secret""#,
            crate::harness::CONNACK_5,
        ),
    ] {
        let mut peer = broker.open().await;
        peer.send(connect).await;
        peer.expect(connack).await;
        let session = broker.hub.sessions().into_iter().find(|session| &*session.client_id == "c").unwrap();
        assert_eq!(session.user.as_deref(), Some("ann"));
        drop(peer);
        watcher.expect(r#"30 04 0001 "w" "x""#).await;
    }
    // The password first: it is taken for the name.
    let mut peer = broker.open().await;
    peer.send(r#"10 1A 0004 "MQTT" 04 C2 003C 0001 "c" 0006 "secret" 0003 "ann""#).await;
    peer.expect("20 02 00 04").await;
    broker.stop().await;
}

// 3.1.1 [MQTT-3.1.2-8], [MQTT-3.1.2-9], [MQTT-3.1.2-16], [MQTT-3.1.2-17]
#[tokio::test]
async fn a_will_is_published_with_its_qos_and_flag() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_5("watcher").await;
    // Retain as published, so that the flag is seen.
    watcher.send(r#"82 07 0001 00 0001 "w" 0A"#).await;
    watcher.expect("90 04 0001 00 02").await;
    let mut id = 0;
    for head in [r#"0004 "MQTT" 04"#, r#"0006 "MQIsdp" 03"#] {
        for (flags, first) in [(0x06, 0x30), (0x26, 0x31), (0x0E, 0x32), (0x2E, 0x33), (0x16, 0x34), (0x36, 0x35)] {
            let body = format!(r#"{head} {flags:02X} 003C 0001 "c" 0001 "w" 0001 "x""#);
            let mut peer = broker.open().await;
            peer.send(&format!("10 {:02X} {body}", crate::harness::bytes(&body).len())).await;
            peer.expect("20 02 00 00").await;
            drop(peer);
            if flags & 0x18 == 0 {
                watcher.expect(&format!(r#"{first:02X} 05 0001 "w" 00 "x""#)).await;
            } else {
                id += 1;
                watcher.expect(&format!(r#"{first:02X} 07 0001 "w" {id:04X} 00 "x""#)).await;
            }
            let mut late = broker.connect_3("late").await;
            late.send(r#"82 06 0001 0001 "w" 02"#).await;
            late.expect("90 03 0001 02").await;
            match first {
                0x31 => late.expect(r#"31 04 0001 "w" "x""#).await,
                0x33 | 0x35 => late.expect(&format!(r#"{first:02X} 06 0001 "w" 0001 "x""#)).await,
                _ => late.expect_nothing().await,
            }
            // Away with it, for those who come after.
            late.send(r#"31 03 0001 "w""#).await;
            watcher.expect(r#"31 04 0001 "w" 00"#).await;
        }
    }
    broker.stop().await;
}

// 3.1.1 [MQTT-3.1.2-12]
#[tokio::test]
async fn without_a_will_nothing_is_published() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r##"82 06 0001 0001 "#" 00"##).await;
    watcher.expect("90 03 0001 00").await;
    // The one before had one, under the same name.
    for (connect, will) in [
        (r#"10 13 0004 "MQTT" 04 04 003C 0001 "c" 0001 "w" 0001 "1""#, true),
        (r#"10 0D 0004 "MQTT" 04 00 003C 0001 "c""#, false),
    ] {
        let mut peer = broker.open().await;
        peer.send(connect).await;
        peer.expect("20 02").await;
        drop(peer);
        until_away(&broker, "c").await;
        match will {
            true => watcher.expect(r#"30 04 0001 "w" "1""#).await,
            false => watcher.expect_nothing().await,
        }
    }
    broker.stop().await;
}

// 3.1.1 [MQTT-3.1.2-7], [MQTT-3.3.1-5] to [MQTT-3.3.1-8]
#[tokio::test]
async fn retained_messages_outlive_their_session_and_the_last_one_counts_at_any_qos() {
    let broker = Broker::start().await;
    let check = async |publish: &str, answer: &str, kept: &str| {
        let mut from = broker.connect_3("from").await;
        from.send(publish).await;
        from.expect(answer).await;
        from.send("E0 00").await;
        from.expect_close(None).await;
        assert!(broker.hub.sessions().is_empty(), "its session is over");
        let mut to = broker.connect_3("to").await;
        to.send(r#"82 06 0001 0001 "r" 02"#).await;
        to.expect(&format!("90 03 0001 02 {kept}")).await;
        to.expect_nothing().await;
        to.send("E0 00").await;
        to.expect_close(None).await;
    };
    check(r#"33 06 0001 "r" 0001 "1""#, "40 02 0001", r#"33 06 0001 "r" 0001 "1""#).await;
    // QoS 0 replaces it all the same.
    check(r#"31 04 0001 "r" "2" C0 00"#, "D0 00", r#"31 04 0001 "r" "2""#).await;
    check(r#"35 06 0001 "r" 0001 "3" 62 02 0001"#, "50 02 0001 70 02 0001", r#"35 06 0001 "r" 0001 "3""#).await;
    check(r#"31 03 0001 "r" C0 00"#, "D0 00", "").await;
    broker.stop().await;
}

// 3.1.1 [MQTT-3.8.4-3], [MQTT-3.3.1-9]
#[tokio::test]
async fn the_same_filter_again_brings_the_retained_messages_and_the_new_qos() {
    let broker = Broker::start().await;
    let mut peer = broker.connect_3("c").await;
    peer.send(r#"33 06 0001 "r" 0001 "1""#).await;
    peer.expect("40 02 0001").await;
    peer.send(r#"82 06 0001 0001 "r" 01"#).await;
    peer.expect(r#"90 03 0001 01 33 06 0001 "r" 0001 "1""#).await;
    peer.send(r#"40 02 0001 82 06 0002 0001 "r" 00"#).await;
    peer.expect(r#"90 03 0002 00 31 04 0001 "r" "1""#).await;
    peer.send(r#"33 06 0001 "r" 0001 "2""#).await;
    peer.expect(r#"40 02 0001 30 04 0001 "r" "2""#).await;
    peer.expect_nothing().await;
    broker.stop().await;
}

// 3.1.1 [MQTT-2.3.1-2] to [MQTT-2.3.1-4], [MQTT-4.3.2-1], [MQTT-4.3.3-1], [MQTT-4.6.0-1]
#[tokio::test]
async fn an_identifier_is_not_given_out_again_while_it_is_in_use() {
    let mut settings = hub::Settings::default();
    settings.limits.max_inflight = 2;
    let broker = Broker::start_with(|_| {}, settings, None).await;
    let mut to = broker.open().await;
    to.send(&connect("to", 4, 0)).await;
    to.expect("20 02 00 00").await;
    to.send(r#"82 06 0001 0001 "a" 02"#).await;
    to.expect("90 03 0001 02").await;
    let mut from = broker.connect_3("from").await;
    // The publisher's identifiers have nothing to do with the subscriber's; both directions may use the same one.
    let send = r#"34 06 0001 "a" 0007 "1" 32 06 0001 "a" 0009 "2" 32 06 0001 "a" 0008 "3" 34 06 0001 "a" 0006 "4""#;
    from.send(send).await;
    from.expect("50 02 0007 40 02 0009 40 02 0008 50 02 0006").await;
    to.expect(r#"34 06 0001 "a" 0001 "1" 32 06 0001 "a" 0002 "2""#).await;
    to.send(r#"32 06 0001 "b" 0001 "x" 40 02 0002"#).await;
    to.expect("40 02 0001").await;
    to.expect(r#"32 06 0001 "a" 0003 "3""#).await;
    to.send("40 02 0003").await;
    to.expect(r#"34 06 0001 "a" 0004 "4""#).await;
    // Lost with two of them in use: both come again as they were, in their order.
    drop(to);
    until_away(&broker, "to").await;
    let mut to = broker.open().await;
    to.send(&connect("to", 4, 0)).await;
    to.expect(r#"20 02 01 00 3C 06 0001 "a" 0001 "1" 3C 06 0001 "a" 0004 "4""#).await;
    broker.stop().await;
}

// 3.1.1 [MQTT-3.3.5-2]
#[tokio::test]
async fn what_a_client_may_not_publish_is_acknowledged_and_goes_nowhere() {
    let pattern = |text| Pattern::new(text).unwrap();
    let rule =
        Rule { subject: Subject::Everyone, read: vec![pattern("#")], write: vec![pattern("open")], deny: Vec::new() };
    let access = access::Settings { rules: vec![rule], ..access::Settings::default() };
    let broker = Broker::start_with(|_| {}, hub::Settings { access, ..hub::Settings::default() }, None).await;
    let mut to = broker.connect_3("to").await;
    to.send(r##"82 06 0001 0001 "#" 00"##).await;
    to.expect("90 03 0001 00").await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"30 04 0001 "a" "1" 33 06 0001 "a" 0001 "2" 34 06 0001 "a" 0002 "3" 62 02 0002"#).await;
    from.expect("40 02 0001 50 02 0002 70 02 0002").await;
    from.send(r#"30 07 0004 "open" "4""#).await;
    to.expect(r#"30 07 0004 "open" "4""#).await;
    to.send(r#"82 06 0002 0001 "a" 00"#).await;
    to.expect("90 03 0002 00").await;
    to.expect_nothing().await;
    broker.stop().await;
}

// 3.1.1 [MQTT-4.8.0-2], [MQTT-3.2.2-6]: it has no words for "not now", so that the connection has to go; the message
// stays with the client, which sends it again, but not at once.
#[tokio::test]
async fn an_error_that_will_pass_ends_the_connection() {
    let broker = broker_that_rejects(1).await;
    let mut from = broker.open().await;
    from.send(&connect("from", 4, 0)).await;
    from.expect("20 02 00 00").await;
    let began = Instant::now();
    from.send(r#"32 06 0001 "a" 0001 "1" 34 06 0001 "a" 0002 "2""#).await;
    from.expect("40 02 0001").await;
    from.expect_close(None).await;
    assert!(began.elapsed() >= Duration::from_secs(1), "a client that comes back at once is slowed");
    let mut to = broker.open().await;
    to.send(&connect("to", 4, 0)).await;
    to.expect(r#"20 02 01 00 32 06 0001 "a" 0001 "1""#).await;
    to.send("40 02 0001").await;
    let mut from = broker.open().await;
    from.send(&connect("from", 4, 0)).await;
    from.expect("20 02 01 00").await;
    from.send(r#"3C 06 0001 "a" 0002 "2" 62 02 0002"#).await;
    from.expect("50 02 0002 70 02 0002").await;
    to.expect(r#"32 06 0001 "a" 0002 "2""#).await;
    broker.stop().await;
}

// 3.1.1 [MQTT-4.1.0-1], [MQTT-4.1.0-2], [MQTT-3.1.2-6]
#[tokio::test]
async fn a_session_lasts_at_least_as_long_as_its_connection() {
    let broker = Broker::start().await;
    for (level, clean) in [(4, 2), (4, 0)] {
        let mut peer = broker.open().await;
        peer.send(&connect("c", level, clean)).await;
        peer.expect("20 02 00 00").await;
        peer.send(r#"82 06 0001 0001 "a" 01"#).await;
        peer.expect("90 03 0001 01").await;
        let mut from = broker.connect_3("from").await;
        from.send(r#"32 06 0001 "a" 0001 "1""#).await;
        from.expect("40 02 0001").await;
        peer.expect(r#"32 06 0001 "a" 0001 "1""#).await;
        drop(peer);
        until_away(&broker, "c").await;
        let mut peer = broker.open().await;
        peer.send(&connect("c", level, 0)).await;
        match clean {
            // Nothing is left of a clean one.
            2 => peer.expect("20 02 00 00").await,
            _ => peer.expect(r#"20 02 01 00 3A 06 0001 "a" 0001 "1""#).await,
        }
        peer.expect_nothing().await;
        drop(broker.connect_3("c").await);
        until_away(&broker, "c").await;
    }
    broker.stop().await;
}

// MQTT V3.1 (IBM, 2010): what it has otherwise than 3.1.1.
#[tokio::test]
async fn a_client_of_3_1_is_served_in_its_own_words() {
    let broker = Broker::start().await;
    // No protocol of that name and level; no client id (§3.1).
    for (connect, connack) in [
        (r#"10 0F 0006 "MQIsdp" 04 02 003C 0001 "c""#, "20 02 00 01"),
        (r#"10 0E 0006 "MQIsdp" 03 02 003C 0000"#, "20 02 00 02"),
    ] {
        let mut peer = broker.open().await;
        peer.send(connect).await;
        peer.expect(connack).await;
        peer.expect_close(None).await;
    }
    let connect = r#"10 0F 0006 "MQIsdp" 03 00 003C 0001 "c""#;
    let mut peer = broker.open().await;
    peer.send(connect).await;
    peer.expect("20 02 00 00").await;
    // SUBSCRIBE may say that it is sent again, and the upper bits of its QoS are not used (§2.1, §3.8).
    peer.send(r#"8A 0A 0001 0001 "a" FE 0001 "b" 05"#).await;
    peer.expect("90 04 0001 02 01").await;
    // So may a PUBLISH of QoS 0.
    peer.send(r#"38 04 0001 "a" "0" 32 06 0001 "b" 0001 "1" 34 06 0001 "a" 0002 "2""#).await;
    peer.expect(r#"40 02 0001 50 02 0002"#).await;
    peer.expect(r#"30 04 0001 "a" "0" 32 06 0001 "b" 0001 "1" 34 06 0001 "a" 0002 "2""#).await;
    peer.send("6A 02 0002").await;
    peer.expect("70 02 0002").await;
    drop(peer);
    until_away(&broker, "c").await;
    let mut peer = broker.open().await;
    peer.send(connect).await;
    // Its CONNACK has no word for a session that was kept.
    peer.expect(r#"20 02 00 00 3A 06 0001 "b" 0001 "1" 3C 06 0001 "a" 0002 "2""#).await;
    peer.send(r#"40 02 0001 50 02 0002"#).await;
    peer.expect("62 02 0002").await;
    peer.send(r#"70 02 0002 AA 05 0003 0001 "a""#).await;
    peer.expect("B0 02 0003").await;
    peer.send(r#"30 04 0001 "a" "3""#).await;
    peer.expect_nothing().await;
    broker.stop().await;
}
