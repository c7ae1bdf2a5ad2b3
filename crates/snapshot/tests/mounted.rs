//! Disks inside a source that come, go or are missing: such a run is never taken for whole.

#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

mod folder;

use std::fs;
use std::path::PathBuf;

use folder::{Bench, run};
use sprat_snapshot::{EntryKind, KeepRules, PruneSpec, Warning};
use sprat_testkit::requires;

/// A file system with a file at `source/disk`; unmounted with the value.
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

#[test]
fn a_disk_that_is_unmounted_under_way_is_named_and_the_snapshot_is_not_whole() {
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
        [EntryKind::Good, EntryKind::Unread, EntryKind::Unread]
    );
    // Retention keeps the one that has everything.
    let spec = PruneSpec {
        job: folder::job_name(),
        rules: KeepRules {
            last: 1,
            ..KeepRules::default()
        },
        drop_interrupted: false,
        dry_run: false,
    };
    let cancel = sprat_snapshot::Cancel::new();
    sprat_snapshot::prune(&bench.volume(), &spec, &mut |_| {}, &cancel).unwrap();
    assert_eq!(bench.kinds(), [EntryKind::Good, EntryKind::Unread]);
}

#[test]
fn a_disk_that_is_mounted_under_way_is_named_too() {
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
fn what_the_job_leaves_out_may_come_and_go() {
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
fn a_disk_of_the_last_whole_snapshot_that_is_not_mounted_is_warned_of() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let before = bench.take().name;
    run("umount", &[&disk.text()]);
    let report = bench.take();
    assert!(report.record.complete);
    let path = disk.text();
    assert_eq!(
        report.record.warnings,
        [Warning::NotMounted { path, before }]
    );
}
