//! How fast an upstream may be sent to: token buckets for messages and bytes. Pure.
//!
//! A bucket holds what a tenth of a second allows, so that in any second little more goes out than the rate says. The
//! last message may go over what its bucket has; the next waits for longer then.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::{Duration, Instant};

use crate::throttle::Bucket;

/// The most that is sent in a second. `None` is as much as the line carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaxRate {
    pub messages: Option<NonZeroU32>,
    /// Whole PUBLISH packets; not what TCP and TLS add.
    pub bytes: Option<NonZeroU64>,
}

/// Keeps to a [`MaxRate`].
#[derive(Debug)]
pub(super) struct Throttle {
    messages: Option<Limit>,
    bytes: Option<Limit>,
    /// Since when something waits that the line would have taken.
    held_since: Option<Instant>,
}

/// How many bytes a message is taken for before it is encoded.
const GUESS_BYTES: f64 = 1024.0;

impl Throttle {
    pub fn new(rate: MaxRate, now: Instant) -> Self {
        let limit = |per_second| Limit::full(per_second, now);
        Self {
            messages: rate.messages.map(|messages| limit(f64::from(messages.get()))),
            bytes: rate.bytes.map(|bytes| limit(bytes.get() as f64)),
            held_since: None,
        }
    }

    /// How many messages may go now; as good as none are too many where there is no limit.
    pub fn room(&mut self, now: Instant) -> usize {
        let messages = self.messages.as_mut().map_or(usize::MAX, |limit| limit.level(now) as usize);
        let bytes = self.bytes.as_mut().map(|limit| limit.level(now));
        let by_size =
            bytes.map_or(usize::MAX, |level| if level < 1.0 { 0 } else { (level / GUESS_BYTES).ceil() as usize });
        messages.min(by_size)
    }

    /// Takes note of a message that was sent.
    pub fn spend(&mut self, bytes: usize) {
        for (limit, spent) in [(&mut self.messages, 1.0), (&mut self.bytes, bytes as f64)] {
            limit.iter_mut().for_each(|limit| limit.bucket.level -= spent);
        }
    }

    /// Says whether something waits for room, and returns for how long something has waited since the last call.
    pub fn hold(&mut self, waits: bool, now: Instant) -> Duration {
        let before = std::mem::replace(&mut self.held_since, waits.then_some(now));
        before.map_or(Duration::ZERO, |since| now.duration_since(since))
    }

    /// When there is room for what waits.
    pub fn deadline(&self) -> Option<Instant> {
        self.held_since?;
        [&self.messages, &self.bytes].into_iter().flatten().map(Limit::ready_at).max()
    }
}

#[derive(Debug)]
struct Limit {
    per_second: f64,
    bucket: Bucket,
}

impl Limit {
    fn full(per_second: f64, now: Instant) -> Self {
        Self { per_second, bucket: Bucket { level: capacity(per_second), filled: now } }
    }

    fn level(&mut self, now: Instant) -> f64 {
        self.bucket.fill(now, self.per_second, capacity(self.per_second))
    }

    fn ready_at(&self) -> Instant {
        let wait = ((1.0 - self.bucket.level) / self.per_second).max(0.0);
        // A little late rather than a little early, which would be a turn for nothing.
        self.bucket.filled + Duration::from_secs_f64(wait) + Duration::from_micros(100)
    }
}

fn capacity(per_second: f64) -> f64 {
    (per_second / 10.0).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many messages of `size` bytes go out in `seconds`, where whoever sends always has one.
    fn sent(rate: MaxRate, size: usize, seconds: u64) -> u64 {
        let start = Instant::now();
        let mut throttle = Throttle::new(rate, start);
        let (mut now, mut sent) = (start, 0);
        let mut held = Duration::ZERO;
        while now < start + Duration::from_secs(seconds) {
            for _ in 0..throttle.room(now) {
                // The guess is for taking; sending looks each time.
                if throttle.room(now) > 0 {
                    throttle.spend(size);
                    sent += 1;
                }
            }
            held += throttle.hold(true, now);
            now = throttle.deadline().unwrap().max(now + Duration::from_micros(1));
        }
        assert!(held > Duration::from_secs(seconds) * 9 / 10, "all that time something waited: {held:?}");
        sent
    }

    #[test]
    fn a_rate_is_kept_to_within_a_tenth_of_a_second() {
        let rate = |messages, bytes| MaxRate { messages: NonZeroU32::new(messages), bytes: NonZeroU64::new(bytes) };
        let check = |rate, size, seconds, expected: std::ops::RangeInclusive<u64>| {
            let sent = sent(rate, size, seconds);
            assert!(expected.contains(&sent), "{rate:?}: {sent}");
        };
        check(rate(100, 0), 50, 10, 995..=1011);
        check(rate(1, 0), 50, 10, 10..=11);
        check(rate(0, 64 << 10), 1000, 10, 640..=665);
        // A message that is larger than the bucket goes, and is paid for after.
        check(rate(0, 1000), 5000, 20, 4..=5);
        check(rate(100, 1000), 100, 10, 99..=103);
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let now = Instant::now();
        let mut throttle = Throttle::new(MaxRate::default(), now);
        throttle.spend(1 << 30);
        assert_eq!((throttle.room(now), throttle.deadline()), (usize::MAX, None));
    }

    #[test]
    fn nobody_is_woken_for_room_that_nobody_needs() {
        let now = Instant::now();
        let mut throttle = Throttle::new(MaxRate { messages: NonZeroU32::new(10), bytes: None }, now);
        throttle.spend(10);
        assert_eq!(throttle.room(now), 0);
        assert_eq!(throttle.deadline(), None);
        assert_eq!(throttle.hold(true, now), Duration::ZERO);
        let at = throttle.deadline().unwrap();
        assert_eq!(throttle.room(at), 1);
        assert_eq!(throttle.hold(false, at), at - now);
        assert_eq!(throttle.deadline(), None);
    }
}
