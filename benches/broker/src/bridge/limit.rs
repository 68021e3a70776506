//! How fast an upstream takes messages from somebody whom they cost nothing: what any bridge into it is limited by.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use super::measure::PAYLOAD;
use crate::client::{self, Stamp, put_publish};

/// One more would use a packet identifier again that may be in use.
pub const LARGEST_WINDOW: u64 = 65_535;
const PUBACK_BYTES: u64 = 4;

/// Messages a second at QoS 1, in MQTT 3.1.1, with no more than `window` of them unacknowledged. They are encoded
/// beforehand, written as far as the window and the socket allow, and their acknowledgements only counted.
pub fn messages_per_second(upstream: SocketAddr, window: u64, messages: u64) -> f64 {
    let mut packets = Vec::new();
    for sequence in 0..LARGEST_WINDOW {
        let stamp = Stamp { publisher: u32::MAX - 2, sequence, sent_nanos: 0 };
        put_publish(&mut packets, "bench/0", 1, sequence as u16 + 1, PAYLOAD, stamp);
    }
    let size = packets.len() as u64 / LARGEST_WINDOW;
    let stream = client::connect(upstream, "limit").expect("the upstream accepts");
    stream.set_nonblocking(true).expect("a socket");
    let mut stream = TcpStream::from_std(stream);
    let mut poll = Poll::new().expect("a poll");
    poll.registry().register(&mut stream, Token(0), Interest::WRITABLE).expect("a registration");
    let mut events = Events::with_capacity(4);
    let mut input = vec![0; 64 << 10];
    // Bytes of all PUBLISHes and of all PUBACKs.
    let (mut sent, mut received) = (0, 0);
    let started = Instant::now();
    while received < messages * PUBACK_BYTES {
        let acknowledged = received / PUBACK_BYTES;
        let allowed = (acknowledged + window).min(messages) * size;
        let room = allowed - sent;
        // As few writes as keep the upstream busy.
        let may_write = room > 0 && (room >= window * size / 4 || allowed == messages * size);
        if may_write {
            let at = (sent % packets.len() as u64) as usize;
            let end = packets.len().min(at + room as usize);
            let wrote = moved(stream.write(&packets[at..end]));
            sent += wrote;
            if wrote == 0 {
                poll.poll(&mut events, Some(Duration::from_secs(10))).expect("a poll");
                assert!(!events.is_empty(), "the upstream reads nothing");
                received += moved(stream.read(&mut input));
            }
        } else {
            // Whoever sleeps has to be woken by the upstream, which costs it as much as the message.
            received += moved(stream.read(&mut input));
        }
    }
    messages as f64 / started.elapsed().as_secs_f64()
}

fn moved(result: std::io::Result<usize>) -> u64 {
    match result {
        Ok(0) => panic!("the upstream closed the connection"),
        Ok(bytes) => bytes as u64,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("the upstream broke the connection: {error}"),
    }
}
