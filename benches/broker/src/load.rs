//! The loads: throughput with loss and order checked, latency at a rate, memory of idle connections.

use std::collections::HashMap;
use std::fmt;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};

use crate::client::{self, Frames, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, Stamp, put_ack, put_publish};
use crate::process;

/// A receiver that hears nothing for so long after the publishers are done has lost the rest.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Clone, Copy)]
pub struct Load {
    pub qos: u8,
    pub publishers: u32,
    pub subscribers: u32,
    /// For each publisher, at most.
    pub messages: u64,
    /// How long they publish, at most.
    pub time: Duration,
    /// Publishers wait for the subscriber, of which there is one then, and not only for their acknowledgements: what
    /// they are ahead of it is their window.
    pub paced: bool,
    /// Unacknowledged QoS 1 and 2 messages of each publisher.
    pub window: u64,
    /// Bytes of payload of each message.
    pub payload: usize,
}

impl Load {
    /// With 100 bytes and 100 unacknowledged messages.
    pub fn new(qos: u8, publishers: u32, subscribers: u32, messages: u64) -> Self {
        Self { qos, publishers, subscribers, messages, time: Duration::MAX, paced: false, window: 100, payload: 100 }
    }

    /// As many as there are in that time.
    pub fn lasting(qos: u8, publishers: u32, subscribers: u32, time: Duration) -> Self {
        Self { time, ..Self::new(qos, publishers, subscribers, u64::MAX) }
    }
}

pub struct Throughput {
    pub received_per_second: f64,
    pub lost: u64,
    pub reordered: u64,
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} msg/s received, {} lost, {} reordered", self.received_per_second, self.lost, self.reordered)
    }
}

/// Every subscriber gets every message; the rate is that of all subscribers together.
pub fn throughput(address: SocketAddr, load: Load) -> Throughput {
    let mut streams = Vec::new();
    for index in 0..load.subscribers {
        let mut stream = client::connect(address, &format!("sub{index}")).expect("a subscriber connects");
        client::subscribe(&mut stream, "bench/+", load.qos).expect("a subscriber subscribes");
        streams.push(stream);
    }
    let expected = Arc::new(AtomicU64::new(u64::MAX));
    let heard: Arc<[AtomicU64]> = (0..load.publishers).map(|_| AtomicU64::new(0)).collect();
    let receiver = {
        let (expected, heard) = (expected.clone(), heard.clone());
        thread::spawn(move || {
            receive(streams, &expected, |stamp| _ = heard[stamp.publisher as usize].fetch_add(1, Ordering::Release))
        })
    };
    let started = Instant::now();
    let publishers: Vec<_> = (0..load.publishers)
        .map(|number| {
            let heard = heard.clone();
            let may_send =
                move |sent| !load.paced || sent - heard[number as usize].load(Ordering::Acquire) < load.window;
            thread::spawn(move || publish(address, number, &format!("bench/{number}"), load, may_send))
        })
        .collect();
    let sent: u64 = publishers.into_iter().map(|publisher| publisher.join().expect("a publisher ends")).sum();
    let sent = sent * u64::from(load.subscribers);
    expected.store(sent, Ordering::Release);
    let received = receiver.join().expect("the receiver ends");
    let seconds = received.last.duration_since(started).as_secs_f64();
    Throughput {
        received_per_second: received.messages as f64 / seconds,
        lost: sent.saturating_sub(received.messages),
        reordered: received.reordered,
    }
}

/// One publisher of a load; returns when all is acknowledged.
pub fn publish_to(address: SocketAddr, number: u32, topic: &str, load: Load) {
    publish(address, number, topic, load, |_| true);
}

