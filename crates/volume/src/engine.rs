//! What the threads of one volume share: the plan, the caches, the present connection, the end.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use sprat_store::{IgnorePoison, Outage, StoreError, StoreErrorKind, StoreFile};

use crate::cache::Cache;
use crate::fetch::{Fetch, Fetches};
use crate::hole::Fresh;
use crate::lock_checks::Permits;
use crate::plan::{Generation, Limits, Plan};
use crate::proof::Proof;
use crate::read_cache::Clean;
use crate::readahead_window::Pace;
use crate::session::{Fenced, Session};
use crate::streams::Streams;
use crate::threads::named;
use crate::{BLOCK_BYTES, Flush, Geometry, VolumeError, VolumeOptions, VolumeStats};

/// One connection to the container file.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) file: Arc<dyn StoreFile>,
    pub(crate) generation: Generation,
}

/// What the latest loss was, and what was owed on the first connection behind it.
pub(crate) struct Loss {
    pub(crate) since_system: SystemTime,
    /// The latest cause: of the loss, or why no connection came up.
    pub(crate) last: Option<StoreError>,
    /// Reads that somebody waits for.
    owed_reads: Vec<Arc<Fetch>>,
    /// Blocks that somebody asked to be made durable.
    owes_writes: bool,
}

/// Failures of the store that are borne one after another, each on a new connection, before the
/// volume fails.
pub(crate) const FAILURES_MAX: u32 = 3;

/// Refused requests that far apart are not one after another.
const FAILURES_APART: Duration = Duration::from_secs(60);

/// How often a read-only volume seeks another connection because of blocks that can't be read: a disk
/// with many of them must not cost many logins.
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
    /// Small requests tell the round trip; long ones tell the rate.
    pub(crate) fn timed(&mut self, bytes: usize, took: Duration) {
        if bytes <= 64 << 10 {
            self.round_trip = Some(match self.round_trip {
                Some(before) => (before * 7 + took) / 8,
                None => took,
            });
        }
    }
}

pub(crate) struct State {
    pub(crate) plan: Plan,
    pub(crate) clean: Clean,
    pub(crate) fetches: Fetches,
    pub(crate) fresh: Fresh,
    pub(crate) streams: Streams,
    pub(crate) pace: Pace,
    pub(crate) file: Arc<dyn StoreFile>,
    /// Blocks that the store can't give, and why; only on read-only volumes (others fail as a whole).
    pub(crate) unreadable: BTreeMap<u64, Arc<StoreError>>,
    pub(crate) wire: Wire,
    pub(crate) outage: Outage,
    pub(crate) loss: Loss,
    /// Callers that wait for the connection, besides those whose reads or writes are owed.
    pub(crate) waiting: usize,
    pub(crate) proof: Proof,
    pub(crate) quiet: Vec<Quiet>,
    pub(crate) failed_flushes: u32,
    refusals: u32,
    refused_at: Option<Instant>,
    /// When a read-only volume last asked another connection because of a failed read.
    asked_again_at: Option<Instant>,
    /// When the first answer came of what is not durable yet.
    pub(crate) busy_since: Option<Instant>,
    pub(crate) permits: Permits,
    pub(crate) cache: Option<Cache>,
    /// The keeper thread has ended.
    pub(crate) cache_stopped: bool,
    /// A dead session's suspects are not all written anew yet: nothing is settled.
    pub(crate) settling: bool,
    /// Nothing is sent yet: see [`VolumeOptions::hold_back`].
    pub(crate) held_back: bool,
    /// Threads that drop dead connections.
    pub(crate) closers: Vec<thread::JoinHandle<()>>,
    pub(crate) ended: Option<Arc<VolumeError>>,
}

impl State {
    /// The connection for a call that begins now.
    pub(crate) fn connection(&self) -> Option<Connection> {
        let generation = self.plan.connection()?;
        Some(Connection {
            file: self.file.clone(),
            generation,
        })
    }

