//! Disks inside a source that come, go or are missing. Such a run is never complete.

use std::fs;
use std::path::PathBuf;

use crate::folder::{Bench, run};
use sprat_snapshot::{
    EntryKind, KeepCount, KeepReason, KeepRules, PruneReport, PruneSpec, RestoreSpec,
    SnapshotChoice, SnapshotError, SnapshotName, SnapshotReport, Warning,
};
use sprat_testkit::requires;

/// A file system with a file, mounted at `source/disk`. Dropping it unmounts it.
struct Disk(PathBuf);

impl Disk {
    fn new(bench: &Bench) -> Self {
        let at = bench.source().join("disk");
        fs::create_dir_all(&at).unwrap();
        fs::write(bench.source().join("file"), "x").unwrap();
        mount(&at);
        Self(at)
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-lq")
            .arg(&self.0)
            .status();
    }
}

fn mount(at: &std::path::Path) {
    run("mount", &["-t", "tmpfs", "disk", at.to_str().unwrap()]);
    fs::write(at.join("precious"), "x").unwrap();
}

/// Keeps only the newest snapshot, and those that must always be kept.
fn keep_the_last(bench: &Bench) -> PruneReport {
    let rules = KeepRules {
        last: KeepCount::new(1),
        ..KeepRules::default()
    };
    let spec = PruneSpec::new(crate::folder::job_name(), rules);
    let cancel = sprat_snapshot::Cancel::new();
    sprat_snapshot::prune(&bench.volume(), &spec, &mut |_| {}, &cancel).unwrap()
}

#[test]
fn a_disk_unmounted_during_the_run_makes_the_snapshot_incomplete() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let whole = bench.take();
    assert!(whole.record.complete);
    assert_eq!(whole.record.mounts, [disk.text()]);
    for how in ["umount", "umount -l"] {
        let mut spec = bench.spec();
        spec.rsync = bench.rsync_script(&format!("{how} '{}'", disk.text()), "rsync");
        let report = bench.try_take(&spec).unwrap();
        assert!(!report.record.complete, "{how}");
        assert_eq!(report.record.unread.names, [disk.text()], "{how}");
        let path = disk.text();
        assert!(
            report
                .record
                .warnings
                .contains(&Warning::UnmountedMeanwhile { path }),
            "{how}: {:?}",
            report.record.warnings
        );
        mount(&disk.0);
    }
    assert_eq!(
        bench.kinds(),
        [
            EntryKind::Complete,
            EntryKind::Incomplete,
            EntryKind::Incomplete
        ]
    );
    // Retention keeps the complete one.
    keep_the_last(&bench);
    assert_eq!(bench.kinds(), [EntryKind::Complete, EntryKind::Incomplete]);
}

#[test]
fn a_disk_mounted_during_the_run_is_reported() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    run("umount", &[&disk.text()]);
    let mut spec = bench.spec();
    let line = format!("mount -t tmpfs disk '{}'", disk.text());
    spec.rsync = bench.rsync_script(&line, "rsync");
    let report = bench.try_take(&spec).unwrap();
    assert!(!report.record.complete);
    let path = disk.text();
    assert_eq!(report.record.warnings, [Warning::MountedMeanwhile { path }]);
}

#[test]
fn excluded_mounts_may_come_and_go() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let line = format!("umount '{}'", disk.text());
    let mut spec = bench.spec();
    spec.excludes = vec!["disk/".into()];
    spec.rsync = bench.rsync_script(&line, "rsync");
    let report = bench.try_take(&spec).unwrap();
    assert!(report.record.complete, "{:?}", report.record);
    assert!(report.record.mounts.is_empty());

    mount(&disk.0);
    spec.excludes.clear();
    spec.one_file_system = true;
    let report = bench.try_take(&spec).unwrap();
    assert!(report.record.complete, "{:?}", report.record);
}

