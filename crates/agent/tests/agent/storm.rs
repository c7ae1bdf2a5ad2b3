//! Everything at once: writers of the same blocks that are killed, generations that begin and expire, readers that
//! keep past states open. Each state is read when it has begun, and must be the same whenever it is read later.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::dice::{self, Dice};

use crate::client::{BLOCK, Client, READ, READ_WRITE, RESTLESS, Served, blocks, string};
use crate::outside::reports;
use crate::sessions::ranges;

pub const BLOCKS: u64 = 128;
const WRITERS: u64 = 4;
/// Past states that are kept open.
const HELD: usize = 5;
/// More than these are not left.
const STATES_MAX: usize = 10;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

/// What goes on in a root, until it is stopped.
pub struct Storm<'a> {
    served: &'a Served,
    stop: AtomicBool,
    pub kills: AtomicU64,
    expired: AtomicU64,
    /// Reads of a state that was open while three others began, and others went.
    pub long_reads: AtomicU64,
    /// The states that were read, by generation.
    pub known: Mutex<BTreeMap<u32, Vec<u8>>>,
    held: Mutex<BTreeSet<u32>>,
    /// The generations that may have been removed.
    pub gone: Mutex<BTreeSet<u32>>,
}

/// A past state that is open.
struct Held {
    number: u32,
    handle: Vec<u8>,
    newest: u32,
    expired: u64,
}

/// Stops everything also when the test fails.
struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Where a client finds a state. `None`: it has gone.
fn past_path(served: &Served, number: u32) -> Option<String> {
    let head = served.path(&format!(".sprat-agent/x.luks/g.{number}/head"));
    let text = fs::read_to_string(head).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("name "))?;
    Some(format!(".generations/x.luks/{name}"))
}

impl<'a> Storm<'a> {
    /// With what is known from a storm before.
    pub fn new(served: &'a Served, known: BTreeMap<u32, Vec<u8>>) -> Self {
        Self {
            served,
            stop: AtomicBool::new(false),
            kills: AtomicU64::new(0),
            expired: AtomicU64::new(0),
            long_reads: AtomicU64::new(0),
            known: Mutex::new(known),
            held: Mutex::default(),
            gone: Mutex::default(),
        }
    }

