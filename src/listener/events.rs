//! What the packets of a client mean for its session, and the session's messages for the client.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tracing::warn;

use super::Shared;
use super::connection::{Connection, End, Scratch, Step};
use super::output::{LEAVE_OUT_FROM, Output};
use crate::hub::access::DeniedPublish;
use crate::hub::{self, Link, Outbound, Outcome, Refusal, RetainHandling, SubscribeError, SubscribeOptions};
use crate::message::QoS;
use crate::proto::mqtt::server::{Event, Server};
use crate::proto::mqtt::{
    self, AckKind, AckState, Body, PacketId, Property, ProtocolError, PublishHead, ReasonCode, Subscribe, Subscription,
    Unsubscribe,
};
use crate::store::{Receipt, ReceiptState};
use crate::topic::SharedFilter;
use crate::via::{self, GatewayId, Introduction};

/// How many messages are taken from the session under one lock.
const TAKEN_AT_ONCE: usize = 128;

impl Connection {
    /// Handles the complete packets at the front of `data`. Returns how many bytes they were.
    pub(super) fn handle_packets(&mut self, data: &[u8], output: &mut Output) -> Result<(usize, Option<Step>), End> {
        let is_bridge = self.server.is_bridge();
        let mut consumed = 0;
        let (mut packets, mut messages) = (0, 0);
        let mut step = None;
        let result = loop {
            if self.server.is_behind() {
                break Ok(());
            }
            let (packet, length) = match self.server.decode(&data[consumed..]) {
                Ok(Some(decoded)) => decoded,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            packets += 1;
            let event = match self.server.handle(packet, &mut output.bytes) {
                Ok(event) => event,
                Err(error) => break Err(error),
            };
            consumed += length;
            self.awaits_introduction &= matches!(&event, Event::Subscribe(packet) if asks_who_we_are(packet));
            let handled = match (event, &mut self.link) {
                (Event::None, _) => Ok(()),
                (Event::Connect(request), _) => {
                    step = Some(Step::Connect(request));
                    break Ok(());
                }
                (Event::Disconnect { publish_will, expiry }, _) => {
                    step = Some(Step::End(End::Left { publish_will, expiry }));
                    break Ok(());
                }
                (Event::Publish(publish), Some(link)) if is_bridge && publish.topic == via::ID_TOPIC => {
                    let id = str::from_utf8(publish.payload).ok();
                    link.set_peer_gateway(id.and_then(Introduction::parse));
                    let (qos, packet_id) = (publish.qos, publish.packet_id);
                    answer_publish(&mut self.server, qos, packet_id, TAKEN, output)
                }
                (Event::Publish(publish), Some(link)) => {
                    messages += 1;
                    let (qos, packet_id) = (publish.qos, publish.packet_id);
                    let outcome = match to_hub(&publish, self.shared.gateway, link.peer_gateway()) {
                        Some(publish) => link.publish(publish),
                        None => {
                            looped(&self.shared, link, publish.topic);
                            TAKEN
                        }
                    };
                    match outcome {
                        Outcome::Refused(Refusal::NotAuthorized) => {
                            let habit = link.hub().access().settings().denied_publish;
                            answer_denied(&mut self.server, qos, packet_id, habit, output)
                        }
                        outcome => answer_publish(&mut self.server, qos, packet_id, outcome, output),
                    }
                }
                (Event::PayloadFormatInvalid, _) => {
                    self.shared.counters.payload_format_invalid.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                }
                (Event::Acknowledged(packet_id, _), Some(link)) => {
                    link.acknowledge(packet_id);
                    self.hungry = true;
                    Ok(())
                }
                (Event::Received(packet_id), Some(link)) => {
                    if link.received(packet_id) {
                        self.hungry = true;
                    } else {
                        self.server.release(packet_id, ReasonCode::PacketIdentifierNotFound, &mut output.bytes);
                    }
                    Ok(())
                }
                (Event::Completed(packet_id), Some(link)) => {
                    link.completed(packet_id);
                    self.hungry = true;
                    Ok(())
                }
                (Event::Release(packet_id), Some(link)) => {
                    let released = link.released(packet_id);
                    // The release of a message that was denied, and acknowledged all the same, is as good as any other.
                    let habit = |link: &Link| link.hub().access().settings().denied_publish;
                    let reason = match released.known || habit(link) == DeniedPublish::Acknowledge {
                        true => ReasonCode::Success,
                        false => ReasonCode::PacketIdentifierNotFound,
                    };
                    let (kind, receipt) = (AckKind::Pubcomp, released.receipt);
                    self.server.acknowledge(kind, packet_id, reason, receipt, &mut output.bytes);
                    Ok(())
                }
                (Event::Subscribe(packet), _) if is_bridge && asks_who_we_are(&packet) => {
                    let packet_id = packet.packet_id;
                    introduce(&mut self.server, packet_id, self.shared.gateway, output);
                    Ok(())
                }
                (Event::Subscribe(packet), Some(link)) => {
                    let packet_id = packet.packet_id;
                    subscribe(link, &packet, is_bridge).map(|Granted { reasons, receipts }| {
                        self.server.suback(packet_id, &reasons, receipts, &mut output.bytes);
                        self.hungry = true;
                    })
                }
                (Event::Unsubscribe(packet), Some(link)) => unsubscribe(link, &packet).map(|(packet_id, reasons)| {
                    self.server.unsuback(packet_id, &reasons, &mut output.bytes);
                }),
                // The state machine lets nothing but a CONNECT through before there is a link.
                (_, None) => Err(ProtocolError { reason: ReasonCode::ProtocolError, what: "not connected" }),
            };
            if let Err(error) = handled {
                break Err(error);
            }
        };
        if packets > 0 {
            // The keep alive is about packets: bytes of one that never ends do not count.
            self.server.note_input(tokio::time::Instant::now().into_std());
            self.shared.counters.packets_in.fetch_add(packets, Ordering::Relaxed);
            self.shared.counters.messages_in.fetch_add(messages, Ordering::Relaxed);
        }
        if let Err(error) = result {
            // The rest is kept so that a refused CONNECT can be answered in its own version.
            self.server.close(error, &data[consumed..], &mut output.bytes);
            return Err(End::Protocol(error));
        }
        Ok((consumed, step))
    }

    /// Writes the acknowledgements whose receipts are done.
    pub(super) fn flush_acks(&mut self, output: &mut Output) -> Result<(), End> {
        if self.server.acks().is_empty() {
            self.link.iter().for_each(Link::mend_line);
            return Ok(());
        }
        let was_behind = self.server.is_behind();
        let state = |receipt: &Arc<Receipt>| match receipt.state() {
            ReceiptState::Pending => AckState::Pending,
            ReceiptState::Done => AckState::Done,
            ReceiptState::Failed => AckState::Failed,
        };
        let link = &mut self.link;
        let failed = |kind, packet_id| {
            if let (AckKind::Pubrec, Some(link)) = (kind, link.as_mut()) {
                link.forget_failed_inbound(packet_id);
            }
        };
        self.server.flush_acks(state, failed, &mut output.bytes).map_err(End::Protocol)?;
        if let (true, Some(link)) = (self.server.acks().is_empty(), &self.link) {
            link.mend_line();
        }
        if was_behind && !self.server.is_behind() {
            self.catch_up();
        }
        Ok(())
    }

    /// Takes what the session has to send, until about `enough` bytes are encoded.
    pub(super) fn deliver(&mut self, scratch: &mut Scratch, enough: usize) {
        let Scratch { output, outbound, .. } = scratch;
        let Some(link) = &mut self.link else { return };
        let is_5 = self.server.version().is_5();
        let to_gateway = is_5 && link.peer_gateway().is_some();
        let (mut packets, mut messages, mut too_large) = (0, 0, 0);
        while self.hungry && output.len() < enough {
            link.take(outbound, TAKEN_AT_ONCE);
            self.hungry = outbound.len() == TAKEN_AT_ONCE;
            packets += outbound.len() as u64;
            for outbound in outbound.drain(..) {
                let delivery = match outbound {
                    Outbound::Release(packet_id) => {
                        self.server.release(packet_id, ReasonCode::Success, &mut output.bytes);
                        continue;
                    }
                    Outbound::Publish(delivery) => delivery,
                };
                let message = &*delivery.message;
                let expiry = match message.expiry_interval {
                    Some(_) if is_5 => message.remaining_expiry(link.hub().clock().now()),
                    _ => None,
                };
                let noted = to_gateway.then(|| {
                    let mut properties = message.properties.as_deref().cloned().unwrap_or_default();
                    via::note(self.shared.gateway, None, message.topic.as_str(), &mut properties);
                    properties
                });
                let head = PublishHead {
                    retain: delivery.retain,
                    dup: delivery.dup,
                    packet_id: delivery.packet_id,
                    properties: noted.as_ref().or(message.properties.as_deref()),
                    identifiers: delivery.identifiers.as_deref().unwrap_or_default(),
                    expiry,
                    ..PublishHead::new(message, delivery.qos)
                };
                messages += 1;
                match self.server.publish(&head, LEAVE_OUT_FROM, &mut output.bytes) {
                    Ok(Body::Copied) => {}
                    Ok(Body::LeftOut) => output.attach(message.payload.clone()),
                    Err(_) => {
                        // The client takes none so large: as if it had been sent and received [MQTT-3.1.2-25].
                        too_large += 1;
                        if let Some(packet_id) = delivery.packet_id {
                            link.acknowledge(packet_id);
                            self.hungry = true;
                        }
                    }
                }
            }
        }
        let counters = &self.shared.counters;
        counters.packets_out.fetch_add(packets, Ordering::Relaxed);
        counters.messages_out.fetch_add(messages - too_large, Ordering::Relaxed);
        if too_large > 0 {
            counters.too_large.fetch_add(too_large, Ordering::Relaxed);
        }
    }
}

/// A message that is taken care of.
const TAKEN: Outcome = Outcome::Done { matched: true };

/// A message came that was here before.
fn looped(shared: &Shared, link: &Link, topic: &str) {
    if shared.counters.looped.fetch_add(1, Ordering::Relaxed) == 0 {
        let (listener, client) = (&*shared.name, &**link.client_id());
        warn!(
            listener,
            client,
            topic,
            "a message that was here before has come back and was dropped; more like it are only counted"
        );
    }
}

/// Whether a bridge with 3.1.1 asks whether we are a gateway too, before it says which one it is; see [`via`].
fn asks_who_we_are(packet: &Subscribe<'_>) -> bool {
    let mut filters = packet.subscriptions.iter().map(|entry| entry.filter);
    filters.next() == Some(via::ID_TOPIC) && filters.next().is_none()
}

/// Answers it. The id comes before the SUBACK: when that is there and no id, the other side is not a gateway.
fn introduce(server: &mut Server<Arc<Receipt>>, packet_id: PacketId, gateway: GatewayId, output: &mut Output) {
    let id = gateway.as_str().as_bytes();
    let _ = server.publish(&PublishHead::bare(via::ID_TOPIC, id), LEAVE_OUT_FROM, &mut output.bytes);
    server.suback(packet_id, &[ReasonCode::Success], Vec::new(), &mut output.bytes);
}

/// A PUBLISH as the hub takes it, at the gateway `here`; `None` where it has been here before. The payload is copied: a
/// small message must not pin what was read with it.
fn to_hub<'a>(publish: &mqtt::Publish<'a>, here: GatewayId, from: Option<GatewayId>) -> Option<hub::Publish<'a>> {
    let bare = publish.properties.is_empty();
    let mut properties = if bare { None } else { publish.properties.to_message_properties() };
    if via::has_been_at(here, publish.topic, properties.as_deref()) {
        return None;
    }
    if from.is_some() || via::is_told(properties.as_deref()) {
        via::note(here, from, publish.topic, properties.get_or_insert_default());
    }
    Some(hub::Publish {
        topic: publish.topic,
        payload: Bytes::copy_from_slice(publish.payload),
        qos: publish.qos,
        retain: publish.retain,
        dup: publish.dup,
        packet_id: publish.packet_id,
        properties,
        expiry_interval: if bare { None } else { publish.properties.message_expiry() },
    })
}

