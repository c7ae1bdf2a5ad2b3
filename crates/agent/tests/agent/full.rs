//! The space ends at each allocation in turn: on a disk, or by the quota.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use sprat_testkit::dice;
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::{LoopDisk, SmallDisk, fill};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, CREATE_NEW, Client, EAGER, READ, READ_WRITE, Served, blocks, string};
use crate::kills::traced;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

/// Where a round gets its little space from.
trait Room {
    /// Leaves so many blocks free.
    fn leave(&self, blocks: u64);
    /// There is enough again.
    fn enough(&self);
}

const SMALL_BLOCKS: usize = 64;

impl Room for SmallDisk {
    fn leave(&self, blocks: u64) {
        let about = rustix::fs::statvfs(self.path()).unwrap();
        let used = (about.f_blocks - about.f_bfree) * about.f_frsize;
        self.remount(&format!("size={}", used + block(blocks)));
    }

    fn enough(&self) {
        self.remount("size=16m");
    }
}

/// A mounted ext4.
struct OnLoop {
    path: PathBuf,
    // Unmounted before the folder is removed.
    _disk: LoopDisk,
    _folder: TestFolder,
}

impl OnLoop {
    fn new() -> Self {
        let folder = TestFolder::new("sprat-ext4-");
        let path = folder.path().join("disk");
        fs::create_dir(&path).unwrap();
        Self {
            _disk: LoopDisk::mount(&folder.path().join("image"), &path, 16),
            path,
            _folder: folder,
        }
    }
}

impl Room for OnLoop {
    fn leave(&self, blocks: u64) {
        fill(&self.path);
        let filler = fs::File::options()
            .write(true)
            .open(self.path.join("somebody-else's"))
            .unwrap();
        let len = filler.metadata().unwrap().len();
        filler.set_len(len - block(blocks)).unwrap();
        filler.sync_all().unwrap();
    }

    fn enough(&self) {
        let removed = fs::remove_file(self.path.join("somebody-else's"));
        removed.unwrap_or_default();
    }
}

/// The quota of a root.
struct Quota(PathBuf);

impl Quota {
    fn is(&self, quota: &str) {
        fs::write(
            self.0.join(".sprat-agent/policy"),
            format!("{EAGER}quota = {quota}\n"),
        )
        .unwrap();
    }
}

impl Room for Quota {
    fn leave(&self, blocks: u64) {
        self.is(&(used_below(&self.0) + block(blocks)).to_string());
    }

    fn enough(&self) {
        self.is("1T");
    }
}

/// As the agent counts it: files only.
fn used_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .map(|path| match fs::metadata(&path).unwrap() {
            found if found.is_dir() => used_below(&path),
            found => found.blocks() * 512,
        })
        .sum()
}

/// A root in which the test knows each state.
struct Known {
    served: Served,
    live: Vec<u8>,
    states: BTreeMap<u32, Vec<u8>>,
    refusals: u32,
}

impl Known {
    /// What a request may change, where it succeeds; where not, nothing.
    fn after(&mut self, what: &str, is_done: bool, change: impl FnOnce(&mut Vec<u8>)) {
        for number in self.served.numbers() {
            self.states
                .entry(number)
                .or_insert_with(|| self.live.clone());
        }
        if is_done {
            change(&mut self.live);
        } else {
            self.refusals += 1;
        }
        assert!(self.served.live() == self.live, "{what}, done: {is_done}");
    }

    fn write(&mut self, client: &mut Client, handle: &[u8], at: u64, data: &[u8]) {
        let is_done = client.write(handle, block(at), data) == 0;
        let from = usize::try_from(block(at)).unwrap();
        self.after("write", is_done, |live| {
            live[from..from + data.len()].copy_from_slice(data);
        });
    }

