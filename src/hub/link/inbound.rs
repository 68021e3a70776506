//! What the hub owes to the order and the identifiers of a connection's own QoS 1 and 2 messages (MQTT 5.0 §4.3.3, §4.6).

use std::sync::Arc;

use parking_lot::MutexGuard;

use super::{Exchange, Link, Outcome, Refusal};
use crate::hub::PacketId;
use crate::hub::session::{Session, State, submit};
use crate::store::{Due, Op, Receipt, ReceiptState};

/// An inbound QoS 2 message was released (PUBREL).
#[derive(Clone, Debug)]
pub struct Released {
    /// False for an identifier that was not in use (MQTT 5.0 reason code 0x92).
    pub known: bool,
    /// What PUBCOMP waits for.
    pub receipt: Option<Arc<Receipt>>,
}

impl Link {
    /// Refuses what is published behind a message that could not be kept, until [`Link::mend_line`]: what is sent again then
    /// stands in the order in which it was first sent (MQTT 5.0 §4.6). For publishers that send many before they are
    /// answered.
    pub fn keep_in_line(&mut self) {
        self.line.get_or_insert_default();
    }

    /// The peer has been told what became of everything that it has published.
    pub fn mend_line(&self) {
        if let Some(line) = self.line.as_ref().filter(|line| line.is_broken()) {
            line.mend();
        }
    }

    /// A refusal, unless this repeats a QoS 2 message that was accepted: that is the same message still, whatever has
    /// changed since. Told otherwise, its sender would use the identifier for a new message, which would be lost.
    pub(super) fn refuse(&self, exchange: Option<Exchange>, refusal: Refusal) -> Outcome {
        let state = self.session.state.lock();
        let is_new = |Exchange { packet_id, dup }| !dup && state.inbound_in_doubt.contains(&packet_id.get());
        let exchange = exchange.filter(|&exchange| !is_new(exchange));
        let earlier = exchange.and_then(|exchange| state.inbound_of(exchange.packet_id));
        earlier.map_or(Outcome::Refused(refusal), |receipt| answer_again(receipt.as_ref()))
    }

    /// Notes the identifier of an inbound QoS 2 message; for one that was already accepted, how to answer it again.
    pub(super) fn repeated(
        &mut self,
        Exchange { packet_id, dup }: Exchange,
        receipt: Option<&Arc<Receipt>>,
    ) -> Option<Outcome> {
        let id = packet_id.get();
        let mut state = self.session.state.lock();
        if !state.inbound_in_doubt.is_empty() {
            self.ops.extend(clear_up(&mut state, &self.session, id, dup));
        }
        // One that could not be kept was never accepted. Its connection may have been closed before the failure was seen.
        if let Some(earlier) = state.inbound_of(packet_id) {
            return Some(answer_again(earlier.as_ref()));
        }
        state.inbound.insert(id, receipt.cloned());
        if self.session.durable {
            if let Some(receipt) = receipt {
                receipt.add();
            }
            let op = Op::AddInbound { session: self.session.id, packet_id: id, receipt: receipt.cloned() };
            self.ops.push(op);
        }
        None
    }

    /// A QoS 2 message could not be kept, and its sender is told: what comes under this identifier next is new.
    ///
    /// Sessions that end with their connection may have had it, and get it again when it is repeated. To keep it from them
    /// until it is on disk would cost every live receiver the time of a commit, which waits up to `store.max_commit_delay`
    /// for a slow uplink; to remember who had it would have to outlive the message that nobody repeats.
    pub fn forget_failed_inbound(&mut self, packet_id: PacketId) {
        let state = self.session.state.lock();
        // Another connection of the session may have had it kept meanwhile.
        if state.inbound_of(packet_id).is_none() {
            self.forget(state, packet_id);
        }
    }

    /// The peer begins a new QoS 2 message under this identifier, whatever came under it before.
    pub fn forget_inbound(&mut self, packet_id: PacketId) {
        self.forget(self.session.state.lock(), packet_id);
    }

    fn forget(&self, mut state: MutexGuard<'_, State>, packet_id: PacketId) {
        if state.inbound.remove(&packet_id.get()).is_some() && self.session.durable {
            let op = Op::RemoveInbound { session: self.session.id, packet_id: packet_id.get(), receipt: None };
            submit(self.hub.store(), &mut vec![op], Due::Soon);
        }
    }

    /// The peer has lost its session: the QoS 2 identifiers it used before mean nothing any more, and what comes under
    /// them now is new. Nor does it hold any of ours.
    pub fn peer_is_new(&mut self) {
        let mut state = self.session.state.lock();
        let durable = self.session.durable;
        let mut ops = Vec::new();
        state.queue.clear_all(&self.session.signal, &mut ops);
        for (packet_id, _) in state.inbound.drain().filter(|_| durable) {
            ops.push(Op::RemoveInbound { session: self.session.id, packet_id, receipt: None });
        }
        submit(self.hub.store(), &mut ops, Due::Now);
    }

    /// PUBREL: the peer has released the identifier of its QoS 2 message.
    pub fn released(&mut self, packet_id: PacketId) -> Released {
        self.flush_runs();
        let mut state = self.session.state.lock();
        let known = state.inbound.remove(&packet_id.get()).is_some();
        let mut receipt = None;
        if known && self.session.durable {
            let pending = Receipt::new(self.session.signal.clone());
            pending.add();
            let op = Op::RemoveInbound {
                session: self.session.id,
                packet_id: packet_id.get(),
                receipt: Some(pending.clone()),
            };
            submit(self.hub.store(), &mut vec![op], Due::Now);
            receipt = Some(pending);
        }
        Released { known, receipt }
    }
}

/// After damage to the database an identifier may seem to be in use that the peer has released. A peer that comes back
/// sends what is not over again first, and marks it (MQTT 5.0 §3.3.1.1, §4.4): once it sends something new, whatever it has
/// not repeated is over. Returns what the journal must learn of that.
fn clear_up(state: &mut State, session: &Session, id: u16, dup: bool) -> Vec<Op> {
    if dup {
        state.inbound_in_doubt.remove(&id);
        return Vec::new();
    }
    let over = std::mem::take(&mut state.inbound_in_doubt).into_iter();
    let over = over.filter(|id| state.inbound.remove(id).is_some() && session.durable);
    over.map(|packet_id| Op::RemoveInbound { session: session.id, packet_id, receipt: None }).collect()
}

/// How to answer the repetition of a QoS 2 message whose first answer waits, or waited, for `receipt`.
fn answer_again(receipt: Option<&Arc<Receipt>>) -> Outcome {
    match receipt {
        Some(receipt) if receipt.state() != ReceiptState::Done => Outcome::Pending(receipt.clone()),
        _ => Outcome::Done { matched: true },
    }
}
