//! A machine falls asleep at some moment of a command, over a real sshd. Meanwhile another one takes
//! its container over, backs up and ends. Then the first one wakes.
//!
//! Nothing of the other's finished snapshot may change without a report by `check`; nothing at all may
//! change where the takeover proved that no late write can arrive. `SPRAT_TORTURE_ROUNDS` asks for the
//! long form (`make torture ONLY=lease`), with twice as many runs as rounds; `SPRAT_TORTURE_SEED`
//! repeats a run.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::machine::strikes::copy_sparse;
use sprat_testkit::wire::{Loss, Wire, WireOptions};

use super::*;

/// Slow enough that some of what a session sends is on its way.
const LINE: WireOptions = WireOptions {
    round_trip: Duration::from_millis(40),
    bytes_per_s: Some(6_000_000),
};

/// When the machine falls asleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Opening,
    SecondLook,
    FirstEpoch,
    Middle,
    Closing,
    /// Its lease is free, and its next lease check is still to come.
    Freed,
    Reconnect,
    MoveEnding,
    Reserve,
}

const MOMENTS: [Moment; 9] = [
    Moment::Opening,
    Moment::SecondLook,
    Moment::FirstEpoch,
    Moment::Middle,
    Moment::Closing,
    Moment::Freed,
    Moment::Reconnect,
    Moment::MoveEnding,
    Moment::Reserve,
];

/// What stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sleep {
    /// All processes, and the wire, as where a kernel sleeps.
    Machine,
    /// All processes; the kernel still sends its buffers.
    Processes,
    /// All but ssh.
    AllButSsh,
    /// Only the wire.
    Wire,
}

const SLEEPS: [Sleep; 4] = [
    Sleep::Machine,
    Sleep::Processes,
    Sleep::AllButSsh,
    Sleep::Wire,
];

/// How the other one gets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// The sleeper wakes while the other one waits, and answers.
    Answer,
    /// The sleeper's connections have ended on the server.
    Kernel,
    Silence,
    Word,
}

const WAYS: [Way; 4] = [Way::Answer, Way::Kernel, Way::Silence, Way::Word];

impl Way {
    /// The late writes that it does not prove to be impossible are watched for.
    fn is_proof(self) -> bool {
        matches!(self, Self::Answer | Self::Kernel)
    }
}

/// After this something counts as impossible. For a silence it is waited for, too.
fn door(way: Way) -> Duration {
    match way {
        Way::Silence => Duration::from_secs(20),
        _ => Duration::from_secs(90),
    }
}

struct Scene {
    remote: RemoteMachine,
    wire: Wire,
    other: TestMachine,
}

impl Drop for Scene {
    /// A test that failed leaves no machine asleep.
    fn drop(&mut self) {
        self.wire.hold(false);
        self.remote.machine.kill_all();
    }
}

impl Scene {
    fn new(megabytes: usize, seed: u64) -> Self {
        let machine = TestMachine::new();
        machine.write("src/first", noise(300_000, seed));
        let remote = RemoteMachine::with(machine, &OpenSshOptions::default());
        let size = ["init", "TARGET", "--size", "256M", "--cheap-kdf-for-tests"];
        remote.ok(&size);
        remote.backup().succeeded();
        let copied = Command::new("cp")
            .args(["-r", "src", "src-then"])
            .current_dir(remote.machine.folder())
            .status();
        assert!(copied.unwrap().success());
        for n in 0..megabytes * 2 {
            let file = format!("src/more-{n}");
            remote.machine.write(&file, noise(500_000, seed + n as u64));
        }
        let other = Other::than(&remote.machine).machine;
        for n in 0..6 {
            other.write(&format!("src/other-{n}"), noise(500_000, seed ^ (n << 20)));
        }
        Self {
            wire: Wire::start(remote.sshd.port(), LINE).unwrap(),
            remote,
            other,
        }
    }

    fn store(&self) -> PathBuf {
        self.remote.machine.path("store")
    }

    fn container(&self) -> PathBuf {
        self.remote.machine.path(CONTAINER)
    }

