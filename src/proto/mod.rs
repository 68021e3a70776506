//! Sans-I/O protocols: bytes and `now` in, actions out. No socket, no clock, no task, no log.

pub mod modbus;
pub mod mqtt;
pub mod mqttsn;
pub mod serial;
