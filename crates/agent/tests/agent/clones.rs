//! `keeper = clone`, on a btrfs and on an XFS: what only clones do. The tests of logs with clones: keepers.rs.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, FlockOperation};
use sprat_testkit::program::system;
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::LoopDisk;
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ, READ_WRITE, Served, blocks};
use crate::confined::confined;
use crate::drops::mount;
use crate::outside::{code, next_tick, past_names};
use crate::sessions::{begin, ranges};
use crate::{expiry, kills, slots};

pub const CLONE: &str = "keeper = clone\n";
pub const BTRFS: &[&str] = &["mkfs.btrfs", "-q"];
pub const XFS: &[&str] = &["mkfs.xfs", "-q", "-m", "reflink=1"];

/// A file system that can clone files. Unmounted on drop.
pub struct Disk {
    path: PathBuf,
    _folder: TestFolder,
}

impl Disk {
    pub fn new(mkfs: &[&str]) -> Self {
        let folder = TestFolder::new("sprat-clones-");
        let path = folder.path().join("disk");
        fs::create_dir(&path).unwrap();
        let image = folder.path().join("image");
        fs::File::create(&image)
            .unwrap()
            .set_len(320 << 20)
            .unwrap();
        let words = mkfs[1..].iter().map(AsRef::as_ref);
        let words: Vec<&OsStr> = words.chain([image.as_os_str()]).collect();
        system(mkfs[0], &words);
        mount("loop", &image, &path);
        Self {
            path,
            _folder: folder,
        }
    }

    /// A root on it, whose policy says `keeper = clone`.
    pub fn served(&self, policy: &str) -> Served {
        Served::in_folder(&self.path, &format!("{policy}{CLONE}"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
    }
}

/// On a btrfs and on an XFS, with the name of the program that made it.
pub fn on_both(test: impl Fn(&Disk, &str)) {
    for mkfs in [BTRFS, XFS] {
        test(&Disk::new(mkfs), mkfs[0]);
    }
}

pub fn missing() -> Option<String> {
    let programs = ["mkfs.btrfs", "mkfs.xfs", "strace"].map(needs::program);
    let others = [needs::root(), needs::devices()];
    others.into_iter().chain(programs).flatten().next()
}

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

fn own(served: &Served, name: &str) -> PathBuf {
    served.path(&format!(".sprat-agent/x.luks/{name}"))
}

/// A root with a container of 32 blocks.
fn with_container(disk: &Disk, policy: &str) -> Served {
    let served = disk.served(policy);
    fs::write(served.path("x.luks"), blocks(32, 1)).unwrap();
    served
}

pub fn is_clone(served: &Served, number: u32) -> bool {
    let list = served.run(&["list"]);
    let name = served.head(number, "name");
    let mut lines = list.lines().filter(|line| line.contains(&name));
    lines.next().unwrap().ends_with("clone")
}

/// The image is durable before it has its name, whether it is made at the end of a session or when one begins.
#[test]
fn an_image_is_durable_before_its_generation_is_there() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = disk.served(EAGER);
    kills::make_container(&served);
    let trace = served.path("trace");
    let calls = "trace=ioctl,fsync,renameat,renameat2,pwrite64";
    let mut client = kills::traced(&served, &["-y", "-o", trace.to_str().unwrap(), "-e", calls]);
    kills::session(&mut client, 1).unwrap();
    client.end();
    let (mut clones, mut named, mut written, mut dirty) = (0, 0, 0, false);
    for line in fs::read_to_string(trace).unwrap().lines() {
        let is = |call: &str, file: &str| line.contains(call) && line.contains(file);
        if is("ioctl(", "FICLONE") {
            (clones, dirty) = (clones + 1, true);
        } else if is("fsync(", "/new/image>") || is("fsync(", "/half.clone/image>") {
            dirty = false;
        } else if is("renameat", "\"g.1\"") || is("renameat", "\"half.clone\"") {
            assert!(!dirty, "{line}");
            named += 1;
        } else if is("pwrite64(", "/x.luks>") {
            assert!(
                (clones, named) == (1, 1),
                "written before the clone: {line}"
            );
            written += 1;
        }
    }
    assert!(
        (clones, named) == (2, 2) && written >= 9,
        "{clones} {named} {written}"
    );
}

/// Made when a session has ended, it is the state that the next one begins with, unless anything was written between.
#[test]
fn a_clone_of_the_end_of_a_session_is_used_only_if_nothing_was_written_since() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    let left = own(&served, "left.clone/image");
    served.overwrite(&[(0, blocks(1, 2))]);
    let inode = fs::metadata(&left).unwrap().ino();
    let second = served.live();
    served.overwrite(&[(0, blocks(1, 3))]);
    let image = own(&served, "g.2/image");
    assert_eq!(fs::metadata(&image).unwrap().ino(), inode);
    assert!(fs::read(image).unwrap() == second);
    // A change without the agent.
    let inode = fs::metadata(&left).unwrap().ino();
    next_tick();
    let file = fs::File::options()
        .write(true)
        .open(served.path("x.luks"))
        .unwrap();
    file.write_all_at(&blocks(1, 4), block(5)).unwrap();
    let third = served.live();
    served.overwrite(&[(0, blocks(1, 5))]);
    assert!(fs::read(own(&served, "g.3/image")).unwrap() == third);
    assert!(fs::metadata(own(&served, "g.3/image")).unwrap().ino() != inode);
    // The same, and the time of the last write is what it was.
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&blocks(1, 6), block(9)).unwrap();
    file.set_modified(modified).unwrap();
    let fourth = served.live();
    served.overwrite(&[(0, blocks(1, 7))]);
    assert!(fs::read(own(&served, "g.4/image")).unwrap() == fourth);
    // A session that begins no generation.
    assert!(left.exists());
    served.set_policy(&format!(
        "new = burst 1, then 1 per 30d\nsecret = 6h\nfree_min = 0%\nheader = free\n{CLONE}"
    ));
    slots::set(&served, "x.luks/state", "tokens", 0);
    for seed in 8..11 {
        let mut client = served.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, 0, &blocks(1, seed)), 0);
        assert_eq!(served.numbers().len(), 4);
        assert!(!left.exists(), "session {seed}");
        client.end();
    }
    assert!(left.exists() && fs::read(&left).unwrap() == served.live());
    for (number, state) in [(2, second), (3, third)] {
        assert!(served.past(number) == state, "{number}");
    }
}

