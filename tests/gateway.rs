//! The assembled gateway: what a reload changes and what it leaves alone, and how long stopping takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldgate::clock::Clock;
use fieldgate::config::report::Look;
use fieldgate::config::{self, Config};
use fieldgate::gateway::{Gateway, Handle, Reload, Scope};
use fieldgate::observe::{Health, Metrics, Status};
use fieldgate::tls::issue::{Authority, Usage};
use fieldgate::tls::{ClientSettings, ClientTls, common_name};
use fieldgate::web::log::LogRing;
use fieldgate::web::{Controls, Switch};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(30);

/// A gateway under a configuration that can be changed.
struct World {
    directory: TempDir,
    handle: Arc<Handle>,
    stop: watch::Sender<bool>,
    reloads: mpsc::Sender<Reload>,
    running: JoinHandle<()>,
}

fn load(directory: &Path, yaml: &str) -> Config {
    let path: PathBuf = directory.join("fieldgate.yaml");
    fs::write(&path, format!("store: {{ directory: data }}\nweb: {{ enabled: false }}\n{yaml}")).unwrap();
    config::load(&path).unwrap_or_else(|reports| panic!("{}", reports.render(Look::Plain))).config
}

impl World {
    async fn start(yaml: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), yaml).await
    }

    async fn start_in(directory: TempDir, yaml: &str) -> Self {
        let clock = Clock::start("test");
        let config = load(directory.path(), yaml);
        let gateway = Gateway::bind(config, clock.clone(), LogRing::new(clock)).await.unwrap();
        let handle = gateway.handle();
        let (stop, shutdown) = watch::channel(false);
        let (reloads, receiver) = mpsc::channel(1);
        let running = tokio::spawn(gateway.run(shutdown, receiver));
        let world = Self { directory, handle, stop, reloads, running };
        world.until("it runs", |world| !world.statuses().is_empty()).await;
        world
    }

    async fn reload(&self, yaml: &str) -> Vec<String> {
        let (done, changes) = oneshot::channel();
        let config = load(self.directory.path(), yaml);
        assert!(self.reloads.send(Reload { config, scope: Scope::All, done }).await.is_ok());
        timeout(PATIENCE, changes).await.unwrap().unwrap()
    }

    fn statuses(&self) -> Vec<Status> {
        self.handle.components().iter().flat_map(|component| component.statuses()).collect()
    }

    fn status(&self, name: &str) -> Option<Status> {
        self.statuses().into_iter().find(|status| status.name == name)
    }

    /// The address of a listener, once it is there.
    async fn address(&self, name: &str) -> String {
        self.until("it listens", |world| world.status(name).is_some()).await;
        let facts = self.status(name).unwrap().facts;
        facts.into_iter().find(|(label, _)| label.eq_ignore_ascii_case("address")).unwrap().1
    }

    async fn until(&self, what: &str, reached: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !reached(self) {
            assert!(Instant::now() < deadline, "waited in vain until {what}: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop(self) -> Duration {
        let began = Instant::now();
        self.stop.send_replace(true);
        timeout(PATIENCE, self.running).await.unwrap().unwrap();
        began.elapsed()
    }
}

/// An MQTT 3.1.1 client that says as little as possible.
struct Client(TcpStream);

impl Client {
    async fn connect(address: &str) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00").await.unwrap();
        let mut client = Self(stream);
        client.expect(b"\x20\x02\x00\x00").await;
        client
    }

    async fn ping(&mut self) {
        self.0.write_all(b"\xc0\x00").await.unwrap();
        self.expect(b"\xd0\x00").await;
    }

    async fn expect(&mut self, expected: &[u8]) {
        let mut bytes = vec![0; expected.len()];
        timeout(PATIENCE, self.0.read_exact(&mut bytes)).await.unwrap().unwrap();
        assert_eq!(bytes, expected);
    }

    /// Waits for the gateway to close the connection.
    async fn expect_end(mut self) {
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, self.0.read_to_end(&mut rest)).await.unwrap();
    }
}

const A: &str = "  - { name: a, address: 127.0.0.1:0 }\n";
const B: &str = "  - { name: b, address: 127.0.0.1:0 }\n";

#[tokio::test]
async fn a_reload_disconnects_only_the_clients_of_what_changed() {
    let world = World::start(&format!("listeners:\n{A}{B}")).await;
    let mut a = Client::connect(&world.address("a").await).await;
    let b = Client::connect(&world.address("b").await).await;
    let changes = world
        .reload(&format!(
            "listeners:\n{A}  - {{ name: b, address: 127.0.0.1:0, max_connections: 7 }}\n  \
             - {{ name: c, address: 127.0.0.1:0 }}\n"
        ))
        .await;
    assert_eq!(changes, ["listener `b` on 127.0.0.1:0 restarted", "listener `c` on 127.0.0.1:0 started"]);
    b.expect_end().await;
    a.ping().await;
    Client::connect(&world.address("b").await).await.ping().await;
    Client::connect(&world.address("c").await).await.ping().await;
    let changes = world.reload(&format!("listeners:\n{A}")).await;
    assert_eq!(changes.len(), 2, "{changes:?}");
    assert!(world.status("b").is_none() && world.status("c").is_none());
    a.ping().await;
    assert_eq!(world.reload(&format!("listeners:\n{A}")).await, [""; 0]);
    world.stop().await;
}

