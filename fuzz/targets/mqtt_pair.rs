//! Our client and our server, connected with each other, each used as its shell uses it: whatever the order, and however
//! their bytes are cut, neither finds fault with the other, and every message comes out as it went in.
#![no_main]

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use arbitrary::Arbitrary;
use fieldgate_fuzz::message::QoS;
use fieldgate_fuzz::mqtt::{AnyVersion, message, qos};
use fieldgate_fuzz::proto::mqtt::client::{self, Client, Options};
use fieldgate_fuzz::proto::mqtt::server::{self, Accept, Server, Settings};
use fieldgate_fuzz::proto::mqtt::{
    AckKind, AckState, PacketId, PublishHead, ReasonCode, Subscription, SubscriptionOptions, Version,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    version: AnyVersion,
    windows: [u8; 2],
    aliases: [u8; 2],
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A message upwards or downwards.
    Up {
        topic: u8,
        level: u8,
        payload: &'a [u8],
    },
    Down {
        topic: u8,
        level: u8,
        payload: &'a [u8],
    },
    Subscribe(u8),
    Unsubscribe,
    Ping,
    /// So many bytes arrive at the server, or at the client.
    AtServer(u8),
    AtClient(u8),
    /// What waits for the disk at either end is there.
    Commit {
        server: bool,
    },
}

/// One direction: bytes under way, messages under way, and the identifiers in use.
#[derive(Default)]
struct Lane {
    bytes: VecDeque<u8>,
    arrived: Vec<u8>,
    messages: VecDeque<(String, Vec<u8>, QoS)>,
    used: BTreeSet<u16>,
    released: BTreeSet<u16>,
}

impl Lane {
    fn free(&self, window: usize) -> Option<PacketId> {
        if self.used.len() >= window {
            return None;
        }
        (1..=u16::MAX).find(|id| !self.used.contains(id)).and_then(PacketId::new)
    }

    fn arrive(&mut self, count: usize) {
        let count = count.min(self.bytes.len());
        self.arrived.extend(self.bytes.drain(..count));
    }

    fn check(&mut self, topic: &str, payload: &[u8], qos: QoS) {
        let expected = self.messages.pop_front().expect("a message that was sent");
        assert_eq!((topic, payload, qos), (expected.0.as_str(), &expected.1[..], expected.2));
    }
}

struct Pair {
    client: Client<()>,
    server: Server<()>,
    now: Instant,
    up: Lane,
    down: Lane,
    requests: usize,
    /// How many QoS 1 and 2 messages may be unacknowledged: up, down.
    windows: [usize; 2],
}

fuzz_target!(|input: Input<'_>| {
    let version = Version::from(input.version);
    let windows = input.windows.map(|window| usize::from(window).max(1));
    let now = Instant::now();
    let options = Options {
        version,
        receive_maximum: windows[1] as u16,
        topic_alias_maximum: input.aliases[1].into(),
        ..Options::new("c")
    };
    let settings = Settings {
        receive_maximum: windows[0] as u16,
        topic_alias_maximum: input.aliases[0].into(),
        ..Settings::default()
    };
    let mut pair = Pair {
        client: Client::new(options, now),
        server: Server::new(Arc::new(settings), now),
        now,
        up: Lane::default(),
        down: Lane::default(),
        requests: 0,
        windows,
    };
    let mut out = Vec::new();
    pair.client.connect(now, &mut out).expect("a short CONNECT");
    pair.up.bytes.extend(out);
    for step in &input.steps {
        pair.step(step);
    }
    // Let it come to rest: everything arrives, everybody is content.
    for _ in 0..8 {
        for step in [Step::Commit { server: true }, Step::Commit { server: false }] {
            pair.step(&step);
        }
        pair.at_server(usize::MAX);
        pair.at_client(usize::MAX);
    }
    assert!(pair.up.messages.is_empty() && pair.down.messages.is_empty() && pair.requests == 0);
    assert!(pair.up.used.is_empty() && pair.down.used.is_empty(), "{:?} {:?}", pair.up.used, pair.down.used);
    assert!(pair.server.acks().is_empty() && pair.client.acks().is_empty());
});

