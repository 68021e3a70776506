//! An upstream against a scripted peer, and against our own broker over a line that breaks.

mod aws;
mod azure;
mod cloud;
mod failover;
mod lanes;
mod loops;
mod modes;
mod peer;
mod picky;
mod provenance;
mod proxy;
mod tls;

use std::path::Path;
use std::time::Duration;

use fieldgate::bridge::backoff;
use fieldgate::bridge::rules::{Naming, RuleSettings};
use fieldgate::bridge::{AddressOrder, Handle, Phase, Settings, Upstream, VersionChoice};
use fieldgate::clock::Clock;
use fieldgate::hub::{self, Attach, Face, Hub, Link, Outbound, Outcome, SubscribeOptions};
use fieldgate::message::{Message, Properties, QoS};
use fieldgate::observe::{Health, Metrics, Observe};
use fieldgate::proto::mqtt::{Disconnect, Packet, Property, ReasonCode, Version};
use fieldgate::secret::Secret;
use fieldgate::store::{self, ReceiptState, Store};
use fieldgate::tls::issue::{Authority, LOOPBACK_NAMES, Usage};
use fieldgate::tls::{ClientSettings, ServerTls};
use fieldgate::topic::{SharedFilter, TopicName};
use fieldgate::via::{self, GatewayId};
use peer::{Connection, Got, PATIENCE, Peer, Publish, Will};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long to make sure that nothing comes.
const QUIET: Duration = Duration::from_millis(100);

/// A gateway with one upstream, without any listener.
struct Gateway {
    hub: Hub,
    handle: Handle,
    shutdown: watch::Sender<bool>,
    tasks: JoinSet<()>,
    publisher: Link,
}

impl Gateway {
    fn start(settings: Settings) -> Self {
        Self::on(hub_in_memory(), settings)
    }

    fn on(hub: Hub, settings: Settings) -> Self {
        let (shutdown, stopped) = watch::channel(false);
        let upstream = Upstream::bind(settings, "plant-7", hub.clone()).unwrap();
        let handle = upstream.handle();
        let mut tasks = JoinSet::new();
        tasks.spawn(upstream.run(stopped));
        let publisher = hub.attach(Attach::internal(Face::Mqtt, "publisher")).unwrap();
        Self { hub, handle, shutdown, tasks, publisher }
    }

    fn publish_hastily(&mut self, topic: &str, payload: &str, qos: QoS) -> Outcome {
        let outcome = self.publisher.publish(hub::Publish { qos, ..hub::Publish::new(topic, payload.to_owned()) });
        self.publisher.flush();
        outcome
    }

    /// Publishes, and waits until it may be acknowledged.
    async fn publish(&mut self, topic: &str, payload: &str, qos: QoS) {
        if let Outcome::Pending(receipt) = self.publish_hastily(topic, payload, qos) {
            until("the message is on disk", || receipt.state() == ReceiptState::Done).await;
        }
    }

    async fn publish_numbers(&mut self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            self.publish("devices/m/v", &number.to_string(), QoS::AtLeastOnce).await;
        }
    }

    async fn connected(&self) {
        until("the upstream is connected", || self.handle.phase() == Phase::Connected).await;
    }

    async fn drained(&self) {
        until("the queue is empty", || self.handle.queued().0 == 0).await;
    }

    fn metric(&self, line: &str) -> bool {
        let mut metrics = Metrics::default();
        self.handle.collect(&mut metrics);
        metrics.render().lines().any(|found| found == line)
    }

    fn reason(&self) -> Option<String> {
        self.handle.statuses().remove(0).reason
    }

    async fn stop(mut self) -> Hub {
        self.shutdown.send(true).unwrap();
        timeout(PATIENCE, self.tasks.join_next()).await.expect("the upstream stops").unwrap().unwrap();
        self.hub
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what}"));
}

fn hub_in_memory() -> Hub {
    hub_started_as("boot")
}

/// As [`hub_in_memory`], for the gateway at the other end: each start of one has a boot id of its own.
fn hub_started_as(boot_id: &str) -> Hub {
    Hub::new(hub::Settings::default(), Clock::start(boot_id), None).unwrap()
}

fn hub_on_disk(directory: &Path) -> Hub {
    let clock = Clock::start("boot");
    let opened = Store::bind(store::Settings::new(directory), clock.clone()).unwrap();
    Hub::new(hub::Settings::default(), clock, Some(opened)).unwrap()
}

