//! One end of a copy: its local record, its lock, and the store as it is reached now.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use sprat_store::lock::{self, RENEW_INTERVAL};
use sprat_store::{
    FileName, IgnorePoison, Lock, LockError, Store, StoreError, StoreErrorKind, WriteJournal,
};

use crate::address::Target;
use crate::copy::CopyObserver;
use crate::interrupt::Interrupt;
use crate::settings::{Access, SessionOptions, TAKEOVER_QUIET_TIMES};
use crate::volume_process::connection::{Connection, open_record, owner_note};
use crate::{Exit, Failure};

/// Renewals that may fail, one after another.
const FAILED_RENEWALS_MAX: u32 = 3;

/// One end.
pub(super) struct Side {
    pub options: SessionOptions,
    pub connection: Connection,
    pub lease: Arc<SideLease>,
    leased_since: Instant,
    /// When a line to it was lost last: until a quiet time later its server's old process may
    /// still write.
    pub lost_at: Option<Instant>,
    /// It was reached when it was tried last.
    answers: bool,
}

/// A container, or the place of one, that this process holds.
pub(super) struct SideLease {
    target: Target,
    state_dir: PathBuf,
    quiet_time: Duration,
    allow_no_fsync: bool,
    pub record: WriteJournal,
    lock: RwLock<Option<Lock>>,
    /// Why nothing may be done any more.
    lost: Mutex<Option<Failure>>,
}

impl Side {
    /// Takes the local record; nothing is asked of the server yet.
    pub(super) fn new(options: &SessionOptions) -> Result<Self, Failure> {
        let record = open_record(&options.state_dir, &options.target, Access::ReadWrite)?;
        let connection = Connection::to(options, &record)?;
        let lease = SideLease {
            target: options.target.clone(),
            state_dir: options.state_dir.clone(),
            quiet_time: options.quiet_time,
            allow_no_fsync: options.allow_no_fsync,
            record,
            lock: RwLock::new(None),
            lost: Mutex::new(None),
        };
        Ok(Self {
            options: options.clone(),
            connection,
            lease: Arc::new(lease),
            leased_since: Instant::now(),
            lost_at: None,
            answers: false,
        })
    }

    /// The container's name in its folder.
    pub(super) fn name(&self) -> &FileName {
        &self.options.target.name
    }

    /// Connects.
    pub(super) fn connect(&mut self) -> Result<Arc<dyn Store>, StoreError> {
        let store = self.connection.connect();
        self.answers = store.is_ok();
        store
    }

    /// Gives the lock back once no line is sought any more, where this side still answers. Only
    /// for a side at which nothing of ours can be done late.
    pub(super) fn give_up(&mut self, settled: bool) -> Result<(), Failure> {
        if !self.answers || !self.lease.has_lock() {
            return Ok(());
        }
        let store = self.connect()?;
        if let Err(failure) = self.lease.still_ours(&*store) {
            self.lease.answer(&*store);
            return Err(failure);
        }
        self.lease.release(&*store, settled).map(drop)
    }

