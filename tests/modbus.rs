//! Modbus buses end to end: real TCP servers and real ptys, the real hub, devices that misbehave.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use fieldgate::clock::Clock;
use fieldgate::demo::meter::{RtuMeter, run_tcp_meter};
use fieldgate::field::mapping::PayloadForm;
use fieldgate::field::modbus::{Bus, BusStatus, Device, DevicePoint, Link, ReadBack, Settings};
use fieldgate::field::{Exchange, SerialLine};
use fieldgate::hub::{self, Attach, Face, Hub, Outbound, Publish, SubscribeOptions};
use fieldgate::message::{Message, Properties, QoS};
use fieldgate::observe::{Health, Metrics, Observe};
use fieldgate::proto::modbus::{Access, DataType, Point, ReadLimits, Table, UnitId};
use fieldgate::topic::{SharedFilter, TopicName};
use parking_lot::Mutex;
use serde_json::Value as Json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_modbus::server::{Service, rtu, tcp};
use tokio_modbus::{ExceptionCode, Request, Response, SlaveRequest};
use tokio_serial::{SerialPort, SerialStream};

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(30);
const MS: Duration = Duration::from_millis(1);

/// A bus on a hub, and what it publishes.
struct Gateway {
    hub: Hub,
    watcher: hub::Link,
    history: Vec<Arc<Message>>,
    /// Up to where the history was looked through.
    looked: usize,
    status: Arc<BusStatus>,
    shutdown: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Gateway {
    fn start(settings: Settings) -> Self {
        let hub = Hub::new(hub::Settings::default(), Clock::start("boot"), None).unwrap();
        let mut watcher = hub.attach(Attach::internal(Face::Web, "watcher")).unwrap();
        let filter = SharedFilter::split("#").unwrap();
        watcher.subscribe(&filter, SubscribeOptions::new(QoS::AtLeastOnce)).unwrap();
        let devices: Vec<Arc<str>> = settings.devices.iter().map(|device| device.name.clone()).collect();
        let exchange = Exchange::attach(&hub, &settings.name, devices, settings.payload).unwrap();
        let bus = Bus::new(settings, exchange);
        let status = bus.observe();
        let (shutdown, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(bus.run(stopped));
        Self { hub, watcher, history: Vec::new(), looked: 0, status, shutdown, tasks }
    }

    /// Waits for a message on `topic` whose JSON is `wanted`, after the one found last.
    async fn expect(&mut self, topic: &str, wanted: impl Fn(&Json) -> bool) -> Json {
        let search = async {
            loop {
                while let Some(message) = self.history.get(self.looked) {
                    self.looked += 1;
                    let json = json(message);
                    if message.topic.as_str() == topic && wanted(&json) {
                        return json;
                    }
                }
                for outbound in self.watcher.next().await {
                    let Outbound::Publish(delivery) = outbound else { continue };
                    delivery.packet_id.into_iter().for_each(|packet_id| self.watcher.acknowledge(packet_id));
                    self.history.push(delivery.message);
                }
            }
        };
        let found = timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| {
            let seen = self.history.iter().rev().take(40).map(|m| format!("{} {}", m.topic, json(m)));
            panic!("nothing wanted on {topic}; the newest:\n{}", seen.collect::<Vec<_>>().join("\n"))
        })
    }

    async fn expect_state(&mut self, device: &str, state: &str) -> Json {
        self.expect(&format!("devices/{device}/state"), |json| json["state"] == state).await
    }

    async fn expect_value(&mut self, device: &str, point: &str, value: impl Into<Json>) -> Json {
        let value = value.into();
        self.expect(&format!("devices/{device}/{point}"), |json| json["value"] == value && json["quality"] == "good")
            .await
    }

    fn send(&self, topic: &str, payload: &str, properties: Properties) {
        let mut link = self.hub.attach(Attach::internal(Face::Mqtt, "operator")).unwrap();
        let properties = Some(Box::new(properties));
        link.publish(Publish { qos: QoS::AtLeastOnce, properties, ..Publish::new(topic, payload.to_owned()) });
        link.flush();
    }

    /// Sends a command and waits for its answer.
    async fn command(&mut self, device: &str, point: &str, payload: &str) -> Json {
        let topic = format!("devices/{device}/{point}/set");
        self.send(&topic, payload, Properties::default());
        self.expect(&format!("{topic}/result"), |_| true).await
    }

    async fn refused(&mut self, device: &str, point: &str, payload: &str) -> String {
        let answer = self.command(device, point, payload).await;
        assert_eq!(answer["ok"], false, "{answer}");
        answer["error"].as_str().unwrap().to_owned()
    }

    fn metric(&self, name_and_labels: &str) -> f64 {
        let mut metrics = Metrics::default();
        self.status.collect(&mut metrics);
        let text = metrics.render();
        let line = text.lines().find(|line| line.starts_with(name_and_labels));
        line.and_then(|line| line.rsplit(' ').next()).map_or(0.0, |value| value.parse().unwrap())
    }

    fn plan(&self, device: &str) -> Vec<String> {
        self.status.plan(device).unwrap().iter().map(|line| line.span.to_string()).collect()
    }

    async fn stop(mut self) {
        self.shutdown.send_replace(true);
        timeout(PATIENCE, self.tasks.join_next()).await.expect("the bus stops when told").unwrap().unwrap();
    }
}

/// Null for a command that is no JSON.
fn json(message: &Message) -> Json {
    serde_json::from_slice(&message.payload).unwrap_or_default()
}

fn bus(link: Link, devices: Vec<Device>) -> Settings {
    Settings { name: "bus".into(), link, timeout: 250 * MS, request_gap: None, payload: PayloadForm::Json, devices }
}

fn tcp(address: std::net::SocketAddr) -> Link {
    Link::Tcp { address: address.to_string() }
}

fn serial(path: &Path) -> Link {
    Link::Serial(SerialLine::new(path, 115_200))
}

fn device(name: &str, unit: u8, points: Vec<Point>) -> Device {
    let point = |point: Point| {
        point.check().unwrap();
        DevicePoint { point, poll_interval: 20 * MS, deadband: 0.0 }
    };
    Device { points: points.into_iter().map(point).collect(), ..Device::new(name, UnitId::on_tcp(unit)) }
}

fn holding(name: &str, address: u16, data_type: DataType) -> Point {
    Point { access: Access::ReadWrite, ..Point::new(name, Table::HoldingRegister, address, data_type) }
}

fn u16_at(name: &str, address: u16) -> Point {
    holding(name, address, DataType::U16)
}

fn relay() -> Point {
    Point { access: Access::ReadWrite, ..Point::new("relay", Table::Coil, 0, DataType::Bool) }
}

/// Servers with chosen registers and manners; clones are the same.
#[derive(Clone, Default)]
struct Field(Arc<Mutex<FieldState>>);

#[derive(Default)]
struct FieldState {
    units: HashMap<u8, Unit>,
    log: Vec<(u8, Request<'static>)>,
}

#[derive(Clone, Default)]
struct Unit {
    registers: BTreeMap<u16, u16>,
    coils: BTreeMap<u16, bool>,
    silent: bool,
    /// How long the next answers take.
    delays: VecDeque<Duration>,
    /// What every request is refused with.
    exception: Option<u8>,
    knows_only_multiple_writes: bool,
    /// Takes writes and does nothing.
    stubborn: bool,
}

impl Field {
    fn with(units: impl IntoIterator<Item = (u8, Unit)>) -> Self {
        Self(Arc::new(Mutex::new(FieldState { units: units.into_iter().collect(), log: Vec::new() })))
    }

