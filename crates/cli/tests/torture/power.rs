//! Cuts the server's power at random moments of recorded backups: the file system needs no more than
//! its journal's replay, or its super block from the copy, and every finished snapshot is intact. The next
//! backup of that source makes a right snapshot: by the client as it was, by one that remembers more, and by a new one.
//!
//! `SPRAT_TORTURE_ROUNDS` asks for the long form (`make torture`): four times as many moments as
//! rounds. `SPRAT_TORTURE_SEED` repeats a run.
//!
//! sprat, rsync, the file system and sftp-server run as they are. For each moment the container is assembled
//! again: what an fsync covered, and any part of the rest.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::client_and_server::{self, ClientAndServer, FileSystem, HEADER_BYTES};
use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::power::{Op, Power, Tear};
use sprat_testkit::program::{run_within, system};
use sprat_testkit::recorder::Recorder;
use sprat_testkit::running::Running;
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Moments of the short form, in `make test`.
const MOMENTS_SHORT: u64 = 20;
/// After one of so many moments the next backup is made, and after each in which the super block was torn.
const MOMENTS_PER_BACKUP: u64 = 4;
/// Of a btrfs, whose super block is at 64 KiB: the place of its copy in the container
/// (`BTRFS_SUPER_MIRROR_SHIFT`).
const COPY_OF_SUPER_BLOCK: u64 = HEADER_BYTES + (64 << 20);
/// A little more than the size from which on a changed file is updated by blocks.
const LARGE_BYTES: u64 = (32 << 20) + 5;
const LIMIT: Duration = Duration::from_secs(240);
/// In the client's state: the end of the name of what an interrupted update of a large file had done.
const PART: &str = ".part";
const UPDATES_MAX: u64 = 20;

const FILE: &str = "laptop.luks";
/// A small buffer: many epochs, and so many fsyncs, in a small backup.
const QUICK: [&str; 4] = ["--quiet-time", "1", "--write-buffer-bytes-max", "2097152"];

/// A finished snapshot: its content, from when on it was promised, and from when on it may be gone.
struct Promise {
    should: Manifest,
    from: usize,
    until: Option<usize>,
}

/// A part of the recording: one command, and the source that it had.
struct Stage {
    from: usize,
    /// A copy of the source, with its attributes.
    source: PathBuf,
    /// What the client knew: a copy of its folder `state`.
    known: PathBuf,
}

/// The client of the next backup.
#[derive(Debug, Clone, Copy)]
enum Client {
    /// It lost its power at the same time, and knows what it knew when the command began.
    AsItWas,
    /// It knows all that came after the power cut, and has a cache of that.
    OfTheEnd,
    New,
}

/// A client whose server is recorded.
struct Recorded {
    pair: ClientAndServer,
    recorder: Recorder,
    source: PathBuf,
    /// A file of the source that is updated by blocks, on a btrfs.
    large: Option<PathBuf>,
    dice: Dice,
    stages: Vec<Stage>,
    promised: BTreeMap<String, Promise>,
}

