//! What keeps a container this session's own: local record, lock, renewal, safe reconnecting.

mod late_writes;
mod renewal;
mod sleep;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

use sprat_luks::{AnyHeader, Header, OpenedBy, Pins, Turn};
use sprat_store::clock::since_boot;
use sprat_store::{
    Access, FileName, IgnorePoison, Lock, LockError, LockInfo, Puncher, ReadClass, Store,
    StoreError, StoreErrorKind, StoreFile, WriteJournal, lock,
};
use sprat_volume::{Fenced, ReconnectError};

use crate::volume_process::connection::{Connection, HeaderBytes};
use crate::volume_process::late::{Found, Sent};
use crate::volume_process::trim::Way;
use crate::{Exit, Failure};

pub(crate) use crate::volume_process::lease::renewal::keep_renewing;

/// The container, held.
pub(crate) struct ContainerLease {
    connection: Connection,
    record: WriteJournal,
    /// The container, which the lock is about.
    container: FileName,
    /// The file that is open: the container, or the one that is to become it.
    file_name: FileName,
    access: Access,
    /// What its header may ask for.
    opened_by: OpenedBy,
    store: RwLock<Arc<dyn Store>>,
    lock: RwLock<Option<Lock>>,
    /// A lock that a dead session of this host left, for a read-only session.
    stale_lock: Option<LockInfo>,
    /// The highest lease when a session that only reads began: it counts every session that writes.
    highest: Option<u64>,
    /// That one is this machine's.
    highest_is_own: bool,
    /// Renewals that failed, one after another.
    failed_renewals: AtomicU32,
    /// What was found first; what a reconnect must find again.
    known: OnceLock<(Pins, u64)>,
    /// Since when every process of the session before is surely gone.
    held_since: Instant,
    /// Bytes may be on their way that no fsync covers.
    unsettled: AtomicBool,
    /// When the lock was last read and ours, as [`since_boot`] counts.
    verified: Mutex<Option<Duration>>,
    /// What a session that only reads began with.
    began_with: OnceLock<BeganWith>,
    /// Why nothing may be sent any more.
    lost: Mutex<Option<Failure>>,
    /// What lay beside the container when this session began.
    late_found: Found,
    /// What this session sent, once the key is known.
    sent: OnceLock<Sent>,
    /// Whether the machine is about to sleep.
    sleep: sleep::Sleep,
    /// Who hears how far a dead session's bytes are settled.
    says: OnceLock<Box<dyn Fn(u64, u64) + Send + Sync>>,
}

/// What every session that writes changes: ext4's super block, at each mount for writing.
struct BeganWith {
    file_bytes: u64,
    offset_bytes: u64,
    first_block: Vec<u8>,
}

/// What became of the lock at a renewal.
pub(crate) enum Renewed {
    /// It is still ours, or nobody writes.
    Held,
    /// Nothing is known: the line is gone.
    LineLost(StoreError),
    /// The container is no longer held.
    Lost,
}

/// A lock that was read longer ago is read again before anything is sent: whoever watched it since
/// may have taken it for a dead session's. A machine that slept has renewed nothing. A quarter of
/// the time for which `sprat unlock` watches.
fn verified_to_send_age_max(quiet_time: Duration) -> Duration {
    (quiet_time / 2).clamp(Duration::from_secs(2), Duration::from_secs(10))
}

/// A lease whose counter can't be written looks like a dead session's: then nothing more is sent.
const FAILED_RENEWALS_MAX: u32 = 3;

/// What a [`ContainerLease`] is made of.
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
    pub late_found: Found,
}

impl ContainerLease {
    pub(crate) fn new(parts: LeaseParts) -> Self {
        let unsettled = !parts.record.in_doubt().is_empty();
        Self {
            connection: parts.connection,
            record: parts.record,
            container: parts.container,
            file_name: parts.file_name,
            access: parts.access,
            opened_by: parts.opened_by,
            store: RwLock::new(parts.store),
            lock: RwLock::new(parts.lock),
            stale_lock: parts.stale_lock,
            highest: parts.highest,
            highest_is_own: parts.highest_is_own,
            failed_renewals: AtomicU32::new(0),
            known: OnceLock::new(),
            held_since: Instant::now(),
            unsettled: AtomicBool::new(unsettled),
            verified: Mutex::new(None),
            began_with: OnceLock::new(),
            lost: Mutex::new(None),
            late_found: parts.late_found,
            sent: OnceLock::new(),
            sleep: sleep::Sleep::default(),
            says: OnceLock::new(),
        }
    }

    /// Calls `events` with the bytes that are settled, and of how many, while the volume is opened.
    pub(crate) fn while_settling(&self, events: impl Fn(u64, u64) + Send + Sync + 'static) {
        let _ = self.says.set(Box::new(events));
    }

    /// The store as it is reached now.
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

