//! A point: where in a server's tables a value is, and what its bits mean.
//!
//! Big-endian is the protocol's own order within a register (V1.1b3 §4.2); how a value spans registers is each device's
//! choice, hence [`Point::word_order`] and [`Point::byte_order`].

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use super::plan::Span;
use super::{MAX_READ_REGISTERS, MAX_WRITE_REGISTERS, Table};

/// One value of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    pub name: Arc<str>,
    pub table: Table,
    /// 0-based, as on the wire.
    pub address: u16,
    pub data_type: DataType,
    /// Of the registers of one value; `Big` puts the most significant register first.
    pub word_order: Order,
    /// Of the two bytes of a register; `Big` is what the specification says.
    pub byte_order: Order,
    /// value = raw × scale + offset
    pub scale: f64,
    pub offset: f64,
    pub unit: Option<Arc<str>>,
    pub access: Access,
    /// The lowest value a command may set, in the point's unit.
    pub min: Option<f64>,
    /// The highest value a command may set, in the point's unit.
    pub max: Option<f64>,
    /// The raw integer by which the device says that it has no value, as in -32768.
    pub invalid: Option<i64>,
}

impl Point {
    /// A read-only point in big-endian order with no scaling.
    pub fn new(name: &str, table: Table, address: u16, data_type: DataType) -> Self {
        Self {
            name: name.into(),
            table,
            address,
            data_type,
            word_order: Order::Big,
            byte_order: Order::Big,
            scale: 1.0,
            offset: 0.0,
            unit: None,
            access: Access::Read,
            min: None,
            max: None,
            invalid: None,
        }
    }

    /// The coils, inputs or registers that hold the value.
    pub fn span(&self) -> Span {
        Span { table: self.table, start: self.address, count: self.data_type.register_count() }
    }

    /// Tells whether the point makes sense as a whole. Everything else in here relies on it.
    ///
    /// # Errors
    /// [`PointError`] names the rule it breaks.
    pub fn check(&self) -> Result<(), PointError> {
        if self.table.holds_bits() && self.data_type != DataType::Bool {
            return Err(PointError::BitTable { table: self.table, data_type: self.data_type });
        }
        match self.data_type {
            DataType::Bits { first, count } if count == 0 || u16::from(first) + u16::from(count) > 16 => {
                return Err(PointError::Bits);
            }
            DataType::Text { bytes } if bytes == 0 || bytes > MAX_READ_REGISTERS * 2 => {
                return Err(PointError::TextLength);
            }
            _ => {}
        }
        let count = self.data_type.register_count();
        if u32::from(self.address) + u32::from(count) > 65_536 {
            return Err(PointError::PastEnd);
        }
        if self.access.can_write() {
            if !self.table.is_writable() {
                return Err(PointError::NotWritable(self.table));
            }
            if count > MAX_WRITE_REGISTERS {
                return Err(PointError::TooLongToWrite);
            }
        }
        if !self.scale.is_finite() || self.scale == 0.0 || !self.offset.is_finite() {
            return Err(PointError::Scale);
        }
        if !self.data_type.is_number() && (self.is_scaled() || self.min.is_some() || self.max.is_some()) {
            return Err(PointError::NoNumber(self.data_type));
        }
        if self.invalid.is_some() && !self.data_type.is_integer() {
            return Err(PointError::InvalidMarker(self.data_type));
        }
        match (self.min, self.max) {
            (Some(min), Some(max)) if min > max => Err(PointError::MinAboveMax { min, max }),
            (min, max) if min.into_iter().chain(max).any(f64::is_nan) => Err(PointError::Scale),
            _ => Ok(()),
        }
    }

    pub(super) fn is_scaled(&self) -> bool {
        self.scale != 1.0 || self.offset != 0.0
    }
}

