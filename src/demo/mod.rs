//! The demo: simulated field devices on real transports, and a cloud.
//!
//! One gateway, configured by a file like every other, with a Modbus TCP meter, a Modbus RTU meter on a pty, a scale on
//! a pty and a sleeping MQTT-SN sensor; and a second gateway in a thread of its own that plays the cloud, with TLS.
//! Everything listens on loopback. Nothing in here is used by `fieldgate run`.

mod cloud;
mod files;
pub mod meter;
mod ports;
pub mod scale;
pub mod sensor;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::warn;

use crate::clock::Clock;
use crate::config::report::{Look, Reports};
use crate::config::{self, Config};
use crate::gateway::{BindError, Gateway, Handle};
use crate::hub::{Attach, AttachError, Face, Hub, Outbound, SubscribeOptions};
use crate::message::QoS;
use crate::tls::TlsError;
use crate::topic::SharedFilter;
use crate::web::log::LogRing;
use cloud::Cloud;
use files::Directory;
use ports::Ports;

/// Names of the simulated devices.
const METER: &str = "meter";
const RTU_METER: &str = "rtu-meter";
const SCALE: &str = "scale";
const SENSOR: &str = "climate";
const RTU_METER_UNIT: u8 = 7;

/// How the demo is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where everything is kept; a temporary directory, which is removed at the end, if absent.
    pub directory: Option<PathBuf>,
    /// Take whatever ports are free, and not the usual ones.
    pub any_ports: bool,
    pub web_port: Option<u16>,
    pub mqtt_port: Option<u16>,
}

