//! Upstreams that close the connection on what they do not take, without a word.

use std::collections::BTreeSet;

use super::*;

/// What arrived, each message once, in the order of its first arrival.
#[derive(Default)]
struct Record {
    arrived: Vec<Publish>,
    released: BTreeSet<u16>,
    connections: u32,
}

impl Record {
    fn payloads(&self) -> Vec<&str> {
        self.arrived.iter().map(|publish| publish.payload.as_str()).collect()
    }

    fn holds(&self, payload: &str) -> bool {
        self.payloads().contains(&payload)
    }
}

/// What an upstream does about a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Takes,
    Closes,
    /// After it had it for so long.
    ClosesLate(Duration),
    Disconnects(ReasonCode),
}

/// Is the upstream until `done`. Its session lasts.
async fn serve(
    peer: &Peer,
    record: &mut Record,
    mut answer: impl FnMut(&Publish) -> Answer,
    done: impl Fn(&Record) -> bool,
) -> Option<Connection> {
    while !done(record) {
        assert!(record.connections < 500, "it gets nowhere: {:?}", record.payloads());
        let mut connection = peer.welcome(record.connections > 0, &[]).await;
        record.connections += 1;
        while !done(record) {
            match connection.next().await {
                Got::Publish(publish) => {
                    match answer(&publish) {
                        Answer::Takes => {}
                        Answer::Closes => break,
                        Answer::ClosesLate(after) => {
                            tokio::time::sleep(after).await;
                            break;
                        }
                        Answer::Disconnects(reason) => {
                            let properties = (&[][..]).into();
                            connection.send(&Packet::Disconnect(Disconnect { reason, properties })).await;
                            break;
                        }
                    }
                    match publish.qos {
                        1 => connection.puback(publish.id, ReasonCode::Success).await,
                        2 => connection.pubrec(publish.id).await,
                        _ => {}
                    }
                    let publish = Publish { dup: false, ..publish };
                    if !record.arrived.contains(&publish) {
                        record.arrived.push(publish);
                    }
                }
                Got::Pubrel(id) => {
                    record.released.insert(id);
                    connection.pubcomp(id).await;
                }
                Got::Ping => connection.pingresp().await,
                Got::Closed => break,
                other => panic!("{other:?}"),
            }
        }
        if done(record) {
            return Some(connection);
        }
    }
    None
}

fn older(peer: &Peer) -> Settings {
    Settings { version: VersionChoice::V3_1_1, ..settings(peer) }
}

fn dropped(gateway: &Gateway, count: u32) -> bool {
    gateway
        .metric(&format!("fieldgate_upstream_messages_dropped_total{{upstream=\"cloud\",reason=\"refused\"}} {count}"))
}

#[tokio::test]
async fn what_is_on_a_topic_that_the_upstream_closes_on_is_given_up_and_all_else_arrives_in_order() {
    let silent = Answer::Closes;
    let speaking = Answer::Disconnects(ReasonCode::NotAuthorized);
    for (version, answer) in
        [(VersionChoice::V3_1_1, silent), (VersionChoice::V5, silent), (VersionChoice::V5, speaking)]
    {
        let peer = Peer::bind().await;
        let mut gateway = Gateway::start(Settings { version, ..settings(&peer) });
        for number in 0..60 {
            // Two that stand together, the one of QoS 2 among them.
            let topic = if matches!(number, 20 | 21) { "devices/denied/v" } else { "devices/m/v" };
            let topic = if number == 40 { "devices/other/v" } else { topic };
            let qos = if number % 2 == 0 { QoS::AtLeastOnce } else { QoS::ExactlyOnce };
            gateway.publish(topic, &number.to_string(), qos).await;
        }
        let mut record = Record::default();
        let mut denied = BTreeSet::new();
        let judge = |publish: &Publish| {
            if publish.topic.contains("denied") {
                denied.insert((publish.qos, publish.id));
                return answer;
            }
            Answer::Takes
        };
        serve(&peer, &mut record, judge, |record| record.holds("59") && record.payloads().len() >= 58).await;
        let on_topic = |topic: &str| {
            let of_topic = record.arrived.iter().filter(|publish| publish.topic.ends_with(topic));
            of_topic.map(|publish| publish.payload.parse::<u32>().unwrap()).collect::<Vec<_>>()
        };
        let expected: Vec<_> = (0..60).filter(|number| !matches!(number, 20 | 21 | 40)).collect();
        assert_eq!(on_topic("m/v"), expected, "{version:?}");
        assert_eq!(on_topic("other/v"), [40]);
        let (_, second) = denied.iter().find(|(qos, _)| *qos == 2).unwrap();
        assert!(record.released.contains(second), "its identifier is free again");
        assert!(dropped(&gateway, 2));
        let status = gateway.handle.statuses().remove(0);
        let (_, last) = status.facts.iter().find(|(name, _)| *name == "last dropped").unwrap();
        assert!(last.contains("the message on `devices/denied/v` (18 bytes, packet identifier"), "{last}");
        gateway.stop().await;
    }
}

