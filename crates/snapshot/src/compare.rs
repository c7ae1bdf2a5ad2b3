//! Compares the files at a restore's destination with those of the snapshot, by content.
//!
//! rsync skips a file if size and time are equal. Its content may differ all the same: it was damaged,
//! or its time was set. It may also be a hard link to a file that is not restored, or that is a
//! different file in the snapshot: then one of them would get the other's owner and mode. [`before`]
//! finds both kinds, for a run of rsync that writes them. [`after`] verifies what a restore wrote.

mod content;
mod newer;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, AtFlags, FileType, Stat, fadvise, readlinkat, statat};

use crate::cancel::Cancel;
use crate::check::Key;
use crate::content::ContentHash;
use crate::error::SnapshotError;
use crate::listed::Listed;
use crate::name_list::NameList;
use crate::paths::real_path;
use crate::progress::{Phase, Progress};
use crate::protected_paths::ProtectedPaths;
use crate::scout::Scout;
use crate::text::escape_path;
use crate::walk::{is_folder, names_in};
pub(crate) use content::{Unread, same_content};
pub(crate) use newer::time;

/// How many files are read at once. On a slow connection most of the time for a small file is waiting.
const READERS: usize = 8;
/// How many files may wait to be read.
const QUEUE: usize = 64;
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// What a restore is compared with, and where.
pub(crate) struct Restored<'a> {
    /// The job's folder.
    pub(crate) job: &'a Path,
    /// What `trees` are relative to, itself relative to the job's folder.
    pub(crate) base: &'a Path,
    pub(crate) trees: &'a [PathBuf],
    pub(crate) to: &'a Path,
    pub(crate) protected: &'a ProtectedPaths,
}

impl Restored<'_> {
    /// Calls the function [`before`]. Finds nothing if the destination does not exist yet.
    pub(crate) fn before(
        &self,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Unequal, SnapshotError> {
        let Some((snapshot, destination)) = self.open()? else {
            return Ok(Unequal::default());
        };
        let found = before(&self.sides(&snapshot, &destination, None), progress, cancel);
        found
            .map_err(comparing)?
            .ok_or(SnapshotError::RestoreCancelled)
    }

    /// Returns how many files have the same content. Fails if anything differs. Adds to `damaged` the files whose
    /// content is not what the lists have of their backup.
    pub(crate) fn after(
        &self,
        listed: &Listed,
        damaged: &mut BTreeSet<PathBuf>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<u64, SnapshotError> {
        let Some((snapshot, destination)) = self.open()? else {
            return Ok(0);
        };
        let sides = self.sides(&snapshot, &destination, Some(listed));
        let found = after(&sides, progress, cancel);
        let verified = found
            .map_err(comparing)?
            .ok_or(SnapshotError::RestoreCancelled)?;
        damaged.extend(verified.damaged);
        if verified.different.is_empty() {
            return Ok(verified.same);
        }
        Err(SnapshotError::RestoreDiffers {
            path: escape_path(self.to),
            different: verified.different,
            damaged: NameList::default(),
        })
    }

    fn sides<'s>(
        &'s self,
        snapshot: &'s OwnedFd,
        destination: &'s OwnedFd,
        after: Option<&'s Listed>,
    ) -> Sides<'s> {
        Sides {
            snapshot,
            destination,
            trees: self.trees,
            protected: self.protected,
            after,
        }
    }

    /// `None` if the destination does not exist yet.
    fn open(&self) -> Result<Option<(OwnedFd, OwnedFd)>, SnapshotError> {
        let base = self.job.join(self.base);
        let snapshot =
            crate::walk::open_folder_at(&base).map_err(|source| SnapshotError::Volume {
                op: "open",
                object: escape_path(self.base),
                source,
            })?;
        // The user may have given a symbolic link.
        match crate::walk::open_folder_at(&real_path(self.to)) {
            Ok(destination) => Ok(Some((snapshot, destination))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(SnapshotError::DestinationRefused {
                path: escape_path(self.to),
                why: e.to_string(),
            }),
        }
    }
}

fn comparing(source: io::Error) -> SnapshotError {
    SnapshotError::System {
        op: "compare the destination with the snapshot",
        source,
    }
}

