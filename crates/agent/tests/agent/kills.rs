//! kill -9 at any moment: every generation reads as the container was when it began.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sprat_testkit::dice::{self, Dice};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ_WRITE, RESTLESS, Served, agent, blocks};
use crate::outside::reports;

const BLOCKS: u64 = 192;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

pub fn make_container(served: &Served) {
    let content = blocks(usize::try_from(BLOCKS).unwrap(), 1);
    std::fs::write(served.path("x.luks"), content).unwrap();
}

fn rounds(short: u64) -> u64 {
    dice::number("SPRAT_TORTURE_ROUNDS").map_or(short, |rounds| rounds * 10)
}

/// The newest generation has this state, and so have all others that are known.
fn check_all(served: &Served, states: &BTreeMap<u32, Vec<u8>>) {
    let mut client = served.connect();
    for (number, state) in states {
        let content = client.content(&served.past_path(*number)).unwrap();
        let differs = content
            .chunks(BLOCK)
            .zip(state.chunks(BLOCK))
            .filter(|(a, b)| a != b)
            .count();
        assert!(
            content == *state,
            "generation {number}: {differs} blocks differ"
        );
    }
    client.end();
}

/// Four processes write the same blocks and are killed; each round begins with a generation.
#[test]
fn killed_writers_of_the_same_blocks_leave_every_generation_exact() {
    every_generation_is_exact_after_kills(&Served::new(EAGER), 12, &[EAGER]);
}

/// So many rounds, in the short form. The policy is each of these in turn.
pub fn every_generation_is_exact_after_kills(served: &Served, short: u64, policies: &[&str]) {
    let mut dice = Dice::new(dice::seed());
    make_container(served);
    let mut states = BTreeMap::new();
    let wanted = rounds(short);
    // On a busy machine many are killed before their first write.
    for (round, policy) in (0..wanted * 20).zip(policies.iter().cycle()) {
        if states.len() as u64 == wanted {
            break;
        }
        served.set_policy(policy);
        if round % 3 == 0 {
            // Only a session that ended in order knows how it left the container.
            served.overwrite(&[(block(dice.below(BLOCKS)), blocks(1, dice.any()))]);
        }
        let before = served.live();
        let newest = served.numbers().last().copied();
        let first = newest.map_or(1, |newest| newest + 1);
        // Its process was killed before a write. Then the first session of this round goes on with it, unless a
        // record of it was durable. So the next generation may have the state that this session leaves.
        let unused = newest.is_some_and(|newest| served.past(newest) == before);
        let delays: Vec<u64> = (0..4).map(|_| dice.below(150)).collect();
        let seeds: Vec<u64> = (0..4).map(|_| dice.any()).collect();
        std::thread::scope(|scope| {
            for (seed, delay) in seeds.into_iter().zip(delays) {
                scope.spawn(move || {
                    let mut dice = Dice::new(seed);
                    let mut client = served.connect();
                    let Ok(handle) = client.open("x.luks", READ_WRITE) else {
                        return;
                    };
                    let pid = rustix::process::Pid::from_child(&client.child);
                    let killer = scope.spawn(move || {
                        std::thread::sleep(Duration::from_millis(delay));
                        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    });
                    loop {
                        let writes: Vec<_> = (0..1 + dice.below(6))
                            .map(|_| {
                                let len = usize::try_from(1 + dice.below(3)).unwrap();
                                (block(dice.below(BLOCKS - 3)), blocks(len, dice.any()))
                            })
                            .collect();
                        if client.write_all(&handle, &writes) < writes.len() {
                            break;
                        }
                    }
                    killer.join().unwrap();
                    client.end_anyhow();
                });
            }
        });
        // The first that was begun in this round has the state from before it.
        if unused {
            // Nothing is known of the next one.
        } else if served.numbers().contains(&first) {
            states.insert(first, before);
        } else {
            // None of them came so far; or the last one's generation has this very state.
            let same = states.values().next_back() == Some(&before);
            assert!(same || served.live() == before, "round {round}");
        }
        let recent: BTreeMap<_, _> = states
            .iter()
            .rev()
            .take(2)
            .map(|(n, s)| (*n, s.clone()))
            .collect();
        check_all(served, &recent);
    }
    assert_eq!(states.len() as u64, wanted);
    check_all(served, &states);
    assert_eq!(reports(served), 0, "kills are no changes without the agent");
}

/// Generations begin while four processes write blocks of their own, one after another, and are killed.
/// Each state has all writes of a process up to one of them, and none after it.
#[test]
fn a_generation_that_begins_between_writes_has_a_state_of_one_moment() {
    every_state_is_of_one_moment(&Served::new(RESTLESS), 6);
}

