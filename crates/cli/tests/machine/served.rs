//! The machine's container as if it lay on a server, so that there is a cache: an SFTP server without
//! ssh, honest or not.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part of it, and a test may panic"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sprat_testkit::needs;

use super::{CONTAINER, Machine, Ran};

/// What is missing here for a server.
pub fn missing() -> Option<String> {
    needs::root()
        .or_else(needs::sftp_server_missing)
        .or_else(|| needs::program("python3"))
}

/// sprat, with the system's own server; [`CONTAINER`] stands for the container there.
pub fn served(machine: &Machine, arguments: &[&str]) -> Ran {
    let server = needs::sftp_server().unwrap();
    served_by(machine, &format!("exec {}", server.display()), arguments)
}

/// The same by another server: a line of a shell script.
fn served_by(machine: &Machine, server: &str, arguments: &[&str]) -> Ran {
    let script = machine.path("ssh");
    // Files only: a request for a shell would wait for an answer in vain.
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

/// A server that says it did what it did not: `machine/forgetful.py`.
pub struct Forgetful<'m> {
    machine: &'m Machine,
}

impl<'m> Forgetful<'m> {
    /// One for the machine's container.
    pub fn of(machine: &'m Machine) -> Self {
        Self { machine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.machine.path("forgetful").join(name)
    }

    /// Runs sprat with a server that keeps no write of the container from the `nth` on, and then is
    /// `honest` or `lying`; or, with `renames`, does not give the container its name.
    pub fn run(&self, nth: usize, how: &str, arguments: &[&str]) -> Ran {
        let folder = self.path("");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        fs::write(self.path("lies"), "").unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/forgetful.py");
        let name = CONTAINER.strip_prefix("store/").unwrap();
        let server = format!(
            "exec python3 -S {} {} {} {name} {nth} {how} \"$@\"",
            script.display(),
            folder.display(),
            needs::sftp_server().unwrap().display()
        );
        served_by(self.machine, &server, arguments)
    }

    /// Whether the last run read the container at that offset.
    pub fn read_at(&self, offset: u64) -> bool {
        let text = fs::read_to_string(self.path("reads")).unwrap_or_default();
        text.lines().any(|line| line.parse() == Ok(offset))
    }

    /// Lines of the file `writes` (all writes of the container) or `forgotten` of the last run.
    pub fn lines(&self, name: &str) -> usize {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        text.lines().count()
    }
}
