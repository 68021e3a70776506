//! What the disk is spared.

use std::io::{self, Write};

use rusqlite::Connection;

use super::*;
use crate::store::open::open_read_only;

fn counted(store: &Store, counter: impl Fn(&Stats) -> u64) -> u64 {
    counter(&store.0.stats)
}

fn retain(topic: &str, payload: &'static str) -> Op {
    Op::PutRetained(message(topic, payload), None)
}

/// The retained messages on disk, with their payloads.
fn retained_in(directory: &TempDir) -> Vec<(String, String)> {
    let connection = open_read_only(&directory.path().join(DATABASE_FILE)).unwrap();
    let mut select = connection.prepare("SELECT topic, CAST(payload AS TEXT) FROM retained ORDER BY topic").unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|&(topic, payload)| (topic.into(), payload.into())).collect()
}

#[test]
fn a_message_waits_for_receivers_that_are_far_away_and_need_not_be_written() {
    let directory = TempDir::new().unwrap();
    let patient = Settings { max_commit_delay: Duration::from_secs(20), ..settings(directory.path()) };
    let store = Store::bind(patient, clock()).unwrap().run().unwrap();
    keep(&store, vec![put(S)]);
    // Nothing is known of the receiver: it is written within the commit delay.
    let first = receipt();
    store.submit(&mut vec![enqueue(S, 1, message("a", "x"), Some(first.clone()))], Due::Soon);
    assert_eq!(settled(&first), ReceiptState::Done);
    assert_eq!(counted(&store, |stats| stats.written.load(Ordering::Relaxed)), 1);
    // That is how long an acknowledgement takes.
    std::thread::sleep(Duration::from_secs(1));
    store.submit(&mut vec![Op::remove(S, 1)], Due::Later);

    for sequence in 2..=4 {
        let waiting = receipt();
        store.submit(&mut vec![enqueue(S, sequence, message("a", "x"), Some(waiting.clone()))], Due::Soon);
        // Ten times the commit delay, and much shorter than the last acknowledgement took.
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(waiting.state(), ReceiptState::Pending);
        store.submit(&mut vec![Op::remove(S, sequence)], Due::Later);
        assert_eq!(waiting.state(), ReceiptState::Done);
    }
    assert_eq!(counted(&store, |stats| stats.cancelled.load(Ordering::Relaxed)), 3);
    // Whoever is not connected is not waited for.
    let offline = receipt();
    store.submit(&mut vec![enqueue(S, 5, message("a", "x"), Some(offline.clone()))], Due::Now);
    assert_eq!(settled(&offline), ReceiptState::Done);
    assert_eq!(sequences(&store, S), [5]);
    store.close();
}

#[test]
fn of_many_retained_messages_of_one_topic_the_last_is_written_alone() {
    let directory = TempDir::new().unwrap();
    let slow = Settings { retained_interval: Duration::from_secs(3600), ..settings(directory.path()) };
    let store = Store::bind(slow, clock()).unwrap().run().unwrap();
    store.submit(&mut vec![retain("a", "1"), retain("b", "1")], Due::Eventually);
    store.submit(&mut vec![retain("a", "2")], Due::Eventually);
    // Other commits do not take them along.
    keep(&store, vec![put(S)]);
    assert_eq!(retained_in(&directory), []);
    // One that is to be acknowledged, or removed, takes the place of those that wait.
    keep(&store, vec![retain("a", "3")]);
    assert_eq!(retained_in(&directory), pairs(&[("a", "3")]));
    store.submit(&mut vec![retain("a", "4"), retain("c", "1")], Due::Eventually);
    keep(&store, vec![Op::DropRetained(TopicName::new("a").unwrap(), None)]);
    assert_eq!(retained_in(&directory), []);
    let changes = counted(&store, |stats| stats.changes.load(Ordering::Relaxed));
    store.submit(&mut vec![retain("c", "2"), retain("c", "3")], Due::Eventually);
    store.close();
    assert_eq!(retained_in(&directory), pairs(&[("b", "1"), ("c", "3")]));
    assert_eq!(changes, 4 + 2);
}

#[test]
fn a_retained_message_is_written_when_its_time_has_come() {
    let directory = TempDir::new().unwrap();
    let quick = Settings { retained_interval: Duration::from_millis(50), ..settings(directory.path()) };
    let store = Store::bind(quick, clock()).unwrap().run().unwrap();
    store.submit(&mut vec![retain("a", "1")], Due::Eventually);
    until("the write", || retained_in(&directory) == pairs(&[("a", "1")]));
    // Nor does the memory that they wait in grow without a limit.
    let small =
        Settings { inbox_bytes: 10_000, retained_interval: Duration::from_secs(3600), ..settings(Path::new("")) };
    store.close();
    let store = Store::bind(Settings { directory: directory.path().into(), ..small }, clock()).unwrap().run().unwrap();
    for number in 0..1000 {
        store.submit(&mut vec![retain(&format!("many/{number}"), "1")], Due::Eventually);
    }
    until("the write", || retained_in(&directory).len() > 900);
    store.close();
}

#[test]
fn an_idle_store_neither_writes_nor_wakes() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    keep(&store, vec![put(S), enqueue(S, 1, message("a", "x"), None)]);
    let spent = |store: &Store| {
        counted(store, |stats| stats.syncs.load(Ordering::Relaxed) + stats.bytes_written.load(Ordering::Relaxed))
    };
    // Once it has looked whether there is space to give back.
    until("rest", || store.0.inbox.sleeps());
    let before = spent(&store);
    assert!(before > 0);
    // What cancels out wakes nobody either.
    for sequence in 2..1000 {
        store.submit(&mut vec![enqueue(S, sequence, message("a", "x"), None), Op::remove(S, sequence)], Due::Soon);
    }
    assert!(store.0.inbox.sleeps());
    assert_eq!(spent(&store), before);
    store.close();
}

/// Takes an export as slowly as can be: between its parts another process writes to the database and empties its log.
struct Slow {
    database: Connection,
    parts: usize,
}

impl Write for Slow {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.parts += 1;
        self.database.execute("UPDATE summary SET messages = messages", []).unwrap();
        let (busy, left): (bool, i64) = self
            .database
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap();
        assert_eq!((busy, left), (false, 0), "the log cannot be emptied");
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_export_that_is_read_slowly_holds_up_nobody() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    // Each is a run of its own.
    let messages = (1..=600).map(|sequence| enqueue(S, sequence, message("a", vec![b'x'; 5000]), None));
    keep(&store, std::iter::once(put(S)).chain(messages).collect());
    store.close();
    let database = Connection::open(directory.path().join(DATABASE_FILE)).unwrap();
    let mut slow = Slow { database, parts: 0 };
    let exported = inspect::export(directory.path(), None, &mut slow).unwrap();
    assert_eq!(exported, inspect::Exported { messages: 600, unreadable: 0 });
    assert!(slow.parts >= 3, "{}", slow.parts);
}
