//! A broker with a bridge to one upstream, cut until it is told to connect.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::brokers::{Broker, Kind, free_port, mosquitto_basics};

/// More than any run here queues.
const QUEUE_MESSAGES: u64 = 1_000_000_000;

/// Whose bridge, and how hard it keeps messages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bridge {
    /// In memory, which is as fast as it gets.
    Mosquitto,
    /// On disk, acknowledged after the commit.
    Commit,
    /// The same, with commits gathered.
    Interval,
}

pub const BRIDGES: [Bridge; 3] = [Bridge::Mosquitto, Bridge::Commit, Bridge::Interval];

impl Bridge {
    pub fn name(self) -> &'static str {
        match self {
            Self::Mosquitto => "mosquitto, in memory",
            Self::Commit => "Fieldgate, `commit`",
            Self::Interval => "Fieldgate, `interval`",
        }
    }
}

/// What a bridge speaks, and how many messages may be on their way.
#[derive(Clone, Copy)]
pub struct Line {
    pub protocol: Protocol,
    pub qos: u8,
    /// What the upstream says in 5.0; nobody says it in 3.1.1. Mosquitto's bridge does not listen, and has to be told.
    pub window: u64,
}

impl Line {
    /// Where the line is not what is measured.
    pub const LIVE: Self = Self { protocol: Protocol::V5, qos: 1, window: 1000 };
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    V3_1_1,
    V5,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::V3_1_1 => "3.1.1",
            Self::V5 => "5",
        }
    }
}

/// A local broker whose bridge sends everything to `upstream`.
pub struct Gateway {
    pub broker: Broker,
    bridge: Bridge,
    web: SocketAddr,
}

impl Gateway {
    pub fn start(bridge: Bridge, fieldgate: &Path, upstream: SocketAddr, line: Line) -> Self {
        let Line { protocol, qos, window } = line;
        // What nobody wants is forwarded is not kept either.
        let qos = qos.max(1);
        let web = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let kind = if bridge == Bridge::Mosquitto { Kind::Mosquitto } else { Kind::Fieldgate };
        let broker = Broker::start_with(kind, fieldgate, |port, data| match bridge {
            Bridge::Mosquitto => format!(
                "{}max_inflight_messages {window}\nmax_queued_messages 0\nmax_queued_bytes 0\nconnection bench\n\
                 address {upstream}\nbridge_protocol_version {}\ntopic # out {qos}\ncleansession false\n\
                 notifications false\nrestart_timeout 1\n",
                mosquitto_basics(port),
                if protocol == Protocol::V5 { "mqttv50" } else { "mqttv311" },
            ),
            Bridge::Commit | Bridge::Interval => format!(
                "gateway: {{ name: bench }}\nlog: {{ level: warn }}\n\
                 store: {{ directory: \"{data}\", durability: {durability}, max_size: 64GiB }}\n\
                 listeners: [ {{ name: bench, address: \"127.0.0.1:{port}\" }} ]\nweb: {{ address: \"{web}\" }}\n\
                 upstreams:\n  - name: up\n    url: \"mqtt://{upstream}\"\n    version: {version}\n    out: [ {{ filter: \"#\", qos: {qos} }} ]\n\
                 \x20   queue: {{ max_messages: {QUEUE_MESSAGES}, max_bytes: 64GiB }}\n",
                data = data.display(),
                version = protocol.name(),
                durability = if bridge == Bridge::Commit { "commit" } else { "interval" },
            ),
        });
        let gateway = Self { broker, bridge, web };
        gateway.cut();
        gateway
    }

    /// Cuts the bridge's connection, and keeps it cut.
    pub fn cut(&self) {
        self.control("pause");
    }

    /// Lets the bridge connect. Mosquitto's tries by itself once a second.
    pub fn connect(&self) {
        self.control("resume");
    }

    fn control(&self, action: &str) {
        if self.bridge != Bridge::Mosquitto {
            self.request(&format!("POST /api/v1/upstreams/up/{action}"));
        }
    }

    /// What the store counts.
    pub fn counters(&self) -> Counters {
        if self.bridge == Bridge::Mosquitto {
            return Counters::default();
        }
        let text = self.request("GET /metrics");
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|number| number.parse::<f64>().ok()).unwrap_or_else(|| panic!("{name} is a metric")) as u64
        };
        Counters {
            commits: value("fieldgate_store_commits_total"),
            syncs: value("fieldgate_store_syncs_total"),
            written: value("fieldgate_store_written_bytes_total"),
        }
    }

    fn request(&self, line: &str) -> String {
        let mut stream = TcpStream::connect(self.web).expect("the API listens");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket");
        let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("the API reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the API answers");
        assert!(answer.starts_with("HTTP/1.1 2"), "{line}: {answer}");
        answer
    }
}

/// Sums since the start.
#[derive(Clone, Copy, Default)]
pub struct Counters {
    pub commits: u64,
    pub syncs: u64,
    pub written: u64,
}
