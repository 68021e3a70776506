//! The section `modbus`, and device profiles.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::claims::{Claim, Names, Resource, same_device};
use super::report::Report;
use super::scalar::{HostPort, Name, Origin, Scalar, words};
use super::source::Located;
use super::table::Table;
use crate::field::mapping::PayloadForm;
use crate::field::modbus::{Device, DevicePoint, Link, Publish, ReadBack, Settings};
use crate::field::{DataBits, Parity, SerialLine, StopBits};
use crate::proto::modbus::{
    Access, DataType, MAX_READ_BITS, MAX_READ_REGISTERS, Order, Point, ReadLimits, Table as Space, UnitId,
    parse_reference,
};

words!(Parity, "a parity", "none" => Parity::None, "even" => Parity::Even, "odd" => Parity::Odd);
words!(StopBits, "a number of stop bits", "1" => StopBits::One, "2" => StopBits::Two);
words!(DataBits, "a number of data bits", "5" => DataBits::Five, "6" => DataBits::Six, "7" => DataBits::Seven,
    "8" => DataBits::Eight);
words!(Order, "an order", "big" => Order::Big, "little" => Order::Little);
words!(Access, "an access", "read" => Access::Read, "read_write" => Access::ReadWrite, "write" => Access::Write);
words!(PayloadForm, "a form of payload", "json" => PayloadForm::Json, "value" => PayloadForm::Value);
words!(ReadBack, "what to do after a write", "trust" => ReadBack::Trust, "verify" => ReadBack::Verify);

#[derive(Clone, Copy)]
enum PublishWhen {
    EveryPoll,
    OnChange,
}
words!(PublishWhen, "when to publish", "every_poll" => PublishWhen::EveryPoll, "on_change" => PublishWhen::OnChange);

impl Scalar for DataType {
    const SHAPE: &'static str = "a data type: `bool`, `i16`, `u16`, `i32`, `u32`, `i64`, `u64`, `f32`, `f64`, `bcd16`, \
         `bcd32`, `string(BYTES)`, `bit(N)` or `bits(FIRST-LAST)`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        text.parse().map_err(|_| String::new())
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

/// A reference as in manuals: `40001`.
struct Reference(Space, u16);

impl Scalar for Reference {
    const SHAPE: &'static str = "a number as in manuals, `40001` or `400001`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        parse_reference(text).map(|(space, address)| Self(space, address)).map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        format!("{} {}", self.0.name(), self.1)
    }
}

const SHORTEST_POLL: Duration = Duration::from_millis(10);
const DAY: Duration = Duration::from_secs(86_400);

pub(super) fn buses(table: &mut Table<'_>, names: &mut Names) -> Vec<Settings> {
    table.list("modbus", "Modbus buses: one for each serial line or TCP connection.", |table| {
        let name = table.value::<Name>("name", "Names the bus in the log and the UI.").required_at();
        names.adapters.extend(name.iter().map(Located::text));
        let owner = format!("bus `{}`", name.as_ref().map_or("?", |name| &name.value.0));
        let link = link(table, &owner);
        let on_serial = !matches!(link, Some(Link::Tcp { .. }));
        let timeout = table
            .value("timeout", "How long an answer may take to begin.")
            .range(Duration::from_millis(10)..=Duration::from_secs(60))
            .or(Settings::DEFAULT_TIMEOUT);
        let request_gap = table
            .value("request_gap", "The silence before each request; for devices that lose requests after an answer.")
            .range(Duration::ZERO..=Duration::from_secs(10))
            .optional();
        let meaning =
            "How readings are written: `json` with unit, quality and time, or the bare `value` while it is good.";
        let payload = table.value("payload", meaning).or(PayloadForm::Json);
        let devices =
            table.list("devices", "The servers on the bus.", |table| device(table, on_serial, &mut names.devices));
        Some(Settings { name: name?.value.0.into(), link: link?, timeout, request_gap, payload, devices })
    })
}

fn link(table: &mut Table<'_>, owner: &str) -> Option<Link> {
    table.exactly_one(&["tcp", "serial", "rtu_over_tcp"]);
    let tcp = table.value::<HostPort>("tcp", "Modbus TCP: host and port, usually 502.").optional_at();
    let meaning = "RTU framing through a serial device server that passes bytes on: host and port.";
    let rtu = table.value::<HostPort>("rtu_over_tcp", meaning).optional_at();
    let line = table.optional("serial", "Modbus RTU on a serial line.", |table| serial_line(table, owner));
    for peer in tcp.iter().chain(&rtu) {
        let resource = Resource::Bus(peer.value.to_string().to_lowercase());
        table.cx.claim(Claim { resource, place: peer.span, owner: owner.to_owned() });
    }
    let address = |peer: Located<HostPort>| peer.value.to_string();
    tcp.map(|peer| Link::Tcp { address: address(peer) })
        .or_else(|| rtu.map(|peer| Link::RtuOverTcp { address: address(peer) }))
        .or_else(|| line.map(Link::Serial))
}

