//! The gateway's own numbers on `$SYS`, under Mosquitto's names.

use std::sync::atomic::Ordering;

use super::Hub;
use crate::message::{Message, QoS};
use crate::topic::TopicName;

/// How often the numbers are published, in seconds: Mosquitto's `sys_interval`.
pub(super) const INTERVAL_SECONDS: u64 = 10;

/// Publishes all of them, retained.
pub(super) fn publish(hub: &Hub) {
    let counters = hub.counters();
    let sessions = hub.sessions();
    let clients = || sessions.iter().filter(|session| matches!(session.face, super::Face::Mqtt | super::Face::MqttSn));
    let connected = clients().filter(|session| session.connected).count();
    let total = clients().count();
    let dropped = [
        &counters.dropped_queue_full,
        &counters.dropped_memory_full,
        &counters.dropped_store_full,
        &counters.dropped_expired,
    ];
    let dropped = dropped.map(|counter| counter.load(Ordering::Relaxed)).iter().sum();
    let (retained, retained_bytes) = {
        let retained = hub.0.retained.read();
        (retained.len(), retained.bytes())
    };
    let numbers: [(&str, u64); 12] = [
        ("clients/connected", connected as u64),
        ("clients/active", connected as u64),
        ("clients/disconnected", (total - connected) as u64),
        ("clients/inactive", (total - connected) as u64),
        ("clients/total", total as u64),
        ("messages/received", counters.received.load(Ordering::Relaxed)),
        ("messages/sent", counters.sent.load(Ordering::Relaxed)),
        ("publish/messages/dropped", dropped),
        ("retained messages/count", retained as u64),
        ("store/messages/bytes", retained_bytes as u64 + sessions.iter().map(|s| s.queued_bytes).sum::<u64>()),
        ("store/messages/count", retained as u64 + sessions.iter().map(|s| s.queued_messages).sum::<u64>()),
        ("subscriptions/count", hub.0.routes.read().len() as u64),
    ];
    for (name, number) in numbers {
        say(hub, name, number.to_string());
    }
    say(hub, "version", concat!("fieldgate ", env!("CARGO_PKG_VERSION")).to_owned());
    say(hub, "uptime", format!("{} seconds", hub.clock().uptime().as_secs()));
}

fn say(hub: &Hub, name: &str, value: String) {
    if let Ok(topic) = TopicName::new(&format!("$SYS/broker/{name}")) {
        hub.publish(Message::new(topic, value, QoS::AtMostOnce, hub.clock().now()).retained());
    }
}
