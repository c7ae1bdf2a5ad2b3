//! What snapshots cost, compared with the blocks that a file system then frees.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use jiff::{SignedDuration, Timestamp};
use rustix::fs::statvfs;
use sprat_inside::{AnalyzeReport, AnalyzeSpec, analyze};
use sprat_snapshot::{
    Cancel, JobName, RemoveSpec, SnapshotChoice, SnapshotError, SnapshotSpec, remove, take,
};
use sprat_testkit::dice::{Dice, number, seed};
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::LoopDisk;
use sprat_testkit::{needs, requires};

use crate::model;

/// So many trees, unless the environment names another number.
const TREES: u64 = 5;
const DAYS: usize = 6;

fn job(name: &str) -> JobName {
    JobName::new(name).unwrap()
}

fn choice(name: &str) -> SnapshotChoice {
    SnapshotChoice::Named(name.to_owned())
}

fn spec(removed: &[(&str, &str)]) -> AnalyzeSpec {
    AnalyzeSpec {
        job: None,
        removed: removed
            .iter()
            .map(|(of, name)| (job(of), choice(name)))
            .collect(),
        paths_max: 5,
        kept: None,
    }
}

/// Also by what earlier runs found, with the same result.
fn costs_twice(volume: &Path, kept: &Path, removed: &[(&str, &str)]) -> AnalyzeReport {
    let spec = AnalyzeSpec {
        kept: Some(kept.to_str().unwrap().to_owned()),
        ..spec(removed)
    };
    let report = analyze(volume, &spec, true, None, &Cancel::new()).unwrap();
    assert_eq!(report, costs(volume, removed));
    report
}

fn costs(volume: &Path, removed: &[(&str, &str)]) -> AnalyzeReport {
    analyze(volume, &spec(removed), true, None, &Cancel::new()).unwrap()
}

fn snapshot(volume: &Path, of: &str, source: &Path, days_ago: usize) -> String {
    let spec = SnapshotSpec::new(job(of), vec![source.to_owned()]);
    let ago = i64::try_from(days_ago).unwrap();
    let at = Timestamp::now() - SignedDuration::from_hours(24 * ago);
    let taken = take(volume, &spec, at, &mut |_| {}, &Cancel::new()).unwrap();
    taken.name.to_string()
}

fn free_blocks(volume: &Path) -> u64 {
    let file = fs::File::open(volume).unwrap();
    rustix::fs::syncfs(&file).unwrap();
    let about = statvfs(volume).unwrap();
    about.f_bfree * about.f_frsize
}

#[test]
fn removal_frees_exactly_what_was_computed_for_random_trees() {
    requires!(needs::root().or_else(|| needs::program("mkfs.ext4")));
    let first = seed();
    for tree in 0..number("SPRAT_TORTURE_ROUNDS").unwrap_or(TREES) {
        let mut dice = Dice::new(first.wrapping_add(tree));
        let dir = TestFolder::new("sprat-costs-");
        let (volume, source) = (dir.path().join("volume"), dir.path().join("source"));
        fs::create_dir(&volume).unwrap();
        fs::create_dir_all(source.join("tree")).unwrap();
        let disk = LoopDisk::mount(&dir.path().join("image"), &volume, 64);
        let mut left: Vec<(&str, String)> = Vec::new();
        for day in 0..DAYS {
            model::live_a_day(&source.join("tree"), &mut dice);
            fs::write(source.join("always"), "the same").unwrap();
            let of = if dice.percent(20) { "other" } else { "home" };
            left.push((of, snapshot(&volume, of, &source, DAYS - day)));
        }
        let kept = dir.path().join("kept");
        if tree % 2 == 0 {
            // A name outside of all snapshots keeps a file.
            let (of, name) = &left[0];
            let path = volume
                .join(of)
                .join(name)
                .join(source.strip_prefix("/").unwrap())
                .join("always");
            fs::hard_link(path, volume.join("by-hand")).unwrap();
        }
        while !left.is_empty() {
            let count = 1 + usize::try_from(dice.below(3)).unwrap();
            let mut set = Vec::new();
            for _ in 0..count.min(left.len()) {
                let at = usize::try_from(dice.below(left.len() as u64)).unwrap();
                set.push(left.remove(at));
            }
            let before = free_blocks(&volume);
            let named: Vec<(&str, &str)> = set.iter().map(|(of, name)| (*of, &**name)).collect();
            let report = costs_twice(&volume, &kept, &named);
            let removal = report.removal.unwrap();
            assert_eq!(removal.snapshots.len(), set.len());
            if let [(of, name)] = &named[..] {
                let mut all = report.snapshots.iter();
                let own = all
                    .find(|one| one.job == *of && one.snapshot == *name)
                    .unwrap();
                assert_eq!(own.own_bytes, removal.frees_bytes);
            }
            let chosen = set.iter().map(|(of, name)| (job(of), choice(name)));
            let removing = RemoveSpec {
                allow_newest: true,
                allow_last_copy: true,
                ..RemoveSpec::new(chosen.collect())
            };
            remove(&volume, &removing, &mut |_| {}, &Cancel::new()).unwrap();
            let freed = free_blocks(&volume) - before;
            assert_eq!(
                freed, removal.frees_bytes,
                "tree {tree} of seed {first}: {set:?}"
            );
            // More snapshots come, which nothing is known of.
            if dice.percent(30) {
                model::live_a_day(&source.join("tree"), &mut dice);
                let day = left.len();
                left.push(("home", snapshot(&volume, "home", &source, 0)));
                assert!(left.len() > day);
            }
        }
        assert_eq!(kept.exists(), tree % 2 == 1, "a file has a name elsewhere");
        drop(disk);
    }
}

