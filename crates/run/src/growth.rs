//! Whether a copy is about to upload, or to change, far more than usual.
//!
//! Pure figures. Where they come from: the source walk, the local list of the last snapshot, and the
//! history of the copy.

use jiff::{SignedDuration, Timestamp};

/// The usual is known from so many successes on.
pub const SUCCESSES_MIN: usize = 5;
/// The usual is the median of so many last successes.
pub const SUCCESSES_MAX: usize = 10;
/// An upload up to this size is never an alarm if the limit is a multiple of the usual.
pub const GROWTH_BYTES_MIN: u64 = 5 << 30;
/// So few changed files are never an alarm.
pub const CHANGED_FILES_MIN: u64 = 1000;

/// A success, as the usual is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PastUpload {
    /// When it began.
    pub begun: Timestamp,
    /// When the success before it began; `None`: it was the first one.
    pub before: Option<Timestamp>,
    /// What it uploaded.
    pub sent_bytes: u64,
}

/// `growth_limit`: from when an upload is too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrowthLimit {
    /// More than so many times the usual, and more than [`GROWTH_BYTES_MIN`].
    Times(u32),
    /// More than so many bytes.
    Bytes(u64),
}

/// Bytes that are usual for an upload now: the median over the last successes of the bytes for each
/// `every`, times the `every`s since the last one. After a week away, seven days' growth is usual.
/// `None` before the fifth success.
///
/// `successes` are in any order; the first of a copy uploads everything, and is no measure.
#[must_use]
pub fn usual_bytes(successes: &[PastUpload], every: SignedDuration, now: Timestamp) -> Option<u64> {
    if successes.len() < SUCCESSES_MIN {
        return None;
    }
    let mut newest_first = successes.to_vec();
    newest_first.sort_unstable_by_key(|success| std::cmp::Reverse(success.begun));
    let last = newest_first.first()?.begun;
    let mut rates: Vec<_> = newest_first
        .iter()
        .take(SUCCESSES_MAX)
        .filter_map(|success| {
            let covered = Covered::between(success.before?, success.begun, every);
            Some(covered.rate(success.sent_bytes))
        })
        .collect();
    rates.sort_unstable();
    let middle = rates.len() / 2;
    let median = match rates.len() {
        0 => return None,
        count if count % 2 == 1 => rates[middle],
        _ => rates[middle - 1].midpoint(rates[middle]),
    };
    Some(Covered::between(last, now, every).amount(median))
}

/// A time in relation to `every`, at least one of it: a second backup by hand is not a lower rate, and
/// a clock that went back is none.
struct Covered {
    seconds: u128,
    every: u128,
}

impl Covered {
    fn between(from: Timestamp, to: Timestamp, every: SignedDuration) -> Self {
        let seconds = |time: SignedDuration| u128::try_from(time.as_secs()).unwrap_or(0);
        let every = seconds(every).max(1);
        Self {
            seconds: seconds(to.duration_since(from)).max(every),
            every,
        }
    }

