//! Gives space back to the server, independent of all epochs.

use std::ops::Range;

use sprat_store::{StoreError, StoreErrorKind, StoreFile};

use crate::engine::{Engine, Meaning, VolumeState, meaning};
use crate::{BLOCK_BYTES, VolumeError};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Punches holes in the container file. Gets the open file and byte ranges of it.
pub type Punch<'p> = dyn FnMut(&dyn StoreFile, &[Range<u64>]) -> Result<(), StoreError> + 'p;

impl Engine {
    /// Punches `blocks`, in order. Meanwhile they must not be read or written.
    pub(crate) fn discard(
        &self,
        blocks: &[Range<u64>],
        punch: &mut Punch<'_>,
    ) -> Result<(), VolumeError> {
        let ranges: Vec<Range<u64>> = blocks
            .iter()
            .filter(|range| !range.is_empty())
            .map(|range| self.offset_of(range.start)..self.offset_of(range.end))
            .collect();
        let Some(first) = ranges.first() else {
            return Ok(());
        };
        let mut state = self.state();
        state.check()?;
        let idle = state.plan.is_resolved();
        let (true, Some(connection)) = (idle, state.connection()) else {
            return Err(VolumeError::Discard {
                reason: "writes are waiting or the connection is down",
            });
        };
        // Bytes that are read while the hole is being punched may be old or new. So what is cached
        // of these blocks is dropped now, and again at the end. One of the two would be enough as
        // long as only the read-ahead reads meanwhile, as the contract demands.
        forget(&mut state, blocks);
        drop(state);
        // The journal entry makes the next session wait until nothing can arrive late, and then
        // rewrite the recorded blocks. A hole needs only the wait. So one block is recorded for all
        // of them; otherwise the next session would fill the holes again.
        let mark = first.start..first.start + BLOCK;
        let checked = self
            .session
            .check_lock_now()
            .and_then(|()| self.session.before_send(std::slice::from_ref(&mark)));
        if let Err(fenced) = checked {
            self.fenced(&mut self.state(), connection.generation, fenced);
            return Err(VolumeError::Discard {
                reason: "the lock could not be checked",
            });
        }
        let answer = punch(&*connection.file, &ranges).and_then(|()| connection.file.flush());
        let mut state = self.state();
        forget(&mut state, blocks);
        let Err(source) = answer else {
            drop(state);
            self.session.resolved();
            return Ok(());
        };
        if source.kind() == StoreErrorKind::Unsupported {
            drop(state);
            self.session.resolved();
            return Err(VolumeError::Store {
                op: "discard",
                source,
            });
        }
        // Some of it may have happened, or may still happen: only a new session can resolve that.
        let cause = match meaning("discard", source) {
            Meaning::ConnectionLost(source) => VolumeError::Store {
                op: "discard",
                source,
            },
            Meaning::Fatal(cause) => cause,
        };
        self.fail(&mut state, cause);
        state.check()
    }
}

/// Drops what is cached of `blocks`. They are in order, and may be far more than what is cached.
fn forget(state: &mut VolumeState, blocks: &[Range<u64>]) {
    let gone = |index: &u64| {
        let behind = blocks.partition_point(|range| range.end <= *index);
        blocks
            .get(behind)
            .is_some_and(|range| range.start <= *index)
    };
    for index in state.read_cache.held().filter(gone).collect::<Vec<_>>() {
        state.read_cache.remove(index);
    }
    for index in state.fetches.under_way().filter(gone).collect::<Vec<_>>() {
        state.fetches.taint(index);
    }
    state.proof.forget(&gone);
    if let Some(cache) = &mut state.cache {
        for index in cache.known().filter(gone).collect::<Vec<_>>() {
            cache.forget(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sprat_store::{FileName, ReadClass, Store as _};
    use sprat_testkit::memory::MemoryStore;

    use super::*;
    use crate::plan::Block;
    use crate::{Fenced, Geometry, ReconnectError, SessionHooks, VolumeOptions};

    struct Nobody;

    impl SessionHooks for Nobody {
        fn before_epoch(&self) -> Result<(), Fenced> {
            Ok(())
        }
        fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
            Ok(())
        }
        fn resolved_in_part(&self, _: &[Range<u64>]) {}
        fn resolved(&self) {}
        fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
            unreachable!("no connection is lost here")
        }
    }

    #[test]
    fn discard_drops_cached_blocks_and_reads_under_way() {
        let file = MemoryStore::new().create_new(&FileName::new("x").unwrap());
        let geometry = Geometry {
            offset_bytes: 0,
            len_bytes: 64 * BLOCK,
        };
        let options = VolumeOptions::default();
        let engine = Engine::new(file.unwrap(), geometry, Arc::new(Nobody), options, false);
        let mut state = engine.state();
        let block = Block::from(vec![7; BLOCK_BYTES]);
        (0..6).for_each(|index| state.read_cache.insert(index, block.clone()));
        state.fetches.ask(&[0], ReadClass::Ahead, 16);
        let VolumeState { fetches, plan, .. } = &mut *state;
        let (fetch, _) = fetches.take(plan, 64).unwrap();
        forget(&mut state, &[2..4, 9..10]);
        let held: Vec<u64> = (0..6)
            .filter(|index| state.read_cache.contains(*index))
            .collect();
        assert_eq!(held, [0, 1, 4, 5]);
        // The read-ahead returns the bytes from before.
        let came = state.fetches.finish(&fetch, Some(&[7; 16 * BLOCK_BYTES]));
        let came: Vec<u64> = came.iter().map(|(index, _)| *index).collect();
        assert_eq!(came, [0, 1, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]);
    }

    #[test]
    fn index_is_found_in_ordered_ranges() {
        let ranges = [2..4_u64, 4..5, 9..1 << 40];
        let inside = |index: u64| {
            let behind = ranges.partition_point(|range| range.end <= index);
            ranges.get(behind).is_some_and(|range| range.start <= index)
        };
        let found: Vec<u64> = (0..12).filter(|index| inside(*index)).collect();
        assert_eq!(found, [2, 3, 4, 9, 10, 11]);
    }
}
