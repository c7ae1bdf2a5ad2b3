//! What snapshots cost: the blocks that only one has, and those that a removal would free.
//!
//! A file of an ext4 volume is freed with its last name. So a set of snapshots frees a file if all names of its
//! inode lie in the set: no other part of the volume has to be known. The files that lie in the same
//! snapshots are summed up, so that any set can be computed from a few sums.
//!
//! On btrfs, snapshots share parts of files, too. There the caller passes [`SharedSpace`].

mod folders;
mod sets;
mod shared_space;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::{KnownInodes, Tree, is_a_folder};
use sprat_snapshot::{Cancel, JobName, Listed, SnapshotChoice, SnapshotError};

use crate::answer::{escaped, go_on};
pub use folders::FolderCost;
use folders::Folders;
use sets::Sets;
use shared_space::SharedSums;
pub use shared_space::{SharedSpace, SpaceTop};

/// `st_blocks` counts these, whatever the file system (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// The paths of smaller files are named only if they have several versions.
const NAMED_BYTES: u64 = 64 << 10;

/// How many folders the list has at most.
const FOLDERS_MAX: usize = 400;

/// What to analyze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnalyzeSpec {
    /// Only the snapshots of this job; `None`: of all.
    pub job: Option<JobName>,
    /// Snapshots that could be removed together.
    pub removed: Vec<(JobName, SnapshotChoice)>,
    /// How many paths each list has at most.
    pub paths_max: usize,
}

/// What the snapshots cost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnalyzeReport {
    /// Whether `own_bytes` and `frees_bytes` are exact. On btrfs they are not.
    pub exact: bool,
    /// Whether they are measured: on btrfs, by all parts that snapshots share. Without that, two versions
    /// of a file count as if they shared nothing.
    pub measured: bool,
    /// By job, oldest first.
    pub snapshots: Vec<SnapshotCost>,
    /// What they take together. A file in several of them counts once.
    pub bytes: u64,
    /// The part of it that folders take: each snapshot has folders of its own.
    pub folder_bytes: u64,
    /// What a removal of [`AnalyzeSpec::removed`] would free.
    pub removal: Option<Removal>,
    /// The biggest folders of the newest snapshot of each job, and so with each its parent.
    pub biggest_folders: Vec<FolderCost>,
    /// The biggest files, each in its newest version.
    pub biggest: Vec<PathCost>,
    /// The paths with the most versions.
    pub most_changed: Vec<PathCost>,
    /// The paths whose versions take the most together.
    pub most_expensive: Vec<PathCost>,
}

/// What one snapshot costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotCost {
    /// The job.
    pub job: String,
    /// The snapshot.
    pub snapshot: String,
    /// Its files, links and other objects that are no folders.
    pub files: u64,
    /// What all of it takes.
    pub bytes: u64,
    /// Files that no older snapshot of the job has.
    pub new_files: u64,
    /// What they and its folders take: by so much the run that made it enlarged the volume.
    pub new_bytes: u64,
    /// What a removal of this one alone would free.
    pub own_bytes: u64,
}

/// What the removal of several snapshots would free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// `JOB/SNAPSHOT`.
    pub snapshots: Vec<String>,
    /// Files, folders and other objects that would be gone.
    pub frees_objects: u64,
    /// The space.
    pub frees_bytes: u64,
}

/// What one path costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathCost {
    /// The job.
    pub job: String,
    /// The path in the source, escaped.
    pub path: String,
    /// Versions with different content or attributes.
    pub versions: u64,
    /// What the newest version takes.
    pub bytes: u64,
    /// What all versions take together.
    pub all_bytes: u64,
}

