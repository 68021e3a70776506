//! When a scheduled upstream is connected: windows that begin at cron times and last as long as the operator says. Pure.
//!
//! Five fields as in crontab(5): minute, hour, day of month, month, day of week. Where both days are restricted, either
//! one is enough. Times are local ones, unless the operator asks for UTC. Where clocks are put forward, a time that is
//! skipped counts an hour later; where they are put back, a time that comes twice counts the first time.

use std::str::FromStr;
use std::time::Duration;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use thiserror::Error;

use crate::clock::UnixMillis;

/// The windows of one upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// When a window begins; at least one.
    pub cron: Vec<Cron>,
    /// How long a window lasts. Windows that overlap are one.
    pub duration: Duration,
    pub zone: Zone,
}

/// Whose time the cron fields mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Zone {
    /// That of this machine, with its daylight saving time.
    #[default]
    Local,
    Utc,
}

/// Whether a window is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    Open { until: UnixMillis },
    Closed { next: UnixMillis },
}

/// As many windows as are looked through for the end of those that overlap.
const MAX_JOINED: usize = 16;

impl Schedule {
    pub(super) fn at(&self, now: UnixMillis) -> Window {
        let zone = match self.zone {
            Zone::Local => TimeZone::system(),
            Zone::Utc => TimeZone::UTC,
        };
        self.at_in(now, &zone)
    }

    fn at_in(&self, now: UnixMillis, zone: &TimeZone) -> Window {
        let duration = i64::try_from(self.duration.as_millis()).unwrap_or(i64::MAX);
        let begins = self.next(UnixMillis(now.0.saturating_sub(duration)), zone);
        if begins > now {
            return Window::Closed { next: begins };
        }
        let mut until = begins.0.saturating_add(duration);
        let mut begins = begins;
        for _ in 0..MAX_JOINED {
            begins = self.next(begins, zone);
            if begins.0 > until {
                break;
            }
            until = begins.0.saturating_add(duration);
        }
        Window::Open { until: UnixMillis(until) }
    }

    /// When the first window after `after` begins.
    fn next(&self, after: UnixMillis, zone: &TimeZone) -> UnixMillis {
        self.cron.iter().map(|cron| cron.next(after, zone)).min().unwrap_or(UnixMillis(i64::MAX))
    }
}

/// Points in time that come again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cron {
    // A bit for each value that counts.
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    /// 0 is Sunday.
    weekdays: u64,
    /// Whether a day must fit both ways, as where one of the two says `*`.
    both: bool,
}

/// What is wrong with a cron expression.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CronError {
    #[error("it has {0} fields in place of five: minute, hour, day of month, month, day of week")]
    Fields(usize),
    #[error("`{text}` is no {field}: it takes {from} to {to}, `*`, lists (`1,2`), ranges (`1-5`) and steps (`*/2`)")]
    Field { field: &'static str, text: String, from: u32, to: u32 },
    #[error("there is no such day in any year")]
    Never,
}

const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// A leap day is at most eight years away.
const MAX_DAYS: i64 = 8 * 366 + 1;

impl Cron {
    /// When it next comes after `after`; the end of time where dates end.
    fn next(&self, after: UnixMillis, zone: &TimeZone) -> UnixMillis {
        let never = UnixMillis(i64::MAX);
        let Ok(from) = Timestamp::from_millisecond(after.0) else { return never };
        // The day before as well: what its clocks skip late in the evening counts on this one.
        let Ok(first) = from.to_zoned(zone.clone()).date().yesterday() else { return never };
        let days = (0..MAX_DAYS).map_while(|days| first.checked_add(days.days()).ok());
        let next = days.filter(|date| self.has(*date)).find_map(|date| self.first_on(date, from, zone));
        next.map_or(never, |next| UnixMillis(next.as_millisecond()))
    }

    fn has(&self, date: Date) -> bool {
        let day = bit(self.days, date.day().unsigned_abs().into());
        let weekday = bit(self.weekdays, date.weekday().to_sunday_zero_offset().unsigned_abs().into());
        bit(self.months, date.month().unsigned_abs().into()) && if self.both { day && weekday } else { day || weekday }
    }

