//! State shared by the threads of one volume: the plan, the caches, the current connection, the
//! end.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use sprat_store::{IgnorePoison, Outage, StoreError, StoreErrorKind, StoreFile};

use crate::cache::Cache;
use crate::fetch::{Fetch, Fetches};
use crate::hole::Hole;
use crate::lock_checks::LockChecks;
use crate::plan::{Generation, Limits, Plan};
use crate::proof::Proof;
use crate::read_cache::ReadCache;
use crate::readahead_window::ReadaheadWindow;
use crate::session_hooks::{Fenced, SessionHooks, guard_writes};
use crate::streams::Streams;
use crate::threads::named;
use crate::upload_limit::UploadLimit;
use crate::{BLOCK_BYTES, Flush, Geometry, VolumeError, VolumeOptions, VolumeStats};

/// One connection to the container file.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) file: Arc<dyn StoreFile>,
    pub(crate) generation: Generation,
}

/// The latest loss, and what must succeed on the next connection before the outage counts as over.
pub(crate) struct Loss {
    pub(crate) since_system: SystemTime,
    /// The latest error: the one that lost the connection, or the one that kept it from being
    /// restored.
    pub(crate) last: Option<StoreError>,
    /// Reads that a caller waits for.
    owed_reads: Vec<Arc<Fetch>>,
    /// A caller waits for blocks to become durable.
    owes_writes: bool,
}

/// Failures of the store in a row, each on a new connection, that are retried before the volume
/// fails.
pub(crate) const FAILURES_MAX: u32 = 3;

/// Refused requests that are this far apart do not count as in a row.
const FAILURES_APART: Duration = Duration::from_secs(60);

/// How often a read-only volume reconnects because of unreadable blocks: a disk with many of them
/// must not cause many logins.
const ASK_AGAIN_INTERVAL: Duration = Duration::from_secs(60);

/// The end of the quiet time of a loss.
pub(crate) struct Quiet {
    pub(crate) loss: u64,
    pub(crate) until: Instant,
}

#[derive(Default)]
pub(crate) struct Wire {
    pub(crate) written_bytes: u64,
    pub(crate) write_requests: u64,
    pub(crate) read_bytes: u64,
    pub(crate) read_requests: u64,
    pub(crate) flushes: u64,
    pub(crate) cache_read_blocks: u64,
    pub(crate) round_trip: Option<Duration>,
}

impl Wire {
    /// Only small requests show the round-trip time; long ones show the transfer rate.
    pub(crate) fn timed(&mut self, bytes: usize, took: Duration) {
        if bytes <= 64 << 10 {
            self.round_trip = Some(match self.round_trip {
                Some(before) => (before * 7 + took) / 8,
                None => took,
            });
        }
    }
}

pub(crate) struct VolumeState {
    pub(crate) plan: Plan,
    pub(crate) read_cache: ReadCache,
    pub(crate) fetches: Fetches,
    pub(crate) hole: Hole,
    pub(crate) streams: Streams,
    pub(crate) readahead_window: ReadaheadWindow,
    pub(crate) file: Arc<dyn StoreFile>,
    /// Unreadable blocks with their errors. Only on read-only volumes: a writable one fails as a
    /// whole.
    pub(crate) unreadable: BTreeMap<u64, Arc<StoreError>>,
    pub(crate) wire: Wire,
    pub(crate) outage: Outage,
    pub(crate) loss: Loss,
    /// Callers that wait for the connection, in addition to those that `loss` counts.
    pub(crate) waiting: usize,
    pub(crate) proof: Proof,
    pub(crate) quiet: Vec<Quiet>,
    pub(crate) failed_flushes: u32,
    refusals: u32,
    refused_at: Option<Instant>,
    /// When a read-only volume last reconnected because of a failed read.
    asked_again_at: Option<Instant>,
    /// When the first write that is not yet durable was answered.
    pub(crate) busy_since: Option<Instant>,
    pub(crate) lock_checks: LockChecks,
    pub(crate) cache: Option<Cache>,
    /// The keeper thread has ended.
    pub(crate) cache_stopped: bool,
    /// Not all in-doubt blocks of a session that died are written again yet, so nothing counts as
    /// resolved.
    pub(crate) recovering: bool,
    /// Nothing is sent yet: see [`VolumeOptions::hold_back`].
    pub(crate) held_back: bool,
    /// Threads that drop dead connections.
    pub(crate) closers: Vec<thread::JoinHandle<()>>,
    pub(crate) ended: Option<Arc<VolumeError>>,
}

impl VolumeState {
    /// The connection for a call that begins now.
    pub(crate) fn connection(&self) -> Option<Connection> {
        let generation = self.plan.connection()?;
        Some(Connection {
            file: self.file.clone(),
            generation,
        })
    }

