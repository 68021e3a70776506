//! What the operator says about one upstream, checked.

use std::time::Duration;

use thiserror::Error;

use super::backoff;
use super::manners::Said;
use super::proxy::Proxy;
use super::rate::MaxRate;
use super::rules::{Direction, RuleError, RuleSettings, Rules};
use super::sas::Sas;
use super::schedule::Schedule;
use super::url::Url;
use crate::hub::{Order, Precedence, Priority, QueueLimits};
use crate::message::QoS;
use crate::secret::Secret;
use crate::tls::{self, TlsError};
use crate::topic::{TopicError, TopicName};
use crate::via::{GatewayId, Introduction};

/// One upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Unique among the upstreams; stands in topics, so no `/`, `+` or `#`. It also names the queue: an upstream under
    /// a new name starts with an empty one.
    pub name: String,
    /// Where it is reached; at least one.
    pub urls: Vec<Url>,
    pub address_order: AddressOrder,
    /// While connected to another address than the first of [`AddressOrder::Ordered`]: how often to look whether the first
    /// is back.
    pub return_interval: Duration,
    /// On the way to all of `urls`. Its name is resolved here, theirs there.
    pub proxy: Option<Proxy>,
    pub version: VersionChoice,
    /// `None` is `{gateway}-{name}`.
    pub client_id: Option<String>,
    pub username: Option<String>,
    pub password: Option<Secret>,
    /// In place of `password`: Azure's tokens. `username` is IoT Hub's then, if it is `None`.
    pub sas: Option<Sas>,
    /// For `mqtts://` addresses.
    pub tls: tls::ClientSettings,
    /// How long the connection may be silent before it is probed; 1 s to 65,535 s.
    pub keep_alive: Duration,
    /// For all of it: name resolution, TCP, TLS and MQTT.
    pub connect_timeout: Duration,
    /// How long the upstream keeps our session while we are away, where it speaks MQTT 5.0.
    pub session_expiry: Duration,
    pub connection: Connection,
    /// How long nothing may cross before a connection that is not kept for its own sake ends.
    pub idle_timeout: Duration,
    /// What goes from here to the upstream.
    pub outgoing: Vec<RuleSettings>,
    /// What comes from the upstream to here.
    pub incoming: Vec<RuleSettings>,
    /// Limits of the queue that holds what could not be sent yet; `None` takes the hub's.
    pub queue: Option<QueueLimits>,
    /// The most unacknowledged messages in flight towards the upstream; it may allow fewer, and 3.1.1 takes 20 where a
    /// rule has QoS 2.
    pub max_inflight: u16,
    /// What of the uplink, in percent, is set aside for messages published while it is up, so that they do not wait
    /// behind a backlog; 0 is strict order. Rules may say otherwise.
    pub live_share: u8,
    pub max_rate: MaxRate,
    /// A topic on the upstream that holds `1`, retained, while the gateway is connected and `0` (its will) while it is
    /// not. `{gateway}` stands for the gateway's name.
    pub state_topic: Option<String>,
    /// The largest packet accepted from the upstream, in bytes.
    pub max_packet_size: u32,
    /// The largest packet sent to the upstream, in bytes; `None` for what it allows. 3.1.1 cannot say what that is.
    pub bridge_max_packet_size: Option<u32>,
    /// How many bridges a message may have crossed, this one included; at least 1. What would cross more is dropped and
    /// counted: it goes in circles.
    pub max_hops: u8,
    pub backoff: backoff::Settings,
}

/// When to be connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Connection {
    #[default]
    Always,
    /// While something waits, and until nothing has crossed for the idle timeout.
    Lazy,
    /// Within windows of time.
    Scheduled(Schedule),
    /// When an operator says so, until one says otherwise.
    Manual,
}

impl Connection {
    /// The name in the configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Lazy => "lazy",
            Self::Scheduled(_) => "scheduled",
            Self::Manual => "manual",
        }
    }
}

/// Which of several addresses is tried first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AddressOrder {
    /// The first is the main one: each lost connection starts over with it, and a connection to another returns to it.
    #[default]
    Ordered,
    /// All are equal: a lost connection goes on with the next.
    RoundRobin,
}

/// Which MQTT to speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VersionChoice {
    /// 5.0, or 3.1.1 where the upstream does not know it.
    #[default]
    Newest,
    V5,
    V3_1_1,
}

