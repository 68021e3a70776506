//! What a listener has counted, for people and for Prometheus.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use thiserror::Error;

use super::{Shared, Transport};
use crate::clock::UnixMillis;
use crate::hub::{Place, Refused, Traffic};
use crate::observe::{Health, Kind, Metrics, Observe, Status};
use crate::proto::mqtt::ReasonCode;

#[derive(Debug)]
pub(super) struct Counters {
    since: UnixMillis,
    current: Arc<AtomicUsize>,
    /// Connections over the limit that stay until they have been told where else to go.
    in_excess: Arc<AtomicUsize>,
    pub traffic: Arc<Traffic>,
    refused: [Refusals; 5],
    pub failed_logins: AtomicU64,
    /// Logins refused unchecked, after too many wrong passwords from their address.
    pub delayed_logins: AtomicU64,
    pub failed_handshakes: AtomicU64,
    pub packets_in: AtomicU64,
    pub packets_out: AtomicU64,
    pub messages_in: AtomicU64,
    pub messages_out: AtomicU64,
    /// Messages larger than their receiver takes.
    pub too_large: AtomicU64,
    pub payload_format_invalid: AtomicU64,
    /// Messages that were here before; see [`crate::via`].
    pub looped: AtomicU64,
    protocol_errors: Mutex<BTreeMap<ReasonCode, u64>>,
    pub accept_fails: AtomicBool,
}

/// Connections refused for one reason.
#[derive(Debug, Default)]
struct Refusals {
    count: AtomicU64,
    /// The last connection was refused for it.
    lasting: AtomicBool,
}

/// Why a connection is refused unheard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    #[error("the listener has as many connections as its `max_connections` allows")]
    ListenerFull,
    #[error("{0}")]
    Gateway(Refused),
    #[error("they do not come from a proxy that the listener's `trusted_proxies` names")]
    NoProxy,
}

impl Refusal {
    /// In the order of [`Refusal::index`], as the `reason` label of the metric.
    const NAMES: [&str; 5] = ["listener_full", "gateway_full", "address_full", "address_rate", "no_proxy"];

    fn index(self) -> usize {
        match self {
            Self::ListenerFull => 0,
            Self::Gateway(Refused::GatewayFull) => 1,
            Self::Gateway(Refused::AddressFull) => 2,
            Self::Gateway(Refused::TooFast) => 3,
            Self::NoProxy => 4,
        }
    }
}

/// The places of one connection, with the listener and with the gateway; dropping it gives them back.
#[derive(Debug)]
pub(super) enum Admitted {
    Within(#[expect(dead_code, reason = "held for its drop")] (Counted, Place)),
    /// Over the limit, to be told where else to go.
    InExcess(#[expect(dead_code, reason = "held for its drop")] Counted),
}

/// How many connections over the limit may wait for their answer at a time: refusing must cost less than serving.
const MAX_IN_EXCESS: usize = 64;

/// A connection in one of the listener's counts.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Counters {
    pub fn new(since: UnixMillis, traffic: Arc<Traffic>) -> Self {
        Self {
            since,
            current: Arc::default(),
            in_excess: Arc::default(),
            traffic,
            refused: Default::default(),
            failed_logins: AtomicU64::new(0),
            delayed_logins: AtomicU64::new(0),
            failed_handshakes: AtomicU64::new(0),
            packets_in: AtomicU64::new(0),
            packets_out: AtomicU64::new(0),
            messages_in: AtomicU64::new(0),
            messages_out: AtomicU64::new(0),
            too_large: AtomicU64::new(0),
            payload_format_invalid: AtomicU64::new(0),
            looped: AtomicU64::new(0),
            protocol_errors: Mutex::default(),
            accept_fails: AtomicBool::new(false),
        }
    }

    /// Counts a connection, unless there are `max` already.
    pub fn admit(&self, max: usize) -> Option<Counted> {
        if self.current.load(Ordering::Relaxed) >= max {
            return None;
        }
        self.current.fetch_add(1, Ordering::Relaxed);
        Some(Counted(self.current.clone()))
    }

    /// Notes a connection that was let in.
    pub fn admitted(&self) {
        self.traffic.connections.fetch_add(1, Ordering::Relaxed);
        for refusals in &self.refused {
            refusals.lasting.store(false, Ordering::Relaxed);
        }
    }

    /// Notes one that was not; true for the first of its kind since one was let in.
    pub fn refuse(&self, refusal: Refusal) -> bool {
        let refusals = &self.refused[refusal.index()];
        refusals.count.fetch_add(1, Ordering::Relaxed);
        !refusals.lasting.swap(true, Ordering::Relaxed)
    }

    /// The place of a connection over the limit, for as long as it takes to say where else to go; there are few.
    pub fn admit_in_excess(&self) -> Option<Counted> {
        if self.in_excess.load(Ordering::Relaxed) >= MAX_IN_EXCESS {
            return None;
        }
        self.in_excess.fetch_add(1, Ordering::Relaxed);
        Some(Counted(self.in_excess.clone()))
    }

    pub fn protocol_error(&self, reason: ReasonCode) {
        *self.protocol_errors.lock().entry(reason).or_default() += 1;
    }
}

impl Observe for Shared {
    fn statuses(&self) -> Vec<Status> {
        let counters = &self.counters;
        let current = counters.current.load(Ordering::Relaxed);
        let notice = self.tls.as_ref().and_then(|tls| tls.expiry_notice(self.hub.clock().now()));
        let reason = if counters.accept_fails.load(Ordering::Relaxed) {
            Some("connections cannot be accepted; is the limit of open files (`LimitNOFILE`) reached?".into())
        } else if current >= self.max_connections {
            let limit = self.max_connections;
            Some(format!("the limit of {limit} connections is reached and more are refused; raise `max_connections`"))
        } else {
            notice
        };
        let what = match (self.transport, self.tls.is_some()) {
            (Transport::Mqtt, false) => "MQTT",
            (Transport::Mqtt, true) => "MQTT over TLS",
            (Transport::WebSocket, false) => "MQTT over WebSocket",
            (Transport::WebSocket, true) => "MQTT over secure WebSocket",
        };
        vec![Status {
            kind: Kind::Listener,
            name: self.name.clone(),
            parent: None,
            health: if reason.is_some() { Health::Degraded } else { Health::Good },
            reason,
            since: counters.since,
            facts: vec![
                ("address", self.address.to_string()),
                ("protocol", what.into()),
                ("connections", format!("{current} of {}", self.max_connections)),
            ],
        }]
    }

