//! Takes a lost line up again: a server that has just come back may not have mounted its disk yet.

use sprat_store::{FileName, LockError, Store, StoreError, StoreErrorKind, lock};

use crate::address::Target;
use crate::copy::Job;
use crate::copy::attempt::{Present, Stores, stat_if_there};
use crate::copy::side::Side;
use crate::{Exit, Failure};

impl Job<'_> {
    /// Connects to both.
    pub(super) fn connect(&mut self) -> Result<Stores, Failure> {
        let began = self.began;
        let connect = |side: &mut Side| {
            let store = side.connect();
            store.map_err(|error| explained(&error, began, &side.options.target))
        };
        Ok(Stores {
            source: connect(&mut self.source)?,
            destination: connect(&mut self.destination)?,
        })
    }

    /// Looks what there is. Once this run has held both, what isn't there any more may be back in a
    /// moment, if the lock beside it is gone, too: no disk is mounted there. Otherwise a source would
    /// count as removed, a copy as to be begun anew, and a lock as taken by others.
    pub(super) fn look(&self, stores: &Stores) -> Result<Present, Failure> {
        let (from, to) = (&self.source, &self.destination);
        // The locks first: a disk may be mounted between two looks.
        let locked = match self.began {
            true => Some((
                has_lock(&*stores.source, from.name())?,
                has_lock(&*stores.destination, to.name())?,
            )),
            false => None,
        };
        let stat = |side: &Side, store: &dyn Store| {
            let stat = stat_if_there(store, side.name());
            stat.map_err(|error| explained(&error, self.began, &side.options.target))
        };
        let mut there = Present {
            source: stat(from, &*stores.source)?,
            destination: stat(to, &*stores.destination)?,
            set_aside: false,
        };
        if there.source.is_none() && self.note.is_some() {
            let aside = stat_if_there(&*stores.source, &self.aside_name()?)?;
            there.set_aside = aside.is_some();
            if there.set_aside {
                return Ok(there);
            }
        }
        if let Some((source_locked, destination_locked)) = locked {
            if there.source.is_none() && !source_locked {
                return Err(absent(&from.options.target));
            }
            if there.destination.is_none()
                && !destination_locked
                && !self.has_unfinished(&*stores.destination)?
            {
                return Err(absent(&to.options.target));
            }
        }
        Ok(there)
    }

    fn has_unfinished(&self, store: &dyn Store) -> Result<bool, Failure> {
        let Some(note) = &self.note else {
            return Ok(false);
        };
        let there = stat_if_there(store, &self.unfinished_name(note)?)?;
        Ok(there.is_some())
    }
}

fn has_lock(store: &dyn Store, name: &FileName) -> Result<bool, Failure> {
    match lock::inspect(store, name, None) {
        Ok(found) => Ok(found.held.is_some()),
        Err(LockError::Store { source, .. }) if is_absent(&source) => Ok(false),
        // Asked only once both sides were held.
        Err(LockError::Store { source, .. }) => {
            let mut failure = Failure::from(&source);
            failure.exit = Exit::Unreachable;
            Err(failure)
        }
        Err(error) => Err(Failure::from(&error)),
    }
}

/// Once this run has held both sides, whatever the server says before the lock was read is waited out: a
/// server that starts answers logins before its keys, its home or its disk are there, or with another
/// host key (one that asks for the disk's passphrase). ssh sends nothing to a host that it doesn't know.
fn explained(error: &StoreError, began: bool, target: &Target) -> Failure {
    if began && is_absent(error) {
        return absent(target).caused_by(error);
    }
    let mut failure = Failure::from(error);
    if began {
        failure.exit = Exit::Unreachable;
    }
    failure
}

fn is_absent(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        StoreErrorKind::NotFound | StoreErrorKind::PermissionDenied
    )
}

/// A line counts as lost for as long as nothing can be done behind it.
fn absent(target: &Target) -> Failure {
    Failure::new(
        Exit::Unreachable,
        format!("{target} is not there since the line was lost: its disk may not be mounted"),
    )
}
