//! Cuts the server's power at random moments of recorded backups: the file system needs no more than
//! its journal's replay, and every finished snapshot is intact.
//!
//! `SPRAT_TORTURE_ROUNDS` asks for the long form (`make torture`): four times as many moments as
//! rounds. `SPRAT_TORTURE_SEED` repeats a run.
//!
//! sprat, rsync, the file system and sftp-server run as they are. For each moment the container is assembled
//! again: what an fsync covered, and any part of the rest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sprat_testkit::client_and_server::{self, ClientAndServer, FileSystem};
use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::power::{Op, Power, Tear};
use sprat_testkit::recorder::Recorder;
use sprat_testkit::running::Running;
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Moments of the short form, in `make test`.
const MOMENTS_SHORT: u64 = 20;

const FILE: &str = "laptop.luks";
/// A small buffer: many epochs, and so many fsyncs, in a small backup.
const QUICK: [&str; 4] = ["--quiet-time", "1", "--write-buffer-bytes-max", "2097152"];

/// A finished snapshot: its content, from when on it was promised, and from when on it may be gone.
struct Promise {
    should: Manifest,
    from: usize,
    until: Option<usize>,
}

/// A client whose server is recorded.
struct Recorded {
    pair: ClientAndServer,
    recorder: Recorder,
    source: PathBuf,
    dice: Dice,
    promised: BTreeMap<String, Promise>,
}

impl Recorded {
    /// A new container, and then the beginning of the recording.
    fn new(seed: u64, file_system: FileSystem) -> (Self, Power) {
        let mut pair = ClientAndServer::new();
        pair.init_with(1, file_system);
        let source = pair.path("source");
        let shape = Shape {
            small_files: 150,
            middle_files: 20,
            large_files: 0,
        };
        source_tree::make(&source, shape, seed);
        let power = Power::begin(&pair.container(), &pair.path("sure")).unwrap();
        let recorder = Recorder::start(&pair.server(), FILE).unwrap();
        let recorded = Self {
            pair,
            recorder,
            source,
            dice: Dice::new(seed ^ 0xb01d),
            promised: BTreeMap::new(),
        };
        (recorded, power)
    }

    fn sprat(&self) -> Command {
        let ssh = self.recorder.ssh_command(&self.pair.path("")).unwrap();
        let mut command = self.pair.sprat_through(&ssh);
        command.args(QUICK);
        command
    }

    fn begin_backup(&self) -> Running {
        let mut command = self.sprat();
        command
            .args(["--json", "--progress-interval", "0.01"])
            .args(["backup", self.pair.target(), "--name", "power"])
            .arg(&self.source);
        Running::start(&mut command)
    }

    /// A backup to its end, from which on its snapshot is promised.
    fn backup(&mut self) {
        // Snapshots are named by the second.
        std::thread::sleep(Duration::from_millis(1100));
        let should = Manifest::of(&self.source);
        let mut running = self.begin_backup();
        let exit = running.end(Duration::from_secs(150));
        assert_eq!(exit, Some(0), "{:#?}", running.said);
        let from = self.recorder.now();
        let name = self.newest();
        let promise = Promise {
            should,
            from,
            until: None,
        };
        assert!(self.promised.insert(name, promise).is_none());
    }

    /// Removes all snapshots but the newest.
    fn prune(&mut self) {
        let now = self.recorder.now();
        let newest = self.promised.keys().max().cloned();
        let older = self.promised.iter_mut();
        for (_, promise) in older.filter(|(name, _)| Some(*name) != newest.as_ref()) {
            promise.until = Some(now);
        }
        let mut command = self.sprat();
        command.args(["prune", self.pair.target(), "--job", "power"]);
        command.args(["--keep-last", "1"]);
        let output = sprat_testkit::program::run_within(&mut command, Duration::from_secs(150));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
    }

