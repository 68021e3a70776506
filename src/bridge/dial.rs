//! From an address to a stream of bytes: name resolution, TCP, TLS, WebSocket, each failure in words.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

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

/// Connects to `url` until `deadline`. `tls` is needed for `mqtts://` and `wss://`.
///
/// # Cancel safety
/// Dropping it closes what was opened.
pub(super) async fn dial(
    url: &Url,
    tls: Option<&ClientTls>,
    timeout: Duration,
    max_packet_size: u32,
) -> Result<(Box<dyn Transport>, SocketAddr), DialError> {
    let deadline = Instant::now() + timeout;
    let (stream, address) = connect(url, deadline, timeout).await?;
    // Messages are batched here; the kernel's own batching would only add a delay.
    let _ = stream.set_nodelay(true);
    let stream: Box<dyn Transport> = match tls {
        _ if !url.scheme.is_tls() => Box::new(stream),
        Some(tls) => secure(url, tls, stream, address, deadline, timeout).await?,
        None => return Err(DialError(format!("{url} needs TLS settings"))),
    };
    if !url.scheme.is_web_socket() {
        return Ok((stream, address));
    }
    match timeout_at(deadline, WebSocket::connect(stream, &url.to_string(), max_packet_size)).await {
        Ok(Ok(stream)) => Ok((Box::new(stream), address)),
        Ok(Err(error)) => Err(DialError(format!(
            "{url} ({address}) does not speak MQTT over WebSocket there: {error}; check the port and the path, often `/mqtt`"
        ))),
        Err(_) => Err(DialError(format!(
            "{url} ({address}) accepted the connection but did not answer the WebSocket handshake within {timeout:?}; is \
             it a WebSocket port?"
        ))),
    }
}

async fn secure(
    url: &Url,
    tls: &ClientTls,
    stream: TcpStream,
    address: SocketAddr,
    deadline: Instant,
    timeout: Duration,
) -> Result<Box<dyn Transport>, DialError> {
    let name = tls.settings().server_name(&url.host).map_err(|error| DialError(error.to_string()))?;
    let handshake = TlsConnector::from(tls.config()).connect(name, stream);
    match timeout_at(deadline, handshake).await {
        Ok(Ok(stream)) => Ok(Box::new(stream)),
        Ok(Err(error)) => Err(DialError(explain::client_handshake(&error, tls.settings(), &url.host))),
        Err(_) => Err(DialError(format!(
            "{url} ({address}) accepted the connection but did not answer the TLS handshake within {timeout:?}; is it a \
             TLS port?"
        ))),
    }
}

async fn connect(url: &Url, deadline: Instant, timeout: Duration) -> Result<(TcpStream, SocketAddr), DialError> {
    let Url { host, port, .. } = url;
    let found = timeout_at(deadline, lookup_host((host.as_str(), *port))).await;
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
            Ok(Err(error)) => failure = refused(url, address, &error),
            Err(_) => {
                failure = DialError(format!(
                    "{url} ({address}) did not answer within {timeout:?}; check the network and the firewalls on the way"
                ));
            }
        }
    }
    Err(failure)
}

fn refused(url: &Url, address: SocketAddr, error: &io::Error) -> DialError {
    DialError(match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            format!("{url} ({address}) refuses connections; is the broker running, and is the port right?")
        }
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
            format!("there is no route to {url} ({address}); check this gateway's network")
        }
        _ => format!("connecting to {url} ({address}) failed: {error}"),
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
        let fails = async |url: &str, expected: &str| {
            let url = Url::parse(url).unwrap();
            let error = dial(&url, None, Duration::from_secs(5), 1024).await.err().unwrap();
            assert!(error.0.contains(expected), "{error}");
        };
        fails(&format!("mqtt://127.0.0.1:{port}"), "refuses connections; is the broker running").await;
        fails("mqtt://no-such-host.invalid", "`no-such-host.invalid`").await;
    }
}
