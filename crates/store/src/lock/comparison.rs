//! Pending comparisons: sessions that wrote while writes of an earlier one could still arrive.
//!
//! Such a session records itself in its lease before it sends anything, and writes a late-write
//! list beside the container. The entry is passed on from lease to lease until the list was
//! compared. The content of a list is defined elsewhere: this module only knows the names.

use std::sync::atomic::Ordering;

use super::content::{Comparison, Content, LATE_WRITE_S};
use super::lease::late_list_name;
use super::{Lock, LockError, read_if_there};
use crate::token::Token;
use crate::{FileName, IgnorePoison, Store};

/// A session whose writes may have been overwritten late, and have not been compared yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingComparison {
    /// The random id of its host; empty if several entries were joined.
    pub host: String,
    /// The session's token; empty if several entries were joined.
    pub token: String,
    /// Until when late writes may arrive, by the server's clock, in seconds since the epoch.
    pub until_s: u64,
}

impl PendingComparison {
    /// When the container was taken over, by the server's clock, in seconds since the epoch.
    #[must_use]
    pub fn since_s(&self) -> u64 {
        self.until_s.saturating_sub(LATE_WRITE_S)
    }
}

/// The pending comparisons in a lease.
pub(super) fn notes(content: &Content) -> Vec<PendingComparison> {
    let note = |watch: &Comparison| PendingComparison {
        host: watch.host.clone(),
        token: watch.token.clone(),
        until_s: watch.until_s,
    };
    content.watch.iter().map(note).collect()
}

/// How long writes of an earlier session may still arrive, according to our lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LateUntil {
    /// By the server's clock, in seconds since the epoch.
    pub until_s: u64,
    /// Only of a session that died on this machine: its journal has the ranges.
    pub own_only: bool,
}

impl Lock {
    /// Random hex digits: the same for all leases of this session.
    #[must_use]
    pub fn token(&self) -> String {
        self.token.to_string()
    }

    /// Until when writes of an earlier session may arrive; `None` if none can.
    #[must_use]
    pub fn late_until(&self) -> Option<LateUntil> {
        let now = self.now();
        let server_s = now.server_s();
        let doors = &now.content.doors;
        let open = doors.iter().filter_map(|predecessor| {
            let until_s = predecessor.until_s.unwrap_or(u64::MAX);
            (until_s > server_s).then_some((until_s, predecessor.own))
        });
        open.fold(None, |all: Option<LateUntil>, (until_s, own)| {
            let all = all.unwrap_or(LateUntil {
                until_s,
                own_only: own,
            });
            Some(LateUntil {
                until_s: all.until_s.max(until_s),
                own_only: all.own_only && own,
            })
        })
    }

    /// The sessions whose writes have not been compared yet.
    #[must_use]
    pub fn pending_comparisons(&self) -> Vec<PendingComparison> {
        notes(&self.now().content)
    }

    /// The late-write lists that existed beside the container when the lease was acquired.
    #[must_use]
    pub fn late_lists(&self) -> Vec<FileName> {
        let lists = self.lists.lock();
        lists.ignore_poison().clone()
    }

    pub(super) fn set_late_lists(&self, found: Vec<FileName>) {
        let mut lists = self.lists.lock().ignore_poison();
        *lists = found;
    }

    /// Records this session as a pending comparison in its lease, until `until_s`, durably. Call it
    /// before anything is sent.
    pub fn record_comparison(&self, store: &dyn Store, until_s: u64) -> Result<(), LockError> {
        self.add_comparison(until_s);
        self.confirm(store)
    }

    /// The same, with the next write of the lease's file: [`Lock::confirm`] or [`Lock::release`].
    pub fn add_comparison(&self, until_s: u64) {
        let token = self.token();
        self.change(|content| {
            let note = Comparison {
                host: content.host.clone(),
                token,
                until_s,
            };
            content.watch.retain(|watch| watch.token != note.token);
            content.inherit(&[], &[note]);
        });
    }

    /// Drops pending comparisons by their tokens, which may include this session's own. The lease's
    /// file changes with its next write: [`Lock::confirm`] or [`Lock::release`].
    pub fn drop_comparisons(&self, tokens: &[String]) {
        self.change(|content| {
            content.watch.retain(|watch| !tokens.contains(&watch.token));
        });
    }

    /// Returns a new name for a late-write list.
    pub fn new_late_list_name(&self) -> Result<FileName, LockError> {
        let token = Token::random()?.to_string();
        late_list_name(&self.container, &token[..16])
    }

    /// Whether another copy of this process uses the lease: this machine, or another one, was
    /// cloned or reset with its memory.
    #[must_use]
    pub fn has_twin(&self) -> bool {
        self.has_twin.load(Ordering::SeqCst)
    }

    /// Answers a session that took over. Call it after the lease was lost, when everything that was
    /// sent was answered on every connection: then nothing can arrive late. The session that took
    /// over finds "free" in our lease, which is its answer. If no session took over and the server
    /// garbled the lease, its content is written again: the container stays locked, and the next
    /// session of this machine recognises the lease as its own. Returns whether a session was
    /// answered; a twin that uses this very lease is not.
    pub fn answer(&self, store: &dyn Store) -> Result<bool, LockError> {
        let _writing = self.writing();
        if self.has_twin() {
            return Ok(false);
        }
        let now = self.now();
        let failed = |source| self.failed("answer by", source);
        let found = read_if_there(store, now.number, &now.file).map_err(failed)?;
        let passed = self.next_is_there(store, &now)?.is_some();
        let Some(found) = found else { return Ok(false) };
        if !passed && found.is_garbled() {
            self.rewrite(store)?;
            return Ok(false);
        }
        let is_ours = found
            .content
            .is_some_and(|content| content.attempt == now.content.attempt && !content.free);
        if !is_ours || !passed {
            return Ok(false);
        }
        self.change(|content| content.free = true);
        let now = self.now();
        self.overwrite(store, "answer by", &now)?;
        self.journal.known_free(now.number)?;
        Ok(true)
    }
}
