//! What a connected client asks for: publish, subscribe, register, change its will (MQTT-SN 1.2 §6.4 to §6.9).

use bytes::Bytes;

use super::{Client, Context, Handled, WillName};
use crate::message::QoS;
use crate::proto::mqttsn::action::{DropReason, PublishAnswer, Published, Request, SubscribeAnswer};
use crate::proto::mqttsn::packet::{MsgId, Packet, Publish, PublishQoS, ReturnCode, TopicId, TopicRef, WillTopic};
use crate::proto::mqttsn::topics::{Predefined, common_topic, short_text};
use crate::topic::{SharedFilter, TopicName};

/// PUBLISHes of QoS 1 and 2 whose answer waits for the disk. The specification allows a client one (§6.6); a few more
/// are bearable, and beyond them it is told "congestion".
const MAX_PENDING: usize = 8;

impl Client {
    /// A message from a client that is active, asleep or awake.
    ///
    /// One that sleeps has to connect before it may send anything but QoS −1 (§6.14). It is heard all the same: it is
    /// obviously awake enough to send, and what it says would be lost otherwise.
    pub(super) fn handle_in_session(&mut self, packet: &Packet<'_>, cx: &mut Context<'_>) -> Handled {
        match *packet {
            Packet::Publish(ref publish) => self.handle_publish(publish, cx),
            Packet::PubRel(msg_id) => cx.out.request(Request::Release(msg_id)),
            Packet::PubAck { topic_id, msg_id, code } => {
                let verdict = self.outbound.handle_puback((topic_id, msg_id, code), &mut self.topics, cx);
                self.heed(verdict, cx);
            }
            Packet::PubRec(msg_id) => {
                self.outbound.handle_pubrec(msg_id, cx);
                self.go_on(cx);
            }
            Packet::PubComp(msg_id) => {
                self.outbound.handle_pubcomp(msg_id, &mut self.topics, cx);
                self.go_on(cx);
            }
            Packet::RegAck { msg_id, code, .. } => {
                let verdict = self.outbound.handle_regack(msg_id, code, &mut self.topics, cx);
                self.heed(verdict, cx);
            }
            Packet::Register { msg_id, topic_name, .. } => self.handle_register(msg_id, topic_name, cx),
            Packet::Subscribe { dup, qos, msg_id, ref topic } => self.handle_subscribe(dup, qos, msg_id, topic, cx),
            Packet::Unsubscribe { msg_id, ref topic } => self.handle_unsubscribe(msg_id, topic, cx),
            Packet::WillTopicUpd(ref will) => self.handle_will_topic_update(will.as_ref(), cx),
            Packet::WillMsgUpd(message) => {
                self.will.message = Some(Bytes::copy_from_slice(message));
                cx.out.request(Request::SetWill(self.will.to_will()));
                cx.out.send(&Packet::WillMsgResp(ReturnCode::Accepted));
            }
            _ => return Handled::Unexpected,
        }
        Handled::Done
    }

    fn handle_publish(&mut self, publish: &Publish<'_>, cx: &mut Context<'_>) {
        let qos = match publish.qos {
            PublishQoS::Connectionless => None,
            PublishQoS::Connected(qos) => Some(qos),
        };
        let answer = PublishAnswer { topic: publish.topic, msg_id: publish.msg_id, qos };
        let needs_answer = qos.is_some_and(|qos| qos > QoS::AtMostOnce);
        if needs_answer && publish.msg_id == 0 {
            // It could not be acknowledged (§5.3.10).
            return cx.out.drop(DropReason::Undefined);
        }
        // The answer to the first of the two is on its way.
        if needs_answer && self.pending.contains(&publish.msg_id) {
            return;
        }
        let topic = match publish.topic {
            TopicId::Normal(id) if qos.is_some() => self.topics.name(id).cloned(),
            topic => common_topic(topic, &cx.rules.predefined),
        };
        let Some(topic) = topic else {
            cx.out.drop(DropReason::UnknownTopic);
            return answer_publish(answer, Err(ReturnCode::InvalidTopicId), cx);
        };
        if needs_answer {
            if self.pending.len() >= MAX_PENDING {
                return answer_publish(answer, Err(ReturnCode::Congestion), cx);
            }
            self.pending.push(publish.msg_id);
        }
        cx.out.request(Request::Publish {
            topic,
            payload: Bytes::copy_from_slice(publish.payload),
            qos: qos.unwrap_or(QoS::AtMostOnce),
            retain: publish.retain,
            dup: publish.dup,
            answer,
        });
    }

    /// The answer to [`Request::Publish`].
    pub fn published(&mut self, answer: PublishAnswer, result: Published, cx: &mut Context<'_>) {
        self.pending.retain(|msg_id| *msg_id != answer.msg_id);
        if self.is_connected() {
            answer_publish(answer, result, cx);
        }
    }

    /// The answer to [`Request::Release`]: it is on disk that the message is done with.
    pub fn released(&mut self, msg_id: MsgId, cx: &mut Context<'_>) {
        if self.is_connected() {
            cx.out.send(&Packet::PubComp(msg_id));
        }
    }

    fn handle_register(&mut self, msg_id: MsgId, topic_name: &[u8], cx: &mut Context<'_>) {
        let answer = match topic_name_of(topic_name).map(|name| self.topics.tell(&name)) {
            Some(Some(topic_id)) => Packet::RegAck { topic_id, msg_id, code: ReturnCode::Accepted },
            Some(None) => Packet::RegAck { topic_id: 0, msg_id, code: ReturnCode::Congestion },
            None => Packet::RegAck { topic_id: 0, msg_id, code: ReturnCode::InvalidTopicId },
        };
        cx.out.send(&answer);
    }