/// Finds what the snapshots cost. Lists every folder, and reads no content. `space`: on btrfs; `is_exact`: on
/// ext4.
///
/// # Errors
/// There is no such job or snapshot, or the volume can't be read.
pub fn analyze(
    volume_root: &Path,
    spec: &AnalyzeSpec,
    is_exact: bool,
    space: Option<&SharedSpace>,
    cancel: &Cancel,
) -> Result<AnalyzeReport, SnapshotError> {
    let mut jobs: BTreeSet<String> = match &spec.job {
        Some(job) => BTreeSet::from([job.to_string()]),
        None => sprat_snapshot::newest(volume_root)?.into_keys().collect(),
    };
    jobs.extend(spec.removed.iter().map(|(job, _)| job.to_string()));
    let mut sums = Sums::default();
    let mut lists = Lists::new(spec.paths_max);
    let mut report = AnalyzeReport {
        exact: is_exact,
        measured: is_exact,
        ..AnalyzeReport::default()
    };
    let mut places = Vec::new();
    let mut numbers: BTreeMap<(String, String), u32> = BTreeMap::new();
    for job in jobs.iter().filter_map(|job| JobName::new(job).ok()) {
        let mut paths = Paths::default();
        let trees = Tree::finished(volume_root, &job)?;
        let mut folders = Folders::default();
        let count = trees.len();
        for (at, tree) in trees.into_iter().enumerate() {
            let number = u32::try_from(report.snapshots.len()).unwrap_or(u32::MAX);
            numbers.insert((job.to_string(), tree.folder.clone()), number);
            let walk = Walk {
                tree: &tree,
                number,
                is_exact,
                cancel,
            };
            let newest = (at + 1 == count).then_some(&mut folders);
            report
                .snapshots
                .push(walk.run(&mut sums, &mut paths, newest)?);
            places.push(space.and_then(|_| tree.place_in_volume().ok()));
        }
        paths.end(job.as_str(), &mut lists);
        report
            .biggest_folders
            .extend(folders.biggest(job.as_str(), FOLDERS_MAX));
    }
    report
        .biggest_folders
        .sort_by_key(|folder| Reverse(folder.bytes));
    report.biggest_folders.truncate(FOLDERS_MAX);
    for (number, cost) in (0..).zip(&mut report.snapshots) {
        cost.own_bytes = sums.frees(&BTreeSet::from([number])).1;
    }
    (report.bytes, report.folder_bytes) = (sums.bytes, sums.folder_bytes);
    let shared = space.and_then(|space| SharedSums::of(space, &places));
    if let Some(shared) = &shared {
        report.measure(shared, &sums);
    }
    if !spec.removed.is_empty() {
        let mut removed = BTreeMap::new();
        for (job, choice) in &spec.removed {
            let tree = Tree::find(volume_root, job, choice)?;
            let key = (job.to_string(), tree.folder.clone());
            let number = numbers.get(&key).copied();
            let number = number.ok_or_else(|| tree.no_such(Path::new("/")))?;
            removed.insert(number, format!("{job}/{}", tree.folder));
        }
        let set: BTreeSet<u32> = removed.keys().copied().collect();
        let (frees_objects, mut frees_bytes) = sums.frees(&set);
        if let Some(shared) = &shared {
            frees_bytes = shared.frees(&set) + sums.beside(&set);
        }
        report.removal = Some(Removal {
            snapshots: removed.into_values().collect(),
            frees_objects,
            frees_bytes,
        });
    }
    lists.end(&mut report);
    Ok(report)
}

impl AnalyzeReport {
    /// Takes the sizes that were measured.
    fn measure(&mut self, shared: &SharedSums, sums: &Sums) {
        self.measured = true;
        for (number, cost) in (0..).zip(&mut self.snapshots) {
            let one = BTreeSet::from([number]);
            let beside = sums.beside(&one);
            cost.bytes = shared.bytes(|set| set.contains(&number)) + beside;
            cost.new_bytes = shared.bytes(|set| set.first() == Some(&number)) + beside;
            cost.own_bytes = shared.frees(&one) + beside;
        }
        self.bytes = shared.all() + sums.beside.values().sum::<u64>();
        self.folder_bytes = shared.tree_bytes;
    }
}

/// A file of the volume that has, or may have, several names.
#[derive(Debug, Clone, Copy)]
struct Inode {
    /// The snapshots in which it was found.
    set: u32,
    /// The one of them that was met last.
    last: u32,
    /// How many names it has, and how many were found.
    links: u32,
    found: u32,
    bytes: u64,
}

/// Every file, and what is summed up.
#[derive(Debug, Default)]
struct Sums {
    sets: Sets,
    inodes: HashMap<(u64, u64), Inode>,
    /// Their numbers.
    known: KnownInodes,
    /// What has one name, by the snapshot: objects and bytes.
    single: BTreeMap<u32, (u64, u64)>,
    /// Of these, what lies beside the snapshot, in bytes.
    beside: BTreeMap<u32, u64>,
    bytes: u64,
    folder_bytes: u64,
}

