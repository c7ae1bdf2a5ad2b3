//! Kills the processes of a backup with -9, again and again, and checks what is left each time.
//!
//! `SPRAT_TORTURE_ROUNDS` asks for the long form (`make torture`: 100 rounds), `SPRAT_TORTURE_SEED`
//! repeats a run. A round: change the source, begin a backup over loopback ssh, wait for a chosen
//! number of unsynced bytes (or a phase), kill. Then nothing may be mounted, looped or running, the
//! volume must be clean after its journal's replay, every finished snapshot must be intact, and the
//! next run must finish.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use sprat_testkit::client_and_server::{self, ClientAndServer, FileSystem};
use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::running::{Reported, Running};
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Rounds of the short form, in `make test`.
const ROUNDS_SHORT: u32 = 4;
/// From here on the share of rounds with unsynced bytes is part of the test.
const ROUNDS_LONG: u32 = 50;
/// A fresh container after so many rounds: the offline check reads all that was ever written.
const ROUNDS_OF_ONE_CONTAINER: u32 = 20;

/// Which processes of the session are killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Session,
    VolumeProcess,
    /// The worker that the session started, outside of the namespaces.
    WorkerOuter,
    /// Its copy inside of them, which has the mounts.
    WorkerInner,
    Rsync,
    Ssh,
    /// On the server's side.
    SftpServer,
    Everything,
}

const VICTIMS: [Victim; 8] = [
    Victim::Session,
    Victim::VolumeProcess,
    Victim::WorkerOuter,
    Victim::WorkerInner,
    Victim::Rsync,
    Victim::Ssh,
    Victim::SftpServer,
    Victim::Everything,
];

/// When it is killed.
#[derive(Debug, Clone)]
enum Moment {
    /// As soon as so many bytes are out or waiting without an fsync behind them.
    Unsynced(u64),
    /// This long after the session reports this phase.
    Phase(&'static str, Duration),
}

/// One killed backup.
#[derive(Debug)]
struct Killed {
    victim: Victim,
    seen: Reported,
    /// The session ended by itself before the moment came.
    too_late: bool,
    exit: Option<i32>,
    took: Duration,
}

struct Torture {
    pair: ClientAndServer,
    dice: Dice,
    /// Finished snapshots and what is in them.
    finished: BTreeMap<String, Manifest>,
    source: PathBuf,
    /// Offline checks that found a journal to replay.
    journals_replayed: u32,
}

#[test]
fn kill_9_at_any_moment_loses_no_finished_snapshot_and_leaves_nothing() {
    kill_9_at_any_moment(FileSystem::Ext4);
}

#[test]
fn kill_9_at_any_moment_loses_no_finished_snapshot_on_btrfs() {
    kill_9_at_any_moment(FileSystem::Btrfs);
}

fn kill_9_at_any_moment(file_system: FileSystem) {
    sprat_testkit::requires!(client_and_server::missing(), file_system.missing());
    let rounds: u32 =
        number("SPRAT_TORTURE_ROUNDS").map_or(ROUNDS_SHORT, |rounds| rounds.try_into().unwrap());
    let seed = dice::seed();

    let mut dice = Dice::new(seed);
    let mut torture = Torture::new(dice.any(), file_system);
    // The short form has not a round for each.
    let first = usize::try_from(seed % VICTIMS.len() as u64).unwrap();
    let mut with_unsynced = 0;
    let mut killed_in_time = 0;
    let mut journals_replayed = 0;
    let mut summary = BTreeMap::<String, u32>::new();
    for round in 1..=rounds {
        if round > 1 && (round - 1) % ROUNDS_OF_ONE_CONTAINER == 0 {
            journals_replayed += torture.journals_replayed;
            torture = Torture::new(dice.any(), file_system);
        }
        let victim = VICTIMS[(first + round as usize - 1) % VICTIMS.len()];
        let moment = choose_moment(victim, &mut dice);
        let killed = torture.round(round, victim, &moment);
        if !killed.too_late {
            killed_in_time += 1;
            with_unsynced += u32::from(killed.seen.unsynced_bytes > 0);
            *summary
                .entry(format!("{:?} in {}", killed.victim, killed.seen.phase))
                .or_default() += 1;
        }
    }
    torture.check_offline("at the end");
    journals_replayed += torture.journals_replayed;

    println!(
        "{rounds} rounds, {killed_in_time} killed in time, {with_unsynced} with unsynced bytes, \
         {journals_replayed} with a journal to replay"
    );
    for (what, times) in summary {
        println!("  {times:3} times {what}");
    }
    assert!(
        killed_in_time * 2 >= rounds,
        "too many backups ended before their moment"
    );
    if rounds >= ROUNDS_LONG {
        assert!(
            killed_in_time * 10 >= rounds * 7,
            "too many backups ended before their moment"
        );
        assert!(
            with_unsynced * 10 >= rounds * 7,
            "too few rounds with unsynced bytes"
        );
    }
}

/// Mostly by bytes in flight; sometimes in a phase where there may be none.
fn choose_moment(victim: Victim, dice: &mut Dice) -> Moment {
    if victim == Victim::Rsync {
        // It is done with so little long before all of it has left the page cache.
        return Moment::Phase("working", Duration::from_millis(dice.below(120)));
    }
    match dice.below(10) {
        0 => {
            let phases = [
                "connecting",
                "unlocking",
                "mounting",
                "working",
                "unmounting",
                "syncing",
            ];
            let pick = usize::try_from(dice.below(6)).expect("small");
            Moment::Phase(phases[pick], Duration::from_millis(dice.below(60)))
        }
        1..=3 => Moment::Unsynced(1 + dice.below(1 << 20)),
        _ => Moment::Unsynced(1 + dice.below(24 << 20)),
    }
}

impl Torture {
    /// A new container with one finished snapshot, of a tree with sparse-tailed files.
    fn new(seed: u64, file_system: FileSystem) -> Self {
        let mut pair = ClientAndServer::new();
        let source = pair.path("source");
        let shape = Shape {
            small_files: 600,
            middle_files: 60,
            large_files: 0,
        };
        source_tree::make(&source, shape, seed);
        pair.init_with(8, file_system);
        let mut torture = Self {
            pair,
            dice: Dice::new(seed ^ 0x5eed),
            finished: BTreeMap::new(),
            source,
            journals_replayed: 0,
        };
        torture.finish("the first run");
        torture
    }