/// Acknowledges a PUBLISH of QoS 1 or 2 (MQTT 5.0 §3.4, §3.5).
fn answer_publish(
    server: &mut Server<Arc<Receipt>>,
    qos: QoS,
    packet_id: Option<PacketId>,
    outcome: Outcome,
    output: &mut Output,
) -> Result<(), ProtocolError> {
    let is_5 = server.version().is_5();
    // Nobody waits for an answer at QoS 0; what is refused is dropped and counted by the hub.
    let Some((kind, packet_id)) = acknowledgement(qos, packet_id) else { return Ok(()) };
    let (reason, receipt) = match outcome {
        Outcome::Done { matched: false } if is_5 => (ReasonCode::NoMatchingSubscribers, None),
        Outcome::Done { .. } => (ReasonCode::Success, None),
        Outcome::Pending(receipt) => (ReasonCode::Success, Some(receipt)),
        Outcome::Refused(refusal) => {
            let (reason, what) = match refusal {
                Refusal::NotAuthorized => (ReasonCode::NotAuthorized, NOT_AUTHORIZED),
                Refusal::TopicInvalid => (ReasonCode::TopicNameInvalid, "the topic name is not accepted"),
                Refusal::QuotaExceeded => (ReasonCode::QuotaExceeded, "a receiver's queue is full"),
                Refusal::StoreUnavailable => (ReasonCode::QuotaExceeded, "the store cannot be used yet"),
                Refusal::Behind => (ReasonCode::QuotaExceeded, "a message before it could not be kept"),
            };
            if !is_5 {
                return Err(ProtocolError { reason, what });
            }
            (reason, None)
        }
    };
    server.acknowledge(kind, packet_id, reason, receipt, &mut output.bytes);
    Ok(())
}

