//! Small epochs that are sent in one batch, with the fsync right behind the writes.

use super::{Epoch, Plan};
use crate::epoch::Run;

impl Plan {
    /// Whether the coordinator sends this epoch, the one under way, in one batch: it is sealed and
    /// small, nothing of it was sent, and no in-doubt block holds a block of it back.
    pub(super) fn is_batched(&self, epoch: &Epoch) -> bool {
        let blocks_max = self
            .limits
            .batched_flush_blocks
            .min(self.limits.early_blocks);
        let small = epoch.blocks.len() <= blocks_max.min(self.flush_window.blocks());
        let untouched = self.runs_in_flight == 0
            && self.answered.is_empty()
            && !epoch.blocks.is_empty()
            && epoch.unsent.len() == epoch.blocks.len();
        small
            && untouched
            && epoch.number < self.open.number
            && self.lock_checked == Some(epoch.number)
            && self.in_doubt.is_empty()
            && self.unresolved.is_empty()
    }

    /// Takes the whole batched epoch, as runs.
    pub(crate) fn begin_batched_flush(&mut self) -> Vec<Run> {
        let unsent = |plan: &Self| plan.sealed.front().map(|epoch| epoch.unsent.clone());
        let unsent = unsent(self).expect("a batched epoch is sealed");
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for index in unsent {
            match ranges.last_mut() {
                Some((first, end))
                    if *end == index && index - *first < self.limits.run_blocks as u64 =>
                {
                    *end += 1;
                }
                _ => ranges.push((index, index + 1)),
            }
        }
        let runs = ranges.into_iter();
        runs.map(|(first, end)| self.take_run(first, end)).collect()
    }
}
