//! Disks that fail, through MQTT clients and the real program: what needs no disk goes on, what cannot be kept is refused,
//! it recovers by itself, and nothing that was acknowledged is lost (promises 1, 3 and 6).
//!
//! `fault.c` stands between the program and its files; full file systems that are real ones are in
//! `tests/peers/test_disk.py`.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod client;
mod fault;
#[path = "../crash/gateway.rs"]
#[allow(dead_code, reason = "the crash harness uses the rest")]
mod gateway;
#[path = "../crash/packets.rs"]
mod packets;

use std::thread;
use std::time::{Duration, Instant};

use client::{Answer, Client, Session, Version, brief};
use fault::{ALWAYS, Disk, EIO, ENOSPC, EROFS, Fault};
use gateway::Gateway;
use tempfile::TempDir;

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(30);

const CONFIG: &str = "store: { directory: data }\nweb: { address: \"127.0.0.1:0\" }\nlimits: { when_full: reject }\n\
                      listeners: [ { name: local, address: 127.0.0.1:{port} } ]\n";

/// A gateway on such a disk, with a lasting session that is away and keeps `keep/#`.
struct Scene {
    disk: Disk,
    gateway: Gateway,
    /// What was acknowledged, in order: a number each, which begins the payload.
    kept: Vec<u32>,
    next: u32,
    _root: TempDir,
}

/// How the gateway ends before what it has kept is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Killed,
    /// As `Killed`, and of the files there is what had been synced.
    PowerCut,
}

impl Scene {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let disk = Disk::new(root.path());
        let gateway = Gateway::start_new(root.path(), CONFIG.into(), disk.under());
        let mut keeper = Client::connect(gateway.port, "keeper", Version::V5, Session::Lasting);
        assert_eq!(keeper.subscribe("keep/#", 2), Answer::KEPT);
        Self { disk, gateway, kept: Vec::new(), next: 0, _root: root }
    }

    fn client(&self, id: &str, version: Version, session: Session) -> Client {
        Client::connect(self.gateway.port, id, version, session)
    }

    /// Publishes the next message for the session that is away.
    fn publish(&mut self, publisher: &mut Client, qos: u8, size: usize) -> Answer {
        let number = self.next;
        self.next += 1;
        let answer = publisher.publish(qos, "keep/it", &format!("{number} {}", "x".repeat(size)));
        if answer == Answer::KEPT {
            self.kept.push(number);
        }
        answer
    }

    fn is_failing(&self) -> bool {
        self.gateway.metric("fieldgate_store_failing", "") == 1
    }

    fn failures(&self, kind: &str) -> u64 {
        self.gateway.metric("fieldgate_store_failures_total", &format!("kind=\"{kind}\""))
    }

    fn health(&self) -> String {
        self.gateway.get("/healthz")
    }

    /// QoS 0, and QoS 1 and 2 for those whose session ends with their connection, need no disk.
    fn serves_what_needs_no_disk(&self) {
        let mut receiver = self.client("receiver", Version::V3_1_1, Session::Clean);
        assert_eq!(receiver.subscribe("live/#", 2), Answer::KEPT);
        let mut sender = self.client("sender", Version::V5, Session::Clean);
        for qos in 0..3 {
            assert_eq!(sender.publish(qos, "live/now", &qos.to_string()), Answer::KEPT, "QoS {qos}");
        }
        receiver.hear_until(|heard| heard.len() == 3);
        assert_eq!(receiver.heard, ["0", "1", "2"]);
    }

    /// Waits until it is over; the time is far below [`PATIENCE`] on a machine that has nothing else to do.
    #[track_caller]
    fn recovers(&mut self, publisher: &mut Client) {
        self.disk.mend();
        until("the store writes again", || !self.is_failing());
        self.recovered(publisher);
    }

    #[track_caller]
    fn recovered(&mut self, publisher: &mut Client) {
        assert_eq!(self.publish(publisher, 1, 10), Answer::KEPT, "{}", self.gateway.last_lines());
        assert_eq!(self.publish(publisher, 2, 10), Answer::KEPT, "{}", self.gateway.last_lines());
        assert!(self.health().starts_with("HTTP/1.1 200"), "{}", self.health());
    }

    /// Ends it, starts it again, and holds what comes against what was acknowledged.
    #[track_caller]
    fn nothing_is_lost(mut self, ending: Ending, what: &str) {
        self.gateway.kill();
        if ending == Ending::PowerCut {
            self.disk.cut_power();
        }
        self.gateway.start();
        let mut keeper = self.client("keeper", Version::V5, Session::Lasting);
        let last = self.kept.last().expect("something was kept").to_string();
        keeper.hear_until(|heard| brief(heard).last() == Some(&&*last));
        let numbers: Vec<u32> = brief(&keeper.heard).iter().map(|number| number.parse().unwrap()).collect();
        let errors = self.gateway.errors();
        assert!(!errors.iter().any(|error| error.contains("moved aside")), "{what}: {errors:?}");
        // What was refused may have come, but nothing that was acknowledged may be missing, out of place or twice there.
        let acknowledged: Vec<u32> = numbers.iter().copied().filter(|number| self.kept.contains(number)).collect();
        assert_eq!(acknowledged, self.kept, "{what}, {ending:?}");
    }
}

