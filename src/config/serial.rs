//! The section `serial`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::claims::Names;
use super::modbus::serial_line;
use super::report::Report;
use super::scalar::{Name, Origin, Scalar, Size, words};
use super::source::Located;
use super::table::Table;
use crate::field::codec;
use crate::field::serial::{CommandRule, Decode, Request, Settings};
use crate::proto::serial::{
    ByteOrder, Framing, MAX_FRAME_BYTES, ParseRule, Parser, PointRule, PointType, Prefix, Template,
};
use crate::supervise::describe;

words!(ByteOrder, "an order", "big" => ByteOrder::Big, "little" => ByteOrder::Little);
words!(PointType, "a type", "auto" => PointType::Auto, "number" => PointType::Number, "integer" => PointType::Integer,
    "bool" => PointType::Bool, "text" => PointType::Text);

/// Bytes written as text: every character up to U+00FF is the byte with its number.
#[derive(Clone, Debug, PartialEq)]
struct Bytes(Vec<u8>);

impl Scalar for Bytes {
    const SHAPE: &'static str = "text of bytes; in double quotes `\\r`, `\\n` and `\\x02` work";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        let byte = |character| u8::try_from(u32::from(character)).map_err(|_| format!("{character:?} is not one byte"));
        text.chars().map(byte).collect::<Result<_, _>>().map(Self)
    }
    fn show(&self) -> String {
        format!("\"{}\"", self.0.escape_ascii())
    }
}

impl Scalar for Template {
    const SHAPE: &'static str = "a command, as in `\"W{value:.2}\\r\\n\"`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        String::new()
    }
}

pub(super) fn ports(table: &mut Table<'_>, names: &mut Names) -> Vec<Settings> {
    table.list("serial", "Serial devices that are not Modbus; each is one device on one port.", |table| {
        let name = table.value::<Name>("name", "Names the device; its topics are `devices/NAME/POINT`.").required_at();
        names.devices.extend(name.iter().map(Located::text));
        names.adapters.extend(name.iter().map(Located::text));
        let owner = format!("serial device `{}`", name.as_ref().map_or("?", |name| &name.value.0));
        let line = serial_line(table, &owner);
        let framing_place = table.place_of("framing");
        let framing = table.table("framing", "How the device marks where its frames begin and end.", framing);
        if let (Some(place), Some(Err(error))) = (framing_place, framing.as_ref().map(Framing::check)) {
            table.report(Report::error(place, "this framing cannot work").label(error.to_string()));
        }
        let decode = decode(table);
        let commands = table.list("commands", "What is sent to set a point; commands come on `…/POINT/set`.", command);
        let request = table.optional("request", "For devices that speak only when asked.", request);
        let silent_after = table
            .value("silent_after", "A device that sends nothing for this long is down; absent for never.")
            .range(Duration::from_secs(1)..=Duration::from_secs(7 * 86_400))
            .optional();
        Some(Settings {
            name: name?.value.0.into(),
            line: line?,
            framing: framing?,
            decode: decode?,
            commands,
            request,
            silent_after,
        })
    })
}

fn framing(table: &mut Table<'_>) -> Option<Framing> {
    const KINDS: [&str; 5] = ["line", "fixed", "enclosed", "prefixed", "idle"];
    let line = table.optional("line", "Text lines. The default.", |table| {
        let delimiters = table.values::<Bytes>("delimiters", "What ends a line; a line feed if absent.");
        let delimiters: Vec<_> = delimiters.into_iter().map(|delimiter| delimiter.value.0).collect();
        let delimiters = if delimiters.is_empty() { vec![b"\n".to_vec()] } else { delimiters };
        Some(Framing::Line { delimiters, max_length: max_length(table) })
    });
    let fixed = table.optional("fixed", "Frames of one length.", |table| {
        let start = table.value("start", "What every frame begins with.").or(Bytes(Vec::new())).0;
        let length = table.value("length", "Bytes of a frame.").range(1..=MAX_FRAME_BYTES).required();
        Some(Framing::Fixed { start, idle: idle(table, "idle"), length: length? })
    });
    let enclosed = table.optional("enclosed", "Frames between a start and an end byte, as STX and ETX.", |table| {
        let start = table.value::<u8>("start", "The start byte.").or(2);
        let end = table.value::<u8>("end", "The end byte.").or(3);
        let trailer = table.value("trailer", "Bytes after the end byte, as a check sum.").range(0..=16).or(0);
        Some(Framing::Enclosed { start, end, trailer, max_length: max_length(table) })
    });
    let prefixed = table.optional("prefixed", "Frames that tell their own length.", |table| {
        let prefix = Prefix {
            start: table.value("start", "What every frame begins with.").or(Bytes(Vec::new())).0,
            offset: table.value("offset", "Bytes before the length field.").or(0),
            width: table.value("width", "Bytes of the length field: 1, 2 or 4.").or(1),
            byte_order: table.value("byte_order", "Which byte of the length comes first.").or(ByteOrder::Big),
            adjust: adjust(table),
        };
        Some(Framing::Prefixed { prefix, max_length: max_length(table), idle: idle(table, "idle") })
    });
    let idle = table.optional("idle", "Frames separated by silence.", |table| {
        Some(Framing::Idle { gap: idle(table, "gap"), max_length: max_length(table) })
    });
    if KINDS.iter().any(|kind| table.place_of(kind).is_some()) {
        table.exactly_one(&KINDS);
    } else {
        return Some(Framing::Line { delimiters: vec![b"\n".to_vec()], max_length: DEFAULT_MAX_LENGTH });
    }
    line.or(fixed).or(enclosed).or(prefixed).or(idle)
}

