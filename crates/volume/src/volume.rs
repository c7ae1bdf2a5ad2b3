//! The public type of this crate: a volume and its calls.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use sprat_store::{StoreError, StoreErrorKind, StoreFile};

use crate::cache::Cache;
use crate::cache_file::{CacheValidator, remove_clean_marker};
use crate::cache_keeper::ClosedCache;
use crate::discard::Punch;
use crate::engine::{Engine, spawn};
use crate::overlay::Overlay;
use crate::plan::Block;
use crate::sample::first_that_differs;
use crate::{
    BLOCK_BYTES, CacheOptions, Fenced, Flush, Geometry, ReadOnlyOptions, SessionHooks, VolumeError,
    VolumeOptions, VolumeStats, cache_keeper, coordinator, lock_checker, read, recover, send,
};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// An ordered, write-back block device over one remote file. Any number of threads may call.
///
/// Offsets and lengths are multiples of [`BLOCK_BYTES`]. After [`failure`](Self::failure) every
/// call fails until the container is opened again. Dropping a volume without [`close`](Self::close)
/// works as [`abort`](Self::abort) and waits for the calls that are under way in the store.
pub struct Volume {
    engine: Arc<Engine>,
    overlay: Option<Overlay>,
    threads: Vec<JoinHandle<()>>,
}

impl Volume {
    /// Opens for reading and writing.
    ///
    /// Recovers the in-doubt writes of a session that died: waits for the end of their quiet time,
    /// then reads them and writes them again, durably.
    pub fn open(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn SessionHooks>,
        options: VolumeOptions,
    ) -> Result<Self, VolumeError> {
        let validator = present_validator(options.cache.as_ref(), &*file, geometry);
        check_geometry(&*file, geometry, validator.as_ref())?;
        let senders = options.writers.max(1);
        let doubtful = !options.in_doubt.is_empty();
        let stamp = stamp_block(options.cache.as_ref(), validator.as_ref());
        let cache = match &options.cache {
            Some(cache) => Cache::open(cache, validator, true, doubtful)?,
            None => None,
        };
        compare_sample(&*file, geometry, options.cache.as_ref(), cache.as_ref())?;
        let engine = Engine::new(file, geometry, session, options, false);
        engine.state().cache = cache;
        if let Some((index, block)) = stamp {
            engine.state().proof.opened(index, &block);
        }
        let volume = Self::start(engine, None, senders)?;
        recover::recover_dead_session(&volume.engine)?;
        let mut state = volume.engine.state();
        state.held_back = volume.engine.options.hold_back;
        drop(state);
        Ok(volume)
    }

    /// Opens without ever writing to the store. Writes go to a local file without a name.
    pub fn open_read_only(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn SessionHooks>,
        options: ReadOnlyOptions,
    ) -> Result<Self, VolumeError> {
        let validator = present_validator(options.cache.as_ref(), &*file, geometry);
        check_geometry(&*file, geometry, validator.as_ref())?;
        let ReadOnlyOptions {
            overlay_dir,
            overlay_bytes_max,
            ..
        } = options;
        let overlay = Overlay::new(&overlay_dir, overlay_bytes_max)?;
        let options = VolumeOptions {
            read_cache_bytes_max: options.read_cache_bytes_max,
            readers: options.readers,
            read_ahead_bytes_max: options.read_ahead_bytes_max,
            reconnect_max: options.reconnect_max,
            reconnect_delay: options.reconnect_delay,
            quiet_time: Duration::ZERO,
            cache: options.cache,
            ..VolumeOptions::default()
        };
        let cache = match &options.cache {
            Some(cache) => Cache::open(cache, validator, false, false)?,
            None => None,
        };
        compare_sample(&*file, geometry, options.cache.as_ref(), cache.as_ref())?;
        let engine = Engine::new(file, geometry, session, options, true);
        engine.state().cache = cache;
        engine.read_known();
        Self::start(engine, Some(overlay), 0)
    }