/// A session that begins and writes nothing takes a change without the agent for the state that it left.
#[test]
fn a_session_without_a_write_leaves_no_older_clone() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    served.overwrite(&[(0, blocks(1, 2))]);
    next_tick();
    let file = fs::File::options()
        .write(true)
        .open(served.path("x.luks"))
        .unwrap();
    file.write_all_at(&blocks(1, 4), block(5)).unwrap();
    let mut client = served.connect();
    begin(&mut client);
    client.end();
    let changed = served.live();
    served.overwrite(&[(0, blocks(1, 5))]);
    assert!(served.past(2) == changed);
}

/// A clone of the last end of a session is there while something slow is done. `slow` does it with an agent whose fsync
/// takes long. Returns what another program made of the container meanwhile.
fn changed_while(served: &Served, slow: impl FnOnce(Client) + Send) -> Vec<u8> {
    served.overwrite(&[(0, blocks(1, 2))]);
    next_tick();
    let trace = served.path("trace");
    let arguments = [
        "-o",
        trace.to_str().unwrap(),
        "-e",
        "trace=fsync",
        "-e",
        "inject=fsync:delay_enter=1000000:when=1",
    ];
    let client = kills::traced(served, &arguments);
    std::thread::scope(|scope| {
        scope.spawn(|| slow(client));
        while fs::metadata(&trace).map_or(0, |trace| trace.len()) == 0 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let file = fs::File::options().write(true).open(served.path("x.luks"));
        let file = file.unwrap();
        file.write_all_at(&blocks(1, 4), block(5)).unwrap();
        served.live()
    })
}

#[test]
fn a_change_without_the_agent_while_a_session_ends_is_reported_and_reaches_no_clone() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    // It wrote nothing, and so it keeps the clone of the end before.
    let changed = changed_while(&served, |mut client| {
        begin(&mut client);
        client.open("x.luks", READ_WRITE).unwrap();
        client.end();
    });
    served.overwrite(&[(0, blocks(1, 5))]);
    assert!(served.past(2) == changed);
    assert_eq!(served.head(2, "reason"), "written-past");
    assert_eq!(code(&served, &["status"]).0, Some(3));
}

#[test]
fn a_change_without_the_agent_while_a_generation_begins_is_in_its_clone() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    let changed = changed_while(&served, |mut client| {
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, block(9), &blocks(1, 5)), 0);
        client.end();
    });
    assert!(served.past(2) == changed);
}

