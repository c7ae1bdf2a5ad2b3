//! How much is sent before a flush behind makes it durable: what a line that breaks can carry.
//!
//! A loss voids what no flush has covered. On a line that breaks every minute an epoch of a
//! hundred megabytes would begin anew for ever; so after a loss without progress less is risked
//! and less is under way, and while flushes succeed, more again.

use std::time::Duration;

/// Flushes that follow each other faster may cover more: each keeps a channel busy for a while.
const FAST: Duration = Duration::from_secs(2);
/// Slower ones cover less, so that a loss costs seconds, and nothing waits long behind what is
/// under way.
const SLOW: Duration = Duration::from_secs(8);

/// The floor, in blocks: 256 KiB, so that even a modem's minute moves some.
const BLOCKS_MIN: usize = 64;

/// See the module. All counts are blocks.
#[derive(Debug)]
pub(crate) struct Portion {
    blocks: usize,
    blocks_max: usize,
    /// Answered since the line came up or the last flush.
    moved: usize,
}

impl Portion {
    /// Begins at a quarter of `blocks_max`.
    pub(crate) fn new(blocks_max: usize) -> Self {
        let mut portion = Self {
            blocks: 0,
            blocks_max: blocks_max.max(1),
            moved: 0,
        };
        portion.set(blocks_max / 4);
        portion
    }

    /// So many blocks are worth a flush behind; no more than that are under way.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Blocks were answered.
    pub(crate) fn moved(&mut self, blocks: usize) {
        self.moved += blocks;
    }

    /// Something became durable, so long after the first answer of it. If the line was busy
    /// with it, this sets the portion: some seconds from flush to flush.
    pub(crate) fn durable(&mut self, took: Duration) {
        if self.moved >= self.blocks / 2 {
            if took < FAST {
                self.set(self.blocks * 2);
            } else if took > SLOW {
                self.set(self.blocks / 2);
            }
        }
        self.moved = 0;
    }

    /// The line was lost: had it been a quarter of what moved, some of it would be durable.
    pub(crate) fn lost(&mut self) {
        let quarter = self.moved / 4;
        if quarter < self.blocks {
            self.set(quarter.max(self.blocks / 8));
        }
        self.moved = 0;
    }

    fn set(&mut self, blocks: usize) {
        self.blocks = blocks.clamp(BLOCKS_MIN.min(self.blocks_max), self.blocks_max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 8192;

    #[test]
    fn a_line_that_never_gets_to_a_flush_is_asked_for_less_each_time() {
        let mut portion = Portion::new(MAX);
        for _ in 0..8 {
            portion.moved(100);
            portion.lost();
        }
        assert_eq!(portion.blocks(), BLOCKS_MIN);
        // What it risks it then moves before the next loss.
        assert!(portion.blocks() <= 100);
    }

    #[test]
    fn a_loss_right_after_a_flush_does_not_take_it_to_the_floor() {
        let mut portion = Portion::new(MAX);
        portion.durable(FAST);
        portion.lost();
        assert_eq!(portion.blocks(), MAX / 4 / 8);
    }

    #[test]
    fn the_pace_stays_within_its_bounds() {
        for max in [1, 3, BLOCKS_MIN, MAX] {
            let mut portion = Portion::new(max);
            for _ in 0..20 {
                portion.moved(max);
                portion.durable(2 * SLOW);
            }
            assert_eq!(portion.blocks(), BLOCKS_MIN.min(max));
            for _ in 0..20 {
                portion.moved(max);
                portion.durable(FAST / 2);
            }
            assert_eq!(portion.blocks(), max);
        }
    }
}
