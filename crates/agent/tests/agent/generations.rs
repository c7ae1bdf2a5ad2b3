//! Generations: what begins one, and that each reads as the container was then.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use sprat_testkit::dice::Dice;

use crate::client::{BLOCK, Client, EAGER, READ, READ_WRITE, RESTLESS, Served, blocks};
use crate::drops::other_boot;

/// A session writes nothing else, and none but these begin generations.
const LAZY: &str = "new = burst 1, then 1 per 9h\nsecret = 6h\nfree_min = 0%\nheader = free\n";

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

#[test]
fn every_session_keeps_the_state_before_it() {
    let mut states = vec![blocks(64, 1)];
    let served = Served::with_container(EAGER, &states[0]);
    for round in 1..8_u64 {
        let new = blocks(3, 100 + round);
        // Not at the edges of blocks, and over blocks of the round before.
        served.overwrite(&[
            (block(round) + 100, new),
            (block(40), vec![u8::try_from(round).unwrap(); 5]),
        ]);
        states.push(served.live());
        assert_ne!(states[states.len() - 1], states[states.len() - 2]);
    }
    assert_eq!(served.numbers(), [1, 2, 3, 4, 5, 6, 7]);
    for (index, state) in states[..7].iter().enumerate() {
        assert!(
            served.past(u32::try_from(index).unwrap() + 1) == *state,
            "generation {}",
            index + 1
        );
    }
    // Only what was overwritten is in the logs: four or five blocks a session, and headers.
    let logs: u64 = fs::read_dir(served.path(".sprat-agent/x.luks/logs"))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(logs <= 7 * 12 * BLOCK as u64, "{logs}");
}

#[test]
fn a_session_that_writes_nothing_begins_no_generation() {
    let served = Served::with_container(EAGER, &blocks(4, 1));
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    client.read(&handle, 0, 10).unwrap();
    client.write(&handle, 1, b"");
    client.end();
    assert!(served.numbers().is_empty());
}

#[test]
fn sessions_begin_generations_only_as_long_as_there_are_tokens() {
    let state = blocks(8, 1);
    let served = Served::with_container(LAZY, &state);
    for round in 0..4 {
        served.overwrite(&[(0, vec![round; 10])]);
    }
    // The first one is free, and the policy allows one more.
    assert_eq!(served.numbers(), [1, 2]);
    assert!(served.past(1) == state);
    assert_eq!(served.past(2)[..10], [0; 10]);
}

/// Holes, data and the end of the file; each block is overwritten over and over.
#[test]
fn random_histories_read_back_exactly() {
    let mut dice = Dice::new(7);
    for len in [BLOCK * 37, BLOCK * 20 + 1234] {
        let served = Served::new(EAGER);
        let file = fs::File::create(served.path("x.luks")).unwrap();
        file.set_len(len as u64).unwrap();
        file.write_all_at(&blocks(6, 1), block(3)).unwrap();
        let mut states = Vec::new();
        for _ in 0..30 {
            states.push(served.live());
            let mut client = served.connect();
            let handle = client.open("x.luks", READ_WRITE).unwrap();
            for _ in 0..dice.below(4) + 1 {
                let offset = dice.below(len as u64);
                let room = (len as u64 - offset).min(dice.below(9000) + 1);
                let byte = u8::try_from(dice.below(3)).unwrap();
                assert_eq!(
                    client.write(&handle, offset, &vec![byte; usize::try_from(room).unwrap()]),
                    0
                );
            }
            if dice.below(5) == 0 {
                assert_eq!(client.set_len(&handle, len as u64), 0);
            }
            client.end();
        }
        let numbers = served.numbers();
        assert_eq!(numbers.len(), 30);
        for (number, state) in numbers.into_iter().zip(&states) {
            assert!(
                served.past(number) == *state,
                "generation {number} of {len} bytes"
            );
        }
    }
}