    /// One whose session is killed half way.
    fn killed_backup(&mut self) {
        let mut running = self.begin_backup();
        let bytes = (256 << 10) + self.dice.below(1 << 20);
        running.until(Duration::from_secs(60), "bytes in flight", |seen| {
            seen.phase == "working" && seen.unsynced_bytes >= bytes
        });
        running.child.kill().unwrap();
        running.end(Duration::from_secs(60));
    }

    fn newest(&self) -> String {
        let mut command = self.sprat();
        command.args(["snapshots", self.pair.target()]);
        let output = sprat_testkit::program::run_within(&mut command, Duration::from_secs(60));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = text.split_whitespace().filter(|word| is_name(word));
        names.max().expect("a snapshot").to_owned()
    }

    /// The disk's content at `moment`, assembled, replayed and checked. Returns whether the journal had to
    /// be replayed, and how many snapshots were there before they were promised.
    fn check(&self, power: &Power, moment: usize, tear: Tear, seed: u64) -> (bool, usize) {
        let what = format!("moment {moment}, {tear:?}, seed {seed}");
        let cut = self.pair.path("cut.luks");
        power.image(&cut, tear, seed).unwrap();
        let image = self.pair.path("plain");
        let plain = PlainVolume::export(&cut, &self.pair.key_file(), &image);
        plain.assert_clean();
        let folder = self.pair.path("offline");
        let mounted = plain.mount(&folder);
        let found = snapshots_in(&folder.join("power"));
        let mut early = 0;
        for (name, promise) in &self.promised {
            let is_promised = promise.from <= moment;
            if is_promised && promise.until.is_none_or(|until| moment <= until) {
                assert!(found.contains(name), "{what}: {name} was promised");
            }
            // Under its own name it is whole, promised or not.
            if found.contains(name) {
                let tree = folder.join("power").join(name);
                let tree = tree.join(self.source.strip_prefix("/").unwrap());
                assert_same(&promise.should, &tree, &format!("{what}: {name}"));
                early += usize::from(promise.from > moment);
            }
        }
        self.check_work(&folder.join("power/.sprat/work"), &what);
        drop(mounted);
        (plain.journal.contains("recovering journal"), early)
    }
}

impl Recorded {
    /// The tree that the next run continues, on a btrfs: rsync trusts size and time of its files.
    fn check_work(&self, work: &Path, what: &str) {
        let tree = work.join(self.source.strip_prefix("/").unwrap());
        if !tree.exists() {
            return;
        }
        let found = Manifest::of(&tree);
        for promise in self.promised.values() {
            let wrong = found.mistaken_for(&promise.should);
            assert!(wrong.is_empty(), "{what}: work has wrong {wrong:?}");
        }
    }
}

fn is_name(word: &str) -> bool {
    word.starts_with("20") && word.ends_with('Z') && word.contains('T')
}

fn snapshots_in(job: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(job).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| is_name(name)).collect()
}

#[test]
fn power_cut_during_a_backup_leaves_finished_snapshots_intact() {
    power_cut_during_a_backup(FileSystem::Ext4);
}

#[test]
fn power_cut_during_a_backup_leaves_finished_snapshots_intact_on_btrfs() {
    power_cut_during_a_backup(FileSystem::Btrfs);
}

