//! Random operations against a model: what the store holds, after commits, crashes and restarts, is what it must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::*;

const SESSIONS: u64 = 4;
/// Lanes of each of them.
const LANES: u64 = 3;

/// Numbers that look random and are the same every time (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end
    }
}

/// Length and byte of a payload that is one byte repeated.
type Payload = (usize, u8);

/// What the store must hold once everything is in.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    sessions: BTreeMap<SessionId, Held>,
    retained: BTreeMap<String, Payload>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Held {
    subscriptions: BTreeMap<String, u8>,
    inbound: BTreeSet<u16>,
    /// `None` where it is released.
    queue: BTreeMap<u64, Option<(String, Payload)>>,
}

/// One random operation, done to the model and returned for the store.
fn step(random: &mut Random, model: &mut Model, next_id: &mut u64, next_sequence: &mut u64) -> Option<Op> {
    let ids: Vec<SessionId> = model.sessions.keys().copied().collect();
    if ids.is_empty() || (ids.len() < SESSIONS as usize && random.below(20) == 0) {
        let id = SessionId(*next_id);
        *next_id += 1;
        model.sessions.insert(id, Held::default());
        return Some(put(id));
    }
    let session = ids[random.below(ids.len() as u64) as usize];
    let held = model.sessions.get_mut(&session).unwrap();
    let packet_id = 1 + random.below(4) as u16;
    let topic = format!("topic/{}", random.below(12));
    let byte = random.below(256) as u8;
    let length = 1 + random.below(300) as usize;
    let payload = vec![byte; length];
    let filter = format!("filter/{}", random.below(3));
    let oldest = held.queue.keys().nth(random.below(3) as usize).copied();
    Some(match random.below(100) {
        0 => {
            model.sessions.remove(&session);
            Op::DropSession(session)
        }
        1..=40 => {
            let sequence = first_sequence(random.below(LANES) as u8) | *next_sequence;
            *next_sequence += 1 + random.below(2);
            held.queue.insert(sequence, Some((topic.clone(), (length, byte))));
            enqueue(session, sequence, message(&topic, payload), None)
        }
        41..=66 => {
            let sequence = oldest?;
            held.queue.remove(&sequence);
            Op::remove(session, sequence)
        }
        67..=72 => {
            let sequence = oldest?;
            held.queue.insert(sequence, None);
            Op::Release { session, sequence, receipt: None }
        }
        73..=79 => {
            held.inbound.insert(packet_id);
            Op::AddInbound { session, packet_id, receipt: None }
        }
        80..=85 => {
            held.inbound.remove(&packet_id);
            Op::RemoveInbound { session, packet_id, receipt: None }
        }
        // The record again, as when a client comes and goes.
        86 => put(session),
        87 => {
            let options = random.below(4) as u8;
            held.subscriptions.insert(filter.clone(), options);
            let filter = filter.into();
            Op::PutSubscription { session, filter, options, identifier: None, receipt: None }
        }
        88 => {
            held.subscriptions.remove(&filter);
            Op::DropSubscription { session, filter: filter.into() }
        }
        89..=95 => {
            model.retained.insert(topic.clone(), (length, byte));
            Op::PutRetained(message(&topic, payload), None)
        }
        _ => {
            model.retained.remove(&topic);
            Op::DropRetained(TopicName::new(&topic).unwrap(), None)
        }
    })
}

/// What a store holds, its summaries compared with its queues on the way.
fn held_by(mut opened: Opened) -> Model {
    let mut model = Model::default();
    opened
        .retained(&mut |message| {
            model.retained.insert(message.topic.to_string(), summed(&message));
        })
        .unwrap();
    let sessions = opened.sessions().unwrap();
    let store = opened.run().unwrap();
    for StoredSession { record, subscriptions, inbound, queues, in_doubt } in sessions {
        assert_eq!(in_doubt, None);
        let held = Held {
            subscriptions: subscriptions.iter().map(|found| (found.filter.to_string(), found.options)).collect(),
            inbound: inbound.into_iter().collect(),
            queue: queue_of(&store, record.id),
        };
        assert!(held.queue.keys().all(|&sequence| queues.iter().any(|queue| queue.lane == lane(sequence))));
        for queue in queues {
            let mine = || held.queue.iter().filter(|(sequence, _)| lane(**sequence) == queue.lane);
            let content = mine().filter_map(|(_, content)| content.as_ref());
            let bytes = content.map(|(topic, payload)| topic.len() + payload.0).sum::<usize>();
            let first = mine().next().map(|(sequence, _)| *sequence);
            assert_eq!((queue.first, queue.messages, queue.bytes), (first, mine().count() as u64, bytes as u64));
            assert!(queue.last >= mine().next_back().map(|(sequence, _)| *sequence));
        }
        model.sessions.insert(record.id, held);
    }
    model
}

fn summed(message: &Message) -> Payload {
    let byte = message.payload.first().copied().unwrap_or(0);
    assert!(message.payload.iter().all(|other| *other == byte));
    (message.payload.len(), byte)
}

