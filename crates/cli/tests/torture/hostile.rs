//! Every command against a server that drops, delays, reorders, rolls back, changes, lies, answers slowly,
//! wrongly or never, at any request. Each run ends by itself and in time, with a fitting exit code. It
//! reports nothing false and presents no wrong data as good. Afterwards an honest server shows what is
//! there.
//!
//! Each case is a seed. `SPRAT_TORTURE_SEED=N SPRAT_TORTURE_ROUNDS=1` repeats one alone;
//! `SPRAT_TORTURE_ROUNDS` alone asks for the long form (`make torture`).

mod commands;
mod scene;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use commands::Command;
use scene::Scene;
use sprat_testkit::dice::{self, Dice, number};
use sprat_testkit::hostile::{ALWAYS, Act, Fault, Kind};
use sprat_testkit::machine::Ran;
use sprat_testkit::requires;

/// The short form begins no case after this time.
const SHORT: Duration = Duration::from_secs(20);

/// Cases of the long form for each of its rounds.
const CASES_PER_ROUND: u64 = 10;

/// When a run ends by itself after the server stalls, by docs/exit-codes.md: ten times the 2 s for an
/// answer where an fsync is due, 5 s of reconnecting, twice 2 s for an attempt that began before they
/// were over, and 30 s for the end.
const PATIENCE: Duration = Duration::from_secs(20 + 5 + 4 + 30);

/// From the first Ctrl-C to the end: 10 s are promised, and on a busy machine the test itself checks
/// later.
const INTERRUPTED: Duration = Duration::from_secs(11);

/// A run of which the server lets nothing wait.
const HONEST: Duration = Duration::from_secs(90);

/// Seeds to be run, as they are asked for.
struct Seeds {
    first: u64,
    many: Option<u64>,
    begun: Instant,
}

impl Seeds {
    fn asked(per_round: u64) -> Self {
        let named = number("SPRAT_TORTURE_SEED").is_some();
        let rounds = number("SPRAT_TORTURE_ROUNDS");
        let first = dice::seed();
        let many = match rounds {
            Some(1) if named => Some(1),
            rounds => rounds.map(|rounds| rounds * per_round),
        };
        Self {
            first,
            many,
            begun: Instant::now(),
        }
    }

    fn next(&self, done: u64) -> Option<u64> {
        let more = match self.many {
            Some(many) => done < many,
            None => self.begun.elapsed() < SHORT,
        };
        more.then(|| self.first + done)
    }
}

/// What the server does, and how often a case of it is drawn.
fn act(dice: &mut Dice) -> Act {
    match dice.below(20) {
        0 => Act::Drop,
        1 => Act::DropAfter,
        2 => Act::Delay(Duration::from_millis(50 + dice.below(400))),
        3 => Act::Reorder,
        4 => Act::Never,
        5 => Act::Silence,
        6 => Act::Stall,
        7 => Act::Slow(Duration::from_millis(5)),
        8 | 9 => Act::Lie,
        10 => Act::Status([2, 3, 4, 4, 4, 8][usize::try_from(dice.below(6)).unwrap()]),
        11 | 12 => Act::WrongType,
        13 => Act::WrongLength,
        14 | 15 => Act::Garble,
        16 => Act::GarbleWrite,
        17 => Act::OldData,
        18 => Act::Rollback,
        _ => Act::Nonsense,
    }
}

/// One fault, at a request that `seen` has, counted among all or among those of its kind.
fn fault(dice: &mut Dice, seen: &BTreeMap<Kind, usize>) -> Fault {
    let act = act(dice);
    let kinds: Vec<(Kind, usize)> = match act {
        Act::GarbleWrite => vec![Kind::Write],
        Act::OldData => vec![Kind::Read],
        _ => seen.keys().copied().collect(),
    }
    .into_iter()
    .map(|kind| (kind, seen.get(&kind).copied().unwrap_or(1)))
    .collect();
    // By kind: reads and writes are many, and what is rare must be met, too.
    let (kind, many) = kinds[usize::try_from(dice.below(kinds.len() as u64)).unwrap()];
    let nth = 1 + usize::try_from(dice.below(many as u64)).unwrap();
    let times = [1, 1, 1, 3, ALWAYS][usize::try_from(dice.below(5)).unwrap()];
    Fault::once(kind, nth, act).times(times)
}

