//! What an upstream does, published on this gateway: two retained topics under `$SYS`.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::interval;

use super::Upstream;
use super::condition::Phase;
use crate::message::{Message, QoS};
use crate::topic::TopicName;

/// How often the state topic is brought up to date while only the depth of the queue changes.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Publishes what the upstream is doing, on this gateway.
pub(super) struct Reporter<'a> {
    upstream: &'a Upstream,
    /// `None` where the upstream's name makes no topic name, which a length limit could cause.
    connected_topic: Option<TopicName>,
    report_topic: Option<TopicName>,
    connected: Option<bool>,
    report: String,
}

impl<'a> Reporter<'a> {
    pub fn new(upstream: &'a Upstream) -> Self {
        let name = &upstream.shared.name;
        Self {
            upstream,
            connected_topic: TopicName::new(&format!("$SYS/broker/connection/{name}/state")).ok(),
            report_topic: TopicName::new(&format!("$SYS/fieldgate/upstreams/{name}")).ok(),
            connected: None,
            report: String::new(),
        }
    }

    pub async fn work(&mut self) {
        let mut ticks = interval(REPORT_INTERVAL);
        loop {
            self.report();
            tokio::select! {
                () = self.upstream.shared.changed.notified() => {}
                _ = ticks.tick() => {}
            }
        }
    }

    pub fn report(&mut self) {
        let shared = &self.upstream.shared;
        let connected = shared.condition.lock().phase == Phase::Connected;
        if self.connected != Some(connected) {
            self.connected = Some(connected);
            self.publish(&self.connected_topic, Bytes::from_static(if connected { b"1" } else { b"0" }));
        }
        let report = shared.report();
        if self.report != report {
            self.publish(&self.report_topic, Bytes::from(report.clone()));
            self.report = report;
        }
    }

    fn publish(&self, topic: &Option<TopicName>, payload: Bytes) {
        let (Some(topic), shared) = (topic, &self.upstream.shared) else { return };
        shared.hub.publish(Message::new(topic.clone(), payload, QoS::AtMostOnce, shared.now()).retained());
    }
}