#[tokio::test]
async fn what_is_too_large_is_given_up_also_where_nothing_else_could_show_that_the_upstream_takes_anything() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(older(&peer));
    gateway.publish("devices/m/v", &"x".repeat(500), QoS::AtLeastOnce).await;
    gateway.publish_numbers(0..50).await;
    let mut record = Record::default();
    let large = |publish: &Publish| if publish.payload.len() == 500 { Answer::Closes } else { Answer::Takes };
    serve(&peer, &mut record, large, |record| record.holds("49")).await;
    assert_eq!(record.payloads(), numbers(0..50));
    gateway.drained().await;
    assert!(dropped(&gateway, 1));
    let hub = gateway.stop().await;

    // Known before, it costs no connection.
    let peer = Peer::bind().await;
    let mut gateway = Gateway::on(hub, Settings { bridge_max_packet_size: Some(100), ..older(&peer) });
    gateway.publish("devices/m/v", &"x".repeat(500), QoS::AtLeastOnce).await;
    gateway.publish("devices/m/v", "last", QoS::AtLeastOnce).await;
    let mut record = Record::default();
    serve(&peer, &mut record, large, |record| record.holds("last")).await;
    assert_eq!(record.connections, 1);
    assert!(gateway.metric("fieldgate_upstream_messages_dropped_total{upstream=\"cloud\",reason=\"too_large\"} 1"));
    gateway.stop().await;
}

#[tokio::test]
async fn an_upstream_that_takes_nothing_at_all_empties_no_queue() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(older(&peer));
    for number in 0..20 {
        gateway.publish(&format!("devices/m/{number}"), &number.to_string(), QoS::AtLeastOnce).await;
    }
    let mut record = Record::default();
    serve(&peer, &mut record, |_| Answer::Closes, |record| record.connections > 15).await;
    assert!(dropped(&gateway, 0));
    let named = || gateway.reason().is_some_and(|reason| reason.contains("`devices/m/0` (12 bytes, packet identifier"));
    until("the message is named", named).await;
    serve(&peer, &mut record, |_| Answer::Takes, |record| record.payloads().len() == 20).await;
    gateway.drained().await;
    assert!(dropped(&gateway, 0));
    gateway.stop().await;
}

#[tokio::test]
async fn nothing_is_given_up_on_a_line_that_breaks_at_random_or_is_slow() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(older(&peer));
    gateway.publish_numbers(0..20).await;
    let mut record = Record::default();
    let mut random = 7_u32;
    let at_random = |_: &Publish| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if random >> 31 == 0 { Answer::Takes } else { Answer::Closes }
    };
    serve(&peer, &mut record, at_random, |record| record.holds("19")).await;
    assert_eq!(record.payloads(), numbers(0..20));
    gateway.drained().await;
    assert!(dropped(&gateway, 0));
    let hub = gateway.stop().await;

    // What is large does not get through before the upstream has heard nothing whole for its keep alive.
    let peer = Peer::bind().await;
    let mut gateway = Gateway::on(hub, Settings { keep_alive: Duration::from_secs(1), ..older(&peer) });
    gateway.publish("devices/m/v", "large", QoS::AtLeastOnce).await;
    let mut record = Record::default();
    let slow = |_: &Publish| Answer::ClosesLate(Duration::from_millis(1500));
    serve(&peer, &mut record, slow, |record| record.connections > 8).await;
    serve(&peer, &mut record, |_| Answer::Takes, |record| record.holds("large")).await;
    gateway.drained().await;
    assert!(dropped(&gateway, 0));
    gateway.stop().await;
}