    fn first_on(&self, date: Date, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let hours = (0..24_i8).filter(|hour| bit(self.hours, hour.unsigned_abs().into()));
        let minutes = || (0..60_i8).filter(|minute| bit(self.minutes, minute.unsigned_abs().into()));
        let times = hours.flat_map(|hour| minutes().map(move |minute| (hour, minute)));
        let instants = times.filter_map(|(hour, minute)| zone.to_timestamp(date.at(hour, minute, 0, 0)).ok());
        // Where clocks change, later times of a day are not always later instants.
        instants.filter(|instant| *instant > after).min()
    }
}

impl FromStr for Cron {
    type Err = CronError;

    fn from_str(text: &str) -> Result<Self, CronError> {
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        let [minutes, hours, days, months, weekdays] = fields[..] else {
            return Err(CronError::Fields(fields.len()));
        };
        let weekday_bits = values("day of week", weekdays, 0..=7, WEEKDAYS, 0)?;
        let cron = Self {
            minutes: values("minute", minutes, 0..=59, &[], 0)?,
            hours: values("hour", hours, 0..=23, &[], 0)?,
            days: values("day of month", days, 1..=31, &[], 0)?,
            months: values("month", months, 1..=12, MONTHS, 1)?,
            // Sunday is 7 as well as 0.
            weekdays: weekday_bits | weekday_bits >> 7 & 1,
            both: days.starts_with('*') || weekdays.starts_with('*'),
        };
        let never = cron.next(UnixMillis(0), &TimeZone::UTC) == UnixMillis(i64::MAX);
        if never { Err(CronError::Never) } else { Ok(cron) }
    }
}

fn bit(bits: u64, index: u32) -> bool {
    bits >> index & 1 == 1
}

