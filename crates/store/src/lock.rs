//! The lock: one session per container, by numbered leases beside it.
//!
//! `NAME.lock.N`, N = 1,000,001, 1,000,002, …; the highest number decides. A session acquires a
//! lease by creating the next number exclusively, the only compare-and-swap that SFTP has. This
//! works only while no number comes back. So a session that releases its lease writes "free" into
//! it and leaves the file, and nothing ever removes the highest lease. After the creation
//! everything is checked once more, by names: of two sessions that create at the same time, at
//! least the one that checks last sees the other.
//!
//! A session may take a container over while writes of an earlier session can still arrive. Then
//! the earlier lease is recorded in the next one as a *predecessor* (field `doors`). It is *open*
//! until its session answers or an end time is known. It is passed on from lease to lease until
//! that time is over.

mod acquire;
mod cleanup;
mod comparison;
mod content;
mod inspect;
mod lease;
mod reacquire;
mod takeover;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

pub use acquire::{EMPTY_WAIT, LeaseCheck};
pub use comparison::{LateUntil, PendingComparison};
pub use content::LATE_WRITE_S;
use content::{Content, LEASE_BYTES, Predecessor};
pub use inspect::{Inspected, inspect, inspect_near};
use lease::{FoundLease, lock_name, numbers_in, read_lease};
pub use takeover::{Watched, watch};

use crate::clock::{now_s, since_boot};
use crate::join::join;
use crate::token::Token;
use crate::{
    Access, Fence, FileName, IgnorePoison, LockError, LockInfo, ReadClass, Store, StoreError,
    StoreErrorKind, WriteJournal,
};

/// How often a session renews its lock.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(10);

/// A session of this machine's journal never counts further ahead of the journal than this: the
/// journal is synced once for each six renewals.
const UNRECORDED_RENEWALS_MAX: u64 = 7;

/// How often a lease that the server garbled is written again.
const REWRITES_MAX: u32 = 3;

/// The owner of a lock, as written into the lease. It does not show the host's name to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerNote {
    /// A random id of this host, kept in the state folder; cut to 64 characters.
    pub host: String,
    /// sprat's version; cut to 64 characters.
    pub version: String,
}

impl LockInfo {
    /// Whether a dead session of `journal` left this lock. Only then does it prove anything that
    /// the caller holds the journal's flock. The same host may hold the lock under another journal. False if that
    /// session may live ([`WriteJournal::may_live`]).
    #[must_use]
    pub fn is_left_by(&self, journal: &WriteJournal) -> bool {
        let acquired = journal.acquisitions().iter().any(|(number, token)| {
            let token = token.to_string();
            *number == self.number && self.token.as_ref().is_none_or(|found| *found == token)
        });
        acquired
            && !journal.may_live()
            && lease::may_be_ours(self.number, self.renewed, journal.known_renewals())
    }
}

/// Our lease on a container. Dropping it without [`Lock::release`] leaves the container locked, as
/// a kill does; the next session of this host takes it over.
#[derive(Debug)]
pub struct Lock {
    container: FileName,
    token: Token,
    current: Mutex<Current>,
    /// Serialises renewals and everything else that writes into the file.
    writing: Mutex<()>,
    took_over: bool,
    follows_own: bool,
    /// The late-write lists that existed when the lease was acquired.
    lists: Mutex<Vec<FileName>>,
    /// Another copy of this process has the same token.
    has_twin: AtomicBool,
    #[expect(dead_code, reason = "kept, not read")]
    busy: LockBusy,
    journal: WriteJournal,
    /// Before the second check, by [`since_boot`].
    checked_at: Duration,
}

/// The lease file that we have now. A reconnect creates the next one.
#[derive(Debug, Clone)]
struct Current {
    number: u64,
    file: FileName,
    content: Content,
    /// The lease directly below ours when ours was created.
    below: Option<u64>,
    /// The renewals that were answered; `content.renewed` counts those that were sent.
    answered: u64,
    /// A next lease of ours that may exist: the connection was lost while it was being created.
    pending: Option<Content>,
    /// The server's clock when it was created, and our own clock then.
    made_at: (u64, Duration),
    /// The server dated it. Until it is known, `made_at` is by our clock.
    clock_is_servers: bool,
}

/// A journal covers one lock at a time: a second one would find the first in the journal and
/// consider it dead.
#[derive(Debug)]
struct LockBusy(WriteJournal);

impl LockBusy {
    fn begin(journal: &WriteJournal, container: &FileName) -> Result<Self, LockError> {
        if journal.begin_lock() {
            return Ok(Self(journal.clone()));
        }
        Err(LockError::HeldHere {
            container_id: container.to_string(),
        })
    }
}

impl Drop for LockBusy {
    fn drop(&mut self) {
        self.0.end_lock();
    }
}

