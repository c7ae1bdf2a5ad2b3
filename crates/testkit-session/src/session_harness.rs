//! Sessions by the library, with a container in a folder or behind a real sshd, and the search for
//! what a session left behind.

#![allow(clippy::unwrap_used, reason = "a failing test kit panics")]

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sprat_luks::{Secret, SlotKind};
use sprat_session as session;
use sprat_session::address::Target;
use sprat_session::interrupt::Interrupt;
use sprat_session::{
    Access, ClosedReport, CreateOptions, Created, Exit, Failure, FileSystemKind, IdentityPolicy,
    Notice, Observer, Phase, Session, SessionProgress, SessionSettings,
};
use sprat_snapshot::{JobName, RestoreSpec, SnapshotReport, SnapshotSpec};
use sprat_testkit::client_and_server::HEADER_BYTES;
use sprat_testkit::dice::Dice;
use sprat_testkit::leftovers;
use sprat_testkit::machine::{TestMachine, own_size};
use sprat_testkit::needs;
use sprat_testkit::program::{self, system};
use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, openssh};
use sprat_testkit::tree::bytes;

/// What is missing for a session here.
#[must_use]
pub fn missing() -> Option<String> {
    let programs = ["mkfs.ext4", "e2fsck", "rsync"];
    needs::root()
        .or_else(|| programs.into_iter().find_map(needs::program))
        .or_else(needs::devices)
}

/// What is missing for a session on a server.
#[must_use]
pub fn ssh_missing() -> Option<String> {
    missing().or_else(openssh::missing)
}

/// A machine with a source and a key, and a server's folder `store`.
#[derive(Debug)]
pub struct SessionHarness {
    machine: TestMachine,
    /// None where the container is a local file.
    sshd: Option<SshServer>,
    /// The container's length. No other test has the same: it identifies the loop device.
    pub size_bytes: u64,
    /// The key that opens the container.
    pub secret: Secret,
}

/// Folders and options.
impl SessionHarness {
    /// A container in a local folder.
    #[must_use]
    pub fn local() -> Self {
        Self::new(None)
    }

    /// A container behind sshd.
    ///
    /// # Panics
    /// When the server does not come up; check [`ssh_missing`] first.
    #[must_use]
    pub fn ssh() -> Self {
        Self::ssh_with(&OpenSshOptions::default())
    }

    /// The same with another sshd.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn ssh_with(options: &OpenSshOptions) -> Self {
        Self::new(Some(options))
    }

    fn new(options: Option<&OpenSshOptions>) -> Self {
        let machine = TestMachine::new();
        let store = machine.path("store");
        let sshd = options.map(|options| SshServer::start_with(&options.clone().serving(&store)));
        for name in ["source", "out", "mnt"] {
            fs::create_dir(machine.path(name)).unwrap();
        }
        // Its processes are found by their environment.
        let program = format!(
            "#!/bin/sh\nSPRAT_TEST_MACHINE={} exec {} \"$@\"\n",
            machine.folder().display(),
            program::sprat().display()
        );
        fs::set_permissions(
            machine.write("sprat", program),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        Self {
            machine,
            sshd,
            size_bytes: own_size(256 << 20),
            secret: Secret::key_file(b"a key of no worth".repeat(16)),
        }
    }

    /// A file or folder of this machine.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.machine.path(name)
    }

    /// The container's file on the server.
    #[must_use]
    pub fn container(&self) -> PathBuf {
        self.path("store/x.luks")
    }

    /// The same file, open for reading and writing.
    #[must_use]
    pub fn container_file(&self) -> fs::File {
        self.machine.container_file()
    }

    /// The container's address.
    #[must_use]
    pub fn target(&self) -> Target {
        let path = self.container();
        let text = match &self.sshd {
            None => path.display().to_string(),
            Some(_) => format!("ssh://some.host{}", path.display()),
        };
        Target::parse(&text, Path::new("/")).unwrap()
    }

    /// The server.
    ///
    /// # Panics
    /// Where the container is local.
    pub fn sshd(&mut self) -> &mut SshServer {
        self.sshd.as_mut().expect("a harness with sshd")
    }

    /// Options for a session, with a short quiet time.
    #[must_use]
    pub fn options(&self, access: Access) -> SessionSettings {
        let mut options =
            SessionSettings::new(self.target(), access, self.path("state"), self.path("run"));
        options.program = self.path("sprat");
        options.quiet_time = Duration::from_millis(500);
        if let Some(sshd) = &self.sshd {
            options.ssh.command = sshd.ssh_command();
        }
        options
    }

    /// Options for [`session::create`].
    #[must_use]
    pub fn create_options(&self) -> CreateOptions {
        CreateOptions {
            file_system: FileSystemKind::DEFAULT,
            settings: self.options(Access::ReadWrite),
            size_bytes: self.size_bytes,
            secrets: vec![(self.secret.clone(), SlotKind::KeyFile)],
            uuid: None,
            inodes: None,
            label: Some("harness".to_owned()),
            fast_kdf_for_tests: true,
        }
    }

    /// A snapshot of `source` as [`job`].
    #[must_use]
    pub fn spec(&self) -> SnapshotSpec {
        SnapshotSpec::new(job(), vec![self.path("source")])
    }

    /// The same with a slow rsync, for what has to happen while it copies.
    #[must_use]
    pub fn slow_spec(&self) -> SnapshotSpec {
        let rsync = self.path("slow-rsync");
        fs::write(&rsync, "#!/bin/sh\nexec rsync --bwlimit=4m \"$@\"\n").unwrap();
        fs::set_permissions(&rsync, fs::Permissions::from_mode(0o755)).unwrap();
        let mut spec = self.spec();
        spec.rsync = rsync;
        spec
    }
}

