//! Reading values out of a text frame: one number, the named groups of a regular expression, or a JSON object.
//!
//! A frame is UTF-8, or else ISO 8859-1, so that a `°` from an old device does not spoil its line. A frame that does
//! not fit is an error for its owner to count; nothing in it is guessed.

use std::sync::Arc;

use regex::{Regex, RegexBuilder};
use serde_json::Value as Json;
use thiserror::Error;

use crate::reading::Value;

/// How many points one frame may hold; a larger frame loses the rest.
pub const MAX_POINTS_PER_FRAME: usize = 256;

/// How deep the objects of a JSON frame may be nested.
const MAX_DEPTH: usize = 8;

/// The longest point name in bytes; it becomes a level of a topic.
const MAX_NAME_BYTES: usize = 128;

/// The longest text value in bytes.
const MAX_TEXT_BYTES: usize = 4096;

/// The longest regular expression in bytes, and what it may take when compiled: far more than a line needs.
const MAX_PATTERN_BYTES: usize = 1024;
const MAX_COMPILED_BYTES: usize = 512 * 1024;

/// How a frame is read.
#[derive(Clone, Debug, PartialEq)]
pub enum ParseRule {
    /// The whole frame is one number.
    Number(PointRule),
    /// Each named group is a point. `points` refines groups by name; a group without a rule is read as
    /// [`PointType::Auto`].
    Regex { pattern: String, points: Vec<PointRule> },
    /// The frame is a JSON object, read as by [`flatten`]. `points` scales values and gives units, by name.
    Json { points: Vec<PointRule> },
}

/// What becomes of the text of one point.
#[derive(Clone, Debug, PartialEq)]
pub struct PointRule {
    pub point: Arc<str>,
    pub point_type: PointType,
    /// Numbers become `number × scale + offset`.
    pub scale: f64,
    pub offset: f64,
    pub unit: Option<Arc<str>>,
}

/// What a point's text is read as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PointType {
    /// A number if it looks like one, otherwise text.
    #[default]
    Auto,
    /// A decimal number.
    Number,
    /// A whole number; scaled, it becomes a decimal number.
    Integer,
    /// `1`, `true`, `on`, `yes` or `0`, `false`, `off`, `no`, in any case.
    Bool,
    Text,
}

/// One value of a frame, before it is known which device sent it and when.
#[derive(Clone, Debug, PartialEq)]
pub struct PointValue {
    pub point: Arc<str>,
    pub value: Value,
    pub unit: Option<Arc<str>>,
}

/// What is wrong with a rule.
#[derive(Debug, Error)]
pub enum RuleError {
    #[error("the regular expression is longer than {MAX_PATTERN_BYTES} bytes")]
    PatternTooLong,
    #[error("the regular expression does not work: {0}")]
    Pattern(regex::Error),
    #[error("the regular expression has no named group; write the part that is a value as `(?<weight>…)`")]
    NoNamedGroup,
    #[error("the regular expression has no group named `{point}`; its groups are {groups}")]
    NoSuchGroup { point: Arc<str>, groups: String },
    #[error("scale and offset must be finite and scale must not be zero, at point `{0}`")]
    Scale(Arc<str>),
}

/// Why a frame gave no values. The frame itself is with the caller.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseError {
    #[error("the regular expression does not match")]
    NoMatch,
    #[error("`{text}` is not {expected}, at point `{point}`")]
    Value { point: Arc<str>, text: String, expected: &'static str },
    #[error("this is not a JSON object: {0}")]
    Json(String),
    #[error("there is no value in it")]
    Empty,
}

/// A rule, checked and compiled.
#[derive(Debug)]
pub struct Parser(Kind);

#[derive(Debug)]
enum Kind {
    Number(PointRule),
    Regex { regex: Regex, groups: Vec<(usize, PointRule)> },
    Json { points: Vec<PointRule> },
}

/// A JSON object as points.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Flattened {
    pub values: Vec<PointValue>,
    /// Values that were left out because they were too deep, too long or too many.
    pub dropped: usize,
}

impl PointRule {
    /// A rule that takes a point's text as it comes.
    pub fn auto(point: &str) -> Self {
        Self { point: point.into(), point_type: PointType::Auto, scale: 1.0, offset: 0.0, unit: None }
    }

    fn check(&self) -> Result<(), RuleError> {
        let fits = self.scale.is_finite() && self.offset.is_finite() && self.scale != 0.0;
        if fits { Ok(()) } else { Err(RuleError::Scale(self.point.clone())) }
    }

