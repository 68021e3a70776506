//! How the queue of each upstream moves: its last minutes, its rate, and what to expect of it.
//!
//! Sampled once a second whether somebody looks or not, so that the page shows at once how an outage went.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

/// Upstreams looked at; far more than one gateway has.
const MAX_UPSTREAMS: usize = 64;
/// Samples kept of each: five minutes.
const HISTORY: usize = 300;
/// Time between two samples.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Samples that the rate is taken over.
const RATE_SAMPLES: usize = 15;
/// Messages per second below which a queue counts as standing still.
const STILL: f64 = 0.05;

/// How full the queue of an upstream is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Depth {
    pub messages: u64,
    pub bytes: u64,
    pub max_messages: u64,
    pub max_bytes: u64,
}

/// What piled up while an upstream was away, and how it goes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Backlog {
    pub messages: u64,
    /// Messages sent a second.
    pub rate: f64,
    /// Until it is gone; `None` while it does not get smaller.
    pub seconds_left: Option<u64>,
}

/// The samples of all upstreams.
#[derive(Default)]
pub struct Uplinks {
    all: Vec<Uplink>,
}

struct Uplink {
    name: String,
    samples: VecDeque<Depth>,
}

/// Where a queue is going.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outlook {
    /// Messages per second; negative while the queue gets shorter.
    pub rate: f64,
    /// Until the queue is at a limit, if it goes on like this.
    pub full_in_seconds: Option<u64>,
    /// Until the queue is empty, if it goes on like this.
    pub empty_in_seconds: Option<u64>,
}

impl Uplinks {
    /// Takes a sample of every upstream; one that is not in `depths` is forgotten.
    pub fn sample(&mut self, depths: impl Iterator<Item = (String, Depth)>) {
        let mut before = std::mem::take(&mut self.all);
        for (name, depth) in depths.take(MAX_UPSTREAMS) {
            let known = before.iter().position(|uplink| uplink.name == name);
            let mut uplink = match known {
                Some(index) => before.swap_remove(index),
                None => Uplink { name, samples: VecDeque::new() },
            };
            if uplink.samples.len() == HISTORY {
                uplink.samples.pop_front();
            }
            uplink.samples.push_back(depth);
            self.all.push(uplink);
        }
    }

    /// Messages in the queue of `name` at every [`SAMPLE_INTERVAL`], oldest first; empty for one not known.
    pub fn history(&self, name: &str) -> Vec<u64> {
        self.find(name).map(|uplink| uplink.samples.iter().map(|depth| depth.messages).collect()).unwrap_or_default()
    }

    pub fn outlook(&self, name: &str) -> Outlook {
        self.find(name).map(|uplink| uplink.outlook()).unwrap_or_default()
    }

    fn find(&self, name: &str) -> Option<&Uplink> {
        self.all.iter().find(|uplink| uplink.name == name)
    }
}

impl Uplink {
    fn outlook(&self) -> Outlook {
        let samples = self.samples.len().min(RATE_SAMPLES);
        let (Some(now), Some(then)) = (self.samples.back(), self.samples.iter().nth_back(samples.saturating_sub(1)))
        else {
            return Outlook::default();
        };
        let seconds = (samples - 1).max(1) as f64 * SAMPLE_INTERVAL.as_secs_f64();
        let per_second = |now: u64, then: u64| (now as f64 - then as f64) / seconds;
        let rate = per_second(now.messages, then.messages);
        // The limit that is reached first counts.
        let until_full =
            |now: u64, max: u64, rate: f64| (rate > 0.0).then(|| (max as f64 - now as f64).max(0.0) / rate);
        let full = [
            until_full(now.messages, now.max_messages, rate),
            until_full(now.bytes, now.max_bytes, per_second(now.bytes, then.bytes)),
        ];
        let full = full.into_iter().flatten().min_by(f64::total_cmp).filter(|_| rate > STILL);
        let empty = (rate < -STILL && now.messages > 0).then(|| now.messages as f64 / -rate);
        Outlook {
            rate,
            full_in_seconds: full.map(|seconds| seconds as u64),
            empty_in_seconds: empty.map(|seconds| seconds.ceil() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(messages: &[u64]) -> Uplinks {
        let mut uplinks = Uplinks::default();
        for messages in messages {
            let depth = Depth { messages: *messages, bytes: messages * 100, max_messages: 1000, max_bytes: 50_000 };
            uplinks.sample(std::iter::once(("cloud".to_owned(), depth)));
        }
        uplinks
    }

    #[test]
    fn the_outlook_follows_the_queue() {
        let check = |messages: &[u64], rate: f64, full: Option<u64>, empty: Option<u64>| {
            let expected = Outlook { rate, full_in_seconds: full, empty_in_seconds: empty };
            assert_eq!(after(messages).outlook("cloud"), expected, "{messages:?}");
        };
        check(&[], 0.0, None, None);
        check(&[5], 0.0, None, None);
        check(&[0, 0, 0], 0.0, None, None);
        // 500 messages of 100 bytes reach the 50,000 bytes before 1000 messages are reached.
        check(&[0, 10, 20], 10.0, Some(48), None);
        check(&[100, 80, 60], -20.0, None, Some(3));
        check(&[100, 50, 0], -50.0, None, None);
        let mut turned = vec![500; 20];
        turned.extend((0..RATE_SAMPLES as u64).map(|second| 500 - second));
        check(&turned, -1.0, None, Some(486));
    }

    #[test]
    fn history_is_bounded_and_a_removed_upstream_is_forgotten() {
        let mut uplinks = after(&(0..400).collect::<Vec<_>>());
        let history = uplinks.history("cloud");
        assert_eq!((history.len(), history[0], history[HISTORY - 1]), (HISTORY, 100, 399));
        uplinks.sample(std::iter::empty());
        assert_eq!(uplinks.history("cloud"), Vec::<u64>::new());
    }
}
