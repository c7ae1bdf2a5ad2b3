//! Breaks the connection of backups and restores, again and again, in every way, and compares each
//! result.
//!
//! `SPRAT_TORTURE_ROUNDS` asks for the long form (`make torture`): twice as many losses as rounds,
//! on the source-like tree of 5,000 files. `SPRAT_TORTURE_SEED` repeats a run. Losses are triggered
//! by bytes in flight. Every run must end by itself, with success, and its result must be identical
//! to the source.
//!
//! Two times are shorter than in life, by the same rules: ssh detects a silent connection after 3 s
//! instead of 45 (`ServerAliveInterval=1`), and the quiet time is 4 s instead of 60. Nothing arrives
//! later than 2 s after a loss.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use sprat_testkit::client_and_server::{self, ClientAndServer, FileSystem};
use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::running::{Reported, Running};
use sprat_testkit::source_tree;
use sprat_testkit::wire::{Door, Loss, Wire, WireOptions};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Losses and files of the short form, in `make test`.
const SHORT: (u32, u64) = (4, 500);
/// Files of the long form.
const FILES_LONG: u64 = 5000;
/// Runs into one container, before a fresh one.
const ROUNDS_OF_ONE_CONTAINER: u32 = 6;
/// Longest time from a loss to the new connection, on a busy machine.
const MENDED_WITHIN: Duration = Duration::from_secs(120);

const QUICK: [&str; 2] = ["--quiet-time", "4"];

/// How the connection is lost; a third of the losses are silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Silent,
    Reset,
    SilentLate,
    ResetLate,
    SilentAndUnreachable,
    OneConnection,
    ServerKilled,
    Unreachable,
    SshdRestarted,
}

const KINDS: [Kind; 9] = [
    Kind::Silent,
    Kind::Reset,
    Kind::OneConnection,
    Kind::SilentLate,
    Kind::ResetLate,
    Kind::ServerKilled,
    Kind::SilentAndUnreachable,
    Kind::Unreachable,
    Kind::SshdRestarted,
];

impl Kind {
    fn is_stall(self) -> bool {
        matches!(
            self,
            Self::Silent | Self::SilentLate | Self::SilentAndUnreachable
        )
    }
}

/// What has been lost so far.
#[derive(Default)]
struct Log {
    /// The kind that the first loss has: the short form has not one of each.
    first: u64,
    /// Cuts, also those that cost nothing.
    tries: u32,
    losses: u32,
    with_unsynced: u32,
    stalls: u32,
    of_kind: BTreeMap<String, u32>,
    longest: Duration,
}

struct Torture {
    pair: ClientAndServer,
    dice: Dice,
    source: PathBuf,
    finished: BTreeMap<String, Manifest>,
}

#[test]
fn repeated_connection_losses_cost_only_time() {
    repeated_connection_losses(FileSystem::Ext4);
}

#[test]
fn repeated_connection_losses_cost_only_time_on_btrfs() {
    repeated_connection_losses(FileSystem::Btrfs);
}

fn repeated_connection_losses(file_system: FileSystem) {
    sprat_testkit::requires!(client_and_server::missing(), file_system.missing());
    let rounds = number("SPRAT_TORTURE_ROUNDS");
    let seed = dice::seed();
    let (losses, files) = rounds.map_or(SHORT, |rounds| {
        (u32::try_from(2 * rounds).unwrap(), FILES_LONG)
    });
    println!("{losses} losses, {files} files");

    let mut dice = Dice::new(seed);
    let mut log = Log {
        first: seed,
        ..Log::default()
    };
    let mut torture = Torture::new(dice.any(), files, file_system);
    for round in 1.. {
        if log.losses >= losses {
            break;
        }
        assert!(round <= losses, "too many runs end before their losses");
        if round % ROUNDS_OF_ONE_CONTAINER == 0 {
            torture.check_offline();
            torture = Torture::new(dice.any(), files, file_system);
        }
        let in_backup = if rounds.is_some() { 8 } else { 3 };
        let in_restore = in_backup / 4 + u32::from(in_backup < 4);
        torture.backup(round, in_backup.min(losses - log.losses), &mut log);
        torture.restore(in_restore.min(losses - log.losses), &mut log);
    }
    torture.check_offline();
    log.tell();
    assert!(log.with_unsynced * 2 >= log.losses);
    assert!(log.stalls > 0, "one of them silent");
    if rounds.is_some() {
        assert!(log.with_unsynced * 10 >= log.losses * 7);
        assert!(log.stalls * 10 >= log.losses * 3, "a third of them silent");
    }
}

