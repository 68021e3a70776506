//! Tests of the whole store: what was acknowledged is there after any end.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::message::{Message, QoS};
use crate::signal::Signal;
use crate::topic::TopicName;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

const S: SessionId = SessionId(1);

fn clock() -> Clock {
    Clock::start("test")
}

fn settings(directory: &Path) -> Settings {
    Settings::new(directory)
}

fn open(directory: &Path) -> Opened {
    Store::bind(settings(directory), clock()).unwrap()
}

fn start(directory: &Path) -> Store {
    open(directory).run().unwrap()
}

fn receipt() -> Arc<Receipt> {
    let receipt = Receipt::new(Arc::new(Signal::default()));
    receipt.add();
    receipt
}

/// Waits until the receipt is settled.
fn settled(receipt: &Receipt) -> ReceiptState {
    let deadline = Instant::now() + PATIENCE;
    while receipt.state() == ReceiptState::Pending {
        assert!(Instant::now() < deadline, "the receipt is never settled");
        std::thread::yield_now();
    }
    receipt.state()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} never happens");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn message(topic: &str, payload: impl Into<bytes::Bytes>) -> Arc<Message> {
    Arc::new(Message::new(TopicName::new(topic).unwrap(), payload, QoS::ExactlyOnce, UnixMillis(1_793_491_200_000)))
}

fn record(id: SessionId) -> SessionRecord {
    SessionRecord {
        id,
        face: 1,
        client_id: format!("client-{}", id.0).into(),
        user: None,
        expiry_interval: None,
        detached_at: None,
        will: None,
    }
}

fn put(id: SessionId) -> Op {
    Op::PutSession(Box::new(record(id)))
}

fn enqueue(session: SessionId, sequence: u64, message: Arc<Message>, receipt: Option<Arc<Receipt>>) -> Op {
    Op::Enqueue { session, sequence, qos: QoS::ExactlyOnce, retain: false, identifiers: None, message, receipt }
}

/// Submits and waits until all of it is on disk.
fn keep(store: &Store, mut ops: Vec<Op>) {
    let receipt = receipt();
    let session = SessionId(999_999);
    ops.push(Op::RemoveInbound { session, packet_id: 1, receipt: Some(receipt.clone()) });
    store.submit(&mut ops, Due::Now);
    assert_eq!(settled(&receipt), ReceiptState::Done);
}

fn load(store: &Store, session: SessionId, from: u64, messages: usize, bytes: usize) -> Page {
    let (sender, receiver) = mpsc::channel();
    let then = move |page| sender.send(page).unwrap();
    store.load(session, from, PageLimit { messages, bytes }, Box::new(then));
    receiver.recv_timeout(PATIENCE).unwrap()
}

fn sequences(store: &Store, session: SessionId) -> Vec<u64> {
    let page = load(store, session, 0, usize::MAX, usize::MAX);
    assert!(page.complete && !page.failed);
    page.messages.iter().map(|message| message.sequence).collect()
}

