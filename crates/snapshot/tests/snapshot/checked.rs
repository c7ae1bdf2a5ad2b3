//! Checks of a volume's files: what they read, in which order, what they remember, when they stop.

mod healed;
mod lacking;
mod restored;

use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::folder::failing_source::FailingSource;
use crate::folder::{Bench, SmallExt4, below, job_name, loop_missing, take_into};
use rustix::fs::{Mode, OFlags, mkdirat, openat};
use sprat_snapshot::{Cancel, CheckReport, CheckSpec, CheckWhat, RestoreSpec, SnapshotError};
use sprat_testkit::requires;

const OLDER: &str = "2026-01-01T00-00-00Z";
const NEWER: &str = "2026-02-01T00-00-00Z";

/// A check of the machine that made the backups, without their lists of changes.
pub(crate) fn spec(bench: &Bench, what: CheckWhat) -> CheckSpec {
    let known = match what {
        CheckWhat::Everything => "all.sums",
        CheckWhat::AgainstSource(_) => "source.sums",
    };
    CheckSpec {
        change_lists: None,
        suspects: bench.path("suspects.json"),
        what,
        known: bench.path(known),
        duration_max: None,
        bytes_max: None,
        duration_over: Duration::ZERO,
        note_interval: Duration::from_secs(3600),
        never_enter: Vec::new(),
        containers: Vec::new(),
    }
}

fn try_check(
    bench: &Bench,
    spec: &CheckSpec,
    cancel: &Cancel,
) -> Result<CheckReport, SnapshotError> {
    sprat_snapshot::check(&bench.volume(), spec, &mut |_| {}, cancel)
}

pub(crate) fn read_all(bench: &Bench) -> CheckReport {
    try_check(bench, &spec(bench, CheckWhat::Everything), &Cancel::new()).unwrap()
}

pub(crate) fn against_source(bench: &Bench) -> CheckReport {
    let spec = spec(bench, CheckWhat::AgainstSource(job_name()));
    try_check(bench, &spec, &Cancel::new()).unwrap()
}

