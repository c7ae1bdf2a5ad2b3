//! Flushes: of a whole epoch, of what was answered while more is sent, and what a failed one means.

use std::ops::Range;
use std::sync::MutexGuard;

use sprat_store::{StoreError, StoreErrorKind};

use crate::engine::{Connection, Engine, FAILURES_MAX, Meaning, State, meaning};
use crate::plan::EpochNumber;

pub(crate) fn flush<'a>(
    engine: &'a Engine,
    state: MutexGuard<'a, State>,
    line: &Connection,
    epoch: EpochNumber,
) -> MutexGuard<'a, State> {
    let no_suspects = state.plan.suspects_len() == 0 && !state.settling;
    drop(state);
    let answer = line.file.flush();
    if answer.is_ok() && no_suspects {
        // Only this epoch was under way, and all of it was answered before the flush.
        engine.session.settled();
    }
    let mut state = engine.state();
    match answer {
        Ok(()) => made_durable(engine, state, epoch),
        Err(error) => {
            flush_failed(engine, &mut state, line, error);
            state
        }
    }
}

/// The flush that ends `epoch` was answered well.
pub(crate) fn made_durable<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, State>,
    epoch: EpochNumber,
) -> MutexGuard<'a, State> {
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

/// Makes durable what was answered, while the senders go on.
pub(crate) fn flush_behind<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, State>,
    line: &Connection,
) -> MutexGuard<'a, State> {
    // `settling` is the second belt here: what is settled in part leaves out a dead session's suspects
    // (`LocalRecord::settled`).
    let no_suspects = state.plan.suspects_len() == 0 && !state.settling;
    let behind = state.plan.begin_behind();
    drop(state);
    let answer = line.file.flush_behind();
    let mut state = engine.state();
    if let Err(error) = answer {
        flush_failed(engine, &mut state, line, error);
        return state;
    }
    let retired = state.plan.flushed_behind(behind);
    state.proof.durable(retired.blocks());
    state.flushed();
    state.offer(retired.blocks());
    drop(state);
    engine.durable.notify_all();
    engine.cached.notify_all();
    if no_suspects {
        let bytes =
            |blocks: &Range<u64>| engine.offset_of(blocks.start)..engine.offset_of(blocks.end);
        let ranges: Vec<_> = retired.ranges().iter().map(bytes).collect();
        engine.session.settled_in_part(&ranges);
    }
    drop(retired);
    let mut state = engine.state();
    state.plan.settled_behind();
    engine.send.notify_all();
    state
}

/// A failed flush leaves nothing to be trusted on this connection, whatever it says later (the
/// kernel marks pages clean that it could not write): all is sent again on a new one.
pub(crate) fn flush_failed(
    engine: &Engine,
    state: &mut State,
    line: &Connection,
    error: StoreError,
) {
    // A line that is lost during a flush says nothing of the server's disk.
    let failed = error.kind() == StoreErrorKind::Failed;
    state.failed_flushes += u32::from(failed);
    let again =
        failed && state.failed_flushes <= FAILURES_MAX && !engine.options.reconnect_max.is_zero();
    if again {
        engine.line_lost(state, line.generation, error);
        return;
    }
    match meaning("flush", error) {
        Meaning::LineLost(cause) => engine.line_lost(state, line.generation, cause),
        Meaning::Fatal(cause) => engine.fail(state, cause),
    }
}
