//! The lists of removed snapshots, folded into others: against a model that knows what each snapshot has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use sprat_snapshot::{
    Cancel, CheckSpec, CheckWhat, RemoveSpec, SnapshotChoice, SnapshotName, unescape_name,
};
use sprat_testkit::dice::Dice;

use crate::changes::{lines, list_of};
use crate::checked;
use crate::folder::{Bench, job_name};
use crate::source_checked;

/// A volume whose snapshots are an hour apart.
struct Years {
    bench: Bench,
    now: Timestamp,
    /// See [`sprat_snapshot::Lists::edited`].
    edited: Option<Timestamp>,
}

impl Years {
    fn new() -> Self {
        Self {
            bench: Bench::new(),
            now: "2026-11-01T00:00:00Z".parse().unwrap(),
            edited: None,
        }
    }

    fn take(&mut self) -> SnapshotName {
        self.take_with(true)
    }

    /// `is_cached`: the content of all files is in memory.
    fn take_with(&mut self, is_cached: bool) -> SnapshotName {
        self.now += SignedDuration::from_hours(1);
        let mut spec = self.bench.spec();
        spec.change_lists = Some(self.bench.path("lists/home"));
        spec.edited = self.edited;
        if is_cached {
            spec.page_cache.ask(|_, _| Ok(true));
        }
        let volume = self.bench.volume();
        let taken = sprat_snapshot::take(&volume, &spec, self.now, &mut |_| {}, &Cancel::new());
        taken.unwrap().name
    }

    /// So many snapshots, each with a new file.
    fn take_with_new_files(&mut self, count: u32) -> Vec<SnapshotName> {
        let mut names = Vec::new();
        for number in 0..count {
            fs::write(self.bench.source().join(number.to_string()), "content").unwrap();
            names.push(self.take());
        }
        names
    }

    /// Nothing can read the list of a snapshot any more, neither on the volume nor on this machine.
    fn tear_list(&self, name: SnapshotName) {
        for place in [list_of(&self.bench.job(), name), self.copy(name)] {
            fs::write(place, "torn").unwrap();
        }
    }

    /// This machine's copy of a list.
    fn copy(&self, name: SnapshotName) -> PathBuf {
        self.bench.path(&format!("lists/home/{name}.changes.zst"))
    }

    fn lists_show_what_is_there(&self, names: &[SnapshotName]) {
        for name in names {
            assert_eq!(self.replayed(*name), self.kept(*name), "{name}");
            let list = list_of(&self.bench.job(), name);
            assert!(fs::read(list).unwrap() == fs::read(self.copy(*name)).unwrap());
        }
    }

    fn remove(&self, names: &[SnapshotName]) {
        let named = names
            .iter()
            .map(|name| (job_name(), SnapshotChoice::Named(name.to_string())));
        let spec = RemoveSpec {
            allow_newest: true,
            allow_last_copy: true,
            ..RemoveSpec::new(named.collect())
        };
        sprat_snapshot::remove(&self.bench.volume(), &spec, &mut |_| {}, &Cancel::new()).unwrap();
    }

    /// The lists of the job, by the snapshot up to which each counts.
    fn lists(&self) -> BTreeMap<String, Vec<Value>> {
        let state = fs::read_dir(self.bench.job().join(".sprat")).unwrap();
        let names = state.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let names = names.filter_map(|name| Some(name.strip_suffix(".changes.zst")?.to_owned()));
        let lists = names.map(|name| {
            let list = lines(&list_of(&self.bench.job(), name));
            (list[0]["snapshot"].as_str().unwrap().to_owned(), list)
        });
        lists.collect()
    }

    /// Every path of a snapshot and its size, replayed from the lists.
    fn replayed(&self, name: SnapshotName) -> BTreeMap<PathBuf, u64> {
        let lists = self.lists();
        let mut chain = Vec::new();
        let mut at = Some(name.to_string());
        while let Some(name) = at {
            chain.push(&lists[&name]);
            at = lists[&name][0]["since"].as_str().map(str::to_owned);
        }
        let mut paths = BTreeMap::new();
        for line in chain.iter().rev().flat_map(|list| &list[1..list.len() - 1]) {
            let Some(path) = line["path"].as_str() else {
                continue;
            };
            let path = String::from_utf8(unescape_name(path)).unwrap();
            match line["after"]["bytes"].as_u64() {
                Some(bytes) => paths.insert(PathBuf::from(path), bytes),
                None => paths.remove(Path::new(&path)),
            };
        }
        paths
    }