impl Log {
    fn tell(&self) {
        println!(
            "{} losses, {} with unsynced writes, {} stalls without a reset; longest {:.1?}",
            self.losses, self.with_unsynced, self.stalls, self.longest
        );
        for (kind, times) in &self.of_kind {
            println!("  {times:3} times {kind}");
        }
    }
}

impl Torture {
    /// A new container, and a source.
    fn new(seed: u64, files: u64, file_system: FileSystem) -> Self {
        let mut pair = ClientAndServer::through_wire(WireOptions {
            round_trip: Duration::from_millis(20),
            bytes_per_s: Some(12_500_000),
        });
        pair.init_with(4, file_system);
        let source = pair.path("source");
        source_tree::make_source_like(&source, files, seed);
        Self {
            pair,
            dice: Dice::new(seed ^ 0x11fe),
            source,
            finished: BTreeMap::new(),
        }
    }

    fn backup(&mut self, round: u32, losses: u32, log: &mut Log) {
        source_tree::change_source_like(&self.source, &mut self.dice, round.into());
        let now = Manifest::of(&self.source);
        // Snapshots are named by the second.
        std::thread::sleep(Duration::from_millis(1100));
        let source = self.source.display().to_string();
        let arguments = ["backup", self.pair.target(), "--name", "line", &source];
        self.run_with_losses(&arguments, losses, log);
        let newest = self.newest_snapshot();
        assert!(
            self.finished.insert(newest, now).is_none(),
            "a new snapshot"
        );
    }

    fn restore(&mut self, losses: u32, log: &mut Log) {
        let to = self.pair.path("restored/line");
        let shown = to.display().to_string();
        let arguments = ["restore", self.pair.target(), "line", "--to", &shown];
        // Not one block may come from this machine.
        let arguments = [&["--no-cache"][..], &arguments].concat();
        self.run_with_losses(&arguments, losses, log);
        let (name, should) = self.finished.iter().next_back().unwrap();
        let restored = to.join(self.source.strip_prefix("/").unwrap());
        assert_same(should, &restored, &format!("restored {name}"));
        std::fs::remove_dir_all(to).unwrap();
    }

    /// Runs sprat to its end, with up to `losses` on the way.
    fn run_with_losses(&mut self, arguments: &[&str], losses: u32, log: &mut Log) {
        let mut command = self.pair.sprat();
        command
            .args(QUICK)
            .args(["--json", "--progress-interval", "0.02"])
            .args(arguments);
        let mut running = Running::start(&mut command);
        let reads_only = arguments.contains(&"restore");
        for _ in 0..losses {
            if !self.lose_once(&mut running, reads_only, log) {
                break;
            }
        }
        let exit = running.end(Duration::from_secs(240));
        assert_eq!(exit, Some(0), "{arguments:?}: {:#?}", running.said);
        self.pair.assert_nothing_is_left();
        println!(
            "    {} ended by itself after {:.1?}",
            arguments
                .iter()
                .find(|word| !word.starts_with('-'))
                .unwrap(),
            running.begun.elapsed()
        );
    }

