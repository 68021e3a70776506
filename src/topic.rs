//! Topic names and topic filters (MQTT 5.0 §4.7, MQTT 3.1.1 §4.7).
//!
//! A [`TopicName`] says where a message was published and holds no wildcard; a [`TopicFilter`] says what a
//! subscription wants. Both are checked once, when they are made, and are cheap to clone. What a client may
//! use is the business of `hub::access`, how deep a topic may be that of `hub::Limits`.

mod template;

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

pub use template::{Template, TemplateError};

/// The longest topic MQTT can carry: a UTF-8 string has a two-octet length (MQTT 5.0 §1.5.4).
pub const MAX_TOPIC_BYTES: usize = 65_535;

/// Where a message was published: 1 to 65,535 bytes of UTF-8, no wildcard, no NUL.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicName(Arc<str>);

impl TopicName {
    /// Checks `text` and makes a topic name of it.
    ///
    /// # Errors
    /// [`TopicError`] names the rule of MQTT 5.0 §4.7.3 that `text` breaks.
    pub fn new(text: &str) -> Result<Self, TopicError> {
        Self::check(text)?;
        Ok(Self(text.into()))
    }

    /// Tells whether `text` could be a topic name, without allocating.
    ///
    /// # Errors
    /// As [`TopicName::new`].
    pub fn check(text: &str) -> Result<(), TopicError> {
        check_common(text)?;
        if memchr_wildcard(text) {
            return Err(TopicError::WildcardInName);
        }
        Ok(())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Topics that begin with `$` are the server's own; a filter that begins with a wildcard does not match them
    /// (MQTT 5.0 §4.7.2).
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with('$')
    }
}

/// What a subscription wants: levels separated by `/`, where `+` stands for one level and a final `#` for the rest.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicFilter(Arc<str>);

impl TopicFilter {
    /// Checks `text` and makes a topic filter of it. A shared subscription's `$share/{group}/` prefix is not part
    /// of a filter; take it off with [`SharedFilter::split`] first.
    ///
    /// # Errors
    /// [`TopicError`] names the rule of MQTT 5.0 §4.7.1 that `text` breaks.
    pub fn new(text: &str) -> Result<Self, TopicError> {
        check_common(text)?;
        let mut levels = text.split('/').peekable();
        while let Some(level) = levels.next() {
            match level {
                "+" => {}
                "#" if levels.peek().is_none() => {}
                "#" => return Err(TopicError::HashNotLast),
                _ if memchr_wildcard(level) => return Err(TopicError::WildcardInsideLevel),
                _ => {}
            }
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn has_wildcard(&self) -> bool {
        memchr_wildcard(&self.0)
    }

    /// Tells whether a message published on `topic` is wanted (MQTT 5.0 §4.7.1, §4.7.2).
    pub fn matches(&self, topic: &str) -> bool {
        if topic.starts_with('$') && self.0.starts_with(['+', '#']) {
            return false;
        }
        let mut wanted = self.0.split('/');
        let mut levels = topic.split('/');
        loop {
            match (wanted.next(), levels.next()) {
                // `a/#` also matches its parent `a`.
                (Some("#"), _) => return true,
                (Some("+"), Some(_)) => {}
                (Some(want), Some(level)) if want == level => {}
                (None, None) => return true,
                _ => return false,
            }
        }
    }
}

/// A filter as a SUBSCRIBE spells it, its share group taken apart (MQTT 5.0 §4.8.2).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SharedFilter {
    /// The share name, for `$share/{group}/{filter}`.
    pub group: Option<Arc<str>>,
    pub filter: TopicFilter,
}

impl SharedFilter {
    /// Parses what a SUBSCRIBE holds: a filter, or `$share/{group}/{filter}`.
    ///
    /// # Errors
    /// [`TopicError::ShareName`] for a group that is empty or holds `/`, `+` or `#`; otherwise as [`TopicFilter::new`].
    pub fn split(text: &str) -> Result<Self, TopicError> {
        let Some(rest) = text.strip_prefix("$share/") else {
            return Ok(Self { group: None, filter: TopicFilter::new(text)? });
        };
        let (group, filter) = rest.split_once('/').ok_or(TopicError::ShareName)?;
        if group.is_empty() || memchr_wildcard(group) {
            return Err(TopicError::ShareName);
        }
        Ok(Self { group: Some(group.into()), filter: TopicFilter::new(filter)? })
    }

