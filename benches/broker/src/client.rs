//! Just enough MQTT 3.1.1 to load a broker: frames in, frames out, nothing checked that the load does not need.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub const CONNECT: u8 = 1;
pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const PUBREC: u8 = 5;
pub const PUBREL: u8 = 6;
pub const PUBCOMP: u8 = 7;
pub const PINGREQ: u8 = 12;

/// Whether a session ends with its connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Session {
    Clean,
    Kept,
}

/// Connects with a clean session.
pub fn connect(address: SocketAddr, client_id: &str) -> io::Result<TcpStream> {
    attach(address, client_id, Session::Clean)
}

/// Ends a connection in good order.
pub fn leave(mut stream: TcpStream) {
    let _ = stream.write_all(&[0xe0, 0]);
    // The broker closes once it knows that the client is gone.
    let _ = io::copy(&mut stream, &mut io::sink());
}

pub fn attach(address: SocketAddr, client_id: &str, session: Session) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    log_in(&mut stream, client_id, session)?;
    Ok(stream)
}

/// CONNECT with no keep alive limit that matters, and its answer.
pub fn log_in(stream: &mut (impl Read + Write), client_id: &str, session: Session) -> io::Result<()> {
    let length = 12 + client_id.len();
    let mut packet = vec![0x10, length as u8, 0, 4];
    packet.extend(b"MQTT\x04");
    packet.push(if session == Session::Clean { 2 } else { 0 });
    packet.extend(600u16.to_be_bytes());
    packet.extend((client_id.len() as u16).to_be_bytes());
    packet.extend(client_id.as_bytes());
    stream.write_all(&packet)?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    if answer[0] != 0x20 || answer[3] != 0 {
        return Err(io::Error::other(format!("CONNACK {answer:?}")));
    }
    Ok(())
}

pub fn subscribe(stream: &mut TcpStream, filter: &str, qos: u8) -> io::Result<()> {
    let mut packet = vec![0x82, (5 + filter.len()) as u8, 0, 1];
    packet.extend((filter.len() as u16).to_be_bytes());
    packet.extend(filter.as_bytes());
    packet.push(qos);
    stream.write_all(&packet)?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)?;
    if answer[0] != 0x90 || answer[4] > 2 {
        return Err(io::Error::other(format!("SUBACK {answer:?}")));
    }
    Ok(())
}

/// What a payload begins with.
#[derive(Clone, Copy)]
pub struct Stamp {
    pub publisher: u32,
    pub sequence: u64,
    pub sent_nanos: u64,
}

/// Appends a PUBLISH with `payload` bytes, which begin with `stamp`.
pub fn put_publish(out: &mut Vec<u8>, topic: &str, qos: u8, id: u16, payload: usize, stamp: Stamp) {
    let length = 2 + topic.len() + if qos > 0 { 2 } else { 0 } + payload;
    out.push(0x30 | qos << 1);
    put_length(out, length);
    out.extend((topic.len() as u16).to_be_bytes());
    out.extend(topic.as_bytes());
    if qos > 0 {
        out.extend(id.to_be_bytes());
    }
    let start = out.len();
    out.extend(stamp.publisher.to_be_bytes());
    out.extend(stamp.sequence.to_be_bytes());
    out.extend(stamp.sent_nanos.to_be_bytes());
    out.resize(start + payload, b'x');
}

pub fn put_length(out: &mut Vec<u8>, mut length: usize) {
    loop {
        let byte = (length & 0x7f) as u8;
        length >>= 7;
        out.push(byte | if length > 0 { 0x80 } else { 0 });
        if length == 0 {
            return;
        }
    }
}

/// Appends an acknowledgement; PUBREL has its reserved bit.
pub fn put_ack(out: &mut Vec<u8>, kind: u8, id: u16) {
    out.extend([kind << 4 | if kind == PUBREL { 2 } else { 0 }, 2]);
    out.extend(id.to_be_bytes());
}

/// One packet: its kind, flags and body.
pub struct Frame<'a> {
    pub kind: u8,
    pub qos: u8,
    pub body: &'a [u8],
}

impl Frame<'_> {
    pub fn id(&self) -> u16 {
        u16::from_be_bytes([self.body[0], self.body[1]])
    }

    /// The packet identifier of a PUBLISH at QoS 1 or 2.
    pub fn id_of_publish(&self) -> u16 {
        let topic = 2 + usize::from(u16::from_be_bytes([self.body[0], self.body[1]]));
        u16::from_be_bytes([self.body[topic], self.body[topic + 1]])
    }

    /// A PUBLISH's packet identifier and the rest of it. In 5.0 the properties stand before the payload, with one byte
    /// for their length as long as they are few.
    pub fn publish(&self, is_v5: bool) -> (u16, Stamp) {
        let topic = 2 + usize::from(u16::from_be_bytes([self.body[0], self.body[1]]));
        let (id, mut rest) = if self.qos > 0 {
            (u16::from_be_bytes([self.body[topic], self.body[topic + 1]]), &self.body[topic + 2..])
        } else {
            (0, &self.body[topic..])
        };
        if is_v5 {
            assert!(rest[0] < 0x80, "properties of more than 127 bytes");
            rest = &rest[1 + usize::from(rest[0])..];
        }
        let long = |at: usize| u64::from_be_bytes(rest[at..at + 8].try_into().expect("eight bytes"));
        let publisher = u32::from_be_bytes(rest[..4].try_into().expect("four bytes"));
        (id, Stamp { publisher, sequence: long(4), sent_nanos: long(12) })
    }
}

/// Bytes that have arrived and are not yet a whole packet.
#[derive(Default)]
pub struct Frames {
    buffer: Vec<u8>,
    filled: usize,
}

impl Frames {
    /// Reads once and hands over every whole packet. Returns how many bytes came; zero is the end.
    pub fn read(&mut self, stream: &mut impl Read, mut each: impl FnMut(Frame<'_>)) -> io::Result<usize> {
        const CHUNK: usize = 128 << 10;
        let start = self.filled;
        if self.buffer.len() < start + CHUNK {
            self.buffer.resize(start + CHUNK, 0);
        }
        let read = stream.read(&mut self.buffer[start..])?;
        self.filled += read;
        let mut at = 0;
        while let Some((frame, next)) = split(&self.buffer[..self.filled], at) {
            each(frame);
            at = next;
        }
        self.buffer.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(read)
    }
}

fn split(buffer: &[u8], at: usize) -> Option<(Frame<'_>, usize)> {
    let first = *buffer.get(at)?;
    let (mut length, mut index) = (0, at + 1);
    for shift in [0, 7, 14, 21] {
        let byte = *buffer.get(index)?;
        index += 1;
        length |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            let body = buffer.get(index..index + length)?;
            return Some((Frame { kind: first >> 4, qos: first >> 1 & 3, body }, index + length));
        }
    }
    None
}
