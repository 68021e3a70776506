//! The numbers that stand for topics in the rows of queues.
//!
//! Telemetry repeats its topics, and a topic is often as long as the payload. A topic gets a number when it is seen a
//! second time, so that topics which never come back do not fill the table.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use rusqlite::Connection;

use crate::topic::TopicName;

/// How many topics are numbered; further ones stand in their rows as text.
const MAX_TOPICS: usize = 65_536;
/// How long all numbered topics together may be, in bytes.
const MAX_TOPIC_TABLE_BYTES: usize = 8 << 20;
/// How many topics seen once are remembered, by their hash.
const SEEN: usize = 8192;

#[derive(Debug)]
pub(super) struct Topics {
    numbers: HashMap<TopicName, i64>,
    names: HashMap<i64, TopicName>,
    bytes: usize,
    next: i64,
    seen: Box<[u64]>,
    hasher: RandomState,
}

/// How a topic stands in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    Number(i64),
    /// This number is free; the topic may have it.
    NewNumber(i64),
    Text,
}

impl Default for Topics {
    fn default() -> Self {
        Self {
            numbers: HashMap::new(),
            names: HashMap::new(),
            bytes: 0,
            next: 1,
            seen: vec![0; SEEN].into(),
            hasher: RandomState::new(),
        }
    }
}

impl Topics {
    /// The numbered topics of a database.
    pub fn read(connection: &Connection) -> rusqlite::Result<Self> {
        let mut topics = Self::default();
        let mut statement = connection.prepare_cached("SELECT id, name FROM topic")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            // A damaged name leaves its messages without a topic; they are set aside when they are read.
            if let Ok(name) = TopicName::new(row.get_ref(1)?.as_str().unwrap_or_default()) {
                topics.insert(row.get(0)?, name);
            }
        }
        Ok(topics)
    }

    pub fn insert(&mut self, number: i64, name: TopicName) {
        self.next = self.next.max(number + 1);
        self.bytes += name.as_str().len();
        self.numbers.insert(name.clone(), number);
        self.names.insert(number, name);
    }

    pub fn name(&self, number: i64) -> Option<&TopicName> {
        self.names.get(&number)
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn spelling(&mut self, name: &TopicName) -> Spelling {
        if let Some(&number) = self.numbers.get(name) {
            return Spelling::Number(number);
        }
        let hash: u64 = self.hasher.hash_one(name);
        let place = usize::try_from(hash % SEEN as u64).unwrap_or(0);
        let again = std::mem::replace(&mut self.seen[place], hash) == hash;
        let room = self.len() < MAX_TOPICS && self.bytes + name.as_str().len() <= MAX_TOPIC_TABLE_BYTES;
        if again && room { Spelling::NewNumber(self.next) } else { Spelling::Text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(text: &str) -> TopicName {
        TopicName::new(text).unwrap()
    }

    #[test]
    fn a_topic_gets_its_number_when_it_comes_back() {
        let mut topics = Topics::default();
        topics.insert(41, topic("known"));
        assert_eq!(topics.spelling(&topic("known")), Spelling::Number(41));
        assert_eq!(topics.spelling(&topic("new")), Spelling::Text);
        assert_eq!(topics.spelling(&topic("new")), Spelling::NewNumber(42));
        topics.insert(42, topic("new"));
        assert_eq!(topics.spelling(&topic("new")), Spelling::Number(42));
        assert_eq!(topics.name(42), Some(&topic("new")));
    }

    #[test]
    fn the_table_is_bounded_in_number_and_bytes() {
        let mut topics = Topics::default();
        for number in 0..MAX_TOPICS {
            topics.insert(i64::try_from(number).unwrap(), topic(&number.to_string()));
        }
        topics.spelling(&topic("more"));
        assert_eq!(topics.spelling(&topic("more")), Spelling::Text);

        let mut topics = Topics::default();
        for number in 0..MAX_TOPIC_TABLE_BYTES / 60_000 {
            topics.insert(i64::try_from(number).unwrap(), topic(&format!("{number:060000}")));
        }
        let long = topic(&"x".repeat(60_000));
        topics.spelling(&long);
        assert_eq!(topics.spelling(&long), Spelling::Text);
    }
}
