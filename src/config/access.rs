//! The sections `limits`, `users`, `password_file`, `allow_anonymous`, `acl` and `acl_file`.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::report::Report;
use super::scalar::{Origin, Scalar, Size, words};
use super::source::Located;
use super::table::Table;
use super::words::did_you_mean;
use crate::hub::access::mosquitto::{FileError, parse_passwords, parse_rules};
use crate::hub::access::{
    self, Anonymous, DeniedPublish, DeniedSubscribe, Pattern, Rule, Subject, User, is_password_hash,
};
use crate::hub::{Limits, QueueLimits, WhenFull};
use crate::secret::Secret;
use crate::throttle::AddressLimits;

words!(WhenFull, "what to do when full", "drop_oldest" => WhenFull::DropOldest, "drop_newest" => WhenFull::DropNewest,
    "reject" => WhenFull::Reject);
words!(Anonymous, "who may stay anonymous", "never" => Anonymous::Never, "loopback" => Anonymous::Loopback,
    "always" => Anonymous::Always);

words!(DeniedPublish, "what a denied PUBLISH leads to", "refuse" => DeniedPublish::Refuse,
    "acknowledge" => DeniedPublish::Acknowledge, "disconnect" => DeniedPublish::Disconnect);
words!(DeniedSubscribe, "what a denied SUBSCRIBE leads to", "refuse" => DeniedSubscribe::Refuse,
    "grant" => DeniedSubscribe::Grant);

#[derive(Clone, Copy)]
enum Group {
    Everyone,
    Anonymous,
}
words!(Group, "a group", "everyone" => Group::Everyone, "anonymous" => Group::Anonymous);

impl Scalar for Pattern {
    const SHAPE: &'static str = "a topic filter that may hold `%u` and `%c`";
    fn parse(text: &str, _: &Origin<'_>) -> Result<Self, String> {
        Self::new(text).map_err(|error| error.to_string())
    }
    fn show(&self) -> String {
        String::new()
    }
}

const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// The hub's share of the section `limits`; the listeners' is theirs.
pub(super) fn limits(table: &mut Table<'_>) -> Limits {
    let defaults = Limits::default();
    let queue = queue_limits(table, "", defaults.queue);
    Limits {
        max_connections: table
            .value("global_max_connections", "Connections of clients at a time, on all listeners together.")
            .range(1..=10_000_000)
            .or(defaults.max_connections),
        addresses: address_limits(table),
        max_inflight: table
            .value("max_inflight_messages", "QoS 1 and 2 messages sent to one client and not yet acknowledged.")
            .range(1..=u16::MAX)
            .or(defaults.max_inflight),
        queue,
        max_queue_memory: table
            .value(
                "max_queue_memory",
                "Memory for the messages of all queues; what is durable waits on disk beyond it.",
            )
            .range(Size::mib(1)..=Size::mib(1024 * 1024))
            .or(Size(defaults.max_queue_memory))
            .0,
        max_subscriptions: table
            .value("max_subscriptions", "Subscriptions of one client.")
            .range(1..=1_000_000)
            .or(defaults.max_subscriptions),
        max_topic_levels: table
            .value("max_topic_levels", "Levels of a topic name or filter.")
            .range(1..=32_768)
            .or(defaults.max_topic_levels),
        max_topic_length: table
            .value("max_topic_length", "Bytes of a topic name or filter.")
            .range(16..=65_535)
            .or(defaults.max_topic_length),
        max_retained_messages: table
            .value("max_retained_messages", "Retained messages of all topics together.")
            .range(0..=100_000_000)
            .or(defaults.max_retained_messages),
        max_retained_bytes: table
            .value("max_retained_bytes", "Memory for retained messages.")
            .or(Size(defaults.max_retained_bytes as u64))
            .bytes(),
        max_sessions: table
            .value("max_sessions", "Sessions kept, connected or not.")
            .range(1..=10_000_000)
            .or(defaults.max_sessions),
        max_session_expiry: table
            .value("max_session_expiry", "The longest a session is kept after its client is gone; no limit if absent.")
            .range(Duration::from_secs(1)..=10 * YEAR)
            .optional(),
        // Each upstream has a limit of its own.
        max_inflight_upstream: u16::MAX,
        // Stands in the section `store`.
        max_age: None,
    }
}

