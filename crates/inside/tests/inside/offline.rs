//! What the lists of this machine answer, compared with what the volume answers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use sprat_inside::{
    DiffReport, DiffSpec, FindReport, FindSpec, Place, VersionsReport, VersionsSpec, diff,
    diff_in_lists, find, find_in_lists, versions, versions_in_lists,
};
use sprat_snapshot::{
    Cancel, JobName, Lists, RemoveSpec, SnapshotChoice, SnapshotError, SnapshotName, SnapshotSpec,
    finished, remove, take,
};
use sprat_testkit::dice::{Dice, seed};
use sprat_testkit::{needs, requires};

use crate::model;

const DAYS: usize = 30;

struct Machine {
    dir: tempfile::TempDir,
    now: Timestamp,
}

impl Machine {
    fn new() -> Self {
        let machine = Self {
            dir: tempfile::tempdir().unwrap(),
            now: Timestamp::now() - SignedDuration::from_hours(24 * 60),
        };
        fs::create_dir(machine.volume()).unwrap();
        fs::create_dir(machine.source()).unwrap();
        fs::write(machine.source().join("always"), "the same").unwrap();
        machine
    }

    fn volume(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    /// This machine's copies.
    fn folder(&self) -> PathBuf {
        self.dir.path().join("lists")
    }

    fn spec(&self, lists: &Path) -> SnapshotSpec {
        let mut spec = SnapshotSpec::new(job(), vec![self.source()]);
        spec.change_lists = Some(lists.join("home"));
        spec
    }

    fn take_with(&mut self, spec: &SnapshotSpec) -> SnapshotName {
        self.now += SignedDuration::from_hours(24);
        let volume = self.volume();
        let taken = take(&volume, spec, self.now, &mut |_| {}, &Cancel::new());
        taken.unwrap().name
    }

    fn take(&mut self) -> SnapshotName {
        self.take_with(&self.spec(&self.folder()))
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.source().join(name), content).unwrap();
    }

    fn remove(&self, names: &[SnapshotName]) {
        let named = names
            .iter()
            .map(|name| (job(), SnapshotChoice::Named(name.to_string())));
        let spec = RemoveSpec {
            allow_newest: true,
            allow_last_copy: true,
            ..RemoveSpec::new(named.collect())
        };
        remove(&self.volume(), &spec, &mut |_| {}, &Cancel::new()).unwrap();
    }

    fn lists(&self) -> Lists {
        Lists {
            folder: self.folder(),
            snapshots: finished(&self.volume()).unwrap(),
            edited: None,
        }
    }

    fn list_of(&self, name: impl std::fmt::Display) -> PathBuf {
        self.folder().join(format!("home/{name}.changes.zst"))
    }

    fn find(&self, pattern: &str) -> [Result<FindReport, SnapshotError>; 2] {
        let spec = FindSpec {
            job: None,
            pattern: pattern.to_owned(),
            ignore_case: false,
        };
        let cancel = Cancel::new();
        [
            find(&self.volume(), &spec, &cancel),
            find_in_lists(&self.lists(), &spec, &cancel),
        ]
    }

    fn versions(&self, path: &Path) -> [Result<VersionsReport, SnapshotError>; 2] {
        let spec = VersionsSpec {
            place: Place::new(job(), SnapshotChoice::Latest, Some(path)),
        };
        let cancel = Cancel::new();
        [
            versions(&self.volume(), &spec, &cancel),
            versions_in_lists(&self.lists(), &spec, &cancel),
        ]
    }

    fn diff(&self, snapshot: &str, path: Option<&Path>) -> [Result<DiffReport, SnapshotError>; 2] {
        let spec = DiffSpec {
            before: None,
            after: Place::new(job(), SnapshotChoice::parse(snapshot), path),
        };
        let cancel = Cancel::new();
        [
            diff(&self.volume(), &spec, &cancel),
            diff_in_lists(&self.lists(), &spec, &cancel),
        ]
    }
}

fn job() -> JobName {
    JobName::new("home").unwrap()
}

