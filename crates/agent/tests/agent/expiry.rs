//! Expiry: what goes takes nothing of what stays with it, whatever is killed or read meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::time::Duration;

use sprat_testkit::dice::Dice;
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ, READ_WRITE, Served, agent, blocks};

const BLOCKS: u64 = 48;
/// After two seconds only the first state of a day, and the one that stood longest, stay.
const SHORT: &str = "keep = all 1s, daily 30d\nat_least = 0\nnew = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nheader = free\n";

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

/// A container with holes, and its states by generation.
fn history(policy: &str, sessions: u32, seed: u64) -> (Served, BTreeMap<u32, Vec<u8>>) {
    let served = Served::new(policy);
    let states = make_history(&served, sessions, seed);
    (served, states)
}

pub fn make_history(served: &Served, sessions: u32, seed: u64) -> BTreeMap<u32, Vec<u8>> {
    let mut dice = Dice::new(seed);
    let file = fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(block(BLOCKS)).unwrap();
    file.write_all_at(&blocks(20, seed), 0).unwrap();
    let mut states = BTreeMap::new();
    for number in 1..=sessions {
        states.insert(number, served.live());
        let mut client = served.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        for _ in 0..=dice.below(6) {
            let at = block(dice.below(BLOCKS - 2));
            assert_eq!(client.write(&handle, at, &blocks(2, dice.any())), 0);
        }
        client.end();
    }
    states
}

#[track_caller]
pub fn check(served: &Served, states: &BTreeMap<u32, Vec<u8>>) {
    let mut client = served.connect();
    for number in served.numbers() {
        let content = client.content(&served.past_path(number));
        assert!(
            content.as_ref() == Ok(&states[&number]),
            "generation {number} of {:?}",
            served.numbers()
        );
    }
    client.end();
    assert!(
        served
            .run(&["check", "--read-data"])
            .ends_with(" 0 findings\n")
    );
}

fn used(served: &Served, folder: &str) -> u64 {
    let entries = fs::read_dir(served.path(&format!(".sprat-agent/x.luks/{folder}"))).unwrap();
    entries
        .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
        .sum()
}

#[test]
fn the_policy_removes_what_it_does_not_keep_and_the_rest_is_exact() {
    let (served, states) = history(SHORT, 12, 1);
    let before = used(&served, "logs");
    std::thread::sleep(Duration::from_millis(2500));
    let text = served.run(&["tidy"]);
    let left = served.numbers();
    assert!(
        text.contains("past states expired") && left.len() <= 4 && left[0] == 1,
        "{text} {left:?}"
    );
    assert_eq!(*left.last().unwrap(), 12);
    check(&served, &states);
    assert!(used(&served, "logs") < before);
    // Once more there is nothing to do, and sessions go on.
    assert!(served.run(&["tidy"]).contains("x.luks: 0 past states"));
    served.overwrite(&[(0, vec![1; BLOCK])]);
    assert_eq!(*served.numbers().last().unwrap(), 13);
}

/// Every order in which states may go, holes and data.
#[test]
fn any_states_can_go_in_any_order() {
    for seed in 0..6 {
        let (served, states) = history(EAGER, 9, seed);
        let mut dice = Dice::new(seed);
        while served.numbers().len() > 2 {
            let numbers = served.numbers();
            let one = numbers[usize::try_from(dice.below(numbers.len() as u64 - 1)).unwrap()];
            served.run(&["expire", "x.luks", &served.head(one, "name"), "--yes"]);
            assert!(!served.numbers().contains(&one));
            check(&served, &states);
        }
        // Logs of states that are gone and that nothing needs are gone, too.
        let logs = fs::read_dir(served.path(".sprat-agent/x.luks/logs"))
            .unwrap()
            .count();
        assert!(logs <= 9);
        assert!(used(&served, "logs") <= (BLOCKS + 40) * BLOCK as u64);
    }
}

#[test]
fn killed_at_each_step_expiry_loses_nothing_and_ends_the_next_time() {
    requires!(needs::program("strace"));
    let calls = "pwrite64,fsync,rename,renameat,unlinkat,fallocate";
    assert!(killed_at_each_step(&Served::new(EAGER), calls) > 20);
}

