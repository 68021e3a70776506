//! Byte scripts against the gateway, in virtual time. The numbers are the lines of the MQTT-SN checklist.
//!
//! Frames are written as hexadecimal and quoted text, `_` standing for the length octet. The hub is played by [`Net`]:
//! what it is asked for stands in the script as `hub …`.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::action::{
    Action, ClientKey, Delivery, DropReason, Notice, PublishAnswer, Request, SessionLifetime, Will, WillFate,
};
use super::client::{ClientState, Rules};
use super::gateway::{Connectionless, Gateway, Settings};
use super::packet::ReturnCode;
use crate::address::AddressRange;
use crate::clock::UnixMillis;
use crate::message::{Message, QoS};
use crate::throttle::AddressLimits;
use crate::topic::TopicName;

fn settings() -> Settings {
    let predefined = [(7, "plant/alarm"), (8, "plant/level")];
    Settings {
        gateway_id: 5,
        rules: Rules {
            retry_interval: Duration::from_secs(10),
            retry_limit: 3,
            max_packet_bytes: 400,
            max_topics: 4,
            predefined: predefined.iter().map(|(id, name)| (*id, TopicName::new(name).unwrap())).collect(),
            forget_after: None,
        },
        max_clients: 3,
        max_client_id_bytes: 30,
        connectionless: Some(Connectionless { allow: Vec::new(), max_per_second: 3 }),
        max_stranger_answers_per_second: 2,
        addresses: AddressLimits::default(),
        advertise_interval: None,
    }
}

enum Queued {
    Message(Delivery),
    Release(NonZeroU16),
}

struct Net {
    gateway: Gateway,
    now: Instant,
    /// What each session holds for its client, by client id: it outlives the connection.
    queues: HashMap<String, VecDeque<Queued>>,
    /// Answer publishes only when told to.
    hold: bool,
    held: Vec<(ClientKey, PublishAnswer)>,
    refuse: Option<ReturnCode>,
    log: Vec<String>,
}

/// Addresses are called A, B, C.
fn address(name: &str) -> SocketAddr {
    let octet = name.as_bytes()[0];
    format!("10.0.0.{octet}:1884").parse().unwrap()
}

fn name(address: SocketAddr) -> char {
    match address {
        SocketAddr::V4(address) => char::from(address.ip().octets()[3]),
        SocketAddr::V6(_) => '?',
    }
}

/// Hexadecimal and quoted text to octets; `_` becomes the length of what follows up to the next `_` or `|`.
fn frame(text: &str) -> Vec<u8> {
    let mut whole = Vec::new();
    for part in text.split('|') {
        let mut octets = Vec::new();
        let mut rest = part.trim();
        while !rest.is_empty() {
            let quoted = rest.strip_prefix('\'').and_then(|quoted| quoted.split_once('\''));
            rest = if let Some((quoted, after)) = quoted {
                octets.extend(quoted.bytes());
                after
            } else if let Some(after) = rest.strip_prefix('_') {
                octets.push(0);
                after
            } else {
                octets.push(u8::from_str_radix(&rest[..2], 16).unwrap());
                &rest[2..]
            }
            .trim_start();
        }
        if part.trim().starts_with('_') {
            octets[0] = u8::try_from(octets.len()).unwrap();
        }
        whole.extend(octets);
    }
    whole
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

impl Net {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self {
            gateway: Gateway::new(settings, 1, now),
            now,
            queues: HashMap::new(),
            hold: false,
            held: Vec::new(),
            refuse: None,
            log: Vec::new(),
        }
    }

    /// A gateway with the client `dev` connected from A; its session ends with the connection when `clean`.
    fn connected(clean: bool) -> Self {
        let mut net = Self::new(settings());
        let flags = if clean { "04" } else { "00" };
        net.rx("A", &format!("_ 04 {flags} 01 003C 'dev'"));
        net.log.clear();
        net
    }

    /// As `connected`, and asleep for 100 s.
    fn asleep(clean: bool) -> Self {
        let mut net = Self::connected(clean);
        net.check("A", "_ 18 0064", &["A _ 18"]);
        net
    }

    fn rx(&mut self, from: &str, text: &str) {
        self.gateway.handle(address(from), &frame(text), self.now);
        self.settle();
    }

    /// Sends a frame and compares everything that comes of it.
    #[track_caller]
    fn check(&mut self, from: &str, text: &str, expected: &[&str]) {
        self.rx(from, text);
        self.expect(expected);
    }

    #[track_caller]
    fn expect(&mut self, expected: &[&str]) {
        let expected: Vec<String> = expected
            .iter()
            .map(|line| match line.split_once(' ') {
                Some((to, text)) if to.len() == 1 => format!("{to} {}", hex(&frame(text))),
                _ => (*line).to_owned(),
            })
            .collect();
        assert_eq!(std::mem::take(&mut self.log), expected);
    }

    fn wait(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        while let Some(at) = self.gateway.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now, "a deadline stays behind");
            self.now = at;
            self.gateway.handle_timeout(at);
            assert!(self.gateway.poll_timeout().is_none_or(|next| next > at), "a deadline stays");
            self.settle();
        }
        self.now = end;
    }

    /// The hub queues a message for a client and tells its connection.
    fn queue(&mut self, client_id: &str, topic: &str, payload: &str, qos: QoS, packet_id: u16) {
        let message = Message::new(TopicName::new(topic).unwrap(), payload.to_owned(), qos, UnixMillis(0));
        let packet_id = NonZeroU16::new(packet_id);
        let delivery = Delivery { message: Arc::new(message), qos, retain: false, dup: false, packet_id };
        self.queues.entry(client_id.to_owned()).or_default().push_back(Queued::Message(delivery));
        self.wake(client_id);
    }

    fn wake(&mut self, client_id: &str) {
        if let Some(key) = self.key(client_id) {
            self.gateway.pending(key, self.now);
            self.settle();
        }
    }

    fn key(&self, client_id: &str) -> Option<ClientKey> {
        (0..100).map(ClientKey).find(|key| self.gateway.client_id(*key).is_some_and(|id| **id == *client_id))
    }

    fn answer_held(&mut self, result: Result<(), ReturnCode>) {
        for (key, answer) in std::mem::take(&mut self.held) {
            self.gateway.published(key, answer, result, self.now);
        }
        self.settle();
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.gateway.counters().dropped[reason as usize]
    }

    fn states(&self) -> [usize; ClientState::COUNT] {
        self.gateway.states()
    }

    fn settle(&mut self) {
        while let Some(action) = self.gateway.poll_action() {
            match action {
                Action::Send { to, datagram } => self.log.push(format!("{} {}", name(to), hex(&datagram))),
                Action::Broadcast { datagram } => self.log.push(format!("* {}", hex(&datagram))),
                Action::PublishConnectionless { from, topic, payload, .. } => {
                    let payload = String::from_utf8_lossy(&payload).into_owned();
                    self.log.push(format!("hub connectionless {} {topic} {payload}", name(from)));
                }
                Action::Notice(Notice::Lost { client_id, cause }) => {
                    self.log.push(format!("lost {client_id} {cause:?}"));
                }
                Action::Notice(Notice::TooBig { topic, bytes, .. }) => {
                    self.log.push(format!("too big {topic} {bytes}"))
                }
                Action::Notice(Notice::TopicsExhausted { topic, .. }) => self.log.push(format!("exhausted {topic}")),
                Action::Client { key, request } => self.serve(key, request),
            }
        }
    }

    fn serve(&mut self, key: ClientKey, request: Request) {
        let will_text = |will: &Option<Will>| match will {
            None => "no will".to_owned(),
            Some(will) => format!(
                "will {} {} qos{}{}",
                will.topic,
                String::from_utf8_lossy(&will.payload),
                will.qos.level(),
                if will.retain { " retain" } else { "" }
            ),
        };
        let client_id = self.gateway.client_id(key).unwrap().to_string();
        let now = self.now;
        match request {
            Request::Attach { client_id, clean_start, lifetime, will } => {
                let start = if clean_start { "clean" } else { "keep" };
                let ends = if lifetime == SessionLifetime::Lasting { "lasting" } else { "ending" };
                self.log.push(format!("hub attach {client_id} {start} {ends}, {}", will_text(&will)));
                self.gateway.attached(key, self.refuse.map_or(Ok(()), Err), now);
            }
            Request::Resume { will } => {
                self.log.push(format!("hub resume, {}", will_text(&will)));
                self.gateway.attached(key, Ok(()), now);
            }
            Request::SetWill(will) => self.log.push(format!("hub {}", will_text(&will))),
            Request::Publish { topic, payload, qos, retain, dup, answer } => {
                let flags = format!("{}{}", if retain { " retain" } else { "" }, if dup { " dup" } else { "" });
                let payload = String::from_utf8_lossy(&payload).into_owned();
                self.log.push(format!("hub publish {topic} {payload} qos{}{flags}", qos.level()));
                if self.hold {
                    self.held.push((key, answer));
                } else {
                    self.gateway.published(key, answer, self.refuse.map_or(Ok(()), Err), now);
                }
            }
            Request::Release(msg_id) => {
                self.log.push(format!("hub release {msg_id}"));
                self.gateway.released(key, msg_id, now);
            }
            Request::Subscribe { filter, qos, answer } => {
                self.log.push(format!("hub subscribe {} qos{}", filter.to_text(), qos.level()));
                self.gateway.subscribed(key, answer, self.refuse.map_or(Ok(qos), Err), now);
            }
            Request::Unsubscribe { filter } => self.log.push(format!("hub unsubscribe {}", filter.to_text())),
            Request::Take => match self.queues.entry(client_id).or_default().pop_front() {
                Some(Queued::Message(delivery)) => self.gateway.deliver(key, delivery, now),
                Some(Queued::Release(packet_id)) => self.gateway.deliver_release(key, packet_id, now),
                None => self.gateway.drained(key, now),
            },
            Request::Acknowledge(packet_id) => self.log.push(format!("hub acknowledge {packet_id}")),
            Request::Received(packet_id) => {
                self.log.push(format!("hub received {packet_id}"));
                self.queues.entry(client_id).or_default().push_front(Queued::Release(packet_id));
            }
            Request::Completed(packet_id) => self.log.push(format!("hub completed {packet_id}")),
            Request::Detach { will, lifetime } => {
                let will = if will == WillFate::Publish { "will" } else { "no will" };
                let ends = if lifetime == SessionLifetime::Lasting { "lasting" } else { "ending" };
                self.log.push(format!("hub detach {ends}, {will}"));
            }
        }
    }
}