fn rule(filter: &str, qos: QoS) -> RuleSettings {
    RuleSettings { qos, ..RuleSettings::new(filter).under("{gateway}/") }
}

fn settings(peer: &Peer) -> Settings {
    Settings {
        outgoing: vec![rule("devices/#", QoS::ExactlyOnce)],
        backoff: backoff::Settings {
            base: Duration::from_millis(5),
            cap: Duration::from_millis(50),
            stable: Duration::from_secs(10),
        },
        ..Settings::new("cloud", peer.url())
    }
}

fn with_commands(peer: &Peer) -> Settings {
    Settings { incoming: vec![rule("devices/+/+/set", QoS::ExactlyOnce)], ..settings(peer) }
}

fn published(payload: &str, qos: u8, id: u16) -> Publish {
    let user_properties = marks("devices/m/v");
    let topic = "plant-7/devices/m/v".into();
    Publish { topic, payload: payload.into(), qos, retain: false, dup: false, id, expiry: None, user_properties }
}

/// What the bridge writes on a message that is published under `topic` on a hub of these tests.
fn marks(topic: &str) -> Vec<(String, String)> {
    let mut properties = Properties::default();
    properties.set_user("fieldgate-hops", "1");
    via::note(GatewayId::of_boot("boot"), None, topic, &mut properties);
    properties.user_properties.into_iter().map(|(name, value)| (name.into(), value.into())).collect()
}

/// Acknowledges PUBLISH packets of QoS 1 until the payload is `last`; their payloads.
async fn drain(connection: &mut Connection, last: &str) -> Vec<String> {
    let mut payloads = Vec::new();
    loop {
        let publish = connection.next_publish().await;
        connection.puback(publish.id, ReasonCode::Success).await;
        payloads.push(publish.payload);
        if payloads.last().is_some_and(|payload| payload == last) {
            return payloads;
        }
    }
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

#[tokio::test]
async fn what_was_published_during_an_outage_arrives_in_order_after_it() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    gateway.publish_numbers(0..50).await;
    let mut connection = peer.welcome(false, &[]).await;
    assert_eq!(drain(&mut connection, "49").await, numbers(0..50));
    drop(connection);
    gateway.publish_numbers(50..100).await;
    let mut connection = peer.welcome(true, &[]).await;
    gateway.publish_numbers(100..110).await;
    let arrived = drain(&mut connection, "109").await;
    assert_eq!(arrived, numbers(50..110));
    gateway.drained().await;
    assert!(gateway.metric("fieldgate_upstream_messages_sent_total{upstream=\"cloud\"} 110"));
    gateway.stop().await;
}

#[tokio::test]
async fn the_queue_survives_the_process() {
    let peer = Peer::bind().await;
    let directory = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::on(hub_on_disk(directory.path()), settings(&peer));
    gateway.publish_numbers(0..20).await;
    let mut connection = peer.welcome(false, &[]).await;
    for number in 0..5 {
        let publish = connection.next_publish().await;
        assert_eq!(publish.payload, number.to_string());
        connection.puback(publish.id, ReasonCode::Success).await;
    }
    until("five are acknowledged", || gateway.handle.queued().0 == 15).await;
    let (hub, _) = (gateway.stop().await, connection);
    let store = hub.store().unwrap().clone();
    drop(hub);
    store.close();

    let gateway = Gateway::on(hub_on_disk(directory.path()), settings(&peer));
    let mut connection = peer.welcome(true, &[]).await;
    assert_eq!(drain(&mut connection, "19").await, numbers(5..20));
    gateway.drained().await;
    gateway.stop().await;
}

#[tokio::test]
async fn an_unacknowledged_message_is_sent_again_under_its_identifier() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    gateway.publish("devices/m/v", "once", QoS::AtLeastOnce).await;
    gateway.publish("devices/m/v", "exactly", QoS::ExactlyOnce).await;
    let mut connection = peer.welcome(false, &[]).await;
    let (first, second) = (connection.next_publish().await, connection.next_publish().await);
    assert_eq!(first, published("once", 1, first.id));
    assert_eq!(second, published("exactly", 2, second.id));
    drop(connection);
    let mut connection = peer.welcome(true, &[]).await;
    assert_eq!(connection.next_publish().await, Publish { dup: true, ..first.clone() });
    assert_eq!(connection.next_publish().await, Publish { dup: true, ..second.clone() });
    // The upstream has lost our session: for it they are new.
    drop(connection);
    let mut connection = peer.welcome(false, &[]).await;
    assert_eq!(connection.next_publish().await, first);
    assert_eq!(connection.next_publish().await, second);
    gateway.stop().await;
}

