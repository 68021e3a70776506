//! The demo: simulated field devices on real transports, and a cloud.

pub mod scale;