    /// Since when every process of the session before is surely gone: its flock is ours.
    pub(crate) fn held_since(&self) -> Instant {
        self.held_since
    }

    /// For how long what was under way at a loss may still be carried out; zero where nothing can.
    pub(crate) fn quiet_time(&self) -> Duration {
        match self.server_outlives_us() {
            true => self.connection.quiet_time(),
            false => Duration::ZERO,
        }
    }

    /// Whether what a dead session sent may still arrive in the file.
    pub(crate) fn server_outlives_us(&self) -> bool {
        self.connection.outlives_us()
    }

    /// Whether a dead session of this machine has left its lock, and this session only reads.
    pub(crate) fn left_by_dead_session(&self) -> bool {
        self.stale_lock.is_some()
    }

    /// Whether the lease was a dead session's of this machine.
    pub(crate) fn took_over(&self) -> bool {
        let held = self.lock.read().ignore_poison();
        held.as_ref().is_some_and(Lock::took_over)
    }

    /// No other machine has held the container since this one did.
    pub(crate) fn follows_own(&self) -> bool {
        let held = self.lock.read().ignore_poison();
        held.as_ref().map_or(self.highest_is_own, Lock::follows_own)
    }

    /// Whether something of an earlier session may still arrive: a rename, too.
    pub(crate) fn late_requests_may_arrive(&self) -> bool {
        let held = self.lock.read().ignore_poison();
        held.as_ref()
            .is_some_and(|lock| lock.took_over() || lock.may_arrive())
    }

    /// Which of all sessions changes the container's keys here.
    pub(crate) fn turn(&self) -> Turn {
        let held = self.lock.read().ignore_poison();
        let lease = held.as_ref().map_or(0, Lock::ordinal);
        drop(held);
        Turn {
            lease,
            after_takeover: self.late_requests_may_arrive(),
        }
    }

    /// Removes leases that nobody needs any more. What fails is tried by the next session.
    fn remove_old_leases(&self) {
        let store = self.store();
        if let Some(lock) = &*self.lock.read().ignore_poison() {
            let _ = lock.remove_old(&*store);
        }
    }

    /// Notes what the container is; a reconnect accepts nothing else.
    pub(crate) fn learn(&self, pins: Pins, file_bytes: u64) {
        // Learnt once: the first word counts.
        let _ = self.known.set((pins, file_bytes));
    }

    /// The container's UUID, as its header tells it; `None` before [`learn`](Self::learn).
    pub(crate) fn uuid(&self) -> Option<&str> {
        Some(&self.known.get()?.0.uuid)
    }

    /// Why this session no longer holds the container.
    pub(crate) fn lost(&self) -> Option<Failure> {
        self.lost.lock().ignore_poison().clone()
    }

    fn lose(&self, failure: Failure) {
        let mut lost = self.lost.lock().ignore_poison();
        lost.get_or_insert(failure);
    }

