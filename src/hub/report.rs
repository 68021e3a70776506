//! What the hub tells about itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::session::{Face, Session};
use super::{Hub, WhenFull};
use crate::clock::UnixMillis;
use crate::observe::{Metrics, Observe, Status};

/// A session as people and the API see it.
#[derive(Clone, Debug)]
pub struct SessionSummary {
    pub face: Face,
    pub client_id: Arc<str>,
    pub user: Option<Arc<str>>,
    pub peer: Option<String>,
    /// The version of the protocol that it speaks, as `5.0`.
    pub version: Option<&'static str>,
    pub connected: bool,
    /// Since when it is connected, or not.
    pub since: Option<UnixMillis>,
    pub durable: bool,
    pub subscriptions: Vec<Arc<str>>,
    pub queued_messages: u64,
    pub queued_bytes: u64,
    /// Sent and not yet acknowledged.
    pub inflight: u64,
    pub sent: u64,
    pub received: u64,
    pub dropped: u64,
}

/// What has come and gone over one listener since it was opened.
#[derive(Debug, Default)]
pub struct Traffic {
    pub connections: AtomicU64,
    pub bytes_received: AtomicU64,
    pub bytes_sent: AtomicU64,
}

/// What the hub has counted since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Sessions that ended as nobody came back in time.
    pub expired_sessions: AtomicU64,
    pub received: AtomicU64,
    pub sent: AtomicU64,
    /// Given up out of queues, or on the way into them.
    pub dropped: Drops,
    pub dropped_retained_full: AtomicU64,
    /// Refused to their publishers, as a queue with `when_full: reject` has no room.
    pub refused_queue_full: AtomicU64,
    pub refused_memory_full: AtomicU64,
    pub refused_store_full: AtomicU64,
    pub over_sessions: AtomicU64,
    pub over_subscriptions: AtomicU64,
    pub over_topic_levels: AtomicU64,
    pub over_topic_length: AtomicU64,
    pub denied_publish: AtomicU64,
    pub denied_subscribe: AtomicU64,
}

/// Messages that a queue, or all of them, have given up, by reason.
#[derive(Debug, Default)]
pub struct Drops {
    pub queue_full: AtomicU64,
    /// As the memory for all queues is used up.
    pub memory_full: AtomicU64,
    /// As the store has reached its limit.
    pub store_full: AtomicU64,
    pub expired: AtomicU64,
    /// Somebody wanted it: see [`Hub::purge`].
    pub purged: AtomicU64,
}

impl Drops {
    pub fn by_reason(&self) -> [(&'static str, u64); 5] {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("queue_full", count(&self.queue_full)),
            ("memory_full", count(&self.memory_full)),
            ("store_full", count(&self.store_full)),
            ("expired", count(&self.expired)),
            ("purged", count(&self.purged)),
        ]
    }

    pub fn total(&self) -> u64 {
        self.by_reason().iter().map(|(_, count)| count).sum()
    }
}

/// What a queue has given up, and why it still does.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    pub by_reason: [(&'static str, u64); 5],
    /// What is full, while that goes on, and what happens to messages then.
    pub lacking: Option<(&'static str, WhenFull)>,
}

impl Counters {
    /// Messages given up, for whatever reason.
    pub fn dropped(&self) -> u64 {
        self.dropped_by_reason().iter().map(|(_, count)| count).sum()
    }

    pub fn dropped_by_reason(&self) -> [(&'static str, u64); 6] {
        let [queue, memory, store, expired, purged] = self.dropped.by_reason();
        [queue, memory, store, expired, purged, ("retained_full", self.dropped_retained_full.load(Ordering::Relaxed))]
    }
}

impl Hub {
    /// Where a listener counts what the `$SYS` topics tell about all of them.
    pub fn traffic(&self) -> Arc<Traffic> {
        let traffic = Arc::<Traffic>::default();
        self.0.traffic.lock().push(traffic.clone());
        traffic
    }

    /// Every session, for people and the API.
    pub fn sessions(&self) -> Vec<SessionSummary> {
        let sessions: Vec<_> = self.0.sessions.lock().values().cloned().collect();
        let mut summaries: Vec<_> = sessions.iter().map(|session| summary(session)).collect();
        summaries.sort_by(|a, b| (a.face, &a.client_id).cmp(&(b.face, &b.client_id)));
        summaries
    }

    /// Messages waiting or unacknowledged in one session's queue, and their bytes; `None` where there is no such session.
    pub fn queued(&self, face: Face, client_id: &str) -> Option<(u64, u64)> {
        let session = self.session(face, client_id)?;
        let state = session.state.lock();
        Some((state.queue.len(), state.queue.bytes()))
    }