#[tokio::test]
async fn what_the_upstream_takes_as_less_is_sent_as_less_and_the_state_says_so() {
    type Refuses = fn(&Publish) -> bool;
    let cases: [(Refuses, Publish, &str); 2] = [
        (|publish| publish.retain, Publish { retain: false, ..published("first", 2, 0) }, "`retain: never`"),
        (|publish| publish.qos == 2, Publish { retain: true, ..published("first", 1, 0) }, "`qos: 1`"),
    ];
    for (refuses, expected, key) in cases {
        let peer = Peer::bind().await;
        let gateway = Gateway::start(older(&peer));
        let publish = |payload: &'static str| {
            let topic = TopicName::new("devices/m/v").unwrap();
            let message = Message::new(topic, payload, QoS::ExactlyOnce, gateway.hub.clock().now());
            gateway.hub.publish(message.retained());
        };
        publish("first");
        let mut record = Record::default();
        let judge = |publish: &Publish| if refuses(publish) { Answer::Closes } else { Answer::Takes };
        let mut connection = serve(&peer, &mut record, judge, |record| record.holds("first")).await.unwrap();
        let arrived = Publish { id: 0, user_properties: Vec::new(), ..record.arrived.remove(0) };
        assert_eq!(arrived, Publish { user_properties: Vec::new(), ..expected.clone() });
        let said = || gateway.reason().is_some_and(|reason| reason.contains(key));
        until("the state says what to set", said).await;
        // It is known now.
        publish("second");
        let second = loop {
            match connection.next().await {
                Got::Publish(publish) => break publish,
                Got::Pubrel(id) => connection.pubcomp(id).await,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((second.qos, second.retain), (expected.qos, expected.retain));
        assert!(dropped(&gateway, 0));
        gateway.stop().await;
    }
}

#[tokio::test]
async fn what_the_upstream_closes_on_before_messages_flow_is_left_out_and_the_rest_goes_on() {
    for version in [VersionChoice::V3_1_1, VersionChoice::V5] {
        for denied in ["plant-7/state", "$SYS/#"] {
            let peer = Peer::bind().await;
            let mut gateway = Gateway::start(Settings {
                version,
                state_topic: Some("{gateway}/state".into()),
                incoming: vec![rule("a", QoS::AtLeastOnce), RuleSettings::new("$SYS/#"), rule("b", QoS::AtLeastOnce)],
                ..settings(&peer)
            });
            gateway.publish("devices/m/v", "through", QoS::AtLeastOnce).await;
            let mut subscribed = BTreeSet::new();
            let mut connections = 0;
            let mut connection = 'connected: loop {
                let mut connection = peer.welcome(connections > 0, &[]).await;
                connections += 1;
                assert!(connections < 20, "{denied}");
                subscribed.clear();
                loop {
                    match connection.next().await {
                        Got::Publish(publish) if publish.topic == denied => break,
                        Got::Publish(publish) if publish.qos == 0 => {}
                        Got::Publish(publish) => {
                            assert_eq!(publish.payload, "through");
                            connection.puback(publish.id, ReasonCode::Success).await;
                            break 'connected connection;
                        }
                        Got::Subscribe(_, filters) if filters.iter().any(|(filter, ..)| filter == denied) => break,
                        Got::Subscribe(id, filters) => {
                            connection.suback(id, &filters).await;
                            subscribed.extend(filters.into_iter().map(|(filter, ..)| filter));
                        }
                        Got::Ping => connection.pingresp().await,
                        other => panic!("{other:?}"),
                    }
                }
            };
            gateway.drained().await;
            let expected = ["plant-7/a", "plant-7/b", "$SYS/#"];
            let expected: BTreeSet<_> =
                expected.into_iter().filter(|filter| *filter != denied).map(String::from).collect();
            assert_eq!(subscribed, expected);
            assert_eq!(connections, 6, "three closes, two more that show what it was");
            let said = format!("`{denied}`");
            assert!(
                gateway.reason().is_some_and(|reason| reason.contains(&said) && reason.contains("goes on without"))
            );
            gateway.publish("devices/m/v", "more", QoS::AtLeastOnce).await;
            assert_eq!(connection.next_publish().await.payload, "more");
            gateway.stop().await;
        }
    }
}

#[tokio::test]
async fn a_will_that_the_upstream_closes_on_is_sent_as_it_takes_it() {
    let peer = Peer::bind().await;
    let mut gateway = Gateway::start(Settings { state_topic: Some("{gateway}/state".into()), ..older(&peer) });
    gateway.publish("devices/m/v", "through", QoS::AtLeastOnce).await;
    let mut connection = loop {
        let mut connection = peer.accept().await;
        let Got::Connect { will, .. } = connection.next().await else { panic!("a CONNECT comes first") };
        if will.is_some_and(|will| will.retain) {
            continue;
        }
        connection.connack(false, ReasonCode::Success, &[]).await;
        match connection.next().await {
            // The whole is tried once more.
            Got::Disconnect(_) => {}
            _ => break connection,
        }
    };
    assert_eq!(drain(&mut connection, "through").await, ["through"]);
    gateway.drained().await;
    assert!(gateway.reason().is_some_and(|reason| reason.contains("our will on `state_topic`: it is not retained")));
    gateway.stop().await;
}
