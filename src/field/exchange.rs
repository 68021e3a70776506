//! An adapter's place on the hub: it publishes readings, health and answers, and gets the commands for its devices.
//!
//! Not a queue of its own: outgoing messages are routed at once, commands wait in the adapter's session.

use std::fmt;
use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::debug;

use crate::clock::Clock;
use crate::field::mapping::{Command, DeviceState, Mapping, Origin};
use crate::message::Message;
use crate::reading::{Reading, ReadingTime, Value};

/// One adapter's exchange with the hub.
pub struct Exchange {
    mapping: Mapping,
    publish: Box<dyn Fn(Message) + Send + Sync>,
    commands: mpsc::Receiver<Arc<Message>>,
}

impl Exchange {
    /// An exchange that hands messages to `publish` and takes commands from `commands`.
    pub fn new(
        mapping: Mapping,
        publish: impl Fn(Message) + Send + Sync + 'static,
        commands: mpsc::Receiver<Arc<Message>>,
    ) -> Self {
        Self { mapping, publish: Box::new(publish), commands }
    }

    pub fn clock(&self) -> &Clock {
        self.mapping.clock()
    }

    /// The time of a reading that was taken now.
    pub fn time(&self) -> ReadingTime {
        self.mapping.time()
    }

    pub fn publish_reading(&self, reading: &Reading) {
        self.mapping.reading(reading).into_iter().for_each(&self.publish);
    }

    pub fn publish_state(&self, device: &str, state: &DeviceState) {
        self.mapping.state(device, state).into_iter().for_each(&self.publish);
    }

    /// Answers a command with the value that was written, as it reads back, or with what went wrong.
    pub fn answer(&self, origin: &Origin, result: Result<&Value, &dyn fmt::Display>) {
        self.mapping.answer(origin, result).into_iter().for_each(&self.publish);
    }

    /// Waits for the next command. Messages that are no commands are answered here and not returned. Never returns
    /// once the hub is gone.
    ///
    /// # Cancel safety
    /// No command is lost when this future is dropped.
    pub async fn next_command(&mut self) -> Command {
        loop {
            let Some(message) = self.commands.recv().await else {
                return std::future::pending().await;
            };
            match Command::parse(&message) {
                Ok(command) => return command,
                Err((origin, error)) => {
                    debug!(topic = %origin.topic, %error, "not a command");
                    self.answer(&origin, Err(&error));
                }
            }
        }
    }
}