    fn tolerates_refusal(&mut self) -> bool {
        let apart = |at: Instant| at.elapsed() >= FAILURES_APART;
        if self.refused_at.is_none_or(apart) {
            self.refusals = 0;
        }
        self.refused_at = Some(Instant::now());
        self.refusals += 1;
        self.refusals <= FAILURES_MAX
    }

    pub(crate) fn check(&self) -> Result<(), VolumeError> {
        match &self.ended {
            None => Ok(()),
            Some(cause) if matches!(**cause, VolumeError::Closed) => Err(VolumeError::Closed),
            Some(cause) => Err(VolumeError::Failed(cause.clone())),
        }
    }

    /// A flush succeeded. How long it took sets the flush window.
    pub(crate) fn flushed(&mut self) {
        self.wire.flushes += 1;
        self.failed_flushes = 0;
        if let Some(since) = self.busy_since.take() {
            self.plan.took(since.elapsed());
        }
        self.answered(true);
    }

    /// A request succeeded. An outage is over only when everything that was waited for has
    /// succeeded: a connection that breaks at each flush, or at one read, must not keep the session
    /// alive for ever because other requests succeed.
    pub(crate) fn answered(&mut self, durable: bool) {
        if self.plan.connection().is_none() {
            return;
        }
        self.loss.owes_writes &= !durable;
        self.loss
            .owed_reads
            .retain(|fetch| fetch.outcome.get().is_none());
        if !self.owes() {
            self.outage.answered();
        }
    }

    fn owes(&self) -> bool {
        self.loss.owes_writes || !self.loss.owed_reads.is_empty()
    }

    /// Whether a caller waits for the connection. Read-ahead, and blocks that no flush asked for,
    /// don't count.
    pub(crate) fn somebody_waits(&self) -> bool {
        self.waiting > 0 || self.plan.owes() || self.fetches.demanded().next().is_some()
    }

    /// There is a new connection.
    pub(crate) fn connected(&mut self, now: Duration) {
        self.plan.reconnected();
        if !self.owes() {
            self.loss.owes_writes = self.plan.owes();
            self.loss.owed_reads = self.fetches.demanded().cloned().collect();
        }
        self.outage.connected(now, self.owes());
    }

    /// Whether a fetch that failed on a read-only volume is retried on a new connection: a server
    /// that comes back without its disk fails in the same way.
    pub(crate) fn may_ask_again(&mut self, engine: &Engine, fetch: &Fetch) -> bool {
        let lately = self
            .asked_again_at
            .is_some_and(|at| at.elapsed() < ASK_AGAIN_INTERVAL);
        if lately || engine.options.reconnect_max.is_zero() || self.fetches.failed(fetch) > 1 {
            return false;
        }
        self.asked_again_at = Some(Instant::now());
        true
    }
}

/// What an error of the store means for the volume.
pub(crate) enum Meaning {
    /// The connection is lost, with everything under way on it.
    ConnectionLost(StoreError),
    /// Nothing more is sent.
    Fatal(VolumeError),
}

pub(crate) fn meaning(op: &'static str, source: StoreError) -> Meaning {
    match source.kind() {
        // The program was there a moment ago; it is being replaced.
        StoreErrorKind::Disconnected
        | StoreErrorKind::Unreachable
        | StoreErrorKind::ProgramMissing => Meaning::ConnectionLost(source),
        StoreErrorKind::NoSpace => Meaning::Fatal(VolumeError::NoSpace(source)),
        _ => Meaning::Fatal(VolumeError::Store { op, source }),
    }
}

/// State and signals that all threads of a volume share.
pub(crate) struct Engine {
    pub(crate) geometry: Geometry,
    pub(crate) options: VolumeOptions,
    pub(crate) session: Arc<dyn SessionHooks>,
    pub(crate) read_only: bool,
    pub(crate) upload: UploadLimit,
    begun: Instant,
    state: Mutex<VolumeState>,
    /// A run may be ready (senders wait).
    pub(crate) send: Condvar,
    /// The coordinator may have something to do.
    pub(crate) step: Condvar,
    /// The lock may have to be checked for an epoch ahead (lock checkers wait).
    pub(crate) check_lock: Condvar,
    /// An epoch became durable, or fewer blocks are in doubt (writers, flushes and close wait).
    pub(crate) durable: Condvar,
    /// A fetch may be taken (fetchers wait).
    pub(crate) fetch: Condvar,
    /// A fetch ended (readers wait).
    pub(crate) fetched: Condvar,
    /// Blocks wait to enter the persistent cache, or none is left.
    pub(crate) cached: Condvar,
}