/// The values of one field, as bits. `names` stand for numbers from `first_name` on.
fn values(
    field: &'static str,
    text: &str,
    range: std::ops::RangeInclusive<u32>,
    names: &[&str],
    first_name: u32,
) -> Result<u64, CronError> {
    let wrong = || CronError::Field { field, text: text.to_owned(), from: *range.start(), to: *range.end() };
    let number = |text: &str| {
        let named = names.iter().zip(first_name..).find(|(name, _)| text.eq_ignore_ascii_case(name));
        let number = named.map(|(_, number)| number).or_else(|| text.parse().ok());
        number.filter(|number| range.contains(number)).ok_or_else(wrong)
    };
    let mut bits = 0;
    for item in text.split(',') {
        let (span, step) = match item.split_once('/') {
            Some((span, step)) => (span, Some(step.parse::<usize>().ok().filter(|step| *step > 0).ok_or_else(wrong)?)),
            None => (item, None),
        };
        let (from, to) = match span.split_once('-') {
            _ if span == "*" => (*range.start(), *range.end()),
            Some((from, to)) => (number(from)?, number(to)?),
            // `5/15` goes on to the end, as in other crons.
            None if step.is_some() => (number(span)?, *range.end()),
            None => (number(span)?, number(span)?),
        };
        if from > to {
            return Err(wrong());
        }
        (from..=to).step_by(step.unwrap_or(1)).for_each(|value| bits |= 1 << value);
    }
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(text: &str) -> UnixMillis {
        UnixMillis(text.parse::<Timestamp>().unwrap().as_millisecond())
    }

    #[test]
    fn cron_times_come_when_they_should() {
        let check = |cron: &str, after: &str, expected: &str| {
            let next = cron.parse::<Cron>().unwrap().next(millis(after), &TimeZone::UTC);
            assert_eq!(next, millis(expected), "{cron}: {next}");
        };
        check("0 2 * * *", "2026-11-21T01:59:59Z", "2026-11-21T02:00:00Z");
        check("0 2 * * *", "2026-11-21T02:00:00Z", "2026-11-22T02:00:00Z");
        check("*/15 * * * *", "2026-11-21T02:15:00Z", "2026-11-21T02:30:00Z");
        check("58/1 3 * * *", "2026-11-21T03:58:00Z", "2026-11-21T03:59:00Z");
        check("5/20 * * * *", "2026-11-21T02:26:00Z", "2026-11-21T02:45:00Z");
        check("30 6,18 * * mon-fri", "2026-11-20T18:30:00Z", "2026-11-23T06:30:00Z");
        check("0 0 29 2 *", "2096-03-01T00:00:00Z", "2104-02-29T00:00:00Z");
        check("0 0 1 JAN *", "2026-11-21T00:00:00Z", "2027-01-01T00:00:00Z");
        // The 13th or a Friday, and with a star the 13th alone.
        check("0 0 13 * 5", "2026-11-21T00:00:00Z", "2026-11-27T00:00:00Z");
        check("0 0 13 * *", "2026-11-21T00:00:00Z", "2026-12-13T00:00:00Z");
        check("0 0 * * 7", "2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z");
        check("0 0 * * 0", "2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z");
    }

    #[test]
    fn a_wrong_cron_expression_says_which_field() {
        let check = |text: &str, expected: &str| {
            let error = text.parse::<Cron>().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("0 2 * *", "it has 4 fields");
        check("60 2 * * *", "`60` is no minute: it takes 0 to 59");
        check("0 5-2 * * *", "`5-2` is no hour");
        check("0 2 0 * *", "`0` is no day of month");
        check("0 2 * foo *", "`foo` is no month");
        check("*/0 2 * * *", "`*/0` is no minute");
        check("0 2 * * 1,", "`1,` is no day of week");
        check("0 0 30 2 *", "there is no such day");
    }

    /// Central Europe puts its clocks forward on 2026-03-29 at 01:00 UTC and back on 2026-10-25 at 01:00 UTC.
    #[test]
    fn local_times_follow_daylight_saving_time() {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let check = |cron: &str, after: &str, expected: &[&str]| {
            let cron: Cron = cron.parse().unwrap();
            let mut after = millis(after);
            for expected in expected {
                after = cron.next(after, &zone);
                assert_eq!(after, millis(expected), "{after}");
            }
        };
        let spring = ["2026-03-28T01:00:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z"];
        check("0 2 * * *", "2026-03-27T12:00:00Z", &spring);
        let skipped = ["2026-03-28T01:30:00Z", "2026-03-29T01:30:00Z", "2026-03-30T00:30:00Z"];
        check("30 2 * * *", "2026-03-27T12:00:00Z", &skipped);
        let autumn = ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"];
        check("30 2 * * *", "2026-10-23T12:00:00Z", &autumn);
        // Half past two, skipped, comes after three.
        let both = ["2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z", "2026-03-29T02:00:00Z"];
        check("*/30 1-4 * * *", "2026-03-29T00:00:00Z", &both);
    }

    #[test]
    fn windows_are_open_for_as_long_as_they_say_and_join_where_they_overlap() {
        let window = |cron: &[&str], minutes: u64, now: &str| {
            let cron = cron.iter().map(|cron| cron.parse().unwrap()).collect();
            let schedule = Schedule { cron, duration: Duration::from_secs(60 * minutes), zone: Zone::Utc };
            schedule.at(millis(now))
        };
        let open = |until: &str| Window::Open { until: millis(until) };
        let closed = |next: &str| Window::Closed { next: millis(next) };
        let nightly = |now| window(&["0 2 * * *"], 30, now);
        assert_eq!(nightly("2026-11-21T01:59:59.999Z"), closed("2026-11-21T02:00:00Z"));
        assert_eq!(nightly("2026-11-21T02:00:00Z"), open("2026-11-21T02:30:00Z"));
        assert_eq!(nightly("2026-11-21T02:29:59.999Z"), open("2026-11-21T02:30:00Z"));
        assert_eq!(nightly("2026-11-21T02:30:00Z"), closed("2026-11-22T02:00:00Z"));
        let joined = window(&["0 2 * * *", "20 2 * * *"], 30, "2026-11-21T02:10:00Z");
        assert_eq!(joined, open("2026-11-21T02:50:00Z"));
        let Window::Open { until } = window(&["* * * * *"], 5, "2026-11-21T02:10:30Z") else { panic!("always open") };
        assert!(until > millis("2026-11-21T02:20:00Z"));
        // Over midnight.
        assert_eq!(window(&["50 23 * * *"], 30, "2026-11-21T00:10:00Z"), open("2026-11-21T00:20:00Z"));
    }
}
