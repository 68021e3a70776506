//! The same protocol over TLS, WebSocket and Unix sockets.

use std::time::Duration;

use fieldgate::hub::{self, access};
use fieldgate::listener::{Address, Proxies, Settings, Transport};
use fieldgate::throttle::AddressLimits;
use futures_util::{Sink, Stream};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::harness::{Broker, Peer, bytes, certificate_in, connect, over_tls, over_tls_of};

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
async fn mqtt_over_tls_of_both_versions_with_stalled_handshakes_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let tls = certificate_in(directory.path());
    let broker = Broker::start_with(|settings| settings.tls = Some(tls), hub::Settings::default(), None).await;
    // Nobody waits for those who say nothing, or half of a ClientHello.
    let mut stalled = Vec::new();
    for number in 0..100 {
        let mut peer = broker.open().await;
        if number % 2 == 0 {
            peer.send("16 03 01 02 00 01 00 01 FC 03 03").await;
        }
        stalled.push(peer);
    }
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let tcp = TcpStream::connect(("127.0.0.1", broker.port())).await.unwrap();
        let stream = over_tls_of(tcp, directory.path(), &[version]).await;
        assert_eq!(stream.get_ref().1.protocol_version(), Some(version.version));
        let mut peer = Peer { stream };
        peer.send(&connect("c", 4, 2)).await;
        peer.expect("20 02 00 00").await;
        let large = "5A".repeat(200_000);
        // 200,003 bytes of remaining length: C3 9A 0C.
        peer.send(&format!(r#"82 06 0001 0001 "a" 00 30 C3 9A 0C 0001 "a" {large}"#)).await;
        peer.expect(&format!(r#"90 03 0001 00 30 C3 9A 0C 0001 "a" {large}"#)).await;
    }
    drop(stalled);
    broker.stop().await;
}

#[tokio::test]
async fn a_handshake_that_stalls_is_given_up_and_counted() {
    let directory = tempfile::tempdir().unwrap();
    let tls = certificate_in(directory.path());
    for transport in ["tls", "websocket", "proxy"] {
        let change = |settings: &mut Settings| {
            settings.limits.connect_timeout = Duration::from_millis(50);
            match transport {
                "tls" => settings.tls = Some(tls.clone()),
                "websocket" => settings.transport = Transport::WebSocket,
                _ => settings.proxies = Some(Proxies::default()),
            }
        };
        let broker = Broker::start_with(change, hub::Settings::default(), None).await;
        let mut peer = broker.open().await;
        peer.expect_close(None).await;
        let failed = broker.metric(r#"fieldgate_listener_handshakes_failed_total{listener="test"}"#);
        assert_eq!(failed, 1.0, "{transport}");
        broker.stop().await;
    }
}

#[tokio::test]
async fn mqtt_over_ipv6() {
    let change = |settings: &mut Settings| settings.address = Address::Tcp("[::1]:0".parse().unwrap());
    let broker = Broker::start_with(change, hub::Settings::default(), None).await;
    let mut peer = Peer { stream: TcpStream::connect(("::1", broker.port())).await.unwrap() };
    peer.send(&connect("c", 4, 2)).await;
    peer.expect("20 02 00 00").await;
    let session = broker.hub.sessions().pop().unwrap();
    assert!(session.peer.as_deref().unwrap().starts_with("[::1]:"), "{session:?}");
    broker.stop().await;
}

/// What a proxy says about a client at 192.0.2.7, port 12345, in version 2.
const PROXIED: &str = r#"0D0A0D0A000D0A "QUIT" 0A 21 11 000C C0000207 7F000001 3039 075B"#;

#[tokio::test]
async fn behind_a_proxy_the_client_s_own_address_is_what_counts() {
    let directory = tempfile::tempdir().unwrap();
    let tls = certificate_in(directory.path());
    for encrypted in [false, true] {
        let change = |settings: &mut Settings| {
            settings.proxies = Some(Proxies::default());
            settings.tls = encrypted.then(|| tls.clone());
        };
        let addresses = AddressLimits { max_connections: 1, ..AddressLimits::default() };
        let limits = hub::Limits { addresses, ..hub::Limits::default() };
        let access = access::Settings { anonymous: access::Anonymous::Always, ..access::Settings::default() };
        let broker = Broker::start_with(change, hub::Settings { limits, access }, None).await;
        let mut first = broker.open().await;
        let connack = async |peer: &mut Peer<TcpStream>| {
            peer.send(&connect("c", 4, 2)).await;
            peer.expect("20 02 00 00").await;
        };
        // In pieces, and with the CONNECT behind it.
        let header = bytes(PROXIED);
        for part in [&header[..5], &header[5..14], &header[14..]] {
            AsyncWriteExt::write_all(&mut first.stream, part).await.unwrap();
        }
        let mut first = if encrypted {
            let mut peer = Peer { stream: over_tls(first.stream, directory.path()).await };
            peer.send(&connect("c", 4, 2)).await;
            peer.expect("20 02 00 00").await;
            Err(peer)
        } else {
            connack(&mut first).await;
            Ok(first)
        };
        let session = broker.hub.sessions().pop().unwrap();
        assert_eq!(session.peer.as_deref(), Some("192.0.2.7:12345"));
        // It has its one place; others behind the same proxy have theirs.
        let mut second = broker.open().await;
        second.send(PROXIED).await;
        second.expect_close(None).await;
        let refused = r#"fieldgate_listener_connections_refused_total{listener="test",reason="address_full"}"#;
        assert_eq!(broker.metric(refused), 1.0);
        if !encrypted {
            let mut other = broker.open().await;
            other.send(r#""PROXY TCP4 192.0.2.8 127.0.0.1 1 1883" 0D0A"#).await;
            other.send(&connect("d", 4, 2)).await;
            other.expect("20 02 00 00").await;
        }
        match &mut first {
            Ok(peer) => peer.expect_nothing().await,
            Err(peer) => peer.expect_nothing().await,
        }
        broker.stop().await;
    }
}

#[tokio::test]
async fn behind_a_proxy_nobody_is_anonymous_for_being_near_and_strangers_are_refused() {
    let change = |settings: &mut Settings| settings.proxies = Some(Proxies::default());
    let broker = Broker::start_with(change, hub::Settings::default(), None).await;
    let mut peer = broker.open().await;
    peer.send(PROXIED).await;
    peer.send(&connect("c", 4, 2)).await;
    peer.expect("20 02 00 05").await;
    let mut bare = broker.open().await;
    bare.send(&connect("c", 4, 2)).await;
    bare.expect_close(None).await;
    broker.stop().await;

    let trusted = vec!["10.0.0.0/8".parse().unwrap()];
    let change = |settings: &mut Settings| settings.proxies = Some(Proxies { trusted });
    let broker = Broker::start_with(change, hub::Settings::default(), None).await;
    broker.open().await.expect_close(None).await;
    let refused = r#"fieldgate_listener_connections_refused_total{listener="test",reason="no_proxy"}"#;
    assert_eq!(broker.metric(refused), 1.0);
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
