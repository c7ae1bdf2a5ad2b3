//! What a session does when its machine is about to sleep: it sends nothing more, waits for the answers
//! to what it sent, and ends its connections. After waking it goes on as after a lost connection.

use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use sprat_store::IgnorePoison;

use crate::volume_process::late::Sent;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::sleep::{self, Asleep, DRAIN_MAX, Sleeper};

/// Whether the machine is about to sleep, and who has to be asked.
#[derive(Default)]
pub(crate) struct Sleep {
    asleep: Asleep,
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
    /// From the first write on logind is asked to wait for us before the machine sleeps.
    pub(crate) fn will_bear_sleep(self: &Arc<Self>) {
        *self.sleep.watched() = Some(Arc::downgrade(self));
    }

    /// Before something is sent: waits while the machine is about to sleep.
    pub(crate) fn wait_until_awake(&self) {
        if let Some(lease) = self.sleep.watched().take() {
            sleep::watch(LeaseSleeper(lease));
        }
        self.sleep.wait_until_awake();
    }

    pub(crate) fn fall_asleep(&self) {
        self.sleep.asleep.begin();
        let until = Instant::now() + DRAIN_MAX;
        // A change of the header is one write after another, and none of them is begun any more: its
        // connection stays, as it can't go on over another one.
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

/// The session, as long as it lives.
struct LeaseSleeper(Weak<ContainerLease>);

impl Sleeper for LeaseSleeper {
    fn lives(&self) -> bool {
        self.0.strong_count() > 0
    }

    fn falls_asleep(&self) {
        if let Some(lease) = self.0.upgrade() {
            lease.fall_asleep();
        }
    }

    fn wakes(&self) {
        if let Some(lease) = self.0.upgrade() {
            lease.wake();
        }
    }
}