/// A fault, what it is called in the metrics, and how large the messages must be that make it happen.
const FAULTS: &[(&str, Fault, &str, usize)] = &[
    ("every sync of the log fails", fault("sync", EIO, "-wal", 0, ALWAYS), "io", 10),
    ("one sync of the log fails", fault("sync", EIO, "-wal", 0, 1), "io", 2000),
    ("the log cannot be written", fault("write", EIO, "-wal", 0, ALWAYS), "io", 10),
    ("the log fails within a transaction", fault("write", EIO, "-wal", 5, ALWAYS), "io", 2000),
    ("the log is full within a transaction", fault("write", ENOSPC, "-wal", 7, ALWAYS), "full", 2000),
    ("everything is full", fault("open,write", ENOSPC, "*", 0, ALWAYS), "full", 10),
    ("everything is read-only", fault("open,write,sync,truncate", EROFS, "*", 0, ALWAYS), "read_only", 10),
    ("nothing can be written or synced", fault("open,write,sync,truncate", EIO, "*", 0, ALWAYS), "io", 10),
];

const fn fault(calls: &'static str, errno: i32, file: &'static str, skip: u32, count: u32) -> Fault {
    Fault { calls, errno, file, skip, count }
}

#[test]
fn what_cannot_be_kept_is_refused_the_rest_goes_on_and_it_recovers() {
    in_parallel(FAULTS, |&(what, fault, kind, size)| {
        for ending in [Ending::Killed, Ending::PowerCut] {
            let mut scene = Scene::new();
            let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
            for qos in [1, 2, 1, 2] {
                assert_eq!(scene.publish(&mut publisher, qos, size), Answer::KEPT);
            }
            scene.disk.fail(fault);
            let refused = (0..50).map(|turn| scene.publish(&mut publisher, 1 + turn % 2, size));
            let refused = { refused }.find(|answer| *answer != Answer::KEPT);
            assert_eq!(refused, Some(Answer::REFUSED), "{what}: {}", scene.gateway.last_lines());
            assert!(scene.failures(kind) > 0, "{what}: {}", scene.gateway.last_lines());
            until(what, || scene.gateway.errors().iter().any(|error| error.contains("the store cannot write")));
            if fault.count == ALWAYS {
                assert!(scene.health().starts_with("HTTP/1.1 503"), "{what}: {}", scene.health());
                scene.serves_what_needs_no_disk();
                for qos in [2, 1] {
                    assert_eq!(scene.publish(&mut publisher, qos, size), Answer::REFUSED, "{what}");
                }
                // 3.1.1 has no word for it: no acknowledgement, and the connection is closed.
                let mut older = scene.client("older", Version::V3_1_1, Session::Lasting);
                assert_eq!(scene.publish(&mut older, 1, size), Answer::Closed, "{what}");
            }
            scene.recovers(&mut publisher);
            scene.nothing_is_lost(ending, what);
        }
    });
}

/// Killed while it fails: what failed last stands in the log whole, as if it had been committed, and must not come back.
/// An inbound QoS 2 identifier that did would swallow the next message under it.
#[test]
fn a_refused_qos_2_message_leaves_no_identifier_behind() {
    // Where the log cannot be cut for good nobody is told: see below.
    let told: Vec<_> = FAULTS.iter().filter(|(_, fault, ..)| (fault.calls, fault.count) != ("sync", ALWAYS)).collect();
    in_parallel(&told, |&&(what, fault, _, size)| {
        let mut scene = Scene::new();
        let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
        assert_eq!(scene.publish(&mut publisher, 1, size), Answer::KEPT);
        scene.disk.fail(fault);
        let refused =
            (0..50).map(|_| publisher.publish_as(500, 2, "keep/it", &format!("refused {}", "x".repeat(size))));
        let refused = { refused }.find(|answer| *answer != Answer::KEPT);
        assert_eq!(refused, Some(Answer::REFUSED), "{what}");
        scene.gateway.kill();
        scene.disk.mend();
        scene.gateway.start();
        let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
        scene.next += 1;
        scene.kept.push(scene.next);
        let payload = format!("{} {}", scene.next, "x".repeat(size));
        assert_eq!(publisher.publish_as(500, 2, "keep/it", &payload), Answer::KEPT, "{what}");
        let mut keeper = scene.client("keeper", Version::V5, Session::Lasting);
        let last = scene.next.to_string();
        keeper.hear_until(|heard| brief(heard).last() == Some(&&*last));
    });
}

