//! A gateway and its clients: who a datagram belongs to, and what belongs to nobody (MQTT-SN 1.2 §5.5, §6.1, §6.8).
//!
//! A session belongs to a ClientId; an address is only where that client was heard last. Two messages say a ClientId,
//! CONNECT and a waking PINGREQ, and both move the client to where they came from. Everything else is matched by
//! address.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::action::{
    Action, ClientKey, Delivery, DropReason, Output, Outputs, PublishAnswer, Published, SubscribeAnswer,
};
use super::client::{Client, ClientState, Context, Handled, Rules};
use super::codec::{self, DecodeError, MAX_NODE_BYTES};
use super::connectionless::RateLimit;
use super::packet::{Connect, MsgId, Packet, PacketKind, Protocol, Publish, PublishQoS, ReturnCode};
use super::topics::common_topic;
use crate::address::AddressRange;
use crate::message::QoS;
use crate::throttle::{AddressLimits, Rates};

/// DISCONNECTs in answer to a stranger's plain DISCONNECT, per second. Two gateways that take each other for a client
/// could otherwise answer each other at full speed.
const MAX_FAREWELLS_PER_SECOND: u32 = 1;
/// GWINFOs per second.
const MAX_GWINFOS_PER_SECOND: u32 = 20;

/// What the operator decides about a gateway.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Distinct among the gateways that clients can hear.
    pub gateway_id: u8,
    pub rules: Rules,
    /// Clients that are connected or remembered.
    pub max_clients: usize,
    /// The specification says 23 characters; longer ids are accepted up to this many octets.
    pub max_client_id_bytes: usize,
    /// Who may publish without a connection; `None`: nobody.
    pub connectionless: Option<Connectionless>,
    /// How often one address may send a CONNECT; what is over is not answered.
    pub addresses: AddressLimits,
    /// How many DISCONNECTs per second tell strangers that they are not connected.
    pub max_stranger_answers_per_second: u32,
    /// T_ADV, at most 65,535 s; `None`: the gateway does not advertise itself.
    pub advertise_interval: Option<Duration>,
}

/// Publishing with QoS −1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connectionless {
    /// Empty: everyone.
    pub allow: Vec<AddressRange>,
    pub max_per_second: u32,
}

/// The gateway's state machine: datagrams, answers and the time in, [`Action`]s out.
#[derive(Debug)]
pub struct Gateway {
    settings: Settings,
    clients: HashMap<ClientKey, Entry>,
    by_id: HashMap<Arc<str>, ClientKey>,
    by_peer: HashMap<Peer, ClientKey>,
    deadlines: BTreeSet<(Instant, ClientKey)>,
    /// Clients that are gone and only remembered, the longest gone first.
    gone: BTreeSet<(Instant, ClientKey)>,
    next_key: u64,
    next_topic_id: u16,
    advertise_at: Option<Instant>,
    connect_rates: Rates,
    connectionless_limit: RateLimit,
    stranger_limit: RateLimit,
    farewell_limit: RateLimit,
    gwinfo_limit: RateLimit,
    actions: VecDeque<Action>,
    counters: Counters,
    states: [usize; ClientState::COUNT],
}

#[derive(Debug)]
struct Entry {
    client_id: Arc<str>,
    client: Client,
    route: Option<Route>,
    deadline: Option<Instant>,
    gone_at: Option<Instant>,
}

/// Where datagrams come from: an address, and behind a forwarder also a node id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Peer {
    address: SocketAddr,
    node: Option<Box<[u8]>>,
}

/// A peer and how far it is.
#[derive(Clone, Debug)]
struct Route {
    peer: Peer,
    radius: u8,
}

/// What happened since the start.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub received: [u64; PacketKind::COUNT],
    pub sent: [u64; PacketKind::COUNT],
    pub dropped: [u64; DropReason::COUNT],
    pub lost_clients: u64,
}

