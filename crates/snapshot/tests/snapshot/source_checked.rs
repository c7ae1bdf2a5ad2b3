//! Sources that are read again: which changes are found, and which are nobody's fault.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use sprat_snapshot::{
    Cancel, FoundChange, KeepCount, KeepReason, KeepRules, OldContent, PruneReport, PruneSpec,
    SnapshotName, SourceCheckReport, SourceCheckSpec, SourceCursor,
};
use sprat_testkit::{needs, requires};

use crate::folder::{Bench, SmallExt4, job_name, loop_missing, run, wait_for};

/// A file that changes later than so long before a run may have changed again while it was read.
const STEP: Duration = Duration::from_millis(4100);

fn take(bench: &Bench, source: &Path) -> SnapshotName {
    let mut spec = sprat_snapshot::SnapshotSpec::new(job_name(), vec![source.to_owned()]);
    spec.change_lists = Some(bench.path("lists/home"));
    spec.page_cache.ask(|_, _| Ok(true));
    sleep(STEP);
    bench.try_take(&spec).unwrap().name
}

pub fn spec(bench: &Bench, snapshot: SnapshotName, source: &Path) -> SourceCheckSpec {
    SourceCheckSpec {
        lists: bench.path("lists/home"),
        snapshot,
        sources: vec![source.to_owned()],
        from: SourceCursor::default(),
        parts: 1,
        parts_now: 1,
        bytes_max: 1 << 30,
        duration_max: Duration::from_secs(600),
        unchanged_for: Duration::ZERO,
        again: Vec::new(),
    }
}

pub fn check(spec: &SourceCheckSpec) -> SourceCheckReport {
    sprat_snapshot::check_sources(spec, &Cancel::new()).unwrap()
}

/// The file has bytes that differ everywhere.
fn write(path: &Path, seed: u8) {
    let content: Vec<u8> = (0..300_000_u32)
        .map(|at| seed.wrapping_add(u8::try_from(at % 251).unwrap()))
        .collect();
    fs::write(path, content).unwrap();
}

fn names(found: &[FoundChange]) -> Vec<&str> {
    let names = found.iter().map(|one| &*one.old.path);
    names.map(|path| path.rsplit('/').next().unwrap()).collect()
}

/// Changes a byte of these files on the device, while it is not mounted.
fn rot(bench: &Bench, disk: &SmallExt4, files: &[&str]) {
    let (image, at) = (bench.path("image"), disk.at.to_str().unwrap());
    run("umount", &[at]);
    // Another mount namespace may have a copy of the mount.
    wait_for("the loop device", || {
        let ran = Command::new("losetup").arg("-j").arg(&image).output();
        ran.unwrap().stdout.is_empty()
    });
    let device = File::options().read(true).write(true).open(&image).unwrap();
    for file in files {
        let ran = Command::new("debugfs")
            .args(["-R", &format!("blocks /{file}")])
            .arg(&image)
            .output()
            .unwrap();
        let blocks = String::from_utf8(ran.stdout).unwrap();
        let block: u64 = blocks.split_whitespace().nth(3).unwrap().parse().unwrap();
        let mut byte = [0];
        device.read_exact_at(&mut byte, block * 4096 + 100).unwrap();
        device
            .write_all_at(&[!byte[0]], block * 4096 + 100)
            .unwrap();
    }
    device.sync_all().unwrap();
    run("mount", &["-o", "loop", image.to_str().unwrap(), at]);
}

fn prune(bench: &Bench, old_content: &[OldContent]) -> PruneReport {
    let rules = KeepRules {
        last: KeepCount::new(1),
        ..KeepRules::default()
    };
    let spec = PruneSpec {
        old_content: old_content.to_vec(),
        ..PruneSpec::new(job_name(), rules)
    };
    sprat_snapshot::prune(&bench.volume(), &spec, &mut |_| {}, &Cancel::new()).unwrap()
}

fn kept(report: &PruneReport) -> Vec<(SnapshotName, bool)> {
    let left = report.snapshots.iter().filter(|one| !one.removed);
    left.map(|one| {
        let reasons = &one.decision.keep;
        (one.decision.name, reasons.contains(&KeepReason::OldContent))
    })
    .collect()
}

