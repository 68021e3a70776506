//! What MQTT demands of a server, statement by statement: the manifests beside this file, and the tests that no other
//! test of the repository holds. Bytes in, bytes out, against the real listener and hub.

use std::time::Instant;

use fieldgate::hub::{self, QueueLimits, WhenFull};

// Shared with `tests/broker`, which uses the rest of it.
#[allow(dead_code)]
#[path = "../broker/harness.rs"]
mod harness;

mod connecting;
mod manifest;
mod older;
mod sessions;
mod subscribing;

/// A broker whose queues hold one message and refuse the next, and the session `to`, away and subscribed to `a`.
async fn broker_that_rejects(qos: u8) -> harness::Broker {
    let mut settings = hub::Settings::default();
    settings.limits.queue = QueueLimits { max_messages: 1, when_full: WhenFull::Reject, ..QueueLimits::default() };
    let broker = harness::Broker::start_with(|_| {}, settings, None).await;
    let mut to = broker.open().await;
    to.send(&harness::connect("to", 4, 0)).await;
    to.expect("20 02 00 00").await;
    to.send(&format!(r#"82 06 0001 0001 "a" {qos:02X} E0 00"#)).await;
    to.expect(&format!("90 03 0001 {qos:02X}")).await;
    to.expect_close(None).await;
    broker
}

/// Waits until the broker has seen that a client's connection is gone.
async fn until_away(broker: &harness::Broker, client_id: &str) {
    let patience = Instant::now() + harness::PATIENCE;
    while broker.hub.sessions().iter().any(|session| &*session.client_id == client_id && session.connected) {
        assert!(Instant::now() < patience, "still connected: {client_id}");
        tokio::task::yield_now().await;
    }
}
