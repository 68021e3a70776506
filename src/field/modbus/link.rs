//! A connected bus: one request at a time, with a timeout, to an answer.
//!
//! Transactions are tokio-modbus's. Here is what it leaves open: how long to wait, the silence between frames (Modbus
//! over Serial Line V1.02 §2.5.1.1), and whether an answer holds as much as was asked for.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_modbus::client::{Client, Context, rtu, tcp};
use tokio_modbus::slave::{Slave, SlaveContext};
use tokio_modbus::{Error as ModbusError, ProtocolError, Request, Response};

use super::wire::{Framing, Wire, WireState};
use super::{Link, Settings};
use crate::field::{OpenSerialError, SerialLine};
use crate::proto::modbus::UnitId;

/// How long a TCP connection may take to be made: short, because commands wait for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Above this rate the silence between frames no longer shrinks (V1.02 §2.5.1.1).
const FAST_BAUD_RATE: u32 = 19_200;
const FAST_LINE_GAP: Duration = Duration::from_micros(1750);

/// What a device said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Bits(Vec<bool>),
    Registers(Vec<u16>),
    Written,
    Exception(u8),
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub(super) enum CallError {
    #[error("no answer within {limit:?}")]
    Timeout { limit: Duration, heard: Heard },
    #[error("the answer arrived garbled; check baud rate, parity, wiring and termination")]
    Garbled,
    #[error("the answer does not fit the request")]
    Mismatch,
    /// The connection is of no more use.
    #[error("the connection broke")]
    Broken { source: io::Error, sent: Sent },
}

/// Whether a device may have got a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    No,
    Maybe,
}

/// What arrived instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Nothing,
    LateAnswers,
}

#[derive(Debug, Error)]
pub(super) enum ConnectError {
    #[error("cannot connect to {address}")]
    Tcp { address: String, source: io::Error },
    #[error("{path}")]
    Serial { path: String, source: OpenSerialError },
}

pub(super) struct Connection {
    context: Context,
    wire: Arc<WireState>,
    framing: Framing,
    timing: Timing,
    /// When the last frame ended.
    quiet_since: Instant,
}

impl Connection {
    pub async fn open(settings: &Settings) -> Result<Self, ConnectError> {
        let framing = match settings.link {
            Link::Tcp { .. } => Framing::Tcp,
            Link::Serial(_) | Link::RtuOverTcp { .. } => Framing::Rtu,
        };
        let (context, wire) = match &settings.link {
            Link::Tcp { address } => {
                let (wire, state) = Wire::new(connect(address).await?, framing);
                (tcp::attach(wire), state)
            }
            Link::RtuOverTcp { address } => {
                let (wire, state) = Wire::new(connect(address).await?, framing);
                (rtu::attach(wire), state)
            }
            Link::Serial(line) => {
                let port = line.open().map_err(|source| {
                    let path = line.path.display().to_string();
                    ConnectError::Serial { path, source }
                })?;
                let (wire, state) = Wire::new(port, framing);
                (rtu::attach(wire), state)
            }
        };
        Ok(Self { context, wire, framing, timing: Timing::of(settings), quiet_since: Instant::now() })
    }

    /// Asks `unit`, and waits for its answer.
    ///
    /// # Errors
    /// [`CallError`]. After [`CallError::Broken`] the connection is of no more use.
    pub async fn call(&mut self, unit: UnitId, request: Request<'static>) -> Result<Answer, CallError> {
        sleep_until(self.quiet_since + self.timing.gap).await;
        self.context.set_slave(Slave(unit.number()));
        let limit = self.timing.limit(&request);
        let answered = timeout(limit, self.context.call(request.clone())).await;
        self.quiet_since = Instant::now();
        match answered {
            Ok(Ok(Ok(response))) => fit(&request, response).ok_or(CallError::Mismatch),
            Ok(Ok(Err(exception))) => Ok(Answer::Exception(exception.into())),
            Ok(Err(ModbusError::Protocol(
                ProtocolError::HeaderMismatch { .. } | ProtocolError::FunctionCodeMismatch { .. },
            ))) => Err(CallError::Mismatch),
            Ok(Err(ModbusError::Transport(source))) => {
                let sent = if source.kind() == io::ErrorKind::NotConnected { Sent::No } else { Sent::Maybe };
                Err(CallError::Broken { source, sent })
            }
            // The rest of a request that is stuck half sent would be taken for the beginning of the next.
            Err(_) if self.wire.is_sending() => {
                Err(CallError::Broken { source: io::ErrorKind::TimedOut.into(), sent: Sent::Maybe })
            }
            Err(_) => Err(match (self.wire.has_heard(), self.framing) {
                (true, Framing::Rtu) => CallError::Garbled,
                (true, Framing::Tcp) => CallError::Timeout { limit: self.timing.timeout, heard: Heard::LateAnswers },
                (false, _) => CallError::Timeout { limit: self.timing.timeout, heard: Heard::Nothing },
            }),
        }
    }

    /// Bytes that belonged to no awaited answer, since this was last asked.
    pub fn take_discarded(&self) -> u64 {
        self.wire.take_discarded()
    }
}

