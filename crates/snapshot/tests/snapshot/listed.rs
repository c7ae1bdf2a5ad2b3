//! Lists, names and `latest`, and restores beyond the plain case.

use std::fs;
use std::os::unix::fs::symlink;

use crate::folder::{Bench, SmallExt4, job_name, loop_missing, now};
use sprat_snapshot::{
    Cancel, EntryKind, RestoreSpec, SnapshotChoice, SnapshotError, SnapshotErrorKind, SnapshotName,
    Warning,
};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;
use sprat_testkit::tree::{PlainTree, make_odd_tree};

#[test]
fn two_runs_in_one_second_get_two_names_and_latest_is_the_last() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let at = now();
    let take = |at| {
        sprat_snapshot::take(
            &bench.volume(),
            &bench.spec(),
            at,
            &mut |_| {},
            &Cancel::new(),
        )
        .unwrap()
    };
    let (one, two) = (take(at), take(at));
    assert_eq!(one.name, SnapshotName::at(at));
    assert!(two.name > one.name);
    let target = fs::read_link(bench.job().join("latest")).unwrap();
    assert_eq!(target.to_str(), Some(two.name.to_string().as_str()));
    let list = bench.list();
    assert_eq!(
        list.iter().map(|e| e.is_latest).collect::<Vec<_>>(),
        [false, true]
    );
    let behind = Warning::ClockBehind { newest: two.name };
    let hour = std::time::Duration::from_secs(3600);
    let three = take(at.checked_sub(hour).unwrap());
    assert!(three.name > two.name);
    assert_eq!(three.record.warnings, [behind]);
}

#[test]
fn foreign_folders_are_listed_and_never_changed() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let theirs = bench.job().join("home.2020-01-01");
    fs::create_dir_all(&theirs).unwrap();
    make_odd_tree(&theirs).unwrap();
    let copy = bench.path("copy");
    crate::folder::run(
        "cp",
        &["-a", theirs.to_str().unwrap(), copy.to_str().unwrap()],
    );
    fs::create_dir(bench.job().join("x.partial")).unwrap();
    fs::create_dir_all(bench.volume().join("somebody's/tree")).unwrap();
    fs::create_dir_all(bench.job().join("latest/folder")).unwrap();
    let report = bench.take();
    bench.take();
    assert_same(&copy, &theirs);
    assert!(bench.job().join("x.partial").exists());
    assert!(report.record.warnings.contains(&Warning::LatestLeftAlone));
    let foreign: Vec<_> = bench
        .list()
        .into_iter()
        .filter(|e| matches!(e.kind, EntryKind::Foreign | EntryKind::Adopted))
        .map(|e| format!("{}/{}", e.job, e.folder))
        .collect();
    assert_eq!(
        foreign,
        [
            "home/home.2020-01-01",
            "home/latest",
            "home/x.partial",
            "somebody's/tree"
        ]
    );
    // They can be restored by name.
    let mut spec = RestoreSpec::new(job_name(), bench.path("restored"));
    spec.snapshot = SnapshotChoice::parse("home.2020-01-01");
    assert_eq!(bench.restore(&spec).unwrap().kind, EntryKind::Adopted);
    spec.snapshot = SnapshotChoice::Latest;
    assert_eq!(bench.restore(&spec).unwrap().kind, EntryKind::Complete);
}

#[test]
fn a_damaged_record_hides_no_snapshot() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let name = bench.take().name.to_string();
    let record = bench.job().join(format!(".sprat/{name}.json"));
    let good = fs::read_to_string(&record).unwrap();
    let other_name = good.replace(
        &format!("\"name\": \"{name}\""),
        "\"name\": \"2020-01-01T00-00-00Z\"",
    );
    assert_ne!(good, other_name);
    for text in [
        "",
        "{",
        "[1,2]",
        "\0\u{1}",
        &good[..good.len() / 2],
        &other_name,
        "{\"format\": 99}",
    ] {
        fs::write(&record, text).unwrap();
        let list = bench.list();
        assert_eq!(list[0].kind, EntryKind::Unrecorded, "{text}");
        assert!(list[0].record_error.is_some());
    }
    // Known fields of a newer version's record are read.
    fs::write(
        &record,
        good.replacen("\"format\": 1", "\"format\": 2, \"new\": [1]", 1),
    )
    .unwrap();
    assert_eq!(bench.kinds(), [EntryKind::Complete]);
    for replace in [&|| fs::remove_file(&record).unwrap(), &|| {
        fs::create_dir(&record).unwrap();
    }] as [&dyn Fn(); 2]
    {
        replace();
        assert_eq!(bench.kinds(), [EntryKind::Unrecorded]);
        bench
            .restore(&RestoreSpec::new(job_name(), bench.path("restored")))
            .unwrap();
    }
}

