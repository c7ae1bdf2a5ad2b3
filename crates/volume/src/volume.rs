//! The volume as its callers see it.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use sprat_store::{StoreError, StoreErrorKind, StoreFile};

use crate::cache::Cache;
use crate::cache_file::{Basis, remove_mark};
use crate::discard::Punch;
use crate::engine::{Engine, spawn};
use crate::overlay::Overlay;
use crate::sample::first_that_differs;
use crate::{
    BLOCK_BYTES, CacheOptions, Fenced, Flush, Geometry, ReadOnlyOptions, Session, VolumeError,
    VolumeOptions, VolumeStats, cache_keeper, coordinator, lock_checker, read, recover, send,
};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// An ordered, write-back block device over one remote file. Any number of threads may call.
///
/// Offsets and lengths are multiples of [`BLOCK_BYTES`]. After [`failure`](Self::failure) every
/// call fails until the container is opened again. Dropping without [`close`](Self::close) is
/// [`abort`](Self::abort), and waits for the calls that are under way in the store.
pub struct Volume {
    engine: Arc<Engine>,
    overlay: Option<Overlay>,
    threads: Vec<JoinHandle<()>>,
}

impl Volume {
    /// Opens for reading and writing.
    ///
    /// Waits out the quiet time of a dead session's suspects and writes them anew, durably.
    pub fn open(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn Session>,
        options: VolumeOptions,
    ) -> Result<Self, VolumeError> {
        let basis = present_basis(options.cache.as_ref(), &*file, geometry);
        check_geometry(&*file, geometry, basis.as_ref())?;
        let senders = options.writers.max(1);
        let doubtful = !options.suspects.is_empty();
        let cache = match &options.cache {
            Some(cache) => Cache::open(cache, basis, true, doubtful)?,
            None => None,
        };
        compare_sample(&*file, geometry, options.cache.as_ref(), cache.as_ref())?;
        let engine = Engine::new(file, geometry, session, options, false);
        engine.state().cache = cache;
        let volume = Self::start(engine, None, senders)?;
        recover::suspects_of_dead_session(&volume.engine)?;
        let mut state = volume.engine.state();
        state.held_back = volume.engine.options.hold_back;
        drop(state);
        Ok(volume)
    }

