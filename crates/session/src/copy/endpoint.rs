//! One endpoint of a copy: its local record, its lease, and its store.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use sprat_luks::{Header, Pins};
use sprat_store::lock::{self, RENEW_INTERVAL};
use sprat_store::{
    FileName, FileStat, IgnorePoison, Lock, LockError, Store, StoreError, StoreErrorKind,
    StoreFile, WriteJournal,
};

use crate::address::Target;
use crate::connect::Connection;
use crate::copy::CopyObserver;
use crate::interrupt::Interrupt;
use crate::settings::{Access, SessionSettings, TAKEOVER_QUIET_TIMES};
use crate::state::journal::{AcquireError, lock_failure, open_journal, owner_note};
use crate::{Exit, Failure};

/// How many renewals in a row may fail.
const FAILED_RENEWALS_MAX: u32 = 3;

/// One endpoint.
pub(super) struct Endpoint {
    pub options: SessionSettings,
    pub connection: Connection,
    pub lease: Arc<EndpointLease>,
    acquired_at: Instant,
    /// When a connection to it was last lost. For a quiet time after that the server's old process
    /// may still write.
    pub lost_at: Option<Instant>,
    /// The last attempt to connect succeeded.
    is_reachable: bool,
}

/// A container that this process has acquired, or the place of one.
pub(super) struct EndpointLease {
    target: Target,
    state_dir: PathBuf,
    quiet_time: Duration,
    allow_no_fsync: bool,
    pub record: WriteJournal,
    lock: RwLock<Option<Lock>>,
    /// Why this process may do nothing more.
    lost: Mutex<Option<Failure>>,
}

/// Both stores, over the connections of this attempt.
pub(super) struct Stores {
    pub source: Arc<dyn Store>,
    pub destination: Arc<dyn Store>,
}

/// The source, open.
pub(super) struct Source {
    pub file: Arc<dyn StoreFile>,
    pub stat: FileStat,
    pub header: Header,
    pub pins: Pins,
}

/// What the two names refer to.
pub(super) struct Present {
    pub source: Option<FileStat>,
    pub destination: Option<FileStat>,
    /// The source was set aside for removal, and its name is free.
    pub set_aside: bool,
}

impl Endpoint {
    /// Acquires the local record. Sends nothing to the server yet.
    pub(super) fn new(options: &SessionSettings) -> Result<Self, Failure> {
        let record = open_journal(&options.state_dir, &options.target, Access::ReadWrite)?;
        let connection = Connection::new(options, &record)?;
        let lease = EndpointLease {
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
            acquired_at: Instant::now(),
            lost_at: None,
            is_reachable: false,
        })
    }

    /// The container's name in its folder.
    pub(super) fn name(&self) -> &FileName {
        &self.options.target.name
    }

    /// Connects.
    pub(super) fn connect(&mut self) -> Result<Arc<dyn Store>, StoreError> {
        let store = self.connection.connect();
        self.is_reachable = store.is_ok();
        store
    }

    /// Releases the lease when no further attempt to reconnect follows, if the endpoint still
    /// answers. Only for an endpoint at which no request of ours can be carried out late.
    pub(super) fn give_up(&mut self, is_resolved: bool) -> Result<(), Failure> {
        if !self.is_reachable || !self.lease.has_lock() {
            return Ok(());
        }
        let store = self.connect()?;
        if let Err(failure) = self.lease.verify(&*store) {
            self.lease.answer_takeover(&*store);
            return Err(failure);
        }
        self.lease.release(&*store, is_resolved).map(drop)
    }

    /// Waits until nothing that a dead session sent, or that was sent before a connection was lost,
    /// can arrive any more.
    pub(super) fn wait_for_quiet(
        &mut self,
        observer: &mut dyn CopyObserver,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let quiet_time = self.options.quiet_time;
        let mut until = self.lost_at.map(|at| at + quiet_time);
        if self.lease.record.owes_quiet() {
            let takeover = self.acquired_at + quiet_time * TAKEOVER_QUIET_TIMES;
            until = Some(until.map_or(takeover, |until| until.max(takeover)));
        }
        let Some(until) = until else { return Ok(()) };
        if self.connection.outlives_us() && Instant::now() < until {
            observer.tell(
                "waiting until the pending writes of a lost connection can no longer arrive",
                false,
            );
            interrupt.wait_until(until)?;
        }
        if self.lease.record.owes_quiet() {
            self.lease.record.quiet()?;
        }
        self.lost_at = None;
        Ok(())
    }
}

