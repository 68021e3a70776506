//! Through an HTTP proxy: every kind of address, and what it says when there is no way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fieldgate::bridge::Settings;
use fieldgate::bridge::proxy::Proxy;
use fieldgate::bridge::url::Scheme;
use fieldgate::message::QoS;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::cloud::Cloud;
use super::{Gateway, until};

/// A proxy that wants the login `me` with the password `p@ss`, and lets tunnels through to one target only.
struct HttpProxy {
    address: SocketAddr,
    tunnels: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl HttpProxy {
    async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tunnels = Arc::new(AtomicUsize::new(0));
        let count = tunnels.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                connections.spawn(serve(near, target, count.clone()));
            }
        });
        Self { address, tunnels, _tasks: tasks }
    }

    fn url(&self, login: &str) -> Option<Proxy> {
        Some(Proxy::parse(&format!("http://{login}{}", self.address)).unwrap())
    }
}

async fn serve(mut near: TcpStream, target: SocketAddr, tunnels: Arc<AtomicUsize>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = near.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let asked = head.strip_prefix("CONNECT ").and_then(|rest| rest.split_once(' ')).unwrap().0.to_owned();
    let has_login = head.contains("\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n");
    let answer = match () {
        () if !has_login => "407 Proxy Authentication Required",
        () if asked != format!("localhost:{}", target.port()) => "403 Filtered",
        () => "200 Connection established",
    };
    near.write_all(format!("HTTP/1.1 {answer}\r\nServer: test\r\n\r\n").as_bytes()).await.unwrap();
    if answer.starts_with("200") {
        tunnels.fetch_add(1, Ordering::Relaxed);
        let mut far = TcpStream::connect(target).await.unwrap();
        let _ = copy_bidirectional(&mut near, &mut far).await;
    }
}

#[tokio::test]
async fn messages_go_through_a_proxy_to_every_kind_of_address() {
    for scheme in [Scheme::Tcp, Scheme::Tls, Scheme::WebSocket, Scheme::SecureWebSocket] {
        let mut cloud = Cloud::start_at(scheme).await;
        let proxy = HttpProxy::to(cloud.address).await;
        let settings = Settings { proxy: proxy.url("me:p%40ss@"), ..cloud.upstream_at(scheme, cloud.address.port()) };
        let mut gateway = Gateway::start(settings);
        gateway.publish("devices/m/v", "21.5", QoS::ExactlyOnce).await;
        let arrived = cloud.arrivals(|arrived| !arrived.is_empty()).await;
        assert_eq!(arrived, [("plant-7/devices/m/v".to_owned(), "21.5".to_owned())], "{scheme:?}");
        assert_eq!(proxy.tunnels.load(Ordering::Relaxed), 1, "{scheme:?}");
        gateway.drained().await;
        gateway.stop().await;
    }
}

#[tokio::test]
async fn a_proxy_that_refuses_is_told_from_an_upstream_that_does() {
    let cloud = Cloud::start_at(Scheme::Tls).await;
    let proxy = HttpProxy::to(cloud.address).await;
    let told = async |login: &str, port: u16, expected: &str| {
        let settings = Settings { proxy: proxy.url(login), ..cloud.upstream_at(Scheme::Tls, port) };
        let gateway = Gateway::start(settings);
        until("the reason is told", || gateway.reason().is_some()).await;
        let reason = gateway.reason().unwrap();
        assert!(reason.contains(expected) && !reason.contains("wrong"), "{reason}");
        gateway.stop().await;
    };
    let port = cloud.address.port();
    told("", port, "407 Proxy Authentication Required; it wants a login").await;
    told("me:wrong@", port, "check the password of the user `me` in `proxy`").await;
    told("me:p%40ss@", 1883, "refuses the way to localhost:1883: 403 Filtered; it does not let this gateway").await;
}
