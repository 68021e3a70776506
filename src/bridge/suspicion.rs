//! Which message it may be that an upstream closes the connection on, again and again. Pure.
//!
//! 3.1.1 has no word for what is too large or not allowed: many brokers close the connection instead, and get the same
//! message first on the next one. Nothing is given up on a suspicion; the line may as well be bad. But after connections
//! that ended before anything was acknowledged, messages go one by one, so that those in front of the culprit get through,
//! and the culprit is named.

/// How many messages are sent on a new connection before the first acknowledgement.
const FIRST_WINDOW: usize = 32;
/// After how many fruitless connections messages go one by one.
const ONE_BY_ONE: u32 = 3;
/// After how many the first message is named.
const NAMED: u32 = 4;

/// A message that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspect {
    pub topic: String,
    /// Of topic, payload and properties.
    pub bytes: usize,
    pub packet_id: u16,
}

/// What the connections that ended have shown.
#[derive(Debug, Default)]
pub struct Suspicion {
    /// How many in a row ended with `first` sent before anything else and nothing acknowledged.
    fruitless: u32,
    first: Option<Suspect>,
}

impl Suspicion {
    /// A connection was lost. `first` is what was sent first on it; `None` where something was acknowledged, or nothing sent.
    pub fn lost(&mut self, first: Option<Suspect>) {
        let again = first.is_some() && first == self.first;
        self.fruitless = if again { self.fruitless.saturating_add(1) } else { u32::from(first.is_some()) };
        self.first = first;
    }

    /// How many messages are to be sent on the next connection before the first acknowledgement.
    pub fn first_window(&self) -> usize {
        if self.fruitless < ONE_BY_ONE { FIRST_WINDOW } else { 1 }
    }

    /// What a person is to be told beside why the last connection ended.
    pub fn advice(&self) -> Option<String> {
        let Suspect { topic, bytes, .. } = self.first.as_ref().filter(|_| self.fruitless >= NAMED)?;
        let count = self.fruitless;
        Some(format!(
            "the last {count} connections ended while the message on `{topic}` ({bytes} bytes) waited for its \
             acknowledgement; if the upstream does not take it, allow it there, or set `bridge_max_packet_size` to what the \
             upstream takes: larger messages are dropped then"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_ending_connections_is_sent_alone_and_named_and_anything_acknowledged_clears_it() {
        let mut suspicion = Suspicion::default();
        let suspect = |packet_id| Some(Suspect { topic: "a/b".into(), bytes: 412, packet_id });
        let mut check = |first, window, named: bool| {
            suspicion.lost(first);
            assert_eq!((suspicion.first_window(), suspicion.advice().is_some()), (window, named));
            suspicion.advice()
        };
        check(suspect(1), FIRST_WINDOW, false);
        check(suspect(1), FIRST_WINDOW, false);
        check(suspect(1), 1, false);
        let said = check(suspect(1), 1, true).unwrap();
        assert!(said.contains("the last 4 connections ended while the message on `a/b` (412 bytes) waited"), "{said}");
        check(suspect(2), FIRST_WINDOW, false);
        check(suspect(2), FIRST_WINDOW, false);
        check(suspect(2), 1, false);
        check(None, FIRST_WINDOW, false);
    }
}
