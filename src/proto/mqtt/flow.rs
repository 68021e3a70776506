//! What server and client share: the order of acknowledgements, quotas, topic aliases (MQTT 5.0 §3.3.2.3.4, §4.6, §4.9).

use std::collections::VecDeque;
use std::num::NonZeroU16;

use super::packet::{Ack, Packet, Publish, Version};
use super::property::Property;
use super::{Body, PublishHead, encode_publish};
use super::{EncodeError, MAX_PACKET_BYTES, PacketId, ProtocolError, ReasonCode};
use crate::message::QoS;

/// Which acknowledgement answers an inbound packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckKind {
    Puback,
    Pubrec,
    Pubcomp,
}

/// What has become of the promise behind an acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckState {
    Pending,
    Done,
    /// It cannot be kept: a 5.0 peer is told (0x97), the connection to another ends, so that it sends again.
    Failed,
}

/// Acknowledgements of inbound packets, sent in the order of those packets, each when its receipt `R` is done
/// (MQTT 5.0 §4.6).
#[derive(Debug)]
pub struct Acks<R> {
    waiting: VecDeque<(Answer, Option<R>)>,
    /// How many of `waiting` are SUBACKs.
    subacks: usize,
}

/// What is written when its turn has come.
#[derive(Debug)]
enum Answer {
    Ack(AckKind, PacketId, ReasonCode),
    /// A SUBACK.
    Encoded(Box<[u8]>),
    /// A SUBACK waits for more than one receipt; this one is not the last.
    Nothing,
}

/// Room for this many waiting acknowledgements is kept when none waits.
const ACKS_KEPT: usize = 16;

impl<R> Acks<R> {
    const fn new() -> Self {
        Self { waiting: VecDeque::new(), subacks: 0 }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a SUBACK waits: messages of its subscriptions should come after it.
    pub fn holds_suback(&self) -> bool {
        self.subacks > 0
    }

    /// The next answer whose turn it is and whose receipt is done.
    fn pop(
        &mut self,
        version: Version,
        state: &mut impl FnMut(&R) -> AckState,
        failed: &mut impl FnMut(AckKind, PacketId),
    ) -> Result<Option<Answer>, ProtocolError> {
        let Some((_, receipt)) = self.waiting.front() else {
            if self.waiting.capacity() > ACKS_KEPT {
                self.waiting = VecDeque::new();
            }
            return Ok(None);
        };
        let state = receipt.as_ref().map_or(AckState::Done, state);
        if state == AckState::Pending {
            return Ok(None);
        }
        let Some((answer, _)) = self.waiting.pop_front() else { return Ok(None) };
        self.subacks -= usize::from(matches!(answer, Answer::Encoded(_)));
        if let (AckState::Failed, Answer::Ack(kind, packet_id, _)) = (state, &answer) {
            failed(*kind, *packet_id);
        }
        match (state, answer) {
            // 5.0 has a word for it; PUBCOMP has not.
            (AckState::Failed, Answer::Ack(kind, packet_id, _)) if version.is_5() && kind != AckKind::Pubcomp => {
                Ok(Some(Answer::Ack(kind, packet_id, ReasonCode::QuotaExceeded)))
            }
            (AckState::Failed, _) => {
                let what = "a packet could not be journaled and is not acknowledged";
                // 3.x is not told the reason; it is that of the same refusal in 5.0.
                let is_told = version.is_5();
                let reason = if is_told { ReasonCode::ImplementationSpecificError } else { ReasonCode::QuotaExceeded };
                Err(ProtocolError::with(reason, what))
            }
            (_, answer) => Ok(Some(answer)),
        }
    }
}

/// The inbound half of a connection: what the peer may send and what we still owe it.
#[derive(Debug)]
pub(super) struct Inbound<R> {
    pub acks: Acks<R>,
    /// How many unacknowledged PUBLISH packets we accept; 3.x peers know no such limit.
    pub receive_maximum: u16,
    unacknowledged: u16,
    topic_alias_maximum: u16,
    aliases: Vec<Option<Box<str>>>,
}

impl<R> Inbound<R> {
    pub fn new(receive_maximum: u16, topic_alias_maximum: u16) -> Self {
        Self { acks: Acks::new(), receive_maximum, unacknowledged: 0, topic_alias_maximum, aliases: Vec::new() }
    }

    /// Counts an inbound PUBLISH and puts the topic name in place of its alias.
    pub fn accept<'a>(&'a mut self, mut publish: Publish<'a>, version: Version) -> Result<Publish<'a>, ProtocolError> {
        if !version.is_5() {
            return Ok(publish);
        }
        if publish.qos != QoS::AtMostOnce {
            // [MQTT-3.3.4-7], [MQTT-3.3.4-9]
            if self.unacknowledged >= self.receive_maximum {
                let what = "more PUBLISH packets are unacknowledged than the receive maximum allows";
                return Err(ProtocolError::with(ReasonCode::ReceiveMaximumExceeded, what));
            }
            self.unacknowledged += 1;
        }
        if publish.properties.is_empty() {
            return Ok(publish);
        }
        let alias = publish.properties.iter().find_map(|property| match property {
            Property::TopicAlias(alias) => Some(alias.get()),
            _ => None,
        });
        if let Some(alias) = alias {
            publish.topic = self.resolve(publish.topic, alias)?;
        }
        Ok(publish)
    }

