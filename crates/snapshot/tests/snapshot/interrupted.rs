//! Interrupted runs: what they leave is used, and never damages an older snapshot.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::folder::{Bench, inode, now, wait_for};
use sprat_snapshot::{Cancel, EntryKind, Progress, SnapshotError, Warning};
use sprat_testkit::compare::{assert_same, differences};
use sprat_testkit::requires;
use sprat_testkit::tree::{PlainTree, acl, make_odd_tree, set_mode, set_owner, set_xattr};

/// Mode, owner, time and xattrs of one inode.
type Attributes = (u32, u32, u32, i64, i64, Vec<u8>);

/// The attributes of every inode below `root`.
fn attributes(root: &Path) -> BTreeMap<PathBuf, Attributes> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let m = fs::symlink_metadata(&path).unwrap();
        if m.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        let mut buffer = vec![0; 4096];
        let mut xattrs = Vec::new();
        for name in ["user.mark", "system.posix_acl_access"] {
            if let Ok(len) = rustix::fs::lgetxattr(&path, name, &mut buffer[..]) {
                xattrs.extend_from_slice(&buffer[..len]);
            }
        }
        all.insert(
            path,
            (
                m.mode(),
                m.uid(),
                m.gid(),
                m.mtime(),
                m.mtime_nsec(),
                xattrs,
            ),
        );
    }
    all
}

#[test]
fn attributes_changed_after_an_interrupted_run_never_reach_older_snapshots() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let source = bench.source();
    for name in ["chmod", "chown", "setfattr", "setfacl", "same", "link a"] {
        fs::write(source.join(name), name).unwrap();
    }
    fs::hard_link(source.join("link a"), source.join("link b")).unwrap();
    std::os::unix::fs::symlink("x", source.join("symlink")).unwrap();
    set_xattr(&source.join("setfattr"), "user.mark", b"old").unwrap();
    let old = bench.take();
    let before = attributes(&bench.job().join(old.name.to_string()));

    // The interrupted run has linked everything from the old snapshot.
    let interrupted = bench.take();
    bench.make_partial_of(&interrupted);
    let partial = format!("{}.partial", interrupted.name);
    assert_eq!(
        inode(&bench.in_snapshot(&partial).join("chmod")),
        inode(&bench.in_snapshot(old.name).join("chmod"))
    );

    set_mode(&source.join("chmod"), 0o600).unwrap();
    set_owner(&source.join("chown"), 1234, 1235).unwrap();
    set_owner(&source.join("symlink"), 1234, 1235).unwrap();
    set_xattr(&source.join("setfattr"), "user.mark", b"new").unwrap();
    set_xattr(
        &source.join("setfacl"),
        "system.posix_acl_access",
        &acl(1000, 6),
    )
    .unwrap();
    set_mode(&source.join("link b"), 0o640).unwrap();
    let new = bench.take();
    assert_eq!(new.record.linked_from[0].folder, partial);
    assert_same(&source, &bench.in_snapshot(new.name));
    assert_eq!(before, attributes(&bench.job().join(old.name.to_string())));
    for name in ["chmod", "chown", "setfattr", "setfacl", "link a", "symlink"] {
        assert_ne!(
            inode(&bench.in_snapshot(new.name).join(name)),
            inode(&bench.in_snapshot(old.name).join(name)),
            "{name}"
        );
    }
    assert_eq!(
        inode(&bench.in_snapshot(new.name).join("same")),
        inode(&bench.in_snapshot(old.name).join("same"))
    );
    assert!(!bench.job().join(&partial).exists());
}

#[test]
fn a_file_changed_twice_within_one_second_is_copied_again() {
    let bench = Bench::new();
    let file = bench.source().join("file");
    fs::write(&file, "one").unwrap();
    sprat_testkit::tree::set_time(&file, 1_700_000_000, 1).unwrap();
    bench.take();
    fs::write(&file, "two").unwrap();
    sprat_testkit::tree::set_time(&file, 1_700_000_000, 2).unwrap();
    let second = bench.take();
    assert_eq!(
        fs::read(bench.in_snapshot(second.name).join("file")).unwrap(),
        b"two"
    );
}