fn queue_of(store: &Store, session: SessionId) -> BTreeMap<u64, Option<(String, Payload)>> {
    let mut queue = BTreeMap::new();
    for lane in 0..LANES {
        let mut from = first_sequence(lane as u8);
        loop {
            let page = load(store, session, from, 7, 1000);
            for StoredMessage { sequence, state, .. } in page.messages {
                from = sequence + 1;
                let content = match state {
                    StoredState::Queued(message) => Some((message.topic.to_string(), summed(&message))),
                    StoredState::Released => None,
                };
                queue.insert(sequence, content);
            }
            if page.complete {
                break;
            }
        }
    }
    queue
}

/// Submits while another connection keeps the store from writing: what is new may be refused, nothing else may be lost.
fn submit_blocked(random: &mut Random, directory: &Path, store: &Store, model: &mut Model, next_sequence: &mut u64) {
    keep(store, Vec::new());
    let blocker = rusqlite::Connection::open(directory.join(DATABASE_FILE)).unwrap();
    until("a moment without a commit", || blocker.execute_batch("BEGIN IMMEDIATE").is_ok());
    let mut receipts = Vec::new();
    for _ in 0..40 {
        let ids: Vec<SessionId> = model.sessions.keys().copied().collect();
        let session = ids[random.below(ids.len() as u64) as usize];
        let held = model.sessions.get_mut(&session).unwrap();
        let oldest = held.queue.keys().nth(random.below(5) as usize).copied();
        let op = match (random.below(8), oldest) {
            (0..=2, Some(sequence)) => {
                held.queue.remove(&sequence);
                Op::remove(session, sequence)
            }
            (3, Some(sequence)) => {
                held.queue.insert(sequence, None);
                Op::Release { session, sequence, receipt: None }
            }
            (4, _) => {
                held.inbound.remove(&1);
                Op::RemoveInbound { session, packet_id: 1, receipt: None }
            }
            (5, _) => {
                held.subscriptions.insert("filter/1".into(), 3);
                let filter = "filter/1".into();
                Op::PutSubscription { session, filter, options: 3, identifier: None, receipt: None }
            }
            _ => {
                let (sequence, kept) = (first_sequence(random.below(LANES) as u8) | *next_sequence, receipt());
                *next_sequence += 1;
                held.queue.insert(sequence, Some(("topic/1".into(), (9, 9))));
                receipts.push((session, sequence, kept.clone()));
                enqueue(session, sequence, message("topic/1", vec![9; 9]), Some(kept))
            }
        };
        store.submit(&mut vec![op], Due::Now);
        if random.below(10) == 0 {
            // Longer than the store waits for a lock.
            std::thread::sleep(Duration::from_millis(random.below(300)));
        }
    }
    blocker.execute_batch("ROLLBACK").unwrap();
    drop(blocker);
    until("recovery", || !store.0.stats.is_failing());
    keep(store, Vec::new());
    for (session, sequence, receipt) in receipts {
        if settled(&receipt) == ReceiptState::Failed {
            model.sessions.get_mut(&session).unwrap().queue.remove(&sequence);
        }
    }
}

fn check(held: Model, expected: &Model, seed: u64) {
    assert_eq!(held.retained, expected.retained, "seed {seed}");
    assert_eq!(held.sessions.keys().collect::<Vec<_>>(), expected.sessions.keys().collect::<Vec<_>>(), "seed {seed}");
    for (session, held) in &held.sessions {
        let expected = &expected.sessions[session];
        assert_eq!(held.queue, expected.queue, "seed {seed} {session:?}");
        assert_eq!((&held.subscriptions, &held.inbound), (&expected.subscriptions, &expected.inbound), "seed {seed}");
    }
}

fn run(seed: u64) {
    let directory = TempDir::new().unwrap();
    let mut random = Random(seed * 2 + 1);
    let mut model = Model::default();
    let (mut next_id, mut next_sequence) = (1, 1);
    let mut store = start(directory.path());
    for round in 0..300 {
        if round == 150 && seed.is_multiple_of(3) {
            submit_blocked(&mut random, directory.path(), &store, &mut model, &mut next_sequence);
        }
        let mut ops = Vec::new();
        for _ in 0..=random.below(20) {
            ops.extend(step(&mut random, &mut model, &mut next_id, &mut next_sequence));
        }
        let due = [Due::Now, Due::Soon, Due::Later][random.below(3) as usize];
        store.submit(&mut ops, due);
        match random.below(30) {
            0 => {
                store.close();
                let opened = open(directory.path());
                store = opened.run().unwrap();
            }
            1 => {
                // The files as they are after a commit are what a crash leaves behind.
                keep(&store, Vec::new());
                let copy = TempDir::new().unwrap();
                for name in [DATABASE_FILE, "fieldgate.db-wal"] {
                    fs::copy(directory.path().join(name), copy.path().join(name)).unwrap();
                }
                let opened = open(copy.path());
                assert_eq!(opened.quarantined(), None);
                check(held_by(opened), &model, seed);
                assert_eq!(inspect::verify(copy.path()).unwrap().findings, Vec::<String>::new());
            }
            2..=4 => {
                if let Some((&session, held)) = model.sessions.iter().next() {
                    assert_eq!(queue_of(&store, session), held.queue, "seed {seed}");
                }
            }
            _ => {}
        }
    }
    store.close();
    check(held_by(open(directory.path())), &model, seed);
}

#[test]
fn the_store_holds_what_the_model_holds_after_crashes_and_restarts() {
    let rounds = std::env::var("FIELDGATE_MODEL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    (1..=rounds).for_each(run);
}
