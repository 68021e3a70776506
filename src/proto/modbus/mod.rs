//! Modbus: registers to values and back; planning reads. Transactions themselves are tokio-modbus's.
