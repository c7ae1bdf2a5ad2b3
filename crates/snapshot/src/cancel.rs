//! A request to stop that several threads share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A request to stop, shared between threads. A running rsync gets SIGTERM, and SIGKILL some seconds
/// later.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<Requests>);

#[derive(Debug, Default)]
struct Requests {
    /// Stops what runs, and all that follows.
    all: AtomicBool,
    /// Stops what runs.
    current: AtomicBool,
}

impl Cancel {
    /// A new one: nothing has to stop yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Requests the stop. May be called at any time, and more than once.
    pub fn cancel(&self) {
        self.0.all.store(true, Ordering::SeqCst);
    }

    /// Requests the stop of what runs now, until [`Cancel::begin_next`].
    pub fn cancel_current(&self) {
        self.0.current.store(true, Ordering::SeqCst);
    }

    /// Something else begins. A stop of everything stays requested.
    pub fn begin_next(&self) {
        self.0.current.store(false, Ordering::SeqCst);
    }

    /// Whether a stop was requested.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.all.load(Ordering::SeqCst) || self.0.current.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_of_one_ends_with_it_and_stop_of_all_stays() {
        let cancel = Cancel::new();
        let seen = cancel.clone();
        cancel.cancel_current();
        assert!(seen.is_cancelled());
        cancel.begin_next();
        assert!(!seen.is_cancelled());
        cancel.cancel();
        cancel.begin_next();
        assert!(seen.is_cancelled());
    }
}