/// The snapshot and the destination. All paths are relative to both.
struct Sides<'a> {
    /// The folder in the snapshot that `trees` are relative to.
    snapshot: &'a OwnedFd,
    /// The same folder at the destination.
    destination: &'a OwnedFd,
    trees: &'a [PathBuf],
    /// sprat's own files at the destination. They are not restored.
    protected: &'a ProtectedPaths,
    /// After a restore: the digests of the backups. The files of the destination are read from its disk, not from the
    /// kernel's cache.
    after: Option<&'a Listed>,
}

/// What must be written although size and time are equal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Unequal {
    /// Regular files. If they are hard links in the snapshot, all their names there.
    pub(crate) files: BTreeSet<PathBuf>,
    /// Other objects that are hard links to something else at the destination.
    pub(crate) others: Vec<PathBuf>,
    /// How many files have the same content.
    pub(crate) same: u64,
}

impl Unequal {
    /// Leaves these as they are.
    pub(crate) fn leave(&mut self, paths: &BTreeSet<PathBuf>) {
        self.files.retain(|path| !paths.contains(path));
        self.others.retain(|path| !paths.contains(path));
    }
}

/// Finds what a restore must write although size and time are equal. `None` if it was cancelled.
fn before(
    sides: &Sides<'_>,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> io::Result<Option<Unequal>> {
    let mut links: BTreeMap<(u64, u64), Vec<Linked>> = BTreeMap::new();
    let mut wrong = Wrong::default();
    let mut same = 0;
    let done = walk(
        sides,
        progress,
        cancel,
        &mut |path, ours, theirs| {
            let Some(theirs) = theirs.filter(|theirs| looks_the_same(ours, theirs)) else {
                return Wanted::Nothing;
            };
            if theirs.st_nlink > 1 {
                let linked = Linked {
                    path: path.to_owned(),
                    inode: ours.st_ino,
                    links: links_of(theirs),
                    is_file: is_file(ours),
                };
                let key = (theirs.st_dev, theirs.st_ino);
                links.entry(key).or_default().push(linked);
            }
            if is_file(ours) {
                Wanted::Content
            } else {
                Wanted::Nothing
            }
        },
        &mut |task, found| match found {
            Found::Same | Found::Damaged => same += 1,
            // A file that can't be read is written. rsync reports it if it is the snapshot's.
            Found::Differs | Found::Unreadable(_) => wrong.add(&task.path, task.inode, task.links),
            Found::Stopped => {}
        },
    )?;
    if !done {
        return Ok(None);
    }
    let differ = wrong.files.clone();
    let mut others = wrong.add_links(links);
    let mut files = wrong.files;
    if !wrong.of_several.is_empty() {
        let stopped = walk_snapshot(sides, cancel, &mut |path, stat| {
            if is_file(stat)
                && wrong.of_several.contains(&stat.st_ino)
                && stays_inside(sides.destination, path)
                && !sides.protected.holds(path)
            {
                files.insert(path.to_owned());
            }
        })?;
        if stopped {
            return Ok(None);
        }
    }
    // Compared and equal, but written because of its hard links.
    let was_same = |path: &&PathBuf| {
        let ours = statat(sides.snapshot, at(path), AtFlags::SYMLINK_NOFOLLOW);
        let theirs = stat_within(sides.destination, path);
        ours.is_ok_and(|ours| theirs.is_some_and(|theirs| looks_the_same(&ours, &theirs)))
    };
    let rewritten = files.difference(&differ).filter(was_same).count();
    same -= u64::try_from(rewritten).unwrap_or(same).min(same);
    others.sort();
    Ok(Some(Unequal {
        files,
        others,
        same,
    }))
}

/// A name at the destination whose file has several names.
struct Linked {
    path: PathBuf,
    /// The inode in the snapshot.
    inode: u64,
    /// How many names the file has at the destination.
    links: u64,
    is_file: bool,
}

#[derive(Default)]
struct Wrong {
    files: BTreeSet<PathBuf>,
    /// Inodes of the snapshot that may have several names there.
    of_several: HashSet<u64>,
}

impl Wrong {
    fn add(&mut self, path: &Path, inode: u64, links: u64) {
        self.files.insert(path.to_owned());
        if links > 1 {
            self.of_several.insert(inode);
        }
    }

