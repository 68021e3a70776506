//! Gateways bridged to each other with rules that overlap: nothing may go in circles.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldgate::bridge::rules::RuleSettings;
use fieldgate::bridge::url::{Scheme, Url};
use fieldgate::bridge::{Phase, Settings, Upstream, VersionChoice, backoff};
use fieldgate::hub::{Attach, Face, Hub, Link, Outbound, Publish, SessionSummary, SubscribeOptions};
use fieldgate::listener::{self, Listener};
use fieldgate::message::{Properties, QoS};
use fieldgate::observe::{Metrics, Observe};
use fieldgate::proto::mqtt::client::{Client, Options};
use fieldgate::proto::mqtt::{MAX_PACKET_BYTES, PublishHead, ReasonCode, Version, encode_publish};
use fieldgate::topic::SharedFilter;
use fieldgate::via::{self, GatewayId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::peer::{Got, PATIENCE, Peer};
use super::{Gateway, QUIET, hub_started_as, settings, until, with_commands};

/// A hub that can be reached, and someone on it who sees every message of the devices.
struct Site {
    hub: Hub,
    address: SocketAddr,
    counters: Arc<dyn Observe>,
    watcher: Link,
    _shutdown: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Site {
    async fn start(boot_id: &str) -> Self {
        let hub = hub_started_as(boot_id);
        let settings = listener::Settings::new("local", "127.0.0.1:0".parse().unwrap());
        let listener = Listener::bind(settings, hub.clone()).await.unwrap();
        let address = listener.local_address().unwrap();
        let counters = listener.observe();
        let (shutdown, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(listener.run(stopped));
        let mut watcher = hub.attach(Attach::internal(Face::Adapter, "watcher")).unwrap();
        let filter = SharedFilter::split("devices/#").unwrap();
        watcher.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
        Self { hub, address, counters, watcher, _shutdown: shutdown, _tasks: tasks }
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

    /// How many messages came to its listener that had been here before.
    fn looped(&self) -> u64 {
        let mut metrics = Metrics::default();
        self.counters.collect(&mut metrics);
        let text = metrics.render();
        let line = text.lines().find(|line| line.starts_with("fieldgate_listener_messages_looped_total{"));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).expect("a counter")
    }

    /// The next `count` payloads, and those that come soon after them.
    async fn sees(&mut self, count: usize) -> Vec<String> {
        let mut seen = Vec::new();
        loop {
            let patience = if seen.len() < count { PATIENCE } else { QUIET };
            let Ok(batch) = timeout(patience, self.watcher.next()).await else { return seen };
            // What goes in circles may do so without end.
            if seen.len() > 10 * count {
                return seen;
            }
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
        let (mut near, mut far) = (Site::start("near").await, Site::start("far").await);
        let both_ways = Settings { incoming: vec![everything()], ..far.upstream(version) };
        let mut gateway = Gateway::on(near.hub.clone(), both_ways);
        gateway.connected().await;
        gateway.publish("devices/m/v", "up", QoS::AtLeastOnce).await;
        assert_eq!(near.sees(1).await, ["up"], "{version:?}");
        assert_eq!(far.sees(1).await, ["up"], "{version:?}");
        // The subscription stands: what follows it was answered.
        let mut publisher = far.hub.attach(Attach::internal(Face::Mqtt, "far publisher")).unwrap();
        publisher.publish(Publish { qos: QoS::AtLeastOnce, ..Publish::new("devices/m/v", "down") });
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

/// Which rules an upstream has for the same topics.
#[derive(Clone, Copy, Debug)]
enum Ways {
    Out,
    In,
    Both,
}

impl Ways {
    fn of(self, settings: Settings) -> Settings {
        match self {
            Self::Out => settings,
            Self::Both => Settings { incoming: vec![everything()], ..settings },
            Self::In => Settings { outgoing: Vec::new(), incoming: vec![everything()], ..settings },
        }
    }
}

/// Whether the upstream of `gateway` on the hub `far` has all that it needs, and knows who that is.
fn has_met(gateway: &Gateway, far: &Hub, settings: &Settings) -> bool {
    let is_subscribed = |session: &SessionSummary| session.subscriptions.len() == settings.incoming.len();
    let is_there = |session: &SessionSummary| &*session.client_id == CLIENT && session.connected;
    gateway.handle.phase() == Phase::Connected
        && far.sessions().iter().any(|session| is_there(session) && is_subscribed(session))
        && (settings.version == VersionChoice::V5 || gateway.reason().is_some_and(|reason| reason.contains(OLD)))
}

const CLIENT: &str = "plant-7-cloud";
/// What a gateway says when it speaks 3.1.1 to another one, once it knows.
const OLD: &str = "the upstream is a Fieldgate and is spoken to in MQTT 3.1.1";

#[tokio::test]
async fn between_two_gateways_that_are_each_others_upstream_each_site_sees_a_message_once_and_none_goes_back() {
    use VersionChoice::{V3_1_1, V5};
    for versions in [[V5, V5], [V3_1_1, V3_1_1], [V5, V3_1_1], [V3_1_1, V5]] {
        for ways in [Ways::Out, Ways::In, Ways::Both] {
            let case = format!("{versions:?}, {ways:?}");
            let (mut near, mut far) = (Site::start("near").await, Site::start("far").await);
            let to_far = ways.of(far.upstream(versions[0]));
            let to_near = ways.of(near.upstream(versions[1]));
            let mut first = Gateway::on(near.hub.clone(), to_far.clone());
            let mut second = Gateway::on(far.hub.clone(), to_near.clone());
            until(&case, || has_met(&first, &far.hub, &to_far) && has_met(&second, &near.hub, &to_near)).await;
            for number in 0..5 {
                first.publish("devices/m/v", &format!("near {number}"), QoS::AtLeastOnce).await;
                second.publish("devices/m/v", &format!("far {number}"), QoS::ExactlyOnce).await;
            }
            let mut expected: Vec<_> =
                (0..5).flat_map(|number| [format!("far {number}"), format!("near {number}")]).collect();
            expected.sort();
            for site in [&mut near, &mut far] {
                let mut seen = site.sees(10).await;
                seen.sort();
                assert_eq!(seen, expected, "{case}");
            }
            // Of what one may send and the other fetch, it is sent.
            let [sent, received] = if matches!(ways, Ways::In) { [0, 5] } else { [5, 0] };
            for gateway in [first, second] {
                gateway.drained().await;
                for (what, count) in [("sent", sent), ("received", received)] {
                    let line = format!("fieldgate_upstream_messages_{what}_total{{upstream=\"cloud\"}} {count}");
                    assert!(gateway.metric(&line), "{case}: {line}");
                }
                assert!(gateway.metric(&dropped("looped", 0)), "{case}");
                gateway.stop().await;
            }
            assert_eq!((near.looped(), far.looped()), (0, 0), "{case}");
        }
    }
}

#[tokio::test]
async fn what_was_queued_before_it_is_known_who_the_upstream_is_does_not_go_back_to_it() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let (mut near, mut far) = (Site::start("near").await, Site::start("far").await);
        let to_far = far.upstream(version);
        let mut first = Gateway::on(near.hub.clone(), to_far.clone());
        until("the first has met the second", || has_met(&first, &far.hub, &to_far)).await;
        // Bound, it queues; it does not run yet.
        let upstream = Upstream::bind(near.upstream(version), "plant-7", far.hub.clone()).unwrap();
        let handle = upstream.handle();
        first.publish("devices/m/v", "x", QoS::AtLeastOnce).await;
        assert_eq!(far.sees(1).await, ["x"]);
        assert_eq!(handle.queued().0, 1);
        drop(upstream);
        let second = Gateway::on(far.hub.clone(), near.upstream(version));
        second.drained().await;
        assert!(second.metric("fieldgate_upstream_messages_sent_total{upstream=\"cloud\"} 0"), "{version:?}");
        assert_eq!(near.sees(1).await, ["x"], "{version:?}");
        first.stop().await;
        second.stop().await;
    }
}

#[tokio::test]
async fn retained_messages_are_not_given_back_to_the_gateway_that_they_came_from() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let (mut near, far) = (Site::start("near").await, Site::start("far").await);
        let to_far = far.upstream(version);
        let mut first = Gateway::on(near.hub.clone(), to_far.clone());
        until("the first has met the second", || has_met(&first, &far.hub, &to_far)).await;
        let on = Publish { retain: true, qos: QoS::AtLeastOnce, ..Publish::new("devices/m/v", "kept") };
        first.publisher.publish(on);
        first.publisher.flush();
        first.drained().await;
        first.stop().await;
        // A new subscription asks for all that is retained.
        let mut other = far.hub.attach(Attach::internal(Face::Mqtt, "other")).unwrap();
        other.publish(Publish { retain: true, ..Publish::new("devices/n/v", "its own") });
        other.flush();
        let first = Gateway::on(near.hub.clone(), Settings { incoming: vec![everything()], ..to_far });
        assert_eq!(near.sees(2).await, ["kept", "its own"], "{version:?}");
        first.stop().await;
    }
}

#[tokio::test]
async fn a_connection_that_is_lost_and_made_again_changes_nothing_about_it() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let (mut near, mut far) = (Site::start("near").await, Site::start("far").await);
        let (to_far, to_near) = (far.upstream(version), near.upstream(version));
        let mut first = Gateway::on(near.hub.clone(), to_far.clone());
        let mut second = Gateway::on(far.hub.clone(), to_near.clone());
        for round in 0..3 {
            until("both have met", || has_met(&first, &far.hub, &to_far) && has_met(&second, &near.hub, &to_near))
                .await;
            for gateway in [&first, &second] {
                gateway.handle.set_paused(true);
                until("it is cut", || gateway.handle.phase() == Phase::Paused).await;
            }
            first.publish("devices/m/v", &format!("near {round}"), QoS::AtLeastOnce).await;
            second.publish("devices/m/v", &format!("far {round}"), QoS::AtLeastOnce).await;
            first.handle.set_paused(false);
            second.handle.set_paused(false);
            for site in [&mut near, &mut far] {
                let mut seen = site.sees(2).await;
                seen.sort();
                assert_eq!(seen, [format!("far {round}"), format!("near {round}")], "{version:?}");
            }
        }
        first.stop().await;
        second.stop().await;
    }
}

