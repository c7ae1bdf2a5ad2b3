//! sprat-agent in the place of OpenSSH's SFTP server.
//!
//! With `SPRAT_TEST_SERVER=agent` each test server that serves one folder is the agent (`make torture ONLY=agent`).
//! A server with options of OpenSSH's own, such as `-R`, stays OpenSSH's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::needs;

/// Each session begins a generation, and as many containers may be there as a test likes.
const POLICY: &str = "new = burst 1000000, then 1 per 1s\nsecret = 1s\nfree_min = 0%\nheader = free\n\
                      containers_max = 1000\n";

/// Whether all test servers shall be the agent.
#[must_use]
pub fn is_wanted() -> bool {
    std::env::var_os("SPRAT_TEST_SERVER").is_some_and(|server| server == "agent")
}

/// The SFTP server for a folder: OpenSSH's, or the agent where [`is_wanted`].
#[must_use]
pub fn sftp_server(folder: &Path) -> Option<PathBuf> {
    if is_wanted() && folder.is_dir() {
        return Some(launcher(folder));
    }
    needs::plain_sftp_server()
}

/// The `sprat-agent` that was built beside the running test program.
#[must_use]
pub fn agent() -> Option<PathBuf> {
    let test = std::env::current_exe().ok()?;
    let agent = test.ancestors().nth(2)?.join("sprat-agent");
    agent.is_file().then_some(agent)
}

/// What is missing for [`launcher`].
#[must_use]
pub fn missing() -> Option<String> {
    let missing = "sprat-agent is not built: run the tests of the whole workspace";
    agent()
        .is_none()
        .then(|| missing.to_owned())
        .or_else(needs::sftp_server_missing)
}

/// Makes the folder a root of the agent; returns a program that takes sftp-server's place for it. The program is
/// among the agent's own files, so it goes with the folder.
///
/// # Panics
/// When the agent does not adopt the folder; check [`missing`] first.
#[must_use]
pub fn launcher(folder: &Path) -> PathBuf {
    let agent = agent().expect("sprat-agent is built");
    let own = folder.join(".sprat-agent");
    let launcher = own.join("sftp-server");
    if launcher.is_file() {
        return launcher;
    }
    let adopt = ["adopt", "--root"];
    let adopted = Command::new(&agent).args(adopt).arg(folder).output();
    let adopted = adopted.expect("the agent runs");
    assert!(adopted.status.success(), "{adopted:?}");
    let write = |name: &str, text: String| {
        // Complete once it has its name: connections may start already.
        let new = own.join(format!("{name}.{}", std::process::id()));
        fs::write(&new, text).expect("a file");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("a mode");
        fs::rename(&new, own.join(name)).expect("a name");
    };
    write("policy", POLICY.to_owned());
    let script = format!(
        "#!/bin/sh\n[ $# = 0 ] || [ \"$# $1\" = '2 -d' ] || exec '{}' \"$@\"\n\
         exec '{}' serve --root '{}'\n",
        needs::plain_sftp_server().expect("a server").display(),
        agent.display(),
        folder.display()
    );
    write("sftp-server", script);
    launcher
}

/// Reads every block of every past state.
///
/// # Panics
/// When one can't be read.
pub fn check(folder: &Path) {
    let agent = agent().expect("sprat-agent is built");
    let words = ["check", "--read-data", "--root"];
    let output = Command::new(agent).args(words).arg(folder).output();
    let output = output.expect("the agent runs");
    assert!(output.status.success(), "{output:?}");
}
