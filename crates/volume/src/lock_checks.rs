//! The lock checks made ahead, for epochs that wait behind the one under way.
//!
//! Every epoch has a lock check of its own, which ends before the epoch's first byte is sent and is
//! at most a few seconds old then. On a slow connection a check takes longer than a small epoch. So
//! the checks of several epochs overlap with each other and with the epoch that is being sent. The
//! check for the open epoch starts with its first block.

use std::collections::BTreeMap;
use std::time::Duration;

use sprat_store::clock::since_boot;

use crate::plan::{EpochNumber, Generation};

/// A check that started longer ago than this is not used: the lock's renewal interval. Time asleep
/// counts.
const CHECK_AGE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct LockCheck {
    generation: Generation,
    /// As [`since_boot`] returns it.
    begun: Duration,
    passed: bool,
}

/// What is known about the lock check for an epoch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LockCheckStatus {
    /// The lock was ours.
    Passed,
    /// The check is under way.
    UnderWay,
    /// There is no check, or it is too old, or it was made on a lost connection.
    Unknown,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LockChecks {
    by_epoch: BTreeMap<EpochNumber, LockCheck>,
}

impl LockChecks {
    /// Takes the check for `epoch`, if it may still be used.
    pub(crate) fn take(&mut self, epoch: EpochNumber, generation: Generation) -> LockCheckStatus {
        self.by_epoch = self.by_epoch.split_off(&epoch);
        let Some(check) = self.by_epoch.get(&epoch) else {
            return LockCheckStatus::Unknown;
        };
        let usable = check.generation == generation
            && since_boot().saturating_sub(check.begun) < CHECK_AGE_MAX;
        if usable && !check.passed {
            return LockCheckStatus::UnderWay;
        }
        self.by_epoch.remove(&epoch);
        if usable {
            LockCheckStatus::Passed
        } else {
            LockCheckStatus::Unknown
        }
    }

    pub(crate) fn begin(&mut self, epoch: EpochNumber, generation: Generation) -> Duration {
        let begun = since_boot();
        let check = LockCheck {
            generation,
            begun,
            passed: false,
        };
        self.by_epoch.insert(epoch, check);
        begun
    }

    /// Whether a check for the epoch was started on this connection.
    pub(crate) fn is_asked(&self, epoch: EpochNumber, generation: Generation) -> bool {
        self.by_epoch
            .get(&epoch)
            .is_some_and(|check| check.generation == generation)
    }

    /// Records the end of a check, unless a newer check has replaced it.
    pub(crate) fn end(&mut self, epoch: EpochNumber, begun: Duration, passed: bool) {
        let Some(check) = self.by_epoch.get_mut(&epoch) else {
            return;
        };
        if check.begun != begun {
            return;
        }
        check.passed = passed;
        if !passed {
            self.by_epoch.remove(&epoch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: Generation = Generation(1);

    #[test]
    fn check_is_valid_once_for_its_epoch_and_connection() {
        let mut lock_checks = LockChecks::default();
        let begun = lock_checks.begin(EpochNumber(2), LINE);
        assert_eq!(
            lock_checks.take(EpochNumber(2), LINE),
            LockCheckStatus::UnderWay
        );
        lock_checks.end(EpochNumber(2), begun, true);
        assert_eq!(
            lock_checks.take(EpochNumber(2), Generation(2)),
            LockCheckStatus::Unknown
        );
        let begun = lock_checks.begin(EpochNumber(2), LINE);
        lock_checks.end(EpochNumber(2), begun, true);
        assert_eq!(
            lock_checks.take(EpochNumber(2), LINE),
            LockCheckStatus::Passed
        );
        assert_eq!(
            lock_checks.take(EpochNumber(2), LINE),
            LockCheckStatus::Unknown
        );
    }

    #[test]
    fn end_of_a_replaced_check_is_ignored() {
        let mut lock_checks = LockChecks::default();
        let first = lock_checks.begin(EpochNumber(2), LINE);
        assert_eq!(
            lock_checks.take(EpochNumber(2), Generation(2)),
            LockCheckStatus::Unknown
        );
        let second = lock_checks.begin(EpochNumber(2), Generation(2));
        lock_checks.end(EpochNumber(2), first, true);
        assert_eq!(
            lock_checks.take(EpochNumber(2), Generation(2)),
            LockCheckStatus::UnderWay
        );
        lock_checks.end(EpochNumber(2), second, false);
        assert_eq!(
            lock_checks.take(EpochNumber(2), Generation(2)),
            LockCheckStatus::Unknown
        );
    }

    #[test]
    fn check_that_is_too_old_is_not_used() {
        let old = |age: Duration| {
            let mut lock_checks = LockChecks::default();
            let begun = lock_checks.begin(EpochNumber(2), LINE);
            lock_checks.end(EpochNumber(2), begun, true);
            let check = lock_checks.by_epoch.get_mut(&EpochNumber(2)).unwrap();
            check.begun = since_boot().checked_sub(age).unwrap();
            lock_checks.take(EpochNumber(2), LINE)
        };
        assert_eq!(old(CHECK_AGE_MAX / 2), LockCheckStatus::Passed);
        assert_eq!(old(CHECK_AGE_MAX), LockCheckStatus::Unknown);
    }
}
