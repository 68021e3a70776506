//! The same protocol over TLS, WebSocket and Unix sockets.

use fieldgate::hub;
use fieldgate::listener::{Address, Settings, Transport};
use futures_util::{Sink, Stream};
use tokio::net::{TcpStream, UnixStream};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::harness::{Broker, Peer, bytes, certificate_in, connect, over_tls};

#[tokio::test]
async fn mqtt_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mqtt.sock");
    let address = Address::Unix(path.clone());
    // A killed gateway has left its socket behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let broker = Broker::start_with(|settings| settings.address = address, hub::Settings::default(), None).await;
    let mut peer = Peer { stream: UnixStream::connect(&path).await.unwrap() };
    peer.send(&connect("c", 4, 2)).await;
    peer.expect("20 02 00 00").await;
    peer.expect_nothing().await;
    broker.stop().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn mqtt_over_tls_with_a_stalled_handshake_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let tls = certificate_in(directory.path());
    let broker = Broker::start_with(|settings| settings.tls = Some(tls), hub::Settings::default(), None).await;
    let stalled = broker.open().await;
    let tcp = TcpStream::connect(("127.0.0.1", broker.port())).await.unwrap();
    let stream = over_tls(tcp, directory.path()).await;
    let mut peer = Peer { stream };
    peer.send(&connect("c", 4, 2)).await;
    peer.expect("20 02 00 00").await;
    let large = "5A".repeat(200_000);
    // 200,003 bytes of remaining length: C3 9A 0C.
    peer.send(&format!(r#"82 06 0001 0001 "a" 00 30 C3 9A 0C 0001 "a" {large}"#)).await;
    peer.expect(&format!(r#"90 03 0001 00 30 C3 9A 0C 0001 "a" {large}"#)).await;
    drop(stalled);
    broker.stop().await;
}

#[tokio::test]
async fn mqtt_over_a_websocket() {
    let socket = |settings: &mut Settings| settings.transport = Transport::WebSocket;
    let broker = Broker::start_with(socket, hub::Settings::default(), None).await;
    let dial = async |protocol: Option<&'static str>| {
        let mut request = format!("ws://127.0.0.1:{}/mqtt", broker.port()).into_client_request().unwrap();
        if let Some(protocol) = protocol {
            request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        }
        let tcp = TcpStream::connect(("127.0.0.1", broker.port())).await.unwrap();
        tokio_tungstenite::client_async(request, tcp).await
    };
    // [MQTT-6.0.0-3]
    assert!(matches!(dial(None).await, Err(Error::Http(response)) if response.status() == 400));
    let (mut stream, response) = dial(Some("chat, mqtt")).await.unwrap();
    // [MQTT-6.0.0-4]
    assert_eq!(response.headers()["sec-websocket-protocol"], "mqtt");
    // [MQTT-6.0.0-2]: packets need not be aligned with frames.
    let script = bytes(&format!("{} C0 00 C0", connect("c", 4, 2)));
    let (head, tail) = script.split_at(5);
    for part in [head, tail, &[0x00][..]] {
        put(&mut stream, Message::Binary(part.to_vec().into())).await;
    }
    let mut got = Vec::new();
    while got.len() < 8 {
        let Message::Binary(part) = next(&mut stream).await.unwrap() else { panic!() };
        got.extend_from_slice(&part);
    }
    assert_eq!(got, bytes("20 02 00 00 D0 00 D0 00"));
    // [MQTT-6.0.0-1]
    put(&mut stream, Message::Text("no".into())).await;
    while let Some(message) = next(&mut stream).await {
        assert!(!matches!(message, Message::Binary(_)));
    }
    broker.stop().await;
}

type WebSocket = tokio_tungstenite::WebSocketStream<TcpStream>;

async fn put(stream: &mut WebSocket, message: Message) {
    let mut stream = std::pin::Pin::new(stream);
    std::future::poll_fn(|cx| stream.as_mut().poll_ready(cx)).await.unwrap();
    stream.as_mut().start_send(message).unwrap();
    std::future::poll_fn(|cx| stream.as_mut().poll_flush(cx)).await.unwrap();
}

/// The next message; `None` when the connection is over.
async fn next(stream: &mut WebSocket) -> Option<Message> {
    let mut stream = std::pin::Pin::new(stream);
    let next = std::future::poll_fn(|cx| stream.as_mut().poll_next(cx));
    tokio::time::timeout(crate::harness::PATIENCE, next).await.expect("a message in time")?.ok()
}