/// Writes a file on the volume.
fn write(bench: &Bench, name: &str, content: &[u8]) -> PathBuf {
    let path = bench.volume().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn sparse(bench: &Bench, name: &str, bytes: u64) {
    let path = write(bench, name, b"");
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(bytes)
        .unwrap();
}

/// Writes other content of the same length and time, like a faulty disk or a program that restores
/// times.
pub(crate) fn rewrite(path: &Path, content: &[u8]) {
    let about = fs::metadata(path).unwrap();
    assert_eq!(about.len(), content.len() as u64);
    let mut file = File::options().write(true).open(path).unwrap();
    file.write_all(content).unwrap();
    let times = FileTimes::new().set_modified(about.modified().unwrap());
    file.set_times(times).unwrap();
}

/// The names of snapshots, and the times they are compared with, have whole seconds.
fn next_second() {
    std::thread::sleep(Duration::from_millis(1100));
}

#[test]
fn damage_is_reported_by_every_later_check() {
    let bench = Bench::new();
    write(&bench, &format!("home/{NEWER}/other"), b"other");
    let file = write(&bench, &format!("home/{NEWER}/file"), b"alpha");
    assert!(!read_all(&bench).is_damaged());
    rewrite(&file, b"noise");
    for round in 0..4 {
        let report = read_all(&bench);
        assert_eq!(report.damaged.count, 1, "check {round}: {report:?}");
        assert_eq!(report.files_known, 2);
    }
}

#[test]
fn files_in_the_root_of_the_volume_are_read_too() {
    let bench = Bench::new();
    let file = write(&bench, "by-hand.tar", b"alpha");
    write(&bench, "home/beside", b"a");
    write(&bench, &format!("home/{NEWER}/file"), b"a");
    assert_eq!(read_all(&bench).files_read, 3);
    rewrite(&file, b"noise");
    let damaged = read_all(&bench).damaged;
    assert!(damaged.names[0].starts_with("by-hand.tar: "), "{damaged:?}");
}

#[test]
fn the_newest_snapshot_of_all_jobs_is_read_first() {
    let bench = Bench::new();
    write(&bench, &format!("a/{OLDER}/file"), b"older");
    let newest = write(&bench, &format!("z/{NEWER}/file"), b"newer");
    read_all(&bench);
    rewrite(&newest, b"noise");
    let mut one = spec(&bench, CheckWhat::Everything);
    one.duration_max = Some(Duration::ZERO);
    let report = try_check(&bench, &one, &Cancel::new()).unwrap();
    assert_eq!((report.files_read, report.damaged.count), (1, 1));
}

#[test]
fn every_run_makes_progress_however_short_its_time() {
    let bench = Bench::new();
    next_second();
    for name in ["a", "b", "c"] {
        let path = bench.source().join(name);
        fs::write(&path, name).unwrap();
        // A recent time would be recorded in a separate file.
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(hour_ago).unwrap();
    }
    next_second();
    bench.take();
    for what in [CheckWhat::AgainstSource(job_name()), CheckWhat::Everything] {
        let mut one = spec(&bench, what.clone());
        one.duration_max = Some(Duration::ZERO);
        let mut read = 0;
        loop {
            let report = try_check(&bench, &one, &Cancel::new()).unwrap();
            assert_eq!(report.files_before, read);
            read += report.files_read;
            if report.finished {
                break;
            }
            assert_eq!(report.files_read, 1, "{report:?}");
        }
        // Each file, and with everything the record of the snapshot and its list of changes.
        let files = 3 + 2 * u64::from(what == CheckWhat::Everything);
        assert_eq!(read, files);
    }
}

#[test]
fn slice_ends_after_its_bytes_and_the_next_one_goes_on() {
    let bench = Bench::new();
    let content = vec![7; 1000];
    let files: Vec<_> = (0..7)
        .map(|number| write(&bench, &format!("home/{NEWER}/{number}"), &content))
        .collect();
    let mut slice = spec(&bench, CheckWhat::Everything);
    slice.bytes_max = Some(2500);
    let read = || try_check(&bench, &slice, &Cancel::new()).unwrap();
    for (before, files, finished) in [(0, 3, false), (3, 3, false), (6, 1, true), (0, 3, false)] {
        let report = read();
        assert_eq!((report.files_before, report.files_read), (before, files));
        assert_eq!(report.finished, finished);
    }
    // A damaged file is read and reported in each slice, and does not keep the others from being read.
    rewrite(&files[0], &[9; 1000]);
    while !read().finished {}
    for (before, files, finished) in [(0, 3, false), (2, 4, false), (5, 2, true)] {
        let report = read();
        assert_eq!(report.damaged.count, 1);
        assert_eq!((report.files_before, report.files_read), (before, files));
        assert_eq!(report.finished, finished);
    }
}

#[test]
fn a_time_beyond_the_clock_is_no_limit() {
    let bench = Bench::new();
    write(&bench, &format!("home/{NEWER}/file"), b"alpha");
    let mut long = spec(&bench, CheckWhat::Everything);
    long.duration_max = Some(Duration::MAX);
    assert!(try_check(&bench, &long, &Cancel::new()).unwrap().finished);
}

#[test]
fn time_before_the_first_file_counts_and_a_tenth_is_left_for_reading() {
    let bench = Bench::new();
    for number in 0..30 {
        sparse(&bench, &format!("home/{NEWER}/{number}"), 64 << 20);
    }
    let mut over = spec(&bench, CheckWhat::Everything);
    over.duration_max = Some(Duration::from_millis(200));
    over.duration_over = Duration::from_secs(3600);
    let report = try_check(&bench, &over, &Cancel::new()).unwrap();
    assert!(!report.finished);
    assert!((1..=8).contains(&report.files_read), "{report:?}");
    // A long limit has time for everything within its tenth.
    over.duration_max = Some(Duration::from_secs(1000));
    assert!(try_check(&bench, &over, &Cancel::new()).unwrap().finished);
}

#[test]
fn waiting_files_are_not_begun_after_the_time() {
    let bench = Bench::new();
    for number in 0..30 {
        sparse(&bench, &format!("home/{NEWER}/{number}"), 64 << 20);
    }
    let mut short = spec(&bench, CheckWhat::Everything);
    short.duration_max = Some(Duration::from_millis(30));
    let report = try_check(&bench, &short, &Cancel::new()).unwrap();
    assert!(!report.finished);
    // As many as are read at once, each to its end.
    assert!((1..=8).contains(&report.files_read), "{report:?}");
    let rest = read_all(&bench);
    assert_eq!(rest.files_before, report.files_read);
    assert_eq!(rest.files_read, 30 - report.files_read);
}

#[test]
fn a_cancel_ends_a_long_file_and_keeps_what_was_read() {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        write(&bench, &format!("home/{NEWER}/{name}"), b"alpha");
    }
    // This would take minutes.
    sparse(&bench, &format!("home/{NEWER}/d"), 64 << 30);
    let cancel = Cancel::new();
    let wish = cancel.clone();
    let wisher = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        wish.cancel();
        Instant::now()
    });
    let all = spec(&bench, CheckWhat::Everything);
    let stopped = try_check(&bench, &all, &cancel);
    let after = wisher.join().unwrap().elapsed();
    assert!(matches!(stopped, Err(SnapshotError::CheckCancelled)));
    assert!(after < Duration::from_secs(10), "{after:?}");
    fs::remove_file(bench.volume().join(format!("home/{NEWER}/d"))).unwrap();
    let rest = read_all(&bench);
    assert_eq!((rest.files_before, rest.files_read), (3, 0));
}

