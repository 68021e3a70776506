//! The hub as its connections see it.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::access::{self, Identity, Pattern, Rule, Subject};
use super::*;
use crate::message::QoS;
use crate::store::{self, SessionId, SessionRecord, StoredSession};

fn hub() -> Hub {
    Hub::new(Settings::default(), Clock::start("test"), None).unwrap()
}

fn client(hub: &Hub, name: &str) -> Link {
    hub.attach(request(name)).unwrap()
}

fn request(name: &str) -> Attach {
    let identity = hub_identity();
    Attach { face: Face::Mqtt, identity, ..Attach::internal(Face::Mqtt, name) }
}

fn hub_identity() -> Identity {
    Access::new(access::Settings::default()).authenticate(None, None, true).unwrap()
}

fn persistent(name: &str) -> Attach {
    Attach { clean_start: false, expiry: SessionExpiry::Never, ..request(name) }
}

fn filter(text: &str) -> SharedFilter {
    SharedFilter::split(text).unwrap()
}

fn subscribe(link: &mut Link, text: &str, qos: QoS) {
    link.subscribe(&filter(text), SubscribeOptions::new(qos)).unwrap();
}

fn say(link: &mut Link, topic: &str, payload: &'static str, qos: QoS) -> Outcome {
    let outcome = link.publish(Publish { qos, ..Publish::new(topic, Bytes::from_static(payload.as_bytes())) });
    link.flush();
    outcome
}

fn retain(link: &mut Link, topic: &str, payload: &'static str) {
    link.publish(Publish { retain: true, ..Publish::new(topic, payload) });
    link.flush();
}

/// What a connection gets, as `topic=payload`, with the QoS and `r` for retained.
fn heard(link: &mut Link) -> Vec<String> {
    let mut taken = Vec::new();
    link.take(&mut taken, 1000);
    let spell = |outbound: &Outbound| match outbound {
        Outbound::Release(id) => format!("release {id}"),
        Outbound::Publish(Delivery { message, qos, retain, .. }) => {
            let payload = String::from_utf8_lossy(&message.payload);
            format!("{}={payload} {}{}", message.topic, qos.level(), if *retain { "r" } else { "" })
        }
    };
    taken.iter().map(spell).collect()
}

#[test]
fn a_message_reaches_those_who_want_it_at_the_lower_qos() {
    let hub = hub();
    let (mut a, mut b, mut c) = (client(&hub, "a"), client(&hub, "b"), client(&hub, "c"));
    subscribe(&mut a, "x/+", QoS::ExactlyOnce);
    subscribe(&mut b, "x/#", QoS::AtMostOnce);
    subscribe(&mut c, "y", QoS::AtLeastOnce);
    assert!(matches!(say(&mut c, "x/1", "hello", QoS::AtLeastOnce), Outcome::Done { matched: true }));
    assert!(matches!(say(&mut c, "z", "", QoS::AtLeastOnce), Outcome::Done { matched: false }));
    assert_eq!(heard(&mut a), ["x/1=hello 1"]);
    assert_eq!(heard(&mut b), ["x/1=hello 0"]);
    assert_eq!(heard(&mut c), [""; 0]);
}

#[test]
fn overlapping_subscriptions_give_one_copy_with_all_identifiers() {
    let hub = hub();
    let mut a = client(&hub, "a");
    for (text, qos, identifier) in [("x/#", QoS::AtMostOnce, 5), ("x/y", QoS::AtLeastOnce, 6)] {
        let options = SubscribeOptions { identifier: NonZeroU32::new(identifier), ..SubscribeOptions::new(qos) };
        a.subscribe(&filter(text), options).unwrap();
    }
    say(&mut a, "x/y", "1", QoS::ExactlyOnce);
    let mut taken = Vec::new();
    a.take(&mut taken, 10);
    let [Outbound::Publish(delivery)] = &taken[..] else { panic!("{taken:?}") };
    let mut identifiers = delivery.identifiers.as_deref().unwrap().to_vec();
    identifiers.sort_unstable();
    assert_eq!((delivery.qos, &identifiers[..]), (QoS::AtLeastOnce, &[5, 6][..]));
}