const Q0: QoS = QoS::AtMostOnce;
const Q1: QoS = QoS::AtLeastOnce;
const Q2: QoS = QoS::ExactlyOnce;

#[test]
fn lines_1_to_5_other_datagrams_are_counted_and_ignored() {
    let mut net = Net::connected(true);
    for text in ["", "00", "03 16", "_ 16 | 00", "01 0005 16"] {
        net.check("A", text, &[]);
    }
    assert_eq!(net.dropped(DropReason::Length), 5);
    for text in ["_ 03", "_ 11", "_ 1E 00", "_ FF", "_ 0C 03 0001 0000"] {
        net.check("A", text, &[]);
    }
    assert_eq!(net.dropped(DropReason::Undefined), 5);
    net.check("A", "01 0004 16", &["A _ 17"]);
}

#[test]
fn line_4_a_message_too_big_for_the_link_is_given_up_counted_and_logged_once() {
    let mut net = Net::connected(true);
    net.check("A", "_ 12 20 0001 'a/b'", &["hub subscribe a/b qos1", "A _ 13 20 0001 0001 00"]);
    let long = "x".repeat(400);
    net.queue("dev", "a/b", &long, Q1, 4);
    net.expect(&["too big a/b 409", "hub acknowledge 4"]);
    net.queue("dev", "a/b", &long, Q0, 0);
    net.expect(&[]);
    net.queue("dev", &format!("a/{long}"), "1", Q0, 0);
    net.queue("dev", "a/b", "1", Q0, 0);
    net.expect(&["A _ 0C 00 0001 0000 '1'"]);
    assert_eq!(net.dropped(DropReason::TooBig), 3);
}

#[test]
fn lines_9_10_17_a_connect_that_cannot_be_served_is_refused() {
    let mut net = Net::new(settings());
    net.check("A", "_ 04 04 02 003C 'dev'", &["A _ 05 03"]);
    net.check("A", "_ 04 04 01 003C", &["A _ 05 03"]);
    net.check("A", "_ 04 04 01 003C FF", &["A _ 05 03"]);
    net.check("A", &format!("_ 04 04 01 003C '{}'", "x".repeat(31)), &["A _ 05 03"]);
    let id = "x".repeat(30);
    let attach = format!("hub attach {id} clean ending, no will");
    net.check("A", &format!("_ 04 04 01 003C '{id}'"), &[&attach, "A _ 05 00"]);
    net.refuse = Some(ReturnCode::Congestion);
    net.check("B", "_ 04 04 01 003C 'two'", &["hub attach two clean ending, no will", "B _ 05 01"]);
    net.refuse = None;
    net.rx("B", "_ 04 04 01 003C 'two'");
    net.rx("C", "_ 04 04 01 003C 'three'");
    net.log.clear();
    net.check("D", "_ 04 04 01 003C 'four'", &["D _ 05 01"]);
    // Those who are gone make room.
    net.rx("C", "_ 18");
    net.log.clear();
    net.check("D", "_ 04 04 01 003C 'four'", &["hub attach four clean ending, no will", "D _ 05 00"]);
}