/// The answers are equal, but for the times of folders. `None`: the lists leave open what several changes of one
/// path come to.
fn same<T: serde::Serialize>(
    [volume, lists]: [Result<T, SnapshotError>; 2],
    what: &dyn std::fmt::Debug,
) -> Option<Value> {
    let without_times = |report: &T| {
        let mut value = serde_json::to_value(report).unwrap();
        forget_folder_times(&mut value);
        value
    };
    match (volume, lists) {
        (_, Err(SnapshotError::ListsUnclear { .. })) => None,
        (Ok(volume), Ok(lists)) => {
            let (volume, lists) = (without_times(&volume), without_times(&lists));
            assert_eq!(volume, lists, "{what:?}");
            Some(lists)
        }
        (volume, lists) => {
            let texts = [volume.err(), lists.err()].map(|error| error.map(|one| one.to_string()));
            assert!(
                texts[0].is_some() && texts[0] == texts[1],
                "{what:?}: {texts:?}"
            );
            Some(Value::Null)
        }
    }
}

fn forget_folder_times(value: &mut Value) {
    if value["kind"] == "folder" && value.get("modified").is_some() {
        value["modified"] = Value::Null;
    }
    match value {
        Value::Array(all) => all.iter_mut().for_each(forget_folder_times),
        Value::Object(all) => all.values_mut().for_each(forget_folder_times),
        _ => {}
    }
}

/// Compares the answers about all paths, and about each `step`th of them alone. Returns how many there were, and how many the lists leave open.
fn compare(machine: &Machine, ever: &[PathBuf], step: usize) -> (usize, usize) {
    let (mut answers, mut open) = (0, 0);
    let mut count = |answer: Option<Value>| {
        answers += 1;
        open += usize::from(answer.is_none());
    };
    count(same(machine.find("**"), &"find"));
    count(same(machine.find("*.txt*"), &"find"));
    for (number, path) in ever.iter().enumerate().step_by(step) {
        count(same(machine.versions(path), path));
        // One path alone: nothing else makes it open.
        if number % 9 > 0 {
            continue;
        }
        let escaped = sprat_snapshot::escape_name(path.as_os_str().as_encoded_bytes());
        if !escaped.contains(['\\', '*', '[', '?', '{']) {
            count(same(machine.find(&escaped), path));
        }
    }
    let snapshots = machine.lists().snapshots;
    for name in snapshots["home"].iter().map(ToString::to_string) {
        count(same(machine.diff(&name, None), &name));
        count(same(machine.diff(&name, Some(&machine.source())), &name));
        for path in ever.iter().step_by(31) {
            count(same(machine.diff(&name, Some(path)), &(&name, path)));
        }
    }
    (answers, open)
}

#[test]
fn lists_answer_as_the_volume_does_on_every_path_for_thirty_days() {
    requires!(needs::root());
    let seed = seed();
    let mut machine = Machine::new();
    let mut dice = Dice::new(seed);
    let mut ever = BTreeMap::new();
    for day in 0..DAYS {
        model::live_a_day(&machine.source(), &mut dice);
        ever.extend(
            model::read(&machine.source())
                .into_keys()
                .map(|path| (path, ())),
        );
        let mut spec = machine.spec(&machine.folder());
        if day % 7 == 3 {
            // A source that is not there: incomplete.
            spec.sources.push(machine.dir.path().join("away"));
        }
        machine.take_with(&spec);
    }
    let mut paths: Vec<PathBuf> = ever.into_keys().collect();
    for odd in ["none", "always/below", "../x"] {
        paths.push(machine.source().join(odd));
    }
    assert!(
        paths.len() > 100,
        "the days were too quiet: {}",
        paths.len()
    );
    let (answers, open) = compare(&machine, &paths, 1);
    assert_eq!(open, 0, "each list is of one run (seed {seed})");
    assert!(answers > 300);

    // Some are removed. Their lists stay at first, and then are folded.
    for round in 0..3 {
        let names = finished(&machine.volume()).unwrap().remove("home").unwrap();
        let (_, older) = names.split_last().unwrap();
        let going: Vec<SnapshotName> = older.iter().copied().filter(|_| dice.percent(35)).collect();
        machine.remove(&going);
        for folded in [false, true] {
            let (answers, open) = compare(&machine, &paths, 5);
            assert!(
                open * 3 < answers,
                "round {round}, folded: {folded}, seed {seed}: {open} of {answers} are open"
            );
            if !folded {
                model::live_a_day(&machine.source(), &mut dice);
                machine.take();
            }
        }
    }
    assert!(machine.list_of("base").exists(), "nothing was folded");
}

