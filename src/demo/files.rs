//! The demo's files: two configurations to read and change, the plugins they name, certificates.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::ports::Ports;
use super::{Devices, METER, RTU_METER, RTU_METER_UNIT, SCALE};
use crate::clock::Clock;
use crate::tls::TlsError;
use crate::tls::issue::{Authority, LOOPBACK_NAMES, Usage};

/// What the configurations name beside themselves.
const PLUGINS: [(&str, &str); 3] = [
    ("plugins/profiles/demo-meter.yaml", include_str!("../../plugins/profiles/demo-meter.yaml")),
    ("plugins/codecs/demo-scale.js", include_str!("../../plugins/codecs/demo-scale.js")),
    ("plugins/codecs/demo-sensor.js", include_str!("../../plugins/codecs/demo-sensor.js")),
];

/// How many names for a temporary directory are tried.
const MAX_TRIES: u32 = 100;

/// Where the demo keeps everything. A temporary one is removed when this is dropped.
pub struct Directory {
    path: PathBuf,
    temporary: bool,
    /// Held so that a second demo does not take the files away from under the first.
    _lock: File,
}

impl Directory {
    /// The directory `given`, made if it is not there, or a new temporary one. Only this user can read it.
    pub fn open(given: Option<&Path>) -> Result<Self, (PathBuf, io::Error)> {
        if let Some(path) = given {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            return made.and_then(|()| Self::lock(&path, false)).map_err(|error| (path, error));
        }
        let parent = std::env::temp_dir();
        for number in 0..MAX_TRIES {
            let path = parent.join(format!("fieldgate-demo-{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Self::lock(&path, true).map_err(|error| (path, error)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err((path, error)),
            }
        }
        Err((parent, io::Error::from(io::ErrorKind::AlreadyExists)))
    }

    fn lock(path: &Path, temporary: bool) -> io::Result<Self> {
        let lock = File::options().create(true).truncate(false).write(true).open(path.join("demo.lock"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_path_buf(), temporary, _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                Err(io::Error::other("another demo runs there; end it first, or give this one another directory"))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_temporary(&self) -> bool {
        self.temporary
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.temporary {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

pub fn cloud(directory: &Path) -> PathBuf {
    directory.join("cloud")
}

pub fn certificates(directory: &Path) -> PathBuf {
    directory.join("certificates")
}

/// The demo's own authority, the cloud's certificate and the gateway's.
pub fn issue_certificates(directory: &Path, clock: &Clock) -> Result<(), TlsError> {
    let now = clock.now();
    let authority = Authority::open(&certificates(directory), now)?;
    authority.ensure("cloud", Usage::Server, &LOOPBACK_NAMES, now)?;
    authority.ensure("gateway", Usage::Client, &["demo-gateway"], now)?;
    Ok(())
}

/// Writes both configurations and what they need. What somebody has changed in a directory of his own is replaced: the
/// ports and ptys are those of this start.
pub fn write(directory: &Path, ports: &Ports, devices: &Devices) -> io::Result<()> {
    for (name, text) in PLUGINS {
        let path = directory.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, text)?;
    }
    fs::create_dir_all(cloud(directory))?;
    fs::write(directory.join("fieldgate.yaml"), gateway_config(ports, devices))?;
    fs::write(cloud(directory).join("fieldgate.yaml"), cloud_config(ports))
}

fn gateway_config(ports: &Ports, devices: &Devices) -> String {
    let Ports { mqtt, mqttsn, web, cloud } = ports;
    let (meter_address, rtu_meter) = (devices.meter_address, quoted(devices.rtu_meter.path()));
    let scale = quoted(&devices.scale_path);
    format!(
        "# The gateway of `fieldgate demo`, written at its start.
gateway: {{ name: demo }}
log: {{ level: warn }}
store: {{ directory: data }}

listeners:
  - {{ name: local, address: 127.0.0.1:{mqtt} }}

# The sensor sends five packed bytes over MQTT-SN; a codec makes readings of them.
mqttsn: {{ address: 127.0.0.1:{mqttsn} }}
translators:
  - {{ name: climate, filter: sensors/+/raw, codec: plugins/codecs/demo-sensor.js, device: \"{{1}}\" }}

modbus:
  - name: bus-tcp
    tcp: {meter_address}
    devices:
      - {{ name: {METER}, unit_id: 1, profile: plugins/profiles/demo-meter.yaml }}
  - name: bus-rtu
    serial: {{ path: {rtu_meter}, baud_rate: 9600 }}
    devices:
      - {{ name: {RTU_METER}, unit_id: {RTU_METER_UNIT}, profile: plugins/profiles/demo-meter.yaml, poll_interval: 2s }}

serial:
  - name: {SCALE}
    path: {scale}
    framing: {{ line: {{ delimiters: \"\\r\\n\" }} }}
    codec: plugins/codecs/demo-scale.js
    silent_after: 5s

upstreams:
  - name: cloud
    url: mqtts://localhost:{cloud}
    tls: {{ ca: certificates/ca.pem, certificate: certificates/gateway.pem, key: certificates/gateway.key }}
    out:
      - {{ filter: \"devices/#\", remote_prefix: \"{{gateway}}/\" }}
    in:
      - {{ filter: \"devices/+/+/set\", remote_prefix: \"{{gateway}}/\" }}
    state_topic: \"{{gateway}}/state\"

web: {{ address: 127.0.0.1:{web} }}
"
    )
}

fn cloud_config(Ports { cloud, .. }: &Ports) -> String {
    format!(
        "# The cloud of `fieldgate demo`: a second Fieldgate that is a broker and nothing else.
gateway: {{ name: cloud }}
store: {{ directory: data }}
listeners:
  - name: tls
    address: 127.0.0.1:{cloud}
    tls:
      certificate: ../certificates/cloud.pem
      key: ../certificates/cloud.key
      # The gateway shows its certificate; mosquitto_sub does without.
      client_ca: ../certificates/ca.pem
      require_certificate: false
web: {{ enabled: false }}
"
    )
}

/// A path as YAML holds it, whatever its characters.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "''").replace("${", "$${"))
}