#[test]
fn lines_12_13_15_the_gateway_advertises_itself_and_answers_who_searches() {
    let mut net = Net::new(Settings { advertise_interval: Some(Duration::from_secs(900)), ..settings() });
    net.wait(0);
    net.expect(&["* _ 00 05 0384"]);
    net.wait(899);
    net.expect(&[]);
    net.wait(1);
    net.expect(&["* _ 00 05 0384"]);
    net.check("B", "_ 01 00", &["B _ 02 05"]);
    // Through a forwarder: wrapped for the same node, with the radius of the search.
    net.check("B", "_ FE 01 AABB | _ 01 02", &["B _ FE 02 AABB | _ 02 05"]);
    net.check("B", "_ 00 06 0384", &[]);
    net.check("B", "_ 02 06", &[]);
    // Full: nobody is invited.
    for from in ["A", "B", "C"] {
        net.rx(from, &format!("_ 04 04 01 0000 '{from}'"));
    }
    net.log.clear();
    net.check("D", "_ 01 00", &[]);
    net.wait(900);
    net.expect(&[]);
}

#[test]
fn line_16_a_will_is_asked_for_in_two_steps() {
    let mut net = Net::new(settings());
    net.check("A", "_ 04 0C 01 003C 'dev'", &["A _ 06"]);
    net.check("A", "_ 07 30 'wills/dev'", &["A _ 08"]);
    net.check("A", "_ 09 'gone'", &["hub attach dev clean ending, will wills/dev gone qos1 retain", "A _ 05 00"]);
}

#[test]
fn line_25_repeated_connects_and_wills_are_asked_for_and_acknowledged_again() {
    let mut net = Net::new(settings());
    net.check("A", "_ 04 0C 01 003C 'dev'", &["A _ 06"]);
    net.check("A", "_ 04 0C 01 003C 'dev'", &["A _ 06"]);
    net.check("A", "_ 07 00 'w/1'", &["A _ 08"]);
    net.check("A", "_ 07 00 'w/1'", &["A _ 08"]);
    net.check("A", "_ 09 'x'", &["hub attach dev clean ending, will w/1 x qos0", "A _ 05 00"]);
    net.check("A", "_ 09 'x'", &["A _ 05 00"]);
    net.check("A", "_ 04 04 01 003C 'dev'", &["hub attach dev clean ending, no will", "A _ 05 00"]);
    net.check("A", "_ 04 04 01 003C 'dev'", &["hub attach dev clean ending, no will", "A _ 05 00"]);
}

#[test]
fn line_16_unanswered_questions_are_repeated_and_then_given_up() {
    let mut net = Net::new(settings());
    net.check("A", "_ 04 0C 01 003C 'dev'", &["A _ 06"]);
    net.wait(30);
    net.expect(&["A _ 06", "A _ 06", "A _ 06"]);
    net.wait(10);
    net.expect(&["lost dev Retries"]);
    net.check("A", "_ 07 00 'w/1'", &["A _ 18"]);
}

#[test]
fn lines_18_to_20_clean_session_decides_what_is_kept() {
    let mut net = Net::new(settings());
    net.rx("A", "_ 04 08 01 003C 'dev'");
    net.rx("A", "_ 07 00 'w/1'");
    net.log.clear();
    net.check("A", "_ 09 'x'", &["hub attach dev keep lasting, will w/1 x qos0", "A _ 05 00"]);
    net.check("A", "_ 18", &["A _ 18", "hub detach lasting, no will"]);
    // Clean=0, Will=0: everything is kept.
    net.check("A", "_ 04 00 01 003C 'dev'", &["hub attach dev keep lasting, will w/1 x qos0", "A _ 05 00"]);
    // Clean=0, Will=1: the will is overwritten.
    net.rx("A", "_ 04 08 01 003C 'dev'");
    net.rx("A", "_ 07 00 'w/2'");
    net.log.clear();
    net.check("A", "_ 09 'y'", &["hub resume, will w/2 y qos0", "A _ 05 00"]);
    // Clean=1: the will is deleted.
    net.check("A", "_ 04 04 01 003C 'dev'", &["hub attach dev clean ending, no will", "A _ 05 00"]);
    net.check("A", "_ 18", &["A _ 18", "hub detach ending, no will"]);
    net.check("A", "_ 04 00 01 003C 'dev'", &["hub attach dev keep lasting, no will", "A _ 05 00"]);
}

#[test]
fn line_21_an_empty_willtopic_deletes_the_will() {
    let mut net = Net::new(settings());
    net.rx("A", "_ 04 08 01 003C 'dev'");
    net.rx("A", "_ 07 00 'w/1'");
    net.rx("A", "_ 09 'x'");
    net.rx("A", "_ 04 08 01 003C 'dev'");
    net.log.clear();
    net.check("A", "_ 07", &["hub resume, no will", "A _ 05 00"]);
}

#[test]
fn a_will_topic_that_is_no_topic_name_refuses_the_connect() {
    let mut net = Net::new(settings());
    net.rx("A", "_ 04 0C 01 003C 'dev'");
    net.log.clear();
    net.check("A", "_ 07 00 'w/#'", &["A _ 05 03"]);
    assert_eq!(net.states()[ClientState::Disconnected as usize], 1);
}

#[test]
fn lines_22_23_the_will_changes_at_any_time_in_a_connection() {
    let mut net = Net::connected(true);
    // Half a will is none.
    net.check("A", "_ 1A 20 'w/1'", &["hub no will", "A _ 1B 00"]);
    net.check("A", "_ 1C 'x'", &["hub will w/1 x qos1", "A _ 1D 00"]);
    net.check("A", "_ 1A 10 'w/2'", &["hub will w/2 x qos0 retain", "A _ 1B 00"]);
    net.check("A", "_ 1C", &["hub will w/2  qos0 retain", "A _ 1D 00"]);
    net.check("A", "_ 1A 10 'w/+'", &["A _ 1B 02"]);
    net.check("A", "_ 1A", &["hub no will", "A _ 1B 00"]);
    net.check("A", "_ 1A 10 'w/2'", &["hub no will", "A _ 1B 00"]);
}

