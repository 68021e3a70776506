//! Nothing acknowledged is lost, and QoS 2 is exactly once, however often the gateways are killed (promises 1 to 4).
//!
//! Publishers with QoS 1 and 2 on one gateway, its upstream is a second gateway, a subscriber with a lasting session
//! hangs on that one. Both gateways are killed with SIGKILL at random moments and started again on what they left. The
//! clients here are written by hand from the packet formats of MQTT 3.1.1, and keep their own side of each handshake.
//!
//! `FIELDGATE_CRASH_ROUNDS` says how many kills (8), `FIELDGATE_CRASH_SEED` which moments.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a client waits for a packet before it looks around.
const TICK: Duration = Duration::from_millis(20);
/// How many messages a publisher leaves unacknowledged.
const WINDOW: usize = 20;
/// How far publishers may be ahead of the subscriber; it bounds how long the end takes.
const MAX_AHEAD: usize = 20_000;

/// Numbers that look random and follow from the seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end
    }
}

/// A gateway that can be killed and started again on the same port and data.
struct Gateway {
    directory: PathBuf,
    upstream: Option<u16>,
    port: u16,
    child: Option<Child>,
    log: Arc<Mutex<VecDeque<String>>>,
}

impl Gateway {
    fn new(directory: PathBuf, upstream: Option<u16>) -> Self {
        fs::create_dir_all(&directory).unwrap();
        let mut gateway = Self { directory, upstream, port: 0, child: None, log: Arc::default() };
        gateway.start();
        gateway
    }

