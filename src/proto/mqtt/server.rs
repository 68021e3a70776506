//! The life of one connection as a server (MQTT 5.0 §3, §4; MQTT 3.1.1 §3, §4).
//!
//! The shell feeds decoded packets to [`Server::handle`] and acts on the [`Event`]s: it asks the hub, and answers
//! with [`Server::accept`], [`Server::acknowledge`], [`Server::publish`] and their kin, which append to the shell's
//! output buffer. Sessions, packet identifiers in flight and access are the hub's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::flow::{AckKind, AckState, Acks, Inbound, Outbound};
use super::packet::{Ack, Connack, Connect, Disconnect, Packet, Publish, Suback, Subscribe, Unsuback, Unsubscribe};
use super::property::{Property, PropertyList};
use super::{
    Body, EncodeError, LastWill, MAX_PACKET_BYTES, PacketId, ProtocolError, PublishHead, ReasonCode, Version,
    connect_version, decode,
};
use crate::message::QoS;
use crate::via::{self, GatewayId, Introduction};

pub use super::request::{ConnectRequest, Expiry, Will};

/// What the server allows; shared by the connections of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Of inbound packets, in bytes.
    pub max_packet_size: u32,
    /// How many inbound PUBLISH packets of QoS 1 and 2 may be unacknowledged; at least 1.
    pub receive_maximum: u16,
    /// How many topic aliases a client may set.
    pub topic_alias_maximum: u16,
    /// How long a peer may take to send its CONNECT.
    pub connect_timeout: Duration,
    /// The longest keep alive, in seconds; 5.0 clients that ask for more or for none are given this one.
    pub max_keep_alive: Option<u16>,
    /// Whether a payload that is said to be UTF-8 has to be (MQTT 5.0 §3.3.2.3.2, §3.1.3.2.3).
    pub check_payload_format: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_packet_size: 1024 * 1024,
            receive_maximum: 1024,
            topic_alias_maximum: 10,
            connect_timeout: Duration::from_secs(10),
            max_keep_alive: None,
            check_payload_format: false,
        }
    }
}

/// A peer that is not yet known may send a CONNECT of this many bytes at most: a will, a user name and a password of
/// some size fit, and many strangers cannot fill the memory.
const MAX_CONNECT_BYTES: u32 = 128 * 1024;

/// One connection. `R` is what an acknowledgement waits for.
#[derive(Debug)]
pub struct Server<R> {
    settings: Arc<Settings>,
    phase: Phase,
    version: Version,
    is_bridge: bool,
    /// One and a half times what was agreed; zero is no supervision.
    silence_limit: Duration,
    requested_keep_alive: u16,
    /// When the last packet came, or the connection was opened.
    last_input: Instant,
    /// As of the CONNECT, in seconds.
    session_expiry: u32,
    inbound: Inbound<R>,
    outbound: Outbound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    AwaitingConnect,
    /// The CONNECT is with the shell.
    Deciding,
    Connected,
    Closed,
}