/// The keys of a serial line; also used by the section `serial`.
pub(super) fn serial_line(table: &mut Table<'_>, owner: &str) -> Option<SerialLine> {
    let meaning = "The device file; names under /dev/serial/by-id stay the same when others are plugged in.";
    let path = table.value::<PathBuf>("path", meaning).required_at();
    if let Some(path) = &path {
        let resource = Resource::SerialPort(same_device(&path.value));
        table.cx.claim(Claim { resource, place: path.span, owner: owner.to_owned() });
    }
    let baud_rate = table.value("baud_rate", "Bits per second.").range(50..=4_000_000).or(9600);
    let data_bits = table.value("data_bits", "Data bits of a character.").or(DataBits::Eight);
    let parity = table.value("parity", "The parity bit of a character.").or(Parity::None);
    let stop_bits = table.value("stop_bits", "Stop bits of a character.").or(StopBits::One);
    Some(SerialLine { path: path?.value, baud_rate, data_bits, parity, stop_bits })
}

fn device(table: &mut Table<'_>, on_serial: bool, devices: &mut Vec<Located<String>>) -> Option<Device> {
    let name = table.value::<Name>("name", "Names the device; its topics are `devices/NAME/POINT`.").required_at();
    devices.extend(name.iter().map(Located::text));
    let unit = table.value::<u8>("unit_id", "Which server on the bus.");
    let unit_id = if on_serial { unit.range(1..=247).required() } else { Some(unit.or(255)) };
    let unit_id = unit_id
        .and_then(|number| if on_serial { UnitId::on_serial(number).ok() } else { Some(UnitId::on_tcp(number)) });
    let meaning = "A file that describes this kind of device: the keys below, without `name` and `unit_id`.";
    let profile = table.value::<PathBuf>("profile", meaning).optional_at();
    let profile = profile.and_then(|path| read_profile(table, &path)).unwrap_or_default();
    let own = common_keys(table, &profile);
    let mut points = profile.points;
    for point in own.points {
        points.retain(|(known, _)| known.point.name != point.0.point.name);
        points.push(point);
    }
    if table.place_of("points").is_none() && table.place_of("profile").is_none() {
        let report = Report::warning(table.place, "this device has no points, so nothing is read");
        table.report(report.help("add `points:` or a `profile:`"));
    }
    let common = own.poll_interval.or(profile.poll_interval).unwrap_or(Device::DEFAULT_POLL_INTERVAL);
    let with_interval = |(point, interval): (DevicePoint, Option<Duration>)| DevicePoint {
        poll_interval: interval.unwrap_or(common),
        ..point
    };
    Some(Device {
        name: name?.value.0.into(),
        unit_id: unit_id?,
        points: points.into_iter().map(with_interval).collect(),
        ..own.settings
    })
}

/// What a device and a profile have in common.
pub(super) struct Common {
    /// Name, unit id and points are the device's own.
    settings: Device,
    poll_interval: Option<Duration>,
    word_order: Order,
    byte_order: Order,
    /// Each with the poll interval that is its own.
    points: Vec<(DevicePoint, Option<Duration>)>,
}

impl Default for Common {
    fn default() -> Self {
        Self {
            settings: Device::new("", UnitId::on_tcp(0)),
            poll_interval: None,
            word_order: Order::Big,
            byte_order: Order::Big,
            points: Vec::new(),
        }
    }
}

fn read_profile(table: &Table<'_>, path: &Located<PathBuf>) -> Option<Common> {
    let (_, root) = table.cx.load(&path.value, Some(path.span))?;
    let directory = path.value.parent().unwrap_or(&path.value);
    Table::read_root(table.cx, &root, directory, profile_keys)
}

/// The keys of a profile file.
pub(super) fn profile_keys(table: &mut Table<'_>) -> Common {
    table.value::<Name>("name", "What the profile is called; for people.").optional();
    table.value::<String>("description", "What to know about it; for people.").optional();
    common_keys(table, &Common::default())
}

