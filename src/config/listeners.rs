//! The section `listeners`, and the listeners' share of `limits`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::claims::{Claim, Resource};
use super::report::Report;
use super::scalar::{HostPort, Name, Size, words};
use super::table::Table;
use super::tls;
use crate::hub::access::{self, Anonymous};
use crate::listener::{Address, CertificateUser, Proxies, Redirect, Redirected, Settings, Transport};
use crate::proto::mqtt::server;
use crate::tls::ServerSettings;

words!(Transport, "a protocol", "mqtt" => Transport::Mqtt, "websockets" => Transport::WebSocket);

/// What `limits` says about connections.
pub(super) struct ConnectionLimits {
    pub max_connections: usize,
    pub limits: server::Settings,
}

pub(super) fn limits(table: &mut Table<'_>) -> ConnectionLimits {
    let defaults = server::Settings::default();
    let max_packet_size = table
        .value("max_packet_size", "The largest packet accepted from a client.")
        .range(Size(1024)..=Size::mib(256))
        .or(Size(u64::from(defaults.max_packet_size)));
    ConnectionLimits {
        max_connections: table
            .value("max_connections", "Connections of one listener at a time.")
            .range(1..=1_000_000)
            .or(10_000),
        limits: server::Settings {
            max_packet_size: u32::try_from(max_packet_size.0).unwrap_or(u32::MAX),
            receive_maximum: table
                .value("receive_maximum", "QoS 1 and 2 messages accepted from one client and not yet acknowledged.")
                .range(1..=u16::MAX)
                .or(defaults.receive_maximum),
            topic_alias_maximum: table
                .value("max_topic_alias", "Topic aliases that one client may set.")
                .or(defaults.topic_alias_maximum),
            connect_timeout: table
                .value("connect_timeout", "How long a client may take to say who it is, the TLS handshake included.")
                .range(Duration::from_secs(1)..=Duration::from_secs(300))
                .or(defaults.connect_timeout),
            max_keep_alive: table
                .value::<Duration>("max_keepalive", "The longest keep alive; clients may choose freely if absent.")
                .range(Duration::from_secs(1)..=Duration::from_secs(65_535))
                .optional()
                .map(|interval| u16::try_from(interval.as_secs()).unwrap_or(u16::MAX)),
            check_payload_format: table
                .value(
                    "check_payload_format",
                    "Whether a payload that its 5.0 client calls UTF-8 is refused if it is not.",
                )
                .or(defaults.check_payload_format),
        },
    }
}

/// What one listener says about its connections, where it differs from `limits`.
fn own_limits(table: &mut Table<'_>, all: &server::Settings) -> server::Settings {
    let max_packet_size = table
        .value("max_packet_size", "The largest packet accepted here, where it differs from `limits`.")
        .range(Size(1024)..=Size::mib(256))
        .or_else("that of `limits`", || Size(u64::from(all.max_packet_size)));
    let max_keep_alive = table
        .value::<Duration>("max_keepalive", "The longest keep alive here, where it differs from `limits`.")
        .range(Duration::from_secs(1)..=Duration::from_secs(65_535))
        .optional();
    server::Settings {
        max_packet_size: u32::try_from(max_packet_size.0).unwrap_or(u32::MAX),
        max_keep_alive: max_keep_alive.map_or(all.max_keep_alive, |interval| u16::try_from(interval.as_secs()).ok()),
        ..all.clone()
    }
}

/// The proxies through which clients come.
fn proxies(table: &mut Table<'_>) -> Option<Proxies> {
    let meaning = "Clients come through proxies that say where they are by the PROXY protocol; nobody else is served.";
    let wanted = table.value("proxy_protocol", meaning).or(false);
    let place = table.place_of("trusted_proxies");
    let trusted = table.values("trusted_proxies", "Addresses of the proxies; this machine if absent.");
    if let (Some(place), false) = (place, wanted) {
        let report = Report::error(place, "`trusted_proxies` has no meaning without `proxy_protocol`");
        table.report(report.help("add `proxy_protocol: true`, or remove the line"));
    }
    wanted.then(|| Proxies { trusted: trusted.into_iter().map(|range| range.value).collect() })
}