/// What was found on the disk after a power cut.
#[derive(Debug, Default)]
struct Found {
    /// The journal had to be replayed.
    replayed: bool,
    /// The super block was torn.
    torn: bool,
    /// How many snapshots were there before they were promised.
    early: usize,
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
        let mut dice = Dice::new(seed ^ 0xb01d);
        // Not among the files that `change_source_like` replaces.
        let large = source.join("odd/machine.img");
        let large = (file_system == FileSystem::Btrfs).then_some(large);
        if let Some(large) = &large {
            let mut content = source_tree::random(&mut dice, LARGE_BYTES);
            // Some of it compresses, and some is a hole.
            content[4 << 20..8 << 20].fill(7);
            content[8 << 20..10 << 20].fill(0);
            fs::write(large, content).unwrap();
        }
        let power = Power::begin(&pair.container(), &pair.path("sure")).unwrap();
        let recorder = Recorder::start(&pair.server(), FILE).unwrap();
        let recorded = Self {
            pair,
            recorder,
            source,
            large,
            dice,
            stages: Vec::new(),
            promised: BTreeMap::new(),
        };
        (recorded, power)
    }

    /// Changes the source, the large file by blocks.
    fn change(&mut self, round: u64) {
        source_tree::change_source_like(&self.source, &mut self.dice, round);
        let Some(large) = &self.large else { return };
        let file = fs::File::options().write(true).open(large).unwrap();
        for _ in 0..200 {
            let block = self.dice.below(LARGE_BYTES / 4096);
            let content = match self.dice.below(4) {
                0 => vec![0; 4096],
                _ => source_tree::random(&mut self.dice, 4096),
            };
            file.write_all_at(&content, block * 4096).unwrap();
        }
    }

    /// A command begins.
    fn begin_stage(&mut self) {
        let source = self.pair.path(format!("stage-{}", self.stages.len()));
        copy_tree(&self.source, &source);
        let known = self.pair.path(format!("stage-{}-state", self.stages.len()));
        copy_tree(&self.pair.path("state"), &known);
        let from = self.recorder.now();
        self.stages.push(Stage {
            from,
            source,
            known,
        });
    }

    fn stage_at(&self, moment: usize) -> &Stage {
        let mut stages = self.stages.iter().rev();
        stages.find(|stage| stage.from <= moment).unwrap()
    }

    /// A moment of any command, whatever its length.
    fn moment(&mut self, end: usize) -> usize {
        let number = self.dice.below(self.stages.len() as u64);
        let number = usize::try_from(number).unwrap();
        let from = self.stages[number].from;
        let until = self.stages.get(number + 1).map_or(end, |next| next.from);
        let within = self.dice.below((until - from) as u64 + 1);
        from + usize::try_from(within).unwrap()
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
        self.begin_stage();
        let should = Manifest::of(&self.source);
        let mut running = self.begin_backup();
        let exit = running.end(LIMIT);
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
        self.begin_stage();
        let now = self.recorder.now();
        let newest = self.promised.keys().max().cloned();
        let older = self.promised.iter_mut();
        for (_, promise) in older.filter(|(name, _)| Some(*name) != newest.as_ref()) {
            promise.until = Some(now);
        }
        let mut command = self.sprat();
        command.args(["prune", self.pair.target(), "--job", "power"]);
        command.args(["--keep-last", "1"]);
        let output = run_within(&mut command, LIMIT);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
    }

    /// One whose session is killed half way.
    fn killed_backup(&mut self) {
        self.begin_stage();
        let mut running = self.begin_backup();
        let bytes = (256 << 10) + self.dice.below(1 << 20);
        running.until(Duration::from_secs(60), "bytes in flight", |seen| {
            seen.phase == "working" && seen.unsynced_bytes >= bytes
        });
        running.child.kill().unwrap();
        running.end(Duration::from_secs(60));
    }

    /// On a btrfs, one that is interrupted while it updates the large file. The next one continues that update.
    fn interrupted_update(&mut self) {
        let Some(large) = self.large.clone() else {
            return;
        };
        let state = self.pair.path("state");
        let is_part = |path: &PathBuf| path.to_string_lossy().ends_with(PART);
        for round in 0..UPDATES_MAX {
            self.change(100 + round);
            self.begin_stage();
            let mut running = self.begin_backup();
            running.until(LIMIT, "it works", |seen| seen.phase == "working");
            self.interrupt_within(&mut running, &large);
            // It may have ended before.
            let is_interrupted = running.end(LIMIT) == Some(130);
            if is_interrupted && files_below(&state).iter().any(is_part) {
                return;
            }
        }
        panic!("no update of the large file was interrupted");
    }

    /// Interrupts a backup when it has read some of the large file.
    fn interrupt_within(&self, running: &mut Running, large: &Path) {
        let all = self.pair.processes().into_iter();
        let all: Vec<Pid> = all.filter_map(|one| Pid::from_raw(one.pid)).collect();
        let send = |to: &mut dyn Iterator<Item = &Pid>, signal| {
            for pid in to {
                let _ = kill_process(*pid, signal);
            }
        };
        let some = (4 << 20)..LARGE_BYTES / 2;
        // On a busy machine it would be over before anybody looks: it runs in steps.
        while running.child.try_wait().unwrap().is_none() {
            send(&mut all.iter(), Signal::STOP);
            let has_some =
                |pid: &&Pid| read_so_far(**pid, large).is_some_and(|at| some.contains(&at));
            if let Some(reader) = all.iter().find(has_some) {
                send(&mut [Pid::from_child(&running.child)].iter(), Signal::INT);
                send(&mut all.iter().filter(|pid| *pid != reader), Signal::CONT);
                // Until the others have passed it on.
                std::thread::sleep(Duration::from_millis(300));
                send(&mut [*reader].iter(), Signal::CONT);
                return;
            }
            send(&mut all.iter(), Signal::CONT);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn newest(&self) -> String {
        let mut command = self.sprat();
        command.args(["snapshots", self.pair.target()]);
        let output = run_within(&mut command, Duration::from_secs(60));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = text.split_whitespace().filter(|word| is_name(word));
        names.max().expect("a snapshot").to_owned()
    }

    /// The disk's content at `moment`, assembled, replayed and checked. It stays in the file `cut.luks`.
    fn check(&self, power: &Power, moment: usize, tear: Tear, seed: u64) -> Found {
        let what = format!("moment {moment}, {tear:?}, seed {seed}");
        let cut = self.cut();
        power.image(&cut, tear, seed).unwrap();
        let image = self.pair.path("plain");
        let plain = PlainVolume::export(&cut, &self.pair.key_file(), &image);
        let torn = plain.repair_torn_super_block();
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
                self.assert_whole(&promise.should, &folder, name, &what);
                early += usize::from(promise.from > moment);
            }
        }
        self.check_work(&folder.join("power/.sprat/work"), &what);
        drop(mounted);
        Found {
            replayed: plain.journal.contains("recovering journal"),
            torn,
            early,
        }
    }

    fn cut(&self) -> PathBuf {
        self.pair.path("cut.luks")
    }

    fn assert_whole(&self, should: &Manifest, volume: &Path, name: &str, what: &str) {
        let tree = volume.join("power").join(name);
        let tree = tree.join(self.source.strip_prefix("/").unwrap());
        assert_same(should, &tree, &format!("{what}: {name}"));
    }

    /// The next backup into the file `cut.luks`, which was cut at `moment`.
    fn next_backup(&self, moment: usize, torn: bool, client: Client) {
        let what = format!("the backup after moment {moment} by the client {client:?}");
        let stage = self.stage_at(moment);
        let [state, cache] = ["state", "cache"].map(|name| self.pair.path(name));
        let known = match client {
            Client::AsItWas => [Some(&stage.known), None],
            Client::OfTheEnd => [Some(&state), Some(&cache)],
            Client::New => [None, None],
        };
        for (name, known) in ["next-state", "next-cache"].into_iter().zip(known) {
            let copy = self.pair.path(name);
            let _ = fs::remove_dir_all(&copy);
            if let Some(known) = known.filter(|known| known.exists()) {
                copy_tree(known, &copy);
            }
        }
        let away = self.pair.path("source-of-the-end");
        fs::rename(&self.source, &away).unwrap();
        fs::rename(&stage.source, &self.source).unwrap();
        let should = Manifest::of(&self.source);
        let mut command = self.pair.machine.command();
        command
            .env("SPRAT_STATE_DIR", self.pair.path("next-state"))
            .env("SPRAT_CACHE_DIR", self.pair.path("next-cache"))
            .arg("--key-file")
            .arg(self.pair.key_file())
            // Only what came after the power cut makes it an older state.
            .args(matches!(client, Client::OfTheEnd).then_some("--accept-older-state"))
            .arg("backup")
            .arg(self.cut())
            .args(["--name", "power"])
            .arg(&self.source);
        let output = run_within(&mut command, LIMIT);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{what}: {said}");
        assert!(
            !torn || said.contains("sprat used its copy"),
            "{what}: {said}"
        );
        let image = self.pair.path("plain");
        let plain = PlainVolume::export(&self.cut(), &self.pair.key_file(), &image);
        assert!(!plain.repair_torn_super_block(), "{what}");
        plain.assert_clean();
        let folder = self.pair.path("offline");
        let mounted = plain.mount(&folder);
        let found = snapshots_in(&folder.join("power"));
        let is_new = |name: &&String| !self.promised.contains_key(*name);
        let newest = found.iter().max().filter(is_new);
        let newest = newest.unwrap_or_else(|| panic!("{what}: no new snapshot: {said}"));
        self.assert_whole(&should, &folder, newest, &what);
        for (name, promise) in self
            .promised
            .iter()
            .filter(|(name, _)| found.contains(name))
        {
            self.assert_whole(&promise.should, &folder, name, &what);
        }
        drop(mounted);
        fs::rename(&self.source, &stage.source).unwrap();
        fs::rename(&away, &self.source).unwrap();
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

/// How far a process has read a file that it has open.
fn read_so_far(pid: Pid, file: &Path) -> Option<u64> {
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_pid()));
    let open = fs::read_dir(process.join("fd")).ok()?.flatten();
    let mut at = open
        .filter(|one| fs::read_link(one.path()).is_ok_and(|path| path == file))
        .filter_map(|one| {
            let about = fs::read_to_string(process.join("fdinfo").join(one.file_name())).ok()?;
            about
                .lines()
                .next()?
                .strip_prefix("pos:")?
                .trim()
                .parse()
                .ok()
        });
    at.next()
}

