//! What a disk may hold after a crash: all groups of writes up to some k, any part of k+1, nothing
//! of k+2. A group is what lies between two flushes. k is at least what a durable flush has
//! promised.

use std::collections::HashMap;
use std::sync::Mutex;

use super::{BLOCK, stamp_of};

#[derive(Default)]
struct Log {
    /// The writes of each block in order: group and stamp.
    writes: HashMap<u64, Vec<(usize, u64)>>,
    /// The group that new writes enter, from 1.
    group: usize,
    /// Groups up to here were promised to be durable.
    durable: usize,
    next_stamp: u64,
}

pub struct Oracle(Mutex<Log>);

impl Default for Oracle {
    fn default() -> Self {
        Self(Mutex::new(Log {
            group: 1,
            next_stamp: 1,
            ..Log::default()
        }))
    }
}

impl Oracle {
    /// Records a write that is about to start; returns its stamp.
    pub fn write(&self, block: u64) -> u64 {
        let mut log = self.0.lock().unwrap();
        let stamp = log.next_stamp;
        log.next_stamp += 1;
        let group = log.group;
        log.writes.entry(block).or_default().push((group, stamp));
        stamp
    }

    /// Records a flush that is about to start; returns the group that it ends.
    pub fn flush(&self) -> usize {
        let mut log = self.0.lock().unwrap();
        log.group += 1;
        log.group - 1
    }

    /// Records that a durable flush of `group` has returned.
    pub fn durable(&self, group: usize) {
        let mut log = self.0.lock().unwrap();
        log.durable = log.durable.max(group);
    }

    pub fn durable_group(&self) -> usize {
        self.0.lock().unwrap().durable
    }

    /// The stamp that a read must return; 0 if nothing was written.
    pub fn newest(&self, block: u64) -> u64 {
        let log = self.0.lock().unwrap();
        log.writes
            .get(&block)
            .and_then(|writes| writes.last())
            .map_or(0, |(_, stamp)| *stamp)
    }

    /// Checks that `image`, taken after `durable` groups were promised, is one of the allowed
    /// states.
    pub fn check(&self, image: &[u8], durable: usize) -> Result<(), String> {
        let log = self.0.lock().unwrap();
        let (mut low, mut high) = (durable, log.group);
        for (block, bytes) in (0u64..).zip(image.chunks_exact(BLOCK)) {
            let stamp = stamp_of(bytes);
            let empty = Vec::new();
            let writes = log.writes.get(&block).unwrap_or(&empty);
            let (from, to) = legal(writes, stamp)
                .ok_or_else(|| format!("block {block} holds {stamp}, never written there"))?;
            low = low.max(from);
            high = high.min(to);
            if low > high {
                return Err(format!(
                    "block {block} holds {stamp}, legal after {from}..={to} groups, but {low} \
                     groups are there (promised: {durable}); its writes: {writes:?}"
                ));
            }
        }
        Ok(())
    }
}

/// The numbers of complete groups with which a block may hold `stamp`.
fn legal(writes: &[(usize, u64)], stamp: u64) -> Option<(usize, usize)> {
    let until_next = |at: usize| writes.get(at).map_or(usize::MAX, |(group, _)| group - 1);
    if stamp == 0 {
        return Some((0, until_next(0)));
    }
    let at = writes.iter().position(|(_, written)| *written == stamp)?;
    let (group, _) = writes[at];
    let last_of_group = writes.get(at + 1).is_none_or(|(next, _)| *next > group);
    Some((
        group - 1,
        if last_of_group {
            until_next(at + 1)
        } else {
            group - 1
        },
    ))
}
