//! A machine for each test, with its own folders for config, state and run-time, and sprat.

#![allow(clippy::unwrap_used, reason = "a failing test kit panics")]

pub mod remote;
pub mod served;
pub mod strikes;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::leftovers::{self, Process};
use crate::program;
use crate::test_folder::TestFolder;
use rustix::process::{Pid, Signal, kill_process};

/// The container that most tests use, as an argument.
pub const CONTAINER: &str = "store/x.luks";

/// Makes keys and containers with a weak key derivation, for tests.
pub const CHEAP: &str = "--cheap-kdf-for-tests";

/// Adds the passphrase of the file `pass`, which [`TestMachine::small`] writes.
pub const ADD_PASSPHRASE: [&str; 6] = [
    "key",
    "add",
    CONTAINER,
    CHEAP,
    "--new-passphrase-file",
    "pass",
];

/// Folders and settings that no other test uses; removed on drop.
#[derive(Debug)]
pub struct TestMachine {
    folder: TestFolder,
}

/// How one run of sprat ended.
#[derive(Debug)]
pub struct Ran {
    /// The exit code; -1 after a signal.
    pub code: i32,
    /// Standard output; paths of the machine begin with `[DIR]`.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Default for TestMachine {
    fn default() -> Self {
        Self::new()
    }
}

/// Folders and files.
impl TestMachine {
    /// Makes the folders `config`, `state`, `run`, `home` and `store`.
    #[must_use]
    pub fn new() -> Self {
        let folder = TestFolder::new("sprat-machine-");
        for name in ["config", "state", "run", "home", "store"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self { folder }
    }

    /// A file or folder of this machine.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder of everything.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file below the machine's folder, mode 0600.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Writes a file that changed an hour ago: no run lists it as young, however early it starts.
    pub fn write_old(&self, name: &str, content: impl AsRef<[u8]>) {
        let file = fs::File::options()
            .write(true)
            .open(self.write(name, content));
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        file.unwrap().set_modified(hour_ago).unwrap();
    }

    /// [`CONTAINER`]'s file, to be damaged.
    #[must_use]
    pub fn container_file(&self) -> fs::File {
        let mut options = fs::File::options();
        options.read(true).write(true);
        options.open(self.path(CONTAINER)).unwrap()
    }
}

/// Programs with this machine's settings.
impl TestMachine {
    /// sprat with this machine's settings and no others.
    #[must_use]
    pub fn command(&self) -> Command {
        self.command_of(program::sprat())
    }

    /// Another program with the same settings.
    pub fn command_of(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", self.path("home"))
            .env("SPRAT_CONFIG_DIR", self.path("config"))
            .env("SPRAT_STATE_DIR", self.path("state"))
            .env("SPRAT_RUNTIME_DIR", self.path("run"))
            .env("SPRAT_CACHE_DIR", self.path("cache"))
            .env("SPRAT_RESERVE_BYTES", "0")
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs sprat to its end.
    pub fn sprat<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Ran {
        self.run(self.command().args(arguments))
    }

    /// The same; the exit code must be 0.
    #[track_caller]
    pub fn ok<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Ran {
        self.sprat(arguments).succeeded()
    }

    /// Runs sprat as a user who is not root.
    pub fn sprat_as_nobody(&self, arguments: &[&str]) -> Ran {
        let program = self.path("sprat");
        if !program.exists() {
            // Other users may have no access to the build folder.
            fs::copy(program::sprat(), &program).unwrap();
            for open in [self.folder.path(), &program] {
                fs::set_permissions(open, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        let mut command = self.command_of(program);
        self.run(command.args(arguments).uid(65534).gid(65534))
    }

    /// The same under a program that changes its surroundings, such as `unshare`.
    pub fn sprat_under(&self, outer: &[&str], arguments: &[&str]) -> Ran {
        let mut command = self.command_of(outer[0]);
        command.args(&outer[1..]).arg(program::sprat());
        self.run(command.args(arguments))
    }

    /// Runs a command without a controlling terminal and replaces what differs from run to run.
    pub fn run(&self, command: &mut Command) -> Ran {
        let output = command.output().unwrap();
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: self.redact(&output.stdout),
            stderr: self.redact(&output.stderr),
        }
    }

    /// Replaces the machine's folder by `[DIR]`.
    #[must_use]
    pub fn redact(&self, output: &[u8]) -> String {
        let text = String::from_utf8_lossy(output);
        text.replace(&*self.folder.path().to_string_lossy(), "[DIR]")
    }
}

impl Ran {
    /// Code, stdout and stderr in one text, for a snapshot.
    #[must_use]
    pub fn whole(&self) -> String {
        let mut text = format!("exit {}\n", self.code);
        if !self.stdout.is_empty() {
            text.push_str(&format!("--- stdout\n{}", self.stdout));
        }
        if !self.stderr.is_empty() {
            text.push_str(&format!("--- stderr\n{}", self.stderr));
        }
        text
    }

    /// The same, after a check of the code.
    #[track_caller]
    pub fn failed_with(&self, code: i32) -> String {
        assert_eq!(self.code, code, "{}", self.whole());
        self.whole()
    }

    /// The same run, after a check that the exit code is 0.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, 0, "{}", self.whole());
        self
    }

    /// stdout as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", self.whole()))
    }
}

/// A container and its source.
impl TestMachine {
    /// A machine with a container of 1 GiB, its key file, and a source folder `src` with two files.
    #[must_use]
    pub fn with_container() -> Self {
        let machine = Self::new();
        machine.init(&[CONTAINER, "--size", "1G"]);
        machine.write("src/a", "alpha\n");
        machine.write("src/sub/b", "beta\n");
        machine
    }

