//! One session per container: the numbered lock files beside it.
//!
//! `NAME.lock.N`, N = 1, 2, …; the highest number is the holder. A lock is taken by exclusive
//! create of N = 1, or of the next number where every present one is provably a dead session of
//! this host: the local record, whose flock we hold, says that we were taking exactly that number
//! with that token. Then the folder is listed again. Of two that take at the same time at least
//! the one that lists last sees the other, so at most one of them goes on.
//!
//! A lock file is one JSON object, padded with blanks to 512 bytes so that a renewal is one
//! write in place that neither grows nor cuts the file.

mod beside;
mod seen;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io};

use beside::beside;
use seen::{Content, LOCK_BYTES, Seen, lock_name, look, look_for};

use crate::record::Token;
use crate::{Access, Fence, FileName, LocalRecord, ReadClass, Store, StoreError, StoreErrorKind};

/// How often a holder renews its lock.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(10);

/// Who takes a lock. The server learns no host name from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerNote {
    /// A random id of this host, kept in the state folder; at most 64 characters count.
    pub host: String,
    /// sprat's version; at most 64 characters count.
    pub version: String,
}

/// What the highest lock file of a container says. Everything in it is the server's word; texts
/// are escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockInfo {
    /// The number in the lock file's name.
    pub number: u64,
    /// The lock file.
    pub file: FileName,
    /// Random hex; `None` where the file is empty or not readable as a lock.
    pub token: Option<String>,
    /// The random id of the host that took it.
    pub host: String,
    /// sprat's version there.
    pub version: String,
    /// When it was taken, seconds since the epoch by the owner's clock.
    pub started_s: u64,
    /// How often it was renewed.
    pub renewed: u64,
    /// Last change of the file by the server's clock, seconds since the epoch.
    pub modified_s: Option<u64>,
}

impl LockInfo {
    /// Whether a dead session of `record` left this lock: only then does the record's flock, which
    /// the caller holds, prove anything. The same host may hold it under another record.
    #[must_use]
    pub fn is_left_by(&self, record: &LocalRecord) -> bool {
        record.takings().iter().any(|(number, token)| {
            let token = token.to_string();
            *number == self.number && self.token.as_ref().is_none_or(|found| *found == token)
        })
    }
}

/// What [`break_lock`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The lock that was removed; `None` where there was none.
    pub lock: Option<LockInfo>,
    /// It had been renewed while watched, and was removed all the same.
    pub was_renewed: bool,
}

