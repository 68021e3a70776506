//! The life of one connection as a client (MQTT 5.0 §3, §4; MQTT 3.1.1 §3, §4).
//!
//! The shell writes what [`Client::connect`] appends, feeds decoded packets to [`Client::handle`], calls
//! [`Client::check_deadline`] when [`Client::deadline`] is due, and acts on the [`Event`]s. Subscribe, and wait for
//! [`Event::Subscribed`], before the first [`Client::publish`]: packet identifiers of SUBSCRIBE and PUBLISH share one
//! space, and those of PUBLISH are chosen by the hub's session.

use std::time::{Duration, Instant};

use super::flow::{AckKind, AckState, Acks, Inbound, Outbound};
use super::packet::{
    Ack, Connack, Connect, Disconnect, Filters, LastWill, Packet, Publish, Subscribe, Subscription, Subscriptions,
    Unsubscribe,
};
use super::property::{Property, PropertyList};
use super::server::Will;
use super::{Body, EncodeError, MAX_PACKET_BYTES, PacketId, ProtocolError, PublishHead, ReasonCode, Version, decode};
use crate::message::QoS;
use crate::via::{self, GatewayId, Introduction};

/// How to connect.
#[derive(Clone)]
pub struct Options {
    pub version: Version,
    pub client_id: String,
    pub clean_start: bool,
    /// Announce this client as a bridge to a 3.x server that knows the word (Mosquitto does): it then does not send
    /// our own messages back.
    pub is_bridge: bool,
    /// Seconds; zero is none.
    pub keep_alive: u16,
    /// Seconds the server keeps the session (5.0).
    pub session_expiry: u32,
    pub user_name: Option<String>,
    pub password: Option<Vec<u8>>,
    pub will: Option<Will>,
    /// How many unacknowledged PUBLISH packets the server may send (5.0); at least 1.
    pub receive_maximum: u16,
    /// Of inbound packets, in bytes.
    pub max_packet_size: u32,
    /// Of our PUBLISH packets, in bytes; the server may allow less (5.0).
    pub max_sent_packet_size: u32,
    /// How many topic aliases the server may set (5.0).
    pub topic_alias_maximum: u16,
    /// How long the server may take to answer a CONNECT, SUBSCRIBE or PINGREQ.
    pub answer_timeout: Duration,
    /// Which gateway we are, for a server that is one too (5.0).
    pub gateway: Option<Introduction>,
}

impl Options {
    /// A clean session of MQTT 5.0 with a keep alive of 60 seconds.
    pub fn new(client_id: impl Into<String>) -> Self {
        Self {
            version: Version::V5,
            client_id: client_id.into(),
            clean_start: true,
            is_bridge: false,
            keep_alive: 60,
            session_expiry: 0,
            user_name: None,
            password: None,
            will: None,
            receive_maximum: 1024,
            max_packet_size: MAX_PACKET_BYTES,
            max_sent_packet_size: MAX_PACKET_BYTES,
            topic_alias_maximum: 10,
            answer_timeout: Duration::from_secs(20),
            gateway: None,
        }
    }
}

/// Without the password.
impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("version", &self.version)
            .field("client_id", &self.client_id)
            .field("clean_start", &self.clean_start)
            .field("keep_alive", &self.keep_alive)
            .field("user_name", &self.user_name)
            .finish_non_exhaustive()
    }
}

/// What the server allows, from its CONNACK (MQTT 5.0 §3.2.2.3); for 3.x what that protocol implies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// How many of our PUBLISH packets of QoS 1 and 2 may be unacknowledged.
    pub receive_maximum: u16,
    /// Of our packets, in bytes.
    pub max_packet_size: u32,
    pub maximum_qos: QoS,
    pub retain_available: bool,
    pub topic_alias_maximum: u16,
    pub wildcard_subscriptions: bool,
    pub subscription_identifiers: bool,
    pub shared_subscriptions: bool,
    /// The keep alive in force, in seconds.
    pub keep_alive: u16,
    /// Seconds the server keeps the session.
    pub session_expiry: u32,
    /// Where we left the choice to the server.
    pub assigned_client_id: Option<String>,
}

