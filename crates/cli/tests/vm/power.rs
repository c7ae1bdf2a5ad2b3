//! Power cuts: the client and the server lose power at one moment, and unsynced writes are lost on both.
//! Stock tools then find the file system clean and finished snapshots intact, and the next backup
//! continues.
//!
//! `SPRAT_TORTURE_ROUNDS` asks for more cuts (`make torture`); `SPRAT_TORTURE_SEED` repeats a run.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::qemu::guest::{self, Booted};
use sprat_testkit::client_and_server::ClientAndServer;
use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::power::{Power, keep_percent};
use sprat_testkit::program::system;
use sprat_testkit::recorder::Recorder;
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Cuts in `make test`, and in `make torture`.
const CUTS_SHORT: u64 = 1;
const CUTS_LONG: u64 = 20;

/// A guest on a busy machine without KVM.
const LIMIT: Duration = Duration::from_secs(900);

/// A container as a cut left it, and what was finished by then.
struct Cut {
    file: String,
    finished: Vec<String>,
}

#[test]
fn power_cuts_of_client_and_server_leave_snapshots_intact() {
    sprat_testkit::requires!(crate::qemu::missing());
    let seed = dice::seed();
    let dice = &mut Dice::new(seed);
    let wanted = number("SPRAT_TORTURE_ROUNDS").map_or(CUTS_SHORT, |_| CUTS_LONG);
    let mut pair = ClientAndServer::new();
    pair.init(1);
    guest::give_keys(&pair);
    guest::give_sprat(&pair);
    let disk = make_disk(&pair, seed);
    let mut power = Power::begin(&pair.container(), &pair.path("sure")).unwrap();
    let recorder = Recorder::start(&pair.server(), "laptop.luks").unwrap();

    let mut cuts: Vec<Cut> = Vec::new();
    let mut finished = Vec::new();
    // How many writes may wait depends on the machine: a quick one has few of them at a time.
    let mut most = 40;
    for round in 1.. {
        if cuts.len() as u64 == wanted {
            break;
        }
        assert!(round <= 3 * wanted, "too few backups met their power cut");
        let mode = ["kernel", "user"][usize::from(round % 2 == 0)];
        let mut booted = Booted::start(&pair, &script(&recorder, round, mode), LIMIT, &disk);
        finished.push(booted.until("FINISHED ", LIMIT));
        booted.until("BEGIN", LIMIT);
        let unsure = wait_for_unsynced(&mut booted, &recorder, &mut power, 1 + dice.below(most));
        booted.kill();
        let Some(unsure) = unsure else {
            most = (most / 2).max(1);
            continue;
        };
        let mut chance = std::iter::repeat_with(|| dice.any());
        let cut_seed = chance.find(|seed| keep_percent(*seed) < 100);
        let lost = recorder.cut_power(&mut power, cut_seed.unwrap()).unwrap();
        let number = cuts.len() + 1;
        println!(
            "cut {number} in {mode} mode: {unsure} writes without an fsync, {lost} blocks lost"
        );
        if lost == 0 {
            continue;
        }
        let file = format!("cut-{number}.luks");
        let copy = pair.server().join(&file);
        let (from, to) = (pair.container(), copy.display().to_string());
        system("cp", &["--sparse=always", &from.display().to_string(), &to]);
        let finished = finished.clone();
        cuts.push(Cut { file, finished });
    }
    // What the last cut stopped is completed, too.
    let mut booted = Booted::start(&pair, &script(&recorder, 99, "kernel"), LIMIT, &disk);
    finished.push(booted.until("FINISHED ", LIMIT));
    booted.kill();
    let file = "laptop.luks".to_owned();
    cuts.push(Cut { file, finished });
    drop(recorder);

    let expected = Expected::on(&pair, &disk);
    check_with_stock_tools(&pair, &expected, &cuts);
    check_every_snapshot(&pair, &expected, &cuts);
}

fn script(recorder: &Recorder, round: u64, mode: &str) -> String {
    let port = recorder.port();
    let script = guest::script("guest-power");
    format!("recorder={port}\nround={round}\nmode={mode}\n{script}")
}