    /// Opens without ever writing to the store: writes go to a local file without a name.
    pub fn open_read_only(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn Session>,
        options: ReadOnlyOptions,
    ) -> Result<Self, VolumeError> {
        let basis = present_basis(options.cache.as_ref(), &*file, geometry);
        check_geometry(&*file, geometry, basis.as_ref())?;
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
            Some(cache) => Cache::open(cache, basis, false, false)?,
            None => None,
        };
        compare_sample(&*file, geometry, options.cache.as_ref(), cache.as_ref())?;
        let engine = Engine::new(file, geometry, session, options, true);
        engine.state().cache = cache;
        Self::start(engine, Some(overlay), 0)
    }

    /// Somebody who uses the same connection found it lost: it is sought again now, not at the next
    /// call.
    pub fn line_lost(&self, cause: StoreError) {
        let mut state = self.engine.state();
        if let Some(generation) = state.plan.connection() {
            self.engine.line_lost(&mut state, generation, cause);
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
        volume.spawn("conductor".to_owned(), coordinator::conduct)?;
        for number in 0..senders {
            volume.spawn(format!("sender-{number}"), send::send_runs)?;
        }
        // Nothing is sent without senders, and needs no permits.
        let permitters = if senders > 0 {
            lock_checker::PERMITTERS
        } else {
            0
        };
        for number in 0..permitters {
            volume.spawn(format!("permitter-{number}"), lock_checker::permit_ahead)?;
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

    /// Length in bytes.
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

    /// Takes a copy of `data` for `offset`; returns before it is sent, and waits only for room.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        let blocks = self.blocks("write", offset, data.len() as u64)?;
        match &self.overlay {
            None => self.engine.write(blocks.start, data),
            Some(overlay) => {
                self.engine.state().check()?;
                let Err(error) = overlay.write(blocks.start, data) else {
                    return Ok(());
                };
                // Half of a replay is no state that the file system ever had: whoever reads on
                // would take it for damage.
                let mut state = self.engine.state();
                self.engine.fail(&mut state, error);
                state.check()
            }
        }
    }

    /// Gives the space of a range back to the server; the range then holds zeros.
    ///
    /// Only while nothing waits to be written (after a `Durable` flush, with nobody writing), as
    /// it is ordered with nothing.
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

    /// The same for ranges in order, with `punch` doing it: it gets the open file and the ranges
    /// of it, and returns once nothing of them is still to happen.
    ///
    /// An `Unsupported` of it is handed on and leaves the volume as it was; any other error ends
    /// the volume, and whoever opens the container next waits until nothing can come late.
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

    /// What was held back ([`VolumeOptions::hold_back`]) may be sent from now on.
    pub fn may_send(&self) {
        self.engine.state().held_back = false;
        self.engine.wake_all();
    }

    /// Orders, or makes durable, everything written by calls that have returned.
    pub fn flush(&self, flush: Flush) -> Result<(), VolumeError> {
        self.engine.flush(flush)
    }

    /// Whether the persistent cache was of another state of the container than the one that was
    /// opened: since this machine's last clean close somebody else has written to the file. Nothing
    /// of it is used then.
    #[must_use]
    pub fn cache_was_outdated(&self) -> bool {
        let state = self.engine.state();
        state.cache.as_ref().is_some_and(Cache::was_outdated)
    }

    /// How many blocks the store gave with other bytes than the persistent cache has of the same
    /// state of the container, where it was opened to compare.
    #[must_use]
    pub fn differing_blocks(&self) -> u64 {
        self.engine
            .state()
            .cache
            .as_ref()
            .map_or(0, Cache::differing)
    }

    /// What was done and is held now.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        self.engine.stats()
    }

    /// Makes everything durable, reads all suspects back (after a loss this waits for the end of
    /// the quiet time) and tells the session that all is settled; every later call fails.
    pub fn close(&self) -> Result<(), VolumeError> {
        self.engine.close()
    }

    /// Why the volume refuses everything; `None` while it works and after an orderly close.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<VolumeError>> {
        let state = self.engine.state();
        state
            .ended
            .clone()
            .filter(|cause| !matches!(**cause, VolumeError::Closed))
    }

    /// Stops sending at once and fails every call, waiting ones too. What is under way in the
    /// store may still arrive.
    pub fn abort(&self) {
        let mut state = self.engine.state();
        self.engine.fail(&mut state, VolumeError::Aborted);
    }

    /// As [`abort`](Self::abort), for a session that has found out by itself that the lock is lost.
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
            // A thread that panicked has failed the volume; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

/// The state that the cache is compared with, of a container that has one.
fn present_basis(
    cache: Option<&CacheOptions>,
    file: &dyn StoreFile,
    geometry: Geometry,
) -> Option<Basis> {
    match &cache?.seen {
        Some(seen) => Basis::of(&seen.stat, seen.first_block.clone(), geometry),
        None => Basis::read(file, geometry),
    }
}

/// Compares some of the blocks that the cache holds with the container, in one round trip. Where
/// one differs the cache is dropped: it is of a state that the server doesn't have.
///
/// A line that is lost meanwhile is no error: nothing of the cache is used after a loss. Nor, for
/// a reader, is a block that can't be read: others may still be worth having.
fn compare_sample(
    file: &dyn StoreFile,
    geometry: Geometry,
    options: Option<&CacheOptions>,
    cache: Option<&Cache>,
) -> Result<(), VolumeError> {
    // What is only compared is compared as it is read.
    let (Some(options), Some(cache)) = (options.filter(|options| !options.only_compare), cache)
    else {
        return Ok(());
    };
    let index = match first_that_differs(file, geometry, &cache.sample()) {
        Ok(Some(index)) => index,
        Ok(None) => return Ok(()),
        Err(error) if error.kind() == StoreErrorKind::Disconnected || !cache.is_written() => {
            return Ok(());
        }
        Err(source) => return Err(VolumeError::Store { op: "read", source }),
    };
    // A reader on a file system that can't be written to leaves it.
    let _ = remove_mark(&options.dir);
    Err(VolumeError::CacheDiffers {
        offset: geometry.offset_bytes + index * BLOCK,
    })
}

/// The file must reach as far as the volume; `basis`, if there is one, tells how far it does.
fn check_geometry(
    file: &dyn StoreFile,
    geometry: Geometry,
    basis: Option<&Basis>,
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
    let file_bytes = match basis {
        Some(basis) => basis.file_bytes,
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
