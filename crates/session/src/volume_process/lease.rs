//! A session's lease on its container: local record, lease file, renewal, safe reconnecting.

mod late_writes;
pub(crate) mod reading;
mod release;
mod renewal;
mod sleep;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

use sprat_luks::{AnyHeader, Header, OpenedBy, Pins, Turn};
use sprat_store::clock::since_boot;
use sprat_store::{
    Access, FileName, IgnorePoison, Lock, LockError, LockInfo, Puncher, Store, StoreError,
    StoreErrorKind, StoreFile, WriteJournal,
};
use sprat_volume::{Fenced, ReconnectError, SessionHooks as _};

use crate::connect::{Connection, HeaderBytes};
use crate::volume_process::late::Sent;
use crate::{Exit, Failure};

pub(crate) use crate::volume_process::lease::late_writes::LateRecords;
pub(crate) use crate::volume_process::lease::renewal::keep_renewing;

/// A container that this session has acquired.
pub(crate) struct ContainerLease {
    connection: Connection,
    record: WriteJournal,
    /// The container that the lease is for.
    container: FileName,
    /// The file that is open: the container, or the file that becomes it.
    file_name: FileName,
    access: Access,
    /// Limits for what the header may require.
    opened_by: OpenedBy,
    store: RwLock<Arc<dyn Store>>,
    lock: RwLock<Option<Lock>>,
    /// A lease that a dead session of this host left. For a read-only session.
    stale_lock: Option<LockInfo>,
    /// The highest lease at the beginning of a read-only session. Each session that writes has a
    /// higher one.
    highest: Option<u64>,
    /// The highest lease is this machine's.
    highest_is_own: bool,
    /// Renewals that failed in a row.
    failed_renewals: AtomicU32,
    /// What the container was when it was opened. A reconnect must find the same.
    known: OnceLock<(Pins, u64)>,
    /// When we learned that all processes of the previous session had exited.
    held_since: Instant,
    /// Writes may be pending that no fsync covers.
    unresolved: AtomicBool,
    /// When the lease was last read and ours, by [`since_boot`].
    verified: Mutex<Option<Duration>>,
    /// The state at the beginning of a read-only session.
    initial_state: OnceLock<InitialState>,
    /// Why nothing may be sent any more.
    lost: Mutex<Option<Failure>>,
    /// Lists and notes that lay beside the container when this session began.
    late_records: LateRecords,
    /// What this session sent, once the key is known.
    sent: OnceLock<Sent>,
    /// Whether the machine is about to sleep.
    sleep: sleep::Sleep,
    /// The lease was released, and no higher one existed then.
    released_alone: AtomicBool,
    /// Why "free" could not be written.
    left_locked: Mutex<Option<String>>,
    /// How many writes [`before_send`](sprat_volume::SessionHooks::before_send) allowed.
    allowed: AtomicU64,
    /// The agent on the server through which the session began.
    agent: Option<String>,
    /// All connections of this session led through that agent.
    same_agent: AtomicBool,
    /// The agent refuses what was sent on earlier connections.
    earlier_refused: AtomicBool,
    /// Receives the progress of the recovery of a dead session's writes.
    recovery_listener: OnceLock<Box<dyn Fn(u64, u64) + Send + Sync>>,
}

/// What every session that writes changes: the length, or the file system's stamp block.
struct InitialState {
    file_bytes: u64,
    /// Where the stamp block lies in the file.
    stamp_at: u64,
    stamp_block: Vec<u8>,
}

/// The result of a renewal.
pub(crate) enum Renewal {
    /// The lease is still ours, or nobody writes.
    Ours,
    /// The connection is lost, so the state of the lease is unknown.
    ConnectionLost(StoreError),
    /// The container is no longer ours.
    Lost,
}

/// If the lease was read longer ago than this, it is read again before anything is sent. A session
/// that observed it since may have taken it for a dead session's: a machine that slept has renewed
/// nothing. The age is a quarter of the time for which `sprat unlock` observes a lease.
fn verified_to_send_age_max(quiet_time: Duration) -> Duration {
    (quiet_time / 2).clamp(Duration::from_secs(2), Duration::from_secs(10))
}