    /// Waits for bytes in flight, breaks the connection, and waits until it is back; false where the run
    /// ended before.
    fn lose_once(&mut self, running: &mut Running, reads_only: bool, log: &mut Log) -> bool {
        let unsynced = match self.dice.below(4) {
            0 => 1,
            _ => 1 + self.dice.below(3 << 20),
        };
        // A restore has no unsynced bytes: there it is what came from the server.
        let moved = |line: &Wire| {
            if reads_only {
                line.bytes().1
            } else {
                line.bytes().0
            }
        };
        let more = (64 << 10) + self.dice.below(3 << 20);
        let before = moved(self.pair.connection());
        let pair = &self.pair;
        let due = running.until(Duration::from_secs(120), "bytes in flight", |seen| {
            let open = matches!(
                seen.phase.as_str(),
                "working" | "unmounting" | "syncing" | "stopping"
            );
            let in_flight = reads_only || seen.unsynced_bytes >= unsynced;
            open && in_flight && moved(pair.connection()) - before >= more
        });
        if !due {
            return false;
        }
        let turn = log.first.wrapping_add(u64::from(log.tries)) % KINDS.len() as u64;
        let kind = KINDS[usize::try_from(turn).unwrap()];
        log.tries += 1;
        let (seen, after) = (running.reported.clone(), running.begun.elapsed());
        let away = self.lose(kind);
        let is_noticed = |now: &Reported| now.losses > seen.losses;
        let noticed = if kind == Kind::OneConnection {
            // One that is still being opened is done without.
            let noticed = running.within(Duration::from_secs(8), is_noticed);
            if noticed.is_none() {
                println!("one connection less in {} after {after:.1?}", seen.phase);
                return true;
            }
            noticed == Some(true)
        } else {
            running.until(MENDED_WITHIN, "the loss is noticed", is_noticed)
        };
        self.come_back(away);
        if !noticed {
            // All was done but for the last words.
            return false;
        }
        let back = running.until(MENDED_WITHIN, "the line is back", |now| !now.away);
        let took = running.begun.elapsed() - after;
        log.losses += 1;
        log.with_unsynced += u32::from(seen.unsynced_bytes > 0);
        log.stalls += u32::from(kind.is_stall());
        log.longest = log.longest.max(took);
        *log.of_kind.entry(format!("{kind:?}")).or_default() += 1;
        println!(
            "loss {}: {kind:?} in {} after {after:.1?}, {} bytes unsynced, back after {took:.1?}",
            log.losses, seen.phase, seen.unsynced_bytes
        );
        back
    }

    /// Breaks the connection; returns for how long the server stays unreachable.
    fn lose(&mut self, kind: Kind) -> Duration {
        let late = Duration::from_millis(self.dice.below(2000));
        let nth = usize::try_from(self.dice.below(8)).unwrap();
        let away = Duration::from_millis(500 + self.dice.below(4000));
        let line = self.pair.connection();
        match kind {
            Kind::Silent => line.lose(Loss::Silent),
            Kind::SilentLate => line.lose(Loss::SilentLate(late)),
            Kind::Reset => line.lose(Loss::Reset),
            Kind::ResetLate => line.lose(Loss::ResetLate(late)),
            Kind::OneConnection => drop(line.lose_one(nth, Loss::Reset)),
            Kind::ServerKilled => self.pair.sshd.kill_sessions(),
            Kind::SshdRestarted => {
                self.pair.sshd.restart().unwrap();
            }
            Kind::Unreachable => {
                line.door(Door::Refusing);
                line.lose(Loss::Reset);
                return away;
            }
            Kind::SilentAndUnreachable => {
                line.door(Door::Silent);
                line.lose(Loss::Silent);
                return away;
            }
        }
        Duration::ZERO
    }

    fn come_back(&self, away: Duration) {
        std::thread::sleep(away);
        self.pair.connection().door(Door::Open);
        // A client that connected meanwhile gets no answer until it tries again.
    }

    fn newest_snapshot(&self) -> String {
        let output = self
            .pair
            .ok(&["snapshots", self.pair.target()], Duration::from_secs(60));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = text
            .split_whitespace()
            .filter(|word| word.starts_with("20") && word.ends_with('Z') && word.contains('T'));
        names.max().expect("a snapshot").to_owned()
    }

    /// Decrypts the container as the server has it and checks every snapshot in it.
    fn check_offline(&self) {
        let image = self.pair.path("plain");
        let plain = PlainVolume::export(&self.pair.container(), &self.pair.key_file(), &image);
        plain.assert_clean();
        let folder = self.pair.path("offline");
        let mounted = plain.mount(&folder);
        for (name, should) in &self.finished {
            let tree = folder
                .join("line")
                .join(name)
                .join(self.source.strip_prefix("/").unwrap());
            assert_same(should, &tree, &format!("snapshot {name}"));
        }
        drop(mounted);
    }
}
