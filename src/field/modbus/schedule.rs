//! When each read of a bus is due: earliest deadline first, without drift.
//!
//! A read is released every interval and should be done before its next release. Among the released, the one whose
//! deadline is nearest goes first, so that a slow poll never delays a fast one by more than one request. Releases that
//! could not be served in time are skipped and counted, not caught up. Pure: the caller has the clock.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// One read of one device, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub device: usize,
    pub read: usize,
    pub unit: u8,
    pub due: Instant,
    pub interval: Duration,
}

impl Entry {
    fn deadline(&self) -> Instant {
        self.due + self.interval
    }
}

/// All reads of a bus. Looking through some hundred entries costs microseconds, a request milliseconds.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    entries: Vec<Entry>,
    /// Units that must not be asked before a given time.
    holds: HashMap<u8, Instant>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Run(Entry),
    Wait(Instant),
    /// Nothing is scheduled.
    Idle,
}

impl Schedule {
    pub fn next(&mut self, now: Instant) -> Next {
        self.holds.retain(|_, until| *until > now);
        let released = |entry: &&Entry| entry.due <= now && !self.holds.contains_key(&entry.unit);
        if let Some(entry) = self.entries.iter().filter(released).min_by_key(|entry| entry.deadline()) {
            return Next::Run(*entry);
        }
        let releases = self.entries.iter().map(|entry| match self.holds.get(&entry.unit) {
            Some(until) => entry.due.max(*until),
            None => entry.due,
        });
        releases.min().map_or(Next::Idle, Next::Wait)
    }

    /// Replaces the reads of `device`.
    pub fn set_device(&mut self, device: usize, entries: impl IntoIterator<Item = Entry>) {
        self.entries.retain(|entry| entry.device != device);
        self.entries.extend(entries);
    }

    /// Sets the next release of a read that was served, from now on every `interval`, and tells how many releases were
    /// skipped.
    pub fn done(&mut self, device: usize, read: usize, interval: Duration, now: Instant) -> u32 {
        let Some(entry) = self.find(device, read) else {
            return 0;
        };
        entry.interval = interval;
        entry.due += entry.interval;
        if entry.due > now || entry.interval.is_zero() {
            return 0;
        }
        let behind = now.duration_since(entry.due).as_nanos() / entry.interval.as_nanos();
        let skipped = u32::try_from(behind + 1).unwrap_or(u32::MAX);
        entry.due += entry.interval.saturating_mul(skipped);
        skipped
    }

    /// Releases a read now.
    pub fn hasten(&mut self, device: usize, read: usize, now: Instant) {
        if let Some(entry) = self.find(device, read) {
            entry.due = entry.due.min(now);
        }
    }

    /// Leaves a unit alone until `until`.
    pub fn hold(&mut self, unit: u8, until: Instant) {
        self.holds.insert(unit, until);
    }

    fn find(&mut self, device: usize, read: usize) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.device == device && entry.read == read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(device: usize, due: Instant, interval_millis: u64) -> Entry {
        Entry { device, read: 0, unit: device as u8, due, interval: Duration::from_millis(interval_millis) }
    }

    fn schedule(entries: &[Entry]) -> Schedule {
        Schedule { entries: entries.to_vec(), holds: HashMap::new() }
    }

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn the_nearest_deadline_goes_first() {
        let start = Instant::now();
        let (slow, fast) = (entry(0, start, 10_000), entry(1, start + 500 * MS, 1000));
        let mut schedule = schedule(&[slow, fast]);
        assert_eq!(schedule.next(start), Next::Run(slow));
        assert_eq!(schedule.next(start + 500 * MS), Next::Run(fast));
        schedule.done(1, 0, fast.interval, start + 500 * MS);
        assert_eq!(schedule.next(start + 500 * MS), Next::Run(slow));
        schedule.done(0, 0, slow.interval, start + 600 * MS);
        assert_eq!(schedule.next(start + 600 * MS), Next::Wait(start + 1500 * MS));
        assert_eq!(Schedule::default().next(start), Next::Idle);
    }

    #[tokio::test]
    async fn polls_do_not_drift_and_missed_ones_are_skipped() {
        let start = Instant::now();
        let check = |done_after: u64, expected_skipped: u32, expected_due: u64| {
            let mut schedule = schedule(&[entry(0, start, 100)]);
            let now = start + Duration::from_millis(done_after);
            assert_eq!(schedule.done(0, 0, 100 * MS, now), expected_skipped, "{done_after}");
            assert_eq!(schedule.next(now), Next::Wait(start + Duration::from_millis(expected_due)), "{done_after}");
        };
        check(30, 0, 100);
        check(99, 0, 100);
        check(100, 1, 200);
        check(350, 3, 400);
    }

    #[tokio::test]
    async fn a_held_unit_waits_and_its_neighbours_do_not() {
        let start = Instant::now();
        let (held, other) = (entry(0, start, 100), entry(1, start + 10 * MS, 100));
        let mut schedule = schedule(&[held, other]);
        schedule.hold(0, start + 50 * MS);
        assert_eq!(schedule.next(start), Next::Wait(start + 10 * MS));
        assert_eq!(schedule.next(start + 10 * MS), Next::Run(other));
        schedule.done(1, 0, 100 * MS, start + 11 * MS);
        assert_eq!(schedule.next(start + 11 * MS), Next::Wait(start + 50 * MS));
        assert_eq!(schedule.next(start + 50 * MS), Next::Run(held));
    }

    #[tokio::test]
    async fn a_hastened_read_is_due_at_once() {
        let start = Instant::now();
        let mut schedule = schedule(&[entry(0, start + 70 * MS, 100)]);
        schedule.hasten(0, 0, start);
        assert!(matches!(schedule.next(start), Next::Run(_)));
        schedule.hasten(0, 9, start);
        schedule.set_device(0, []);
        assert_eq!(schedule.next(start), Next::Idle);
    }
}
