//! The read path: newest write, caches, store; and the fetcher threads that read from the store.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_store::{ReadClass, StoreErrorKind};

use crate::engine::{Connection, Engine, FAILURES_MAX, Meaning, VolumeState, meaning};
use crate::fetch::{CLUSTER_BLOCKS, Fetch};
use crate::plan::Block;
use crate::{BLOCK_BYTES, VolumeError};

/// Buffers up to this size are kept between fetches.
const SMALL_BYTES: usize = 64 << 10;

impl Engine {
    /// Returns the newest bytes of each block of `wanted`, as of some moment during the call.
    pub(crate) fn read(&self, wanted: Range<u64>) -> Result<Vec<Block>, VolumeError> {
        let mut found: Vec<Option<Block>> = wanted.clone().map(|_| None).collect();
        let mut fetches: Vec<Arc<Fetch>> = Vec::new();
        let mut state = self.state();
        let mut noted = false;
        loop {
            state.check()?;
            let missing = collect(&mut state, &wanted, &mut found, &fetches);
            if missing.is_empty() {
                break;
            }
            let cached = state.cached(&wanted, &found);
            if !cached.is_empty() {
                drop(state);
                for (index, block) in self.read_cached(&cached) {
                    if let Ok(at) = usize::try_from(index - wanted.start) {
                        found[at] = Some(block);
                    }
                }
                state = self.state();
                continue;
            }
            let mut unreadable = state.unreadable.range(wanted.clone());
            let missed = |index: u64| {
                usize::try_from(index - wanted.start).is_ok_and(|at| found[at].is_none())
            };
            if let Some((_, cause)) = unreadable.find(|(index, _)| missed(**index)) {
                return Err(VolumeError::ReadFailed(cause.clone()));
            }
            fetches = state
                .fetches
                .ask(&missing, ReadClass::Demand, self.run_blocks());
            self.fetch.notify_one();
            if !std::mem::replace(&mut noted, true) {
                self.read_ahead(&mut state, &wanted);
            }
            while fetches.iter().any(|fetch| fetch.outcome.get().is_none()) {
                state = self.wait(&self.fetched, state);
                state.check()?;
            }
        }
        if !noted {
            self.read_ahead(&mut state, &wanted);
        }
        drop(state);
        Ok(found.into_iter().flatten().collect())
    }

    fn run_blocks(&self) -> u64 {
        (self.options.run_bytes_max / BLOCK_BYTES) as u64
    }

    fn read_ahead(&self, state: &mut VolumeState, read: &Range<u64>) {
        // One stream uses at most a quarter of the cache and all together a half; otherwise streams
        // would evict each other's unread blocks.
        let cache_blocks = (self.options.read_cache_bytes_max / BLOCK_BYTES) as u64;
        let bytes_max = self
            .options
            .read_ahead_bytes_max
            .min(self.options.read_cache_bytes_max / 4);
        let window_max = (bytes_max / BLOCK_BYTES) as u64 / CLUSTER_BLOCKS;
        if window_max == 0 || state.fetches.ahead_blocks() > cache_blocks / 2 {
            return;
        }
        let len_blocks = self.geometry.len_bytes / BLOCK_BYTES as u64;
        let ahead = state.streams.note(read, window_max);
        let clusters: Vec<u64> = (ahead.start..ahead.end.min(len_blocks.div_ceil(CLUSTER_BLOCKS)))
            .filter(|cluster| !state.fetches.is_asked(*cluster) && !is_here(state, *cluster))
            .collect();
        if clusters.is_empty() {
            return;
        }
        let run_blocks = state.readahead_window.run_blocks().min(self.run_blocks());
        state.fetches.ask(&clusters, ReadClass::Ahead, run_blocks);
        self.fetch.notify_one();
    }
}

/// Whether a cluster needs no fetch, judged by its first and last block.
fn is_here(state: &VolumeState, cluster: u64) -> bool {
    let first = cluster * CLUSTER_BLOCKS;
    let held = |index| {
        // After a loss the persistent cache is not used.
        let cache = state.cache.as_ref().filter(|_| state.plan.losses() == 0);
        cache.is_some_and(|cache| cache.find(index).is_some())
    };
    let here = |index| {
        state.read_cache.contains(index)
            || state.plan.newest(index).is_some()
            || held(index)
            || state.hole.holds(index)
    };
    here(first) && here(first + CLUSTER_BLOCKS - 1)
}

/// Fills in what is in memory; returns the clusters of the blocks that are missing.
fn collect(
    state: &mut VolumeState,
    wanted: &Range<u64>,
    found: &mut [Option<Block>],
    fetches: &[Arc<Fetch>],
) -> Vec<u64> {
    let mut missing: Vec<u64> = Vec::new();
    for (index, slot) in wanted.clone().zip(found) {
        if slot.is_some() {
            continue;
        }
        *slot = state
            .plan
            .newest(index)
            .or_else(|| fetches.iter().find_map(|fetch| fetch.block(index)))
            .cloned()
            .or_else(|| state.read_cache.read(index))
            .or_else(|| state.hole.block(index));
        let cluster = index / CLUSTER_BLOCKS;
        if slot.is_none() && missing.last() != Some(&cluster) {
            missing.push(cluster);
        }
    }
    missing
}

