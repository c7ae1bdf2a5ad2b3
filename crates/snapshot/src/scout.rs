//! Walks a tree on the volume ahead of rsync, many folders and files at once.
//!
//! rsync requests one folder, inode or file and waits for it before it requests the next. On a slow
//! connection each of them costs a round trip. The scout requests them earlier and in parallel, so that
//! rsync finds them in the kernel's caches. It stores nothing, changes nothing, and reports no errors
//! (rsync reports what can't be read). Without it everything is slower, but otherwise the same.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{Advice, AtFlags, FileType, Mode, OFlags, Stat, fadvise, openat, statat};

use crate::long_path::open_at;
use crate::walk::{Listed, is_folder, listed};

/// How many folders are read at once. With 24 in parallel the waiting is short compared with rsync's own
/// work.
const WALKERS: usize = 24;
/// How many folders of a source are read at once. Its disk is near.
const SOURCE_WALKERS: usize = 4;
/// How many threads request file content. A request waits only if the file's extent map is not in its
/// inode.
const READERS: usize = 8;
/// How many entries the walk may be ahead of rsync. What the kernel caches of them (about 1.3 KiB each)
/// must still be there when rsync comes.
pub(crate) const LEAD_ENTRIES_MAX: u64 = 200_000;
/// What the kernel caches of an entry of the volume and of the same one in the source, with the blocks that both are in.
const ENTRY_BYTES: u64 = 4 << 10;
/// How many bytes of file content are requested ahead of rsync: the connection's rate times some round
/// trips, and little compared with any machine's memory.
const LEAD_BYTES_MAX: u64 = 64 << 20;
/// The same limit in files.
const LEAD_FILES_MAX: usize = 4096;
/// Of a larger file only the beginning is requested. After that the kernel's read-ahead is as good.
const HEAD_BYTES_MAX: u64 = 8 << 20;
/// The size of one request: `force_page_cache_ra` (mm/readahead.c) accepts no more than the device's
/// read-ahead, and drops the rest silently.
const ADVICE_BYTES: u64 = 1 << 20;
const POLL: Duration = Duration::from_millis(10);

/// Inodes that nobody needs to be read: the files that the caller knows already.
pub type KnownInodes = Arc<Mutex<HashSet<u64>>>;

/// Receives each path and its attributes. What can't be examined or listed comes with its error. False ends the walk.
type Meet = Box<dyn Fn(&Path, io::Result<&Stat>) -> bool + Send + Sync>;

/// Whether the folder with this path and these attributes is entered.
type IsEntered = Box<dyn Fn(&Path, &Stat) -> bool + Send + Sync>;

/// How many entries, of those that were just examined, are still in the kernel's caches when rsync comes to them: as many
/// as fit into half of the memory that programs may use.
pub(crate) fn entries_in_memory() -> u64 {
    let about = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (available_in(&about) / 2 / ENTRY_BYTES).max(LEAD_ENTRIES_MAX)
}

/// `MemAvailable` in `/proc/meminfo` (Documentation/filesystems/proc.rst), in bytes.
fn available_in(meminfo: &str) -> u64 {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0_u64).saturating_mul(1024)
}

/// Examines everything below `root`, many folders at once, in no order. `meet` gets paths relative to it. Returns how
/// many entries there are.
pub(crate) fn each_at_once(root: OwnedFd, meet: Meet) -> u64 {
    let shared = Shared {
        // Nobody follows.
        followed: AtomicU64::new(u64::MAX),
        meet: Some(meet),
        ..Shared::new(root, vec![PathBuf::from(".")])
    };
    let scout = Scout::of(shared);
    // Also where no thread can be started.
    scout.shared.walk();
    let shared = Arc::clone(&scout.shared);
    drop(scout);
    shared.walked.load(Ordering::Relaxed)
}

/// Examines what is below `root` until `stopped` is set, in a few threads. `meet` can set it, too. `is_entered` chooses
/// the folders.
pub(crate) fn examine(root: OwnedFd, stopped: Arc<AtomicBool>, is_entered: IsEntered, meet: Meet) {
    let shared = Shared {
        stopped,
        followed: AtomicU64::new(u64::MAX),
        is_entered: Some(is_entered),
        meet: Some(meet),
        ..Shared::new(root, vec![PathBuf::from(".")])
    };
    std::thread::scope(|scope| {
        for _ in 1..SOURCE_WALKERS {
            // Without it the others do its work.
            let _ = std::thread::Builder::new()
                .name("sources-ahead".to_owned())
                .spawn_scoped(scope, || shared.walk());
        }
        shared.walk();
    });
}

