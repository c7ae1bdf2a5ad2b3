//! What this session sent: its writes that may arrive late, and its writes that must be compared
//! later.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use sprat_store::clock::since_boot;
use sprat_store::{FileName, IgnorePoison, Lock, Store};

use crate::Failure;
use crate::volume_process::late::digest::DigestKey;
use crate::volume_process::late::file::{Kind, List};
use crate::volume_process::late::{BLOCK, BLOCK_BYTES, BLOCKS_MAX};

/// The blocks for which a session keeps digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All blocks that it writes.
    All,
    /// The blocks in these ranges, which are in order.
    Within(Vec<Range<u64>>),
}

/// What this session sent, as digests. All the bytes would not fit in memory.
pub(crate) struct Sent {
    key: DigestKey,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    next: u64,
    /// Writes that were sent since the last successful lease check began, or that were never
    /// answered.
    recent: BTreeMap<u64, Write>,
    watched: Option<Watched>,
}

struct Write {
    /// By [`since_boot`].
    at: Duration,
    block: u64,
    digests: Vec<u64>,
    answered: bool,
}

/// Lists whose blocks are in a newer list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Replaced {
    /// The tokens of their sessions.
    pub tokens: Vec<String>,
    /// Their files.
    pub lists: Vec<FileName>,
}

struct Watched {
    scope: Scope,
    replaced: Replaced,
    /// In the order of sending. The last write of a block counts.
    writes: Vec<(u64, u64)>,
    /// There were more than a list can have.
    too_many: bool,
}

impl Sent {
    pub(crate) fn new(key: DigestKey) -> Self {
        Self {
            key,
            log: Mutex::default(),
        }
    }

    pub(crate) fn key(&self) -> &DigestKey {
        &self.key
    }

    /// From now on digests are kept for a list of writes. `before` is what earlier lists say about
    /// other blocks: the new list replaces them, so it includes them.
    pub(crate) fn watch(&self, scope: Scope, before: Vec<(u64, u64)>, replaced: Replaced) {
        self.log().watched = Some(Watched {
            scope,
            writes: before,
            replaced,
            too_many: false,
        });
    }

    /// The lists that this session's list replaces.
    pub(crate) fn replaced(&self) -> Replaced {
        let log = self.log();
        let watched = log.watched.as_ref();
        watched
            .map(|watched| watched.replaced.clone())
            .unwrap_or_default()
    }

    /// Stops keeping a list.
    pub(crate) fn end_watch(&self) {
        self.log().watched = None;
    }

    /// Records that these bytes are sent to an offset of the container file. Returns a number for
    /// [`answered`](Self::answered).
    pub(crate) fn note(&self, offset: u64, bytes: &[u8]) -> u64 {
        let at = since_boot();
        let block = offset / BLOCK;
        let blocks = bytes.chunks(BLOCK_BYTES);
        let digests: Vec<u64> = (block..)
            .zip(blocks)
            .map(|(block, bytes)| self.key.digest(block, bytes))
            .collect();
        let mut log = self.log();
        if let Some(watched) = &mut log.watched {
            watched.note(block, &digests);
        }
        let number = log.next;
        log.next += 1;
        let write = Write {
            at,
            block,
            digests,
            answered: false,
        };
        log.recent.insert(number, write);
        number
    }

    pub(crate) fn answered(&self, number: u64) {
        if let Some(write) = self.log().recent.get_mut(&number) {
            write.answered = true;
        }
    }

    /// A lease check that began at `begun` succeeded. Writes that were answered before can't arrive
    /// late.
    pub(crate) fn lease_checked(&self, begun: Duration) {
        self.log()
            .recent
            .retain(|_, write| !write.answered || write.at >= begun);
    }

    /// How many writes were recorded.
    pub(crate) fn noted(&self) -> u64 {
        self.log().next
    }

    /// Whether every write that was sent was answered, on this and on earlier connections.
    pub(crate) fn is_answered(&self) -> bool {
        self.log().recent.values().all(|write| write.answered)
    }

