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
mod table;

use std::net::SocketAddr;
use std::path::Path;

const USAGE: &str = "\
Usage:
  fieldgate-bench table FIELDGATE_BINARY [ROUNDS]   the whole table (mosquitto must be installed)
  fieldgate-bench bridge FIELDGATE_BINARY [MESSAGES [ROUNDS]]
                                                    store-and-forward beside mosquitto's bridge; 1000000 messages, 3 rounds
  fieldgate-bench outage FIELDGATE_BINARY mosquitto|commit|interval sink|mosquitto|fieldgate QOS MESSAGES
                                                    one outage: fill the bridge's queue, then drain it
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
        ["table", binary] => table::run(binary, 3),
        ["table", binary, rounds] => table::run(binary, number(rounds)),
        ["bridge", binary] => bridge::run(Path::new(binary), 1_000_000, 3),
        ["bridge", binary, messages] => bridge::run(Path::new(binary), number(messages), 1),
        ["bridge", binary, messages, rounds] => bridge::run(Path::new(binary), number(messages), number(rounds)),
        ["outage", binary, whose, upstream, qos, messages] => {
            bridge::outage(Path::new(binary), whose, upstream, number(qos), number(messages));
        }
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
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(1);
        }
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
