//! A gateway and a few clients under any sequence of datagrams, answers of the hub and passing time: it never panics or
//! spins, holds no more clients than it may, and sends only packets that can be read, no longer than the link carries.
#![no_main]

use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use fieldgate_fuzz::message::QoS;
use fieldgate_fuzz::mqtt::{message, packet_id, topic};
use fieldgate_fuzz::proto::mqttsn::action::{Action, ClientKey, Delivery, PublishAnswer, Request};
use fieldgate_fuzz::proto::mqttsn::client::Rules;
use fieldgate_fuzz::proto::mqttsn::codec;
use fieldgate_fuzz::proto::mqttsn::gateway::{Connectionless, Gateway, Settings};
use fieldgate_fuzz::proto::mqttsn::packet::ReturnCode;
use fieldgate_fuzz::throttle::AddressLimits;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Anything, from one of a few addresses.
    Bytes(u8, &'a [u8]),
    /// A message type with any body.
    Frame(u8, u8, &'a [u8]),
    Connect {
        from: u8,
        flags: u8,
        seconds: u16,
        id: u8,
    },
    Register {
        from: u8,
        msg_id: u8,
        topic: u8,
    },
    Subscribe {
        from: u8,
        flags: u8,
        msg_id: u8,
        topic: u8,
    },
    Publish {
        from: u8,
        flags: u8,
        topic_id: u8,
        msg_id: u8,
        payload: u8,
    },
    Ack {
        from: u8,
        kind: u8,
        topic_id: u8,
        msg_id: u8,
        code: u8,
    },
    Sleep {
        from: u8,
        seconds: u8,
    },
    Ping {
        from: u8,
        id: Option<u8>,
    },
    /// The hub has a message for a client.
    Queue {
        id: u8,
        topic: u8,
        level: u8,
        packet_id: u8,
        payload: &'a [u8],
    },
    Wait(u8),
    Answer {
        hold: bool,
        refuse: bool,
    },
    Evict(u8),
}

const MAX_CLIENTS: usize = 3;
const MAX_PACKET_BYTES: usize = 80;

enum Queued {
    Message(Delivery),
    Release(NonZeroU16),
}

struct Net {
    gateway: Gateway,
    now: Instant,
    /// What each session holds, by client id.
    queues: HashMap<Arc<str>, VecDeque<Queued>>,
    held: Vec<(ClientKey, PublishAnswer)>,
    hold: bool,
    refuse: bool,
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let now = Instant::now();
    let settings = Settings {
        gateway_id: 5,
        rules: Rules {
            retry_interval: Duration::from_secs(10),
            retry_limit: 2,
            max_packet_bytes: MAX_PACKET_BYTES,
            max_topics: 3,
            predefined: [(7, topic(0)), (8, topic(1))].into_iter().collect(),
            forget_after: Some(Duration::from_secs(100)),
        },
        max_clients: MAX_CLIENTS,
        max_client_id_bytes: 30,
        connectionless: Some(Connectionless { allow: Vec::new(), max_per_second: 3 }),
        addresses: AddressLimits::default(),
        max_stranger_answers_per_second: 2,
        advertise_interval: Some(Duration::from_secs(60)),
    };
    let gateway = Gateway::new(settings, 1, now);
    let mut net = Net { gateway, now, queues: HashMap::new(), held: Vec::new(), hold: false, refuse: false };
    for step in &steps {
        net.step(step);
        net.settle();
        assert!(net.gateway.states().iter().sum::<usize>() <= MAX_CLIENTS, "more clients than allowed");
        assert!(net.gateway.keys().len() <= MAX_CLIENTS);
    }
    net.wait(400);
});