#[tokio::test]
async fn a_qos_2_handshake_goes_on_where_the_connection_was_cut() {
    for on_disk in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let peer = Peer::bind().await;
        let hub = if on_disk { hub_on_disk(directory.path()) } else { hub_in_memory() };
        let mut gateway = Gateway::on(hub, settings(&peer));
        gateway.publish("devices/m/v", "exactly", QoS::ExactlyOnce).await;
        let mut connection = peer.welcome(false, &[]).await;
        let id = connection.next_publish().await.id;
        connection.pubrec(id).await;
        assert_eq!(connection.next().await, Got::Pubrel(id));
        drop(connection);
        let mut connection = peer.welcome(true, &[]).await;
        assert_eq!(connection.next().await, Got::Pubrel(id), "not the message again");
        connection.pubcomp(id).await;
        gateway.drained().await;
        gateway.publish("devices/m/v", "next", QoS::ExactlyOnce).await;
        assert_eq!(connection.next_publish().await.payload, "next");
        gateway.stop().await;
    }
}

#[tokio::test]
async fn commands_reach_the_hub_once_and_do_not_go_back() {
    for on_disk in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let peer = Peer::bind().await;
        let hub = if on_disk { hub_on_disk(directory.path()) } else { hub_in_memory() };
        let mut device = hub.attach(Attach::internal(Face::Adapter, "device")).unwrap();
        let filter = SharedFilter::split("devices/#").unwrap();
        device.subscribe(&filter, SubscribeOptions::new(QoS::ExactlyOnce)).unwrap();
        let gateway = Gateway::on(hub, with_commands(&peer));
        let mut connection = peer.welcome(false, &[]).await;
        let asked = vec![("plant-7/devices/+/+/set".to_owned(), QoS::ExactlyOnce, true)];
        assert_eq!(connection.grant().await, asked);

        connection.publish("plant-7/devices/m/v/set", "1", QoS::AtLeastOnce, 7).await;
        assert_eq!(connection.next().await, Got::Puback(7, ReasonCode::Success));
        for _ in 0..2 {
            connection.publish("plant-7/devices/m/v/set", "2", QoS::ExactlyOnce, 8).await;
            assert_eq!(connection.next().await, Got::Pubrec(8, ReasonCode::Success));
        }
        connection.pubrel(8).await;
        assert_eq!(connection.next().await, Got::Pubcomp(8));
        connection.publish("plant-7/other", "unwanted", QoS::AtLeastOnce, 9).await;
        assert_eq!(connection.next().await, Got::Puback(9, ReasonCode::Success));

        let mut commands = Vec::new();
        while commands.len() < 2 {
            for outbound in timeout(PATIENCE, device.next()).await.unwrap() {
                let Outbound::Publish(delivery) = outbound else { continue };
                commands.push((delivery.message.topic.to_string(), delivery.message.payload.clone()));
                device.acknowledge(delivery.packet_id.unwrap());
            }
        }
        let expected = [("devices/m/v/set".to_owned(), "1".into()), ("devices/m/v/set".to_owned(), "2".into())];
        assert_eq!(commands, expected);
        assert_eq!(connection.within(QUIET).await, None, "nothing goes back");
        let dropped = "fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"unwanted\"} 1";
        assert!(gateway.metric(dropped));
        gateway.stop().await;
    }
}

#[tokio::test]
async fn a_lost_remote_session_makes_its_identifiers_new_again() {
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let mut device = hub.attach(Attach::internal(Face::Adapter, "device")).unwrap();
    let filter = SharedFilter::split("devices/#").unwrap();
    device.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
    let gateway = Gateway::on(hub, with_commands(&peer));
    for (session_present, payload) in [(false, "first"), (true, "repeated"), (false, "second")] {
        let mut connection = peer.welcome(session_present, &[]).await;
        connection.grant().await;
        connection.publish("plant-7/devices/m/v/set", payload, QoS::ExactlyOnce, 1).await;
        assert_eq!(connection.next().await, Got::Pubrec(1, ReasonCode::Success));
        // Cut before the PUBREL.
    }
    let mut commands = Vec::new();
    while commands.len() < 2 {
        for outbound in timeout(PATIENCE, device.next()).await.unwrap() {
            let Outbound::Publish(delivery) = outbound else { continue };
            commands.push(delivery.message.payload.clone());
        }
    }
    assert_eq!(commands, ["first", "second"]);
    gateway.stop().await;
}

