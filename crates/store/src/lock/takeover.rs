//! Takes a container over from a session that may still be alive: watches its lease, and closes
//! open predecessors.

use std::time::{Duration, Instant};

#[cfg(doc)]
use super::LATE_WRITE_S;
use super::inspect::inspect;
use super::lease::{FoundLease, lock_name};
use super::{Lock, LockError, LockInfo, read_if_there};
use crate::{FileName, Store};

/// What happened to a lease while it was watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Watched {
    /// There is none, or it is free and no write of an earlier session can arrive.
    Free,
    /// Its session is alive.
    Renewed(LockInfo),
    /// Nothing happened.
    Still(LockInfo),
}

/// Watches a container's highest lease for `time`, which should be at least two renewals. Returns
/// as soon as the lease changes. Calls `tick` about once a second and returns its error.
pub fn watch<E: From<LockError>>(
    store: &dyn Store,
    container: &FileName,
    time: Duration,
    mut tick: impl FnMut() -> Result<(), E>,
) -> Result<Watched, E> {
    let begun = Instant::now();
    let Some(before) = inspect(store, container, None)?.held else {
        return Ok(Watched::Free);
    };
    // A released lease is not renewed.
    if before.free {
        return Ok(Watched::Still(before));
    }
    loop {
        tick()?;
        let left = time.saturating_sub(begun.elapsed());
        std::thread::sleep(left.min(Duration::from_secs(1)));
        match inspect(store, container, None)?.held {
            None => return Ok(Watched::Free),
            Some(now) if now != before => return Ok(Watched::Renewed(now)),
            Some(now) if left.is_zero() => return Ok(Watched::Still(now)),
            Some(_) => {}
        }
    }
}

impl Lock {
    /// The open predecessors: earlier leases from which writes may arrive, with no known end. While
    /// there are any, nothing may be written to the container.
    #[must_use]
    pub fn open_predecessors(&self) -> Vec<u64> {
        let doors = self.now().content.doors;
        let open = doors
            .iter()
            .filter(|predecessor| predecessor.until_s.is_none());
        open.map(|predecessor| predecessor.number).collect()
    }

    /// Closes each open predecessor whose session wrote "free": all that it sent was answered. That
    /// lease's own predecessors are added instead. Returns the closed ones.
    pub fn close_answered(&self, store: &dyn Store) -> Result<Vec<u64>, LockError> {
        let mut closed = Vec::new();
        for number in self.open_predecessors() {
            let Some(seen) = self.read_predecessor(store, number)? else {
                continue;
            };
            let Some(content) = seen.content.filter(|content| content.free) else {
                continue;
            };
            self.change(|ours| {
                // An entry that stands for earlier leases, too, is not closed by its own answer.
                ours.doors
                    .retain(|predecessor| predecessor.number != number || predecessor.all_before);
                ours.inherit(&content.doors, &content.watch);
            });
            closed.push(number);
        }
        Ok(closed)
    }

    /// Has the agent on the server refuse what earlier sessions sent through it. Drops the predecessors whose
    /// leases say that all was sent through this agent, and makes that durable. Returns them: nothing of them
    /// can arrive any more. Empty without an agent, or if it does not succeed.
    ///
    /// A session that is still alive must have stopped sending: on a new connection it may send for as long as its
    /// last lease check counts. With `only_dead` only sessions count that died on the machine of the next one.
    pub fn close_refused(&self, store: &dyn Store, only_dead: bool) -> Result<Vec<u64>, LockError> {
        let Some(agent) = store.agent() else {
            return Ok(Vec::new());
        };
        let mut refused = Vec::new();
        for predecessor in self.now().content.doors {
            // An entry that stands for earlier leases says nothing of those.
            if predecessor.all_before || (only_dead && !predecessor.own) {
                continue;
            }
            let seen = self.read_predecessor(store, predecessor.number)?;
            let content = seen.and_then(|seen| seen.content);
            if content.is_some_and(|content| content.agent.as_ref() == Some(&agent)) {
                refused.push(predecessor.number);
            }
        }
        if refused.is_empty() {
            return Ok(refused);
        }
        match store.refuse_earlier(&self.container) {
            Ok(true) => {}
            Ok(false) => return Ok(Vec::new()),
            // A process that the agent can't end. The waiting helps.
            Err(error) if error.was_answered() => return Ok(Vec::new()),
            Err(source) => return Err(self.failed("begin the session of", source)),
        }
        self.change(|ours| {
            ours.doors.retain(|predecessor| {
                predecessor.all_before || !refused.contains(&predecessor.number)
            });
        });
        self.confirm(store)?;
        Ok(refused)
    }