impl Net {
    fn step(&mut self, step: &Step<'_>) {
        let topic_name = |number: u8| topic(number).as_str().to_owned();
        match *step {
            Step::Bytes(from, bytes) => self.receive(from, bytes),
            Step::Frame(from, kind, body) => self.frame(from, kind, body),
            Step::Connect { from, flags, seconds, id } => {
                let [high, low] = seconds.to_be_bytes();
                self.frame(from, 0x04, &[flags & 0x0C, 1, high, low, b'a' + id % 4]);
            }
            Step::Register { from, msg_id, topic } => {
                self.frame(from, 0x0A, &[&[0, 0, 0, msg_id % 4], topic_name(topic).as_bytes()].concat());
            }
            Step::Subscribe { from, flags, msg_id, topic } => {
                self.frame(from, 0x12, &[&[flags, 0, msg_id % 4], topic_name(topic).as_bytes()].concat());
            }
            Step::Publish { from, flags, topic_id, msg_id, payload } => {
                self.frame(from, 0x0C, &[flags, 0, topic_id % 10, 0, msg_id % 4, payload]);
            }
            Step::Ack { from, kind, topic_id, msg_id, code } => match kind % 5 {
                0 => self.frame(from, 0x0D, &[0, topic_id % 10, 0, msg_id % 9, code % 4]),
                1 => self.frame(from, 0x0F, &[0, msg_id % 9]),
                2 => self.frame(from, 0x0E, &[0, msg_id % 9]),
                3 => self.frame(from, 0x10, &[0, msg_id % 9]),
                _ => self.frame(from, 0x0B, &[0, topic_id % 10, 0, msg_id % 9, code % 4]),
            },
            Step::Sleep { from, seconds } => self.frame(from, 0x18, &[0, seconds]),
            Step::Ping { from, id } => {
                let id: Vec<u8> = id.map(|id| b'a' + id % 4).into_iter().collect();
                self.frame(from, 0x16, &id);
            }
            Step::Queue { id, topic, level, packet_id: number, payload } => {
                let message = Arc::new(message(topic, payload, level));
                let qos = message.qos;
                let packet_id = (qos != QoS::AtMostOnce).then(|| packet_id(number));
                let delivery = Delivery { message, qos, retain: false, dup: false, packet_id };
                let id: Arc<str> = char::from(b'a' + id % 4).to_string().into();
                self.queues.entry(id.clone()).or_default().push_back(Queued::Message(delivery));
                let is_its = |key: &ClientKey| self.gateway.client_id(*key) == Some(&id);
                if let Some(key) = self.gateway.keys().into_iter().find(is_its) {
                    self.gateway.pending(key, self.now);
                }
            }
            Step::Wait(seconds) => self.wait(seconds.into()),
            Step::Answer { hold, refuse } => {
                (self.hold, self.refuse) = (hold, refuse);
                for (key, answer) in std::mem::take(&mut self.held) {
                    self.gateway.published(key, answer, self.verdict(()), self.now);
                }
            }
            Step::Evict(key) => self.gateway.evicted(ClientKey(key.into()), self.now),
        }
    }

    fn verdict<T>(&self, yes: T) -> Result<T, ReturnCode> {
        if self.refuse { Err(ReturnCode::Congestion) } else { Ok(yes) }
    }

    fn frame(&mut self, from: u8, kind: u8, body: &[u8]) {
        let body = &body[..body.len().min(250)];
        let head = [(body.len() + 2) as u8, kind];
        self.receive(from, &[&head, body].concat());
    }

    fn receive(&mut self, from: u8, datagram: &[u8]) {
        let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, from % 4), 1884));
        self.gateway.handle(address, datagram, self.now);
    }

    fn wait(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        while let Some(at) = self.gateway.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now, "a deadline stays behind");
            self.now = at;
            self.gateway.handle_timeout(at);
            self.settle();
            assert!(self.gateway.poll_timeout().is_none_or(|next| next > at), "it would spin");
        }
        self.now = end;
    }

    /// Does what the shell does, until there is nothing to do.
    fn settle(&mut self) {
        for actions in 0.. {
            assert!(actions < 10_000, "it never ends");
            let Some(action) = self.gateway.poll_action() else { return };
            match action {
                Action::Send { datagram, .. } | Action::Broadcast { datagram } => {
                    codec::decode(&datagram).expect("what is written can be read");
                    assert!(datagram.len() <= MAX_PACKET_BYTES, "{} bytes", datagram.len());
                }
                Action::Client { key, request } => self.serve(key, request),
                Action::PublishConnectionless { .. } | Action::Notice(_) => {}
            }
        }
    }

    fn serve(&mut self, key: ClientKey, request: Request) {
        let client_id = self.gateway.client_id(key).expect("a client that asks is known").clone();
        let now = self.now;
        match request {
            Request::Attach { .. } => self.gateway.attached(key, self.verdict(()), now),
            Request::Resume { .. } => self.gateway.attached(key, Ok(()), now),
            Request::Publish { answer, .. } if self.hold => self.held.push((key, answer)),
            Request::Publish { answer, .. } => self.gateway.published(key, answer, self.verdict(()), now),
            Request::Release(msg_id) => self.gateway.released(key, msg_id, now),
            Request::Subscribe { qos, answer, .. } => self.gateway.subscribed(key, answer, self.verdict(qos), now),
            Request::Take => match self.queues.entry(client_id).or_default().pop_front() {
                Some(Queued::Message(delivery)) => self.gateway.deliver(key, delivery, now),
                Some(Queued::Release(packet_id)) => self.gateway.deliver_release(key, packet_id, now),
                None => self.gateway.drained(key, now),
            },
            Request::Received(packet_id) => {
                self.queues.entry(client_id).or_default().push_front(Queued::Release(packet_id));
            }
            Request::SetWill(_)
            | Request::Unsubscribe { .. }
            | Request::Acknowledge(_)
            | Request::Completed(_)
            | Request::Detach { .. } => {}
        }
    }
}
