//! What a session does before its machine sleeps: it sends nothing more, waits for the answers to
//! what it sent, and closes its connections. After waking it continues as after a lost connection.

use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use sprat_store::IgnorePoison;

use crate::volume_process::late::Sent;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::sleep::{self, DRAIN_MAX, SleepFlag, SleepListener};

/// Whether the machine is about to sleep, and whether logind was subscribed to.
#[derive(Default)]
pub(crate) struct Sleep {
    asleep: SleepFlag,
    watched: Mutex<Option<Weak<ContainerLease>>>,
}

impl Sleep {
    fn watched(&self) -> MutexGuard<'_, Option<Weak<ContainerLease>>> {
        self.watched.lock().ignore_poison()
    }

    pub(crate) fn wait_until_awake(&self) {
        self.asleep.wait_until_awake();
    }

    pub(crate) fn is_on(&self) -> bool {
        self.asleep.is_on()
    }
}

impl ContainerLease {
    /// From the first write on logind waits for this session before the machine sleeps.
    pub(crate) fn register_for_sleep(self: &Arc<Self>) {
        *self.sleep.watched() = Some(Arc::downgrade(self));
    }

    /// Before something is sent: waits while the machine is about to sleep.
    pub(crate) fn wait_until_awake(&self) {
        if let Some(lease) = self.sleep.watched().take() {
            sleep::listen(SleepingLease(lease));
        }
        self.sleep.wait_until_awake();
    }

    pub(crate) fn prepare_for_sleep(&self) {
        self.sleep.asleep.begin();
        let until = Instant::now() + DRAIN_MAX;
        // A change of the header is a series of writes, and none of them is begun any more. Its
        // connection stays, because the change can't continue over another one.
        let Some(sent) = self.sent.get() else { return };
        while !Sent::is_answered(sent) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.store().disconnect("the machine is about to sleep");
    }

    pub(crate) fn wake(&self) {
        self.sleep.asleep.end();
    }
}

/// The session, while it exists.
struct SleepingLease(Weak<ContainerLease>);

impl SleepListener for SleepingLease {
    fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }

    fn prepare_for_sleep(&self) {
        if let Some(lease) = self.0.upgrade() {
            lease.prepare_for_sleep();
        }
    }

    fn woke(&self) {
        if let Some(lease) = self.0.upgrade() {
            lease.wake();
        }
    }
}
