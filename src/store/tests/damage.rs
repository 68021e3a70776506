//! Files that are not, or no longer, a whole database of ours; databases of older versions.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use super::*;

/// A store with 200 messages in one session, closed.
fn filled() -> TempDir {
    filled_with(200)
}

fn filled_with(messages: u64) -> TempDir {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let mut ops = vec![put(S)];
    ops.extend((1..=messages).map(|sequence| enqueue(S, sequence, message("some/topic", vec![b'x'; 500]), None)));
    keep(&store, ops);
    store.close();
    directory
}

fn database(directory: &TempDir) -> PathBuf {
    directory.path().join(DATABASE_FILE)
}

/// The sequences of what a session's lane 0 still has to send, without what is only to be released.
fn queued(store: &Store, session: SessionId) -> Vec<u64> {
    let page = load(store, session, 0, usize::MAX, usize::MAX);
    assert!(page.complete && !page.failed);
    let queued = page.messages.iter().filter(|message| message.state != StoredState::Released);
    queued.map(|message| message.sequence).collect()
}

/// Whatever is there, the store opens, goes on working, and the file stands aside unchanged. Returns which messages of
/// the session were saved.
#[track_caller]
fn check_is_moved_aside(directory: &TempDir) -> Vec<u64> {
    let before = fs::read(database(directory)).unwrap();
    let mut opened = open(directory.path());
    let aside = opened.quarantined().expect("the file is moved aside").to_owned();
    assert!(fs::read(&aside).unwrap() == before, "the file is changed");
    let name = aside.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("fieldgate.db.corrupt-2") && name.ends_with('Z'), "{name}");
    opened.sessions().unwrap();
    let store = opened.run().unwrap();
    let status = &store.statuses()[0];
    assert_eq!(status.health, crate::observe::Health::Degraded);
    assert!(status.reason.as_ref().unwrap().contains(&name));
    let saved = queued(&store, S);
    keep(&store, vec![put(S), enqueue(S, 1000, message("t", "x"), None)]);
    store.close();
    let opened = open(directory.path());
    assert_eq!(opened.quarantined(), None);
    assert_eq!(queued(&opened.run().unwrap(), S), [&saved[..], &[1000]].concat());
    assert!(inspect::verify(directory.path()).unwrap().findings.is_empty());
    saved
}

#[test]
fn what_is_left_of_a_file_that_is_cut_short_is_saved() {
    for parts in [2, 5] {
        let directory = filled_with(900);
        let file = fs::OpenOptions::new().write(true).open(database(&directory)).unwrap();
        file.set_len(file.metadata().unwrap().len() / parts).unwrap();
        let saved = check_is_moved_aside(&directory).len() as u64;
        assert!(saved > 600 / parts && saved <= 900 / parts, "of 1/{parts}: {saved}");
    }
}

#[test]
fn all_messages_are_saved_where_the_header_or_the_schema_is_damaged() {
    for offset in [0, 3, 16, 100, 110] {
        let directory = filled();
        let mut bytes = fs::read(database(&directory)).unwrap();
        bytes[offset..offset + 4].iter_mut().for_each(|byte| *byte = !*byte);
        fs::write(database(&directory), bytes).unwrap();
        assert_eq!(check_is_moved_aside(&directory), (1..=200).collect::<Vec<_>>(), "byte {offset}");
    }
}

#[test]
fn any_flipped_byte_leaves_a_store_that_opens_and_reads() {
    let directory = filled();
    let whole = fs::read(database(&directory)).unwrap();
    for round in 0..60 {
        let directory = TempDir::new().unwrap();
        let mut bytes = whole.clone();
        let at = round * 1_000_003 % bytes.len();
        bytes[at] ^= 1 << (round % 8);
        fs::write(directory.path().join(DATABASE_FILE), bytes).unwrap();
        let mut opened = open(directory.path());
        opened.sessions().unwrap();
        opened.retained(&mut |_| {}).unwrap();
        let store = opened.run().unwrap();
        load(&store, S, 0, usize::MAX, usize::MAX);
        store.close();
    }
}

/// The files of a store that was killed after it had kept three messages, in a transaction each.
fn killed() -> TempDir {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    keep(&store, vec![put(S), enqueue(S, 1, message("t", "first"), None)]);
    keep(&store, vec![enqueue(S, 2, message("t", vec![2; 5000]), None)]);
    keep(&store, vec![enqueue(S, 3, message("t", vec![3; 5000]), None)]);
    copy_of(&directory)
}

/// The files of a store that is running, as if it had been killed now.
fn copy_of(directory: &TempDir) -> TempDir {
    let copy = TempDir::new().unwrap();
    for name in [DATABASE_FILE, LOG_FILE] {
        fs::copy(directory.path().join(name), copy.path().join(name)).unwrap();
    }
    copy
}

const LOG_FILE: &str = "fieldgate.db-wal";

