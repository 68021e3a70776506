//! The subscription tree: which subscriptions want a topic (MQTT 5.0 §4.7).
//!
//! One node a topic level. A lookup visits, per level, at most the level's own node and its `+` sibling, so its cost
//! grows with the depth of the topic and the matches found, not with the number of subscriptions. (Filters made for it can
//! let both go on below, level by level; even then each node is visited once.)

use std::collections::HashMap;
use std::sync::Arc;

use crate::topic::{SharedFilter, TopicFilter};

/// Subscriptions by filter. `T` is what a match yields; an entry is known by its filter, owner and share group.
#[derive(Debug)]
pub struct Routes<T> {
    root: Node<T>,
    len: usize,
}

impl<T> Default for Routes<T> {
    fn default() -> Self {
        Self { root: Node::default(), len: 0 }
    }
}

#[derive(Debug)]
pub struct Entry<T> {
    pub owner: u64,
    /// The share name of a shared subscription (MQTT 5.0 §4.8.2).
    pub group: Option<Arc<str>>,
    pub value: T,
}

#[derive(Debug)]
struct Node<T> {
    children: Children<T>,
    /// Subscriptions whose filter ends at this level.
    here: Vec<Entry<T>>,
    /// Subscriptions whose filter goes on with `#`: this level and all below.
    below: Vec<Entry<T>>,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self { children: Children::Few(Vec::new()), here: Vec::new(), below: Vec::new() }
    }
}

/// The levels that follow a node's. Most nodes have few, which a look at each finds as fast as a hash would, in a
/// fraction of the memory.
#[derive(Debug)]
enum Children<T> {
    Few(Vec<(Box<str>, Node<T>)>),
    #[expect(clippy::box_collection, reason = "a table in place would make every node larger by half")]
    Many(Box<HashMap<Box<str>, Node<T>>>),
}

/// How many are few.
const FEW: usize = 8;

impl<T> Routes<T> {
    /// Adds a subscription, or replaces the one of the same owner, filter and group. Returns what it replaced.
    pub fn insert(&mut self, filter: &SharedFilter, owner: u64, value: T) -> Option<T> {
        let (path, is_below) = split(&filter.filter);
        let mut node = &mut self.root;
        for level in path {
            node = node.children.get_or_insert(level);
        }
        let entries = if is_below { &mut node.below } else { &mut node.here };
        let known = entries.iter_mut().find(|entry| entry.owner == owner && entry.group == filter.group);
        if let Some(entry) = known {
            return Some(std::mem::replace(&mut entry.value, value));
        }
        push_tight(entries, Entry { owner, group: filter.group.clone(), value });
        self.len += 1;
        None
    }

