//! Planning of reads: few requests for many points, within what the protocol and the device allow.
//!
//! Points near each other are read together, also over small holes between them. A device that refuses such a read
//! (V1.1b3 §7, exceptions 2 and 3) is asked in smaller pieces from then on: every refusal adds one barrier that no
//! read crosses, first at the widest hole, until only the point that the device really lacks is left alone.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Bound;

use super::{MAX_READ_BITS, MAX_READ_REGISTERS, Table};

/// A run of neighbouring coils, inputs or registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    pub table: Table,
    pub start: u16,
    pub count: u16,
}

impl Span {
    /// The first address after the span, up to 65,536.
    fn end(self) -> u32 {
        u32::from(self.start) + u32::from(self.count)
    }
}

/// As in `holding_register 10-19`.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            0 | 1 => write!(f, "{} {}", self.table.name(), self.start),
            _ => write!(f, "{} {}-{}", self.table.name(), self.start, self.end() - 1),
        }
    }
}

/// One request and the points that its answer serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    pub span: Span,
    /// Each point's number, as given to [`plan`], and its part of the span; in order of address.
    pub parts: Vec<(usize, Span)>,
}

/// What one read of a device may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadLimits {
    /// 1 to [`MAX_READ_REGISTERS`].
    pub max_registers: u16,
    /// 1 to [`MAX_READ_BITS`].
    pub max_bits: u16,
    /// The widest hole between two points that is read along with them, in registers.
    pub max_hole_registers: u16,
    /// The same for coils and discrete inputs.
    pub max_hole_bits: u16,
}

impl Default for ReadLimits {
    /// The protocol's own limits. At 9600 Bd a register costs 2 ms and a request of its own 20 ms and more, so holes of
    /// some registers are worth reading.
    fn default() -> Self {
        Self { max_registers: MAX_READ_REGISTERS, max_bits: MAX_READ_BITS, max_hole_registers: 12, max_hole_bits: 64 }
    }
}

/// What a device has taught about the reads it refuses. At most one barrier for every point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    barriers: BTreeSet<(Table, u16)>,
}

/// What follows from a refused read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The next plan asks for smaller pieces.
    Split,
    /// It cannot be made smaller: the device does not have what the point names.
    Final,
}

