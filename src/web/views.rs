//! What the web floor needs from the gateway it stands in, and the state of things in the words of the API.

use std::sync::Arc;

use serde::Serialize;
use thiserror::Error;

use super::uplinks::{Depth, Outlook};
use crate::observe::{Health, Kind, Observe, Status};

/// The gateway as the web UI sees and steers it; implemented by `gateway`.
pub trait Controls: Send + Sync {
    /// Everything that runs now; a reload of the configuration changes it.
    fn components(&self) -> Vec<Arc<dyn Observe>>;

    /// The upstreams in the order of the configuration.
    fn upstreams(&self) -> Vec<Upstream>;

    /// Cuts or restores an upstream. What is published meanwhile waits in its queue.
    ///
    /// # Errors
    /// [`ControlError`]: no such upstream, or it cannot be done now.
    fn set_upstream_paused(&self, name: &str, paused: bool) -> Result<(), ControlError>;

    /// Up to `limit` sessions, connected ones first, and how many there are in all.
    fn sessions(&self, limit: usize) -> (Vec<Session>, usize);

    /// Messages since the start.
    fn traffic(&self) -> Traffic;

    /// Checks a password. Takes as long as a password hash takes, so it is called on a thread for blocking work.
    fn authenticate(&self, user: &str, password: &str) -> bool;
}

/// An upstream and its queue.
#[derive(Clone, Debug)]
pub struct Upstream {
    pub name: String,
    pub paused: bool,
    pub depth: Depth,
}

/// Messages since the start of the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Accepted from clients, sensors, adapters and upstreams.
    pub received: u64,
    /// Handed to subscribers.
    pub sent: u64,
    /// Not delivered because of a limit.
    pub dropped: u64,
}

/// A session on the hub.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Session {
    pub client_id: String,
    pub user: Option<String>,
    /// What it is: `mqtt`, `mqtt-sn`, `upstream`, `adapter`, `web`.
    pub face: &'static str,
    /// As in `MQTT 5.0`; empty for what is inside the gateway.
    pub protocol: String,
    pub peer: Option<String>,
    pub connected: bool,
    /// Since when it is connected or away; RFC 3339.
    pub since: String,
    pub queued_messages: u64,
    pub queued_bytes: u64,
    pub inflight: u64,
    /// Topic filters; the first [`MAX_FILTERS`] of them.
    pub subscriptions: Vec<String>,
    pub subscription_count: usize,
}

/// Topic filters shown of one session.
pub const MAX_FILTERS: usize = 20;

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
    /// `None` when it tells nothing of itself.
    pub status: Option<Component>,
    pub queue: Depth,
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
