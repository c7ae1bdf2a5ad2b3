//! Snapshots on a real btrfs: rsync into the subvolume `work`, and read-only snapshots of it.

mod blocks;
mod full;
mod hosts;
mod large_files;
mod modes;
mod mount_points;
mod wrong_content;

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use sprat_snapshot::{
    Cancel, CheckSpec, CheckWhat, EntryKind, InodeFacts, InodeVersion, JobName, KeepCount,
    KeepRules, PruneReport, PruneSpec, RemoveSpec, RestoreSpec, SnapshotChoice, SnapshotError,
    SnapshotName, SnapshotReport, SnapshotSpec, Subvolumes,
};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;
use sprat_testkit::tree::{make_odd_tree, set_mode, set_time, set_xattr};

use crate::changes::{changed, lines, list_of};
use crate::folder::failing_source::FailingSource;
use crate::folder::{Bench, below, job_name, now, run};

fn missing() -> Option<String> {
    sprat_testkit::needs::root()
        .or_else(|| sprat_testkit::needs::program("mkfs.btrfs"))
        .or_else(|| sprat_testkit::needs::program("btrfs"))
        .or_else(|| {
            let loops = Path::new("/dev/loop-control").exists();
            (!loops).then(|| "no loop devices".to_owned())
        })
}

/// Subvolumes by btrfs-progs.
struct ByProgs;

fn btrfs(arguments: &[&str], paths: &[&Path]) -> io::Result<String> {
    let output = Command::new("btrfs").args(arguments).args(paths).output()?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )),
    }
}

impl Subvolumes for ByProgs {
    fn make(&self, path: &Path) -> io::Result<()> {
        btrfs(&["subvolume", "create"], &[path]).map(drop)
    }

    fn snapshot(&self, of: &Path, path: &Path, read_only: bool) -> io::Result<()> {
        let mut arguments = vec!["subvolume", "snapshot"];
        arguments.extend(read_only.then_some("-r"));
        btrfs(&arguments, &[of, path]).map(drop)
    }

    fn delete(&self, path: &Path) -> io::Result<()> {
        btrfs(&["subvolume", "delete"], &[path]).map(drop)
    }

    fn is_subvolume(&self, path: &Path) -> io::Result<bool> {
        Ok(btrfs(&["subvolume", "show"], &[path]).is_ok())
    }

    fn commit(&self, volume_root: &Path) -> io::Result<()> {
        btrfs(&["filesystem", "sync"], &[volume_root]).map(drop)
    }

    fn deletions_pending(&self, volume_root: &Path) -> io::Result<bool> {
        Ok(!btrfs(&["subvolume", "list", "-d"], &[volume_root])?.is_empty())
    }

    /// btrfs-progs has nothing for it.
    fn inodes(&self, subvolume: &Path, meet: &mut dyn FnMut(InodeFacts) -> bool) -> io::Result<()> {
        let mut todo = vec![subvolume.to_owned()];
        while let Some(path) = todo.pop() {
            let about = fs::symlink_metadata(&path)?;
            if about.is_dir() {
                for entry in fs::read_dir(&path)? {
                    todo.push(entry?.path());
                }
            }
            let time = |seconds, nanoseconds| (seconds, u32::try_from(nanoseconds).unwrap());
            let goes_on = meet(InodeFacts {
                number: about.ino(),
                version: InodeVersion {
                    bytes: about.size(),
                    mode: about.mode(),
                    user: about.uid(),
                    group: about.gid(),
                    modified: time(about.mtime(), about.mtime_nsec()),
                    changed: time(about.ctime(), about.ctime_nsec()),
                },
            });
            if !goes_on {
                break;
            }
        }
        Ok(())
    }
}

/// A bench whose volume is a btrfs, with sprat's mount options.
struct OnBtrfs {
    _mounted: Mounted,
    bench: Bench,
}

/// A mounted volume.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.0.to_str().unwrap()]);
    }
}

