//! The two clocks: one for ages that decide whether bytes may be sent, one for dates.

use std::time::Duration;

/// Time since boot, time asleep included (`CLOCK_BOOTTIME`, clock_gettime(2)).
///
/// [`std::time::Instant`] stands still while the machine sleeps: a look at the lock from before a
/// sleep of hours would count as a moment old.
#[must_use]
pub fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// Seconds since the epoch by this machine's clock, which people set; 0 before the epoch.
pub(crate) fn now_s() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
