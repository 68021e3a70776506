//! One device of a bus: its plan of reads, what it taught, its standing, and which readings are worth publishing.
//!
//! Pure: the bus tells what a device answered or that it did not, and publishes what comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::link::Answer;
use super::schedule::Entry;
use super::{Device, Publish};
use crate::field::Backoff;
use crate::observe::Health;
use crate::proto::modbus::{Learned, Read, Refusal, exception_text, plan};
use crate::reading::{Quality, Reading, ReadingTime, Value};

/// A point that the device does not have is asked for again this often, in case it was configured since.
const REFUSED_POLL_INTERVAL: Duration = Duration::from_secs(60);
/// How many refused points a reason names.
const MAX_NAMED_POINTS: usize = 4;

/// A device while its bus runs.
pub(super) struct Attendance {
    pub device: Device,
    pub reads: Vec<PlannedRead>,
    pub standing: Standing,
    /// Whether it was found not to know the functions that write one coil or register.
    pub writes_multiple_only: bool,
    learned: Learned,
    points: Vec<PointRecord>,
    /// Requests in a row without an answer.
    misses: u32,
    backoff: Backoff,
}

/// A read of the plan and how often it is due.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PlannedRead {
    pub read: Read,
    pub interval: Duration,
}

/// How a device stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Not asked yet.
    Unknown,
    Up,
    /// Readings are stale. With `bad_at`, they turn bad then.
    Down {
        why: Why,
        bad_at: Option<Instant>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It does not answer; it is asked again then, and not before.
    NoAnswer { retry_at: Instant },
    /// Its bus is not connected.
    NoLink,
}

/// What a device's answer to a read led to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Outcome {
    pub readings: Vec<Reading>,
    /// The plan is a new one, and all of it is due.
    pub replanned: bool,
}

#[derive(Clone, Debug, Default)]
struct PointRecord {
    last: Option<(Value, ReadingTime)>,
    /// Quality and value published last, and when.
    published: Option<(Quality, Option<Value>, Instant)>,
    /// Why the device gives no value for the point.
    fault: Option<Arc<str>>,
    /// The device says that it has no such point.
    is_refused: bool,
}

impl Attendance {
    /// `backoff` spaces the requests to the device while it is down.
    pub fn new(device: Device, backoff: Backoff) -> Self {
        let points = vec![PointRecord::default(); device.points.len()];
        let mut attendance = Self {
            device,
            reads: Vec::new(),
            standing: Standing::Unknown,
            writes_multiple_only: false,
            learned: Learned::default(),
            points,
            misses: 0,
            backoff,
        };
        attendance.replan();
        attendance
    }

    /// The schedule's entries: all reads at once, or only one, later, of a device that does not answer.
    pub fn entries(&self, number: usize, now: Instant) -> Vec<Entry> {
        let entry = |read: usize, due, interval| Entry {
            device: number,
            read,
            unit: self.device.unit_id.number(),
            due,
            interval,
        };
        match &self.standing {
            Standing::Down { why: Why::NoAnswer { retry_at }, .. } => {
                let probe = self.reads.first().map(|read| entry(0, *retry_at, read.interval));
                probe.into_iter().collect()
            }
            _ => self.reads.iter().enumerate().map(|(read, planned)| entry(read, now, planned.interval)).collect(),
        }
    }

    /// Takes note that the device answered anything at all. Returns whether it was not up before, in which case the
    /// plan is a new one.
    pub fn heard(&mut self) -> bool {
        self.misses = 0;
        self.backoff.reset();
        if self.standing == Standing::Up {
            return false;
        }
        let was_down = matches!(self.standing, Standing::Down { .. });
        self.standing = Standing::Up;
        if was_down {
            // It may have come back with another configuration.
            self.forget();
        }
        was_down
    }

