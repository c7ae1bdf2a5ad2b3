//! Sessions that refuse their predecessors, holes, announced writes.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::{LoopDisk, SmallDisk};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ, READ_WRITE, Served, blocks, string};
use crate::commands::code;
use crate::slots;

pub const DENIED: u32 = 3;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

fn number(answer: &[u8], place: usize) -> u64 {
    u64::from_be_bytes(answer[place * 8..place * 8 + 8].try_into().unwrap())
}

pub fn begin(client: &mut Client) -> u64 {
    let answer = client.own(
        "session-begin@sprat",
        &[string(b"x.luks"), string(b"token")].concat(),
    );
    number(&answer.unwrap(), 0)
}

pub fn join(client: &mut Client, session: u64) -> Result<(), u32> {
    let fields = [string(b"x.luks"), session.to_be_bytes().to_vec()].concat();
    client.own("session-join@sprat", &fields).map(drop)
}

/// The fields of a request with ranges of bytes.
pub fn ranges(handle: &[u8], ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut fields = string(handle);
    fields.extend(u32::try_from(ranges.len()).unwrap().to_be_bytes());
    for (offset, len) in ranges {
        fields.extend([offset.to_be_bytes(), len.to_be_bytes()].concat());
    }
    fields
}

#[test]
fn a_session_refuses_everything_from_before_it() {
    let served = Served::with_container(EAGER, &blocks(16, 1));
    let [mut old, mut idle, mut new] = [served.connect(), served.connect(), served.connect()];
    let old_handle = old.open("x.luks", READ_WRITE).unwrap();
    let idle_handle = idle.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(old.write(&old_handle, 0, &[1; BLOCK]), 0);
    let session = begin(&mut new);
    let state = served.live();
    assert_eq!(old.write(&old_handle, 0, &[2; BLOCK]), DENIED);
    // Nor through another handle of the same process, nor one that never wrote.
    old.close(&old_handle);
    let again = old.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(old.write(&again, 0, &[2; BLOCK]), DENIED);
    assert_eq!(old.set_len(&again, block(99)), DENIED);
    assert_eq!(idle.write(&idle_handle, 0, &[2; BLOCK]), DENIED);
    assert_eq!(join(&mut old, session - 1), Err(DENIED));
    assert!(served.live() == state);
    // The session's own connections write, and one that joins it.
    let handle = new.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(new.write(&handle, block(1), &[3; BLOCK]), 0);
    join(&mut idle, session).unwrap();
    assert_eq!(idle.write(&idle_handle, block(2), &[3; BLOCK]), 0);
    let end = |clean: u32| [string(b"x.luks"), clean.to_be_bytes().to_vec()].concat();
    idle.own("session-end@sprat", &end(1)).unwrap();
    new.own("session-end@sprat", &end(1)).unwrap();
    for client in [old, idle, new] {
        client.end();
    }
    // The next state is one that the client left in order.
    served.overwrite(&[(0, vec![7; 10])]);
    let last = *served.numbers().last().unwrap();
    assert_eq!(served.head(last, "clean"), "true");
    let served_list = served.run(&["list"]);
    assert!(served_list.contains("clean"), "{served_list}");
    // A session that did not end leaves nothing in order.
    let mut ends = served.connect();
    let session = begin(&mut ends);
    join(&mut ends, session).unwrap();
    ends.own("session-end@sprat", &end(1)).unwrap();
    ends.end();
    let mut killed = served.connect();
    let handle = killed.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(killed.write(&handle, 0, &[8; BLOCK]), 0);
    killed.kill();
    served.overwrite(&[(0, vec![9; 10])]);
    let heads =
        [2, 1].map(|ago| served.head(*served.numbers().iter().nth_back(ago - 1).unwrap(), "clean"));
    assert_eq!(heads, ["true", "false"], "of {:?}", served.numbers());
}

