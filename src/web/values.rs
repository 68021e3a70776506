//! The latest value of every point, with a short history for its sparkline.
//!
//! Fed by the web's session on the hub with whatever is published on `devices/{device}/{point}`; the payload need not
//! be a reading, any text is shown as it is. Memory has a limit: so many points, so much text, so long a history.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::clock::UnixMillis;

/// Points kept; values of more points are counted and not shown.
const MAX_POINTS: usize = 2000;
/// Bytes of a topic that is kept.
const MAX_TOPIC_BYTES: usize = 300;
/// Bytes of a text that is shown; a longer one is cut.
const MAX_TEXT_BYTES: usize = 256;
/// Bytes of a payload that is looked into; a longer one is shown by its size.
const MAX_PAYLOAD_BYTES: usize = 16 * 1024;
/// Changes remembered for one [`Values::take_changes`].
const MAX_CHANGES: usize = 2 * MAX_POINTS;
/// Numbers in a point's history.
const HISTORY: usize = 60;

/// The latest values; shared by the session that feeds it and the API.
#[derive(Default)]
pub struct Values {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    points: BTreeMap<Arc<str>, Point>,
    /// Topics whose value changed or went since the last [`Values::take_changes`].
    changed: BTreeSet<Arc<str>>,
    /// There were more changes than [`MAX_CHANGES`].
    overrun: bool,
    /// Values that were not kept because of a limit.
    left_off: u64,
}

struct Point {
    latest: Latest,
    history: VecDeque<(i64, f64)>,
}

/// The latest value of one point as the API gives it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latest {
    pub device: String,
    pub point: String,
    /// A number, a boolean, a text or null.
    pub value: Json,
    pub unit: Option<String>,
    /// `good`, `stale`, `bad`, or `unknown` where the payload says nothing of it.
    pub quality: String,
    /// Why the quality is not good.
    pub reason: Option<String>,
    /// When the value was measured, as the payload says.
    pub time: Option<String>,
    /// When the gateway got it, in milliseconds since 1970.
    pub received: i64,
}

/// A point with its history.
#[derive(Serialize)]
pub struct Snapshot {
    pub latest: Latest,
    /// The last numbers: milliseconds since 1970 and value, oldest first.
    pub history: Vec<(i64, f64)>,
}

/// What happened to values since the last look.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    pub values: Vec<Latest>,
    /// Device and point of values that were deleted.
    pub gone: Vec<(String, String)>,
    /// There were more than are told here; whoever shows values has to load them anew.
    pub incomplete: bool,
}

impl Values {
    /// Takes in a message; one that is not of a point is ignored. An empty payload deletes the point, as it does a
    /// retained message (MQTT 5.0 §3.3.1.3).
    pub fn message(&self, topic: &str, payload: &[u8], received: UnixMillis) {
        let Some((device, point)) = device_and_point(topic) else { return };
        let mut inner = self.inner.lock();
        if payload.is_empty() {
            if let Some((topic, _)) = inner.points.remove_entry(topic) {
                inner.note_change(topic);
            }
            return;
        }
        let known = inner.points.get_key_value(topic).map(|(topic, _)| topic.clone());
        if known.is_none() && (inner.points.len() >= MAX_POINTS || topic.len() > MAX_TOPIC_BYTES) {
            inner.left_off += 1;
            return;
        }
        let topic = known.unwrap_or_else(|| topic.into());
        let latest = read(device, point, payload, received);
        let number = if latest.quality == "good" || latest.quality == "unknown" { number(&latest.value) } else { None };
        let entry = inner
            .points
            .entry(topic.clone())
            .or_insert_with(|| Point { latest: latest.clone(), history: VecDeque::new() });
        entry.latest = latest;
        if let Some(number) = number {
            if entry.history.len() == HISTORY {
                entry.history.pop_front();
            }
            entry.history.push_back((received.0, number));
        }
        inner.note_change(topic);
    }

    /// All points in the order of their topics, and how many values were left off.
    pub fn snapshot(&self) -> (Vec<Snapshot>, u64) {
        let inner = self.inner.lock();
        let all = inner
            .points
            .values()
            .map(|point| Snapshot { latest: point.latest.clone(), history: point.history.iter().copied().collect() });
        (all.collect(), inner.left_off)
    }

    /// Lets go of changes that nobody wants to know.
    pub fn forget_changes(&self) {
        let mut inner = self.inner.lock();
        inner.changed.clear();
        inner.overrun = false;
    }

    /// What changed since the last call; several changes of one point count as one.
    pub fn take_changes(&self) -> Changes {
        let mut inner = self.inner.lock();
        let mut changes = Changes { incomplete: std::mem::take(&mut inner.overrun), ..Changes::default() };
        for topic in std::mem::take(&mut inner.changed) {
            match (inner.points.get(&topic), device_and_point(&topic)) {
                (Some(point), _) => changes.values.push(point.latest.clone()),
                (None, Some((device, point))) => changes.gone.push((device.to_owned(), point.to_owned())),
                (None, None) => {}
            }
        }
        changes
    }
}

impl Inner {
    fn note_change(&mut self, topic: Arc<str>) {
        if self.changed.len() < MAX_CHANGES || self.changed.contains(&topic) {
            self.changed.insert(topic);
        } else {
            self.overrun = true;
        }
    }
}

/// The two levels of `devices/{device}/{point}`; `devices/{device}/state` is no point but the device's health.
fn device_and_point(topic: &str) -> Option<(&str, &str)> {
    let (device, point) = topic.strip_prefix("devices/")?.split_once('/')?;
    (!device.is_empty() && !point.is_empty() && !point.contains('/') && point != "state").then_some((device, point))
}

