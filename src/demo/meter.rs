//! A simulated power meter: Modbus TCP on a listener, Modbus RTU on a pty. Its profile is `plugins/profiles/demo-meter.yaml`.
//!
//! | table | address | type | what |
//! | --- | --- | --- | --- |
//! | coil | 0 | bool | relay; the load is off while it is off |
//! | discrete input | 0 | bool | whether current flows |
//! | input register | 0, 2, 4, 6 | f32 | voltage V, current A, power W, frequency Hz |
//! | input register | 10 | u32 | energy, Wh |
//! | holding register | 0 | u16 | power limit, W |
//! | holding register | 10–17 | text | serial number |
//!
//! What lies between is answered with exception 2, as by a real meter.

use std::f64::consts::TAU;
use std::future::{Ready, ready};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_modbus::server::{Service, rtu, tcp};
use tokio_modbus::{ExceptionCode, Request, Response, SlaveRequest};
use tokio_serial::{SerialPort, SerialStream};

const SERIAL_NUMBER: &[u8; 16] = b"FG-DEMO-00017\0\0\0";
const HIGHEST_POWER_LIMIT: u16 = 5000;

/// Answers Modbus TCP as a meter, for any unit id, until `shutdown`.
///
/// # Errors
/// When the listener fails.
pub async fn run_tcp_meter(listener: TcpListener, mut shutdown: watch::Receiver<bool>) -> io::Result<()> {
    let meter = Meter::new(None);
    let server = tcp::Server::new(listener);
    let accept = async |stream, address| tcp::accept_tcp_connection(stream, address, |_| Ok(Some(meter.clone())));
    // The server's own tasks end when it is dropped.
    tokio::select! {
        _ = shutdown.wait_for(|stop| *stop) => Ok(()),
        served = server.serve(&accept, |error| tracing::debug!(%error, "demo meter: connection lost")) => served,
    }
}

/// A meter on a serial line of its own.
pub struct RtuMeter {
    near: SerialStream,
    /// The gateway's end is held open, so that the meter does not notice when the gateway closes it.
    far: SerialStream,
    path: PathBuf,
    unit_id: u8,
}

impl RtuMeter {
    /// Makes a pty for a meter with the unit id `unit_id`.
    ///
    /// # Errors
    /// When the system gives no pty.
    pub fn open(unit_id: u8) -> io::Result<Self> {
        let (near, far) = SerialStream::pair()?;
        let path = far.name().ok_or_else(|| io::Error::other("the pty has no name"))?.into();
        Ok(Self { near, far, path, unit_id })
    }

    /// What the gateway opens, at any baud rate.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Answers Modbus RTU until `shutdown`.
    ///
    /// # Errors
    /// When the pty fails.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) -> io::Result<()> {
        let Self { near, far: _far, unit_id, .. } = self;
        let server = rtu::Server::new(near).serve_forever(Meter::new(Some(unit_id)));
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => Ok(()),
            served = server => served,
        }
    }
}

/// The meter behind either transport; clones are the same meter.
#[derive(Clone)]
struct Meter {
    /// On a serial line, only this one is answered.
    unit_id: Option<u8>,
    state: Arc<Mutex<State>>,
}

struct State {
    started: Instant,
    measured: Instant,
    relay: bool,
    power_limit: u16,
    energy_watt_hours: f64,
}

/// What the meter measures at one moment.
#[derive(Clone, Copy, Debug)]
struct Measured {
    voltage: f64,
    current: f64,
    power: f64,
    frequency: f64,
}

impl Meter {
    fn new(unit_id: Option<u8>) -> Self {
        let now = Instant::now();
        let state = State {
            started: now,
            measured: now,
            relay: true,
            power_limit: HIGHEST_POWER_LIMIT,
            energy_watt_hours: 1_234_567.0,
        };
        Self { unit_id, state: Arc::new(Mutex::new(state)) }
    }

    fn answer(&self, request: &Request<'_>, now: Instant) -> Result<Response, ExceptionCode> {
        let mut state = self.state.lock();
        let measured = state.measure(now);
        match request {
            Request::ReadCoils(0, 1) => Ok(Response::ReadCoils(vec![state.relay])),
            Request::ReadDiscreteInputs(0, 1) => Ok(Response::ReadDiscreteInputs(vec![measured.current > 0.0])),
            Request::ReadInputRegisters(address, quantity) => {
                let registers = state.input_registers(measured);
                slice(&[(0, &registers[..8]), (10, &registers[8..])], *address, *quantity)
                    .map(Response::ReadInputRegisters)
            }
            Request::ReadHoldingRegisters(address, quantity) => {
                let serial_number: Vec<u16> =
                    SERIAL_NUMBER.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
                slice(&[(0, &[state.power_limit]), (10, &serial_number)], *address, *quantity)
                    .map(Response::ReadHoldingRegisters)
            }
            Request::WriteSingleCoil(0, on) => {
                state.relay = *on;
                Ok(Response::WriteSingleCoil(0, *on))
            }
            Request::WriteMultipleCoils(0, coils) if coils.len() == 1 => {
                state.relay = coils[0];
                Ok(Response::WriteMultipleCoils(0, 1))
            }
            Request::WriteSingleRegister(0, watts) => {
                state.limit_power(*watts)?;
                Ok(Response::WriteSingleRegister(0, *watts))
            }
            Request::WriteMultipleRegisters(0, registers) if registers.len() == 1 => {
                state.limit_power(registers[0])?;
                Ok(Response::WriteMultipleRegisters(0, 1))
            }
            Request::ReadCoils(..)
            | Request::ReadDiscreteInputs(..)
            | Request::WriteSingleCoil(..)
            | Request::WriteMultipleCoils(..)
            | Request::WriteSingleRegister(..)
            | Request::WriteMultipleRegisters(..) => Err(ExceptionCode::IllegalDataAddress),
            _ => Err(ExceptionCode::IllegalFunction),
        }
    }
}

