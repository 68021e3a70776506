//! Single values: how each type is written in YAML, and what an error about it says.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::source::Located;
use crate::address::AddressRange;
use crate::secret::Secret;
use crate::topic::{TopicFilter, TopicName};

/// A type that one YAML scalar can hold.
pub trait Scalar: Sized {
    /// What to write, for help and errors: "a duration, as in `250ms` or `15m`".
    const SHAPE: &'static str;
    /// Whether the value is kept out of reports and may come from a file.
    const SECRET: bool = false;
    /// Whether `${VAR}` is put in; not where `${` has a meaning of its own.
    const EXPAND: bool = true;

    /// Reads the text of a scalar, after `${VAR}` has been put in.
    ///
    /// # Errors
    /// Says what is wrong with the text beyond not being a `SHAPE`; empty when there is nothing to add.
    fn parse(text: &str, origin: &Origin<'_>) -> Result<Self, String>;

    /// As one would write it; documents a default.
    fn show(&self) -> String;

    /// Whether a text that cannot be parsed is of the right kind, and only beyond what the type holds.
    fn is_out_of_range(_text: &str) -> bool {
        false
    }

    /// The words to choose from, when the type is a choice.
    fn words() -> &'static [&'static str] {
        &[]
    }
}

/// Where a scalar stands, for types that look around.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Relative paths start here: the directory of the file that holds the value.
    pub directory: &'a Path,
}

/// An amount of memory or disk in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    pub const fn mib(mib: u64) -> Self {
        Self(mib * 1024 * 1024)
    }

    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

/// A part of something, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(pub u8);

impl Scalar for Percent {
    const SHAPE: &'static str = "a percentage, as in `50%`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        let number = text.strip_suffix('%').ok_or_else(String::new)?;
        let number: u64 = number.trim_end().parse().map_err(|_| String::new())?;
        match u8::try_from(number) {
            Ok(percent @ 0..=100) => Ok(Self(percent)),
            _ => Err("it must be from 0% to 100%".into()),
        }
    }
    fn show(&self) -> String {
        format!("{}%", self.0)
    }
}

impl Scalar for String {
    const SHAPE: &'static str = "text";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        if text.contains('\0') { Err("it holds a NUL character".into()) } else { Ok(text.to_owned()) }
    }
    fn show(&self) -> String {
        self.clone()
    }
}

impl Scalar for Secret {
    const SHAPE: &'static str = "text, `${VARIABLE}` or `file:PATH`";
    const SECRET: bool = true;
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Ok(Self::new(text))
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Scalar for bool {
    const SHAPE: &'static str = "`true` or `false`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        match text {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(String::new()),
        }
    }
    fn show(&self) -> String {
        self.to_string()
    }
    fn words() -> &'static [&'static str] {
        &["true", "false"]
    }
}

