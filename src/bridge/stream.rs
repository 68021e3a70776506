//! One connection to an upstream, once it is accepted: messages out and in, acknowledgements both ways, in batches.
//!
//! Outbound packets are encoded into one buffer while another is being written; acknowledgements are read meanwhile.
//! MQTT 5.0 §4.3 (QoS), §4.4 (redelivery), §4.9 (flow control).

mod acquaintance;
mod greeting;
mod inbound;
mod outbound;
mod trying;
mod window;

use std::collections::VecDeque;
use std::io::{self, Cursor};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};
use tracing::debug;

use super::Stop;
use super::condition::{DropReason, Shared};
use super::dial::Transport;
use super::drain::Drain;
use super::handshake::Greeted;
use super::manners::{Greeting, Open, Said};
use super::marks;
use super::rate::Throttle;
use super::settings::Checked;
use super::suspicion::{Course, Lesson, Plan};
use super::trial::{Suspect, Trial};
use super::words::{self, Who};
use crate::hub::{Link, Outbound, Pressure};
use crate::message::Properties;
use crate::proto::mqtt::client::Client;
use crate::proto::mqtt::{AckKind, AckState, PacketId, ProtocolError};
use crate::store::{Receipt, ReceiptState};
use crate::via::GatewayId;
use acquaintance::Question;
use inbound::{Inbound, Reply};
use window::Window;

/// How many bytes may be encoded ahead of the one buffer that is being written.
const ENCODE_AHEAD_BYTES: usize = 256 * 1024;
/// Room made for one read.
const READ_BYTES: usize = 32 * 1024;
/// How long the upstream may leave bytes unread, or messages unacknowledged, before the connection is given up.
const STALL: Duration = Duration::from_secs(60);
/// How long the upstream may take to acknowledge what is open when we are called away. New messages wait meanwhile.
const SETTLING: Duration = Duration::from_secs(5);
/// How long taking leave of the upstream may take.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);
/// A connection that ends sooner than this may have been ended by something we sent.
const SOON: Duration = Duration::from_secs(5);

/// How a connection ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// We were told to stop or to pause, and took leave.
    Asked,
    /// Nothing has crossed for the idle timeout, and we took leave.
    Idle,
    /// We were called away, and took leave with nothing left open.
    CalledAway,
    /// The upstream has closed the connection, and may have meant something that it was sent. Why, for a person.
    Closed(String),
    /// The same, for any other reason.
    Lost(String),
}

/// What is left behind by a connection.
pub(super) struct Ended {
    pub end: End,
    /// Whether the question which gateway the upstream is was not.
    pub is_unanswered: bool,
    pub unanswered_greeting: Open,
    /// Whether deliveries are not over, of which the upstream may remember the identifiers.
    pub is_open: bool,
    pub course: Course,
}

pub(super) struct Stream<'a> {
    shared: &'a Shared,
    rules: &'a Checked,
    who: Who<'a>,
    client: Client<Arc<Receipt>>,
    link: Link,
    input: BytesMut,
    /// Taken from the session and not yet encoded.
    taken: VecDeque<Outbound>,
    encoded: Batch,
    writing: Batch,
    /// Written by the transport but perhaps not passed on by it.
    unflushed: bool,
    /// The upstream has no session of ours: what it gets is new to it.
    is_new: bool,
    /// SUBSCRIBEs that wait for their answer. Nothing is published before: packet identifiers are shared with them.
    requests: Vec<(PacketId, Vec<String>)>,
    greeting: Greeting,
    /// What of the greeting waits for its answer, where things are said one by one.
    saying: Option<Said>,
    /// Something has come from the upstream.
    has_heard: bool,
    window: Window,
    /// Of one message that the upstream may close connections on.
    trial: Option<Trial>,
    /// What the trial keeps back.
    held: VecDeque<Outbound>,
    /// What is to be given up.
    condemned: Option<Suspect>,
    /// Under which identifier it was, where the upstream is asked to forget it.
    refused: Option<PacketId>,
    lessons: Vec<Lesson>,
    /// Which gateway we are.
    gateway: GatewayId,
    /// Whether to ask first which gateway the upstream is, if it is one; see [`acquaintance`].
    pub asks: bool,
    question: Option<Question>,
    /// How long nothing may cross; `None` for ever.
    pub idle_timeout: Option<Duration>,
    /// Told each time that another address were better.
    pub calls: Option<watch::Receiver<()>>,
    /// Since when nothing new is sent, so that nothing is open when this connection ends.
    leaving: Option<Instant>,
    /// Another address was used before this one: what we remember of packet identifiers is not about this upstream.
    pub is_elsewhere: bool,
    throttle: Throttle,
    drain: Drain,
    started: Instant,
    /// Reasons that were logged on this connection already.
    told: Vec<&'static str>,
    topic: String,
    /// A payload with its origin in it.
    payload: Vec<u8>,
    /// The properties of a message that had none and is given none but that it crosses its first bridge: most of them.
    first_crossing: Properties,
}

