//! Messages on their way to a client: one REGISTER and one exchange of QoS 1 or 2 at a time (MQTT-SN 1.2 §6.5, §6.6,
//! §6.10, §6.13).
//!
//! Whatever the client has not acknowledged stays with its session on the hub; what is here is only what is on the
//! wire right now, and how often it has been.

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::time::Instant;

use super::{Context, Rules};
use crate::message::QoS;
use crate::proto::mqttsn::action::{Delivery, DropReason, Notice, Outputs, Request};
use crate::proto::mqttsn::codec;
use crate::proto::mqttsn::packet::{MsgId, Packet, Publish, PublishQoS, ReturnCode, TopicId};
use crate::proto::mqttsn::topics::{TopicMap, Way};

/// Deliveries that wait behind a QoS 2 exchange whose release is on its way to the disk.
const MAX_BACKLOG: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Outbound {
    register: Option<Registering>,
    exchange: Option<Exchange>,
    backlog: VecDeque<Delivery>,
    /// The hub has been asked for a message and has not answered yet.
    taking: bool,
    last_register: MsgId,
    told: Told,
}

/// What was logged about this client already.
#[derive(Debug, Default)]
struct Told {
    too_big: bool,
    exhausted: bool,
}

/// A REGISTER without its REGACK, and the message that waits for it.
#[derive(Debug)]
struct Registering {
    topic_id: u16,
    msg_id: MsgId,
    delivery: Delivery,
    cures: u32,
    retry: Retry,
}

/// A message of QoS 1 or 2 that is not yet acknowledged.
#[derive(Debug)]
struct Exchange {
    packet_id: NonZeroU16,
    stage: Stage,
    retry: Retry,
}

#[derive(Debug)]
enum Stage {
    /// PUBLISH sent. `cures`: how often the client had forgotten the topic id and was told again.
    Publish { delivery: Delivery, topic: TopicId, cures: u32 },
    /// PUBREC came; the session writes that down.
    Received,
    /// PUBREL sent.
    Release,
}

/// When to send again, and how often it has been; `at` is `None` while the client sleeps.
#[derive(Debug, Default)]
pub(super) struct Retry {
    pub at: Option<Instant>,
    attempts: u32,
}

impl Retry {
    pub fn start(now: Instant, rules: &Rules) -> Self {
        Self { at: Some(now + rules.retry_interval), attempts: 0 }
    }

    pub fn due(&mut self, cx: &Context<'_>) -> Due {
        if self.at.is_none_or(|at| at > cx.now) {
            return Due::Later;
        }
        if self.attempts >= cx.rules.retry_limit {
            return Due::Exhausted;
        }
        *self = Self { at: Some(cx.now + cx.rules.retry_interval), attempts: self.attempts + 1 };
        Due::Again
    }
}

/// What a retry timer says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    Later,
    Again,
    Exhausted,
}

/// What a timer or a "congestion" means for the client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Fine,
    /// It did not answer and is lost.
    Unanswered,
    /// It cannot take more at the moment.
    Congested,
}

impl Outbound {
    pub fn clear(&mut self, out: &mut Outputs) {
        let waiting = self.register.take().map(|register| register.delivery).into_iter().chain(self.backlog.drain(..));
        waiting.filter(|delivery| delivery.packet_id.is_none()).for_each(|_| out.drop(DropReason::Gone));
        *self = Self { last_register: self.last_register, ..Self::default() };
    }

    pub fn is_idle(&self) -> bool {
        self.register.is_none() && self.exchange.is_none() && self.backlog.is_empty()
    }

    /// Asks the session for a message if one could be sent.
    pub fn want(&mut self, out: &mut Outputs) {
        let ready = match self.exchange.as_ref().map(|exchange| &exchange.stage) {
            None => self.backlog.is_empty(),
            Some(Stage::Received) => self.backlog.len() < MAX_BACKLOG,
            Some(_) => false,
        };
        if ready && self.register.is_none() && !self.taking {
            self.taking = true;
            out.request(Request::Take);
        }
    }

    pub fn taken(&mut self) {
        self.taking = false;
    }

    pub fn deliver(&mut self, delivery: Delivery, topics: &mut TopicMap, cx: &mut Context<'_>) {
        self.backlog.push_back(delivery);
        self.pump(topics, cx);
    }

    /// The session has written down the PUBREC, or remembers it from before.
    pub fn release(&mut self, packet_id: NonZeroU16, cx: &mut Context<'_>) {
        // With a receive maximum of one, the session has no other exchange open.
        self.exchange = Some(Exchange { packet_id, stage: Stage::Release, retry: Retry::start(cx.now, cx.rules) });
        cx.out.send(&Packet::PubRel(packet_id.get()));
    }

    /// Sends what waits and can go.
    pub fn pump(&mut self, topics: &mut TopicMap, cx: &mut Context<'_>) {
        while self.register.is_none() {
            let blocked = |delivery: &Delivery| delivery.packet_id.is_some() && self.exchange.is_some();
            match self.backlog.front() {
                Some(delivery) if !blocked(delivery) => {}
                _ => break,
            }
            let Some(delivery) = self.backlog.pop_front() else { break };
            self.start(delivery, 0, topics, cx);
        }
    }

