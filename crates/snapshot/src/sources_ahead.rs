//! Examines the files of the sources while the container is being opened, so that rsync finds their inodes in the
//! kernel's caches. Opening is mostly waiting for the server.
//!
//! Nothing depends on it, and it reports nothing. It must do no harm:
//! - It enters only disks of this machine that answer at once: no network, no FUSE, no automount point, and no disk
//!   that may have to spin up for a server that then can't be reached.
//! - It crosses no mount point, and enters no folder that a pattern of the job clearly excludes.
//! - Nobody waits long for its threads: a disk may hang.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{Stat, fstat, major, minor};

use crate::automounts::is_clearly_excluded;
use crate::mounts::{Mount, holding, mounts};
use crate::paths::plain_path;
use crate::scout;
use crate::spec::SnapshotSpec;
use crate::walk::{is_folder, open_folder_at, open_folder_below};

/// File systems on disks.
const KINDS: [&str; 6] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"];
/// Block devices whose content is a file of another mount, or on another machine.
const ELSEWHERE: [&str; 4] = ["loop", "nbd", "rbd", "drbd"];
/// How long the end waits for the threads. They have a folder open, and a hook may want to unmount its file system.
const END_MAX: Duration = Duration::from_millis(200);
const POLL: Duration = Duration::from_millis(2);

/// Receives each path that is examined, below its source. False ends it all.
type Meet = Arc<dyn Fn(&Path) -> bool + Send + Sync>;

/// Reads in the background until it is dropped.
#[derive(Debug)]
pub struct SourcesAhead {
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SourcesAhead {
    /// Begins with the first source of the first job.
    #[must_use]
    pub fn begin(specs: Vec<SnapshotSpec>) -> Self {
        let left = AtomicU64::new(scout::entries_in_memory());
        Self::begin_with(
            specs,
            Arc::new(move |_: &Path| {
                let one_less = |left: u64| left.checked_sub(1);
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
                    .is_ok()
            }),
        )
    }

    fn begin_with(specs: Vec<SnapshotSpec>, meet: Meet) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let ahead = Arc::clone(&stopped);
        let started = std::thread::Builder::new()
            .name("sources-ahead".to_owned())
            .spawn(move || {
                let Ok(table) = mounts() else { return };
                for spec in specs {
                    for source in &spec.sources {
                        read(source, &spec, &table, &ahead, &meet);
                    }
                }
            });
        Self {
            stopped,
            // Without it rsync waits longer for the disk.
            thread: started.ok(),
        }
    }
}

impl Drop for SourcesAhead {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let until = Instant::now() + END_MAX;
        while let Some(thread) = &self.thread
            && !thread.is_finished()
            && Instant::now() < until
        {
            std::thread::sleep(POLL);
        }
    }
}

fn read(
    source: &Path,
    spec: &SnapshotSpec,
    table: &[Mount],
    stopped: &Arc<AtomicBool>,
    meet: &Meet,
) {
    if stopped.load(Ordering::SeqCst) {
        return;
    }
    let Ok(source) = plain_path(source) else {
        return;
    };
    let mount = holding(table, &source);
    if !mount.is_some_and(|mount| {
        is_on_disk(mount) && block_device(mount).is_some_and(|block| is_awake(&block))
    }) {
        return;
    }
    walk(source, spec, stopped, meet);
}

fn walk(source: PathBuf, spec: &SnapshotSpec, stopped: &Arc<AtomicBool>, meet: &Meet) {
    let Some((root, device)) = open(&source) else {
        return;
    };
    let (spec, meet) = (spec.clone(), Arc::clone(meet));
    let is_entered = move |below: &Path, found: &Stat| {
        found.st_dev == device && !is_clearly_excluded(&spec, &source.join(below))
    };
    scout::examine(
        root,
        Arc::clone(stopped),
        Box::new(is_entered),
        Box::new(move |path, found| found.is_err() || meet(path)),
    );
}