/// The exit codes that fit what the server did to a command.
fn fitting(command: &Command, fault: &Fault) -> &'static [i32] {
    match fault.act {
        Act::Delay(_) | Act::Reorder if fault.times < 10 => &[0],
        // These two report what they find, and their codes are about that.
        _ if ["doctor", "status"].contains(&command.name) => &[0, 1, 10, 11, 13, 14],
        // So slow that it counts as lost.
        Act::Delay(_) | Act::Reorder => &[0, 14],
        // A connection that is lost, in each way.
        Act::Drop | Act::DropAfter | Act::Never | Act::Silence | Act::Stall | Act::Slow(_) => {
            &[0, 14]
        }
        // "No such file" may be about the container, or the folder.
        Act::Status(2) => &[0, 1, 10, 13, 14],
        Act::Status(_) | Act::Nonsense => &[0, 1, 14],
        // It may look like another lease, another header, or other slots.
        Act::Garble | Act::OldData | Act::Rollback => &[0, 1, 10, 11, 12, 13, 14],
        Act::WrongType | Act::WrongLength | Act::Lie | Act::GarbleWrite => &[0, 1, 10, 13, 14],
    }
}

/// Whether the file on the server may be another one afterwards than the commands made it.
fn alters(fault: &Fault) -> bool {
    matches!(fault.act, Act::Lie | Act::GarbleWrite | Act::Rollback)
}

fn whole(ran: &Ran, at: &str) -> String {
    format!("{at}\n{}", ran.whole())
}

/// What no run may ever say or end with.
#[track_caller]
fn ends_well(ran: &Ran, fitting: &[i32], at: &str) {
    assert!(!ran.stderr.contains("panicked"), "{}", whole(ran, at));
    assert!(fitting.contains(&ran.code), "{}", whole(ran, at));
}

/// One command and one fault.
fn one_case(scene: &Scene, seed: u64, longest: &mut Duration) -> (bool, i32) {
    let mut dice = Dice::new(seed);
    let commands = scene.commands();
    let command: &Command = commands[usize::try_from(dice.below(commands.len() as u64)).unwrap()];
    let fault = fault(&mut dice, scene.seen(command));
    let at = format!("seed {seed}: {}: {fault}", command.name);
    scene.begin_anew();
    scene.server.set([fault]);
    let begun = Instant::now();
    let ran = scene.run(command);
    let took = begun.elapsed();
    *longest = took.max(*longest);
    let struck = scene.server.struck();
    scene.server.set([]);
    let at = format!("{at}, struck {struck} times, {took:?}");
    let code = ran.code;
    if struck == 0 {
        ends_well(&ran, &[0], &at);
    } else {
        ends_well(&ran, fitting(command, &fault), &at);
    }
    assert!(took < HONEST, "{}", whole(&ran, &at));
    scene.machine.nothing_is_left();
    // A server that lied about a change may have made it, or not.
    if !alters(&fault) {
        scene.claims_hold(&ran, &at);
    }
    scene.is_sound(command, &ran, !alters(&fault), &at);
    (struck > 0, code)
}

/// Runs cases until none is asked for; one that fails is cleared up after, and named at the end.
fn run_cases(per_round: u64, scene: &Scene, mut case: impl FnMut(u64) -> String) -> Vec<String> {
    let seeds = Seeds::asked(per_round);
    let (mut done, mut told, mut failed) = (0, Vec::new(), Vec::new());
    while let Some(seed) = seeds.next(done) {
        done += 1;
        match catch_unwind(AssertUnwindSafe(|| case(seed))) {
            Ok(text) => told.push(text),
            Err(_) => {
                failed.push(seed);
                scene.clear_up();
            }
        }
    }
    println!("{done} cases");
    assert!(
        failed.is_empty(),
        "failed, of {done}: {failed:?}; SPRAT_TORTURE_SEED=N SPRAT_TORTURE_ROUNDS=1 repeats one"
    );
    told
}

