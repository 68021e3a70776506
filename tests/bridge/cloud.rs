//! Our own broker as the upstream, over TLS, behind a line that can be cut, throttled to death or left half open.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use fieldgate::bridge::Settings;
use fieldgate::bridge::url::{Scheme, Url};
use fieldgate::hub::{Attach, Face, Hub, Link, Outbound, SessionExpiry, SubscribeOptions};
use fieldgate::listener::{self, Listener};
use fieldgate::message::QoS;
use fieldgate::tls::ClientSettings;
use fieldgate::tls::issue::{Authority, LOOPBACK_NAMES, Usage};
use fieldgate::topic::SharedFilter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::peer::PATIENCE;
use super::{Gateway, hub_in_memory, hub_on_disk, hub_started_as, rule, until};

/// A second instance of our broker, with a subscriber whose session keeps everything.
pub struct Cloud {
    hub: Hub,
    subscriber: Link,
    pub address: SocketAddr,
    tls: ClientSettings,
    _directory: tempfile::TempDir,
    _shutdown: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Cloud {
    async fn start() -> Self {
        Self::start_at(Scheme::Tls).await
    }

    /// Listens for what speaks `scheme`.
    pub async fn start_at(scheme: Scheme) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let hub = hub_started_as("cloud");
        let now = hub.clock().now();
        let authority = Authority::open(directory.path(), now).unwrap();
        let issued = authority.ensure("server", Usage::Server, &LOOPBACK_NAMES, now).unwrap();
        let settings = listener::Settings {
            tls: scheme.is_tls().then(|| issued.server_settings()),
            transport: if scheme.is_web_socket() { listener::Transport::WebSocket } else { listener::Transport::Mqtt },
            ..listener::Settings::new("cloud", "127.0.0.1:0".parse().unwrap())
        };
        let listener = Listener::bind(settings, hub.clone()).await.unwrap();
        let address = listener.local_address().unwrap();
        let (shutdown, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(listener.run(stopped));
        let attach = Attach { expiry: SessionExpiry::Never, ..Attach::internal(Face::Adapter, "subscriber") };
        let mut subscriber = hub.attach(attach).unwrap();
        let filter = SharedFilter::split("plant-7/#").unwrap();
        subscriber.subscribe(&filter, SubscribeOptions::new(QoS::ExactlyOnce)).unwrap();
        let tls = ClientSettings { ca: Some(authority.certificate()), ..ClientSettings::default() };
        Self { hub, subscriber, address, tls, _directory: directory, _shutdown: shutdown, _tasks: tasks }
    }

    /// Settings of an upstream that reaches this cloud over `line`.
    fn upstream(&self, line: &Line) -> Settings {
        self.upstream_at(Scheme::Tls, line.address.port())
    }

    /// Settings of an upstream that reaches this cloud at a port of `localhost`.
    pub fn upstream_at(&self, scheme: Scheme, port: u16) -> Settings {
        let path = if scheme.is_web_socket() { "/mqtt" } else { "" };
        let url = Url { scheme, host: "localhost".into(), port, path: path.into() };
        Settings {
            outgoing: vec![rule("devices/#", QoS::ExactlyOnce)],
            incoming: vec![rule("devices/+/+/set", QoS::ExactlyOnce)],
            tls: self.tls.clone(),
            backoff: fieldgate::bridge::backoff::Settings {
                base: Duration::from_millis(5),
                cap: Duration::from_millis(20),
                stable: Duration::from_secs(10),
            },
            ..Settings::new("cloud", url)
        }
    }

    /// What has arrived: topic and payload, until `done` says that it is all.
    pub async fn arrivals(&mut self, mut done: impl FnMut(&[(String, String)]) -> bool) -> Vec<(String, String)> {
        let mut arrived = Vec::new();
        while !done(&arrived) {
            let batch = timeout(PATIENCE, self.subscriber.next()).await.unwrap_or_else(|_| {
                panic!("{} arrived, the last of them {:?}", arrived.len(), arrived.last());
            });
            for outbound in batch {
                match outbound {
                    Outbound::Release(id) => _ = self.subscriber.completed(id),
                    Outbound::Publish(delivery) => {
                        let payload = String::from_utf8(delivery.message.payload.to_vec()).unwrap();
                        arrived.push((delivery.message.topic.to_string(), payload));
                        match delivery.qos {
                            QoS::AtMostOnce => {}
                            QoS::AtLeastOnce => self.subscriber.acknowledge(delivery.packet_id.unwrap()),
                            QoS::ExactlyOnce => _ = self.subscriber.received(delivery.packet_id.unwrap()),
                        }
                    }
                }
            }
        }
        arrived
    }
}

/// A TCP proxy: the line between the gateway and the cloud.
struct Line {
    address: SocketAddr,
    shared: Arc<LineState>,
    _tasks: JoinSet<()>,
}

struct LineState {
    target: SocketAddr,
    /// Bytes, both ways together, after which a connection is cut; zero is no limit.
    budgets: parking_lot::Mutex<Box<dyn FnMut() -> usize + Send>>,
    cuts: AtomicUsize,
    /// Connections stay open, and nothing passes any more.
    is_dead: AtomicBool,
    cut: Notify,
}

impl Line {
    async fn to(target: SocketAddr, budgets: impl FnMut() -> usize + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(LineState {
            target,
            budgets: parking_lot::Mutex::new(Box::new(budgets)),
            cuts: AtomicUsize::new(0),
            is_dead: AtomicBool::new(false),
            cut: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        let state = shared.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                connections.spawn(state.clone().pass(near));
            }
        });
        Self { address, shared, _tasks: tasks }
    }

