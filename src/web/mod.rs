//! The local web UI: an HTTP API, the pages that use it, live events and metrics.
//!
//! Not a way into the field of its own: it looks at components through [`Observe`] and [`Controls`], sees values as a
//! session on the hub, and sends commands as messages, like every other face. The API is described in `api.md` beside
//! this file; it is HTTP/1.1 (RFC 9112) with JSON and server-sent events.
//!
//! | module | what |
//! | --- | --- |
//! | `serve` | connections: accept, TLS, limits, shutdown |
//! | `guard` | who may ask: loopback, login, origin; headers of every answer |
//! | `api` `pages` | what is answered |
//! | `live` | values from the hub, commands to it |
//! | `feed` `ticker` | live events and what is sampled for them |
//! | `values` `uplinks` `logins` | state of the web floor itself |
//! | [`log`] | the last log lines |

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::info;

use crate::clock::{Clock, UnixMillis};
use crate::hub::Hub;
use crate::observe::{Health, Kind, Metrics, Observe, Status};
use crate::secret::Secret;
use crate::throttle::{AddressLimits, Guesses};
use crate::tls::{ServerSettings, ServerTls, TlsError};

mod api;
mod error;
mod feed;
mod guard;
mod live;
pub mod log;
mod logins;
mod pages;
mod serve;
mod ticker;
mod uplinks;
mod values;
mod views;

pub use uplinks::{Backlog, Depth};
pub use views::{ControlError, Controls, Switch, Upstream};

/// Passwords checked at a time: argon2id takes 19 MiB and some 50 ms of a core for each.
const MAX_PASSWORD_CHECKS: usize = 1;

/// Wrong passwords before an address has to wait. A person guesses slower than a device that was set up wrong, and the
/// one should not wait for the other: the clients' wrong passwords are counted apart.
const FREE_GUESSES: u32 = 2;

/// Where and how the web UI is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// On a loopback address nobody has to log in; on any other everybody has to.
    pub address: SocketAddr,
    /// HTTPS with this certificate; plain HTTP without.
    pub tls: Option<ServerSettings>,
    /// Who shows this token may read `/metrics` without a login.
    pub metrics_token: Option<Secret>,
}

/// What the web UI looks at.
#[derive(Clone)]
pub struct Parts {
    /// The gateway's name.
    pub gateway: Arc<str>,
    pub hub: Hub,
    pub log: log::LogRing,
    pub controls: Arc<dyn Controls>,
}

/// The web UI with its port open, not yet serving.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Arc<ServerTls>>,
    app: Arc<App>,
}

