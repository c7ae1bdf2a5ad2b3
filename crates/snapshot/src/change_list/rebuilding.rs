//! Lists once more what two finished snapshots differ in, where no list shows it for certain: the list is missing or
//! damaged, or a person could change files in the snapshots after it was made.
//!
//! The snapshots are compared as they are now. The digests come from the lists that there are: content is not read.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::{AtFlags, unlinkat};

use super::chain::Heads;
use super::merging::{Ahead, order};
use super::reading::{self, ListLines};
use super::{BASE, ChangeList, Digests, First, Known, Line, SUFFIX, name_of};
use crate::cancel::Cancel;
use crate::content::{Content, MaybeContent};
use crate::error::SnapshotError;
use crate::job::{Folder, STATE_FOLDER, on_volume, replace_with};
use crate::local_file;
use crate::long_path::open_regular;
use crate::name::SnapshotName;
use crate::seen::Found;

/// After this time a run begins no further list. The next run goes on.
const DURATION_MAX: Duration = Duration::from_secs(20);

impl ChangeList<'_> {
    /// Makes the lists of finished snapshots that can't be used on this machine. `local`: its copies.
    pub(super) fn rebuild(&self, local: &Path, cancel: &Cancel) -> Result<(), SnapshotError> {
        let begun = Instant::now();
        let own = self.folder.job.own_folders()?.into_iter();
        let finished = own.filter(|folder| matches!(folder, Folder::Named(_)));
        let mut before = None;
        let volume = self.folder.job.path.join(STATE_FOLDER);
        let base = local.join(BASE);
        if base.exists() && Heads::open(local, &self.folder.job.job).is_err() {
            // The lists that it leads to are copied or made again.
            let _ = std::fs::remove_file(base);
        }
        for snapshot in finished.map(Folder::name) {
            // The list of this run was made just now.
            if snapshot == self.tree.name() {
                break;
            }
            if self.right_lists(local, snapshot, before).is_none() {
                if begun.elapsed() > DURATION_MAX || cancel.is_cancelled() {
                    break;
                }
                let on_volume = self.right_lists(&volume, snapshot, before);
                match on_volume.filter(|lists| lists.iter().all(|list| is_whole(list))) {
                    Some(lists) => copy(&lists, local)?,
                    None => self.list_again(local, snapshot, before, cancel)?,
                }
            }
            before = Some(snapshot);
        }
        Ok(())
    }

    /// The lists in a folder that lead to `snapshot` from `before`, if they can be used.
    fn right_lists(
        &self,
        folder: &Path,
        snapshot: SnapshotName,
        before: Option<SnapshotName>,
    ) -> Option<Vec<PathBuf>> {
        let heads = Heads::open(folder, &self.folder.job.job).ok()?;
        let step = heads.step(snapshot, before).ok()?;
        let is_right = self.edited.is_none_or(|edited| step.is_made_after(edited));
        is_right.then_some(step.lists)
    }

    fn list_again(
        &self,
        local: &Path,
        snapshot: SnapshotName,
        before: Option<SnapshotName>,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        // Without a record it is not known whether the snapshot is complete. No list can show that.
        let Ok(record) = self.folder.job.record(snapshot) else {
            return Ok(());
        };
        let name = name_of(snapshot);
        let failed = |error| on_volume("write", &name)(error);
        // A clock that ran ahead must not make the next run list it again.
        let now = Timestamp::now();
        let after_edits = self.edited.map(|edited| edited + Duration::from_nanos(1));
        let again = ChangeList {
            tree: Folder::Named(snapshot),
            since: before.map(Folder::Named),
            interrupted: false,
            complete: record.complete,
            ..*self
        };
        let first = First {
            complete: Some(record.complete),
            compared: Some(after_edits.map_or(now, |edited| edited.max(now))),
            ..First::new(&self.folder.job.job, Some(snapshot), before)
        };
        let lists = self
            .lists_between(local, before, snapshot)
            .map_err(failed)?;
        let mut digests = Digests::Listed(Older::open(&lists).map_err(failed)?);
        let fill = |file: &mut File| {
            // A finished snapshot stays as it is.
            let last = again.fill(file, &first, &mut digests, &|_, _, _| {}, cancel)?;
            match last.finished {
                true => Ok(()),
                false => Err(SnapshotError::ReadCancelled),
            }
        };
        let made = replace_with(&self.folder.state, &name, fill, failed)?;
        let list = self.folder.job.path.join(STATE_FOLDER).join(&name);
        copy(&[list], local)?;
        if before.is_none() && lists.iter().any(|list| list.ends_with(BASE)) {
            // All that it has is in the new list, and nothing leads to it any more.
            made.sync_all().map_err(failed)?;
            let _ = unlinkat(&self.folder.state, BASE, AtFlags::empty());
            let _ = std::fs::remove_file(local.join(BASE));
        }
        tracing::info!(list = %name, "the changes of a snapshot were listed again");
        Ok(())
    }

    /// The lists of the runs after `before` and up to `snapshot` that can be read to their end, oldest first.
    fn lists_between(
        &self,
        local: &Path,
        before: Option<SnapshotName>,
        snapshot: SnapshotName,
    ) -> io::Result<Vec<PathBuf>> {
        let volume = self.folder.job.path.join(STATE_FOLDER);
        let mut found: BTreeMap<Option<SnapshotName>, PathBuf> = BTreeMap::new();
        for folder in [local, &volume] {
            for entry in std::fs::read_dir(folder)? {
                let name = entry?.file_name();
                let run = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
                let run = run.and_then(|run| SnapshotName::parse(run).ok());
                let is_wanted = match run {
                    Some(run) => Some(run) > before && run <= snapshot,
                    None => before.is_none() && name == BASE,
                };
                let path = folder.join(&name);
                if is_wanted && !found.contains_key(&run) && is_whole(&path) {
                    found.insert(run, path);
                }
            }
        }
        Ok(found.into_values().collect())
    }
}

