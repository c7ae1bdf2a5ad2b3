//! A single file, source or foreign object never ends a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use sprat_snapshot::{SnapshotError, SnapshotSpec, Warning};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;
use sprat_testkit::tree::set_mode;

use super::walk_finds;
use crate::folder::failing_source::{CONTENT, FailingSource};
use crate::folder::failing_volume::{FailingVolume, OPERATIONS};
use crate::folder::{Bench, SmallExt4, inode, loop_missing, take_into, wait_for};

/// Every error number of Linux but ENOSYS, with which a FUSE file system declares that it has no `open`.
fn all_errors() -> impl Iterator<Item = i32> {
    (1..=133).filter(|errno| *errno != 38)
}

#[test]
fn any_error_of_a_source_file_lets_the_others_be_saved() {
    requires!(fuse_missing());
    let bench = Bench::new();
    let mut names: Vec<String> = all_errors()
        .flat_map(|errno| ["open", "stat", "read", "readdir"].map(|what| format!("{what}-{errno}")))
        .collect();
    names.push("good".to_owned());
    fs::write(bench.source().join("letter"), "x").unwrap();
    let mounted = bench.source().join("nas");
    fs::create_dir(&mounted).unwrap();
    let session = FailingSource::mount(&mounted, names.clone());
    let report = bench.try_take(&bench.spec());
    drop(session);
    let report = report.unwrap();
    assert!(!report.record.complete);
    let tree = bench.in_snapshot(report.name);
    assert_eq!(fs::read(tree.join("letter")).unwrap(), b"x");
    assert_eq!(fs::read(tree.join("nas/good")).unwrap(), CONTENT);
    let named: Vec<&String> = report
        .record
        .unread
        .names
        .iter()
        .chain(&report.record.vanished.names)
        .collect();
    for name in names.iter().filter(|name| *name != "good") {
        let path = format!("{}/{name}", mounted.display());
        assert!(named.contains(&&path), "{path}");
    }
}

/// Errors that concern the whole volume or machine, or a full volume. Without ENOSYS, as above.
fn ends_a_run(errno: i32) -> bool {
    let volume = [5, 6, 19, 30, 74, 103, 107, 108, 116, 117, 121, 123];
    let machine = [4, 11, 12, 23, 24];
    volume.contains(&errno) || machine.contains(&errno) || [28, 122].contains(&errno)
}

/// Creates a file that the volume refuses in `operation` with this error. Returns the path to be
/// reported.
fn refused_file(source: &Path, operation: &str, errno: i32) -> PathBuf {
    let name = format!("{operation}-{errno}");
    let path = source.join(&name);
    match operation {
        "mkdir" => fs::create_dir(&path).unwrap(),
        "mknod" => crate::folder::run("mkfifo", &[path.to_str().unwrap()]),
        "symlink" => symlink("target", &path).unwrap(),
        "link" => {
            // It is neither the first nor the last name in rsync's order.
            let [first, last] = ["a", "z"].map(|at| source.join(format!("{at}-{name}")));
            fs::write(&first, "x").unwrap();
            fs::hard_link(&first, &path).unwrap();
            fs::hard_link(&first, last).unwrap();
        }
        _ => fs::write(&path, "x").unwrap(),
    }
    if operation == "setxattr" {
        xattr(&path);
    }
    path
}

fn xattr(path: &Path) {
    let path = path.to_str().unwrap();
    crate::folder::run("setfattr", &["-n", "user.note", "-v", "x", path]);
}

/// Errors after which rsync or the C library retries without end, and the rename across devices, for
/// which rsync copies.
fn is_no_answer(operation: &str, errno: i32) -> bool {
    matches!(
        (operation, errno),
        ("create" | "link", 17) | ("rename", 18) | ("write", 4 | 11)
    )
}

/// Takes a snapshot of `files` into a volume that refuses each. Returns what was reported, if there is a
/// snapshot.
fn take_refused(operations: &[&str], errors: &[i32]) -> (Vec<PathBuf>, Option<Vec<PathBuf>>) {
    let bench = Bench::new();
    let source = bench.source();
    let files: Vec<PathBuf> = operations
        .iter()
        .flat_map(|operation| errors.iter().map(move |errno| (*operation, *errno)))
        .filter(|(operation, errno)| !is_no_answer(operation, *errno))
        .map(|(operation, errno)| refused_file(&source, operation, errno))
        .collect();
    fs::write(source.join("good"), "good").unwrap();
    let session = FailingVolume::mount(&bench.volume(), 1000);
    let report = bench.try_take(&bench.spec());
    let good = report
        .as_ref()
        .ok()
        .map(|report| fs::read(bench.in_snapshot(report.name).join("good")).unwrap());
    drop(session);
    let named = report.ok().map(|report| {
        assert!(
            !report.record.complete,
            "{operations:?} {errors:?} {:?}",
            report.record
        );
        assert_eq!(good.unwrap(), b"good");
        let names = &report.record.unread;
        assert_eq!(names.count, names.names.len() as u64);
        names.names.iter().map(PathBuf::from).collect()
    });
    (files, named)
}