impl Pair {
    fn step(&mut self, step: &Step<'_>) {
        let connected = self.client.is_connected();
        let mut out = Vec::new();
        match *step {
            Step::Up { topic, level, payload } if connected => {
                let message = message(topic, payload, level);
                let packet_id = if message.qos == QoS::AtMostOnce { None } else { self.up.free(self.windows[0]) };
                if message.qos != QoS::AtMostOnce && packet_id.is_none() {
                    return;
                }
                let head = PublishHead { packet_id, ..PublishHead::new(&message, message.qos) };
                let sent = self.client.publish(&head, usize::MAX, self.now, &mut out).expect("there is room");
                self.up.used.extend(packet_id.map(PacketId::get));
                self.up.messages.push_back((message.topic.as_str().into(), payload.into(), sent.qos));
            }
            Step::Down { topic, level, payload } if self.server.is_connected() => {
                let message = message(topic, payload, level);
                let packet_id = if message.qos == QoS::AtMostOnce { None } else { self.down.free(self.windows[1]) };
                if message.qos != QoS::AtMostOnce && packet_id.is_none() {
                    return;
                }
                let head = PublishHead { packet_id, ..PublishHead::new(&message, message.qos) };
                let _ = self.server.publish(&head, usize::MAX, &mut out).expect("there is room");
                self.down.used.extend(packet_id.map(PacketId::get));
                self.down.messages.push_back((message.topic.as_str().into(), payload.into(), message.qos));
                self.down.bytes.extend(out);
                return;
            }
            Step::Subscribe(entries) if connected => {
                let options = SubscriptionOptions::new(qos(entries));
                let list = vec![Subscription { filter: "a/+", options }; usize::from(entries % 4) + 1];
                self.client.subscribe(&list, self.now, &mut out).expect("there is room");
                self.requests += 1;
            }
            Step::Unsubscribe if connected => {
                self.client.unsubscribe(&["a/+"], self.now, &mut out).expect("there is room");
                self.requests += 1;
            }
            Step::Ping if connected => {
                let due = self.client.deadline().expect("a keep alive").max(self.now);
                // As if time had passed for the client alone, which asks then.
                if self.requests == 0 {
                    self.now = due;
                    self.client.check_deadline(self.now, &mut out).expect("the server answers");
                    self.up.bytes.extend(out);
                    self.at_server(usize::MAX);
                    self.at_client(usize::MAX);
                    return;
                }
            }
            Step::AtServer(count) => self.at_server(count.into()),
            Step::AtClient(count) => self.at_client(count.into()),
            Step::Commit { server: true } => {
                self.server.flush_acks(|()| AckState::Done, |_, _| {}, &mut out).expect("nothing has failed");
                self.down.bytes.extend(out);
                return;
            }
            Step::Commit { server: false } => {
                self.client.flush_acks(|()| AckState::Done, |_, _| {}, &mut out).expect("nothing has failed");
            }
            _ => {}
        }
        self.up.bytes.extend(out);
    }

    fn at_server(&mut self, count: usize) {
        self.up.arrive(count);
        let arrived = std::mem::take(&mut self.up.arrived);
        let (mut rest, mut out) = (&arrived[..], Vec::new());
        while let Some((packet, length)) = self.server.decode(rest).expect("our client's packets are good") {
            self.server.note_input(self.now);
            let event = self.server.handle(packet, &mut out).expect("our client keeps the rules");
            rest = &rest[length..];
            match event {
                server::Event::None => {}
                server::Event::Connect(_) => {
                    self.server.accept(&Accept::default(), self.now, &mut out).expect("there is room");
                }
                server::Event::Publish(publish) => {
                    self.up.check(publish.topic, publish.payload, publish.qos);
                    let kind = if publish.qos == QoS::ExactlyOnce { AckKind::Pubrec } else { AckKind::Puback };
                    if let Some(id) = publish.packet_id {
                        let receipt = (id.get() % 2 == 0).then_some(());
                        self.server.acknowledge(kind, id, ReasonCode::Success, receipt, &mut out);
                    }
                }
                server::Event::Release(id) => {
                    assert!(self.up.released.remove(&id.get()));
                    self.server.acknowledge(AckKind::Pubcomp, id, ReasonCode::Success, Some(()), &mut out);
                }
                server::Event::Acknowledged(id, _) | server::Event::Completed(id) => {
                    assert!(self.down.used.remove(&id.get()));
                }
                server::Event::Received(id) => {
                    self.down.released.insert(id.get());
                    self.server.release(id, ReasonCode::Success, &mut out);
                }
                server::Event::Subscribe(subscribe) => {
                    let (id, entries) = (subscribe.packet_id, subscribe.subscriptions.iter().count());
                    let receipts = vec![(); entries % 3];
                    self.server.suback(id, &vec![ReasonCode::GrantedQoS1; entries], receipts, &mut out);
                }
                server::Event::Unsubscribe(unsubscribe) => {
                    let (id, entries) = (unsubscribe.packet_id, unsubscribe.filters.iter().count());
                    self.server.unsuback(id, &vec![ReasonCode::Success; entries], &mut out);
                }
                event => panic!("{event:?}"),
            }
        }
        self.up.arrived = rest.to_vec();
        self.down.bytes.extend(out);
    }

    fn at_client(&mut self, count: usize) {
        self.down.arrive(count);
        let arrived = std::mem::take(&mut self.down.arrived);
        let (mut rest, mut out) = (&arrived[..], Vec::new());
        while let Some((packet, length)) = self.client.decode(rest).expect("our server's packets are good") {
            let event = self.client.handle(packet, self.now).expect("our server keeps the rules");
            rest = &rest[length..];
            match event {
                client::Event::None => {}
                client::Event::Connected { session_present } => assert!(!session_present),
                client::Event::Publish(publish) => {
                    self.down.check(publish.topic, publish.payload, publish.qos);
                    let kind = if publish.qos == QoS::ExactlyOnce { AckKind::Pubrec } else { AckKind::Puback };
                    if let Some(id) = publish.packet_id {
                        let receipt = (id.get() % 2 == 1).then_some(());
                        self.client.acknowledge(kind, id, ReasonCode::Success, receipt, &mut out);
                    }
                }
                client::Event::Release(id) => {
                    assert!(self.down.released.remove(&id.get()));
                    self.client.acknowledge(AckKind::Pubcomp, id, ReasonCode::Success, None, &mut out);
                }
                client::Event::Acknowledged(id, _) | client::Event::Completed(id) => {
                    assert!(self.up.used.remove(&id.get()));
                }
                client::Event::Received(id) => {
                    self.up.released.insert(id.get());
                    self.client.release(id, self.now, &mut out);
                }
                client::Event::Subscribed { .. } | client::Event::Unsubscribed { .. } => self.requests -= 1,
                event => panic!("{event:?}"),
            }
        }
        self.down.arrived = rest.to_vec();
        self.up.bytes.extend(out);
    }
}
