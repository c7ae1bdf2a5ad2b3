//! One file, source or foreign object never ends a run.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use sprat_snapshot::{SnapshotError, SnapshotSpec, Warning};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;

use crate::folder::failing_source::{CONTENT, FailingSource};
use crate::folder::{self, Bench, SmallExt4, loop_missing, take_into, wait_for};
use crate::walk_finds;

/// Every error number of Linux but ENOSYS, by which a FUSE file system says that it needs no `open`.
fn all_errors() -> impl Iterator<Item = i32> {
    (1..=133).filter(|errno| *errno != 38)
}

#[test]
fn whatever_error_a_source_file_gives_the_others_are_saved() {
    requires!(fuse_missing());
    let bench = Bench::new();
    let mut names: Vec<String> = all_errors()
        .flat_map(|errno| ["open", "stat", "read", "readdir"].map(|what| format!("{what}-{errno}")))
        .collect();
    // glibc takes ENOENT of a folder that is being read for its end (readdir of a removed folder).
    names.retain(|name| name != "readdir-2");
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

#[test]
fn a_file_that_becomes_a_pipe_under_way_is_left_out_and_hangs_no_run() {
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
    folder::run("mkfifo", &[pipe.to_str().unwrap()]);
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
    folder::run("truncate", &["-s", "200M", image.to_str().unwrap()]);
    folder::run("mkfs.btrfs", &["-q", image.to_str().unwrap()]);
    let (image, from) = (image.to_str().unwrap(), from.to_str().unwrap());
    folder::run("mount", &["-o", "loop", image, from]);
    let disk = SmallExt4::new(&bench, "64M", &[]);
    fs::write(format!("{from}/letter"), "important").unwrap();
    fs::write(format!("{from}/x"), "x").unwrap();
    folder::run(
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
    folder::run("umount", &[from]);
    let record = report.unwrap().record;
    assert!(!record.complete);
    assert_eq!(record.unread.names, [format!("{from}/x")]);
    assert_eq!(record.warnings, [Warning::AttributesRefused { files: 1 }]);
}

#[test]
fn more_names_than_one_file_can_have_make_no_snapshot_that_lacks_them() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "128M", &["-N", "40000"]);
    let source = bench.source();
    fs::create_dir(source.join("l")).unwrap();
    fs::write(source.join("f"), "x").unwrap();
    for n in 0..25_000 {
        fs::hard_link(source.join("f"), source.join(format!("l/{n}"))).unwrap();
    }
    // The third run finds no room for its names at the inode of the first two.
    for run in 1..=3 {
        let Ok(report) = take_into(&disk.at, &bench.spec()) else {
            assert_eq!(run, 3);
            return;
        };
        let tree = folder::below(&disk.at.join("home").join(report.name.to_string()), &source);
        for n in 0..25_000 {
            assert_eq!(fs::metadata(tree.join(format!("l/{n}"))).unwrap().len(), 1);
        }
    }
    panic!("75,000 names of one file");
}

#[test]
fn a_source_that_is_missing_leaves_out_no_other() {
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
    // A restore that deletes must not take the missing ones for empty.
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
    folder::run("mkfifo", &[pipe.to_str().unwrap()]);
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
fn objects_of_somebody_else_in_the_volume_stop_no_run() {
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
struct Memory(std::path::PathBuf);

impl Memory {
    fn mounted(at: std::path::PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        folder::run("mount", &["-t", "tmpfs", "memory", at.to_str().unwrap()]);
        Self(at)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        folder::run("umount", &[self.0.to_str().unwrap()]);
    }
}

#[test]
fn a_file_whose_attributes_do_not_fit_is_stored_once_and_reported_each_time() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &["-b", "4096"]);
    // tmpfs holds what one block of ext4 doesn't.
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
    // Its change is to be older than the run.
    std::thread::sleep(std::time::Duration::from_secs(5));
    let mut spec = SnapshotSpec::new(folder::job_name(), vec![memory.0.clone()]);
    let take = || {
        let report = take_into(&disk.at, &spec).unwrap();
        let tree = disk.at.join("home").join(report.name.to_string());
        let kept = folder::below(&tree, &file);
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
    assert_eq!(folder::inode(&first), folder::inode(&second));
    assert_eq!((stats.transferred, stats.regular_files), (0, 2));
    let (third, stats) = take();
    assert_eq!(folder::inode(&first), folder::inode(&third));
    assert_eq!(stats.transferred, 0);
    // What changed is stored again.
    sprat_testkit::tree::set_mode(&file, 0o600).unwrap();
    let (fourth, stats) = take();
    assert_ne!(folder::inode(&first), folder::inode(&fourth));
    assert_eq!(stats.transferred, 1);
    // No pattern of the job is got round.
    spec.excludes = vec!["/**/file".to_owned()];
    let report = take_into(&disk.at, &spec).unwrap();
    let tree = disk.at.join("home").join(report.name.to_string());
    assert!(!folder::below(&tree, &file).exists());
}
