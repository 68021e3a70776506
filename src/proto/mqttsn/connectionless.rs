//! How often somebody may publish without a connection, and a stranger is answered (MQTT-SN 1.2 §5.4.21, §6.8).

use std::time::{Duration, Instant};

/// Lets `rate` things pass per second, and as many at once after a quiet second.
#[derive(Debug)]
pub struct RateLimit {
    rate: u32,
    /// How much of the second's allowance is used up; it drains with time.
    used: Duration,
    seen_at: Option<Instant>,
}

impl RateLimit {
    pub fn per_second(rate: u32) -> Self {
        Self { rate, used: Duration::ZERO, seen_at: None }
    }

    /// Whether one more may pass at `now`.
    pub fn allow(&mut self, now: Instant) -> bool {
        let Some(share) = Duration::from_secs(1).checked_div(self.rate) else { return false };
        let passed = self.seen_at.map_or(Duration::MAX, |seen_at| now.saturating_duration_since(seen_at));
        self.seen_at = Some(now);
        self.used = self.used.saturating_sub(passed);
        let allowed = self.used + share <= Duration::from_secs(1);
        if allowed {
            self.used += share;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_limit_lets_its_number_pass_in_every_second() {
        let start = Instant::now();
        let mut limit = RateLimit::per_second(4);
        let mut passed_at = |millis: u64, tries: usize| {
            (0..tries).filter(|_| limit.allow(start + Duration::from_millis(millis))).count()
        };
        assert_eq!(passed_at(0, 9), 4);
        assert_eq!(passed_at(250, 9), 1);
        assert_eq!(passed_at(5000, 9), 4);
        assert!(!RateLimit::per_second(0).allow(start));
    }
}
