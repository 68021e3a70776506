//! The lines an adapter program and the gateway send each other; `plugins/adapters/README.md` is the document.
//!
//! One JSON object per line, in UTF-8, told apart by `type`. Members and types that are not known are ignored, so that
//! either side can be newer than the other; what a line must hold is checked here, once.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use thiserror::Error;

use crate::observe::Health;
use crate::reading::{Quality, Value};

/// The protocol's version. It grows when a line that old programs send would be misunderstood.
pub(super) const VERSION: u64 = 1;

/// The longest text in a value, reason or log line, in bytes.
const MAX_TEXT_BYTES: usize = 4096;

/// A line from the program.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum FromProgram {
    Hello {
        version: u64,
    },
    Reading(ProgramReading),
    Health {
        device: Option<Arc<str>>,
        health: Health,
        reason: Option<String>,
    },
    Log {
        level: Level,
        message: String,
    },
    Result {
        id: u64,
        result: Result<Option<Value>, String>,
    },
    /// A type that this version does not know.
    Other,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct ProgramReading {
    pub(super) device: Option<Arc<str>>,
    pub(super) point: Arc<str>,
    pub(super) value: Option<Value>,
    pub(super) unit: Option<Arc<str>>,
    pub(super) quality: Quality,
    /// Milliseconds since 1970, where the program knows better than the gateway when it was taken.
    pub(super) time: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

/// A line to the program.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ToProgram<'a> {
    Hello { version: u64, name: &'a str, devices: Vec<&'a str>, settings: &'a Json },
    Command { id: u64, device: &'a str, point: &'a str, value: Json },
}

/// Why a line was ignored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum LineError {
    #[error("it is no JSON object with the members it needs: {0}")]
    Json(String),
    #[error("`{0}` is missing")]
    Missing(&'static str),
    #[error("`{member}` must be {expected}")]
    Wrong { member: &'static str, expected: &'static str },
}

/// Every member that any line may have; what a type needs is checked by [`FromProgram::parse`].
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    r#type: Option<String>,
    version: Option<u64>,
    device: Option<String>,
    point: Option<String>,
    value: Option<Json>,
    unit: Option<String>,
    quality: Option<String>,
    reason: Option<String>,
    time: Option<i64>,
    state: Option<String>,
    level: Option<String>,
    message: Option<String>,
    id: Option<u64>,
    ok: Option<bool>,
    error: Option<String>,
}

impl FromProgram {
    pub(super) fn parse(line: &[u8]) -> Result<Self, LineError> {
        // A list would otherwise be taken for the members in their order.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Err(LineError::Json("it does not begin with `{`".into()));
        }
        let line: Line = serde_json::from_slice(line).map_err(|error| LineError::Json(error.to_string()))?;
        let device = line.device.map(Arc::from);
        match line.r#type.as_deref().ok_or(LineError::Missing("type"))? {
            "hello" => Ok(Self::Hello { version: line.version.ok_or(LineError::Missing("version"))? }),
            "reading" => {
                let quality = quality(line.quality.as_deref(), line.reason)?;
                let value = value(line.value)?;
                if value.is_none() && !matches!(quality, Quality::Bad(_)) {
                    return Err(LineError::Missing("value"));
                }
                let point = line.point.ok_or(LineError::Missing("point"))?.into();
                let unit = line.unit.map(Arc::from);
                Ok(Self::Reading(ProgramReading { device, point, value, unit, quality, time: line.time }))
            }
            "health" => {
                let health = health(line.state.as_deref().ok_or(LineError::Missing("state"))?)?;
                Ok(Self::Health { device, health, reason: line.reason.map(cut) })
            }
            "log" => {
                let level = level(line.level.as_deref().unwrap_or("info"))?;
                Ok(Self::Log { level, message: cut(line.message.ok_or(LineError::Missing("message"))?) })
            }
            "result" => {
                let id = line.id.ok_or(LineError::Missing("id"))?;
                let result = match line.ok.ok_or(LineError::Missing("ok"))? {
                    true => Ok(value(line.value)?),
                    false => Err(cut(line.error.unwrap_or_else(|| "the program gave no reason".into()))),
                };
                Ok(Self::Result { id, result })
            }
            _ => Ok(Self::Other),
        }
    }
}

impl ToProgram<'_> {
    /// The line with its end.
    pub(super) fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("plain structs of text, numbers and JSON always serialize");
        line.push(b'\n');
        line
    }
}

fn value(json: Option<Json>) -> Result<Option<Value>, LineError> {
    const WRONG: LineError =
        LineError::Wrong { member: "value", expected: "a number, a boolean or a text of at most 4096 bytes" };
    match json {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Bool(value)) => Ok(Some(Value::Bool(value))),
        Some(Json::Number(number)) => match number.as_i64() {
            Some(integer) => Ok(Some(Value::Integer(integer))),
            None => number.as_f64().filter(|number| number.is_finite()).map(Value::Float).map(Some).ok_or(WRONG),
        },
        Some(Json::String(text)) if text.len() <= MAX_TEXT_BYTES => Ok(Some(Value::Text(text.into()))),
        Some(_) => Err(WRONG),
    }
}