/// What the bits of a point mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataType {
    /// A coil or discrete input; of a register, whether it is not 0.
    Bool,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    F32,
    F64,
    /// Four decimal digits in one register.
    Bcd16,
    /// Eight decimal digits in two registers.
    Bcd32,
    /// UTF-8 text, two bytes a register, up to the first NUL.
    Text {
        bytes: u16,
    },
    /// `count` bits of one register from bit `first` on, where bit 0 is the least significant. One bit is a boolean,
    /// several are an unsigned integer.
    Bits {
        first: u8,
        count: u8,
    },
}

impl DataType {
    /// How many registers (for a bit table: bits) the value takes.
    pub fn register_count(self) -> u16 {
        match self {
            Self::Bool | Self::I16 | Self::U16 | Self::Bcd16 | Self::Bits { .. } => 1,
            Self::I32 | Self::U32 | Self::F32 | Self::Bcd32 => 2,
            Self::I64 | Self::U64 | Self::F64 => 4,
            Self::Text { bytes } => bytes.div_ceil(2),
        }
    }

    fn is_integer(self) -> bool {
        match self {
            Self::Bool | Self::F32 | Self::F64 | Self::Text { .. } => false,
            Self::Bits { count, .. } => count > 1,
            _ => true,
        }
    }

    fn is_number(self) -> bool {
        self.is_integer() || matches!(self, Self::F32 | Self::F64)
    }
}

/// The spelling used in configuration.
impl FromStr for DataType {
    type Err = UnknownDataType;

    fn from_str(text: &str) -> Result<Self, UnknownDataType> {
        let unknown = || UnknownDataType { text: text.into() };
        let argument = |name: &str| text.strip_prefix(name)?.strip_prefix('(')?.strip_suffix(')');
        if let Some(bytes) = argument("string") {
            return Ok(Self::Text { bytes: bytes.parse().map_err(|_| unknown())? });
        }
        if let Some(bit) = argument("bit") {
            return Ok(Self::Bits { first: bit.parse().map_err(|_| unknown())?, count: 1 });
        }
        if let Some(range) = argument("bits") {
            let (first, last) = range.split_once('-').ok_or_else(unknown)?;
            let (first, last): (u8, u8) = (first.parse().map_err(|_| unknown())?, last.parse().map_err(|_| unknown())?);
            let count = last.checked_sub(first).and_then(|count| count.checked_add(1)).ok_or_else(unknown)?;
            return Ok(Self::Bits { first, count });
        }
        match text {
            "bool" => Ok(Self::Bool),
            "i16" => Ok(Self::I16),
            "u16" => Ok(Self::U16),
            "i32" => Ok(Self::I32),
            "u32" => Ok(Self::U32),
            "i64" => Ok(Self::I64),
            "u64" => Ok(Self::U64),
            "f32" => Ok(Self::F32),
            "f64" => Ok(Self::F64),
            "bcd16" => Ok(Self::Bcd16),
            "bcd32" => Ok(Self::Bcd32),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bool => "bool",
            Self::I16 => "i16",
            Self::U16 => "u16",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::I64 => "i64",
            Self::U64 => "u64",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bcd16 => "bcd16",
            Self::Bcd32 => "bcd32",
            Self::Text { bytes } => return write!(f, "string({bytes})"),
            Self::Bits { first, count: 1 } => return write!(f, "bit({first})"),
            Self::Bits { first, count } => {
                return write!(f, "bits({first}-{})", (u16::from(*first) + u16::from(*count)).saturating_sub(1));
            }
        })
    }
}

/// A text that names no data type.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "`{text}` is no data type; there are bool, i16, u16, i32, u32, i64, u64, f32, f64, bcd16, bcd32, string(BYTES), \
     bit(N) and bits(FIRST-LAST), where bit 0 is the least significant"
)]
pub struct UnknownDataType {
    text: Box<str>,
}

/// Which end comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    #[default]
    Big,
    Little,
}

/// What may be done with a point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Access {
    #[default]
    Read,
    ReadWrite,
    /// Never polled.
    Write,
}

impl Access {
    pub fn can_read(self) -> bool {
        self != Self::Write
    }

