//! Gateways bridged to each other with rules that overlap: nothing may go in circles.

use std::net::SocketAddr;
use std::time::Duration;

use fieldgate::bridge::rules::RuleSettings;
use fieldgate::bridge::url::{Scheme, Url};
use fieldgate::bridge::{Settings, VersionChoice, backoff};
use fieldgate::hub::{Attach, Face, Hub, Link, Outbound, SubscribeOptions};
use fieldgate::listener::{self, Listener};
use fieldgate::message::QoS;
use fieldgate::proto::mqtt::{ReasonCode, Version};
use fieldgate::topic::SharedFilter;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::peer::{Got, PATIENCE, Peer};
use super::{Gateway, QUIET, hub_in_memory, settings, until};

/// A hub that can be reached, and someone on it who sees every message of the devices.
struct Site {
    hub: Hub,
    address: SocketAddr,
    watcher: Link,
    _shutdown: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Site {
    async fn start() -> Self {
        let hub = hub_in_memory();
        let settings = listener::Settings::new("local", "127.0.0.1:0".parse().unwrap());
        let listener = Listener::bind(settings, hub.clone()).await.unwrap();
        let address = listener.local_address().unwrap();
        let (shutdown, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(listener.run(stopped));
        let mut watcher = hub.attach(Attach::internal(Face::Adapter, "watcher")).unwrap();
        let filter = SharedFilter::split("devices/#").unwrap();
        watcher.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
        Self { hub, address, watcher, _shutdown: shutdown, _tasks: tasks }
    }

    /// Settings of an upstream that reaches this site, with no prefix that could keep topics apart.
    fn upstream(&self, version: VersionChoice) -> Settings {
        let url = Url { scheme: Scheme::Tcp, host: "127.0.0.1".into(), port: self.address.port(), path: String::new() };
        Settings {
            version,
            outgoing: vec![everything()],
            backoff: backoff::Settings {
                base: Duration::from_millis(5),
                cap: Duration::from_millis(50),
                stable: Duration::from_secs(10),
            },
            ..Settings::new("cloud", url)
        }
    }

    /// The next `count` payloads, and those that come soon after them.
    async fn sees(&mut self, count: usize) -> Vec<String> {
        let mut seen = Vec::new();
        loop {
            let patience = if seen.len() < count { PATIENCE } else { QUIET };
            let Ok(batch) = timeout(patience, self.watcher.next()).await else { return seen };
            for outbound in batch {
                let Outbound::Publish(delivery) = outbound else { panic!("QoS 0 has no release") };
                seen.push(String::from_utf8(delivery.message.payload.to_vec()).unwrap());
            }
        }
    }
}

fn everything() -> RuleSettings {
    RuleSettings::new("devices/#")
}

fn dropped(reason: &str, count: u32) -> String {
    format!("fieldgate_upstream_messages_dropped_total{{upstream=\"cloud\",reason=\"{reason}\"}} {count}")
}

#[tokio::test]
async fn over_one_bridge_that_forwards_the_same_topics_both_ways_each_side_sees_a_message_once() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let (mut near, mut far) = (Site::start().await, Site::start().await);
        let both_ways = Settings { incoming: vec![everything()], ..far.upstream(version) };
        let mut gateway = Gateway::on(near.hub.clone(), both_ways);
        gateway.connected().await;
        gateway.publish("devices/m/v", "up", QoS::AtLeastOnce).await;
        assert_eq!(near.sees(1).await, ["up"], "{version:?}");
        assert_eq!(far.sees(1).await, ["up"], "{version:?}");
        // The subscription stands: what follows it was answered.
        let mut publisher = far.hub.attach(Attach::internal(Face::Mqtt, "far publisher")).unwrap();
        let down = fieldgate::hub::Publish::new("devices/m/v", "down".to_owned());
        publisher.publish(fieldgate::hub::Publish { qos: QoS::AtLeastOnce, ..down });
        publisher.flush();
        assert_eq!(far.sees(1).await, ["down"], "{version:?}");
        assert_eq!(near.sees(1).await, ["down"], "{version:?}");
        for line in [dropped("looped", 0), dropped("unwanted", 0)] {
            assert!(gateway.metric(&line), "{version:?}: {line}");
        }
        assert!(gateway.metric("fieldgate_upstream_messages_received_total{upstream=\"cloud\"} 1"), "{version:?}");
        gateway.stop().await;
    }
}

