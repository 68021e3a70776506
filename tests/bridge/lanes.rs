//! What goes first when a backlog, live messages and urgent ones wait for the same upstream, and how fast.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::{Duration, Instant};

use fieldgate::bridge::Settings;
use fieldgate::bridge::rate::MaxRate;
use fieldgate::bridge::rules::{Provenance, RuleSettings};
use fieldgate::hub::Priority;
use fieldgate::message::QoS;
use fieldgate::observe::{Metrics, Observe};
use fieldgate::proto::mqtt::{Property, ReasonCode};

use super::peer::{Connection, Got, Peer};
use super::{Gateway, drain, hub_on_disk, numbers, rule, settings, until};

fn receive_maximum(count: u16) -> [Property<'static>; 1] {
    [Property::ReceiveMaximum(count.try_into().unwrap())]
}

fn with_priority(filter: &str, priority: Priority) -> RuleSettings {
    RuleSettings { priority, provenance: Provenance::UserProperties, ..rule(filter, QoS::ExactlyOnce) }
}

/// Rules for alarms, which are urgent, for logs, which are not, and for the rest.
fn by_priority(peer: &Peer) -> Settings {
    let outgoing = vec![
        with_priority("devices/alarm", Priority::High),
        with_priority("devices/log", Priority::Low),
        with_priority("devices/#", Priority::Normal),
    ];
    Settings { outgoing, ..settings(peer) }
}

/// Acknowledges each message and returns what came, until the payload is `last`, with the stream and the number in it.
async fn told(connection: &mut Connection, last: &str) -> Vec<(String, String)> {
    let mut told = Vec::new();
    loop {
        let publish = connection.next_publish().await;
        connection.puback(publish.id, ReasonCode::Success).await;
        let value =
            |name: &str| publish.user_properties.iter().find(|(found, _)| found == name).map(|(_, value)| value);
        let (stream, number) = (value("fieldgate-stream"), value("fieldgate-sequence").unwrap());
        let is_last = publish.payload == last;
        told.push((publish.payload.clone(), stream.map_or(number.clone(), |stream| format!("{stream} {number}"))));
        if is_last {
            return told;
        }
    }
}

#[tokio::test]
async fn what_is_urgent_goes_first_and_each_stream_counts_for_itself() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(by_priority(&peer));
    for (topic, payload) in
        [("log", "l0"), ("m/v", "v0"), ("alarm", "a0"), ("log", "l1"), ("m/v", "v1"), ("alarm", "a1")]
    {
        gateway.publish(&format!("devices/{topic}"), payload, QoS::AtLeastOnce).await;
    }
    let mut connection = peer.welcome(false, &receive_maximum(1)).await;
    let expected = [("a0", "high 0"), ("a1", "high 1"), ("v0", "0"), ("v1", "1"), ("l0", "low 0"), ("l1", "low 1")];
    let expected = expected.map(|(payload, place)| (payload.to_owned(), place.to_owned()));
    assert_eq!(told(&mut connection, "l1").await, expected);
    gateway.drained().await;
    gateway.stop().await;
}

#[tokio::test]
async fn live_values_do_not_wait_behind_a_backlog_and_each_stream_is_in_order() {
    let peer = Peer::bind().await;
    let outgoing = vec![RuleSettings { provenance: Provenance::UserProperties, ..rule("devices/#", QoS::ExactlyOnce) }];
    let mut gateway = Gateway::start(Settings { outgoing, live_share: 50, ..settings(&peer) });
    gateway.publish_numbers(0..1000).await;
    let mut connection = peer.welcome(false, &receive_maximum(2)).await;
    gateway.connected().await;
    // Two of the backlog are on their way before anything is live.
    let on_their_way = [connection.next_publish().await, connection.next_publish().await];
    assert_eq!(on_their_way.each_ref().map(|publish| &*publish.payload), ["0", "1"]);
    for live in ["x", "y", "z"] {
        gateway.publish("devices/m/v", live, QoS::AtLeastOnce).await;
    }
    for publish in &on_their_way {
        connection.puback(publish.id, ReasonCode::Success).await;
    }
    let told = told(&mut connection, "999").await;
    let live: Vec<_> = told.iter().enumerate().filter(|(_, (_, place))| place.starts_with("live ")).collect();
    let places: Vec<_> = live.iter().map(|(at, (payload, place))| (*at, &**payload, &**place)).collect();
    assert_eq!(places, [(1, "x", "live 0"), (3, "y", "live 1"), (5, "z", "live 2")], "one of two while both wait");
    let backlog: Vec<_> = told.iter().filter(|(_, place)| !place.starts_with("live ")).collect();
    assert!(backlog.iter().zip(2..).all(|((payload, place), number)| payload == place && *place == number.to_string()));
    assert_eq!(backlog.len(), 998);
    gateway.drained().await;
    gateway.stop().await;
}