fn address_limits(table: &mut Table<'_>) -> AddressLimits {
    let defaults = AddressLimits::default();
    AddressLimits {
        max_connections: table
            .value("max_connections_per_address", "Connections that one address may have, on all listeners together.")
            .range(1..=1_000_000)
            .or(defaults.max_connections),
        connection_rate: table
            .value("max_connection_rate", "Connections per second that one address may open; 0 for no limit.")
            .range(0..=1_000_000)
            .or(defaults.connection_rate),
        connection_burst: table
            .value("connection_burst", "Connections that an address which was quiet may open at once.")
            .range(1..=1_000_000)
            .or(defaults.connection_burst),
        login_failures: table
            .value("max_login_failures", "Wrong passwords of one address before it has to wait, 1 s, then 2 s, 4 s, ….")
            .range(0..=1_000_000)
            .or(defaults.login_failures),
        max_login_delay: table
            .value("max_login_delay", "The longest wait after a wrong password; 0s for no waits.")
            .range(Duration::ZERO..=Duration::from_secs(86_400))
            .or(defaults.max_login_delay),
        limit_loopback: table
            .value("limit_loopback", "Whether these limits of an address hold for this machine too.")
            .or(defaults.limit_loopback),
    }
}

/// The limits of a queue: of each client in `limits`, of one upstream in its `queue`.
pub(super) fn queue_limits(table: &mut Table<'_>, whose: &str, defaults: QueueLimits) -> QueueLimits {
    let (messages, bytes, age) = if whose.is_empty() {
        ("max_queued_messages", "max_queued_bytes", "max_queued_age")
    } else {
        ("max_messages", "max_bytes", "max_age")
    };
    QueueLimits {
        max_messages: table
            .value(messages, "Messages that may wait in one queue.")
            .range(1..=1_000_000_000)
            .or(defaults.max_messages),
        max_bytes: table
            .value(bytes, "Bytes that may wait in one queue.")
            .range(Size(1024)..=Size::mib(1024 * 1024))
            .or(Size(defaults.max_bytes))
            .0,
        when_full: table
            .value("when_full", "What happens to QoS 1 and 2 messages for a full queue; `reject` tells the publisher.")
            .or(defaults.when_full),
        max_age: table
            .value(age, "What has waited for longer is given up, as if it had expired; never if absent.")
            .range(Duration::from_secs(1)..=10 * YEAR)
            .optional(),
        ..defaults
    }
}

pub(super) fn access(table: &mut Table<'_>) -> access::Settings {
    let mut names: Vec<Located<String>> = Vec::new();
    let mut users = table.list("users", "Who may connect; `fieldgate passwd NAME` makes an entry.", |table| {
        let name = table.value::<String>("name", "The user name a client gives.").check(not_empty).required_at();
        names.extend(name.clone());
        let hash = table
            .value::<Secret>("password_hash", "The hash that `fieldgate passwd` prints; never the password itself.")
            .check(|hash| match is_password_hash(hash.reveal()) {
                true => Ok(()),
                false => Err("must be an argon2 hash; `fieldgate passwd` makes one".into()),
            })
            .required();
        Some(User { name: name?.value.into(), password_hash: hash?.reveal().into() })
    });
    table.cx.unique("users", names.iter().map(|name| (name.value.as_str(), name.span)));
    let meaning = "Mosquitto's password file: more users, whose passwords `mosquitto_passwd` changes.";
    let more = mosquitto_file(table, "password_file", meaning, parse_passwords);
    let listed: HashSet<Arc<str>> = users.iter().map(|user| user.name.clone()).collect();
    if let (Some(place), Some(twice)) =
        (table.place_of("password_file"), more.iter().find(|user| listed.contains(&user.name)))
    {
        let report = Report::error(place, format!("the user `{}` is in `users` too", twice.name));
        table.report(report.help("keep one of them"));
    }
    // Those whose entry is wrong are known too: one fault is one report.
    let known: Vec<&str> =
        names.iter().map(|name| name.value.as_str()).chain(more.iter().map(|user| &*user.name)).collect();
    let anonymous = table
        .value("allow_anonymous", "From where clients may connect without a user name; `loopback` is this machine.")
        .or(Anonymous::Loopback);
    let mut rules =
        table.list("acl", "Who may read and write which topics. No rules: everything. Rules add up.", |table| {
            rule(table, &known)
        });
    let meaning = "Mosquitto's ACL file: more rules.";
    rules.extend(mosquitto_file(table, "acl_file", meaning, parse_rules));
    users.extend(more);
    let denied_publish = table
        .value(
            "denied_publish",
            "What a client is told that may not publish on a topic: `refuse` is 0x87 for MQTT 5 clients and an \
             acknowledgement for older ones, which know no refusal.",
        )
        .or(DeniedPublish::Refuse);
    let meaning =
        "What a client is told that may not subscribe: `refuse` is 0x87 or 0x80; `grant` is Mosquitto's habit.";
    let denied_subscribe = table.value("denied_subscribe", meaning).or(DeniedSubscribe::Refuse);
    access::Settings { users, rules, anonymous, denied_publish, denied_subscribe }
}