#[test]
fn no_local_leaves_out_ones_own_messages() {
    let hub = hub();
    let (mut a, mut b) = (client(&hub, "a"), client(&hub, "b"));
    let options = SubscribeOptions { no_local: true, ..SubscribeOptions::new(QoS::AtMostOnce) };
    a.subscribe(&filter("x"), options).unwrap();
    say(&mut a, "x", "mine", QoS::AtMostOnce);
    say(&mut b, "x", "yours", QoS::AtMostOnce);
    assert_eq!(heard(&mut a), ["x=yours 0"]);
}

#[test]
fn beside_a_no_local_subscription_an_ordinary_one_alone_decides_on_ones_own_messages() {
    let hub = hub();
    let (mut a, mut b) = (client(&hub, "a"), client(&hub, "b"));
    let options =
        |qos, identifier| SubscribeOptions { identifier: NonZeroU32::new(identifier), ..SubscribeOptions::new(qos) };
    a.subscribe(&filter("x"), SubscribeOptions { no_local: true, ..options(QoS::ExactlyOnce, 1) }).unwrap();
    a.subscribe(&filter("#"), options(QoS::AtLeastOnce, 2)).unwrap();
    let mut check = |link: Option<&mut Link>, qos, identifiers: &[u32]| {
        say(link.unwrap_or(&mut a), "x", "1", QoS::ExactlyOnce);
        let mut taken = Vec::new();
        a.take(&mut taken, 10);
        let [Outbound::Publish(delivery)] = &taken[..] else { panic!("{taken:?}") };
        let mut found = delivery.identifiers.as_deref().unwrap().to_vec();
        found.sort_unstable();
        assert_eq!((delivery.qos, &found[..]), (qos, identifiers));
    };
    check(Some(&mut b), QoS::ExactlyOnce, &[1, 2]);
    check(None, QoS::AtLeastOnce, &[2]);
}

#[test]
fn retained_messages_come_with_a_new_subscription_as_its_options_say() {
    let hub = hub();
    let mut a = client(&hub, "a");
    retain(&mut a, "x/1", "old");
    retain(&mut a, "x/1", "new");
    retain(&mut a, "x/2", "gone");
    retain(&mut a, "x/2", "");
    let mut check = |handling, expected: &[&str]| {
        let options = SubscribeOptions { retain_handling: handling, ..SubscribeOptions::new(QoS::AtMostOnce) };
        a.subscribe(&filter("x/#"), options).unwrap();
        assert_eq!(heard(&mut a), expected, "{handling:?}");
    };
    check(RetainHandling::DoNotSend, &[]);
    check(RetainHandling::SendIfNew, &[]);
    check(RetainHandling::Send, &["x/1=new 0r"]);
    retain(&mut a, "x/1", "live");
    assert_eq!(heard(&mut a), ["x/1=live 0"], "the flag is cleared for an established subscription");
}

#[test]
fn a_persistent_session_keeps_what_came_while_it_was_away() {
    let hub = hub();
    let mut a = hub.attach(persistent("a")).unwrap();
    assert!(!a.session_present());
    subscribe(&mut a, "x", QoS::AtLeastOnce);
    a.detach(false, None);
    let mut b = client(&hub, "b");
    say(&mut b, "x", "1", QoS::AtLeastOnce);
    say(&mut b, "x", "0", QoS::AtMostOnce);
    let mut a = hub.attach(persistent("a")).unwrap();
    assert!(a.session_present());
    assert_eq!(heard(&mut a), ["x=1 1"]);
    a.detach(false, None);
    let mut a = hub.attach(Attach { clean_start: true, ..persistent("a") }).unwrap();
    assert!(!a.session_present());
    say(&mut b, "x", "2", QoS::AtLeastOnce);
    assert_eq!(heard(&mut a), [""; 0]);
}

