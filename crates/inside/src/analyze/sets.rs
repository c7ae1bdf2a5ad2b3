//! Sets of snapshots.

use std::collections::HashMap;

/// Which snapshots have something: a number for each set of them that was met.
#[derive(Debug, Default)]
pub(super) struct Sets {
    /// The sets. In each the numbers of snapshots are in their order.
    pub(super) all: Vec<Vec<u32>>,
    numbers: HashMap<(u32, u32), u32>,
}

impl Sets {
    /// The set `of` and the snapshot `number`, which is none of an older one.
    pub(super) fn with(&mut self, of: Option<u32>, number: u32) -> u32 {
        let of = of.unwrap_or(u32::MAX);
        if let Some(known) = self.numbers.get(&(of, number)) {
            return *known;
        }
        let mut set = self.all.get(of as usize).cloned().unwrap_or_default();
        set.push(number);
        let new = u32::try_from(self.all.len()).unwrap_or(u32::MAX - 1);
        self.all.push(set);
        self.numbers.insert((of, number), new);
        new
    }
}