    /// A session: its writes, a punch, and files beside the container.
    fn session(&mut self, seed: u64) {
        let mut client = self.served.connect();
        let Ok(handle) = client.open("x.luks", READ_WRITE) else {
            self.refusals += 1;
            client.end_anyhow();
            return;
        };
        self.write(&mut client, &handle, 10, &blocks(3, seed));
        // A hole.
        self.write(&mut client, &handle, 60, &blocks(1, seed));
        self.write(&mut client, &handle, 20, &blocks(12, seed));
        let range = [block(40).to_be_bytes(), block(2).to_be_bytes()].concat();
        let fields = [string(&handle), vec![0, 0, 0, 1], range].concat();
        let is_done = client.own("punch@sprat", &fields).is_ok();
        let holes = usize::try_from(block(40)).unwrap()..usize::try_from(block(42)).unwrap();
        self.after("punch", is_done, |live| live[holes].fill(0));
        let lease = format!("x.luks.lock.{}", 1_000_001 + self.states.len());
        for name in ["x.luks.reserve", lease.as_str()] {
            if let Ok(handle) = client.open(name, CREATE_NEW) {
                self.refusals += u32::from(client.write(&handle, 0, &[1; BLOCK]) != 0);
                client.close(&handle);
            }
            client.path_request(13, name);
        }
        let clean = [string(b"x.luks"), vec![0, 0, 0, 1]].concat();
        let _ = client.own("session-end@sprat", &clean);
        client.end_anyhow();
    }

    /// Expires every second state.
    fn expire(&mut self) -> bool {
        let numbers = self.served.numbers();
        let due = numbers
            .iter()
            .skip(1)
            .step_by(2)
            .filter(|one| Some(*one) != numbers.last());
        let mut all = true;
        for number in due {
            // What could not be removed the last time goes with the first one.
            if !self.served.numbers().contains(number) {
                continue;
            }
            let name = self.served.head(*number, "name");
            let mut command = self.served.command(&["expire", "x.luks", &name, "--yes"]);
            all &= command.output().unwrap().status.success();
        }
        self.refusals += u32::from(!all);
        all
    }

    #[track_caller]
    fn check(&self, what: &str) {
        assert!(self.served.live() == self.live, "{what}");
        let mut client = self.served.connect();
        for number in self.served.numbers() {
            let content = client.content(&self.served.past_path(number));
            assert!(
                content.as_ref() == Ok(&self.states[&number]),
                "{what}: generation {number}"
            );
        }
        client.end();
    }
}

/// The space ends at each allocation in turn: that is refused, and nothing older is lost. Then there is space again.
fn space_ends_at_every_block(served: Served, room: &dyn Room) {
    room.enough();
    let data = blocks(SMALL_BLOCKS - 8, 1);
    let live = [data, vec![0; 8 * BLOCK]].concat();
    let file = fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(block(SMALL_BLOCKS as u64)).unwrap();
    file.write_all_at(&live[..56 * BLOCK], 0).unwrap();
    let mut known = Known {
        served,
        live,
        states: BTreeMap::new(),
        refusals: 0,
    };
    for seed in 0..3 {
        known.session(seed);
    }
    assert_eq!(known.refusals, 0);
    let mut refused = Vec::new();
    for free in 0.. {
        assert!(free < 200, "{refused:?}");
        // Block 60 is a hole again, so that it needs a new block.
        let mut client = known.served.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        let range = [block(60).to_be_bytes(), block(1).to_be_bytes()].concat();
        let fields = [string(&handle), vec![0, 0, 0, 1], range].concat();
        client.own("punch@sprat", &fields).unwrap();
        let hole = usize::try_from(block(60)).unwrap()..usize::try_from(block(61)).unwrap();
        known.after("punch", true, |live| live[hole].fill(0));
        client.end();

        known.refusals = 0;
        room.leave(free);
        known.session(1000 + free);
        known.expire();
        known.session(2000 + free);
        let what = format!("{free} blocks were free");
        known.check(&what);
        refused.push(known.refusals);
        room.enough();
        let before = known.refusals;
        known.session(3000 + free);
        assert!(
            known.expire() && known.refusals == before,
            "{what}: there is space again"
        );
        known.check(&what);
        if before == 0 {
            break;
        }
    }
    println!("refusals with 0, 1, … free blocks: {refused:?}");
    assert!(refused[0] > 0);
    known.served.run(&["check", "--read-data"]);
}

