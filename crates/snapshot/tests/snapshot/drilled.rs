//! Drills: which files the sample has, what they are compared with, and which damage they find.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::checked::{read_all, rewrite};
use crate::folder::{Bench, job_name};
use sprat_snapshot::{Cancel, DrillReport, DrillSpec, SnapshotError};
use sprat_testkit::requires;
use sprat_testkit::tmpfs::SmallDisk;

const HOUR: Duration = Duration::from_secs(3600);

fn spec(bench: &Bench) -> DrillSpec {
    let scratch = bench.path("scratch");
    fs::create_dir_all(&scratch).unwrap();
    DrillSpec {
        change_lists: None,
        scratch,
        known: bench.path("all.sums"),
        suspects: bench.path("suspects.json"),
        jobs_here: vec![job_name()],
        files_max: 100,
        bytes_max: 200 << 20,
        duration_max: Duration::from_secs(600),
        seed: 7,
    }
}

fn try_drill(
    bench: &Bench,
    spec: &DrillSpec,
    cancel: &Cancel,
) -> Result<DrillReport, SnapshotError> {
    let report = sprat_snapshot::drill(&bench.volume(), spec, &mut |_| {}, cancel);
    if report.is_ok() {
        assert_eq!(fs::read_dir(&spec.scratch).unwrap().count(), 0);
    }
    report
}

fn drill(bench: &Bench, spec: &DrillSpec) -> DrillReport {
    try_drill(bench, spec, &Cancel::new()).unwrap()
}

/// A source file that was last changed so many hours ago.
fn write(bench: &Bench, name: &str, content: &[u8], hours_ago: u32) {
    let path = bench.source().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    let at = SystemTime::now() - HOUR * hours_ago;
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(at)
        .unwrap();
}

/// The change times of the source must be older than the snapshot's name, which is a whole second.
fn take(bench: &Bench) -> String {
    std::thread::sleep(Duration::from_millis(1100));
    bench.take().name.to_string()
}

fn in_volume(bench: &Bench, snapshot: &str, name: &str) -> std::path::PathBuf {
    bench.in_snapshot(snapshot).join(name)
}

#[test]
fn sample_has_the_biggest_oldest_and_newest_files_and_some_of_an_older_snapshot() {
    let bench = Bench::new();
    write(&bench, "gone", b"only in the older one", 50);
    for number in 0..40 {
        write(
            &bench,
            &format!("usual/{number}"),
            &[b'u'; 100],
            100 + number,
        );
    }
    let older = take(&bench);
    fs::remove_file(bench.source().join("gone")).unwrap();
    for number in 0..40 {
        write(
            &bench,
            &format!("usual/{number}"),
            &[b'n'; 101],
            100 + number,
        );
    }
    write(&bench, "biggest", &[b'b'; 5000], 200);
    write(&bench, "oldest", b"o", 5000);
    write(&bench, "newest", b"n", 1);
    write(&bench, "empty", b"", 6000);
    let newer = take(&bench);
    let mut spec = spec(&bench);
    spec.files_max = 10;
    let mut seen = BTreeSet::new();
    for seed in 0..4 {
        spec.seed = seed;
        // What is restored is found by what a damage of it reports.
        let report = drill(&bench, &spec);
        assert!(!report.is_damaged(), "{report:?}");
        assert!(report.listed_all);
        assert_eq!((report.files, report.left), (10, 0));
        let of = |name: &String| {
            let mut all = report.snapshots.iter();
            all.find(|one| one.snapshot == *name)
                .map_or(0, |one| one.files)
        };
        assert!(of(&older) >= 2 && of(&newer) >= 6, "{report:?}");
        // Those of the older one are not in the source any more.
        assert_eq!(report.compared_with_source, of(&newer));
        assert_eq!(report.not_compared, of(&older));
        seen.insert(format!("{report:?}"));
    }
    for name in ["biggest", "oldest", "newest"] {
        let path = in_volume(&bench, &newer, name);
        let content = fs::read(&path).unwrap();
        rewrite(&path, &vec![b'?'; content.len()]);
        let report = drill(&bench, &spec);
        assert_eq!(report.damaged.count, 1, "{name}: {report:?}");
        assert!(report.damaged.names[0].contains(name), "{report:?}");
        rewrite(&path, &content);
        fs::remove_file(&spec.suspects).unwrap();
    }
}

#[test]
fn wrong_content_differs_from_the_saved_checksum_and_from_the_source() {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        write(&bench, name, name.as_bytes(), 9);
    }
    let snapshot = take(&bench);
    let mut spec = spec(&bench);
    let report = drill(&bench, &spec);
    assert_eq!(
        (report.compared_with_checksum, report.compared_with_source),
        (0, 3)
    );
    read_all(&bench);
    let report = drill(&bench, &spec);
    assert_eq!(
        (report.compared_with_checksum, report.compared_with_source),
        (3, 3)
    );
    assert!(!spec.suspects.exists());

    rewrite(&in_volume(&bench, &snapshot, "b"), b"!");
    let report = drill(&bench, &spec);
    assert_eq!(report.damaged.count, 1);
    assert!(report.damaged.names[0].ends_with("/b: differs from an earlier check"));
    fs::remove_file(&spec.known).unwrap();
    let report = drill(&bench, &spec);
    assert_eq!(report.damaged.count, 1);
    assert!(report.damaged.names[0].ends_with("/b: differs from its unchanged source"));
    // The file is in the next sample, however small that is, and is read from its source by the next backup.
    for seed in 0..3 {
        spec.seed = seed;
        spec.files_max = 1;
        assert!(drill(&bench, &spec).is_damaged(), "{seed}");
    }
    std::thread::sleep(Duration::from_millis(1100));
    let mut backup = bench.spec();
    backup.suspects = Some(spec.suspects);
    let next = bench.try_take(&backup).unwrap().name.to_string();
    assert_eq!(fs::read(in_volume(&bench, &next, "b")).unwrap(), b"b");
}