impl Learned {
    /// Learns that the device refused `read`.
    pub fn refuse(&mut self, read: &Read) -> Refusal {
        let mut end = read.span.start.into();
        let mut gaps = Vec::new();
        for (_, part) in &read.parts {
            let start = u32::from(part.start);
            if start >= end && part.start > read.span.start {
                gaps.push((start - end, part.start));
            }
            end = end.max(part.end());
        }
        let widest = gaps.iter().map(|(hole, _)| *hole).max();
        let candidates: Vec<u16> =
            gaps.into_iter().filter(|(hole, _)| Some(*hole) == widest).map(|(_, start)| start).collect();
        match candidates.get(candidates.len() / 2) {
            Some(barrier) => {
                self.barriers.insert((read.span.table, *barrier));
                Refusal::Split
            }
            None => Refusal::Final,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.barriers.is_empty()
    }

    fn has_barrier(&self, table: Table, after: u16, up_to: u16) -> bool {
        let range = (Bound::Excluded((table, after)), Bound::Included((table, up_to)));
        after < up_to && self.barriers.range(range).next().is_some()
    }
}

/// The reads that fetch all `points`, each given as its number and its span. No point is torn apart, so a point larger
/// than the limits gets a read of its own.
pub fn plan(points: impl IntoIterator<Item = (usize, Span)>, limits: ReadLimits, learned: &Learned) -> Vec<Read> {
    let mut points: Vec<(usize, Span)> = points.into_iter().collect();
    points.sort_by_key(|(number, span)| (*span, *number));
    let mut reads: Vec<Read> = Vec::new();
    for (number, part) in points {
        match reads.last_mut() {
            Some(read) if fits(read.span, part, limits, learned) => {
                let end = read.span.end().max(part.end());
                // `fits` keeps the count within the limits of one request.
                read.span.count = (end - u32::from(read.span.start)) as u16;
                read.parts.push((number, part));
            }
            _ => reads.push(Read { span: part, parts: vec![(number, part)] }),
        }
    }
    reads
}

/// Tells whether `part`, which begins no earlier than `span`, can be read along with it.
fn fits(span: Span, part: Span, limits: ReadLimits, learned: &Learned) -> bool {
    let (max_count, max_hole) = match span.table.holds_bits() {
        true => (limits.max_bits.min(MAX_READ_BITS), limits.max_hole_bits),
        false => (limits.max_registers.min(MAX_READ_REGISTERS), limits.max_hole_registers),
    };
    let hole = u32::from(part.start).saturating_sub(span.end());
    let count = span.end().max(part.end()) - u32::from(span.start);
    // A part inside the span costs nothing, even where the span is larger than the limits.
    let grows = part.end() > span.end();
    span.table == part.table
        && hole <= max_hole.into()
        && (!grows || count <= max_count.into())
        && !learned.has_barrier(span.table, span.start, part.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(table: Table, start: u16, count: u16) -> Span {
        Span { table, start, count }
    }

    fn holding(start: u16, count: u16) -> Span {
        span(Table::HoldingRegister, start, count)
    }

    fn limits(max_registers: u16, max_hole_registers: u16) -> ReadLimits {
        ReadLimits { max_registers, max_hole_registers, ..ReadLimits::default() }
    }

    fn planned(points: &[Span], limits: ReadLimits, learned: &Learned) -> Vec<String> {
        let reads = plan(points.iter().copied().enumerate(), limits, learned);
        reads.iter().map(|read| read.span.to_string()).collect()
    }

    #[test]
    fn points_near_each_other_are_read_together() {
        let check = |points: &[Span], limits: ReadLimits, expected: &[&str]| {
            assert_eq!(planned(points, limits, &Learned::default()), expected);
        };
        check(&[holding(0, 2), holding(2, 2)], limits(125, 0), &["holding_register 0-3"]);
        check(&[holding(4, 2), holding(0, 2)], limits(125, 2), &["holding_register 0-5"]);
        check(&[holding(4, 2), holding(0, 2)], limits(125, 1), &["holding_register 0-1", "holding_register 4-5"]);
        check(&[holding(0, 2), holding(2, 2)], limits(3, 0), &["holding_register 0-1", "holding_register 2-3"]);
        check(&[holding(7, 1), holding(7, 1), holding(6, 4)], limits(125, 0), &["holding_register 6-9"]);
        check(&[holding(65_535, 1), holding(65_534, 1)], limits(125, 0), &["holding_register 65534-65535"]);
        check(
            &[holding(0, 20), holding(3, 1), holding(20, 1)],
            limits(10, 0),
            &["holding_register 0-19", "holding_register 20"],
        );
        let tables =
            [holding(0, 1), span(Table::InputRegister, 1, 1), span(Table::Coil, 2, 1), span(Table::Coil, 9, 1)];
        check(&tables, ReadLimits::default(), &["coil 2-9", "input_register 1", "holding_register 0"]);
        let wide = [span(Table::Coil, 0, 1), span(Table::Coil, 64, 1), span(Table::Coil, 1999, 1)];
        check(&wide, ReadLimits::default(), &["coil 0-64", "coil 1999"]);
    }

    #[test]
    fn a_point_knows_its_part_of_the_read() {
        let reads = plan([(7, holding(4, 2)), (3, holding(0, 1))], limits(125, 9), &Learned::default());
        assert_eq!(reads, [Read { span: holding(0, 6), parts: vec![(3, holding(0, 1)), (7, holding(4, 2))] }]);
    }

    #[test]
    fn a_refused_read_is_split_at_its_widest_hole_and_then_in_the_middle() {
        let points = [holding(0, 1), holding(1, 1), holding(2, 1), holding(3, 1), holding(8, 1)];
        let mut learned = Learned::default();
        let mut refuse = |number: usize, expected, spans: &[&str]| {
            let reads = plan(points.iter().copied().enumerate(), limits(125, 9), &learned);
            assert_eq!(learned.refuse(&reads[number]), expected);
            assert_eq!(planned(&points, limits(125, 9), &learned), spans);
        };
        refuse(0, Refusal::Split, &["holding_register 0-3", "holding_register 8"]);
        refuse(0, Refusal::Split, &["holding_register 0-1", "holding_register 2-3", "holding_register 8"]);
        let spans = ["holding_register 0-1", "holding_register 2", "holding_register 3", "holding_register 8"];
        refuse(1, Refusal::Split, &spans);
        refuse(2, Refusal::Final, &spans);
    }

    #[test]
    fn points_that_share_registers_are_never_parted() {
        let points = [holding(0, 2), holding(1, 1), holding(1, 2)];
        let mut learned = Learned::default();
        let reads = plan(points.iter().copied().enumerate(), limits(125, 0), &learned);
        assert_eq!(learned.refuse(&reads[0]), Refusal::Final);
        assert!(learned.is_empty());
    }

    proptest! {
        #[test]
        fn every_point_is_in_one_read_within_the_limits(
            starts in proptest::collection::vec((0u16..400, 1u16..5), 1..60), max in 4u16..130, hole in 0u16..20, refused in 0usize..40,
        ) {
            let points: Vec<Span> = starts.iter().map(|(start, count)| holding(*start, *count)).collect();
            let mut learned = Learned::default();
            for round in 0..=refused {
                let reads = plan(points.iter().copied().enumerate(), limits(max, hole), &learned);
                let mut seen: Vec<usize> = reads.iter().flat_map(|read| read.parts.iter().map(|part| part.0)).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..points.len()).collect::<Vec<_>>());
                for read in &reads {
                    prop_assert!(read.span.count <= max.min(125));
                    for (_, part) in &read.parts {
                        prop_assert!(part.start >= read.span.start && part.end() <= read.span.end());
                    }
                }
                // A split makes progress: the refused read is not planned again.
                let read = &reads[round % reads.len()];
                if learned.refuse(read) == Refusal::Split {
                    let again = plan(points.iter().copied().enumerate(), limits(max, hole), &learned);
                    prop_assert!(!again.contains(read));
                }
            }
        }
    }
}