fn mount_btrfs(bench: &Bench, size: &str) -> Mounted {
    let image = bench.path("image");
    run("truncate", &["-s", size, image.to_str().unwrap()]);
    run("mkfs.btrfs", &["-q", "-f", image.to_str().unwrap()]);
    let options = "loop,flushoncommit,notreelog,noatime,compress=zstd:3";
    let (image, volume) = (image, bench.volume());
    let paths = [image.to_str().unwrap(), volume.to_str().unwrap()];
    run("mount", &[&["-o", options][..], &paths].concat());
    Mounted(volume)
}

impl OnBtrfs {
    fn new() -> Self {
        Self::of("512M")
    }

    /// One of this size.
    fn of(size: &str) -> Self {
        let bench = Bench::new();
        let mounted = mount_btrfs(&bench, size);
        Self {
            _mounted: mounted,
            bench,
        }
    }

    fn take(&self) -> SnapshotReport {
        self.try_take(&self.bench.spec()).unwrap()
    }

    fn try_take(&self, spec: &SnapshotSpec) -> Result<SnapshotReport, SnapshotError> {
        let volume = self.bench.volume();
        let cancel = Cancel::new();
        sprat_snapshot::take_into_subvolume(&volume, spec, now(), &ByProgs, &mut |_| {}, &cancel)
    }

    fn remove(&self, name: SnapshotName) {
        let spec = RemoveSpec {
            allow_newest: true,
            ..RemoveSpec::new(vec![(job_name(), SnapshotChoice::Named(name.to_string()))])
        };
        let (root, cancel) = (self.bench.volume(), Cancel::new());
        sprat_snapshot::remove_subvolumes(&root, &spec, &ByProgs, &mut |_| {}, &cancel).unwrap();
    }

    fn prune(&self, spec: &PruneSpec) -> PruneReport {
        let cancel = Cancel::new();
        sprat_snapshot::prune_subvolumes(&self.bench.volume(), spec, &ByProgs, &mut |_| {}, &cancel)
            .unwrap()
    }

    fn source(&self, name: &str) -> PathBuf {
        self.bench.source().join(name)
    }

    fn kept(&self, report: &SnapshotReport, name: &str) -> PathBuf {
        self.bench.in_snapshot(report.name).join(name)
    }

    fn work(&self) -> PathBuf {
        self.bench.job().join(".sprat/work")
    }
}

fn keep_last(snapshots: u32) -> PruneSpec {
    let rules = KeepRules {
        last: KeepCount::new(snapshots),
        ..KeepRules::default()
    };
    PruneSpec::new(job_name(), rules)
}

/// The tree has them with their older content. More of them vanish than a record can name.
#[test]
fn files_that_vanish_during_the_run_are_not_in_its_snapshot() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::create_dir(volume.source("many")).unwrap();
    for number in 0..1100 {
        fs::write(volume.source(&format!("many/{number}")), "x").unwrap();
    }
    fs::write(volume.source("stays"), "x").unwrap();
    volume.take();
    let mut spec = volume.bench.spec();
    let many = volume.source("many").display().to_string();
    let vanish = format!(
        "rsync \"$@\"\nfor number in $(seq 0 1099); do\n\
         rm '{many}'/$number && echo \"file has vanished: \\\"{many}/$number\\\"\" >&2\ndone\nexit 24"
    );
    spec.rsync = volume.bench.rsync_script(&vanish, "rsync");
    let report = volume.try_take(&spec).unwrap();
    assert_eq!(report.record.vanished.count, 1100);
    assert!(!report.record.complete);
    let left = fs::read_dir(volume.kept(&report, "many")).unwrap().count();
    assert_eq!(left, 0);
    assert!(volume.kept(&report, "stays").exists());
}