#[test]
fn any_error_of_the_volume_for_a_file_lets_the_others_be_saved() {
    requires!(fuse_missing().or_else(|| sprat_testkit::needs::program("setfattr")));
    let of_file: Vec<i32> = all_errors().filter(|errno| !ends_a_run(*errno)).collect();
    // rsync continues after these.
    let operations = [
        "mkdir", "create", "mknod", "symlink", "rename", "setattr", "setxattr",
    ];
    let (files, named) = take_refused(&operations, &of_file);
    let named: BTreeSet<PathBuf> = named.unwrap().into_iter().collect();
    let missing: Vec<_> = files.iter().filter(|path| !named.contains(*path)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // rsync ends after these: one error in each run.
    let step = if std::env::var_os("SPRAT_STRIKES").is_some() {
        1
    } else {
        8
    };
    for errno in of_file.iter().step_by(step) {
        let (files, named) = take_refused(&["write"], &[*errno]);
        assert_eq!(named, Some(files), "write {errno}");
        if is_no_answer("link", *errno) {
            continue;
        }
        // A file that can't be linked is copied.
        let bench = Bench::new();
        refused_file(&bench.source(), "link", *errno);
        let session = FailingVolume::mount(&bench.volume(), 1000);
        let report = bench.try_take(&bench.spec());
        let files = report
            .as_ref()
            .ok()
            .map(|report| names_and_links(&bench.in_snapshot(report.name)).len());
        drop(session);
        assert!(report.unwrap().record.complete, "link {errno}");
        assert_eq!(files, Some(3), "link {errno}");
    }
}

#[test]
fn errors_of_volume_and_machine_end_a_run_in_any_operation() {
    requires!(fuse_missing().or_else(|| sprat_testkit::needs::program("setfattr")));
    let ending: Vec<i32> = all_errors().filter(|errno| ends_a_run(*errno)).collect();
    let mut errors = ending.into_iter().cycle();
    let all = std::env::var_os("SPRAT_STRIKES").is_some();
    for operation in OPERATIONS {
        for _ in 0..if all { 19 } else { 3 } {
            let errno = errors.next().unwrap();
            if is_no_answer(operation, errno) {
                continue;
            }
            let (_, named) = take_refused(&[operation], &[errno]);
            assert_eq!(named, None, "{operation} {errno}");
        }
    }
}

#[test]
fn a_source_that_can_not_be_listed_excludes_no_other() {
    requires!(fuse_missing());
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let mut spec = bench.spec();
    let mut sessions = Vec::new();
    for errno in all_errors() {
        let at = bench.path(&format!("nas-{errno}"));
        fs::create_dir(&at).unwrap();
        sessions.push(FailingSource::mount_failing_root(&at, errno));
        spec.sources.push(at);
    }
    let report = bench.try_take(&spec);
    // If it is the only source, nothing is left to save.
    let mut alone = bench.spec();
    alone.sources = vec![spec.sources[13].clone()];
    let nothing = bench.try_take(&alone);
    drop(sessions);
    let report = report.unwrap();
    assert!(!report.record.complete);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
    let named: BTreeSet<&String> = report.record.unread.names.iter().collect();
    for source in &spec.sources[1..] {
        assert!(named.contains(&source.display().to_string()), "{source:?}");
    }
    assert!(nothing.is_err(), "{nothing:?}");
}

#[test]
fn a_file_that_becomes_a_pipe_is_excluded_and_hangs_no_run() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("aaa"), vec![7; 4 << 20]).unwrap();
    fs::write(source.join("zzz"), "x").unwrap();
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script("", "rsync --bwlimit=4000");
    let volume = bench.volume();
    let run = std::thread::spawn(move || take_into(&volume, &spec));
    let job = bench.job();
    wait_for("rsync's temporary file", || {
        walk_finds(&job, &|name| name.starts_with(".aaa."))
    });
    let pipe = source.join("zzz");
    fs::remove_file(&pipe).unwrap();
    crate::folder::run("mkfifo", &[pipe.to_str().unwrap()]);
    wait_for("the run's end", || run.is_finished());
    let report = run.join().unwrap().unwrap();
    assert_eq!(report.record.unread.names, [pipe.display().to_string()]);
    assert!(!report.record.complete);
    assert!(!bench.in_snapshot(report.name).join("zzz").exists());
    assert_eq!(
        fs::metadata(bench.in_snapshot(report.name).join("aaa"))
            .unwrap()
            .len(),
        4 << 20
    );
}

