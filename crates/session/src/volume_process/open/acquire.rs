//! Takes the lock for a session that writes; for one that only reads, makes sure that nobody writes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_store::{
    LeaseCheck, Lock, LockError, LockInfo, Store, StoreErrorKind, WriteJournal, lock,
};

use crate::Failure;
use crate::protocol::messages::VolumeStart;
use crate::settings::{Access, Notice, Phase, TAKEOVER_QUIET_TIMES};
use crate::volume_process::connection::owner_note;
use crate::volume_process::late::Found;
use crate::volume_process::lease::{ContainerLease, LeaseParts};
use crate::volume_process::open::{Reached, opened_by};
use crate::volume_process::shutdown::{EventSender, StopFlag};

/// Takes the lock, or for a read-only session makes sure that nobody writes; `meanwhile` as in
/// [`Lock::acquire_after`].
pub(crate) fn lease(
    start: &VolumeStart,
    reached: Reached,
    stop: &StopFlag,
    events: &EventSender,
    meanwhile: impl FnOnce() + Send,
) -> Result<Arc<ContainerLease>, Failure> {
    hold_making_room(start, reached, stop, events, &mut || Ok(false), meanwhile)
}

/// As [`lease`]; `make_room` is asked once where the lock's file can't be made.
pub(crate) fn hold_making_room(
    start: &VolumeStart,
    reached: Reached,
    stop: &StopFlag,
    events: &EventSender,
    make_room: &mut dyn FnMut() -> Result<bool, Failure>,
    meanwhile: impl FnOnce() + Send,
) -> Result<Arc<ContainerLease>, Failure> {
    let Reached {
        record,
        connection,
        store,
        first,
    } = reached;
    let name = start.target.name.clone();
    let (lock, stale_lock, seen) = match start.access {
        Access::ReadWrite => {
            stop.begin_holding()?;
            let lock =
                match take_lock_while(start, &*store, &record, first, (stop, events), meanwhile) {
                    Err(error) if finds_no_room(&error) && make_room()? => {
                        take_lock(start, &*store, &record, stop, events)?
                    }
                    taken => taken?,
                };
            let seen = Seen {
                late_found: (lock.late_lists(), lock.pending_comparisons()),
                ..Seen::default()
            };
            (Some(lock), None, seen)
        }
        Access::ReadOnly => {
            let (stale_lock, seen) = look_at_lock(start, &*store, &record, events)?;
            (None, stale_lock, seen)
        }
    };
    Ok(Arc::new(ContainerLease::new(LeaseParts {
        connection,
        record,
        container: name.clone(),
        file_name: name,
        access: start.access.into(),
        opened_by: opened_by(start),
        store,
        lock,
        stale_lock,
        highest: seen.highest,
        highest_is_own: seen.highest_is_own,
        late_found: seen.late_found,
    })))
}

pub(crate) fn take_lock(
    start: &VolumeStart,
    store: &dyn Store,
    record: &WriteJournal,
    stop: &StopFlag,
    events: &EventSender,
) -> Result<Lock, Failure> {
    Ok(take_lock_while(
        start,
        store,
        record,
        None,
        (stop, events),
        || {},
    )?)
}

fn finds_no_room(error: &TakeError) -> bool {
    let TakeError::Lock(LockError::Store { source, .. }) = error else {
        return false;
    };
    matches!(
        source.kind(),
        StoreErrorKind::NoSpace | StoreErrorKind::Failed
    )
}

/// Why a lock was not taken.
enum TakeError {
    Lock(LockError),
    Other(Failure),
}

impl From<LockError> for TakeError {
    fn from(error: LockError) -> Self {
        Self::Lock(error)
    }
}

impl From<TakeError> for Failure {
    fn from(error: TakeError) -> Self {
        match error {
            TakeError::Lock(error) => Self::from(&error),
            TakeError::Other(failure) => failure,
        }
    }
}

fn take_lock_while(
    start: &VolumeStart,
    store: &dyn Store,
    record: &WriteJournal,
    first: Option<LeaseCheck>,
    (stop, events): (&StopFlag, &EventSender),
    meanwhile: impl FnOnce() + Send,
) -> Result<Lock, TakeError> {
    events.phase(Phase::Locking);
    let owner = owner_note(&PathBuf::from(&start.state_dir)).map_err(TakeError::Other)?;
    let mut first = match first {
        Some(first) => first,
        None => Lock::check_leases(store, &start.target.name, record)?,
    };
    let patience = lock::EMPTY_WAIT.min(Duration::from_millis(start.quiet_time_ms));
    while let Some(wait) = first.wait_for_empty(record, patience) {
        let until = Instant::now() + wait;
        while Instant::now() < until {
            stop.check().map_err(TakeError::Other)?;
            std::thread::sleep(wait.min(Duration::from_millis(100)));
        }
        first = first.again(store)?;
    }
    let lock = Lock::acquire_after(&first, store, record, owner, meanwhile)?;
    if lock.took_over() {
        events.notice(Notice::TookOverDeadSession);
    }
    Ok(lock)
}

/// What a session that only reads has seen of leases, and what lies beside the container.
#[derive(Default)]
struct Seen {
    highest: Option<u64>,
    highest_is_own: bool,
    late_found: Found,
}

/// Reading while somebody writes gives a mixture of two states; a lock is therefore respected,
/// unless its holder is known to be dead: it took the lock by this record, whose flock we have now.
/// That it was this host says nothing: it may hold the container under another spelling.
fn look_at_lock(
    start: &VolumeStart,
    store: &dyn Store,
    record: &WriteJournal,
    events: &EventSender,
) -> Result<(Option<LockInfo>, Seen), Failure> {
    let name = &start.target.name;
    let found = lock::inspect(store, name, Some(record))?;
    let seen = Seen {
        highest: found.highest,
        highest_is_own: found.highest_is_own,
        late_found: (found.late_lists, found.pending_comparisons),
    };
    let Some(info) = found.held else {
        return Ok((None, seen));
    };
    // Not one that waits for a session of another machine.
    if info.is_left_by(record) && info.waits_for.is_empty() {
        events.notice(Notice::DeadSessionLeftLock);
        return Ok((Some(info), seen));
    }
    if start.ignore_lock {
        events.notice(Notice::LockIgnored {
            holder: info.to_string(),
        });
        return Ok((Some(info), seen));
    }
    Err(Failure::from(&LockError::HeldElsewhere {
        container: name.clone(),
        info: Box::new(info),
    }))
}

/// A dead session's server process may still write what it was sent: with its ssh gone, which the
/// flock tells, for the quiet time at most. Counted from when the flock was ours and on a clock
/// that nobody sets; what a killed ssh sent last, and when, is known to nobody. A session that only
/// reads waits, too: what it reads must not change under its eyes.
pub(crate) fn wait_for_quiet(
    start: &VolumeStart,
    lease: &ContainerLease,
    stop: &StopFlag,
    events: &EventSender,
) -> Result<(), Failure> {
    let suspects = lease.record().in_doubt();
    if !lease.record().may_arrive() {
        return Ok(());
    }
    events.notice(Notice::Suspects {
        bytes: suspects.iter().map(|range| range.end - range.start).sum(),
    });
    let quiet_time = Duration::from_millis(start.quiet_time_ms) * TAKEOVER_QUIET_TIMES;
    let until = lease.held_since() + quiet_time;
    while lease.server_outlives_us() && Instant::now() < until {
        stop.check()?;
        let left = until.saturating_duration_since(Instant::now());
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
    lease.record().quiet()?;
    Ok(())
}
