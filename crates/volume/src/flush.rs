//! Flushes: of a whole epoch, of answered writes while more is sent, and what a failed flush means.

use std::ops::Range;
use std::sync::MutexGuard;

use sprat_store::{StoreError, StoreErrorKind};

use crate::engine::{Connection, Engine, FAILURES_MAX, Meaning, VolumeState, meaning};
use crate::plan::EpochNumber;

pub(crate) fn flush<'a>(
    engine: &'a Engine,
    state: MutexGuard<'a, VolumeState>,
    connection: &Connection,
    epoch: EpochNumber,
) -> MutexGuard<'a, VolumeState> {
    let _span = tracing::debug_span!("epoch", number = ?epoch, fsync = "whole").entered();
    let none_in_doubt = state.plan.in_doubt_len() == 0 && !state.recovering;
    drop(state);
    let answer = connection.file.flush();
    if answer.is_ok() && none_in_doubt {
        // Only this epoch was under way, and all of it was answered before the flush.
        engine.session.resolved();
    }
    let mut state = engine.state();
    match answer {
        Ok(()) => made_durable(engine, state, epoch),
        Err(error) => {
            flush_failed(engine, &mut state, connection, error);
            state
        }
    }
}

/// Handles a successful flush that ends `epoch`.
pub(crate) fn made_durable<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, VolumeState>,
    epoch: EpochNumber,
) -> MutexGuard<'a, VolumeState> {
    let retired = state.plan.flushed(epoch);
    state.proof.durable(retired.blocks());
    state.flushed();
    state.offer(retired.blocks());
    drop(state);
    drop(retired);
    engine.cached.notify_all();
    engine.durable.notify_all();
    engine.send.notify_all();
    engine.state()
}

/// Makes answered writes durable while the senders go on.
pub(crate) fn flush_behind<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, VolumeState>,
    connection: &Connection,
) -> MutexGuard<'a, VolumeState> {
    // `recovering` is only a safeguard here: `WriteJournal::resolved` leaves out the in-doubt
    // writes of a session that died.
    let none_in_doubt = state.plan.in_doubt_len() == 0 && !state.recovering;
    let behind = state.plan.begin_behind();
    let _span = tracing::debug_span!("epoch", fsync = "in part").entered();
    drop(state);
    let answer = connection.file.flush_behind();
    let mut state = engine.state();
    if let Err(error) = answer {
        flush_failed(engine, &mut state, connection, error);
        return state;
    }
    let retired = state.plan.flushed_behind(behind);
    state.proof.durable(retired.blocks());
    state.flushed();
    state.offer(retired.blocks());
    drop(state);
    engine.durable.notify_all();
    engine.cached.notify_all();
    if none_in_doubt {
        let bytes =
            |blocks: &Range<u64>| engine.offset_of(blocks.start)..engine.offset_of(blocks.end);
        let ranges: Vec<_> = retired.ranges().iter().map(bytes).collect();
        engine.session.resolved_in_part(&ranges);
    }
    drop(retired);
    let mut state = engine.state();
    state.plan.resolved_behind();
    engine.send.notify_all();
    state
}

/// Handles a failed flush. Nothing on this connection can be trusted any more, whatever a later
/// flush returns, because the kernel marks pages clean that it could not write. Everything is sent
/// again on a new connection.
pub(crate) fn flush_failed(
    engine: &Engine,
    state: &mut VolumeState,
    connection: &Connection,
    error: StoreError,
) {
    tracing::warn!(%error, generation = ?connection.generation, "fsync failed");
    // A connection that is lost during a flush shows nothing about the server's disk.
    let failed = error.kind() == StoreErrorKind::Failed;
    state.failed_flushes += u32::from(failed);
    let again =
        failed && state.failed_flushes <= FAILURES_MAX && !engine.options.reconnect_max.is_zero();
    if again {
        engine.connection_lost(state, connection.generation, error);
        return;
    }
    match meaning("flush", error) {
        Meaning::ConnectionLost(cause) => {
            engine.connection_lost(state, connection.generation, cause);
        }
        Meaning::Fatal(cause) => engine.fail(state, cause),
    }
}
