//! Power cuts: the client and the server lose power at one moment, and unsynced writes are lost on both.
//! Stock tools then find the file system clean and finished snapshots intact, and the next backup
//! continues. The cuts are in turn in a container with ext4 and in one with btrfs.
//!
//! `SPRAT_TORTURE_ROUNDS` asks for more cuts (`make torture`); `SPRAT_TORTURE_SEED` repeats a run.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::qemu::guest::{self, Booted};
use sprat_testkit::client_and_server::{ClientAndServer, FileSystem};
use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::power::{Power, keep_percent};
use sprat_testkit::program::system;
use sprat_testkit::recorder::Recorder;
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Cuts in `make test`, and in `make torture`.
const CUTS_SHORT: usize = 2;
const CUTS_LONG: usize = 40;

/// A guest on a busy machine without KVM.
const LIMIT: Duration = Duration::from_secs(900);

/// A container as a cut left it, and what was finished by then.
struct Cut {
    file: String,
    finished: Vec<String>,
}

/// A container whose server is recorded.
struct Recorded {
    file: &'static str,
    recorder: Recorder,
    power: Power,
    /// The snapshots that were finished so far.
    finished: Vec<String>,
    /// How many writes may wait depends on the machine and the file system: some have few of them at a time.
    most: u64,
}

impl Recorded {
    fn new(pair: &ClientAndServer, file: &'static str) -> Self {
        let container = pair.server().join(file);
        let sure = pair.path(format!("{file}.sure"));
        Self {
            file,
            power: Power::begin(&container, &sure).unwrap(),
            recorder: Recorder::start(&pair.server(), file).unwrap(),
            finished: Vec::new(),
            most: 40,
        }
    }

    /// As the scripts in the guest name it.
    fn shown(&self) -> String {
        format!("{}={}", self.file, self.recorder.port())
    }
}

/// The containers of [`ClientAndServer`]; the guest loads what the second one needs by its name.
const CONTAINERS: [&str; 2] = ["laptop.luks", "btrfs.luks"];

#[test]
fn power_cuts_of_client_and_server_leave_snapshots_intact() {
    sprat_testkit::requires!(crate::qemu::missing(), FileSystem::Btrfs.missing());
    let seed = dice::seed();
    let dice = &mut Dice::new(seed);
    let wanted = number("SPRAT_TORTURE_ROUNDS").map_or(CUTS_SHORT, |_| CUTS_LONG);
    let mut pair = ClientAndServer::new();
    pair.init(1);
    let size = pair.choose_size(1).to_string();
    let target = format!("backup.example:{}", CONTAINERS[1]);
    let btrfs = ["init", &target, "--size", &size, "--file-system", "btrfs"];
    pair.ok(&btrfs, Duration::from_secs(120));
    guest::give_keys(&pair);
    guest::give_sprat(&pair);
    let disk = make_disk(&pair, seed);
    let mut recorded = CONTAINERS.map(|file| Recorded::new(&pair, file));

    let mut cuts: Vec<Cut> = Vec::new();
    for round in 1.. {
        if cuts.len() == wanted {
            break;
        }
        assert!(round <= 3 * wanted, "too few backups met their power cut");
        // Each container in each mode.
        let number = cuts.len();
        let mode = ["kernel", "user"][(number + number / 2) % 2];
        let of_it = &mut recorded[number % 2];
        let shown = of_it.shown();
        let script = script(&shown, &shown, round, mode);
        let mut booted = Booted::start(&pair, &script, LIMIT, &disk);
        of_it.finished.push(booted.until("FINISHED ", LIMIT));
        booted.until("BEGIN", LIMIT);
        let unsure = wait_for_unsynced(&mut booted, of_it, 1 + dice.below(of_it.most));
        booted.kill();
        let Some(unsure) = unsure else {
            of_it.most = (of_it.most / 2).max(1);
            continue;
        };
        let mut chance = std::iter::repeat_with(|| dice.any());
        let cut_seed = chance.find(|seed| keep_percent(*seed) < 100).unwrap();
        let lost = of_it
            .recorder
            .cut_power(&mut of_it.power, cut_seed)
            .unwrap();
        let file = of_it.file;
        println!(
            "cut {} of {file} in {mode} mode: {unsure} writes without an fsync, {lost} blocks lost",
            number + 1
        );
        if lost == 0 {
            continue;
        }
        let cut = format!("cut-{}.luks", number + 1);
        let [from, to] = [file, &cut].map(|name| pair.server().join(name).display().to_string());
        system("cp", &["--sparse=always", &from, &to]);
        let finished = of_it.finished.clone();
        cuts.push(Cut {
            file: cut,
            finished,
        });
    }
    complete_and_check(&pair, recorded, &mut cuts, &disk);
    let expected = Expected::on(&pair, &disk);
    check_every_snapshot(&pair, &expected, &cuts);
}

/// What the guest does: completes the backup into each container of `complete`, and begins one into `cut`.
fn script(complete: &str, cut: &str, round: usize, mode: &str) -> String {
    let script = guest::script("guest-power");
    format!("complete='{complete}'\ncut='{cut}'\nround={round}\nmode={mode}\n{script}")
}

/// What the last cuts stopped is completed, too. Then stock tools open each container: journal replay, the newest
/// finished snapshot, `e2fsck -fn`.
fn complete_and_check(
    pair: &ClientAndServer,
    recorded: [Recorded; 2],
    cuts: &mut Vec<Cut>,
    disk: &Path,
) {
    let mut lines = String::new();
    for cut in cuts.iter() {
        let _ = writeln!(lines, "{} {}", cut.file, cut.finished.last().unwrap());
    }
    guest::give(pair, "cuts", lines, 0o600);
    let [one, other] = recorded.each_ref().map(Recorded::shown);
    let complete = script(&format!("{one} {other}"), "", 99, "kernel");
    let script = complete + "\n" + &guest::server(pair) + &guest::script("guest-check");
    let mut booted = Booted::start(pair, &script, LIMIT, disk);
    for mut of_it in recorded {
        of_it.finished.push(booted.until("FINISHED ", LIMIT));
        cuts.push(Cut {
            file: of_it.file.to_owned(),
            finished: of_it.finished,
        });
    }
    booted.until("CHECKED", LIMIT);
    let right = booted
        .said
        .iter()
        .filter(|line| line.ends_with("are right"));
    let right: Vec<&String> = right.inspect(|line| println!("{line}")).collect();
    assert_eq!(right.len(), cuts.len(), "{:#?}", booted.said);
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
fn wait_for_unsynced(booted: &mut Booted, recorded: &mut Recorded, wanted: u64) -> Option<usize> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        recorded.power.advance(&recorded.recorder.log()).unwrap();
        let unsure = recorded.power.unsure();
        if unsure as u64 >= wanted {
            return Some(unsure);
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
        let folder = pair.path("expected");
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
