//! What the web floor needs from the gateway it stands in, and the state of things in the words of the API.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use thiserror::Error;

use super::uplinks::{Backlog, Depth, Outlook};
use crate::hub::{Hub, SessionSummary};
use crate::observe::{Health, Kind, Observe, Status};

/// The gateway as the web UI sees and steers it; implemented by `gateway`.
pub trait Controls: Send + Sync {
    /// Everything that runs now; a reload of the configuration changes it.
    fn components(&self) -> Vec<Arc<dyn Observe>>;

    /// The upstreams in the order of the configuration.
    fn upstreams(&self) -> Vec<Upstream>;

    /// Cuts, restores or connects an upstream. What is published while it is cut waits in its queue.
    ///
    /// # Errors
    /// [`ControlError`]: no such upstream, or it cannot be done now.
    fn switch_upstream(&self, name: &str, to: Switch) -> Result<(), ControlError>;
}

/// What a person may want of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    Cut,
    /// To connect: at once, or when its configuration says so.
    Restore,
    /// To connect at once, whatever its configuration says.
    Connect,
}

/// An upstream and its queue.
#[derive(Clone, Debug)]
pub struct Upstream {
    pub name: String,
    /// Whether it connects only if a person says so.
    pub paused: bool,
    /// What it is doing, in one word.
    pub state: &'static str,
    /// When it is to be connected, in the word of the configuration.
    pub connection: &'static str,
    pub depth: Depth,
    /// Messages that did not cross since the start, by reason.
    pub dropped: BTreeMap<&'static str, u64>,
    /// While one drains.
    pub backlog: Option<Backlog>,
}

/// Messages since the start of the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Accepted from clients, sensors, adapters and upstreams.
    pub received: u64,
    /// Handed to subscribers.
    pub sent: u64,
    /// Given up because of a limit or their expiry.
    pub dropped: u64,
}

impl Traffic {
    pub fn of(hub: &Hub) -> Self {
        let counters = hub.counters();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Self { received: count(&counters.received), sent: count(&counters.sent), dropped: counters.dropped() }
    }
}

/// A session on the hub.
#[derive(Clone, Debug, Serialize)]
pub struct Session {
    client_id: String,
    user: Option<String>,
    /// What it is: `mqtt`, `mqtt-sn`, `upstream`, `adapter`, `web`.
    face: &'static str,
    peer: Option<String>,
    /// The version of the protocol that it speaks, as `5.0`; of a client that is connected.
    version: Option<&'static str>,
    connected: bool,
    /// Since when it is connected or away; RFC 3339.
    since: Option<String>,
    /// Kept over a restart.
    durable: bool,
    queued_messages: u64,
    queued_bytes: u64,
    sent: u64,
    received: u64,
    dropped: u64,
    /// Topic filters; the first [`MAX_FILTERS`] of them.
    subscriptions: Vec<String>,
    subscription_count: usize,
}

/// Topic filters shown of one session.
const MAX_FILTERS: usize = 20;

/// Sessions for people to look at.
#[derive(Debug, Serialize)]
pub struct Sessions {
    clients: Vec<Session>,
    total: usize,
    connected: usize,
    /// How many have what was searched for; `clients` are the first of them.
    found: usize,
}

impl Sessions {
    /// At most `limit` of the sessions that have `word` in what tells them apart, connected ones first.
    pub fn search(hub: &Hub, word: &str, limit: usize) -> Self {
        let mut all = hub.sessions();
        let (total, connected) = (all.len(), all.iter().filter(|session| session.connected).count());
        let word = word.to_lowercase();
        if !word.is_empty() {
            all.retain(|session| has(session, &word));
        }
        all.sort_by_key(|session| !session.connected);
        let found = all.len();
        Self { clients: all.into_iter().take(limit).map(Session::from).collect(), total, connected, found }
    }
}

/// Whether a session has `word`, in lower case, in its client id, user, address, face or topic filters.
fn has(session: &SessionSummary, word: &str) -> bool {
    let names =
        [Some(&*session.client_id), session.user.as_deref(), session.peer.as_deref(), Some(session.face.name())];
    let filters = session.subscriptions.iter().map(|filter| &**filter);
    names.into_iter().flatten().chain(filters).any(|text| text.to_lowercase().contains(word))
}