#[test]
fn a_torn_log_loses_only_what_is_behind_the_tear() {
    let check = |change: &dyn Fn(&mut Vec<u8>), expected: &[u64]| {
        let directory = killed();
        let path = directory.path().join(LOG_FILE);
        let mut log = fs::read(&path).unwrap();
        change(&mut log);
        fs::write(&path, log).unwrap();
        let opened = open(directory.path());
        assert_eq!(opened.quarantined(), None);
        let store = opened.run().unwrap();
        assert_eq!(sequences(&store, S), expected);
        keep(&store, vec![enqueue(S, 4, message("t", "x"), None)]);
    };
    check(&|_| {}, &[1, 2, 3]);
    check(&|log| log.truncate(log.len() - 100), &[1, 2]);
    // The write of the last transaction, which nobody was told of, has come to the disk in another order.
    check(
        &|log| {
            let at = log.len() - 3000;
            log[at] ^= 1;
        },
        &[1, 2],
    );
    // The next write had begun: in place of what an earlier one had left, or with nothing behind it.
    check(&|log| log.extend_from_within(log.len() - 3000..), &[1, 2, 3]);
    check(&|log| log.extend([0; 700]), &[1, 2, 3]);
}

#[test]
fn a_log_with_flipped_bytes_before_its_last_transaction_is_moved_aside() {
    let frame_bytes = 24 + schema::PAGE_BYTES as usize;
    // The header, without which the log can be read too; the first frame, which holds nothing that the next one does
    // not, its header and its page.
    for at in [5, 20, 32, 32 + 17, 32 + 1000, 32 + frame_bytes + 40] {
        let directory = killed();
        let path = directory.path().join(LOG_FILE);
        let mut log = fs::read(&path).unwrap();
        log[at] ^= 4;
        fs::write(&path, &log).unwrap();
        let saved = check_is_moved_aside(&directory);
        assert_eq!(saved, [1, 2, 3], "byte {at}");
        let aside = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
        let logs: Vec<_> = aside.filter(|path| path.to_string_lossy().ends_with("Z-wal")).collect();
        assert!(fs::read(&logs[0]).unwrap() == log, "the log is kept with its database");
    }
}

/// What is in a store: all sessions as they are told, the pages of their queues, and retained messages.
type Content = (Vec<StoredSession>, Vec<(SessionId, StoredMessage)>, Vec<Message>);

fn content(mut opened: Opened) -> Content {
    let sessions = opened.sessions().unwrap();
    let mut retained = Vec::new();
    opened.retained(&mut |message| retained.push(message)).unwrap();
    let store = opened.run().unwrap();
    let mut messages = Vec::new();
    for session in &sessions {
        for queue in &session.queues {
            let page = load(&store, session.record.id, first_sequence(queue.lane), usize::MAX, usize::MAX);
            assert!(page.complete && !page.failed);
            messages.extend(page.messages.into_iter().map(|message| (session.record.id, message)));
        }
    }
    store.close();
    (sessions, messages, retained)
}

/// Of a database with everything in it, and of its log, bytes are flipped, pages are lost, ends are cut off.
#[test]
fn whatever_is_damaged_nothing_is_invented_or_reordered_and_nearly_all_is_saved() {
    let whole = TempDir::new().unwrap();
    let store = start(whole.path());
    let sessions: Vec<_> = (1..=3).map(SessionId).collect();
    for &session in &sessions {
        let subscription = |number: u32| Op::PutSubscription {
            session,
            filter: format!("filter/{number}/#").into(),
            options: 1,
            identifier: Some(number + 1),
            receipt: None,
        };
        let mut ops = vec![put(session)];
        ops.extend((0..20).map(subscription));
        ops.extend((1..=9).map(|packet_id| Op::AddInbound { session, packet_id, receipt: None }));
        keep(&store, ops);
    }
    for batch in 0..30 {
        for &session in &sessions {
            let lane = first_sequence(u8::try_from(batch % 2).unwrap());
            let text = |at| format!("{}/{at} {}", session.0, "x".repeat((at as usize * 37) % 400));
            let ops =
                (batch * 20..batch * 20 + 20).map(|at| enqueue(session, lane | at, message("a/b", text(at)), None));
            keep(&store, ops.collect());
        }
        keep(&store, vec![Op::PutRetained(message(&format!("r/{batch}"), vec![7; 50]), None)]);
    }
    let everything = content(open(copy_of(&whole).path())).1;
    // Some are done with, in the middle of a run too, and some half.
    for &session in &sessions {
        keep(&store, vec![Op::Remove { session, first: 0, last: 46 }, Op::remove(session, 90)]);
        keep(&store, vec![Op::Release { session, sequence: 47, receipt: None }]);
    }
    // Of what stands in the last transaction of a log nobody knows that it was ever acknowledged.
    keep(&store, vec![Op::PutRetained(message("last", "x"), None)]);
    let copy = copy_of(&whole);
    store.close();
    let files: [&[(&str, Vec<u8>)]; 2] = [
        &[(DATABASE_FILE, fs::read(database(&whole)).unwrap())],
        &[DATABASE_FILE, LOG_FILE].map(|name| (name, fs::read(copy.path().join(name)).unwrap())),
    ];
    let expected = content(open(whole.path()));
    assert_eq!(expected.1.len(), 3 * (600 - 28));
    let mut seed = 1_u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let place = |stored: &(SessionId, StoredMessage)| (stored.0, stored.1.sequence);
    let left: BTreeMap<_, _> = expected.1.iter().map(|stored| (place(stored), stored)).collect();
    let ever: BTreeMap<_, _> = everything.iter().map(|stored| (place(stored), stored)).collect();
    let (mut saved, mut all, mut replaced, mut again) = (0, 0, 0, 0);
    for round in 0..120 {
        let directory = TempDir::new().unwrap();
        let files = files[round % 2];
        let victim = random(files.len());
        for (at, (name, bytes)) in files.iter().enumerate() {
            let mut bytes = bytes.clone();
            if at == victim {
                for _ in 0..=random(4) {
                    let place = random(bytes.len());
                    match round / 2 % 3 {
                        0 => bytes[place] ^= 1 << random(8),
                        1 => {
                            let page = place / 1024 * 1024;
                            let end = bytes.len().min(page + 1024);
                            bytes[page..end].fill(if round % 4 < 2 { 0 } else { 0xff });
                        }
                        // Only once in a while, as it costs much.
                        _ if round % 10 == 0 => bytes.truncate(place.max(512)),
                        _ => bytes[place] = !bytes[place],
                    }
                }
            }
            fs::write(directory.path().join(name), bytes).unwrap();
        }
        let opened = open(directory.path());
        replaced += usize::from(opened.quarantined().is_some());
        let found = content(opened);
        for StoredSession { record, subscriptions, inbound, .. } in &found.0 {
            let known = expected.0.iter().find(|session| session.record == *record);
            let known = known.unwrap_or_else(|| panic!("round {round}: {record:?} is invented"));
            assert!(subscriptions.iter().all(|one| known.subscriptions.contains(one)), "round {round}");
            assert!(inbound.iter().all(|one| known.inbound.contains(one)), "round {round}");
        }
        assert!(found.1.is_sorted_by(|one, other| place(one) < place(other)), "round {round}: out of order");
        for stored in &found.1 {
            let is_left = left.get(&place(stored)) == Some(&stored);
            saved += usize::from(is_left);
            // Of one that is lost its receiver may be told to release it.
            if stored.1.state != StoredState::Released {
                assert_eq!(ever.get(&place(stored)), Some(&stored), "round {round}: invented");
                // The note that it is done with may be lost; to deliver it again is better than to lose one that is not.
                again += usize::from(!is_left);
            }
        }
        assert!(found.2.iter().all(|message| expected.2.contains(message)), "round {round}");
        all += expected.1.len();
    }
    assert!(replaced > 30, "{replaced}");
    assert!(again < 100, "{again}");
    assert!(saved * 100 > all * 90, "{saved} of {all} messages");
}