    /// Adds the files whose hard links at the destination differ from those in the snapshot. Returns
    /// the other objects with that fault.
    fn add_links(&mut self, links: BTreeMap<(u64, u64), Vec<Linked>>) -> Vec<PathBuf> {
        let mut others = Vec::new();
        for linked in links.into_values() {
            let is_same = linked.iter().all(|one| one.inode == linked[0].inode);
            if is_same && linked.len() as u64 >= linked[0].links {
                continue;
            }
            for one in linked {
                if one.is_file {
                    // It is not known whether it has other names in the snapshot.
                    self.add(&one.path, one.inode, u64::MAX);
                } else {
                    others.push(one.path);
                }
            }
        }
        others
    }
}

/// The result of a comparison after a restore.
#[derive(Debug, Default)]
struct Verified {
    /// How many files have the same content.
    same: u64,
    /// What differs from the snapshot, and how.
    different: NameList,
    damaged: Vec<PathBuf>,
}

/// Compares everything in the snapshot with the destination: kind, size, content, and the targets of
/// symbolic links. Reads the files of the destination from its disk. `None` if it was cancelled.
fn after(
    sides: &Sides<'_>,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> io::Result<Option<Verified>> {
    // Pages that are not yet written can't be dropped from the cache.
    rustix::fs::syncfs(sides.destination)?;
    let mut verified = Verified::default();
    let mut different = NameList::default();
    let done = walk(
        sides,
        progress,
        cancel,
        &mut |path, ours, theirs| {
            let kind = |stat: &Stat| FileType::from_raw_mode(stat.st_mode);
            let what = match theirs {
                None => "is missing",
                Some(theirs) if kind(theirs) != kind(ours) => "is of another type",
                Some(theirs) if is_file(ours) && theirs.st_size != ours.st_size => {
                    "has another size"
                }
                Some(_) if is_file(ours) => return Wanted::Content,
                Some(_) if kind(ours) == FileType::Symlink && !same_target(sides, path) => {
                    "points to another place"
                }
                Some(_) => return Wanted::Nothing,
            };
            different.push(format!("{}: {what}", escape_path(path)));
            Wanted::Nothing
        },
        &mut |task, found| match found {
            Found::Same => verified.same += 1,
            Found::Damaged => {
                verified.same += 1;
                verified.damaged.push(task.path);
            }
            Found::Differs => {
                verified
                    .different
                    .push(format!("{}: has other content", escape_path(&task.path)));
            }
            Found::Unreadable(error) => {
                verified.different.push(format!(
                    "{}: can't be read: {error}",
                    escape_path(&task.path)
                ));
            }
            Found::Stopped => {}
        },
    )?;
    verified.different.append(&different);
    Ok(done.then_some(verified))
}

fn same_target(sides: &Sides<'_>, path: &Path) -> bool {
    let target = |side: &OwnedFd| readlinkat(side, path, Vec::new()).ok();
    target(sides.snapshot).is_some_and(|ours| Some(ours) == target(sides.destination))
}

#[allow(clippy::useless_conversion, reason = "the field has 32 bits on arm64")]
fn links_of(stat: &Stat) -> u64 {
    stat.st_nlink.into()
}

fn is_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

/// Whether rsync would skip the file.
fn looks_the_same(ours: &Stat, theirs: &Stat) -> bool {
    let kind = |stat: &Stat| FileType::from_raw_mode(stat.st_mode);
    let size_and_time = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec);
    kind(ours) == kind(theirs) && (!is_file(ours) || size_and_time(ours) == size_and_time(theirs))
}

/// What to compare.
enum Wanted {
    Content,
    Nothing,
}

/// A file whose content is compared.
struct Task {
    path: PathBuf,
    /// The inode in the snapshot.
    inode: u64,
    /// How many names the inode has on the volume.
    links: u64,
}

enum Found {
    Same,
    /// On both sides the same, and not what was backed up.
    Damaged,
    Differs,
    Unreadable(io::Error),
    Stopped,
}

type Results = Receiver<(Task, Found)>;