    async fn reliable_to(target: SocketAddr) -> Self {
        Self::to(target, || 0).await
    }

    fn cut(&self) {
        self.shared.cut.notify_waiters();
    }
}

impl LineState {
    async fn pass(self: Arc<Self>, near: TcpStream) {
        let budget = (self.budgets.lock())();
        let Ok(far) = TcpStream::connect(self.target).await else { return };
        let left = AtomicUsize::new(if budget == 0 { usize::MAX } else { budget });
        let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
        tokio::select! {
            () = self.copy(near_read, far_write, &left) => {}
            () = self.copy(far_read, near_write, &left) => {}
            () = self.cut.notified() => {}
        }
        self.cuts.fetch_add(1, Ordering::Relaxed);
    }

    async fn copy(&self, mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, left: &AtomicUsize) {
        let mut buffer = vec![0; 4096];
        loop {
            let read = from.read(&mut buffer).await.unwrap_or(0);
            if self.is_dead.load(Ordering::Relaxed) {
                // Not even the end of the connection passes.
                self.cut.notified().await;
            }
            if read == 0 {
                return;
            }
            let allowed = read.min(left.load(Ordering::Relaxed));
            // A cut comes in the middle of a packet as well as between two.
            if to.write_all(&buffer[..allowed]).await.is_err() || allowed < read {
                return;
            }
            left.fetch_sub(if left.load(Ordering::Relaxed) == usize::MAX { 0 } else { read }, Ordering::Relaxed);
        }
    }
}

/// Numbers that look random and are the same on every run.
fn random(seed: u32) -> impl FnMut() -> usize + Send {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize
    }
}

