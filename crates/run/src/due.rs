//! Decides when a copy is due: by its schedule, and by how its last attempts ended.
//!
//! Everything here is a pure function: the caller passes the time.

mod at;

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_session::Exit;

use crate::copy_state::CopyState;
use crate::times::{add, is_ahead};

pub use at::{At, AtTime, spread_part};

/// Half of the 15 minutes between two ticks.
const SLACK_MAX: Duration = Duration::from_secs(450);
/// An attempt that did not reach the server is repeated at each tick for so long, then hourly.
const EACH_TICK_MAX: Duration = Duration::from_secs(2 * 3600);
const HOUR: Duration = Duration::from_secs(3600);
/// How long to wait after the first failed attempt, the second, and so on.
const FAILED_DELAYS: [Duration; 4] = [
    Duration::from_secs(15 * 60),
    Duration::from_secs(30 * 60),
    Duration::from_secs(3600),
    Duration::from_secs(2 * 3600),
];
/// How long to wait after each further one, at least.
const FAILED_DELAY_LAST: Duration = Duration::from_secs(4 * 3600);

/// When a copy shall be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Schedule {
    /// So long after the last one began.
    Every(Duration),
    /// At times of the day.
    At(At),
    /// By hand only.
    Never,
}

impl Schedule {
    /// The longest time between two copies, in a week without a change of the clocks; `None`: never.
    #[must_use]
    pub fn longest_gap(&self) -> Option<Duration> {
        match self {
            Self::Every(time) => Some(*time),
            Self::At(at) => at.longest_gap(),
            Self::Never => None,
        }
    }

    /// This schedule with every occurrence of `at` later by `later`.
    #[must_use]
    pub fn later_by(mut self, later: Duration) -> Self {
        if let Self::At(at) = &mut self {
            at.later = later;
        }
        self
    }
}

/// Whether a copy is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// It is due now.
    pub due: bool,
    /// Why, or why not.
    pub why: Why,
    /// When it is due; now if it is due. `None`: never.
    pub next: Option<Timestamp>,
}

/// Why a copy is due or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Due: no success is known.
    NoSuccess,
    /// Due since then by its schedule.
    Since(Timestamp),
    /// Not due: the last success began then.
    Succeeded(Timestamp),
    /// Due by its schedule, but the last attempt ended so, and the next one waits.
    WaitsAfter(Exit),
    /// Not due: it is made by hand only.
    ByHand,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuccess => write!(f, "no backup yet"),
            Self::Since(_) => write!(f, "due by its schedule"),
            Self::Succeeded(_) => write!(f, "not due yet"),
            Self::WaitsAfter(exit) => {
                write!(f, "waits after the last attempt ({})", exit.meaning())
            }
            Self::ByHand => write!(f, "by hand only"),
        }
    }
}

/// Decides whether a copy is due at `now`. `inputs` stands for the config and the key file as they
/// are now; after some failures only a change of them is worth another attempt.
#[must_use]
pub fn decide(
    schedule: &Schedule,
    zone: &TimeZone,
    state: &CopyState,
    inputs: &str,
    now: Timestamp,
) -> Decision {
    let success = state
        .last_success
        .filter(|success| !is_ahead(*success, now));
    let scheduled = match (schedule, success) {
        (Schedule::Never, _) => None,
        (_, None) => Some((now, Why::NoSuccess)),
        (schedule, Some(success)) => {
            next_after(schedule, zone, success).map(|next| match next <= now {
                true => (next, Why::Since(next)),
                false => (next, Why::Succeeded(success)),
            })
        }
    };
    let Some((scheduled, why)) = scheduled else {
        return Decision {
            due: false,
            why: Why::ByHand,
            next: None,
        };
    };
    let (earliest, why) = match waits_until(schedule, zone, state, inputs, now) {
        Some((until, exit)) if until > now && scheduled <= now => (until, Why::WaitsAfter(exit)),
        Some((until, _)) => (until, why),
        None => (scheduled, why),
    };
    let next = scheduled.max(earliest).max(now);
    Decision {
        due: next <= now,
        why,
        next: Some(next),
    }
}

/// When a copy is due that was last made at `last`; `None`: never.
fn next_after(schedule: &Schedule, zone: &TimeZone, last: Timestamp) -> Option<Timestamp> {
    match schedule {
        Schedule::Every(every) => Some(add_less_slack(last, *every)),
        Schedule::At(at) => at.next_after(zone, last),
        Schedule::Never => None,
    }
}

/// Until when the next attempt waits because of how the last one ended.
fn waits_until(
    schedule: &Schedule,
    zone: &TimeZone,
    state: &CopyState,
    inputs: &str,
    now: Timestamp,
) -> Option<(Timestamp, Exit)> {
    let last = state.last_attempt.as_ref()?;
    // An attempt of a clock that was wrong must not delay anything.
    if is_ahead(last.ended, now) || is_ahead(last.started, now) {
        return None;
    }
    let until = match last.exit {
        Exit::Done | Exit::Unread | Exit::Interrupted | Exit::Overdue | Exit::Exists => {
            return None;
        }
        Exit::Unreachable | Exit::Locked => {
            let since = state.not_reached_since.unwrap_or(last.started);
            let each_tick = add(since, EACH_TICK_MAX) > last.started;
            (!each_tick).then(|| add_less_slack(last.ended, HOUR))?
        }
        Exit::Usage | Exit::NoContainer | Exit::WrongKey | Exit::Damaged => {
            let unchanged = last.inputs == inputs;
            unchanged.then(|| next_after(schedule, zone, last.started))??
        }
        Exit::Failed => {
            let number = usize::try_from(state.failed_in_a_row).unwrap_or(usize::MAX);
            match FAILED_DELAYS.get(number.saturating_sub(1)) {
                Some(delay) => add_less_slack(last.ended, *delay),
                // No more often than the copy is made when all is well.
                None => add_less_slack(last.ended, FAILED_DELAY_LAST).max(next_after(
                    schedule,
                    zone,
                    last.started,
                )?),
            }
        }
    };
    Some((until, last.exit))
}

/// So runs stay on their tick: a run that begins some seconds after its tick does not move the next
/// one to a later tick.
pub(crate) fn add_less_slack(time: Timestamp, wait: Duration) -> Timestamp {
    add(time, wait - SLACK_MAX.min(wait / 10))
}

#[cfg(test)]
mod tests;