    /// Takes note of a request without an answer. Returns whether the schedule must follow: the device went down, or
    /// its next probe moved.
    pub fn missed(&mut self, now: Instant) -> bool {
        self.misses = self.misses.saturating_add(1);
        let is_down = matches!(self.standing, Standing::Down { why: Why::NoAnswer { .. }, .. });
        if !is_down && self.misses < self.device.down_after {
            return false;
        }
        let bad_at = match &self.standing {
            Standing::Down { bad_at, .. } => *bad_at,
            _ => Some(now + self.device.bad_after),
        };
        let why = Why::NoAnswer { retry_at: now + self.backoff.next_delay() };
        self.standing = Standing::Down { why, bad_at };
        true
    }

    /// Takes note that the bus lost its connection and did not get it back at once. What was known about a device that
    /// did not answer is worth nothing after that: whatever stood in the way may be gone with the connection.
    pub fn link_lost(&mut self, now: Instant) {
        let bad_at = match &self.standing {
            Standing::Down { bad_at, .. } => *bad_at,
            _ => Some(now + self.device.bad_after),
        };
        self.standing = Standing::Down { why: Why::NoLink, bad_at };
        self.backoff.reset();
    }

    /// Takes note that the bus is connected again. Whether the device answers will be seen.
    pub fn link_restored(&mut self) {
        if matches!(self.standing, Standing::Down { why: Why::NoLink, .. }) {
            self.misses = 0;
        }
    }

    /// The readings of a device that went down: what was known is stale, the rest is bad.
    pub fn stale_readings(&mut self, reason: &str, time: &ReadingTime, now: Instant) -> Vec<Reading> {
        let reason: Arc<str> = reason.into();
        (0..self.points.len()).filter_map(|number| self.stale_reading(number, &reason, time, now)).collect()
    }

    /// Turns stale readings bad once their time has come.
    pub fn bad_readings(&mut self, time: &ReadingTime, now: Instant) -> Vec<Reading> {
        match &mut self.standing {
            Standing::Down { bad_at, .. } if bad_at.is_some_and(|at| at <= now) => *bad_at = None,
            _ => return Vec::new(),
        }
        let quality = Quality::Bad(format!("no answer for more than {} s", self.device.bad_after.as_secs()).into());
        let numbers = (0..self.points.len()).filter(|number| self.device.points[*number].point.access.can_read());
        let numbers: Vec<usize> = numbers.collect();
        numbers.into_iter().filter_map(|number| self.publish(number, None, quality.clone(), time, now)).collect()
    }

    /// When [`Attendance::bad_readings`] has something to do.
    pub fn bad_at(&self) -> Option<Instant> {
        match &self.standing {
            Standing::Down { bad_at, .. } => *bad_at,
            _ => None,
        }
    }

    /// What follows from the answer to `read`.
    pub fn answered(&mut self, read: &Read, answer: &Answer, time: &ReadingTime, now: Instant) -> Outcome {
        match answer {
            Answer::Bits(_) | Answer::Registers(_) => self.values(read, answer, time, now),
            Answer::Exception(code @ (2 | 3)) => match self.learned.refuse(read) {
                Refusal::Split => {
                    self.replan();
                    Outcome { readings: Vec::new(), replanned: true }
                }
                Refusal::Final => {
                    let readings = self.faults(read, *code, time, now);
                    read.parts.iter().for_each(|(number, _)| self.points[*number].is_refused = true);
                    self.respace();
                    Outcome { readings, replanned: false }
                }
            },
            // Still working, or busy: the value known last is the best there is.
            Answer::Exception(5 | 6) => {
                let numbers = read.parts.iter().map(|(number, _)| *number);
                let reason: Arc<str> = "the device is busy".into();
                let readings = numbers.filter_map(|number| self.stale_reading(number, &reason, time, now)).collect();
                Outcome { readings, replanned: false }
            }
            Answer::Exception(code) => Outcome { readings: self.faults(read, *code, time, now), replanned: false },
            Answer::Written => Outcome::default(),
        }
    }

    /// The read that holds a point.
    pub fn read_of(&self, point: usize) -> Option<usize> {
        self.reads.iter().position(|planned| planned.read.parts.iter().any(|(number, _)| *number == point))
    }