impl Settings {
    /// The defaults for an upstream at `url`, with no rules yet.
    pub fn new(name: &str, url: Url) -> Self {
        Self {
            name: name.into(),
            urls: vec![url],
            address_order: AddressOrder::Ordered,
            return_interval: Duration::from_secs(30),
            proxy: None,
            version: VersionChoice::Newest,
            client_id: None,
            username: None,
            password: None,
            sas: None,
            tls: tls::ClientSettings::default(),
            keep_alive: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(15),
            session_expiry: Duration::from_secs(7 * 86_400),
            connection: Connection::Always,
            // Mosquitto's.
            idle_timeout: Duration::from_secs(60),
            outgoing: Vec::new(),
            incoming: Vec::new(),
            queue: None,
            max_inflight: 1000,
            live_share: 0,
            max_rate: MaxRate::default(),
            state_topic: None,
            max_packet_size: 1 << 20,
            bridge_max_packet_size: None,
            // Longer than any sane chain of gateways, and few enough copies of what goes in circles.
            max_hops: 8,
            backoff: backoff::Settings::default(),
        }
    }

    /// Checks what can be checked without opening a file, for a gateway named `gateway`.
    ///
    /// # Errors
    /// [`SettingsError`] names the part that is wrong.
    pub fn check(&self, gateway: &str) -> Result<Checked, SettingsError> {
        if self.name.is_empty() || self.name.contains(['/', '+', '#', '\0']) {
            return Err(SettingsError::Name);
        }
        if self.urls.is_empty() {
            return Err(SettingsError::NoUrl);
        }
        if self.password.is_some() && self.username.is_none() && self.version != VersionChoice::V5 {
            return Err(SettingsError::PasswordAlone);
        }
        if let Some(sas) = &self.sas {
            if self.password.is_some() {
                return Err(SettingsError::TwoPasswords);
            }
            if !sas.has_key() {
                return Err(SettingsError::SasKey);
            }
        }
        if self.keep_alive < Duration::from_secs(1) || self.keep_alive > Duration::from_secs(65_535) {
            return Err(SettingsError::KeepAlive);
        }
        if self.max_hops == 0 {
            return Err(SettingsError::MaxHops);
        }
        for url in self.urls.iter().filter(|url| url.scheme.is_tls()) {
            self.tls.server_name(&url.host)?;
        }
        let rules = |direction, list, settings| {
            Rules::new(direction, settings, gateway).map_err(|(index, source)| SettingsError::Rule {
                list,
                index,
                source,
            })
        };
        let state_topic = match &self.state_topic {
            None => None,
            Some(topic) => {
                let topic = topic.replace("{gateway}", gateway);
                Some(TopicName::new(&topic).map_err(|source| SettingsError::StateTopic { topic, source })?)
            }
        };
        Ok(Checked {
            outgoing: rules(Direction::Out, "out", &self.outgoing)?,
            incoming: rules(Direction::In, "in", &self.incoming)?,
            client_id: self.client_id.clone().unwrap_or_else(|| format!("{gateway}-{}", self.name)),
            live_shares: self.live_shares()?,
            state_topic,
            max_hops: self.max_hops,
            max_rate: self.max_rate,
            queue: format!("{gateway}/{}", self.name),
        })
    }

    /// The share that each priority sets aside for live messages; those of one priority have one backlog and one live
    /// stream, so there is one share.
    fn live_shares(&self) -> Result<Vec<(Priority, u8)>, SettingsError> {
        let mut shares: Vec<(Priority, u8)> = Vec::new();
        for (index, rule) in self.outgoing.iter().enumerate() {
            let share = self.live_share_of(rule);
            match shares.iter().find(|(priority, _)| *priority == rule.priority) {
                _ if share == 0 => {}
                Some((_, other)) if *other == share => {}
                Some((_, other)) => return Err(SettingsError::LiveShares { index, share, other: *other }),
                None => shares.push((rule.priority, share)),
            }
        }
        Ok(shares)
    }

    fn live_share_of(&self, rule: &RuleSettings) -> u8 {
        rule.live_share.unwrap_or(self.live_share)
    }

    /// Where the messages of an `out` rule stand in line.
    pub fn precedence(&self, index: usize) -> Precedence {
        let rule = &self.outgoing[index];
        let order = if self.live_share_of(rule) == 0 { Order::Strict } else { Order::LiveBeside };
        let rank = u16::try_from(index).unwrap_or(u16::MAX);
        Precedence { rank, priority: rule.priority, order, expiry: rule.message_expiry }
    }

    pub fn uses_tls(&self) -> bool {
        self.urls.iter().any(|url| url.scheme.is_tls())
    }
}

