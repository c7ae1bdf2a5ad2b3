//! Pins, and the removal of snapshots by name.

use std::fs;
use std::path::PathBuf;

use crate::folder::{Bench, job_name, now};
use sprat_snapshot::{
    Cancel, JobSources, KeepCount, KeepReason, KeepRules, PinReport, PinSpec, PruneSpec,
    RemoveReport, RemoveSpec, SnapshotChoice, SnapshotError, SnapshotName, pin, remove,
};
use sprat_testkit::compare::assert_same;

/// A job with `count` daily snapshots of a file, the last one of today.
fn days(count: u32) -> (Bench, Vec<SnapshotName>) {
    days_until(now(), count)
}

fn days_until(newest: jiff::Timestamp, count: u32) -> (Bench, Vec<SnapshotName>) {
    let bench = Bench::new();
    let day = std::time::Duration::from_secs(86_400);
    let mut names = Vec::new();
    for back in (0..count).rev() {
        fs::write(bench.source().join("file"), format!("{back}")).unwrap();
        fs::write(bench.source().join(format!("own{back}")), "x").unwrap();
        let at = newest.checked_sub(day * back).unwrap();
        let spec = bench.spec();
        let taken = sprat_snapshot::take(&bench.volume(), &spec, at, &mut |_| {}, &Cancel::new());
        names.push(taken.unwrap().name);
    }
    (bench, names)
}

fn named(name: SnapshotName) -> SnapshotChoice {
    SnapshotChoice::Named(name.to_string())
}

fn removing(choices: &[SnapshotChoice]) -> RemoveSpec {
    RemoveSpec::new(
        choices
            .iter()
            .map(|one| (job_name(), one.clone()))
            .collect(),
    )
}

fn run(bench: &Bench, spec: &RemoveSpec) -> Result<RemoveReport, SnapshotError> {
    remove(&bench.volume(), spec, &mut |_| {}, &Cancel::new())
}

fn pinned(bench: &Bench, choice: &SnapshotChoice, reason: Option<&str>) -> PinReport {
    let spec = PinSpec {
        job: job_name(),
        snapshot: choice.clone(),
        reason: reason.map(str::to_owned),
    };
    pin(&bench.volume(), &spec).unwrap()
}

fn left(bench: &Bench) -> Vec<SnapshotName> {
    let list = bench.list();
    list.iter().map(|entry| entry.name.unwrap()).collect()
}

fn latest(bench: &Bench) -> String {
    let link = fs::read_link(bench.job().join("latest")).unwrap();
    link.into_os_string().into_string().unwrap()
}

#[test]
fn snapshot_of_a_clock_that_ran_ahead_does_not_become_the_latest() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    // In the order of making, and in days before now. The date of the second one has passed since.
    let day = std::time::Duration::from_secs(86_400);
    let names = [10, 2, 8, 1].map(|days| {
        let (volume, spec) = (bench.volume(), bench.spec());
        let at = now().checked_sub(day * days).unwrap();
        let taken = sprat_snapshot::take(&volume, &spec, at, &mut |_| {}, &Cancel::new());
        taken.unwrap().name
    });
    let newest = RemoveSpec {
        allow_newest: true,
        ..removing(&[named(names[3])])
    };
    run(&bench, &newest).unwrap();
    assert_eq!(latest(&bench), names[2].to_string());
}

#[test]
fn named_snapshots_are_removed_and_others_unchanged() {
    let (bench, names) = days(4);
    let kept = bench.in_snapshot(names[2]);
    let copy = bench.path("copy");
    crate::folder::run(
        "cp",
        &["-a", kept.to_str().unwrap(), copy.to_str().unwrap()],
    );
    let mut spec = removing(&[named(names[1]), named(names[0]), named(names[1])]);
    spec.dry_run = true;
    let plan = run(&bench, &spec).unwrap();
    let planned: Vec<_> = plan
        .snapshots
        .iter()
        .map(|one| (one.name, one.removed))
        .collect();
    assert_eq!(planned, [(names[0], false), (names[1], false)]);
    assert_eq!(left(&bench), names);
    spec.dry_run = false;
    let report = run(&bench, &spec).unwrap();
    assert!(report.snapshots.iter().all(|one| one.removed));
    assert!(report.names_removed > 2);
    assert_eq!(left(&bench), names[2..]);
    assert_same(&copy, &kept);
    assert!(
        !bench
            .job()
            .join(format!(".sprat/{}.json", names[0]))
            .exists()
    );
    assert_eq!(latest(&bench), names[3].to_string());
}