/// All files below a folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(files_below(&entry.path())),
            _ => files.push(entry.path()),
        }
    }
    files
}

/// A copy with all attributes, holes and hard links.
fn copy_tree(from: &Path, to: &Path) {
    let words = [
        "-a".as_ref(),
        "-T".as_ref(),
        from.as_os_str(),
        to.as_os_str(),
    ];
    system("cp", &words);
}

fn is_name(word: &str) -> bool {
    word.starts_with("20") && word.ends_with('Z') && word.contains('T')
}

fn snapshots_in(job: &Path) -> Vec<String> {
    let entries = fs::read_dir(job).into_iter().flatten().flatten();
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
    recorded.change(1);
    recorded.killed_backup();
    recorded.backup();
    recorded.change(2);
    recorded.interrupted_update();
    recorded.backup();
    recorded.prune();

    let log = recorded.recorder.log();
    let count = |wanted: fn(&Op) -> bool| log.iter().filter(|op| wanted(op)).count();
    println!(
        "{} writes, {} fsyncs of single connections, {moments} moments",
        count(|op| matches!(op, Op::Write { .. })),
        count(|op| matches!(op, Op::Synced { .. })),
    );
    let mut at: Vec<usize> = (0..moments).map(|_| recorded.moment(log.len())).collect();
    at.sort_unstable();
    let is_btrfs = file_system == FileSystem::Btrfs;
    let (mut replayed, mut torn, mut early, mut unsure, mut backups) = (0, 0, 0, 0, 0);
    for (number, moment) in (0..).zip(at) {
        power.advance(&log[..moment]).unwrap();
        unsure += u64::from(power.unsure() > 0);
        // Old disks tear a block between its sectors, too.
        let tear = match (number % 4 == 3, is_btrfs) {
            (false, _) => Tear::Blocks,
            (true, false) => Tear::Sectors,
            (true, true) => Tear::SectorsExcept(COPY_OF_SUPER_BLOCK),
        };
        let found = recorded.check(&power, moment, tear, seed ^ number);
        if number % MOMENTS_PER_BACKUP == 1 || found.torn {
            let clients = [Client::AsItWas, Client::OfTheEnd, Client::New];
            recorded.next_backup(moment, found.torn, clients[backups % clients.len()]);
            backups += 1;
        }
        replayed += u64::from(found.replayed);
        torn += u64::from(found.torn);
        early += u64::from(found.early > 0);
    }
    println!(
        "{moments} cuts: {unsure} with writes that were not sure, {replayed} with a journal to \
         replay, {torn} with a torn super block, {early} with a snapshot that was not promised yet; \
         every one clean and whole, and so were {backups} next backups"
    );
    assert!(unsure * 2 > moments, "the moments show too little");
    assert!(
        is_btrfs || replayed * 4 > moments,
        "the moments show too little"
    );
    let is_long = moments > MOMENTS_SHORT;
    assert!(
        !(is_btrfs && is_long) || torn > 0,
        "no super block was torn"
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
        recorded.change(round);
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
        let exit = running.end(LIMIT);
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
