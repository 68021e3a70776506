//! The publishers and the subscriber: what they are told, they write down.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use serde_json::{Map, json};

use crate::wire::{Version, Wire, packet_id};

/// How many messages a publisher leaves unacknowledged.
const WINDOW: usize = 20;
/// Between a lost connection and the next.
const BREATH: Duration = Duration::from_millis(10);

/// One publisher: numbered messages on two topics, all of one QoS.
pub struct Line {
    pub name: &'static str,
    pub qos: u8,
    /// How many it has published.
    pub published: AtomicU32,
    /// How many of those wait for their acknowledgement.
    pub inflight: AtomicU32,
}

impl Line {
    pub const fn new(name: &'static str, qos: u8) -> Self {
        Self { name, qos, published: AtomicU32::new(0), inflight: AtomicU32::new(0) }
    }

    pub fn topic(&self, number: u32) -> String {
        format!("plant/{}/{}", self.name, number % 2)
    }
}

/// What every message holds follows from its number, so that a wrong byte is seen.
fn payload(number: u32) -> String {
    format!("{number} {}", "x".repeat(number as usize % 200))
}

/// A message that was acknowledged or has arrived, and in which round.
#[derive(Clone, Copy)]
pub struct Event {
    pub line: usize,
    pub number: u32,
    pub round: u32,
}

/// What the threads tell each other.
pub struct Shared {
    pub lines: Vec<Line>,
    /// How far publishers may be ahead of the subscriber; it bounds how long the end takes.
    pub max_ahead: usize,
    /// The gateway's database is damaged on purpose: it may have forgotten a session.
    pub may_forget: bool,
    pub round: AtomicU32,
    /// Publishers begin nothing new.
    pub hold: AtomicBool,
    /// The subscriber stays away.
    pub rest: AtomicBool,
    pub stop_publishers: AtomicBool,
    pub stop_subscriber: AtomicBool,
    pub acknowledged: AtomicUsize,
    /// Messages that arrived for the first time.
    pub distinct: AtomicUsize,
    /// Messages that nobody waits for any more.
    written_off: AtomicUsize,
    /// What arrived, in its order.
    pub arrived: Mutex<Vec<Event>>,
    /// What a publisher has sent a second time, because the first was not acknowledged: line and number.
    pub sent_again: Mutex<BTreeSet<(usize, u32)>>,
    /// What arrived and was never published.
    pub wrong: Mutex<Vec<String>>,
}

impl Shared {
    pub fn new(max_ahead: usize, may_forget: bool) -> Self {
        let lines = vec![Line::new("one-a", 1), Line::new("one-b", 1), Line::new("two-a", 2), Line::new("two-b", 2)];
        Self {
            lines,
            max_ahead,
            may_forget,
            round: AtomicU32::new(0),
            hold: AtomicBool::new(false),
            rest: AtomicBool::new(false),
            stop_publishers: AtomicBool::new(false),
            stop_subscriber: AtomicBool::new(false),
            acknowledged: AtomicUsize::new(0),
            distinct: AtomicUsize::new(0),
            written_off: AtomicUsize::new(0),
            arrived: Mutex::default(),
            sent_again: Mutex::default(),
            wrong: Mutex::default(),
        }
    }

    fn may_publish(&self) -> bool {
        let held = self.hold.load(Ordering::Relaxed) || self.stop_publishers.load(Ordering::Relaxed);
        !held && self.under_way().saturating_sub(self.written_off.load(Ordering::Relaxed)) < self.max_ahead
    }

    /// Published and not arrived.
    fn under_way(&self) -> usize {
        let published: u32 = self.published().iter().sum();
        (published as usize).saturating_sub(self.distinct.load(Ordering::Relaxed))
    }

    /// What has not arrived by now will not.
    pub fn write_off(&self) {
        self.written_off.store(self.under_way(), Ordering::Relaxed);
    }

    /// How many messages each line has published.
    pub fn published(&self) -> Vec<u32> {
        self.lines.iter().map(|line| line.published.load(Ordering::Relaxed)).collect()
    }

