//! How connections begin and end.

use std::time::{Duration, Instant};

use fieldgate::hub;
use fieldgate::hub::access::{self, User, hash_password};
use fieldgate::listener::{Redirect, Redirected};
use fieldgate::observe::Metrics;
use fieldgate::throttle::AddressLimits;

use crate::harness::{Broker, CONNACK_5, PATIENCE, connect};

#[tokio::test]
async fn a_client_connects_pings_and_leaves_in_each_version() {
    let broker = Broker::start().await;
    for (connect, connack) in [
        (r#"10 0F 0006 "MQIsdp" 03 02 003C 0001 "c""#, "20 02 00 00"),
        (r#"10 0D 0004 "MQTT" 04 02 003C 0001 "c""#, "20 02 00 00"),
        (r#"10 0E 0004 "MQTT" 05 02 003C 00 0001 "c""#, CONNACK_5),
    ] {
        let mut peer = broker.open().await;
        peer.send(connect).await;
        peer.expect(connack).await;
        peer.expect_nothing().await;
        peer.send("E0 00").await;
        peer.expect_close(None).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn packets_may_come_in_any_pieces() {
    let broker = Broker::start().await;
    let mut peer = broker.open().await;
    let script = format!(r#"{} 82 06 0001 0001 "t" 00 30 05 0001 "t" "hi""#, connect("c", 4, 2));
    for byte in crate::harness::bytes(&script) {
        peer.send(&format!("{byte:02X}")).await;
    }
    peer.expect(r#"20 02 00 00 90 03 0001 00 30 05 0001 "t" "hi""#).await;
    // And all of it at once.
    let mut peer = broker.open().await;
    peer.send(&script).await;
    peer.expect(r#"20 02 00 00 90 03 0001 00 30 05 0001 "t" "hi""#).await;
    broker.stop().await;
}

#[tokio::test]
async fn what_is_no_connect_is_closed_on() {
    let broker = Broker::start().await;
    for script in ["C0 00", r#""GET / HTTP/1.1" 0D0A"#, "10 FF FF FF FF", "16 03 01 00 F4 01 00 00 F0 03 03"] {
        let mut peer = broker.open().await;
        peer.send(script).await;
        peer.expect_close(None).await;
    }
    let mut peer = broker.open().await;
    peer.send(r#"10 0D 0004 "MQTT" 09 02 003C 0001 "c""#).await;
    peer.expect_close(Some(0x84)).await;
    let mut peer = broker.open().await;
    peer.send(r#"10 0C 0004 "MQTT" 04 00 003C 0000"#).await;
    peer.expect("20 02 00 02").await;
    peer.expect_close(None).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_5_0_client_is_told_what_it_did_wrong_before_the_close() {
    let broker = Broker::start().await;
    for (script, reason) in [
        ("D0 00", 0x82),
        ("00 00", 0x81),
        ("30 FF FF FF 7F", 0x95),
        (r#"30 07 0003 "a/+" 00 "x""#, 0x90),
        (r#"30 07 0001 "a" 03 23 000B"#, 0x94),
        (r#"82 09 0001 00 0003 "a+b" 00"#, 0x81),
    ] {
        let mut peer = broker.connect_5("c").await;
        peer.send(script).await;
        peer.expect_close(Some(reason)).await;
        let mut peer = broker.connect_3("c").await;
        peer.send("D0 00").await;
        peer.expect_close(None).await;
    }
    let mut metrics = Metrics::default();
    broker.observe.collect(&mut metrics);
    let counted = r#"fieldgate_listener_protocol_errors_total{listener="test",reason="packet too large"} 1"#;
    assert!(metrics.render().contains(counted), "{}", metrics.render());
    broker.stop().await;
}

#[tokio::test]
async fn a_client_id_is_made_up_where_none_is_given() {
    let broker = Broker::start().await;
    let mut peer = broker.open().await;
    peer.send(r#"10 0D 0004 "MQTT" 05 02 003C 00 0000"#).await;
    peer.expect(r#"20 2E 00 00 2B 21 0400 27 00100000 12 001D "auto-""#).await;
    let mut peer = broker.open().await;
    peer.send(r#"10 0C 0004 "MQTT" 04 02 003C 0000"#).await;
    peer.expect("20 02 00 00").await;
    broker.stop().await;
}

// [MQTT-3.1.2-22]
#[tokio::test]
async fn a_silent_client_is_closed_on_and_a_pinging_one_is_not() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 0B 0001 0006 "will/s" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    let mut silent = broker.open().await;
    let start = Instant::now();
    silent.send(r#"10 1B 0004 "MQTT" 04 06 0001 0001 "s" 0006 "will/s" 0004 "gone""#).await;
    silent.expect("20 02 00 00").await;
    let mut pinging = broker.open().await;
    pinging.send(r#"10 0D 0004 "MQTT" 04 02 0001 0001 "p""#).await;
    pinging.expect("20 02 00 00").await;
    while start.elapsed() < Duration::from_millis(1400) {
        pinging.expect_nothing().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    silent.expect_close(None).await;
    assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
    pinging.expect_nothing().await;
    watcher.expect(r#"30 0C 0006 "will/s" "gone""#).await;
    broker.stop().await;
}

#[tokio::test]
async fn connections_over_the_limit_are_refused_and_places_are_given_back() {
    let one = |settings: &mut fieldgate::listener::Settings| settings.max_connections = 1;
    let broker = Broker::start_with(one, hub::Settings::default(), None).await;
    let mut first = broker.connect_3("a").await;
    let mut second = broker.open().await;
    second.expect_close(None).await;
    first.send("E0 00").await;
    first.expect_close(None).await;
    let patience = Instant::now() + PATIENCE;
    loop {
        let mut peer = broker.open().await;
        // A place that is not free yet shows as a close or a reset.
        let _ =
            tokio::io::AsyncWriteExt::write_all(&mut peer.stream, &crate::harness::bytes(&connect("b", 4, 2))).await;
        let mut answer = [0; 4];
        if tokio::io::AsyncReadExt::read_exact(&mut peer.stream, &mut answer).await.is_ok() {
            assert_eq!(answer, [0x20, 2, 0, 0]);
            break;
        }
        assert!(Instant::now() < patience, "the place was never given back");
    }
    broker.stop().await;
}

// MQTT 5.0 §4.11
#[tokio::test]
async fn who_finds_no_place_is_told_of_another_server() {
    let redirect = Redirect { server: "b:1883".into(), whom: Redirected::Excess };
    let one = |settings: &mut fieldgate::listener::Settings| {
        settings.max_connections = 1;
        settings.redirect = Some(redirect.clone());
    };
    let broker = Broker::start_with(one, hub::Settings::default(), None).await;
    let mut first = broker.connect_5("a").await;
    let refused = async |connect: &str, answer: &str| {
        let mut peer = broker.open().await;
        peer.send(connect).await;
        peer.expect(answer).await;
        peer.expect_close(None).await;
    };
    let other = r#"20 0C 00 9C 09 1C 0006 "b:1883""#;
    refused(&connect("b", 5, 2), other).await;
    // Over and over: its place is given back.
    for _ in 0..100 {
        refused(&connect("a", 5, 2), other).await;
    }
    refused(&connect("b", 4, 2), "20 02 00 03").await;
    // With a packet size that leaves no room for it the code has to do.
    refused(r#"10 13 0004 "MQTT" 05 02 003C 05 27 00000008 0001 "c""#, "20 03 00 9C 00").await;
    // Those who never say who they are take no more than a few places, for a while.
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(broker.open().await);
    }
    let mut peer = broker.open().await;
    peer.expect_close(None).await;
    first.expect_nothing().await;
    let moved = |settings: &mut fieldgate::listener::Settings| {
        settings.redirect = Some(Redirect { whom: Redirected::Everybody, ..redirect.clone() });
    };
    let broker = Broker::start_with(moved, hub::Settings::default(), None).await;
    let mut peer = broker.open().await;
    peer.send(&connect("a", 5, 2)).await;
    peer.expect(r#"20 0C 00 9D 09 1C 0006 "b:1883""#).await;
    peer.expect_close(None).await;
    assert!(broker.hub.sessions().is_empty());
    broker.stop().await;
}

#[tokio::test]
async fn users_log_in_with_their_password_only() {
    let user = User { name: "ann".into(), password_hash: hash_password(b"secret").unwrap().into() };
    let access =
        access::Settings { users: vec![user], anonymous: access::Anonymous::Never, ..access::Settings::default() };
    let broker = Broker::start_with(|_| {}, hub::Settings { access, ..hub::Settings::default() }, None).await;
    let check = async |script: &str, connack: &str| {
        let mut peer = broker.open().await;
        peer.send(script).await;
        peer.expect(connack).await;
    };
    check(&connect("c", 4, 2), "20 02 00 05").await;
    check(r#"10 1A 0004 "MQTT" 04 C2 003C 0001 "c" 0003 "ann" 0006 "secret""#, "20 02 00 00").await;
    check(r#"10 1A 0004 "MQTT" 04 C2 003C 0001 "c" 0003 "ann" 0006 "SECRET""#, "20 02 00 04").await;
    check(r#"10 12 0004 "MQTT" 04 82 003C 0001 "c" 0003 "bob""#, "20 02 00 04").await;
    let mut peer = broker.open().await;
    peer.send(&connect("c", 5, 2)).await;
    peer.expect_close(Some(0x87)).await;
    broker.stop().await;
}

#[tokio::test]
async fn an_address_that_guesses_passwords_has_to_wait_even_with_the_right_one() {
    let user = User { name: "ann".into(), password_hash: hash_password(b"secret").unwrap().into() };
    let access = access::Settings { users: vec![user], ..access::Settings::default() };
    let addresses = AddressLimits { login_failures: 1, limit_loopback: true, ..AddressLimits::default() };
    let limits = hub::Limits { addresses, ..hub::Limits::default() };
    let broker = Broker::start_with(|_| {}, hub::Settings { access, limits }, None).await;
    let good = r#"10 1A 0004 "MQTT" 04 C2 003C 0001 "c" 0003 "ann" 0006 "secret""#;
    let bad = r#"10 1A 0004 "MQTT" 04 C2 003C 0001 "c" 0003 "ann" 0006 "SECRET""#;
    let answer = async |script: &str| {
        let mut peer = broker.open().await;
        peer.send(script).await;
        let mut connack = [0; 4];
        tokio::io::AsyncReadExt::read_exact(&mut peer.stream, &mut connack).await.unwrap();
        connack[3]
    };
    assert_eq!(answer(bad).await, 4, "this one is free");
    assert_eq!(answer(bad).await, 4);
    let start = Instant::now();
    let mut peer = broker.open().await;
    peer.send(r#"10 1B 0004 "MQTT" 05 C2 003C 00 0001 "c" 0003 "ann" 0006 "secret""#).await;
    peer.expect_close(Some(0x9F)).await;
    // Those without a password guess nothing.
    assert_eq!(answer(&connect("anonymous", 4, 2)).await, 0);
    while answer(good).await != 0 {
        assert!(start.elapsed() < PATIENCE, "the wait never ended");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(answer(bad).await, 4, "a good password has made good, and this one is free again");
    assert_eq!(answer(good).await, 0);
    let mut metrics = Metrics::default();
    broker.observe.collect(&mut metrics);
    let metrics = metrics.render();
    assert!(metrics.contains("fieldgate_listener_logins_delayed_total{"), "{metrics}");
    assert!(!metrics.contains(r#"fieldgate_listener_logins_delayed_total{listener="test"} 0"#), "{metrics}");
    broker.stop().await;
}

#[tokio::test]
async fn an_address_that_opens_too_many_connections_is_refused_and_this_machine_is_not_by_default() {
    let check = async |limit_loopback: bool, refused: u32| {
        let strict = AddressLimits { connection_rate: 1, connection_burst: 1, ..AddressLimits::default() };
        let addresses = AddressLimits { limit_loopback, ..strict };
        let limits = hub::Limits { addresses, ..hub::Limits::default() };
        let settings = hub::Settings { limits, ..hub::Settings::default() };
        let broker = Broker::start_with(|_| {}, settings, None).await;
        let _first = broker.connect_3("a").await;
        let mut second = broker.open().await;
        if refused > 0 {
            second.expect_close(None).await;
        } else {
            second.send(&connect("b", 4, 2)).await;
            second.expect("20 02 00 00").await;
        }
        let mut metrics = Metrics::default();
        broker.observe.collect(&mut metrics);
        let name = r#"fieldgate_listener_connections_refused_total{listener="test",reason="address_rate"}"#;
        let counted = format!("{name} {refused}\n");
        assert!(metrics.render().contains(&counted), "{}", metrics.render());
        broker.stop().await;
    };
    check(true, 1).await;
    check(false, 0).await;
}

#[tokio::test]
async fn clients_are_told_when_the_gateway_stops() {
    let broker = Broker::start().await;
    let mut new = broker.connect_5("a").await;
    let mut old = broker.connect_3("b").await;
    broker.begin_stop();
    new.expect_close(Some(0x8B)).await;
    old.expect_close(None).await;
    broker.stop().await;
}
