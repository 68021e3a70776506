//! Just enough MQTT 3.1.1 to load a broker: frames in, frames out, nothing checked that the load does not need.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub const PAYLOAD: usize = 100;

pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const PUBREC: u8 = 5;
pub const PUBREL: u8 = 6;
pub const PUBCOMP: u8 = 7;

/// Connects with a clean session and no keep alive limit that matters.
pub fn connect(address: SocketAddr, client_id: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let length = 12 + client_id.len();
    let mut packet = vec![0x10, length as u8, 0, 4];
    packet.extend(b"MQTT\x04\x02");
    packet.extend(600u16.to_be_bytes());
    packet.extend((client_id.len() as u16).to_be_bytes());
    packet.extend(client_id.as_bytes());
    stream.write_all(&packet)?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    if answer != [0x20, 2, 0, 0] {
        return Err(io::Error::other(format!("CONNACK {answer:?}")));
    }
    Ok(stream)
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

/// Appends a PUBLISH whose payload begins with `publisher`, `sequence` and `sent_nanos`.
pub fn put_publish(out: &mut Vec<u8>, topic: &str, qos: u8, id: u16, publisher: u32, sequence: u64, sent_nanos: u64) {
    let length = 2 + topic.len() + if qos > 0 { 2 } else { 0 } + PAYLOAD;
    out.push(0x30 | qos << 1);
    put_length(out, length);
    out.extend((topic.len() as u16).to_be_bytes());
    out.extend(topic.as_bytes());
    if qos > 0 {
        out.extend(id.to_be_bytes());
    }
    let start = out.len();
    out.extend(publisher.to_be_bytes());
    out.extend(sequence.to_be_bytes());
    out.extend(sent_nanos.to_be_bytes());
    out.resize(start + PAYLOAD, b'x');
}

fn put_length(out: &mut Vec<u8>, mut length: usize) {
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

    /// A PUBLISH's packet identifier, publisher, sequence and time.
    pub fn publish(&self) -> (u16, u32, u64, u64) {
        let topic = 2 + usize::from(u16::from_be_bytes([self.body[0], self.body[1]]));
        let (id, payload) = if self.qos > 0 {
            (u16::from_be_bytes([self.body[topic], self.body[topic + 1]]), &self.body[topic + 2..])
        } else {
            (0, &self.body[topic..])
        };
        let long = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().expect("eight bytes"));
        (id, u32::from_be_bytes(payload[..4].try_into().expect("four bytes")), long(4), long(12))
    }
}

/// Bytes that have arrived and are not yet a whole packet.
#[derive(Default)]
pub struct Frames {
    buffer: Vec<u8>,
}

impl Frames {
    /// Reads once and hands over every whole packet. Returns how many bytes came; zero is the end.
    pub fn read(&mut self, stream: &mut impl Read, mut each: impl FnMut(Frame<'_>)) -> io::Result<usize> {
        const CHUNK: usize = 128 << 10;
        let start = self.buffer.len();
        self.buffer.resize(start + CHUNK, 0);
        let read = match stream.read(&mut self.buffer[start..]) {
            Ok(read) => read,
            Err(error) => {
                self.buffer.truncate(start);
                return Err(error);
            }
        };
        self.buffer.truncate(start + read);
        let mut at = 0;
        while let Some((frame, next)) = split(&self.buffer, at) {
            each(frame);
            at = next;
        }
        self.buffer.drain(..at);
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