#[test]
fn lines_24_45_46_silence_longer_than_the_keep_alive_is_loss() {
    let mut net = Net::connected(true);
    net.wait(89);
    net.check("A", "_ 16", &["A _ 17"]);
    net.wait(89);
    net.expect(&[]);
    net.wait(1);
    net.expect(&["lost dev KeepAlive", "hub detach ending, will"]);
    net.check("A", "_ 16", &["A _ 18"]);
    // 10 % above one minute; none at all for 0.
    net.rx("A", "_ 04 00 01 0064 'dev'");
    net.log.clear();
    net.wait(109);
    net.expect(&[]);
    net.wait(1);
    net.expect(&["lost dev KeepAlive", "hub detach lasting, will"]);
    net.rx("A", "_ 04 00 01 0000 'dev'");
    net.log.clear();
    net.wait(1_000_000);
    net.expect(&[]);
}

#[test]
fn lines_8_26_32_register_gives_each_name_one_id_and_refuses_when_none_is_left() {
    let mut net = Net::connected(true);
    net.check("A", "_ 0A 0000 0001 'a/b'", &["A _ 0B 0001 0001 00"]);
    net.check("A", "_ 0A 0000 0002 'a/c'", &["A _ 0B 0002 0002 00"]);
    net.check("A", "_ 0A 0000 0003 'a/b'", &["A _ 0B 0001 0003 00"]);
    net.check("A", "_ 12 00 0004 'a/c'", &["hub subscribe a/c qos0", "A _ 13 00 0002 0004 00"]);
    net.check("A", "_ 0A 0000 0005 'a/#'", &["A _ 0B 0000 0005 02"]);
    net.check("A", "_ 0A 0000 0005 FF", &["A _ 0B 0000 0005 02"]);
    net.rx("A", "_ 0A 0000 0006 'a/d'");
    net.rx("A", "_ 0A 0000 0007 'a/e'");
    net.log.clear();
    net.check("A", "_ 0A 0000 0008 'a/f'", &["A _ 0B 0000 0008 01"]);
    net.check("A", "_ 12 00 0009 'a/g'", &["A _ 13 00 0000 0009 01"]);
    net.check("A", "_ 0C 00 0001 0000 'x'", &["hub publish a/b x qos0"]);
    // Ids belong to one client.
    net.rx("B", "_ 04 04 01 003C 'two'");
    net.log.clear();
    net.check("B", "_ 0C 20 0001 0001 'x'", &["B _ 0D 0001 0001 02"]);
    net.check("B", "_ 0A 0000 0001 'a/z'", &["B _ 0B 0001 0001 00"]);
}

#[test]
fn lines_27_28_30_a_topic_new_to_the_client_is_registered_before_its_message() {
    let mut net = Net::connected(true);
    net.check("A", "_ 12 20 0001 'a/+'", &["hub subscribe a/+ qos1", "A _ 13 20 0000 0001 00"]);
    net.queue("dev", "a/1", "x", Q0, 0);
    net.queue("dev", "a/2", "y", Q1, 9);
    net.expect(&["A _ 0A 0001 0001 'a/1'"]);
    net.check("A", "_ 0B 0001 0001 00", &["A _ 0C 00 0001 0000 'x'", "A _ 0A 0002 0002 'a/2'"]);
    // An answer to another REGISTER changes nothing.
    net.check("A", "_ 0B 0001 0001 00", &[]);
    net.check("A", "_ 0B 0002 0002 00", &["A _ 0C 20 0002 0009 'y'"]);
    net.check("A", "_ 0D 0002 0009 00", &["hub acknowledge 9"]);
    net.queue("dev", "a/1", "z", Q0, 0);
    net.expect(&["A _ 0C 00 0001 0000 'z'"]);
}

#[test]
fn line_29_a_refused_register_stops_that_topic_and_no_other() {
    let mut net = Net::connected(false);
    net.rx("A", "_ 12 20 0001 'a/+'");
    net.queue("dev", "a/1", "x", Q1, 3);
    net.log.clear();
    net.check("A", "_ 0B 0001 0001 03", &["hub acknowledge 3"]);
    net.queue("dev", "a/1", "x", Q1, 4);
    net.expect(&["hub acknowledge 4"]);
    assert_eq!(net.dropped(DropReason::Refused), 2);
    net.queue("dev", "a/2", "y", Q0, 0);
    net.expect(&["A _ 0A 0002 0002 'a/2'"]);
    net.check("A", "_ 0B 0002 0002 00", &["A _ 0C 00 0002 0000 'y'"]);
    // "Congestion" is not a refusal.
    net.queue("dev", "a/3", "z", Q0, 0);
    net.expect(&["A _ 0A 0003 0003 'a/3'"]);
    net.check("A", "_ 0B 0003 0003 01", &[]);
    net.wait(10);
    net.expect(&["A _ 0A 0003 0003 'a/3'"]);
    net.check("A", "_ 0B 0003 0003 00", &["A _ 0C 00 0003 0000 'z'"]);
}

#[test]
fn line_31_a_client_that_forgot_a_topic_id_is_told_again_but_not_for_ever() {
    let mut net = Net::connected(true);
    net.rx("A", "_ 12 20 0001 'a/b'");
    net.log.clear();
    net.queue("dev", "a/b", "x", Q1, 3);
    net.expect(&["A _ 0C 20 0001 0003 'x'"]);
    for msg_id in 1..=3 {
        net.check("A", "_ 0D 0001 0003 02", &[&format!("A _ 0A 0001 000{msg_id} 'a/b'")]);
        net.check("A", &format!("_ 0B 0001 000{msg_id} 00"), &["A _ 0C 20 0001 0003 'x'"]);
    }
    net.check("A", "_ 0D 0001 0003 02", &["hub acknowledge 3"]);
    assert_eq!(net.dropped(DropReason::Refused), 1);
    // After a QoS 0 message: the next one is registered.
    net.queue("dev", "a/b", "y", Q0, 0);
    net.expect(&["A _ 0C 00 0001 0000 'y'"]);
    net.check("A", "_ 0D 0001 0000 02", &[]);
    net.queue("dev", "a/b", "z", Q0, 0);
    net.expect(&["A _ 0A 0001 0004 'a/b'"]);
}