    /// No publisher waits for an acknowledgement.
    pub fn all_acknowledged(&self) -> bool {
        self.lines.iter().all(|line| line.inflight.load(Ordering::Relaxed) == 0)
    }

    fn event(&self, line: usize, number: u32) -> Event {
        Event { line, number, round: self.round.load(Ordering::Relaxed) }
    }
}

/// A message on its way; the publisher has not been told yet that it is safe.
#[derive(Clone, Copy)]
struct Inflight {
    number: u32,
    /// QoS 2: PUBREC came, the message is the gateway's now.
    received: bool,
}

impl Inflight {
    fn packet_id(self) -> u16 {
        (self.number % 60_000) as u16 + 1
    }
}

/// Publishes until told to stop; returns what was acknowledged.
pub fn publish(address: SocketAddr, index: usize, shared: &Shared) -> Vec<Event> {
    let line = &shared.lines[index];
    let mut publisher = Publisher { line, index, shared, inflight: VecDeque::new(), acknowledged: Vec::new() };
    loop {
        let (wire, present) = Wire::connect_in_time(address, line.name, Version::V3_1_1);
        publisher.take_up(present);
        if publisher.work(wire).is_ok() {
            return publisher.acknowledged;
        }
        thread::sleep(BREATH);
    }
}

struct Publisher<'a> {
    line: &'a Line,
    index: usize,
    shared: &'a Shared,
    inflight: VecDeque<Inflight>,
    acknowledged: Vec<Event>,
}

impl Publisher<'_> {
    /// A connection is made; the gateway has the session, or not.
    fn take_up(&mut self, present: bool) {
        if present || self.inflight.iter().all(|message| !message.received) {
            return;
        }
        let name = self.line.name;
        assert!(self.shared.may_forget, "{name}: the gateway has sent PUBREC and forgotten the session");
        // MQTT 3.1.1 §3.2.2.2: the state is gone on both sides. Whether they arrive is not known.
        self.inflight.clear();
    }

    /// Works until everything is published and acknowledged, or the connection breaks.
    fn work(&mut self, mut wire: Wire) -> io::Result<()> {
        // MQTT 3.1.1 §4.4: again what is unacknowledged, in its order.
        for message in self.inflight.clone() {
            if message.received {
                wire.acknowledge(0x62, message.packet_id())?;
            } else {
                self.shared.sent_again.lock().unwrap().insert((self.index, message.number));
                self.send(&mut wire, 0x08, message)?;
            }
        }
        loop {
            while self.inflight.len() < WINDOW && self.shared.may_publish() {
                let number = self.line.published.fetch_add(1, Ordering::Relaxed);
                let message = Inflight { number, received: false };
                self.inflight.push_back(message);
                self.tell_inflight();
                self.send(&mut wire, 0, message)?;
            }
            self.tell_inflight();
            if self.inflight.is_empty() && self.shared.stop_publishers.load(Ordering::Relaxed) {
                return Ok(());
            }
            if let Some((kind, body)) = wire.receive()? {
                self.handle(&mut wire, kind, packet_id(&body))?;
            }
        }
    }

    fn send(&self, wire: &mut Wire, flags: u8, message: Inflight) -> io::Result<()> {
        let Inflight { number, .. } = message;
        let flags = flags | self.line.qos << 1;
        wire.publish(flags, &self.line.topic(number), message.packet_id(), payload(number).as_bytes())
    }

    fn handle(&mut self, wire: &mut Wire, kind: u8, id: u16) -> io::Result<()> {
        let place = self.inflight.iter().position(|message| message.packet_id() == id);
        match kind {
            0x40 | 0x70 => {
                let message = place.and_then(|place| self.inflight.remove(place)).expect("acknowledges what was sent");
                self.acknowledged.push(self.shared.event(self.index, message.number));
                self.shared.acknowledged.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            0x50 => {
                self.inflight[place.expect("receives what was sent")].received = true;
                wire.acknowledge(0x62, id)
            }
            _ => panic!("{}: unexpected packet {kind:#x}", self.line.name),
        }
    }

    fn tell_inflight(&self) {
        self.line.inflight.store(self.inflight.len() as u32, Ordering::Relaxed);
    }
}

