//! The conductor thread: permits, flushes, reconnects and reads suspects back, one at a time.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use sprat_store::{ReadClass, StoreError, StoreFile};

use crate::batched_flush::send_together;
use crate::engine::{Connection, Engine, Meaning, Quiet, State, meaning};
use crate::flush::{flush, flush_behind};
use crate::lock_checks::Ahead;
use crate::plan::{EpochNumber, Step, Verdict};
use crate::session::ReconnectError;
use crate::threads::named;
use crate::{BLOCK_BYTES, VolumeError};

/// Suspects that are read back together: what a connection with a long round trip carries at once.
const READ_BACK_BLOCKS: usize = 1024;

/// Body of the conductor thread; returns when the volume ends.
pub(crate) fn conduct(engine: &Engine) {
    let mut state = engine.state();
    while state.ended.is_none() {
        let next_quiet = end_quiet_times(engine, &mut state);
        state = match (state.plan.step(), state.connection()) {
            (Step::Reconnect, _) => reconnect(engine, state),
            // Without a permit nothing of an epoch is sent. `may_send` wakes this thread.
            (Step::Permit(epoch), Some(line)) if !state.held_back => {
                permit(engine, state, &line, epoch)
            }
            (Step::Together(epoch), Some(line)) => send_together(engine, state, &line, epoch),
            (Step::Flush(epoch), Some(line)) => flush(engine, state, &line, epoch),
            (Step::FlushBehind, Some(line)) => flush_behind(engine, state, &line),
            (Step::ReadBack, Some(line)) => read_back(engine, state, &line),
            (_, _) => match next_quiet {
                Some(in_) => engine.wait_for(&engine.step, state, in_),
                None => engine.wait(&engine.step, state),
            },
        };
    }
}

/// Releases what was held for losses long enough ago; returns when the next one is due.
fn end_quiet_times(engine: &Engine, state: &mut State) -> Option<Duration> {
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

/// Uses the permit that was asked for ahead, or asks now.
fn permit<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, State>,
    line: &Connection,
    epoch: EpochNumber,
) -> MutexGuard<'a, State> {
    match state.permits.take(epoch, line.generation) {
        Ahead::Granted => {
            state.plan.permitted(epoch);
            engine.send.notify_all();
            engine.permit.notify_all();
            return state;
        }
        // Its end wakes this thread.
        Ahead::UnderWay => return engine.wait(&engine.step, state),
        Ahead::Unknown => {}
    }
    engine.permit.notify_all();
    drop(state);
    let answer = engine.session.before_epoch();
    let mut state = engine.state();
    match answer {
        // The second belt: this thread alone makes new connections, and a plan whose connection is
        // lost takes no permit.
        Ok(()) if state.plan.connection() == Some(line.generation) => {
            state.plan.permitted(epoch);
            engine.send.notify_all();
        }
        Ok(()) => {}
        Err(fenced) => engine.fenced(&mut state, line.generation, fenced),
    }
    state
}

fn read_back<'a>(
    engine: &'a Engine,
    state: MutexGuard<'a, State>,
    line: &Connection,
) -> MutexGuard<'a, State> {
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
    let answer = line.file.read_parts_at(&mut parts, ReadClass::Demand);
    let mut state = engine.state();
    match answer.map_err(|error| meaning("read", error)) {
        Ok(()) => {
            let indices = runs
                .iter()
                .flat_map(|(first, blocks)| (*first..).take(*blocks));
            for (index, found) in indices.zip(bytes.chunks_exact(BLOCK_BYTES)) {
                if state.plan.judge(index, found) == Verdict::Foreign {
                    let offset = engine.offset_of(index);
                    engine.fail(&mut state, VolumeError::ForeignWrite { offset });
                    return state;
                }
            }
            engine.durable.notify_all();
        }
        Err(Meaning::LineLost(cause)) => engine.line_lost(&mut state, line.generation, cause),
        Err(Meaning::Fatal(cause)) => engine.refused(&mut state, line.generation, cause),
    }
    state
}

/// Makes a new connection, or ends the volume; called when nothing is under way on the old one.
fn reconnect<'a>(engine: &'a Engine, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
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
                let old = std::mem::replace(&mut state.file, file);
                state.connected(engine.now());
                close_aside(&mut state, old);
                engine.wake_all();
                return state;
            }
            Err(ReconnectError::Retry(cause)) => {
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

/// Drops a dead connection on a thread of its own: it may wait for programs that don't end, and
/// the new connection must not wait for that.
fn close_aside(state: &mut State, old: Arc<dyn StoreFile>) {
    state.closers.retain(|closer| !closer.is_finished());
    if let Ok(closer) = named("closer").spawn(move || drop(old)) {
        state.closers.push(closer);
    }
}

/// Begins an attempt; ends the volume where the time for them is over. That does not run while nobody
/// waits for the connection: a mount that is not used bears any outage.
fn begin_attempt(engine: &Engine, state: &mut State) -> bool {
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

/// Every loss has a cause; this stands in for one all the same.
fn no_cause() -> StoreError {
    StoreError::Disconnected {
        op: "reach",
        object: "the container".to_owned(),
        reason: "no cause is known".to_owned(),
    }
}

/// Waits before an attempt, not before the first; ends early where the volume ends.
fn pause<'a>(engine: &'a Engine, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    let full = state.outage.pause(engine.options.reconnect_delay);
    // Half of it fixed, half of it by chance: clients that were cut together come back apart.
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
