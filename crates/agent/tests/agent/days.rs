//! Months of backups by a clock of the test's own: what stays is what a model of the policy names, the space of the
//! rest is back, and the oldest state is read about as cheaply as the live file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use sprat_testkit::dice::{self, Dice};
use sprat_testkit::fake_clock::{self, FakeClock};
use sprat_testkit::machine::TestMachine;
use sprat_testkit::tmpfs::SmallDisk;
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, READ, READ_WRITE, Served, agent, blocks};

const DAY_S: i64 = 86_400;
const HOUR_S: i64 = 3600;
const BLOCKS: u64 = 1024;
/// A quarter of the container is a hole at first.
const WITH_DATA: usize = 768;
/// A session overwrites this many runs of four blocks.
const RUNS: u64 = 16;
const POLICY: &str = "keep = all 7d, daily 30d, weekly 12w, monthly 12m\nat_least = 3\nsecret = 6h\nfree_min = 0%\n\
                      header = free\n";

/// A past state, by the test's own records.
struct State {
    number: u32,
    /// The state came about then.
    since_s: i64,
    /// The agent's own numbers. A command takes seconds, so they are not known better.
    stood_s: i64,
    counted_s: i64,
    secret: bool,
    content: Vec<u8>,
    had_data: BTreeSet<u64>,
    /// What was written until the next state that stays.
    written: BTreeSet<u64>,
    /// Of that, old content in its own log.
    own: usize,
}

struct Months {
    // Before its disk is unmounted.
    served: Served,
    _disk: SmallDisk,
    machine: TestMachine,
    clock: FakeClock,
    dice: Dice,
    had_data: BTreeSet<u64>,
    states: BTreeMap<u32, State>,
    start_s: i64,
    last_s: i64,
}