#[test]
fn lines_33_34_predefined_and_short_ids_need_no_register() {
    let mut net = Net::connected(true);
    net.check("A", "_ 0C 21 0007 0001 'x'", &["hub publish plant/alarm x qos1", "A _ 0D 0007 0001 00"]);
    net.check("A", "_ 0C 22 'ab' 0002 'x'", &["hub publish ab x qos1", "A _ 0D 'ab' 0002 00"]);
    net.check("A", "_ 0C 21 0009 0003 'x'", &["A _ 0D 0009 0003 02"]);
    net.check("A", "_ 0C 20 0007 0004 'x'", &["A _ 0D 0007 0004 02"]);
    net.check("A", "_ 0C 22 '+a' 0005 'x'", &["A _ 0D '+a' 0005 02"]);
    // QoS 0 is answered only when something is wrong.
    net.check("A", "_ 0C 01 0009 0000 'x'", &["A _ 0D 0009 0000 02"]);
    // The client gets topics as it subscribed to them.
    net.check("A", "_ 12 01 0006 0007", &["hub subscribe plant/alarm qos0", "A _ 13 00 0007 0006 00"]);
    net.check("A", "_ 12 02 0007 'cd'", &["hub subscribe cd qos0", "A _ 13 00 0000 0007 00"]);
    net.queue("dev", "plant/alarm", "1", Q0, 0);
    net.queue("dev", "cd", "2", Q0, 0);
    net.expect(&["A _ 0C 01 0007 0000 '1'", "A _ 0C 02 'cd' 0000 '2'"]);
    net.queue("dev", "plant/level", "3", Q0, 0);
    net.expect(&["A _ 0A 0001 0001 'plant/level'"]);
}

#[test]
fn line_35_a_returning_client_is_told_its_topic_ids_again() {
    let mut net = Net::connected(false);
    net.rx("A", "_ 12 20 0001 'a/b'");
    net.rx("A", "_ 18");
    net.queue("dev", "a/b", "x", Q1, 3);
    net.log.clear();
    net.check(
        "A",
        "_ 04 00 01 003C 'dev'",
        &["hub attach dev keep lasting, no will", "A _ 05 00", "A _ 0A 0001 0001 'a/b'"],
    );
    net.check("A", "_ 0B 0001 0001 00", &["A _ 0C 20 0001 0003 'x'"]);
}

#[test]
fn lines_36_37_41_publishes_are_taken_as_in_mqtt() {
    let mut net = Net::connected(true);
    net.rx("A", "_ 0A 0000 0001 'a/b'");
    net.log.clear();
    net.check("A", "_ 0C 00 0001 0000 'x'", &["hub publish a/b x qos0"]);
    net.check("A", "_ 0C B0 0001 0002 'x'", &["hub publish a/b x qos1 retain dup", "A _ 0D 0001 0002 00"]);
    net.check("A", "_ 0C 40 0001 0003 'x'", &["hub publish a/b x qos2", "A _ 0F 0003"]);
    net.check("A", "_ 10 0003", &["hub release 3", "A _ 0E 0003"]);
    net.check("A", "_ 10 0003", &["hub release 3", "A _ 0E 0003"]);
    net.check("A", "_ 0C 20 0001 0000 'x'", &[]);
    net.refuse = Some(ReturnCode::NotSupported);
    net.check("A", "_ 0C 00 0001 0000 'x'", &["hub publish a/b x qos0", "A _ 0D 0001 0000 03"]);
    net.check("A", "_ 0C 40 0001 0004 'x'", &["hub publish a/b x qos2", "A _ 0D 0001 0004 03"]);
}

#[test]
fn lines_38_39_56_acknowledgements_wait_for_the_hub_and_repeats_do_not_publish_again() {
    let mut net = Net::connected(true);
    net.hold = true;
    net.rx("A", "_ 0A 0000 0001 'a/b'");
    net.log.clear();
    net.check("A", "_ 0C 20 0001 0002 'x'", &["hub publish a/b x qos1"]);
    net.check("A", "_ 0C A0 0001 0002 'x'", &[]);
    net.answer_held(Ok(()));
    net.expect(&["A _ 0D 0001 0002 00"]);
    for msg_id in 1..=8 {
        net.rx("A", &format!("_ 0C 40 0001 00{msg_id:02x} 'x'"));
    }
    net.log.clear();
    net.check("A", "_ 0C 40 0001 0009 'x'", &["A _ 0D 0001 0009 01"]);
    net.held.truncate(1);
    net.answer_held(Err(ReturnCode::Congestion));
    net.expect(&["A _ 0D 0001 0001 01"]);
}

#[test]
fn lines_36_38_messages_go_to_the_client_one_at_a_time() {
    let mut net = Net::connected(true);
    net.rx("A", "_ 12 40 0001 'a/b'");
    net.log.clear();
    net.queue("dev", "a/b", "x", Q2, 5);
    net.queue("dev", "a/b", "y", Q1, 6);
    net.expect(&["A _ 0C 40 0001 0005 'x'"]);
    net.check("A", "_ 0F 0005", &["hub received 5", "A _ 10 0005"]);
    net.check("A", "_ 0F 0005", &["A _ 10 0005"]);
    net.check("A", "_ 0E 0005", &["hub completed 5", "A _ 0C 20 0001 0006 'y'"]);
    net.check("A", "_ 0E 0005", &[]);
    net.check("A", "_ 0D 0001 0006 00", &["hub acknowledge 6"]);
    net.check("A", "_ 0D 0001 0006 00", &[]);
    // A PUBREC for what we know nothing of: the client may let it go.
    net.check("A", "_ 0F 0077", &["A _ 10 0077"]);
}

#[test]
fn line_56_unacknowledged_messages_are_repeated_and_then_the_client_is_lost() {
    let mut net = Net::new(settings());
    net.rx("A", "_ 04 04 01 0000 'dev'");
    net.rx("A", "_ 12 40 0001 'a/b'");
    net.log.clear();
    net.queue("dev", "a/b", "x", Q1, 5);
    net.expect(&["A _ 0C 20 0001 0005 'x'"]);
    net.wait(30);
    net.expect(&["A _ 0C A0 0001 0005 'x'", "A _ 0C A0 0001 0005 'x'", "A _ 0C A0 0001 0005 'x'"]);
    net.wait(10);
    net.expect(&["lost dev Retries", "hub detach ending, will"]);
}

#[test]
fn line_40_qos_minus_one_needs_no_connection() {
    let mut net = Net::connected(true);
    net.check("B", "_ 0C 61 0007 0000 'x'", &["hub connectionless B plant/alarm x"]);
    net.check("B", "_ 0C 62 'ab' 0000 'x'", &["hub connectionless B ab x"]);
    net.check("B", "_ 0C 61 0009 0000 'x'", &[]);
    net.check("B", "_ 0C 60 0001 0000 'x'", &[]);
    assert_eq!((net.dropped(DropReason::UnknownTopic), net.dropped(DropReason::RateLimited)), (1, 1));
    // Connected and sleeping clients, with their own rights.
    net.check("A", "_ 0C 61 0007 0000 'x'", &["hub publish plant/alarm x qos0"]);
    net.check("A", "_ 0C 61 0009 0000 'x'", &[]);
    net.check("A", "_ 18 0064", &["A _ 18"]);
    net.check("A", "_ 0C 61 0007 0000 'y'", &["hub publish plant/alarm y qos0"]);

    let allow = vec!["10.0.0.66".parse::<AddressRange>().unwrap()];
    let connectionless = Some(Connectionless { allow, max_per_second: 100 });
    let mut net = Net::new(Settings { connectionless, ..settings() });
    net.check("B", "_ 0C 61 0007 0000 'x'", &["hub connectionless B plant/alarm x"]);
    net.check("C", "_ 0C 61 0007 0000 'x'", &[]);
    let mut net = Net::new(Settings { connectionless: None, ..settings() });
    net.check("B", "_ 0C 61 0007 0000 'x'", &[]);
    assert_eq!(net.dropped(DropReason::NotAllowed), 1);
}

