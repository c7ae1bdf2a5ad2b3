//! Strikes at a command: kills it or cuts its line off at its remote changes in turn, and has it run
//! again each time.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and prints its figures"
)]

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sprat_testkit::dice::{self, Dice};
use sprat_testkit::needs;

use super::{Machine, Ran};

/// Strikes at each command in `make test`.
const SHORT: u64 = 4;
/// A command with fewer changes than this was not seen as a whole: a lease is made, flushed and
/// given back, and something is done between.
const CHANGES_MIN: usize = 9;

/// One blow at a command.
#[derive(Debug, Clone, Copy)]
pub struct Blow {
    /// `kill`; `cut`: the line, for good; `lose`: the line, and a new one may be taken; `act`: the
    /// machine's script `act` is run instead; `acts`: from that change on, at each; `leave`: it is
    /// run, and then the line is lost.
    pub how: &'static str,
    /// `before` or `after` the change is passed on.
    pub when: &'static str,
    /// Which change, from 1.
    pub nth: usize,
    /// Only changes of this kind are counted, or, with `read`, what is read; with `free`, the write
    /// that gives a lease back, which is no `write`.
    pub kind: Option<&'static str>,
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.unwrap_or("change");
        write!(f, "{} {} {kind} {}", self.how, self.when, self.nth)
    }
}

/// What is missing here for a strike.
pub fn missing() -> Option<String> {
    needs::root()
        .or_else(needs::sftp_server_missing)
        .or_else(|| needs::program("python3"))
}

/// A container, or two, and what must be true of them.
pub trait Struck {
    fn machine(&self) -> &Machine;
    /// Puts everything back to what it was before the command.
    fn begin_anew(&self);
    /// Looks right after a blow: nothing may be lost.
    fn holds(&self, struck: &Ran, at: &str);
    /// Looks after the same command was run `again`, undisturbed: it has come through.
    fn is_done(&self, again: &Ran, at: &str);
}

impl Machine {
    /// `path` of this machine as it is named on the line that strikes.
    pub fn on_line(&self, path: &str) -> String {
        format!("ssh://server{}", self.path(path).display())
    }

    /// The same on another line, which is never struck.
    pub fn on_other_line(&self, path: &str) -> String {
        format!("ssh://other{}", self.path(path).display())
    }

    /// sprat behind a line that strikes; `None`: never.
    pub fn sprat_struck(&self, arguments: &[&str], blow: Option<Blow>) -> Ran {
        let folder = self.path("striker");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let never = Blow {
            how: "cut",
            when: "before",
            nth: 0,
            kind: None,
        };
        let Blow {
            how,
            when,
            nth,
            kind,
        } = blow.unwrap_or(never);
        let nth = kind.map_or(nth.to_string(), |kind| format!("{kind}:{nth}"));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/striker.py");
        let ssh = format!(
            "python3 -S {} {} {} {how} {when} {nth}",
            script.display(),
            folder.display(),
            needs::sftp_server().unwrap().display()
        );
        let patience = if matches!(how, "lose" | "leave") {
            "60"
        } else {
            "0"
        };
        let mut all = vec!["--ssh-command", &ssh, "--cheap-kdf-for-tests"];
        all.extend(["--quiet-time", "0", "--data-channels", "1"]);
        all.extend(["--reconnect-max", patience]);
        all.extend(arguments);
        self.sprat(&all)
    }

    /// Whether the blow fell.
    pub fn was_struck(&self) -> bool {
        self.path("striker/struck").exists()
    }

    /// The kind of each change that the last command asked for.
    fn changes(&self) -> Vec<String> {
        let listed = fs::read_to_string(self.path("striker/changes")).unwrap();
        listed.lines().map(str::to_owned).collect()
    }

    /// Copies folders of the machine, sparse, over what was there: `NAME + from` to `NAME + to`.
    pub fn copy_folders(&self, names: &[&str], from: &str, to: &str) {
        for name in names {
            let to = self.path(&format!("{name}{to}"));
            let _ = fs::remove_dir_all(&to);
            copy_sparse(&self.path(&format!("{name}{from}")), &to);
        }
    }
}

