//! Sorted, disjoint ranges of blocks, and the file that keeps them.

use std::io;
use std::ops::Range;

use crate::disk::{bad, u64_at};

/// Bytes of a block: what is saved at once. sprat writes in blocks of this size.
pub const BLOCK: u64 = 4096;
/// More ranges than this become one range over the whole file: a map may be too wide.
pub const RANGES_MAX: usize = 262_144;

/// The longest file of ranges that is read.
pub const MAP_BYTES_MAX: u64 = 64 << 20;

pub type Blocks = Vec<Range<u64>>;

const NOTHING: Range<u64> = 0..0;

/// The blocks that `len` bytes at `offset` touch.
pub fn touched(offset: u64, len: u64) -> Range<u64> {
    let end = offset.saturating_add(len).div_ceil(BLOCK);
    if len == 0 { 0..0 } else { offset / BLOCK..end }
}

/// Sorts and joins ranges that overlap or touch.
pub fn normal(mut ranges: Blocks) -> Blocks {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Blocks = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// The ranges of some blocks, which are in any order.
pub fn of(blocks: &[u64]) -> Blocks {
    normal(blocks.iter().map(|block| *block..block + 1).collect())
}

/// Sorted ranges, cut at each multiple of `len`: those between two multiples are together.
pub fn parts(ranges: &[Range<u64>], len: u64) -> Vec<Blocks> {
    let mut found: Vec<Blocks> = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let number = at / len;
            let part = at..range.end.min((number + 1).saturating_mul(len));
            at = part.end;
            match found.last_mut() {
                Some(parts) if parts[0].start / len == number => parts.push(part),
                _ => found.push(Blocks::from([part])),
            }
        }
    }
    found
}

/// What is in both.
pub fn both(a: &[Range<u64>], b: &[Range<u64>]) -> Blocks {
    let mut found = Vec::new();
    for range in b {
        let first = a.partition_point(|other| other.end <= range.start);
        for other in a[first..]
            .iter()
            .take_while(|other| other.start < range.end)
        {
            found.push(range.start.max(other.start)..range.end.min(other.end));
        }
    }
    found
}

/// What is in `a` and not in `b`.
pub fn without(a: &[Range<u64>], b: &[Range<u64>]) -> Blocks {
    let mut found = Vec::new();
    let mut next = 0;
    for range in a {
        let mut at = range.start;
        while next < b.len() && b[next].end <= at {
            next += 1;
        }
        for other in b[next..].iter().take_while(|other| other.start < range.end) {
            if at < other.start {
                found.push(at..other.start);
            }
            at = at.max(other.end);
        }
        if at < range.end {
            found.push(at..range.end);
        }
    }
    found
}

pub fn contains(ranges: &[Range<u64>], block: u64) -> bool {
    let at = ranges.partition_point(|range| range.end <= block);
    ranges.get(at).is_some_and(|range| range.start <= block)
}

pub fn count(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// The file of a map: `(u64 start, u64 end)*, u32 crc32`, little endian. An empty map has one empty range: the crc32 of
/// nothing is 0, so four zero bytes would pass for a map.
pub fn to_bytes(ranges: &[Range<u64>]) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(ranges.len() * 16 + 4);
    let ranges = if ranges.is_empty() {
        std::slice::from_ref(&NOTHING)
    } else {
        ranges
    };
    for range in ranges {
        bytes.extend(range.start.to_le_bytes());
        bytes.extend(range.end.to_le_bytes());
    }
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// The checksum at the end of such a file.
pub fn crc_of(bytes: &[u8]) -> u32 {
    bytes.last_chunk().map_or(0, |crc| u32::from_le_bytes(*crc))
}

pub fn from_bytes(bytes: &[u8]) -> io::Result<Blocks> {
    let damaged = || bad("the map is damaged");
    let (ranges, crc) = bytes.split_last_chunk::<4>().ok_or_else(damaged)?;
    if crc32fast::hash(ranges) != u32::from_le_bytes(*crc) || ranges.len() % 16 != 0 {
        return Err(damaged());
    }
    let ranges: Blocks = ranges
        .chunks_exact(16)
        .map(|pair| u64_at(pair, 0)..u64_at(pair, 8))
        .collect();
    if ranges == [NOTHING] {
        return Ok(Blocks::new());
    }
    let sorted = ranges.windows(2).all(|pair| pair[0].end < pair[1].start);
    if sorted && !ranges.is_empty() && ranges.iter().all(|range| range.start < range.end) {
        Ok(ranges)
    } else {
        Err(damaged())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(ranges: &[Range<u64>]) -> BTreeSet<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    fn any_ranges() -> impl Strategy<Value = Blocks> {
        let range = (0_u64..80, 0_u64..12).prop_map(|(start, len)| start..start + len);
        proptest::collection::vec(range, 0..10)
    }

    proptest! {
        #[test]
        fn ranges_behave_like_sets(a in any_ranges(), b in any_ranges()) {
            let (x, y) = (normal(a.clone()), normal(b.clone()));
            prop_assert_eq!(set(&x), set(&a));
            prop_assert_eq!(set(&both(&x, &y)), set(&a).intersection(&set(&b)).copied().collect());
            prop_assert_eq!(set(&without(&x, &y)), set(&a).difference(&set(&b)).copied().collect());
            prop_assert_eq!(count(&x), set(&a).len() as u64);
            let cut = parts(&x, 8);
            prop_assert_eq!(set(&cut.concat()), set(&a));
            let numbers: BTreeSet<u64> = set(&a).iter().map(|block| block / 8).collect();
            prop_assert_eq!(cut.len(), numbers.len());
            for (part, number) in cut.iter().zip(numbers) {
                prop_assert!(set(part).iter().all(|block| block / 8 == number));
            }
            for block in 0..95 {
                prop_assert_eq!(contains(&x, block), set(&a).contains(&block));
            }
            prop_assert_eq!(from_bytes(&to_bytes(&x)).unwrap(), x);
        }

        #[test]
        fn a_map_with_a_changed_byte_is_refused(a in any_ranges(), place in any::<usize>(), bit in 0_u32..8) {
            let mut bytes = to_bytes(&normal(a));
            let place = place % bytes.len();
            bytes[place] ^= 1 << bit;
            from_bytes(&bytes).unwrap_err();
        }
    }

    #[test]
    fn a_map_that_was_cut_off_is_refused() {
        for map in [
            Blocks::new(),
            normal(vec![0..5, 1..5]),
            Blocks::from([0..5, 7..9]),
        ] {
            let bytes = to_bytes(&map);
            assert_eq!(from_bytes(&bytes).unwrap(), map);
            for len in 0..bytes.len() {
                from_bytes(&bytes[..len]).unwrap_err();
                from_bytes(&vec![0; len]).unwrap_err();
            }
        }
    }

    #[test]
    fn a_write_touches_whole_blocks() {
        assert_eq!(touched(0, 1), 0..1);
        assert_eq!(touched(4095, 2), 0..2);
        assert_eq!(touched(4096, 4096), 1..2);
        assert_eq!(touched(5, 0), 0..0);
        assert_eq!(normal(vec![3..4, 1..3, 9..9]), vec![1..4]);
    }
}