/// Copies lists to this machine.
fn copy(lists: &[PathBuf], local: &Path) -> Result<(), SnapshotError> {
    for list in lists {
        let name = list.file_name().unwrap_or_default();
        let kept = open_regular(list).and_then(|mut list| {
            local_file::replace(&local.join(name), |copy| {
                io::copy(&mut list, copy).map(drop)
            })
        });
        kept.map_err(|source| SnapshotError::System {
            op: "keep a list of changes",
            source,
        })?;
    }
    Ok(())
}

/// Whether a list can be read to its end, where its checksum is.
fn is_whole(list: &Path) -> bool {
    let read = open_regular(list).and_then(|file| reading::read(file, &mut |_: MaybeContent| {}));
    read.is_ok()
}

/// The digests that older lists have, by path.
pub(super) struct Older {
    lists: Vec<Ahead>,
    /// Those whose path has something else now, or nothing. A later snapshot may share the file.
    without_path: Vec<Content>,
}

impl Older {
    fn open(lists: &[PathBuf]) -> io::Result<Self> {
        let mut older = Self {
            lists: Vec::new(),
            without_path: Vec::new(),
        };
        for list in lists {
            let lines = ListLines::begin(open_regular(list)?)?;
            older
                .lists
                .push(Ahead::begin(lines, &mut older.without_path)?);
        }
        Ok(older)
    }

    /// What the newest list has about the content of `after` at `path`. The paths come in the order of the lists.
    pub(super) fn of(&mut self, path: &Path, after: Option<&Found>) -> io::Result<Option<Known>> {
        let mut known = None;
        for list in &mut self.lists {
            while let Some((next, _)) = &list.next {
                let order = order(next, path);
                if order == Ordering::Greater {
                    break;
                }
                let line = list.advance(&mut self.without_path)?;
                let Some((line, content)) = line.and_then(Line::with_content) else {
                    continue;
                };
                match order == Ordering::Equal && after.is_some() && line.after.as_ref() == after {
                    true => known = Some((content, line.read_by)),
                    false => self.without_path.push(content),
                }
            }
        }
        Ok(known)
    }

    /// What is left.
    pub(super) fn rest(&mut self) -> io::Result<Vec<Content>> {
        for list in &mut self.lists {
            while let Some(line) = list.advance(&mut self.without_path)? {
                self.without_path.extend(line.content);
            }
        }
        Ok(std::mem::take(&mut self.without_path))
    }
}
