//! The client's side of a connection under any sequence of what a server sends and what the bridge does: it never panics,
//! what it writes are packets of its version that keep to what the server's CONNACK allows.
#![no_main]

use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use fieldgate_fuzz::message::QoS;
use fieldgate_fuzz::mqtt::{Aliases, AnyVersion, ack_kind, ack_packet, each_packet, message, packet_id, qos, topic};
use fieldgate_fuzz::proto::mqtt::client::{Client, Event, Options};
use fieldgate_fuzz::proto::mqtt::{
    Ack, AckState, Connack, Disconnect, MAX_PACKET_BYTES, Packet, Property, PropertyList, ProtocolError, Publish,
    PublishHead, ReasonCode, Suback, Subscription, SubscriptionOptions, Unsuback, Version,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    version: AnyVersion,
    keep_alive: u8,
    receive_maximum: u8,
    topic_alias_maximum: u8,
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Bytes(&'a [u8]),
    Connack {
        refused: bool,
        present: bool,
        limits: Limits,
    },
    Publish {
        level: u8,
        id: u8,
        topic: Option<u8>,
        alias: Option<u8>,
        payload: &'a [u8],
    },
    Ack {
        kind: u8,
        id: u8,
    },
    Release(u8),
    /// An answer to the oldest request, or to one that was never made.
    Suback {
        good: bool,
        entries: u8,
    },
    Unsuback {
        good: bool,
    },
    Pong,
    Disconnect,
    Send {
        topic: u8,
        level: u8,
        id: u8,
        payload: &'a [u8],
    },
    SendRelease(u8),
    Subscribe(u8),
    Unsubscribe(u8),
    Acknowledge {
        kind: u8,
        id: u8,
        receipt: Option<u8>,
    },
    Flush {
        done: u8,
        failed: Option<u8>,
    },
    Wait(u16),
    Leave,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Limits {
    max_packet_size: Option<u8>,
    topic_alias_maximum: Option<u8>,
    maximum_qos: Option<bool>,
    retain_available: Option<bool>,
    keep_alive: Option<u8>,
}

struct Run {
    client: Client<u8>,
    version: Version,
    now: Instant,
    out: Vec<u8>,
    aliases: Aliases,
    requests: Vec<(u16, usize)>,
    closed: bool,
}

fuzz_target!(|input: Input<'_>| {
    let version = Version::from(input.version);
    let options = Options {
        version,
        keep_alive: input.keep_alive.into(),
        receive_maximum: u16::from(input.receive_maximum).max(1),
        topic_alias_maximum: input.topic_alias_maximum.into(),
        ..Options::new("c")
    };
    let now = Instant::now();
    let mut client = Client::new(options, now);
    let mut out = Vec::new();
    client.connect(now, &mut out).expect("a short CONNECT");
    each_packet(&out, version, |packet, _| assert!(matches!(packet, Packet::Connect(_))));
    let (aliases, requests) = (Aliases::default(), Vec::new());
    let mut run = Run { client, version, now, out: Vec::new(), aliases, requests, closed: false };
    for step in &input.steps {
        run.step(step);
        run.check_output();
        if run.closed {
            break;
        }
    }
});

impl Run {
    fn step(&mut self, step: &Step<'_>) {
        let connected = self.client.is_connected();
        let empty = PropertyList::EMPTY;
        match *step {
            Step::Bytes(bytes) => self.receive(bytes),
            Step::Connack { refused, present, limits } => {
                let properties = [
                    limits
                        .max_packet_size
                        .and_then(|most| u32::from(most).try_into().ok())
                        .map(Property::MaximumPacketSize),
                    limits.topic_alias_maximum.map(|most| Property::TopicAliasMaximum(most.into())),
                    limits
                        .maximum_qos
                        .map(|one| Property::MaximumQoS(if one { QoS::AtLeastOnce } else { QoS::AtMostOnce })),
                    limits.retain_available.map(Property::RetainAvailable),
                    limits.keep_alive.map(|seconds| Property::ServerKeepAlive(seconds.into())),
                ];
                let properties: Vec<_> = properties.into_iter().flatten().collect();
                let reason = if refused { ReasonCode::UseAnotherServer } else { ReasonCode::Success };
                let connack = Connack {
                    session_present: present && !refused && self.version != Version::V3_1,
                    reason,
                    properties: properties.as_slice().into(),
                };
                self.receive_packet(&Packet::Connack(connack));
            }
            Step::Publish { level, id, topic: number, alias, payload } => {
                let alias = alias.and_then(|alias| u16::from(alias).try_into().ok());
                let properties: Vec<_> = alias.map(Property::TopicAlias).into_iter().collect();
                let (topic, qos) = (number.map(topic), qos(level));
                let publish = Publish {
                    dup: false,
                    qos,
                    retain: false,
                    topic: topic.as_ref().map_or("", |topic| topic.as_str()),
                    packet_id: (qos != QoS::AtMostOnce).then(|| packet_id(id)),
                    properties: properties.as_slice().into(),
                    payload,
                };
                self.receive_packet(&Packet::Publish(publish));
            }
            Step::Ack { kind, id } => self.receive_packet(&ack_packet(ack_kind(kind), packet_id(id))),
            Step::Release(id) => {
                self.receive_packet(&Packet::Pubrel(Ack::new(packet_id(id), ReasonCode::Success)));
            }
            Step::Suback { good, entries } => {
                let asked = self.requests.iter().find(|(_, entries)| *entries > 0).copied().filter(|_| good);
                let (id, entries) = asked.unwrap_or((1, usize::from(entries % 4)));
                let reasons = vec![0; entries];
                let packet_id = id.try_into().expect("not zero");
                self.receive_packet(&Packet::Suback(Suback { packet_id, properties: empty, reasons: &reasons }));
            }
            Step::Unsuback { good } => {
                let asked = self.requests.iter().find(|(_, entries)| *entries == 0).copied().filter(|_| good);
                let packet_id = asked.map_or(1, |(id, _)| id).try_into().expect("not zero");
                let reasons: &[u8] = if self.version.is_5() { &[0] } else { &[] };
                self.receive_packet(&Packet::Unsuback(Unsuback { packet_id, properties: empty, reasons }));
            }
            Step::Pong => self.receive_packet(&Packet::Pingresp),
            Step::Disconnect => {
                let disconnect = Disconnect { reason: ReasonCode::ServerBusy, properties: empty };
                self.receive_packet(&Packet::Disconnect(disconnect));
            }
            Step::Send { topic: number, level, id, payload } if connected => {
                let message = message(number, payload, level).retained();
                let head = PublishHead {
                    retain: true,
                    packet_id: (message.qos != QoS::AtMostOnce).then(|| packet_id(id)),
                    ..PublishHead::new(&message, message.qos)
                };
                let before = self.out.len();
                let Ok(sent) = self.client.publish(&head, usize::MAX, self.now, &mut self.out) else {
                    assert_eq!(self.out.len(), before);
                    return;
                };
                let (limits, aliases) = (self.client.limits(), &mut self.aliases);
                assert!(sent.qos <= limits.maximum_qos && sent.qos <= message.qos);
                each_packet(&self.out[before..], self.version, |packet, _| {
                    let Packet::Publish(publish) = packet else { panic!("{packet:?}") };
                    assert_eq!(publish.qos, sent.qos);
                    assert!(!publish.retain || limits.retain_available);
                    assert_eq!(aliases.resolve(&publish, limits.topic_alias_maximum), message.topic.as_str());
                });
            }
            Step::SendRelease(id) if connected => self.client.release(packet_id(id), self.now, &mut self.out),
            Step::Subscribe(entries) if connected => {
                let options = SubscriptionOptions::new(QoS::AtLeastOnce);
                let list = vec![Subscription { filter: "a/#", options }; usize::from(entries % 3) + 1];
                if let Ok(id) = self.client.subscribe(&list, self.now, &mut self.out) {
                    self.requests.push((id.get(), list.len()));
                }
            }
            Step::Unsubscribe(number) if connected => {
                if let Ok(id) = self.client.unsubscribe(&[topic(number).as_str()], self.now, &mut self.out) {
                    self.requests.push((id.get(), 0));
                }
            }
            Step::Acknowledge { kind, id, receipt } if connected => {
                self.client.acknowledge(ack_kind(kind), packet_id(id), ReasonCode::Success, receipt, &mut self.out);
            }
            Step::Flush { done, failed } if connected => {
                let state = |&receipt: &u8| match receipt {
                    _ if failed == Some(receipt) => AckState::Failed,
                    _ if receipt <= done => AckState::Done,
                    _ => AckState::Pending,
                };
                if let Err(error) = self.client.flush_acks(state, |_, _| {}, &mut self.out) {
                    self.close(error);
                }
            }
            Step::Wait(millis) => {
                self.now += Duration::from_millis(u64::from(millis) * 10);
                match self.client.check_deadline(self.now, &mut self.out) {
                    Ok(()) => assert!(self.client.deadline().is_none_or(|due| due > self.now), "it would spin"),
                    Err(error) => self.close(error),
                }
            }
            Step::Leave => {
                self.client.disconnect(self.now, &mut self.out);
                self.closed = true;
            }
            _ => {}
        }
    }

    fn receive_packet(&mut self, packet: &Packet<'_>) {
        let mut bytes = Vec::new();
        if packet.encode(self.version, MAX_PACKET_BYTES, &mut bytes).is_ok() {
            self.receive(&bytes);
        }
    }

    fn receive(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.closed {
            let decoded = self.client.decode(bytes);
            let (packet, length) = match decoded {
                Ok(Some(decoded)) => decoded,
                Ok(None) => return,
                Err(error) => return self.close(error),
            };
            let event = match self.client.handle(packet, self.now) {
                Ok(event) => event,
                Err(error) => return self.close(error),
            };
            bytes = &bytes[length..];
            match event {
                Event::Publish(publish) => {
                    assert!(!publish.topic.is_empty());
                    assert_eq!(publish.packet_id.is_some(), publish.qos != QoS::AtMostOnce);
                }
                Event::Subscribed { packet_id, reasons } => {
                    let found = self.requests.iter().position(|&asked| asked == (packet_id.get(), reasons.len()));
                    self.requests.remove(found.expect("it was asked for"));
                }
                Event::Unsubscribed { packet_id } => {
                    let found = self.requests.iter().position(|&asked| asked == (packet_id.get(), 0));
                    self.requests.remove(found.expect("it was asked for"));
                }
                Event::Refused { .. } | Event::Disconnected { .. } => self.closed = true,
                _ => {}
            }
        }
    }

    fn close(&mut self, error: ProtocolError) {
        self.client.close(error, self.now, &mut self.out);
        let said = self.out.len();
        self.client.close(error, self.now, &mut self.out);
        assert_eq!(self.out.len(), said, "the last word is said once");
        assert!(!self.client.is_connected() && self.client.deadline().is_none());
        self.closed = true;
    }

    fn check_output(&mut self) {
        let out = std::mem::take(&mut self.out);
        let most = self.client.limits().max_packet_size as usize;
        each_packet(&out, self.version, |packet, length| match packet {
            Packet::Puback(_) | Packet::Pubrec(_) | Packet::Pubcomp(_) => {}
            Packet::Publish(_)
            | Packet::Pubrel(_)
            | Packet::Subscribe(_)
            | Packet::Unsubscribe(_)
            | Packet::Pingreq => {
                assert!(length <= most);
            }
            Packet::Disconnect(_) => assert!(self.closed && length <= most),
            _ => panic!("not a client's: {packet:?}"),
        });
    }
}