#[test]
fn an_address_that_floods_with_connects_is_not_answered_until_it_slows_down() {
    let addresses = AddressLimits { connection_rate: 1, connection_burst: 2, ..AddressLimits::default() };
    let mut net = Net::new(Settings { addresses, ..settings() });
    let connect = "_ 04 04 01 003C 'dev'";
    for answered in [true, true, false, false] {
        net.rx("A", connect);
        assert_eq!(!std::mem::take(&mut net.log).is_empty(), answered);
    }
    assert_eq!(net.dropped(DropReason::RateLimited), 2);
    net.check("B", "_ 04 04 01 003C 'two'", &["hub attach two clean ending, no will", "B _ 05 00"]);
    net.now += Duration::from_secs(1);
    net.rx("A", connect);
    assert!(!net.log.is_empty());
}

#[test]
fn lines_42_43_every_subscribe_and_unsubscribe_is_answered() {
    let mut net = Net::connected(true);
    net.check("A", "_ 12 40 0001 'a/#'", &["hub subscribe a/# qos2", "A _ 13 40 0000 0001 00"]);
    net.check("A", "_ 12 20 0002 'a/b'", &["hub subscribe a/b qos1", "A _ 13 20 0001 0002 00"]);
    // A repeated one is answered from memory: the retained messages must not come twice.
    net.check("A", "_ 12 A0 0002 'a/b'", &["A _ 13 20 0001 0002 00"]);
    net.check("A", "_ 12 00 0003 'a/#/b'", &["A _ 13 00 0000 0003 02"]);
    net.check("A", "_ 12 01 0004 0009", &["A _ 13 00 0000 0004 02"]);
    net.check("A", "_ 12 60 0005 'a/b'", &["A _ 13 00 0000 0005 03"]);
    net.check("A", "_ 14 00 0006 'a/b'", &["hub unsubscribe a/b", "A _ 15 0006"]);
    net.check("A", "_ 14 01 0007 0007", &["hub unsubscribe plant/alarm", "A _ 15 0007"]);
    net.check("A", "_ 14 02 0008 'ab'", &["hub unsubscribe ab", "A _ 15 0008"]);
    net.check("A", "_ 14 01 0009 0099", &["A _ 15 0009"]);
    net.refuse = Some(ReturnCode::NotSupported);
    net.check("A", "_ 12 20 000A 'a/b'", &["hub subscribe a/b qos1", "A _ 13 00 0000 000A 03"]);
}

#[test]
fn lines_44_47_ping_and_disconnect_are_answered() {
    let mut net = Net::connected(true);
    net.check("A", "_ 16", &["A _ 17"]);
    net.check("A", "_ 18", &["A _ 18", "hub detach ending, no will"]);
    net.check("A", "_ 18", &["A _ 18"]);
    net.wait(1000);
    net.expect(&[]);
    assert_eq!(net.states().iter().sum::<usize>(), 0, "a session that ended is forgotten");
}

#[test]
fn lines_48_to_51_a_sleeping_client_gets_its_messages_when_it_wakes() {
    let mut net = Net::connected(true);
    net.rx("A", "_ 12 20 0001 'a/b'");
    net.log.clear();
    net.check("A", "_ 18 0064", &["A _ 18"]);
    // Nothing buffered: PINGRESP at once.
    net.check("A", "_ 16 'dev'", &["A _ 17"]);
    net.queue("dev", "a/b", "x", Q0, 0);
    net.queue("dev", "a/b", "y", Q1, 4);
    net.queue("dev", "a/b", "z", Q1, 5);
    net.wait(60);
    net.expect(&[]);
    net.check("A", "_ 16 'dev'", &["A _ 0C 00 0001 0000 'x'", "A _ 0C 20 0001 0004 'y'"]);
    assert_eq!(net.states()[ClientState::Awake as usize], 1);
    net.check("A", "_ 16 'dev'", &[]);
    net.check("A", "_ 0D 0001 0004 00", &["hub acknowledge 4", "A _ 0C 20 0001 0005 'z'"]);
    net.check("A", "_ 0D 0001 0005 00", &["hub acknowledge 5", "A _ 17"]);
    assert_eq!(net.states()[ClientState::Asleep as usize], 1);
    net.check("A", "_ 16 'dev'", &["A _ 17"]);
}

#[test]
fn lines_24_49_a_client_that_oversleeps_is_lost() {
    let mut net = Net::asleep(true);
    net.wait(109);
    net.check("A", "_ 16 'dev'", &["A _ 17"]);
    net.wait(109);
    net.expect(&[]);
    net.wait(1);
    net.expect(&["lost dev Sleep", "hub detach ending, will"]);
    net.check("A", "_ 16 'dev'", &["A _ 18"]);
}

#[test]
fn an_awake_client_that_does_not_acknowledge_is_lost_and_a_congested_one_sleeps_on() {
    let mut net = Net::connected(true);
    net.rx("A", "_ 12 20 0001 'a/b'");
    net.rx("A", "_ 18 0005");
    net.queue("dev", "a/b", "x", Q1, 4);
    net.log.clear();
    net.check("A", "_ 16 'dev'", &["A _ 0C 20 0001 0004 'x'"]);
    net.check("A", "_ 0D 0001 0004 01", &["A _ 17"]);
    net.wait(7);
    net.expect(&[]);
    net.check("A", "_ 16 'dev'", &["A _ 0C A0 0001 0004 'x'"]);
    net.wait(40);
    let again = "A _ 0C A0 0001 0004 'x'";
    net.expect(&[again, again, again, "lost dev Retries", "hub detach ending, will"]);
}