impl Lock {
    /// The number in the lease file's name.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.now().number
    }

    /// How many leases there have been, this one included. A later session's number is higher,
    /// unless somebody removes all of them.
    #[must_use]
    pub fn ordinal(&self) -> u64 {
        self.number().saturating_sub(content::FIRST_NUMBER - 1)
    }

    /// The container's name.
    #[must_use]
    pub fn container(&self) -> &FileName {
        &self.container
    }

    /// When the second check was begun, by [`since_boot`]: nothing of it was asked earlier.
    #[must_use]
    pub fn checked_at(&self) -> Duration {
        self.checked_at
    }

    /// The lease file's name.
    #[must_use]
    pub fn file(&self) -> FileName {
        self.now().file
    }

    /// The server's clock less this machine's, in seconds: the server's as it dated our lease. `None`: it
    /// reported no date.
    #[must_use]
    pub fn server_ahead_s(&self) -> Option<i64> {
        let now = self.now();
        let server_s = now.clock_is_servers.then(|| now.server_s())?;
        let ours_s = i64::try_from(now_s()).ok()?;
        Some(i64::try_from(server_s).ok()?.saturating_sub(ours_s))
    }

    /// The lease below was not free: its session died, or was never complete.
    #[must_use]
    pub fn took_over(&self) -> bool {
        self.took_over
    }

    /// The lease below belonged to this journal, however that session ended: no other machine has
    /// locked the container in between.
    #[must_use]
    pub fn follows_own(&self) -> bool {
        self.follows_own
    }

    /// Whether writes of an earlier session may still arrive.
    #[must_use]
    pub fn may_arrive(&self) -> bool {
        let now = self.now();
        let over = |predecessor: &Predecessor| {
            predecessor
                .until_s
                .is_some_and(|until| until <= now.server_s())
        };
        !now.content.doors.iter().all(over)
    }

    /// What a helper on the server needs to check by itself that this lease is still ours.
    pub fn fence(&self) -> Result<Fence, LockError> {
        let now = self.now();
        Ok(Fence {
            lock: now.file,
            next: lock_name(&self.container, now.number + 1)?,
            token: now.content.held_word(),
        })
    }

    /// Reads the lease again. [`LockError::Lost`] if it isn't ours any more, [`LockError::NotKept`]
    /// if the server garbled it. Any other error proves nothing about the lease (the connection may
    /// be down): nothing may be sent until a later call returns `Ok`. Such an error is also
    /// returned on an older connection while [`Lock::reacquire`] creates the next lease.
    pub fn verify(&self, store: &dyn Store) -> Result<(), LockError> {
        let before = self.now();
        self.unless_changing(&before, self.read_again(store, &before))
    }

    fn read_again(&self, store: &dyn Store, now: &Current) -> Result<(), LockError> {
        self.check(store, now, || {
            let read = store.read_small(&now.file, Access::ReadWrite, LEASE_BYTES);
            read.map(|(_, bytes)| ((), bytes))
        })
    }

    /// A reconnect creates the next lease on a new connection. On any other connection this looks
    /// like a takeover, so a lease that is lost meanwhile proves nothing.
    fn unless_changing<T>(
        &self,
        before: &Current,
        checked: Result<T, LockError>,
    ) -> Result<T, LockError> {
        let Err(LockError::Lost { reason, .. }) = &checked else {
            return checked;
        };
        let now = self.now();
        let changing = before.pending.is_some() || now.pending.is_some();
        if !changing && now.number == before.number {
            return checked;
        }
        let source = StoreError::Disconnected {
            op: "verify",
            object: before.file.to_string(),
            reason: format!("the lease is being renewed on another connection ({reason})"),
        };
        Err(self.failed("verify", source))
    }

    /// Verifies the lease and rewrites its counter. Call it every [`RENEW_INTERVAL`].
    pub fn renew(&self, store: &dyn Store) -> Result<(), LockError> {
        let _span = tracing::debug_span!("lease", op = "renew").entered();
        let _writing = self.writing();
        let before = self.now();
        // Checked and written through one handle: if the name is given to another file in between,
        // the write goes to the removed one.
        let checked = self.check(store, &before, || {
            let file = store.open(&before.file, Access::ReadWrite)?;
            let mut bytes = vec![0; LEASE_BYTES];
            match file.read_at(0, &mut bytes, ReadClass::Demand) {
                Err(StoreError::Truncated { .. }) => bytes.clear(),
                other => other?,
            }
            Ok((file, bytes))
        });
        let file = self.unless_changing(&before, checked)?;
        let now = {
            let mut now = self.current();
            now.count_renewal();
            now.clone()
        };
        let known = self.journal.known_renewals();
        if known.0 != now.number || now.content.renewed > known.1 + UNRECORDED_RENEWALS_MAX - 1 {
            self.journal.renewals(now.number, now.content.renewed)?;
        }
        file.write_at(0, &now.content.bytes())
            .map_err(|source| self.failed("renew", source))?;
        self.current().answered = now.content.renewed;
        Ok(())
    }

    /// Releases the lease: writes "free" and checks for higher leases. Call it after
    /// [`WriteJournal::all_resolved`], when everything that was sent was answered. Otherwise drop
    /// the lease instead, so that no other machine starts before this host has recovered the
    /// in-doubt writes. [`LockError::Lost`] if a copy of this process or a takeover got in: then
    /// some of this session's writes may be gone, and it owes a late-write list. Returns whether there was no higher lease: then no
    /// other session can have written before the release.
    pub fn release(self, store: &dyn Store) -> Result<bool, LockError> {
        self.write_free(store)
    }

    /// As [`Lock::release`], for a session that may owe a late-write list: that needs the lease.
    pub fn write_free(&self, store: &dyn Store) -> Result<bool, LockError> {
        let _span = tracing::debug_span!("lease", op = "release").entered();
        let _writing = self.writing();
        self.change(|content| content.free = true);
        let now = self.now();
        let next = self.overwrite(store, "release", &now)?;
        self.journal.known_free(now.number)?;
        if next.is_some() {
            self.check_above(store, &now)?;
        }
        Ok(next.is_none())
    }

    /// The check for higher leases alone, where the server refuses the write of
    /// [`Lock::write_free`]. Fails as that does.
    pub fn check_after_session(&self, store: &dyn Store) -> Result<(), LockError> {
        self.check_above(store, &self.now())
    }

    /// Opens the lease ahead, so that [`Lock::release`] takes one round trip. Call it while other
    /// answers are pending.
    pub fn prepare_release(&self, store: &dyn Store) {
        store.prepare_overwrite(&self.file());
    }

    /// Checks whether the leases above ours were created by sessions that began after ours ended.
    fn check_above(&self, store: &dyn Store, now: &Current) -> Result<(), LockError> {
        let failed = |source| self.failed("release", source);
        let (numbers, _) = numbers_in(&self.container, &store.list().map_err(failed)?);
        let mut above: Vec<u64> = numbers.into_iter().filter(|n| *n > now.number).collect();
        // Checked by name, too, as the listing may be old.
        if let Some(next) = now.number.checked_add(1)
            && !above.contains(&next)
        {
            above.push(next);
        }
        for number in above {
            let file = lock_name(&self.container, number)?;
            let Some(seen) = read_if_there(store, number, &file).map_err(failed)? else {
                continue;
            };
            let Some(content) = &seen.content else {
                continue;
            };
            let entered_past_us = |predecessor: &Predecessor| {
                predecessor.number == now.number && predecessor.until_s.is_some()
            };
            if seen.has(self.token) {
                self.has_twin.store(true, Ordering::SeqCst);
            }
            if seen.has(self.token) || content.doors.iter().any(entered_past_us) {
                return Err(self.lost(&format!("{file} is there")));
            }
        }
        Ok(())
    }

    /// Reads the lease `now` with `read`, and checks for a lease that took it over.
    fn check<T>(
        &self,
        store: &dyn Store,
        now: &Current,
        read: impl FnOnce() -> Result<(T, Vec<u8>), StoreError>,
    ) -> Result<T, LockError> {
        // Both at once: on a slow connection every epoch waits for this.
        let (next, ours) = join(|| self.next_is_there(store, now), read);
        if let Some(next) = next? {
            return Err(self.lost(&format!("{next} is there")));
        }
        let (found, bytes) = ours.map_err(|error| match error.kind() {
            StoreErrorKind::NotFound => self.lost(&format!("{} is gone", now.file)),
            StoreErrorKind::NotRegular => self.lost(&format!("{} is no regular file", now.file)),
            _ => self.failed("verify", error),
        })?;
        // Our own renewal may be under way.
        let read_again = || read_if_there(store, now.number, &now.file);
        let mut content = Content::parse(&bytes);
        if content.is_none() {
            let again = read_again().map_err(|source| self.failed("verify", source))?;
            content = again.and_then(|seen| seen.content);
        }
        let Some(content) = content else {
            return Err(self.not_kept(&now.file, false));
        };
        if content.token != now.content.token || content.attempt != now.content.attempt {
            return Err(self.lost(&format!("{} belongs to another session", now.file)));
        }
        if content.free {
            return Err(self.lost(&format!("{} was released", now.file)));
        }
        // Renewals of the next lease must not be compared with this one.
        let asked = {
            let current = self.current();
            (current.number == now.number).then_some(current.content.renewed)
        };
        let counters = (now.answered, asked.unwrap_or(now.content.renewed));
        if !counted(content.renewed, counters) {
            if asked.is_some() {
                self.has_twin.store(true, Ordering::SeqCst);
            }
            return Err(self.lost(&format!(
                "{} was renewed {} times, by this session {} times: either a copy of this process has \
                 the lock, or the server went back to an older state",
                now.file, content.renewed, now.answered
            )));
        }
        Ok(found)
    }

    /// The lease that a takeover would have created: exactly the next number.
    fn next_is_there(
        &self,
        store: &dyn Store,
        now: &Current,
    ) -> Result<Option<FileName>, LockError> {
        let Some(next) = now.number.checked_add(1) else {
            return Ok(None);
        };
        let next = lock_name(&self.container, next)?;
        match store.stat(&next) {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed("verify", source)),
        }
    }

    /// Writes the content of our lease again after the server garbled it, and reads it back: a
    /// server that does this once may do it again.
    fn rewrite(&self, store: &dyn Store) -> Result<(), LockError> {
        let now = self.now();
        for _ in 0..REWRITES_MAX {
            self.overwrite(store, "write", &now)?;
            let seen = read_if_there(store, now.number, &now.file);
            match seen.map_err(|source| self.failed("read", source))? {
                Some(seen) if seen.content.is_some() => return Ok(()),
                _ => {}
            }
        }
        Err(self.not_kept(&now.file, false))
    }

    /// Writes our content, without syncing it, and then checks for the next lease.
    fn overwrite(
        &self,
        store: &dyn Store,
        op: &'static str,
        now: &Current,
    ) -> Result<Option<crate::FileStat>, LockError> {
        let next = lock_name(&self.container, now.number.saturating_add(1))?;
        store
            .overwrite_and_stat(&now.file, &now.content.bytes(), &next)
            .map_err(|error| match error.kind() {
                StoreErrorKind::NotFound => self.lost(&format!("{} is gone", now.file)),
                _ => self.failed(op, error),
            })
    }

    fn change(&self, change: impl FnOnce(&mut Content)) {
        change(&mut self.current().content);
    }

    fn now(&self) -> Current {
        self.current().clone()
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().ignore_poison()
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().ignore_poison()
    }

    fn lost(&self, reason: &str) -> LockError {
        LockError::Lost {
            container: self.container.clone(),
            reason: reason.to_owned(),
        }
    }

    /// `unused`: nothing was sent under a lease yet.
    fn not_kept(&self, file: &FileName, unused: bool) -> LockError {
        LockError::NotKept {
            container: self.container.clone(),
            reason: format!("{file} does not contain what this session wrote"),
            unused,
        }
    }

    fn failed(&self, op: &'static str, source: StoreError) -> LockError {
        LockError::Store {
            op,
            container: self.container.clone(),
            source,
        }
    }
}

