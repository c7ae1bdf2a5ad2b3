//! Folds the lists of removed snapshots into those of the snapshots that are left.
//!
//! Later snapshots share files of removed ones, so the list of a removed snapshot stays at first. A list names the
//! snapshot that its run compared with, so the lists of a job are a chain. What is in front of the first snapshot
//! becomes `base.changes.zst`; what is between two snapshots becomes a part of the list of the later one. That is
//! done when the lists of removed snapshots are larger than the base: then it costs little for each run.
//!
//! A list is replaced before those that are in it are removed. After a crash between the two, they are in no chain,
//! and the next folding removes them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, openat, statat, unlinkat};

use super::merging::Merging;
use super::reading::ListLines;
use super::{BASE, First, Lines, SUFFIX, name_of};
use crate::job::{RunFolder, replace_with};
use crate::name::SnapshotName;

/// How much a run copies of lists that another machine has made. It waits for that.
const COPIED_MAX: u64 = 64 << 20;

/// The lists of a job.
pub(super) struct Folding<'a> {
    pub(super) folder: &'a RunFolder,
    /// The snapshot that is being made.
    pub(super) newest: SnapshotName,
    /// This machine's copies.
    pub(super) local: Option<&'a Path>,
}

/// The lists in the order of the chain, the oldest one first.
struct Chain {
    lists: Vec<Option<SnapshotName>>,
    /// What the first list compared with, if that has no list.
    since: Option<SnapshotName>,
}

impl Folding<'_> {
    /// Folds, if it is time to. Returns the names of all lists that there are then, and of those that were replaced.
    pub(super) fn run(&self) -> io::Result<(BTreeSet<String>, Vec<String>)> {
        let names = self.folder.state_names().map_err(io::Error::other)?;
        let names = names.iter().filter_map(|(name, _)| name.to_str());
        let mut lists: BTreeSet<String> = BTreeSet::new();
        let mut kept = BTreeSet::from([self.newest]);
        for name in names {
            if name.ends_with(SUFFIX) {
                lists.insert(name.to_owned());
            }
            // The record goes after the snapshot.
            let recorded = name.strip_suffix(".json");
            kept.extend(recorded.and_then(|name| SnapshotName::parse(name).ok()));
        }
        let own = self.folder.job.own_folders().map_err(io::Error::other)?;
        kept.extend(own.into_iter().map(crate::job::Folder::name));
        let of_run = |name: &String| {
            let name = name.strip_suffix(SUFFIX)?;
            SnapshotName::parse(name).ok()
        };
        let removed: BTreeSet<SnapshotName> = lists
            .iter()
            .filter_map(of_run)
            .filter(|name| !kept.contains(name))
            .collect();
        let sizes = removed.iter().map(|name| self.bytes(&name_of(*name)));
        if removed.is_empty() || sizes.sum::<u64>() <= self.bytes(BASE) {
            return Ok((lists, Vec::new()));
        }
        let chain = self.chain(&lists)?;
        // A run without a list ends the chain. What the base has must not be lost then.
        let has_other_base = lists.contains(BASE) && !chain.lists.contains(&None);
        let mut replaced = Vec::new();
        let mut waiting: Vec<Option<SnapshotName>> = Vec::new();
        let mut since = chain.since;
        let mut is_first = true;
        for list in &chain.lists {
            waiting.push(*list);
            let Some(name) = list.filter(|name| kept.contains(name)) else {
                continue;
            };
            let has_removed = waiting.iter().flatten().any(|name| removed.contains(name));
            let target = match is_first {
                true => {
                    waiting.pop();
                    None
                }
                false => Some(name),
            };
            if has_removed && !(target.is_none() && has_other_base) {
                match self.merge(&waiting, target, since, &mut lists) {
                    Ok(()) => replaced.push(target.map_or_else(|| BASE.to_owned(), name_of)),
                    // The others can be folded.
                    Err(error) => {
                        tracing::warn!(%error, "some lists of removed snapshots stay as they are");
                    }
                }
            }
            since = Some(name);
            is_first = false;
            waiting.clear();
        }
        if chain.since.is_none() {
            let listed: BTreeSet<SnapshotName> = chain.lists.iter().flatten().copied().collect();
            for name in removed.difference(&listed) {
                self.remove(&name_of(*name), &mut lists)?;
            }
        }
        Ok((lists, replaced))
    }

    fn bytes(&self, name: &str) -> u64 {
        let about = statat(&self.folder.state, name, AtFlags::SYMLINK_NOFOLLOW);
        about.map_or(0, |about| u64::try_from(about.st_size).unwrap_or(0))
    }

    /// Opens a list: this machine's copy, if it is as long.
    fn open(&self, name: &str) -> io::Result<File> {
        let copy = self
            .local
            .and_then(|local| File::open(local.join(name)).ok());
        let is_as_long = |copy: &File| {
            copy.metadata()
                .is_ok_and(|about| about.len() == self.bytes(name))
        };
        match copy.filter(is_as_long) {
            Some(copy) => Ok(copy),
            None => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                Ok(openat(&self.folder.state, name, flags, Mode::empty())?.into())
            }
        }
    }

    /// Follows the lists back from the newest one. One that can't be read ends the chain, as a missing one does.
    fn chain(&self, lists: &BTreeSet<String>) -> io::Result<Chain> {
        let head = |name: &str| Ok::<_, io::Error>(ListLines::begin(self.open(name)?)?.head);
        let base = lists.contains(BASE).then(|| head(BASE).ok()).flatten();
        let mut before: BTreeMap<SnapshotName, Option<SnapshotName>> = BTreeMap::new();
        let mut chain = Vec::new();
        let mut at = self.newest;
        let since = loop {
            let since = match head(&name_of(at)) {
                Ok(head) => head.since,
                Err(error) if chain.is_empty() => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, list = %at, "a list of changes can't be used");
                    break Some(at);
                }
            };
            chain.push(Some(at));
            // A chain that comes back to itself is no chain.
            if before.insert(at, since).is_some() {
                return Err(io::Error::other("the lists name each other"));
            }
            match (since, &base) {
                (Some(name), Some(base)) if base.snapshot == Some(name) => {
                    chain.push(None);
                    break base.since;
                }
                (Some(name), _) if lists.contains(&name_of(name)) => at = name,
                (since, _) => break since,
            }
        };
        chain.reverse();
        Ok(Chain {
            lists: chain,
            since,
        })
    }

    /// Replaces the list of `target` (`None`: the base) by all of these, the last of which it may be.
    fn merge(
        &self,
        from: &[Option<SnapshotName>],
        target: Option<SnapshotName>,
        since: Option<SnapshotName>,
        lists: &mut BTreeSet<String>,
    ) -> io::Result<()> {
        let name = |list: &Option<SnapshotName>| list.map_or_else(|| BASE.to_owned(), name_of);
        let open = || from.iter().map(|list| self.open(&name(list))).collect();
        let covers = target.or(from.iter().copied().flatten().next_back());
        let into = name(&target);
        let fill = |file: &mut File| -> io::Result<()> {
            let mut lines = Lines::begin(file)?;
            let merging = Merging::begin(&open)?;
            lines.write(&First {
                complete: merging.complete().filter(|_| target.is_some()),
                folded: true,
                compared: merging.compared(),
                written: merging.written(),
                ..First::new(&self.folder.job.job, covers, since)
            })?;
            let last = merging.run(&mut |line| lines.write(line))?;
            lines.write(&last)?;
            lines.end()?;
            // What is in it is removed next, so it must be durable.
            file.sync_all()
        };
        replace_with(&self.folder.state, &into, fill, |error| error)?;
        lists.insert(into.clone());
        for list in from.iter().map(name).filter(|list| *list != into) {
            self.remove(&list, lists)?;
        }
        Ok(())
    }

    fn remove(&self, name: &str, lists: &mut BTreeSet<String>) -> io::Result<()> {
        unlinkat(&self.folder.state, name, AtFlags::empty())?;
        lists.remove(name);
        Ok(())
    }
}

