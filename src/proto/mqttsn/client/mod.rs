//! The life of one client as the gateway sees it (MQTT-SN 1.2 §6.2 to §6.6, §6.9 to §6.14).
//!
//! ```text
//!             CONNECT            DISCONNECT(duration)             PINGREQ(id)
//!  (nobody) ──────────▶ active ───────────────────────▶ asleep ◀───────────────▶ awake
//!      will asked for in between    ◀─── CONNECT ───              flushed: PINGRESP
//!  active, asleep: silent too long; active, awake: unanswered ──▶ lost (the will is published)
//!  any: DISCONNECT ──▶ disconnected
//! ```
//!
//! All decisions are taken in [`Client::handle`]; what a client wants from its session goes out as
//! [`Request`]s and their answers come back through the methods named there.

mod inbound;
mod outbound;

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use self::outbound::{Due, Outbound, Retry, Verdict};
use super::action::{Delivery, LostCause, Notice, Outputs, Request, SessionLifetime, SubscribeAnswer, Will, WillFate};
use super::packet::{Connect, MsgId, Packet, ReturnCode, WillTopic};
use super::topics::{Predefined, TopicMap};
use crate::message::QoS;
use crate::topic::TopicName;

/// Messages delivered in one waking: a client must get back to sleep even if its topics never rest.
const MAX_WAKE_DELIVERIES: u32 = 1024;

/// How long a client whose session has ended is remembered, so that a repeated DISCONNECT is answered.
const LINGER: Duration = Duration::from_secs(60);

/// What all clients of a gateway have in common.
#[derive(Clone, Debug)]
pub struct Rules {
    /// T_retry (§7.2).
    pub retry_interval: Duration,
    /// N_retry: retransmissions before a client is lost.
    pub retry_limit: u32,
    /// The longest message that the link to a client carries.
    pub max_packet_bytes: usize,
    /// Normal topic ids per client.
    pub max_topics: usize,
    pub predefined: Predefined,
    /// How long a disconnected client's topic ids and will are remembered; `None`: as long as there is room.
    pub forget_after: Option<Duration>,
}

/// What every step of a client works with.
pub struct Context<'a> {
    pub now: Instant,
    pub rules: &'a Rules,
    pub client_id: &'a Arc<str>,
    pub out: &'a mut Outputs,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    Done,
    /// The client is not connected, so the message belongs to nobody.
    NotConnected,
    /// It has no place in the client's state and was ignored.
    Unexpected,
}

/// The state of a client, for those who look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ClientState {
    Connecting,
    Active,
    Asleep,
    Awake,
    Lost,
    Disconnected,
}

impl ClientState {
    pub const COUNT: usize = 6;

    /// The names in the order of the states, as the `state` label of metrics.
    pub const NAMES: [&'static str; Self::COUNT] = ["connecting", "active", "asleep", "awake", "lost", "disconnected"];
}

#[derive(Debug)]
pub struct Client {
    state: State,
    /// The shell holds an open session for this client.
    attached: bool,
    lifetime: SessionLifetime,
    keep_alive: Duration,
    sleep: Duration,
    will: WillData,
    /// The CONNECT in force announced a will, so that a repeated WILLMSG asks for its CONNACK.
    will_was_asked: bool,
    topics: TopicMap,
    /// MsgIds of QoS 1 and 2 messages that the session has not answered yet.
    pending: Vec<MsgId>,
    outbound: Outbound,
    /// A SUBSCRIBE whose answer waits for the disk; nothing is delivered before it.
    subscribing: Option<MsgId>,
    last_subscribe: Option<(QoS, SubscribeAnswer)>,
    /// When silence becomes loss.
    lapse_at: Option<Instant>,
    forget_at: Option<Instant>,
    wake_deliveries: u32,
}

impl Client {
    /// A client that nobody has heard of; `first_topic_id` is where its topic ids begin.
    pub fn new(first_topic_id: u16, rules: &Rules) -> Self {
        Self {
            state: State::Disconnected,
            attached: false,
            lifetime: SessionLifetime::Connection,
            keep_alive: Duration::ZERO,
            sleep: Duration::ZERO,
            will: WillData::default(),
            will_was_asked: false,
            topics: TopicMap::new(first_topic_id, rules.max_topics),
            pending: Vec::new(),
            outbound: Outbound::default(),
            subscribing: None,
            last_subscribe: None,
            lapse_at: None,
            forget_at: None,
            wake_deliveries: 0,
        }
    }