/// Writes over pages of the file of a database that may be in use.
fn lose_pages(directory: &TempDir, pages: std::ops::Range<u64>) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(database(directory)).unwrap();
    let page = [0xff; schema::PAGE_BYTES as usize];
    pages.for_each(|number| file.write_all_at(&page, (number - 1) * u64::from(schema::PAGE_BYTES)).unwrap());
}

/// More than SQLite keeps in memory, of two sessions.
fn large() -> (TempDir, Store) {
    let directory = filled_with(8000);
    let store = start(directory.path());
    let other = SessionId(2);
    let ops = (1..=50).map(|sequence| enqueue(other, sequence, message("other", "x"), None));
    keep(&store, std::iter::once(put(other)).chain(ops).collect());
    store.close();
    let store = start(directory.path());
    (directory, store)
}

#[test]
fn pages_lost_under_a_running_store_cost_what_lay_on_them_and_nobody_waits_for_a_restart() {
    let (directory, store) = large();
    lose_pages(&directory, 100..104);
    let saved = queued(&store, S);
    assert!((7900..8000).contains(&saved.len()) && saved.is_sorted(), "{}", saved.len());
    assert_eq!(store.0.stats.damaged.load(Ordering::Relaxed), 8000 - saved.len() as u64);
    assert_eq!(store.take_replaced(), Some(0));
    assert_eq!(store.take_replaced(), None);
    assert_eq!(queued(&store, SessionId(2)), (1..=50).collect::<Vec<_>>());
    assert_eq!(store.statuses()[0].health, crate::observe::Health::Degraded);
    keep(&store, vec![enqueue(S, 9000, message("t", "x"), None), Op::Remove { session: S, first: 1, last: 4000 }]);
    store.close();
    let opened = open(directory.path());
    assert_eq!(opened.quarantined(), None);
    let left = queued(&opened.run().unwrap(), S);
    assert_eq!(left, saved.into_iter().filter(|&sequence| sequence > 4000).chain([9000]).collect::<Vec<_>>());
    assert!(inspect::verify(directory.path()).unwrap().findings.is_empty());
}

#[test]
fn a_commit_that_meets_lost_pages_is_done_nevertheless() {
    let (directory, store) = large();
    lose_pages(&directory, 100..104);
    // Its rows cannot be deleted: where their rest lies is not known any more.
    keep(&store, vec![enqueue(S, 9000, message("t", "x"), None), Op::Remove { session: S, first: 1, last: 4000 }]);
    assert_eq!(queued(&store, S), (4001..=8000).chain([9000]).collect::<Vec<_>>());
    assert_eq!(queued(&store, SessionId(2)), (1..=50).collect::<Vec<_>>());
    assert!(!store.0.stats.is_failing());
}