#[test]
fn a_disk_that_is_full_at_any_block_refuses_and_loses_nothing() {
    requires!(needs::root());
    let disk = SmallDisk::new("size=16m");
    space_ends_at_every_block(Served::in_folder(disk.path(), EAGER), &disk);
}

#[test]
fn a_quota_that_is_full_at_any_block_refuses_and_loses_nothing() {
    let served = Served::new(EAGER);
    let quota = Quota(served.path(""));
    space_ends_at_every_block(served, &quota);
}

/// `sprat prune` removes the reserve by one connection, and needs the space on all.
#[test]
fn what_another_connection_removes_is_no_part_of_the_quota_any_more() {
    let served = Served::with_container(EAGER, &blocks(8, 1));
    let mut one = served.connect();
    let reserve = one.open("x.luks.reserve", CREATE_NEW).unwrap();
    assert_eq!(one.write(&reserve, 0, &blocks(4, 1)), 0);
    Quota(served.path("")).leave(0);
    let [mut first, mut second] = [served.connect(), served.connect()];
    for client in [&mut first, &mut second] {
        assert!(client.open("x.luks.lock.1000001", CREATE_NEW).is_err());
    }
    assert_eq!(first.path_request(13, "x.luks.reserve"), 0);
    for (client, number) in [(&mut first, 1), (&mut second, 2)] {
        let lease = format!("x.luks.lock.{}", 1_000_000 + number);
        let lease = client.open(&lease, CREATE_NEW).unwrap();
        assert_eq!(client.write(&lease, 0, &[1; 100]), 0);
    }
    one.end();
}

/// With blocks for folders and extents, too. Each step waits for the disk: only in the long form.
#[test]
fn a_loop_disk_that_is_full_at_any_block_refuses_and_loses_nothing() {
    if dice::number("SPRAT_TORTURE_ROUNDS").is_none() {
        return;
    }
    requires!(needs::root(), needs::devices(), needs::program("mkfs.ext4"));
    let disk = OnLoop::new();
    space_ends_at_every_block(Served::in_folder(&disk.path, EAGER), &disk);
}

/// Those generations were begun while none could be sealed: whether the oldest one is sealed or not, it can be removed.
/// What that frees is less than the others need.
#[test]
fn the_oldest_past_state_expires_on_a_full_disk_although_the_others_are_not_sealed() {
    requires!(needs::root());
    for sealed in [0, 1] {
        let disk = SmallDisk::new("size=16m");
        let served = Served::in_folder(disk.path(), EAGER);
        fs::write(served.path("x.luks"), blocks(SMALL_BLOCKS, 1)).unwrap();
        let mut states = BTreeMap::new();
        for number in 1..=12 {
            states.insert(number, served.live());
            let tidy = (number > sealed + 1).then(|| served.own_file("tidy"));
            if let Some(tidy) = &tidy {
                tidy.lock().unwrap();
            }
            served.overwrite(&[(block(20 + u64::from(number)), blocks(1, number.into()))]);
        }
        let is_sealed = |number: &u32| {
            let index = format!(".sprat-agent/x.luks/g.{number}/index");
            served.path(&index).exists()
        };
        assert_eq!(
            served.numbers().iter().filter(|one| is_sealed(one)).count(),
            sealed as usize
        );
        fill(disk.path());
        for number in 1..12 {
            let name = served.head(number, "name");
            let mut reader = served.connect();
            let handle = reader.open(&served.past_path(number), READ).unwrap();
            let text = served.run(&["expire", "x.luks", &name, "--yes"]);
            assert!(text.contains("x.luks: 1 past states expired"), "{text}");
            // Who reads it gets an error, or what is right.
            let state = states.remove(&number).unwrap();
            for (at, content) in (0..).zip(state.chunks(BLOCK)) {
                let found = reader.read(&handle, block(at), 4096);
                assert!(found.is_err() || found.as_deref() == Ok(content), "{at}");
            }
            reader.end_anyhow();
            assert!(served.numbers().iter().eq(states.keys()), "{number}");
            // More than this one have to be sealed.
            assert!(number > 1 || !is_sealed(&11));
            let mut client = served.connect();
            for (one, state) in &states {
                let content = client.content(&served.past_path(*one));
                assert!(content.as_ref() == Ok(state), "{one} without {number}");
            }
            client.end();
        }
    }
}

