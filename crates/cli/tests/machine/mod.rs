//! A machine of its own for each test: folders for config, state and run-time, and sprat in it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part of it, and a test may panic"
)]

pub mod copying;
pub mod remote;
pub mod served;
pub mod strikes;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Folders and settings that nothing else uses.
pub struct Machine {
    folder: TempDir,
}

/// How one run of sprat ended.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Machine {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("sprat-cli-")
            // A mount shows files to whoever can enter.
            .permissions(PermissionsExt::from_mode(0o700))
            .tempdir()
            .unwrap();
        for name in ["config", "state", "run", "home", "store"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

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

    /// Writes a file that changed an hour ago: no run lists it as young, however quick it begins.
    pub fn write_old(&self, name: &str, content: impl AsRef<[u8]>) {
        let file = fs::File::options()
            .write(true)
            .open(self.write(name, content));
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        file.unwrap().set_modified(hour_ago).unwrap();
    }

    /// sprat with this machine's settings and no others.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sprat"));
        self.settle(&mut command);
        command
    }

    /// Another program with the same settings.
    pub fn command_of(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        self.settle(&mut command);
        command
    }

    fn settle(&self, command: &mut Command) {
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
    }

    pub fn sprat<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Ran {
        self.run(self.command().args(arguments))
    }

    /// sprat as a user who is not root.
    pub fn sprat_as_nobody(&self, arguments: &[&str]) -> Ran {
        let program = self.path("sprat");
        if !program.exists() {
            // The build folder may be closed to others.
            fs::copy(env!("CARGO_BIN_EXE_sprat"), &program).unwrap();
            for open in [self.folder.path(), &program] {
                fs::set_permissions(open, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        let mut command = Command::new(program);
        self.settle(&mut command);
        self.run(command.args(arguments).uid(65534).gid(65534))
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

    fn redact(&self, output: &[u8]) -> String {
        let text = String::from_utf8_lossy(output);
        text.replace(&*self.folder.path().to_string_lossy(), "[DIR]")
    }
}

impl Ran {
    /// Code, stdout and stderr in one text, for a snapshot.
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

    /// The same, after having seen the code.
    #[track_caller]
    pub fn failed_with(&self, code: i32) -> String {
        assert_eq!(self.code, code, "{}", self.whole());
        self.whole()
    }
}

/// Bytes that no compression or sparse file makes small.
pub fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut noise = Vec::with_capacity(bytes);
    while noise.len() < bytes {
        // xorshift64: Marsaglia, "Xorshift RNGs".
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise
}

/// The container that most tests use, as an argument.
pub const CONTAINER: &str = "store/x.luks";

/// A container of 1 GiB with a key file, and a source folder `src` with two files.
impl Machine {
    pub fn with_container() -> Self {
        let machine = Self::new();
        machine.init(&[CONTAINER, "--size", "1G"]);
        machine.write("src/a", "alpha\n");
        machine.write("src/sub/b", "beta\n");
        machine
    }

    /// Makes a container with a weak key derivation and returns the recovery key.
    #[track_caller]
    pub fn init(&self, arguments: &[&str]) -> String {
        let mut all = vec!["init", "--json", "--cheap-kdf-for-tests"];
        all.extend(arguments);
        let ran = self.sprat(&all);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        let said = ran.json();
        said["recovery_sheet"]["recovery_key"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// The container as it lies on the disk, to be harmed.
    pub fn container_file(&self) -> fs::File {
        let mut options = fs::File::options();
        options.read(true).write(true);
        options.open(self.path(CONTAINER)).unwrap()
    }

    /// Backs `src` up as job `home`, into the container.
    pub fn backup(&self, more: &[&str]) -> Ran {
        let mut all = vec!["backup", CONTAINER, "--name", "home", "src"];
        all.extend(more);
        self.sprat(&all)
    }

    /// Everything that the container can tell still comes back as it is in `src`.
    #[track_caller]
    pub fn restores_whole(&self, more: &[&str]) {
        let to = tempfile::tempdir_in(self.folder()).unwrap();
        let to_text = to.path().to_str().unwrap();
        let mut all = vec!["restore", CONTAINER, "home", "--to", to_text];
        all.extend(more);
        let ran = self.sprat(&all);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        let back = to.path().join(self.path("src").strip_prefix("/").unwrap());
        let compared = Command::new("diff")
            .arg("-r")
            .arg(self.path("src"))
            .arg(back)
            .output();
        let compared = compared.unwrap();
        assert!(
            compared.status.success(),
            "{}",
            String::from_utf8_lossy(&compared.stdout)
        );
    }

    /// sprat under a program that changes its surroundings, such as `unshare`.
    pub fn sprat_under(&self, outer: &[&str], arguments: &[&str]) -> Ran {
        let mut command = Command::new(outer[0]);
        command
            .args(&outer[1..])
            .arg(env!("CARGO_BIN_EXE_sprat"))
            .args(arguments);
        self.settle(&mut command);
        self.run(&mut command)
    }
}

/// A small file system of its own, unmounted on drop.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one of `megabytes` on `folder`.
    pub fn mount(folder: &Path, megabytes: u32) -> Self {
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(folder)
            .status()
            .unwrap();
        assert!(done.success());
        Self(folder.to_owned())
    }

    /// Changes its mount options.
    pub fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let done = Command::new("mount")
            .args(["-o", &options])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(done.success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

impl Machine {
    /// Nothing of this machine's runs, is mounted or looped any more; waits some seconds for it.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < until, "left: {left:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Processes that were started with this machine's settings, each with its command line.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let own = self.folder.path().to_string_lossy().into_owned();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            if pid != std::process::id() && String::from_utf8_lossy(&environ).contains(&own) {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                if !line.is_empty() {
                    found.push((pid, line));
                }
            }
        }
        found
    }

    /// Kills every one of them, with -9.
    pub fn kill_all(&self) {
        for (pid, _) in self.processes() {
            let pid = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            let _ = rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL);
        }
    }

    fn left(&self) -> Vec<String> {
        let own = self.folder.path().to_string_lossy().into_owned();
        let processes = self.processes().into_iter();
        let mut left: Vec<String> = processes
            .map(|(pid, line)| format!("process {pid}: {line}"))
            .collect();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        // The server's disk is the test's own.
        let disk = format!(" {own}/store ");
        let of_ours = mounts.lines().filter(|line| {
            line.contains(&own) && !line.starts_with("tmpfs") && !line.contains(&disk)
        });
        left.extend(of_ours.map(str::to_owned));
        left
    }
}

impl Ran {
    /// stdout as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", self.whole()))
    }
}
