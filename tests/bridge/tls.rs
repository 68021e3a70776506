//! What an upstream is shown over TLS, and certificates that are renewed while the gateway runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fieldgate::bridge::Settings;
use fieldgate::observe::{Health, Observe};
use fieldgate::tls::{ClientIdentity, ClientSettings, ServerSettings, ServerTls};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;

use super::peer::Peer;
use super::{Gateway, settings, until};

pub const DAY: Duration = Duration::from_secs(86_400);

/// An authority whose certificates end when a test says so.
pub struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = params(&[], 365 * DAY);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a certificate for `name` and its key, in place of those that were there.
    pub fn issue(&self, name: &str, lasts: Duration) -> ClientIdentity {
        let key = KeyPair::generate().unwrap();
        let made = params(&[name], lasts).signed_by(&key, &self.issuer).unwrap();
        let identity =
            ClientIdentity { certificate: self.file(&format!("{name}.pem")), key: self.file(&format!("{name}.key")) };
        replace(&identity.key, &key.serialize_pem());
        replace(&identity.certificate, &made.pem());
        identity
    }

    /// A server that asks for certificates of this authority.
    pub fn server(&self) -> ServerConfig {
        let ClientIdentity { certificate, key } = self.issue("localhost", 365 * DAY);
        let client_ca = Some(self.file("ca.pem"));
        let settings = ServerSettings { certificate, key, client_ca, require_client_certificate: true };
        ServerConfig::clone(&ServerTls::open(settings).unwrap().config())
    }

    fn client(&self, identity: &ClientIdentity) -> ClientSettings {
        ClientSettings {
            ca: Some(self.file("ca.pem")),
            identity: Some(identity.clone()),
            server_name: Some("localhost".into()),
            ..ClientSettings::default()
        }
    }
}

fn params(names: &[&str], lasts: Duration) -> CertificateParams {
    let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    params.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or("authority"));
    params.not_before = (SystemTime::now() - DAY).into();
    params.not_after = (SystemTime::now() + lasts).into();
    params
}

/// As tools that renew certificates do.
fn replace(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, text).unwrap();
    fs::rename(&beside, path).unwrap();
}

#[tokio::test]
async fn an_upstream_is_asked_for_by_name_and_protocol_and_shown_our_certificate() {
    let authority = Authority::new();
    let identity = authority.issue("plant-7", 365 * DAY);
    let mut server = authority.server();
    server.alpn_protocols = vec![b"http/1.1".to_vec(), b"x-amzn-mqtt-ca".to_vec()];
    let peer = Peer::bind_tls(Arc::new(server)).await;
    let tls = ClientSettings { alpn: vec!["x-amzn-mqtt-ca".into()], ..authority.client(&identity) };
    let gateway = Gateway::start(Settings { tls, ..settings(&peer) });
    let shown = peer.welcome(false, &[]).await.shown.unwrap();
    assert_eq!(shown.server_name.as_deref(), Some("localhost"), "not the address that is connected to");
    assert_eq!(shown.alpn.as_deref(), Some("x-amzn-mqtt-ca"));
    assert!(shown.certificate.is_some());
    gateway.stop().await;
}

#[tokio::test]
async fn a_server_that_refuses_our_certificate_after_the_handshake_is_not_taken_for_something_else() {
    let authority = Authority::new();
    let peer = Peer::bind_tls(Arc::new(authority.server())).await;
    let tls = ClientSettings { identity: None, ..authority.client(&authority.issue("plant-7", DAY)) };
    let gateway = Gateway::start(Settings { tls, ..settings(&peer) });
    // Often enough to try other versions, if that were thought to help.
    for _ in 0..3 {
        assert!(peer.try_accept().await.is_err());
    }
    until("the reason is told", || gateway.reason().is_some()).await;
    let reason = gateway.reason().unwrap();
    assert!(reason.contains("asks for a client certificate; name it and its key in `tls.certificate`"), "{reason}");
    gateway.stop().await;
}

#[tokio::test]
async fn a_certificate_that_expires_is_told_and_its_successor_is_shown_without_a_restart() {
    let authority = Authority::new();
    let identity = authority.issue("plant-7", 10 * DAY);
    let peer = Peer::bind_tls(Arc::new(authority.server())).await;
    let gateway = Gateway::start(Settings { tls: authority.client(&identity), ..settings(&peer) });
    let connection = peer.welcome(false, &[]).await;
    gateway.connected().await;
    let status = gateway.handle.statuses().remove(0);
    let reason = status.reason.unwrap();
    assert!(reason.contains("plant-7.pem expires on 20") && reason.contains("no restart is needed"), "{reason}");
    assert_eq!(status.health, Health::Degraded);
    let days_left = |whose: &str| {
        let mut metrics = fieldgate::observe::Metrics::default();
        gateway.handle.collect(&mut metrics);
        let start = "fieldgate_upstream_certificate_expiry_timestamp_seconds{upstream=\"cloud\",certificate=";
        let text = metrics.render();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{start}\"{whose}\"}} "))).unwrap();
        (line.parse::<f64>().unwrap() - gateway.hub.clock().now().0 as f64 / 1000.0) / 86_400.0
    };
    assert!((9.9..10.1).contains(&days_left("own")) && (364.9..365.1).contains(&days_left("authority")));

    authority.issue("plant-7", 90 * DAY);
    let first = connection.shown.clone().unwrap().certificate;
    drop(connection);
    let connection = peer.welcome(true, &[]).await;
    assert_ne!(connection.shown.unwrap().certificate, first);
    gateway.connected().await;
    let status = gateway.handle.statuses().remove(0);
    assert_eq!((status.reason, status.health), (None, Health::Good));
    assert!((89.9..90.1).contains(&days_left("own")));
    gateway.stop().await;
}
