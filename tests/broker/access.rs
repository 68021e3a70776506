//! Who may come in, and what they may do: users, certificates and rules, over the wire.

use std::path::Path;
use std::sync::Arc;

use fieldgate::clock::Clock;
use fieldgate::hub;
use fieldgate::hub::access::{
    self, Anonymous, DeniedPublish, DeniedSubscribe, Pattern, Rule, Subject, User, hash_password,
};
use fieldgate::listener::{CertificateUser, Settings};
use fieldgate::tls::issue::{Authority, Usage};
use fieldgate::tls::{ClientSettings, ClientTls};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::harness::{Broker, CONNACK_5, Peer, connect};

fn rule(subject: Subject, read: &[&str], write: &[&str]) -> Rule {
    let patterns = |texts: &[&str]| texts.iter().map(|text| Pattern::new(text).unwrap()).collect();
    Rule { subject, read: patterns(read), write: patterns(write), deny: Vec::new() }
}

async fn broker(access: access::Settings) -> Broker {
    Broker::start_with(|_| {}, hub::Settings { access, ..hub::Settings::default() }, None).await
}

/// Nobody may do anything but read and write below `open`.
fn narrow() -> access::Settings {
    access::Settings { rules: vec![rule(Subject::Everyone, &["open/#"], &["open/#"])], ..access::Settings::default() }
}