    /// A machine with a container of 64 MiB, its key file, and the recovery key, which is in the file
    /// `recovery` as well. The file `pass` has a passphrase to be added.
    #[must_use]
    pub fn small() -> (Self, String) {
        let machine = Self::new();
        let recovery = machine.init(&[CONTAINER, "--size", "64M"]);
        machine.write("recovery", &recovery);
        machine.write("pass", "correct horse battery");
        (machine, recovery)
    }

    /// Makes a container with a weak key derivation and returns the recovery key.
    #[track_caller]
    pub fn init(&self, arguments: &[&str]) -> String {
        let mut all = vec!["init", "--json", CHEAP];
        all.extend(arguments);
        let recovery_key = &self.ok(&all).json()["recovery_sheet"]["recovery_key"];
        recovery_key.as_str().unwrap().to_owned()
    }

    /// Backs `src` up to the container as job `home`.
    pub fn backup(&self, more: &[&str]) -> Ran {
        let mut all = vec!["backup", CONTAINER, "--name", "home", "src"];
        all.extend(more);
        self.sprat(&all)
    }

    /// Restores the latest snapshot of `home` and compares it with `src`.
    #[track_caller]
    pub fn restores_whole(&self, more: &[&str]) {
        let to = tempfile::tempdir_in(self.folder()).unwrap();
        let to_text = to.path().to_str().unwrap();
        let mut all = vec!["restore", CONTAINER, "home", "--to", to_text];
        all.extend(more);
        self.ok(&all);
        let source = self.path("src");
        let back = to.path().join(source.strip_prefix("/").unwrap());
        program::system(
            "diff",
            &["-r".as_ref(), source.as_os_str(), back.as_os_str()],
        );
    }
}

/// What runs and what is left.
impl TestMachine {
    /// The processes that sprat started with this machine's settings, by pid.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        leftovers::processes_of(&[self.folder().as_os_str().as_bytes()])
    }

    /// Kills every one of them, with -9. All are stopped before: none sees another one end.
    pub fn kill_all(&self) {
        let processes = self.processes();
        for signal in [Signal::STOP, Signal::KILL] {
            for process in &processes {
                let _ = kill_process(Pid::from_raw(process.pid).unwrap(), signal);
            }
        }
    }

    /// Waits until no process of this machine runs and none of its mounts is left.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        leftovers::assert_gone(|| self.left());
    }

    fn left(&self) -> Vec<String> {
        let own = self.folder.path().to_string_lossy().into_owned();
        let running = self.processes().into_iter();
        let mut left: Vec<String> = running
            .map(|process| format!("process {}: {}", process.pid, process.line()))
            .collect();
        // Another test may have mounted a folder with any bytes in its name.
        let mounts = fs::read("/proc/self/mounts").unwrap();
        let mounts = String::from_utf8_lossy(&mounts);
        // The test itself mounts the server's disk.
        let disk = format!(" {own}/store ");
        let of_ours = mounts.lines().filter(|line| {
            line.contains(&own) && !line.starts_with("tmpfs") && !line.contains(&disk)
        });
        left.extend(of_ours.map(str::to_owned));
        left
    }
}

/// A container's size of at least `bytes` that no other test on this machine uses. The loop device
/// is known by it.
#[must_use]
pub fn own_size(bytes: u64) -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let serial = u64::from(std::process::id()) * 8 + COUNT.fetch_add(1, Ordering::Relaxed);
    bytes + (serial % 16384) * 4096
}

/// Bytes that neither compression nor holes make smaller.
#[must_use]
pub fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    crate::tree::bytes(&mut crate::dice::Dice::new(seed), bytes)
}