/// What a packet asks of the shell.
#[derive(Debug)]
pub enum Event<'a> {
    /// Nothing; an answer may have been written.
    None,
    /// Decide with [`Server::accept`] or [`Server::refuse`] before anything else is decoded.
    Connect(Box<ConnectRequest>),
    /// Route it; for QoS 1 and 2 answer with [`Server::acknowledge`]. The topic is never empty.
    Publish(Publish<'a>),
    /// A PUBLISH whose payload is not what it is said to be; answered where an answer is due. Count it.
    PayloadFormatInvalid,
    /// The receiver has an outbound message of ours (PUBACK), or refuses it (PUBACK or PUBREC with an error).
    Acknowledged(PacketId, ReasonCode),
    /// PUBREC: [`Server::release`] is next, once that is safe.
    Received(PacketId),
    /// PUBCOMP.
    Completed(PacketId),
    /// PUBREL: answer with [`Server::acknowledge`] and [`AckKind::Pubcomp`].
    Release(PacketId),
    /// Answer with [`Server::suback`].
    Subscribe(Subscribe<'a>),
    /// Answer with [`Server::unsuback`].
    Unsubscribe(Unsubscribe<'a>),
    /// The client leaves; close the connection. `expiry` replaces the session's expiry.
    Disconnect { publish_will: bool, expiry: Option<Expiry> },
}

/// What a CONNACK tells a client beside yes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accept<'a> {
    pub session_present: bool,
    /// For a client that left the choice to us.
    pub assigned_client_id: Option<&'a str>,
    /// Where it is not what the client asked for.
    pub expiry: Option<Expiry>,
    /// Which gateway we are, for a client that has said which one it is.
    pub gateway: Option<GatewayId>,
}

impl<R> Server<R> {
    /// A connection that has just been opened.
    pub fn new(settings: Arc<Settings>, now: Instant) -> Self {
        let inbound = Inbound::new(settings.receive_maximum, settings.topic_alias_maximum);
        Self {
            settings,
            phase: Phase::AwaitingConnect,
            version: Version::V3_1_1,
            is_bridge: false,
            silence_limit: Duration::ZERO,
            requested_keep_alive: 0,
            last_input: now,
            session_expiry: 0,
            inbound,
            outbound: Outbound::new(MAX_PACKET_BYTES, 0),
        }
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// See [`Connect::is_bridge`].
    pub fn is_bridge(&self) -> bool {
        self.is_bridge
    }

    pub fn is_connected(&self) -> bool {
        self.phase == Phase::Connected
    }

    /// What inbound packets are decoded with: version and maximum packet size.
    pub fn limits(&self) -> (Version, u32) {
        let max_packet_size = self.settings.max_packet_size;
        let unknown = self.phase == Phase::AwaitingConnect;
        (self.version, if unknown { max_packet_size.min(MAX_CONNECT_BYTES) } else { max_packet_size })
    }

    /// Takes one packet off the front of `bytes`, as [`decode`] does.
    ///
    /// # Errors
    /// As [`decode`]; also for anything but a CONNECT at the beginning, before all of it is there.
    #[inline]
    pub fn decode<'b>(&self, bytes: &'b [u8]) -> Result<Option<(Packet<'b>, usize)>, ProtocolError> {
        let (version, max_packet_size) = self.limits();
        // [MQTT-3.1.0-1]
        if self.phase == Phase::AwaitingConnect && bytes.first().is_some_and(|&first| first != 0x10) {
            return Err(ProtocolError::protocol("the first packet is not a CONNECT"));
        }
        decode(bytes, version, max_packet_size)
    }

    /// Notes that packets came; the keep alive counts from here.
    pub fn note_input(&mut self, now: Instant) {
        self.last_input = now;
    }

    /// When [`Server::check_deadline`] is due, unless packets come first.
    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::AwaitingConnect | Phase::Deciding => Some(self.last_input + self.settings.connect_timeout),
            Phase::Connected if !self.silence_limit.is_zero() => Some(self.last_input + self.silence_limit),
            Phase::Connected | Phase::Closed => None,
        }
    }

    /// Checks that the peer has not been silent for too long.
    ///
    /// # Errors
    /// It has (MQTT 5.0 §3.1.2.10); close the connection.
    pub fn check_deadline(&self, now: Instant) -> Result<(), ProtocolError> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return Ok(());
        }
        let what = match self.phase {
            Phase::Connected => "nothing came for one and a half times the keep alive",
            _ => "no CONNECT came in time",
        };
        Err(ProtocolError::with(ReasonCode::KeepAliveTimeout, what))
    }

    /// Takes one packet of the client.
    ///
    /// # Errors
    /// The client broke a rule: hand the error to [`Server::close`] and close the connection.
    pub fn handle<'a>(&'a mut self, packet: Packet<'a>, out: &mut Vec<u8>) -> Result<Event<'a>, ProtocolError> {
        if self.phase != Phase::Connected {
            return match packet {
                Packet::Connect(connect) if self.phase == Phase::AwaitingConnect => self.handle_connect(&connect),
                _ => Err(ProtocolError::protocol("the first packet is not a CONNECT")),
            };
        }
        Ok(match packet {
            Packet::Publish(publish) => {
                // [MQTT-3.3.4-6]
                let is_identifier = |property| matches!(property, Property::SubscriptionIdentifier(_));
                if publish.properties.iter().any(is_identifier) {
                    return Err(ProtocolError::protocol("a PUBLISH of a client has a subscription identifier"));
                }
                if self.settings.check_payload_format && !is_as_told(&publish.properties, publish.payload) {
                    return self.refuse_payload(publish, out);
                }
                Event::Publish(self.inbound.accept(publish, self.version)?)
            }
            Packet::Puback(ack) => Event::Acknowledged(ack.packet_id, ack.reason),
            Packet::Pubrec(ack) if ack.reason.is_error() => Event::Acknowledged(ack.packet_id, ack.reason),
            Packet::Pubrec(ack) => Event::Received(ack.packet_id),
            Packet::Pubrel(ack) => Event::Release(ack.packet_id),
            Packet::Pubcomp(ack) => Event::Completed(ack.packet_id),
            Packet::Subscribe(subscribe) => Event::Subscribe(subscribe),
            Packet::Unsubscribe(unsubscribe) => Event::Unsubscribe(unsubscribe),
            Packet::Pingreq => {
                self.write(&Packet::Pingresp, out);
                Event::None
            }
            Packet::Disconnect(disconnect) => self.handle_disconnect(&disconnect)?,
            // [MQTT-3.1.0-2]
            Packet::Connect(_) => return Err(ProtocolError::protocol("a second CONNECT")),
            // [MQTT-4.12.0-7]: no authentication method was agreed on.
            Packet::Auth(_) => return Err(ProtocolError::protocol("an AUTH without an authentication method")),
            Packet::Connack(_) | Packet::Suback(_) | Packet::Unsuback(_) | Packet::Pingresp => {
                return Err(ProtocolError::protocol("a packet that only a server may send"));
            }
        })
    }

    /// MQTT 5.0 §3.1.4.
    fn handle_connect(&mut self, connect: &Connect<'_>) -> Result<Event<'static>, ProtocolError> {
        self.version = connect.version;
        self.is_bridge = connect.is_bridge;
        self.phase = Phase::Deciding;
        self.requested_keep_alive = connect.keep_alive;
        let mut receive_maximum = u16::MAX;
        let mut max_packet_size = MAX_PACKET_BYTES;
        let mut topic_alias_maximum = 0;
        let (mut has_method, mut has_data) = (false, false);
        let mut gateway = None;
        for property in connect.properties.iter() {
            match property {
                Property::SessionExpiryInterval(seconds) => self.session_expiry = seconds,
                Property::ReceiveMaximum(maximum) => receive_maximum = maximum.get(),
                Property::MaximumPacketSize(size) => max_packet_size = size.get(),
                Property::TopicAliasMaximum(maximum) => topic_alias_maximum = maximum,
                Property::AuthenticationMethod(_) => has_method = true,
                Property::AuthenticationData(_) => has_data = true,
                Property::UserProperty(via::ID, id) => gateway = Introduction::parse(id),
                _ => {}
            }
        }
        self.outbound = Outbound::new(max_packet_size, topic_alias_maximum);
        if has_method {
            let what = "enhanced authentication is not supported; connect with user name and password";
            return Err(ProtocolError::with(ReasonCode::BadAuthenticationMethod, what));
        }
        if has_data {
            return Err(ProtocolError::protocol("a CONNECT has authentication data but no method"));
        }
        // MQTT 3.1.1 [MQTT-3.1.3-8]; in 3.1 an identifier is 1 to 23 characters, of which we only demand the first.
        let must_be_named = match connect.version {
            Version::V3_1 => true,
            Version::V3_1_1 => !connect.clean_start,
            Version::V5 => false,
        };
        if connect.client_id.is_empty() && must_be_named {
            let what = "an empty client identifier needs a clean session";
            return Err(ProtocolError::with(ReasonCode::ClientIdentifierNotValid, what));
        }
        let told = |will: &LastWill<'_>| is_as_told(&will.properties, will.payload);
        if self.settings.check_payload_format && !connect.will.as_ref().is_none_or(told) {
            let what = "the payload of the will is not UTF-8, as it says";
            return Err(ProtocolError::with(ReasonCode::PayloadFormatInvalid, what));
        }
        // 3.x has no expiry: a session that is not clean is kept.
        let expiry = match (self.version.is_5(), connect.clean_start) {
            (true, _) => Expiry::from_seconds(self.session_expiry),
            (false, true) => Expiry::AtOnce,
            (false, false) => Expiry::Never,
        };
        Ok(Event::Connect(Box::new(ConnectRequest {
            version: connect.version,
            is_bridge: connect.is_bridge,
            client_id: connect.client_id.into(),
            clean_start: connect.clean_start,
            expiry,
            receive_maximum,
            keep_alive: connect.keep_alive,
            will: connect.will.as_ref().and_then(Will::of),
            user_name: connect.user_name.map(Into::into),
            password: connect.password.map(Into::into),
            gateway,
        })))
    }

    /// At QoS 0 nobody waits for an answer. What the packet says about a topic alias holds all the same.
    fn refuse_payload(&mut self, publish: Publish<'_>, out: &mut Vec<u8>) -> Result<Event<'static>, ProtocolError> {
        self.inbound.accept(publish, self.version)?;
        let kind = if publish.qos == QoS::ExactlyOnce { AckKind::Pubrec } else { AckKind::Puback };
        if let Some(packet_id) = publish.packet_id {
            self.acknowledge(kind, packet_id, ReasonCode::PayloadFormatInvalid, None, out);
        }
        Ok(Event::PayloadFormatInvalid)
    }

    /// MQTT 5.0 §3.14.
    fn handle_disconnect(&mut self, disconnect: &Disconnect<'_>) -> Result<Event<'static>, ProtocolError> {
        let expiry = disconnect.properties.iter().find_map(|property| match property {
            Property::SessionExpiryInterval(seconds) => Some(seconds),
            _ => None,
        });
        // MQTT 5.0 §3.14.2.2.2
        if self.session_expiry == 0 && expiry.is_some_and(|seconds| seconds != 0) {
            return Err(ProtocolError::protocol("a DISCONNECT gives a session an expiry that had none"));
        }
        self.phase = Phase::Closed;
        // [MQTT-3.14.4-3]
        let publish_will = disconnect.reason != ReasonCode::Success;
        Ok(Event::Disconnect { publish_will, expiry: expiry.map(Expiry::from_seconds) })
    }

    /// Answers the CONNECT with yes. The keep alive counts from `now`.
    ///
    /// # Errors
    /// The client takes no packet as large as the answer: hand the error to [`Server::close`] and close the connection.
    pub fn accept(&mut self, accept: &Accept<'_>, now: Instant, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let asked = self.requested_keep_alive;
        let given = self.settings.max_keep_alive.filter(|&max| self.version.is_5() && (asked == 0 || asked > max));
        // [MQTT-3.1.2-22]
        self.silence_limit = Duration::from_secs(given.unwrap_or(asked).into()) * 3 / 2;
        if let Some(expiry) = accept.expiry {
            self.session_expiry = expiry.seconds();
        }
        let settings = &self.settings;
        let properties = [
            accept.expiry.map(|expiry| Property::SessionExpiryInterval(expiry.seconds())),
            settings.receive_maximum.try_into().ok().map(Property::ReceiveMaximum),
            settings.max_packet_size.try_into().ok().map(Property::MaximumPacketSize),
            accept.assigned_client_id.map(Property::AssignedClientIdentifier),
            (settings.topic_alias_maximum > 0).then_some(Property::TopicAliasMaximum(settings.topic_alias_maximum)),
            given.map(Property::ServerKeepAlive),
            accept.gateway.as_ref().map(|id| Property::UserProperty(via::ID, id.as_str())),
        ];
        let properties: Vec<_> = properties.into_iter().flatten().collect();
        // [MQTT-3.2.2-1], [MQTT-3.2.2-2]; 3.1 has no session present flag.
        let session_present = accept.session_present && self.version != Version::V3_1;
        let connack =
            Connack { session_present, reason: ReasonCode::Success, properties: properties.as_slice().into() };
        let what = "the client takes no packet as large as its CONNACK";
        let too_large = |_| ProtocolError::with(ReasonCode::PacketTooLarge, what);
        Packet::Connack(connack).encode(self.version, self.outbound.max_packet_size, out).map_err(too_large)?;
        self.phase = Phase::Connected;
        self.last_input = now;
        Ok(())
    }

    /// Answers the CONNECT with no; close the connection next. `what` is told to 5.0 clients.
    pub fn refuse(&mut self, reason: ReasonCode, what: &str, out: &mut Vec<u8>) {
        self.refuse_with(reason, &[Property::ReasonString(what)], out);
    }

    /// Answers the CONNECT with [`ReasonCode::UseAnotherServer`] or [`ReasonCode::ServerMoved`]: 5.0 clients are told
    /// which (MQTT 5.0 §4.11).
    pub fn redirect(&mut self, reason: ReasonCode, server: &str, out: &mut Vec<u8>) {
        self.refuse_with(reason, &[Property::ServerReference(server)], out);
    }

    fn refuse_with(&mut self, reason: ReasonCode, properties: &[Property<'_>], out: &mut Vec<u8>) {
        self.phase = Phase::Closed;
        self.write_explained(properties, out, |properties| {
            Packet::Connack(Connack { session_present: false, reason, properties })
        });
    }

    /// Says why the connection ends, where the version has words for it; close the connection next.
    ///
    /// `unread` is what has come but was not decoded: a CONNECT in there, however malformed, is refused in its own
    /// version.
    pub fn close(&mut self, error: ProtocolError, unread: &[u8], out: &mut Vec<u8>) {
        match self.phase {
            Phase::Closed => {}
            Phase::AwaitingConnect => {
                let Some(version) = connect_version(unread) else {
                    self.phase = Phase::Closed;
                    return;
                };
                self.version = version;
                // A malformed 3.x CONNECT has no return code and is only closed on.
                if version.is_5() || error.reason == ReasonCode::UnsupportedProtocolVersion {
                    self.refuse(error.reason, error.what, out);
                }
                self.phase = Phase::Closed;
            }
            Phase::Deciding => self.refuse(error.reason, error.what, out),
            Phase::Connected => {
                self.phase = Phase::Closed;
                if self.version.is_5() {
                    let properties = [Property::ReasonString(error.what)];
                    self.write_explained(&properties, out, |properties| {
                        Packet::Disconnect(Disconnect { reason: error.reason, properties })
                    });
                }
            }
        }
    }

    /// Answers a PUBLISH or PUBREL of packet identifier `packet_id`: now, or once `receipt` is done and its turn has
    /// come (see [`Server::flush_acks`]). A PUBREC or PUBACK with an error is not for 3.x, which cannot say it.
    pub fn acknowledge(
        &mut self,
        kind: AckKind,
        packet_id: PacketId,
        reason: ReasonCode,
        receipt: Option<R>,
        out: &mut Vec<u8>,
    ) {
        self.inbound.acknowledge(kind, packet_id, reason, receipt, self.version, out);
    }

    /// Writes the acknowledgements whose turn has come; `state` tells of a receipt, `failed` is told of packets whose
    /// receipt has failed: a QoS 2 identifier among them must be forgotten, for the peer's next try is a new message.
    ///
    /// # Errors
    /// A receipt has failed, and the client's version has no word for it: hand the error to [`Server::close`] and
    /// close the connection.
    pub fn flush_acks(
        &mut self,
        state: impl FnMut(&R) -> AckState,
        failed: impl FnMut(AckKind, PacketId),
        out: &mut Vec<u8>,
    ) -> Result<(), ProtocolError> {
        self.inbound.flush(state, failed, self.version, out)
    }

    /// The acknowledgements that wait.
    pub fn acks(&self) -> &Acks<R> {
        &self.inbound.acks
    }

    /// Whether so many acknowledgements wait that nothing more should be read: a 3.x client knows no receive maximum.
    pub fn is_behind(&self) -> bool {
        self.inbound.acks.len() >= self.inbound.receive_maximum.into()
    }

    /// Sends a message, with a topic alias where the client takes one. See [`encode_publish`](super::encode_publish).
    ///
    /// # Errors
    /// [`EncodeError::PacketTooLarge`]: the client does not take it; act as if it had [MQTT-3.1.2-25].
    #[inline]
    pub fn publish(
        &mut self,
        publish: &PublishHead<'_>,
        leave_out_from: usize,
        out: &mut Vec<u8>,
    ) -> Result<Body, EncodeError> {
        self.outbound.publish(publish, self.version, leave_out_from, out)
    }

    /// Sends a PUBREL; `reason` is success, or "packet identifier not found" for a PUBREC that answers nothing.
    pub fn release(&mut self, packet_id: PacketId, reason: ReasonCode, out: &mut Vec<u8>) {
        self.write(&Packet::Pubrel(Ack::new(packet_id, reason)), out);
    }

    /// Answers a SUBSCRIBE, one reason code per entry, once all of `receipts` are done and its turn has come. 3.x
    /// clients see every error as 0x80.
    pub fn suback(&mut self, packet_id: PacketId, reasons: &[ReasonCode], receipts: Vec<R>, out: &mut Vec<u8>) {
        let reasons: Vec<u8> = reasons.iter().map(|reason| reason.value()).collect();
        let mut packet = Vec::new();
        let suback = Suback { packet_id, properties: PropertyList::EMPTY, reasons: &reasons };
        self.write(&Packet::Suback(suback), &mut packet);
        self.inbound.answer(&packet, receipts, out);
    }

    /// Answers an UNSUBSCRIBE, one reason code per filter.
    pub fn unsuback(&mut self, packet_id: PacketId, reasons: &[ReasonCode], out: &mut Vec<u8>) {
        let reasons: Vec<u8> = reasons.iter().map(|reason| reason.value()).collect();
        self.write(&Packet::Unsuback(Unsuback { packet_id, properties: PropertyList::EMPTY, reasons: &reasons }), out);
    }

    fn write(&self, packet: &Packet<'_>, out: &mut Vec<u8>) {
        // What the client's maximum packet size forbids is left out [MQTT-3.1.2-24].
        let _ = packet.encode(self.version, self.outbound.max_packet_size, out);
    }

    /// Writes a packet with `properties`, or without where they make it too large [MQTT-3.2.2-19], [MQTT-3.14.2-3].
    fn write_explained<'a>(
        &self,
        properties: &'a [Property<'a>],
        out: &mut Vec<u8>,
        packet: impl Fn(PropertyList<'a>) -> Packet<'a>,
    ) {
        if packet(properties.into()).encode(self.version, self.outbound.max_packet_size, out).is_err() {
            self.write(&packet(PropertyList::EMPTY), out);
        }
    }
}

/// Whether a payload that is said to be UTF-8 is. It may hold U+0000, unlike a string of MQTT.
fn is_as_told(properties: &PropertyList<'_>, payload: &[u8]) -> bool {
    let says_utf8 = properties.iter().any(|property| property == Property::PayloadFormatIndicator(true));
    !says_utf8 || str::from_utf8(payload).is_ok()
}