/// The predecessor is stopped in the middle of a batch, and has the lock that a new session needs.
#[test]
fn a_stopped_predecessor_is_ended_and_none_of_its_bytes_arrives() {
    let served = Served::with_container(EAGER, &blocks(16, 1));
    let mut old = served.connect();
    let handle = old.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(old.write(&handle, 0, &[1; BLOCK]), 0);
    let save = served.own_file("save");
    rustix::fs::flock(&save, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let pid = Pid::from_child(&old.child);
    let waiting = std::thread::spawn(move || {
        let status = old.write(&handle, block(3), &[2; BLOCK]);
        (old, status)
    });
    std::thread::sleep(Duration::from_millis(300));
    kill_process(pid, Signal::STOP).unwrap();
    rustix::fs::flock(&save, rustix::fs::FlockOperation::Unlock).unwrap();
    let state = served.live();
    let mut new = served.connect();
    begin(&mut new);
    let (old, status) = waiting.join().unwrap();
    assert_ne!(status, 0);
    old.end_anyhow();
    assert!(served.live() == state);
    new.end();
}

#[test]
fn announced_writes_are_saved_once_and_in_bounds() {
    let state = blocks(20_000, 1);
    let served = Served::with_container(EAGER, &state);
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    let fields = ranges(
        &handle,
        &[(block(5), 2 * BLOCK as u64), (block(6), 10), (100, 10)],
    );
    let done = client.own("will-write@sprat", &fields).unwrap();
    assert_eq!(number(&done, 0), block(7));
    let log = || served.own_file("logs/1").metadata().unwrap().len();
    let saved = log();
    assert!(
        (5 * BLOCK as u64..=9 * BLOCK as u64).contains(&saved),
        "{saved}"
    );
    assert_eq!(client.write(&handle, block(5), &[1; BLOCK]), 0);
    assert_eq!(log(), saved);
    // One request for everything saves 64 MiB and says so.
    let done = client
        .own("will-write@sprat", &ranges(&handle, &[(0, block(20_000))]))
        .unwrap();
    assert_eq!(number(&done, 0), 64 << 20);
    assert!(log() < 70 << 20);
    for wrong in [(block(19_999), block(2)), (u64::MAX, 2), (block(30_000), 1)] {
        client
            .own("will-write@sprat", &ranges(&handle, &[wrong]))
            .unwrap_err();
    }
    let too_many = vec![(0, 1); 8193];
    client
        .own("will-write@sprat", &ranges(&handle, &too_many))
        .unwrap_err();
    client.end();
    assert!(served.past(1) == state);
}

#[test]
fn holes_are_made_and_the_past_keeps_what_was_there() {
    let state = blocks(64, 1);
    let served = Served::with_container(EAGER, &state);
    let used = fs::metadata(served.path("x.luks")).unwrap().blocks();
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    for wrong in [(1, BLOCK as u64), (0, 100), (block(63), block(2))] {
        assert_eq!(
            client.own("punch@sprat", &ranges(&handle, &[wrong])),
            Err(DENIED)
        );
    }
    let fields = ranges(&handle, &[(block(8), block(16)), (block(40), block(8))]);
    assert_eq!(
        number(&client.own("punch@sprat", &fields).unwrap(), 0),
        block(48)
    );
    let map = client
        .own("map@sprat", &[string(&handle), vec![0; 8]].concat())
        .unwrap();
    let pairs: Vec<u64> = (0..map.len() / 8)
        .map(|place| number(&map, place))
        .collect();
    assert_eq!(
        pairs,
        [0, block(8), block(24), block(40), block(48), block(64)]
    );
    client.end();
    let mut expected = state.clone();
    expected[8 * BLOCK..24 * BLOCK].fill(0);
    expected[40 * BLOCK..48 * BLOCK].fill(0);
    assert!(served.live() == expected && served.past(1) == state);
    assert!(fs::metadata(served.path("x.luks")).unwrap().blocks() < used);
    // A hole that is filled later stays a hole in the state between.
    served.overwrite(&[(block(10), vec![5; BLOCK])]);
    served.overwrite(&[(block(11), vec![5; BLOCK])]);
    assert!(served.past(2) == expected && served.past(1) == state);
}

#[test]
fn past_states_are_listed_for_the_client_with_their_times() {
    let served = Served::with_container(EAGER, &blocks(4, 1));
    for round in 0..3 {
        served.overwrite(&[(0, vec![round; 10])]);
    }
    served.run(&["pin", "x.luks", &served.head(2, "name")]);
    let mut client = served.connect();
    let answer = client.own("generations@sprat", &string(b"x.luks")).unwrap();
    assert_eq!(answer[..4], [0, 0, 0, 3]);
    let text = String::from_utf8_lossy(&answer).into_owned();
    for number in 1..=3 {
        assert!(text.contains(&served.head(number, "name")));
    }
    client.end();
    let file = fs::File::open(served.path("x.luks")).unwrap();
    let mut first = [0];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [2]);
}

/// A lease as sprat writes it.
pub fn lease(json: &str) -> Vec<u8> {
    let mut bytes = format!("{json:<4087}").into_bytes();
    let crc = format!("{:08x}\n", crc32fast::hash(&bytes));
    bytes.extend(crc.as_bytes());
    bytes
}

