//! What has come of one stream of a queue, and what has not. Pure; it grows with gaps, not with messages.

use std::collections::{BTreeMap, BTreeSet};

/// How many findings of one kind are kept; all are counted.
pub(super) const KEPT: usize = 20;

/// The numbers of one stream.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub messages: u64,
    /// Came again, as QoS 1 allows.
    pub repeated: Findings,
    /// Came again at QoS 2.
    pub doubled: Findings,
    /// Came for the first time after a higher number of its QoS: an upstream keeps the order of each QoS, and may pass on
    /// what came at QoS 1 while a QoS 2 handshake goes on.
    pub late: Findings,
    /// From one empty queue to the next.
    lives: Vec<Life>,
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Fine,
    Repeated,
    Doubled,
    Late,
}

/// Messages with something in common.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub count: u64,
    /// The first of them: number and line.
    pub first: Vec<(u64, u64)>,
}

/// Numbers that are missing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub from: u64,
    pub to: u64,
    /// The lines of the numbers before and after it; none where it is the queue's first number.
    pub after_line: Option<u64>,
    pub before_line: u64,
}

/// The numbers between two times at which the gateway started with an empty queue and began with 0.
#[derive(Debug, Default)]
struct Life {
    /// The starts of the gateway within it.
    boots: Vec<String>,
    /// Numbers seen, as ranges that do not touch, by their first.
    seen: BTreeMap<u64, Range>,
    highest: u64,
    /// The same of each QoS.
    highest_of: BTreeMap<Option<u64>, u64>,
    /// The latest time at which one of its messages was accepted.
    latest: String,
    again: Again,
}

/// Numbers that the last start has given again. One that was sent at QoS 1 before its commit, and not committed when the
/// gateway was killed, is free; its publisher, who has no acknowledgement, sends the message again.
#[derive(Debug, Default)]
struct Again {
    /// What had come when the start began: only numbers up to that, accepted later, can be given again.
    highest: u64,
    latest: String,
    seen: BTreeSet<u64>,
    /// The highest of each QoS.
    highest_of: BTreeMap<Option<u64>, u64>,
}

#[derive(Clone, Copy, Debug)]
struct Range {
    last: u64,
    first_line: u64,
    last_line: u64,
}

impl Ledger {
    /// Takes down that `number`, accepted at `time`, came on `line`.
    pub fn add(&mut self, boot: &str, number: u64, time: &str, qos: Option<u64>, line: u64) -> Fate {
        self.messages += 1;
        let life = self.life_of(boot, number, time);
        if time > life.latest.as_str() {
            time.clone_into(&mut life.latest);
        }
        let is_again = life.is_given_again(boot, number, time);
        let highest = if is_again { &mut life.again.highest_of } else { &mut life.highest_of }.entry(qos).or_default();
        let is_late = number < *highest;
        *highest = number.max(*highest);
        let is_new = if is_again { life.again.seen.insert(number) } else { life.insert(number, line) };
        let fate = match is_new {
            false if qos == Some(2) => Fate::Doubled,
            false => Fate::Repeated,
            true if is_late => Fate::Late,
            true => Fate::Fine,
        };
        match fate {
            Fate::Fine => {}
            Fate::Repeated => self.repeated.add(number, line),
            Fate::Doubled => self.doubled.add(number, line),
            Fate::Late => self.late.add(number, line),
        }
        fate
    }

    /// The life to which the first message of a new start belongs. What was sent and not acknowledged comes again under
    /// its number, and was accepted when it was; what only has the number of an earlier one was accepted later.
    fn life_of(&mut self, boot: &str, number: u64, time: &str) -> &mut Life {
        let is_known = |life: &Life| life.boots.iter().any(|known| known == boot);
        let place = self.lives.iter().rposition(is_known).unwrap_or_else(|| {
            let starts_over = self.lives.last().is_none_or(|life| {
                let is_new = if time.is_empty() { number == 0 } else { time > life.latest.as_str() };
                number <= life.highest && is_new
            });
            if starts_over {
                self.lives.push(Life { highest: number, ..Life::default() });
            }
            let last = self.lives.len() - 1;
            let life = &mut self.lives[last];
            life.boots.push(boot.into());
            life.again = Again { highest: life.highest, latest: life.latest.clone(), ..Again::default() };
            last
        });
        &mut self.lives[place]
    }

