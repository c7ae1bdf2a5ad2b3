//! A real SSH server that is not OpenSSH, on loopback: asyncssh's, with SFTP and without a shell.
//!
//! Its SFTP has fsync, free space and renames of OpenSSH's kind, but no limits, and opens no folder:
//! what a plain account elsewhere is like. It copies by itself unless that is asked not to be.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::needs;

const PROGRAM: &str = include_str!("asyncssh_server.py");
/// The system's own: asyncssh is a package of the distribution.
const PYTHON: &str = "/usr/bin/python3";

/// A running server; killed on drop.
#[derive(Debug)]
pub struct AsyncSsh {
    folder: TempDir,
    port: u16,
    child: Child,
}

/// What is missing for an [`AsyncSsh`].
#[must_use]
pub fn missing() -> Option<String> {
    let has_it = || {
        let import = Command::new(PYTHON)
            .args(["-c", "import asyncssh"])
            .output();
        import.is_ok_and(|output| output.status.success())
    };
    needs::root()
        .or_else(|| needs::program("ssh"))
        .or_else(|| needs::program("ssh-keygen"))
        .or_else(|| (!has_it()).then(|| format!("{PYTHON} has no asyncssh")))
}

impl AsyncSsh {
    /// Starts a server for the account that runs the tests. It copies by itself, as asyncssh's do since 2.13.
    ///
    /// # Panics
    /// When it does not come up; check [`missing`] first.
    #[must_use]
    pub fn start() -> Self {
        match Self::try_start(&[]) {
            Ok(server) => server,
            Err(error) => panic!("asyncssh for tests: {error}"),
        }
    }

    /// As [`AsyncSsh::start`], without the extension `copy-data`.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn start_without_copies() -> Self {
        match Self::try_start(&["--no-copies"]) {
            Ok(server) => server,
            Err(error) => panic!("asyncssh for tests: {error}"),
        }
    }

    fn try_start(options: &[&str]) -> io::Result<Self> {
        let folder = TempDir::with_prefix("sprat-asyncssh-")?;
        let path = |file: &str| folder.path().join(file);
        for key in ["host_key", "user_key"] {
            let status = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(path(key))
                .status()?;
            if !status.success() {
                return Err(io::Error::other("ssh-keygen failed"));
            }
        }
        std::fs::write(path("server.py"), PROGRAM)?;
        let mut child = Command::new(PYTHON)
            .arg(path("server.py"))
            .args([path("host_key"), path("user_key.pub")])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(path("log"))?)
            .spawn()?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let Ok(port) = line.trim().parse::<u16>() else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::other(std::fs::read_to_string(path("log"))?));
        };
        let host_key = std::fs::read_to_string(path("host_key.pub"))?;
        std::fs::write(
            path("known_hosts"),
            format!("[127.0.0.1]:{port} {host_key}"),
        )?;
        Ok(Self {
            folder,
            port,
            child,
        })
    }

    /// What to run instead of `ssh`. Any host name leads to this server.
    #[must_use]
    pub fn ssh_command(&self) -> Vec<OsString> {
        client_words(self.folder.path(), self.port)
    }
}

impl Drop for AsyncSsh {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `server` takes connections on `port` of loopback; what it wrote to `errors` is the failure's text.
pub(crate) fn wait_until_up(server: &mut Child, port: u16, errors: &Path) -> io::Result<()> {
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if server.try_wait()?.is_some() || Instant::now() > until {
            let said = std::fs::read_to_string(errors)?;
            return Err(io::Error::other(format!("it does not come up: {said}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// `ssh` with the keys `user_key` and `known_hosts` in `folder`, whatever host is named.
pub(crate) fn client_words(folder: &Path, port: u16) -> Vec<OsString> {
    let file = |name: &str| folder.join(name).display().to_string();
    let known = format!("UserKnownHostsFile={}", file("known_hosts"));
    let identity = format!("IdentityFile={}", file("user_key"));
    let alias = format!("HostKeyAlias=[127.0.0.1]:{port}");
    let port = format!("Port={port}");
    let options = [
        "HostName=127.0.0.1",
        "User=root",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
        &port,
        &alias,
        &known,
        &identity,
    ];
    let mut words: Vec<OsString> = vec!["ssh".into(), "-F".into(), "/dev/null".into()];
    for option in options {
        words.extend(["-o".into(), option.into()]);
    }
    words
}
