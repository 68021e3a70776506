//! The server's side of a connection under any sequence of what a client sends and what the shell does: it never panics,
//! what it writes are packets of the client's version that fit the client, acknowledgements keep their order, quotas
//! hold, and after the end it says nothing more.
#![no_main]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use fieldgate_fuzz::message::QoS;
use fieldgate_fuzz::mqtt::{Aliases, AnyVersion, ack_kind, each_packet, message, packet_id, qos, topic};
use fieldgate_fuzz::proto::mqtt::server::{Accept, Event, Expiry, Server, Settings};
use fieldgate_fuzz::proto::mqtt::{
    Ack, AckKind, AckState, Connect, Disconnect, Filters, LastWill, MAX_PACKET_BYTES, Packet, PacketId, Property,
    PropertyList, ProtocolError, Publish, PublishHead, ReasonCode, Subscribe, Subscription, SubscriptionOptions,
    Subscriptions, Unsubscribe, Version,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    receive_maximum: u8,
    topic_alias_maximum: u8,
    max_keep_alive: Option<u8>,
    check_payload_format: bool,
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Anything.
    Bytes(&'a [u8]),
    Connect {
        version: AnyVersion,
        clean: bool,
        named: bool,
        keep_alive: u8,
        limits: Limits,
        will: Option<&'a [u8]>,
    },
    Publish {
        level: u8,
        dup: bool,
        id: u8,
        topic: Option<u8>,
        alias: Option<u8>,
        utf8: Option<bool>,
        payload: &'a [u8],
    },
    Ack {
        kind: u8,
        id: u8,
        refused: bool,
    },
    Release(u8),
    Subscribe {
        id: u8,
        topics: [u8; 2],
    },
    Unsubscribe {
        id: u8,
        topic: u8,
    },
    Ping,
    Disconnect {
        with_will: bool,
        expiry: Option<u32>,
    },
    /// From here on what the shell does; a CONNECT is decided on when it comes.
    Acknowledge {
        kind: u8,
        id: u8,
        pending: bool,
    },
    Suback {
        id: u8,
        receipts: u8,
    },
    Unsuback(u8),
    Flush {
        done: u8,
        failed: Option<u8>,
    },
    Deliver {
        topic: u8,
        level: u8,
        id: u8,
        dup: bool,
        payload: &'a [u8],
    },
    SendRelease(u8),
    Wait(u16),
    Close,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Limits {
    receive_maximum: Option<u8>,
    max_packet_size: Option<u16>,
    topic_alias_maximum: Option<u8>,
}

struct Run {
    server: Server<u8>,
    now: Instant,
    out: Vec<u8>,
    /// What the client has announced.
    max_packet_size: u32,
    topic_alias_maximum: u16,
    aliases: Aliases,
    /// Acknowledgements in the order in which they were asked for, with their receipts: the model.
    owed: VecDeque<(Owed, Vec<u8>)>,
    next_receipt: u8,
    receive_maximum: usize,
    /// PUBLISH packets that were handed over and not answered, as the client counts them.
    unanswered: isize,
    connacks: usize,
    closed: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Owed {
    Ack(AckKind, PacketId),
    Suback(PacketId),
}

fuzz_target!(|input: Input<'_>| {
    let settings = Settings {
        receive_maximum: u16::from(input.receive_maximum).max(1),
        topic_alias_maximum: input.topic_alias_maximum.into(),
        max_keep_alive: input.max_keep_alive.map(u16::from),
        check_payload_format: input.check_payload_format,
        ..Settings::default()
    };
    let now = Instant::now();
    let mut run = Run {
        receive_maximum: settings.receive_maximum.into(),
        server: Server::new(Arc::new(settings), now),
        now,
        out: Vec::new(),
        max_packet_size: MAX_PACKET_BYTES,
        topic_alias_maximum: 0,
        aliases: Aliases::default(),
        owed: VecDeque::new(),
        next_receipt: 0,
        unanswered: 0,
        connacks: 0,
        closed: false,
    };
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
        let connected = self.server.is_connected();
        let empty = PropertyList::EMPTY;
        match *step {
            Step::Bytes(bytes) => self.receive(bytes),
            Step::Connect { version, clean, named, keep_alive, limits, will } => {
                let properties = [
                    limits
                        .receive_maximum
                        .and_then(|most| u16::from(most).try_into().ok())
                        .map(Property::ReceiveMaximum),
                    limits
                        .max_packet_size
                        .and_then(|most| u32::from(most).try_into().ok())
                        .map(Property::MaximumPacketSize),
                    limits.topic_alias_maximum.map(|most| Property::TopicAliasMaximum(most.into())),
                ];
                let properties: Vec<_> = properties.into_iter().flatten().collect();
                let version = Version::from(version);
                let topic = topic(0);
                let will = will.map(|payload| LastWill {
                    qos: QoS::AtLeastOnce,
                    retain: clean,
                    properties: empty,
                    topic: topic.as_str(),
                    payload,
                });
                let connect = Connect {
                    version,
                    is_bridge: false,
                    clean_start: clean,
                    keep_alive: keep_alive.into(),
                    properties: properties.as_slice().into(),
                    client_id: if named { "c" } else { "" },
                    will,
                    user_name: None,
                    password: None,
                };
                self.receive_packet(&Packet::Connect(Box::new(connect)), version);
            }
            Step::Publish { level, dup, id, topic: number, alias, utf8, payload } => {
                let properties = [
                    alias.and_then(|alias| u16::from(alias).try_into().ok()).map(Property::TopicAlias),
                    utf8.map(Property::PayloadFormatIndicator),
                ];
                let properties: Vec<_> = properties.into_iter().flatten().collect();
                let topic = number.map(topic);
                let qos = qos(level);
                let publish = Publish {
                    dup: dup && qos != QoS::AtMostOnce,
                    qos,
                    retain: false,
                    topic: topic.as_ref().map_or("", |topic| topic.as_str()),
                    packet_id: (qos != QoS::AtMostOnce).then(|| packet_id(id)),
                    properties: properties.as_slice().into(),
                    payload,
                };
                self.receive_packet(&Packet::Publish(publish), self.server.version());
            }
            Step::Ack { kind, id, refused } => {
                let reason = if refused { ReasonCode::UnspecifiedError } else { ReasonCode::Success };
                let ack = Ack { packet_id: packet_id(id), reason, properties: empty };
                let packet = match ack_kind(kind) {
                    AckKind::Puback => Packet::Puback(ack),
                    AckKind::Pubrec => Packet::Pubrec(ack),
                    AckKind::Pubcomp => Packet::Pubcomp(Ack::new(packet_id(id), ReasonCode::Success)),
                };
                self.receive_packet(&packet, self.server.version());
            }
            Step::Release(id) => {
                let packet = Packet::Pubrel(Ack::new(packet_id(id), ReasonCode::Success));
                self.receive_packet(&packet, self.server.version());
            }
            Step::Subscribe { id, topics } => {
                let topics = topics.map(topic);
                let options = SubscriptionOptions::new(QoS::ExactlyOnce);
                let list: Vec<_> =
                    topics.iter().map(|topic| Subscription { filter: topic.as_str(), options }).collect();
                let subscriptions = Subscriptions::Given(&list);
                let packet =
                    Packet::Subscribe(Subscribe { packet_id: packet_id(id), properties: empty, subscriptions });
                self.receive_packet(&packet, self.server.version());
            }
            Step::Unsubscribe { id, topic: number } => {
                let topic = topic(number);
                let list = [topic.as_str()];
                let filters = Filters::Given(&list);
                let packet = Packet::Unsubscribe(Unsubscribe { packet_id: packet_id(id), properties: empty, filters });
                self.receive_packet(&packet, self.server.version());
            }
            Step::Ping => self.receive_packet(&Packet::Pingreq, self.server.version()),
            Step::Disconnect { with_will, expiry } => {
                let reason = if with_will { ReasonCode::DisconnectWithWill } else { ReasonCode::Success };
                let properties: Vec<_> = expiry.map(Property::SessionExpiryInterval).into_iter().collect();
                let disconnect = Disconnect { reason, properties: properties.as_slice().into() };
                self.receive_packet(&Packet::Disconnect(disconnect), self.server.version());
            }
            Step::Acknowledge { kind, id, pending } if connected => {
                let (kind, id) = (ack_kind(kind), packet_id(id));
                let receipt = pending.then(|| self.receipt());
                self.owed.push_back((Owed::Ack(kind, id), receipt.into_iter().collect()));
                self.server.acknowledge(kind, id, ReasonCode::Success, receipt, &mut self.out);
            }
            Step::Suback { id, receipts } if connected => {
                let id = packet_id(id);
                let receipts: Vec<u8> = (0..receipts % 3).map(|_| self.receipt()).collect();
                self.owed.push_back((Owed::Suback(id), receipts.clone()));
                self.server.suback(id, &[ReasonCode::GrantedQoS1], receipts, &mut self.out);
            }
            Step::Unsuback(id) if connected => {
                self.server.unsuback(packet_id(id), &[ReasonCode::Success], &mut self.out);
            }
            Step::Flush { done, failed } if connected => {
                let state = |&receipt: &u8| match receipt {
                    _ if failed == Some(receipt) => AckState::Failed,
                    _ if receipt <= done => AckState::Done,
                    _ => AckState::Pending,
                };
                if let Err(error) = self.server.flush_acks(state, |_, _| {}, &mut self.out) {
                    self.close(error);
                }
            }
            Step::Deliver { topic: number, level, id, dup, payload } if connected => {
                let message = message(number, payload, level);
                let qos = message.qos;
                let head = PublishHead {
                    dup: dup && qos != QoS::AtMostOnce,
                    packet_id: (qos != QoS::AtMostOnce).then(|| packet_id(id)),
                    ..PublishHead::new(&message, qos)
                };
                let before = self.out.len();
                if self.server.publish(&head, usize::MAX, &mut self.out).is_err() {
                    assert_eq!(self.out.len(), before);
                    return;
                }
                let (aliases, maximum) = (&mut self.aliases, self.topic_alias_maximum);
                each_packet(&self.out[before..], self.server.version(), |packet, _| {
                    let Packet::Publish(publish) = packet else { panic!("{packet:?}") };
                    assert_eq!(aliases.resolve(&publish, maximum), message.topic.as_str());
                    assert_eq!(publish.payload, payload);
                });
            }
            Step::SendRelease(id) if connected => {
                self.server.release(packet_id(id), ReasonCode::Success, &mut self.out);
            }
            Step::Wait(millis) => {
                self.now += Duration::from_millis(u64::from(millis) * 10);
                let due = self.server.deadline();
                match self.server.check_deadline(self.now) {
                    Ok(()) => assert!(due.is_none_or(|due| due > self.now), "a deadline was missed"),
                    Err(error) => {
                        assert!(due.is_some_and(|due| due <= self.now), "a deadline was early");
                        self.close(error);
                    }
                }
            }
            Step::Close => self.close(ProtocolError { reason: ReasonCode::ServerShuttingDown, what: "the end" }),
            _ => {}
        }
    }

    fn receipt(&mut self) -> u8 {
        self.next_receipt = self.next_receipt.wrapping_add(1);
        self.next_receipt
    }

    fn receive_packet(&mut self, packet: &Packet<'_>, version: Version) {
        let mut bytes = Vec::new();
        // Some cannot be said in every version.
        if packet.encode(version, MAX_PACKET_BYTES, &mut bytes).is_ok() {
            self.receive(&bytes);
        }
    }

    fn receive(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.closed {
            let (packet, length) = match self.server.decode(bytes) {
                Ok(Some(decoded)) => decoded,
                Ok(None) => return,
                Err(error) => return self.close_with(error, bytes),
            };
            if let Packet::Connect(connect) = &packet {
                self.note_limits(connect);
            }
            self.server.note_input(self.now);
            let (accept, quota) = (self.connacks == 0, self.server.version().is_5());
            let event = match self.server.handle(packet, &mut self.out) {
                Ok(event) => event,
                Err(error) => return self.close_with(error, bytes),
            };
            bytes = &bytes[length..];
            match event {
                Event::Connect(request) => {
                    assert!(accept && request.receive_maximum > 0);
                    let accept = Accept {
                        session_present: !request.clean_start,
                        assigned_client_id: request.client_id.is_empty().then_some("assigned"),
                        expiry: (request.keep_alive % 2 == 1).then_some(Expiry::Never),
                    };
                    if request.keep_alive == 7 {
                        self.server.redirect(ReasonCode::ServerMoved, "other:1883", &mut self.out);
                        self.closed = true;
                    } else {
                        if let Err(error) = self.server.accept(&accept, self.now, &mut self.out) {
                            return self.close(error);
                        }
                    }
                }
                Event::Publish(publish) => {
                    assert!(!publish.topic.is_empty() && !publish.topic.contains(['+', '#', '\0']));
                    assert_eq!(publish.packet_id.is_some(), publish.qos != QoS::AtMostOnce);
                    let (kind, id) = match (publish.qos, publish.packet_id) {
                        (QoS::AtLeastOnce, Some(id)) => (AckKind::Puback, id),
                        (QoS::ExactlyOnce, Some(id)) => (AckKind::Pubrec, id),
                        _ => continue,
                    };
                    self.unanswered += 1;
                    assert!(!quota || self.unanswered <= self.receive_maximum as isize, "the quota is exceeded");
                    // Every other one is answered at once, the others wait for the disk.
                    let receipt = (id.get() % 2 == 0).then(|| self.receipt());
                    self.owed.push_back((Owed::Ack(kind, id), receipt.into_iter().collect()));
                    self.server.acknowledge(kind, id, ReasonCode::Success, receipt, &mut self.out);
                }
                Event::Disconnect { .. } => self.closed = true,
                _ => {}
            }
        }
    }

    fn note_limits(&mut self, connect: &Connect<'_>) {
        if self.connacks > 0 {
            return;
        }
        for property in connect.properties.iter() {
            match property {
                Property::MaximumPacketSize(size) => self.max_packet_size = size.get(),
                Property::TopicAliasMaximum(maximum) => self.topic_alias_maximum = maximum,
                _ => {}
            }
        }
    }

    fn close(&mut self, error: ProtocolError) {
        self.close_with(error, &[]);
    }

    fn close_with(&mut self, error: ProtocolError, unread: &[u8]) {
        self.server.close(error, unread, &mut self.out);
        let said = self.out.len();
        self.server.close(error, unread, &mut self.out);
        assert_eq!(self.out.len(), said, "the last word is said once");
        assert!(!self.server.is_connected() && self.server.deadline().is_none());
        self.closed = true;
    }

    /// Reads what was written as the client does.
    fn check_output(&mut self) {
        let out = std::mem::take(&mut self.out);
        let version = self.server.version();
        each_packet(&out, version, |packet, length| {
            let owed = match &packet {
                Packet::Connack(_) => {
                    self.connacks += 1;
                    assert_eq!(self.connacks, 1);
                    None
                }
                Packet::Puback(ack) => Some((Owed::Ack(AckKind::Puback, ack.packet_id), ack.reason)),
                Packet::Pubrec(ack) => Some((Owed::Ack(AckKind::Pubrec, ack.packet_id), ack.reason)),
                Packet::Pubcomp(ack) => Some((Owed::Ack(AckKind::Pubcomp, ack.packet_id), ack.reason)),
                Packet::Suback(suback) => Some((Owed::Suback(suback.packet_id), ReasonCode::Success)),
                Packet::Publish(_) | Packet::Pubrel(_) | Packet::Unsuback(_) | Packet::Pingresp => None,
                Packet::Disconnect(_) if version.is_5() => {
                    assert!(self.closed);
                    None
                }
                _ => panic!("not a server's: {packet:?}"),
            };
            assert!(self.connacks > 0, "the first is the CONNACK, not {packet:?}");
            if let Some((owed, reason)) = owed {
                // What the state machine refuses by itself is not in the model.
                if reason == ReasonCode::PayloadFormatInvalid {
                    return;
                }
                let (expected, _) = self.owed.pop_front().expect("nobody asked for it");
                assert_eq!(owed, expected);
                if let Owed::Ack(kind, _) = owed {
                    self.unanswered -= isize::from(kind != AckKind::Pubrec || reason.is_error());
                    self.unanswered = self.unanswered.max(0);
                }
            } else {
                assert!(length <= self.max_packet_size as usize, "{packet:?} of {length} bytes");
            }
        });
    }
}
