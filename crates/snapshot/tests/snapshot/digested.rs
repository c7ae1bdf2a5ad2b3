//! The digests in the lists of changes: who writes them, and which damage they find.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use sprat_snapshot::{
    Cancel, CheckReport, CheckWhat, DrillSpec, RestoreSpec, SnapshotError, SnapshotReport,
    unescape_name,
};
use sprat_testkit::tree::set_mode;

use crate::changes::{lines, list_of};
use crate::checked::{self, rewrite};
use crate::folder::{Bench, below, job_name};

/// A backup that takes all of the volume for cached; `false`: nothing.
fn take(bench: &Bench, is_cached: bool) -> SnapshotReport {
    let mut spec = bench.spec();
    spec.change_lists = Some(bench.path("lists/home"));
    if is_cached {
        spec.page_cache.ask(|_, _| Ok(true));
    }
    bench.try_take(&spec).unwrap()
}

/// A check of a machine that has made none before, and has the lists in this folder.
fn first_check(bench: &Bench, lists: &str) -> CheckReport {
    let _ = fs::remove_file(bench.path("all.sums"));
    check(bench, lists)
}

fn check(bench: &Bench, lists: &str) -> CheckReport {
    let mut spec = checked::spec(bench, CheckWhat::Everything);
    spec.change_lists = Some(bench.path(lists));
    let report = sprat_snapshot::check(&bench.volume(), &spec, &mut |_| {}, &Cancel::new());
    let report = report.unwrap();
    assert_eq!(report.not_saved, [""; 0]);
    report
}

fn sha256sum(path: &Path) -> String {
    let file = fs::File::open(path).unwrap();
    let ran = Command::new("sha256sum").stdin(file).output().unwrap();
    let text = String::from_utf8(ran.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// How many lines have a digest of a file, and how many name a file without its digest.
fn digests(list: &[Value]) -> (usize, usize) {
    let files = list.iter().filter(|line| line.get("file").is_some());
    let (known, lacking): (Vec<&Value>, Vec<&Value>) =
        files.partition(|line| line["sha256"].is_string());
    (known.len(), lacking.len())
}

#[test]
fn new_content_has_the_digest_that_sha256sum_prints() {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir(source.join("folder")).unwrap();
    for name in [
        &b"n\xffame \\#101\n"[..],
        b"folder/plain",
        b"empty",
        b"mode",
    ] {
        let content = if name == b"empty" { &b""[..] } else { name };
        fs::write(source.join(OsStr::from_bytes(name)), content).unwrap();
    }
    fs::hard_link(source.join("folder/plain"), source.join("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", source.join("symbolic")).unwrap();
    let first = take(&bench, true);
    set_mode(&source.join("mode"), 0o600).unwrap();
    let second = take(&bench, true);
    let mut files = 0;
    for name in [first.name, second.name] {
        for line in lines(&list_of(&bench.job(), name)) {
            let Some(path) = line["path"].as_str() else {
                continue;
            };
            let path = OsStr::from_bytes(&unescape_name(path)[1..]).to_owned();
            let kept = bench.job().join(name.to_string()).join(path);
            let is_file = kept.symlink_metadata().unwrap().is_file();
            assert_eq!(line.get("file").is_some(), is_file, "{line}");
            if is_file {
                assert_eq!(line["sha256"], sha256sum(&kept), "{line}");
                files += 1;
            }
        }
    }
    // The file with another mode is another one in the volume.
    assert_eq!(files, 5 + 1);
    let third = take(&bench, true);
    assert_eq!(digests(&lines(&list_of(&bench.job(), third.name))), (0, 0));
}

#[test]
fn first_check_finds_content_that_is_not_what_was_backed_up() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "content").unwrap();
    fs::write(bench.source().join("other"), "other").unwrap();
    let names = [take(&bench, true).name, take(&bench, true).name];
    let healthy = first_check(&bench, "lists");
    assert!(!healthy.is_damaged());
    assert_eq!(healthy.files_listed, 2, "{healthy:?}");
    rewrite(&bench.in_snapshot(names[0]).join("file"), b"damaged");
    // The copies of this machine, and those in the volume.
    for lists in ["lists", "elsewhere", "elsewhere"] {
        let report = first_check(&bench, lists);
        assert_eq!(report.damaged.count, 1, "{report:?}");
        let why = "/file: differs from the checksum that its backup saved";
        assert!(report.damaged.names[0].ends_with(why), "{report:?}");
        let affected = names.map(|name| bench.in_snapshot(name).join("file"));
        let affected = affected.map(|path| path.strip_prefix(bench.volume()).unwrap().to_owned());
        let found = report.affected.names.iter().map(std::path::PathBuf::from);
        assert_eq!(found.collect::<Vec<_>>(), affected);
        // Damaged content never becomes what later checks compare with.
        assert_eq!(check(&bench, lists).damaged.count, 1);
    }
    rewrite(&bench.in_snapshot(names[0]).join("file"), b"content");
    assert!(!check(&bench, "lists").is_damaged());
}

#[test]
fn torn_list_is_no_damage_and_proves_nothing() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "content").unwrap();
    let name = take(&bench, true).name;
    let copy = bench.path(&format!("lists/home/{name}.changes.zst"));
    let whole = fs::read(&copy).unwrap();
    for length in [0, 1, whole.len() / 2, whole.len() - 1] {
        fs::write(&copy, &whole[..length]).unwrap();
        // The list in the volume is whole.
        assert_eq!(first_check(&bench, "lists").files_listed, 1, "{length}");
    }
    let listed = list_of(&bench.job(), name);
    for at in 0..whole.len() {
        let mut garbled = whole.clone();
        garbled[at] ^= 0x10;
        for place in [&copy, &listed] {
            fs::write(place, &garbled).unwrap();
        }
        let report = first_check(&bench, "lists");
        assert!(!report.is_damaged(), "byte {at}: {report:?}");
        let _ = fs::remove_file(bench.path("lists/home/checked.changes.zst"));
    }
}