/// The scout's threads. They end when this is dropped, and have nothing open then.
#[derive(Debug)]
pub(crate) struct Scout {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// A tree whose file content will be copied, too.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    /// The destination: `to.join(root)` is the copy of a root.
    pub(crate) to: PathBuf,
    /// The roots are relative to this.
    pub(crate) base: PathBuf,
    /// Files of at most this size are stored beside their inode. The walk has read them.
    pub(crate) inline_bytes_max: u64,
}

struct Shared {
    root: OwnedFd,
    stopped: Arc<AtomicBool>,
    /// How many entries the walk and rsync have processed.
    walked: AtomicU64,
    followed: AtomicU64,
    walk: Mutex<Walk>,
    /// Signals that the walk has folders, or has ended.
    folders: Condvar,
    copied: Option<Copied>,
    known: Option<KnownInodes>,
    meet: Option<Meet>,
    is_entered: Option<IsEntered>,
    order: Mutex<Order>,
    lead: Mutex<Lead>,
}

/// Folders that are not read yet, the next one last.
#[derive(Debug, Default)]
struct Walk {
    todo: Vec<PathBuf>,
    busy: usize,
}

/// The regular files in roughly the order in which rsync copies them: the files of a folder by name,
/// then its folders by name, each with all that is in it.
#[derive(Debug, Default)]
struct Order {
    folders: Vec<PathBuf>,
    files: VecDeque<PathBuf>,
}

/// Files that were requested and that rsync may not have copied yet.
#[derive(Debug, Default)]
struct Lead {
    files: VecDeque<Asked>,
    bytes: u64,
}

#[derive(Debug)]
struct Asked {
    copy: PathBuf,
    stat: Stat,
    bytes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scout {
    /// Begins to read the folders and inodes of `trees`, paths relative to `root`, in this order. With
    /// `copied` it requests the file content, too. Missing trees are skipped.
    pub(crate) fn begin(root: OwnedFd, trees: Vec<PathBuf>, copied: Option<Copied>) -> Self {
        Self::begin_without(root, trees, copied, None)
    }

    /// As [`Self::begin`], without the inodes that are `known`.
    pub(crate) fn begin_without(
        root: OwnedFd,
        trees: Vec<PathBuf>,
        copied: Option<Copied>,
        known: Option<KnownInodes>,
    ) -> Self {
        let mut todo = trees;
        todo.reverse();
        Self::of(Shared {
            copied,
            known,
            ..Shared::new(root, todo)
        })
    }

    fn of(shared: Shared) -> Self {
        let reads = shared.copied.is_some() && !lock(&shared.walk).todo.is_empty();
        let mut scout = Self {
            shared: Arc::new(shared),
            threads: Vec::new(),
        };
        for _ in 0..WALKERS {
            scout.spawn("walk-ahead", Shared::walk);
        }
        if reads {
            for _ in 0..READERS {
                scout.spawn("read-ahead", Shared::request_files);
            }
        }
        scout
    }

    /// Sets how many entries rsync has processed.
    pub(crate) fn follow(&self, entries: u64) {
        self.shared.followed.store(entries, Ordering::Relaxed);
    }

    /// If a thread can't be started, the scout is slower.
    fn spawn(&mut self, name: &str, body: fn(&Shared)) {
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(&shared));
        self.threads.extend(started);
    }
}

