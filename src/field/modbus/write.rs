//! Commands to writes: the point, the registers, the function code, and what to say about it.
//!
//! A write is never repeated once the device may have got it: a second one could ring a bell twice.

use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;
use tokio_modbus::Request;
use tracing::{debug, info};

use super::ReadBack;
use super::bus::{Exchanged, NoAnswer, Owner, read_request};
use super::link::{Answer, Sent};
use super::status::{Count, exception_name};
use crate::field::mapping::Command;
use crate::proto::modbus::{EncodeError, NoValue, Point, Read, Span, Write};
use crate::reading::Value;

/// Why a command was not carried out.
#[derive(Debug, Error)]
pub(super) enum CommandError {
    #[error("the device has no point `{0}`")]
    NoSuchPoint(String),
    #[error("`{0}` is read-only; to write it, give the point `access: read_write` in the configuration")]
    ReadOnly(String),
    #[error(transparent)]
    Value(#[from] EncodeError),
    #[error("the bus is not connected")]
    NotConnected,
    #[error("the device does not answer; it is asked again in {0:?}")]
    DeviceDown(Duration),
    #[error("{0}; the device may or may not have taken the value")]
    NoAnswer(String),
    #[error("the device refused: {}", exception_name(*.0))]
    Refused(u8),
    #[error("the device took {written}, but reads back {found}")]
    ReadBack { written: Value, found: Value },
    #[error("the device took the value, but it cannot be read back: {0}")]
    NoReadBack(String),
    #[error("the gateway is stopping")]
    Stopping,
}

impl From<NoValue> for CommandError {
    fn from(error: NoValue) -> Self {
        Self::NoReadBack(error.to_string())
    }
}

impl Owner {
    /// Carries out a command and answers it.
    pub(super) async fn execute(&mut self, command: Command) {
        let Some(number) = self.devices.iter().position(|attendance| attendance.device.name == command.device) else {
            debug!(topic = %command.origin.topic, "command for a device that is not on this bus");
            return;
        };
        let result = self.carry_out(number, &command).await;
        let (device, point) = (&command.device, &command.point);
        match result {
            Ok(value) => {
                debug!(%device, %point, %value, "command done");
                self.status.count(number, Count::CommandDone);
                self.exchange.answer(&command.origin, Ok(&value));
            }
            Err(error) => {
                info!(%device, %point, value = %command.value, %error, "command failed");
                self.status.count(number, Count::CommandFailed);
                self.exchange.answer(&command.origin, Err(&error));
            }
        }
    }

    /// Answers a command that came while the bus is not connected.
    pub(super) fn refuse_disconnected(&self, command: &Command) {
        if let Some(number) = self.devices.iter().position(|attendance| attendance.device.name == command.device) {
            self.status.count(number, Count::CommandFailed);
        }
        self.exchange.answer(&command.origin, Err(&CommandError::NotConnected));
    }

    async fn carry_out(&mut self, number: usize, command: &Command) -> Result<Value, CommandError> {
        let points = &self.devices[number].device.points;
        let index = points.iter().position(|candidate| candidate.point.name == command.point);
        let index = index.ok_or_else(|| CommandError::NoSuchPoint(command.point.to_string()))?;
        let point = points[index].point.clone();
        if !point.access.can_write() {
            return Err(CommandError::ReadOnly(command.point.to_string()));
        }
        let write = point.encode(&command.value)?;
        if let Some(retry_at) = self.waits_until(number) {
            let wait = retry_at.duration_since(Instant::now());
            return Err(CommandError::DeviceDown(Duration::from_secs(wait.as_secs() + 1)));
        }
        let written = match write {
            Write::Coil(on) => {
                self.write_coil(number, point.address, on).await?;
                Value::Bool(on)
            }
            Write::Registers(registers) => {
                self.write_registers(number, point.address, &registers).await?;
                point.decode(&registers)?
            }
            Write::Masked { mask, bits } => {
                let register = self.read_registers(number, point.span()).await?;
                let register = register.first().map_or(0, |register| register & !mask | bits);
                self.write_registers(number, point.address, &[register]).await?;
                point.decode(&[register])?
            }
        };
        if self.devices[number].device.read_back == ReadBack::Verify && point.access.can_read() {
            return self.verify(number, index, &point, written).await;
        }
        if let Some(read) = self.devices[number].read_of(index) {
            self.schedule.hasten(number, read, Instant::now());
        }
        Ok(written)
    }