#[test]
fn line_52_a_client_is_where_it_says_its_id() {
    let mut net = Net::asleep(true);
    // A waking client behind a rebooted router.
    net.check("B", "_ 16 'dev'", &["B _ 17"]);
    net.check("A", "_ 16", &["A _ 18"]);
    // A connect takes over, the old address is nobody.
    net.check("C", "_ 04 00 01 003C 'dev'", &["hub resume, no will", "C _ 05 00"]);
    net.check("B", "_ 0C 21 0007 0001 'x'", &["B _ 18"]);
    // Another client on a known address inherits nothing.
    net.check("C", "_ 04 04 01 003C 'two'", &["hub attach two clean ending, no will", "C _ 05 00"]);
    net.check("C", "_ 0A 0000 0001 'a/b'", &["C _ 0B 0001 0001 00"]);
    net.queue("dev", "ab", "x", Q0, 0);
    net.expect(&[]);
    assert_eq!(net.dropped(DropReason::NoAddress), 1);
    net.wait(90);
    net.expect(&["lost dev KeepAlive", "hub detach lasting, will", "lost two KeepAlive", "hub detach ending, will"]);
}

#[test]
fn line_53_a_sleeping_client_that_connects_keeps_its_session_and_topic_ids() {
    let mut net = Net::connected(false);
    net.rx("A", "_ 12 20 0001 'a/b'");
    net.rx("A", "_ 18 0064");
    net.queue("dev", "a/b", "x", Q1, 4);
    net.log.clear();
    net.check("A", "_ 04 00 01 003C 'dev'", &["hub resume, no will", "A _ 05 00", "A _ 0C 20 0001 0004 'x'"]);
    // From awake, with a message on the way: it is sent again.
    net.rx("A", "_ 18 0064");
    net.log.clear();
    net.check("A", "_ 16 'dev'", &["A _ 0C A0 0001 0004 'x'"]);
    net.check("A", "_ 04 00 01 003C 'dev'", &["hub resume, no will", "A _ 05 00", "A _ 0C A0 0001 0004 'x'"]);
    net.check("A", "_ 0D 0001 0004 00", &["hub acknowledge 4"]);
}

#[test]
fn line_54_a_sleeping_client_changes_its_sleep_or_disconnects() {
    let mut net = Net::asleep(true);
    net.wait(50);
    net.check("A", "_ 18 0014", &["A _ 18"]);
    net.wait(29);
    net.expect(&[]);
    net.check("A", "_ 18", &["A _ 18", "hub detach ending, no will"]);
    // A sleep of no length is no sleep.
    let mut net = Net::connected(true);
    net.check("A", "_ 18 0000", &["A _ 18", "hub detach ending, no will"]);
}

#[test]
fn what_a_sleeping_client_sends_is_taken_and_answered() {
    let mut net = Net::asleep(true);
    net.check("A", "_ 0C 21 0007 0001 'x'", &["hub publish plant/alarm x qos1", "A _ 0D 0007 0001 00"]);
    net.check("A", "_ 12 01 0002 0007", &["hub subscribe plant/alarm qos0", "A _ 13 00 0007 0002 00"]);
    net.queue("dev", "plant/alarm", "1", Q0, 0);
    net.expect(&[]);
    net.check("A", "_ 16", &["A _ 0C 01 0007 0000 '1'", "A _ 17"]);
}

#[test]
fn line_55_strangers_are_told_so_at_a_limited_rate() {
    let mut net = Net::new(settings());
    net.check("A", "_ 0C 20 0001 0001 'x'", &["A _ 18"]);
    net.check("A", "_ 16", &["A _ 18"]);
    net.check("A", "_ 12 00 0001 'a'", &[]);
    net.wait(1);
    net.check("A", "_ 16 'who'", &["A _ 18"]);
    net.check("A", "_ 18", &["A _ 18"]);
    net.check("A", "_ 18", &[]);
    // What only a gateway says is not answered: it has nothing to disconnect from.
    net.wait(1);
    for text in ["_ 05 00", "_ 17", "_ 13 00 0001 0001 00", "_ 15 0001", "_ 06", "_ 08", "_ 1B 00", "_ 1D 00"] {
        net.check("A", text, &[]);
    }
}

#[test]
fn lines_57_58_clients_behind_a_forwarder_are_told_apart_and_may_move() {
    let mut net = Net::new(settings());
    net.check(
        "F",
        "_ FE 01 AA | _ 04 04 01 003C 'one'",
        &["hub attach one clean ending, no will", "F _ FE 01 AA | _ 05 00"],
    );
    net.check(
        "F",
        "_ FE 02 AABBCC | _ 04 00 01 003C 'two'",
        &["hub attach two keep lasting, no will", "F _ FE 02 AABBCC | _ 05 00"],
    );
    net.check("F", "_ FE 01 AA | _ 0A 0000 0001 'a/1'", &["F _ FE 01 AA | _ 0B 0001 0001 00"]);
    net.check("F", "_ FE 02 AABBCC | _ 16", &["F _ FE 02 AABBCC | _ 17"]);
    net.check("F", "_ 16", &["F _ 18"]);
    net.check("F", "_ FE 00 DD | _ 16", &["F _ FE 00 DD | _ 18"]);
    // To another forwarder, under another node id.
    net.check("G", "_ FE 00 01 | _ 04 00 01 003C 'two'", &["hub resume, no will", "G _ FE 00 01 | _ 05 00"]);
    net.wait(2);
    net.check("F", "_ FE 02 AABBCC | _ 16", &["F _ FE 02 AABBCC | _ 18"]);
    net.check("F", "_ FE 00 01 | _ FE 00 01 | _ 16", &[]);
    assert_eq!(net.dropped(DropReason::Undefined), 1);
}

#[test]
fn a_session_that_the_hub_closes_disconnects_its_client() {
    let mut net = Net::connected(true);
    let key = net.key("dev").unwrap();
    net.gateway.evicted(key, net.now);
    net.settle();
    net.expect(&["A _ 18"]);
    net.check("A", "_ 16", &["A _ 18"]);
    let mut net = Net::asleep(true);
    net.gateway.evicted(key, net.now);
    net.settle();
    net.expect(&[]);
    net.check("A", "_ 16 'dev'", &["A _ 18"]);
}

#[test]
fn nothing_is_delivered_before_the_answer_to_a_subscribe() {
    let mut net = Net::connected(true);
    let key = net.key("dev").unwrap();
    net.gateway.handle(address("A"), &frame("_ 12 20 0001 'a/b'"), net.now);
    let Some(Action::Client { request: Request::Subscribe { answer, .. }, .. }) = net.gateway.poll_action() else {
        panic!("no subscribe");
    };
    net.queue("dev", "a/b", "x", Q1, 4);
    net.expect(&[]);
    net.check("A", "_ 12 A0 0001 'a/b'", &[]);
    net.gateway.subscribed(key, answer, Ok(Q1), net.now);
    net.settle();
    net.expect(&["A _ 13 20 0001 0001 00", "A _ 0C 20 0001 0004 'x'"]);
}

