//! What the session has for the upstream: taken, made what its rule says, encoded.
//!
//! What the upstream's limits forbid is sent as they allow, or given up with a reason; nothing blocks what is behind it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::{ENCODE_AHEAD_BYTES, End, Stream};
use crate::bridge::condition::DropReason;
use crate::bridge::drain::{Note, Progress};
use crate::bridge::marks;
use crate::bridge::origin::Origin;
use crate::bridge::rules::{Provenance, Retain, Rule, Unmapped};
use crate::bridge::trial::Offer;
use crate::bridge::words;
use crate::clock::UnixMillis;
use crate::hub::{Delivery, Outbound};
use crate::message::{Message, QoS};
use crate::proto::mqtt::{EncodeError, PublishHead};
use crate::via;

/// How many messages are taken from the session under one lock.
const TAKE_MESSAGES: usize = 256;

/// What was found out about a message before it is encoded.
struct Crossing<'a> {
    rule: &'a Rule,
    /// Bridges that it has crossed when it arrives.
    hops: u32,
    dup: bool,
    expiry: Option<Duration>,
    /// As what the upstream is known to take it.
    limit: Offer,
}

impl Stream<'_> {
    /// Encodes what the session may send, as far ahead as is useful.
    pub(super) fn fill(&mut self, now: Instant) -> Result<(), End> {
        if !self.is_greeted(now)? || self.is_trying(now) {
            return Ok(());
        }
        let held = self.encode_ahead(now);
        let nanos = self.throttle.hold(held, now).as_nanos();
        self.shared.counters.held_back_nanos.fetch_add(u64::try_from(nanos).unwrap_or(0), Ordering::Relaxed);
        Ok(())
    }

    /// Tells whether `max_rate` holds something back.
    fn encode_ahead(&mut self, now: Instant) -> bool {
        let wall = self.shared.hub.clock().now();
        while self.encoded.bytes.get_ref().len() < ENCODE_AHEAD_BYTES {
            let allowed = self.throttle.room(now);
            match self.taken.front() {
                Some(Outbound::Publish(_)) if allowed == 0 => return true,
                Some(_) => {}
                None => {
                    let room = self.window.room();
                    let mut taken = Vec::from(std::mem::take(&mut self.taken));
                    // No more than may go at once: what is taken has its place in line.
                    let most = TAKE_MESSAGES.min(room).min(allowed);
                    match self.leaving {
                        None => self.link.take(&mut taken, most),
                        Some(_) => _ = self.link.take_begun(&mut taken, most),
                    }
                    self.taken = taken.into();
                    if self.taken.is_empty() {
                        return self.leaving.is_none() && allowed == 0 && room > 0 && !self.link.is_idle();
                    }
                    continue;
                }
            }
            match self.taken.pop_front() {
                None => {}
                Some(outbound) if self.is_condemned(&outbound) => self.refuse(&outbound),
                // Of a message that was lost with a damaged database, which cannot have crossed at QoS 2.
                Some(Outbound::Release(packet_id)) if self.client.limits().maximum_qos < QoS::ExactlyOnce => {
                    self.link.completed(packet_id);
                }
                Some(Outbound::Release(packet_id)) => {
                    self.window.sent(now);
                    self.client.release(packet_id, now, self.encoded.bytes.get_mut());
                }
                Some(Outbound::Publish(delivery)) => {
                    let before = self.encoded.bytes.get_ref().len();
                    match self.send(&delivery, Offer::AS_WISHED, now, wall) {
                        Ok(_) => self.throttle.spend(self.encoded.bytes.get_ref().len() - before),
                        Err(reason) => self.give_up(&delivery, reason),
                    }
                }
            }
        }
        false
    }

    /// Watches how the backlog goes, and tells of it.
    pub(super) fn look_at_backlog(&mut self, now: Instant) {
        if !self.drain.is_due(now) {
            return;
        }
        let sent = self.shared.counters.sent.load(Ordering::Relaxed);
        let note = self.drain.look(now, self.link.backlog(), sent);
        self.shared.condition.lock().progress = self.drain.progress();
        let upstream = &self.shared.name;
        match note {
            None => {}
            Some(Note::Begins { messages }) => info!(upstream, messages, "a backlog begins to drain"),
            Some(Note::Lasts(progress)) => {
                let Progress { messages, rate, seconds_left } = progress;
                info!(upstream, messages, rate = rate.round(), seconds_left, "the backlog drains");
            }
            Some(Note::Gone { sent, took }) => {
                let rate = (sent as f64 / took.as_secs_f64().max(0.001)).round();
                info!(upstream, sent, ?took, rate, "the backlog is gone");
            }
        }
    }

    /// Encodes one message as its rule, the upstream's limits and `limit` allow; as what it goes.
    pub(super) fn send(
        &mut self,
        delivery: &Delivery,
        limit: Offer,
        now: Instant,
        wall: UnixMillis,
    ) -> Result<Offer, DropReason> {
        self.window.crossed_at = now;
        let message = &delivery.message;
        let rules = self.rules;
        let rule = rules.outgoing.map(message.topic.as_str(), &mut self.topic).map_err(|unmapped| match unmapped {
            Unmapped::NoRule => DropReason::NoRule,
            Unmapped::TooLong => DropReason::TopicTooLong,
        })?;
        let hops = marks::hops(message.properties.as_deref()) + 1;
        if hops > rules.max_hops.into() {
            return Err(DropReason::Looped);
        }
        let dup = delivery.dup && !self.is_new;
        let expiry = rule.remaining_expiry(message.remaining_expiry(wall), wall.since(message.accepted_at));
        // What the upstream may have begun to receive is not taken back.
        if expiry.is_some_and(|left| left.is_zero()) && !dup {
            return Err(DropReason::Expired);
        }
        let limit = if self.lessons.is_empty() { limit } else { limit.and(self.lesson(&rule.filter)) };
        let crossing = Crossing { rule, hops, dup, expiry, limit };
        match self.encode(delivery, &crossing, rule.provenance, now) {
            // Better without its origin than not at all.
            Err(DropReason::TooLarge) if rule.provenance != Provenance::Omit => {
                self.encode(delivery, &crossing, Provenance::Omit, now)
            }
            encoded => encoded,
        }
    }

    /// Encodes one message with its origin where `provenance` says.
    fn encode(
        &mut self,
        delivery: &Delivery,
        crossing: &Crossing<'_>,
        provenance: Provenance,
        now: Instant,
    ) -> Result<Offer, DropReason> {
        let (message, &Crossing { rule, hops, dup, expiry, limit }) = (&delivery.message, crossing);
        let is_5 = self.client.version().is_5();
        let origin = Origin {
            queue: &self.rules.queue,
            time: message.accepted_at,
            sequence: delivery.sequence,
            boot: self.shared.hub.clock().boot_id(),
        };
        let is_plain = message.properties.is_none() && !rule.adds_properties();
        let marked;
        let properties = match message.properties.as_deref() {
            properties if !is_5 => properties,
            None if is_plain => {
                via::note_next(self.gateway, message.topic.as_str(), &mut self.first_crossing);
                Some(&self.first_crossing)
            }
            properties => {
                let mut properties = properties.cloned().unwrap_or_default();
                rule.add_properties(message.topic.as_str(), &mut properties);
                marks::set_hops(&mut properties, hops);
                via::note(self.gateway, None, message.topic.as_str(), &mut properties);
                if provenance == Provenance::UserProperties {
                    origin.add_to(&mut properties);
                }
                marked = properties;
                Some(&marked)
            }
        };
        let (payload, has_origin) = match provenance {
            Provenance::Json if origin.write_into(&message.payload, &mut self.payload) => (&*self.payload, true),
            Provenance::UserProperties => (&*message.payload, is_5),
            Provenance::Json | Provenance::Omit => (&*message.payload, false),
        };
        let wish =
            Offer { qos: delivery.qos.min(rule.qos), retain: delivery.retain && rule.retain == Retain::AsPublished };
        let Offer { qos, retain } = wish.and(limit);
        let head = PublishHead {
            topic: &self.topic,
            qos,
            retain,
            dup,
            packet_id: delivery.packet_id,
            properties,
            identifiers: &[],
            expiry,
            topic_alias: None,
            payload,
        };
        let out = self.encoded.bytes.get_mut();
        let sent = self.client.publish(&head, usize::MAX, now, out).map_err(|error| match error {
            EncodeError::PacketTooLarge => DropReason::TooLarge,
            EncodeError::FieldTooLong => DropReason::TopicTooLong,
        })?;
        let counters = &self.shared.counters;
        let offered = Offer { qos: sent.qos, retain: retain && self.client.limits().retain_available };
        if offered != wish {
            counters.lowered.fetch_add(1, Ordering::Relaxed);
        }
        match delivery.packet_id {
            Some(packet_id) if sent.qos == QoS::AtMostOnce => self.encoded.lowered.push(packet_id),
            Some(_) => self.window.sent(now),
            None => _ = counters.sent.fetch_add(1, Ordering::Relaxed),
        }
        if rule.provenance != Provenance::Omit && !has_origin {
            self.without_origin(message);
        }
        Ok(offered)
    }

    /// A message went out without the origin that its rule wants.
    fn without_origin(&mut self, message: &Message) {
        self.shared.counters.without_provenance.fetch_add(1, Ordering::Relaxed);
        let (topic, bytes, is_5) = (&message.topic, message.size(), self.client.version().is_5());
        self.tell("provenance", |upstream| {
            if message.payload.is_empty() {
                warn!(upstream, %topic, "an empty payload stays empty, also where `provenance` is to stand in it; more like it are only counted");
            } else if is_5 {
                warn!(upstream, %topic, bytes, "a message would be larger with its `provenance` than the upstream accepts and went without; more like it are only counted");
            } else {
                warn!(upstream, "the upstream speaks MQTT 3.1.1, which has no user properties for `provenance`; `provenance: json` writes into payloads");
            }
        });
    }

    pub(super) fn give_up(&mut self, delivery: &Delivery, reason: DropReason) {
        if let Some(packet_id) = delivery.packet_id {
            self.link.acknowledge(packet_id);
        }
        let (topic, bytes) = (&delivery.message.topic, delivery.message.size());
        self.shared.dropped(reason, || format!("a message on `{topic}` ({bytes} bytes)"));
        let limit = self.client.limits().max_packet_size;
        let what = match reason {
            DropReason::TooLarge => "a message is larger than the upstream accepts and was not forwarded",
            DropReason::TopicTooLong => "a message has too long a topic or property for MQTT and was not forwarded",
            DropReason::Looped => words::LOOPED,
            DropReason::Expired => "a message became older than it or its rule allows and was not forwarded",
            _ => "a message waited for a rule that does not exist any more and was not forwarded",
        };
        self.tell(reason.name(), |upstream| {
            if matches!(reason, DropReason::Looped | DropReason::Expired) {
                // What goes in circles has been here before, and what expires was meant to: nothing is lost.
                warn!(upstream, %topic, "{what}; more like it are only counted");
            } else {
                error!(upstream, %topic, bytes, limit, "{what}; more like it are only counted");
            }
        });
    }
}