/// Where what failed can neither be synced nor cut off the log, it comes back with a kill, and its QoS 2 identifier too. Its
/// publisher is told nothing as long as that is so, and can send the same message again: it is there once, and the next
/// one under the identifier too.
#[test]
fn what_may_come_back_is_not_called_refused() {
    in_parallel(&["sync", "sync,truncate"], |&calls| {
        for is_killed in [true, false] {
            let mut scene = Scene::new();
            let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
            assert_eq!(scene.publish(&mut publisher, 1, 10), Answer::KEPT);
            scene.disk.fail(fault(calls, EIO, "-wal", 0, ALWAYS));
            publisher.begin_publish(500, 2, "keep/it", "1 first").unwrap();
            until("it fails", || scene.gateway.metric("fieldgate_store_refused_total", "") > 0);
            // What was never written is refused at once.
            let mut other = scene.client("other", Version::V5, Session::Lasting);
            assert_eq!(other.publish_as(500, 2, "keep/it", "9 other"), Answer::REFUSED, "{calls}");
            if is_killed {
                scene.gateway.kill();
                assert_eq!(publisher.answer(0x50, 500), Answer::Closed, "{calls}");
                scene.disk.mend();
                scene.gateway.start();
                publisher = scene.client("publisher", Version::V5, Session::Lasting);
            } else {
                scene.disk.mend();
                assert_eq!(publisher.answer(0x50, 500), Answer::REFUSED, "{calls}");
                until("the store writes again", || !scene.is_failing());
            }
            assert_eq!(publisher.publish_as(500, 2, "keep/it", "1 first"), Answer::KEPT, "{calls}");
            assert_eq!(publisher.publish_as(500, 2, "keep/it", "2 second"), Answer::KEPT, "{calls}");
            scene.kept.extend([1, 2]);
            scene.nothing_is_lost(Ending::Killed, calls);
        }
    });
}

/// One sync fails while the rest of a window comes in: what comes behind the message that was refused is refused too, so
/// that its publisher can send all of it again and it still arrives in order, once.
#[test]
fn what_is_sent_again_after_a_refusal_keeps_its_place() {
    in_parallel(&[Version::V3_1_1, Version::V5], |&version| {
        let mut scene = Scene::new();
        let mut publisher = scene.client("publisher", version, Session::Lasting);
        for window in 0..5 {
            let mut wanted: Vec<u32> = (window * 10..window * 10 + 10).collect();
            until("the store writes", || !scene.is_failing());
            scene.disk.fail(fault("sync", EIO, "-wal", 0, 1));
            let mut is_again = false;
            while !wanted.is_empty() {
                let (taken, is_connected) = publisher.publish_many(&wanted, is_again);
                let first = wanted.iter().position(|number| !taken.contains(number)).unwrap_or(wanted.len());
                assert_eq!(taken, wanted[..first], "{version:?}: some that was behind a refused one was accepted");
                wanted.drain(..first);
                // While it fails the first is refused at once, and a client of 5.0 knows before it sends the next.
                until("the store writes again", || !scene.is_failing());
                is_again = !is_connected;
                if !is_connected {
                    publisher = scene.client("publisher", version, Session::Lasting);
                }
            }
            scene.disk.mend();
        }
        scene.kept = (0..50).collect();
        let refused = scene.gateway.metric("fieldgate_store_refused_total", "");
        assert!(refused > 0, "no message was refused");
        let mut keeper = scene.client("keeper", Version::V5, Session::Lasting);
        keeper.hear_until(|heard| brief(heard).contains(&"49"));
        let expected: Vec<String> = (0..50).map(|number: u32| number.to_string()).collect();
        assert_eq!(brief(&keeper.heard), expected, "{version:?}");
    });
}

