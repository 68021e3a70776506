//! What the hub owes to the order and the identifiers of a connection's own QoS 1 and 2 messages (MQTT 5.0 §4.3.3, §4.6).

use std::sync::Arc;

use parking_lot::MutexGuard;

use super::{Link, Outcome, Refusal};
use crate::hub::PacketId;
use crate::hub::session::{State, submit};
use crate::message::QoS;
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
    pub(super) fn refuse(&self, qos: QoS, packet_id: Option<PacketId>, refusal: Refusal) -> Outcome {
        let state = self.session.state.lock();
        let earlier = packet_id.filter(|_| qos == QoS::ExactlyOnce).and_then(|id| state.inbound_of(id));
        earlier.map_or(Outcome::Refused(refusal), |receipt| answer_again(receipt.as_ref()))
    }

    /// Notes the identifier of an inbound QoS 2 message; for one that was already accepted, how to answer it again.
    pub(super) fn repeated(&mut self, packet_id: PacketId, receipt: Option<&Arc<Receipt>>) -> Option<Outcome> {
        let id = packet_id.get();
        let mut state = self.session.state.lock();
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
    /// them now is new.
    pub fn forget_all_inbound(&mut self) {
        let mut state = self.session.state.lock();
        let durable = self.session.durable;
        let mut ops = Vec::new();
        for (packet_id, _) in state.inbound.drain().filter(|_| durable) {
            ops.push(Op::RemoveInbound { session: self.session.id, packet_id, receipt: None });
        }
        submit(self.hub.store(), &mut ops, Due::Soon);
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

/// How to answer the repetition of a QoS 2 message whose first answer waits, or waited, for `receipt`.
fn answer_again(receipt: Option<&Arc<Receipt>>) -> Outcome {
    match receipt {
        Some(receipt) if receipt.state() != ReceiptState::Done => Outcome::Pending(receipt.clone()),
        _ => Outcome::Done { matched: true },
    }
}