#[test]
fn subvolumes_excluded_by_one_file_system_get_a_warning() {
    let programs = ["btrfs", "mkfs.btrfs"];
    requires!(
        crate::folder::loop_missing()
            .or_else(|| programs.into_iter().find_map(sprat_testkit::needs::program))
    );
    let bench = Bench::new();
    let (image, disk) = (bench.path("btrfs"), Disk::new(&bench));
    let (image, at) = (image.to_str().unwrap(), disk.text());
    run("truncate", &["-s", "200M", image]);
    run("mkfs.btrfs", &["-q", image]);
    run("mount", &["-o", "loop", image, &at]);
    fs::create_dir(disk.0.join("folder")).unwrap();
    for name in ["a", "folder/b", "out", "mounted"] {
        run(
            "btrfs",
            &["-q", "subvolume", "create", &format!("{at}/{name}")],
        );
        fs::write(disk.0.join(name).join("file"), "x").unwrap();
    }
    let mounted = format!("{at}/mounted");
    run("mount", &["-o", "loop,subvol=mounted", image, &mounted]);
    let mut spec = bench.spec();
    spec.sources = vec![disk.0.clone()];
    spec.excludes = vec!["/out".into(), format!("{at}/out")];
    let all = bench.try_take(&spec);
    spec.one_file_system = true;
    let one = bench.try_take(&spec);
    spec.sources
        .extend([disk.0.join("a"), disk.0.join("folder/b")]);
    let named = bench.try_take(&spec);
    run("umount", &[&mounted]);
    run("umount", &[&at]);
    assert_eq!(all.unwrap().record.warnings, []);
    let record = one.unwrap().record;
    assert!(record.complete);
    let left_out = Warning::SubvolumesLeftOut {
        path: format!("{at}/a"),
        subvolumes: 2,
    };
    assert_eq!(record.warnings, [left_out]);
    assert_eq!(named.unwrap().record.warnings, []);
}

#[test]
fn a_missing_disk_of_the_last_complete_snapshot_gets_a_warning() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let before = bench.take().name;
    run("umount", &[&disk.text()]);
    let report = bench.take();
    assert!(report.record.complete);
    assert_eq!(report.record.warnings.len(), 1);
    assert_eq!(warnings_of(&report), not_mounted(&disk, before));
}

/// An ext4 on a loop device. Its identity outlives its mount.
struct Image(PathBuf);

impl Image {
    fn new(bench: &Bench, name: &str) -> Self {
        let image = bench.path(name);
        run("truncate", &["-s", "8M", image.to_str().unwrap()]);
        run("mkfs.ext4", &["-q", "-F", "-m0", image.to_str().unwrap()]);
        Self(image)
    }

    fn mount(&self, at: &std::path::Path) {
        let (image, at) = (self.0.to_str().unwrap(), at.to_str().unwrap());
        run("mount", &["-o", "loop", image, at]);
    }
}

fn umount(at: &std::path::Path) {
    run("umount", &[at.to_str().unwrap()]);
}

fn missing_at(path: &std::path::Path, before: SnapshotName) -> Vec<Warning> {
    vec![Warning::NotMounted {
        path: path.display().to_string(),
        before,
        disk: String::new(),
    }]
}

#[test]
fn a_source_with_a_missing_disk_is_reported_and_its_snapshot_kept() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let source = bench.source();
    mount(&source);
    let _disk = Disk(source.clone());
    let before = bench.take().name;
    umount(&source);
    fs::write(source.join("stray"), "x").unwrap();
    let report = bench.take();
    assert_eq!(warnings_of(&report), missing_at(&source, before));
    keep_the_last(&bench);
    assert!(bench.in_snapshot(before).join("precious").exists());
    let mut spec = bench.spec();
    spec.disks_gone = vec![source];
    assert!(warnings_of(&bench.try_take(&spec).unwrap()).is_empty());
    assert!(warnings_of(&bench.take()).is_empty());
    keep_the_last(&bench);
    assert_eq!(bench.kinds().len(), 1);
}