impl Gateway {
    /// A gateway that starts at `now`. `seed` differs from start to start; topic ids begin there, so that a client that
    /// still knows the ids of an earlier start does not publish under a wrong name.
    pub fn new(settings: Settings, seed: u16, now: Instant) -> Self {
        Self {
            clients: HashMap::new(),
            by_id: HashMap::new(),
            by_peer: HashMap::new(),
            deadlines: BTreeSet::new(),
            gone: BTreeSet::new(),
            next_key: 0,
            next_topic_id: seed,
            advertise_at: settings.advertise_interval.map(|_| now),
            connect_rates: Rates::new(settings.addresses.clone()),
            connectionless_limit: RateLimit::per_second(
                settings.connectionless.as_ref().map_or(0, |allowed| allowed.max_per_second),
            ),
            stranger_limit: RateLimit::per_second(settings.max_stranger_answers_per_second),
            farewell_limit: RateLimit::per_second(MAX_FAREWELLS_PER_SECOND),
            gwinfo_limit: RateLimit::per_second(MAX_GWINFOS_PER_SECOND),
            actions: VecDeque::new(),
            counters: Counters::default(),
            states: [0; ClientState::COUNT],
            settings,
        }
    }

    /// Takes in one datagram.
    pub fn handle(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) {
        let packet = match codec::decode(datagram) {
            Ok(packet) => packet,
            Err(error) => return self.count_undecodable(error),
        };
        self.counters.received[packet.kind() as usize] += 1;
        let Packet::Encapsulated { radius, node, message } = packet else {
            let route = Route { peer: Peer { address: from, node: None }, radius: 0 };
            return self.dispatch(route, &packet, now);
        };
        // One forwarder is between a node and its gateway, never a chain of them.
        match codec::decode(message) {
            Ok(Packet::Encapsulated { .. }) => self.count_drop(DropReason::Undefined),
            Ok(_) if node.len() > MAX_NODE_BYTES => self.count_drop(DropReason::Undefined),
            Ok(packet) => {
                self.counters.received[packet.kind() as usize] += 1;
                let route = Route { peer: Peer { address: from, node: Some(node.into()) }, radius };
                self.dispatch(route, &packet, now);
            }
            Err(error) => self.count_undecodable(error),
        }
    }