#[test]
fn a_second_connection_takes_over_and_the_first_one_is_powerless() {
    let hub = hub();
    let mut first = hub.attach(persistent("a")).unwrap();
    subscribe(&mut first, "x", QoS::AtLeastOnce);
    let mut second = hub.attach(persistent("a")).unwrap();
    assert!(second.session_present());
    assert_eq!(first.fate(), Some(Fate::TakenOver));
    assert!(!first.unsubscribe(&filter("x")));
    drop(first);
    say(&mut second, "x", "1", QoS::AtLeastOnce);
    assert_eq!(heard(&mut second), ["x=1 1"]);
}

#[test]
fn what_the_first_connection_has_taken_up_is_routed_before_the_second_one_sends() {
    let hub = hub();
    let mut watcher = client(&hub, "watcher");
    subscribe(&mut watcher, "x", QoS::AtLeastOnce);
    let mut first = hub.attach(persistent("a")).unwrap();
    let publish = |payload: &'static str| Publish { qos: QoS::AtLeastOnce, ..Publish::new("x", payload) };
    first.publish(publish("1"));
    let second = std::thread::spawn({
        let hub = hub.clone();
        move || {
            let mut second = hub.attach(persistent("a")).unwrap();
            say(&mut second, "x", "2", QoS::AtLeastOnce);
        }
    });
    // Whoever does not wait is done long before this.
    let given = std::time::Instant::now();
    while first.fate().is_none() || !second.is_finished() && given.elapsed() < Duration::from_millis(300) {
        std::thread::yield_now();
    }
    for other in 0..100 {
        client(&hub, &other.to_string());
    }
    assert!(!second.is_finished(), "others do not wait for it");
    first.flush();
    second.join().unwrap();
    // It is powerless now.
    first.publish(publish("3"));
    first.flush();
    assert_eq!(heard(&mut watcher), ["x=1 1", "x=2 1"]);
}

#[test]
fn of_many_connections_of_one_client_each_one_speaks_behind_those_before_it() {
    const THREADS: u32 = 4;
    const TIMES: u32 = 300;
    let hub = hub();
    let mut watcher = client(&hub, "watcher");
    subscribe(&mut watcher, "x", QoS::AtLeastOnce);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..TIMES {
                    let mut link = hub.attach(persistent("a")).unwrap();
                    for _ in 0..3 {
                        let number = link.attachment.number.to_string();
                        link.publish(Publish { qos: QoS::AtLeastOnce, ..Publish::new("x", number) });
                        std::thread::yield_now();
                    }
                    link.flush();
                }
            });
        }
    });
    let mut numbers: Vec<u64> = Vec::new();
    while !watcher.is_idle() {
        let mut taken = Vec::new();
        watcher.take(&mut taken, 1000);
        for outbound in taken {
            let Outbound::Publish(Delivery { message, packet_id, .. }) = outbound else { panic!("{outbound:?}") };
            numbers.push(String::from_utf8_lossy(&message.payload).parse().unwrap());
            watcher.acknowledge(packet_id.unwrap());
        }
    }
    assert!(numbers.is_sorted(), "{numbers:?}");
    assert!(numbers.len() >= 3, "the last one is not taken over");
}