fn whole(text: &str) -> Option<i128> {
    match text.strip_prefix("0x") {
        Some(hex) => i128::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Scalar for $type {
            const SHAPE: &'static str = "a whole number";
            fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
                let number = whole(text).ok_or_else(String::new)?;
                Self::try_from(number).map_err(|_| format!("must be from {} to {}", Self::MIN, Self::MAX))
            }
            fn is_out_of_range(text: &str) -> bool {
                whole(text).is_some_and(|number| Self::try_from(number).is_err())
            }
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
integers!(u8, u16, u32, u64, usize, i64);

impl Scalar for f64 {
    const SHAPE: &'static str = "a number";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        match text.parse::<Self>() {
            Ok(number) if number.is_finite() => Ok(number),
            Ok(_) => Err("it must be finite".into()),
            Err(_) => Err(String::new()),
        }
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

const DURATION_UNITS: [(&str, u64); 6] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("min", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

impl Scalar for Duration {
    const SHAPE: &'static str = "a duration, as in `250ms`, `10s`, `15m`, `2h` or `7d`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let number: f64 = number.parse().map_err(|_| String::new())?;
        if unit.is_empty() {
            return Err(if number == 0.0 { String::new() } else { format!("`{text}` has no unit") });
        }
        let (_, millis) = DURATION_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(String::new)?;
        let millis = number * *millis as f64;
        // A century is beyond any meaning, and far from overflowing an Instant.
        if (0.0..=100.0 * 365.0 * 86_400_000.0).contains(&millis) {
            Ok(Self::from_millis(millis.round() as u64))
        } else {
            Err("it must be at most 100 years".into())
        }
    }
    fn show(&self) -> String {
        let millis = self.as_millis();
        let fitting = DURATION_UNITS.iter().rev().filter(|(name, _)| *name != "min");
        let unit = fitting.clone().find(|(_, unit)| millis > 0 && millis.is_multiple_of(u128::from(*unit)));
        match unit {
            Some((name, unit)) => format!("{}{name}", millis / u128::from(*unit)),
            None => "0s".into(),
        }
    }
}

const SIZE_UNITS: [(&str, u64); 8] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

impl Scalar for Size {
    const SHAPE: &'static str = "a size, as in `512KiB`, `64MiB` or `2GiB`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let number: f64 = number.parse().map_err(|_| String::new())?;
        if unit.is_empty() {
            return Err(format!("`{text}` has no unit"));
        }
        let (_, bytes) = SIZE_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(String::new)?;
        let bytes = number * *bytes as f64;
        // 2^53: the largest size a float holds exactly, 8 PiB.
        if (0.0..=9_007_199_254_740_992.0).contains(&bytes) {
            Ok(Self(bytes.round() as u64))
        } else {
            Err("it must be at most 8192TiB".into())
        }
    }
    fn show(&self) -> String {
        let unit = SIZE_UNITS[..5].iter().rev().find(|(_, unit)| self.0 > 0 && self.0.is_multiple_of(*unit));
        match unit {
            Some((name, unit)) => format!("{}{name}", self.0 / unit),
            None => "0B".into(),
        }
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let unit = text.find(|character: char| character.is_ascii_alphabetic()).unwrap_or(text.len());
    (text[..unit].trim_end(), &text[unit..])
}

impl Scalar for PathBuf {
    const SHAPE: &'static str = "a path; a relative one starts at the file it stands in";
    fn parse(text: &str, origin: &Origin<'_>) -> Result<Self, String> {
        match text {
            "" => Err("it is empty".into()),
            _ if text.contains('\0') => Err("it holds a NUL character".into()),
            _ => Ok(origin.directory.join(text)),
        }
    }
    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl Scalar for AddressRange {
    const SHAPE: &'static str = "an IP address or a range, as in `192.168.1.0/24`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        text.parse().map_err(|_| String::new())
    }
    fn show(&self) -> String {
        String::new()
    }
}

impl Scalar for SocketAddr {
    const SHAPE: &'static str =
        "an address and a port, as in `127.0.0.1:1883`, `[::]:1883` or `1883` for all interfaces";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        if let Ok(port) = text.parse::<u16>() {
            return Ok(Self::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port));
        }
        if let Some(port) = text.strip_prefix("localhost:") {
            let port = port.parse().map_err(|_| "the port must be from 0 to 65535".to_owned())?;
            return Ok(Self::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        }
        if text.parse::<Ipv4Addr>().is_ok() || text.parse::<Ipv6Addr>().is_ok() {
            return Err(format!("`{text}` has no port"));
        }
        text.parse().map_err(|_| match text.rsplit_once(':') {
            Some((_, port)) if port.parse::<u64>().is_ok_and(|port| port > u64::from(u16::MAX)) => {
                "the port must be from 0 to 65535".to_owned()
            }
            Some((host, port)) if port.parse::<u16>().is_ok() && host.contains(char::is_alphabetic) => {
                format!("`{host}` is a name, not an address")
            }
            _ => String::new(),
        })
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

/// A host, by name or address, and a port: a peer to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    pub host: String,
    pub port: u16,
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

impl Scalar for HostPort {
    const SHAPE: &'static str = "a host and a port, as in `10.0.0.5:502`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("`{text}` has no port"))?;
        let port = port.parse().map_err(|_| "the port must be from 1 to 65535".to_owned())?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(address) => address.parse::<Ipv6Addr>().map_err(|_| String::new())?.to_string(),
            None => host.to_owned(),
        };
        let legal = |character: char| character.is_ascii_alphanumeric() || "-._:".contains(character);
        if port == 0 || host.is_empty() || host.len() > 253 || !host.chars().all(legal) {
            return Err(String::new());
        }
        Ok(Self { host, port })
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Scalar for TopicName {
    const SHAPE: &'static str = "a topic name";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Self::new(text).map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        self.as_str().to_owned()
    }
}

impl Scalar for TopicFilter {
    const SHAPE: &'static str = "a topic filter";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Self::new(text).map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        self.as_str().to_owned()
    }
}

/// A name that becomes a topic level, a metric label and a file name: letters, digits, `-`, `_` and `.`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name(pub String);

/// Names stand in topics that are sent often.
const MAX_NAME_BYTES: usize = 64;

impl Located<Name> {
    /// The name as plain text, with its place.
    pub(super) fn text(&self) -> Located<String> {
        Located { value: self.value.0.clone(), span: self.span }
    }
}

impl Scalar for Name {
    const SHAPE: &'static str = "a name of letters, digits, `-`, `_` and `.`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        let legal = |character: char| character.is_alphanumeric() || "-_.".contains(character);
        if text.len() > MAX_NAME_BYTES {
            return Err(format!("it must be at most {MAX_NAME_BYTES} bytes long"));
        }
        if let Some(character) = text.chars().find(|character| !legal(*character)) {
            return Err(format!("it holds {character:?}; the name becomes one level of a topic"));
        }
        if text.is_empty() || text.chars().all(|character| character == '.') {
            return Err(String::new());
        }
        Ok(Self(text.to_owned()))
    }
    fn show(&self) -> String {
        self.0.clone()
    }
}

