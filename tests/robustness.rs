//! What peers can do to a broker by accident or on purpose, and that the others do not notice: noise, slow and silent
//! readers, peers that vanish, storms of connections, clients that never acknowledge, handshakes that stall.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fieldgate::hub::{self, QueueLimits};
use fieldgate::listener::{Settings, Transport};
use fieldgate::observe::{Metrics, Observe};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

// Shared with `tests/broker`, which uses the rest of it.
#[allow(dead_code)]
#[path = "broker/harness.rs"]
mod harness;

use harness::{Broker, CONNACK_5, PATIENCE, Peer, bytes, connect};

/// What a client that keeps the rules may have to wait while others misbehave: generous for a debug build on a busy
/// machine, and far less than any timeout that could end the trouble.
const PROMPTLY: Duration = Duration::from_secs(4);

/// Serves as long as the broker answers this client without delay.
async fn is_served(peer: &mut Peer<TcpStream>) {
    timeout(PROMPTLY, peer.expect_nothing()).await.expect("others are served promptly");
}

fn metric(broker: &Broker, name: &str) -> u64 {
    let mut metrics = Metrics::default();
    broker.observe.collect(&mut metrics);
    broker.hub.collect(&mut metrics);
    let text = metrics.render();
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit(' ').next()).unwrap_or_else(|| panic!("no {name} in {text}"));
    value.parse::<f64>().expect("a number") as u64
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < patience, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// How often the code of the gateway has panicked in this process.
fn panics() -> usize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.location().is_some_and(|location| location.file().starts_with("src/")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            before(panic);
        }));
    });
    PANICS.load(Ordering::SeqCst)
}

/// A generator of our own, so that a failure can be repeated (Numerical Recipes, "An Even Quicker Generator").
struct Noise(u32);

impl Noise {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 24) as u8
    }

    fn bytes(&mut self) -> Vec<u8> {
        (0..self.byte()).map(|_| self.byte()).collect()
    }
}

