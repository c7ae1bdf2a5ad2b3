//! What damage on the server's disk does, and how it is repaired.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::client::{BLOCK, EAGER, READ, READ_WRITE, Served, blocks};

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

fn code(served: &Served, words: &[&str]) -> (Option<i32>, String) {
    let output = served.command(words).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A container, and its states by generation, beginning with 1.
fn history(policy: &str, sessions: u64) -> (Served, Vec<Vec<u8>>) {
    let served = Served::with_container(policy, &blocks(16, 1));
    let mut states = Vec::new();
    for number in 1..=sessions {
        states.push(served.live());
        served.overwrite(&[(block(number), blocks(1, number + 50))]);
    }
    (served, states)
}

#[test]
fn a_state_with_both_copies_damaged_refuses_writes_until_it_is_repaired() {
    let (served, states) = history(EAGER, 3);
    assert!(served.run(&["repair", "x.luks"]).contains("whole"));
    let mut old = served.connect();
    let handle = old.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(old.write(&handle, 0, &[1; 10]), 0);
    let live = served.live();
    for slot in [0, 512] {
        served.flip("state", slot + 20);
    }
    assert_ne!(old.write(&handle, 0, &[2; 10]), 0);
    assert!(served.connect().open("x.luks", READ_WRITE).is_err());
    assert!(served.live() == live);
    // The past can be read all the same, and the administrator learns of it.
    assert!(served.past(2) == states[1]);
    for words in [&["status"][..], &["check"]] {
        let (failed, text) = code(&served, words);
        assert!(
            failed != Some(0) && text.contains("sprat-agent repair x.luks"),
            "{text}"
        );
    }
    served.run(&["repair", "x.luks"]);
    assert_eq!(code(&served, &["status"]).0, Some(0));
    // What was connected before is refused: nobody knows which session it was of.
    assert_eq!(old.write(&handle, 0, &[3; 10]), 3);
    old.end_anyhow();
    assert!(served.live() == live);
    served.overwrite(&[(0, vec![4; BLOCK])]);
    assert_eq!(served.numbers(), [1, 2, 3, 4, 5]);
    assert!(served.past(5) == live);
    for (number, state) in (1..).zip(&states) {
        assert!(served.past(number) == *state, "generation {number}");
    }
}

#[test]
fn a_damaged_clock_refuses_writes_until_it_is_accepted() {
    let (served, states) = history(EAGER, 2);
    for slot in [0, 512] {
        served.flip("../clock", slot + 20);
    }
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_ne!(client.write(&handle, 0, &[1; 10]), 0);
    client.end_anyhow();
    assert!(served.past(2) == states[1]);
    let (failed, text) = code(&served, &["status"]);
    assert!(
        failed == Some(1) && text.contains("sprat-agent clock accept"),
        "{text}"
    );
    served.run(&["clock", "accept"]);
    served.overwrite(&[(0, vec![1; 10])]);
    assert_eq!(code(&served, &["status"]).0, Some(0));
    served.run(&["tidy"]);
    assert!(served.numbers() == [1, 2, 3] && served.past(1) == states[0]);
}

#[test]
fn a_generation_whose_head_is_damaged_blocks_nothing_and_expires() {
    let policy = "keep = all 1s\nat_least = 0\nnew = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nheader = free\n";
    let (served, mut states) = history(policy, 3);
    // The newest one, which nobody has sealed.
    served.flip("g.3/head", 12);
    let mut client = served.connect();
    let handle = client.open(&served.past_path(1), READ).unwrap();
    // An older generation saved block 1. Nobody knows whether the damaged one saved block 5.
    assert!(client.read(&handle, block(1), 4096).unwrap() == states[0][BLOCK..2 * BLOCK]);
    assert!(client.read(&handle, block(5), 4096).is_err());
    client.end();
    for number in 4..7 {
        states.push(served.live());
        served.overwrite(&[(block(number), blocks(1, number + 50))]);
    }
    assert!(served.past(5) == states[4]);
    assert!(code(&served, &["check"]).1.contains("generation 3"));
    std::thread::sleep(Duration::from_millis(2200));
    served.run(&["tidy"]);
    assert_eq!(served.numbers(), [6]);
    assert!(served.past(6) == states[5]);
    assert!(served.run(&["check", "--read-data"]).contains("0 findings"));
}

/// A merge may last for minutes: a client that restores does not wait for it.
#[test]
fn a_past_state_opens_while_expiry_has_its_lock() {
    let (served, states) = history(EAGER, 4);
    assert!(served.past(2) == states[1]);
    let tidy = served.own_file("tidy");
    rustix::fs::flock(&tidy, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let released = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicBool::new(false));
    let releaser = {
        let (released, done) = (Arc::clone(&released), Arc::clone(&done));
        std::thread::spawn(move || {
            for _ in 0..200 {
                if done.load(Ordering::SeqCst) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            released.store(true, Ordering::SeqCst);
            drop(tidy);
        })
    };
    let past = served.past(2);
    let waited = released.load(Ordering::SeqCst);
    done.store(true, Ordering::SeqCst);
    releaser.join().unwrap();
    assert!(past == states[1] && !waited);
}

/// While it is open, the next generation begins, saves a block, and is removed.
#[test]
fn an_open_past_state_finds_what_a_removed_generation_had_saved() {
    let (served, states) = history(EAGER, 1);
    let mut client = served.connect();
    let handle = client.open(&served.past_path(1), READ).unwrap();
    assert!(client.read(&handle, block(9), 4096).unwrap() == states[0][9 * BLOCK..10 * BLOCK]);
    for number in 9..12 {
        served.overwrite(&[(block(number), vec![7; BLOCK])]);
    }
    let names: Vec<String> = [2, 3].map(|number| served.head(number, "name")).into();
    for name in names {
        served.run(&["expire", "x.luks", &name, "--yes"]);
    }
    for number in 0..16 {
        let at = usize::try_from(block(number)).unwrap();
        assert!(
            client.read(&handle, block(number), 4096).unwrap() == states[0][at..at + BLOCK],
            "block {number}"
        );
    }
    client.end();
}

/// Ends the readers also when the test fails.
struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Generations begin and go, one after the other, while states are read from beginning to end.
#[test]
fn past_states_read_exactly_while_others_begin_and_go() {
    let (served, states) = history(EAGER, 2);
    let paths = [1, 2].map(|number| served.past_path(number));
    let stop = AtomicBool::new(false);
    let reads = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|which| {
                let (served, paths, stop, states) = (&served, &paths, &stop, &states);
                scope.spawn(move || {
                    let mut reads = 0;
                    let mut client = served.connect();
                    let handle = client.open(&paths[which], READ).unwrap();
                    while !stop.load(Ordering::SeqCst) {
                        let kept = client.read(&handle, 0, 16 * 4096).unwrap();
                        assert!(kept == states[which], "an open state");
                        assert!(client.content(&paths[which]).unwrap() == states[which]);
                        reads += 1;
                    }
                    client.end();
                    reads
                })
            })
            .collect();
        let stopper = Stopper(&stop);
        for round in 0..25_u64 {
            served.overwrite(&[(block(round % 16), blocks(1, round))]);
            served.overwrite(&[(block((round + 5) % 15), blocks(2, round))]);
            let numbers = served.numbers();
            for number in &numbers[2..numbers.len() - 1] {
                let mark = served.path(&format!(".sprat-agent/x.luks/g.{number}/expire"));
                fs::write(mark, "").unwrap();
            }
            served.run(&["tidy"]);
            assert_eq!(served.numbers().len(), 3);
        }
        drop(stopper);
        readers
            .into_iter()
            .map(|reader| reader.join().unwrap())
            .sum::<u32>()
    });
    assert!(reads > 0);
    assert!(served.run(&["check", "--read-data"]).contains("0 findings"));
}