#[test]
fn no_server_fault_makes_a_command_hang_or_report_falsely() {
    requires!(scene::missing());
    let scene = Scene::new();
    let mut longest = Duration::ZERO;
    let told = run_cases(CASES_PER_ROUND, &scene, |seed| {
        let (fell, code) = one_case(&scene, seed, &mut longest);
        if fell {
            format!("exit {code}")
        } else {
            "not struck".to_owned()
        }
    });
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for text in told {
        *counts.entry(text).or_default() += 1;
    }
    println!("{counts:?}; the longest run {longest:?}");
}

/// A command, a request of it from which on the server stands still, and whether there is a Ctrl-C.
struct Stall<'c> {
    command: &'c Command,
    nth: usize,
    interrupted: bool,
}

/// Every command with every request of its honest run, by itself and with a Ctrl-C; with
/// `SPRAT_TORTURE_ROUNDS` lower than its requests so many of them, spread evenly. The short form has one
/// request of each command and ends by time.
fn stalls<'c>(scene: &'c Scene, dice: &mut Dice) -> Vec<Stall<'c>> {
    let rounds = number("SPRAT_TORTURE_ROUNDS").and_then(|rounds| usize::try_from(rounds).ok());
    let only = number("SPRAT_HOSTILE_AT").and_then(|at| usize::try_from(at).ok());
    let mut stalls = Vec::new();
    for command in scene.commands() {
        let below =
            |many: usize, dice: &mut Dice| usize::try_from(dice.below(many as u64)).unwrap();
        let places: Vec<usize> = match (only, rounds) {
            (Some(at), _) => vec![at],
            (None, Some(rounds)) => {
                let requests: usize = scene.seen(command).values().sum();
                let step = requests.div_ceil(rounds.max(1)).max(1);
                let first = 1 + below(step, dice);
                (first..=requests).step_by(step).collect()
            }
            // Found out when its turn comes.
            (None, None) => vec![0],
        };
        for nth in places {
            let both = rounds.is_some() || only.is_some();
            let one = dice.percent(50);
            stalls.extend(
                [one, !one]
                    .into_iter()
                    .take(1 + usize::from(both))
                    .map(|interrupted| Stall {
                        command,
                        nth,
                        interrupted,
                    }),
            );
        }
    }
    if rounds.is_none() && only.is_none() {
        let turn = below_len(&stalls, dice);
        stalls.rotate_left(turn);
    }
    stalls
}

fn below_len<T>(all: &[T], dice: &mut Dice) -> usize {
    usize::try_from(dice.below(all.len().max(1) as u64)).unwrap()
}

/// One command, and a server that stands still from a request of it on.
fn stalled_case(scene: &Scene, stall: &Stall<'_>, dice: &mut Dice) -> Duration {
    let command = stall.command;
    let nth = match stall.nth {
        0 => {
            let requests: usize = scene.seen(command).values().sum();
            1 + usize::try_from(dice.below(requests as u64)).unwrap()
        }
        nth => nth,
    };
    let fault = Fault {
        on: None,
        nth,
        times: 1,
        act: Act::Stall,
        of_file: false,
    };
    let interrupt = stall.interrupted.then(|| dice.below(1500));
    let at = format!("{}: {fault}, Ctrl-C after {interrupt:?} ms", command.name);
    scene.begin_anew();
    scene.server.set([fault]);
    let (ran, took) = scene.run_interrupted(command, interrupt.map(Duration::from_millis));
    let struck = scene.server.struck();
    scene.server.set([]);
    let at = format!("{at}, struck {struck} times, {took:?}");
    println!("{at}: exit {}", ran.code);
    // What status and doctor find missing is what they say with their code.
    let (limit, fitting): (_, &[i32]) = match (interrupt, struck) {
        (_, 0) => (HONEST, &[0]),
        (Some(_), _) => (INTERRUPTED, &[0, 14, 130]),
        (None, _) if command.name == "doctor" => (PATIENCE, &[0, 1, 14]),
        (None, _) => (PATIENCE, &[0, 14]),
    };
    ends_well(&ran, fitting, &at);
    assert!(took < limit, "{}", whole(&ran, &at));
    scene.machine.nothing_is_left();
    scene.claims_hold(&ran, &at);
    scene.is_sound(command, &ran, true, &at);
    took
}