/// Bytes to write, and what follows once they are written.
#[derive(Default)]
struct Batch {
    bytes: Cursor<Vec<u8>>,
    /// Messages that were sent at QoS 0 although the session waits for an acknowledgement.
    lowered: Vec<PacketId>,
}

impl<'a> Stream<'a> {
    pub fn new(
        shared: &'a Shared,
        rules: &'a Checked,
        who: Who<'a>,
        greeted: Greeted<Arc<Receipt>>,
        link: Link,
        greeting: Greeting,
        plan: Plan,
    ) -> Self {
        let now = now();
        let Plan { first_window, trial, condemned, lessons } = plan;
        let mut first_crossing = Properties::default();
        marks::set_hops(&mut first_crossing, 1);
        Self {
            gateway: GatewayId::of_boot(shared.hub.clock().boot_id()),
            shared,
            rules,
            who,
            client: greeted.client,
            link,
            input: greeted.input,
            taken: VecDeque::new(),
            encoded: Batch::default(),
            writing: Batch::default(),
            unflushed: false,
            is_new: !greeted.session_present,
            requests: Vec::new(),
            greeting,
            saying: None,
            has_heard: false,
            window: Window::new(first_window, now),
            trial,
            held: VecDeque::new(),
            condemned,
            refused: None,
            lessons,
            asks: false,
            question: None,
            idle_timeout: None,
            calls: None,
            leaving: None,
            is_elsewhere: false,
            throttle: Throttle::new(rules.max_rate, now),
            drain: Drain::new(now),
            started: now,
            told: Vec::new(),
            topic: String::new(),
            payload: Vec::new(),
            first_crossing,
        }
    }

    /// Works until the connection is lost or `stop` says so; the link is detached then.
    pub async fn run(mut self, transport: Box<dyn Transport>, stop: &mut Stop) -> Ended {
        if self.is_new {
            self.link.peer_is_new();
        }
        let (mut reader, mut writer) = tokio::io::split(transport);
        let begun = if self.asks { self.ask() } else { self.meet(self.client.gateway()) };
        let end = match begun {
            Err(end) => end,
            Ok(()) => self.work(&mut reader, &mut writer, stop).await,
        };
        let ended_at = now();
        let unanswered_greeting = self.unanswered_greeting();
        if matches!(end, End::Asked | End::Idle | End::CalledAway) {
            self.take_leave(&mut writer).await;
        } else {
            // The reason for a close, in 5.0. The peer may be gone.
            let _ = timeout(FAREWELL, self.write_all(&mut writer)).await;
        }
        let is_open = self.link.take_begun(&mut Vec::new(), 0) > 0;
        let keep_alive = Duration::from_secs(self.client.limits().keep_alive.into());
        let unanswered = self.link.unanswered();
        let is_held = |suspect: &Suspect| self.held.iter().any(|outbound| suspect.is(outbound));
        let course = Course {
            is_closed: matches!(end, End::Closed(_)),
            is_fruitful: self.window.is_fruitful,
            open: unanswered.iter().map(Suspect::from).filter(|suspect| !is_held(suspect)).collect(),
            finding: self.trial.map(|trial| trial.finding(ended_at, keep_alive)),
            condemned: self.condemned,
            lessons: self.lessons,
        };
        self.link.detach(false, None);
        Ended { end, is_unanswered: self.question.is_some(), unanswered_greeting, is_open, course }
    }

