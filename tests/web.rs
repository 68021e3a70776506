//! The web UI from outside: a real server on a free port, asked by a small HTTP client of bytes on a socket.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fieldgate::clock::{Clock, UnixMillis};
use fieldgate::hub::access::{self, User, hash_password};
use fieldgate::hub::{self, Attach, Face, Hub, Link, Outbound, Publish, SessionExpiry, SubscribeOptions};
use fieldgate::message::{Properties, QoS};
use fieldgate::observe::{Health, Kind, Metrics, Observe, Status};
use fieldgate::secret::Secret;
use fieldgate::tls::issue::{Authority, LOOPBACK_NAMES, Usage};
use fieldgate::tls::{ClientSettings, ClientTls, ServerSettings};
use fieldgate::topic::SharedFilter;
use fieldgate::web::log::LogRing;
use fieldgate::web::{Backlog, ControlError, Controls, Depth, Parts, Server, Settings, Switch, Upstream};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tracing_subscriber::layer::SubscriberExt;

/// Longer than anything here takes; a test that waits for so long has failed.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Any address: everybody has to log in, also from this machine.
const ANYWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// A gateway with one device, one upstream and a pause button.
#[derive(Default)]
struct Plant {
    paused: AtomicBool,
    store_is_down: AtomicBool,
}

struct Parted(Arc<Plant>);

impl Observe for Parted {
    fn statuses(&self) -> Vec<Status> {
        let status = |kind, name: &str, health| Status {
            kind,
            name: name.to_owned(),
            parent: None,
            health,
            reason: None,
            since: UnixMillis(1_793_500_000_000),
            facts: vec![("Unit id", "1".to_owned())],
        };
        let store = if self.0.store_is_down.load(Ordering::Relaxed) { Health::Down } else { Health::Good };
        vec![
            status(Kind::Device, "meter", Health::Down),
            status(Kind::Upstream, "cloud", Health::Good),
            status(Kind::Store, "store", store),
        ]
    }

    fn collect(&self, metrics: &mut Metrics) {
        metrics.counter("fieldgate_test_total", "Things.", &[("name", "a\"b")], 7);
    }
}

struct Desk(Arc<Plant>);

impl Controls for Desk {
    fn components(&self) -> Vec<Arc<dyn Observe>> {
        vec![Arc::new(Parted(self.0.clone()))]
    }

    fn upstreams(&self) -> Vec<Upstream> {
        let depth = Depth { messages: 5, bytes: 500, max_messages: 1000, max_bytes: 1 << 20 };
        let paused = self.0.paused.load(Ordering::Relaxed);
        let name = "cloud".to_owned();
        let dropped = [("queue_full", 3), ("looped", 0)].into();
        let backlog = Some(Backlog { messages: 4, rate: 2.0, seconds_left: Some(2) });
        vec![Upstream { name, paused, state: "connected", connection: "lazy", depth, dropped, backlog }]
    }

    fn switch_upstream(&self, name: &str, to: Switch) -> Result<(), ControlError> {
        if name != "cloud" {
            return Err(ControlError::UnknownUpstream(name.to_owned()));
        }
        self.0.paused.store(to == Switch::Cut, Ordering::Relaxed);
        Ok(())
    }
}

