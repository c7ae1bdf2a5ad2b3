//! Two clocks, one for ages that decide whether bytes may be sent and one for dates; and which boot
//! this is.

use std::time::Duration;

/// Returns the time since boot, time asleep included (`CLOCK_BOOTTIME`, clock_gettime(2)).
///
/// [`std::time::Instant`] stands still while the machine sleeps: a lock check from before a sleep
/// of hours would count as a moment old.
#[must_use]
pub fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// Seconds since the epoch by this machine's wall clock, which may be set; 0 before the epoch.
pub(crate) fn now_s() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// A number that differs from one boot to the next (proc(5)); 0 if unknown.
pub(crate) fn boot_id() -> u64 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = id
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(16)
        .collect();
    u64::from_str_radix(&digits, 16).unwrap_or(0)
}
