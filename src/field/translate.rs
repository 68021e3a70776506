//! Codecs on topics: what devices publish as bytes becomes readings.
//!
//! A sensor that speaks MQTT or MQTT-SN itself often sends a few packed bytes. A translator subscribes to where such
//! bytes arrive, runs each message through a payload codec and publishes the values as readings of a device, which it
//! names after the message's topic. Sent bytes are not translated back: that needs to know how each sensor listens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tracing::{debug, warn};

use crate::clock::{Clock, UnixMillis};
use crate::field::Exchange;
use crate::field::codec::{self, Codec, Uplink};
use crate::field::device::{Device, show_bytes};
use crate::field::mapping::{Mapping, NameError, PayloadForm, check_device_name};
use crate::hub::{Attach, AttachError, Face, Hub, Link, Outbound, SubscribeError, SubscribeOptions};
use crate::message::{Message, QoS};
use crate::observe::{Health, Kind, Metrics, Observe, Status};
use crate::reading::ReadingTime;
use crate::topic::{SharedFilter, Template, TemplateError, TopicFilter};

/// How many devices one translator may name. Names come from topics, which clients choose.
const MAX_DEVICES: usize = 1000;

/// How many messages are taken from the session and not yet translated; the rest waits in its queue.
const MAX_MESSAGES_IN_HAND: u16 = 16;

/// How many messages in a row may be unreadable before a device counts as unwell.
const UNREADABLE_MESSAGES: u32 = 3;

/// How often silent devices are looked for.
const SILENCE_INTERVAL: Duration = Duration::from_secs(1);

/// Wait before attaching again to a session that was taken away, as by an operator.
const REATTACH_DELAY: Duration = Duration::from_secs(1);

/// One filter, one codec.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub name: Arc<str>,
    /// Where the bytes arrive, such as `sensors/+/raw`. Not among the topics of devices, where readings go.
    pub filter: TopicFilter,
    pub codec: codec::Settings,
    pub device: DeviceTemplate,
    /// A device that publishes nothing for this long is down.
    pub silent_after: Option<Duration>,
}

/// How a device is named after a topic: text with places for what stood where the filter has a `+`, counted from 1, as
/// in `sensor-{1}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceTemplate(Template);

/// What is wrong with a device template.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceTemplateError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("the device's name cannot be used")]
    Name(#[source] NameError),
}