#[test]
fn every_result_crosses_a_process_boundary() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    let spec = bench.spec();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(
        serde_json::from_str::<sprat_snapshot::SnapshotSpec>(&text).unwrap(),
        spec
    );
    let report = bench.take();
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(
        serde_json::from_str::<sprat_snapshot::SnapshotReport>(&text).unwrap(),
        report
    );
    let list = bench.list();
    let text = serde_json::to_string(&list).unwrap();
    assert_eq!(
        serde_json::from_str::<Vec<sprat_snapshot::SnapshotEntry>>(&text).unwrap(),
        list
    );
    let error = bench
        .restore(&RestoreSpec::new("none".parse().unwrap(), "/x".into()))
        .unwrap_err();
    assert_eq!(error.kind(), SnapshotErrorKind::NotFound);
}

#[test]
fn a_restore_keeps_other_files_unless_it_deletes() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "snapshot").unwrap();
    bench.take();
    let to = bench.path("to");
    let there = crate::folder::below(&to, &bench.source());
    fs::create_dir_all(&there).unwrap();
    fs::write(there.join("file"), "newer, longer").unwrap();
    fs::write(there.join("beside"), "x").unwrap();
    fs::write(there.parent().unwrap().join("outside"), "x").unwrap();
    let mut spec = RestoreSpec::new(job_name(), to.clone());
    spec.delete = true;
    spec.dry_run = true;
    let dry = bench.restore(&spec).unwrap();
    assert!(
        dry.changes
            .names
            .iter()
            .any(|c| c.starts_with("*deleting") && c.ends_with("beside")),
        "{:?}",
        dry.changes
    );
    assert!(there.join("beside").exists());
    assert_eq!(fs::read(there.join("file")).unwrap(), b"newer, longer");

    spec.delete = false;
    spec.dry_run = false;
    bench.restore(&spec).unwrap();
    assert_eq!(fs::read(there.join("file")).unwrap(), b"snapshot");
    assert!(there.join("beside").exists());

    spec.delete = true;
    bench.restore(&spec).unwrap();
    assert!(!there.join("beside").exists());
    assert!(there.parent().unwrap().join("outside").exists());
}

#[test]
fn delete_is_refused_for_an_incomplete_snapshot() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let mut job = bench.spec();
    job.excludes = vec!["*.cache".into()];
    bench.try_take(&job).unwrap();
    let mut spec = RestoreSpec::new(job_name(), bench.path("to"));
    spec.delete = true;
    let error = bench.restore(&spec).unwrap_err();
    assert!(
        error.to_string().contains("files that the job excluded"),
        "{error}"
    );
    assert!(matches!(error, SnapshotError::DeleteLosesExcluded { .. }));
    spec.dry_run = true;
    bench.restore(&spec).unwrap();
    spec.dry_run = false;
    spec.delete_excluded = true;
    bench.restore(&spec).unwrap();
}

