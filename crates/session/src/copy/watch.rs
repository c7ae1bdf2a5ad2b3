//! Watches a copy for its session: progress, interrupt, locks, room at the destination.

use sprat_store::Store;
use sprat_store::copy::{CopyLeft, CopyProgress, CopyStep, CopyWatch};

use crate::copy::attempt::Stores;
use crate::copy::refusals::too_little_space;
use crate::copy::side::Side;
use crate::copy::sleep::CopySleep;
use crate::copy::{CopyObserver, CopyPhase};
use crate::interrupt::Interrupt;
use crate::{Exit, Failure};

/// A destination with less than this is full: the account may need some for its own files.
const FREE_BYTES_MIN: u64 = 16 << 20;

/// Watches a copy.
pub(super) struct Watch<'a> {
    pub observer: &'a mut dyn CopyObserver,
    pub interrupt: &'a Interrupt,
    pub sides: [&'a Side; 2],
    pub stores: &'a Stores,
    sleep: &'a CopySleep,
    step: Option<CopyStep>,
    /// Why the copy was stopped.
    pub failure: Option<Failure>,
    /// Something was read back and found right: it is noted, so a next attempt goes on behind it. What
    /// was written counts once it is durable, which the note shows.
    pub moved: bool,
    /// Why it is to be stopped, as it looked at the last checkpoint.
    no_room: Option<Failure>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        observer: &'a mut dyn CopyObserver,
        interrupt: &'a Interrupt,
        sides: [&'a Side; 2],
        stores: &'a Stores,
        sleep: &'a CopySleep,
    ) -> Self {
        Self {
            observer,
            interrupt,
            sides,
            stores,
            sleep,
            step: None,
            failure: None,
            moved: false,
            no_room: None,
        }
    }

    fn stop(&mut self, failure: Failure) -> bool {
        self.failure.get_or_insert(failure);
        false
    }
}

impl CopyWatch for Watch<'_> {
    fn progress(&mut self, progress: &CopyProgress) -> bool {
        if self.step.replace(progress.step) != Some(progress.step) {
            self.observer.phase(match progress.step {
                CopyStep::Copying => CopyPhase::Copying,
                CopyStep::Verifying => CopyPhase::Verifying,
            });
        }
        self.moved |= progress.verified_bytes > 0;
        self.observer.progress(progress);
        if let Some(failure) = self.sides.iter().find_map(|side| side.lease.lost()) {
            return self.stop(failure);
        }
        if let Some(failure) = self.no_room.take() {
            return self.stop(failure);
        }
        // What has arrived is made durable and noted; the next attempt begins when it is awake.
        if self.sleep.is_on() {
            let what = "the machine is about to sleep";
            return self.stop(Failure::new(Exit::Unreachable, what));
        }
        self.failure.is_none() && !self.interrupt.requested()
    }

    fn checkpoint(&mut self, left: CopyLeft) -> bool {
        let [from, to] = self.sides;
        match from.lease.still_ours(&*self.stores.source) {
            Err(failure) if failure.exit == Exit::Locked => return self.stop(failure),
            // A lost line says nothing of the lock, and what has arrived is noted all the same. Both
            // are looked at again before the copy goes on or gets its name.
            _ => {}
        }
        if let Err(failure) = to.lease.still_ours(&*self.stores.destination) {
            return self.stop(failure);
        }
        // What has arrived is noted all the same, and then it stops.
        self.no_room = no_room(&*self.stores.destination, left);
        true
    }
}

/// Why what is left to be written doesn't fit. Where it isn't known how much that is, a disk on
/// which little is free counts as full; not where even all of it fits.
fn no_room(destination: &dyn Store, left: CopyLeft) -> Option<Failure> {
    let available = destination.free_space().ok()?.available_bytes;
    let needed = match left {
        CopyLeft::Bytes(bytes) => bytes,
        CopyLeft::AtMost(bytes) => bytes.min(FREE_BYTES_MIN),
    };
    (available < needed).then(|| too_little_space(left, available))
}

#[cfg(test)]
mod tests {
    use sprat_store::LocalStore;

    use super::*;

    #[test]
    fn room_is_missed_only_for_what_is_left_to_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::open(dir.path()).unwrap();
        assert!(no_room(&store, CopyLeft::Bytes(0)).is_none());
        assert!(no_room(&store, CopyLeft::AtMost(0)).is_none());
        let refused = no_room(&store, CopyLeft::Bytes(u64::MAX)).unwrap();
        assert!(refused.what.contains("still to be copied"), "{refused}");
    }
}
