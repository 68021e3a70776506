//! Packets of MQTT on a connection, by hand from their format (3.1.1 and 5.0 §2.1): nothing of it is the gateway's code.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

pub struct Packets {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Packets {
    /// `tick` is how long [`Packets::receive`] waits before it looks around.
    pub fn on(stream: TcpStream, tick: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(tick))?;
        Ok(Self { stream, read: Vec::new() })
    }

    pub fn send(&mut self, first: u8, body: &[u8]) -> io::Result<()> {
        let mut packet = vec![first];
        let mut length = body.len();
        loop {
            packet.push((length % 128) as u8 | if length > 127 { 0x80 } else { 0 });
            length /= 128;
            if length == 0 {
                break;
            }
        }
        packet.extend(body);
        self.stream.write_all(&packet)
    }

    /// The next packet, first byte and body; `None` where none comes for a moment.
    pub fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            if let Some(packet) = self.take() {
                return Ok(Some(packet));
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.read.extend(&chunk[..count]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self) -> Option<(u8, Vec<u8>)> {
        let (length, used) = varint(self.read.get(1..)?)?;
        let start = 1 + used;
        let body = self.read.get(start..start + length)?.to_vec();
        let first = self.read[0];
        self.read.drain(..start + length);
        Some((first, body))
    }
}

pub fn put_text(body: &mut Vec<u8>, text: &str) {
    body.extend(u16::try_from(text.len()).expect("short").to_be_bytes());
    body.extend(text.as_bytes());
}

/// A variable byte integer and how many bytes it takes; `None` while it is not complete.
pub fn varint(bytes: &[u8]) -> Option<(usize, usize)> {
    let (mut value, mut at) = (0, 0);
    loop {
        let byte = *bytes.get(at)?;
        value |= usize::from(byte & 0x7f) << (7 * at);
        at += 1;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
}