    /// Waits until nothing of a session that died, or of a line that was lost, can arrive any more.
    pub(super) fn wait_for_quiet(
        &mut self,
        observer: &mut dyn CopyObserver,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let quiet_time = self.options.quiet_time;
        let mut until = self.lost_at.map(|at| at + quiet_time);
        if self.lease.record.owes_quiet() {
            let takeover = self.leased_since + quiet_time * TAKEOVER_QUIET_TIMES;
            until = Some(until.map_or(takeover, |until| until.max(takeover)));
        }
        let Some(until) = until else { return Ok(()) };
        if self.connection.outlives_us() && Instant::now() < until {
            observer.tell(
                "waiting until what was under way when a line was lost can't arrive any more",
                false,
            );
            while Instant::now() < until {
                interrupt.check()?;
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        if self.lease.record.owes_quiet() {
            self.lease.record.quiet()?;
        }
        self.lost_at = None;
        Ok(())
    }
}

impl SideLease {
    /// Takes the lock, or makes sure that it is still ours.
    pub(super) fn lease(
        &self,
        store: &dyn Store,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let mut lease = self.lock.write().ignore_poison();
        if let Some(lock) = &*lease {
            // On a new connection.
            return lock.reacquire(store).map_err(|error| waited_out(&error));
        }
        let lock = self.acquire(store)?;
        if lock.took_over() {
            observer.tell(
                &format!(
                    "took over the lock on {} of a session that died on this machine",
                    self.target
                ),
                false,
            );
        }
        *lease = Some(lock);
        Ok(())
    }

    /// As [`Self::lease`], for a source on a full disk, a read-only account or a server without fsync,
    /// where no lock can be made: nobody else may hold one. False then.
    pub(super) fn hold_or_look(
        &self,
        store: &dyn Store,
        observer: &mut dyn CopyObserver,
    ) -> Result<bool, Failure> {
        let mut lease = self.lock.write().ignore_poison();
        if lease.is_none() {
            if !store.capabilities().durable_flush && !self.allow_no_fsync {
                drop(lease);
                self.look(store)?;
                return Ok(false);
            }
            match self.acquire(store) {
                Ok(lock) => *lease = Some(lock),
                Err(AcquireError::Lock(LockError::Store { source, .. }))
                    if cannot_write(source.kind()) =>
                {
                    drop(lease);
                    self.look(store)?;
                    return Ok(false);
                }
                Err(error) => return Err(Failure::from(error)),
            }
            return Ok(true);
        }
        drop(lease);
        self.lease(store, observer)?;
        Ok(true)
    }

    /// Refuses a source that was taken over from a session which may still have bytes on their way, or
    /// whose blocks were not compared since: the copy would hold what was overwritten, and nobody would
    /// compare it there, as the lists of writes belong to the source.
    pub(super) fn check_nothing_late(&self, store: &dyn Store) -> Result<(), Failure> {
        let late = match &*self.lock.read().ignore_poison() {
            // What was under way from a session of this machine was waited for.
            Some(lock) => {
                lock.late_until().is_some_and(|until| !until.own_only)
                    || !lock.pending_comparisons().is_empty()
            }
            None => !lock::inspect(store, &self.target.name, Some(&self.record))?
                .pending_comparisons
                .is_empty(),
        };
        if !late {
            return Ok(());
        }
        let target = &self.target;
        let what = format!(
            "{target} was taken over from a session that may still have writes on their way, or what was \
             written after that was not compared yet"
        );
        Err(Failure::new(Exit::Locked, what).with_hint(format!(
            "nothing was copied. Two and a quarter hours after the takeover run `sprat check {target}` \
             or a backup on the machine that took it over, and then this again"
        )))
    }

    /// Takes the lease. One that was made and never filled is waited for.
    fn acquire(&self, store: &dyn Store) -> Result<Lock, AcquireError> {
        let owner = owner_note(&self.state_dir).map_err(AcquireError::Other)?;
        let mut first = Lock::check_leases(store, &self.target.name, &self.record)?;
        let patience = lock::EMPTY_WAIT.min(self.quiet_time);
        while let Some(wait) = first.wait_for_empty(&self.record, patience) {
            std::thread::sleep(wait);
            first = first.again(store)?;
        }
        Ok(Lock::acquire_after(
            &first,
            store,
            &self.record,
            owner,
            || {},
        )?)
    }

    /// Fails if anybody else holds the container.
    pub(super) fn look(&self, store: &dyn Store) -> Result<(), Failure> {
        match lock::inspect(store, &self.target.name, Some(&self.record))?.held {
            Some(info) if !info.is_left_by(&self.record) || !info.waits_for.is_empty() => {
                Err(Failure::from(&LockError::HeldElsewhere {
                    container: self.target.name.clone(),
                    info: Box::new(info),
                }))
            }
            _ => Ok(()),
        }
    }

    /// Makes sure that the lock is still ours, or, without one, that nobody took it.
    pub(super) fn still_ours(&self, store: &dyn Store) -> Result<(), Failure> {
        if let Some(failure) = self.lost() {
            return Err(failure);
        }
        match &*self.lock.read().ignore_poison() {
            Some(lock) => Ok(lock.verify(store)?),
            None => self.look(store),
        }
    }

    fn has_lock(&self) -> bool {
        let lease = self.lock.read().ignore_poison();
        lease.is_some()
    }

    /// Tells whoever took over that all we sent was answered; who can't be told waits longer.
    fn answer(&self, store: &dyn Store) {
        if let Some(lock) = &*self.lock.read().ignore_poison() {
            let _ = lock.answer(store);
        }
    }

    /// Why the container is no longer ours.
    pub(super) fn lost(&self) -> Option<Failure> {
        let lost = self.lost.lock().ignore_poison();
        lost.clone()
    }

    /// Renews the lock until `done`.
    pub(super) fn keep_renewing(&self, store: &dyn Store, done: &AtomicBool) {
        let mut renewed_at = Instant::now();
        let mut failed = 0;
        while !done.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(50));
            if renewed_at.elapsed() < RENEW_INTERVAL {
                continue;
            }
            renewed_at = Instant::now();
            let renewed = match &*self.lock.read().ignore_poison() {
                Some(lock) => lock.renew(store),
                None => Ok(()),
            };
            match renewed {
                Ok(()) => failed = 0,
                // A lost line says nothing of the lock: it is verified on the new one.
                Err(LockError::Store { source, .. })
                    if source.kind() == StoreErrorKind::Disconnected => {}
                // A lease whose counter can't be written looks like a dead session's.
                Err(LockError::Store { .. }) if failed + 1 < FAILED_RENEWALS_MAX => failed += 1,
                Err(error) => {
                    let mut lost = self.lost.lock().ignore_poison();
                    lost.get_or_insert(Failure::from(&error));
                    return;
                }
            }
        }
    }

