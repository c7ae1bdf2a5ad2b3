//! Which blocks the persistent cache holds, where, and which of them is evicted next; no I/O.
//!
//! Replacement is 2Q with an admission budget. A block enters on trial; the trial queue is first
//! in, first out, and is evicted first. A block that is read again, or whose bytes were replaced
//! while it was cached (metadata), is kept: the kept queue is least recently used and holds at most
//! three quarters. In one session, new blocks may use a quarter of the cache. Further ones are not
//! cached, so that a long stream neither empties the cache nor wears out the disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hasher};

/// Where a block is in the cache's file, and the digest of its number and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u32,
    pub(crate) digest: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    place: Place,
    stamp: u64,
    kept: bool,
}

/// What is stored about a block between sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CachedBlock {
    pub(crate) index: u64,
    pub(crate) place: Place,
    pub(crate) kept: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Slots {
    slots_max: u32,
    entries: HashMap<u64, Entry>,
    trial: BTreeMap<u64, u64>,
    kept: BTreeMap<u64, u64>,
    free: Vec<u32>,
    next_slot: u32,
    next_stamp: u64,
    /// Blocks whose bytes were replaced while they were cached.
    again: HashSet<u64>,
    budget: u32,
}

impl Slots {
    pub(crate) fn new(slots_max: u32) -> Self {
        Self {
            slots_max,
            entries: HashMap::new(),
            trial: BTreeMap::new(),
            kept: BTreeMap::new(),
            free: Vec::new(),
            next_slot: 0,
            next_stamp: 0,
            again: HashSet::new(),
            budget: slots_max / 4,
        }
    }

    /// Restores the blocks of an earlier session, in order; `None` if they contradict each other.
    pub(crate) fn restored(slots_max: u32, held: &[CachedBlock]) -> Option<Self> {
        let mut slots = Self::new(slots_max);
        let mut used = HashSet::new();
        for entry in held {
            if entry.place.slot >= slots_max {
                continue;
            }
            if slots.entries.contains_key(&entry.index) || !used.insert(entry.place.slot) {
                return None;
            }
            slots.enter(entry.index, entry.place, entry.kept);
        }
        slots.next_slot = used.iter().max().map_or(0, |highest| highest + 1);
        slots.free = (0..slots.next_slot)
            .filter(|slot| !used.contains(slot))
            .collect();
        Some(slots)
    }

    /// All cached blocks, oldest first.
    pub(crate) fn held(&self) -> Vec<CachedBlock> {
        let both = self.trial.iter().chain(&self.kept);
        let mut stamps: Vec<(u64, u64)> = both.map(|(stamp, index)| (*stamp, *index)).collect();
        stamps.sort_unstable();
        let held = stamps.iter().map(|(_, index)| {
            let entry = self.entries[index];
            CachedBlock {
                index: *index,
                place: entry.place,
                kept: entry.kept,
            }
        });
        held.collect()
    }

    /// The blocks that are cached, or may enter again without budget.
    pub(crate) fn known(&self) -> impl Iterator<Item = u64> {
        self.entries.keys().chain(&self.again).copied()
    }

    pub(crate) fn find(&self, index: u64) -> Option<Place> {
        Some(self.entries.get(&index)?.place)
    }

    /// Keeps a cached block because it was read.
    pub(crate) fn read(&mut self, index: u64) {
        if let Some(entry) = self.take(index) {
            self.enter(index, entry.place, true);
        }
    }

    /// Removes a block that is about to get other bytes.
    pub(crate) fn replaced(&mut self, index: u64) {
        if let Some(entry) = self.take(index) {
            self.free.push(entry.place.slot);
            if self.again.len() < self.slots_max as usize {
                self.again.insert(index);
            }
        }
    }

    /// Removes a block that is damaged or not valid any more.
    pub(crate) fn forget(&mut self, index: u64) {
        self.again.remove(&index);
        if let Some(entry) = self.take(index) {
            self.free.push(entry.place.slot);
        }
    }

    /// Whether a block may enter. A block that is new to the cache uses up budget.
    pub(crate) fn admits(&mut self, index: u64) -> bool {
        if self.slots_max == 0 || self.entries.contains_key(&index) {
            return false;
        }
        if self.again.contains(&index) {
            return true;
        }
        let within = self.budget > 0;
        self.budget -= u32::from(within);
        within
    }