#[test]
fn folder_that_is_gone_is_a_missing_source_and_no_missing_disk() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let disk = bench.path("disk");
    let folders = [bench.path("plain"), disk.join("folder")];
    fs::create_dir(&disk).unwrap();
    run("mount", &["-t", "tmpfs", "disk", disk.to_str().unwrap()]);
    let _unmount = Disk(disk.clone());
    for folder in &folders {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("precious"), "x").unwrap();
    }
    let mut spec = bench.spec();
    spec.sources = [vec![bench.source()], folders.to_vec()].concat();
    let before = bench.try_take(&spec).unwrap().name;
    for folder in &folders {
        fs::remove_dir_all(folder).unwrap();
    }
    let report = bench.try_take(&spec).unwrap();
    assert!(!report.record.complete);
    assert_eq!(warnings_of(&report), []);
    // Retention keeps both folders all the same.
    keep_the_last(&bench);
    for folder in &folders {
        let kept = bench.job().join(before.to_string());
        assert!(kept.join(folder.strip_prefix("/").unwrap()).exists());
    }
    // The disk on which one of them was goes, too.
    umount(&disk);
    let report = bench.try_take(&spec).unwrap();
    assert_eq!(warnings_of(&report), missing_at(&folders[1], before));
}

#[test]
fn a_disk_that_is_a_source_stays_kept_while_its_mount_point_is_empty() {
    requires!(crate::folder::loop_missing());
    let bench = Bench::new();
    let disk = Image::new(&bench, "disk");
    let at = bench.path("stick");
    fs::create_dir(&at).unwrap();
    disk.mount(&at);
    let _unmount = Disk(at.clone());
    fs::write(at.join("precious"), "x").unwrap();
    fs::write(bench.source().join("file"), "x").unwrap();
    let mut spec = bench.spec();
    // One source is always missing, so no snapshot is complete.
    spec.sources = vec![bench.source(), at.clone(), bench.path("never")];
    let before = bench.try_take(&spec).unwrap().name;
    umount(&at);
    for _ in 0..2 {
        let report = bench.try_take(&spec).unwrap();
        assert_eq!(warnings_of(&report), missing_at(&at, before));
        keep_the_last(&bench);
    }
    let precious = at.strip_prefix("/").unwrap().join("precious");
    assert!(bench.job().join(before.to_string()).join(precious).exists());
}

#[test]
fn a_disk_on_a_disk_is_not_forgotten_with_the_other() {
    requires!(crate::folder::loop_missing());
    let bench = Bench::new();
    let (outer, inner) = (Image::new(&bench, "outer"), Image::new(&bench, "inner"));
    let at = bench.source().join("disk");
    fs::create_dir(&at).unwrap();
    fs::write(bench.source().join("file"), "x").unwrap();
    outer.mount(&at);
    let _unmount = [Disk(at.clone()), Disk(at.clone())];
    let below = at.join("below");
    fs::create_dir(&below).unwrap();
    inner.mount(&below);
    fs::write(below.join("precious"), "x").unwrap();
    let before = bench.take().name;
    umount(&below);
    umount(&at);
    // Sticks are unmounted and their mount points removed.
    fs::remove_dir(&at).unwrap();
    let expected = [missing_at(&at, before), missing_at(&below, before)].concat();
    for _ in 0..2 {
        assert_eq!(warnings_of(&bench.take()), expected);
        keep_the_last(&bench);
    }
    assert!(
        bench
            .in_snapshot(before)
            .join("disk/below/precious")
            .exists()
    );
}

#[test]
fn a_moved_disk_is_not_missing_and_a_replacement_is_reported() {
    requires!(crate::folder::loop_missing());
    let bench = Bench::new();
    let (one, other) = (Image::new(&bench, "one"), Image::new(&bench, "other"));
    let (place, elsewhere) = (bench.source().join("disk"), bench.source().join("disk1"));
    fs::create_dir(&place).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    fs::write(bench.source().join("file"), "x").unwrap();
    let _unmount = [Disk(place.clone()), Disk(elsewhere.clone())];
    one.mount(&place);
    let before = bench.take().name;
    umount(&place);
    other.mount(&place);
    assert!(matches!(
        warnings_of(&bench.take()).as_slice(),
        [Warning::OtherFileSystem { before: kept, disk, .. }] if *kept == before && !disk.is_empty()
    ));
    keep_the_last(&bench);
    assert_eq!(bench.kinds().len(), 2);
    one.mount(&elsewhere);
    let both = bench.take();
    assert!(warnings_of(&both).is_empty());
    keep_the_last(&bench);
    assert_eq!(bench.kinds().len(), 1);
    umount(&elsewhere);
    assert_eq!(
        warnings_of(&bench.take()),
        missing_at(&elsewhere, both.name)
    );
}

