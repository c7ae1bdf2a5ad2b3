//! Digests of what the server reported as durable, to detect a server that came back without it.
//!
//! A server may answer an fsync and store nothing: a volatile cache, `sync=disabled`, a virtual
//! disk with `cache=unsafe`, a machine reset to a snapshot. What is lost then is what was written
//! last. So the newest blocks are compared, and some random ones.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use crate::plan::{Block, Plan};

/// Most digests that are kept.
const KEPT_MAX: usize = 4096;
/// How much older than the newest one a digest may be.
const AGE_MAX: Duration = Duration::from_secs(60);
/// Number of newest blocks that are compared, and of random ones.
const SAMPLES: usize = 32;
/// Where file systems keep their super block: ext4 in its first block, btrfs at 64 KiB
/// (btrfs_tree.h, `BTRFS_SUPER_INFO_OFFSET`). Each commit changes it.
const SUPER_BLOCKS: [u64; 2] = [0, 16];

/// What a block of the store should hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) index: u64,
    digest: u64,
}

/// Digests of blocks that the server reported as durable. The key of the digests is random, so that
/// no server can prepare other bytes with the same digest.
#[derive(Debug, Default)]
pub(crate) struct Proof {
    key: RandomState,
    digests: HashMap<u64, (u64, Instant)>,
    /// Oldest first. An entry is outdated if its time differs from the digest's.
    order: VecDeque<(u64, Instant)>,
    supers: [Option<u64>; SUPER_BLOCKS.len()],
    opened: Option<Sample>,
}