/// It takes long, and the next session is over before it is made.
#[test]
fn a_clone_of_a_session_that_is_not_the_last_any_more_is_dropped() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    served.overwrite(&[(0, blocks(1, 2))]);
    fs::remove_dir_all(own(&served, "left.clone")).unwrap();
    let slow = [
        "-o",
        "/dev/null",
        "-e",
        "trace=ioctl",
        "-e",
        "inject=ioctl:delay_exit=2000000:when=2+",
    ];
    let mut first = kills::traced(&served, &slow);
    let handle = first.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(first.write(&handle, 0, &blocks(1, 3)), 0);
    let half = own(&served, "half.clone/image");
    std::thread::scope(|scope| {
        scope.spawn(|| first.end());
        while !half.exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        served.overwrite(&[(block(3), blocks(1, 4))]);
    });
    assert!(!half.exists());
    let third = served.live();
    served.overwrite(&[(block(4), blocks(1, 5))]);
    assert!(served.past(*served.numbers().last().unwrap()) == third);
}

/// Logs, clones, logs: every state is exact, whichever go. A clone that states with logs are read from stays with them.
#[test]
fn a_keeper_that_was_changed_leaves_every_state_readable_until_it_expires() {
    requires!(missing());
    let disk = Disk::new(XFS);
    for order in 0..3 {
        let served = with_container(&disk, EAGER);
        let mut states = BTreeMap::new();
        for number in 1..=9_u32 {
            let keeper = if (4..=6).contains(&number) {
                CLONE
            } else {
                "keeper = log\n"
            };
            served.set_policy(&format!("{EAGER}{keeper}"));
            states.insert(number, served.live());
            let at = block(u64::from(number) * 5 % 30);
            served.overwrite(&[
                (at, blocks(2, 100 + u64::from(number))),
                (block(20), blocks(1, u64::from(number))),
            ]);
        }
        let clones: Vec<u32> = (1..=9)
            .filter(|number| is_clone(&served, *number))
            .collect();
        assert_eq!(clones, [4, 5, 6]);
        expiry::check(&served, &states);
        let name = |number| served.head(number, "name");
        let refused = served
            .command(&["expire", "x.luks", &name(4), "--yes"])
            .output()
            .unwrap();
        assert!(
            !refused.status.success() && served.numbers().contains(&4),
            "{refused:?}"
        );
        // Asked for by the policy it stays, too, until they go.
        fs::write(own(&served, "g.4/expire"), "").unwrap();
        let orders = [
            [2, 3, 5, 6, 8, 1, 7],
            [1, 6, 3, 5, 7, 8, 2],
            [3, 5, 2, 1, 6, 8, 7],
        ];
        for number in orders[order] {
            served.run(&["expire", "x.luks", &name(number), "--yes"]);
            expiry::check(&served, &states);
            let has_older = served.numbers().iter().any(|number| *number < 4);
            assert_eq!(
                served.numbers().contains(&4),
                has_older,
                "{:?}",
                served.numbers()
            );
        }
        assert_eq!(served.numbers(), [9]);
    }
}

/// A state with a log is open, is read from the container, and then a clone takes the place of it.
#[test]
fn an_open_state_with_a_log_shows_nothing_that_was_written_after_the_next_clone() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    served.set_policy(EAGER);
    let before = served.live();
    served.overwrite(&[(0, blocks(1, 2))]);
    let mut reader = served.connect();
    let handle = reader.open(&served.past_path(1), READ).unwrap();
    assert!(reader.read(&handle, block(30), 4096).unwrap() == before[30 * BLOCK..31 * BLOCK]);
    let whole = reader.open(&served.past_path(1), READ).unwrap();
    served.set_policy(&format!("{EAGER}{CLONE}"));
    // Nobody seals the log meanwhile.
    let lock = served.own_file("tidy");
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut writer = served.connect();
    let file = writer.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(writer.write(&file, block(7), &blocks(9, 3)), 0);
    assert!(!own(&served, "g.1/index").exists() && is_clone(&served, 2));
    // What was overwritten is in the first answer, too.
    assert!(reader.read(&whole, 0, 32 * 4096).unwrap() == before);
    for number in 0..32 {
        let at = usize::try_from(block(number)).unwrap();
        let found = reader.read(&handle, block(number), 4096).unwrap();
        assert!(found == before[at..at + BLOCK], "block {number}");
    }
    drop(lock);
    writer.end();
    reader.end();
}

