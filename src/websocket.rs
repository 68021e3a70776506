//! MQTT in WebSocket frames, as a byte stream, for listeners and upstreams (MQTT 5.0 §6, RFC 6455).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use futures_util::{Sink, Stream as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::{HeaderValue, StatusCode};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async_with_config, client_async_with_config};

/// Frames may hold several packets or parts of one; this much is allowed beyond the largest packet.
const SPARE_BYTES: usize = 64 * 1024;

/// Stays allocated as long as the connection.
const READ_BUFFER_BYTES: usize = 2 * 1024;

/// The most that is put into one frame.
const FRAME_BYTES: usize = 64 * 1024;

const PROTOCOL_HEADER: &str = "sec-websocket-protocol";

/// The bytes in the binary frames of a WebSocket.
pub struct WebSocket<S> {
    inner: WebSocketStream<S>,
    /// What of the last frame has not been read yet.
    unread: Bytes,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// Answers the HTTP upgrade on `stream`.
    ///
    /// # Errors
    /// The stream's own, or `InvalidData` where the peer asks for something else than MQTT.
    pub async fn accept(stream: S, max_packet_size: u32) -> io::Result<Self> {
        let config = Some(limits(max_packet_size));
        let inner = accept_hdr_async_with_config(stream, choose_protocol, config).await.map_err(to_io)?;
        Ok(Self { inner, unread: Bytes::new() })
    }

    /// Asks the server on `stream` for the upgrade, at `url`: `ws://HOST:PORT/PATH` or `wss://…`.
    ///
    /// # Errors
    /// The stream's own, or `InvalidData` with what the server answered instead.
    pub async fn connect(stream: S, url: &str, max_packet_size: u32) -> io::Result<Self> {
        let mut request = url.into_client_request().map_err(to_io)?;
        request.headers_mut().insert(PROTOCOL_HEADER, HeaderValue::from_static("mqtt"));
        let config = Some(limits(max_packet_size));
        let (inner, _) = client_async_with_config(request, stream, config).await.map_err(to_io)?;
        Ok(Self { inner, unread: Bytes::new() })
    }
}

fn limits(max_packet_size: u32) -> WebSocketConfig {
    let most = max_packet_size as usize + SPARE_BYTES;
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * FRAME_BYTES)
        .max_message_size(Some(most))
        .max_frame_size(Some(most))
}

/// Agrees on the subprotocol [MQTT-6.0.0-3], [MQTT-6.0.0-4]; 3.1 clients call it `mqttv3.1`.
#[expect(clippy::result_large_err, reason = "the signature is tungstenite's")]
fn choose_protocol(request: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    let offered = request.headers().get_all(PROTOCOL_HEADER).iter().filter_map(|value| value.to_str().ok());
    let mut offered = offered.flat_map(|list| list.split(',')).map(str::trim);
    let chosen = offered.find_map(|name| ["mqtt", "mqttv3.1"].into_iter().find(|known| name == *known));
    let Some(chosen) = chosen else {
        let mut refusal = ErrorResponse::new(Some("this port speaks the WebSocket subprotocol `mqtt` only\n".into()));
        *refusal.status_mut() = StatusCode::BAD_REQUEST;
        return Err(refusal);
    };
    response.headers_mut().insert(PROTOCOL_HEADER, HeaderValue::from_static(chosen));
    Ok(response)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match Pin::new(&mut self.inner).poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(Message::Binary(bytes)))) => self.unread = bytes,
                // [MQTT-6.0.0-1]
                Poll::Ready(Some(Ok(Message::Text(_)))) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "MQTT in a text frame")));
                }
                Poll::Ready(Some(Ok(Message::Close(_))) | None) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(Error::ConnectionClosed | Error::AlreadyClosed))) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(to_io(error))),
            }
        }
        let count = self.unread.len().min(into.remaining());
        into.put_slice(&self.unread[..count]);
        self.unread.advance(count);
        if self.unread.is_empty() {
            self.unread = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut inner = Pin::new(&mut self.inner);
        match inner.as_mut().poll_ready(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(ready) => ready.map_err(to_io)?,
        }
        let taken = &bytes[..bytes.len().min(FRAME_BYTES)];
        inner.start_send(Message::Binary(Bytes::copy_from_slice(taken))).map_err(to_io)?;
        Poll::Ready(Ok(taken.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx).map_err(to_io)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.inner).poll_close(cx) {
            Poll::Ready(Err(Error::ConnectionClosed | Error::AlreadyClosed)) => Poll::Ready(Ok(())),
            polled => polled.map_err(to_io),
        }
    }
}

fn to_io(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
    }
}