/// Whole runs.
impl SessionHarness {
    /// Makes the container.
    pub fn create(&self) -> Created {
        session::create(self.create_options(), &mut Observed::default(), &never()).unwrap()
    }

    /// Opens a session.
    pub fn open(&self, access: Access) -> Result<Session, Failure> {
        Session::open(
            self.options(access),
            &self.secret,
            &mut Observed::default(),
            &never(),
        )
    }

    /// One whole backup run.
    pub fn backup(&self) -> Result<(SnapshotReport, ClosedReport), Failure> {
        let mut session = self.open(Access::ReadWrite)?;
        let report = session.take_snapshot(self.spec(), &mut Observed::default(), &never());
        let closed = session.close(&mut Observed::default(), &never())?;
        Ok((report?, closed))
    }

    /// Restores the latest snapshot and compares it with the source.
    ///
    /// # Panics
    /// When they differ.
    pub fn restore_and_compare(&self) {
        let out = self.path("out");
        let _ = fs::remove_dir_all(&out);
        let mut session = self.open(Access::ReadOnly).unwrap();
        let spec = RestoreSpec::new(job(), out.clone());
        let restored = session.restore(spec, &mut Observed::default(), &never());
        restored.unwrap();
        let closed = session.close(&mut Observed::default(), &never());
        closed.unwrap();
        let source = self.path("source");
        let restored = out.join(source.strip_prefix("/").unwrap());
        let folders = [source, restored].map(|folder| format!("{}/", folder.display()));
        let options = ["-aHAXS", "--checksum", "--dry-run", "--itemize-changes"];
        let words = [&options[..], &["--delete", &folders[0], &folders[1]]].concat();
        assert_eq!(system("rsync", &words), "");
    }

    /// Checks that e2fsck finds nothing; it writes nothing to the volume.
    ///
    /// # Panics
    /// With what it found.
    pub fn assert_clean(&self) {
        let check = session::check_file_system(
            self.options(Access::ReadOnly),
            &self.secret,
            &mut Observed::default(),
            &never(),
        )
        .unwrap();
        assert!(check.clean, "{}", check.output);
    }

    /// `sprat` as a process, with the settings and the key of this machine.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let key = self.path("key");
        if !key.exists() {
            self.machine.write("key", self.secret.expose());
        }
        let mut command = self.machine.command_of(self.path("sprat"));
        command
            .arg("--key-file")
            .arg(key)
            .args(["--quiet-time", "1", "--reconnect-max", "30"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(sshd) = &self.sshd {
            let words: Vec<_> = sshd
                .ssh_command()
                .iter()
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            command.args(["--ssh-command", &words.join(" ")]);
        }
        command.args(arguments);
        command
    }
}

/// What runs and what is left.
impl SessionHarness {
    /// The machine's folder, and ssh's configuration: ssh itself names only that.
    fn markers(&self) -> Vec<Vec<u8>> {
        let config = self.sshd.iter().map(|sshd| sshd.path("ssh_config"));
        let paths = config.chain([self.machine.folder().to_owned()]);
        paths
            .map(|path| path.as_os_str().as_bytes().to_vec())
            .collect()
    }

    /// Processes of this machine's sessions: pid, and the role of each.
    #[must_use]
    pub fn processes(&self) -> Vec<(i32, String)> {
        let markers = self.markers();
        let markers: Vec<&[u8]> = markers.iter().map(Vec::as_slice).collect();
        let role = |words: &[String]| {
            let has = |name: &str| {
                let path = format!("/{name}");
                words
                    .iter()
                    .any(|word| word == name || word.ends_with(&path))
            };
            let roles = [
                "volume-process",
                "worker",
                "mount-keeper",
                "backup",
                "init",
                "mount",
                "rsync",
            ];
            // `rsync --version` only asks whether it is there.
            let role = roles
                .into_iter()
                .find(|role| has(role) && !has("--version"));
            role.unwrap_or(if has("sftp") { "ssh" } else { "other" })
        };
        let found = leftovers::processes_of(&markers).into_iter();
        found
            .map(|process| (process.pid, role(&process.words).to_owned()))
            .collect()
    }

