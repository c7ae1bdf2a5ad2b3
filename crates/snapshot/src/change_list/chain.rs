//! What the lists of this machine say about the finished snapshots of a job: a chain from nothing to the newest one.
//!
//! A list counts only if it leads from the snapshot before, and was read to its end. So an answer is that of the
//! volume, or there is none.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Deserialize;

use super::merging::order;
use super::reading::{ListHead, ListLines};
use super::{BASE, name_of};
use crate::choice::{self, SnapshotChoice};
use crate::error::SnapshotError;
use crate::name::{JobName, SnapshotName};
use crate::record::EntryKind;
use crate::seen::{Change, Found};
use crate::text::unescape_path;

/// The lists that this machine keeps of a container, and which snapshots that had when it was last noted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lists {
    /// It has a folder for each job.
    pub folder: PathBuf,
    /// The finished snapshots of each job, oldest first.
    pub snapshots: BTreeMap<String, Vec<SnapshotName>>,
    /// Until then a person could change files in snapshots.
    pub edited: Option<Timestamp>,
}

/// The lists of a job that lead to each of its finished snapshots.
#[derive(Debug)]
pub struct ListChain {
    job: String,
    /// Oldest first.
    steps: Vec<Step>,
}

/// What leads from one snapshot to the next.
#[derive(Debug)]
pub(super) struct Step {
    snapshot: SnapshotName,
    complete: bool,
    /// Oldest first. Those of removed snapshots come before that of this one.
    pub(super) lists: Vec<PathBuf>,
    /// All of it was found by one comparison of the two snapshots.
    is_exact: bool,
    /// When the oldest of the lists was made. `None`: that is not known.
    made: Option<Timestamp>,
}

/// A path that a run found changed.
#[derive(Debug, Clone)]
pub struct ListedChange {
    /// The path.
    pub path: PathBuf,
    /// How it was changed.
    pub change: Change,
    /// What the older side has.
    pub before: Option<Found>,
    /// What the newer side has.
    pub after: Option<Found>,
}

/// What a line has about a path. Nothing else of the line is read.
#[derive(Deserialize)]
struct PathLine {
    path: Option<String>,
    change: Option<Change>,
    before: Option<Found>,
    after: Option<Found>,
}

/// Receives each change of a list.
pub type OnListed<'c> = dyn FnMut(ListedChange) -> Result<(), SnapshotError> + 'c;

const MISSING: &str = "is not on this machine";
const DAMAGED: &str = "is damaged";
const UNFINISHED: &str = "does not have all changes";
const BROKEN: &str = "does not continue that of the snapshot before";

impl Lists {
    /// The lists of a job.
    ///
    /// # Errors
    /// There was no such job, or its lists don't lead to each of its snapshots.
    pub fn chain(&self, job: &JobName) -> Result<ListChain, SnapshotError> {
        let none = || SnapshotError::NotInLists {
            what: format!("the container had no finished snapshot of job {job}"),
        };
        let finished = self.snapshots.get(job.as_str()).ok_or_else(none)?;
        if finished.is_empty() {
            return Err(none());
        }
        let chain = ListChain::open(&self.folder.join(job.as_str()), job, finished)?;
        if self
            .edited
            .is_some_and(|edited| !chain.is_made_after(edited))
        {
            return Err(SnapshotError::NotInLists {
                what: format!(
                    "the container was mounted with --rw, so files in snapshots of job {job} may have been changed \
                     by hand. The next backup lists them again"
                ),
            });
        }
        Ok(chain)
    }
}

impl ListChain {
    /// Follows the lists in a folder back from the newest snapshot.
    fn open(
        folder: &Path,
        job: &JobName,
        finished: &[SnapshotName],
    ) -> Result<Self, SnapshotError> {
        let heads = Heads::open(folder, job.as_str())?;
        let mut steps = Vec::new();
        let mut waiting = finished.iter().rev().copied().peekable();
        while let Some(snapshot) = waiting.next() {
            steps.push(heads.step(snapshot, waiting.peek().copied())?);
        }
        steps.reverse();
        Ok(Self {
            job: job.to_string(),
            steps,
        })
    }

    /// Whether all lists were made after `edited`. If not, one may be of a snapshot that was changed by hand since, also
    /// when that snapshot is gone.
    fn is_made_after(&self, edited: Timestamp) -> bool {
        self.steps.iter().all(|step| step.is_made_after(edited))
    }