#[tokio::test]
async fn a_denied_publish_is_answered_as_configured_and_goes_nowhere() {
    let refused =
        [(5, "40 03 0001 87", "50 03 0002 87"), (4, "40 02 0001", "50 02 0002"), (3, "40 02 0001", "50 02 0002")];
    let silent =
        [(5, "40 03 0001 00", "50 03 0002 00"), (4, "40 02 0001", "50 02 0002"), (3, "40 02 0001", "50 02 0002")];
    for (denied_publish, answers) in [(DeniedPublish::Refuse, refused), (DeniedPublish::Acknowledge, silent)] {
        let broker = broker(access::Settings { denied_publish, ..narrow() }).await;
        for (version, puback, pubrec) in answers {
            let mut peer = broker.open().await;
            let properties = if version == 5 { "00" } else { "" };
            match version {
                3 => peer.send(r#"10 0F 0006 "MQIsdp" 03 02 003C 0001 "c""#).await,
                _ => peer.send(&connect("c", version, 2)).await,
            }
            peer.expect(if version == 5 { CONNACK_5 } else { "20 02 00 00" }).await;
            let length = if version == 5 { 7 } else { 6 };
            peer.send(&format!(r#"31 {:02X} 0001 "s" {properties} "x""#, length - 2)).await;
            peer.send(&format!(r#"33 {length:02X} 0001 "s" 0001 {properties} "x""#)).await;
            peer.expect(&shortened(puback)).await;
            peer.send(&format!(r#"35 {length:02X} 0001 "s" 0002 {properties} "x""#)).await;
            peer.expect(&shortened(pubrec)).await;
            if !pubrec.ends_with("87") {
                peer.send("62 02 0002").await;
                let pubcomp = if version == 5 && denied_publish == DeniedPublish::Refuse {
                    "70 03 0002 92"
                } else {
                    "70 02 0002"
                };
                peer.expect(pubcomp).await;
            }
            peer.expect_nothing().await;
        }
        broker.hub.set_access(access::Settings::default());
        let mut reader = broker.connect_3("r").await;
        reader.send(r#"82 06 0001 0001 "s" 00"#).await;
        reader.expect("90 03 0001 00").await;
        reader.expect_nothing().await;
        assert_eq!(broker.metric(r#"fieldgate_hub_denied_total{request="publish"}"#), 9.0);
        broker.stop().await;
    }
    let broker = broker(access::Settings { denied_publish: DeniedPublish::Disconnect, ..narrow() }).await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"33 07 0001 "s" 0001 00 "x""#).await;
    peer.expect_close(Some(0x87)).await;
    let mut peer = broker.connect_3("c").await;
    peer.send(r#"30 04 0001 "s" "x""#).await;
    peer.expect_close(None).await;
    broker.stop().await;
}

/// A reason code of success is left out (MQTT 5.0 §3.4.2.1).
fn shortened(ack: &str) -> String {
    match ack.strip_suffix(" 00").and_then(|ack| ack.split_once(" 03 ")) {
        Some((kind, identifier)) => format!("{kind} 02 {identifier}"),
        None => ack.to_owned(),
    }
}

#[tokio::test]
async fn a_denied_subscription_is_refused_or_granted_and_brings_nothing() {
    for (denied_subscribe, new, old) in [(DeniedSubscribe::Refuse, "87", "80"), (DeniedSubscribe::Grant, "01", "01")] {
        let broker = broker(access::Settings { denied_subscribe, ..narrow() }).await;
        let mut writer = broker.connect_3("w").await;
        writer.send(r#"31 0A 0006 "open/x" "1r""#).await;
        writer.expect_nothing().await;
        let mut five = broker.connect_5("a").await;
        five.send(r#"82 0C 0001 00 0006 "secret" 01"#).await;
        five.expect(&format!("90 04 0001 00 {new}")).await;
        let mut three = broker.connect_3("b").await;
        three.send(r#"82 0B 0001 0006 "secret" 01"#).await;
        three.expect(&format!("90 03 0001 {old}")).await;
        // The gateway itself may publish there.
        let topic = fieldgate::topic::TopicName::new("secret").unwrap();
        let now = broker.hub.clock().now();
        broker.hub.publish(fieldgate::message::Message::new(topic, "x", fieldgate::message::QoS::AtMostOnce, now));
        five.expect_nothing().await;
        three.expect_nothing().await;
        assert_eq!(broker.metric(r#"fieldgate_hub_denied_total{request="subscribe"}"#), 2.0);
        broker.stop().await;
    }
}

#[tokio::test]
async fn patterns_give_each_user_and_each_client_topics_of_their_own() {
    let user = User { name: "ann".into(), password_hash: hash_password(b"pw").unwrap().into() };
    let rules = vec![rule(Subject::Everyone, &["%u/in", "%c/in"], &["%u/out", "%c/out"])];
    let broker = broker(access::Settings { users: vec![user], rules, ..access::Settings::default() }).await;
    let mut ann = broker.open().await;
    ann.send(r#"10 18 0004 "MQTT" 05 C2 003C 00 0002 "c1" 0003 "ann" 0002 "pw""#).await;
    ann.expect(CONNACK_5).await;
    for (topic, reason) in [("ann/out", 0x10), ("c1/out", 0x10), ("c2/out", 0x87), ("bob/out", 0x87), ("ann/in", 0x87)]
    {
        let length = 2 + topic.len() + 3;
        ann.send(&format!(r#"32 {length:02X} {:04X} "{topic}" 0001 00"#, topic.len())).await;
        ann.expect(&format!("40 03 0001 {reason:02X}")).await;
    }
    for (filter, reason) in [("ann/in", 0x00), ("c1/in", 0x00), ("+/in", 0x00), ("c2/in", 0x87), ("ann/out", 0x87)] {
        let length = 3 + 2 + filter.len() + 1;
        ann.send(&format!(r#"82 {length:02X} 0001 00 {:04X} "{filter}" 00"#, filter.len())).await;
        ann.expect(&format!("90 04 0001 00 {reason:02X}")).await;
    }
    // Nobody's `%u` is nothing, not everything.
    let mut nobody = broker.connect_5("c2").await;
    nobody.send(r#"32 0A 0005 "/out " 0001 00 32 0C 0007 "ann/out" 0001 00 32 0B 0006 "c2/out" 0001 00"#).await;
    nobody.expect("40 03 0001 87 40 03 0001 87 40 03 0001 10").await;
    broker.stop().await;
}

#[tokio::test]
async fn changed_rules_bind_a_connected_client_at_once() {
    let broker = broker(access::Settings::default()).await;
    let mut peer = broker.connect_5("c").await;
    peer.send(r#"82 07 0001 00 0001 23 00 32 06 0001 "s" 0001 00"#).await;
    peer.expect(r#"90 04 0001 00 00 40 02 0001 30 04 0001 "s" 00"#).await;
    broker.hub.set_access(narrow());
    peer.send(r#"32 06 0001 "s" 0001 00 32 0B 0006 "open/s" 0002 00"#).await;
    peer.expect(r#"40 03 0001 87 40 02 0002 30 09 0006 "open/s" 00"#).await;
    broker.hub.set_access(access::Settings::default());
    peer.send(r#"32 06 0001 "s" 0001 00"#).await;
    peer.expect(r#"40 02 0001 30 04 0001 "s" 00"#).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_listener_may_be_stricter_about_anonymous_clients_than_the_others() {
    let strict = |settings: &mut Settings| settings.anonymous = Some(Anonymous::Never);
    let broker = Broker::start_with(strict, hub::Settings::default(), None).await;
    let mut peer = broker.open().await;
    peer.send(&connect("c", 4, 2)).await;
    peer.expect("20 02 00 05").await;
    broker.stop().await;
}

/// A listener that asks for certificates, and a client with one that names it `name`.
async fn with_certificate(name: &str, user: CertificateUser, rules: Vec<Rule>) -> (Broker, Peer<TlsStream<TcpStream>>) {
    let directory = tempfile::tempdir().unwrap();
    let now = Clock::start("test").now();
    let authority = Authority::open(directory.path(), now).unwrap();
    let server = authority.ensure("server", Usage::Server, &["localhost"], now).unwrap();
    let client = authority.ensure("client", Usage::Client, &[name], now).unwrap();
    let mut tls = server.server_settings();
    tls.client_ca = Some(authority.certificate());
    tls.require_client_certificate = true;
    let change = |settings: &mut Settings| {
        settings.tls = Some(tls);
        settings.certificate_user = Some(user);
    };
    let access = access::Settings { rules, anonymous: Anonymous::Never, ..access::Settings::default() };
    let broker = Broker::start_with(change, hub::Settings { access, ..hub::Settings::default() }, None).await;
    let stream = dial_tls(&broker, &authority.certificate(), Some(client.client_identity())).await;
    (broker, Peer { stream })
}

async fn dial_tls(
    broker: &Broker,
    ca: &Path,
    identity: Option<fieldgate::tls::ClientIdentity>,
) -> TlsStream<TcpStream> {
    let settings = ClientSettings { ca: Some(ca.to_path_buf()), identity, ..ClientSettings::default() };
    let config: Arc<rustls::ClientConfig> = ClientTls::open(settings).unwrap().config();
    let tcp = TcpStream::connect(("127.0.0.1", broker.port())).await.unwrap();
    TlsConnector::from(config).connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap()
}

#[tokio::test]
async fn a_certificate_names_its_user_by_its_common_name_or_its_whole_subject() {
    for (user, name) in [(CertificateUser::CommonName, "pump-1"), (CertificateUser::Subject, "CN=pump-1")] {
        let rules = vec![rule(Subject::User(name.into()), &[], &["%u/out"])];
        let (broker, mut peer) = with_certificate("pump-1", user, rules).await;
        // What the CONNECT says about its user does not count.
        peer.send(r#"10 17 0004 "MQTT" 05 C2 003C 00 0001 "c" 0003 "bob" 0002 "pw""#).await;
        peer.expect(CONNACK_5).await;
        let topic = format!("{name}/out");
        peer.send(&format!(r#"32 {:02X} {:04X} "{topic}" 0001 00"#, 5 + topic.len(), topic.len())).await;
        peer.expect("40 03 0001 10").await;
        peer.send(r#"32 0C 0007 "bob/out" 0001 00"#).await;
        peer.expect("40 03 0001 87").await;
        let session = broker.hub.sessions().into_iter().find(|session| &*session.client_id == "c").unwrap();
        assert_eq!((session.user.as_deref(), session.version), (Some(name), Some("5.0")));
        broker.stop().await;
    }
}