/// Copies lists of the volume to this machine, and removes the copies of those that are gone. `replaced`: those that
/// were folded now. If another machine has made or folded lists, too, those are copied as well.
pub(super) fn mirror(
    folder: &RunFolder,
    local: &Path,
    lists: &BTreeSet<String>,
    replaced: &[String],
) -> io::Result<()> {
    let volume = folder.job.path.join(crate::job::STATE_FOLDER);
    let mut copies: BTreeMap<String, u64> = BTreeMap::new();
    let mut gone: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(local)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let run = name.strip_suffix(SUFFIX);
        let is_run = run.is_some_and(|run| SnapshotName::parse(run).is_ok());
        match lists.contains(&name) {
            true => drop(copies.insert(name, entry.metadata()?.len())),
            false if is_run => gone.push(entry.path()),
            false => {}
        }
    }
    let is_own = |name: &String| copies.contains_key(name) || replaced.contains(name);
    let all_own = lists.iter().all(is_own) && (gone.is_empty() || !replaced.is_empty());
    let mut left = COPIED_MAX;
    for name in lists {
        // As long as only this machine makes lists, the others need not be examined on the volume.
        let differs = !all_own && {
            let there = volume.join(name).symlink_metadata();
            let bytes = there.map_or(0, |there| there.len());
            let fits = copies.get(name) != Some(&bytes) && bytes <= left;
            left -= if fits { bytes } else { 0 };
            fits
        };
        if replaced.contains(name) || differs {
            let mut list = crate::long_path::open_regular(&volume.join(name))?;
            crate::local_file::replace(&local.join(name), |copy| {
                io::copy(&mut list, copy).map(drop)
            })?;
        }
    }
    for path in gone {
        std::fs::remove_file(path)?;
    }
    Ok(())
}