/// A server that stands still for good, at each request of each command: the command ends by itself, and
/// at Ctrl-C. `SPRAT_HOSTILE_ONLY='key add' SPRAT_HOSTILE_AT=17` repeats one case.
#[test]
fn stalled_server_blocks_no_command() {
    requires!(scene::missing());
    let scene = Scene::new();
    let mut dice = Dice::new(dice::seed());
    let begun = Instant::now();
    let long = number("SPRAT_TORTURE_ROUNDS").is_some() || number("SPRAT_HOSTILE_AT").is_some();
    let mut longest = [Duration::ZERO; 2];
    let (mut done, mut failed) = (0, Vec::new());
    for stall in stalls(&scene, &mut dice) {
        if !long && begun.elapsed() >= SHORT {
            break;
        }
        done += 1;
        let case = AssertUnwindSafe(|| stalled_case(&scene, &stall, &mut dice));
        match catch_unwind(case) {
            Ok(took) => {
                let longest = &mut longest[usize::from(stall.interrupted)];
                *longest = took.max(*longest);
            }
            Err(_) => {
                failed.push(format!("{} at {}", stall.command.name, stall.nth));
                scene.clear_up();
            }
        }
    }
    let [alone, interrupted] = longest;
    println!("{done} cases, the longest run {alone:?} by itself, and {interrupted:?} from Ctrl-C");
    assert!(failed.is_empty(), "failed, of {done}: {failed:?}");
}

/// A run reports each lost connection to the container, also one at its end that is back at once.
#[test]
fn each_lost_connection_is_reported() {
    requires!(scene::missing());
    let scene = Scene::new();
    let backup = scene.commands()[0];
    for nth in 1.. {
        let drop = Fault::once(Kind::Write, nth, Act::Drop).of_file();
        scene.begin_anew();
        scene.server.set([drop]);
        let ran = scene.run(backup);
        ends_well(&ran, &[0], backup.name);
        if scene.server.struck() == 0 {
            assert!(nth > 3, "{} writes", nth - 1);
            break;
        }
        let said = "connection lost, reconnecting";
        assert!(ran.stderr.contains(said), "write {nth}: {}", ran.whole());
    }
}

/// An account that may not remove files gets a report of what it can't do, and the rest works.
#[test]
fn an_account_that_may_not_remove_files_backs_up_again_and_again() {
    requires!(scene::missing());
    let scene = Scene::new();
    let refused = Fault::once(Kind::Remove, 1, Act::Status(3)).times(ALWAYS);
    scene.begin_anew();
    scene.server.set([refused]);
    let named = |name: &str| -> &Command {
        let all = commands::COMMANDS.iter();
        all.into_iter()
            .find(|command| command.name == name)
            .unwrap()
    };
    for name in [
        "backup",
        "backup",
        "restore",
        "prune",
        "key add",
        "key remove",
        "check",
    ] {
        let ran = scene.run(named(name));
        ends_well(&ran, &[0], name);
    }
    for (name, code) in [("doctor", 0), ("init", 0)] {
        let ran = scene.run(named(name));
        let said = format!("{}{}", ran.stdout, ran.stderr);
        assert!(said.contains("may not remove files"), "{}", ran.whole());
        ends_well(&ran, &[code], name);
    }
    scene.server.set([]);
    let ran = scene.run(named("doctor"));
    assert!(!ran.stdout.contains("may not remove"), "{}", ran.whole());
}
