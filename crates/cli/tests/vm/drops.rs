//! The disk of an agent's server drops out while a client writes garbage over a used container, and comes back: within
//! one boot, or after a power cut. What was not flushed is lost, in any order. Every state that was known then is what
//! it was, and stock tools open those from before.
//!
//! `make test` has five cuts and one drop.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use sprat_testkit::client_and_server::ClientAndServer;
use sprat_testkit::dice::{self, Dice};
use sprat_testkit::needs;
use sprat_testkit::power::keep_percent;
use sprat_testkit::program::system;

use crate::agent::{Kept, agent};
use crate::qemu::guest::{self, Booted};

/// Every session begins a generation. While garbage is written, a random moment does, too.
const POLICY: &str =
    "new = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\non_alarm = note\n";
const LATER: &str = "secret = 3s";
const CUTS_OF_A_BOOT: u64 = 25;
const DROPS_OF_A_BOOT: u64 = 25;
const LIMIT: Duration = Duration::from_secs(1200);
const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;
/// Of dm-log-writes.
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

/// A disk of the server with a container of two backups. It is not mounted.
struct Disk {
    kept: Kept,
    image: PathBuf,
    /// The content of known states, by name: checksums.
    known: BTreeMap<String, String>,
}

impl Disk {
    fn new() -> Self {
        let mut image = PathBuf::new();
        let mut kept = Kept::with(POLICY, |pair| {
            image = pair.path("disk.img");
            fs::File::create(&image)
                .unwrap()
                .set_len(512 << 20)
                .unwrap();
            system("mke2fs", &["-q", "-t", "ext4", image.to_str().unwrap()]);
            mount(&image, &pair.server());
            fs::remove_dir(pair.server().join("lost+found")).unwrap();
        });
        let mounted = Mounted(kept.pair.server());
        kept.make_source(20);
        let size = kept.pair.choose_bytes(64 << 20).to_string();
        let init = [
            "--cheap-kdf-for-tests",
            "init",
            kept.pair.target(),
            "--size",
            &size,
        ];
        kept.pair.ok(&init, Duration::from_secs(120));
        kept.give_keys();
        guest::give_command(&kept.pair, &agent());
        let mut known = BTreeMap::new();
        kept.back_up("first");
        for (backup, next) in [("first", "second"), ("second", "third")] {
            fs::write(kept.source().join("new"), next).unwrap();
            kept.back_up(next);
            let name = kept.newest_has(backup, "clean");
            run_agent(&mounted.0, &["pin", "laptop.luks", &name]);
            known.insert(name.clone(), content(&mounted.0, &name));
        }
        fs::write(
            mounted.0.join(".sprat-agent/policy"),
            POLICY.replace("secret = 6h", LATER),
        )
        .unwrap();
        drop(mounted);
        guest::give(&kept.pair, "states", &kept.states, 0o600);
        Self { kept, image, known }
    }

    fn pair(&self) -> &ClientAndServer {
        &self.kept.pair
    }

    fn script(&self, drops: u64) -> String {
        let source = self.kept.source();
        let (past, drop) = (guest::script("guest-past"), guest::script("guest-drops"));
        format!("source={}\ndrops={drops}\n{past}\n{drop}", source.display())
    }

    /// As an administrator finds the disk after its cut; then a session writes.
    fn check(
        &self,
        image: &Path,
        known: &BTreeMap<String, String>,
        gone: &[String],
        dice: &mut Dice,
    ) -> usize {
        let mounted = mounted(self.pair(), image);
        let root = &mounted.0;
        let found = run_agent(root, &["check", "--read-data"]);
        assert!(found.contains("0 findings"), "{found}");
        let list = run_agent(root, &["list"]);
        for (name, sum) in known {
            if !list.contains(name.as_str()) {
                assert!(gone.contains(name), "{name} is missing:\n{list}");
                continue;
            }
            assert!(
                content(root, name) == *sum,
                "{name} is not what it was:\n{list}"
            );
        }
        let there: Vec<_> = known
            .keys()
            .filter(|name| list.contains(name.as_str()))
            .collect();
        let name = there[usize::try_from(dice.below(there.len() as u64)).unwrap()];
        run_agent(root, &["revert", "laptop.luks", name, "--yes"]);
        let live = fs::File::open(root.join("laptop.luks")).unwrap();
        assert_eq!(checksum(live), known[name], "after revert to {name}");
        for name in &there {
            assert!(
                content(root, name) == known[*name],
                "{name} is not what it was after a revert"
            );
        }
        there.len()
    }
}

/// Unmounted on drop.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // A process in a mount namespace of its own may keep it: nothing of it is written later.
        let remount = ["-o".as_ref(), "remount,ro".as_ref(), self.0.as_os_str()];
        system("mount", &remount);
        system("umount", &[&self.0]);
    }
}

fn mount(image: &Path, at: &Path) {
    let words = [
        "-o".as_ref(),
        "loop".as_ref(),
        image.as_os_str(),
        at.as_os_str(),
    ];
    system("mount", &words);
}

