//! Readings to messages and messages to commands: the one place that knows the topics and payloads of the field.
//!
//! | what | topic | payload | |
//! | --- | --- | --- | --- |
//! | reading | `devices/{device}/{point}` | [`PayloadForm`] | QoS 1, retained |
//! | device health | `devices/{device}/state` | `{"state":"down","reason":"…","since":"…"}` | QoS 1, retained |
//! | command | `devices/{device}/{point}/set` | a bare value, or `{"value":…}` | |
//! | its answer | `devices/{device}/{point}/set/result` | `{"ok":true,"value":…}` or `{"ok":false,"error":"…"}` | QoS 1 |
//!
//! An answer also goes to the command's response topic, with its correlation data (MQTT 5.0 §4.10). Pure: no hub here.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use thiserror::Error;

use crate::clock::{Clock, UnixMillis};
use crate::message::{Message, Properties, QoS};
use crate::observe::Health;
use crate::reading::{Quality, Reading, ReadingTime, Value};
use crate::topic::{TopicFilter, TopicName};

/// The first level of every topic in here.
const ROOT: &str = "devices";
/// The last level of a device's health topic; no point may have this name.
const STATE: &str = "state";
/// The longest device or point name, in bytes: keeps topics short enough for every broker upstream.
pub const MAX_NAME_BYTES: usize = 128;
/// The largest payload of a command: far above any value a field device takes.
pub const MAX_COMMAND_BYTES: usize = 64 * 1024;

/// Makes messages of readings, health and answers.
#[derive(Clone, Debug)]
pub struct Mapping {
    clock: Clock,
    form: PayloadForm,
}

/// How a reading is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PayloadForm {
    /// `{"value":230.1,"unit":"V","quality":"good","time":"…","clock_set":true,"boot":"…"}`
    #[default]
    Json,
    /// The bare value, as in `230.1`. Only good readings are published: a bare value cannot say that it is stale.
    Value,
}

impl Mapping {
    pub fn new(clock: Clock, form: PayloadForm) -> Self {
        Self { clock, form }
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The time of a reading that was taken now.
    pub fn time(&self) -> ReadingTime {
        ReadingTime { at: self.clock.now(), clock_set: self.clock.is_set() }
    }

    /// The retained message of a reading; `None` where the payload form has no way to say it, or its names make no
    /// topic name (which [`check_device_name`] and [`check_point_name`] prevent).
    pub fn reading(&self, reading: &Reading) -> Option<Message> {
        let payload = match self.form {
            PayloadForm::Json => self.reading_json(reading),
            PayloadForm::Value if reading.quality == Quality::Good => reading.value.as_ref()?.to_string().into_bytes(),
            PayloadForm::Value => return None,
        };
        let topic = TopicName::new(&format!("{ROOT}/{}/{}", reading.device, reading.point)).ok()?;
        Some(self.message(topic, payload).retained())
    }

    /// The retained message of a device's health; `None` as in [`Mapping::reading`].
    pub fn state(&self, device: &str, state: &DeviceState) -> Option<Message> {
        #[derive(Serialize)]
        struct Json<'a> {
            state: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            reason: Option<&'a str>,
            since: String,
        }
        let json = Json { state: state.health.name(), reason: state.reason.as_deref(), since: state.since.to_string() };
        let topic = TopicName::new(&format!("{ROOT}/{device}/{STATE}")).ok()?;
        Some(self.message(topic, to_json(&json)).retained())
    }

    /// The messages that answer a command: one on its result topic, one on its response topic if it named one.
    /// `result` holds the value that was written, as it reads back, or what went wrong.
    pub fn answer(&self, origin: &Origin, result: Result<&Value, &dyn fmt::Display>) -> Vec<Message> {
        #[derive(Serialize)]
        struct Json<'a> {
            ok: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            value: Option<serde_json::Value>,
            #[serde(skip_serializing_if = "Option::is_none")]
            error: Option<&'a str>,
        }
        let error = result.err().map(ToString::to_string);
        let json = Json { ok: error.is_none(), value: result.ok().map(to_json_value), error: error.as_deref() };
        let payload = Bytes::from(to_json(&json));
        let properties = origin
            .correlation_data
            .as_ref()
            .map(|data| Box::new(Properties { correlation_data: Some(data.clone()), ..Properties::default() }));
        let result_topic = TopicName::new(&format!("{}/result", origin.topic)).ok();
        let topics = result_topic.into_iter().chain(origin.response_topic.clone());
        topics.map(|topic| Message { properties: properties.clone(), ..self.message(topic, payload.clone()) }).collect()
    }

    fn message(&self, topic: TopicName, payload: impl Into<Bytes>) -> Message {
        Message::new(topic, payload, QoS::AtLeastOnce, self.clock.now())
    }

    fn reading_json(&self, reading: &Reading) -> Vec<u8> {
        #[derive(Serialize)]
        struct Json<'a> {
            value: Option<serde_json::Value>,
            #[serde(skip_serializing_if = "Option::is_none")]
            unit: Option<&'a str>,
            quality: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            reason: Option<&'a str>,
            time: String,
            clock_set: bool,
            boot: &'a str,
        }
        let (quality, reason) = match &reading.quality {
            Quality::Good => ("good", None),
            Quality::Stale => ("stale", None),
            Quality::Bad(reason) => ("bad", Some(&**reason)),
        };
        to_json(&Json {
            value: reading.value.as_ref().map(to_json_value),
            unit: reading.unit.as_deref(),
            quality,
            reason,
            time: reading.time.at.to_string(),
            clock_set: reading.time.clock_set,
            boot: self.clock.boot_id(),
        })
    }
}

