//! Sends a small epoch in one batch with its fsync: on a slow connection one round trip instead of
//! two.

use std::ops::Range;
use std::sync::MutexGuard;
use std::time::Instant;

use sprat_store::{Applied, StoreError};

use crate::BLOCK_BYTES;
use crate::engine::{Connection, Engine, Meaning, VolumeState, meaning};
use crate::flush::{flush_failed, made_durable};
use crate::plan::{EpochNumber, Run};

/// Carries the step out. Until every write and every fsync of the batch succeeded, nothing of it
/// counts as durable, and nothing behind it is sent.
pub(crate) fn batched_flush<'a>(
    engine: &'a Engine,
    mut state: MutexGuard<'a, VolumeState>,
    connection: &Connection,
    epoch: EpochNumber,
) -> MutexGuard<'a, VolumeState> {
    // While the plan has in-doubt blocks it batches nothing (`Plan::is_batched`), so its half of
    // this check is only a safeguard. The in-doubt blocks of a session that died enter the plan
    // only after all of them were written again.
    let none_in_doubt = state.plan.in_doubt_len() == 0 && !state.recovering;
    let _span = tracing::debug_span!("epoch", number = ?epoch, fsync = "with its writes").entered();
    let runs = state.plan.begin_batched_flush();
    drop(state);
    let offset = |index: u64| engine.offset_of(index);
    let ranges: Vec<Range<u64>> = runs
        .iter()
        .map(|run| offset(run.first)..offset(run.first + run.blocks.len() as u64))
        .collect();
    if let Err(fenced) = engine.session.before_send(&ranges) {
        let mut state = engine.state();
        engine.fenced(&mut state, connection.generation, fenced);
        runs.iter().for_each(|run| state.plan.lost_run(run));
        return state;
    }
    let begun = Instant::now();
    // A batch is small: it does not wait, but what is sent after it does.
    let blocks = runs.iter().map(|run| run.blocks.len()).sum();
    engine.upload.send(blocks, begun);
    let answer = write_and_flush(engine, connection, &runs);
    if matches!(answer, Ok(Applied::Durable)) && none_in_doubt {
        engine.session.resolved();
    }
    let mut state = engine.state();
    let flushed = match answer {
        Ok(flushed) => flushed,
        Err(error) => {
            match meaning("write", error) {
                Meaning::ConnectionLost(cause) => {
                    engine.connection_lost(&mut state, connection.generation, cause);
                }
                Meaning::Fatal(cause) => engine.refused(&mut state, connection.generation, cause),
            }
            runs.iter().for_each(|run| state.plan.lost_run(run));
            return state;
        }
    };
    state.busy_since.get_or_insert(begun);
    for run in &runs {
        state.wire.write_requests += 1;
        state.wire.written_bytes += (run.blocks.len() * BLOCK_BYTES) as u64;
        state.plan.answered(run);
    }
    match flushed {
        Applied::Durable => made_durable(engine, state, epoch),
        Applied::NotDurable(error) => {
            flush_failed(engine, &mut state, connection, error);
            state
        }
    }
}

fn write_and_flush(
    engine: &Engine,
    connection: &Connection,
    runs: &[Run],
) -> Result<Applied, StoreError> {
    let bytes: Vec<Vec<u8>> = runs.iter().map(|run| run.blocks.concat()).collect();
    let offsets = runs.iter().map(|run| engine.offset_of(run.first));
    let parts: Vec<(u64, &[u8])> = offsets.zip(bytes.iter().map(Vec::as_slice)).collect();
    let sends = |(offset, bytes): &(u64, &[u8])| engine.session.sends(*offset, bytes);
    let numbers: Vec<u64> = parts.iter().map(sends).collect();
    let flushed = connection.file.write_parts_durably(&parts);
    // Of a batch that was withheld or refused, too, all that was sent was answered.
    if flushed.as_ref().err().is_none_or(StoreError::was_answered) {
        numbers
            .into_iter()
            .for_each(|number| engine.session.answered(number));
    }
    flushed
}
