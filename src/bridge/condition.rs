//! How an upstream is doing: what its task writes down, and what people, scrapes and the web UI read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, watch};

use super::drain::Progress;
use super::settings::Connection;
use crate::clock::UnixMillis;
use crate::hub::{Face, Hub, Losses, WhenFull};
use crate::observe::{Health, Kind, Metrics, Observe, Status};
use crate::tls::ClientTls;

/// What the task of one upstream shares with those who look at it.
pub(super) struct Shared {
    pub name: String,
    /// The session on the hub.
    pub session: Arc<str>,
    pub hub: Hub,
    /// Once they could be read; `None` where none are needed.
    pub tls: Mutex<Option<Arc<ClientTls>>>,
    /// When to be connected, as configured.
    pub connection: Connection,
    /// What the operator wants now.
    pub wish: watch::Sender<Wish>,
    pub condition: Mutex<Condition>,
    /// Told when `condition` has changed.
    pub changed: Notify,
    pub counters: Counters,
    /// The log has said that a gateway is spoken to in 3.1.1.
    pub told_of_version: AtomicBool,
}

/// What an upstream is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Starting,
    Connecting,
    Connected,
    /// Between two attempts.
    Waiting,
    /// Not connected because nothing waits; `connection: lazy`.
    Idle,
    /// Not connected because no window is open; `connection: scheduled`.
    Scheduled,
    /// Cut by the operator, or waiting for one to say that it may connect.
    Paused,
    Stopped,
}

impl Phase {
    const ALL: [Self; 8] = [
        Self::Starting,
        Self::Connecting,
        Self::Connected,
        Self::Waiting,
        Self::Idle,
        Self::Scheduled,
        Self::Paused,
        Self::Stopped,
    ];

    /// The name in the state topic, the API and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Waiting => "waiting",
            Self::Idle => "idle",
            Self::Scheduled => "scheduled",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }

    /// Whether it is meant not to be connected.
    fn is_rest(self) -> bool {
        matches!(self, Self::Idle | Self::Scheduled | Self::Paused)
    }
}

/// What the operator wants of an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Wish {
    /// What the configuration says.
    #[default]
    AsConfigured,
    Cut,
    /// To be connected now. Where the configuration says when, until nothing has crossed for the idle timeout.
    Connect,
}

#[derive(Clone, Debug)]
pub(super) struct Condition {
    pub phase: Phase,
    /// Since when the upstream is connected, or not.
    pub since: UnixMillis,
    /// Why it is not connected, or what a person should look at although it is.
    pub reason: Option<String>,
    /// The address in use or last tried.
    pub address: Option<String>,
    /// The version of MQTT spoken.
    pub version: Option<&'static str>,
    pub next_attempt: Option<UnixMillis>,
    /// How the backlog goes, while there is one.
    pub progress: Option<Progress>,
    /// What ended the last connection or attempt, and when; kept once the upstream is connected again.
    pub last_error: Option<(UnixMillis, String)>,
    /// What was given up last on its way to the upstream, when, and why.
    pub last_drop: Option<(UnixMillis, DropReason, String)>,
}

impl Condition {
    pub fn new(now: UnixMillis) -> Self {
        Self {
            phase: Phase::Starting,
            since: now,
            reason: None,
            address: None,
            version: None,
            next_attempt: None,
            progress: None,
            last_error: None,
            last_drop: None,
        }
    }

    /// Goes to `phase`. `since` moves only when the connection comes or goes.
    pub fn enter(&mut self, phase: Phase, reason: Option<String>, now: UnixMillis) {
        if (self.phase == Phase::Connected) != (phase == Phase::Connected) || self.phase.is_rest() != phase.is_rest() {
            self.since = now;
        }
        self.phase = phase;
        self.reason = reason;
        self.next_attempt = None;
        self.progress = None;
    }