#[test]
fn a_will_fires_for_a_lost_connection_and_not_for_a_good_bye() {
    let hub = hub();
    let mut watcher = client(&hub, "watcher");
    subscribe(&mut watcher, "will", QoS::AtMostOnce);
    let with_will = |delay| {
        let topic = crate::topic::TopicName::new("will").unwrap();
        let message = Message::new(topic, "lost", QoS::AtMostOnce, UnixMillis(0));
        Attach { will: Some(Will { message, delay }), ..persistent("a") }
    };
    hub.attach(with_will(Duration::ZERO)).unwrap().detach(false, None);
    assert_eq!(heard(&mut watcher), [""; 0]);
    drop(hub.attach(with_will(Duration::ZERO)).unwrap());
    assert_eq!(heard(&mut watcher), ["will=lost 0"]);
    drop(hub.attach(with_will(Duration::from_secs(60))).unwrap());
    hub.housekeep(1);
    assert_eq!(heard(&mut watcher), [""; 0], "it is delayed");
    let back = hub.attach(persistent("a")).unwrap();
    back.detach(false, None);
    hub.housekeep(1);
    assert_eq!(heard(&mut watcher), [""; 0], "and the client came back in time");
    drop(hub.attach(with_will(Duration::from_secs(60))).unwrap());
    hub.attach(Attach { clean_start: true, ..persistent("a") }).unwrap();
    assert_eq!(heard(&mut watcher), ["will=lost 0"], "the end of the session ends the delay");
}

#[test]
fn a_repeated_qos_2_message_is_delivered_once() {
    let hub = hub();
    let (mut a, mut b) = (client(&hub, "a"), client(&hub, "b"));
    subscribe(&mut b, "x", QoS::ExactlyOnce);
    let id = PacketId::new(9);
    for _ in 0..2 {
        a.publish(Publish { qos: QoS::ExactlyOnce, packet_id: id, ..Publish::new("x", "1") });
        a.flush();
    }
    assert_eq!(heard(&mut b), ["x=1 2"]);
    assert!(a.released(id.unwrap()).known);
    assert!(!a.released(id.unwrap()).known);
    a.publish(Publish { qos: QoS::ExactlyOnce, packet_id: id, ..Publish::new("x", "2") });
    a.flush();
    assert_eq!(heard(&mut b), ["x=2 2"]);
}

/// An identifier that seems to be in use may have been released, where the journal of that was lost with a damaged database.
#[test]
fn after_damage_a_qos_2_message_is_a_repeated_one_only_if_it_says_so() {
    let hub = hub();
    let record = SessionRecord {
        id: SessionId(1),
        face: Face::Mqtt as u8,
        client_id: "a".into(),
        user: None,
        expiry_interval: None,
        detached_at: None,
        will: None,
    };
    let inbound = vec![7, 8, 9];
    let stored = StoredSession { record, subscriptions: vec![], inbound, queues: vec![], in_doubt: Some(vec![]) };
    assert!(hub.restore(stored).is_none());
    let (mut a, mut b) = (hub.attach(persistent("a")).unwrap(), client(&hub, "b"));
    assert!(a.session_present());
    subscribe(&mut b, "x", QoS::AtLeastOnce);
    let mut publish = |dup, id, payload: &'static str| {
        let packet_id = PacketId::new(id);
        a.publish(Publish { qos: QoS::ExactlyOnce, dup, packet_id, ..Publish::new("x", payload) });
        a.flush();
    };
    publish(true, 7, "again");
    assert_eq!(heard(&mut b), [""; 0]);
    publish(false, 8, "new");
    assert_eq!(heard(&mut b), ["x=new 1"]);
    // What came back first was not over; and what is over was not repeated before something new.
    publish(false, 7, "again");
    publish(true, 8, "new");
    assert_eq!(heard(&mut b), [""; 0]);
    publish(true, 9, "first lost on its way");
    assert_eq!(heard(&mut b), ["x=first lost on its way 1"]);
}