    fn remains(&self) -> Vec<String> {
        let markers = self.markers();
        let markers: Vec<&[u8]> = markers.iter().map(Vec::as_slice).collect();
        // The volume is the container without its header.
        leftovers::of(&markers, self.size_bytes / 4096 * 4096 - HEADER_BYTES)
    }

    /// Waits until nothing of this machine runs, is mounted or looped.
    #[track_caller]
    pub fn assert_nothing_remains(&self) {
        leftovers::assert_gone(|| self.remains());
    }

    /// As [`Self::assert_nothing_remains`], where the server's folder is itself a mount.
    #[track_caller]
    pub fn assert_nothing_remains_but_store(&self) {
        leftovers::assert_gone(|| {
            let mut remains = self.remains();
            remains.retain(|what| !what.starts_with("mount"));
            remains
        });
    }

    /// Kills every process with one of `roles`, with -9, in that order and as close together as
    /// possible. Returns how many there were.
    pub fn kill(&self, roles: &[&str]) -> usize {
        self.signal(roles, Signal::KILL)
    }

    /// As [`Self::kill`], with another signal.
    pub fn signal(&self, roles: &[&str], signal: Signal) -> usize {
        let processes = self.processes();
        let mut killed = 0;
        for role in roles {
            for (pid, _) in processes.iter().filter(|(_, its)| its == role) {
                let _ = Pid::from_raw(*pid).map(|pid| kill_process(pid, signal));
                killed += 1;
            }
        }
        killed
    }

    /// Bytes that the container's file takes on the server's disk.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        allocated(&self.container())
    }

    /// Calls `act` on another thread once `more` bytes have reached the container's file.
    pub fn once_written(&self, more: u64, act: impl FnOnce() + Send + 'static) {
        let container = self.container();
        let until = allocated(&container) + more;
        std::thread::spawn(move || {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(60) {
                if allocated(&container) >= until {
                    return act();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    /// Names in the server's folder.
    #[must_use]
    pub fn server_files(&self) -> Vec<String> {
        sprat_testkit::leases::names_but_free(&self.path("store"))
    }
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}

/// Kills one process, with -9.
pub fn kill(pid: i32) {
    let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
}

/// The job of all snapshots.
#[must_use]
pub fn job() -> JobName {
    JobName::new("docs").unwrap()
}

/// No interruption.
#[must_use]
pub fn never() -> Interrupt {
    Interrupt::never().unwrap()
}

/// What is done at each progress.
type OnProgress = Box<dyn FnMut(&SessionProgress)>;

/// An observer that keeps what it was shown.
#[derive(Default)]
pub struct Observed {
    /// Each phase.
    pub phases: Vec<Phase>,
    /// Each notice.
    pub notices: Vec<Notice>,
    /// The newest progress.
    pub progress: Option<SessionProgress>,
    /// Called at each progress.
    pub on_progress: Option<OnProgress>,
    /// Called at each phase.
    pub on_phase: Option<Box<dyn FnMut(Phase)>>,
}

impl Observer for Observed {
    fn phase(&mut self, phase: Phase) {
        self.phases.push(phase);
        if let Some(call) = &mut self.on_phase {
            call(phase);
        }
    }

    fn progress(&mut self, progress: &SessionProgress) {
        if let Some(call) = &mut self.on_progress {
            call(progress);
        }
        self.progress = Some(progress.clone());
    }

    fn notice(&mut self, notice: Notice) {
        self.notices.push(notice);
    }
}

/// Pins the identity of `created`.
#[must_use]
pub fn known(mut options: SessionSettings, created: &Created) -> SessionSettings {
    options.pins = IdentityPolicy::Known(created.facts.pins.clone());
    options
}

/// Fills `dir` with `files` files of `len` bytes that don't compress.
///
/// # Panics
/// When a file can't be written.
pub fn fill(dir: &Path, files: usize, len: usize, seed: u64) {
    let dice = &mut Dice::new(seed);
    for index in 0..files {
        let folder = dir.join(format!("d{}", index % 7));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("f{index}")), bytes(dice, len)).unwrap();
    }
}

/// Checks that `result` is a failure with the exit code `exit`.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn assert_exit<T: std::fmt::Debug>(result: Result<T, Failure>, exit: Exit) -> Failure {
    let failure = result.expect_err("must fail");
    assert_eq!(failure.exit, exit, "{failure:?}");
    failure
}