/// While the lease is checked for a write that waited, nothing more is sent, so the second check at
/// the latest waits for nothing on the connection. If so many checks in a row took longer than their
/// result counts, the connection is given up: another machine may have taken the lease meanwhile.
const CHECKS_TO_SEND_MAX: u32 = 3;

/// A lease whose counter can't be written looks like a dead session's. After so many failed
/// renewals nothing more is sent.
const FAILED_RENEWALS_MAX: u32 = 3;

/// The parts of a [`ContainerLease`].
pub(crate) struct LeaseParts {
    pub connection: Connection,
    pub record: WriteJournal,
    pub container: FileName,
    pub file_name: FileName,
    pub access: Access,
    pub opened_by: OpenedBy,
    pub store: Arc<dyn Store>,
    pub lock: Option<Lock>,
    pub stale_lock: Option<LockInfo>,
    pub highest: Option<u64>,
    pub highest_is_own: bool,
    pub late_records: LateRecords,
}

impl ContainerLease {
    pub(crate) fn new(parts: LeaseParts) -> Self {
        let unresolved = !parts.record.in_doubt().is_empty();
        Self {
            connection: parts.connection,
            record: parts.record,
            container: parts.container,
            file_name: parts.file_name,
            access: parts.access,
            opened_by: parts.opened_by,
            agent: parts.store.agent(),
            same_agent: AtomicBool::new(true),
            earlier_refused: AtomicBool::new(false),
            store: RwLock::new(parts.store),
            lock: RwLock::new(parts.lock),
            stale_lock: parts.stale_lock,
            highest: parts.highest,
            highest_is_own: parts.highest_is_own,
            failed_renewals: AtomicU32::new(0),
            known: OnceLock::new(),
            held_since: Instant::now(),
            unresolved: AtomicBool::new(unresolved),
            verified: Mutex::new(None),
            initial_state: OnceLock::new(),
            lost: Mutex::new(None),
            late_records: parts.late_records,
            sent: OnceLock::new(),
            sleep: sleep::Sleep::default(),
            released_alone: AtomicBool::new(false),
            left_locked: Mutex::new(None),
            allowed: AtomicU64::new(0),
            recovery_listener: OnceLock::new(),
        }
    }

    /// Calls `events` while the volume is opened, with the bytes that are recovered and their total.
    pub(crate) fn on_recovery_progress(&self, events: impl Fn(u64, u64) + Send + Sync + 'static) {
        let _ = self.recovery_listener.set(Box::new(events));
    }