    fn start(&mut self) {
        let mut config = format!(
            "store: {{ directory: data, max_size: 16GiB }}\nweb: {{ enabled: false }}\n\
             limits: {{ max_queued_messages: 100000000, max_queued_bytes: 16GiB }}\n\
             listeners: [ {{ name: local, address: 127.0.0.1:{} }} ]\n",
            self.port
        );
        if let Some(port) = self.upstream {
            config += &format!(
                "upstreams:\n  - name: cloud\n    url: mqtt://127.0.0.1:{port}\n    \
                 out: [ {{ filter: \"plant/#\", qos: 2 }} ]\n    \
                 queue: {{ max_messages: 100000000, max_bytes: 16GiB }}\n"
            );
        }
        let path = self.directory.join("fieldgate.yaml");
        fs::write(&path, config).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_fieldgate"))
            .args(["run", "--config", path.to_str().unwrap()])
            .env_remove("NOTIFY_SOCKET")
            .env_remove("JOURNAL_STREAM")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, ports) = mpsc::channel();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let (sender, log) = (sender.clone(), self.log.clone());
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let address = line.split_once("listening address=127.0.0.1:").map(|(_, rest)| rest);
                    let port = address.and_then(|rest| rest.split(' ').next()?.parse::<u16>().ok());
                    port.map(|port| sender.send(port));
                    let mut log = log.lock().unwrap();
                    log.push_back(line);
                    if log.len() > 60 {
                        log.pop_front();
                    }
                }
            });
        }
        self.child = Some(child);
        drop(sender);
        self.port = ports.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("does not start:\n{}", self.last_lines()));
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn last_lines(&self) -> String {
        self.log.lock().unwrap().iter().map(|line| format!("  {line}\n")).collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A connection that speaks MQTT 3.1.1.
struct Wire {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Wire {
    /// Connects with a lasting session; also tells whether the server still had it (MQTT 3.1.1 §3.1, §3.2).
    fn connect(port: u16, client_id: &str) -> io::Result<(Self, bool)> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        let mut wire = Self { stream, read: Vec::new() };
        let mut body = b"\0\x04MQTT\x04\0\0\0".to_vec();
        body.extend(u16::try_from(client_id.len()).unwrap().to_be_bytes());
        body.extend(client_id.as_bytes());
        wire.send(0x10, &body)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some((kind, body)) = wire.receive()? {
                assert_eq!((kind, body[1]), (0x20, 0), "the connection is refused");
                return Ok((wire, body[0] & 1 == 1));
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    fn send(&mut self, first: u8, body: &[u8]) -> io::Result<()> {
        let mut packet = vec![first];
        let mut length = body.len();
        loop {
            packet.push((length % 128) as u8 | if length > 127 { 0x80 } else { 0 });
            length /= 128;
            if length == 0 {
                break;
            }
        }
        packet.extend(body);
        self.stream.write_all(&packet)
    }

    fn acknowledge(&mut self, first: u8, id: u16) -> io::Result<()> {
        self.send(first, &id.to_be_bytes())
    }

    /// The next packet, first byte and body; `None` where none comes for a moment.
    fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            if let Some(packet) = self.parse() {
                return Ok(Some(packet));
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.read.extend(&chunk[..count]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn parse(&mut self) -> Option<(u8, Vec<u8>)> {
        let (mut length, mut at) = (0, 1);
        loop {
            let byte = *self.read.get(at)?;
            length |= usize::from(byte & 0x7f) << (7 * (at - 1));
            at += 1;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let body = self.read.get(at..at + length)?.to_vec();
        let first = self.read[0];
        self.read.drain(..at + length);
        Some((first, body))
    }
}

fn packet_id(body: &[u8]) -> u16 {
    u16::from_be_bytes([body[0], body[1]])
}

/// Connects again and again until it works.
fn reconnect(port: u16, client_id: &str) -> (Wire, bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Wire::connect(port, client_id) {
            Ok(connected) => return connected,
            Err(error) => assert!(Instant::now() < deadline, "{client_id} cannot connect: {error}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A message on its way; the publisher has not been told yet that it is safe.
#[derive(Clone, Copy)]
struct Inflight {
    number: u32,
    /// QoS 2: PUBREC came, the message is the gateway's now.
    received: bool,
}

impl Inflight {
    fn packet_id(self) -> u16 {
        (self.number % 60_000) as u16 + 1
    }
}

/// What the threads tell each other.
#[derive(Default)]
struct Shared {
    stop_publishers: AtomicBool,
    stop_subscriber: AtomicBool,
    /// Messages published for the first time.
    published: AtomicUsize,
    /// Messages that arrived for the first time.
    distinct: AtomicUsize,
    /// What arrived, in its order: topic and number.
    arrived: Mutex<Vec<(String, u32)>>,
}

impl Shared {
    fn may_publish(&self) -> bool {
        let (published, arrived) = (self.published.load(Ordering::Relaxed), self.distinct.load(Ordering::Relaxed));
        published.saturating_sub(arrived) < MAX_AHEAD && !self.stop_publishers.load(Ordering::Relaxed)
    }
}

/// Publishes numbered messages on two topics until told to stop; returns the numbers that were acknowledged.
fn publish(port: u16, name: &str, qos: u8, shared: &Shared) -> BTreeSet<u32> {
    let mut acknowledged = BTreeSet::new();
    let mut inflight: VecDeque<Inflight> = VecDeque::new();
    let mut next = 0;
    let packet = |message: Inflight| {
        let topic = format!("plant/{name}/{}", message.number % 2);
        let mut body = u16::try_from(topic.len()).unwrap().to_be_bytes().to_vec();
        body.extend(topic.as_bytes());
        body.extend(message.packet_id().to_be_bytes());
        body.extend(format!("{} {}", message.number, "x".repeat(message.number as usize % 200)).as_bytes());
        body
    };
    loop {
        let (mut wire, present) = reconnect(port, name);
        assert!(
            present || inflight.iter().all(|message| !message.received),
            "{name}: the gateway has sent PUBREC and forgotten the session"
        );
        let result = (|| -> io::Result<()> {
            // MQTT 3.1.1 §4.4: again what is unacknowledged, in its order.
            for &message in &inflight {
                if message.received {
                    wire.acknowledge(0x62, message.packet_id())?;
                } else {
                    wire.send(0x38 | qos << 1, &packet(message))?;
                }
            }
            loop {
                while inflight.len() < WINDOW && shared.may_publish() {
                    shared.published.fetch_add(1, Ordering::Relaxed);
                    let message = Inflight { number: next, received: false };
                    next += 1;
                    inflight.push_back(message);
                    wire.send(0x30 | qos << 1, &packet(message))?;
                }
                if inflight.is_empty() && shared.stop_publishers.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let Some((kind, body)) = wire.receive()? else { continue };
                let id = packet_id(&body);
                let place = inflight.iter().position(|message| message.packet_id() == id);
                match kind {
                    0x40 | 0x70 => {
                        let message = place.and_then(|place| inflight.remove(place));
                        acknowledged.insert(message.expect("acknowledges what was sent").number);
                    }
                    0x50 => {
                        inflight[place.expect("receives what was sent")].received = true;
                        wire.acknowledge(0x62, id)?;
                    }
                    _ => panic!("{name}: unexpected packet {kind:#x}"),
                }
            }
        })();
        if result.is_ok() {
            return acknowledged;
        }
    }
}

/// Takes everything under `plant/` until told to stop. `subscribed` is told once the subscription is acknowledged.
fn subscribe(port: u16, shared: &Shared, subscribed: &mpsc::Sender<()>) {
    let stop = &shared.stop_subscriber;
    let mut known = BTreeSet::new();
    let mut unreleased = BTreeSet::new();
    let mut is_first = true;
    while !stop.load(Ordering::Relaxed) {
        let (mut wire, present) = reconnect(port, "subscriber");
        assert!(present || is_first, "the upstream has forgotten the subscriber's session");
        let result = (|| -> io::Result<()> {
            if is_first {
                wire.send(0x82, b"\0\x01\0\x07plant/#\x02")?;
            }
            while !stop.load(Ordering::Relaxed) {
                let Some((kind, body)) = wire.receive()? else { continue };
                match kind & 0xf0 {
                    0x30 => {
                        let topic_end = 2 + usize::from(packet_id(&body));
                        let topic = String::from_utf8(body[2..topic_end].to_vec()).unwrap();
                        let id = packet_id(&body[topic_end..]);
                        let payload = String::from_utf8(body[topic_end + 2..].to_vec()).unwrap();
                        let number = payload.split(' ').next().unwrap().parse().unwrap();
                        let qos = kind >> 1 & 3;
                        if qos == 1 || unreleased.insert(id) {
                            shared.distinct.fetch_add(known.insert((topic.clone(), number)).into(), Ordering::Relaxed);
                            shared.arrived.lock().unwrap().push((topic, number));
                        }
                        wire.acknowledge(if qos == 1 { 0x40 } else { 0x50 }, id)?;
                    }
                    0x60 => {
                        unreleased.remove(&packet_id(&body));
                        wire.acknowledge(0x70, packet_id(&body))?;
                    }
                    0x90 => {
                        is_first = false;
                        let _ = subscribed.send(());
                    }
                    _ => panic!("unexpected packet {kind:#x}"),
                }
            }
            Ok(())
        })();
        assert!(result.is_ok() || !is_first, "killed before the start");
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect(name))
}

#[test]
fn nothing_acknowledged_is_lost_and_qos_2_is_exactly_once_however_often_the_gateways_are_killed() {
    let (rounds, seed) = (number("FIELDGATE_CRASH_ROUNDS", 8), number("FIELDGATE_CRASH_SEED", 1));
    let mut random = Random(seed * 2 + 1);
    let directory = tempfile::tempdir().unwrap();
    let mut upstream = Gateway::new(directory.path().join("upstream"), None);
    let shared = Arc::new(Shared::default());
    let (sender, subscribed) = mpsc::channel();
    let subscriber = {
        let (port, shared) = (upstream.port, shared.clone());
        thread::spawn(move || subscribe(port, &shared, &sender))
    };
    subscribed.recv_timeout(PATIENCE).unwrap();
    let mut gateway = Gateway::new(directory.path().join("gateway"), Some(upstream.port));
    let publishers: Vec<_> = [("one-a", 1), ("one-b", 1), ("two-a", 2), ("two-b", 2)]
        .into_iter()
        .map(|(name, qos)| {
            let (port, shared) = (gateway.port, shared.clone());
            (name, qos, thread::spawn(move || publish(port, name, qos, &shared)))
        })
        .collect();

    for round in 0..rounds {
        thread::sleep(Duration::from_millis(20 + random.below(400)));
        let victim = random.below(8);
        if victim < 5 {
            gateway.kill();
        }
        if victim >= 4 {
            upstream.kill();
        }
        // Now and then something is down for longer than a connection takes to notice.
        thread::sleep(Duration::from_millis(if random.below(4) == 0 { random.below(500) } else { 0 }));
        for gateway in [&mut gateway, &mut upstream] {
            if gateway.child.is_none() {
                gateway.start();
            }
        }
        if (round + 1) % 50 == 0 {
            println!("{} rounds, {} messages arrived", round + 1, shared.distinct.load(Ordering::Relaxed));
        }
    }

    shared.stop_publishers.store(true, Ordering::Relaxed);
    let acknowledged: Vec<(&str, u8, BTreeSet<u32>)> =
        publishers.into_iter().map(|(name, qos, thread)| (name, qos, thread.join().unwrap())).collect();
    let expected: usize = acknowledged.iter().map(|(_, _, numbers)| numbers.len()).sum();

    // Until all have arrived, or nothing comes any more.
    let distinct = || shared.distinct.load(Ordering::Relaxed);
    let (mut count, mut since) = (distinct(), Instant::now());
    while count < expected && since.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(50));
        let now = distinct();
        if now > count {
            (count, since) = (now, Instant::now());
        }
    }
    // A duplicate that is still under way would arrive now.
    thread::sleep(Duration::from_millis(300));
    shared.stop_subscriber.store(true, Ordering::Relaxed);
    subscriber.join().unwrap();

    let mut by_topic: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for (topic, number) in shared.arrived.lock().unwrap().drain(..) {
        by_topic.entry(topic).or_default().push(number);
    }
    let logs = || format!("gateway:\n{}upstream:\n{}", gateway.last_lines(), upstream.last_lines());
    let mut again = 0;
    for (name, qos, numbers) in &acknowledged {
        for parity in 0..2 {
            let topic = format!("plant/{name}/{parity}");
            let came = by_topic.remove(&topic).unwrap_or_default();
            let distinct: BTreeSet<u32> = came.iter().copied().collect();
            let wanted: BTreeSet<u32> = numbers.iter().copied().filter(|number| number % 2 == parity).collect();
            let lost: Vec<_> = wanted.difference(&distinct).collect();
            assert!(lost.is_empty(), "seed {seed}: {topic}: acknowledged and lost: {lost:?}\n{}", logs());
            let mut highest = None;
            let mut first_time = came.iter().copied().filter({
                let mut seen = BTreeSet::new();
                move |&number| seen.insert(number)
            });
            let behind = first_time.find(|&number| highest.replace(number).is_some_and(|before| before > number));
            assert_eq!(behind, None, "seed {seed}: {topic}: out of order in {came:?}\n{}", logs());
            if *qos == 2 {
                assert_eq!(came.len(), distinct.len(), "seed {seed}: {topic}: duplicates in {came:?}\n{}", logs());
            }
            again += came.len() - distinct.len();
        }
    }
    assert!(expected > 0);
    println!(
        "{rounds} kills, {expected} messages acknowledged: 0 lost, 0 of QoS 2 duplicated, 0 out of order; \
         {again} repeated at QoS 1"
    );
}
