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
//! | 0 | [`address`] [`message`] [`topic`] [`reading`] [`secret`] [`clock`] [`observe`] [`signal`] [`throttle`] [`via`] | words; no I/O, no async |
//! | 1 | [`proto`] | sans-I/O protocols: bytes and `now` in, actions out |
//! | 2 | [`files`] [`store`] [`tls`] [`websocket`] | files that are watched; the only SQL; certificates and keys for rustls; MQTT in WebSocket frames |
//! | 3 | [`hub`] | access, routes, retained messages, sessions and their queues |
//! | 4 | [`listener`] [`sensornet`] [`field`] [`bridge`] [`web`] | thin shells on tokio |
//! | 5 | [`config`] [`supervise`] [`gateway`] [`cli`] [`demo`] | assembly |
//!
//! # Life of a component
//! A component owns plain `Settings`, which `config` fills. `bind` opens sockets, ports and files and spawns nothing;
//! `run` does the work until it is told to stop. `supervise` restarts what fails.
//!
//! # Promises
//! 1. An acknowledgement is sent when every durable session that must get the message has it on disk or has acknowledged
//!    it: [`store::Receipt`]. 2. A queued message leaves on its PUBACK or PUBCOMP, or is counted: `hub::queue`. 3. QoS 2 is
//!    exactly once across `kill -9`: identifiers follow from queue sequences, and a message goes out after its commit.
//! 4. Order per publisher, topic and QoS, also through an outage. 5. A message acknowledged before its commit is due is
//!    never written: `store::batch`. 6. Everything has a limit, a policy and a counter; of a damaged database
//!    what can be read is kept.
//! 7. No bytes of a peer panic, hang or allocate without bound. 8. A fault stays where it is: `supervise`. 9. A reload
//!    applies the difference: [`gateway`]. 10. Loopback only without users, argon2id, TLS 1.2 or later, secrets unprintable.
//!
//! # Where the code has learned better than the first design
//! - **Configuration** reads the events of granit-parser, the parser under serde-saphyr, instead of serde types: serde stops
//!   at the first error, and we owe all of them at once. Reports are annotate-snippets', whose renderer is rustc's; miette
//!   would bring Unicode tables and a second renderer.
//! - **A message is stored in each queue's row**, not once with references: one receiver is the rule, and rows of one
//!   session that follow each other are written and deleted in runs.
//! - **Frames are not shared between subscribers.** A frame is a few copies of bytes that are in the cache anyway; only
//!   payloads too large to copy are sent by reference.
//!
//! # Deliberately absent
//! Clustering, a rule engine, a time series database, plugins as shared libraries, a global registry of anything.

pub mod address;
pub mod clock;
pub mod message;
pub mod observe;
pub mod reading;
pub mod secret;
pub mod signal;
pub mod throttle;
pub mod topic;
pub mod via;

pub mod proto;

pub mod files;
pub mod store;
pub mod tls;
pub mod websocket;

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