#[test]
fn list_has_each_path_that_a_run_changed_in_work() {
    requires!(missing());
    let volume = OnBtrfs::new();
    for name in ["same", "changed", "mode", "gone", "attribute", "to a link"] {
        fs::write(volume.source(name), name).unwrap();
    }
    symlink("nowhere", volume.source("link")).unwrap();
    let first = volume.take();
    let list = lines(&list_of(&volume.bench.job(), first.name));
    assert_eq!(list[0]["since"], serde_json::Value::Null);
    // rsync changes only the time of the last change of this inode.
    set_xattr(&volume.source("attribute"), "user.sprat", b"new").unwrap();
    fs::remove_file(volume.source("to a link")).unwrap();
    symlink("nowhere", volume.source("to a link")).unwrap();
    fs::write(volume.source("changed"), "changed more").unwrap();
    set_mode(&volume.source("mode"), 0o600).unwrap();
    fs::remove_file(volume.source("gone")).unwrap();
    fs::write(volume.source("new"), "new").unwrap();
    let second = volume.take();
    let list = lines(&list_of(&volume.bench.job(), second.name));
    assert_eq!(list[0]["since"], first.name.to_string());
    let wanted = [
        ("new", "new"),
        ("changed", "content"),
        ("mode", "attributes"),
        ("attribute", "attributes"),
        ("to a link", "kind"),
        ("gone", "gone"),
    ];
    let wanted = wanted.map(|(name, change)| (volume.source(name), change.to_owned()));
    assert_eq!(changed(&list), wanted.into_iter().collect());
    let third = volume.take();
    assert_eq!(lines(&list_of(&volume.bench.job(), third.name)).len(), 2);
    volume.prune(&keep_last(1));
    assert!(list_of(&volume.bench.job(), first.name).exists());
    let fourth = volume.take();
    assert!(!list_of(&volume.bench.job(), first.name).exists());
    for name in [
        third.name.to_string(),
        fourth.name.to_string(),
        "base".to_owned(),
    ] {
        assert!(list_of(&volume.bench.job(), name).exists());
    }
}

#[test]
fn each_snapshot_is_an_exact_copy_and_older_ones_stay_as_they_are() {
    requires!(missing());
    let volume = OnBtrfs::new();
    make_odd_tree(&volume.bench.source()).unwrap();
    fs::create_dir(volume.source("moved")).unwrap();
    fs::write(volume.source("moved/file"), "content").unwrap();
    fs::write(volume.source("becomes folder"), "content").unwrap();
    let first = volume.take();
    assert!(first.record.complete, "{:?}", first.record);
    let before = volume.bench.path("before");
    let from = format!("{}/", volume.bench.source().display());
    // By default rsync leaves a time that differs by less than a second.
    let options = ["-aHAXS", "--modify-window=-1"];
    let folders = [from.as_str(), before.to_str().unwrap()];
    run("rsync", &[options, folders].concat());
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(first.name),
    );

    fs::rename(volume.source("moved"), volume.source("elsewhere")).unwrap();
    fs::remove_file(volume.source("becomes folder")).unwrap();
    fs::create_dir(volume.source("becomes folder")).unwrap();
    fs::write(volume.source("becomes folder/file"), "new").unwrap();
    let second = volume.take();
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(second.name),
    );
    assert_same(&before, &volume.bench.in_snapshot(first.name));
    let refused = fs::write(volume.kept(&first, "x"), "x").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let latest = fs::read_link(volume.bench.job().join("latest")).unwrap();
    assert_eq!(latest.to_str().unwrap(), second.name.to_string());
    assert_eq!(volume.bench.kinds(), [EntryKind::Complete; 2]);

    let third = volume.take();
    assert_eq!(third.record.stats.transferred, 0);
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(third.name),
    );
    let place = volume.bench.path("place");
    volume
        .bench
        .restore(&RestoreSpec::new(job_name(), place.clone()))
        .unwrap();
    assert_same(
        &volume.bench.source(),
        &below(&place, &volume.bench.source()),
    );
}

/// rsync sets the attributes of an unchanged file in place: all its names get them.
#[test]
fn links_that_the_source_no_longer_has_are_separated() {
    requires!(missing());
    let volume = OnBtrfs::new();
    for name in ["mode", "content", "stays"] {
        fs::write(volume.source(name), "content").unwrap();
        fs::hard_link(volume.source(name), volume.source(&format!("{name}2"))).unwrap();
    }
    let first = volume.take();
    for name in ["mode", "content"] {
        let (path, other) = (volume.source(name), volume.source(&format!("{name}2")));
        let time = fs::metadata(&path).unwrap();
        fs::remove_file(&other).unwrap();
        fs::write(&other, "content").unwrap();
        set_time(&other, time.mtime(), time.mtime_nsec()).unwrap();
    }
    set_mode(&volume.source("mode2"), 0o600).unwrap();
    fs::write(volume.source("content2"), "other content").unwrap();
    let second = volume.take();
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(second.name),
    );
    let inode = |name| fs::metadata(volume.kept(&second, name)).unwrap().ino();
    assert_ne!(inode("mode"), inode("mode2"));
    assert_eq!(inode("stays"), inode("stays2"));
    // Only the changed file was read from the source.
    assert_eq!(second.record.stats.transferred, 1, "{:?}", second.record);
    let old = fs::metadata(volume.kept(&first, "mode")).unwrap();
    assert_eq!((old.nlink(), old.mode() & 0o777), (2, 0o644));
    let third = volume.take();
    assert_eq!(
        third.record.stats.created + third.record.stats.transferred,
        0
    );
}

