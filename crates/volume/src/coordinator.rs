//! The coordinator thread: checks the lock, flushes, reconnects and reads in-doubt blocks back, one
//! step at a time.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use sprat_store::{ReadClass, StoreError, StoreFile};

use crate::batched_flush::batched_flush;
use crate::engine::{Connection, Engine, Meaning, Quiet, VolumeState, meaning};
use crate::flush::{flush, flush_behind};
use crate::lock_checks::LockCheckStatus;
use crate::plan::{EpochNumber, ReadBackResult, Step};
use crate::session_hooks::{ReconnectError, guard_writes};
use crate::threads::named;
use crate::{BLOCK_BYTES, VolumeError};

/// In-doubt blocks that are read back at once: as much as a connection with a long round trip
/// carries.
const READ_BACK_BLOCKS: usize = 1024;

/// Body of the coordinator thread; returns when the volume ends.
pub(crate) fn coordinate(engine: &Engine) {
    let mut state = engine.state();
    while state.ended.is_none() {
        let next_quiet = end_quiet_times(engine, &mut state);
        state = match (state.plan.step(), state.connection()) {
            (Step::Reconnect, _) => reconnect(engine, state),
            // Nothing of an epoch is sent before the lock was checked for it. `may_send` wakes this
            // thread.
            (Step::CheckLock(epoch), Some(connection)) if !state.held_back => {
                check_lock(engine, state, &connection, epoch)
            }
            (Step::BatchedFlush(epoch), Some(connection)) => {
                batched_flush(engine, state, &connection, epoch)
            }
            (Step::Flush(epoch), Some(connection)) => flush(engine, state, &connection, epoch),
            (Step::FlushBehind, Some(connection)) => flush_behind(engine, state, &connection),
            (Step::ReadBack, Some(connection)) => read_back(engine, state, &connection),
            (_, _) => match next_quiet {
                Some(in_) => engine.wait_for(&engine.step, state, in_),
                None => engine.wait(&engine.step, state),
            },
        };
    }
}

/// Ends the quiet times that are over; returns the time until the next one ends.
fn end_quiet_times(engine: &Engine, state: &mut VolumeState) -> Option<Duration> {
    let now = Instant::now();
    while let Some(first) = state.quiet.first() {
        if now < first.until {
            return Some(first.until - now);
        }
        let loss = first.loss;
        state.plan.quiet_over(loss);
        state.quiet.remove(0);
        engine.send.notify_all();
    }
    None
}

/// Uses the lock check that was made ahead, or makes one now.
fn check_lock<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, VolumeState>,
    connection: &Connection,
    epoch: EpochNumber,
) -> MutexGuard<'a, VolumeState> {
    match state.lock_checks.take(epoch, connection.generation) {
        LockCheckStatus::Passed => {
            state.plan.lock_checked(epoch);
            engine.send.notify_all();
            engine.check_lock.notify_all();
            return state;
        }
        // The end of that check wakes this thread.
        LockCheckStatus::UnderWay => return engine.wait(&engine.step, state),
        LockCheckStatus::Unknown => {}
    }
    engine.check_lock.notify_all();
    drop(state);
    let answer = engine.session.before_epoch();
    let mut state = engine.state();
    match answer {
        // Only a safeguard: only this thread makes new connections, and a plan whose connection is
        // lost ignores the check.
        Ok(()) if state.plan.connection() == Some(connection.generation) => {
            state.plan.lock_checked(epoch);
            engine.send.notify_all();
        }
        Ok(()) => {}
        Err(fenced) => engine.fenced(&mut state, connection.generation, fenced),
    }
    state
}