    /// Returns a slot for a block. If none is free, the oldest block on trial is evicted, or else
    /// the least recently used one.
    pub(crate) fn reserve(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.next_slot < self.slots_max {
            self.next_slot += 1;
            return Some(self.next_slot - 1);
        }
        let (_, victim) = self
            .trial
            .first_key_value()
            .or_else(|| self.kept.first_key_value())?;
        Some(self.take(*victim)?.place.slot)
    }

    /// A slot from [`reserve`](Self::reserve) now holds the block's bytes.
    pub(crate) fn enter_new(&mut self, index: u64, place: Place) {
        let kept = self.again.remove(&index);
        if let Some(old) = self.take(index) {
            self.free.push(old.place.slot);
        }
        self.enter(index, place, kept);
    }

    /// A slot from [`reserve`](Self::reserve) was not used.
    pub(crate) fn release(&mut self, slot: u32) {
        self.free.push(slot);
    }

    fn enter(&mut self, index: u64, place: Place, kept: bool) {
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        self.entries.insert(index, Entry { place, stamp, kept });
        if !kept {
            self.trial.insert(stamp, index);
            return;
        }
        self.kept.insert(stamp, index);
        if self.kept.len() > (self.slots_max - self.slots_max / 4) as usize
            && let Some((stamp, oldest)) = self.kept.pop_first()
        {
            self.trial.insert(stamp, oldest);
            if let Some(entry) = self.entries.get_mut(&oldest) {
                entry.kept = false;
            }
        }
    }

    fn take(&mut self, index: u64) -> Option<Entry> {
        let entry = self.entries.remove(&index)?;
        let queue = if entry.kept {
            &mut self.kept
        } else {
            &mut self.trial
        };
        queue.remove(&entry.stamp);
        Some(entry)
    }
}

/// Detects every accidental change; to change the cache's files on purpose one must be root here.
/// If another version of Rust hashes differently, the cache is dropped.
pub(crate) fn digest_of(index: u64, bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write_u64(index);
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(slots: &mut Slots, index: u64) -> bool {
        if !slots.admits(index) {
            return false;
        }
        let Some(slot) = slots.reserve() else {
            return false;
        };
        slots.enter_new(index, Place { slot, digest: 0 });
        true
    }

    fn fresh_session(slots: &Slots) -> Slots {
        Slots::restored(slots.slots_max, &slots.held()).expect("consistent")
    }

    #[test]
    fn metadata_survives_streams_larger_than_the_cache() {
        let mut slots = Slots::new(64);
        for index in 0..16 {
            assert!(put(&mut slots, index));
        }
        for session in 0..8 {
            slots = fresh_session(&slots);
            for index in 0..16 {
                assert!(
                    slots.find(index).is_some(),
                    "session {session} lost {index}"
                );
                if index % 2 == 0 {
                    slots.read(index);
                } else {
                    slots.replaced(index);
                    assert!(put(&mut slots, index));
                }
            }
            let stream = 1000 * (session + 1)..1000 * (session + 1) + 640;
            let entered = stream.filter(|index| put(&mut slots, *index)).count();
            assert_eq!(entered, 16, "a quarter of the cache");
            assert!(slots.entries.len() <= 64);
        }
    }

    #[test]
    fn no_slot_is_given_to_two_blocks() {
        let mut slots = Slots::new(8);
        let mut dice = 7u64;
        for step in 0..4000u64 {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let index = (dice >> 33) % 24;
            match (dice >> 60) % 5 {
                0 | 1 => drop(put(&mut slots, index)),
                2 => slots.read(index),
                3 => slots.replaced(index),
                _ => slots.forget(index),
            }
            if step % 64 == 0 {
                slots = fresh_session(&slots);
            }
            let used: HashSet<u32> = slots.held().iter().map(|held| held.place.slot).collect();
            assert_eq!(used.len(), slots.entries.len(), "step {step}");
            assert_eq!(slots.entries.len(), slots.trial.len() + slots.kept.len());
            assert!(
                used.iter()
                    .all(|slot| *slot < 8 && !slots.free.contains(slot))
            );
        }
    }

    #[test]
    fn contradicting_entries_are_not_restored() {
        let held = |index, slot| CachedBlock {
            index,
            place: Place { slot, digest: 0 },
            kept: false,
        };
        assert!(Slots::restored(8, &[held(1, 0), held(2, 0)]).is_none());
        assert!(Slots::restored(8, &[held(1, 0), held(1, 1)]).is_none());
        assert!(Slots::restored(8, &[held(1, 0), held(2, 9)]).is_some());
    }
}
