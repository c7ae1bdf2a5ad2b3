//! Pruning: what is removed, what is kept, and what an interruption leaves.

use std::fs;

use crate::folder::{Bench, job_name, now};
use sprat_snapshot::{
    Cancel, EntryKind, JobSources, KeepCount, KeepReason, KeepRules, PruneReport, PruneSpec,
    SnapshotError, SnapshotName, SnapshotSpec,
};
use sprat_testkit::compare::assert_same;
use sprat_testkit::tree::make_odd_tree;

/// A job with `count` daily snapshots, the last one of today.
fn days(count: i64) -> (Bench, Vec<SnapshotName>) {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    let day = std::time::Duration::from_secs(86_400);
    let mut names = Vec::new();
    for back in (0..count).rev() {
        let at = now()
            .checked_sub(day * u32::try_from(back).unwrap())
            .unwrap();
        fs::write(bench.source().join("changing"), format!("{back}")).unwrap();
        let taken = sprat_snapshot::take(
            &bench.volume(),
            &bench.spec(),
            at,
            &mut |_| {},
            &Cancel::new(),
        );
        names.push(taken.unwrap().name);
    }
    (bench, names)
}

fn spec(rules: KeepRules) -> PruneSpec {
    PruneSpec::new(job_name(), rules)
}

fn prune(bench: &Bench, spec: &PruneSpec) -> Result<PruneReport, SnapshotError> {
    sprat_snapshot::prune(&bench.volume(), spec, &mut |_| {}, &Cancel::new())
}

fn last(last: u32) -> KeepRules {
    KeepRules {
        last: KeepCount::new(last),
        ..KeepRules::default()
    }
}

fn left(bench: &Bench) -> Vec<SnapshotName> {
    bench
        .list()
        .iter()
        .map(|entry| entry.name.unwrap())
        .collect()
}

/// In the order of making, as if so many days ago. The date of a clock that ran ahead has passed since.
fn taken_before(bench: &Bench, spec: &SnapshotSpec, days: u32) -> SnapshotName {
    let at = now().checked_sub(std::time::Duration::from_secs(86_400) * days);
    let (volume, cancel) = (bench.volume(), Cancel::new());
    let taken = sprat_snapshot::take(&volume, spec, at.unwrap(), &mut |_| {}, &cancel);
    taken.unwrap().name
}

#[test]
fn snapshot_of_a_clock_that_ran_ahead_takes_no_place_in_the_rules() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let names = [10, 2, 8, 7, 1].map(|days| taken_before(&bench, &bench.spec(), days));
    prune(&bench, &spec(last(2))).unwrap();
    assert_eq!(left(&bench), [names[3], names[1], names[4]]);
}

#[test]
fn snapshot_of_a_clock_that_ran_ahead_is_not_the_newest_of_a_source() {
    let bench = Bench::new();
    let other = bench.path("other");
    fs::create_dir(&other).unwrap();
    for folder in [&bench.source(), &other] {
        fs::write(folder.join("file"), "x").unwrap();
    }
    let mut both = bench.spec();
    both.sources.push(other);
    let names = [10, 2, 8].map(|days| taken_before(&bench, &both, days));
    let newest = taken_before(&bench, &bench.spec(), 1);
    let rules = PruneSpec {
        sources: Some(JobSources {
            paths: both.sources,
            ..JobSources::default()
        }),
        ..spec(last(1))
    };
    prune(&bench, &rules).unwrap();
    assert_eq!(left(&bench), [names[2], names[1], newest]);
}

