//! A stage for tests of the whole path: a real sshd, folders of its own, and the real program.

#![allow(dead_code, reason = "each test program uses a part of the stage")]

pub mod leftovers;
pub mod manifest;
pub mod plain;
pub mod running;
pub mod tree;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use sprat_testkit::needs;
use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, openssh};
use sprat_testkit::wire::{Wire, WireOptions};

/// The program under test.
pub const SPRAT: &str = env!("CARGO_BIN_EXE_sprat");

/// What is missing on this machine for the whole path.
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
        .or_else(|| device("/dev/fuse"))
        .or_else(|| device("/dev/loop-control"))
}

fn device(path: &str) -> Option<String> {
    (!Path::new(path).exists()).then(|| format!("there is no {path}"))
}

/// Everything of one test lies below one folder: the server's, the client's state, sources, mounts.
pub struct Stage {
    pub sshd: SshServer,
    /// Between ssh and the server, where a test asked for one.
    pub wire: Option<Wire>,
    folder: tempfile::TempDir,
    /// The volume's length, which no other test on this machine has: its loop devices are told by it.
    volume_bytes: u64,
}

/// What lies in front of the volume in a container.
const HEADER_BYTES: u64 = 16 << 20;

impl Stage {
    /// Starts the server; a relative path on it begins in [`Stage::server`].
    pub fn new() -> Self {
        Self::with(OpenSshOptions::default())
    }

    /// The same with another sshd.
    pub fn with(mut options: OpenSshOptions) -> Self {
        // A mount shows files to whoever can enter.
        let folder = tempfile::Builder::new()
            .prefix("sprat-stage-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir()
            .expect("a folder");
        for name in ["server", "state", "run", "source", "restored"] {
            std::fs::create_dir(folder.path().join(name)).expect("a folder");
        }
        let server = folder.path().join("server").display().to_string();
        options.sftp_arguments.extend(["-d".into(), server]);
        let sshd = SshServer::start_with(&options);
        Self {
            sshd,
            wire: None,
            folder,
            volume_bytes: 0,
        }
    }

    /// The same behind a slow wire that can be cut.
    pub fn through_wire(options: WireOptions) -> Self {
        Self::new().behind_wire(options)
    }

    /// Puts a wire in front of the server.
    pub fn behind_wire(self, options: WireOptions) -> Self {
        let mut stage = self;
        stage.wire = Some(Wire::start(stage.sshd.port(), options).expect("a wire"));
        stage
    }

    /// The wire of [`Stage::through_wire`].
    pub fn line(&self) -> &Wire {
        self.wire.as_ref().expect("a stage with a wire")
    }

    /// A file or folder of this stage.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder that the server's account begins in.
    pub fn server(&self) -> PathBuf {
        self.path("server")
    }

    /// The container as it lies on the server's disk.
    pub fn container(&self) -> PathBuf {
        self.server().join("laptop.luks")
    }

    /// The container as the command line names it.
    pub fn target(&self) -> &'static str {
        "backup.example:laptop.luks"
    }

    /// The key file that `init` makes.
    pub fn key_file(&self) -> PathBuf {
        self.path("laptop.key")
    }

    /// `sprat` with this stage's state, key file and ssh; the caller adds the rest.
    pub fn sprat(&self) -> Command {
        self.sprat_through(&match &self.wire {
            Some(wire) => self.sshd.ssh_command_through(wire.port()),
            None => self.sshd.ssh_command(),
        })
    }

    /// The same with another ssh command.
    pub fn sprat_through(&self, ssh_command: &[std::ffi::OsString]) -> Command {
        let ssh: Vec<_> = ssh_command
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        let mut command = Command::new(SPRAT);
        command
            .env("SPRAT_STATE_DIR", self.path("state"))
            .env("SPRAT_RUNTIME_DIR", self.path("run"))
            .env("SPRAT_CACHE_DIR", self.path("cache"))
            .env("SPRAT_RESERVE_BYTES", "0")
            .arg("--ssh-command")
            .arg(ssh.join(" "))
            .arg("--key-file")
            .arg(self.key_file())
            .stdin(Stdio::null());
        command
    }

