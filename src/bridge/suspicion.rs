//! Which message an upstream closes the connection on, again and again, and what becomes of it. Pure.
//!
//! 3.1.1 has no word for what is too large or not allowed: many brokers close the connection instead, and get the same
//! message first on the next one. The line may as well be bad, or the upstream take nothing at all, so a message is given
//! up only after this:
//! 1. It had no answer when the upstream closed the connection [`CLOSES`] times in a row. Connections that end in any
//!    other way say nothing about it.
//! 2. It is tried [`ALONE`] times as a [`Trial`]: the line stands still, four times as long as the message took to end a
//!    connection, then it is sent alone, and the upstream closes again. What breaks by itself does not wait for that.
//! 3. It is tried with another message before it, which the upstream acknowledges on the same connection,
//!    [`BEHIND_ANOTHER`] times. That one is on another topic: the order of no topic changes. Where none waits, it takes
//!    [`WITHOUT_ANOTHER`] trials, and twice as many each time that one is given up and nothing was taken since, so that an
//!    upstream that takes nothing does not empty the queue.
//! 4. It is not taken as less than what was wished either: not retained, at QoS 1.

use std::time::Duration;

use super::trial::{Finding, Offer, Suspect, Trial};
use crate::message::QoS;
use crate::topic::TopicFilter;

/// How many messages are sent on a new connection before the first acknowledgement.
const FIRST_WINDOW: usize = 32;
/// After how many fruitless connections messages go one by one.
const ONE_BY_ONE: u32 = 3;
/// After how many closed connections a message is tried.
const CLOSES: u32 = 3;
/// After how many it is named.
const NAMED: u32 = 4;
/// How many trials show that it is the message.
const ALONE: u32 = 3;
/// How many more show that the upstream takes others.
const BEHIND_ANOTHER: u32 = 2;
/// How many must do where there is no other.
const WITHOUT_ANOTHER: u32 = 8;
/// How often that is doubled.
const MAX_DOUBLINGS: u32 = 8;
/// How many topics of other messages are remembered that were not taken either.
const MAX_AVOIDED: usize = 64;
/// How long the line stands still before a message is tried, at least.
const MIN_QUIET: Duration = Duration::from_millis(250);
/// How much longer than the message takes to end a connection.
const QUIETER: u32 = 4;

/// That an upstream takes messages of a rule as less than what was wished only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lesson {
    pub filter: TopicFilter,
    pub offer: Offer,
}

impl std::fmt::Display for Lesson {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { filter, offer } = self;
        let (what, key) = match (offer.retain, offer.qos == QoS::ExactlyOnce) {
            (false, true) => ("retained messages", "`retain: never`"),
            (true, _) => ("messages of QoS 2", "`qos: 1`"),
            (false, false) => ("retained messages and QoS 2", "`retain: never` and `qos: 1`"),
        };
        write!(
            f,
            "the upstream closes the connection on {what} of the `out` rule for `{filter}`: they are sent as less; {key} in \
             the rule says so from the start"
        )
    }
}

/// What the next connection is to do.
#[derive(Debug)]
pub struct Plan {
    /// How many messages are to be sent before the first acknowledgement.
    pub first_window: usize,
    pub trial: Option<Trial>,
    /// What is to be given up as soon as the session has it.
    pub condemned: Option<Suspect>,
    pub lessons: Vec<Lesson>,
}

/// What a connection has shown.
#[derive(Debug, Default)]
pub struct Course {
    /// The upstream has ended it, and may have meant something that it was sent.
    pub is_closed: bool,
    /// Something was acknowledged.
    pub is_fruitful: bool,
    /// What has no answer: the first of each lane.
    pub open: Vec<Suspect>,
    pub finding: Option<Finding>,
    /// What was to be given up and was not met.
    pub condemned: Option<Suspect>,
    pub lessons: Vec<Lesson>,
}