    /// Renews the lock, or, in a session that only reads, looks whether somebody took one or wrote
    /// meanwhile.
    pub(crate) fn renew(&self) -> Renewed {
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
                Renewed::Held
            }
            // A lost line says nothing of the lock: it is checked again on the new one, which
            // nobody else may ask for while the session is idle. One that is there by now is not
            // blamed.
            Err(LockError::Store { source, .. })
                if source.kind() == StoreErrorKind::Disconnected
                    && Arc::ptr_eq(&store, &self.store()) =>
            {
                Renewed::LineLost(source)
            }
            Err(LockError::Store { .. })
                if self.failed_renewals.fetch_add(1, Ordering::SeqCst) + 1
                    < FAILED_RENEWALS_MAX =>
            {
                Renewed::Held
            }
            Err(error) => {
                self.lose(Failure::from(&error));
                Renewed::Lost
            }
        }
    }

    /// Between two renewals: reads the lease of a session that writes.
    fn look_early(&self) -> Renewed {
        if self.access == Access::ReadWrite
            && let Err(error) = self.still_ours()
        {
            return match error {
                // The next renewal finds the same, and says so.
                LockError::Store { .. } => Renewed::Held,
                error => {
                    self.lose(Failure::from(&error));
                    Renewed::Lost
                }
            };
        }
        Renewed::Held
    }

    /// Notes what a session that only reads begins with: a session that came and went between two
    /// looks for locks leaves another super block.
    pub(crate) fn begin_reading(&self, file_bytes: u64, offset_bytes: u64, first_block: Vec<u8>) {
        let _ = self.began_with.set(BeganWith {
            file_bytes,
            offset_bytes,
            first_block,
        });
    }

    /// At the end of a session that only read: whether what it read was of one state. A line that is
    /// gone just now tells nothing; it was looked a short while ago.
    pub(crate) fn was_undisturbed(&self) -> Result<(), LockError> {
        match self.still_ours() {
            Err(LockError::Store { .. }) => Ok(()),
            looked => looked,
        }
    }

    /// A read-only session takes no lock, so it must see for itself that nobody writes, or did.
    fn still_alone(&self, store: &dyn Store) -> Result<(), LockError> {
        let now = lock::inspect_near(store, &self.container, self.highest)?;
        let came_and_went = now.highest != self.highest && !self.ignores_locks();
        match now.held {
            Some(info) if !self.is_stale(&info) => Err(LockError::TakenMeanwhile {
                container: self.container.clone(),
                info: Box::new(info),
            }),
            _ if came_and_went
                || self.began_with.get().is_some_and(|began| {
                    // Locks are looked at first: whoever wrote and is gone wrote before that.
                    !self.is_as(began, store).unwrap_or(true)
                }) =>
            {
                Err(LockError::Disturbed {
                    container: self.container.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    fn is_as(&self, began: &BeganWith, store: &dyn Store) -> Result<bool, StoreError> {
        let file = store.open(&self.file_name, Access::ReadOnly)?;
        let mut block = vec![0; began.first_block.len()];
        match file.read_at(began.offset_bytes, &mut block, ReadClass::Demand) {
            Ok(()) => {}
            Err(StoreError::Truncated { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(block == began.first_block && file.len()? >= began.file_bytes)
    }

    /// A session that reads behind a lock that it was asked to ignore.
    fn ignores_locks(&self) -> bool {
        self.began_with.get().is_none() && self.known.get().is_some()
    }

    fn is_stale(&self, info: &LockInfo) -> bool {
        self.stale_lock
            .as_ref()
            .is_some_and(|stale| stale.number == info.number && stale.token == info.token)
    }

    /// Gives the lock back. Only what is settled may be let go: with bytes still under way the
    /// lock stays, so that the next session settles them first. True if no lock is left.
    pub(crate) fn release(&self) -> Result<bool, LockError> {
        let mut held = self.lock.write().ignore_poison();
        // Under the lock: nothing is sent between this look and the end. A wait for a dead session's
        // bytes that did not come to its end is still to be waited: the lock says so.
        let unsettled = self.unsettled.load(Ordering::SeqCst) || self.record.owes_quiet();
        if unsettled {
            return Ok(false);
        }
        if self.lost().is_some() {
            // Who took over from a change of keys, or from a session that sent nothing, need not wait. A
            // session that noted what it sent leaves its list first, and answers then.
            if self.sent.get().is_none()
                && let Some(lock) = held.take()
            {
                drop(held);
                if let Some(store) = self.store_after_loss(&lock) {
                    let _ = lock.answer(&*store);
                }
            }
            return Ok(false);
        }
        if let Some(lock) = held.take() {
            drop(held);
            self.record.all_resolved()?;
            lock.release(&*self.store())?;
        }
        Ok(true)
    }

    /// Gives the lock back after `last`, before which nothing more is sent and after which nothing
    /// of it matters.
    pub(crate) fn release_after(
        &self,
        last: impl FnOnce(&dyn Store) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let store = self.store();
        let lock = {
            let mut held = self.lock.write().ignore_poison();
            held.take()
        };
        last(&*store)?;
        self.all_settled()?;
        if let Some(lock) = lock {
            lock.release(&*store)?;
        }
        Ok(())
    }

    /// Everything sent is durable, by the word of a flush outside the volume (the header's).
    pub(crate) fn all_settled(&self) -> Result<(), LockError> {
        self.record.all_resolved()?;
        self.unsettled.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// A shell on the server that can punch holes into the container; `None` for a local store.
    pub(crate) fn puncher(&self) -> Result<Option<Puncher>, Way> {
        let fence = match &*self.lock.read().ignore_poison() {
            Some(lock) => lock
                .fence()
                .map_err(|error| Way::Failed(Failure::from(&error)))?,
            None => return Ok(None),
        };
        Ok(self.connection.puncher(&self.file_name, fence)?)
    }

    /// Whether a header is that of the container that was opened.
    pub(crate) fn check_known(&self, header: &Header) -> Result<(), Failure> {
        match self.known.get() {
            Some((pins, _)) => Ok(header.check_pins(pins)?),
            None => Err(Failure::failed("nothing is known of the container yet")),
        }
    }

    /// Reads the lock again before something that can't be undone.
    pub(crate) fn still_ours(&self) -> Result<(), LockError> {
        self.verify_lock(&*self.store())
    }

    fn verify_lock(&self, store: &dyn Store) -> Result<(), LockError> {
        let begun = since_boot();
        self.read_lock_again(store)?;
        self.note_verified(begun);
        Ok(())
    }

    /// On a new connection: makes the next lease, or looks once more where there is none.
    fn reacquire(&self, store: &dyn Store) -> Result<(), LockError> {
        let begun = since_boot();
        match &*self.lock.read().ignore_poison() {
            Some(lock) => lock.reacquire(store)?,
            None => return self.verify_lock(store),
        }
        self.note_verified(begun);
        Ok(())
    }

    fn note_verified(&self, begun: Duration) {
        let mut verified = self.verified.lock().ignore_poison();
        *verified = (*verified).max(Some(begun));
        if let Some(sent) = self.sent.get() {
            sent.looked(begun);
        }
    }

    /// The last look at the lock is so long ago.
    #[cfg(test)]
    pub(crate) fn looked_ago(&self, age: Duration) {
        let mut verified = self.verified.lock().ignore_poison();
        *verified = since_boot().checked_sub(age);
    }

    /// Reads the lock again where the last look is too long ago to send by.
    fn verify_to_send(&self) -> Result<(), Fenced> {
        let verified = *self.verified.lock().ignore_poison();
        match verified {
            Some(at)
                if since_boot().saturating_sub(at)
                    >= verified_to_send_age_max(self.connection.quiet_time()) =>
            {
                sprat_volume::SessionHooks::before_epoch(self)
            }
            _ => Ok(()),
        }
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

    /// Opens the file on a new connection if it is still the same container, held by us.
    fn reopen(&self) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        // Whatever is said before the lock was read is waited out: a server that starts answers logins
        // before its keys, its home or its disk are there, or with another host key (one that asks for
        // the disk's passphrase). ssh sends nothing to a host that it doesn't know.
        let store = self.connection.connect().map_err(ReconnectError::Retry)?;
        // No container, and no lock either, which would be taken for lost.
        store.stat(&self.file_name).map_err(ReconnectError::Retry)?;
        self.reacquire(&*store).map_err(|error| match error {
            LockError::Store { source, .. } => ReconnectError::Retry(source),
            other => {
                self.lose(Failure::from(&other));
                ReconnectError::GiveUp(Box::new(other))
            }
        })?;
        let file = store
            .open(&self.file_name, self.access)
            .map_err(retry_or_give_up)?;
        let file_bytes = file.len().map_err(retry_or_give_up)?;
        let Some((pins, known_bytes)) = self.known.get() else {
            return Err(self.another("nothing is known of the container yet"));
        };
        if file_bytes != *known_bytes {
            return Err(self.another(&format!(
                "the container had {known_bytes} bytes before the line was lost, now {file_bytes}"
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

    fn another(&self, what: &str) -> ReconnectError {
        let failure = Failure::new(
            Exit::Damaged,
            "after the line was lost another container was found at the target",
        )
        .because(what)
        .with_hint("nothing was sent to it; find out who changed the file on the server");
        self.lose(failure.clone());
        ReconnectError::GiveUp(Box::new(failure))
    }
}

impl sprat_volume::SessionHooks for ContainerLease {
    fn before_epoch(&self) -> Result<(), Fenced> {
        if let Some(failure) = self.lost() {
            return Err(Fenced::Lost(Box::new(failure)));
        }
        match self.verify_lock(&*self.store()) {
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

    fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), Fenced> {
        self.wait_until_awake();
        self.verify_to_send()?;
        // Held until it is noted: a lock that is given back meanwhile would not know of it.
        let held = self.lock.read().ignore_poison();
        if held.is_none() {
            return Err(Fenced::Lost(Box::new(LockError::Lost {
                container: self.container.clone(),
                reason: "it was given back".to_owned(),
            })));
        }
        self.unsettled.store(true, Ordering::SeqCst);
        self.record.before_send(ranges).map_err(|error| {
            self.lose(Failure::from(&error));
            Fenced::Lost(Box::new(error))
        })
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
        match self.all_settled() {
            Ok(()) => {}
            // The ranges stay suspect, which costs the next session time, never data.
            Err(_) => self.unsettled.store(true, Ordering::SeqCst),
        }
    }

    fn resolved_in_part(&self, ranges: &[Range<u64>]) {
        // A record that can't be kept refuses the next `before_send`; until then the ranges stay
        // suspect, which costs the next session time, never data.
        let _ = self.record.resolved(ranges);
    }

    fn reconnect(&self, _attempt: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        self.sleep.wait_until_awake();
        self.reopen()
    }

    fn recovering(&self, done: u64, whole: u64) {
        if let Some(events) = self.says.get() {
            events(done, whole);
        }
    }

    fn old_server_dead(&self) -> bool {
        !self.connection.outlives_us()
    }
}

/// Whether trying again may help, or the server said something that will not change.
fn retry_or_give_up(error: StoreError) -> ReconnectError {
    match error.kind().may_pass() {
        true => ReconnectError::Retry(error),
        false => ReconnectError::GiveUp(Box::new(error)),
    }
}

/// Looks through an error's sources for one that passes.
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
