//! What snapshots cost: the blocks that only one has, and those that a removal would free.
//!
//! A file of an ext4 volume is freed with its last name. So a set of snapshots frees a file if all names of its
//! inode lie in the set: no other part of the volume has to be known. The files that lie in the same
//! snapshots are summed up, so that any set can be computed from a few sums.
//!
//! On btrfs, snapshots share parts of files, too. There the caller passes [`SharedSpace`].
//!
//! What was found in a snapshot is kept on this machine ([`kept`]), and need not be read again.

mod folders;
mod kept;
mod sets;
mod shared_space;
mod tops;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::{KnownInodes, Tree, is_a_folder};
use sprat_snapshot::{Cancel, JobName, Listed, SnapshotChoice, SnapshotError, unescape_name};

use crate::answer::{escaped, go_on};
pub use folders::FolderCost;
use folders::Folders;
use kept::{Identity, Kept, Object};
use sets::Sets;
use shared_space::SharedSums;
pub use shared_space::{SharedSpace, SpaceTop};
use tops::Top;

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
    /// Where this machine keeps what it found in snapshots, escaped: a file for each job. `None`: nowhere. Nobody
    /// but sessions of this machine may have written to the volume since, and no person.
    #[serde(default)]
    pub kept: Option<String>,
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
    // A file of a finished snapshot may have further names elsewhere. Then how many it has must be read.
    let keeps = !is_exact || sprat_snapshot::has_only_finished(volume_root)?;
    let folder = spec.kept.as_deref().filter(|_| keeps);
    let folder = folder.map(|path| PathBuf::from(OsString::from_vec(unescape_name(path))));
    let mut found = Vec::new();
    for job in jobs.iter().filter_map(|job| JobName::new(job).ok()) {
        let mut paths = Paths::default();
        let trees = Tree::finished(volume_root, &job)?;
        let tops = tops::examine(&trees, cancel)?;
        let file = folder.as_ref().map(|folder| folder.join(job.as_str()));
        let identity =
            |(tree, top): (&Tree, &Top)| Some(Identity::of(&tree.folder, top.stat.as_ref()?));
        let identities: Option<Vec<Identity>> = trees.iter().zip(&tops).map(identity).collect();
        let mut kept = match (&file, &identities) {
            (Some(file), Some(identities)) => Some(Kept::load(file, is_exact, identities)),
            _ => None,
        };
        let mut folders = Folders::default();
        let count = trees.len();
        for (at, (tree, top)) in trees.into_iter().zip(tops).enumerate() {
            let number = u32::try_from(report.snapshots.len()).unwrap_or(u32::MAX);
            numbers.insert((job.to_string(), tree.folder.clone()), number);
            let mut walk = Walk {
                tree: &tree,
                number,
                is_exact,
                cancel,
                sums: &mut sums,
                paths: &mut paths,
                folders: (at + 1 == count).then_some(&mut folders),
                cost: SnapshotCost::of(&tree),
            };
            walk.top(&top);
            match &mut kept {
                Some(kept) if at < kept.known => walk.repeat(kept, at, &top)?,
                kept => walk.run(&mut |path, object| {
                    if let Some(kept) = kept {
                        kept.add(at, path, object);
                    }
                })?,
            }
            report.snapshots.push(walk.cost);
            places.push(space.and_then(|_| tree.place_in_volume().ok()));
        }
        if let (Some(kept), Some(file), Some(identities)) = (kept, file, identities) {
            found.push((kept, file, identities));
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
    for (cost, own) in report.snapshots.iter_mut().zip(sums.own(places.len())) {
        cost.own_bytes = own;
    }
    if sums.has_all_names(&report.snapshots) {
        for (kept, file, identities) in found {
            if let Err(error) = kept.save(&file, is_exact, identities) {
                tracing::warn!(%error, "what snapshots cost can't be kept on this machine");
            }
        }
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
        let each = shared.each(self.snapshots.len());
        for ((number, cost), of) in (0..).zip(&mut self.snapshots).zip(each) {
            let beside = sums.beside.get(&number).copied().unwrap_or(0);
            cost.bytes = of.bytes + beside;
            cost.new_bytes = of.new_bytes + beside;
            cost.own_bytes = of.own_bytes + beside;
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
    /// How many names it has, and how many were found. 0: all were found when that was examined.
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

    /// What a removal of each snapshot alone would free.
    fn own(&self, snapshots: usize) -> Vec<u64> {
        let mut own = vec![0; snapshots];
        let mut add = |number: u32, bytes: u64| {
            if let Some(sum) = own.get_mut(number as usize) {
                *sum += bytes;
            }
        };
        for (number, (_, bytes)) in &self.single {
            add(*number, *bytes);
        }
        for inode in self
            .inodes
            .values()
            .filter(|inode| inode.found >= inode.links)
        {
            if let Some([number]) = self.sets.all.get(inode.set as usize).map(|set| &set[..]) {
                add(*number, inode.bytes);
            }
        }
        own
    }

    /// Whether each file has names only in these snapshots, and in those of one job.
    fn has_all_names(&self, snapshots: &[SnapshotCost]) -> bool {
        let job = |number: &u32| snapshots.get(*number as usize).map(|one| &one.job);
        let is_one_job = |set: &Vec<u32>| set.windows(2).all(|pair| job(&pair[0]) == job(&pair[1]));
        self.inodes.values().all(|inode| inode.found >= inode.links)
            && self.sets.all.iter().all(is_one_job)
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

impl SnapshotCost {
    fn of(tree: &Tree) -> Self {
        Self {
            job: tree.job.clone(),
            snapshot: tree.folder.clone(),
            files: 0,
            bytes: 0,
            new_files: 0,
            new_bytes: 0,
            own_bytes: 0,
        }
    }
}

/// Sums up one snapshot.
struct Walk<'t> {
    tree: &'t Tree,
    /// The snapshot's place in the report.
    number: u32,
    is_exact: bool,
    cancel: &'t Cancel,
    sums: &'t mut Sums,
    paths: &'t mut Paths,
    /// Of the newest snapshot of a job.
    folders: Option<&'t mut Folders>,
    cost: SnapshotCost,
}

impl Walk<'_> {
    /// The snapshot's folder, and what lies beside it.
    fn top(&mut self, top: &Top) {
        if let Some(stat) = &top.stat {
            self.folder(Path::new("/"), taken(stat));
        }
        for stat in &top.beside {
            let bytes = taken(stat);
            self.sums.add_single(self.number, bytes);
            *self.sums.beside.entry(self.number).or_default() += bytes;
            self.cost.bytes += bytes;
            self.cost.new_bytes += bytes;
        }
    }

    /// Lists all folders. `found` is called with each path.
    fn run(&mut self, found: &mut dyn FnMut(&Path, Object)) -> Result<(), SnapshotError> {
        let tree = self.tree;
        let mut listed = 0;
        let known = self.is_exact.then(|| Arc::clone(&self.sums.known));
        let ahead = tree.ahead_without(known);
        let mut waiting = vec![PathBuf::from("/")];
        while let Some(path) = waiting.pop() {
            go_on(self.cancel)?;
            let failed = |error| tree.failed("list", &path, error);
            let Some(folder) = tree.folder(&path)? else {
                continue;
            };
            let device = folder.device().map_err(failed)?;
            let mut names = folder.entries().map_err(failed)?;
            // A file with several names counts in the folder of the first one.
            names.sort_unstable_by(|one, other| one.name.cmp(&other.name));
            let mut below = Vec::new();
            for Listed { name, inode, .. } in names {
                listed += 1;
                if let Some(ahead) = &ahead {
                    ahead.follow(listed);
                }
                let path = path.join(&name);
                // Only what is no folder is among them.
                if self.is_exact && self.sums.inodes.contains_key(&(device, inode)) {
                    let bytes = self.name(&path, (device, inode), 0, None);
                    found(&path, Object::file(inode, bytes));
                    continue;
                }
                let Some(stat) = folder.stat(&name).map_err(failed)? else {
                    continue;
                };
                if is_a_folder(&stat) {
                    self.folder(&path, taken(&stat));
                    found(&path, Object::folder(taken(&stat)));
                    below.push(path);
                    continue;
                }
                // In two snapshots of a btrfs volume an unchanged file is two inodes with one number.
                let key = match self.is_exact {
                    true => (device, inode),
                    false => (0, number_of((inode, stat.st_ctime, stat.st_ctime_nsec))),
                };
                let bytes = self.name(&path, key, taken(&stat), Some(links(&stat)));
                found(&path, Object::file(key.1, bytes));
            }
            waiting.extend(below.into_iter().rev());
        }
        Ok(())
    }

    /// Repeats what an earlier run found in the snapshot with this number in its job.
    fn repeat(&mut self, kept: &Kept, at: usize, top: &Top) -> Result<(), SnapshotError> {
        let device = match (self.is_exact, &top.stat) {
            (true, Some(stat)) => stat.st_dev,
            _ => 0,
        };
        for (path, object) in kept.paths(at) {
            match object.is_folder {
                true => {
                    go_on(self.cancel)?;
                    self.folder(path, object.bytes);
                }
                false => drop(self.name(path, (device, object.key), object.bytes, None)),
            }
        }
        Ok(())
    }

    /// Meets a name of what is no folder. `bytes` and `links` are of a file that was not met before. Returns what it
    /// takes.
    fn name(&mut self, path: &Path, key: (u64, u64), bytes: u64, links: Option<u32>) -> u64 {
        let before = self.cost.bytes;
        let bytes = match self.sums.meet_again(key, self.number, &mut self.cost) {
            Some(bytes) => bytes,
            None => self.meet(key, bytes, links),
        };
        self.paths.meet(path, key.1, bytes);
        // Another name in this snapshot adds nothing.
        let added = self.cost.bytes - before;
        if let (Some(folders), Some(folder)) = (&mut self.folders, path.parent()) {
            folders.add(folder, 1, added);
        }
        bytes
    }

    /// Meets something for the first time. `links`: how many names it has; `None`: that is not known, and all of
    /// them are in finished snapshots.
    fn meet(&mut self, key: (u64, u64), bytes: u64, links: Option<u32>) -> u64 {
        self.cost.files += 1;
        self.cost.bytes += bytes;
        self.cost.new_files += 1;
        self.cost.new_bytes += bytes;
        if self.is_exact && links.is_some_and(|links| links <= 1) {
            self.sums.add_single(self.number, bytes);
            return bytes;
        }
        self.sums.bytes += bytes;
        let new = Inode {
            set: self.sums.sets.with(None, self.number),
            last: self.number,
            links: links.filter(|_| self.is_exact).unwrap_or(0),
            found: 1,
            bytes,
        };
        self.sums.inodes.insert(key, new);
        if let Ok(mut known) = self.sums.known.lock() {
            known.insert(key.1);
        }
        bytes
    }

    /// A folder is in one snapshot only.
    fn folder(&mut self, path: &Path, bytes: u64) {
        self.sums.add_single(self.number, bytes);
        self.sums.folder_bytes += bytes;
        self.cost.bytes += bytes;
        self.cost.new_bytes += bytes;
        if let Some(folders) = &mut self.folders {
            folders.add(path, 0, bytes);
        }
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