/// Certificates in a directory, for a listener that reads `server.pem` and `server.key`.
struct Certificates(Authority, PathBuf);

impl Certificates {
    fn open(directory: &Path) -> Self {
        let now = Clock::start("test").now();
        Self(Authority::open(&directory.join("tls"), now).unwrap(), directory.to_path_buf())
    }

    /// Puts in place a certificate whose common name is `name`.
    fn install(&self, name: &str) {
        let now = Clock::start("test").now();
        let issued = self.0.ensure(name, Usage::Server, &[name, "localhost"], now).unwrap();
        fs::copy(issued.certificate, self.1.join("server.pem")).unwrap();
        fs::copy(issued.key, self.1.join("server.key")).unwrap();
    }

    async fn dial(&self, address: &str) -> TlsStream<TcpStream> {
        let settings = ClientSettings { ca: Some(self.0.certificate()), ..ClientSettings::default() };
        let connector = TlsConnector::from(ClientTls::open(settings).unwrap().config());
        let tcp = TcpStream::connect(address).await.unwrap();
        connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap()
    }

    /// Whose certificate a new connection is shown.
    async fn shown(&self, address: &str) -> String {
        let stream = self.dial(address).await;
        let chain = stream.get_ref().1.peer_certificates().unwrap();
        common_name(&chain[0]).unwrap().to_owned()
    }
}

const TLS: &str =
    "listeners:\n  - { name: a, address: 127.0.0.1:0, tls: { certificate: server.pem, key: server.key } }\n";