#[test]
fn only_changes_that_are_undone_between_two_snapshots_are_left_open() {
    requires!(needs::root());
    let mut machine = Machine::new();
    let path = machine.source().join("file");
    machine.write("file", "content");
    machine.write("grows", "1");
    machine.take();
    sprat_testkit::tree::set_mode(&path, 0o600).unwrap();
    machine.write("grows", "12");
    let middle = machine.take();
    sprat_testkit::tree::set_mode(&path, 0o644).unwrap();
    machine.write("grows", "123");
    let last = machine.take().to_string();
    assert!(same(machine.versions(&path), &path).is_some());
    machine.remove(&[middle]);
    for _ in 0..2 {
        for answer in [
            machine.versions(&path).map(|one| one.map(drop)),
            machine.find("file").map(|one| one.map(drop)),
            machine.diff(&last, None).map(|one| one.map(drop)),
        ] {
            let [Ok(()), Err(SnapshotError::ListsUnclear { path: named, .. })] = answer else {
                panic!("{answer:?}");
            };
            assert!(named.ends_with("/file"));
        }
        let grows = machine.source().join("grows");
        assert!(same(machine.versions(&grows), &grows).is_some());
        assert!(same(machine.diff(&last, Some(&grows)), &grows).is_some());
        // The next run folds.
        machine.take();
    }
}

#[test]
fn list_that_is_missing_or_damaged_is_never_trusted() {
    let mut machine = Machine::new();
    let mut names = Vec::new();
    for content in ["1", "12", "123", "1234"] {
        machine.write("file", content);
        names.push(machine.take());
    }
    let path = machine.source().join("file");
    let refused = |machine: &Machine, list: &str, why: &str| {
        for answer in [
            machine.find("file").map(|one| one.map(drop)),
            machine.versions(&path).map(|one| one.map(drop)),
            machine.diff("latest", None).map(|one| one.map(drop)),
        ] {
            let [Ok(()), Err(error)] = answer else {
                panic!("{why}: {answer:?}");
            };
            let said = error.to_string();
            assert!(said.contains(list) && said.contains(why), "{said}");
        }
    };
    let second = names[1].to_string();
    let list = machine.list_of(names[1]);
    let good = fs::read(&list).unwrap();
    for (damage, why) in [
        (None, "is not on this machine"),
        (Some(good[..good.len() / 2].to_vec()), "is damaged"),
        (Some(b"text".to_vec()), "is damaged"),
        (Some(Vec::new()), "is damaged"),
    ] {
        match &damage {
            Some(bytes) => fs::write(&list, bytes).unwrap(),
            None => fs::remove_file(&list).unwrap(),
        }
        // A comparison with the snapshot before needs its own list only, as long as the chain can be followed.
        match &damage {
            Some(bytes) if bytes.len() > 10 => {
                let [_, Err(error)] = machine.versions(&path) else {
                    panic!("{why}");
                };
                assert!(error.to_string().contains(why), "{error}");
            }
            _ => refused(&machine, &second, why),
        }
    }
    // The list of another snapshot under its name, and one that leads past it.
    fs::copy(machine.list_of(names[2]), &list).unwrap();
    refused(&machine, &second, "does not continue");
    fs::write(&list, &good).unwrap();
    assert!(same(machine.versions(&path), &path).is_some());

    // Each byte counts: an answer is right, or there is none.
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&list, &bad).unwrap();
        let [volume, lists] = machine.versions(&path);
        if let Ok(lists) = lists {
            assert_eq!(volume.unwrap(), lists, "byte {at}");
        }
    }
    fs::write(&list, &good).unwrap();

    // Somebody could write into the oldest snapshots, but not into later ones.
    let mut lists = machine.lists();
    let spec = VersionsSpec {
        place: Place::new(job(), SnapshotChoice::Latest, Some(&path)),
    };
    lists.edited = Some(names[0].moment());
    let edited = versions_in_lists(&lists, &spec, &Cancel::new()).unwrap_err();
    assert!(edited.to_string().contains("--rw"), "{edited}");
    lists.edited = Some(names[0].moment() - SignedDuration::from_secs(1));
    assert!(versions_in_lists(&lists, &spec, &Cancel::new()).is_ok());
}

