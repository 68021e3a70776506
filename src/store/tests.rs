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
use crate::topic::{SharedFilter, TopicName};

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
    Op::Enqueue {
        session,
        sequence,
        qos: QoS::ExactlyOnce,
        retain: false,
        identifiers: None,
        shared: None,
        message,
        receipt,
    }
}

/// Submits and waits until all of it is on disk.
fn keep(store: &Store, mut ops: Vec<Op>) {
    let receipt = receipt();
    let session = SessionId(999_999);
    ops.push(Op::RemoveInbound { session, packet_id: 1, receipt: Some(receipt.clone()) });
    store.submit(&mut ops, Due::Now);
    assert_eq!(settled(&receipt), ReceiptState::Done);
}

/// A page with its messages taken apart.
struct Loaded {
    messages: Vec<StoredMessage>,
    complete: bool,
    in_doubt: bool,
    failed: bool,
}

fn load(store: &Store, session: SessionId, from: u64, messages: usize, bytes: usize) -> Loaded {
    let (sender, receiver) = mpsc::channel();
    let then = move |page| sender.send(page).unwrap();
    store.load(session, from, PageLimit { messages, bytes }, Box::new(then));
    let Page { messages, complete, in_doubt, failed } = receiver.recv_timeout(PATIENCE).unwrap();
    let unpacked = messages.unpack();
    let ends = (messages.len(), messages.first(), messages.last());
    let sequence = |message: &StoredMessage| message.sequence;
    assert_eq!(ends, (unpacked.len(), unpacked.first().map(sequence), unpacked.last().map(sequence)));
    Loaded { messages: unpacked, complete, in_doubt, failed }
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
        shared: Some(Arc::new(SharedFilter::split("$share/g/a/#").unwrap())),
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
            Op::remove(S, 10),
            Op::RemoveInbound { session: S, packet_id: 7, receipt: None },
            Op::DropRetained(TopicName::new("r/gone").unwrap(), None),
        ],
    );
    store.close();

    let mut opened = open(directory.path());
    assert_eq!(opened.quarantined(), None);
    let queue = QueueSummary { lane: 0, first: Some(11), last: Some(15), messages: 5, bytes: 4 * 5 };
    let expected = StoredSession {
        record: full,
        subscriptions: filters.to_vec(),
        inbound: vec![9],
        queues: vec![queue],
        in_doubt: None,
    };
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
        shared: Some(Arc::new(SharedFilter::split("$share/g/a/#").unwrap())),
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
        store.submit(&mut vec![Op::remove(S, sequence)], Due::Later);
        assert_eq!(receipt.state(), ReceiptState::Done);
    }
    assert_eq!(store.0.stats.commits.load(Ordering::Relaxed), before);
    assert_eq!(store.0.stats.cancelled.load(Ordering::Relaxed), 999);
    assert_eq!(store.0.stats.written.load(Ordering::Relaxed), 0);
}

#[test]
fn commits_wait_for_the_end_of_a_transaction() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    keep(&store, vec![put(S)]);
    let guard = store.transaction();
    let (first, second) = (receipt(), receipt());
    store.submit(&mut vec![enqueue(S, 1, message("t", "x"), Some(first.clone()))], Due::Now);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(first.state(), ReceiptState::Pending);
    store.submit(&mut vec![enqueue(S, 2, message("t", "x"), Some(second.clone()))], Due::Now);
    let before = store.0.stats.commits.load(Ordering::Relaxed);
    drop(guard);
    assert_eq!((settled(&first), settled(&second)), (ReceiptState::Done, ReceiptState::Done));
    assert_eq!(store.0.stats.commits.load(Ordering::Relaxed), before + 1);
}

