//! What `work` must not keep or take back from older snapshots, and where it must not write.

use std::os::unix::fs::symlink;

use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::checked::{against_source, rewrite};

/// An rsync that copies everything and reports this line then.
fn rsync_that_reports(volume: &OnBtrfs, line: &str) -> PathBuf {
    let script = format!("rsync \"$@\"; echo '{line}' >&2; exit 23");
    volume.bench.rsync_script(&script, "rsync")
}

/// An old time, which proves that the file is unchanged.
fn set_old(path: &Path) {
    set_time(path, 1_600_000_000, 5).unwrap();
}

fn take_at(
    volume: &OnBtrfs,
    spec: &SnapshotSpec,
    now: Timestamp,
) -> Result<SnapshotReport, SnapshotError> {
    let (root, cancel) = (volume.bench.volume(), Cancel::new());
    sprat_snapshot::take_into_subvolume(&root, spec, now, &ByProgs, &mut |_| {}, &cancel)
}

#[test]
fn separated_link_does_not_keep_content_that_a_check_found_wrong() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let names = ["a", "b", "c"].map(|name| volume.source(name));
    fs::write(&names[0], "content 1").unwrap();
    set_old(&names[0]);
    for other in &names[1..] {
        fs::hard_link(&names[0], other).unwrap();
    }
    volume.take();
    rewrite(&names[0], b"content 2");
    let found = against_source(&volume.bench);
    assert!(found.finished, "{found:?}");
    for other in &names[1..] {
        fs::remove_file(other).unwrap();
        fs::write(other, "content 2").unwrap();
        set_old(other);
    }
    let mut spec = volume.bench.spec();
    spec.suspects = Some(volume.bench.path("suspects.json"));
    let report = volume.try_take(&spec).unwrap();
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(report.name),
    );
}

/// A copy had this name while it took the place of a hard link.
#[test]
fn source_may_have_any_name_beside_hard_links_that_end() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let names = ["!", ".sprat-separated", ".sprat-separated-0", "other"];
    let names = names.map(|name| volume.source(name));
    fs::write(&names[0], "content").unwrap();
    set_old(&names[0]);
    for other in &names[1..] {
        fs::hard_link(&names[0], other).unwrap();
    }
    volume.take();
    for other in &names[1..] {
        fs::remove_file(other).unwrap();
        fs::write(other, "content").unwrap();
        set_old(other);
    }
    let report = volume.try_take(&volume.bench.spec()).unwrap();
    assert!(report.record.complete, "{:?}", report.record);
    let tree = volume.bench.in_snapshot(report.name);
    assert_same(&volume.bench.source(), &tree);
}

#[test]
fn file_that_changed_while_it_was_sent_is_absent_and_its_folder_keeps_its_time() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let folder = volume.source("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("file"), "content").unwrap();
    set_old(&folder);
    volume.take();
    let mut spec = volume.bench.spec();
    // rsync prints this name without the slash at its beginning.
    let name = folder.join("file");
    let name = name.strip_prefix("/").unwrap().display();
    let line = format!("ERROR: {name} failed verification -- update discarded.");
    spec.rsync = rsync_that_reports(&volume, &line);
    let report = volume.try_take(&spec).unwrap();
    assert_eq!(report.record.unread.count, 1);
    let kept = volume.kept(&report, "folder");
    assert!(!kept.join("file").exists());
    assert_eq!(fs::metadata(kept).unwrap().mtime(), 1_600_000_000);
}

#[test]
fn no_file_outside_of_the_volume_is_removed_for_an_unread_name() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let outside = volume.bench.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "content").unwrap();
    symlink(&outside, volume.source("link")).unwrap();
    let mut spec = volume.bench.spec();
    let name = volume.source("link/file");
    let line = format!(
        r#"rsync: [sender] send_files failed to open "{}": Permission denied (13)"#,
        name.display()
    );
    spec.rsync = rsync_that_reports(&volume, &line);
    assert!(!volume.try_take(&spec).unwrap().record.complete);
    assert!(outside.join("file").exists());
}

#[test]
fn nothing_is_taken_back_through_a_symbolic_link() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let (above, outside) = (volume.source("above"), volume.bench.path("outside"));
    let make = || {
        fs::create_dir_all(above.join("inner")).unwrap();
        fs::write(above.join("inner/file"), "content").unwrap();
        set_old(&above.join("inner/file"));
    };
    make();
    volume.take();
    fs::remove_dir_all(&above).unwrap();
    fs::create_dir(&outside).unwrap();
    symlink(&outside, &above).unwrap();
    volume.take();
    fs::remove_file(&above).unwrap();
    make();
    let spec = SnapshotSpec::new(job_name(), vec![above.join("inner")]);
    let report = volume.try_take(&spec).unwrap();
    assert!(report.record.complete);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_same(&above, &volume.kept(&report, "above"));
}