    fn start(&mut self, delivery: Delivery, cures: u32, topics: &mut TopicMap, cx: &mut Context<'_>) {
        match topics.way(&delivery.message.topic) {
            Way::Ready(topic) => self.publish(delivery, topic, cures, cx),
            Way::Register(topic_id) => self.register(delivery, topic_id, cures, cx),
            Way::Refused => give_up(&delivery, DropReason::Refused, cx.out),
            Way::Exhausted => {
                if !std::mem::replace(&mut self.told.exhausted, true) {
                    let (client_id, topic) = (cx.client_id.clone(), delivery.message.topic.clone());
                    cx.out.notice(Notice::TopicsExhausted { client_id, topic });
                }
                give_up(&delivery, DropReason::TopicsExhausted, cx.out);
            }
        }
    }

    fn publish(&mut self, delivery: Delivery, topic: TopicId, cures: u32, cx: &mut Context<'_>) {
        let packet = publish_packet(&delivery, topic, delivery.dup);
        if !self.fits(&packet, &delivery, cx) {
            return;
        }
        cx.out.send(&packet);
        if let Some(packet_id) = delivery.packet_id {
            let retry = Retry::start(cx.now, cx.rules);
            self.exchange = Some(Exchange { packet_id, stage: Stage::Publish { delivery, topic, cures }, retry });
        }
    }

    fn register(&mut self, delivery: Delivery, topic_id: u16, cures: u32, cx: &mut Context<'_>) {
        let msg_id = self.last_register.checked_add(1).unwrap_or(1);
        let message = delivery.message.clone();
        let packet = Packet::Register { topic_id, msg_id, topic_name: message.topic.as_str().as_bytes() };
        if !self.fits(&packet, &delivery, cx) {
            return;
        }
        cx.out.send(&packet);
        self.last_register = msg_id;
        let retry = Retry::start(cx.now, cx.rules);
        self.register = Some(Registering { topic_id, msg_id, delivery, cures, retry });
    }

    fn fits(&mut self, packet: &Packet<'_>, delivery: &Delivery, cx: &mut Context<'_>) -> bool {
        let bytes = codec::encoded_len(packet);
        if bytes <= cx.rules.max_packet_bytes {
            return true;
        }
        if !std::mem::replace(&mut self.told.too_big, true) {
            let (client_id, topic) = (cx.client_id.clone(), delivery.message.topic.clone());
            cx.out.notice(Notice::TooBig { client_id, topic, bytes });
        }
        give_up(delivery, DropReason::TooBig, cx.out);
        false
    }

    pub fn handle_regack(
        &mut self,
        msg_id: MsgId,
        code: ReturnCode,
        topics: &mut TopicMap,
        cx: &mut Context<'_>,
    ) -> Verdict {
        let Some(register) = self.register.take_if(|register| register.msg_id == msg_id) else {
            return Verdict::Fine;
        };
        match code {
            ReturnCode::Accepted => {
                topics.accepted(register.topic_id);
                self.publish(register.delivery, TopicId::Normal(register.topic_id), register.cures, cx);
            }
            ReturnCode::Congestion => {
                let retry = Retry::start(cx.now, cx.rules);
                self.register = Some(Registering { retry, ..register });
                return Verdict::Congested;
            }
            ReturnCode::InvalidTopicId | ReturnCode::NotSupported => {
                topics.refused(register.topic_id);
                give_up(&register.delivery, DropReason::Refused, cx.out);
            }
        }
        self.pump(topics, cx);
        Verdict::Fine
    }

    pub fn handle_puback(
        &mut self,
        (topic_id, msg_id, code): (u16, MsgId, ReturnCode),
        topics: &mut TopicMap,
        cx: &mut Context<'_>,
    ) -> Verdict {
        let awaited = |exchange: &mut Exchange| {
            exchange.packet_id.get() == msg_id && matches!(exchange.stage, Stage::Publish { .. })
        };
        let Some(mut exchange) = self.exchange.take_if(awaited) else {
            // The answer to a QoS 0 message that is gone; the next one on this topic will register again.
            if msg_id == 0 && code == ReturnCode::InvalidTopicId {
                topics.unknown(topic_id);
            }
            return Verdict::Fine;
        };
        let Stage::Publish { delivery, topic, cures } = exchange.stage else { return Verdict::Fine };
        match (code, topic) {
            (ReturnCode::Accepted, _) if delivery.qos == QoS::AtLeastOnce => {
                cx.out.request(Request::Acknowledge(exchange.packet_id));
            }
            (ReturnCode::Accepted, _) => {
                // A QoS 2 message is answered by PUBREC; this is not it.
                exchange.stage = Stage::Publish { delivery, topic, cures };
                self.exchange = Some(exchange);
            }
            (ReturnCode::Congestion, _) => {
                exchange.stage = Stage::Publish { delivery, topic, cures };
                exchange.retry = Retry::start(cx.now, cx.rules);
                self.exchange = Some(exchange);
                return Verdict::Congested;
            }
            (ReturnCode::InvalidTopicId, TopicId::Normal(id)) if cures < cx.rules.retry_limit => {
                topics.unknown(id);
                self.start(delivery, cures + 1, topics, cx);
            }
            (ReturnCode::InvalidTopicId | ReturnCode::NotSupported, _) => {
                give_up(&delivery, DropReason::Refused, cx.out);
            }
        }
        self.pump(topics, cx);
        Verdict::Fine
    }