    pub fn state(&self) -> ClientState {
        match self.state {
            State::Connecting(_) | State::Attaching => ClientState::Connecting,
            State::Active => ClientState::Active,
            State::Asleep => ClientState::Asleep,
            State::Awake => ClientState::Awake,
            State::Lost => ClientState::Lost,
            State::Disconnected => ClientState::Disconnected,
        }
    }

    /// Whether the client has a session to publish in: it is active, asleep or awake.
    pub fn is_connected(&self) -> bool {
        matches!(self.state, State::Active | State::Asleep | State::Awake)
    }

    /// Whether the client is gone and only remembered.
    pub fn is_gone(&self) -> bool {
        matches!(self.state, State::Lost | State::Disconnected)
    }

    pub fn handle(&mut self, packet: &Packet<'_>, cx: &mut Context<'_>) -> Handled {
        let handled = match (&self.state, packet) {
            (_, Packet::Connect(connect)) => self.handle_connect(connect, cx),
            (_, Packet::Disconnect { duration }) => self.handle_disconnect(*duration, cx),
            (State::Connecting(_), Packet::WillTopic(will)) => self.handle_will_topic(will.as_ref(), cx),
            (State::Connecting(_), Packet::WillMsg(message)) => self.handle_will_message(message, cx),
            (State::Connecting(_) | State::Attaching, _) => Handled::Unexpected,
            (State::Lost | State::Disconnected, _) => Handled::NotConnected,
            (State::Asleep, Packet::PingReq { .. }) => self.wake(cx),
            // Its PINGRESP comes when everything is delivered; asking again changes nothing (§6.14).
            (State::Awake, Packet::PingReq { .. }) => Handled::Done,
            (State::Active, Packet::PingReq { .. }) => {
                cx.out.send(&Packet::PingResp);
                Handled::Done
            }
            // The CONNACK was lost.
            (State::Active, Packet::WillMsg(_)) if self.will_was_asked => {
                cx.out.send(&Packet::ConnAck(ReturnCode::Accepted));
                Handled::Done
            }
            (State::Active | State::Asleep | State::Awake, _) => self.handle_in_session(packet, cx),
        };
        if handled != Handled::NotConnected {
            self.refresh(cx.now);
        }
        handled
    }

    /// The answer to [`Request::Attach`] and [`Request::Resume`].
    pub fn attached(&mut self, result: Result<(), ReturnCode>, cx: &mut Context<'_>) {
        match result {
            Ok(()) => {
                self.attached = true;
                self.state = State::Active;
                self.refresh(cx.now);
                cx.out.send(&Packet::ConnAck(ReturnCode::Accepted));
                self.outbound.resume(&mut self.topics, cx);
                self.go_on(cx);
            }
            Err(code) => {
                self.attached = false;
                self.leave(State::Disconnected, cx);
                cx.out.send(&Packet::ConnAck(code));
            }
        }
    }

    /// The session has a message, an answer to [`Request::Take`].
    pub fn deliver(&mut self, delivery: Delivery, cx: &mut Context<'_>) {
        self.outbound.taken();
        if !self.is_connected() {
            return;
        }
        self.wake_deliveries += 1;
        self.outbound.deliver(delivery, &mut self.topics, cx);
        if matches!(self.state, State::Asleep) {
            self.outbound.suspend();
        }
        self.go_on(cx);
    }