/// What [`Settings::check`] makes of the parts that need work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    pub outgoing: Rules,
    pub incoming: Rules,
    pub client_id: String,
    /// Priorities with a share for live messages, in percent.
    pub live_shares: Vec<(Priority, u8)>,
    pub state_topic: Option<TopicName>,
    /// See [`Settings::max_hops`].
    pub max_hops: u8,
    pub max_rate: MaxRate,
    /// What names the queue among those of other gateways: `GATEWAY/UPSTREAM`.
    pub queue: String,
}

impl Checked {
    /// What we say to an upstream that is a gateway too.
    pub fn introduction(&self, gateway: GatewayId) -> Introduction {
        Introduction { gateway, keeps_names: self.incoming.keep_names() }
    }

    pub fn sends_qos_2(&self) -> bool {
        self.outgoing.iter().any(|rule| rule.qos == QoS::ExactlyOnce)
    }

    /// That `said` is left out, for a person.
    pub(super) fn left_out(&self, said: Said) -> String {
        let (what, key) = match said {
            Said::State => {
                let topic = self.state_topic.as_ref().map(TopicName::as_str).unwrap_or_default();
                (format!("what says on `{topic}` that it is connected"), "`state_topic`")
            }
            Said::Rule(index) => {
                let filter = self.incoming.iter().nth(index).map(|rule| rule.filter.as_str()).unwrap_or_default();
                (format!("the subscription to `{filter}`"), "the `in` rule")
            }
        };
        format!(
            "the upstream closes the connection on {what}: it goes on without, and tries again later; check this gateway's \
             rights there, or {key}"
        )
    }
}

/// What is wrong with an upstream's settings.
#[derive(Debug, Error)]
pub enum SettingsError {
    #[error("an upstream's name stands in topics: it is not empty and holds no `/`, `+` or `#`")]
    Name,
    #[error("an upstream needs the address at which it is reached")]
    NoUrl,
    #[error("MQTT 3.1.1 has no password without a user name; set `username` as well")]
    PasswordAlone,
    #[error("a SAS token is the password; take `password` out, or `sas`")]
    TwoPasswords,
    #[error(
        "the key of `sas` is not base64; copy the device's primary or secondary key whole, with the `=` at its end"
    )]
    SasKey,
    #[error("keep alive must be between 1 s and 65535 s")]
    KeepAlive,
    #[error("with no hop allowed nothing could cross; `max_hops` is at least 1")]
    MaxHops,
    #[error(
        "rule {number} of `out` has the live share {share}%, another one of its priority {other}%; rules of one priority \
         have one share, or none", number = .index + 1
    )]
    LiveShares { index: usize, share: u8, other: u8 },
    #[error("rule {number} of `{list}`", number = .index + 1)]
    Rule { list: &'static str, index: usize, source: RuleError },
    #[error("the state topic `{topic}` is not a topic name")]
    StateTopic { topic: String, source: TopicError },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked_before_anything_is_opened() {
        let good = Settings::new("cloud", Url::parse("mqtts://broker").unwrap());
        let checked = good.check("plant-7").unwrap();
        assert_eq!(checked.client_id, "plant-7-cloud");
        let rule = RuleSettings::new("a/#/b");
        let check = |change: &dyn Fn(&mut Settings), expected: &str| {
            let mut settings = good.clone();
            change(&mut settings);
            let error = settings.check("plant-7").unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(&|settings| settings.name = "a/b".into(), "stands in topics");
        check(&|settings| settings.urls.clear(), "needs the address");
        check(&|settings| settings.password = Some(Secret::new("x")), "set `username` as well");
        check(&|settings| settings.keep_alive = Duration::ZERO, "keep alive");
        check(&|settings| settings.max_hops = 0, "at least 1");
        check(&|settings| settings.incoming = vec![rule.clone()], "rule 1 of `in`");
        let with_share = |live_share| RuleSettings { live_share, ..RuleSettings::new("a") };
        let shares = [Some(0), None, Some(30)].map(with_share);
        let clash = "rule 3 of `out` has the live share 30%, another one of its priority 50%";
        check(&|settings| (settings.live_share, settings.outgoing) = (50, shares.to_vec()), clash);
        check(&|settings| settings.state_topic = Some("state/+".into()), "`state/+` is not a topic name");
        check(&|settings| settings.tls.server_name = Some("not a name".into()), "`not a name` is neither");
        check(&|settings| settings.urls[0].host = "bro/ker".into(), "`bro/ker` is neither");
    }
}