#[tokio::test]
async fn handshakes_of_every_lane_go_on_after_a_restart_under_their_identifiers() {
    let directory = tempfile::tempdir().unwrap();
    let peer = Peer::bind().await;
    let mut gateway = Gateway::on(hub_on_disk(directory.path()), by_priority(&peer));
    let mut connection = peer.welcome(false, &[]).await;
    gateway.connected().await;
    let mut ids = Vec::new();
    for topic in ["devices/alarm", "devices/m/v", "devices/log"] {
        for payload in ["released", "sent"] {
            gateway.publish(topic, payload, QoS::ExactlyOnce).await;
            let publish = connection.next_publish().await;
            ids.push(publish.id);
            if payload == "released" {
                connection.pubrec(publish.id).await;
                assert_eq!(connection.next().await, Got::Pubrel(publish.id));
            }
        }
    }
    let (hub, _) = (gateway.stop().await, connection);
    let store = hub.store().unwrap().clone();
    drop(hub);
    store.close();

    let gateway = Gateway::on(hub_on_disk(directory.path()), by_priority(&peer));
    let mut connection = peer.welcome(true, &[]).await;
    let mut again = Vec::new();
    for _ in 0..ids.len() {
        again.push(match connection.next().await {
            Got::Pubrel(id) => (id, true),
            Got::Publish(publish) if publish.dup => (publish.id, false),
            other => panic!("{other:?}"),
        });
    }
    let expected: Vec<_> = ids.iter().enumerate().map(|(at, id)| (*id, at % 2 == 0)).collect();
    assert_eq!(again, expected, "what is urgent first, each where it was");
    for (id, is_released) in again {
        if !is_released {
            connection.pubrec(id).await;
            assert_eq!(connection.next().await, Got::Pubrel(id));
        }
        connection.pubcomp(id).await;
    }
    gateway.drained().await;
    gateway.stop().await;
}

#[tokio::test]
async fn a_backlog_on_disk_drains_by_priority_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let peer = Peer::bind().await;
    // More than is kept in memory, so that lanes are paged in.
    const EACH: u32 = 6000;
    let mut gateway = Gateway::on(hub_on_disk(directory.path()), by_priority(&peer));
    let mut last = None;
    for number in 0..EACH {
        for topic in ["devices/log", "devices/m/v", "devices/alarm"] {
            last = Some(gateway.publish_hastily(topic, &number.to_string(), QoS::AtLeastOnce));
        }
    }
    let fieldgate::hub::Outcome::Pending(receipt) = last.unwrap() else { panic!("the queue is durable") };
    until("all is on disk", || receipt.state() == fieldgate::store::ReceiptState::Done).await;
    let hub = gateway.stop().await;
    let store = hub.store().unwrap().clone();
    drop(hub);
    store.close();

    // The first one may still have been about to connect.
    let peer = Peer::bind().await;
    let gateway = Gateway::on(hub_on_disk(directory.path()), by_priority(&peer));
    assert_eq!(gateway.handle.queued().0, u64::from(3 * EACH));
    let mut connection = peer.welcome(true, &[]).await;
    for _ in 0..3 {
        assert_eq!(drain(&mut connection, &(EACH - 1).to_string()).await, numbers(0..EACH));
    }
    gateway.drained().await;
    gateway.stop().await;
}

#[tokio::test]
async fn no_more_is_sent_in_a_second_than_max_rate_allows() {
    let rate = |messages, bytes| MaxRate { messages: NonZeroU32::new(messages), bytes: NonZeroU64::new(bytes) };
    // Each lets about 50 messages pass in a second, and five at once.
    for (max_rate, size) in [(rate(50, 0), 10), (rate(0, 50_000), 960)] {
        let peer = Peer::bind().await;
        let mut gateway = Gateway::start(Settings { max_rate, ..settings(&peer) });
        for number in 0..30 {
            gateway.publish("devices/m/v", &format!("{number:0size$}"), QoS::AtLeastOnce).await;
        }
        let mut connection = peer.welcome(false, &[]).await;
        let began = Instant::now();
        drain(&mut connection, &format!("{:0size$}", 29)).await;
        // A slow machine only makes it longer.
        assert!(began.elapsed() >= Duration::from_millis(450), "{max_rate:?}: {:?}", began.elapsed());
        gateway.drained().await;
        let held_back = metric(&gateway, "fieldgate_upstream_held_back_seconds_total").unwrap();
        assert!(held_back > 0.4, "{max_rate:?}: {held_back}");
        gateway.stop().await;
    }
}

/// The number behind a metric of the upstream.
fn metric(gateway: &Gateway, name: &str) -> Option<f64> {
    let mut metrics = Metrics::default();
    gateway.handle.collect(&mut metrics);
    let start = format!("{name}{{upstream=\"cloud\"}} ");
    metrics.render().lines().find_map(|line| line.strip_prefix(&start)?.parse().ok())
}

#[tokio::test]
async fn people_see_how_a_backlog_goes() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    gateway.publish_numbers(0..2000).await;
    assert_eq!(metric(&gateway, "fieldgate_upstream_backlog_messages"), Some(2000.0));
    assert_eq!(metric(&gateway, "fieldgate_upstream_backlog_seconds"), Some(f64::INFINITY));
    let mut connection = peer.welcome(false, &receive_maximum(10)).await;
    until("the backlog is seen", || gateway.handle.progress().is_some_and(|progress| progress.messages == 1990)).await;
    let statuses = gateway.handle.statuses();
    let fact = statuses[0].facts.iter().find(|(name, _)| *name == "backlog");
    assert!(fact.unwrap().1.starts_with("1990 messages, 0 a second, not getting smaller"), "{fact:?}");
    assert_eq!(drain(&mut connection, "1999").await, numbers(0..2000));
    until("it is gone", || gateway.handle.progress().is_none()).await;
    assert_eq!(metric(&gateway, "fieldgate_upstream_backlog_seconds"), Some(0.0));
    gateway.stop().await;
}
