//! Each limit of the README's table: what happens beyond it, and that it is counted.

use std::time::Duration;

use fieldgate::hub::{self, Limits, QueueLimits, WhenFull};
use fieldgate::listener::Settings;
use fieldgate::throttle::AddressLimits;

use crate::harness::{Broker, PATIENCE, connect};

async fn limited(limits: Limits) -> Broker {
    Broker::start_with(|_| {}, hub::Settings { limits, ..hub::Settings::default() }, None).await
}

async fn listening(change: impl FnOnce(&mut Settings)) -> Broker {
    Broker::start_with(change, hub::Settings::default(), None).await
}

fn refused(reason: &str) -> String {
    format!(r#"fieldgate_listener_connections_refused_total{{listener="test",reason="{reason}"}}"#)
}

#[tokio::test]
async fn max_connections_of_a_listener() {
    let broker = listening(|settings| settings.max_connections = 1).await;
    let _first = broker.connect_3("a").await;
    broker.open().await.expect_close(None).await;
    assert_eq!(broker.metric(&refused("listener_full")), 1.0);
    broker.stop().await;
}

#[tokio::test]
async fn global_max_connections() {
    let broker = limited(Limits { max_connections: 1, ..Limits::default() }).await;
    let mut first = broker.connect_3("a").await;
    broker.open().await.expect_close(None).await;
    assert_eq!(broker.metric(&refused("gateway_full")), 1.0);
    first.send("E0 00").await;
    first.expect_close(None).await;
    broker.stop().await;
}

#[tokio::test]
async fn max_connections_per_address() {
    let addresses = AddressLimits { max_connections: 2, limit_loopback: true, ..AddressLimits::default() };
    let broker = limited(Limits { addresses, ..Limits::default() }).await;
    let (_first, _second) = (broker.connect_3("a").await, broker.connect_3("b").await);
    broker.open().await.expect_close(None).await;
    assert_eq!(broker.metric(&refused("address_full")), 1.0);
    broker.stop().await;
}

#[tokio::test]
async fn connect_timeout() {
    let broker = listening(|settings| settings.limits.connect_timeout = Duration::from_millis(50)).await;
    let mut peer = broker.open().await;
    peer.send("10 0D").await;
    peer.expect_close(None).await;
    assert_eq!(
        broker.metric(r#"fieldgate_listener_protocol_errors_total{listener="test",reason="keep alive timeout"}"#),
        1.0
    );
    broker.stop().await;
}

#[tokio::test]
async fn max_packet_size() {
    let broker = listening(|settings| settings.limits.max_packet_size = 1024).await;
    let mut peer = broker.open().await;
    peer.send(&connect("c", 5, 2)).await;
    peer.expect("20 0E 00 00 0B 21 0400 27 00000400 22 000A").await;
    let largest = format!(r#"30 FD 07 0001 "a" 00 {}"#, "78".repeat(1017));
    peer.send(&largest).await;
    peer.expect_nothing().await;
    peer.send("30 FE 07 0001").await;
    peer.expect_close(Some(0x95)).await;
    assert_eq!(
        broker.metric(r#"fieldgate_listener_protocol_errors_total{listener="test",reason="packet too large"}"#),
        1.0
    );
    broker.stop().await;
}

#[tokio::test]
async fn receive_maximum() {
    let directory = tempfile::tempdir().unwrap();
    let change = |settings: &mut Settings| settings.limits.receive_maximum = 1;
    let broker = Broker::start_with(change, hub::Settings::default(), Some(directory.path())).await;
    let mut peer = broker.open().await;
    peer.send(&connect("c", 5, 2)).await;
    peer.expect("20 0E 00 00 0B 21 0001 27 00100000 22 000A").await;
    // PUBREC does not end the delivery, PUBREL does.
    peer.send(r#"34 06 0001 "a" 0001 00"#).await;
    peer.expect("50 03 0001 10").await;
    peer.send(r#"34 06 0001 "a" 0002 00"#).await;
    peer.expect_close(Some(0x93)).await;
    let reason = r#"fieldgate_listener_protocol_errors_total{listener="test",reason="receive maximum exceeded"}"#;
    assert_eq!(broker.metric(reason), 1.0);
    broker.stop().await;
}

#[tokio::test]
async fn max_topic_alias() {
    let broker = listening(|settings| settings.limits.topic_alias_maximum = 2).await;
    let mut peer = broker.open().await;
    peer.send(&connect("c", 5, 2)).await;
    peer.expect("20 0E 00 00 0B 21 0400 27 00100000 22 0002").await;
    peer.send(r#"30 07 0001 "a" 03 23 0002"#).await;
    peer.expect_nothing().await;
    peer.send(r#"30 07 0001 "a" 03 23 0003"#).await;
    peer.expect_close(Some(0x94)).await;
    assert_eq!(
        broker.metric(r#"fieldgate_listener_protocol_errors_total{listener="test",reason="topic alias invalid"}"#),
        1.0
    );
    broker.stop().await;
}

#[tokio::test]
async fn max_keepalive() {
    let broker = listening(|settings| settings.limits.max_keep_alive = Some(30)).await;
    let mut peer = broker.open().await;
    peer.send(&connect("c", 5, 2)).await;
    peer.expect("20 11 00 00 0E 21 0400 27 00100000 22 000A 13 001E").await;
    broker.stop().await;
}

#[tokio::test]
async fn max_inflight_messages() {
    let broker = limited(Limits { max_inflight: 2, ..Limits::default() }).await;
    let mut peer = broker.connect_3("c").await;
    peer.send(r#"82 06 0001 0001 "a" 01"#).await;
    peer.expect("90 03 0001 01").await;
    let mut writer = broker.connect_3("w").await;
    for _ in 0..3 {
        writer.send(r#"30 04 0001 "a" "0" 32 06 0001 "a" 0001 "1""#).await;
        writer.expect("40 02 0001").await;
    }
    let mut got = vec![0; 2 * 8 + 3 * 6];
    tokio::time::timeout(PATIENCE, tokio::io::AsyncReadExt::read_exact(&mut peer.stream, &mut got))
        .await
        .unwrap()
        .unwrap();
    peer.expect_nothing().await;
    assert_eq!(got.iter().filter(|byte| **byte == 0x32).count(), 2, "QoS 0 is not held back, QoS 1 is: {got:?}");
    assert_eq!(broker.metric("fieldgate_hub_inflight_messages"), 2.0);
    peer.send("40 02 0001").await;
    peer.expect(r#"32 06 0001 "a" 0003 "1""#).await;
    broker.stop().await;
}

#[tokio::test]
async fn max_queued_messages_and_bytes() {
    for queue in [
        QueueLimits { max_messages: 2, ..QueueLimits::default() },
        QueueLimits { max_bytes: 25, ..QueueLimits::default() },
    ] {
        let broker =
            limited(Limits { queue: QueueLimits { when_full: WhenFull::DropOldest, ..queue }, ..Limits::default() })
                .await;
        let mut away = broker.open().await;
        away.send(&connect("c", 4, 0)).await;
        away.expect("20 02 00 00").await;
        away.send(r#"82 06 0001 0001 "a" 01 E0 00"#).await;
        away.expect("90 03 0001 01").await;
        away.expect_close(None).await;
        let mut writer = broker.connect_3("w").await;
        for number in 1..=3 {
            writer.send(&format!(r#"32 0F 0001 "a" 0001 "{number}234567890""#)).await;
            writer.expect("40 02 0001").await;
        }
        assert_eq!(broker.metric(r#"fieldgate_hub_messages_dropped_total{reason="queue_full"}"#), 1.0);
        let mut back = broker.open().await;
        back.send(&connect("c", 4, 0)).await;
        back.expect(r#"20 02 01 00 32 0F 0001 "a" 0002 "2234567890" 32 0F 0001 "a" 0003 "3234567890""#).await;
        back.expect_nothing().await;
        broker.stop().await;
    }
}

#[tokio::test]
async fn max_queue_memory() {
    let broker = limited(Limits { max_queue_memory: 64 << 10, ..Limits::default() }).await;
    let mut away = broker.open().await;
    away.send(&connect("c", 4, 0)).await;
    away.expect("20 02 00 00").await;
    away.send(r#"82 06 0001 0001 "a" 01 E0 00"#).await;
    away.expect("90 03 0001 01").await;
    away.expect_close(None).await;
    let mut writer = broker.connect_3("w").await;
    for _ in 0..100 {
        writer.send(&format!(r#"32 ED 07 0001 "a" 0001 {}"#, "78".repeat(1000))).await;
        writer.expect("40 02 0001").await;
    }
    let dropped = broker.metric(r#"fieldgate_hub_messages_dropped_total{reason="memory_full"}"#);
    assert!((40.0..60.0).contains(&dropped), "{dropped}");
    let used = broker.metric("fieldgate_hub_queue_memory_bytes");
    assert!((32_768.0..=65_536.0).contains(&used), "{used}");
    broker.stop().await;
}

#[tokio::test]
async fn max_subscriptions() {
    let broker = limited(Limits { max_subscriptions: 1, ..Limits::default() }).await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"82 0F 0001 00 0001 "a" 00 0001 "a" 00 0001 "b" 00"#).await;
    peer.expect("90 06 0001 00 00 00 97").await;
    assert_eq!(broker.metric(r#"fieldgate_hub_over_limit_total{limit="max_subscriptions"}"#), 1.0);
    broker.stop().await;
}

#[tokio::test]
async fn max_topic_levels_and_length() {
    for (limits, limit) in [
        (Limits { max_topic_levels: 2, ..Limits::default() }, "max_topic_levels"),
        (Limits { max_topic_length: 4, ..Limits::default() }, "max_topic_length"),
    ] {
        let broker = limited(limits).await;
        let mut peer = broker.connect_5("c").await;
        peer.send(r#"82 11 0001 00 0003 "a/b" 00 0005 "a/b/c" 00"#).await;
        peer.expect("90 05 0001 00 00 8F").await;
        peer.send(r#"32 08 0003 "a/x" 0001 00 32 0A 0005 "a/b/c" 0002 00"#).await;
        peer.expect("40 03 0001 10 40 03 0002 90").await;
        assert_eq!(broker.metric(&format!(r#"fieldgate_hub_over_limit_total{{limit="{limit}"}}"#)), 2.0);
        broker.stop().await;
    }
}

#[tokio::test]
async fn max_retained_messages_and_bytes() {
    // What the gateway says on `$SYS` counts too, so that only none at all is a sure limit here.
    for limits in [
        Limits { max_retained_messages: 0, ..Limits::default() },
        Limits { max_retained_bytes: 0, ..Limits::default() },
    ] {
        let broker = limited(limits).await;
        let mut peer = broker.connect_3("c").await;
        peer.send(r#"82 06 0001 0001 "a" 00 31 06 0001 "a" "123""#).await;
        peer.expect(r#"90 03 0001 00 30 06 0001 "a" "123""#).await;
        peer.send(r#"82 06 0002 0001 "a" 00"#).await;
        peer.expect("90 03 0002 00").await;
        peer.expect_nothing().await;
        assert_eq!(broker.metric(r#"fieldgate_hub_messages_dropped_total{reason="retained_full"}"#), 1.0);
        broker.stop().await;
    }
}

#[tokio::test]
async fn max_sessions() {
    let broker = limited(Limits { max_sessions: 1, ..Limits::default() }).await;
    let _first = broker.connect_3("a").await;
    let mut second = broker.open().await;
    second.send(&connect("b", 5, 2)).await;
    second.expect_close(Some(0x97)).await;
    assert_eq!(broker.metric(r#"fieldgate_hub_over_limit_total{limit="max_sessions"}"#), 1.0);
    broker.stop().await;
}

#[tokio::test]
async fn max_session_expiry() {
    let limits = Limits { max_session_expiry: Some(Duration::from_secs(60)), ..Limits::default() };
    let broker = limited(limits).await;
    let mut peer = broker.open().await;
    // Session expiry interval of an hour; told that it is a minute.
    peer.send(r#"10 13 0004 "MQTT" 05 02 003C 05 11 00000E10 0001 "c""#).await;
    peer.expect("20 13 00 00 10 11 0000003C 21 0400 27 00100000 22 000A").await;
    broker.stop().await;
}