/// What is known of earlier sessions is passed on. Of one that did not use this agent, writes may still arrive.
#[test]
fn unlock_passes_on_what_the_lease_says_of_others() {
    let served = Served::with_container(EAGER, &blocks(8, 1));
    served.overwrite(&[(0, vec![1; 10])]);
    let format = fs::read_to_string(served.path(".sprat-agent/format")).unwrap();
    let id = format.lines().find_map(|line| line.strip_prefix("id "));
    let id = id.unwrap();
    let far = 4_000_000_000_u64;
    let name = |number: u64| served.path(&format!("x.luks.lock.{number}"));
    let unlock = |more: &[&str]| code(&served, &[&["unlock", "x.luks"], more].concat());
    let start = "\"token\":\"0123\",\"free\":false,\"attempt\":\"45\",\"renewed\":3,\"host\":\"a\",\"started_s\":5,\"version\":\"1\"";
    let below =
        format!("{{{start},\"doors\":[],\"watch\":[],\"agent\":\"{id}\",\"flight\":false}}");
    fs::write(name(1_000_001), lease(&below)).unwrap();
    let held = format!(
        "{{{start},\"doors\":[{{\"number\":1000001,\"until_s\":null,\"all_before\":false}},\
         {{\"number\":7,\"until_s\":{far},\"all_before\":true,\"own\":true}},\
         {{\"number\":8,\"until_s\":9,\"all_before\":false}}],\
         \"watch\":[{{\"host\":\"b\",\"token\":\"67\",\"until_s\":{far}}}],\"agent\":null,\"flight\":false}}"
    );
    fs::write(name(1_000_002), lease(&held)).unwrap();
    // Its maker died before it was filled.
    fs::write(name(1_000_003), "").unwrap();
    let (code, text) = unlock(&[]);
    assert!(code == Some(1) && text.contains("--yes"), "{text}");
    let (code, text) = unlock(&["--yes"]);
    assert!(code == Some(0) && text.contains("2 h 15 min"), "{text}");
    let made = fs::read_to_string(name(1_000_004)).unwrap();
    let now_s = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let doors = made.split("\"doors\":[").nth(1).unwrap();
    let numbers: Vec<u64> = doors
        .split("\"until_s\":")
        .skip(1)
        .map(|rest| rest.split([',', '}']).next().unwrap().parse().unwrap())
        .collect();
    // The one that used the agent and the one whose time is over are gone.
    assert!(
        numbers.len() == 3 && numbers[0] == far && numbers[2] == far,
        "{made}"
    );
    assert!((now_s + 8000..now_s + 8200).contains(&numbers[1]), "{made}");
    assert!(
        made.contains("\"number\":7,") && made.contains("\"number\":1000002,"),
        "{made}"
    );
    assert!(made.contains("{\"host\":\"b\",\"token\":\"67\""), "{made}");
    assert!(
        !made.contains("1000001") && made.contains("\"free\":true"),
        "{made}"
    );
    assert_eq!(unlock(&[]), (Some(0), "x.luks is not locked\n".to_owned()));
    // One that used the agent stays named, but nothing of it can arrive.
    fs::write(name(1_000_005), lease(&below)).unwrap();
    let (code, text) = unlock(&["--yes"]);
    assert!(code == Some(0) && !text.contains("2 h 15 min"), "{text}");
    let made = fs::read_to_string(name(1_000_006)).unwrap();
    assert!(made.contains("\"number\":1000005,"), "{made}");
    assert_eq!(served.past(1), blocks(8, 1));
}

/// The connection that began the session has not written yet.
#[test]
fn the_first_write_of_a_session_begins_its_generation_whichever_connection_it_is_of() {
    let served = Served::with_container(EAGER, &blocks(16, 1));
    served.overwrite(&[(0, blocks(1, 2))]);
    let before = served.live();
    let [mut first, mut second] = [served.connect(), served.connect()];
    let session = begin(&mut first);
    join(&mut second, session).unwrap();
    for (client, number) in [(&mut second, 3), (&mut first, 4)] {
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, block(number), &blocks(1, 9)), 0);
    }
    assert_eq!(served.numbers(), [1, 2]);
    assert!(served.past(2) == before);
    first.end();
    second.end();
}