#[tokio::test]
async fn a_session_that_only_the_upstream_remembers_is_begun_anew() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let peer = Peer::bind().await;
        let mut gateway = Gateway::start(Settings { version, ..settings(&peer) });
        let mut connects = Vec::new();
        let mut session_present = true;
        let mut connection = loop {
            let mut connection = peer.accept().await;
            let Got::Connect { clean_start, .. } = connection.next().await else { panic!("a CONNECT comes first") };
            connects.push(clean_start);
            session_present &= !clean_start;
            connection.connack(session_present, ReasonCode::Success, &[]).await;
            // In 3.1.1 a session that begins clean ends with its connection.
            if session_present || clean_start && version == VersionChoice::V3_1_1 {
                assert!(matches!(connection.next().await, Got::Disconnect(_)));
            } else {
                break connection;
            }
        };
        let expected: &[bool] = if version == VersionChoice::V5 { &[false, true] } else { &[false, true, false] };
        assert_eq!(connects, expected, "{version:?}");
        gateway.publish("devices/m/v", "1", QoS::AtLeastOnce).await;
        let publish = connection.next_publish().await;
        connection.puback(publish.id, ReasonCode::Success).await;
        gateway.drained().await;
        drop(connection);
        // From here on it is the session that both know.
        let mut connection = peer.accept().await;
        assert!(matches!(connection.next().await, Got::Connect { clean_start: false, .. }));
        connection.connack(true, ReasonCode::Success, &[]).await;
        gateway.publish("devices/m/v", "2", QoS::AtLeastOnce).await;
        assert_eq!(connection.next_publish().await.payload, "2");
        gateway.stop().await;
    }
}

#[tokio::test]
async fn no_more_messages_are_in_flight_than_the_upstream_allows() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    gateway.publish_numbers(0..10).await;
    let two = [Property::ReceiveMaximum(2.try_into().unwrap())];
    let mut connection = peer.welcome(false, &two).await;
    let (first, second) = (connection.next_publish().await, connection.next_publish().await);
    assert_eq!(connection.within(QUIET).await, None);
    connection.puback(second.id, ReasonCode::Success).await;
    assert_eq!(connection.next_publish().await.payload, "2");
    assert_eq!(connection.within(QUIET).await, None);
    connection.puback(first.id, ReasonCode::Success).await;
    assert_eq!(connection.next_publish().await.payload, "3");
    gateway.stop().await;
}

#[tokio::test]
async fn an_older_upstream_gets_no_more_qos_2_than_mosquitto_bears() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(Settings { version: VersionChoice::V3_1_1, ..settings(&peer) });
    for number in 0..30 {
        gateway.publish("devices/m/v", &number.to_string(), QoS::ExactlyOnce).await;
    }
    let mut connection = peer.welcome(false, &[]).await;
    let mut first = 0;
    for number in 0..20 {
        let publish = connection.next_publish().await;
        assert_eq!(publish.payload, number.to_string());
        first = if number == 0 { publish.id } else { first };
    }
    assert_eq!(connection.within(QUIET).await, None);
    connection.pubrec(first).await;
    assert_eq!(connection.next().await, Got::Pubrel(first));
    assert_eq!(connection.within(QUIET).await, None, "its handshake is not over");
    connection.pubcomp(first).await;
    assert_eq!(connection.next_publish().await.payload, "20");
    gateway.stop().await;
}

#[tokio::test]
async fn what_the_upstream_cannot_take_is_sent_as_allowed_or_given_up_and_never_blocks() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    gateway.publish("devices/m/v", &"x".repeat(500), QoS::AtLeastOnce).await;
    gateway.publish("devices/m/v", "small", QoS::ExactlyOnce).await;
    gateway.hub.publish(
        Message::new(TopicName::new("devices/m/v").unwrap(), "kept", QoS::AtLeastOnce, Clock::start("x").now())
            .retained(),
    );
    let limits = [
        Property::MaximumPacketSize(100.try_into().unwrap()),
        Property::MaximumQoS(QoS::AtMostOnce),
        Property::RetainAvailable(false),
    ];
    let mut connection = peer.welcome(false, &limits).await;
    assert_eq!(connection.next_publish().await, published("small", 0, 0));
    assert_eq!(connection.next_publish().await, published("kept", 0, 0));
    gateway.drained().await;
    assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"too_large\"} 1"));
    assert!(gateway.metric("fieldgate_upstream_messages_lowered_total{upstream=\"cloud\"} 2"));
    gateway.stop().await;
}

