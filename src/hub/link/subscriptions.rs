//! What a connection subscribes to (MQTT 5.0 §3.8, §3.10).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;
use thiserror::Error;

use super::Link;
use crate::hub::access::DeniedSubscribe;
use crate::hub::delivery::Subscriber;
use crate::hub::queue::{Incoming, QueueLimits};
use crate::hub::session::{State, Subscribed as Held, submit};
use crate::hub::{RetainHandling, SubscribeOptions};
use crate::message::QoS;
use crate::store::{Due, Op, Receipt};
use crate::topic::SharedFilter;
use crate::via;

/// A subscription that was made.
#[derive(Clone, Debug)]
pub struct Subscribed {
    /// The QoS granted.
    pub qos: QoS,
    /// What SUBACK waits for.
    pub receipt: Option<Arc<Receipt>>,
}

/// Why a subscription is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SubscribeError {
    #[error("the access rules give this client nothing that the filter asks for")]
    NotAuthorized,
    #[error("the client has as many subscriptions as `limits.max_subscriptions` allows")]
    QuotaExceeded,
    #[error("the filter goes over `limits.max_topic_levels` or `limits.max_topic_length`")]
    FilterTooLong,
    #[error("the connection is not attached any more")]
    Detached,
}

impl Link {
    /// The session's subscriptions.
    pub fn subscriptions(&self) -> Vec<SharedFilter> {
        self.session.state.lock().subscriptions.values().map(|held| held.filter.clone()).collect()
    }

    /// Adds a subscription, or replaces the one with the same filter, and queues the retained messages it asks for.
    ///
    /// # Errors
    /// [`SubscribeError`] names the rule or limit; the subscription is not made.
    pub fn subscribe(
        &mut self,
        filter: &SharedFilter,
        options: SubscribeOptions,
    ) -> Result<Subscribed, SubscribeError> {
        self.flush_runs();
        let limits = &self.hub.0.limits;
        if !self.hub.topic_fits(filter.filter.as_str()) {
            return Err(SubscribeError::FilterTooLong);
        }
        if !self.session.rights.read().may_subscribe(&filter.filter) {
            self.hub.0.counters.denied_subscribe.fetch_add(1, Ordering::Relaxed);
            // Granted, it gives nothing: each message is looked at by itself.
            if self.hub.access().settings().denied_subscribe == DeniedSubscribe::Refuse {
                return Err(SubscribeError::NotAuthorized);
            }
        }
        let text = filter.to_text();
        let mut ops = Vec::new();
        let mut state = self.state().ok_or(SubscribeError::Detached)?;
        let held = state.subscriptions.get(&text);
        let (is_new, is_stored) = (held.is_none(), held.is_some_and(|held| held.is_stored_as(options)));
        if is_new && state.subscriptions.len() >= limits.max_subscriptions {
            self.hub.0.counters.over_subscriptions.fetch_add(1, Ordering::Relaxed);
            return Err(SubscribeError::QuotaExceeded);
        }
        {
            let subscriber = Subscriber { session: self.session.clone(), options, filter: filter.clone() };
            self.hub.0.routes.write().insert(filter, self.session.id.0, subscriber);
        }
        self.hub.changed();
        // A client that subscribes again to what it has costs no write, and needs no disk.
        let must_store = self.session.durable && !is_stored;
        let receipt = must_store.then(|| Receipt::new(self.session.signal.clone()));
        let held = Held { filter: filter.clone(), options, receipt: receipt.clone() };
        state.subscriptions.insert(text.clone(), held);
        if let Some(receipt) = &receipt {
            receipt.add();
            ops.push(Op::PutSubscription {
                session: self.session.id,
                filter: text,
                options: options.to_byte(),
                identifier: options.identifier.map(|identifier| identifier.get()),
                receipt: Some(receipt.clone()),
            });
        }
        let wanted = match options.retain_handling {
            RetainHandling::Send => true,
            RetainHandling::SendIfNew => is_new,
            RetainHandling::DoNotSend => false,
        };
        if wanted && filter.group.is_none() {
            self.queue_retained(filter, options, &mut state, &mut ops);
        }
        submit(self.hub.store(), &mut ops, if must_store { Due::Now } else { Due::Soon });
        drop(state);
        self.session.signal.raise();
        Ok(Subscribed { qos: options.qos, receipt })
    }

    fn queue_retained(
        &self,
        filter: &SharedFilter,
        options: SubscribeOptions,
        state: &mut MutexGuard<'_, State>,
        ops: &mut Vec<Op>,
    ) {
        let rights = self.session.rights.read().clone();
        // However many there are, a subscriber gets them all: they are in memory once already.
        let limits = QueueLimits { max_messages: u64::MAX, max_bytes: u64::MAX, ..self.session.limits() };
        for message in self.hub.retained_for(filter) {
            let peer = self.session.peer.get();
            let has_it = |topic| self.hub.targets(topic).goes_up_to(&self.session, options.qos);
            let is_there = |peer| via::came_by(peer, &message) || has_it(message.topic.as_str());
            if peer.is_some_and(is_there) || !rights.may_read(message.topic.as_str()) {
                continue;
            }
            let identifiers = options.identifier.map(|identifier| Arc::from([identifier.get()]));
            let qos = message.qos.min(options.qos);
            let message = options.precedence.limit(&message);
            let incoming = Incoming { qos, retain: true, identifiers, message, shared: None, spread: 0 };
            let lane = state.queue.lane_for(options.precedence, false, &limits);
            state.queue.push(lane, incoming, None, true, &self.session.signal, &limits, ops);
        }
        state.settle();
    }

    /// Removes a subscription; false where there was none.
    pub fn unsubscribe(&mut self, filter: &SharedFilter) -> bool {
        self.flush_runs();
        let text = filter.to_text();
        let Some(mut state) = self.state() else { return false };
        if state.subscriptions.remove(&text).is_none() {
            return false;
        }
        self.hub.0.routes.write().remove(filter, self.session.id.0);
        self.hub.changed();
        if self.session.durable {
            let op = Op::DropSubscription { session: self.session.id, filter: text };
            submit(self.hub.store(), &mut vec![op], Due::Soon);
        }
        true
    }
}