#[test]
fn incomplete_runs_and_a_wrong_clock_hide_no_missing_disk() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    umount(&disk.0);
    let ahead = crate::folder::now() + jiff::SignedDuration::from_hours(50_000);
    sprat_snapshot::take(
        &bench.volume(),
        &bench.spec(),
        ahead,
        &mut |_| {},
        &sprat_snapshot::Cancel::new(),
    )
    .unwrap();
    mount(&disk.0);
    // No run is complete.
    let mut spec = bench.spec();
    let message = "rsync: [sender] send_files failed to open \\\"/x\\\": Permission denied (13)";
    spec.rsync = bench.rsync_script(&format!("echo \"{message}\" >&2"), "rsync");
    let before = bench.try_take(&spec).unwrap();
    assert!(!before.record.complete);
    umount(&disk.0);
    let after = bench.try_take(&spec).unwrap();
    assert_eq!(warnings_of(&after), not_mounted(&disk, before.name));
    let pruned = keep_the_last(&bench);
    let kept = pruned
        .snapshots
        .iter()
        .find(|one| one.decision.name == before.name);
    assert_eq!(kept.unwrap().decision.keep, [KeepReason::MissingDisk]);
}

#[test]
fn delete_empties_no_disk_but_that_of_the_snapshot() {
    requires!(crate::folder::loop_missing());
    let bench = Bench::new();
    let (one, other) = (Image::new(&bench, "one"), Image::new(&bench, "other"));
    let place = bench.source().join("disk");
    fs::create_dir(&place).unwrap();
    fs::write(bench.source().join("file"), "x").unwrap();
    let disk = Disk(place.clone());
    one.mount(&place);
    fs::write(place.join("one"), "x").unwrap();
    bench.take();
    umount(&place);
    let refused = |path: Option<PathBuf>| {
        let error = restore_with_delete(&bench, path).unwrap_err();
        assert!(
            matches!(error, SnapshotError::DeleteReachesOtherDisk { .. }),
            "{error}"
        );
        assert!(place.join("precious").exists());
    };
    let paths = || [None, Some(bench.source()), Some(place.clone())];
    // First another disk, then none: then the files in the mount point are those of the disk below it.
    other.mount(&place);
    fs::write(place.join("precious"), "x").unwrap();
    for path in paths() {
        refused(path);
    }
    umount(&place);
    fs::write(place.join("precious"), "x").unwrap();
    for path in paths() {
        refused(path);
    }
    fs::remove_file(place.join("precious")).unwrap();
    one.mount(&place);
    for path in paths() {
        fs::write(place.join("later"), "x").unwrap();
        restore_with_delete(&bench, path).unwrap();
        assert!(place.join("one").exists() && !place.join("later").exists());
    }
    drop(disk);
}

#[test]
fn a_record_without_file_systems_still_protects_its_disks() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let before = bench.take().name;
    let record = bench.job().join(format!(".sprat/{before}.json"));
    let text = fs::read_to_string(&record).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for field in ["file_systems", "disks_gone", "disks_left_out"] {
        assert!(
            json.as_object_mut().unwrap().remove(field).is_some(),
            "{field}"
        );
    }
    fs::write(&record, json.to_string()).unwrap();
    restore_with_delete(&bench, None).unwrap();
    umount(&disk.0);
    assert_eq!(warnings_of(&bench.take()), not_mounted(&disk, before));
    keep_the_last(&bench);
    assert_eq!(bench.kinds().len(), 2);
    mount(&disk.0);
    assert!(warnings_of(&bench.take()).is_empty());
}

fn not_mounted(disk: &Disk, before: SnapshotName) -> Vec<Warning> {
    missing_at(&disk.0, before)
}

/// The warnings about disks, without those about the clock, which runs within one second cause, and
/// without the identities of disks that are not mounted.
fn warnings_of(report: &SnapshotReport) -> Vec<Warning> {
    let of_disks = |warning: &&Warning| {
        use Warning as W;
        matches!(warning, W::NotMounted { .. } | W::OtherFileSystem { .. })
    };
    let warnings = report.record.warnings.iter().filter(of_disks).cloned();
    let mut warnings: Vec<Warning> = warnings.collect();
    for warning in &mut warnings {
        if let Warning::NotMounted { disk, .. } = warning {
            disk.clear();
        }
    }
    warnings
}