/// Opens the folder of a source, and finds its device. No symbolic link is followed: the mount of another path was
/// checked.
fn open(source: &Path) -> Option<(OwnedFd, u64)> {
    let root = open_folder_at(Path::new("/")).ok()?;
    let below = source.strip_prefix("/").ok()?;
    let folder = open_folder_below(root.as_fd(), below).ok()?;
    let about = fstat(&folder).ok()?;
    is_folder(&about).then_some((folder, about.st_dev))
}

/// Whether a file system on a disk is mounted there. `table` has no mount that another one hides.
fn is_on_disk(mount: &Mount) -> bool {
    KINDS.contains(&mount.kind.as_str()) && !mount.empty_automount && !mount.on_automount
}

/// The folder of the mount's disk or partition in `/sys`.
fn block_device(mount: &Mount) -> Option<PathBuf> {
    let (major, minor) = match mount.device {
        // btrfs has numbers of its own.
        (0, _) => {
            let device = Path::new(&mount.source);
            let device = rustix::fs::stat(device.starts_with("/dev").then_some(device)?).ok()?;
            (major(device.st_rdev), minor(device.st_rdev))
        }
        numbers => numbers,
    };
    std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
}

/// Whether a disk answers at once, because it does not rotate. Virtual disks often claim to rotate.
fn is_awake(block: &Path) -> bool {
    let rotates = |block: &Path| std::fs::read_to_string(block.join("queue/rotational"));
    // A partition has what its disk has.
    let rotates = rotates(block).or_else(|_| rotates(block.parent().unwrap_or(block)));
    let is_in = |names: &[&str]| {
        let begins = |part: Component<'_>| {
            let part = part.as_os_str().to_string_lossy();
            names.iter().any(|name| part.starts_with(name))
        };
        block.components().any(begins)
    };
    if is_in(&ELSEWHERE) {
        return false;
    }
    if rotates.is_ok_and(|rotates| rotates.trim() == "0") || is_in(&["virtio"]) {
        return true;
    }
    // RAID, LVM and encryption have the disks below them.
    let below = std::fs::read_dir(block.join("slaves"));
    let below: Vec<PathBuf> = below.map_or_else(
        |_| Vec::new(),
        |below| {
            let below = below.flatten().map(|entry| entry.path().canonicalize());
            below.map(Result::unwrap_or_default).collect()
        },
    );
    !below.is_empty() && below.iter().all(|block| is_awake(block))
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;
    use crate::JobName;
    use sprat_testkit::test_folder::TestFolder;
    use sprat_testkit::tmpfs::Tmpfs;
    use sprat_testkit::{needs, requires};

    fn mount(kind: &str) -> Mount {
        Mount {
            at: "/data".into(),
            kind: kind.to_owned(),
            ..Mount::default()
        }
    }

    fn spec(source: &Path, excluded: &str) -> SnapshotSpec {
        let job = JobName::new("home").unwrap();
        SnapshotSpec {
            excludes: vec![excluded.to_owned()],
            ..SnapshotSpec::new(job, vec![source.to_owned()])
        }
    }

    /// A list of what was met, and the closure that fills it.
    fn noting(most: usize) -> (Arc<Mutex<Vec<PathBuf>>>, Meet) {
        let met = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&met);
        let meet = move |path: &Path| {
            let mut list = list.lock().unwrap_or_else(PoisonError::into_inner);
            list.push(path.to_owned());
            list.len() < most
        };
        (met, Arc::new(meet))
    }

    #[test]
    fn only_mounted_disks_are_read() {
        assert!(is_on_disk(&mount("ext4")));
        for kind in ["nfs4", "cifs", "fuse.sshfs", "autofs", "tmpfs", "overlay"] {
            assert!(!is_on_disk(&mount(kind)), "{kind}");
        }
        let automount = Mount {
            on_automount: true,
            ..mount("ext4")
        };
        assert!(!is_on_disk(&automount));
    }

    #[test]
    fn disk_that_rotates_is_left_asleep() {
        let sys = tempfile::tempdir().unwrap();
        let block = |path: &str, rotates: Option<&str>| {
            let block = sys.path().join(path);
            std::fs::create_dir_all(block.join("queue")).unwrap();
            std::fs::create_dir_all(block.join("slaves")).unwrap();
            if let Some(rotates) = rotates {
                std::fs::write(block.join("queue/rotational"), format!("{rotates}\n")).unwrap();
            }
            block
        };
        let (ssd, disk) = (block("ssd", Some("0")), block("disk", Some("1")));
        let partition = block("disk/disk1", None);
        let guest = block("virtio3/vda", Some("1"));
        let raid = block("md0", Some("1"));
        std::os::unix::fs::symlink(&guest, raid.join("slaves/vda")).unwrap();
        let mixed = block("md1", Some("1"));
        for below in [&guest, &disk] {
            let name = below.file_name().unwrap();
            std::os::unix::fs::symlink(below, mixed.join("slaves").join(name)).unwrap();
        }
        for (block, awake) in [
            (ssd, true),
            (disk, false),
            (partition, false),
            (guest, true),
            (raid, true),
            (mixed, false),
            (block("unknown", None), false),
            (block("virtual/block/loop3", Some("0")), false),
            (block("virtual/block/nbd0", Some("0")), false),
        ] {
            assert_eq!(is_awake(&block), awake, "{}", block.display());
        }
    }

    #[test]
    fn neither_other_file_systems_nor_excluded_folders_are_entered() {
        requires!(needs::root());
        let folder = TestFolder::new("sprat-ahead-");
        let source = folder.path().join("source");
        for below in ["in/deep", "other", "cache", "in/cache"] {
            std::fs::create_dir_all(source.join(below)).unwrap();
        }
        let _other = Tmpfs::mount(&source.join("other"), 1);
        for file in ["in/deep/a", "other/b", "cache/c", "in/cache/d"] {
            std::fs::write(source.join(file), "x").unwrap();
        }
        // Nobody follows a link, here not even that to the source.
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&source, &link).unwrap();
        let (met, meet) = noting(usize::MAX);
        let stopped = Arc::default();
        for source in [&source, &link] {
            walk(source.clone(), &spec(source, "/**/cache"), &stopped, &meet);
            walk(source.clone(), &spec(source, "cache/"), &stopped, &meet);
        }
        let mut met = std::mem::take(&mut *met.lock().unwrap());
        met.sort();
        let counts: Vec<_> = met
            .chunk_by(|a, b| a == b)
            .map(|same| (same[0].to_str().unwrap(), same.len()))
            .collect();
        // The first pattern is not a simple one, so it is ignored.
        let expected = [
            ("cache", 2),
            ("cache/c", 1),
            ("in", 2),
            ("in/cache", 2),
            ("in/cache/d", 1),
            ("in/deep", 2),
            ("in/deep/a", 2),
            ("other", 2),
        ];
        assert_eq!(counts, expected);
    }

    #[test]
    fn walk_ends_when_enough_was_met_and_when_dropped() {
        let folder = tempfile::tempdir().unwrap();
        for name in 0..1000 {
            std::fs::write(folder.path().join(name.to_string()), "").unwrap();
        }
        let (met, meet) = noting(3);
        let stopped = Arc::default();
        let spec = spec(folder.path(), "x");
        walk(folder.path().to_owned(), &spec, &stopped, &meet);
        assert_eq!(met.lock().unwrap().len(), 3);
        assert!(stopped.load(Ordering::SeqCst));
        walk(folder.path().to_owned(), &spec, &stopped, &meet);
        assert_eq!(met.lock().unwrap().len(), 3, "it was stopped");

        // As on a disk that hangs.
        let thread = std::thread::spawn(|| {
            loop {
                std::thread::park();
            }
        });
        let ahead = SourcesAhead {
            stopped: Arc::default(),
            thread: Some(thread),
        };
        drop(ahead);
    }
}
