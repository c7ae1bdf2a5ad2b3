//! Acquires a lease: a first check of the leases, the next number, and a second check by names.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::content::{Content, FIRST_NUMBER, LATE_WRITE_S, Predecessor};
use super::lease::{
    Folder, FoundLease, late_lists_in, lock_name, numbers_in, read_folder, read_lease,
};
use super::{Current, Lock, LockBusy, LockError, OwnerNote, read_if_there};
use crate::clock::{now_s, since_boot};
use crate::join::join;
use crate::token::Token;
use crate::{Access, FileName, Question, Store, StoreErrorKind, WriteJournal};

/// A lease that was created and not filled is skipped if it is still empty after this time: its
/// creator died, or will find the next number when it wakes.
pub const EMPTY_WAIT: Duration = Duration::from_secs(30);

/// The leases that exist before one is acquired.
#[derive(Debug)]
pub struct LeaseCheck {
    container: FileName,
    folder: Folder,
    /// The highest lease, if it is empty, and when it was first seen so.
    empty: Option<(u64, Duration)>,
}

/// Why the lease below the new one may be passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Via {
    /// There is none.
    Start,
    /// Its session released it.
    Free,
    /// It belongs to a dead session of this journal.
    Own,
    /// Its creator never filled it.
    Empty,
    /// A user asked to take over.
    Unlock,
}

impl LeaseCheck {
    /// How long to wait before [`LeaseCheck::again`] if the highest lease is empty and not one of
    /// `journal`: `patience` from when it was first seen. `None` if there is nothing to wait for.
    #[must_use]
    pub fn wait_for_empty(&self, journal: &WriteJournal, patience: Duration) -> Option<Duration> {
        let highest = self.folder.highest()?;
        let (number, since) = self.empty?;
        let ours = highest.is_ours(&journal.acquisitions(), journal.known_renewals());
        if !highest.empty || highest.number != number || ours {
            return None;
        }
        let left = (since + patience).checked_sub(since_boot())?;
        (!left.is_zero()).then_some(left)
    }

    /// Checks again, and remembers which lease was empty before.
    pub fn again(self, store: &dyn Store) -> Result<Self, LockError> {
        let folder = read_folder(store, &self.container, None)?;
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

    /// Fills in the first content of the next lease, and returns why it may be created.
    /// `on_purpose`: also behind a lease that is in use.
    fn enter(
        &self,
        journal: &WriteJournal,
        on_purpose: bool,
        content: &mut Content,
    ) -> Result<Via, LockError> {
        let Some(highest) = self.folder.highest() else {
            return Ok(Via::Start);
        };
        let (acquisitions, renewals) = (journal.acquisitions(), journal.known_renewals());
        // By our clock until the server's is known, a moment later.
        let over = now_s().max(highest.modified_s.unwrap_or(0)) + LATE_WRITE_S;
        let open = |number, until_s: Option<u64>| Predecessor {
            number,
            until_s,
            all_before: false,
            // Only a predecessor that died on this machine gets an end time at once. Of one that may live its journal
            // does not say what it wrote.
            own: until_s.is_some() && !journal.may_live(),
        };
        let via = if highest.is_free() {
            Via::Free
        } else if highest.is_ours(&acquisitions, renewals) && highest.empty {
            Via::Empty
        } else if highest.is_ours(&acquisitions, renewals) {
            // What may arrive of sessions before it, its doors say.
            if !journal.is_quiet() || journal.may_live() {
                content.add_predecessor(open(highest.number, Some(over)));
            }
            Via::Own
        } else if highest.empty && (on_purpose || self.was_empty_long(highest.number)) {
            Via::Empty
        } else if on_purpose {
            content.add_predecessor(open(highest.number, None));
            Via::Unlock
        } else {
            return Err(highest.held(&self.container));
        };
        let said = match via {
            // The lease below the empty one decides.
            Via::Empty => self.folder.below(),
            _ => Some(highest),
        };
        if let Some(said) = said.and_then(|seen| seen.content.as_ref()) {
            content.inherit(&said.doors, &said.watch);
        }
        if let (Via::Empty, Some(below)) = (via, said)
            && !below.is_free()
        {
            if !below.is_ours(&acquisitions, renewals) && !on_purpose {
                return Err(below.held(&self.container));
            }
            let ours = below.is_ours(&acquisitions, renewals);
            content.add_predecessor(open(below.number, ours.then_some(over)));
        }
        if content.has_open_predecessor() && !on_purpose {
            return Err(LockError::Waiting {
                container: self.container.clone(),
                info: Box::new(highest.info()),
            });
        }
        if via == Via::Empty {
            // Until the second check: a session that takes over in between must know of it.
            content.add_predecessor(open(highest.number, None));
        }
        Ok(via)
    }

    fn was_empty_long(&self, number: u64) -> bool {
        self.empty.is_some_and(|(empty, since)| {
            empty == number && since_boot().saturating_sub(since) >= EMPTY_WAIT_LEAST
        })
    }
}

/// Two checks of an empty lease are at least this far apart, however little patience a caller has.
const EMPTY_WAIT_LEAST: Duration = Duration::from_millis(200);

impl Lock {
    /// Acquires the lease. Takes over any lease whose owner provably died on this host. Keeps a
    /// clone of `journal`, and with it the flock.
    ///
    /// After a `Store` error with a lost connection the lease may exist all the same. The journal
    /// has it, and the next attempt takes it over.
    pub fn acquire(
        store: &dyn Store,
        container: &FileName,
        journal: &WriteJournal,
        owner: OwnerNote,
    ) -> Result<Self, LockError> {
        let first = Self::check_leases(store, container, journal)?;
        Self::acquire_after(&first, store, journal, owner, || {})
    }

