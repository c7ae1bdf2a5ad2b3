//! Removes what has expired: merges its entries into the next older generation, and frees logs.
//!
//! No data moves. Each step may run again after a crash: the merged index takes its name, then the
//! generation's folder becomes `dead.N` and is removed, then the logs that no index needs are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};

use crate::alarm;
use crate::clock::{DAY_S, Now};
use crate::disk::{self, number, open_in, sync_folder};
use crate::generation::{self, seal_all_locked};
use crate::index;
use crate::keeper::mark;
use crate::past::{self, has_mark};
use crate::policy::Policy;
use crate::ranges::{self, BLOCK};
use crate::retention::{self, Candidate};
use crate::state::Locks;

/// Expiry waits so long for a client that reads a past state.
const READING_MAX_S: i64 = DAY_S;
/// A generation that was never whole, while it is removed.
const DEAD_NEW: &str = "dead.new";

/// What one run did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub removed: Vec<u32>,
    /// Why nothing may be removed.
    pub held: Option<String>,
}

/// The generations as the policy sees them. Those with a damaged head: [`damaged_due`].
pub fn candidates(container: &OwnedFd) -> io::Result<Vec<Candidate>> {
    let mut found = Vec::new();
    for (number, head) in past::list(container)? {
        let Some(head) = head else {
            continue;
        };
        found.push(Candidate {
            number,
            bucket_s: head.bucket_s,
            counted_s: head.counted_s,
            stood_s: head.stood_s,
            secret: head.reason == "secret",
            fixed: has_mark(container, number, "pinned")?,
        });
    }
    Ok(found)
}

/// The generations with a damaged head that may go. Nobody can read their states, nor knows their times. They
/// are older than the next one with a head: if no rule keeps even that for its age, they go.
fn damaged_due(container: &OwnedFd, policy: &Policy, now: Now) -> io::Result<Vec<u32>> {
    let longest_s = policy.longest_s();
    let mut due = Vec::new();
    let mut next_counted_s = None;
    for number in generation::numbers(container)?.into_iter().rev() {
        let head = generation::read_head(generation::folder(container, number)?);
        if let Some(head) = disk::if_whole(head)? {
            next_counted_s = Some(head.counted_s);
            continue;
        }
        let is_old = |counted_s| now.counted_s - counted_s > longest_s;
        if next_counted_s.is_some_and(is_old) && !has_mark(container, number, "pinned")? {
            due.push(number);
        }
    }
    Ok(due)
}

/// Removes what the policy does not keep any more, and what the administrator marked for removal.
pub fn run(container: &OwnedFd, policy: &Policy, now: Now, overdue: bool) -> io::Result<Done> {
    let locks = Locks::open(container)?;
    let _tidy = locks.tidy.exclusive()?;
    remove_dead(container)?;
    remove_half_made(container, &locks)?;
    let is_full = disk::unless_full(seal_all_locked(container))?.is_none();
    let all = candidates(container)?;
    let alarm = alarm::check(container, &all, policy, now)?;
    let held = match () {
        () if disk::exists_in(container, "hold")? => Some("held by the administrator".to_owned()),
        () if policy.hold_on_alarm && alarm.is_some() => alarm,
        () if policy.hold_on_alarm && overdue => Some("a backup is overdue".to_owned()),
        () if now.apart => Some("the wall clock and the counted clock are apart".to_owned()),
        () => None,
    };
    let due = if held.is_some() {
        Vec::new()
    } else {
        retention::expired(&all, policy, now)
    };
    let mut expired = Vec::new();
    for one in &all {
        let asked =
            has_mark(container, one.number, "expire")? && !one.fixed && all.last() != Some(one);
        if asked || due.contains(&one.number) && may_go(container, one.number, now)? {
            expired.push(one.number);
        }
    }
    if held.is_none() {
        expired.extend(damaged_due(container, policy, now)?);
        expired.sort_unstable();
    }
    let mut removed = Vec::new();
    if is_full {
        // Where no older one stays, nothing is merged: that needs no index, and frees space.
        let mut oldest = generation::numbers(container)?;
        let stays = oldest.iter().position(|number| !expired.contains(number));
        oldest.truncate(stays.unwrap_or(0));
        removed = remove(container, &oldest)?;
        sweep_logs(container)?;
        expired.retain(|number| !oldest.contains(number));
        if !expired.is_empty() || removed.is_empty() {
            seal_all_locked(container)?;
        }
    }
    removed.extend(remove(container, &expired)?);
    sweep_logs(container)?;
    Ok(Done { removed, held })
}

/// Whether nobody reads the generation, or somebody has read it for a day already.
fn may_go(container: &OwnedFd, generation: u32, now: Now) -> io::Result<bool> {
    let folder = generation::folder(container, generation)?;
    let head = open_in(&folder, "head", OFlags::RDONLY)?;
    match rustix::fs::flock(&head, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => {}
        Err(error) => return Err(error.into()),
    }
    let since = disk::text_in(&folder, "due", 64)?;
    if let Some(since) = since.and_then(|text| number::<i64>(&text, "due")) {
        return Ok(now.counted_s - READING_MAX_S > since);
    }
    let due = format!("due {}\n", now.counted_s);
    // On a full disk, too, others may go.
    disk::unless_full(mark(container, generation, "due", &due))?;
    Ok(false)
}