    fn bears_refusal(&mut self) -> bool {
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

    /// A flush was answered: what it covered sets the portion of the next.
    pub(crate) fn flushed(&mut self) {
        self.wire.flushes += 1;
        self.failed_flushes = 0;
        if let Some(since) = self.busy_since.take() {
            self.plan.took(since.elapsed());
        }
        self.answered(true);
    }

    /// Something got through. Only with all that was owed the outage, if there was one, is over: a
    /// connection that breaks at each flush, or at one read, must not keep the session for ever
    /// because other things get through.
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

    /// Whether somebody waits for the connection. Blocks that nobody asked to be sent, and read-ahead,
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

    /// Whether a fetch that failed on a read-only volume is asked for on a new connection: a server
    /// that comes back without its disk answers so, too.
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
    /// The line is gone, with what was under way on it.
    LineLost(StoreError),
    /// Nothing more is sent.
    Fatal(VolumeError),
}

pub(crate) fn meaning(op: &'static str, source: StoreError) -> Meaning {
    match source.kind() {
        // A program that was there a moment ago is being replaced.
        StoreErrorKind::Disconnected
        | StoreErrorKind::Unreachable
        | StoreErrorKind::ProgramMissing => Meaning::LineLost(source),
        StoreErrorKind::NoSpace => Meaning::Fatal(VolumeError::NoSpace(source)),
        _ => Meaning::Fatal(VolumeError::Store { op, source }),
    }
}

/// Threads of the volume share this.
pub(crate) struct Engine {
    pub(crate) geometry: Geometry,
    pub(crate) options: VolumeOptions,
    pub(crate) session: Arc<dyn Session>,
    pub(crate) read_only: bool,
    begun: Instant,
    state: Mutex<State>,
    /// A run may be ready (senders wait).
    pub(crate) send: Condvar,
    /// The conductor may have something to do.
    pub(crate) step: Condvar,
    /// An epoch may need its permit ahead (permitters wait).
    pub(crate) permit: Condvar,
    /// An epoch became durable, or suspects fewer (writers, flushes and close wait).
    pub(crate) durable: Condvar,
    /// A fetch may be taken (fetchers wait).
    pub(crate) fetch: Condvar,
    /// A fetch ended (readers wait).
    pub(crate) fetched: Condvar,
    /// Blocks wait to enter the persistent cache, or none any more.
    pub(crate) cached: Condvar,
}

impl Engine {
    pub(crate) fn new(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn Session>,
        options: VolumeOptions,
        read_only: bool,
    ) -> Self {
        let behind_bytes_max = options
            .flush_behind_bytes_max
            .min(options.write_buffer_bytes_max / 4);
        let limits = Limits {
            buffer_blocks: options.write_buffer_bytes_max / BLOCK_BYTES,
            behind_blocks: behind_bytes_max / BLOCK_BYTES,
            in_flight_blocks: options.in_flight_bytes_max / BLOCK_BYTES,
            run_blocks: options.run_bytes_max / BLOCK_BYTES,
            early_blocks: options.early_send_bytes_min / BLOCK_BYTES,
            together_blocks: options.together_bytes_max / BLOCK_BYTES,
        };
        let len_blocks = geometry.len_bytes / BLOCK_BYTES as u64;
        let state = State {
            plan: Plan::new(limits),
            clean: Clean::new(options.read_cache_bytes_max / BLOCK_BYTES),
            fetches: Fetches::new(len_blocks, (options.readers / 2).max(1)),
            unreadable: BTreeMap::new(),
            fresh: Fresh::new(options.hole_from_bytes.div_ceil(BLOCK_BYTES as u64)),
            streams: Streams::default(),
            pace: Pace::default(),
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
            permits: Permits::default(),
            cache: None,
            cache_stopped: false,
            settling: !options.suspects.is_empty(),
            held_back: false,
            closers: Vec::new(),
            ended: None,
        };
        Self {
            geometry,
            options,
            session,
            begun: Instant::now(),
            read_only,
            state: Mutex::new(state),
            send: Condvar::new(),
            step: Condvar::new(),
            permit: Condvar::new(),
            durable: Condvar::new(),
            fetch: Condvar::new(),
            fetched: Condvar::new(),
            cached: Condvar::new(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().ignore_poison()
    }

    pub(crate) fn wait<'a>(
        &self,
        on: &Condvar,
        state: MutexGuard<'a, State>,
    ) -> MutexGuard<'a, State> {
        on.wait(state).ignore_poison()
    }

