//! Dropbear on loopback, as small machines have it: an ssh server of its own in front of OpenSSH's
//! sftp-server, with a shell.

use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::asyncssh::{client_words, wait_until_up};
use crate::needs;

/// A running server; killed on drop.
#[derive(Debug)]
pub struct Dropbear {
    folder: TempDir,
    port: u16,
    child: Child,
}

/// What is missing for a [`Dropbear`].
#[must_use]
pub fn missing() -> Option<String> {
    needs::root()
        .or_else(needs::sftp_server_missing)
        .or_else(|| needs::program("dropbear"))
        .or_else(|| needs::program("dropbearkey"))
        .or_else(|| needs::program("ssh-keygen"))
        .or_else(|| needs::program("unshare"))
}

impl Dropbear {
    /// Starts a server for the account that runs the tests.
    ///
    /// # Panics
    /// When it does not come up; check [`missing`] first.
    #[must_use]
    pub fn start() -> Self {
        match Self::try_start() {
            Ok(server) => server,
            Err(error) => panic!("dropbear for tests: {error}"),
        }
    }

    fn try_start() -> io::Result<Self> {
        let folder = TempDir::with_prefix("sprat-dropbear-")?;
        let path = |file: &str| folder.path().join(file);
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(path("user_key"))
            .status()?;
        let host_key = Command::new("dropbearkey")
            .args(["-t", "ed25519", "-f"])
            .arg(path("host_key"))
            .output()?;
        let said = String::from_utf8_lossy(&host_key.stdout).into_owned();
        let public = said.lines().find(|line| line.starts_with("ssh-"));
        let Some(public) = public.filter(|_| made.success()) else {
            return Err(io::Error::other(format!("no keys were made: {said}")));
        };
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        std::fs::write(
            path("known_hosts"),
            format!("[127.0.0.1]:{port} {public}\n"),
        )?;
        // It reads only ~/.ssh/authorized_keys: in a mount namespace of its own the home is another.
        let script = "set -e; umask 077; keys=$(cat \"$1/user_key.pub\"); mount -t tmpfs -o mode=700 none ~root; \
                      mkdir ~root/.ssh; echo \"$keys\" > ~root/.ssh/authorized_keys; \
                      exec dropbear -F -E -s -r \"$1/host_key\" -p \"127.0.0.1:$2\" -P \"$1/pid\"";
        let child = Command::new("unshare")
            .args(["--mount", "--", "sh", "-c", script, "sh"])
            .arg(folder.path())
            .arg(port.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(path("errors"))?)
            .spawn()?;
        let mut server = Self {
            folder,
            port,
            child,
        };
        let errors = server.path("errors");
        wait_until_up(&mut server.child, port, &errors)?;
        Ok(server)
    }

    /// What to run instead of `ssh`. Any host name leads to this server.
    #[must_use]
    pub fn ssh_command(&self) -> Vec<OsString> {
        client_words(self.folder.path(), self.port)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }
}

impl Drop for Dropbear {
    fn drop(&mut self) {
        // Its sessions are processes of their own, and end with their connections.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