#[test]
fn what_was_added_later_is_not_part_of_a_past_state() {
    let state = blocks(2, 1);
    let served = Served::with_container(EAGER, &state);
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.set_len(&handle, block(9)), 0);
    assert_eq!(client.write(&handle, block(1), &blocks(3, 2)), 0);
    client.end();
    served.overwrite(&[(block(8), vec![4; 10])]);
    assert_eq!(served.past(1), state);
    assert_eq!(served.past(2).len(), 9 * BLOCK);
    assert_eq!(served.past(2)[BLOCK..4 * BLOCK], blocks(3, 2));
}

/// A handle on a past state stays open while generations begin and blocks are overwritten.
#[test]
fn an_open_past_state_never_shows_new_content() {
    let state = blocks(256, 1);
    let served = Served::with_container(RESTLESS, &state);
    served.overwrite(&[(0, vec![9; 10])]);
    let mut reader = served.connect();
    let handle = reader.open(&served.past_path(1), READ).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut dice = Dice::new(5);
    let mut reads = 0;
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (served, stop) = (&served, &stop);
            scope.spawn(move || {
                let mut dice = Dice::new(seed);
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    let mut client = served.connect();
                    let handle = client.open("x.luks", READ_WRITE).unwrap();
                    for _ in 0..20 {
                        let writes: Vec<_> = (0..8)
                            .map(|_| {
                                (
                                    block(dice.below(256)),
                                    vec![1 + u8::try_from(seed).unwrap(); BLOCK],
                                )
                            })
                            .collect();
                        assert_eq!(client.write_all(&handle, &writes), 8);
                    }
                    client.end();
                }
            });
        }
        while served.numbers().len() < 8 {
            for _ in 0..50 {
                let number = dice.below(256);
                let found = reader.read(&handle, block(number), 4096).unwrap();
                let at = usize::try_from(block(number)).unwrap();
                assert!(
                    found == state[at..at + BLOCK],
                    "block {number}, generations {:?}",
                    served.numbers()
                );
                reads += 1;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    assert!(reads > 100);
    reader.end();
    assert!(served.past(1) == state);
}

/// Two processes find the same block unsaved; the second one must check again when its turn comes.
#[test]
fn a_block_is_saved_once_by_two_at_the_same_time() {
    let state = blocks(8, 1);
    let served = Served::with_container(EAGER, &state);
    served.overwrite(&[(block(7), vec![1; BLOCK])]);
    let mut clients: Vec<(Client, Vec<u8>)> = (0..2)
        .map(|_| {
            let mut client = served.connect();
            let handle = client.open("x.luks", READ_WRITE).unwrap();
            (client, handle)
        })
        .collect();
    // Both are in the session before the lock is taken.
    for (client, handle) in &mut clients {
        assert_eq!(client.write(handle, block(7), &[2; BLOCK]), 0);
    }
    let number = *served.numbers().last().unwrap();
    let log = format!("logs/{number}");
    let before = served.own_file(&log).metadata().unwrap().len();
    let save = served.own_file("save");
    rustix::fs::flock(&save, rustix::fs::FlockOperation::LockExclusive).unwrap();
    std::thread::scope(|scope| {
        for (client, handle) in &mut clients {
            scope.spawn(move || assert_eq!(client.write(handle, block(2), &[3; BLOCK]), 0));
        }
        std::thread::sleep(Duration::from_millis(500));
        rustix::fs::flock(&save, rustix::fs::FlockOperation::Unlock).unwrap();
    });
    let after = served.own_file(&log).metadata().unwrap().len();
    assert_eq!(after - before, 3 * BLOCK as u64);
    for (client, _) in clients {
        client.end();
    }
    assert_eq!(served.past(1), state);
}

/// Bits are in the page cache only: a disk that drops out and comes back may have lost them.
#[test]
fn of_two_records_of_a_block_the_first_one_counts() {
    let state = blocks(8, 1);
    let served = Served::with_container(LAZY, &state);
    served.overwrite(&[(block(2), vec![1; BLOCK])]);
    served.own_file("g.1/bits").write_all_at(&[0], 0).unwrap();
    let before = served.own_file("logs/1").metadata().unwrap().len();
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    let tokens = served.numbers().len();
    assert_eq!(client.write(&handle, block(2), &[2; BLOCK]), 0);
    client.end();
    // The policy's one token: the second session has its own generation. So a third one is needed.
    if served.numbers().len() > tokens {
        served.own_file("g.2/bits").write_all_at(&[0], 0).unwrap();
        served.overwrite(&[(block(2), vec![3; BLOCK])]);
        assert_eq!(
            served.own_file("logs/2").metadata().unwrap().len(),
            2 * before
        );
        assert_eq!(served.past(2)[2 * BLOCK..3 * BLOCK], [1; BLOCK]);
    }
    assert_eq!(served.past(1), state);
}

/// So may the tail: what is whole behind it was durable, and is never cut off or written over.
#[test]
fn a_lost_tail_loses_no_saved_block() {
    let state = blocks(64, 1);
    let served = Served::with_container(LAZY, &state);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    // The second session's generation is the last that this policy allows.
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    let mut tails = Vec::new();
    for number in 1..20 {
        assert_eq!(client.write(&handle, block(number), &[2; BLOCK]), 0);
        tails.push(fs::read(served.path(".sprat-agent/x.luks/g.2/tail")).unwrap());
    }
    client.end();
    let second = {
        let mut second = state.clone();
        second[..BLOCK].fill(1);
        second
    };
    for tail in [&tails[9], &tails[0]] {
        served.own_file("g.2/tail").write_all_at(tail, 0).unwrap();
        assert!(served.past(2) == second, "before the next write");
        served.overwrite(&[(block(40), vec![3; BLOCK])]);
        assert!(
            served.past(2) == second && served.past(1) == state,
            "after the next write"
        );
    }
    assert_eq!(served.numbers(), [1, 2]);
}

/// A map may be too wide (too many ranges, or a file system that does not know its holes): the next one is
/// then as wide, until a block was saved. Else a write into the hole would show in the older state.
#[test]
fn a_map_that_is_too_wide_shows_nothing_newer() {
    let served = Served::new(EAGER);
    let file = fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(block(64)).unwrap();
    file.write_all_at(&blocks(4, 1), 0).unwrap();
    let state = served.live();
    served.overwrite(&[(0, vec![1; BLOCK])]);
    let wide = [0_u64.to_le_bytes(), 64_u64.to_le_bytes()].concat();
    let crc = crc32fast::hash(&wide).to_le_bytes();
    fs::write(
        served.path(".sprat-agent/x.luks/g.1/map"),
        [&wide[..], &crc].concat(),
    )
    .unwrap();
    for number in 1..6 {
        served.overwrite(&[(block(number * 10), vec![2; BLOCK])]);
    }
    assert_eq!(served.numbers().len(), 6);
    assert!(served.past(1) == state);
}

/// A torn record at the end, as a kill leaves it.
#[test]
fn a_torn_record_is_cut_off_and_the_next_one_takes_its_place() {
    let state = blocks(64, 1);
    let served = Served::with_container(LAZY, &state);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    served.overwrite(&[(block(1), vec![1; BLOCK])]);
    let second = {
        let mut second = state.clone();
        second[..BLOCK].fill(1);
        second
    };
    for round in 2..6 {
        let log = served.own_file("logs/2");
        let end = log.metadata().unwrap().len();
        log.write_all_at(&vec![0xee; 10_000 * usize::try_from(round).unwrap()], end)
            .unwrap();
        served.overwrite(&[(block(round), vec![3; BLOCK])]);
        assert_eq!(log.metadata().unwrap().len(), end + 3 * BLOCK as u64);
        assert!(served.past(2) == second && served.past(1) == state);
    }
}

/// After a reboot bits and tail mean nothing: the next write begins a generation.
#[test]
fn another_boot_begins_a_generation_and_keeps_the_old_ones() {
    let state = blocks(16, 1);
    let served = Served::with_container(LAZY, &state);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    served.overwrite(&[(block(1), vec![1; BLOCK])]);
    let second = served.past(2);
    served
        .own_file("g.2/tail")
        .write_all_at(&[0x55; 16], 0)
        .unwrap();
    served
        .own_file("g.2/bits")
        .write_all_at(&[0; 2], 0)
        .unwrap();
    let third = served.live();
    served.overwrite(&[(block(1), vec![2; BLOCK])]);
    assert_eq!(served.numbers(), [1, 2, 3]);
    assert_eq!(served.head(3, "reason"), "restart");
    assert!(served.past(1) == state && served.past(2) == second && served.past(3) == third);
}

/// Without a reason to keep the present, `revert` goes on with the newest past state: what that has saved needs no space.
/// Its log says what that is.
#[test]
fn a_revert_goes_on_with_the_generation_of_an_earlier_boot() {
    let state = blocks(64, 1);
    let served = Served::with_container(EAGER, &state);
    served.overwrite(&[(0, blocks(8, 2))]);
    let second = served.live();
    served.overwrite(&[(block(4), blocks(8, 3))]);
    let name = served.head(1, "name");
    let revert = || {
        served.run(&["revert", "x.luks", &name, "--yes", "--discard-present"]);
        assert!(served.live() == state && served.past(1) == state && served.past(2) == second);
    };
    let log = served.own_file("logs/2");
    let end = log.metadata().unwrap().len();
    log.write_all_at(&[0xee; 10_000], end).unwrap();
    let bits = served.own_file("g.2/bits");
    bits.write_all_at(&[0xff; 8], 0).unwrap();
    other_boot(&served);
    revert();
    assert_eq!(served.numbers(), [1, 2]);
    // Four blocks were not saved yet, and took the place of the torn record.
    assert_eq!(log.metadata().unwrap().len(), end + 6 * BLOCK as u64);
    served.run(&["check", "--read-data"]);
    // Clients begin the next one.
    served.overwrite(&[(block(30), blocks(3, 4))]);
    assert_eq!(served.numbers(), [1, 2, 3]);
    let third = served.past(3);
    assert!(third == state);

    // Not after a failed sync.
    let tail = served.own_file("g.3/tail");
    tail.write_all_at(&[0; 16], 0).unwrap();
    revert();
    assert_eq!(served.numbers(), [1, 2, 3, 4]);
}

/// What was saved is lost with a record. It must not be saved once more, as it is now.
#[test]
fn a_revert_does_not_go_on_with_a_damaged_log() {
    let state = blocks(8, 1);
    let served = Served::with_container(EAGER, &state);
    served.overwrite(&[(0, blocks(8, 2))]);
    served.overwrite(&[(0, blocks(2, 3))]);
    let log = served.own_file("logs/2");
    for at in [0, log.metadata().unwrap().len() - BLOCK as u64] {
        log.write_all_at(&[0; 64], at).unwrap();
    }
    other_boot(&served);
    let name = served.head(1, "name");
    served.run(&["revert", "x.luks", &name, "--yes", "--discard-present"]);
    assert!(served.live() == state);
    assert_eq!(served.numbers(), [1, 2, 3]);
    let mut client = served.connect();
    client.content(&served.past_path(2)).unwrap_err();
    client.end();
}

/// Every bit of headers, and some of each block: an error, or the right content.
#[test]
fn damage_on_the_disk_is_an_error_and_never_other_content() {
    let state = blocks(32, 1);
    let served = Served::with_container(EAGER, &state);
    let mut states = vec![state];
    for round in 1..4_u64 {
        served.overwrite(&[
            (block(round), blocks(3, round)),
            (block(20), blocks(1, round + 50)),
        ]);
        states.push(served.live());
    }
    // Seals all but the last one.
    assert!(served.past(1) == states[0]);
    let known: Vec<String> = (1..4).map(|number| served.head(number, "name")).collect();
    let mut errors = 0;
    for file in [
        "logs/1",
        "logs/3",
        "g.1/index",
        "g.1/map",
        "g.3/map",
        "g.1/head",
        "g.2/head",
        "g.3/tail",
    ] {
        let len = served.own_file(file).metadata().unwrap().len();
        let mut dice = Dice::new(len);
        let mut places: Vec<u64> = (0..24).map(|_| dice.below(len)).collect();
        places.extend(
            (0..len.div_ceil(4096))
                .map(|n| n * 4096 + 24)
                .filter(|at| *at < len),
        );
        for at in places {
            served.flip(file, at);
            let mut client = served.connect();
            let names = client.list(".generations/x.luks");
            for (index, expected) in states[..3].iter().enumerate() {
                let Some(name) = known.get(index).filter(|name| names.contains(name)) else {
                    errors += 1;
                    continue;
                };
                match client.content(&format!(".generations/x.luks/{name}")) {
                    Ok(content) => assert!(
                        content == *expected,
                        "{file} at {at}, generation {}",
                        index + 1
                    ),
                    Err(_) => errors += 1,
                }
            }
            client.end_anyhow();
            served.flip(file, at);
        }
    }
    assert!(errors > 10, "{errors}");
    assert!(served.past(1) == states[0] && served.past(3) == states[2]);
}

#[test]
fn a_change_past_the_agent_is_noticed_and_shown() {
    let state = blocks(8, 1);
    let served = Served::with_container(EAGER, &state);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    served.overwrite(&[(block(1), vec![1; BLOCK])]);
    let file = fs::File::options()
        .write(true)
        .open(served.path("x.luks"))
        .unwrap();
    file.write_all_at(&[7; 100], block(5)).unwrap();
    let third = served.live();
    // At once, before any session.
    assert_eq!(served.command(&["check"]).status().unwrap().code(), Some(1));
    assert_eq!(
        served.command(&["status"]).status().unwrap().code(),
        Some(3)
    );
    let mut client = served.connect();
    let names = client.list(".generations/x.luks");
    assert!(
        names.iter().all(|name| name.ends_with("-suspect.luks")),
        "{names:?}"
    );
    client.end();
    served.overwrite(&[(block(2), vec![1; BLOCK])]);
    assert_eq!(served.head(3, "reason"), "written-past");
    let mut client = served.connect();
    let names = client.list(".generations/x.luks");
    assert_eq!(
        names
            .iter()
            .filter(|name| name.ends_with("-suspect.luks"))
            .count(),
        2,
        "{names:?}"
    );
    client.end();
    assert!(served.past(3) == third);
    // Not for a change of the owner or of the mode, nor after a kill.
    std::os::unix::fs::chown(served.path("x.luks"), Some(0), Some(0)).unwrap();
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 0, &[9; 10]), 0);
    client.kill();
    served.overwrite(&[(block(3), vec![1; BLOCK])]);
    for number in [4, 5] {
        assert_eq!(served.head(number, "reason"), "session");
    }
    // `ack` takes the container as it is. Its state is kept.
    file.write_all_at(&[8; 100], block(6)).unwrap();
    let sixth = served.live();
    let status = || served.command(&["status"]).status().unwrap().code();
    assert_eq!(status(), Some(3));
    served.run(&["ack", "x.luks"]);
    assert_eq!(status(), Some(0));
    assert_eq!(served.head(6, "reason"), "written-past");
    served.overwrite(&[(block(7), vec![1; BLOCK])]);
    assert!(served.past(6) == sixth && served.numbers().len() == 6);
}

#[test]
fn a_refused_write_changes_nothing_and_the_past_stays() {
    let state = blocks(64, 1);
    let served = Served::with_container(
        "quota = 600K\nfree_min = 0%\nheader = free\nsecret = 6h\n",
        &state,
    );
    // 256 KiB of container, and 256 MiB that saving may exceed the quota by: so a hole is filled instead.
    let file = fs::File::options()
        .write(true)
        .open(served.path("x.luks"))
        .unwrap();
    file.set_len(block(1024)).unwrap();
    let before = served.live();
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 0, &[1; BLOCK]), 0);
    let mut refused = 0;
    for number in 100..400 {
        if client.write(&handle, block(number), &[1; BLOCK]) == 4 {
            refused += 1;
        }
    }
    assert!(refused > 100, "{refused}");
    // What has its place already can still be overwritten.
    assert_eq!(client.write(&handle, block(3), &[5; BLOCK]), 0);
    client.end();
    assert!(served.past(1) == before);
}