    /// Checks which leases there are, for [`acquire_after`](Self::acquire_after).
    pub fn check_leases(
        store: &dyn Store,
        container: &FileName,
        journal: &WriteJournal,
    ) -> Result<LeaseCheck, LockError> {
        let folder = read_folder(store, container, hint(journal))?;
        Ok(LeaseCheck::of(container.clone(), folder))
    }

    /// As [`acquire`](Self::acquire), after a first check a moment ago: whatever has changed since
    /// shows in the second one. Calls `meanwhile` once the lease's file is created, while the
    /// second check is under way. What `meanwhile` read of the container counts only if the lease
    /// is ours at the end and [`Lock::may_arrive`] is false: then no other session could write
    /// since.
    pub fn acquire_after(
        first: &LeaseCheck,
        store: &dyn Store,
        journal: &WriteJournal,
        owner: OwnerNote,
        meanwhile: impl FnOnce() + Send,
    ) -> Result<Self, LockError> {
        Self::acquire_asking(first, store, journal, owner, &[], meanwhile)
    }

    /// As [`acquire_after`](Self::acquire_after). `questions` of `meanwhile` are asked together with
    /// those of the second check, behind the flushes of the new lease, if the server keeps the
    /// order.
    pub fn acquire_asking(
        first: &LeaseCheck,
        store: &dyn Store,
        journal: &WriteJournal,
        owner: OwnerNote,
        questions: &[Question],
        meanwhile: impl FnOnce() + Send,
    ) -> Result<Self, LockError> {
        let _span = tracing::debug_span!("lease", op = "acquire").entered();
        Self::make(first, store, journal, owner, (false, questions), meanwhile)
    }

    /// The questions of [`check_leases`](Self::check_leases) and [`inspect`](super::inspect()), to be
    /// asked ahead.
    pub fn questions(
        container: &FileName,
        journal: &WriteJournal,
    ) -> Result<Vec<Question>, LockError> {
        let mut questions = vec![Question::List];
        if let Some(number) = hint(journal) {
            let file = lock_name(container, number)?;
            questions.push(Question::Open(file, Access::ReadWrite));
        }
        Ok(questions)
    }