    fn change(&self, unit: u8, change: impl FnOnce(&mut Unit)) {
        change(self.0.lock().units.get_mut(&unit).unwrap());
    }

    fn requests(&self, unit: u8) -> usize {
        self.0.lock().log.iter().filter(|(asked, _)| *asked == unit).count()
    }

    fn last_write(&self) -> Option<Request<'static>> {
        let is_write = |request: &&(u8, Request<'_>)| {
            use Request::{WriteMultipleCoils, WriteMultipleRegisters, WriteSingleCoil, WriteSingleRegister};
            matches!(
                request.1,
                WriteSingleCoil(..) | WriteMultipleCoils(..) | WriteSingleRegister(..) | WriteMultipleRegisters(..)
            )
        };
        self.0.lock().log.iter().rfind(is_write).map(|(_, request)| request.clone())
    }

    /// Serves Modbus TCP on a port of its own until the task set is dropped.
    async fn serve_tcp(&self, tasks: &mut JoinSet<()>) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        self.serve_on(listener, tasks);
        address
    }

    fn serve_on(&self, listener: TcpListener, tasks: &mut JoinSet<()>) {
        let field = self.clone();
        tasks.spawn(async move {
            let accept =
                async |stream, address| tcp::accept_tcp_connection(stream, address, |_| Ok(Some(field.clone())));
            tcp::Server::new(listener).serve(&accept, |_| {}).await.unwrap();
        });
    }

