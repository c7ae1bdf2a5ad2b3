//! Removes leases that no listing needs any more.

use super::lease::{lock_name, numbers_in, read_lease};
use super::{Lock, LockError};
use crate::{Store, StoreErrorKind};

/// A lease may be removed if a later one was free this long before ours was created, by the
/// server's clock: then every listing, however old, shows that later one. A session that saw only
/// an earlier lease would create an existing number again.
const KEEP_S: u64 = 3600;
/// At most so many are removed in one session.
const REMOVED_MAX: usize = 32;

impl Lock {
    /// Removes old leases. Call it while the lease is ours, after the second check. Returns how
    /// many are left below ours. An account that may not remove files keeps them all; that is not
    /// reported.
    pub fn remove_old(&self, store: &dyn Store) -> Result<usize, LockError> {
        let failed = |source| self.failed("remove old leases of", source);
        let now = self.now();
        let (numbers, _) = numbers_in(&self.container, &store.list().map_err(failed)?);
        let below: Vec<u64> = numbers.into_iter().filter(|n| *n < now.number).collect();
        let mut removed = 0;
        for pair in below.windows(2).take(REMOVED_MAX) {
            let later = read_lease(store, pair[1], &lock_name(&self.container, pair[1])?);
            let later = later.map_err(failed)?;
            let free = later.content.as_ref().is_some_and(|content| content.free);
            let old = later
                .modified_s
                .is_some_and(|at| at.saturating_add(KEEP_S) <= now.made_at.0);
            // One that was never released is passed: a later one that was released covers both.
            if !free {
                continue;
            }
            if !old {
                break;
            }
            for number in below.iter().skip(removed).take_while(|n| **n < pair[1]) {
                match store.remove(&lock_name(&self.container, *number)?) {
                    Ok(()) => {}
                    Err(error) if error.kind() == StoreErrorKind::NotFound => {}
                    Err(source) => return Err(failed(source)),
                }
                removed += 1;
            }
        }
        Ok(below.len() - removed)
    }
}
