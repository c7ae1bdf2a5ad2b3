//! Random lives of a machine: disks come, go, swap, lie on each other, on automount points and as bind
//! mounts, with mounts that propagate and that do not; backups whole and incomplete, with wrong clocks;
//! retention; restores in place with `delete`.
//!
//! The model knows nothing of mount tables or identities: each disk has its number in a file, and what
//! a place shows is read from there. After each step it says which contents must still be restorable
//! and which files must be untouched.
//!
//! `SPRAT_TORTURE_ROUNDS` asks for the long form (300 lives), `SPRAT_TORTURE_SEED` for one life.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::folder::{Bench, job_name, run};
use jiff::{SignedDuration, Timestamp};
use sprat_snapshot::{
    Cancel, KeepCount, KeepRules, PruneSpec, RestoreSpec, SnapshotChoice, SnapshotError,
    SnapshotName, prune, take,
};
use sprat_testkit::dice::Dice;
use sprat_testkit::requires;

const LIVES_SHORT: u64 = 5;
const LIVES_LONG: u64 = 300;
const STEPS: usize = 30;
const DISKS: u64 = 4;
/// Folders below the source. The first is the source itself.
const PLACES: [&str; 5] = ["", "a", "b", "auto", "a/x"];
const ID: &str = ".id";
const CONTENT: &str = "content";

/// A disk, or the folder `sub` of one.
type Unit = String;

/// The files of one place, by name.
type Files = BTreeMap<String, String>;

/// What a snapshot must have, by the model.
struct Taken {
    good: bool,
    /// By place: the unit that was there, its files, and whether none of it was reported as unread.
    units: BTreeMap<&'static str, (Unit, Files, bool)>,
    /// Units that were declared gone later.
    gone: BTreeSet<Unit>,
}

struct Life {
    bench: Bench,
    dice: Dice,
    seed: u64,
    clock: Timestamp,
    taken: BTreeMap<SnapshotName, Taken>,
    writes: u64,
    log: Vec<String>,
}

impl Drop for Life {
    fn drop(&mut self) {
        let source = self.bench.source();
        while quietly("umount", &["-l", source.to_str().unwrap()])
            || PLACES.iter().any(|place| {
                let at = source.join(place);
                quietly("umount", &["-l", at.to_str().unwrap()])
            })
        {}
        if std::thread::panicking() {
            eprintln!("seed {}:\n{}", self.seed, self.log.join("\n"));
        }
    }
}

fn quietly(program: &str, arguments: &[&str]) -> bool {
    let output = Command::new(program).args(arguments).output().unwrap();
    output.status.success()
}

impl Life {
    fn new(seed: u64) -> Self {
        let mut this = Self {
            bench: Bench::new(),
            dice: Dice::new(seed),
            seed,
            clock: crate::folder::now() - SignedDuration::from_hours(24 * 1000),
            taken: BTreeMap::new(),
            writes: 0,
            log: Vec::new(),
        };
        let source = this.bench.source();
        let text = source.to_str().unwrap();
        run("mount", &["--bind", text, text]);
        let way = ["--make-private", "--make-shared"][usize::from(this.dice.percent(50))];
        run("mount", &[way, text]);
        this.log.push(way.to_owned());
        make_folders(&source);
        fs::write(source.join("file"), "x").unwrap();
        for disk in 0..DISKS {
            let image = this.image(disk);
            let image = image.to_str().unwrap();
            run("truncate", &["-s", "4M", image]);
            run(
                "mkfs.ext4",
                &["-q", "-F", "-m0", "-O", "^has_journal", image],
            );
            let at = this.bench.path("at");
            fs::create_dir_all(&at).unwrap();
            run("mount", &["-o", "loop", image, at.to_str().unwrap()]);
            make_folders(&at);
            fs::create_dir(at.join("sub")).unwrap();
            for (folder, id) in [("", format!("{disk}")), ("sub", format!("{disk}/sub"))] {
                fs::write(at.join(folder).join(ID), id).unwrap();
                fs::write(at.join(folder).join(CONTENT), "0").unwrap();
            }
            run("umount", &[at.to_str().unwrap()]);
        }
        this
    }

    fn image(&self, disk: u64) -> PathBuf {
        self.bench.path(&format!("disk-{disk}"))
    }