    fn handle_subscribe(
        &mut self,
        dup: bool,
        qos: PublishQoS,
        msg_id: MsgId,
        topic: &TopicRef<'_>,
        cx: &mut Context<'_>,
    ) {
        // Subscribing again would send the retained messages again.
        if let Some((granted, answer)) = self.last_subscribe.filter(|(_, answer)| dup && answer.msg_id == msg_id) {
            return cx.out.send(&suback(granted, answer, ReturnCode::Accepted));
        }
        if dup && self.subscribing == Some(msg_id) {
            return;
        }
        let refused = SubscribeAnswer { topic: None, msg_id };
        let PublishQoS::Connected(qos) = qos else {
            return cx.out.send(&suback(QoS::AtMostOnce, refused, ReturnCode::NotSupported));
        };
        let Some(filter) = filter_of(topic, &cx.rules.predefined) else {
            return cx.out.send(&suback(qos, refused, ReturnCode::InvalidTopicId));
        };
        let topic = match (topic, TopicName::new(filter.filter.as_str())) {
            (TopicRef::Predefined(id), Ok(name)) => {
                self.topics.use_predefined(&name, *id);
                Some(Some(TopicId::Predefined(*id)))
            }
            (TopicRef::Name(_), Ok(name)) => self.topics.id_of(&name).map(|id| Some(TopicId::Normal(id))),
            // Not relevant for short names and wildcards (§5.4.16, §6.9).
            _ => Some(None),
        };
        match topic {
            Some(topic) => {
                let answer = SubscribeAnswer { topic, msg_id };
                self.subscribing = Some(msg_id);
                cx.out.request(Request::Subscribe { filter, qos, answer });
            }
            None => cx.out.send(&suback(qos, refused, ReturnCode::Congestion)),
        }
    }

    /// The answer to [`Request::Subscribe`], when it is on disk.
    pub fn subscribed(&mut self, answer: SubscribeAnswer, result: Result<QoS, ReturnCode>, cx: &mut Context<'_>) {
        self.subscribing = self.subscribing.filter(|msg_id| *msg_id != answer.msg_id);
        if !self.is_connected() {
            return;
        }
        match result {
            Ok(granted) => {
                if let Some(TopicId::Normal(id)) = answer.topic {
                    self.topics.accepted(id);
                }
                self.last_subscribe = Some((granted, answer));
                cx.out.send(&suback(granted, answer, ReturnCode::Accepted));
            }
            Err(code) => {
                let refused = SubscribeAnswer { topic: None, ..answer };
                cx.out.send(&suback(QoS::AtMostOnce, refused, code));
            }
        }
        self.go_on(cx);
    }

    fn handle_unsubscribe(&mut self, msg_id: MsgId, topic: &TopicRef<'_>, cx: &mut Context<'_>) {
        if let Some(filter) = filter_of(topic, &cx.rules.predefined) {
            if let Ok(name) = TopicName::new(filter.filter.as_str()) {
                self.topics.stop_predefined(&name);
            }
            cx.out.request(Request::Unsubscribe { filter });
        }
        self.last_subscribe = None;
        cx.out.send(&Packet::UnsubAck(msg_id));
    }

    fn handle_will_topic_update(&mut self, will: Option<&WillTopic<'_>>, cx: &mut Context<'_>) {
        match will.map(WillName::check) {
            None => {
                self.will.name = None;
                self.will.message = None;
            }
            Some(Some(name)) => self.will.name = Some(name),
            Some(None) => return cx.out.send(&Packet::WillTopicResp(ReturnCode::InvalidTopicId)),
        }
        cx.out.request(Request::SetWill(self.will.to_will()));
        cx.out.send(&Packet::WillTopicResp(ReturnCode::Accepted));
    }
}

fn filter_of(topic: &TopicRef<'_>, predefined: &Predefined) -> Option<SharedFilter> {
    match topic {
        TopicRef::Name(name) => SharedFilter::split(std::str::from_utf8(name).ok()?).ok(),
        TopicRef::Predefined(id) => SharedFilter::split(predefined.get(id)?.as_str()).ok(),
        TopicRef::Short(name) => SharedFilter::split(short_text(name)?).ok(),
    }
}

fn topic_name_of(octets: &[u8]) -> Option<TopicName> {
    TopicName::new(std::str::from_utf8(octets).ok()?).ok()
}

fn answer_publish(answer: PublishAnswer, result: Published, cx: &mut Context<'_>) {
    let PublishAnswer { topic, msg_id, qos } = answer;
    let puback = |code| Packet::PubAck { topic_id: topic.number(), msg_id, code };
    match (qos, result) {
        // Nobody waits for an answer.
        (None, _) | (Some(QoS::AtMostOnce), Ok(())) => {}
        (Some(QoS::AtLeastOnce), Ok(())) => cx.out.send(&puback(ReturnCode::Accepted)),
        (Some(QoS::ExactlyOnce), Ok(())) => cx.out.send(&Packet::PubRec(msg_id)),
        (Some(_), Err(code)) => cx.out.send(&puback(code)),
    }
}

fn suback(qos: QoS, answer: SubscribeAnswer, code: ReturnCode) -> Packet<'static> {
    Packet::SubAck { qos, topic_id: answer.topic.map_or(0, TopicId::number), msg_id: answer.msg_id, code }
}
