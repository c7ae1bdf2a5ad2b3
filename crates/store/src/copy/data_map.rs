//! Which parts of a sparse file hold data, a bit for each 64 KiB: small, however many extents there
//! are.

use std::collections::BTreeMap;
use std::ops::Range;

use super::piece::{self, PART_BYTES, PIECE_BYTES};
use crate::{StoreError, StoreFile};

/// Where a file holds data, rounded outwards to 64 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataMap {
    file_bytes: u64,
    /// By the number of the piece; a piece without data has no entry.
    pieces: BTreeMap<u64, u64>,
}

impl DataMap {
    /// The map of a file of `file_bytes` without any data.
    #[must_use]
    pub fn empty(file_bytes: u64) -> Self {
        Self {
            file_bytes,
            pieces: BTreeMap::new(),
        }
    }

    /// Asks the store where the file holds data; `Unsupported` if it can't report that.
    pub fn of(file: &dyn StoreFile) -> Result<Self, StoreError> {
        let mut map = Self::empty(file.len()?);
        file.data_ranges(&mut |range| map.add(range))?;
        Ok(map)
    }

    /// Adds a range; the part beyond the file's end is ignored.
    pub fn add(&mut self, range: Range<u64>) {
        let part_bytes = PART_BYTES as u64;
        let end = range.end.min(self.file_bytes).div_ceil(part_bytes);
        let mut part = range.start / part_bytes;
        let a_piece = PIECE_BYTES / part_bytes;
        while part < end {
            let (index, first) = (part / a_piece, part % a_piece);
            let count = (a_piece - first).min(end - part);
            let bits = if count == a_piece {
                u64::MAX
            } else {
                ((1 << count) - 1) << first
            };
            *self.pieces.entry(index).or_default() |= bits;
            part += count;
        }
    }

    /// Whether any of these bytes may hold data.
    #[must_use]
    pub fn holds_any(&self, range: Range<u64>) -> bool {
        let mut asked = Self::empty(self.file_bytes);
        asked.add(range);
        let mut pieces = asked.pieces.iter();
        pieces.any(|(index, bits)| bits & self.piece(*index) != 0)
    }

    /// Bytes that may hold data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        let pieces = self.pieces.keys();
        pieces.map(|index| self.piece_bytes(*index)).sum()
    }

    /// Starts of up to `count` parts without data, spread over the file.
    #[must_use]
    pub fn some_holes(&self, count: u64) -> Vec<u64> {
        let parts = self.file_bytes / PART_BYTES as u64;
        let step = (parts / (4 * count).max(1)).max(1);
        (0..parts)
            .step_by(usize::try_from(step).unwrap_or(usize::MAX))
            .map(|part| part * PART_BYTES as u64)
            .filter(|at| !self.holds_any(*at..at + 1))
            .take(usize::try_from(count).unwrap_or(usize::MAX))
            .collect()
    }

    /// The parts of a piece that may hold data, a bit each.
    pub(super) fn piece(&self, index: u64) -> u64 {
        self.pieces.get(&index).copied().unwrap_or(0)
    }

    /// Bytes of a piece that may hold data.
    pub(super) fn piece_bytes(&self, index: u64) -> u64 {
        let bits = u64::from(self.piece(index).count_ones()) * PART_BYTES as u64;
        bits.min(piece::len(index, self.file_bytes) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_rounded_outwards_and_cut_at_the_end() {
        let mut map = DataMap::empty(3 * PIECE_BYTES + 10);
        assert_eq!(map.data_bytes(), 0);
        map.add(1..2);
        assert_eq!((map.piece(0), map.data_bytes()), (1, 65536));
        map.add(PIECE_BYTES - 1..PIECE_BYTES + 65537);
        assert_eq!((map.piece(0), map.piece(1)), (1 | 1 << 63, 0b11));
        map.add(3 * PIECE_BYTES..u64::MAX);
        assert_eq!((map.piece(3), map.piece_bytes(3)), (1, 10));
        map.add(2 * PIECE_BYTES..3 * PIECE_BYTES);
        assert_eq!(map.piece(2), u64::MAX);
        assert!(map.holds_any(0..4096) && !map.holds_any(65536..131072));
        assert_eq!(map.some_holes(1), [48 * 65536]);
    }
}