fn mounted(pair: &ClientAndServer, image: &Path) -> Mounted {
    let at = pair.path("found");
    fs::create_dir_all(&at).unwrap();
    mount(image, &at);
    Mounted(at)
}

fn run_agent(root: &Path, words: &[&str]) -> String {
    let mut command = Command::new(agent());
    let output = command
        .args(words)
        .arg("--root")
        .arg(root)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words:?}: {output:?}");
    text
}

/// The checksum of a past state.
fn content(root: &Path, name: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("past");
    run_agent(root, &["export", "laptop.luks", name, to.to_str().unwrap()]);
    checksum(fs::File::open(&to).unwrap())
}

fn checksum(file: fs::File) -> String {
    let output = Command::new("sha256sum").stdin(file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// A write or a flush of the recorded disk.
struct Recorded {
    /// Its place in the log.
    at: u64,
    offset: u64,
    data: Range<u64>,
    flushes: bool,
}

/// The format of dm-log-writes: a sector for each entry, then its data.
fn recorded(log: &fs::File) -> Vec<Recorded> {
    let word = |at: u64| -> Option<u64> {
        let mut bytes = [0; 8];
        log.read_exact_at(&mut bytes, at).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    assert_eq!(word(0), Some(MAGIC), "a log of writes");
    assert_eq!(word(24).map(|sector| sector & 0xffff_ffff), Some(SECTOR));
    let mut found = Vec::new();
    let mut at = SECTOR;
    while let (Some(sector), Some(sectors), Some(flags)) = (word(at), word(at + 8), word(at + 16)) {
        // Nothing was written here when the guest was killed.
        if sectors == 0 && flags == 0 {
            break;
        }
        let len = if flags & DISCARD == 0 {
            sectors * SECTOR
        } else {
            0
        };
        let data = at + SECTOR..at + SECTOR + len;
        found.push(Recorded {
            at,
            offset: sector * SECTOR,
            flushes: flags & FLUSH != 0,
            data: data.clone(),
        });
        at = data.end;
    }
    found
}

/// The disk as the recording left it at some moments, each later than the one before.
struct Replay {
    log: fs::File,
    entries: Vec<Recorded>,
    /// All that was written before the entry `done`.
    image: PathBuf,
    done: usize,
}

impl Replay {
    fn new(log: &Path, image: PathBuf) -> Self {
        let log = fs::File::open(log).unwrap();
        Self {
            entries: recorded(&log),
            log,
            image,
            done: 0,
        }
    }

    /// Writes those blocks of an entry that `keeps` chooses; returns how many it did not.
    fn write(&self, disk: &fs::File, entry: usize, mut keeps: impl FnMut() -> bool) -> u64 {
        let entry = &self.entries[entry];
        let mut lost = 0;
        for from in entry.data.clone().step_by(4096) {
            let mut part = vec![0; usize::try_from(BLOCK.min(entry.data.end - from)).unwrap()];
            self.log.read_exact_at(&mut part, from).unwrap();
            if keeps() {
                let at = entry.offset + from - entry.data.start;
                disk.write_all_at(&part, at).unwrap();
            } else {
                lost += 1;
            }
        }
        lost
    }

    fn advance(&mut self, end: usize) {
        let disk = fs::File::options().write(true).open(&self.image).unwrap();
        for entry in self.done..end {
            self.write(&disk, entry, || true);
        }
        self.done = self.done.max(end);
    }

    /// The power is cut before an entry: of what was not flushed any part is lost. Returns how many blocks.
    fn cut(&mut self, end: usize, image: &Path, seed: u64) -> u64 {
        let is_flush = |entry: &Recorded| entry.flushes;
        let flushed = self.entries[..end].iter().rposition(is_flush).unwrap_or(0);
        self.advance(flushed);
        copy(&self.image, image);
        let disk = fs::File::options().write(true).open(image).unwrap();
        let (mut dice, percent) = (Dice::new(seed), keep_percent(seed));
        let unsure = flushed..end;
        unsure
            .map(|entry| self.write(&disk, entry, || dice.percent(percent)))
            .sum()
    }
}

fn copy(from: &Path, to: &Path) {
    let words = ["--sparse=always".as_ref(), from.as_os_str(), to.as_os_str()];
    system("cp", &words);
}

/// What the guest says, and how much was recorded then. It waits meanwhile.
fn listen(log: PathBuf) -> (u16, Receiver<(u64, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (send, said) = channel();
    std::thread::spawn(move || {
        let (mut guest, _) = listener.accept().unwrap();
        let lines = BufReader::new(guest.try_clone().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            let len = fs::metadata(&log).unwrap().len();
            if send.send((len, line)).is_err() || guest.write_all(b"\n").is_err() {
                break;
            }
        }
    });
    (port, said)
}

/// A guest that wrote garbage until its power was cut.
struct Boot {
    /// States, what they are by checksum, and from which place of the log on.
    known: Vec<(u64, String, String)>,
    /// Those may be missing.
    gone: Vec<String>,
}

impl Boot {
    fn new(disk: &Disk, log: &Path, dice: &mut Dice) -> Self {
        let before = disk.pair().path("before.img");
        copy(&disk.image, &before);
        fs::write(log, "").unwrap();
        let options = [
            "--disk".as_ref(),
            disk.image.as_os_str(),
            "--record".as_ref(),
            log.as_os_str(),
        ];
        let (port, said) = listen(log.to_owned());
        let script = format!("port={port}\n{}", disk.script(0));
        let booted = Booted::start_with(disk.pair(), &script, LIMIT, &options);
        let (mut moments, mut gone) = (Vec::new(), Vec::new());
        let mut now = 0;
        while moments.len() < sessions_of_a_boot() {
            let (len, line) = said.recv_timeout(LIMIT).unwrap();
            match line.split_once(' ') {
                None => now = len,
                Some(("KNOWN", name)) => moments.push((now, len, name.to_owned())),
                Some((_, name)) => gone.push(name.to_owned()),
            }
        }
        std::thread::sleep(Duration::from_millis(dice.below(4000)));
        booted.kill();
        gone.extend(
            said.try_iter()
                .filter_map(|(_, line)| Some(line.strip_prefix("GONE ")?.to_owned())),
        );
        // What the container was when nobody wrote.
        let mut replay = Replay::new(log, before);
        let mut known = Vec::new();
        for (now, len, name) in moments {
            replay.advance(replay.entries.partition_point(|entry| entry.at < now));
            let image = disk.pair().path(format!("at-{now}.img"));
            copy(&replay.image, &image);
            let at = mounted(disk.pair(), &image);
            let live = fs::File::open(at.0.join("laptop.luks")).unwrap();
            known.push((len, name, checksum(live)));
            drop(at);
            fs::remove_file(image).unwrap();
        }
        Self { known, gone }
    }
}

fn sessions_of_a_boot() -> usize {
    if rounds().is_some() { 6 } else { 3 }
}

/// The long form has twice as many drops as cuts.
fn rounds() -> Option<u64> {
    dice::number("SPRAT_TORTURE_ROUNDS")
}

#[test]
fn after_power_cuts_and_drops_in_the_midst_of_garbage_every_known_state_is_exact() {
    sprat_testkit::requires!(crate::qemu::missing(), needs::built(&agent()));
    let wanted = rounds().unwrap_or(5);
    let dice = &mut Dice::new(dice::seed());
    let mut disk = Disk::new();
    let (log, sure) = (disk.pair().path("log"), disk.pair().path("sure.img"));
    let (mut cuts, mut states, mut lost) = (0, 0, 0);
    while cuts < wanted {
        copy(&disk.image, &sure);
        let boot = Boot::new(&disk, &log, dice);
        let mut replay = Replay::new(&log, sure.clone());
        let count = replay.entries.len();
        let mut moments: Vec<usize> = (0..CUTS_OF_A_BOOT.min(wanted - cuts))
            .map(|_| 1 + usize::try_from(dice.below(count as u64 - 1)).unwrap())
            .collect();
        moments.sort_unstable();
        let last = moments[moments.len() - 1];
        for end in moments {
            let image = disk.pair().path(format!("cut-{cuts}.img"));
            let blocks = replay.cut(end, &image, dice.any());
            let at = replay.entries[end].at;
            let mut known = disk.known.clone();
            let before = boot.known.iter().filter(|(len, ..)| *len <= at);
            known.extend(before.map(|(_, name, sum)| (name.clone(), sum.clone())));
            println!(
                "cut {cuts} before write {end} of {count}: {blocks} blocks lost, {} states known",
                known.len()
            );
            if end == last {
                // The next boot begins with it.
                copy(&image, &disk.image);
                disk.known = known.clone();
                disk.known.retain(|name, _| !boot.gone.contains(name));
            }
            states += disk.check(&image, &known, &boot.gone, dice);
            fs::remove_file(&image).unwrap();
            (cuts, lost) = (cuts + 1, lost + blocks);
        }
    }
    // Five cuts may all be at moments when everything was flushed.
    assert!(
        lost > 0 || rounds().is_none(),
        "nothing was lost in {cuts} cuts"
    );
    println!("{states} states were exact after {cuts} power cuts, which lost {lost} blocks");
    open_with_stock_tools(&disk, rounds().map_or(1, |rounds| rounds * 2));
}

/// The disk drops out and comes back; then the states from before the garbage, each boot again.
fn open_with_stock_tools(disk: &Disk, drops: u64) {
    let options = ["--disk".as_ref(), disk.image.as_os_str()];
    let limit = LIMIT + Duration::from_secs(30 * DROPS_OF_A_BOOT);
    for done in (0..drops).step_by(usize::try_from(DROPS_OF_A_BOOT).unwrap()) {
        let script = disk.script(DROPS_OF_A_BOOT.min(drops - done));
        guest::is_done(&guest::run_with(disk.pair(), &script, limit, &options));
        println!("{done} drops were before these");
    }
}