/// A network that loses and doubles frames, the same way for the same seed.
struct Weather(u64);

impl Weather {
    /// How often a frame arrives: a third is lost, a fifth comes twice.
    fn copies(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        match (self.0 >> 33) % 15 {
            0..5 => 0,
            5..8 => 2,
            _ => 1,
        }
    }
}

/// A client that answers what the gateway sends, as the specification asks.
#[derive(Default)]
struct Answering {
    names: HashMap<[u8; 2], String>,
    unreleased: Vec<[u8; 2]>,
    got: Vec<String>,
}

impl Answering {
    fn handle(&mut self, frame: &[u8]) -> Vec<u8> {
        match *frame {
            [_, 0x0A, a, b, c, d, ref name @ ..] => {
                self.names.insert([a, b], String::from_utf8(name.to_vec()).unwrap());
                vec![7, 0x0B, a, b, c, d, 0]
            }
            [_, 0x0C, flags, a, b, c, d, ref payload @ ..] => {
                let Some(name) = self.names.get(&[a, b]) else { return vec![7, 0x0D, a, b, c, d, 2] };
                let text = format!("{name}={}", String::from_utf8_lossy(payload));
                if flags & 0x60 == 0x20 {
                    self.got.push(text);
                    return vec![7, 0x0D, a, b, c, d, 0];
                }
                if !self.unreleased.contains(&[c, d]) {
                    self.unreleased.push([c, d]);
                    self.got.push(text);
                }
                vec![4, 0x0F, c, d]
            }
            [_, 0x10, c, d] => {
                self.unreleased.retain(|id| *id != [c, d]);
                vec![4, 0x0E, c, d]
            }
            _ => Vec::new(),
        }
    }
}

#[test]
fn messages_arrive_in_order_over_a_network_that_loses_and_doubles_frames() {
    for seed in 0..200 {
        let mut settings = settings();
        // Nobody is lost here, however bad the weather.
        settings.rules.retry_limit = 1000;
        let mut net = Net::new(settings);
        net.rx("A", "_ 04 00 01 0000 'dev'");
        net.rx("A", "_ 12 40 0001 'a/+'");
        net.log.clear();
        let (mut weather, mut client) = (Weather(seed), Answering::default());
        for id in 1..=20 {
            let qos = if id % 2 == 0 { Q2 } else { Q1 };
            net.queue("dev", &format!("a/{}", id % 3), &id.to_string(), qos, id);
        }
        for _ in 0..5000 {
            if net.log.is_empty() {
                if net.queues["dev"].is_empty() && net.gateway.poll_timeout().is_none() {
                    break;
                }
                net.wait(10);
            }
            for line in std::mem::take(&mut net.log) {
                let Some(sent) = line.strip_prefix("A ") else { continue };
                for _ in 0..weather.copies() {
                    let answer = client.handle(&frame(sent));
                    for _ in 0..weather.copies() {
                        net.gateway.handle(address("A"), &answer, net.now);
                        net.settle();
                    }
                }
            }
        }
        // QoS 1 may come more than once, QoS 2 may not.
        let mut seen = client.got.clone();
        let repeated = |id: &u16| client.got.iter().filter(|text| text.ends_with(&format!("={id}"))).count();
        assert!((1..=20).filter(|id| id % 2 == 0).all(|id| repeated(&id) == 1), "seed {seed}: {seen:?}");
        seen.dedup();
        let expected: Vec<_> = (1..=20).map(|id| format!("a/{}={id}", id % 3)).collect();
        assert_eq!(seen, expected, "seed {seed}");
    }
}

/// A step of a peer or of the hub, for the property test.
#[derive(Clone, Debug)]
enum Event {
    Bytes(u8, Vec<u8>),
    Frame(u8, u8, Vec<u8>),
    Queue(u8, u8, u16),
    Wait(u64),
    Answer(bool),
    Evict(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let body = prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(b'd'), any::<u8>()], 0..12);
    prop_oneof![
        1 => (0u8..3, prop::collection::vec(any::<u8>(), 0..20)).prop_map(|(from, bytes)| Event::Bytes(from, bytes)),
        8 => (0u8..3, 0u8..0x1E, body).prop_map(|(from, kind, body)| Event::Frame(from, kind, body)),
        // Enough CONNECTs, sleeps and pings to get somewhere.
        4 => (0u8..3, prop_oneof![Just(0u8), Just(4), Just(8), Just(12)])
            .prop_map(|(from, flags)| Event::Frame(from, 0x04, vec![flags, 1, 0, 30, b'd'])),
        2 => (0u8..3).prop_map(|from| Event::Frame(from, 0x18, vec![0, 30])),
        2 => (0u8..3).prop_map(|from| Event::Frame(from, 0x16, vec![b'd'])),
        2 => (0u8..3).prop_map(|from| Event::Frame(from, 0x0D, vec![0, 1, 0, 1, 0])),
        4 => (0u8..2, 0u8..3, 1u16..4).prop_map(|(topic, qos, id)| Event::Queue(topic, qos, id)),
        2 => (0u64..40).prop_map(Event::Wait),
        1 => any::<bool>().prop_map(Event::Answer),
        1 => (0u64..4).prop_map(Event::Evict),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_bytes_in_any_order_panic_or_leave_a_deadline_behind(events in prop::collection::vec(event(), 0..60)) {
        let mut net = Net::new(settings());
        for event in events {
            let from = |index: u8| address(["A", "B", "C"][usize::from(index)]);
            match event {
                Event::Bytes(peer, bytes) => net.gateway.handle(from(peer), &bytes, net.now),
                Event::Frame(peer, kind, body) => {
                    let mut bytes = vec![u8::try_from(body.len() + 2).unwrap(), kind];
                    bytes.extend(body);
                    net.gateway.handle(from(peer), &bytes, net.now);
                }
                Event::Queue(topic, qos, id) => {
                    let qos = QoS::from_level(qos).unwrap();
                    let id = if qos == Q0 { 0 } else { id };
                    net.queue("d", ["a/b", "cd"][usize::from(topic)], "x", qos, id);
                }
                Event::Wait(seconds) => net.wait(seconds),
                Event::Answer(ok) => {
                    net.answer_held(if ok { Ok(()) } else { Err(ReturnCode::Congestion) });
                    net.hold = !net.hold;
                }
                Event::Evict(key) => net.gateway.evicted(ClientKey(key), net.now),
            }
            net.settle();
            prop_assert!(net.states().iter().sum::<usize>() <= 3, "more clients than allowed");
        }
    }
}