/// Calls `meet` with each entry of the snapshot that is not a folder, and with what is at its place at
/// the destination. A folder that is missing at the destination is passed to `meet`, too, and not
/// walked. False if it was cancelled.
fn walk(
    sides: &Sides<'_>,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
    meet: &mut dyn FnMut(&Path, &Stat, Option<&Stat>) -> Wanted,
    take: &mut dyn FnMut(Task, Found),
) -> io::Result<bool> {
    let (tasks_to, tasks) = sync_channel::<Task>(QUEUE);
    let (found_to, found) = channel();
    let tasks = Mutex::new(tasks);
    let bytes = AtomicU64::new(0);
    let reader = Reader {
        snapshot: sides.snapshot,
        destination: sides.destination,
        after: sides.after,
        bytes: &bytes,
        cancel,
    };
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            let found_to = found_to.clone();
            let tasks = &tasks;
            scope.spawn(move || reader.read(tasks, &found_to));
        }
        drop(found_to);
        let mut reporter = Reporter::begin(progress, &bytes);
        let walked = walk_both(sides, cancel, &mut |path, ours, theirs| {
            reporter.now.files_found += 1;
            if let Wanted::Content = meet(path, ours, theirs) {
                let task = Task {
                    path: path.to_owned(),
                    inode: ours.st_ino,
                    links: links_of(ours),
                };
                hand_over(task, &tasks_to, &found, take, &mut reporter);
            }
            reporter.report();
        });
        drop(tasks_to);
        for (task, found) in &found {
            take(task, found);
            reporter.report();
        }
        walked.map(|whole| whole && !cancel.is_cancelled())
    })
}

/// Reports the progress of a comparison.
struct Reporter<'a> {
    progress: &'a mut dyn FnMut(Progress),
    bytes: &'a AtomicU64,
    now: Progress,
    reported: Instant,
}

impl<'a> Reporter<'a> {
    fn begin(progress: &'a mut dyn FnMut(Progress), bytes: &'a AtomicU64) -> Self {
        let now = Progress::begin(Phase::Comparing);
        progress(now);
        Self {
            progress,
            bytes,
            now,
            reported: Instant::now(),
        }
    }

    fn report(&mut self) {
        if self.reported.elapsed() >= REPORT_INTERVAL {
            self.reported = Instant::now();
            self.now.bytes_done = self.bytes.load(Ordering::Relaxed);
            self.now.files_done = self.now.files_found;
            (self.progress)(self.now);
        }
    }
}

/// Hands a file to a free reader. While it waits, it handles finished comparisons.
fn hand_over(
    mut task: Task,
    tasks: &SyncSender<Task>,
    found: &Results,
    take: &mut dyn FnMut(Task, Found),
    reporter: &mut Reporter<'_>,
) {
    loop {
        while let Ok((task, found)) = found.try_recv() {
            take(task, found);
        }
        match tasks.try_send(task) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => return,
            Err(TrySendError::Full(back)) => task = back,
        }
        if let Ok((task, found)) = found.recv_timeout(REPORT_INTERVAL) {
            take(task, found);
        }
        reporter.report();
    }
}

/// Walks the snapshot, as far as the destination has the same folders.
fn walk_both(
    sides: &Sides<'_>,
    cancel: &Cancel,
    meet: &mut dyn FnMut(&Path, &Stat, Option<&Stat>),
) -> io::Result<bool> {
    let _ahead = ahead(sides)?;
    let mut todo: Vec<PathBuf> = sides.trees.iter().rev().cloned().collect();
    while let Some(path) = todo.pop() {
        if cancel.is_cancelled() {
            return Ok(false);
        }
        if sides.protected.holds(&path) {
            continue;
        }
        let ours = match statat(sides.snapshot, at(&path), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(ours) => ours,
            // No rsync follows that would report this.
            Err(error) if sides.after.is_some() => return Err(error.into()),
            Err(_) => continue,
        };
        let theirs = stat_within(sides.destination, &path);
        if is_folder(&ours) && theirs.as_ref().is_some_and(is_folder) {
            let names = match names_in(sides.snapshot.as_fd(), at(&path)) {
                Ok(names) => names,
                Err(error) if sides.after.is_some() => return Err(error),
                // rsync reports what can't be listed.
                Err(_) => Vec::new(),
            };
            let mut names: Vec<PathBuf> = names.into_iter().map(|(name, _)| name).collect();
            names.sort_by(|a, b| b.cmp(a));
            todo.extend(names.into_iter().map(|name| path.join(name)));
        } else {
            meet(&path, &ours, theirs.as_ref());
        }
    }
    Ok(true)
}

