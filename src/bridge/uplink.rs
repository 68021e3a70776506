//! The task of one upstream: connect, stream, and after a loss wait and connect again, for ever.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep, timeout};
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::condition::{Phase, Wish};
use super::dial::{Transport, Way};
use super::handshake::{Greeted, greet};
use super::manners::{Greeting, Manners, Open, Said};
use super::reporter::Reporter;
use super::sas;
use super::schedule::Window;
use super::settings::{AddressOrder, Connection};
use super::stream::{End, Ended, FAREWELL, Stream};
use super::suspicion::Suspicion;
use super::terms::Terms;
use super::url::Url;
use super::words::{ITSELF, Proof, Who};
use super::{LOOK_AGAIN, Stop, Upstream, becomes_true};
use crate::clock::UnixMillis;
use crate::proto::mqtt::Version;
use crate::tls::{ClientTls, explain};
use crate::via::GatewayId;

/// How often a lazy upstream looks whether something waits. A session without connection has nobody to wake, and a
/// connection that is made when needed is in no hurry.
const LAZY_LOOK: Duration = Duration::from_millis(500);
/// How often the time until the next look for the first address is doubled.
const MAX_DOUBLINGS: u32 = 6;
/// How often the log says that a certificate expires.
const REMIND: Duration = Duration::from_secs(86_400);
/// How many different reasons are logged within one outage.
const REASONS_LOGGED: usize = 8;

/// Runs the upstream until `shutdown`.
pub(super) async fn run(upstream: Upstream, shutdown: watch::Receiver<bool>) {
    let stop = Stop {
        shutdown,
        wish: upstream.shared.wish.subscribe(),
        connection: upstream.settings.connection.clone(),
        clock: upstream.shared.hub.clock().clone(),
        renew_at: None,
    };
    let mut uplink = Uplink::new(&upstream, stop);
    let mut reporter = Reporter::new(&upstream);
    tokio::select! {
        () = uplink.work() => {}
        () = reporter.work() => {}
        () = watch_certificates(&upstream) => {}
    }
    upstream.shared.enter(Phase::Stopped, None);
    reporter.report();
}

/// How often a connected upstream looks at its certificates; they are for its next connection.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Takes over renewed certificates while connected too, and logs what expires: when it is first known, and once a day.
async fn watch_certificates(upstream: &Upstream) {
    let shared = &upstream.shared;
    let mut ticks = interval(CHECK_INTERVAL);
    let mut told: Option<Instant> = None;
    loop {
        ticks.tick().await;
        let tls = shared.tls.lock().clone();
        if let Some(tls) = tls {
            tls.refresh_and_log(&shared.name);
        }
        match shared.expiry_notice() {
            None => told = None,
            Some(_) if told.is_some_and(|told| told.elapsed() < REMIND) => {}
            Some(notice) => {
                warn!(upstream = shared.name, "{notice}");
                told = Some(Instant::now());
            }
        }
    }
}

struct Uplink<'a> {
    upstream: &'a Upstream,
    stop: Stop,
    backoff: Backoff,
    /// When the connection is to be made anew with a new token.
    renew_at: Option<Instant>,
    /// Index of the address after the one used last, where they take turns.
    next_address: usize,
    terms: Terms,
    suspicion: Suspicion,
    manners: Manners,
    /// The session that is remembered there began with the connection that was left just now for a better version.
    began_session: bool,
    /// Where the upstream was subscribed to in this process; 3.1.1 sends retained messages again for each SUBSCRIBE.
    subscribed: Vec<Url>,
    /// Where the last connection was.
    last: Option<Url>,
    /// Whether what is remembered there has QoS 2 deliveries that are not over. They will be, at the next address, and
    /// under their identifiers other messages go out then.
    left_open: bool,
    /// How often in a row the first address was there for a moment only.
    returned_in_vain: u32,
    /// Where our session is new and was not connected yet, or where it was left with deliveries that are over by now. What
    /// is remembered there would take new messages for repetitions.
    strangers: Vec<Url>,
    /// Whether the next CONNECT ends the session that is remembered.
    clean_start: bool,
    /// Reasons that were logged in this outage already.
    told: Vec<String>,
    /// When the outage began.
    down_since: Instant,
}

/// Why an upstream is meant not to be connected.
struct Rest {
    phase: Phase,
    reason: Option<String>,
    /// When it is meant to connect.
    next: Option<UnixMillis>,
}

