//! Registers to values and values to registers.
//!
//! Decoding is total: any registers give a value or a reason why there is none. Encoding refuses, with the exact range,
//! what the registers cannot hold.

use thiserror::Error;

use super::point::{DataType, Order, Point};
use crate::reading::Value;

/// What a command puts into a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    Coil(bool),
    Registers(Vec<u16>),
    /// Bits of one register: those of `mask` become those of `bits`, the rest stays.
    Masked {
        mask: u16,
        bits: u16,
    },
}

/// Why registers that were read hold no value.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NoValue {
    #[error("the device says that it has no value")]
    Invalid,
    #[error("the device sent not-a-number or infinity")]
    NotFinite,
    #[error("the device sent 0x{0:x}, which is no binary-coded decimal")]
    NotBcd(u32),
    #[error("the device sent fewer registers than were asked for")]
    TooShort,
}

/// Why a value cannot be written to a point.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum EncodeError {
    #[error("{value} is below the lowest value allowed, {min}")]
    BelowMin { value: f64, min: f64 },
    #[error("{value} is above the highest value allowed, {max}")]
    AboveMax { value: f64, max: f64 },
    #[error("{value} does not fit; the point takes {lowest} to {highest}")]
    OutOfRange { value: f64, lowest: f64, highest: f64 },
    #[error("{0} is not a whole number, and the point takes only those")]
    NotWhole(f64),
    #[error("the point takes a number")]
    NotNumber,
    #[error("the point takes true or false, 1 or 0, on or off")]
    NotBool,
    #[error("the point takes text")]
    NotText,
    #[error("the text has {bytes} bytes; the point takes at most {limit}")]
    TextTooLong { bytes: usize, limit: u16 },
}

impl Point {
    /// The value in a coil or discrete input.
    pub fn decode_bit(&self, bit: bool) -> Value {
        Value::Bool(bit)
    }

    /// The value in `registers`, which are those of [`Point::span`].
    ///
    /// # Errors
    /// [`NoValue`] says why there is none.
    pub fn decode(&self, registers: &[u16]) -> Result<Value, NoValue> {
        let count = usize::from(self.data_type.register_count());
        let registers = registers.get(..count).ok_or(NoValue::TooShort)?;
        let bits = self.unsigned(registers);
        let integer = match self.data_type {
            DataType::Bool => return Ok(Value::Bool(bits != 0)),
            DataType::Text { bytes } => return Ok(self.decode_text(registers, bytes)),
            DataType::F32 => return self.scale_float(shortest(f32::from_bits(bits as u32))),
            DataType::F64 => return self.scale_float(f64::from_bits(bits)),
            DataType::Bits { first, count: 1 } => return Ok(Value::Bool(bits >> first & 1 == 1)),
            DataType::Bits { first, count } => i128::from(bits >> first & ((1 << count) - 1)),
            DataType::I16 => i128::from(bits as u16 as i16),
            DataType::I32 => i128::from(bits as u32 as i32),
            DataType::I64 => i128::from(bits as i64),
            DataType::U16 | DataType::U32 | DataType::U64 => i128::from(bits),
            DataType::Bcd16 | DataType::Bcd32 => decode_bcd(bits as u32)?,
        };
        if self.invalid.map(i128::from) == Some(integer) {
            return Err(NoValue::Invalid);
        }
        Ok(self.scale_integer(integer))
    }

