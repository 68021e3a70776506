//! Upstreams that the configuration does not name any more, and what waits for them.
//!
//! What was acknowledged is not thrown away because a section was taken out, or renamed. But nothing is added to what
//! nobody sends, and it does not wait unseen.

use tracing::{info, warn};

use super::attach;
use crate::clock::UnixMillis;
use crate::hub::{Face, Hub, SessionExpiry};
use crate::observe::{Health, Kind, Metrics, Observe, Status};

/// An upstream that was taken out of the configuration with messages in its queue.
pub struct Former {
    hub: Hub,
    name: String,
    since: UnixMillis,
}

/// Ends the subscriptions of upstreams that are not among `configured`, and the sessions of those for which nothing
/// waits. Returns the others.
pub fn let_go(hub: &Hub, configured: &[&str]) -> Vec<Former> {
    let mut formers = Vec::new();
    for session in hub.sessions() {
        let name = &session.client_id;
        if session.face != Face::Upstream || configured.contains(&&**name) {
            continue;
        }
        // The session exists, so no limit stands in the way.
        let Ok(mut link) = attach(hub, name, 1, None, None) else { continue };
        for filter in link.subscriptions() {
            link.unsubscribe(&filter);
        }
        let waits = session.queued_messages > 0;
        link.detach(false, (!waits).then_some(SessionExpiry::OnDetach));
        if !waits {
            info!(upstream = %name, "the upstream is not configured any more, and nothing waits for it");
            continue;
        }
        let former = Former { hub: hub.clone(), name: name.to_string(), since: hub.clock().now() };
        warn!(upstream = %name, "{}", former.reason(session.queued_messages));
        formers.push(former);
    }
    formers
}

impl Former {
    fn reason(&self, messages: u64) -> String {
        let name = &self.name;
        format!(
            "not configured any more, and {messages} messages wait for it; they go out when an upstream is called `{name}` \
             again, `fieldgate store export {name}` shows them, `fieldgate store purge {name}` gives them up"
        )
    }
}

impl Observe for Former {
    fn statuses(&self) -> Vec<Status> {
        let Some((messages @ 1.., bytes)) = self.hub.queued(Face::Upstream, &self.name) else { return Vec::new() };
        vec![Status {
            kind: Kind::Upstream,
            name: self.name.clone(),
            parent: None,
            health: Health::Degraded,
            reason: Some(self.reason(messages)),
            since: self.since,
            facts: vec![("waiting", format!("{messages} messages, {bytes} bytes"))],
        }]
    }

    fn collect(&self, metrics: &mut Metrics) {
        let (messages, bytes) = self.hub.queued(Face::Upstream, &self.name).unwrap_or_default();
        let upstream = [("upstream", self.name.as_str())];
        super::condition::collect_queue(metrics, &upstream, messages, bytes);
    }
}