#[tokio::test]
async fn certificates_are_read_again_when_asked_and_when_they_change_and_nobody_is_disconnected() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = Certificates::open(directory.path());
    certificates.install("first");
    let world = World::start_in(directory, TLS).await;
    let address = world.address("a").await;
    let mut old = certificates.dial(&address).await;
    old.write_all(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00").await.unwrap();
    let mut answer = [0; 4];
    timeout(PATIENCE, old.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(certificates.shown(&address).await, "first");
    certificates.install("second");
    assert_eq!(world.reload(TLS).await, [""; 0], "the listener itself has not changed");
    assert_eq!(certificates.shown(&address).await, "second");
    // Nobody asks, and a key that does not belong to the certificate is never used.
    certificates.install("third");
    let deadline = Instant::now() + PATIENCE;
    while certificates.shown(&address).await != "third" {
        assert!(Instant::now() < deadline, "the change was not seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    old.write_all(b"\xc0\x00").await.unwrap();
    timeout(PATIENCE, old.read_exact(&mut answer[..2])).await.unwrap().unwrap();
    assert_eq!(answer[..2], *b"\xd0\x00");
    world.stop().await;
}

#[tokio::test]
async fn an_address_that_is_taken_is_named_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::start("test");
    let config = load(directory.path(), &format!("listeners: [ {{ name: a, address: {address} }} ]\n"));
    let Err(error) = Gateway::bind(config, clock.clone(), LogRing::new(clock)).await else { panic!("it listens") };
    let text = fieldgate::supervise::describe(&error);
    let expected = format!(
        "listener `a` on {address} cannot start: it cannot listen; another program has the address: stop that, or choose \
         another port: Address already in use (os error 98)"
    );
    assert_eq!(text, expected);
}

#[tokio::test]
async fn a_reload_says_what_only_a_restart_changes() {
    let world = World::start(&format!("listeners:\n{A}")).await;
    let changes = world.reload(&format!("listeners:\n{A}gateway: {{ name: other }}\nlog: {{ level: debug }}\n")).await;
    let expected = ["gateway.name takes effect at the next restart", "log takes effect at the next restart"];
    assert_eq!(changes, expected);
    world.stop().await;
}

#[tokio::test]
async fn an_address_that_a_reload_cannot_have_is_tried_again_until_it_is_free() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let world = World::start(&format!("listeners:\n{A}")).await;
    let changes = world.reload(&format!("listeners:\n{A}  - {{ name: b, address: {address} }}\n")).await;
    assert!(changes.iter().any(|change| change.contains("another program has the address")), "{changes:?}");
    let is = |health| move |world: &World| world.status("b").is_some_and(|status| status.health == health);
    world.until("it says that it is down", is(Health::Down)).await;
    drop(taken);
    world.until("it has the port", is(Health::Good)).await;
    Client::connect(&address.to_string()).await.ping().await;
    let mut metrics = Metrics::default();
    world.handle.components().iter().for_each(|component| component.collect(&mut metrics));
    let restarts = "fieldgate_component_restarts_total{kind=\"listener\",name=\"b\"}";
    assert!(metrics.render().contains(restarts));
    world.stop().await;
}

#[tokio::test]
async fn an_upstream_that_was_cut_stays_cut_through_a_reload() {
    let upstream = |keep_alive: &str| {
        format!(
            "listeners:\n{A}upstreams:\n  - name: cloud\n    url: mqtt://127.0.0.1:9\n    keep_alive: {keep_alive}\n    \
             out: [ {{ filter: '#' }} ]\n"
        )
    };
    let world = World::start(&upstream("60s")).await;
    world.handle.switch_upstream("cloud", Switch::Cut).unwrap();
    assert!(world.handle.switch_upstream("nobody", Switch::Cut).is_err());
    assert_eq!(world.reload(&upstream("30s")).await, ["upstream `cloud` restarted"]);
    assert!(world.handle.upstreams()[0].paused);
    world
        .until("it says that it is paused", |world| {
            world.status("cloud").is_some_and(|status| status.health == Health::Paused)
        })
        .await;
    world.reload(&format!("listeners:\n{A}")).await;
    assert!(world.handle.upstreams().is_empty());
    world.stop().await;
}

#[tokio::test]
async fn what_waits_for_an_upstream_that_was_taken_out_is_kept_and_told_and_nothing_is_added() {
    let upstream = |name: &str| {
        format!("upstreams:\n  - {{ name: {name}, url: \"mqtt://127.0.0.1:1\", out: [ {{ filter: \"#\" }} ] }}\n")
    };
    let listener = "listeners: [ { name: a, address: 127.0.0.1:0 } ]\n";
    let mut world = World::start(&format!("{listener}{}", upstream("cloud"))).await;
    let publish = async |world: &World| {
        let mut client = Client::connect(&world.address("a").await).await;
        client.0.write_all(b"\x32\x06\x00\x01t\x00\x01v").await.unwrap();
        client.expect(b"\x40\x02\x00\x01").await;
    };
    let waiting = |world: &World| {
        let status = world.status("cloud")?;
        let facts = status.facts.into_iter().find(|(label, _)| *label == "waiting");
        Some((status.health, facts?.1, status.reason.unwrap_or_default()))
    };
    publish(&world).await;

    // Renamed: the old one and the new one stand beside each other.
    let renamed = format!("{listener}{}", upstream("sky"));
    world.reload(&renamed).await;
    publish(&world).await;
    let (health, queue, reason) = waiting(&world).unwrap();
    assert_eq!((health, queue.as_str()), (Health::Degraded, "1 messages, 2 bytes"));
    assert!(reason.contains("`fieldgate store purge cloud` gives them up"), "{reason}");
    assert!(world.status("sky").unwrap().facts.iter().any(|(_, fact)| fact == "1 messages, 2 bytes"));

    // A restart does not change that.
    let World { directory, stop, running, .. } = world;
    stop.send_replace(true);
    timeout(PATIENCE, running).await.unwrap().unwrap();
    world = World::start_in(directory, &renamed).await;
    publish(&world).await;
    assert_eq!(waiting(&world).unwrap().1, "1 messages, 2 bytes");
    world.reload(&format!("{listener}{}", upstream("cloud"))).await;
    let (_, queue, reason) = waiting(&world).unwrap();
    assert_eq!(queue, "1 messages, 2 bytes");
    assert!(!reason.contains("not configured"), "{reason}");
    world.stop().await;
}

#[tokio::test]
async fn a_changed_codec_restarts_its_device_and_no_other() {
    let world = World::start(&format!("listeners:\n{A}")).await;
    let script = world.directory.path().join("codec.js");
    fs::write(&script, "function decodeUplink(input) { return { data: {} }; }").unwrap();
    let serial = format!(
        "listeners:\n{A}serial:\n  - {{ name: x, path: /nonexistent/x, codec: codec.js }}\n  \
         - {{ name: y, path: /nonexistent/y, parse: {{ json: true }} }}\n"
    );
    assert_eq!(world.reload(&serial).await, ["serial device `x` started", "serial device `y` started"]);
    fs::write(&script, "function decodeUplink(input) { return { data: { a: 1 } }; }").unwrap();
    assert_eq!(world.reload(&serial).await, ["serial device `x` restarted"]);
    world.stop().await;
}

#[tokio::test]
async fn stopping_drains_in_time_with_clients_that_do_not_care() {
    let world = World::start(&format!("listeners:\n{A}mqttsn: {{ address: 127.0.0.1:0 }}\n")).await;
    let address = world.address("a").await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(Client::connect(&address).await);
    }
    // Some are in the middle of a packet.
    for client in &mut clients[..10] {
        client.0.write_all(b"\x30\xff\x7f").await.unwrap();
    }
    let took = world.stop().await;
    assert!(took < Duration::from_secs(4), "2 s on a machine that has nothing else to do; took {took:?}");
}