    fn round(&mut self, round: u32, victim: Victim, moment: &Moment) -> Killed {
        self.change_source(round);
        let now = Manifest::of(&self.source);
        let killed = self.kill_a_backup(victim, moment);
        self.pair.assert_nothing_is_left();
        println!(
            "round {round}: {:?} at {moment:?}: {} phase {}, {} bytes unsynced, session exit {:?} after {:.1?}",
            killed.victim,
            if killed.too_late { "too late," } else { "" },
            killed.seen.phase,
            killed.seen.unsynced_bytes,
            killed.exit,
            killed.took,
        );
        // A victim that isn't the session need not stop the run: it reconnects.
        let begun = Instant::now();
        if killed.exit == Some(0) {
            let name = self.newest_finished_snapshot(&format!("round {round}"));
            self.finished.insert(name, now);
        } else {
            self.check_offline(&format!("round {round}"));
        }
        let checked = begun.elapsed();
        self.finish(&format!("the run after round {round}"));
        println!(
            "    checked in {checked:.1?}, next run and check in {:.1?}",
            begun.elapsed() - checked
        );
        killed
    }

    /// Rewrites some files, adds some and removes some; about 40 MiB, so that a run has bytes in
    /// flight for a while. Sparse tails and small files are among them.
    fn change_source(&mut self, round: u32) {
        let folder = self.source.join(format!("round {round}"));
        fs::create_dir(&folder).unwrap();
        for number in 0..3 {
            fs::write(
                folder.join(format!("large {number}")),
                source_tree::random(&mut self.dice, 12 << 20),
            )
            .unwrap();
        }
        for number in 0..100 {
            let len = self.dice.below(20_000);
            fs::write(
                folder.join(format!("small {number}")),
                source_tree::random(&mut self.dice, len),
            )
            .unwrap();
        }
        let sparse = fs::File::create(folder.join("sparse tail")).unwrap();
        sparse
            .write_all_at(&source_tree::random(&mut self.dice, 300_000), 1 << 20)
            .unwrap();
        sparse
            .set_len((40 << 20) + self.dice.below(10_000))
            .unwrap();
        // Old files with new content of the same length: only the times differ.
        for number in 0..5 {
            let path = self.source.join(format!("middle/000/middle file {number}"));
            let len = fs::metadata(&path).unwrap().len();
            fs::write(&path, source_tree::random(&mut self.dice, len)).unwrap();
        }
        if round > 2 {
            let _ = fs::remove_dir_all(self.source.join(format!("round {}", round - 2)));
        }
    }

    fn kill_a_backup(&self, victim: Victim, moment: &Moment) -> Killed {
        let mut running = self.begin_backup();
        let limit = Duration::from_secs(120);
        let mut too_late = !match *moment {
            Moment::Unsynced(bytes) => running.until(limit, "bytes in flight", |seen| {
                seen.unsynced_bytes >= bytes
            }),
            Moment::Phase(phase, later) => {
                let came = running.until(limit, phase, |seen| seen.phase == phase);
                if came {
                    std::thread::sleep(later);
                    running.catch_up();
                }
                came
            }
        };
        // Not every victim is there in every phase: the first moment that it is.
        while !too_late && self.kill(victim, &running.child) == 0 {
            let ended = running.child.try_wait();
            too_late = ended.expect("a child can be waited for").is_some();
            running.catch_up();
        }
        let seen = running.reported.clone();
        let exit = running.end(Duration::from_secs(90));
        Killed {
            victim,
            seen,
            too_late,
            exit,
            took: running.begun.elapsed(),
        }
    }

