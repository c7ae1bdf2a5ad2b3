//! The sender threads: each takes a run from the plan, sends it and reports what came of it.

use std::slice;
use std::time::Instant;

use crate::BLOCK_BYTES;
use crate::engine::{Connection, Engine, Meaning, State, meaning};
use crate::plan::Run;
use crate::session::Fenced;

/// Buffers up to this size are kept between runs.
const SMALL_BYTES: usize = 64 << 10;

enum Sent {
    Answered,
    /// The session refused; nothing was sent.
    Refused(Fenced),
    /// The store failed; anything may have arrived, or arrive.
    Broken(Meaning),
}

/// Body of a sender thread; returns when the volume ends.
pub(crate) fn send_runs(engine: &Engine) {
    let mut buffer = Vec::new();
    let mut state = engine.state();
    while state.ended.is_none() {
        let Some((connection, run)) = take(&mut state) else {
            state = engine.wait(&engine.send, state);
            continue;
        };
        if state.plan.has_run() {
            engine.send.notify_one();
        }
        drop(state);
        let begun = Instant::now();
        let sent = send(engine, &connection, &run, &mut buffer);
        state = engine.state();
        if buffer.capacity() > SMALL_BYTES {
            // What all senders hold together is bounded by what is under way.
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
        // The epoch may be complete, a lost line quiet, or a rewritten block free to go.
        engine.step.notify_one();
        // The old connection must not be dropped, which may block, under the lock.
        drop(state);
        drop(connection);
        state = engine.state();
    }
}

fn take(state: &mut State) -> Option<(Connection, Run)> {
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
        Err(error) => Sent::Broken(meaning("write", error)),
    }
}

fn report(engine: &Engine, state: &mut State, connection: &Connection, run: &Run, sent: Sent) {
    match sent {
        Sent::Answered => state.plan.answered(run),
        Sent::Refused(fenced) => {
            engine.fenced(state, connection.generation, fenced);
            state.plan.lost_run(run);
        }
        Sent::Broken(Meaning::LineLost(cause)) => {
            engine.line_lost(state, connection.generation, cause);
            state.plan.lost_run(run);
        }
        Sent::Broken(Meaning::Fatal(cause)) => {
            engine.refused(state, connection.generation, cause);
            state.plan.lost_run(run);
        }
    }
}
