//! What is new in the sources is counted before anything is copied.

use std::fs;

use sprat_snapshot::{Census, CensusSpec, SnapshotError, SnapshotSpec, keep_list};

use super::folder::Bench;

fn spec(bench: &Bench, stop_over_bytes: Option<u64>) -> SnapshotSpec {
    let mut spec = bench.spec();
    spec.scan.if_present = vec![".nobackup".to_owned()];
    spec.census = Some(CensusSpec {
        list: bench.path("state/home.files"),
        stop_over_bytes,
    });
    spec
}

/// Takes a snapshot, which becomes durable.
fn take(bench: &Bench) -> Census {
    let report = bench.try_take(&spec(bench, None)).unwrap();
    keep_list(&bench.path("state/home.files")).unwrap();
    report.census.unwrap()
}

fn count(census: &Census) -> [u64; 4] {
    [census.new, census.changed, census.gone, census.bytes]
}

#[test]
fn run_counts_what_is_new_and_copies_nothing_of_too_much() {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir_all(source.join("sub/cache")).unwrap();
    fs::write(source.join("a"), "alpha").unwrap();
    fs::write(source.join("sub/ü\n"), "beta").unwrap();
    fs::write(source.join("sub/cache/.nobackup"), "").unwrap();
    fs::write(source.join("sub/cache/x"), "x".repeat(5000)).unwrap();
    let first = take(&bench);
    assert_eq!((first.files_before, count(&first)), (None, [2, 0, 0, 9]));
    let second = take(&bench);
    assert_eq!((second.files_before, count(&second)), (Some(2), [0; 4]));

    fs::write(source.join("a"), "another").unwrap();
    fs::remove_file(source.join("sub/ü\n")).unwrap();
    fs::write(source.join("sub/new"), "x".repeat(1000)).unwrap();
    fs::write(source.join("sub/cache/y"), "y".repeat(9000)).unwrap();
    let before = bench.kinds().len();
    let refused = bench.try_take(&spec(&bench, Some(1006)));
    let Err(SnapshotError::TooMuchNew { census }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(count(&census), [1, 1, 1, 1007]);
    let new = source.join("sub/new").display().to_string();
    assert_eq!(census.largest[0], (new, 1000));
    let folder = source.join("sub").display().to_string();
    assert_eq!(census.folders, [(folder, 1000)]);
    assert_eq!(bench.kinds().len(), before, "something was copied");

    // A snapshot that may not be durable is none to compare with.
    let report = bench.try_take(&spec(&bench, Some(1007))).unwrap();
    assert_eq!(count(&report.census.unwrap()), [1, 1, 1, 1007]);
    assert_eq!(count(&take(&bench)), [1, 1, 1, 1007]);
    assert_eq!(count(&take(&bench)), [0; 4]);

    // A source that is away is not gone, and is no news when it is back.
    let away = bench.path("away");
    let mut two = spec(&bench, None);
    fs::create_dir(bench.path("other")).unwrap();
    fs::write(bench.path("other/file"), "x").unwrap();
    two.sources.push(bench.path("other"));
    let counted = || {
        let report = bench.try_take(&two).unwrap();
        keep_list(&bench.path("state/home.files")).unwrap();
        count(&report.census.unwrap())
    };
    assert_eq!(counted(), [1, 0, 0, 1]);
    fs::rename(bench.path("other"), &away).unwrap();
    assert_eq!(counted(), [0; 4]);
    fs::rename(&away, bench.path("other")).unwrap();
    assert_eq!(counted(), [0; 4]);
}

#[test]
fn files_of_a_folder_that_cannot_be_read_are_not_gone() {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir(source.join("hidden")).unwrap();
    for name in ["a", "hidden/b", "hidden/c"] {
        fs::write(source.join(name), name).unwrap();
    }
    take(&bench);
    // The walk can't read the folder.
    let hides = format!(
        "for word in \"$@\"; do [ \"$word\" = -nrlD ] && {{ rsync --exclude=/hidden/* --exclude=hidden/* \"$@\"; \
         echo 'rsync: [sender] opendir \"{}\" failed: Permission denied (13)' >&2; exit 23; }}; done",
        source.join("hidden").display()
    );
    let mut spec = spec(&bench, None);
    spec.rsync = bench.rsync_script(&hides, "rsync");
    let report = bench.try_take(&spec).unwrap();
    assert_eq!(count(&report.census.unwrap()), [0; 4]);
}

#[test]
fn first_snapshot_without_a_list_is_never_too_much() {
    let bench = Bench::new();
    fs::write(bench.source().join("a"), "x".repeat(5000)).unwrap();
    bench.try_take(&spec(&bench, Some(1))).unwrap();
}

#[test]
fn count_that_fails_stops_no_backup() {
    let bench = Bench::new();
    fs::write(bench.source().join("a"), "alpha").unwrap();
    let fails = "for word in \"$@\"; do [ \"$word\" = -nrlD ] && exit 12; done";
    let mut spec = spec(&bench, Some(1));
    spec.rsync = bench.rsync_script(fails, "rsync");
    // The rule needs the walk.
    bench.try_take(&spec).unwrap_err();
    spec.scan = sprat_snapshot::ScanRules::default();
    let report = bench.try_take(&spec).unwrap();
    assert_eq!(report.census, None);
}
