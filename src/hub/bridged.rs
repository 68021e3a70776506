//! Sessions whose peer is another gateway: what has been there does not go back.
//!
//! No Local keeps a message from the connection that it came by. Two gateways may have more than one between them, as
//! where each is the other's upstream, and a message may have been at a third one in between: see [`via`].

use std::sync::atomic::{AtomicU64, Ordering};

use super::queue::{Outbound, Queue};
use crate::store::Op;
use crate::via::{self, GatewayId};

/// The gateway at the other end of a session; none for most. It is remembered while there is no connection.
#[derive(Debug, Default)]
pub(super) struct PeerGateway(AtomicU64);

impl PeerGateway {
    pub fn get(&self) -> Option<GatewayId> {
        GatewayId::from_bits(self.0.load(Ordering::Relaxed))
    }

    pub fn set(&self, gateway: Option<GatewayId>) {
        self.0.store(gateway.map_or(0, GatewayId::to_bits), Ordering::Relaxed);
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
