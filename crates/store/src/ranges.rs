//! A set of byte ranges: merged, ordered, and limited in number.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint, non-adjacent, non-empty ranges by their start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds a range. Returns whether the set changed.
    pub(crate) fn insert(&mut self, range: &Range<u64>) -> bool {
        if range.is_empty() || self.covers(range) {
            return false;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Merges everything that overlaps or touches it.
        while let Some((&s, &e)) = self
            .0
            .range(..=end)
            .next_back()
            .filter(|(_, e)| **e >= start)
        {
            self.0.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.0.insert(start, end);
        true
    }

    /// Removes a range. Returns whether the set changed.
    pub(crate) fn remove(&mut self, range: &Range<u64>) -> bool {
        let mut changed = false;
        if range.is_empty() {
            return false;
        }
        while let Some((&s, &e)) = self
            .0
            .range(..range.end)
            .next_back()
            .filter(|(_, e)| **e > range.start)
        {
            self.0.remove(&s);
            if e > range.end {
                self.0.insert(range.end, e);
            }
            if s < range.start {
                self.0.insert(s, range.start);
            }
            changed = true;
        }
        changed
    }

    fn covers(&self, range: &Range<u64>) -> bool {
        self.0
            .range(..=range.start)
            .next_back()
            .is_some_and(|(_, end)| *end >= range.end)
    }

    /// If there are more than `max` ranges, closes the smallest gaps until three quarters of `max`
    /// are left, so that this happens rarely. The set then covers more than before. Returns the
    /// closed gaps.
    pub(crate) fn coarsen(&mut self, max: usize) -> Vec<Range<u64>> {
        if self.0.len() <= max {
            return Vec::new();
        }
        let surplus = self.0.len() - (max - max / 4);
        let ranges = self.to_vec();
        let mut gaps: Vec<Range<u64>> = ranges
            .windows(2)
            .map(|pair| pair[0].end..pair[1].start)
            .collect();
        gaps.sort_by_key(|gap| gap.end - gap.start);
        gaps.truncate(surplus);
        for gap in &gaps {
            self.insert(gap);
        }
        gaps
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn to_vec(&self) -> Vec<Range<u64>> {
        self.0.iter().map(|(start, end)| *start..*end).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_range_set_is_the_set_of_its_bytes(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 0..60),
        ) {
            let mut set = RangeSet::default();
            let mut model = [false; 80];
            for (insert, start, len) in steps {
                let range = start..start + len;
                let before = model;
                let bytes = usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap();
                model[bytes].fill(insert);
                let changed = if insert { set.insert(&range) } else { set.remove(&range) };
                prop_assert_eq!(changed, before != model);
                let mut found = [false; 80];
                let ranges = set.to_vec();
                for range in &ranges {
                    prop_assert!(!range.is_empty());
                    let bytes =
                        usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                    found[bytes].fill(true);
                }
                prop_assert_eq!(found, model);
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }

        #[test]
        fn coarsening_keeps_every_byte_and_the_bound(
            starts in proptest::collection::vec(0u64..10_000, 0..200), max in 1usize..50,
        ) {
            let mut set = RangeSet::default();
            for start in &starts {
                set.insert(&(*start..*start + 3));
            }
            let mut before = set.clone();
            let closed = set.coarsen(max);
            prop_assert!(set.to_vec().len() <= max);
            for range in before.to_vec() {
                prop_assert!(set.covers(&range));
            }
            for gap in &closed {
                before.insert(gap);
            }
            prop_assert_eq!(before, set, "the returned gaps are all that was added");
        }
    }
}
