//! Nothing acknowledged is lost, and QoS 2 is exactly once, whatever happens to gateways, lines and disks (promises 1
//! to 4 and 6).
//!
//! Publishers with QoS 1 and 2 on one gateway, its upstream is a second gateway or a mosquitto, a subscriber with a
//! lasting session hangs on that one; between the two runs a line that breaks in every way lines do. Round by round
//! something goes wrong, chosen at random from a seed, and at the end what was acknowledged is held against what came.
//!
//! | file | what |
//! | --- | --- |
//! | `run` | the rounds: what goes wrong, and when it is over |
//! | `oracle` | acknowledged against arrived, by fault |
//! | `proof` | `fieldgate prove` against the oracle |
//! | `clients` `wire` | publishers and subscriber, from the packet formats |
//! | `gateway` `mosquitto` | processes that can be killed and started again |
//! | `line` `proxy` `cable` | what lines do: this process as the line, or the kernel |
//! | `namespaces` `damage` | networks and disks of this test's own; what bad disks do |
//!
//! As part of `cargo test` it is short. `tests/crash-rounds 1000` does a thousand rounds with every kind of upstream and
//! line, several runs side by side, and reports each run in a line. To repeat one of them:
//!
//! ```text
//! FIELDGATE_CRASH_SEED=7 FIELDGATE_CRASH_ROUNDS=50 FIELDGATE_CRASH_LINK=netns FIELDGATE=target/release/fieldgate \
//!     cargo test --test crash nothing_acknowledged -- --nocapture
//! ```
//!
//! | variable | what |
//! | --- | --- |
//! | `FIELDGATE_CRASH_ROUNDS` | how often something goes wrong |
//! | `FIELDGATE_CRASH_SEED` | what, when and for how long |
//! | `FIELDGATE_CRASH_FAULTS` | which faults, as in `kill_gateway,reset`; names in `run::Fault`; `damage` needs the `proxy` link |
//! | `FIELDGATE_CRASH_UPSTREAM` | `fieldgate`, or `mosquitto`, which must be installed and is not killed |
//! | `FIELDGATE_CRASH_LINK` | `proxy`, or `netns`: then the kernel drops, rejects and delays what passes between two network namespaces, and the gateway's disk fills up too. For `nothing_acknowledged…` only |
//! | `FIELDGATE_CRASH_AHEAD` | how many messages may be under way |
//! | `FIELDGATE` | the program; that of this build if absent |

mod cable;
mod clients;
mod damage;
mod gateway;
mod line;
mod mosquitto;
mod namespaces;
mod oracle;
mod packets;
mod proof;
mod proxy;
mod random;
mod run;
mod wire;

use std::net::Ipv4Addr;
use std::time::Duration;

use damage::lose_pages;
use gateway::Gateway;
use line::Link;
use run::{Fault, Peer, Plan, run};
use wire::{Version, Wire, packet_id};

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(120);

fn variable(name: &str) -> Option<String> {
    std::env::var(format!("FIELDGATE_CRASH_{name}")).ok()
}

fn number(name: &str, default: u64) -> u64 {
    variable(name).map_or(default, |text| text.parse().expect(name))
}

/// A plan with `rounds` of `faults`, where the variables do not say otherwise.
fn plan(rounds: u64, faults: &[Fault]) -> Plan {
    let upstream = match variable("UPSTREAM").as_deref() {
        None | Some("fieldgate") => Peer::Fieldgate,
        Some("mosquitto") => Peer::Mosquitto,
        Some(other) => panic!("no upstream is called `{other}`"),
    };
    let mut faults = variable("FAULTS").map_or(faults.to_vec(), |names| names.split(',').map(Fault::parse).collect());
    faults.retain(|fault| upstream == Peer::Fieldgate || !matches!(fault, Fault::KillUpstream | Fault::KillBoth));
    Plan {
        rounds: number("ROUNDS", rounds),
        seed: number("SEED", 1),
        faults,
        upstream,
        link: Link::Proxy,
        max_size: "2MiB",
        rules: r##"{ filter: "plant/#", qos: 2, provenance: user_properties }"##,
        unordered: &[],
        subscriber_queue: None,
        max_ahead: number("AHEAD", 20_000) as usize,
    }
}

#[test]
fn nothing_acknowledged_is_lost_and_qos_2_is_exactly_once_whatever_happens() {
    let (link, faults) = match variable("LINK").as_deref() {
        None | Some("proxy") => (Link::Proxy, Fault::PORTABLE),
        Some("netns") => (Link::Netns, Fault::HARMLESS),
        Some(other) => panic!("no link is called `{other}`"),
    };
    let plan = Plan { link, ..plan(12, faults) };
    // Only the web UI, which a gateway in a namespace is without, tells that nothing waits: what a damage may have hit is
    // not known otherwise.
    assert!(link == Link::Proxy || !plan.faults.contains(&Fault::Damage), "`damage` needs the `proxy` link");
    let needs_namespaces = link == Link::Netns || plan.faults.contains(&Fault::Disk);
    let test = "nothing_acknowledged_is_lost_and_qos_2_is_exactly_once_whatever_happens";
    if !needs_namespaces || namespaces::are_ours(test) {
        run(&plan);
    }
}