    pub fn is_sound(&self) -> bool {
        self.late.count == 0 && self.doubled.count == 0 && self.gaps().is_empty()
    }

    /// How often the gateway was started.
    pub fn starts(&self) -> usize {
        self.lives.iter().map(|life| life.boots.len()).sum()
    }

    /// Numbers that lie between others, and those before the first of a queue that has started over. What was missing
    /// before the record begins cannot be told.
    pub fn gaps(&self) -> Vec<Gap> {
        let mut gaps = Vec::new();
        for (at, life) in self.lives.iter().enumerate() {
            if let Some((&first, range)) = life.seen.first_key_value().filter(|(first, _)| at > 0 && **first > 0) {
                gaps.push(Gap { from: 0, to: first - 1, after_line: None, before_line: range.first_line });
            }
            for ((_, below), (&next, above)) in life.seen.iter().zip(life.seen.iter().skip(1)) {
                let (after_line, before_line) = (Some(below.last_line), above.first_line);
                gaps.push(Gap { from: below.last + 1, to: next - 1, after_line, before_line });
            }
        }
        gaps
    }
}

impl Life {
    /// Whether it is another message than the one that came under this number from an earlier start.
    fn is_given_again(&self, boot: &str, number: u64, time: &str) -> bool {
        let Again { highest, latest, .. } = &self.again;
        let is_of_last_start = self.boots.len() > 1 && self.boots.last().is_some_and(|last| last == boot);
        is_of_last_start && number <= *highest && time > latest.as_str() && self.holds(number)
    }

    fn holds(&self, number: u64) -> bool {
        self.seen.range(..=number).next_back().is_some_and(|(_, range)| range.last >= number)
    }

    /// Tells whether it was not there.
    fn insert(&mut self, number: u64, line: u64) -> bool {
        if self.holds(number) {
            return false;
        }
        self.highest = self.highest.max(number);
        let mut range = Range { last: number, first_line: line, last_line: line };
        if let Some(above) = number.checked_add(1).and_then(|next| self.seen.remove(&next)) {
            (range.last, range.last_line) = (above.last, above.last_line);
        }
        match self.seen.range_mut(..number).next_back() {
            Some((_, below)) if below.last + 1 == number => {
                (below.last, below.last_line) = (range.last, range.last_line);
            }
            _ => _ = self.seen.insert(number, range),
        }
        true
    }
}