impl From<SessionSummary> for Session {
    fn from(summary: SessionSummary) -> Self {
        Self {
            client_id: summary.client_id.to_string(),
            user: summary.user.map(|user| user.to_string()),
            face: summary.face.name(),
            peer: summary.peer,
            version: summary.version,
            connected: summary.connected,
            since: summary.since.map(|since| since.to_string()),
            durable: summary.durable,
            queued_messages: summary.queued_messages,
            queued_bytes: summary.queued_bytes,
            sent: summary.sent,
            received: summary.received,
            dropped: summary.dropped,
            subscription_count: summary.subscriptions.len(),
            subscriptions: summary.subscriptions.iter().take(MAX_FILTERS).map(ToString::to_string).collect(),
        }
    }
}

/// Why a control did nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ControlError {
    #[error("there is no upstream named `{0}`")]
    UnknownUpstream(String),
    #[error("{0}")]
    Refused(String),
}

/// The state of one component.
#[derive(Serialize)]
pub struct Component {
    kind: &'static str,
    name: String,
    parent: Option<String>,
    health: &'static str,
    reason: Option<String>,
    since: String,
    /// Label and value, in display order.
    facts: Vec<(&'static str, String)>,
}

impl From<Status> for Component {
    fn from(status: Status) -> Self {
        Self {
            kind: status.kind.name(),
            name: status.name,
            parent: status.parent,
            health: status.health.name(),
            reason: status.reason,
            since: status.since.to_string(),
            facts: status.facts,
        }
    }
}

/// How the gateway is as a whole.
///
/// One dead device or upstream among others is `degraded`. `down` is what stops the gateway's own work: the store, or
/// every listener. What the operator paused is not a fault.
pub fn overall(statuses: &[Status]) -> Health {
    let of = |kind: Kind| statuses.iter().filter(move |status| status.kind == kind);
    let is_down = |status: &Status| status.health == Health::Down;
    let listeners = of(Kind::Listener).count();
    if of(Kind::Store).any(is_down) || (listeners > 0 && of(Kind::Listener).all(is_down)) {
        return Health::Down;
    }
    let any = |health: &[Health]| statuses.iter().any(|status| health.contains(&status.health));
    if any(&[Health::Down, Health::Degraded]) {
        Health::Degraded
    } else if any(&[Health::Starting]) {
        Health::Starting
    } else {
        Health::Good
    }
}

/// An upstream in full.
#[derive(Serialize)]
pub struct UpstreamView {
    pub name: String,
    pub paused: bool,
    pub state: &'static str,
    pub connection: &'static str,
    /// `None` when it tells nothing of itself.
    pub status: Option<Component>,
    pub queue: Depth,
    pub dropped: BTreeMap<&'static str, u64>,
    pub backlog: Option<Backlog>,
    pub outlook: Outlook,
    /// Messages in the queue, one sample a second, oldest first; empty in events.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;

    #[test]
    fn overall_health_is_about_the_gateway_not_about_one_device() {
        use Health::{Degraded, Down, Good, Paused, Starting};
        let check = |parts: &[(Kind, Health)], expected: Health| {
            let status = |(kind, health): &(Kind, Health)| Status {
                kind: *kind,
                name: String::new(),
                parent: None,
                health: *health,
                reason: None,
                since: UnixMillis(0),
                facts: Vec::new(),
            };
            assert_eq!(overall(&parts.iter().map(status).collect::<Vec<_>>()), expected, "{parts:?}");
        };
        check(&[], Good);
        check(&[(Kind::Device, Good), (Kind::Upstream, Paused)], Good);
        check(&[(Kind::Device, Down), (Kind::Device, Starting)], Degraded);
        check(&[(Kind::Upstream, Starting)], Starting);
        check(&[(Kind::Store, Degraded)], Degraded);
        check(&[(Kind::Store, Down)], Down);
        check(&[(Kind::Listener, Down), (Kind::Listener, Good)], Degraded);
        check(&[(Kind::Listener, Down), (Kind::Device, Good)], Down);
    }
}