    pub fn can_write(self) -> bool {
        self != Self::Read
    }
}

/// Why a point makes no sense.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum PointError {
    #[error("a {} holds one bit, so its type is bool, not {data_type}", table.name())]
    BitTable { table: Table, data_type: DataType },
    #[error("the bits of a register are 0 to 15")]
    Bits,
    #[error("a text has 1 to {} bytes", MAX_READ_REGISTERS * 2)]
    TextLength,
    #[error("the value would reach past the last address, 65535")]
    PastEnd,
    #[error("a {} can only be read; commands need a coil or a holding_register", .0.name())]
    NotWritable(Table),
    #[error("one request writes at most {MAX_WRITE_REGISTERS} registers; make the text shorter or the point read-only")]
    TooLongToWrite,
    #[error("scale must be a number other than 0; offset, min and max must be numbers")]
    Scale,
    #[error("scale, offset, min and max are for numbers; the type is {0}")]
    NoNumber(DataType),
    #[error("`invalid` is a raw integer; the type is {0}")]
    InvalidMarker(DataType),
    #[error("min {min} is above max {max}")]
    MinAboveMax { min: f64, max: f64 },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_types_are_parsed_as_they_are_written() {
        let types = ["bool", "i16", "u16", "i32", "u32", "i64", "u64", "f32", "f64", "bcd16", "bcd32"];
        for text in types.into_iter().chain(["string(12)", "bit(0)", "bit(15)", "bits(4-7)"]) {
            assert_eq!(text.parse::<DataType>().unwrap().to_string(), text);
        }
        for text in ["", "float", "string", "string()", "string(x)", "bit(-1)", "bits(7-4)", "bits(0-255)", "bits(3)"] {
            assert!(text.parse::<DataType>().is_err(), "{text}");
        }
    }

    #[test]
    fn points_that_make_no_sense_are_refused() {
        let holding = |data_type| Point::new("p", Table::HoldingRegister, 10, data_type);
        let check = |point: Point, expected| assert_eq!(point.check(), expected, "{point:?}");
        check(holding(DataType::F32), Ok(()));
        let coil = Point::new("p", Table::Coil, 0, DataType::U16);
        check(coil, Err(PointError::BitTable { table: Table::Coil, data_type: DataType::U16 }));
        check(holding(DataType::Bits { first: 12, count: 5 }), Err(PointError::Bits));
        check(holding(DataType::Bits { first: 0, count: 0 }), Err(PointError::Bits));
        check(holding(DataType::Text { bytes: 0 }), Err(PointError::TextLength));
        check(holding(DataType::Text { bytes: 251 }), Err(PointError::TextLength));
        check(Point { address: 65_535, ..holding(DataType::U32) }, Err(PointError::PastEnd));
        check(Point { address: 65_534, ..holding(DataType::U32) }, Ok(()));
        let input = Point::new("p", Table::InputRegister, 0, DataType::U16);
        let error = PointError::NotWritable(Table::InputRegister);
        check(Point { access: Access::ReadWrite, ..input }, Err(error));
        let long = Point { access: Access::Write, ..holding(DataType::Text { bytes: 250 }) };
        check(long, Err(PointError::TooLongToWrite));
        check(Point { scale: 0.0, ..holding(DataType::U16) }, Err(PointError::Scale));
        check(Point { offset: f64::NAN, ..holding(DataType::U16) }, Err(PointError::Scale));
        check(Point { max: Some(f64::NAN), ..holding(DataType::U16) }, Err(PointError::Scale));
        check(Point { scale: 0.1, ..holding(DataType::Bool) }, Err(PointError::NoNumber(DataType::Bool)));
        check(Point { invalid: Some(0), ..holding(DataType::F32) }, Err(PointError::InvalidMarker(DataType::F32)));
        let crossed = Point { min: Some(2.0), max: Some(1.0), ..holding(DataType::U16) };
        check(crossed, Err(PointError::MinAboveMax { min: 2.0, max: 1.0 }));
    }
}
