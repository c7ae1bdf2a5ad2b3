//! Keeps a lease over a lost connection.

use std::sync::atomic::Ordering;

use super::seen::{Seen, lock_name};
use super::{Current, Lock, LockError, counted, read_if_there};
use crate::beside::beside;
use crate::token::Token;
use crate::{Applied, Store, StoreErrorKind};

impl Lock {
    /// On a new connection: takes the lease over from ourselves, by the next number. Of two copies
    /// of one process (a machine that was cloned with its memory) only one can make it, and a write
    /// of the old connection that is carried out late hits a number that no longer counts.
    /// `Store` errors tell nothing: call it again on another connection.
    pub fn take_again(&self, store: &dyn Store) -> Result<(), LockError> {
        let _span = tracing::debug_span!("lease", op = "verify on a new connection").entered();
        let _writing = self.writing();
        loop {
            let now = self.now();
            match self.read_again(store, &now) {
                Ok(()) => {}
                Err(lost @ LockError::Lost { .. }) => match self.find_pending(store, &now)? {
                    Some(found) => {
                        *self.current() = found;
                        continue;
                    }
                    None => {
                        self.current().pending = None;
                        return Err(lost);
                    }
                },
                Err(error) => return Err(error),
            }
            break;
        }
        let mut next = self.now();
        let before = next.clone();
        next.predecessor = Some(before.number);
        next.number = before
            .number
            .checked_add(1)
            .ok_or_else(|| self.lost("no number is left"))?;
        next.file = lock_name(&self.container, next.number)?;
        next.content.renewed = 0;
        next.content.attempt = Token::random()?.to_string();
        next.answered = 0;
        next.pending = None;
        self.record.taking(next.number, self.token)?;
        self.current().pending = Some(next.content.clone());
        let filled = match store.create_filled(&next.file, &next.content.bytes()) {
            // As any other error it would lead to another try, which finds the same.
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                self.current().pending = None;
                // A copy of this process makes the same number.
                let twin = read_if_there(store, next.number, &next.file);
                if twin.is_ok_and(|seen| seen.is_some_and(|seen| seen.has(self.token))) {
                    self.has_twin.store(true, Ordering::SeqCst);
                }
                // The next session of this machine must not take that lease for its own.
                self.record.not_taken(next.number, self.token)?;
                return Err(self.lost(&format!("{} is there", next.file)));
            }
            filled => filled,
        };
        // Made, and the server refused its content (a full disk, a failure that passes): the next attempt
        // must not take it for another's.
        if let Ok(Applied::NotDurable(source)) = &filled
            && source.was_answered()
            && self.remove_unfilled(store, &next)
        {
            self.current().pending = None;
        }
        filled
            .and_then(Applied::durable)
            .map_err(|source| self.failed("renew", source))?;
        let (ours, (below, after)) = beside(
            || read_if_there(store, next.number, &next.file),
            || {
                beside(
                    || read_if_there(store, before.number, &before.file),
                    || self.next_is_there(store, &next),
                )
            },
        );
        let failed = |source| self.failed("renew", source);
        let (ours, below, after) = (ours.map_err(failed)?, below.map_err(failed)?, after?);
        let same = |seen: &Option<Seen>, attempt: &str, counters| {
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
            // Made by us, and nobody else writes into it.
            let file = next.file.clone();
            *self.current() = next;
            return Err(self.not_kept(&file, false));
        }
        if after.is_some() || !made || !kept {
            let lost = self.lost(&format!("{} was taken over", before.file));
            let mut current = self.current();
            if made && kept {
                // Who took over waits for an answer in the one that we made.
                *current = next;
            } else {
                current.pending = None;
            }
            return Err(lost);
        }
        *self.current() = next;
        store.set_witness(&self.file());
        self.note_clock(ours.as_ref());
        self.record.taken(self.number())
    }

    /// The next lease of ours that a connection made which was lost before it answered. One that is
    /// empty was made by it or by somebody who takes over and has not come to the second look:
    /// both find the number after it.
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
        // The second belt: `verify` looks at both again before the lease counts as ours.
        if content.attempt != pending.attempt || content.free {
            return Ok(None);
        }
        Ok(Some(Current {
            number,
            file,
            content: pending.clone(),
            predecessor: Some(now.number),
            answered: 0,
            pending: None,
            made_at: now.made_at,
        }))
    }
}
