//! Keeps a lease across a lost connection.

use std::sync::atomic::Ordering;

use super::lease::{FoundLease, lock_name};
use super::{Current, Lock, LockError, counted, read_if_there};
use crate::join::join;
use crate::token::Token;
use crate::{Applied, Store, StoreErrorKind};

impl Lock {
    /// On a new connection: takes the lease over from ourselves, by the next number. Of two copies
    /// of one process (a machine that was cloned with its memory) only one can create it. A late
    /// write of the old connection then hits a number that does not count any more. `Store` errors
    /// prove nothing: call it again on another connection.
    pub fn reacquire(&self, store: &dyn Store) -> Result<(), LockError> {
        let _span = tracing::debug_span!("lease", op = "verify on a new connection").entered();
        let _writing = self.writing();
        self.verify_or_use_pending(store)?;
        let before = self.now();
        let mut next = self.next_after(&before)?;
        next.content.agent = store.agent();
        self.create_next(store, &next)?;
        self.switch_to(store, &before, next)
    }

    /// Verifies our lease, or the next one if an earlier connection has created it already.
    fn verify_or_use_pending(&self, store: &dyn Store) -> Result<(), LockError> {
        loop {
            let now = self.now();
            let Err(error) = self.read_again(store, &now) else {
                return Ok(());
            };
            if !matches!(error, LockError::Lost { .. }) {
                return Err(error);
            }
            let Some(found) = self.find_pending(store, &now)? else {
                self.current().pending = None;
                return Err(error);
            };
            *self.current() = found;
        }
    }

    /// The lease with the next number, not yet created.
    fn next_after(&self, before: &Current) -> Result<Current, LockError> {
        let mut next = before.clone();
        next.below = Some(before.number);
        next.number = before
            .number
            .checked_add(1)
            .ok_or_else(|| self.lost("no number is left"))?;
        next.file = lock_name(&self.container, next.number)?;
        next.content.renewed = 0;
        next.content.attempt = Token::random()?.to_string();
        next.answered = 0;
        next.pending = None;
        Ok(next)
    }

    fn create_next(&self, store: &dyn Store, next: &Current) -> Result<(), LockError> {
        self.journal.acquiring(next.number, self.token)?;
        self.current().pending = Some(next.content.clone());
        let filled = match store.create_filled(&next.file, &next.content.bytes()) {
            // Any other error would lead to another attempt, which would find the same.
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                self.current().pending = None;
                // A copy of this process creates the same number.
                let twin = read_if_there(store, next.number, &next.file);
                if twin.is_ok_and(|seen| seen.is_some_and(|seen| seen.has(self.token))) {
                    self.has_twin.store(true, Ordering::SeqCst);
                }
                // The next session of this machine must not consider that lease its own.
                self.journal.not_acquired(next.number, self.token)?;
                return Err(self.lost(&format!("{} is there", next.file)));
            }
            filled => filled,
        };
        // It was created, and the server refused its content (a full disk, a temporary failure):
        // the next attempt must not consider it another session's.
        if let Ok(Applied::NotDurable(source)) = &filled
            && source.was_answered()
            && self.remove_unfilled(store, next)
        {
            self.current().pending = None;
        }
        filled
            .and_then(Applied::durable)
            .map_err(|source| self.failed("renew", source))
    }

    /// Makes `next`, which was created, our lease, if no other session and no copy of this process
    /// came in between.
    fn switch_to(
        &self,
        store: &dyn Store,
        before: &Current,
        next: Current,
    ) -> Result<(), LockError> {
        let (ours, (below, after)) = join(
            || read_if_there(store, next.number, &next.file),
            || {
                join(
                    || read_if_there(store, before.number, &before.file),
                    || self.next_is_there(store, &next),
                )
            },
        );
        let failed = |source| self.failed("renew", source);
        let (ours, below, after) = (ours.map_err(failed)?, below.map_err(failed)?, after?);
        let same = |seen: &Option<FoundLease>, attempt: &str, counters| {
            let content = seen.as_ref().and_then(|seen| seen.content.as_ref());
            content.is_some_and(|content| {
                content.attempt == attempt && !content.free && counted(content.renewed, counters)
            })
        };
        let counters = (before.answered, before.content.renewed);
        let made = same(&ours, &next.content.attempt, (0, 0));
        let kept = same(&below, &before.content.attempt, counters);
        if !kept && same(&below, &before.content.attempt, (0, u64::MAX)) {
            // A copy of this process renewed it meanwhile.
            self.has_twin.store(true, Ordering::SeqCst);
        }
        let garbled = ours.as_ref().is_some_and(|seen| seen.content.is_none());
        if garbled && kept && after.is_none() {
            // We created it, and nothing else writes into it.
            let file = next.file.clone();
            *self.current() = next;
            return Err(self.not_kept(&file, false));
        }
        if after.is_some() || !made || !kept {
            let lost = self.lost(&format!("{} was taken over", before.file));
            let mut current = self.current();
            if made && kept {
                // The session that took over waits for an answer in the lease that we created.
                *current = next;
            } else {
                current.pending = None;
            }
            return Err(lost);
        }
        *self.current() = next;
        store.set_witness(&self.file());
        self.note_clock(ours.as_ref());
        self.journal.acquired(self.number())
    }

    /// Looks for our next lease, created by a connection that was lost before it answered. An empty
    /// one was created by it, or by a session that takes over and has not reached its second check:
    /// both will find the number after it.
    fn find_pending(&self, store: &dyn Store, now: &Current) -> Result<Option<Current>, LockError> {
        let Some(pending) = &now.pending else {
            return Ok(None);
        };
        let Some(number) = now.number.checked_add(1) else {
            return Ok(None);
        };
        let file = lock_name(&self.container, number)?;
        let found = read_if_there(store, number, &file);
        let found = found.map_err(|source| self.failed("verify", source))?;
        let Some(content) = found.and_then(|seen| seen.content) else {
            return Ok(None);
        };
        // Only a safeguard: `verify` checks both again before the lease counts as ours.
        if content.attempt != pending.attempt || content.free {
            return Ok(None);
        }
        Ok(Some(Current {
            number,
            file,
            content: pending.clone(),
            below: Some(now.number),
            answered: 0,
            pending: None,
            made_at: now.made_at,
            clock_is_servers: now.clock_is_servers,
        }))
    }
}
