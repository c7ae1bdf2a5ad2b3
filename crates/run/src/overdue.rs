//! Decides when a copy is overdue, and when the alarm is raised.
//!
//! Everything here is a pure function: the caller passes the time.

use std::time::Duration;

use jiff::Timestamp;

use crate::clock::Moment;
use crate::copy_state::{CopyState, FoundOverdue};
use crate::times::{add, is_ahead};

/// How far apart two checks must find a copy overdue, of time that the machine was awake. A machine
/// that was off for the holidays may back up first.
const CHECKS_APART: Duration = Duration::from_secs(30 * 60);
/// An attempt that moved bytes within this time may still succeed.
const MOVED_WITHIN: Duration = Duration::from_secs(3600);

/// When the copy is overdue, if no success comes; `None`: never. `first_seen` is when `sprat run`
/// first saw it, if it did.
#[must_use]
pub fn overdue_at(
    alert_after: Option<Duration>,
    state: &CopyState,
    now: Timestamp,
) -> Option<Timestamp> {
    let begin = state.last_success.or(state.first_seen).unwrap_or(now);
    // One that a wrong clock wrote counts as the moment when that was seen.
    let begin = match is_ahead(begin, now) {
        true => state.ahead_seen.filter(|seen| *seen <= now).unwrap_or(now),
        false => begin,
    };
    alert_after.map(|after| add(begin, after))
}

/// Whether the copy is overdue.
#[must_use]
pub fn is_overdue(alert_after: Option<Duration>, state: &CopyState, now: Timestamp) -> bool {
    overdue_at(alert_after, state, now).is_some_and(|at| at <= now)
}

/// Checks whether the event `overdue` of the copy opens now, and notes the check in `state`. The
/// caller doesn't call this while the clock is in doubt.
pub fn opens(alert_after: Option<Duration>, state: &mut CopyState, moment: &Moment) -> bool {
    let now = moment.wall;
    let at = overdue_at(alert_after, state, now).filter(|at| *at <= now);
    let (Some(at), Some(alert_after)) = (at, alert_after) else {
        state.found_overdue = None;
        return false;
    };
    let found = FoundOverdue {
        boot_id: moment.boot_id.clone(),
        monotonic_seconds: moment.monotonic.as_secs(),
    };
    let first = match &state.found_overdue {
        Some(first) if first.boot_id == found.boot_id => first.clone(),
        _ => found.clone(),
    };
    let apart = found
        .monotonic_seconds
        .saturating_sub(first.monotonic_seconds);
    state.found_overdue = Some(first);
    let moves = state.bytes_moved_at.is_some_and(|moved| {
        !is_ahead(moved, now) && add(moved, MOVED_WITHIN) > now && add(at, alert_after) > now
    });
    apart >= CHECKS_APART.as_secs() && !moves
}

#[cfg(test)]
mod tests;