/// Answers a PUBLISH that the rules do not allow.
fn answer_denied(
    server: &mut Server<Arc<Receipt>>,
    qos: QoS,
    packet_id: Option<PacketId>,
    habit: DeniedPublish,
    output: &mut Output,
) -> Result<(), ProtocolError> {
    let reason = match habit {
        DeniedPublish::Disconnect => {
            return Err(ProtocolError { reason: ReasonCode::NotAuthorized, what: NOT_AUTHORIZED });
        }
        DeniedPublish::Refuse if server.version().is_5() => ReasonCode::NotAuthorized,
        // 3.x cannot say no. Closing would make the client send the same again for ever.
        DeniedPublish::Refuse | DeniedPublish::Acknowledge => ReasonCode::Success,
    };
    if let Some((kind, packet_id)) = acknowledgement(qos, packet_id) {
        server.acknowledge(kind, packet_id, reason, None, &mut output.bytes);
    }
    Ok(())
}

const NOT_AUTHORIZED: &str = "not authorized to publish on the topic";

/// What answers a PUBLISH; nothing at QoS 0.
fn acknowledgement(qos: QoS, packet_id: Option<PacketId>) -> Option<(AckKind, PacketId)> {
    match qos {
        QoS::AtMostOnce => None,
        QoS::AtLeastOnce => Some((AckKind::Puback, packet_id?)),
        QoS::ExactlyOnce => Some((AckKind::Pubrec, packet_id?)),
    }
}

