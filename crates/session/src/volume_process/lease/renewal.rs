//! The thread that renews the lease.

use std::sync::{Arc, Weak};

use sprat_store::lock;

use crate::Failure;
use crate::volume_process::lease::{Hold, Renewed};
use crate::volume_process::shutdown::Stop;

/// Renews the lease for as long as `hold` lives; where it can't, the volume is aborted. Every other
/// time the lease is only read, so that a look is seldom so old that sending waits for another.
pub(crate) fn keep_renewing(hold: &Arc<Hold>, stop: &Arc<Stop>) -> Result<(), Failure> {
    hold.will_bear_sleep();
    let end = EndOfRenewing {
        hold: Arc::downgrade(hold),
        stop: Arc::clone(stop),
    };
    std::thread::Builder::new()
        .name("lock renewal".to_owned())
        .spawn(move || renew_until_the_end(&end))
        .map(drop)
        .map_err(|error| Failure::failed("can't start a thread").caused_by(&error))
}

/// Without renewals the session looks like a dead one: however the thread ends, the sending ends.
struct EndOfRenewing {
    hold: Weak<Hold>,
    stop: Arc<Stop>,
}

impl Drop for EndOfRenewing {
    fn drop(&mut self) {
        let Some(hold) = self.hold.upgrade() else {
            return;
        };
        hold.lose(Failure::failed("the lease is no longer renewed"));
        self.stop.abort_volume();
    }
}

fn renew_until_the_end(end: &EndOfRenewing) {
    if let Some(hold) = end.hold.upgrade() {
        hold.remove_old_leases();
    }
    for turn in 1u64.. {
        std::thread::sleep(lock::RENEW_INTERVAL / 2);
        let Some(hold) = end.hold.upgrade() else {
            return;
        };
        if hold.sleep.is_on() {
            continue;
        }
        match if turn % 2 == 0 {
            hold.renew()
        } else {
            hold.look_early()
        } {
            Renewed::Held => {}
            Renewed::LineLost(cause) => end.stop.line_lost(cause),
            Renewed::Lost => return,
        }
    }
}