async fn connect(address: &str) -> Result<TcpStream, ConnectError> {
    let connected = async {
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, "no answer; is the device on, is the address right?")
        })??;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    connected.await.map_err(|source| ConnectError::Tcp { address: address.into(), source })
}

/// The times of one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timing {
    timeout: Duration,
    gap: Duration,
    /// How long one byte takes; zero over TCP.
    byte: Duration,
}

impl Timing {
    fn of(settings: &Settings) -> Self {
        let (gap, byte) = match &settings.link {
            Link::Tcp { .. } | Link::RtuOverTcp { .. } => (Duration::ZERO, Duration::ZERO),
            Link::Serial(line) => (silence(line), line.character_time()),
        };
        Self { timeout: settings.timeout, gap: settings.request_gap.unwrap_or(gap), byte }
    }

    /// How long an answer may take to be complete, from when the request is handed over.
    fn limit(&self, request: &Request<'_>) -> Duration {
        // Unit id, function code, address, quantity, byte count and CRC, both ways, are at most 16 bytes.
        let bytes = 16
            + match request {
                Request::ReadCoils(_, quantity) | Request::ReadDiscreteInputs(_, quantity) => quantity / 8 + 1,
                Request::ReadHoldingRegisters(_, quantity) | Request::ReadInputRegisters(_, quantity) => quantity * 2,
                Request::WriteMultipleRegisters(_, registers) => registers.len() as u16 * 2,
                _ => 2,
            };
        self.timeout + self.byte * u32::from(bytes)
    }
}

fn silence(line: &SerialLine) -> Duration {
    if line.baud_rate > FAST_BAUD_RATE { FAST_LINE_GAP } else { line.character_time() * 7 / 2 }
}

/// The answer in `response`; `None` where it does not hold what `request` asked for.
fn fit(request: &Request<'_>, response: Response) -> Option<Answer> {
    match (request, response) {
        (Request::ReadCoils(_, quantity), Response::ReadCoils(mut bits))
        | (Request::ReadDiscreteInputs(_, quantity), Response::ReadDiscreteInputs(mut bits)) => {
            let quantity = usize::from(*quantity);
            if bits.len() < quantity {
                return None;
            }
            bits.truncate(quantity);
            Some(Answer::Bits(bits))
        }
        (Request::ReadHoldingRegisters(_, quantity), Response::ReadHoldingRegisters(registers))
        | (Request::ReadInputRegisters(_, quantity), Response::ReadInputRegisters(registers)) => {
            (registers.len() == usize::from(*quantity)).then_some(Answer::Registers(registers))
        }
        (Request::WriteSingleCoil(address, _), Response::WriteSingleCoil(echo, _))
        | (Request::WriteMultipleCoils(address, _), Response::WriteMultipleCoils(echo, _))
        | (Request::WriteSingleRegister(address, _), Response::WriteSingleRegister(echo, _))
        | (Request::WriteMultipleRegisters(address, _), Response::WriteMultipleRegisters(echo, _)) => {
            (*address == echo).then_some(Answer::Written)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_line_gives_answers_the_time_that_their_bytes_take() {
        let check = |baud_rate, request: Request<'_>, gap_micros: u128, limit_millis: u128| {
            let settings = Settings {
                name: "bus".into(),
                link: Link::Serial(SerialLine::new("/dev/null", baud_rate)),
                timeout: Duration::from_secs(1),
                request_gap: None,
                payload: crate::field::mapping::PayloadForm::Json,
                devices: Vec::new(),
            };
            let timing = Timing::of(&settings);
            assert_eq!((timing.gap.as_micros(), timing.limit(&request).as_millis()), (gap_micros, limit_millis));
        };
        check(1200, Request::ReadHoldingRegisters(0, 125), 29_166, 3216);
        check(9600, Request::ReadHoldingRegisters(0, 1), 3645, 1018);
        check(115_200, Request::ReadCoils(0, 2000), 1750, 1023);
    }

    #[test]
    fn an_answer_holds_what_was_asked_for() {
        let check = |request, response, expected| assert_eq!(fit(&request, response), expected);
        let registers = |count: usize| Response::ReadHoldingRegisters(vec![7; count]);
        check(Request::ReadHoldingRegisters(0, 2), registers(2), Some(Answer::Registers(vec![7, 7])));
        check(Request::ReadHoldingRegisters(0, 2), registers(1), None);
        check(Request::ReadHoldingRegisters(0, 2), registers(3), None);
        check(Request::ReadInputRegisters(0, 2), registers(2), None);
        check(Request::ReadCoils(0, 2), Response::ReadCoils(vec![true; 8]), Some(Answer::Bits(vec![true, true])));
        check(Request::ReadCoils(0, 9), Response::ReadCoils(vec![true; 8]), None);
        check(Request::WriteSingleCoil(3, true), Response::WriteSingleCoil(3, true), Some(Answer::Written));
        check(Request::WriteSingleCoil(3, true), Response::WriteSingleCoil(4, true), None);
    }
}