    pub fn handle_pubrec(&mut self, msg_id: MsgId, cx: &mut Context<'_>) {
        match self.exchange.as_mut() {
            Some(exchange) if exchange.packet_id.get() == msg_id => match &exchange.stage {
                Stage::Publish { delivery, .. } if delivery.qos == QoS::ExactlyOnce => {
                    exchange.stage = Stage::Received;
                    exchange.retry = Retry::default();
                    cx.out.request(Request::Received(exchange.packet_id));
                }
                Stage::Publish { .. } => cx.out.drop(DropReason::Unexpected),
                Stage::Received => {}
                Stage::Release => cx.out.send(&Packet::PubRel(msg_id)),
            },
            // The message is done with on our side; let the client be, too.
            _ => cx.out.send(&Packet::PubRel(msg_id)),
        }
    }

    pub fn handle_pubcomp(&mut self, msg_id: MsgId, topics: &mut TopicMap, cx: &mut Context<'_>) {
        let done = self
            .exchange
            .take_if(|exchange| exchange.packet_id.get() == msg_id && matches!(exchange.stage, Stage::Release));
        if let Some(exchange) = done {
            cx.out.request(Request::Completed(exchange.packet_id));
            self.pump(topics, cx);
        }
    }

    /// The client sleeps: nothing is sent, nothing is expected.
    pub fn suspend(&mut self) {
        for retry in self.retries() {
            *retry = Retry::default();
        }
    }

    /// The client listens again: what it has not acknowledged is sent once more.
    pub fn resume(&mut self, topics: &mut TopicMap, cx: &mut Context<'_>) {
        let (register, exchange) = (self.register.take(), self.exchange.take());
        if let Some(exchange) = exchange {
            match exchange.stage {
                Stage::Publish { mut delivery, .. } => {
                    delivery.dup = true;
                    self.start(delivery, 0, topics, cx);
                }
                Stage::Received => self.exchange = Some(exchange),
                Stage::Release => self.release(exchange.packet_id, cx),
            }
        }
        if let Some(register) = register {
            // It came before what is in the backlog; whether it still needs its REGISTER may have changed.
            self.backlog.push_front(register.delivery);
        }
        self.pump(topics, cx);
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        let register = self.register.as_ref().and_then(|register| register.retry.at);
        let exchange = self.exchange.as_ref().and_then(|exchange| exchange.retry.at);
        register.into_iter().chain(exchange).min()
    }

    pub fn handle_timeout(&mut self, cx: &mut Context<'_>) -> Verdict {
        let due = self.register.as_mut().map_or(Due::Later, |register| register.retry.due(cx));
        match (due, &self.register) {
            (Due::Again, Some(Registering { topic_id, msg_id, delivery, .. })) => {
                let topic_name = delivery.message.topic.as_str().as_bytes();
                cx.out.send(&Packet::Register { topic_id: *topic_id, msg_id: *msg_id, topic_name });
            }
            (Due::Exhausted, _) => return Verdict::Unanswered,
            _ => {}
        }
        let due = self.exchange.as_mut().map_or(Due::Later, |exchange| exchange.retry.due(cx));
        match (due, &self.exchange) {
            (Due::Again, Some(Exchange { packet_id, stage, .. })) => match stage {
                Stage::Publish { delivery, topic, .. } => cx.out.send(&publish_packet(delivery, *topic, true)),
                Stage::Received => {}
                Stage::Release => cx.out.send(&Packet::PubRel(packet_id.get())),
            },
            (Due::Exhausted, _) => return Verdict::Unanswered,
            _ => {}
        }
        Verdict::Fine
    }

    fn retries(&mut self) -> impl Iterator<Item = &mut Retry> {
        let register = self.register.as_mut().map(|register| &mut register.retry);
        register.into_iter().chain(self.exchange.as_mut().map(|exchange| &mut exchange.retry))
    }
}

/// The client cannot have this message: it must not stay at the head of its queue for ever.
fn give_up(delivery: &Delivery, reason: DropReason, out: &mut Outputs) {
    out.drop(reason);
    if let Some(packet_id) = delivery.packet_id {
        out.request(Request::Acknowledge(packet_id));
    }
}

fn publish_packet(delivery: &Delivery, topic: TopicId, dup: bool) -> Packet<'_> {
    Packet::Publish(Publish {
        dup: dup && delivery.packet_id.is_some(),
        qos: PublishQoS::Connected(delivery.qos),
        retain: delivery.retain,
        topic,
        msg_id: delivery.packet_id.map_or(0, NonZeroU16::get),
        payload: &delivery.message.payload,
    })
}