#[test]
fn what_no_longer_belongs_to_the_job_leaves_the_next_snapshot() {
    requires!(missing());
    let volume = OnBtrfs::new();
    for name in ["a/file", "b/file", "b/excluded"] {
        fs::create_dir_all(volume.source(name).parent().unwrap()).unwrap();
        fs::write(volume.source(name), "content").unwrap();
    }
    volume.take();
    let mut spec = SnapshotSpec::new(job_name(), vec![volume.source("b")]);
    spec.excludes = vec!["excluded".to_owned()];
    let second = volume.try_take(&spec).unwrap();
    assert!(volume.kept(&second, "b/file").exists());
    assert!(!volume.kept(&second, "a").exists());
    assert!(!volume.kept(&second, "b/excluded").exists());
    // It comes back without being read again.
    let third = volume.take();
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(third.name),
    );
    assert_eq!(
        third.record.stats.transferred, 0,
        "{:?}",
        third.record.stats
    );
}

#[test]
fn unread_file_is_absent_and_not_old() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let folder = volume.source("fuse");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("open-13"), "old content").unwrap();
    fs::write(volume.source("file"), "content").unwrap();
    let first = volume.take();
    let mounted = FailingSource::mount(&folder, vec!["open-13".to_owned(), "fine".to_owned()]);
    let second = volume.take();
    assert!(!second.record.complete);
    assert_eq!(second.record.unread.count, 1, "{:?}", second.record.unread);
    assert!(volume.kept(&second, "fuse/fine").exists());
    assert!(!volume.kept(&second, "fuse/open-13").exists());
    assert!(volume.kept(&first, "fuse/open-13").exists());
    drop(mounted);
    let third = volume.take();
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(third.name),
    );
    assert_eq!(third.record.stats.transferred, 0, "it was taken back");
}

/// More of them than a record can name.
#[test]
fn many_unread_files_are_absent_and_end_no_run() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::create_dir(volume.source("many")).unwrap();
    for number in 0..1100 {
        fs::write(volume.source(&format!("many/{number}")), "x").unwrap();
    }
    fs::write(volume.source("fine"), "x").unwrap();
    volume.take();
    let mut spec = volume.bench.spec();
    let many = volume.source("many").display().to_string();
    let unread = format!(
        "rsync \"$@\"\nfor number in $(seq 0 1099); do\n\
         echo \"rsync: [sender] read errors mapping \\\"{many}/$number\\\": Input/output error (5)\" >&2\n\
         done\nexit 23"
    );
    spec.rsync = volume.bench.rsync_script(&unread, "rsync");
    let report = volume.try_take(&spec).unwrap();
    assert!(!report.record.complete);
    let unread = &report.record.unread;
    assert_eq!((unread.count, unread.names.len()), (1100, 1000));
    let left = fs::read_dir(volume.kept(&report, "many")).unwrap().count();
    assert_eq!(left, 0);
    assert!(volume.kept(&report, "fine").exists());
}