/// A run that is cancelled as soon as some of its files exist.
fn cancelled_run(bench: &Bench) -> SnapshotError {
    // As on a slow connection: rsync reads at most 8 MB in a second.
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script("", "rsync --bwlimit=8000");
    let cancel = Cancel::new();
    sprat_snapshot::take(
        &bench.volume(),
        &spec,
        now(),
        &mut |progress| {
            if progress.bytes_done > 2 << 20 {
                cancel.cancel();
            }
        },
        &cancel,
    )
    .unwrap_err()
}

#[test]
fn a_cancelled_run_is_kept_as_partial_and_the_next_continues() {
    let bench = Bench::new();
    let tree = PlainTree {
        files: 300,
        bytes: 30 << 20,
        files_per_folder: 30,
        seed: 3,
    };
    tree.make(&bench.source()).unwrap();
    let error = cancelled_run(&bench);
    assert!(matches!(error, SnapshotError::Cancelled), "{error}");
    assert_eq!(bench.kinds(), [EntryKind::Partial]);
    let entry = &bench.list()[0];
    assert_eq!(
        entry.record.as_ref().unwrap().stopped_by.as_deref(),
        Some("interrupted")
    );
    assert!(!bench.job().join("latest").exists());

    let report = bench.take();
    assert!(
        report.record.stats.transferred < 290,
        "{:?}",
        report.record.stats
    );
    assert_eq!(bench.kinds(), [EntryKind::Complete]);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
    // Its record, what it changed, and its list of files that are too recent to prove anything by their time.
    let mut left: Vec<String> = fs::read_dir(bench.job().join(".sprat"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let name = report.name;
    let kept = ["changes.zst", "json", "recent"].map(|what| format!("{name}.{what}"));
    assert_eq!(left, kept);
}

#[test]
fn several_interrupted_trees_are_all_used_and_then_removed() {
    let bench = Bench::new();
    let tree = PlainTree {
        files: 100,
        bytes: 20 << 20,
        files_per_folder: 30,
        seed: 4,
    };
    tree.make(&bench.source()).unwrap();
    cancelled_run(&bench);
    cancelled_run(&bench);
    assert_eq!(bench.kinds(), [EntryKind::Partial, EntryKind::Partial]);
    let report = bench.take();
    assert_eq!(report.record.linked_from.len(), 2);
    assert_eq!(bench.kinds(), [EntryKind::Complete]);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

#[test]
fn after_a_crash_without_checkpoint_the_tree_is_not_trusted() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "right").unwrap();
    let dead = bench.take();
    // As after a crash: full size and right time, but not the data.
    let damaged = bench.in_snapshot(dead.name).join("file");
    let time = fs::metadata(&damaged).unwrap();
    fs::write(&damaged, "\0\0\0\0\0").unwrap();
    sprat_testkit::tree::set_time(&damaged, time.mtime(), time.mtime_nsec()).unwrap();
    let name = dead.name.to_string();
    fs::rename(
        bench.job().join(&name),
        bench.job().join(format!("{name}.inflight")),
    )
    .unwrap();
    let report = bench.take();
    assert_eq!(
        fs::read(bench.in_snapshot(report.name).join("file")).unwrap(),
        b"right"
    );
    assert_eq!(bench.kinds(), [EntryKind::Complete]);
}

#[test]
fn after_a_crash_only_files_older_than_the_checkpoint_are_trusted() {
    let bench = Bench::new();
    fs::write(bench.source().join("a"), "right").unwrap();
    fs::write(bench.source().join("b"), "right").unwrap();
    let dead = bench.take();
    let name = dead.name.to_string();
    let tree = bench.in_snapshot(dead.name);
    std::thread::sleep(Duration::from_millis(50));
    let b = fs::metadata(tree.join("b")).unwrap();
    fs::write(tree.join("b"), "\0\0\0\0\0").unwrap();
    sprat_testkit::tree::set_time(&tree.join("b"), b.mtime(), b.mtime_nsec()).unwrap();
    let b = fs::metadata(tree.join("b")).unwrap();
    let kept = inode(&tree.join("a"));
    let checkpoint = i128::from(b.ctime()) * 1_000_000_000 + i128::from(b.ctime_nsec());
    let state = bench.job().join(".sprat");
    fs::write(
        state.join(format!("{name}.checkpoint")),
        format!("{checkpoint}\n"),
    )
    .unwrap();
    fs::rename(
        bench.job().join(&name),
        bench.job().join(format!("{name}.inflight")),
    )
    .unwrap();
    let report = bench.take();
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
    assert_eq!(inode(&bench.in_snapshot(report.name).join("a")), kept);
    let swept = Warning::CrashedRunSwept { files: 1 };
    assert!(
        report.record.warnings.contains(&swept),
        "{:?}",
        report.record.warnings
    );
}

#[test]
fn a_killed_rsync_is_a_failure_and_leaves_a_partial() {
    let bench = Bench::new();
    let tree = PlainTree {
        files: 30,
        bytes: 10 << 20,
        files_per_folder: 30,
        seed: 5,
    };
    tree.make(&bench.source()).unwrap();
    let pid_file = bench.path("pid");
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script(
        &format!("echo $$ > {}", pid_file.display()),
        "rsync --bwlimit=4000",
    );
    let volume = bench.volume();
    let run = std::thread::spawn(move || crate::folder::take_into(&volume, &spec));
    let job = bench.job();
    wait_for("an inflight tree with a file", || {
        fs::read_dir(&job).is_ok_and(|mut d| {
            d.any(|e| {
                e.unwrap()
                    .file_name()
                    .to_string_lossy()
                    .ends_with(".inflight")
            })
        }) && pid_file.exists()
    });
    std::thread::sleep(Duration::from_millis(300));
    let pid: i32 = fs::read_to_string(&pid_file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process_group(pid, rustix::process::Signal::KILL).unwrap();
    let error = run.join().unwrap().unwrap_err();
    assert!(
        matches!(&error, SnapshotError::RsyncFailed { ended, .. } if ended.contains('9')),
        "{error}"
    );
    assert_eq!(bench.kinds(), [EntryKind::Partial]);
}

#[test]
fn an_interrupted_removal_is_finished_by_the_next_run() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    let first = bench.take();
    let away = bench
        .job()
        .join(".sprat/deleting-2020-01-01T00-00-00Z.partial");
    fs::create_dir(&away).unwrap();
    make_odd_tree(&away).unwrap();
    let second = bench.take();
    assert!(!away.exists());
    assert!(second.name > first.name);
    assert!(
        differences(&bench.source(), &bench.in_snapshot(first.name))
            .unwrap()
            .is_empty()
    );
}

#[test]
fn two_runs_of_one_job_at_once_are_refused() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), vec![1; 3 << 20]).unwrap();
    let mut slow = bench.spec();
    slow.rsync = bench.rsync_script("sleep 1", "rsync");
    let volume = bench.volume();
    let run = std::thread::spawn(move || crate::folder::take_into(&volume, &slow));
    wait_for("the first run", || bench.kinds() == [EntryKind::Inflight]);
    let error = bench.try_take(&bench.spec()).unwrap_err();
    assert!(matches!(error, SnapshotError::Busy { .. }), "{error}");
    run.join().unwrap().unwrap();
    assert_eq!(bench.kinds(), [EntryKind::Complete]);
}

