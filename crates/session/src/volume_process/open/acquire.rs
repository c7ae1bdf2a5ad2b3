//! Acquires the lease for a session that writes. For a read-only session, verifies that nobody
//! writes.

use std::sync::Arc;
use std::time::Instant;

use sprat_store::{
    LeaseCheck, Lock, LockError, LockInfo, Question, Store, StoreErrorKind, WriteJournal, lock,
};

use crate::Failure;
use crate::protocol::messages::VolumeStart;
use crate::protocol::reports::{Notice, Phase};
use crate::settings::{Access, TAKEOVER_QUIET_TIMES};
use crate::state::journal::{AcquireError, lock_failure, owner_note};
use crate::volume_process::lease::LateRecords;
use crate::volume_process::lease::{ContainerLease, LeaseParts};
use crate::volume_process::open::{ConnectedStore, opened_by};
use crate::volume_process::shutdown::{EventSender, StopFlag};

/// Acquires the lease, or verifies for a read-only session that nobody writes. `meanwhile`: as in
/// [`Lock::acquire_after`].
pub(crate) fn acquire(
    start: &VolumeStart,
    reached: ConnectedStore,
    stop: &StopFlag,
    events: &EventSender,
    meanwhile: impl FnOnce() + Send,
) -> Result<Arc<ContainerLease>, Failure> {
    let meanwhile = Meanwhile {
        questions: &[],
        act: meanwhile,
    };
    acquire_making_space(start, reached, stop, events, &mut || Ok(false), meanwhile)
}

/// What is done while the second check of the leases is under way.
pub(crate) struct Meanwhile<'a, F> {
    /// What `act` asks first. It may be asked ahead.
    pub questions: &'a [Question],
    /// As in [`Lock::acquire_after`].
    pub act: F,
}

/// As [`acquire`]. `make_space` is called once if the lease file can't be created.
pub(crate) fn acquire_making_space(
    start: &VolumeStart,
    reached: ConnectedStore,
    stop: &StopFlag,
    events: &EventSender,
    make_space: &mut dyn FnMut() -> Result<bool, Failure>,
    meanwhile: Meanwhile<'_, impl FnOnce() + Send>,
) -> Result<Arc<ContainerLease>, Failure> {
    let ConnectedStore {
        record,
        connection,
        store,
        first,
    } = reached;
    let name = start.settings.target.name.clone();
    let (lock, stale_lock, seen) = match start.settings.access {
        Access::ReadWrite => {
            stop.begin_cleanup_duty()?;
            let lock =
                match acquire_lock_while(start, &*store, &record, first, (stop, events), meanwhile)
                {
                    Err(error) if lacks_space(&error) && make_space()? => {
                        acquire_lock(start, &*store, &record, stop, events)?
                    }
                    taken => {
                        taken.map_err(|error| error.into_failure(&start.settings.state_dir))?
                    }
                };
            refuse_earlier(&lock, &*store, &record).map_err(|error| Failure::from(&error))?;
            let seen = SeenLeases {
                late_records: (lock.late_lists(), lock.pending_comparisons()),
                ..SeenLeases::default()
            };
            (Some(lock), None, seen)
        }
        Access::ReadOnly => {
            let (stale_lock, seen) = check_lock(start, &*store, &record, events)?;
            (None, stale_lock, seen)
        }
    };
    Ok(Arc::new(ContainerLease::new(LeaseParts {
        connection,
        record,
        container: name.clone(),
        file_name: name,
        access: start.settings.access.into(),
        opened_by: opened_by(start),
        store,
        lock,
        stale_lock,
        highest: seen.highest,
        highest_is_own: seen.highest_is_own,
        late_records: seen.late_records,
    })))
}

pub(crate) fn acquire_lock(
    start: &VolumeStart,
    store: &dyn Store,
    record: &WriteJournal,
    stop: &StopFlag,
    events: &EventSender,
) -> Result<Lock, Failure> {
    let meanwhile = Meanwhile {
        questions: &[],
        act: || {},
    };
    acquire_lock_while(start, store, record, None, (stop, events), meanwhile)
        .map_err(|error| error.into_failure(&start.settings.state_dir))
}

/// With an agent on the server nobody waits for a dead session that sent everything through it.
fn refuse_earlier(lock: &Lock, store: &dyn Store, record: &WriteJournal) -> Result<(), LockError> {
    if !lock.may_arrive() {
        return Ok(());
    }
    let refused = lock.close_refused(store, true)?;
    if lock.only_these_could_arrive(&refused) {
        record.quiet()?;
    }
    Ok(())
}