fn common_keys(table: &mut Table<'_>, base: &Common) -> Common {
    let settings = &base.settings;
    let poll_interval = table
        .value("poll_interval", "How often points are read that do not set it themselves; 1s where nobody does.")
        .range(SHORTEST_POLL..=DAY)
        .optional();
    let meaning = "For values of several registers: which register comes first, the high (`big`) or the low one.";
    let word_order = table.value("word_order", meaning).or(base.word_order);
    let byte_order = table.value("byte_order", "Which byte of a register comes first.").or(base.byte_order);
    let limits = settings.read_limits;
    let read_limits = table.table("read_limits", "What one request may read.", |table| ReadLimits {
        max_registers: table
            .value("max_registers", "The most registers the device gives in one answer.")
            .range(1..=MAX_READ_REGISTERS)
            .or(limits.max_registers),
        max_bits: table
            .value("max_bits", "The most coils or discrete inputs the device gives in one answer.")
            .range(1..=MAX_READ_BITS)
            .or(limits.max_bits),
        max_hole_registers: table
            .value("max_hole_registers", "The widest hole between two points that is read along with them; 0 for none.")
            .range(0..=MAX_READ_REGISTERS)
            .or(limits.max_hole_registers),
        max_hole_bits: table
            .value("max_hole_bits", "The same for coils and discrete inputs.")
            .range(0..=MAX_READ_BITS)
            .or(limits.max_hole_bits),
    });
    let (base_when, base_silence) = match settings.publish {
        Publish::EveryPoll => (PublishWhen::EveryPoll, Duration::from_secs(900)),
        Publish::OnChange { max_silence } => (PublishWhen::OnChange, max_silence),
    };
    let when = table.value("publish", "When a reading is published.").or(base_when);
    let max_silence = table
        .value("max_silence", "With `publish: on_change`: a value that does not change is published this often.")
        .range(Duration::from_secs(1)..=DAY)
        .or(base_silence);
    let publish = match when {
        PublishWhen::EveryPoll => Publish::EveryPoll,
        PublishWhen::OnChange => Publish::OnChange { max_silence },
    };
    let settings = Device {
        read_limits,
        publish,
        read_back: table
            .value("read_back", "Whether a write counts only when the point reads back as written (`verify`).")
            .or(settings.read_back),
        down_after: table
            .value("down_after", "After how many requests in a row without an answer the device counts as down.")
            .range(1..=1000)
            .or(settings.down_after),
        bad_after: table
            .value("bad_after", "How long the last values of a device that is down count as stale, not bad.")
            .range(Duration::from_secs(1)..=DAY)
            .or(settings.bad_after),
        ..settings.clone()
    };
    let mut names = Vec::new();
    let points =
        table.list("points", "The values to read and write.", |table| point(table, word_order, byte_order, &mut names));
    table.cx.unique("points", names.iter().map(|name: &Located<Name>| (name.value.0.as_str(), name.span)));
    Common { settings, poll_interval, word_order, byte_order, points }
}

fn point(
    table: &mut Table<'_>,
    word_order: Order,
    byte_order: Order,
    names: &mut Vec<Located<Name>>,
) -> Option<(DevicePoint, Option<Duration>)> {
    let name = table.value::<Name>("name", "Names the point; the last level of its topic.").required_at();
    names.extend(name.clone());
    let (space, address) = place(table);
    let default_type = if space.is_some_and(Space::holds_bits) { DataType::Bool } else { DataType::U16 };
    let data_type = table
        .value("type", "What the bits mean.")
        .or_else("`bool` for coils and discrete inputs, else `u16`", || default_type);
    let meaning = "The order of the registers of this value, where it differs from the device's.";
    let word_order = table.value("word_order", meaning).or_else("the device's", || word_order);
    let meaning = "The order of the bytes in a register, where it differs from the device's.";
    let byte_order = table.value("byte_order", meaning).or_else("the device's", || byte_order);
    let scale = table.value("scale", "value = raw × scale + offset.").or(1.0);
    let offset = table.value("offset", "See `scale`.").or(0.0);
    let unit = table.value::<String>("unit", "The unit's symbol, as in `kWh`; part of every reading.").optional();
    let access = table.value("access", "`read_write` and `write` take commands on `…/POINT/set`.").or(Access::Read);
    let min = table.value("min", "The lowest value a command may set.").optional();
    let max = table.value("max", "The highest value a command may set.").optional();
    let meaning = "The raw number by which the device says that it has no value, as in `-32768`.";
    let invalid = table.value("invalid", meaning).optional();
    let interval = table
        .value("poll_interval", "How often this point is read, where it differs from the device's.")
        .range(SHORTEST_POLL..=DAY)
        .optional();
    let deadband = table
        .value("deadband", "With `publish: on_change`: the smallest change that is published.")
        .range(0.0..=f64::MAX)
        .or(0.0);
    let name = name?;
    let point = Point {
        name: Arc::from(name.value.0),
        table: space?,
        address: address?,
        data_type,
        word_order,
        byte_order,
        scale,
        offset,
        unit: unit.map(Arc::from),
        access,
        min,
        max,
        invalid,
    };
    if let Err(error) = point.check() {
        table.report(
            Report::error(name.span, format!("the point `{}` makes no sense", point.name)).label(error.to_string()),
        );
        return None;
    }
    Some((DevicePoint { point, poll_interval: Duration::ZERO, deadband }, interval))
}

/// Where the value is: the 0-based address under its table's name, or a reference.
fn place(table: &mut Table<'_>) -> (Option<Space>, Option<u16>) {
    table.exactly_one(&["coil", "discrete_input", "input_register", "holding_register", "address"]);
    let spaces = [
        (Space::Coil, "coil", "The 0-based address of a coil (one bit, can be written)."),
        (Space::DiscreteInput, "discrete_input", "The 0-based address of a discrete input (one bit)."),
        (Space::InputRegister, "input_register", "The 0-based address of an input register."),
        (Space::HoldingRegister, "holding_register", "The 0-based address of a holding register (can be written)."),
    ];
    let mut found = (None, None);
    for (space, key, meaning) in spaces {
        if let Some(address) = table.value(key, meaning).optional() {
            found = (Some(space), Some(address));
        }
    }
    let meaning = "Instead of the four above: the number in the manual, counted from 1, as in 40001.";
    match table.value::<Reference>("address", meaning).optional() {
        Some(Reference(space, address)) => (Some(space), Some(address)),
        None => found,
    }
}