    fn any_place(&mut self) -> &'static str {
        PLACES[usize::try_from(self.dice.below(PLACES.len() as u64)).unwrap()]
    }

    fn at(&self, place: &str) -> PathBuf {
        let source = self.bench.source();
        if place.is_empty() {
            source
        } else {
            source.join(place)
        }
    }

    /// What each place shows, read from the disks themselves.
    fn visible(&self) -> BTreeMap<&'static str, (Unit, Files)> {
        let shown = PLACES.iter().filter_map(|place| {
            let at = self.at(place);
            let unit = fs::read_to_string(at.join(ID)).ok()?;
            Some((*place, (unit, files(&at))))
        });
        shown.collect()
    }

    fn step(&mut self) {
        match self.dice.below(22) {
            0..=4 => self.mount(),
            5..=7 => self.unmount(),
            8 => self.bind(),
            9 => self.automount(),
            10..=11 => self.write(),
            12..=15 => self.back_up(),
            16..=17 => self.retain(),
            18..=19 => self.swap(),
            _ => self.restore(),
        }
    }

    fn mount(&mut self) {
        let place = self.any_place();
        self.mount_at(place);
    }

    /// Replaces the disk at a place by another one or by none. No backup runs in between.
    fn swap(&mut self) {
        let place = self.any_place();
        self.unmount_at(place);
        self.mount_at(place);
    }

    fn mount_at(&mut self, place: &str) {
        let disk = self.dice.below(DISKS);
        let (image, at) = (self.image(disk), self.at(place));
        if self
            .visible()
            .values()
            .any(|(unit, _)| unit.starts_with(&disk.to_string()))
        {
            return;
        }
        let done = quietly(
            "mount",
            &["-o", "loop", image.to_str().unwrap(), at.to_str().unwrap()],
        );
        self.log.push(format!("mount {disk} at {place:?}: {done}"));
    }

    fn unmount(&mut self) {
        let place = self.any_place();
        self.unmount_at(place);
    }

    fn unmount_at(&mut self, place: &str) {
        let at = self.at(place);
        // The source's own bind mount stays.
        let done = quietly("umount", &[at.to_str().unwrap()]);
        self.log.push(format!("unmount {place:?}: {done}"));
        if !at.join("a").exists() && place.is_empty() {
            make_folders(&at);
        }
    }

    fn bind(&mut self) {
        let (from, place) = (self.any_place(), self.any_place());
        let (sub, at) = (self.at(from).join("sub"), self.at(place));
        if from == place || !sub.join(ID).exists() {
            return;
        }
        let done = quietly(
            "mount",
            &["--bind", sub.to_str().unwrap(), at.to_str().unwrap()],
        );
        self.log
            .push(format!("bind {from:?}/sub at {place:?}: {done}"));
    }

    /// An automount point without a daemon: it shows what is mounted on it, and mounts nothing.
    fn automount(&mut self) {
        let at = self.at("auto");
        let program = "import ctypes, os, sys\n\
            os.setpgrp(); r, w = os.pipe(); os.set_inheritable(w, True)\n\
            o = f'fd={w},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct'\n\
            libc = ctypes.CDLL(None)\n\
            sys.exit(libc.mount(b'auto', sys.argv[1].encode(), b'autofs', 0, o.encode()) != 0)";
        let done = quietly("python3", &["-c", program, at.to_str().unwrap()]);
        self.log.push(format!("automount: {done}"));
    }

    fn write(&mut self) {
        let place = self.any_place();
        if let Some((unit, _)) = self.visible().get(place) {
            self.writes += 1;
            let name = if self.dice.percent(50) {
                CONTENT.to_owned()
            } else {
                format!("f{}", self.writes)
            };
            fs::write(self.at(place).join(&name), format!("{}", self.writes)).unwrap();
            self.log
                .push(format!("write {name} = {} to {unit}", self.writes));
        }
    }

    fn back_up(&mut self) {
        self.clock += SignedDuration::from_hours(1 + i64::try_from(self.dice.below(72)).unwrap());
        let now = match self.dice.below(10) {
            0 => self.clock + SignedDuration::from_hours(24 * 9000),
            1 => self.clock - SignedDuration::from_hours(24 * 20),
            _ => self.clock,
        };
        let mut spec = self.bench.spec();
        let place = self.any_place();
        let gone = self.dice.percent(10);
        if gone {
            spec.disks_gone = vec![self.at(place)];
        }
        let seen = self.visible();
        let unread = self.dice.percent(30).then(|| self.any_place());
        if let Some(place) = unread {
            let path = self.at(place).join("unread");
            let line = format!(
                "rsync: [sender] send_files failed to open \\\"{}\\\": Permission denied (13)",
                path.display()
            );
            spec.rsync = self
                .bench
                .rsync_script(&format!("echo \"{line}\" >&2"), "rsync");
        }
        let report = take(
            &self.bench.volume(),
            &spec,
            now,
            &mut |_| {},
            &Cancel::new(),
        )
        .unwrap();
        self.log.push(format!(
            "backup {} of {:?}, unread {unread:?}, gone {:?}: {:?}",
            report.name,
            seen.iter()
                .map(|(place, (unit, _))| (place, unit))
                .collect::<Vec<_>>(),
            gone.then_some(place),
            report.record.warnings
        ));
        assert_eq!(report.record.complete, unread.is_none());
        self.snapshot_is_true(report.name, &seen);
        if gone {
            self.declare_gone(place, &seen);
        }
        let units = seen.into_iter().map(|(place, (unit, files))| {
            let full = unread.is_none_or(|unread| !Path::new(unread).starts_with(place));
            (place, (unit, files, full))
        });
        let taken = Taken {
            good: unread.is_none(),
            units: units.collect(),
            gone: BTreeSet::new(),
        };
        self.taken.insert(report.name, taken);
    }

    /// Declares the newest disk of the place gone, unless some place shows it today.
    fn declare_gone(&mut self, place: &str, seen: &BTreeMap<&'static str, (Unit, Files)>) {
        let is_seen = |unit: &Unit| seen.values().any(|(now, _)| now == unit);
        for taken in self.taken.values_mut() {
            let here = taken.units.iter().filter(|(at, _)| **at == place);
            let gone = here
                .map(|(_, (unit, ..))| unit.clone())
                .filter(|unit| !is_seen(unit));
            taken.gone.extend(gone.collect::<Vec<_>>());
        }
    }

    fn snapshot_is_true(&self, name: SnapshotName, seen: &BTreeMap<&'static str, (Unit, Files)>) {
        let tree = self.bench.in_snapshot(name);
        for place in PLACES {
            let at = tree.join(place);
            let expected = seen.get(place).map(|(_, files)| files.clone());
            let has = at.join(ID).exists().then(|| files(&at));
            assert_eq!(has, expected, "{name} at {place:?}");
        }
    }

    fn retain(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let needed = self.needed();
        let rules = KeepRules {
            last: KeepCount::new(1 + u32::try_from(self.dice.below(3)).unwrap()),
            ..KeepRules::default()
        };
        let spec = PruneSpec::new(job_name(), rules);
        let report = prune(&self.bench.volume(), &spec, &mut |_| {}, &Cancel::new()).unwrap();
        for one in &report.snapshots {
            self.log.push(format!(
                "prune {}: {:?}",
                one.decision.name, one.decision.keep
            ));
            if one.removed {
                self.taken.remove(&one.decision.name);
            }
        }
        for (unit, name) in needed {
            let taken = self.taken.get(&name);
            let taken = taken.unwrap_or_else(|| panic!("{name}, the last of {unit}, was pruned"));
            let seen = taken
                .units
                .iter()
                .map(|(place, (unit, files, _))| (*place, (unit.clone(), files.clone())));
            self.snapshot_is_true(name, &seen.collect());
        }
    }

    /// For each unit the snapshot that must be kept for it.
    fn needed(&self) -> BTreeMap<Unit, SnapshotName> {
        let tomorrow = crate::folder::now() + SignedDuration::from_hours(24);
        let real: Vec<_> = self
            .taken
            .iter()
            .filter(|(name, _)| name.moment() <= tomorrow)
            .collect();
        let good = real.iter().rev().find(|(_, taken)| taken.good);
        let units: BTreeSet<&Unit> = real
            .iter()
            .flat_map(|(_, taken)| taken.units.values().map(|(unit, ..)| unit))
            .collect();
        let mut needed = BTreeMap::new();
        for unit in units {
            let holds = |taken: &Taken, in_full: bool| {
                let here = |(u, _, full): &(Unit, Files, bool)| u == unit && (*full || !in_full);
                taken.units.values().any(here) && !taken.gone.contains(unit)
            };
            if let Some((name, taken)) = good
                && taken.units.values().any(|(u, ..)| u == unit)
            {
                needed.insert(unit.clone(), **name);
                continue;
            }
            let newest = |in_full| real.iter().rev().find(|(_, taken)| holds(taken, in_full));
            if let Some((name, _)) = newest(true).or_else(|| newest(false)) {
                needed.insert(unit.clone(), **name);
            }
        }
        needed
    }

    fn restore(&mut self) {
        let names: Vec<SnapshotName> = self.taken.keys().copied().collect();
        if names.is_empty() {
            return;
        }
        let name = names[usize::try_from(self.dice.below(names.len() as u64)).unwrap()];
        let place = self.any_place();
        let path = self.at(place);
        let mut spec = RestoreSpec::new(job_name(), path.parent().unwrap().to_owned());
        if self.dice.percent(30) {
            spec.to = "/".into();
        } else {
            spec.path = Some(path);
        }
        let root = if spec.path.is_some() { place } else { "" };
        spec.snapshot = SnapshotChoice::Named(name.to_string());
        spec.delete = true;
        spec.delete_excluded = true;
        let before = self.all_files();
        let seen = self.visible();
        let result = self.bench.restore(&spec);
        self.log.push(format!(
            "restore {name} at {root:?}: {:?}",
            result.as_ref().map(|_| ()).map_err(ToString::to_string)
        ));
        let after = self.all_files();
        if let Err(error) = result {
            assert_eq!(before, after, "{error}");
            let is_expected = matches!(
                error,
                SnapshotError::DeleteReachesOtherDisk { .. }
                    | SnapshotError::DeleteReachesMounts { .. }
                    | SnapshotError::DestinationRefused { .. }
                    | SnapshotError::NoSuchPath { .. }
            );
            assert!(is_expected, "{error}");
            return;
        }
        let had = &self.taken[&name].units;
        for at in PLACES {
            let reached = root.is_empty() || at == root || at.starts_with(&format!("{root}/"));
            let same = match (seen.get(at), had.get(at)) {
                (Some((now, _)), Some((then, ..))) => now == then,
                (None, None) => continue,
                _ => false,
            };
            if !reached {
                assert_eq!(before[at], after[at], "{at:?} was not to be restored");
            } else if same {
                assert_eq!(after[at], had[at].1, "{at:?} was to be as in {name}");
            } else {
                for (file, content) in &before[at] {
                    assert_eq!(
                        after[at].get(file),
                        Some(content),
                        "{file} of another disk at {at:?}"
                    );
                }
            }
        }
    }

    fn all_files(&self) -> BTreeMap<&'static str, Files> {
        PLACES
            .iter()
            .map(|place| (*place, files(&self.at(place))))
            .collect()
    }
}

fn make_folders(at: &Path) {
    for place in &PLACES[1..] {
        fs::create_dir_all(at.join(place)).unwrap();
    }
    fs::create_dir_all(at.join("x")).unwrap();
}

/// The files of one folder, without its subfolders.
fn files(at: &Path) -> Files {
    let Ok(names) = fs::read_dir(at) else {
        return Files::new();
    };
    let file = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path()).ok()?;
        Some((entry.file_name().into_string().unwrap(), text))
    };
    names.flatten().filter_map(file).collect()
}

#[test]
fn nothing_is_lost_in_random_lives_of_disks() {
    requires!(
        crate::folder::loop_missing(),
        sprat_testkit::needs::program("python3")
    );
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let lives = number("SPRAT_TORTURE_ROUNDS").map_or(LIVES_SHORT, |_| LIVES_LONG);
    let seeds = number("SPRAT_TORTURE_SEED").map_or(1..=lives, |seed| seed..=seed);
    for seed in seeds {
        let mut life = Life::new(seed);
        for _ in 0..STEPS {
            life.step();
        }
        life.retain();
    }
}
