//! MQTT-SN over UDP: one socket, one task, and for each client a session on the hub.
//!
//! What the protocol is stands in [`proto::mqttsn`](crate::proto::mqttsn); here datagrams come in and go out, timers
//! run, and sessions are served. An acknowledgement is sent after the hub has taken up, and where it must survive
//! journaled, what it is for.

mod report;
mod sessions;
mod settings;
mod wakes;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, error, info, warn};

use self::report::Report;
use self::sessions::Sessions;
use self::wakes::Wakes;
use crate::hub::Hub;
use crate::observe::Observe;
use crate::proto::mqttsn::action::{Action, LostCause, Notice};
use crate::proto::mqttsn::gateway::Gateway;

pub use self::settings::{Advertise, MAX_DATAGRAM_BYTES, PublishWithoutConnect, Settings};

/// Datagrams read before their answers are sent.
const MAX_BATCH: usize = 64;
/// How long the farewell to the clients may take.
const MAX_FAREWELL: Duration = Duration::from_millis(200);
/// A pause after the socket failed, so that a lasting fault does not fill the log.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(200);

/// Why the gateway cannot listen.
#[derive(Debug, Error)]
pub enum BindError {
    #[error(
        "it cannot listen; is another program using the port, or does `mqttsn.address` not belong to this machine?"
    )]
    Listen(#[source] io::Error),
}

/// An MQTT-SN gateway that has its socket and is not yet running.
#[derive(Debug)]
pub struct Sensornet {
    settings: Arc<Settings>,
    hub: Hub,
    socket: UdpSocket,
    report: Arc<Report>,
}

/// Opens the socket.
///
/// # Errors
/// [`BindError::Listen`] when the operating system refuses the address. A multicast group that cannot be joined is
/// logged and shown as the gateway's trouble: clients that know the address are served.
pub async fn bind(settings: Settings, hub: Hub) -> Result<Sensornet, BindError> {
    let socket = UdpSocket::bind(settings.address).await.map_err(BindError::Listen)?;
    let address = socket.local_addr().map_err(BindError::Listen)?;
    let trouble = settings.advertise.and_then(|advertise| {
        let error = prepare_advertising(&socket, advertise.to).err()?;
        warn!(to = %advertise.to, %error, "MQTT-SN gateway cannot advertise itself");
        Some(format!("cannot advertise to {}: {error}; check `mqttsn.advertise` and the network", advertise.to))
    });
    let report = Arc::new(Report::new(address, hub.clock().now(), trouble));
    Ok(Sensornet { settings: Arc::new(settings), hub, socket, report })
}

impl Sensornet {
    /// Where clients send to, with the port that was chosen for port 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.report.address()
    }

    pub fn observe(&self) -> Arc<dyn Observe> {
        self.report.clone()
    }

    /// Serves clients until `shutdown`; then tells them and lets their sessions go without a will.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) {
        let Self { settings, hub, socket, report } = self;
        // Topic ids begin somewhere else after each start; where there is no randomness, the first will do.
        let seed = getrandom::u32().map_or(1, |random| (random & 0x7FFF) as u16 + 1);
        let gateway =
            Gateway::new(settings.to_gateway(hub.limits().addresses.clone()), seed, Instant::now().into_std());
        info!(address = %report.address(), gateway_id = settings.gateway_id, "MQTT-SN gateway is listening");
        let wakes = Wakes::default();
        let sessions = Sessions::new(hub, settings.clone(), wakes.clone());
        let mut server = Server { settings, socket, report, gateway, sessions, outbox: Vec::new(), send_errors: 0 };
        // The longest datagram there is: one that is cut off would look like one with a wrong length.
        let mut buffer = vec![0; usize::from(u16::MAX)];
        while !*shutdown.borrow() {
            let deadline = server.gateway.poll_timeout().map(Instant::from_std);
            tokio::select! {
                changed = shutdown.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                received = server.socket.recv_from(&mut buffer) => server.receive(received, &mut buffer).await,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    server.gateway.handle_timeout(Instant::now().into_std());
                }
                () = wakes.woken() => server.sessions.attend(&mut server.gateway, Instant::now().into_std()),
            }
            server.settle().await;
        }
        server.close().await;
    }
}

