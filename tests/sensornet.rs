//! MQTT-SN on real UDP: the gateway with a hub behind it, and small clients that send bytes.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fieldgate::clock::Clock;
use fieldgate::demo::sensor;
use fieldgate::hub::access::{self, Anonymous, Pattern, Rule, Subject};
use fieldgate::hub::{self, Attach, Face, Hub, Link, Outbound, Publish, SubscribeOptions};
use fieldgate::message::QoS;
use fieldgate::observe::{Metrics, Observe};
use fieldgate::sensornet::{self, PublishWithoutConnect, Settings};
use fieldgate::store::{self, Store};
use fieldgate::topic::{SharedFilter, TopicName};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Long enough for any machine; nothing waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(10);

struct World {
    hub: Hub,
    address: SocketAddr,
    observe: Arc<dyn Observe>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

fn settings() -> Settings {
    let predefined = [(7, "plant/alarm")];
    Settings {
        address: "127.0.0.1:0".parse().unwrap(),
        predefined_topics: predefined.iter().map(|(id, name)| (*id, TopicName::new(name).unwrap())).collect(),
        publish_without_connect: Some(PublishWithoutConnect::default()),
        ..Settings::default()
    }
}

impl World {
    async fn new() -> Self {
        Self::with(settings(), hub::Settings::default(), None).await
    }

    async fn with(settings: Settings, hub: hub::Settings, directory: Option<&Path>) -> Self {
        let clock = Clock::start("test");
        let opened = directory.map(|directory| Store::bind(store::Settings::new(directory), clock.clone()).unwrap());
        let hub = Hub::new(hub, clock, opened).unwrap();
        let (stop, shutdown) = watch::channel(false);
        let gateway = sensornet::bind(settings, hub.clone()).await.unwrap();
        let (address, observe) = (gateway.local_addr(), gateway.observe());
        let mut tasks = JoinSet::new();
        tasks.spawn(gateway.run(shutdown));
        Self { hub, address, observe, stop, tasks }
    }

    async fn client(&self) -> Client {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(self.address).await.unwrap();
        Client(socket)
    }

    /// A subscriber on the hub.
    fn listen(&self, filter: &str) -> Link {
        let mut link = self.hub.attach(Attach::internal(Face::Adapter, filter)).unwrap();
        let filter = SharedFilter::split(filter).unwrap();
        link.subscribe(&filter, SubscribeOptions::new(QoS::AtLeastOnce)).unwrap();
        link
    }

    fn say(&self, topic: &str, payload: &'static str, qos: QoS) {
        let mut link = self.hub.attach(Attach::internal(Face::Adapter, "speaker")).unwrap();
        link.publish(Publish { qos, ..Publish::new(topic, payload) });
        link.flush();
        link.detach(false, None);
    }

