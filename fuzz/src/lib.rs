//! The gateway's words and protocols, compiled by themselves: floors 0 and 1 need nothing of those above (tests/tidy.rs
//! sees to it), and what is not compiled with them need not be instrumented.

pub mod mqtt;

#[path = "../../src"]
mod gateway {
    pub mod clock;
    pub mod message;
    pub mod proto;
    pub mod reading;
    pub mod throttle;
    pub mod topic;
}

/// In the gateway they stand at the root, and say so.
pub use gateway::{clock, message, proto, reading, throttle, topic};