/// The guest's own disk, an ext4 with the key file and a source on it.
fn make_disk(pair: &ClientAndServer, seed: u64) -> PathBuf {
    let content = pair.path("keep");
    let shape = Shape {
        small_files: 60,
        middle_files: 4,
        large_files: 0,
    };
    source_tree::make(&content.join("source"), shape, seed);
    fs::copy(pair.key_file(), content.join("key")).unwrap();
    let disk = pair.path("keep.img");
    fs::File::create(&disk).unwrap().set_len(512 << 20).unwrap();
    let (content, image) = (content.display().to_string(), disk.display().to_string());
    system("mke2fs", &["-q", "-t", "ext4", "-d", &content, &image]);
    disk
}

/// Waits until so many writes are not sure; how many there were. `None` if the backup ended first.
fn wait_for_unsynced(
    booted: &mut Booted,
    recorder: &Recorder,
    power: &mut Power,
    wanted: u64,
) -> Option<usize> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        power.advance(&recorder.log()).unwrap();
        if power.unsure() as u64 >= wanted {
            return Some(power.unsure());
        }
        if booted.has_said("ENDED") {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the backup neither sends nor ends: {:#?}", booted.said);
}

/// The content of each finished snapshot, as the guest saw its source.
struct Expected(PathBuf);

impl Expected {
    /// Reads it from the guest's disk.
    fn on(pair: &ClientAndServer, disk: &Path) -> Self {
        let folder = pair.path("overlay/expected");
        fs::create_dir_all(&folder).unwrap();
        let mounted = pair.path("keep-mounted");
        fs::create_dir(&mounted).unwrap();
        let paths = [disk, &mounted].map(|path| path.display().to_string());
        system("mount", &["-o", "loop", &paths[0], &paths[1]]);
        let copied = Command::new("cp")
            .arg("-r")
            .arg(mounted.join("expected/."))
            .arg(&folder)
            .status();
        system("umount", &[&mounted]);
        assert!(copied.unwrap().success());
        Self(folder)
    }

    fn of(&self, snapshot: &str) -> Vec<u8> {
        fs::read(self.0.join(snapshot)).unwrap()
    }
}

/// On a stock kernel: journal replay, the newest finished snapshot, `e2fsck -fn`.
fn check_with_stock_tools(pair: &ClientAndServer, expected: &Expected, cuts: &[Cut]) {
    let mut lines = String::new();
    for cut in cuts {
        let newest = cut.finished.last().unwrap();
        assert!(!expected.of(newest).is_empty());
        let _ = writeln!(lines, "{} {newest}", cut.file);
    }
    guest::give(pair, "cuts", lines, 0o600);
    guest::give(pair, "key", fs::read(pair.key_file()).unwrap(), 0o600);
    let script = guest::server(pair) + &guest::script("guest-check");
    let said = guest::run(pair, &script, LIMIT);
    println!("{said}");
    let clean = said
        .lines()
        .filter(|line| line.ends_with("-fn clean"))
        .count();
    assert_eq!(clean, cuts.len(), "{said}");
}

/// Decrypted offline: every snapshot that was finished before each cut.
fn check_every_snapshot(pair: &ClientAndServer, expected: &Expected, cuts: &[Cut]) {
    for cut in cuts {
        let image = pair.path("plain");
        let plain = PlainVolume::export(&pair.server().join(&cut.file), &pair.key_file(), &image);
        plain.assert_clean();
        let folder = pair.path("offline");
        let mounted = plain.mount(&folder);
        for name in &cut.finished {
            let tree = folder.join("power").join(name).join("keep/source");
            let listing = crate::qemu::tool("listing").arg(&tree).output().unwrap();
            assert!(
                listing.stdout == expected.of(name),
                "{}: {name} is not what it was; see {}",
                cut.file,
                String::from_utf8_lossy(&listing.stderr),
            );
        }
        drop(mounted);
    }
}