#[test]
fn bit_rot_is_found_and_the_snapshot_with_the_old_content_is_kept() {
    requires!(loop_missing(), needs::program("debugfs"));
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &["-b", "4096"]);
    for (seed, name) in (0..).zip(["photo", "other", "swap", "deleted"]) {
        write(&disk.at.join(name), seed);
    }
    let swap = File::options().write(true).open(disk.at.join("swap"));
    swap.unwrap().write_all_at(b"SWAPSPACE2", 4086).unwrap();
    let first = take(&bench, &disk.at);
    let spec = spec(&bench, first, &disk.at);
    let whole = check(&spec);
    assert_eq!((whole.files, whole.bytes), (4, 1_200_000), "{whole:?}");
    assert!(whole.silent.is_empty() && whole.rewritten.is_empty());

    let stamp = |name: &str| {
        let about = fs::symlink_metadata(disk.at.join(name)).unwrap();
        (
            about.len(),
            about.mtime_nsec(),
            about.ctime(),
            about.ctime_nsec(),
        )
    };
    let before = stamp("photo");
    rot(&bench, &disk, &["photo", "swap", "deleted"]);
    assert_eq!(stamp("photo"), before);
    let found = check(&spec);
    // The kernel writes to swap files, and changes no time.
    assert_eq!(names(&found.silent), ["deleted", "photo"]);
    assert!(found.rewritten.is_empty());
    let again = SourceCheckSpec {
        again: found.silent.clone(),
        ..spec.clone()
    };
    let second = check(&again);
    assert!(second.read_again && second.right_again.is_empty());
    assert!(second.silent[0].is_same_as(&found.silent[0]), "{second:?}");

    // A backup does not see it: the snapshots share the old content until the file changes or goes.
    let next = take(&bench, &disk.at);
    let old: Vec<OldContent> = found.silent.iter().map(|one| one.old.clone()).collect();
    assert_eq!(kept(&prune(&bench, &old)), [(next, false)]);
    fs::remove_file(disk.at.join("deleted")).unwrap();
    let last = take(&bench, &disk.at);
    assert_eq!(kept(&prune(&bench, &old)), [(next, true), (last, false)]);
    assert_eq!(kept(&prune(&bench, &[])), [(last, false)]);

    // The same damage once more: all bytes are as they were.
    rot(&bench, &disk, &["photo"]);
    let again = SourceCheckSpec {
        snapshot: last,
        ..again
    };
    let healed = check(&again);
    assert!(healed.silent.is_empty(), "{healed:?}");
    let right: Vec<_> = healed.right_again.iter().collect();
    assert!(
        right.len() == 1 && right[0].ends_with("/photo"),
        "{healed:?}"
    );
}

/// The content from before is in old snapshots only. Until it is back, they must be kept.
#[test]
fn changed_content_that_is_backed_up_is_not_right_again() {
    requires!(loop_missing(), needs::program("debugfs"));
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &["-b", "4096"]);
    for (seed, name) in (0..).zip(["photo", "text"]) {
        write(&disk.at.join(name), seed);
    }
    let first = take(&bench, &disk.at);
    rot(&bench, &disk, &["photo", "text"]);
    let spec = spec(&bench, first, &disk.at);
    let found = check(&spec);
    assert_eq!(names(&found.silent), ["photo", "text"]);
    let again = SourceCheckSpec {
        again: found.silent,
        ..spec
    };

    // Another container gets its first backup after the change.
    let other = Bench::new();
    let of_other = SourceCheckSpec {
        snapshot: take(&other, &disk.at),
        lists: other.path("lists/home"),
        ..again.clone()
    };
    let there = check(&of_other);
    assert!(there.read_again && there.silent.is_empty(), "{there:?}");
    assert!(there.right_again.is_empty(), "{there:?}");
    assert_eq!(there.backed_up_so.len(), 2, "{there:?}");

    // Somebody works on with one of the files.
    let text = File::options().write(true).open(disk.at.join("text"));
    text.unwrap().write_all_at(b"more", 9000).unwrap();
    let edited = SourceCheckSpec {
        snapshot: take(&bench, &disk.at),
        ..again
    };
    let found = check(&edited);
    assert_eq!(names(&found.silent), ["photo"]);
    assert!(found.right_again.is_empty(), "{found:?}");
    assert!(found.backed_up_so.is_empty(), "{found:?}");
}