    /// The session has written down a PUBREC, an answer to [`Request::Take`].
    pub fn deliver_release(&mut self, packet_id: NonZeroU16, cx: &mut Context<'_>) {
        self.outbound.taken();
        if matches!(self.state, State::Active | State::Awake) {
            self.outbound.release(packet_id, cx);
        }
    }

    /// The session has nothing to send at the moment, an answer to [`Request::Take`].
    pub fn drained(&mut self, cx: &mut Context<'_>) {
        self.outbound.taken();
        if matches!(self.state, State::Awake) && self.outbound.is_idle() {
            self.fall_asleep(cx);
        }
    }

    /// The session may have something to send.
    pub fn pending(&mut self, cx: &mut Context<'_>) {
        self.go_on(cx);
    }

    /// The hub has closed the session: someone else took it over, or an operator ended it.
    pub fn evicted(&mut self, cx: &mut Context<'_>) {
        self.attached = false;
        // A sleeping client must not be sent anything; it is told when it wakes.
        if matches!(self.state, State::Active | State::Awake) {
            cx.out.send(&Packet::Disconnect { duration: None });
        }
        self.leave(State::Disconnected, cx);
    }

    /// When [`Client::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let retry = match &self.state {
            State::Connecting(setup) => setup.retry.at,
            State::Active | State::Awake => self.outbound.poll_timeout(),
            _ => None,
        };
        [retry, self.lapse_at, self.forget_at].into_iter().flatten().min()
    }

    /// Whether the client need not be remembered any more.
    pub fn is_forgotten(&self, now: Instant) -> bool {
        self.forget_at.is_some_and(|at| at <= now)
    }

    pub fn handle_timeout(&mut self, cx: &mut Context<'_>) {
        if self.lapse_at.is_some_and(|at| at <= cx.now) {
            let asleep = matches!(self.state, State::Asleep);
            return self.lose(if asleep { LostCause::Sleep } else { LostCause::KeepAlive }, cx);
        }
        match &mut self.state {
            State::Connecting(setup) => match setup.retry.due(cx) {
                Due::Later => {}
                Due::Again => setup.ask(cx.out),
                Due::Exhausted => self.lose(LostCause::Retries, cx),
            },
            State::Active | State::Awake => {
                if self.outbound.handle_timeout(cx) == Verdict::Unanswered {
                    self.lose(LostCause::Retries, cx);
                }
            }
            State::Attaching | State::Asleep | State::Lost | State::Disconnected => {}
        }
    }

    fn handle_connect(&mut self, connect: &Connect<'_>, cx: &mut Context<'_>) -> Handled {
        let remembers = match &self.state {
            State::Asleep | State::Awake => true,
            // A CONNECT that is repeated, or that replaces one.
            State::Connecting(setup) => setup.remembers,
            State::Attaching | State::Active | State::Lost | State::Disconnected => false,
        };
        let setup = Setup {
            clean_session: connect.clean_session,
            keep_alive: Duration::from_secs(connect.duration.into()),
            remembers,
            step: Step::Topic,
            retry: Retry::start(cx.now, cx.rules),
        };
        self.lapse_at = None;
        self.forget_at = None;
        self.will_was_asked = connect.will;
        if connect.will {
            setup.ask(cx.out);
            self.state = State::Connecting(setup);
        } else {
            self.begin_session(setup, None, cx);
        }
        Handled::Done
    }

    fn handle_will_topic(&mut self, will: Option<&WillTopic<'_>>, cx: &mut Context<'_>) -> Handled {
        let State::Connecting(mut setup) = std::mem::replace(&mut self.state, State::Disconnected) else {
            return Handled::Unexpected;
        };
        match will.map(WillName::check) {
            None => self.begin_session(setup, Some(WillData::default()), cx),
            Some(Some(name)) => {
                setup.step = Step::Message(name);
                setup.retry = Retry::start(cx.now, cx.rules);
                setup.ask(cx.out);
                self.state = State::Connecting(setup);
            }
            Some(None) => {
                if self.attached {
                    cx.out.request(Request::Detach { will: WillFate::Discard, lifetime: self.lifetime });
                }
                self.attached(Err(ReturnCode::NotSupported), cx);
            }
        }
        Handled::Done
    }

    fn handle_will_message(&mut self, message: &[u8], cx: &mut Context<'_>) -> Handled {
        match std::mem::replace(&mut self.state, State::Disconnected) {
            State::Connecting(setup) if matches!(setup.step, Step::Message(_)) => {
                let Step::Message(name) = &setup.step else { return Handled::Unexpected };
                let will = WillData { name: Some(name.clone()), message: Some(Bytes::copy_from_slice(message)) };
                self.begin_session(setup, Some(will), cx);
                Handled::Done
            }
            state => {
                self.state = state;
                Handled::Unexpected
            }
        }
    }

    /// The CONNECT is complete; `will` replaces what the session has (§6.2, §6.3).
    fn begin_session(&mut self, setup: Setup, will: Option<WillData>, cx: &mut Context<'_>) {
        if setup.clean_session {
            self.will = WillData::default();
            self.topics = self.topics.cleared();
        } else if !setup.remembers {
            self.topics.all_unknown();
        }
        if let Some(will) = will {
            self.will = will;
        }
        let lifetime = if setup.clean_session { SessionLifetime::Connection } else { SessionLifetime::Lasting };
        let goes_on = self.attached && !setup.clean_session;
        self.lifetime = lifetime;
        self.keep_alive = setup.keep_alive;
        self.last_subscribe = None;
        let will = self.will.to_will();
        if goes_on {
            cx.out.request(Request::Resume { will });
        } else {
            self.pending.clear();
            self.subscribing = None;
            self.outbound.clear(cx.out);
            let client_id = cx.client_id.clone();
            cx.out.request(Request::Attach { client_id, clean_start: setup.clean_session, lifetime, will });
        }
        self.state = State::Attaching;
    }

    fn handle_disconnect(&mut self, duration: Option<u16>, cx: &mut Context<'_>) -> Handled {
        match (&self.state, duration.filter(|duration| *duration > 0)) {
            (State::Lost | State::Disconnected, _) => return Handled::NotConnected,
            (State::Active | State::Asleep | State::Awake, Some(duration)) => {
                cx.out.send(&Packet::Disconnect { duration: None });
                self.sleep = Duration::from_secs(duration.into());
                self.state = State::Asleep;
                self.outbound.suspend();
            }
            // A client that is still connecting has nothing to sleep on.
            (_, None) | (State::Connecting(_) | State::Attaching, _) => {
                cx.out.send(&Packet::Disconnect { duration: None });
                if self.attached {
                    cx.out.request(Request::Detach { will: WillFate::Discard, lifetime: self.lifetime });
                }
                self.attached = false;
                self.leave(State::Disconnected, cx);
            }
        }
        Handled::Done
    }

    fn wake(&mut self, cx: &mut Context<'_>) -> Handled {
        self.state = State::Awake;
        self.wake_deliveries = 0;
        self.outbound.resume(&mut self.topics, cx);
        self.go_on(cx);
        Handled::Done
    }

    /// Everything is delivered: back to sleep.
    fn fall_asleep(&mut self, cx: &mut Context<'_>) {
        cx.out.send(&Packet::PingResp);
        self.state = State::Asleep;
        self.outbound.suspend();
        self.refresh(cx.now);
    }

    /// Asks for the next message, where the client's state allows to send one.
    fn go_on(&mut self, cx: &mut Context<'_>) {
        match self.state {
            // Topic ids in a PUBLISH may be what the SUBACK tells.
            _ if self.subscribing.is_some() => {}
            State::Active => self.outbound.want(cx.out),
            State::Awake if self.wake_deliveries < MAX_WAKE_DELIVERIES => self.outbound.want(cx.out),
            State::Awake if self.outbound.is_idle() => self.fall_asleep(cx),
            _ => {}
        }
    }

    fn heed(&mut self, verdict: Verdict, cx: &mut Context<'_>) {
        match verdict {
            // A client that cannot take more may sleep; it gets the rest when it wakes again.
            Verdict::Congested if matches!(self.state, State::Awake) => self.fall_asleep(cx),
            Verdict::Fine | Verdict::Congested | Verdict::Unanswered => self.go_on(cx),
        }
    }

    fn lose(&mut self, cause: LostCause, cx: &mut Context<'_>) {
        cx.out.notice(Notice::Lost { client_id: cx.client_id.clone(), cause });
        if self.attached {
            cx.out.request(Request::Detach { will: WillFate::Publish, lifetime: self.lifetime });
        }
        self.attached = false;
        self.leave(State::Lost, cx);
    }

    fn leave(&mut self, state: State, cx: &mut Context<'_>) {
        self.state = state;
        self.pending.clear();
        self.subscribing = None;
        self.outbound.clear(cx.out);
        self.lapse_at = None;
        self.forget_at = match self.lifetime {
            SessionLifetime::Connection => Some(cx.now + LINGER),
            SessionLifetime::Lasting => cx.rules.forget_after.map(|after| cx.now + after),
        };
    }

    /// The client has been heard: its time begins again (§6.11, §6.14).
    fn refresh(&mut self, now: Instant) {
        let silence = match self.state {
            State::Active => self.keep_alive,
            State::Asleep => self.sleep,
            // Connecting and awake clients are supervised by retransmissions.
            State::Connecting(_) | State::Awake => Duration::ZERO,
            State::Attaching | State::Lost | State::Disconnected => return,
        };
        self.lapse_at = (!silence.is_zero()).then(|| now + with_tolerance(silence));
    }
}