/// Whether the generation `older` is read from the image of `number`, the next one that stays.
pub fn needs(container: &OwnedFd, older: Option<u32>, number: u32) -> io::Result<bool> {
    let Some(older) = older else {
        return Ok(false);
    };
    Ok(generation::is_clone(container, number)? && !generation::is_clone(container, older)?)
}

/// Removes generations; what older ones need of them is merged into those. An image can't be: a clone stays as long as
/// the generation before it has a log. Returns those that were removed.
pub fn remove(container: &OwnedFd, expired: &[u32]) -> io::Result<Vec<u32>> {
    let all = generation::numbers(container)?;
    let mut removed = Vec::new();
    let mut older = None;
    let mut at = 0;
    while at < all.len() {
        let mut run = Vec::new();
        for number in &all[at..] {
            if !expired.contains(number) || needs(container, older, *number)? {
                break;
            }
            run.push(*number);
        }
        if run.is_empty() {
            older = Some(all[at]);
            at += 1;
            continue;
        }
        at += run.len();
        removed.extend(&run);
        if let Some(older) = older {
            merge_into(container, older, &run)?;
        }
        for number in run {
            rustix::fs::renameat(
                container,
                format!("g.{number}"),
                container,
                format!("dead.{number}"),
            )?;
        }
        sync_folder(container)?;
    }
    remove_dead(container)?;
    Ok(removed)
}

fn merge_into(container: &OwnedFd, older: u32, run: &[u32]) -> io::Result<()> {
    let folder = generation::folder(container, older)?;
    // What was a hole then, or was saved by an older generation, no older state looks for here. If the map is
    // damaged, all stays: that state can't be read, but older ones are read through this index.
    let map = disk::if_whole(generation::read_map(&folder))?;
    let sources: Vec<u32> = std::iter::once(older).chain(run.iter().copied()).collect();
    let open = |n: usize| generation::open_index(container, sources[n]);
    let keep = |block| map.as_ref().is_none_or(|map| ranges::contains(map, block));
    let scratch = || index::scratch(container);
    let out = open_in(
        &folder,
        "index.tmp",
        OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC,
    )?;
    index::merge(sources.len(), &open, &keep, &scratch, out)?.sync()?;
    for number in run {
        if has_mark(container, *number, "written-past")? {
            mark(container, older, "written-past", "")?;
        }
    }
    rustix::fs::renameat(&folder, "index.tmp", &folder, "index")?;
    sync_folder(&folder)
}

/// What processes left that were killed while they made a clone or a generation.
fn remove_half_made(container: &OwnedFd, locks: &Locks) -> io::Result<()> {
    disk::remove_folder_in(container, generation::HALF_CLONE)?;
    // While somebody writes, the next run does it.
    if let Some(_gate) = locks.gate.try_exclusive()? {
        let dead = rustix::fs::renameat(container, generation::NEW, container, DEAD_NEW);
        disk::if_there(dead.map_err(io::Error::from))?;
    }
    // To remove it may take as long as to make it: nobody waits for that.
    disk::remove_folder_in(container, DEAD_NEW)
}

fn remove_dead(container: &OwnedFd) -> io::Result<()> {
    for name in disk::list_in(container)?
        .iter()
        .filter(|name| name.starts_with("dead."))
    {
        disk::remove_folder_in(container, name)?;
    }
    sync_folder(container)
}

/// Removes logs that nothing leads to, and frees the blocks that nothing leads to in those of removed
/// generations. A damaged index leads to unknown places: then all stays.
fn sweep_logs(container: &OwnedFd) -> io::Result<()> {
    let Some(logs) = disk::if_there(disk::folder_in(container, "logs"))? else {
        return Ok(());
    };
    let generations = generation::numbers(container)?;
    // A bit for each place: a long log has hundreds of thousands.
    let mut used: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for number in &generations {
        // The entries of a clone lead nowhere.
        if !generation::is_sealed(container, *number)? || generation::is_clone(container, *number)?
        {
            continue;
        }
        for entry in generation::open_index(container, *number)?.iter() {
            let entry = entry?;
            if entry.place != 0 && !generations.contains(&entry.log) {
                let (places, word) = (
                    used.entry(entry.log).or_default(),
                    entry.place as usize / 64,
                );
                places.resize(places.len().max(word + 1), 0);
                places[word] |= 1 << (entry.place % 64);
            }
        }
    }
    for name in disk::list_in(&logs)? {
        let Some(number) = name
            .parse::<u32>()
            .ok()
            .filter(|number| !generations.contains(number))
        else {
            continue;
        };
        // A log is made before its generation is.
        if generations.last().is_none_or(|newest| number > *newest) {
            continue;
        }
        match used.get(&number) {
            None => disk::remove_in(&logs, &name)?,
            Some(places) => punch_unused(&open_in(&logs, &name, OFlags::RDWR)?, places)?,
        }
    }
    Ok(())
}

fn punch_unused(log: &File, used: &[u64]) -> io::Result<()> {
    let end = log.metadata()?.size() / BLOCK;
    let is_used = |place: &u64| {
        let word = usize::try_from(place / 64)
            .ok()
            .and_then(|word| used.get(word));
        word.is_some_and(|word| word >> (place % 64) & 1 == 1)
    };
    let unused = (0..end).filter(|place| !is_used(place));
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for range in ranges::normal(unused.map(|place| place..place + 1).collect()) {
        let (at, len) = (range.start * BLOCK, (range.end - range.start) * BLOCK);
        match rustix::fs::fallocate(log, flags, at, len) {
            Ok(()) => {}
            // Some file systems can't: then the space stays used.
            Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
