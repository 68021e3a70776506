//! Several addresses of which the first is the main one: away from it and back, with nothing lost, doubled or out of order.

use std::time::Duration;

use fieldgate::bridge::{AddressOrder, Connection as Connects, Settings, VersionChoice};
use fieldgate::hub::{Attach, Face, Outbound, SubscribeOptions};
use fieldgate::message::QoS;
use fieldgate::proto::mqtt::ReasonCode;
use fieldgate::topic::SharedFilter;
use tokio::time::timeout;

use super::peer::{Connection, Got, PATIENCE, Peer};
use super::{Gateway, QUIET, numbers, rule, settings};

fn with(peers: &[Peer; 2], qos: QoS, version: VersionChoice) -> Settings {
    Settings {
        urls: peers.iter().map(Peer::url).collect(),
        return_interval: Duration::from_millis(50),
        outgoing: vec![rule("devices/#", qos)],
        incoming: vec![rule("commands/#", QoS::ExactlyOnce)],
        version,
        ..settings(&peers[0])
    }
}

/// Refuses the main address until the other one has a CONNECT, and takes that.
async fn fail_over(peers: &[Peer; 2], session_present: bool) -> Connection {
    tokio::select! {
        mut connection = peers[1].welcome(session_present, &[]) => {
            connection.grant().await;
            connection
        }
        () = async { loop { drop(peers[0].accept().await) } } => unreachable!(),
    }
}

/// The next connection that sends a CONNECT, and whether that begins anew; looks from outside are closed without a word.
async fn next_connect(peer: &Peer) -> (Connection, bool) {
    loop {
        let mut connection = peer.accept().await;
        match connection.next().await {
            Got::Connect { clean_start, .. } => return (connection, clean_start),
            Got::Closed => {}
            other => panic!("a CONNECT comes first, not {other:?}"),
        }
    }
}

/// Takes messages until `last` or the gateway's leave, and answers only when `late` have come or no more do.
async fn take(connection: &mut Connection, late: usize, last: &str) -> Vec<String> {
    let (mut taken, mut unanswered) = (Vec::<String>::new(), Vec::new());
    loop {
        let got = connection.within(QUIET).await;
        let is_quiet = got.is_none();
        match got {
            Some(Got::Publish(publish)) if publish.qos == 0 => {}
            Some(Got::Publish(publish)) => {
                unanswered.push((publish.id, publish.qos));
                // What is sent again on another connection was answered on none.
                taken.push(publish.payload);
            }
            Some(Got::Pubrel(id)) => connection.pubcomp(id).await,
            Some(Got::Ping) | None => {}
            Some(Got::Disconnect(reason)) => {
                assert_eq!((reason, unanswered.len()), (ReasonCode::Success, 0), "it leaves nothing open");
                return taken;
            }
            Some(other) => panic!("unexpected: {other:?}"),
        }
        let is_last = taken.last().is_some_and(|taken| taken == last);
        if unanswered.len() >= late || is_quiet || is_last {
            for (id, qos) in unanswered.drain(..) {
                match qos {
                    1 => connection.puback(id, ReasonCode::Success).await,
                    _ => connection.pubrec(id).await,
                }
            }
        }
        if is_last && is_quiet {
            return taken;
        }
    }
}