#[test]
fn relaxed_acknowledges_at_once_and_interval_at_the_next_commit() {
    let directory = TempDir::new().unwrap();
    let relaxed = Settings { durability: Durability::Relaxed, ..settings(directory.path()) };
    let store = Store::bind(relaxed, clock()).unwrap().run().unwrap();
    let at_once = receipt();
    store.submit(&mut vec![put(S), enqueue(S, 1, message("t", "x"), Some(at_once.clone()))], Due::Now);
    assert_eq!(at_once.state(), ReceiptState::Done);
    assert_eq!(store.0.stats.commits.load(Ordering::Relaxed), 0);
    store.close();

    let durability = Durability::Interval(Duration::from_millis(100));
    let interval = Settings { durability, ..settings(directory.path()) };
    let store = Store::bind(interval, clock()).unwrap().run().unwrap();
    let started = Instant::now();
    let receipts: Vec<_> = (2..10).map(|_| receipt()).collect();
    for (sequence, receipt) in (2..10).zip(&receipts) {
        store.submit(&mut vec![enqueue(S, sequence, message("t", "x"), Some(receipt.clone()))], Due::Now);
    }
    receipts.iter().for_each(|receipt| assert_eq!(settled(receipt), ReceiptState::Done));
    assert!(started.elapsed() >= Duration::from_millis(100));
    assert_eq!(store.0.stats.commits.load(Ordering::Relaxed), 1);
    assert_eq!(sequences(&store, S), (1..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn publishers_wait_while_the_inbox_is_over_its_limit() {
    let directory = TempDir::new().unwrap();
    let small = Settings { inbox_bytes: 10_000, ..settings(directory.path()) };
    let store = Store::bind(small, clock()).unwrap().run().unwrap();
    store.when_ready().await;
    let guard = store.transaction();
    store.submit(&mut vec![put(S), enqueue(S, 1, message("t", vec![0; 20_000]), None)], Due::Now);
    assert!(tokio::time::timeout(Duration::from_millis(20), store.when_ready()).await.is_err());
    drop(guard);
    tokio::time::timeout(PATIENCE, store.when_ready()).await.unwrap();
}

#[test]
fn a_dropped_session_leaves_nothing_behind_and_its_room_is_given_back() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let mut ops = vec![put(S), put(SessionId(2)), enqueue(SessionId(2), 1, message("t", "stays"), None)];
    ops.extend((1..=30_000).map(|sequence| enqueue(S, sequence, message("some/topic", vec![7; 700]), None)));
    ops.push(Op::AddInbound { session: S, packet_id: 1, receipt: None });
    keep(&store, ops);
    let file = directory.path().join(DATABASE_FILE);
    // Rows may still be in the log; what counts is what the database will be.
    let total = |store: &Store| store.0.stats.status(UnixMillis(0)).facts[3].1.parse::<u64>().unwrap();
    // The size is looked at after the receipts are settled.
    until("the size of what was kept", || total(&store) > 20_000_000);
    keep(&store, vec![Op::DropSession(S), enqueue(S, 30_001, message("t", "too late"), None)]);
    assert!(load(&store, S, 0, 1, 1).messages.is_empty());
    until("giving room back", || total(&store) < 9 << 20 && file.metadata().unwrap().len() < 9 << 20);
    let mut again = vec![put(SessionId(3)), enqueue(SessionId(3), 5, message("t", "new"), None)];
    again.push(Op::remove(S, 3));
    keep(&store, again);
    assert_eq!(sequences(&store, SessionId(3)), [5]);
    store.close();
    assert!(file.metadata().unwrap().len() < 9 << 20);
    let verdict = inspect::verify(directory.path()).unwrap();
    assert_eq!(verdict, inspect::Verdict { sessions: 2, messages: 2, findings: vec![] });
    let sessions = open(directory.path()).sessions().unwrap();
    assert_eq!(sessions.iter().map(|session| session.record.id.0).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn a_full_database_refuses_what_is_new_takes_removals_and_recovers() {
    let directory = TempDir::new().unwrap();
    let small = Settings { max_bytes: 1 << 20, ..settings(directory.path()) };
    let store = Store::bind(small, clock()).unwrap().run().unwrap();
    keep(&store, vec![put(S)]);
    let mut stored = 0;
    let mut was_full_before = false;
    for sequence in 1.. {
        let receipt = receipt();
        store.submit(&mut vec![enqueue(S, sequence, message("t", vec![7; 4000]), Some(receipt.clone()))], Due::Now);
        if settled(&receipt) == ReceiptState::Failed {
            break;
        }
        was_full_before |= store.is_full();
        stored = sequence;
    }
    assert!(was_full_before, "the store says that it is full before it refuses");
    assert!(store.is_full());
    // There may be room for less, but it would overtake what was refused.
    let overtaking = receipt();
    store.submit(&mut vec![enqueue(S, stored + 2, message("t", ""), Some(overtaking.clone()))], Due::Now);
    assert_eq!(settled(&overtaking), ReceiptState::Failed);
    assert_eq!(store.statuses()[0].health, crate::observe::Health::Down);
    assert_eq!(sequences(&store, S), (1..=stored).collect::<Vec<_>>());
    let mut removals = (1..stored).map(|sequence| Op::remove(S, sequence)).collect();
    store.submit(&mut removals, Due::Now);
    assert_eq!(sequences(&store, S), [stored]);
    until("recovery", || !store.is_full() && store.statuses()[0].health == crate::observe::Health::Good);
    keep(&store, vec![enqueue(S, stored + 10, message("t", vec![7; 4000]), None)]);
    assert_eq!(sequences(&store, S), [stored, stored + 10]);
    let mut metrics = Metrics::default();
    store.collect(&mut metrics);
    let text = metrics.render();
    assert!(!text.contains("fieldgate_store_failures_total{kind=\"full\"} 0"), "{text}");
    assert!(text.contains("fieldgate_store_failing 0"), "{text}");
}

#[test]
fn what_must_not_be_lost_waits_until_the_disk_takes_it() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let mut ops = vec![put(S), Op::AddInbound { session: S, packet_id: 4, receipt: None }];
    ops.extend((1..=5).map(|sequence| enqueue(S, sequence, message("t", "x"), None)));
    keep(&store, ops);

    // Another connection holds the write lock: nothing can be written, for as long as the test wants.
    let blocker = rusqlite::Connection::open(directory.path().join(DATABASE_FILE)).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (refused, subscribed, released, pubrel) = (receipt(), receipt(), receipt(), receipt());
    let filter: Arc<str> = "a/#".into();
    let mut ops = vec![
        enqueue(S, 6, message("t", "x"), Some(refused.clone())),
        Op::remove(S, 1),
        Op::Release { session: S, sequence: 2, receipt: Some(released.clone()) },
        Op::RemoveInbound { session: S, packet_id: 4, receipt: Some(pubrel.clone()) },
        Op::PutSubscription {
            session: S,
            filter: filter.clone(),
            options: 1,
            identifier: None,
            receipt: Some(subscribed.clone()),
        },
        put(SessionId(2)),
    ];
    store.submit(&mut ops, Due::Now);
    assert_eq!((settled(&refused), settled(&subscribed)), (ReceiptState::Failed, ReceiptState::Failed));
    assert_eq!((released.state(), pubrel.state()), (ReceiptState::Pending, ReceiptState::Pending));
    store.submit(&mut vec![Op::remove(S, 3), Op::remove(S, 6)], Due::Now);
    // Pages show what will be, not what the disk still says.
    let page = load(&store, S, 0, 100, 10_000);
    assert_eq!(page.messages.iter().map(|message| message.sequence).collect::<Vec<_>>(), [2, 4, 5]);
    assert_eq!(page.messages[0].state, StoredState::Released);
    assert_eq!(store.statuses()[0].health, crate::observe::Health::Down);

    blocker.execute_batch("ROLLBACK").unwrap();
    drop(blocker);
    assert_eq!((settled(&released), settled(&pubrel)), (ReceiptState::Done, ReceiptState::Done));
    until("recovery", || store.statuses()[0].health == crate::observe::Health::Good);
    store.close();
    let mut opened = open(directory.path());
    let sessions = opened.sessions().unwrap();
    assert_eq!(sessions.len(), 2);
    assert_eq!(sessions[0].inbound, Vec::<u16>::new());
    assert_eq!(*sessions[0].subscriptions[0].filter, *filter);
    assert_eq!(sequences(&opened.run().unwrap(), S), [2, 4, 5]);
}

#[test]
fn a_transaction_that_fails_half_way_leaves_no_trace_in_what_is_known() {
    let directory = TempDir::new().unwrap();
    let small = Settings { max_bytes: 1 << 20, ..settings(directory.path()) };
    let open::Found { mut database, lock: _lock, .. } = open::open(&small, &clock()).unwrap();
    let batch = |ops: Vec<Op>| {
        let mut batch = batch::Batch::default();
        ops.into_iter().for_each(|op| batch.push(op, Instant::now(), &mut Vec::new()));
        batch
    };
    database.commit(&batch(vec![put(S), enqueue(S, 1, message("t", "kept"), None)])).unwrap();
    let ops = vec![
        put(SessionId(2)),
        enqueue(S, 2, message("t", "x"), None),
        enqueue(S, 3, message("t", "x"), None),
        Op::DropSession(S),
        enqueue(SessionId(2), 1, message("t", vec![7; 2 << 20]), None),
    ];
    let error = database.commit(&batch(ops)).unwrap_err();
    assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::DiskFull));
    assert_eq!(database.state.sessions.keys().collect::<Vec<_>>(), [&S]);
    assert_eq!((database.state.messages, database.state.queue(S, 0).unwrap().last), (1, Some(1)));
    database.commit(&batch(vec![put(SessionId(2)), enqueue(S, 2, message("t", "x"), None)])).unwrap();
    assert_eq!((database.state.messages, database.state.sessions.len()), (2, 2));
}

#[test]
fn a_store_that_has_ended_refuses() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let other = store.clone();
    let last = receipt();
    store.submit(&mut vec![put(S), enqueue(S, 1, message("t", "x"), Some(last.clone()))], Due::Later);
    store.close();
    assert_eq!(last.state(), ReceiptState::Done);
    let late = receipt();
    other.submit(&mut vec![enqueue(S, 2, message("t", "x"), Some(late.clone()))], Due::Now);
    assert_eq!(late.state(), ReceiptState::Failed);
    assert!(load(&other, S, 0, 1, 1).failed);
}

