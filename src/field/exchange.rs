//! An adapter's place on the hub: it publishes readings, health and answers, and gets the commands for its devices.
//!
//! Not a queue of its own: outgoing messages are routed at once, commands wait in the adapter's session. The session
//! ends with the adapter, so that a command meant for now does not act hours later; for the same reason commands that
//! were retained are not taken up at the start.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::clock::Clock;
use crate::field::mapping::{Command, DeviceState, Mapping, Origin, PayloadForm, command_filter};
use crate::hub::{Attach, AttachError, Face, Hub, Link, Outbound, RetainHandling, SubscribeError, SubscribeOptions};
use crate::message::{Message, QoS};
use crate::reading::{Reading, ReadingTime, Value};
use crate::topic::SharedFilter;

/// How many commands are taken from the session and not yet begun; the rest waits in its queue.
const MAX_COMMANDS_IN_HAND: u16 = 16;
/// Wait before attaching again to a session that was taken away, as by an operator.
const REATTACH_DELAY: Duration = Duration::from_secs(1);

/// One adapter's exchange with the hub.
pub struct Exchange {
    mapping: Mapping,
    publish: Box<dyn Fn(Message) + Send + Sync>,
    inbox: Inbox,
}

enum Inbox {
    Session(Box<Session>),
    Channel(mpsc::Receiver<Arc<Message>>),
}

struct Session {
    hub: Hub,
    adapter: Arc<str>,
    devices: Vec<Arc<str>>,
    link: Link,
    in_hand: VecDeque<Outbound>,
}

/// Why an adapter has no place on the hub.
#[derive(Debug, Error)]
pub enum ExchangeError {
    #[error("the adapter cannot attach to the hub")]
    Attach(#[from] AttachError),
    #[error("the commands of device `{device}` cannot be subscribed to")]
    Subscribe { device: Arc<str>, source: SubscribeError },
    #[error("`{0}` is no device name")]
    Name(Arc<str>),
}

impl Exchange {
    /// Attaches the adapter named `adapter` and subscribes to the commands for its devices.
    ///
    /// # Errors
    /// [`ExchangeError`], when the hub's limits leave no room or a device's name makes no topic.
    pub fn attach(
        hub: &Hub,
        adapter: &str,
        devices: impl IntoIterator<Item = Arc<str>>,
        form: PayloadForm,
    ) -> Result<Self, ExchangeError> {
        let devices: Vec<Arc<str>> = devices.into_iter().collect();
        let adapter: Arc<str> = format!("adapter/{adapter}").into();
        let link = attach(hub, &adapter, &devices)?;
        let session = Session { hub: hub.clone(), adapter, devices, link, in_hand: VecDeque::new() };
        let publisher = hub.clone();
        Ok(Self {
            mapping: Mapping::new(hub.clock().clone(), form),
            publish: Box::new(move |message| publisher.publish(message)),
            inbox: Inbox::Session(Box::new(session)),
        })
    }

    /// An exchange that hands messages to `publish` and takes commands from `commands`: for an adapter without a hub.
    pub fn new(
        mapping: Mapping,
        publish: impl Fn(Message) + Send + Sync + 'static,
        commands: mpsc::Receiver<Arc<Message>>,
    ) -> Self {
        Self { mapping, publish: Box::new(publish), inbox: Inbox::Channel(commands) }
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
            let message = match &mut self.inbox {
                Inbox::Session(session) => session.next().await,
                Inbox::Channel(commands) => match commands.recv().await {
                    Some(message) => message,
                    None => std::future::pending().await,
                },
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

impl Session {
    async fn next(&mut self) -> Arc<Message> {
        loop {
            while let Some(outbound) = self.in_hand.pop_front() {
                if let Some(message) = self.accept(outbound) {
                    return message;
                }
            }
            let taken = self.link.next().await;
            if taken.is_empty() {
                sleep(REATTACH_DELAY).await;
                match attach(&self.hub, &self.adapter, &self.devices) {
                    Ok(link) => self.link = link,
                    Err(error) => warn!(adapter = %self.adapter, %error, "no commands for the adapter's devices"),
                }
            }
            self.in_hand.extend(taken);
        }
    }

    /// Acknowledges as the command is handed over: should the adapter crash over it, it must not come again and again.
    fn accept(&mut self, outbound: Outbound) -> Option<Arc<Message>> {
        let Outbound::Publish(delivery) = outbound else {
            return None;
        };
        if let Some(packet_id) = delivery.packet_id {
            self.link.acknowledge(packet_id);
            self.link.flush();
        }
        Some(delivery.message)
    }
}

fn attach(hub: &Hub, adapter: &Arc<str>, devices: &[Arc<str>]) -> Result<Link, ExchangeError> {
    let request = Attach { receive_maximum: MAX_COMMANDS_IN_HAND, ..Attach::internal(Face::Adapter, adapter) };
    let mut link = hub.attach(request)?;
    let options =
        SubscribeOptions { retain_handling: RetainHandling::DoNotSend, ..SubscribeOptions::new(QoS::AtLeastOnce) };
    for device in devices {
        let filter = command_filter(device).ok_or_else(|| ExchangeError::Name(device.clone()))?;
        let subscribed = link.subscribe(&SharedFilter { group: None, filter }, options);
        subscribed.map_err(|source| ExchangeError::Subscribe { device: device.clone(), source })?;
    }
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::{Publish, Settings};
    use crate::topic::TopicName;

    fn hub() -> Hub {
        Hub::new(Settings::default(), Clock::start("boot"), None).unwrap()
    }

    fn send(hub: &Hub, topic: &str, payload: &'static str, retain: bool) {
        let mut link = hub.attach(Attach::internal(Face::Mqtt, "operator")).unwrap();
        let publish = Publish { qos: QoS::AtLeastOnce, retain, ..Publish::new(topic, payload) };
        link.publish(publish);
        link.flush();
    }

    #[tokio::test]
    async fn commands_reach_the_adapter_in_order_and_junk_is_answered() {
        let hub = hub();
        send(&hub, "devices/meter/relay/set", "9", true);
        let mut exchange = Exchange::attach(&hub, "bus", ["meter".into()], PayloadForm::Json).unwrap();
        let mut watcher = hub.attach(Attach::internal(Face::Web, "watcher")).unwrap();
        let filter = SharedFilter::split("devices/+/+/set/result").unwrap();
        watcher.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
        // Neither the retained command nor those of other devices come; more come than are taken in hand at once.
        send(&hub, "devices/other/relay/set", "8", false);
        send(&hub, "devices/meter/relay/set", "[]", false);
        for _ in 0..u32::from(MAX_COMMANDS_IN_HAND) * 2 {
            send(&hub, "devices/meter/relay/set", "1", false);
        }
        send(&hub, "devices/meter/relay/set", "2", false);
        let mut last = 0;
        for _ in 0..u32::from(MAX_COMMANDS_IN_HAND) * 2 + 1 {
            let Value::Integer(value) = exchange.next_command().await.value else { panic!("not a number") };
            last = value;
        }
        assert_eq!(last, 2);
        let Some(Outbound::Publish(answer)) = watcher.next().await.pop() else { panic!("no answer") };
        assert_eq!(answer.message.topic, TopicName::new("devices/meter/relay/set/result").unwrap());
        assert!(answer.message.payload.starts_with(br#"{"ok":false"#));
    }

    #[tokio::test]
    async fn a_name_that_makes_no_topic_is_refused() {
        let attached = Exchange::attach(&hub(), "bus", ["a+".into()], PayloadForm::Json);
        assert!(matches!(attached, Err(ExchangeError::Name(_))));
    }
}