fn lacks_space(error: &AcquireError) -> bool {
    let AcquireError::Lock(LockError::Store { source, .. }) = error else {
        return false;
    };
    matches!(
        source.kind(),
        StoreErrorKind::NoSpace | StoreErrorKind::Failed
    )
}

fn acquire_lock_while(
    start: &VolumeStart,
    store: &dyn Store,
    record: &WriteJournal,
    first: Option<LeaseCheck>,
    (stop, events): (&StopFlag, &EventSender),
    meanwhile: Meanwhile<'_, impl FnOnce() + Send>,
) -> Result<Lock, AcquireError> {
    events.phase(Phase::Locking);
    let owner = owner_note(&start.settings.state_dir).map_err(AcquireError::Other)?;
    let mut first = match first {
        Some(first) => first,
        None => Lock::check_leases(store, &start.settings.target.name, record)?,
    };
    let patience = lock::EMPTY_WAIT.min(start.settings.quiet_time);
    while let Some(wait) = first.wait_for_empty(record, patience) {
        stop.wait_until(Instant::now() + wait)
            .map_err(AcquireError::Other)?;
        first = first.again(store)?;
    }
    let Meanwhile { questions, act } = meanwhile;
    let lock = Lock::acquire_asking(&first, store, record, owner, questions, act)?;
    if lock.took_over() {
        events.notice(Notice::TookOverDeadSession);
    }
    Ok(lock)
}

/// The leases that a read-only session saw, and what lies beside the container.
#[derive(Default)]
struct SeenLeases {
    highest: Option<u64>,
    highest_is_own: bool,
    late_records: LateRecords,
}

/// Reading while another session writes would give a mixture of two states, so its lease is
/// respected. The exception is a session that is known to be dead: it got the lease with this local
/// record, and we have the record's flock now. It is not enough that it was this host: the host may
/// have the container open under another spelling.
fn check_lock(
    start: &VolumeStart,
    store: &dyn Store,
    record: &WriteJournal,
    events: &EventSender,
) -> Result<(Option<LockInfo>, SeenLeases), Failure> {
    let name = &start.settings.target.name;
    let found = lock::inspect(store, name, Some(record))?;
    let seen = SeenLeases {
        highest: found.highest,
        highest_is_own: found.highest_is_own,
        late_records: (found.late_lists, found.pending_comparisons),
    };
    let Some(info) = found.held else {
        return Ok((None, seen));
    };
    // Not one that waits for a session of another machine.
    if info.is_left_by(record) && info.waits_for.is_empty() {
        events.notice(Notice::DeadSessionLeftLock);
        return Ok((Some(info), seen));
    }
    if start.settings.ignore_lock {
        events.notice(Notice::LockIgnored {
            holder: info.to_string(),
        });
        return Ok((Some(info), seen));
    }
    let (container, is_waiting) = (name.clone(), !info.waits_for.is_empty());
    let info = Box::new(info);
    let held = match is_waiting {
        true => LockError::Waiting { container, info },
        false => LockError::HeldElsewhere { container, info },
    };
    Err(lock_failure(&held, &start.settings.state_dir))
}

/// Waits until a dead session's server process can no longer write what it was sent. Its ssh has
/// exited, as the flock shows, so this takes the quiet time at most. It is measured on the
/// monotonic clock from when we got the flock, because nobody knows what a killed ssh sent last,
/// and when. A read-only session waits, too: the data must not change while it reads. Where the flock proves
/// nothing, that session has noticed our lease by then, on a local disk, too.
pub(crate) fn wait_for_quiet(
    start: &VolumeStart,
    lease: &ContainerLease,
    stop: &StopFlag,
    events: &EventSender,
) -> Result<(), Failure> {
    let suspects = lease.record().in_doubt();
    if !lease.record().owes_quiet() {
        return Ok(());
    }
    events.notice(Notice::Suspects {
        bytes: suspects.iter().map(|range| range.end - range.start).sum(),
    });
    let quiet_time = start.settings.quiet_time * TAKEOVER_QUIET_TIMES;
    let until = lease.held_since() + quiet_time;
    if lease.server_outlives_us() || lease.record().may_live() {
        stop.wait_until(until)?;
    }
    lease.record().quiet()?;
    Ok(())
}