    /// `needs_attention` says whether a certificate expires soon, or messages are lost.
    fn health(&self, needs_attention: bool) -> Health {
        match (self.phase, &self.reason) {
            (phase, _) if phase.is_rest() => {
                if needs_attention {
                    Health::Degraded
                } else {
                    Health::Paused
                }
            }
            (Phase::Connected, None) if !needs_attention => Health::Good,
            (Phase::Connected, _) => Health::Degraded,
            (Phase::Starting | Phase::Connecting, None) => Health::Starting,
            _ => Health::Down,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub connections: AtomicU64,
    pub failures: AtomicU64,
    /// Handed to the upstream for good: acknowledged by it, or QoS 0 and written.
    pub sent: AtomicU64,
    pub received: AtomicU64,
    /// How long something waited for `max_rate`, in nanoseconds.
    pub held_back_nanos: AtomicU64,
    /// Sent at a lower QoS, or not retained, because the upstream cannot do better.
    pub lowered: AtomicU64,
    /// Sent without the origin that their rule wants.
    pub without_provenance: AtomicU64,
    dropped: [AtomicU64; DropReason::ALL.len()],
}

/// Why a message did not cross the bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum DropReason {
    /// Larger than the upstream accepts.
    TooLarge,
    /// Its topic with the prefix is longer than MQTT allows.
    TopicTooLong,
    /// No rule wants it any more; it was queued under an older configuration.
    NoRule,
    /// The upstream answered with an error.
    Refused,
    /// It came from the upstream, and no `in` rule wants it.
    Unwanted,
    /// It came from the upstream, and the hub did not take it.
    NotTaken,
    /// It goes in circles: it was here before, or has crossed as many bridges as `max_hops` allows.
    Looped,
    /// Older than its rule's `message_expiry`, or its own, allows.
    Expired,
}

impl DropReason {
    const ALL: [Self; 8] = [
        Self::TooLarge,
        Self::TopicTooLong,
        Self::NoRule,
        Self::Refused,
        Self::Unwanted,
        Self::NotTaken,
        Self::Looped,
        Self::Expired,
    ];

    /// The label in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::TopicTooLong => "topic_too_long",
            Self::NoRule => "no_rule",
            Self::Refused => "refused",
            Self::Unwanted => "unwanted",
            Self::NotTaken => "not_taken",
            Self::Looped => "looped",
            Self::Expired => "expired",
        }
    }
}

impl Counters {
    pub fn drop(&self, reason: DropReason) {
        self.dropped[reason as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// The retained JSON on `$SYS/fieldgate/upstreams/{name}`.
#[derive(Serialize)]
struct Report<'a> {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    since: String,
    queued: u64,
    /// When it is meant to connect, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_attempt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backlog: Option<Progress>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<&'a str>,
}

impl Shared {
    /// What a person should look at: why the upstream is not connected, or what will end it.
    fn reason(&self, condition: &Condition) -> Option<String> {
        let reason = condition.reason.clone().or_else(|| self.expiry_notice());
        match (self.losses().lacking.map(loss_notice), reason) {
            (Some(loss), Some(reason)) => Some(format!("{loss}; {reason}")),
            (loss, reason) => loss.or(reason),
        }
    }

    fn losses(&self) -> Losses {
        self.hub.losses(Face::Upstream, &self.session).unwrap_or_default()
    }

    /// Messages that did not cross the bridge since the start, by reason: out of the queue, or on the way.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        let on_the_way = DropReason::ALL.iter().zip(&self.counters.dropped);
        let mut all: Vec<_> =
            on_the_way.map(|(reason, count)| (reason.name(), count.load(Ordering::Relaxed))).collect();
        for (reason, count) in self.losses().by_reason {
            match all.iter_mut().find(|(name, _)| *name == reason) {
                Some((_, sum)) => *sum += count,
                None => all.push((reason, count)),
            }
        }
        all
    }

    /// What to tell a person about certificates that expire.
    pub fn expiry_notice(&self) -> Option<String> {
        self.tls.lock().as_ref().and_then(|tls| tls.expiry_notice(self.now()))
    }

    pub fn now(&self) -> UnixMillis {
        self.hub.clock().now()
    }

    /// Notes what the operator wants.
    pub fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|now| std::mem::replace(now, wish) != wish);
    }

    /// Goes to `phase`; see [`Condition::enter`].
    pub fn enter(&self, phase: Phase, reason: Option<String>) {
        self.condition.lock().enter(phase, reason, self.now());
        self.changed.notify_one();
    }

    /// Notes what a person should look at although the upstream is connected.
    pub fn note(&self, reason: String) {
        let mut condition = self.condition.lock();
        condition.reason = Some(match condition.reason.take() {
            Some(before) if before.contains(&reason) => before,
            Some(before) => format!("{before}; {reason}"),
            None => reason,
        });
        drop(condition);
        self.changed.notify_one();
    }

    /// Counts a message that was given up on its way to the upstream, and notes `what` it was.
    pub fn dropped(&self, reason: DropReason, what: impl FnOnce() -> String) {
        self.counters.drop(reason);
        self.condition.lock().last_drop = Some((self.now(), reason, what()));
    }

    /// Messages and bytes that wait for this upstream.
    pub fn queued(&self) -> (u64, u64) {
        self.hub.queued(Face::Upstream, &self.session).unwrap_or((0, 0))
    }

    /// The payload for `$SYS/fieldgate/upstreams/{name}`.
    pub fn report(&self) -> String {
        let condition = self.condition.lock().clone();
        let reason = self.reason(&condition);
        let report = Report {
            state: condition.phase.name(),
            reason: reason.as_deref(),
            since: condition.since.to_string(),
            queued: self.queued().0,
            next_attempt: condition.next_attempt.map(|at| at.to_string()),
            backlog: condition.progress,
            address: condition.address.as_deref(),
        };
        serde_json::to_string(&report).unwrap_or_default()
    }
}