fn fuse_missing() -> Option<String> {
    sprat_testkit::needs::root()
        .or_else(|| (!Path::new("/dev/fuse").exists()).then(|| "no /dev/fuse".to_owned()))
}

#[test]
fn attributes_that_the_volume_refuses_make_a_file_incomplete_and_fail_no_run() {
    requires!(loop_missing().or_else(|| sprat_testkit::needs::program("mkfs.btrfs")));
    let bench = Bench::new();
    let image = bench.path("btrfs-image");
    let from = bench.path("btrfs");
    fs::create_dir(&from).unwrap();
    crate::folder::run("truncate", &["-s", "200M", image.to_str().unwrap()]);
    crate::folder::run("mkfs.btrfs", &["-q", image.to_str().unwrap()]);
    let (image, from) = (image.to_str().unwrap(), from.to_str().unwrap());
    crate::folder::run("mount", &["-o", "loop", image, from]);
    let disk = SmallExt4::new(&bench, "64M", &[]);
    fs::write(format!("{from}/letter"), "important").unwrap();
    fs::write(format!("{from}/x"), "x").unwrap();
    crate::folder::run(
        "setfattr",
        &[
            "-n",
            "btrfs.compression",
            "-v",
            "zstd",
            &format!("{from}/x"),
        ],
    );
    let mut spec = bench.spec();
    spec.sources = vec![from.into()];
    let report = take_into(&disk.at, &spec);
    crate::folder::run("umount", &[from]);
    let record = report.unwrap().record;
    assert!(!record.complete);
    assert_eq!(record.unread.names, [format!("{from}/x")]);
    assert_eq!(record.warnings, [Warning::AttributesRefused { files: 1 }]);
}

/// Every file below `tree` by its path, with its content and the number of names of its inode.
fn names_and_links(tree: &Path) -> BTreeMap<PathBuf, (Vec<u8>, u64)> {
    let (mut files, mut names_of) = (BTreeMap::new(), BTreeMap::new());
    let mut todo = vec![tree.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let about = fs::symlink_metadata(&path).unwrap();
            if about.is_dir() {
                todo.push(path);
                continue;
            }
            *names_of.entry(about.ino()).or_insert(0) += 1;
            let below = path.strip_prefix(tree).unwrap().to_owned();
            files.insert(below, (fs::read(&path).unwrap(), about.ino()));
        }
    }
    let with_links = files.into_iter();
    with_links
        .map(|(path, (content, inode))| (path, (content, names_of[&inode])))
        .collect()
}

fn make_names(file: &Path, folder: &Path, count: usize) {
    fs::create_dir(folder).unwrap();
    for n in 0..count {
        fs::hard_link(file, folder.join(n.to_string())).unwrap();
    }
}

