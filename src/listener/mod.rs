//! MQTT over TCP, TLS, WebSocket and Unix sockets: the clients' way to the hub (MQTT 5.0 §4.2, §6).
//!
//! One task per connection reads and writes; what its packets mean is in `proto::mqtt::server`, what becomes of its
//! messages in `hub`. Made for many idle connections and for bursts: buffers belong to threads, not to connections, and
//! everything that was read at once is routed at once.

mod accept;
mod connection;
mod counters;
mod events;
mod login;
mod output;
mod proxy;
mod stream;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{Notify, Semaphore, watch};

use crate::hub::Hub;
use crate::hub::access::Anonymous;
use crate::observe::Observe;
use crate::proto::mqtt::{ReasonCode, server};
use crate::tls::{ServerSettings, ServerTls, TlsError};
use crate::via::GatewayId;
use accept::Socket;
use counters::Counters;

pub use proxy::Proxies;

/// How a listener is set up.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// As in the configuration; unique among listeners.
    pub name: String,
    pub address: Address,
    pub transport: Transport,
    /// Clients come through proxies that say where they are (PROXY protocol); `None`: they come by themselves.
    pub proxies: Option<Proxies>,
    /// `None` for no TLS.
    pub tls: Option<ServerSettings>,
    /// The user name is what the client's certificate says, whatever the CONNECT says; without one no client is let in.
    pub certificate_user: Option<CertificateUser>,
    /// Who may stay anonymous on this listener, where that differs from the rules for all.
    pub anonymous: Option<Anonymous>,
    /// Connections at a time; more are closed as soon as they are accepted.
    pub max_connections: usize,
    /// What one connection may do, and how long it may take to send its CONNECT, the TLS handshake included.
    pub limits: server::Settings,
    /// Where else clients may go.
    pub redirect: Option<Redirect>,
}

impl Settings {
    /// MQTT over TCP without TLS, with default limits.
    pub fn new(name: impl Into<String>, address: SocketAddr) -> Self {
        Self {
            name: name.into(),
            address: Address::Tcp(address),
            transport: Transport::Mqtt,
            proxies: None,
            tls: None,
            certificate_user: None,
            anonymous: None,
            max_connections: 10_000,
            limits: server::Settings::default(),
            redirect: None,
        }
    }
}

/// Another server for the clients of a listener (MQTT 5.0 §4.11). Whoever connects is told, before it has logged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// A server reference: host and port.
    pub server: Box<str>,
    pub whom: Redirected,
}

/// Whom a listener sends to another server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirected {
    /// Those who come when the limit of connections is reached, for now (0x9C).
    Excess,
    /// Everybody, for ever (0x9D).
    Everybody,
}

impl Redirected {
    fn reason(self) -> ReasonCode {
        match self {
            Self::Excess => ReasonCode::UseAnotherServer,
            Self::Everybody => ReasonCode::ServerMoved,
        }
    }
}

/// What of a client's certificate is its user name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateUser {
    CommonName,
    /// The whole subject, as in `CN=pump-1,O=Works`.
    Subject,
}

/// Where a listener listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    /// The path of a Unix socket, which is made by [`Listener::bind`] and removed at the end.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// What lies between the socket and MQTT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Mqtt,
    /// MQTT in binary frames, subprotocol `mqtt` (MQTT 5.0 §6).
    WebSocket,
}

/// Why a listener cannot listen. Which one and where, its owner knows.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("it cannot listen{hint}")]
    Socket { hint: &'static str, source: io::Error },
    #[error("it cannot use its certificates")]
    Tls(#[from] TlsError),
}

/// A listener that is bound and not yet running.
pub struct Listener {
    socket: Socket,
    shared: Arc<Shared>,
}

/// What the connections of a listener have in common.
struct Shared {
    name: String,
    address: Address,
    transport: Transport,
    proxies: Option<Proxies>,
    hub: Hub,
    /// Which gateway we are.
    gateway: GatewayId,
    limits: Arc<server::Settings>,
    max_connections: usize,
    certificate_user: Option<CertificateUser>,
    anonymous: Option<Anonymous>,
    redirect: Option<Redirect>,
    tls: Option<ServerTls>,
    counters: Counters,
    /// Checking a password takes much memory and time (argon2): only so many at once.
    logins: Arc<Semaphore>,
    stopping: AtomicBool,
    stop: Arc<Notify>,
}

/// How many passwords are checked at the same time: 19 MiB each.
const MAX_LOGINS_AT_A_TIME: usize = 2;

/// How long connections may take to say goodbye when the listener stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

impl Listener {
    /// Opens the socket and reads the certificates; accepts nothing yet.
    ///
    /// # Errors
    /// [`BindError`] names the address or file and what to do.
    pub async fn bind(settings: Settings, hub: Hub) -> Result<Self, BindError> {
        let Settings {
            name,
            address,
            transport,
            proxies,
            tls,
            certificate_user,
            anonymous,
            max_connections,
            limits,
            redirect,
        } = settings;
        let tls = tls.map(ServerTls::open).transpose()?;
        let socket = match Socket::bind(&address) {
            Ok(socket) => socket,
            Err(source) => {
                let hint = match source.kind() {
                    io::ErrorKind::AddrInUse => "; another program has the address: stop that, or choose another port",
                    io::ErrorKind::AddrNotAvailable => "; this machine has no such address",
                    io::ErrorKind::PermissionDenied => {
                        "; ports below 1024 and other users' directories need a privilege"
                    }
                    _ => "",
                };
                return Err(BindError::Socket { hint, source });
            }
        };
        // With port 0 the system has chosen one.
        let address = socket.local_address().unwrap_or(address);
        let shared = Arc::new(Shared {
            counters: Counters::new(hub.clock().now(), hub.traffic()),
            name,
            address,
            transport,
            proxies,
            gateway: GatewayId::of_boot(hub.clock().boot_id()),
            hub,
            limits: Arc::new(limits),
            max_connections,
            certificate_user,
            anonymous,
            redirect,
            tls,
            logins: Arc::new(Semaphore::new(MAX_LOGINS_AT_A_TIME)),
            stopping: AtomicBool::new(false),
            stop: Arc::default(),
        });
        Ok(Self { socket, shared })
    }

    /// Where it listens, with the port the system chose where 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.shared.address
    }

    /// The TCP address it listens on; `None` for a Unix socket.
    pub fn local_address(&self) -> Option<SocketAddr> {
        match self.shared.address {
            Address::Tcp(address) => Some(address),
            Address::Unix(_) => None,
        }
    }

    pub fn observe(&self) -> Arc<dyn Observe> {
        self.shared.clone()
    }

    /// What reads the certificates again, at once, for connections that are yet to come.
    pub fn certificates(&self) -> impl Fn() + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || {
            if let Some(tls) = &shared.tls {
                tls.refresh_and_log(&shared.name);
            }
        }
    }

    /// Serves until `shutdown` holds true, then tells the clients and closes their connections.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        let Self { socket, shared } = self;
        accept::run(socket, shared, shutdown).await;
    }
}