/// What a SUBACK says, and what it waits for.
struct Granted {
    reasons: Vec<ReasonCode>,
    receipts: Vec<Arc<Receipt>>,
}

/// Subscribes to each entry in turn (MQTT 5.0 §3.8.4).
fn subscribe(link: &mut Link, packet: &Subscribe<'_>, is_bridge: bool) -> Result<Granted, ProtocolError> {
    let identifier = packet.properties.iter().find_map(|property| match property {
        Property::SubscriptionIdentifier(identifier) => Some(identifier),
        _ => None,
    });
    let mut reasons = Vec::new();
    let mut receipts = Vec::new();
    // All are checked before the first takes effect: a malformed packet must change nothing.
    let entries: Result<Vec<_>, _> =
        packet.subscriptions.iter().map(|Subscription { filter, options }| Ok((parse(filter)?, options))).collect();
    for (filter, options) in entries? {
        let options = SubscribeOptions {
            no_local: options.no_local || is_bridge,
            retain_as_published: options.retain_as_published || is_bridge,
            retain_handling: match options.retain_handling {
                mqtt::RetainHandling::Send => RetainHandling::Send,
                mqtt::RetainHandling::SendIfNew => RetainHandling::SendIfNew,
                mqtt::RetainHandling::DoNotSend => RetainHandling::DoNotSend,
            },
            identifier,
            ..SubscribeOptions::new(options.qos)
        };
        reasons.push(match link.subscribe(&filter, options) {
            Ok(subscribed) => {
                receipts.extend(subscribed.receipt);
                match subscribed.qos {
                    QoS::AtMostOnce => ReasonCode::Success,
                    QoS::AtLeastOnce => ReasonCode::GrantedQoS1,
                    QoS::ExactlyOnce => ReasonCode::GrantedQoS2,
                }
            }
            Err(SubscribeError::NotAuthorized) => ReasonCode::NotAuthorized,
            Err(SubscribeError::QuotaExceeded) => ReasonCode::QuotaExceeded,
            Err(SubscribeError::FilterTooLong) => ReasonCode::TopicFilterInvalid,
            Err(SubscribeError::Detached) => ReasonCode::UnspecifiedError,
        });
    }
    Ok(Granted { reasons, receipts })
}

fn unsubscribe(link: &mut Link, packet: &Unsubscribe<'_>) -> Result<(PacketId, Vec<ReasonCode>), ProtocolError> {
    let filters: Result<Vec<_>, _> = packet.filters.iter().map(parse).collect();
    let existed = filters?
        .iter()
        .map(|filter| match link.unsubscribe(filter) {
            true => ReasonCode::Success,
            false => ReasonCode::NoSubscriptionExisted,
        })
        .collect();
    Ok((packet.packet_id, existed))
}

fn parse(filter: &str) -> Result<SharedFilter, ProtocolError> {
    SharedFilter::split(filter)
        .map_err(|_| ProtocolError { reason: ReasonCode::MalformedPacket, what: "a topic filter is malformed" })
}