    /// How many snapshots there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.steps.len()
    }

    /// The name of one of them.
    #[must_use]
    pub fn snapshot(&self, number: usize) -> SnapshotName {
        self.steps[number].snapshot
    }

    /// What one of them is.
    #[must_use]
    pub fn kind(&self, number: usize) -> EntryKind {
        match self.steps[number].complete {
            true => EntryKind::Complete,
            false => EntryKind::Incomplete,
        }
    }

    /// Whether the changes up to a snapshot are those between it and the one before. If not, several runs may have
    /// changed a path.
    #[must_use]
    pub fn is_exact(&self, number: usize) -> bool {
        self.steps[number].is_exact
    }

    /// The number of the snapshot that `choice` means.
    ///
    /// # Errors
    /// None of them.
    pub fn find(&self, choice: &SnapshotChoice) -> Result<usize, SnapshotError> {
        let names = self.steps.iter().map(|step| step.snapshot).collect();
        let is_complete = |name| {
            let mut steps = self.steps.iter();
            steps.any(|step| step.snapshot == name && step.complete)
        };
        // The names are in the order of the runs: each list leads back to an older name.
        let found = choice::among(names, choice, &is_complete);
        let at = |name| self.steps.iter().position(|step| step.snapshot == name);
        found.and_then(at).ok_or_else(|| SnapshotError::NotInLists {
            what: format!(
                "job {} had no finished snapshot {}",
                self.job,
                choice::shown(choice)
            ),
        })
    }

    /// Reads what was changed between a snapshot and the one before, run after run. What was read counts only if
    /// this succeeds.
    ///
    /// # Errors
    /// A list is damaged, or `each` failed.
    pub fn read(&self, number: usize, each: &mut OnListed<'_>) -> Result<(), SnapshotError> {
        for list in &self.steps[number].lists {
            let name = list.file_name().unwrap_or_default();
            let refused = |why| SnapshotError::ListUnusable {
                job: self.job.clone(),
                list: name.display().to_string(),
                why,
            };
            let damaged = |error: io::Error| {
                forget_copy(list, &error);
                refused(DAMAGED)
            };
            let lines = File::open(list).and_then(ListLines::begin);
            let mut lines = lines.map_err(damaged)?;
            while let Some(line) = lines.next::<PathLine>().map_err(damaged)? {
                let (Some(path), Some(change)) = (line.path, line.change) else {
                    continue;
                };
                each(ListedChange {
                    path: unescape_path(&path),
                    change,
                    before: line.before,
                    after: line.after,
                })?;
            }
            if lines.finished != Some(true) {
                forget_copy(list, &io::ErrorKind::InvalidData.into());
                return Err(refused(UNFINISHED));
            }
        }
        Ok(())
    }

    /// Why the lists are not to be trusted: they contradict each other about a path.
    #[must_use]
    pub fn contradiction(&self, number: usize) -> SnapshotError {
        SnapshotError::ListUnusable {
            job: self.job.clone(),
            list: name_of(self.steps[number].snapshot),
            why: "contradicts those before it",
        }
    }
}

impl Step {
    pub(super) fn is_made_after(&self, edited: Timestamp) -> bool {
        self.made.is_some_and(|made| made > edited)
    }
}

/// The lists of a job on this machine, by their first lines.
pub(super) struct Heads<'f> {
    folder: &'f Path,
    job: &'f str,
    base: Option<ListHead>,
}

impl<'f> Heads<'f> {
    pub(super) fn open(folder: &'f Path, job: &'f str) -> Result<Self, SnapshotError> {
        let mut heads = Self {
            folder,
            job,
            base: None,
        };
        if folder.join(BASE).exists() {
            heads.base = Some(heads.head(BASE)?);
        }
        Ok(heads)
    }

    fn refused(&self, list: &str, why: &'static str) -> SnapshotError {
        SnapshotError::ListUnusable {
            job: self.job.to_owned(),
            list: list.to_owned(),
            why,
        }
    }

    fn head(&self, name: &str) -> Result<ListHead, SnapshotError> {
        let lines = File::open(self.folder.join(name)).and_then(ListLines::begin);
        let head = lines.map(|lines| lines.head);
        head.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.refused(name, MISSING),
            _ => self.refused(name, DAMAGED),
        })
    }

    /// What leads to `snapshot` from `before`, over the lists of snapshots between them that were removed.
    pub(super) fn step(
        &self,
        snapshot: SnapshotName,
        before: Option<SnapshotName>,
    ) -> Result<Step, SnapshotError> {
        let name = name_of(snapshot);
        let mut lists = Vec::new();
        let mut newest = None;
        let mut made = Some(Timestamp::MAX);
        let mut since = Some(snapshot);
        while let Some(at) = since.filter(|at| Some(*at) != before) {
            let base = self.base.as_ref().filter(|base| base.snapshot == Some(at));
            if let Some(base) = base.filter(|_| at != snapshot) {
                if base.since.is_some_and(|since| since >= at) {
                    return Err(self.refused(BASE, BROKEN));
                }
                lists.push(self.folder.join(BASE));
                made = made.min(base.made());
                since = base.since;
                continue;
            }
            let its = name_of(at);
            let head = self.head(&its)?;
            let leads_back = head.since.is_none_or(|since| since < at);
            if head.snapshot != Some(at) || !leads_back {
                return Err(self.refused(&its, BROKEN));
            }
            lists.push(self.folder.join(&its));
            made = made.min(head.made());
            since = head.since;
            newest.get_or_insert((head.complete, head.folded));
        }
        let (complete, folded) = newest.ok_or_else(|| self.refused(&name, BROKEN))?;
        if since != before {
            return Err(self.refused(&name, BROKEN));
        }
        let Some(complete) = complete else {
            return Err(self.refused(&name, UNFINISHED));
        };
        lists.reverse();
        Ok(Step {
            snapshot,
            complete,
            is_exact: lists.len() == 1 && !folded,
            lists,
            made,
        })
    }
}

/// Empties this machine's copy of a list that is damaged: the next run makes the list again. `error`: why it can't be
/// used.
pub(crate) fn forget_copy(list: &Path, error: &io::Error) {
    // The disk may be able to read it later.
    let is_content = error.raw_os_error().is_none() && error.kind() != io::ErrorKind::Unsupported;
    if is_content {
        let _ = File::options().write(true).truncate(true).open(list);
    }
}

/// The order of paths in an answer of [`crate::tree_changes::changes`].
#[must_use]
pub fn path_order(one: &Path, other: &Path) -> Ordering {
    order(one, other)
}
