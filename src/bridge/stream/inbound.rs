//! What the packets of an upstream mean for the session and the hub.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{error, warn};

use super::End;
use super::acquaintance::Question;
use super::window::Window;
use crate::bridge::condition::{DropReason, Shared};
use crate::bridge::marks;
use crate::bridge::rules::Retain;
use crate::bridge::settings::Checked;
use crate::bridge::words::{self, Who};
use crate::hub::{self, Link, Outcome, Refusal};
use crate::message::QoS;
use crate::proto::mqtt::client::Event;
use crate::proto::mqtt::{AckKind, PacketId, Publish, ReasonCode};
use crate::store::Receipt;
use crate::via::{self, GatewayId};

/// What handling an event needs while the packet is still borrowed from the input.
pub(super) struct Inbound<'s, 'a> {
    pub shared: &'a Shared,
    pub rules: &'a Checked,
    pub is_elsewhere: bool,
    pub who: Who<'a>,
    pub link: &'s mut Link,
    /// Which gateway we are.
    pub gateway: GatewayId,
    pub question: &'s mut Option<Question>,
    pub requests: &'s mut Vec<(PacketId, Vec<String>)>,
    pub window: &'s mut Window,
    pub told: &'s mut Vec<&'static str>,
    pub topic: &'s mut String,
    /// Of what was given up; its completion is none of a message.
    pub refused: Option<PacketId>,
}

impl Inbound<'_, '_> {
    pub fn handle(&mut self, event: Event<'_>, now: Instant) -> Reply {
        match event {
            Event::None | Event::Connected { .. } | Event::Unsubscribed { .. } => Reply::Nothing,
            Event::Refused { reason, detail } => Reply::End(End::Lost(words::refused(reason, detail, self.who))),
            Event::Disconnected { reason, detail } => {
                let said = words::disconnected(reason, detail, self.who);
                Reply::End(if is_about_a_packet(reason) { End::Closed(said) } else { End::Lost(said) })
            }
            Event::Subscribed { packet_id, reasons } => {
                self.subscribed(packet_id, reasons);
                match self.question.take_if(|question| question.packet_id == packet_id) {
                    Some(question) => Reply::Meet(question.answer),
                    None => Reply::Nothing,
                }
            }
            Event::Publish(publish) if self.question.is_some() && publish.topic == via::ID_TOPIC => {
                let id = str::from_utf8(publish.payload).ok().and_then(GatewayId::parse);
                self.question.iter_mut().for_each(|question| question.answer = id);
                Reply::Nothing
            }
            Event::Publish(publish) => {
                self.window.crossed_at = now;
                self.publish(&publish)
            }
            Event::Release(packet_id) => {
                let released = self.link.released(packet_id);
                let reason = if released.known { ReasonCode::Success } else { ReasonCode::PacketIdentifierNotFound };
                Reply::Acknowledge(AckKind::Pubcomp, packet_id, reason, released.receipt)
            }
            Event::Acknowledged(packet_id, reason) => {
                if reason == ReasonCode::QuotaExceeded {
                    // The one error that passes by itself: it stays in the queue and goes out on the next connection.
                    return Reply::End(End::Lost(words::not_taken(reason)));
                }
                self.link.acknowledge(packet_id);
                self.window.acknowledged(now);
                if reason.is_error() {
                    self.shared.dropped(DropReason::Refused, || format!("the upstream answered \"{reason}\""));
                    let what = words::not_taken(reason);
                    self.tell("refused", |upstream| error!(upstream, "{what}; more like it are only counted"));
                } else {
                    self.shared.counters.sent.fetch_add(1, Ordering::Relaxed);
                }
                Reply::Nothing
            }
            Event::Received(packet_id) => {
                self.window.acknowledged(now);
                // An identifier that we do not know is released at once, so that the upstream can let it go.
                if self.link.received(packet_id) { Reply::Nothing } else { Reply::Release(packet_id) }
            }
            Event::Completed(packet_id) => {
                self.window.acknowledged(now);
                if self.link.completed(packet_id) && self.refused != Some(packet_id) {
                    self.shared.counters.sent.fetch_add(1, Ordering::Relaxed);
                }
                Reply::Nothing
            }
        }
    }

    fn subscribed(&mut self, packet_id: PacketId, reasons: &[u8]) {
        let Some(index) = self.requests.iter().position(|(id, _)| *id == packet_id) else { return };
        let (_, filters) = self.requests.remove(index);
        for (filter, &reason) in filters.iter().zip(reasons).filter(|(_, reason)| **reason >= 0x80) {
            let said = words::not_subscribed(filter, reason);
            error!(upstream = self.shared.name, "{said}");
            self.shared.note(said);
        }
    }

