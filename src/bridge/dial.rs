//! From an address to a stream of bytes: name resolution, TCP, HTTP proxy, TLS, WebSocket, each failure in words.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::proxy::Proxy;
use super::url::Url;
use crate::tls::{ClientTls, explain};
use crate::websocket::WebSocket;

/// What a connection runs over.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// Why no connection could be made: what happened, and what to do.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub(super) struct DialError(pub String);

/// How many addresses of one name are tried; a name with more is a load balancer, where any will do.
const MAX_ADDRESSES: usize = 8;

/// How an upstream is reached.
pub(super) struct Way<'a> {
    pub url: &'a Url,
    /// Asked for a tunnel to `url`, whose name it resolves.
    pub proxy: Option<&'a Proxy>,
    /// Needed for `mqtts://` and `wss://`.
    pub tls: Option<&'a ClientTls>,
    /// For all of it.
    pub timeout: Duration,
    /// The largest packet that is accepted later.
    pub max_packet_size: u32,
}

impl Way<'_> {
    /// Goes it. Also tells where the TCP connection leads: to the upstream or to the proxy.
    ///
    /// # Cancel safety
    /// Dropping it closes what was opened.
    pub async fn dial(&self) -> Result<(Box<dyn Transport>, SocketAddr), DialError> {
        let Self { url, timeout, .. } = self;
        let deadline = Instant::now() + *timeout;
        let (stream, address) = match self.proxy {
            None => connect(url, &url.host, url.port, deadline, *timeout).await?,
            Some(proxy) => self.tunnel(proxy, deadline).await?,
        };
        // Messages are batched here; the kernel's own batching would only add a delay.
        let _ = stream.set_nodelay(true);
        let stream: Box<dyn Transport> = match self.tls {
            _ if !url.scheme.is_tls() => Box::new(stream),
            Some(tls) => self.secure(tls, stream, address, deadline).await?,
            None => return Err(DialError(format!("{url} needs TLS settings"))),
        };
        if !url.scheme.is_web_socket() {
            return Ok((stream, address));
        }
        match timeout_at(deadline, WebSocket::connect(stream, &url.to_string(), self.max_packet_size)).await {
            Ok(Ok(stream)) => Ok((Box::new(stream), address)),
            Ok(Err(error)) => Err(DialError(format!(
                "{url} ({address}) does not speak MQTT over WebSocket there: {error}; check the port and the path, often \
                 `/mqtt`"
            ))),
            Err(_) => Err(DialError(format!(
                "{url} ({address}) accepted the connection but did not answer the WebSocket handshake within {timeout:?}; \
                 is it a WebSocket port?"
            ))),
        }
    }

    async fn tunnel(&self, proxy: &Proxy, deadline: Instant) -> Result<(TcpStream, SocketAddr), DialError> {
        let what = format!("the proxy {proxy}");
        let (mut stream, address) = connect(&what, &proxy.host, proxy.port, deadline, self.timeout).await?;
        match timeout_at(deadline, proxy.tunnel(&mut stream, self.url)).await {
            Ok(Ok(())) => Ok((stream, address)),
            Ok(Err(said)) => Err(DialError(said)),
            Err(_) => Err(DialError(format!(
                "{what} does not answer within {:?}; it may be waiting for {}, check that address",
                self.timeout,
                self.url.authority()
            ))),
        }
    }

    async fn secure(
        &self,
        tls: &ClientTls,
        stream: TcpStream,
        address: SocketAddr,
        deadline: Instant,
    ) -> Result<Box<dyn Transport>, DialError> {
        let Self { url, timeout, .. } = self;
        let name = tls.settings().server_name(&url.host).map_err(|error| DialError(error.to_string()))?;
        let handshake = TlsConnector::from(tls.config()).connect(name, stream);
        match timeout_at(deadline, handshake).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(error)) => Err(DialError(explain::client_handshake(&error, tls.settings(), &url.host))),
            Err(_) => Err(DialError(format!(
                "{url} ({address}) accepted the connection but did not answer the TLS handshake within {timeout:?}; is it \
                 a TLS port?"
            ))),
        }
    }
}

/// A TCP connection to `what`, which stands at `host` and `port`.
async fn connect(
    what: &impl fmt::Display,
    host: &str,
    port: u16,
    deadline: Instant,
    timeout: Duration,
) -> Result<(TcpStream, SocketAddr), DialError> {
    let found = timeout_at(deadline, lookup_host((host, port))).await;
    let addresses: Vec<SocketAddr> = match found {
        Ok(Ok(addresses)) => addresses.take(MAX_ADDRESSES).collect(),
        Ok(Err(error)) => {
            return Err(DialError(format!(
                "the name `{host}` cannot be resolved ({error}); check its spelling, the DNS server and the network"
            )));
        }
        Err(_) => return Err(DialError(format!("the DNS server does not answer for `{host}`; check the network"))),
    };
    let mut failure = DialError(format!("the name `{host}` has no address"));
    for (index, &address) in addresses.iter().enumerate() {
        // A dead first address leaves time for the others.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - index).unwrap_or(1);
        match timeout_at(Instant::now() + share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok((stream, address)),
            Ok(Err(error)) => failure = refused(what, address, &error),
            Err(_) => {
                failure = DialError(format!(
                    "{what} ({address}) did not answer within {timeout:?}; check the network and the firewalls on the way"
                ));
            }
        }
    }
    Err(failure)
}

fn refused(what: &impl fmt::Display, address: SocketAddr, error: &io::Error) -> DialError {
    DialError(match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            format!("{what} ({address}) refuses connections; is it running, and is the port right?")
        }
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
            format!("there is no route to {what} ({address}); check this gateway's network")
        }
        _ => format!("connecting to {what} ({address}) failed: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refused_connection_and_an_unknown_name_are_told_apart() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let fails = async |url: &str, proxy: Option<&str>, expected: &str| {
            let url = Url::parse(url).unwrap();
            let proxy = proxy.map(|proxy| Proxy::parse(proxy).unwrap());
            let (proxy, timeout) = (proxy.as_ref(), Duration::from_secs(5));
            let way = Way { url: &url, proxy, tls: None, timeout, max_packet_size: 1024 };
            let error = way.dial().await.err().unwrap();
            assert!(error.0.contains(expected), "{error}");
        };
        fails(&format!("mqtt://127.0.0.1:{port}"), None, "refuses connections; is it running").await;
        fails("mqtt://no-such-host.invalid", None, "`no-such-host.invalid`").await;
        let proxy = format!("http://127.0.0.1:{port}");
        let expected = format!("the proxy {proxy} (127.0.0.1:{port}) refuses connections");
        fails("mqtt://no-such-host.invalid", Some(&proxy), &expected).await;
    }
}