/// True if it was cancelled.
fn walk_snapshot(
    sides: &Sides<'_>,
    cancel: &Cancel,
    meet: &mut dyn FnMut(&Path, &Stat),
) -> io::Result<bool> {
    let mut todo = sides.trees.to_vec();
    while let Some(path) = todo.pop() {
        if cancel.is_cancelled() {
            return Ok(true);
        }
        let Ok(stat) = statat(sides.snapshot, at(&path), AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        if is_folder(&stat) {
            let names = names_in(sides.snapshot.as_fd(), at(&path)).unwrap_or_default();
            todo.extend(names.into_iter().map(|(name, _)| path.join(name)));
        } else {
            meet(&path, &stat);
        }
    }
    Ok(false)
}

/// Starts a scout, if there is anything to compare.
fn ahead(sides: &Sides<'_>) -> io::Result<Option<Scout>> {
    let is_there =
        |path: &&PathBuf| stat_within(sides.destination, path).is_some_and(|stat| is_folder(&stat));
    let trees: Vec<PathBuf> = sides.trees.iter().filter(is_there).cloned().collect();
    if trees.is_empty() {
        return Ok(None);
    }
    Ok(Some(Scout::begin(sides.snapshot.try_clone()?, trees, None)))
}

fn at(path: &Path) -> &Path {
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

/// What is at `path`, unless a folder above it is a symbolic link, which rsync would replace.
fn stat_within(root: &OwnedFd, path: &Path) -> Option<Stat> {
    let parents = path.ancestors().skip(1);
    for parent in parents.filter(|parent| !parent.as_os_str().is_empty()) {
        let stat = statat(root, parent, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        if !is_folder(&stat) {
            return None;
        }
    }
    statat(root, at(path), AtFlags::SYMLINK_NOFOLLOW).ok()
}

/// Whether every folder above `path` is a folder at the destination, or missing. Through a symbolic link
/// a file would be written elsewhere.
fn stays_inside(root: &OwnedFd, path: &Path) -> bool {
    let mut parents = path.ancestors().skip(1);
    parents.all(|parent| {
        statat(root, at(parent), AtFlags::SYMLINK_NOFOLLOW).map_or_else(
            |error| error == rustix::io::Errno::NOENT,
            |stat| is_folder(&stat),
        )
    })
}

/// What each reader thread uses.
#[derive(Clone, Copy)]
struct Reader<'a> {
    snapshot: &'a OwnedFd,
    destination: &'a OwnedFd,
    after: Option<&'a Listed>,
    bytes: &'a AtomicU64,
    cancel: &'a Cancel,
}

impl Reader<'_> {
    fn read(self, tasks: &Mutex<Receiver<Task>>, found: &Sender<(Task, Found)>) {
        loop {
            let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(task) = next else { return };
            let is = if self.cancel.is_cancelled() {
                Found::Stopped
            } else {
                self.compare(&task.path)
            };
            if found.send((task, is)).is_err() {
                return;
            }
        }
    }

    fn compare(self, path: &Path) -> Found {
        let open = |side: &OwnedFd| crate::long_path::open_regular_at(side.as_fd(), path);
        let (mut ours, mut theirs) = match (open(self.snapshot), open(self.destination)) {
            (Ok(ours), Ok(theirs)) => (ours, theirs),
            (Err(error), _) | (_, Err(error)) => return Found::Unreadable(error),
        };
        let mut known = self.after.and_then(|listed| {
            // Fails only if there is no cache.
            let _ = fadvise(&theirs, 0, None, Advice::DontNeed);
            let about = ours.metadata().ok()?;
            let key = Key::of(&about);
            let hash = || ContentHash::new(about.len());
            listed.knows(key).then(|| (listed, key, hash()))
        });
        let mut go_on = |read: &[u8]| {
            self.bytes.fetch_add(read.len() as u64, Ordering::Relaxed);
            if let Some((_, _, hash)) = &mut known {
                hash.update(read);
            }
            !self.cancel.is_cancelled()
        };
        match same_content(&mut ours, &mut theirs, &mut go_on) {
            Ok(Some(true)) => {
                let is_right =
                    known.and_then(|(listed, key, hash)| listed.compare(key, &hash.finish()));
                match is_right {
                    Some(false) => Found::Damaged,
                    _ => Found::Same,
                }
            }
            Ok(Some(false)) => Found::Differs,
            Ok(None) => Found::Stopped,
            Err(Unread::Kept(error) | Unread::Live(error)) => Found::Unreadable(error),
        }
    }
}
