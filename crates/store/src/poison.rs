//! Goes on with what a poisoned lock protects.

use std::sync::{LockResult, PoisonError};

/// For the result of `lock()`, `wait()` and the like.
///
/// A lock is poisoned if a thread panicked while it held the lock. Where this is called, the
/// protected value is valid at every moment, so the other threads can go on.
pub trait IgnorePoison {
    /// What the lock gives, poisoned or not.
    type Guard;

    /// Returns the guard, poisoned or not.
    fn ignore_poison(self) -> Self::Guard;
}

impl<G> IgnorePoison for LockResult<G> {
    type Guard = G;

    fn ignore_poison(self) -> G {
        self.unwrap_or_else(PoisonError::into_inner)
    }
}
