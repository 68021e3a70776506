//! MQTT 5.0 §3.1, §3.2, §3.12, §3.14, §4.12, §4.13: how a connection begins, is kept and ends.

use std::time::{Duration, Instant};

use fieldgate::hub;

use crate::harness::{Broker, CONNACK_5, connect};
use crate::until_away;

#[tokio::test]
async fn a_connect_that_breaks_a_rule_is_answered_in_its_version_and_closed_on() {
    let broker = Broker::start().await;
    for (script, reason) in [
        // [MQTT-3.1.2-2]
        (r#"10 0E 0004 "MQTT" 06 02 003C 00 0001 "c""#, Some(0x84)),
        // [MQTT-3.1.2-1]
        (r#"10 0E 0004 "HTTP" 05 02 003C 00 0001 "c""#, Some(0x81)),
        // [MQTT-3.1.2-3]
        (r#"10 0E 0004 "MQTT" 05 03 003C 00 0001 "c""#, Some(0x81)),
        (r#"10 0D 0004 "MQTT" 04 03 003C 0001 "c""#, None),
        // [MQTT-3.1.2-11], [MQTT-3.1.2-13]: a will's flags without a will.
        (r#"10 0E 0004 "MQTT" 05 0A 003C 00 0001 "c""#, Some(0x81)),
        (r#"10 0E 0004 "MQTT" 05 22 003C 00 0001 "c""#, Some(0x81)),
        (r#"10 0D 0004 "MQTT" 04 0A 003C 0001 "c""#, None),
        (r#"10 0D 0004 "MQTT" 04 22 003C 0001 "c""#, None),
        // [MQTT-3.1.2-12]: a will of QoS 3.
        (r#"10 15 0004 "MQTT" 05 1E 003C 00 0001 "c" 00 0001 "w" 0001 "x""#, Some(0x81)),
        (r#"10 13 0004 "MQTT" 04 1E 003C 0001 "c" 0001 "w" 0001 "x""#, None),
        // [MQTT-3.1.2-9], [MQTT-3.1.2-17], [MQTT-3.1.2-19]: what a flag announces is missing.
        (r#"10 0E 0004 "MQTT" 05 06 003C 00 0001 "c""#, Some(0x81)),
        (r#"10 0E 0004 "MQTT" 05 82 003C 00 0001 "c""#, Some(0x81)),
        (r#"10 0E 0004 "MQTT" 05 42 003C 00 0001 "c""#, Some(0x81)),
        // [MQTT-3.1.2-16], [MQTT-3.1.2-18]: what no flag announces is there.
        (r#"10 11 0004 "MQTT" 05 02 003C 00 0001 "c" 0001 "u""#, Some(0x81)),
        // 3.1.1 [MQTT-3.1.2-9], [MQTT-3.1.2-18] to [MQTT-3.1.2-21], [MQTT-3.1.4-1]: the same, and no CONNACK.
        (r#"10 0D 0004 "MQTT" 04 06 003C 0001 "c""#, None),
        (r#"10 10 0004 "MQTT" 04 02 003C 0001 "c" 0001 "u""#, None),
        (r#"10 0D 0004 "MQTT" 04 82 003C 0001 "c""#, None),
        (r#"10 13 0004 "MQTT" 04 82 003C 0001 "c" 0001 "u" 0001 "p""#, None),
        (r#"10 10 0004 "MQTT" 04 C2 003C 0001 "c" 0001 "u""#, None),
        // 3.1.1 [MQTT-3.1.3-3], [MQTT-3.1.3-4], [MQTT-3.1.3-10], [MQTT-3.1.3-11]
        (r#"10 0A 0004 "MQTT" 04 02 003C"#, None),
        (r#"10 0D 0004 "MQTT" 04 02 003C 0001 FF"#, None),
        (r#"10 13 0004 "MQTT" 04 06 003C 0001 "c" 0001 FF 0001 "x""#, None),
        (r#"10 10 0004 "MQTT" 04 82 003C 0001 "c" 0001 FF"#, None),
        // 3.1.1 [MQTT-3.1.2-22]: a password without a user name.
        (r#"10 10 0004 "MQTT" 04 42 003C 0001 "c" 0001 "p""#, None),
        // [MQTT-3.1.3-3], [MQTT-3.1.3-4]: no client id, or none of UTF-8.
        (r#"10 0B 0004 "MQTT" 05 02 003C 00"#, Some(0x81)),
        (r#"10 0E 0004 "MQTT" 05 02 003C 00 0001 FF"#, Some(0x81)),
        (r#"10 0E 0004 "MQTT" 05 02 003C 00 0001 00"#, Some(0x81)),
        (r#"10 10 0004 "MQTT" 05 02 003C 00 0003 EDA080"#, Some(0x81)),
        // [MQTT-3.1.3-11], [MQTT-3.1.3-12]: will topic and user name.
        (r#"10 15 0004 "MQTT" 05 06 003C 00 0001 "c" 00 0001 FF 0001 "x""#, Some(0x81)),
        (r#"10 15 0004 "MQTT" 05 06 003C 00 0001 "c" 00 0001 "+" 0001 "x""#, Some(0x90)),
        (r#"10 11 0004 "MQTT" 05 82 003C 00 0001 "c" 0001 FF"#, Some(0x81)),
        // §3.1.2.11: values and properties that must not be.
        (r#"10 11 0004 "MQTT" 05 02 003C 03 21 0000 0001 "c""#, Some(0x82)),
        (r#"10 13 0004 "MQTT" 05 02 003C 05 27 00000000 0001 "c""#, Some(0x82)),
        (r#"10 10 0004 "MQTT" 05 02 003C 02 17 02 0001 "c""#, Some(0x82)),
        (r#"10 18 0004 "MQTT" 05 02 003C 0A 11 00000001 11 00000001 0001 "c""#, Some(0x82)),
        // [MQTT-4.12.0-1]
        (r#"10 12 0004 "MQTT" 05 02 003C 04 15 0001 "x" 0001 "c""#, Some(0x8C)),
    ] {
        let mut peer = broker.open().await;
        peer.send(script).await;
        peer.expect_close(reason).await;
    }
    broker.stop().await;
}

// [MQTT-3.2.2-6], [MQTT-3.2.2-7], [MQTT-3.1.4-6], [MQTT-3.14.0-1]
#[tokio::test]
async fn what_follows_a_refused_connect_is_not_looked_at() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "a" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    let mut peer = broker.open().await;
    peer.send(r#"10 12 0004 "MQTT" 05 02 003C 04 15 0001 "x" 0001 "c" 30 05 0001 "a" 00 "1""#).await;
    // The flags are zero, and no DISCONNECT comes after the CONNACK.
    let mut answer = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut peer.stream, &mut answer).await.unwrap();
    assert_eq!((answer[0], answer.len(), answer[2], answer[3]), (0x20, usize::from(answer[1]) + 2, 0, 0x8C));
    let mut peer = broker.open().await;
    peer.send(r#"10 0C 0004 "MQTT" 04 00 003C 0000 30 04 0001 "a" "1""#).await;
    peer.expect("20 02 00 02").await;
    peer.expect_close(None).await;
    watcher.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-3.1.3-5], and more than that: whatever is UTF-8 is a client id.
#[tokio::test]
async fn any_client_id_will_do() {
    let broker = Broker::start().await;
    let long = "x".repeat(100);
    for id in ["0123456789abcdefghijklm", "nopqrstuvwxyzABCDEFGHIJ", "KLMNOPQRSTUVWXYZ", "plant/line1", "a+b#", &long] {
        let mut peer = broker.open().await;
        peer.send(&connect(id, 4, 2)).await;
        peer.expect("20 02 00 00").await;
        let mut peer = broker.open().await;
        peer.send(&connect(id, 5, 2)).await;
        peer.expect(CONNACK_5).await;
    }
    broker.stop().await;
}

// [MQTT-3.1.2-4] to [MQTT-3.1.2-6], [MQTT-3.1.2-23], [MQTT-3.2.2-2], [MQTT-3.2.2-3], [MQTT-3.1.3-2], [MQTT-4.1.0-2]
#[tokio::test]
async fn session_present_tells_whether_the_session_was_kept() {
    let broker = Broker::start().await;
    let with_expiry =
        |flags: u8, seconds: u32| format!(r#"10 13 0004 "MQTT" 05 {flags:02X} 003C 05 11 {seconds:08X} 0001 "c""#);
    let without = connect("c", 5, 0);
    for (connect, leave, present) in [
        (with_expiry(0, 100), "E0 00", 0),
        (with_expiry(0, 100), "E0 00", 1),
        // Clean start ends what there was.
        (with_expiry(2, 100), "E0 00", 0),
        (with_expiry(0, u32::MAX), "E0 00", 1),
        // The interval of this connection counts, not that of the one before.
        (without.clone(), "E0 00", 1),
        (without, "E0 00", 0),
        // DISCONNECT changes it (§3.14.2.2.2).
        (with_expiry(0, 100), "E0 07 00 05 11 00000000", 0),
        (with_expiry(0, 100), "E0 07 00 05 11 000000FF", 0),
        (with_expiry(0, 100), "E0 00", 1),
    ] {
        let mut peer = broker.open().await;
        peer.send(&connect).await;
        peer.expect(&format!("20 0E {present:02X} 00 0B 21 0400 27 00100000 22 000A")).await;
        peer.send(leave).await;
        peer.expect_close(None).await;
    }
    // 3.1.1: [MQTT-3.1.2-4], [MQTT-3.1.2-6], [MQTT-3.2.2-1] to [MQTT-3.2.2-3]
    for (clean, present) in [(0, 0), (0, 1), (2, 0), (0, 0), (0, 1)] {
        let mut peer = broker.open().await;
        peer.send(&connect("d", 4, clean)).await;
        peer.expect(&format!("20 02 {present:02X} 00")).await;
        peer.send("E0 00").await;
        peer.expect_close(None).await;
    }
    broker.stop().await;
}

// [MQTT-4.1.0-2], [MQTT-3.1.2-8]
#[tokio::test]
async fn a_session_that_has_expired_is_not_resumed_and_its_will_is_published() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "w" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    // Expiry 1 s, will delay 100 s: the session ends first.
    let connect = r#"10 1F 0004 "MQTT" 05 04 003C 05 11 00000001 0001 "c" 05 18 00000064 0001 "w" 0001 "1""#;
    let mut peer = broker.open().await;
    peer.send(connect).await;
    peer.expect(CONNACK_5).await;
    drop(peer);
    watcher.expect(r#"30 04 0001 "w" "1""#).await;
    let mut peer = broker.open().await;
    peer.send(connect).await;
    peer.expect(CONNACK_5).await;
    broker.stop().await;
}

// [MQTT-4.1.0-2]: nobody has to have looked after the session between its expiry and the next CONNECT.
#[tokio::test]
async fn a_session_ends_on_time() {
    let broker = Broker::start().await;
    let connect = r#"10 13 0004 "MQTT" 05 00 003C 05 11 00000001 0001 "c""#;
    for _ in 0..3 {
        let mut peer = broker.open().await;
        peer.send(connect).await;
        peer.expect(CONNACK_5).await;
        peer.send("E0 00").await;
        peer.expect_close(None).await;
        tokio::time::sleep(Duration::from_millis(1050)).await;
    }
    broker.stop().await;
}

// [MQTT-3.1.3-9], [MQTT-3.1.2-8]
#[tokio::test]
async fn a_delayed_will_waits_and_is_dropped_when_the_client_is_back() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "w" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    let connect = |flags: u8, delay: u32| {
        format!(r#"10 1F 0004 "MQTT" 05 {flags:02X} 003C 05 11 00000064 0001 "c" 05 18 {delay:08X} 0001 "w" 0001 "1""#)
    };
    let mut peer = broker.open().await;
    peer.send(&connect(6, 1)).await;
    peer.expect("20").await;
    let lost = Instant::now();
    drop(peer);
    watcher.expect(r#"30 04 0001 "w" "1""#).await;
    assert!(lost.elapsed() >= Duration::from_secs(1), "{:?}", lost.elapsed());
    for (flags, will) in [(4, false), (6, true)] {
        let mut peer = broker.open().await;
        peer.send(&connect(6, 100)).await;
        peer.expect("20").await;
        drop(peer);
        until_away(&broker, "c").await;
        let mut peer = broker.open().await;
        peer.send(&connect(flags, 100)).await;
        peer.expect("20").await;
        match will {
            false => watcher.expect_nothing().await,
            true => watcher.expect(r#"30 04 0001 "w" "1""#).await,
        }
        peer.send("E0 00").await;
        // Its session is let go of before the connection is closed.
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut peer.stream, &mut Vec::new()).await;
    }
    broker.stop().await;
}

// [MQTT-3.1.2-14], [MQTT-3.1.2-15], [MQTT-3.1.2-9], [MQTT-3.1.3-10]
#[tokio::test]
async fn a_will_is_published_as_it_was_given() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_5("watcher").await;
    watcher.send(r#"82 07 0001 00 0001 "w" 0A"#).await;
    watcher.expect("90 04 0001 00 02").await;
    // QoS 1, not retained; QoS 2, retained; each with user properties whose order counts.
    for (flags, first) in ["0E", "36"].into_iter().zip(["32", "35"]) {
        let mut peer = broker.open().await;
        peer.send(&format!(
            r#"10 28 0004 "MQTT" 05 {flags} 003C 00 0001 "c"
               13 01 01 26 0001 "k" 0001 "2" 26 0001 "k" 0001 "1" 03 0000 0001 "w" 0001 "x""#
        ))
        .await;
        peer.expect("20").await;
        drop(peer);
        let id = if flags == "0E" { 1 } else { 2 };
        watcher
            .expect(&format!(
                r#"{first} 1A 0001 "w" {id:04X} 13 01 01 03 0000 26 0001 "k" 0001 "2" 26 0001 "k" 0001 "1" "x""#
            ))
            .await;
    }
    let mut late = broker.connect_3("late").await;
    late.send(r#"82 06 0001 0001 "w" 00"#).await;
    late.expect(r#"90 03 0001 00 31 04 0001 "w" "x""#).await;
    broker.stop().await;
}

// §3.1.3.2.4: counted from when it is published.
#[tokio::test]
async fn a_will_expires_like_any_message() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_5("watcher").await;
    watcher.send(r#"82 07 0001 00 0001 "w" 00"#).await;
    watcher.expect("90 04 0001 00 00").await;
    let mut peer = broker.open().await;
    // Retained, with a delay that is as long as it is worth delivering.
    peer.send(r#"10 24 0004 "MQTT" 05 26 003C 05 11 00000064 0001 "c" 0A 18 00000001 02 00000001 0001 "w" 0001 "x""#)
        .await;
    peer.expect(CONNACK_5).await;
    drop(peer);
    watcher.expect(r#"30 0A 0001 "w" 05 02 00000001 "x""#).await;
    let mut late = broker.connect_5("late").await;
    late.send(r#"82 07 0001 00 0001 "w" 00"#).await;
    late.expect(r#"90 04 0001 00 00 31 0A 0001 "w" 05 02 00000001 "x""#).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    late.send(r#"82 07 0001 00 0001 "w" 00"#).await;
    late.expect("90 04 0001 00 00").await;
    late.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-3.2.2-21], [MQTT-3.2.2-22], §3.1.2.10
#[tokio::test]
async fn the_server_names_a_shorter_keep_alive_and_holds_the_client_to_it() {
    let short = |settings: &mut fieldgate::listener::Settings| settings.limits.max_keep_alive = Some(1);
    let broker = Broker::start_with(short, hub::Settings::default(), None).await;
    let mut peer = broker.open().await;
    let start = Instant::now();
    peer.send(&connect("c", 5, 2)).await;
    peer.expect("20 11 00 00 0E 21 0400 27 00100000 22 000A 13 0001").await;
    // [MQTT-4.13.1-1]: told why.
    peer.expect_close(Some(0x8D)).await;
    assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
    broker.stop().await;
}

// [MQTT-4.13.1-1], [MQTT-2.1.3-1] and the statements on each packet
#[tokio::test]
async fn a_packet_that_breaks_a_rule_ends_the_connection() {
    let broker = Broker::start().await;
    for (script, reason) in [
        // [MQTT-2.1.3-1], [MQTT-3.8.1-1], [MQTT-3.10.1-1], [MQTT-3.6.1-1], [MQTT-3.14.1-1], [MQTT-3.15.1-1]
        ("C1 00", 0x81),
        (r#"80 07 0001 00 0001 "a" 00"#, 0x81),
        (r#"A0 06 0001 00 0001 "a""#, 0x81),
        ("60 02 0001", 0x81),
        ("41 02 0001", 0x81),
        ("E1 00", 0x81),
        ("F1 00", 0x81),
        // [MQTT-3.3.1-2], [MQTT-3.3.1-4]
        (r#"38 04 0001 "a" 00"#, 0x81),
        (r#"36 06 0001 "a" 0001 00"#, 0x81),
        // [MQTT-2.2.1-3]
        (r#"32 06 0001 "a" 0000 00"#, 0x81),
        (r#"82 07 0000 00 0001 "a" 00"#, 0x81),
        (r#"A2 06 0000 00 0001 "a""#, 0x81),
        // [MQTT-1.5.5-1], §2.1.4
        ("C0 80 00", 0x81),
        ("30 FF FF FF FF 01", 0x81),
        // [MQTT-1.5.4-1], [MQTT-1.5.4-2], [MQTT-1.5.7-1], [MQTT-3.3.2-1], [MQTT-3.3.2-13], [MQTT-3.3.2-19]
        ("30 06 0003 EDA080 00", 0x81),
        ("30 04 0001 00 00", 0x81),
        (r#"30 0B 0001 "a" 07 26 0001 FF 0001 "v""#, 0x81),
        (r#"30 0B 0001 "a" 07 26 0001 "k" 0001 00"#, 0x81),
        (r#"30 08 0001 "a" 04 08 0001 FF"#, 0x81),
        (r#"30 08 0001 "a" 04 03 0001 FF"#, 0x81),
        // [MQTT-3.3.2-2], [MQTT-4.7.0-1], [MQTT-3.3.2-14], [MQTT-3.3.4-6], [MQTT-3.3.2-8], [MQTT-3.3.2-9]
        (r##"30 04 0001 "#" 00"##, 0x90),
        (r#"30 08 0001 "a" 04 08 0001 "+""#, 0x82),
        (r#"30 06 0001 "a" 02 0B 01"#, 0x82),
        (r#"30 07 0001 "a" 03 23 0000"#, 0x94),
        (r#"30 07 0001 "a" 03 23 000B"#, 0x94),
        // §3.3.2.1, §3.3.2.3.4: neither topic nor a known alias.
        ("30 03 0000 00", 0x82),
        ("30 06 0000 03 23 0001", 0x82),
        // §2.2.2.2: twice, out of place, unknown, longer than the packet.
        (r#"30 08 0001 "a" 04 01 01 01 01"#, 0x82),
        (r#"30 09 0001 "a" 05 11 00000001"#, 0x82),
        (r#"30 06 0001 "a" 02 7F 01"#, 0x81),
        (r#"30 06 0001 "a" 09 01 01"#, 0x81),
        // [MQTT-3.8.3-1], [MQTT-3.8.3-2], [MQTT-3.8.3-4], [MQTT-3.8.3-5], §3.8.3.1
        ("82 07 0001 00 0001 FF 00", 0x81),
        ("82 03 0001 00", 0x82),
        (r#"82 10 0001 00 000A "$share/g/a" 04"#, 0x82),
        (r#"82 07 0001 00 0001 "a" 40"#, 0x81),
        (r#"82 07 0001 00 0001 "a" 03"#, 0x81),
        (r#"82 07 0001 00 0001 "a" 30"#, 0x82),
        (r#"82 09 0001 02 0B 00 0001 "a" 00"#, 0x82),
        // [MQTT-4.7.1-1], [MQTT-4.7.1-2], [MQTT-4.7.3-1], [MQTT-4.8.2-1], [MQTT-4.8.2-2]
        (r##"82 09 0001 00 0003 "#/a" 00"##, 0x81),
        (r##"82 08 0001 00 0002 "a#" 00"##, 0x81),
        (r#"82 08 0001 00 0002 "a+" 00"#, 0x81),
        ("82 06 0001 00 0000 00", 0x81),
        (r#"82 0F 0001 00 0009 "$share//a" 00"#, 0x81),
        (r#"82 11 0001 00 000B "$share/g+/a" 00"#, 0x81),
        (r#"82 0E 0001 00 0008 "$share/g" 00"#, 0x81),
        // [MQTT-3.10.3-1], [MQTT-3.10.3-2]
        ("A2 06 0001 00 0001 FF", 0x81),
        ("A2 03 0001 00", 0x82),
        // Reason codes that are not the packet's: [MQTT-3.4.2-1], [MQTT-3.6.2-1], [MQTT-3.14.2-1]
        ("40 03 0001 92", 0x82),
        ("62 03 0001 80", 0x82),
        ("E0 01 01", 0x82),
        // [MQTT-4.12.0-7], [MQTT-3.15.2-1]: whatever it says, and more so where that is no reason code of AUTH.
        ("F0 00", 0x82),
        (r#"F0 06 18 04 15 0001 "x""#, 0x82),
        (r#"F0 06 19 04 15 0001 "x""#, 0x82),
        ("F0 02 80 00", 0x82),
        // §3.14.2.2.2
        ("E0 07 00 05 11 00000001", 0x82),
        // What only a server may send.
        ("20 03 00 00 00", 0x82),
        ("90 04 0001 00 00", 0x82),
        ("B0 04 0001 00 00", 0x82),
        ("D0 00", 0x82),
        // [MQTT-3.1.0-2]
        (r#"10 0E 0004 "MQTT" 05 02 003C 00 0001 "c""#, 0x82),
    ] {
        let mut peer = broker.connect_5("c").await;
        peer.send(script).await;
        peer.expect_close(Some(reason)).await;
    }
    // 3.1.1 [MQTT-4.8.0-1]: it has no words for it.
    for script in [
        "C1 00",
        r#"80 06 0001 0001 "a" 00"#,
        r#"A0 05 0001 0001 "a""#,
        "60 02 0001",
        "E1 00",
        "F0 00",
        r#"38 03 0001 "a""#,
        r#"36 05 0001 "a" 0001"#,
        r#"32 05 0001 "a" 0000"#,
        "30 FF FF FF FF 01",
        "30 05 0003 EDA080",
        "30 03 0001 00",
        r##"30 03 0001 "#""##,
        "30 02 0000",
        "82 02 0001",
        "82 06 0001 0001 FF 00",
        r#"82 06 0001 0001 "a" 03"#,
        r#"82 06 0001 0001 "a" 04"#,
        r##"82 08 0001 0003 "#/a" 00"##,
        r#"82 07 0001 0002 "a+" 00"#,
        "82 05 0001 0000 00",
        "A2 02 0001",
        "A2 05 0001 0001 FF",
        "20 02 00 00",
        "D0 00",
        r#"10 0D 0004 "MQTT" 04 02 003C 0001 "c""#,
    ] {
        let mut peer = broker.connect_3("c").await;
        peer.send(script).await;
        peer.expect_close(None).await;
    }
    broker.stop().await;
}

// [MQTT-3.14.4-1], [MQTT-3.14.4-2]
#[tokio::test]
async fn what_comes_after_a_disconnect_is_not_looked_at() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "a" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    for mut peer in [broker.connect_3("c").await, broker.connect_5("d").await] {
        peer.send(r#"30 04 0001 "a" 00 E0 00 30 04 0001 "a" 00 C0 00"#).await;
        peer.expect_close(None).await;
    }
    watcher.expect(r#"30 04 0001 "a" 00 30 03 0001 "a""#).await;
    watcher.expect_nothing().await;
    broker.stop().await;
}

// [MQTT-3.2.2-19]: where there is no room for the reason in words, the code has to do.
#[tokio::test]
async fn a_refusal_fits_what_the_client_takes() {
    let broker = Broker::start().await;
    let mut peer = broker.open().await;
    peer.send(r#"10 17 0004 "MQTT" 05 02 003C 09 27 0000000A 15 0001 "x" 0001 "c""#).await;
    peer.expect("20 03 00 8C 00").await;
    peer.expect_close(None).await;
    broker.stop().await;
}

// [MQTT-3.1.2-24], [MQTT-3.2.0-1]: where there is no room for the CONNACK there is no connection, and it is not lost.
#[tokio::test]
async fn a_client_that_takes_no_connack_is_refused() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "w" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    for (most, connack) in [(1, ""), (4, ""), (5, "20 03 00 95 00"), (15, "20 03 00 95 00"), (16, CONNACK_5)] {
        let mut peer = broker.open().await;
        let connect = r#"0004 "MQTT" 05 06 003C 05 27"#;
        peer.send(&format!(r#"10 1A {connect} {most:08X} 0001 "c" 00 0001 "w" 0001 "x""#)).await;
        peer.expect(connack).await;
        if most < 16 {
            peer.expect_close(None).await;
            watcher.expect_nothing().await;
        }
    }
    watcher.expect(r#"30 04 0001 "w" "x""#).await;
    broker.stop().await;
}

// [MQTT-3.1.2-29], [MQTT-3.1.2-28]
#[tokio::test]
async fn nothing_is_explained_to_who_does_not_want_it() {
    let broker = Broker::start().await;
    let mut peer = broker.open().await;
    peer.send(r#"10 12 0004 "MQTT" 05 02 003C 04 17 00 19 00 0001 "c""#).await;
    peer.expect(CONNACK_5).await;
    peer.send(r#"32 06 0001 "a" 0001 00 62 02 0007 50 02 0008 A2 06 0002 00 0001 "a""#).await;
    peer.expect("40 03 0001 10 70 03 0007 92 62 03 0008 92 B0 04 0002 00 11").await;
    broker.stop().await;
}

// 3.1.1 [MQTT-3.1.4-2]
#[tokio::test]
async fn a_3_1_1_client_that_connects_again_takes_over() {
    let broker = Broker::start().await;
    let mut first = broker.open().await;
    first.send(&connect("c", 4, 0)).await;
    first.expect("20 02 00 00").await;
    first.send(r#"82 06 0001 0001 "a" 00"#).await;
    first.expect("90 03 0001 00").await;
    let mut second = broker.open().await;
    second.send(&connect("c", 4, 0)).await;
    second.expect("20 02 01 00").await;
    first.expect_close(None).await;
    second.send(r#"30 04 0001 "a" "1""#).await;
    second.expect(r#"30 04 0001 "a" "1""#).await;
    broker.stop().await;
}

// [MQTT-4.1.0-1]: the expiry is about the time without a connection.
#[tokio::test]
async fn a_session_does_not_expire_while_it_is_connected() {
    let broker = Broker::start().await;
    let mut peer = broker.open().await;
    peer.send(r#"10 13 0004 "MQTT" 05 02 003C 05 11 00000001 0001 "c""#).await;
    peer.expect(CONNACK_5).await;
    peer.send(r#"82 07 0001 00 0001 "a" 00"#).await;
    peer.expect("90 04 0001 00 00").await;
    // The session is looked after once a second.
    tokio::time::sleep(Duration::from_millis(2100)).await;
    peer.send(r#"30 05 0001 "a" 00 "1""#).await;
    peer.expect(r#"30 05 0001 "a" 00 "1""#).await;
    broker.stop().await;
}