/// How an attempt ended.
enum Attempt {
    /// We were told to stop or pause.
    Asked,
    /// It never was a connection.
    Failed(String),
    Lost {
        reason: String,
        lasted: Duration,
    },
    /// Try the same address again, now that something was learnt about the upstream.
    Again,
}

impl<'a> Uplink<'a> {
    fn new(upstream: &'a Upstream, stop: Stop) -> Self {
        Self {
            upstream,
            stop,
            backoff: Backoff::new(upstream.settings.backoff),
            renew_at: None,
            next_address: 0,
            terms: Terms::new(upstream.settings.version),
            suspicion: Suspicion::new(),
            manners: Manners::default(),
            began_session: false,
            subscribed: Vec::new(),
            last: None,
            left_open: false,
            returned_in_vain: 0,
            strangers: if upstream.is_new { upstream.settings.urls.clone() } else { Vec::new() },
            clean_start: false,
            told: Vec::new(),
            down_since: Instant::now(),
        }
    }

    async fn work(&mut self) {
        while !self.stop.is_shutdown() {
            let wish = *self.stop.wish.borrow_and_update();
            if let Some(rest) = self.rest(wish) {
                self.pass(rest).await;
                continue;
            }
            let Some(reason) = self.round().await else { continue };
            self.wait(reason).await;
        }
    }

    /// Why not to be connected now; `None` to connect.
    fn rest(&self, wish: Wish) -> Option<Rest> {
        let shared = &self.upstream.shared;
        let rest = |phase, reason: Option<&str>, next| Rest { phase, reason: reason.map(Into::into), next };
        match (wish, &shared.connection) {
            (Wish::Cut, _) => Some(rest(Phase::Paused, Some("cut by an operator"), None)),
            (Wish::AsConfigured, Connection::Manual) => {
                Some(rest(Phase::Paused, Some("connects when an operator says so (`connection: manual`)"), None))
            }
            (Wish::AsConfigured, Connection::Lazy) if shared.queued().0 == 0 => {
                Some(rest(Phase::Idle, Some("connects when something waits (`connection: lazy`)"), None))
            }
            (Wish::AsConfigured, Connection::Scheduled(schedule)) => {
                let clock = shared.hub.clock();
                if !clock.is_set() {
                    let reason = "connects at certain times, and the clock has not been set since power-up";
                    return Some(rest(Phase::Scheduled, Some(reason), None));
                }
                match schedule.at(clock.now()) {
                    Window::Open { .. } => None,
                    Window::Closed { next } => Some(rest(
                        Phase::Scheduled,
                        Some("connects at certain times (`connection: scheduled`)"),
                        Some(next),
                    )),
                }
            }
            (Wish::AsConfigured | Wish::Connect, _) => None,
        }
    }

    /// Lets some time pass at rest, until there may be a reason to connect.
    async fn pass(&mut self, Rest { phase, reason, next }: Rest) {
        let shared = &self.upstream.shared;
        let (name, queued) = (&shared.name, shared.queued().0);
        let before = shared.condition.lock().clone();
        if before.phase != phase {
            info!(upstream = name, queued, reason, "upstream not connected, as is meant");
            self.backoff.reset();
            self.told.clear();
        }
        if (before.phase, &before.reason, before.next_attempt) != (phase, &reason, next) {
            shared.enter(phase, reason);
            shared.condition.lock().next_attempt = next;
        }
        let until_next = next.map_or(LOOK_AGAIN, |next| next.since(shared.now()).min(LOOK_AGAIN));
        tokio::select! {
            () = becomes_true(&mut self.stop.shutdown) => {}
            _ = self.stop.wish.changed() => {}
            () = sleep(if phase == Phase::Idle { LAZY_LOOK } else { until_next }) => {}
        }
    }

    /// Tries each address in turn until one was connected or all have failed. The last failure's reason; `None` when we
    /// were asked to stop.
    async fn round(&mut self) -> Option<String> {
        let mut failure = String::new();
        let urls = &self.upstream.settings.urls;
        let first = match self.upstream.settings.address_order {
            AddressOrder::Ordered => 0,
            AddressOrder::RoundRobin => self.next_address,
        };
        for index in (first..first + urls.len()).map(|index| index % urls.len()) {
            let url = &urls[index];
            self.next_address = index + 1;
            // What is learnt about an upstream narrows the choice each time; the bound is for one that contradicts itself.
            for _ in 0..8 {
                match self.attempt(url).await {
                    Attempt::Asked => return None,
                    Attempt::Again => continue,
                    Attempt::Failed(reason) => {
                        self.failed(url, &reason);
                        failure = reason;
                    }
                    Attempt::Lost { reason, lasted } => {
                        self.backoff.ended_after(lasted);
                        self.told.clear();
                        self.failed(url, &reason);
                        return Some(reason);
                    }
                }
                break;
            }
        }
        Some(failure)
    }