#[test]
fn lanes_keep_what_one_queue_keeps() {
    let rules = r##"
        { filter: "plant/one-a/#", qos: 2, priority: high, provenance: user_properties },
        { filter: "plant/two-a/#", qos: 2, live_share: 30%, provenance: user_properties },
        { filter: "plant/two-b/#", qos: 2, priority: low, provenance: user_properties },
        { filter: "plant/#", qos: 2, provenance: user_properties } "##;
    run(&Plan { rules, unordered: &["two-a"], ..plan(8, Fault::PORTABLE) });
}

#[test]
fn what_a_limit_drops_is_counted_and_nothing_else_is_lost() {
    let plan = Plan {
        upstream: Peer::Fieldgate,
        subscriber_queue: Some("max_queued_messages: 300, when_full: drop_newest"),
        ..plan(4, &[Fault::KillGateway, Fault::Reset])
    };
    let verdict = run(&plan);
    assert!(verdict.total().reported > 0, "the limit was never reached");
}

#[test]
fn a_damaged_database_is_reported_and_what_comes_after_it_is_kept() {
    run(&plan(4, &[Fault::Damage]));
}

/// The gateway need not be started again, and who has nothing on the lost pages notices nothing.
#[test]
fn pages_lost_under_a_running_gateway_cost_what_lay_on_them() {
    // More than SQLite keeps in memory.
    const MESSAGES: u32 = 12_000;
    let directory = tempfile::tempdir().unwrap();
    let config = "store: { directory: data }\nlimits: { max_queued_messages: 100000 }\nweb: { enabled: false }\n\
                  listeners: [ { name: local, address: 127.0.0.1:{port} } ]\n";
    let mut gateway = Gateway::start_new(directory.path(), config.into(), Vec::new());
    let address = |gateway: &Gateway| (Ipv4Addr::LOCALHOST, gateway.port).into();
    for (client, filter) in [("hit", "plant/#"), ("spared", "other/#")] {
        let mut wire = Wire::connect_in_time(address(&gateway), client, Version::V5).0;
        wire.subscribe(filter).unwrap();
        wire.until(0x90);
    }
    let mut publisher = Wire::connect_in_time(address(&gateway), "publisher", Version::V3_1_1).0;
    for number in 0..MESSAGES {
        let id = (number % 60_000) as u16 + 1;
        publisher.publish(0x02, "plant/a", id, format!("{number:0500}").as_bytes()).unwrap();
        if number % 100 == 0 {
            publisher.publish(0x02, "other/a", 65_000, number.to_string().as_bytes()).unwrap();
            publisher.until(0x40);
        }
        if number >= 50 {
            publisher.until(0x40);
        }
    }
    (0..50).for_each(|_| publisher.until(0x40));
    gateway.kill();
    gateway.start();
    lose_pages(&gateway.data(), 300..306);

    let receive = |gateway: &Gateway, client: &str, last: u32| {
        let (mut wire, present) = Wire::connect_in_time(address(gateway), client, Version::V5);
        assert!(present);
        let mut numbers: Vec<u32> = Vec::new();
        while numbers.last() != Some(&last) {
            let (kind, body) = wire.until_any();
            match kind & 0xf0 {
                0x30 => {
                    let message = wire.published(kind, &body);
                    numbers.push(String::from_utf8(message.payload).unwrap().parse().unwrap());
                    wire.acknowledge(0x40, message.packet_id).unwrap();
                }
                // Of a message that is lost it is not known that it was QoS 1.
                0x60 => wire.acknowledge(0x70, packet_id(&body)).unwrap(),
                kind => panic!("{client} gets a packet {kind:#x}"),
            }
        }
        assert!(numbers.is_sorted(), "{client}");
        numbers
    };
    let numbers = receive(&gateway, "hit", MESSAGES - 1);
    assert!((MESSAGES - 200..MESSAGES).contains(&(numbers.len() as u32)), "{}", numbers.len());
    assert_eq!(receive(&gateway, "spared", MESSAGES - 100).len() as u32, MESSAGES / 100);
    let errors = gateway.errors();
    assert!(errors[0].contains("moved aside") && errors[1].contains("client_id=hit"), "{errors:#?}");
    assert_eq!(errors.len(), 2, "{errors:#?}");
}