/// Reads one of Mosquitto's files, with errors that name its line.
fn mosquitto_file<T>(
    table: &mut Table<'_>,
    key: &'static str,
    meaning: &'static str,
    parse: fn(&str) -> Result<Vec<T>, FileError>,
) -> Vec<T> {
    let Some(Located { value: path, span }) = table.value::<PathBuf>(key, meaning).optional_at() else {
        return Vec::new();
    };
    let problem = match table.cx.read_text(&path).map(|text| parse(&text)) {
        Ok(Ok(entries)) if entries.is_empty() && key == "acl_file" => {
            // Without any rule everything is allowed, and nobody names a file of rules for that.
            format!("{} holds no rule", path.display())
        }
        Ok(Ok(entries)) => return entries,
        Ok(Err(FileError { line, what })) => format!("{}:{line}: {what}", path.display()),
        Err(problem) => format!("{}: {problem}", path.display()),
    };
    table.report(Report::error(span, format!("`{key}` cannot be used")).label(problem));
    Vec::new()
}

fn rule(table: &mut Table<'_>, users: &[&str]) -> Option<Rule> {
    table.exactly_one(&["user", "client", "for"]);
    let user = table.value::<String>("user", "The rule is for this user.").optional_at();
    let client = table.value::<String>("client", "The rule is for this client id.").check(not_empty).optional();
    let group = table.value("for", "The rule is for `everyone`, or for clients without a user name.").optional();
    if let Some(user) = user.as_ref().filter(|user| !users.iter().any(|known| *known == user.value)) {
        let report = Report::error(user.span, format!("there is no user `{}`", user.value));
        table.report(match did_you_mean(&user.value, users) {
            Some(word) => report.label(format!("did you mean `{word}`?")),
            None => report.help("add it to `users:`; `fieldgate passwd` makes the entry"),
        });
    }
    let read =
        table.values("read", "Topic filters that may be subscribed to; `%u` is the user name, `%c` the client id.");
    let write = table.values("write", "Topic filters that may be published to.");
    let patterns = |located: Vec<Located<Pattern>>| located.into_iter().map(|located| located.value).collect();
    let subject = match (user, client, group) {
        (Some(user), ..) => Subject::User(Arc::from(user.value)),
        (_, Some(client), _) => Subject::Client(Arc::from(client)),
        (_, _, Some(Group::Everyone)) => Subject::Everyone,
        (_, _, Some(Group::Anonymous)) => Subject::Anonymous,
        (None, None, None) => return None,
    };
    Some(Rule { subject, read: patterns(read), write: patterns(write), deny: Vec::new() })
}

#[allow(clippy::ptr_arg, reason = "it checks a field, which holds a String")]
fn not_empty(text: &String) -> Result<(), String> {
    if text.is_empty() { Err("must not be empty".into()) } else { Ok(()) }
}