    /// The leases, ascending, and what they say.
    fn leases(&self) -> BTreeMap<u64, String> {
        let entries = fs::read_dir(self.store()).unwrap().flatten();
        let lease = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().unwrap();
            let number = name.split_once(".luks.lock.")?.1.parse().ok()?;
            let text = fs::read(entry.path()).unwrap_or_default();
            Some((number, String::from_utf8_lossy(&text).into_owned()))
        };
        entries.filter_map(lease).collect()
    }

    fn highest(&self) -> u64 {
        self.leases()
            .last_key_value()
            .map_or(0, |(number, _)| *number)
    }

    /// Starts the sleeper's command.
    fn start(&self, moment: Moment) -> Child {
        let ssh: Vec<String> = (self.remote.sshd)
            .ssh_command_through(self.wire.port())
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect();
        let mut command = self.remote.machine.command();
        command.args(["--ssh-command", &ssh.join(" "), "--quiet-time", "2"]);
        command.args(["--write-buffer-bytes-max", "16777216", "--json"]);
        if moment == Moment::MoveEnding {
            command.args(["copy", "--move", self.remote.target(), "moved.luks"]);
        } else {
            command.args(["backup", self.remote.target(), "--name", "home", "src"]);
        }
        if moment == Moment::Reserve {
            command.env("SPRAT_RESERVE_BYTES", "16777216");
        }
        let said = fs::File::create(self.remote.machine.path("said")).unwrap();
        command.stdout(said.try_clone().unwrap()).stderr(said);
        command.spawn().unwrap()
    }

    fn said(&self) -> String {
        fs::read_to_string(self.remote.machine.path("said")).unwrap_or_default()
    }

    /// Waits for the moment; false where the command ended before.
    fn reach(&self, moment: Moment, sleeper: &mut Child, dice: &mut Dice) -> bool {
        let container = self.container();
        let about = || fs::metadata(&container);
        let (begun, lease) = (about().unwrap(), self.highest());
        let grown = |bytes: u64| {
            let now = about().map_or(0, |now| now.blocks());
            now >= begun.blocks() + bytes / 512
        };
        let there = |what: &str| {
            let entries = fs::read_dir(self.store()).unwrap().flatten();
            let mut names = entries.map(|entry| entry.file_name().into_string().unwrap());
            names.any(|name| name.contains(what))
        };
        let enough = (1 << 20) * (2 + dice.below(8));
        let mut until = |is_so: &dyn Fn() -> bool| {
            let limit = Instant::now() + Duration::from_secs(90);
            while !is_so() {
                if sleeper.try_wait().unwrap().is_some() {
                    return false;
                }
                assert!(Instant::now() < limit, "{moment:?}: {}", self.said());
                std::thread::sleep(Duration::from_millis(1));
            }
            true
        };
        let reached = match moment {
            Moment::Opening => true,
            Moment::SecondLook => until(&|| self.highest() > lease),
            Moment::FirstEpoch => until(&|| about().unwrap().mtime_nsec() != begun.mtime_nsec()),
            Moment::Middle | Moment::Reconnect => until(&|| grown(enough)),
            Moment::Closing => until(&|| self.said().contains("\"unmounting\"")),
            Moment::Freed => until(&|| {
                let leases = self.leases();
                let last = leases.last_key_value();
                last.is_some_and(|(n, said)| *n > lease && said.contains("\"free\":true"))
            }),
            Moment::MoveEnding => {
                until(&|| there(".moved-") || self.said().contains("\"publishing\""))
            }
            Moment::Reserve => until(&|| there(".reserve")),
        };
        let later = match moment {
            Moment::Opening => dice.below(1500),
            Moment::Reconnect => {
                self.wire.lose(Loss::Reset);
                dice.below(1500)
            }
            Moment::Freed => 0,
            Moment::Closing | Moment::MoveEnding => dice.below(400),
            _ => dice.below(60),
        };
        std::thread::sleep(Duration::from_millis(later));
        reached && sleeper.try_wait().unwrap().is_none()
    }

    fn fall_asleep(&self, sleep: Sleep) -> Vec<Pid> {
        if matches!(sleep, Sleep::Machine | Sleep::Wire) {
            self.wire.hold(true);
        }
        let stops = |line: &str| match sleep {
            Sleep::Wire => false,
            Sleep::AllButSsh => !line.starts_with("ssh "),
            Sleep::Machine | Sleep::Processes => true,
        };
        let found = self.remote.machine.processes().into_iter();
        let stopped: Vec<Pid> = found
            .filter(|process| stops(&process.line()))
            .filter_map(|process| Pid::from_raw(process.pid))
            .collect();
        for pid in &stopped {
            let _ = kill_process(*pid, Signal::STOP);
        }
        stopped
    }

    fn wake(&self, stopped: &[Pid]) {
        self.wire.hold(false);
        for pid in stopped {
            let _ = kill_process(*pid, Signal::CONT);
        }
    }

    /// The other machine takes over; true where it succeeded. By an answer it succeeds once the sleeper is
    /// awake.
    fn take_over(&self, way: Way, stopped: &[Pid]) -> bool {
        let silence = door(way).as_secs().to_string();
        let mut words = vec!["unlock", "TARGET", "--watch", "1", "--json"];
        match way {
            Way::Kernel => self.remote.sshd.kill_sessions(),
            Way::Answer => {}
            Way::Silence => words.extend(["--silence", &silence]),
            Way::Word => words.extend(["--that-machine-is-off", "--silence", &silence]),
        }
        let mut unlock = self.remote.command_of(&self.other, &words);
        let said = fs::File::create(self.other.path("said")).unwrap();
        unlock.stdout(said.try_clone().unwrap()).stderr(said);
        let mut unlock = unlock.spawn().unwrap();
        if way == Way::Answer {
            std::thread::sleep(Duration::from_millis(2500));
            self.wake(stopped);
        }
        let until = Instant::now() + Duration::from_secs(75);
        loop {
            if let Some(ended) = unlock.try_wait().unwrap() {
                return ended.success();
            }
            if Instant::now() > until {
                let _ = kill_process(Pid::from_child(&unlock), Signal::INT);
                let _ = unlock.wait();
                return false;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn by_other(&self, words: &[&str]) -> sprat_testkit::machine::Ran {
        self.other
            .run(&mut self.remote.command_of(&self.other, words))
    }

    /// What the other machine gets back of a job is what was backed up from `source` of `machine`.
    fn comes_back(&self, job: &str, machine: &TestMachine, source: &str) -> Result<(), String> {
        let to = tempfile::tempdir_in(self.other.folder()).unwrap();
        let to_text = to.path().to_str().unwrap();
        let ran = self.by_other(&["restore", "TARGET", job, "--to", to_text]);
        if ran.code != 0 {
            return Err(ran.whole());
        }
        let back = to
            .path()
            .join(machine.path("src").strip_prefix("/").unwrap());
        let diff = Command::new("diff")
            .arg("-r")
            .args([&machine.path(source), &back])
            .output()
            .unwrap();
        match diff.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&diff.stdout).into_owned()),
        }
    }
}

