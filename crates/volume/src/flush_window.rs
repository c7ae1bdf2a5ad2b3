//! How much is sent before a flush behind makes it durable: as much as an unreliable connection can
//! carry.
//!
//! After a loss everything that no flush covered must be sent again. If the connection broke every
//! minute, an epoch of a hundred megabytes would start again for ever. So after a loss without
//! progress the window shrinks, and while flushes succeed it grows.

use std::time::Duration;

/// If flushes follow each other faster than this, the window grows: each flush keeps a channel busy
/// for a while.
const FAST: Duration = Duration::from_secs(2);
/// If they take longer than this, the window shrinks: a loss then costs seconds, and nothing waits
/// long behind what is under way.
const SLOW: Duration = Duration::from_secs(8);

/// The smallest window, in blocks: 256 KiB, so that even a modem makes progress within a minute.
const BLOCKS_MIN: usize = 64;

/// See the module. All counts are blocks.
#[derive(Debug)]
pub(crate) struct FlushWindow {
    blocks: usize,
    blocks_max: usize,
    /// Blocks answered since the connection came up or since the last flush.
    moved: usize,
}

impl FlushWindow {
    /// Starts at a quarter of `blocks_max`.
    pub(crate) fn new(blocks_max: usize) -> Self {
        let mut flush_window = Self {
            blocks: 0,
            blocks_max: blocks_max.max(1),
            moved: 0,
        };
        flush_window.set(blocks_max / 4);
        flush_window
    }

    /// A flush behind is due after this many blocks. No more than this are under way.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Records answered blocks.
    pub(crate) fn moved(&mut self, blocks: usize) {
        self.moved += blocks;
    }

    /// Records a flush that ended `took` after the first answer it covers. If the connection was
    /// busy for that time, this adjusts the window, so that flushes are some seconds apart.
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

    /// Records a lost connection. With a window of a quarter of what was answered, some of it would
    /// be durable.
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
    fn window_shrinks_while_each_connection_breaks_before_a_flush() {
        let mut flush_window = FlushWindow::new(MAX);
        for _ in 0..8 {
            flush_window.moved(100);
            flush_window.lost();
        }
        assert_eq!(flush_window.blocks(), BLOCKS_MIN);
        // It now moves the whole window before the next loss.
        assert!(flush_window.blocks() <= 100);
    }

    #[test]
    fn loss_right_after_a_flush_does_not_shrink_to_the_minimum() {
        let mut flush_window = FlushWindow::new(MAX);
        flush_window.durable(FAST);
        flush_window.lost();
        assert_eq!(flush_window.blocks(), MAX / 4 / 8);
    }

    #[test]
    fn window_stays_within_its_bounds() {
        for max in [1, 3, BLOCKS_MIN, MAX] {
            let mut flush_window = FlushWindow::new(max);
            for _ in 0..20 {
                flush_window.moved(max);
                flush_window.durable(2 * SLOW);
            }
            assert_eq!(flush_window.blocks(), BLOCKS_MIN.min(max));
            for _ in 0..20 {
                flush_window.moved(max);
                flush_window.durable(FAST / 2);
            }
            assert_eq!(flush_window.blocks(), max);
        }
    }
}