    /// The spelling that [`SharedFilter::split`] takes apart; that of a filter that is not shared is the filter's own.
    pub fn to_text(&self) -> Arc<str> {
        match &self.group {
            Some(group) => format!("$share/{group}/{}", self.filter).into(),
            None => self.filter.0.clone(),
        }
    }
}

/// Which rule a topic name or filter breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TopicError {
    #[error("a topic must not be empty")]
    Empty,
    #[error("a topic must not be longer than 65535 bytes")]
    TooLong,
    #[error("a topic must not contain the character U+0000")]
    Nul,
    #[error("`+` and `#` stand for other levels and are allowed in topic filters only")]
    WildcardInName,
    #[error("`#` must be the last level of a topic filter")]
    HashNotLast,
    #[error("`+` and `#` must fill a whole level, as in `a/+/b` or `a/#`")]
    WildcardInsideLevel,
    #[error("a shared subscription is written `$share/GROUP/FILTER`, with no wildcard in GROUP")]
    ShareName,
}

fn check_common(text: &str) -> Result<(), TopicError> {
    if text.is_empty() {
        Err(TopicError::Empty)
    } else if text.len() > MAX_TOPIC_BYTES {
        Err(TopicError::TooLong)
    } else if text.as_bytes().contains(&0) {
        Err(TopicError::Nul)
    } else {
        Ok(())
    }
}

fn memchr_wildcard(text: &str) -> bool {
    text.bytes().any(|byte| byte == b'+' || byte == b'#')
}

macro_rules! as_text {
    ($type:ty) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}
as_text!(TopicName);
as_text!(TopicFilter);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_as_the_specification_says() {
        let check = |filter: &str, topic: &str, expected: bool| {
            let matched = TopicFilter::new(filter).unwrap().matches(topic);
            assert_eq!(matched, expected, "{filter} on {topic}");
        };
        check("sport/tennis/player1/#", "sport/tennis/player1", true);
        check("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true);
        check("sport/#", "sport", true);
        check("sport/+", "sport", false);
        check("sport/+", "sport/", true);
        check("+/+", "/finance", true);
        check("/+", "/finance", true);
        check("+", "/finance", false);
        check("#", "$SYS/uptime", false);
        check("+/monitor/Clients", "$SYS/monitor/Clients", false);
        check("$SYS/#", "$SYS/uptime", true);
        check("a/+/c", "a/b/c", true);
        check("a/+/c", "a/b/c/d", false);
        check("a/b", "a/b/", false);
    }

    #[test]
    fn malformed_filters_and_names_name_the_rule_they_break() {
        let filter = |text: &str, expected| assert_eq!(TopicFilter::new(text).unwrap_err(), expected, "{text}");
        filter("", TopicError::Empty);
        filter("a/#/b", TopicError::HashNotLast);
        filter("a/b#", TopicError::WildcardInsideLevel);
        filter("a+/b", TopicError::WildcardInsideLevel);
        filter("a\0b", TopicError::Nul);
        assert_eq!(TopicFilter::new(&"x".repeat(65_536)).unwrap_err(), TopicError::TooLong);
        assert_eq!(TopicName::new("a/+").unwrap_err(), TopicError::WildcardInName);
        assert!(TopicName::new(&"x".repeat(65_535)).is_ok());
    }

    #[test]
    fn a_share_is_taken_apart() {
        let shared = SharedFilter::split("$share/line/plant/+").unwrap();
        assert_eq!(shared.group.as_deref(), Some("line"));
        assert_eq!(shared.filter.as_str(), "plant/+");
        assert_eq!(&*shared.to_text(), "$share/line/plant/+");
        for text in ["$share/", "$share/g", "$share//a", "$share/a+/b"] {
            assert_eq!(SharedFilter::split(text).unwrap_err(), TopicError::ShareName, "{text}");
        }
        assert_eq!(SharedFilter::split("$share/g/").unwrap_err(), TopicError::Empty);
    }
}