    /// What to write so that the point has `value`.
    ///
    /// # Errors
    /// [`EncodeError`] names what the point takes instead.
    pub fn encode(&self, value: &Value) -> Result<Write, EncodeError> {
        if self.table.holds_bits() {
            return Ok(Write::Coil(to_bool(value)?));
        }
        match self.data_type {
            DataType::Bool => Ok(Write::Registers(vec![u16::from(to_bool(value)?)])),
            DataType::Text { bytes } => self.encode_text(value, bytes),
            DataType::Bits { first, count: 1 } => Ok(self.masked(1 << first, u16::from(to_bool(value)?) << first)),
            DataType::Bits { first, count } => {
                let highest = (1i128 << count) - 1;
                let raw = self.raw_integer(value, 0, highest)? as u16;
                Ok(self.masked((highest as u16) << first, raw << first))
            }
            DataType::F32 => {
                let raw = self.raw_float(value, f64::from(f32::MAX))? as f32;
                Ok(self.registers(u64::from(raw.to_bits()), 2))
            }
            DataType::F64 => Ok(self.registers(self.raw_float(value, f64::MAX)?.to_bits(), 4)),
            DataType::Bcd16 => Ok(self.registers(encode_bcd(self.raw_integer(value, 0, 9999)?), 1)),
            DataType::Bcd32 => Ok(self.registers(encode_bcd(self.raw_integer(value, 0, 99_999_999)?), 2)),
            DataType::I16 => self.encode_integer(value, i16::MIN.into(), i16::MAX.into()),
            DataType::U16 => self.encode_integer(value, 0, u16::MAX.into()),
            DataType::I32 => self.encode_integer(value, i32::MIN.into(), i32::MAX.into()),
            DataType::U32 => self.encode_integer(value, 0, u32::MAX.into()),
            DataType::I64 => self.encode_integer(value, i64::MIN.into(), i64::MAX.into()),
            DataType::U64 => self.encode_integer(value, 0, u64::MAX.into()),
        }
    }

    /// The registers as one unsigned number, after word and byte order; 0 for a text.
    fn unsigned(&self, registers: &[u16]) -> u64 {
        if registers.len() > 4 {
            return 0;
        }
        let word = |number: u64, register: &u16| number << 16 | u64::from(self.ordered(*register));
        match self.word_order {
            Order::Big => registers.iter().fold(0, word),
            Order::Little => registers.iter().rev().fold(0, word),
        }
    }

    /// The lowest `count` words of `number` as registers: the inverse of [`Point::unsigned`].
    fn registers(&self, number: u64, count: u16) -> Write {
        let word = |index: u16| self.ordered((number >> (16 * index)) as u16);
        Write::Registers(match self.word_order {
            Order::Big => (0..count).rev().map(word).collect(),
            Order::Little => (0..count).map(word).collect(),
        })
    }

    fn masked(&self, mask: u16, bits: u16) -> Write {
        Write::Masked { mask: self.ordered(mask), bits: self.ordered(bits) }
    }

    fn ordered(&self, register: u16) -> u16 {
        match self.byte_order {
            Order::Big => register,
            Order::Little => register.swap_bytes(),
        }
    }

    fn decode_text(&self, registers: &[u16], bytes: u16) -> Value {
        let all: Vec<u8> = registers.iter().flat_map(|register| self.ordered(*register).to_be_bytes()).collect();
        let text = &all[..usize::from(bytes).min(all.len())];
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        Value::Text(String::from_utf8_lossy(&text[..end]).trim_end().into())
    }

    fn encode_text(&self, value: &Value, limit: u16) -> Result<Write, EncodeError> {
        let Value::Text(text) = value else {
            return Err(EncodeError::NotText);
        };
        if text.len() > usize::from(limit) {
            return Err(EncodeError::TextTooLong { bytes: text.len(), limit });
        }
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(usize::from(self.data_type.register_count()) * 2, 0);
        let pairs = bytes.chunks_exact(2);
        Ok(Write::Registers(pairs.map(|pair| self.ordered(u16::from_be_bytes([pair[0], pair[1]]))).collect()))
    }

    /// Whole scales keep whole numbers whole.
    fn scale_integer(&self, raw: i128) -> Value {
        if self.scale.fract() == 0.0 && self.offset.fract() == 0.0 {
            let scaled = raw.saturating_mul(self.scale as i128).saturating_add(self.offset as i128);
            if let Ok(integer) = i64::try_from(scaled) {
                return Value::Integer(integer);
            }
        }
        let scaled = raw as f64 * self.scale + self.offset;
        Value::Float(if self.is_scaled() { tidy(scaled) } else { scaled })
    }