/// What was sent and is lost with a damaged database, its receiver holds until it is told to release it.
#[test]
fn after_damage_a_receiver_is_asked_to_release_identifiers_before_messages_have_them() {
    let directory = tempfile::tempdir().unwrap();
    let open = || {
        let clock = Clock::start("test");
        let store = Store::bind(store::Settings::new(directory.path()), clock.clone()).unwrap();
        (store.quarantined().is_some(), Hub::new(Settings::default(), clock, Some(store)).unwrap())
    };
    let (_, hub) = open();
    let mut to = hub.attach(persistent("to")).unwrap();
    subscribe(&mut to, "x", QoS::ExactlyOnce);
    hub.attach(persistent("somebody-else")).unwrap().detach(false, None);
    to.detach(false, None);
    hub.store().unwrap().clone().close();
    let path = directory.path().join(store::DATABASE_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(13).position(|window| window == b"somebody-else").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();

    let (is_damaged, hub) = open();
    assert!(is_damaged);
    let (mut to, mut from) = (hub.attach(persistent("to")).unwrap(), client(&hub, "from"));
    assert!(to.session_present());
    say(&mut from, "x", "1", QoS::ExactlyOnce);
    let (mut taken, mut released) = (Vec::new(), Vec::new());
    let deadline = Instant::now() + Duration::from_secs(20);
    let sent_as = 'sent: loop {
        assert!(Instant::now() < deadline, "released {released:?} and never sent");
        to.take(&mut taken, 1000);
        for outbound in taken.drain(..) {
            match outbound {
                Outbound::Release(id) => {
                    to.completed(id);
                    released.push(id);
                }
                Outbound::Publish(delivery) => break 'sent delivery.packet_id.unwrap(),
            }
        }
        to.flush();
    };
    assert!(released.contains(&sent_as), "{sent_as} is not among {released:?}");
}

#[test]
fn a_shared_subscription_gives_each_message_to_one_member() {
    let hub = hub();
    let (mut a, mut b, mut c) = (client(&hub, "a"), client(&hub, "b"), client(&hub, "c"));
    subscribe(&mut a, "$share/g/x", QoS::AtMostOnce);
    subscribe(&mut b, "$share/g/x", QoS::AtMostOnce);
    subscribe(&mut c, "x", QoS::AtMostOnce);
    for _ in 0..10 {
        c.publish(Publish::new("x", "1"));
    }
    c.flush();
    assert_eq!((heard(&mut a).len(), heard(&mut b).len(), heard(&mut c).len()), (5, 5, 10));
}

#[test]
fn rules_bind_publishers_and_receivers_and_change_live() {
    let hub = hub();
    let (mut a, mut b) = (client(&hub, "a"), client(&hub, "b"));
    subscribe(&mut b, "#", QoS::AtMostOnce);
    let pattern = |text| Pattern::new(text).unwrap();
    let rule =
        Rule { subject: Subject::Everyone, read: vec![pattern("open/#")], write: vec![pattern("+/%c")], deny: vec![] };
    hub.set_access(access::Settings { rules: vec![rule], ..access::Settings::default() });
    assert!(matches!(say(&mut a, "open/b", "1", QoS::AtMostOnce), Outcome::Refused(Refusal::NotAuthorized)));
    say(&mut a, "open/a", "2", QoS::AtMostOnce);
    say(&mut a, "secret/a", "3", QoS::AtMostOnce);
    assert_eq!(heard(&mut b), ["open/a=2 0"]);
    let refused = a.subscribe(&filter("secret/#"), SubscribeOptions::new(QoS::AtMostOnce));
    assert_eq!(refused.unwrap_err(), SubscribeError::NotAuthorized);
}

#[test]
fn a_client_whose_user_is_gone_is_disconnected() {
    let hub = hub();
    let user = access::User { name: "ann".into(), password_hash: access::hash_password(b"pw").unwrap().into() };
    hub.set_access(access::Settings { users: vec![user], ..access::Settings::default() });
    let identity = hub.access().authenticate(Some("ann"), Some(b"pw"), false).unwrap();
    let ann = hub.attach(Attach { identity, ..request("a") }).unwrap();
    let anonymous = client(&hub, "b");
    hub.set_access(access::Settings::default());
    assert_eq!((ann.fate(), anonymous.fate()), (Some(Fate::Kicked), None));
}

