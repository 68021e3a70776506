//! The listener and the hub together, driven by packet scripts over real sockets on ports the system chooses.

mod access;
mod connections;
mod delivery;
mod harness;
mod limits;
mod sessions;
mod transports;
