//! When to try again: decorrelated jitter (M. Brooker, "Exponential Backoff And Jitter", AWS 2015). Pure.
//!
//! Each wait is drawn between the base and three times the last one, up to a cap, so that a thousand gateways that lost
//! the same upstream do not come back in step.

use std::time::Duration;

/// How long to wait between attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The shortest wait, and the first one.
    pub base: Duration,
    /// The longest wait.
    pub cap: Duration,
    /// How long a connection must last before the next failure counts as the first again.
    pub stable: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { base: Duration::from_millis(500), cap: Duration::from_secs(60), stable: Duration::from_secs(10) }
    }
}

/// The waits of one upstream.
#[derive(Clone, Debug)]
pub struct Backoff {
    settings: Settings,
    last: Option<Duration>,
}

impl Backoff {
    pub fn new(settings: Settings) -> Self {
        Self { settings, last: None }
    }

    /// Notes that a connection has ended after it had lasted `lasted`.
    pub fn ended_after(&mut self, lasted: Duration) {
        if lasted >= self.settings.stable {
            self.last = None;
        }
    }

    /// Makes the next attempt come soon, as after the operator asked for one.
    pub fn reset(&mut self) {
        self.last = None;
    }

    /// How long to wait now. `random` is uniform over its type.
    pub fn next(&mut self, random: u32) -> Duration {
        let Settings { base, cap, .. } = self.settings;
        let base = base.min(cap);
        // The first wait is spread too, between half the base and the base.
        let (from, to) = match self.last {
            None => (base / 2, base),
            Some(last) => (base, last.saturating_mul(3).min(cap)),
        };
        let span = to.saturating_sub(from);
        let wait = from + span.mul_f64(f64::from(random) / f64::from(u32::MAX));
        self.last = Some(wait.max(base));
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings =
        Settings { base: Duration::from_secs(1), cap: Duration::from_secs(20), stable: Duration::from_secs(10) };

    #[test]
    fn waits_grow_to_the_cap_and_start_over_after_a_stable_connection() {
        let mut backoff = Backoff::new(SETTINGS);
        let mut waits = |random: u32, count: usize| -> Vec<u64> {
            (0..count).map(|_| backoff.next(random).as_millis().try_into().unwrap()).collect()
        };
        assert_eq!(waits(u32::MAX, 5), [1000, 3000, 9000, 20_000, 20_000]);
        assert_eq!(waits(0, 2), [1000, 1000]);
        backoff.ended_after(Duration::from_secs(9));
        assert_eq!(backoff.next(u32::MAX), Duration::from_secs(3));
        backoff.ended_after(Duration::from_secs(10));
        assert_eq!(backoff.next(u32::MAX), Duration::from_secs(1));
        backoff.reset();
        assert_eq!(backoff.next(0), Duration::from_millis(500));
    }

    #[test]
    fn every_wait_is_within_its_limits() {
        let mut backoff = Backoff::new(SETTINGS);
        let mut random = 1_u32;
        for _ in 0..1000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let wait = backoff.next(random);
            assert!(wait >= SETTINGS.base / 2 && wait <= SETTINGS.cap, "{wait:?}");
        }
        let mut swapped = Backoff::new(Settings { cap: Duration::from_millis(100), ..SETTINGS });
        assert!((0..9).all(|_| swapped.next(u32::MAX) <= Duration::from_millis(100)));
    }
}