/// The health of a device as its state topic tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    pub health: Health,
    /// What is wrong and what to do about it; `None` when all is well.
    pub reason: Option<String>,
    pub since: UnixMillis,
}

/// A wish to set a point of a device to a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    pub device: Arc<str>,
    pub point: Arc<str>,
    pub value: Value,
    /// Where the answer goes.
    pub origin: Origin,
}

/// What a command's message says about its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The command's own topic, `devices/{device}/{point}/set`.
    pub topic: TopicName,
    pub response_topic: Option<TopicName>,
    pub correlation_data: Option<Bytes>,
}

impl Command {
    /// Parses a message that arrived on the filter of [`command_filter`].
    ///
    /// # Errors
    /// [`CommandError`], with the origin to answer to.
    pub fn parse(message: &Message) -> Result<Self, (Origin, CommandError)> {
        let origin = Origin::of(message);
        let parsed = parse_topic(message.topic.as_str())
            .ok_or(CommandError::Topic)
            .and_then(|names| Ok((names, parse_payload(&message.payload)?)));
        match parsed {
            Ok(((device, point), value)) => Ok(Self { device: device.into(), point: point.into(), value, origin }),
            Err(error) => Err((origin, error)),
        }
    }
}

impl Origin {
    fn of(message: &Message) -> Self {
        let properties = message.properties.as_deref();
        Self {
            topic: message.topic.clone(),
            response_topic: properties.and_then(|p| p.response_topic.clone()).filter(may_answer_on),
            correlation_data: properties.and_then(|p| p.correlation_data.clone()),
        }
    }
}

/// Why a message is no command.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CommandError {
    #[error("a command's topic is devices/DEVICE/POINT/set")]
    Topic,
    #[error("a command's payload may have at most {MAX_COMMAND_BYTES} bytes")]
    TooLong,
    #[error("a command's payload must be UTF-8 text")]
    NotText,
    #[error("a command's payload is empty; send a value such as 21.5, true or {{\"value\":21.5}}")]
    Empty,
    #[error("a command as a JSON object has the one member `value`, as in {{\"value\":21.5}}")]
    Object,
    #[error("a command's value is a number, a boolean or a text, not null, a list or an object")]
    Kind,
}

/// What an adapter subscribes to for the commands of `device`; `None` where the name makes no topic.
pub fn command_filter(device: &str) -> Option<TopicFilter> {
    TopicFilter::new(&format!("{ROOT}/{device}/+/set")).ok()
}

/// Tells whether `name` can be a device's name: one topic level of at most [`MAX_NAME_BYTES`].
///
/// # Errors
/// [`NameError`] names the rule it breaks.
pub fn check_device_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        Err(NameError::Empty)
    } else if name.len() > MAX_NAME_BYTES {
        Err(NameError::TooLong)
    } else if name.contains(['/', '+', '#']) || name.contains(char::is_control) {
        Err(NameError::NotOneLevel)
    } else {
        Ok(())
    }
}

/// Tells whether `name` can be a point's name: as a device's, and not `state`, which is the device's health.
///
/// # Errors
/// [`NameError`] names the rule it breaks.
pub fn check_point_name(name: &str) -> Result<(), NameError> {
    check_device_name(name)?;
    if name == STATE { Err(NameError::Reserved) } else { Ok(()) }
}

/// Why a name cannot be one level of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    #[error("a name must not be empty")]
    Empty,
    #[error("a name may have at most {MAX_NAME_BYTES} bytes")]
    TooLong,
    #[error("a name is one level of a topic and must not contain `/`, `+`, `#` or control characters")]
    NotOneLevel,
    #[error("`state` is taken by the device's health; name the point otherwise")]
    Reserved,
}