    fn scale_float(&self, raw: f64) -> Result<Value, NoValue> {
        let value = if self.is_scaled() { tidy(raw * self.scale + self.offset) } else { raw };
        if value.is_finite() { Ok(Value::Float(value)) } else { Err(NoValue::NotFinite) }
    }

    fn encode_integer(&self, value: &Value, lowest: i128, highest: i128) -> Result<Write, EncodeError> {
        // The two's complement of a negative number, cut to the registers it takes.
        let raw = self.raw_integer(value, lowest, highest)? as u64;
        Ok(self.registers(raw, self.data_type.register_count()))
    }

    /// The raw integer for `value`: exact where the point is not scaled, else the nearest step of its scale.
    fn raw_integer(&self, value: &Value, lowest: i128, highest: i128) -> Result<i128, EncodeError> {
        let number = self.limited_number(value)?;
        let raw = match value {
            Value::Integer(integer) if !self.is_scaled() => i128::from(*integer),
            _ if self.is_scaled() => ((number - self.offset) / self.scale).round() as i128,
            _ if number.fract() != 0.0 => return Err(EncodeError::NotWhole(number)),
            _ => number as i128,
        };
        if (lowest..=highest).contains(&raw) {
            return Ok(raw);
        }
        let ends = [lowest, highest].map(|end| tidy(end as f64 * self.scale + self.offset));
        let (lowest, highest) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
        Err(EncodeError::OutOfRange { value: number, lowest, highest })
    }

    fn raw_float(&self, value: &Value, highest: f64) -> Result<f64, EncodeError> {
        let number = self.limited_number(value)?;
        let raw = (number - self.offset) / self.scale;
        if raw.abs() <= highest {
            return Ok(raw);
        }
        Err(EncodeError::OutOfRange { value: number, lowest: -highest, highest })
    }

    /// The value as a number within the point's own limits.
    fn limited_number(&self, value: &Value) -> Result<f64, EncodeError> {
        let number = match value {
            Value::Bool(value) => f64::from(u8::from(*value)),
            Value::Integer(value) => *value as f64,
            Value::Float(value) if value.is_finite() => *value,
            Value::Float(_) | Value::Text(_) => return Err(EncodeError::NotNumber),
        };
        match (self.min, self.max) {
            (Some(min), _) if number < min => Err(EncodeError::BelowMin { value: number, min }),
            (_, Some(max)) if number > max => Err(EncodeError::AboveMax { value: number, max }),
            _ => Ok(number),
        }
    }
}

fn to_bool(value: &Value) -> Result<bool, EncodeError> {
    match value {
        Value::Bool(value) => Ok(*value),
        Value::Integer(0) => Ok(false),
        Value::Integer(1) => Ok(true),
        Value::Text(text) if text.eq_ignore_ascii_case("on") || text.eq_ignore_ascii_case("true") => Ok(true),
        Value::Text(text) if text.eq_ignore_ascii_case("off") || text.eq_ignore_ascii_case("false") => Ok(false),
        _ => Err(EncodeError::NotBool),
    }
}

fn decode_bcd(bits: u32) -> Result<i128, NoValue> {
    (0..8).rev().try_fold(0, |number, index| match bits >> (4 * index) & 0xf {
        digit @ 0..=9 => Ok(number * 10 + i128::from(digit)),
        _ => Err(NoValue::NotBcd(bits)),
    })
}

fn encode_bcd(number: i128) -> u64 {
    (0..8).fold((0, number), |(bits, rest), index| (bits | ((rest % 10) as u64) << (4 * index), rest / 10)).0
}