/// The payloads on one topic, repetitions of the one before taken out: a QoS 1 message may be repeated, but the
/// repetition of a whole window comes in order too.
fn payloads(arrived: &[(String, String)], topic: &str) -> Vec<u32> {
    arrived.iter().filter(|(found, _)| found == topic).map(|(_, payload)| payload.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_acknowledged_arrives_in_order_over_a_line_that_keeps_breaking() {
    const COUNT: u32 = 3000;
    let mut cloud = Cloud::start().await;
    let mut sizes = random(7);
    // Enough for the TLS handshake and a few hundred packets.
    let line = Line::to(cloud.address, move || 4000 + sizes() % 8_000).await;
    let directory = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::on(hub_on_disk(directory.path()), cloud.upstream(&line));
    for number in 0..COUNT {
        let payload = number.to_string();
        if number % 20 == 0 {
            // Now and then a publisher that waits for its acknowledgement.
            gateway.publish("devices/least", &payload, QoS::AtLeastOnce).await;
            gateway.publish("devices/exactly", &payload, QoS::ExactlyOnce).await;
        } else {
            gateway.publish_hastily("devices/least", &payload, QoS::AtLeastOnce);
            gateway.publish_hastily("devices/exactly", &payload, QoS::ExactlyOnce);
        }
    }
    let last = (COUNT - 1).to_string();
    let has = |arrived: &[(String, String)], topic: &str| {
        arrived.iter().rev().any(|(found, payload)| found == topic && *payload == last)
    };
    let arrived = cloud
        .arrivals(|arrived| has(arrived, "plant-7/devices/least") && has(arrived, "plant-7/devices/exactly"))
        .await;
    gateway.drained().await;
    let exactly = payloads(&arrived, "plant-7/devices/exactly");
    assert_eq!(exactly, (0..COUNT).collect::<Vec<_>>());
    let mut first_seen = Vec::new();
    for number in payloads(&arrived, "plant-7/devices/least") {
        if first_seen.last().is_none_or(|last| number > *last) {
            first_seen.push(number);
        }
    }
    assert_eq!(first_seen, (0..COUNT).collect::<Vec<_>>());
    assert!(line.shared.cuts.load(Ordering::Relaxed) > 5, "the line did break");
    gateway.stop().await;
}

#[tokio::test]
async fn commands_of_the_cloud_come_down_and_readings_go_up_over_tls() {
    let mut cloud = Cloud::start().await;
    let line = Line::reliable_to(cloud.address).await;
    let hub = hub_in_memory();
    let mut device = hub.attach(Attach::internal(Face::Adapter, "device")).unwrap();
    let filter = SharedFilter::split("devices/+/+/set").unwrap();
    device.subscribe(&filter, SubscribeOptions::new(QoS::AtLeastOnce)).unwrap();
    let mut gateway = Gateway::on(hub, cloud.upstream(&line));
    gateway.publish("devices/m/v", "21.5", QoS::AtLeastOnce).await;
    let up = cloud.arrivals(|arrived| !arrived.is_empty()).await;
    assert_eq!(up, [("plant-7/devices/m/v".to_owned(), "21.5".to_owned())]);
    // The cut between the two shows that the remote session is kept.
    line.cut();
    let topic = fieldgate::topic::TopicName::new("plant-7/devices/m/v/set").unwrap();
    let now = cloud.hub.clock().now();
    cloud.hub.publish(fieldgate::message::Message::new(topic, "on", QoS::ExactlyOnce, now));
    let down = timeout(PATIENCE, device.next()).await.unwrap();
    let Outbound::Publish(delivery) = &down[0] else { panic!("a message was expected") };
    assert_eq!((delivery.message.topic.as_str(), &delivery.message.payload[..]), ("devices/m/v/set", &b"on"[..]));
    gateway.stop().await;
}

#[tokio::test]
async fn a_half_open_line_is_noticed_by_its_silence() {
    let cloud = Cloud::start().await;
    let line = Line::reliable_to(cloud.address).await;
    let settings = Settings { keep_alive: Duration::from_secs(1), ..cloud.upstream(&line) };
    let gateway = Gateway::start(settings);
    gateway.connected().await;
    line.shared.is_dead.store(true, Ordering::Relaxed);
    until("the silence is noticed", || gateway.reason().is_some_and(|reason| reason.contains("did not answer"))).await;
    line.shared.is_dead.store(false, Ordering::Relaxed);
    line.cut();
    gateway.connected().await;
    gateway.stop().await;
}

#[tokio::test]
async fn messages_go_up_over_websocket_and_a_wrong_port_says_what_to_check() {
    let mut cloud = Cloud::start_at(Scheme::SecureWebSocket).await;
    let line = Line::reliable_to(cloud.address).await;
    let secure = cloud.upstream_at(Scheme::SecureWebSocket, line.address.port());
    let mut gateway = Gateway::on(hub_in_memory(), secure);
    gateway.publish("devices/m/v", &"x".repeat(200_000), QoS::ExactlyOnce).await;
    gateway.publish("devices/m/v", "2", QoS::AtLeastOnce).await;
    let arrived = cloud.arrivals(|arrived| arrived.len() == 2).await;
    assert_eq!((arrived[0].1.len(), arrived[1].1.as_str()), (200_000, "2"));
    gateway.drained().await;
    gateway.stop().await;

    // MQTT where WebSocket is asked for.
    let other = Cloud::start().await;
    let line = Line::reliable_to(other.address).await;
    let wrong = other.upstream_at(Scheme::SecureWebSocket, line.address.port());
    let gateway = Gateway::on(hub_in_memory(), wrong);
    until("the reason is told", || gateway.reason().is_some()).await;
    let reason = gateway.reason().unwrap();
    assert!(reason.contains("does not speak MQTT over WebSocket there"), "{reason}");
    gateway.stop().await;
}