    /// The same, as it is.
    fn kept(&self, name: SnapshotName) -> BTreeMap<PathBuf, u64> {
        let tree = self.bench.job().join(name.to_string());
        let mut paths = BTreeMap::new();
        let mut folders = vec![tree.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let about = entry.metadata().unwrap();
                let path = Path::new("/").join(entry.path().strip_prefix(&tree).unwrap());
                let bytes = if about.is_file() { about.len() } else { 0 };
                paths.insert(path, bytes);
                if about.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        paths
    }

    /// How many files the snapshots have.
    fn files(&self, names: &[SnapshotName]) -> u64 {
        let mut inodes = BTreeSet::new();
        for name in names {
            for path in self.kept(*name).keys() {
                let path = path.strip_prefix("/").unwrap();
                let kept = self.bench.job().join(name.to_string()).join(path);
                let about = kept.symlink_metadata().unwrap();
                inodes.extend(about.is_file().then_some(about.ino()));
            }
        }
        inodes.len() as u64
    }

    /// How many files have a digest, for a machine that has only the volume.
    fn listed(&self) -> u64 {
        self.check(None)
    }

    /// The same for a machine that keeps its lists there.
    fn check(&self, change_lists: Option<PathBuf>) -> u64 {
        let _ = fs::remove_file(self.bench.path("all.sums"));
        let spec = CheckSpec {
            change_lists,
            ..checked::spec(&self.bench, CheckWhat::Everything)
        };
        let volume = self.bench.volume();
        let report = sprat_snapshot::check(&volume, &spec, &mut |_| {}, &Cancel::new()).unwrap();
        assert!(!report.is_damaged(), "{report:?}");
        report.files_listed
    }

    /// Changes some random names below two folders.
    fn change(&self, dice: &mut Dice) {
        for folder in ["a", "b"] {
            fs::create_dir_all(self.bench.source().join(folder)).unwrap();
        }
        for _ in 0..=dice.below(6) {
            let folder = ["", "a/", "b/"][usize::try_from(dice.below(3)).unwrap()];
            let path = self
                .bench
                .source()
                .join(format!("{folder}{}", dice.below(5)));
            let is_folder = path.is_dir();
            match dice.below(4) {
                0 if is_folder => fs::remove_dir_all(&path).unwrap(),
                0 => drop(fs::remove_file(&path)),
                1 if !path.exists() => {
                    fs::create_dir(&path).unwrap();
                    fs::write(path.join("inside"), "inside").unwrap();
                }
                _ if is_folder => fs::write(path.join("more"), "more").unwrap(),
                _ => fs::write(
                    &path,
                    vec![b'x'; usize::try_from(dice.below(5000)).unwrap()],
                )
                .unwrap(),
            }
        }
    }
}

#[test]
fn folded_lists_lose_no_path_and_no_digest() {
    let rounds = sprat_testkit::dice::number("SPRAT_TORTURE_ROUNDS").unwrap_or(25);
    let mut dice = Dice::new(21);
    let mut years = Years::new();
    let mut names = Vec::new();
    let mut folded = 0;
    for round in 0..rounds {
        years.change(&mut dice);
        names.push(years.take());
        folded += u64::from(list_of(&years.bench.job(), "base").exists());
        for name in &names {
            assert_eq!(
                years.replayed(*name),
                years.kept(*name),
                "round {round}: {name}"
            );
        }
        assert_eq!(years.listed(), years.files(&names), "round {round}");
        let newest = names[names.len() - 1];
        let spec = source_checked::spec(&years.bench, newest, &years.bench.source());
        let report = source_checked::check(&spec);
        let with_content = years.kept(newest).into_values().filter(|bytes| *bytes > 0);
        let files = u64::try_from(with_content.count()).unwrap();
        assert_eq!(report.files, files, "round {round}");
        assert!(report.rewritten.is_empty(), "round {round}: {report:?}");
        if dice.percent(40) {
            let going: Vec<SnapshotName> = names
                .iter()
                .copied()
                .filter(|name| dice.percent(50) && names.last() != Some(name))
                .collect();
            years.remove(&going);
            names.retain(|name| !going.contains(name));
        }
    }
    assert!(folded > 0);
}

/// The new list is in place, and those that are in it were not removed; or only a part of the new one was written.
#[test]
fn crash_while_lists_are_folded_loses_nothing() {
    for is_replaced in [false, true] {
        let mut years = Years::new();
        let mut names = Vec::new();
        for number in 0..5 {
            fs::write(years.bench.source().join(number.to_string()), "content").unwrap();
            names.push(years.take());
        }
        let state = years.bench.job().join(".sprat");
        let before: Vec<(PathBuf, Vec<u8>)> = [0, 1, 3]
            .map(|number| list_of(&years.bench.job(), names[number]))
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .to_vec();
        let later = fs::read(list_of(&years.bench.job(), names[4])).unwrap();
        years.remove(&[names[0], names[1], names[3]]);
        let newest = years.take();
        let left = [names[2], names[4], newest];
        assert!(before.iter().all(|(path, _)| !path.exists()));
        let base = list_of(&years.bench.job(), "base");
        for (path, list) in before {
            fs::write(path, list).unwrap();
        }
        let torn = fs::read(&base).unwrap();
        fs::write(state.join("base.changes.zst.new"), &torn[..torn.len() / 2]).unwrap();
        if !is_replaced {
            fs::remove_file(&base).unwrap();
            fs::write(list_of(&years.bench.job(), names[4]), later).unwrap();
        }
        for name in left {
            assert_eq!(years.replayed(name), years.kept(name), "{name}");
        }
        let next = years.take();
        for name in left.into_iter().chain([next]) {
            assert_eq!(years.replayed(name), years.kept(name), "{name}");
        }
        assert_eq!(years.listed(), 5);
        if !is_replaced {
            assert!(!list_of(&years.bench.job(), names[3]).exists());
        }
    }
}

#[test]
fn list_that_can_not_be_read_ends_the_chain_and_fails_no_run() {
    let mut years = Years::new();
    let names = years.take_with_new_files(4);
    years.tear_list(names[1]);
    years.remove(&names[..2]);
    let newest = years.take();
    // Nothing is folded over it, and nothing is lost.
    assert!(list_of(&years.bench.job(), names[0]).exists());
    assert!(years.bench.job().join(newest.to_string()).exists());
    assert_eq!(years.listed(), 3);
}

#[test]
fn lists_after_one_that_can_not_be_read_are_folded() {
    let mut years = Years::new();
    let names = years.take_with_new_files(6);
    years.tear_list(names[1]);
    years.remove(&names[2..4]);
    years.take();
    assert!(
        names[2..4]
            .iter()
            .all(|name| !list_of(&years.bench.job(), name).exists())
    );
    assert!(
        names[..2]
            .iter()
            .all(|name| list_of(&years.bench.job(), name).exists())
    );
    // All files but the one that the torn list had.
    assert_eq!(years.listed(), 5);
}

/// A run without a list ends the chain. The base has the digests of the files from before.
#[test]
fn run_without_a_list_costs_no_digest_of_the_base() {
    let mut years = Years::new();
    let mut number = 0;
    let mut take = |years: &mut Years| {
        number += 1;
        fs::write(years.bench.source().join(number.to_string()), "content").unwrap();
        years.take()
    };
    let first = [take(&mut years), take(&mut years)];
    let kept = take(&mut years);
    years.remove(&first);
    let without = years.take();
    let base = list_of(&years.bench.job(), "base");
    assert!(base.exists());
    for list in [
        list_of(&years.bench.job(), without),
        years
            .bench
            .path(&format!("lists/home/{without}.changes.zst")),
    ] {
        fs::remove_file(list).unwrap();
    }
    let later: Vec<SnapshotName> = (0..6).map(|_| take(&mut years)).collect();
    years.remove(&later[..5]);
    let newest = years.take();
    assert_eq!(
        years.listed(),
        years.files(&[kept, without, later[5], newest])
    );
}

/// A backup could not read the content of new files in memory. A check computed their digests, and a later list has
/// them without a path.
#[test]
fn digests_that_came_later_are_folded_to_the_paths_of_their_files() {
    let mut years = Years::new();
    let mut names = Vec::new();
    for number in 0..2 {
        fs::write(years.bench.source().join(number.to_string()), "content").unwrap();
        names.push(years.take_with(false));
    }
    assert_eq!(years.check(Some(years.bench.path("lists"))), 0);
    names.push(years.take());
    let without_path = |list: &[Value]| {
        let mut lines = list.iter();
        lines.any(|line| line.get("path").is_none() && line["sha256"].is_string())
    };
    assert!(without_path(&lines(&list_of(&years.bench.job(), names[2]))));
    assert_eq!(years.listed(), 2);
    // The digests are in a list that is not folded yet.
    years.remove(&names[..1]);
    let newest = years.take();
    let base = list_of(&years.bench.job(), "base");
    let digest = |path: &str| {
        let list = lines(&base);
        let path = years.bench.source().join(path).display().to_string();
        let line = list.into_iter().find(|line| line["path"] == *path);
        line.map(|line| line["sha256"].clone())
    };
    assert_eq!(digest("0"), Some(Value::Null));
    assert_eq!(years.listed(), 2);
    years.remove(&names[1..]);
    let last = years.take();
    let sum = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73";
    for path in ["0", "1"] {
        let base = lines(&base);
        let path = years.bench.source().join(path).display().to_string();
        let mut named = base.iter().filter(|line| line["path"] == *path);
        assert_eq!(named.next().unwrap()["sha256"], sum, "{path}");
        assert!(!without_path(&base), "once is enough");
    }
    assert_eq!(years.listed(), years.files(&[newest, last]));
}

#[test]
fn list_that_is_missing_or_torn_is_made_again() {
    for damage in ["missing", "torn", "torn here"] {
        let mut years = Years::new();
        let mut names = years.take_with_new_files(4);
        let places = [list_of(&years.bench.job(), names[2]), years.copy(names[2])];
        let good = fs::read(&places[0]).unwrap();
        for place in &places {
            match damage {
                "missing" => fs::remove_file(place).unwrap(),
                "torn" => fs::write(place, &good[..good.len() / 2]).unwrap(),
                // A check finds the copy of this machine torn.
                _ if place.starts_with(years.bench.path("lists")) => {
                    fs::write(place, &good[..good.len() - 1]).unwrap();
                    years.check(Some(years.bench.path("lists")));
                }
                _ => {}
            }
        }
        names.push(years.take());
        years.lists_show_what_is_there(&names);
        // Nothing else has the digest of the file that this list had.
        let lost = u64::from(damage != "torn here");
        assert_eq!(years.listed(), 4 - lost, "{damage}");
        // Once is enough.
        let made = fs::metadata(&places[1]).unwrap().ino();
        years.take();
        assert_eq!(fs::metadata(&places[1]).unwrap().ino(), made, "{damage}");
    }
}

#[test]
fn lists_from_before_a_change_by_hand_are_made_again_with_all_digests() {
    for is_folded in [false, true] {
        let mut years = Years::new();
        let mut names = years.take_with_new_files(5);
        years.remove(&[names[0], names[2]]);
        names = vec![names[1], names[3], names[4]];
        if is_folded {
            names.push(years.take());
            assert!(list_of(&years.bench.job(), "base").exists());
        }
        let tree = years.bench.job().join(names[1].to_string());
        let below = years.bench.source().join("1");
        fs::remove_file(tree.join(below.strip_prefix("/").unwrap())).unwrap();
        years.edited = Some(years.now + SignedDuration::from_secs(1));
        names.push(years.take());
        years.lists_show_what_is_there(&names);
        assert_eq!(years.listed(), years.files(&names));
        assert!(!list_of(&years.bench.job(), "base").exists());
        for (_, list) in years.lists() {
            let compared = list[0]["compared"].as_str();
            let compared = compared.map(|text| text.parse::<Timestamp>().unwrap());
            let is_newest = list[0]["snapshot"] == names[names.len() - 1].to_string();
            assert_eq!(compared > years.edited, !is_newest, "{}", list[0]);
        }
    }
}
