//! Connections come to their sessions and leave them, and sessions begin and end (MQTT 5.0 §3.1.4, §4.1).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;

use super::attachment::{Attachment, Fate};
use super::delivery::Estate;
use super::queue::{Layout, Queue};
use super::session::{Face, Session, SessionExpiry, State};
use super::{Attach, Hub, Link, Will};
use crate::store::SessionId;

/// Why a connection cannot attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AttachError {
    #[error("the gateway keeps as many sessions as `limits.max_sessions` allows")]
    TooManySessions,
    #[error("the store cannot be used yet: only new sessions that end with their connection are served")]
    StoreUnavailable,
}

impl Hub {
    /// Attaches a connection to its session: the stored one, or a new one. An older connection with the same client id
    /// is told to close.
    ///
    /// # Errors
    /// [`AttachError::TooManySessions`] when a new session would go over `max_sessions`;
    /// [`AttachError::StoreUnavailable`] while it is not known what is stored, for sessions that may be.
    pub fn attach(&self, mut request: Attach) -> Result<Link, AttachError> {
        let now = self.now();
        let key = (request.face, request.client_id.clone());
        let mut wills = Vec::new();
        let mut estate = Estate::default();
        let mut sessions = self.0.sessions.lock();
        if self.awaits_store() {
            let may_be_stored = !request.clean_start || request.expiry != SessionExpiry::OnDetach;
            if may_be_stored || self.0.readiness.takes_up.load(Ordering::SeqCst) {
                return Err(AttachError::StoreUnavailable);
            }
        }
        let (mut resumed, mut earlier) = (None, None);
        if let Some(known) = sessions.get(&key).cloned() {
            let mut state = known.state.lock();
            let was_attached = state.attached.is_some();
            // A session that ends with its connection has ended now (MQTT 5.0 §3.1.2.11.2); one that expired since the
            // last housekeeping has ended before.
            let ends = request.clean_start
                || was_attached && state.expiry == SessionExpiry::OnDetach
                || state.has_expired(now);
            let will_is_due = state.will_is_due(now);
            let resume = !ends && known.identity.user == request.identity.user;
            if let Some(will) = state.will.take()
                && (!resume || will_is_due || was_attached && will.delay.is_zero())
            {
                wills.push((known.clone(), will));
            }
            earlier = state.attached.clone();
            known.condemn(&mut state, Fate::TakenOver);
            if let Some(limits) = request.queue {
                known.set_limits(self.0.limits.of_queue(limits));
                state.queue.sweep_again();
            }
            if resume {
                drop(state);
                *known.rights.write() = self.access().rights(&known.identity, &known.client_id);
                resumed = Some(known);
            } else {
                estate = self.end(&known, &mut state);
                drop(state);
                sessions.remove(&key);
            }
        }
        let present = resumed.is_some();
        let session = match resumed {
            Some(session) => session,
            None if sessions.len() >= self.0.limits.max_sessions => {
                self.0.counters.over_sessions.fetch_add(1, Ordering::Relaxed);
                return Err(AttachError::TooManySessions);
            }
            None => {
                let session = self.new_session(&request);
                sessions.insert(key, session.clone());
                session
            }
        };
        let number = self.0.next_attachment.fetch_add(1, Ordering::Relaxed);
        let window = request.receive_maximum.min(self.0.limits.window(request.face)).max(1);
        let (expiry, will) = (self.allowed_expiry(request.face, request.expiry), request.will.take());
        let attachment = Arc::new(Attachment::new(number, now, request, window, earlier.is_some()));
        {
            let mut state = session.state.lock();
            state.attached = Some(attachment.clone());
            state.detached_at = None;
            state.expiry = expiry;
            state.will = will;
            state.queue.rewind();
            session.journal(&mut state, self.store());
        }
        drop(sessions);
        // Not under the lock: whoever else connects does not wait for this.
        if let Some(earlier) = earlier {
            attachment.succeed(&earlier);
        }
        self.settle(estate);
        for (session, will) in wills {
            self.publish_will(&session, will);
        }
        session.page_in(self.store());
        session.signal.raise();
        Ok(Link::new(self.clone(), session, attachment, present))
    }