    fn is_scaled(&self) -> bool {
        self.scale != 1.0 || self.offset != 0.0
    }

    fn scaled(&self, number: f64) -> Value {
        Value::Float(number * self.scale + self.offset)
    }

    fn read(&self, text: &str) -> Result<PointValue, ParseError> {
        let text = text.trim();
        let number = parse_number(text).filter(|number| match self.scaled(*number) {
            Value::Float(scaled) => scaled.is_finite(),
            _ => true,
        });
        let integer = || parse_integer(text).filter(|_| !self.is_scaled());
        let value = match self.point_type {
            PointType::Auto => integer()
                .map(Value::Integer)
                .or_else(|| number.map(|number| self.scaled(number)))
                .or_else(|| text_value(text)),
            PointType::Number => number.map(|number| self.scaled(number)),
            PointType::Integer if self.is_scaled() => parse_integer(text).and(number).map(|number| self.scaled(number)),
            PointType::Integer => integer().map(Value::Integer),
            PointType::Bool => parse_bool(text).map(Value::Bool),
            PointType::Text => text_value(text),
        };
        let value = value.ok_or_else(|| ParseError::Value {
            point: self.point.clone(),
            text: text.chars().take(40).collect(),
            expected: self.point_type.expected(),
        })?;
        Ok(PointValue { point: self.point.clone(), value, unit: self.unit.clone() })
    }
}

impl PointType {
    fn expected(self) -> &'static str {
        match self {
            Self::Auto | Self::Text => "text of up to 4096 bytes",
            Self::Number => "a number",
            Self::Integer => "a whole number",
            Self::Bool => "a truth value such as 1, on or true",
        }
    }
}

impl Parser {
    /// Checks and compiles a rule.
    ///
    /// # Errors
    /// [`RuleError`] for a regular expression that is too long, malformed or without named groups, for a point that
    /// is not a group of it, and for a scale that cannot be computed with.
    pub fn new(rule: ParseRule) -> Result<Self, RuleError> {
        Ok(Self(match rule {
            ParseRule::Number(point) => {
                point.check()?;
                Kind::Number(point)
            }
            ParseRule::Json { points } => {
                points.iter().try_for_each(PointRule::check)?;
                Kind::Json { points }
            }
            ParseRule::Regex { pattern, points } => {
                points.iter().try_for_each(PointRule::check)?;
                let regex = compile(&pattern)?;
                let groups = name_groups(&regex, &points)?;
                Kind::Regex { regex, groups }
            }
        }))
    }

    /// Reads the values of one frame, in the order they stand in the rule or the JSON object.
    ///
    /// # Errors
    /// [`ParseError`] says what of the frame does not fit the rule; no value of such a frame is used.
    pub fn parse(&self, frame: &[u8]) -> Result<Vec<PointValue>, ParseError> {
        let text = decode_text(frame);
        let values = match &self.0 {
            Kind::Number(rule) => {
                vec![PointRule { point_type: number_type(rule.point_type), ..rule.clone() }.read(&text)?]
            }
            Kind::Regex { regex, groups } => {
                let captures = regex.captures(&text).ok_or(ParseError::NoMatch)?;
                let captured = groups.iter().filter_map(|(index, rule)| Some((captures.get(*index)?, rule)));
                captured.map(|(group, rule)| rule.read(group.as_str())).collect::<Result<_, _>>()?
            }
            Kind::Json { points } => {
                let json: Json = serde_json::from_str(&text).map_err(|error| ParseError::Json(error.to_string()))?;
                if !json.is_object() {
                    return Err(ParseError::Json("it is another JSON value".into()));
                }
                let mut values = flatten(&json).values;
                values.iter_mut().for_each(|value| refine(value, points));
                values
            }
        };
        if values.is_empty() { Err(ParseError::Empty) } else { Ok(values) }
    }
}

/// Makes points of a JSON object: a nested value's name is its keys joined with `.`, an array's element has its index
/// as key, `null` is no value. A name is passed through [`point_name`].
pub fn flatten(json: &Json) -> Flattened {
    let mut flattened = Flattened::default();
    flatten_into(json, "", 0, &mut flattened);
    flattened
}

