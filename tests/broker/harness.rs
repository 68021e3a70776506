//! A broker in this process, and peers that send and expect bytes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fieldgate::clock::Clock;
use fieldgate::hub::{self, Hub};
use fieldgate::listener::{Address, Listener, Settings};
use fieldgate::observe::{Metrics, Observe};
use fieldgate::store::{self, Store};
use fieldgate::tls::ServerSettings;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Long enough for a busy machine; a test that works never waits for it.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Broker {
    pub address: Address,
    pub hub: Hub,
    pub observe: Arc<dyn Observe>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Broker {
    pub async fn start() -> Self {
        Self::start_with(|_| {}, hub::Settings::default(), None).await
    }

    /// With its store in `directory`.
    pub async fn start_in(directory: &Path) -> Self {
        Self::start_with(|_| {}, hub::Settings::default(), Some(directory)).await
    }

    pub async fn start_with(
        change: impl FnOnce(&mut Settings),
        hub_settings: hub::Settings,
        directory: Option<&Path>,
    ) -> Self {
        let clock = Clock::start("test");
        let store = directory.map(|path| Store::bind(store::Settings::new(path), clock.clone()).unwrap());
        let hub = Hub::new(hub_settings, clock, store).unwrap();
        let mut settings = Settings::new("test", "127.0.0.1:0".parse().unwrap());
        change(&mut settings);
        let listener = Listener::bind(settings, hub.clone()).await.unwrap();
        let (address, observe) = (listener.address().clone(), listener.observe());
        let (stop, shutdown) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(listener.run(shutdown.clone()));
        let running = hub.clone();
        tasks.spawn(async move { running.run(shutdown).await });
        Self { address, hub, observe, stop, tasks }
    }

    /// Tells everything to stop and waits for it.
    pub async fn stop(mut self) {
        self.begin_stop();
        while let Some(ended) = timeout(PATIENCE, self.tasks.join_next()).await.expect("a stop in time") {
            ended.unwrap();
        }
        if let Some(store) = self.hub.store() {
            store.clone().close();
        }
    }

    pub fn begin_stop(&self) {
        self.stop.send(true).unwrap();
    }

    /// The value of one sample of the listener's or the hub's metrics, named with its labels.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let mut metrics = Metrics::default();
        self.observe.collect(&mut metrics);
        self.hub.collect(&mut metrics);
        let text = metrics.render();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    pub fn port(&self) -> u16 {
        let Address::Tcp(address) = self.address else { panic!("not a TCP listener") };
        address.port()
    }

    pub async fn open(&self) -> Peer<TcpStream> {
        let stream = TcpStream::connect(("127.0.0.1", self.port())).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Peer { stream }
    }

    /// A clean session of 3.1.1.
    pub async fn connect_3(&self, client_id: &str) -> Peer<TcpStream> {
        let mut peer = self.open().await;
        peer.send(&connect(client_id, 4, 0x02)).await;
        peer.expect("20 02 00 00").await;
        peer
    }

    /// A clean session of 5.0.
    pub async fn connect_5(&self, client_id: &str) -> Peer<TcpStream> {
        let mut peer = self.open().await;
        peer.send(&connect(client_id, 5, 0x02)).await;
        peer.expect(CONNACK_5).await;
        peer
    }
}

/// The answer to a CONNECT of 5.0 that asked for nothing: receive maximum, maximum packet size, topic alias maximum.
pub const CONNACK_5: &str = "20 0E 00 00 0B 21 0400 27 00100000 22 000A";

/// A CONNECT with a keep alive of 60 seconds and nothing else.
pub fn connect(client_id: &str, level: u8, flags: u8) -> String {
    let properties = if level == 5 { "00" } else { "" };
    let length = 12 + client_id.len() + usize::from(level == 5);
    format!(
        r#"10 {length:02X} 0004 "MQTT" {level:02X} {flags:02X} 003C {properties} {:04X} "{client_id}""#,
        client_id.len()
    )
}

/// A connection that speaks in scripts: hex digits and "text", blanks for the reader.
pub struct Peer<S> {
    pub stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    pub async fn send(&mut self, script: &str) {
        self.stream.write_all(&bytes(script)).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// Reads exactly these bytes.
    #[track_caller]
    pub fn expect(&mut self, script: &str) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        let expected = bytes(script);
        async move {
            let mut got = Vec::new();
            while got.len() < expected.len() {
                let mut more = vec![0; expected.len() - got.len()];
                let read = timeout(PATIENCE, self.stream.read(&mut more)).await;
                match read {
                    Ok(Ok(count)) if count > 0 => got.extend_from_slice(&more[..count]),
                    ended => panic!("{caller}: {ended:?} after {}, expected {}", hex(&got), hex(&expected)),
                }
                assert!(expected.starts_with(&got), "{caller}: got {}, expected {}", hex(&got), hex(&expected));
            }
        }
    }

    /// Nothing has come that was not expected: the answers to two PINGREQs are next. One may overtake a message that is
    /// on its way, two cannot.
    #[track_caller]
    pub fn expect_nothing(&mut self) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            for _ in 0..2 {
                self.send("C0 00").await;
                let mut got = [0; 2];
                timeout(PATIENCE, self.stream.read_exact(&mut got)).await.expect("an answer").unwrap();
                assert_eq!(got, [0xD0, 0], "{caller}");
            }
        }
    }

    /// The peer closes, after a DISCONNECT or CONNACK with `reason` where it is given.
    #[track_caller]
    pub fn expect_close(&mut self, reason: Option<u8>) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            let mut rest = Vec::new();
            let read = timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.expect("a close in time");
            if let Some(reason) = reason {
                read.unwrap();
                let at = if rest.first() == Some(&0x20) { 3 } else { 2 };
                assert_eq!(rest.get(at), Some(&reason), "{caller}: {}", hex(&rest));
            } else {
                assert!(rest.is_empty(), "{caller}: {}", hex(&rest));
            }
        }
    }
}

/// Makes a certificate for `localhost` and puts it into `directory`.
pub fn certificate_in(directory: &Path) -> ServerSettings {
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let (certificate, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    std::fs::write(&certificate, issued.cert.pem()).unwrap();
    std::fs::write(&key, issued.signing_key.serialize_pem()).unwrap();
    ServerSettings { certificate, key, client_ca: None, require_client_certificate: false }
}

/// TLS with a server that has the certificate of [`certificate_in`].
pub async fn over_tls(tcp: TcpStream, directory: &Path) -> TlsStream<TcpStream> {
    over_tls_of(tcp, directory, rustls::ALL_VERSIONS).await
}

/// As [`over_tls`], with these versions only.
pub async fn over_tls_of(
    tcp: TcpStream,
    directory: &Path,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(directory.join("cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap()
}

pub fn bytes(script: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, part) in script.split('"').enumerate() {
        if index % 2 == 1 {
            out.extend_from_slice(part.as_bytes());
            continue;
        }
        let digits: String = part.split_whitespace().collect();
        out.extend((0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()));
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X} ")).collect()
}