    /// The store, over the current connection.
    pub(crate) fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store.read().ignore_poison())
    }

    pub(crate) fn container(&self) -> &FileName {
        &self.container
    }

    pub(crate) fn file_name(&self) -> &FileName {
        &self.file_name
    }

    pub(crate) fn record(&self) -> &WriteJournal {
        &self.record
    }

    /// When we learned that all processes of the previous session had exited: we got the local
    /// record's flock.
    pub(crate) fn held_since(&self) -> Instant {
        self.held_since
    }

    /// How long the server may still carry out requests that were pending when a connection was
    /// lost. Zero if it can't.
    pub(crate) fn quiet_time(&self) -> Duration {
        match self.server_outlives_us() {
            true => self.connection.quiet_time(),
            false => Duration::ZERO,
        }
    }

    /// Whether a dead session's writes may still arrive in the file.
    pub(crate) fn server_outlives_us(&self) -> bool {
        self.connection.outlives_us()
    }

    /// Whether a dead session of this machine has left its lease, and this session only reads.
    pub(crate) fn left_by_dead_session(&self) -> bool {
        self.stale_lock.is_some()
    }

    /// Whether the lease was taken over from a dead session of this machine.
    pub(crate) fn took_over(&self) -> bool {
        let held = self.lock.read().ignore_poison();
        held.as_ref().is_some_and(Lock::took_over)
    }

    /// The clock of a server that is reached by ssh less this machine's, in seconds. `None`: not known.
    pub(crate) fn server_ahead_s(&self) -> Option<i64> {
        let held = self.lock.read().ignore_poison();
        let held = held.as_ref().filter(|_| self.connection.is_ssh());
        held.and_then(Lock::server_ahead_s)
    }

    /// Whether no other machine has had the lease since this machine had it last.
    pub(crate) fn follows_own(&self) -> bool {
        let held = self.lock.read().ignore_poison();
        held.as_ref().map_or(self.highest_is_own, Lock::follows_own)
    }

    /// Whether a request of an earlier session, such as a rename, may still arrive.
    pub(crate) fn late_requests_may_arrive(&self) -> bool {
        let held = self.lock.read().ignore_poison();
        held.as_ref()
            .is_some_and(|lock| lock.took_over() || lock.may_arrive())
    }

    /// Identifies this session among all sessions that change the container's keys.
    pub(crate) fn turn(&self) -> Turn {
        let held = self.lock.read().ignore_poison();
        let lease = held.as_ref().map_or(0, Lock::ordinal);
        drop(held);
        Turn {
            lease,
            after_takeover: self.late_requests_may_arrive(),
        }
    }

    /// Removes old leases that nobody needs. If this fails, the next session tries again.
    fn remove_old_leases(&self) {
        let store = self.store();
        if let Some(lock) = &*self.lock.read().ignore_poison() {
            let _ = lock.remove_old(&*store);
        }
    }

    /// Records what the container is. A reconnect accepts nothing else.
    pub(crate) fn learn(&self, pins: Pins, file_bytes: u64) {
        // Only the first value counts.
        let _ = self.known.set((pins, file_bytes));
    }

    /// The container's UUID, from its header. `None` before [`learn`](Self::learn).
    pub(crate) fn uuid(&self) -> Option<&str> {
        Some(&self.known.get()?.0.uuid)
    }

    /// Why the container is no longer ours.
    pub(crate) fn lost(&self) -> Option<Failure> {
        self.lost.lock().ignore_poison().clone()
    }

    /// Records ranges of the container file that this process itself writes next, without the volume.
    pub(crate) fn before_own_write(&self, ranges: &[Range<u64>]) -> Result<(), Failure> {
        self.before_send(ranges).map_err(|fenced| match fenced {
            Fenced::Disconnected(error) => Failure::from(&error),
            other => self
                .lost()
                .unwrap_or_else(|| Failure::failed(other.to_string())),
        })
    }

    fn lose(&self, failure: Failure) {
        let mut lost = self.lost.lock().ignore_poison();
        lost.get_or_insert(failure);
    }

    /// Renews the lease. A read-only session checks instead whether somebody acquired one or wrote
    /// meanwhile.
    pub(crate) fn renew(&self) -> Renewal {
        let store = self.store();
        let begun = since_boot();
        let held = match &*self.lock.read().ignore_poison() {
            Some(lock) => lock.renew(&*store),
            None if self.access == Access::ReadOnly => self.still_alone(&*store),
            None => Ok(()),
        };
        match held {
            Ok(()) => {
                self.note_verified(begun);
                self.failed_renewals.store(0, Ordering::SeqCst);
                Renewal::Ours
            }
            // A lost connection says nothing about the lease. The lease is checked again on the
            // next connection, which nobody else may request while the session is idle. If the
            // connection was replaced meanwhile, this error says nothing about the new one.
            Err(LockError::Store { source, .. })
                if source.kind() == StoreErrorKind::Disconnected
                    && Arc::ptr_eq(&store, &self.store()) =>
            {
                Renewal::ConnectionLost(source)
            }
            Err(LockError::Store { .. })
                if self.failed_renewals.fetch_add(1, Ordering::SeqCst) + 1
                    < FAILED_RENEWALS_MAX =>
            {
                Renewal::Ours
            }
            Err(error) => {
                self.lose(Failure::from(&error));
                Renewal::Lost
            }
        }
    }

    /// Between two renewals: reads the lease of a session that writes.
    fn verify_early(&self) -> Renewal {
        if self.access == Access::ReadWrite
            && let Err(error) = self.verify()
        {
            return match error {
                // The next renewal finds the same error and reports it.
                LockError::Store { .. } => Renewal::Ours,
                error => {
                    self.lose(Failure::from(&error));
                    Renewal::Lost
                }
            };
        }
        Renewal::Ours
    }

    /// Everything that was sent is durable, because a flush outside the volume (the header's)
    /// succeeded.
    pub(crate) fn all_resolved(&self) -> Result<(), LockError> {
        self.record.all_resolved()?;
        self.unresolved.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// A shell on the server that can punch holes into the container. `None` for a local store.
    pub(crate) fn puncher(&self) -> Result<Option<Puncher>, PunchError> {
        let fence = match &*self.lock.read().ignore_poison() {
            Some(lock) => lock.fence().map_err(|error| Failure::from(&error))?,
            None => return Ok(None),
        };
        // What a shell does, the agent neither saves nor refuses.
        if self.store().agent().is_some() {
            return Ok(None);
        }
        Ok(self.connection.puncher(&self.file_name, fence)?)
    }

    /// Checks that a header belongs to the container that was opened.
    pub(crate) fn check_known(&self, header: &Header) -> Result<(), Failure> {
        match self.known.get() {
            Some((pins, _)) => Ok(header.check_pins(pins)?),
            None => Err(Failure::failed("nothing is known of the container yet")),
        }
    }

    /// Reads the lease again, before a step that can't be undone.
    pub(crate) fn verify(&self) -> Result<(), LockError> {
        self.verify_on(&*self.store())
    }

    fn verify_on(&self, store: &dyn Store) -> Result<(), LockError> {
        let begun = since_boot();
        self.read_lock_again(store)?;
        self.note_verified(begun);
        Ok(())
    }

    /// On a new connection: makes the next lease, or checks again if this session has none.
    fn reacquire(&self, store: &dyn Store) -> Result<(), LockError> {
        let begun = since_boot();
        match &*self.lock.read().ignore_poison() {
            Some(lock) => lock.reacquire(store)?,
            None => return self.verify_on(store),
        }
        self.note_verified(begun);
        Ok(())
    }

    fn note_verified(&self, begun: Duration) {
        let mut verified = self.verified.lock().ignore_poison();
        *verified = (*verified).max(Some(begun));
        if let Some(sent) = self.sent.get() {
            sent.lease_checked(begun);
        }
    }

    /// Sets the age of the last check.
    #[cfg(test)]
    pub(crate) fn set_last_check_age(&self, age: Duration) {
        let mut verified = self.verified.lock().ignore_poison();
        *verified = since_boot().checked_sub(age);
    }

    /// The second check of the opening read the lease and the next number. So it also counts as a
    /// check for the first epochs.
    pub(crate) fn use_second_check(&self) {
        let held = self.lock.read().ignore_poison();
        let begun = held.as_ref().map(Lock::checked_at);
        drop(held);
        if let Some(begun) = begun {
            self.note_verified(begun);
        }
    }

    /// Reads the lease again if the last check was begun longer than `age_max` ago. A lease that is
    /// known to be lost stays lost, however recent the last good check was.
    fn verify_if_older(&self, age_max: Duration) -> Result<(), Fenced> {
        if let Some(failure) = self.lost() {
            return Err(Fenced::Lost(Box::new(failure)));
        }
        match self.last_check_is_older(age_max) {
            true => self.verify_now(),
            false => Ok(()),
        }
    }

    fn verify_now(&self) -> Result<(), Fenced> {
        match self.verify_on(&*self.store()) {
            Ok(()) => Ok(()),
            Err(LockError::Store { source, .. })
                if source.kind() == StoreErrorKind::Disconnected =>
            {
                Err(Fenced::Disconnected(source))
            }
            Err(error) => {
                self.lose(Failure::from(&error));
                Err(Fenced::Lost(Box::new(error)))
            }
        }
    }

    fn last_check_is_older(&self, age_max: Duration) -> bool {
        let verified = *self.verified.lock().ignore_poison();
        verified.is_none_or(|at| since_boot().saturating_sub(at) >= age_max)
    }

    fn to_send_age_max(&self) -> Duration {
        verified_to_send_age_max(self.connection.quiet_time())
    }

    fn read_lock_again(&self, store: &dyn Store) -> Result<(), LockError> {
        match &*self.lock.read().ignore_poison() {
            Some(lock) => lock.verify(store),
            None if self.access == Access::ReadOnly => self.still_alone(store),
            None => Err(LockError::Lost {
                container: self.container.clone(),
                reason: "it was given back".to_owned(),
            }),
        }
    }

    /// Opens the file on a new connection, if it is still the same container and ours.
    fn reopen(&self) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        // Every failure before the lease was read is retried. A server that starts may answer
        // logins before its keys, its home or its disk are there. It may also have another host
        // key, for example that of a system that asks for the disk's passphrase. ssh sends nothing
        // to an unknown host.
        let store = self.connection.connect().map_err(ReconnectError::Retry)?;
        // If the container is missing, so is the lease, and it would count as lost.
        store.stat(&self.file_name).map_err(ReconnectError::Retry)?;
        self.reacquire(&*store).map_err(|error| match error {
            LockError::Store { source, .. } => ReconnectError::Retry(source),
            other => {
                self.lose(Failure::from(&other));
                ReconnectError::GiveUp(Box::new(other))
            }
        })?;
        self.refuse_earlier(&*store)
            .map_err(ReconnectError::Retry)?;
        let file = store
            .open(&self.file_name, self.access)
            .map_err(retry_or_give_up)?;
        let file_bytes = file.len().map_err(retry_or_give_up)?;
        let Some((pins, known_bytes)) = self.known.get() else {
            return Err(self.another("nothing is known of the container yet"));
        };
        if file_bytes != *known_bytes {
            return Err(self.another(&format!(
                "the container had {known_bytes} bytes before the connection was lost, now \
                 {file_bytes}"
            )));
        }
        let header = AnyHeader::load(&HeaderBytes(&*file), self.opened_by).map_err(|error| {
            if passes(&error) {
                return ReconnectError::Retry(StoreError::Disconnected {
                    op: "read the header of",
                    object: self.file_name.to_string(),
                    reason: "it can't be read at present".to_owned(),
                });
            }
            self.lose(Failure::from(&error));
            ReconnectError::GiveUp(Box::new(error))
        })?;
        header.check_pins(pins).map_err(|error| {
            self.lose(Failure::from(&error));
            ReconnectError::GiveUp(Box::new(error))
        })?;
        *self.store.write().ignore_poison() = store;
        Ok(file)
    }

    /// Has the agent refuse what the earlier connections of this session sent, if all of them led through it.
    fn refuse_earlier(&self, store: &dyn Store) -> Result<(), StoreError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        if self.agent.is_none() || store.agent() != self.agent {
            self.same_agent.store(false, Ordering::SeqCst);
        }
        let refused = match self.same_agent.load(Ordering::SeqCst) {
            true => match store.refuse_earlier(&self.file_name) {
                Err(error) if error.was_answered() => false,
                refused => refused?,
            },
            false => false,
        };
        self.earlier_refused.store(refused, Ordering::SeqCst);
        Ok(())
    }

    fn another(&self, what: &str) -> ReconnectError {
        let failure = Failure::new(
            Exit::Damaged,
            "after a lost connection, another container is at the target",
        )
        .because(what)
        .with_hint(
            "nothing was sent to this container. Find out who changed the file on the server",
        );
        self.lose(failure.clone());
        ReconnectError::GiveUp(Box::new(failure))
    }
}