#[test]
fn a_change_without_the_agent_is_reported_and_reaches_no_clone() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    served.set_policy(EAGER);
    let mut states = BTreeMap::new();
    for number in 1..=4_u32 {
        if number == 3 {
            served.set_policy(&format!("{EAGER}{CLONE}"));
        }
        states.insert(number, served.live());
        served.overwrite(&[(block(u64::from(number)), blocks(1, u64::from(number)))]);
    }
    next_tick();
    fs::write(served.path("x.luks"), blocks(32, 77)).unwrap();
    for step in 0..2 {
        assert_eq!(code(&served, &["status"]).0, Some(3));
        assert_eq!(code(&served, &["check"]).0, Some(1));
        let suspect = past_names(&served)
            .iter()
            .any(|name| name.contains("suspect"));
        assert!(!suspect, "{:?}", past_names(&served));
        for (number, state) in &states {
            assert!(served.past(*number) == *state, "{number}, {step}");
        }
        states.entry(5).or_insert_with(|| served.live());
        served.overwrite(&[(0, blocks(1, 9))]);
    }
    assert_eq!(served.head(5, "reason"), "written-past");
}

#[test]
fn a_clone_is_written_back_and_the_present_stays() {
    requires!(missing());
    let disk = Disk::new(XFS);
    let served = with_container(&disk, EAGER);
    let file = fs::File::options()
        .write(true)
        .open(served.path("x.luks"))
        .unwrap();
    file.set_len(block(40)).unwrap();
    let before = served.live();
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, block(3), &blocks(4, 2)), 0);
    // Into a hole, and a hole where data was.
    assert_eq!(client.write(&handle, block(36), &blocks(2, 3)), 0);
    client
        .own("punch@sprat", &ranges(&handle, &[(block(20), block(2))]))
        .unwrap();
    client.end();
    let present = served.live();
    let name = served.head(1, "name");
    let said = served.run(&["revert", "x.luks", &name, "--yes"]);
    assert!(said.starts_with("32.0 KiB"), "{said}");
    assert!(served.live() == before && served.past(2) == present);
    // The same on the log of a later keeper, without a state of the present.
    served.set_policy(EAGER);
    served.overwrite(&[(block(9), blocks(3, 7))]);
    let present = served.past(3);
    served.run(&[
        "revert",
        "x.luks",
        &served.head(2, "name"),
        "--yes",
        "--discard-present",
    ]);
    assert!(
        served.live() == served.past(2) && served.past(3) == present && served.past(1) == before
    );
    assert_eq!(served.numbers(), [1, 2, 3]);
}

/// Of a clone those blocks count that were overwritten since, by one state or another.
#[test]
fn clones_count_for_the_quota_and_the_alarm_what_was_overwritten() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = disk.served(EAGER);
    let mib = 256;
    fs::write(served.path("x.luks"), blocks(8 * mib, 1)).unwrap();
    let used = || {
        let text = served.run(&["status", "--json"]);
        let number = text.split_once("\"used\":").unwrap().1;
        let end = number.find(',').unwrap();
        number[..end].parse::<u64>().unwrap()
    };
    let first = used();
    for _ in 0..4 {
        served.overwrite(&[(0, blocks(mib / 8, 2)), (block(1000), blocks(mib / 8, 3))]);
    }
    let saved = 4 * block(mib as u64 / 4);
    let more = used() - first;
    assert!(
        (saved..saved + (300 << 10)).contains(&more),
        "{more} and {saved}"
    );
    assert!(
        served.run(&["list"]).contains("saved 256.0 KiB"),
        "{}",
        served.run(&["list"])
    );
    // Those of removed states that an older one needs.
    for number in [3, 2] {
        served.run(&["expire", "x.luks", &served.head(number, "name"), "--yes"]);
    }
    let more = used() - first;
    assert!(
        (saved / 2..saved / 2 + (300 << 10)).contains(&more),
        "{more} after expiry"
    );
    // No room for what was not overwritten yet.
    served.set_policy(&format!("{EAGER}{CLONE}quota = {}\n", used()));
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert!(
        client.write(&handle, block(1500), &[1; BLOCK]) == 0,
        "the reserve for what is overwritten"
    );
    client.end();
}

