//! Sets of addresses. Pure.
use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges that neither touch nor overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    /// The parts that lie in `range`.
    pub fn within(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (from, to) = (range.start, range.end);
        let before = self.0.range(..from).next_back();
        let first = before.map_or(from, |(start, _)| *start);
        self.0
            .range(first..to.max(first))
            .map(move |(start, end)| (*start).max(from)..(*end).min(to))
            .filter(|part| !part.is_empty())
    }

    /// Whether all of `range` is in the set.
    pub fn contains(&self, range: &Range<u64>) -> bool {
        let before = self.0.range(..=range.start).next_back();
        range.is_empty() || before.is_some_and(|(_, end)| *end >= range.end)
    }

    /// Whether inserting `range` makes no further range of it.
    pub fn touches(&self, range: &Range<u64>) -> bool {
        let before = self.0.range(..=range.end).next_back();
        before.is_some_and(|(_, end)| *end >= range.start)
    }

    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        while let Some((&at, &until)) = self.0.range(..=end).next_back()
            && until >= start
        {
            start = start.min(at);
            end = end.max(until);
            self.0.remove(&at);
        }
        self.0.insert(start, end);
    }

    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&at, &until)) = self.0.range(..range.end).next_back()
            && until > range.start
        {
            self.0.remove(&at);
            if until > range.end {
                self.0.insert(range.end, until);
            }
            if at < range.start {
                self.0.insert(at, range.start);
            }
        }
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain table of 64 addresses.
        #[test]
        fn it_is_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..64), 0..40)) {
            let mut set = RangeSet::default();
            let mut table = [false; 64];
            for (add, a, b) in steps {
                let range = a.min(b)..a.max(b);
                if add && !range.is_empty() {
                    let before = set.len();
                    let touched = set.touches(&range);
                    set.insert(range.clone());
                    prop_assert_eq!(touched, set.len() <= before);
                } else if !add {
                    set.remove(range.clone());
                }
                for at in range {
                    table[at as usize] = add;
                }
            }
            for at in 0..64 {
                prop_assert_eq!(set.contains(&(at..at + 1)), table[at as usize]);
            }
            for (from, to) in [(0, 64), (10, 20), (63, 64), (5, 5)] {
                let mut inside = [false; 64];
                for at in set.within(&(from..to)).flatten() {
                    inside[at as usize] = true;
                }
                for at in 0..64 {
                    let expected = table[at as usize] && (from..to).contains(&at);
                    prop_assert_eq!(inside[at as usize], expected);
                }
            }
            let ranges: Vec<_> = set.iter().collect();
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "{:?}", ranges);
            }
        }
    }
}