    /// Reports that another user of the same connection found it lost. The volume reconnects now,
    /// not at its next call.
    pub fn connection_lost(&self, cause: StoreError) {
        let mut state = self.engine.state();
        if let Some(generation) = state.plan.connection() {
            self.engine.connection_lost(&mut state, generation, cause);
        }
    }

    fn start(
        engine: Engine,
        overlay: Option<Overlay>,
        senders: usize,
    ) -> Result<Self, VolumeError> {
        let fetchers = engine.options.readers.max(2);
        let mut volume = Self {
            engine: Arc::new(engine),
            overlay,
            threads: Vec::new(),
        };
        // From here on a failure drops `volume`, which ends the threads that were started.
        volume.spawn("coordinator".to_owned(), coordinator::coordinate)?;
        for number in 0..senders {
            volume.spawn(format!("sender-{number}"), send::send_runs)?;
        }
        // Without senders nothing is sent, so the lock needs no check.
        let checkers = if senders > 0 {
            lock_checker::LOCK_CHECKERS
        } else {
            0
        };
        for number in 0..checkers {
            volume.spawn(format!("lock-checker-{number}"), lock_checker::check_ahead)?;
        }
        if senders > 0 {
            volume.spawn("keeper".to_owned(), cache_keeper::keep)?;
        }
        for number in 0..fetchers {
            volume.spawn(format!("fetcher-{number}"), read::fetch)?;
        }
        Ok(volume)
    }

    fn spawn(&mut self, name: String, body: fn(&Engine)) -> Result<(), VolumeError> {
        self.threads.push(spawn(&self.engine, name, body)?);
        Ok(())
    }

    /// Returns the length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a volume is never empty")]
    pub fn len(&self) -> u64 {
        self.engine.geometry.len_bytes
    }

