//! One run: publishers on a gateway, its upstream, a subscriber there, and what goes wrong between them, round by round.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use crate::PATIENCE;
use crate::cable::{self, Cable};
use crate::clients::{Event, Shared, publish, subscribe};
use crate::damage::{Allows, damage};
use crate::gateway::Gateway;
use crate::line::{Dead, Line, Link, Weather};
use crate::mosquitto::Mosquitto;
use crate::namespaces::Disk;
use crate::oracle::{AtRisk, Excuses, Verdict};
use crate::proof::contradiction;
use crate::proxy::Proxy;
use crate::random::Random;

/// Nothing has moved for so long that nothing will.
const STILL: Duration = Duration::from_millis(700);
/// How long a duplicate that is still under way may take.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// Room for whatever a run keeps; only the disk can be full, and then the publisher is told.
const PLENTY: &str = "max_messages: 100000000, max_bytes: 16GiB, when_full: reject";

/// Clients connect again as fast as they can.
const UNHURRIED: &str = "max_connection_rate: 0";
/// The file system that gets full; the database and its log alone leave some room on it.
const DISK: &str = "10m";

/// What goes wrong in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// After the last round.
    None,
    /// `kill -9` of the gateway, of its upstream, of both.
    KillGateway,
    KillUpstream,
    KillBoth,
    /// The line between them: connections reset, bytes swallowed, 64 kbit/s, one connection dead without a word. During
    /// the middle two the gateway is killed now and then.
    Reset,
    Blackhole,
    Slow,
    HalfOpen,
    /// The gateway's database is full, and it is killed now and then.
    Full,
    /// Something else has filled the gateway's disk, and it is killed now and then.
    Disk,
    /// Bytes of the gateway's database change while it is dead.
    Damage,
}

impl Fault {
    const ALL: [Self; 10] = [
        Self::KillGateway,
        Self::KillUpstream,
        Self::KillBoth,
        Self::Reset,
        Self::Blackhole,
        Self::Slow,
        Self::HalfOpen,
        Self::Full,
        Self::Disk,
        Self::Damage,
    ];
    /// All that a gateway must survive without a loss, and of these what needs nothing of the machine.
    pub const HARMLESS: &[Self] = Self::ALL.split_at(9).0;
    pub const PORTABLE: &[Self] = Self::ALL.split_at(8).0;

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::KillGateway => "kill_gateway",
            Self::KillUpstream => "kill_upstream",
            Self::KillBoth => "kill_both",
            Self::Reset => "reset",
            Self::Blackhole => "blackhole",
            Self::Slow => "slow",
            Self::HalfOpen => "half_open",
            Self::Full => "full",
            Self::Disk => "disk",
            Self::Damage => "damage",
        }
    }

    pub fn parse(name: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|fault| fault.name() == name)
            .unwrap_or_else(|| panic!("no fault is called `{name}`"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Fieldgate,
    Mosquitto,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rounds: u64,
    pub seed: u64,
    pub faults: Vec<Fault>,
    pub upstream: Peer,
    pub link: Link,
    /// The gateway's store is so small that it fills.
    pub max_size: &'static str,
    /// The upstream's `out` rules.
    pub rules: &'static str,
    /// Publishers whose messages may overtake each other, as a rule says so.
    pub unordered: &'static [&'static str],
    /// Limits of the subscriber's queue on the upstream, in the configuration's words: the subscriber then rests during
    /// the rounds, and what the limits drop is counted.
    pub subscriber_queue: Option<&'static str>,
    /// How far publishers may be ahead of the subscriber.
    pub max_ahead: usize,
}

enum Upstream {
    Fieldgate(Gateway),
    Mosquitto(Mosquitto),
}

impl Upstream {
    fn start_new(directory: &Path, plan: &Plan, host: Ipv4Addr) -> Self {
        if plan.upstream == Peer::Mosquitto {
            return Self::Mosquitto(Mosquitto::start(directory, host));
        }
        let limits = plan.subscriber_queue.unwrap_or("max_queued_messages: 100000000, max_queued_bytes: 16GiB");
        let config = format!(
            "store: {{ directory: data, max_size: 16GiB }}\nweb: {{ address: \"127.0.0.1:0\" }}\n\
             limits: {{ {limits}, {UNHURRIED} }}\nallow_anonymous: always\n\
             listeners: [ {{ name: local, address: {host}:{{port}} }} ]\n"
        );
        Self::Fieldgate(Gateway::start_new(directory, config, Vec::new()))
    }

    fn port(&self) -> u16 {
        match self {
            Self::Fieldgate(gateway) => gateway.port,
            Self::Mosquitto(mosquitto) => mosquitto.port,
        }
    }