    /// Writes a failure down, and logs it once per outage.
    fn failed(&mut self, url: &Url, reason: &str) {
        let shared = &self.upstream.shared;
        shared.counters.failures.fetch_add(1, Ordering::Relaxed);
        shared.condition.lock().last_error = Some((shared.now(), reason.to_owned()));
        shared.enter(Phase::Waiting, Some(reason.to_owned()));
        let (name, queued) = (&shared.name, shared.queued().0);
        if self.told.len() < REASONS_LOGGED && !self.told.iter().any(|told| told == reason) {
            self.told.push(reason.to_owned());
            warn!(upstream = name, %url, reason, queued, "upstream not connected; messages for it are kept");
        } else {
            debug!(upstream = name, %url, reason, queued, "upstream still not connected");
        }
    }

    async fn wait(&mut self, reason: String) {
        let shared = &self.upstream.shared;
        // Without randomness the waits are still right, only less spread.
        let wait = self.backoff.next(getrandom::u32().unwrap_or(u32::MAX / 2));
        shared.enter(Phase::Waiting, Some(reason));
        let millis = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        shared.condition.lock().next_attempt = Some(UnixMillis(shared.now().0.saturating_add(millis)));
        let mut wish = self.stop.wish.clone();
        tokio::select! {
            () = sleep(wait) => {}
            () = self.stop.asked() => {}
            // Whoever asks for the connection means now.
            _ = wish.changed() => self.backoff.reset(),
        }
    }

    async fn attempt(&mut self, url: &Url) -> Attempt {
        let shared = &self.upstream.shared;
        {
            let mut condition = shared.condition.lock();
            // A retry keeps the reason of the last failure in sight.
            let reason = condition.reason.take().filter(|_| condition.phase == Phase::Waiting);
            condition.enter(Phase::Connecting, reason, shared.now());
            condition.address = Some(url.to_string());
        }
        shared.changed.notify_one();
        let mut stop = self.stop.clone();
        let connected = tokio::select! {
            connected = self.connect(url) => connected,
            () = stop.asked() => return Attempt::Asked,
        };
        match connected {
            Err(attempt) => attempt,
            Ok((mut stream, transport, greeting)) => {
                let since = Instant::now();
                let say_again = self.manners.next(since.into_std()).map(Instant::from_std);
                stop.renew_at = self.renew_at.into_iter().chain(say_again).min();
                let (call, calls) = watch::channel(());
                let first = self.main_address().filter(|first| *first != url);
                stream.calls = first.map(|_| calls);
                let asked = stream.asks;
                let Ended { end, is_unanswered, unanswered_greeting, is_open, course } = tokio::select! {
                    ended = stream.run(transport, &mut stop) => ended,
                    never = self.watch_for(first, &call) => match never {},
                };
                let subscribed = unanswered_greeting == Open::Nothing && greeting.left_out.is_empty();
                self.subscribed.retain(|other| other != url || subscribed);
                let now = Instant::now().into_std();
                if let Some(said) =
                    self.manners.ended(&greeting, course.is_closed && !is_unanswered, unanswered_greeting, now)
                {
                    let notice = self.upstream.rules.left_out(said);
                    warn!(upstream = shared.name, "{notice}");
                }
                if subscribed && !self.subscribed.contains(url) {
                    self.subscribed.push(url.clone());
                }
                self.left_open = is_open && self.upstream.rules.sends_qos_2();
                self.returned_in_vain = match end {
                    End::CalledAway => self.returned_in_vain + 1,
                    _ => self.returned_in_vain,
                };
                self.down_since = Instant::now();
                self.suspicion.ended(course);
                if asked {
                    self.terms.asked(is_unanswered && matches!(end, End::Closed(_) | End::Lost(_)));
                }
                match end {
                    End::Asked | End::CalledAway => Attempt::Asked,
                    End::Idle => {
                        // What the operator asked for is done.
                        shared.wish.send_if_modified(|wish| {
                            *wish == Wish::Connect && {
                                *wish = Wish::AsConfigured;
                                true
                            }
                        });
                        Attempt::Asked
                    }
                    End::Closed(mut reason) | End::Lost(mut reason) => {
                        if let Some(advice) = self.suspicion.advice() {
                            reason = format!("{reason}; {advice}");
                        }
                        Attempt::Lost { reason, lasted: since.elapsed() }
                    }
                }
            }
        }
    }