/// What of a certificate is the user name, if anything.
fn certificate_user(table: &mut Table<'_>, tls: Option<&ServerSettings>) -> Option<CertificateUser> {
    let keys = ["use_identity_as_username", "use_subject_as_username"];
    let places = keys.map(|key| table.place_of(key));
    let meaning = "The user name is the common name of the client's certificate; needs `tls` with `client_ca`.";
    let common_name = table.value(keys[0], meaning).or(false);
    let meaning = "The user name is the whole subject of the client's certificate, as in `CN=pump-1,O=Works`.";
    let subject = table.value(keys[1], meaning).or(false);
    let shown = tls.is_some_and(|tls| tls.client_ca.is_some() && tls.require_client_certificate);
    for (key, place, wanted) in [(keys[0], places[0], common_name), (keys[1], places[1], subject)] {
        if let (Some(place), true, false) = (place, wanted, shown) {
            let report = Report::error(place, format!("`{key}` needs clients that show a certificate"));
            table.report(report.help("add `client_ca:` to the listener's `tls`, and leave `require_certificate` on"));
        }
    }
    if let (true, true, Some(place)) = (common_name, subject, places[1]) {
        let report = Report::error(place, "a user has one name: either the common name or the whole subject");
        table.report(report.help("remove `use_identity_as_username` or `use_subject_as_username`"));
    }
    match (common_name, subject) {
        (true, _) => Some(CertificateUser::CommonName),
        (_, true) => Some(CertificateUser::Subject),
        _ => None,
    }
}

pub(super) fn listeners(table: &mut Table<'_>, limits: &ConnectionLimits, access: &access::Settings) -> Vec<Settings> {
    let mut names = Vec::new();
    let given = table.place_of("listeners").is_some();
    let listeners = table.list("listeners", "Where MQTT clients connect; 127.0.0.1:1883 if absent.", |table| {
        let name = table
            .value::<Name>("name", "Names the listener in the log and the UI.")
            .check(|name| match name.0.as_str() {
                "web" | "mqttsn" => Err("must be another name: this is what the gateway calls its own".into()),
                _ => Ok(()),
            })
            .required_at();
        names.extend(name.clone());
        let owner = format!("listener `{}`", name.as_ref().map_or("?", |name| &name.value.0));
        table.exactly_one(&["address", "unix"]);
        let tcp = table.value::<SocketAddr>("address", "Address and port; 0.0.0.0 or [::] for all interfaces.");
        let tcp = tcp.optional_at();
        let unix = table.value::<PathBuf>("unix", "The path of a Unix socket, instead of an address.").optional();
        let transport = table.value("protocol", "`websockets` is for browsers.").or(Transport::Mqtt);
        let tls = table.optional("tls", "Encrypt, with this certificate.", tls::server);
        let proxies = proxies(table);
        let certificate_user = certificate_user(table, tls.as_ref());
        let meaning = "From where clients may stay anonymous here, where it differs from that for all.";
        let anonymous = table.value("allow_anonymous", meaning).optional();
        let max_connections = table
            .value("max_connections", "Connections at a time, where it differs from `limits`.")
            .range(1..=1_000_000)
            .or_else("that of `limits`", || limits.max_connections);
        let redirect = redirect(table);
        if let Some(tcp) = &tcp {
            table.cx.claim(Claim { resource: Resource::TcpListen(tcp.value), place: tcp.span, owner });
            let shut = anonymous.unwrap_or(access.anonymous) != Anonymous::Always && certificate_user.is_none();
            let closed = access.users.is_empty() && shut;
            if closed && !tcp.value.ip().is_loopback() {
                let message = "there are no users, so clients on other machines will be refused";
                let help = "add `users:` (see `fieldgate passwd`), or `allow_anonymous: always` in a network you trust";
                table.report(Report::warning(tcp.span, message).help(help));
            }
        }
        let address = tcp.map(|tcp| Address::Tcp(tcp.value)).or(unix.map(Address::Unix));
        Some(Settings {
            name: name?.value.0,
            address: address?,
            transport,
            proxies,
            tls,
            certificate_user,
            anonymous,
            max_connections,
            limits: own_limits(table, &limits.limits),
            redirect,
        })
    });
    table.cx.unique("listeners", names.iter().map(|name| (name.value.0.as_str(), name.span)));
    if given {
        return listeners;
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1883));
    let owner = "the default listener".to_owned();
    table.cx.claim(Claim { resource: Resource::TcpListen(address), place: table.place, owner });
    let max_connections = limits.max_connections;
    vec![Settings { max_connections, limits: limits.limits.clone(), ..Settings::new("local", address) }]
}

fn redirect(table: &mut Table<'_>) -> Option<Redirect> {
    let meaning = "Another server, told to 5.0 clients that find all places taken.";
    let server = table.value::<HostPort>("server_reference", meaning).optional();
    let place = table.place_of("server_moved");
    let moved = table.value("server_moved", "Send every client to `server_reference`, for ever.").or(false);
    if let (Some(place), true, None) = (place, moved, &server) {
        let report = Report::error(place, "`server_moved` does not say where to");
        table.report(report.help("add `server_reference: HOST:PORT`"));
    }
    let whom = if moved { Redirected::Everybody } else { Redirected::Excess };
    server.map(|server| Redirect { server: server.to_string().into(), whom })
}
