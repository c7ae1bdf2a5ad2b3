//! What a session does when its machine is about to sleep: it sends nothing more, waits for the answers
//! to what it sent, and ends its connections. After waking it goes on as after a lost connection.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::super::late::Sent;
use super::super::sleep::{self, Sleeper};
use super::Hold;

/// logind waits for 5 s by default.
const DRAIN_MAX: Duration = Duration::from_secs(4);
/// A machine that is awake for so long after it said that it sleeps does not sleep.
const AWAKE_MAX: Duration = Duration::from_secs(60);

/// Whether the machine is about to sleep.
#[derive(Default)]
pub(super) struct Sleep {
    /// Since when, on a clock that stands still while the machine sleeps.
    since: Mutex<Option<Instant>>,
    changed: Condvar,
    watched: Mutex<Option<Weak<Hold>>>,
}

impl Sleep {
    fn since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watched(&self) -> MutexGuard<'_, Option<Weak<Hold>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for as long as the machine is about to sleep, sleeps, or wakes.
    pub(super) fn wait_until_awake(&self) {
        let mut since = self.since();
        while let Some(begun) = *since {
            let left = AWAKE_MAX.saturating_sub(begun.elapsed());
            if left.is_zero() {
                *since = None;
                return;
            }
            since = self
                .changed
                .wait_timeout(since, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.since().is_some()
    }
}

impl Hold {
    /// From the first write on logind is asked to wait for us before the machine sleeps.
    pub(super) fn will_bear_sleep(self: &Arc<Self>) {
        *self.sleep.watched() = Some(Arc::downgrade(self));
    }

    /// Before something is sent: waits while the machine is about to sleep.
    pub(super) fn wait_until_awake(&self) {
        if let Some(hold) = self.sleep.watched().take() {
            sleep::watch(OfHold(hold));
        }
        self.sleep.wait_until_awake();
    }

    pub(in super::super) fn fall_asleep(&self) {
        *self.sleep.since() = Some(Instant::now());
        let until = Instant::now() + DRAIN_MAX;
        // A change of the header is one write after another, and none of them is begun any more: its
        // connection stays, as it can't go on over another one.
        let Some(sent) = self.sent.get() else { return };
        while !Sent::is_answered(sent) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.store().disconnect("the machine is about to sleep");
    }

    pub(in super::super) fn wake(&self) {
        *self.sleep.since() = None;
        self.sleep.changed.notify_all();
    }
}

/// The session, as long as it lives.
struct OfHold(Weak<Hold>);

impl Sleeper for OfHold {
    fn lives(&self) -> bool {
        self.0.strong_count() > 0
    }

    fn falls_asleep(&self) {
        if let Some(hold) = self.0.upgrade() {
            hold.fall_asleep();
        }
    }

    fn wakes(&self) {
        if let Some(hold) = self.0.upgrade() {
            hold.wake();
        }
    }
}
