//! The fastest upstream there could be: reads, acknowledges at once, forgets. MQTT 3.1.1 and 5.0. Or one that is just as
//! fast and far away.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::client::{CONNECT, Frames, PINGREQ, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, put_ack};

/// An upstream that nothing can be slower than. Ends when dropped.
pub struct Sink {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    ends: AtomicBool,
    seen: Mutex<Seen>,
    changed: Condvar,
}

/// What has come so far, on all connections together.
#[derive(Clone, Default)]
pub struct Seen {
    pub accepted_at: Option<Instant>,
    pub first_at: Option<Instant>,
    pub last_at: Option<Instant>,
    /// Distinct ones; of QoS 2 once they are released.
    pub messages: u64,
    /// Ones that came again or after a later one of their publisher.
    pub reordered: u64,
    /// Ones that had not come when a later one of their publisher did.
    pub skipped: u64,
    /// From the publisher's stamp to the read here, in nanoseconds; of messages that have one.
    pub latencies: Vec<u64>,
    next: HashMap<u32, u64>,
    unreleased: HashSet<u16>,
}

impl Sink {
    /// Listens from now on, and takes messages up to `maximum_qos`. `base` is when their stamps began to count.
    pub fn listen(address: SocketAddr, maximum_qos: u8, base: Instant) -> Self {
        Self::listen_far(address, maximum_qos, base, Duration::ZERO)
    }

    /// The same, at the end of a line on which an answer takes `away`.
    pub fn listen_far(address: SocketAddr, maximum_qos: u8, base: Instant, away: Duration) -> Self {
        let listener = TcpListener::bind(address).expect("the sink listens");
        let shared = Arc::<Shared>::default();
        let thread = {
            let shared = shared.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let stream = stream.expect("a connection");
                    if shared.ends.load(Ordering::Acquire) {
                        return;
                    }
                    shared.seen.lock().expect("no panic").accepted_at.get_or_insert_with(Instant::now);
                    serve(stream, maximum_qos, &shared, base, away);
                }
            })
        };
        Self { address, shared, thread: Some(thread) }
    }

    /// Waits until `messages` have come, or none has for `patience`.
    pub fn wait(&self, messages: u64, patience: Duration) -> Seen {
        let mut seen = self.shared.seen.lock().expect("no panic");
        while seen.messages < messages {
            let before = seen.messages;
            let (again, waited) = self.shared.changed.wait_timeout(seen, patience).expect("no panic");
            seen = again;
            if waited.timed_out() && seen.messages == before {
                break;
            }
        }
        seen.clone()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        // Wakes the listener; a connection that is being served ends with its broker.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, maximum_qos: u8, shared: &Shared, base: Instant, away: Duration) {
    stream.set_nodelay(true).expect("a socket");
    stream.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket");
    let far = (!away.is_zero()).then(|| answer_later(&stream, away));
    let (mut frames, mut out, mut is_v5) = (Frames::default(), Vec::new(), false);
    loop {
        let mut seen = None;
        let read = frames.read(&mut stream, |frame| match frame.kind {
            PUBLISH => {
                let (id, stamp) = frame.publish(is_v5);
                match frame.qos {
                    1 => put_ack(&mut out, PUBACK, id),
                    2 => put_ack(&mut out, PUBREC, id),
                    _ => {}
                }
                let seen = seen.get_or_insert_with(|| shared.seen.lock().expect("no panic"));
                if stamp.sent_nanos > 0 {
                    seen.latencies.push(base.elapsed().as_nanos() as u64 - stamp.sent_nanos);
                }
                let next = seen.next.entry(stamp.publisher).or_default();
                let (skipped, again) = (stamp.sequence.saturating_sub(*next), stamp.sequence < *next);
                *next = (*next).max(stamp.sequence + 1);
                seen.skipped += skipped;
                seen.reordered += u64::from(again);
                if !again && frame.qos == 2 {
                    seen.unreleased.insert(id);
                } else {
                    seen.messages += u64::from(!again);
                }
            }
            PUBREL => {
                put_ack(&mut out, PUBCOMP, frame.id());
                // Mosquitto's bridge releases some twice.
                let seen = seen.get_or_insert_with(|| shared.seen.lock().expect("no panic"));
                seen.messages += u64::from(seen.unreleased.remove(&frame.id()));
            }
            CONNECT => {
                // Mosquitto's bridges set the highest bit of the version.
                is_v5 = frame.body[6] & 0x7f == 5;
                match (is_v5, maximum_qos) {
                    (true, 2) => out.extend([0x20, 3, 0, 0, 0]),
                    (true, _) => out.extend([0x20, 5, 0, 0, 2, 0x24, maximum_qos]),
                    (false, _) => out.extend([0x20, 2, 0, 0]),
                }
            }
            PINGREQ => out.extend([0xd0, 0]),
            _ => {}
        });
        if let Some(mut seen) = seen {
            let now = Instant::now();
            seen.first_at.get_or_insert(now);
            seen.last_at = Some(now);
            drop(seen);
            shared.changed.notify_all();
        }
        match read {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && !shared.ends.load(Ordering::Acquire) => {}
            Err(_) => return,
        }
        match &far {
            Some(_) if out.is_empty() => {}
            Some(far) => _ = far.send((Instant::now(), out.clone())),
            None if stream.write_all(&out).is_err() => return,
            None => {}
        }
        out.clear();
    }
}

/// Takes answers with the time they were given, and writes them when they have come so far.
fn answer_later(stream: &TcpStream, away: Duration) -> mpsc::Sender<(Instant, Vec<u8>)> {
    let mut stream = stream.try_clone().expect("a second handle");
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        while let Ok((given, answer)) = receiver.recv() {
            thread::sleep((given + away).saturating_duration_since(Instant::now()));
            if stream.write_all(&answer).is_err() {
                return;
            }
        }
    });
    sender
}
