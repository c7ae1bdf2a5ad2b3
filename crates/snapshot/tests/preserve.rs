//! Everything is kept: in the snapshot, in the hard-linked next one, and after a restore.

#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

mod folder;

use std::fs;

use folder::{Bench, inode, job_name};
use sprat_snapshot::RestoreSpec;
use sprat_testkit::compare::assert_same;
use sprat_testkit::tree::{PlainTree, make_odd_tree};

#[test]
fn an_odd_tree_is_the_same_in_the_snapshot_and_after_a_restore() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    let report = bench.take();
    assert!(report.record.complete, "{:?}", report.record.messages);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
    assert_same(&bench.source(), &bench.in_snapshot("latest"));

    let to = bench.path("restored");
    let restored = bench
        .restore(&RestoreSpec::new(job_name(), to.clone()))
        .unwrap();
    assert_eq!(restored.snapshot, report.name.to_string());
    assert_same(&bench.source(), &folder::below(&to, &bench.source()));
    // The snapshot is as it was.
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

#[test]
fn a_second_run_links_what_did_not_change_and_copies_what_did() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    let first = bench.take();
    let changed = "contents/4096 bytes";
    fs::write(bench.source().join(changed), "new").unwrap();
    let second = bench.take();
    assert!(second.name > first.name);
    assert_same(&bench.source(), &bench.in_snapshot(second.name));
    assert_eq!(second.record.stats.transferred, 1);
    let (a, b) = (
        bench.in_snapshot(first.name),
        bench.in_snapshot(second.name),
    );
    for same in [
        "names/plain",
        "links/a/one",
        "attributes/acl file",
        "contents/sparse tail",
        "links/dangling",
    ] {
        assert_eq!(inode(&a.join(same)), inode(&b.join(same)), "{same}");
    }
    assert_ne!(inode(&a.join(changed)), inode(&b.join(changed)));
    assert_ne!(fs::read(a.join(changed)).unwrap(), b"new");
    // A third, unchanged one shares everything and copies nothing.
    let third = bench.take();
    assert_eq!(third.record.stats.transferred, 0);
    assert_same(&bench.source(), &bench.in_snapshot(third.name));
}

#[test]
fn hard_links_across_sources_and_nested_and_repeated_sources_are_kept_once() {
    let bench = Bench::new();
    let (one, two) = (bench.source().join("one"), bench.source().join("two"));
    fs::create_dir_all(one.join("inner")).unwrap();
    fs::create_dir(&two).unwrap();
    fs::write(one.join("file"), "x").unwrap();
    fs::hard_link(one.join("file"), two.join("other name")).unwrap();
    fs::write(one.join("inner/deep"), "y").unwrap();
    fs::write(bench.source().join("single"), "a file as a source").unwrap();
    let mut spec = bench.spec();
    spec.sources = vec![
        one.clone(),
        two.join("."),
        one.join("inner"),
        one.clone(),
        bench.source().join("single"),
    ];
    let report = bench.try_take(&spec).unwrap();
    // Everything in the source belongs to one of the sources here.
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

#[test]
fn one_file_or_folder_is_restored_by_its_path() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    bench.take();
    let to = bench.path("restored");
    let mut spec = RestoreSpec::new(job_name(), to.clone());
    for name in [
        "links",
        "contents/sparse tail",
        "links/dangling",
        "names/new\nline",
        "specials",
    ] {
        spec.path = Some(bench.source().join(name));
        bench.restore(&spec).unwrap();
        let base = std::path::Path::new(name).file_name().unwrap();
        assert_same(&bench.source().join(name), &to.join(base));
    }
    let names = fs::read_dir(&to).unwrap().count();
    assert_eq!(names, 5);
}

#[test]
fn many_files_come_through() {
    let bench = Bench::new();
    let tree = PlainTree {
        files: 3000,
        bytes: 20 << 20,
        files_per_folder: 40,
        seed: 7,
    };
    tree.make(&bench.source()).unwrap();
    let mut last = None;
    let report = sprat_snapshot::take(
        &bench.volume(),
        &bench.spec(),
        folder::now(),
        &mut |p| last = Some(p),
        &sprat_snapshot::Cancel::new(),
    )
    .unwrap();
    assert_eq!(report.record.stats.regular_files, 3000);
    assert!(last.is_some());
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}