#[test]
fn read_files_are_recorded_before_the_end() {
    let bench = Bench::new();
    for number in 0..30 {
        sparse(&bench, &format!("home/{NEWER}/{number}"), 64 << 20);
    }
    let mut often = spec(&bench, CheckWhat::Everything);
    often.note_interval = Duration::from_millis(50);
    let (kept, torn) = (bench.path("all.sums"), bench.path("torn.sums"));
    let mut told = 0;
    let report = sprat_snapshot::check(
        &bench.volume(),
        &often,
        &mut |_| {
            told += u32::from(kept.exists());
            let _ = fs::copy(&kept, &torn);
        },
        &Cancel::new(),
    );
    assert!(report.unwrap().finished && told > 0);
    // As if one of those moments had been the end.
    let mut rest = spec(&bench, CheckWhat::Everything);
    rest.known = torn;
    let rest = try_check(&bench, &rest, &Cancel::new()).unwrap();
    assert!(rest.files_before > 0, "{rest:?}");
}

#[test]
fn every_name_of_a_damaged_file_is_reported() {
    let bench = Bench::new();
    let file = write(&bench, &format!("home/{NEWER}/folder/file"), b"alpha");
    for other in [OLDER, "2026-01-02T00-00-00Z.partial"] {
        let folder = bench.volume().join(format!("home/{other}/folder"));
        fs::create_dir_all(&folder).unwrap();
        fs::hard_link(&file, folder.join("file")).unwrap();
    }
    std::os::unix::fs::symlink(NEWER, bench.volume().join("home/latest")).unwrap();
    // The source had it twice. This name is not at the path of the others.
    let twin = bench.volume().join(format!("home/{OLDER}/twin"));
    fs::hard_link(&file, twin).unwrap();
    read_all(&bench);
    rewrite(&file, b"noise");
    let report = read_all(&bench);
    let expected = [
        format!("home/{OLDER}/folder/file"),
        format!("home/{OLDER}/twin"),
        "home/2026-01-02T00-00-00Z.partial/folder/file".to_owned(),
        format!("home/{NEWER}/folder/file"),
    ];
    assert_eq!(report.affected.names, expected);
    assert_eq!(report.affected_left, 0);
    // Without time, only the quick search is done.
    let mut short = spec(&bench, CheckWhat::Everything);
    short.duration_max = Some(Duration::ZERO);
    let report = try_check(&bench, &short, &Cancel::new()).unwrap();
    assert_eq!((report.affected.count, report.affected_left), (3, 1));
}

