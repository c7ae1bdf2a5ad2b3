//! An intruder with key and login who stays for months, by a clock of the test's own. Each session of his tries one
//! attack of the list, too. He shows damage only where nobody looks, and uses up the generations that sessions may
//! begin before the honest one. Then he destroys everything.

use std::collections::BTreeSet;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use sprat_testkit::dice::{self, Dice};
use sprat_testkit::fake_clock::{self, FakeClock};
use sprat_testkit::machine::TestMachine;
use sprat_testkit::requires;

use crate::client::{BLOCK, Client, READ_WRITE, Served, blocks, string};
use crate::hostile::{BLOCKS, REFUSED, Target};
use crate::sessions::ranges;

const DAY_S: i64 = 86_400;
/// Everything by default; the container is small, and so is its header.
const POLICY: &str = "free_min = 0%\nsize_max = 1G\nheader_bytes = 16K\n";
/// What he damages: as a file system's superblock.
const SUPERBLOCK: usize = 20;

fn block(number: usize) -> u64 {
    (number * BLOCK) as u64
}

struct Siege {
    target: Target,
    machine: TestMachine,
    clock: FakeClock,
    sessions: usize,
    /// Each content that an honest session left.
    good: BTreeSet<Vec<u8>>,
}

impl Siege {
    fn new() -> Self {
        let machine = TestMachine::new();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now_s = i64::try_from(now.as_secs()).unwrap();
        let clock = FakeClock::new(machine.folder(), now_s);
        let target = Target::untouched(POLICY);
        let mut siege = Self {
            target,
            machine,
            clock,
            sessions: 0,
            good: BTreeSet::new(),
        };
        // The folder was adopted by the real clock.
        fs::remove_file(siege.target.served.path(".sprat-agent/clock")).unwrap();
        siege.run(&["tidy"], 0);
        // Days begin at midnight.
        siege.at((now_s / DAY_S + 1) * DAY_S);
        siege
    }

    fn served(&self) -> &Served {
        &self.target.served
    }

    fn at(&mut self, time_s: i64) {
        self.clock.awake_until(time_s);
    }

    #[track_caller]
    fn run(&mut self, words: &[&str], code: i32) -> String {
        let mut command = self.clock.command_of(&self.machine, crate::client::agent());
        command
            .args(words)
            .arg("--root")
            .arg(self.served().path(""));
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn connect(&mut self) -> Client {
        self.sessions += 1;
        let mut command = self.clock.command_of(&self.machine, crate::client::agent());
        command.arg("serve").arg("--root");
        command.arg(self.served().path(""));
        Client::start(command)
    }

    /// A session of the intruder: an attack that is refused, and one write.
    fn intrude(&mut self, at: u64, data: &[u8]) {
        let (name, attack) = REFUSED[self.sessions % REFUSED.len()];
        let mut client = self.connect();
        // There are none yet in the first night.
        if !self.served().numbers().is_empty() {
            assert!(!attack(&mut client, &self.target), "{name} was allowed");
        }
        client.end_anyhow();
        let mut client = self.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, at, data), 0);
        client.end();
    }

    /// The nightly backup.
    fn back_up(&mut self, night: u64) {
        let mut client = self.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        let first = block(24 + usize::try_from(night % 30).unwrap());
        assert_eq!(client.write(&handle, first, &blocks(4, night)), 0);
        let fields = [string(b"x.luks"), vec![0, 0, 0, 1]].concat();
        client.own("session-end@sprat", &fields).unwrap();
        client.end();
        self.good.insert(self.served().live());
    }

    fn day(&mut self, night: u64) {
        let midnight = self.clock.now_s();
        let whole = self.served().live();
        let superblock = &whole[SUPERBLOCK * BLOCK..(SUPERBLOCK + 1) * BLOCK];
        self.at(midnight + 1);
        self.intrude(block(SUPERBLOCK), &blocks(1, 1000 + night));
        self.at(midnight + 21);
        self.intrude(block(SUPERBLOCK), superblock);
        assert!(self.served().live() == whole);
        // The server's clock is wrong for a while, by years.
        self.clock.error_s = [0, 3650, 0, -3650][usize::try_from(night % 4).unwrap()] * DAY_S;
        for burnt in 0..13 {
            self.at(midnight + 3600 + 2 * burnt);
            let same = usize::try_from(burnt).unwrap();
            self.intrude(block(same + 5), &whole[(same + 5) * BLOCK..][..10]);
        }
        self.clock.error_s = 0;
        self.at(midnight + 7200);
        self.back_up(night);
        self.at(midnight + 3 * 3600);
        self.run(&["tidy"], 0);
        if night % 9 == 8 {
            self.clock.off_until(midnight + 5 * 3600);
            self.at(midnight + 6 * 3600);
        }
        self.at(midnight + DAY_S);
    }
}

/// `make torture` has the long form.
#[test]
fn months_of_an_intruder_leave_undamaged_states_and_the_evening_before() {
    requires!(fake_clock::missing());
    let nights = dice::number("SPRAT_TORTURE_ROUNDS").map_or(13, |_| 140);
    let mut siege = Siege::new();
    siege.good.insert(siege.served().live());
    for night in 0..nights {
        siege.day(night);
    }
    let evening = siege.served().live();
    assert!(siege.good.contains(&evening));
    // Nothing was reported so far: he wrote less than a backup does.
    let text = siege.run(&["status"], 0);
    assert!(!text.contains("ALARM"), "{text}");

    let other = Served::with_container(POLICY, &blocks(8, 1));
    siege.at(siege.clock.now_s() + 40_000);
    let mut intruder = siege.connect();
    let handle = intruder.open("x.luks", READ_WRITE).unwrap();
    let mut dice = Dice::new(nights);
    for at in 0..BLOCKS {
        assert_eq!(
            intruder.write(&handle, block(at), &blocks(1, dice.any())),
            0
        );
        // Another client's backup goes on meanwhile.
        if at == BLOCKS / 2 {
            other.overwrite(&[(block(2), blocks(3, 2))]);
        }
    }
    let everything = ranges(&handle, &[(0, block(BLOCKS))]);
    intruder.own("punch@sprat", &everything).unwrap();
    intruder.end();
    assert!(siege.served().live() == vec![0; BLOCKS * BLOCK]);
    assert!(other.past(1) == blocks(8, 1) && other.live()[2 * BLOCK..5 * BLOCK] == blocks(3, 2));
    let text = siege.run(&["status"], 3);
    assert!(text.contains("header"), "{text}");

    let served = siege.served();
    let numbers = served.numbers();
    let newest = *numbers.last().unwrap();
    assert!(served.past(newest) == evening, "the evening before");
    let counted = |number| served.head(number, "counted").parse::<i64>().unwrap();
    let is_old = |number: &&u32| counted(newest) - counted(**number) > 8 * DAY_S;
    let is_good = |number: &&u32| siege.good.contains(&served.past(**number));
    let old: Vec<_> = numbers.iter().filter(is_old).collect();
    let good = old.iter().filter(|number| is_good(number)).count();
    println!(
        "{} sessions; {} states, {} older than 8 days, {good} of these undamaged",
        siege.sessions,
        numbers.len(),
        old.len()
    );
    let wanted = usize::try_from(nights - 9).unwrap().min(30);
    assert!(good >= wanted, "{good} of {}", old.len());
    let name = served.head(newest, "name");
    siege.run(&["revert", "x.luks", &name, "--yes"], 0);
    assert!(siege.served().live() == evening);
    siege.run(&["check", "--read-data"], 0);
}