/// Blocks in which two files differ.
fn changed(one: &Path, other: &Path) -> usize {
    let (one, other) = (fs::File::open(one).unwrap(), fs::File::open(other).unwrap());
    let len = one.metadata().unwrap().len();
    assert_eq!(len, other.metadata().unwrap().len());
    let (mut these, mut those) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut count = 0;
    for offset in (0..len).step_by(1 << 20) {
        let part = usize::try_from((len - offset).min(1 << 20)).unwrap();
        one.read_exact_at(&mut these[..part], offset).unwrap();
        other.read_exact_at(&mut those[..part], offset).unwrap();
        if these[..part] != those[..part] {
            let blocks = these[..part].chunks(4096).zip(those[..part].chunks(4096));
            count += blocks.filter(|(this, that)| this != that).count();
        }
    }
    count
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// The command ended before its moment.
    TooEarly,
    /// The other one did not get in, and changed nothing.
    Refused,
    /// Nothing arrived after the other one had ended.
    Still,
    /// Something arrived, but not in what is in use.
    Beside,
    /// Something was overwritten, and that was reported.
    Reported,
    /// The machine is so slow that the time was over before the sleeper woke.
    TooSlow,
}

fn run(moment: Moment, sleep: Sleep, way: Way, long: bool, dice: &mut Dice) -> Outcome {
    let large = matches!(
        moment,
        Moment::Middle | Moment::Reconnect | Moment::FirstEpoch
    );
    let scene = Scene::new(if large { 14 } else { 2 }, dice.any());
    let mut sleeper = scene.start(moment);
    if !scene.reach(moment, &mut sleeper, dice) {
        let ended = sleeper.wait().unwrap();
        assert!(ended.success(), "{moment:?}: {ended:?} {}", scene.said());
        return Outcome::TooEarly;
    }
    let stopped = scene.fall_asleep(sleep);
    let asleep = if long && dice.below(16) == 0 {
        40_000
    } else {
        dice.below(2000)
    };
    std::thread::sleep(Duration::from_millis(asleep));
    let is_in = scene.take_over(way, &stopped);
    let taken = Instant::now();
    let at = format!("{moment:?}, {sleep:?}, {way:?}");
    let backed_up = is_in.then(|| scene.by_other(&["backup", "TARGET", "--name", "other", "src"]));
    let (before, highest) = (scene.remote.machine.path("before"), scene.highest());
    if scene.container().exists() {
        copy_sparse(&scene.container(), &before);
    }
    let in_time = taken.elapsed() + Duration::from_secs(2) < door(way);
    scene.wake(&stopped);
    let until = Instant::now() + Duration::from_secs(150);
    let ended = loop {
        if let Some(ended) = sleeper.try_wait().unwrap() {
            break ended.code();
        }
        assert!(
            Instant::now() < until,
            "{at}: it does not end: {}",
            scene.said()
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    wait_until("the server's processes go on", || {
        scene.remote.sshd.session_pids().is_empty()
    });
    let said = format!("{at}: {ended:?} {}", scene.said());
    let Some(backed_up) = backed_up else {
        return Outcome::Refused;
    };
    // A sleeper of which nothing was on its way may take the container in its turn.
    let goes_on = scene.highest() > highest;
    if backed_up.code != 0 {
        let turn = matches!(backed_up.code, 11 | 12) && !way.is_proof();
        assert!(
            turn || goes_on || ended == Some(0),
            "{said}\n{}",
            backed_up.whole()
        );
        return Outcome::Refused;
    }
    if !in_time && !way.is_proof() {
        return Outcome::TooSlow;
    }
    assert!(scene.container().exists(), "{said}\nthe container is gone");
    let late = if goes_on {
        0
    } else {
        changed(&scene.container(), &before)
    };
    assert!(
        late == 0 || !way.is_proof(),
        "{said}\n{late} blocks came late"
    );
    let check = scene.by_other(&["check", "TARGET", "--json"]);
    if check.code == 13 && !way.is_proof() && late > 0 {
        // With the file system's first block the container is older; that is named, too.
        let check = match check.stderr.contains("written late") {
            true => scene.by_other(&["check", "TARGET", "--json", "--accept-older-state"]),
            false => check,
        };
        assert!(
            check.json()["overwritten_blocks"].as_u64() > Some(0),
            "{}",
            check.whole()
        );
        return Outcome::Reported;
    }
    assert_eq!(check.code, 0, "{said}\n{}", check.whole());
    for (job, machine, source) in [
        ("other", &scene.other, "src"),
        (
            "home",
            &scene.remote.machine,
            if ended == Some(0) { "src" } else { "src-then" },
        ),
    ] {
        let back = scene.comes_back(job, machine, source);
        assert!(
            back.is_ok(),
            "{said}\n{late} blocks came late, {job}: {back:?}"
        );
    }
    match late {
        0 => Outcome::Still,
        _ => Outcome::Beside,
    }
}

#[test]
fn late_writes_of_sleepers_change_no_snapshot_undetected() {
    requires!(openssh::missing(), needs::root());
    let seed = dice::seed();
    let mut dice = Dice::new(seed);
    let mut outcomes: BTreeMap<(Way, Outcome), u32> = BTreeMap::new();
    let mut moments: BTreeMap<(Moment, Outcome), u32> = BTreeMap::new();
    let one = |of: usize, dice: &mut Dice| usize::try_from(dice.below(of as u64)).unwrap();
    let runs = number("SPRAT_TORTURE_ROUNDS").map(|rounds| rounds * 2);
    for nth in 0..runs.unwrap_or(2) {
        let (moment, sleep, way) = match (runs, nth) {
            // The worst one, and one that is proven.
            (None, 0) => (Moment::Middle, Sleep::Machine, Way::Word),
            (None, _) => (
                MOMENTS[one(9, &mut dice)],
                SLEEPS[one(4, &mut dice)],
                Way::Kernel,
            ),
            _ => (
                MOMENTS[one(9, &mut dice)],
                SLEEPS[one(4, &mut dice)],
                WAYS[one(4, &mut dice)],
            ),
        };
        let begun = Instant::now();
        let outcome = run(moment, sleep, way, runs.is_some(), &mut dice);
        let took = begun.elapsed().as_secs();
        println!("{nth}: {moment:?}, {sleep:?}, {way:?}: {outcome:?} in {took} s");
        *outcomes.entry((way, outcome)).or_default() += 1;
        *moments.entry((moment, outcome)).or_default() += 1;
    }
    println!("{outcomes:?}\n{moments:?}");
    let Some(runs) = runs else {
        return;
    };
    let counted = |is: &dyn Fn(Outcome) -> bool| -> u32 {
        let found = outcomes.iter().filter(|((_, outcome), _)| is(*outcome));
        found.map(|(_, times)| times).sum()
    };
    let compared = |outcome| {
        !matches!(
            outcome,
            Outcome::TooEarly | Outcome::Refused | Outcome::TooSlow
        )
    };
    assert!(u64::from(counted(&compared)) * 3 >= runs, "too few got in");
    let arrived = counted(&|outcome| matches!(outcome, Outcome::Reported | Outcome::Beside));
    assert!(
        runs < 100 || arrived > 0,
        "nothing ever arrived late, so this shows nothing"
    );
}