/// A file whose time does not show whether it changed after it was read: the list of the first run counts
/// until some run has compared it.
#[test]
fn file_that_changed_within_its_time_step_is_compared_after_two_interrupted_runs() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("file"), "content 1").unwrap();
    let mut spec = volume.bench.spec();
    let hours = |hours| now() + SignedDuration::from_hours(hours);
    let scripts = ["rsync \"$@\" >/dev/null; exit 12", "exit 12"];
    for (hour, script) in (0..).zip(scripts) {
        spec.rsync = volume.bench.rsync_script(script, "rsync");
        take_at(&volume, &spec, hours(hour)).unwrap_err();
    }
    rewrite(&volume.source("file"), b"content 2");
    let report = take_at(&volume, &volume.bench.spec(), hours(2)).unwrap();
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(report.name),
    );
    let state = fs::read_dir(volume.bench.job().join(".sprat")).unwrap();
    let lists = state.flatten().filter(|one| {
        one.path()
            .extension()
            .is_some_and(|ending| ending == "recent")
    });
    assert_eq!(lists.count(), 0, "they are of runs that have no snapshot");
}

#[test]
fn file_that_changed_within_its_time_step_is_compared_after_it_was_taken_back() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let sources = ["a", "b"].map(|name| volume.source(name));
    for source in &sources {
        fs::create_dir(source).unwrap();
        fs::write(source.join("file"), "content 1").unwrap();
    }
    let take = |sources: &[PathBuf]| {
        let spec = SnapshotSpec::new(job_name(), sources.to_vec());
        volume.try_take(&spec).unwrap()
    };
    take(&sources);
    take(&sources[1..]);
    rewrite(&sources[0].join("file"), b"content 2");
    let report = take(&sources);
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(report.name),
    );
}

/// `work` still has the file of the snapshot that was removed.
#[test]
fn file_that_changed_within_its_time_step_is_compared_after_its_snapshot_is_removed() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("old"), "content").unwrap();
    volume.take();
    fs::write(volume.source("file"), "content 1").unwrap();
    let second = volume.take();
    let before = fs::metadata(volume.source("file")).unwrap();
    fs::write(volume.source("file"), "content 2").unwrap();
    set_time(&volume.source("file"), before.mtime(), before.mtime_nsec()).unwrap();
    volume.remove(second.name);
    let third = volume.take();
    assert_eq!(
        fs::read_to_string(volume.kept(&third, "file")).unwrap(),
        "content 2"
    );
    let state = fs::read_dir(volume.bench.job().join(".sprat")).unwrap();
    let is_of_removed = |name: &str| name.starts_with(&second.name.to_string());
    let left = state.flatten().map(|one| one.file_name());
    assert!(
        !left
            .into_iter()
            .any(|name| is_of_removed(name.to_str().unwrap()))
    );
}

#[test]
fn subvolume_inside_of_work_is_refused() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::create_dir(volume.source("folder")).unwrap();
    fs::write(volume.source("folder/file"), "content").unwrap();
    volume.take();
    let inside = below(&volume.work(), &volume.source("folder"));
    fs::remove_dir_all(&inside).unwrap();
    ByProgs.make(&inside).unwrap();
    fs::copy(volume.source("folder/file"), inside.join("file")).unwrap();
    let refused = volume.try_take(&volume.bench.spec()).unwrap_err();
    assert!(
        matches!(&refused, SnapshotError::Layout { object, .. } if object.ends_with("/folder")),
        "{refused}"
    );
    ByProgs.delete(&inside).unwrap();
    let report = volume.take();
    assert!(volume.kept(&report, "folder/file").exists());
}

#[test]
fn folder_that_becomes_a_hard_link_is_replaced() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::write(volume.source("file"), "content").unwrap();
    fs::create_dir(volume.source("folder")).unwrap();
    fs::write(volume.source("folder/in"), "content").unwrap();
    volume.take();
    fs::remove_dir_all(volume.source("folder")).unwrap();
    fs::hard_link(volume.source("file"), volume.source("folder")).unwrap();
    let second = volume.take();
    assert!(second.record.complete, "{:?}", second.record);
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(second.name),
    );
}