    fn collect(&self, metrics: &mut Metrics) {
        let counters = &self.counters;
        let labels: &[(&str, &str)] = &[("listener", &self.name)];
        let current = counters.current.load(Ordering::Relaxed);
        metrics.gauge("fieldgate_listener_connections", "Connections open now.", labels, current as f64);
        let mut count = |name, help, counter: &AtomicU64| {
            metrics.counter(name, help, labels, counter.load(Ordering::Relaxed));
        };
        count("fieldgate_listener_connections_total", "Connections accepted.", &counters.traffic.connections);
        count(
            "fieldgate_listener_logins_delayed_total",
            "CONNECTs refused unchecked, after too many wrong passwords from their address.",
            &counters.delayed_logins,
        );
        count("fieldgate_listener_logins_failed_total", "CONNECTs refused for their user.", &counters.failed_logins);
        count(
            "fieldgate_listener_handshakes_failed_total",
            "TLS and WebSocket handshakes that failed.",
            &counters.failed_handshakes,
        );
        count("fieldgate_listener_packets_received_total", "Packets received.", &counters.packets_in);
        count("fieldgate_listener_packets_sent_total", "PUBLISH and PUBREL packets sent.", &counters.packets_out);
        count("fieldgate_listener_messages_received_total", "PUBLISH packets received.", &counters.messages_in);
        count("fieldgate_listener_messages_sent_total", "PUBLISH packets sent.", &counters.messages_out);
        count("fieldgate_listener_bytes_received_total", "Bytes of MQTT received.", &counters.traffic.bytes_received);
        count("fieldgate_listener_bytes_sent_total", "Bytes of MQTT sent.", &counters.traffic.bytes_sent);
        count(
            "fieldgate_listener_messages_too_large_total",
            "Messages not sent because their receiver takes none so large.",
            &counters.too_large,
        );
        count(
            "fieldgate_listener_payload_format_invalid_total",
            "PUBLISH packets refused because their payload is not the UTF-8 it says it is.",
            &counters.payload_format_invalid,
        );
        count(
            "fieldgate_listener_messages_looped_total",
            "PUBLISH packets that were here before and are not wanted again, by way of other gateways.",
            &counters.looped,
        );
        for (whose, end) in self.tls.iter().flat_map(|tls| tls.ends(self.hub.clock().now())) {
            let labels = [("listener", self.name.as_str()), ("certificate", whose)];
            let help = "When the listener's certificate, or the next authority of clients' certificates, expires.";
            let name = "fieldgate_listener_certificate_expiry_timestamp_seconds";
            metrics.gauge(name, help, &labels, end.0 as f64 / 1000.0);
        }
        for (reason, refusals) in Refusal::NAMES.iter().zip(&counters.refused) {
            let labels = [("listener", self.name.as_str()), ("reason", reason)];
            let help = "Connections closed unheard, by the limit they went over.";
            let count = refusals.count.load(Ordering::Relaxed);
            metrics.counter("fieldgate_listener_connections_refused_total", help, &labels, count);
        }
        for (reason, count) in counters.protocol_errors.lock().iter() {
            let labels = [("listener", self.name.as_str()), ("reason", reason.text())];
            let help = "Connections closed because the client broke the protocol.";
            metrics.counter("fieldgate_listener_protocol_errors_total", help, &labels, *count);
        }
    }
}
