//! One connection: its task, its turns, its end.
//!
//! A turn does everything there is to do now: write what is left, read once into a buffer of the thread, route all
//! complete packets of it together, take what the session has to send, write it at once. What cannot be finished stays
//! with the connection; an idle connection holds no buffer.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at};
use tracing::{debug, info};

use super::accept::{Accepted, admit};
use super::counters::{Admitted, Counted};
use super::login::{self, LoggedIn};
use super::output::{Output, Unwritten};
use super::stream::Stream;
use super::{CertificateUser, Redirect, Redirected, Shared, Transport};
use crate::hub::{Fate, Link, Outbound};
use crate::proto::mqtt::server::{Accept, ConnectRequest, Expiry, Server};
use crate::proto::mqtt::{ProtocolError, ReasonCode};
use crate::store::Receipt;
use crate::tls::{common_name, subject};
use crate::websocket::WebSocket;

/// The buffer one read goes into.
const INPUT_BYTES: usize = 64 * 1024;
/// The beginning of a packet up to this size is put in front of the next read; a longer one collects what is read.
const CARRIED_BYTES: usize = 8 * 1024;
/// How much a connection may read and write before its neighbours have their turn.
const TURN_BYTES: usize = 256 * 1024;
/// Packets are collected up to this size before they are written.
const WRITE_BYTES: usize = 64 * 1024;
/// A connection whose peer has not taken this much is not read from: what it sends makes more to write.
const MAX_UNWRITTEN_BYTES: usize = 256 * 1024;
/// How long the last words may take to be sent, and the peer to close after them.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a 3.x client waits whose message a full queue has refused: it can only be closed on, will connect again and
/// send the same.
const REFUSAL_PAUSE: Duration = Duration::from_secs(1);

/// Buffers that the connections of a thread take turns with.
pub(super) struct Scratch {
    input: Box<[u8]>,
    pub output: Output,
    pub outbound: Vec<Outbound>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        input: vec![0; INPUT_BYTES].into(),
        output: Output::default(),
        outbound: Vec::new(),
    });
}

/// One connection after its handshakes.
pub(super) struct Connection {
    pub shared: Arc<Shared>,
    stream: Stream,
    pub server: Server<Arc<Receipt>>,
    /// Some from the CONNACK on.
    pub link: Option<Link>,
    /// The beginning of a packet, or packets that wait for their turn.
    leftover: Vec<u8>,
    /// There may be complete packets in `leftover`.
    reparse: bool,
    unwritten: Unwritten,
    /// The session may have something to send.
    pub hungry: bool,
    /// A bridge with 3.1.1 has not said yet whether it is a gateway, which it does before anything else; until then it gets
    /// nothing that it may have had. See [`crate::via`].
    pub awaits_introduction: bool,
    /// Whom the publishes of this connection have to wait for.
    pressure: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    timer: Option<Pin<Box<Sleep>>>,
    stop: Pin<Box<OwnedNotified>>,
    awaits_stop: bool,
    pub peer: Box<str>,
    /// `None` for a Unix socket's peer.
    address: Option<IpAddr>,
    /// The user name in its certificate, where the listener wants to know.
    certificate_user: Option<Arc<str>>,
    /// Over the limit of connections: it stays until it is told where else to go.
    in_excess: bool,
}

/// What a turn led to.
pub(super) enum Step {
    Connect(Box<ConnectRequest>),
    End(End),
}

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum End {
    /// DISCONNECT.
    Left {
        publish_will: bool,
        expiry: Option<Expiry>,
    },
    /// The peer closed without a DISCONNECT.
    Gone,
    Broken(io::Error),
    Protocol(ProtocolError),
    /// The CONNECT was refused, and the client told.
    Refused,
    Condemned(Fate),
    Stopped,
}