struct Gateway {
    address: SocketAddr,
    hub: Hub,
    plant: Arc<Plant>,
    log: LogRing,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Gateway {
    async fn start(address: IpAddr) -> Self {
        Self::start_with(address, None).await
    }

    async fn start_with(address: IpAddr, tls: Option<ServerSettings>) -> Self {
        let clock = Clock::start("boot-1");
        let hash = hash_password(b"tulip field 7").unwrap();
        let users = vec![User { name: "anna".into(), password_hash: hash.into() }];
        let access = access::Settings { users, ..access::Settings::default() };
        let settings = hub::Settings { access, ..hub::Settings::default() };
        let hub = Hub::new(settings, clock.clone(), None).unwrap();
        let plant = Arc::new(Plant::default());
        let log = LogRing::new(clock);
        let parts = Parts {
            gateway: "plant-7".into(),
            hub: hub.clone(),
            log: log.clone(),
            controls: Arc::new(Desk(plant.clone())),
        };
        let metrics_token = Some(Secret::new("0123456789abcdef"));
        let settings = Settings { address: SocketAddr::new(address, 0), tls, metrics_token };
        let server = Server::bind(settings, parts).await.unwrap();
        let address = SocketAddr::new(LOOPBACK, server.address().port());
        let (stop, shutdown) = watch::channel(false);
        let task = tokio::spawn(server.run(shutdown));
        Self { address, hub, plant, log, stop, task }
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], "").await
    }

    async fn post(&self, path: &str, body: &str) -> Answer {
        self.ask("POST", path, &[], body).await
    }

    /// One request on a connection of its own.
    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut stream = self.send(method, path, headers, body).await;
        let mut bytes = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("an answer").unwrap();
        Answer::parse(&bytes)
    }

    async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let mut text = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| *name == "Host") {
            text += &format!("Host: {}\r\n", self.address);
        }
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        text += &format!("\r\n{body}");
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    fn attach(&self, name: &str, filter: &str) -> Link {
        let mut link = self.hub.attach(Attach::internal(Face::Adapter, name)).unwrap();
        link.subscribe(&SharedFilter::split(filter).unwrap(), SubscribeOptions::new(QoS::AtLeastOnce)).unwrap();
        link
    }

    fn publish(&self, topic: &str, payload: &str) {
        let mut link = self.hub.attach(Attach::internal(Face::Adapter, "publisher")).unwrap();
        link.publish(Publish { retain: true, ..Publish::new(topic, payload.to_owned()) });
        link.flush();
    }

    /// Asks until the answer is as wanted.
    async fn wait_for(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let wait = async {
            loop {
                let json = self.get(path).await.json();
                if wanted(&json) {
                    return json;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, wait).await.expect("the wanted answer")
    }

    async fn log_in(&self) -> String {
        let answer = self.post("/api/v1/login", r#"{"user":"anna","password":"tulip field 7"}"#).await;
        assert_eq!(answer.status, 204, "{answer:?}");
        answer.header("set-cookie").split(';').next().unwrap().to_owned()
    }

    async fn events(&self, headers: &[(&str, &str)]) -> Events {
        Events { stream: self.send("GET", "/api/v1/events", headers, "").await, text: String::new() }
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer but {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head: head.to_owned(), body: body.to_owned() }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    fn header(&self, name: &str) -> &str {
        let mut lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value)
    }

    /// The code of an error, which always says what is wrong and what to do.
    fn error(&self) -> String {
        let error = self.json()["error"].clone();
        assert!(
            !error["message"].as_str().unwrap().is_empty() && !error["hint"].as_str().unwrap().is_empty(),
            "{error}"
        );
        error["code"].as_str().unwrap().to_owned()
    }
}

/// A live stream of events.
struct Events {
    stream: TcpStream,
    text: String,
}

impl Events {
    /// Reads until `wanted` is in what came.
    async fn until(&mut self, wanted: &str) -> &str {
        let read = async {
            let mut buffer = [0; 4096];
            while !self.text.contains(wanted) {
                let length = self.stream.read(&mut buffer).await.unwrap();
                assert!(length > 0, "the stream ended before {wanted:?}: {}", self.text);
                self.text += &String::from_utf8_lossy(&buffer[..length]);
            }
        };
        timeout(PATIENCE, read).await.unwrap_or_else(|_| panic!("no {wanted:?} in {}", self.text));
        &self.text
    }

    async fn end(mut self) {
        let mut rest = Vec::new();
        timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.expect("the stream ends").unwrap();
    }
}

#[tokio::test]
async fn the_status_tells_the_whole_gateway() {
    let gateway = Gateway::start(LOOPBACK).await;
    let answer = gateway.get("/api/v1/status").await;
    assert_eq!((answer.status, answer.header("cache-control")), (200, "no-store"));
    let status = &answer.json()["status"];
    assert_eq!(status["gateway"], "plant-7");
    assert_eq!(status["boot_id"], "boot-1");
    assert_eq!(status["health"], "degraded", "one device is down, the gateway works");
    assert_eq!(status["components"][0]["name"], "meter");
    assert_eq!(status["components"][0]["health"], "down");
    assert_eq!(status["components"][0]["facts"], json!([["Unit id", "1"]]));
    assert_eq!(answer.json()["user"], Value::Null);
}

#[tokio::test]
async fn readings_become_values_and_a_deleted_one_is_gone() {
    let gateway = Gateway::start(LOOPBACK).await;
    gateway.publish("devices/meter/power", r#"{"value":2.5,"unit":"kW","quality":"good","time":"t"}"#);
    gateway.publish("devices/meter/state", r#"{"state":"good"}"#);
    let values = gateway.wait_for("/api/v1/values", |json| json["values"] != json!([])).await["values"].clone();
    assert_eq!(values.as_array().unwrap().len(), 1);
    let latest = &values[0]["latest"];
    assert_eq!((&latest["device"], &latest["value"], &latest["unit"]), (&json!("meter"), &json!(2.5), &json!("kW")));
    assert_eq!(values[0]["history"][0][1], json!(2.5));
    gateway.publish("devices/meter/power", "");
    gateway.wait_for("/api/v1/values", |json| json["values"] == json!([])).await;
}

#[tokio::test]
async fn an_upstream_is_cut_and_restored() {
    let gateway = Gateway::start(LOOPBACK).await;
    gateway.wait_for("/api/v1/upstreams", |json| json["upstreams"][0]["history"] == json!([5])).await;
    for (action, paused) in [("pause", true), ("resume", false), ("pause", true), ("connect", false)] {
        assert_eq!(gateway.post(&format!("/api/v1/upstreams/cloud/{action}"), "").await.status, 204);
        let upstream = &gateway.get("/api/v1/upstreams").await.json()["upstreams"][0];
        assert_eq!(upstream["dropped"], json!({ "queue_full": 3, "looped": 0 }));
        assert_eq!(upstream["backlog"], json!({ "messages": 4, "rate": 2.0, "seconds_left": 2 }));
        assert_eq!((&upstream["paused"], &upstream["queue"]["messages"]), (&json!(paused), &json!(5)));
        assert_eq!(upstream["status"]["health"], "good");
        assert_eq!((&upstream["state"], &upstream["connection"]), (&json!("connected"), &json!("lazy")));
    }
    let check = async |path: &str, status: u16| {
        let answer = gateway.post(path, "").await;
        assert_eq!((answer.status, answer.error().is_empty()), (status, false), "{path}");
    };
    check("/api/v1/upstreams/other/pause", 404).await;
    check("/api/v1/upstreams/cloud/explode", 404).await;
    assert!(!gateway.plant.paused.load(Ordering::Relaxed));
}

#[tokio::test]
async fn what_waits_for_a_session_is_purged() {
    let gateway = Gateway::start(LOOPBACK).await;
    let _log = tracing::subscriber::set_default(tracing_subscriber::registry().with(gateway.log.layer()));
    let lasting =
        Attach { clean_start: false, expiry: SessionExpiry::Never, ..Attach::internal(Face::Mqtt, "plant/7 ä") };
    let mut link = gateway.hub.attach(lasting).unwrap();
    link.subscribe(&SharedFilter::split("keep/#").unwrap(), SubscribeOptions::new(QoS::AtLeastOnce)).unwrap();
    link.detach(false, None);
    let mut publisher = gateway.hub.attach(Attach::internal(Face::Adapter, "publisher")).unwrap();
    for _ in 0..3 {
        publisher.publish(Publish { qos: QoS::AtLeastOnce, ..Publish::new("keep/it", "1") });
    }
    publisher.flush();
    let path = "/api/v1/clients/mqtt/plant%2F7%20%C3%A4/purge";
    for messages in [3, 0] {
        let answer = gateway.post(path, "").await;
        assert_eq!((answer.status, answer.json()), (200, json!({ "messages": messages })));
    }
    let clients = gateway.get("/api/v1/clients").await.json();
    assert_eq!((&clients["dropped"], &clients["dropped_by_reason"]["purged"]), (&json!(3), &json!(3)));
    let log = gateway.get("/api/v1/log?level=warn").await.json();
    let line =
        log["lines"].as_array().unwrap().iter().find(|line| line["message"] == "messages that waited were purged");
    let line = line.unwrap_or_else(|| panic!("{log}")).to_string();
    assert!(line.contains("plant/7") && line.contains("local"), "{line}");
    for path in ["/api/v1/clients/mqtt/nobody/purge", "/api/v1/clients/fax/nobody/purge"] {
        let answer = gateway.post(path, "").await;
        assert_eq!((answer.status, answer.error().is_empty()), (404, false), "{path}");
    }
    assert_eq!(gateway.get(path).await.status, 405, "state is changed with POST");
    let foreign = gateway.ask("POST", path, &[("Origin", "http://elsewhere.example")], "").await;
    assert_eq!(foreign.status, 403);
    let elsewhere = Gateway::start(ANYWHERE).await;
    assert_eq!(elsewhere.post("/api/v1/clients/upstream/cloud/purge", "").await.status, 401);
}

#[tokio::test]
async fn a_command_waits_for_the_answer_of_its_device() {
    let gateway = Gateway::start(LOOPBACK).await;
    let none = gateway.post("/api/v1/devices/valve/position/", r#"{"value":1}"#).await;
    assert_eq!(none.status, 404);
    let none = gateway.post("/api/v1/devices/valve/position", r#"{"value":1}"#).await;
    assert_eq!((none.status, none.error()), (404, "not_found".to_owned()));

    let mut adapter = gateway.attach("adapter", "devices/valve/+/set");
    let device = tokio::spawn(async move {
        for answer in [r#"{"ok":true,"value":40}"#, r#"{"ok":false,"error":"value 400 is above 100"}"#] {
            let Some(Outbound::Publish(command)) = adapter.next().await.pop() else { panic!("no command") };
            adapter.acknowledge(command.packet_id.unwrap());
            let message = &command.message;
            let correlation_data = message.properties.as_ref().unwrap().correlation_data.clone();
            let topic = format!("{}/result", message.topic);
            // Somebody else's answer on the same topic is not taken for it.
            adapter.publish(Publish::new(&topic, r#"{"ok":true,"value":-1}"#));
            let properties = Some(Box::new(Properties { correlation_data, ..Properties::default() }));
            adapter.publish(Publish { properties, ..Publish::new(&topic, answer) });
            adapter.flush();
        }
    });
    let done = gateway.post("/api/v1/devices/valve/position", r#"{"value":40}"#).await;
    assert_eq!((done.status, done.json()), (200, json!({"value":40})));
    let refused = gateway.post("/api/v1/devices/valve/position", r#"{"value":400}"#).await;
    assert_eq!((refused.status, refused.error()), (409, "refused".to_owned()));
    assert!(refused.body.contains("value 400 is above 100"), "{refused:?}");
    device.await.unwrap();

    for (path, body) in [("a%2Fb/c", r#"{"value":1}"#), ("a/%2B", r#"{"value":1}"#), ("a/b", "{}"), ("a/b", "nonsense")]
    {
        let answer = gateway.post(&format!("/api/v1/devices/{path}"), body).await;
        assert_eq!((answer.status, answer.error()), (400, "bad_request".to_owned()), "{path} {body}");
    }
}

#[tokio::test]
async fn sessions_and_traffic_are_listed() {
    let gateway = Gateway::start(LOOPBACK).await;
    let _adapter = gateway.attach("adapter/bus1", "devices/meter/+/set");
    let answer = gateway.get("/api/v1/clients").await.json();
    let clients = answer["clients"].as_array().unwrap();
    let adapter = clients.iter().find(|client| client["client_id"] == "adapter/bus1").unwrap();
    assert_eq!((&adapter["face"], &adapter["connected"]), (&json!("adapter"), &json!(true)));
    assert_eq!(adapter["subscriptions"], json!(["devices/meter/+/set"]));
    assert!(answer["received_per_second"].is_number());
    assert_eq!(answer["dropped_by_reason"]["queue_full"], 0);
}

#[tokio::test]
async fn a_session_is_found_by_what_tells_it_apart() {
    let gateway = Gateway::start(LOOPBACK).await;
    let _adapters = [gateway.attach("bus1", "devices/meter/+/set"), gateway.attach("bus2", "devices/Pump/+/set")];
    let check = async |search: &str, expected: &[&str]| {
        let answer = gateway.get(&format!("/api/v1/clients?search={search}")).await.json();
        let ids: Vec<_> =
            answer["clients"].as_array().unwrap().iter().map(|client| client["client_id"].clone()).collect();
        assert_eq!(ids, expected, "{search}");
        assert_eq!((&answer["found"], &answer["total"]), (&json!(expected.len()), &json!(3)), "{search}");
    };
    check("BUS", &["bus1", "bus2"]).await;
    check("pump", &["bus2"]).await;
    check("adapter", &["bus1", "bus2"]).await;
    check("nobody", &[]).await;
}

#[tokio::test]
async fn the_log_is_read_by_level_and_sequence() {
    let gateway = Gateway::start(LOOPBACK).await;
    tracing::subscriber::with_default(tracing_subscriber::registry().with(gateway.log.layer()), || {
        tracing::info!(device = "meter", "polled");
        tracing::warn!("device stopped answering");
    });
    let all = gateway.get("/api/v1/log").await.json();
    assert_eq!((&all["lines"][0]["message"], &all["last"]), (&json!("polled"), &json!(2)));
    assert_eq!(all["lines"][0]["fields"], json!([["device", "meter"]]));
    let check = async |query: &str, expected: &[&str]| {
        let answer = gateway.get(&format!("/api/v1/log?{query}")).await.json();
        let lines: Vec<_> = answer["lines"].as_array().unwrap().iter().map(|line| line["message"].clone()).collect();
        assert_eq!(lines, expected, "{query}");
    };
    check("level=warn", &["device stopped answering"]).await;
    check("after=1", &["device stopped answering"]).await;
    check("after=2", &[]).await;
    check("limit=1", &["device stopped answering"]).await;
    for query in ["level=loud", "after=x", "limit=-1"] {
        assert_eq!(gateway.get(&format!("/api/v1/log?{query}")).await.error(), "bad_request", "{query}");
    }
}

#[tokio::test]
async fn events_bring_status_values_and_log_and_can_be_resumed() {
    let gateway = Gateway::start(LOOPBACK).await;
    let mut events = gateway.events(&[]).await;
    events.until("event: hello\ndata: {").await;
    events.until("event: status\n").await;
    events.until("event: upstreams\n").await;
    gateway.publish("devices/meter/power", r#"{"value":2.5,"unit":"kW","quality":"good"}"#);
    let text = events.until(r#""value":2.5"#).await;
    assert!(text.contains("content-type: text/event-stream") && text.contains("event: values\n"), "{text}");
    let id = text.rsplit("id: ").next().unwrap().lines().next().unwrap().to_owned();
    assert!(id.starts_with("boot-1-"), "{id}");
    tracing::subscriber::with_default(tracing_subscriber::registry().with(gateway.log.layer()), || {
        tracing::info!("polled");
    });
    events.until(r#""message":"polled""#).await;
    gateway.publish("devices/meter/power", "");
    events.until("event: gone\n").await;

    let mut again = gateway.events(&[("Last-Event-ID", &id)]).await;
    assert!(again.until("event: gone\n").await.contains(r#""resumed":true"#));
    let mut stranger = gateway.events(&[("Last-Event-ID", "boot-0-3")]).await;
    stranger.until(r#""resumed":false"#).await;
}

#[tokio::test]
async fn live_views_are_limited_and_end_with_the_gateway() {
    let gateway = Gateway::start(LOOPBACK).await;
    let mut open = Vec::new();
    for _ in 0..24 {
        let mut events = gateway.events(&[]).await;
        events.until("event: hello").await;
        open.push(events);
    }
    let answer = gateway.get("/api/v1/events").await;
    assert_eq!(
        (answer.status, answer.error(), answer.header("retry-after")),
        (503, "too_many_live_views".to_owned(), "10")
    );
    open.pop();
    // A view that was closed makes room as soon as the server has seen it go.
    timeout(PATIENCE, async { while !gateway.events(&[]).await.until("HTTP/1.1 ").await.contains("200 OK") {} })
        .await
        .unwrap();
    gateway.stop.send(true).unwrap();
    for events in open {
        events.end().await;
    }
    timeout(PATIENCE, gateway.task).await.expect("stops").unwrap();
    assert!(TcpStream::connect(gateway.address).await.is_err(), "the port is closed");
}

#[tokio::test]
async fn metrics_and_health_are_for_programs() {
    let gateway = Gateway::start(LOOPBACK).await;
    let metrics = gateway.get("/metrics").await;
    assert_eq!(metrics.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    assert!(metrics.body.contains("# TYPE fieldgate_test_total counter\nfieldgate_test_total{name=\"a\\\"b\"} 7\n"));
    assert!(metrics.body.contains("fieldgate_component_good{kind=\"device\",name=\"meter\"} 0\n"));
    let check = async |status: u16, body: &str| {
        let answer = gateway.get("/healthz").await;
        assert_eq!((answer.status, answer.body.as_str()), (status, body));
    };
    check(200, "degraded\n").await;
    gateway.plant.store_is_down.store(true, Ordering::Relaxed);
    check(503, "down\n").await;
}

#[tokio::test]
async fn pages_are_tagged_and_allow_no_foreign_script() {
    let gateway = Gateway::start(LOOPBACK).await;
    let page = gateway.get("/").await;
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    let policy = page.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none'; script-src 'self';") && !policy.contains("unsafe"), "{policy}");
    assert_eq!((page.header("x-frame-options"), page.header("x-content-type-options")), ("DENY", "nosniff"));
    for path in page.body.split(['"']).filter(|part| part.starts_with("/assets/")) {
        let asset = gateway.get(path).await;
        assert!(asset.status == 200 && !asset.body.is_empty(), "{path} {asset:?}");
        let known = gateway.ask("GET", path, &[("If-None-Match", asset.header("etag"))], "").await;
        assert_eq!((known.status, known.body.as_str()), (304, ""), "{path}");
        assert!(!asset.body.contains("http://") || asset.body.contains("http://www.w3.org/2000/svg"), "{path}");
    }
    for (method, path, status) in [
        ("GET", "/nothing", 404),
        ("GET", "/api/v1/nothing", 404),
        ("POST", "/", 405),
        ("DELETE", "/api/v1/status", 405),
    ] {
        let answer = gateway.ask(method, path, &[], "").await;
        assert_eq!(answer.status, status, "{method} {path}");
        answer.error();
    }
}

#[tokio::test]
async fn from_elsewhere_a_login_is_needed_and_ends_with_the_logout() {
    let gateway = Gateway::start(ANYWHERE).await;
    for path in
        ["/api/v1/status", "/api/v1/values", "/api/v1/events", "/api/v1/log", "/api/v1/clients", "/api/v1/nothing"]
    {
        let answer = gateway.get(path).await;
        assert_eq!((answer.status, answer.error()), (401, "login_required".to_owned()), "{path}");
    }
    assert_eq!(gateway.post("/api/v1/upstreams/cloud/pause", "").await.status, 401);
    assert_eq!(gateway.get("/").await.status, 200, "the page asks for the login");
    assert_eq!(gateway.get("/metrics").await.status, 200, "from this machine");
    let elsewhere = [("Host", "gate.plant.example")];
    assert_eq!(gateway.ask("GET", "/metrics", &elsewhere, "").await.status, 401, "not under a foreign name");
    for (path, shown, status) in [
        ("/metrics", "Bearer 0123456789abcdef", 200),
        ("/metrics", "bearer  0123456789abcdef", 200),
        ("/metrics", "Bearer 0123456789abcdeF", 401),
        ("/metrics", "Bearer 0123456789abcde", 401),
        ("/metrics", "Basic 0123456789abcdef", 401),
        ("/metrics", "Bearer", 401),
        ("/healthz", "Bearer 0123456789abcdef", 401),
        ("/api/v1/status", "Bearer 0123456789abcdef", 401),
    ] {
        let answer = gateway.ask("GET", path, &[elsewhere[0], ("Authorization", shown)], "").await;
        assert_eq!(answer.status, status, "{path} {shown}");
    }

    for body in [r#"{"user":"anna","password":"wrong"}"#, r#"{"user":"eve","password":"tulip field 7"}"#] {
        let answer = gateway.post("/api/v1/login", body).await;
        assert_eq!((answer.status, answer.error()), (401, "wrong_password".to_owned()));
    }
    let answer = gateway.post("/api/v1/login", r#"{"user":"anna","password":"tulip field 7"}"#).await;
    let cookie = answer.header("set-cookie");
    assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Strict"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    let with = [("Cookie", cookie)];
    let status = gateway.ask("GET", "/api/v1/status", &with, "").await.json();
    assert_eq!(status["user"], "anna");
    assert_eq!(gateway.ask("GET", "/metrics", &[elsewhere[0], with[0]], "").await.status, 200);
    assert_eq!(gateway.ask("POST", "/api/v1/upstreams/cloud/pause", &with, "").await.status, 204);
    let mut events = gateway.events(&with).await;
    events.until("event: hello").await;
    let forged = format!("{}0", &cookie[..cookie.len() - 1]);
    if forged != cookie {
        assert_eq!(gateway.ask("GET", "/api/v1/status", &[("Cookie", &forged)], "").await.status, 401);
    }
    assert_eq!(gateway.ask("POST", "/api/v1/logout", &with, "").await.status, 204);
    assert_eq!(gateway.ask("GET", "/api/v1/status", &with, "").await.status, 401);
    events.end().await;
}

#[tokio::test]
async fn guessing_passwords_gets_slow() {
    let gateway = Gateway::start(ANYWHERE).await;
    let wrong = r#"{"user":"anna","password":"wrong"}"#;
    for _ in 0..3 {
        assert_eq!(gateway.post("/api/v1/login", wrong).await.status, 401);
    }
    let right = r#"{"user":"anna","password":"tulip field 7"}"#;
    let mut answer = gateway.post("/api/v1/login", wrong).await;
    // On a slow machine the first waits may be over before the next request is in; they double.
    for _ in 0..8 {
        if answer.status == 429 {
            break;
        }
        answer = gateway.post("/api/v1/login", wrong).await;
    }
    assert_eq!(answer.status, 429);
    let answer = gateway.post("/api/v1/login", right).await;
    assert_eq!((answer.status, answer.error()), (429, "too_many_attempts".to_owned()), "also the right one");
    assert!(answer.header("retry-after").parse::<u64>().unwrap() >= 1);
    let metrics = gateway.get("/metrics").await;
    assert_eq!(metrics.status, 200);
}

#[tokio::test]
async fn other_sites_can_neither_read_nor_change_anything() {
    let gateway = Gateway::start(LOOPBACK).await;
    let check = async |method: &str, headers: &[(&str, &str)], expected: u16| {
        let path = if method == "POST" { "/api/v1/upstreams/cloud/pause" } else { "/api/v1/status" };
        let answer = gateway.ask(method, path, headers, "").await;
        assert_eq!(answer.status, expected, "{method} {headers:?} {answer:?}");
    };
    let own = format!("http://{}", gateway.address);
    check("POST", &[("Origin", &own)], 204).await;
    check("POST", &[("Origin", "http://evil.example")], 403).await;
    check("POST", &[("Origin", "null")], 403).await;
    check("POST", &[("Sec-Fetch-Site", "cross-site")], 403).await;
    check("GET", &[("Host", "localhost:9")], 200).await;
    check("GET", &[("Host", "evil.example")], 403).await;
    check("GET", &[("Host", "")], 400).await;
    // A proxy on this machine speaks for somebody else, who has to log in.
    check("GET", &[("X-Forwarded-For", "198.51.100.7")], 401).await;
    let cookie = gateway.log_in().await;
    check("GET", &[("X-Forwarded-For", "198.51.100.7"), ("Host", "plant.example"), ("Cookie", &cookie)], 200).await;
}

#[tokio::test]
async fn over_https_the_cookie_is_for_https_only() {
    let directory = tempfile::tempdir().unwrap();
    let now = Clock::start("tls").now();
    let authority = Authority::open(directory.path(), now).unwrap();
    let issued = authority.ensure("web", Usage::Server, &LOOPBACK_NAMES, now).unwrap();
    let gateway = Gateway::start_with(ANYWHERE, Some(issued.server_settings())).await;
    let client = ClientSettings { ca: Some(authority.certificate()), ..ClientSettings::default() };
    let connector = TlsConnector::from(ClientTls::open(client).unwrap().config());
    let stream = TcpStream::connect(gateway.address).await.unwrap();
    let mut stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
    let body = r#"{"user":"anna","password":"tulip field 7"}"#;
    let head = "POST /api/v1/login HTTP/1.1\r\nHost: localhost\r\nOrigin: https://localhost\r\nConnection: close\r\n";
    stream.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("an answer").unwrap();
    let answer = Answer::parse(&bytes);
    assert!(answer.status == 204 && answer.header("set-cookie").ends_with("; Secure"), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_never_ends_is_given_up() {
    let gateway = Gateway::start(LOOPBACK).await;
    for start in ["GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", ""] {
        let mut stream = TcpStream::connect(gateway.address).await.unwrap();
        stream.write_all(start.as_bytes()).await.unwrap();
        let began = tokio::time::Instant::now();
        let mut rest = Vec::new();
        timeout(PATIENCE * 4, stream.read_to_end(&mut rest)).await.expect("closed").unwrap();
        assert!(began.elapsed() >= Duration::from_secs(19), "{:?} {start:?}", began.elapsed());
    }
}

#[tokio::test]
async fn requests_have_limits() {
    let gateway = Gateway::start(LOOPBACK).await;
    let answer = gateway.post("/api/v1/devices/a/b", &format!("{{\"value\":\"{}\"}}", "x".repeat(20_000))).await;
    assert_eq!((answer.status, answer.error()), (413, "too_large".to_owned()));
    let long = gateway.ask("GET", "/", &[("X-Long", &"x".repeat(40_000))], "").await;
    assert_eq!(long.status, 431);
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    stream.write_all(b"\x16\x03\x01 not http\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("closed").unwrap();
    assert_eq!(gateway.get("/healthz").await.status, 200, "the others are served");
}
