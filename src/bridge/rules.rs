//! Which topics cross the bridge, under which names: the rules of one direction, as Mosquitto's `topic` lines. Pure.
//!
//! A rule's filter is what both sides have in common; each side has its own prefix before it. Going out, the local
//! prefix is taken off and the remote one put before; coming in, the other way round. Or the name on the other side is
//! made anew, from a template with what the filter's wildcards stand for. Where several rules match one topic, the first
//! in the configuration decides.

use std::time::Duration;

use thiserror::Error;

use super::marks;
use crate::hub::Priority;
use crate::message::{Properties, QoS};
use crate::topic::{MAX_TOPIC_BYTES, Template, TemplateError, TopicError, TopicFilter, TopicName};

/// One rule as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSettings {
    /// What crosses, without either prefix. `{gateway}` stands for the gateway's name, in all texts of the rule.
    pub filter: String,
    /// The highest QoS at which it crosses.
    pub qos: QoS,
    pub retain: Retain,
    pub naming: Naming,
    /// The longest that a message is worth delivering, from when this gateway accepted it; what is older is dropped and
    /// counted. A message may say less itself.
    pub message_expiry: Option<Duration>,
    /// Put on each message, in place of those of the same name (MQTT 5.0). Values are templates, as names may be.
    pub user_properties: Vec<(String, String)>,
    /// Out only: whether each message says where and when it comes from.
    pub provenance: Provenance,
    /// Out only: what is more urgent goes first, always.
    pub priority: Priority,
    /// Out only: what of the uplink, in percent, is set aside for messages published while it is up, so that they do not
    /// wait behind a backlog; `None` is what the upstream says, 0 is strict order.
    pub live_share: Option<u8>,
}

impl RuleSettings {
    /// The defaults for what matches `filter`: QoS 1, under the same name on both sides.
    pub fn new(filter: &str) -> Self {
        Self {
            filter: filter.into(),
            qos: QoS::AtLeastOnce,
            retain: Retain::AsPublished,
            naming: Naming::Prefixes { local: String::new(), remote: String::new() },
            message_expiry: None,
            user_properties: Vec::new(),
            provenance: Provenance::Omit,
            priority: Priority::Normal,
            live_share: None,
        }
    }

    /// The same rule with `prefix` before the filter on the upstream.
    #[must_use]
    pub fn under(mut self, prefix: &str) -> Self {
        self.naming = Naming::Prefixes { local: String::new(), remote: prefix.into() };
        self
    }
}

/// How a topic is called on the other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Naming {
    /// What stands before the filter on this gateway, as in `line-3/`, and on the upstream; empty for nothing.
    Prefixes { local: String, remote: String },
    /// The whole name on the side it goes to; see [`Template`].
    Template(String),
}

/// What becomes of the retain flag on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Retain {
    /// Retained here, retained there.
    #[default]
    AsPublished,
    /// Passed on, but never retained there.
    Never,
}

/// Where a message carries its time, its number and this start of the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Provenance {
    /// Nowhere.
    #[default]
    Omit,
    /// MQTT 5.0 only.
    UserProperties,
    /// In the payload, which becomes a JSON object if it is none.
    Json,
}

/// A rule that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub qos: QoS,
    pub retain: Retain,
    pub provenance: Provenance,
    /// What it takes, as it is called on the side it comes from.
    pub filter: TopicFilter,
    message_expiry: Option<Duration>,
    user_properties: Vec<(Box<str>, Template)>,
    name: Name,
}

/// [`Naming`] in one direction, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Exchanged { strip: Box<str>, add: Box<str> },
    Made(Template),
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Out,
    In,
}

/// The rules of one direction of one upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules(Vec<Rule>);

impl Rule {
    /// Checks `settings` for a gateway named `gateway`.
    ///
    /// # Errors
    /// [`RuleError`] names the part that no topic can hold.
    pub fn new(direction: Direction, settings: &RuleSettings, gateway: &str) -> Result<Self, RuleError> {
        let filter = expand(&settings.filter, gateway)?;
        let (filter, name) = match &settings.naming {
            Naming::Prefixes { local, remote } => exchanged(direction, &filter, local, remote, gateway)?,
            Naming::Template(template) => {
                let filter = checked_filter(&filter)?;
                let name = Template::parse(&template.replace("{gateway}", gateway), &filter)?;
                // What is no topic name with the shortest levels is none with any.
                let mut shortest = String::new();
                name.fill(&filter, &filter.as_str().replace(['+', '#'], "x"), &mut shortest);
                TopicName::check(&shortest).map_err(|source| RuleError::Name { text: template.clone(), source })?;
                (filter, Name::Made(name))
            }
        };
        let property = |(property, value): &(String, String)| {
            if property.is_empty() || property.starts_with(marks::PREFIX) {
                return Err(RuleError::Property { property: property.clone() });
            }
            Ok((property.as_str().into(), Template::parse(&value.replace("{gateway}", gateway), &filter)?))
        };
        Ok(Self {
            qos: settings.qos,
            retain: settings.retain,
            provenance: settings.provenance,
            message_expiry: settings.message_expiry,
            user_properties: settings.user_properties.iter().map(property).collect::<Result<_, _>>()?,
            filter,
            name,
        })
    }

