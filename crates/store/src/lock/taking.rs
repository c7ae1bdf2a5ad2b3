//! Takes a lease: a first look, the next number, and a second look by names.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::content::{Content, DOOR_S, Door, FIRST_NUMBER};
use super::seen::{Folder, Seen, lists_in, lock_name, look, numbers_in, read_lease};
use super::{Current, Lock, LockBusy, LockError, OwnerNote, read_if_there};
use crate::beside::beside;
use crate::clock::{now_s, since_boot};
use crate::token::Token;
use crate::{FileName, LocalRecord, Store, StoreErrorKind};

/// A lease that was made and not filled is stepped over when it is found empty again after this
/// time: its maker died, or finds the next number when it wakes.
pub const EMPTY_WAIT: Duration = Duration::from_secs(30);

/// The leases that were there before one is taken.
#[derive(Debug)]
pub struct FirstLook {
    container: FileName,
    folder: Folder,
    /// The highest lease, which is empty, and since when we know.
    empty: Option<(u64, Duration)>,
}

/// Why the lease below the new one may be passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Via {
    /// There is none.
    Start,
    /// Its session gave it back.
    Free,
    /// Its session is a dead one of this record.
    Own,
    /// Its maker never filled it.
    Empty,
    /// Somebody asked for it.
    Unlock,
}

impl FirstLook {
    /// How long to wait before [`FirstLook::again`] where the highest lease is empty and not one of
    /// `record`: `patience` from when it was first seen. `None` where there is nothing to wait for.
    #[must_use]
    pub fn wait_for_empty(&self, record: &LocalRecord, patience: Duration) -> Option<Duration> {
        let highest = self.folder.highest()?;
        let (number, since) = self.empty?;
        let ours = highest.is_ours(&record.takings(), record.known_renewals());
        if !highest.empty || highest.number != number || ours {
            return None;
        }
        let left = (since + patience).checked_sub(since_boot())?;
        (!left.is_zero()).then_some(left)
    }

    /// Looks again, and remembers which lease was empty before.
    pub fn again(self, store: &dyn Store) -> Result<Self, LockError> {
        let folder = look(store, &self.container, None)?;
        let mut now = Self::of(self.container, folder);
        if let (Some((before, since)), Some((number, _))) = (self.empty, now.empty)
            && before == number
        {
            now.empty = Some((number, since));
        }
        Ok(now)
    }

    fn of(container: FileName, folder: Folder) -> Self {
        let highest = folder.highest();
        let empty = highest.filter(|seen| seen.empty);
        Self {
            empty: empty.map(|seen| (seen.number, since_boot())),
            container,
            folder,
        }
    }

    /// What the next lease begins with, and why it may be made. `on_purpose`: also behind a lease
    /// that is held.
    fn enter(
        &self,
        record: &LocalRecord,
        on_purpose: bool,
        content: &mut Content,
    ) -> Result<Via, LockError> {
        let Some(highest) = self.folder.highest() else {
            return Ok(Via::Start);
        };
        let (takings, renewals) = (record.takings(), record.known_renewals());
        // By our clock until the server's is known: a moment later.
        let over = now_s().max(highest.modified_s.unwrap_or(0)) + DOOR_S;
        let open = |number, until_s: Option<u64>| Door {
            number,
            until_s,
            all_before: false,
            // Only a door of this machine's own dead session has a time at once.
            own: until_s.is_some(),
        };
        let via = if highest.is_free() {
            Via::Free
        } else if highest.is_ours(&takings, renewals) && highest.empty {
            Via::Empty
        } else if highest.is_ours(&takings, renewals) {
            content.add_door(open(highest.number, Some(over)));
            Via::Own
        } else if highest.empty && (on_purpose || self.was_empty_long(highest.number)) {
            Via::Empty
        } else if on_purpose {
            content.add_door(open(highest.number, None));
            Via::Unlock
        } else {
            return Err(highest.held(&self.container));
        };
        let said = match via {
            // What counts is the one below.
            Via::Empty => self.folder.below(),
            _ => Some(highest),
        };
        if let Some(said) = said.and_then(|seen| seen.content.as_ref()) {
            content.inherit(&said.doors, &said.watch);
        }
        if let (Via::Empty, Some(below)) = (via, said)
            && !below.is_free()
        {
            if !below.is_ours(&takings, renewals) && !on_purpose {
                return Err(below.held(&self.container));
            }
            let ours = below.is_ours(&takings, renewals);
            content.add_door(open(below.number, ours.then_some(over)));
        }
        if content.has_open_door() && !on_purpose {
            return Err(LockError::Waiting {
                container: self.container.clone(),
                info: Box::new(highest.info()),
            });
        }
        if via == Via::Empty {
            // Until the second look: whoever takes over in between must know of it.
            content.add_door(open(highest.number, None));
        }
        Ok(via)
    }