    /// Whether the session of the lease below is one of these, and nothing of any other session can arrive.
    #[must_use]
    pub fn only_these_could_arrive(&self, refused: &[u64]) -> bool {
        let below = self.now().below;
        below.is_some_and(|below| refused.contains(&below)) && !self.may_arrive()
    }

    /// Closes every open predecessor, after a proof that no earlier session can write any more.
    /// Returns which.
    pub fn close_proven(&self) -> Vec<u64> {
        let doors = self.open_predecessors();
        self.change(|ours| {
            ours.doors
                .retain(|predecessor| predecessor.until_s.is_some());
        });
        doors
    }

    /// Sets an end time for each open predecessor whose session was silent for `silent_s` seconds
    /// ([`LATE_WRITE_S`], or what a test sets). Silence proves nothing, so writes may arrive for as
    /// long again. The current time is the server's time when our lease was created, plus our own
    /// clock since then, time asleep included. It is compared with the last change of that
    /// session's lease, by the server's clock. Returns which.
    pub fn close_silent(&self, store: &dyn Store, door_s: u64) -> Result<Vec<u64>, LockError> {
        let mut closed = Vec::new();
        let now_s = self.now().server_s();
        for number in self.open_predecessors() {
            let since = match self.read_predecessor(store, number)? {
                Some(seen) => seen.modified_s,
                None => None,
            };
            if since.is_some_and(|since| since.saturating_add(door_s) <= now_s) {
                self.set_time(number, now_s + door_s);
                closed.push(number);
            }
        }
        Ok(closed)
    }

    /// Sets an end time for every open predecessor, `late_s` seconds from now ([`LATE_WRITE_S`], or
    /// what a test sets), because a user confirmed that those machines are off.
    pub fn close_by_word(&self, door_s: u64) -> Vec<u64> {
        let doors = self.open_predecessors();
        let until_s = self.now().server_s() + door_s;
        for number in &doors {
            self.set_time(*number, until_s);
        }
        doors
    }

    /// Forgets all pending comparisons. Returns how many.
    pub fn forget_comparisons(&self) -> usize {
        let mut now = self.current();
        std::mem::take(&mut now.content.watch).len()
    }

    /// Writes the current content of this lease, makes it durable, and checks once more that the
    /// lease is ours: a machine that waited may have slept.
    pub fn confirm(&self, store: &dyn Store) -> Result<(), LockError> {
        let failed = |source| self.failed("keep", source);
        // A concurrent renewal would write an older content over this one, or the other way round.
        let _writing = self.writing();
        let now = self.now();
        let file = store
            .open(&now.file, crate::Access::ReadWrite)
            .map_err(failed)?;
        file.write_at(0, &now.content.bytes()).map_err(failed)?;
        file.flush().map_err(failed)?;
        self.verify(store)
    }

    fn set_time(&self, number: u64, until_s: u64) {
        self.change(|ours| {
            for predecessor in &mut ours.doors {
                if predecessor.number == number {
                    predecessor.until_s.get_or_insert(until_s);
                }
            }
        });
    }

    fn read_predecessor(
        &self,
        store: &dyn Store,
        number: u64,
    ) -> Result<Option<FoundLease>, LockError> {
        let file = lock_name(&self.container, number)?;
        read_if_there(store, number, &file).map_err(|source| self.failed("read", source))
    }
}