/// What of the settings cannot work.
#[derive(Debug, Error)]
pub enum BindError {
    #[error(
        "the filter `{0}` also takes the readings that would come of it; name where the bytes arrive, below a first level of its own"
    )]
    Loop(TopicFilter),
    #[error("the codec cannot be used")]
    Codec(#[from] codec::LoadError),
    #[error("the translator cannot attach to the hub")]
    Attach(#[from] AttachError),
    #[error("the filter cannot be subscribed to")]
    Subscribe(#[from] SubscribeError),
}

/// A translator that is ready to run.
pub struct Translator {
    settings: Settings,
    hub: Hub,
    link: Link,
    exchange: Exchange,
    codec: Codec,
    observer: Arc<Observer>,
}

/// What a translator tells about itself.
struct Observer {
    name: Arc<str>,
    filter: TopicFilter,
    codec: Codec,
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    since: UnixMillis,
    devices: BTreeMap<Arc<str>, Entry>,
    messages: u64,
    unreadable: u64,
    /// The last message that could not be read, and why.
    last_unreadable: Option<String>,
    refused: u64,
}

#[derive(Clone)]
struct Entry {
    device: Arc<Device>,
    last_message: Instant,
    unreadable: u32,
}

impl DeviceTemplate {
    /// Takes a template apart; `filter` is the one whose levels it speaks of.
    ///
    /// # Errors
    /// [`DeviceTemplateError`] says what of it cannot be.
    pub fn parse(text: &str, filter: &TopicFilter) -> Result<Self, DeviceTemplateError> {
        let template = Self(Template::parse(text, filter)?);
        // A name that cannot be with the shortest levels cannot be with any.
        let shortest = filter.as_str().replace(['+', '#'], "x");
        check_device_name(&template.fill(filter, &shortest)).map_err(DeviceTemplateError::Name)?;
        Ok(template)
    }

    /// The name of the device that published on `topic`, which `filter` matches.
    ///
    /// # Errors
    /// [`NameError`] where what stands in the topic makes no device name.
    pub fn device(&self, filter: &TopicFilter, topic: &str) -> Result<String, NameError> {
        if filter.captures(topic).any(str::is_empty) {
            return Err(NameError::Empty);
        }
        let name = self.fill(filter, topic);
        check_device_name(&name).map(|()| name)
    }

    fn fill(&self, filter: &TopicFilter, topic: &str) -> String {
        let mut name = String::new();
        self.0.fill(filter, topic, &mut name);
        name
    }
}

impl Settings {
    /// Refuses a filter that would take the translator's own readings for bytes to translate.
    ///
    /// # Errors
    /// [`BindError::Loop`].
    pub fn check(&self) -> Result<(), BindError> {
        let first = self.filter.as_str().split('/').next().unwrap_or_default();
        if matches!(first, "+" | "#" | "devices") { Err(BindError::Loop(self.filter.clone())) } else { Ok(()) }
    }
}

impl Translator {
    /// Loads the codec and subscribes.
    ///
    /// # Errors
    /// [`BindError`] names what cannot work.
    pub fn bind(settings: Settings, hub: &Hub, form: PayloadForm) -> Result<Self, BindError> {
        settings.check()?;
        let codec = Codec::load(&settings.codec)?;
        let link = attach(hub, &settings)?;
        let clock = hub.clock().clone();
        let publisher = hub.clone();
        // It takes no commands: the other end of the channel is gone.
        let (_, no_commands) = mpsc::channel(1);
        let mapping = Mapping::new(clock.clone(), form);
        let exchange = Exchange::new(mapping, move |message| publisher.publish(message), no_commands);
        let state = State {
            since: clock.now(),
            devices: BTreeMap::new(),
            messages: 0,
            unreadable: 0,
            last_unreadable: None,
            refused: 0,
        };
        let observer = Arc::new(Observer {
            name: settings.name.clone(),
            filter: settings.filter.clone(),
            codec: codec.clone(),
            clock,
            state: Mutex::new(state),
        });
        Ok(Self { settings, hub: hub.clone(), link, exchange, codec, observer })
    }

    pub fn observe(&self) -> Arc<dyn Observe> {
        self.observer.clone()
    }

    /// Translates until it is told to stop.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut silence = interval(SILENCE_INTERVAL);
        silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let taken = tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => return,
                taken = self.link.next() => taken,
                _ = silence.tick(), if self.settings.silent_after.is_some() => {
                    self.judge_silence();
                    continue;
                }
            };
            if taken.is_empty() {
                tokio::select! {
                    _ = shutdown.wait_for(|stop| *stop) => return,
                    () = sleep(REATTACH_DELAY) => {}
                }
                match attach(&self.hub, &self.settings) {
                    Ok(link) => self.link = link,
                    Err(error) => warn!(adapter = %self.settings.name, %error, "translator gets no messages"),
                }
            }
            for outbound in taken {
                let Outbound::Publish(delivery) = outbound else { continue };
                tokio::select! {
                    _ = shutdown.wait_for(|stop| *stop) => return,
                    () = self.translate(&delivery.message) => {}
                }
                // Only now, so that the session's window holds back what comes faster than the codec can take it.
                if let Some(packet_id) = delivery.packet_id {
                    self.link.acknowledge(packet_id);
                    self.link.flush();
                }
            }
        }
    }

    async fn translate(&self, message: &Message) {
        let topic = message.topic.as_str();
        let name = match self.settings.device.device(&self.settings.filter, topic) {
            Ok(name) => name,
            Err(error) => return self.observer.refuse(topic, &error.to_string()),
        };
        let Some(device) = self.observer.device(&name) else {
            return self.observer.refuse(topic, "there are too many devices already");
        };
        let uplink = Uplink {
            bytes: message.payload.clone(),
            received_at: message.accepted_at,
            device: device.name().clone(),
            topic: Some(topic.into()),
        };
        match self.codec.decode(&uplink).await {
            Ok(decoded) => {
                self.observer.readable(&name);
                let time = ReadingTime { at: message.accepted_at, clock_set: self.exchange.time().clock_set };
                device.publish(&self.exchange, decoded.values, &time);
                device.set(&self.exchange, Health::Good, None);
                for warning in &decoded.warnings {
                    debug!(device = %device.name(), codec = self.codec.name(), warning, "codec warns");
                }
            }
            Err(error) => {
                let shown = show_bytes(&message.payload);
                let text = format!("{}: {error} (in `{shown}`)", self.codec.name());
                let in_a_row = self.observer.unreadable(&name, &text);
                if in_a_row == 1 {
                    warn!(device = %device.name(), topic, payload = shown, %error, "message cannot be read");
                }
                if error.is_limit() || in_a_row >= UNREADABLE_MESSAGES {
                    let reason = format!("what it publishes cannot be read: {text}");
                    device.set(&self.exchange, Health::Degraded, Some(&reason));
                }
            }
        }
    }

    fn judge_silence(&self) {
        let Some(after) = self.settings.silent_after else { return };
        let silent: Vec<_> = self.observer.silent_for(after);
        for device in silent {
            device.set(&self.exchange, Health::Down, Some("publishes nothing any more"));
            device.publish_stale(&self.exchange);
        }
    }
}

