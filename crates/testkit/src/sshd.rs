//! A real sshd on loopback with throw-away keys, for the tests that need ssh itself.

use std::ffi::OsString;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::needs;

/// Stands in the environment of every session, so that none can hide.
const MARK: &str = "SPRAT_TEST_SSHD";

/// How the server's SFTP subsystem is run, and what else may differ from the plain server.
#[derive(Debug, Clone, Default)]
pub struct SshdOptions {
    /// sshd's own `internal-sftp` instead of the program.
    pub internal_sftp: bool,
    /// Arguments for sftp-server, such as `-R` or `-P fsync`.
    pub sftp_arguments: Vec<String>,
    /// No SFTP subsystem at all.
    pub no_sftp: bool,
    /// More lines for sshd_config, before everything else (the first value of a key wins).
    pub config_lines: Vec<String>,
}

/// A running sshd; killed, with every session it serves, and removed on drop.
#[derive(Debug)]
pub struct Sshd {
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

/// What is missing for an [`Sshd`].
#[must_use]
pub fn missing() -> Option<String> {
    needs::root()
        .or_else(|| needs::program("sshd"))
        .or_else(|| needs::program("ssh"))
        .or_else(|| needs::program("ssh-keygen"))
        .or_else(needs::sftp_server_missing)
}

impl Sshd {
    /// Starts a server with the defaults.
    ///
    /// # Panics
    /// When it does not come up; check [`missing`] first.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&SshdOptions::default())
    }

    /// Starts a server.
    ///
    /// # Panics
    /// When it does not come up; check [`missing`] first.
    #[must_use]
    pub fn start_with(options: &SshdOptions) -> Self {
        match Self::try_start(options) {
            Ok(sshd) => sshd,
            Err(error) => panic!("sshd for tests: {error}"),
        }
    }

