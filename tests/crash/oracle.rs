//! What was acknowledged against what arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::clients::{Event, Shared};
use crate::run::Fault;

/// Numbers of each line that a damage may have hit: published from `from` on and before `to`.
pub struct AtRisk {
    pub from: Vec<u32>,
    pub to: Vec<u32>,
    /// What the gateway said about it; empty where it noticed nothing.
    pub reported: Vec<String>,
}

impl AtRisk {
    fn covers(&self, line: usize, number: u32) -> bool {
        !self.reported.is_empty() && (self.from[line]..self.to[line]).contains(&number)
    }

    /// Whether a message that its publisher has sent twice may come behind others up to `highest`. Before it died the
    /// gateway had some of what was not acknowledged yet, and delivers that; the publisher sends all of it again, in its
    /// order, before anything new. Where the first copy of a message was destroyed and that of a later one was not, the
    /// second copy is the first that arrives: in the order in which the gateway accepted what it still has. Whatever was
    /// published after the damage stays behind all of them.
    fn excuses_order(&self, line: usize, number: u32, highest: u32) -> bool {
        self.covers(line, number) && highest < self.to[line]
    }
}

/// What may be missing, and why.
#[derive(Default)]
pub struct Excuses {
    pub damages: Vec<AtRisk>,
    /// What a limit has dropped, by the counter of the process that did.
    pub dropped: u64,
    /// Publishers whose messages need not come in order; the table says how many did not.
    pub unordered: &'static [&'static str],
}

/// What became of the messages that were acknowledged during the rounds of one fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub rounds: usize,
    pub acknowledged: usize,
    pub lost: usize,
    /// Missing, and the gateway has said so.
    pub reported: usize,
    /// QoS 2 that came again.
    pub duplicated: usize,
    pub reordered: usize,
    /// QoS 1 that came again, as it may.
    pub repeated: usize,
}

#[derive(Default)]
pub struct Verdict {
    pub tallies: BTreeMap<Fault, Tally>,
    /// What must not be; empty where all is well.
    pub findings: Vec<String>,
}

impl Verdict {
    pub fn new(shared: &Shared, faults: &[Fault], acknowledged: &[Event], excuses: &Excuses) -> Self {
        let mut verdict = Self::default();
        for &fault in faults {
            verdict.tally(fault).rounds += 1;
        }
        let fault_of = |event: Event| faults.get(event.round as usize).copied().unwrap_or(Fault::None);
        for &event in acknowledged {
            verdict.tally(fault_of(event)).acknowledged += 1;
        }
        let mut arrived: BTreeMap<String, Vec<Event>> = BTreeMap::new();
        for &event in shared.arrived.lock().unwrap().iter() {
            arrived.entry(shared.lines[event.line].topic(event.number)).or_default().push(event);
        }
        let known: BTreeSet<_> = arrived.values().flatten().map(|event| (event.line, event.number)).collect();
        let excused = |event: Event| excuses.damages.iter().any(|at_risk| at_risk.covers(event.line, event.number));
        let missing = acknowledged.iter().filter(|event| !known.contains(&(event.line, event.number)));
        let (reported, mut lost): (Vec<Event>, Vec<Event>) = missing.copied().partition(|&event| excused(event));
        reported.into_iter().for_each(|event| verdict.tally(fault_of(event)).reported += 1);
        let by_limit = lost.len().min(excuses.dropped as usize);
        lost.drain(..by_limit).for_each(|event| verdict.tally(fault_of(event)).reported += 1);
        for &event in &lost {
            verdict.tally(fault_of(event)).lost += 1;
        }
        verdict.find("acknowledged and lost", shared, &lost);

        let sent_again = shared.sent_again.lock().unwrap();
        let may_be_behind = |event: Event, highest| {
            let Event { line, number, .. } = event;
            sent_again.contains(&(line, number))
                && excuses.damages.iter().any(|at_risk| at_risk.excuses_order(line, number, highest))
        };
        for (topic, events) in &arrived {
            let line = &shared.lines[events[0].line];
            let (mut seen, mut highest) = (BTreeSet::new(), 0);
            let (mut again, mut behind) = (Vec::new(), Vec::new());
            for &event in events {
                if !seen.insert(event.number) {
                    again.push(event);
                } else if event.number < highest && !may_be_behind(event, highest) {
                    behind.push(event);
                }
                highest = highest.max(event.number);
            }
            if line.qos == 1 {
                again.iter().for_each(|&event| verdict.tally(fault_of(event)).repeated += 1);
            } else {
                again.retain(|&event| !excused(event));
                again.iter().for_each(|&event| verdict.tally(fault_of(event)).duplicated += 1);
                verdict.find(&format!("{topic}: QoS 2 came again"), shared, &again);
            }
            behind.iter().for_each(|&event| verdict.tally(fault_of(event)).reordered += 1);
            if !excuses.unordered.contains(&line.name) {
                verdict.find(&format!("{topic}: out of order"), shared, &behind);
            }
        }
        let wrong = shared.wrong.lock().unwrap();
        if !wrong.is_empty() {
            verdict.findings.push(format!("arrived and was never published: {wrong:?}"));
        }
        verdict
    }