    /// Gives the lock back; everything sent is answered, and `settled` says that nothing of a dead
    /// session is open either. False where it is left to the next session of this host, which takes
    /// it over and settles what is.
    pub(super) fn release(&self, store: &dyn Store, settled: bool) -> Result<bool, Failure> {
        if !self.has_lock() {
            return Ok(true);
        }
        if !settled && (!self.record.in_doubt().is_empty() || self.record.owes_quiet()) {
            return Ok(false);
        }
        let lock = {
            let mut lease = self.lock.write().ignore_poison();
            lease.take()
        };
        if let Some(lock) = lock {
            self.record.all_resolved()?;
            lock.release(store)?;
        }
        Ok(true)
    }
}

/// A server that starts is waited for until the lease was read on a new connection: what it says before
/// that counts as a connection that is not there yet.
fn waited_out(error: &LockError) -> Failure {
    let mut failure = Failure::from(error);
    if matches!(error, LockError::Store { .. }) {
        failure.exit = Exit::Unreachable;
    }
    failure
}

/// Why a lease was not taken.
enum AcquireError {
    Lock(LockError),
    Other(Failure),
}

impl From<LockError> for AcquireError {
    fn from(error: LockError) -> Self {
        Self::Lock(error)
    }
}

impl From<AcquireError> for Failure {
    fn from(error: AcquireError) -> Self {
        match error {
            AcquireError::Lock(error) => Self::from(&error),
            AcquireError::Other(failure) => failure,
        }
    }
}

fn cannot_write(kind: StoreErrorKind) -> bool {
    matches!(
        kind,
        StoreErrorKind::ReadOnly | StoreErrorKind::PermissionDenied | StoreErrorKind::NoSpace
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sprat_luks::{Pins, RecoveryKey};
    use sprat_store::copy::CopyProgress;
    use sprat_testkit::memory::MemoryStore;

    use super::*;
    use crate::copy::CopyPhase;

    struct Silent;

    impl CopyObserver for Silent {
        fn phase(&mut self, _: CopyPhase) {}
        fn progress(&mut self, _: &CopyProgress) {}
        fn tell(&mut self, _: &str, _: bool) {}
        fn new_key(&mut self, _: &Pins, _: &RecoveryKey) -> Result<(), Failure> {
            unreachable!("none is asked for")
        }
    }

    /// One end on a server, as far as it knows.
    fn on_a_server(folder: &Path) -> Side {
        let target = Target::parse("ssh://no.host/srv/x.luks", Path::new("/")).unwrap();
        let (state, run) = (folder.join("state"), folder.join("run"));
        let mut options = SessionOptions::new(target, Access::ReadWrite, state, run);
        options.quiet_time = Duration::from_millis(250);
        Side::new(&options).unwrap()
    }

    #[test]
    fn a_copy_after_a_killed_one_waits_two_quiet_times_and_gives_nothing_back_before() {
        let (folder, store) = (tempfile::tempdir().unwrap(), MemoryStore::new());
        let killed = on_a_server(folder.path());
        killed.lease.lease(&store, &mut Silent).unwrap();
        let range = std::slice::from_ref(&(0..4096));
        killed.lease.record.before_send(range).unwrap();
        drop(killed);
        let mut next = on_a_server(folder.path());
        next.lease.lease(&store, &mut Silent).unwrap();
        assert!(!next.lease.release(&store, false).unwrap(), "suspects");
        next.lease.record.all_resolved().unwrap();
        assert!(
            !next.lease.release(&store, false).unwrap(),
            "the wait is owed"
        );
        let never = Interrupt::never().unwrap();
        next.wait_for_quiet(&mut Silent, &never).unwrap();
        let waited = next.leased_since.elapsed();
        assert!(waited >= 2 * next.options.quiet_time, "{waited:?}");
        assert!(next.lease.release(&store, false).unwrap());
        drop(next);
        assert!(!on_a_server(folder.path()).lease.record.may_arrive());
    }
}