    fn new_session(&self, request: &Attach) -> Arc<Session> {
        let id = SessionId(self.0.next_session.fetch_add(1, Ordering::Relaxed));
        let durable = self.0.store.is_some() && request.expiry != SessionExpiry::OnDetach;
        Arc::new(Session::new(
            id,
            request.face,
            request.client_id.clone(),
            request.identity.clone(),
            durable,
            self.0.limits.of_queue(request.queue.unwrap_or(self.0.limits.queue)),
            self.access().rights(&request.identity, &request.client_id),
            Queue::new(id, durable, request.face.layout()),
            &self.0.memory,
        ))
    }

    /// The limit is for clients: what waits for an upstream waits as long as its outage lasts.
    pub(super) fn allowed_expiry(&self, face: Face, wanted: SessionExpiry) -> SessionExpiry {
        let most = self.0.limits.max_session_expiry.filter(|_| face != Face::Upstream);
        match (wanted, most) {
            (SessionExpiry::Never, Some(most)) => SessionExpiry::After(most),
            (SessionExpiry::After(interval), Some(most)) => SessionExpiry::After(interval.min(most)),
            (wanted, _) => wanted,
        }
    }

    /// Ends a session: its subscriptions and its queue. The caller takes it out of the map, and settles what it leaves
    /// behind, its journal too, once it holds no lock.
    pub(super) fn end(&self, session: &Session, state: &mut State) -> Estate {
        state.ended = true;
        state.attached = None;
        let is_member = state.subscriptions.values().any(|held| held.filter.group.is_some());
        {
            let mut routes = self.0.routes.write();
            for held in state.subscriptions.values() {
                routes.remove(&held.filter, session.id.0);
            }
        }
        if !state.subscriptions.is_empty() {
            state.subscriptions.clear();
            self.changed();
        }
        let queue = std::mem::replace(&mut state.queue, Queue::new(session.id, false, Layout::One));
        let estate = Estate {
            session: session.durable.then_some(session.id),
            tails: if is_member { queue.tails() } else { Vec::new() },
            orphans: queue.into_orphans(),
        };
        state.settle();
        state.inbound.clear();
        session.tell_drained((0, 0));
        estate
    }

    /// What follows when a session has no connection any more. Takes the lock's guard to let it go in time.
    pub(super) fn after_detach(
        &self,
        session: &Arc<Session>,
        mut state: parking_lot::MutexGuard<'_, State>,
        will: WillDue,
    ) {
        state.detached_at = Some(self.now());
        let mut due = None;
        let ends = state.expiry == SessionExpiry::OnDetach || state.expiry == SessionExpiry::After(Duration::ZERO);
        match will {
            WillDue::No => state.will = None,
            WillDue::Yes if ends || state.will.as_ref().is_some_and(|will| will.delay.is_zero()) => {
                due = state.will.take();
            }
            WillDue::Yes => {}
        }
        let estate = ends.then(|| self.end(session, &mut state));
        if !ends {
            session.journal(&mut state, self.store());
        }
        drop(state);
        self.follow_up(session, estate, due);
    }

    /// What follows outside the lock when a session may have ended, which leaves an estate then, or its will is due.
    pub(super) fn follow_up(&self, session: &Arc<Session>, estate: Option<Estate>, will: Option<Will>) {
        if let Some(estate) = estate {
            self.forget(session);
            self.settle(estate);
        }
        if let Some(will) = will {
            self.publish_will(session, will);
        }
    }

    /// Takes an ended session out of the map, unless a new one has taken its place.
    fn forget(&self, session: &Arc<Session>) {
        let mut sessions = self.0.sessions.lock();
        let key = (session.face, session.client_id.clone());
        if sessions.get(&key).is_some_and(|known| Arc::ptr_eq(known, session)) {
            sessions.remove(&key);
        }
    }
}

/// Whether a lost connection's will must be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WillDue {
    Yes,
    No,
}