/// A call of the first connection that takes space fails once, each in turn: as if there were space again right after.
/// Then it writes again, or another connection does, of the same session or of one that it begins. The state from before
/// is kept.
pub fn nothing_is_written_before_the_generation_has_begun(served: &Served, calls: &str) {
    fs::write(served.path("x.luks"), blocks(SMALL_BLOCKS, 1)).unwrap();
    served.overwrite(&[(0, blocks(1, 2))]);
    let (mut rounds, mut failed) = (0, 0);
    let both = calls.split(',').flat_map(|call| [(call, 1), (call, 2)]);
    for (call, writes) in both {
        for step in 1.. {
            let what = format!("{call} {step}, {writes} writes");
            rounds += 1;
            let before = served.live();
            let mut live = before.clone();
            let newest = *served.numbers().last().unwrap();
            let trace = served.path("trace");
            let inject = format!("inject={call}:error=ENOSPC:when={step}");
            let only = format!("trace={call}");
            let arguments = ["-o", trace.to_str().unwrap(), "-e", &only, "-e", &inject];
            let mut first = traced(served, &arguments);
            let mut other = served.connect();
            let mut write = |client: &mut Client, handle: &[u8], at: usize| {
                let data = blocks(2, rounds * 100 + at as u64);
                if client.write(handle, block(at as u64), &data) == 0 {
                    live[at * BLOCK..][..2 * BLOCK].copy_from_slice(&data);
                }
                assert!(served.live() == live, "{what}: write to block {at}");
            };
            let handle = first.open("x.luks", READ_WRITE);
            for number in 0..writes {
                if let Ok(handle) = &handle {
                    write(&mut first, handle, 10 + number);
                }
            }
            let other_handle = other.open("x.luks", READ_WRITE).unwrap();
            write(&mut other, &other_handle, 20);
            other.end();
            if let Ok(handle) = &handle {
                write(&mut first, handle, 30);
            }
            first.end_anyhow();
            assert!(live != before, "{what}");
            // Or the newest one from before has this very state.
            let numbers = served.numbers().into_iter();
            let kept = numbers.filter(|number| *number >= newest);
            let mut kept = kept.map(|number| served.past(number));
            assert!(kept.any(|state| state == before), "{what}");
            let status = served.command(&["status"]).output().unwrap();
            assert!(status.status.success(), "{what}: {status:?}");
            if !fs::read_to_string(&trace).unwrap().contains("INJECTED") {
                break;
            }
            failed += 1;
        }
    }
    println!("{failed} calls failed");
    assert!(failed > 5);
    served.run(&["check", "--read-data"]);
}

#[test]
fn a_begin_that_fails_at_any_call_is_repeated_before_anything_is_written() {
    requires!(needs::program("strace"));
    let calls = match dice::number("SPRAT_TORTURE_ROUNDS") {
        Some(_) => "openat,mkdirat,pwrite64,fsync,fdatasync,ftruncate,renameat,renameat2",
        None => "mkdirat,pwrite64,ftruncate,renameat2",
    };
    nothing_is_written_before_the_generation_has_begun(&Served::new(EAGER), calls);
}