/// A page that is lost is known to hold only rows of sessions where it is read; a running store knows them.
#[test]
fn sessions_whose_rows_are_lost_under_a_running_store_keep_their_queues() {
    let (directory, store) = large();
    let roots = schema::roots(&rusqlite::Connection::open(database(&directory)).unwrap()).unwrap();
    let root = u64::from(roots["session"]);
    lose_pages(&directory, root..root + 1);
    lose_pages(&directory, 100..104);
    assert!(queued(&store, S).len() > 7900);
    assert_eq!(queued(&store, SessionId(2)), (1..=50).collect::<Vec<_>>());
    keep(&store, vec![enqueue(S, 9000, message("t", "x"), None), put(S)]);
    store.close();
    let mut opened = open(directory.path());
    let sessions = opened.sessions().unwrap();
    assert_eq!(sessions[0].record, record(S));
    assert_eq!(queued(&opened.run().unwrap(), S).last(), Some(&9000));
}

#[test]
fn foreign_files_and_newer_databases_are_moved_aside() {
    let directory = TempDir::new().unwrap();
    fs::write(database(&directory), "store: of another program\n".repeat(100)).unwrap();
    assert!(check_is_moved_aside(&directory).is_empty());

    let directory = TempDir::new().unwrap();
    let foreign = rusqlite::Connection::open(database(&directory)).unwrap();
    foreign.execute_batch("CREATE TABLE message (id INTEGER); PRAGMA user_version = 1;").unwrap();
    drop(foreign);
    assert!(check_is_moved_aside(&directory).is_empty());

    let directory = filled();
    let newer = rusqlite::Connection::open(database(&directory)).unwrap();
    newer.pragma_update(None, "user_version", schema::VERSION + 1).unwrap();
    newer.close().unwrap();
    assert!(check_is_moved_aside(&directory).is_empty());

    let directory = filled();
    let incomplete = rusqlite::Connection::open(database(&directory)).unwrap();
    incomplete.execute_batch("DROP TABLE queue").unwrap();
    incomplete.close().unwrap();
    assert!(check_is_moved_aside(&directory).is_empty());
}

#[test]
fn an_empty_file_is_a_new_database() {
    let directory = TempDir::new().unwrap();
    fs::write(database(&directory), "").unwrap();
    assert_eq!(open(directory.path()).quarantined(), None);
}

#[test]
fn only_so_many_files_are_kept_aside() {
    let directory = TempDir::new().unwrap();
    for round in 0..8 {
        fs::write(database(&directory), format!("not a database {round}").repeat(100)).unwrap();
        let aside = open(directory.path()).quarantined().unwrap().to_owned();
        assert!(aside.exists());
    }
    let names = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let aside = names.filter(|name| name.to_string_lossy().contains(".corrupt-")).count();
    assert_eq!(aside, 5);
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Store::bind(settings(&file.join("store")), clock()).unwrap_err();
    assert!(matches!(error, OpenError::Directory { .. }), "{error}");
    let error = Store::bind(settings(Path::new("/proc/self")), clock()).unwrap_err();
    assert!(matches!(error, OpenError::Unwritable { .. }), "{error}");
}

#[test]
fn a_flipped_byte_costs_one_message_which_is_counted_and_set_aside() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let mut ops = vec![put(S), Op::PutRetained(message("r", "retained-payload"), None)];
    ops.extend((1..=40).map(|sequence| enqueue(S, sequence, message("t", format!("payload-{sequence:04}-end")), None)));
    keep(&store, ops);
    store.close();
    let mut bytes = fs::read(database(&directory)).unwrap();
    for text in [&b"payload-0017-end"[..], b"retained-payload"] {
        let at = bytes.windows(text.len()).position(|window| window == text).unwrap();
        bytes[at + 9] ^= 1;
    }
    fs::write(database(&directory), bytes).unwrap();

    let mut opened = open(directory.path());
    assert_eq!(opened.quarantined(), None, "damage in a message does not cost the database");
    opened.retained(&mut |message| panic!("{message:?} is delivered")).unwrap();
    let store = opened.run().unwrap();
    let whole: Vec<u64> = (1..=40).filter(|&sequence| sequence != 17).collect();
    assert_eq!(queued(&store, S), whole);
    assert_eq!(store.0.stats.damaged.load(Ordering::Relaxed), 1);
    // It is counted once, and what is left can be removed as ever.
    assert_eq!(queued(&store, S), whole);
    assert_eq!(store.0.stats.damaged.load(Ordering::Relaxed), 1);
    keep(&store, vec![Op::Remove { session: S, first: 1, last: 40 }]);
    store.close();
    let findings = inspect::verify(directory.path()).unwrap().findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].contains("table `damaged` holds them"), "{findings:?}");
    // Its receiver may have begun to take it.
    let session = &open(directory.path()).sessions().unwrap()[0];
    assert_eq!((session.queues[0].messages, &session.in_doubt), (0, &Some(vec![])));
}

/// A page may end within a run. What is damaged in the part of it that was read is not met again.
#[test]
fn damage_in_the_part_of_a_run_that_fits_into_a_page_is_counted_and_set_aside() {
    let directory = TempDir::new().unwrap();
    let store = start(directory.path());
    let ops = (1..=40).map(|sequence| enqueue(S, sequence, message("t", format!("payload-{sequence:04}-end")), None));
    keep(&store, std::iter::once(put(S)).chain(ops).collect());
    store.close();
    let mut bytes = fs::read(database(&directory)).unwrap();
    let at = bytes.windows(16).position(|window| window == b"payload-0017-end").unwrap();
    bytes[at + 9] ^= 1;
    fs::write(database(&directory), bytes).unwrap();

    let store = start(directory.path());
    let (mut from, mut found, mut in_doubt) = (0, Vec::new(), 0);
    loop {
        let page = load(&store, S, from, 25, usize::MAX);
        from = page.messages.last().map_or(from, |message| message.sequence + 1);
        in_doubt += u32::from(page.in_doubt);
        found.extend(page.messages.iter().map(|message| message.sequence));
        if page.complete {
            break;
        }
    }
    let whole: Vec<u64> = (1..=40).filter(|&sequence| sequence != 17).collect();
    assert_eq!(found, whole);
    assert_eq!(in_doubt, 1, "the session is told once");
    assert_eq!(store.0.stats.damaged.load(Ordering::Relaxed), 1);
}