    fn was_empty_long(&self, number: u64) -> bool {
        self.empty.is_some_and(|(empty, since)| {
            empty == number && since_boot().saturating_sub(since) >= EMPTY_WAIT_LEAST
        })
    }
}

/// However little patience a caller has, two looks at an empty lease are that far apart.
const EMPTY_WAIT_LEAST: Duration = Duration::from_millis(200);

impl Lock {
    /// Takes the lease, taking over any whose holder provably died on this host. Keeps a clone of
    /// `record`, and with it the flock.
    ///
    /// After `Store` with a lost connection the lease may have been made; the record knows, and
    /// the next try takes it over.
    pub fn acquire(
        store: &dyn Store,
        container: &FileName,
        record: &LocalRecord,
        owner: OwnerNote,
    ) -> Result<Self, LockError> {
        let first = Self::first_look(store, container, record)?;
        Self::acquire_after(&first, store, record, owner, || {})
    }

    /// Looks which leases there are, for [`acquire_after`](Self::acquire_after).
    pub fn first_look(
        store: &dyn Store,
        container: &FileName,
        record: &LocalRecord,
    ) -> Result<FirstLook, LockError> {
        let folder = look(store, container, hint(record))?;
        Ok(FirstLook::of(container.clone(), folder))
    }

    /// As [`acquire`](Self::acquire), after a first look a moment ago: whatever has changed since
    /// shows in the second one. Calls `meanwhile` once the lease's file is made, while the second
    /// look is under way. What it read of the container counts only if the lease is ours at the
    /// end, and [`Lock::may_arrive`] says no: then nobody else could write since.
    pub fn acquire_after(
        first: &FirstLook,
        store: &dyn Store,
        record: &LocalRecord,
        owner: OwnerNote,
        meanwhile: impl FnOnce() + Send,
    ) -> Result<Self, LockError> {
        let _span = tracing::debug_span!("lease", op = "acquire").entered();
        Self::make(first, store, record, owner, false, meanwhile)
    }

    /// Makes the next lease behind whatever is there, also behind one that is held: that session
    /// stops at its next look. What it sent may still arrive: it is a door, and as long as one is
    /// open nothing may be written under this lease. See [`Lock::open_doors`].
    pub fn take_over(
        store: &dyn Store,
        container: &FileName,
        record: &LocalRecord,
        owner: OwnerNote,
    ) -> Result<Self, LockError> {
        let first = Self::first_look(store, container, record)?;
        Self::make(&first, store, record, owner, true, || {})
    }

