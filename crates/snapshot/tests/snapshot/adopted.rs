//! Adopted copies, which the user's own rsync made: listed, restored, and linked from by the first run.

use std::fs;
use std::path::Path;

use crate::folder::{Bench, below, inode, job_name};
use sprat_snapshot::{EntryKind, JobName, RestoreSpec, SnapshotChoice, SnapshotSpec};
use sprat_testkit::compare::assert_same;
use sprat_testkit::tree::make_odd_tree;

/// Two dated copies at the top. The second one is linked to the first.
fn copied_twice(bench: &Bench, name: &str) {
    make_odd_tree(&bench.source()).unwrap();
    fs::write(bench.source().join("file"), "first").unwrap();
    fs::write(bench.source().join("kept"), "kept").unwrap();
    let from = format!("{}/", bench.source().display());
    let copy = |date: &str| {
        bench
            .volume()
            .join(format!("{name}.{date}"))
            .display()
            .to_string()
    };
    let options = ["-aHAXS", "--numeric-ids", "--delete"];
    crate::folder::run(
        "rsync",
        &[&options[..], &[&from, &copy("2026-11-20")]].concat(),
    );
    fs::write(bench.source().join("file"), "changed").unwrap();
    let link = format!("--link-dest={}", copy("2026-11-20"));
    crate::folder::run(
        "rsync",
        &[&options[..], &[&link, &from, &copy("2026-11-21")]].concat(),
    );
}

#[test]
fn adopted_copies_are_listed_and_restored_as_they_are() {
    let bench = Bench::new();
    copied_twice(&bench, "home");
    let listed: Vec<_> = bench
        .list()
        .into_iter()
        .map(|entry| (entry.job, entry.folder, entry.kind))
        .collect();
    let entry = |folder: &str| ("home".to_owned(), folder.to_owned(), EntryKind::Adopted);
    assert_eq!(listed, [entry("home.2026-11-20"), entry("home.2026-11-21")]);
    let restored = |job: &str, snapshot: Option<&str>| {
        let to = bench.path("restored");
        let _ = fs::remove_dir_all(&to);
        let mut spec = RestoreSpec::new(JobName::new(job).unwrap(), to.clone());
        spec.snapshot = snapshot.map(SnapshotChoice::parse).unwrap_or_default();
        let report = bench.restore(&spec).unwrap();
        assert_eq!(report.kind, EntryKind::Adopted);
        let copy = report.snapshot.clone();
        let copied = bench.volume().join(&copy);
        // The destination folder keeps its own time.
        crate::folder::run(
            "touch",
            &["-r", copied.to_str().unwrap(), to.to_str().unwrap()],
        );
        assert_same(&copied, &to);
        copy
    };
    assert_eq!(restored("home", None), "home.2026-11-21");
    assert_eq!(restored("home", Some("home.2026-11-20")), "home.2026-11-20");
    assert_eq!(restored("home.2026-11-20", None), "home.2026-11-20");
    // A user's `latest` link is ignored.
    std::os::unix::fs::symlink("home.2026-11-20", bench.volume().join("home")).unwrap();
    assert_eq!(restored("home", None), "home.2026-11-21");
    let mut spec = RestoreSpec::new(job_name(), bench.path("one"));
    spec.path = Some("/file".into());
    bench.restore(&spec).unwrap();
    assert_eq!(fs::read(bench.path("one/file")).unwrap(), b"changed");
    spec.snapshot = SnapshotChoice::parse("home.2026-11-19");
    assert!(bench.restore(&spec).is_err());
}

#[test]
fn first_run_links_unchanged_files_to_the_newest_adopted_copy() {
    for (copies, job) in [("home", "home"), ("source", "laptop")] {
        let bench = Bench::new();
        copied_twice(&bench, copies);
        let copy = bench.volume().join(format!("{copies}.2026-11-21"));
        let before = bench.path("before");
        crate::folder::run(
            "cp",
            &["-a", copy.to_str().unwrap(), before.to_str().unwrap()],
        );
        fs::write(bench.source().join("file"), "new").unwrap();
        let spec = SnapshotSpec::new(JobName::new(job).unwrap(), vec![bench.source()]);
        let first = bench.try_take(&spec).unwrap();
        let folder = bench.volume().join(job);
        let made = below(&folder.join(first.name.to_string()), &bench.source());
        assert_same(&bench.source(), &made);
        assert_eq!(inode(&made.join("kept")), inode(&copy.join("kept")));
        assert_ne!(inode(&made.join("file")), inode(&copy.join("file")));
        assert_same(&before, &copy);
        let linked = &first.record.linked_from[0];
        assert_eq!(
            (Path::new(&linked.folder), linked.kind),
            (Path::new(copy.file_name().unwrap()), EntryKind::Adopted)
        );
        assert!(!folder.join(".sprat/deleting-links-to-copy").exists());
        // Later runs link to the job's own snapshots.
        let second = bench.try_take(&spec).unwrap();
        assert_eq!(second.record.linked_from.len(), 1);
        assert_eq!(second.record.linked_from[0].kind, EntryKind::Complete);
    }
}

#[test]
fn a_killed_first_run_does_not_stop_the_next() {
    let bench = Bench::new();
    copied_twice(&bench, "home");
    let left = bench.job().join(".sprat/deleting-links-to-copy");
    let parents = below(&left, &bench.source());
    fs::create_dir_all(parents.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("../home.2026-11-20", &parents).unwrap();
    let report = bench.take();
    assert_eq!(report.record.linked_from[0].kind, EntryKind::Adopted);
    assert!(!left.exists());
    assert!(bench.volume().join("home.2026-11-20/file").exists());
}