impl sprat_volume::SessionHooks for ContainerLease {
    fn before_epoch(&self) -> Result<(), Fenced> {
        self.verify_if_older(self.to_send_age_max() / 2)
    }

    fn check_lock_now(&self) -> Result<(), Fenced> {
        self.verify_if_older(Duration::ZERO)
    }

    fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), Fenced> {
        self.wait_until_awake();
        self.verify_if_older(self.to_send_age_max())?;
        // Kept until the ranges are recorded. A lease that is released meanwhile would not know of
        // them.
        let held = self.lock.read().ignore_poison();
        if held.is_none() {
            return Err(Fenced::Lost(Box::new(LockError::Lost {
                container: self.container.clone(),
                reason: "it was given back".to_owned(),
            })));
        }
        self.unresolved.store(true, Ordering::SeqCst);
        let number = u64::try_from(ranges.len()).unwrap_or(u64::MAX);
        self.allowed.fetch_add(number, Ordering::SeqCst);
        self.record.before_send(ranges).map_err(|error| {
            self.lose(Failure::from(&error));
            Fenced::Lost(Box::new(error))
        })
    }

    fn may_send(&self) -> bool {
        self.lost().is_none() && !self.last_check_is_older(self.to_send_age_max())
    }

    fn check_to_send(&self, checks: u32) -> Result<(), Fenced> {
        if checks < CHECKS_TO_SEND_MAX || self.lost().is_some() {
            return self.verify_if_older(self.to_send_age_max());
        }
        Err(Fenced::Disconnected(StoreError::Disconnected {
            op: "write",
            object: self.file_name.to_string(),
            reason: format!(
                "the connection is too slow: {checks} lock checks in a row took longer than {} s",
                self.to_send_age_max().as_secs()
            ),
        }))
    }

    fn sends(&self, offset: u64, bytes: &[u8]) -> u64 {
        self.sent.get().map_or(0, |sent| sent.note(offset, bytes))
    }

    fn answered(&self, number: u64) {
        if let Some(sent) = self.sent.get() {
            sent.answered(number);
        }
    }

    fn resolved(&self) {
        match self.all_resolved() {
            Ok(()) => {}
            // The ranges stay in doubt. That costs the next session time, but never data.
            Err(_) => self.unresolved.store(true, Ordering::SeqCst),
        }
    }

    fn resolved_in_part(&self, ranges: &[Range<u64>]) {
        // If the record can't be written, it refuses the next `before_send`. Until then the ranges
        // stay in doubt. That costs the next session time, but never data.
        let _ = self.record.resolved(ranges);
    }

    fn reconnect(&self, _attempt: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        self.sleep.wait_until_awake();
        self.reopen()
    }

    fn recovering(&self, done: u64, whole: u64) {
        if let Some(events) = self.recovery_listener.get() {
            events(done, whole);
        }
    }

    fn old_server_dead(&self) -> bool {
        !self.connection.outlives_us() || self.earlier_refused.load(Ordering::SeqCst)
    }
}

/// Why no holes were punched by one of the methods.
pub(crate) enum PunchError {
    /// The method is not available here, for this reason.
    Unavailable(String),
    /// The method failed, or nobody knows whether it is available.
    Failed(Failure),
}

impl From<StoreError> for PunchError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unsupported { reason, .. } => Self::Unavailable(reason),
            error => Self::Failed(Failure::from(&error)),
        }
    }
}

impl From<Failure> for PunchError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Whether another attempt may help, or the server's answer is final.
fn retry_or_give_up(error: StoreError) -> ReconnectError {
    match error.kind().may_pass() {
        true => ReconnectError::Retry(error),
        false => ReconnectError::GiveUp(Box::new(error)),
    }
}

/// Searches an error's sources for one that may pass.
fn passes(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let store = error.downcast_ref::<StoreError>().or_else(|| {
            error
                .downcast_ref::<std::io::Error>()
                .and_then(|error| error.get_ref())
                .and_then(|inner| inner.downcast_ref::<StoreError>())
        });
        if store.is_some_and(|error| error.kind().may_pass()) {
            return true;
        }
        next = error.source();
    }
    false
}