    fn resolve<'a>(&'a mut self, topic: &'a str, alias: u16) -> Result<&'a str, ProtocolError> {
        // [MQTT-3.3.2-9]
        if alias > self.topic_alias_maximum {
            return Err(ProtocolError::with(ReasonCode::TopicAliasInvalid, "a topic alias is above its maximum"));
        }
        let index = usize::from(alias) - 1;
        if topic.is_empty() {
            let known = self.aliases.get(index).and_then(|known| known.as_deref());
            return known.ok_or(ProtocolError::protocol("a topic alias has not been given a topic name"));
        }
        if self.aliases.len() <= index {
            self.aliases.resize(index + 1, None);
        }
        self.aliases[index] = Some(topic.into());
        Ok(topic)
    }

    /// Acknowledges an inbound packet, now or once `receipt` is done and its turn has come.
    pub fn acknowledge(
        &mut self,
        kind: AckKind,
        packet_id: PacketId,
        reason: ReasonCode,
        receipt: Option<R>,
        version: Version,
        out: &mut Vec<u8>,
    ) {
        if receipt.is_none() && self.acks.is_empty() {
            self.write(kind, packet_id, reason, version, out);
        } else {
            self.acks.waiting.push_back((Answer::Ack(kind, packet_id, reason), receipt));
        }
    }

    /// Sends `packet`, already encoded, once all of `receipts` are done and its turn has come.
    pub fn answer(&mut self, packet: &[u8], mut receipts: Vec<R>, out: &mut Vec<u8>) {
        let last = receipts.pop();
        if last.is_none() && self.acks.is_empty() {
            out.extend_from_slice(packet);
            return;
        }
        self.acks.waiting.extend(receipts.into_iter().map(|receipt| (Answer::Nothing, Some(receipt))));
        self.acks.waiting.push_back((Answer::Encoded(packet.into()), last));
        self.acks.subacks += 1;
    }

    /// Writes the acknowledgements whose turn has come.
    pub fn flush(
        &mut self,
        mut state: impl FnMut(&R) -> AckState,
        mut failed: impl FnMut(AckKind, PacketId),
        version: Version,
        out: &mut Vec<u8>,
    ) -> Result<(), ProtocolError> {
        while let Some(answer) = self.acks.pop(version, &mut state, &mut failed)? {
            match answer {
                Answer::Ack(kind, packet_id, reason) => self.write(kind, packet_id, reason, version, out),
                Answer::Encoded(packet) => out.extend_from_slice(&packet),
                Answer::Nothing => {}
            }
        }
        Ok(())
    }

    fn write(&mut self, kind: AckKind, packet_id: PacketId, reason: ReasonCode, version: Version, out: &mut Vec<u8>) {
        // A PUBREC that accepts keeps its place in the quota until PUBCOMP (MQTT 5.0 §4.9).
        if kind != AckKind::Pubrec || reason.is_error() {
            self.unacknowledged = self.unacknowledged.saturating_sub(1);
        }
        let ack = Ack::new(packet_id, reason);
        let packet = match kind {
            AckKind::Puback => Packet::Puback(ack),
            AckKind::Pubrec => Packet::Pubrec(ack),
            AckKind::Pubcomp => Packet::Pubcomp(ack),
        };
        // An acknowledgement without properties has five bytes at most; a peer that accepts fewer is beyond help.
        let _ = packet.encode(version, MAX_PACKET_BYTES, out);
    }
}

/// The outbound half of a connection: what the peer accepts.
#[derive(Debug)]
pub(super) struct Outbound {
    pub max_packet_size: u32,
    topic_alias_maximum: usize,
    aliases: Vec<Box<str>>,
}

/// We give out at most this many aliases on a connection: they are searched one by one.
const MAX_OUTBOUND_ALIASES: u16 = 16;

/// Topics shorter than this gain nothing from an alias, which takes three bytes.
const MIN_ALIASED_TOPIC_BYTES: usize = 4;

impl Outbound {
    pub fn new(max_packet_size: u32, topic_alias_maximum: u16) -> Self {
        let topic_alias_maximum = topic_alias_maximum.min(MAX_OUTBOUND_ALIASES).into();
        Self { max_packet_size, topic_alias_maximum, aliases: Vec::new() }
    }

    /// Writes a PUBLISH, with a topic alias where the peer takes one.
    pub fn publish(
        &mut self,
        publish: &PublishHead<'_>,
        version: Version,
        leave_out_from: usize,
        out: &mut Vec<u8>,
    ) -> Result<Body, EncodeError> {
        if self.topic_alias_maximum == 0 || publish.topic.len() < MIN_ALIASED_TOPIC_BYTES {
            return encode_publish(version, publish, self.max_packet_size, leave_out_from, out);
        }
        let known = self.aliases.iter().position(|topic| **topic == *publish.topic);
        let index = known.unwrap_or(self.aliases.len());
        if index >= self.topic_alias_maximum {
            return encode_publish(version, publish, self.max_packet_size, leave_out_from, out);
        }
        let topic = if known.is_some() { "" } else { publish.topic };
        let aliased = PublishHead { topic, topic_alias: NonZeroU16::new(index as u16 + 1), ..*publish };
        let written = encode_publish(version, &aliased, self.max_packet_size, leave_out_from, out)?;
        // Only what was really sent gives the alias its meaning.
        if known.is_none() {
            self.aliases.push(publish.topic.into());
        }
        Ok(written)
    }
}
