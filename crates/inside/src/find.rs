//! Finds paths by a pattern in all snapshots at once.
//!
//! The trees of all snapshots of a job are walked together, folder by folder. A folder's list shows names,
//! types and inode numbers, so only a version of a path that matches is examined.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::Tree;
use sprat_snapshot::{Cancel, JobName, SnapshotError};

use crate::answer::{escaped, go_on, leads_on};
use crate::pattern::Pattern;
use crate::room::Room;
use crate::versions::{History, Version};

/// What to find.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindSpec {
    /// In the snapshots of this job; `None`: of all.
    pub job: Option<JobName>,
    /// See [`Pattern::parse`].
    pub pattern: String,
    /// Capital and small letters are the same.
    pub ignore_case: bool,
}

/// The paths that match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindReport {
    /// The jobs that were searched.
    pub jobs: Vec<SearchedJob>,
    /// By job and path.
    pub paths: Vec<PathHistory>,
    /// How many more match.
    pub more: u64,
}

/// A job that was searched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SearchedJob {
    /// Its name.
    pub job: String,
    /// How many finished snapshots it has.
    pub snapshots: u64,
}

/// A path that matches, and its versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathHistory {
    /// The job.
    pub job: String,
    /// The path, escaped.
    pub path: String,
    /// Oldest first.
    pub versions: Vec<Version>,
}

impl FindReport {
    /// Adds a path that matches. If there is no room for it, it is only counted.
    pub(crate) fn add(
        &mut self,
        room: &mut Room,
        job: &JobName,
        path: &Path,
        versions: Vec<Version>,
    ) {
        let path = escaped(path);
        if !room.takes(&path, versions.iter().map(|version| &version.found)) {
            self.more += 1;
            return;
        }
        self.paths.push(PathHistory {
            job: job.to_string(),
            path,
            versions,
        });
    }
}

/// Finds the paths that match, in all finished snapshots.
///
/// # Errors
/// There is no such job, the pattern is none, or the volume can't be read.
pub fn find(
    volume_root: &Path,
    spec: &FindSpec,
    cancel: &Cancel,
) -> Result<FindReport, SnapshotError> {
    let pattern = pattern_of(spec)?;
    let jobs = match &spec.job {
        Some(job) => vec![job.clone()],
        None => sprat_snapshot::newest(volume_root)?
            .keys()
            .filter_map(|job| JobName::new(job).ok())
            .collect(),
    };
    let mut report = FindReport::default();
    let mut room = Room::new();
    for job in jobs {
        let trees = Tree::finished(volume_root, &job)?;
        report.jobs.push(SearchedJob {
            job: job.to_string(),
            snapshots: trees.len() as u64,
        });
        let first = report.paths.len();
        let search = Search {
            trees: &trees,
            pattern: &pattern,
            cancel,
        };
        search.run(&mut |path, versions| report.add(&mut room, &job, path, versions))?;
        report.paths[first..].sort_by(|one, other| one.path.cmp(&other.path));
    }
    Ok(report)
}

pub(crate) fn pattern_of(spec: &FindSpec) -> Result<Pattern, SnapshotError> {
    Pattern::parse(&spec.pattern, spec.ignore_case).map_err(|_| SnapshotError::PathRefused {
        path: spec.pattern.clone(),
        why: "is not a valid pattern",
    })
}

struct Search<'t> {
    trees: &'t [Tree],
    pattern: &'t Pattern,
    cancel: &'t Cancel,
}

/// A name in the folders of several snapshots: the numbers of the snapshots, and of the inodes there.
#[derive(Default)]
struct Name {
    there: Vec<(usize, u64)>,
    /// Those in which it is a folder.
    folders: Vec<usize>,
}

impl Search<'_> {
    fn run(&self, found: &mut dyn FnMut(&Path, Vec<Version>)) -> Result<(), SnapshotError> {
        let one_file_system = self.is_one_file_system()?;
        let everywhere = (0..self.trees.len()).collect();
        let mut waiting: Vec<(PathBuf, Vec<usize>)> =
            vec![(Path::new("/").join(self.pattern.begins()), everywhere)];
        while let Some((path, snapshots)) = waiting.pop() {
            let mut below = Vec::new();
            for (name, met) in self.names(&path, &snapshots)? {
                let path = path.join(name);
                if self.pattern.matches(&path) {
                    let mut history = History::new(self.trees, &path);
                    for (number, inode) in met.there {
                        match one_file_system {
                            true => history.meet_listed(number, inode)?,
                            false => history.meet(number)?,
                        }
                    }
                    history.end_before(self.trees.len());
                    found(&path, history.versions);
                }
                if !met.folders.is_empty() {
                    below.push((path, met.folders));
                }
            }
            waiting.extend(below.into_iter().rev());
        }
        Ok(())
    }

    /// All names that any of the snapshots has in this folder, sorted.
    fn names(
        &self,
        path: &Path,
        snapshots: &[usize],
    ) -> Result<BTreeMap<PathBuf, Name>, SnapshotError> {
        let mut names: BTreeMap<PathBuf, Name> = BTreeMap::new();
        for number in snapshots {
            go_on(self.cancel)?;
            let tree = &self.trees[*number];
            let failed = |error| tree.failed("list", path, error);
            let Some(folder) = tree.folder(path)? else {
                continue;
            };
            for entry in folder.entries().map_err(failed)? {
                let is_folder = leads_on(&folder, &entry).map_err(failed)?;
                let name = names.entry(entry.name).or_default();
                name.there.push((*number, entry.inode));
                if is_folder {
                    name.folders.push(*number);
                }
            }
        }
        Ok(names)
    }

    /// Whether one inode number means one file in all snapshots.
    fn is_one_file_system(&self) -> Result<bool, SnapshotError> {
        let mut device = None;
        for tree in self.trees {
            let stat = tree.stat(Path::new("/"))?;
            let its = stat.map(|stat| stat.st_dev);
            if *device.get_or_insert(its) != its {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