/// One connection. `R` is what an acknowledgement waits for.
#[derive(Debug)]
pub struct Client<R> {
    options: Options,
    phase: Phase,
    limits: ServerLimits,
    gateway: Option<GatewayId>,
    last_sent: Instant,
    last_received: Instant,
    /// When a PINGREQ that nothing has followed was sent.
    ping_sent: Option<Instant>,
    /// SUBSCRIBE and UNSUBSCRIBE packets that wait for their answer, oldest first.
    requests: Vec<(PacketId, RequestKind, usize, Instant)>,
    next_request: PacketId,
    inbound: Inbound<R>,
    outbound: Outbound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    AwaitingConnack,
    Connected,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestKind {
    Subscribe,
    Unsubscribe,
}

/// What a packet of the server means for the shell.
#[derive(Debug)]
pub enum Event<'a> {
    /// Nothing.
    None,
    /// The server took the CONNECT; see [`Client::limits`].
    Connected { session_present: bool },
    /// The server refused the CONNECT; close the connection. `detail` is its server reference or reason string.
    Refused { reason: ReasonCode, detail: Option<&'a str> },
    /// A SUBACK: one reason code per entry.
    Subscribed { packet_id: PacketId, reasons: &'a [u8] },
    /// An UNSUBACK.
    Unsubscribed { packet_id: PacketId },
    /// Route it; for QoS 1 and 2 answer with [`Client::acknowledge`]. The topic is never empty.
    Publish(Publish<'a>),
    /// PUBACK, or a PUBACK or PUBREC with an error.
    Acknowledged(PacketId, ReasonCode),
    /// PUBREC: [`Client::release`] is next, once that is safe.
    Received(PacketId),
    /// PUBCOMP.
    Completed(PacketId),
    /// PUBREL: answer with [`Client::acknowledge`] and [`AckKind::Pubcomp`].
    Release(PacketId),
    /// The server closes the connection and says why (5.0).
    Disconnected { reason: ReasonCode, detail: Option<&'a str> },
}

/// What became of a message given to [`Client::publish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a payload that was left out must follow the bytes that were written"]
pub struct Sent {
    pub body: Body,
    /// The QoS it was sent with, which the server may limit. At QoS 0 no answer will come.
    pub qos: QoS,
}

impl<R> Client<R> {
    pub fn new(options: Options, now: Instant) -> Self {
        let inbound = Inbound::new(options.receive_maximum, options.topic_alias_maximum);
        let limits = ServerLimits {
            receive_maximum: u16::MAX,
            max_packet_size: options.max_sent_packet_size,
            maximum_qos: QoS::ExactlyOnce,
            retain_available: true,
            topic_alias_maximum: 0,
            wildcard_subscriptions: true,
            subscription_identifiers: options.version.is_5(),
            shared_subscriptions: options.version.is_5(),
            keep_alive: options.keep_alive,
            session_expiry: options.session_expiry,
            assigned_client_id: None,
        };
        Self {
            options,
            phase: Phase::Idle,
            limits,
            gateway: None,
            last_sent: now,
            last_received: now,
            ping_sent: None,
            requests: Vec::new(),
            next_request: PacketId::MAX,
            inbound,
            outbound: Outbound::new(MAX_PACKET_BYTES, 0),
        }
    }

    /// What the server allows; what the protocol implies until [`Event::Connected`].
    pub fn limits(&self) -> &ServerLimits {
        &self.limits
    }

    /// Which gateway the server is, where it has said so in its CONNACK.
    pub fn gateway(&self) -> Option<GatewayId> {
        self.gateway
    }

    pub fn is_connected(&self) -> bool {
        self.phase == Phase::Connected
    }

    /// Appends the CONNECT.
    ///
    /// # Errors
    /// A setting is longer than MQTT can carry.
    pub fn connect(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let options = &self.options;
        let mut will_properties = Vec::new();
        let will = options.will.as_ref().map(|will| {
            if !will.delay.is_zero() {
                will_properties.push(Property::WillDelayInterval(seconds(will.delay)));
            }
            will_properties.extend(will.expiry_interval.map(|left| Property::MessageExpiryInterval(seconds(left))));
            if let Some(properties) = &will.properties {
                will_properties.extend(properties.payload_is_utf8.map(Property::PayloadFormatIndicator));
                will_properties.extend(properties.content_type.as_deref().map(Property::ContentType));
                will_properties
                    .extend(properties.response_topic.as_ref().map(|topic| Property::ResponseTopic(topic.as_str())));
                will_properties.extend(properties.correlation_data.as_deref().map(Property::CorrelationData));
                let user = properties.user_properties.iter();
                will_properties.extend(user.map(|(name, value)| Property::UserProperty(name, value)));
            }
            (will.topic.as_str(), &will.payload[..], will.qos, will.retain)
        });
        let will = will.map(|(topic, payload, qos, retain)| LastWill {
            qos,
            retain,
            properties: will_properties.as_slice().into(),
            topic,
            payload,
        });
        let introduction = options.gateway.map(Introduction::to_text);
        let properties = [
            (options.session_expiry > 0).then_some(Property::SessionExpiryInterval(options.session_expiry)),
            options.receive_maximum.try_into().ok().map(Property::ReceiveMaximum),
            options.max_packet_size.try_into().ok().map(Property::MaximumPacketSize),
            (options.topic_alias_maximum > 0).then_some(Property::TopicAliasMaximum(options.topic_alias_maximum)),
            introduction.as_deref().map(|text| Property::UserProperty(via::ID, text)),
        ];
        let properties: Vec<_> = properties.into_iter().flatten().collect();
        let connect = Connect {
            version: options.version,
            is_bridge: options.is_bridge,
            clean_start: options.clean_start,
            keep_alive: options.keep_alive,
            properties: properties.as_slice().into(),
            client_id: &options.client_id,
            will,
            user_name: options.user_name.as_deref(),
            password: options.password.as_deref(),
        };
        Packet::Connect(Box::new(connect)).encode(options.version, MAX_PACKET_BYTES, out)?;
        self.phase = Phase::AwaitingConnack;
        self.last_sent = now;
        self.last_received = now;
        Ok(())
    }

    /// Takes one packet off the front of `bytes`.
    ///
    /// # Errors
    /// As [`decode`]; hand the error to [`Client::close`] and close the connection.
    #[inline]
    pub fn decode<'b>(&self, bytes: &'b [u8]) -> Result<Option<(Packet<'b>, usize)>, ProtocolError> {
        decode(bytes, self.options.version, self.options.max_packet_size)
    }

    /// Takes one packet of the server.
    ///
    /// # Errors
    /// The server broke a rule: hand the error to [`Client::close`] and close the connection.
    pub fn handle<'a>(&'a mut self, packet: Packet<'a>, now: Instant) -> Result<Event<'a>, ProtocolError> {
        self.last_received = now;
        // Whatever comes shows that the peer is there, also when a PINGRESP stands behind a long queue.
        self.ping_sent = None;
        match (self.phase, packet) {
            (Phase::AwaitingConnack, Packet::Connack(connack)) => Ok(self.handle_connack(&connack)),
            (Phase::AwaitingConnack, Packet::Auth(_)) => {
                Err(ProtocolError::protocol("an AUTH without an authentication method"))
            }
            (Phase::Connected, packet) => self.handle_connected(packet),
            _ => Err(ProtocolError::protocol("the first packet is not a CONNACK")),
        }
    }

    fn handle_connected<'a>(&'a mut self, packet: Packet<'a>) -> Result<Event<'a>, ProtocolError> {
        Ok(match packet {
            Packet::Publish(publish) => Event::Publish(self.inbound.accept(publish, self.options.version)?),
            Packet::Puback(ack) => Event::Acknowledged(ack.packet_id, ack.reason),
            Packet::Pubrec(ack) if ack.reason.is_error() => Event::Acknowledged(ack.packet_id, ack.reason),
            Packet::Pubrec(ack) => Event::Received(ack.packet_id),
            Packet::Pubrel(ack) => Event::Release(ack.packet_id),
            Packet::Pubcomp(ack) => Event::Completed(ack.packet_id),
            Packet::Suback(suback) => {
                let entries = self.answered(suback.packet_id, RequestKind::Subscribe)?;
                if suback.reasons.len() != entries {
                    return Err(ProtocolError::protocol("a SUBACK has another number of entries than its SUBSCRIBE"));
                }
                Event::Subscribed { packet_id: suback.packet_id, reasons: suback.reasons }
            }
            Packet::Unsuback(unsuback) => {
                self.answered(unsuback.packet_id, RequestKind::Unsubscribe)?;
                Event::Unsubscribed { packet_id: unsuback.packet_id }
            }
            Packet::Pingresp => Event::None,
            Packet::Disconnect(disconnect) if self.options.version.is_5() => {
                self.phase = Phase::Closed;
                Event::Disconnected { reason: disconnect.reason, detail: detail(&disconnect.properties) }
            }
            _ => return Err(ProtocolError::protocol("a packet that a server may not send here")),
        })
    }

    /// MQTT 5.0 §3.2.
    fn handle_connack<'a>(&mut self, connack: &Connack<'a>) -> Event<'a> {
        if connack.reason != ReasonCode::Success {
            self.phase = Phase::Closed;
            return Event::Refused { reason: connack.reason, detail: detail(&connack.properties) };
        }
        let limits = &mut self.limits;
        for property in connack.properties.iter() {
            match property {
                Property::SessionExpiryInterval(seconds) => limits.session_expiry = seconds,
                Property::ReceiveMaximum(maximum) => limits.receive_maximum = maximum.get(),
                Property::MaximumQoS(qos) => limits.maximum_qos = qos,
                Property::RetainAvailable(available) => limits.retain_available = available,
                Property::MaximumPacketSize(size) => {
                    limits.max_packet_size = size.get().min(self.options.max_sent_packet_size);
                }
                Property::AssignedClientIdentifier(id) => limits.assigned_client_id = Some(id.into()),
                Property::TopicAliasMaximum(maximum) => limits.topic_alias_maximum = maximum,
                Property::WildcardSubscriptionAvailable(available) => limits.wildcard_subscriptions = available,
                Property::SubscriptionIdentifierAvailable(available) => limits.subscription_identifiers = available,
                Property::SharedSubscriptionAvailable(available) => limits.shared_subscriptions = available,
                // [MQTT-3.2.2-21]
                Property::ServerKeepAlive(seconds) => limits.keep_alive = seconds,
                Property::UserProperty(via::ID, id) => self.gateway = GatewayId::parse(id),
                _ => {}
            }
        }
        self.outbound = Outbound::new(limits.max_packet_size, limits.topic_alias_maximum);
        self.phase = Phase::Connected;
        Event::Connected { session_present: connack.session_present }
    }

    fn answered(&mut self, packet_id: PacketId, kind: RequestKind) -> Result<usize, ProtocolError> {
        let found = self.requests.iter().position(|&(id, asked, ..)| id == packet_id && asked == kind);
        let index = found.ok_or(ProtocolError::protocol("a SUBACK or UNSUBACK answers nothing that was asked"))?;
        Ok(self.requests.remove(index).2)
    }

    /// Appends a SUBSCRIBE; [`Event::Subscribed`] answers it by its packet identifier.
    ///
    /// # Errors
    /// A filter is too long, or the packet is larger than the server takes.
    pub fn subscribe(
        &mut self,
        subscriptions: &[Subscription<'_>],
        now: Instant,
        out: &mut Vec<u8>,
    ) -> Result<PacketId, EncodeError> {
        let packet_id = self.next_request;
        let subscribe = Subscribe {
            packet_id,
            properties: PropertyList::EMPTY,
            subscriptions: Subscriptions::Given(subscriptions),
        };
        self.request(&Packet::Subscribe(subscribe), RequestKind::Subscribe, subscriptions.len(), now, out)
    }

    /// Appends an UNSUBSCRIBE; [`Event::Unsubscribed`] answers it by its packet identifier.
    ///
    /// # Errors
    /// As [`Client::subscribe`].
    pub fn unsubscribe(&mut self, filters: &[&str], now: Instant, out: &mut Vec<u8>) -> Result<PacketId, EncodeError> {
        let packet_id = self.next_request;
        let unsubscribe = Unsubscribe { packet_id, properties: PropertyList::EMPTY, filters: Filters::Given(filters) };
        self.request(&Packet::Unsubscribe(unsubscribe), RequestKind::Unsubscribe, filters.len(), now, out)
    }

    fn request(
        &mut self,
        packet: &Packet<'_>,
        kind: RequestKind,
        entries: usize,
        now: Instant,
        out: &mut Vec<u8>,
    ) -> Result<PacketId, EncodeError> {
        packet.encode(self.options.version, self.outbound.max_packet_size, out)?;
        let packet_id = self.next_request;
        self.requests.push((packet_id, kind, entries, now));
        // Downwards from the top, where the session's identifiers come last.
        self.next_request = PacketId::new(packet_id.get() - 1).unwrap_or(PacketId::MAX);
        self.last_sent = now;
        Ok(packet_id)
    }

    /// The version spoken on this connection.
    pub fn version(&self) -> Version {
        self.options.version
    }

    /// Sends a message as the server's limits allow: at a lower QoS or not retained where it must be so, with a topic
    /// alias where the server takes one. See [`encode_publish`](super::encode_publish).
    ///
    /// # Errors
    /// [`EncodeError::PacketTooLarge`]: the server does not take it.
    pub fn publish(
        &mut self,
        publish: &PublishHead<'_>,
        leave_out_from: usize,
        now: Instant,
        out: &mut Vec<u8>,
    ) -> Result<Sent, EncodeError> {
        let qos = publish.qos.min(self.limits.maximum_qos);
        let allowed = PublishHead {
            qos,
            retain: publish.retain && self.limits.retain_available,
            dup: publish.dup && qos != QoS::AtMostOnce,
            packet_id: publish.packet_id.filter(|_| qos != QoS::AtMostOnce),
            ..*publish
        };
        let body = self.outbound.publish(&allowed, self.options.version, leave_out_from, out)?;
        self.last_sent = now;
        Ok(Sent { body, qos })
    }

    /// Sends a PUBREL.
    pub fn release(&mut self, packet_id: PacketId, now: Instant, out: &mut Vec<u8>) {
        self.write(&Packet::Pubrel(Ack::new(packet_id, ReasonCode::Success)), now, out);
    }

    /// Appends a PINGREQ, out of turn; see [`Client::is_answered`].
    pub fn ping(&mut self, now: Instant, out: &mut Vec<u8>) {
        self.ping_sent = Some(now);
        self.write(&Packet::Pingreq, now, out);
    }

    /// Whether something has come since the last PINGREQ.
    pub fn is_answered(&self) -> bool {
        self.ping_sent.is_none()
    }

    /// Answers a PUBLISH or PUBREL: now, or once `receipt` is done and its turn has come ([`Client::flush_acks`]).
    pub fn acknowledge(
        &mut self,
        kind: AckKind,
        packet_id: PacketId,
        reason: ReasonCode,
        receipt: Option<R>,
        out: &mut Vec<u8>,
    ) {
        self.inbound.acknowledge(kind, packet_id, reason, receipt, self.options.version, out);
    }

    /// Writes the acknowledgements whose turn has come; `state` tells of a receipt, `failed` is told of packets whose
    /// receipt has failed: a QoS 2 identifier among them must be forgotten, for the peer's next try is a new message.
    ///
    /// # Errors
    /// A receipt has failed, and the version has no word for it: hand the error to [`Client::close`] and close the
    /// connection, so that the server sends the message again.
    pub fn flush_acks(
        &mut self,
        state: impl FnMut(&R) -> AckState,
        failed: impl FnMut(AckKind, PacketId),
        out: &mut Vec<u8>,
    ) -> Result<(), ProtocolError> {
        self.inbound.flush(state, failed, self.options.version, out)
    }

    /// The acknowledgements that wait.
    pub fn acks(&self) -> &Acks<R> {
        &self.inbound.acks
    }

    /// Appends a DISCONNECT without a will; close the connection next.
    pub fn disconnect(&mut self, now: Instant, out: &mut Vec<u8>) {
        if self.phase == Phase::Connected {
            let properties = PropertyList::EMPTY;
            self.write(&Packet::Disconnect(Disconnect { reason: ReasonCode::Success, properties }), now, out);
        }
        self.phase = Phase::Closed;
    }

    /// Tells a 5.0 server why the connection ends, where that has a reason code; close the connection next.
    pub fn close(&mut self, error: ProtocolError, now: Instant, out: &mut Vec<u8>) {
        if self.phase == Phase::Connected && self.options.version.is_5() {
            let properties = [Property::ReasonString(error.what)];
            let disconnect = Disconnect { reason: error.reason, properties: properties.as_slice().into() };
            self.write(&Packet::Disconnect(disconnect), now, out);
        }
        self.phase = Phase::Closed;
    }

    /// When [`Client::check_deadline`] is due, unless packets come or go first.
    pub fn deadline(&self) -> Option<Instant> {
        let answer_timeout = self.options.answer_timeout;
        match self.phase {
            Phase::Idle | Phase::Closed => None,
            Phase::AwaitingConnack => Some(self.last_sent + answer_timeout),
            Phase::Connected => {
                let answer = self.requests.first().map(|&(.., asked_at)| asked_at + answer_timeout);
                let ping = match self.ping_sent {
                    Some(sent_at) => Some(sent_at + answer_timeout),
                    None if self.limits.keep_alive == 0 => None,
                    // Silence of either direction is broken: ours is due by the protocol, the server's would hide a
                    // dead link behind QoS 0 messages that are sent into it.
                    None => {
                        let since = self.last_sent.min(self.last_received);
                        Some(since + Duration::from_secs(self.limits.keep_alive.into()))
                    }
                };
                [answer, ping].into_iter().flatten().min()
            }
        }
    }

    /// Sends a PINGREQ if it is time, and checks that the server answers.
    ///
    /// # Errors
    /// The server is silent; close the connection.
    pub fn check_deadline(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return Ok(());
        }
        let late = |asked_at: Instant| now >= asked_at + self.options.answer_timeout;
        let silent = |what| Err(ProtocolError::with(ReasonCode::KeepAliveTimeout, what));
        if self.phase == Phase::AwaitingConnack {
            return silent("the server did not answer the CONNECT in time");
        }
        if self.requests.first().is_some_and(|&(.., asked_at)| late(asked_at)) {
            return silent("the server did not answer a SUBSCRIBE or UNSUBSCRIBE in time");
        }
        if self.ping_sent.is_some() {
            return silent("the server did not answer a PINGREQ in time");
        }
        self.ping(now, out);
        Ok(())
    }

    fn write(&mut self, packet: &Packet<'_>, now: Instant, out: &mut Vec<u8>) {
        self.last_sent = now;
        // What the server's maximum packet size forbids is left out [MQTT-3.2.2-15].
        let _ = packet.encode(self.options.version, self.outbound.max_packet_size, out);
    }
}

/// What the server says beside a reason code: where else to go, or else why.
fn detail<'a>(properties: &PropertyList<'a>) -> Option<&'a str> {
    let reference = properties.iter().find_map(|property| match property {
        Property::ServerReference(reference) => Some(reference),
        _ => None,
    });
    reference.or_else(|| properties.reason_string())
}

fn seconds(duration: Duration) -> u32 {
    duration.as_secs().try_into().unwrap_or(u32::MAX)
}