    /// What one session's queue has given up; `None` where there is no such session.
    pub fn losses(&self, face: Face, client_id: &str) -> Option<Losses> {
        let session = self.session(face, client_id)?;
        let lacking = session.lacking(self.store()).map(|what| (what, session.limits().when_full));
        Some(Losses { by_reason: session.counters.dropped.by_reason(), lacking })
    }

    pub(super) fn session(&self, face: Face, client_id: &str) -> Option<Arc<Session>> {
        self.0.sessions.lock().get(&(face, client_id.into())).cloned()
    }
}

fn summary(session: &Session) -> SessionSummary {
    let state = session.state.lock();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    SessionSummary {
        face: session.face,
        client_id: session.client_id.clone(),
        user: session.identity.user.clone(),
        peer: state.attached.as_ref().and_then(|attached| attached.peer.clone()),
        version: state.attached.as_ref().and_then(|attached| attached.version),
        connected: state.attached.is_some(),
        since: state.attached.as_ref().map(|attached| attached.since).or(state.detached_at),
        durable: session.durable,
        subscriptions: state.subscriptions.keys().cloned().collect(),
        queued_messages: state.queue.len(),
        queued_bytes: state.queue.bytes(),
        inflight: state.queue.outstanding() as u64,
        sent: count(&session.counters.sent),
        received: count(&session.counters.received),
        dropped: session.counters.dropped.total(),
    }
}

impl Observe for Hub {
    fn statuses(&self) -> Vec<Status> {
        Vec::new()
    }

    fn collect(&self, metrics: &mut Metrics) {
        let counters = &self.0.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let received = "Messages accepted from clients, devices and upstreams.";
        metrics.counter("fieldgate_hub_messages_received_total", received, &[], count(&counters.received));
        let sent = "Messages handed to receivers.";
        metrics.counter("fieldgate_hub_messages_sent_total", sent, &[], count(&counters.sent));
        let dropped = "Messages given up, by reason.";
        for (reason, count) in counters.dropped_by_reason() {
            metrics.counter("fieldgate_hub_messages_dropped_total", dropped, &[("reason", reason)], count);
        }
        let refused = "Messages refused to their publishers by `when_full: reject`, by reason.";
        for (reason, counter) in [
            ("queue_full", &counters.refused_queue_full),
            ("memory_full", &counters.refused_memory_full),
            ("store_full", &counters.refused_store_full),
        ] {
            metrics.counter("fieldgate_hub_messages_refused_total", refused, &[("reason", reason)], count(counter));
        }
        let over = "Requests refused because of a limit, by limit.";
        for (limit, counter) in [
            ("max_sessions", &counters.over_sessions),
            ("max_subscriptions", &counters.over_subscriptions),
            ("max_topic_levels", &counters.over_topic_levels),
            ("max_topic_length", &counters.over_topic_length),
        ] {
            metrics.counter("fieldgate_hub_over_limit_total", over, &[("limit", limit)], count(counter));
        }
        let denied = "Requests that the access rules denied.";
        for (request, counter) in [("publish", &counters.denied_publish), ("subscribe", &counters.denied_subscribe)] {
            metrics.counter("fieldgate_hub_denied_total", denied, &[("request", request)], count(counter));
        }
        let sessions = self.sessions();
        for (state, connected) in [("connected", true), ("detached", false)] {
            let number = sessions.iter().filter(|session| session.connected == connected).count();
            let labels = [("state", state)];
            metrics.gauge("fieldgate_hub_sessions", "Sessions, by state.", &labels, number as f64);
        }
        let queued: u64 = sessions.iter().map(|session| session.queued_messages).sum();
        metrics.gauge("fieldgate_hub_queued_messages", "Messages waiting in all queues.", &[], queued as f64);
        let bytes: u64 = sessions.iter().map(|session| session.queued_bytes).sum();
        metrics.gauge("fieldgate_hub_queued_bytes", "Bytes waiting in all queues.", &[], bytes as f64);
        let inflight: u64 = sessions.iter().map(|session| session.inflight).sum();
        let help = "QoS 1 and 2 messages sent and not yet acknowledged.";
        metrics.gauge("fieldgate_hub_inflight_messages", help, &[], inflight as f64);
        let memory = &self.0.memory;
        let help = "Memory that the messages in all queues take, of `limits.max_queue_memory`.";
        metrics.gauge("fieldgate_hub_queue_memory_bytes", help, &[], memory.used() as f64);
        let subscriptions = self.0.routes.read().len();
        metrics.gauge("fieldgate_hub_subscriptions", "Subscriptions.", &[], subscriptions as f64);
        let (messages, bytes) = {
            let retained = self.0.retained.read();
            (retained.len(), retained.bytes())
        };
        metrics.gauge("fieldgate_hub_retained_messages", "Retained messages.", &[], messages as f64);
        metrics.gauge("fieldgate_hub_retained_bytes", "Bytes of retained messages.", &[], bytes as f64);
    }
}