#[tokio::test]
async fn a_message_the_upstream_refuses_is_counted_and_one_it_has_no_room_for_is_sent_again() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    gateway.publish_numbers(0..2).await;
    let mut connection = peer.welcome(false, &[]).await;
    let (first, second) = (connection.next_publish().await, connection.next_publish().await);
    connection.puback(first.id, ReasonCode::NotAuthorized).await;
    connection.puback(second.id, ReasonCode::QuotaExceeded).await;
    assert_eq!(connection.next().await, Got::Closed);
    let mut connection = peer.welcome(true, &[]).await;
    assert_eq!(connection.next_publish().await, Publish { dup: true, ..second.clone() });
    connection.puback(second.id, ReasonCode::Success).await;
    gateway.drained().await;
    assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"refused\"} 1"));
    gateway.stop().await;
}

#[tokio::test]
async fn an_older_broker_is_spoken_to_in_its_version() {
    let refuses = async |answer: Option<&[u8]>| {
        let peer = Peer::bind().await;
        let mut gateway = Gateway::start(Settings { username: Some("me".into()), ..with_commands(&peer) });
        let mut connection = peer.accept().await;
        assert!(matches!(connection.next().await, Got::Connect { version: Version::V5, clean_start: false, .. }));
        if let Some(bytes) = answer {
            connection.send_bytes(bytes).await;
        } else {
            // Silence may mean anything: 3.1.1 is tried, and where it is taken, 5 once more.
            drop(connection);
            connection = peer.welcome(false, &[]).await;
            assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
            connection = peer.accept().await;
            assert!(matches!(connection.next().await, Got::Connect { version: Version::V5, .. }));
        }
        drop(connection);
        let mut connection = peer.accept().await;
        let expected = Got::Connect {
            version: Version::V3_1_1,
            is_bridge: true,
            clean_start: false,
            client_id: "plant-7-cloud".into(),
            user: Some("me".into()),
            password: None,
            will: None,
        };
        assert_eq!(connection.next().await, expected);
        connection.connack(false, ReasonCode::Success, &[]).await;
        connection.grant().await;
        gateway.publish("devices/m/v", "1", QoS::ExactlyOnce).await;
        let publish = connection.next_publish().await;
        connection.pubrec(publish.id).await;
        assert_eq!(connection.next().await, Got::Pubrel(publish.id));
        connection.pubcomp(publish.id).await;
        gateway.drained().await;
        gateway.stop().await;
    };
    // Return code 1 as 3.1.1 spells it, the same as 5.0 does, and no answer at all.
    refuses(Some(b"\x20\x02\x00\x01")).await;
    refuses(Some(b"\x20\x03\x00\x84\x00")).await;
    refuses(None).await;
}

#[tokio::test]
async fn an_upstream_that_is_silent_while_it_starts_up_is_not_taken_for_an_older_one() {
    let peer = Peer::bind().await;
    let gateway = Gateway::start(settings(&peer));
    let asked = async |version| {
        let mut connection = peer.accept().await;
        assert!(matches!(connection.next().await, Got::Connect { version: asked, .. } if asked == version));
        connection
    };
    drop(asked(Version::V5).await);
    let mut connection = asked(Version::V3_1_1).await;
    connection.connack(false, ReasonCode::Success, &[]).await;
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    let mut connection = asked(Version::V5).await;
    connection.connack(true, ReasonCode::Success, &[]).await;
    gateway.connected().await;
    drop(connection);
    // It takes 5: silence says nothing about that any more.
    for _ in 0..3 {
        drop(asked(Version::V5).await);
    }
    gateway.stop().await;
}

#[tokio::test]
async fn an_older_upstream_is_subscribed_to_until_it_has_answered_and_then_no_more() {
    let peer = Peer::bind().await;
    let gateway = Gateway::start(Settings { version: VersionChoice::V3_1_1, ..with_commands(&peer) });
    for session_present in [false, true] {
        let mut connection = peer.welcome(session_present, &[]).await;
        assert!(matches!(connection.next().await, Got::Subscribe(..)));
        // Cut before the SUBACK.
    }
    peer.welcome(true, &[]).await.grant().await;
    let mut connection = peer.welcome(true, &[]).await;
    assert_eq!(connection.within(QUIET).await, None, "retained commands would come again");
    gateway.stop().await;
}

