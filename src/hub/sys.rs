//! The gateway's own numbers on `$SYS`, under Mosquitto's names (mosquitto(8), "Broker status").

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Face, Hub};
use crate::message::{Message, QoS};
use crate::topic::TopicName;

/// How often the numbers are published, in seconds: Mosquitto's `sys_interval`.
pub(super) const INTERVAL_SECONDS: u64 = 10;

/// What there is per minute, on average over the last one, five and fifteen.
const AVERAGES: [(&str, f64); 3] = [("1min", 60.0), ("5min", 300.0), ("15min", 900.0)];

/// What the next numbers are worked out from.
#[derive(Debug, Default)]
pub(super) struct Figures {
    most_connected: u64,
    /// By name: the count at the last turn, and the averages.
    loads: [(u64, [f64; AVERAGES.len()]); LOADS],
}

const LOADS: usize = 7;

impl Figures {
    /// Publishes all of them, retained.
    pub fn publish(&mut self, hub: &Hub) {
        let counters = hub.counters();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let sessions = hub.sessions();
        let clients = || sessions.iter().filter(|session| matches!(session.face, Face::Mqtt | Face::MqttSn));
        let connected = clients().filter(|session| session.connected).count() as u64;
        let total = clients().count() as u64;
        self.most_connected = self.most_connected.max(connected);
        let dropped = counters.dropped();
        let (retained, retained_bytes) = {
            let retained = hub.0.retained.read();
            (retained.len() as u64, retained.bytes() as u64)
        };
        // Before the loop, not in it: whoever holds the routes must not publish.
        let subscriptions = hub.0.routes.read().len() as u64;
        let stored = retained + sessions.iter().map(|session| session.queued_messages).sum::<u64>();
        let stored_bytes = retained_bytes + sessions.iter().map(|session| session.queued_bytes).sum::<u64>();
        let (received, sent) = (count(&counters.received), count(&counters.sent));
        let [connections, bytes_received, bytes_sent] = traffic(hub);
        for (name, number) in [
            ("bytes/received", bytes_received),
            ("bytes/sent", bytes_sent),
            ("clients/connected", connected),
            ("clients/active", connected),
            ("clients/disconnected", total - connected),
            ("clients/inactive", total - connected),
            ("clients/expired", count(&counters.expired_sessions)),
            ("clients/maximum", self.most_connected),
            ("clients/total", total),
            ("messages/inflight", sessions.iter().map(|session| session.inflight).sum()),
            ("messages/received", received),
            ("messages/sent", sent),
            ("messages/stored", stored),
            ("publish/messages/dropped", dropped),
            ("publish/messages/received", received),
            ("publish/messages/sent", sent),
            ("retained messages/count", retained),
            ("store/messages/bytes", stored_bytes),
            ("store/messages/count", stored),
            ("subscriptions/count", subscriptions),
        ] {
            say(hub, name, number.to_string());
        }
        let loads: [(&str, u64); LOADS] = [
            ("connections", connections),
            ("sockets", connections),
            ("bytes/received", bytes_received),
            ("bytes/sent", bytes_sent),
            ("publish/received", received),
            ("publish/sent", sent),
            ("publish/dropped", dropped),
        ];
        for ((name, now), (before, averages)) in loads.into_iter().zip(&mut self.loads) {
            let per_minute = (now - std::mem::replace(before, now)) as f64 * 60.0 / INTERVAL_SECONDS as f64;
            for (average, (over, seconds)) in averages.iter_mut().zip(AVERAGES) {
                // A number of this turn counts less and less in those that follow.
                let kept = (-(INTERVAL_SECONDS as f64) / seconds).exp();
                *average = per_minute + kept * (*average - per_minute);
                say(hub, &format!("load/{name}/{over}"), format!("{average:.2}"));
            }
        }
        say(hub, "version", concat!("fieldgate ", env!("CARGO_PKG_VERSION")).to_owned());
        say(hub, "uptime", format!("{} seconds", hub.clock().uptime().as_secs()));
    }
}

/// Connections, bytes received and bytes sent, over all listeners.
fn traffic(hub: &Hub) -> [u64; 3] {
    let listeners = hub.0.traffic.lock();
    listeners.iter().fold([0; 3], |sum, listener| {
        let of = [&listener.connections, &listener.bytes_received, &listener.bytes_sent];
        std::array::from_fn(|index| sum[index] + of[index].load(Ordering::Relaxed))
    })
}

fn say(hub: &Hub, name: &str, value: String) {
    if let Ok(topic) = TopicName::new(&format!("$SYS/broker/{name}")) {
        hub.publish(Message::new(topic, value, QoS::AtMostOnce, hub.clock().now()).retained());
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Attach, Settings, SubscribeOptions};
    use super::*;
    use crate::clock::Clock;
    use crate::topic::SharedFilter;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn clients_may_subscribe_while_the_figures_are_published() {
        let hub = Hub::new(Settings::default(), Clock::start("test"), None).unwrap();
        let (publishing, subscribing) = (hub.clone(), hub);
        let (done, both) = mpsc::channel();
        let also_done = done.clone();
        thread::spawn(move || {
            (0..200).for_each(|_| Figures::default().publish(&publishing));
            done.send(()).unwrap();
        });
        thread::spawn(move || {
            let mut link = subscribing.attach(Attach::internal(Face::Web, "subscriber")).unwrap();
            for number in 0..2000 {
                let filter = SharedFilter::split(&format!("a/{}", number % 10)).unwrap();
                link.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
                link.unsubscribe(&filter);
            }
            also_done.send(()).unwrap();
        });
        for _ in 0..2 {
            both.recv_timeout(Duration::from_secs(60)).expect("neither waits for the other");
        }
    }
}