    fn make(
        first: &FirstLook,
        store: &dyn Store,
        record: &LocalRecord,
        owner: OwnerNote,
        on_purpose: bool,
        meanwhile: impl FnOnce() + Send,
    ) -> Result<Self, LockError> {
        let container = &first.container;
        let busy = LockBusy::begin(record, container)?;
        let takings = record.takings();
        let token = Token::random()?;
        let mut content = Content::new(token, Token::random()?, owner);
        let via = first.enter(record, on_purpose, &mut content)?;
        let below = first.folder.highest();
        if let Some(free) = below.filter(|seen| seen.is_free()) {
            record.known_free(free.number)?;
        }
        let number = match below {
            Some(below) => below
                .number
                .checked_add(1)
                .map(|next| next.max(FIRST_NUMBER)),
            None => Some(FIRST_NUMBER),
        };
        let Some(number) = number else {
            return Err(LockError::Invalid {
                op: "number a lease",
                reason: "there is none left".to_owned(),
            });
        };
        let lock = Self {
            container: container.clone(),
            token,
            current: Mutex::new(Current {
                number,
                file: lock_name(container, number)?,
                content,
                predecessor: below.map(|below| below.number),
                answered: 0,
                pending: None,
                made_at: (now_s(), since_boot()),
            }),
            writing: Mutex::new(()),
            took_over: via != Via::Start && via != Via::Free,
            follows_own: below.is_some_and(|seen| seen.is_of(&takings)),
            lists: Mutex::default(),
            has_twin: AtomicBool::new(false),
            busy,
            record: record.clone(),
        };
        record.taking(number, token)?;
        let now = lock.now();
        let filled = match store.create_filled(&now.file, &now.content.bytes()) {
            Ok(filled) => filled
                .durable()
                .map_err(|source| lock.failed("take", source)),
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                record.not_taken(number, token)?;
                return Err(lock.held_by_other(store));
            }
            // It may have been made all the same, so the record stays.
            Err(source) => return Err(lock.failed("take", source)),
        };
        if let Err(error) = filled {
            lock.undo_unfilled(store, &error);
            return Err(error);
        }
        let settle = || lock.settle(store, via, on_purpose, &first.folder);
        let ((), settled) = beside(meanwhile, settle);
        match settled {
            Ok(()) => {
                store.set_witness(&lock.file());
                Ok(lock)
            }
            Err(error) => {
                // Where even that fails the record stays, and the next try takes it over.
                let withdrawn = lock.withdraw(store);
                if withdrawn.is_ok() && matches!(error, LockError::NotKept { .. }) {
                    let _ = lock.rewrite(store);
                }
                Err(error)
            }
        }
    }

    /// A file that was made and could not be filled (full disk). An empty lease holds others up, so
    /// it is removed, if it is empty and the last. This is the one case in which the highest lease
    /// is removed, and it was never one: whoever stepped over it finds it gone at the second look.
    fn undo_unfilled(&self, store: &dyn Store, error: &LockError) {
        let answered = matches!(error, LockError::Store { source, .. } if source.was_answered());
        if !answered || self.withdraw(store).is_ok() {
            return;
        }
        self.remove_unfilled(store, &self.now());
    }

    /// Removes a lease of ours that is empty and the last. True if it is gone.
    pub(super) fn remove_unfilled(&self, store: &dyn Store, lease: &Current) -> bool {
        let is_empty = read_lease(store, lease.number, &lease.file).is_ok_and(|seen| seen.empty);
        if !is_empty || !matches!(self.next_is_there(store, lease), Ok(None)) {
            return false;
        }
        let removed = store.remove(&lease.file).is_ok();
        if removed {
            let _ = self.record.not_taken(lease.number, self.token);
        }
        removed
    }

    /// The second look, after our file was made: by names, and not by the listing alone.
    fn settle(
        &self,
        store: &dyn Store,
        via: Via,
        on_purpose: bool,
        first: &Folder,
    ) -> Result<(), LockError> {
        let now = self.now();
        let failed = |source| self.failed("take", source);
        let read_below = || match now.predecessor {
            Some(number) => {
                let file = lock_name(&self.container, number)?;
                read_if_there(store, number, &file).map_err(failed)
            }
            None => Ok(None),
        };
        let read_ours = || read_if_there(store, now.number, &now.file).map_err(failed);
        let (ours, (below, (next, names))) = beside(read_ours, || {
            beside(read_below, || {
                beside(
                    || self.next_is_there(store, &now),
                    || store.list().map_err(failed),
                )
            })
        });
        let (below, ours, next) = (below?, ours?, next?);
        let names = names?;
        let (numbers, old) = numbers_in(&self.container, &names);
        self.found_lists(lists_in(&self.container, &names));
        let is_ours = ours
            .as_ref()
            .and_then(|seen| seen.content.as_ref())
            .is_some_and(|found| found.attempt == now.content.attempt && !found.free);
        if is_ours && numbers.last().is_none_or(|last| *last < now.number) {
            return Err(LockError::Unlisted { file: now.file });
        }
        let new_old = old.iter().any(|number| !first.old.contains(number));
        let alone = numbers.last() == Some(&now.number) && next.is_none() && !new_old;
        // Nobody else writes into a file that we made, so nobody else is to blame.
        if alone && ours.as_ref().is_some_and(|seen| seen.content.is_none()) {
            return Err(self.not_kept(&now.file, true));
        }
        let below_gone = now.predecessor.is_some() && below.is_none();
        if !is_ours || !alone || below_gone {
            return Err(self.held_by_other(store));
        }
        self.note_clock(ours.as_ref());
        let said = below.as_ref().and_then(|seen| seen.content.as_ref());
        match via {
            Via::Empty if below.as_ref().is_none_or(|seen| !seen.empty) => {
                // It was filled meanwhile: somebody may hold it.
                self.change(|content| inherit(content, said));
                return Err(self.held_by_other(store));
            }
            Via::Free if !below.as_ref().is_some_and(Seen::is_free) => {
                let number = now.predecessor.unwrap_or(0);
                self.change(|content| {
                    inherit(content, said);
                    content.add_door(Door {
                        number,
                        until_s: None,
                        all_before: false,
                        own: false,
                    });
                });
                return Err(self.held_by_other(store));
            }
            _ => self.change(|content| inherit(content, said)),
        }
        let passed = |door: &Door| via == Via::Empty && Some(door.number) == now.predecessor;
        let is_open = |door: &Door| door.until_s.is_none() && !passed(door);
        if let (false, Some(below)) = (on_purpose, &below)
            && self.now().content.doors.iter().any(is_open)
        {
            // The first look did not show it.
            return Err(LockError::Waiting {
                container: self.container.clone(),
                info: Box::new(below.info()),
            });
        }
        self.record.taken(now.number)?;
        self.end_old_locks(store, &old)?;
        if via == Via::Empty {
            let number = now.predecessor;
            self.change(|content| content.doors.retain(|door| Some(door.number) != number));
            self.confirm(store)?;
        }
        Ok(())
    }

    /// A session of sprat up to 0.x finds its lock lost when it is gone, or another one follows it.
    fn end_old_locks(&self, store: &dyn Store, old: &[u64]) -> Result<(), LockError> {
        let failed = |source| self.failed("take", source);
        let Some(highest) = old.last() else {
            return Ok(());
        };
        for number in old {
            match store.remove(&lock_name(&self.container, *number)?) {
                Ok(()) => {}
                Err(error) if error.kind() == StoreErrorKind::NotFound => {}
                Err(error) if error.kind() == StoreErrorKind::PermissionDenied => {
                    let follows = lock_name(&self.container, highest.saturating_add(1))?;
                    match store.create_new(&follows) {
                        Ok(_) => break,
                        Err(error) if error.kind() == StoreErrorKind::AlreadyExists => break,
                        Err(error) => return Err(failed(error)),
                    }
                }
                Err(error) => return Err(failed(error)),
            }
        }
        match store.flush_folder() {
            Err(error) if error.kind() == StoreErrorKind::Unsupported => Ok(()),
            other => other.map_err(failed),
        }
    }

    /// Writes "free" into a file that we made and that did not become the lease. It is never
    /// removed, and never hides what is below it: its doors stay.
    fn withdraw(&self, store: &dyn Store) -> Result<(), LockError> {
        self.change(|content| content.free = true);
        let now = self.now();
        self.overwrite(store, "withdraw", &now)?;
        self.record.known_free(now.number)
    }

    /// The error that says who was faster.
    fn held_by_other(&self, store: &dyn Store) -> LockError {
        let number = self.now().number;
        match look(store, &self.container, None) {
            Ok(folder) => {
                let other = |seen: &&Seen| !seen.has(self.token) && !seen.is_free();
                let gone = Seen {
                    number,
                    file: self.now().file,
                    content: None,
                    empty: true,
                    modified_s: None,
                };
                let other = folder.read.iter().find(other);
                other.unwrap_or(&gone).held(&self.container)
            }
            Err(error) => error,
        }
    }

    pub(super) fn note_clock(&self, ours: Option<&Seen>) {
        let Some(modified_s) = ours.and_then(|seen| seen.modified_s) else {
            return;
        };
        let mut now = self.current();
        let ahead = now.made_at.0;
        now.made_at = (modified_s, since_boot());
        // Times that were set by our clock, until the server's was known.
        let number = now.predecessor;
        for door in &mut now.content.doors {
            if Some(door.number) == number
                && let Some(until) = &mut door.until_s
                && *until >= ahead
            {
                *until = modified_s + DOOR_S;
            }
        }
    }
}

fn inherit(content: &mut Content, below: Option<&Content>) {
    if let Some(below) = below {
        content.inherit(&below.doors, &below.watch);
    }
}

/// The lease that is probably the highest: the last one of this machine.
pub(super) fn hint(record: &LocalRecord) -> Option<u64> {
    let taken = record.takings().iter().map(|(number, _)| *number).max();
    let known = taken.unwrap_or(0).max(record.highest_free());
    (known >= FIRST_NUMBER).then_some(known)
}