fn parse_topic(topic: &str) -> Option<(&str, &str)> {
    let rest = topic.strip_prefix(ROOT)?.strip_prefix('/')?;
    let (device, rest) = rest.split_once('/')?;
    let (point, last) = rest.split_once('/')?;
    (last == "set").then_some((device, point))
}

/// Text that is no JSON is taken as it stands, so that `mosquitto_pub -m ON` works.
fn parse_payload(payload: &[u8]) -> Result<Value, CommandError> {
    if payload.len() > MAX_COMMAND_BYTES {
        return Err(CommandError::TooLong);
    }
    let text = std::str::from_utf8(payload).map_err(|_| CommandError::NotText)?.trim();
    if text.is_empty() {
        return Err(CommandError::Empty);
    }
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(mut object)) => match (object.remove("value"), object.is_empty()) {
            (Some(value), true) => from_json_value(value),
            _ => Err(CommandError::Object),
        },
        Ok(value) => from_json_value(value),
        Err(_) if text.starts_with(['{', '[', '"']) => Err(CommandError::Object),
        Err(_) => Ok(Value::Text(text.into())),
    }
}

fn from_json_value(value: serde_json::Value) -> Result<Value, CommandError> {
    match value {
        serde_json::Value::Bool(value) => Ok(Value::Bool(value)),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Ok(Value::Integer(integer)),
            (None, Some(float)) => Ok(Value::Float(float)),
            (None, None) => Err(CommandError::Kind),
        },
        serde_json::Value::String(text) => Ok(Value::Text(text.into())),
        _ => Err(CommandError::Kind),
    }
}

/// JSON has no infinities and no not-a-number; they become null.
fn to_json_value(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::Integer(value) => (*value).into(),
        Value::Float(value) => (*value).into(),
        Value::Text(value) => (&**value).into(),
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain structs of text, numbers and booleans always serialize")
}