/// Returns how many were sent, which are all acknowledged. `may_send` is asked with how many that were so far.
fn publish(address: SocketAddr, number: u32, topic: &str, load: Load, may_send: impl Fn(u64) -> bool) -> u64 {
    let mut stream = client::connect(address, &format!("pub{number}")).expect("a publisher connects");
    let mut out = Vec::with_capacity(64 << 10);
    let mut frames = Frames::default();
    let started = Instant::now();
    let (mut sent, mut done, mut most) = (0, 0, load.messages);
    while done < most {
        if most != sent && started.elapsed() >= load.time {
            most = sent;
        }
        while sent < most && out.len() < 32 << 10 && (load.qos == 0 || sent - done < load.window) && may_send(sent) {
            let id = (sent % 65_535) as u16 + 1;
            let stamp = Stamp { publisher: number, sequence: sent, sent_nanos: 0 };
            put_publish(&mut out, topic, load.qos, id, load.payload, stamp);
            sent += 1;
        }
        if out.is_empty() && done == sent {
            // All is acknowledged, and the subscriber is behind; or the time is over.
            thread::yield_now();
            continue;
        }
        stream.write_all(&out).expect("the broker reads");
        out.clear();
        if load.qos == 0 {
            done = sent;
            continue;
        }
        if sent < most && sent - done < load.window && may_send(sent) {
            continue;
        }
        let read = frames.read(&mut stream, |frame| match frame.kind {
            PUBACK | PUBCOMP => done += 1,
            PUBREC => put_ack(&mut out, PUBREL, frame.id()),
            _ => {}
        });
        assert!(read.expect("the broker answers") > 0, "the broker closed a publisher");
    }
    // What is in flight must not be cut off by the end of the connection.
    let _ = stream.write_all(&[0xe0, 0]);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = frames.read(&mut stream, |_| ());
    sent
}

struct Received {
    messages: u64,
    reordered: u64,
    last: Instant,
}

/// One thread for all subscribers, so that the load generator costs as little as it can. Ends when as many have come as
/// are expected, which is said when the publishers are done.
fn receive(streams: Vec<TcpStream>, expected: &AtomicU64, mut each: impl FnMut(Stamp)) -> Received {
    let mut poll = Poll::new().expect("a poll");
    let mut connections = Vec::new();
    for (index, stream) in streams.into_iter().enumerate() {
        stream.set_nonblocking(true).expect("a socket");
        let mut stream = mio::net::TcpStream::from_std(stream);
        poll.registry().register(&mut stream, Token(index), Interest::READABLE).expect("a registration");
        connections.push((stream, Frames::default(), HashMap::<u32, u64>::new()));
    }
    let mut events = Events::with_capacity(256);
    let mut received = Received { messages: 0, reordered: 0, last: Instant::now() };
    let mut out = Vec::new();
    while received.messages < expected.load(Ordering::Acquire) {
        poll.poll(&mut events, Some(Duration::from_millis(20))).expect("a poll");
        let is_known = expected.load(Ordering::Acquire) != u64::MAX;
        if events.is_empty() && is_known && received.last.elapsed() > PATIENCE {
            break;
        }
        for event in &events {
            let (stream, frames, next) = &mut connections[event.token().0];
            loop {
                let read = frames.read(stream, |frame| match frame.kind {
                    PUBLISH => {
                        let (id, stamp) = frame.publish(false);
                        each(stamp);
                        received.messages += 1;
                        let next = next.entry(stamp.publisher).or_insert(0);
                        received.reordered += u64::from(stamp.sequence < *next);
                        *next = stamp.sequence + 1;
                        match frame.qos {
                            1 => put_ack(&mut out, PUBACK, id),
                            2 => put_ack(&mut out, PUBREC, id),
                            _ => {}
                        }
                    }
                    PUBREL => put_ack(&mut out, PUBCOMP, frame.id()),
                    _ => {}
                });
                match read {
                    Ok(0) => panic!("the broker closed a subscriber"),
                    Ok(_) => received.last = Instant::now(),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("a subscriber cannot read: {error}"),
                }
                write_all(stream, &mut out);
            }
        }
    }
    received
}

fn write_all(stream: &mut mio::net::TcpStream, out: &mut Vec<u8>) {
    let mut at = 0;
    while at < out.len() {
        match stream.write(&out[at..]) {
            Ok(written) => at += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            Err(error) => panic!("a subscriber cannot write: {error}"),
        }
    }
    out.clear();
}

