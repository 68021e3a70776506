//! What a message says of where it comes from, so that a consumer can prove that nothing is missing. Pure.
//!
//! Under one boot id each number of a queue is one more than the last. Where the boot id changes, the number is at most
//! one more: what the gateway had not delivered when it ended comes under the number it had, and an empty queue starts
//! over. Where rules differ in priority or set a `live_share`, the messages of an upstream come in up to six streams,
//! each numbered by itself.
//!
//! It stands in user properties (MQTT 5.0 §3.3.2.3.7), or where a consumer or a 3.1.1 upstream has no eyes for those, in
//! the payload: as the member [`MEMBER`] of a JSON object. The publisher's bytes stay as they are, numbers and spaces
//! included; what is no object becomes the member `value` of one, or `base64` if it is no text either.

use std::io::Write;

use data_encoding::BASE64;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::clock::UnixMillis;
use crate::hub::stream_name;
use crate::message::Properties;
use crate::store;

/// The user property with the queue that the number counts in, as `GATEWAY/UPSTREAM`.
const QUEUE: &str = "fieldgate-queue";
/// When this gateway accepted the message, as in `2026-05-17T09:30:00.123Z`.
const TIME: &str = "fieldgate-time";
/// Its number in its stream of the queue; none at QoS 0, which no queue keeps.
const SEQUENCE: &str = "fieldgate-sequence";
/// The stream that the number counts in: `live`, `high`, `high-live`, `low` or `low-live`. It is absent where the message
/// belongs to the stream that every upstream has, and at QoS 0.
const STREAM: &str = "fieldgate-stream";
/// The start of this gateway under which the message was sent.
const BOOT: &str = "fieldgate-boot";

/// The member of a JSON object that holds the same, under the same names without `fieldgate-`.
const MEMBER: &str = "fieldgate";

/// Where one message comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin<'a> {
    pub queue: &'a str,
    pub time: UnixMillis,
    pub sequence: Option<u64>,
    pub boot: &'a str,
}

impl Origin<'_> {
    /// Puts it into user properties. What an earlier gateway said of itself is replaced.
    pub fn add_to(&self, properties: &mut Properties) {
        properties.user_properties.retain(|(found, _)| !matches!(&**found, SEQUENCE | STREAM));
        properties.set_user(QUEUE, self.queue);
        properties.set_user(TIME, &self.time.to_string());
        if let Some(sequence) = self.sequence {
            properties.set_user(SEQUENCE, &store::number(sequence).to_string());
            if let Some(stream) = stream_name(sequence) {
                properties.set_user(STREAM, stream);
            }
        }
        properties.set_user(BOOT, self.boot);
    }

    /// Writes `payload` to `out` with it inside, and tells whether it is. An empty payload stays empty: it clears a
    /// retained message. What an earlier gateway said of itself is replaced.
    pub fn write_into(&self, payload: &[u8], out: &mut Vec<u8>) -> bool {
        out.clear();
        if payload.is_empty() {
            return false;
        }
        let text = str::from_utf8(payload).ok();
        let object = text.filter(|text| text.trim_ascii_start().starts_with('{')).and_then(Object::read);
        match (object, text) {
            (Some(Object { earlier: Some(earlier), .. }), Some(text)) => {
                // It borrows from `text`, so the difference of the addresses is its place there.
                let start = earlier.get().as_ptr() as usize - text.as_ptr() as usize;
                out.extend_from_slice(&payload[..start]);
                self.write(out);
                out.extend_from_slice(&payload[start + earlier.get().len()..]);
            }
            (Some(Object { is_empty, .. }), Some(text)) => {
                // What was read as an object ends with its brace.
                let brace = text.trim_ascii_end().len() - 1;
                out.extend_from_slice(&payload[..brace]);
                if !is_empty {
                    out.push(b',');
                }
                self.write_member(out);
                out.extend_from_slice(&payload[brace..]);
            }
            (_, Some(text)) => {
                out.extend_from_slice(b"{\"value\":");
                match serde_json::from_str::<IgnoredAny>(text) {
                    Ok(_) => out.extend_from_slice(payload),
                    Err(_) => write_json(text, out),
                }
                out.push(b',');
                self.write_member(out);
                out.push(b'}');
            }
            (_, None) => {
                out.extend_from_slice(b"{\"base64\":\"");
                let start = out.len();
                out.resize(start + BASE64.encode_len(payload.len()), 0);
                BASE64.encode_mut(payload, &mut out[start..]);
                out.extend_from_slice(b"\",");
                self.write_member(out);
                out.push(b'}');
            }
        }
        true
    }

    fn write_member(&self, out: &mut Vec<u8>) {
        write_json(MEMBER, out);
        out.push(b':');
        self.write(out);
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"queue\":");
        write_json(self.queue, out);
        out.extend_from_slice(b",\"boot\":");
        write_json(self.boot, out);
        if let Some(sequence) = self.sequence {
            if let Some(stream) = stream_name(sequence) {
                out.extend_from_slice(b",\"stream\":");
                write_json(stream, out);
            }
            let _ = write!(out, ",\"sequence\":{}", store::number(sequence));
        }
        let _ = write!(out, ",\"time\":\"{}\"}}", self.time);
    }
}

fn write_json(text: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, text).expect("a text is written to memory as JSON without an error");
}

/// What has to be known of a JSON object to put a member into it. Reading it allocates nothing but for escaped names.
struct Object<'a> {
    is_empty: bool,
    /// The last value under [`MEMBER`], which readers of JSON take where there are several.
    earlier: Option<&'a RawValue>,
}