    fn serve_rtu(&self, near: SerialStream, tasks: &mut JoinSet<()>) {
        let field = self.clone();
        tasks.spawn(async move {
            let _ = rtu::Server::new(near).serve_forever(field).await;
        });
    }
}

impl Service for Field {
    type Request = SlaveRequest<'static>;
    type Response = Option<Response>;
    type Exception = ExceptionCode;
    type Future = Pin<Box<dyn Future<Output = Result<Option<Response>, ExceptionCode>> + Send>>;

    fn call(&self, SlaveRequest { slave, request }: SlaveRequest<'static>) -> Self::Future {
        let mut state = self.0.lock();
        state.log.push((slave, request.clone()));
        let Some(unit) = state.units.get_mut(&slave).filter(|unit| !unit.silent) else {
            return Box::pin(async { Ok(None) });
        };
        let delay = unit.delays.pop_front();
        let answer = unit.answer(&request);
        Box::pin(async move {
            if let Some(delay) = delay {
                sleep(delay).await;
            }
            answer.map(Some)
        })
    }
}

impl Unit {
    fn with_registers(registers: impl IntoIterator<Item = (u16, u16)>) -> Self {
        Self { registers: registers.into_iter().collect(), ..Self::default() }
    }

    fn answer(&mut self, request: &Request<'_>) -> Result<Response, ExceptionCode> {
        let lacks = ExceptionCode::IllegalDataAddress;
        if let Some(code) = self.exception {
            return Err(ExceptionCode::new(code));
        }
        match request {
            Request::WriteSingleCoil(..) | Request::WriteSingleRegister(..) if self.knows_only_multiple_writes => {
                Err(ExceptionCode::IllegalFunction)
            }
            Request::ReadHoldingRegisters(start, count) => {
                let registers = (*start..start + count).map(|address| self.registers.get(&address).copied());
                Ok(Response::ReadHoldingRegisters(registers.collect::<Option<_>>().ok_or(lacks)?))
            }
            Request::ReadCoils(start, count) => {
                let coils = (*start..start + count).map(|address| self.coils.get(&address).copied());
                Ok(Response::ReadCoils(coils.collect::<Option<_>>().ok_or(lacks)?))
            }
            Request::WriteSingleCoil(address, on) => {
                self.put_coil(*address, *on);
                Ok(Response::WriteSingleCoil(*address, *on))
            }
            Request::WriteMultipleCoils(address, coils) => {
                self.put_coil(*address, coils[0]);
                Ok(Response::WriteMultipleCoils(*address, 1))
            }
            Request::WriteSingleRegister(address, register) => {
                self.put_registers(*address, &[*register]);
                Ok(Response::WriteSingleRegister(*address, *register))
            }
            Request::WriteMultipleRegisters(address, registers) => {
                self.put_registers(*address, registers);
                Ok(Response::WriteMultipleRegisters(*address, registers.len() as u16))
            }
            _ => Err(ExceptionCode::IllegalFunction),
        }
    }

    fn put_coil(&mut self, address: u16, on: bool) {
        if !self.stubborn {
            self.coils.insert(address, on);
        }
    }

    fn put_registers(&mut self, address: u16, registers: &[u16]) {
        if !self.stubborn {
            self.registers.extend((address..).zip(registers.iter().copied()));
        }
    }
}

/// A pty: the device's end, the gateway's end held open, and its path.
fn pty() -> (SerialStream, SerialStream, String) {
    let (near, far) = SerialStream::pair().unwrap();
    let path = far.name().unwrap();
    (near, far, path)
}

fn meter_points() -> Vec<Point> {
    let input = |name, address, data_type| Point::new(name, Table::InputRegister, address, data_type);
    vec![
        Point { unit: Some("V".into()), ..input("voltage", 0, DataType::F32) },
        input("power", 4, DataType::F32),
        Point { scale: 0.001, ..input("energy", 10, DataType::U32) },
        Point { max: Some(5000.0), ..u16_at("power_limit", 0) },
        holding("serial_number", 10, DataType::Text { bytes: 16 }),
        relay(),
    ]
}