fn quality(quality: Option<&str>, reason: Option<String>) -> Result<Quality, LineError> {
    match quality {
        None | Some("good") => Ok(Quality::Good),
        Some("stale") => Ok(Quality::Stale),
        Some("bad") => Ok(Quality::Bad(cut(reason.unwrap_or_else(|| "no reason given".into())).into())),
        Some(_) => Err(LineError::Wrong { member: "quality", expected: "good, stale or bad" }),
    }
}

fn health(state: &str) -> Result<Health, LineError> {
    match state {
        "good" => Ok(Health::Good),
        "degraded" => Ok(Health::Degraded),
        "down" => Ok(Health::Down),
        _ => Err(LineError::Wrong { member: "state", expected: "good, degraded or down" }),
    }
}

fn level(level: &str) -> Result<Level, LineError> {
    match level {
        "debug" => Ok(Level::Debug),
        "info" => Ok(Level::Info),
        "warn" => Ok(Level::Warn),
        "error" => Ok(Level::Error),
        _ => Err(LineError::Wrong { member: "level", expected: "debug, info, warn or error" }),
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<FromProgram, LineError> {
        FromProgram::parse(line.as_bytes())
    }

    #[test]
    fn lines_are_understood_and_unknown_members_ignored() {
        assert_eq!(parse(r#"{"type":"hello","version":1,"x":[]}"#), Ok(FromProgram::Hello { version: 1 }));
        assert_eq!(parse(r#"{"type":"future","at":1}"#), Ok(FromProgram::Other));
        let reading = ProgramReading {
            device: Some("d".into()),
            point: "p".into(),
            value: Some(Value::Float(1.5)),
            unit: Some("V".into()),
            quality: Quality::Good,
            time: Some(5),
        };
        let line = r#"{"type":"reading","device":"d","point":"p","value":1.5,"unit":"V","time":5}"#;
        assert_eq!(parse(line), Ok(FromProgram::Reading(reading)));
        let bad = r#"{"type":"reading","point":"p","quality":"bad","reason":"broken wire"}"#;
        let Ok(FromProgram::Reading(reading)) = parse(bad) else { panic!("a reading") };
        assert_eq!((reading.device, reading.value, reading.quality), (None, None, Quality::Bad("broken wire".into())));
        let log = FromProgram::Log { level: Level::Info, message: "m".into() };
        assert_eq!(parse(r#"{"type":"log","message":"m"}"#), Ok(log));
        let health = FromProgram::Health { device: None, health: Health::Down, reason: Some("r".into()) };
        assert_eq!(parse(r#"{"type":"health","state":"down","reason":"r"}"#), Ok(health));
        let result = FromProgram::Result { id: 7, result: Ok(Some(Value::Bool(true))) };
        assert_eq!(parse(r#"{"type":"result","id":7,"ok":true,"value":true}"#), Ok(result));
        let result = FromProgram::Result { id: 7, result: Err("no".into()) };
        assert_eq!(parse(r#"{"type":"result","id":7,"ok":false,"error":"no"}"#), Ok(result));
    }

    #[test]
    fn lines_that_cannot_be_used_say_why() {
        let check = |line: &str, expected: &str| {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        };
        check("hello", "no JSON object");
        check("[]", "no JSON object");
        check("{}", "`type` is missing");
        check(r#"{"type":"hello"}"#, "`version` is missing");
        check(r#"{"type":"reading","value":1}"#, "`point` is missing");
        check(r#"{"type":"reading","point":"p"}"#, "`value` is missing");
        check(r#"{"type":"reading","point":"p","value":[1]}"#, "`value` must be");
        check(r#"{"type":"reading","point":"p","value":1,"quality":"so-so"}"#, "`quality` must be");
        check(r#"{"type":"health","state":"fine"}"#, "`state` must be");
        check(r#"{"type":"result","id":1}"#, "`ok` is missing");
        check(r#"{"type":"result","id":-1,"ok":true}"#, "no JSON object");
        let long = format!(r#"{{"type":"reading","point":"p","value":"{}"}}"#, "x".repeat(MAX_TEXT_BYTES + 1));
        check(&long, "`value` must be");
    }

    #[test]
    fn lines_to_the_program_end_and_hold_no_line_break() {
        let value = Json::from("a\nb");
        let command = ToProgram::Command { id: 3, device: "d", point: "p", value };
        assert_eq!(
            command.to_line(),
            b"{\"type\":\"command\",\"id\":3,\"device\":\"d\",\"point\":\"p\",\"value\":\"a\\nb\"}\n"
        );
    }

    proptest::proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(0u8.., 0..60), text in ".{0,40}") {
            let _ = FromProgram::parse(&line);
            let _ = FromProgram::parse(format!(r#"{{"type":"reading","point":"p","value":{text}}}"#).as_bytes());
        }
    }
}
