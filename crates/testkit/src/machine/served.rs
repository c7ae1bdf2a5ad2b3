//! A machine's container behind an SFTP server without ssh, honest or not: with a server there is a
//! cache.

#![allow(clippy::unwrap_used, reason = "a failing test kit panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::{CONTAINER, Ran, TestMachine};
use crate::{agent_server, needs};

const FORGETFUL: &str = include_str!("forgetful.py");

/// What is missing for a server.
#[must_use]
pub fn missing() -> Option<String> {
    needs::root()
        .or_else(needs::sftp_server_missing)
        .or_else(|| needs::program("python3"))
}

/// Runs sprat with the system's own server; [`CONTAINER`] stands for the container there.
pub fn served(machine: &TestMachine, arguments: &[&str]) -> Ran {
    let server = agent_server::sftp_server(&machine.path("store")).unwrap();
    served_by(machine, &format!("exec {}", server.display()), arguments)
}

/// The same by another server: a line of a shell script.
fn served_by(machine: &TestMachine, server: &str, arguments: &[&str]) -> Ran {
    let script = machine.path("ssh");
    // Files only: a request for a shell would wait for an answer that never comes.
    let files_only = "for last; do :; done\n[ \"$last\" = sftp ] || exit 1\n";
    machine.write("ssh", format!("#!/bin/sh\n{files_only}{server}\n"));
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let key = machine.path("config/keys/x.key");
    let mut all = vec!["--ssh-command".to_owned(), script.display().to_string()];
    if key.exists() && !arguments.contains(&"--key-file") {
        all.extend(["--key-file".to_owned(), key.display().to_string()]);
    }
    let place = |word: &&str| match word.strip_prefix("store/") {
        Some(name) => format!("x:{}", machine.path("store").join(name).display()),
        None => (*word).to_owned(),
    };
    all.extend(arguments.iter().map(place));
    machine.sprat(&all)
}

/// A server that reports success for writes or renames that it did not do (`forgetful.py`).
#[derive(Debug)]
pub struct Forgetful<'m> {
    machine: &'m TestMachine,
}

impl<'m> Forgetful<'m> {
    /// One for the machine's container.
    #[must_use]
    pub fn of(machine: &'m TestMachine) -> Self {
        Self { machine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.machine.path("forgetful").join(name)
    }

    /// Runs sprat with a server that discards every write of the container from the `nth` on. Reads
    /// then show the disk (`honest`) or the discarded data (`lying`). With `renames` it keeps all
    /// writes but does not give the container its name.
    pub fn run(&self, nth: usize, how: &str, arguments: &[&str]) -> Ran {
        let folder = self.path("");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        fs::write(self.path("lies"), "").unwrap();
        let script = self.machine.write("forgetful.py", FORGETFUL);
        let name = CONTAINER.strip_prefix("store/").unwrap();
        let server = format!(
            "exec python3 -S {} {} {} {name} {nth} {how} \"$@\"",
            script.display(),
            folder.display(),
            agent_server::sftp_server(&self.machine.path("store"))
                .unwrap()
                .display()
        );
        served_by(self.machine, &server, arguments)
    }

    /// Whether the last run read the container at that offset.
    #[must_use]
    pub fn read_at(&self, offset: u64) -> bool {
        let text = fs::read_to_string(self.path("reads")).unwrap_or_default();
        text.lines().any(|line| line.parse() == Ok(offset))
    }

    /// How many lines the file `writes` (all writes of the container) or `forgotten` (the discarded
    /// ones) of the last run has.
    #[must_use]
    pub fn lines(&self, name: &str) -> usize {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        text.lines().count()
    }
}