/// A container in many pieces: what has data is known from the end of the session before. It is searched for where
/// something else may have filled a hole since, of whatever session and program.
#[test]
fn what_has_data_is_known_when_a_session_begins_only_if_nothing_was_written_since() {
    const PIECES: u64 = 4200;
    // All that happens is in these blocks.
    const BLOCKS: usize = 30;
    requires!(needs::root());
    let disk = SmallDisk::new("size=128m");
    let served = Served::in_folder(disk.path(), EAGER);
    fs::write(served.path("x.luks"), []).unwrap();
    let mut options = fs::File::options();
    options.read(true).write(true);
    let file = options.open(served.path("x.luks")).unwrap();
    file.set_len(block(2 * PIECES)).unwrap();
    for number in 0..PIECES {
        file.write_all_at(&[7; BLOCK], block(2 * number)).unwrap();
    }
    let live = || {
        let mut bytes = vec![0; BLOCKS * BLOCK];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let write = |client: &mut Client, number: u64| {
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, block(number), &[9; BLOCK]), 0);
    };
    // What was known at the end lacks the hole that was filled last: so it shows whether it is used.
    let forge = || {
        let path = served.path(".sprat-agent/x.luks/left");
        let mut bytes = fs::read(&path).unwrap();
        bytes[8] -= 2;
        let end = bytes.len() - 4;
        let crc = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        slots::set(&served, "x.luks/state", "left", crc.into());
    };
    let check = |before: Vec<u8>| {
        let mut client = served.connect();
        let path = served.past_path(*served.numbers().last().unwrap());
        let past = client.open(&path, READ).unwrap();
        let len = u32::try_from(before.len()).unwrap();
        let found = client.read(&past, 0, len).unwrap();
        let differ =
            (0..BLOCKS).filter(|n| found[n * BLOCK..][..BLOCK] != before[n * BLOCK..][..BLOCK]);
        assert_eq!(differ.collect::<Vec<_>>(), [0; 0], "{path}");
        client.end();
    };
    // Overwrites what the last one wrote, then fills a hole.
    let session = |hole: u64, is_known: bool| {
        let mut before = live();
        let mut client = served.connect();
        begin(&mut client);
        write(&mut client, hole - 2);
        write(&mut client, hole);
        client.end();
        if is_known {
            before[usize::try_from(hole - 2).unwrap() * BLOCK..][..BLOCK].fill(0);
        }
        check(before);
    };
    session(3, false);
    session(5, false);
    forge();
    session(7, true);
    forge();
    // The first write of a session begins no generation, and a later one does.
    served.set_policy(&EAGER.replace("1 per 1s", "1 per 30d"));
    slots::set(&served, "x.luks/state", "tokens", 0);
    let mut client = served.connect();
    begin(&mut client);
    let newest = served.numbers().len();
    write(&mut client, 9);
    assert!(!slots::text(&served, "x.luks/state").contains("left"));
    assert_eq!(served.numbers().len(), newest);
    let before = live();
    slots::set(&served, "x.luks/state", "secret-due", 0);
    write(&mut client, 9);
    check(before);
    client.end();
    served.set_policy(EAGER);
    slots::set(&served, "x.luks/state", "tokens", 100_000);
    forge();
    // Killed before its first write.
    let mut killed = served.connect();
    begin(&mut killed);
    killed.kill();
    session(11, false);
    forge();
    let mut killed = served.connect();
    begin(&mut killed);
    write(&mut killed, 13);
    killed.kill();
    session(15, false);
    forge();
    // Something else fills a hole, and the time of the last write is what it was.
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[5; BLOCK], block(17)).unwrap();
    file.set_modified(modified).unwrap();
    session(19, false);
    forge();
    served.flip("left", 100);
    session(21, false);
    forge();
    session(23, true);
}

/// A change right after a session has the times that the session left, on a file system that knows whole seconds only. So
/// what had data at the end of the session is not known there.
#[test]
fn a_hole_that_is_filled_in_the_second_of_the_end_is_in_the_next_state() {
    const PIECES: u64 = 4200;
    requires!(needs::root(), needs::devices(), needs::program("mkfs.ext4"));
    let folder = TestFolder::new("sprat-ext4-");
    let at = folder.path().join("disk");
    fs::create_dir(&at).unwrap();
    let image = folder.path().join("image");
    let _disk = LoopDisk::mount_with(&image, &at, 128, &["-I", "128"]);
    let served = Served::in_folder(&at, EAGER);
    let mut options = fs::File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(served.path("x.luks")).unwrap();
    file.set_len(block(2 * PIECES)).unwrap();
    for number in 0..PIECES {
        file.write_all_at(&[7; BLOCK], block(2 * number)).unwrap();
    }
    let session = |number: u64| {
        let mut client = served.connect();
        begin(&mut client);
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, block(number), &[9; BLOCK]), 0);
        client.end();
    };
    let changed = || {
        let found = file.metadata().unwrap();
        assert_eq!(found.ctime_nsec(), 0);
        found.ctime()
    };
    let hole = (0..PIECES).map(|n| 2 * n + 1).find(|hole| {
        session(0);
        let end_s = changed();
        file.write_all_at(&[5; BLOCK], block(*hole)).unwrap();
        changed() == end_s
    });
    let hole = hole.unwrap();
    session(hole);
    let mut client = served.connect();
    let path = served.past_path(*served.numbers().last().unwrap());
    let past = client.open(&path, READ).unwrap();
    assert!(client.read(&past, block(hole), 4096).unwrap() == [5; BLOCK]);
    client.end();
}
