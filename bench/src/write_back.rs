//! The plan's part: blocks taken in, given out as runs, retired by a flush.

use std::sync::Arc;

use crate::plan::{Block, Limits, Plan, Step};

/// As many blocks as the default buffer of 256 MiB holds.
const BUFFER_BLOCKS: usize = 65_536;

/// A plan and one block's bytes.
pub struct WriteBack {
    plan: Plan,
    block: Block,
}

impl WriteBack {
    /// An empty plan.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "made by benches only")]
    pub fn new() -> Self {
        let plan = Plan::new(Limits {
            buffer_blocks: BUFFER_BLOCKS,
            in_flight_blocks: 2048,
            run_blocks: 256,
            early_blocks: 256,
            behind_blocks: BUFFER_BLOCKS,
            batched_flush_blocks: 0,
        });
        Self {
            plan,
            block: Arc::from(vec![0x5a; 4096]),
        }
    }

    /// Takes `blocks` single blocks in, `stride` apart, and sends and retires them all, as if
    /// every answer came at once.
    pub fn pass(&mut self, blocks: u64, stride: u64) {
        for number in 0..blocks {
            self.plan.write(number * stride, vec![self.block.clone()]);
        }
        self.plan.seal();
        loop {
            match self.plan.step() {
                Step::CheckLock(epoch) => self.plan.lock_checked(epoch),
                Step::Flush(epoch) => drop(self.plan.flushed(epoch)),
                _ => match self.plan.next_run() {
                    Some(run) => self.plan.answered(&run),
                    None => return,
                },
            }
        }
    }
}