/// A lock could not be taken, kept or broken.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum LockError {
    /// A living process on this host has the container open.
    #[error("another process on this host has container {container_id} open")]
    HeldHere { container_id: String },
    /// Another session holds the lock, or one that can't be shown to be dead.
    #[error("container {container} is locked by {info}")]
    HeldElsewhere {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// The lock is no longer ours; nothing may be sent any more.
    #[error("the lock on container {container} was lost: {reason}")]
    Lost { container: FileName, reason: String },
    /// Another session took the lock while this one, which only reads and so has none, had it open.
    #[error("another session locked container {container} while this one was reading it: {info}")]
    TakenMeanwhile {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// Another session wrote while this one, which only reads and so has no lock, had it open.
    #[error("another session wrote to container {container} while this one was reading it")]
    Disturbed { container: FileName },
    /// The lock was renewed while it was watched: its owner lives.
    #[error("the lock on container {container} was renewed while watched, its owner lives: {info}")]
    Renewed {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// A name that no lock or record can be about.
    #[error("{op}: {reason}")]
    Invalid { op: &'static str, reason: String },
    /// The local record could not be read or written.
    #[error("{op} local record {}", path.display())]
    Record {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The store failed.
    #[error("{op} the lock on container {container}")]
    Store {
        op: &'static str,
        container: FileName,
        #[source]
        source: StoreError,
    },
}

/// The lock on a container, ours. Dropping it without [`Lock::release`] leaves the file, as a
/// kill does; the next session of this host takes it over.
#[derive(Debug)]
pub struct Lock {
    container: FileName,
    file: FileName,
    number: u64,
    token: Token,
    content: Mutex<Content>,
    #[expect(dead_code, reason = "held, not read")]
    busy: LockBusy,
    record: LocalRecord,
}

/// The locks that were there before one is taken.
#[derive(Debug)]
pub struct FirstLook {
    container: FileName,
    seen: Vec<Seen>,
}

/// A record carries one lock at a time: a second one would find the first in the record and take
/// it for dead.
#[derive(Debug)]
struct LockBusy(LocalRecord);

impl LockBusy {
    fn begin(record: &LocalRecord, container: &FileName) -> Result<Self, LockError> {
        if record.begin_lock() {
            return Ok(Self(record.clone()));
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
    /// Takes the lock, taking over any whose holder provably died on this host. Keeps a clone of
    /// `record`, and with it the flock.
    ///
    /// After `Store` with a lost connection the lock may have been made; the record knows, and
    /// the next try takes it over.
    pub fn acquire(
        store: &dyn Store,
        container: &FileName,
        record: &LocalRecord,
        owner: OwnerNote,
    ) -> Result<Self, LockError> {
        let first = Self::first_look(store, container)?;
        Self::acquire_after(first, store, record, owner, || {})
    }

    /// Looks which locks there are, for [`acquire_after`](Self::acquire_after).
    pub fn first_look(store: &dyn Store, container: &FileName) -> Result<FirstLook, LockError> {
        Ok(FirstLook {
            container: container.clone(),
            seen: look(store, container)?,
        })
    }

    /// As [`acquire`](Self::acquire), after a first look a moment ago: whatever has changed since
    /// shows in the second one. Calls `meanwhile` once the lock's file is made, while the second look is under
    /// way. What it read of the container counts only if the lock is ours at the end: then nobody
    /// else could write since.
    pub fn acquire_after(
        first: FirstLook,
        store: &dyn Store,
        record: &LocalRecord,
        owner: OwnerNote,
        meanwhile: impl FnOnce() + Send,
    ) -> Result<Self, LockError> {
        let FirstLook {
            container,
            seen: dead,
        } = first;
        let container = &container;
        let busy = LockBusy::begin(record, container)?;
        let takings = record.takings();
        if let Some(alive) = dead.iter().rev().find(|seen| !seen.is_ours(&takings)) {
            return Err(alive.held(container));
        }
        let number = dead
            .last()
            .map_or(Some(1), |highest| highest.number.checked_add(1));
        let number = number.ok_or_else(|| dead[dead.len() - 1].held(container))?;
        let token = Token::random()?;
        let lock = Self {
            container: container.clone(),
            file: lock_name(container, number)?,
            number,
            token,
            content: Mutex::new(Content::new(token, owner)),
            busy,
            record: record.clone(),
        };
        record.taking(number, token)?;
        let filled = match store.create_filled(&lock.file, &lock.bytes()) {
            Ok(filled) => filled.map_err(|source| lock.failed("take", source)),
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                record.not_taken(number, token)?;
                return Err(lock.held_by_other(store, Some(number)));
            }
            // It may have been made all the same, so the record stays.
            Err(source) => return Err(lock.failed("take", source)),
        };
        let settled = filled.and_then(|()| {
            let ((), settled) = beside(meanwhile, || lock.settle(store, &dead));
            settled
        });
        match settled {
            Ok(()) => Ok(lock),
            Err(error) => {
                // Where even that fails the record stays, and the next try takes it over.
                let _ = lock.withdraw(store);
                Err(error)
            }
        }
    }

    /// Sees to it that nobody else took at the same time: looks again, after our file was made.
    fn settle(&self, store: &dyn Store, dead: &[Seen]) -> Result<(), LockError> {
        let failed = |source| self.failed("take", source);
        let now = look_for(store, &self.container, Some(self.number))?;
        let (ours, others): (Vec<Seen>, Vec<Seen>) =
            now.into_iter().partition(|seen| seen.number == self.number);
        let same = others.len() == dead.len()
            && others
                .iter()
                .zip(dead)
                .all(|(now, then)| now.same_owner(then));
        if !same || ours.is_empty() || !ours.iter().all(|seen| seen.has(self.token)) {
            return Err(self.held_by_other(store, None));
        }
        for seen in dead {
            match store.remove(&seen.file) {
                Err(error) if error.kind() != StoreErrorKind::NotFound => {
                    return Err(failed(error));
                }
                _ => {}
            }
        }
        if !dead.is_empty() {
            store.flush_folder().map_err(failed)?;
        }
        for (number, token) in self.record.takings() {
            if (number, token) != (self.number, self.token) {
                self.record.not_taken(number, token)?;
            }
        }
        Ok(())
    }

    /// Takes a file back that we made and that did not become the lock.
    fn withdraw(&self, store: &dyn Store) -> Result<(), LockError> {
        let ours = |seen: &Seen| {
            seen.number == self.number && (seen.content.is_none() || seen.has(self.token))
        };
        if look(store, &self.container)?.iter().any(ours) {
            store
                .remove(&self.file)
                .map_err(|source| self.failed("withdraw", source))?;
        }
        self.record.not_taken(self.number, self.token)
    }

    /// The error that says who was faster. `number` is the one to name, else the highest other.
    fn held_by_other(&self, store: &dyn Store, number: Option<u64>) -> LockError {
        match look(store, &self.container) {
            Ok(seen) => {
                let other = seen.iter().rev().find(|seen| {
                    number.map_or(!seen.has(self.token), |number| seen.number == number)
                });
                let gone = Seen {
                    number: self.number,
                    file: self.file.clone(),
                    content: None,
                    empty: true,
                    modified_s: None,
                };
                other.unwrap_or(&gone).held(&self.container)
            }
            Err(error) => error,
        }
    }

    /// The number in the lock file's name.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The lock file's name.
    #[must_use]
    pub fn file(&self) -> &FileName {
        &self.file
    }

    /// What a helper on the server can tell by itself that this lock is still ours.
    pub fn fence(&self) -> Result<Fence, LockError> {
        Ok(Fence {
            lock: self.file.clone(),
            next: lock_name(&self.container, self.number + 1)?,
            token: self.token.to_string(),
        })
    }

    /// Reads the lock again; [`LockError::Lost`] if it isn't ours any more. Any other error tells
    /// nothing about the lock (the line may be down): nothing may be sent until a later call
    /// returns `Ok`.
    pub fn verify(&self, store: &dyn Store) -> Result<(), LockError> {
        self.check(store, || {
            let read = store.read_small(&self.file, Access::ReadWrite, LOCK_BYTES);
            read.map(|(_, bytes)| ((), bytes))
        })
    }

    /// Verifies and rewrites the counter; to be called every [`RENEW_INTERVAL`].
    pub fn renew(&self, store: &dyn Store) -> Result<(), LockError> {
        // Checked and written through one handle: should the name be given to another lock in
        // between, the write reaches the removed file.
        let file = self.check(store, || {
            let file = store.open(&self.file, Access::ReadWrite)?;
            let mut bytes = vec![0; LOCK_BYTES];
            match file.read_at(0, &mut bytes, ReadClass::Demand) {
                Err(StoreError::Truncated { .. }) => bytes.clear(),
                other => other?,
            }
            Ok((file, bytes))
        })?;
        {
            let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
            content.renewed += 1;
        }
        file.write_at(0, &self.bytes())
            .map_err(|source| self.failed("renew", source))
    }

    /// Gives the lock back. Call it after [`LocalRecord::all_settled`]; where that was not
    /// possible drop the lock instead, so that nobody else starts before the suspects are dealt
    /// with on this host.
    pub fn release(self, store: &dyn Store) -> Result<(), LockError> {
        match self.verify(store) {
            Ok(()) => self.release_verified(store),
            Err(error @ LockError::Lost { .. }) => {
                self.record.not_taken(self.number, self.token)?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The same for a caller who has called [`Lock::verify`] a moment ago.
    pub fn release_verified(self, store: &dyn Store) -> Result<(), LockError> {
        let failed = |source| self.failed("release", source);
        let removed = store.remove_durably(&self.file).map_err(failed)?;
        removed.map_err(failed)?;
        self.record.not_taken(self.number, self.token)
    }

    /// Reads the lock with `read`, and looks for one that took it over.
    fn check<T>(
        &self,
        store: &dyn Store,
        read: impl FnOnce() -> Result<(T, Vec<u8>), StoreError>,
    ) -> Result<T, LockError> {
        // Both at once: on a slow line this lies before every epoch.
        let (next, ours) = beside(|| self.next_is_there(store), read);
        if let Some(next) = next? {
            return Err(self.lost(format!("{next} is there")));
        }
        let (found, bytes) = ours.map_err(|error| match error.kind() {
            StoreErrorKind::NotFound => self.lost(format!("{} is gone", self.file)),
            StoreErrorKind::NotRegular => self.lost(format!("{} is no regular file", self.file)),
            _ => self.failed("verify", error),
        })?;
        if bytes.len() < LOCK_BYTES {
            return Err(self.lost(format!("{} was cut", self.file)));
        }
        match Content::parse(&bytes) {
            Some(content) if content.token == self.token.to_string() => Ok(found),
            _ => Err(self.lost(format!("{} is another's", self.file))),
        }
    }

    /// The lock that a takeover would have made: exactly the next number.
    fn next_is_there(&self, store: &dyn Store) -> Result<Option<FileName>, LockError> {
        let Some(next) = self.number.checked_add(1) else {
            return Ok(None);
        };
        let next = lock_name(&self.container, next)?;
        match store.stat(&next) {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed("verify", source)),
        }
    }

    fn lost(&self, reason: String) -> LockError {
        LockError::Lost {
            container: self.container.clone(),
            reason,
        }
    }

    fn bytes(&self) -> [u8; LOCK_BYTES] {
        self.content
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes()
    }

    fn failed(&self, op: &'static str, source: StoreError) -> LockError {
        LockError::Store {
            op,
            container: self.container.clone(),
            source,
        }
    }
}

/// What the highest lock says; `None` where the container is not locked.
pub fn inspect(store: &dyn Store, container: &FileName) -> Result<Option<LockInfo>, LockError> {
    Ok(look(store, container)?.last().map(Seen::info))
}

/// Removes the container's lock after having watched it for `watch` (two [`RENEW_INTERVAL`]s at
/// least are wise); one that was renewed meanwhile is [`LockError::Renewed`] unless `force`. The
/// next session finds no lock, and none of the old one's record unless it is on that host: make
/// sure that the old session's server process is gone.
pub fn break_lock(
    store: &dyn Store,
    container: &FileName,
    force: bool,
    watch: Duration,
) -> Result<Broken, LockError> {
    let begun = Instant::now();
    let info = |seen: &[Seen]| seen.last().map(Seen::info);
    let mut seen = look(store, container)?;
    let before = info(&seen);
    let mut was_renewed = false;
    while !seen.is_empty() {
        let left = watch.saturating_sub(begun.elapsed());
        std::thread::sleep(left.min(Duration::from_secs(1)));
        // What is removed below is what was seen here, not what may have come since.
        seen = look(store, container)?;
        let Some(now) = info(&seen) else { break };
        if before.as_ref() != Some(&now) {
            was_renewed = true;
            if !force {
                return Err(LockError::Renewed {
                    container: container.clone(),
                    info: Box::new(now),
                });
            }
            break;
        }
        if left.is_zero() {
            break;
        }
    }
    let lock = info(&seen);
    let failed = |source| LockError::Store {
        op: "break",
        container: container.clone(),
        source,
    };
    // The highest last: it keeps others out until the end.
    for seen in &seen {
        match store.remove(&seen.file) {
            Err(error) if error.kind() != StoreErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    if !seen.is_empty() {
        store.flush_folder().map_err(failed)?;
    }
    Ok(Broken { lock, was_renewed })
}

impl Token {
    fn random() -> Result<Self, LockError> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            match rustix::rand::getrandom(&mut bytes[filled..], flags) {
                Ok(more) => filled += more,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    return Err(LockError::Invalid {
                        op: "make a token",
                        reason: errno.to_string(),
                    });
                }
            }
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for LockInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.token.is_none() {
            return write!(f, " (which says nothing of its owner)");
        }
        write!(f, " of host {}, renewed {} times", self.host, self.renewed)
    }
}
