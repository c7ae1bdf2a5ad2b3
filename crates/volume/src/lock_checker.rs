//! The threads that check the lock ahead, for epochs that wait behind the one under way.

use crate::engine::{Engine, VolumeState};
use crate::plan::{EpochNumber, Generation};

/// Checks under way at one time, in addition to the coordinator's own. One check takes two round
/// trips, as a small epoch does.
pub(crate) const LOCK_CHECKERS: usize = 3;

/// Body of a lock checker thread; returns when the volume ends.
pub(crate) fn check_ahead(engine: &Engine) {
    let mut state = engine.state();
    while state.ended.is_none() {
        let Some((epoch, generation)) = next(&state) else {
            state = engine.wait(&engine.check_lock, state);
            continue;
        };
        let begun = state.lock_checks.begin(epoch, generation);
        drop(state);
        let answer = engine.session.before_epoch();
        state = engine.state();
        state.lock_checks.end(epoch, begun, answer.is_ok());
        if let Err(fenced) = answer {
            engine.fenced(&mut state, generation, fenced);
        }
        engine.step.notify_one();
    }
}

/// The next epoch behind the one under way that has no check yet.
fn next(state: &VolumeState) -> Option<(EpochNumber, Generation)> {
    let generation = state.plan.connection()?;
    let asked = |epoch: &EpochNumber| state.lock_checks.is_asked(*epoch, generation);
    let mut behind = state.plan.behind_under_way().take(LOCK_CHECKERS);
    Some((behind.find(|epoch| !asked(epoch))?, generation))
}