fn read_back<'a>(
    engine: &'a Engine,
    state: MutexGuard<'a, VolumeState>,
    connection: &Connection,
) -> MutexGuard<'a, VolumeState> {
    let runs = state.plan.next_read_backs(READ_BACK_BLOCKS);
    drop(state);
    let mut bytes = vec![0; runs.iter().map(|(_, blocks)| blocks * BLOCK_BYTES).sum()];
    let mut rest = bytes.as_mut_slice();
    let mut parts = Vec::new();
    for (first, blocks) in &runs {
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(blocks * BLOCK_BYTES);
        rest = behind;
        parts.push((engine.offset_of(*first), part));
    }
    let answer = connection.file.read_parts_at(&mut parts, ReadClass::Demand);
    let mut state = engine.state();
    match answer.map_err(|error| meaning("read", error)) {
        Ok(()) => {
            let indices = runs
                .iter()
                .flat_map(|(first, blocks)| (*first..).take(*blocks));
            for (index, found) in indices.zip(bytes.chunks_exact(BLOCK_BYTES)) {
                if state.plan.judge(index, found) == ReadBackResult::Foreign {
                    let offset = engine.offset_of(index);
                    engine.fail(&mut state, VolumeError::ForeignWrite { offset });
                    return state;
                }
            }
            engine.durable.notify_all();
        }
        Err(Meaning::ConnectionLost(cause)) => {
            engine.connection_lost(&mut state, connection.generation, cause);
        }
        Err(Meaning::Fatal(cause)) => engine.refused(&mut state, connection.generation, cause),
    }
    state
}

/// Makes a new connection, or ends the volume. Called when nothing is under way on the old one.
fn reconnect<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, VolumeState>,
) -> MutexGuard<'a, VolumeState> {
    let loss = state.plan.losses();
    let until = Instant::now() + engine.options.quiet_time;
    state.quiet.push(Quiet { loss, until });
    let mut attempt = 0;
    loop {
        if !begin_attempt(engine, &mut state) {
            return state;
        }
        state = pause(engine, state);
        if state.ended.is_some() {
            return state;
        }
        drop(state);
        let _span = tracing::debug_span!("reconnect", attempt).entered();
        let samples = engine.samples();
        let answer = engine.session.reconnect(attempt);
        attempt += 1;
        let answer = answer.and_then(|file| engine.still_has(file, &samples));
        let quiet = answer.is_ok() && engine.session.old_server_dead();
        state = engine.state();
        match answer {
            Ok(file) => {
                if quiet {
                    state.plan.quiet_over(loss);
                }
                guard_writes(&*file, &engine.session);
                let old = std::mem::replace(&mut state.file, file);
                state.connected(engine.now());
                close_aside(&mut state, old);
                tracing::info!("connected again");
                engine.wake_all();
                return state;
            }
            Err(ReconnectError::Retry(cause)) => {
                tracing::debug!(%cause, "not connected yet");
                state.loss.last = Some(cause);
            }
            Err(ReconnectError::GiveUp(cause)) => {
                let own = cause.downcast::<VolumeError>();
                let cause = own.map_or_else(VolumeError::NotReconnected, |own| *own);
                engine.fail(&mut state, cause);
                return state;
            }
        }
    }
}

/// Drops a dead connection on a thread of its own: this may wait for programs that don't exit, and
/// the new connection must not wait for that.
fn close_aside(state: &mut VolumeState, old: Arc<dyn StoreFile>) {
    state.closers.retain(|closer| !closer.is_finished());
    if let Ok(closer) = named("closer").spawn(move || drop(old)) {
        state.closers.push(closer);
    }
}

/// Starts an attempt. Ends the volume if the time for attempts is over. That time does not run
/// while no caller waits for the connection: an unused mount survives any outage.
fn begin_attempt(engine: &Engine, state: &mut VolumeState) -> bool {
    let now = engine.now();
    if !state.somebody_waits() {
        state.outage.nobody_waits(now);
    }
    if state.outage.begin_attempt(now) {
        return true;
    }
    let source = state.loss.last.take().unwrap_or_else(no_cause);
    let waited = state.outage.waited(now);
    engine.fail(state, VolumeError::ConnectionLost { waited, source });
    false
}

/// A stand-in; every loss has a cause.
fn no_cause() -> StoreError {
    StoreError::Disconnected {
        op: "reach",
        object: "the container".to_owned(),
        reason: "no cause is known".to_owned(),
    }
}

/// Waits before every attempt but the first; returns early if the volume ends.
fn pause<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, VolumeState>,
) -> MutexGuard<'a, VolumeState> {
    let full = state.outage.pause(engine.options.reconnect_delay);
    // Half of the delay is random, so that clients that lost their connections at the same time
    // reconnect at different times.
    let chance = u32::try_from(RandomState::new().hash_one(()) % 1024).unwrap_or(0);
    let until = Instant::now() + full / 2 + full / 2 * chance / 1024;
    while state.ended.is_none() {
        let now = Instant::now();
        if now >= until {
            break;
        }
        state = engine.wait_for(&engine.step, state, until - now);
    }
    state
}