#[test]
fn limits_hold() {
    let limits = Limits { max_subscriptions: 1, max_topic_levels: 3, max_sessions: 1, ..Limits::default() };
    let settings = Settings { limits, ..Settings::default() };
    let hub = Hub::new(settings, Clock::start("test"), None).unwrap();
    let mut a = client(&hub, "a");
    assert_eq!(hub.attach(request("b")).unwrap_err(), AttachError::TooManySessions);
    let mut try_one = |text: &str| a.subscribe(&filter(text), SubscribeOptions::new(QoS::AtMostOnce)).map(drop);
    assert_eq!(try_one("a/b/c/d"), Err(SubscribeError::FilterTooLong));
    assert_eq!(try_one("a"), Ok(()));
    assert_eq!(try_one("a"), Ok(()));
    assert_eq!(try_one("b"), Err(SubscribeError::QuotaExceeded));
    assert!(matches!(say(&mut a, "a/b/c/d", "", QoS::AtMostOnce), Outcome::Refused(Refusal::TopicInvalid)));
}

#[test]
fn sessions_queues_and_retained_messages_come_back_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let start = || {
        let clock = Clock::start("test");
        let store = store::Store::bind(store::Settings::new(directory.path()), clock.clone()).unwrap();
        Hub::new(Settings::default(), clock, Some(store)).unwrap()
    };
    let hub = start();
    let mut a = hub.attach(persistent("a")).unwrap();
    subscribe(&mut a, "x", QoS::ExactlyOnce);
    a.detach(false, None);
    let mut b = client(&hub, "b");
    for payload in ["1", "2", "3"] {
        assert!(matches!(say(&mut b, "x", payload, QoS::AtLeastOnce), Outcome::Pending(_)));
    }
    b.publish(Publish { retain: true, qos: QoS::AtLeastOnce, ..Publish::new("kept", "r") });
    b.flush();
    drop(b);
    hub.store().unwrap().clone().close();
    drop(hub);

    let hub = start();
    let mut a = hub.attach(persistent("a")).unwrap();
    assert!(a.session_present());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let first = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), a.next()).await.unwrap() });
    assert_eq!(first.len(), 3);
    let mut b = client(&hub, "b");
    subscribe(&mut b, "kept", QoS::AtMostOnce);
    assert_eq!(heard(&mut b), ["kept=r 0r"]);
}

#[test]
fn a_client_that_comes_back_and_subscribes_to_what_it_has_costs_no_write() {
    let directory = tempfile::tempdir().unwrap();
    let start = || {
        let clock = Clock::start("test");
        let store = store::Store::bind(store::Settings::new(directory.path()), clock.clone()).unwrap();
        Hub::new(Settings::default(), clock, Some(store)).unwrap()
    };
    // Closing it writes all that waits.
    let changes_at_the_end = |hub: Hub| {
        let store = hub.store().unwrap().clone();
        store.clone().close();
        let mut metrics = crate::observe::Metrics::default();
        crate::observe::Observe::collect(&store, &mut metrics);
        let text = metrics.render();
        let changes = text.lines().find_map(|line| line.strip_prefix("fieldgate_store_changes_total "));
        changes.unwrap().parse::<u64>().unwrap()
    };
    let receipt_for = |link: &mut Link, qos| link.subscribe(&filter("x"), SubscribeOptions::new(qos)).unwrap().receipt;
    let come_and_go = |hub: &Hub, times: usize| {
        for _ in 0..times {
            let mut client = hub.attach(persistent("a")).unwrap();
            let receipt = receipt_for(&mut client, QoS::AtLeastOnce);
            while receipt.as_ref().is_some_and(|receipt| receipt.state() == store::ReceiptState::Pending) {
                std::thread::yield_now();
            }
            client.detach(false, None);
        }
    };
    let hub = start();
    come_and_go(&hub, 5);
    assert_eq!(changes_at_the_end(hub), 2, "the session and its subscription");

    // So it is with what was found on disk.
    let hub = start();
    come_and_go(&hub, 5);
    let mut client = hub.attach(persistent("a")).unwrap();
    assert!(receipt_for(&mut client, QoS::AtLeastOnce).is_none());
    drop(client);
    assert_eq!(changes_at_the_end(hub), 0);

    // What is different is written, and so is a session that may expire: since when it is alone counts then.
    let hub = start();
    let mut client = hub.attach(persistent("a")).unwrap();
    assert!(receipt_for(&mut client, QoS::ExactlyOnce).is_some());
    client.detach(false, Some(SessionExpiry::After(Duration::from_secs(60))));
    assert_eq!(changes_at_the_end(hub), 2);
}