impl Engine {
    pub(crate) fn new(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn SessionHooks>,
        options: VolumeOptions,
        read_only: bool,
    ) -> Self {
        guard_writes(&*file, &session);
        let behind_bytes_max = options
            .flush_behind_bytes_max
            .min(options.write_buffer_bytes_max / 4);
        let limits = Limits {
            buffer_blocks: options.write_buffer_bytes_max / BLOCK_BYTES,
            behind_blocks: behind_bytes_max / BLOCK_BYTES,
            in_flight_blocks: options.in_flight_bytes_max / BLOCK_BYTES,
            run_blocks: options.run_bytes_max / BLOCK_BYTES,
            early_blocks: options.early_send_bytes_min / BLOCK_BYTES,
            batched_flush_blocks: options.batched_flush_bytes_max / BLOCK_BYTES,
        };
        let len_blocks = geometry.len_bytes / BLOCK_BYTES as u64;
        let state = VolumeState {
            plan: Plan::new(limits),
            read_cache: ReadCache::new(options.read_cache_bytes_max / BLOCK_BYTES),
            fetches: Fetches::new(len_blocks, (options.readers / 2).max(1)),
            unreadable: BTreeMap::new(),
            hole: Hole::new(options.hole_from_bytes.div_ceil(BLOCK_BYTES as u64)),
            streams: Streams::default(),
            readahead_window: ReadaheadWindow::default(),
            file,
            wire: Wire::default(),
            outage: Outage::new(options.reconnect_max),
            loss: Loss {
                since_system: SystemTime::now(),
                last: None,
                owed_reads: Vec::new(),
                owes_writes: false,
            },
            waiting: 0,
            proof: Proof::default(),
            quiet: Vec::new(),
            failed_flushes: 0,
            refusals: 0,
            refused_at: None,
            asked_again_at: None,
            busy_since: None,
            lock_checks: LockChecks::default(),
            cache: None,
            cache_stopped: false,
            recovering: !options.in_doubt.is_empty(),
            held_back: false,
            closers: Vec::new(),
            ended: None,
        };
        Self {
            geometry,
            upload: UploadLimit::new(options.upload_rate.clone()),
            options,
            session,
            begun: Instant::now(),
            read_only,
            state: Mutex::new(state),
            send: Condvar::new(),
            step: Condvar::new(),
            check_lock: Condvar::new(),
            durable: Condvar::new(),
            fetch: Condvar::new(),
            fetched: Condvar::new(),
            cached: Condvar::new(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, VolumeState> {
        self.state.lock().ignore_poison()
    }

    pub(crate) fn wait<'a>(
        &self,
        on: &Condvar,
        state: MutexGuard<'a, VolumeState>,
    ) -> MutexGuard<'a, VolumeState> {
        on.wait(state).ignore_poison()
    }

    pub(crate) fn wait_for<'a>(
        &self,
        on: &Condvar,
        state: MutexGuard<'a, VolumeState>,
        at_most: Duration,
    ) -> MutexGuard<'a, VolumeState> {
        on.wait_timeout(state, at_most).ignore_poison().0
    }

    /// Container offset of a block.
    pub(crate) fn offset_of(&self, block: u64) -> u64 {
        self.geometry.offset_bytes + block * BLOCK_BYTES as u64
    }

    /// Wakes all threads: the connection changed, or the volume ended.
    pub(crate) fn wake_all(&self) {
        for condvar in [
            &self.send,
            &self.step,
            &self.check_lock,
            &self.durable,
            &self.fetch,
            &self.fetched,
            &self.cached,
        ] {
            condvar.notify_all();
        }
    }

    /// Ends the volume; the first cause is kept.
    pub(crate) fn fail(&self, state: &mut VolumeState, cause: VolumeError) {
        state.ended.get_or_insert_with(|| Arc::new(cause));
        self.wake_all();
    }

    /// Records that a call on `generation` found the connection lost.
    pub(crate) fn connection_lost(
        &self,
        state: &mut VolumeState,
        generation: Generation,
        cause: StoreError,
    ) {
        if state.plan.connection() != Some(generation) {
            return;
        }
        tracing::warn!(%cause, ?generation, "connection lost");
        state.plan.lost(generation);
        state.busy_since = None;
        if self.options.reconnect_max.is_zero() {
            let lost = VolumeError::ConnectionLost {
                waited: Duration::ZERO,
                source: cause,
            };
            self.fail(state, lost);
            return;
        }
        if !state.outage.is_on() {
            state.loss.since_system = SystemTime::now();
        }
        state.loss.last = Some(cause);
        state.outage.lost(self.now());
        state.fetches.drop_ahead();
        self.wake_all();
    }

    /// The clock of outages. It stands still while the machine sleeps, so after a sleep the full
    /// time is left.
    pub(crate) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// A write, or a read of written blocks, failed. A failure without a known cause is retried as
    /// a failed flush is: everything is sent again on a new connection.
    pub(crate) fn refused(
        &self,
        state: &mut VolumeState,
        generation: Generation,
        cause: VolumeError,
    ) {
        if state.plan.connection() != Some(generation) {
            return;
        }
        match cause {
            VolumeError::Store { source, .. }
                if source.kind() == StoreErrorKind::Failed
                    && !self.options.reconnect_max.is_zero()
                    && state.tolerates_refusal() =>
            {
                self.connection_lost(state, generation, source);
            }
            cause => self.fail(state, cause),
        }
    }

    /// Handles an error of the session's checks before sending.
    pub(crate) fn fenced(&self, state: &mut VolumeState, generation: Generation, fenced: Fenced) {
        match fenced {
            Fenced::Disconnected(cause) => self.connection_lost(state, generation, cause),
            Fenced::Lost(_) => self.fail(state, VolumeError::Fenced(fenced)),
        }
    }

    /// Accepts whole blocks. Waits for free space in the buffer, never for the store's answer to
    /// these blocks.
    pub(crate) fn write(&self, first: u64, data: &[u8]) -> Result<(), VolumeError> {
        let chunk_blocks = self.state().plan.write_blocks_max();
        let mut index = first;
        for chunk in data.chunks(chunk_blocks * BLOCK_BYTES) {
            let blocks: Vec<_> = chunk.chunks_exact(BLOCK_BYTES).map(Arc::from).collect();
            let count = blocks.len();
            let mut state = self.state();
            state.check()?;
            while !state.plan.room_for(count) {
                // Otherwise a journal that is larger than the buffer could not be replayed.
                state.held_back = false;
                self.step.notify_one();
                self.send.notify_one();
                state = self.wait(&self.durable, state);
                state.check()?;
            }
            for written in (index..).take(count) {
                state.read_cache.remove(written);
                state.fetches.taint(written);
                state.hole.written(written);
                if let Some(cache) = &mut state.cache {
                    cache.replaced(written);
                }
            }
            let first_of_epoch = state.plan.open_is_empty();
            state.plan.write(index, blocks);
            index += count as u64;
            drop(state);
            if first_of_epoch {
                self.check_lock.notify_one();
            }
            // The coordinator may have to check the lock, or to flush what is sealed now.
            self.step.notify_one();
            self.send.notify_one();
        }
        Ok(())
    }

    pub(crate) fn flush(&self, flush: Flush) -> Result<(), VolumeError> {
        let mut state = self.state();
        state.check()?;
        let target = state.plan.seal();
        self.step.notify_one();
        self.send.notify_one();
        self.check_lock.notify_one();
        if flush == Flush::Durable && !state.held_back {
            while state.plan.durable() < target {
                state = self.wait(&self.durable, state);
                state.check()?;
            }
        }
        Ok(())
    }

    pub(crate) fn stats(&self) -> VolumeStats {
        let state = self.state();
        let bytes = |blocks: usize| (blocks * BLOCK_BYTES) as u64;
        VolumeStats {
            dirty_bytes: bytes(state.plan.unanswered_blocks()),
            unsynced_bytes: bytes(state.plan.kept_blocks()),
            unsynced_bytes_peak: bytes(state.plan.kept_blocks_peak()),
            open_epoch: state.plan.open_number().0,
            durable_epoch: state.plan.durable().0,
            wire_written_bytes: state.wire.written_bytes,
            wire_write_requests: state.wire.write_requests,
            wire_read_bytes: state.wire.read_bytes,
            wire_read_requests: state.wire.read_requests,
            wire_flushes: state.wire.flushes,
            losses: state.plan.losses(),
            reconnecting_since: match state.plan.connection() {
                None => Some(state.loss.since_system),
                Some(_) => None,
            },
            lost_because: match state.plan.connection() {
                None => state.loss.last.as_ref().map(ToString::to_string),
                Some(_) => None,
            },
            in_doubt_blocks: state.plan.in_doubt_len() as u64,
            cache_read_blocks: state.wire.cache_read_blocks,
            round_trip: state.wire.round_trip,
        }
    }
}

/// Fails the volume if its thread panics, so that no other thread waits for it.
struct EndOfThread(Arc<Engine>);

impl Drop for EndOfThread {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut state = self.0.state();
            state.cache_stopped = true;
            self.0.fail(&mut state, VolumeError::Bug);
        }
    }
}

/// Starts a named thread of the volume.
pub(crate) fn spawn(
    engine: &Arc<Engine>,
    name: String,
    body: fn(&Engine),
) -> Result<thread::JoinHandle<()>, VolumeError> {
    let engine = engine.clone();
    let run = move || {
        let end = EndOfThread(engine);
        body(&end.0);
    };
    named(name).spawn(run).map_err(VolumeError::Thread)
}
