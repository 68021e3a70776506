//! One client's connection, written by hand from the packet formats of MQTT 3.1.1 and 5.0: nothing of it is the
//! gateway's code.

use std::io;
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use crate::PATIENCE;
use crate::packets::{Packets, put_text, varint};

/// How long to wait for a packet before the next look at the clock.
const TICK: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V3_1_1,
    V5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    Clean,
    Lasting,
}

pub struct Client {
    packets: Packets,
    version: Version,
    next_id: u16,
    /// The payloads of the messages that came, in order.
    pub heard: Vec<String>,
}

/// What became of something that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The acknowledgement's reason code; 0 where it has none.
    Reason(u8),
    Closed,
    /// Nothing for as long as the question may take.
    Silence,
}

impl Answer {
    /// No more and no less than that it is kept.
    pub const KEPT: Self = Self::Reason(0);
    /// Quota exceeded.
    pub const REFUSED: Self = Self::Reason(0x97);
}

impl Client {
    /// Connects; the reason code of the CONNACK where it is refused.
    pub fn try_connect(port: u16, id: &str, version: Version, session: Session) -> io::Result<Result<Self, u8>> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        let packets = Packets::on(stream, TICK)?;
        let mut client = Self { packets, version, next_id: 1, heard: Vec::new() };
        let clean = u8::from(session == Session::Clean) << 1;
        let mut body = b"\0\x04MQTT".to_vec();
        match (version, session) {
            (Version::V3_1_1, _) => body.extend([4, clean, 0, 0]),
            (Version::V5, Session::Clean) => body.extend([5, clean, 0, 0, 0]),
            // Session Expiry Interval: never.
            (Version::V5, Session::Lasting) => body.extend(b"\x05\0\0\0\x05\x11\xff\xff\xff\xff"),
        }
        put_text(&mut body, id);
        client.send(0x10, &body)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some((0x20, body)) = client.receive()? {
                return Ok(if body[1] == 0 { Ok(client) } else { Err(body[1]) });
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    #[track_caller]
    pub fn connect(port: u16, id: &str, version: Version, session: Session) -> Self {
        Self::try_connect(port, id, version, session).unwrap().expect("the connection is accepted")
    }

    /// Publishes and waits for the first answer, which for QoS 2 is PUBREC; a success is followed by the rest.
    pub fn publish(&mut self, qos: u8, topic: &str, payload: &str) -> Answer {
        let id = self.next_id;
        self.next_id += 1;
        self.publish_as(id, qos, topic, payload)
    }

    /// As [`Client::publish`], under a packet identifier of the caller's choice.
    pub fn publish_as(&mut self, id: u16, qos: u8, topic: &str, payload: &str) -> Answer {
        if self.begin_publish(id, qos, topic, payload).is_err() {
            return Answer::Closed;
        }
        match qos {
            0 => Answer::KEPT,
            1 => self.answer(0x40, id),
            _ => match self.answer(0x50, id) {
                Answer::KEPT => {
                    if self.send(0x62, &id.to_be_bytes()).is_err() {
                        return Answer::Closed;
                    }
                    self.answer(0x70, id)
                }
                other => other,
            },
        }
    }

    /// Sends a PUBLISH and waits for nothing.
    pub fn begin_publish(&mut self, id: u16, qos: u8, topic: &str, payload: &str) -> io::Result<()> {
        self.begin(id, qos, false, topic, payload)
    }

    fn begin(&mut self, id: u16, qos: u8, dup: bool, topic: &str, payload: &str) -> io::Result<()> {
        let mut body = Vec::new();
        put_text(&mut body, topic);
        if qos > 0 {
            body.extend(id.to_be_bytes());
        }
        if self.version == Version::V5 {
            body.push(0);
        }
        body.extend(payload.as_bytes());
        self.send(0x30 | qos << 1 | u8::from(dup) << 3, &body)
    }

    pub fn subscribe(&mut self, filter: &str, qos: u8) -> Answer {
        let id = self.next_id;
        self.next_id += 1;
        let mut body = id.to_be_bytes().to_vec();
        if self.version == Version::V5 {
            body.push(0);
        }
        put_text(&mut body, filter);
        body.push(qos);
        if self.send(0x82, &body).is_err() {
            return Answer::Closed;
        }
        match self.answer(0x90, id) {
            Answer::Reason(granted) if granted == qos => Answer::KEPT,
            other => other,
        }
    }

    /// Publishes at QoS 2, many at a time, and takes those answers that come before `last` is decided or the connection ends.
    /// Returns the numbers that were taken, and whether the connection is still there.
    pub fn publish_many(&mut self, numbers: &[u32], dup: bool) -> (Vec<u32>, bool) {
        let mut taken = Vec::new();
        let mut open: Vec<u32> = numbers.to_vec();
        for (at, &number) in numbers.iter().enumerate() {
            if self.begin(id_of(number), 2, dup, "keep/it", &format!("{number} ")).is_err() {
                return (taken, false);
            }
            if at == 0 {
                // The others come while the disk is busy with it.
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        let deadline = Instant::now() + PATIENCE;
        while !open.is_empty() && Instant::now() < deadline {
            match self.receive() {
                Ok(Some((0x50, body))) => {
                    let id = u16::from_be_bytes([body[0], body[1]]);
                    if body.get(2).is_some_and(|reason| *reason >= 0x80) {
                        open.retain(|&number| id_of(number) != id);
                    } else {
                        taken.extend(numbers.iter().copied().find(|&number| id_of(number) == id));
                        if self.send(0x62, &body[..2]).is_err() {
                            return (taken, false);
                        }
                    }
                }
                Ok(Some((0x70, body))) => {
                    open.retain(|&number| id_of(number).to_be_bytes() != body[..2]);
                }
                Ok(Some((0xe0, _))) | Err(_) => return (taken, false),
                Ok(_) => {}
            }
        }
        (taken, true)
    }

    /// Waits for the acknowledgement of one kind with this identifier. Messages that come meanwhile are taken.
    pub fn answer(&mut self, kind: u8, id: u16) -> Answer {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            match self.receive() {
                Ok(Some((first, body))) if first & 0xf0 == kind && body[..2] == id.to_be_bytes() => {
                    // SUBACK has properties in 5.0, and one reason code at its end.
                    let reason = if kind == 0x90 { body.last() } else { body.get(2) };
                    return Answer::Reason(reason.copied().unwrap_or(0));
                }
                Ok(Some((0xe0, _))) | Err(_) => return Answer::Closed,
                Ok(_) => {}
            }
        }
        Answer::Silence
    }

    /// Takes messages until `enough` says so.
    #[track_caller]
    pub fn hear_until(&mut self, enough: impl Fn(&[String]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !enough(&self.heard) {
            assert!(Instant::now() < deadline, "heard {} messages: {:?}", self.heard.len(), brief(&self.heard));
            self.receive().expect("the connection stays");
        }
    }

    fn send(&mut self, first: u8, body: &[u8]) -> io::Result<()> {
        self.packets.send(first, body)
    }

    /// The next packet, first byte and body; `None` where none comes for a moment. A PUBLISH is acknowledged.
    fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        let Some(packet) = self.packets.receive()? else { return Ok(None) };
        let (first, body) = &packet;
        match first & 0xf0 {
            0x30 => self.take_publish(*first, body)?,
            0x60 => self.send(0x70, &body[..2])?,
            _ => {}
        }
        Ok(Some(packet))
    }

    fn take_publish(&mut self, first: u8, body: &[u8]) -> io::Result<()> {
        let qos = first >> 1 & 3;
        let mut at = 2 + usize::from(u16::from_be_bytes([body[0], body[1]]));
        let (id, rest) = body[at..].split_at(if qos > 0 { 2 } else { 0 });
        at = body.len() - rest.len();
        if self.version == Version::V5 {
            let (length, used) = varint(&body[at..]).expect("whole");
            at += used + length;
        }
        self.heard.push(String::from_utf8_lossy(&body[at..]).into_owned());
        match qos {
            0 => Ok(()),
            1 => self.send(0x40, id),
            _ => self.send(0x50, id),
        }
    }
}

/// The packet identifier under which [`Client::publish_many`] sends a number.
fn id_of(number: u32) -> u16 {
    u16::try_from(number % 60_000).expect("small") + 1
}

/// The beginnings of messages, to be looked at.
pub fn brief(messages: &[String]) -> Vec<&str> {
    messages.iter().map(|message| message.split(' ').next().unwrap_or_default()).collect()
}
