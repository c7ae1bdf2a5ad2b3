//! The sender threads: each takes a run from the plan, sends it and reports the outcome.

use std::slice;
use std::time::Instant;

use sprat_store::StoreErrorKind;

use crate::BLOCK_BYTES;
use crate::engine::{Connection, Engine, Meaning, VolumeState, meaning};
use crate::plan::Run;
use crate::session_hooks::Fenced;

/// Buffers up to this size are kept between runs.
const SMALL_BYTES: usize = 64 << 10;

enum Sent {
    Answered,
    /// The session did not allow it. Nothing was sent, or all that was sent was answered.
    Refused(Fenced),
    /// The store failed. Anything may have arrived, or may still arrive.
    Broken(Meaning),
}

/// Body of a sender thread; returns when the volume ends.
pub(crate) fn send_runs(engine: &Engine) {
    let mut buffer = Vec::new();
    let mut state = engine.state();
    while state.ended.is_none() {
        if let Some(wait) = engine.upload.wait(Instant::now()) {
            state = engine.wait_for(&engine.send, state, wait);
            continue;
        }
        let Some((connection, run)) = take(&mut state) else {
            state = engine.wait(&engine.send, state);
            continue;
        };
        engine.upload.send(run.blocks.len(), Instant::now());
        if state.plan.has_run() {
            engine.send.notify_one();
        }
        drop(state);
        let begun = Instant::now();
        let sent = send(engine, &connection, &run, &mut buffer);
        state = engine.state();
        if buffer.capacity() > SMALL_BYTES {
            // Together the senders keep no more than what is under way.
            buffer = Vec::new();
        }
        if let Sent::Answered = sent {
            let bytes = run.blocks.len() * BLOCK_BYTES;
            state.wire.timed(bytes, begun.elapsed());
            state.busy_since.get_or_insert_with(Instant::now);
            state.wire.write_requests += 1;
            state.wire.written_bytes += bytes as u64;
        }
        report(engine, &mut state, &connection, &run, sent);
        // The epoch may be complete, the lost connection without calls under way, or a rewritten
        // block sendable.
        engine.step.notify_one();
        // Dropping the old connection may block, so it is not done while the state is locked.
        drop(state);
        drop(connection);
        state = engine.state();
    }
}

fn take(state: &mut VolumeState) -> Option<(Connection, Run)> {
    let connection = state.connection()?;
    Some((connection, state.plan.next_run()?))
}

fn send(engine: &Engine, connection: &Connection, run: &Run, buffer: &mut Vec<u8>) -> Sent {
    let offset = engine.offset_of(run.first);
    let range = offset..offset + (run.blocks.len() * BLOCK_BYTES) as u64;
    if let Err(fenced) = engine.session.before_send(slice::from_ref(&range)) {
        return Sent::Refused(fenced);
    }
    let bytes: &[u8] = match &run.blocks[..] {
        [block] => block,
        blocks => {
            buffer.clear();
            buffer.reserve_exact(blocks.len() * BLOCK_BYTES);
            blocks
                .iter()
                .for_each(|block| buffer.extend_from_slice(block));
            buffer
        }
    };
    let number = engine.session.sends(offset, bytes);
    match connection.file.write_at(offset, bytes) {
        Ok(()) => {
            engine.session.answered(number);
            Sent::Answered
        }
        Err(error) => {
            // Of a write that was withheld or refused, all that was sent was answered.
            if error.was_answered() {
                engine.session.answered(number);
            }
            match error.kind() {
                StoreErrorKind::Withheld => Sent::Refused(Fenced::Lost(Box::new(error))),
                _ => Sent::Broken(meaning("write", error)),
            }
        }
    }
}

fn report(
    engine: &Engine,
    state: &mut VolumeState,
    connection: &Connection,
    run: &Run,
    sent: Sent,
) {
    match sent {
        Sent::Answered => state.plan.answered(run),
        Sent::Refused(fenced) => {
            engine.fenced(state, connection.generation, fenced);
            state.plan.lost_run(run);
        }
        Sent::Broken(Meaning::ConnectionLost(cause)) => {
            engine.connection_lost(state, connection.generation, cause);
            state.plan.lost_run(run);
        }
        Sent::Broken(Meaning::Fatal(cause)) => {
            engine.refused(state, connection.generation, cause);
            state.plan.lost_run(run);
        }
    }
}
