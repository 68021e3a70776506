//! What a gateway writes to its disk in the situations it lives in, as bytes and syncs a message and a day.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::gateway::{Bridge, Gateway, Line};
use super::sink::Sink;
use crate::brokers::free_port;
use crate::client::{self, Session};
use crate::load::{self, Trickle};
use crate::process;

/// What is written once after a start, the sessions and the first topics, is not what is measured.
const SETTLED: Duration = Duration::from_secs(3);
/// How long what was put off may take to be written.
const PUT_OFF: Duration = Duration::from_secs(3);
const SECONDS_A_DAY: f64 = 86_400.0;

/// Where the upstream is.
#[derive(Clone, Copy)]
enum Uplink {
    /// Its acknowledgements take so long.
    Up(Duration),
    Down,
    /// Up and down for so long in turn, and next to the gateway.
    Flapping(Duration),
}

/// What the gateway's clients do.
#[derive(Clone, Copy)]
enum Clients {
    Nothing,
    Publish(Trickle),
    /// Come with a session that is kept, one a second of ten, and go.
    ComeAndGo,
}

/// Each situation for `seconds`, and the drain of `backlog` messages.
pub fn run(fieldgate: &Path, seconds: u64, backlog: u64) {
    let trickle = |rate| Trickle::new(rate, seconds);
    let retained = |rate, qos| Clients::Publish(Trickle { retain: true, qos, topics: 100, ..trickle(rate) });
    let up = |millis| Uplink::Up(Duration::from_millis(millis));
    let flapping = Uplink::Flapping(Duration::from_secs(2));
    use Bridge::{Commit, Interval};
    println!("{}", Cost::HEAD);
    for (name, bridge, uplink, clients) in [
        ("idle", Commit, up(0), Clients::Nothing),
        ("10 a second, uplink acknowledges at once", Commit, up(0), Clients::Publish(trickle(10))),
        ("10 a second, after 80 ms", Commit, up(80), Clients::Publish(trickle(10))),
        ("100 a second, after 80 ms", Commit, up(80), Clients::Publish(trickle(100))),
        ("10 a second, after 800 ms", Commit, up(800), Clients::Publish(trickle(10))),
        ("10 a second, uplink up and down every 2 s", Commit, flapping, Clients::Publish(trickle(10))),
        ("1 a second, uplink down", Commit, Uplink::Down, Clients::Publish(trickle(1))),
        ("10 a second, uplink down", Commit, Uplink::Down, Clients::Publish(trickle(10))),
        ("100 a second, uplink down", Commit, Uplink::Down, Clients::Publish(trickle(100))),
        ("10 a second, uplink down, `interval`", Interval, Uplink::Down, Clients::Publish(trickle(10))),
        ("100 a second, uplink down, `interval`", Interval, Uplink::Down, Clients::Publish(trickle(100))),
        ("100 a second on 100 topics, retained, QoS 0", Commit, up(0), retained(100, 0)),
        ("10 a second on 100 topics, retained, QoS 1", Commit, up(0), retained(10, 1)),
        ("ten kept sessions, one comes and goes each second", Commit, up(0), Clients::ComeAndGo),
    ] {
        println!("{}", cost(fieldgate, name, bridge, uplink, clients, seconds));
    }
    println!("{}", drain(fieldgate, backlog));
}

