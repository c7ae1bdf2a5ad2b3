//! How much read-ahead is under way at one time: as much as the connection carries without a queue,
//! found by measuring delays.
//!
//! A connection carries its rate times its round trip. Whatever is asked for beyond that waits in a
//! queue on the way, and a demand read waits behind it, on every channel. So the window grows while
//! answers come about as soon as a round trip allows, and shrinks when they take longer.

use std::time::Duration;

/// The first window, and its bounds: 128 KiB to 8 MiB, in blocks. The largest fills 160 MB/s at 50
/// ms. The smallest takes a second on 1 Mbit/s.
const BLOCKS_FIRST: u64 = 512;
const BLOCKS_MIN: u64 = 32;
const BLOCKS_MAX: u64 = 2048;
/// The longest request: 512 KiB. A longer one arrives later as a whole.
const RUN_BLOCKS_MAX: u64 = 128;
/// What a server's disk and a busy machine may add to two round trips.
const SLACK: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug)]
pub(crate) struct ReadaheadWindow {
    blocks_max: u64,
    shortest: Option<Duration>,
}

impl Default for ReadaheadWindow {
    fn default() -> Self {
        Self {
            blocks_max: BLOCKS_FIRST,
            shortest: None,
        }
    }
}

impl ReadaheadWindow {
    /// Most blocks of read-ahead under way at one time.
    pub(crate) fn blocks_max(&self) -> u64 {
        self.blocks_max
    }

    /// Most blocks in one request of read-ahead.
    pub(crate) fn run_blocks(&self) -> u64 {
        (self.blocks_max / 4).clamp(1, RUN_BLOCKS_MAX)
    }

    /// Records the time of a small read, which is an upper bound of the round trip.
    pub(crate) fn round_trip(&mut self, took: Duration) {
        self.shortest = Some(match self.shortest {
            Some(shortest) if took > shortest => {
                // The round trip may have become longer for good.
                shortest + (took - shortest) / 256
            }
            _ => took,
        });
    }

    /// Records that a read-ahead request of `blocks` was answered.
    pub(crate) fn answered(&mut self, blocks: u64, took: Duration) {
        let Some(shortest) = self.shortest else {
            return;
        };
        if took <= shortest * 2 + SLACK {
            self.blocks_max = (self.blocks_max + blocks / 2).min(BLOCKS_MAX);
        } else {
            self.blocks_max = (self.blocks_max - self.blocks_max / 8).max(BLOCKS_MIN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Keeps as much under way as the window allows; returns the final window.
    fn final_window(round_trip: Duration, blocks_per_s: u32) -> u64 {
        let mut readahead_window = ReadaheadWindow::default();
        readahead_window.round_trip(round_trip);
        for _ in 0..2000 {
            let under_way = u32::try_from(readahead_window.blocks_max()).unwrap();
            let transfer = Duration::from_secs(1) * under_way / blocks_per_s;
            readahead_window.answered(readahead_window.run_blocks(), transfer.max(round_trip));
        }
        readahead_window.blocks_max()
    }

    #[test]
    fn fast_connection_is_filled_and_slow_one_gets_no_long_queue() {
        // 200 MB/s, 50 ms.
        assert_eq!(final_window(50 * MS, 50_000), BLOCKS_MAX);
        // 100 Mbit/s, 50 ms: it carries 150 blocks; three times that certainly fills it.
        let found = final_window(50 * MS, 3000);
        assert!((250..=500).contains(&found), "{found}");
        // 1 Mbit/s, 20 ms.
        assert_eq!(final_window(20 * MS, 30), BLOCKS_MIN);
    }

    #[test]
    fn slower_round_trip_is_learned_and_one_slow_answer_is_ignored() {
        let mut readahead_window = ReadaheadWindow::default();
        readahead_window.round_trip(10 * MS);
        readahead_window.round_trip(500 * MS);
        readahead_window.answered(128, 200 * MS);
        assert!(readahead_window.blocks_max() < BLOCKS_FIRST);
        for _ in 0..2000 {
            readahead_window.round_trip(500 * MS);
        }
        readahead_window.answered(128, 900 * MS);
        assert!(readahead_window.blocks_max() > BLOCKS_FIRST - BLOCKS_FIRST / 8);
    }
}
