//! Reconnects after a lost connection: a server that has just restarted may not have mounted its
//! disk yet.

use sprat_store::{FileName, LockError, Store, StoreError, StoreErrorKind, lock};

use crate::address::Target;
use crate::copy::Job;
use crate::copy::endpoint::{Endpoint, Present, Stores, stat_if_there};
use crate::{Exit, Failure};

impl Job<'_> {
    /// Connects to both endpoints.
    pub(super) fn connect(&mut self) -> Result<Stores, Failure> {
        let began = self.began;
        let connect = |endpoint: &mut Endpoint| {
            let store = endpoint.connect();
            store.map_err(|error| connect_failure(&error, began, &endpoint.options.target))
        };
        Ok(Stores {
            source: connect(&mut self.source)?,
            destination: connect(&mut self.destination)?,
        })
    }

    /// Finds out what the two names refer to. After this run had acquired both leases, a file may
    /// be missing for a moment only: if its lease file is missing too, no disk is mounted there.
    /// Without this check a source would count as removed, a copy would be started over, and a
    /// lease would count as taken by others.
    pub(super) fn inspect(&self, stores: &Stores) -> Result<Present, Failure> {
        let (from, to) = (&self.source, &self.destination);
        // The leases come first: a disk may be mounted between the two checks.
        let locked = match self.began {
            true => Some((
                has_lock(&*stores.source, from.name())?,
                has_lock(&*stores.destination, to.name())?,
            )),
            false => None,
        };
        let stat = |endpoint: &Endpoint, store: &dyn Store| {
            let stat = stat_if_there(store, endpoint.name());
            stat.map_err(|error| connect_failure(&error, self.began, &endpoint.options.target))
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
        // This run asks only after it had acquired both leases.
        Err(LockError::Store { source, .. }) => {
            let mut failure = Failure::from(&source);
            failure.exit = Exit::Unreachable;
            Err(failure)
        }
        Err(error) => Err(Failure::from(&error)),
    }
}

/// Once this run has acquired both leases, it waits and retries after any answer of the server that
/// comes before the lease was read. A server that starts may answer logins before its keys, its
/// home or its disk are there. It may also have another host key, for example that of a system that
/// asks for the disk's passphrase. ssh sends nothing to an unknown host.
fn connect_failure(error: &StoreError, began: bool, target: &Target) -> Failure {
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

/// The connection counts as lost while the files behind it are not there.
fn absent(target: &Target) -> Failure {
    Failure::new(
        Exit::Unreachable,
        format!("{target} is missing since the connection was lost: its disk may not be mounted"),
    )
}