fn cost(fieldgate: &Path, name: &'static str, bridge: Bridge, uplink: Uplink, clients: Clients, seconds: u64) -> Cost {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let away = if let Uplink::Up(away) = uplink { away } else { Duration::ZERO };
    let _sink = Sink::listen_far(address, 2, Instant::now(), away);
    let gateway = Gateway::start(bridge, fieldgate, address, Line::LIVE);
    if !matches!(uplink, Uplink::Down) {
        gateway.connect();
    }
    let local = gateway.broker.address;
    if matches!(clients, Clients::ComeAndGo) {
        (0..10).for_each(|number| come_and_go(local, number));
    } else if !matches!(clients, Clients::Nothing) {
        // The topics get their numbers, and the gateway learns how far its upstream is.
        load::publish_at_rate(local, Trickle { topics: 100, ..Trickle::new(100, 2) }, Instant::now());
    }
    thread::sleep(SETTLED + 2 * away);

    let before = Reading::of(&gateway);
    let started = Instant::now();
    let publisher = thread::spawn(move || match clients {
        Clients::Nothing => thread::sleep(Duration::from_secs(seconds)),
        Clients::Publish(trickle) => load::publish_at_rate(local, trickle, started),
        Clients::ComeAndGo => {
            for second in 0..seconds {
                come_and_go(local, second % 10);
                thread::sleep((started + Duration::from_secs(second + 1)).saturating_duration_since(Instant::now()));
            }
        }
    });
    if let Uplink::Flapping(period) = uplink {
        while !publisher.is_finished() {
            gateway.cut();
            thread::sleep(period);
            gateway.connect();
            thread::sleep(period);
        }
    }
    publisher.join().expect("the clients end");
    let took = started.elapsed();
    thread::sleep(PUT_OFF);
    let messages = if let Clients::Publish(trickle) = clients { trickle.messages() } else { 0 };
    Cost { name: name.into(), messages, took, spent: Reading::of(&gateway).since(before) }
}

fn come_and_go(address: SocketAddr, number: u64) {
    let stream = client::attach(address, &format!("device{number}"), Session::Kept).expect("a client connects");
    client::leave(stream);
}

/// Fills a queue and drains it.
fn drain(fieldgate: &Path, messages: u64) -> Cost {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let gateway = Gateway::start(Bridge::Commit, fieldgate, address, Line::LIVE);
    super::measure::fill(gateway.broker.address, 1, messages, 100);
    thread::sleep(PUT_OFF);
    let before = Reading::of(&gateway);
    let started = Instant::now();
    let sink = Sink::listen(address, 2, started);
    gateway.connect();
    let seen = sink.wait(messages, Duration::from_secs(60));
    let took = started.elapsed();
    // Free space is given back meanwhile.
    thread::sleep(4 * PUT_OFF);
    let spent = Reading::of(&gateway).since(before);
    Cost { name: format!("drain of {messages} messages, and what follows"), messages: seen.messages, took, spent }
}

/// What was spent so far.
#[derive(Clone, Copy)]
struct Reading {
    commits: u64,
    syncs: u64,
    written: u64,
    disk: u64,
    wakeups: u64,
    log: u64,
    database: u64,
}

impl Reading {
    fn of(gateway: &Gateway) -> Self {
        let pid = gateway.broker.pid();
        let counters = gateway.counters();
        let size = |name| fs::metadata(gateway.broker.directory.join("data").join(name)).map_or(0, |file| file.len());
        Self {
            commits: counters.commits,
            syncs: counters.syncs,
            written: counters.written,
            disk: process::disk_bytes(pid),
            wakeups: process::wakeups(pid),
            log: size("fieldgate.db-wal"),
            database: size("fieldgate.db"),
        }
    }

    /// The sizes stay those of now.
    fn since(self, before: Self) -> Self {
        Self {
            commits: self.commits - before.commits,
            syncs: self.syncs - before.syncs,
            written: self.written - before.written,
            disk: self.disk - before.disk,
            wakeups: self.wakeups - before.wakeups,
            ..self
        }
    }
}

struct Cost {
    name: String,
    messages: u64,
    took: Duration,
    spent: Reading,
}

impl Cost {
    const HEAD: &str = "\
| situation | messages | commits | syncs | bytes written | blocks of the disk, KiB | bytes of them a message | MB a day | wakeups/s | log, KiB | database, KiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, messages, took, spent } = self;
        let seconds = took.as_secs_f64();
        let each = if *messages > 0 { format!("{:.0}", spent.disk as f64 / *messages as f64) } else { "–".into() };
        write!(
            f,
            "| {name} | {messages} | {} | {} | {} | {} | {each} | {:.1} | {:.1} | {} | {} |",
            spent.commits,
            spent.syncs,
            spent.written,
            spent.disk >> 10,
            spent.disk as f64 / seconds * SECONDS_A_DAY / 1e6,
            spent.wakeups as f64 / seconds,
            spent.log >> 10,
            spent.database >> 10,
        )
    }
}
