//! Upstreams that are not always connected: lazy, scheduled, manual; and what they say of it.

use std::time::Duration;

use fieldgate::bridge::schedule::{Cron, Schedule, Zone};
use fieldgate::bridge::{Connection, Phase, Settings};
use fieldgate::hub::{Attach, Face, Hub, Link, Outbound, QueueLimits, SubscribeOptions, WhenFull};
use fieldgate::message::QoS;
use fieldgate::observe::{Health, Observe};
use fieldgate::proto::mqtt::ReasonCode;
use fieldgate::topic::SharedFilter;
use tokio::time::timeout;

use super::peer::{Got, PATIENCE, Peer};
use super::{Gateway, QUIET, hub_in_memory, numbers, settings, until};

impl Gateway {
    async fn rests(&self, phase: Phase) {
        until("it rests", || self.handle.phase() == phase).await;
    }
}

/// Sees what an upstream publishes about itself.
async fn watcher(hub: &Hub) -> Link {
    let mut watcher = hub.attach(Attach::internal(Face::Web, "watcher")).unwrap();
    let filter = SharedFilter::split("$SYS/fieldgate/upstreams/cloud").unwrap();
    watcher.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
    watcher
}

/// Waits until the upstream's report holds `expected`.
async fn says(watcher: &mut Link, expected: &[&str]) {
    loop {
        for outbound in timeout(PATIENCE, watcher.next()).await.unwrap() {
            let Outbound::Publish(delivery) = outbound else { continue };
            let report = String::from_utf8(delivery.message.payload.to_vec()).unwrap();
            if expected.iter().all(|part| report.contains(part)) {
                return;
            }
        }
    }
}

#[tokio::test]
async fn a_lazy_upstream_connects_when_something_waits_and_leaves_when_nothing_has_crossed_for_a_while() {
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let mut watcher = watcher(&hub).await;
    let lazy = Settings { connection: Connection::Lazy, idle_timeout: Duration::from_millis(200), ..settings(&peer) };
    let mut gateway = Gateway::on(hub, lazy);
    says(&mut watcher, &["\"state\":\"idle\"", "connects when something waits (`connection: lazy`)"]).await;
    assert!(peer.accept_within(QUIET).await.is_none());
    for (session_present, range) in [(false, 0..3), (true, 3..5)] {
        gateway.publish_numbers(range.clone()).await;
        let mut connection = peer.welcome(session_present, &[]).await;
        assert_eq!(super::drain(&mut connection, &(range.end - 1).to_string()).await, numbers(range));
        says(&mut watcher, &["\"state\":\"connected\""]).await;
        assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
        gateway.rests(Phase::Idle).await;
        assert!(gateway.metric("fieldgate_upstream_state{upstream=\"cloud\",state=\"idle\"} 1"));
        assert!(gateway.metric("fieldgate_upstream_state{upstream=\"cloud\",state=\"connected\"} 0"));
    }
    assert_eq!(gateway.handle.statuses()[0].health, Health::Paused);
    gateway.stop().await;
}

#[tokio::test]
async fn a_lazy_connection_stays_while_messages_wait_for_their_acknowledgement_or_come_down() {
    let peer = Peer::bind().await;
    let idle_timeout = Duration::from_millis(200);
    let lazy = Settings { connection: Connection::Lazy, idle_timeout, ..super::with_commands(&peer) };
    let mut gateway = Gateway::start(lazy);
    gateway.publish_numbers(0..1).await;
    let mut connection = peer.welcome(false, &[]).await;
    connection.grant().await;
    let publish = connection.next_publish().await;
    assert_eq!(connection.within(2 * idle_timeout).await, None, "it waits for its acknowledgement");
    connection.puback(publish.id, ReasonCode::Success).await;
    connection.publish("plant-7/devices/m/v/set", "1", QoS::AtLeastOnce, 7).await;
    assert_eq!(connection.next().await, Got::Puback(7, ReasonCode::Success));
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    gateway.stop().await;
}

