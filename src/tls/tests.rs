//! Certificates that are made, shown, renewed and refused.

use super::explain::client_handshake;
use super::issue::{Authority, LOOPBACK_NAMES, Usage};
use super::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use crate::clock::{Clock, RELEASED};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

fn now() -> UnixMillis {
    Clock::start("test").now()
}

struct Place {
    directory: tempfile::TempDir,
    authority: Authority,
    server: ServerSettings,
}

fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::open(directory.path(), now()).unwrap();
    let server = authority.ensure("server", Usage::Server, &LOOPBACK_NAMES, now()).unwrap().server_settings();
    Place { directory, authority, server }
}

/// Shakes hands over an in-memory pipe and passes a byte both ways; the client's explanation on failure.
async fn handshake(server: &ServerTls, client: &ClientTls, host: &str) -> Result<(), String> {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let acceptor = TlsAcceptor::from(server.config());
    let serve = async move {
        let mut stream = acceptor.accept(far).await?;
        let byte = stream.read_u8().await?;
        stream.write_u8(byte).await?;
        stream.flush().await
    };
    let connector = TlsConnector::from(client.config());
    let name = client.settings().server_name(host).unwrap();
    let connect = async move {
        let mut stream = connector.connect(name, near).await?;
        stream.write_u8(7).await?;
        stream.flush().await?;
        stream.read_u8().await
    };
    let (_, connected) = tokio::join!(serve, connect);
    match connected {
        Ok(byte) => {
            assert_eq!(byte, 7);
            Ok(())
        }
        Err(error) => Err(client_handshake(&error, client.settings(), host)),
    }
}

fn trusting(ca: PathBuf) -> ClientSettings {
    ClientSettings { ca: Some(ca), ..ClientSettings::default() }
}

#[tokio::test]
async fn an_issued_certificate_is_accepted_by_every_loopback_name() {
    let place = place();
    let server = ServerTls::open(place.server).unwrap();
    let client = ClientTls::open(trusting(place.authority.certificate())).unwrap();
    for host in ["localhost", "127.0.0.1", "[::1]"] {
        assert_eq!(handshake(&server, &client, host).await, Ok(()), "{host}");
    }
}