#[test]
fn costs_of_snapshots_and_of_paths_are_summed_up() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, source) = (dir.path().join("volume"), dir.path().join("source"));
    fs::create_dir(&volume).unwrap();
    fs::create_dir(&source).unwrap();
    let write = |name: &str, kib: usize, with: u8| {
        fs::write(source.join(name), vec![with; kib << 10]).unwrap();
    };
    write("big", 400, b'b');
    write("same", 100, b's');
    write("often", 40, b'1');
    fs::hard_link(source.join("same"), source.join("its link")).unwrap();
    let mut names = vec![snapshot(&volume, "home", &source, 3)];
    write("often", 44, b'2');
    names.push(snapshot(&volume, "home", &source, 2));
    write("often", 48, b'3');
    write("big", 404, b'c');
    names.push(snapshot(&volume, "home", &source, 1));
    let report = costs(&volume, &[("home", &names[0]), ("home", &names[1])]);
    let taken = |name: &str, snapshot: usize| {
        let inside = volume.join("home").join(&names[snapshot]);
        let path = inside.join(source.strip_prefix("/").unwrap()).join(name);
        fs::symlink_metadata(path).unwrap().blocks() * 512
    };
    // With its record.
    let folders = |snapshot: usize| {
        report.snapshots[snapshot].bytes
            - taken("big", snapshot)
            - taken("same", snapshot)
            - taken("often", snapshot)
    };
    assert_eq!(report.snapshots.len(), 3);
    assert!(
        report.snapshots.iter().all(|one| one.files == 4),
        "{report:?}"
    );
    let beside = |snapshot: usize| -> u64 {
        let all = fs::read_dir(volume.join("home/.sprat")).unwrap().flatten();
        let begin = format!("{}.", names[snapshot]);
        // The list of changes stays when the snapshot is removed.
        let goes = |name: &str| name.starts_with(&begin) && !name.ends_with(".changes.zst");
        let its = all.filter(|one| goes(one.file_name().to_str().unwrap()));
        its.map(|one| one.metadata().unwrap().blocks() * 512).sum()
    };
    let own: Vec<u64> = report.snapshots.iter().map(|one| one.own_bytes).collect();
    assert_eq!(own[0], folders(0) + taken("often", 0));
    assert_eq!(own[2], folders(2) + taken("often", 2) + taken("big", 2));
    let new: Vec<u64> = report.snapshots.iter().map(|one| one.new_files).collect();
    assert_eq!(new, [3, 1, 2]);
    let removal = report.removal.as_ref().unwrap();
    // `big` is in both, and in no other.
    assert_eq!(removal.frees_bytes, own[0] + own[1] + taken("big", 0));
    let besides = folders(0) + folders(1) + folders(2);
    assert_eq!(
        report.folder_bytes,
        besides - beside(0) - beside(1) - beside(2)
    );
    let files = [
        taken("big", 0),
        taken("big", 2),
        taken("same", 0),
        taken("often", 0),
        taken("often", 1),
        taken("often", 2),
    ];
    assert_eq!(report.bytes, besides + files.iter().sum::<u64>());
    let name = |name: &str| source.join(name).display().to_string();
    let first =
        |list: &[sprat_inside::PathCost]| (list[0].path.clone(), list[0].versions, list[0].bytes);
    assert_eq!(first(&report.biggest), (name("big"), 2, taken("big", 2)));
    assert_eq!(
        first(&report.most_changed),
        (name("often"), 3, taken("often", 2))
    );
    assert_eq!(
        first(&report.most_expensive),
        (name("big"), 2, taken("big", 2))
    );
    // Of the newest snapshot: the source's folder has all files, one of them by two names.
    let folder = source.display().to_string();
    let mut folders = report.biggest_folders.iter();
    assert_eq!(report.biggest_folders[0].path, "/");
    let found = folders.find(|one| one.path == folder).unwrap();
    let own = fs::symlink_metadata(
        volume
            .join("home")
            .join(&names[2])
            .join(source.strip_prefix("/").unwrap()),
    );
    let files = taken("big", 2) + taken("same", 0) + taken("often", 2);
    assert_eq!(
        (found.files, found.bytes),
        (4, files + own.unwrap().blocks() * 512)
    );
    let paths: BTreeSet<&str> = report.most_expensive.iter().map(|one| &*one.path).collect();
    assert_eq!(
        paths.len(),
        2,
        "a path of one version costs nothing more: {paths:?}"
    );

    let unknown = analyze(
        &volume,
        &spec(&[("home", "2020")]),
        true,
        None,
        &Cancel::new(),
    );
    assert!(
        matches!(unknown, Err(SnapshotError::NoSuchSnapshot { .. })),
        "{unknown:?}"
    );
    let cancel = Cancel::new();
    cancel.cancel();
    let cancelled = analyze(&volume, &spec(&[]), true, None, &cancel);
    assert!(matches!(cancelled, Err(SnapshotError::ReadCancelled)));
}