/// A reading as it is published by `field::mapping`; other publishers may leave out what they do not know.
#[derive(Deserialize)]
struct Payload {
    value: Json,
    unit: Option<String>,
    quality: Option<String>,
    reason: Option<String>,
    time: Option<String>,
}

fn read(device: &str, point: &str, payload: &[u8], received: UnixMillis) -> Latest {
    let (device, point) = (device.to_owned(), point.to_owned());
    let bare = |value: Json| Latest {
        device: device.clone(),
        point: point.clone(),
        value,
        unit: None,
        quality: "unknown".to_owned(),
        reason: None,
        time: None,
        received: received.0,
    };
    if payload.len() > MAX_PAYLOAD_BYTES {
        return bare(Json::String(format!("({} bytes)", payload.len())));
    }
    if let Ok(reading) = serde_json::from_slice::<Payload>(payload) {
        return Latest {
            value: shown(reading.value),
            unit: reading.unit.map(cut),
            quality: reading.quality.map_or_else(|| "unknown".to_owned(), cut),
            reason: reading.reason.map(cut),
            time: reading.time.map(cut),
            ..bare(Json::Null)
        };
    }
    match (serde_json::from_slice::<Json>(payload), std::str::from_utf8(payload)) {
        (Ok(value), _) => bare(shown(value)),
        (Err(_), Ok(text)) => bare(Json::String(cut(text.to_owned()))),
        (Err(_), Err(_)) => bare(Json::String(format!("({} bytes of binary data)", payload.len()))),
    }
}

/// A value that fits on a line: lists and objects as JSON text.
fn shown(value: Json) -> Json {
    match value {
        Json::Array(_) | Json::Object(_) => Json::String(cut(value.to_string())),
        Json::String(text) => Json::String(cut(text)),
        scalar => scalar,
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT_BYTES {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        text.push('…');
    }
    text
}

fn number(value: &Json) -> Option<f64> {
    value.as_f64().or_else(|| value.as_bool().map(f64::from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: UnixMillis = UnixMillis(1_793_500_000_000);

    fn latest(topic: &str, payload: &[u8]) -> Option<Latest> {
        let values = Values::default();
        values.message(topic, payload, NOW);
        values.snapshot().0.pop().map(|snapshot| snapshot.latest)
    }

    #[test]
    fn payloads_of_any_shape_become_values() {
        let check = |payload: &str, value: Json, unit: Option<&str>, quality: &str| {
            let latest = latest("devices/meter/power", payload.as_bytes()).unwrap();
            assert_eq!((&latest.value, latest.unit.as_deref(), latest.quality.as_str()), (&value, unit, quality));
        };
        check(r#"{"value":2.5,"unit":"kW","quality":"good","time":"x","extra":[]}"#, json!(2.5), Some("kW"), "good");
        check(r#"{"value":null,"quality":"bad","reason":"timeout"}"#, json!(null), None, "bad");
        check(r#"{"value":true}"#, json!(true), None, "unknown");
        check("21.5", json!(21.5), None, "unknown");
        check("on", json!("on"), None, "unknown");
        check("[1, 2]", json!("[1,2]"), None, "unknown");
        check(r#"{"volts":3}"#, json!(r#"{"volts":3}"#), None, "unknown");
        let long = "x".repeat(1000);
        check(&long, json!(format!("{}…", "x".repeat(MAX_TEXT_BYTES))), None, "unknown");
        check(&"9".repeat(MAX_PAYLOAD_BYTES + 1), json!("(16385 bytes)"), None, "unknown");
        assert_eq!(latest("devices/a/b", &[0xff, 0]).unwrap().value, json!("(2 bytes of binary data)"));
    }

    #[test]
    fn only_points_of_devices_are_kept() {
        let check = |topic: &str, kept: bool| assert_eq!(latest(topic, b"1").is_some(), kept, "{topic}");
        check("devices/meter/power", true);
        check("devices/meter/state", false);
        check("devices/meter/power/set", false);
        check("devices/meter", false);
        check("devices//power", false);
        check("other/meter/power", false);
    }

    #[test]
    fn changes_are_taken_once_and_a_deleted_point_is_gone() {
        let values = Values::default();
        values.message("devices/m/a", b"1", NOW);
        values.message("devices/m/a", b"2", NOW);
        values.message("devices/m/b", b"3", NOW);
        let changes = values.take_changes();
        assert_eq!(changes.values.iter().map(|latest| &latest.value).collect::<Vec<_>>(), [&json!(2), &json!(3)]);
        assert_eq!(values.take_changes(), Changes::default());
        values.message("devices/m/a", b"", NOW);
        assert_eq!(values.take_changes().gone, [("m".to_owned(), "a".to_owned())]);
        assert_eq!(values.snapshot().0.len(), 1);
    }

    #[test]
    fn history_and_number_of_points_have_a_limit() {
        let values = Values::default();
        for number in 0..HISTORY + 10 {
            values.message("devices/m/a", number.to_string().as_bytes(), NOW);
        }
        values.message("devices/m/a", br#"{"value":7,"quality":"stale"}"#, NOW);
        let history = &values.snapshot().0[0].history;
        assert_eq!((history.len(), history[0].1, history[HISTORY - 1].1), (HISTORY, 10.0, 69.0));
        for number in 0..MAX_POINTS + 10 {
            values.message(&format!("devices/m/p{number}"), b"1", NOW);
        }
        values.message(&format!("devices/m/{}", "p".repeat(MAX_TOPIC_BYTES)), b"1", NOW);
        let (points, left_off) = values.snapshot();
        assert_eq!((points.len(), left_off), (MAX_POINTS, 12));
    }
}