    /// Of bytes in this time: those in one `every`.
    fn rate(&self, bytes: u64) -> u64 {
        let rate = u128::from(bytes) * self.every / self.seconds;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    /// Of bytes in one `every`: those in this time.
    fn amount(&self, rate: u64) -> u64 {
        let bytes = u128::from(rate) * self.seconds / self.every;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// The most bytes that are no alarm. `None`: nothing is one, before the usual is known.
#[must_use]
pub fn most_bytes(usual: Option<u64>, limit: GrowthLimit) -> Option<u64> {
    let usual = usual?;
    Some(match limit {
        GrowthLimit::Times(times) => {
            let most = usual.saturating_mul(u64::from(times));
            most.max(GROWTH_BYTES_MIN)
        }
        GrowthLimit::Bytes(most) => most,
    })
}

/// Whether so many files that changed or went are too many: more than `limit_percent` of the last
/// snapshot's files, and more than [`CHANGED_FILES_MIN`].
#[must_use]
pub fn is_change(changed_or_gone: u64, files_before: u64, limit_percent: u32) -> bool {
    let over =
        u128::from(changed_or_gone) * 100 > u128::from(files_before) * u128::from(limit_percent);
    over && changed_or_gone > CHANGED_FILES_MIN
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const DAY: SignedDuration = SignedDuration::from_hours(24);

    fn day(number: i64) -> Timestamp {
        Timestamp::from_second(1_795_000_000 + number * 86_400).unwrap()
    }

    /// One success a day with these bytes, the first of them on day 0.
    fn daily(bytes: &[u64]) -> Vec<PastUpload> {
        let successes = bytes
            .iter()
            .zip(0..)
            .map(|(sent_bytes, number)| PastUpload {
                begun: day(number),
                before: (number > 0).then(|| day(number - 1)),
                sent_bytes: *sent_bytes,
            });
        successes.collect()
    }

    #[test]
    fn usual_is_the_median_of_the_last_ten() {
        for (bytes, usual) in [
            (&[][..], None),
            (&[900, 1, 1, 1], None),
            // The first one uploads everything and does not count.
            (&[900, 1, 2, 3, 4], Some(2)),
            (&[900, 1, 2, 3, 4, 5], Some(3)),
            (&[900, 5, 5, 5, 900, 5], Some(5)),
            // Only the last ten.
            (&[900, 7, 7, 7, 7, 7, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2], Some(1)),
        ] {
            let successes = daily(bytes);
            let now = day(i64::try_from(bytes.len()).unwrap());
            assert_eq!(usual_bytes(&successes, DAY, now), usual, "{bytes:?}");
            let mut shuffled = successes.clone();
            shuffled.reverse();
            assert_eq!(
                usual_bytes(&shuffled, DAY, now),
                usual,
                "{bytes:?} reversed"
            );
        }
    }

    #[test]
    fn a_week_away_makes_seven_days_growth_usual() {
        let successes = daily(&[900, 10, 10, 10, 10, 10]);
        for (now, usual) in [(6, 10), (12, 70), (5, 10), (0, 10)] {
            assert_eq!(
                usual_bytes(&successes, DAY, day(now)),
                Some(usual),
                "day {now}"
            );
        }
        // A success after a week away has seven days' growth, too.
        let mut after = successes;
        for number in 0..5 {
            after.push(PastUpload {
                begun: day(12 + number * 7),
                before: Some(day(5 + number * 7)),
                sent_bytes: 70,
            });
        }
        assert_eq!(usual_bytes(&after, DAY, day(41)), Some(10));
    }

    #[test]
    fn second_success_on_the_same_day_lowers_nothing() {
        let mut successes = daily(&[900, 10, 10, 10, 10, 10]);
        successes.push(PastUpload {
            begun: day(5) + SignedDuration::from_hours(1),
            before: Some(day(5)),
            sent_bytes: 10,
        });
        let now = day(5) + SignedDuration::from_hours(25);
        assert_eq!(usual_bytes(&successes, DAY, now), Some(10));
    }

    #[test]
    fn growth_is_over_the_limit_and_over_5_gib() {
        let ten = GrowthLimit::Times(10);
        for (upload, usual, limit, is) in [
            (500 * GIB, None, ten, false),
            (500 * GIB, None, GrowthLimit::Bytes(GIB), false),
            (10 * GIB, Some(GIB), ten, false),
            (10 * GIB + 1, Some(GIB), ten, true),
            (5 * GIB, Some(1), ten, false),
            (5 * GIB + 1, Some(1), ten, true),
            (5 * GIB + 1, Some(0), ten, true),
            (u64::MAX, Some(u64::MAX / 2), ten, false),
            (GIB, Some(0), GrowthLimit::Bytes(GIB), false),
            (GIB + 1, Some(500 * GIB), GrowthLimit::Bytes(GIB), true),
        ] {
            let most = most_bytes(usual, limit);
            assert_eq!(
                most.is_some_and(|most| upload > most),
                is,
                "{upload} {usual:?} {limit:?}"
            );
        }
    }

    #[test]
    fn change_is_over_the_share_and_over_1000_files() {
        for (changed, before, percent, is) in [
            (300, 1000, 30, false),
            (1000, 1000, 30, false),
            (1001, 1000, 30, true),
            (3000, 10_000, 30, false),
            (3001, 10_000, 30, true),
            (1001, 0, 30, true),
            (1001, 1001, 100, false),
            (u64::MAX, u64::MAX, 30, true),
            (0, 0, 0, false),
        ] {
            assert_eq!(
                is_change(changed, before, percent),
                is,
                "{changed} of {before}"
            );
        }
    }
}
