//! Exports to a folder.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::SignedDuration;
use sprat_snapshot::{
    Cancel, ExportReport, ExportSpec, Phase, SnapshotChoice, SnapshotError, SnapshotErrorKind,
    SnapshotName, export,
};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;
use sprat_testkit::tree::set_xattr;

use crate::checked::{read_all, rewrite};
use crate::folder::{Bench, below, inode, job_name, now};
use crate::preserve::make_sticky_folder;

/// Three daily snapshots, in which `same` is one file.
fn three_days() -> (Bench, Vec<SnapshotName>) {
    let bench = Bench::new();
    let write = |name: &str, text: &str| fs::write(bench.source().join(name), text).unwrap();
    write("same", "always the same");
    set_xattr(&bench.source().join("same"), "user.note", b"x").unwrap();
    fs::hard_link(bench.source().join("same"), bench.source().join("link")).unwrap();
    std::os::unix::fs::symlink("same", bench.source().join("symlink")).unwrap();
    fs::create_dir(bench.source().join("folder")).unwrap();
    let mut names = Vec::new();
    for day in [3, 2, 1] {
        write("changed", &"x".repeat(day));
        write(&format!("folder/new {day}"), "new");
        let at = now() - SignedDuration::from_hours(24 * i64::try_from(day).unwrap());
        let spec = bench.spec();
        let taken = sprat_snapshot::take(&bench.volume(), &spec, at, &mut |_| {}, &Cancel::new());
        names.push(taken.unwrap().name);
    }
    fs::create_dir(bench.path("to")).unwrap();
    (bench, names)
}

fn spec(bench: &Bench, names: &[SnapshotName]) -> ExportSpec {
    let choice = |name: &SnapshotName| SnapshotChoice::Named(name.to_string());
    ExportSpec {
        snapshots: names.iter().map(|one| (job_name(), choice(one))).collect(),
        older: Vec::new(),
        to: bench.path("to"),
        rsync: PathBuf::from("rsync"),
        dry_run: false,
        compare_all: false,
        suspects: Some(bench.path("suspects.json")),
    }
}

fn run(bench: &Bench, spec: &ExportSpec) -> Result<ExportReport, SnapshotError> {
    export(&bench.volume(), spec, &mut |_| {}, &Cancel::new())
}

fn exported(bench: &Bench, name: SnapshotName) -> PathBuf {
    bench.path("to/home").join(name.to_string())
}