#[tokio::test]
async fn a_refusal_stands_in_the_status_with_what_to_do() {
    let peer = Peer::bind().await;
    let gateway = Gateway::start(Settings {
        username: Some("plant".into()),
        password: Some(Secret::new("wrong")),
        version: VersionChoice::V5,
        ..settings(&peer)
    });
    let mut connection = peer.accept().await;
    connection.next().await;
    connection.connack(false, ReasonCode::BadUserNameOrPassword, &[Property::ReasonString("who?")]).await;
    until("the reason is told", || gateway.reason().is_some()).await;
    let reason = gateway.reason().unwrap();
    assert!(reason.contains("bad user name or password (0x86), \"who?\"; check the password of the user `plant`"));
    assert_eq!(gateway.handle.statuses()[0].health, Health::Down);
    gateway.stop().await;
}

#[tokio::test]
async fn a_refused_subscription_is_told_and_the_rest_goes_on() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(with_commands(&peer));
    let mut connection = peer.welcome(false, &[]).await;
    let Got::Subscribe(id, _) = connection.next().await else { panic!("a SUBSCRIBE was expected") };
    connection.send_bytes(&[0x90, 4, (id >> 8) as u8, id as u8, 0, 0x87]).await;
    gateway.publish("devices/m/v", "1", QoS::AtLeastOnce).await;
    assert_eq!(connection.next_publish().await.payload, "1");
    assert_eq!(gateway.handle.statuses()[0].health, Health::Degraded);
    assert!(
        gateway.reason().unwrap().contains("refuses the subscription to `plant-7/devices/+/+/set`: not authorized")
    );
    gateway.stop().await;
}

#[tokio::test]
async fn the_operator_cuts_and_restores_an_upstream() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    let mut connection = peer.welcome(false, &[]).await;
    gateway.connected().await;
    gateway.handle.set_paused(true);
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    assert_eq!(connection.next().await, Got::Closed);
    until("it is paused", || gateway.handle.phase() == Phase::Paused).await;
    gateway.publish_numbers(0..3).await;
    assert_eq!(gateway.handle.queued().0, 3);
    assert_eq!(gateway.handle.statuses()[0].health, Health::Paused);
    gateway.handle.set_paused(false);
    let mut connection = peer.welcome(true, &[]).await;
    assert_eq!(drain(&mut connection, "2").await, numbers(0..3));
    gateway.stop().await;
}

#[tokio::test]
async fn both_sides_are_told_whether_the_upstream_is_connected() {
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let mut watcher = hub.attach(Attach::internal(Face::Web, "watcher")).unwrap();
    let filter = SharedFilter::split("$SYS/broker/connection/cloud/state").unwrap();
    let gateway =
        Gateway::on(hub.clone(), Settings { state_topic: Some("gateways/{gateway}".into()), ..settings(&peer) });
    let mut states = Vec::new();
    watcher.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();

    let mut connection = peer.accept().await;
    let Got::Connect { will, .. } = connection.next().await else { panic!("a CONNECT comes first") };
    let topic = "gateways/plant-7".to_owned();
    assert_eq!(will, Some(Will { topic: topic.clone(), payload: "0".into(), qos: 1, retain: true }));
    connection.connack(false, ReasonCode::Success, &[]).await;
    let state = |payload: &str| {
        let (topic, payload) = (topic.clone(), payload.to_owned());
        Publish { topic, payload, qos: 0, retain: true, dup: false, id: 0, expiry: None, user_properties: Vec::new() }
    };
    assert_eq!(connection.next_publish().await, state("1"));
    gateway.connected().await;
    let mut see = async |expected: &str| {
        while states.last().is_none_or(|state| state != expected) {
            for outbound in timeout(PATIENCE, watcher.next()).await.unwrap() {
                let Outbound::Publish(delivery) = outbound else { continue };
                states.push(String::from_utf8(delivery.message.payload.to_vec()).unwrap());
            }
        }
    };
    see("1").await;
    gateway.stop().await;
    assert_eq!(connection.next_publish().await, state("0"));
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    see("0").await;
}

#[tokio::test]
async fn an_unreachable_upstream_is_told_from_a_refusing_one_and_its_next_address_is_tried() {
    let gone = Peer::bind().await;
    let peer = Peer::bind().await;
    let mut settings = settings(&gone);
    settings.urls.push(peer.url());
    let dead = gone.url();
    drop(gone);
    let gateway = Gateway::start(settings);
    let _connection = peer.welcome(false, &[]).await;
    gateway.connected().await;
    let status = gateway.handle.statuses().remove(0);
    let last_error = status.facts.iter().find(|(label, _)| *label == "last error").unwrap();
    assert!(last_error.1.contains(&format!("{dead} (127.0.0.1:{}) refuses connections", dead.port)), "{last_error:?}");
    gateway.stop().await;
}