    /// Waits until a metric line is there.
    async fn metric(&self, line: &str) {
        let seen = async {
            loop {
                let mut metrics = Metrics::default();
                self.observe.collect(&mut metrics);
                if metrics.render().lines().any(|known| known == line) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(timeout(PATIENCE, seen).await.is_ok(), "never: {line}");
    }

    async fn stop(mut self) {
        self.stop.send_replace(true);
        timeout(PATIENCE, self.tasks.join_next()).await.expect("the gateway stops").unwrap().unwrap();
    }
}

struct Client(UdpSocket);

impl Client {
    async fn send(&self, kind: u8, body: &[u8]) {
        let mut datagram = vec![u8::try_from(body.len() + 2).unwrap(), kind];
        datagram.extend(body);
        self.0.send(&datagram).await.unwrap();
    }

    async fn receive(&self) -> Vec<u8> {
        let mut buffer = [0; 2000];
        let length = timeout(PATIENCE, self.0.recv(&mut buffer)).await.expect("an answer").unwrap();
        buffer[..length].to_vec()
    }

    #[track_caller]
    fn expect(&self, expected: &[u8]) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        let expected = expected.to_vec();
        async move { assert_eq!(self.receive().await, expected, "at {caller}") }
    }

    async fn connect(&self, id: &str, flags: u8, keep_alive: u8) {
        self.send(0x04, &[&[flags, 1, 0, keep_alive], id.as_bytes()].concat()).await;
        self.expect(&[3, 0x05, 0]).await;
    }

    /// Registers a topic and returns its id.
    async fn register(&self, topic: &str) -> [u8; 2] {
        self.send(0x0A, &[&[0, 0, 0, 9], topic.as_bytes()].concat()).await;
        let answer = self.receive().await;
        assert_eq!((answer[1], &answer[4..]), (0x0B, &[0, 9, 0][..]));
        [answer[2], answer[3]]
    }

    async fn subscribe(&self, filter: &str, qos: u8) -> [u8; 2] {
        self.send(0x12, &[&[qos << 5, 0, 8], filter.as_bytes()].concat()).await;
        let answer = self.receive().await;
        assert_eq!((answer[1], answer[2], &answer[5..]), (0x13, qos << 5, &[0, 8, 0][..]));
        [answer[3], answer[4]]
    }
}

/// The next message of a subscriber, as `topic=payload`.
async fn next(link: &mut Link) -> String {
    let mut taken = Vec::new();
    let one = async {
        loop {
            link.take(&mut taken, 1);
            match taken.pop() {
                Some(Outbound::Publish(delivery)) => {
                    if let Some(id) = delivery.packet_id {
                        link.acknowledge(id);
                        link.flush();
                    }
                    let payload = String::from_utf8_lossy(&delivery.message.payload).into_owned();
                    return format!("{}={payload}", delivery.message.topic);
                }
                Some(Outbound::Release(_)) => {}
                None => link.woken().await,
            }
        }
    };
    timeout(PATIENCE, one).await.expect("a message")
}

#[tokio::test]
async fn a_client_registers_and_publishes_with_every_qos() {
    let world = World::new().await;
    let mut heard = world.listen("#");
    let client = world.client().await;
    client.connect("dev", 0x04, 60).await;
    let id = client.register("a/b").await;
    client.send(0x0C, &[&[0x00], &id[..], &[0, 0], b"zero"].concat()).await;
    client.send(0x0C, &[&[0x20], &id[..], &[0, 1], b"one"].concat()).await;
    client.expect(&[7, 0x0D, id[0], id[1], 0, 1, 0]).await;
    client.send(0x0C, &[&[0x40], &id[..], &[0, 2], b"two"].concat()).await;
    client.expect(&[4, 0x0F, 0, 2]).await;
    // Sent again, it is acknowledged again and not published again.
    client.send(0x0C, &[&[0xC0], &id[..], &[0, 2], b"two"].concat()).await;
    client.expect(&[4, 0x0F, 0, 2]).await;
    client.send(0x10, &[0, 2]).await;
    client.expect(&[4, 0x0E, 0, 2]).await;
    for expected in ["a/b=zero", "a/b=one", "a/b=two"] {
        assert_eq!(next(&mut heard).await, expected);
    }
    let stranger = world.client().await;
    stranger.send(0x0C, &[0x61, 0, 7, 0, 0, b'!']).await;
    assert_eq!(next(&mut heard).await, "plant/alarm=!");
    world.stop().await;
}

#[tokio::test]
async fn a_client_subscribes_and_is_told_new_topics_first() {
    let world = World::new().await;
    let client = world.client().await;
    client.connect("dev", 0x04, 60).await;
    assert_eq!(client.subscribe("a/+", 1).await, [0, 0]);
    world.say("a/x", "hello", QoS::AtLeastOnce);
    let register = client.receive().await;
    assert_eq!((register[1], &register[6..]), (0x0A, &b"a/x"[..]));
    let id = [register[2], register[3]];
    client.send(0x0B, &[&id[..], &register[4..6], &[0]].concat()).await;
    let publish = client.receive().await;
    assert_eq!((publish[1], publish[2], &publish[3..5], &publish[7..]), (0x0C, 0x20, &id[..], &b"hello"[..]));
    client.send(0x0D, &[&id[..], &publish[5..7], &[0]].concat()).await;
    world.say("a/x", "again", QoS::AtMostOnce);
    client.expect(&[&[12, 0x0C, 0x00], &id[..], &[0, 0], b"again"].concat()).await;
    world.stop().await;
}

#[tokio::test]
async fn a_sleeping_client_gets_what_was_buffered_also_from_a_new_address() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::with(settings(), hub::Settings::default(), Some(directory.path())).await;
    let client = world.client().await;
    client.connect("dev", 0x00, 60).await;
    let id = client.subscribe("a/b", 1).await;
    client.send(0x18, &[0, 100]).await;
    client.expect(&[2, 0x18]).await;
    world.metric("fieldgate_mqttsn_clients{state=\"asleep\"} 1").await;
    world.say("a/b", "one", QoS::AtMostOnce);
    world.say("a/b", "two", QoS::AtLeastOnce);
    world.say("a/b", "three", QoS::AtLeastOnce);
    // Its router has given it another address meanwhile.
    let moved = world.client().await;
    moved.send(0x16, b"dev").await;
    moved.expect(&[&[10, 0x0C, 0x00], &id[..], &[0, 0], b"one"].concat()).await;
    for payload in ["two", "three"] {
        let publish = moved.receive().await;
        assert_eq!((&publish[3..5], &publish[7..]), (&id[..], payload.as_bytes()));
        moved.send(0x0D, &[&id[..], &publish[5..7], &[0]].concat()).await;
    }
    moved.expect(&[2, 0x17]).await;
    // The old address is a stranger's now.
    client.send(0x16, &[]).await;
    client.expect(&[2, 0x18]).await;
    world.stop().await;
}

#[tokio::test]
async fn what_was_buffered_for_a_client_survives_a_restart_and_its_topics_are_told_again() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::with(settings(), hub::Settings::default(), Some(directory.path())).await;
    let client = world.client().await;
    client.connect("dev", 0x00, 60).await;
    client.subscribe("a/b", 1).await;
    client.send(0x18, &[0, 100]).await;
    client.expect(&[2, 0x18]).await;
    let speaker = world.client().await;
    speaker.connect("speaker", 0x04, 60).await;
    let id = speaker.register("a/b").await;
    // Acknowledged, so it is on the disk.
    speaker.send(0x0C, &[&[0x20], &id[..], &[0, 1], b"kept"].concat()).await;
    speaker.expect(&[7, 0x0D, id[0], id[1], 0, 1, 0]).await;
    let store = world.hub.store().cloned();
    world.stop().await;
    store.expect("a store").close();