#[test]
fn a_full_database_binds_the_queues_that_grow_on_it_each_by_its_policy() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::start("test");
    let small = store::Settings { max_bytes: 1 << 20, ..store::Settings::new(directory.path()) };
    let store = store::Store::bind(small, clock.clone()).unwrap();
    let hub = Hub::new(Settings::default(), clock, Some(store)).unwrap();
    for when_full in [WhenFull::DropNewest, WhenFull::DropOldest, WhenFull::Reject] {
        let name = format!("{when_full:?}");
        let queue = Some(QueueLimits { when_full, ..QueueLimits::default() });
        let mut away = hub.attach(Attach { queue, ..persistent(&name) }).unwrap();
        subscribe(&mut away, &name, QoS::AtLeastOnce);
        away.detach(false, None);
    }
    let mut publisher = client(&hub, "publisher");
    say(&mut publisher, "DropOldest", "old", QoS::AtLeastOnce);
    while !hub.store().unwrap().is_full() {
        let filling = Publish { qos: QoS::AtLeastOnce, ..Publish::new("DropNewest", vec![7; 4000]) };
        let Outcome::Pending(receipt) = publisher.publish(filling) else { panic!("it is journaled") };
        publisher.flush();
        while receipt.state() == store::ReceiptState::Pending {
            std::thread::yield_now();
        }
    }
    let dropped = || hub.counters().dropped.store_full.load(Ordering::Relaxed);
    let kept = |name| hub.queued(Face::Mqtt, name).unwrap().0;
    let before = kept("DropNewest");

    say(&mut publisher, "DropNewest", "new", QoS::AtLeastOnce);
    assert_eq!((dropped(), kept("DropNewest")), (1, before));
    say(&mut publisher, "DropOldest", "new", QoS::AtLeastOnce);
    assert_eq!((dropped(), kept("DropOldest")), (2, 1));
    let refused = say(&mut publisher, "Reject", "new", QoS::AtLeastOnce);
    assert!(matches!(refused, Outcome::Refused(Refusal::QuotaExceeded)), "{refused:?}");
    assert_eq!((dropped(), kept("Reject")), (2, 0));
    assert_eq!(hub.counters().refused_store_full.load(Ordering::Relaxed), 1);

    // Whoever keeps up needs no room for long.
    let mut here = hub.attach(persistent("here")).unwrap();
    subscribe(&mut here, "here", QoS::AtLeastOnce);
    publisher.publish(Publish { qos: QoS::AtLeastOnce, ..Publish::new("here", "x") });
    assert!(publisher.flush().is_some(), "a publisher waits for the disk");
    assert_eq!((dropped(), heard(&mut here)), (2, vec!["here=x 1".to_owned()]));
    assert!(publisher.flush().is_none(), "nothing was published, and nobody has to wait");
}