    async fn write_coil(&mut self, number: usize, address: u16, on: bool) -> Result<(), CommandError> {
        let single = Request::WriteSingleCoil(address, on);
        let multiple = Request::WriteMultipleCoils(address, vec![on].into());
        self.write(number, Some(single), multiple).await
    }

    async fn write_registers(&mut self, number: usize, address: u16, registers: &[u16]) -> Result<(), CommandError> {
        let single = match registers {
            [register] => Some(Request::WriteSingleRegister(address, *register)),
            _ => None,
        };
        let multiple = Request::WriteMultipleRegisters(address, registers.to_vec().into());
        self.write(number, single, multiple).await
    }

    /// Writes with the function for one item if there is one and the device knows it, else with that for many.
    async fn write(
        &mut self,
        number: usize,
        single: Option<Request<'static>>,
        multiple: Request<'static>,
    ) -> Result<(), CommandError> {
        if let Some(single) = single.filter(|_| !self.devices[number].writes_multiple_only) {
            match self.ask(number, single).await? {
                Answer::Exception(1) => self.devices[number].writes_multiple_only = true,
                answer => return written(&answer),
            }
        }
        let answer = self.ask(number, multiple).await?;
        written(&answer)
    }

    async fn read_registers(&mut self, number: usize, span: Span) -> Result<Vec<u16>, CommandError> {
        match self.ask(number, read_request(span)).await? {
            Answer::Registers(registers) => Ok(registers),
            Answer::Exception(code) => Err(CommandError::Refused(code)),
            Answer::Bits(_) | Answer::Written => Ok(Vec::new()),
        }
    }

    /// Reads a point that was written, publishes it, and compares.
    async fn verify(
        &mut self,
        number: usize,
        index: usize,
        point: &Point,
        written: Value,
    ) -> Result<Value, CommandError> {
        let span = point.span();
        let answer = self.ask(number, read_request(span)).await.map_err(|error| match error {
            CommandError::NoAnswer(error) => CommandError::NoReadBack(error),
            error => error,
        })?;
        let found = match &answer {
            Answer::Bits(bits) => bits.first().map(|bit| point.decode_bit(*bit)).ok_or(NoValue::TooShort)?,
            Answer::Registers(registers) => point.decode(registers)?,
            Answer::Exception(code) => return Err(CommandError::NoReadBack(exception_name(*code))),
            Answer::Written => return Err(NoValue::TooShort.into()),
        };
        let read = Read { span, parts: vec![(index, span)] };
        let outcome = self.devices[number].answered(&read, &answer, &self.exchange.time(), Instant::now());
        self.take_in(number, outcome);
        if found == written { Ok(written) } else { Err(CommandError::ReadBack { written, found }) }
    }

    /// Sends one request of a command. Where the connection turns out to have been gone before anything was sent, it is
    /// made anew, once: devices like to close a connection that was quiet for a while.
    async fn ask(&mut self, number: usize, request: Request<'static>) -> Result<Answer, CommandError> {
        let mut answered = self.request(number, request.clone()).await;
        if matches!(answered, Err(NoAnswer::Broken { sent: Sent::No, .. })) && self.connect().await {
            answered = self.request(number, request).await;
        }
        match answered {
            Ok(Exchanged { answer, .. }) => Ok(answer),
            Err(NoAnswer::Missed(error)) => Err(CommandError::NoAnswer(error)),
            Err(NoAnswer::Broken { sent: Sent::No, .. }) => Err(CommandError::NotConnected),
            Err(NoAnswer::Broken { error, sent: Sent::Maybe }) => Err(CommandError::NoAnswer(error)),
            Err(NoAnswer::Stopping) => Err(CommandError::Stopping),
        }
    }
}

fn written(answer: &Answer) -> Result<(), CommandError> {
    match answer {
        Answer::Exception(code) => Err(CommandError::Refused(*code)),
        _ => Ok(()),
    }
}
