//! Strikes at a command: kills it or cuts its connection at each of its remote changes in turn, and
//! runs it again each time.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failing test kit panics, and prints its figures"
)]

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Ran, TestMachine};
use crate::agent_server;
use crate::client_and_server::FileSystem;
use crate::dice::{self, Dice};
use crate::program::system;

/// The program that strikes, in place of ssh.
pub const STRIKER: &str = include_str!("striker.py");
/// Strikes at each command in `make test`.
const SHORT: u64 = 4;
/// The same if another test strikes at that command with the other file system in the container.
const SHORT_OF_TWO: u64 = SHORT / 2;
/// A command with fewer changes was not recorded completely: each acquires a lease, flushes it,
/// releases it, and makes changes in between.
const CHANGES_MIN: usize = 9;

/// One blow at a command.
#[derive(Debug, Clone, Copy)]
pub struct Blow {
    /// - `kill`: sprat is killed.
    /// - `cut`: the connection ends, and no new one is possible.
    /// - `lose`: the connection ends, and a new one is possible.
    /// - `act`: the machine's script `act` runs instead.
    /// - `acts`: it runs at each change from that one on.
    /// - `leave`: it runs, and then the connection is lost.
    pub how: &'static str,
    /// `before` or `after` the change is passed on.
    pub when: &'static str,
    /// Which change, from 1.
    pub nth: usize,
    /// Only changes of this kind count. With `read`, reads count; with `free`, the write that
    /// releases a lease, which is no `write`.
    pub kind: Option<&'static str>,
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.unwrap_or("change");
        write!(f, "{} {} {kind} {}", self.how, self.when, self.nth)
    }
}

pub use super::served::missing;

/// A container, or two, and what must be true of them.
pub trait Struck {
    /// The machine that runs the command.
    fn machine(&self) -> &TestMachine;
    /// Restores the state before the command.
    fn begin_anew(&self);
    /// Checks, right after a blow, that nothing is lost.
    fn holds(&self, struck: &Ran, at: &str);
    /// Checks, after an undisturbed run of the same command, that it did its work.
    fn is_done(&self, again: &Ran, at: &str);
}

impl TestMachine {
    /// `path` of this machine, behind the connection that strikes.
    #[must_use]
    pub fn on_line(&self, path: &str) -> String {
        format!("ssh://server{}", self.path(path).display())
    }

    /// The same behind another connection, which is never struck.
    #[must_use]
    pub fn on_other_line(&self, path: &str) -> String {
        format!("ssh://other{}", self.path(path).display())
    }

    /// Runs sprat behind a connection that strikes; with `None` it never does.
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
        let script = self.write("striker.py", STRIKER);
        let ssh = format!(
            "python3 -S {} {} {} {how} {when} {nth}",
            script.display(),
            folder.display(),
            agent_server::sftp_server(&self.path("store"))
                .unwrap()
                .display()
        );
        let patience = if matches!(how, "lose" | "leave") {
            "60"
        } else {
            "0"
        };
        let mut all = vec!["--ssh-command", &ssh, "--cheap-kdf-for-tests"];
        all.extend(["--quiet-time", "0", "--connections", "2"]);
        all.extend(["--reconnect-max", patience]);
        all.extend(arguments);
        self.sprat(&all)
    }

    /// Whether the blow fell.
    #[must_use]
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
            let to = self.path(format!("{name}{to}"));
            let _ = fs::remove_dir_all(&to);
            copy_sparse(&self.path(format!("{name}{from}")), &to);
        }
    }
}

/// Copies a file or a folder, with its holes and times.
pub fn copy_sparse(from: &Path, to: &Path) {
    let options = ["-a", "--sparse=always"].map(AsRef::as_ref);
    system(
        "cp",
        &[&options[..], &[from.as_os_str(), to.as_os_str()]].concat(),
    );
}

/// How many strikes the long form shall have: `SPRAT_STRIKES`.
#[must_use]
pub fn long_form() -> Option<u64> {
    dice::number("SPRAT_STRIKES")
}

/// Chance for the short form; its seed is printed.
#[must_use]
pub fn dice() -> Dice {
    Dice::new(dice::seed())
}

/// Strikes at `command` at each change; in the short form at random ones.
///
/// # Panics
/// When a check of `struck` fails, or more than a tenth of the blows missed.
pub fn strike(struck: &impl Struck, command: &[&str]) {
    strike_in_parts(struck, command, SHORT, 0);
}

/// The same for a command at which two tests strike, each with another file system in the container. They divide the
/// blows of the short form.
///
/// # Panics
/// As there.
pub fn strike_with(file_system: FileSystem, struck: &impl Struck, command: &[&str]) {
    let first = match file_system {
        FileSystem::Ext4 => 0,
        FileSystem::Btrfs => SHORT_OF_TWO,
    };
    strike_in_parts(struck, command, SHORT_OF_TWO, first);
}

/// `short` blows in the short form; `first`: how many of its kinds another test has.
fn strike_in_parts(struck: &impl Struck, command: &[&str], short: u64, first: u64) {
    let machine = struck.machine();
    struck.begin_anew();
    let ran = machine.sprat_struck(command, None);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let changes = machine.changes();
    struck.is_done(&ran, "without a blow");
    assert!(changes.len() >= CHANGES_MIN, "{changes:?}");

    let blows = blows(&changes, short, first);
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
fn blows(changes: &[String], short: u64, first: u64) -> Vec<Blow> {
    let mut dice = dice();
    let all = [
        ("kill", "before"),
        ("cut", "after"),
        ("kill", "after"),
        ("cut", "before"),
    ];
    let turn = usize::try_from(dice.below(4) + first).unwrap();
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
    let parts = (0..short).map(|part| {
        let (from, to) = (part * len / short, (part + 1) * len / short);
        let nth = usize::try_from(1 + from + dice.below(to - from)).unwrap();
        blow(all[(turn + usize::try_from(part).unwrap()) % 4], nth)
    });
    parts.collect()
}

/// All changes; or `most` of them spread out, each change that is not payload, and the first payload
/// after it.
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

/// Whether two files have the same bytes.
#[must_use]
pub fn same_bytes(one: &Path, other: &Path) -> bool {
    let compared = Command::new("cmp").arg("-s").arg(one).arg(other).status();
    compared.unwrap().success()
}
