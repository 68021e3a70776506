//! What outlives a connection.

use crate::harness::{Broker, connect};

#[tokio::test]
async fn a_kept_session_collects_what_it_subscribed_to() {
    let broker = Broker::start().await;
    let mut away = broker.open().await;
    away.send(&connect("away", 4, 0)).await;
    away.expect("20 02 00 00").await;
    away.send(r#"82 06 0001 0001 "a" 02 E0 00"#).await;
    away.expect("90 03 0001 02").await;
    away.expect_close(None).await;
    let mut from = broker.connect_3("from").await;
    from.send(r#"30 04 0001 "a" "0" 32 06 0001 "a" 0001 "1" 34 06 0001 "a" 0002 "2" 62 02 0002"#).await;
    from.expect("40 02 0001 50 02 0002 70 02 0002").await;
    let mut back = broker.open().await;
    back.send(&connect("away", 4, 0)).await;
    back.expect(r#"20 02 01 00 32 06 0001 "a" 0001 "1" 34 06 0001 "a" 0002 "2""#).await;
    // Lost before it could answer: the same again, marked, under the same identifiers.
    drop(back);
    let mut back = broker.open().await;
    back.send(&connect("away", 4, 0)).await;
    back.expect(r#"20 02 01 00 3A 06 0001 "a" 0001 "1" 3C 06 0001 "a" 0002 "2""#).await;
    back.send("40 02 0001 50 02 0002").await;
    back.expect("62 02 0002").await;
    drop(back);
    let mut back = broker.open().await;
    back.send(&connect("away", 4, 0)).await;
    back.expect("20 02 01 00 62 02 0002").await;
    back.send("70 02 0002").await;
    back.expect_nothing().await;
    back.send("E0 00").await;
    // A clean session forgets it.
    let mut clean = broker.connect_3("away").await;
    from.send(r#"30 04 0001 "a" "0""#).await;
    clean.expect_nothing().await;
    broker.stop().await;
}

#[tokio::test]
async fn the_newer_connection_takes_the_session_over() {
    let broker = Broker::start().await;
    let mut first = broker.open().await;
    first.send(r#"10 13 0004 "MQTT" 05 02 003C 05 11 00000064 0001 "c""#).await;
    first.expect(crate::harness::CONNACK_5).await;
    first.send(r#"82 07 0001 00 0001 "a" 01"#).await;
    first.expect("90 04 0001 00 01").await;
    let mut second = broker.open().await;
    second.send(r#"10 13 0004 "MQTT" 05 00 003C 05 11 00000064 0001 "c""#).await;
    second.expect("20 0E 01 00 0B 21 0400 27 00100000 22 000A").await;
    first.expect_close(Some(0x8E)).await;
    second.send(r#"32 06 0001 "a" 0001 00"#).await;
    second.expect("40 02 0001").await;
    second.expect(r#"32 06 0001 "a" 0001 00"#).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_will_is_published_for_those_who_are_lost_only() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "w" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    let with_will = r#"10 13 0004 "MQTT" 04 06 003C 0001 "c" 0001 "w" 0001 "1""#;
    let with_will_5 = r#"10 15 0004 "MQTT" 05 06 003C 00 0001 "c" 00 0001 "w" 0001 "5""#;
    for (connect, farewell, will) in [
        (with_will, "E0 00", None),
        (with_will, "", Some("1")),
        (with_will_5, "E0 00", None),
        (with_will_5, "E0 01 04", Some("5")),
        (with_will_5, "F0 00", Some("5")),
    ] {
        let mut peer = broker.open().await;
        peer.send(connect).await;
        peer.expect("20").await;
        peer.send(farewell).await;
        if farewell.is_empty() {
            drop(peer);
        } else {
            let _ = tokio::io::AsyncReadExt::read_to_end(&mut peer.stream, &mut Vec::new()).await;
        }
        match will {
            Some(text) => watcher.expect(&format!(r#"30 04 0001 "w" "{text}""#)).await,
            None => watcher.expect_nothing().await,
        }
    }
    broker.stop().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let broker = Broker::start_in(directory.path()).await;
    let mut away = broker.open().await;
    away.send(&connect("away", 4, 0)).await;
    away.expect("20 02 00 00").await;
    away.send(r#"82 06 0001 0001 "a" 02"#).await;
    away.expect("90 03 0001 02").await;
    drop(away);
    let mut from = broker.open().await;
    from.send(&connect("from", 4, 0)).await;
    from.expect("20 02 00 00").await;
    from.send(r#"33 06 0001 "a" 0001 "1" 34 06 0001 "a" 0002 "2""#).await;
    from.expect("40 02 0001 50 02 0002").await;
    drop(from);
    broker.stop().await;
    let broker = Broker::start_in(directory.path()).await;
    let mut from = broker.open().await;
    from.send(&connect("from", 4, 0)).await;
    from.expect("20 02 01 00").await;
    // Sent again, for the PUBREC might have been lost: it is the same message, not another one.
    from.send(r#"3C 06 0001 "a" 0002 "2" 62 02 0002"#).await;
    from.expect("50 02 0002 70 02 0002").await;
    let mut back = broker.open().await;
    back.send(&connect("away", 4, 0)).await;
    back.expect(r#"20 02 01 00 3A 06 0001 "a" 0001 "1" 3C 06 0001 "a" 0002 "2""#).await;
    back.send("40 02 0001 50 02 0002").await;
    back.expect("62 02 0002").await;
    back.send("70 02 0002").await;
    back.expect_nothing().await;
    back.send(r#"82 06 0002 0001 "a" 00"#).await;
    back.expect(r#"90 03 0002 00 31 04 0001 "a" "1""#).await;
    broker.stop().await;
}
