//! Monitors a copy for its session: progress, interrupt, leases, free space at the destination.

use sprat_store::Store;
use sprat_store::copy::{CopyLeft, CopyProgress, CopyStep, CopyWatch};

use crate::copy::endpoint::{Endpoint, Stores};
use crate::copy::refusals::too_little_space;
use crate::copy::sleep::CopySleep;
use crate::copy::{CopyObserver, CopyPhase};
use crate::interrupt::Interrupt;
use crate::{Exit, Failure};

/// A destination with less free space is full: the account may need some for its own files.
const FREE_BYTES_MIN: u64 = 16 << 20;

/// Monitors a copy.
pub(super) struct Monitor<'a> {
    pub observer: &'a mut dyn CopyObserver,
    pub interrupt: &'a Interrupt,
    pub endpoints: [&'a Endpoint; 2],
    pub stores: &'a Stores,
    sleep: &'a CopySleep,
    step: Option<CopyStep>,
    /// Why the copy was stopped.
    pub failure: Option<Failure>,
    /// Something was read back and was right. The note records it, so the next attempt continues
    /// behind it. A write counts once it is durable, which the note shows.
    pub moved: bool,
    /// Why the copy must stop, by the last checkpoint.
    no_room: Option<Failure>,
}

impl<'a> Monitor<'a> {
    pub(super) fn new(
        observer: &'a mut dyn CopyObserver,
        interrupt: &'a Interrupt,
        endpoints: [&'a Endpoint; 2],
        stores: &'a Stores,
        sleep: &'a CopySleep,
    ) -> Self {
        Self {
            observer,
            interrupt,
            endpoints,
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

impl CopyWatch for Monitor<'_> {
    fn progress(&mut self, progress: &CopyProgress) -> bool {
        if self.step.replace(progress.step) != Some(progress.step) {
            self.observer.phase(match progress.step {
                CopyStep::Copying => CopyPhase::Copying,
                CopyStep::Verifying => CopyPhase::Verifying,
            });
        }
        self.moved |= progress.verified_bytes > 0;
        self.observer.progress(progress);
        if let Some(failure) = self
            .endpoints
            .iter()
            .find_map(|endpoint| endpoint.lease.lost())
        {
            return self.stop(failure);
        }
        if let Some(failure) = self.no_room.take() {
            return self.stop(failure);
        }
        // What has arrived is made durable and recorded. The next attempt begins after waking.
        if self.sleep.is_on() {
            let what = "the machine is about to sleep";
            return self.stop(Failure::new(Exit::Unreachable, what));
        }
        self.failure.is_none() && !self.interrupt.requested()
    }

    fn checkpoint(&mut self, left: CopyLeft) -> bool {
        let [from, to] = self.endpoints;
        match from.lease.verify(&*self.stores.source) {
            Err(failure) if failure.exit == Exit::Locked => return self.stop(failure),
            // A lost connection says nothing about the lease, and what has arrived is recorded all
            // the same. Both are checked again before the copy continues or gets its name.
            _ => {}
        }
        if let Err(failure) = to.lease.verify(&*self.stores.destination) {
            return self.stop(failure);
        }
        // What has arrived is recorded all the same. Then the copy stops.
        self.no_room = no_room(&*self.stores.destination, left);
        true
    }
}

/// Why the rest of the copy does not fit. If it is not known how much is left, a disk with little
/// free space counts as full, unless all of the rest fits.
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
    fn space_is_needed_only_for_what_is_left_to_write() {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::open(dir.path()).unwrap();
        assert!(no_room(&store, CopyLeft::Bytes(0)).is_none());
        assert!(no_room(&store, CopyLeft::AtMost(0)).is_none());
        let refused = no_room(&store, CopyLeft::Bytes(u64::MAX)).unwrap();
        assert!(refused.what.contains("still to be copied"), "{refused}");
    }
}