    async fn work(
        &mut self,
        reader: &mut (impl AsyncReadExt + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
        stop: &mut Stop,
    ) -> End {
        let mut pressure: Option<Pressure> = None;
        let mut written_until = (0, now());
        loop {
            if let Err(end) = self.handle_input() {
                return end;
            }
            // Whoever must be waited for stops reading, never writing.
            pressure = self.link.flush().or(pressure);
            if let Err(end) = self.flush_acks() {
                return end;
            }
            let now = now();
            if let Err(end) = self.fill(now) {
                return end;
            }
            self.look_at_backlog(now);
            if self.leaving.is_some() && self.is_settled() {
                return End::CalledAway;
            }
            if self.link.fate().is_some() {
                return End::Lost("the session of this upstream was taken by another component".into());
            }
            if !self.writing.bytes.has_remaining() {
                self.next_batch();
            }
            let position = self.writing.bytes.position();
            let idle = !self.writing.bytes.has_remaining();
            if idle || position != written_until.0 {
                written_until = (position, now);
            }
            let deadline = self.deadline(written_until.1);
            let Self { link, input, writing, unflushed, calls, leaving, .. } = self;
            input.reserve(READ_BYTES);
            tokio::select! {
                read = reader.read_buf(input), if pressure.is_none() => match read {
                    Ok(0) => return self.closed(None),
                    Ok(_) => {}
                    Err(error) => return self.closed(Some(&error)),
                },
                written = write(writer, &mut writing.bytes, unflushed), if writing.bytes.has_remaining() || *unflushed => {
                    if let Err(error) = written {
                        return self.closed(Some(&error));
                    }
                    self.written();
                }
                () = link.woken() => {}
                () = wait(pressure.as_ref()), if pressure.is_some() => pressure = None,
                () = sleep_until(deadline.into()) => {
                    if let Err(end) = self.check_deadlines(written_until.1) {
                        return end;
                    }
                }
                () = called(calls), if leaving.is_none() => *leaving = Some(now),
                () = stop.asked() => return End::Asked,
            }
        }
    }

    /// Whether neither side waits for anything of the other.
    fn is_settled(&mut self) -> bool {
        self.taken.is_empty()
            && self.requests.is_empty()
            && self.window.unacknowledged == 0
            && self.client.acks().is_empty()
            && !self.writing.bytes.has_remaining()
            && self.encoded.bytes.get_ref().is_empty()
            && self.link.take_begun(&mut Vec::new(), 0) == 0
    }

    fn deadline(&self, written_at: Instant) -> Instant {
        // Far enough that nobody waits for it.
        let never = now() + Duration::from_secs(3600);
        let stalled = self.writing.bytes.has_remaining().then(|| written_at + STALL);
        let unanswered = (self.window.unacknowledged > 0).then(|| self.window.acknowledged_at + STALL);
        let idle = self.idle_timeout.map(|timeout| self.window.crossed_at + timeout);
        let leave = self.leaving.map(|since| since + SETTLING);
        let quiet = self.trial.as_ref().and_then(Trial::quiet_until);
        let rest = [idle, leave, quiet, self.throttle.deadline(), self.drain.deadline()];
        [self.client.deadline(), stalled, unanswered].into_iter().chain(rest).flatten().min().unwrap_or(never)
    }

    fn check_deadlines(&mut self, written_at: Instant) -> Result<(), End> {
        let now = now();
        if self.writing.bytes.has_remaining() && now >= written_at + STALL {
            return Err(End::Lost(format!("the upstream has not read anything for {STALL:?}; the connection is dead")));
        }
        let Window { unacknowledged, acknowledged_at, .. } = self.window;
        if unacknowledged > 0 && now >= acknowledged_at + STALL {
            return Err(End::Lost(format!(
                "the upstream has not acknowledged anything for {STALL:?} although {unacknowledged} messages wait \
                 for it"
            )));
        }
        if self.leaving.is_some_and(|since| now >= since + SETTLING) {
            // The next call may come at a better time.
            self.leaving = None;
        }
        if self.idle_timeout.is_some_and(|timeout| now >= self.window.crossed_at + timeout) {
            if unacknowledged == 0 && self.shared.queued().0 == 0 {
                return Err(End::Idle);
            }
            self.window.crossed_at = now;
        }
        self.client.check_deadline(now, self.encoded.bytes.get_mut()).map_err(|error| End::Lost(error.to_string()))
    }

    fn closed(&self, cause: Option<&io::Error>) -> End {
        let said = words::closed(cause, now().duration_since(self.started) < SOON, self.who);
        if cause.is_some_and(is_of_the_line) { End::Lost(said) } else { End::Closed(said) }
    }

    /// Takes what is complete off the input.
    fn handle_input(&mut self) -> Result<(), End> {
        let now = now();
        // Bytes of the input, which are taken off together.
        let mut handled = 0;
        loop {
            let (reply, used) = match self.client.decode(&self.input[handled..]) {
                Ok(None) => {
                    self.input.advance(handled);
                    return Ok(());
                }
                Ok(Some((packet, used))) => match self.client.handle(packet, now) {
                    Ok(event) => {
                        let mut inbound = Inbound {
                            shared: self.shared,
                            rules: self.rules,
                            is_elsewhere: self.is_elsewhere,
                            who: self.who,
                            link: &mut self.link,
                            gateway: self.gateway,
                            question: &mut self.question,
                            requests: &mut self.requests,
                            window: &mut self.window,
                            told: &mut self.told,
                            refused: self.refused,
                            topic: &mut self.topic,
                        };
                        (inbound.handle(event, now), used)
                    }
                    Err(error) => return Err(self.broken(error, now)),
                },
                Err(error) => return Err(self.broken(error, now)),
            };
            handled += used;
            self.has_heard = true;
            let out = self.encoded.bytes.get_mut();
            match reply {
                Reply::Nothing => {}
                Reply::Acknowledge(kind, packet_id, reason, receipt) => {
                    self.client.acknowledge(kind, packet_id, reason, receipt, out);
                }
                Reply::Release(packet_id) => self.client.release(packet_id, now, out),
                Reply::Meet(upstream) => self.meet(upstream)?,
                Reply::End(end) => return Err(end),
            }
        }
    }

    /// The upstream broke the protocol, or a message of it could not be kept.
    fn broken(&mut self, error: ProtocolError, now: Instant) -> End {
        self.client.close(error, now, self.encoded.bytes.get_mut());
        End::Lost(format!("the connection was closed from here: {error}"))
    }

    /// Writes the acknowledgements whose receipts are done.
    fn flush_acks(&mut self) -> Result<(), End> {
        let state = |receipt: &Arc<Receipt>| match receipt.state() {
            ReceiptState::Pending => AckState::Pending,
            ReceiptState::Done => AckState::Done,
            ReceiptState::Failed => AckState::Failed,
        };
        let failed = |kind, packet_id| {
            self.shared.counters.drop(DropReason::NotTaken);
            // What comes under this identifier next is a new message.
            if kind == AckKind::Pubrec {
                self.link.forget_failed_inbound(packet_id);
            }
        };
        let flushed = self.client.flush_acks(state, failed, self.encoded.bytes.get_mut());
        flushed.map_err(|error| self.broken(error, now()))
    }

    /// Logs once per connection and `kind`.
    fn tell(&mut self, kind: &'static str, log: impl FnOnce(&str)) {
        if !self.told.contains(&kind) {
            self.told.push(kind);
            log(&self.shared.name);
        }
    }

    /// Goes on to write what was encoded meanwhile.
    fn next_batch(&mut self) {
        self.written();
        std::mem::swap(&mut self.encoded, &mut self.writing);
        self.encoded.bytes.set_position(0);
        let spent = self.encoded.bytes.get_mut();
        spent.clear();
        // A burst must not hold its memory for ever.
        spent.shrink_to(ENCODE_AHEAD_BYTES);
    }

    /// The batch is written: what no acknowledgement will come for is done.
    fn written(&mut self) {
        if self.writing.bytes.has_remaining() {
            return;
        }
        self.shared.counters.sent.fetch_add(self.writing.lowered.len() as u64, Ordering::Relaxed);
        for packet_id in self.writing.lowered.drain(..) {
            self.link.acknowledge(packet_id);
        }
    }

    async fn write_all(&mut self, writer: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        loop {
            write(writer, &mut self.writing.bytes, &mut self.unflushed).await?;
            self.next_batch();
            if !self.writing.bytes.has_remaining() {
                return Ok(());
            }
        }
    }

    async fn take_leave(&mut self, writer: &mut (impl AsyncWrite + Unpin)) {
        let now = now();
        self.say_state("0", now);
        self.client.disconnect(now, self.encoded.bytes.get_mut());
        let leave = async {
            self.write_all(writer).await?;
            writer.shutdown().await
        };
        if !matches!(timeout(FAREWELL, leave).await, Ok(Ok(()))) {
            debug!(upstream = self.shared.name, "the upstream did not wait for our leave");
        }
    }
}

/// Whether the system has given the connection up without a word of the upstream.
fn is_of_the_line(error: &io::Error) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkDown, NetworkUnreachable, TimedOut};
    matches!(error.kind(), TimedOut | HostUnreachable | NetworkUnreachable | NetworkDown)
}

/// The runtime's time, which tests can hold still.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Waits for the next call.
///
/// # Cancel safety
/// Nothing is lost.
async fn called(calls: &mut Option<watch::Receiver<()>>) {
    let Some(calls) = calls else { return std::future::pending().await };
    if calls.changed().await.is_err() {
        std::future::pending().await
    }
}

async fn wait(pressure: Option<&Pressure>) {
    if let Some(pressure) = pressure {
        pressure.wait().await;
    }
}

/// Writes what is left of `bytes` and flushes.
///
/// # Cancel safety
/// Goes on where it was when it is called again.
async fn write(
    writer: &mut (impl AsyncWrite + Unpin),
    bytes: &mut Cursor<Vec<u8>>,
    unflushed: &mut bool,
) -> io::Result<()> {
    if bytes.has_remaining() {
        *unflushed = true;
        writer.write_all_buf(bytes).await?;
    }
    writer.flush().await?;
    *unflushed = false;
    Ok(())
}
