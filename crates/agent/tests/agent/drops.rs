//! The disk drops out while four processes write, and comes back: within one boot, or after a power cut.
//!
//! The disk is an image with ext4, or with XFS and clones, on a file system that clones files. A clone of the image has what was written to
//! the disk by one moment. What was only in the page cache is lost with it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use sprat_testkit::dice::{self, Dice};
use sprat_testkit::program::system;
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, EAGER, READ_WRITE, RESTLESS, Served, blocks};
use crate::clones::{CLONE, XFS};
use crate::storm::{Storm, check, make_container};

const EXT4: &[&str] = &["mke2fs", "-q", "-t", "ext4"];

/// A disk that can drop out. Unmounted on drop.
struct Disk {
    folder: TestFolder,
    options: &'static str,
}

impl Disk {
    fn new(mkfs: &[&str]) -> Self {
        let disk = Self {
            folder: TestFolder::new("sprat-drops-"),
            // A process in a mount namespace of its own may still have the disk from before: XFS looks for that.
            options: if mkfs == XFS { "loop,nouuid" } else { "loop" },
        };
        for name in ["pool", "disk"] {
            std::fs::create_dir(disk.path(name)).unwrap();
        }
        let pool = disk.path("pool.img");
        let file = std::fs::File::create(&pool).unwrap();
        file.set_len(1 << 30).unwrap();
        system("mkfs.btrfs", &["-q".as_ref(), pool.as_os_str()]);
        mount("loop", &pool, &disk.path("pool"));
        let image = disk.path("pool/image");
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(320 << 20).unwrap();
        system(mkfs[0], &[&mkfs[1..], &[image.to_str().unwrap()]].concat());
        mount(disk.options, &image, &disk.path("disk"));
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The disk as it is now, in the midst of everything.
    fn clone_image(&self) {
        let paths = [self.path("pool/image"), self.path("pool/clone")];
        let words = [
            "--reflink=always".as_ref(),
            paths[0].as_os_str(),
            paths[1].as_os_str(),
        ];
        system("cp", &words);
    }

    /// From now on it is what it was when it was cloned.
    fn replace(&self) {
        system("umount", &[self.path("disk").as_os_str()]);
        std::fs::rename(self.path("pool/clone"), self.path("pool/image")).unwrap();
        mount(self.options, &self.path("pool/image"), &self.path("disk"));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for name in ["disk", "pool"] {
            let at = self.path(name);
            let _ = rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

pub fn mount(options: &str, image: &std::path::Path, at: &std::path::Path) {
    let words = [
        "-o".as_ref(),
        options.as_ref(),
        image.as_os_str(),
        at.as_os_str(),
    ];
    system("mount", &words);
}

/// What the agent keeps in the page cache only was written in another boot.
pub fn other_boot(served: &Served) {
    for number in served.numbers() {
        let tail = served.own_file(&format!("g.{number}/tail"));
        let mut id = [0];
        tail.read_exact_at(&mut id, 0).unwrap();
        tail.write_all_at(&[id[0] ^ 0x55], 0).unwrap();
    }
}

fn come_back(rounds: u64, in_other_boot: bool, mkfs: &[&str], policy: &str) {
    requires!(
        needs::root(),
        needs::devices(),
        needs::program("mkfs.btrfs"),
        needs::program(mkfs[0])
    );
    let mut dice = Dice::new(dice::seed());
    let disk = Disk::new(mkfs);
    let served = Served::in_folder(&disk.path("disk"), policy);
    make_container(&served);
    // Else the first cut takes the policy with it.
    system("sync", &["-f".as_ref(), served.path("x.luks").as_os_str()]);
    let mut known = BTreeMap::new();
    let mut checked = 0;
    for round in 0..rounds {
        let storm = Storm::new(&served, known);
        let mut at_the_cut = BTreeMap::new();
        storm.run(dice.any(), |storm| {
            std::thread::sleep(Duration::from_millis(200 + dice.below(1500)));
            at_the_cut.clone_from(&storm.known.lock().unwrap());
            disk.clone_image();
            assert!(!storm.is_stopped(), "one of them failed");
        });
        let mut may_lack = storm.gone.lock().unwrap().clone();
        // It was visible before it was on the disk.
        may_lack.extend(at_the_cut.keys().next_back());
        disk.replace();
        if in_other_boot {
            other_boot(&served);
        }
        // As it was found, and when a session has taken over what was left.
        check(&served, &at_the_cut, &may_lack);
        let (before, numbers) = (served.live(), served.numbers());
        served.overwrite(&[(round % 100 * BLOCK as u64, vec![7; BLOCK])]);
        let newest = *served.numbers().last().unwrap();
        let found = served.past(newest);
        let pairs = found.chunks(BLOCK).zip(before.chunks(BLOCK));
        let differ: Vec<usize> = (0..)
            .zip(pairs)
            .filter(|(_, (a, b))| a != b)
            .map(|(number, _)| number)
            .collect();
        assert!(
            differ.is_empty(),
            "round {round}: blocks {differ:?} of generation {newest} are not what the session found; before it: \
             {numbers:?}; begun because of {}",
            served.head(newest, "reason")
        );
        at_the_cut.insert(newest, before);
        // What was marked for removal goes now.
        served.run(&["tidy"]);
        check(&served, &at_the_cut, &may_lack);
        let found = served.run(&["check", "--read-data"]);
        assert!(found.contains("0 findings"), "round {round}: {found}");
        let numbers = served.numbers();
        checked += numbers.len();
        // What was begun after the cut has gone with it.
        at_the_cut.retain(|number, _| numbers.contains(number));
        known = at_the_cut;
    }
    println!("{checked} states were exact after {rounds} times");
}

/// Blocks that were overwritten are on the disk, and the log is. The log's tail and the container's time of its last
/// write were in memory only.
#[test]
fn a_session_after_a_drop_begins_a_generation_although_times_were_lost() {
    let state = blocks(8, 1);
    let served = Served::with_container(EAGER, &state);
    let container = std::fs::File::options()
        .write(true)
        .open(served.path("x.luks"))
        .unwrap();
    let modified = container.metadata().unwrap().modified().unwrap();
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 0, &[5; BLOCK]), 0);
    client.kill();
    container.set_modified(modified).unwrap();
    let tail = served.own_file("g.1/tail");
    tail.write_all_at(&[[0; 8], [0xff; 8]].concat(), 16)
        .unwrap();
    let before = served.live();
    served.overwrite(&[(3 * BLOCK as u64, vec![6; BLOCK])]);
    assert_eq!(served.numbers(), [1, 2]);
    assert!(served.past(2) == before && served.past(1) == state);
}

/// `make torture` does it more often.
fn rounds(short: u64, of_long: u64) -> u64 {
    dice::number("SPRAT_TORTURE_ROUNDS").map_or(short, |rounds| rounds * of_long)
}

#[test]
fn a_disk_that_comes_back_within_one_boot_has_every_past_state() {
    come_back(rounds(2, 2), false, EXT4, RESTLESS);
}

#[test]
fn after_a_power_cut_every_past_state_is_there() {
    come_back(rounds(2, 1), true, EXT4, RESTLESS);
}

#[test]
fn a_disk_that_comes_back_has_every_clone() {
    let policy = format!("{RESTLESS}{CLONE}");
    for in_other_boot in [false, true] {
        come_back(rounds(1, 1), in_other_boot, XFS, &policy);
    }
}
