//! Files that a job excludes by what is in its sources: tagged caches, marked folders, large files.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sprat_snapshot::{
    RestoreSpec, ScanRules, SnapshotChoice, SnapshotError, SnapshotSpec, Warning,
};

use crate::checked::against_source;
use crate::folder::{Bench, below, job_name};

const TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n# This file marks a cache.\n";

/// Names that rsync, a pattern file or a parser of its output could take for something else.
const HOSTILE: [&[u8]; 14] = [
    b"new\nline",
    b"car\rriage",
    b"star*",
    b"br[a-z]",
    b"what?",
    b"back\\slash",
    b"back\\*both",
    b"  blanks",
    b"# comment",
    b"- minus",
    b"+ plus",
    b"not utf8 \xff\xfe",
    b"esc \\#012",
    b"\x1b[31m",
];

fn write(path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn rules(caches: bool, if_present: &[&str], larger_than: Option<u64>) -> ScanRules {
    ScanRules {
        caches,
        if_present: if_present.iter().map(|name| (*name).to_owned()).collect(),
        larger_than,
    }
}

/// Every path below `root`, sorted.
fn paths(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            found.push(path.strip_prefix(root).unwrap().to_owned());
            if path.is_dir() {
                todo.push(path);
            }
        }
    }
    found.sort();
    found
}

fn scanning(bench: &Bench, scan: ScanRules) -> SnapshotSpec {
    SnapshotSpec {
        scan,
        ..bench.spec()
    }
}

#[test]
fn hostile_names_exclude_themselves_and_nothing_else() {
    let bench = Bench::new();
    let mut kept = Vec::new();
    for name in HOSTILE {
        let name = OsStr::from_bytes(name);
        let at = |folder: &str| bench.source().join(folder).join(name);
        write(at("cache").join("CACHEDIR.TAG"), TAG);
        write(at("cache").join("data"), "x");
        write(at("cache").join("CACHEDIR.TAG.d/CACHEDIR.TAG"), TAG);
        write(at("marked").join(".nobackup"), "");
        write(at("marked").join("deep/data"), "x");
        write(at("large"), [7; 101]);
        write(at("small"), [7; 100]);
        for path in ["cache", "marked", "small"] {
            kept.push(Path::new(path).join(name));
        }
        kept.push(Path::new("cache").join(name).join("CACHEDIR.TAG"));
        kept.push(Path::new("marked").join(name).join(".nobackup"));
    }
    // What one of the names would match as a pattern.
    for name in [
        "starry",
        "brx",
        "whats",
        "new?line",
        "newxline",
        "back*both",
        "backslash",
    ] {
        write(bench.source().join("large").join(name), "small");
        write(bench.source().join("cache").join(name).join("data"), "x");
        kept.push(Path::new("large").join(name));
        kept.push(Path::new("cache").join(name));
        kept.push(Path::new("cache").join(name).join("data"));
    }
    kept.extend(["cache", "large", "marked", "small"].map(PathBuf::from));
    kept.sort();
    let spec = scanning(&bench, rules(true, &[".nobackup"], Some(100)));
    let report = bench.try_take(&spec).unwrap();
    assert_eq!(paths(&bench.in_snapshot(report.name)), kept);
    assert!(report.record.complete);
    assert_eq!(report.record.too_large.count, HOSTILE.len() as u64);
    assert_eq!(report.record.marked.count, 2 * HOSTILE.len() as u64);
    // A check of the names knows the rules, too.
    let checked = against_source(&bench);
    assert_eq!(
        (checked.lacking.names, checked.lacking_unknown),
        (Vec::new(), None)
    );
}

#[test]
fn a_cache_tag_needs_its_signature() {
    let bench = Bench::new();
    for (folder, tag) in [
        ("good", TAG.as_bytes()),
        (
            "no signature",
            b"Signature: 8a477f597d28d172789f06886806bc56".as_slice(),
        ),
        ("short", b"Signature: 8a47"),
        ("empty", b""),
    ] {
        write(bench.source().join(folder).join("CACHEDIR.TAG"), tag);
        write(bench.source().join(folder).join("data"), "x");
    }
    // A folder, a link and a pipe of that name are no tags, and hang no run.
    write(bench.source().join("folder/CACHEDIR.TAG/data"), "x");
    fs::create_dir(bench.source().join("link")).unwrap();
    let tag = bench.source().join("good/CACHEDIR.TAG");
    std::os::unix::fs::symlink(tag, bench.source().join("link/CACHEDIR.TAG")).unwrap();
    write(bench.source().join("link/data"), "x");
    let report = bench
        .try_take(&scanning(&bench, rules(true, &[], None)))
        .unwrap();
    let tree = bench.in_snapshot(report.name);
    assert!(!tree.join("good/data").exists());
    assert!(tree.join("good/CACHEDIR.TAG").exists());
    for kept in [
        "no signature",
        "short",
        "empty",
        "folder/CACHEDIR.TAG",
        "link",
    ] {
        assert!(tree.join(kept).join("data").exists(), "{kept}");
    }
    assert_eq!(report.record.marked.count, 1);
}

