//! One line of a subscriber's record: what it says of the message's origin. Pure.
//!
//! A line is a JSON object as `mosquitto_sub -F '%j'` (or `%J`) and `fieldgate store export` write it, or a payload alone,
//! or one behind its topic as in `mosquitto_sub -v`.

use serde_json::Value;

/// What one line of a record shows.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    pub topic: Option<String>,
    pub qos: Option<u64>,
    /// Where the message comes from: in user properties, in its payload, or one gateway after the other in both.
    pub origins: Vec<Origin>,
}

/// A message's place in a queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// `GATEWAY/UPSTREAM`; empty where it was not said.
    pub queue: String,
    /// Empty for the one that every upstream has.
    pub stream: String,
    pub boot: String,
    pub number: u64,
    /// When the gateway accepted the message; such texts sort as the times do.
    pub time: String,
}

/// The member of payloads, and how user properties begin.
const NAME: &str = "fieldgate";

impl Line {
    /// `None` for what is none of the forms.
    pub fn read(line: &[u8]) -> Option<Self> {
        let line = str::from_utf8(line).ok()?.trim();
        if let Ok(object @ Value::Object(_)) = serde_json::from_str(line) {
            return Some(Self::of_object(&object));
        }
        // A topic name may hold spaces, but hardly one before a brace.
        let (topic, payload) = line.split_once(" {")?;
        let payload = serde_json::from_str::<Value>(&line[line.len() - payload.len() - 1..]).ok()?;
        let origins = Origin::of_payload(&payload).into_iter().collect();
        Some(Self { topic: Some(topic.to_owned()), qos: None, origins })
    }

    fn of_object(object: &Value) -> Self {
        let Some(topic) = object["topic"].as_str().filter(|_| object[NAME].is_null()) else {
            return Self { origins: Origin::of_payload(object).into_iter().collect(), ..Self::default() };
        };
        // `%j` has the payload as a text, `%J` as what it is.
        let text = object["payload"].as_str().filter(|text| text.contains(NAME));
        let parsed = text.and_then(|text| serde_json::from_str::<Value>(text).ok());
        let of_payload = Origin::of_payload(parsed.as_ref().unwrap_or(&object["payload"]));
        let origins = Origin::of_properties(object).into_iter().chain(of_payload).collect();
        Self { topic: Some(topic.to_owned()), qos: object["qos"].as_u64(), origins }
    }
}

impl Origin {
    fn of_payload(payload: &Value) -> Option<Self> {
        let said = &payload[NAME];
        Self::new(said["sequence"].as_u64(), |name| said[name].as_str().map(Into::into))
    }

    fn of_properties(message: &Value) -> Option<Self> {
        let named = &message["properties"]["user-properties"];
        let pairs = message["user_properties"].as_array();
        let property = |name: &str| {
            let name = format!("{NAME}-{name}");
            let pair = || pairs?.iter().rev().find(|pair| pair[0] == *name).map(|pair| &pair[1]);
            named.get(&name).or_else(pair)?.as_str().map(String::from)
        };
        Self::new(property("sequence").and_then(|number| number.parse().ok()), property)
    }

    fn new(number: Option<u64>, text: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let or_none = |name| text(name).unwrap_or_default();
        Some(Self {
            number: number?,
            boot: text("boot")?,
            queue: or_none("queue"),
            stream: or_none("stream"),
            time: or_none("time"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_however_the_subscriber_writes_it() {
        const MEMBER: &str = r#"{"queue":"g/u","boot":"b","stream":"high","sequence":7,"time":"t"}"#;
        let origin =
            || Origin { queue: "g/u".into(), stream: "high".into(), boot: "b".into(), number: 7, time: "t".into() };
        let check = |line: &str, topic: Option<&str>, qos: Option<u64>, origins: usize| {
            let line = line.replace("MEMBER", MEMBER);
            let expected = Line {
                topic: topic.map(Into::into),
                qos,
                origins: std::iter::repeat_with(origin).take(origins).collect(),
            };
            assert_eq!(Line::read(line.as_bytes()), Some(expected), "{line}");
        };
        let properties = r#""properties":{"user-properties":{"fieldgate-queue":"g/u","fieldgate-boot":"b","fieldgate-stream":"high","fieldgate-sequence":"7","fieldgate-time":"t"}}"#;
        check(&format!(r#"{{"topic":"a","qos":1,"payload":"1",{properties}}}"#), Some("a"), Some(1), 1);
        let escaped = format!(r#"{{"value":1,"fieldgate":{MEMBER}}}"#).replace('"', "\\\"");
        check(&format!(r#"{{"topic":"a","qos":2,"payload":"{escaped}"}}"#), Some("a"), Some(2), 1);
        check(r#"{"topic":"a","qos":0,"payload":{"fieldgate":MEMBER}}"#, Some("a"), Some(0), 1);
        check(&format!(r#"{{"topic":"a","payload":{{"fieldgate":MEMBER}},{properties}}}"#), Some("a"), None, 2);
        check(r#"{"value":1,"topic":"its own","fieldgate":MEMBER}"#, None, None, 1);
        check(r#"a b/c {"value":1,"fieldgate":MEMBER}"#, Some("a b/c"), None, 1);
        check(r#"{"topic":"a","qos":1,"payload":"fieldgate"}"#, Some("a"), Some(1), 0);
        check(r#"{"value":1}"#, None, None, 0);
        let exported = r#"{"topic":"a","qos":1,"user_properties":[["fieldgate-sequence","7"],["fieldgate-boot","b"],["fieldgate-queue","g/u"],["fieldgate-stream","high"],["fieldgate-time","t"]]}"#;
        check(exported, Some("a"), Some(1), 1);
        for line in ["t 1", "[1]", "{\"topic\":", "t {1"] {
            assert_eq!(Line::read(line.as_bytes()), None, "{line}");
        }
        assert_eq!(Line::read(b"\xff"), None);
    }
}
