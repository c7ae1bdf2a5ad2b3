//! A real SSH server on loopback with its own keys: OpenSSH's, or one of three others.

pub mod asyncssh;
pub mod dropbear;
pub mod openssh;
pub mod proftpd;

use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{leftovers, needs};

pub use openssh::OpenSshOptions;

/// A running server; dropping it kills the server and its sessions, and removes its folder.
#[derive(Debug)]
pub struct SshServer {
    folder: TempDir,
    port: u16,
    /// See [`reserve_port`].
    _reserved: OwnedFd,
    /// The program that serves, with its arguments.
    command: Vec<OsString>,
    child: Option<Child>,
}

/// What is missing for the client side of every server.
fn client_missing() -> Option<String> {
    needs::root()
        .or_else(|| needs::program("ssh"))
        .or_else(|| needs::program("ssh-keygen"))
}

impl SshServer {
    /// Starts OpenSSH's server with the defaults.
    ///
    /// # Panics
    /// When the server does not come up; check [`openssh::missing`] first.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&OpenSshOptions::default())
    }

    /// The same for a test that uses one folder there.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn start_for(folder: &Path) -> Self {
        Self::start_with(&OpenSshOptions::default().serving(folder))
    }

    /// Starts OpenSSH's server.
    ///
    /// # Panics
    /// When the server does not come up; check [`openssh::missing`] first.
    #[must_use]
    pub fn start_with(options: &OpenSshOptions) -> Self {
        Self::or_panic("sshd", openssh::try_start(options))
    }

    fn or_panic(program: &str, started: io::Result<Self>) -> Self {
        started.unwrap_or_else(|error| panic!("{program} for tests: {error}"))
    }

    /// A server that does not run yet: an empty folder, and a free port.
    fn prepare(prefix: &str) -> io::Result<Self> {
        let (reserved, port) = reserve_port()?;
        Ok(Self {
            folder: TempDir::with_prefix(prefix)?,
            port,
            _reserved: reserved,
            command: Vec::new(),
            child: None,
        })
    }

    /// Makes the key `name` and `name.pub` in the server's folder.
    fn make_key(&self, name: &str, kind: &[&str]) -> io::Result<()> {
        let output = Command::new("ssh-keygen")
            .args(["-q", "-N", ""])
            .args(kind)
            .arg("-f")
            .arg(self.path(name))
            .stdin(Stdio::null())
            .output()?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(io::Error::other(format!("ssh-keygen: {stderr}")))
    }

    /// Writes ssh's configuration and known hosts, then starts `command`.
    fn serve(&mut self, host_key: &str, command: Vec<OsString>) -> io::Result<()> {
        let folder = self.folder.path().display();
        let known = format!("[127.0.0.1]:{} {}\n", self.port, host_key.trim_end());
        std::fs::write(self.path("known_hosts"), known)?;
        let config = format!(
            "Host *\n  HostName 127.0.0.1\n  Port {}\n  User root\n  IdentityFile {folder}/user_key\n  \
             IdentitiesOnly yes\n  IdentityAgent none\n  UserKnownHostsFile {folder}/known_hosts\n  \
             GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n",
            self.port
        );
        std::fs::write(self.path("ssh_config"), config)?;
        self.command = command;
        self.restart()
    }

    /// Starts the server again after [`SshServer::stop`] or [`SshServer::kill_sessions`], and waits
    /// until it accepts connections.
    pub fn restart(&mut self) -> io::Result<()> {
        self.stop();
        let child = Command::new(&self.command[0])
            .args(&self.command[1..])
            // asyncssh's ends when its standard input does.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.path("log"))?)
            .spawn()?;
        let child = self.child.insert(child);
        let until = Instant::now() + leftovers::LIMIT;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if child.try_wait()?.is_some() || Instant::now() > until {
                let log = std::fs::read_to_string(self.path("log"))?;
                return Err(io::Error::other(format!("it does not come up: {log}")));
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

    /// Kills every process that the server started for its sessions; the listener stays.
    pub fn kill_sessions(&self) {
        for pid in self.session_pids().into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// The processes that run an SFTP server for this server's sessions.
    #[must_use]
    pub fn sftp_server_pids(&self) -> Vec<i32> {
        let is_sftp = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.contains("sftp") || line.contains("sprat-agent")
        };
        self.session_pids().into_iter().filter(is_sftp).collect()
    }

    /// Every process that the listener started for its sessions. With OpenSSH this includes a
    /// stopped process whose parent has exited.
    #[must_use]
    pub fn session_pids(&self) -> Vec<i32> {
        let listener = self
            .child
            .as_ref()
            .and_then(|child| i32::try_from(child.id()).ok());
        let pids: Vec<i32> = leftovers::pids().collect();
        let parents: Vec<_> = pids
            .iter()
            .filter_map(|pid| Some((*pid, leftovers::parent(*pid)?)))
            .collect();
        let mut found: Vec<i32> = listener.into_iter().collect();
        let mut next = 0;
        while next < found.len() {
            let children = parents.iter().filter(|(_, parent)| *parent == found[next]);
            let children: Vec<i32> = children.map(|(pid, _)| *pid).collect();
            found.extend(children);
            next += 1;
        }
        found.retain(|pid| Some(*pid) != listener);
        let mark = openssh::session_mark(self.folder());
        let is_marked = |pid: &i32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == mark.as_bytes())
        };
        let orphans = pids.into_iter().filter(|pid| !found.contains(pid));
        let orphans: Vec<i32> = orphans.filter(is_marked).collect();
        found.extend(orphans);
        found
    }

    /// The line with which the server begins a connection: `SSH-2.0-` and its program and version.
    pub fn greeting(&self) -> io::Result<String> {
        let connection = TcpStream::connect(("127.0.0.1", self.port))?;
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(connection), &mut line)?;
        Ok(line)
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

    /// The same through a wire that listens on `port`. ssh detects a dead connection within
    /// seconds, by the same rule as with sprat's own 45 s: of two values ssh uses the first.
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

    /// Makes ssh's configuration offer a key that the server does not know; with OpenSSH only.
    pub fn use_unknown_user_key(&self) -> io::Result<()> {
        std::fs::copy(self.path("other_key"), self.path("user_key")).map(drop)
    }

    /// Makes ssh's configuration know no host key at all.
    pub fn forget_host_key(&self) -> io::Result<()> {
        std::fs::write(self.path("known_hosts"), "")
    }

    /// A file in the server's own folder (`log`, `known_hosts`, …).
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// The folder of keys and configuration.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// A free port, and a socket that keeps it from all others, also while the server is stopped. Linux gives no
/// program a port by chance that a socket is bound to; and one that does not listen is no obstacle to a
/// server with `SO_REUSEADDR`, as each of them is (net/ipv4/inet_connection_sock.c:
/// `inet_csk_find_open_port`, `inet_bind_conflict`).
fn reserve_port() -> io::Result<(OwnedFd, u16)> {
    let (family, flags) = (AddressFamily::INET, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
    let address = SocketAddrV4::try_from(rustix::net::getsockname(&socket)?)?;
    Ok((socket, address.port()))
}

impl Drop for SshServer {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sshd_accepts_its_key_and_leaves_nothing_behind() {
        crate::requires!(openssh::missing());
        let sshd = SshServer::start();
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