    /// Mosquitto is left alone: what it acknowledged it forgets on `kill -9`, and after a restart in good order 2.0 repeats
    /// and reorders what it kept at QoS 2.
    fn kill(&mut self) {
        if let Self::Fieldgate(gateway) = self {
            gateway.kill();
        }
    }

    fn start(&mut self) {
        if let Self::Fieldgate(gateway) = self
            && !gateway.is_running()
        {
            gateway.start();
        }
    }

    fn last_lines(&self) -> String {
        match self {
            Self::Fieldgate(gateway) => gateway.last_lines(),
            Self::Mosquitto(mosquitto) => mosquitto.last_lines(),
        }
    }
}

struct Run<'a> {
    plan: &'a Plan,
    random: Random,
    shared: Arc<Shared>,
    gateway: Gateway,
    upstream: Upstream,
    line: Line,
    /// Where the gateway's database is, if that can get full. It outlives the gateway.
    disk: Option<Disk>,
    faults: Vec<Fault>,
    damages: Vec<AtRisk>,
    /// The last damage, and how many errors the gateway had logged before.
    open_damage: Option<(AtRisk, usize)>,
    /// What limits have dropped, by the counters of processes that are gone.
    dropped: u64,
}

/// Does what `plan` says; the verdict, with nothing to complain of. Where there is something, the files stay.
pub fn run(plan: &Plan) -> Verdict {
    let directory = tempfile::tempdir().unwrap().keep();
    println!("logs and databases are in {}", directory.display());
    let verdict = run_in(&directory, plan);
    fs::remove_dir_all(&directory).unwrap();
    verdict
}

fn run_in(directory: &Path, plan: &Plan) -> Verdict {
    let mut cable = (plan.link == Link::Netns).then(Cable::lay);
    let hosts = match cable {
        Some(_) => (cable::GATEWAY, cable::UPSTREAM),
        None => (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST),
    };
    let under = cable.as_ref().map_or(Vec::new(), Cable::under);
    let upstream = Upstream::start_new(&directory.join("upstream"), plan, hosts.1);
    let upstream_address = SocketAddr::from((hosts.1, upstream.port()));
    if let Some(cable) = &mut cable {
        cable.lead_to(upstream.port());
    }
    let line = cable.map_or_else(|| Line::Proxy(Proxy::start(upstream_address)), Line::Cable);
    let shared = Arc::new(Shared::new(plan.max_ahead, plan.faults.contains(&Fault::Damage)));
    let record = directory.join("record.jsonl");
    let (sender, subscribed) = mpsc::channel();
    let subscriber = {
        let (shared, record) = (shared.clone(), File::create(&record).unwrap());
        thread::spawn(move || subscribe(upstream_address, &shared, record, &sender))
    };
    subscribed.recv_timeout(PATIENCE).unwrap();
    let home = directory.join("gateway");
    let disk = plan.faults.contains(&Fault::Disk).then(|| Disk::mount(&home.join("data"), DISK));
    let gateway = Gateway::start_new(&home, gateway_config(plan, hosts.0, &line), under);
    let publishers: Vec<_> = (0..shared.lines.len())
        .map(|index| {
            let (address, shared) = (SocketAddr::from((hosts.0, gateway.port)), shared.clone());
            thread::spawn(move || publish(address, index, &shared))
        })
        .collect();

    let mut run = Run {
        plan,
        random: Random::new(plan.seed),
        shared: shared.clone(),
        gateway,
        upstream,
        line,
        disk,
        faults: Vec::new(),
        damages: Vec::new(),
        open_damage: None,
        dropped: 0,
    };
    shared.rest.store(plan.subscriber_queue.is_some(), Ordering::Relaxed);
    run.all_rounds();
    shared.rest.store(false, Ordering::Relaxed);
    shared.stop_publishers.store(true, Ordering::Relaxed);
    let acknowledged: Vec<Event> = publishers.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    run.wait_for_all(&acknowledged);
    sleep(LAST_WORDS);
    let excuses = run.excuses();
    shared.stop_subscriber.store(true, Ordering::Relaxed);
    subscriber.join().unwrap();

    assert!(!acknowledged.is_empty());
    let mut verdict = Verdict::new(&shared, &run.faults, &acknowledged, &excuses);
    if !shared.may_forget {
        let may_miss = plan.subscriber_queue.is_some() || plan.faults.contains(&Fault::Disk);
        verdict.findings.extend(contradiction(&record, &verdict, may_miss));
    }
    println!(
        "{verdict}\nseed {}, {:?} upstream, {} link: {}",
        plan.seed,
        plan.upstream,
        plan.link.name(),
        verdict.summary()
    );
    assert!(
        verdict.findings.is_empty(),
        "seed {}: {}\ngateway:\n{}\nupstream:\n{}",
        plan.seed,
        verdict.findings.join("\n"),
        run.gateway.last_lines(),
        run.upstream.last_lines()
    );
    verdict
}