impl Observer {
    /// The device of a message that has just come; `None` where there are too many.
    fn device(&self, name: &str) -> Option<Arc<Device>> {
        let mut state = self.state.lock();
        state.messages += 1;
        if let Some(entry) = state.devices.get_mut(name) {
            entry.last_message = Instant::now();
            return Some(entry.device.clone());
        }
        if state.devices.len() >= MAX_DEVICES {
            return None;
        }
        let name: Arc<str> = name.into();
        let device = Arc::new(Device::new(name.clone(), self.clock.clone()));
        state.devices.insert(name, Entry { device: device.clone(), last_message: Instant::now(), unreadable: 0 });
        Some(device)
    }

    fn readable(&self, name: &str) {
        if let Some(entry) = self.state.lock().devices.get_mut(name) {
            entry.unreadable = 0;
        }
    }

    /// Counts a message that could not be read; returns how many in a row that makes for its device.
    fn unreadable(&self, name: &str, why: &str) -> u32 {
        let mut state = self.state.lock();
        state.unreadable += 1;
        state.last_unreadable = Some(why.to_owned());
        state.devices.get_mut(name).map_or(1, |entry| {
            entry.unreadable = entry.unreadable.saturating_add(1);
            entry.unreadable
        })
    }

    fn refuse(&self, topic: &str, why: &str) {
        let mut state = self.state.lock();
        state.refused += 1;
        if state.refused.is_power_of_two() {
            warn!(adapter = %self.name, topic, why, refused = state.refused, "no device can be named after a topic");
        }
    }

    fn silent_for(&self, after: Duration) -> Vec<Arc<Device>> {
        let state = self.state.lock();
        let silent = state.devices.values().filter(|entry| entry.last_message.elapsed() >= after);
        silent.map(|entry| entry.device.clone()).collect()
    }
}

impl Observe for Observer {
    fn statuses(&self) -> Vec<Status> {
        let state = self.state.lock();
        let mut facts = vec![
            ("Filter", self.filter.to_string()),
            ("Codec", self.codec.name().to_owned()),
            ("Messages", state.messages.to_string()),
        ];
        if let Some(why) = &state.last_unreadable {
            facts.push(("Unreadable messages", state.unreadable.to_string()));
            facts.push(("Last unreadable", why.clone()));
        }
        let translator = Status {
            kind: Kind::Adapter,
            name: self.name.to_string(),
            parent: None,
            health: Health::Good,
            reason: None,
            since: state.since,
            facts,
        };
        let devices: Vec<_> = state.devices.values().map(|entry| entry.device.status(&self.name, Vec::new())).collect();
        std::iter::once(translator).chain(devices).collect()
    }

    fn collect(&self, metrics: &mut Metrics) {
        let state = self.state.lock();
        let labels = [("adapter", &*self.name)];
        let mut counter = |name, help, value| metrics.counter(name, help, &labels, value);
        counter("fieldgate_translated_messages_total", "Messages given to a payload codec.", state.messages);
        let help = "Messages that a payload codec made no values of.";
        counter("fieldgate_translated_unreadable_total", help, state.unreadable);
        let help = "Messages on topics that no device could be named after.";
        counter("fieldgate_translated_refused_total", help, state.refused);
        self.codec.collect(metrics);
    }
}

fn attach(hub: &Hub, settings: &Settings) -> Result<Link, BindError> {
    let client_id = format!("translator/{}", settings.name);
    let request = Attach { receive_maximum: MAX_MESSAGES_IN_HAND, ..Attach::internal(Face::Adapter, &client_id) };
    let mut link = hub.attach(request)?;
    let filter = SharedFilter { group: None, filter: settings.filter.clone() };
    link.subscribe(&filter, SubscribeOptions::new(QoS::AtLeastOnce))?;
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text).unwrap()
    }

    #[test]
    fn devices_are_named_after_the_levels_of_a_topic() {
        let check = |template: &str, of: &str, topic: &str, expected: Option<&str>| {
            let template = DeviceTemplate::parse(template, &filter(of)).unwrap();
            assert_eq!(template.device(&filter(of), topic).ok().as_deref(), expected, "{topic}");
        };
        check("{1}", "sensors/+/raw", "sensors/s7/raw", Some("s7"));
        check("{2}-{1}", "+/x/+/#", "a/x/b/c/d", Some("b-a"));
        check("fixed", "up", "up", Some("fixed"));
        check("s-{1}", "sensors/+/raw", "sensors//raw", None);
        check("{1}", "sensors/+/raw", &format!("sensors/{}/raw", "x".repeat(129)), None);
    }

    #[test]
    fn templates_that_cannot_name_a_device_are_refused() {
        let check = |template: &str, expected: DeviceTemplateError| {
            assert_eq!(DeviceTemplate::parse(template, &filter("a/+/b")).unwrap_err(), expected);
        };
        check("{2}", TemplateError::NoSuchLevel { level: 2, wildcards: 1 }.into());
        check("a/{1}", DeviceTemplateError::Name(NameError::NotOneLevel));
        check("", DeviceTemplateError::Name(NameError::Empty));
    }
}
