//! One piece of a copied file: which parts of it are not zero, and its checksum.

use std::ops::Range;

/// The unit of reading, writing and checking: large enough that a few in flight fill a slow
/// connection, small enough that little is done twice after an interruption.
pub const PIECE_BYTES: u64 = 4 << 20;
/// One bit of a piece's map of 64.
pub(super) const PART_BYTES: usize = 64 << 10;
/// The smallest hole that is kept.
const BLOCK_BYTES: usize = 4096;
/// A gap of this many parts is read, too: at 10 MB/s that takes less than one more round trip.
const GAP_PARTS_MAX: u32 = 4;

/// How many pieces a file of `file_bytes` has.
pub(super) fn count(file_bytes: u64) -> u64 {
    file_bytes.div_ceil(PIECE_BYTES)
}

/// The length of a piece; only the last one is shorter than the others.
pub(super) fn len(index: u64, file_bytes: u64) -> usize {
    let left = file_bytes.saturating_sub(index * PIECE_BYTES);
    usize::try_from(left.min(PIECE_BYTES)).unwrap_or(0)
}

/// SHA-256.
pub(super) fn digest(bytes: &[u8]) -> [u8; 32] {
    openssl::sha::sha256(bytes)
}

/// The parts in which some byte is not zero, a bit each.
pub(super) fn parts_in_use(bytes: &[u8]) -> u64 {
    let parts = bytes.chunks(PART_BYTES).enumerate();
    parts.fold(0, |map, (part, bytes)| {
        map | u64::from(!is_zero(bytes)) << part
    })
}

/// The runs of 4 KiB blocks in which some byte is not zero.
pub(super) fn runs_in_use(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for block in bytes.chunks(BLOCK_BYTES) {
        let end = at + block.len();
        if !is_zero(block) {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end = end,
                _ => runs.push(at..end),
            }
        }
        at = end;
    }
    runs
}

/// The byte ranges of a map's parts within a piece of `len` bytes, merged over small gaps.
pub(super) fn ranges(map: u64, len: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for part in (0..u64::BITS).filter(|part| map >> part & 1 == 1) {
        let start = part as usize * PART_BYTES;
        let end = (start + PART_BYTES).min(len);
        if start >= end {
            break;
        }
        match ranges.last_mut() {
            Some(range) if start - range.end <= GAP_PARTS_MAX as usize * PART_BYTES => {
                range.end = end;
            }
            _ => ranges.push(start..end),
        }
    }
    ranges
}

fn is_zero(bytes: &[u8]) -> bool {
    // Without an early exit the compiler uses wide instructions.
    let or = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte);
    bytes.chunks(512).all(|some| or(some) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_non_zero_parts_are_in_use() {
        let mut bytes = vec![0; 3 * PART_BYTES + 100];
        assert_eq!(parts_in_use(&bytes), 0);
        assert!(runs_in_use(&bytes).is_empty());
        bytes[PART_BYTES + 4096] = 1;
        bytes[PART_BYTES + 2 * 4096 - 1] = 1;
        bytes[3 * PART_BYTES + 99] = 1;
        assert_eq!(parts_in_use(&bytes), 0b1010);
        let at = PART_BYTES + 4096;
        let end = 3 * PART_BYTES;
        assert_eq!(runs_in_use(&bytes), [at..at + 4096, end..end + 100]);
    }

    #[test]
    fn small_gaps_are_merged_and_the_end_is_kept() {
        let at = |part: usize| part * PART_BYTES;
        let first = |end: usize| std::iter::once(0..end).collect::<Vec<_>>();
        assert_eq!(ranges(0b10_0001, at(64)), first(at(6)));
        assert_eq!(ranges(0b100_0001, at(64)), [0..at(1), at(6)..at(7)]);
        assert_eq!(ranges(u64::MAX, at(1) + 5), first(at(1) + 5));
        assert!(ranges(0, at(64)).is_empty());
    }

    #[test]
    fn last_piece_is_as_long_as_the_rest() {
        assert_eq!(count(0), 0);
        assert_eq!(count(PIECE_BYTES + 1), 2);
        assert_eq!(len(0, PIECE_BYTES + 1), 4 << 20);
        assert_eq!(len(1, PIECE_BYTES + 1), 1);
        assert_eq!(len(7, PIECE_BYTES + 1), 0);
    }
}