async fn reads_and_switches_the_demo_meter(link: Link) {
    let mut gateway = Gateway::start(bus(link, vec![device("meter", 17, meter_points())]));
    gateway.expect_state("meter", "good").await;
    let voltage = gateway.expect("devices/meter/voltage", |json| json["quality"] == "good").await;
    assert!((220.0..240.0).contains(&voltage["value"].as_f64().unwrap()), "{voltage}");
    assert_eq!((&voltage["unit"], &voltage["boot"]), (&"V".into(), &"boot".into()));
    gateway.expect_value("meter", "serial_number", "FG-DEMO-00017").await;
    gateway.expect("devices/meter/power", |json| json["value"].as_f64().unwrap() > 0.0).await;
    let energy = gateway.expect("devices/meter/energy", |_| true).await;
    assert!(energy["value"].as_f64().unwrap() > 1234.0, "{energy}");
    assert_eq!(gateway.command("meter", "power_limit", "250").await, serde_json::json!({"ok": true, "value": 250}));
    gateway.expect_value("meter", "power", 250.0).await;
    assert_eq!(gateway.command("meter", "relay", "OFF").await, serde_json::json!({"ok": true, "value": false}));
    gateway.expect_value("meter", "power", 0.0).await;
    gateway.expect_value("meter", "relay", false).await;
    let too_much = gateway.refused("meter", "power_limit", "5001").await;
    assert_eq!(too_much, "5001 is above the highest value allowed, 5000");
    let requests = gateway.metric(r#"fieldgate_modbus_requests_total{bus="bus",device="meter"}"#);
    assert!(requests > 5.0);
    gateway.stop().await;
}

#[tokio::test]
async fn the_demo_meter_over_tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (shutdown, stopped) = watch::channel(false);
    let meter = tokio::spawn(run_tcp_meter(listener, stopped));
    reads_and_switches_the_demo_meter(tcp(address)).await;
    shutdown.send_replace(true);
    meter.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_demo_meter_over_a_serial_line() {
    let meter = RtuMeter::open(17).unwrap();
    let path = meter.path().to_owned();
    let (shutdown, stopped) = watch::channel(false);
    let meter = tokio::spawn(meter.run(stopped));
    reads_and_switches_the_demo_meter(serial(&path)).await;
    shutdown.send_replace(true);
    meter.await.unwrap().unwrap();
}

/// A bus with one device of a profile in `plugins/profiles`, as the configuration makes it.
fn bus_of_profile(profile: &str, address: std::net::SocketAddr) -> Settings {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fieldgate.yaml");
    let profile = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/profiles").join(profile);
    let profile = profile.display();
    let yaml = format!(
        "modbus: [ {{ name: bus, tcp: \"{address}\", devices: [ {{ name: meter, unit_id: 1, profile: {profile} }} ] }} ]\n"
    );
    std::fs::write(&path, yaml).unwrap();
    let loaded = fieldgate::config::load(&path).unwrap_or_else(|reports| panic!("{reports:?}"));
    loaded.config.buses.into_iter().next().unwrap()
}

#[tokio::test]
async fn the_demo_meter_has_all_that_its_profile_names() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = bus_of_profile("demo-meter.yaml", listener.local_addr().unwrap());
    let (shutdown, stopped) = watch::channel(false);
    let meter = tokio::spawn(run_tcp_meter(listener, stopped));
    let topics = settings.devices[0].points.iter().map(|point| format!("devices/meter/{}", point.point.name));
    let mut waited_for: Vec<String> = topics.collect();
    assert!(waited_for.len() > 5);
    let mut gateway = Gateway::start(settings);
    gateway.expect_state("meter", "good").await;
    while let Some(topic) = waited_for.pop() {
        gateway.looked = 0;
        gateway.expect(&topic, |json| json["quality"] == "good").await;
    }
    gateway.stop().await;
    shutdown.send_replace(true);
    meter.await.unwrap().unwrap();
}

#[tokio::test]
async fn every_profile_makes_a_plan_of_few_reads() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/profiles");
    let address = "127.0.0.1:9".parse().unwrap();
    for entry in std::fs::read_dir(directory).unwrap() {
        let profile = entry.unwrap().file_name().into_string().unwrap();
        let gateway = Gateway::start(bus_of_profile(&profile, address));
        let plan = gateway.plan("meter");
        assert!((1..=9).contains(&plan.len()), "{profile}: {plan:?}");
        gateway.stop().await;
    }
}