pub struct Latency {
    pub p50: Duration,
    pub p99: Duration,
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p50 {} µs, p99 {} µs", self.p50.as_micros(), self.p99.as_micros())
    }
}

/// QoS 1 from one publisher to one subscriber at `rate` messages a second, from the write to the receiver's read.
pub fn latency(address: SocketAddr, rate: u64, seconds: u64) -> Latency {
    let mut stream = client::connect(address, "sub").expect("a subscriber connects");
    client::subscribe(&mut stream, "bench/+", 1).expect("a subscriber subscribes");
    let base = Instant::now();
    let messages = rate * seconds;
    let receiver = thread::spawn(move || {
        let mut latencies = Vec::new();
        receive(vec![stream], &AtomicU64::new(messages), |stamp| {
            latencies.push(base.elapsed().as_nanos() as u64 - stamp.sent_nanos);
        });
        latencies
    });
    publish_at_rate(address, Trickle::new(rate, seconds), base);
    let mut latencies = receiver.join().expect("the receiver ends");
    Latency::of(&mut latencies)
}

impl Latency {
    /// `nanos` must not be empty; it is sorted.
    pub fn of(nanos: &mut [u64]) -> Self {
        nanos.sort_unstable();
        let at = |share: f64| Duration::from_nanos(nanos[((nanos.len() - 1) as f64 * share) as usize]);
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

/// One publisher that publishes at a steady rate.
#[derive(Clone, Copy)]
pub struct Trickle {
    /// Messages a second.
    pub rate: u64,
    pub seconds: u64,
    /// In turn.
    pub topics: u64,
    pub qos: u8,
    pub retain: bool,
}

impl Trickle {
    /// QoS 1, one topic, not retained.
    pub fn new(rate: u64, seconds: u64) -> Self {
        Self { rate, seconds, topics: 1, qos: 1, retain: false }
    }

    pub fn messages(self) -> u64 {
        self.rate * self.seconds
    }
}

/// Publishes messages of 100 bytes, stamped with the time since `base`; returns when all is acknowledged.
pub fn publish_at_rate(address: SocketAddr, trickle: Trickle, base: Instant) {
    let Trickle { rate, topics, qos, retain, .. } = trickle;
    let messages = trickle.messages();
    let mut stream = client::connect(address, "pub").expect("a publisher connects");
    let mut reader = stream.try_clone().expect("a second handle");
    let acknowledger = thread::spawn(move || {
        let expected = if qos > 0 { messages } else { 0 };
        let (mut frames, mut acknowledged) = (Frames::default(), 0);
        while acknowledged < expected {
            let read = frames.read(&mut reader, |frame| acknowledged += u64::from(frame.kind == PUBACK));
            assert!(read.expect("the broker answers") > 0, "the broker closed a publisher");
        }
    });
    let interval = Duration::from_secs(1) / rate as u32;
    let started = Instant::now();
    let mut out = Vec::new();
    for sequence in 0..messages {
        let due = started + interval * sequence as u32;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let stamp = Stamp { publisher: 0, sequence, sent_nanos: base.elapsed().as_nanos() as u64 };
        let topic = format!("bench/{}", sequence % topics);
        put_publish(&mut out, &topic, qos, (sequence % 65_535) as u16 + 1, 100, stamp);
        out[0] |= u8::from(retain);
        stream.write_all(&out).expect("the broker reads");
        out.clear();
    }
    acknowledger.join().expect("all is acknowledged");
}

/// What each of `connections` idle clients adds to the broker's memory, in KiB.
pub fn idle(address: SocketAddr, connections: u32, pid: u32) -> f64 {
    let before = process::rss_kib(pid);
    let streams: Vec<_> = (0..connections)
        .map(|number| client::connect(address, &format!("idle{number}")).expect("an idle client connects"))
        .collect();
    thread::sleep(Duration::from_secs(2));
    let after = process::rss_kib(pid);
    drop(streams);
    (after - before) as f64 / f64::from(connections)
}
