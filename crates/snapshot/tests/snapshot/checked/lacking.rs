//! A check against the source reports what the source has and the snapshot lacks.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sprat_snapshot::{Cancel, SnapshotReport, SnapshotSpec};
use sprat_testkit::requires;

use super::{against_source, with_source};
use crate::folder::failing_source::FailingSource;
use crate::folder::{Bench, now};

const YOUNGER: Duration = Duration::from_millis(2100);

/// A snapshot whose run begins so late that everything in the source is certainly older. What is created
/// after [`YOUNGER`] may be younger.
fn take_later(bench: &Bench, spec: &SnapshotSpec) -> SnapshotReport {
    let moment = now() + Duration::from_secs(5);
    sprat_snapshot::take(&bench.volume(), spec, moment, &mut |_| {}, &Cancel::new()).unwrap()
}

fn in_source(bench: &Bench, names: &[&str]) -> Vec<String> {
    let path = |name: &&str| format!("{}/{name}", bench.source().display());
    names.iter().map(path).collect()
}

fn mount_tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "disk"])
        .arg(at)
        .status();
    assert!(mount.unwrap().success());
}

/// Dropping it unmounts it.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn files_the_snapshot_lacks_are_reported_and_the_next_backup_has_them() {
    let bench = with_source();
    let source = bench.source();
    for folder in ["lost", "kept", "left"] {
        fs::create_dir(source.join(folder)).unwrap();
    }
    for file in [
        "lost/file",
        "kept/file",
        "kept/lost\n",
        "left/file",
        "b.skip",
    ] {
        fs::write(source.join(file), "text").unwrap();
    }
    symlink("a", source.join("link")).unwrap();
    symlink("a", source.join("lost-link")).unwrap();
    let elsewhere = bench.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("old"), "text").unwrap();
    let patterns = bench.path("patterns");
    fs::write(&patterns, "/**/left/\n").unwrap();
    let spec = SnapshotSpec {
        excludes: vec!["*.skip".to_owned()],
        exclude_from: vec![patterns],
        ..bench.spec()
    };
    let taken = take_later(&bench, &spec);
    let report = against_source(&bench);
    assert!(report.lacking.is_empty() && report.new_since.is_empty());
    assert_eq!(report.lacking_unknown, None);

    std::thread::sleep(YOUNGER);
    let snapshot = bench.in_snapshot(taken.name);
    fs::remove_dir_all(snapshot.join("lost")).unwrap();
    fs::remove_file(snapshot.join("kept/lost\n")).unwrap();
    fs::remove_file(snapshot.join("lost-link")).unwrap();
    // An ordinary change: only the content is younger.
    fs::write(source.join("kept/lost\n"), "changed").unwrap();
    fs::write(source.join("new"), "new").unwrap();
    fs::write(source.join("new.skip"), "new").unwrap();
    fs::write(source.join("left/new"), "new").unwrap();
    // Only the folder itself is younger than the snapshot, not the files in it: it was moved here.
    fs::rename(&elsewhere, source.join("moved")).unwrap();
    fs::remove_file(source.join("link")).unwrap();
    symlink("b", source.join("link")).unwrap();
    fs::remove_file(source.join("c")).unwrap();
    // An object of another kind at the same place.
    fs::remove_file(source.join("a")).unwrap();
    fs::create_dir(source.join("a")).unwrap();

    let report = against_source(&bench);
    assert!(!report.is_damaged());
    let named = |list: &sprat_snapshot::NameList| {
        assert_eq!(list.count, list.names.len() as u64);
        let mut names = list.names.clone();
        names.sort();
        names
    };
    let lacking = ["kept/lost\\#012", "lost-link", "lost/", "lost/file"];
    assert_eq!(named(&report.lacking), in_source(&bench, &lacking));
    let new = ["a/", "moved/", "moved/old", "new"];
    assert_eq!(named(&report.new_since), in_source(&bench, &new));
    let link = report
        .changed
        .names
        .iter()
        .any(|name| name.ends_with("/link"));
    assert!(link, "{:?}", report.changed);
    assert_eq!(report.gone.count, 1, "{:?}", report.gone);
    assert_eq!(report.lacking_unknown, None);

    let taken = take_later(&bench, &spec);
    let snapshot = bench.in_snapshot(taken.name);
    for name in ["kept/lost\n", "lost-link", "lost/file", "moved/old", "new"] {
        assert!(snapshot.join(name).symlink_metadata().is_ok(), "{name}");
    }
    let report = against_source(&bench);
    assert!(report.lacking.is_empty() && report.new_since.is_empty());
    assert_eq!((report.gone.count, report.changed.count), (0, 0));
}

#[test]
fn disks_the_snapshot_lacks_are_reported_unless_excluded() {
    requires!(sprat_testkit::needs::root());
    let bench = with_source();
    let disk = bench.source().join("disk");
    fs::create_dir(&disk).unwrap();
    take_later(&bench, &bench.spec());
    mount_tmpfs(&disk);
    let mounted = Mounted(&disk);
    fs::write(disk.join("file"), "text").unwrap();
    let report = against_source(&bench);
    assert!(report.lacking.is_empty(), "{:?}", report.lacking);
    let [named] = &report.new_since.names[..] else {
        panic!("{:?}", report.new_since);
    };
    let place = &in_source(&bench, &["disk: tmpfs disk was not there"])[0];
    assert!(named.starts_with(place.as_str()), "{named}");

    // An excluded one is not reported.
    let without = SnapshotSpec {
        excludes: vec![disk.display().to_string()],
        ..bench.spec()
    };
    take_later(&bench, &without);
    let report = against_source(&bench);
    assert_eq!((report.lacking.count, report.new_since.count), (0, 0));

    // With it, a file that the snapshot lacks is reported.
    let taken = take_later(&bench, &bench.spec());
    fs::remove_file(bench.in_snapshot(taken.name).join("disk/file")).unwrap();
    let report = against_source(&bench);
    let lost = in_source(&bench, &["disk/file"]);
    assert_eq!((&report.lacking.names, report.new_since.count), (&lost, 0));

    // A job that stays on one file system never has it.
    let one = SnapshotSpec {
        one_file_system: true,
        ..bench.spec()
    };
    take_later(&bench, &one);
    let report = against_source(&bench);
    assert_eq!((report.lacking.count, report.new_since.count), (0, 0));
    drop(mounted);
}

#[test]
fn a_check_reports_if_it_is_unknown_what_the_snapshot_lacks() {
    requires!(sprat_testkit::needs::root());
    let bench = with_source();
    let folder = bench.source().join("folder");
    fs::create_dir(&folder).unwrap();
    let taken = take_later(&bench, &bench.spec());
    let names = ["readdir-5", "hello"].map(str::to_owned).to_vec();
    let failing = FailingSource::mount(&folder, names);
    // As if that disk had been mounted.
    let record = bench.job().join(format!(".sprat/{}.json", taken.name));
    let text = fs::read_to_string(&record).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["file_systems"] = serde_json::json!([]);
    fs::write(&record, json.to_string()).unwrap();
    let report = against_source(&bench);
    let unlisted = format!("{}/readdir-5: can't be listed", folder.display());
    assert_eq!(report.source_unreadable.names, [unlisted]);
    assert!(
        report
            .lacking
            .names
            .iter()
            .any(|name| name.ends_with("/folder/hello"))
    );
    drop(failing);

    fs::remove_file(&record).unwrap();
    let report = against_source(&bench);
    assert_eq!(report.lacking_unknown.as_deref(), Some("it has no record"));
    assert!(report.finished && report.same == 3, "{report:?}");
}
