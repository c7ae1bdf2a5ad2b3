//! Small epochs that go out in one piece, their fsync right behind their writes.

use super::{Epoch, Plan};
use crate::epoch::Run;

impl Plan {
    /// Whether this epoch, the one under way, is the conductor's alone: it is sealed and small,
    /// nothing of it was sent, and no suspect may hold a block of it back.
    pub(super) fn goes_together(&self, epoch: &Epoch) -> bool {
        let blocks_max = self.limits.together_blocks.min(self.limits.early_blocks);
        let small = epoch.blocks.len() <= blocks_max.min(self.portion.blocks());
        let untouched = self.runs_in_flight == 0
            && self.answered.is_empty()
            && !epoch.blocks.is_empty()
            && epoch.unsent.len() == epoch.blocks.len();
        small
            && untouched
            && epoch.number < self.open.number
            && self.permitted == Some(epoch.number)
            && self.suspects.is_empty()
            && self.settling.is_empty()
    }

    /// Takes all of the epoch that goes together, as runs.
    pub(crate) fn begin_together(&mut self) -> Vec<Run> {
        let unsent = |plan: &Self| plan.sealed.front().map(|epoch| epoch.unsent.clone());
        let unsent = unsent(self).expect("an epoch that goes together is sealed");
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