    /// How the device is, and why, for people.
    pub fn health(&self) -> (Health, Option<String>) {
        match &self.standing {
            Standing::Unknown => (Health::Starting, None),
            Standing::Down { why: Why::NoAnswer { .. }, .. } => {
                let unit = self.device.unit_id;
                let reason = format!("unit {unit} does not answer; check its power, its wiring and the unit id");
                (Health::Down, Some(reason))
            }
            Standing::Down { why: Why::NoLink, .. } => (Health::Down, Some("the bus is not connected".into())),
            Standing::Up => {
                let faulty: Vec<usize> = (0..self.points.len()).filter(|n| self.points[*n].fault.is_some()).collect();
                let Some(first) = faulty.first().and_then(|number| self.points[*number].fault.clone()) else {
                    return (Health::Good, None);
                };
                let named = faulty.iter().take(MAX_NAMED_POINTS);
                let mut names = named.map(|n| &*self.device.points[*n].point.name).collect::<Vec<_>>().join(", ");
                if faulty.len() > MAX_NAMED_POINTS {
                    names.push_str(" and others");
                }
                let (count, all) = (faulty.len(), self.points.len());
                let reason = format!("{count} of {all} points give no value ({names}): {first}");
                (Health::Degraded, Some(reason))
            }
        }
    }

    fn values(&mut self, read: &Read, answer: &Answer, time: &ReadingTime, now: Instant) -> Outcome {
        let mut outcome = Outcome::default();
        let mut was_refused = false;
        for (number, part) in &read.parts {
            let start = usize::from(part.start - read.span.start);
            let range = start..start + usize::from(part.count);
            let point = &self.device.points[*number].point;
            let decoded = match answer {
                Answer::Bits(bits) => bits.get(start).map(|bit| Ok(point.decode_bit(*bit))),
                Answer::Registers(registers) => registers.get(range).map(|registers| point.decode(registers)),
                _ => None,
            };
            let Some(decoded) = decoded else {
                continue;
            };
            let record = &mut self.points[*number];
            was_refused |= std::mem::take(&mut record.is_refused);
            let (value, quality) = match decoded {
                Ok(value) => {
                    record.fault = None;
                    record.last = Some((value.clone(), time.clone()));
                    (Some(value), Quality::Good)
                }
                Err(no_value) => {
                    let reason: Arc<str> = no_value.to_string().into();
                    // That a device says it has no value now, as a sensor at night, is no fault of it.
                    record.fault = None;
                    record.last = None;
                    (None, Quality::Bad(reason))
                }
            };
            outcome.readings.extend(self.publish(*number, value, quality, time, now));
        }
        if was_refused {
            // What the device refused it now has, so what it taught was about its state and not its map.
            self.forget();
            outcome.replanned = true;
        }
        outcome
    }

    fn faults(&mut self, read: &Read, code: u8, time: &ReadingTime, now: Instant) -> Vec<Reading> {
        let text = exception_text(code);
        let mut readings = Vec::new();
        for (number, part) in &read.parts {
            let reason: Arc<str> = format!("the device answers exception {code} ({text}) for {part}").into();
            let record = &mut self.points[*number];
            record.fault = Some(reason.clone());
            record.last = None;
            readings.extend(self.publish(*number, None, Quality::Bad(reason), time, now));
        }
        readings
    }

    fn stale_reading(&mut self, number: usize, reason: &Arc<str>, time: &ReadingTime, now: Instant) -> Option<Reading> {
        if !self.device.points[number].point.access.can_read() {
            return None;
        }
        match self.points[number].last.clone() {
            // A stale value keeps the time at which it was true.
            Some((value, time)) => self.publish(number, Some(value), Quality::Stale, &time, now),
            None => self.publish(number, None, Quality::Bad(reason.clone()), time, now),
        }
    }