    /// The address to return to from the others.
    fn main_address(&self) -> Option<&'a Url> {
        let settings = &self.upstream.settings;
        settings.urls.first().filter(|_| settings.urls.len() > 1 && settings.address_order == AddressOrder::Ordered)
    }

    /// Looks whether `address` is back, and calls each time it is. A TCP, TLS and WebSocket connection says so; a CONNECT
    /// would take over our own session where the addresses are of one broker.
    async fn watch_for(&self, address: Option<&Url>, call: &watch::Sender<()>) -> Infallible {
        let Some(address) = address else { return std::future::pending().await };
        let (settings, name) = (&self.upstream.settings, &self.upstream.shared.name);
        // An address that takes connections and does not keep them costs an interruption each time.
        let wait = settings.return_interval.saturating_mul(1 << self.returned_in_vain.min(MAX_DOUBLINGS));
        loop {
            sleep(wait).await;
            let dialled = async {
                let tls = address.scheme.is_tls().then(|| self.load_tls()).transpose()?;
                self.way(address, tls.as_deref()).dial().await.map_err(|error| error.0)
            };
            match dialled.await {
                Ok(_) => {
                    info!(upstream = name, %address, "the first address is back; moving there once nothing is in flight");
                    call.send_replace(());
                }
                Err(reason) => debug!(upstream = name, %address, reason, "the first address is still away"),
            }
        }
    }

    fn way<'w>(&'w self, url: &'w Url, tls: Option<&'w ClientTls>) -> Way<'w> {
        let settings = &self.upstream.settings;
        Way {
            url,
            proxy: settings.proxy.as_ref(),
            tls,
            timeout: settings.connect_timeout,
            max_packet_size: settings.max_packet_size,
        }
    }

    async fn connect(&mut self, url: &Url) -> Result<(Stream<'a>, Box<dyn Transport>, Greeting), Attempt> {
        let upstream = self.upstream;
        let (settings, shared) = (&upstream.settings, &upstream.shared);
        let proof = if settings.sas.is_some() { Proof::Token } else { Proof::Given };
        let who = Who { client_id: &upstream.rules.client_id, username: settings.username.as_deref(), proof };
        let deadline = Instant::now() + settings.connect_timeout;
        let tls = url.scheme.is_tls().then(|| self.load_tls()).transpose().map_err(Attempt::Failed)?;
        let dialled = self.way(url, tls.as_deref()).dial().await;
        let (mut transport, address) = dialled.map_err(|error| Attempt::Failed(error.0))?;
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        let mut options = self.terms.options(settings, &upstream.rules, self.clean_start);
        let gateway = GatewayId::of_boot(shared.hub.clock().boot_id());
        options.gateway = Some(upstream.rules.introduction(gateway));
        self.renew_at = None;
        if let Some(sas) = &settings.sas {
            let clock = shared.hub.clock();
            if !clock.is_set() {
                let reason = "a SAS token says until when it is good, and the clock has not been set since power-up";
                return Err(Attempt::Failed(reason.into()));
            }
            let id = upstream.rules.client_id.as_str();
            options.user_name.get_or_insert_with(|| sas::user_name(url, id));
            options.password = Some(sas.token(url, id, clock.now()).into_bytes());
            self.renew_at = Some(Instant::now() + sas.renewed_after());
        }
        let greeted = match greet(&mut transport, options, left).await {
            Ok(greeted) => greeted,
            Err(unwelcome) => {
                // Up to TLS 1.2 a server judges our certificate within the handshake; from 1.3 on it tells after it.
                if let (Some(error), Some(tls)) = (unwelcome.cause(), &tls)
                    && let Some(said) = explain::alert(error, tls.settings(), &url.host)
                {
                    return Err(Attempt::Failed(said));
                }
                let has_will = upstream.rules.state_topic.is_some();
                let refused = self.terms.refused(url, unwelcome, who, has_will);
                return Err(refused.map_or(Attempt::Again, Attempt::Failed));
            }
        };
        if greeted.client.gateway() == Some(gateway) {
            take_leave(greeted, &mut transport).await;
            return Err(Attempt::Failed(ITSELF.into()));
        }
        let mut greeted = self.meet(url, greeted, &mut transport).await?;
        greeted.session_present &= !std::mem::take(&mut self.began_session);
        if !self.terms.taken() {
            self.began_session = !greeted.session_present;
            take_leave(greeted, &mut transport).await;
            return Err(Attempt::Again);
        }
        let window = self.terms.window(greeted.client.limits().receive_maximum, &upstream.rules);
        let link = upstream
            .attach(window, Some(format!("{url} ({address})")))
            .map_err(|error| Attempt::Failed(error.to_string()))?;
        shared.counters.connections.fetch_add(1, Ordering::Relaxed);
        let version = self.terms.version.name();
        let session_present = greeted.session_present;
        info!(
            upstream = shared.name, %url, %address, mqtt = version, session_present, queued = shared.queued().0,
            down_for = ?self.down_since.elapsed(), "upstream connected"
        );
        self.told.clear();
        shared.condition.lock().version = Some(version);
        shared.enter(Phase::Connected, None);
        let subscribe = !session_present || !self.subscribed.contains(url) || self.terms.version == Version::V5;
        let state = upstream.rules.state_topic.iter().map(|_| Said::State);
        let rules =
            upstream.rules.incoming.iter().enumerate().filter(|_| subscribe).map(|(index, _)| Said::Rule(index));
        let greeting = self.manners.greeting(state.chain(rules), Instant::now().into_std());
        let plan = self.suspicion.plan();
        let left_out = greeting.left_out.iter().map(|said| upstream.rules.left_out(*said));
        let lessons = plan.lessons.iter().map(ToString::to_string);
        let notices: Vec<_> = self.terms.notice().into_iter().chain(left_out).chain(lessons).collect();
        if !notices.is_empty() {
            shared.note(notices.join("; "));
        }
        let mut stream = Stream::new(shared, &upstream.rules, who, greeted, link, greeting.clone(), plan);
        stream.asks = self.terms.asks();
        // Equal addresses are those of one broker, and its session is the same at each.
        let main = self.main_address();
        stream.is_elsewhere = main.is_some() && self.last.as_ref() != Some(url);
        if let Some(last) = self.last.replace(url.clone()).filter(|last| last != url)
            && self.left_open
            && main.is_some()
            && !self.strangers.contains(&last)
        {
            self.strangers.push(last);
        }
        self.left_open = false;
        if main == Some(url) {
            self.returned_in_vain = 0;
        }
        stream.idle_timeout = match (&settings.connection, *shared.wish.borrow()) {
            (Connection::Lazy, _) | (Connection::Scheduled(_), Wish::Connect) => Some(settings.idle_timeout),
            _ => None,
        };
        Ok((stream, transport, greeting))
    }

    /// Where the upstream has a session of ours and we have lost it, both must begin anew (MQTT 5.0 §3.2.2.1.1).
    async fn meet<T>(
        &mut self,
        url: &Url,
        greeted: Greeted<T>,
        transport: &mut Box<dyn Transport>,
    ) -> Result<Greeted<T>, Attempt> {
        if !self.strangers.contains(url) {
            return Ok(greeted);
        }
        let ended = std::mem::take(&mut self.clean_start);
        if !greeted.session_present && (!ended || self.terms.version.is_5()) {
            self.strangers.retain(|stranger| stranger != url);
            return Ok(greeted);
        }
        // In 3.1.1 a session that begins clean lasts no longer than its connection.
        self.clean_start = !ended;
        if !ended {
            let name = &self.upstream.shared.name;
            warn!(upstream = name, %url, "the upstream knows a session that is not here any more; it is begun anew");
        }
        take_leave(greeted, transport).await;
        Err(Attempt::Again)
    }

    /// Opens the certificates on first use, and takes over renewed ones before each attempt. Where they cannot be read,
    /// the gateway runs, the queue fills, and the reason stands in the status until they can.
    fn load_tls(&self) -> Result<Arc<ClientTls>, String> {
        let shared = &self.upstream.shared;
        let mut opened = shared.tls.lock();
        if let Some(tls) = &*opened {
            tls.refresh_and_log(&shared.name);
            return Ok(tls.clone());
        }
        let tls = ClientTls::open(self.upstream.settings.tls.clone()).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(" ({cause})"));
            format!("{error}{}", cause.unwrap_or_default())
        })?;
        Ok(opened.insert(Arc::new(tls)).clone())
    }
}

/// Ends a connection before anything was sent on it.
async fn take_leave<T>(mut greeted: Greeted<T>, transport: &mut Box<dyn Transport>) {
    let mut farewell = Vec::new();
    greeted.client.disconnect(Instant::now().into_std(), &mut farewell);
    let _ = timeout(FAREWELL, transport.write_all(&farewell)).await;
}
