//! The reserve beside a container, made when its session is over and success was reported.

use std::sync::Mutex;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use crate::interrupt::Interrupt;
use crate::protocol::messages::{VolumeOrder, VolumeReply};
use crate::supervisor::{DEATH_LIMIT, Event, Supervisor};

/// Sessions that are over and whose containers lack their reserve.
static RESERVES_TO_MAKE: Mutex<Vec<Supervisor>> = Mutex::new(Vec::new());

/// Makes the missing reserves of this process's sessions that are over. To be called after success was
/// reported. An interrupt stops it and harms nothing.
pub fn make_reserves(interrupt: &Interrupt, note: impl Fn()) {
    let supervisors = RESERVES_TO_MAKE
        .lock()
        .map(|mut supervisors| std::mem::take(&mut *supervisors))
        .unwrap_or_default();
    for mut supervisor in supervisors {
        if !interrupt.requested() {
            note();
            supervisor.make_reserve(interrupt);
        }
        supervisor.volume.kill();
        supervisor.volume.wait(DEATH_LIMIT);
    }
}

/// Before a session of a container: the one before must no longer wait to make the reserve, because this
/// machine opens a container once. The new session makes it at its end.
pub(crate) fn give_way(container: &str) {
    let Ok(mut supervisors) = RESERVES_TO_MAKE.lock() else {
        return;
    };
    for mut supervisor in supervisors.extract_if(.., |waiting| waiting.container == container) {
        supervisor.volume.kill();
        supervisor.volume.wait(DEATH_LIMIT);
    }
}

impl Supervisor {
    /// After [`close`](Self::close): leaves the reserve to [`make_reserves`], where it is missing.
    pub(crate) fn finish(self) {
        if self.reserve_missing
            && let Ok(mut supervisors) = RESERVES_TO_MAKE.lock()
        {
            supervisors.push(self);
        }
    }

    fn make_reserve(&self, interrupt: &Interrupt) {
        if self.volume.send(&VolumeOrder::MakeReserve).is_err() {
            return;
        }
        while !interrupt.requested() {
            match self.events.recv_timeout(Duration::from_millis(100)) {
                Ok(Event::Volume(Some(VolumeReply::Done) | None))
                | Err(RecvTimeoutError::Disconnected) => return,
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}
