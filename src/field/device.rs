//! One device as its adapter sees it: its health, told on change, and its newest values, told again when they go stale.
//!
//! For adapters whose devices send by themselves (serial, codecs on topics, plugin processes). What a poll means for a
//! device's health is another matter, `field::modbus`.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::{info, warn};

use crate::clock::Clock;
use crate::field::Exchange;
use crate::field::mapping::{DeviceState, check_point_name};
use crate::observe::{Health, Kind, Status};
use crate::proto::serial::PointValue;
use crate::reading::{Quality, Reading, ReadingTime, Value};

/// How many points of one device are remembered; more are still published, but not repeated as stale.
const MAX_POINTS: usize = 1024;

/// The health of one device, shared by its adapter's task and whoever looks at it.
#[derive(Debug)]
pub(super) struct Device {
    name: Arc<str>,
    clock: Clock,
    state: Mutex<DeviceState>,
    newest: Mutex<BTreeMap<Arc<str>, PointValue>>,
}

impl Device {
    pub(super) fn new(name: Arc<str>, clock: Clock) -> Self {
        let state = DeviceState { health: Health::Starting, reason: None, since: clock.now() };
        Self { name, clock, state: Mutex::new(state), newest: Mutex::default() }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Takes note of the device's health, and publishes and logs it where it changed. A reason that changes alone is
    /// published, not logged: it may differ from frame to frame.
    pub(super) fn set(&self, exchange: &Exchange, health: Health, reason: Option<&str>) {
        let mut state = self.state.lock();
        let same_health = state.health == health;
        if same_health && state.reason.as_deref() == reason {
            return;
        }
        let since = if same_health { state.since } else { self.clock.now() };
        *state = DeviceState { health, reason: reason.map(str::to_owned), since };
        let state = state.clone();
        exchange.publish_state(&self.name, &state);
        match health {
            _ if same_health => {}
            Health::Degraded | Health::Down => {
                warn!(device = %self.name, health = health.name(), reason = reason.unwrap_or_default(), "device is not well");
            }
            Health::Starting | Health::Good | Health::Paused => {
                info!(device = %self.name, health = health.name(), "device health");
            }
        }
    }

    /// Publishes what the device has just sent as good readings.
    pub(super) fn publish(&self, exchange: &Exchange, values: Vec<PointValue>, time: &ReadingTime) {
        for PointValue { point, value, unit } in values {
            self.publish_reading(exchange, point, Some(value), unit, Quality::Good, time);
        }
    }

    /// Publishes one reading of the device.
    pub(super) fn publish_reading(
        &self,
        exchange: &Exchange,
        point: Arc<str>,
        value: Option<Value>,
        unit: Option<Arc<str>>,
        quality: Quality,
        time: &ReadingTime,
    ) {
        let point = legal_point(point);
        let reading =
            Reading { device: self.name.clone(), point: point.clone(), value, unit, quality, time: time.clone() };
        exchange.publish_reading(&reading);
        let mut newest = self.newest.lock();
        match (reading.value, reading.quality) {
            (Some(value), Quality::Good) if newest.len() < MAX_POINTS || newest.contains_key(&point) => {
                newest.insert(point.clone(), PointValue { point, value, unit: reading.unit });
            }
            (_, Quality::Good) => {}
            (_, Quality::Stale | Quality::Bad(_)) => drop(newest.remove(&point)),
        }
    }

    /// Publishes the newest values again, as stale: the device can no longer be heard. Says so once per silence.
    pub(super) fn publish_stale(&self, exchange: &Exchange) {
        let newest = std::mem::take(&mut *self.newest.lock());
        for PointValue { point, value, unit } in newest.into_values() {
            self.publish_reading(exchange, point, Some(value), unit, Quality::Stale, &exchange.time());
        }
    }

    pub(super) fn status(&self, adapter: &str, facts: Vec<(&'static str, String)>) -> Status {
        let state = self.state.lock().clone();
        Status {
            kind: Kind::Device,
            name: self.name.to_string(),
            parent: Some(adapter.to_owned()),
            health: state.health,
            reason: state.reason,
            since: state.since,
            facts,
        }
    }
}

/// A name that a device gave, made one that a point may have: `state` is the device's health, so it becomes `state_`.
fn legal_point(name: Arc<str>) -> Arc<str> {
    if check_point_name(&name).is_ok() { name } else { format!("{name}_").into() }
}

/// A command's value as JSON.
pub(super) fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::Integer(value) => (*value).into(),
        Value::Float(value) => (*value).into(),
        Value::Text(value) => (&**value).into(),
    }
}

/// Bytes from a device as a person can read them in a log or on a page, cut to what fits a line.
pub(super) fn show_bytes(bytes: &[u8]) -> String {
    const SHOWN_BYTES: usize = 80;
    let shown = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let more = if bytes.len() > SHOWN_BYTES { format!("… ({} bytes)", bytes.len()) } else { String::new() };
    let is_text = shown.iter().all(|byte| byte.is_ascii_graphic() || b" \t\r\n".contains(byte));
    if is_text { format!("{}{more}", shown.escape_ascii()) } else { format!("{}{more}", hex(shown)) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}
