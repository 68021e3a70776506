//! A line that the kernel makes: the gateway lives in a network namespace, and an Ethernet cable leads from there to the
//! upstream (nftables drops and rejects what passes, tc makes it slow). Another one leads to its publishers, on which
//! nothing ever happens.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::PATIENCE;
use crate::line::{Dead, Weather};
use crate::namespaces::tell;

/// Where the upstream listens.
pub const UPSTREAM: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Where the gateway listens.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 2);
/// The cables' ends have the same names on both sides.
const TO_UPSTREAM: &str = "line";
const TO_PUBLISHERS: &str = "door";
/// How long connections may take to send something, and so to learn that they are refused.
const RESET: Duration = Duration::from_millis(500);
const MOMENT: Duration = Duration::from_millis(5);

pub struct Cable {
    /// The gateway's namespace lives as long as this process.
    holder: Child,
    upstream_port: u16,
}

impl Cable {
    /// In namespaces that are ours alone.
    pub fn lay() -> Self {
        let holder = Command::new("unshare").args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let cable = Self { holder: holder.expect("unshare, of util-linux"), upstream_port: 0 };
        let ours = fs::read_link("/proc/self/ns/net").unwrap();
        let deadline = Instant::now() + PATIENCE;
        while fs::read_link(cable.namespace()).is_ok_and(|theirs| theirs == ours) {
            assert!(Instant::now() < deadline, "the gateway gets no namespace");
            sleep(MOMENT);
        }
        let ip = |text: &str| tell("ip", &text.split(' ').collect::<Vec<_>>(), "");
        ip("link set lo up");
        cable.tell_inside("ip", &["link", "set", "lo", "up"], "");
        for (index, name) in [TO_UPSTREAM, TO_PUBLISHERS].into_iter().enumerate() {
            ip(&format!("link add {name} type veth peer name {name} netns {}", cable.holder.id()));
            ip(&format!("addr add 10.77.{index}.1/24 dev {name}"));
            ip(&format!("link set {name} up"));
            cable.tell_inside("ip", &["addr", "add", &format!("10.77.{index}.2/24"), "dev", name], "");
            cable.tell_inside("ip", &["link", "set", name, "up"], "");
        }
        let table = "table inet line {
            chain out { type filter hook output priority 0; }
            chain in { type filter hook input priority 0; }
        }";
        cable.tell_inside("nft", &["-f", "-"], table);
        cable
    }

    /// What to run a program under, so that it is at the other end.
    pub fn under(&self) -> Vec<String> {
        vec!["nsenter".into(), format!("--net={}", self.namespace()), "--".into()]
    }

    pub fn lead_to(&mut self, upstream_port: u16) {
        self.upstream_port = upstream_port;
    }

    pub fn upstream(&self) -> SocketAddr {
        (UPSTREAM, self.upstream_port).into()
    }

    pub fn set(&self, weather: Weather) {
        match weather {
            Weather::Clear => {
                self.filter(&[]);
                self.send_through(&["pfifo", "limit", "1000"]);
            }
            // With as much waiting in line as a modem has.
            Weather::Slow => self.send_through(&["tbf", "rate", "64kbit", "burst", "2kb", "latency", "1s"]),
            Weather::Blackhole => self.filter(&["out oifname line drop", "in iifname line drop"]),
        }
    }

    /// Whoever sends something gets an RST for it, in both directions, until no connection is left of those there were.
    pub fn reset(&self) {
        let before = self.connections();
        self.filter(&[
            // Those that are made here.
            "out tcp flags & rst == rst accept",
            "out oifname line meta l4proto tcp reject with tcp reset",
            "in iifname line meta l4proto tcp reject with tcp reset",
        ]);
        let begun = Instant::now();
        while self.connections().iter().any(|port| before.contains(port)) && begun.elapsed() < RESET {
            sleep(MOMENT);
        }
        self.filter(&[]);
    }

    pub fn half_open(&self, dead: Dead) {
        let ports: Vec<_> = self.connections().iter().map(u16::to_string).collect();
        let ports = ports.join(", ");
        let outgoing = format!("out oifname line tcp sport {{ {ports} }} drop");
        let incoming = format!("in iifname line tcp dport {{ {ports} }} drop");
        match dead {
            _ if ports.is_empty() => {}
            Dead::Both => self.filter(&[&outgoing, &incoming]),
            Dead::Outgoing => self.filter(&[&outgoing]),
            Dead::Incoming => self.filter(&[&incoming]),
        }
    }

    /// The ports from which the gateway is connected to its upstream.
    fn connections(&self) -> Vec<u16> {
        let port = |address: &str| u16::from_str_radix(address.rsplit(':').next()?, 16).ok();
        let table = fs::read_to_string(format!("/proc/{}/net/tcp", self.holder.id())).unwrap();
        let rows = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        // Number, local address, remote address, state; 1 is ESTABLISHED.
        let established = rows.filter(|row| row[3] == "01" && port(row[2]) == Some(self.upstream_port));
        established.filter_map(|row| port(row[1])).collect()
    }

    /// These rules and no others.
    fn filter(&self, rules: &[&str]) {
        let added: String = rules.iter().map(|rule| format!("add rule inet line {rule}\n")).collect();
        self.tell_inside("nft", &["-f", "-"], &format!("flush table inet line\n{added}"));
    }

    /// The queue at both ends.
    fn send_through(&self, queue: &[&str]) {
        let command = [&["qdisc", "replace", "dev", TO_UPSTREAM, "root"], queue].concat();
        tell("tc", &command, "");
        self.tell_inside("tc", &command, "");
    }

    fn tell_inside(&self, program: &str, arguments: &[&str], input: &str) {
        let under = self.under();
        let all: Vec<_> =
            under[1..].iter().map(String::as_str).chain([program]).chain(arguments.iter().copied()).collect();
        tell(&under[0], &all, input);
    }

    fn namespace(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