    /// The reading, if the device's way of publishing asks for it.
    fn publish(
        &mut self,
        number: usize,
        value: Option<Value>,
        quality: Quality,
        time: &ReadingTime,
        now: Instant,
    ) -> Option<Reading> {
        let settings = &self.device.points[number];
        let record = &mut self.points[number];
        let is_worth_it = match &record.published {
            None => true,
            Some((last_quality, _, _)) if *last_quality != quality => true,
            Some(_) if quality != Quality::Good => false,
            Some((_, last_value, at)) => match self.device.publish {
                Publish::EveryPoll => true,
                Publish::OnChange { max_silence } => {
                    now.duration_since(*at) >= max_silence || differs(last_value, &value, settings.deadband)
                }
            },
        };
        if !is_worth_it {
            return None;
        }
        record.published = Some((quality.clone(), value.clone(), now));
        Some(Reading {
            device: self.device.name.clone(),
            point: settings.point.name.clone(),
            value,
            unit: settings.point.unit.clone(),
            quality,
            time: time.clone(),
        })
    }

    /// Plans anew without what the device taught.
    fn forget(&mut self) {
        self.learned = Learned::default();
        self.points.iter_mut().for_each(|record| record.is_refused = false);
        self.replan();
    }

    fn replan(&mut self) {
        let mut by_interval: BTreeMap<Duration, Vec<usize>> = BTreeMap::new();
        for (number, settings) in self.device.points.iter().enumerate() {
            if settings.point.access.can_read() {
                by_interval.entry(settings.poll_interval).or_default().push(number);
            }
        }
        let span = |number: usize| (number, self.device.points[number].point.span());
        let reads = by_interval.into_iter().flat_map(|(interval, numbers)| {
            let reads = plan(numbers.into_iter().map(span), self.device.read_limits, &self.learned);
            reads.into_iter().map(move |read| PlannedRead { read, interval })
        });
        self.reads = reads.collect();
        self.respace();
    }

    /// Asks rarely for what the device said it does not have.
    fn respace(&mut self) {
        let refused: BTreeSet<usize> = (0..self.points.len()).filter(|n| self.points[*n].is_refused).collect();
        for planned in &mut self.reads {
            if planned.read.parts.iter().all(|(number, _)| refused.contains(number)) {
                planned.interval = planned.interval.max(REFUSED_POLL_INTERVAL);
            }
        }
    }
}