/// Takes everything under `plant/` until told to stop, and writes it to `record` as `mosquitto_sub -F %j` does.
/// `subscribed` is told once the subscription is acknowledged.
pub fn subscribe(address: SocketAddr, shared: &Shared, record: File, subscribed: &mpsc::Sender<()>) {
    let mut subscriber = Subscriber {
        shared,
        record: BufWriter::new(record),
        known: shared.lines.iter().map(|_| BTreeSet::new()).collect(),
        unreleased: BTreeSet::new(),
        is_subscribed: false,
    };
    while !shared.stop_subscriber.load(Ordering::Relaxed) {
        if shared.rest.load(Ordering::Relaxed) {
            thread::sleep(BREATH);
            continue;
        }
        let (wire, present) = Wire::connect_in_time(address, "subscriber", Version::V5);
        let first = !subscriber.is_subscribed;
        assert!(present || first, "the upstream has forgotten the subscriber's session");
        if subscriber.work(wire, subscribed).is_err() {
            thread::sleep(BREATH);
        }
    }
    subscriber.record.flush().expect("the record can be written");
}

struct Subscriber<'a> {
    shared: &'a Shared,
    record: BufWriter<File>,
    /// The numbers that have come, by line.
    known: Vec<BTreeSet<u32>>,
    /// QoS 2: came, and not yet released.
    unreleased: BTreeSet<u16>,
    is_subscribed: bool,
}

impl Subscriber<'_> {
    fn work(&mut self, mut wire: Wire, subscribed: &mpsc::Sender<()>) -> io::Result<()> {
        if !self.is_subscribed {
            wire.subscribe("plant/#")?;
        }
        let shared = self.shared;
        while !shared.stop_subscriber.load(Ordering::Relaxed) && !shared.rest.load(Ordering::Relaxed) {
            let Some((kind, body)) = wire.receive()? else { continue };
            match kind & 0xf0 {
                0x30 => self.arrived(&mut wire, kind, &body)?,
                0x60 => {
                    let id = packet_id(&body);
                    self.unreleased.remove(&id);
                    wire.acknowledge(0x70, id)?;
                }
                0x90 => {
                    self.is_subscribed = true;
                    let _ = subscribed.send(());
                }
                _ => panic!("the subscriber gets a packet {kind:#x}"),
            }
        }
        Ok(())
    }

    fn arrived(&mut self, wire: &mut Wire, kind: u8, body: &[u8]) -> io::Result<()> {
        let message = wire.published(kind, body);
        if message.qos == 1 || self.unreleased.insert(message.packet_id) {
            let payload = String::from_utf8_lossy(&message.payload).into_owned();
            let user: Map<_, _> =
                message.user_properties.into_iter().map(|(name, value)| (name, json!(value))).collect();
            let line = json!({
                "topic": message.topic, "qos": message.qos, "payload": payload, "properties": { "user-properties": user },
            });
            writeln!(self.record, "{line}").expect("the record can be written");
            self.note(&message.topic, &payload);
        }
        wire.acknowledge(if message.qos == 1 { 0x40 } else { 0x50 }, message.packet_id)
    }

    fn note(&mut self, topic: &str, text: &str) {
        let shared = self.shared;
        let number = text.split(' ').next().and_then(|number| number.parse::<u32>().ok());
        let line = shared.lines.iter().position(|line| number.is_some_and(|number| line.topic(number) == topic));
        let (Some(line), Some(number)) = (line, number) else { return self.wrong(topic, text) };
        let published = shared.lines[line].published.load(Ordering::Relaxed);
        if number >= published || text != payload(number) {
            return self.wrong(topic, text);
        }
        shared.distinct.fetch_add(self.known[line].insert(number).into(), Ordering::Relaxed);
        shared.arrived.lock().unwrap().push(shared.event(line, number));
    }

    fn wrong(&self, topic: &str, text: &str) {
        self.shared.wrong.lock().unwrap().push(format!("{topic}: {text:?}"));
    }
}