/// A key as a point name: the characters that mean something in a topic (`/`, `+`, `#`) and control characters become
/// `_`, because a device must not choose which topic its values are published on beyond its own points.
pub fn point_name(key: &str) -> String {
    let spoils = |c: char| matches!(c, '/' | '+' | '#') || c.is_control();
    if key.is_empty() {
        return "_".into();
    }
    key.chars().map(|c| if spoils(c) { '_' } else { c }).collect()
}

fn flatten_into(json: &Json, name: &str, depth: usize, into: &mut Flattened) {
    let child = |key: &str| if name.is_empty() { point_name(key) } else { format!("{name}.{}", point_name(key)) };
    let value = match json {
        Json::Null => return,
        Json::Object(_) | Json::Array(_) if depth == MAX_DEPTH => {
            into.dropped += 1;
            return;
        }
        Json::Object(object) => {
            return object.iter().for_each(|(key, json)| flatten_into(json, &child(key), depth + 1, into));
        }
        Json::Array(array) => {
            let elements = array.iter().enumerate();
            return elements.for_each(|(index, json)| flatten_into(json, &child(&index.to_string()), depth + 1, into));
        }
        Json::Bool(value) => Some(Value::Bool(*value)),
        Json::Number(number) => match number.as_i64() {
            Some(integer) => Some(Value::Integer(integer)),
            None => number.as_f64().filter(|number| number.is_finite()).map(Value::Float),
        },
        Json::String(text) => text_value(text),
    };
    match value {
        Some(value) if into.values.len() < MAX_POINTS_PER_FRAME && name.len() <= MAX_NAME_BYTES && depth > 0 => {
            into.values.push(PointValue { point: name.into(), value, unit: None });
        }
        _ => into.dropped += 1,
    }
}

/// Applies what the rules say about a JSON value: numbers are scaled, units added.
fn refine(value: &mut PointValue, rules: &[PointRule]) {
    let Some(rule) = rules.iter().find(|rule| rule.point == value.point) else { return };
    value.unit.clone_from(&rule.unit);
    match value.value {
        Value::Integer(number) if rule.is_scaled() => value.value = rule.scaled(number as f64),
        Value::Float(number) => value.value = rule.scaled(number),
        _ => {}
    }
}

fn compile(pattern: &str) -> Result<Regex, RuleError> {
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(RuleError::PatternTooLong);
    }
    let mut builder = RegexBuilder::new(pattern);
    builder.size_limit(MAX_COMPILED_BYTES).dfa_size_limit(MAX_COMPILED_BYTES).nest_limit(32);
    builder.build().map_err(RuleError::Pattern)
}

fn name_groups(regex: &Regex, points: &[PointRule]) -> Result<Vec<(usize, PointRule)>, RuleError> {
    let names: Vec<_> = regex.capture_names().enumerate().filter_map(|(index, name)| Some((index, name?))).collect();
    if names.is_empty() {
        return Err(RuleError::NoNamedGroup);
    }
    if let Some(rule) = points.iter().find(|rule| names.iter().all(|(_, name)| *name != &*rule.point)) {
        let groups = names.iter().map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        return Err(RuleError::NoSuchGroup { point: rule.point.clone(), groups });
    }
    let rule =
        |name: &str| points.iter().find(|rule| *rule.point == *name).cloned().unwrap_or_else(|| PointRule::auto(name));
    Ok(names.into_iter().map(|(index, name)| (index, rule(name))).collect())
}

fn decode_text(frame: &[u8]) -> std::borrow::Cow<'_, str> {
    match str::from_utf8(frame) {
        Ok(text) => text.into(),
        Err(_) => frame.iter().map(|byte| char::from(*byte)).collect::<String>().into(),
    }
}

/// A rule for a whole frame wants a number unless it names another type.
fn number_type(named: PointType) -> PointType {
    if named == PointType::Auto { PointType::Number } else { named }
}

fn text_value(text: &str) -> Option<Value> {
    (text.len() <= MAX_TEXT_BYTES).then(|| Value::Text(text.into()))
}

/// A decimal number as devices print it: a sign may be set apart from the digits by spaces, as in `-  12.50`.
fn parse_number(text: &str) -> Option<f64> {
    let (negative, digits) = split_sign(text);
    // `inf` and `nan` are numbers to Rust, but no measurements.
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let number: f64 = digits.parse().ok().filter(|number: &f64| number.is_finite())?;
    Some(if negative { -number } else { number })
}

