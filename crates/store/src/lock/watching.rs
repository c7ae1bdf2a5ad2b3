//! Sessions that write while something of an earlier one may still arrive.
//!
//! Such a session notes itself in its lease before it sends anything, and leaves a list of what it
//! wrote beside the container. The note is passed on from lease to lease until the list was
//! compared. What is in a list is its makers' business: this module knows their names only.

use std::sync::atomic::Ordering;

use super::content::{Content, DOOR_S, Watch};
use super::seen::list_name;
use super::{Lock, LockError, read_if_there};
use crate::token::Token;
use crate::{FileName, IgnorePoison, Store};

/// A session whose writes may have been overwritten late, and were not compared yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchNote {
    /// The random id of its host; empty where several notes were joined.
    pub host: String,
    /// The session's token; empty where several notes were joined.
    pub token: String,
    /// Until when something may arrive, by the server's clock, seconds since the epoch.
    pub until_s: u64,
}

impl WatchNote {
    /// When the container was taken over, by the server's clock, seconds since the epoch.
    #[must_use]
    pub fn since_s(&self) -> u64 {
        self.until_s.saturating_sub(DOOR_S)
    }
}

/// The notes in a lease.
pub(super) fn notes(content: &Content) -> Vec<WatchNote> {
    let note = |watch: &Watch| WatchNote {
        host: watch.host.clone(),
        token: watch.token.clone(),
        until_s: watch.until_s,
    };
    content.watch.iter().map(note).collect()
}

/// Writes of an earlier session that may still arrive, as a lease that is ours tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LateUntil {
    /// By the server's clock, seconds since the epoch.
    pub until_s: u64,
    /// Only of a session that died on this machine: its record has the ranges.
    pub own_only: bool,
}

impl Lock {
    /// Random hex: the same for all leases of this session.
    #[must_use]
    pub fn token(&self) -> String {
        self.token.to_string()
    }

    /// Until when something of an earlier session may arrive; `None` where nothing can.
    #[must_use]
    pub fn late_until(&self) -> Option<LateUntil> {
        let now = self.now();
        let server_s = now.server_s();
        let doors = &now.content.doors;
        let open = doors.iter().filter_map(|door| {
            let until_s = door.until_s.unwrap_or(u64::MAX);
            (until_s > server_s).then_some((until_s, door.own))
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

    /// The sessions whose writes were not compared yet.
    #[must_use]
    pub fn watched(&self) -> Vec<WatchNote> {
        notes(&self.now().content)
    }

    /// The lists of writes that lay beside the container when the lease was taken.
    #[must_use]
    pub fn lists(&self) -> Vec<FileName> {
        let lists = self.lists.lock();
        lists.ignore_poison().clone()
    }

    pub(super) fn found_lists(&self, found: Vec<FileName>) {
        let mut lists = self.lists.lock().ignore_poison();
        *lists = found;
    }

    /// Notes this session in its lease, until `until_s`, durably. Call it before anything is sent.
    pub fn note_watch(&self, store: &dyn Store, until_s: u64) -> Result<(), LockError> {
        self.add_watch(until_s);
        self.confirm(store)
    }

    /// The same with the next write into the lease's file, [`Lock::confirm`] or [`Lock::release`].
    pub fn add_watch(&self, until_s: u64) {
        let token = self.token();
        self.change(|content| {
            let note = Watch {
                host: content.host.clone(),
                token,
                until_s,
            };
            content.watch.retain(|watch| watch.token != note.token);
            content.inherit(&[], &[note]);
        });
    }

    /// Drops notes by their tokens, this session's too if it is among them. What the lease's file
    /// says changes with the next write into it, [`Lock::confirm`] or [`Lock::release`].
    pub fn drop_watches(&self, tokens: &[String]) {
        self.change(|content| {
            content.watch.retain(|watch| !tokens.contains(&watch.token));
        });
    }

    /// A new name for a list of writes.
    pub fn new_list_name(&self) -> Result<FileName, LockError> {
        let token = Token::random()?.to_string();
        list_name(&self.container, &token[..16])
    }

    /// The lease is held by another copy of this process, one of a machine that was cloned or put
    /// back with its memory.
    #[must_use]
    pub fn has_twin(&self) -> bool {
        self.has_twin.load(Ordering::SeqCst)
    }

    /// The last word in a lease that was lost, to be called with everything that was sent answered on
    /// every connection: then nothing can arrive late. Who took over gets "free", and with that its
    /// answer. If nobody did and the server garbled the lease, what it said is written again: it stays
    /// held, and the next session of this machine knows it for its own. True if somebody was answered;
    /// a twin that holds this very lease is not.
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
        self.record.known_free(now.number)?;
        Ok(true)
    }
}