    /// The next thing to do, until there is nothing left.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Gateway::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at).into_iter().chain(self.advertise_at).min()
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        if self.advertise_at.is_some_and(|at| at <= now) {
            self.advertise(now);
        }
        while let Some(&(at, key)) = self.deadlines.first() {
            if at > now {
                break;
            }
            if self.clients.get(&key).is_some_and(|entry| entry.client.is_forgotten(now)) {
                self.forget(key);
            } else {
                self.step(key, now, |client, cx| client.handle_timeout(cx));
                // A deadline that nothing was done about would be due for ever.
                debug_assert!(self.clients[&key].deadline.is_none_or(|deadline| deadline > now), "deadline stands");
            }
        }
    }

    /// The answer to `Request::Attach` and `Request::Resume`.
    pub fn attached(&mut self, key: ClientKey, result: Result<(), ReturnCode>, now: Instant) {
        self.step(key, now, |client, cx| client.attached(result, cx));
    }

    /// The answer to `Request::Publish`; for QoS 1 and 2 it may come later.
    pub fn published(&mut self, key: ClientKey, answer: PublishAnswer, result: Published, now: Instant) {
        self.step(key, now, |client, cx| client.published(answer, result, cx));
    }

    /// The answer to `Request::Release`.
    pub fn released(&mut self, key: ClientKey, msg_id: MsgId, now: Instant) {
        self.step(key, now, |client, cx| client.released(msg_id, cx));
    }

    /// The answer to `Request::Subscribe`.
    pub fn subscribed(
        &mut self,
        key: ClientKey,
        answer: SubscribeAnswer,
        result: Result<QoS, ReturnCode>,
        now: Instant,
    ) {
        self.step(key, now, |client, cx| client.subscribed(answer, result, cx));
    }

    /// A message, in answer to `Request::Take`.
    pub fn deliver(&mut self, key: ClientKey, delivery: Delivery, now: Instant) {
        self.step(key, now, |client, cx| client.deliver(delivery, cx));
    }

    /// A QoS 2 message whose PUBREC is written down, in answer to `Request::Take`.
    pub fn deliver_release(&mut self, key: ClientKey, packet_id: NonZeroU16, now: Instant) {
        self.step(key, now, |client, cx| client.deliver_release(packet_id, cx));
    }

    /// Nothing to send at the moment, in answer to `Request::Take`.
    pub fn drained(&mut self, key: ClientKey, now: Instant) {
        self.step(key, now, |client, cx| client.drained(cx));
    }

    /// The client's session may have something to send.
    pub fn pending(&mut self, key: ClientKey, now: Instant) {
        self.step(key, now, |client, cx| client.pending(cx));
    }

    /// The hub has closed the client's session.
    pub fn evicted(&mut self, key: ClientKey, now: Instant) {
        self.step(key, now, |client, cx| client.evicted(cx));
    }

    pub fn client_id(&self, key: ClientKey) -> Option<&Arc<str>> {
        self.clients.get(&key).map(|entry| &entry.client_id)
    }

    /// Where the client was heard last.
    pub fn address(&self, key: ClientKey) -> Option<SocketAddr> {
        self.clients.get(&key)?.route.as_ref().map(|route| route.peer.address)
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many clients are in each state, in the order of [`ClientState`].
    pub fn states(&self) -> [usize; ClientState::COUNT] {
        self.states
    }

    /// The clients that are connected or remembered.
    pub fn keys(&self) -> Vec<ClientKey> {
        self.clients.keys().copied().collect()
    }

    fn dispatch(&mut self, route: Route, packet: &Packet<'_>, now: Instant) {
        match packet {
            Packet::Advertise { .. } | Packet::GwInfo { .. } => {}
            Packet::SearchGw { radius } => self.handle_searchgw(&route, *radius, now),
            Packet::Connect(connect) => self.handle_connect(route, connect, now),
            Packet::PingReq { client_id } if !client_id.is_empty() => {
                self.handle_wake(route, client_id, packet, now);
            }
            Packet::Publish(publish) if publish.qos == PublishQoS::Connectionless => {
                self.handle_connectionless(&route, publish, now);
            }
            _ => match self.by_peer.get(&route.peer) {
                Some(&key) => self.handle_known(key, &route, packet, now),
                None => self.handle_stranger(&route, packet, now),
            },
        }
    }

    fn handle_known(&mut self, key: ClientKey, route: &Route, packet: &Packet<'_>, now: Instant) {
        let mut handled = Handled::Done;
        self.step(key, now, |client, cx| handled = client.handle(packet, cx));
        match handled {
            Handled::Done => {}
            Handled::NotConnected => self.handle_stranger(route, packet, now),
            Handled::Unexpected => self.count_drop(DropReason::Unexpected),
        }
    }

    fn handle_connect(&mut self, route: Route, connect: &Connect<'_>, now: Instant) {
        if !self.connect_rates.admit(Some(route.peer.address.ip()), now) {
            return self.count_drop(DropReason::RateLimited);
        }
        let refuse = |gateway: &mut Self, code| gateway.reply(&route, &Packet::ConnAck(code));
        if connect.protocol != Protocol::Supported {
            return refuse(self, ReturnCode::NotSupported);
        }
        let Some(client_id) = self.check_client_id(connect.client_id) else {
            return refuse(self, ReturnCode::NotSupported);
        };
        let key = match self.by_id.get(client_id) {
            Some(&key) => key,
            None if !self.has_room() => return refuse(self, ReturnCode::Congestion),
            None => self.add(client_id),
        };
        self.bind(key, route.clone());
        self.handle_known(key, &route, &Packet::Connect(*connect), now);
    }

    /// A PINGREQ that says who it is from, perhaps from a new address (§6.14).
    fn handle_wake(&mut self, route: Route, client_id: &[u8], packet: &Packet<'_>, now: Instant) {
        let known = self.check_client_id(client_id).and_then(|client_id| self.by_id.get(client_id)).copied();
        match known {
            Some(key) if self.clients.get(&key).is_some_and(|entry| entry.client.is_connected()) => {
                self.bind(key, route.clone());
                self.handle_known(key, &route, packet, now);
            }
            _ => self.handle_stranger(&route, packet, now),
        }
    }

    fn handle_connectionless(&mut self, route: &Route, publish: &Publish<'_>, now: Instant) {
        let connected = self.by_peer.get(&route.peer).copied();
        let connected = connected.filter(|key| self.clients.get(key).is_some_and(|entry| entry.client.is_connected()));
        if let Some(key) = connected {
            // It is known and bound by its own rights; the switch is for those who are not.
            return self.handle_known(key, route, &Packet::Publish(*publish), now);
        }
        let address = route.peer.address.ip();
        let allowed = self.settings.connectionless.as_ref().is_some_and(|connectionless| {
            connectionless.allow.is_empty() || connectionless.allow.iter().any(|range| range.contains(address))
        });
        if !allowed {
            return self.count_drop(DropReason::NotAllowed);
        }
        if !self.connectionless_limit.allow(now) {
            return self.count_drop(DropReason::RateLimited);
        }
        match common_topic(publish.topic, &self.settings.rules.predefined) {
            Some(topic) => self.actions.push_back(Action::PublishConnectionless {
                from: route.peer.address,
                topic,
                payload: Bytes::copy_from_slice(publish.payload),
                retain: publish.retain,
            }),
            None => self.count_drop(DropReason::UnknownTopic),
        }
    }

    /// Tells a sender that it is not connected (§5.4.21).
    fn handle_stranger(&mut self, route: &Route, packet: &Packet<'_>, now: Instant) {
        let limit = match packet {
            // A gateway sends a plain DISCONNECT, too.
            Packet::Disconnect { duration: None } => &mut self.farewell_limit,
            Packet::WillTopic(_)
            | Packet::WillMsg(_)
            | Packet::Register { .. }
            | Packet::RegAck { .. }
            | Packet::Publish(_)
            | Packet::PubAck { .. }
            | Packet::PubRec(_)
            | Packet::PubRel(_)
            | Packet::PubComp(_)
            | Packet::Subscribe { .. }
            | Packet::Unsubscribe { .. }
            | Packet::PingReq { .. }
            | Packet::Disconnect { .. }
            | Packet::WillTopicUpd(_)
            | Packet::WillMsgUpd(_) => &mut self.stranger_limit,
            // Only a gateway says these; it has nothing to disconnect from.
            _ => return self.count_drop(DropReason::Unexpected),
        };
        if !limit.allow(now) {
            return self.count_drop(DropReason::RateLimited);
        }
        self.count_drop(DropReason::Stranger);
        self.reply(route, &Packet::Disconnect { duration: None });
    }

    fn handle_searchgw(&mut self, route: &Route, radius: u8, now: Instant) {
        if !self.has_room() || !self.gwinfo_limit.allow(now) {
            return self.count_drop(DropReason::RateLimited);
        }
        let route = Route { radius: radius.min(3), ..route.clone() };
        self.reply(&route, &Packet::GwInfo { gateway_id: self.settings.gateway_id, address: &[] });
    }

    fn advertise(&mut self, now: Instant) {
        let Some(interval) = self.settings.advertise_interval else { return };
        // An interval of nothing would be due for ever.
        self.advertise_at = Some(now + interval.max(Duration::from_secs(1)));
        if !self.has_room() {
            return;
        }
        let duration = u16::try_from(interval.as_secs()).unwrap_or(u16::MAX);
        let packet = Packet::Advertise { gateway_id: self.settings.gateway_id, duration };
        let mut datagram = Vec::new();
        codec::encode(&packet, &mut datagram);
        self.counters.sent[packet.kind() as usize] += 1;
        self.actions.push_back(Action::Broadcast { datagram });
    }

    fn check_client_id<'a>(&self, octets: &'a [u8]) -> Option<&'a str> {
        let fits = (1..=self.settings.max_client_id_bytes).contains(&octets.len());
        std::str::from_utf8(octets).ok().filter(|text| fits && !text.contains(char::is_control))
    }

    /// Whether one more client can be served.
    fn has_room(&self) -> bool {
        self.clients.len() < self.settings.max_clients || !self.gone.is_empty()
    }

    fn add(&mut self, client_id: &str) -> ClientKey {
        if self.clients.len() >= self.settings.max_clients
            && let Some(&(_, longest_gone)) = self.gone.first()
        {
            self.forget(longest_gone);
        }
        let key = ClientKey(self.next_key);
        self.next_key += 1;
        let client = Client::new(self.next_topic_id, &self.settings.rules);
        let client_id: Arc<str> = client_id.into();
        self.states[client.state() as usize] += 1;
        self.by_id.insert(client_id.clone(), key);
        self.clients.insert(key, Entry { client_id, client, route: None, deadline: None, gone_at: None });
        key
    }

    fn forget(&mut self, key: ClientKey) {
        let Some(entry) = self.clients.remove(&key) else { return };
        self.states[entry.client.state() as usize] -= 1;
        self.by_id.remove(&entry.client_id);
        if let Some(route) = entry.route {
            self.by_peer.remove(&route.peer);
        }
        self.deadlines.withdraw(entry.deadline, key);
        self.gone.withdraw(entry.gone_at, key);
    }

    /// From now on the client is where `route` leads, and nobody else is.
    fn bind(&mut self, key: ClientKey, route: Route) {
        if let Some(other) = self.by_peer.insert(route.peer.clone(), key).filter(|other| *other != key)
            && let Some(entry) = self.clients.get_mut(&other)
        {
            // It is heard again when it says its id from wherever it is now; until then its silence counts.
            entry.route = None;
        }
        let Some(entry) = self.clients.get_mut(&key) else { return };
        if let Some(old) = entry.route.replace(route.clone()).filter(|old| old.peer != route.peer) {
            self.by_peer.remove(&old.peer);
        }
    }

    /// Lets one client do something and takes up what comes of it.
    fn step(&mut self, key: ClientKey, now: Instant, work: impl FnOnce(&mut Client, &mut Context<'_>)) {
        let Some(entry) = self.clients.get_mut(&key) else { return };
        let mut outputs = Outputs::default();
        let rules = &self.settings.rules;
        let before = entry.client.state();
        work(&mut entry.client, &mut Context { now, rules, client_id: &entry.client_id, out: &mut outputs });
        self.states[before as usize] -= 1;
        self.states[entry.client.state() as usize] += 1;
        let deadline = entry.client.poll_timeout();
        if deadline != entry.deadline {
            self.deadlines.withdraw(entry.deadline, key);
            self.deadlines.extend(deadline.map(|deadline| (deadline, key)));
            entry.deadline = deadline;
        }
        match (entry.client.is_gone(), entry.gone_at) {
            (true, None) => {
                entry.gone_at = Some(now);
                self.gone.insert((now, key));
            }
            (false, Some(_)) => self.gone.withdraw(entry.gone_at.take(), key),
            _ => {}
        }
        let route = entry.route.clone();
        for output in outputs.0 {
            match output {
                Output::Send { kind, bytes } => match &route {
                    Some(route) => self.send(route, kind, bytes),
                    None => self.count_drop(DropReason::NoAddress),
                },
                Output::Request(request) => self.actions.push_back(Action::Client { key, request }),
                Output::Drop(reason) => self.count_drop(reason),
                Output::Notice(notice) => {
                    self.counters.lost_clients += u64::from(matches!(notice, super::action::Notice::Lost { .. }));
                    self.actions.push_back(Action::Notice(notice));
                }
            }
        }
    }

    fn reply(&mut self, route: &Route, packet: &Packet<'_>) {
        let mut bytes = Vec::new();
        codec::encode(packet, &mut bytes);
        self.send(route, packet.kind(), bytes);
    }

    fn send(&mut self, route: &Route, kind: PacketKind, bytes: Vec<u8>) {
        self.counters.sent[kind as usize] += 1;
        let datagram = match &route.peer.node {
            None => bytes,
            Some(node) => {
                let packet = Packet::Encapsulated { radius: route.radius, node, message: &bytes };
                self.counters.sent[packet.kind() as usize] += 1;
                let mut datagram = Vec::new();
                codec::encode(&packet, &mut datagram);
                datagram
            }
        };
        self.actions.push_back(Action::Send { to: route.peer.address, datagram });
    }

    fn count_undecodable(&mut self, error: DecodeError) {
        self.count_drop(match error {
            DecodeError::Length => DropReason::Length,
            DecodeError::Reserved(_) | DecodeError::Malformed(_) => DropReason::Undefined,
        });
    }

    fn count_drop(&mut self, reason: DropReason) {
        self.counters.dropped[reason as usize] += 1;
    }
}

/// Takes out the entry of `key` that was put in for `at`.
trait Withdraw {
    fn withdraw(&mut self, at: Option<Instant>, key: ClientKey);
}

impl Withdraw for BTreeSet<(Instant, ClientKey)> {
    fn withdraw(&mut self, at: Option<Instant>, key: ClientKey) {
        if let Some(at) = at {
            self.remove(&(at, key));
        }
    }
}