/// Why the web UI cannot start.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("it cannot listen; choose another address with `web: {{ address: … }}`")]
    Address(#[source] io::Error),
    #[error("its certificate cannot be used")]
    Tls(#[from] TlsError),
}

impl Server {
    /// Opens the port and reads the certificate; serves nothing yet.
    ///
    /// # Errors
    /// [`BindError`], for an address that is taken or not ours and for files that hold no usable certificate or key.
    pub async fn bind(settings: Settings, parts: Parts) -> Result<Self, BindError> {
        let tls = settings.tls.map(ServerTls::open).transpose()?;
        let listener = TcpListener::bind(settings.address).await.map_err(BindError::Address)?;
        let address = listener.local_addr().map_err(BindError::Address)?;
        let limits = parts.hub.limits().addresses.clone();
        let app = App {
            address,
            has_tls: tls.is_some(),
            metrics_token: settings.metrics_token,
            since: parts.hub.clock().now(),
            feed: feed::Feed::new(parts.hub.clock().boot_id()),
            parts,
            values: values::Values::default(),
            logins: logins::Logins::default(),
            guesses: Guesses::new(AddressLimits { login_failures: FREE_GUESSES, limit_loopback: true, ..limits }),
            samples: Mutex::default(),
            password_checks: Semaphore::new(MAX_PASSWORD_CHECKS),
            counters: Counters::default(),
        };
        Ok(Self { listener, address, tls: tls.map(Arc::new), app: Arc::new(app) })
    }

    /// Where it listens, with the port that the system chose if that was left to it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where to point a browser on this machine.
    pub fn url(&self) -> String {
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv6() {
                std::net::Ipv6Addr::LOCALHOST.into()
            } else {
                std::net::Ipv4Addr::LOCALHOST.into()
            });
        }
        format!("{}://{address}/", if self.tls.is_some() { "https" } else { "http" })
    }

    /// What the web UI tells about itself.
    pub fn observe(&self) -> Arc<dyn Observe> {
        self.app.clone()
    }

    /// What reads the certificate again, at once, for connections that are yet to come.
    pub fn certificate(&self) -> impl Fn() + Send + Sync + 'static {
        let tls = self.tls.clone();
        move || {
            if let Some(tls) = &tls {
                tls.refresh_and_log("web");
            }
        }
    }

    /// Serves until `shutdown`; then ends live streams, lets requests under way finish for a moment, and returns.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        info!(address = %self.address, tls = self.tls.is_some(), "serving the web UI");
        let Self { listener, tls, app, .. } = self;
        let router = api::router(app.clone());
        let watch_files = async {
            if let Some(tls) = &tls {
                tls.watch("web", shutdown.clone()).await;
            }
        };
        let serve = serve::serve(listener, tls.as_deref(), router, &app, shutdown.clone());
        tokio::join!(serve, ticker::run(&app, shutdown.clone()), live::run(&app, shutdown.clone()), watch_files);
    }
}

/// What every request and the ticker share.
struct App {
    address: SocketAddr,
    has_tls: bool,
    metrics_token: Option<Secret>,
    since: UnixMillis,
    parts: Parts,
    feed: feed::Feed,
    values: values::Values,
    logins: logins::Logins,
    guesses: Guesses,
    samples: Mutex<ticker::Samples>,
    password_checks: Semaphore,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    requests: std::sync::atomic::AtomicU64,
    connections: std::sync::atomic::AtomicU64,
    refused_connections: std::sync::atomic::AtomicU64,
    failed_logins: std::sync::atomic::AtomicU64,
    commands: std::sync::atomic::AtomicU64,
}

impl App {
    fn clock(&self) -> &Clock {
        self.parts.hub.clock()
    }
}

impl Observe for App {
    fn statuses(&self) -> Vec<Status> {
        let (listeners, _) = self.feed.counts();
        vec![Status {
            kind: Kind::Listener,
            name: "web".to_owned(),
            parent: None,
            health: Health::Good,
            reason: None,
            since: self.since,
            facts: vec![
                ("address", self.address.to_string()),
                ("protocol", if self.has_tls { "HTTPS" } else { "HTTP" }.to_owned()),
                ("live views", listeners.to_string()),
            ],
        }]
    }

    fn collect(&self, metrics: &mut Metrics) {
        use std::sync::atomic::Ordering::Relaxed;
        let Counters { requests, connections, refused_connections, failed_logins, commands } = &self.counters;
        let (listeners, dropped) = self.feed.counts();
        metrics.counter("fieldgate_web_requests_total", "HTTP requests.", &[], requests.load(Relaxed));
        metrics.gauge("fieldgate_web_connections", "Open connections.", &[], connections.load(Relaxed) as f64);
        let help = "Connections closed at once because of a limit.";
        metrics.counter("fieldgate_web_refused_connections_total", help, &[], refused_connections.load(Relaxed));
        metrics.counter("fieldgate_web_failed_logins_total", "Wrong passwords.", &[], failed_logins.load(Relaxed));
        metrics.counter("fieldgate_web_commands_total", "Points set by hand.", &[], commands.load(Relaxed));
        metrics.gauge("fieldgate_web_live_views", "Browsers with a live view.", &[], listeners as f64);
        let help = "Live views that were too slow and were dropped.";
        metrics.counter("fieldgate_web_live_views_dropped_total", help, &[], dropped);
    }
}