    fn try_start(options: &SshdOptions) -> io::Result<Self> {
        let folder = TempDir::with_prefix("sprat-sshd-")?;
        std::fs::create_dir_all("/run/sshd")?;
        for key in ["host_key", "user_key", "other_key"] {
            let path = folder.path().join(key);
            run(Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(path))?;
        }
        let user_key = std::fs::read(folder.path().join("user_key.pub"))?;
        std::fs::write(folder.path().join("authorized_keys"), user_key)?;
        // The port is free now; nobody else on this machine is likely to take it in between.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut sshd = Self {
            folder,
            port,
            child: None,
        };
        std::fs::write(sshd.path("sshd_config"), sshd.server_config(options))?;
        sshd.write_client_files()?;
        sshd.restart()?;
        Ok(sshd)
    }

    fn server_config(&self, options: &SshdOptions) -> String {
        let program = match (options.internal_sftp, needs::sftp_server()) {
            (false, Some(program)) => program.display().to_string(),
            _ => "internal-sftp".to_owned(),
        };
        let subsystem = if options.no_sftp {
            String::new()
        } else {
            format!(
                "Subsystem sftp {program} {}\n",
                options.sftp_arguments.join(" ")
            )
        };
        let folder = self.folder.path().display();
        let pam = if root_is_locked() { "yes" } else { "no" };
        // bash reads the account's ~/.bashrc when it sees that sshd started it, unless it is a
        // nested one (run_startup_files in shell.c); what stands there is not part of a test.
        format!(
            "{}\nSetEnv SHLVL=5 {MARK}={folder}\nListenAddress 127.0.0.1\nPort {}\nHostKey {folder}/host_key\n\
             PidFile {folder}/sshd.pid\nAuthorizedKeysFile {folder}/authorized_keys\n\
             UsePAM {pam}\nStrictModes no\nAuthenticationMethods publickey\n\
             PubkeyAuthentication yes\nPasswordAuthentication no\nPermitRootLogin yes\n\
             KbdInteractiveAuthentication no\nX11Forwarding no\nPrintMotd no\nUseDNS no\n\
             MaxStartups 100\nMaxSessions 100\nLogLevel ERROR\n{subsystem}",
            options.config_lines.join("\n"),
            self.port,
        )
    }

    fn write_client_files(&self) -> io::Result<()> {
        let folder = self.folder.path().display();
        let host_key = std::fs::read_to_string(self.path("host_key.pub"))?;
        let known = format!("[127.0.0.1]:{} {host_key}", self.port);
        std::fs::write(self.path("known_hosts"), known)?;
        let config = format!(
            "Host *\n  HostName 127.0.0.1\n  Port {}\n  User root\n  IdentityFile {folder}/user_key\n\
             \n  IdentitiesOnly yes\n  IdentityAgent none\n  UserKnownHostsFile {folder}/known_hosts\n  \
             GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n",
            self.port
        );
        std::fs::write(self.path("ssh_config"), config)
    }

    /// Starts the server again after [`Sshd::stop`] or [`Sshd::kill_sessions`].
    pub fn restart(&mut self) -> io::Result<()> {
        self.stop();
        // An absolute path: sshd executes itself again for every connection.
        let program = needs::find_program("sshd").ok_or(io::ErrorKind::NotFound)?;
        let child = Command::new(program)
            .args(["-D", "-e", "-f"])
            .arg(self.path("sshd_config"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.path("sshd.log"))?)
            .spawn()?;
        self.child = Some(child);
        let until = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if Instant::now() > until {
                return Err(io::Error::other(std::fs::read_to_string(
                    self.path("sshd.log"),
                )?));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends the listener and every session, as a machine that is switched off would.
    pub fn stop(&mut self) {
        self.kill_sessions();
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.kill_sessions();
    }

    /// Kills everything the server has started for its sessions; the listener stays.
    pub fn kill_sessions(&self) {
        for pid in self.session_pids() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// The processes that run an SFTP server for this sshd.
    #[must_use]
    pub fn sftp_server_pids(&self) -> Vec<i32> {
        let is_sftp = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains("sftp")
        };
        self.session_pids().into_iter().filter(is_sftp).collect()
    }

    /// Every process that the listener has started for its sessions, also one that is stopped
    /// and has lost its parent.
    #[must_use]
    pub fn session_pids(&self) -> Vec<i32> {
        let listener = self
            .child
            .as_ref()
            .and_then(|child| i32::try_from(child.id()).ok());
        let parents = process_parents();
        let mut found: Vec<i32> = listener.into_iter().collect();
        let mut next = 0;
        while next < found.len() {
            let parent = found[next];
            found.extend(
                parents
                    .iter()
                    .filter(|(_, p)| *p == parent)
                    .map(|(pid, _)| *pid),
            );
            next += 1;
        }
        found.retain(|pid| Some(*pid) != listener);
        let mark = format!("{MARK}={}", self.folder.path().display());
        let orphans = parents.iter().map(|(pid, _)| *pid).filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == mark.as_bytes())
        });
        let orphans: Vec<i32> = orphans.filter(|pid| !found.contains(pid)).collect();
        found.extend(orphans);
        found
    }

    /// The TCP port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `ssh -F …`: what to run instead of `ssh`. Any host name leads to this server.
    #[must_use]
    pub fn ssh_command(&self) -> Vec<OsString> {
        vec!["ssh".into(), "-F".into(), self.path("ssh_config").into()]
    }

    /// The same through a wire that listens on `port`. A dead line is noticed within seconds, by
    /// the same rule as with sprat's own 45 s: of two values ssh takes the first.
    #[must_use]
    pub fn ssh_command_through(&self, port: u16) -> Vec<OsString> {
        let alias = format!("HostKeyAlias=[127.0.0.1]:{}", self.port);
        let port = format!("Port={port}");
        let quick = [
            "ServerAliveInterval=1",
            "ServerAliveCountMax=2",
            "ConnectTimeout=5",
        ];
        let mut words = self.ssh_command();
        for option in [alias.as_str(), port.as_str()].into_iter().chain(quick) {
            words.extend(["-o".into(), option.into()]);
        }
        words
    }

    /// Makes ssh's configuration offer a key that the server does not know.
    pub fn use_unknown_user_key(&self) -> io::Result<()> {
        std::fs::copy(self.path("other_key"), self.path("user_key")).map(drop)
    }

    /// Makes ssh's configuration know no host key at all.
    pub fn forget_host_key(&self) -> io::Result<()> {
        std::fs::write(self.path("known_hosts"), "")
    }

    /// A file in the server's own folder (`sshd.log`, `known_hosts`, …).
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// The folder that holds keys and configuration.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

/// Whether root's password is locked, as Ubuntu has it: without PAM sshd then refuses every login
/// (openssh-portable: auth.c, `allowed_user`).
fn root_is_locked() -> bool {
    let shadow = std::fs::read_to_string("/etc/shadow").unwrap_or_default();
    shadow.lines().any(|line| line.starts_with("root:!"))
}

/// Every process with its parent, from /proc (proc(5): the name in stat may hold blanks and
/// parentheses, so fields are counted after the last one).
fn process_parents() -> Vec<(i32, i32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: i32| {
            let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
            let stat = String::from_utf8_lossy(&stat).into_owned();
            let parent = stat
                .rsplit_once(')')?
                .1
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()?;
            Some((pid, parent))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sshd_lets_its_key_in_and_leaves_nothing_behind() {
        crate::requires!(missing());
        let sshd = Sshd::start();
        let ssh = sshd.ssh_command();
        let mut command = Command::new(&ssh[0]);
        let output = command
            .args(&ssh[1..])
            .args(["-n", "any.host", "echo here"])
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"here\n", "{output:?}");
        let folder = sshd.folder().to_owned();
        let port = sshd.port();
        drop(sshd);
        assert!(!folder.exists());
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    }
}