#[test]
fn file_that_somebody_wrote_to_has_not_changed_silently() {
    requires!(loop_missing(), needs::program("python3"));
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &["-b", "4096"]);
    for (seed, name) in (0..).zip(["set back", "mapped", "replaced", "attributes"]) {
        write(&disk.at.join(name), seed);
    }
    let first = take(&bench, &disk.at);
    let path = disk.at.join("set back");
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"!", 5).unwrap();
    file.set_times(FileTimes::new().set_modified(modified))
        .unwrap();
    let script = "import mmap, sys\n\
                  with open(sys.argv[1], 'r+b') as f:\n m = mmap.mmap(f.fileno(), 0); m[7] = 1; m.flush()\n";
    let mapped = disk.at.join("mapped");
    run("python3", &["-c", script, mapped.to_str().unwrap()]);
    let new = disk.at.join("new");
    write(&new, 77);
    let replaced = disk.at.join("replaced");
    let modified = fs::metadata(&replaced).unwrap().modified().unwrap();
    let times = FileTimes::new().set_modified(modified);
    File::options()
        .write(true)
        .open(&new)
        .unwrap()
        .set_times(times)
        .unwrap();
    fs::rename(&new, &replaced).unwrap();
    sprat_testkit::tree::set_mode(&disk.at.join("attributes"), 0o600).unwrap();

    let found = check(&spec(&bench, first, &disk.at));
    assert!(found.silent.is_empty(), "{found:?}");
    let rewritten: Vec<&str> = found.rewritten.names.iter().map(|path| &**path).collect();
    let rewritten: Vec<&str> = rewritten
        .iter()
        .map(|path| path.rsplit('/').next().unwrap())
        .collect();
    assert_eq!(rewritten, ["replaced", "set back"]);

    // A file with other attributes has the content that an earlier run read. Nothing is known of it from this run.
    let second = take(&bench, &disk.at);
    let found = check(&spec(&bench, second, &disk.at));
    assert_eq!((found.files, found.rewritten.count), (4, 2), "{found:?}");
}

#[test]
fn slices_read_each_file_once_in_a_round() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &["-b", "4096"]);
    for number in 0..60 {
        let folder = disk.at.join(format!("{}", number % 7));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(number.to_string()), vec![1; 10_000]).unwrap();
    }
    let first = take(&bench, &disk.at);
    let mut spec = spec(&bench, first, &disk.at);
    spec.parts = 7;
    for (parts_now, bytes_max, slices) in [
        (1, 1 << 30, 7),
        (3, 1 << 30, 3),
        (7, 25_000, 30),
        (1, 1, 60),
    ] {
        let (mut files, mut count) = (0, 0);
        spec.from = SourceCursor::default();
        (spec.parts_now, spec.bytes_max) = (parts_now, bytes_max);
        loop {
            let part = spec.from.part;
            let report = check(&spec);
            assert!(report.bytes <= bytes_max.max(10_000), "{report:?}");
            count += 1;
            // The first ones of the next round.
            let is_round = report.next.part < part
                || (parts_now == 7 && report.next == SourceCursor::default());
            files += report.files;
            spec.from = report.next;
            if is_round || count > 100 {
                break;
            }
        }
        assert!(count >= slices, "{count}");
        let most = if spec.parts_now == 3 { 90 } else { 60 };
        assert!((60..=most).contains(&files), "{files}");
    }
    let stopped = Cancel::new();
    stopped.cancel();
    let report = sprat_snapshot::check_sources(&spec, &stopped).unwrap();
    assert_eq!(report.files, 0);
    // Elsewhere there are no files of the job's sources.
    spec.sources = vec![bench.source()];
    spec.parts = 1;
    assert_eq!(check(&spec).files, 0);
}