impl Service for Meter {
    type Request = SlaveRequest<'static>;
    type Response = Option<Response>;
    type Exception = ExceptionCode;
    type Future = Ready<Result<Option<Response>, ExceptionCode>>;

    fn call(&self, request: SlaveRequest<'static>) -> Self::Future {
        if self.unit_id.is_some_and(|unit_id| unit_id != request.slave) {
            return ready(Ok(None));
        }
        ready(self.answer(&request.request, Instant::now()).map(Some))
    }
}

impl State {
    fn measure(&mut self, now: Instant) -> Measured {
        let wave = |period: u64, phase: f64| {
            let seconds = now.duration_since(self.started).as_secs_f64();
            (TAU * (seconds / Duration::from_secs(period).as_secs_f64() + phase)).sin()
        };
        let voltage = 230.0 + 2.5 * wave(47, 0.0) + 0.4 * wave(5, 0.3);
        let wished = (1450.0 + 900.0 * wave(61, 0.1) + 250.0 * wave(13, 0.7)).max(0.0);
        let power = if self.relay { wished.min(self.power_limit.into()) } else { 0.0 };
        let hours = now.duration_since(self.measured).as_secs_f64() / 3600.0;
        self.measured = now;
        self.energy_watt_hours += power * hours;
        Measured { voltage, current: power / voltage, power, frequency: 50.0 + 0.03 * wave(29, 0.5) }
    }

    /// Input registers 0 to 7, then 10 and 11.
    fn input_registers(&self, measured: Measured) -> Vec<u16> {
        let Measured { voltage, current, power, frequency } = measured;
        let floats = [voltage, current, power, frequency].map(|value| (value as f32).to_bits());
        let numbers = floats.into_iter().chain([self.energy_watt_hours as u32]);
        numbers.flat_map(|bits| [(bits >> 16) as u16, bits as u16]).collect()
    }

    fn limit_power(&mut self, watts: u16) -> Result<(), ExceptionCode> {
        if watts > HIGHEST_POWER_LIMIT {
            return Err(ExceptionCode::IllegalDataValue);
        }
        self.power_limit = watts;
        Ok(())
    }
}

/// The registers asked for, if one of the blocks (first address, registers) holds them all.
fn slice(blocks: &[(u16, &[u16])], address: u16, quantity: u16) -> Result<Vec<u16>, ExceptionCode> {
    let within = |(first, registers): &(u16, &[u16])| {
        let start = usize::from(address.checked_sub(*first)?);
        registers.get(start..start + usize::from(quantity)).map(<[u16]>::to_vec)
    };
    blocks.iter().find_map(within).filter(|found| !found.is_empty()).ok_or(ExceptionCode::IllegalDataAddress)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_follows_relay_and_limit_and_energy_adds_up() {
        let meter = Meter::new(None);
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let registers = |now| match meter.answer(&Request::ReadInputRegisters(0, 8), now) {
            Ok(Response::ReadInputRegisters(registers)) => registers,
            other => panic!("{other:?}"),
        };
        let float = |registers: &[u16], index: usize| {
            f32::from_bits(u32::from(registers[index]) << 16 | u32::from(registers[index + 1]))
        };
        assert!((220.0..240.0).contains(&float(&registers(at(1)), 0)));
        meter.answer(&Request::WriteSingleRegister(0, 100), at(1)).unwrap();
        assert_eq!(float(&registers(at(2)), 4), 100.0);
        let energy = |now| meter.answer(&Request::ReadInputRegisters(10, 2), now).unwrap();
        let before = energy(at(2));
        assert_ne!(before, energy(at(3602)));
        meter.answer(&Request::WriteSingleCoil(0, false), at(3602)).unwrap();
        assert_eq!(float(&registers(at(3603)), 2), 0.0);
        assert_eq!(
            meter.answer(&Request::ReadDiscreteInputs(0, 1), at(3603)),
            Ok(Response::ReadDiscreteInputs(vec![false]))
        );
    }

    #[test]
    fn what_the_meter_lacks_is_an_exception() {
        let meter = Meter::new(None);
        let check = |request, expected| assert_eq!(meter.answer(&request, Instant::now()), Err(expected));
        check(Request::ReadInputRegisters(0, 9), ExceptionCode::IllegalDataAddress);
        check(Request::ReadInputRegisters(8, 1), ExceptionCode::IllegalDataAddress);
        check(Request::ReadInputRegisters(0, 0), ExceptionCode::IllegalDataAddress);
        check(Request::ReadHoldingRegisters(10, 9), ExceptionCode::IllegalDataAddress);
        check(Request::ReadCoils(1, 1), ExceptionCode::IllegalDataAddress);
        check(Request::WriteSingleRegister(0, 5001), ExceptionCode::IllegalDataValue);
        check(Request::ReportServerId, ExceptionCode::IllegalFunction);
    }
}