/// Expiry merges into a generation whose map is damaged. The states before it stay exact.
#[test]
fn a_damaged_map_stops_no_expiry() {
    let state = blocks(16, 1);
    let served = Served::with_container(EAGER, &state);
    for number in 0..4 {
        served.overwrite(&[(number * BLOCK as u64, vec![9; BLOCK])]);
    }
    assert_eq!(served.numbers(), [1, 2, 3, 4]);
    let map = served.own_file("g.2/map");
    let len = map.metadata().unwrap().len();
    map.write_all_at(&[0xff; 4], len - 4).unwrap();
    let name = served.head(3, "name");
    served.run(&["expire", "x.luks", &name, "--yes"]);
    assert_eq!(served.numbers(), [1, 2, 4]);
    assert!(served.past(1) == state);
}

#[test]
fn a_damaged_format_is_refused_and_repaired() {
    let served = Served::with_container(EAGER, &blocks(8, 1));
    served.overwrite(&[(0, vec![1; BLOCK])]);
    let path = served.path(".sprat-agent/format");
    let whole = fs::read(&path).unwrap();
    let fails = |words: &[&str]| {
        let output = served.command(words).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(served.run(&["repair"]).contains("whole"));
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&path, &damaged).unwrap();
        let text = fails(&["check"]);
        assert!(text.contains("sprat-agent repair"), "byte {at}: {text}");
    }
    fs::write(&path, &whole[..8]).unwrap();
    fails(&["adopt"]);
    fails(&["serve"]);
    // It may have been the layout of a newer agent.
    assert!(fails(&["repair"]).contains("--yes"));
    assert_eq!(fs::read(&path).unwrap(), whole[..8]);
    served.run(&["repair", "--yes"]);
    // The id was lost.
    assert_ne!(fs::read(&path).unwrap(), whole);
    fs::remove_file(&path).unwrap();
    assert!(fails(&["repair"]).contains("--yes"));
    assert!(!path.exists());
    served.run(&["repair", "--yes"]);
    served.overwrite(&[(0, vec![2; BLOCK])]);
    assert!(served.past(1) == blocks(8, 1));
    // The checksum is damaged, the rest is not.
    let text = String::from_utf8(whole.clone()).unwrap();
    let lines = &text[..text.rfind("crc").unwrap()];
    fs::write(&path, format!("{lines}crc 0\n")).unwrap();
    served.run(&["repair", "--yes"]);
    assert_eq!(fs::read(&path).unwrap(), whole);
    fs::write(&path, "format 2\nid 0123\n").unwrap();
    assert!(fails(&["repair", "--yes"]).contains("newer"));
    // Without a checksum.
    fs::write(&path, lines).unwrap();
    fails(&["check"]);
}