#[tokio::test]
async fn a_failed_handshake_says_which_setting_to_change() {
    let place = place();
    let other = tempfile::tempdir().unwrap();
    let stranger = Authority::open(other.path(), now()).unwrap();
    let server = ServerTls::open(place.server.clone()).unwrap();
    let strict = ServerTls::open(ServerSettings {
        client_ca: Some(place.authority.certificate()),
        require_client_certificate: true,
        ..place.server.clone()
    })
    .unwrap();
    let trusts = |ca: &Authority| trusting(ca.certificate());
    let with_identity = |ca: &Authority| ClientSettings {
        identity: Some(ca.ensure("gateway", Usage::Client, &["gateway"], now()).unwrap().client_identity()),
        ..trusts(&place.authority)
    };
    let fails = async |server: &ServerTls, settings: ClientSettings, host: &str, expected: &str| {
        let error = handshake(server, &ClientTls::open(settings).unwrap(), host).await.unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    fails(&server, trusts(&stranger), "localhost", "authority that is not in").await;
    fails(&server, trusts(&place.authority), "example.org", "is not for the name `example.org` (it is for").await;
    fails(&strict, trusts(&place.authority), "localhost", "asks for a client certificate").await;
    fails(&strict, with_identity(&stranger), "localhost", "does not know the authority of our client certificate")
        .await;
    let accepted = ClientTls::open(with_identity(&place.authority)).unwrap();
    assert_eq!(handshake(&strict, &accepted, "localhost").await, Ok(()));
}

#[tokio::test]
async fn a_plain_port_is_told_apart_from_a_bad_certificate() {
    let place = place();
    let client = ClientTls::open(trusting(place.authority.certificate())).unwrap();
    let (near, mut far) = tokio::io::duplex(1024);
    far.write_all(b"\x20\x02\x00\x05 not TLS").await.unwrap();
    let name = client.settings().server_name("localhost").unwrap();
    let error = TlsConnector::from(client.config()).connect(name, near).await.unwrap_err();
    let said = client_handshake(&error, client.settings(), "localhost");
    assert!(said.contains("does not speak TLS on this port"), "{said}");
}

#[test]
fn bad_files_are_named_with_what_is_wrong_with_them() {
    let place = place();
    let path = |name: &str| place.directory.path().join(name);
    let client = place.authority.ensure("client", Usage::Client, &["client"], now()).unwrap();
    fs::write(path("empty.pem"), "").unwrap();
    fs::write(path("der.pem"), [0x30, 0x82, 1, 1]).unwrap();
    fs::write(path("torn.pem"), "-----BEGIN CERTIFICATE-----\nMII").unwrap();
    fs::write(path("junk.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    fs::write(path("locked.key"), "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
        .unwrap();
    fs::write(path("large.pem"), vec![b'x'; 1024 * 1024 + 1]).unwrap();
    let check = |certificate: PathBuf, key: PathBuf, expected: &str| {
        let settings = ServerSettings { certificate, key, client_ca: None, require_client_certificate: false };
        let error = ServerTls::open(settings).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let ServerSettings { certificate, key, .. } = place.server.clone();
    check(path("absent.pem"), key.clone(), "cannot read");
    check(
        path("empty.pem"),
        key.clone(),
        "empty.pem holds no certificate (a line `-----BEGIN CERTIFICATE-----`); it is empty",
    );
    check(path("der.pem"), key.clone(), "it looks like DER");
    check(path("torn.pem"), key.clone(), "torn.pem is not well-formed PEM");
    check(path("junk.pem"), key.clone(), "cannot be used");
    check(path("large.pem"), key.clone(), "larger than 1 MiB");
    check(key.clone(), certificate.clone(), "are the two files swapped?");
    check(certificate.clone(), certificate.clone(), "it holds a certificate, are the two files swapped?");
    check(certificate.clone(), path("locked.key"), "locked.key is encrypted");
    check(certificate.clone(), client.key, "does not belong to the certificate");
    let bad_ca = trusting(path("junk.pem"));
    assert!(ClientTls::open(bad_ca).unwrap_err().to_string().contains("certificate 1 of the file"));
}

#[tokio::test]
async fn a_renewed_certificate_is_used_and_a_bad_one_is_not() {
    let place = place();
    let server = ServerTls::open(place.server.clone()).unwrap();
    let client = ClientTls::open(trusting(place.authority.certificate())).unwrap();
    assert!(server.refresh().is_none());
    let first = server.config();

    fs::write(&place.server.certificate, "half a fi").unwrap();
    assert!(matches!(server.refresh(), Some(Err(TlsError::NoCertificate { .. }))));
    assert!(server.refresh().is_none(), "a bad file is reported once");
    assert!(Arc::ptr_eq(&first, &server.config()));
    assert_eq!(handshake(&server, &client, "localhost").await, Ok(()));

    place.authority.ensure("server", Usage::Server, &["renewed.example"], now()).unwrap();
    assert!(matches!(server.refresh(), Some(Ok(()))));
    assert_eq!(handshake(&server, &client, "renewed.example").await, Ok(()));
    assert!(handshake(&server, &client, "localhost").await.is_err());
}

#[test]
fn issued_files_are_kept_until_they_must_be_renewed() {
    let place = place();
    let read = || fs::read(&place.server.certificate).unwrap();
    let first = read();
    let ensure = |names: &[&str], now| place.authority.ensure("server", Usage::Server, names, now).unwrap();
    ensure(&LOOPBACK_NAMES, now());
    assert_eq!(read(), first, "still good");
    ensure(&["localhost", "plant-7.local"], now());
    let second = read();
    assert_ne!(second, first, "a name was missing");
    let later = UnixMillis(now().0 + i64::try_from(Duration::from_secs(750 * 86_400).as_millis()).unwrap());
    ensure(&["localhost"], later);
    assert_ne!(read(), second, "about to expire");

    let again = Authority::open(place.directory.path(), now()).unwrap();
    again.ensure("other", Usage::Server, &["localhost"], now()).unwrap();
    assert!(ClientTls::open(trusting(again.certificate())).is_ok());
    for (file, mode) in [("ca.key", 0o600), ("server.key", 0o600), ("ca.pem", 0o644)] {
        let found = fs::metadata(place.directory.path().join(file)).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, mode, "{file}");
    }
}

#[tokio::test]
async fn an_authority_that_was_loaded_signs_what_its_certificate_vouches_for() {
    let place = place();
    let again = Authority::open(place.directory.path(), now()).unwrap();
    let issued = again.ensure("second", Usage::Server, &["second.example"], now()).unwrap();
    let server = ServerTls::open(issued.server_settings()).unwrap();
    let client = ClientTls::open(trusting(place.authority.certificate())).unwrap();
    assert_eq!(handshake(&server, &client, "second.example").await, Ok(()));
}

#[test]
fn expiry_is_announced_in_time_and_not_by_a_clock_that_was_never_set() {
    let place = place();
    let server = ServerTls::open(place.server.clone()).unwrap();
    let end = server.expires_at().unwrap();
    let before = |duration: Duration| UnixMillis(end.0 - i64::try_from(duration.as_millis()).unwrap());
    assert_eq!(server.expiry_notice(before(EXPIRY_NOTICE + Duration::from_secs(1))), None);
    assert_eq!(server.expiry_notice(UnixMillis(0)), None);
    let notice = server.expiry_notice(before(Duration::from_secs(60))).unwrap();
    assert!(notice.contains("server.pem expires on 20"), "{notice}");
    let notice = server.expiry_notice(end).unwrap();
    assert!(notice.contains("server.pem expired on 20"), "{notice}");
}

#[test]
fn the_end_of_an_authority_is_announced_unless_others_outlast_it() {
    let directory = tempfile::tempdir().unwrap();
    let year = Duration::from_secs(365 * 86_400);
    let later = UnixMillis(now().0 + i64::try_from(year.as_millis()).unwrap());
    let old = Authority::open(&directory.path().join("old"), now()).unwrap();
    let new = Authority::open(&directory.path().join("new"), later).unwrap();
    let both = directory.path().join("both.pem");
    let text = |authority: &Authority| fs::read_to_string(authority.certificate()).unwrap();
    fs::write(&both, text(&new) + &text(&old)).unwrap();
    let client = ClientTls::open(trusting(both)).unwrap();
    let ends = |now| client.ends(now).collect::<Vec<_>>();
    let [("authority", end)] = ends(now())[..] else { panic!("a client without a certificate has authorities only") };
    assert_eq!(client.expiry_notice(now()), None);
    let notice = client.expiry_notice(UnixMillis(end.0 - 1)).unwrap();
    assert!(notice.contains("an authority in") && notice.contains("both.pem expires on 20"), "{notice}");
    assert_eq!(client.expiry_notice(UnixMillis(end.0 + 1)), None, "the new one is there");
    let [("authority", last)] = ends(UnixMillis(end.0 + 1))[..] else { panic!("the new one is left") };
    assert!(last.since(end) > year - Duration::from_secs(86_400));
    let notice = client.expiry_notice(UnixMillis(last.0 + 1)).unwrap();
    assert!(notice.contains("both.pem expired on 20") && notice.contains("add its successor"), "{notice}");
}

#[test]
fn a_certificate_made_before_the_clock_was_set_is_valid_once_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::open(directory.path(), UnixMillis(0)).unwrap();
    let issued = authority.ensure("server", Usage::Server, &LOOPBACK_NAMES, UnixMillis(0)).unwrap();
    let server = ServerTls::open(issued.server_settings()).unwrap();
    assert!(server.expires_at().unwrap().since(RELEASED) > Duration::from_secs(700 * 86_400));
}
