//! The section `web`.

use std::net::{Ipv4Addr, SocketAddr};

use super::claims::{Claim, Resource};
use super::report::Report;
use super::table::Table;
use super::tls;
use crate::secret::Secret;
use crate::web::Settings;

/// `None` when the web UI is switched off.
pub(super) fn web(table: &mut Table<'_>, has_users: bool) -> Option<Settings> {
    table.table("web", "The web UI, its API and `/metrics`.", |table| {
        let enabled = table.value("enabled", "Whether there is a web UI at all.").or(true);
        let place = table.place_of("address");
        let address = table
            .value("address", "Where it listens; on any other address than loopback a login is needed.")
            .or(SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)));
        let tls = table.optional("tls", "HTTPS instead of HTTP.", tls::server);
        let meaning =
            "With this token, as `Authorization: Bearer TOKEN`, Prometheus may read `/metrics` from elsewhere.";
        let metrics_token = table.value::<Secret>("metrics_token", meaning).check(long_enough).optional();
        if !enabled {
            return None;
        }
        let claim = Claim {
            resource: Resource::TcpListen(address),
            place: place.unwrap_or(table.place),
            owner: "the web UI".into(),
        };
        table.cx.claim(claim);
        if let (Some(place), false, false) = (place, has_users, address.ip().is_loopback()) {
            let report = Report::error(place, "the web UI would be open to the network, and there are no users");
            table.report(report.help("add `users:` (see `fieldgate passwd`), or listen on 127.0.0.1"));
        }
        Some(Settings { address, tls, metrics_token })
    })
}

/// It can be guessed at any speed.
fn long_enough(token: &Secret) -> Result<(), String> {
    match token.reveal().len() {
        0..16 => Err("must have at least 16 characters; `openssl rand -hex 16` makes one".into()),
        _ => Ok(()),
    }
}
