//! Removes leases that no listing needs any more.

use super::seen::{lock_name, numbers_in, read_lease};
use super::{Lock, LockError};
use crate::{Store, StoreErrorKind};

/// A lease goes when a later one was free for so long before ours was made, by the server's clock:
/// every listing, however old it is, shows that one by now. Who saw none but an earlier one would
/// make a number again.
const KEEP_S: u64 = 3600;
/// At most so many in one session.
const REMOVED_MAX: usize = 32;

impl Lock {
    /// Removes old leases; for a holder, after its first good look. Returns how many are left below
    /// ours. An account that may not remove keeps them all, and nothing is said of it.
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
            // One that was never given back is passed: a later one that was stands for both.
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