impl Observe for Shared {
    fn statuses(&self) -> Vec<Status> {
        let condition = self.condition.lock().clone();
        let reason = self.reason(&condition);
        let (messages, bytes) = self.queued();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed).to_string();
        let mut facts = Vec::new();
        if let Some(address) = &condition.address {
            facts.push(("address", address.clone()));
        }
        if self.connection != Connection::Always {
            facts.push(("connects", self.connection.name().to_owned()));
        }
        if condition.phase == Phase::Connected {
            facts.push(("connected since", condition.since.to_string()));
            facts.extend(condition.version.map(|version| ("MQTT", version.to_owned())));
        }
        facts.push(("waiting", format!("{messages} messages, {bytes} bytes")));
        facts.extend(condition.progress.map(|progress| ("backlog", progress.to_string())));
        facts.push(("sent", count(&self.counters.sent)));
        facts.push(("received", count(&self.counters.received)));
        facts.extend(spell(&self.drops()).map(|dropped| ("dropped", dropped)));
        facts.extend(condition.next_attempt.map(|at| ("next attempt", at.to_string())));
        // Said already where it is why there is no connection.
        if let Some((at, error)) =
            condition.last_error.as_ref().filter(|(_, error)| condition.reason.as_ref() != Some(error))
        {
            facts.push(("last error", format!("{at}: {error}")));
        }
        if let Some((at, reason, what)) = &condition.last_drop {
            facts.push(("last dropped", format!("{at}: {what}: {}", reason.name())));
        }
        vec![Status {
            kind: Kind::Upstream,
            name: self.name.clone(),
            parent: None,
            health: condition.health(self.expiry_notice().is_some() || self.losses().lacking.is_some()),
            reason,
            since: condition.since,
            facts,
        }]
    }

    fn collect(&self, metrics: &mut Metrics) {
        let upstream = [("upstream", self.name.as_str())];
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { connections, failures, sent, received, held_back_nanos, lowered, without_provenance, .. } =
            &self.counters;
        let condition = self.condition.lock().clone();
        let phase = condition.phase;
        let connected = phase == Phase::Connected;
        let (messages, bytes) = self.queued();
        collect_queue(metrics, &upstream, messages, bytes);
        let gauge = &mut |name, help, value| metrics.gauge(name, help, &upstream, value);
        gauge("fieldgate_upstream_connected", "1 while the upstream is connected.", f64::from(connected));
        let backlog = condition.progress.map_or(if connected { 0 } else { messages }, |progress| progress.messages);
        let seconds = condition.progress.map_or((backlog == 0).then_some(0), |progress| progress.seconds_left);
        let help =
            "Messages waiting that piled up: all while the upstream is away, those of a backlog while it drains.";
        gauge("fieldgate_upstream_backlog_messages", help, backlog as f64);
        let help = "Seconds until the backlog is gone if it goes on like this; +Inf while it does not get smaller.";
        gauge("fieldgate_upstream_backlog_seconds", help, seconds.map_or(f64::INFINITY, |seconds| seconds as f64));
        let held_back = Duration::from_nanos(count(held_back_nanos));
        let help = "Time in which messages waited for `max_rate`.";
        metrics.seconds("fieldgate_upstream_held_back_seconds_total", help, &upstream, held_back);
        let counter = &mut |name, help, value| metrics.counter(name, help, &upstream, value);
        counter("fieldgate_upstream_connections_total", "Connections made.", count(connections));
        counter("fieldgate_upstream_failures_total", "Connections lost and attempts that failed.", count(failures));
        counter("fieldgate_upstream_messages_sent_total", "Messages the upstream has taken.", count(sent));
        counter("fieldgate_upstream_messages_received_total", "Messages from the upstream.", count(received));
        let help = "Messages sent at a lower QoS or not retained, because the upstream cannot do better.";
        counter("fieldgate_upstream_messages_lowered_total", help, count(lowered));
        let help =
            "Messages sent without the `provenance` of their rule: empty, too large with it, or over MQTT 3.1.1.";
        counter("fieldgate_upstream_messages_without_provenance_total", help, count(without_provenance));
        for (whose, end) in self.tls.lock().iter().flat_map(|tls| tls.ends(self.now())) {
            let labels = [("upstream", self.name.as_str()), ("certificate", whose)];
            let help = "When the own certificate, or the next authority of the `ca` file, expires.";
            let name = "fieldgate_upstream_certificate_expiry_timestamp_seconds";
            metrics.gauge(name, help, &labels, end.0 as f64 / 1000.0);
        }
        for possible in Phase::ALL {
            let labels = [("upstream", self.name.as_str()), ("state", possible.name())];
            let help = "1 for what the upstream is doing, 0 for what it is not.";
            metrics.gauge("fieldgate_upstream_state", help, &labels, f64::from(phase == possible));
        }
        for (reason, value) in self.drops() {
            let labels = [("upstream", self.name.as_str()), ("reason", reason)];
            let help =
                "Messages that did not cross the bridge, by reason; what its queue gave up counts for the hub too.";
            metrics.counter("fieldgate_upstream_messages_dropped_total", help, &labels, value);
        }
    }
}

/// What a queue without room does, for people.
fn loss_notice((lacking, when_full): (&'static str, WhenFull)) -> String {
    let loss = match when_full {
        WhenFull::DropOldest => "the oldest messages are given up for new ones",
        WhenFull::DropNewest => "new messages are given up",
        WhenFull::Reject => "new messages are refused to their publishers",
    };
    format!("{lacking}: {loss}")
}

/// `1200 queue full, 3 too large`; `None` where nothing was dropped.
fn spell(dropped: &[(&str, u64)]) -> Option<String> {
    let words = dropped.iter().filter(|(_, count)| *count > 0);
    let words: Vec<_> = words.map(|(reason, count)| format!("{count} {}", reason.replace('_', " "))).collect();
    (!words.is_empty()).then(|| words.join(", "))
}

/// How much waits for an upstream, also for one that is not configured any more.
pub(super) fn collect_queue(metrics: &mut Metrics, upstream: &[(&str, &str)], messages: u64, bytes: u64) {
    metrics.gauge(
        "fieldgate_upstream_queued_messages",
        "Messages waiting for the upstream.",
        upstream,
        messages as f64,
    );
    metrics.gauge("fieldgate_upstream_queued_bytes", "Bytes waiting for the upstream.", upstream, bytes as f64);
}