    /// How much longer a message is worth delivering: `own` as it says itself, and at most this rule's time after it
    /// was accepted, `age` ago.
    pub fn remaining_expiry(&self, own: Option<Duration>, age: Duration) -> Option<Duration> {
        let left = self.message_expiry.map(|expiry| expiry.saturating_sub(age));
        [own, left].into_iter().flatten().min()
    }

    /// Whether messages of the rule say more of themselves than their publisher had them say.
    pub fn adds_properties(&self) -> bool {
        self.provenance == Provenance::UserProperties || !self.user_properties.is_empty()
    }

    /// Puts this rule's user properties on a message that was published on `topic`.
    pub fn add_properties(&self, topic: &str, properties: &mut Properties) {
        for (name, template) in &self.user_properties {
            let mut value = String::new();
            template.fill(&self.filter, topic, &mut value);
            properties.set_user(name, &value);
        }
    }
}

/// The filter on the side that messages come from, and what is done to their names.
fn exchanged(
    direction: Direction,
    filter: &str,
    local: &str,
    remote: &str,
    gateway: &str,
) -> Result<(TopicFilter, Name), RuleError> {
    let prefix = |text: &str, side| {
        let text = expand(text, gateway)?;
        if text.contains(['+', '#']) {
            return Err(RuleError::WildcardInPrefix { side });
        }
        Ok(text)
    };
    let joined = |prefix: &str| {
        // A `+` or `#` right behind a prefix without a slash would not fill its level any more.
        checked_filter(&format!("{prefix}{filter}")).map_err(|error| match error {
            RuleError::Topic { source: TopicError::WildcardInsideLevel, .. } if TopicFilter::new(filter).is_ok() => {
                RuleError::NoSlash { prefix: prefix.into() }
            }
            error => error,
        })
    };
    if filter.starts_with("$share/") {
        return Err(RuleError::Shared);
    }
    let (local, remote) = (prefix(local, "local_prefix")?, prefix(remote, "remote_prefix")?);
    let (local_filter, remote_filter) = (joined(&local)?, joined(&remote)?);
    let (filter, strip, add) = match direction {
        Direction::Out => (local_filter, local, remote),
        Direction::In => (remote_filter, remote, local),
    };
    Ok((filter, Name::Exchanged { strip: strip.into(), add: add.into() }))
}

fn checked_filter(text: &str) -> Result<TopicFilter, RuleError> {
    if text.starts_with("$share/") {
        return Err(RuleError::Shared);
    }
    TopicFilter::new(text).map_err(|source| RuleError::Topic { text: text.into(), source })
}