/// Why the demo cannot start.
#[derive(Debug, Error)]
pub enum DemoError {
    #[error("the demo's files cannot be written to {directory}")]
    Files { directory: String, source: io::Error },
    #[error("the cloud's certificates cannot be made")]
    Certificates(#[from] TlsError),
    #[error("no free port on 127.0.0.1")]
    Ports(#[source] io::Error),
    #[error("the simulated {what} cannot start")]
    Device { what: &'static str, source: io::Error },
    #[error("the demo's own configuration is wrong:\n{0}")]
    Config(String),
    #[error(transparent)]
    Gateway(#[from] BindError),
    #[error("the cloud cannot start: {0}")]
    Cloud(String),
    #[error("the demo cannot listen to its own gateway")]
    Watch(#[from] AttachError),
}

/// The demo with its files written and its devices there, before anything runs.
pub struct Demo {
    pub config: Config,
    /// What a person should know: ports that were taken.
    pub notices: Vec<String>,
    directory: Directory,
    ports: Ports,
    devices: Devices,
}

/// What to tell people.
#[derive(Clone, Debug)]
pub struct Places {
    pub directory: PathBuf,
    pub is_temporary: bool,
    pub web: SocketAddr,
    pub mqtt: SocketAddr,
    pub cloud: SocketAddr,
    /// The file that clients of the cloud name as their CA.
    pub cloud_ca: PathBuf,
}

impl Demo {
    /// Chooses ports, makes the devices and writes the configurations.
    ///
    /// # Errors
    /// [`DemoError`].
    pub async fn prepare(options: Options, clock: &Clock) -> Result<Self, DemoError> {
        let directory = Directory::open(options.directory.as_deref())
            .map_err(|(directory, source)| DemoError::Files { directory: directory.display().to_string(), source })?;
        let (ports, notices) = Ports::choose(&options).await.map_err(DemoError::Ports)?;
        let devices = Devices::open(directory.path())?;
        files::issue_certificates(directory.path(), clock)?;
        files::write(directory.path(), &ports, &devices)
            .map_err(|source| DemoError::Files { directory: directory.path().display().to_string(), source })?;
        let config = load(&directory.path().join("fieldgate.yaml"))?;
        Ok(Self { config, notices, directory, ports, devices })
    }

    pub fn places(&self) -> Places {
        let loopback = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        Places {
            directory: self.directory.path().to_path_buf(),
            is_temporary: self.directory.is_temporary(),
            web: loopback(self.ports.web),
            mqtt: loopback(self.ports.mqtt),
            cloud: loopback(self.ports.cloud),
            cloud_ca: files::certificates(self.directory.path()).join("ca.pem"),
        }
    }

    /// Opens the gateway and starts the cloud and the devices.
    ///
    /// # Errors
    /// [`DemoError`].
    pub async fn bind(self, clock: Clock, log: LogRing) -> Result<Running, DemoError> {
        let gateway = Gateway::bind(self.config, clock, log).await?;
        let cloud = Cloud::start(load(&files::cloud(self.directory.path()).join("fieldgate.yaml"))?).await?;
        let first_value = first_value(gateway.handle().hub(), &format!("devices/{METER}/power"))?;
        Ok(Running {
            gateway,
            cloud,
            first_value,
            directory: self.directory,
            devices: self.devices,
            sensors: SocketAddr::from(([127, 0, 0, 1], self.ports.mqttsn)),
        })
    }
}

/// The demo, ready to run.
pub struct Running {
    gateway: Gateway,
    cloud: Cloud,
    first_value: FirstValue,
    directory: Directory,
    devices: Devices,
    sensors: SocketAddr,
}

impl Running {
    pub fn handle(&self) -> Arc<Handle> {
        self.gateway.handle()
    }

    /// Works until `shutdown`, then drains. `tell` gets news for people: the first value here and in the cloud.
    pub async fn run(self, shutdown: watch::Receiver<bool>, tell: mpsc::Sender<String>) {
        let Self { gateway, mut cloud, first_value, directory, devices, sensors } = self;
        let mut tasks = JoinSet::new();
        // The devices outlive the gateway: what it sees of them while it stops is what it would see in the field.
        let (stop_devices, devices_stopped) = watch::channel(false);
        devices.run(&mut tasks, sensors, &devices_stopped);
        let arrived = cloud.first_value();
        tasks.spawn(async move {
            if let Some((topic, value)) = first_value.wait().await {
                let _ = tell.send(format!("First value: {topic} = {value}")).await;
            }
            if let Some((topic, value)) = arrived.wait().await {
                let _ = tell.send(format!("First value in the cloud: {topic} = {value}")).await;
            }
        });
        let (_no_reloads, reloads) = mpsc::channel(1);
        gateway.run(shutdown, reloads).await;
        let _ = stop_devices.send(true);
        // The sensor's last word goes to a gateway that has gone; nothing of the devices is worth waiting for.
        tasks.shutdown().await;
        cloud.stop().await;
        drop(directory);
    }
}

fn load(path: &Path) -> Result<Config, DemoError> {
    let loaded = config::load(path).map_err(|reports: Reports| DemoError::Config(reports.render(Look::Plain)))?;
    Ok(loaded.config)
}

/// The first reading that arrives.
struct FirstValue {
    found: mpsc::Receiver<(String, String)>,
    /// Ends with this.
    _watching: JoinSet<()>,
}

impl FirstValue {
    fn never() -> Self {
        Self { found: mpsc::channel(1).1, _watching: JoinSet::new() }
    }

    async fn wait(mut self) -> Option<(String, String)> {
        self.found.recv().await
    }
}

/// Watches a hub for the first reading with a value on `filter`.
fn first_value(hub: &Hub, filter: &str) -> Result<FirstValue, AttachError> {
    let mut link = hub.attach(Attach::internal(Face::Web, "demo"))?;
    if let Ok(filter) = SharedFilter::split(filter) {
        let _ = link.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce));
    }
    let (sender, found) = mpsc::channel(1);
    let mut watching = JoinSet::new();
    watching.spawn(async move {
        loop {
            let batch = link.next().await;
            if batch.is_empty() {
                return;
            }
            for outbound in batch {
                let Outbound::Publish(delivery) = outbound else { continue };
                if let Some(value) = value_of(&delivery.message.payload) {
                    let _ = sender.send((delivery.message.topic.to_string(), value)).await;
                    link.detach(false, None);
                    return;
                }
            }
        }
    });
    Ok(FirstValue { found, _watching: watching })
}

/// The value of a reading, with its unit.
fn value_of(payload: &[u8]) -> Option<String> {
    let reading: serde_json::Value = serde_json::from_slice(payload).ok()?;
    let value = match reading.get("value")? {
        serde_json::Value::Null => return None,
        serde_json::Value::Number(number) => number
            .as_f64()
            .map_or_else(|| number.to_string(), |number| ((number * 1000.0).round() / 1000.0).to_string()),
        value => value.to_string(),
    };
    let unit = reading.get("unit").and_then(|unit| unit.as_str());
    Some(unit.map_or_else(|| value.clone(), |unit| format!("{value} {unit}")))
}

/// The simulated devices.
struct Devices {
    meter: std::net::TcpListener,
    meter_address: SocketAddr,
    rtu_meter: meter::RtuMeter,
    scale: scale::Scale,
    scale_path: PathBuf,
}

impl Devices {
    fn open(directory: &Path) -> Result<Self, DemoError> {
        let device = |what| move |source| DemoError::Device { what, source };
        // The meter takes any port: nobody but the gateway needs to know it.
        let meter = std::net::TcpListener::bind(("127.0.0.1", 0)).map_err(device("Modbus TCP meter"))?;
        meter.set_nonblocking(true).map_err(device("Modbus TCP meter"))?;
        let meter_address = meter.local_addr().map_err(device("Modbus TCP meter"))?;
        let rtu_meter = meter::RtuMeter::open(RTU_METER_UNIT).map_err(device("Modbus RTU meter"))?;
        let scale_path = directory.join("scale.tty");
        // What a demo that was killed has left behind.
        let _ = std::fs::remove_file(&scale_path);
        let scale = scale::Scale::open_at(&scale_path).map_err(device("scale"))?;
        Ok(Self { meter, meter_address, rtu_meter, scale, scale_path })
    }

    fn run(self, tasks: &mut JoinSet<()>, sensors: SocketAddr, shutdown: &watch::Receiver<bool>) {
        let Self { meter, rtu_meter, scale, .. } = self;
        match tokio::net::TcpListener::from_std(meter) {
            Ok(listener) => spawn(tasks, "Modbus TCP meter", meter::run_tcp_meter(listener, shutdown.clone())),
            Err(error) => warn!(%error, "the simulated Modbus TCP meter cannot start"),
        }
        spawn(tasks, "Modbus RTU meter", rtu_meter.run(shutdown.clone()));
        spawn(tasks, "scale", scale.run(shutdown.clone()));
        let shutdown = shutdown.clone();
        spawn(tasks, "sensor", async move {
            // It would find the gateway by itself after a few tries; a head start saves them.
            tokio::time::sleep(Duration::from_millis(200)).await;
            sensor::run(sensors, SENSOR, shutdown).await
        });
    }
}

fn spawn(tasks: &mut JoinSet<()>, what: &'static str, device: impl Future<Output = io::Result<()>> + Send + 'static) {
    tasks.spawn(async move {
        if let Err(error) = device.await {
            warn!(what, %error, "a simulated device failed");
        }
    });
}