    /// The questions of the second check.
    fn second_questions(&self) -> Result<Vec<Question>, LockError> {
        let now = self.now();
        let mut questions = vec![Question::List];
        if let Some(next) = now.number.checked_add(1) {
            questions.push(Question::Stat(lock_name(&self.container, next)?));
        }
        questions.push(Question::Open(now.file, Access::ReadWrite));
        if let Some(below) = now.below {
            let below = lock_name(&self.container, below)?;
            questions.push(Question::Open(below, Access::ReadWrite));
        }
        Ok(questions)
    }

    /// Creates the next lease behind whatever exists, even behind a lease in use: that session
    /// stops at its next lease check. What it sent may still arrive: its lease becomes a
    /// predecessor. While a predecessor is open, nothing may be written under this lease. See
    /// [`Lock::open_predecessors`].
    pub fn take_over(
        store: &dyn Store,
        container: &FileName,
        journal: &WriteJournal,
        owner: OwnerNote,
    ) -> Result<Self, LockError> {
        let first = Self::check_leases(store, container, journal)?;
        Self::make(&first, store, journal, owner, (true, &[]), || {})
    }

    fn make(
        first: &LeaseCheck,
        store: &dyn Store,
        journal: &WriteJournal,
        owner: OwnerNote,
        (on_purpose, questions): (bool, &[Question]),
        meanwhile: impl FnOnce() + Send,
    ) -> Result<Self, LockError> {
        let container = &first.container;
        let busy = LockBusy::begin(journal, container)?;
        let acquisitions = journal.acquisitions();
        let token = Token::random()?;
        let mut content = Content::new(token, Token::random()?, owner);
        content.agent = store.agent();
        let via = first.enter(journal, on_purpose, &mut content)?;
        let below = first.folder.highest();
        if let Some(free) = below.filter(|seen| seen.is_free()) {
            journal.known_free(free.number)?;
        }
        let number = next_number(below)?;
        let lock = Self {
            container: container.clone(),
            token,
            current: Mutex::new(Current {
                number,
                file: lock_name(container, number)?,
                content,
                below: below.map(|below| below.number),
                answered: 0,
                pending: None,
                made_at: (now_s(), since_boot()),
                clock_is_servers: false,
            }),
            writing: Mutex::new(()),
            took_over: via != Via::Start && via != Via::Free,
            follows_own: below.is_some_and(|seen| seen.is_of(&acquisitions)),
            lists: Mutex::default(),
            has_twin: AtomicBool::new(false),
            busy,
            journal: journal.clone(),
            checked_at: since_boot(),
        };
        if let Err(error) = lock.create(store, questions) {
            store.forget_ahead();
            return Err(error);
        }
        let check_again = || lock.check_again(store, via, on_purpose, &first.folder);
        let ((), checked) = join(meanwhile, check_again);
        store.forget_ahead();
        match checked {
            Ok(()) => {
                store.set_witness(&lock.file());
                Ok(lock)
            }
            Err(error) => {
                // If even that fails, the journal entry stays, and the next attempt takes the lease
                // over.
                let withdrawn = lock.withdraw(store);
                if withdrawn.is_ok() && matches!(error, LockError::NotKept { .. }) {
                    let _ = lock.rewrite(store);
                }
                Err(error)
            }
        }
    }

    /// Creates our lease's file. Asks the questions of the second check, and `also`, behind that.
    fn create(&self, store: &dyn Store, also: &[Question]) -> Result<(), LockError> {
        let now = self.now();
        self.journal.acquiring(now.number, self.token)?;
        let mut behind = self.second_questions()?;
        behind.extend_from_slice(also);
        let created = store.create_filled_asking(&now.file, &now.content.bytes(), &behind);
        let filled = match created {
            Ok(filled) => filled.durable(),
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                self.journal.not_acquired(now.number, self.token)?;
                return Err(self.acquired_by_other(store));
            }
            // It may have been created all the same, so the journal entry stays.
            Err(source) => return Err(self.failed("acquire", source)),
        };
        filled.map_err(|source| {
            let error = self.failed("acquire", source);
            self.undo_unfilled(store, &error);
            error
        })
    }