/// So many generations, in the short form.
pub fn every_state_is_of_one_moment(served: &Served, short: u64) {
    const OWN: u64 = 24;
    let len = usize::try_from(4 * OWN).unwrap() * BLOCK;
    std::fs::write(served.path("x.luks"), vec![0; len]).unwrap();
    let stop = AtomicBool::new(false);
    let stamp = |count: u64| count.to_le_bytes().repeat(BLOCK / 8);
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let stop = &stop;
            scope.spawn(move || {
                let mut dice = Dice::new(writer);
                let mut next = 1;
                while !stop.load(Ordering::SeqCst) {
                    let mut client = served.connect();
                    let Ok(handle) = client.open("x.luks", READ_WRITE) else {
                        continue;
                    };
                    for _ in 0..dice.below(40) {
                        let group = 1 + dice.below(4);
                        let place = |count: u64| block(writer * OWN + count * 7 % OWN);
                        let writes: Vec<_> = (next..next + group)
                            .map(|count| (place(count), stamp(count)))
                            .collect();
                        assert_eq!(client.write_all(&handle, &writes), writes.len());
                        next += group;
                    }
                    // All was answered: the next process goes on behind it.
                    client.kill();
                }
            });
        }
        let wanted = u32::try_from(rounds(short)).unwrap();
        while served
            .numbers()
            .last()
            .is_none_or(|newest| *newest < wanted)
        {
            std::thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::SeqCst);
    });
    let mut client = served.connect();
    for number in served.numbers() {
        let content = client.content(&served.past_path(number)).unwrap();
        for writer in 0..4 {
            let value = |own: u64| {
                let at = usize::try_from(block(writer * OWN + own)).unwrap();
                let block = &content[at..at + BLOCK];
                let count = u64::from_le_bytes(block[..8].try_into().unwrap());
                assert!(
                    block == stamp(count),
                    "generation {number}: a block of two writes"
                );
                count
            };
            let values: Vec<u64> = (0..OWN).map(value).collect();
            let last = values.iter().copied().max().unwrap();
            let mut expected = vec![0; usize::try_from(OWN).unwrap()];
            for count in 1..=last {
                expected[usize::try_from(count * 7 % OWN).unwrap()] = count;
            }
            assert_eq!(values, expected, "generation {number}, writer {writer}");
        }
    }
    client.end();
}

/// Every call that changes something, or locks.
const STEPS: &str =
    "pwrite64,fdatasync,fsync,ftruncate,mkdir,mkdirat,renameat,renameat2,unlinkat,flock";

pub fn traced(served: &Served, arguments: &[&str]) -> Client {
    let mut command = Command::new("strace");
    command.args(["-qq", "-f"]).args(arguments);
    command
        .arg(agent())
        .arg("serve")
        .arg("--root")
        .arg(served.path(""));
    Client::start(command)
}

/// One session that begins a generation, saves, overwrites and ends.
pub fn session(client: &mut Client, seed: u64) -> Option<()> {
    let handle = client.open("x.luks", READ_WRITE).ok()?;
    let mut dice = Dice::new(seed);
    for _ in 0..3 {
        let writes: Vec<_> = (0..3)
            .map(|_| (block(dice.below(BLOCKS - 2)), blocks(2, dice.any())))
            .collect();
        if client.write_all(&handle, &writes) < 3 {
            return None;
        }
    }
    let body = [&[0, 0, 0, 4][..], &handle].concat();
    client.ask(4, &body).map(drop)
}

#[test]
fn killed_at_each_step_of_a_session_every_generation_stays_exact() {
    requires!(needs::program("strace"));
    killed_at_each_step_of_a_session(&Served::new(EAGER), STEPS);
}