#[test]
fn files_in_overwritten_places_are_found_and_unreadable_ones_reported() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    write(&bench, "home/other", b"elsewhere");
    // With the path of the volume and the snapshot it is longer than the kernel accepts.
    let mut folder = bench.volume().join(format!("home/{NEWER}"));
    fs::create_dir_all(&folder).unwrap();
    let name = "d".repeat(200);
    let mut at = File::open(&folder).unwrap();
    for _ in 0..21 {
        mkdirat(&at, &name, Mode::from(0o700)).unwrap();
        at = openat(&at, &name, OFlags::RDONLY, Mode::empty())
            .unwrap()
            .into();
        folder.push(&name);
    }
    let flags = OFlags::WRONLY | OFlags::CREATE;
    let file = openat(&at, "deep", flags, Mode::from(0o600)).unwrap();
    File::from(file).write_all(b"here").unwrap();
    let disk = bench.volume().join("disk");
    fs::create_dir(&disk).unwrap();
    let names = ["readdir-5", "open-13"].map(str::to_owned).to_vec();
    let _mounted = FailingSource::mount(&disk, names);

    let list = bench.path("suspects");
    // Four bytes at the place where it was written.
    let extents = |file: &File| {
        let len = file.metadata()?.len();
        Ok(vec![if len == 4 { 100..104 } else { 200..200 + len }])
    };
    let found = sprat_snapshot::files_on(
        &bench.volume(),
        std::slice::from_ref(&(96..128)),
        &extents,
        &list,
        &Cancel::new(),
    );
    let deep = folder.join("deep");
    let deep = deep
        .strip_prefix(bench.volume())
        .unwrap()
        .display()
        .to_string();
    assert_eq!(found.names.names.len(), 4, "{:?}", found.names);
    for (name, error) in [
        (deep.as_str(), ""),
        ("disk/open-13", ""),
        ("disk/open-13", ": Permission denied (os error 13)"),
        ("disk/readdir-5", ": Input/output error (os error 5)"),
    ] {
        let line = format!("{name}{error}");
        assert!(
            found.names.names.contains(&line),
            "{line}: {:?}",
            found.names
        );
    }
    assert_eq!(found.not_saved, None);
    assert!(fs::read_to_string(&list).unwrap().contains("deep"));
}

/// A source of three files that are older than the next run.
fn with_source() -> Bench {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        let path = bench.source().join(name);
        fs::write(&path, "alpha").unwrap();
        // With a recent time, the next run would compare the content.
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(hour_ago).unwrap();
    }
    next_second();
    bench
}

#[test]
fn a_source_rewritten_with_its_old_time_is_missed_and_no_damage() {
    let bench = with_source();
    bench.take();
    rewrite(&bench.source().join("a"), b"omega");
    next_second();
    // rsync sees no difference, and links the old content.
    let second = bench.take();
    let kept = fs::read(bench.in_snapshot(second.name).join("a")).unwrap();
    assert_eq!(kept, b"alpha");
    let report = against_source(&bench);
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!((report.same, report.missed.count), (2, 1));
    assert!(report.missed.names[0].ends_with("/a"), "{report:?}");
}

#[test]
fn a_file_that_differs_from_an_unchanged_source_is_damaged() {
    let bench = with_source();
    let first = bench.take();
    rewrite(&bench.in_snapshot(first.name).join("b"), b"noise");
    for _ in 0..2 {
        let report = against_source(&bench);
        assert_eq!(report.damaged.count, 1, "{report:?}");
        assert_eq!(report.same, 2);
        next_second();
        bench.take();
    }
    // Even after its snapshot is gone: an older bound proves the same, no bound proves nothing.
    fs::remove_dir_all(bench.job().join(first.name.to_string())).unwrap();
    let report = against_source(&bench);
    assert_eq!((report.damaged.count, report.missed.count), (0, 1));
}