    /// Handles a file that was created and could not be filled (full disk). An empty lease makes
    /// others wait, so it is removed, if it is empty and the last. This is the only case in which
    /// the highest lease is removed, and it was never a valid one: a session that passed it finds
    /// at its second check that it is gone.
    fn undo_unfilled(&self, store: &dyn Store, error: &LockError) {
        let answered = matches!(error, LockError::Store { source, .. } if source.was_answered());
        if !answered || self.withdraw(store).is_ok() {
            return;
        }
        self.remove_unfilled(store, &self.now());
    }

    /// Removes a lease of ours that is empty and the last. Returns whether it is gone.
    pub(super) fn remove_unfilled(&self, store: &dyn Store, lease: &Current) -> bool {
        let is_empty = read_lease(store, lease.number, &lease.file).is_ok_and(|seen| seen.empty);
        if !is_empty || !matches!(self.next_is_there(store, lease), Ok(None)) {
            return false;
        }
        let removed = store.remove(&lease.file).is_ok();
        if removed {
            let _ = self.journal.not_acquired(lease.number, self.token);
        }
        removed
    }

    /// The second check, after our file was created: by names, not only by the listing.
    fn check_again(
        &self,
        store: &dyn Store,
        via: Via,
        on_purpose: bool,
        first: &Folder,
    ) -> Result<(), LockError> {
        let now = self.now();
        let failed = |source| self.failed("acquire", source);
        let read_below = || match now.below {
            Some(number) => {
                let file = lock_name(&self.container, number)?;
                read_if_there(store, number, &file).map_err(failed)
            }
            None => Ok(None),
        };
        let read_ours = || read_if_there(store, now.number, &now.file).map_err(failed);
        let (ours, (below, (next, names))) = join(read_ours, || {
            join(read_below, || {
                join(
                    || self.next_is_there(store, &now),
                    || store.list().map_err(failed),
                )
            })
        });
        let (below, ours, next) = (below?, ours?, next?);
        let names = names?;
        let (numbers, old) = numbers_in(&self.container, &names);
        self.set_late_lists(late_lists_in(&self.container, &names));
        let is_ours = ours
            .as_ref()
            .and_then(|seen| seen.content.as_ref())
            .is_some_and(|found| found.attempt == now.content.attempt && !found.free);
        if is_ours && numbers.last().is_none_or(|last| *last < now.number) {
            return Err(LockError::Unlisted { file: now.file });
        }
        let new_old = old.iter().any(|number| !first.old.contains(number));
        let alone = numbers.last() == Some(&now.number) && next.is_none() && !new_old;
        // Nothing but its creator writes into a lease, so the server is at fault.
        if alone && ours.as_ref().is_some_and(|seen| seen.content.is_none()) {
            return Err(self.not_kept(&now.file, true));
        }
        let below_gone = now.below.is_some() && below.is_none();
        if !is_ours || !alone || below_gone {
            return Err(self.acquired_by_other(store));
        }
        self.note_clock(ours.as_ref());
        self.check_below(store, via, on_purpose, below.as_ref())?;
        self.journal.acquired(now.number)?;
        self.end_old_locks(store, &old)?;
        if via == Via::Empty {
            let number = now.below;
            self.change(|content| {
                content
                    .doors
                    .retain(|predecessor| Some(predecessor.number) != number);
            });
            self.confirm(store)?;
        }
        Ok(())
    }