/// Two gateways that each have the other as an upstream; what the first publishes, as both sites see it, and how often
/// each gateway has ended the circle.
async fn around(max_hops: u8, ended_by_first: u32) -> (usize, usize) {
    let (mut near, mut far) = (Site::start().await, Site::start().await);
    let limited = |settings| Settings { max_hops, ..settings };
    let mut first = Gateway::on(near.hub.clone(), limited(far.upstream(VersionChoice::V5)));
    let second = Gateway::on(far.hub.clone(), limited(near.upstream(VersionChoice::V5)));
    first.connected().await;
    second.connected().await;
    first.publish("devices/m/v", "x", QoS::AtLeastOnce).await;
    let ended = |gateway: &Gateway, count| gateway.metric(&dropped("looped", count));
    until("the circle is ended", || ended(&first, ended_by_first) && ended(&second, 1 - ended_by_first)).await;
    let seen = (near.sees(1).await.len(), far.sees(1).await.len());
    first.drained().await;
    second.drained().await;
    first.stop().await;
    second.stop().await;
    seen
}

#[tokio::test]
async fn between_two_gateways_that_are_each_others_upstream_hops_end_the_circle() {
    assert_eq!(around(1, 0).await, (1, 1));
    // Out, back, out and back again: three times here, of which the first is the publisher's own, and twice there.
    assert_eq!(around(4, 1).await, (3, 2));
}

#[tokio::test]
async fn rules_that_only_fetch_from_each_other_end_their_circle_too() {
    let (mut near, far) = (Site::start().await, Site::start().await);
    let fetch = |site: &Site| Settings {
        max_hops: 2,
        outgoing: Vec::new(),
        incoming: vec![everything()],
        ..site.upstream(VersionChoice::V5)
    };
    let mut first = Gateway::on(near.hub.clone(), fetch(&far));
    let second = Gateway::on(far.hub.clone(), fetch(&near));
    first.connected().await;
    second.connected().await;
    let subscribed = |hub: &Hub| {
        let sessions = hub.sessions();
        sessions.iter().any(|session| &*session.client_id == "plant-7-cloud" && session.subscriptions.len() == 1)
    };
    let (near_hub, far_hub) = (near.hub.clone(), far.hub.clone());
    until("both have subscribed", || subscribed(&near_hub) && subscribed(&far_hub)).await;
    first.publish("devices/m/v", "x", QoS::AtLeastOnce).await;
    until("the circle is ended", || second.metric(&dropped("looped", 1))).await;
    assert_eq!(near.sees(2).await, ["x", "x"]);
    assert!(first.metric(&dropped("looped", 0)));
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn an_older_broker_that_does_not_know_bridges_is_spoken_to_as_a_client() {
    let peer = Peer::bind().await;
    let gateway = Gateway::start(Settings { version: VersionChoice::V3_1_1, ..settings(&peer) });
    for (expected, answer) in [(true, Some(ReasonCode::UnsupportedProtocolVersion)), (false, None), (true, None)] {
        let mut connection = peer.accept().await;
        let Got::Connect { version, is_bridge, .. } = connection.next().await else { panic!("a CONNECT comes first") };
        assert_eq!((version, is_bridge), (Version::V3_1_1, expected));
        if let Some(reason) = answer {
            connection.connack(false, reason, &[]).await;
        }
        // Closed; not the mark's fault where it came without one.
    }
    let mut connection = peer.accept().await;
    assert!(matches!(connection.next().await, Got::Connect { is_bridge: false, .. }));
    connection.connack(false, ReasonCode::Success, &[]).await;
    gateway.connected().await;
    gateway.stop().await;
}