async fn a_device_falls_silent_and_returns(link: Link, field: Field) {
    let mut meter = device("meter", 1, vec![u16_at("a", 0)]);
    meter.bad_after = 700 * MS;
    let mut gateway = Gateway::start(bus(link, vec![meter]));
    gateway.expect_state("meter", "good").await;
    gateway.expect_value("meter", "a", 7).await;
    field.change(1, |unit| unit.silent = true);
    let state = gateway.expect_state("meter", "down").await;
    assert!(state["reason"].as_str().unwrap().contains("unit 1 does not answer"), "{state}");
    let stale = gateway.expect("devices/meter/a", |json| json["quality"] == "stale").await;
    assert_eq!(stale["value"], 7);
    let bad = gateway.expect("devices/meter/a", |json| json["quality"] == "bad").await;
    assert_eq!(bad["value"], Json::Null);
    field.change(1, |unit| {
        unit.silent = false;
        unit.registers.insert(0, 8);
    });
    gateway.expect_state("meter", "good").await;
    gateway.expect_value("meter", "a", 8).await;
    assert!(gateway.metric(r#"fieldgate_modbus_timeouts_total{bus="bus",device="meter"}"#) >= 3.0);
    gateway.stop().await;
}

#[tokio::test]
async fn a_silent_device_is_marked_and_recovers_over_tcp() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 7)]))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    a_device_falls_silent_and_returns(tcp(address), field).await;
}

#[tokio::test]
async fn a_silent_device_is_marked_and_recovers_on_a_serial_line() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 7)]))]), JoinSet::new());
    let (near, _far, path) = pty();
    field.serve_rtu(near, &mut tasks);
    a_device_falls_silent_and_returns(serial(Path::new(&path)), field).await;
}

/// DESIGN.md promise 8.
async fn a_dead_neighbour_costs_little(link: Link, field: Field) {
    let devices = vec![device("dead", 1, vec![u16_at("a", 0)]), device("live", 2, vec![u16_at("a", 0)])];
    let mut gateway = Gateway::start(bus(link, devices));
    gateway.expect_state("dead", "down").await;
    gateway.expect_value("live", "a", 7).await;
    let (dead, live, start) = (field.requests(1), field.requests(2), Instant::now());
    // With a timeout of 250 ms, the dead one is asked after 1.25 s, 2.5 s and 5 s.
    let enough = async {
        while field.requests(1) < dead + 2 {
            gateway.expect("devices/live/a", |_| true).await;
        }
    };
    timeout(PATIENCE, enough).await.unwrap();
    let (dead, live, elapsed) = (field.requests(1) - dead, field.requests(2) - live, start.elapsed());
    assert!(elapsed >= 2500 * MS, "the dead device was asked {dead} times in {elapsed:?}");
    // A loaded machine may be slow, but the dead device's timeouts alone must leave most of the time.
    let undisturbed = (elapsed - 250 * MS * dead as u32).as_millis() / 20;
    assert!(live as u128 * 4 > undisturbed, "{live} polls of the live device in {elapsed:?}");
    gateway.stop().await;
}