/// The whole life of one connection that a proxy has opened for somebody, at `began`.
pub(super) async fn serve_proxied(
    mut accepted: Accepted,
    shared: Arc<Shared>,
    waiting: Counted,
    began: std::time::Instant,
) {
    let deadline = Instant::from_std(began) + shared.limits.connect_timeout;
    let asked =
        timeout_at(deadline, accepted.ask_proxy()).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    if let Err(error) = asked {
        shared.counters.failed_handshakes.fetch_add(1, Ordering::Relaxed);
        let proxy = accepted.peer().map(tracing::field::display);
        info!(listener = shared.name, proxy, %error, "handshake failed");
        return;
    }
    drop(waiting);
    // Now it is known whose connection it is.
    if let Some(admitted) = admit(&shared, accepted.address()) {
        serve(accepted, shared, admitted, began).await;
    }
}

/// The whole life of one connection, which was opened at `began`.
pub(super) async fn serve(accepted: Accepted, shared: Arc<Shared>, admitted: Admitted, began: std::time::Instant) {
    let deadline = Instant::from_std(began) + shared.limits.connect_timeout;
    let address = accepted.address();
    let peer: Box<str> = accepted.peer().map_or_else(|| "unix".into(), |peer| peer.to_string().into());
    // Boxed: what a handshake needs should not stay with an idle connection.
    let (stream, certificate_user) = match Box::pin(timeout_at(deadline, shake_hands(accepted, &shared))).await {
        Ok(Ok(shaken)) => shaken,
        failed => {
            shared.counters.failed_handshakes.fetch_add(1, Ordering::Relaxed);
            let error = match failed {
                Ok(Err(error)) => error.to_string(),
                _ => "it took too long".into(),
            };
            info!(listener = shared.name, peer = &*peer, error, "handshake failed");
            return;
        }
    };
    let mut connection = Connection::new(stream, shared, peer, address, began);
    connection.certificate_user = certificate_user;
    connection.in_excess = matches!(admitted, Admitted::InExcess(_));
    let end = connection.live().await;
    Box::pin(connection.finish(end)).await;
    drop(admitted);
}

/// TLS and WebSocket, where there are any; and who the client's certificate says it is, where that counts.
async fn shake_hands(accepted: Accepted, shared: &Shared) -> io::Result<(Stream, Option<Arc<str>>)> {
    let mut certificate_user = None;
    let stream = match accepted {
        Accepted::Unix(stream, _) => Stream::Unix(stream),
        Accepted::Tcp(stream, _) => {
            stream.set_nodelay(true)?;
            match &shared.tls {
                None => Stream::Tcp(stream),
                Some(tls) => {
                    let acceptor = tokio_rustls::TlsAcceptor::from(tls.config());
                    let stream = acceptor.accept(stream).await?;
                    let chain = stream.get_ref().1.peer_certificates();
                    let own = chain.and_then(|chain| chain.first());
                    certificate_user = own.zip(shared.certificate_user).and_then(|(own, user)| match user {
                        CertificateUser::CommonName => common_name(own).map(Arc::from),
                        CertificateUser::Subject => subject(own).map(Arc::from),
                    });
                    Stream::Tls(Box::new(stream))
                }
            }
        }
    };
    match shared.transport {
        Transport::Mqtt => Ok((stream, certificate_user)),
        Transport::WebSocket => {
            let socket = WebSocket::accept(stream, shared.limits.max_packet_size).await?;
            Ok((Stream::WebSocket(Box::new(socket)), certificate_user))
        }
    }
}

impl Connection {
    fn new(
        stream: Stream,
        shared: Arc<Shared>,
        peer: Box<str>,
        address: Option<IpAddr>,
        began: std::time::Instant,
    ) -> Self {
        Self {
            stream,
            server: Server::new(shared.limits.clone(), began),
            link: None,
            leftover: Vec::new(),
            reparse: false,
            unwritten: Unwritten::default(),
            hungry: false,
            awaits_introduction: false,
            pressure: None,
            timer: None,
            stop: Box::pin(shared.stop.clone().notified_owned()),
            awaits_stop: false,
            peer,
            address,
            certificate_user: None,
            in_excess: false,
            shared,
        }
    }