    pub fn total(&self) -> Tally {
        self.tallies.values().fold(Tally::default(), |sum, tally| Tally {
            rounds: sum.rounds + tally.rounds,
            acknowledged: sum.acknowledged + tally.acknowledged,
            lost: sum.lost + tally.lost,
            reported: sum.reported + tally.reported,
            duplicated: sum.duplicated + tally.duplicated,
            reordered: sum.reordered + tally.reordered,
            repeated: sum.repeated + tally.repeated,
        })
    }

    /// All of it in one line.
    pub fn summary(&self) -> String {
        let Tally { rounds, acknowledged, lost, reported, duplicated, reordered, repeated } = self.total();
        format!(
            "{rounds} rounds, {acknowledged} acknowledged, {lost} lost, {reported} missing as reported, \
             {duplicated} doubled, {reordered} reordered, {repeated} of QoS 1 repeated"
        )
    }

    fn tally(&mut self, fault: Fault) -> &mut Tally {
        self.tallies.entry(fault).or_default()
    }

    fn find(&mut self, what: &str, shared: &Shared, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        let first = events.iter().take(30);
        let list: Vec<_> = first
            .map(|event| format!("{}/{} (round {})", shared.lines[event.line].name, event.number, event.round))
            .collect();
        self.findings.push(format!("{what}: {} messages: {}", events.len(), list.join(", ")));
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<16}{:>8}{:>14}{:>6}{:>10}{:>12}{:>11}{:>10}",
            "fault", "rounds", "acknowledged", "lost", "reported", "duplicated", "reordered", "repeated"
        )?;
        let total = [("total".to_owned(), self.total())];
        let rows = self.tallies.iter().map(|(fault, tally)| (fault.name().to_owned(), *tally)).chain(total);
        for (name, tally) in rows {
            let Tally { rounds, acknowledged, lost, reported, duplicated, reordered, repeated } = tally;
            writeln!(
                f,
                "{name:<16}{rounds:>8}{acknowledged:>14}{lost:>6}{reported:>10}{duplicated:>12}{reordered:>11}{repeated:>10}"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of the first publisher as they arrived, all even, and so of one topic; 10 to 29 are at risk, and sent
    /// again from 20 on. Returns those that came out of order.
    fn out_of_order(numbers: &[u32], reported: &[&str]) -> usize {
        let shared = Shared::new(100, true);
        let event = |number| Event { line: 0, number, round: 0 };
        shared.arrived.lock().unwrap().extend(numbers.iter().copied().map(event));
        shared.sent_again.lock().unwrap().extend((20..30).map(|number| (0, number)));
        let reported = reported.iter().map(|&line| line.to_owned()).collect();
        let at_risk = AtRisk { from: vec![10, 0, 0, 0], to: vec![30, 0, 0, 0], reported };
        let excuses = Excuses { damages: vec![at_risk], ..Excuses::default() };
        let acknowledged: Vec<_> = numbers.iter().copied().map(event).collect();
        let verdict = Verdict::new(&shared, &[Fault::Damage], &acknowledged, &excuses);
        assert_eq!(verdict.findings.is_empty(), verdict.total().reordered == 0);
        verdict.total().reordered
    }

    #[test]
    fn what_was_destroyed_unacknowledged_comes_again_behind_what_was_not() {
        let all = [10, 12, 14, 16, 18, 24, 26, 20, 22, 24, 26, 28, 30];
        assert_eq!(out_of_order(&all, &["a run is damaged"]), 0);
        // Nobody has said that anything was destroyed.
        assert_eq!(out_of_order(&all, &[]), 2);
        // It was acknowledged, and never sent again.
        assert_eq!(out_of_order(&[10, 14, 12, 16], &["a run is damaged"]), 1);
        // Published after the damage.
        assert_eq!(out_of_order(&[10, 30, 20, 22, 32], &["a run is damaged"]), 2);
    }
}