    /// Removes a subscription and the nodes that only it needed.
    pub fn remove(&mut self, filter: &SharedFilter, owner: u64) -> Option<T> {
        let (path, is_below) = split(&filter.filter);
        let path: Vec<&str> = path.collect();
        let removed = self.root.remove(&path, is_below, owner, filter.group.as_deref());
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// Calls `found` for each subscription that wants `topic`.
    pub fn matches<'a>(&'a self, topic: &str, mut found: impl FnMut(&'a Entry<T>)) {
        // A filter that begins with a wildcard does not match the server's own topics (MQTT 5.0 §4.7.2).
        let wildcards = !topic.starts_with('$');
        self.root.matches(topic, wildcards, &mut found);
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

impl<T> Node<T> {
    fn matches<'a>(&'a self, rest: &str, wildcards: bool, found: &mut impl FnMut(&'a Entry<T>)) {
        #[cfg(test)]
        tests::VISITED.set(tests::VISITED.get() + 1);
        if wildcards {
            self.below.iter().for_each(&mut *found);
        }
        let (level, rest) = match rest.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (rest, None),
        };
        let plus = if wildcards { self.children.get("+") } else { None };
        for child in self.children.get(level).into_iter().chain(plus) {
            match rest {
                Some(rest) => child.matches(rest, true, found),
                None => {
                    child.here.iter().for_each(&mut *found);
                    child.below.iter().for_each(&mut *found);
                }
            }
        }
    }

    fn remove(&mut self, path: &[&str], is_below: bool, owner: u64, group: Option<&str>) -> Option<T> {
        let Some((level, path)) = path.split_first() else {
            let entries = if is_below { &mut self.below } else { &mut self.here };
            let position = entries.iter().position(|entry| entry.owner == owner && entry.group.as_deref() == group)?;
            return Some(entries.swap_remove(position).value);
        };
        let child = self.children.get_mut(level)?;
        let removed = child.remove(path, is_below, owner, group);
        if child.here.is_empty() && child.below.is_empty() && child.children.is_empty() {
            self.children.remove(level);
        }
        removed
    }
}

impl<T> Children<T> {
    fn get(&self, level: &str) -> Option<&Node<T>> {
        match self {
            Self::Few(few) => few.iter().find(|(name, _)| **name == *level).map(|(_, node)| node),
            Self::Many(many) => many.get(level),
        }
    }

    fn get_mut(&mut self, level: &str) -> Option<&mut Node<T>> {
        match self {
            Self::Few(few) => few.iter_mut().find(|(name, _)| **name == *level).map(|(_, node)| node),
            Self::Many(many) => many.get_mut(level),
        }
    }

    fn get_or_insert(&mut self, level: &str) -> &mut Node<T> {
        if self.get(level).is_none() {
            self.insert(level);
        }
        self.get_mut(level).expect("inserted above")
    }

    fn insert(&mut self, level: &str) {
        match self {
            Self::Few(few) if few.len() < FEW => push_tight(few, (level.into(), Node::default())),
            Self::Few(few) => {
                let mut many: HashMap<_, _> = few.drain(..).collect();
                many.insert(level.into(), Node::default());
                *self = Self::Many(Box::new(many));
            }
            Self::Many(many) => _ = many.insert(level.into(), Node::default()),
        }
    }

    fn remove(&mut self, level: &str) {
        match self {
            Self::Few(few) => few.retain(|(name, _)| **name != *level),
            Self::Many(many) => _ = many.remove(level),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Few(few) => few.is_empty(),
            Self::Many(many) => many.is_empty(),
        }
    }
}

/// Appends without the room to spare that a vector makes for its first few: most of these never hold a second.
fn push_tight<V>(into: &mut Vec<V>, value: V) {
    if into.len() == into.capacity() {
        into.reserve_exact(into.len().max(1));
    }
    into.push(value);
}

/// The levels to walk, and whether a final `#` follows them.
fn split(filter: &TopicFilter) -> (impl Iterator<Item = &str>, bool) {
    let text = filter.as_str();
    let is_below = text == "#" || text.ends_with("/#");
    let levels = text.split('/').count() - usize::from(is_below);
    (text.split('/').take(levels), is_below)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use proptest::prelude::*;

    thread_local! {
        /// Nodes that look-ups of this thread have come to.
        pub(super) static VISITED: Cell<usize> = const { Cell::new(0) };
    }

    fn shared(text: &str) -> SharedFilter {
        SharedFilter::split(text).unwrap()
    }

    fn found(routes: &Routes<u32>, topic: &str) -> Vec<u32> {
        let mut values = Vec::new();
        routes.matches(topic, |entry| values.push(entry.value));
        values.sort_unstable();
        values
    }

    #[test]
    fn subscriptions_are_found_replaced_and_removed() {
        let mut routes = Routes::default();
        let filters = ["a/b", "a/+", "a/#", "#", "+/b", "$SYS/#", "$share/g/a/b", "+"];
        for (value, filter) in (0..).zip(filters) {
            assert_eq!(routes.insert(&shared(filter), 1, value), None);
        }
        assert_eq!(found(&routes, "a/b"), [0, 1, 2, 3, 4, 6]);
        assert_eq!(found(&routes, "a"), [2, 3, 7]);
        assert_eq!(found(&routes, "$SYS/x"), [5]);
        assert_eq!(routes.insert(&shared("a/b"), 1, 10), Some(0));
        assert_eq!(routes.insert(&shared("a/b"), 2, 11), None);
        assert_eq!(routes.len(), 9);
        for filter in filters {
            assert!(routes.remove(&shared(filter), 1).is_some(), "{filter}");
            assert!(routes.remove(&shared(filter), 1).is_none(), "{filter}");
        }
        assert_eq!(found(&routes, "a/b"), [11]);
        routes.remove(&shared("a/b"), 2);
        assert!(routes.len() == 0 && routes.root.children.is_empty());
    }

    #[test]
    fn a_look_up_comes_to_as_many_nodes_among_100_000_filters_as_among_ten() {
        let visited_among = |filters: u32| {
            let mut routes = Routes::default();
            for number in 0..filters {
                let (line, machine) = (number % 10, number / 10);
                let filter = match number % 3 {
                    0 => format!("plant/+/line/{line}/{machine}/value"),
                    1 => format!("plant/{line}/line/+/{machine}/state/#"),
                    _ => format!("plant/{line}/line/{machine}"),
                };
                routes.insert(&shared(&filter), 1, number);
            }
            assert_eq!(routes.len(), filters as usize);
            let before = VISITED.get();
            assert_eq!(found(&routes, "plant/1/line/0/0/value"), [0]);
            VISITED.get() - before
        };
        // The root, and at each of six levels a node of that name and a `+`, where there are both.
        assert_eq!(visited_among(100_000), visited_among(10));
        assert!(visited_among(10) <= 13);
    }

    #[test]
    fn a_filter_of_its_own_costs_a_node_and_an_entry_each_without_room_to_spare() {
        let mut routes = Routes::default();
        routes.insert(&shared("a/b"), 1, 0);
        let Children::Few(roots) = &routes.root.children else { panic!("few") };
        let Children::Few(leaves) = &roots[0].1.children else { panic!("few") };
        assert_eq!((roots.capacity(), leaves.capacity(), leaves[0].1.here.capacity()), (1, 1, 1));
        assert!(size_of::<(Box<str>, Node<u32>)>() <= 88);
    }

    #[test]
    fn nodes_with_many_children_are_found_and_removed_too() {
        let mut routes = Routes::default();
        let filters: Vec<_> = (0..3 * FEW).map(|number| shared(&format!("a/{number}"))).collect();
        for (value, filter) in (0..).zip(&filters) {
            routes.insert(filter, 1, value);
        }
        for (value, filter) in (0..).zip(&filters) {
            assert_eq!(found(&routes, filter.filter.as_str()), [value]);
            assert_eq!(routes.remove(filter, 1), Some(value));
            assert_eq!(found(&routes, filter.filter.as_str()), [0; 0]);
        }
        assert!(routes.root.children.is_empty());
    }

    proptest! {
        #[test]
        fn the_tree_agrees_with_matching_each_filter(
            filters in proptest::collection::vec("(\\$?[ab]?|\\+)(/([ab]|\\+|)){0,3}(/#)?", 1..12),
            topic in "\\$?[ab]?(/[ab]?){0,4}",
        ) {
            let filters: Vec<_> = filters.iter().filter_map(|text| SharedFilter::split(text).ok()).collect();
            let mut routes = Routes::default();
            for (owner, filter) in (0u32..).zip(&filters) {
                routes.insert(filter, u64::from(owner), owner);
            }
            let numbered = (0u32..).zip(&filters);
            let expected: Vec<u32> =
                numbered.filter(|(_, filter)| filter.filter.matches(&topic)).map(|(owner, _)| owner).collect();
            prop_assert_eq!(found(&routes, &topic), expected);
        }
    }
}