#[test]
fn a_panic_in_a_callback_harms_nobody_else() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    store.load(S, 0, PageLimit { messages: 1, bytes: 1 }, Box::new(|_| panic!("on purpose")));
    assert!(!load(&store, S, 0, 1, 1).failed);
    keep(&store, vec![put(S), enqueue(S, 1, message("t", "x"), None)]);
}

#[test]
fn a_writer_that_panics_leaves_nobody_waiting() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let (waiting, late) = (receipt(), receipt());
    let guard = store.transaction();
    store.submit(&mut vec![enqueue(S, 1, message("t", "x"), Some(waiting.clone()))], Due::Now);
    store.0.inbox.abandon();
    drop(guard);
    store.submit(&mut vec![enqueue(S, 2, message("t", "x"), Some(late.clone()))], Due::Now);
    assert_eq!((settled(&waiting), settled(&late)), (ReceiptState::Failed, ReceiptState::Failed));
    assert!(load(&store, S, 0, 1, 1).failed);
}

#[test]
fn only_one_process_opens_a_store() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let error = Store::bind(settings(directory.path()), clock()).unwrap_err();
    let expected = format!("in use by the process {}", std::process::id());
    assert!(error.to_string().contains(&expected), "{error}");
    store.close();
    open(directory.path());
}

mod cost;
mod damage;
mod model;
mod process;