impl<'a> Object<'a> {
    fn read(text: &'a str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Object<'de>;

            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                to.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut members: M) -> Result<Object<'de>, M::Error> {
                let mut object = Object { is_empty: true, earlier: None };
                while let Some(IsOurs(ours)) = members.next_key()? {
                    object.is_empty = false;
                    if ours {
                        object.earlier = Some(members.next_value()?);
                    } else {
                        let IgnoredAny = members.next_value()?;
                    }
                }
                Ok(object)
            }
        }

        from.deserialize_map(Reader)
    }
}

/// Whether a member has our name.
struct IsOurs(bool);

impl<'de> Deserialize<'de> for IsOurs {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl Visitor<'_> for Reader {
            type Value = IsOurs;

            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                to.write_str("a name")
            }

            fn visit_str<E>(self, name: &str) -> Result<IsOurs, E> {
                Ok(IsOurs(name == MEMBER))
            }
        }

        from.deserialize_str(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(sequence: Option<u64>) -> Origin<'static> {
        Origin { queue: "plant-7/cloud", time: UnixMillis(0), sequence, boot: "b7" }
    }

    #[test]
    fn a_message_says_where_it_stands_and_nothing_of_what_an_earlier_gateway_said() {
        let mut properties = Properties::default();
        let mut check = |sequence, expected: &[(&str, &str)]| {
            origin(sequence).add_to(&mut properties);
            let found = properties.user_properties.iter().map(|(name, value)| (&**name, &**value));
            assert_eq!(found.collect::<Vec<_>>(), expected);
        };
        let (time, boot) = (("fieldgate-time", "1970-01-01T00:00:00.000Z"), ("fieldgate-boot", "b7"));
        let queue = ("fieldgate-queue", "plant-7/cloud");
        let high = store::first_sequence(2) + 5;
        check(Some(high), &[queue, time, ("fieldgate-sequence", "5"), ("fieldgate-stream", "high"), boot]);
        check(Some(6), &[queue, time, ("fieldgate-sequence", "6"), boot]);
        check(None, &[queue, time, boot]);
    }

    #[test]
    fn a_payload_takes_it_as_a_member_and_keeps_every_byte_of_its_own() {
        const OURS: &str = r#"{"queue":"plant-7/cloud","boot":"b7","sequence":6,"time":"1970-01-01T00:00:00.000Z"}"#;
        let check = |payload: &[u8], expected: &str| {
            let mut out = b"left over".to_vec();
            assert!(origin(Some(6)).write_into(payload, &mut out));
            let out = String::from_utf8(out).unwrap();
            assert_eq!(out, expected.replace("OURS", OURS));
            let read: serde_json::Value = serde_json::from_str(&out).expect("it is JSON");
            assert_eq!(read["fieldgate"]["sequence"], 6, "{out}");
        };
        check(b"{}", r#"{"fieldgate":OURS}"#);
        check(b" { } \n", " { \"fieldgate\":OURS} \n");
        check(br#"{"a": 1.50e+00 , "b":[{}]}"#, r#"{"a": 1.50e+00 , "b":[{}],"fieldgate":OURS}"#);
        check(br#"{"a":123456789012345678901234567890}"#, r#"{"a":123456789012345678901234567890,"fieldgate":OURS}"#);
        check(br#"{"a":"}\""}"#, r#"{"a":"}\"","fieldgate":OURS}"#);
        // Of an earlier gateway, however it wrote our name; not what is deeper.
        check(br#"{"fieldgate" : {"x":1} ,"a":2}"#, r#"{"fieldgate" : OURS ,"a":2}"#);
        check(br#"{"\u0066ieldgate":1}"#, r#"{"\u0066ieldgate":OURS}"#);
        check(br#"{"a":{"fieldgate":1}}"#, r#"{"a":{"fieldgate":1},"fieldgate":OURS}"#);
        check(b"229.90", r#"{"value":229.90,"fieldgate":OURS}"#);
        check(b"[1,2]", r#"{"value":[1,2],"fieldgate":OURS}"#);
        check(b"null", r#"{"value":null,"fieldgate":OURS}"#);
        check("21,5 °C".as_bytes(), r#"{"value":"21,5 °C","fieldgate":OURS}"#);
        // What only looks like an object is text.
        check(b"{off}", r#"{"value":"{off}","fieldgate":OURS}"#);
        check(b"{} {}", r#"{"value":"{} {}","fieldgate":OURS}"#);
        check(b"{\"a\":1", r#"{"value":"{\"a\":1","fieldgate":OURS}"#);
        check(b"\x00\xff", r#"{"base64":"AP8=","fieldgate":OURS}"#);
        let deep = "{\"a\":".repeat(100_000) + "1" + &"}".repeat(100_000);
        let mut out = Vec::new();
        assert!(origin(None).write_into(deep.as_bytes(), &mut out));
    }

    #[test]
    fn a_stream_is_named_and_what_is_not_kept_has_no_number() {
        let check = |sequence, expected: &str| {
            let mut out = Vec::new();
            assert!(origin(sequence).write_into(b"{}", &mut out));
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        };
        let high = store::first_sequence(2) + 5;
        check(
            Some(high),
            r#"{"fieldgate":{"queue":"plant-7/cloud","boot":"b7","stream":"high","sequence":5,"time":"1970-01-01T00:00:00.000Z"}}"#,
        );
        check(None, r#"{"fieldgate":{"queue":"plant-7/cloud","boot":"b7","time":"1970-01-01T00:00:00.000Z"}}"#);
    }

    #[test]
    fn an_empty_payload_clears_a_retained_message_and_stays_empty() {
        let mut out = b"left over".to_vec();
        assert!(!origin(Some(6)).write_into(b"", &mut out));
        assert_eq!(out, b"");
    }
}