impl Findings {
    fn add(&mut self, number: u64, line: u64) {
        self.count += 1;
        if self.first.len() < KEPT {
            self.first.push((number, line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Start, number and time of each message; the line is its place, from 1.
    fn ledger(messages: &[(&str, u64, &str)], qos: u64) -> Ledger {
        let mut ledger = Ledger::default();
        for (line, (boot, number, time)) in (1..).zip(messages) {
            ledger.add(boot, *number, time, Some(qos), line);
        }
        ledger
    }

    #[test]
    fn numbers_without_a_hole_are_sound_however_often_they_come() {
        let check = |messages: &[(&str, u64, &str)], repeated: u64| {
            let once = ledger(messages, 1);
            assert!(once.is_sound(), "{messages:?}: {once:?}");
            assert_eq!(once.repeated.count, repeated, "{messages:?}");
            let exactly = ledger(messages, 2);
            assert_eq!((exactly.repeated.count, exactly.doubled.count), (0, repeated), "{messages:?}");
            assert_eq!(exactly.is_sound(), repeated == 0);
        };
        check(&[("a", 7, "1"), ("a", 8, "2"), ("a", 9, "3")], 0);
        check(&[("a", 0, "1"), ("a", 1, "2"), ("a", 0, "1"), ("a", 1, "2"), ("a", 2, "3")], 2);
        // The next start repeats what was not acknowledged, goes on, or starts over.
        check(&[("a", 0, "1"), ("a", 1, "2"), ("b", 1, "2"), ("b", 2, "3")], 1);
        check(&[("a", 0, "1"), ("b", 0, "1"), ("c", 0, "1"), ("c", 1, "2")], 2);
        check(&[("a", 0, "1"), ("a", 1, "2"), ("b", 2, "3")], 0);
        check(&[("a", 8, "1"), ("a", 9, "2"), ("b", 0, "3"), ("b", 1, "4")], 0);
        check(&[("a", 0, "1"), ("b", 0, "2"), ("c", 0, "3")], 0);
        // Of a gateway that did not say the time.
        check(&[("a", 0, ""), ("a", 1, ""), ("b", 1, ""), ("b", 2, "")], 1);
        check(&[("a", 8, ""), ("b", 0, ""), ("b", 1, "")], 0);
    }

    #[test]
    fn a_number_that_is_given_again_after_a_kill_is_another_message() {
        let start = [("a", 0, "1"), ("a", 1, "2"), ("a", 2, "3")];
        let check = |after: &[(&str, u64, &str)], doubled: &[(u64, u64)], late: &[(u64, u64)]| {
            let ledger = ledger(&[&start, after].concat(), 2);
            assert_eq!((&*ledger.doubled.first, &*ledger.late.first), (doubled, late), "{after:?}");
            assert!(ledger.gaps().is_empty());
        };
        check(&[("b", 0, "1"), ("b", 1, "4"), ("b", 2, "5"), ("b", 3, "6")], &[(0, 4)], &[]);
        check(&[("b", 3, "4"), ("b", 2, "5"), ("b", 2, "5")], &[(2, 6)], &[]);
        check(&[("b", 3, "4"), ("b", 2, "6"), ("b", 1, "5")], &[], &[(1, 6)]);
        // Once more it would be what the start before has given.
        check(&[("b", 3, "4"), ("b", 2, "5"), ("c", 2, "5"), ("c", 3, "4")], &[(2, 6), (3, 7)], &[]);
        // The same start gives no number twice.
        check(&[("a", 2, "4")], &[(2, 4)], &[]);
    }

    #[test]
    fn what_is_missing_or_late_is_named_with_its_lines() {
        let check = |messages: &[(&str, u64, &str)], expected: &[(u64, u64, Option<u64>, u64)], late: &[(u64, u64)]| {
            let ledger = ledger(messages, 1);
            assert!(!ledger.is_sound(), "{messages:?}");
            let gaps = ledger.gaps();
            let found = gaps.iter().map(|gap| (gap.from, gap.to, gap.after_line, gap.before_line));
            assert_eq!(found.collect::<Vec<_>>(), expected, "{messages:?}");
            assert_eq!(ledger.late.first, late, "{messages:?}");
        };
        check(&[("a", 0, "1"), ("a", 2, "3")], &[(1, 1, Some(1), 2)], &[]);
        check(
            &[("a", 0, "1"), ("a", 5, "2"), ("a", 5, "2"), ("a", 9, "3")],
            &[(1, 4, Some(1), 2), (6, 8, Some(2), 4)],
            &[],
        );
        check(&[("a", 3, "1"), ("b", 6, "2")], &[(4, 5, Some(1), 2)], &[]);
        // It started over, for what has a smaller number was accepted later.
        check(&[("a", 8, "1"), ("b", 2, "2")], &[(0, 1, None, 2)], &[]);
        // What an earlier start did not get through comes under the next, late.
        check(&[("a", 0, "1"), ("a", 2, "3"), ("b", 1, "2")], &[], &[(1, 3)]);
        // Late, and nothing is missing.
        check(&[("a", 0, "1"), ("a", 2, "3"), ("a", 1, "2")], &[], &[(1, 3)]);
        check(
            &[("a", 5, "6"), ("a", 3, "4"), ("a", 1, "2")],
            &[(2, 2, Some(3), 2), (4, 4, Some(2), 1)],
            &[(3, 2), (1, 3)],
        );
    }

    #[test]
    fn each_qos_has_an_order_of_its_own() {
        let mut ledger = Ledger::default();
        let mut check = |number, qos, expected| {
            assert_eq!(ledger.add("a", number, "1", qos, number), expected);
        };
        check(0, Some(2), Fate::Fine);
        check(5, Some(1), Fate::Fine);
        check(1, Some(2), Fate::Fine);
        check(4, Some(1), Fate::Late);
        check(3, Some(2), Fate::Fine);
        check(2, Some(2), Fate::Late);
        assert!(ledger.gaps().is_empty());
    }

    #[test]
    fn the_ends_of_the_range_of_numbers_are_numbers_as_any() {
        let ledger = ledger(&[("a", u64::MAX - 1, "1"), ("a", u64::MAX, "2"), ("b", u64::MAX, "2")], 1);
        assert!(ledger.is_sound());
        assert_eq!(ledger.repeated.count, 1);
    }
}