#[test]
fn disk_that_was_away_is_not_read_again() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let disk = volume.source("disk");
    fs::create_dir(&disk).unwrap();
    fs::write(volume.source("file"), "content").unwrap();
    let mount = || {
        run("mount", &["-t", "tmpfs", "disk", disk.to_str().unwrap()]);
        fs::create_dir(disk.join("folder")).unwrap();
        for name in ["large", "folder/small"] {
            fs::write(disk.join(name), vec![7; 1 << 20]).unwrap();
            set_time(&disk.join(name), 1_600_000_000, 5).unwrap();
        }
    };
    let unmount = || run("umount", &[disk.to_str().unwrap()]);
    mount();
    volume.take();
    unmount();
    let second = volume.take();
    assert!(!volume.kept(&second, "disk/large").exists());
    mount();
    let third = volume.take();
    let copied = third.record.stats.bytes_transferred;
    let same = fs::read(volume.kept(&third, "disk/folder/small")).unwrap() == vec![7; 1 << 20];
    unmount();
    assert!(same);
    assert_eq!(copied, 0, "{:?}", third.record.stats);
}

#[test]
fn interrupted_run_is_continued_and_shown_until_then() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("file"), "content").unwrap();
    let first = volume.take();
    fs::write(volume.source("new"), "new content").unwrap();
    let mut spec = volume.bench.spec();
    // Copies everything, and fails then.
    spec.rsync = volume
        .bench
        .rsync_script("rsync \"$@\" >/dev/null; exit 12", "rsync");
    volume.try_take(&spec).unwrap_err();
    assert!(volume.work().exists());
    assert_eq!(
        volume.bench.kinds(),
        [EntryKind::Complete, EntryKind::Partial]
    );
    let shown = volume.bench.list().remove(1);
    assert_eq!(shown.folder, ".sprat/work");
    assert!(shown.record.unwrap().stopped_by.is_some());
    let latest = fs::read_link(volume.bench.job().join("latest")).unwrap();
    assert_eq!(latest.to_str().unwrap(), first.name.to_string());
    let second = volume.take();
    assert_eq!(volume.bench.kinds(), [EntryKind::Complete; 2]);
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(second.name),
    );
    let records = fs::read_dir(volume.bench.job().join(".sprat"))
        .unwrap()
        .flatten();
    let records = records.filter(|one| one.file_name().to_str().unwrap().ends_with(".json"));
    assert_eq!(records.count(), 2);

    volume.try_take(&spec).unwrap_err();
    let mut drop_it = keep_last(5);
    drop_it.drop_interrupted = true;
    let report = volume.prune(&drop_it);
    assert!(report.interrupted[0].removed);
    assert!(!volume.work().exists());
    assert_eq!(volume.bench.kinds(), [EntryKind::Complete; 2]);
    assert!(volume.take().record.complete);
}

/// A file whose time does not show whether it changed after it was read: also in an interrupted run.
#[test]
fn file_that_changed_within_its_time_step_is_compared_after_an_interrupted_run() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("file"), "content 1").unwrap();
    let mut spec = volume.bench.spec();
    spec.rsync = volume
        .bench
        .rsync_script("rsync \"$@\" >/dev/null; exit 12", "rsync");
    volume.try_take(&spec).unwrap_err();
    // As after kill -9: the run has left no list of its own.
    for entry in fs::read_dir(volume.bench.job().join(".sprat"))
        .unwrap()
        .flatten()
    {
        if entry.file_name().to_str().unwrap().ends_with(".recent") {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    let before = fs::metadata(volume.source("file")).unwrap();
    fs::write(volume.source("file"), "content 2").unwrap();
    set_time(&volume.source("file"), before.mtime(), before.mtime_nsec()).unwrap();
    let report = volume.take();
    assert_eq!(
        fs::read_to_string(volume.kept(&report, "file")).unwrap(),
        "content 2"
    );
}

#[test]
fn prune_deletes_subvolumes_and_nothing_else() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("file"), "content").unwrap();
    let reports: Vec<SnapshotReport> = (0..3).map(|_| volume.take()).collect();
    let report = volume.prune(&keep_last(1));
    let removed: Vec<bool> = report.snapshots.iter().map(|one| one.removed).collect();
    assert_eq!(removed, [true, true, false]);
    let names = btrfs(&["subvolume", "list", "-o"], &[&volume.bench.volume()]).unwrap();
    for (report, gone) in reports.iter().zip(removed) {
        let name = report.name.to_string();
        assert_eq!(!names.contains(&name), gone, "{names}");
        let record = volume.bench.job().join(format!(".sprat/{name}.json"));
        assert_eq!(!record.exists(), gone);
    }
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(reports[2].name),
    );
    assert_eq!(volume.take().record.stats.transferred, 0);
}