    /// Leaves a list of writes that may arrive late, or have arrived since the lease was lost.
    /// Returns false if there is nothing to list.
    pub(crate) fn leave_late_list(&self, lock: &Lock, store: &dyn Store) -> Result<bool, Failure> {
        let mut entries: Vec<(u64, u64)> = self
            .log()
            .recent
            .values()
            .flat_map(|write| (write.block..).zip(write.digests.iter().copied()))
            .collect();
        entries.sort_unstable();
        entries.dedup();
        entries.truncate(BLOCKS_MAX);
        if entries.is_empty() {
            return Ok(false);
        }
        self.leave(Kind::Sent, entries, lock, store).map(|()| true)
    }

    /// Leaves a list of what was written, if this session's writes must be compared. Everything
    /// must be durable. Returns false if there is nothing to list.
    pub(crate) fn leave_written_list(
        &self,
        lock: &Lock,
        store: &dyn Store,
    ) -> Result<bool, Failure> {
        let entries = match &self.log().watched {
            None => return Ok(false),
            Some(watched) => watched.last_of_each(),
        };
        let too_many = self.log().watched.as_ref().is_some_and(|w| w.too_many);
        if too_many || entries.len() > BLOCKS_MAX {
            return Err(Failure::failed(
                "this session wrote more than can be listed (16 GiB)",
            ));
        }
        if entries.is_empty() {
            return Ok(false);
        }
        self.leave(Kind::Written, entries, lock, store)
            .map(|()| true)
    }

    fn leave(
        &self,
        kind: Kind,
        entries: Vec<(u64, u64)>,
        lock: &Lock,
        store: &dyn Store,
    ) -> Result<(), Failure> {
        let name = lock.new_late_list_name()?;
        let lease = (lock.number(), lock.token());
        List::new(kind, lease, lock.has_twin(), entries).write(store, &name, &self.key)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().ignore_poison()
    }
}

impl Watched {
    fn note(&mut self, first: u64, digests: &[u64]) {
        for (block, digest) in (first..).zip(digests) {
            if self.scope.has(block) && !self.too_many {
                self.writes.push((block, *digest));
            }
        }
        // A block that was written again counts once.
        if self.writes.len() > 2 * BLOCKS_MAX {
            self.writes = self.last_of_each();
            if self.writes.len() > BLOCKS_MAX {
                self.too_many = true;
                self.writes = Vec::new();
            }
        }
    }

    fn last_of_each(&self) -> Vec<(u64, u64)> {
        let mut writes = self.writes.clone();
        // A stable sort keeps the order of one block's writes.
        writes.sort_by_key(|(block, _)| *block);
        writes.reverse();
        writes.dedup_by_key(|(block, _)| *block);
        writes.reverse();
        writes
    }
}

impl Scope {
    fn has(&self, block: u64) -> bool {
        let Self::Within(ranges) = self else {
            return true;
        };
        let behind = ranges.partition_point(|range| range.end <= block);
        ranges.get(behind).is_some_and(|range| range.start <= block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume_process::late::digest::tests::key;

    fn recent(sent: &Sent) -> Vec<u64> {
        let log = sent.log();
        log.recent.values().map(|write| write.block).collect()
    }

    #[test]
    fn lease_check_drops_writes_that_were_answered_before_it() {
        let sent = Sent::new(key(1));
        let block = [0; 4096];
        let (one, _two) = (sent.note(4096, &block), sent.note(8192, &block));
        sent.answered(one);
        assert!(!sent.is_answered());
        let asked = since_boot();
        std::thread::sleep(Duration::from_millis(2));
        let three = sent.note(12288, &block);
        sent.answered(three);
        sent.lease_checked(asked);
        assert_eq!(recent(&sent), [2, 3], "unanswered, or sent since");
    }

    #[test]
    fn last_bytes_of_each_recorded_block_are_kept() {
        let sent = Sent::new(key(1));
        let before = vec![(1, 7), (9, 8)];
        sent.watch(Scope::Within(vec![1..2, 5..7]), before, Replaced::default());
        sent.note(0, &[1; 3 * 4096]);
        sent.note(6 * 4096, &[2; 4096]);
        sent.note(6 * 4096, &[3; 4096]);
        let log = sent.log();
        let kept = log.watched.as_ref().unwrap().last_of_each();
        let digest = |block, byte| (block, sent.key.digest(block, &[byte; 4096]));
        assert_eq!(kept, [digest(1, 1), digest(6, 3), (9, 8)]);
    }
}
