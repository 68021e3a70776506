//! A hub that checks passwords as Azure IoT Hub does, and closes the connection on what that does not take.

use std::collections::BTreeMap;
use std::time::Duration;

use data_encoding::BASE64;
use fieldgate::bridge::rules::{Naming, Retain, RuleSettings};
use fieldgate::bridge::sas::{self, Sas};
use fieldgate::bridge::{Settings, VersionChoice};
use fieldgate::clock::Clock;
use fieldgate::message::{Message, QoS};
use fieldgate::proto::mqtt::{ReasonCode, Version};
use fieldgate::secret::Secret;
use fieldgate::topic::TopicName;
use ring::hmac;

use super::peer::{Connection, Got, Peer};
use super::{Gateway, settings, until};

const KEY: &[u8] = b"a key that only the hub and the device know";

fn device(peer: &Peer, key: &[u8], ttl: Duration) -> Settings {
    let event = RuleSettings {
        naming: Naming::Template("devices/plant-7/messages/events/device={1}&point={2}".into()),
        retain: Retain::Never,
        ..RuleSettings::new("devices/+/+")
    };
    let command = RuleSettings {
        naming: Naming::Template("commands/{#}".into()),
        ..RuleSettings::new("devices/plant-7/messages/devicebound/#")
    };
    Settings {
        version: VersionChoice::V3_1_1,
        client_id: Some("plant-7".into()),
        sas: Some(Sas { key: Secret::new(BASE64.encode(key)), ttl, resource: sas::DEVICE.into(), policy: None }),
        outgoing: vec![event],
        incoming: vec![command],
        ..settings(peer)
    }
}

/// Takes the CONNECT that comes next if its password is right and good for no longer than `ttl`; when it ends.
async fn greet(peer: &Peer, ttl: u64) -> Result<(Connection, u64), String> {
    let mut connection = loop {
        let mut connection = peer.accept().await;
        let Got::Connect { version, is_bridge, client_id, user, password, .. } = connection.next().await else {
            panic!("a CONNECT comes first")
        };
        assert_eq!((version, client_id.as_str()), (Version::V3_1_1, "plant-7"));
        if is_bridge {
            // A protocol level that it does not know; it closes.
            continue;
        }
        assert_eq!(user.as_deref(), Some("127.0.0.1/plant-7/?api-version=2021-04-12"));
        break Ok::<_, String>((connection, password.unwrap()));
    }?;
    let end = check_token(&connection.1, ttl);
    let reason = if end.is_ok() { ReasonCode::Success } else { ReasonCode::NotAuthorized };
    connection.0.connack(false, reason, &[]).await;
    end.map(|end| (connection.0, end))
}

fn check_token(token: &str, ttl: u64) -> Result<u64, String> {
    let fields = token.strip_prefix("SharedAccessSignature ").ok_or("no signature")?;
    let fields: BTreeMap<&str, &str> = fields.split('&').filter_map(|field| field.split_once('=')).collect();
    assert_eq!(fields["sr"], "127.0.0.1%2Fdevices%2Fplant-7");
    let signature = fields["sig"].replace("%2B", "+").replace("%2F", "/").replace("%3D", "=");
    let signature = BASE64.decode(signature.as_bytes()).unwrap();
    let signed = format!("{}\n{}", fields["sr"], fields["se"]);
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, KEY), signed.as_bytes(), &signature).map_err(|_| "not signed")?;
    let (end, now) = (fields["se"].parse::<u64>().unwrap(), Clock::start("hub").now().0 as u64 / 1000);
    if end < now || end > now + ttl + 1 { Err(format!("it is {now} and ends at {end}")) } else { Ok(end) }
}

#[tokio::test]
async fn a_token_is_renewed_before_it_ends_and_nothing_is_lost_between() {
    const TTL: u64 = 8;
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(device(&peer, KEY, Duration::from_secs(TTL)));
    let (mut connection, first_end) = greet(&peer, TTL).await.unwrap();
    connection.grant().await;
    let now = gateway.hub.clock().now();
    let retained = Message::new(TopicName::new("devices/m/v").unwrap(), "21.5", QoS::ExactlyOnce, now).retained();
    gateway.hub.publish(retained);
    let publish = connection.next_publish().await;
    assert_eq!(publish.topic, "devices/plant-7/messages/events/device=m&point=v");
    assert_eq!((publish.qos, publish.retain, publish.payload.as_str()), (1, false, "21.5"));
    connection.puback(publish.id, ReasonCode::Success).await;
    assert_eq!(connection.next().await, Got::Disconnect(ReasonCode::Success));
    assert!((gateway.hub.clock().now().0 as u64) < first_end * 1000, "before the first token has ended");
    gateway.publish("devices/m/v", "22", QoS::AtLeastOnce).await;
    let (mut connection, second_end) = greet(&peer, TTL).await.unwrap();
    assert!(second_end > first_end);
    connection.grant().await;
    assert_eq!(connection.next_publish().await.payload, "22");
    gateway.stop().await;
}

#[tokio::test]
async fn a_wrong_key_is_told_with_what_to_check() {
    let peer = Peer::bind().await;
    let gateway = Gateway::start(device(&peer, b"another key", Duration::from_secs(3600)));
    assert_eq!(greet(&peer, 3600).await.err().as_deref(), Some("not signed"));
    until("the reason is told", || gateway.reason().is_some_and(|reason| reason.contains("sas"))).await;
    let reason = gateway.reason().unwrap();
    assert!(reason.contains("check the key in `sas`, that it belongs to the device `plant-7`"), "{reason}");
    gateway.stop().await;
}