impl Setup {
    fn ask(&self, out: &mut Outputs) {
        match self.step {
            Step::Topic => out.send(&Packet::WillTopicReq),
            Step::Message(_) => out.send(&Packet::WillMsgReq),
        }
    }
}

impl WillName {
    /// `None`: this cannot be a topic name.
    fn check(will: &WillTopic<'_>) -> Option<Self> {
        let topic = TopicName::new(std::str::from_utf8(will.topic_name).ok()?).ok()?;
        Some(Self { topic, qos: will.qos, retain: will.retain })
    }
}

/// How long to wait for a client that promised to speak within `duration` (§7.2).
fn with_tolerance(duration: Duration) -> Duration {
    if duration <= Duration::from_secs(60) { duration * 3 / 2 } else { duration * 11 / 10 }
}

#[derive(Debug)]
enum State {
    Connecting(Setup),
    /// The shell opens the session.
    Attaching,
    Active,
    Asleep,
    Awake,
    Lost,
    Disconnected,
}

/// A CONNECT that waits for its will.
#[derive(Debug)]
struct Setup {
    clean_session: bool,
    keep_alive: Duration,
    /// The client comes from asleep or awake and still knows its topic ids.
    remembers: bool,
    step: Step,
    retry: Retry,
}

#[derive(Debug)]
enum Step {
    Topic,
    Message(WillName),
}

/// A will topic and its flags.
#[derive(Clone, Debug, PartialEq, Eq)]
struct WillName {
    topic: TopicName,
    qos: QoS,
    retain: bool,
}

/// The will as the client has said it so far; it counts once both parts are there (§6.4).
#[derive(Clone, Debug, Default)]
struct WillData {
    name: Option<WillName>,
    message: Option<Bytes>,
}

impl WillData {
    fn to_will(&self) -> Option<Will> {
        let WillName { topic, qos, retain } = self.name.clone()?;
        Some(Will { topic, payload: self.message.clone()?, qos, retain })
    }
}