#[test]
fn a_missing_disk_gets_a_warning_in_each_run_and_its_snapshot_is_kept() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let before = bench.take().name;
    run("umount", &[&disk.text()]);
    let warned = not_mounted(&disk, before);
    for _ in 0..3 {
        assert_eq!(warnings_of(&bench.take()), warned);
    }
    let pruned = keep_the_last(&bench);
    let kept = &pruned.snapshots[0].decision;
    assert_eq!(
        (kept.name, kept.keep.as_slice()),
        (before, &[KeepReason::MissingDisk][..])
    );
    assert_eq!(bench.kinds().len(), 2);
    assert_eq!(warnings_of(&bench.take()), warned);

    // The disk is back at its place: nothing is reported or kept any more.
    mount(&disk.0);
    let back = bench.take();
    assert!(warnings_of(&back).is_empty());
    keep_the_last(&bench);
    assert_eq!(bench.kinds().len(), 1);
    run("umount", &[&disk.text()]);
    assert_eq!(warnings_of(&bench.take()), not_mounted(&disk, back.name));
}

#[test]
fn the_warning_ends_when_a_disk_is_declared_gone_or_excluded() {
    requires!(sprat_testkit::needs::root());
    for how in ["gone", "excluded", "one file system"] {
        let bench = Bench::new();
        let disk = Disk::new(&bench);
        let before = bench.take().name;
        run("umount", &[&disk.text()]);
        let warned = not_mounted(&disk, before);
        assert_eq!(warnings_of(&bench.take()), warned);
        let mut spec = bench.spec();
        match how {
            "gone" => spec.disks_gone = vec![disk.0.join(".")],
            "excluded" => spec.excludes = vec!["disk/".into()],
            _ => spec.one_file_system = true,
        }
        let ended = bench.try_take(&spec).unwrap();
        assert!(warnings_of(&ended).is_empty(), "{how}");
        // A disk is declared gone once. What the job excludes, its options say each time.
        spec.disks_gone.clear();
        assert!(
            warnings_of(&bench.try_take(&spec).unwrap()).is_empty(),
            "{how}"
        );
        keep_the_last(&bench);
        assert_eq!(bench.kinds().len(), 1, "{how}");
    }
}

/// Restores in place with `delete`: the source or, with `path`, a file or folder of it.
fn restore_with_delete(bench: &Bench, path: Option<PathBuf>) -> Result<(), SnapshotError> {
    let to = path.as_ref().and_then(|path| path.parent());
    let to = to.map_or("/".into(), ToOwned::to_owned);
    let mut spec = RestoreSpec::new(crate::folder::job_name(), to);
    spec.path = path;
    spec.delete = true;
    spec.delete_excluded = true;
    bench.restore(&spec).map(drop)
}

#[track_caller]
fn refused_for(disk: &Disk, done: Result<(), SnapshotError>) {
    match done {
        Err(SnapshotError::DeleteReachesMounts { mounts, .. }) => {
            assert_eq!(mounts, [disk.text()]);
        }
        other => panic!("{other:?}"),
    }
    assert!(disk.0.join("precious").exists());
}

#[test]
fn delete_empties_no_disk_that_is_not_in_the_snapshot() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let mut spec = bench.spec();
    spec.one_file_system = true;
    bench.try_take(&spec).unwrap();
    let source = bench.source();
    for path in [None, Some(source.clone()), Some(disk.0.clone())] {
        refused_for(&disk, restore_with_delete(&bench, path));
    }
    run("umount", &[&disk.text()]);
    bench.take();
    mount(&disk.0);
    for path in [None, Some(source.clone()), Some(disk.0.clone())] {
        refused_for(&disk, restore_with_delete(&bench, path));
    }
    // A disk that the snapshot has is restored.
    bench.take();
    fs::write(disk.0.join("later"), "x").unwrap();
    for path in [None, Some(source), Some(disk.0.clone())] {
        restore_with_delete(&bench, path).unwrap();
        assert!(disk.0.join("precious").exists());
        assert!(!disk.0.join("later").exists());
        fs::write(disk.0.join("later"), "x").unwrap();
    }
    // So is one that is the source itself.
    let spec = sprat_snapshot::SnapshotSpec::new(crate::folder::job_name(), vec![disk.0.clone()]);
    bench.try_take(&spec).unwrap();
    restore_with_delete(&bench, None).unwrap();
    assert!(disk.0.join("precious").exists());
}