#[test]
fn a_file_with_too_many_names_is_stored_as_further_copies() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &[]);
    let source = bench.source();
    fs::write(source.join("f"), "x").unwrap();
    make_names(&source.join("f"), &source.join("l"), 1_000);
    fs::create_dir(source.join("z")).unwrap();
    fs::write(source.join("z/two"), "two").unwrap();
    fs::hard_link(source.join("z/two"), source.join("a two")).unwrap();
    fs::write(source.join("z/last"), "last").unwrap();
    fs::write(source.join("l/left-out"), "secret").unwrap();
    fs::hard_link(source.join("f"), source.join("l/left-out-too")).unwrap();
    let mut spec = bench.spec();
    spec.excludes = vec!["left-out*".to_owned()];
    let mut expected = names_and_links(&source);
    expected.retain(|path, _| !path.to_string_lossy().contains("left-out"));
    for (_, links) in expected.values_mut() {
        *links -= u64::from(*links > 1_000);
    }
    let mut unchanged = Vec::new();
    for run in 1..=4 {
        let record = take_into(&disk.at, &spec);
        let report = record.unwrap();
        let record = report.record;
        assert!(record.complete, "{run}: {record:?}");
        let split = record
            .warnings
            .iter()
            .filter(|one| matches!(one, Warning::LinksSplit { .. }));
        assert_eq!(split.count(), usize::from(run == 2 || run == 4), "{run}");
        let tree =
            crate::folder::below(&disk.at.join("home").join(report.name.to_string()), &source);
        assert!(names_and_links(&tree) == expected, "{run}");
        unchanged.push(inode(&tree.join("z/last")));
        // The trees set aside are removed.
        let names: Vec<_> = fs::read_dir(disk.at.join("home"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name.to_string_lossy().contains(".partial"))
            .collect();
        assert!(names.is_empty(), "{run}: {names:?}");
        if run == 1 || run == 3 {
            // As if many snapshots had it: ext4 allows 65,000 names.
            let has = usize::try_from(fs::metadata(tree.join("f")).unwrap().nlink()).unwrap();
            let others = disk.at.join(format!("others{run}"));
            make_names(&tree.join("f"), &others, 64_900 - has);
        }
    }
    assert!(unchanged.iter().all(|one| *one == unchanged[0]));
}

#[test]
fn a_file_with_more_names_than_any_file_can_have_is_split() {
    requires!(fuse_missing());
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("f"), "x").unwrap();
    make_names(&source.join("f"), &source.join("l"), 200);
    fs::write(source.join("g"), "y").unwrap();
    make_names(&source.join("g"), &source.join("m"), 90);
    fs::write(source.join("h"), "z").unwrap();
    make_names(&source.join("h"), &source.join("n"), 9);
    fs::write(source.join("z"), "last").unwrap();
    let session = FailingVolume::mount(&bench.volume(), 60);
    let runs: Vec<_> = (1..=4)
        .map(|_| {
            let report = bench.try_take(&bench.spec());
            let tree = report.as_ref().ok().map(|report| {
                let tree = names_and_links(&bench.in_snapshot(report.name));
                assert!(!tree.values().any(|(_, links)| *links > 60));
                tree
            });
            (report, tree)
        })
        .collect();
    drop(session);
    let content = |tree: &BTreeMap<PathBuf, (Vec<u8>, u64)>| -> Vec<(PathBuf, Vec<u8>)> {
        let files = tree.iter();
        files
            .map(|(path, (content, _))| (path.clone(), content.clone()))
            .collect()
    };
    let expected = names_and_links(&source);
    for (report, tree) in runs {
        let record = report.unwrap().record;
        let tree = tree.unwrap();
        assert!(record.complete, "{record:?}");
        assert_eq!(content(&tree), content(&expected));
        assert_eq!(tree[Path::new("h")].1, 10);
        let split = |one: &&Warning| matches!(one, Warning::LinksSplit { .. });
        assert!(record.warnings.iter().filter(split).count() >= 2);
        // 201 and 91 names, at most 30 for each copy.
        let single = tree.values().filter(|(_, links)| *links == 1).count();
        assert!(single <= 3, "{single}");
    }
}

#[test]
fn a_further_attempt_changes_nothing_of_an_older_snapshot() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("a"), "kept").unwrap();
    set_mode(&source.join("a"), 0o644).unwrap();
    let first = bench.take();
    fs::write(source.join("b"), vec![7; 4 << 20]).unwrap();
    fs::write(source.join("c"), "last").unwrap();
    // The volume refuses a file above 1 MiB. Meanwhile an unchanged file gets another mode.
    let flag = bench.path("second");
    let before = format!(
        "trap '' XFSZ; ulimit -f 2048\nif [ ! -e {flag} ]; then touch {flag}; rsync \"$@\"; rc=$?; \
         chmod 600 {a}; exit $rc; fi",
        flag = flag.display(),
        a = source.join("a").display(),
    );
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script(&before, "rsync");
    let report = bench.try_take(&spec).unwrap();
    assert!(!report.record.complete);
    assert_eq!(
        report.record.unread.names,
        [source.join("b").display().to_string()]
    );
    let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(bench.in_snapshot(first.name).join("a")), 0o644);
    let tree = bench.in_snapshot(report.name);
    assert_eq!(mode(tree.join("a")), 0o600);
    assert_eq!(fs::read(tree.join("c")).unwrap(), b"last");
    assert!(!tree.join("b").exists());
}