#[tokio::test]
async fn a_dead_device_leaves_its_neighbours_schedule_over_tcp() {
    let (field, mut tasks) = (Field::with([(2, Unit::with_registers([(0, 7)]))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    a_dead_neighbour_costs_little(tcp(address), field).await;
}

#[tokio::test]
async fn a_dead_device_leaves_its_neighbours_schedule_on_a_serial_line() {
    let (field, mut tasks) = (Field::with([(2, Unit::with_registers([(0, 7)]))]), JoinSet::new());
    let (near, _far, path) = pty();
    field.serve_rtu(near, &mut tasks);
    a_dead_neighbour_costs_little(serial(Path::new(&path)), field).await;
}

#[tokio::test]
async fn a_gateway_that_speaks_for_a_dead_device_does_not_make_it_live() {
    let dead = Unit { exception: Some(11), ..Unit::default() };
    let (field, mut tasks) = (Field::with([(1, dead)]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("dead", 1, vec![u16_at("a", 0)])]));
    gateway.expect_state("dead", "down").await;
    field.change(1, |unit| *unit = Unit::with_registers([(0, 7)]));
    gateway.expect_state("dead", "good").await;
    gateway.stop().await;
}

#[tokio::test]
async fn reads_that_a_device_refuses_are_split_until_only_what_it_lacks_is_left() {
    let registers = (0..4).chain(10..14).map(|address| (address, address + 100));
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers(registers))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let points = [0, 1, 3, 5, 10, 13].map(|address| u16_at(&format!("p{address}"), address));
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("meter", 1, points.into())]));
    assert_eq!(gateway.plan("meter"), ["holding_register 0-13"]);
    let state = gateway.expect_state("meter", "degraded").await;
    assert!(state["reason"].as_str().unwrap().contains("1 of 6 points give no value (p5)"), "{state}");
    for address in [0, 1, 3, 10, 13] {
        gateway.expect_value("meter", &format!("p{address}"), address + 100).await;
    }
    let plan = gateway.plan("meter");
    assert!(plan.contains(&"holding_register 5".into()) && plan.contains(&"holding_register 10-13".into()), "{plan:?}");
    assert!(gateway.metric(r#"fieldgate_modbus_exceptions_total{bus="bus",device="meter",code="2"}"#) >= 2.0);
    gateway.stop().await;
}

#[tokio::test]
async fn commands_use_the_function_that_the_device_knows() {
    let unit = Unit { coils: [(0, false)].into(), ..Unit::with_registers((0..8).map(|address| (address, 0))) };
    let (field, mut tasks) = (Field::with([(1, unit)]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let mut points = vec![
        relay(),
        u16_at("word", 0),
        holding("float", 2, DataType::F32),
        holding("bit", 4, DataType::Bits { first: 3, count: 1 }),
        Point { scale: 0.1, min: Some(5.0), max: Some(30.0), ..u16_at("setpoint", 5) },
        Point::new("fixed", Table::HoldingRegister, 6, DataType::U16),
    ];
    points.push(Point { access: Access::Write, ..u16_at("button", 7) });
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("plc", 1, points)]));
    gateway.expect_state("plc", "good").await;
    let done = |value: Json| serde_json::json!({"ok": true, "value": value});
    let check = async |gateway: &mut Gateway, point: &str, payload: &str, answer: Json, write: Request<'static>| {
        assert_eq!(gateway.command("plc", point, payload).await, answer, "{point}");
        assert_eq!(field.last_write(), Some(write), "{point}");
    };
    check(&mut gateway, "relay", "true", done(true.into()), Request::WriteSingleCoil(0, true)).await;
    check(&mut gateway, "word", "513", done(513.into()), Request::WriteSingleRegister(0, 513)).await;
    let float = Request::WriteMultipleRegisters(2, vec![0x4366, 0x199a].into());
    check(&mut gateway, "float", "230.1", done(230.1.into()), float).await;
    gateway.expect_value("plc", "float", 230.1).await;
    // The register's other bits stay.
    field.change(1, |unit| unit.put_registers(4, &[0b1_0001]));
    check(&mut gateway, "bit", "on", done(true.into()), Request::WriteSingleRegister(4, 0b1_1001)).await;
    check(&mut gateway, "setpoint", r#"{"value":21.5}"#, done(21.5.into()), Request::WriteSingleRegister(5, 215)).await;
    check(&mut gateway, "button", "1", done(1.into()), Request::WriteSingleRegister(7, 1)).await;
    field.change(1, |unit| unit.knows_only_multiple_writes = true);
    check(&mut gateway, "word", "514", done(514.into()), Request::WriteMultipleRegisters(0, vec![514].into())).await;
    check(&mut gateway, "relay", "0", done(false.into()), Request::WriteMultipleCoils(0, vec![false].into())).await;

    assert_eq!(gateway.refused("plc", "word", "65536").await, "65536 does not fit; the point takes 0 to 65535");
    assert_eq!(gateway.refused("plc", "setpoint", "4").await, "4 is below the lowest value allowed, 5");
    assert!(gateway.refused("plc", "fixed", "4").await.contains("access: read_write"));
    assert_eq!(gateway.refused("plc", "wrod", "4").await, "the device has no point `wrod`");
    field.change(1, |unit| unit.exception = Some(4));
    assert_eq!(gateway.refused("plc", "word", "4").await, "the device refused: exception 4 (server device failure)");
    gateway.stop().await;
}

