//! Chooses the files of a drill.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashSet};
use std::fs::Metadata;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{DrillReport, DrillSpec};
use crate::cancel::Cancel;
use crate::check::Key;
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder};
use crate::list::newest;
use crate::long_path;
use crate::name::{JobName, SnapshotName};
use crate::scout::Scout;
use crate::suspects::Suspects;
use crate::text::escape_path;
use crate::walk::open_folder_at;
use crate::without_place;

/// Of a large file so many bytes are read at each of three places.
pub(super) const PART_BYTES: u64 = 8 << 20;
/// The part of the time for listing the newest snapshots, and for listing the older one.
const LISTING_SHARE: u32 = 4;

/// A job with finished snapshots.
pub(super) struct Job {
    pub(super) name: JobName,
    /// Oldest first.
    pub(super) snapshots: Vec<SnapshotName>,
    /// Whether its sources are on this machine.
    pub(super) is_here: bool,
}

/// A file to restore.
#[derive(Clone)]
pub(super) struct Sampled {
    /// Its place in [`Sample::jobs`].
    pub(super) job: usize,
    pub(super) snapshot: SnapshotName,
    /// Relative to the snapshot.
    pub(super) path: PathBuf,
    pub(super) about: Metadata,
    /// The source has no such path: it comes from a command or another host.
    pub(super) is_without_place: bool,
    /// It is too large to be restored as a whole.
    pub(super) in_parts: bool,
}

/// The files to restore, those of one snapshot together.
pub(super) struct Sample {
    pub(super) jobs: Vec<Job>,
    pub(super) files: Vec<Sampled>,
}

/// Those with the lowest rank.
struct Best {
    most: usize,
    files: BTreeMap<(i128, u64), Sampled>,
}

impl Best {
    fn new(most: usize) -> Self {
        Self {
            most,
            files: BTreeMap::new(),
        }
    }

    fn offer(&mut self, rank: (i128, u64), file: &Sampled) {
        let is_full = self.files.len() >= self.most;
        let is_better = |last: &(i128, u64)| rank < *last;
        if !is_full
            || self
                .files
                .last_key_value()
                .is_some_and(|(last, _)| is_better(last))
        {
            self.files.insert(rank, file.clone());
            if self.files.len() > self.most {
                self.files.pop_last();
            }
        }
    }
}

/// Lists the newest snapshot of each job and an older one, and chooses. What can't be listed is reported.
pub(super) fn choose(
    root: &Path,
    spec: &DrillSpec,
    suspects: &Suspects,
    report: &mut DrillReport,
    begun: Instant,
    cancel: &Cancel,
) -> Result<Sample, SnapshotError> {
    let jobs = jobs(root, spec)?;
    let most = spec.files_max;
    let (mut biggest, mut oldest, mut recent) = (Best::new(most), Best::new(most), Best::new(most));
    let (mut any, mut of_old) = (Best::new(most), Best::new(most));
    report.listed_all = true;
    let mut walk = |until: Instant, job: usize, snapshot, meet: &mut dyn FnMut(&Sampled, u64)| {
        let walk = Walk {
            root,
            seed: spec.seed,
            until,
            cancel,
        };
        walk.run(&jobs, job, snapshot, report, meet)
    };
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|job| draw(spec.seed, jobs[*job].name.as_str()));
    let until = begun + spec.duration_max / LISTING_SHARE;
    for job in order {
        let Some(snapshot) = jobs[job].snapshots.last() else {
            continue;
        };
        walk(until, job, *snapshot, &mut |file, drawn| {
            let modified = i128::from(file.about.mtime());
            biggest.offer((-i128::from(file.about.len()), drawn), file);
            oldest.offer((modified, drawn), file);
            recent.offer((-modified, drawn), file);
            any.offer((0, drawn), file);
        })?;
    }
    if let Some((job, snapshot)) = an_older_one(&jobs, spec.seed) {
        let until = begun + spec.duration_max / LISTING_SHARE * 2;
        walk(until, job, snapshot, &mut |file, drawn| {
            of_old.offer((0, drawn), file);
        })?;
    }
    let known_bad = suspected(root, &jobs, suspects);
    let mut lists: Vec<Vec<Sampled>> = [of_old, biggest, any, oldest, recent]
        .into_iter()
        .map(|best| best.files.into_values().rev().collect())
        .collect();
    lists.insert(0, known_bad);
    let mut files = pick(lists, spec);
    files.sort_by(|one, other| {
        let order = |file: &Sampled| (file.job, file.snapshot, file.in_parts);
        (order(one), &one.path).cmp(&(order(other), &other.path))
    });
    Ok(Sample { jobs, files })
}

fn jobs(root: &Path, spec: &DrillSpec) -> Result<Vec<Job>, SnapshotError> {
    let mut jobs = Vec::new();
    for name in newest(root)?
        .keys()
        .filter_map(|job| JobName::new(job).ok())
    {
        let folder = JobFolder::open(root, Path::new(name.as_str()))?;
        let snapshots = folder
            .own_folders()?
            .into_iter()
            .filter_map(|own| match own {
                Folder::Named(name) => Some(name),
                _ => None,
            });
        jobs.push(Job {
            snapshots: snapshots.collect(),
            is_here: spec.jobs_here.contains(&name),
            name,
        });
    }
    Ok(jobs)
}