/// A client that reads on gets what is before and behind the damage: nothing is read for it that it did not ask for.
#[test]
fn a_damaged_block_is_an_error_for_this_block_only() {
    let (served, states) = history(EAGER, 6);
    // The block that the third session overwrote; behind a header.
    served.flip("logs/3", block(1) + 7);
    let mut client = served.connect();
    let past = client.open(&served.past_path(1), READ).unwrap();
    for (number, content) in (0..).zip(states[0].chunks(BLOCK)) {
        let found = client.read(&past, block(number), 4096);
        let expected = if number == 3 {
            Err(4)
        } else {
            Ok(content.to_vec())
        };
        assert!(
            found == expected,
            "block {number}: {:?}",
            found.map(|found| found.len())
        );
    }
    client.end();
}

/// The name was in the damaged head, so nobody knows it any more. No other state gets it.
#[test]
fn the_name_of_a_state_whose_head_is_damaged_never_shows_another_state() {
    let served = Served::with_container(EAGER, &blocks(8, 1));
    let same_second = std::time::SystemTime::now();
    let set_time = || {
        let file = fs::File::options().write(true).open(served.path("x.luks"));
        file.unwrap().set_modified(same_second).unwrap();
    };
    set_time();
    served.overwrite(&[(0, vec![1; BLOCK])]);
    let path = served.past_path(1);
    fs::write(served.path(".sprat-agent/x.luks/g.1/head"), "name\n").unwrap();
    set_time();
    served.overwrite(&[(0, vec![2; BLOCK])]);
    let mut client = served.connect();
    assert_eq!(client.content(&path).err(), Some(2), "{path} is there");
    let second = client.content(&served.past_path(2)).unwrap();
    client.end();
    assert!(second[..BLOCK] == [1; BLOCK]);
}