pub(crate) const BIG_BYTES: u64 = 96 << 20;

/// A run that is cancelled in the middle of a large file, when it has more than `from` bytes. Returns
/// how many bytes were kept.
fn stop_in_large_file(bench: &Bench, from: u64) -> u64 {
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script("", "rsync --bwlimit=16000");
    let cancel = Cancel::new();
    let folder = bench.job().join(".sprat");
    let mut stop = stop_beyond(&folder, from + (2 << 20), &cancel);
    sprat_snapshot::take(&bench.volume(), &spec, now(), &mut stop, &cancel).unwrap_err();
    begun_bytes(&folder)
}

/// Cancels a run when the large file that it began in `folder` has more than so many bytes.
pub(crate) fn stop_beyond(folder: &Path, bytes: u64, cancel: &Cancel) -> impl FnMut(Progress) {
    move |_| {
        let begun = files_ending(folder, ".begun");
        let written = begun.first().and_then(|path| fs::metadata(path).ok());
        if written.is_some_and(|about| about.len() > bytes) {
            cancel.cancel();
        }
    }
}

/// The size of the only large file that was begun.
pub(crate) fn begun_bytes(folder: &Path) -> u64 {
    let begun = files_ending(folder, ".begun");
    assert_eq!(begun.len(), 1, "{begun:?}");
    fs::metadata(&begun[0]).unwrap().len()
}