impl Rules {
    /// Checks the rules of one direction for a gateway named `gateway`.
    ///
    /// # Errors
    /// The index of the first bad rule, and what is wrong with it.
    pub fn new(direction: Direction, settings: &[RuleSettings], gateway: &str) -> Result<Self, (usize, RuleError)> {
        let rule = |(index, settings)| Rule::new(direction, settings, gateway).map_err(|error| (index, error));
        Ok(Self(settings.iter().enumerate().map(rule).collect::<Result<_, _>>()?))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.0.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether every message is called on the other side as it is called here.
    pub fn keep_names(&self) -> bool {
        self.0.iter().all(|rule| matches!(&rule.name, Name::Exchanged { strip, add } if strip == add))
    }

    /// The rule that decides over a message on `topic`, and the topic's name on the other side, written to `mapped`.
    ///
    /// # Errors
    /// [`Unmapped`]: no rule wants the topic, or its new name would not be a topic name.
    pub fn map(&self, topic: &str, mapped: &mut String) -> Result<&Rule, Unmapped> {
        mapped.clear();
        let rule = self.0.iter().find(|rule| rule.filter.matches(topic)).ok_or(Unmapped::NoRule)?;
        match &rule.name {
            Name::Exchanged { strip, add } => {
                // `a/#` matches its parent `a` too, which is shorter than the prefix `a/`. Without a prefix nothing is
                // compared: glibc would do so with a masked load from the dangling address of an empty `Box<str>`, which
                // takes a processor with AVX-512 a tenth of a microsecond, a fifth of what a message costs.
                let rest = if strip.is_empty() { Some(topic) } else { topic.strip_prefix(&**strip) };
                let rest = rest.ok_or(Unmapped::NoRule)?;
                mapped.push_str(add);
                mapped.push_str(rest);
            }
            Name::Made(template) => template.fill(&rule.filter, topic, mapped),
        }
        match mapped.len() {
            0 => Err(Unmapped::NoRule),
            1..=MAX_TOPIC_BYTES => Ok(rule),
            _ => Err(Unmapped::TooLong),
        }
    }
}

/// Why a message does not cross.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapped {
    NoRule,
    TooLong,
}

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RuleError {
    #[error("`{{{name}}}` is not known here; `{{gateway}}` stands for the gateway's name")]
    Unknown { name: String },
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("no topic name can be made from the template `{text}`")]
    Name { text: String, source: TopicError },
    #[error("a user property cannot be named `{property}`; empty names and those with `fieldgate-` are taken")]
    Property { property: String },
    #[error("`+` and `#` are not allowed in {side}: a prefix is one fixed text, put them into the filter")]
    WildcardInPrefix { side: &'static str },
    #[error("shared subscriptions (`$share/…`) are for clients that divide messages; an upstream gets all of them")]
    Shared,
    #[error("the prefix `{prefix}` must end with `/` before a filter that begins with a wildcard")]
    NoSlash { prefix: String },
    #[error("`{text}` is not a topic filter")]
    Topic { text: String, source: TopicError },
}

