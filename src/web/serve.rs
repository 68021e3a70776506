//! Connections: accepting them, TLS, and the limits that keep a slow or greedy peer from hurting others.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::App;
use super::guard::Peer;
use crate::tls::ServerTls;

/// Connections at a time; more wait in the system's backlog.
const MAX_CONNECTIONS: usize = 128;
/// Connections of one address other than loopback; more are closed at once. A browser opens up to six.
const MAX_CONNECTIONS_PER_ADDRESS: usize = 24;
/// Bytes of a request's head.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Header fields of a request.
const MAX_HEADER_FIELDS: usize = 64;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the head of a request may take, and how long a connection may wait for its next request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a peer may take nothing of an answer.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests under way may go on when the gateway stops.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(800);
/// The pause after the system refused a connection, most often for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves connections until `shutdown`, then lets requests under way finish for [`DRAIN_TIMEOUT`].
pub async fn serve(
    listener: TcpListener,
    tls: Option<&ServerTls>,
    router: Router,
    app: &App,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut connections = Connections::default();
    loop {
        app.counters.connections.store(connections.tasks.len() as u64, Ordering::Relaxed);
        let accepted = tokio::select! {
            () = stopped(&mut shutdown) => break,
            () = connections.ended(), if !connections.tasks.is_empty() => continue,
            accepted = listener.accept(), if connections.tasks.len() < MAX_CONNECTIONS => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "the web UI cannot take a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if !connections.may_add(peer.ip()) {
            app.counters.refused_connections.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let acceptor = tls.map(|tls| TlsAcceptor::from(tls.config()));
        connections.add(peer.ip(), connection(stream, peer, acceptor, router.clone(), shutdown.clone()));
    }
    drop(listener);
    let drain = async { while connections.tasks.join_next().await.is_some() {} };
    let _ = timeout(DRAIN_TIMEOUT, drain).await;
    connections.tasks.shutdown().await;
}

/// Waits for the end.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which is the end too.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// The connections that are open, and how many each address has.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    addresses: HashMap<tokio::task::Id, IpAddr>,
}

impl Connections {
    fn may_add(&self, address: IpAddr) -> bool {
        address.to_canonical().is_loopback()
            || self.addresses.values().filter(|other| **other == address).count() < MAX_CONNECTIONS_PER_ADDRESS
    }

    fn add(&mut self, address: IpAddr, connection: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(connection).id();
        self.addresses.insert(id, address);
    }

    /// Waits until one connection has ended.
    async fn ended(&mut self) {
        match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => self.addresses.remove(&id),
            Some(Err(error)) => self.addresses.remove(&error.id()),
            None => None,
        };
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: Option<TlsAcceptor>,
    router: Router,
    shutdown: watch::Receiver<bool>,
) {
    // Events are small and should arrive now; a socket that refuses the option still works.
    let _ = stream.set_nodelay(true);
    let Some(acceptor) = acceptor else {
        return requests(stream, peer, router, shutdown).await;
    };
    match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => requests(stream, peer, router, shutdown).await,
        Ok(Err(error)) => debug!(%peer, %error, "no TLS handshake with a browser"),
        Err(_) => debug!(%peer, "a browser did not finish its TLS handshake"),
    }
}

async fn requests<S>(stream: S, peer: SocketAddr, router: Router, mut shutdown: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADER_FIELDS)
        .serve_connection(TokioIo::new(Unstalled::new(stream)), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = stopped(&mut shutdown) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        debug!(%peer, %error, "a connection to the web UI ended early");
    }
}

/// A stream whose writes fail when the peer takes nothing for [`STALL_TIMEOUT`]: a browser that went away without a
/// word would otherwise hold its connection for as long as TCP tries.
struct Unstalled<S> {
    stream: S,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Unstalled<S> {
    fn new(stream: S) -> Self {
        Self { stream, stalled: None }
    }

    /// Passes on what a write came to, or fails it when it has come to nothing for too long.
    fn judge<T>(&mut self, written: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(STALL_TIMEOUT)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Unstalled<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unstalled<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(written, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.judge(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.judge(closed, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.judge(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up() {
        let (ours, _theirs) = tokio::io::duplex(8);
        let mut stream = Unstalled::new(ours);
        let start = tokio::time::Instant::now();
        let error = stream.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), STALL_TIMEOUT);
    }

    #[test]
    fn one_address_cannot_take_all_connections() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _entered = runtime.enter();
        let mut connections = Connections::default();
        let greedy: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..MAX_CONNECTIONS_PER_ADDRESS {
            assert!(connections.may_add(greedy));
            connections.add(greedy, std::future::pending());
        }
        assert!(!connections.may_add(greedy));
        assert!(connections.may_add("192.0.2.2".parse().unwrap()));
        assert!(connections.may_add(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)));
    }
}
