//! A restore names what a check found damaged, and never puts it in the place of a file that may be right.

use std::fs;
use std::path::{Path, PathBuf};

use sprat_snapshot::{
    Cancel, Existing, ExportSpec, NameList, RestoreReport, RestoreSpec, SnapshotChoice,
    SnapshotError, SnapshotErrorKind,
};

use super::{next_second, read_all, rewrite};
use crate::folder::{Bench, below, job_name};

const FILES: [&str; 3] = ["file", "sub/link", "other"];

/// A job with a file that has two names and is damaged in its only snapshot, as a check knows.
fn damaged() -> Bench {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir(source.join("sub")).unwrap();
    fs::write(source.join("file"), "alpha").unwrap();
    fs::hard_link(source.join("file"), source.join("sub/link")).unwrap();
    fs::write(source.join("other"), "other").unwrap();
    next_second();
    let taken = bench.take();
    assert!(!read_all(&bench).is_damaged());
    rewrite(&bench.in_snapshot(taken.name).join("file"), b"noise");
    assert_eq!(read_all(&bench).damaged.count, 1);
    bench
}

fn spec(bench: &Bench, to: &Path) -> RestoreSpec {
    let mut spec = RestoreSpec::new(job_name(), to.to_owned());
    spec.suspects = Some(bench.path("suspects.json"));
    spec
}

fn contents(tree: &Path) -> [String; 3] {
    FILES.map(|name| fs::read_to_string(tree.join(name)).unwrap())
}

/// The names of the damaged files that were restored, and of those that were not, within the source.
fn named(bench: &Bench, report: &RestoreReport) -> [Vec<PathBuf>; 2] {
    let source = bench.source();
    [&report.damaged, &report.damaged_kept].map(|list: &NameList| {
        assert_eq!(list.count, list.names.len() as u64);
        let names = list.names.iter().map(|name| Path::new("/").join(name));
        let within = names.map(|name| name.strip_prefix(&source).unwrap().to_owned());
        within.collect()
    })
}

#[test]
fn file_of_equal_size_and_time_is_not_replaced_by_known_damage() {
    let bench = damaged();
    let both: Vec<PathBuf> = ["file", "sub/link"].map(PathBuf::from).to_vec();
    let mut in_place = spec(&bench, Path::new("/"));
    in_place.verify = true;
    rewrite(&bench.source().join("other"), b"OTHER");
    let report = bench.restore(&in_place).unwrap();
    assert_eq!(named(&bench, &report), [Vec::new(), both]);
    assert_eq!(contents(&bench.source()), ["alpha", "alpha", "other"]);
    // One of its names alone, by a symbolic link to its folder.
    in_place.path = Some(bench.source().join("sub/link"));
    in_place.to = bench.path("link to it");
    std::os::unix::fs::symlink(bench.source().join("sub"), &in_place.to).unwrap();
    let report = bench.restore(&in_place).unwrap();
    assert_eq!(report.damaged_kept.names, ["link"]);
    assert_eq!(contents(&bench.source()), ["alpha", "alpha", "other"]);
}

#[test]
fn known_damage_that_is_restored_is_named() {
    let bench = damaged();
    let both: Vec<PathBuf> = ["file", "sub/link"].map(PathBuf::from).to_vec();
    let to = bench.path("to");
    let report = bench.restore(&spec(&bench, &to)).unwrap();
    assert_eq!(named(&bench, &report), [both.clone(), Vec::new()]);
    let tree = below(&to, &bench.source());
    assert_eq!(contents(&tree), ["noise", "noise", "other"]);
    // So it is the next time, and what stays as it is was not restored.
    fs::remove_file(tree.join("file")).unwrap();
    fs::write(tree.join("file"), "another").unwrap();
    let report = bench.restore(&spec(&bench, &to)).unwrap();
    assert_eq!(named(&bench, &report), [both, Vec::new()]);
    assert_eq!(contents(&tree), ["noise", "noise", "other"]);
    fs::remove_file(tree.join("file")).unwrap();
    fs::write(tree.join("file"), "another").unwrap();
    let mut keep = spec(&bench, &to);
    keep.existing = Existing::Keep;
    let report = bench.restore(&keep).unwrap();
    assert_eq!(named(&bench, &report), [Vec::<PathBuf>::new(), Vec::new()]);
    assert_eq!(contents(&tree), ["another", "noise", "other"]);
    // Without damage nothing is named.
    fs::remove_file(bench.path("suspects.json")).unwrap();
    let report = bench.restore(&spec(&bench, &to)).unwrap();
    assert_eq!(named(&bench, &report), [Vec::<PathBuf>::new(), Vec::new()]);
}

/// A check has found that the target of `link` in the source's snapshots is not `right` any more.
pub(super) fn damaged_link_is_named(bench: &Bench, volume: &Path, right: &Path, by_zeros: bool) {
    let restore =
        |spec: &RestoreSpec| sprat_snapshot::restore(volume, spec, &mut |_| {}, &Cancel::new());
    // The one in the source is kept.
    let report = restore(&spec(bench, Path::new("/"))).unwrap();
    assert_eq!(
        named(bench, &report),
        [Vec::new(), vec![PathBuf::from("link")]]
    );
    assert_eq!(fs::read_link(bench.source().join("link")).unwrap(), right);

    let to = bench.path("to");
    let whole = spec(bench, &to);
    if by_zeros {
        // rsync doesn't copy a link without a target.
        let error = restore(&whole).unwrap_err();
        assert_eq!(error.kind(), SnapshotErrorKind::Damaged);
        assert!(error.to_string().contains("/link"), "{error}");
        fs::remove_dir_all(to).unwrap();
        return;
    }
    for _ in 0..2 {
        let report = restore(&whole).unwrap();
        assert_eq!(
            named(bench, &report),
            [vec![PathBuf::from("link")], Vec::new()]
        );
    }
    let link = below(&to, &bench.source()).join("link");
    assert_ne!(fs::read_link(link).unwrap(), right);
    fs::remove_dir_all(to).unwrap();

    let to = bench.path("exported");
    fs::create_dir(&to).unwrap();
    let export = ExportSpec {
        snapshots: vec![(job_name(), SnapshotChoice::default())],
        older: Vec::new(),
        to: to.clone(),
        rsync: PathBuf::from("rsync"),
        dry_run: false,
        compare_all: true,
        suspects: Some(bench.path("suspects.json")),
    };
    let report = sprat_snapshot::export(volume, &export, &mut |_| {}, &Cancel::new()).unwrap();
    let link = bench.source().join("link").display().to_string();
    assert_eq!(report.snapshots[0].damaged.names, [link]);
    fs::remove_dir_all(to).unwrap();
}

/// The names of what is damaged are in the error, too.
#[test]
fn verification_that_fails_names_known_damage() {
    let bench = damaged();
    let to = bench.path("to");
    bench.restore(&spec(&bench, &to)).unwrap();
    rewrite(&below(&to, &bench.source()).join("other"), b"OTHER");
    let mut verified = spec(&bench, &to);
    (verified.trust_times, verified.verify) = (true, true);
    let error = bench.restore(&verified).unwrap_err();
    let SnapshotError::RestoreDiffers {
        different, damaged, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(error.kind(), SnapshotErrorKind::Damaged);
    assert_eq!(different.count, 1, "{error}");
    assert_eq!(damaged.count, 2, "{error}");
    for name in &damaged.names {
        assert!(error.to_string().contains(name), "{error}");
    }
}