    /// Adds the entries of the lease below to ours. An error if that lease is not what the first
    /// check showed.
    fn check_below(
        &self,
        store: &dyn Store,
        via: Via,
        on_purpose: bool,
        below: Option<&FoundLease>,
    ) -> Result<(), LockError> {
        let now = self.now();
        let said = below.and_then(|seen| seen.content.as_ref());
        match via {
            Via::Empty if below.is_none_or(|seen| !seen.empty) => {
                // It was filled meanwhile: its session may be using it.
                self.change(|content| inherit(content, said));
                return Err(self.acquired_by_other(store));
            }
            Via::Free if !below.is_some_and(FoundLease::is_free) => {
                let number = now.below.unwrap_or(0);
                self.change(|content| {
                    inherit(content, said);
                    content.add_predecessor(Predecessor {
                        number,
                        until_s: None,
                        all_before: false,
                        own: false,
                    });
                });
                return Err(self.acquired_by_other(store));
            }
            _ => self.change(|content| inherit(content, said)),
        }
        let passed =
            |predecessor: &Predecessor| via == Via::Empty && Some(predecessor.number) == now.below;
        let is_open =
            |predecessor: &Predecessor| predecessor.until_s.is_none() && !passed(predecessor);
        if let (false, Some(below)) = (on_purpose, below)
            && self.now().content.doors.iter().any(is_open)
        {
            // The first check did not show it.
            return Err(LockError::Waiting {
                container: self.container.clone(),
                info: Box::new(below.info()),
            });
        }
        Ok(())
    }

    /// Ends locks of sprat 0.x: such a session considers its lock lost when the file is gone or a
    /// higher one exists.
    fn end_old_locks(&self, store: &dyn Store, old: &[u64]) -> Result<(), LockError> {
        let failed = |source| self.failed("acquire", source);
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
        store.try_flush_folder().map_err(failed)?;
        Ok(())
    }

    /// Writes "free" into a file that we created and that did not become the lease. It is never
    /// removed, and never hides what is below it: its predecessors stay.
    fn withdraw(&self, store: &dyn Store) -> Result<(), LockError> {
        self.change(|content| content.free = true);
        let now = self.now();
        self.overwrite(store, "withdraw", &now)?;
        self.journal.known_free(now.number)
    }

    /// The error that describes the session which was faster.
    fn acquired_by_other(&self, store: &dyn Store) -> LockError {
        let number = self.now().number;
        match read_folder(store, &self.container, None) {
            Ok(folder) => {
                let other = |seen: &&FoundLease| !seen.has(self.token) && !seen.is_free();
                let gone = FoundLease {
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

    pub(super) fn note_clock(&self, ours: Option<&FoundLease>) {
        let Some(modified_s) = ours.and_then(|seen| seen.modified_s) else {
            return;
        };
        let mut now = self.current();
        let ahead = now.made_at.0;
        now.made_at = (modified_s, since_boot());
        now.clock_is_servers = true;
        // These times were set by our clock until the server's was known.
        let number = now.below;
        for predecessor in &mut now.content.doors {
            if Some(predecessor.number) == number
                && let Some(until) = &mut predecessor.until_s
                && *until >= ahead
            {
                *until = modified_s + LATE_WRITE_S;
            }
        }
    }
}

fn next_number(below: Option<&FoundLease>) -> Result<u64, LockError> {
    let next = match below {
        Some(below) => below.number.checked_add(1),
        None => Some(FIRST_NUMBER),
    };
    let next = next.ok_or_else(|| LockError::Invalid {
        op: "choose a lease number",
        reason: "there is none left".to_owned(),
    })?;
    Ok(next.max(FIRST_NUMBER))
}

fn inherit(content: &mut Content, below: Option<&Content>) {
    if let Some(below) = below {
        content.inherit(&below.doors, &below.watch);
    }
}

/// The lease that is probably the highest: the last one of this machine.
pub(super) fn hint(journal: &WriteJournal) -> Option<u64> {
    let acquired = journal
        .acquisitions()
        .iter()
        .map(|(number, _)| *number)
        .max();
    let known = acquired.unwrap_or(0).max(journal.highest_free());
    (known >= FIRST_NUMBER).then_some(known)
}
