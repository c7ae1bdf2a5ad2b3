//! The persistent cache of a volume: which blocks enter it, and when it must not be used.
//!
//! Only durable blocks enter: those of an epoch after its flush, and those that the store returned
//! while no write of them was kept. Writing a block removes it from the cache at once. After a lost
//! connection or a failed flush, or if writes are in doubt, nothing of the cache is used any more
//! and no clean marker is written: the next session starts without it. Damage, a full disk or any
//! other error of the cache costs speed, but never the session.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::cache_file::{CacheFile, CacheValidator, CleanMarker, remove_clean_marker};
use crate::plan::Block;
use crate::sample::{self, Digests};
use crate::slots::{Place, Slots, digest_of};
use crate::{BLOCK_BYTES, CacheOptions, CacheSample, VolumeError};

/// Most blocks that wait to be written into the cache: 64 MiB. While so many wait, further blocks
/// are not cached.
const QUEUE_BLOCKS_MAX: usize = 16 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct Cache {
    pub(crate) file: Arc<CacheFile>,
    pub(crate) slots: Slots,
    pub(crate) writing: bool,
    outdated: bool,
    /// Nothing is read from the cache; blocks from the store are compared with it.
    pub(crate) only_compare: bool,
    /// As in [`CacheOptions`].
    pub(crate) stamp_offset_bytes: u64,
    /// Blocks that the store returned with other bytes.
    differing: u64,
    pub(crate) queue: VecDeque<(u64, u64, Block)>,
    /// The ticket of each block that is queued or being written. A write without a valid ticket is
    /// discarded.
    pub(crate) tickets: HashMap<u64, u64>,
    next_ticket: u64,
    pub(crate) busy: bool,
}

impl Cache {
    /// Opens the cache for the state `validator` of the container. This fails only if a session
    /// that may write can't remove the clean marker: going on would not be safe then.
    pub(crate) fn open(
        options: &CacheOptions,
        validator: Option<CacheValidator>,
        writing: bool,
        doubtful: bool,
    ) -> Result<Option<Self>, VolumeError> {
        let slots_max = options.bytes_max / BLOCK_BYTES as u64;
        let slots_max = u32::try_from(slots_max).unwrap_or(u32::MAX);
        let opened = match validator {
            Some(validator) if slots_max > 0 => {
                CacheFile::open(&options.dir, &validator, slots_max, writing).unwrap_or(None)
            }
            _ => None,
        };
        if writing {
            // This is done even if the cache could not be opened or is not used.
            remove_clean_marker(&options.dir).map_err(|source| VolumeError::Cache {
                op: "remove the clean marker of",
                source,
            })?;
        }
        let Some((file, marker)) = opened else {
            return Ok(None);
        };
        let restored = match &marker {
            CleanMarker::Valid(held) if !doubtful => Slots::restored(slots_max, held),
            _ => None,
        };
        let slots = restored.unwrap_or_else(|| Slots::new(slots_max));
        Ok(Some(Self {
            file: Arc::new(file),
            slots,
            writing,
            outdated: marker == CleanMarker::Outdated,
            only_compare: options.only_compare,
            stamp_offset_bytes: options.stamp_offset_bytes,
            differing: 0,
            queue: VecDeque::new(),
            tickets: HashMap::new(),
            next_ticket: 0,
            busy: false,
        }))
    }

    pub(crate) fn find(&self, index: u64) -> Option<Place> {
        self.slots.find(index)
    }

    /// Whether the cache belongs to an older state of the container.
    pub(crate) fn was_outdated(&self) -> bool {
        self.outdated
    }

    /// Whether the session may write.
    pub(crate) fn is_written(&self) -> bool {
        self.writing
    }

    pub(crate) fn differing(&self) -> u64 {
        self.differing
    }

    /// A random sample of the cached blocks.
    pub(crate) fn sample(&self) -> Digests {
        sample::of_cache(&self.slots.held())
    }

    /// Whether `sample` was chosen from what the cache holds now.
    pub(crate) fn has(&self, sample: &CacheSample) -> bool {
        let mut digests = sample.digests.iter();
        digests.all(|(index, digest)| self.find(*index).is_some_and(|at| at.digest == *digest))
    }

    /// Compares a block that the store returned with the cached one.
    pub(crate) fn compare(&mut self, index: u64, block: &[u8]) {
        if self.only_compare
            && let Some(place) = self.slots.find(index)
            && place.digest != digest_of(index, block)
        {
            self.differing += 1;
            self.slots.forget(index);
        }
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.busy || !self.queue.is_empty()
    }

