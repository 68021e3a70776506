//! Fieldgate beside mosquitto and rumqttd: same machine, same load, alternating in one run. The broker, and the bridge.
//!
//! `benches/run` builds everything and prints the tables. The load generator speaks MQTT 3.1.1 on its own few lines, so
//! that no broker is measured with its own client. Every number is a ratio to mosquitto in the same run.

mod bridge;
mod brokers;
mod client;
mod load;
mod peer_rumqttd;
mod process;
mod scale;
mod table;

use std::net::SocketAddr;
use std::path::Path;

const USAGE: &str = "\
Usage:
  fieldgate-bench table FIELDGATE_BINARY [ROUNDS [SECONDS]]
                                                    the broker's whole table (mosquitto must be installed): one round, and 4
                                                    seconds for each load of each broker
  fieldgate-bench rates|latencies|memory FIELDGATE_BINARY [ROUNDS [SECONDS]]
                                                    a part of it
  fieldgate-bench subscriptions FIELDGATE_BINARY [SECONDS]
                                                    publishes beside 10, 1,000 and 100,000 subscriptions of others
  fieldgate-bench retained FIELDGATE_BINARY [MESSAGES]
                                                    a million retained messages
  fieldgate-bench restart FIELDGATE_BINARY [MESSAGES]
                                                    restarts with a million queued messages
  fieldgate-bench durable FIELDGATE_BINARY [SECONDS]
                                                    QoS 1 into an offline session
  fieldgate-bench tls FIELDGATE_BINARY [CONNECTIONS]
                                                    memory for each idle TLS connection
  fieldgate-bench bridge FIELDGATE_BINARY [MESSAGES [ROUNDS]]
                                                    store-and-forward beside mosquitto's bridge; 1000000 messages, 3 rounds
  fieldgate-bench outage FIELDGATE_BINARY mosquitto|commit|interval sink|mosquitto|fieldgate 3.1.1|5 QOS WINDOW MESSAGES
                                                    one outage: fill the bridge's queue, then drain it; WINDOW is
                                                    mosquitto's
  fieldgate-bench flash FIELDGATE_BINARY [SECONDS [MESSAGES]]
                                                    what is written to the disk in each situation, for 30 seconds each, and
                                                    by the drain of 1000000 messages
  fieldgate-bench limit FIELDGATE_BINARY sink|mosquitto|fieldgate WINDOW MESSAGES
                                                    what an upstream takes from somebody whom messages cost nothing
  fieldgate-bench forward FIELDGATE_BINARY          latency and bytes written while the uplink keeps up
  fieldgate-bench start FIELDGATE_BINARY MEBIBYTES  start-up with a queue of this size
  fieldgate-bench load ADDRESS QOS PUBLISHERS SUBSCRIBERS MESSAGES
                                                    one load against a running broker, for profiling
  fieldgate-bench latency ADDRESS RATE SECONDS      QoS 1 latency at a rate
  fieldgate-bench idle ADDRESS CONNECTIONS PID      memory for each idle connection";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    raise_file_limit();
    match words[..] {
        ["table" | "rates" | "latencies" | "memory", binary] => part(words[0], binary, 1, 4),
        ["table" | "rates" | "latencies" | "memory", binary, rounds] => part(words[0], binary, number(rounds), 4),
        ["table" | "rates" | "latencies" | "memory", binary, rounds, seconds] => {
            part(words[0], binary, number(rounds), number(seconds));
        }
        ["subscriptions", binary] => scale::subscriptions(Path::new(binary), 5),
        ["subscriptions", binary, seconds] => scale::subscriptions(Path::new(binary), number(seconds)),
        ["retained", binary] => scale::retained(Path::new(binary), 1_000_000),
        ["retained", binary, messages] => scale::retained(Path::new(binary), number(messages)),
        ["restart", binary] => scale::restart(Path::new(binary), 1_000_000),
        ["restart", binary, messages] => scale::restart(Path::new(binary), number(messages)),
        ["durable", binary] => scale::durable(Path::new(binary), 5),
        ["durable", binary, seconds] => scale::durable(Path::new(binary), number(seconds)),
        ["tls", binary] => scale::tls(Path::new(binary), 3000),
        ["tls", binary, connections] => scale::tls(Path::new(binary), number(connections)),
        ["bridge", binary] => bridge::run(Path::new(binary), 1_000_000, 3),
        ["bridge", binary, messages] => bridge::run(Path::new(binary), number(messages), 1),
        ["bridge", binary, messages, rounds] => bridge::run(Path::new(binary), number(messages), number(rounds)),
        ["outage", binary, whose, upstream, protocol, qos, window, messages] => {
            let line = (protocol, number(qos), number(window));
            bridge::outage(Path::new(binary), whose, upstream, line, number(messages));
        }
        ["limit", binary, upstream, window, messages] => {
            bridge::limit(Path::new(binary), upstream, number(window), number(messages));
        }
        ["flash", binary] => bridge::flash(Path::new(binary), 30, 1_000_000),
        ["flash", binary, seconds] => bridge::flash(Path::new(binary), number(seconds), 1_000_000),
        ["flash", binary, seconds, messages] => bridge::flash(Path::new(binary), number(seconds), number(messages)),
        ["forward", binary] => bridge::forwarding(Path::new(binary)),
        ["start", binary, mebibytes] => _ = bridge::start_up(Path::new(binary), number(mebibytes)),
        ["load", address, qos, publishers, subscribers, messages] => {
            let load = load::Load::new(number(qos), number(publishers), number(subscribers), number(messages));
            println!("{}", load::throughput(address_of(address), load));
        }
        ["latency", address, rate, seconds] => {
            println!("{}", load::latency(address_of(address), number(rate), number(seconds)));
        }
        ["idle", address, connections, pid] => {
            let kib = load::idle(address_of(address), number(connections), number(pid));
            println!("{kib:.2} KiB for each idle connection");
        }
        // What `table` runs itself as: rumqttd is a library.
        ["rumqttd", port] => peer_rumqttd::run(number(port)),
        // What `tls` runs itself as.
        ["bare-tls", port, certificate, key] => scale::serve_bare_tls(number(port), certificate, key),
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(1);
        }
    }
}

fn part(name: &str, binary: &str, rounds: usize, seconds: u64) {
    let binary = Path::new(binary);
    match name {
        "rates" => table::rates(binary, rounds, seconds),
        "latencies" => table::latencies(binary, rounds, 2 * seconds),
        "memory" => table::memory(binary),
        _ => table::run(binary, rounds, seconds),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| {
        eprintln!("`{text}` is not a number here\n{USAGE}");
        std::process::exit(1);
    })
}

fn address_of(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| {
        eprintln!("`{text}` is not an address such as 127.0.0.1:1883");
        std::process::exit(1);
    })
}

/// Ten thousand connections need as many files, here and in the brokers that inherit the limit.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(65_536, |most| most.min(65_536));
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit });
}