    fn begin_backup(&self) -> Running {
        let mut command = self.pair.sprat();
        command
            .args(QUICK)
            .args(["--json", "--progress-interval", "0.01"])
            .args(["backup", self.pair.target(), "--name", "torture"])
            .arg(&self.source);
        Running::start(&mut command)
    }

    /// Sends SIGKILL to whom `victim` names; returns to how many.
    fn kill(&self, victim: Victim, session: &Child) -> usize {
        let session_pid = i32::try_from(session.id()).expect("a pid");
        let ours = self.pair.processes();
        // The hidden subcommand is the second word: `sprat worker …`.
        let with = |word: &str| -> Vec<i32> {
            let of_kind = ours
                .iter()
                .filter(|process| process.words.get(1).is_some_and(|second| second == word));
            of_kind.map(|process| process.pid).collect()
        };
        let program = |name: &str| -> Vec<i32> {
            let runs = |line: &[String]| {
                line.first()
                    .is_some_and(|first| Path::new(first).file_name() == Some(name.as_ref()))
            };
            let of_kind = ours.iter().filter(|process| runs(&process.words));
            of_kind.map(|process| process.pid).collect()
        };
        let pids = match victim {
            Victim::Session => vec![session_pid],
            Victim::VolumeProcess => with("volume-process"),
            Victim::WorkerOuter => with("worker").into_iter().take(1).collect(),
            Victim::WorkerInner => with("worker").into_iter().skip(1).collect(),
            Victim::Rsync => program("rsync"),
            Victim::Ssh => program("ssh"),
            Victim::SftpServer => self.pair.sshd.sftp_server_pids(),
            Victim::Everything => ours.iter().map(|process| process.pid).collect(),
        };
        let hit = pids.into_iter().filter(|pid| {
            rustix::process::Pid::from_raw(*pid).is_some_and(|pid| {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
            })
        });
        hit.count()
    }

    /// Runs a backup to its end, and records the content of its snapshot.
    fn finish(&mut self, what: &str) {
        // Snapshots are named by the second.
        std::thread::sleep(Duration::from_millis(1100));
        let mut arguments: Vec<_> = QUICK.iter().map(|word| (*word).to_owned()).collect();
        arguments.extend(["backup", self.pair.target(), "--name", "torture"].map(str::to_owned));
        arguments.push(self.source.display().to_string());
        self.pair.ok(&arguments, Duration::from_secs(150));
        self.pair.assert_nothing_is_left();
        let name = self.newest_finished_snapshot(what);
        self.finished.insert(name, Manifest::of(&self.source));
    }

    /// Asks sprat for the newest snapshot that wasn't there before.
    fn newest_finished_snapshot(&self, what: &str) -> String {
        let output = self
            .pair
            .ok(&["snapshots", self.pair.target()], Duration::from_secs(60));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_name =
            |word: &str| word.starts_with("20") && word.ends_with('Z') && word.contains('T');
        let newest = text.split_whitespace().filter(|word| is_name(word)).max();
        let newest = newest.unwrap_or_else(|| panic!("{what}: no snapshot in {text}"));
        assert!(
            !self.finished.contains_key(newest),
            "{what}: no new snapshot in {text}"
        );
        newest.to_owned()
    }

    /// Decrypts the container as the server has it, replays the journal, and checks everything.
    fn check_offline(&mut self, what: &str) {
        let image = self.pair.path("plain");
        let plain = PlainVolume::export(&self.pair.container(), &self.pair.key_file(), &image);
        self.journals_replayed += u32::from(plain.journal.contains("recovering journal"));
        plain.assert_clean();
        let folder = self.pair.path("offline");
        let mounted = plain.mount(&folder);
        let inside = self.source.strip_prefix("/").unwrap();
        // The newest ones, and the very first: a damage to an old one shows there.
        let newest = self.finished.iter().rev().take(2);
        for (name, should) in newest.chain(self.finished.iter().take(1)) {
            let tree = folder.join("torture").join(name).join(inside);
            assert_same(should, &tree, &format!("{what}: snapshot {name}"));
        }
        drop(mounted);
    }
}

/// The server's processes are known to be gone here, or die with the connection within a second.
const QUICK: [&str; 2] = ["--quiet-time", "1"];
