//! Retained messages: the last one of each topic, for whoever subscribes later (MQTT 5.0 §3.3.1.3).

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use crate::clock::UnixMillis;
use crate::message::Message;
use crate::topic::{TopicFilter, TopicName};

/// The last retained message of each topic, in the order of the topics so that a filter's fixed beginning narrows the
/// search.
#[derive(Debug, Default)]
pub struct Retained {
    messages: BTreeMap<TopicName, Arc<Message>>,
    bytes: usize,
}

/// What [`Retained::set`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Stored,
    /// An empty payload removed what was there.
    Removed,
    /// There was nothing to remove.
    Nothing,
}

impl Retained {
    /// Makes `message` the topic's retained message; an empty payload removes it (MQTT 5.0 §3.3.1.3).
    pub fn set(&mut self, message: Arc<Message>) -> Change {
        let removed = if message.payload.is_empty() {
            self.messages.remove(message.topic.as_str())
        } else {
            self.bytes += message.size();
            self.messages.insert(message.topic.clone(), message.clone())
        };
        self.bytes -= removed.as_ref().map_or(0, |old| old.size());
        match (message.payload.is_empty(), removed) {
            (false, _) => Change::Stored,
            (true, Some(_)) => Change::Removed,
            (true, None) => Change::Nothing,
        }
    }

    pub fn contains(&self, topic: &str) -> bool {
        self.messages.contains_key(topic)
    }

    /// Everything that `filter` matches and that has not expired, in the order of the topics.
    pub fn matching(&self, filter: &TopicFilter, now: UnixMillis) -> Vec<Arc<Message>> {
        let text = filter.as_str();
        let live = |message: &&Arc<Message>| !message.is_expired(now);
        let Some(wildcard) = text.find(['+', '#']) else {
            return self.messages.get(text).filter(live).cloned().into_iter().collect();
        };
        // `a/#` matches `a` itself, which sorts before `a/`: begin one separator earlier.
        let prefix = text[..wildcard].trim_end_matches('/');
        let range = (Bound::Included(prefix), Bound::<&str>::Unbounded);
        let candidates = self.messages.range::<str, _>(range);
        candidates
            .take_while(|(topic, _)| topic.as_str().starts_with(prefix))
            .filter(|(topic, _)| filter.matches(topic.as_str()))
            .map(|(_, message)| message)
            .filter(live)
            .cloned()
            .collect()
    }

    /// Removes what has expired and returns it.
    pub fn expire(&mut self, now: UnixMillis) -> Vec<Arc<Message>> {
        let expired: Vec<_> = self.messages.values().filter(|message| message.is_expired(now)).cloned().collect();
        for message in &expired {
            self.messages.remove(message.topic.as_str());
            self.bytes -= message.size();
        }
        expired
    }

    /// Everything, in the order of the topics.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Message>> {
        self.messages.values()
    }

    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Topics, payloads and properties held, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::QoS;
    use std::time::Duration;

    fn message(topic: &str, payload: &'static str) -> Arc<Message> {
        let topic = TopicName::new(topic).unwrap();
        Arc::new(Message::new(topic, payload, QoS::AtMostOnce, UnixMillis(0)).retained())
    }

    #[test]
    fn a_filter_finds_its_topics_and_no_others() {
        let mut retained = Retained::default();
        for topic in ["a", "a/b", "a/b/c", "a-x", "ab", "b", "$SYS/x", "/a"] {
            retained.set(message(topic, "1"));
        }
        let check = |filter: &str, expected: &[&str]| {
            let found = retained.matching(&TopicFilter::new(filter).unwrap(), UnixMillis(0));
            let topics: Vec<_> = found.iter().map(|message| message.topic.as_str()).collect();
            assert_eq!(topics, expected, "{filter}");
        };
        check("a/#", &["a", "a/b", "a/b/c"]);
        check("a/+", &["a/b"]);
        check("a", &["a"]);
        check("+", &["a", "a-x", "ab", "b"]);
        check("#", &["/a", "a", "a-x", "a/b", "a/b/c", "ab", "b"]);
        check("$SYS/#", &["$SYS/x"]);
        check("/+", &["/a"]);
        check("z/#", &[]);
    }

    #[test]
    fn an_empty_payload_removes_and_sizes_are_kept() {
        let mut retained = Retained::default();
        assert_eq!(retained.set(message("a", "123")), Change::Stored);
        assert_eq!(retained.set(message("a", "12")), Change::Stored);
        assert_eq!((retained.len(), retained.bytes()), (1, 3));
        assert_eq!(retained.set(message("a", "")), Change::Removed);
        assert_eq!(retained.set(message("a", "")), Change::Nothing);
        assert_eq!((retained.len(), retained.bytes()), (0, 0));
    }

    #[test]
    fn expired_messages_are_not_found_and_go() {
        let mut retained = Retained::default();
        let mut short = (*message("a", "1")).clone();
        short.expiry_interval = Some(Duration::from_secs(1));
        retained.set(Arc::new(short));
        retained.set(message("b", "1"));
        let all = TopicFilter::new("#").unwrap();
        assert_eq!(retained.matching(&all, UnixMillis(999)).len(), 2);
        assert_eq!(retained.matching(&all, UnixMillis(1000)).len(), 1);
        assert_eq!(retained.expire(UnixMillis(1000)).len(), 1);
        assert_eq!((retained.len(), retained.bytes()), (1, 2));
    }
}
