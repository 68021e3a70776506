//! The topic ids of one client (MQTT-SN 1.2 §5.3.11, §6.5, §6.7, §7.3).
//!
//! Normal, predefined and short ids are separate spaces. A normal id belongs to one client, stands for the same name
//! as long as the client's session lives, and is never given to another name while it does. What the client has
//! been told is kept apart from what an id means: a client that comes back is told again by REGISTER.

use std::collections::HashMap;

use super::packet::TopicId;
use crate::topic::TopicName;

/// The topics that gateway and clients know beforehand, by id. Ids are 1 to 0xFFFE.
pub type Predefined = HashMap<u16, TopicName>;

/// Ids with no meaning of their own (§5.3.11).
const RESERVED: [u16; 2] = [0x0000, 0xFFFF];

/// Whether `id` may stand for a topic.
pub fn is_usable(id: u16) -> bool {
    !RESERVED.contains(&id)
}

/// The text of a short topic name, if it is one.
pub fn short_text(name: &[u8; 2]) -> Option<&str> {
    std::str::from_utf8(name).ok()
}

/// The topic of an id that means the same to all clients.
pub fn common_topic(topic: TopicId, predefined: &Predefined) -> Option<TopicName> {
    match topic {
        TopicId::Normal(_) => None,
        TopicId::Predefined(id) if is_usable(id) => predefined.get(&id).cloned(),
        TopicId::Predefined(_) => None,
        TopicId::Short(name) => TopicName::new(short_text(&name)?).ok(),
    }
}

/// How a message on a topic reaches the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Ready(TopicId),
    /// The client must first be told, by REGISTER, that this id stands for the topic.
    Register(u16),
    /// The client has refused the REGISTER of this topic.
    Refused,
    /// There is no id left, and none in use may be taken.
    Exhausted,
}

/// Which topic each normal id of a client stands for, and what of it the client knows.
#[derive(Debug)]
pub struct TopicMap {
    by_name: HashMap<TopicName, u16>,
    by_id: HashMap<u16, Entry>,
    /// Topics that the client subscribed to by their predefined id, and so knows by it.
    predefined: HashMap<TopicName, u16>,
    next: u16,
    limit: usize,
}

#[derive(Debug)]
struct Entry {
    name: TopicName,
    standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Unknown,
    Known,
    Refused,
}

impl TopicMap {
    /// A map for at most `limit` topics. `first` is the first id to give: one that differs from session to session keeps
    /// a client with ids from a forgotten session from publishing under a wrong name.
    pub fn new(first: u16, limit: usize) -> Self {
        let ids = usize::from(u16::MAX) + 1 - RESERVED.len();
        Self {
            by_name: HashMap::new(),
            by_id: HashMap::new(),
            predefined: HashMap::new(),
            next: first,
            limit: limit.min(ids),
        }
    }

    pub fn name(&self, id: u16) -> Option<&TopicName> {
        self.by_id.get(&id).map(|entry| &entry.name)
    }