/// A receiver with a backlog that its publisher waits for: how long it does, where the receiver takes `taken` messages
/// every 100 ms.
async fn time_waited_for_a_receiver(taken: usize) -> Duration {
    let hub = hub();
    let (mut receiver, mut publisher) = (client(&hub, "receiver"), client(&hub, "publisher"));
    subscribe(&mut receiver, "x", QoS::AtMostOnce);
    let pressure = (0..10_000).find_map(|_| {
        publisher.publish(Publish::new("x", "payload"));
        publisher.flush()
    });
    let pressure = pressure.unwrap();
    let begin = tokio::time::Instant::now();
    let takes = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            receiver.take(&mut Vec::new(), taken);
        }
    };
    tokio::select! {
        () = pressure.wait() => begin.elapsed(),
        () = takes => unreachable!("it goes on for ever"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_publisher_waits_for_a_receiver_as_long_as_it_makes_headway() {
    // 6,144 messages until the backlog is low enough.
    assert_eq!(time_waited_for_a_receiver(300).await, Duration::from_millis(2100));
    assert_eq!(time_waited_for_a_receiver(100).await, Duration::from_millis(250));
    assert_eq!(time_waited_for_a_receiver(0).await, Duration::from_millis(250));
}

#[test]
fn room_that_another_publisher_was_quicker_to_take_is_refused() {
    let mut settings = Settings::default();
    settings.limits.queue = QueueLimits { max_messages: 1, when_full: WhenFull::Reject, ..QueueLimits::default() };
    let hub = Hub::new(settings, Clock::start("test"), None).unwrap();
    let mut to = hub.attach(persistent("to")).unwrap();
    subscribe(&mut to, "x", QoS::AtLeastOnce);
    to.detach(false, None);
    let (mut a, mut b) = (client(&hub, "a"), client(&hub, "b"));
    let publish = |link: &mut Link| match link.publish(Publish { qos: QoS::AtLeastOnce, ..Publish::new("x", "1") }) {
        Outcome::Pending(receipt) => receipt,
        outcome => panic!("{outcome:?}"),
    };
    // Both saw room for one.
    let (first, second) = (publish(&mut a), publish(&mut b));
    b.flush();
    a.flush();
    assert_eq!((first.state(), second.state()), (store::ReceiptState::Failed, store::ReceiptState::Done));
    assert!(matches!(say(&mut a, "x", "2", QoS::AtLeastOnce), Outcome::Refused(Refusal::QuotaExceeded)));
    let counters = hub.counters();
    assert_eq!((counters.refused_queue_full.load(Ordering::Relaxed), counters.dropped()), (2, 0));
}

#[test]
fn what_could_not_be_kept_is_new_when_it_comes_again() {
    let mut settings = Settings::default();
    settings.limits.queue = QueueLimits { max_messages: 1, when_full: WhenFull::Reject, ..QueueLimits::default() };
    let hub = Hub::new(settings, Clock::start("test"), None).unwrap();
    let mut to = hub.attach(persistent("to")).unwrap();
    subscribe(&mut to, "x", QoS::AtLeastOnce);
    let publish = |link: &mut Link, payload: &'static str| {
        let packet_id = PacketId::new(7);
        match link.publish(Publish { qos: QoS::ExactlyOnce, packet_id, ..Publish::new("x", payload) }) {
            Outcome::Pending(receipt) => receipt,
            outcome => panic!("{outcome:?}"),
        }
    };
    let (mut one, mut other) = (hub.attach(persistent("one")).unwrap(), client(&hub, "other"));
    // Both see room, and the other is quicker to take it.
    let receipts = [publish(&mut other, "other"), publish(&mut one, "one")];
    other.flush();
    one.flush();
    assert_eq!(receipts.map(|receipt| receipt.state() == store::ReceiptState::Failed), [false, true]);
    let mut taken = Vec::new();
    to.take(&mut taken, 10);
    let [Outbound::Publish(delivery)] = &taken[..] else { panic!("{taken:?}") };
    to.acknowledge(delivery.packet_id.unwrap());
    to.flush();

    // A 3.x client is closed on, without a look at what else could not be kept, and sends everything again.
    one.detach(false, None);
    let mut one = hub.attach(persistent("one")).unwrap();
    let receipt = publish(&mut one, "one");
    one.flush();
    assert_eq!(heard(&mut to), ["x=one 1"]);
    assert_eq!(receipt.state(), store::ReceiptState::Done);
}