#[tokio::test]
async fn around_three_gateways_a_message_is_seen_once_at_each_and_ends_where_it_began() {
    for ways in [Ways::Out, Ways::In] {
        let mut sites = [Site::start("a").await, Site::start("b").await, Site::start("c").await];
        let mut gateways = Vec::new();
        for (index, site) in sites.iter().enumerate() {
            let next = &sites[(index + 1) % 3];
            let settings = ways.of(next.upstream(VersionChoice::V5));
            let gateway = Gateway::on(site.hub.clone(), settings.clone());
            until("it has met the next", || has_met(&gateway, &next.hub, &settings)).await;
            gateways.push(gateway);
        }
        for (index, gateway) in gateways.iter_mut().enumerate() {
            gateway.publish("devices/m/v", &index.to_string(), QoS::AtLeastOnce).await;
        }
        for site in &mut sites {
            let mut seen = site.sees(3).await;
            seen.sort();
            assert_eq!(seen, ["0", "1", "2"], "{ways:?}");
        }
        for gateway in gateways {
            gateway.drained().await;
            gateway.stop().await;
        }
    }
}

#[tokio::test]
async fn through_a_third_broker_two_gateways_see_each_message_once() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let mut middle = Site::start("middle").await;
        let mut sites = [Site::start("a").await, Site::start("b").await];
        let mut gateways = Vec::new();
        for (site, client_id) in sites.iter().zip(["a", "b"]) {
            let settings = Settings {
                client_id: Some(client_id.into()),
                incoming: vec![everything()],
                ..middle.upstream(version)
            };
            gateways.push(Gateway::on(site.hub.clone(), settings));
            let subscribed =
                |session: &SessionSummary| &*session.client_id == client_id && session.subscriptions.len() == 1;
            until("it is subscribed", || middle.hub.sessions().iter().any(subscribed)).await;
        }
        for (index, gateway) in gateways.iter_mut().enumerate() {
            gateway.publish("devices/m/v", &index.to_string(), QoS::AtLeastOnce).await;
        }
        for site in sites.iter_mut().chain([&mut middle]) {
            let mut seen = site.sees(2).await;
            seen.sort();
            assert_eq!(seen, ["0", "1"], "{version:?}");
        }
        for gateway in gateways {
            assert!(gateway.metric(&dropped("looped", 0)), "{version:?}");
            gateway.stop().await;
        }
    }
}