fn names_at(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn exported_snapshots_are_equal_and_share_their_files() {
    let (bench, names) = three_days();
    let report = run(&bench, &spec(&bench, &[names[2], names[0]])).unwrap();
    let found: Vec<_> = report
        .snapshots
        .iter()
        .map(|one| (one.name, one.was_there))
        .collect();
    assert_eq!(found, [(names[0], false), (names[2], false)]);
    // Another one between them, all that are older than a time, and what is there already.
    let mut older = spec(&bench, &[]);
    older.older = vec![(job_name(), names[2].moment())];
    let report = run(&bench, &older).unwrap();
    let found: Vec<_> = report
        .snapshots
        .iter()
        .map(|one| (one.name, one.was_there))
        .collect();
    assert_eq!(found, [(names[0], true), (names[1], false)]);
    let same = |name| below(&exported(&bench, name), &bench.source()).join("same");
    for name in &names {
        assert_same(
            &bench.job().join(name.to_string()),
            &exported(&bench, *name),
        );
        assert_eq!(inode(&same(*name)), inode(&same(names[0])));
        let record = format!(".sprat/{name}.json");
        let record = |job: PathBuf| fs::read(job.join(&record)).unwrap();
        assert_eq!(record(bench.job()), record(bench.path("to/home")));
    }
    let latest = fs::read_link(bench.path("to/home/latest")).unwrap();
    assert_eq!(latest, Path::new(&names[2].to_string()));
    // What was exported can be restored from.
    let listed = sprat_snapshot::list(&bench.path("to")).unwrap();
    assert_eq!(listed.len(), 3);
    assert_eq!(listed, bench.list());
}

#[test]
fn interrupted_export_has_no_final_name_and_the_next_one_goes_on() {
    let (bench, names) = three_days();
    let all = spec(&bench, &names);
    for _ in 0..2 {
        let cancel = Cancel::new();
        let mut stop = |now: sprat_snapshot::Progress| {
            if now.phase == Phase::Comparing {
                cancel.cancel();
            }
        };
        let stopped = export(&bench.volume(), &all, &mut stop, &cancel);
        assert!(
            matches!(stopped, Err(SnapshotError::RestoreCancelled)),
            "{stopped:?}"
        );
        let left = names_at(&bench.path("to/home"));
        assert!(!left.contains(&names[0].to_string()), "{left:?}");
    }
    assert_eq!(names_at(&bench.path("to/home")), [".sprat"]);
    let kept = format!("{}.exporting", names[0]);
    assert_eq!(names_at(&bench.path("to/home/.sprat")), [kept.as_str()]);
    run(&bench, &all).unwrap();
    assert!(!names_at(&bench.path("to/home/.sprat")).contains(&kept));
    let names_there: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut expected = vec![".sprat".to_owned()];
    expected.extend(names_there);
    expected.push("latest".to_owned());
    assert_eq!(names_at(&bench.path("to/home")), expected);
}

#[test]
fn second_export_to_one_folder_is_refused_and_changes_nothing() {
    let (bench, names) = three_days();
    let one = spec(&bench, &names[..1]);
    let running = fs::File::open(bench.path("to")).unwrap();
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&running, exclusive).unwrap();
    let refused = run(&bench, &one).unwrap_err();
    assert_eq!(refused.kind(), SnapshotErrorKind::Busy, "{refused}");
    assert!(refused.to_string().contains("is running"), "{refused}");
    assert!(!bench.path("to/home").exists());
    drop(running);
    run(&bench, &one).unwrap();
    // One that can't lock the folder, as on NFS, finds the lock of the job.
    let job = fs::File::open(bench.path("to/home/.sprat")).unwrap();
    rustix::fs::flock(&job, exclusive).unwrap();
    let refused = run(&bench, &spec(&bench, &names)).unwrap_err();
    assert_eq!(refused.kind(), SnapshotErrorKind::Busy, "{refused}");
    drop(job);
}

#[test]
fn files_that_a_crash_left_with_other_content_are_copied_again() {
    let (bench, names) = three_days();
    let all = spec(&bench, &names[..1]);
    // As after a power cut: size and time are right, and the content never arrived.
    run(&bench, &all).unwrap();
    let inflight = bench.path("to/home").join(format!("{}.inflight", names[0]));
    fs::rename(exported(&bench, names[0]), &inflight).unwrap();
    tear(&inflight, &bench);
    let report = run(&bench, &all).unwrap();
    assert!(!report.snapshots[0].was_there);
    assert_same(
        &bench.job().join(names[0].to_string()),
        &exported(&bench, names[0]),
    );
    let left = names_at(&bench.path("to/home/.sprat"));
    assert!(!left.iter().any(|name| name.ends_with(".exporting")));
}

/// Makes `same` in the tree of a snapshot what a power cut can leave: size and time are right, the content is not.
fn tear(tree: &Path, bench: &Bench) {
    let torn = below(tree, &bench.source()).join("same");
    let time = fs::metadata(&torn).unwrap().modified().unwrap();
    fs::write(&torn, "\0".repeat("always the same".len())).unwrap();
    let file = fs::File::options().write(true).open(&torn).unwrap();
    file.set_modified(time).unwrap();
}

