//! The thread that renews the lease.

use std::sync::{Arc, Weak};

use sprat_store::lock;

use crate::Failure;
use crate::volume_process::lease::{ContainerLease, Renewal};
use crate::volume_process::shutdown::StopFlag;

/// Renews the lease while `lease` exists. If that fails, the volume is aborted. Every other time the
/// lease is only read, so that the last check is seldom so old that sending waits for another one.
pub(crate) fn keep_renewing(
    lease: &Arc<ContainerLease>,
    stop: &Arc<StopFlag>,
) -> Result<(), Failure> {
    lease.register_for_sleep();
    let end = EndOfRenewing {
        lease: Arc::downgrade(lease),
        stop: Arc::clone(stop),
    };
    std::thread::Builder::new()
        .name("lock renewal".to_owned())
        .spawn(move || renew_until_the_end(&end))
        .map(drop)
        .map_err(|error| Failure::failed("can't start a thread").caused_by(&error))
}

/// Without renewals the session looks like a dead one. So however the thread ends, the sending
/// ends.
struct EndOfRenewing {
    lease: Weak<ContainerLease>,
    stop: Arc<StopFlag>,
}

impl Drop for EndOfRenewing {
    fn drop(&mut self) {
        let Some(lease) = self.lease.upgrade() else {
            return;
        };
        lease.lose(Failure::failed("the lease is no longer renewed"));
        self.stop.abort_volume();
    }
}

fn renew_until_the_end(end: &EndOfRenewing) {
    if let Some(lease) = end.lease.upgrade() {
        lease.remove_old_leases();
    }
    for turn in 1u64.. {
        std::thread::sleep(lock::RENEW_INTERVAL / 2);
        let Some(lease) = end.lease.upgrade() else {
            return;
        };
        if lease.sleep.is_on() {
            continue;
        }
        match if turn % 2 == 0 {
            lease.renew()
        } else {
            lease.verify_early()
        } {
            Renewal::Ours => {}
            Renewal::ConnectionLost(cause) => end.stop.connection_lost(cause),
            Renewal::Lost => return,
        }
    }
}