impl Sums {
    /// What a removal of this set would free: objects and bytes.
    fn frees(&self, set: &BTreeSet<u32>) -> (u64, u64) {
        let goes: Vec<bool> = self
            .sets
            .all
            .iter()
            .map(|of| of.iter().all(|one| set.contains(one)))
            .collect();
        let single = set
            .iter()
            .filter_map(|number| self.single.get(number))
            .copied();
        let shared = self.inodes.values().filter(|inode| {
            inode.found >= inode.links && goes.get(inode.set as usize).copied().unwrap_or(false)
        });
        single
            .chain(shared.map(|inode| (1, inode.bytes)))
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// What lies beside these snapshots.
    fn beside(&self, set: &BTreeSet<u32>) -> u64 {
        set.iter().filter_map(|one| self.beside.get(one)).sum()
    }

    /// Meets something again, under another name. `None`: it was not met before.
    fn meet_again(&mut self, key: (u64, u64), number: u32, cost: &mut SnapshotCost) -> Option<u64> {
        let known = self.inodes.get_mut(&key)?;
        known.found += 1;
        cost.files += 1;
        if known.last != number {
            known.set = self.sets.with(Some(known.set), number);
            known.last = number;
            cost.bytes += known.bytes;
        }
        Some(known.bytes)
    }

    fn add_single(&mut self, number: u32, bytes: u64) {
        let single = self.single.entry(number).or_default();
        *single = (single.0 + 1, single.1 + bytes);
        self.bytes += bytes;
    }
}

struct Walk<'t> {
    tree: &'t Tree,
    /// The snapshot's place in the report.
    number: u32,
    is_exact: bool,
    cancel: &'t Cancel,
}

impl Walk<'_> {
    fn run(
        &self,
        sums: &mut Sums,
        paths: &mut Paths,
        mut folders: Option<&mut Folders>,
    ) -> Result<SnapshotCost, SnapshotError> {
        let tree = self.tree;
        let mut cost = SnapshotCost {
            job: tree.job.clone(),
            snapshot: tree.folder.clone(),
            files: 0,
            bytes: 0,
            new_files: 0,
            new_bytes: 0,
            own_bytes: 0,
        };
        let top = tree.stat(Path::new("/"))?;
        if let Some(top) = top {
            let bytes = self.folder(&top, sums, &mut cost);
            if let Some(folders) = &mut folders {
                folders.add(Path::new("/"), 0, bytes);
            }
        }
        for stat in tree.beside()? {
            let bytes = taken(&stat);
            sums.add_single(self.number, bytes);
            *sums.beside.entry(self.number).or_default() += bytes;
            cost.bytes += bytes;
            cost.new_bytes += bytes;
        }
        let mut listed = 0;
        let known = self.is_exact.then(|| Arc::clone(&sums.known));
        let ahead = tree.ahead_without(known);
        let mut waiting = vec![PathBuf::from("/")];
        while let Some(path) = waiting.pop() {
            go_on(self.cancel)?;
            let failed = |error| tree.failed("list", &path, error);
            let Some(folder) = tree.folder(&path)? else {
                continue;
            };
            let device = folder.device().map_err(failed)?;
            let (mut files, mut in_files) = (0, 0);
            for Listed { name, inode, .. } in folder.entries().map_err(failed)? {
                listed += 1;
                if let Some(ahead) = &ahead {
                    ahead.follow(listed);
                }
                let path = path.join(&name);
                let before = cost.bytes;
                // Only what is no folder is among them.
                if self.is_exact
                    && let Some(bytes) = sums.meet_again((device, inode), self.number, &mut cost)
                {
                    paths.meet(&path, inode, bytes);
                    // Another name in this snapshot adds nothing.
                    (files, in_files) = (files + 1, in_files + cost.bytes - before);
                    continue;
                }
                let Some(stat) = folder.stat(&name).map_err(failed)? else {
                    continue;
                };
                if is_a_folder(&stat) {
                    let bytes = self.folder(&stat, sums, &mut cost);
                    if let Some(folders) = &mut folders {
                        folders.add(&path, 0, bytes);
                    }
                    waiting.push(path);
                    continue;
                }
                // In two snapshots of a btrfs volume an unchanged file is two inodes with one number.
                let key = match self.is_exact {
                    true => (device, inode),
                    false => (0, number_of((inode, stat.st_ctime, stat.st_ctime_nsec))),
                };
                let bytes = match sums.meet_again(key, self.number, &mut cost) {
                    Some(bytes) => bytes,
                    None => self.meet(&stat, key, sums, &mut cost),
                };
                paths.meet(&path, key.1, bytes);
                (files, in_files) = (files + 1, in_files + cost.bytes - before);
            }
            if let Some(folders) = &mut folders {
                folders.add(&path, files, in_files);
            }
        }
        Ok(cost)
    }

    /// Meets something for the first time. Returns what it takes.
    fn meet(&self, stat: &Stat, key: (u64, u64), sums: &mut Sums, cost: &mut SnapshotCost) -> u64 {
        let bytes = taken(stat);
        cost.files += 1;
        cost.bytes += bytes;
        cost.new_files += 1;
        cost.new_bytes += bytes;
        let links = links(stat);
        if self.is_exact && links <= 1 {
            sums.add_single(self.number, bytes);
            return bytes;
        }
        sums.bytes += bytes;
        let new = Inode {
            set: sums.sets.with(None, self.number),
            last: self.number,
            links: if self.is_exact { links } else { 0 },
            found: 1,
            bytes,
        };
        sums.inodes.insert(key, new);
        if let Ok(mut known) = sums.known.lock() {
            known.insert(key.1);
        }
        bytes
    }

    /// A folder is in one snapshot only. Returns what it takes.
    fn folder(&self, stat: &Stat, sums: &mut Sums, cost: &mut SnapshotCost) -> u64 {
        let bytes = taken(stat);
        sums.add_single(self.number, bytes);
        sums.folder_bytes += bytes;
        cost.bytes += bytes;
        cost.new_bytes += bytes;
        bytes
    }
}