#[test]
fn source_of_another_machine_or_with_a_change_is_not_compared() {
    let bench = Bench::new();
    write(&bench, "changed", b"before", 9);
    write(&bench, "touched", b"before", 9);
    write(&bench, "gone", b"before", 9);
    let snapshot = take(&bench);
    // The volume has other content, which nobody can know without a checksum and without the source.
    for name in ["changed", "touched", "gone"] {
        rewrite(&in_volume(&bench, &snapshot, name), b"BEFORE");
    }
    let mut elsewhere = spec(&bench);
    elsewhere.jobs_here.clear();
    let report = drill(&bench, &elsewhere);
    assert_eq!((report.files, report.not_compared), (3, 3));
    assert!(!report.is_damaged(), "{report:?}");

    write(&bench, "changed", b"after", 1);
    fs::remove_file(bench.source().join("gone")).unwrap();
    // Its owner or its content was changed, and its time was set again: nothing is known.
    rewrite(&bench.source().join("touched"), b"before");
    let report = drill(&bench, &spec(&bench));
    assert_eq!((report.files, report.not_compared), (3, 2));
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!(report.missed.count, 1);
    assert!(report.missed.names[0].ends_with("/touched"));
}

#[test]
fn large_file_is_read_in_parts_and_compared_with_its_source() {
    let bench = Bench::new();
    let big = bench.source().join("big");
    // Three parts of 8 MiB don't cover it, and its end differs from its beginning.
    File::create(&big).unwrap().set_len(40 << 20).unwrap();
    let write_at = |path: &Path, at: u64, text: &[u8]| {
        use std::os::unix::fs::FileExt;
        let about = fs::metadata(path).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(text, at).unwrap();
        file.set_modified(about.modified().unwrap()).unwrap();
    };
    write_at(&big, (40 << 20) - 5, b"ended");
    write(&bench, "small", b"small", 9);
    let snapshot = take(&bench);
    let mut spec = spec(&bench);
    spec.bytes_max = 30 << 20;
    let report = drill(&bench, &spec);
    assert_eq!((report.files, report.in_parts), (2, 1));
    assert_eq!(report.bytes, (24 << 20) + 5);
    assert_eq!((report.compared_with_source, report.not_compared), (2, 0));
    write_at(
        &in_volume(&bench, &snapshot, "big"),
        (40 << 20) - 5,
        b"ENDED",
    );
    let report = drill(&bench, &spec);
    assert_eq!(report.damaged.count, 1, "{report:?}");
    // No room for even the parts.
    spec.bytes_max = 20 << 20;
    let report = drill(&bench, &spec);
    assert_eq!((report.files, report.in_parts), (1, 0));
}

#[test]
fn drill_stops_at_its_limits_and_at_a_cancel() {
    let bench = Bench::new();
    for number in 0..30 {
        write(&bench, &number.to_string(), &[b'x'; 1000], number + 1);
    }
    fs::set_permissions(bench.source().join("3"), fs::Permissions::from_mode(0o4751)).unwrap();
    take(&bench);
    let mut spec = spec(&bench);
    spec.bytes_max = 10_000;
    let report = drill(&bench, &spec);
    assert_eq!((report.files, report.bytes), (10, 10_000));
    spec.bytes_max = 200 << 20;
    assert_eq!(drill(&bench, &spec).files, 30);
    spec.duration_max = Duration::ZERO;
    let report = drill(&bench, &spec);
    assert!(!report.listed_all);
    let cancel = Cancel::new();
    cancel.cancel();
    assert!(matches!(
        try_drill(&bench, &spec, &cancel),
        Err(SnapshotError::ReadCancelled)
    ));
}

#[test]
fn nothing_to_restore_is_no_damage() {
    let bench = Bench::new();
    assert_eq!(
        drill(&bench, &spec(&bench)),
        DrillReport {
            listed_all: true,
            ..DrillReport::default()
        }
    );
}

/// Its hint is not that of a restore.
#[test]
fn drill_without_room_for_its_sample_is_no_failed_restore() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    write(&bench, "file", &[7; 400 << 10], 2);
    take(&bench);
    let disk = SmallDisk::new("size=200k");
    let mut spec = spec(&bench);
    spec.scratch = disk.path().to_owned();
    let error = try_drill(&bench, &spec, &Cancel::new()).unwrap_err();
    let SnapshotError::System { op, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(op.contains("cache folder"), "{op}");
}
