//! A server that is not OpenSSH: asyncssh's, with SFTP and without a shell.
//!
//! Its SFTP has fsync, free space and renames of OpenSSH's kind. It has no limits extension and
//! cannot open a folder: a plain account elsewhere is like this.

use std::io;
use std::process::Command;

use super::{SshServer, client_missing};

const PROGRAM: &str = include_str!("asyncssh_server.py");
/// The system's own: asyncssh is a package of the distribution.
const PYTHON: &str = "/usr/bin/python3";

/// What is missing for [`start`].
#[must_use]
pub fn missing() -> Option<String> {
    let has_it = || {
        let import = Command::new(PYTHON)
            .args(["-c", "import asyncssh"])
            .output();
        import.is_ok_and(|output| output.status.success())
    };
    client_missing().or_else(|| (!has_it()).then(|| format!("{PYTHON} has no asyncssh")))
}

/// Starts a server for the account that runs the tests. It has the extension `copy-data`, as
/// asyncssh has since 2.13.
///
/// # Panics
/// When the server does not come up; check [`missing`] first.
#[must_use]
pub fn start() -> SshServer {
    SshServer::or_panic("asyncssh", try_start(&[]))
}

/// As [`start`], without the extension `copy-data`.
///
/// # Panics
/// As there.
#[must_use]
pub fn start_without_copies() -> SshServer {
    SshServer::or_panic("asyncssh", try_start(&["--no-copies"]))
}

fn try_start(options: &[&str]) -> io::Result<SshServer> {
    let mut server = SshServer::prepare("sprat-asyncssh-")?;
    for key in ["host_key", "user_key"] {
        server.make_key(key, &["-t", "ed25519"])?;
    }
    std::fs::write(server.path("server.py"), PROGRAM)?;
    let host_key = std::fs::read_to_string(server.path("host_key.pub"))?;
    let mut command = vec![PYTHON.into(), server.path("server.py").into()];
    command.push(server.port().to_string().into());
    command.extend(["host_key", "user_key.pub"].map(|key| server.path(key).into()));
    command.extend(options.iter().map(Into::into));
    server.serve(&host_key, command)?;
    Ok(server)
}