/// What the connections that ended have shown.
#[derive(Debug, Default)]
pub struct Suspicion {
    /// How many in a row ended with nothing acknowledged of what was sent.
    in_vain: u32,
    /// How many in a row the upstream closed with all of `open` unanswered.
    closes: u32,
    open: Vec<Suspect>,
    /// How many closes it takes until something is tried.
    tried_from: u32,
    case: Option<Case>,
    /// Topics of other messages that were not taken either.
    avoided: Vec<String>,
    condemned: Option<Suspect>,
    lessons: Vec<Lesson>,
    /// How many were given up since the upstream has last taken anything.
    given_up_in_vain: u32,
}

/// The trials of one message.
#[derive(Debug)]
struct Case {
    suspect: Suspect,
    offer: Offer,
    quiet: Duration,
    alone: u32,
    behind_another: u32,
    without_another: u32,
}

impl Suspicion {
    pub fn new() -> Self {
        Self { tried_from: CLOSES, ..Self::default() }
    }

    /// How to begin the next connection, whose [`Course`] is to be told.
    pub fn plan(&mut self) -> Plan {
        let trial = self.case.as_ref().map(|case| {
            let Case { suspect, offer, quiet, alone, .. } = case;
            // Whose topic is not known lets nothing pass.
            let passing = (*alone >= ALONE && suspect.message.is_some()).then(|| self.avoided.clone());
            Trial::new(suspect.clone(), *offer, *quiet, passing)
        });
        let first_window = if self.in_vain < ONE_BY_ONE { FIRST_WINDOW } else { 1 };
        Plan { first_window, trial, condemned: self.condemned.take(), lessons: std::mem::take(&mut self.lessons) }
    }

    /// A connection has ended.
    pub fn ended(&mut self, course: Course) {
        let Course { is_closed, is_fruitful, open, finding, condemned, lessons } = course;
        (self.condemned, self.lessons) = (condemned, lessons);
        self.in_vain = if is_fruitful || open.is_empty() { 0 } else { self.in_vain.saturating_add(1) };
        if is_fruitful {
            self.given_up_in_vain = 0;
        }
        let mut is_late = false;
        match (self.case.take(), finding.filter(|_| is_closed)) {
            (Some(case), Some(Finding::Closed { after, behind_another, offered })) => {
                self.closes = self.closes.saturating_add(1);
                self.case = self.judge(case, after, behind_another, offered);
                return;
            }
            (Some(case), Some(Finding::OtherClosed(topic))) => {
                if self.avoided.len() < MAX_AVOIDED && !self.avoided.contains(&topic) {
                    self.avoided.push(topic);
                }
                self.case = Some(case);
                return;
            }
            (_, finding) => is_late |= finding == Some(Finding::Late),
        }
        if !is_closed {
            (self.closes, self.open, self.tried_from) = (0, Vec::new(), CLOSES);
            return;
        }
        let again: Vec<_> = self.open.iter().filter(|suspect| open.contains(suspect)).cloned().collect();
        if again.is_empty() {
            (self.closes, self.open, self.tried_from) = (u32::from(!open.is_empty()), open, CLOSES);
        } else {
            (self.closes, self.open) = (self.closes.saturating_add(1), again);
        }
        if is_late {
            self.tried_from = self.closes.saturating_add(CLOSES);
        }
        if self.closes >= self.tried_from {
            self.case = self.open.first().cloned().map(Case::new);
        }
    }

    /// The upstream has closed the connection, `after` the message was sent as `offered`.
    fn judge(&mut self, mut case: Case, after: Duration, behind_another: bool, offered: Offer) -> Option<Case> {
        let quiet = after * QUIETER;
        if quiet > case.quiet {
            // The line might have broken just as well.
            case.quiet = quiet;
            return Some(case);
        }
        if case.alone < ALONE {
            case.alone += 1;
            return Some(case);
        }
        *(if behind_another { &mut case.behind_another } else { &mut case.without_another }) += 1;
        let is_first = case.offer == Offer::AS_WISHED;
        let patience = WITHOUT_ANOTHER << self.given_up_in_vain.min(MAX_DOUBLINGS);
        let (behind, without) = if is_first { (BEHIND_ANOTHER, patience) } else { (1, 1) };
        if case.behind_another < behind && case.without_another < without {
            return Some(case);
        }
        if let Some(offer) = offered.less() {
            return Some(Case { offer, behind_another: 0, without_another: 0, ..case });
        }
        self.given_up_in_vain += u32::from(!behind_another);
        self.condemned = Some(case.suspect);
        (self.closes, self.open) = (0, Vec::new());
        None
    }