    async fn live(&mut self) -> End {
        loop {
            match poll_fn(|cx| self.poll_turn(cx)).await {
                Step::End(end) => return end,
                Step::Connect(request) => {
                    if let Err(end) = Box::pin(self.log_in(*request)).await {
                        return end;
                    }
                }
            }
        }
    }

    async fn log_in(&mut self, request: ConnectRequest) -> Result<(), End> {
        if let Some(Redirect { server, whom }) = &self.shared.redirect
            && (self.in_excess || *whom == Redirected::Everybody)
        {
            let mut output = Output::default();
            self.server.redirect(whom.reason(), server, &mut output.bytes);
            self.unwritten.keep(&mut output, 0);
            return Err(End::Refused);
        }
        let deadline = self.server.deadline().map_or_else(Instant::now, Instant::from_std);
        let certificate_user = self.certificate_user.take();
        let decision = login::log_in(&self.shared, request, &self.peer, self.address, certificate_user);
        let Ok(decision) = timeout_at(deadline, decision).await else {
            let what = "the login took too long";
            return Err(End::Protocol(ProtocolError { reason: ReasonCode::ServerBusy, what }));
        };
        let mut output = Output::default();
        let result = match decision {
            Ok(LoggedIn { link, assigned, expiry }) => {
                let accept = Accept {
                    session_present: link.session_present(),
                    assigned_client_id: assigned.then(|| &**link.client_id()),
                    expiry,
                    gateway: link.peer_gateway().map(|_| self.shared.gateway),
                };
                if let Err(error) = self.server.accept(&accept, Instant::now().into_std(), &mut output.bytes) {
                    // It has not been connected, and so is not lost.
                    link.detach(false, None);
                    return Err(End::Protocol(error));
                }
                self.link = Some(link);
                self.hungry = true;
                self.awaits_introduction = self.server.is_bridge();
                self.reparse = !self.leftover.is_empty();
                // The timer may be set for the CONNECT still.
                self.timer = None;
                Ok(())
            }
            Err(refused) => {
                self.server.refuse(refused.reason, refused.what, &mut output.bytes);
                Err(End::Refused)
            }
        };
        self.unwritten.keep(&mut output, 0);
        result
    }

