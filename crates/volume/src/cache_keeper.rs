//! Reads of a running volume from its persistent cache, and the thread that writes into the cache.

use std::ops::Range;
use std::sync::MutexGuard;

use sprat_store::StoreFile;

use crate::cache::Cache;
use crate::cache_file::{CacheValidator, remove_clean_marker};
use crate::engine::{Engine, VolumeState};
use crate::plan::Block;
use crate::slots::{Place, digest_of};
use crate::{BLOCK_BYTES, VolumeError};

impl VolumeState {
    /// The blocks of `wanted` that are cached and not yet `found`.
    pub(crate) fn cached(&self, wanted: &Range<u64>, found: &[Option<Block>]) -> Vec<(u64, Place)> {
        let Some(cache) = &self.cache else {
            return Vec::new();
        };
        if self.plan.losses() > 0 || cache.only_compare {
            return Vec::new();
        }
        let missing = wanted.clone().zip(found).filter(|(_, slot)| slot.is_none());
        let cached = missing.filter_map(|(index, _)| Some((index, cache.find(index)?)));
        cached.collect()
    }

    /// Offers durable blocks to the persistent cache. Of a block that was written again, only the
    /// newest bytes enter, once they are durable.
    pub(crate) fn offer<'a>(&mut self, blocks: impl Iterator<Item = (u64, &'a Block)>) {
        let Self { cache, plan, .. } = self;
        let Some(cache) = cache else { return };
        // Only a safeguard: `keep_cache` writes no marker then, so nothing that enters now would be
        // used.
        if plan.losses() > 0 {
            return;
        }
        for (index, block) in blocks {
            if plan.newest(index).is_none() {
                cache.offer(index, block);
            }
        }
    }
}

impl Engine {
    /// Reads blocks from the persistent cache without holding the state's lock. Blocks that are
    /// damaged or were replaced meanwhile are left out and dropped from the cache.
    pub(crate) fn read_cached(&self, cached: &[(u64, Place)]) -> Vec<(u64, Block)> {
        let file = self.state().cache.as_ref().map(|cache| cache.file.clone());
        let Some(file) = file else { return Vec::new() };
        let read: Vec<_> = cached
            .iter()
            .map(|(index, place)| (*index, *place, file.read(*index, *place)))
            .collect();
        let mut state = self.state();
        let VolumeState {
            cache,
            read_cache,
            wire,
            ..
        } = &mut *state;
        let Some(cache) = cache else {
            return Vec::new();
        };
        let mut good = Vec::new();
        for (index, place, bytes) in read {
            if cache.was_read(index, place, bytes.is_some())
                && let Some(bytes) = bytes
            {
                let block = Block::from(bytes);
                read_cache.insert(index, block.clone());
                good.push((index, block));
                wire.cache_read_blocks += 1;
            }
        }
        good
    }

    /// For a reader that found differences between cache and store: the cache is not used again.
    pub(crate) fn drop_cache_that_differs(&self) {
        let differing = self.state().cache.as_ref().map_or(0, Cache::differing);
        if differing > 0
            && let Some(options) = &self.options.cache
        {
            let _ = remove_clean_marker(&options.dir);
        }
    }

    /// Waits until no block waits to enter the cache. The volume has been closed; everything is
    /// durable. `None` if the cache may not be kept.
    pub(crate) fn close_cache(&self) -> Option<ClosedCache> {
        let mut state = self.state();
        while state.cache.as_ref().is_some_and(Cache::is_busy) && !state.cache_stopped {
            state = self.wait(&self.cached, state);
        }
        let doubtful = state.plan.losses() > 0 || !self.options.in_doubt.is_empty();
        let cache = state.cache.take()?;
        let store = state.file.clone();
        drop(state);
        if doubtful || !cache.writing {
            return None;
        }
        let validator = self.closing_validator(&*store, &cache)?;
        Some(ClosedCache { cache, validator })
    }

    /// The state in which the volume leaves the container. Usually the file's attributes came with
    /// the last flush, and the stamp block is the one that was just written.
    fn closing_validator(&self, store: &dyn StoreFile, cache: &Cache) -> Option<CacheValidator> {
        let index = cache.stamp_offset_bytes / BLOCK_BYTES as u64;
        let place = cache.slots.find(index);
        let written = place.and_then(|place| cache.file.read(index, place));
        if let (Some(stat), Some(written)) = (store.stat_behind_flush(), written) {
            return CacheValidator::of(&stat, written, self.geometry);
        }
        let validator = CacheValidator::read(store, self.geometry, cache.stamp_offset_bytes)?;
        // If the stamp block differs, another session has mounted the volume meanwhile, and the
        // cached blocks belong to a state before that.
        let same =
            place.is_none_or(|place| place.digest == digest_of(index, &validator.stamp_block));
        same.then_some(validator)
    }
}

/// The persistent cache of a volume that was closed, not yet marked as clean.
#[derive(Debug)]
pub struct ClosedCache {
    cache: Cache,
    validator: CacheValidator,
}

impl ClosedCache {
    /// Marks the cache as clean for the state in which the volume left the container. Call this
    /// only after a check that no other session acquired the lock before the volume was closed: it
    /// may have written blocks that the cache has in an older state. Without the mark the next
    /// session only has to read more.
    pub fn keep(self) {
        let Self { cache, validator } = self;
        let _ = cache.file.mark_clean(&validator, &cache.slots.held());
    }
}

/// Body of the keeper thread: writes into the cache. After a clean close it goes on until the queue
/// is empty.
pub(crate) fn keep(engine: &Engine) {
    let mut state = engine.state();
    loop {
        let end = state.check();
        if end.is_err_and(|end| !matches!(end, VolumeError::Closed)) {
            break;
        }
        let void = state.plan.losses() > 0;
        let ended = state.ended.is_some();
        let Some(cache) = &mut state.cache else { break };
        if void {
            // No marker will be written, so these writes are not needed.
            cache.queue.clear();
        }
        if let Some((index, ticket, block)) = cache.queue.pop_front() {
            state = enter(engine, state, index, ticket, &block);
        } else if ended {
            break;
        } else {
            state = engine.wait(&engine.cached, state);
        }
    }
    state.cache_stopped = true;
    engine.cached.notify_all();
}

/// Writes a block into the cache, unless it got other bytes since it was offered.
fn enter<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, VolumeState>,
    index: u64,
    ticket: u64,
    block: &Block,
) -> MutexGuard<'a, VolumeState> {
    let Some(cache) = &mut state.cache else {
        return state;
    };
    if cache.tickets.get(&index) != Some(&ticket) {
        return state;
    }
    let Some(slot) = cache.slots.reserve() else {
        cache.tickets.remove(&index);
        return state;
    };
    let file = cache.file.clone();
    cache.busy = true;
    drop(state);
    let digest = digest_of(index, block);
    let written = file.write(slot, block);
    let mut state = engine.state();
    if let Some(cache) = &mut state.cache {
        cache.busy = false;
        cache.was_stored(index, ticket, Place { slot, digest }, written.is_ok());
    }
    state
}
