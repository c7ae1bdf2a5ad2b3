//! How much read-ahead is under way at one time: what the line takes without a queue, found by delay.
//!
//! A line holds its rate times its round trip. What is asked for beyond that waits in the line's
//! queue, where the read that somebody waits for stands behind it, whatever channel it takes. So the
//! amount grows while answers come about as soon as a round trip allows, and falls when they take
//! longer.

use std::time::Duration;

/// Where it begins, and how far it goes: 128 KiB to 8 MiB, in blocks. The most fills 160 MB/s at
/// 50 ms; the least is a second of a line of 1 Mbit/s.
const BLOCKS_FIRST: u64 = 512;
const BLOCKS_MIN: u64 = 32;
const BLOCKS_MAX: u64 = 2048;
/// The longest request: 512 KiB. A longer one arrives later as a whole.
const RUN_BLOCKS_MAX: u64 = 128;
/// What a server's disk and a busy machine may add to two round trips.
const SLACK: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug)]
pub(crate) struct Pace {
    blocks_max: u64,
    shortest: Option<Duration>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            blocks_max: BLOCKS_FIRST,
            shortest: None,
        }
    }
}

impl Pace {
    /// Most blocks of read-ahead under way at one time.
    pub(crate) fn blocks_max(&self) -> u64 {
        self.blocks_max
    }

    /// Most blocks of one request of it.
    pub(crate) fn run_blocks(&self) -> u64 {
        (self.blocks_max / 4).clamp(1, RUN_BLOCKS_MAX)
    }

    /// A small read was answered: so long is a round trip, at most.
    pub(crate) fn round_trip(&mut self, took: Duration) {
        self.shortest = Some(match self.shortest {
            Some(shortest) if took > shortest => {
                // A line may become longer for good.
                shortest + (took - shortest) / 256
            }
            _ => took,
        });
    }

    /// A request of `blocks` of read-ahead was answered.
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

    /// Keeps as much under way as it may on a line; returns where that settles.
    fn settled(round_trip: Duration, blocks_per_s: u32) -> u64 {
        let mut pace = Pace::default();
        pace.round_trip(round_trip);
        for _ in 0..2000 {
            let under_way = u32::try_from(pace.blocks_max()).unwrap();
            let transfer = Duration::from_secs(1) * under_way / blocks_per_s;
            pace.answered(pace.run_blocks(), transfer.max(round_trip));
        }
        pace.blocks_max()
    }

    #[test]
    fn a_fast_line_is_filled_and_a_slow_one_has_no_long_queue() {
        // 200 MB/s, 50 ms.
        assert_eq!(settled(50 * MS, 50_000), BLOCKS_MAX);
        // 100 Mbit/s, 50 ms: it holds 150 blocks; three times that is filled for sure.
        let found = settled(50 * MS, 3000);
        assert!((250..=500).contains(&found), "{found}");
        // 1 Mbit/s, 20 ms.
        assert_eq!(settled(20 * MS, 30), BLOCKS_MIN);
    }

    #[test]
    fn a_slower_round_trip_is_believed_in_time_and_a_single_slow_answer_is_not() {
        let mut pace = Pace::default();
        pace.round_trip(10 * MS);
        pace.round_trip(500 * MS);
        pace.answered(128, 200 * MS);
        assert!(pace.blocks_max() < BLOCKS_FIRST);
        for _ in 0..2000 {
            pace.round_trip(500 * MS);
        }
        pace.answered(128, 900 * MS);
        assert!(pace.blocks_max() > BLOCKS_FIRST - BLOCKS_FIRST / 8);
    }
}