const DEFAULT_MAX_LENGTH: usize = 1024;

fn max_length(table: &mut Table<'_>) -> usize {
    table
        .value("max_length", "A longer frame is dropped.")
        .range(Size(1)..=Size(MAX_FRAME_BYTES as u64))
        .or(Size(DEFAULT_MAX_LENGTH as u64))
        .bytes()
}

fn idle(table: &mut Table<'_>, key: &'static str) -> Duration {
    table
        .value(key, "The silence that ends a frame.")
        .range(Duration::from_millis(1)..=Duration::from_secs(60))
        .or(Duration::from_millis(50))
}

fn adjust(table: &mut Table<'_>) -> i32 {
    let meaning = "Added to the length field to get the bytes that follow it.";
    let adjust = table.value::<i64>("adjust", meaning).range(-65_536..=65_536).or(0);
    i32::try_from(adjust).unwrap_or(0)
}

fn decode(table: &mut Table<'_>) -> Option<Decode> {
    table.exactly_one(&["parse", "codec"]);
    let parse_place = table.place_of("parse");
    let rule = table.optional("parse", "How values are found in a frame.", parse);
    if let (Some(place), Some(rule)) = (parse_place, &rule)
        && let Err(error) = Parser::new(rule.clone())
    {
        table.report(Report::error(place, "this parse rule cannot work").label(describe(&error)));
    }
    let meaning = "A JavaScript file with `decodeUplink(input)` and, for commands, `encodeDownlink(input)`.";
    let codec = codec(table, "codec", meaning);
    rule.map(Decode::Parse).or_else(|| codec.map(Decode::Codec))
}

/// A payload codec. The script is run once, so that what is wrong with it is found now.
pub(super) fn codec(table: &mut Table<'_>, key: &'static str, meaning: &'static str) -> Option<codec::Settings> {
    let path = table.value::<PathBuf>(key, meaning).optional_at()?;
    let meaning = "What the script finds as `input.fPort`, if it tells messages apart by LoRaWAN's port.";
    let port = table.value::<u8>("fport", meaning).range(1..=223).or(codec::Settings::DEFAULT_PORT);
    let settings = codec::Settings { port, ..codec::Settings::new(path.value) };
    if let Err(error) = codec::Codec::load(&settings) {
        table.report(Report::error(path.span, "this codec cannot be used").label(describe(&error)));
    }
    Some(settings)
}

fn parse(table: &mut Table<'_>) -> Option<ParseRule> {
    table.exactly_one(&["number", "regex", "json"]);
    let number = table.optional("number", "The whole frame is one number.", point);
    let regex = table.value::<Pattern>("regex", "Each named group, as in `(?<weight>[0-9.]+)`, is a point.").optional();
    let json = table.value("json", "The frame is a JSON object; each member is a point.").or(false);
    let points = table.list("points", "Type, scale and unit of points found by `regex` or `json`.", point);
    match (number, regex) {
        (Some(number), _) => Some(ParseRule::Number(number)),
        (_, Some(Pattern(pattern))) => Some(ParseRule::Regex { pattern, points }),
        _ if json => Some(ParseRule::Json { points }),
        _ => None,
    }
}

/// A regular expression as text; `${` in it is not a variable.
struct Pattern(String);

impl Scalar for Pattern {
    const SHAPE: &'static str = "a regular expression";
    const EXPAND: bool = false;
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Ok(Self(text.to_owned()))
    }
    fn show(&self) -> String {
        self.0.clone()
    }
}

fn point(table: &mut Table<'_>) -> Option<PointRule> {
    let name = table.value::<Name>("point", "Names the point; the last level of its topic.").required();
    let point_type = table.value("type", "What the text is read as; `auto` takes a number if it is one.");
    let point_type = point_type.or(PointType::Auto);
    let scale = table.value("scale", "value = number × scale + offset.").or(1.0);
    let offset = table.value("offset", "See `scale`.").or(0.0);
    let unit = table.value::<String>("unit", "The unit's symbol, as in `kg`.").optional().map(Arc::from);
    Some(PointRule { point: name?.0.into(), point_type, scale, offset, unit })
}

fn command(table: &mut Table<'_>) -> Option<CommandRule> {
    let point = table.value::<Name>("point", "The point that the command sets.").required();
    let meaning = "What is sent; `{value}`, `{value:.2}` and `{point}` are put in.";
    let template = table.value("send", meaning).required();
    Some(CommandRule { point: point?.0.into(), template: template? })
}

fn request(table: &mut Table<'_>) -> Option<Request> {
    let send = table.value::<Bytes>("send", "What makes the device speak.").required();
    let interval = table
        .value("interval", "How often it is sent.")
        .range(Duration::from_millis(10)..=Duration::from_secs(86_400))
        .or(Duration::from_secs(1));
    let timeout = table
        .value("timeout", "How long the answer may take.")
        .range(Duration::from_millis(1)..=Duration::from_secs(60))
        .or(Duration::from_millis(500));
    Some(Request { bytes: send?.0, interval, timeout })
}