#[test]
fn mounts_below_and_at_another_destination_are_distinguished() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    fs::create_dir(bench.source().join("disk")).unwrap();
    fs::write(bench.source().join("file"), "x").unwrap();
    bench.take();
    let place = bench.path("place");
    fs::create_dir_all(place.join("source/disk")).unwrap();
    let to = |delete| {
        let mut spec = RestoreSpec::new(crate::folder::job_name(), place.clone());
        spec.path = Some(bench.source());
        spec.delete = delete;
        bench.restore(&spec).map(drop)
    };
    mount(&place.join("source/disk"));
    let disk = Disk(place.join("source/disk"));
    refused_for(&disk, to(true));
    to(false).unwrap();
    assert!(disk.0.join("precious").exists());
    drop(disk);
    // The destination itself may be a disk.
    mount(&place);
    let disk = Disk(place.clone());
    to(true).unwrap();
    assert!(disk.0.join("source/file").exists());
    assert!(disk.0.join("precious").exists());
}

#[test]
fn files_excluded_by_one_file_system_are_deleted_only_on_request() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    bench.take();
    run("umount", &[&disk.text()]);
    let mut lacking = vec![bench.spec(), bench.spec()];
    lacking[1].one_file_system = true;
    for job in lacking {
        bench.try_take(&job).unwrap();
        let mut spec = RestoreSpec::new(crate::folder::job_name(), "/".into());
        spec.delete = true;
        let error = bench.restore(&spec).unwrap_err();
        assert!(
            matches!(error, SnapshotError::DeleteLosesExcluded { .. }),
            "{error}"
        );
        spec.delete_excluded = true;
        bench.restore(&spec).unwrap();
    }
}

/// An automount point as `x-systemd.automount` makes it, without a daemon: nothing gets mounted.
fn automount(at: &std::path::Path) {
    let program = "import ctypes, os, sys\n\
        os.setpgrp(); r, w = os.pipe(); os.set_inheritable(w, True)\n\
        o = f'fd={w},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct'\n\
        libc = ctypes.CDLL(None)\n\
        sys.exit(libc.mount(b'auto', sys.argv[1].encode(), b'autofs', 0, o.encode()) != 0)";
    run("python3", &["-c", program, at.to_str().unwrap()]);
}

#[test]
fn files_on_an_automount_point_belong_to_the_source() {
    requires!(
        sprat_testkit::needs::root(),
        sprat_testkit::needs::program("python3")
    );
    let bench = Bench::new();
    let at = bench.source().join("disk");
    fs::create_dir(&at).unwrap();
    fs::write(bench.source().join("file"), "x").unwrap();
    automount(&at);
    let _unmount = [Disk(at.clone()), Disk(at.clone())];
    let path = at.display().to_string();
    let empty = bench.take();
    assert!(empty.record.complete, "{:?}", empty.record);
    assert_eq!(empty.record.warnings, [Warning::AutomountEmpty { path }]);
    mount(&at);
    let with = bench.take();
    assert!(warnings_of(&with).is_empty());
    assert!(bench.in_snapshot(with.name).join("disk/precious").exists());
    umount(&at);
    let without = bench.take();
    assert_eq!(warnings_of(&without), missing_at(&at, with.name));
    assert!(without.record.complete);
    keep_the_last(&bench);
    assert!(bench.in_snapshot(with.name).join("disk/precious").exists());
    // No file can be written there.
    let mut spec = RestoreSpec::new(crate::folder::job_name(), "/".into());
    spec.snapshot = SnapshotChoice::Named(with.name.to_string());
    spec.delete = true;
    let error = bench.restore(&spec).unwrap_err();
    assert!(
        matches!(error, SnapshotError::DeleteReachesOtherDisk { .. }),
        "{error}"
    );
}
