//! The threads that check the lock ahead: for epochs that wait behind the one under way.

use crate::engine::{Engine, State};
use crate::plan::{EpochNumber, Generation};

/// Checks under way at one time, besides the conductor's own: one takes two round trips,
/// as a small epoch does.
pub(crate) const PERMITTERS: usize = 3;

/// Body of a permitter thread; returns when the volume ends.
pub(crate) fn permit_ahead(engine: &Engine) {
    let mut state = engine.state();
    while state.ended.is_none() {
        let Some((epoch, generation)) = next(&state) else {
            state = engine.wait(&engine.permit, state);
            continue;
        };
        let begun = state.permits.begin(epoch, generation);
        drop(state);
        let answer = engine.session.before_epoch();
        state = engine.state();
        state.permits.end(epoch, begun, answer.is_ok());
        if let Err(fenced) = answer {
            engine.fenced(&mut state, generation, fenced);
        }
        engine.step.notify_one();
    }
}

/// The next epoch behind the one under way that nobody has asked for.
fn next(state: &State) -> Option<(EpochNumber, Generation)> {
    let generation = state.plan.connection()?;
    let asked = |epoch: &EpochNumber| state.permits.is_asked(*epoch, generation);
    let mut behind = state.plan.behind_under_way().take(PERMITTERS);
    Some((behind.find(|epoch| !asked(epoch))?, generation))
}
