//! A volume's folder and a source tree for tests, and the calls that every test makes.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod failing_source;
pub mod failing_volume;
pub mod slow_source;
pub mod sticky_source;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo};
use jiff::Timestamp;
use sprat_snapshot::{
    Cancel, EntryKind, JobName, Progress, RestoreReport, RestoreSpec, SnapshotEntry, SnapshotError,
    SnapshotReport, SnapshotSpec,
};
use sprat_testkit::test_folder::TestFolder;

/// An empty volume and an empty source beside it, removed at the end.
pub struct Bench {
    dir: TestFolder,
}

impl Bench {
    pub fn new() -> Self {
        let this = Self {
            dir: TestFolder::new("sprat-snapshot-"),
        };
        fs::create_dir(this.volume()).unwrap();
        fs::create_dir(this.source()).unwrap();
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn volume(&self) -> PathBuf {
        self.path("volume")
    }

    pub fn source(&self) -> PathBuf {
        self.path("source")
    }

    pub fn job(&self) -> PathBuf {
        self.volume().join("home")
    }

    pub fn spec(&self) -> SnapshotSpec {
        SnapshotSpec::new(job_name(), vec![self.source()])
    }

    pub fn take(&self) -> SnapshotReport {
        self.try_take(&self.spec()).unwrap()
    }

    pub fn try_take(&self, spec: &SnapshotSpec) -> Result<SnapshotReport, SnapshotError> {
        take_into(&self.volume(), spec)
    }

    /// The source as it is in a folder of the job.
    pub fn in_snapshot(&self, folder: impl std::fmt::Display) -> PathBuf {
        below(&self.job().join(folder.to_string()), &self.source())
    }

    pub fn restore(&self, spec: &RestoreSpec) -> Result<RestoreReport, SnapshotError> {
        sprat_snapshot::restore(&self.volume(), spec, &mut |_| {}, &Cancel::new())
    }

    pub fn list(&self) -> Vec<SnapshotEntry> {
        sprat_snapshot::list(&self.volume()).unwrap()
    }

    pub fn kinds(&self) -> Vec<EntryKind> {
        if !self.job().exists() {
            return Vec::new();
        }
        self.list().iter().map(|entry| entry.kind).collect()
    }

    /// A script that runs the shell lines `before` and then the real rsync. `"$@"` are rsync's
    /// arguments.
    pub fn rsync_script(&self, before: &str, rsync: &str) -> PathBuf {
        let path = self.path("rsync-script");
        let text = format!(
            "#!/bin/sh\ncase \"$*\" in *--version) exec rsync \"$@\";; esac\n{before}\nexec {rsync} \"$@\"\n"
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// Makes the job's last run look like one that was stopped after rsync had copied everything.
    pub fn make_partial_of(&self, report: &SnapshotReport) {
        let name = report.name.to_string();
        fs::rename(
            self.job().join(&name),
            self.job().join(format!("{name}.partial")),
        )
        .unwrap();
    }
}

pub fn job_name() -> JobName {
    JobName::new("home").unwrap()
}

pub fn now() -> Timestamp {
    Timestamp::try_from(SystemTime::now()).unwrap()
}

pub fn take_into(volume: &Path, spec: &SnapshotSpec) -> Result<SnapshotReport, SnapshotError> {
    sprat_snapshot::take(volume, spec, now(), &mut |_: Progress| {}, &Cancel::new())
}

pub fn below(tree: &Path, source: &Path) -> PathBuf {
    tree.join(source.strip_prefix("/").unwrap())
}

pub fn inode(path: &Path) -> (u64, u64) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}

/// Waits for `done`. Fails with `what` if it does not come.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("waited in vain for {what}");
}

/// What this machine lacks for an ext4 image, if anything.
pub fn loop_missing() -> Option<String> {
    sprat_testkit::needs::root()
        .or_else(|| sprat_testkit::needs::program("mkfs.ext4"))
        .or_else(|| sprat_testkit::needs::program("losetup"))
        .or_else(|| {
            (!Path::new("/dev/loop-control").exists()).then(|| "no loop devices".to_owned())
        })
}

/// A small, mounted ext4 on a loop device. Dropping it removes all of it.
pub struct SmallExt4 {
    pub at: PathBuf,
    image: PathBuf,
}

impl SmallExt4 {
    pub fn new(bench: &Bench, size: &str, mkfs: &[&str]) -> Self {
        let image = bench.path("image");
        let at = bench.path("mounted");
        run("truncate", &["-s", size, image.to_str().unwrap()]);
        let mut arguments = vec!["-q", "-F", "-m0"];
        arguments.extend(mkfs);
        arguments.push(image.to_str().unwrap());
        run("mkfs.ext4", &arguments);
        fs::create_dir(&at).unwrap();
        let disk = Self { at, image };
        disk.mount();
        disk
    }

    fn mount(&self) {
        let (image, at) = (self.image.to_str().unwrap(), self.at.to_str().unwrap());
        run("mount", &["-o", "loop", image, at]);
    }

    /// Writes other bytes at the beginning of each block that begins with `bytes`, as a fault of the disk does.
    pub fn damage(&self, bytes: &[u8], by: &[u8]) {
        run("umount", &[self.at.to_str().unwrap()]);
        let mut content = fs::read(&self.image).unwrap();
        let blocks = content.chunks_exact_mut(4096);
        let mut found = 0;
        for block in blocks.filter(|block| block.starts_with(bytes)) {
            block[..by.len()].copy_from_slice(by);
            found += 1;
        }
        assert!(found > 0, "no block begins so");
        fs::write(&self.image, content).unwrap();
        self.mount();
    }
}

impl Drop for SmallExt4 {
    fn drop(&mut self) {
        // A failed test may have left it busy.
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.at)
            .status();
    }
}

pub fn run(program: &str, arguments: &[&str]) {
    let status = std::process::Command::new(program)
        .args(arguments)
        .status()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// What a FUSE file system of a test reports of a file of `bytes`, or of a folder.
fn attributes(inode: INodeNo, is_folder: bool, bytes: u64, time: SystemTime) -> FileAttr {
    let (kind, perm, nlink) = match is_folder {
        true => (FileType::Directory, 0o755, 2),
        false => (FileType::RegularFile, 0o644, 1),
    };
    FileAttr {
        ino: inode,
        size: if is_folder { 0 } else { bytes },
        blocks: bytes.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}
