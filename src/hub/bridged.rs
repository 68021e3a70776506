//! Sessions whose peer is another gateway: what has been there does not go back.
//!
//! No Local keeps a message from the connection that it came by. Two gateways may have more than one between them, as
//! where each is the other's upstream, and a message may have been at a third one in between: see [`via`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::queue::{Outbound, Queue};
use crate::store::Op;
use crate::via::{self, GatewayId, Introduction};

/// The gateway at the other end of a session; none for most. It is remembered while there is no connection.
#[derive(Debug, Default)]
pub(super) struct PeerGateway {
    id: AtomicU64,
    keeps_names: AtomicBool,
}

impl PeerGateway {
    pub fn get(&self) -> Option<GatewayId> {
        GatewayId::from_bits(self.id.load(Ordering::Relaxed))
    }

    pub fn set(&self, peer: Option<Introduction>) {
        self.keeps_names.store(peer.is_some_and(|peer| peer.keeps_names), Ordering::Relaxed);
        self.id.store(peer.map_or(0, |peer| peer.gateway.to_bits()), Ordering::Relaxed);
    }

    /// Whether both lead to one gateway, and under the same names.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let keeps_names = |peer: &Self| peer.keeps_names.load(Ordering::Relaxed);
        self.get().is_some() && self.get() == other.get() && keeps_names(self) && keeps_names(other)
    }

    /// Gives up what was queued before it was known who the peer is, and has been there: of what was taken from `queue`
    /// and stands in `into` from `start` on. Tells whether there was any.
    pub fn give_up_returns(
        &self,
        queue: &mut Queue,
        into: &mut Vec<Outbound>,
        start: usize,
        ops: &mut Vec<Op>,
    ) -> bool {
        let Some(peer) = self.get() else { return false };
        // What the peer may have begun to receive is not taken back: it might take the next message for its repetition.
        let returns = |outbound: &Outbound| match outbound {
            Outbound::Publish(delivery) => !delivery.dup && via::came_by(peer, &delivery.message),
            Outbound::Release(_) => false,
        };
        let before = into.len();
        for outbound in into.extract_if(start.., |outbound| returns(outbound)) {
            if let Outbound::Publish(delivery) = outbound
                && let Some(packet_id) = delivery.packet_id
            {
                queue.acknowledge(packet_id, ops);
            }
        }
        into.len() < before
    }
}
