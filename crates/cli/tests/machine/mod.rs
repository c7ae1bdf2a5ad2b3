//! A machine of its own for each test: folders for config, state and run-time, and sprat in it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part of it, and a test may panic"
)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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

    /// sprat with this machine's settings and no others.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sprat"));
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