/// Body of a fetcher thread; returns when the volume ends.
pub(crate) fn fetch(engine: &Engine) {
    let mut buffer = Vec::new();
    let mut state = engine.state();
    while state.ended.is_none() {
        let Some((connection, fetch, class)) = take(&mut state) else {
            state = engine.wait(&engine.fetch, state);
            continue;
        };
        if state.fetches.has_work(state.readahead_window.blocks_max()) {
            engine.fetch.notify_one();
        }
        drop(state);
        let blocks = usize::try_from(fetch.blocks.end - fetch.blocks.start).unwrap_or(0);
        buffer.resize(blocks * BLOCK_BYTES, 0);
        let begun = Instant::now();
        let answer =
            connection
                .file
                .read_at(engine.offset_of(fetch.blocks.start), &mut buffer, class);
        let answer = match answer.map_err(|error| meaning("read", error)) {
            Ok(()) => Ok(None),
            // If a block of a writable volume can't be read, writing on would hide the damage, so
            // the volume fails. A read-only volume goes on with the blocks that can be read.
            Err(Meaning::Fatal(VolumeError::Store { source, .. }))
                if engine.read_only
                    && class == ReadClass::Demand
                    && !engine.state().may_ask_again(engine, &fetch) =>
            {
                one_by_one(engine, &connection, &fetch, &mut buffer)
                    .map(|blocks| Some((blocks, Arc::new(source))))
            }
            Err(meaning) => Err(meaning),
        };
        state = engine.state();
        match answer {
            Ok(unreadable) => {
                let took = unreadable.is_none().then(|| begun.elapsed());
                if let Some((blocks, cause)) = unreadable {
                    for index in blocks {
                        state.fetches.taint(index);
                        state.unreadable.insert(index, cause.clone());
                    }
                }
                arrived(&mut state, &fetch, class, &buffer, took);
                engine.cached.notify_all();
            }
            Err(meaning) => failed(engine, &mut state, &connection, &fetch, class, meaning),
        }
        engine.fetched.notify_all();
        // Dropping the old connection may block, so it is not done while the state is locked.
        drop(state);
        drop(connection);
        if buffer.capacity() > SMALL_BYTES {
            // Together the fetchers keep no more than what is under way.
            buffer = Vec::new();
        }
        state = engine.state();
    }
}

/// Reads the blocks of a failed run one by one: a bad sector must not affect its neighbours, which
/// belong to other files. Returns the blocks that can't be read.
fn one_by_one(
    engine: &Engine,
    connection: &Connection,
    fetch: &Fetch,
    buffer: &mut [u8],
) -> Result<Vec<u64>, Meaning> {
    let run = fetch.blocks.clone();
    if run.end - run.start == 1 {
        return Ok(vec![run.start]);
    }
    let mut unreadable = Vec::new();
    for (index, block) in run.zip(buffer.chunks_exact_mut(BLOCK_BYTES)) {
        let offset = engine.offset_of(index);
        let answer = connection.file.read_at(offset, block, ReadClass::Demand);
        match answer.map_err(|error| meaning("read", error)) {
            Ok(()) => {}
            Err(Meaning::Fatal(VolumeError::Store { .. })) => unreadable.push(index),
            Err(other) => return Err(other),
        }
    }
    Ok(unreadable)
}

/// `took` is set if the bytes came as one answer.
fn arrived(
    state: &mut VolumeState,
    fetch: &Fetch,
    class: ReadClass,
    bytes: &[u8],
    took: Option<Duration>,
) {
    let blocks = fetch.blocks.end - fetch.blocks.start;
    if let Some(took) = took {
        match class {
            ReadClass::Demand if blocks <= CLUSTER_BLOCKS => {
                state.readahead_window.round_trip(took);
            }
            ReadClass::Demand => {}
            ReadClass::Ahead => state.readahead_window.answered(blocks, took),
        }
        state.wire.timed(bytes.len(), took);
    }
    state.wire.read_requests += 1;
    state.wire.read_bytes += bytes.len() as u64;
    let good = state.fetches.finish(fetch, Some(bytes));
    state.answered(false);
    state.proof.read(&good);
    if let Some(cache) = &mut state.cache {
        for (index, block) in &good {
            cache.compare(*index, block);
        }
    }
    state.offer(good.iter().map(|(index, block)| (*index, block)));
    for (index, block) in good {
        state.read_cache.insert(index, block);
    }
}

fn take(state: &mut VolumeState) -> Option<(Connection, Arc<Fetch>, ReadClass)> {
    let connection = state.connection()?;
    let VolumeState {
        fetches,
        plan,
        readahead_window,
        ..
    } = state;
    let (fetch, class) = fetches.take(plan, readahead_window.blocks_max())?;
    Some((connection, fetch, class))
}

fn failed(
    engine: &Engine,
    state: &mut VolumeState,
    connection: &Connection,
    fetch: &Fetch,
    class: ReadClass,
    meaning: Meaning,
) {
    match (meaning, class) {
        (Meaning::ConnectionLost(cause), ReadClass::Ahead) => {
            state.fetches.finish(fetch, None);
            engine.connection_lost(state, connection.generation, cause);
        }
        (Meaning::ConnectionLost(cause), ReadClass::Demand) => {
            state.fetches.put_back(fetch);
            engine.connection_lost(state, connection.generation, cause);
        }
        (Meaning::Fatal(_), ReadClass::Ahead) => {
            state.fetches.finish(fetch, None);
        }
        (Meaning::Fatal(VolumeError::Store { source, op }), ReadClass::Demand)
            if source.kind() == StoreErrorKind::Failed =>
        {
            // A server that has lost its disk for a moment fails in the same way, so another
            // connection is tried.
            let again = match engine.read_only {
                true => true,
                false => state.fetches.failed(fetch) <= FAILURES_MAX,
            };
            if again && !engine.options.reconnect_max.is_zero() {
                state.fetches.put_back(fetch);
                engine.connection_lost(state, connection.generation, source);
            } else {
                engine.fail(state, VolumeError::Store { op, source });
            }
        }
        (Meaning::Fatal(cause), ReadClass::Demand) => engine.fail(state, cause),
    }
}