    /// An empty map that goes on where this one stops, so that ids the client may remember are not soon given again.
    pub fn cleared(&self) -> Self {
        Self::new(self.next, self.limit)
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// The id of `name`, which the client learns with the answer (REGACK, SUBACK). `None`: no id is left.
    pub fn tell(&mut self, name: &TopicName) -> Option<u16> {
        let id = self.id_of(name)?;
        self.mark(id, Standing::Known);
        Some(id)
    }

    /// The client has accepted the REGISTER of `id`.
    pub fn accepted(&mut self, id: u16) {
        self.mark(id, Standing::Known);
    }

    /// The client has refused the REGISTER of `id`: the topic is not sent until it connects again.
    pub fn refused(&mut self, id: u16) {
        self.mark(id, Standing::Refused);
    }

    /// The client does not know `id`, though it had been told.
    pub fn unknown(&mut self, id: u16) {
        self.mark(id, Standing::Unknown);
    }

    /// The client may have forgotten every normal id, and may accept what it refused before.
    pub fn all_unknown(&mut self) {
        self.by_id.values_mut().for_each(|entry| entry.standing = Standing::Unknown);
    }

    /// The client receives `name` by its predefined id from now on.
    pub fn use_predefined(&mut self, name: &TopicName, id: u16) {
        // The operator's table bounds this map: only ids from it get here.
        self.predefined.insert(name.clone(), id);
    }

    pub fn stop_predefined(&mut self, name: &TopicName) {
        self.predefined.remove(name);
    }

    /// How to send a message on `name`: as the client subscribed to it, else by what needs no REGISTER.
    pub fn way(&mut self, name: &TopicName) -> Way {
        if let Some(&id) = self.predefined.get(name) {
            return Way::Ready(TopicId::Predefined(id));
        }
        let standing = self.by_name.get(name).map(|id| (*id, self.by_id[id].standing));
        if let Some((id, Standing::Known)) = standing {
            return Way::Ready(TopicId::Normal(id));
        }
        if let Ok(short) = <[u8; 2]>::try_from(name.as_str().as_bytes()) {
            return Way::Ready(TopicId::Short(short));
        }
        match standing {
            Some((_, Standing::Refused)) => Way::Refused,
            Some((id, _)) => Way::Register(id),
            None => self.id_of(name).map_or(Way::Exhausted, Way::Register),
        }
    }

    /// The id of `name`, which the client does not know yet. `None`: no id is left.
    pub fn id_of(&mut self, name: &TopicName) -> Option<u16> {
        if let Some(&id) = self.by_name.get(name) {
            return Some(id);
        }
        if self.by_id.len() >= self.limit {
            return None;
        }
        // Ends: fewer ids are live than there are.
        while !is_usable(self.next) || self.by_id.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.by_name.insert(name.clone(), id);
        self.by_id.insert(id, Entry { name: name.clone(), standing: Standing::Unknown });
        Some(id)
    }

    fn mark(&mut self, id: u16, standing: Standing) {
        if let Some(entry) = self.by_id.get_mut(&id) {
            entry.standing = standing;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> TopicName {
        TopicName::new(text).unwrap()
    }

    // Lines 8 and 32.
    #[test]
    fn ids_skip_the_reserved_ones_and_never_wrap_onto_a_live_one() {
        let mut map = TopicMap::new(0xFFFE, 3);
        assert_eq!(map.tell(&name("a/b")), Some(0xFFFE));
        assert_eq!(map.tell(&name("a/c")), Some(0x0001));
        assert_eq!(map.tell(&name("a/b")), Some(0xFFFE));
        map.next = 0xFFFE;
        assert_eq!(map.tell(&name("a/d")), Some(0x0002));
        assert_eq!(map.tell(&name("a/e")), None);
        assert_eq!(map.way(&name("a/e")), Way::Exhausted);
        assert_eq!(map.len(), 3);
    }

    #[test]
    fn every_id_can_be_given_and_then_none() {
        let mut map = TopicMap::new(77, usize::MAX);
        for index in 0..65_534 {
            assert!(map.tell(&name(&format!("t/{index}"))).is_some(), "{index}");
        }
        assert_eq!(map.tell(&name("one/more")), None);
        assert!(map.name(0).is_none() && map.name(0xFFFF).is_none());
    }

    // Lines 27, 29, 31, 33 and 35.
    #[test]
    fn the_way_to_a_client_depends_on_what_it_knows() {
        let mut map = TopicMap::new(1, 10);
        let topic = name("room/1");
        assert_eq!(map.way(&topic), Way::Register(1));
        map.accepted(1);
        assert_eq!(map.way(&topic), Way::Ready(TopicId::Normal(1)));
        map.unknown(1);
        assert_eq!(map.way(&topic), Way::Register(1));
        map.refused(1);
        assert_eq!(map.way(&topic), Way::Refused);
        map.all_unknown();
        assert_eq!(map.way(&topic), Way::Register(1));
        map.use_predefined(&topic, 9);
        assert_eq!(map.way(&topic), Way::Ready(TopicId::Predefined(9)));
        map.stop_predefined(&topic);
        assert_eq!(map.way(&topic), Way::Register(1));
        assert_eq!(map.way(&name("ab")), Way::Ready(TopicId::Short(*b"ab")));
        map.tell(&name("ab"));
        assert_eq!(map.way(&name("ab")), Way::Ready(TopicId::Normal(2)));
    }
}
