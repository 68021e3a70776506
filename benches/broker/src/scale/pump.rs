//! One publisher with a window of unacknowledged messages, and one receiver that counts.

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::client::{self, Frames, PUBACK, PUBLISH, put_ack};

/// A disk that others use too may take seconds for what an acknowledgement waits for.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(60);
/// A receiver that hears nothing for so long has what it gets.
const PATIENCE: Duration = Duration::from_secs(3);

/// Publishes at QoS 1 until `next`, which appends one PUBLISH with the given number and packet identifier, says that it
/// has no more. Returns how many were acknowledged, which is all of them.
pub fn publish(
    address: SocketAddr,
    client_id: &str,
    window: u64,
    mut next: impl FnMut(&mut Vec<u8>, u64, u16) -> bool,
) -> u64 {
    let mut stream = client::connect(address, client_id).expect("a publisher connects");
    stream.set_read_timeout(Some(ACKNOWLEDGED_WITHIN)).expect("a socket");
    let (mut out, mut frames) = (Vec::with_capacity(64 << 10), Frames::default());
    let (mut sent, mut done, mut more) = (0, 0, true);
    while more || done < sent {
        while more && out.len() < 32 << 10 && sent - done < window {
            more = next(&mut out, sent, (sent % 65_535) as u16 + 1);
            sent += u64::from(more);
        }
        stream.write_all(&out).expect("the broker reads");
        out.clear();
        if done < sent {
            let read = frames.read(&mut stream, |frame| done += u64::from(frame.kind == PUBACK));
            assert!(read.expect("the broker answers") > 0, "the broker closed a publisher");
        }
    }
    let _ = stream.write_all(&[0xe0, 0]);
    done
}

/// Receives and acknowledges up to `expected` messages; how many came, and how long until the last of them.
pub fn receive(stream: &mut TcpStream, expected: u64) -> (u64, Duration) {
    let started = Instant::now();
    let (mut frames, mut out, mut received, mut last) = (Frames::default(), Vec::new(), 0, started);
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    while received < expected {
        let before = received;
        let read = frames.read(stream, |frame| {
            if frame.kind == PUBLISH {
                received += 1;
                if frame.qos == 1 {
                    put_ack(&mut out, PUBACK, frame.id_of_publish());
                }
            }
        });
        match read {
            Ok(0) => panic!("the broker closed a subscriber"),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(error) => panic!("a subscriber cannot read: {error}"),
        }
        if received > before {
            last = Instant::now();
        }
        stream.write_all(&out).expect("the broker reads");
        out.clear();
    }
    (received, last - started)
}

/// Makes a session that is kept, with one subscription at QoS 1, and leaves it.
pub fn leave_session(address: SocketAddr, client_id: &str, filter: &str) -> io::Result<()> {
    let mut stream = client::attach(address, client_id, client::Session::Kept)?;
    client::subscribe(&mut stream, filter, 1)?;
    client::leave(stream);
    Ok(())
}