#[test]
fn a_restore_stays_within_snapshot_and_destination() {
    let bench = Bench::new();
    fs::create_dir(bench.source().join("sub")).unwrap();
    fs::write(bench.source().join("sub/file"), "x").unwrap();
    symlink("/etc", bench.source().join("out")).unwrap();
    let name = bench.take().name.to_string();
    let to = bench.path("to");
    let spec = |path: &std::path::Path| {
        let mut spec = RestoreSpec::new(job_name(), to.clone());
        spec.path = Some(path.to_owned());
        spec
    };
    let error = bench
        .restore(&spec(&bench.source().join("out/passwd")))
        .unwrap_err();
    assert!(
        matches!(error, SnapshotError::PathRefused { .. }),
        "{error}"
    );
    for path in ["relative", "/a/../b"] {
        let error = bench.restore(&spec(path.as_ref())).unwrap_err();
        assert!(
            matches!(error, SnapshotError::PathRefused { .. }),
            "{error}"
        );
    }
    let error = bench
        .restore(&spec(&bench.source().join("none")))
        .unwrap_err();
    assert!(matches!(error, SnapshotError::NoSuchPath { .. }), "{error}");
    for snapshot in [
        "none",
        "../home",
        ".sprat",
        "",
        ".",
        "..",
        "a/b",
        "2026-01-01T00-00-00Z",
    ] {
        let mut spec = RestoreSpec::new(job_name(), to.clone());
        spec.snapshot = SnapshotChoice::parse(snapshot);
        let error = bench.restore(&spec).unwrap_err();
        assert!(
            matches!(error, SnapshotError::NoSuchSnapshot { .. }),
            "{snapshot}: {error}"
        );
    }
    for inside in [
        bench.volume(),
        bench.job().join(&name),
        bench.job().join("new/folder"),
    ] {
        let error = bench
            .restore(&RestoreSpec::new(job_name(), inside))
            .unwrap_err();
        assert!(
            error.to_string().contains("in the volume itself"),
            "{error}"
        );
    }
    // rsync would replace a symbolic link where the snapshot has a folder.
    let elsewhere = bench.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::create_dir(&to).unwrap();
    let first = bench
        .source()
        .components()
        .nth(1)
        .unwrap()
        .as_os_str()
        .to_owned();
    symlink(&elsewhere, to.join(first)).unwrap();
    let error = bench
        .restore(&RestoreSpec::new(job_name(), to.clone()))
        .unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[test]
fn a_full_destination_is_reported_and_the_restore_can_be_repeated() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "8M", &["-O", "^has_journal"]);
    let tree = PlainTree {
        files: 20,
        bytes: 16 << 20,
        files_per_folder: 10,
        seed: 8,
    };
    tree.make(&bench.source()).unwrap();
    bench.take();
    let error = bench
        .restore(&RestoreSpec::new(job_name(), disk.at.join("to")))
        .unwrap_err();
    assert!(
        matches!(error, SnapshotError::DestinationFull { .. }),
        "{error}"
    );
    assert_eq!(error.kind(), SnapshotErrorKind::Destination);
}

#[test]
fn without_latest_the_newest_finished_snapshot_is_restored() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "1").unwrap();
    bench.take();
    fs::write(bench.source().join("file"), "2!").unwrap();
    let second = bench.take();
    fs::write(bench.source().join("file"), "3!!").unwrap();
    let third = bench.take();
    bench.make_partial_of(&third);
    fs::remove_file(bench.job().join("latest")).unwrap();
    let to = bench.path("to");
    let report = bench
        .restore(&RestoreSpec::new(job_name(), to.clone()))
        .unwrap();
    assert_eq!(report.snapshot, second.name.to_string());
    assert_eq!(
        fs::read(crate::folder::below(&to, &bench.source()).join("file")).unwrap(),
        b"2!"
    );
    // A partial one is restored only by its name.
    let mut spec = RestoreSpec::new(job_name(), to);
    spec.snapshot = SnapshotChoice::Named(format!("{}.partial", third.name));
    assert_eq!(bench.restore(&spec).unwrap().kind, EntryKind::Partial);
}

/// What is restored if no snapshot is named.
fn newest_restored(bench: &Bench) -> String {
    let spec = RestoreSpec::new(job_name(), bench.path("to"));
    bench.restore(&spec).unwrap().snapshot
}

#[test]
fn a_stale_latest_hides_no_later_snapshot() {
    let bench = Bench::new();
    let mut names = Vec::new();
    for content in ["1", "2!", "3!!"] {
        fs::write(bench.source().join("file"), content).unwrap();
        names.push(bench.take().name);
    }
    let point_to = |at: usize| {
        let latest = bench.job().join("latest");
        fs::remove_file(&latest).unwrap();
        symlink(names[at].to_string(), latest).unwrap();
    };
    // The runs ended between the rename and the link.
    for stale in [1, 0] {
        point_to(stale);
        assert_eq!(newest_restored(&bench), names[2].to_string());
        let latest: Vec<bool> = bench.list().iter().map(|entry| entry.is_latest).collect();
        assert_eq!(latest, [false, false, true]);
    }
    // Its clock ran ahead: it was made before the one that `latest` points to.
    let ahead: jiff::Timestamp = "2039-01-01T00:00:00Z".parse().unwrap();
    let volume = bench.volume();
    let take_at = |now| {
        sprat_snapshot::take(&volume, &bench.spec(), now, &mut |_| {}, &Cancel::new())
            .unwrap()
            .name
    };
    let wrong = take_at(ahead);
    let right = take_at(now());
    assert!(wrong > right);
    assert_eq!(newest_restored(&bench), right.to_string());
}