    /// Runs `sprat` with `arguments` to its end; anything but exit code 0 fails the test.
    pub fn ok<A: AsRef<OsStr>>(&self, arguments: &[A], limit: Duration) -> Output {
        let mut command = self.sprat();
        command.args(arguments);
        let output = run_within(&mut command, limit);
        assert!(output.status.success(), "{}", shown(&command, &output));
        output
    }

    /// Makes the container, of about `gibibytes`, with the least costly key derivation.
    pub fn init(&mut self, gibibytes: u64) -> Output {
        let size = self.choose_size(gibibytes).to_string();
        let words = [
            "--cheap-kdf-for-tests",
            "init",
            self.target(),
            "--size",
            &size,
        ];
        self.ok(&words, Duration::from_secs(120))
    }

    /// A container's size in bytes that is this stage's own.
    pub fn choose_size(&mut self, gibibytes: u64) -> u64 {
        let own = u64::from(std::process::id()) % 4096 * 4096;
        let size = (gibibytes << 30) + own;
        self.volume_bytes = size - HEADER_BYTES;
        size
    }

    /// Backs `source` up as `job`.
    pub fn backup(&self, job: &str, source: &Path) -> Output {
        let source = source.display().to_string();
        let arguments = ["backup", self.target(), "--name", job, &source];
        self.ok(&arguments, Duration::from_secs(280))
    }

    /// Restores the latest snapshot of `job`; returns where `source` came back.
    pub fn restore(&self, job: &str, source: &Path) -> PathBuf {
        let to = self.path("restored").join(job);
        let shown_to = to.display().to_string();
        let arguments = ["restore", self.target(), job, "--to", &shown_to];
        self.ok(&arguments, Duration::from_secs(280));
        to.join(source.strip_prefix("/").expect("an absolute path"))
    }

    /// The processes that this stage's sessions have started and that still run, with the words of
    /// their command lines, oldest first.
    pub fn processes(&self) -> Vec<(i32, Vec<String>)> {
        leftovers::processes(self.folder.path())
    }

    /// Fails unless within `limit` nothing of this stage is mounted, looped or running any more,
    /// and the server has no session.
    pub fn assert_nothing_is_left(&self, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            let mut left = leftovers::of(self.folder.path(), self.volume_bytes);
            let sessions = self.sshd.session_pids();
            if !sessions.is_empty() {
                left.push(format!("sessions of the server: {sessions:?}"));
            }
            if left.is_empty() {
                return;
            }
            assert!(
                Instant::now() < until,
                "left behind:\n  {}",
                left.join("\n  ")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Stage {
    /// A test that failed leaves no session behind, stopped or waiting for a line.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let servers = self.sshd.session_pids();
        for (pid, _) in self.processes() {
            if let Some(pid) =
                rustix::process::Pid::from_raw(pid).filter(|_| !servers.contains(&pid))
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let _ = sprat_attach::unmount_dead(&self.path("mounted"));
    }
}

/// A command and what came of it, for a failing test's message.
pub fn shown(command: &Command, output: &Output) -> String {
    let words: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    format!(
        "sprat {}\n{}\n--- stdout\n{}\n--- stderr\n{}",
        words.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs a command to its end and keeps what it prints; one that takes longer than `limit` is killed
/// and fails the test.
pub fn run_within(command: &mut Command, limit: Duration) -> Output {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let stdout = reader(child.stdout.take());
    let stderr = reader(child.stderr.take());
    let until = Instant::now() + limit;
    let (status, in_time) = loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break (status, true);
        }
        if Instant::now() > until {
            child.kill().expect("a child can be killed");
            break (child.wait().expect("a child can be waited for"), false);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let output = Output {
        status,
        stdout: stdout.join().expect("the reader ends"),
        stderr: stderr.join().expect("the reader ends"),
    };
    assert!(
        in_time,
        "took longer than {limit:?}: {}",
        shown(command, &output)
    );
    output
}

fn reader(pipe: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    let mut pipe = pipe.expect("the output is a pipe");
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// Runs one of the system's programs; anything but exit code 0 fails the test.
pub fn system<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> String {
    let output = Command::new(needs::find_program(program).expect("checked by missing()"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}