/// One of all snapshots that are not the newest of their job.
fn an_older_one(jobs: &[Job], seed: u64) -> Option<(usize, SnapshotName)> {
    let older = jobs.iter().enumerate().flat_map(|(job, about)| {
        let (_, older) = about.snapshots.split_last()?;
        Some(older.iter().map(move |snapshot| (job, *snapshot)))
    });
    older
        .flatten()
        .min_by_key(|(job, snapshot)| draw(seed, (jobs[*job].name.as_str(), snapshot.to_string())))
}

/// Files that are known as damaged are always read again: else a drill could pass while they are.
fn suspected(root: &Path, jobs: &[Job], suspects: &Suspects) -> Vec<Sampled> {
    let of_suspect = |suspect: &crate::suspects::Suspect| {
        let mut steps = suspect.path.components();
        let job = steps.next()?;
        let snapshot = SnapshotName::parse(steps.next()?.as_os_str().to_str()?).ok()?;
        let is_it = |one: &Job| job.as_os_str() == one.name.as_str();
        let job = jobs.iter().position(is_it)?;
        let about = long_path::lstat(&root.join(&suspect.path)).ok()?;
        let path = steps.as_path().to_owned();
        (jobs[job].snapshots.contains(&snapshot) && Key::of(&about) == suspect.key).then(|| {
            Sampled {
                job,
                snapshot,
                is_without_place: tops(root, &jobs[job], snapshot)
                    .iter()
                    .any(|top| path.starts_with(top)),
                path,
                about,
                in_parts: false,
            }
        })
    };
    let damaged = suspects.files.values().filter(|suspect| suspect.damaged);
    damaged.filter_map(of_suspect).collect()
}

/// Takes one of each list in turn, as long as there is room.
fn pick(mut lists: Vec<Vec<Sampled>>, spec: &DrillSpec) -> Vec<Sampled> {
    let mut left = spec.bytes_max;
    let mut seen = HashSet::new();
    let mut files = Vec::new();
    while lists.iter().any(|list| !list.is_empty()) {
        for list in &mut lists {
            while let Some(mut file) = list.pop() {
                file.in_parts = file.about.len() > spec.bytes_max / 2;
                let bytes = match file.in_parts {
                    true => file.about.len().min(PART_BYTES * 3),
                    false => file.about.len(),
                };
                if files.len() < spec.files_max
                    && bytes <= left
                    && seen.insert(Key::of(&file.about))
                {
                    left -= bytes;
                    files.push(file);
                    break;
                }
            }
        }
    }
    files
}

fn tops(root: &Path, job: &Job, snapshot: SnapshotName) -> Vec<PathBuf> {
    let record = JobFolder::open(root, Path::new(job.name.as_str()))
        .ok()
        .and_then(|folder| folder.record(snapshot).ok());
    record.as_ref().map(without_place::tops).unwrap_or_default()
}

struct Walk<'a> {
    root: &'a Path,
    seed: u64,
    until: Instant,
    cancel: &'a Cancel,
}

impl Walk<'_> {
    /// Calls `meet` with each regular file that has content, and with a number that is drawn for it.
    fn run(
        &self,
        jobs: &[Job],
        job: usize,
        snapshot: SnapshotName,
        report: &mut DrillReport,
        meet: &mut dyn FnMut(&Sampled, u64),
    ) -> Result<(), SnapshotError> {
        let folder = self.root.join(jobs[job].name.as_str());
        let top = folder.join(snapshot.to_string());
        let tops = tops(self.root, &jobs[job], snapshot);
        // On a slow connection the folders are listed much sooner.
        let trees = vec![PathBuf::from(snapshot.to_string())];
        let scout = open_folder_at(&folder).map(|at| Scout::begin(at, trees, None));
        let mut listed = 0;
        long_path::each(&top, &mut |path, about| {
            if self.cancel.is_cancelled() {
                return false;
            }
            if Instant::now() >= self.until {
                report.listed_all = false;
                return false;
            }
            listed += 1;
            if let Ok(scout) = &scout {
                scout.follow(listed);
            }
            let about = match about {
                Ok(about) => about,
                Err(error) => {
                    let name = escape_path(path.strip_prefix(self.root).unwrap_or(path));
                    report.unreadable.push(format!("{name}: {error}"));
                    return true;
                }
            };
            if about.is_file() && about.len() > 0 {
                let path = path.strip_prefix(&top).unwrap_or(path);
                let drawn = draw(self.seed, path);
                let file = Sampled {
                    job,
                    snapshot,
                    path: path.to_owned(),
                    about,
                    is_without_place: tops.iter().any(|top| path.starts_with(top)),
                    in_parts: false,
                };
                meet(&file, drawn);
            }
            true
        });
        match self.cancel.is_cancelled() {
            true => Err(SnapshotError::ReadCancelled),
            false => Ok(()),
        }
    }
}

/// A number that nobody can foresee without the seed.
fn draw(seed: u64, of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed, of).hash(&mut hasher);
    hasher.finish()
}