/// The destination is another container, and a crash ended its own backup, or an export.
#[test]
fn backup_uses_nothing_torn_where_snapshots_were_exported_to() {
    for of_the_export in [false, true] {
        let (bench, names) = three_days();
        run(&bench, &spec(&bench, &names[..1])).unwrap();
        let crashed = match of_the_export {
            true => names[0],
            false => SnapshotName::parse("2020-01-01T00-00-00Z").unwrap(),
        };
        let inflight = bench.path("to/home").join(format!("{crashed}.inflight"));
        fs::rename(exported(&bench, names[0]), &inflight).unwrap();
        fs::remove_dir_all(bench.path("to/home/.sprat")).unwrap();
        fs::remove_file(bench.path("to/home/latest")).unwrap();
        tear(&inflight, &bench);
        if of_the_export {
            // Fails, and keeps what is there.
            let cancel = Cancel::new();
            cancel.cancel();
            let stopped = export(
                &bench.volume(),
                &spec(&bench, &names[..1]),
                &mut |_| {},
                &cancel,
            );
            assert!(stopped.is_err(), "{stopped:?}");
        } else {
            run(&bench, &spec(&bench, &names[1..2])).unwrap();
        }
        let to = bench.path("to");
        let now = now();
        let taken = sprat_snapshot::take(&to, &bench.spec(), now, &mut |_| {}, &Cancel::new());
        let tree = exported(&bench, taken.unwrap().name);
        let same = below(&tree, &bench.source()).join("same");
        assert_eq!(fs::read_to_string(same).unwrap(), "always the same");
    }
}

#[test]
fn other_snapshot_of_the_same_name_and_bad_destinations_are_refused() {
    let (bench, names) = three_days();
    let mut one = spec(&bench, &names[..1]);
    run(&bench, &one).unwrap();
    let file = below(&exported(&bench, names[0]), &bench.source()).join("changed");
    fs::write(&file, "other").unwrap();
    // It has the record of an export that ended well.
    assert!(run(&bench, &one).unwrap().snapshots[0].was_there);
    one.compare_all = true;
    let refused = run(&bench, &one);
    assert!(
        matches!(refused, Err(SnapshotError::RestoreDiffers { .. })),
        "{refused:?}"
    );
    one.compare_all = false;
    fs::remove_file(
        bench
            .path("to/home/.sprat")
            .join(format!("{}.json", names[0])),
    )
    .unwrap();
    let refused = run(&bench, &one);
    assert!(
        matches!(refused, Err(SnapshotError::RestoreDiffers { .. })),
        "{refused:?}"
    );
    fs::write(bench.path("file"), "x").unwrap();
    for to in [bench.path("missing"), bench.path("file"), bench.job()] {
        one.to = to;
        let refused = run(&bench, &one);
        assert!(
            matches!(refused, Err(SnapshotError::DestinationRefused { .. })),
            "{refused:?}"
        );
    }
    assert!(!bench.path("missing").exists());
    // The user's own link, and file.
    fs::remove_dir_all(bench.path("to/home")).unwrap();
    std::os::unix::fs::symlink("../elsewhere", bench.path("to/home")).unwrap();
    fs::create_dir(bench.path("elsewhere")).unwrap();
    one.to = bench.path("to");
    let refused = run(&bench, &one);
    assert!(
        matches!(refused, Err(SnapshotError::DestinationRefused { .. })),
        "{refused:?}"
    );
    assert_eq!(names_at(&bench.path("to")), ["home"]);
}

#[test]
fn sticky_folder_with_an_acl_is_equal_at_the_destination() {
    let bench = Bench::new();
    requires!(make_sticky_folder(&bench.source().join("shared")));
    let taken = bench.take();
    fs::create_dir(bench.path("to")).unwrap();
    run(&bench, &spec(&bench, &[taken.name])).unwrap();
    let exported = below(&exported(&bench, taken.name), &bench.source());
    assert_same(&bench.source(), &exported);
}

#[test]
fn damage_that_a_check_found_is_named() {
    let (bench, names) = three_days();
    assert!(!read_all(&bench).is_damaged());
    let damaged = bench.in_snapshot(names[0]).join("same");
    rewrite(&damaged, b"seldom the same");
    assert_eq!(read_all(&bench).damaged.count, 1);
    let report = run(&bench, &spec(&bench, &names[1..])).unwrap();
    for one in &report.snapshots {
        // It has two names in each snapshot.
        let names = ["link", "same"].map(|name| bench.source().join(name));
        let found: Vec<PathBuf> = one.damaged.names.iter().map(PathBuf::from).collect();
        assert_eq!(found, names);
    }
}
