//! A bounded cache of unmodified blocks, with clock replacement.
//!
//! A block enters unmarked and is marked when it is read again. The clock hand clears a mark, or
//! evicts an unmarked block. So blocks that are read once (a stream) leave before blocks that are
//! read again (metadata).

use std::collections::HashMap;

use crate::plan::Block;

#[derive(Debug)]
struct Slot {
    index: u64,
    block: Block,
    read_again: bool,
}

#[derive(Debug)]
pub(crate) struct ReadCache {
    blocks_max: usize,
    slots: Vec<Slot>,
    by_index: HashMap<u64, usize>,
    hand: usize,
}

impl ReadCache {
    pub(crate) fn new(blocks_max: usize) -> Self {
        Self {
            blocks_max,
            slots: Vec::new(),
            by_index: HashMap::new(),
            hand: 0,
        }
    }

    pub(crate) fn contains(&self, index: u64) -> bool {
        self.by_index.contains_key(&index)
    }

    /// Returns a block and marks it as read again.
    pub(crate) fn read(&mut self, index: u64) -> Option<Block> {
        let slot = &mut self.slots[*self.by_index.get(&index)?];
        slot.read_again = true;
        Some(slot.block.clone())
    }

    pub(crate) fn insert(&mut self, index: u64, block: Block) {
        if let Some(slot) = self.by_index.get(&index) {
            self.slots[*slot].block = block;
            return;
        }
        if self.blocks_max == 0 {
            return;
        }
        let new = Slot {
            index,
            block,
            read_again: false,
        };
        if self.slots.len() < self.blocks_max {
            self.by_index.insert(index, self.slots.len());
            self.slots.push(new);
            return;
        }
        let victim = self.turn_hand();
        self.by_index.remove(&self.slots[victim].index);
        self.by_index.insert(index, victim);
        self.slots[victim] = new;
    }

    pub(crate) fn remove(&mut self, index: u64) {
        if let Some(slot) = self.by_index.remove(&index) {
            self.slots.swap_remove(slot);
            if let Some(moved) = self.slots.get(slot) {
                self.by_index.insert(moved.index, slot);
            }
        }
    }

    /// The blocks in the cache.
    pub(crate) fn held(&self) -> impl Iterator<Item = u64> {
        self.by_index.keys().copied()
    }

    fn turn_hand(&mut self) -> usize {
        loop {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[self.hand];
            if !std::mem::take(&mut slot.read_again) {
                return self.hand;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(byte: u8) -> Block {
        Block::from([byte])
    }

    #[test]
    fn block_read_again_outlives_a_stream_larger_than_the_cache() {
        let mut cache = ReadCache::new(8);
        cache.insert(1000, block(1));
        for index in 0..64 {
            assert_eq!(
                cache.read(1000),
                Some(block(1)),
                "after {index} blocks of the stream"
            );
            cache.insert(index, block(2));
        }
        assert!(cache.slots.len() <= 8);
    }

    #[test]
    fn removing_a_block_keeps_the_others() {
        let mut cache = ReadCache::new(3);
        for index in 0..3 {
            cache.insert(index, block(u8::try_from(index).unwrap()));
        }
        cache.remove(0);
        assert_eq!(cache.read(0), None);
        assert_eq!(cache.read(1), Some(block(1)));
        assert_eq!(cache.read(2), Some(block(2)));
    }
}
