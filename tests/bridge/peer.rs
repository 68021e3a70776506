//! A scripted MQTT server: it says what the test says, byte by byte if need be, on a port of the system's choice.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use fieldgate::bridge::url::{Scheme, Url};
use fieldgate::message::{Properties, QoS};
use fieldgate::proto::mqtt::{
    Ack, Connack, MAX_PACKET_BYTES, Packet, Property, PublishHead, ReasonCode, Suback, Version, decode, encode_publish,
};
use fieldgate::via;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Far more than anything here takes, for a machine under load.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Peer {
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What a TLS client asked for and showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    pub server_name: Option<String>,
    pub alpn: Option<String>,
    /// The client's certificate, in DER.
    pub certificate: Option<Vec<u8>>,
}

/// One accepted connection.
pub struct Connection {
    pub shown: Option<Shown>,
    stream: Box<dyn Stream>,
    input: BytesMut,
    version: Version,
    /// Whether the question of a 3.1.1 bridge which gateway this is goes without an answer, as with a plain broker.
    pub is_plain: bool,
}

/// A packet of the gateway, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum Got {
    Connect {
        version: Version,
        is_bridge: bool,
        clean_start: bool,
        client_id: String,
        user: Option<String>,
        password: Option<String>,
        will: Option<Will>,
    },
    Publish(Publish),
    Puback(u16, ReasonCode),
    Pubrec(u16, ReasonCode),
    Pubrel(u16),
    Pubcomp(u16),
    Subscribe(u16, Vec<(String, QoS, bool)>),
    Ping,
    Disconnect(ReasonCode),
    Closed,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    pub topic: String,
    pub payload: String,
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    pub id: u16,
    /// Message expiry interval, in seconds.
    pub expiry: Option<u32>,
    pub user_properties: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Will {
    pub topic: String,
    pub payload: String,
    pub qos: u8,
    pub retain: bool,
}