    /// Fills `buf` with the newest bytes at `offset`.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), VolumeError> {
        let blocks = self.blocks("read", offset, buf.len() as u64)?;
        let mut pieces = buf.chunks_exact_mut(BLOCK_BYTES);
        let mut fill = |bytes: &[u8]| {
            pieces
                .next()
                .expect("one piece a block")
                .copy_from_slice(bytes);
        };
        let Some(overlay) = &self.overlay else {
            self.engine
                .read(blocks)?
                .iter()
                .for_each(|block| fill(block));
            return Ok(());
        };
        self.engine.state().check()?;
        let mut index = blocks.start;
        while index < blocks.end {
            if let Some(block) = overlay.read(index)? {
                fill(&block);
                index += 1;
                continue;
            }
            let mut end = index + 1;
            while end < blocks.end && !overlay.holds(end) {
                end += 1;
            }
            self.engine
                .read(index..end)?
                .iter()
                .for_each(|block| fill(block));
            index = end;
        }
        Ok(())
    }

    /// Copies `data` for `offset`. Returns before it is sent; waits only for free space in the
    /// buffer.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        let blocks = self.blocks("write", offset, data.len() as u64)?;
        match &self.overlay {
            None => self.engine.write(blocks.start, data),
            Some(overlay) => {
                self.engine.state().check()?;
                let Err(error) = overlay.write(blocks.start, data) else {
                    return Ok(());
                };
                // A replay that stopped half-way is a state that the file system never had. A
                // reader that went on would report it as damage.
                let mut state = self.engine.state();
                self.engine.fail(&mut state, error);
                state.check()
            }
        }
    }

    /// Punches a hole: the server gets the space of a range back, and the range reads as zeros.
    ///
    /// Call this only while nothing waits to be written (after a `Durable` flush, with no other
    /// writer): a discard has no order with writes.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.discard_by(
            std::slice::from_ref(&(offset..offset.saturating_add(len))),
            &mut |file, ranges| {
                ranges
                    .iter()
                    .try_for_each(|range| file.discard(range.start, range.end - range.start))
            },
        )
    }

    /// Punches several ranges, given in order, with `punch`. It gets the open file and the file's
    /// ranges. It must not return before it is certain that nothing of them can still happen.
    ///
    /// If `punch` fails with `Unsupported`, that error is returned and the volume goes on
    /// unchanged. Any other error ends the volume, and the next session that opens the container
    /// waits until nothing can arrive late.
    pub fn discard_by(
        &self,
        ranges: &[Range<u64>],
        punch: &mut Punch<'_>,
    ) -> Result<(), VolumeError> {
        if self.overlay.is_some() {
            return Err(VolumeError::Discard {
                reason: "the volume is read-only",
            });
        }
        let blocks: Result<Vec<_>, _> = ranges
            .iter()
            .map(|range| {
                let len = range.end.saturating_sub(range.start);
                self.blocks("discard", range.start, len)
            })
            .collect();
        self.engine.discard(&blocks?, punch)
    }

    /// Allows what was held back ([`VolumeOptions::hold_back`]) to be sent.
    pub fn may_send(&self) {
        self.engine.state().held_back = false;
        self.engine.wake_all();
    }

    /// Orders, or makes durable, everything written by calls that have returned.
    pub fn flush(&self, flush: Flush) -> Result<(), VolumeError> {
        self.engine.flush(flush)
    }

    /// Whether the persistent cache belonged to another state of the container than the opened one:
    /// since this machine's last clean close another machine has written to the file. Such a cache
    /// is not used.
    #[must_use]
    pub fn cache_was_outdated(&self) -> bool {
        let state = self.engine.state();
        state.cache.as_ref().is_some_and(Cache::was_outdated)
    }

    /// How many blocks differ between the store and a persistent cache of the same state of the
    /// container. Counted only if the volume was opened to compare.
    #[must_use]
    pub fn differing_blocks(&self) -> u64 {
        self.engine
            .state()
            .cache
            .as_ref()
            .map_or(0, Cache::differing)
    }

    /// Counters of what was done, and what is kept now.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        self.engine.stats()
    }

    /// Makes everything durable, reads all in-doubt blocks back, and reports to the session that
    /// all writes are resolved. After a loss it waits for the end of the quiet time. Every later
    /// call fails.
    pub fn close(&self) -> Result<(), VolumeError> {
        if let Some(cache) = self.engine.close()? {
            // Checked after the cache's state was read: a session that gets the lock from now on
            // changes the state that the marker is compared with.
            if self.engine.session.check_lock_now().is_ok() {
                cache.keep();
            }
        }
        Ok(())
    }

    /// As [`close`](Self::close), but leaves it to the caller to keep the persistent cache, with
    /// [`ClosedCache::keep`]. This saves the round trips of a lock check if the caller makes one
    /// anyway.
    pub fn close_without_cache(&self) -> Result<Option<ClosedCache>, VolumeError> {
        self.engine.close()
    }

    /// Why every call fails; `None` while the volume works and after a clean close.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<VolumeError>> {
        let state = self.engine.state();
        state
            .ended
            .clone()
            .filter(|cause| !matches!(**cause, VolumeError::Closed))
    }

    /// Stops sending at once and fails every call, including those that wait. What is under way in
    /// the store may still arrive.
    pub fn abort(&self) {
        let mut state = self.engine.state();
        self.engine.fail(&mut state, VolumeError::Aborted);
    }

    /// As [`abort`](Self::abort), for a session that has found out itself that the lock is lost.
    pub fn fence(&self, cause: Fenced) {
        let mut state = self.engine.state();
        self.engine.fail(&mut state, VolumeError::Fenced(cause));
    }

    fn blocks(&self, op: &'static str, offset: u64, len: u64) -> Result<Range<u64>, VolumeError> {
        if !offset.is_multiple_of(BLOCK) || !len.is_multiple_of(BLOCK) {
            return Err(VolumeError::Unaligned { op, offset, len });
        }
        let volume_bytes = self.len();
        match offset.checked_add(len) {
            Some(end) if end <= volume_bytes => Ok(offset / BLOCK..end / BLOCK),
            _ => Err(VolumeError::OutOfRange {
                op,
                offset,
                len,
                volume_bytes,
            }),
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.abort();
        let mut threads = std::mem::take(&mut self.threads);
        threads.append(&mut self.engine.state().closers);
        for thread in threads {
            // A thread that panicked has failed the volume already.
            let _ = thread.join();
        }
    }
}

