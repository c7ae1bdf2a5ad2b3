//! What a dead session left unsettled: waited out, read, and written anew before anything else.
//!
//! Its server process may still write what was under way. After the quiet time the blocks are
//! read and what was read is written back durably: from then on they hold one value, also where
//! the dead session's bytes were never synced. Where only ciphertext is written, zeros are no bytes
//! of anybody's: the dead session's never arrived, and the hole stays.

use std::ops::Range;

use crate::engine::Engine;
use crate::{BLOCK_BYTES, Flush, VolumeError};

const BLOCK: u64 = BLOCK_BYTES as u64;

pub(crate) fn suspects_of_dead_session(engine: &Engine) -> Result<(), VolumeError> {
    let ranges = blocks_of_suspects(engine);
    if !ranges.is_empty() {
        write_anew(engine, &ranges)?;
    }
    engine.state().settling = false;
    Ok(())
}

fn write_anew(engine: &Engine, ranges: &[Range<u64>]) -> Result<(), VolumeError> {
    if !engine.options.suspects_quiet && !engine.session.old_server_dead() {
        std::thread::sleep(engine.options.quiet_time);
    }
    let chunk = u64::try_from(engine.state().plan.write_blocks_max())
        .unwrap_or(1)
        .min(256);
    for range in ranges {
        let mut first = range.start;
        while first < range.end {
            let end = range.end.min(first + chunk);
            let blocks = engine.read(first..end)?;
            for (index, block) in (first..).zip(&blocks) {
                if engine.options.zeros_are_holes && block.iter().all(|byte| *byte == 0) {
                    continue;
                }
                engine.write(index, block)?;
                engine.state().plan.add_settled_suspect(index, block);
            }
            first = end;
        }
    }
    engine.flush(Flush::Durable)
}

/// The device's blocks that the suspect byte ranges touch: in order, no block twice.
fn blocks_of_suspects(engine: &Engine) -> Vec<Range<u64>> {
    let offset = engine.geometry.offset_bytes;
    let len = engine.geometry.len_bytes;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for range in &engine.options.suspects {
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