#[test]
fn removal_of_the_last_snapshot_frees_its_space() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("file"), "content").unwrap();
    let names: Vec<SnapshotName> = (0..2).map(|_| volume.take().name).collect();
    for (name, has_work) in names.iter().zip([true, false]) {
        volume.remove(*name);
        assert_eq!(volume.work().exists(), has_work);
    }
    let report = volume.take();
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(report.name),
    );
}

#[test]
fn snapshots_made_by_hand_are_continued() {
    requires!(missing());
    for by_subvolume in [true, false] {
        let volume = OnBtrfs::new();
        fs::write(volume.source("file"), vec![9; 1 << 20]).unwrap();
        set_time(&volume.source("file"), 1_600_000_000, 0).unwrap();
        let by_hand = volume.bench.job().join("2026-01-01T00-00-00Z");
        fs::create_dir(volume.bench.job()).unwrap();
        match by_subvolume {
            true => ByProgs.make(&by_hand).unwrap(),
            false => fs::create_dir(&by_hand).unwrap(),
        }
        let to = below(&by_hand, &volume.bench.source());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        run(
            "cp",
            &[
                "-a",
                volume.bench.source().to_str().unwrap(),
                to.to_str().unwrap(),
            ],
        );
        let report = volume.take();
        assert_eq!(report.record.stats.transferred, 0, "{by_subvolume}");
        assert_same(
            &volume.bench.source(),
            &volume.bench.in_snapshot(report.name),
        );
        assert_same(&volume.bench.source(), &to);
    }
}

#[test]
fn btrfs_attributes_of_a_source_do_not_reach_the_volume() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let other = OnBtrfs::new();
    let source = other.bench.volume().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    set_xattr(&source.join("file"), "btrfs.compression", b"lzo").unwrap();
    set_xattr(&source.join("file"), "user.name", b"value").unwrap();
    let spec = SnapshotSpec::new(job_name(), vec![source.clone()]);
    let report = volume.try_take(&spec).unwrap();
    assert!(report.record.complete, "{:?}", report.record);
    let tree = volume.bench.job().join(report.name.to_string());
    let kept = below(&tree, &source.join("file"));
    let mut names = vec![0; 1024];
    let bytes = rustix::fs::llistxattr(&kept, &mut names[..]).unwrap();
    assert_eq!(&names[..bytes], b"user.name\0");
}

/// Inode numbers repeat in every subvolume.
#[test]
fn check_reads_each_file_of_each_job_once() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("file"), "content").unwrap();
    fs::hard_link(volume.source("file"), volume.source("link")).unwrap();
    volume.take();
    volume.take();
    let mut spec = volume.bench.spec();
    spec.job = JobName::new("other").unwrap();
    fs::write(volume.source("file"), "other content").unwrap();
    volume.try_take(&spec).unwrap();
    let check = CheckSpec {
        change_lists: None,
        what: CheckWhat::Everything,
        known: volume.bench.path("checks/x.sums"),
        suspects: volume.bench.path("checks/x.json"),
        duration_max: None,
        bytes_max: None,
        duration_over: std::time::Duration::ZERO,
        note_interval: std::time::Duration::from_secs(60),
        never_enter: Vec::new(),
        containers: Vec::new(),
    };
    let root = volume.bench.volume();
    let report = sprat_snapshot::check(&root, &check, &mut |_| {}, &Cancel::new()).unwrap();
    let kept = walkdir(&root);
    assert_eq!(report.files_read, kept, "{report:?}");
    assert!(report.finished && !report.is_damaged());
}

/// How many regular files there are, those with the same number and birth once.
fn walkdir(root: &Path) -> u64 {
    let mut files = std::collections::BTreeSet::new();
    let mut todo = vec![root.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let about = entry.metadata().unwrap();
            if about.is_dir() {
                todo.push(entry.path());
            } else if about.is_file() {
                files.insert((about.ino(), about.created().unwrap(), about.len()));
            }
        }
    }
    files.len() as u64
}
