//! What the operator decides about MQTT-SN.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::address::AddressRange;
use crate::hub::QueueLimits;
use crate::proto::mqttsn::client::Rules;
use crate::proto::mqttsn::gateway::{self, Connectionless};
use crate::proto::mqttsn::topics::Predefined;
use crate::throttle::AddressLimits;

/// How the gateway serves MQTT-SN clients.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Where clients send to. To be found by SEARCHGW over multicast, `0.0.0.0` or the group's interface.
    pub address: SocketAddr,
    /// Distinct among the gateways that clients can hear.
    pub gateway_id: u8,
    /// Where to say that the gateway is there; `None`: clients know its address.
    pub advertise: Option<Advertise>,
    /// Topic ids, 1 to 0xFFFE, that clients use without asking.
    pub predefined_topics: Predefined,
    /// Who may publish with QoS −1; `None`: nobody.
    pub publish_without_connect: Option<PublishWithoutConnect>,
    /// Clients that are connected or remembered.
    pub max_clients: usize,
    /// The specification says 23.
    pub max_client_id_bytes: usize,
    /// Normal topic ids of one client.
    pub max_topics_per_client: usize,
    /// The longest message to a client, in octets, 64 to 65,507: what the radio link behind UDP carries.
    pub max_packet_size: usize,
    /// T_retry: how long to wait for a client's acknowledgement.
    pub retry_interval: Duration,
    /// N_retry: retransmissions before a client counts as lost.
    pub retry_limit: u32,
    /// How long the session of a client is kept that did not ask for a clean one; `None`: for ever.
    pub session_expiry: Option<Duration>,
    /// What waits for one client at most; `None`: as for MQTT clients.
    pub queue: Option<QueueLimits>,
    /// DISCONNECTs per second to those who send without being connected.
    pub max_stranger_answers_per_second: u32,
}

/// ADVERTISE (MQTT-SN 1.2 §6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advertise {
    /// A multicast group or a broadcast address. A group is also joined, to hear SEARCHGW.
    pub to: SocketAddr,
    /// T_ADV, up to 65,535 s; the specification recommends more than 15 minutes.
    pub interval: Duration,
}

/// QoS −1 (MQTT-SN 1.2 §6.8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishWithoutConnect {
    /// From where; empty: from everywhere.
    pub allow: Vec<AddressRange>,
    /// Messages per second, of all senders together.
    pub max_per_second: u32,
}

impl Default for PublishWithoutConnect {
    fn default() -> Self {
        Self { allow: Vec::new(), max_per_second: 100 }
    }
}

/// The largest payload of a UDP datagram over IPv4.
pub const MAX_DATAGRAM_BYTES: usize = 65_507;

const MIN_RETRY_INTERVAL: Duration = Duration::from_millis(100);

impl Default for Settings {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 1884).into(),
            gateway_id: 1,
            advertise: None,
            predefined_topics: Predefined::new(),
            publish_without_connect: None,
            max_clients: 10_000,
            max_client_id_bytes: 64,
            max_topics_per_client: 1000,
            max_packet_size: MAX_DATAGRAM_BYTES,
            retry_interval: Duration::from_secs(10),
            retry_limit: 3,
            session_expiry: None,
            queue: None,
            max_stranger_answers_per_second: 50,
        }
    }
}

impl Settings {
    pub(super) fn to_gateway(&self, addresses: AddressLimits) -> gateway::Settings {
        gateway::Settings {
            gateway_id: self.gateway_id,
            rules: Rules {
                // Shorter than any network's answer, it would only count a client as lost.
                retry_interval: self.retry_interval.max(MIN_RETRY_INTERVAL),
                retry_limit: self.retry_limit,
                max_packet_bytes: self.max_packet_size.min(MAX_DATAGRAM_BYTES),
                max_topics: self.max_topics_per_client,
                predefined: self.predefined_topics.clone(),
                forget_after: self.session_expiry,
            },
            max_clients: self.max_clients,
            max_client_id_bytes: self.max_client_id_bytes,
            addresses,
            connectionless: self
                .publish_without_connect
                .as_ref()
                .map(|publish| Connectionless { allow: publish.allow.clone(), max_per_second: publish.max_per_second }),
            max_stranger_answers_per_second: self.max_stranger_answers_per_second,
            advertise_interval: self.advertise.map(|advertise| advertise.interval),
        }
    }
}