    pub(crate) fn wait_for<'a>(
        &self,
        on: &Condvar,
        state: MutexGuard<'a, State>,
        at_most: Duration,
    ) -> MutexGuard<'a, State> {
        on.wait_timeout(state, at_most).ignore_poison().0
    }

    /// Container offset of a block.
    pub(crate) fn offset_of(&self, block: u64) -> u64 {
        self.geometry.offset_bytes + block * BLOCK_BYTES as u64
    }

    /// Wakes everybody: the connection or the end changed.
    pub(crate) fn wake_all(&self) {
        for condvar in [
            &self.send,
            &self.step,
            &self.permit,
            &self.durable,
            &self.fetch,
            &self.fetched,
            &self.cached,
        ] {
            condvar.notify_all();
        }
    }

    /// Ends the volume; the first cause is kept.
    pub(crate) fn fail(&self, state: &mut State, cause: VolumeError) {
        state.ended.get_or_insert_with(|| Arc::new(cause));
        self.wake_all();
    }

    /// Notes that a call on `generation` found the line lost.
    pub(crate) fn line_lost(&self, state: &mut State, generation: Generation, cause: StoreError) {
        if state.plan.connection() != Some(generation) {
            return;
        }
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

    /// The clock of outages: it stands still while the machine sleeps, so that who wakes up gets the
    /// whole time.
    pub(crate) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// A write, or a read of what was written, was answered with an error. One that the server can't
    /// explain has the patience of a failed flush: all is done again on a new connection.
    pub(crate) fn refused(&self, state: &mut State, generation: Generation, cause: VolumeError) {
        if state.plan.connection() != Some(generation) {
            return;
        }
        match cause {
            VolumeError::Store { source, .. }
                if source.kind() == StoreErrorKind::Failed
                    && !self.options.reconnect_max.is_zero()
                    && state.bears_refusal() =>
            {
                self.line_lost(state, generation, source);
            }
            cause => self.fail(state, cause),
        }
    }

    /// Acts on an error of the session's checks before sending.
    pub(crate) fn fenced(&self, state: &mut State, generation: Generation, fenced: Fenced) {
        match fenced {
            Fenced::Disconnected(cause) => self.line_lost(state, generation, cause),
            Fenced::Lost(_) => self.fail(state, VolumeError::Fenced(fenced)),
        }
    }

    /// Takes whole blocks; waits for room, never for the store's answer to these blocks.
    pub(crate) fn write(&self, first: u64, data: &[u8]) -> Result<(), VolumeError> {
        let chunk_blocks = self.state().plan.write_blocks_max();
        let mut index = first;
        for chunk in data.chunks(chunk_blocks * BLOCK_BYTES) {
            let blocks: Vec<_> = chunk.chunks_exact(BLOCK_BYTES).map(Arc::from).collect();
            let count = blocks.len();
            let mut state = self.state();
            state.check()?;
            while !state.plan.room_for(count) {
                // A journal that is larger than the buffer can't be replayed otherwise.
                state.held_back = false;
                self.step.notify_one();
                self.send.notify_one();
                state = self.wait(&self.durable, state);
                state.check()?;
            }
            for written in (index..).take(count) {
                state.clean.remove(written);
                state.fetches.taint(written);
                state.fresh.written(written);
                if let Some(cache) = &mut state.cache {
                    cache.replaced(written);
                }
            }
            let first_of_epoch = state.plan.open_is_empty();
            state.plan.write(index, blocks);
            index += count as u64;
            drop(state);
            if first_of_epoch {
                self.permit.notify_one();
            }
            // The conductor may have to ask for the permit, or to flush what is sealed now.
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
        self.permit.notify_one();
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
            suspect_blocks: state.plan.suspects_len() as u64,
            cache_read_blocks: state.wire.cache_read_blocks,
            round_trip: state.wire.round_trip,
        }
    }
}

/// Fails the volume when its thread ends by a panic, so that nobody waits for that thread.
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