#[tokio::test]
async fn equal_addresses_take_turns_and_the_main_one_comes_first() {
    for (order, expected) in [(AddressOrder::RoundRobin, [0, 1, 2, 0]), (AddressOrder::Ordered, [0, 0, 0, 0])] {
        let peers = [Peer::bind().await, Peer::bind().await, Peer::bind().await];
        let urls = peers.iter().map(Peer::url).collect();
        let gateway = Gateway::start(Settings { urls, address_order: order, ..settings(&peers[0]) });
        for index in expected {
            // Dropped at once: the connection is lost.
            peers[index].welcome(false, &[]).await;
        }
        gateway.stop().await;
    }
}

#[tokio::test]
async fn over_tls_only_a_trusted_server_gets_anything() {
    let directory = tempfile::tempdir().unwrap();
    let now = Clock::start("x").now();
    let authority = Authority::open(&directory.path().join("own"), now).unwrap();
    let stranger = Authority::open(&directory.path().join("other"), now).unwrap();
    let issued = authority.ensure("server", Usage::Server, &LOOPBACK_NAMES, now).unwrap();
    let server = ServerTls::open(issued.server_settings()).unwrap();
    let peer = Peer::bind_tls(server.config()).await;
    let trusting = |ca: &Authority| Settings {
        tls: ClientSettings { ca: Some(ca.certificate()), ..ClientSettings::default() },
        ..settings(&peer)
    };

    let gateway = Gateway::start(trusting(&stranger));
    assert!(peer.try_accept().await.is_err());
    until("the reason is told", || gateway.reason().is_some()).await;
    let reason = gateway.reason().unwrap();
    assert!(reason.contains("signed by an authority that is not in") && reason.contains("`tls.ca`"), "{reason}");
    gateway.stop().await;

    let mut gateway = Gateway::start(trusting(&authority));
    gateway.publish_numbers(0..100).await;
    // What is left of the attempts of the first gateway fails here.
    let mut connection = loop {
        if let Ok(connection) = peer.try_accept().await {
            break connection;
        }
    };
    connection.next().await;
    connection.connack(false, ReasonCode::Success, &[]).await;
    assert_eq!(drain(&mut connection, "99").await, numbers(0..100));
    gateway.stop().await;
}

#[tokio::test]
async fn a_missing_certificate_file_is_told_and_taken_up_once_it_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let now = Clock::start("x").now();
    let authority = Authority::open(&directory.path().join("own"), now).unwrap();
    let issued = authority.ensure("server", Usage::Server, &LOOPBACK_NAMES, now).unwrap();
    let server = ServerTls::open(issued.server_settings()).unwrap();
    let peer = Peer::bind_tls(server.config()).await;
    let ca = directory.path().join("late.pem");
    let gateway = Gateway::start(Settings {
        tls: ClientSettings { ca: Some(ca.clone()), ..ClientSettings::default() },
        ..settings(&peer)
    });
    until("the reason is told", || gateway.reason().is_some()).await;
    let reason = gateway.reason().unwrap();
    assert!(reason.contains("cannot read") && reason.contains("late.pem"), "{reason}");
    std::fs::copy(authority.certificate(), &ca).unwrap();
    peer.welcome(false, &[]).await;
    gateway.stop().await;
}

#[tokio::test]
async fn a_changed_rule_changes_the_subscriptions_of_the_stored_session() {
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let mut gateway = Gateway::on(hub.clone(), settings(&peer));
    gateway.handle.set_paused(true);
    gateway.publish("devices/m/v", "old", QoS::AtLeastOnce).await;
    gateway.stop().await;
    let changed = Settings { outgoing: vec![rule("lines/#", QoS::AtLeastOnce)], ..settings(&peer) };
    let mut gateway = Gateway::on(hub, changed);
    gateway.publish("devices/m/v", "unwanted", QoS::AtLeastOnce).await;
    gateway.publish("lines/3", "wanted", QoS::AtLeastOnce).await;
    let mut connection = peer.welcome(false, &[]).await;
    let publish = connection.next_publish().await;
    assert_eq!((publish.topic.as_str(), publish.payload.as_str()), ("plant-7/lines/3", "wanted"));
    connection.puback(publish.id, ReasonCode::Success).await;
    gateway.drained().await;
    assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"no_rule\"} 1"));
    gateway.stop().await;
}