/// At these calls, in the short form.
pub fn killed_at_each_step_of_a_session(served: &Served, steps: &str) {
    make_container(served);
    // strace counts each kind of call by itself.
    let calls = match dice::number("SPRAT_TORTURE_ROUNDS") {
        Some(_) => format!(
            "{steps},read,pread64,openat,newfstatat,fstat,lseek,write,getdents64,statx,clock_gettime"
        ),
        None => steps.to_owned(),
    };
    let mut states: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut killed = 0;
    for call in calls.split(',') {
        for step in 1.. {
            let before = served.live();
            let inject = format!("inject={call}:signal=KILL:when={step}");
            let mut client = traced(
                served,
                &[
                    "-o",
                    "/dev/null",
                    "-e",
                    &format!("trace={call}"),
                    "-e",
                    &inject,
                ],
            );
            let done = session(&mut client, killed).is_some();
            client.end_anyhow();
            let newest = served.numbers().last().copied().unwrap_or(0);
            if newest > states.keys().last().copied().unwrap_or(0) {
                states.insert(newest, before);
            } else {
                // Killed before the generation was there, so nothing was written. Or the session before was
                // killed when its generation was there and nothing was written.
                let same = states.values().next_back() == Some(&before);
                assert!(same || served.live() == before, "{call} {step}");
            }
            if let Some((number, state)) = states.iter().next_back() {
                assert!(
                    served.past(*number) == *state,
                    "{call} {step}, generation {number}"
                );
            }
            // The end of a session is not answered: it may be killed there, too.
            if done && fs_done(served) {
                break;
            }
            killed += 1;
        }
    }
    println!("{killed} steps");
    assert!(killed > 40 || steps != STEPS, "only {killed} steps");
    check_all(served, &states);
}

/// Once more, and it has ended: with the present kept and without.
#[test]
fn killed_at_each_step_a_revert_loses_nothing_and_ends_the_next_time() {
    requires!(needs::program("strace"));
    // What changes something. At any other call all is as it was after the one before it.
    let steps = "pwrite64,fallocate,mkdirat,renameat,renameat2,unlinkat";
    killed_at_each_step_of_a_revert(&Served::new(EAGER), steps, 30);
}

/// At these calls, in the short form. At least so many steps.
pub fn killed_at_each_step_of_a_revert(served: &Served, steps: &str, least: u64) {
    let mut content = blocks(40, 1);
    // Holes, which the garbage fills.
    content.extend(vec![0; 24 * BLOCK]);
    let file = std::fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(content.len() as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &content[..40 * BLOCK], 0).unwrap();
    let calls = match dice::number("SPRAT_TORTURE_ROUNDS") {
        Some(_) => &format!("{STEPS},fallocate,ioctl"),
        None => steps,
    };
    let mut states = BTreeMap::new();
    let mut killed = 0;
    for more in [&["--yes"][..], &["--yes", "--discard-present"]] {
        for call in calls.split(',') {
            for step in 1.. {
                let garbage = [(3, 9), (30, 20), (60, 2)];
                let garbage = garbage.map(|(at, len)| (block(at), blocks(len, 99 + killed)));
                served.overwrite(&garbage);
                let number = *served.numbers().last().unwrap();
                states.insert(number, content.clone());
                let name = served.head(number, "name");
                let words = [&["revert", "x.luks", &name], more].concat();
                let inject = format!("inject={call}:signal=KILL:when={step}");
                let trace = format!("trace={call}");
                let mut command = Command::new("strace");
                command.args(["-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
                command.arg(agent()).args(&words).arg("--root");
                let done = command.arg(served.path("")).output().unwrap();
                let recent = states.iter().rev().take(2);
                check_all(served, &recent.map(|(n, s)| (*n, s.clone())).collect());
                if !done.status.success() {
                    killed += 1;
                    served.run(&words);
                }
                assert!(served.live() == content, "{more:?} {call} {step}");
                if done.status.success() {
                    break;
                }
            }
        }
    }
    assert!(killed > least, "only {killed} steps");
    check_all(served, &states);
}

/// Whether the last session ended in order.
fn fs_done(served: &Served) -> bool {
    served
        .run(&["status", "--json"])
        .contains("\"session_open\":false")
}

/// No write to the container lies between a write to the log and its fdatasync.
#[test]
fn a_saved_block_is_durable_before_it_is_overwritten() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(usize::try_from(BLOCKS).unwrap(), 1));
    let trace = served.path("trace");
    let calls = "trace=pwrite64,fdatasync,fsync";
    let mut client = traced(&served, &["-y", "-o", trace.to_str().unwrap(), "-e", calls]);
    session(&mut client, 1).unwrap();
    client.end();
    let (mut logged, mut written, mut dirty) = (0, 0, false);
    for line in std::fs::read_to_string(trace).unwrap().lines() {
        let is = |call: &str, file: &str| line.contains(call) && line.contains(file);
        if is("pwrite64(", "/.sprat-agent/x.luks/logs/") {
            (logged, dirty) = (logged + 1, true);
        } else if is("fdatasync(", "/.sprat-agent/x.luks/logs/") {
            dirty = false;
        } else if is("pwrite64(", "/x.luks>") {
            assert!(!dirty, "{line}");
            written += 1;
        }
    }
    assert!(logged >= 3 && written >= 9, "{logged} and {written}");
}
