//! What the store holds is taken up: sessions with their queues, and retained messages.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::warn;

use super::access::Identity;
use super::delivery::{Estate, Subscriber};
use super::queue::{Queue, QueueLimits};
use super::session::{Face, Session, SessionExpiry, Subscribed as Held, submit};
use super::{Hub, SubscribeOptions, Will};
use crate::store::{self, Due, Op, StoredSession};
use crate::topic::SharedFilter;

/// How long after a restart a client may take to come back before its will says that it is lost: it was the gateway that
/// was gone. A sleeping sensor knows nothing of it and comes when it wakes.
const RESTART_GRACE: Duration = Duration::from_secs(60);
const SLEEPER_GRACE: Duration = Duration::from_secs(3600);

impl Hub {
    /// Goes on from what a store holds that could not be opened before.
    pub(super) fn take_up(&self, contents: store::Contents) {
        {
            let _nobody_attaches = self.0.sessions.lock();
            self.0.readiness.takes_up.store(true, Ordering::SeqCst);
        }
        let mut retained = self.0.retained.write();
        for message in contents.retained {
            // What was published meanwhile is newer.
            if !retained.contains(message.topic.as_str()) {
                retained.set(Arc::new(message));
            }
        }
        drop(retained);
        self.0.next_session.store(first_after(&contents.sessions), Ordering::SeqCst);
        for stored in contents.sessions {
            let face = Face::from_number(stored.record.face);
            let key = face.map(|face| (face, stored.record.client_id.clone()));
            // A client that began a new session has ended this one.
            if key.is_some_and(|key| self.0.sessions.lock().contains_key(&key)) {
                submit(self.store(), &mut vec![Op::DropSession(stored.record.id)], Due::Soon);
            } else if let Some(estate) = self.restore(stored) {
                self.settle(estate);
            }
        }
        self.changed();
        self.0.readiness.awaits_store.store(false, Ordering::SeqCst);
        self.0.readiness.takes_up.store(false, Ordering::SeqCst);
    }

    /// Takes up a session as it was stored; returns what an older one of the same client has left, which had ended but
    /// not been settled when the gateway stopped.
    pub(super) fn restore(&self, stored: StoredSession) -> Option<Estate> {
        let record = stored.record;
        let Some(face) = Face::from_number(record.face) else {
            warn!(session = record.id.0, face = record.face, "stored session of an unknown kind is left alone");
            return None;
        };
        let identity = if matches!(face, Face::Mqtt | Face::MqttSn) {
            self.access().restore(record.user)
        } else {
            Identity::gateway()
        };
        let rights = self.access().rights(&identity, &record.client_id);
        let (in_doubt, window) = (stored.in_doubt.as_deref(), self.0.limits.window(face));
        let queue = Queue::restored(record.id, face.layout(), &stored.queues, in_doubt, window);
        // An upstream brings its own limits when it attaches; until then nothing may be lost for those of others.
        let limits = match face {
            Face::Upstream => {
                QueueLimits { max_messages: u64::MAX, max_bytes: u64::MAX, max_age: None, ..self.0.limits.queue }
            }
            _ => self.0.limits.queue,
        };
        let session = Arc::new(Session::new(
            record.id,
            face,
            record.client_id.clone(),
            identity,
            true,
            self.0.limits.of_queue(limits),
            rights,
            queue,
            &self.0.memory,
        ));
        {
            let mut state = session.state.lock();
            // A session that was connected when the gateway died is gone since now.
            state.detached_at = Some(record.detached_at.unwrap_or_else(|| self.now()));
            state.expiry = match record.expiry_interval {
                None => SessionExpiry::Never,
                Some(interval) => SessionExpiry::After(interval),
            };
            state.will = record.will.map(|will| Will {
                message: will.message,
                delay: will.delay.max(if face == Face::MqttSn { SLEEPER_GRACE } else { RESTART_GRACE }),
            });
            state.is_recorded = state.expiry == SessionExpiry::Never && state.will.is_none();
            state.inbound_in_doubt =
                stored.in_doubt.map_or(HashSet::new(), |_| stored.inbound.iter().copied().collect());
            state.inbound = stored.inbound.into_iter().map(|id| (id, None)).collect();
            let mut routes = self.0.routes.write();
            for subscription in stored.subscriptions {
                let Ok(filter) = SharedFilter::split(&subscription.filter) else { continue };
                let options = SubscribeOptions::from_byte(subscription.options, subscription.identifier);
                let subscriber = Subscriber { session: session.clone(), options, filter: filter.clone() };
                routes.insert(&filter, session.id.0, subscriber);
                let text = filter.to_text();
                state.subscriptions.insert(text, Held { filter, options, receipt: None });
            }
        }
        let older = self.0.sessions.lock().insert((face, record.client_id), session)?;
        let mut state = older.state.lock();
        Some(self.end(&older, &mut state))
    }
}

/// The number of the first session after those that are stored.
pub(super) fn first_after(sessions: &[StoredSession]) -> u64 {
    sessions.iter().map(|session| session.record.id.0 + 1).max().unwrap_or(1)
}