#[tokio::test]
async fn back_at_the_main_address_each_message_has_come_once_and_in_order() {
    const COUNT: u32 = 300;
    for (qos, version) in [
        (QoS::AtLeastOnce, VersionChoice::V5),
        (QoS::ExactlyOnce, VersionChoice::V5),
        (QoS::ExactlyOnce, VersionChoice::V3_1_1),
    ] {
        let peers = [Peer::bind().await, Peer::bind().await];
        let mut gateway = Gateway::start(with(&peers, qos, version));
        let mut second = fail_over(&peers, false).await;
        gateway.connected().await;
        let publish = async {
            for number in 0..COUNT {
                gateway.publish("devices/m/v", &number.to_string(), QoS::ExactlyOnce).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let last = (COUNT - 1).to_string();
        let follow = async {
            let mut taken = take(&mut second, 7, "none").await;
            assert_eq!(second.within(PATIENCE).await, Some(Got::Closed));
            let at_second = taken.len();
            let (mut first, clean_start) = next_connect(&peers[0]).await;
            assert!(!clean_start);
            first.connack(false, ReasonCode::Success, &[]).await;
            first.grant().await;
            taken.extend(take(&mut first, 7, &last).await);
            (taken, at_second)
        };
        let ((), (taken, at_second)) = timeout(PATIENCE, async { tokio::join!(publish, follow) }).await.unwrap();
        assert_eq!(taken, numbers(0..COUNT), "{qos:?} {version:?}: {at_second} at the second address");
        gateway.drained().await;
        gateway.stop().await;
    }
}

#[tokio::test]
async fn what_was_left_open_at_the_main_address_is_not_taken_for_what_comes_later() {
    let peers = [Peer::bind().await, Peer::bind().await];
    let mut gateway = Gateway::start(with(&peers, QoS::ExactlyOnce, VersionChoice::V5));
    let (mut first, _) = next_connect(&peers[0]).await;
    first.connack(false, ReasonCode::Success, &[]).await;
    first.grant().await;
    gateway.publish("devices/m/v", "0", QoS::ExactlyOnce).await;
    // The main broker keeps the identifier, and is gone before it can say so.
    first.next_publish().await;
    drop(first);
    let mut second = fail_over(&peers, false).await;
    let again = second.next_publish().await;
    second.pubrec(again.id).await;
    assert_eq!(second.next().await, Got::Pubrel(again.id));
    second.pubcomp(again.id).await;
    let (mut first, clean_start) = next_connect(&peers[0]).await;
    assert!(!clean_start, "it may have lost its memory itself");
    first.connack(true, ReasonCode::Success, &[]).await;
    assert_eq!(first.next().await, Got::Disconnect(ReasonCode::Success));
    let (mut first, clean_start) = next_connect(&peers[0]).await;
    assert!(clean_start, "under that identifier another message will come");
    first.connack(false, ReasonCode::Success, &[]).await;
    first.grant().await;
    gateway.stop().await;
}

#[tokio::test]
async fn equal_addresses_are_of_one_broker_whose_session_goes_on_at_each() {
    let peers = [Peer::bind().await, Peer::bind().await];
    let ordered = with(&peers, QoS::ExactlyOnce, VersionChoice::V5);
    let mut gateway = Gateway::start(Settings { address_order: AddressOrder::RoundRobin, ..ordered });
    gateway.publish("devices/m/v", "0", QoS::ExactlyOnce).await;
    for index in [0, 1] {
        // It does not live to answer the message.
        let mut connection = peers[index].welcome(false, &[]).await;
        connection.grant().await;
        connection.next_publish().await;
    }
    let (mut first, clean_start) = next_connect(&peers[0]).await;
    assert!(!clean_start);
    first.connack(true, ReasonCode::Success, &[]).await;
    first.grant().await;
    assert!(first.next_publish().await.dup, "the session is there, and so may be the message");
    gateway.stop().await;
}

#[tokio::test]
async fn a_command_is_not_taken_for_another_of_the_other_address() {
    let peers = [Peer::bind().await, Peer::bind().await];
    let stays = Duration::from_secs(3600);
    let settings = Settings { return_interval: stays, ..with(&peers, QoS::AtLeastOnce, VersionChoice::V5) };
    // A session of earlier days, so that nothing has to be begun anew.
    let hub = Gateway::start(Settings { connection: Connects::Manual, ..settings.clone() }).stop().await;
    let mut device = hub.attach(Attach::internal(Face::Adapter, "device")).unwrap();
    let filter = SharedFilter::split("commands/#").unwrap();
    device.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
    let gateway = Gateway::on(hub, settings);
    let (mut first, _) = next_connect(&peers[0]).await;
    first.connack(true, ReasonCode::Success, &[]).await;
    first.grant().await;
    first.publish("plant-7/commands/a", "on", QoS::ExactlyOnce, 9).await;
    assert_eq!(first.next().await, Got::Pubrec(9, ReasonCode::Success));
    drop(first);
    let mut second = fail_over(&peers, true).await;
    second.publish("plant-7/commands/a", "off", QoS::ExactlyOnce, 9).await;
    assert_eq!(second.next().await, Got::Pubrec(9, ReasonCode::Success));
    let mut taken = Vec::new();
    while taken.last().is_none_or(|taken| taken != "off") {
        for outbound in timeout(PATIENCE, device.next()).await.expect("the second command") {
            if let Outbound::Publish(delivery) = outbound {
                taken.push(String::from_utf8(delivery.message.payload.to_vec()).unwrap());
            }
        }
    }
    assert_eq!(taken, ["on", "off"]);
    gateway.stop().await;
}