#[tokio::test]
async fn a_manual_upstream_connects_when_it_is_told_to_and_a_successor_does_as_well() {
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let mut watcher = watcher(&hub).await;
    let manual = Settings { connection: Connection::Manual, ..settings(&peer) };
    let mut gateway = Gateway::on(hub, manual.clone());
    says(&mut watcher, &["\"state\":\"paused\"", "when an operator says so"]).await;
    gateway.publish_numbers(0..2).await;
    assert!(gateway.handle.is_paused());
    assert!(peer.accept_within(QUIET).await.is_none());
    gateway.handle.set_paused(false);
    let mut connection = peer.welcome(false, &[]).await;
    assert_eq!(super::drain(&mut connection, "1").await, numbers(0..2));
    gateway.drained().await;
    // A reload with changed settings binds it anew.
    let before = gateway.handle.clone();
    let hub = gateway.stop().await;
    let changed = Settings { keep_alive: Duration::from_secs(30), ..manual };
    let gateway = Gateway::on(hub, changed);
    gateway.handle.succeed(&before);
    let mut connection = peer.welcome(true, &[]).await;
    gateway.connected().await;
    gateway.handle.set_paused(true);
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    gateway.rests(Phase::Paused).await;
    gateway.stop().await;
}

#[tokio::test]
async fn an_upstream_says_that_its_queue_is_full_and_what_it_has_given_up() {
    let peer = Peer::bind().await;
    let queue = Some(QueueLimits { max_messages: 10, when_full: WhenFull::DropOldest, ..QueueLimits::default() });
    let full = Settings { connection: Connection::Manual, queue, ..settings(&peer) };
    let mut gateway = Gateway::start(full);
    gateway.rests(Phase::Paused).await;
    gateway.publish_numbers(0..10).await;
    let look = |gateway: &Gateway| {
        let status = gateway.handle.statuses().remove(0);
        let dropped = status.facts.into_iter().find(|(name, _)| *name == "dropped").map(|(_, value)| value);
        (status.health, status.reason.unwrap_or_default(), dropped)
    };
    let resting = "connects when an operator says so (`connection: manual`)";
    assert_eq!(look(&gateway), (Health::Paused, resting.to_owned(), None));
    gateway.publish_numbers(10..13).await;
    let lossy = format!("the queue is full: the oldest messages are given up for new ones; {resting}");
    assert_eq!(look(&gateway), (Health::Degraded, lossy, Some("3 queue full".into())));
    assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"queue_full\"} 3"));
    assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"looped\"} 0"));
    gateway.handle.connect();
    let mut connection = peer.welcome(false, &[]).await;
    assert_eq!(super::drain(&mut connection, "12").await, numbers(3..13));
    until("there is room", || look(&gateway) == (Health::Good, String::new(), Some("3 queue full".into()))).await;
    gateway.stop().await;
}

fn scheduled(peer: &Peer, cron: &str, duration: Duration) -> Settings {
    let cron: Vec<Cron> = vec![cron.parse().unwrap()];
    let schedule = Schedule { cron, duration, zone: Zone::Utc };
    Settings { connection: Connection::Scheduled(schedule), idle_timeout: Duration::from_millis(100), ..settings(peer) }
}

#[tokio::test]
async fn outside_its_windows_a_scheduled_upstream_connects_only_by_hand_and_until_all_is_sent() {
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let mut watcher = watcher(&hub).await;
    let mut gateway = Gateway::on(hub, scheduled(&peer, "0 0 29 2 *", Duration::from_millis(1)));
    says(&mut watcher, &["\"state\":\"scheduled\"", "connects at certain times", "\"next_attempt\":\"20", "-02-29T"])
        .await;
    gateway.publish_numbers(0..3).await;
    assert!(peer.accept_within(QUIET).await.is_none());
    gateway.handle.connect();
    let mut connection = peer.welcome(false, &[]).await;
    assert_eq!(super::drain(&mut connection, "2").await, numbers(0..3));
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    gateway.rests(Phase::Scheduled).await;
    gateway.publish_numbers(3..4).await;
    assert!(peer.accept_within(QUIET).await.is_none());
    gateway.stop().await;
}

#[tokio::test]
async fn a_window_that_closes_ends_the_connection() {
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let now = hub.clock().now();
    // It began with this minute and is open for a little longer.
    let minutes = now.0 / 60_000;
    let cron = format!("{} {} * * *", minutes % 60, minutes / 60 % 24);
    let open = Duration::from_millis((now.0 % 60_000).unsigned_abs()) + Duration::from_secs(3);
    let mut gateway = Gateway::on(hub, scheduled(&peer, &cron, open));
    let mut connection = peer.welcome(false, &[]).await;
    gateway.publish_numbers(0..1).await;
    assert_eq!(super::drain(&mut connection, "0").await, numbers(0..1));
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    assert!(gateway.hub.clock().now().since(now) >= Duration::from_secs(3), "not by idleness");
    gateway.rests(Phase::Scheduled).await;
    gateway.stop().await;
}