fn gateway_config(plan: &Plan, host: Ipv4Addr, line: &Line) -> String {
    let Plan { max_size, rules, .. } = plan;
    // Elsewhere than on loopback nobody may look who has no password.
    let web = if host.is_loopback() { "{ address: \"127.0.0.1:0\" }" } else { "{ enabled: false }" };
    format!(
        "store: {{ directory: data, max_size: {max_size} }}\nweb: {web}\n\
         limits: {{ max_queued_messages: 100000000, max_queued_bytes: 16GiB, {UNHURRIED} }}\nallow_anonymous: always\n\
         listeners: [ {{ name: local, address: {host}:{{port}} }} ]\n\
         upstreams:\n  - name: cloud\n    url: mqtt://{}\n    version: 5\n    keep_alive: 1s\n    connect_timeout: 2s\n    \
         backoff: {{ base: 50ms, cap: 1s, stable: 5s }}\n    \
         out: [ {rules} ]\n    max_inflight_messages: 100\n    queue: {{ {PLENTY} }}\n",
        line.address()
    )
}

impl Run<'_> {
    fn all_rounds(&mut self) {
        let mut told = Instant::now();
        for round in 0..self.plan.rounds {
            let fault = *self.random.choose(&self.plan.faults);
            self.faults.push(fault);
            self.shared.round.store(round as u32, Ordering::Relaxed);
            self.pause(20, 400);
            self.strike(fault);
            if told.elapsed() > Duration::from_secs(20) {
                told = Instant::now();
                let (acknowledged, arrived) = (&self.shared.acknowledged, &self.shared.distinct);
                let (acknowledged, arrived) = (acknowledged.load(Ordering::Relaxed), arrived.load(Ordering::Relaxed));
                println!("round {round}: {acknowledged} messages acknowledged, {arrived} arrived");
            }
        }
        self.shared.round.store(u32::MAX, Ordering::Relaxed);
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::None => {}
            Fault::KillGateway | Fault::KillUpstream | Fault::KillBoth => {
                if fault != Fault::KillGateway {
                    self.keep_counters();
                }
                if fault != Fault::KillUpstream {
                    self.gateway.kill();
                }
                if fault != Fault::KillGateway {
                    self.upstream.kill();
                }
                // Now and then something is down for longer than a connection takes to notice.
                if self.random.one_in(4) {
                    self.pause(0, 500);
                }
                self.start_all();
            }
            Fault::Reset => {
                for _ in 0..=self.random.below(3) {
                    self.line.reset();
                    self.pause(0, 150);
                }
            }
            Fault::Blackhole | Fault::Slow => {
                self.line.set(if fault == Fault::Slow { Weather::Slow } else { Weather::Blackhole });
                self.pause(100, 2500);
                if self.random.one_in(3) {
                    self.gateway.kill();
                    self.start_all();
                    self.pause(0, 300);
                }
                self.line.set(Weather::Clear);
            }
            Fault::HalfOpen => {
                let before = self.gateway.connections();
                let dead = *self.random.choose(&[Dead::Both, Dead::Incoming, Dead::Outgoing]);
                self.line.half_open(dead);
                self.until("the gateway notices that its connection is dead", |run| run.gateway.connections() > before);
                self.line.set(Weather::Clear);
            }
            Fault::Full => {
                self.line.set(Weather::Blackhole);
                self.until_still(|run| run.shared.acknowledged.load(Ordering::Relaxed));
                if self.random.one_in(2) {
                    self.gateway.kill();
                    self.start_all();
                    self.pause(0, 500);
                }
                self.line.set(Weather::Clear);
                self.until_messages_arrive();
            }
            Fault::Disk => {
                // Without a line everything must be kept, and there is no room; with one, what is kept could go.
                if self.random.one_in(2) {
                    self.line.set(Weather::Blackhole);
                    self.pause(0, 300);
                }
                for _ in 0..=self.random.below(4) {
                    self.disk().fill();
                    self.pause(20, 300);
                }
                if self.random.one_in(3) {
                    self.gateway.kill();
                    self.disk().fill();
                    self.start_all();
                    self.pause(0, 300);
                }
                self.disk().free();
                self.line.set(Weather::Clear);
                self.until_messages_arrive();
            }
            Fault::Damage => self.damage(),
        }
    }

    /// Lets everything arrive, so that what can be hit is known; then something waits in the database, the gateway dies,
    /// and its files change.
    fn damage(&mut self) {
        self.shared.hold.store(true, Ordering::Relaxed);
        self.until("everything is acknowledged", |run| run.shared.all_acknowledged());
        // Nothing is left of what was hit the last time either: it has been read by now, and reported.
        self.until("everything is delivered", |run| run.gateway.metric("fieldgate_store_queue_messages", "") == 0);
        self.until_still(|run| run.shared.distinct.load(Ordering::Relaxed));
        self.shared.write_off();
        self.close_damage();
        let from = self.shared.published();
        self.line.set(Weather::Blackhole);
        self.shared.hold.store(false, Ordering::Relaxed);
        self.pause(50, 600);
        self.gateway.kill();
        let (to, errors_before) = (self.shared.published(), self.gateway.errors().len());
        let (what, allows) = damage(&self.gateway.data(), &mut self.random);
        println!("round {}: {from:?} to {to:?}: {what}", self.faults.len() - 1);
        self.gateway.start();
        self.line.set(Weather::Clear);
        if allows == Allows::WhatIsReported {
            self.open_damage = Some((AtRisk { from, to, reported: Vec::new() }, errors_before));
        }
    }

    /// Everything that was hit by the last damage has been read: whatever the gateway has to say of it, it has said.
    fn close_damage(&mut self) {
        if let Some((at_risk, errors_before)) = self.open_damage.take() {
            let reported = self.gateway.errors().split_off(errors_before);
            println!("  {}", reported.first().map_or("nothing is reported", |line| line));
            self.damages.push(AtRisk { reported, ..at_risk });
        }
    }

    /// Until all that was acknowledged has arrived, or nothing comes any more.
    fn wait_for_all(&mut self, acknowledged: &[Event]) {
        let may_miss = self.plan.subscriber_queue.is_some() || self.shared.may_forget;
        let patience = if may_miss { 4 * STILL } else { PATIENCE };
        let distinct = |run: &Self| run.shared.distinct.load(Ordering::Relaxed);
        let (mut count, mut since) = (distinct(self), Instant::now());
        while since.elapsed() < patience {
            sleep(Duration::from_millis(100));
            let now = distinct(self);
            if now > count {
                (count, since) = (now, Instant::now());
            } else if now >= acknowledged.len() {
                let known: BTreeSet<_> = {
                    let arrived = self.shared.arrived.lock().unwrap();
                    arrived.iter().map(|event| (event.line, event.number)).collect()
                };
                if acknowledged.iter().all(|event| known.contains(&(event.line, event.number))) {
                    return;
                }
            }
        }
    }

    /// Before the upstream is killed: reads what it has dropped, once it counts no more.
    fn keep_counters(&mut self) {
        let Upstream::Fieldgate(upstream) = &self.upstream else { return };
        if self.plan.subscriber_queue.is_none() {
            return;
        }
        self.shared.hold.store(true, Ordering::Relaxed);
        self.until("everything is acknowledged", |run| run.shared.all_acknowledged());
        self.until_still(|_| upstream.metric("fieldgate_hub_messages_received_total", "") as usize);
        self.dropped += upstream.metric("fieldgate_hub_messages_dropped_total", "queue_full");
        self.shared.hold.store(false, Ordering::Relaxed);
    }

    fn excuses(&mut self) -> Excuses {
        self.close_damage();
        self.keep_counters();
        Excuses { damages: std::mem::take(&mut self.damages), dropped: self.dropped, unordered: self.plan.unordered }
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("the plan has this fault")
    }

    fn until_messages_arrive(&self) {
        let arrived = self.shared.distinct.load(Ordering::Relaxed);
        self.until("messages arrive again", |run| run.shared.distinct.load(Ordering::Relaxed) > arrived);
    }

    fn start_all(&mut self) {
        self.upstream.start();
        if !self.gateway.is_running() {
            self.gateway.start();
        }
    }

    fn pause(&mut self, at_least: u64, at_most: u64) {
        sleep(Duration::from_millis(at_least + self.random.below(at_most - at_least + 1)));
    }

    fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(
                Instant::now() < deadline,
                "seed {}, round {}: waits in vain until {what}\ngateway:\n{}\nupstream:\n{}",
                self.plan.seed,
                self.faults.len() - 1,
                self.gateway.last_lines(),
                self.upstream.last_lines()
            );
            sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `value` has not changed for a while.
    fn until_still(&self, value: impl Fn(&Self) -> usize) {
        let (mut last, mut since) = (value(self), Instant::now());
        while since.elapsed() < STILL {
            sleep(Duration::from_millis(20));
            let now = value(self);
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
    }
}