pub(crate) fn files_ending(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let Ok(all) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = all.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.to_str().unwrap().ends_with(ending))
        .collect()
}

/// A large file that was not written just now. Each KiB ends with zeros: rsync does not write those before it knows
/// what follows.
pub(crate) fn large_source(bench: &Bench) -> PathBuf {
    let file = bench.source().join("folder/vm.img");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let mut content = Vec::new();
    for n in 0..BIG_BYTES / 8 {
        let word = match n % 128 {
            127 => 0,
            _ => n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
        };
        content.extend_from_slice(&word.to_le_bytes());
    }
    fs::write(&file, content).unwrap();
    set_mode(&file, 0o640).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    file
}

#[test]
fn the_next_run_copies_only_the_rest_of_a_large_file() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    large_source(&bench);
    let kept = stop_in_large_file(&bench, 16 << 20);
    assert!(kept > 16 << 20 && kept < BIG_BYTES, "{kept}");
    // After a crash, what was written after the last sync is missing or wrong.
    let state = bench.job().join(".sprat");
    let begun = &files_ending(&state, ".begun")[0];
    let file = fs::OpenOptions::new().append(true).open(begun).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 1 << 20], kept).unwrap();
    // Interrupted again, in the rest.
    let again = stop_in_large_file(&bench, kept);
    assert!(again >= kept, "{again} {kept}");
    // No interrupted tree has a part of it.
    for partial in files_ending(&bench.job(), ".partial") {
        let part = crate::folder::below(&partial, &bench.source()).join("folder/vm.img");
        assert!(!part.exists(), "{part:?}");
    }
    let report = bench.take();
    assert!(report.record.complete, "{:?}", report.record);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
    let copied = report.record.stats.bytes_literal;
    // The last byte that is not zero is copied again.
    assert_eq!(copied, BIG_BYTES - (again - 1));
    assert!(files_ending(&state, ".begun").is_empty());
    assert!(
        files_ending(&state, ".json")
            .iter()
            .all(|path| !path.to_str().unwrap().contains("begun"))
    );
    assert_eq!(bench.kinds(), [EntryKind::Complete]);
}

#[test]
fn a_begun_file_is_not_used_for_another_version_of_it() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let file = large_source(&bench);
    let time = fs::metadata(&file).unwrap().modified().unwrap();
    stop_in_large_file(&bench, 16 << 20);
    // Other content with the same size and time.
    let writer = fs::OpenOptions::new().write(true).open(&file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&writer, b"changed", 0).unwrap();
    writer.set_modified(time).unwrap();
    let report = bench.take();
    assert_eq!(report.record.stats.bytes_literal, BIG_BYTES);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

#[test]
fn a_begun_file_with_another_name_is_never_cut() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    large_source(&bench);
    let kept = stop_in_large_file(&bench, 16 << 20);
    let begun = &files_ending(&bench.job().join(".sprat"), ".begun")[0];
    let precious = bench.volume().join("precious");
    fs::hard_link(begun, &precious).unwrap();
    let before = fs::read(&precious).unwrap();
    assert_eq!(before.len() as u64, kept);
    let report = bench.take();
    assert_eq!(report.record.stats.bytes_literal, BIG_BYTES);
    assert!(fs::read(&precious).unwrap() == before);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}
