//! Sums of times that stay in range, and times that a wrong clock wrote.

use std::time::Duration;

use jiff::Timestamp;

/// A time that lies further ahead of now than this was written by a wrong clock.
pub const AHEAD_MAX: Duration = Duration::from_secs(5 * 60);

/// Whether a time was written by a clock that was ahead of `now`.
#[must_use]
pub fn is_ahead(time: Timestamp, now: Timestamp) -> bool {
    time > add(now, AHEAD_MAX)
}

/// `time` and `wait`, at most the last time that can be written.
pub(crate) fn add(time: Timestamp, wait: Duration) -> Timestamp {
    time.saturating_add(wait).unwrap_or(Timestamp::MAX)
}