#[test]
fn a_missing_source_excludes_no_other() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let mut spec = bench.spec();
    let (gone, empty) = (bench.path("gone"), bench.path("empty"));
    fs::create_dir(&empty).unwrap();
    spec.sources.extend([gone.clone(), empty.clone()]);
    let report = bench.try_take(&spec).unwrap();
    assert!(!report.record.complete);
    let missing = [gone.display().to_string(), empty.display().to_string()];
    assert_eq!(report.record.unread.names, missing);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
    // A restore with delete must not treat the missing ones as empty.
    assert_eq!(
        report.record.sources,
        [bench.source().display().to_string()]
    );
}

#[test]
fn a_pipe_as_a_source_and_patterns_that_match_nothing_are_refused() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let pipe = bench.path("pipe");
    crate::folder::run("mkfifo", &[pipe.to_str().unwrap()]);
    let refused = |spec: &SnapshotSpec| bench.try_take(spec).unwrap_err();
    let mut spec = bench.spec();
    spec.sources = vec![pipe.clone()];
    assert!(matches!(
        refused(&spec),
        SnapshotError::SourceRefused { .. }
    ));
    for pattern in ["~/.cache", "./x", "$HOME/x", "\u{feff}*.tmp"] {
        let mut spec = bench.spec();
        spec.excludes = vec![pattern.to_owned()];
        let error = refused(&spec);
        assert!(
            matches!(error, SnapshotError::PatternRefused { .. }),
            "{error}"
        );
    }
    for file in [&pipe, Path::new("/tmp"), Path::new("/dev/null")] {
        let mut spec = bench.spec();
        spec.exclude_from = vec![file.to_owned()];
        let error = refused(&spec);
        assert!(
            matches!(error, SnapshotError::PatternFile { .. }),
            "{error}"
        );
    }
    let file = bench.path("patterns");
    for (text, line) in [("\u{feff}*.tmp\n", 1), ("# ~/a\na\r\n~/b\n", 3)] {
        fs::write(&file, text).unwrap();
        let mut spec = bench.spec();
        spec.exclude_from = vec![file.clone()];
        let error = refused(&spec);
        let at = |error| match error {
            SnapshotError::PatternLineRefused { line, .. } => Some(line),
            _ => None,
        };
        assert_eq!(at(error), Some(line));
    }
}

#[test]
fn foreign_objects_on_the_volume_stop_no_run() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let outside = bench.path("outside");
    fs::write(&outside, "precious").unwrap();
    let state = bench.job().join(".sprat");
    fs::create_dir_all(state.join("latest.new")).unwrap();
    symlink("/nowhere", state.join("deleting-x")).unwrap();
    fs::write(state.join("deleting-y"), "x").unwrap();
    symlink(&outside, state.join("checkpoint.clock")).unwrap();
    symlink("/nowhere", bench.job().join("2020-01-01T00-00-00Z.partial")).unwrap();
    let report = bench.take();
    assert!(report.record.complete);
    let left = |name: &str| Warning::ForeignObject {
        path: format!("home/.sprat/{name}"),
        done: "left alone".to_owned(),
    };
    assert!(report.record.warnings.contains(&left("deleting-x")));
    assert!(report.record.warnings.contains(&left("deleting-y")));
    assert_eq!(fs::read(&outside).unwrap(), b"precious");

    fs::rename(&state, bench.job().join("kept")).unwrap();
    symlink("kept", &state).unwrap();
    let report = bench.take();
    let renamed = Warning::ForeignObject {
        path: "home/.sprat".to_owned(),
        done: "renamed to .sprat.foreign-1".to_owned(),
    };
    assert!(report.record.warnings.contains(&renamed));
    fs::rename(bench.job(), bench.volume().join("other")).unwrap();
    fs::write(bench.job(), "a file").unwrap();
    let report = bench.take();
    assert!(report.record.complete);
    assert_eq!(
        fs::read(bench.volume().join("home.foreign-1")).unwrap(),
        b"a file"
    );
}

/// A tmpfs.
struct Memory(PathBuf);

impl Memory {
    fn mounted(at: PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        crate::folder::run("mount", &["-t", "tmpfs", "memory", at.to_str().unwrap()]);
        Self(at)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        crate::folder::run("umount", &[self.0.to_str().unwrap()]);
    }
}

