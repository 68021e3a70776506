//! Modbus: points, their registers as values and back, and the planning of reads (Modbus Application Protocol V1.1b3).
//!
//! Pure: no socket, no clock. Transactions themselves are tokio-modbus's, run by `field::modbus`.

use std::fmt;

use thiserror::Error;

mod address;
mod plan;
mod point;
mod registers;

pub use address::{ReferenceError, parse_reference};
pub use plan::{Learned, Read, ReadLimits, Refusal, Span, plan};
pub use point::{Access, DataType, Order, Point, PointError, UnknownDataType};
pub use registers::{EncodeError, NoValue, Write};

/// The most registers one request may read (V1.1b3 §6.3).
pub const MAX_READ_REGISTERS: u16 = 125;
/// The most coils or discrete inputs one request may read (V1.1b3 §6.1).
pub const MAX_READ_BITS: u16 = 2000;
/// The most registers one request may write (V1.1b3 §6.12).
pub const MAX_WRITE_REGISTERS: u16 = 123;

/// Which server on a bus is meant: 1 to 247 on a serial line, any number over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(u8);

impl UnitId {
    /// A server on a serial line (Modbus over Serial Line V1.02 §2.2).
    ///
    /// # Errors
    /// [`UnitIdError`] unless `number` is 1 to 247; 0 is the broadcast, which nothing answers.
    pub fn on_serial(number: u8) -> Result<Self, UnitIdError> {
        if (1..=247).contains(&number) { Ok(Self(number)) } else { Err(UnitIdError(number)) }
    }

    /// A server reached over TCP, where 255 (and in practice 0) means the device itself and not one behind it
    /// (Modbus Messaging on TCP/IP Implementation Guide V1.0b §4.4.2).
    pub fn on_tcp(number: u8) -> Self {
        Self(number)
    }

    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for UnitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("unit id {0} is not one of a server on a serial line; those are 1 to 247")]
pub struct UnitIdError(u8);

/// One of the four address spaces of a server (V1.1b3 §4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    Coil,
    DiscreteInput,
    InputRegister,
    HoldingRegister,
}

impl Table {
    /// The name used in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coil => "coil",
            Self::DiscreteInput => "discrete_input",
            Self::InputRegister => "input_register",
            Self::HoldingRegister => "holding_register",
        }
    }

    /// Whether its items are single bits, not registers.
    pub fn holds_bits(self) -> bool {
        matches!(self, Self::Coil | Self::DiscreteInput)
    }

    pub fn is_writable(self) -> bool {
        matches!(self, Self::Coil | Self::HoldingRegister)
    }
}

/// What an exception code means, for people (V1.1b3 §7).
pub fn exception_text(code: u8) -> &'static str {
    match code {
        1 => "illegal function",
        2 => "illegal data address",
        3 => "illegal data value",
        4 => "server device failure",
        5 => "acknowledged, still working",
        6 => "server device busy",
        8 => "memory parity error",
        10 => "gateway path unavailable",
        11 => "gateway target device failed to respond",
        _ => "an exception the specification does not define",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_ids_on_a_serial_line_are_1_to_247() {
        assert_eq!(UnitId::on_serial(0), Err(UnitIdError(0)));
        assert_eq!(UnitId::on_serial(1).map(UnitId::number), Ok(1));
        assert_eq!(UnitId::on_serial(247).map(UnitId::number), Ok(247));
        assert_eq!(UnitId::on_serial(248), Err(UnitIdError(248)));
        assert_eq!(UnitId::on_tcp(255).number(), 255);
    }
}