#[test]
fn everything_comes_back_after_a_restart() {
    let directory = TempDir::new().unwrap();
    let mut full = record(S);
    full.user = Some("operator".into());
    full.expiry_interval = Some(Duration::from_secs(60));
    full.detached_at = Some(UnixMillis(5));
    let mut will = (*message("will", "gone")).clone();
    will.retain = true;
    full.will = Some(Box::new(WillRecord { message: will, delay: Duration::from_secs(3) }));
    let subscription = |filter: &str, identifier| StoredSubscription { filter: filter.into(), options: 5, identifier };
    let filters = [subscription("$share/g/a/#", None), subscription("a/+", Some(7))];
    let mut ops = vec![Op::PutSession(Box::new(full.clone()))];
    ops.extend(filters.iter().cloned().map(|StoredSubscription { filter, options, identifier }| Op::PutSubscription {
        session: S,
        filter,
        options,
        identifier,
        receipt: None,
    }));
    for sequence in 10..15 {
        ops.push(enqueue(S, sequence, message("a/b", format!("{sequence}")), None));
    }
    ops.push(Op::Enqueue {
        session: S,
        sequence: 15,
        qos: QoS::AtLeastOnce,
        retain: true,
        identifiers: Some([3, 4].into()),
        message: message("a/c", "15"),
        receipt: None,
    });
    ops.extend([7, 9].map(|packet_id| Op::AddInbound { session: S, packet_id, receipt: None }));
    ops.push(Op::PutRetained(Arc::new((*message("r", "kept")).clone().retained()), None));
    ops.push(Op::PutRetained(message("r/gone", "dropped"), None));
    let store = start(directory.path());
    keep(&store, ops);
    keep(
        &store,
        vec![
            Op::Release { session: S, sequence: 12, receipt: None },
            Op::Remove { session: S, sequence: 10 },
            Op::RemoveInbound { session: S, packet_id: 7, receipt: None },
            Op::DropRetained(TopicName::new("r/gone").unwrap(), None),
        ],
    );
    store.close();

    let mut opened = open(directory.path());
    assert_eq!(opened.quarantined, None);
    let queue = QueueSummary { first: Some(11), last: Some(15), messages: 5, bytes: 4 * 5 };
    let expected = StoredSession { record: full, subscriptions: filters.to_vec(), inbound: vec![9], queue };
    assert_eq!(opened.sessions().unwrap(), [expected]);
    let mut retained = Vec::new();
    opened.retained(&mut |message| retained.push(message)).unwrap();
    assert_eq!(retained, [(*message("r", "kept")).clone().retained()]);
    let store = opened.run().unwrap();
    let page = load(&store, S, 0, 100, 10_000);
    assert!(page.complete);
    assert_eq!(page.messages.len(), 5);
    assert_eq!(page.messages[1].state, StoredState::Released);
    assert_eq!(page.messages[0].state, StoredState::Queued(message("a/b", "11")));
    let last = StoredMessage {
        sequence: 15,
        qos: QoS::AtLeastOnce,
        retain: true,
        identifiers: Some([3, 4].into()),
        state: StoredState::Queued(message("a/c", "15")),
    };
    assert_eq!(page.messages[4], last);
}

#[test]
fn pages_follow_each_other_within_their_limits() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let mut ops = vec![put(S), put(SessionId(2))];
    ops.extend((1..=10).map(|sequence| enqueue(S, sequence, message("t", "0123456789"), None)));
    ops.push(enqueue(SessionId(2), 1, message("t", "other"), None));
    store.submit(&mut ops, Due::Later);
    let check = |from: u64, messages: usize, bytes: usize, expected: &[u64], complete: bool| {
        let page = load(&store, S, from, messages, bytes);
        let found: Vec<u64> = page.messages.iter().map(|message| message.sequence).collect();
        assert_eq!((found.as_slice(), page.complete), (expected, complete), "{from} {messages} {bytes}");
    };
    check(0, 3, 1000, &[1, 2, 3], false);
    check(4, 3, 1000, &[4, 5, 6], false);
    check(8, 3, 1000, &[8, 9, 10], true);
    check(11, 3, 1000, &[], true);
    check(0, 100, 22, &[1, 2], false);
    check(0, 100, 1, &[1], false);
    assert!(load(&store, SessionId(3), 0, 1, 1).complete);
}

#[test]
fn a_message_acknowledged_before_its_commit_is_never_written() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    keep(&store, vec![put(S)]);
    let before = store.0.stats.commits.load(Ordering::Relaxed);
    for sequence in 1..1000 {
        let receipt = receipt();
        store.submit(&mut vec![enqueue(S, sequence, message("t", "x"), Some(receipt.clone()))], Due::Later);
        store.submit(&mut vec![Op::Remove { session: S, sequence }], Due::Later);
        assert_eq!(receipt.state(), ReceiptState::Done);
    }
    assert_eq!(store.0.stats.commits.load(Ordering::Relaxed), before);
    assert_eq!(store.0.stats.cancelled.load(Ordering::Relaxed), 999);
    assert_eq!(store.0.stats.written.load(Ordering::Relaxed), 0);
}