#[test]
fn a_full_disk_loses_no_clone_and_goes_on_when_there_is_space() {
    requires!(missing());
    on_both(|disk, mkfs| {
        let served = disk.served(EAGER);
        fs::write(served.path("x.luks"), blocks(1600, 1)).unwrap();
        let mut states = BTreeMap::new();
        for number in 1..=2 {
            states.insert(number, served.live());
            served.overwrite(&[(block(u64::from(number) * 100), blocks(50, 2))]);
        }
        fill(disk);
        let before = served.live();
        let mut client = served.connect();
        let mut refused = 0;
        if let Ok(handle) = client.open("x.luks", READ_WRITE) {
            for at in (0..1600).step_by(50) {
                refused += u32::from(client.write(&handle, block(at), &blocks(50, 9)) != 0);
            }
        }
        client.end_anyhow();
        assert!(refused > 0, "{mkfs}");
        // Nothing is written without a generation.
        assert!(served.numbers().len() == 3 || served.live() == before);
        // A block is old or new.
        let live = served.live();
        let new = blocks(50, 9);
        for (at, found) in live.chunks(BLOCK).enumerate() {
            let old = &before[at * BLOCK..][..BLOCK];
            assert!(
                found == old || found == &new[at % 50 * BLOCK..][..BLOCK],
                "{mkfs}: block {at}"
            );
        }
        for (number, state) in &states {
            assert!(served.past(*number) == *state, "{mkfs}: {number}");
        }
        fs::remove_file(disk.path.join("somebody-else's")).unwrap();
        let newest = *served.numbers().last().unwrap();
        if newest == 3 {
            states.insert(3, before);
        }
        states.insert(newest + 1, served.live());
        served.overwrite(&[(0, blocks(50, 10))]);
        for (number, state) in &states {
            assert!(served.past(*number) == *state, "{mkfs}: {number}");
        }
        assert!(
            served
                .run(&["check", "--read-data"])
                .ends_with(" 0 findings\n")
        );
    });
}

/// Uses the free space, without writing to it.
fn fill(disk: &Disk) {
    let file = fs::File::create(disk.path.join("somebody-else's")).unwrap();
    let mut at = 0;
    for piece in [16 << 20, 1 << 20, 4096] {
        while rustix::fs::fallocate(&file, FallocateFlags::empty(), at, piece).is_ok() {
            at += piece;
        }
    }
    file.sync_all().unwrap();
}

#[test]
fn where_files_cannot_be_cloned_the_administrator_is_told_and_nothing_is_written() {
    requires!(missing());
    let folder = TestFolder::new("sprat-no-clones-");
    let path = folder.path().join("disk");
    fs::create_dir(&path).unwrap();
    let _disk = LoopDisk::mount(&folder.path().join("image"), &path, 16);
    let served = Served::in_folder(&path, &format!("{EAGER}{CLONE}"));
    fs::write(served.path("x.luks"), blocks(8, 1)).unwrap();
    assert!(served.run(&["adopt"]).contains("can't clone files"));
    let output = served.command(&["policy", "check"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("can't clone files"),
        "{said}"
    );
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 0, &[1; BLOCK]), 4);
    client.end();
    assert!(served.live() == blocks(8, 1));
    let (status, text) = code(&served, &["status"]);
    assert!(
        status == Some(3) && text.contains("keeper = clone"),
        "{text}"
    );
    served.set_policy(EAGER);
    assert!(served.run(&["policy", "check"]).contains("keeper: log"));
    served.overwrite(&[(0, vec![1; BLOCK])]);
    assert!(served.past(1) == blocks(8, 1));
    let disk = Disk::new(BTRFS);
    assert!(disk.served(EAGER).run(&["adopt"]).contains("can be cloned"));
    assert!(
        disk.served(EAGER)
            .run(&["policy", "check"])
            .contains("keeper: clone")
    );
}

/// The kernel refuses a confined process to rename a file into another folder.
#[test]
fn a_confined_agent_makes_and_uses_clones() {
    requires!(
        missing(),
        needs::program("python3"),
        needs::program("unshare")
    );
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    for number in 1..=3 {
        let before = served.live();
        let mut client = confined(&served, &[]);
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, 0, &blocks(1, number.into())), 0);
        client.end();
        assert!(own(&served, "left.clone/image").exists());
        assert!(served.past(number) == before && is_clone(&served, number));
    }
}

#[test]
fn a_clone_whose_image_is_damaged_is_an_error() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = with_container(&disk, EAGER);
    for number in 1..=3 {
        served.overwrite(&[(block(number), blocks(2, number))]);
    }
    let state = served.past(2);
    // The number of blocks that were overwritten.
    let tail = served.own_file("g.3/tail");
    tail.write_all_at(&[0xff; 8], 32).unwrap();
    served.run(&["status"]);
    served.overwrite(&[(block(9), blocks(2, 4))]);
    fs::remove_file(own(&served, "g.1/image")).unwrap();
    served.own_file("g.3/image").set_len(block(9)).unwrap();
    let mut client = served.connect();
    for number in [1, 3] {
        client.open(&served.past_path(number), READ).unwrap_err();
    }
    client.end();
    assert!(served.past(2) == state);
    let (status, text) = code(&served, &["check"]);
    assert!(
        status == Some(1) && text.matches("image is missing").count() == 2,
        "{text}"
    );
}
