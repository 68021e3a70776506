//! Modbus buses: polls devices over TCP, RTU or RTU over TCP, and writes what commands ask for.
//!
//! Not the protocol's bytes, which are tokio-modbus's, nor its values, which are `proto::modbus`'s.

mod bus;
mod device;
mod link;
mod schedule;
mod status;
mod wire;
mod write;

pub use bus::Bus;
pub use status::{BusStatus, PlanLine};

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::field::SerialLine;
use crate::field::mapping::PayloadForm;
use crate::proto::modbus::{Point, ReadLimits, UnitId};

/// One bus: everything behind one serial port or one TCP connection, with one owner.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub name: Arc<str>,
    pub link: Link,
    /// How long an answer may take to begin. On a serial line the time that the bytes themselves take is added.
    pub timeout: Duration,
    /// The silence before each request. `None`: what the specification asks of a serial line (V1.02 §2.5.1.1), none
    /// over TCP. Devices that lose requests after an answer need more.
    pub request_gap: Option<Duration>,
    /// How readings are written. Used by whoever makes the bus's exchange.
    pub payload: PayloadForm,
    pub devices: Vec<Device>,
}

impl Settings {
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
}

/// How a bus is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// `host:port`; 502 is Modbus's own port.
    Tcp { address: String },
    /// A serial line with RTU framing.
    Serial(SerialLine),
    /// RTU framing through a serial device server that passes bytes on as they are.
    RtuOverTcp { address: String },
}

/// As in `tcp 10.0.0.5:502`.
impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address } => write!(f, "tcp {address}"),
            Self::Serial(line) => write!(f, "serial {} at {} Bd", line.path.display(), line.baud_rate),
            Self::RtuOverTcp { address } => write!(f, "rtu over tcp {address}"),
        }
    }
}

/// One server on the bus.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    pub name: Arc<str>,
    pub unit_id: UnitId,
    pub points: Vec<DevicePoint>,
    pub read_limits: ReadLimits,
    pub publish: Publish,
    pub read_back: ReadBack,
    /// After how many requests in a row without an answer the device counts as down; at least 1.
    pub down_after: u32,
    /// How long the last readings of a device that is down count as stale; then they are bad.
    pub bad_after: Duration,
}

impl Device {
    pub const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(1);
    pub const DEFAULT_DOWN_AFTER: u32 = 3;
    pub const DEFAULT_BAD_AFTER: Duration = Duration::from_secs(60);

    pub fn new(name: &str, unit_id: UnitId) -> Self {
        Self {
            name: name.into(),
            unit_id,
            points: Vec::new(),
            read_limits: ReadLimits::default(),
            publish: Publish::default(),
            read_back: ReadBack::default(),
            down_after: Self::DEFAULT_DOWN_AFTER,
            bad_after: Self::DEFAULT_BAD_AFTER,
        }
    }
}

/// A point and how it is polled.
#[derive(Clone, Debug, PartialEq)]
pub struct DevicePoint {
    pub point: Point,
    pub poll_interval: Duration,
    /// With [`Publish::OnChange`]: the smallest change of a number that is published, in the point's unit; 0 for any.
    pub deadband: f64,
}

/// When a reading is published. A change of quality always is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Publish {
    /// After every poll: what consumers of time series expect, and how they see that the gateway lives.
    #[default]
    EveryPoll,
    /// When the value differs from the one published last by more than the deadband, and when `max_silence` has
    /// passed since.
    OnChange { max_silence: Duration },
}

/// What happens after a device took a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadBack {
    /// The device's word is enough; the point is polled again at once.
    #[default]
    Trust,
    /// The command succeeds only if the point reads back as written. Not for points that fall back by themselves.
    Verify,
}