    /// Lets it go on while `wait` runs.
    pub fn run(&self, seed: u64, wait: impl FnOnce(&Self)) {
        std::thread::scope(|scope| {
            let _stopper = Stopper(&self.stop);
            let mut dice = Dice::new(seed);
            let mut seed = || dice.any();
            for _ in 0..WRITERS {
                let seed = seed();
                scope.spawn(move || self.write(Dice::new(seed)));
            }
            let seeds = [seed(), seed()];
            scope.spawn(move || self.read(Dice::new(seeds[0])));
            scope.spawn(move || self.expire(Dice::new(seeds[1])));
            wait(self);
        });
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn write(&self, mut dice: Dice) {
        let _stopper = Stopper(&self.stop);
        while !self.is_stopped() {
            let mut client = self.served.connect();
            let pid = Pid::from_child(&client.child);
            let delay = Duration::from_millis(dice.below(250));
            let killer = std::thread::spawn(move || {
                std::thread::sleep(delay);
                let _ = kill_process(pid, Signal::KILL);
            });
            if dice.percent(15) {
                let fields = [string(b"x.luks"), string(b"token")].concat();
                let _ = client.own("session-begin@sprat", &fields);
            }
            if let Ok(handle) = client.open("x.luks", READ_WRITE) {
                while Self::change(&mut client, &handle, &mut dice) {}
            }
            killer.join().unwrap();
            client.end_anyhow();
            self.kills.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// One request, or several writes. False: it was refused, or the agent is gone.
    fn change(client: &mut Client, handle: &[u8], dice: &mut Dice) -> bool {
        let (first, len) = (dice.below(BLOCKS - 8), 1 + dice.below(8));
        let range = ranges(handle, &[(block(first), block(len))]);
        match dice.below(10) {
            0 => client.own("punch@sprat", &range).is_ok(),
            1 => client.own("will-write@sprat", &range).is_ok(),
            2 => {
                let body = [string(b"fsync@openssh.com"), string(handle)].concat();
                client.ask(200, &body).is_some()
            }
            _ => {
                let writes: Vec<_> = (0..1 + dice.below(6))
                    .map(|_| {
                        let len = usize::try_from(1 + dice.below(3)).unwrap();
                        // Not always at the edges of blocks.
                        let at = block(dice.below(BLOCKS - 3)) + dice.below(2) * 100;
                        (at, blocks(len, dice.any()))
                    })
                    .collect();
                client.write_all(handle, &writes) == writes.len()
            }
        }
    }

    fn read(&self, mut dice: Dice) {
        let _stopper = Stopper(&self.stop);
        let mut client = self.served.connect();
        let mut open: Vec<Held> = Vec::new();
        while !self.is_stopped() {
            let numbers = self.served.numbers();
            let newest = numbers.last().copied().unwrap_or(0);
            for number in numbers {
                if !self.known.lock().unwrap().contains_key(&number) {
                    self.first_read(&mut client, number);
                }
            }
            if open.len() < HELD {
                open.extend(self.hold(&mut client, newest, &mut dice));
            } else if dice.percent(5) {
                let one = open.swap_remove(usize::try_from(dice.below(HELD as u64)).unwrap());
                client.close(&one.handle);
                self.held.lock().unwrap().remove(&one.number);
            }
            for one in &open {
                let state = self.known.lock().unwrap()[&one.number].clone();
                let at = usize::try_from(block(dice.below(BLOCKS - 16))).unwrap();
                let found = client.read(&one.handle, at as u64, 16 * 4096);
                assert!(
                    found.as_ref() == Ok(&state[at..at + 16 * BLOCK].to_vec()),
                    "generation {} of {:?} at {at}, open since {}: {:?}",
                    one.number,
                    self.served.numbers(),
                    one.newest,
                    found.err(),
                );
                let expired = self.expired.load(Ordering::SeqCst);
                if newest >= one.newest + 3 && expired > one.expired {
                    self.long_reads.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
        client.end();
    }

    fn first_read(&self, client: &mut Client, number: u32) {
        let Some(path) = past_path(self.served, number) else {
            return;
        };
        match client.content(&path) {
            Ok(state) => {
                self.known.lock().unwrap().insert(number, state);
            }
            // It may expire meanwhile.
            Err(status) => assert!(
                self.gone.lock().unwrap().contains(&number),
                "generation {number}: status {status}"
            ),
        }
    }

    fn hold(&self, client: &mut Client, newest: u32, dice: &mut Dice) -> Option<Held> {
        let number = {
            let mut held = self.held.lock().unwrap();
            let gone = self.gone.lock().unwrap();
            let known = self.known.lock().unwrap();
            let free = known
                .keys()
                .filter(|number| !held.contains(number) && !gone.contains(number));
            let free: Vec<u32> = free.copied().collect();
            let at = dice.below(free.len().max(1) as u64);
            let number = free.get(usize::try_from(at).unwrap()).copied()?;
            held.insert(number);
            number
        };
        let path = past_path(self.served, number).unwrap();
        Some(Held {
            number,
            handle: client.open(&path, READ).unwrap(),
            newest,
            expired: self.expired.load(Ordering::SeqCst),
        })
    }

    fn expire(&self, mut dice: Dice) {
        let _stopper = Stopper(&self.stop);
        while !self.is_stopped() {
            std::thread::sleep(Duration::from_millis(100));
            let mut numbers = self.served.numbers();
            numbers.pop();
            while numbers.len() >= STATES_MAX {
                let at = usize::try_from(dice.below(numbers.len() as u64)).unwrap();
                let number = numbers.swap_remove(at);
                {
                    let held = self.held.lock().unwrap();
                    if held.contains(&number) {
                        continue;
                    }
                    self.gone.lock().unwrap().insert(number);
                }
                let mark = format!(".sprat-agent/x.luks/g.{number}/expire");
                fs::write(self.served.path(&mark), "").unwrap();
                self.expired.fetch_add(1, Ordering::SeqCst);
            }
            self.served.run(&["tidy"]);
        }
    }
}

/// Every state that is left reads as it was known. `may_lack`: of those some may be missing.
#[track_caller]
pub fn check(served: &Served, known: &BTreeMap<u32, Vec<u8>>, may_lack: &BTreeSet<u32>) {
    let numbers = served.numbers();
    for number in known.keys().filter(|number| !numbers.contains(number)) {
        assert!(may_lack.contains(number), "generation {number} is missing");
    }
    for number in &numbers {
        let mut client = served.connect();
        let content = client.content(&served.past_path(*number));
        client.end_anyhow();
        let content = content.unwrap_or_else(|status| {
            panic!(
                "generation {number} of {numbers:?}: status {status}\n{}",
                about(served)
            )
        });
        let Some(state) = known.get(number) else {
            continue;
        };
        let pairs = content.chunks(BLOCK).zip(state.chunks(BLOCK));
        let differs = pairs.filter(|(a, b)| a != b).count();
        assert!(
            content == *state,
            "generation {number} of {numbers:?}: {differs} blocks differ"
        );
    }
}

/// What the agent says, and has.
pub fn about(served: &Served) -> String {
    let mut text = String::new();
    for words in [&["list"][..], &["status"], &["check", "--read-data"]] {
        let output = served.command(words).output().unwrap();
        text += &String::from_utf8_lossy(&output.stdout);
        text += &String::from_utf8_lossy(&output.stderr);
    }
    let own = served.path(".sprat-agent/x.luks");
    let files = Command::new("ls").arg("-lR").arg(own).output().unwrap();
    text + &String::from_utf8_lossy(&files.stdout)
}

/// A container with data and holes.
pub fn make_container(served: &Served) {
    let file = fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(block(BLOCKS)).unwrap();
    let half = blocks(usize::try_from(BLOCKS / 2).unwrap(), 1);
    std::os::unix::fs::FileExt::write_all_at(&file, &half, 0).unwrap();
}

#[test]
fn past_states_stay_exact_while_writers_are_killed_and_others_begin_and_expire() {
    past_states_stay_exact(&Served::new(RESTLESS), 40, &[RESTLESS]);
}

/// So many kills, in the short form. The policy is each of these in turn.
pub fn past_states_stay_exact(served: &Served, kills: u64, policies: &[&str]) {
    make_container(served);
    let storm = Storm::new(served, BTreeMap::new());
    let kills = dice::number("SPRAT_TORTURE_ROUNDS").map_or(kills, |rounds| rounds * 20);
    let before = served.live();
    // Only a session that ended in order knows how it left the container.
    served.overwrite(&[(0, vec![5; BLOCK])]);
    storm.run(dice::seed(), |storm| {
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let mut policies = policies.iter().cycle();
        while count(&storm.kills) < kills || count(&storm.long_reads) < kills {
            served.set_policy(policies.next().unwrap());
            std::thread::sleep(Duration::from_millis(500));
            assert!(!storm.is_stopped(), "one of them failed");
        }
    });
    let gone = storm.gone.lock().unwrap();
    let mut known = storm.known.lock().unwrap();
    assert!(!known.contains_key(&1) || known[&1] == before);
    check(served, &known, &gone);
    // What nobody disturbs: the state that a session begins with.
    let before = served.live();
    served.overwrite(&[(0, vec![7; BLOCK])]);
    let newest = *served.numbers().last().unwrap();
    assert!(served.past(newest) == before, "the state after the storm");
    known.insert(newest, before);
    check(served, &known, &gone);
    assert!(served.run(&["check", "--read-data"]).contains("0 findings"));
    assert_eq!(reports(served), 0, "kills are no changes without the agent");
    println!("{} kills: 0 reports", storm.kills.load(Ordering::SeqCst));
}