/// The gateway starts although its disk cannot be used, serves what needs none, and takes up what is stored once it can.
#[test]
fn it_starts_on_a_disk_that_cannot_be_used() {
    let faults = [
        ("full", fault("open,write", ENOSPC, "*", 0, ALWAYS)),
        ("read_only", fault("open,write,sync,truncate", EROFS, "*", 0, ALWAYS)),
        ("io", fault("open,read,write,sync,truncate", EIO, "*", 0, ALWAYS)),
    ];
    in_parallel(&faults, |&(kind, fault)| {
        let mut scene = Scene::new();
        let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
        assert_eq!(scene.publish(&mut publisher, 1, 10), Answer::KEPT);
        assert_eq!(scene.publish(&mut publisher, 2, 10), Answer::KEPT);
        scene.gateway.kill();
        scene.disk.fail(fault);
        scene.gateway.start();
        assert!(scene.health().starts_with("HTTP/1.1 503"), "{kind}: {}", scene.health());
        assert!(scene.failures(kind) > 0, "{kind}: {}", scene.gateway.last_lines());
        let mut receiver = scene.client("receiver", Version::V3_1_1, Session::Clean);
        assert_eq!(receiver.subscribe("live/#", 0), Answer::KEPT);
        // Which stored session wants a message is not known.
        let mut sender = scene.client("sender", Version::V5, Session::Clean);
        assert_eq!(sender.publish(0, "live/now", "here"), Answer::KEPT);
        assert_eq!(sender.publish(1, "keep/it", "refused"), Answer::REFUSED);
        assert_eq!(sender.publish(2, "keep/it", "refused"), Answer::REFUSED);
        receiver.hear_until(|heard| heard == ["here"]);
        let lasting = |version| Client::try_connect(scene.gateway.port, "keeper", version, Session::Lasting).unwrap();
        assert_eq!(lasting(Version::V5).err(), Some(0x88), "server unavailable");
        assert_eq!(lasting(Version::V3_1_1).err(), Some(3), "server unavailable");

        scene.disk.mend();
        until("the store is used", || !scene.is_failing());
        let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
        scene.recovered(&mut publisher);
        scene.nothing_is_lost(Ending::PowerCut, kind);
    });
}

/// What cannot be read waits, and comes when it can be.
#[test]
fn what_cannot_be_read_waits() {
    let mut scene = Scene::new();
    let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
    for _ in 0..150 {
        assert_eq!(scene.publish(&mut publisher, 1, 50_000), Answer::KEPT);
    }
    // After a start the messages are on the disk only, and more than SQLite has in memory.
    scene.gateway.kill();
    scene.gateway.start();
    scene.disk.fail(fault("read", EIO, "*", 0, ALWAYS));
    let mut keeper = scene.client("keeper", Version::V5, Session::Lasting);
    until("reading fails", || scene.gateway.metric("fieldgate_store_unread_pages", "") == 1);
    scene.serves_what_needs_no_disk();
    let failed = scene.gateway.errors().len();
    scene.disk.mend();
    keeper.hear_until(|heard| heard.len() == 150);
    assert!(failed < 20, "it is told once for each try");
    assert_eq!(scene.gateway.metric("fieldgate_store_unread_pages", ""), 0);
}

/// The log cannot be moved into the database: what it takes is kept, and the database has it in the end.
#[test]
fn a_database_that_cannot_be_written_does_not_stop_the_log() {
    for (calls, errno) in [("write", ENOSPC), ("sync", EIO)] {
        let mut scene = Scene::new();
        let mut publisher = scene.client("publisher", Version::V5, Session::Lasting);
        scene.disk.fail(fault(calls, errno, ".db", 0, ALWAYS));
        let mut answers = (0..300).map(|_| scene.publish(&mut publisher, 1, 50_000)).collect::<Vec<_>>();
        answers.dedup();
        assert_eq!(answers[0], Answer::KEPT);
        assert!(scene.is_failing(), "{calls}");
        scene.recovers(&mut publisher);
        scene.nothing_is_lost(Ending::PowerCut, calls);
    }
}

#[track_caller]
fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Runs `check` for each of `cases`, on threads of their own.
fn in_parallel<T: Sync>(cases: &[T], check: impl Fn(&T) + Sync) {
    thread::scope(|scope| {
        let running: Vec<_> = cases.iter().map(|case| scope.spawn(|| check(case))).collect();
        let failed = running.into_iter().filter_map(|run| run.join().err()).next();
        if let Some(panic) = failed {
            std::panic::resume_unwind(panic);
        }
    });
}
