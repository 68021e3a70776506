//! The section `upstreams`.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use super::access::queue_limits;
use super::report::Report;
use super::scalar::{Name, Origin, Percent, Scalar, Size, words};
use super::source::Span;
use super::table::Table;
use super::tls;
use crate::bridge::proxy::Proxy;
use crate::bridge::rate::MaxRate;
use crate::bridge::rules::{Direction, Naming, Provenance, Retain, Rule, RuleSettings};
use crate::bridge::sas::{self, Sas};
use crate::bridge::schedule::{Cron, Schedule, Zone};
use crate::bridge::url::Url;
use crate::bridge::{AddressOrder, Connection, Settings, VersionChoice, backoff};
use crate::hub::{Priority, QueueLimits, WhenFull};
use crate::message::QoS;
use crate::secret::Secret;
use crate::store;
use crate::supervise::describe;

words!(QoS, "a QoS", "0" => QoS::AtMostOnce, "1" => QoS::AtLeastOnce, "2" => QoS::ExactlyOnce);
words!(VersionChoice, "an MQTT version", "newest" => VersionChoice::Newest, "5" => VersionChoice::V5,
    "3.1.1" => VersionChoice::V3_1_1);
words!(Retain, "what becomes of the retain flag", "as_published" => Retain::AsPublished, "never" => Retain::Never);
words!(Priority, "a priority", "high" => Priority::High, "normal" => Priority::Normal, "low" => Priority::Low);
words!(Provenance, "what messages say of their origin", "omit" => Provenance::Omit,
    "user_properties" => Provenance::UserProperties, "json" => Provenance::Json, "add" => Provenance::UserProperties);

impl Scalar for Url {
    const SHAPE: &'static str = "`mqtts://HOST[:PORT]`, `wss://HOST[:PORT]/PATH` or, unencrypted, `mqtt://…`, `ws://…`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

/// The names of [`Connection`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    Lazy,
    Scheduled,
    Manual,
}
words!(When, "when to be connected", "always" => When::Always, "lazy" => When::Lazy, "scheduled" => When::Scheduled,
    "manual" => When::Manual);
words!(Zone, "a time zone", "local" => Zone::Local, "utc" => Zone::Utc);

impl Scalar for Cron {
    const SHAPE: &'static str = "five cron fields, as in `0 2 * * *` for two o'clock every night";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        text.parse::<Self>().map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        String::new()
    }
}