    /// What a person is to be told beside why the last connection ended.
    pub fn advice(&self) -> Option<String> {
        if let Some(suspect) = &self.condemned {
            return Some(format!("{suspect} is why, as trials have shown: it is given up"));
        }
        let suspect = self.open.first().filter(|_| self.closes >= NAMED)?;
        let count = self.closes;
        let course = match &self.case {
            Some(case) if case.without_another > 0 => {
                "nothing else could be sent before it to show that the upstream takes anything, so it is kept for now; allow \
                 it there, or"
            }
            Some(_) => {
                "it is tried by itself, and given up if the upstream takes others and not this one; if it is to arrive, allow \
                 it there, or"
            }
            None => "if the upstream does not take it, allow it there, or",
        };
        Some(format!(
            "the last {count} connections ended while {suspect} waited for its answer; {course} set \
             `bridge_max_packet_size` to what the upstream takes: larger messages are dropped then"
        ))
    }
}

impl Case {
    fn new(suspect: Suspect) -> Self {
        let (offer, quiet) = (Offer::AS_WISHED, MIN_QUIET);
        Self { suspect, offer, quiet, alone: 0, behind_another: 0, without_another: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bridge::trial::About;
    use crate::hub::PacketId;

    const SECOND: Duration = Duration::from_secs(1);

    fn suspect(packet_id: u16) -> Suspect {
        let message = Some(About { topic: "a/b".into(), bytes: 412 });
        Suspect { packet_id: PacketId::new(packet_id).unwrap(), message }
    }

    fn closed(open: &[u16]) -> Course {
        Course { is_closed: true, open: open.iter().map(|id| suspect(*id)).collect(), ..Course::default() }
    }

    fn tried(after: Duration, behind_another: bool, offered: Offer) -> Course {
        Course { finding: Some(Finding::Closed { after, behind_another, offered }), ..closed(&[1]) }
    }

    /// What is up next: `n` messages at once, `t`rial, trial behind `o`ther messages, `c`ondemned.
    fn next(suspicion: &mut Suspicion) -> String {
        let Plan { first_window, trial, condemned, .. } = suspicion.plan();
        let trial = trial.map(|trial| if trial.is_due() { "t" } else { "o" });
        let next = format!("{first_window}{}{}", trial.unwrap_or(""), if condemned.is_some() { "c" } else { "" });
        suspicion.condemned = condemned;
        next
    }

    #[test]
    fn what_ends_connections_is_sent_alone_named_tried_and_given_up_only_if_others_are_taken() {
        let mut suspicion = Suspicion::new();
        let mut check = |course: Course, expected: &str, named: bool| {
            suspicion.ended(course);
            assert_eq!((next(&mut suspicion).as_str(), suspicion.advice().is_some()), (expected, named));
            suspicion.advice().unwrap_or_default()
        };
        let least = |behind| tried(Duration::ZERO, behind, Offer::LEAST);
        // Another message each time, or a line that breaks: no suspicion.
        check(closed(&[1]), "32", false);
        check(closed(&[2]), "32", false);
        check(Course { is_closed: false, ..closed(&[2]) }, "1", false);
        check(Course { is_fruitful: true, ..closed(&[1, 7]) }, "32", false);
        check(closed(&[1, 8]), "32", false);
        check(closed(&[1]), "32t", false);
        let said = check(least(false), "1t", true);
        assert!(
            said.starts_with("the last 4 connections ended while the message on `a/b` (412 bytes, packet"),
            "{said}"
        );
        // Longer than the line stood still, in proportion: the next one counts again.
        check(tried(SECOND, false, Offer::LEAST), "1t", true);
        check(least(false), "1t", true);
        check(least(false), "1o", true);
        check(least(true), "1o", true);
        // Another that is not taken either says nothing of this one.
        let other = Some(Finding::OtherClosed("c".into()));
        check(Course { finding: other, ..closed(&[9]) }, "1o", true);
        let said = check(least(true), "1c", true);
        assert!(said.ends_with("it is given up"), "{said}");
    }

    #[test]
    fn what_is_retained_or_of_qos_2_is_tried_as_less_first() {
        let mut suspicion = Suspicion::new();
        let mut offers = vec![];
        (0..CLOSES).for_each(|_| suspicion.ended(closed(&[1])));
        let mut plan = suspicion.plan();
        while let Some(trial) = plan.trial {
            if offers.last() != Some(&trial.offer) {
                offers.push(trial.offer);
            }
            suspicion.ended(tried(Duration::ZERO, true, trial.offer));
            plan = suspicion.plan();
        }
        let offers: Vec<_> = offers.into_iter().map(|offer| (offer.retain, offer.qos.level())).collect();
        assert_eq!(offers, [(true, 2), (false, 2), (true, 1), (false, 1)]);
        assert_eq!(plan.condemned, Some(suspect(1)));
    }

    #[test]
    fn an_upstream_that_takes_nothing_costs_a_message_ever_more_rarely() {
        let mut suspicion = Suspicion::new();
        let mut given_up = vec![];
        for number in 0..1000 {
            let plan = suspicion.plan();
            given_up.extend(plan.condemned.map(|_| number));
            suspicion.ended(match plan.trial {
                None => closed(&[1]),
                Some(_) => tried(Duration::ZERO, false, Offer::LEAST),
            });
        }
        let waits: Vec<_> = given_up.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!((given_up[0], waits), (14, vec![22, 38, 70, 134, 262]));
    }

    #[test]
    fn lines_that_break_at_random_or_always_after_the_same_time_cost_no_message() {
        let mut random = 1_u64;
        let mut uniform = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((random >> 40) as f64 + 1.0) / f64::from(1 << 24)
        };
        // How long connections last, compared with how long the message takes to be answered: ten times to a fifth.
        for lasts in [10.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2] {
            let mut life = || SECOND.mul_f64((-uniform().ln() * lasts).min(1e6));
            for _ in 0..1000 {
                let mut suspicion = Suspicion::new();
                // Some lines would need longer than anybody waits.
                for _ in 0..500 {
                    let plan = suspicion.plan();
                    assert_eq!(plan.condemned, None, "with connections of {lasts} s");
                    let quiet = plan.trial.as_ref().map_or(Duration::ZERO, |trial| trial.quiet);
                    let left = life().checked_sub(quiet);
                    suspicion.ended(match (left, plan.trial) {
                        (None, _) => Course { finding: Some(Finding::Nothing), ..closed(&[]) },
                        (Some(left), _) if left > SECOND => break,
                        (Some(_), None) => closed(&[1]),
                        (Some(left), Some(_)) => tried(left, true, Offer::LEAST),
                    });
                }
            }
        }
        // A middlebox that ends each connection at a certain age.
        let mut suspicion = Suspicion::new();
        for _ in 0..500 {
            let plan = suspicion.plan();
            assert_eq!(plan.condemned, None);
            let quiet = plan.trial.as_ref().map_or(Duration::ZERO, |trial| trial.quiet);
            suspicion.ended(match (SECOND.mul_f64(0.9).checked_sub(quiet), plan.trial) {
                (None, _) => Course { finding: Some(Finding::Nothing), ..closed(&[]) },
                (Some(_), None) => closed(&[1]),
                (Some(left), Some(_)) => tried(left, true, Offer::LEAST),
            });
        }
    }
}