fn taken(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK_BYTES
}

#[allow(clippy::useless_conversion, reason = "the field has 32 bits on arm64")]
fn links(stat: &Stat) -> u32 {
    u32::try_from(stat.st_nlink).unwrap_or(u32::MAX)
}

/// The versions of each path of a job. Of most paths only a number is known.
#[derive(Debug, Default)]
struct Paths {
    all: HashMap<u64, Versions>,
    /// The names of those that are worth to be named.
    names: HashMap<u64, PathBuf>,
}

#[derive(Debug, Clone, Copy)]
struct Versions {
    inode: u64,
    versions: u64,
    bytes: u64,
    all_bytes: u64,
}

impl Paths {
    /// A snapshot, newer than those before, has this path.
    fn meet(&mut self, path: &Path, inode: u64, bytes: u64) {
        let number = number_of(path);
        let known = self.all.entry(number).or_insert(Versions {
            inode,
            versions: 1,
            bytes,
            all_bytes: bytes,
        });
        if known.inode != inode {
            known.versions += 1;
            known.all_bytes += bytes;
            (known.inode, known.bytes) = (inode, bytes);
        }
        if known.versions > 1 || bytes >= NAMED_BYTES {
            self.names.entry(number).or_insert_with(|| path.to_owned());
        }
    }

    fn end(self, job: &str, lists: &mut Lists) {
        for (number, path) in self.names {
            let Some(known) = self.all.get(&number) else {
                continue;
            };
            lists.offer(&PathCost {
                job: job.to_owned(),
                path: escaped(&path),
                versions: known.versions,
                bytes: known.bytes,
                all_bytes: known.all_bytes,
            });
        }
    }
}

/// The lists of paths, each with the most of something first.
#[derive(Debug)]
struct Lists {
    most: usize,
    biggest: Vec<PathCost>,
    most_changed: Vec<PathCost>,
    most_expensive: Vec<PathCost>,
}

impl Lists {
    fn new(most: usize) -> Self {
        Self {
            most,
            biggest: Vec::new(),
            most_changed: Vec::new(),
            most_expensive: Vec::new(),
        }
    }

    fn offer(&mut self, cost: &PathCost) {
        let most = self.most;
        put(&mut self.biggest, cost, most, |one| (one.bytes, 0));
        if cost.versions > 1 {
            put(&mut self.most_changed, cost, most, |one| {
                (one.versions, one.all_bytes)
            });
            put(&mut self.most_expensive, cost, most, |one| {
                (one.all_bytes, one.versions)
            });
        }
    }

    fn end(self, report: &mut AnalyzeReport) {
        report.biggest = self.biggest;
        report.most_changed = self.most_changed;
        report.most_expensive = self.most_expensive;
    }
}

/// Puts a path into a list that is sorted by `rank`, the greatest first, and then by name.
fn put(list: &mut Vec<PathCost>, cost: &PathCost, most: usize, rank: fn(&PathCost) -> (u64, u64)) {
    let before = |one: &PathCost| {
        (Reverse(rank(one)), &one.job, &one.path) < (Reverse(rank(cost)), &cost.job, &cost.path)
    };
    let at = list.partition_point(before);
    if at < most {
        list.insert(at, cost.clone());
        list.truncate(most);
    }
}

/// A number that stands for something.
fn number_of(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}