/// The `f64` with the fewest digits that is the same `f32`: 230.1 and not 230.10000610351562.
fn shortest(value: f32) -> f64 {
    if value.is_finite() { value.to_string().parse().unwrap_or(f64::from(value)) } else { f64::from(value) }
}

/// Takes off what binary fractions add beyond 15 digits: 2301 × 0.1 is 230.1 and not 230.10000000000002.
fn tidy(value: f64) -> f64 {
    format!("{value:.14e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::super::Table;
    use super::*;
    use proptest::prelude::*;

    fn point(data_type: DataType) -> Point {
        Point::new("p", Table::HoldingRegister, 0, data_type)
    }

    fn scaled(data_type: DataType, scale: f64, offset: f64) -> Point {
        Point { scale, offset, ..point(data_type) }
    }

    #[test]
    fn registers_become_values() {
        let check = |point: &Point, registers: &[u16], expected: Value| {
            assert_eq!(point.decode(registers), Ok(expected), "{point:?} {registers:x?}");
        };
        let text = |text: &str| Value::Text(text.into());
        check(&point(DataType::Bool), &[0], Value::Bool(false));
        check(&point(DataType::Bool), &[2], Value::Bool(true));
        check(&point(DataType::U16), &[0xffff], Value::Integer(65_535));
        check(&point(DataType::I16), &[0xffff], Value::Integer(-1));
        check(&point(DataType::I32), &[0xffff, 0xfffe], Value::Integer(-2));
        check(&point(DataType::U32), &[0x0001, 0x0002], Value::Integer(65_538));
        check(&point(DataType::I64), &[0xffff, 0xffff, 0xffff, 0xfffd], Value::Integer(-3));
        check(&point(DataType::U64), &[0, 0, 1, 0], Value::Integer(65_536));
        check(&point(DataType::U64), &[0xffff; 4], Value::Float(18_446_744_073_709_551_615.0));
        check(&point(DataType::F32), &[0x4366, 0x199a], Value::Float(230.1));
        check(&point(DataType::F64), &[0x406c, 0xc333, 0x3333, 0x3333], Value::Float(230.1));
        check(&point(DataType::Bcd16), &[0x1234], Value::Integer(1234));
        check(&point(DataType::Bcd32), &[0x9876, 0x5432], Value::Integer(98_765_432));
        check(&point(DataType::Text { bytes: 5 }), &[0x4162, 0x6364, 0x6566], text("Abcde"));
        check(&point(DataType::Text { bytes: 6 }), &[0x4162, 0x0064, 0x6566], text("Ab"));
        check(&point(DataType::Text { bytes: 4 }), &[0x4162, 0x2020], text("Ab"));
        check(&point(DataType::Text { bytes: 2 }), &[0xff41], text("\u{fffd}A"));
        check(&point(DataType::Bits { first: 3, count: 1 }), &[0b1000], Value::Bool(true));
        check(&point(DataType::Bits { first: 15, count: 1 }), &[0x7fff], Value::Bool(false));
        check(&point(DataType::Bits { first: 4, count: 4 }), &[0x0a50], Value::Integer(5));
        check(&point(DataType::Bits { first: 0, count: 16 }), &[0xffff], Value::Integer(65_535));
    }

    #[test]
    fn word_and_byte_order_are_each_devices_choice() {
        let check = |word_order, byte_order, registers: [u16; 2]| {
            let point = Point { word_order, byte_order, ..point(DataType::U32) };
            assert_eq!(point.decode(&registers), Ok(Value::Integer(0x0102_0304)));
            assert_eq!(point.encode(&Value::Integer(0x0102_0304)), Ok(Write::Registers(registers.into())));
        };
        check(Order::Big, Order::Big, [0x0102, 0x0304]);
        check(Order::Little, Order::Big, [0x0304, 0x0102]);
        check(Order::Big, Order::Little, [0x0201, 0x0403]);
        check(Order::Little, Order::Little, [0x0403, 0x0201]);
        // A text is a row of bytes; only the byte order concerns it.
        let text = Point { word_order: Order::Little, byte_order: Order::Little, ..point(DataType::Text { bytes: 4 }) };
        assert_eq!(text.decode(&[0x6241, 0x6463]), Ok(Value::Text("Abcd".into())));
    }

    #[test]
    fn scaled_values_have_no_binary_dust() {
        let check = |point: Point, registers: &[u16], expected| assert_eq!(point.decode(registers), Ok(expected));
        check(scaled(DataType::U16, 0.1, 0.0), &[2301], Value::Float(230.1));
        check(scaled(DataType::I16, 0.01, -40.0), &[0xff9c], Value::Float(-41.0));
        check(scaled(DataType::U16, 10.0, 5.0), &[3], Value::Integer(35));
        check(scaled(DataType::F32, 0.001, 0.0), &[0x4366, 0x199a], Value::Float(0.2301));
    }

    #[test]
    fn registers_without_a_value_say_why() {
        let check = |point: Point, registers: &[u16], expected| assert_eq!(point.decode(registers), Err(expected));
        check(point(DataType::F32), &[0x7fc0, 0], NoValue::NotFinite);
        check(point(DataType::F32), &[0x7f80, 0], NoValue::NotFinite);
        check(point(DataType::Bcd16), &[0x12a4], NoValue::NotBcd(0x12a4));
        check(Point { invalid: Some(-32_768), ..point(DataType::I16) }, &[0x8000], NoValue::Invalid);
        check(point(DataType::U32), &[1], NoValue::TooShort);
    }

    #[test]
    fn values_become_registers() {
        let check = |point: &Point, value: Value, expected: &[u16]| {
            assert_eq!(point.encode(&value), Ok(Write::Registers(expected.to_vec())), "{point:?} {value:?}");
        };
        check(&point(DataType::U16), Value::Integer(65_535), &[0xffff]);
        check(&point(DataType::U16), Value::Float(5.0), &[5]);
        check(&point(DataType::U16), Value::Bool(true), &[1]);
        check(&point(DataType::I16), Value::Integer(-1), &[0xffff]);
        check(&point(DataType::I32), Value::Integer(-2), &[0xffff, 0xfffe]);
        check(&point(DataType::U64), Value::Integer(1), &[0, 0, 0, 1]);
        check(&point(DataType::F32), Value::Float(230.1), &[0x4366, 0x199a]);
        check(&point(DataType::Bcd16), Value::Integer(1234), &[0x1234]);
        check(&point(DataType::Bcd32), Value::Integer(98_765_432), &[0x9876, 0x5432]);
        check(&point(DataType::Bool), Value::Text("ON".into()), &[1]);
        check(&point(DataType::Text { bytes: 4 }), Value::Text("Abc".into()), &[0x4162, 0x6300]);
        check(&scaled(DataType::U16, 0.1, 0.0), Value::Float(230.1), &[2301]);
        check(&scaled(DataType::U16, 0.1, 0.0), Value::Float(230.14), &[2301]);
        check(&scaled(DataType::I16, 0.01, -40.0), Value::Integer(-41), &[0xff9c]);
    }

    #[test]
    fn coils_and_bits_take_booleans_however_they_are_spelled() {
        let coil = Point::new("p", Table::Coil, 0, DataType::Bool);
        for value in [Value::Bool(true), Value::Integer(1), Value::Text("on".into()), Value::Text("TRUE".into())] {
            assert_eq!(coil.encode(&value), Ok(Write::Coil(true)), "{value:?}");
        }
        assert_eq!(coil.encode(&Value::Integer(2)), Err(EncodeError::NotBool));
        let bit = point(DataType::Bits { first: 3, count: 1 });
        assert_eq!(bit.encode(&Value::Bool(true)), Ok(Write::Masked { mask: 8, bits: 8 }));
        let bits = point(DataType::Bits { first: 4, count: 4 });
        assert_eq!(bits.encode(&Value::Integer(5)), Ok(Write::Masked { mask: 0xf0, bits: 0x50 }));
        let all = point(DataType::Bits { first: 0, count: 16 });
        assert_eq!(all.encode(&Value::Integer(5)), Ok(Write::Masked { mask: 0xffff, bits: 5 }));
        let swapped = Point { byte_order: Order::Little, ..point(DataType::Bits { first: 0, count: 1 }) };
        assert_eq!(swapped.encode(&Value::Integer(1)), Ok(Write::Masked { mask: 0x0100, bits: 0x0100 }));
    }

    #[test]
    fn values_that_do_not_fit_are_refused_with_the_range_in_the_points_unit() {
        let check = |point: Point, value: Value, expected: &str| {
            assert_eq!(point.encode(&value).unwrap_err().to_string(), expected);
        };
        check(point(DataType::U16), Value::Integer(65_536), "65536 does not fit; the point takes 0 to 65535");
        check(point(DataType::U16), Value::Integer(-1), "-1 does not fit; the point takes 0 to 65535");
        check(
            point(DataType::I16),
            Value::Float(1e30),
            &format!("{} does not fit; the point takes -32768 to 32767", 1e30),
        );
        check(scaled(DataType::U16, 0.1, 0.0), Value::Integer(7000), "7000 does not fit; the point takes 0 to 6553.5");
        check(scaled(DataType::U16, -1.0, 0.0), Value::Integer(1), "1 does not fit; the point takes -65535 to 0");
        check(point(DataType::Bcd16), Value::Integer(10_000), "10000 does not fit; the point takes 0 to 9999");
        check(
            point(DataType::Bits { first: 4, count: 4 }),
            Value::Integer(16),
            "16 does not fit; the point takes 0 to 15",
        );
        check(point(DataType::U16), Value::Float(2.5), "2.5 is not a whole number, and the point takes only those");
        check(point(DataType::U16), Value::Text("x".into()), "the point takes a number");
        check(point(DataType::U16), Value::Float(f64::NAN), "the point takes a number");
        assert!(matches!(point(DataType::F32).encode(&Value::Float(1e39)), Err(EncodeError::OutOfRange { .. })));
        let limited = Point { min: Some(5.0), max: Some(30.0), ..scaled(DataType::U16, 0.1, 0.0) };
        check(limited.clone(), Value::Float(4.9), "4.9 is below the lowest value allowed, 5");
        check(limited, Value::Integer(31), "31 is above the highest value allowed, 30");
        check(
            point(DataType::Text { bytes: 3 }),
            Value::Text("Äbc".into()),
            "the text has 4 bytes; the point takes at most 3",
        );
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(raw in any::<u64>(), word in any::<bool>(), byte in any::<bool>()) {
            let order = |little| if little { Order::Little } else { Order::Big };
            let types = [DataType::I16, DataType::U16, DataType::I32, DataType::U32, DataType::I64, DataType::F32,
                DataType::F64];
            for data_type in types {
                let point = Point { word_order: order(word), byte_order: order(byte), ..point(data_type) };
                let Write::Registers(registers) = point.registers(raw, data_type.register_count()) else { unreachable!() };
                if let Ok(value) = point.decode(&registers) {
                    prop_assert_eq!(point.encode(&value), Ok(Write::Registers(registers)));
                }
            }
        }

        #[test]
        fn any_registers_decode_without_panic(registers in proptest::collection::vec(any::<u16>(), 0..130), scale in any::<f64>()) {
            for text in ["bool", "i16", "u32", "i64", "u64", "f32", "f64", "bcd16", "bcd32", "string(9)", "bits(3-9)"] {
                let _ = scaled(text.parse().unwrap(), scale, scale).decode(&registers);
            }
        }
    }
}
