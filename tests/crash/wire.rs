//! One client's connection, written by hand from the packet formats of MQTT 3.1.1 and 5.0: nothing of it is the
//! gateway's code.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::PATIENCE;
use crate::packets::{Packets, put_text, varint};

/// How long a client waits for a packet before it looks around.
const TICK: Duration = Duration::from_millis(20);
/// How long a server may take to answer CONNECT.
const ANSWER: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V3_1_1,
    V5,
}

pub struct Wire {
    packets: Packets,
    version: Version,
}

/// A PUBLISH that came.
pub struct Published {
    pub topic: String,
    pub qos: u8,
    pub packet_id: u16,
    pub user_properties: Vec<(String, String)>,
    pub payload: Vec<u8>,
}

impl Wire {
    /// Connects with a lasting session; also tells whether the server still had it (§3.1, §3.2 of both).
    pub fn connect(address: SocketAddr, client_id: &str, version: Version) -> io::Result<(Self, bool)> {
        let stream = TcpStream::connect_timeout(&address, ANSWER)?;
        let mut wire = Self { packets: Packets::on(stream, TICK)?, version };
        let mut body = b"\0\x04MQTT".to_vec();
        match version {
            Version::V3_1_1 => body.extend(b"\x04\0\0\0"),
            // Session Expiry Interval: never.
            Version::V5 => body.extend(b"\x05\0\0\0\x05\x11\xff\xff\xff\xff"),
        }
        put_text(&mut body, client_id);
        wire.send(0x10, &body)?;
        let deadline = Instant::now() + ANSWER;
        while Instant::now() < deadline {
            if let Some((kind, body)) = wire.receive()? {
                assert_eq!((kind, body[1]), (0x20, 0), "the connection is refused");
                return Ok((wire, body[0] & 1 == 1));
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Connects again and again until it works.
    pub fn connect_in_time(address: SocketAddr, client_id: &str, version: Version) -> (Self, bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::connect(address, client_id, version) {
                Ok(connected) => return connected,
                Err(error) => assert!(Instant::now() < deadline, "{client_id} cannot connect: {error}"),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn send(&mut self, first: u8, body: &[u8]) -> io::Result<()> {
        self.packets.send(first, body)
    }

    pub fn acknowledge(&mut self, first: u8, packet_id: u16) -> io::Result<()> {
        self.send(first, &packet_id.to_be_bytes())
    }

    pub fn publish(&mut self, flags: u8, topic: &str, packet_id: u16, payload: &[u8]) -> io::Result<()> {
        let mut body = Vec::with_capacity(topic.len() + payload.len() + 4);
        put_text(&mut body, topic);
        body.extend(packet_id.to_be_bytes());
        body.extend(payload);
        self.send(0x30 | flags, &body)
    }

    pub fn subscribe(&mut self, filter: &str) -> io::Result<()> {
        let mut body = b"\0\x01".to_vec();
        body.extend(if self.version == Version::V5 { &b"\0"[..] } else { b"" });
        put_text(&mut body, filter);
        body.push(2);
        self.send(0x82, &body)
    }

    /// The next packet, first byte and body; `None` where none comes for a moment.
    pub fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        self.packets.receive()
    }

    /// The next packet, which comes in time.
    pub fn until_any(&mut self) -> (u8, Vec<u8>) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(packet) = self.receive().unwrap() {
                return packet;
            }
            assert!(Instant::now() < deadline, "nothing comes");
        }
    }

    /// The next packet, which is of this kind.
    pub fn until(&mut self, kind: u8) {
        let (found, _) = self.until_any();
        assert_eq!(found, kind, "another packet comes");
    }

    /// Takes a PUBLISH of QoS 1 or 2 apart.
    pub fn published(&self, first: u8, body: &[u8]) -> Published {
        let topic_end = 2 + usize::from(packet_id(body));
        let mut payload = topic_end + 2;
        let mut user_properties = Vec::new();
        if self.version == Version::V5 {
            let (length, used) = varint(&body[payload..]).expect("whole");
            let end = payload + used + length;
            user_properties = parse_user_properties(&body[payload + used..end]);
            payload = end;
        }
        Published {
            topic: String::from_utf8(body[2..topic_end].to_vec()).expect("UTF-8"),
            qos: first >> 1 & 3,
            packet_id: packet_id(&body[topic_end..]),
            user_properties,
            payload: body[payload..].to_vec(),
        }
    }
}

pub fn packet_id(body: &[u8]) -> u16 {
    u16::from_be_bytes([body[0], body[1]])
}

/// The user properties among those of a PUBLISH (MQTT 5.0 §3.3.2.3).
fn parse_user_properties(mut bytes: &[u8]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    while let Some((&kind, rest)) = bytes.split_first() {
        bytes = rest;
        let mut text = || {
            let (text, rest) = bytes[2..].split_at(usize::from(packet_id(bytes)));
            bytes = rest;
            String::from_utf8_lossy(text).into_owned()
        };
        match kind {
            0x26 => found.push((text(), text())),
            0x03 | 0x08 | 0x09 => _ = text(),
            0x01 => bytes = &bytes[1..],
            0x02 => bytes = &bytes[4..],
            0x0b => bytes = &bytes[varint(bytes).expect("whole").1..],
            0x23 => bytes = &bytes[2..],
            _ => panic!("a PUBLISH has no property {kind:#x}"),
        }
    }
    found
}
