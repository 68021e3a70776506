//! Field adapters: Modbus buses, serial ports, plugin processes; thin shells that own one port or bus each.
//!
//! Every adapter turns its protocol into readings and answers commands. How readings become messages and messages
//! become commands is decided in one place, [`mapping`]; how an adapter meets the hub in another, [`exchange`].
//! A fault stays where it is: no adapter touches another, and each recovers its own port with a [`Backoff`].

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
pub use tokio_serial::{DataBits, Parity, SerialStream, StopBits};

pub mod codec;
mod device;
pub mod exchange;
pub mod mapping;
pub mod modbus;
pub mod process;
pub mod serial;
pub mod translate;

pub use exchange::Exchange;

/// A serial port and how its line is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SerialLine {
    /// Best a stable name below `/dev/serial/by-id/`, which survives replugging.
    pub path: PathBuf,
    /// Bits per second.
    pub baud_rate: u32,
    pub data_bits: DataBits,
    pub parity: Parity,
    pub stop_bits: StopBits,
}

impl SerialLine {
    /// A line with 8 data bits, no parity, 1 stop bit.
    pub fn new(path: impl Into<PathBuf>, baud_rate: u32) -> Self {
        Self {
            path: path.into(),
            baud_rate,
            data_bits: DataBits::Eight,
            parity: Parity::None,
            stop_bits: StopBits::One,
        }
    }

    /// Opens the port for this process alone and sets the line.
    ///
    /// # Errors
    /// [`OpenSerialError`] when the port is absent, not permitted, in use by another program, or cannot be set so.
    pub fn open(&self) -> Result<SerialStream, OpenSerialError> {
        let builder = tokio_serial::new(self.path.to_string_lossy(), self.baud_rate)
            .data_bits(self.data_bits)
            .parity(self.parity)
            .stop_bits(self.stop_bits);
        SerialStream::open(&builder).map_err(|source| OpenSerialError { hint: hint_for(&source), source })
    }

    /// How long one character occupies the line: start bit, data, parity and stop bits.
    pub fn character_time(&self) -> Duration {
        let data_bits = match self.data_bits {
            DataBits::Five => 5,
            DataBits::Six => 6,
            DataBits::Seven => 7,
            DataBits::Eight => 8,
        };
        let parity_bits = u32::from(self.parity != Parity::None);
        let stop_bits = if self.stop_bits == StopBits::Two { 2 } else { 1 };
        Duration::from_secs(1) * (1 + data_bits + parity_bits + stop_bits) / self.baud_rate.max(1)
    }
}

/// A serial port that could not be opened, and what to do about it. The port's name is the caller's to add.
#[derive(Debug, Error)]
#[error("cannot open the serial port; {hint}")]
pub struct OpenSerialError {
    hint: &'static str,
    source: tokio_serial::Error,
}

fn hint_for(error: &tokio_serial::Error) -> &'static str {
    match error.kind() {
        tokio_serial::ErrorKind::NoDevice => "it is absent or another program holds it",
        tokio_serial::ErrorKind::Io(io::ErrorKind::NotFound) => "is the adapter plugged in?",
        tokio_serial::ErrorKind::Io(io::ErrorKind::PermissionDenied) => {
            "add the gateway's user to the group that owns the port, often `dialout`"
        }
        tokio_serial::ErrorKind::InvalidInput => "the port does not support these line settings",
        _ => "is it a serial port?",
    }
}

/// How long to wait before the next try at something that keeps failing: doubling from `first` to `cap`.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self { first, cap, next: first }
    }

    /// The wait before the next try; the one after it is twice as long.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(self.cap);
        delay
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_takes_its_bits_at_the_baud_rate() {
        let mut line = SerialLine::new("/dev/null", 9600);
        assert_eq!(line.character_time(), Duration::from_secs(10) / 9600);
        line.parity = Parity::Even;
        assert_eq!(line.character_time(), Duration::from_secs(11) / 9600);
    }

    #[test]
    fn a_backoff_doubles_to_its_cap_and_starts_over() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        let delays: Vec<u64> = (0..5).map(|_| backoff.next_delay().as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 5, 5]);
        backoff.reset();
        assert_eq!(backoff.next_delay().as_secs(), 1);
    }

    #[test]
    fn an_absent_port_says_what_to_look_at() {
        let error = SerialLine::new("/nonexistent/port", 9600).open().unwrap_err();
        assert!(error.to_string().contains("plugged in") || error.to_string().contains("absent"), "{error}");
    }
}
