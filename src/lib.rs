//! Fieldgate: the gateway between field devices and a cloud broker, in one binary.
//!
//! **One idea:** everything that receives messages is a session on the [`hub`]. An MQTT client, a sleeping MQTT-SN
//! sensor, an adapter waiting for commands, the web UI's live view and the upstream bridge are five faces of that one
//! thing. Store-and-forward is not a second mechanism: the bridge's offline buffer is its session's durable queue.
//!
//! # Floors
//! Each floor uses only floors below it; `tests/tidy.rs` reads the imports and fails on an upward one, on siblings of
//! floor 4 that import each other, and on cycles.
//!
//! | floor | modules | what |
//! | --- | --- | --- |
//! | 0 | [`message`] [`topic`] [`reading`] [`secret`] [`clock`] [`observe`] [`signal`] | words; no I/O, no async |
//! | 1 | [`proto`] | sans-I/O protocols: bytes and `now` in, actions out |
//! | 2 | [`store`] [`tls`] | the only SQL; certificates and keys for rustls |
//! | 3 | [`hub`] | access, routes, retained messages, sessions and their queues |
//! | 4 | [`listener`] [`sensornet`] [`field`] [`bridge`] [`web`] | thin shells on tokio |
//! | 5 | [`config`] [`supervise`] [`gateway`] [`cli`] [`demo`] | assembly |
//!
//! # Life of a component
//! A component owns plain `Settings`, which `config` fills. `bind` opens sockets, ports and files and spawns nothing;
//! `run` does the work until it is told to stop. `supervise` restarts what fails.

pub mod clock;
pub mod message;
pub mod observe;
pub mod reading;
pub mod secret;
pub mod signal;
pub mod topic;

pub mod proto;

pub mod store;
pub mod tls;

pub mod hub;

pub mod bridge;
pub mod field;
pub mod listener;
pub mod sensornet;
pub mod web;

pub mod cli;
pub mod config;
pub mod demo;
pub mod gateway;
pub mod supervise;
