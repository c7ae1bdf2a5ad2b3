//! Checks whether this machine can attach volumes, and has the programs that sprat and its users need.

use std::process::{Command, Stdio};

use sprat_attach::{Severity, check_host};

use super::finding::{Finding, State};
use super::link_dest;
use crate::file_system::FileSystemKind;
use crate::text;

/// Checks this machine.
#[must_use]
pub fn host() -> Vec<Finding> {
    let mut findings: Vec<Finding> = check_host()
        .into_iter()
        .map(|found| Finding {
            what: found.what.to_owned(),
            state: match found.severity {
                Severity::Fine => State::Fine,
                Severity::Weak => State::Weak,
                _ => State::Missing,
            },
            detail: found.detail,
            hint: found.hint,
        })
        .collect();
    findings.extend(PROGRAMS.iter().map(program));
    findings.extend(
        FileSystemKind::ALL
            .iter()
            .filter_map(|kind| volumes_of(*kind)),
    );
    let rsync = findings.iter().find(|found| found.what == "rsync");
    if rsync.is_some_and(|found| found.state == State::Fine) {
        findings.push(link_dest::links());
    }
    findings
}

/// Whether volumes of a kind that is no default can be made here. They are never needed.
fn volumes_of(kind: FileSystemKind) -> Option<Finding> {
    if kind == FileSystemKind::DEFAULT {
        return None;
    }
    let detail = match kind.check_usable() {
        Ok(()) => format!("`sprat init --file-system {}` works here", kind.name()),
        Err(failure) => format!("not available: {}", failure.what),
    };
    Some(Finding::new(kind.name(), State::Fine, detail))
}

/// A program, how it shows its version, and what it is for.
struct Program {
    name: &'static str,
    arguments: &'static [&'static str],
    needed: bool,
    purpose: &'static str,
}

const PROGRAMS: [Program; 5] = [
    Program {
        name: "ssh",
        arguments: &["-V"],
        needed: true,
        purpose: "reaches the servers",
    },
    Program {
        name: "rsync",
        arguments: &["--version"],
        needed: true,
        purpose: "copies",
    },
    Program {
        name: "e2fsck",
        arguments: &["-V"],
        needed: false,
        purpose: "checks volumes",
    },
    Program {
        name: "cryptsetup",
        arguments: &["--version"],
        needed: false,
        purpose: "opens containers without sprat",
    },
    Program {
        name: "sshfs",
        arguments: &["--version"],
        needed: false,
        purpose: "reaches containers without sprat",
    },
];

fn program(program: &Program) -> Finding {
    let ran = Command::new(program.name)
        .args(program.arguments)
        .stdin(Stdio::null())
        .output();
    let state = if program.needed {
        State::Missing
    } else {
        State::Weak
    };
    match ran {
        Ok(output) => {
            let works = output.status.success();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
            let first = lines.clone().next();
            // sshfs shows that of FUSE first.
            let own = lines.find(|line| line.to_lowercase().starts_with(program.name));
            let version = own.or(first);
            let version = version.unwrap_or("it printed no version");
            if works {
                let version = text::harmless_within(version, 60);
                return Finding::new(program.name, State::Fine, version);
            }
            let version = text::harmless_within(version, 200);
            Finding::new(
                program.name,
                state,
                format!("it starts, but fails ({}): {version}", output.status),
            )
            .hint(format!("install it again: it {}", program.purpose))
        }
        Err(error) => Finding::new(program.name, state, format!("can't be started: {error}"))
            .hint(format!("install it: it {}", program.purpose)),
    }
}