fn differs(last: &Option<Value>, value: &Option<Value>, deadband: f64) -> bool {
    let number = |value: &Option<Value>| match value {
        Some(Value::Integer(integer)) => Some(*integer as f64),
        Some(Value::Float(float)) => Some(*float),
        _ => None,
    };
    match (number(last), number(value)) {
        (Some(last), Some(value)) if deadband > 0.0 => (last - value).abs() >= deadband,
        _ => last != value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;
    use crate::field::modbus::DevicePoint;
    use crate::proto::modbus::{DataType, Point, Table, UnitId};

    const SECOND: Duration = Duration::from_secs(1);

    fn time(second: i64) -> ReadingTime {
        ReadingTime { at: UnixMillis(second * 1000), clock_set: true }
    }

    /// A device with one u16 point for each of `addresses`, named `p{address}` and polled every second.
    fn device(addresses: &[u16]) -> Device {
        let mut device = Device::new("meter", UnitId::on_tcp(1));
        device.points = addresses
            .iter()
            .map(|address| DevicePoint {
                point: Point::new(&format!("p{address}"), Table::HoldingRegister, *address, DataType::U16),
                poll_interval: SECOND,
                deadband: 0.0,
            })
            .collect();
        device
    }

    fn attendance(device: Device) -> Attendance {
        Attendance::new(device, Backoff::new(5 * SECOND, 30 * SECOND))
    }

    fn told(readings: &[Reading]) -> Vec<String> {
        let told = readings.iter().map(|reading| {
            let value = reading.value.as_ref().map_or("none".into(), ToString::to_string);
            format!("{}={value} {:?} @{}", reading.point, reading.quality, reading.time.at.0 / 1000)
        });
        told.collect()
    }

    fn answer(attendance: &mut Attendance, read: usize, registers: &[u16], second: i64, now: Instant) -> Vec<String> {
        let read = attendance.reads[read].read.clone();
        let outcome = attendance.answered(&read, &Answer::Registers(registers.to_vec()), &time(second), now);
        told(&outcome.readings)
    }

    #[test]
    fn a_device_that_stops_answering_goes_stale_then_bad_and_comes_back() {
        let now = Instant::now();
        let mut meter = attendance(device(&[0, 1]));
        assert_eq!(meter.health(), (Health::Starting, None));
        assert!(!meter.heard());
        assert_eq!(answer(&mut meter, 0, &[7, 8], 1, now), ["p0=7 Good @1", "p1=8 Good @1"]);
        assert_eq!(meter.health(), (Health::Good, None));
        assert!(!meter.missed(now + SECOND));
        assert!(!meter.missed(now + 2 * SECOND));
        assert!(meter.missed(now + 3 * SECOND));
        assert_eq!(meter.health().0, Health::Down);
        assert_eq!(told(&meter.stale_readings("x", &time(4), now)), ["p0=7 Stale @1", "p1=8 Stale @1"]);
        // While it is down it is asked one thing, ever more rarely.
        let probe = |meter: &Attendance| meter.entries(0, now).iter().map(|entry| entry.due - now).collect::<Vec<_>>();
        assert_eq!(probe(&meter), [8 * SECOND]);
        assert!(meter.missed(now + 8 * SECOND));
        assert_eq!(probe(&meter), [18 * SECOND]);
        // It went down at second 3.
        assert_eq!(meter.bad_at(), Some(now + 63 * SECOND));
        assert_eq!(meter.bad_readings(&time(62), now + 62 * SECOND), []);
        let bad = told(&meter.bad_readings(&time(63), now + 63 * SECOND));
        let reason = "no answer for more than 60 s";
        assert_eq!(bad, [format!("p0=none Bad({reason:?}) @63"), format!("p1=none Bad({reason:?}) @63")]);
        assert_eq!(meter.bad_readings(&time(64), now + 64 * SECOND), []);
        assert!(meter.heard());
        assert_eq!(answer(&mut meter, 0, &[7, 8], 70, now), ["p0=7 Good @70", "p1=8 Good @70"]);
        assert_eq!(meter.health(), (Health::Good, None));
    }

    #[test]
    fn a_device_that_never_answered_has_no_value() {
        let now = Instant::now();
        let mut meter = attendance(device(&[0]));
        for _ in 0..3 {
            meter.missed(now);
        }
        assert_eq!(told(&meter.stale_readings("no answer", &time(3), now)), [r#"p0=none Bad("no answer") @3"#]);
    }

    #[test]
    fn a_lost_bus_makes_its_devices_stale_at_once() {
        let now = Instant::now();
        let mut meter = attendance(device(&[0]));
        meter.heard();
        answer(&mut meter, 0, &[7], 1, now);
        meter.link_lost(now);
        assert_eq!(meter.health(), (Health::Down, Some("the bus is not connected".into())));
        assert_eq!(told(&meter.stale_readings("x", &time(2), now)), ["p0=7 Stale @1"]);
        meter.link_restored();
        assert_eq!(meter.entries(0, now).len(), 1);
        assert!(meter.heard());
        assert_eq!(meter.health(), (Health::Good, None));
    }

    #[test]
    fn a_dead_device_is_asked_again_as_soon_as_its_lost_bus_is_back() {
        let now = Instant::now();
        let mut meter = attendance(device(&[0]));
        for _ in 0..9 {
            meter.missed(now);
        }
        assert_eq!(meter.entries(0, now)[0].due, now + 30 * SECOND);
        meter.link_lost(now);
        meter.link_restored();
        assert_eq!(meter.entries(0, now)[0].due, now);
    }

    #[test]
    fn what_a_device_lacks_is_found_and_asked_for_rarely() {
        let now = Instant::now();
        let mut meter = attendance(device(&[0, 1, 2]));
        meter.heard();
        let refuse = |meter: &mut Attendance, number: usize| {
            let read = meter.reads[number].read.clone();
            let outcome = meter.answered(&read, &Answer::Exception(2), &time(1), now);
            (told(&outcome.readings), outcome.replanned)
        };
        assert_eq!(refuse(&mut meter, 0), (vec![], true));
        let spans = |meter: &Attendance| meter.reads.iter().map(|read| read.read.span.to_string()).collect::<Vec<_>>();
        assert_eq!(spans(&meter), ["holding_register 0-1", "holding_register 2"]);
        assert_eq!(refuse(&mut meter, 0), (vec![], true));
        let reason = "the device answers exception 2 (illegal data address) for holding_register 1";
        assert_eq!(refuse(&mut meter, 1), (vec![format!("p1=none Bad({reason:?}) @1")], false));
        assert_eq!(refuse(&mut meter, 1), (vec![], false));
        assert_eq!(meter.health(), (Health::Degraded, Some(format!("1 of 3 points give no value (p1): {reason}"))));
        let intervals: Vec<u64> = meter.reads.iter().map(|read| read.interval.as_secs()).collect();
        assert_eq!(intervals, [1, 60, 1]);
        // Once the device has what it lacked, all it taught is forgotten.
        assert_eq!(answer(&mut meter, 1, &[5], 2, now), ["p1=5 Good @2"]);
        assert_eq!(spans(&meter), ["holding_register 0-2"]);
        assert_eq!(meter.health(), (Health::Good, None));
    }

    #[test]
    fn a_busy_device_leaves_its_values_stale() {
        let now = Instant::now();
        let mut meter = attendance(device(&[0]));
        answer(&mut meter, 0, &[7], 1, now);
        let read = meter.reads[0].read.clone();
        let outcome = meter.answered(&read, &Answer::Exception(6), &time(2), now);
        assert_eq!(told(&outcome.readings), ["p0=7 Stale @1"]);
    }

    #[test]
    fn readings_are_published_as_the_device_says() {
        let now = Instant::now();
        let check = |publish, deadband: f64, polls: &[(u64, u16)], expected: &[u16]| {
            let mut device = device(&[0]);
            device.publish = publish;
            device.points[0].deadband = deadband;
            let mut meter = attendance(device);
            let mut published = Vec::new();
            for (second, register) in polls {
                let told = answer(&mut meter, 0, &[*register], *second as i64, now + *second as u32 * SECOND);
                published.extend(told.first().map(|_| *register));
            }
            assert_eq!(published, expected, "{publish:?} {deadband}");
        };
        let polls = [(0, 10), (1, 10), (2, 11), (3, 12), (4, 12), (63, 12)];
        check(Publish::EveryPoll, 0.0, &polls, &[10, 10, 11, 12, 12, 12]);
        let on_change = Publish::OnChange { max_silence: 60 * SECOND };
        check(on_change, 0.0, &polls, &[10, 11, 12, 12]);
        // The deadband counts from what was published last, so that a slow drift is not lost.
        check(on_change, 2.0, &polls, &[10, 12, 12]);
    }

    #[test]
    fn points_of_different_intervals_are_read_apart_and_write_only_ones_never() {
        let mut device = device(&[0, 1, 2]);
        device.points[1].poll_interval = 10 * SECOND;
        device.points[2].point.access = crate::proto::modbus::Access::Write;
        let meter = attendance(device);
        let reads: Vec<String> =
            meter.reads.iter().map(|read| format!("{} {:?}", read.read.span, read.interval)).collect();
        assert_eq!(reads, ["holding_register 0 1s", "holding_register 1 10s"]);
        assert_eq!(meter.read_of(1), Some(1));
        assert_eq!(meter.read_of(2), None);
    }
}
