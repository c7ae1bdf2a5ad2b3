//! Sets of bytes or blocks as ranges.

use std::ops::Range;

/// The same ranges in order; adjacent ones are joined, empty ones are removed.
pub(crate) fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// `ranges` without `out`. Both must be in order, as [`merged`] returns them.
pub(crate) fn without(ranges: &[Range<u64>], out: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut out = out.iter().peekable();
    for range in ranges {
        let mut at = range.start;
        while let Some(next) = out.peek() {
            if next.start >= range.end {
                break;
            }
            if at < next.start {
                rest.push(at..next.start);
            }
            at = at.max(next.end);
            if next.end > range.end {
                break;
            }
            out.next();
        }
        if at < range.end {
            rest.push(at..range.end);
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_merged_and_subtracted() {
        let all = merged(vec![5..9, 0..2, 2..3, 8..12, 20..20]);
        assert_eq!(all, [0..3, 5..12]);
        assert_eq!(
            without(&all, &[1..2, 6..7, 11..30]),
            [0..1, 2..3, 5..6, 7..11]
        );
        assert_eq!(without(&all, std::slice::from_ref(&(0..40))), []);
        assert_eq!(
            without(&[0..10, 20..30], std::slice::from_ref(&(2..25))),
            [0..2, 25..30]
        );
    }
}