    /// A message of the upstream: to the hub, under its local name.
    fn publish(&mut self, publish: &Publish<'_>) -> Reply {
        self.shared.counters.received.fetch_add(1, Ordering::Relaxed);
        if let Some(packet_id) = publish.packet_id
            && self.is_elsewhere
            && !publish.dup
            && publish.qos == QoS::ExactlyOnce
        {
            // The same identifier at the address before meant another message: what is repeated says so.
            self.link.forget_inbound(packet_id);
        }
        let mut properties = publish.properties.to_message_properties();
        let hops = marks::hops(properties.as_deref());
        let (reason, receipt) = match self.rules.incoming.map(publish.topic, self.topic) {
            // A subscription of an older configuration; the upstream keeps it with our session.
            Err(_) => {
                self.shared.counters.drop(DropReason::Unwanted);
                (ReasonCode::Success, None)
            }
            Ok(_) if via::has_been_at(self.gateway, self.topic, properties.as_deref()) => {
                self.looped(publish.topic, hops, words::RETURNED);
                (ReasonCode::Success, None)
            }
            Ok(_) if hops >= self.rules.max_hops.into() => {
                self.looped(publish.topic, hops, words::LOOPED);
                (ReasonCode::Success, None)
            }
            Ok(rule) => {
                let added = properties.get_or_insert_default();
                rule.add_properties(publish.topic, added);
                marks::set_hops(added, hops + 1);
                via::note(self.gateway, self.link.peer_gateway(), self.topic, added);
                let outcome = self.link.publish(hub::Publish {
                    topic: self.topic,
                    // A copy: commands are small, and must not keep the read buffer.
                    payload: Bytes::copy_from_slice(publish.payload),
                    qos: publish.qos,
                    retain: publish.retain && rule.retain == Retain::AsPublished,
                    dup: publish.dup,
                    packet_id: publish.packet_id,
                    properties,
                    expiry_interval: rule.remaining_expiry(publish.properties.message_expiry(), Duration::ZERO),
                });
                match outcome {
                    Outcome::Done { .. } => (ReasonCode::Success, None),
                    Outcome::Pending(receipt) => (ReasonCode::Success, Some(receipt)),
                    Outcome::Refused(refusal) => (self.not_taken(publish.topic, refusal), None),
                }
            }
        };
        let Some(packet_id) = publish.packet_id else { return Reply::Nothing };
        let kind = if publish.qos == QoS::ExactlyOnce { AckKind::Pubrec } else { AckKind::Puback };
        Reply::Acknowledge(kind, packet_id, reason, receipt)
    }

    fn looped(&mut self, topic: &str, hops: u32, what: &'static str) {
        self.shared.counters.drop(DropReason::Looped);
        self.tell(what, |upstream| {
            warn!(upstream, topic, hops, "{what}; more like it are only counted");
        });
    }

    fn not_taken(&mut self, topic: &str, refusal: Refusal) -> ReasonCode {
        self.shared.counters.drop(DropReason::NotTaken);
        self.tell("not taken", |upstream| {
            error!(upstream, topic, %refusal, "a message of the upstream was refused; more like it are only counted");
        });
        match refusal {
            Refusal::TopicInvalid => ReasonCode::TopicNameInvalid,
            Refusal::NotAuthorized => ReasonCode::NotAuthorized,
            Refusal::QuotaExceeded | Refusal::Behind | Refusal::StoreUnavailable => ReasonCode::QuotaExceeded,
        }
    }

    fn tell(&mut self, kind: &'static str, log: impl FnOnce(&str)) {
        if !self.told.contains(&kind) {
            self.told.push(kind);
            log(&self.shared.name);
        }
    }
}

/// Whether an upstream that closes the connection for `reason` may do so for one packet that it was sent.
fn is_about_a_packet(reason: ReasonCode) -> bool {
    matches!(
        reason,
        ReasonCode::UnspecifiedError
            | ReasonCode::MalformedPacket
            | ReasonCode::ProtocolError
            | ReasonCode::ImplementationSpecificError
            | ReasonCode::NotAuthorized
            | ReasonCode::TopicNameInvalid
            | ReasonCode::PacketTooLarge
            | ReasonCode::PayloadFormatInvalid
            | ReasonCode::RetainNotSupported
            | ReasonCode::QoSNotSupported
    )
}

/// What is to be done about a packet, once it is not borrowed any more.
pub(super) enum Reply {
    Nothing,
    Acknowledge(AckKind, PacketId, ReasonCode, Option<Arc<Receipt>>),
    Release(PacketId),
    /// It is known which gateway the upstream is, if it is one.
    Meet(Option<GatewayId>),
    End(End),
}