#[test]
fn a_file_left_out_for_the_first_time_is_reported_once() {
    let bench = Bench::new();
    let at = |name: &str| bench.source().join(name);
    write(at("grows"), [1; 100]);
    write(at("large"), [1; 200]);
    write(at("stays"), [1; 10]);
    let spec = scanning(&bench, rules(false, &[], Some(100)));
    let new = |report: &sprat_snapshot::SnapshotReport| {
        let warnings = report.record.warnings.iter();
        let found = warnings.filter(|one| matches!(one, Warning::NewTooLarge { .. }));
        (found.count(), report.record.too_large_new.names.len())
    };
    // It is in the first snapshot, because that run has no such rule.
    let first = bench.take();
    assert!(bench.in_snapshot(first.name).join("large").exists());
    let second = bench.try_take(&spec).unwrap();
    assert_eq!(new(&second), (1, 1));
    let third = bench.try_take(&spec).unwrap();
    assert_eq!((new(&third), third.record.too_large.count), ((0, 0), 1));
    write(at("grows"), [1; 101]);
    let fourth = bench.try_take(&spec).unwrap();
    assert_eq!((new(&fourth), fourth.record.too_large.count), ((1, 1), 2));
    assert_eq!(
        paths(&bench.in_snapshot(fourth.name)),
        [PathBuf::from("stays")]
    );
    assert!(bench.in_snapshot(third.name).join("grows").exists());
    // `restore --delete` would delete them at the destination.
    let mut restore = RestoreSpec::new(job_name(), bench.path("out"));
    restore.snapshot = SnapshotChoice::Latest;
    restore.delete = true;
    let refused = bench.restore(&restore).unwrap_err();
    assert!(
        matches!(refused, SnapshotError::DeleteLosesExcluded { .. }),
        "{refused}"
    );
}

#[test]
fn folders_that_patterns_exclude_are_not_scanned() {
    let bench = Bench::new();
    write(bench.source().join("skip/large"), [1; 200]);
    write(bench.source().join("skip/.nobackup"), "");
    write(bench.source().join("own/large"), [1; 200]);
    write(bench.source().join("own/small"), "x");
    let mut spec = scanning(&bench, rules(true, &[".nobackup"], Some(100)));
    // A size limit holds for what a pattern includes, too.
    spec.excludes = vec!["+ large".into(), "skip/".into()];
    let report = bench.try_take(&spec).unwrap();
    let own = below(Path::new("/"), &bench.source()).join("own/large");
    assert_eq!(report.record.too_large.names, [own.to_str().unwrap()]);
    assert!(report.record.marked.is_empty());
    let tree = bench.in_snapshot(report.name);
    assert_eq!(paths(&tree), ["own", "own/small"].map(PathBuf::from));
}

#[test]
fn a_source_that_is_marked_itself_is_refused() {
    let bench = Bench::new();
    write(bench.source().join(".nobackup"), "");
    write(bench.source().join("data"), "x");
    let spec = scanning(&bench, rules(false, &[".nobackup"], None));
    let refused = bench.try_take(&spec).unwrap_err();
    assert!(
        matches!(&refused, SnapshotError::SourceRefused { why, .. } if why.contains("marked itself")),
        "{refused}"
    );
    assert!(bench.kinds().is_empty());
    for name in ["", "..", "a/b"] {
        let spec = scanning(&bench, rules(false, &[name], None));
        let refused = bench.try_take(&spec).unwrap_err();
        assert!(
            matches!(refused, SnapshotError::PatternRefused { .. }),
            "{name:?}: {refused}"
        );
    }
}

#[test]
fn a_preview_names_what_each_rule_excludes_and_writes_nothing() {
    let bench = Bench::new();
    write(bench.source().join("cache/CACHEDIR.TAG"), TAG);
    write(bench.source().join("cache/data"), "x");
    write(bench.source().join("large"), [1; 200]);
    write(bench.source().join("odd\nname.iso"), "x");
    write(bench.source().join("other.iso"), "x");
    write(bench.source().join("sprats/own"), "x");
    for number in 0..25_usize {
        write(bench.source().join(format!("f{number}")), vec![7; number]);
    }
    let mut spec = scanning(&bench, rules(true, &[], Some(100)));
    spec.excludes = vec!["*.iso".into()];
    spec.never_enter = vec![bench.source().join("sprats")];
    let nowhere = bench.path("nowhere");
    fs::create_dir(&nowhere).unwrap();
    let preview = |all| {
        let cancel = sprat_snapshot::Cancel::new();
        sprat_snapshot::preview(&nowhere, &spec, all, &mut |_| {}, &cancel).unwrap()
    };
    let seen = preview(false);
    let tag_bytes = TAG.len() as u64;
    assert_eq!(
        (seen.files, seen.bytes),
        (26, (0..25).sum::<u64>() + tag_bytes)
    );
    assert_eq!((seen.largest.len(), seen.largest[0].1), (20, tag_bytes));
    assert_eq!((seen.largest[1].1, seen.largest[19].1), (24, 6));
    let objects = |rule: &str| {
        let found = seen.excluded.iter().find(|one| one.rule == rule);
        found.map(|one| one.objects)
    };
    assert_eq!(objects("*.iso"), Some(2), "{:?}", seen.excluded);
    assert_eq!(objects("always"), Some(1), "{:?}", seen.excluded);
    assert_eq!(
        objects("exclude_larger_than"),
        Some(1),
        "{:?}",
        seen.excluded
    );
    assert_eq!(objects("exclude_caches, exclude_if_present"), Some(1));
    assert_eq!(seen.excluded.len(), 4, "{:?}", seen.excluded);
    let examples = seen.excluded.iter().flat_map(|one| &one.examples);
    assert!(
        examples
            .into_iter()
            .any(|path| path.ends_with("odd\\#012name.iso"))
    );
    assert_eq!(seen.paths, None);
    let paths = preview(true).paths.unwrap();
    assert!(paths.iter().any(|path| path.ends_with("/source/f24")));
    assert!(paths.iter().all(|path| !path.ends_with(".iso")));
    assert_eq!(fs::read_dir(&nowhere).unwrap().count(), 0);
    assert_eq!(fs::read_dir(bench.volume()).unwrap().count(), 0);
}