#[tokio::test]
async fn a_command_with_the_user_properties_of_the_reading_that_it_answers_comes_through() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(with_commands(&peer));
    let mut device = gateway.hub.attach(Attach::internal(Face::Adapter, "device")).unwrap();
    let filter = SharedFilter::split("devices/+/+/set").unwrap();
    device.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
    gateway.publish("devices/m/v", "21.5", QoS::AtLeastOnce).await;
    let mut connection = peer.welcome(false, &[]).await;
    connection.grant().await;
    let reading = connection.next_publish().await;
    for (topic, id) in [("plant-7/devices/m/v/set", 7), ("plant-7/devices/m/v", 8)] {
        let mut properties = Properties::default();
        for (name, value) in &reading.user_properties {
            properties.set_user(name, value);
        }
        connection.publish_with(topic, "on", QoS::AtLeastOnce, id, &properties).await;
        assert_eq!(connection.next().await, Got::Puback(id, ReasonCode::Success));
    }
    let [Outbound::Publish(command)] = &timeout(PATIENCE, device.next()).await.unwrap()[..] else {
        panic!("one command")
    };
    assert_eq!((command.message.topic.as_str(), &*command.message.payload), ("devices/m/v/set", &b"on"[..]));
    gateway.stop().await;
}

#[tokio::test]
async fn what_comes_back_by_a_client_that_knows_nothing_of_it_is_acknowledged_and_not_taken() {
    let mut site = Site::start("near").await;
    let mut client = Client::<()>::new(Options::new("plain bridge"), Instant::now());
    let mut properties = Properties::default();
    via::note(GatewayId::of_boot("near"), None, "devices/m/v", &mut properties);
    let mut bytes = Vec::new();
    client.connect(Instant::now(), &mut bytes).unwrap();
    for (topic, payload, id) in [("devices/m/v", "back", 1), ("devices/m/v/copy", "its answer", 2)] {
        let head = PublishHead {
            qos: QoS::AtLeastOnce,
            packet_id: NonZeroU16::new(id),
            properties: Some(&properties),
            ..PublishHead::bare(topic, payload.as_bytes())
        };
        let _ = encode_publish(Version::V5, &head, MAX_PACKET_BYTES, usize::MAX, &mut bytes).unwrap();
    }
    let mut stream = TcpStream::connect(site.address).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    assert_eq!(site.sees(1).await, ["its answer"]);
    assert_eq!(site.looped(), 1);
    let mut answer = bytes::BytesMut::new();
    let (_, connack) = loop {
        stream.read_buf(&mut answer).await.unwrap();
        if let Some(decoded) = client.decode(&answer).unwrap() {
            break decoded;
        }
    };
    while answer.len() < connack + 8 {
        assert!(timeout(PATIENCE, stream.read_buf(&mut answer)).await.unwrap().unwrap() > 0);
    }
    // Two PUBACKs without a reason, which is success.
    assert_eq!(answer[connack..], [0x40, 2, 0, 1, 0x40, 2, 0, 2]);
}

