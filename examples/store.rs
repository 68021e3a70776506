//! Durable intake of the store alone: messages per second, commits per second, bytes written per byte of message and
//! topic, the time to open what was written, and the rate at which it is read and removed again.
//!
//! `cargo run --release --example store -- DIRECTORY [MESSAGES] [IN_FLIGHT] [PAYLOAD_BYTES]`: keeps IN_FLIGHT messages
//! unacknowledged, as publishers at QoS 1 do while the uplink is down. The directory must not hold a store.

use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use fieldgate::clock::Clock;
use fieldgate::message::{Message, QoS};
use fieldgate::observe::{Metrics, Observe};
use fieldgate::signal::Signal;
use fieldgate::store::{
    Due, Op, PageLimit, Receipt, ReceiptState, SessionId, SessionRecord, Settings, Store, StoredState,
};
use fieldgate::topic::TopicName;

const SESSION: SessionId = SessionId(1);
const TOPICS: usize = 50;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or("give a directory that holds no store")?;
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (messages, in_flight, payload_bytes) = (number(1_000_000)?, number(1000)?, number(100)?);
    let settings = Settings { max_bytes: 16 << 30, ..Settings::new(directory) };
    let clock = Clock::start("bench");
    let store = Store::bind(settings.clone(), clock.clone())?.run()?;
    let topics: Result<Vec<_>, _> =
        (0..TOPICS).map(|number| TopicName::new(&format!("devices/meter-{number:03}/power"))).collect();
    let topics = topics?;
    store.submit(&mut vec![put_session()], Due::Now);

    let signal = Arc::new(Signal::default());
    let mut waiting: VecDeque<Arc<Receipt>> = VecDeque::new();
    let (mut bytes, mut seed) = (0, 1u64);
    let started = Instant::now();
    for sequence in 1..=messages {
        let payload: Vec<u8> = std::iter::repeat_with(|| noise(&mut seed)).take(payload_bytes).collect();
        let topic = topics[sequence % TOPICS].clone();
        let message = Arc::new(Message::new(topic, payload, QoS::AtLeastOnce, clock.now()));
        bytes += message.size();
        let receipt = Receipt::new(signal.clone());
        receipt.add();
        waiting.push_back(receipt.clone());
        let op = Op::Enqueue {
            session: SESSION,
            sequence: sequence as u64,
            qos: QoS::AtLeastOnce,
            retain: false,
            identifiers: None,
            shared: None,
            message,
            receipt: Some(receipt),
        };
        store.submit(&mut vec![op], Due::Now);
        while waiting.len() >= in_flight {
            settle(&mut waiting)?;
        }
    }
    while !waiting.is_empty() {
        settle(&mut waiting)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let commits = metric(&store, "fieldgate_store_commits_total");
    let written = metric(&store, "fieldgate_store_written_bytes_total");
    println!(
        "intake: {:.0} messages/s, {:.0} commits/s, {:.0} messages per commit, {:.2} bytes written per byte",
        messages as f64 / seconds,
        commits / seconds,
        messages as f64 / commits,
        written / bytes as f64,
    );
    store.close();

    let started = Instant::now();
    let mut opened = Store::bind(settings, clock)?;
    let queued = opened.sessions()?[0].queues[0];
    println!("open: {:.3} s, {} messages, {} bytes", started.elapsed().as_secs_f64(), queued.messages, queued.bytes);

    let store = opened.run()?;
    let started = Instant::now();
    let (mut from, mut read) = (0, 0);
    loop {
        let (sender, receiver) = mpsc::channel();
        let limit = PageLimit { messages: 1000, bytes: 1 << 20 };
        store.load(SESSION, from, limit, Box::new(move |page| drop(sender.send(page))));
        let page = receiver.recv()?;
        let messages = page.messages.unpack();
        read += messages.iter().filter(|message| matches!(message.state, StoredState::Queued(_))).count();
        store.submit(&mut messages.iter().map(|message| Op::remove(SESSION, message.sequence)).collect(), Due::Later);
        from = page.messages.last().map_or(from, |last| last + 1);
        if page.complete {
            break;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("drain: {:.0} messages/s read and removed, {read} messages", read as f64 / seconds);
    store.close();
    Ok(())
}

fn put_session() -> Op {
    Op::PutSession(Box::new(SessionRecord {
        id: SESSION,
        face: 0,
        client_id: "uplink".into(),
        user: None,
        expiry_interval: None,
        detached_at: None,
        will: None,
    }))
}

/// Takes receipts off that are done; waits for the oldest.
fn settle(waiting: &mut VecDeque<Arc<Receipt>>) -> Result<(), &'static str> {
    while let Some(oldest) = waiting.front() {
        match oldest.state() {
            ReceiptState::Done => waiting.pop_front(),
            ReceiptState::Failed => return Err("the store refused a message"),
            ReceiptState::Pending => break,
        };
    }
    if !waiting.is_empty() {
        std::thread::yield_now();
    }
    Ok(())
}

fn metric(store: &Store, name: &str) -> f64 {
    let mut metrics = Metrics::default();
    store.collect(&mut metrics);
    let text = metrics.render();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap_or(f64::NAN)
}

/// Payloads that do not compress, on a disk that might.
fn noise(seed: &mut u64) -> u8 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    (*seed >> 32) as u8
}
