//! The permitter threads: they check the lock for epochs that wait behind the one under way.
//!
//! Every epoch still has a check of its own that ends before its first byte is sent, and that
//! began a short while before at most. On a slow line a check takes longer than a small epoch, so
//! checks of several epochs overlap with each other and with the epoch that is being sent. The
//! open epoch's begins with its first block.

use std::collections::BTreeMap;
use std::time::Duration;

use sprat_store::clock::since_boot;

use crate::plan::{EpochNumber, Generation};

/// A check that began longer ago than the lock's renewal interval is not used any more, time asleep
/// included.
const PERMIT_AGE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Permit {
    generation: Generation,
    /// By [`since_boot`].
    begun: Duration,
    granted: bool,
}

/// What is known of an epoch's permit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// The lock was ours.
    Granted,
    /// A permitter is asking.
    UnderWay,
    /// Nobody asked, or too long ago, or on a lost connection.
    Unknown,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Permits {
    by_epoch: BTreeMap<EpochNumber, Permit>,
}

impl Permits {
    /// Takes the permit of `epoch`, if there is one that may still be used.
    pub(crate) fn take(&mut self, epoch: EpochNumber, generation: Generation) -> Ahead {
        self.by_epoch = self.by_epoch.split_off(&epoch);
        let Some(permit) = self.by_epoch.get(&epoch) else {
            return Ahead::Unknown;
        };
        let usable = permit.generation == generation
            && since_boot().saturating_sub(permit.begun) < PERMIT_AGE_MAX;
        if usable && !permit.granted {
            return Ahead::UnderWay;
        }
        self.by_epoch.remove(&epoch);
        if usable {
            Ahead::Granted
        } else {
            Ahead::Unknown
        }
    }

    pub(crate) fn begin(&mut self, epoch: EpochNumber, generation: Generation) -> Duration {
        let begun = since_boot();
        let permit = Permit {
            generation,
            begun,
            granted: false,
        };
        self.by_epoch.insert(epoch, permit);
        begun
    }

    /// Whether somebody has asked for the epoch on this connection.
    pub(crate) fn is_asked(&self, epoch: EpochNumber, generation: Generation) -> bool {
        self.by_epoch
            .get(&epoch)
            .is_some_and(|permit| permit.generation == generation)
    }

    /// Notes the end of a check, unless another one has taken its place.
    pub(crate) fn end(&mut self, epoch: EpochNumber, begun: Duration, granted: bool) {
        let Some(permit) = self.by_epoch.get_mut(&epoch) else {
            return;
        };
        if permit.begun != begun {
            return;
        }
        permit.granted = granted;
        if !granted {
            self.by_epoch.remove(&epoch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: Generation = Generation(1);

    #[test]
    fn a_permit_is_good_once_for_its_epoch_and_its_connection() {
        let mut permits = Permits::default();
        let begun = permits.begin(EpochNumber(2), LINE);
        assert_eq!(permits.take(EpochNumber(2), LINE), Ahead::UnderWay);
        permits.end(EpochNumber(2), begun, true);
        assert_eq!(permits.take(EpochNumber(2), Generation(2)), Ahead::Unknown);
        let begun = permits.begin(EpochNumber(2), LINE);
        permits.end(EpochNumber(2), begun, true);
        assert_eq!(permits.take(EpochNumber(2), LINE), Ahead::Granted);
        assert_eq!(permits.take(EpochNumber(2), LINE), Ahead::Unknown);
    }

    #[test]
    fn the_end_of_an_overtaken_check_grants_nothing() {
        let mut permits = Permits::default();
        let first = permits.begin(EpochNumber(2), LINE);
        assert_eq!(permits.take(EpochNumber(2), Generation(2)), Ahead::Unknown);
        let second = permits.begin(EpochNumber(2), Generation(2));
        permits.end(EpochNumber(2), first, true);
        assert_eq!(permits.take(EpochNumber(2), Generation(2)), Ahead::UnderWay);
        permits.end(EpochNumber(2), second, false);
        assert_eq!(permits.take(EpochNumber(2), Generation(2)), Ahead::Unknown);
    }

    #[test]
    fn a_permit_that_was_asked_for_too_long_ago_is_not_used() {
        let old = |age: Duration| {
            let mut permits = Permits::default();
            let begun = permits.begin(EpochNumber(2), LINE);
            permits.end(EpochNumber(2), begun, true);
            let permit = permits.by_epoch.get_mut(&EpochNumber(2)).unwrap();
            permit.begun = since_boot().checked_sub(age).unwrap();
            permits.take(EpochNumber(2), LINE)
        };
        assert_eq!(old(PERMIT_AGE_MAX / 2), Ahead::Granted);
        assert_eq!(old(PERMIT_AGE_MAX), Ahead::Unknown);
    }
}