#[test]
fn snapshots_kept_by_no_rule_are_removed_and_others_unchanged() {
    let (bench, names) = days(4);
    let kept = bench.in_snapshot(names[3]);
    let copy = bench.path("copy");
    crate::folder::run(
        "cp",
        &["-a", kept.to_str().unwrap(), copy.to_str().unwrap()],
    );
    let dry = PruneSpec {
        dry_run: true,
        ..spec(last(2))
    };
    let planned = prune(&bench, &dry).unwrap();
    assert_eq!(left(&bench), names);
    let report = prune(&bench, &spec(last(2))).unwrap();
    assert_eq!(left(&bench), names[2..]);
    for (planned, done) in planned.snapshots.iter().zip(&report.snapshots) {
        assert_eq!(planned.decision, done.decision);
        assert_eq!(done.removed, done.decision.keep.is_empty());
    }
    assert_eq!(
        report.snapshots[3].decision.keep,
        [KeepReason::Last, KeepReason::LastGood, KeepReason::Latest]
    );
    assert!(report.names_removed > 20);
    assert_same(&copy, &kept);
    let state: Vec<_> = fs::read_dir(bench.job().join(".sprat"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_str().unwrap().contains("deleting"))
        .collect();
    assert!(state.is_empty(), "{state:?}");
    assert!(
        !bench
            .job()
            .join(format!(".sprat/{}.json", names[0]))
            .exists()
    );
}

#[test]
fn without_a_rule_nothing_is_removed() {
    let (bench, names) = days(2);
    let report = prune(&bench, &spec(KeepRules::default())).unwrap();
    assert_eq!(left(&bench), names);
    assert!(report.snapshots.iter().all(|one| !one.removed));
}

#[test]
fn the_last_complete_the_pinned_and_the_interrupted_stay() {
    let (bench, names) = days(5);
    // The newest is incomplete, the one before was interrupted, and the second is pinned.
    let record = bench.job().join(format!(".sprat/{}.json", names[4]));
    let text = fs::read_to_string(&record).unwrap();
    fs::write(
        &record,
        text.replace("\"complete\": true", "\"complete\": false"),
    )
    .unwrap();
    let name = names[3].to_string();
    fs::rename(
        bench.job().join(&name),
        bench.job().join(format!("{name}.partial")),
    )
    .unwrap();
    fs::write(bench.job().join(format!(".sprat/{}.pin", names[1])), "").unwrap();
    prune(&bench, &spec(last(1))).unwrap();
    let kinds: Vec<_> = bench
        .list()
        .iter()
        .map(|e| (e.name.unwrap(), e.kind))
        .collect();
    assert_eq!(
        kinds,
        [
            (names[1], EntryKind::Complete),
            (names[2], EntryKind::Complete),
            (names[3], EntryKind::Partial),
            (names[4], EntryKind::Incomplete),
        ]
    );
}

#[test]
fn an_interrupted_prune_is_continued() {
    let (bench, names) = days(3);
    let cancel = Cancel::new();
    let stopped = sprat_snapshot::prune(
        &bench.volume(),
        &spec(last(1)),
        &mut |progress| {
            if progress.files_done > 3 {
                cancel.cancel();
            }
        },
        &cancel,
    );
    assert!(
        matches!(stopped, Err(SnapshotError::PruneCancelled)),
        "{stopped:?}"
    );
    // A snapshot whose removal has begun is no longer one.
    assert_eq!(left(&bench), names[1..]);
    let report = prune(&bench, &spec(last(1))).unwrap();
    assert_eq!(left(&bench), names[2..]);
    assert!(report.names_removed > 20);
    assert!(
        !bench
            .job()
            .join(format!(".sprat/deleting-{}", names[0]))
            .exists()
    );
    bench.take();
}

#[test]
fn a_prune_finished_by_a_backup_leaves_no_record() {
    let (bench, names) = days(2);
    let cancel = Cancel::new();
    let stopped = sprat_snapshot::prune(
        &bench.volume(),
        &spec(last(1)),
        &mut |progress| {
            if progress.files_done > 3 {
                cancel.cancel();
            }
        },
        &cancel,
    );
    assert!(matches!(stopped, Err(SnapshotError::PruneCancelled)));
    let record = bench.job().join(format!(".sprat/{}.json", names[0]));
    assert!(record.exists());
    bench.take();
    assert!(!record.exists());
    assert!(
        bench
            .job()
            .join(format!(".sprat/{}.json", names[1]))
            .exists()
    );
}

#[test]
fn a_missing_job_is_not_created() {
    let bench = Bench::new();
    let error = prune(&bench, &spec(last(1))).unwrap_err();
    assert!(matches!(error, SnapshotError::NoSuchJob { .. }), "{error}");
    assert!(!bench.job().exists());
}

#[test]
fn interrupted_trees_are_removed_only_on_request() {
    let (bench, names) = days(4);
    let folder = |name: SnapshotName, kind: &str| bench.job().join(format!("{name}{kind}"));
    fs::rename(folder(names[0], ""), folder(names[0], ".partial")).unwrap();
    fs::rename(folder(names[1], ""), folder(names[1], ".inflight")).unwrap();
    let found = |report: &PruneReport| -> Vec<(String, EntryKind, bool)> {
        let all = report.interrupted.iter();
        all.map(|one| (one.folder.clone(), one.kind, one.removed))
            .collect()
    };
    let both = |removed| {
        [
            (format!("{}.partial", names[0]), EntryKind::Partial, removed),
            (
                format!("{}.inflight", names[1]),
                EntryKind::Inflight,
                removed,
            ),
        ]
    };
    let kept = prune(&bench, &spec(last(9))).unwrap();
    assert_eq!(found(&kept), both(false));

    // Without any rule no snapshot is removed.
    let mut drop = spec(KeepRules::default());
    drop.drop_interrupted = true;
    drop.dry_run = true;
    let planned = prune(&bench, &drop).unwrap();
    assert_eq!(found(&planned), both(false));
    assert_eq!(left(&bench).len(), 4);
    drop.dry_run = false;
    let cancel = Cancel::new();
    let stopped = sprat_snapshot::prune(
        &bench.volume(),
        &drop,
        &mut |progress| {
            if progress.files_done > 3 {
                cancel.cancel();
            }
        },
        &cancel,
    );
    assert!(matches!(stopped, Err(SnapshotError::PruneCancelled)));
    let report = prune(&bench, &drop).unwrap();
    assert!(report.names_removed > 10);
    assert_eq!(left(&bench), names[2..]);
    let state: Vec<_> = fs::read_dir(bench.job().join(".sprat"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".json"))
        .collect();
    // The warnings come from snapshots that are kept, not from removed ones.
    let mut kept: Vec<String> = names[2..]
        .iter()
        .flat_map(|name| ["changes.zst", "recent"].map(|what| format!("{name}.{what}")))
        .collect();
    let mut state = state;
    kept.sort();
    state.sort();
    assert_eq!(state, kept);
    bench.take();
}