/// The state of the container that the cache is compared with; `None` if there is no cache.
fn present_validator(
    cache: Option<&CacheOptions>,
    file: &dyn StoreFile,
    geometry: Geometry,
) -> Option<CacheValidator> {
    let cache = cache?;
    match &cache.seen {
        Some(seen) => CacheValidator::of(&seen.stat, seen.stamp_block.clone(), geometry),
        None => CacheValidator::read(file, geometry, cache.stamp_offset_bytes),
    }
}

/// The stamp block and its number, as the store has it.
fn stamp_block(
    cache: Option<&CacheOptions>,
    validator: Option<&CacheValidator>,
) -> Option<(u64, Block)> {
    let index = cache?.stamp_offset_bytes / BLOCK;
    Some((index, Block::from(validator?.stamp_block.clone())))
}

/// Compares some blocks of the cache with the container, in one round trip. If one differs, the
/// cache is dropped: it belongs to a state that the server does not have.
///
/// A connection that is lost meanwhile is no error, as the cache is not used after a loss. A block
/// that can't be read is no error for a read-only volume: the other blocks may still be readable.
fn compare_sample(
    file: &dyn StoreFile,
    geometry: Geometry,
    options: Option<&CacheOptions>,
    cache: Option<&Cache>,
) -> Result<(), VolumeError> {
    // With `only_compare` each block is compared when it is read.
    let (Some(options), Some(cache)) = (options.filter(|options| !options.only_compare), cache)
    else {
        return Ok(());
    };
    let read = options.seen.as_ref().and_then(|seen| seen.sample.as_ref());
    let differs = match read.filter(|sample| cache.has(sample)) {
        Some(sample) => Ok(sample.first_that_differs()),
        None => first_that_differs(file, geometry, &cache.sample()),
    };
    let index = match differs {
        Ok(Some(index)) => index,
        Ok(None) => return Ok(()),
        Err(error) if error.kind() == StoreErrorKind::Disconnected || !cache.is_written() => {
            return Ok(());
        }
        Err(source) => return Err(VolumeError::Store { op: "read", source }),
    };
    // On a read-only file system the marker stays.
    let _ = remove_clean_marker(&options.dir);
    Err(VolumeError::CacheDiffers {
        offset: geometry.offset_bytes + index * BLOCK,
    })
}

/// Checks that the file is long enough for the volume. Takes the file's length from `validator` if
/// there is one.
fn check_geometry(
    file: &dyn StoreFile,
    geometry: Geometry,
    validator: Option<&CacheValidator>,
) -> Result<(), VolumeError> {
    let Geometry {
        offset_bytes,
        len_bytes,
    } = geometry;
    let aligned = offset_bytes.is_multiple_of(BLOCK) && len_bytes.is_multiple_of(BLOCK);
    let end = offset_bytes.checked_add(len_bytes);
    let (true, true, Some(needed_bytes)) = (aligned, len_bytes > 0, end) else {
        return Err(VolumeError::Geometry {
            offset_bytes,
            len_bytes,
        });
    };
    let file_bytes = match validator {
        Some(validator) => validator.file_bytes,
        None => file
            .len()
            .map_err(|source| VolumeError::Store { op: "len", source })?,
    };
    if file_bytes < needed_bytes {
        return Err(VolumeError::Short {
            file_bytes,
            needed_bytes,
        });
    }
    Ok(())
}
