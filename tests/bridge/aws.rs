//! A broker with the limits of AWS IoT Core, which ends the connection on what goes over them, and the recipe for it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use fieldgate::bridge::Settings;
use fieldgate::config;
use fieldgate::config::report::Look;
use fieldgate::message::QoS;
use fieldgate::proto::mqtt::{Property, ReasonCode, Version};

use super::peer::{Connection, Got, Peer, Publish};
use super::tls::{Authority, DAY};
use super::{Gateway, QUIET, settings};

const MAX_IN_FLIGHT: u16 = 100;
const MAX_PAYLOAD: u32 = 128 * 1024;

/// The recipe's upstream, led to `peer`.
fn recipe(authority: &Authority, peer: &Peer) -> Settings {
    let directory = tempfile::tempdir().unwrap();
    authority.issue("client", 365 * DAY);
    std::os::unix::fs::symlink(authority.file(""), directory.path().join("tls")).unwrap();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/upstreams/aws-iot-core.yaml");
    let path = directory.path().join("aws.yaml");
    fs::copy(sample, &path).unwrap();
    let loaded = config::load(&path).unwrap_or_else(|reports| panic!("{}", reports.render(Look::Plain)));
    let mut upstream = loaded.config.upstreams.into_iter().next().unwrap();
    upstream.urls = vec![peer.url()];
    upstream.tls.server_name = Some("localhost".into());
    upstream.tls.ca = Some(authority.file("ca.pem"));
    upstream.tls.identity = Some(authority.issue("client", 365 * DAY));
    Settings { backoff: settings(peer).backoff, ..upstream }
}

/// Takes the next connection as AWS does.
async fn greet(peer: &Peer) -> Connection {
    let mut connection = peer.accept().await;
    let shown = connection.shown.clone().unwrap();
    assert_eq!((shown.server_name.as_deref(), shown.alpn.as_deref()), (Some("localhost"), Some("x-amzn-mqtt-ca")));
    assert!(shown.certificate.is_some());
    let Got::Connect { version, client_id, will, .. } = connection.next().await else { panic!("a CONNECT first") };
    assert_eq!((version, client_id.as_str()), (Version::V5, "plant-7"));
    let will = will.unwrap();
    assert!(will.qos <= 1 && allows(&will.topic), "{will:?}");
    let limits = [
        Property::MaximumQoS(QoS::AtLeastOnce),
        Property::ReceiveMaximum(MAX_IN_FLIGHT.try_into().unwrap()),
        Property::MaximumPacketSize(MAX_PAYLOAD.try_into().unwrap()),
    ];
    connection.connack(false, ReasonCode::Success, &limits).await;
    connection
}

/// What may be published to and subscribed.
fn allows(topic: &str) -> bool {
    topic.len() <= 256 && topic.matches('/').count() <= 7 && !topic.starts_with('$')
}

/// Receives `count` messages, and how many of them were in flight at most: they are acknowledged when no more come.
async fn receive(connection: &mut Connection, count: usize) -> (Vec<Publish>, usize) {
    let (mut received, mut unacknowledged, mut most) = (Vec::<Publish>::new(), Vec::new(), 0);
    while received.len() < count || !unacknowledged.is_empty() {
        let publish = match connection.within(5 * QUIET).await {
            Some(Got::Publish(publish)) => publish,
            Some(other) => panic!("a PUBLISH was expected, not {other:?}"),
            None => {
                for id in unacknowledged.drain(..) {
                    connection.puback(id, ReasonCode::Success).await;
                }
                continue;
            }
        };
        let fits = publish.qos <= 1 && allows(&publish.topic) && publish.payload.len() <= MAX_PAYLOAD as usize;
        assert!(fits, "AWS would end the connection: {publish:?}");
        unacknowledged.push(publish.id);
        most = most.max(unacknowledged.len());
        received.push(publish);
    }
    (received, most)
}

#[tokio::test]
async fn the_recipe_for_aws_keeps_within_its_limits_whatever_devices_publish() {
    const COUNT: usize = 300;
    let authority = Authority::new();
    let mut server = authority.server();
    server.alpn_protocols = vec![b"x-amzn-mqtt-ca".to_vec()];
    let peer = Peer::bind_tls(Arc::new(server)).await;
    let mut gateway = Gateway::start(recipe(&authority, &peer));
    gateway.publish("devices/m/v", &"x".repeat(MAX_PAYLOAD as usize), QoS::ExactlyOnce).await;
    gateway.publish("devices/a/b/c/d/e/f/g/h", "too deep, and no rule's", QoS::ExactlyOnce).await;
    for number in 0..COUNT {
        gateway.publish("devices/m/v", &number.to_string(), QoS::ExactlyOnce).await;
    }
    gateway.publish("devices/m/v/set/result", "{}", QoS::AtLeastOnce).await;
    let mut connection = greet(&peer).await;
    let state = connection.next_publish().await;
    assert!(state.qos == 0 && allows(&state.topic));
    let filters = connection.grant().await;
    assert!(filters.len() <= 8 && filters.iter().all(|(filter, qos, _)| allows(filter) && *qos <= QoS::AtLeastOnce));
    let (received, most_in_flight) = receive(&mut connection, COUNT + 1).await;
    assert_eq!(most_in_flight, usize::from(MAX_IN_FLIGHT));
    let payloads: Vec<_> = received.iter().map(|publish| publish.payload.clone()).collect();
    let numbers = (0..COUNT).map(|number| number.to_string());
    assert_eq!(payloads, numbers.chain(["{}".to_owned()]).collect::<Vec<_>>());
    assert_eq!(received[0].topic, "dt/plant-7/m/v");
    assert_eq!(received[COUNT].topic, "cmd/plant-7/m/v/result");
    gateway.drained().await;
    assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"too_large\"} 1"));
    assert_eq!(connection.within(QUIET).await, None);
    gateway.stop().await;
}