#[tokio::test]
async fn a_command_is_answered_on_its_response_topic() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 0)]))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("plc", 1, vec![u16_at("word", 0)])]));
    gateway.expect_state("plc", "good").await;
    let properties = Properties {
        response_topic: Some(TopicName::new("answers/me").unwrap()),
        correlation_data: Some(b"42".as_slice().into()),
        ..Properties::default()
    };
    gateway.send("devices/plc/word/set", "9", properties);
    gateway.expect("answers/me", |json| json["ok"] == true).await;
    let answer = gateway.history.iter().find(|message| message.topic.as_str() == "answers/me").unwrap();
    assert_eq!(answer.properties.as_ref().unwrap().correlation_data.as_deref(), Some(b"42".as_slice()));
    gateway.stop().await;
}

#[tokio::test]
async fn a_write_that_does_not_read_back_is_an_error() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 5)]))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let plc = Device { read_back: ReadBack::Verify, ..device("plc", 1, vec![u16_at("word", 0)]) };
    let mut gateway = Gateway::start(bus(tcp(address), vec![plc]));
    gateway.expect_value("plc", "word", 5).await;
    assert_eq!(gateway.command("plc", "word", "6").await["ok"], true);
    field.change(1, |unit| unit.stubborn = true);
    assert_eq!(gateway.refused("plc", "word", "7").await, "the device took 7, but reads back 6");
    gateway.stop().await;
}

#[tokio::test]
async fn a_command_to_a_dead_device_or_a_lost_bus_is_refused_at_once() {
    let (field, mut tasks) = (Field::with([]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let devices = vec![device("dead", 1, vec![u16_at("a", 0)]), device("dead2", 2, vec![u16_at("a", 0)])];
    let mut gateway = Gateway::start(bus(tcp(address), devices));
    gateway.expect_state("dead", "down").await;
    let requests = field.requests(1);
    let refused = gateway.refused("dead", "a", "1").await;
    assert!(refused.contains("does not answer") || refused.contains("not connected"), "{refused}");
    assert!(field.requests(1) <= requests + 1);
    gateway.stop().await;
    // A port that nobody listens on.
    drop(tasks);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("plc", 1, vec![u16_at("a", 0)])]));
    let state = gateway.expect_state("plc", "down").await;
    assert_eq!(state["reason"], "the bus is not connected");
    assert_eq!(gateway.refused("plc", "a", "1").await, "the bus is not connected");
    let adapter = &gateway.status.statuses()[0];
    assert_eq!(adapter.health, Health::Down);
    assert!(adapter.reason.as_ref().unwrap().contains(&address.to_string()), "{adapter:?}");
    gateway.stop().await;
}

#[tokio::test]
async fn a_tcp_connection_that_breaks_is_made_again() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 7)]))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("meter", 1, vec![u16_at("a", 0)])]));
    gateway.expect_value("meter", "a", 7).await;
    // Connections and listener vanish.
    tasks.shutdown().await;
    gateway.expect_state("meter", "down").await;
    gateway.expect("devices/meter/a", |json| json["quality"] == "stale").await;
    field.change(1, |unit| unit.put_registers(0, &[8]));
    field.serve_on(TcpListener::bind(address).await.unwrap(), &mut tasks);
    gateway.expect_state("meter", "good").await;
    gateway.expect_value("meter", "a", 8).await;
    assert!(gateway.metric(r#"fieldgate_modbus_connects_total{bus="bus"}"#) >= 2.0);
    gateway.stop().await;
}

#[tokio::test]
async fn a_peer_that_hangs_up_on_every_request_is_down_and_not_hammered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("meter", 1, vec![u16_at("a", 0)])]));
    let accepted = Arc::new(Mutex::new(0));
    let (counter, mut tasks) = (accepted.clone(), JoinSet::new());
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            *counter.lock() += 1;
            drop(stream);
        }
    });
    let start = Instant::now();
    gateway.expect_state("meter", "down").await;
    // 0.5 s, 1 s, 2 s … apart.
    assert!(*accepted.lock() <= 2 + start.elapsed().as_millis() / 500);
    gateway.stop().await;
}