fn parse_integer(text: &str) -> Option<i64> {
    let (negative, digits) = split_sign(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let magnitude: i128 = digits.parse().ok()?;
    i64::try_from(if negative { -magnitude } else { magnitude }).ok()
}

fn split_sign(text: &str) -> (bool, &str) {
    match text.strip_prefix('-') {
        Some(digits) => (true, digits.trim_start()),
        None => (false, text.strip_prefix('+').unwrap_or(text).trim_start()),
    }
}

fn parse_bool(text: &str) -> Option<bool> {
    let is = |words: [&str; 4]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is(["1", "true", "on", "yes"]) {
        Some(true)
    } else if is(["0", "false", "off", "no"]) {
        Some(false)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(point: &str, point_type: PointType) -> PointRule {
        PointRule { point_type, ..PointRule::auto(point) }
    }

    fn regex(pattern: &str, points: Vec<PointRule>) -> Result<Parser, RuleError> {
        Parser::new(ParseRule::Regex { pattern: pattern.into(), points })
    }

    fn values(parser: &Parser, frame: &[u8]) -> Vec<(String, Value)> {
        let values = parser.parse(frame).unwrap();
        values.into_iter().map(|value| (value.point.to_string(), value.value)).collect()
    }

    #[test]
    fn texts_are_read_as_the_points_type_says() {
        use PointType::{Auto, Bool, Integer, Number, Text};
        let check = |point_type, text: &str, expected: Option<Value>| {
            let read = rule("p", point_type).read(text).ok().map(|value| value.value);
            assert_eq!(read, expected, "{point_type:?} {text:?}");
        };
        check(Auto, " 12 ", Some(Value::Integer(12)));
        check(Auto, "+00012.34", Some(Value::Float(12.34)));
        check(Auto, "ERR", Some(Value::Text("ERR".into())));
        check(Auto, "nan", Some(Value::Text("nan".into())));
        check(Number, "-  12.5", Some(Value::Float(-12.5)));
        check(Number, "1e3", Some(Value::Float(1000.0)));
        check(Number, ".5", Some(Value::Float(0.5)));
        check(Number, "7", Some(Value::Float(7.0)));
        check(Number, "", None);
        check(Number, "inf", None);
        check(Number, "1e999", None);
        check(Number, "--5", None);
        check(Number, "1,5", None);
        check(Number, "12kg", None);
        check(Integer, "-9223372036854775808", Some(Value::Integer(i64::MIN)));
        check(Integer, "9223372036854775808", None);
        check(Integer, &"9".repeat(400), None);
        check(Integer, "1.0", None);
        check(Bool, "ON", Some(Value::Bool(true)));
        check(Bool, "no", Some(Value::Bool(false)));
        check(Bool, "2", None);
        check(Text, " a b ", Some(Value::Text("a b".into())));
        check(Text, &"x".repeat(MAX_TEXT_BYTES + 1), None);
    }

    #[test]
    fn scaled_numbers_become_decimal() {
        let point = PointRule { scale: 0.5, offset: -1.0, ..rule("p", PointType::Integer) };
        assert_eq!(point.read("7").unwrap().value, Value::Float(2.5));
        assert_eq!(PointRule { point_type: PointType::Auto, ..point }.read("7").unwrap().value, Value::Float(2.5));
        let huge = PointRule { scale: 1e300, ..rule("p", PointType::Number) };
        assert!(huge.read("1e300").is_err());
    }

    #[test]
    fn a_whole_frame_is_one_number_in_utf_8_or_latin_1() {
        let parser = Parser::new(ParseRule::Number(rule("t", PointType::Auto))).unwrap();
        assert_eq!(values(&parser, b"  21 "), [("t".to_owned(), Value::Float(21.0))]);
        assert!(matches!(parser.parse(b"21\xB0C"), Err(ParseError::Value { text, .. }) if text == "21°C"));
    }

    #[test]
    fn named_groups_are_points() {
        let pattern = r"^(?<stability>ST|US),(?:GS|NT),(?<weight>[+-] *[\d.]+)(?<unit>kg)?$";
        let weight = PointRule { unit: Some("kg".into()), ..rule("weight", PointType::Number) };
        let parser = regex(pattern, vec![weight]).unwrap();
        let parsed = parser.parse(b"ST,GS,+00012.34kg").unwrap();
        assert_eq!(parsed.len(), 3);
        assert_eq!(parsed[1].value, Value::Float(12.34));
        assert_eq!(parsed[1].unit.as_deref(), Some("kg"));
        assert_eq!(
            values(&parser, b"US,NT,-1"),
            [("stability".to_owned(), Value::Text("US".into())), ("weight".to_owned(), Value::Float(-1.0)),]
        );
        assert_eq!(parser.parse(b"OL"), Err(ParseError::NoMatch));
        assert!(matches!(parser.parse(b"ST,GS,+1.1.1kg"), Err(ParseError::Value { .. })));
    }

    #[test]
    fn a_rule_that_cannot_work_is_refused_and_says_why() {
        assert!(matches!(regex("(", vec![]), Err(RuleError::Pattern(_))));
        assert!(matches!(regex(r"(?<a>\w{1000}){1000}", vec![]), Err(RuleError::Pattern(_))));
        assert!(matches!(regex(&"(".repeat(1000), vec![]), Err(RuleError::Pattern(_))));
        assert!(matches!(regex(&"a".repeat(1025), vec![]), Err(RuleError::PatternTooLong)));
        assert!(matches!(regex("(a)", vec![]), Err(RuleError::NoNamedGroup)));
        let missing = regex("(?<a>.)(?<b>.)", vec![PointRule::auto("c")]).unwrap_err();
        assert!(missing.to_string().ends_with("groups are `a`, `b`"), "{missing}");
        let zero = PointRule { scale: 0.0, ..PointRule::auto("a") };
        assert!(matches!(Parser::new(ParseRule::Number(zero)), Err(RuleError::Scale(_))));
    }

    #[test]
    fn json_lines_are_flattened_scaled_and_given_units() {
        let point = PointRule { scale: 0.1, unit: Some("V".into()), ..PointRule::auto("battery.level") };
        let parser = Parser::new(ParseRule::Json { points: vec![point] }).unwrap();
        let frame = br#"{"b":true,"battery":{"level":33,"none":null},"list":[1.5,"x"],"a/set":"y","":1}"#;
        let parsed = parser.parse(frame).unwrap();
        let text: Vec<_> = parsed.iter().map(|value| format!("{}={}", value.point, value.value)).collect();
        let mut sorted = text.clone();
        sorted.sort();
        assert_eq!(sorted, ["_=1", "a_set=y", "b=true", "battery.level=3.3000000000000003", "list.0=1.5", "list.1=x"]);
        assert_eq!(parser.parse(b"{}"), Err(ParseError::Empty));
        assert!(matches!(parser.parse(b"[1]"), Err(ParseError::Json(_))));
        assert!(matches!(parser.parse(b"{\"a\":"), Err(ParseError::Json(_))));
        assert!(matches!(parser.parse("[".repeat(100_000).as_bytes()), Err(ParseError::Json(_))));
    }

    #[test]
    fn flattening_drops_and_counts_what_is_too_much() {
        let many: Json = (0..MAX_POINTS_PER_FRAME + 3).map(|key| (key.to_string(), Json::from(key))).collect();
        assert_eq!(flatten(&many).dropped, 3);
        let deep = (0..MAX_DEPTH + 1).fold(Json::from(1), |inner, _| serde_json::json!({ "a": inner }));
        assert_eq!(flatten(&deep), Flattened { values: vec![], dropped: 1 });
        let deep = (0..MAX_DEPTH).fold(Json::from(1), |inner, _| serde_json::json!({ "a": inner }));
        assert_eq!(&*flatten(&deep).values[0].point, "a.a.a.a.a.a.a.a");
        assert_eq!(flatten(&serde_json::json!({ "k".repeat(129): 1 })).dropped, 1);
        assert_eq!(flatten(&Json::from(5)).dropped, 1);
        assert_eq!(flatten(&serde_json::json!({ "big": u64::MAX })).values[0].value, Value::Float(u64::MAX as f64));
    }

    proptest::proptest! {
        #[test]
        fn no_frame_panics(frame in proptest::collection::vec(0u8.., 0..80), number in "[+-]? *[0-9.eE+-]{0,12}") {
            let parsers = [
                Parser::new(ParseRule::Number(PointRule::auto("p"))).unwrap(),
                regex("(?<a>[^,]*),?(?<b>.*)", vec![rule("a", PointType::Number)]).unwrap(),
                Parser::new(ParseRule::Json { points: vec![] }).unwrap(),
            ];
            for parser in parsers {
                let _ = parser.parse(&frame);
                let _ = parser.parse(number.as_bytes());
            }
        }
    }
}