/// The gateway publishes answers with its own rights, so a response topic must not reach where it could be taken for
/// a reading or a command of a device, or for the gateway's own status.
fn may_answer_on(topic: &TopicName) -> bool {
    let below_root = topic.as_str().strip_prefix(ROOT).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    !topic.is_reserved() && !below_root
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(form: PayloadForm) -> Mapping {
        Mapping::new(Clock::start("boot-1"), form)
    }

    fn reading(value: Option<Value>, quality: Quality) -> Reading {
        Reading {
            device: "meter".into(),
            point: "voltage".into(),
            value,
            unit: Some("V".into()),
            quality,
            time: ReadingTime { at: UnixMillis(1_793_491_200_000), clock_set: true },
        }
    }

    fn command(topic: &str, payload: &[u8]) -> Result<Command, CommandError> {
        let message = Message::new(TopicName::new(topic).unwrap(), payload.to_vec(), QoS::AtMostOnce, UnixMillis(0));
        Command::parse(&message).map_err(|(_, error)| error)
    }

    #[test]
    fn readings_become_retained_json_with_time_and_quality() {
        let check = |value, quality, expected: &str| {
            let message = mapping(PayloadForm::Json).reading(&reading(value, quality)).unwrap();
            assert_eq!(message.topic.as_str(), "devices/meter/voltage");
            assert_eq!((message.qos, message.retain), (QoS::AtLeastOnce, true));
            let tail = r#","time":"2026-11-01T00:00:00.000Z","clock_set":true,"boot":"boot-1"}"#;
            assert_eq!(std::str::from_utf8(&message.payload).unwrap(), format!("{expected}{tail}"));
        };
        check(Some(Value::Float(230.1)), Quality::Good, r#"{"value":230.1,"unit":"V","quality":"good""#);
        check(Some(Value::Integer(-3)), Quality::Stale, r#"{"value":-3,"unit":"V","quality":"stale""#);
        check(
            None,
            Quality::Bad("no answer".into()),
            r#"{"value":null,"unit":"V","quality":"bad","reason":"no answer""#,
        );
        check(Some(Value::Float(f64::NAN)), Quality::Good, r#"{"value":null,"unit":"V","quality":"good""#);
        check(Some(Value::Text("a\"b".into())), Quality::Good, r#"{"value":"a\"b","unit":"V","quality":"good""#);
    }

    #[test]
    fn bare_values_are_published_only_while_they_are_good() {
        let mapping = mapping(PayloadForm::Value);
        let message = mapping.reading(&reading(Some(Value::Float(230.1)), Quality::Good)).unwrap();
        assert_eq!(message.payload, "230.1");
        assert_eq!(mapping.reading(&reading(Some(Value::Float(230.1)), Quality::Stale)), None);
        assert_eq!(mapping.reading(&reading(None, Quality::Bad("x".into()))), None);
    }

    #[test]
    fn device_health_is_retained_json() {
        let state = DeviceState { health: Health::Down, reason: Some("no answer".into()), since: UnixMillis(0) };
        let message = mapping(PayloadForm::Value).state("meter", &state).unwrap();
        assert_eq!(message.topic.as_str(), "devices/meter/state");
        assert!(message.retain);
        let expected = r#"{"state":"down","reason":"no answer","since":"1970-01-01T00:00:00.000Z"}"#;
        assert_eq!(message.payload, expected);
    }

    #[test]
    fn commands_are_bare_values_or_objects_with_one() {
        let check = |payload: &str, expected: Result<Value, CommandError>| {
            let parsed = command("devices/meter/relay/set", payload.as_bytes());
            assert_eq!(parsed.map(|command| command.value), expected, "{payload}");
        };
        check("21.5", Ok(Value::Float(21.5)));
        check(" 21 \n", Ok(Value::Integer(21)));
        check("-0", Ok(Value::Float(-0.0)));
        check("18446744073709551615", Ok(Value::Float(18_446_744_073_709_551_615.0)));
        check("true", Ok(Value::Bool(true)));
        check("ON", Ok(Value::Text("ON".into())));
        check("\"ON\"", Ok(Value::Text("ON".into())));
        check(r#"{"value":5}"#, Ok(Value::Integer(5)));
        check(r#"{"value":5,"ok":true}"#, Err(CommandError::Object));
        check(r#"{"valu":5}"#, Err(CommandError::Object));
        check(r#"{"value":5"#, Err(CommandError::Object));
        check("null", Err(CommandError::Kind));
        check("[1]", Err(CommandError::Kind));
        check("", Err(CommandError::Empty));
        check(&"1".repeat(MAX_COMMAND_BYTES + 1), Err(CommandError::TooLong));
        assert_eq!(command("devices/meter/relay/set", b"\xff").unwrap_err(), CommandError::NotText);
    }

    #[test]
    fn a_command_names_its_device_and_point() {
        let parsed = command("devices/meter/relay/set", b"1").unwrap();
        assert_eq!((&*parsed.device, &*parsed.point), ("meter", "relay"));
        for topic in ["devices/meter/relay", "devices/meter/relay/set/result", "devicesx/a/b/set", "devices/a/set"] {
            assert_eq!(command(topic, b"1").unwrap_err(), CommandError::Topic, "{topic}");
        }
        assert!(command_filter("meter").unwrap().matches("devices/meter/relay/set"));
    }

    #[test]
    fn answers_go_to_the_result_topic_and_the_response_topic() {
        let check = |response_topic: &str, expected: &[&str]| {
            let mut message =
                Message::new(TopicName::new("devices/m/p/set").unwrap(), "1", QoS::AtMostOnce, UnixMillis(0));
            message.properties = Some(Box::new(Properties {
                response_topic: TopicName::new(response_topic).ok(),
                correlation_data: Some(Bytes::from_static(b"\x01\x02")),
                ..Properties::default()
            }));
            let command = Command::parse(&message).unwrap();
            let answers = mapping(PayloadForm::Json).answer(&command.origin, Ok(&Value::Integer(1)));
            let topics: Vec<&str> = answers.iter().map(|answer| answer.topic.as_str()).collect();
            assert_eq!(topics, expected);
            for answer in &answers {
                assert_eq!(answer.payload, r#"{"ok":true,"value":1}"#);
                assert!(!answer.retain);
                let data = answer.properties.as_ref().unwrap().correlation_data.as_deref();
                assert_eq!(data, Some(&b"\x01\x02"[..]));
            }
        };
        check("reply/here", &["devices/m/p/set/result", "reply/here"]);
        // An answer must not be taken for a command or for the gateway's own status.
        check("devices/m/other/set", &["devices/m/p/set/result"]);
        check("$SYS/broker", &["devices/m/p/set/result"]);
    }

    #[test]
    fn a_failed_command_is_answered_with_its_error() {
        let command = command("devices/m/p/set", b"1").unwrap();
        let error = CommandError::Kind;
        let answers = mapping(PayloadForm::Json).answer(&command.origin, Err(&error));
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].payload, format!(r#"{{"ok":false,"error":"{error}"}}"#));
        assert_eq!(answers[0].properties, None);
    }

    #[test]
    fn names_that_make_no_topic_level_are_refused() {
        assert_eq!(check_device_name("Zähler 1"), Ok(()));
        assert_eq!(check_device_name(""), Err(NameError::Empty));
        assert_eq!(check_device_name("a/b"), Err(NameError::NotOneLevel));
        assert_eq!(check_device_name("a\nb"), Err(NameError::NotOneLevel));
        assert_eq!(check_device_name(&"x".repeat(129)), Err(NameError::TooLong));
        assert_eq!(check_point_name("state"), Err(NameError::Reserved));
    }
}