#[derive(Debug)]
struct Server {
    settings: Arc<Settings>,
    socket: UdpSocket,
    report: Arc<Report>,
    gateway: Gateway,
    sessions: Sessions,
    outbox: Vec<(SocketAddr, Vec<u8>)>,
    send_errors: u64,
}

impl Server {
    /// Takes in a datagram and those that wait behind it.
    async fn receive(&mut self, first: io::Result<(usize, SocketAddr)>, buffer: &mut [u8]) {
        let mut received = first;
        for _ in 0..MAX_BATCH {
            match received {
                Ok((length, from)) => {
                    self.gateway.handle(from, &buffer[..length], Instant::now().into_std());
                    self.act();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // What the network says about something sent earlier; the socket itself is fine.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => {
                    warn!(%error, "MQTT-SN socket failed to receive");
                    return sleep(PAUSE_AFTER_ERROR).await;
                }
            }
            received = self.socket.try_recv_from(buffer);
        }
    }

    /// Does everything the protocol wants done, except sending.
    fn act(&mut self) {
        let now = Instant::now().into_std();
        while let Some(action) = self.gateway.poll_action() {
            match action {
                Action::Send { to, datagram } => self.outbox.push((to, datagram)),
                Action::Broadcast { datagram } => {
                    self.outbox.extend(self.settings.advertise.map(|advertise| (advertise.to, datagram)));
                }
                Action::Client { key, request } => self.sessions.serve(key, request, &mut self.gateway, now),
                Action::PublishConnectionless { from, topic, payload, retain } => {
                    if !self.sessions.publish_connectionless(from.ip(), &topic, payload, retain) {
                        debug!(%from, %topic, "message without a connection is not allowed by the access rules");
                    }
                }
                Action::Notice(notice) => log(&notice),
            }
        }
    }

    /// Routes what was published, then sends what was answered.
    async fn settle(&mut self) {
        self.act();
        self.sessions.flush();
        for (to, datagram) in self.outbox.drain(..) {
            if let Err(error) = self.socket.send_to(&datagram, to).await {
                self.send_errors += 1;
                debug!(%to, bytes = datagram.len(), %error, "MQTT-SN datagram was not sent");
            }
        }
        self.report.update(self.gateway.counters(), self.gateway.states(), self.send_errors);
    }

    async fn close(&mut self) {
        self.sessions.close();
        let now = Instant::now().into_std();
        for key in self.gateway.keys() {
            self.gateway.evicted(key, now);
        }
        if timeout(MAX_FAREWELL, self.settle()).await.is_err() {
            debug!("not every MQTT-SN client could be told that the gateway stops");
        }
    }
}

fn prepare_advertising(socket: &UdpSocket, to: SocketAddr) -> io::Result<()> {
    match to.ip() {
        IpAddr::V4(group) if group.is_multicast() => socket.join_multicast_v4(group, Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(group) if group.is_multicast() => socket.join_multicast_v6(&group, 0),
        IpAddr::V4(_) => socket.set_broadcast(true),
        IpAddr::V6(_) => Ok(()),
    }
}

fn log(notice: &Notice) {
    match notice {
        Notice::Lost { client_id, cause } => {
            let why = match cause {
                LostCause::KeepAlive => "it was silent for longer than its keep alive",
                LostCause::Sleep => "it did not wake up in time",
                LostCause::Retries => "it did not acknowledge what it was sent",
            };
            warn!(client = %client_id, why, "MQTT-SN client is lost");
        }
        Notice::TooBig { client_id, topic, bytes } => {
            error!(
                client = %client_id, %topic, bytes,
                "message given up: longer than `mqttsn.max_packet_size`; further ones for this client are counted only"
            );
        }
        Notice::TopicsExhausted { client_id, topic } => {
            error!(
                client = %client_id, %topic,
                "message given up: the client has as many topic ids as `mqttsn.max_topics_per_client` allows; \
                 further ones are counted only"
            );
        }
    }
}