/// Copies a file or a folder, holes and times kept.
pub fn copy_sparse(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    command.args(["-a", "--sparse=always"]).arg(from).arg(to);
    assert!(command.status().unwrap().success());
}

/// How many strikes the long form was asked for.
pub fn long_form() -> Option<u64> {
    let asked = std::env::var("SPRAT_STRIKES").ok()?;
    asked.parse().ok()
}

/// Chance for the short form, whose seed is printed.
pub fn dice() -> Dice {
    Dice::new(dice::seed())
}

/// Strikes at `command` everywhere, or where chance has it in the short form.
pub fn strike(struck: &impl Struck, command: &[&str]) {
    let machine = struck.machine();
    struck.begin_anew();
    let ran = machine.sprat_struck(command, None);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let changes = machine.changes();
    struck.is_done(&ran, "without a blow");
    assert!(changes.len() >= CHANGES_MIN, "{changes:?}");

    let blows = blows(&changes);
    let mut missed = 0;
    for blow in &blows {
        let at = format!("{command:?}: {blow}");
        struck.begin_anew();
        let ran = machine.sprat_struck(command, Some(*blow));
        if !machine.was_struck() {
            // Not every run needs exactly as many requests.
            assert_eq!(ran.code, 0, "{at}: {}", ran.whole());
            struck.is_done(&ran, &at);
            missed += 1;
            continue;
        }
        machine.nothing_is_left();
        struck.holds(&ran, &at);
        let again = machine.sprat_struck(command, None);
        let at = format!("{at}, {} and then again", ran.code);
        struck.is_done(&again, &at);
    }
    println!(
        "{command:?}: {changes:?}: {} changes, {} blows, {missed} of them missed",
        changes.len(),
        blows.len()
    );
    assert!(missed * 10 <= blows.len(), "{missed} blows missed");
}

/// Long: a kill and a cut at each point. Short: one blow in each part of the command.
fn blows(changes: &[String]) -> Vec<Blow> {
    let mut dice = dice();
    let all = [
        ("kill", "before"),
        ("cut", "after"),
        ("kill", "after"),
        ("cut", "before"),
    ];
    let turn = usize::try_from(dice.below(4)).unwrap();
    let blow = |(how, when), nth| Blow {
        how,
        when,
        nth,
        kind: None,
    };
    if let Some(most) = long_form() {
        let points = points(changes, usize::try_from(most).unwrap());
        let both = points.iter().enumerate().flat_map(|(at, nth)| {
            let kind = |more| blow(all[(2 * (at % 2) + more) % 4], *nth);
            [kind(0), kind(1)]
        });
        return both.collect();
    }
    let len = changes.len() as u64;
    let parts = (0..SHORT).map(|part| {
        let (from, to) = (part * len / SHORT, (part + 1) * len / SHORT);
        let nth = usize::try_from(1 + from + dice.below(to - from)).unwrap();
        blow(all[(turn + usize::try_from(part).unwrap()) % 4], nth)
    });
    parts.collect()
}

/// All changes, or `most` of them spread out and with them everything that isn't payload, and the
/// first payload after it.
fn points(changes: &[String], most: usize) -> Vec<usize> {
    if changes.len() <= most {
        return (1..=changes.len()).collect();
    }
    let payload = |kind: &String| matches!(&**kind, "write" | "copy" | "punch");
    let spread = (0..most).map(|n| 1 + n * (changes.len() - 1) / (most - 1).max(1));
    let boundary = (1..=changes.len())
        .filter(|nth| !payload(&changes[nth - 1]) || *nth == 1 || !payload(&changes[nth - 2]));
    let mut points: Vec<usize> = spread.chain(boundary).collect();
    points.sort_unstable();
    points.dedup();
    points
}

/// Whether two files are the same, byte by byte.
pub fn same_bytes(one: &Path, other: &PathBuf) -> bool {
    let compared = Command::new("cmp").arg("-s").arg(one).arg(other).status();
    compared.unwrap().success()
}