#[test]
fn files_with_times_that_ext4_has_not_are_stored_once_and_reported_each_time() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &["-b", "4096"]);
    // tmpfs has these times.
    let memory = Memory::mounted(bench.path("large"));
    // The beginning of Windows' time, and the last second of ext4 and half a second more.
    let times = [
        (-11_644_473_600, 0),
        (15_032_385_535, 500_000_000),
        (40_000_000_000, 7),
    ];
    let mut files = Vec::new();
    for (number, (seconds, nanoseconds)) in times.into_iter().enumerate() {
        let file = memory.0.join(format!("file {number}"));
        fs::write(&file, "content").unwrap();
        sprat_testkit::tree::set_time(&file, seconds, nanoseconds).unwrap();
        files.push(file);
    }
    // Not all copied files are compared with older ones.
    for number in 0..1000 {
        fs::write(memory.0.join(format!("copied before {number}")), "other").unwrap();
    }
    fs::write(memory.0.join("other"), "other").unwrap();
    // Their changes must be older than the run.
    std::thread::sleep(std::time::Duration::from_secs(5));
    let spec = SnapshotSpec::new(crate::folder::job_name(), vec![memory.0.clone()]);
    let named: Vec<String> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    let mut inodes = Vec::new();
    for copied in [1004, 0, 0] {
        let report = take_into(&disk.at, &spec).unwrap();
        let tree = disk.at.join("home").join(report.name.to_string());
        let of = |file: &PathBuf| inode(&crate::folder::below(&tree, file));
        inodes.push(files.iter().map(of).collect::<Vec<_>>());
        let record = report.record;
        assert!(!record.complete);
        let mut unread = record.unread.names.clone();
        unread.sort();
        assert_eq!(unread, named);
        let why = record.reason_unread(&named[0]).unwrap();
        assert_eq!(why, "the file system of the volume has no such time");
        let clock = |warning: &&Warning| matches!(warning, Warning::ClockBehind { .. });
        let warnings = record.warnings.iter().filter(|warning| !clock(warning));
        assert!(warnings.eq([&Warning::AttributesRefused { files: 3 }]));
        assert_eq!(record.stats.transferred, copied);
    }
    assert!(inodes[0] == inodes[1] && inodes[1] == inodes[2]);
}

#[test]
fn a_file_whose_attributes_do_not_fit_is_stored_once_and_reported_each_time() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &["-b", "4096"]);
    // tmpfs can store attributes that don't fit into one block of ext4.
    let memory = Memory::mounted(bench.path("large"));
    let folder = memory.0.join("folder");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("file");
    fs::write(&file, "content").unwrap();
    fs::write(folder.join("other"), "other").unwrap();
    for number in 0..3 {
        let name = format!("user.n{number}");
        sprat_testkit::tree::set_xattr(&file, &name, &[b'v'; 3000]).unwrap();
    }
    // Its change must be older than the run.
    std::thread::sleep(std::time::Duration::from_secs(5));
    let mut spec = SnapshotSpec::new(crate::folder::job_name(), vec![memory.0.clone()]);
    let take = || {
        let report = take_into(&disk.at, &spec).unwrap();
        let tree = disk.at.join("home").join(report.name.to_string());
        let kept = crate::folder::below(&tree, &file);
        let record = report.record;
        assert!(!record.complete);
        assert_eq!(record.unread.names, [file.display().to_string()]);
        let clock = |warning: &&Warning| matches!(warning, Warning::ClockBehind { .. });
        let warnings = record.warnings.iter().filter(|warning| !clock(warning));
        assert!(warnings.eq([&Warning::AttributesTooLarge { files: 1 }]));
        let time = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
        assert_eq!(time(kept.parent().unwrap()), time(&folder));
        (kept, record.stats)
    };
    let (first, _) = take();
    let (second, stats) = take();
    assert_eq!(inode(&first), inode(&second));
    assert_eq!((stats.transferred, stats.regular_files), (0, 2));
    let (third, stats) = take();
    assert_eq!(inode(&first), inode(&third));
    assert_eq!(stats.transferred, 0);
    // A changed file is stored again.
    set_mode(&file, 0o600).unwrap();
    let (fourth, stats) = take();
    assert_ne!(inode(&first), inode(&fourth));
    assert_eq!(stats.transferred, 1);
    // The job's patterns still apply.
    spec.excludes = vec!["/**/file".to_owned()];
    let report = take_into(&disk.at, &spec).unwrap();
    let tree = disk.at.join("home").join(report.name.to_string());
    assert!(!crate::folder::below(&tree, &file).exists());
}