impl Current {
    /// Counts one more renewal and drops predecessors whose time is over.
    fn count_renewal(&mut self) {
        self.content.renewed += 1;
        let server_s = self.server_s();
        self.content.drop_past(server_s, self.below);
    }

    /// The server's clock, seconds since the epoch.
    fn server_s(&self) -> u64 {
        let since = since_boot().saturating_sub(self.made_at.1);
        self.made_at.0.saturating_add(since.as_secs())
    }
}

/// Whether a counter was written at least `from` and at most `to` times.
fn counted(renewed: u64, (from, to): (u64, u64)) -> bool {
    (from..=to).contains(&renewed)
}

fn read_if_there(
    store: &dyn Store,
    number: u64,
    file: &FileName,
) -> Result<Option<FoundLease>, StoreError> {
    match read_lease(store, number, file) {
        Ok(seen) => Ok(Some(seen)),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_drops_past_predecessors_but_keeps_the_lease_below() {
        let owner = OwnerNote {
            host: "h".to_owned(),
            version: "v".to_owned(),
        };
        let mut content = Content::new(Token([1; 16]), Token([2; 16]), owner);
        for (number, until_s) in [(6, Some(2000)), (7, Some(5)), (8, Some(5))] {
            content.add_predecessor(Predecessor {
                number,
                until_s,
                all_before: false,
                own: false,
            });
        }
        let mut now = Current {
            number: 9,
            file: FileName::new("x.lock.9").unwrap(),
            content,
            below: Some(8),
            answered: 0,
            pending: None,
            made_at: (1000, since_boot()),
            clock_is_servers: true,
        };
        now.count_renewal();
        // When the session of lease 8 wakes and releases its lease, it finds that it was passed.
        let doors: Vec<u64> = now
            .content
            .doors
            .iter()
            .map(|predecessor| predecessor.number)
            .collect();
        assert_eq!((now.content.renewed, doors), (1, vec![6, 8]));
    }
}