/// A database as version 1 wrote it. Never changes: it stands for those in the field.
const VERSION_1: &str = "
    PRAGMA page_size = 2048; PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL;
    CREATE TABLE session (
        id INTEGER PRIMARY KEY, slot INTEGER NOT NULL, face INTEGER NOT NULL, client_id TEXT NOT NULL,
        user TEXT, expiry_millis INTEGER, detached_at INTEGER) STRICT;
    CREATE TABLE will (
        session INTEGER PRIMARY KEY, delay_millis INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
        flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL, extra BLOB) STRICT;
    CREATE TABLE subscription (
        session INTEGER NOT NULL, filter TEXT NOT NULL, options INTEGER NOT NULL, identifier INTEGER,
        PRIMARY KEY (session, filter)) STRICT, WITHOUT ROWID;
    CREATE TABLE inbound (
        session INTEGER NOT NULL, packet_id INTEGER NOT NULL,
        PRIMARY KEY (session, packet_id)) STRICT, WITHOUT ROWID;
    CREATE TABLE retained (
        topic TEXT PRIMARY KEY, payload BLOB NOT NULL, flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL,
        extra BLOB) STRICT, WITHOUT ROWID;
    CREATE TABLE queue (
        key INTEGER PRIMARY KEY, topic ANY, payload BLOB, flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL,
        extra BLOB) STRICT;
    CREATE TABLE topic (id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT;
    CREATE TABLE summary (
        slot INTEGER PRIMARY KEY, last INTEGER NOT NULL, messages INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
    PRAGMA application_id = 1179074900; PRAGMA user_version = 1;
    INSERT INTO session VALUES (9, 3, 1, 'plant', 'operator', 60000, 1793491200000);
    INSERT INTO will VALUES (9, 5000, 'gone', x'6f6666', 80, 1793491200000, NULL);
    INSERT INTO subscription VALUES (9, 'a/#', 2, 7);
    INSERT INTO inbound VALUES (9, 513);
    INSERT INTO retained VALUES ('state', x'6f6b', 84, 1793491200000, NULL);
    INSERT INTO topic VALUES (5, 'a/b');
    -- Slot 3: sequence 40 counted by the summary, 41 released, 42 behind it; slot 4 belongs to no session any more.
    INSERT INTO queue VALUES ((3 << 40) + 40, 5, x'3430', 33, 1793491200000, NULL);
    INSERT INTO queue VALUES ((3 << 40) + 41, NULL, NULL, 10, 0, NULL);
    INSERT INTO queue VALUES ((3 << 40) + 42, 'a/c', x'3432', 98, 1793491200001,
        x'07e803000000000000010007000000010126000161000162');
    INSERT INTO queue VALUES ((4 << 40) + 1, 5, x'3430', 33, 1793491200000, NULL);
    INSERT INTO summary VALUES (3, 41, 2, 5);
";

#[test]
fn a_database_of_version_1_is_read() {
    let directory = TempDir::new().unwrap();
    let old = rusqlite::Connection::open(database(&directory)).unwrap();
    old.execute_batch(VERSION_1).unwrap();
    old.close().unwrap();
    let error = inspect::show(directory.path()).unwrap_err();
    assert!(matches!(error, inspect::InspectError::Older(_)), "{error}");

    let mut opened = open(directory.path());
    assert_eq!(opened.quarantined(), None);
    let session = opened.sessions().unwrap().remove(0);
    let at = UnixMillis(1_793_491_200_000);
    let topic = |text: &str| TopicName::new(text).unwrap();
    let will = Message::new(topic("gone"), "off", QoS::AtLeastOnce, at).retained();
    let record = SessionRecord {
        id: SessionId(9),
        face: 1,
        client_id: "plant".into(),
        user: Some("operator".into()),
        expiry_interval: Some(Duration::from_secs(60)),
        detached_at: Some(at),
        will: Some(Box::new(WillRecord { message: will, delay: Duration::from_secs(5) })),
    };
    let subscription = StoredSubscription { filter: "a/#".into(), options: 2, identifier: Some(7) };
    let queue = QueueSummary { lane: 0, first: Some(40), last: Some(42), messages: 3, bytes: 5 + 7 };
    let expected = StoredSession {
        record,
        subscriptions: vec![subscription],
        inbound: vec![513],
        queues: vec![queue],
        in_doubt: None,
    };
    assert_eq!(session, expected);
    assert_eq!(inspect::show(directory.path()).unwrap().sessions, [expected]);
    assert!(inspect::verify(directory.path()).unwrap().findings.is_empty());
    let mut retained = Vec::new();
    opened.retained(&mut |message| retained.push(message)).unwrap();
    assert_eq!(retained, [Message::new(topic("state"), "ok", QoS::AtLeastOnce, at).retained()]);

    let page = load(&opened.run().unwrap(), SessionId(9), 0, 10, 1000);
    let first = Message::new(topic("a/b"), "40", QoS::ExactlyOnce, at);
    assert_eq!(page.messages[0].qos, QoS::AtLeastOnce);
    assert_eq!(page.messages[0].state, StoredState::Queued(Arc::new(first)));
    assert_eq!((page.messages[1].qos, &page.messages[1].state), (QoS::ExactlyOnce, &StoredState::Released));
    let mut rich = Message::new(topic("a/c"), "42", QoS::ExactlyOnce, UnixMillis(1_793_491_200_001)).retained();
    rich.expiry_interval = Some(Duration::from_secs(1));
    let user_properties = vec![("a".into(), "b".into())];
    let properties = crate::message::Properties {
        payload_is_utf8: Some(true),
        user_properties,
        ..crate::message::Properties::default()
    };
    rich.properties = Some(Box::new(properties));
    let expected = StoredMessage {
        sequence: 42,
        qos: QoS::ExactlyOnce,
        retain: false,
        identifiers: Some([7].into()),
        shared: None,
        state: StoredState::Queued(Arc::new(rich)),
    };
    assert_eq!(page.messages[2], expected);
}

/// What version 2 added to a database of version 1.
const VERSION_2: &str = "
    CREATE TABLE lane (
        session INTEGER NOT NULL, lane INTEGER NOT NULL, slot INTEGER NOT NULL,
        PRIMARY KEY (session, lane)) STRICT, WITHOUT ROWID;
    PRAGMA user_version = 2;
    INSERT INTO lane VALUES (9, 2, 5);
    INSERT INTO queue VALUES ((5 << 40) + 7, 5, x'3037', 17, 1793491200000, NULL);
    INSERT INTO queue VALUES ((5 << 40) + 9, 5, x'3039', 17, 1793491200000, NULL);
    INSERT INTO summary VALUES (5, 11, 2, 10);
";

#[test]
fn a_database_of_version_2_is_read() {
    let directory = TempDir::new().unwrap();
    let old = rusqlite::Connection::open(database(&directory)).unwrap();
    old.execute_batch(VERSION_1).unwrap();
    old.execute_batch(VERSION_2).unwrap();
    old.close().unwrap();

    let mut opened = open(directory.path());
    assert_eq!(opened.quarantined(), None);
    let session = opened.sessions().unwrap().remove(0);
    let at = |number| Some(first_sequence(2) | number);
    let second = QueueSummary { lane: 2, first: at(7), last: at(11), messages: 2, bytes: 10 };
    assert_eq!((session.queues[0].messages, session.queues[1]), (3, second));
    let store = opened.run().unwrap();
    let page = load(&store, SessionId(9), first_sequence(2), 10, 1000);
    let payloads = page.messages.iter().map(|stored| match &stored.state {
        StoredState::Queued(message) => String::from_utf8(message.payload.to_vec()).unwrap(),
        StoredState::Released => "released".into(),
    });
    assert_eq!(payloads.collect::<Vec<_>>(), ["07", "09"]);
    store.close();
    assert!(inspect::verify(directory.path()).unwrap().findings.is_empty());
}

/// A database as version 3 wrote it.
const VERSION_3: &str = "
    PRAGMA page_size = 1024; PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL;
    CREATE TABLE session (
        id INTEGER PRIMARY KEY, slot INTEGER NOT NULL, face INTEGER NOT NULL, client_id TEXT NOT NULL,
        user TEXT, expiry_millis INTEGER, detached_at INTEGER) STRICT;
    CREATE TABLE will (
        session INTEGER PRIMARY KEY, delay_millis INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
        flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL, extra BLOB, sum INTEGER NOT NULL DEFAULT 0) STRICT;
    CREATE TABLE subscription (
        session INTEGER NOT NULL, filter TEXT NOT NULL, options INTEGER NOT NULL, identifier INTEGER,
        PRIMARY KEY (session, filter)) STRICT, WITHOUT ROWID;
    CREATE TABLE inbound (
        session INTEGER NOT NULL, packet_id INTEGER NOT NULL,
        PRIMARY KEY (session, packet_id)) STRICT, WITHOUT ROWID;
    CREATE TABLE retained (
        topic TEXT PRIMARY KEY, payload BLOB NOT NULL, flags INTEGER NOT NULL, accepted_at INTEGER NOT NULL,
        extra BLOB, sum INTEGER NOT NULL DEFAULT 0) STRICT, WITHOUT ROWID;
    CREATE TABLE topic (id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT;
    CREATE TABLE summary (
        slot INTEGER PRIMARY KEY, last INTEGER NOT NULL, messages INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
    CREATE TABLE lane (
        session INTEGER NOT NULL, lane INTEGER NOT NULL, slot INTEGER NOT NULL,
        PRIMARY KEY (session, lane)) STRICT, WITHOUT ROWID;
    CREATE TABLE queue (
        key INTEGER PRIMARY KEY, span INTEGER NOT NULL, messages INTEGER NOT NULL, bytes INTEGER NOT NULL,
        accepted_at INTEGER NOT NULL, lasted INTEGER NOT NULL, expires_at INTEGER, frames BLOB NOT NULL) STRICT;
    CREATE INDEX queue_expiry ON queue (key >> 40, expires_at) WHERE expires_at IS NOT NULL;
    CREATE TABLE gone (first INTEGER PRIMARY KEY, last INTEGER NOT NULL, sum INTEGER NOT NULL) STRICT;
    CREATE TABLE released (key INTEGER PRIMARY KEY) STRICT;
    CREATE TABLE damaged (
        id INTEGER PRIMARY KEY, found_at INTEGER NOT NULL, key INTEGER NOT NULL, span INTEGER NOT NULL,
        accepted_at INTEGER NOT NULL, frames BLOB NOT NULL) STRICT;
    PRAGMA application_id = 1179074900; PRAGMA user_version = 3;
    INSERT INTO session VALUES (9, 3, 1, 'plant', NULL, 60000, NULL);
    INSERT INTO will VALUES (9, 5000, 'gone', x'6f6666', 80, 1793491200000, NULL, 2914335305);
    INSERT INTO subscription VALUES (9, 'a/#', 2, 7);
    INSERT INTO inbound VALUES (9, 513);
    INSERT INTO retained VALUES ('state', x'6f6b', 84, 1793491200000, NULL, 3818536262);
    INSERT INTO topic VALUES (5, 'a/b');
    INSERT INTO lane VALUES (9, 2, 4);
    INSERT INTO summary VALUES (3, 42, 2, 5);
    -- Numbers 40 and 42, of which the second is done with; 41 is released.
    INSERT INTO queue VALUES ((3 << 40) + 42, 2, 2, 10, 1793491200000, 0, NULL,
        x'cd87c72f21000005023430bf2a28f622020005023432');
    INSERT INTO gone VALUES ((3 << 40) + 42, (3 << 40) + 42, 2911380781);
    INSERT INTO released VALUES ((3 << 40) + 41);
";

#[test]
fn a_database_of_version_3_is_read() {
    let directory = TempDir::new().unwrap();
    let old = rusqlite::Connection::open(database(&directory)).unwrap();
    old.execute_batch(VERSION_3).unwrap();
    old.close().unwrap();

    let opened = open(directory.path());
    assert_eq!(opened.quarantined(), None);
    let (sessions, messages, retained) = content(opened);
    let session = &sessions[0];
    assert!(session.record.will.is_some());
    assert_eq!((session.subscriptions.len(), &session.inbound, session.queues.len()), (1, &vec![513], 2));
    let found: Vec<_> = messages.iter().map(|(_, message)| (message.sequence, message.qos)).collect();
    assert_eq!(found, [(40, QoS::AtLeastOnce), (41, QoS::ExactlyOnce)]);
    assert_eq!(retained.len(), 1);
    assert!(inspect::verify(directory.path()).unwrap().findings.is_empty());
}

/// What version 4 added to a database of version 3. Never changes either.
const FROM_VERSION_3_TO_4: &str = "
    ALTER TABLE session ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE lane ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE subscription ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE inbound ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE released ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE summary ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    UPDATE session SET sum = 1902971467;
    UPDATE lane SET sum = 2227352527;
    UPDATE subscription SET sum = 1530987637;
    UPDATE inbound SET sum = 2956615942;
    UPDATE released SET sum = 277510715;
    UPDATE summary SET sum = 2291268576;
    PRAGMA user_version = 4;
";

#[test]
fn a_database_of_version_4_is_read_and_what_is_damaged_of_it_is_saved() {
    let check = |change: &str| {
        let directory = TempDir::new().unwrap();
        let old = rusqlite::Connection::open(database(&directory)).unwrap();
        old.execute_batch(VERSION_3).unwrap();
        old.execute_batch(FROM_VERSION_3_TO_4).unwrap();
        old.execute_batch(change).unwrap();
        old.close().unwrap();
        let opened = open(directory.path());
        let is_whole = opened.quarantined().is_none();
        let (sessions, messages, retained) = content(opened);
        let session = &sessions[0];
        assert_eq!((session.inbound.len(), session.queues.len(), messages.len(), retained.len()), (1, 2, 2, 1));
        assert!(inspect::verify(directory.path()).unwrap().findings.is_empty());
        (is_whole, session.in_doubt.clone())
    };
    assert_eq!(check(""), (true, None));
    assert_eq!(check("UPDATE subscription SET sum = 1"), (false, Some(vec![])));
}

/// What is in doubt stays so until that is cleared up, lane by lane.
#[test]
fn after_damage_sessions_are_in_doubt() {
    let directory = filled();
    let path = database(&directory);
    let changed = rusqlite::Connection::open(&path).unwrap();
    changed.execute("UPDATE summary SET sum = sum + 1", []).unwrap();
    changed.close().unwrap();
    let mut opened = open(directory.path());
    assert!(opened.quarantined().is_some());
    assert_eq!(opened.sessions().unwrap()[0].in_doubt, Some(vec![]));
    let store = opened.run().unwrap();
    let cleared = |first: u64, below| Cleared { below: first + below, until: first + 500 };
    let lane = first_sequence(3);
    let clear = |cleared| Op::Clear { session: S, cleared, receipt: None };
    keep(&store, vec![clear(cleared(0, 7)), clear(cleared(lane, 8))]);
    keep(&store, vec![clear(cleared(0, 500)), put(S), put(SessionId(5))]);
    store.close();
    let mut opened = open(directory.path());
    assert_eq!(opened.quarantined(), None);
    let sessions = opened.sessions().unwrap();
    assert_eq!(sessions[0].in_doubt, Some(vec![cleared(0, 500), cleared(lane, 8)]));
    assert_eq!(sessions[1].in_doubt, None, "it is new");
    let store = opened.run().unwrap();
    keep(&store, vec![Op::DropSession(S)]);
    keep(&store, vec![put(S)]);
    store.close();
    assert_eq!(open(directory.path()).sessions().unwrap()[0].in_doubt, None);
}

/// A row of each small table changed behind the back of its check: it is left out, all else is kept.
#[test]
fn a_damaged_row_of_a_small_table_costs_that_row() {
    let check = |change: &str, sessions: usize, messages: usize| {
        let directory = TempDir::new().unwrap();
        let old = rusqlite::Connection::open(database(&directory)).unwrap();
        old.execute_batch(VERSION_3).unwrap();
        old.close().unwrap();
        drop(open(directory.path()));
        let changed = rusqlite::Connection::open(database(&directory)).unwrap();
        assert_eq!(changed.execute(change, []).unwrap(), 1, "{change}");
        changed.close().unwrap();
        assert!(!inspect::verify(directory.path()).unwrap().findings.is_empty(), "{change}");
        let opened = open(directory.path());
        assert!(opened.quarantined().is_some(), "{change}");
        let (found, queued, retained) = content(opened);
        assert_eq!((found.len(), queued.len(), retained.len()), (sessions, messages, 1), "{change}");
        found.into_iter().next()
    };
    assert_eq!(check("UPDATE session SET client_id = 'plane'", 0, 0), None);
    assert_eq!(check("UPDATE session SET slot = 5", 0, 0), None);
    assert_eq!(check("UPDATE lane SET slot = 7", 1, 2).unwrap().queues.len(), 1);
    assert!(check("UPDATE subscription SET filter = 'b/#'", 1, 2).unwrap().subscriptions.is_empty());
    assert!(check("UPDATE inbound SET packet_id = 512", 1, 2).unwrap().inbound.is_empty());
    let session = check("UPDATE summary SET messages = 1 << 50", 1, 2).unwrap();
    assert_eq!((session.queues[0].messages, session.queues[0].bytes, session.queues[0].last), (2, 5, Some(42)));
    let session = check("UPDATE released SET key = key + 8", 1, 1).unwrap();
    assert_eq!(session.in_doubt, Some(vec![]), "its receiver may hold an identifier");
    assert_eq!(check("UPDATE subscription SET options = 1", 1, 2).unwrap().in_doubt, Some(vec![]));
}

#[test]
fn a_damaged_database_gives_up_what_can_be_read() {
    let directory = filled();
    let path = database(&directory);
    let whole = fs::read(&path).unwrap();
    let export = |client_id: Option<&str>| {
        let mut out = Vec::new();
        let exported = inspect::export(&path, client_id, &mut out).unwrap();
        (exported, String::from_utf8(out).unwrap())
    };
    let (exported, text) = export(None);
    assert_eq!(exported, inspect::Exported { messages: 200, unreadable: 0 });
    let first = text.lines().next().unwrap();
    assert!(first.contains(r#""client_id":"client-1""#) && first.contains(r#""sequence":1"#), "{first}");
    assert_eq!(export(Some("client-1")).0.messages, 200);
    let unknown = inspect::export(&path, Some("client-2"), &mut Vec::new());
    assert!(matches!(unknown, Err(inspect::InspectError::NoSession(_))), "{unknown:?}");

    let mut bytes = whole;
    let middle = bytes.len() / 2 / 2048 * 2048;
    bytes[middle..middle + 2048].fill(0xff);
    fs::write(&path, bytes).unwrap();
    let (exported, text) = export(None);
    // Two runs of 15 messages lie on these pages.
    assert!((165..200).contains(&exported.messages), "{exported:?}");
    assert!(exported.unreadable > 0);
    assert_eq!(text.lines().count() as u64, exported.messages);
    assert!(!inspect::verify(&path).unwrap().findings.is_empty());
}

#[test]
fn queues_are_shown_and_purged_from_outside() {
    let directory = filled();
    let overview = inspect::show(directory.path()).unwrap();
    assert!(overview.oldest.contains_key(&S) && overview.database > overview.free, "{overview:?}");
    let shown = overview.sessions;
    assert_eq!((shown[0].queues[0].messages, shown[0].queues[0].bytes), (200, 200 * 510));
    let settings = settings(directory.path());
    let error = inspect::purge(&settings, Some("nobody"), &clock()).unwrap_err();
    assert!(matches!(error, inspect::InspectError::NoSession(_)), "{error}");
    let store = start(directory.path());
    assert_eq!(inspect::show(directory.path()).unwrap().sessions, shown);
    let error = inspect::purge(&settings, None, &clock()).unwrap_err();
    assert!(matches!(error, inspect::InspectError::InUse { .. }), "{error}");
    store.close();
    assert_eq!(inspect::purge(&settings, Some("client-1"), &clock()).unwrap(), 200);
    let queue = QueueSummary { lane: 0, first: None, last: Some(200), messages: 0, bytes: 0 };
    assert_eq!(inspect::show(directory.path()).unwrap().sessions[0].queues, [queue]);
    assert!(inspect::verify(directory.path()).unwrap().findings.is_empty());
}