impl Scalar for Proxy {
    const SHAPE: &'static str = "`http://[USER:PASSWORD@]HOST:PORT`, best as `file:PATH` where there is a password";
    const SECRET: bool = true;
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

pub(super) fn upstreams(table: &mut Table<'_>, gateway: &str, store: &store::Settings) -> Vec<Settings> {
    let mut names = Vec::new();
    let upstreams = table.list("upstreams", "Brokers to forward to; each has a queue of its own.", |table| {
        let name = table.value::<Name>("name", "Names the upstream; a new name starts with an empty queue.");
        let name = name.required_at();
        names.extend(name.as_ref().map(|name| (name.value.0.clone(), name.span)));
        let settings = upstream(table, name.map(|name| (name.value.0, name.span)), gateway);
        let queue = settings.as_ref().and_then(|settings| settings.queue);
        if let (Some(place), Some(queue)) = (table.place_of("queue"), queue)
            && queue.max_bytes > store.max_bytes
        {
            let report = Report::warning(place, "this queue may get larger than the database that keeps it");
            let label = format!("`max_bytes` is {}", Size(queue.max_bytes).show());
            let max_size = Size(store.max_bytes).show();
            table.report(report.label(label).help(format!("raise `store.max_size`, which is {max_size}, or lower it")));
        }
        settings
    });
    table.cx.unique("upstreams", names.iter().map(|(name, place)| (name.as_str(), *place)));
    upstreams
}

fn upstream(table: &mut Table<'_>, name: Option<(String, Span)>, gateway: &str) -> Option<Settings> {
    let errors_before = table.cx.errors();
    let meaning = "Where the broker is reached; a list is tried in order.";
    let urls = table.values::<Url>("url", meaning);
    if urls.is_empty() && table.place_of("url").is_none() {
        table.missing("url", "add `url: mqtts://HOST`");
    }
    let meaning = "Several addresses are equal: a lost connection goes on with the next, not with the first.";
    let round_robin = table.value("round_robin", meaning).or(false);
    let meaning = "While connected to another address than the first, how often to look whether the first is back.";
    let return_interval = table
        .value("return_interval", meaning)
        .range(Duration::from_secs(1)..=Duration::from_secs(86_400))
        .or(Duration::from_secs(30));
    let meaning = "The HTTP proxy on the way to the broker, asked for a tunnel by CONNECT.";
    let proxy = table.value::<Proxy>("proxy", meaning).optional();
    let defaults = urls.first().map(|url| Settings::new("", url.value.clone()));
    let defaults = defaults.unwrap_or_else(|| Settings { urls: Vec::new(), ..Settings::new("", placeholder()) });
    let version = table.value("version", "The MQTT version; `newest` tries 5 first.").or(defaults.version);
    let client_id = table.value::<String>("client_id", "The client id to use; `GATEWAY-NAME` if absent.").optional();
    let username = table.value::<String>("username", "The user name to log in with.").optional();
    let password = table.value::<Secret>("password", "The password to log in with.").optional();
    let sas = table.optional("sas", "Azure's tokens in place of a password, made from a key and renewed.", sas);
    table.at_most_one(&["password", "sas"]);
    let tls = table.table("tls", "For `mqtts://`: whom to trust and how to prove who we are.", tls::client);
    let keep_alive = table
        .value("keep_alive", "How long the connection may be silent before it is probed.")
        .range(Duration::from_secs(1)..=Duration::from_secs(65_535))
        .or(defaults.keep_alive);
    let connect_timeout = table
        .value("connect_timeout", "For all of it: name, TCP, TLS and MQTT.")
        .range(Duration::from_secs(1)..=Duration::from_secs(300))
        .or(defaults.connect_timeout);
    let session_expiry = table
        .value("session_expiry", "How long the broker keeps our session while we are away (MQTT 5).")
        .range(Duration::ZERO..=Duration::from_secs(u64::from(u32::MAX - 1)))
        .or(defaults.session_expiry);
    let connection = connection(table);
    let meaning = "How long nothing may cross before a `lazy` connection, or one made by hand, ends.";
    let idle_timeout = table
        .value("idle_timeout", meaning)
        .range(Duration::from_secs(1)..=Duration::from_secs(86_400))
        .or(defaults.idle_timeout);
    let outgoing = rules(table, Direction::Out, gateway);
    let incoming = rules(table, Direction::In, gateway);
    let queue_defaults = QueueLimits {
        max_messages: 1_000_000,
        max_bytes: 256 << 20,
        when_full: WhenFull::DropOldest,
        ..QueueLimits::default()
    };
    let queue = table.table("queue", "Limits of the queue that holds what could not be sent yet.", |table| {
        Some(queue_limits(table, "upstream", queue_defaults))
    });
    let queue = Some(queue.unwrap_or(queue_defaults));
    let max_inflight = table
        .value("max_inflight_messages", "Messages sent and not yet acknowledged; the broker may allow fewer.")
        .range(1..=u16::MAX)
        .or(defaults.max_inflight);
    let meaning =
        "The part of the uplink for messages published while it is up, beside a backlog; 0% keeps strict order.";
    let live_share = table.value("live_share", meaning).or(Percent(defaults.live_share));
    let meaning = "The most that is sent to the broker in a second; the rest waits in the queue.";
    let max_rate = table.table("max_rate", meaning, max_rate).unwrap_or_default();
    let meaning = "A topic on the broker: `1` while the gateway is connected, else `0`; `{gateway}` is its name.";
    let state_topic = table.value::<String>("state_topic", meaning).optional();
    let max_packet_size = table
        .value("max_packet_size", "The largest packet accepted from the broker.")
        .range(Size(1024)..=Size::mib(256))
        .or(Size(u64::from(defaults.max_packet_size)));
    let meaning = "The largest packet sent to the broker, for one that cannot say itself what it takes; larger messages are dropped.";
    let bridge_max_packet_size =
        table.value("bridge_max_packet_size", meaning).range(Size(128)..=Size::mib(256)).optional();
    let max_hops = table
        .value("max_hops", "How many bridges a message may cross, this one included; what crosses more goes in circles. Where `fieldgate-via` tells which gateways a message has been at, it ends before.")
        .range(1..=u8::MAX)
        .or(defaults.max_hops);
    let meaning = "How long to wait between attempts to connect; drawn at random.";
    let backoff = table.table("backoff", meaning, |table| backoff(table, defaults.backoff));
    let (name, name_place) = name?;
    let settings = Settings {
        name,
        urls: urls.into_iter().map(|url| url.value).collect(),
        address_order: if round_robin { AddressOrder::RoundRobin } else { AddressOrder::Ordered },
        return_interval,
        proxy,
        version,
        client_id,
        username,
        password,
        sas,
        tls,
        keep_alive,
        connect_timeout,
        session_expiry,
        connection: connection.unwrap_or_default(),
        idle_timeout,
        outgoing,
        incoming,
        queue,
        max_inflight,
        live_share: live_share.0,
        max_rate,
        state_topic,
        max_packet_size: u32::try_from(max_packet_size.0).unwrap_or(u32::MAX),
        bridge_max_packet_size: bridge_max_packet_size.map(|size: Size| u32::try_from(size.0).unwrap_or(u32::MAX)),
        max_hops,
        backoff,
    };
    if settings.urls.is_empty() {
        return None;
    }
    if table.cx.errors() > errors_before {
        return Some(settings);
    }
    if settings.outgoing.is_empty() && settings.incoming.is_empty() {
        let report = Report::warning(name_place, "this upstream forwards nothing");
        table.report(report.help("add `out: [ { filter: \"#\" } ]` or another rule"));
    }
    let wants_properties =
        |rule: &RuleSettings| rule.provenance == Provenance::UserProperties || !rule.user_properties.is_empty();
    if settings.version == VersionChoice::V3_1_1 && settings.outgoing.iter().any(wants_properties) {
        let place = table.place_of("version").unwrap_or(name_place);
        let report =
            Report::warning(place, "MQTT 3.1.1 has no user properties, so those of the `out` rules are left out");
        table.report(report.help("take them out; `provenance: json` writes into the payload"));
    }
    if let Err(error) = settings.check(gateway) {
        table.report(Report::error(name_place, "this upstream cannot work").label(describe(&error)));
    }
    Some(settings)
}

fn backoff(table: &mut Table<'_>, defaults: backoff::Settings) -> backoff::Settings {
    let day = Duration::from_secs(86_400);
    let shortest = Duration::from_millis(10);
    let base = table.value("base", "The shortest wait, and the first.").range(shortest..=day).or(defaults.base);
    let cap = table.value("cap", "The longest wait; each is up to three times the last.").range(base..=day);
    let cap = cap.or(defaults.cap.max(base));
    let meaning = "A connection that lasted this long makes the next wait a first one again.";
    let stable = table.value("stable", meaning).range(Duration::ZERO..=day).or(defaults.stable);
    backoff::Settings { base, cap, stable }
}

/// Stands in where the URL is missing, so that the other keys are read all the same.
fn placeholder() -> Url {
    Url { scheme: crate::bridge::url::Scheme::Tls, host: String::new(), port: 0, path: String::new() }
}

fn sas(table: &mut Table<'_>) -> Option<Sas> {
    let key = table.value::<Secret>("key", "The device's primary or secondary key, as Azure shows it.").required();
    let meaning =
        "How long a token is good for; the connection is made anew with the next one after four fifths of it.";
    let ttl = table
        .value("ttl", meaning)
        .range(Duration::from_secs(300)..=Duration::from_secs(365 * 86_400))
        .or(Duration::from_secs(86_400));
    let meaning = "What tokens open; `{host}` is the host of `url`, `{client_id}` the client id.";
    let resource = table.value::<String>("resource", meaning).or(sas::DEVICE.to_owned());
    let meaning = "The shared access policy whose key it is; absent for a device's own.";
    let policy = table.value::<String>("policy", meaning).optional();
    Some(Sas { key: key?, ttl, resource, policy })
}

/// When to be connected; `None` has been reported.
fn connection(table: &mut Table<'_>) -> Option<Connection> {
    let meaning =
        "When to be connected: `always`, `lazy` while something waits, `scheduled` at certain times, or `manual`.";
    let when = table.value("connection", meaning).or(When::Always);
    let place = table.place_of("schedule");
    let schedule = table.optional("schedule", "When a `scheduled` upstream is connected.", |table| {
        let cron = table.values::<Cron>("cron", "When windows begin: minute, hour, day of month, month, day of week.");
        if table.place_of("cron").is_none() {
            table.missing("cron", "add `cron: \"0 2 * * *\"`, for two o'clock every night");
        }
        let duration = table
            .value("duration", "How long a window lasts; those that overlap are one.")
            .range(Duration::from_secs(60)..=Duration::from_secs(7 * 86_400))
            .or(Duration::from_secs(1800));
        let zone = table.value("time_zone", "Whose time `cron` means.").or(Zone::Local);
        let cron: Vec<_> = cron.into_iter().map(|cron| cron.value).collect();
        (!cron.is_empty()).then_some(Schedule { cron, duration, zone })
    });
    match (when, place) {
        (When::Scheduled, None) => {
            table.missing("schedule", "add `schedule: { cron: \"0 2 * * *\", duration: 30m }`");
            None
        }
        (When::Scheduled, Some(_)) => schedule.map(Connection::Scheduled),
        (_, Some(place)) => {
            let report = Report::error(place, "`schedule` needs `connection: scheduled`");
            table.report(report.help("add that, or take the schedule out"));
            None
        }
        (When::Always, None) => Some(Connection::Always),
        (When::Lazy, None) => Some(Connection::Lazy),
        (When::Manual, None) => Some(Connection::Manual),
    }
}

fn rules(table: &mut Table<'_>, direction: Direction, gateway: &str) -> Vec<RuleSettings> {
    let (key, meaning) = match direction {
        Direction::Out => ("out", "What goes to the broker. The first rule that matches decides."),
        Direction::In => ("in", "What comes from the broker."),
    };
    table.list(key, meaning, |table| {
        let filter = table.value::<String>("filter", "The topics; `{gateway}` is the gateway's name.").required_at();
        let qos = table.value("qos", "The highest QoS at which they cross.").or(QoS::AtLeastOnce);
        let retain = table.value("retain", "Whether a retained message is retained there.").or(Retain::AsPublished);
        let naming = naming(table, direction);
        let meaning =
            "The longest that a message is worth delivering, from when it was accepted here; older ones are dropped.";
        let message_expiry = table
            .value("message_expiry", meaning)
            .range(Duration::from_secs(1)..=Duration::from_secs(u64::from(u32::MAX - 1)))
            .optional();
        let meaning = "User properties to add (MQTT 5); `{gateway}`, `{1}` and `{#}` stand for what they do in topics.";
        let user_properties = table.pairs::<String, String>("user_properties", meaning);
        let (mut provenance, mut priority, mut live_share) = (Provenance::Omit, Priority::Normal, None);
        if direction == Direction::Out {
            let meaning = "Where messages say their time, number and boot id: in `user_properties` (MQTT 5) or, as `json`, in the payload.";
            provenance = table.value("provenance", meaning).or(provenance);
            priority = table.value("priority", "What is more urgent is sent first, always.").or(priority);
            let meaning = "As the upstream's, for these messages; the rules of one priority have one share, or 0%.";
            live_share = table.value::<Percent>("live_share", meaning).optional();
        }
        let filter = filter?;
        let settings = RuleSettings {
            filter: filter.value,
            qos,
            retain,
            naming,
            message_expiry,
            user_properties: user_properties.into_iter().map(|(name, value)| (name.value, value.value)).collect(),
            provenance,
            priority,
            live_share: live_share.map(|percent| percent.0),
        };
        match Rule::new(direction, &settings, gateway) {
            Ok(_) => Some(settings),
            Err(error) => {
                table.report(Report::error(filter.span, "this rule cannot work").label(describe(&error)));
                None
            }
        }
    })
}

fn max_rate(table: &mut Table<'_>) -> Option<MaxRate> {
    let messages = table.value::<u32>("messages", "Messages in a second; no limit if absent.").range(1..=u32::MAX);
    let messages = messages.optional();
    let bytes = table.value::<Size>("bytes", "Bytes of MQTT packets in a second; no limit if absent.");
    let bytes = bytes.range(Size(1)..=Size::mib(1 << 20)).optional();
    Some(MaxRate {
        messages: messages.and_then(NonZeroU32::new),
        bytes: bytes.and_then(|bytes| NonZeroU64::new(bytes.0)),
    })
}

/// A rule's names on the two sides: prefixes, or a template for the side it goes to.
fn naming(table: &mut Table<'_>, direction: Direction) -> Naming {
    let prefix = |table: &mut Table<'_>, key, meaning| table.value::<String>(key, meaning).or(String::new());
    let local = prefix(table, "local_prefix", "Stands before the filter on this gateway only.");
    let remote = prefix(table, "remote_prefix", "Stands before the filter on the broker only.");
    let (key, meaning) = match direction {
        Direction::Out => (
            "remote_topic",
            "The whole topic on the broker, in place of prefixes: `{1}` is what stands for the filter's first `+`, `{#}` for its `#`.",
        ),
        Direction::In => (
            "local_topic",
            "The whole topic on this gateway, in place of prefixes: `{1}` is what stands for the filter's first `+`, `{#}` for its `#`.",
        ),
    };
    let template = table.value::<String>(key, meaning).optional();
    for prefix in ["local_prefix", "remote_prefix"] {
        table.at_most_one(&[key, prefix]);
    }
    template.map_or(Naming::Prefixes { local, remote }, Naming::Template)
}