#[tokio::test]
async fn a_long_backlog_drains_while_acknowledgements_are_read() {
    const COUNT: u32 = 20_000;
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(settings(&peer));
    for number in 0..COUNT {
        gateway.publish_hastily("devices/m/v", &number.to_string(), QoS::AtLeastOnce);
    }
    let mut connection = peer.welcome(false, &[]).await;
    assert_eq!(drain(&mut connection, &(COUNT - 1).to_string()).await, numbers(0..COUNT));
    gateway.drained().await;
    gateway.stop().await;
}

#[tokio::test]
async fn a_rule_names_dates_and_labels_what_crosses_in_either_direction() {
    let hour = Duration::from_secs(3600);
    let labelled = |filter: &str, template: &str| RuleSettings {
        naming: Naming::Template(template.into()),
        message_expiry: Some(hour),
        user_properties: vec![("site".into(), "berlin".into()), ("device".into(), "{1}".into())],
        ..RuleSettings::new(filter)
    };
    let peer = Peer::bind().await;
    let hub = hub_in_memory();
    let mut device = hub.attach(Attach::internal(Face::Adapter, "device")).unwrap();
    device.subscribe(&SharedFilter::split("devices/#").unwrap(), SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
    let mut gateway = Gateway::on(
        hub,
        Settings {
            outgoing: vec![labelled("devices/+/#", "plants/{gateway}/{1}/{#}")],
            incoming: vec![labelled("plants/{gateway}/+/commands/+", "devices/{1}/{2}/set")],
            ..settings(&peer)
        },
    );
    gateway.publish("devices/m/u/1", "230", QoS::AtLeastOnce).await;
    let mut connection = peer.welcome(false, &[]).await;
    assert_eq!(connection.grant().await[0].0, "plants/plant-7/+/commands/+");
    let up = connection.next_publish().await;
    assert_eq!((up.topic.as_str(), up.payload.as_str()), ("plants/plant-7/m/u/1", "230"));
    assert!(up.expiry.is_some_and(|seconds| (3590..=3600).contains(&seconds)), "{up:?}");
    let labels = [("site", "berlin"), ("device", "m")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(up.user_properties, [&labels[..], &marks("devices/m/u/1")].concat());

    connection.publish("plants/plant-7/m/commands/u", "on", QoS::AtLeastOnce, 7).await;
    assert_eq!(connection.next().await, Got::Puback(7, ReasonCode::Success));
    let down = loop {
        let outbound = timeout(PATIENCE, device.next()).await.unwrap();
        let found = outbound.into_iter().find_map(|outbound| match outbound {
            Outbound::Publish(delivery) if delivery.message.payload == "on" => Some(delivery),
            _ => None,
        });
        if let Some(delivery) = found {
            break delivery.message.clone();
        }
    };
    assert_eq!((down.topic.as_str(), down.expiry_interval), ("devices/m/u/set", Some(hour)));
    let properties = &down.properties.as_ref().unwrap().user_properties;
    assert!(properties.contains(&("site".into(), "berlin".into())), "{properties:?}");
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_older_than_its_rule_allows_is_dropped_and_counted_and_the_rest_crosses() {
    let peer = Peer::bind().await;
    let brief =
        RuleSettings { message_expiry: Some(Duration::from_millis(50)), ..rule("devices/brief", QoS::AtLeastOnce) };
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let outgoing = vec![brief.clone(), rule("devices/#", QoS::AtLeastOnce)];
        let mut gateway = Gateway::start(Settings { outgoing, version, ..settings(&peer) });
        gateway.publish("devices/brief", "old", QoS::AtLeastOnce).await;
        gateway.publish("devices/long", "kept", QoS::AtLeastOnce).await;
        let accepted = gateway.hub.clock().now();
        let hub = gateway.hub.clone();
        until("the message is too old", || hub.clock().now().since(accepted) > Duration::from_millis(50)).await;
        let mut connection = peer.welcome(false, &[]).await;
        let publish = connection.next_publish().await;
        assert_eq!(publish.payload, "kept");
        connection.puback(publish.id, ReasonCode::Success).await;
        gateway.drained().await;
        assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"expired\"} 1"));
        gateway.stop().await;
    }
}
