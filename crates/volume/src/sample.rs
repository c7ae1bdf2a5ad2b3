//! A sample of the blocks in a persistent cache, compared with the store when the volume is opened,
//! in one round trip or in none: the caller may read the sample together with the state of the
//! container ([`CacheSample`]). Blocks that the session itself wrote are read back by `proof_check`.
//!
//! If a part `p` of the cached blocks is wrong on the server, `n` blocks detect it with a chance of
//! 1 - (1 - p)^n: 64 blocks detect one wrong block in twenty with 96 %, one in a hundred with 47 %.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;

use sprat_store::{ReadClass, StoreError, StoreFile};

use crate::cache_file::held_blocks;
use crate::slots::{CachedBlock, digest_of};
use crate::{BLOCK_BYTES, CacheSample, Geometry};

/// Blocks of a sample: 256 KiB.
pub(crate) const SAMPLE_BLOCKS: usize = 64;
/// Half of the sample comes from the blocks that entered the cache last: a server that was reset to
/// the state of an earlier session has lost these.
const NEWEST_BLOCKS: usize = 256;

/// Blocks by number, each with its digest.
pub(crate) type Digests = BTreeMap<u64, u64>;

/// A random number below `bound`, which is not zero.
fn below(random: &RandomState, nth: u64, bound: usize) -> usize {
    let bound = bound as u64;
    usize::try_from(random.hash_one(nth) % bound).unwrap_or(0)
}

/// Chooses which of the cached blocks (the longest unused first) are compared at opening.
pub(crate) fn of_cache(held: &[CachedBlock]) -> Digests {
    let random = RandomState::new();
    let newest = &held[held.len().saturating_sub(NEWEST_BLOCKS)..];
    let mut sample = Digests::new();
    // A block that is drawn twice counts once. So nearly all blocks of a small cache are compared.
    for nth in 0..4 * SAMPLE_BLOCKS as u64 {
        let from = if nth % 2 == 0 { newest } else { held };
        if from.is_empty() || sample.len() == SAMPLE_BLOCKS {
            break;
        }
        let held = from[below(&random, nth, from.len())];
        sample.insert(held.index, held.place.digest);
    }
    sample
}

impl CacheSample {
    /// Chooses blocks of the cache in `dir`, without the cache's lock: what has changed when the
    /// volume is opened does not count. `None` if there is no usable cache.
    #[must_use]
    pub fn choose(dir: &Path, bytes_max: u64) -> Option<Self> {
        let held = held_blocks(dir, bytes_max)?;
        let digests = of_cache(&held);
        let bytes = Vec::new();
        (!digests.is_empty()).then_some(Self { digests, bytes })
    }

    /// Offset on the device and length of each block.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, usize)> {
        let offset = |index: &u64| index * BLOCK_BYTES as u64;
        self.digests
            .keys()
            .map(move |index| (offset(index), BLOCK_BYTES))
    }

    /// Adds the blocks as the container has them, in the order of the ranges.
    #[must_use]
    pub fn read(self, blocks: impl Iterator<Item = Vec<u8>>) -> Option<Self> {
        let bytes: Vec<u8> = blocks.flatten().collect();
        let complete = bytes.len() == self.digests.len() * BLOCK_BYTES;
        complete.then_some(Self { bytes, ..self })
    }

    /// The first block that the container has with other bytes than the cache.
    pub(crate) fn first_that_differs(&self) -> Option<u64> {
        first_other(&self.digests, &self.bytes)
    }
}

/// Reads the blocks of `sample`, all at once. Returns the first one with other bytes.
pub(crate) fn first_that_differs(
    store: &dyn StoreFile,
    geometry: Geometry,
    sample: &Digests,
) -> Result<Option<u64>, StoreError> {
    let mut bytes = vec![0; sample.len() * BLOCK_BYTES];
    let mut parts: Vec<(u64, &mut [u8])> = sample
        .keys()
        .map(|index| geometry.offset_bytes + index * BLOCK_BYTES as u64)
        .zip(bytes.chunks_exact_mut(BLOCK_BYTES))
        .collect();
    if !parts.is_empty() {
        store.read_parts_at(&mut parts, ReadClass::Demand)?;
    }
    Ok(first_other(sample, &bytes))
}

fn first_other(sample: &Digests, bytes: &[u8]) -> Option<u64> {
    let mut found = sample.iter().zip(bytes.chunks_exact(BLOCK_BYTES));
    let differs = found.find(|((index, digest), bytes)| digest_of(**index, bytes) != **digest);
    differs.map(|((index, _), _)| *index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::Place;

    /// Measures the chance that the head of this file computes.
    #[test]
    fn sample_nearly_always_finds_one_wrong_block_in_twenty() {
        let held: Vec<CachedBlock> = (0..10_000)
            .map(|index| CachedBlock {
                index,
                place: Place {
                    slot: u32::try_from(index).unwrap(),
                    digest: 0,
                },
                kept: false,
            })
            .collect();
        let found = (0..400)
            .filter(|_| of_cache(&held).keys().any(|index| index % 20 == 7))
            .count();
        assert!(found > 350, "{found} of 400; 96 % are expected");
        // It usually contains blocks that the last session wrote last.
        let last = (0..100)
            .filter(|_| of_cache(&held).keys().any(|index| *index >= 9_990))
            .count();
        assert!(last > 50, "{last} of 100; 72 % are expected");
    }
}