#[tokio::test]
async fn a_message_that_has_crossed_as_many_bridges_as_may_be_goes_no_further() {
    let peer = Peer::bind().await;
    let settings = Settings { max_hops: 3, incoming: vec![everything()], ..settings(&peer) };
    let mut gateway = Gateway::start(settings);
    let mut connection = peer.welcome(false, &[]).await;
    connection.grant().await;
    // A peer that takes the list of gateways off, or does not know it, leaves the count.
    let crossed = |hops: &str| {
        let mut properties = Properties::default();
        properties.set_user("fieldgate-hops", hops);
        properties
    };
    for (hops, count) in [("2", 0), ("3", 1), ("200", 2)] {
        connection.publish_with("devices/m/v", "in", QoS::AtLeastOnce, 7, &crossed(hops)).await;
        assert_eq!(connection.next().await, Got::Puback(7, ReasonCode::Success));
        assert!(gateway.metric(&dropped("looped", count)), "{hops}");
    }
    for (hops, count) in [("3", 3), ("2", 3)] {
        let properties = Some(Box::new(crossed(hops)));
        gateway.publisher.publish(Publish {
            qos: QoS::AtLeastOnce,
            properties,
            ..Publish::new("devices/m/v", hops.to_owned())
        });
        gateway.publisher.flush();
        until("it is dropped or sent", || gateway.metric(&dropped("looped", count))).await;
    }
    assert_eq!(connection.next_publish().await.payload, "2");
    gateway.stop().await;
}

#[tokio::test]
async fn an_upstream_that_is_the_gateway_itself_is_told_and_gets_nothing() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let mut site = Site::start("itself").await;
        let both_ways = Settings { incoming: vec![everything()], ..site.upstream(version) };
        let mut gateway = Gateway::on(site.hub.clone(), both_ways);
        gateway.publish("devices/m/v", "x", QoS::AtLeastOnce).await;
        let is_told = || gateway.reason().is_some_and(|reason| reason.contains("this upstream is this gateway itself"));
        until("the reason is told", is_told).await;
        assert_eq!(site.sees(1).await, ["x"], "{version:?}");
        assert!(gateway.metric("fieldgate_upstream_messages_sent_total{upstream=\"cloud\"} 0"), "{version:?}");
        gateway.stop().await;
    }
}

#[tokio::test]
async fn a_broker_that_closes_on_the_question_who_it_is_is_not_asked_for_ever() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(Settings { version: VersionChoice::V3_1_1, ..settings(&peer) });
    gateway.publish("devices/m/v", "x", QoS::AtLeastOnce).await;
    for _ in 0..2 {
        let mut connection = peer.welcome(false, &[]).await;
        connection.is_plain = false;
        let Got::Subscribe(_, filters) = connection.next().await else { panic!("a question") };
        assert_eq!(filters[0].0, "$SYS/fieldgate/id");
    }
    let mut connection = peer.welcome(false, &[]).await;
    connection.is_plain = false;
    assert_eq!(connection.next_publish().await.payload, "x");
    gateway.stop().await;
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
