//! Wall-clock time that does not jump, and whether it can be trusted.
//!
//! A small computer without a battery-backed clock boots in the past and is set by NTP minutes later. [`Clock`]
//! anchors wall time to the monotonic clock when it is made, so that expiry and ordering never see a jump; a reading
//! carries the clock's [`Clock::is_set`] and [`Clock::boot_id`] so that a consumer can tell what its time is worth.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// The time that passed from `earlier` to `self`; zero when the clock was set back in between.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// The time `interval` later; the end of time where it is later still.
    pub fn plus(self, interval: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(interval.as_millis()).unwrap_or(i64::MAX)))
    }
}

/// RFC 3339 in UTC with milliseconds, as in `2026-11-21T09:30:00.125Z`.
impl fmt::Display for UnixMillis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, millis) = (self.0.div_euclid(86_400_000), self.0.rem_euclid(86_400_000));
        let (year, month, day) = civil_from_days(days);
        let (seconds, millis) = (millis / 1000, millis % 1000);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
    }
}

/// The gateway's clock: cheap to clone, every clone tells the same time.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    started: Instant,
    started_unix: AtomicI64,
    boot_id: Box<str>,
}

impl Clock {
    /// Anchors wall time to the monotonic clock, now. `boot_id` names this start of the gateway; it is 1 to 36
    /// characters and differs from that of every other start.
    pub fn start(boot_id: &str) -> Self {
        Self(Arc::new(Inner {
            started: Instant::now(),
            started_unix: AtomicI64::new(system_unix_millis()),
            boot_id: boot_id.into(),
        }))
    }

    /// The anchored wall time.
    pub fn now(&self) -> UnixMillis {
        let elapsed = i64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(i64::MAX);
        UnixMillis(self.0.started_unix.load(Ordering::Relaxed).saturating_add(elapsed))
    }

    /// Takes over the system's wall time when it has moved away by more than `tolerance`, as when NTP sets the clock
    /// after boot. Returns the step in milliseconds, for the log.
    pub fn adjust(&self, tolerance: Duration) -> Option<i64> {
        let step = system_unix_millis() - self.now().0;
        if step.unsigned_abs() <= u64::try_from(tolerance.as_millis()).unwrap_or(u64::MAX) {
            return None;
        }
        self.0.started_unix.fetch_add(step, Ordering::Relaxed);
        Some(step)
    }

    /// How long the gateway has been running.
    pub fn uptime(&self) -> Duration {
        self.0.started.elapsed()
    }

    pub fn boot_id(&self) -> &str {
        &self.0.boot_id
    }

    /// Whether wall time looks set: not before this release was written.
    pub fn is_set(&self) -> bool {
        self.now() >= RELEASED
    }
}

/// 2026-11-01T00:00:00Z; a clock that shows less has not been set since power-up.
pub const RELEASED: UnixMillis = UnixMillis(1_793_491_200_000);

fn system_unix_millis() -> i64 {
    match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX),
    }
}

/// Days since 1970-01-01 to the Gregorian date (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339() {
        let check = |millis: i64, expected: &str| assert_eq!(UnixMillis(millis).to_string(), expected);
        check(0, "1970-01-01T00:00:00.000Z");
        check(951_782_400_000, "2000-02-29T00:00:00.000Z");
        check(1_793_491_200_000, "2026-11-01T00:00:00.000Z");
        check(1_709_251_199_999, "2024-02-29T23:59:59.999Z");
        check(-1, "1969-12-31T23:59:59.999Z");
    }

    #[test]
    fn time_since_a_later_time_is_zero() {
        assert_eq!(UnixMillis(5).since(UnixMillis(9)), Duration::ZERO);
        assert_eq!(UnixMillis(9).since(UnixMillis(5)), Duration::from_millis(4));
    }
}