impl Drop for Scout {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.walk));
        self.shared.folders.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// `todo`: the next folder last.
    fn new(root: OwnedFd, todo: Vec<PathBuf>) -> Self {
        Self {
            root,
            stopped: Arc::default(),
            walked: AtomicU64::new(0),
            followed: AtomicU64::new(0),
            order: Mutex::new(Order {
                folders: todo.clone(),
                files: VecDeque::new(),
            }),
            walk: Mutex::new(Walk { todo, busy: 0 }),
            folders: Condvar::new(),
            copied: None,
            known: None,
            meet: None,
            is_entered: None,
            lead: Mutex::default(),
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// The body of a walker thread.
    fn walk(&self) {
        let mut walk = lock(&self.walk);
        while !self.is_stopped() {
            let Some(folder) = walk.todo.pop() else {
                if walk.busy == 0 {
                    break;
                }
                walk = self
                    .folders
                    .wait(walk)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            walk.busy += 1;
            drop(walk);
            self.wait_for_rsync();
            let below = self.read_folder(&folder);
            walk = lock(&self.walk);
            walk.busy -= 1;
            walk.todo.extend(below);
            self.folders.notify_all();
        }
        self.folders.notify_all();
    }

    fn wait_for_rsync(&self) {
        let lead = || {
            let followed = self.followed.load(Ordering::Relaxed);
            self.walked.load(Ordering::Relaxed).saturating_sub(followed)
        };
        while lead() > LEAD_ENTRIES_MAX && !self.is_stopped() {
            std::thread::sleep(POLL);
        }
    }

    /// Reads a folder and the inodes in it. Returns its folders, the first one last.
    fn read_folder(&self, folder: &Path) -> Vec<PathBuf> {
        let (open, mut entries) = match self.open_and_list(folder) {
            Ok(found) => found,
            Err(error) => {
                self.meet(folder, Err(error));
                return Vec::new();
            }
        };
        // Inodes are stored in the order of their numbers.
        entries.sort_unstable_by_key(|entry| entry.inode);
        if let Some(known) = &self.known {
            let known = lock(known);
            let count = entries.len();
            entries
                .retain(|entry| entry.kind == FileType::Directory || !known.contains(&entry.inode));
            let skipped = (count - entries.len()) as u64;
            self.walked.fetch_add(skipped, Ordering::Relaxed);
        }
        let mut below = Vec::new();
        for entry in entries {
            if self.is_stopped() {
                return Vec::new();
            }
            let stat = statat(&open, &entry.name, AtFlags::SYMLINK_NOFOLLOW);
            self.walked.fetch_add(1, Ordering::Relaxed);
            let is_below = stat.as_ref().is_ok_and(is_folder);
            if is_below || self.meet.is_some() {
                let path = folder.join(entry.name);
                self.meet(&path, stat.as_ref().map_err(|error| (*error).into()));
                let is_entered = || match (&self.is_entered, &stat) {
                    (Some(is_entered), Ok(stat)) => is_entered(&path, stat),
                    _ => true,
                };
                below.extend((is_below && is_entered()).then_some(path));
            }
        }
        below.sort_unstable_by(|a, b| b.cmp(a));
        below
    }

    fn meet(&self, path: &Path, found: io::Result<&Stat>) {
        if let Some(meet) = &self.meet
            && !meet(path.strip_prefix(".").unwrap_or(path), found)
        {
            self.stopped.store(true, Ordering::SeqCst);
        }
    }

    fn open_and_list(&self, folder: &Path) -> io::Result<(OwnedFd, Vec<Listed>)> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = open_at(self.root.as_fd(), folder, flags)?;
        let entries = listed(open.as_fd())?;
        Ok((open, entries))
    }

    /// The body of a reader thread.
    fn request_files(&self) {
        let Some(copied) = &self.copied else { return };
        while !self.is_stopped() {
            let Some(path) = self.next_file() else { return };
            let Ok(stat) = statat(&self.root, &path, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let Ok(name) = path.strip_prefix(&copied.base) else {
                continue;
            };
            let asked = Asked {
                copy: copied.to.join(name),
                bytes: u64::try_from(stat.st_size).unwrap_or(0).min(HEAD_BYTES_MAX),
                stat,
            };
            let wanted = FileType::from_raw_mode(asked.stat.st_mode) == FileType::RegularFile
                && asked.bytes > copied.inline_bytes_max
                && !asked.is_copied();
            if wanted {
                let bytes = asked.bytes;
                if self.wait_for_lead(asked) {
                    self.request(&path, bytes);
                }
            }
        }
    }

    fn next_file(&self) -> Option<PathBuf> {
        let mut order = lock(&self.order);
        loop {
            if let Some(file) = order.files.pop_front() {
                return Some(file);
            }
            let folder = order.folders.pop().filter(|_| !self.is_stopped())?;
            let listed = self.open_and_list(&folder);
            let mut entries = listed.map_or_else(|_| Vec::new(), |(_, entries)| entries);
            entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            let (folders, files): (Vec<Listed>, Vec<Listed>) = entries
                .into_iter()
                .partition(|entry| entry.kind == FileType::Directory);
            let path = |entry: Listed| folder.join(entry.name);
            order.folders.extend(folders.into_iter().rev().map(path));
            order.files.extend(files.into_iter().map(path));
        }
    }

    /// Waits until rsync is near enough. False if the scout must end.
    fn wait_for_lead(&self, asked: Asked) -> bool {
        loop {
            if self.is_stopped() {
                return false;
            }
            let mut lead = lock(&self.lead);
            if !lead.has_room() {
                lead.drop_copied();
            }
            if lead.has_room() {
                lead.bytes += asked.bytes;
                lead.files.push_back(asked);
                return true;
            }
            drop(lead);
            std::thread::sleep(POLL);
        }
    }

    /// Makes the kernel read the first bytes of a file into its cache, without waiting.
    fn request(&self, path: &Path, bytes: u64) {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = openat(&self.root, path, flags, Mode::empty()).map(File::from) else {
            return;
        };
        let mut offset = 0;
        while offset < bytes && !self.is_stopped() {
            let len = NonZeroU64::new((bytes - offset).min(ADVICE_BYTES));
            if fadvise(&file, offset, len, Advice::WillNeed).is_err() {
                return;
            }
            offset += ADVICE_BYTES;
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Asked {
    /// Whether the copy exists. rsync gives it its name when content and time are complete.
    fn is_copied(&self) -> bool {
        let Ok(copy) = rustix::fs::lstat(&self.copy) else {
            return false;
        };
        let of = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec);
        of(&copy) == of(&self.stat)
    }
}

impl Lead {
    fn has_room(&self) -> bool {
        self.bytes < LEAD_BYTES_MAX && self.files.len() < LEAD_FILES_MAX
    }

    /// Drops what rsync has copied. rsync copies in roughly this order, so all files before a copied one
    /// count as copied, too. rsync skips some files, and must not be waited for because of them.
    fn drop_copied(&mut self) {
        let mut probe = self.files.len();
        while probe > 0 {
            probe /= 2;
            if self.files.get(probe).is_some_and(Asked::is_copied) {
                for dropped in self.files.drain(..=probe) {
                    self.bytes -= dropped.bytes;
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;
    use std::time::Instant;

    /// 3 folders with 4 files each, one of the folders below another, and a FIFO.
    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["tree/b", "tree/a", "tree/a/deep"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
            for file in ["4", "2", "a.txt", "Z"] {
                fs::write(dir.path().join(folder).join(file), [7; 5000]).unwrap();
            }
        }
        let fifo = dir.path().join("tree/a/0-fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::from(0o600)).unwrap();
        fs::write(dir.path().join("tree/empty"), "").unwrap();
        dir
    }

    fn begin(dir: &Path, copied: Option<Copied>) -> Scout {
        let root = crate::walk::open_folder_at(dir).unwrap();
        Scout::begin(root, vec!["tree".into(), "is-not-there".into()], copied)
    }

    fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !so() {
            assert!(begun.elapsed() < Duration::from_secs(60), "never: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn memory_that_is_available_is_read_in_bytes() {
        let about =
            "MemTotal:  100 kB\nMemFree:    1 kB\nMemAvailable:    2048000 kB\nBuffers: 3 kB\n";
        assert_eq!(available_in(about), 2_048_000 << 10);
        assert_eq!(available_in(""), 0);
    }

    #[test]
    fn walkers_read_every_entry_once_and_end() {
        let dir = tree();
        let scout = begin(dir.path(), None);
        wait_until("all walkers ended", || {
            scout.threads.iter().all(JoinHandle::is_finished)
        });
        assert_eq!(scout.shared.walked.load(Ordering::SeqCst), 3 + 12 + 2);
    }

    #[test]
    fn each_path_is_met_once_and_an_error_is_not_lost() {
        let dir = tree();
        let met = Arc::new(Mutex::new(Vec::new()));
        let root = || crate::walk::open_folder_at(&dir.path().join("tree")).unwrap();
        let walk = |goes_on: bool| {
            let list = Arc::clone(&met);
            let entries = each_at_once(
                root(),
                Box::new(move |path, found| {
                    let found = found.map(is_folder).map_err(|error| error.kind());
                    lock(&list).push((path.to_owned(), found));
                    goes_on
                }),
            );
            (entries, std::mem::take(&mut *lock(&met)))
        };
        let (entries, mut found) = walk(true);
        found.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!((entries, found.len()), (3 + 12 + 2, 3 + 12 + 2));
        found.dedup_by(|a, b| a.0 == b.0);
        assert_eq!(found.len(), 3 + 12 + 2);
        let folders = found.iter().filter(|(_, found)| *found == Ok(true));
        assert_eq!(folders.count(), 3);
        assert!(found.contains(&("a/deep/Z".into(), Ok(false))));
        let (_, found) = walk(false);
        assert!(found.len() < 3 + 12 + 2, "{found:?}");
        fs::remove_dir_all(dir.path().join("tree")).unwrap();
        fs::write(dir.path().join("tree"), "").unwrap();
        let file = File::open(dir.path().join("tree")).unwrap();
        let list = Arc::clone(&met);
        let meet = move |path: &Path, found: io::Result<&Stat>| {
            lock(&list).push((path.to_owned(), Err(found.unwrap_err().kind())));
            true
        };
        assert_eq!(each_at_once(file.into(), Box::new(meet)), 0);
        let not_listed = (PathBuf::new(), Err(io::ErrorKind::NotADirectory));
        assert_eq!(*lock(&met), [not_listed]);
    }

    #[test]
    fn files_are_requested_in_the_order_of_rsync() {
        let dir = tree();
        let to = tempfile::tempdir().unwrap();
        sprat_testkit::requires!(sprat_testkit::needs::program("rsync"));
        let printed = Command::new("rsync")
            .args(["-a", "--no-specials", "--out-format=%n", "tree"])
            .arg(to.path())
            .current_dir(dir.path())
            .output()
            .unwrap();
        let theirs: Vec<PathBuf> = String::from_utf8(printed.stdout)
            .unwrap()
            .lines()
            .filter(|line| !line.ends_with('/') && !line.contains("fifo"))
            .map(PathBuf::from)
            .collect();
        let root = crate::walk::open_folder_at(dir.path()).unwrap();
        let scout = Scout::begin(root, Vec::new(), None);
        lock(&scout.shared.order).folders.push("tree".into());
        let mut ours: Vec<PathBuf> = std::iter::from_fn(|| scout.shared.next_file()).collect();
        ours.retain(|path| !path.ends_with("0-fifo"));
        assert_eq!(theirs.len(), 13);
        assert_eq!(ours, theirs);
    }

    #[test]
    fn content_is_requested_only_within_the_lead() {
        let dir = tree();
        let to = tempfile::tempdir().unwrap();
        let scout = begin(dir.path(), None);
        let asked = |number: usize| {
            let path = dir.path().join("tree/b/4");
            Asked {
                copy: to.path().join(number.to_string()),
                stat: rustix::fs::lstat(&path).unwrap(),
                bytes: LEAD_BYTES_MAX / 4,
            }
        };
        for number in 0..4 {
            assert!(scout.shared.wait_for_lead(asked(number)));
        }
        let mut lead = lock(&scout.shared.lead);
        lead.drop_copied();
        assert!(!lead.has_room(), "nothing is copied yet");
        // This one is copied, with its size and time. rsync skipped the two before it.
        let copy = to.path().join("2");
        fs::write(&copy, [7; 5000]).unwrap();
        let set_time = |time| File::open(&copy).unwrap().set_modified(time).unwrap();
        set_time(std::time::UNIX_EPOCH);
        lead.drop_copied();
        assert!(!lead.has_room(), "the copy has another time");
        let time = fs::metadata(dir.path().join("tree/b/4"))
            .unwrap()
            .modified();
        set_time(time.unwrap());
        lead.drop_copied();
        assert_eq!((lead.files.len(), lead.bytes), (1, LEAD_BYTES_MAX / 4));
    }

    #[test]
    fn files_beside_their_inode_are_not_requested() {
        let dir = tree();
        for (inline_bytes_max, requested) in [(4999, 12), (5000, 0)] {
            let to = tempfile::tempdir().unwrap();
            let copied = Copied {
                to: to.path().to_owned(),
                base: "tree".into(),
                inline_bytes_max,
            };
            let scout = begin(dir.path(), Some(copied));
            wait_until("all ended", || {
                scout.threads.iter().all(JoinHandle::is_finished)
            });
            assert_eq!(lock(&scout.shared.lead).files.len(), requested);
        }
    }

    #[test]
    fn a_dropped_scout_ends_even_if_rsync_never_follows() {
        let dir = tree();
        let to = tempfile::tempdir().unwrap();
        let copied = Copied {
            to: to.path().to_owned(),
            base: "tree".into(),
            inline_bytes_max: 0,
        };
        let scout = begin(dir.path(), Some(copied));
        scout
            .shared
            .walked
            .store(2 * LEAD_ENTRIES_MAX, Ordering::SeqCst);
        lock(&scout.shared.lead).bytes = LEAD_BYTES_MAX;
        drop(scout);
    }
}
