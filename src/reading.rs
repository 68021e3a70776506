//! A reading: what a device's point measured, when, and how far to trust it.
//!
//! Every adapter turns its protocol into readings, and commands on topics back into values; how a reading becomes a
//! message is decided in one place, `field::mapping`.

use std::fmt;
use std::sync::Arc;

use crate::clock::UnixMillis;

/// One value of one point of one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// The device's name in the configuration.
    pub device: Arc<str>,
    pub point: Arc<str>,
    /// `None` where quality is bad and no earlier value is known.
    pub value: Option<Value>,
    /// The unit's symbol, as in `kWh`.
    pub unit: Option<Arc<str>>,
    pub quality: Quality,
    pub time: ReadingTime,
}

/// What a point can hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(Arc<str>),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Text(value) => f.write_str(value),
        }
    }
}

/// How far a reading can be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quality {
    /// Read from the device just now.
    Good,
    /// The last good value, repeated while the device does not answer.
    Stale,
    /// No value can be trusted, and why.
    Bad(Arc<str>),
}

/// When a reading was taken, and what that time is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadingTime {
    pub at: UnixMillis,
    /// Whether wall time had been set when the reading was taken.
    pub clock_set: bool,
}
