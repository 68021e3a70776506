//! A set of numbers kept as ranges: small where they are mostly neighbours, as the sequences of acknowledged
//! messages are.

use std::collections::BTreeMap;

/// Inclusive ranges that neither touch nor overlap, by their first number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub fn from_range(first: u64, last: u64) -> Self {
        Self(BTreeMap::from([(first, last)]))
    }

    /// Adds every number from `first` to `last`.
    pub fn insert_range(&mut self, first: u64, last: u64) {
        // As acknowledgements come.
        if let Some(mut end) = self.0.last_entry()
            && end.get().checked_add(1) == Some(first)
        {
            end.insert(last);
            return;
        }
        self.remove_range(first, last);
        // Joined with its neighbours, if they touch.
        let before = first.checked_sub(1).and_then(|end| self.ending_at(end));
        let after = last.checked_add(1).and_then(|next| self.0.remove(&next));
        self.0.insert(before.unwrap_or(first), after.unwrap_or(last));
    }

    /// Takes out every number from `first` to `last`.
    pub fn remove_range(&mut self, first: u64, last: u64) {
        let touched: Vec<_> = self.overlapping(first, last).collect();
        for (start, end) in touched {
            self.0.remove(&start);
            if start < first {
                self.0.insert(start, first - 1);
            }
            if end > last {
                self.0.insert(last + 1, end);
            }
        }
    }

    /// What lies from `first` to `last`, cut off there.
    pub fn within(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
        self.overlapping(first, last).map(move |(start, end)| (start.max(first), end.min(last)))
    }

    /// Whether any number from `first` to `last` is in here.
    pub fn touches(&self, first: u64, last: u64) -> bool {
        self.overlapping(first, last).next().is_some()
    }

    fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
        let start = self.0.range(..=first).next_back().map_or(first, |(&start, _)| start);
        self.0.range(start..=last).map(|(&start, &end)| (start, end)).filter(move |&(_, end)| end >= first)
    }

    fn ending_at(&self, end: u64) -> Option<u64> {
        self.0.range(..=end).next_back().filter(|&(_, &last)| last == end).map(|(&first, _)| first)
    }

    pub fn contains(&self, number: u64) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, &last)| last >= number)
    }

    /// The ranges, first and last number, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(&first, &last)| (first, last))
    }

    /// Takes out of each range what is above its bound, which is found by the range's first number.
    pub fn clip(&mut self, bound: impl Fn(u64) -> Option<u64>) {
        self.0.retain(|&first, last| {
            let Some(bound) = bound(first).filter(|&bound| bound >= first) else { return false };
            *last = bound.min(*last);
            true
        });
    }

    /// How many numbers there are.
    pub fn count(&self) -> usize {
        self.iter().map(|(first, last)| usize::try_from(last - first).unwrap_or(usize::MAX).saturating_add(1)).sum()
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_merge_in_any_order() {
        let check = |numbers: &[u64], expected: &[(u64, u64)]| {
            let mut ranges = Ranges::default();
            numbers.iter().for_each(|&number| ranges.insert_range(number, number));
            assert_eq!(ranges.iter().collect::<Vec<_>>(), expected, "{numbers:?}");
            for number in 0..20 {
                assert_eq!(ranges.contains(number), numbers.contains(&number), "{number} in {numbers:?}");
            }
        };
        check(&[1, 2, 3], &[(1, 3)]);
        check(&[3, 1, 2], &[(1, 3)]);
        check(&[5, 5, 7, 0], &[(0, 0), (5, 5), (7, 7)]);
        check(&[9, 11, 10, 8, 12], &[(8, 12)]);
        check(&[u64::MAX], &[(u64::MAX, u64::MAX)]);
    }

    #[test]
    fn ranges_are_put_in_cut_and_taken_out() {
        let check = |put: &[(u64, u64)], out: (u64, u64), expected: &[(u64, u64)]| {
            let mut ranges = Ranges::default();
            put.iter().for_each(|&(first, last)| ranges.insert_range(first, last));
            ranges.remove_range(out.0, out.1);
            assert_eq!(ranges.iter().collect::<Vec<_>>(), expected, "{put:?} without {out:?}");
            assert!(!ranges.touches(out.0, out.1));
        };
        check(&[(5, 9), (1, 4), (10, 10)], (20, 30), &[(1, 10)]);
        check(&[(1, 9), (3, 4), (8, 20)], (0, 0), &[(1, 20)]);
        check(&[(1, 3), (7, 9)], (3, 7), &[(1, 2), (8, 9)]);
        check(&[(1, 20)], (5, 6), &[(1, 4), (7, 20)]);
        check(&[(1, 2), (4, 5), (7, 8)], (0, 9), &[]);
        let mut ranges = Ranges::default();
        [(1, 3), (5, 6), (9, 12)].into_iter().for_each(|(first, last)| ranges.insert_range(first, last));
        assert_eq!(ranges.within(2, 10).collect::<Vec<_>>(), [(2, 3), (5, 6), (9, 10)]);
        assert_eq!(ranges.within(7, 8).next(), None);
    }

    #[test]
    fn a_bound_cuts_through_a_range() {
        let check = |bound: Option<u64>, expected: &[(u64, u64)], count: usize| {
            let mut ranges = Ranges::default();
            [1, 2, 3, 7, 8].into_iter().for_each(|number| ranges.insert_range(number, number));
            // Another lane, with a bound of its own.
            [101, 102].into_iter().for_each(|number| ranges.insert_range(number, number));
            ranges.clip(|first| if first > 100 { Some(101) } else { bound });
            let expected = [expected, &[(101, 101)]].concat();
            assert_eq!(ranges.iter().collect::<Vec<_>>(), expected, "{bound:?}");
            assert_eq!(ranges.count(), count);
        };
        check(Some(9), &[(1, 3), (7, 8)], 6);
        check(Some(7), &[(1, 3), (7, 7)], 5);
        check(Some(5), &[(1, 3)], 4);
        check(Some(0), &[], 1);
        check(None, &[], 1);
    }
}