impl EndpointLease {
    /// Acquires the lease, or verifies that it is still ours.
    pub(super) fn acquire(
        &self,
        store: &dyn Store,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let mut lease = self.lock.write().ignore_poison();
        if let Some(lock) = &*lease {
            // This is a new connection.
            return lock
                .reacquire(store)
                .map_err(|error| as_unreachable(&error));
        }
        let acquired = self.acquire_new(store);
        let lock = acquired.map_err(|error| error.into_failure(&self.state_dir))?;
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

    /// As [`Self::acquire`], for a source on a full disk, a read-only account or a server without
    /// fsync. If no lease can be made there, this checks that nobody else has one, and returns
    /// false.
    pub(super) fn acquire_or_check(
        &self,
        store: &dyn Store,
        observer: &mut dyn CopyObserver,
    ) -> Result<bool, Failure> {
        let mut lease = self.lock.write().ignore_poison();
        if lease.is_none() {
            if !store.capabilities().durable_flush && !self.allow_no_fsync {
                drop(lease);
                self.check_free(store)?;
                return Ok(false);
            }
            match self.acquire_new(store) {
                Ok(lock) => *lease = Some(lock),
                Err(AcquireError::Lock(LockError::Store { source, .. }))
                    if cannot_write(source.kind()) =>
                {
                    drop(lease);
                    self.check_free(store)?;
                    return Ok(false);
                }
                Err(error) => return Err(error.into_failure(&self.state_dir)),
            }
            return Ok(true);
        }
        drop(lease);
        self.acquire(store, observer)?;
        Ok(true)
    }

    /// Refuses a source that was taken over from a session whose writes may still be pending, or
    /// whose blocks were not compared since. The copy would contain blocks that were overwritten
    /// late. Nobody would compare them there, because the lists of writes belong to the source.
    pub(super) fn check_nothing_late(&self, store: &dyn Store) -> Result<(), Failure> {
        let late = match &*self.lock.read().ignore_poison() {
            // This run has waited for pending writes of a session of this machine.
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
            "the lock of {target} was taken over. Writes of the earlier session may still arrive, \
             or the data that was written since then was not compared yet"
        );
        Err(Failure::new(Exit::Locked, what).with_hint(format!(
            "nothing was copied. Wait until 2 hours and 15 minutes after the takeover. Then run `sprat \
             check {target}` or a backup on the machine that took over the lock, and run this command \
             again"
        )))
    }

    /// Acquires a new lease. Waits for a lease file that another session made and has not filled
    /// yet.
    fn acquire_new(&self, store: &dyn Store) -> Result<Lock, AcquireError> {
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

    /// Fails if another session has the container.
    pub(super) fn check_free(&self, store: &dyn Store) -> Result<(), Failure> {
        match lock::inspect(store, &self.target.name, Some(&self.record))?.held {
            Some(info) if !info.is_left_by(&self.record) || !info.waits_for.is_empty() => {
                let held = LockError::HeldElsewhere {
                    container: self.target.name.clone(),
                    info: Box::new(info),
                };
                Err(lock_failure(&held, &self.state_dir))
            }
            _ => Ok(()),
        }
    }

    /// Verifies that the lease is still ours. Without a lease, verifies that nobody has acquired
    /// one.
    pub(super) fn verify(&self, store: &dyn Store) -> Result<(), Failure> {
        if let Some(failure) = self.lost() {
            return Err(failure);
        }
        match &*self.lock.read().ignore_poison() {
            Some(lock) => Ok(lock.verify(store)?),
            None => self.check_free(store),
        }
    }

    fn has_lock(&self) -> bool {
        let lease = self.lock.read().ignore_poison();
        lease.is_some()
    }

    /// Reports to the session that took over that all our requests were answered. If this fails,
    /// that session waits longer.
    fn answer_takeover(&self, store: &dyn Store) {
        if let Some(lock) = &*self.lock.read().ignore_poison() {
            let _ = lock.answer(store);
        }
    }

    /// Why the container is no longer ours.
    pub(super) fn lost(&self) -> Option<Failure> {
        let lost = self.lost.lock().ignore_poison();
        lost.clone()
    }

    /// Renews the lease until `done`.
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
                // A lost connection says nothing about the lease. It is verified on the new
                // connection.
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

    /// Releases the lease. Every request that was sent has been answered. `is_resolved`: nothing of a
    /// dead session is unresolved either. Returns false if the lease is left to the next session of
    /// this host, which takes it over and recovers what is unresolved.
    pub(super) fn release(&self, store: &dyn Store, is_resolved: bool) -> Result<bool, Failure> {
        if !self.has_lock() {
            return Ok(true);
        }
        if !is_resolved && (!self.record.in_doubt().is_empty() || self.record.owes_quiet()) {
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

pub(super) fn stat_if_there(
    store: &dyn Store,
    name: &FileName,
) -> Result<Option<FileStat>, StoreError> {
    match store.stat(name) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn flush_folder(
    store: &dyn Store,
    observer: &mut dyn CopyObserver,
) -> Result<(), StoreError> {
    if !store.try_flush_folder()? {
        observer.tell(
            "this server can't make a rename durable at once: a crash of the server in the next seconds \
             can undo the rename",
            false,
        );
    }
    Ok(())
}

/// Until the lease was read on a new connection, every answer of a starting server counts as a
/// failure to connect, and the copy retries.
fn as_unreachable(error: &LockError) -> Failure {
    let mut failure = Failure::from(error);
    if matches!(error, LockError::Store { .. }) {
        failure.exit = Exit::Unreachable;
    }
    failure
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

    /// One endpoint that counts as being on a server.
    fn on_a_server(folder: &Path) -> Endpoint {
        let target = Target::parse("ssh://no.host/srv/x.luks", Path::new("/")).unwrap();
        let (state, run) = (folder.join("state"), folder.join("run"));
        let mut options = SessionSettings::new(target, Access::ReadWrite, state, run);
        options.quiet_time = Duration::from_millis(250);
        Endpoint::new(&options).unwrap()
    }

    #[test]
    fn copy_after_a_killed_one_waits_before_it_releases_a_lease() {
        let (folder, store) = (tempfile::tempdir().unwrap(), MemoryStore::new());
        let killed = on_a_server(folder.path());
        killed.lease.acquire(&store, &mut Silent).unwrap();
        let range = std::slice::from_ref(&(0..4096));
        killed.lease.record.before_send(range).unwrap();
        drop(killed);
        let mut next = on_a_server(folder.path());
        next.lease.acquire(&store, &mut Silent).unwrap();
        assert!(
            !next.lease.release(&store, false).unwrap(),
            "writes are in doubt"
        );
        next.lease.record.all_resolved().unwrap();
        assert!(
            !next.lease.release(&store, false).unwrap(),
            "the wait is owed"
        );
        let never = Interrupt::never().unwrap();
        next.wait_for_quiet(&mut Silent, &never).unwrap();
        let waited = next.acquired_at.elapsed();
        assert!(waited >= 2 * next.options.quiet_time, "{waited:?}");
        assert!(next.lease.release(&store, false).unwrap());
        drop(next);
        assert!(!on_a_server(folder.path()).lease.record.may_arrive());
    }
}
