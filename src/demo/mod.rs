//! The demo: simulated field devices on real transports, and a cloud.

pub mod meter;
pub mod scale;
pub mod sensor;
