//! Thirty days of random changes: `analyze` agrees with a count of every inode, path and byte, also by what it has
//! kept of earlier runs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use sprat_inside::{AnalyzeReport, AnalyzeSpec, PathCost, analyze};
use sprat_snapshot::{
    Cancel, JobName, RemoveSpec, SnapshotChoice, SnapshotSpec, escape_name, remove, take,
};
use sprat_testkit::dice::{Dice, seed};
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::LoopDisk;
use sprat_testkit::{needs, requires};

use crate::model;

const DAYS: i64 = 30;
/// Smaller files of one version are not named.
const NAMED_BYTES: u64 = 64 << 10;

/// What a path is.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Object {
    inode: u64,
    bytes: u64,
    is_folder: bool,
}

type Tree = BTreeMap<PathBuf, Object>;

fn object(path: &Path) -> Object {
    let about = fs::symlink_metadata(path).unwrap();
    Object {
        inode: about.ino(),
        bytes: about.blocks() * 512,
        is_folder: about.is_dir(),
    }
}

/// Everything in a snapshot, by its path in the source, with its top.
fn tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let found = object(&path);
        if found.is_folder {
            waiting.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|name| name.unwrap().path()),
            );
        }
        tree.insert(Path::new("/").join(path.strip_prefix(root).unwrap()), found);
    }
    tree
}

/// Files and bytes below a folder. A file with several names counts at the first one.
fn sum_up(
    root: &Path,
    seen: &mut BTreeSet<u64>,
    sums: &mut Vec<(PathBuf, u64, u64)>,
    at: &Path,
) -> (u64, u64) {
    let mut names: Vec<OsString> = fs::read_dir(at)
        .unwrap()
        .map(|name| name.unwrap().file_name())
        .collect();
    names.sort();
    let (mut files, mut bytes) = (0, object(at).bytes);
    let mut below = Vec::new();
    for name in names {
        let found = object(&at.join(&name));
        if found.is_folder {
            below.push(at.join(name));
            continue;
        }
        files += 1;
        if seen.insert(found.inode) {
            bytes += found.bytes;
        }
    }
    for folder in below {
        let (more, their) = sum_up(root, seen, sums, &folder);
        files += more;
        bytes += their;
    }
    sums.push((
        Path::new("/").join(at.strip_prefix(root).unwrap()),
        files,
        bytes,
    ));
    (files, bytes)
}

struct Machine {
    dir: TestFolder,
    now: Timestamp,
}

impl Machine {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn job() -> JobName {
        JobName::new("home").unwrap()
    }

    fn take(&mut self) -> String {
        self.now += SignedDuration::from_hours(24);
        let spec = SnapshotSpec::new(Self::job(), vec![self.path("source")]);
        let volume = self.path("volume");
        let taken = take(&volume, &spec, self.now, &mut |_| {}, &Cancel::new());
        taken.unwrap().name.to_string()
    }

    fn remove(&self, name: &str) {
        let spec = RemoveSpec {
            allow_newest: true,
            allow_last_copy: true,
            ..RemoveSpec::new(vec![(Self::job(), SnapshotChoice::Named(name.to_owned()))])
        };
        remove(&self.path("volume"), &spec, &mut |_| {}, &Cancel::new()).unwrap();
    }

    fn analyze(&self, kept: bool) -> AnalyzeReport {
        let kept = kept.then(|| self.path("kept").to_str().unwrap().to_owned());
        let spec = AnalyzeSpec {
            job: None,
            removed: Vec::new(),
            paths_max: usize::MAX,
            kept,
        };
        analyze(&self.path("volume"), &spec, true, None, &Cancel::new()).unwrap()
    }

    /// What lies beside a snapshot and goes with it.
    fn beside(&self, name: &str) -> u64 {
        let all = fs::read_dir(self.path("volume/home/.sprat")).unwrap();
        let all = all.map(|entry| entry.unwrap().path());
        let is_its = |path: &PathBuf| {
            let its = path.file_name().unwrap().to_str().unwrap();
            its.starts_with(&format!("{name}.")) && !its.ends_with(".changes.zst")
        };
        all.filter(is_its).map(|path| object(&path).bytes).sum()
    }

