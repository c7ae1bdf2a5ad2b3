//! Recovers what a session that died left in doubt: waits, reads it, and writes it again before
//! anything else.
//!
//! The server's process of that session may still carry out writes that were under way. After the
//! quiet time the in-doubt blocks are read and the bytes are written back, durably. From then on
//! each block has one value, even if the dead session's bytes were never synced. If only ciphertext
//! is written, a block of zeros was never written: the dead session's write did not arrive, and the
//! hole stays.

use std::ops::Range;

use sprat_store::{ReadClass, StoreErrorKind};

use crate::engine::{Engine, FAILURES_MAX, Meaning, meaning};
use crate::plan::digest_of;
use crate::{BLOCK_BYTES, Flush, VolumeError};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Blocks that are read at once, and written in one batch with their fsync: a few round trips for
/// each 4 MiB, however scattered the blocks are. This must stay below `early_send_bytes_min`: what
/// exceeds that is sent run by run.
const BATCH_BLOCKS: usize = 1000;

pub(crate) fn recover_dead_session(engine: &Engine) -> Result<(), VolumeError> {
    let ranges = blocks_in_doubt(engine);
    if !ranges.is_empty() {
        rewrite(engine, &ranges)?;
    }
    engine.state().recovering = false;
    Ok(())
}

fn rewrite(engine: &Engine, ranges: &[Range<u64>]) -> Result<(), VolumeError> {
    if !engine.options.old_server_dead && !engine.session.old_server_dead() {
        std::thread::sleep(engine.options.quiet_time);
    }
    // One write may bring at most this many blocks.
    let most = engine.state().plan.write_blocks_max().min(BATCH_BLOCKS);
    let whole: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let mut done = 0;
    let mut written = Vec::new();
    let mut indices = ranges.iter().cloned().flatten().peekable();
    while indices.peek().is_some() {
        let batch: Vec<u64> = indices.by_ref().take(most).collect();
        let bytes = read_at_once(engine, &batch)?;
        for (index, block) in batch.iter().zip(bytes.chunks_exact(BLOCK_BYTES)) {
            if engine.options.zeros_are_holes && block.iter().all(|byte| *byte == 0) {
                continue;
            }
            engine.write(*index, block)?;
            written.push((*index, digest_of(block)));
        }
        // This batch is sent while the next one is read.
        engine.flush(Flush::Ordered)?;
        done += batch.len() as u64;
        engine.session.recovering(done * BLOCK, whole * BLOCK);
    }
    engine.flush(Flush::Durable)?;
    // Only now: while blocks are in doubt, no epoch is batched with its fsync.
    let mut state = engine.state();
    for (index, digest) in written {
        state.plan.add_recovered(index, digest);
    }
    Ok(())
}

/// Reads blocks from the store, many at once, bypassing all caches. Reconnects as often as needed.
fn read_at_once(engine: &Engine, indices: &[u64]) -> Result<Vec<u8>, VolumeError> {
    let mut bytes = vec![0; indices.len() * BLOCK_BYTES];
    engine.state().waiting += 1;
    let read = read_on_any(engine, indices, &mut bytes);
    engine.state().waiting -= 1;
    read.map(|()| bytes)
}

fn read_on_any(engine: &Engine, indices: &[u64], bytes: &mut [u8]) -> Result<(), VolumeError> {
    let mut failures = 0;
    loop {
        let mut state = engine.state();
        let connection = loop {
            state.check()?;
            match state.connection() {
                Some(connection) => break connection,
                None => state = engine.wait(&engine.fetched, state),
            }
        };
        drop(state);
        let mut parts: Vec<(u64, &mut [u8])> = Vec::new();
        let (mut rest, mut left) = (&mut *bytes, indices);
        while let Some((first, _)) = left.split_first() {
            let run = (*first..)
                .zip(left)
                .take_while(|(want, have)| want == *have)
                .count();
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(run * BLOCK_BYTES);
            parts.push((engine.offset_of(*first), part));
            (rest, left) = (behind, &left[run..]);
        }
        let Err(error) = connection.file.read_parts_at(&mut parts, ReadClass::Demand) else {
            return Ok(());
        };
        let mut state = engine.state();
        failures += u32::from(error.kind() == StoreErrorKind::Failed);
        let again = (1..=FAILURES_MAX).contains(&failures)
            && error.kind() == StoreErrorKind::Failed
            && !engine.options.reconnect_max.is_zero();
        match meaning("read", error) {
            Meaning::Fatal(VolumeError::Store { source, .. }) if again => {
                engine.connection_lost(&mut state, connection.generation, source);
            }
            Meaning::ConnectionLost(cause) => {
                engine.connection_lost(&mut state, connection.generation, cause);
            }
            Meaning::Fatal(cause) => {
                engine.fail(&mut state, cause);
                state.check()?;
            }
        }
    }
}

/// Returns the blocks of the device that the in-doubt byte ranges touch: in order, each block once.
fn blocks_in_doubt(engine: &Engine) -> Vec<Range<u64>> {
    let offset = engine.geometry.offset_bytes;
    let len = engine.geometry.len_bytes;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for range in &engine.options.in_doubt {
        let start = range.start.saturating_sub(offset).min(len) / BLOCK;
        let end = range.end.saturating_sub(offset).min(len).div_ceil(BLOCK);
        if start < end {
            ranges.push(start..end);
        }
    }
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}