#[tokio::test]
async fn a_serial_port_that_vanishes_is_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("port");
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 7)]))]), JoinSet::new());
    let (near, far, name) = pty();
    std::os::unix::fs::symlink(&name, &path).unwrap();
    field.serve_rtu(near, &mut tasks);
    let mut gateway = Gateway::start(bus(serial(&path), vec![device("meter", 1, vec![u16_at("a", 0)])]));
    gateway.expect_value("meter", "a", 7).await;
    std::fs::remove_file(&path).unwrap();
    tasks.shutdown().await;
    drop(far);
    gateway.expect_state("meter", "down").await;
    let adapter = &gateway.status.statuses()[0];
    assert_eq!(adapter.health, Health::Down);
    let (near, _far, name) = pty();
    field.serve_rtu(near, &mut tasks);
    std::os::unix::fs::symlink(&name, &path).unwrap();
    gateway.expect_state("meter", "good").await;
    gateway.expect_value("meter", "a", 7).await;
    gateway.stop().await;
}

/// Two points whose answers look alike but for their value: whenever one is taken for the other, a reading is wrong.
async fn late_answers_change_nothing(link: Link, field: Field) {
    let limits = ReadLimits { max_registers: 1, ..ReadLimits::default() };
    let mut slow = device("slow", 1, vec![u16_at("a", 0), u16_at("b", 1)]);
    slow.read_limits = limits;
    slow.down_after = 100;
    let mut gateway = Gateway::start(bus(link, vec![slow]));
    gateway.expect_value("slow", "b", 222).await;
    for _ in 0..4 {
        // The first answer is later than the timeout of 250 ms, within twice that; a repetition would be slow too.
        field.change(1, |unit| unit.delays = [270 * MS, 60 * MS].into());
        gateway.expect("devices/slow/b", |_| true).await;
        gateway.expect("devices/slow/a", |_| true).await;
        gateway.expect("devices/slow/b", |_| true).await;
    }
    for message in &gateway.history {
        let (topic, json) = (message.topic.as_str(), json(message));
        let expected = match topic {
            "devices/slow/a" => 111,
            "devices/slow/b" => 222,
            _ => continue,
        };
        assert_eq!(json["value"], expected, "{topic}");
    }
    assert!(gateway.metric(r#"fieldgate_modbus_timeouts_total{bus="bus",device="slow"}"#) >= 3.0);
    assert!(gateway.metric(r#"fieldgate_modbus_discarded_bytes_total{bus="bus"}"#) >= 7.0);
    gateway.stop().await;
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_the_next_one_over_tcp() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 111), (1, 222)]))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    late_answers_change_nothing(tcp(address), field).await;
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_the_next_one_on_a_serial_line() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 111), (1, 222)]))]), JoinSet::new());
    let (near, _far, path) = pty();
    field.serve_rtu(near, &mut tasks);
    late_answers_change_nothing(serial(Path::new(&path)), field).await;
}

#[tokio::test]
async fn a_flood_of_commands_does_not_stop_the_polls() {
    let (field, mut tasks) = (Field::with([(1, Unit::with_registers([(0, 0), (1, 7)]))]), JoinSet::new());
    let address = field.serve_tcp(&mut tasks).await;
    let points = vec![Point { access: Access::Write, ..u16_at("word", 0) }, u16_at("a", 1)];
    let mut gateway = Gateway::start(bus(tcp(address), vec![device("plc", 1, points)]));
    gateway.expect_value("plc", "a", 7).await;
    for number in 0..2000 {
        gateway.send("devices/plc/word/set", &number.to_string(), Properties::default());
    }
    // The last command is answered, and among the answers there were polls.
    gateway.expect("devices/plc/word/set/result", |json| json["value"] == 1999).await;
    let is_answer = |message: &Arc<Message>| message.topic.as_str() == "devices/plc/word/set/result";
    let first = gateway.history.iter().position(is_answer).unwrap();
    let polls = gateway.history[first..].iter().filter(|message| message.topic.as_str() == "devices/plc/a").count();
    assert!(polls >= 2, "{polls} polls among 2000 commands");
    gateway.stop().await;
}

#[tokio::test]
async fn rtu_framing_through_a_device_server() {
    let meter = RtuMeter::open(3).unwrap();
    let mut port = SerialLine::new(meter.path(), 115_200).open().unwrap();
    let (shutdown, stopped) = watch::channel(false);
    let meter = tokio::spawn(meter.run(stopped));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let link = Link::RtuOverTcp { address: listener.local_addr().unwrap().to_string() };
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut port).await;
    });
    let mut gateway = Gateway::start(bus(link, vec![device("meter", 3, meter_points())]));
    gateway.expect_value("meter", "serial_number", "FG-DEMO-00017").await;
    gateway.stop().await;
    shutdown.send_replace(true);
    meter.await.unwrap().unwrap();
}