    let world = World::with(settings(), hub::Settings::default(), Some(directory.path())).await;
    let client = world.client().await;
    client.send(0x16, b"dev").await;
    client.expect(&[2, 0x18]).await;
    client.connect("dev", 0x00, 60).await;
    let register = client.receive().await;
    assert_eq!((register[1], &register[6..]), (0x0A, &b"a/b"[..]));
    client.send(0x0B, &[&register[2..6], &[0]].concat()).await;
    let publish = client.receive().await;
    assert_eq!((publish[1], &publish[3..5], &publish[7..]), (0x0C, &register[2..4], &b"kept"[..]));
    world.stop().await;
}

#[tokio::test]
async fn the_will_of_a_lost_client_is_published_and_that_of_one_that_leaves_is_not() {
    let world = World::new().await;
    let mut heard = world.listen("wills/#");
    for (id, leaves) in [("polite", true), ("lost", false)] {
        let client = world.client().await;
        client.send(0x04, &[&[0x0C, 1, 0, 1], id.as_bytes()].concat()).await;
        client.expect(&[2, 0x06]).await;
        client.send(0x07, &[&[0x20], format!("wills/{id}").as_bytes()].concat()).await;
        client.expect(&[2, 0x08]).await;
        client.send(0x09, b"gone").await;
        client.expect(&[3, 0x05, 0]).await;
        if leaves {
            client.send(0x18, &[]).await;
            client.expect(&[2, 0x18]).await;
        }
    }
    assert_eq!(next(&mut heard).await, "wills/lost=gone");
    world.metric("fieldgate_mqttsn_lost_clients_total 1").await;
    world.stop().await;
}

