//! Computes percentages, rates and the time left of a backup and of a copy.

use std::time::Duration;

use sprat_snapshot::{Phase, Progress};

/// The percentage of a run of rsync, and whether it is only estimated: rsync finds files while it copies, and
/// the snapshot before shows about how many there will be.
#[must_use]
pub fn percent(rsync: &Progress) -> Option<(u8, bool)> {
    let expected = rsync.files_expected.filter(|files| *files > 0);
    match (rsync.percent, expected) {
        (Some(percent), _) if rsync.all_found => Some((percent, false)),
        (_, Some(expected)) if rsync.phase == Phase::Copying => {
            let percent = u128::from(rsync.files_done) * 100 / u128::from(expected);
            Some((u8::try_from(percent).unwrap_or(99).min(99), true))
        }
        _ => None,
    }
}

/// The time left of a run of rsync, from its own percentage and rate; `None` while it still finds files.
#[must_use]
pub fn time_left_of_rsync(rsync: &Progress) -> Option<Duration> {
    let percent = u128::from(rsync.percent.filter(|percent| (1..100).contains(percent))?);
    let rate = u128::from(rsync.bytes_per_s.filter(|rate| *rate > 0)?);
    if !rsync.all_found {
        return None;
    }
    let left = u128::from(rsync.bytes_done) * (100 - percent) / percent / rate;
    u64::try_from(left).ok().map(Duration::from_secs)
}

/// Bytes per second; `None` in the first half second.
#[must_use]
pub fn bytes_per_s(done_bytes: u64, elapsed: Duration) -> Option<u64> {
    let millis = u64::try_from(elapsed.as_millis())
        .ok()
        .filter(|ms| *ms >= 500)?;
    Some(u64::try_from(u128::from(done_bytes) * 1000 / u128::from(millis)).unwrap_or(u64::MAX))
}

/// The time that `left_bytes` take at `rate`, in bytes per second.
#[must_use]
pub fn time_left(left_bytes: u64, rate: Option<u64>) -> Option<Duration> {
    Some(Duration::from_secs(
        left_bytes / rate.filter(|rate| *rate > 0)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_follow_from_bytes_and_time() {
        let rate = bytes_per_s(300 << 20, Duration::from_secs(30));
        assert_eq!(rate, Some(10 << 20));
        assert_eq!(time_left(724 << 20, rate), Some(Duration::from_secs(72)));
        assert_eq!(bytes_per_s(5, Duration::from_millis(100)), None);
        assert_eq!(time_left(5, Some(0)), None);
    }

    #[test]
    fn time_left_is_unknown_while_rsync_still_finds_files() {
        let mut rsync = Progress::begin(Phase::Copying);
        rsync.percent = Some(50);
        rsync.bytes_per_s = Some(1);
        rsync.bytes_done = 10;
        assert_eq!(time_left_of_rsync(&rsync), None);
        rsync.all_found = true;
        assert_eq!(time_left_of_rsync(&rsync), Some(Duration::from_secs(10)));
    }
}
