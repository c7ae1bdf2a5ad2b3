//! A real SFTP server that shares nothing with OpenSSH's, on loopback: ProFTPD's `mod_sftp`, with the settings
//! that a hoster may have chosen.

use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::asyncssh::{client_words, wait_until_up};
use crate::needs;

const MODULES: &str = "/usr/lib/proftpd";

/// A running server; killed on drop.
#[derive(Debug)]
pub struct ProFtpd {
    folder: TempDir,
    port: u16,
    child: Child,
}

/// What is missing for a [`ProFtpd`].
#[must_use]
pub fn missing() -> Option<String> {
    let module = Path::new(MODULES).join("mod_sftp.so");
    let lacks_module = || (!module.exists()).then(|| format!("there is no {}", module.display()));
    needs::root()
        .or_else(|| needs::program("proftpd"))
        .or_else(|| needs::program("ssh"))
        .or_else(|| needs::program("ssh-keygen"))
        .or_else(lacks_module)
}

impl ProFtpd {
    /// Starts a server for the account that runs the tests, with `settings` for its whole folder, such as
    /// `AllowOverwrite off`.
    ///
    /// # Panics
    /// When it does not come up; check [`missing`] first.
    #[must_use]
    pub fn start(settings: &[&str]) -> Self {
        match Self::try_start(settings) {
            Ok(server) => server,
            Err(error) => panic!("proftpd for tests: {error}"),
        }
    }

    fn try_start(settings: &[&str]) -> io::Result<Self> {
        let folder = TempDir::with_prefix("sprat-proftpd-")?;
        let path = |file: &str| folder.path().join(file);
        for key in ["host_key", "user_key"] {
            // Of a kind and in a form that each release reads.
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "rsa", "-m", "PEM", "-N", "", "-f"])
                .arg(path(key))
                .status()?;
            if !made.success() {
                return Err(io::Error::other("ssh-keygen failed"));
            }
        }
        // RFC 4716, the only form that it takes.
        let public = Command::new("ssh-keygen")
            .args(["-e", "-f"])
            .arg(path("user_key.pub"))
            .output()?;
        std::fs::write(path("authorized_keys"), public.stdout)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let here = folder.path().display();
        let settings = settings.join("\n");
        let config = format!(
            "ModulePath {MODULES}\nLoadModule mod_sftp.c\nServerType standalone\nServerName tests\n\
             UseIPv6 off\nDefaultAddress 127.0.0.1\nPort {port}\nUser root\nGroup root\nRootLogin on\n\
             RequireValidShell off\nUseFtpUsers off\nUseReverseDNS off\nAuthOrder mod_auth_unix.c\n\
             PidFile {here}/pid\nScoreboardFile {here}/scoreboard\nSystemLog {here}/log\nWtmpLog off\n\
             TransferLog none\nUmask 077\nSFTPEngine on\nSFTPHostKey {here}/host_key\n\
             SFTPAuthMethods publickey\nSFTPAuthorizedUserKeys file:{here}/authorized_keys\n\
             SFTPLog {here}/sftp.log\nAllowOverwrite on\n<Directory />\n{settings}\n</Directory>\n"
        );
        std::fs::write(path("proftpd.conf"), config)?;
        let child = Command::new(needs::find_program("proftpd").unwrap_or_default())
            .args(["--nodaemon", "--quiet", "--config"])
            .arg(path("proftpd.conf"))
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
        let host_key = std::fs::read_to_string(server.path("host_key.pub"))?;
        let known = format!("[127.0.0.1]:{port} {host_key}");
        std::fs::write(server.path("known_hosts"), known)?;
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

impl Drop for ProFtpd {
    fn drop(&mut self) {
        // Its sessions are processes of their own, and end with their connections.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
