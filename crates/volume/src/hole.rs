//! The part of a device that was a hole when the volume was opened: the store isn't asked for it.
//!
//! A file that has just been extended reads as zeros there, and the lock keeps others from writing.
//! The kernel reads two blocks of each group that it adds to an ext4. For a volume that grows by
//! tebibytes that would be thousands of needless round trips.

use std::collections::HashSet;
use std::sync::Arc;

use crate::BLOCK_BYTES;
use crate::plan::Block;

/// See the module. Its memory grows with what is written to the part, not with its length.
#[derive(Debug)]
pub(crate) struct Hole {
    from: u64,
    written: HashSet<u64>,
}

impl Hole {
    /// The blocks from `from` on were never written to.
    pub(crate) fn new(from: u64) -> Self {
        Self {
            from,
            written: HashSet::new(),
        }
    }

    /// Whether the store certainly holds zeros for the block.
    pub(crate) fn holds(&self, index: u64) -> bool {
        index >= self.from && !self.written.contains(&index)
    }

    /// The block's zeros, if [`holds`](Self::holds).
    pub(crate) fn block(&self, index: u64) -> Option<Block> {
        self.holds(index).then(|| Arc::from([0; BLOCK_BYTES]))
    }

    /// Records that a block is written: from now on the store may hold other bytes.
    pub(crate) fn written(&mut self, index: u64) {
        if index >= self.from {
            self.written.insert(index);
        }
    }
}
