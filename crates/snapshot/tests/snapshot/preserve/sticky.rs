//! ACLs of what has special bits: if a run is stopped, if a source does not answer at the end, and in restores.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::fs::{lgetxattr, lremovexattr};
use serde_json::Value;
use sprat_snapshot::{
    Cancel, Existing, Phase, Progress, RestoreSpec, SnapshotReport, SnapshotSpec, Warning,
};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;
use sprat_testkit::tree::{acl, set_mode, set_time, set_xattr};

use super::{make_sticky_folder, set_acl_like_mask};
use crate::changes::{lines, list_of};
use crate::folder::sticky_source::{Own, StickySource};
use crate::folder::{Bench, job_name, now};

const ACL: &str = "system.posix_acl_access";
/// For a run that does not wait.
const LIMIT: Duration = Duration::from_secs(60);

fn take(bench: &Bench, spec: &SnapshotSpec, cancel: &Cancel, at: Option<Phase>) -> SnapshotReport {
    let mut progress = |now: Progress| {
        if Some(now.phase) == at {
            cancel.cancel();
        }
    };
    sprat_snapshot::take(&bench.volume(), spec, now(), &mut progress, cancel).unwrap()
}

#[test]
fn run_that_is_stopped_when_all_is_copied_repairs_acls() {
    let bench = Bench::new();
    for name in ["a", "b/inner"] {
        requires!(make_sticky_folder(&bench.source().join(name)));
    }
    let report = take(&bench, &bench.spec(), &Cancel::new(), Some(Phase::Syncing));
    assert!(report.record.complete);
    let list = lines(&list_of(&bench.job(), report.name));
    assert_eq!(list.last().unwrap()["finished"], false);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

/// Takes a snapshot of a source whose ACL this process can't read, and checks that the snapshot is incomplete.
fn take_with_unknown_acl(own: Own) {
    let bench = Bench::new();
    let at = bench.source().join("mounted");
    fs::create_dir(&at).unwrap();
    let mut right = acl(1234, 5);
    // The third entry is that of the owning group.
    right[4 + 2 * 8 + 2] = 7;
    fs::write(bench.source().join("file"), "content").unwrap();
    let (waiting, mounted) = StickySource::mount(&at, right, own);
    let mut spec = bench.spec();
    spec.change_lists = Some(bench.path("lists"));
    let cancel = Cancel::new();
    let (done, is_done) = channel();
    let report = std::thread::scope(|scope| {
        let (waiting, to_cancel) = (&waiting, &cancel);
        let cancels = scope.spawn(move || {
            if own == Own::Silent {
                waiting.wait();
                to_cancel.cancel();
            }
            let ended = is_done.recv_timeout(LIMIT);
            // A thread that waits for an answer would keep this process from ending.
            waiting.end();
            ended.is_ok()
        });
        let report = take(&bench, &spec, &cancel, None);
        done.send(()).unwrap();
        assert!(cancels.join().unwrap(), "the run waited for the source");
        report
    });
    let record = &report.record;
    assert!(!record.complete);
    let folder = at.join("shared").display().to_string();
    assert_eq!(record.unread.names, std::slice::from_ref(&folder));
    assert!(record.reason_unread(&folder).is_some());
    assert!(
        record
            .warnings
            .contains(&Warning::GroupRightsUnknown { folders: 1 })
    );
    let lacking = record.file_systems.iter().filter(|one| !one.full);
    let lacking: Vec<_> = lacking.map(|one| PathBuf::from(&one.place)).collect();
    assert_eq!(lacking, std::slice::from_ref(&at));
    let local = bench
        .path("lists")
        .join(format!("{}.changes.zst", report.name));
    for list in [list_of(&bench.job(), report.name), local] {
        let lines = lines(&list);
        assert_eq!(lines[0]["complete"], Value::Bool(false));
        assert!(lines.len() > 2);
    }
    drop(mounted);
}

#[test]
fn snapshot_is_incomplete_if_the_acl_of_a_source_cannot_be_read() {
    requires!(sprat_testkit::needs::root());
    take_with_unknown_acl(Own::Error);
}

#[test]
fn source_that_does_not_answer_for_its_acl_does_not_hold_up_a_cancelled_run() {
    requires!(sprat_testkit::needs::root());
    take_with_unknown_acl(Own::Silent);
}

/// rsync changes the bits of what is there after its ACL.
#[test]
fn restore_over_other_special_bits_keeps_the_rights_of_the_owning_group() {
    let bench = Bench::new();
    let source = bench.source();
    let (file, folder, kept) = (
        source.join("file"),
        source.join("folder"),
        source.join("kept"),
    );
    fs::create_dir(&folder).unwrap();
    for path in [&file, &folder, &kept] {
        if path != &folder {
            fs::write(path, "content").unwrap();
        }
        requires!(set_acl_like_mask(path, 0o2670));
        set_time(path, 1_700_000_000, 0).unwrap();
    }
    let tree = bench.in_snapshot(bench.take().name);
    for (old, each) in [(0o4640, false), (0o640, false), (0o1640, true)] {
        for path in [&file, &folder] {
            lremovexattr(path, ACL).unwrap();
            set_mode(path, old).unwrap();
        }
        let mut spec = RestoreSpec::new(job_name(), "/".into());
        if each {
            spec.to.clone_from(&source);
            for path in [&file, &folder] {
                spec.path = Some(path.clone());
                bench.restore(&spec).unwrap();
            }
        } else {
            bench.restore(&spec).unwrap();
        }
        assert_same(&tree, &source);
    }
    // What a restore keeps has the rights that the user gave it.
    let mut less = acl_of(&kept);
    less[4 + 2 * 8 + 2] = 0;
    set_xattr(&kept, ACL, &less).unwrap();
    set_time(&kept, 1_700_000_001, 0).unwrap();
    for existing in [Existing::Keep, Existing::KeepNewer] {
        let mut spec = RestoreSpec::new(job_name(), "/".into());
        spec.existing = existing;
        bench.restore(&spec).unwrap();
        assert_eq!(acl_of(&kept), less, "{existing:?}");
    }
}

fn acl_of(path: &Path) -> Vec<u8> {
    let mut acl = vec![0; 1000];
    let length = lgetxattr(path, ACL, &mut acl[..]).unwrap();
    acl.truncate(length);
    acl
}