#[test]
fn check_computes_what_the_backup_could_not_and_the_next_backup_lists_it() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "content").unwrap();
    fs::write(bench.source().join("other"), "other").unwrap();
    let first = take(&bench, false).name;
    assert_eq!(digests(&lines(&list_of(&bench.job(), first))), (0, 2));
    assert_eq!(first_check(&bench, "lists").files_listed, 0);
    let checked = bench.path("lists/home/checked.changes.zst");
    assert_eq!(digests(&lines(&checked)), (2, 0));
    // A second check adds nothing, and has them.
    assert_eq!(first_check(&bench, "lists").files_listed, 2);
    assert_eq!(digests(&lines(&checked)), (2, 0));

    let lost = take(&bench, false).name;
    assert_eq!(digests(&lines(&list_of(&bench.job(), lost))), (2, 0));
    // It never became durable: the next backup lists them once more.
    fs::remove_dir_all(bench.job().join(lost.to_string())).unwrap();
    fs::remove_file(list_of(&bench.job(), lost)).unwrap();
    fs::remove_file(bench.job().join(format!(".sprat/{lost}.json"))).unwrap();
    let second = take(&bench, false).name;
    assert_eq!(digests(&lines(&list_of(&bench.job(), second))), (2, 0));
    let third = take(&bench, false).name;
    assert_eq!(digests(&lines(&list_of(&bench.job(), third))), (0, 0));
    assert!(!checked.exists());
    // Another machine has only the volume.
    rewrite(&bench.in_snapshot(first).join("file"), b"damaged");
    assert_eq!(first_check(&bench, "elsewhere").damaged.count, 1);
}

