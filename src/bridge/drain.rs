//! How a backlog goes: how much there is, how fast it is sent, when it will be gone. Pure.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

/// From this many waiting messages on we speak of a backlog.
const BACKLOG_MESSAGES: u64 = 1000;
/// How often the measures are taken while there is one.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// What is older than this counts little in an average.
const MEMORY: Duration = Duration::from_secs(10);
/// How often the log hears of a backlog that lasts.
const TELL_INTERVAL: Duration = Duration::from_secs(60);

/// A backlog on its way out, for people.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Progress {
    /// Messages that still wait; what is published meanwhile counts too, unless a share of the uplink is set aside for it.
    pub messages: u64,
    /// Messages sent a second.
    pub rate: f64,
    /// Until the backlog is gone, if it goes on like this; `None` while it does not get smaller.
    pub seconds_left: Option<u64>,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { messages, rate, seconds_left } = self;
        write!(f, "{messages} messages, {rate:.0} a second, ")?;
        match seconds_left {
            Some(seconds) => write!(f, "gone in {:?}", Duration::from_secs(*seconds)),
            None => write!(f, "not getting smaller"),
        }
    }
}

/// What the log should say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Note {
    Begins { messages: u64 },
    Lasts(Progress),
    Gone { sent: u64, took: Duration },
}

/// Watches one connection.
#[derive(Debug)]
pub(super) struct Drain {
    watched: Option<Watched>,
    next: Instant,
}

#[derive(Debug)]
struct Watched {
    began: Instant,
    sent_before: u64,
    last: (Instant, u64, u64),
    /// Averages of what is sent a second, and of what the backlog gets smaller by.
    averages: Option<(f64, f64)>,
    messages: u64,
    tell_at: Instant,
}

impl Drain {
    pub fn new(now: Instant) -> Self {
        Self { watched: None, next: now }
    }

    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// When to look again although nothing else happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.watched.as_ref().map(|_| self.next)
    }

    pub fn progress(&self) -> Option<Progress> {
        let watched = self.watched.as_ref()?;
        let (rate, shrinks) = watched.averages.unwrap_or_default();
        let left = watched.messages as f64 / shrinks;
        // A year is as good as never.
        let seconds_left = (shrinks > 0.0 && left < 366.0 * 86_400.0).then(|| left.ceil() as u64);
        Some(Progress { messages: watched.messages, rate, seconds_left })
    }

    /// Takes the measures: `waiting` messages now, and how many were `sent` so far.
    pub fn look(&mut self, now: Instant, waiting: u64, sent: u64) -> Option<Note> {
        self.next = now + SAMPLE_INTERVAL;
        let Some(watched) = &mut self.watched else {
            if waiting < BACKLOG_MESSAGES {
                return None;
            }
            self.watched = Some(Watched {
                began: now,
                sent_before: sent,
                last: (now, waiting, sent),
                averages: None,
                messages: waiting,
                tell_at: now + TELL_INTERVAL,
            });
            return Some(Note::Begins { messages: waiting });
        };
        watched.take(now, waiting, sent);
        let rate = watched.averages.map_or(0.0, |(rate, _)| rate);
        // What waits for less than half a second is traffic.
        if waiting as f64 <= rate / 2.0 || waiting == 0 {
            let gone = Note::Gone { sent: sent - watched.sent_before, took: now - watched.began };
            self.watched = None;
            return Some(gone);
        }
        if now < watched.tell_at {
            return None;
        }
        watched.tell_at = now + TELL_INTERVAL;
        self.progress().map(Note::Lasts)
    }
}

impl Watched {
    fn take(&mut self, now: Instant, waiting: u64, sent: u64) {
        let (at, waited, sent_then) = std::mem::replace(&mut self.last, (now, waiting, sent));
        self.messages = waiting;
        let seconds = (now - at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let rate = sent.saturating_sub(sent_then) as f64 / seconds;
        let shrinks = (waited as f64 - waiting as f64) / seconds;
        let (old_rate, old_shrinks) = self.averages.unwrap_or((rate, shrinks));
        let weight = 1.0 - (-seconds / MEMORY.as_secs_f64()).exp();
        self.averages = Some((old_rate + weight * (rate - old_rate), old_shrinks + weight * (shrinks - old_shrinks)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_is_told_of_when_it_begins_each_minute_and_when_it_is_gone() {
        let start = Instant::now();
        let mut drain = Drain::new(start);
        assert_eq!(drain.look(start, BACKLOG_MESSAGES - 1, 7), None);
        assert_eq!((drain.progress(), drain.deadline()), (None, None));
        // 100,000 messages at 1000 a second, while 200 a second come in.
        let (mut now, mut waiting, mut sent) = (start, 100_000, 7);
        assert_eq!(drain.look(now, waiting, sent), Some(Note::Begins { messages: 100_000 }));
        let mut notes = Vec::new();
        while drain.deadline().is_some() {
            now = drain.deadline().unwrap();
            (waiting, sent) = (waiting - 400, sent + 500);
            notes.extend(drain.look(now, waiting, sent));
            if let Some(progress) = drain.progress() {
                assert!((progress.rate - 1000.0).abs() < 1.0, "{progress:?}");
                assert_eq!(progress.seconds_left, Some(waiting.div_ceil(800)));
            }
        }
        let lasts = |messages, left| Note::Lasts(Progress { messages, rate: 1000.0, seconds_left: Some(left) });
        // In the end half a second's worth is left.
        assert_eq!(
            notes,
            [lasts(52_000, 65), lasts(4000, 5), Note::Gone { sent: 124_500, took: Duration::from_millis(124_500) }]
        );
    }

    #[test]
    fn what_does_not_get_smaller_has_no_end() {
        let start = Instant::now();
        let mut drain = Drain::new(start);
        drain.look(start, 5000, 0);
        for second in 1..20 {
            drain.look(start + Duration::from_secs(second), 5000 + second, second * 10);
        }
        let progress = drain.progress().unwrap();
        assert_eq!((progress.messages, progress.rate.round(), progress.seconds_left), (5019, 10.0, None));
    }
}
