//! What MQTT demands of a server, statement by statement: the manifests beside this file, and the tests that no other
//! test of the repository holds. Bytes in, bytes out, against the real listener and hub.

use std::time::Instant;

// Shared with `tests/broker`, which uses the rest of it.
#[allow(dead_code)]
#[path = "../broker/harness.rs"]
mod harness;

mod connecting;
mod manifest;
mod older;
mod sessions;
mod subscribing;

/// Waits until the broker has seen that a client's connection is gone.
async fn until_away(broker: &harness::Broker, client_id: &str) {
    let patience = Instant::now() + harness::PATIENCE;
    while broker.hub.sessions().iter().any(|session| &*session.client_id == client_id && session.connected) {
        assert!(Instant::now() < patience, "still connected: {client_id}");
        tokio::task::yield_now().await;
    }
}