    /// Queues a durable block for the cache.
    pub(crate) fn offer(&mut self, index: u64, block: &Block) {
        let wanted = self.writing
            && self.queue.len() < QUEUE_BLOCKS_MAX
            && !self.tickets.contains_key(&index)
            && self.slots.admits(index);
        if wanted {
            let ticket = self.next_ticket;
            self.next_ticket += 1;
            self.tickets.insert(index, ticket);
            self.queue.push_back((index, ticket, block.clone()));
        }
    }

    /// Removes a block that gets other bytes.
    pub(crate) fn replaced(&mut self, index: u64) {
        self.tickets.remove(&index);
        self.slots.replaced(index);
    }

    /// The blocks that are cached, or queued.
    pub(crate) fn known(&self) -> impl Iterator<Item = u64> {
        self.slots.known().chain(self.tickets.keys().copied())
    }

    /// Removes a block that is not valid any more.
    pub(crate) fn forget(&mut self, index: u64) {
        self.tickets.remove(&index);
        self.slots.forget(index);
    }

    /// Records the result of writing a block to the cache's file. The block counts only if it got
    /// no other bytes since it was offered.
    pub(crate) fn was_stored(&mut self, index: u64, ticket: u64, place: Place, good: bool) {
        let valid = self.tickets.get(&index) == Some(&ticket);
        if valid {
            self.tickets.remove(&index);
        }
        if valid && good {
            self.slots.enter_new(index, place);
        } else {
            self.slots.release(place.slot);
        }
    }

    /// Records the result of reading a place. Returns false if the place holds another block by
    /// now.
    pub(crate) fn was_read(&mut self, index: u64, place: Place, good: bool) -> bool {
        if self.slots.find(index) != Some(place) {
            return false;
        }
        if good {
            self.slots.read(index);
        } else {
            self.slots.forget(index);
        }
        good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(dir: &std::path::Path) -> Cache {
        let options = CacheOptions {
            seen: None,
            dir: dir.to_owned(),
            bytes_max: 64 * BLOCK_BYTES as u64,
            only_compare: false,
            stamp_offset_bytes: 0,
        };
        let validator = CacheValidator {
            file_bytes: 64 * BLOCK_BYTES as u64,
            modified_s: 1,
            offset_bytes: 0,
            stamp_block: vec![0; BLOCK_BYTES],
        };
        let opened = Cache::open(&options, Some(validator), true, false);
        opened.unwrap().unwrap()
    }

    fn block(byte: u8) -> Block {
        Block::from(vec![byte; BLOCK_BYTES])
    }

    /// Stores an offered block, as the keeper does. Calls `meanwhile` between the write and its
    /// end.
    fn store(cache: &mut Cache, index: u64, byte: u8, meanwhile: impl FnOnce(&mut Cache)) {
        cache.offer(index, &block(byte));
        let (index, ticket, block) = cache.queue.pop_front().unwrap();
        let slot = cache.slots.reserve().unwrap();
        cache.file.write(slot, &block).unwrap();
        meanwhile(cache);
        let digest = digest_of(index, &block);
        cache.was_stored(index, ticket, Place { slot, digest }, true);
    }

    #[test]
    fn cache_read_is_dropped_if_the_block_changed_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = cache(dir.path());
        store(&mut cache, 7, 1, |_| {});
        let place = cache.find(7).unwrap();
        assert_eq!(cache.file.read(7, place), Some(vec![1; BLOCK_BYTES]));
        assert!(cache.was_read(7, place, true));
        // Read, and not yet returned.
        cache.replaced(7);
        assert!(!cache.was_read(7, place, true));
        // By now the new bytes are in the cache.
        store(&mut cache, 7, 2, |_| {});
        assert!(!cache.was_read(7, place, true));
        let place = cache.find(7).unwrap();
        assert!(cache.was_read(7, place, true));
        assert!(!cache.was_read(7, place, false), "it is damaged");
        assert_eq!(cache.find(7), None);
    }

    #[test]
    fn block_that_changed_while_it_was_stored_does_not_enter() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = cache(dir.path());
        store(&mut cache, 7, 1, |cache| cache.replaced(7));
        assert_eq!(cache.find(7), None);
        store(&mut cache, 7, 1, |cache| cache.forget(7));
        assert_eq!(cache.find(7), None);
        // Offered again meanwhile: only the later bytes enter.
        store(&mut cache, 7, 1, |cache| {
            cache.replaced(7);
            cache.offer(7, &block(2));
        });
        assert_eq!(cache.find(7), None);
        let (index, ticket, later) = cache.queue.pop_front().unwrap();
        let slot = cache.slots.reserve().unwrap();
        let digest = digest_of(index, &later);
        cache.was_stored(index, ticket, Place { slot, digest }, true);
        assert_eq!(cache.find(7).map(|place| place.digest), Some(digest));
    }
}
