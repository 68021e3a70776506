//! What messages say of where they come from, in user properties and in payloads.

use fieldgate::bridge::rules::{Provenance, RuleSettings};
use fieldgate::bridge::{Settings, VersionChoice};
use fieldgate::message::QoS;
use fieldgate::proto::mqtt::{Property, ReasonCode};
use serde_json::{Value, json};

use super::peer::{Peer, Publish};
use super::{Gateway, rule, settings};

fn with(provenance: Provenance, peer: &Peer) -> Settings {
    let outgoing = vec![RuleSettings { provenance, ..rule("devices/#", QoS::AtLeastOnce) }];
    Settings { outgoing, ..settings(peer) }
}

const WITHOUT: &str = "fieldgate_upstream_messages_without_provenance_total{upstream=\"cloud\"}";

#[tokio::test]
async fn provenance_numbers_messages_without_a_gap_and_the_same_when_they_are_sent_again() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(with(Provenance::UserProperties, &peer));
    let before = gateway.hub.clock().now().to_string();
    gateway.publish_numbers(0..3).await;
    let after = gateway.hub.clock().now().to_string();
    let value = |publish: &Publish, name: &str| {
        let found: Vec<_> = publish.user_properties.iter().filter(|(found, _)| found == name).collect();
        assert!(found.len() <= 1, "{found:?}");
        found.first().map(|(_, value)| value.clone())
    };
    let check = |publish: &Publish, number: u32| {
        assert_eq!(publish.payload, number.to_string());
        assert_eq!(value(publish, "fieldgate-sequence"), Some(number.to_string()));
        assert_eq!(value(publish, "fieldgate-boot").as_deref(), Some("boot"));
        value(publish, "fieldgate-time").unwrap()
    };
    let mut connection = peer.welcome(false, &[]).await;
    let mut times = Vec::new();
    for number in 0..3 {
        times.push(check(&connection.next_publish().await, number));
    }
    assert!(times.is_sorted() && before <= times[0] && times[2] <= after, "{before} {times:?} {after}");
    drop(connection);
    let mut connection = peer.welcome(true, &[]).await;
    for number in 0..3 {
        let publish = connection.next_publish().await;
        assert_eq!(check(&publish, number), times[number as usize], "the time is the message's, not the delivery's");
        connection.puback(publish.id, ReasonCode::Success).await;
    }
    gateway.publish("devices/m/v", "unkept", QoS::AtMostOnce).await;
    let publish = connection.next_publish().await;
    assert_eq!(value(&publish, "fieldgate-sequence"), None);
    assert!(value(&publish, "fieldgate-time").is_some());
    gateway.stop().await;
}

#[tokio::test]
async fn payloads_say_where_they_come_from_in_either_version_and_the_same_when_they_are_sent_again() {
    for version in [VersionChoice::V5, VersionChoice::V3_1_1] {
        let peer = Peer::bind().await;
        let mut gateway = Gateway::start(Settings { version, ..with(Provenance::Json, &peer) });
        for payload in ["{\"a\": 1.50 }", "230", "on"] {
            gateway.publish("devices/m/v", payload, QoS::AtLeastOnce).await;
        }
        let mut connection = peer.welcome(false, &[]).await;
        let first = connection.next_publish().await.payload;
        let start =
            "{\"a\": 1.50 ,\"fieldgate\":{\"queue\":\"plant-7/cloud\",\"boot\":\"boot\",\"sequence\":0,\"time\":\"";
        assert!(first.starts_with(start), "{first}");
        let read = |publish: Publish| serde_json::from_str::<Value>(&publish.payload).unwrap();
        let mut seen = Vec::new();
        for (sequence, value) in [(1, json!(230)), (2, json!("on"))] {
            let found = read(connection.next_publish().await);
            assert_eq!((&found["value"], &found["fieldgate"]["sequence"]), (&value, &json!(sequence)));
            seen.push(found);
        }
        drop(connection);
        let mut connection = peer.welcome(true, &[]).await;
        let again = connection.next_publish().await;
        assert_eq!(again.payload, first, "all of it is the message's, nothing the delivery's");
        connection.puback(again.id, ReasonCode::Success).await;
        for seen in seen {
            let again = connection.next_publish().await;
            connection.puback(again.id, ReasonCode::Success).await;
            assert_eq!(read(again), seen);
        }
        gateway.drained().await;
        assert!(gateway.metric(&format!("{WITHOUT} 0")));
        gateway.stop().await;
    }
}

#[tokio::test]
async fn what_has_no_room_for_its_origin_goes_without_and_is_counted() {
    for provenance in [Provenance::Json, Provenance::UserProperties] {
        let peer = Peer::bind().await;
        let mut gateway = Gateway::start(with(provenance, &peer));
        let large = "x".repeat(400);
        for payload in [&large, "small", &"x".repeat(600)] {
            gateway.publish("devices/m/v", payload, QoS::AtLeastOnce).await;
        }
        let limit = [Property::MaximumPacketSize(500.try_into().unwrap())];
        let mut connection = peer.welcome(false, &limit).await;
        let without = connection.next_publish().await;
        assert_eq!(without.payload, large);
        let names: Vec<_> = without.user_properties.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["fieldgate-hops", "fieldgate-via"], "what ends loops is no luxury");
        let small = connection.next_publish().await;
        let says = |name: &str| small.user_properties.iter().any(|(found, _)| found == name);
        assert!(says("fieldgate-queue") || small.payload.contains("plant-7/cloud"), "{small:?}");
        for id in [without.id, small.id] {
            connection.puback(id, ReasonCode::Success).await;
        }
        gateway.drained().await;
        assert!(gateway.metric(&format!("{WITHOUT} 1")));
        assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"too_large\"} 1"));
        gateway.stop().await;
    }
}

#[tokio::test]
async fn an_empty_payload_and_an_old_version_leave_no_room_for_an_origin() {
    let peer = Peer::bind().await;
    for (provenance, version, payload) in
        [(Provenance::Json, VersionChoice::V5, ""), (Provenance::UserProperties, VersionChoice::V3_1_1, "1")]
    {
        let mut gateway = Gateway::start(Settings { version, ..with(provenance, &peer) });
        gateway.publish("devices/m/v", payload, QoS::AtLeastOnce).await;
        let mut connection = peer.welcome(false, &[]).await;
        let publish = connection.next_publish().await;
        assert_eq!(publish.payload, payload);
        connection.puback(publish.id, ReasonCode::Success).await;
        gateway.drained().await;
        assert!(gateway.metric(&format!("{WITHOUT} 1")));
        gateway.stop().await;
    }
}