/// Puts the gateway's name in place of `{gateway}`.
fn expand(text: &str, gateway: &str) -> Result<String, RuleError> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        let Some((name, after)) = after.split_once('}') else { break };
        if name != "gateway" {
            return Err(RuleError::Unknown { name: name.into() });
        }
        expanded.push_str(before);
        expanded.push_str(gateway);
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(filter: &str, local: &str, remote: &str) -> RuleSettings {
        let naming = Naming::Prefixes { local: local.into(), remote: remote.into() };
        RuleSettings { naming, ..RuleSettings::new(filter) }
    }

    fn named(filter: &str, template: &str) -> RuleSettings {
        RuleSettings { naming: Naming::Template(template.into()), ..RuleSettings::new(filter) }
    }

    #[test]
    fn prefixes_are_exchanged_on_the_way() {
        let check = |settings: RuleSettings, local: &str, remote: &str| {
            let mut mapped = String::new();
            let rules = |direction| Rules::new(direction, std::slice::from_ref(&settings), "plant-7").unwrap();
            rules(Direction::Out).map(local, &mut mapped).unwrap();
            assert_eq!(mapped, remote);
            rules(Direction::In).map(remote, &mut mapped).unwrap();
            assert_eq!(mapped, local);
        };
        check(rule("devices/#", "", "{gateway}/"), "devices/meter/u1", "plant-7/devices/meter/u1");
        check(rule("#", "line-3/", "site/{gateway}/line-3/"), "line-3/a", "site/plant-7/line-3/a");
        check(rule("devices/#", "", ""), "devices", "devices");
        check(rule("{gateway}/+", "up/", ""), "up/plant-7/x", "plant-7/x");
        check(rule("broker", "$SYS/", "gateways/{gateway}/"), "$SYS/broker", "gateways/plant-7/broker");
        check(rule("/leading", "", "x"), "/leading", "x/leading");
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let settings = [rule("devices/+/raw", "", "raw/"), rule("devices/#", "", "all/")];
        let rules = Rules::new(Direction::Out, &settings, "g").unwrap();
        let check = |topic: &str, expected: Result<&str, Unmapped>| {
            let mut mapped = String::new();
            let found = rules.map(topic, &mut mapped).map(|_| mapped.as_str());
            assert_eq!(found, expected, "{topic}");
        };
        check("devices/a/raw", Ok("raw/devices/a/raw"));
        check("devices/a/b", Ok("all/devices/a/b"));
        check("other", Err(Unmapped::NoRule));
    }

    #[test]
    fn what_has_no_name_on_the_other_side_does_not_cross() {
        let rules = Rules::new(Direction::Out, &[rule("#", "a/", "")], "g").unwrap();
        let mut mapped = String::new();
        // `a/#` matches `a`, and taking `a/` off leaves nothing.
        assert_eq!(rules.map("a", &mut mapped), Err(Unmapped::NoRule));
        assert_eq!(rules.map("a/", &mut mapped), Err(Unmapped::NoRule));
        let rules = Rules::new(Direction::Out, &[rule("#", "", &"p".repeat(65_000))], "g");
        assert!(matches!(rules, Err((0, RuleError::NoSlash { .. }))));
        let rules = Rules::new(Direction::Out, &[rule("a/#", "", "prefix/")], "g").unwrap();
        let topic = format!("a/{}", "t".repeat(65_530));
        assert_eq!(rules.map(&topic, &mut mapped), Err(Unmapped::TooLong));
    }

    #[test]
    fn a_wrong_rule_names_the_part_to_change() {
        let check = |settings: RuleSettings, expected: &str| {
            for direction in [Direction::Out, Direction::In] {
                let error = Rule::new(direction, &settings, "g").unwrap_err().to_string();
                assert!(error.contains(expected), "{error}");
            }
        };
        check(rule("devices/#", "", "{site}/"), "`{site}` is not known here; `{gateway}` stands for");
        check(rule("devices/#", "", "a/+/"), "not allowed in remote_prefix");
        check(rule("#", "plant", ""), "the prefix `plant` must end with `/`");
        check(rule("a/#/b", "", ""), "`a/#/b` is not a topic filter");
        check(rule("", "", ""), "`` is not a topic filter");
        check(rule("$share/g/a", "", ""), "shared subscriptions");
        check(named("$share/g/a", "b"), "shared subscriptions");
        check(named("a/+", "{2}"), "so there is no {2}");
        check(named("a/+", "{site}/{1}"), "`{site}` is not a level; write {1}");
        check(named("a/+", "b/+"), "no topic name can be made from the template `b/+`");
        check(named("a/+", ""), "no topic name can be made");
        let with = |name: &str, value: &str| RuleSettings {
            user_properties: vec![(name.into(), value.into())],
            ..RuleSettings::new("a/+")
        };
        check(with("fieldgate-hops", "0"), "cannot be named `fieldgate-hops`");
        check(with("", "0"), "cannot be named ``");
        check(with("site", "{2}"), "there is no {2}");
        assert!(Rule::new(Direction::Out, &rule("odd{brace", "", ""), "g").is_ok());
    }

    #[test]
    fn a_template_makes_the_name_of_the_other_side() {
        let check = |filter: &str, template: &str, topic: &str, expected: Result<&str, Unmapped>| {
            let mut mapped = String::new();
            for direction in [Direction::Out, Direction::In] {
                let rules = Rules::new(direction, &[named(filter, template)], "plant-7").unwrap();
                assert_eq!(rules.map(topic, &mut mapped).map(|_| mapped.as_str()), expected, "{topic}");
            }
        };
        check("devices/+/+", "plants/{gateway}/{1}/{2}", "devices/m/v", Ok("plants/plant-7/m/v"));
        check(
            "devices/+/#",
            "{gateway}/events/device={1}&point={#}",
            "devices/m/a/b",
            Ok("plant-7/events/device=m&point=a/b"),
        );
        check("{gateway}/in/#", "{#}", "plant-7/in/set", Ok("set"));
        check("{gateway}/in/#", "{#}", "plant-7/in", Err(Unmapped::NoRule));
        check("+", "{1}{1}", &"x".repeat(40_000), Err(Unmapped::TooLong));
        check("devices/+/+", "x/{1}", "other", Err(Unmapped::NoRule));
    }

    #[test]
    fn a_rule_shortens_the_life_of_messages_and_adds_properties() {
        let hour = Duration::from_secs(3600);
        let settings = RuleSettings {
            message_expiry: Some(hour),
            user_properties: vec![("site".into(), "berlin".into()), ("device".into(), "{gateway}/{1}".into())],
            ..RuleSettings::new("devices/+/#")
        };
        let rule = Rule::new(Direction::Out, &settings, "g").unwrap();
        assert_eq!(rule.remaining_expiry(None, hour / 4), Some(hour * 3 / 4));
        assert_eq!(rule.remaining_expiry(Some(hour / 8), hour / 4), Some(hour / 8));
        assert_eq!(rule.remaining_expiry(Some(hour * 2), hour * 2), Some(Duration::ZERO));
        let plain = Rule::new(Direction::Out, &RuleSettings::new("devices/+/#"), "g").unwrap();
        assert_eq!(plain.remaining_expiry(None, hour), None);
        let user_properties = vec![("site".into(), "rome".into()), ("unit".into(), "V".into())];
        let mut properties = Properties { user_properties, ..Properties::default() };
        rule.add_properties("devices/m/v", &mut properties);
        let expected = [("unit", "V"), ("site", "berlin"), ("device", "g/m")];
        assert_eq!(properties.user_properties, expected.map(|(name, value)| (name.into(), value.into())));
    }
}
