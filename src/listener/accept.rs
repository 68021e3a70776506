//! The listening socket: accepting connections, also when the system runs out of something.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::counters::{Admitted, Counted, Refusal};
use super::proxy::read_header;
use super::{Address, DRAIN_TIMEOUT, Shared, connection};
use crate::hub::Refused;

/// Connections that wait to be accepted: a storm of clients after a power cut should not see refusals.
const BACKLOG: u32 = 4096;

/// The system asks a silent peer after so long, then so often, and gives it up after so many questions.
const TCP_KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);

/// The wait after a failed accept, doubled for each further one.
const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A socket that listens.
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// Removes a Unix socket's file when the listener is gone.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A connection that was accepted, before TLS and WebSocket.
pub(super) enum Accepted {
    Tcp(TcpStream, SocketAddr),
    /// With where the client is, where a proxy has said so.
    Unix(UnixStream, Option<SocketAddr>),
}

impl Accepted {
    /// Where the client is; `None` for this machine's Unix sockets.
    pub fn peer(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(_, address) => Some(*address),
            Self::Unix(_, address) => *address,
        }
    }

    /// As [`Accepted::peer`], without the port.
    pub fn address(&self) -> Option<IpAddr> {
        self.peer().map(|peer| peer.ip().to_canonical())
    }

    /// Reads from the proxy where the client is.
    pub async fn ask_proxy(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream, address) => *address = read_header(stream).await?.unwrap_or(*address),
            Self::Unix(stream, address) => *address = read_header(stream).await?,
        }
        Ok(())
    }
}

impl Socket {
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
                // A restarted gateway must not wait for the connections of the one before it.
                socket.set_reuseaddr(true)?;
                // Those that are accepted inherit it. A client without a keep alive that has lost its power would stay
                // for ever.
                socket.set_keepalive(true)?;
                sockopt::set_tcp_keepidle(&socket, TCP_KEEPALIVE.0)?;
                sockopt::set_tcp_keepintvl(&socket, TCP_KEEPALIVE.1)?;
                sockopt::set_tcp_keepcnt(&socket, TCP_KEEPALIVE.2)?;
                socket.bind(*address)?;
                Ok(Self::Tcp(socket.listen(BACKLOG)?))
            }
            Address::Unix(path) => {
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
                // Nobody answers on a socket that a killed gateway has left behind.
                if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
                    std::fs::remove_file(path)?;
                }
                Ok(Self::Unix(UnixListener::bind(path)?, SocketFile(path.clone())))
            }
        }
    }

    pub fn local_address(&self) -> Option<Address> {
        match self {
            Self::Tcp(socket) => socket.local_addr().ok().map(Address::Tcp),
            Self::Unix(_, file) => Some(Address::Unix(file.0.clone())),
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(socket) => socket.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer)),
            Self::Unix(socket, _) => socket.accept().await.map(|(stream, _)| Accepted::Unix(stream, None)),
        }
    }
}

/// Accepts until `shutdown`, then drains.
pub(super) async fn run(socket: Socket, shared: Arc<Shared>, mut shutdown: watch::Receiver<bool>) {
    info!(listener = shared.name, address = %shared.address, tls = shared.tls.is_some(), "listening");
    let mut connections = JoinSet::new();
    let certificates = async {
        match &shared.tls {
            Some(tls) => tls.watch(&shared.name, shutdown.clone()).await,
            None => std::future::pending().await,
        }
    };
    let mut stop = shutdown.clone();
    tokio::select! {
        _ = stopped(&mut stop) => {}
        () = accept_all(&socket, &shared, &mut connections) => {}
        () = certificates => {}
    }
    // The certificates' watch may be the first to see the end; both mean the same.
    stopped(&mut shutdown).await;
    drop(socket);
    shared.stopping.store(true, Ordering::SeqCst);
    shared.stop.notify_waiters();
    let drained = timeout(DRAIN_TIMEOUT, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        warn!(listener = shared.name, left = connections.len(), "connections did not close in time and were cut off");
    }
}

async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error says that whoever could stop us is gone.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

async fn accept_all(socket: &Socket, shared: &Arc<Shared>, connections: &mut JoinSet<()>) {
    let mut backoff = ACCEPT_BACKOFF.0;
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            Some(ended) = connections.join_next() => {
                if let Err(failure) = ended && failure.is_panic() {
                    error!(listener = shared.name, %failure, "a connection's task failed; its connection is closed");
                }
                continue;
            }
        };
        match accepted {
            Ok(accepted) => {
                if backoff > ACCEPT_BACKOFF.0 {
                    info!(listener = shared.name, "accepting connections again");
                }
                backoff = ACCEPT_BACKOFF.0;
                shared.counters.accept_fails.store(false, Ordering::Relaxed);
                // Before the handshakes: refusing must cost less than asking.
                let began = Instant::now();
                match &shared.proxies {
                    Some(proxies) => {
                        let trusted = proxies.trust(accepted.address());
                        if let Some(waiting) = admit_proxy(shared, trusted) {
                            connections.spawn(connection::serve_proxied(accepted, shared.clone(), waiting, began));
                        }
                    }
                    None => {
                        if let Some(admitted) = admit(shared, accepted.address()) {
                            connections.spawn(connection::serve(accepted, shared.clone(), admitted, began));
                        }
                    }
                }
            }
            // The peer was gone before we came.
            Err(error) if is_peers_fault(&error) => {}
            Err(error) => {
                if backoff == ACCEPT_BACKOFF.0 {
                    warn!(listener = shared.name, %error, "connections cannot be accepted; trying again");
                }
                shared.counters.accept_fails.store(true, Ordering::Relaxed);
                sleep(backoff).await;
                backoff = (backoff * 2).min(ACCEPT_BACKOFF.1);
            }
        }
    }
}

/// Takes a place for a connection that has yet to say for whom it is, if there is one and it is a proxy's.
fn admit_proxy(shared: &Shared, trusted: bool) -> Option<Counted> {
    let counters = &shared.counters;
    let refusal = match counters.admit(shared.max_connections) {
        Some(counted) if trusted => return Some(counted),
        Some(_) => Refusal::NoProxy,
        None => Refusal::ListenerFull,
    };
    if counters.refuse(refusal) {
        warn!(listener = shared.name, "connections are refused: {refusal}");
    }
    None
}

/// Takes a place for a connection from `address`, if there is one.
pub(super) fn admit(shared: &Shared, address: Option<IpAddr>) -> Option<Admitted> {
    let counters = &shared.counters;
    let result = match counters.admit(shared.max_connections) {
        Some(counted) => match shared.hub.admission().admit(address, Instant::now()) {
            Ok(place) => Ok(Admitted::Within((counted, place))),
            Err(refused) => Err(Refusal::Gateway(refused)),
        },
        None => Err(Refusal::ListenerFull),
    };
    // Each kind once per episode: the counters have the rest.
    match result {
        Ok(admitted) => {
            counters.admitted();
            Some(admitted)
        }
        Err(refusal) => {
            if counters.refuse(refusal) {
                let address = address.map(tracing::field::display);
                warn!(listener = shared.name, address, "connections are refused: {refusal}");
            }
            let full = matches!(refusal, Refusal::ListenerFull | Refusal::Gateway(Refused::GatewayFull));
            shared.redirect.as_ref().filter(|_| full).and_then(|_| counters.admit_in_excess()).map(Admitted::InExcess)
        }
    }
}

fn is_peers_fault(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
