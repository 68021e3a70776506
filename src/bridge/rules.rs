//! Which topics cross the bridge, under which names: the rules of one direction, as Mosquitto's `topic` lines. Pure.
//!
//! A rule's filter is what both sides have in common; each side has its own prefix before it. Going out, the local
//! prefix is taken off and the remote one put before; coming in, the other way round. Where several rules match one
//! topic, the first in the configuration decides.

use thiserror::Error;

use crate::message::QoS;
use crate::topic::{MAX_TOPIC_BYTES, TopicError, TopicFilter};

/// One rule as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSettings {
    /// What crosses, without either prefix. `{gateway}` stands for the gateway's name, here and in the prefixes.
    pub filter: String,
    /// The highest QoS at which it crosses.
    pub qos: QoS,
    pub retain: Retain,
    /// Before the filter on this gateway, as in `line-3/`; empty for none.
    pub local_prefix: String,
    /// Before the filter on the upstream.
    pub remote_prefix: String,
    /// Out only: whether each message says where and when it comes from, in user properties (MQTT 5.0).
    pub provenance: Provenance,
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

/// Whether a message carries its time, its number and this start of the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Provenance {
    #[default]
    Omit,
    Add,
}

/// A rule that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub qos: QoS,
    pub retain: Retain,
    pub provenance: Provenance,
    /// What matches on this gateway.
    pub local: TopicFilter,
    /// What matches on the upstream.
    pub remote: TopicFilter,
    local_prefix: Box<str>,
    remote_prefix: Box<str>,
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Out,
    In,
}

/// The rules of one direction of one upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    direction: Direction,
    rules: Vec<Rule>,
}

impl Rule {
    /// Checks `settings` for a gateway named `gateway`.
    ///
    /// # Errors
    /// [`RuleError`] names the part that no topic can hold.
    pub fn new(settings: &RuleSettings, gateway: &str) -> Result<Self, RuleError> {
        let RuleSettings { filter, qos, retain, local_prefix, remote_prefix, provenance } = settings;
        let filter = expand(filter, gateway)?;
        if [&filter, local_prefix, remote_prefix].iter().any(|text| text.starts_with("$share/")) {
            return Err(RuleError::Shared);
        }
        let prefix = |text: &str, side| {
            let text = expand(text, gateway)?;
            if text.contains(['+', '#']) {
                return Err(RuleError::WildcardInPrefix { side });
            }
            Ok(text)
        };
        let local_prefix = prefix(local_prefix, "local_prefix")?;
        let remote_prefix = prefix(remote_prefix, "remote_prefix")?;
        let joined = |prefix: &str| {
            // A `+` or `#` right behind a prefix without a slash would not fill its level any more.
            TopicFilter::new(&format!("{prefix}{filter}")).map_err(|source| match source {
                TopicError::WildcardInsideLevel if TopicFilter::new(&filter).is_ok() => {
                    RuleError::NoSlash { prefix: prefix.into() }
                }
                source => RuleError::Topic { text: format!("{prefix}{filter}"), source },
            })
        };
        let (local, remote) = (joined(&local_prefix)?, joined(&remote_prefix)?);
        Ok(Self {
            qos: *qos,
            retain: *retain,
            provenance: *provenance,
            local,
            remote,
            local_prefix: local_prefix.into(),
            remote_prefix: remote_prefix.into(),
        })
    }
}

impl Rules {
    /// Checks the rules of one direction for a gateway named `gateway`.
    ///
    /// # Errors
    /// The index of the first bad rule, and what is wrong with it.
    pub fn new(direction: Direction, settings: &[RuleSettings], gateway: &str) -> Result<Self, (usize, RuleError)> {
        let rule = |(index, settings)| Rule::new(settings, gateway).map_err(|error| (index, error));
        Ok(Self { direction, rules: settings.iter().enumerate().map(rule).collect::<Result<_, _>>()? })
    }

    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The rule that decides over a message on `topic`, and the topic's name on the other side, written to `mapped`.
    ///
    /// # Errors
    /// [`Unmapped`]: no rule wants the topic, or its new name would not be a topic name.
    pub fn map(&self, topic: &str, mapped: &mut String) -> Result<&Rule, Unmapped> {
        mapped.clear();
        let rule = self.rules.iter().find(|rule| match self.direction {
            Direction::Out => rule.local.matches(topic),
            Direction::In => rule.remote.matches(topic),
        });
        let rule = rule.ok_or(Unmapped::NoRule)?;
        let (strip, add) = match self.direction {
            Direction::Out => (&rule.local_prefix, &rule.remote_prefix),
            Direction::In => (&rule.remote_prefix, &rule.local_prefix),
        };
        // `a/#` matches its parent `a` too, which is shorter than the prefix `a/`.
        let rest = topic.strip_prefix(&**strip).ok_or(Unmapped::NoRule)?;
        if add.len() + rest.len() > MAX_TOPIC_BYTES {
            return Err(Unmapped::TooLong);
        }
        mapped.push_str(add);
        mapped.push_str(rest);
        if mapped.is_empty() { Err(Unmapped::NoRule) } else { Ok(rule) }
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
    Template { name: String },
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
            return Err(RuleError::Template { name: name.into() });
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

    fn rule(filter: &str, local_prefix: &str, remote_prefix: &str) -> RuleSettings {
        RuleSettings {
            filter: filter.into(),
            qos: QoS::AtLeastOnce,
            retain: Retain::AsPublished,
            local_prefix: local_prefix.into(),
            remote_prefix: remote_prefix.into(),
            provenance: Provenance::Omit,
        }
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
            let error = Rule::new(&settings, "g").unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(rule("devices/#", "", "{site}/"), "`{site}` is not known here; `{gateway}` stands for");
        check(rule("devices/#", "", "a/+/"), "not allowed in remote_prefix");
        check(rule("#", "plant", ""), "the prefix `plant` must end with `/`");
        check(rule("a/#/b", "", ""), "`a/#/b` is not a topic filter");
        check(rule("", "", ""), "`` is not a topic filter");
        check(rule("$share/g/a", "", ""), "shared subscriptions");
        assert!(Rule::new(&rule("odd{brace", "", ""), "g").is_ok());
    }
}
