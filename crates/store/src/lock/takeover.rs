//! Takes a container over from a session that may still live: watches its lease, and closes the
//! doors of a lease that waits.

use std::time::{Duration, Instant};

#[cfg(doc)]
use super::DOOR_S;
use super::inspect::inspect;
use super::seen::{Seen, lock_name};
use super::{Lock, LockError, LockInfo, read_if_there};
use crate::{FileName, Store};

/// What became of a lease while it was watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Watched {
    /// There is none, or it is free and nothing of an earlier session may arrive.
    Free,
    /// Its session lives.
    Renewed(LockInfo),
    /// Nothing happened.
    Still(LockInfo),
}

/// Watches a container's highest lease for `time`; two renewals at least are wise. Returns as soon
/// as it changes, calls `tick` about once a second, and ends with its error.
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
    // Nobody renews a lease that was given back.
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
    /// The earlier leases from which something may arrive, nobody knows until when. While there are
    /// any, nothing may be written to the container.
    #[must_use]
    pub fn open_doors(&self) -> Vec<u64> {
        let doors = self.now().content.doors;
        let open = doors.iter().filter(|door| door.until_s.is_none());
        open.map(|door| door.number).collect()
    }

    /// Closes each door whose session says "free": all that it sent was answered. What it waited
    /// for itself comes in its place. Returns which.
    pub fn close_answered(&self, store: &dyn Store) -> Result<Vec<u64>, LockError> {
        let mut closed = Vec::new();
        for number in self.open_doors() {
            let Some(seen) = self.read_door(store, number)? else {
                continue;
            };
            let Some(content) = seen.content.filter(|content| content.free) else {
                continue;
            };
            self.change(|ours| {
                // One that stands for those before it, too, is not closed by its own answer.
                ours.doors
                    .retain(|door| door.number != number || door.all_before);
                ours.inherit(&content.doors, &content.watch);
            });
            closed.push(number);
        }
        Ok(closed)
    }

    /// Closes every open door, after a proof that no earlier session can write any more. Returns which.
    pub fn close_proven(&self) -> Vec<u64> {
        let doors = self.open_doors();
        self.change(|ours| ours.doors.retain(|door| door.until_s.is_some()));
        doors
    }

    /// Gives a time to each door whose session was silent for `door_s` seconds: [`DOOR_S`] or what a test
    /// sets. That proves nothing, and so something may arrive for as long again. The time now is the
    /// server's from when our lease was made, and our own clock since then, time asleep included; it is
    /// compared with the last change of that session's lease, by the server's clock. Returns which.
    pub fn close_silent(&self, store: &dyn Store, door_s: u64) -> Result<Vec<u64>, LockError> {
        let mut closed = Vec::new();
        let now_s = self.now().server_s();
        for number in self.open_doors() {
            let since = match self.read_door(store, number)? {
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

    /// Gives a time to every door, `door_s` seconds ([`DOOR_S`] or what a test sets) from now, by the
    /// word of somebody who knows that those machines are off.
    pub fn close_by_word(&self, door_s: u64) -> Vec<u64> {
        let doors = self.open_doors();
        let until_s = self.now().server_s() + door_s;
        for number in &doors {
            self.set_time(*number, until_s);
        }
        doors
    }

    /// Forgets all sessions whose writes have not been compared yet. Returns how many.
    pub fn forget_watches(&self) -> usize {
        let mut now = self.current();
        std::mem::take(&mut now.content.watch).len()
    }

    /// Writes what this lease says by now, makes that durable, and looks once more whether it is
    /// ours: a machine that waited is one that may have slept.
    pub fn confirm(&self, store: &dyn Store) -> Result<(), LockError> {
        let failed = |source| self.failed("keep", source);
        // A renewal beside it would write an older content over this one, or the other way round.
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
            for door in &mut ours.doors {
                if door.number == number {
                    door.until_s.get_or_insert(until_s);
                }
            }
        });
    }

    fn read_door(&self, store: &dyn Store, number: u64) -> Result<Option<Seen>, LockError> {
        let file = lock_name(&self.container, number)?;
        read_if_there(store, number, &file).map_err(|source| self.failed("read", source))
    }
}
