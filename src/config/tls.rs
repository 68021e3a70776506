//! The tables `tls` of listeners, the web UI and upstreams.

use std::path::PathBuf;

use super::report::Report;
use super::table::Table;
use crate::supervise::describe;
use crate::tls::{ClientIdentity, ClientSettings, ClientTls, ServerSettings, ServerTls};

/// What a TLS server needs. The files are opened, so that a wrong one is found now and not at the first restart.
pub(super) fn server(table: &mut Table<'_>) -> Option<ServerSettings> {
    let meaning = "PEM file with the server's certificate, then its intermediates; read again when it changes.";
    let certificate = table.value::<PathBuf>("certificate", meaning).required_at();
    let key = table.value::<PathBuf>("key", "PEM file with the certificate's private key.").required();
    let meaning = "PEM file with the authorities whose client certificates are accepted; none are asked for if absent.";
    let client_ca = table.value::<PathBuf>("client_ca", meaning).optional();
    let meaning = "Refuse clients that show no certificate; needs `client_ca`.";
    let require_place = table.place_of("require_certificate");
    let require = table.value("require_certificate", meaning).or_else("true with `client_ca`", || client_ca.is_some());
    if let (Some(place), true, None) = (require_place, require, &client_ca) {
        let report = Report::error(place, "`require_certificate` needs `client_ca`");
        table.report(report.help("add `client_ca:` with the authorities to accept"));
    }
    let place = certificate.as_ref()?.span;
    let settings =
        ServerSettings { certificate: certificate?.value, key: key?, client_ca, require_client_certificate: require };
    if let Err(error) = ServerTls::open(settings.clone()) {
        table.report(Report::error(place, "the certificate cannot be used").label(describe(&error)));
    }
    Some(settings)
}

/// What a TLS connection to an upstream needs; absent means the system's authorities and no client certificate.
pub(super) fn client(table: &mut Table<'_>) -> ClientSettings {
    let meaning = "PEM file with the authorities to trust, in place of the system's.";
    let ca = table.value::<PathBuf>("ca", meaning).optional();
    let (certificate_place, key_place) = (table.place_of("certificate"), table.place_of("key"));
    let meaning = "PEM file with the client certificate by which the gateway proves who it is.";
    let certificate = table.value::<PathBuf>("certificate", meaning).optional();
    let key = table.value::<PathBuf>("key", "PEM file with the client certificate's private key.").optional();
    let lone = match (certificate_place, key_place) {
        (Some(place), None) => Some((place, "`certificate` needs its `key`")),
        (None, Some(place)) => Some((place, "`key` needs its `certificate`")),
        _ => None,
    };
    if let Some((place, message)) = lone {
        table.report(Report::error(place, message));
    }
    let meaning = "The name to ask for and to check, in place of the host.";
    let server_name = table.value::<String>("server_name", meaning).optional();
    let alpn = table.values::<String>("alpn", "Application protocols to offer; most brokers want none.");
    let settings = ClientSettings {
        ca,
        identity: certificate.zip(key).map(|(certificate, key)| ClientIdentity { certificate, key }),
        server_name,
        alpn: alpn.into_iter().map(|alpn| alpn.value).collect(),
    };
    let has_files = settings.ca.is_some() || settings.identity.is_some();
    if let Some(error) = has_files.then(|| ClientTls::open(settings.clone()).err()).flatten() {
        // One upstream's certificate is no reason for all of the gateway not to start: it is tried again and again.
        let report = Report::warning(table.place, "these TLS files cannot be used").label(describe(&error));
        table.report(report.help("the gateway starts, and this upstream connects once they can be used"));
    }
    settings
}