/// Returns how often it was killed.
pub fn killed_at_each_step(served: &Served, calls: &str) -> u32 {
    let mut states = make_history(served, 4, 3);
    let mut killed = 0;
    for call in calls.split(',') {
        for step in 1.. {
            // A state in the middle to be removed, always.
            let number = u32::try_from(states.len()).unwrap() + 1;
            states.insert(number, served.live());
            served.overwrite(&[(
                block(u64::from(number) % BLOCKS),
                blocks(1, u64::from(number)),
            )]);
            let numbers = served.numbers();
            for one in &numbers[1..numbers.len() - 1] {
                fs::write(
                    served.path(&format!(".sprat-agent/x.luks/g.{one}/expire")),
                    "",
                )
                .unwrap();
            }
            let inject = format!("inject={call}:signal=KILL:when={step}");
            let output = Command::new("strace")
                .args([
                    "-qq",
                    "-o",
                    "/dev/null",
                    "-e",
                    &format!("trace={call}"),
                    "-e",
                    &inject,
                ])
                .arg(agent())
                .args(["tidy", "--root"])
                .arg(served.path(""))
                .output()
                .unwrap();
            check(served, &states);
            if output.status.success() {
                break;
            }
            killed += 1;
            // Whatever was left half done is done now.
            served.run(&["tidy"]);
            assert_eq!(served.numbers().len(), 2);
        }
    }
    println!("{killed} steps");
    assert_eq!(served.numbers().len(), 2);
    check(served, &states);
    killed
}

#[test]
fn a_past_state_that_is_being_read_stays_and_reads_on_while_others_are_merged() {
    let (served, states) = history(SHORT, 8, 5);
    let mut client = served.connect();
    let handle = client.open(&served.past_path(3), READ).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    served.run(&["tidy"]);
    assert!(served.numbers().contains(&3), "{:?}", served.numbers());
    for number in 0..BLOCKS {
        let at = usize::try_from(block(number)).unwrap();
        assert!(
            client.read(&handle, block(number), 4096).unwrap() == states[&3][at..at + BLOCK],
            "block {number}"
        );
    }
    client.end();
    check(&served, &states);
}

/// Both logs lead to a damaged record: what an older state might need of it is an error, not newer content.
#[test]
fn damage_stays_damage_through_a_merge() {
    let (served, states) = history(EAGER, 6, 11);
    // The first record's two headers of generation 2; it is not sealed again.
    fs::remove_file(served.path(".sprat-agent/x.luks/g.2/index")).unwrap();
    let log = served.own_file("logs/2");
    for at in 0..log.metadata().unwrap().len() / BLOCK as u64 {
        let mut magic = [0; 8];
        log.read_exact_at(&mut magic, block(at)).unwrap();
        if &magic == b"sprlog1\n" {
            log.write_all_at(b"damaged!", block(at)).unwrap();
        }
    }
    served.command(&["check"]).output().unwrap();
    for one in [4, 3] {
        served.run(&["expire", "x.luks", &served.head(one, "name"), "--yes"]);
    }
    let mut client = served.connect();
    let mut errors = 0;
    for number in served.numbers() {
        let handle = client.open(&served.past_path(number), READ).unwrap();
        for at in 0..BLOCKS {
            let place = usize::try_from(block(at)).unwrap();
            match client.read(&handle, block(at), 4096) {
                Ok(found) => assert!(
                    found == states[&number][place..place + BLOCK],
                    "{number}, block {at}"
                ),
                Err(_) => errors += 1,
            }
        }
    }
    client.end();
    assert!(errors > 0);
}

/// A client has a past state open, and has not read on while a later one took contents and expired: its log has holes
/// where the headers of its records were. What it took is in the older one's index now.
#[test]
fn an_open_past_state_is_exact_when_a_later_one_expires_before_its_log_is_read_to_the_end() {
    let state = blocks(8, 1);
    let served = Served::with_container(EAGER, &state);
    served.overwrite(&[(0, vec![2; BLOCK])]);
    let mut writer = served.connect();
    let writing = writer.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(writer.write(&writing, block(1), &[2; BLOCK]), 0);
    let mut reader = served.connect();
    let reading = reader.open(&served.past_path(1), READ).unwrap();
    let read = |reader: &mut Client, number: u64| {
        let at = usize::try_from(block(number)).unwrap();
        let found = reader.read(&reading, at as u64, 4096);
        assert!(
            found.as_deref() == Ok(&state[at..at + BLOCK]),
            "block {number}: {:?}",
            found.err()
        );
    };
    read(&mut reader, 7);
    assert_eq!(writer.write(&writing, block(2), &[2; BLOCK]), 0);
    writer.end();
    served.overwrite(&[(block(3), vec![2; BLOCK])]);
    fs::write(served.path(".sprat-agent/x.luks/g.2/expire"), "").unwrap();
    served.run(&["tidy"]);
    assert_eq!(served.numbers(), [1, 3]);
    for number in [2, 6, 0, 3, 1] {
        read(&mut reader, number);
    }
    reader.end();
}