#[test]
fn drill_compares_with_the_digests() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "content").unwrap();
    let name = take(&bench, true).name;
    let drill = || {
        let scratch = bench.path("scratch");
        fs::create_dir_all(&scratch).unwrap();
        let spec = DrillSpec {
            scratch,
            known: bench.path("none.sums"),
            change_lists: Some(bench.path("lists")),
            suspects: bench.path("suspects.json"),
            jobs_here: Vec::new(),
            files_max: 100,
            bytes_max: 200 << 20,
            duration_max: Duration::from_secs(600),
            seed: 7,
        };
        sprat_snapshot::drill(&bench.volume(), &spec, &mut |_| {}, &Cancel::new()).unwrap()
    };
    let report = drill();
    assert_eq!((report.compared_with_checksum, report.not_compared), (1, 0));
    assert!(!report.is_damaged());
    rewrite(&bench.in_snapshot(name).join("file"), b"damaged");
    let report = drill();
    let why = "/file: differs from the checksum that its backup saved";
    assert!(report.damaged.names[0].ends_with(why), "{report:?}");
}

#[test]
fn restore_writes_no_content_that_was_never_backed_up_over_a_file_that_looks_equal() {
    let bench = Bench::new();
    let (file, other) = (bench.source().join("file"), bench.source().join("other"));
    fs::write(&file, "content").unwrap();
    fs::write(&other, "other").unwrap();
    let name = take(&bench, true).name;
    rewrite(&bench.in_snapshot(name).join("file"), b"damaged");
    rewrite(&other, b"wrong");
    let mut spec = RestoreSpec::new(job_name(), Path::new("/").to_owned());
    spec.verify = true;
    // The copies of this machine, and those in the volume.
    for lists in [Some(bench.path("lists")), None] {
        spec.change_lists = lists;
        let report = bench.restore(&spec).unwrap();
        assert_eq!((report.damaged.count, report.damaged_kept.count), (0, 1));
        assert!(report.damaged_kept.names[0].ends_with("/source/file"));
        assert_eq!(fs::read(&file).unwrap(), b"content");
        assert_eq!(fs::read(&other).unwrap(), b"other");
    }
    // Nothing is known of the content without a list.
    for list in [
        bench.path(&format!("lists/home/{name}.changes.zst")),
        list_of(&bench.job(), name),
    ] {
        fs::remove_file(list).unwrap();
    }
    let report = bench.restore(&spec).unwrap();
    assert!(report.damaged_kept.is_empty());
    assert_eq!(fs::read(&file).unwrap(), b"damaged");
}

#[test]
fn verification_finds_content_that_was_never_backed_up() {
    let bench = Bench::new();
    for name in ["file", "other", "third"] {
        fs::write(bench.source().join(name), "content").unwrap();
    }
    let name = take(&bench, true).name;
    rewrite(&bench.in_snapshot(name).join("file"), b"damaged");
    let mut spec = RestoreSpec::new(job_name(), bench.path("to"));
    spec.change_lists = Some(bench.path("lists"));
    spec.verify = true;
    let report = bench.restore(&spec).unwrap();
    assert_eq!((report.verified, report.damaged.count), (Some(3), 1));
    assert!(report.damaged.names[0].ends_with("/source/file"));
    assert!(report.damaged_kept.is_empty());
    // It is named beside what differs.
    rewrite(&below(&spec.to, &bench.source()).join("other"), b"another");
    spec.trust_times = true;
    let error = bench.restore(&spec).unwrap_err();
    let SnapshotError::RestoreDiffers {
        different, damaged, ..
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!((different.count, damaged.count), (1, 1));
}

/// The disk was repaired, and no check has seen that yet.
#[test]
fn restore_writes_what_is_right_again() {
    let bench = Bench::new();
    let file = bench.source().join("file");
    fs::write(&file, "content").unwrap();
    let kept = bench.in_snapshot(take(&bench, true).name).join("file");
    rewrite(&kept, b"damaged");
    assert_eq!(checked::read_all(&bench).damaged.count, 1);
    rewrite(&kept, b"content");
    rewrite(&file, b"bit rot");
    let mut spec = RestoreSpec::new(job_name(), Path::new("/").to_owned());
    spec.suspects = Some(bench.path("suspects.json"));
    let report = bench.restore(&spec).unwrap();
    assert!(report.damaged.is_empty() && report.damaged_kept.is_empty());
    assert_eq!(fs::read(&file).unwrap(), b"content");
}
