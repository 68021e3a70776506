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
//! | `FIELDGATE_CRASH_FAULTS` | which faults, as in `kill_gateway,reset`; names in `run::Fault` |
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
mod proof;
mod proxy;
mod random;
mod run;
mod wire;

use std::time::Duration;

use line::Link;
use run::{Fault, Peer, Plan, run};

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