/// Teaches the reader a choice of words for a type that is not ours to implement on.
///
/// `words! { Format, "a log format", "text" => Format::Text, "json" => Format::Json }`
macro_rules! words {
    ($type:ty, $shape:literal, $($word:literal => $value:path),+ $(,)?) => {
        impl $crate::config::scalar::Scalar for $type {
            const SHAPE: &'static str = $shape;
            fn parse(text: &str, _: &$crate::config::scalar::Origin<'_>) -> Result<Self, String> {
                match text {
                    $($word => Ok($value),)+
                    _ => Err(String::new()),
                }
            }
            // An older word for the same comes after the one that is shown.
            #[allow(unreachable_patterns)]
            fn show(&self) -> String {
                match self {
                    $($value => $word.to_owned(),)+
                    _ => String::new(),
                }
            }
            fn words() -> &'static [&'static str] {
                &[$($word),+]
            }
        }
    };
}
pub(super) use words;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse<T: Scalar>(text: &str) -> Result<T, String> {
        T::parse(text, &Origin { directory: Path::new("/etc/fieldgate") })
    }

    #[test]
    fn durations_need_a_unit_and_print_as_written() {
        let check = |text: &str, millis: u64| {
            let duration: Duration = parse(text).unwrap();
            assert_eq!(duration, Duration::from_millis(millis), "{text}");
        };
        check("250ms", 250);
        check("1.5s", 1500);
        check("15m", 900_000);
        check("15 min", 900_000);
        check("2h", 7_200_000);
        check("7d", 604_800_000);
        for wrong in ["", "5", "s", "5x", "-1s", "1e99d", "NaNs", "infs", "1s2"] {
            assert!(parse::<Duration>(wrong).is_err(), "{wrong}");
        }
        let shown = [0, 250, 1500, 60_000, 90_000, 86_400_000].map(|millis| Duration::from_millis(millis).show());
        assert_eq!(shown, ["0s", "250ms", "1500ms", "1m", "90s", "1d"]);
    }

    #[test]
    fn sizes_need_a_unit_and_print_as_written() {
        let check = |text: &str, bytes: u64| assert_eq!(parse::<Size>(text).unwrap(), Size(bytes), "{text}");
        check("64MiB", 64 << 20);
        check("1.5 GiB", 3 << 29);
        check("10kB", 10_000);
        for wrong in ["", "64", "64M", "MiB", "-1B", "1e30GiB"] {
            assert!(parse::<Size>(wrong).is_err(), "{wrong}");
        }
        assert_eq!([0, 512, 1 << 20, 3 << 29].map(|bytes| Size(bytes).show()), ["0B", "512B", "1MiB", "1536MiB"]);
    }

    #[test]
    fn addresses_may_be_a_port_alone_but_never_without_one() {
        let check = |text: &str, expected: &str| {
            assert_eq!(parse::<SocketAddr>(text).unwrap().to_string(), expected, "{text}");
        };
        check("1883", "0.0.0.0:1883");
        check("localhost:1883", "127.0.0.1:1883");
        check("[::1]:1883", "[::1]:1883");
        for (wrong, why) in [
            ("127.0.0.1", "`127.0.0.1` has no port"),
            ("::1", "`::1` has no port"),
            ("127.0.0.1:99999", "the port must be from 0 to 65535"),
            ("example.com:1883", "`example.com` is a name, not an address"),
            (":1883", ""),
            ("", ""),
        ] {
            assert_eq!(parse::<SocketAddr>(wrong), Err(why.to_owned()), "{wrong}");
        }
    }

    #[test]
    fn hosts_may_be_names_or_addresses_of_both_families() {
        let check = |text: &str| assert_eq!(parse::<HostPort>(text).unwrap().to_string(), text);
        check("10.0.0.5:502");
        check("[fe80::1]:502");
        check("plc-7.example.com:502");
        for wrong in ["10.0.0.5", "a b:1", ":502", "h:0", "h:65536", "[x]:1"] {
            assert!(parse::<HostPort>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn integers_tell_their_range() {
        assert_eq!(parse::<u8>("0x10"), Ok(16));
        assert_eq!(parse::<u8>("256"), Err("must be from 0 to 255".into()));
        assert!(u8::is_out_of_range("256") && !u8::is_out_of_range("many"));
        assert_eq!(parse::<u16>("1.5"), Err(String::new()));
    }

    #[test]
    fn names_fit_into_one_topic_level() {
        assert!(parse::<Name>("pump-1.a_b").is_ok());
        for wrong in ["", ".", "..", "a/b", "a b", "+", "#", "$x"] {
            assert!(parse::<Name>(wrong).is_err(), "{wrong}");
        }
    }
}
