//! An epoch, the runs that are sent of it, and the parts of it that are retired.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// One block's bytes, shared between the epoch, a run under way and readers; never changed.
pub(crate) type Block = Arc<[u8]>;

/// Epochs are numbered from 1 in the order of their flushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EpochNumber(pub(crate) u64);

/// Connections are numbered from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Generation(pub(crate) u64);

/// Adjacent blocks that are sent in one request.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) blocks: Vec<Block>,
}

impl Run {
    /// The blocks with their indices.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (u64, &Block)> {
        (self.first..).zip(&self.blocks)
    }
}

/// All writes between two flushes that are not durable yet.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) number: EpochNumber,
    /// The newest bytes of each block.
    pub(crate) blocks: BTreeMap<u64, Block>,
    pub(crate) unsent: BTreeSet<u64>,
}

impl Epoch {
    pub(crate) fn new(number: EpochNumber) -> Self {
        Self {
            number,
            blocks: BTreeMap::new(),
            unsent: BTreeSet::new(),
        }
    }

    /// Marks all of it as unsent.
    pub(crate) fn void(&mut self) {
        self.unsent = self.blocks.keys().copied().collect();
    }
}

/// Retired blocks. They are returned to the caller so that they are freed outside the lock.
#[must_use]
pub(crate) struct Retired(pub(crate) BTreeMap<u64, Block>);

impl Epoch {
    /// Removes what a flush has covered, except blocks that were written again since.
    pub(crate) fn take(&mut self, covered: Vec<(u64, Block)>) -> BTreeMap<u64, Block> {
        let mut taken = BTreeMap::new();
        for (index, block) in covered {
            let newest = self.blocks.get(&index);
            if newest.is_some_and(|newest| Arc::ptr_eq(newest, &block)) {
                assert!(!self.unsent.contains(&index), "block {index} was answered");
                self.blocks.remove(&index);
                taken.insert(index, block);
            }
        }
        taken
    }
}

impl Retired {
    /// The blocks that are durable now, in order.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, &Block)> {
        self.0.iter().map(|(index, block)| (*index, block))
    }

    /// The same as ranges of blocks: in order, and as few as possible.
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for index in self.0.keys() {
            match ranges.last_mut() {
                Some(last) if last.end == *index => last.end += 1,
                _ => ranges.push(*index..index + 1),
            }
        }
        ranges
    }
}

/// What a flush behind covers: answered blocks of the epoch under way.
#[must_use]
pub(crate) struct Behind {
    pub(crate) epoch: EpochNumber,
    pub(crate) blocks: Vec<(u64, Block)>,
}