#[test]
fn files_gone_or_changed_in_the_source_are_read_anyway() {
    let bench = with_source();
    bench.take();
    fs::remove_file(bench.source().join("a")).unwrap();
    fs::write(bench.source().join("b"), "longer than before").unwrap();
    let report = against_source(&bench);
    assert_eq!((report.gone.count, report.changed.count), (1, 1));
    assert_eq!((report.files_read, report.bytes_read), (3, 15));
}

#[test]
fn damaged_target_of_a_long_link_is_reported() {
    requires!(loop_missing());
    damaged_target_is_reported(false);
}

/// It ends at the first zero byte.
#[test]
fn target_of_a_long_link_that_is_zeroed_is_reported() {
    requires!(loop_missing());
    damaged_target_is_reported(true);
}

fn damaged_target_is_reported(by_zeros: bool) {
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "24M", &["-b", "4096"]);
    let target = |name: &str| format!("/srv/{}{name}", "folder/".repeat(12));
    let (right, wrong) = (target("right"), target("wrong"));
    std::os::unix::fs::symlink(&right, bench.source().join("link")).unwrap();
    next_second();
    let take = || take_into(&disk.at, &bench.spec()).unwrap().name;
    let first = take();
    next_second();
    let names = [first, take()];
    let check = |what: CheckWhat| {
        let spec = spec(&bench, what);
        sprat_snapshot::check(&disk.at, &spec, &mut |_| {}, &Cancel::new()).unwrap()
    };
    for what in [CheckWhat::Everything, CheckWhat::AgainstSource(job_name())] {
        let report = check(what);
        assert!(!report.is_damaged() && report.finished, "{report:?}");
    }

    match by_zeros {
        true => disk.damage(right.as_bytes(), &[0; 4096]),
        false => disk.damage(right.as_bytes(), wrong.as_bytes()),
    }
    for (what, why) in [
        (CheckWhat::Everything, "differs from an earlier check"),
        (
            CheckWhat::AgainstSource(job_name()),
            "differs from its unchanged source",
        ),
    ] {
        for _ in 0..2 {
            let report = check(what.clone());
            assert_eq!(report.damaged.count, 1, "{report:?}");
            assert!(report.damaged.names[0].ends_with(&format!("/link: {why}")));
            // Both snapshots have the same link.
            assert_eq!(report.affected.count, names.len() as u64, "{report:?}");
            assert!(report.changed.is_empty(), "{report:?}");
        }
        restored::damaged_link_is_named(&bench, &disk.at, Path::new(&right), by_zeros);
    }
    // The next backup makes the link again.
    next_second();
    let snapshot = disk.at.join(format!("home/{}", take()));
    let link = below(&snapshot, &bench.source()).join("link");
    assert_eq!(fs::read_link(link).unwrap(), Path::new(&right));
    assert!(!check(CheckWhat::AgainstSource(job_name())).is_damaged());
    let mut restore = RestoreSpec::new(job_name(), bench.path("healed"));
    restore.suspects = Some(bench.path("suspects.json"));
    let report = sprat_snapshot::restore(&disk.at, &restore, &mut |_| {}, &Cancel::new()).unwrap();
    assert!(report.damaged.is_empty(), "{report:?}");
    // If somebody has changed the link since, nothing is damaged.
    fs::remove_file(bench.source().join("link")).unwrap();
    std::os::unix::fs::symlink(&wrong, bench.source().join("link")).unwrap();
    let report = check(CheckWhat::AgainstSource(job_name()));
    assert_eq!((report.damaged.count, report.changed.count), (0, 1));
}