impl Peer {
    pub async fn bind() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap(), tls: None }
    }

    pub async fn bind_tls(config: Arc<rustls::ServerConfig>) -> Self {
        Self { tls: Some(config), ..Self::bind().await }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub fn url(&self) -> Url {
        let scheme = if self.tls.is_some() { Scheme::Tls } else { Scheme::Tcp };
        Url { scheme, host: "127.0.0.1".into(), port: self.address().port(), path: String::new() }
    }

    /// The next connection; it has said nothing yet.
    pub async fn accept(&self) -> Connection {
        self.try_accept().await.unwrap()
    }

    /// The next connection, if it comes within `patience`.
    pub async fn accept_within(&self, patience: Duration) -> Option<Connection> {
        timeout(patience, self.try_accept()).await.ok().map(Result::unwrap)
    }

    /// The next connection, unless its TLS handshake fails.
    pub async fn try_accept(&self) -> std::io::Result<Connection> {
        let accept = async {
            let (stream, _) = self.listener.accept().await?;
            let mut shown = None;
            let stream: Box<dyn Stream> = match &self.tls {
                None => Box::new(stream),
                Some(config) => {
                    let stream = TlsAcceptor::from(config.clone()).accept(stream).await?;
                    let tls = stream.get_ref().1;
                    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                    shown = Some(Shown {
                        server_name: tls.server_name().map(Into::into),
                        alpn: tls.alpn_protocol().map(text),
                        certificate: tls.peer_certificates().and_then(|chain| Some(chain.first()?.to_vec())),
                    });
                    Box::new(stream)
                }
            };
            Ok(Connection { shown, stream, input: BytesMut::new(), version: Version::V5, is_plain: true })
        };
        timeout(PATIENCE, accept).await.expect("a connection")
    }

    /// The next connection, its CONNECT taken with `properties`.
    pub async fn welcome(&self, session_present: bool, properties: &[Property<'_>]) -> Connection {
        let mut connection = self.accept().await;
        let Got::Connect { .. } = connection.next().await else { panic!("a CONNECT comes first") };
        connection.connack(session_present, ReasonCode::Success, properties).await;
        connection
    }
}

impl Connection {
    pub async fn connack(&mut self, session_present: bool, reason: ReasonCode, properties: &[Property<'_>]) {
        self.send(&Packet::Connack(Connack { session_present, reason, properties: properties.into() })).await;
    }

    pub async fn send(&mut self, packet: &Packet<'_>) {
        let mut bytes = Vec::new();
        packet.encode(self.version, MAX_PACKET_BYTES, &mut bytes).unwrap();
        self.send_bytes(&bytes).await;
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub async fn publish(&mut self, topic: &str, payload: &str, qos: QoS, id: u16) {
        self.publish_with(topic, payload, qos, id, &Properties::default()).await;
    }

    pub async fn publish_with(&mut self, topic: &str, payload: &str, qos: QoS, id: u16, properties: &Properties) {
        let head = PublishHead {
            topic,
            qos,
            retain: false,
            dup: false,
            packet_id: NonZeroU16::new(id),
            properties: Some(properties),
            identifiers: &[],
            expiry: None,
            topic_alias: None,
            payload: payload.as_bytes(),
        };
        let mut bytes = Vec::new();
        let _ = encode_publish(self.version, &head, MAX_PACKET_BYTES, usize::MAX, &mut bytes).unwrap();
        self.send_bytes(&bytes).await;
    }

    pub async fn puback(&mut self, id: u16, reason: ReasonCode) {
        self.send(&Packet::Puback(ack(id, reason))).await;
    }

    pub async fn pubrec(&mut self, id: u16) {
        self.send(&Packet::Pubrec(ack(id, ReasonCode::Success))).await;
    }

    pub async fn pubrel(&mut self, id: u16) {
        self.send(&Packet::Pubrel(ack(id, ReasonCode::Success))).await;
    }

    pub async fn pubcomp(&mut self, id: u16) {
        self.send(&Packet::Pubcomp(ack(id, ReasonCode::Success))).await;
    }

    pub async fn pingresp(&mut self) {
        self.send(&Packet::Pingresp).await;
    }

    /// The next packet; [`Got::Closed`] at the end.
    pub async fn next(&mut self) -> Got {
        timeout(PATIENCE, self.read()).await.expect("a packet")
    }

    /// The next packet if it comes within `patience`.
    pub async fn within(&mut self, patience: Duration) -> Option<Got> {
        timeout(patience, self.read()).await.ok()
    }

    /// The next PUBLISH; anything else is a fault of the gateway.
    pub async fn next_publish(&mut self) -> Publish {
        match self.next().await {
            Got::Publish(publish) => publish,
            other => panic!("a PUBLISH was expected, not {other:?}"),
        }
    }

    /// Takes the SUBSCRIBE that comes next and grants all of it.
    pub async fn grant(&mut self) -> Vec<(String, QoS, bool)> {
        let Got::Subscribe(id, filters) = self.next().await else { panic!("a SUBSCRIBE was expected") };
        self.suback(id, &filters).await;
        filters
    }

    /// Grants all of `filters`.
    pub async fn suback(&mut self, id: u16, filters: &[(String, QoS, bool)]) {
        let reasons: Vec<u8> = filters.iter().map(|(_, qos, _)| qos.level()).collect();
        let packet_id = NonZeroU16::new(id).unwrap();
        self.send(&Packet::Suback(Suback { packet_id, properties: (&[][..]).into(), reasons: &reasons })).await;
    }

    async fn read(&mut self) -> Got {
        loop {
            let got = self.read_any().await;
            match &got {
                Got::Subscribe(id, filters) if self.is_plain && filters[0].0 == via::ID_TOPIC => {
                    self.suback(*id, filters).await;
                }
                _ => return got,
            }
        }
    }

    async fn read_any(&mut self) -> Got {
        loop {
            if self.input.first() == Some(&0x10) && self.input.len() > 8 {
                // A CONNECT says its version itself.
                self.version = if self.input[..10].contains(&5) { Version::V5 } else { Version::V3_1_1 };
            }
            if let Some((packet, used)) = decode(&self.input, self.version, MAX_PACKET_BYTES).unwrap() {
                let got = Got::of(packet);
                self.input.advance(used);
                return got;
            }
            match self.stream.read_buf(&mut self.input).await {
                Ok(0) | Err(_) => return Got::Closed,
                Ok(_) => {}
            }
        }
    }
}

impl Got {
    fn of(packet: Packet<'_>) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        match packet {
            Packet::Connect(connect) => Self::Connect {
                version: connect.version,
                is_bridge: connect.is_bridge,
                clean_start: connect.clean_start,
                client_id: connect.client_id.into(),
                user: connect.user_name.map(Into::into),
                password: connect.password.map(text),
                will: connect.will.map(|will| Will {
                    topic: will.topic.into(),
                    payload: text(will.payload),
                    qos: will.qos.level(),
                    retain: will.retain,
                }),
            },
            Packet::Publish(publish) => Self::Publish(Publish {
                topic: publish.topic.into(),
                payload: text(publish.payload),
                qos: publish.qos.level(),
                retain: publish.retain,
                dup: publish.dup,
                id: publish.packet_id.map_or(0, NonZeroU16::get),
                expiry: publish.properties.iter().find_map(|property| match property {
                    Property::MessageExpiryInterval(seconds) => Some(seconds),
                    _ => None,
                }),
                user_properties: publish
                    .properties
                    .iter()
                    .filter_map(|property| match property {
                        Property::UserProperty(name, value) => Some((name.into(), value.into())),
                        _ => None,
                    })
                    .collect(),
            }),
            Packet::Puback(ack) => Self::Puback(ack.packet_id.get(), ack.reason),
            Packet::Pubrec(ack) => Self::Pubrec(ack.packet_id.get(), ack.reason),
            Packet::Pubrel(ack) => Self::Pubrel(ack.packet_id.get()),
            Packet::Pubcomp(ack) => Self::Pubcomp(ack.packet_id.get()),
            Packet::Subscribe(subscribe) => Self::Subscribe(
                subscribe.packet_id.get(),
                subscribe
                    .subscriptions
                    .iter()
                    .map(|entry| (entry.filter.into(), entry.options.qos, entry.options.no_local))
                    .collect(),
            ),
            Packet::Pingreq => Self::Ping,
            Packet::Disconnect(disconnect) => Self::Disconnect(disconnect.reason),
            other => panic!("a client does not send {other:?}"),
        }
    }
}

fn ack(id: u16, reason: ReasonCode) -> Ack<'static> {
    Ack::new(NonZeroU16::new(id).unwrap(), reason)
}