#[tokio::test]
async fn access_rules_hold_for_clients_and_for_those_without_a_connection() {
    let pattern = |text: &str| Pattern::new(text).unwrap();
    let rule = Rule {
        subject: Subject::Anonymous,
        read: vec![pattern("open/#")],
        write: vec![pattern("own/%c")],
        deny: vec![],
    };
    let access = access::Settings { rules: vec![rule], anonymous: Anonymous::Always, ..access::Settings::default() };
    let world = World::with(settings(), hub::Settings { access, ..hub::Settings::default() }, None).await;
    let mut heard = world.listen("#");
    let client = world.client().await;
    client.connect("dev", 0x04, 60).await;
    let (own, other) = (client.register("own/dev").await, client.register("own/else").await);
    client.send(0x0C, &[&[0x20], &other[..], &[0, 1], b"x"].concat()).await;
    client.expect(&[7, 0x0D, other[0], other[1], 0, 1, 3]).await;
    client.send(0x12, &[&[0x20, 0, 2], &b"closed/a"[..]].concat()).await;
    client.expect(&[8, 0x13, 0, 0, 0, 0, 2, 3]).await;
    client.send(0x0C, &[0x61, 0, 7, 0, 0, b'!']).await;
    let stranger = world.client().await;
    stranger.send(0x0C, &[0x61, 0, 7, 0, 0, b'!']).await;
    client.send(0x0C, &[&[0x20], &own[..], &[0, 3], b"y"].concat()).await;
    client.expect(&[7, 0x0D, own[0], own[1], 0, 3, 0]).await;
    assert_eq!(next(&mut heard).await, "own/dev=y");
    world.stop().await;
}

#[tokio::test]
async fn anonymous_clients_are_refused_where_users_are_required() {
    let access = access::Settings { anonymous: Anonymous::Never, ..access::Settings::default() };
    let world = World::with(settings(), hub::Settings { access, ..hub::Settings::default() }, None).await;
    let client = world.client().await;
    client.send(0x04, &[0x04, 1, 0, 60, b'd']).await;
    client.expect(&[3, 0x05, 3]).await;
    world.stop().await;
}

#[tokio::test]
async fn a_gateway_that_stops_tells_its_clients_and_publishes_no_wills() {
    let world = World::new().await;
    let mut heard = world.listen("#");
    let client = world.client().await;
    client.send(0x04, &[0x0C, 1, 0, 60, b'd']).await;
    client.expect(&[2, 0x06]).await;
    client.send(0x07, b"\0w/d").await;
    client.expect(&[2, 0x08]).await;
    client.send(0x09, b"gone").await;
    client.expect(&[3, 0x05, 0]).await;
    let hub = world.hub.clone();
    world.stop().await;
    client.expect(&[2, 0x18]).await;
    assert!(hub.sessions().iter().all(|session| session.face != Face::MqttSn));
    let mut taken = Vec::new();
    heard.take(&mut taken, 1);
    assert!(taken.is_empty());
}

#[tokio::test]
async fn the_demo_sensor_measures_sleeps_and_obeys_a_command_it_slept_through() {
    let world = World::new().await;
    let mut states = world.listen("sensors/climate/state");
    let mut measurements = world.listen("sensors/climate/raw");
    let mut intervals = world.listen("devices/climate/interval");
    let mut results = world.listen("devices/climate/interval/set/result");
    let (stop, shutdown) = watch::channel(false);
    let address = world.address;
    let mut sensor = JoinSet::new();
    sensor.spawn(async move { sensor::run(address, "climate", shutdown).await });
    assert_eq!(next(&mut states).await, "sensors/climate/state=online");
    assert!(next(&mut intervals).await.contains("\"value\":5"));
    assert!(next(&mut measurements).await.starts_with("sensors/climate/raw="));
    world.metric("fieldgate_mqttsn_clients{state=\"asleep\"} 1").await;
    world.say("devices/climate/interval/set", "1", QoS::AtLeastOnce);
    assert_eq!(next(&mut results).await, "devices/climate/interval/set/result={\"ok\":true,\"value\":1}");
    assert!(next(&mut intervals).await.contains("\"value\":1"));
    assert!(next(&mut measurements).await.starts_with("sensors/climate/raw="));
    stop.send_replace(true);
    timeout(PATIENCE, sensor.join_next()).await.unwrap().unwrap().unwrap().unwrap();
    world.stop().await;
}