#[tokio::test]
async fn noise_of_a_thousand_peers_leaves_the_broker_serving() {
    let before = panics();
    let broker = Broker::start().await;
    let mut peer = broker.connect_5("c").await;
    let mut noise = Noise(1);
    let packets = [
        r#"30 1E 0001 "a" 15 01 01 02 00000064 23 0001 26 0001 "k" 0001 "v" 00000000"#,
        r#"34 06 0001 "a" 0001 00 50 02 0001 62 02 0001"#,
        r##"82 0A 000A 02 0B 01 0003 "a/#" 2D A2 08 0001 00 0003 "a/#""##,
        "E0 07 00 05 11 00000001",
    ];
    for round in 0..1000 {
        let version = [3, 4, 5][round % 3];
        let good = match version {
            3 => r#"10 13 0006 "MQIsdp" 03 02 003C 0005 "noise""#.to_owned(),
            _ => connect("noise", version, 2),
        };
        let script = match round % 5 {
            // Nothing but noise; what looks like a CONNECT; noise after a good one.
            0 => noise.bytes(),
            1 => [bytes(r#"10 40 0004 "MQTT" 05"#), noise.bytes()].concat(),
            2 => [bytes(&good), noise.bytes()].concat(),
            // Good packets with one byte changed.
            _ => {
                let mut script = bytes(&format!("{good} {}", packets[round % packets.len()]));
                let at = usize::from(noise.byte()) % script.len();
                script[at] = noise.byte();
                script
            }
        };
        let mut stranger = broker.open().await;
        // The broker may have closed already.
        let _ = stranger.stream.write_all(&script).await;
        if round % 100 == 0 {
            is_served(&mut peer).await;
        }
    }
    is_served(&mut peer).await;
    until("all strangers are gone", || metric(&broker, "fieldgate_listener_connections{") == 1).await;
    assert!(metric(&broker, "fieldgate_listener_protocol_errors_total{") > 0);
    assert_eq!(panics(), before);
    broker.stop().await;
}

/// Fifty subscribers that do not read, at each QoS; the publisher, and the one who reads, go on, and what is kept for
/// the others has its limit.
#[tokio::test]
async fn slow_readers_cost_what_their_limits_allow_and_delay_nobody() {
    const MESSAGES: usize = 2000;
    let mut settings = hub::Settings::default();
    settings.limits.queue = QueueLimits { max_messages: 500, max_bytes: 256 * 1024, ..QueueLimits::default() };
    let broker = Broker::start_with(|_| {}, settings, None).await;
    let mut stuck = Vec::new();
    for index in 0..50 {
        let mut peer = broker.connect_3(&format!("stuck-{index}")).await;
        peer.send(&format!(r#"82 06 0001 0001 "a" {:02X}"#, index % 3)).await;
        peer.expect(&format!("90 03 0001 {:02X}", index % 3)).await;
        stuck.push(peer);
    }
    let mut reader = broker.connect_3("reader").await;
    reader.send(r#"82 06 0001 0001 "a" 00"#).await;
    reader.expect("90 03 0001 00").await;
    let mut from = broker.connect_3("from").await;
    let padding = "00".repeat(9_990);
    // 9,999 bytes of remaining length: 8F 4E.
    let message = |index: usize| format!(r#"32 8F 4E 0001 "a" {:04X} {index:08X} {padding}"#, index + 1);
    let got = |index: usize| format!(r#"30 8D 4E 0001 "a" {index:08X} {padding}"#);
    // As a publisher that is in a hurry but does not lose its reader: a few ahead of it.
    for index in 0..MESSAGES {
        from.send(&message(index)).await;
        from.expect(&format!("40 02 {:04X}", index + 1)).await;
        timeout(PROMPTLY, reader.expect(&got(index))).await.expect("in time");
    }
    for session in broker.hub.sessions() {
        // What is in flight is counted, and does not count towards the limit of what waits.
        assert!(session.inflight <= 100, "{session:?}");
        assert!(session.queued_bytes <= 256 * 1024 + session.inflight * 10_000, "{session:?}");
        assert!(session.queued_messages <= 500 + 100 + 500, "{session:?}");
    }
    assert!(metric(&broker, r#"fieldgate_hub_messages_dropped_total{reason="queue_full"}"#) > 0);
    // They are not lost: what they had been sent before is there to be read.
    stuck[0].expect(&got(0)).await;
    broker.stop().await;
}

/// Its half of the connection is open and silent, as after a power cut at the other end.
#[tokio::test]
async fn peers_that_vanish_are_missed_after_their_keep_alive() {
    let broker = Broker::start().await;
    let mut watcher = broker.connect_3("watcher").await;
    watcher.send(r#"82 06 0001 0001 "w" 00"#).await;
    watcher.expect("90 03 0001 00").await;
    let start = Instant::now();
    let mut vanished = Vec::new();
    for index in 0..100 {
        let mut peer = broker.open().await;
        peer.send(&format!(r#"10 15 0004 "MQTT" 04 06 0001 0003 "{index:03}" 0001 "w" 0001 "x""#)).await;
        peer.expect("20 02 00 00").await;
        peer.send(r#"82 06 0001 0001 "a" 01"#).await;
        peer.expect("90 03 0001 01").await;
        vanished.push(peer);
    }
    // What is on its way to them changes nothing: they have to be heard, not written to.
    let mut from = broker.connect_3("from").await;
    let mut wills = 0;
    let mut number = 0;
    while wills < 100 {
        assert!(start.elapsed() < PATIENCE, "only {wills} are missed");
        number += 1;
        from.send(&format!(r#"32 05 0001 "a" {number:04X}"#)).await;
        from.expect(&format!("40 02 {number:04X}")).await;
        while let Ok(read) = timeout(Duration::from_millis(20), watcher.stream.read_exact(&mut [0; 6])).await {
            read.unwrap();
            wills += 1;
        }
    }
    assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
    until("their connections are closed", || metric(&broker, "fieldgate_listener_connections{") == 2).await;
    broker.stop().await;
}

/// A client may have no keep alive; then the system asks whether its machine is still there.
#[tokio::test]
async fn the_system_looks_after_connections_without_a_keep_alive() {
    let broker = Broker::start().await;
    let mut peer = broker.open().await;
    peer.send(r#"10 0D 0004 "MQTT" 04 02 0000 0001 "c""#).await;
    peer.expect("20 02 00 00").await;
    // proc(5), /proc/net/tcp: the timer that is active and the hundredths of a second until it fires; 02 is keep alive,
    // or an acknowledgement that is due within the half second.
    let local = format!(":{:04X}", broker.port());
    let timer = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let mut rows = row.filter(|row| row[1].ends_with(&local) && row[3] == "01");
        let (active, jiffies) = rows.next().unwrap()[5].split_once(':').unwrap();
        (active == "02").then(|| u64::from_str_radix(jiffies, 16).unwrap()).filter(|&left| left > 100)
    };
    until("the connection has a keep alive timer", || timer().is_some()).await;
    assert!(timer().unwrap() <= 60 * 100, "{:?} hundredths of a second", timer());
    broker.stop().await;
}

/// Opens this many connections at once; returns how many were answered.
async fn storm(port: u16, connections: usize) -> usize {
    let mut clients = JoinSet::new();
    for index in 0..connections {
        clients.spawn(async move {
            let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            let mut peer = Peer { stream };
            // A refused one may be closed before it has said anything.
            peer.stream.write_all(&bytes(&connect(&format!("storm-{index}"), 4, 2))).await.ok()?;
            let mut answer = [0; 4];
            peer.stream.read_exact(&mut answer).await.ok()?;
            assert_eq!(answer, [0x20, 2, 0, 0]);
            Some(peer)
        });
    }
    let all = timeout(Duration::from_secs(30), clients.join_all()).await.expect("everybody is answered");
    all.into_iter().flatten().count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_connections_at_once_are_all_answered() {
    const STORM: usize = 5000;
    let broker = Broker::start().await;
    let mut peer = broker.connect_3("c").await;
    let waiting = tokio::spawn(async move {
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let start = Instant::now();
            is_served(&mut peer).await;
            longest = longest.max(start.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        longest
    });
    let start = Instant::now();
    assert_eq!(storm(broker.port(), STORM).await, STORM);
    let longest = waiting.await.unwrap();
    println!("{STORM} connections in {:?}; meanwhile another client waited {longest:?} at most", start.elapsed());
    until("the places are given back", || metric(&broker, "fieldgate_listener_connections{") == 0).await;
    assert_eq!(metric(&broker, "fieldgate_listener_connections_total{"), STORM as u64 + 1);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_five_thousand_connections_at_once_as_many_are_taken_as_the_limit_says() {
    const STORM: usize = 5000;
    const LIMIT: usize = 1000;
    let limit = |settings: &mut Settings| settings.max_connections = LIMIT;
    let broker = Broker::start_with(limit, hub::Settings::default(), None).await;
    let mut peer = broker.connect_3("c").await;
    assert!(storm(broker.port(), STORM).await >= LIMIT - 1);
    is_served(&mut peer).await;
    let refused =
        metric(&broker, r#"fieldgate_listener_connections_refused_total{listener="test",reason="listener_full"}"#);
    let taken = metric(&broker, "fieldgate_listener_connections_total{");
    // Who was answered and left made room for another.
    assert!(refused > 0 && taken as usize >= LIMIT, "{refused} refused, {taken} taken");
    assert_eq!(refused + taken, STORM as u64 + 1);
    until("the places are given back", || metric(&broker, "fieldgate_listener_connections{") == 1).await;
    assert_eq!(storm(broker.port(), 500).await, 500);
    broker.stop().await;
}

#[tokio::test]
async fn a_subscriber_that_never_acknowledges_gets_its_window_and_its_queue_and_no_more() {
    let mut settings = hub::Settings::default();
    settings.limits.max_inflight = 20;
    settings.limits.queue = QueueLimits { max_messages: 100, ..QueueLimits::default() };
    let broker = Broker::start_with(|_| {}, settings, None).await;
    let mut reader = broker.connect_3("reader").await;
    reader.send(r#"82 06 0001 0001 "a" 00"#).await;
    reader.expect("90 03 0001 00").await;
    let mut silent = Vec::new();
    for qos in [1, 2] {
        let mut peer = broker.connect_3(&format!("silent-{qos}")).await;
        peer.send(&format!(r#"82 06 0001 0001 "a" {qos:02X}"#)).await;
        peer.expect(&format!("90 03 0001 {qos:02X}")).await;
        silent.push(peer);
    }
    let mut from = broker.connect_3("from").await;
    for number in 1..=1000 {
        from.send(&format!(r#"34 05 0001 "a" {number:04X} 62 02 {number:04X}"#)).await;
        from.expect(&format!("50 02 {number:04X} 70 02 {number:04X}")).await;
        reader.expect(r#"30 03 0001 "a""#).await;
    }
    for (peer, first) in silent.iter_mut().zip([0x32, 0x34]) {
        for number in 1..=20 {
            peer.expect(&format!(r#"{first:02X} 05 0001 "a" {number:04X}"#)).await;
        }
        // Not one more, but everything else goes on.
        peer.expect_nothing().await;
    }
    for session in broker.hub.sessions() {
        let expected = if session.client_id.starts_with("silent") { 120 } else { 0 };
        assert_eq!(session.queued_messages, expected, "{session:?}");
    }
    // One half of a handshake is not the whole of it.
    for number in 1..=20 {
        silent[1].send(&format!("50 02 {number:04X}")).await;
        silent[1].expect(&format!("62 02 {number:04X}")).await;
    }
    silent[1].expect_nothing().await;
    broker.stop().await;
}

/// It publishes and never takes an answer: it is not read from any more, and nothing piles up for it.
#[tokio::test]
async fn a_publisher_that_takes_no_answers_is_not_read_from_for_long() {
    let broker = Broker::start().await;
    let mut other = broker.connect_3("other").await;
    for script in [
        r#"32 06 0001 "a" 0001 00"#,
        "C0 00",
        r#"82 06 0001 0001 "x" 00"#,
        r#"A2 05 0001 0001 "x""#,
        "62 02 0001",
        "50 02 0001",
    ] {
        // Little is kept by the system, so that the limit of the broker is what is felt.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let stream = socket.connect(([127, 0, 0, 1], broker.port()).into()).await.unwrap();
        let mut deaf = Peer { stream };
        deaf.send(&connect("deaf", 4, 2)).await;
        deaf.expect("20 02 00 00").await;
        let batch = bytes(&script.repeat(1000));
        let mut sent = 0;
        while sent < 64 << 20 {
            let Ok(written) = timeout(Duration::from_millis(300), deaf.stream.write(&batch)).await else { break };
            sent += written.unwrap();
        }
        println!("{script}: {sent} bytes were taken");
        assert!(sent < 64 << 20, "{script}: {sent} bytes were taken");
        is_served(&mut other).await;
    }
    broker.stop().await;
}

/// Nobody waits for those who stop in the middle of TCP's, TLS's, WebSocket's or MQTT's hello, and they are not waited
/// for for ever.
#[tokio::test]
async fn stalled_handshakes_delay_nobody() {
    let http = "GET /mqtt HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n";
    let beginning = [http, "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"].concat();
    let whole = [&beginning, "Sec-WebSocket-Protocol: mqtt\r\n\r\n"].concat();
    let mqtt = async |tcp: Peer<TcpStream>, _: &Path| greet(tcp).await;
    let tls = async |tcp: Peer<TcpStream>, directory: &Path| {
        greet(Peer { stream: harness::over_tls(tcp.stream, directory).await }).await;
    };
    let websocket = async |mut tcp: Peer<TcpStream>, _: &Path| {
        tcp.stream.write_all(whole.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        tcp.stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 101");
    };
    let hello = bytes("16 03 01 00 F4 01 00 00 F0 03 03");
    tokio::join!(
        stall(false, Transport::Mqtt, bytes("10 0D 0004"), mqtt),
        stall(true, Transport::Mqtt, hello, tls),
        stall(false, Transport::WebSocket, beginning.clone().into_bytes(), websocket),
        // As far as MQTT, which then does not come.
        stall(false, Transport::WebSocket, whole.clone().into_bytes(), websocket),
    );
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(mut peer: Peer<S>) {
    peer.send(&connect("c", 5, 2)).await;
    peer.expect(CONNACK_5).await;
}

/// Two hundred peers stop before the first byte, or after `beginning`; then a good one comes, which `is_served`.
async fn stall(
    over_tls: bool,
    transport: Transport,
    beginning: Vec<u8>,
    is_served: impl AsyncFn(Peer<TcpStream>, &Path),
) {
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    let directory = tempfile::tempdir().unwrap();
    let certificate = over_tls.then(|| harness::certificate_in(directory.path()));
    let change = |listener: &mut Settings| {
        listener.tls = certificate;
        listener.transport = transport;
        listener.limits.connect_timeout = CONNECT_TIMEOUT;
    };
    let broker = Broker::start_with(change, hub::Settings::default(), None).await;
    let start = Instant::now();
    let mut stalled = Vec::new();
    for round in 0..200 {
        let mut peer = broker.open().await;
        if round % 2 == 0 {
            peer.stream.write_all(&beginning).await.unwrap();
        }
        stalled.push(peer);
    }
    is_served(broker.open().await, directory.path()).await;
    assert!(start.elapsed() < CONNECT_TIMEOUT, "it was served once the others were given up: {:?}", start.elapsed());
    until("the stalled ones are given up", || metric(&broker, "fieldgate_listener_connections{") == 0).await;
    broker.stop().await;
}