fn power_cut_during_a_backup(file_system: FileSystem) {
    sprat_testkit::requires!(
        client_and_server::missing(),
        file_system.missing(),
        sprat_testkit::needs::program("bash")
    );
    let seed = dice::seed();
    let moments = number("SPRAT_TORTURE_ROUNDS").map_or(MOMENTS_SHORT, |rounds| 4 * rounds);
    let (mut recorded, mut power) = Recorded::new(seed, file_system);
    recorded.backup();
    source_tree::change_source_like(&recorded.source, &mut recorded.dice, 1);
    recorded.killed_backup();
    recorded.backup();
    source_tree::change_source_like(&recorded.source, &mut recorded.dice, 2);
    recorded.backup();
    recorded.prune();

    let log = recorded.recorder.log();
    let count = |wanted: fn(&Op) -> bool| log.iter().filter(|op| wanted(op)).count();
    println!(
        "{} writes, {} fsyncs of single connections, {moments} moments",
        count(|op| matches!(op, Op::Write { .. })),
        count(|op| matches!(op, Op::Synced { .. })),
    );
    let mut at: Vec<usize> = (0..moments)
        .map(|_| usize::try_from(recorded.dice.below(log.len() as u64 + 1)).unwrap())
        .collect();
    at.sort_unstable();
    let (mut replayed, mut early, mut unsure) = (0, 0, 0);
    for (number, moment) in (0..).zip(at) {
        power.advance(&log[..moment]).unwrap();
        unsure += u64::from(power.unsure() > 0);
        // Old disks tear a block between its sectors, too. btrfs needs a whole super block.
        let torn = number % 4 == 3 && file_system == FileSystem::Ext4;
        let tear = [Tear::Blocks, Tear::Sectors][usize::from(torn)];
        let (journal, names) = recorded.check(&power, moment, tear, seed ^ number);
        replayed += u64::from(journal);
        early += u64::from(names > 0);
    }
    println!(
        "{moments} cuts: {unsure} with writes that were not sure, {replayed} with a journal to \
         replay, {early} with a snapshot that was not promised yet; every one clean and whole"
    );
    assert!(unsure * 2 > moments, "the moments show too little");
    let has_journal = file_system == FileSystem::Ext4;
    assert!(
        !has_journal || replayed * 4 > moments,
        "the moments show too little"
    );
}

#[test]
fn power_cut_of_the_server_during_a_backup_costs_only_time() {
    power_cut_of_the_server(FileSystem::Ext4);
}

#[test]
fn power_cut_of_the_server_during_a_backup_costs_only_time_on_btrfs() {
    power_cut_of_the_server(FileSystem::Btrfs);
}

fn power_cut_of_the_server(file_system: FileSystem) {
    sprat_testkit::requires!(
        client_and_server::missing(),
        file_system.missing(),
        sprat_testkit::needs::program("bash")
    );
    let seed = dice::seed();
    let cuts = number("SPRAT_TORTURE_ROUNDS").map_or(3, |rounds| rounds / 5);
    let (mut recorded, mut power) = Recorded::new(seed, file_system);
    let mut done = 0;
    for round in 1.. {
        if done >= cuts || round > 2 * cuts {
            break;
        }
        source_tree::change_source_like(&recorded.source, &mut recorded.dice, round);
        std::thread::sleep(Duration::from_millis(1100));
        let should = Manifest::of(&recorded.source);
        let mut running = recorded.begin_backup();
        for _ in 0..2 {
            let bytes = 1 + recorded.dice.below(2 << 20);
            let losses = running.reported.losses;
            let came = running.until(Duration::from_secs(60), "bytes in flight", |seen| {
                seen.unsynced_bytes >= bytes && !seen.away
            });
            if !came {
                break;
            }
            let seed = recorded.dice.any();
            recorded.recorder.cut_power(&mut power, seed).unwrap();
            if running.until(Duration::from_secs(60), "the loss is noticed", |seen| {
                seen.losses > losses
            }) {
                done += 1;
            }
        }
        let exit = running.end(Duration::from_secs(150));
        assert_eq!(exit, Some(0), "{:#?}", running.said);
        let from = recorded.recorder.now();
        let name = recorded.newest();
        let promise = Promise {
            should,
            from,
            until: None,
        };
        recorded.promised.insert(name, promise);
    }
    println!("{done} power cuts of the server during backups");
    assert!(done >= cuts.min(2), "too few backups met their power cut");
    // And once more after the end: everything that was promised is on the disk.
    let log = recorded.recorder.log();
    power.advance(&log).unwrap();
    recorded.check(&power, log.len(), Tear::Blocks, seed);
}