    /// Compares the report with a count of everything.
    fn compare(&self, names: &[String], report: &AnalyzeReport) {
        let root = |name: &str| self.path("volume/home").join(name);
        let trees: Vec<Tree> = names.iter().map(|name| tree(&root(name))).collect();
        let mut sizes: BTreeMap<u64, u64> = BTreeMap::new();
        let mut places: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
        for (number, tree) in trees.iter().enumerate() {
            for found in tree.values() {
                sizes.insert(found.inode, found.bytes);
                places.entry(found.inode).or_default().insert(number);
            }
        }
        let mut besides = 0;
        assert_eq!(report.snapshots.len(), names.len());
        for (number, cost) in report.snapshots.iter().enumerate() {
            let beside = self.beside(&names[number]);
            besides += beside;
            let sum = |wanted: &dyn Fn(&BTreeSet<usize>) -> bool| -> u64 {
                let of = places.iter().filter(|(_, set)| wanted(set));
                of.map(|(inode, _)| sizes[inode]).sum::<u64>() + beside
            };
            assert_eq!(cost.snapshot, names[number]);
            let files = trees[number].values().filter(|found| !found.is_folder);
            assert_eq!(cost.files, files.count() as u64);
            assert_eq!(cost.bytes, sum(&|set| set.contains(&number)));
            assert_eq!(cost.new_bytes, sum(&|set| set.first() == Some(&number)));
            assert_eq!(
                cost.own_bytes,
                sum(&|set| set.len() == 1 && set.contains(&number))
            );
        }
        assert_eq!(report.bytes, sizes.values().sum::<u64>() + besides);
        let folders = trees.iter().flat_map(|tree| tree.values());
        let folders = folders.filter(|found| found.is_folder);
        assert_eq!(
            report.folder_bytes,
            folders.map(|found| found.bytes).sum::<u64>()
        );

        // Each path: its versions are the files that it was, one after the other.
        let mut lives: BTreeMap<&Path, Vec<Object>> = BTreeMap::new();
        for (path, found) in trees.iter().flatten().filter(|(_, found)| !found.is_folder) {
            let life = lives.entry(path).or_default();
            if life.last().is_none_or(|last| last.inode != found.inode) {
                life.push(*found);
            }
        }
        let named = lives.iter().filter(|(_, life)| {
            life.len() > 1 || life.iter().any(|found| found.bytes >= NAMED_BYTES)
        });
        let expected: BTreeMap<String, (u64, u64, u64)> = named
            .map(|(path, life)| {
                let all = life.iter().map(|found| found.bytes).sum();
                let newest = life.last().unwrap().bytes;
                let path = escape_name(path.as_os_str().as_encoded_bytes());
                (path, (life.len() as u64, newest, all))
            })
            .collect();
        let listed = |list: &[PathCost]| -> BTreeMap<String, (u64, u64, u64)> {
            list.iter()
                .map(|one| (one.path.clone(), (one.versions, one.bytes, one.all_bytes)))
                .collect()
        };
        assert_eq!(listed(&report.biggest), expected);
        let several: BTreeMap<_, _> = expected.into_iter().filter(|(_, one)| one.0 > 1).collect();
        assert_eq!(listed(&report.most_changed), several);
        assert_eq!(listed(&report.most_expensive), several);

        let mut sums = Vec::new();
        let newest = root(names.last().unwrap());
        sum_up(&newest, &mut BTreeSet::new(), &mut sums, &newest);
        let expected: BTreeMap<String, (u64, u64)> = sums
            .into_iter()
            .map(|(path, files, bytes)| {
                (
                    escape_name(path.as_os_str().as_encoded_bytes()),
                    (files, bytes),
                )
            })
            .collect();
        let found = report.biggest_folders.iter();
        let found: BTreeMap<String, (u64, u64)> = found
            .map(|one| (one.path.clone(), (one.files, one.bytes)))
            .collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn thirty_days_of_changes_cost_what_a_count_of_every_inode_shows() {
    requires!(needs::root().or_else(|| needs::program("mkfs.ext4")));
    let dir = TestFolder::new("sprat-analyzed-");
    for name in ["volume", "source"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let disk = LoopDisk::mount(&dir.path().join("image"), &dir.path().join("volume"), 128);
    let mut machine = Machine {
        dir,
        now: Timestamp::now() - SignedDuration::from_hours(24 * 40),
    };
    let first = seed();
    let mut dice = Dice::new(first);
    let mut names = Vec::new();
    for day in 0..DAYS {
        model::live_a_day(&machine.path("source"), &mut dice);
        fs::write(machine.path("source/always"), "the same").unwrap();
        if day == 4 {
            fs::write(machine.path("source/large"), vec![b'x'; 100 << 10]).unwrap();
        }
        names.push(machine.take());
        if day % 6 < 5 {
            continue;
        }
        let report = machine.analyze(true);
        assert_eq!(report, machine.analyze(false), "day {day} of seed {first}");
        machine.compare(&names, &report);
        names.retain(|name| {
            let goes = dice.percent(25);
            if goes {
                machine.remove(name);
            }
            !goes
        });
    }
    assert!(machine.path("kept/home").exists());
    let report = machine.analyze(true);
    machine.compare(&names, &report);
    drop(disk);
}

#[test]
fn later_runs_read_no_snapshot_that_they_know_and_trust_no_file_that_does_not_fit() {
    let dir = TestFolder::new("sprat-analyzed-");
    for name in ["volume", "source", "source/folder"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let mut machine = Machine {
        dir,
        now: Timestamp::now() - SignedDuration::from_hours(24 * 40),
    };
    fs::write(machine.path("source/folder/file"), vec![b'x'; 10_000]).unwrap();
    let names = [machine.take(), machine.take()];
    let inside = |machine: &Machine, name: &str| {
        let source = machine.path("source");
        let below = source.strip_prefix("/").unwrap().join("folder/added");
        machine.path("volume/home").join(name).join(below)
    };
    let before = machine.analyze(true);
    // Nobody writes there, so a change shows who reads.
    fs::write(inside(&machine, &names[0]), vec![b'y'; 100_000]).unwrap();
    assert_eq!(machine.analyze(true), before);
    let now = machine.analyze(false);
    assert!(now.bytes > before.bytes);

    let kept = machine.path("kept/home");
    let good = fs::read(&kept).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0x10;
    for bad in [&b""[..], b"text", &good[..good.len() / 2], &flipped] {
        fs::write(&kept, bad).unwrap();
        assert_eq!(machine.analyze(true), now);
    }
    // It was written again, with what is there now. A snapshot of that name that is another one is read.
    fs::remove_file(inside(&machine, &names[0])).unwrap();
    assert_eq!(machine.analyze(true), now);
    let folder = machine.path("volume/home").join(&names[0]);
    let again = machine.path("volume/home").join("again");
    let copied = std::process::Command::new("cp")
        .arg("-al")
        .args([&folder, &again])
        .status();
    assert!(copied.unwrap().success());
    fs::remove_dir_all(&folder).unwrap();
    fs::rename(&again, &folder).unwrap();
    let read = machine.analyze(true);
    assert_eq!(read, machine.analyze(false));
    assert!(read.bytes < now.bytes);

    // Something else than finished snapshots may have names of their files.
    fs::write(inside(&machine, &names[0]), vec![b'y'; 100_000]).unwrap();
    assert_eq!(machine.analyze(true), read);
    fs::create_dir(machine.path("volume/home/2026-01-01T00-00-00Z.partial")).unwrap();
    let unkept = machine.analyze(true);
    assert_eq!(unkept, machine.analyze(false));
    assert!(unkept.bytes > read.bytes);
}