#[test]
fn change_by_hand_is_not_forgotten_with_the_snapshot_that_was_changed() {
    let mut machine = Machine::new();
    let path = machine.source().join("secret");
    machine.write("secret", "text");
    let first = machine.take();
    // Somebody mounts with --rw and removes the file there. It goes from the source, too, so no run finds it gone.
    let there = machine.volume().join(format!("home/{first}"));
    fs::remove_file(there.join(path.strip_prefix("/").unwrap())).unwrap();
    fs::remove_file(&path).unwrap();
    let edited = Some(machine.now + SignedDuration::from_secs(1));
    for is_folded in [false, true] {
        machine.take();
        if !is_folded {
            machine.remove(&[first]);
        }
        assert_eq!(machine.list_of("base").exists(), is_folded);
        assert!(machine.versions(&path)[0].is_err(), "no snapshot has it");
        let spec = VersionsSpec {
            place: Place::new(job(), SnapshotChoice::Latest, Some(&path)),
        };
        let mut lists = machine.lists();
        lists.edited = edited;
        let answer = versions_in_lists(&lists, &spec, &Cancel::new());
        let refused = answer.expect_err("the lists still have it").to_string();
        assert!(refused.contains("--rw"), "{refused}");
    }
    // A run that knows of it lists the snapshots again.
    let again = SnapshotSpec {
        edited,
        ..machine.spec(&machine.folder())
    };
    machine.take_with(&again);
    let mut lists = machine.lists();
    lists.edited = edited;
    for name in ["secret", "always"] {
        let spec = VersionsSpec {
            place: Place::new(
                job(),
                SnapshotChoice::Latest,
                Some(&machine.source().join(name)),
            ),
        };
        let cancel = Cancel::new();
        let answers = [
            versions(&machine.volume(), &spec, &cancel),
            versions_in_lists(&lists, &spec, &cancel),
        ];
        assert!(same(answers, &name).is_some());
    }
}

#[test]
fn lists_of_a_job_that_another_machine_backs_up_are_copied_by_the_next_backup() {
    let mut machine = Machine::new();
    let path = machine.source().join("file");
    let elsewhere = machine.dir.path().join("elsewhere");
    machine.write("file", "1");
    let first = machine.take_with(&machine.spec(&elsewhere));
    machine.write("file", "12");
    machine.take_with(&machine.spec(&elsewhere));
    let [_, Err(error)] = machine.versions(&path) else {
        panic!("there are no lists");
    };
    assert!(error.to_string().contains("not on this machine"), "{error}");
    machine.write("file", "123");
    machine.take();
    assert!(same(machine.versions(&path), &path).is_some());

    // The other one folds. This one has the lists of before, and then those of after.
    machine.remove(&[first]);
    machine.write("file", "1234");
    machine.take_with(&machine.spec(&elsewhere));
    let refused = machine.versions(&path)[1].is_err();
    assert!(refused, "the newest list is elsewhere");
    machine.write("file", "12345");
    machine.take();
    assert!(same(machine.versions(&path), &path).is_some());
    assert!(!machine.list_of(first).exists());
}

#[test]
fn state_that_was_put_back_is_not_answered_from_lists_of_the_lost_one() {
    let mut machine = Machine::new();
    let path = machine.source().join("file");
    let mut names = Vec::new();
    for content in ["1", "12", "123"] {
        machine.write("file", content);
        names.push(machine.take());
    }
    let older = machine.dir.path().join("older");
    let copied = |from: &Path, to: &Path| {
        let done = std::process::Command::new("cp")
            .arg("-a")
            .args([from, to])
            .status();
        assert!(done.unwrap().success());
    };
    copied(&machine.volume(), &older);
    // In the lost state the lists of the first two were folded.
    machine.remove(&names[..2]);
    machine.write("file", "lost");
    machine.take();
    machine.take();
    assert!(!machine.list_of(names[0]).exists());
    fs::remove_dir_all(machine.volume()).unwrap();
    copied(&older, &machine.volume());
    let [volume, lists] = machine.versions(&path);
    assert_eq!(volume.unwrap().versions.len(), 3);
    assert!(lists.is_err());
    // The next backup finds other lists in the volume than it has.
    machine.write("file", "after it");
    machine.take();
    assert!(same(machine.versions(&path), &path).is_some());
}
