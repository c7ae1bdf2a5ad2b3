//! A client and an OpenSSH server, for tests of the whole path: the real program, a real sshd, and a
//! wire between them where a test asks for one.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use crate::leftovers::{self, Process};
use crate::machine::{TestMachine, own_size};
use crate::needs;
use crate::program::{run_within, shown};
use crate::ssh_server::{OpenSshOptions, SshServer, openssh};
use crate::wire::{Wire, WireOptions};

/// What is missing on this machine for the whole path.
#[must_use]
pub fn missing() -> Option<String> {
    let programs = [
        "rsync",
        "mkfs.ext4",
        "e2fsck",
        "cryptsetup",
        "losetup",
        "mount",
        "umount",
        "setfacl",
    ];
    openssh::missing()
        .or_else(|| programs.into_iter().find_map(needs::program))
        .or_else(needs::devices)
}

/// A file system in a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// The default.
    Ext4,
    /// Snapshots are subvolumes.
    Btrfs,
}

impl FileSystem {
    /// As the command line names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Btrfs => "btrfs",
        }
    }

    /// What is missing on this machine for a container with it.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        match self {
            Self::Ext4 => None,
            Self::Btrfs => needs::program("mkfs.btrfs").or_else(|| needs::program("btrfs")),
        }
    }
}

/// A client and its server. All files of both lie in one folder: the server's, the client's state,
/// sources, mounts.
#[derive(Debug)]
pub struct ClientAndServer {
    /// The client.
    pub machine: TestMachine,
    /// The server.
    pub sshd: SshServer,
    /// Between ssh and the server, where a test asked for one.
    pub wire: Option<Wire>,
    /// The volume's length. No other test on this machine has the same: it identifies the loop
    /// devices.
    volume_bytes: u64,
}

/// The length of the container's header; the volume follows.
pub const HEADER_BYTES: u64 = 16 << 20;

impl Default for ClientAndServer {
    fn default() -> Self {
        Self::new()
    }
}

impl ClientAndServer {
    /// Starts the server; a relative path on it begins in [`ClientAndServer::server`].
    ///
    /// # Panics
    /// When the server does not come up; check [`missing`] first.
    #[must_use]
    pub fn new() -> Self {
        Self::with(OpenSshOptions::default())
    }

    /// The same with another sshd.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn with(mut options: OpenSshOptions) -> Self {
        let machine = TestMachine::new();
        for name in ["server", "source", "restored"] {
            std::fs::create_dir(machine.path(name)).expect("a folder");
        }
        let server = machine.path("server");
        options = options.serving(&server);
        let begins = ["-d".into(), server.display().to_string()];
        options.sftp_arguments.extend(begins);
        Self {
            sshd: SshServer::start_with(&options),
            machine,
            wire: None,
            volume_bytes: 0,
        }
    }

    /// The same behind a slow wire that can be cut.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn through_wire(options: WireOptions) -> Self {
        Self::new().behind_wire(options)
    }

    /// Puts a wire in front of the server.
    #[must_use]
    pub fn behind_wire(mut self, options: WireOptions) -> Self {
        self.wire = Some(Wire::start(self.sshd.port(), options).expect("a wire"));
        self
    }

    /// The wire of [`ClientAndServer::through_wire`].
    #[must_use]
    pub fn connection(&self) -> &Wire {
        self.wire.as_ref().expect("a wire was asked for")
    }

    /// A file or folder of the client.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.machine.path(name)
    }

    /// The folder in which the server's account begins.
    #[must_use]
    pub fn server(&self) -> PathBuf {
        self.path("server")
    }

    /// The container's file on the server's disk.
    #[must_use]
    pub fn container(&self) -> PathBuf {
        self.server().join("laptop.luks")
    }

    /// The container as the command line names it.
    #[must_use]
    pub fn target(&self) -> &'static str {
        "backup.example:laptop.luks"
    }

    /// The key file that `init` makes.
    #[must_use]
    pub fn key_file(&self) -> PathBuf {
        self.path("laptop.key")
    }

    /// `sprat` with this client's state, key file and ssh; the caller adds the rest.
    #[must_use]
    pub fn sprat(&self) -> Command {
        self.sprat_through(&match &self.wire {
            Some(wire) => self.sshd.ssh_command_through(wire.port()),
            None => self.sshd.ssh_command(),
        })
    }

    /// The same with another ssh command.
    #[must_use]
    pub fn sprat_through(&self, ssh_command: &[OsString]) -> Command {
        let ssh: Vec<_> = ssh_command
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        let mut command = self.machine.command();
        command
            .arg("--ssh-command")
            .arg(ssh.join(" "))
            .arg("--key-file")
            .arg(self.key_file());
        command
    }

    /// Runs `sprat` with `arguments` to its end.
    ///
    /// # Panics
    /// When the exit code is not 0, or the run takes longer than `limit`.
    pub fn ok<A: AsRef<OsStr>>(&self, arguments: &[A], limit: Duration) -> Output {
        let mut command = self.sprat();
        command.args(arguments);
        let output = run_within(&mut command, limit);
        assert!(output.status.success(), "{}", shown(&command, &output));
        output
    }

    /// Makes the container, of about `gibibytes`, with the cheapest key derivation.
    pub fn init(&mut self, gibibytes: u64) -> Output {
        self.init_with(gibibytes, FileSystem::Ext4)
    }

    /// The same with this file system in it.
    pub fn init_with(&mut self, gibibytes: u64, file_system: FileSystem) -> Output {
        let size = self.choose_size(gibibytes).to_string();
        let words = [
            "--cheap-kdf-for-tests",
            "init",
            self.target(),
            "--size",
            &size,
            "--file-system",
            file_system.name(),
        ];
        self.ok(&words, Duration::from_secs(120))
    }

    /// A container's size in bytes that no other test uses.
    pub fn choose_size(&mut self, gibibytes: u64) -> u64 {
        self.choose_bytes(gibibytes << 30)
    }

    /// The same, of at least so many bytes.
    pub fn choose_bytes(&mut self, bytes: u64) -> u64 {
        let size = own_size(bytes);
        self.volume_bytes = size - HEADER_BYTES;
        size
    }

    /// Backs `source` up as `job`.
    pub fn backup(&self, job: &str, source: &Path) -> Output {
        let source = source.display().to_string();
        let arguments = ["backup", self.target(), "--name", job, &source];
        self.ok(&arguments, Duration::from_secs(280))
    }

    /// Restores the latest snapshot of `job`; returns the path of the restored `source`.
    pub fn restore(&self, job: &str, source: &Path) -> PathBuf {
        let to = self.path("restored").join(job);
        let shown_to = to.display().to_string();
        let arguments = ["restore", self.target(), job, "--to", &shown_to];
        self.ok(&arguments, Duration::from_secs(280));
        to.join(source.strip_prefix("/").expect("an absolute path"))
    }

    /// The processes of this client's sessions, by pid.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        self.machine.processes()
    }

    /// Waits until nothing of this client is mounted, looped or running any more, and the server has
    /// no session.
    ///
    /// # Panics
    /// When something is left after a long time.
    #[track_caller]
    pub fn assert_nothing_is_left(&self) {
        leftovers::assert_gone(|| {
            let folder = self.machine.folder().as_os_str().as_bytes();
            let mut left = leftovers::of(&[folder], self.volume_bytes);
            let sessions = self.sshd.session_pids();
            if !sessions.is_empty() {
                left.push(format!("sessions of the server: {sessions:?}"));
            }
            left
        });
    }
}
