//! What an upstream is told before messages flow (our state, and what we subscribe to), and what of it is left out because
//! the upstream closes the connection on it. Pure.
//!
//! Some brokers answer a subscription that is not allowed by closing; all at once, nobody knows which it was, and nothing
//! ever flows. After a few such connections things are said one by one, each after the answer to the one before. What the
//! upstream closes on twice is left out, and said again, last of all, after a while. To leave a subscription out is not to
//! end it: one that the upstream remembers with our session goes on.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// After how many closed connections things are said one by one.
const CLOSES: u32 = 3;
/// How often one thing ends a connection until it is left out.
const BLAMED: u32 = 2;
/// How long it is left out at first; twice as long each time.
const FIRST_WAIT: Duration = Duration::from_secs(600);
const MAX_DOUBLINGS: u32 = 7;

/// One thing that is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// That we are here, on the state topic.
    State,
    /// What the `in` rule of this index subscribes to.
    Rule(usize),
}

/// How to begin one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Greeting {
    /// What to say, in this order.
    pub said: VecDeque<Said>,
    pub is_one_by_one: bool,
    /// What the upstream has closed connections on.
    pub left_out: Vec<Said>,
}

/// What had no answer when a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    Nothing,
    /// One of what was said at once.
    Some,
    One(Said),
}

/// What the connections that ended have shown.
#[derive(Debug, Default)]
pub struct Manners {
    /// How many in a row the upstream closed without an answer.
    closes: u32,
    blamed: Vec<Blamed>,
}

#[derive(Debug)]
struct Blamed {
    said: Said,
    times: u32,
    /// Until when it is left out.
    until: Option<Instant>,
}

impl Manners {
    /// How to begin the next connection, where all of `said` is to be said.
    pub fn greeting(&self, said: impl Iterator<Item = Said>, now: Instant) -> Greeting {
        let mut greeting = Greeting { is_one_by_one: self.closes >= CLOSES, ..Greeting::default() };
        let mut again = Vec::new();
        for said in said {
            match self.blamed.iter().find(|blamed| blamed.said == said) {
                None => greeting.said.push_back(said),
                Some(blamed) if blamed.until.is_some_and(|until| now < until) => greeting.left_out.push(said),
                Some(_) => again.push(said),
            }
        }
        greeting.is_one_by_one |= !again.is_empty();
        greeting.said.extend(again);
        greeting
    }

    /// When something that is left out is to be said again.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        self.blamed.iter().filter_map(|blamed| blamed.until).filter(|until| *until > now).min()
    }

    /// A connection that began with `greeting` has ended; what is left out from now on.
    pub fn ended(&mut self, greeting: &Greeting, is_closed: bool, open: Open, now: Instant) -> Option<Said> {
        match open {
            Open::Nothing => {
                self.closes = 0;
                self.blamed.retain(|blamed| !greeting.said.contains(&blamed.said));
            }
            _ if !is_closed => self.closes = 0,
            Open::Some => self.closes = self.closes.saturating_add(1),
            Open::One(said) => {
                let known = self.blamed.iter().position(|blamed| blamed.said == said);
                let index = known.unwrap_or_else(|| {
                    self.blamed.push(Blamed { said, times: 0, until: None });
                    self.blamed.len() - 1
                });
                let blamed = &mut self.blamed[index];
                blamed.times = blamed.times.saturating_add(1);
                if blamed.times >= BLAMED {
                    blamed.until = Some(now + FIRST_WAIT * (1 << (blamed.times - BLAMED).min(MAX_DOUBLINGS)));
                    return Some(said);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_connections_is_found_one_by_one_and_left_out_for_a_while() {
        let mut manners = Manners::default();
        let mut now = Instant::now();
        let all = [Said::State, Said::Rule(0), Said::Rule(1), Said::Rule(2)];
        let next = |manners: &Manners, now| {
            let greeting = manners.greeting(all.into_iter(), now);
            (greeting.said.len(), greeting.is_one_by_one, greeting.left_out.len(), greeting)
        };
        let culprit = Said::Rule(1);
        for _ in 0..2 {
            for _ in 0..CLOSES {
                let (said, one_by_one, left_out, greeting) = next(&manners, now);
                assert_eq!((said, one_by_one, left_out), (4, false, 0));
                manners.ended(&greeting, true, Open::Some, now);
            }
            // A line that breaks says nothing about what was said.
            let greeting = next(&manners, now).3;
            assert!(greeting.is_one_by_one);
            manners.ended(&greeting, false, Open::One(Said::State), now);
        }
        (0..CLOSES).for_each(|_| _ = manners.ended(&Greeting::default(), true, Open::Some, now));
        for expected in [None, Some(culprit)] {
            let greeting = next(&manners, now).3;
            assert!(greeting.is_one_by_one);
            assert_eq!(manners.ended(&greeting, true, Open::One(culprit), now), expected);
        }
        for wait in [600, 1200, 2400] {
            let (said, _, left_out, greeting) = next(&manners, now);
            assert_eq!((said, left_out), (3, 1));
            manners.ended(&greeting, false, Open::Nothing, now);
            assert_eq!(manners.next(now), Some(now + Duration::from_secs(wait)));
            now += Duration::from_secs(wait);
            let (_, one_by_one, left_out, greeting) = next(&manners, now);
            assert_eq!((greeting.said.back(), one_by_one, left_out), (Some(&culprit), true, 0));
            manners.ended(&greeting, true, Open::One(culprit), now);
        }
        now += Duration::from_secs(4800);
        let greeting = next(&manners, now).3;
        manners.ended(&greeting, false, Open::Nothing, now);
        assert_eq!((next(&manners, now).0, next(&manners, now).1, manners.next(now)), (4, false, None));
    }
}