#[test]
fn a_removal_never_guesses_and_then_removes_nothing() {
    let (bench, names) = days(3);
    let year = names[0].to_string()[..4].to_owned();
    let missing = SnapshotChoice::parse("2001-01-01T00-00-00Z");
    for (choice, expected) in [
        (
            SnapshotChoice::parse(&year[..2]),
            "several snapshots begin with",
        ),
        (missing, "has no snapshot 2001-01-01T00-00-00Z"),
        (SnapshotChoice::parse(""), "has no snapshot"),
    ] {
        let error = run(&bench, &removing(&[named(names[0]), choice])).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(left(&bench), names);
    }
    let error = run(&bench, &removing(&[SnapshotChoice::parse(&year[..2])])).unwrap_err();
    let text = error.to_string();
    assert!(
        names.iter().all(|name| text.contains(&name.to_string())),
        "{text}"
    );
    // A beginning that only one has is enough.
    let begin = names[0].to_string()[..15].to_owned();
    run(&bench, &removing(&[SnapshotChoice::Named(begin)])).unwrap();
    assert_eq!(left(&bench), names[1..]);
}

#[test]
fn the_newest_complete_snapshot_is_removed_only_on_request() {
    let (bench, names) = days(3);
    let refused = |choices: &[SnapshotChoice]| {
        let error = run(&bench, &removing(choices)).unwrap_err();
        assert!(
            matches!(error, SnapshotError::RemovalRefused { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("newest complete one"), "{error}");
        assert_eq!(left(&bench), names);
    };
    refused(&[named(names[2])]);
    refused(&[named(names[0]), SnapshotChoice::Latest]);
    let mut spec = removing(&[named(names[2])]);
    spec.allow_newest = true;
    spec.dry_run = true;
    let plan = run(&bench, &spec).unwrap();
    assert_eq!(
        plan.snapshots[0].needed,
        [KeepReason::LastGood, KeepReason::Latest]
    );
    spec.dry_run = false;
    run(&bench, &spec).unwrap();
    assert_eq!(left(&bench), names[..2]);
    assert_eq!(latest(&bench), names[1].to_string());
    // All that are left.
    let mut spec = removing(&[named(names[1]), named(names[0])]);
    spec.allow_newest = true;
    run(&bench, &spec).unwrap();
    assert!(left(&bench).is_empty());
    assert!(bench.job().join("latest").symlink_metadata().is_err());
    bench.take();
}

/// A small computer without a clock of its own starts in the past. No rule counts snapshots of the future.
#[test]
fn newest_complete_snapshot_is_refused_if_the_clock_is_behind() {
    let ahead = now().checked_add(jiff::SignedDuration::from_hours(24 * 9));
    let (bench, names) = days_until(ahead.unwrap(), 3);
    let all: Vec<_> = names.iter().copied().map(named).collect();
    let error = run(&bench, &removing(&all)).unwrap_err();
    assert!(error.to_string().contains("newest complete one"), "{error}");
    assert_eq!(left(&bench), names);
}

#[test]
fn latest_never_points_to_a_removed_snapshot_after_a_crash() {
    let (bench, names) = days(3);
    // The last run ended before it could update `latest`.
    let link = bench.job().join("latest");
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(names[1].to_string(), &link).unwrap();
    run(&bench, &removing(&[named(names[1])])).unwrap();
    assert_eq!(latest(&bench), names[2].to_string());
}

#[test]
fn a_pinned_snapshot_survives_prune_and_remove_until_it_is_unpinned() {
    let (bench, names) = days(3);
    let first = pinned(&bench, &named(names[0]), Some("before the move"));
    assert_eq!((first.name, first.before), (names[0], None));
    let listed = bench.list();
    let pins: Vec<_> = listed.iter().map(|entry| entry.pin.as_deref()).collect();
    assert_eq!(pins, [Some("before the move"), None, None]);
    let error = run(&bench, &removing(&[named(names[0]), named(names[1])])).unwrap_err();
    assert!(
        error.to_string().ends_with("is pinned: before the move"),
        "{error}"
    );
    let mut spec = removing(&[named(names[0])]);
    spec.allow_newest = true;
    assert!(
        run(&bench, &spec).is_err(),
        "--allow-newest is not about pins"
    );
    let rules = KeepRules {
        last: KeepCount::new(1),
        ..KeepRules::default()
    };
    let prune = PruneSpec::new(job_name(), rules);
    sprat_snapshot::prune(&bench.volume(), &prune, &mut |_| {}, &Cancel::new()).unwrap();
    assert_eq!(left(&bench), [names[0], names[2]]);

    let again = pinned(&bench, &named(names[0]), Some("for the auditor"));
    assert_eq!(again.before.as_deref(), Some("before the move"));
    let pin_file = bench.job().join(format!(".sprat/{}.pin", names[0]));
    assert_eq!(fs::read_to_string(&pin_file).unwrap(), "for the auditor\n");
    let gone = pinned(&bench, &named(names[0]), None);
    assert_eq!(gone.before.as_deref(), Some("for the auditor"));
    assert!(!pin_file.exists());
    assert_eq!(pinned(&bench, &named(names[0]), None).before, None);
    run(&bench, &removing(&[named(names[0])])).unwrap();
    assert_eq!(left(&bench), names[2..]);
}

#[test]
fn the_beginning_of_several_names_pins_the_newest_and_a_wrong_name_pins_nothing() {
    let (bench, names) = days(2);
    let choice = SnapshotChoice::parse("2");
    assert_eq!(pinned(&bench, &choice, Some("x")).name, names[1]);
    let spec = PinSpec {
        job: "other".parse().unwrap(),
        snapshot: choice,
        reason: Some("x".to_owned()),
    };
    let error = pin(&bench.volume(), &spec).unwrap_err();
    assert!(matches!(error, SnapshotError::NoSuchJob { .. }), "{error}");
    assert!(!bench.volume().join("other").exists());
    let spec = PinSpec {
        job: job_name(),
        snapshot: SnapshotChoice::parse("2001"),
        reason: Some("x".to_owned()),
    };
    let error = pin(&bench.volume(), &spec).unwrap_err();
    assert!(
        matches!(error, SnapshotError::NoSuchSnapshot { .. }),
        "{error}"
    );
    // What takes a protection away must not guess.
    let spec = PinSpec {
        job: job_name(),
        snapshot: SnapshotChoice::parse(&names[0].to_string()[..2]),
        reason: None,
    };
    let error = pin(&bench.volume(), &spec).unwrap_err();
    assert!(
        error.to_string().contains("several snapshots begin with"),
        "{error}"
    );
}

#[test]
fn an_interrupted_removal_is_continued_by_the_same_command() {
    let (bench, names) = days(3);
    let cancel = Cancel::new();
    let spec = removing(&[named(names[0])]);
    let stopped = remove(
        &bench.volume(),
        &spec,
        &mut |progress| {
            if progress.files_done > 0 {
                cancel.cancel();
            }
        },
        &cancel,
    );
    assert!(
        matches!(stopped, Err(SnapshotError::PruneCancelled)),
        "{stopped:?}"
    );
    assert_eq!(left(&bench), names[1..]);
    let report = run(&bench, &spec).unwrap();
    assert!(report.snapshots[0].begun_before && report.snapshots[0].removed);
    assert!(
        !bench
            .job()
            .join(format!(".sprat/deleting-{}", names[0]))
            .exists()
    );
    let error = run(&bench, &spec).unwrap_err();
    assert!(
        matches!(error, SnapshotError::NoSuchSnapshot { .. }),
        "{error}"
    );
}

#[test]
fn source_of_the_config_that_the_newest_snapshot_lacks_is_a_last_copy() {
    let bench = Bench::new();
    let other = bench.path("other");
    for folder in [&bench.source(), &other] {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("file"), "x").unwrap();
    }
    let take = |sources: &[PathBuf], hours: i64| {
        let mut spec = bench.spec();
        spec.sources = sources.to_vec();
        let at = now() - jiff::SignedDuration::from_hours(hours);
        let taken = sprat_snapshot::take(&bench.volume(), &spec, at, &mut |_| {}, &Cancel::new());
        taken.unwrap().name
    };
    let both = [bench.source(), other];
    let first = take(&both, 2);
    take(&both[..1], 1);
    let mut spec = removing(&[named(first)]);
    spec.dry_run = true;
    // By its own record the job includes one source only.
    assert!(run(&bench, &spec).unwrap().snapshots[0].needed.is_empty());
    let config = JobSources {
        paths: both.to_vec(),
        ..JobSources::default()
    };
    spec.sources.push((job_name(), config));
    let refused = run(&bench, &spec).unwrap_err();
    assert!(
        matches!(refused, SnapshotError::RemovalRefused { .. }),
        "{refused}"
    );
    spec.allow_last_copy = true;
    let report = run(&bench, &spec).unwrap();
    assert_eq!(report.snapshots[0].needed, [KeepReason::MissingDisk]);
}