/// The month of a day since 1970.
fn month(mut day: i64) -> (i64, usize) {
    let mut year = 1970;
    loop {
        let leap = i64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
        if day < 365 + leap {
            let lengths = [31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            for (month, length) in lengths.into_iter().enumerate() {
                if day < length {
                    return (year, month);
                }
                day -= length;
            }
        }
        day -= 365 + leap;
        year += 1;
    }
}

/// Whether two states have the same day, week (from Monday) or month.
fn together(rule: &str, one: &State, other: &State) -> bool {
    let [a, b] = [one, other].map(|state| state.since_s.div_euclid(DAY_S));
    match rule {
        "all" => one.number == other.number,
        "daily" => a == b,
        "weekly" => (a + 3).div_euclid(7) == (b + 3).div_euclid(7),
        _ => month(a) == month(b),
    }
}

impl State {
    /// Whether a rule of the policy keeps this one of `all`.
    fn is_kept(&self, all: &BTreeMap<u32, Self>, now_s: i64) -> bool {
        let newest = all.keys().next_back();
        let stood: Vec<&Self> = all
            .values()
            .filter(|one| one.stood_s >= 6 * HOUR_S && Some(&one.number) != newest)
            .collect();
        let rules = [
            ("all", 7),
            ("daily", 30),
            ("weekly", 12 * 7),
            ("monthly", 12 * 31),
        ];
        Some(&self.number) == newest
            || stood
                .iter()
                .rev()
                .take(3)
                .any(|one| one.number == self.number)
            || rules.into_iter().any(|(rule, days)| {
                let others = || all.values().filter(|one| together(rule, one, self));
                let is_first = others().all(|one| one.number >= self.number);
                let is_longest = others().all(|one| {
                    one.stood_s < self.stood_s
                        || one.stood_s == self.stood_s && one.number >= self.number
                });
                let is_first_secret =
                    self.secret && others().all(|one| !one.secret || one.number >= self.number);
                now_s - self.counted_s <= days * DAY_S
                    && (is_first || is_longest || is_first_secret)
            })
    }
}

impl Months {
    fn new(seed: u64) -> Self {
        let machine = TestMachine::new();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        // From a midnight on, and later than the times of files, which are the real ones.
        let start_s = (i64::try_from(now.as_secs()).unwrap() / DAY_S + 2) * DAY_S;
        let clock = FakeClock::new(machine.folder(), start_s);
        // Without waiting for a disk.
        let disk = SmallDisk::new("size=256m");
        let served = Served::in_folder(disk.path(), POLICY);
        let file = fs::File::create(served.path("x.luks")).unwrap();
        file.set_len(BLOCKS * BLOCK as u64).unwrap();
        file.write_all_at(&blocks(WITH_DATA, seed), 0).unwrap();
        // The folder was adopted by the real clock.
        fs::remove_file(served.path(".sprat-agent/clock")).unwrap();
        let months = Self {
            served,
            _disk: disk,
            machine,
            clock,
            dice: Dice::new(seed),
            had_data: (0..WITH_DATA as u64).collect(),
            states: BTreeMap::new(),
            start_s,
            // The container's file was written just now.
            last_s: i64::try_from(now.as_secs()).unwrap(),
        };
        months.tidy();
        months
    }

    fn agent(&self, words: &[&str]) -> Command {
        let mut command = self.clock.command_of(&self.machine, agent());
        command.args(words).arg("--root").arg(self.served.path(""));
        command
    }

    fn tidy(&self) {
        let output = self.agent(&["tidy"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// A backup begins a generation, and overwrites some blocks.
    fn back_up(&mut self) {
        let content = self.served.live();
        let had_data = self.had_data.clone();
        let mut written = BTreeSet::new();
        let mut writes = Vec::new();
        for _ in 0..RUNS {
            let first = self.dice.below(BLOCKS - 4);
            writes.push((first * BLOCK as u64, blocks(4, self.dice.any())));
            written.extend(first..first + 4);
        }
        let mut client = Client::start(self.agent(&["serve"]));
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write_all(&handle, &writes), writes.len());
        client.end();
        self.had_data.extend(&written);
        let number = *self.served.numbers().last().unwrap();
        let [stood_s, counted_s] =
            ["stood", "counted"].map(|key| self.served.head(number, key).parse::<i64>().unwrap());
        let passed_s = self.clock.now_s() - self.start_s;
        let stood_by_us_s = self.clock.now_s() - self.last_s;
        assert!((counted_s - passed_s).abs() < HOUR_S && (stood_s - stood_by_us_s).abs() < HOUR_S);
        let state = State {
            number,
            since_s: self.last_s,
            stood_s,
            counted_s,
            secret: self.served.head(number, "reason") == "secret",
            content,
            own: written.intersection(&had_data).count(),
            had_data,
            written,
        };
        assert!(
            self.states.insert(number, state).is_none(),
            "no generation was begun"
        );
        self.last_s = self.clock.now_s();
    }

    /// The agent and the model expire; what one state needs for itself and for those that went.
    fn expire(&mut self) {
        self.tidy();
        let now_s = self.clock.now_s() - self.start_s;
        let kept: BTreeSet<u32> = self
            .states
            .values()
            .filter(|state| state.is_kept(&self.states, now_s))
            .map(|state| state.number)
            .collect();
        let left: BTreeSet<u32> = self.served.numbers().into_iter().collect();
        assert_eq!(left, kept, "by the model");
        let mut older: Option<u32> = None;
        let numbers: Vec<u32> = self.states.keys().copied().collect();
        for number in numbers {
            if kept.contains(&number) {
                older = Some(number);
            } else {
                let gone = self.states.remove(&number).unwrap();
                if let Some(older) = older {
                    self.states
                        .get_mut(&older)
                        .unwrap()
                        .written
                        .extend(gone.written);
                }
            }
        }
    }

    /// Bytes of old content that the states need: of all logs, and of those of states that are gone.
    fn needed(&self) -> [u64; 2] {
        let of = |state: &State| state.written.intersection(&state.had_data).count();
        let states = || self.states.values();
        let all: usize = states().map(of).sum();
        let own: usize = states().map(|state| state.own).sum();
        [all, all - own].map(|blocks| (blocks * BLOCK) as u64)
    }
}

fn bytes_below(folder: &Path) -> u64 {
    let metadata = fs::metadata(folder).unwrap();
    let inside = metadata.is_dir().then(|| fs::read_dir(folder).unwrap());
    let inside = inside.into_iter().flatten();
    metadata.blocks() * 512
        + inside
            .map(|entry| bytes_below(&entry.unwrap().path()))
            .sum::<u64>()
}

/// What the agent reads for a client that reads this whole file: calls, and bytes.
pub fn cost_of_reading(served: &Served, path: &str) -> (u64, u64) {
    let trace = served.path("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "trace=pread64,preadv,read", "-o"]);
    command.arg(&trace).arg(agent()).args(["serve", "--root"]);
    command.arg(served.path(""));
    let mut client = Client::start(command);
    let handle = client.open(path, READ).unwrap();
    let len = 128 * 1024;
    for at in (0..served.live().len() as u64).step_by(len) {
        let data = client.read(&handle, at, u32::try_from(len).unwrap());
        assert_eq!(data.unwrap().len(), len);
    }
    client.end();
    let text = fs::read_to_string(&trace).unwrap();
    fs::remove_file(trace).unwrap();
    // Requests come by descriptor 0.
    let results = text.lines().filter(|line| !line.contains(" read(0,"));
    let results = results.filter_map(|line| line.rsplit_once(" = ")?.1.parse::<u64>().ok());
    results.fold((0, 0), |(calls, bytes), got| (calls + 1, bytes + got))
}

/// `make torture` has the long form: 500 generations in 400 days.
#[test]
fn after_months_the_states_are_those_of_the_policy_and_the_space_of_the_others_is_back() {
    requires!(fake_clock::missing(), needs::program("strace"));
    let days = dice::number("SPRAT_TORTURE_ROUNDS").map_or(45, |_| 400);
    let mut months = Months::new(dice::seed());
    let start_s = months.clock.now_s();
    for day in 0..days {
        let midnight_s = start_s + day * DAY_S;
        months.clock.awake_until(midnight_s + 2 * HOUR_S);
        months.back_up();
        months.clock.awake_until(midnight_s + 3 * HOUR_S);
        months.expire();
        if day % 4 == 3 {
            months.clock.awake_until(midnight_s + 14 * HOUR_S);
            months.back_up();
        }
    }
    months.expire();
    let served = &months.served;
    let numbers = served.numbers();
    let own = served.path(".sprat-agent/x.luks");
    let (logs, all) = (bytes_below(&own.join("logs")), bytes_below(&own));
    let of_gone: u64 = (1..numbers[numbers.len() - 1])
        .filter(|number| !numbers.contains(number))
        .map(|number| own.join(format!("logs/{number}")))
        .filter(|log| log.exists())
        .map(|log| bytes_below(&log))
        .sum();
    let [needed, needed_of_gone] = months.needed();
    let (oldest, newest) = (numbers[0], numbers[numbers.len() - 1]);
    let live = cost_of_reading(served, "x.luks");
    let past = cost_of_reading(served, &served.past_path(oldest));
    println!(
        "{newest} generations in {days} days, {} stay, the oldest is {oldest}; {needed} bytes of old content are \
         needed, the logs take {logs}; {needed_of_gone} in logs of states that are gone, these take {of_gone}; all of \
         the agent's files {all}; reading takes (calls, bytes) {live:?} live \
         and {past:?} for the oldest",
        numbers.len()
    );
    assert!(of_gone <= needed_of_gone + needed_of_gone / 20);
    // And the heads of records.
    let heads = numbers.len() as u64 * RUNS * BLOCK as u64;
    assert!(logs <= needed + heads, "{logs} for {needed}");
    assert!(past.1 <= 2 * live.1, "{past:?} for {live:?}");
    for (number, state) in &months.states {
        assert!(served.past(*number) == state.content, "generation {number}");
    }
    let output = months.agent(&["check", "--read-data"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