impl Proof {
    /// Records blocks that are durable now.
    pub(crate) fn durable<'a>(&mut self, blocks: impl Iterator<Item = (u64, &'a Block)>) {
        let now = Instant::now();
        let blocks: Vec<(u64, &Block)> = blocks.collect();
        // Earlier ones would be dropped again at once, so their digests need not be computed.
        let dropped = blocks.len().saturating_sub(KEPT_MAX);
        for (nth, (index, block)) in blocks.into_iter().enumerate() {
            if nth < dropped {
                self.digests.remove(&index);
                if !SUPER_BLOCKS.contains(&index) {
                    continue;
                }
            }
            let digest = self.digest(block);
            self.note_super(index, digest);
            self.digests.insert(index, (digest, now));
            self.order.push_back((index, now));
        }
        while let Some((index, at)) = self.order.front().copied() {
            let outdated = self
                .digests
                .get(&index)
                .is_none_or(|(_, newest)| *newest != at);
            let old = now.duration_since(at) > AGE_MAX || self.digests.len() > KEPT_MAX;
            if !outdated && !old {
                break;
            }
            self.order.pop_front();
            if !outdated {
                self.digests.remove(&index);
            }
        }
    }

    /// Records blocks that were read from the store.
    pub(crate) fn read(&mut self, blocks: &[(u64, Block)]) {
        for (index, block) in blocks {
            if SUPER_BLOCKS.contains(index) {
                let digest = self.digest(block);
                self.note_super(*index, digest);
            }
        }
    }

    /// Records the stamp block of the store. With a cache it may be the only block that was read there before the
    /// first write.
    pub(crate) fn opened(&mut self, index: u64, block: &Block) {
        let digest = self.digest(block);
        self.opened = Some(Sample { index, digest });
    }

    /// Drops discarded blocks: they hold zeros, or what they held before.
    pub(crate) fn forget(&mut self, gone: &impl Fn(&u64) -> bool) {
        self.opened.take_if(|opened| gone(&opened.index));
        self.digests.retain(|index, _| !gone(index));
        for (slot, index) in self.supers.iter_mut().zip(SUPER_BLOCKS) {
            if gone(&index) {
                *slot = None;
            }
        }
    }

    fn note_super(&mut self, index: u64, digest: u64) {
        self.opened.take_if(|opened| opened.index == index);
        if let Some(at) = SUPER_BLOCKS.iter().position(|block| *block == index) {
            self.supers[at] = Some(digest);
        }
    }

    /// The block of [`opened`](Self::opened), to compare on a new connection. At a close it may be another session's,
    /// which got the lock. The release of the lock finds that.
    pub(crate) fn opened_sample(&self, plan: &Plan) -> Option<Sample> {
        self.opened.filter(|opened| plan.rests(opened.index))
    }

    /// What to compare now. It contains no block of which newer bytes may have been sent or may
    /// arrive.
    pub(crate) fn samples(&self, plan: &Plan) -> Vec<Sample> {
        let supers = SUPER_BLOCKS.into_iter().zip(self.supers);
        let mut samples: Vec<Sample> = supers
            .filter(|(index, _)| plan.rests(*index))
            .filter_map(|(index, digest)| {
                Some(Sample {
                    index,
                    digest: digest?,
                })
            })
            .collect();
        let mut resting: Vec<Sample> = Vec::new();
        for (index, at) in self.order.iter().rev() {
            match self.digests.get(index) {
                Some((digest, newest)) if newest == at && plan.rests(*index) => {
                    let (index, digest) = (*index, *digest);
                    resting.push(Sample { index, digest });
                }
                _ => {}
            }
        }
        let older = resting.split_off(SAMPLES.min(resting.len()));
        samples.extend(resting);
        // The random choice: the smallest keyed digests, which no server knows.
        let mut older: Vec<(u64, Sample)> = older
            .into_iter()
            .map(|sample| (RandomState::new().hash_one(sample.index), sample))
            .collect();
        older.sort_by_key(|(chance, _)| *chance);
        samples.extend(older.into_iter().take(SAMPLES).map(|(_, sample)| sample));
        samples.sort_by_key(|sample| sample.index);
        samples.dedup_by_key(|sample| sample.index);
        samples
    }

    /// Whether these bytes match the sample.
    pub(crate) fn matches(&self, sample: &Sample, found: &[u8]) -> bool {
        self.digest(found) == sample.digest
    }

    fn digest(&self, bytes: &[u8]) -> u64 {
        let mut hasher = self.key.build_hasher();
        hasher.write(bytes);
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Limits;

    fn plan() -> Plan {
        Plan::new(Limits {
            buffer_blocks: 64,
            in_flight_blocks: 64,
            run_blocks: 64,
            early_blocks: 64,
            behind_blocks: 64,
            batched_flush_blocks: 0,
        })
    }

    fn block(stamp: u64) -> Block {
        Block::from(stamp.to_le_bytes().repeat(512))
    }

    #[test]
    fn samples_always_contain_newest_blocks_and_super_block() {
        let mut proof = Proof::default();
        for index in 0..10_000 {
            proof.durable(std::iter::once((index, &block(index))));
        }
        assert_eq!(proof.digests.len(), KEPT_MAX);
        let samples = proof.samples(&plan());
        assert_eq!(samples.len(), 2 + 2 * SAMPLES);
        for index in (9_968..10_000).chain([0, 16]) {
            let found = samples.iter().find(|sample| sample.index == index);
            assert_eq!(
                found.map(|found| found.digest),
                Some(proof.digest(&block(index)))
            );
        }
        assert_ne!(samples, proof.samples(&plan()), "not random");
    }

    #[test]
    fn last_blocks_and_super_blocks_of_a_large_flush_are_kept() {
        let mut proof = Proof::default();
        let count = KEPT_MAX as u64 + 1000;
        for round in [0, 100_000] {
            let blocks: Vec<(u64, Block)> = (0..count).map(|n| (n, block(n + round))).collect();
            proof.durable(blocks.iter().map(|(index, block)| (*index, block)));
        }
        assert_eq!(proof.digests.len(), KEPT_MAX);
        let samples = proof.samples(&plan());
        assert!(samples.iter().any(|sample| sample.index == 0));
        for sample in samples {
            let right = proof.digest(&block(sample.index + 100_000));
            assert_eq!(sample.digest, right, "{}", sample.index);
            let kept = sample.index >= 1000 || SUPER_BLOCKS.contains(&sample.index);
            assert!(kept, "{}", sample.index);
        }
        // A block that is durable again but not among the last ones must not keep its first digest.
        proof.durable(std::iter::once((7, &block(1))));
        let blocks: Vec<(u64, Block)> = (0..count).map(|n| (n, block(n))).collect();
        proof.durable(blocks.iter().map(|(index, block)| (*index, block)));
        assert!(!proof.digests.contains_key(&7));
    }

    /// Tries 400 random losses of a part of the blocks; returns how many per cent are detected.
    fn found_of_losses(proof: &Proof, lost: impl Fn(&RandomState, u64) -> bool) -> usize {
        let found = (0..400).filter(|_| {
            let chance = RandomState::new();
            let samples = proof.samples(&plan());
            samples.iter().any(|sample| lost(&chance, sample.index))
        });
        found.count() / 4
    }

    /// Measures the chances that docs/threat-model.md computes; each within four times its
    /// deviation.
    #[test]
    fn loss_is_detected_as_often_as_the_threat_model_computes() {
        let mut proof = Proof::default();
        for index in 0..10_000 {
            proof.durable(std::iter::once((index, &block(index))));
        }
        let one_in = |part: u64| {
            move |chance: &RandomState, index: u64| chance.hash_one(index).is_multiple_of(part)
        };
        for (part, expected) in [(1000, 6), (100, 47), (20, 96), (10, 100)] {
            let found = found_of_losses(&proof, one_in(part));
            assert!(found.abs_diff(expected) <= 10, "1/{part}: {found} %");
        }
        // All but the newest 32 and the super blocks.
        let older = |part: u64| {
            move |chance: &RandomState, index: u64| {
                let sampled_by_chance = index > 16 && index < 9_968;
                sampled_by_chance && chance.hash_one(index).is_multiple_of(part)
            }
        };
        for (part, expected) in [(100, 28), (20, 81), (10, 97)] {
            let found = found_of_losses(&proof, older(part));
            assert!(found.abs_diff(expected) <= 10, "1/{part}: {found} %");
        }
        // A loss of what was written last is always detected.
        assert_eq!(found_of_losses(&proof, |_, index| index == 9_999), 100);
    }

    #[test]
    fn blocks_that_were_written_again_are_not_compared() {
        let mut proof = Proof::default();
        let mut plan = plan();
        proof.durable([(3, &block(3)), (4, &block(4))].into_iter());
        plan.write(3, vec![block(9)]);
        let samples = proof.samples(&plan);
        assert_eq!(
            samples
                .iter()
                .map(|sample| sample.index)
                .collect::<Vec<_>>(),
            [4]
        );
        proof.forget(&|index| *index == 4);
        assert!(proof.samples(&plan).is_empty());
    }

    #[test]
    fn super_block_that_was_read_is_compared_until_it_is_written() {
        let mut proof = Proof::default();
        let mut plan = plan();
        proof.read(&[(0, block(1)), (3, block(3)), (16, block(2))]);
        let indices = |proof: &Proof, plan: &Plan| -> Vec<u64> {
            let samples = proof.samples(plan);
            samples.iter().map(|sample| sample.index).collect()
        };
        assert_eq!(indices(&proof, &plan), [0, 16]);
        // By now the store may hold the new bytes or the old ones.
        plan.write(0, vec![block(9)]);
        assert_eq!(indices(&proof, &plan), [16]);
        proof.forget(&|index| *index == 16);
        assert_eq!(indices(&proof, &plan), [0; 0]);
    }
}
