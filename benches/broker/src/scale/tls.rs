//! What an idle TLS connection costs beyond what rustls itself holds, which a bare server with the same TLS library and
//! runtime shows.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::brokers::{Broker, Kind, free_port, mosquitto_basics};
use crate::client::{self, Session};
use crate::process;

type Client = StreamOwned<ClientConnection, TcpStream>;

pub fn run(fieldgate: &Path, connections: u32) {
    let directory = std::env::temp_dir().join(format!("fieldgate-bench-{}-tls", std::process::id()));
    fs::create_dir_all(&directory).expect("a directory");
    let made = rcgen::generate_simple_self_signed(["localhost".into()]).expect("a certificate");
    let (certificate, key) = (directory.join("certificate.pem"), directory.join("key.pem"));
    fs::write(&certificate, made.cert.pem()).expect("a certificate");
    fs::write(&key, made.signing_key.serialize_pem()).expect("a key");
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a root");
    let client = Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth());

    let bare = {
        let port = free_port();
        let mut server = Bare::start(port, &certificate, &key);
        let cost = per_connection(server.address, server.child.id(), connections, &client);
        server.child.kill().expect("the server is killed");
        server.child.wait().expect("the server ends");
        cost
    };
    println!("TLS, {connections} idle connections: bare rustls server {bare:.2} KiB each");
    for kind in [Kind::Mosquitto, Kind::Fieldgate] {
        let (certificate, key) = (certificate.display(), key.display());
        let broker = Broker::start_with(kind, fieldgate, |port, data| match kind {
            Kind::Fieldgate => format!(
                "gateway: {{ name: bench }}\nlog: {{ level: warn }}\nstore: {{ directory: \"{}\" }}\n\
                 limits: {{ max_connections: 20000 }}\nweb: {{ enabled: false }}\nlisteners:\n  \
                 - name: bench\n    address: \"127.0.0.1:{port}\"\n    \
                 tls: {{ certificate: \"{certificate}\", key: \"{key}\" }}\n",
                data.display()
            ),
            _ => format!("{}certfile {certificate}\nkeyfile {key}\n", mosquitto_basics(port)),
        });
        let cost = per_connection(broker.address, broker.pid(), connections, &client);
        let beyond =
            if kind == Kind::Fieldgate { format!(", {:.2} beyond rustls", cost - bare) } else { String::new() };
        println!("TLS, {connections} idle connections: {} {cost:.2} KiB each{beyond}", kind.name());
    }
    let _ = fs::remove_dir_all(&directory);
}

/// What each connection adds to the server's memory, in KiB.
fn per_connection(address: SocketAddr, pid: u32, connections: u32, config: &Arc<ClientConfig>) -> f64 {
    // What the first ones make the server allocate once is not theirs.
    let first: Vec<_> = (0..20).map(|number| connect(address, &format!("first{number}"), config)).collect();
    thread::sleep(Duration::from_millis(500));
    let before = process::rss_kib(pid);
    let clients: Vec<_> = (0..connections).map(|number| connect(address, &format!("idle{number}"), config)).collect();
    thread::sleep(Duration::from_secs(2));
    let after = process::rss_kib(pid);
    drop((first, clients));
    (after - before) as f64 / f64::from(connections)
}

fn connect(address: SocketAddr, client_id: &str, config: &Arc<ClientConfig>) -> Client {
    let stream = TcpStream::connect(address).expect("a client connects");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket");
    let name = ServerName::try_from("localhost").expect("a name");
    let tls = ClientConnection::new(config.clone(), name).expect("a connection");
    let mut client = StreamOwned::new(tls, stream);
    client::log_in(&mut client, client_id, Session::Clean).expect("CONNACK");
    client
}

/// The bare server as a process of its own.
struct Bare {
    child: Child,
    address: SocketAddr,
}

impl Bare {
    fn start(port: u16, certificate: &Path, key: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["bare-tls", &port.to_string()]).arg(certificate).arg(key).stdin(Stdio::null());
        let child = command.spawn().expect("this program starts");
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "the bare server does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Self { child, address }
    }
}

/// Shakes hands, answers one CONNECT, and then only holds the connection.
pub fn serve_bare(port: u16, certificate: &str, key: &str) {
    let chain = CertificateDer::pem_file_iter(certificate).expect("a file").collect::<Result<_, _>>().expect("PEM");
    let key = PrivateKeyDer::from_pem_file(key).expect("a key");
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a port");
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // Boxed, as what a handshake needs should not be counted to an idle connection.
                let Ok(mut stream) = Box::pin(acceptor.accept(stream)).await else { return };
                let mut some = [0; 64];
                let _ = stream.read(&mut some).await;
                let _ = stream.write_all(&[0x20, 2, 0, 0]).await;
                let _ = stream.flush().await;
                while stream.read(&mut some).await.is_ok_and(|read| read > 0) {}
            });
        }
    });
}