    /// One turn; pending when there is nothing to do until something wakes the task.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        SCRATCH.with_borrow_mut(|scratch| {
            let step = self.poll_in(cx, scratch);
            // A step that ends the turn early leaves answers behind that still have to be sent.
            self.unwritten.keep(&mut scratch.output, 0);
            scratch.outbound.clear();
            step
        })
    }

    fn poll_in(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Step> {
        if let Err(end) = self.poll_ends(cx) {
            return Poll::Ready(Step::End(end));
        }
        let mut budget = TURN_BYTES;
        loop {
            match self.poll_round(cx, scratch) {
                Ok(Round { step: Some(step), .. }) => return Poll::Ready(step),
                Ok(Round { moved: 0, .. }) => return Poll::Pending,
                Ok(Round { moved, .. }) if moved < budget => budget -= moved,
                Ok(_) => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Err(end) => return Poll::Ready(Step::End(end)),
            }
        }
    }

    /// What ends a connection from outside: the listener stops, the session is taken over, the peer is silent.
    fn poll_ends(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        if self.shared.stopping.load(Ordering::SeqCst) {
            return Err(End::Stopped);
        }
        // Asked once, it wakes the task; asking it takes a lock that all connections share.
        if !std::mem::replace(&mut self.awaits_stop, true) && self.stop.as_mut().poll(cx).is_ready() {
            return Err(End::Stopped);
        }
        if let Some(timer) = &self.timer
            && !timer.is_elapsed()
        {
            return Ok(());
        }
        // The timer is not moved with every packet: when it fires, it is set again to where the deadline is by then.
        let Some(deadline) = self.server.deadline() else {
            self.timer = None;
            return Ok(());
        };
        self.server.check_deadline(Instant::now().into_std()).map_err(End::Protocol)?;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline.into())));
        timer.as_mut().reset(deadline.into());
        let _ = timer.as_mut().poll(cx);
        Ok(())
    }

    /// Writes, reads, routes, takes and writes once.
    fn poll_round(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Round, End> {
        let mut moved = 0;
        if !self.unwritten.is_empty() {
            let before = self.unwritten.len();
            if let Poll::Ready(result) = self.unwritten.poll(&mut self.stream, cx) {
                result.map_err(End::Broken)?;
                moved += 1;
            }
            moved += before - self.unwritten.len();
        }
        if let Some(link) = &self.link {
            if let Some(fate) = link.fate() {
                return Err(End::Condemned(fate));
            }
            if link.poll_wake(cx).is_ready() {
                self.hungry = true;
                moved += 1;
            }
        }
        if let Some(pressure) = &mut self.pressure
            && pressure.as_mut().poll(cx).is_ready()
        {
            self.pressure = None;
        }
        // A 3.x client is closed on when something could not be kept: what it has sent since must not overtake that.
        self.flush_acks(&mut scratch.output)?;
        let mut step = None;
        if self.may_read() {
            let (read, next) = self.poll_input(cx, scratch)?;
            moved += read;
            step = next;
        }
        self.flush_acks(&mut scratch.output)?;
        let may_deliver = self.unwritten.is_empty() && !self.awaits_introduction && !self.server.acks().holds_suback();
        if step.is_none() && self.hungry && may_deliver {
            moved += 1;
            self.deliver(scratch, WRITE_BYTES);
        }
        if !scratch.output.is_empty() {
            let bytes = scratch.output.len();
            self.shared.counters.traffic.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
            moved += bytes;
            self.unwritten.send(&mut scratch.output, &mut self.stream, cx).map_err(End::Broken)?;
        }
        Ok(Round { moved, step })
    }

    /// Packets that came while too many acknowledgements waited can be handled now.
    pub(super) fn catch_up(&mut self) {
        self.reparse = !self.leftover.is_empty();
    }

    fn may_read(&self) -> bool {
        self.pressure.is_none() && !self.server.is_behind() && self.unwritten.len() < MAX_UNWRITTEN_BYTES
    }

    /// Reads once, handles the complete packets, keeps the rest. Returns how many bytes were read.
    fn poll_input(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<(usize, Option<Step>), End> {
        let Scratch { input, output, .. } = scratch;
        if std::mem::take(&mut self.reparse) {
            let data = std::mem::take(&mut self.leftover);
            let (consumed, step) = self.handle_input(&data, output)?;
            self.keep_rest(data, consumed);
            // Something was done even where nothing was read: packets that waited may have been handled.
            return Ok((1, step));
        }
        let carried = if self.leftover.len() <= CARRIED_BYTES { self.leftover.len() } else { 0 };
        let mut into = ReadBuf::new(&mut input[carried..]);
        match Pin::new(&mut self.stream).poll_read(cx, &mut into) {
            Poll::Pending => return Ok((0, None)),
            Poll::Ready(result) => result.map_err(End::Broken)?,
        }
        let read = into.filled().len();
        if read == 0 {
            return Err(End::Gone);
        }
        self.shared.counters.traffic.bytes_received.fetch_add(read as u64, Ordering::Relaxed);
        if carried == self.leftover.len() {
            input[..carried].copy_from_slice(&self.leftover);
            self.leftover = Vec::new();
            let data = &input[..carried + read];
            let (consumed, step) = self.handle_input(data, output)?;
            self.leftover.extend_from_slice(&data[consumed..]);
            return Ok((read, step));
        }
        self.leftover.extend_from_slice(&input[..read]);
        let data = std::mem::take(&mut self.leftover);
        let (consumed, step) = self.handle_input(&data, output)?;
        self.keep_rest(data, consumed);
        Ok((read, step))
    }

    /// Keeps what of `data` was not consumed, in the same buffer if that is worth it.
    fn keep_rest(&mut self, mut data: Vec<u8>, consumed: usize) {
        if consumed == 0 {
            self.leftover = data;
        } else if consumed < data.len() {
            data.drain(..consumed);
            data.shrink_to_fit();
            self.leftover = data;
        }
    }

    /// Handles the complete packets of `data` and routes them together.
    fn handle_input(&mut self, data: &[u8], output: &mut Output) -> Result<(usize, Option<Step>), End> {
        let handled = self.handle_packets(data, output);
        if let Some(link) = &mut self.link
            && let Some(pressure) = link.flush()
        {
            self.pressure = Some(Box::pin(async move { pressure.wait().await }));
        }
        // What came before the fault was routed and is acknowledged.
        let (consumed, step) = handled?;
        Ok((consumed, step))
    }

    /// Ends the connection: tells the peer where there are words for it, lets go of the session, closes the stream.
    async fn finish(mut self, end: End) {
        let mut output = Output::default();
        // What the end says to the client comes after everything that was decided before.
        let _ = self.flush_acks(&mut output);
        let client = self.link.as_ref().map(|link| link.client_id().clone());
        let client = client.as_deref().unwrap_or_default();
        let (listener, peer) = (&*self.shared.name, &*self.peer);
        let farewell = |reason, what| Some(ProtocolError { reason, what });
        let last_word = match &end {
            End::Left { .. } | End::Gone | End::Refused => {
                debug!(listener, peer, client, end = ?end, "connection closed");
                None
            }
            End::Broken(error) => {
                debug!(listener, peer, client, %error, "connection lost");
                None
            }
            End::Protocol(error) => {
                self.shared.counters.protocol_error(error.reason);
                info!(listener, peer, client, reason = %error.reason, "connection closed: {error}");
                Some(*error)
            }
            End::Condemned(Fate::TakenOver) => {
                info!(listener, peer, client, "connection closed: the client connected again");
                farewell(ReasonCode::SessionTakenOver, "the client connected again")
            }
            End::Condemned(Fate::Kicked) => {
                info!(listener, peer, client, "connection closed by the operator");
                farewell(ReasonCode::AdministrativeAction, "closed by the operator")
            }
            End::Stopped => farewell(ReasonCode::ServerShuttingDown, "the gateway is stopping"),
        };
        if let Some(error) = last_word {
            self.server.close(error, &self.leftover, &mut output.bytes);
        }
        self.unwritten.keep(&mut output, 0);
        // Let go of the session first: its successor, its will and its subscribers should not wait for this peer.
        match (self.link.take(), &end) {
            (Some(link), &End::Left { publish_will, expiry }) => {
                link.detach(publish_will, expiry.map(login::session_expiry));
            }
            (link, _) => drop(link),
        }
        if matches!(end, End::Broken(_)) {
            return;
        }
        if matches!(&end, End::Protocol(error) if error.reason == ReasonCode::QuotaExceeded)
            && !self.server.version().is_5()
        {
            sleep(REFUSAL_PAUSE).await;
        }
        let says_something = !self.unwritten.is_empty();
        let Self { mut stream, mut unwritten, .. } = self;
        let _ = timeout(CLOSE_TIMEOUT, async move {
            poll_fn(|cx| unwritten.poll(&mut stream, cx)).await?;
            stream.shutdown().await?;
            if says_something {
                // Closing with unread input would reset the connection and may take the last words with it.
                let mut sink = [0; 1024];
                while stream.read(&mut sink).await? > 0 {}
            }
            io::Result::Ok(())
        })
        .await;
    }
}

/// What a round did.
struct Round {
    /// Bytes read and written, and one for each other thing that was done: zero is nothing.
    moved: usize,
    step: Option<Step>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The future of an idle connection stays allocated as long as the connection: with the session, its link and the
    /// socket's registration it should stay under 4 KiB.
    #[test]
    fn an_idle_connection_is_small() {
        fn size_of_future<F>(_: impl Fn(Accepted, Arc<Shared>, Admitted, std::time::Instant) -> F) -> usize {
            size_of::<F>()
        }
        let size = size_of_future(serve);
        assert!(size <= 1536, "the future of a connection has grown to {size} bytes");
    }
}
