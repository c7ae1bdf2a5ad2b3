//! The versions of a path over all snapshots of a job: when it came, changed and went.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::Tree;
use sprat_snapshot::{Cancel, EntryKind, JobName, SnapshotError};

use crate::answer::{Place, escaped, go_on};
use sprat_snapshot::seen::{Change, Found, Kind, Seen};

/// Which path's versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionsSpec {
    /// The path. Its snapshot does not matter.
    pub place: Place,
}

/// One version of a path: it is the same in all snapshots from `first` to `last`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The oldest snapshot that has it.
    pub first: String,
    /// The newest one.
    pub last: String,
    /// How many have it.
    pub snapshots: u64,
    /// How it differs from the version before.
    pub change: Change,
    /// Its attributes, in `first`.
    #[serde(flatten)]
    pub found: Found,
    /// The snapshot after `last`, if it lacks the path.
    pub gone: Option<Gone>,
}

/// A snapshot that lacks a path which the one before it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// The snapshot.
    pub snapshot: String,
    /// Whether it has all that was to be backed up. If not, the path may only be unread.
    pub complete: bool,
}

/// The versions of one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionsReport {
    /// The job.
    pub job: String,
    /// The path, escaped.
    pub path: String,
    /// How many finished snapshots the job has.
    pub snapshots: u64,
    /// Oldest first.
    pub versions: Vec<Version>,
}

/// Finds the versions of a path. Examines it once in each finished snapshot, and reads no content.
///
/// # Errors
/// There is no such job, no snapshot has the path, or the volume can't be read.
pub fn versions(
    volume_root: &Path,
    spec: &VersionsSpec,
    cancel: &Cancel,
) -> Result<VersionsReport, SnapshotError> {
    let job: &JobName = &spec.place.job;
    let trees = Tree::finished(volume_root, job)?;
    let path = spec.place.path();
    let mut history = History::new(&trees, &path);
    for number in 0..trees.len() {
        go_on(cancel)?;
        history.meet(number)?;
    }
    history.end_before(trees.len());
    let report = VersionsReport {
        job: job.to_string(),
        path: escaped(&path),
        snapshots: trees.len() as u64,
        versions: history.versions,
    };
    if report.versions.is_empty() {
        let newest = trees.last().map(|newest| newest.no_such(&path));
        let refused = newest.filter(|why| matches!(why, SnapshotError::PathRefused { .. }));
        return Err(no_versions(report, refused));
    }
    Ok(report)
}

/// No snapshot has the path. `refused`: no snapshot can have it.
pub(crate) fn no_versions(report: VersionsReport, refused: Option<SnapshotError>) -> SnapshotError {
    refused.unwrap_or(SnapshotError::NoSuchPathInJob {
        job: report.job,
        path: report.path,
    })
}

/// The versions of one path so far.
pub(crate) struct History<'t> {
    trees: &'t [Tree],
    path: &'t Path,
    pub(crate) versions: Vec<Version>,
    /// What the snapshot that was met last has there, and the number of that snapshot.
    last: Option<(usize, Last)>,
}

/// Where the newest version was seen first: for attributes that are compared only where nothing else differs.
struct Last {
    seen: Seen,
    first: usize,
}

impl<'t> History<'t> {
    pub(crate) fn new(trees: &'t [Tree], path: &'t Path) -> Self {
        Self {
            trees,
            path,
            versions: Vec::new(),
            last: None,
        }
    }

    /// Continues with a snapshot that has the path, as the list of the folder has shown it: under the number
    /// of this inode. All snapshots are in one file system.
    pub(crate) fn meet_listed(&mut self, number: usize, inode: u64) -> Result<(), SnapshotError> {
        self.end_before(number);
        if let Some((at, last)) = &mut self.last
            && last.seen.inode == inode
            && last.seen.found.kind != Kind::Folder
            && let Some(version) = self.versions.last_mut()
        {
            *at = number;
            version.last.clone_from(&self.trees[number].folder);
            version.snapshots += 1;
            return Ok(());
        }
        self.meet(number)
    }

    /// Examines the path in a snapshot.
    pub(crate) fn meet(&mut self, number: usize) -> Result<(), SnapshotError> {
        self.end_before(number);
        let tree = &self.trees[number];
        let failed = |error| tree.failed("examine", self.path, error);
        let Some((folder, name)) = tree.place(self.path)? else {
            return Ok(());
        };
        let Some(seen) = Seen::of(&folder, &name).map_err(failed)? else {
            return Ok(());
        };
        let change = match &self.last {
            None => Some(Change::New),
            Some((_, last)) => last
                .seen
                .change(&seen, || {
                    let before = &self.trees[last.first];
                    match before.place(self.path) {
                        Ok(Some((its_folder, its_name))) => {
                            its_folder.has_equal_xattrs(&its_name, &folder, &name)
                        }
                        _ => Ok(false),
                    }
                })
                .map_err(failed)?,
        };
        match (change, self.versions.last_mut()) {
            (None, Some(version)) => {
                version.last.clone_from(&tree.folder);
                version.snapshots += 1;
                if let Some((at, last)) = &mut self.last {
                    *at = number;
                    last.seen = seen;
                }
            }
            (change, _) => {
                self.versions.push(Version {
                    first: tree.folder.clone(),
                    last: tree.folder.clone(),
                    snapshots: 1,
                    change: change.unwrap_or(Change::New),
                    found: seen.found.clone(),
                    gone: None,
                });
                self.last = Some((
                    number,
                    Last {
                        seen,
                        first: number,
                    },
                ));
            }
        }
        Ok(())
    }

    /// If snapshots before this one lack the path, the version before ended there.
    pub(crate) fn end_before(&mut self, number: usize) {
        let Some((at, _)) = self.last else {
            return;
        };
        if at + 1 >= number {
            return;
        }
        self.last = None;
        let without = &self.trees[at + 1];
        if let Some(version) = self.versions.last_mut() {
            version.gone = Some(Gone {
                snapshot: without.folder.clone(),
                complete: without.kind() == EntryKind::Complete,
            });
        }
    }
}
