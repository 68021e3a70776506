//! Which gateway the upstream is, if it is one: what has been there is not sent there, and it does not send back what has
//! been here.
//!
//! In MQTT 5.0 both say so in CONNECT and CONNACK. 3.1.1 has no place for that there, so a bridge that an upstream has
//! accepted as one asks: it subscribes to [`via::ID_TOPIC`], and a gateway publishes its id there before it answers the
//! SUBSCRIBE. Only to who answers, the bridge publishes its own. Everything else waits until then.

use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::warn;

use super::{End, Stream, now};
use crate::bridge::words;
use crate::message::QoS;
use crate::proto::mqtt::{PacketId, PublishHead, RetainHandling, Subscription, SubscriptionOptions};
use crate::via::{self, GatewayId, Introduction};

/// What a 3.1.1 upstream was asked.
pub(super) struct Question {
    pub packet_id: PacketId,
    pub answer: Option<GatewayId>,
}

impl Stream<'_> {
    /// Asks the upstream which gateway it is.
    pub(super) fn ask(&mut self) -> Result<(), End> {
        let options = SubscriptionOptions {
            qos: QoS::AtMostOnce,
            no_local: true,
            retain_as_published: true,
            retain_handling: RetainHandling::Send,
        };
        let packet_id = self.subscribe_to(&[Subscription { filter: via::ID_TOPIC, options }], Vec::new(), now())?;
        self.question = Some(Question { packet_id, answer: None });
        Ok(())
    }

    /// It is known which gateway the `upstream` is, or that it is none.
    pub(super) fn meet(&mut self, upstream: Option<GatewayId>) -> Result<(), End> {
        if upstream == Some(self.gateway) {
            return Err(End::Lost(words::ITSELF.into()));
        }
        let keeps_names = self.rules.outgoing.keep_names();
        self.link.set_peer_gateway(upstream.map(|gateway| Introduction { gateway, keeps_names }));
        if upstream.is_some() && !self.client.version().is_5() {
            self.introduce(now());
        }
        self.begin(now())
    }

    /// Says to an upstream with 3.1.1 which gateway we are.
    fn introduce(&mut self, now: Instant) {
        let introduction = self.rules.introduction(self.gateway).to_text();
        let head = PublishHead::bare(via::ID_TOPIC, introduction.as_bytes());
        let said = self.client.publish(&head, usize::MAX, now, self.encoded.bytes.get_mut());
        let upstream = &self.shared.name;
        if let Err(error) = said {
            warn!(upstream, %error, "the upstream cannot be told which gateway this is");
        }
        if !self.shared.told_of_version.swap(true, Ordering::Relaxed) {
            warn!(upstream, "{}", words::OLD_TO_GATEWAY);
        }
        self.shared.note(words::OLD_TO_GATEWAY.into());
    }
}
