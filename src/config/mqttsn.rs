//! The section `mqttsn`.

use std::net::SocketAddr;
use std::time::Duration;

use super::access::queue_limits;
use super::claims::{Claim, Resource};
use super::report::Report;
use super::scalar::Size;
use super::table::Table;
use crate::hub::QueueLimits;
use crate::proto::mqttsn::topics::is_usable;
use crate::sensornet::{Advertise, MAX_DATAGRAM_BYTES, PublishWithoutConnect, Settings};
use crate::topic::TopicName;

pub(super) fn mqttsn(table: &mut Table<'_>) -> Option<Settings> {
    table.optional("mqttsn", "MQTT-SN over UDP, for sensors that sleep. Absent: not served.", read)
}

fn read(table: &mut Table<'_>) -> Option<Settings> {
    let defaults = Settings::default();
    let place = table.place_of("address").unwrap_or(table.place);
    let address = table.value("address", "Where sensors send to.").or(defaults.address);
    let owner = "the MQTT-SN gateway".to_owned();
    table.cx.claim(Claim { resource: Resource::UdpListen(address), place, owner });
    let gateway_id = table
        .value("gateway_id", "Distinct among the gateways that sensors can hear.")
        .range(1..=255)
        .or(defaults.gateway_id);
    let advertise = table.optional("advertise", "Tell sensors that the gateway is there.", |table| {
        let to = table.value::<SocketAddr>("to", "A multicast group or broadcast address, with port.").required();
        let interval = table
            .value("interval", "How often.")
            .range(Duration::from_secs(1)..=Duration::from_secs(65_535))
            .or(Duration::from_secs(1200));
        Some(Advertise { to: to?, interval })
    });
    let meaning = "Topic ids, 1 to 65534, that sensors use without asking: `1: sensors/door`.";
    let pairs = table.pairs::<u16, TopicName>("predefined_topics", meaning);
    for (id, _) in pairs.iter().filter(|(id, _)| !is_usable(id.value)) {
        table.report(Report::error(id.span, "a topic id is 1 to 65534"));
    }
    let publish_without_connect =
        table.optional("publish_without_connect", "Let sensors publish with QoS -1, without a connection.", |table| {
            let defaults = PublishWithoutConnect::default();
            let allow = table.values("allow", "From where; from everywhere if absent.");
            Some(PublishWithoutConnect {
                allow: allow.into_iter().map(|range| range.value).collect(),
                max_per_second: table
                    .value("max_per_second", "Messages per second, of all senders together.")
                    .range(1..=1_000_000)
                    .or(defaults.max_per_second),
            })
        });
    let queue =
        table.optional("queue", "What waits for one sleeping sensor at most; as `limits` if absent.", |table| {
            Some(queue_limits(table, "sensor", QueueLimits::default()))
        });
    Some(Settings {
        address,
        gateway_id,
        advertise,
        predefined_topics: pairs.into_iter().map(|(id, topic)| (id.value, topic.value)).collect(),
        publish_without_connect,
        max_clients: table
            .value("max_clients", "Sensors that are connected or remembered.")
            .range(1..=1_000_000)
            .or(defaults.max_clients),
        max_topics_per_client: table
            .value("max_topics_per_client", "Topic ids of one sensor.")
            .range(1..=65_534)
            .or(defaults.max_topics_per_client),
        max_packet_size: table
            .value("max_packet_size", "The longest message to a sensor: what the radio link behind UDP carries.")
            .range(Size(64)..=Size(MAX_DATAGRAM_BYTES as u64))
            .or(Size(defaults.max_packet_size as u64))
            .bytes(),
        retry_interval: table
            .value("retry_interval", "How long to wait for a sensor's acknowledgement.")
            .range(Duration::from_millis(100)..=Duration::from_secs(300))
            .or(defaults.retry_interval),
        retry_limit: table
            .value("retry_limit", "Retransmissions before a sensor counts as lost.")
            .range(0..=100)
            .or(defaults.retry_limit),
        session_expiry: table
            .value("session_expiry", "How long the session of a sensor is kept that is gone; for ever if absent.")
            .range(Duration::from_secs(1)..=Duration::from_secs(3650 * 86_400))
            .optional(),
        queue,
        ..defaults
    })
}
