//! What the MQTT-SN gateway tells about itself.

use std::net::SocketAddr;

use parking_lot::Mutex;

use crate::clock::UnixMillis;
use crate::observe::{Health, Kind, Metrics, Observe, Status};
use crate::proto::mqttsn::action::DropReason;
use crate::proto::mqttsn::client::ClientState;
use crate::proto::mqttsn::gateway::Counters;
use crate::proto::mqttsn::packet::PacketKind;

/// The latest numbers, written by the gateway's task and read by whoever looks.
#[derive(Debug)]
pub struct Report {
    address: SocketAddr,
    since: UnixMillis,
    numbers: Mutex<Numbers>,
}

#[derive(Clone, Debug, Default)]
pub struct Numbers {
    pub counters: Counters,
    pub states: [usize; ClientState::COUNT],
    /// Datagrams that the operating system did not send.
    pub send_errors: u64,
    /// What does not work though clients are served.
    pub trouble: Option<String>,
}

impl Report {
    pub fn new(address: SocketAddr, since: UnixMillis, trouble: Option<String>) -> Self {
        Self { address, since, numbers: Mutex::new(Numbers { trouble, ..Numbers::default() }) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn update(&self, counters: &Counters, states: [usize; ClientState::COUNT], send_errors: u64) {
        let mut numbers = self.numbers.lock();
        numbers.counters.clone_from(counters);
        numbers.states = states;
        numbers.send_errors = send_errors;
    }
}

impl Observe for Report {
    fn statuses(&self) -> Vec<Status> {
        let numbers = self.numbers.lock().clone();
        let state = |state: ClientState| numbers.states[state as usize].to_string();
        let received: u64 = numbers.counters.received[PacketKind::Publish as usize];
        vec![Status {
            kind: Kind::Listener,
            name: "mqtt-sn".to_owned(),
            parent: None,
            health: if numbers.trouble.is_some() { Health::Degraded } else { Health::Good },
            reason: numbers.trouble.clone(),
            since: self.since,
            facts: vec![
                ("Address", format!("udp {}", self.address)),
                ("Active", state(ClientState::Active)),
                ("Asleep", state(ClientState::Asleep)),
                ("Lost", state(ClientState::Lost)),
                ("Published", received.to_string()),
            ],
        }]
    }

    fn collect(&self, metrics: &mut Metrics) {
        let numbers = self.numbers.lock().clone();
        let clients = "MQTT-SN clients, by state.";
        for (name, count) in ClientState::NAMES.iter().zip(numbers.states) {
            metrics.gauge("fieldgate_mqttsn_clients", clients, &[("state", name)], count as f64);
        }
        let families = [
            ("fieldgate_mqttsn_received_total", "MQTT-SN messages received, by type.", &numbers.counters.received),
            ("fieldgate_mqttsn_sent_total", "MQTT-SN messages sent, by type.", &numbers.counters.sent),
        ];
        for (family, help, counts) in families {
            for (kind, count) in PacketKind::NAMES.iter().zip(counts).filter(|(_, count)| **count > 0) {
                metrics.counter(family, help, &[("type", kind)], *count);
            }
        }
        let dropped = "MQTT-SN messages that were not passed on, by reason.";
        for (reason, count) in DropReason::NAMES.iter().zip(numbers.counters.dropped) {
            metrics.counter("fieldgate_mqttsn_dropped_total", dropped, &[("reason", reason)], count);
        }
        let lost = "MQTT-SN clients that stopped answering.";
        metrics.counter("fieldgate_mqttsn_lost_clients_total", lost, &[], numbers.counters.lost_clients);
        let errors = "MQTT-SN datagrams that could not be sent.";
        metrics.counter("fieldgate_mqttsn_send_errors_total", errors, &[], numbers.send_errors);
    }
}
