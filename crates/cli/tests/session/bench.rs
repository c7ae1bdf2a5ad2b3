//! What the session tests share: a container in a folder or behind a real sshd, and the search
//! for what a session left behind.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test binary uses a part of it"
)]

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sprat::{Exit, Failure};
use sprat_luks::{Secret, SlotKind};
use sprat_session as session;
use sprat_session::address::Target;
use sprat_session::interrupt::Interrupt;
use sprat_session::{
    Access, ClosedReport, CreateOptions, Created, IdentityPolicy, Notice, Observer, Phase, Session,
    SessionOptions, SessionProgress,
};
use sprat_snapshot::{JobName, RestoreSpec, SnapshotReport, SnapshotSpec};
pub use sprat_testkit::leftovers::contains;
use sprat_testkit::leftovers::{loops_of, mounts_of, parent};
use sprat_testkit::needs;
use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, openssh};
use tempfile::TempDir;

/// What is missing for a session here.
pub fn missing() -> Option<String> {
    needs::root()
        .or_else(|| {
            ["mkfs.ext4", "e2fsck", "rsync"]
                .into_iter()
                .find_map(needs::program)
        })
        .or_else(|| {
            ["/dev/fuse", "/dev/loop-control"]
                .into_iter()
                .find(|path| !Path::new(path).exists())
                .map(|path| format!("{path} is not there"))
        })
}

pub fn ssh_missing() -> Option<String> {
    missing().or_else(openssh::missing)
}

/// Where the container is.
pub enum Server {
    Local,
    Ssh(Box<SshServer>),
}

/// A machine's state, a server's folder, a source, and a key.
pub struct Bench {
    pub folder: TempDir,
    pub server: Server,
    pub size_bytes: u64,
    pub secret: Secret,
}

impl Bench {
    pub fn local() -> Self {
        Self::new(Server::Local)
    }

    pub fn ssh() -> Self {
        Self::ssh_with(&OpenSshOptions::default())
    }

    pub fn ssh_with(options: &OpenSshOptions) -> Self {
        Self::new(Server::Ssh(Box::new(SshServer::start_with(options))))
    }

    fn new(server: Server) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // A length like no other's, by which its loop device is known.
        let serial = u64::from(std::process::id()) * 8 + COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = tempfile::Builder::new()
            .prefix("sprat-session-")
            // A mount shows files to whoever can enter.
            .permissions(PermissionsExt::from_mode(0o700))
            .tempdir()
            .unwrap();
        for name in ["state", "run", "store", "source", "out", "mnt"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        // The name by which its processes are known.
        let program = folder.path().join("sprat");
        std::os::unix::fs::symlink(sprat_testkit::program::sprat(), program).unwrap();
        Self {
            folder,
            server,
            size_bytes: (256 << 20) + (serial % 16384) * 4096,
            secret: Secret::key_file(b"a key of no worth".repeat(16)),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The container file as it lies on the server.
    pub fn container(&self) -> PathBuf {
        self.path("store/x.luks")
    }

    pub fn target(&self) -> Target {
        let path = self.container();
        let text = match &self.server {
            Server::Local => path.display().to_string(),
            Server::Ssh(_) => format!("ssh://some.host{}", path.display()),
        };
        Target::parse(&text, Path::new("/")).unwrap()
    }

    pub fn sshd(&mut self) -> &mut SshServer {
        match &mut self.server {
            Server::Ssh(sshd) => sshd,
            Server::Local => panic!("this bench has no sshd"),
        }
    }

    pub fn options(&self, access: Access) -> SessionOptions {
        let mut options =
            SessionOptions::new(self.target(), access, self.path("state"), self.path("run"));
        options.program = self.path("sprat");
        options.quiet_time = Duration::from_millis(500);
        if let Server::Ssh(sshd) = &self.server {
            options.ssh_command = sshd.ssh_command();
        }
        options
    }

    pub fn create_options(&self) -> CreateOptions {
        CreateOptions {
            session: self.options(Access::ReadWrite),
            size_bytes: self.size_bytes,
            secrets: vec![(self.secret.clone(), SlotKind::KeyFile)],
            uuid: None,
            inodes: None,
            label: Some("bench".to_owned()),
            fast_kdf_for_tests: true,
        }
    }

    pub fn create(&self) -> Created {
        session::create(self.create_options(), &mut Seen::default(), &never()).unwrap()
    }

    pub fn open(&self, access: Access) -> Result<Session, Failure> {
        Session::open(
            self.options(access),
            &self.secret,
            &mut Seen::default(),
            &never(),
        )
    }

    pub fn spec(&self) -> SnapshotSpec {
        SnapshotSpec::new(job(), vec![self.path("source")])
    }

    /// The same with an rsync that takes its time, for what has to happen while it copies.
    pub fn slow_spec(&self) -> SnapshotSpec {
        let rsync = self.path("slow-rsync");
        fs::write(&rsync, "#!/bin/sh\nexec rsync --bwlimit=4m \"$@\"\n").unwrap();
        fs::set_permissions(&rsync, fs::Permissions::from_mode(0o755)).unwrap();
        let mut spec = self.spec();
        spec.rsync = rsync;
        spec
    }

    /// One whole backup run.
    pub fn backup(&self) -> Result<(SnapshotReport, ClosedReport), Failure> {
        let mut session = self.open(Access::ReadWrite)?;
        let report = session.take_snapshot(self.spec(), &mut Seen::default(), &never());
        let closed = session.close(&mut Seen::default(), &never())?;
        Ok((report?, closed))
    }

    /// Brings the latest snapshot back and compares it with the source.
    pub fn restore_and_compare(&self) {
        let out = self.path("out");
        let _ = fs::remove_dir_all(&out);
        let mut session = self.open(Access::ReadOnly).unwrap();
        session
            .restore(
                RestoreSpec::new(job(), out.clone()),
                &mut Seen::default(),
                &never(),
            )
            .unwrap();
        session.close(&mut Seen::default(), &never()).unwrap();
        let source = self.path("source");
        let restored = out.join(source.strip_prefix("/").unwrap());
        let differences = Command::new("rsync")
            .args([
                "-aHAXS",
                "--checksum",
                "--dry-run",
                "--itemize-changes",
                "--delete",
            ])
            .arg(format!("{}/", source.display()))
            .arg(format!("{}/", restored.display()))
            .output()
            .unwrap();
        assert!(differences.status.success(), "{differences:?}");
        assert_eq!(String::from_utf8_lossy(&differences.stdout), "");
    }

    /// e2fsck's word on the volume, looked at without writing to it.
    pub fn assert_clean(&self) {
        let check = session::check_file_system(
            self.options(Access::ReadOnly),
            &self.secret,
            &mut Seen::default(),
            &never(),
        )
        .unwrap();
        assert!(check.clean, "{}", check.output);
    }

    /// `sprat` as a process of its own, told where everything of this bench is.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let key = self.path("key");
        if !key.exists() {
            fs::write(&key, self.secret.expose()).unwrap();
            fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let mut command = Command::new(self.path("sprat"));
        command
            .env("SPRAT_STATE_DIR", self.path("state"))
            .env("SPRAT_RUNTIME_DIR", self.path("run"))
            .env("SPRAT_CACHE_DIR", self.path("cache"))
            .env("SPRAT_RESERVE_BYTES", "0")
            .env("XDG_CONFIG_HOME", self.path("config"))
            .arg("--key-file")
            .arg(key)
            .args(["--quiet-time", "1", "--reconnect-max", "30"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Server::Ssh(sshd) = &self.server {
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

    /// Processes of this bench's sessions: pid, and what each is there for.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let tag = self.folder.path().as_os_str().as_bytes();
        let mut found: Vec<(i32, String)> = Vec::new();
        let mut pids: Vec<i32> = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
            .filter(|pid| u32::try_from(*pid) != Ok(std::process::id()))
            .collect();
        pids.sort_unstable();
        for pid in pids {
            let of = Path::new("/proc").join(pid.to_string());
            let command = fs::read(of.join("cmdline")).unwrap_or_default();
            let environment = fs::read(of.join("environ")).unwrap_or_default();
            let of_ssh = matches!(&self.server, Server::Ssh(sshd)
                if contains(&command, sshd.path("ssh_config").as_os_str().as_bytes()));
            // rsync is told neither by its arguments nor by its environment.
            let child = found.iter().any(|(known, _)| Some(*known) == parent(pid));
            if !of_ssh && !child && !contains(&command, tag) && !contains(&environment, tag) {
                continue;
            }
            let has = |word: &str| {
                let path = format!("/{word}");
                command
                    .split(|b| *b == 0)
                    .any(|w| w == word.as_bytes() || w.ends_with(path.as_bytes()))
            };
            let role = [
                "volume-process",
                "worker",
                "mount-keeper",
                "backup",
                "init",
                "mount",
                "rsync",
            ]
            .into_iter()
            // `rsync --version` only asks whether it is there.
            .find(|role| has(role) && !has("--version"))
            .unwrap_or(if has("sftp") { "ssh" } else { "other" });
            found.push((pid, role.to_owned()));
        }
        found
    }

    fn remains(&self) -> Vec<String> {
        let tag = self.folder.path().as_os_str().as_bytes();
        let mut remains: Vec<String> = self
            .processes()
            .into_iter()
            .map(|(pid, role)| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                let state = stat.rsplit(") ").next().unwrap_or("?").chars().next();
                format!("{role} {pid} in state {state:?}")
            })
            .collect();
        remains.extend(mounts_of(tag));
        // The volume is the container without its header.
        remains.extend(loops_of(self.size_bytes / 4096 * 4096 - (16 << 20)));
        remains
    }

    pub fn assert_nothing_remains(&self) {
        let begun = Instant::now();
        loop {
            let remains = self.remains();
            if remains.is_empty() {
                return;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(15),
                "after 15 s there is still {remains:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As [`Self::assert_nothing_remains`], where the server's folder is itself a mount.
    pub fn assert_nothing_remains_but_store(&self) {
        let store = self.path("store");
        let begun = Instant::now();
        while self.remains().iter().any(|what| !what.starts_with("mount")) {
            assert!(
                begun.elapsed() < Duration::from_secs(15),
                "besides {}: {:?}",
                store.display(),
                self.remains()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills every process of this bench that has one of `roles`, with -9, as near to one another
    /// as can be, in that order.
    pub fn kill(&self, roles: &[&str]) -> usize {
        self.signal(roles, rustix::process::Signal::KILL)
    }

    /// As [`Self::kill`], with another signal.
    pub fn signal(&self, roles: &[&str], signal: rustix::process::Signal) -> usize {
        let processes = self.processes();
        let mut killed = 0;
        for role in roles {
            for (pid, _) in processes.iter().filter(|(_, its)| its == role) {
                if let Some(pid) = rustix::process::Pid::from_raw(*pid) {
                    let _ = rustix::process::kill_process(pid, signal);
                }
                killed += 1;
            }
        }
        killed
    }

    /// Bytes that the container's file takes on the server's disk.
    pub fn allocated(&self) -> u64 {
        allocated(&self.container())
    }

    /// Calls `act` on a thread of its own once `more` bytes have reached the container's file.
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
    pub fn server_files(&self) -> Vec<String> {
        sprat_testkit::leases::names_but_free(&self.path("store"))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // A failed test leaves no mount behind for the next one.
        let dir = self.path("mnt");
        let _ = sprat_attach::unmount_dead(&dir);
    }
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}

pub fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

pub fn job() -> JobName {
    JobName::new("docs").unwrap()
}

pub fn never() -> Interrupt {
    Interrupt::never().unwrap()
}

/// What is done at each progress.
type OnProgress = Box<dyn FnMut(&SessionProgress)>;

/// An observer that remembers.
#[derive(Default)]
pub struct Seen {
    pub phases: Vec<Phase>,
    pub notices: Vec<Notice>,
    pub progress: Option<SessionProgress>,
    /// Called at each progress.
    pub on_progress: Option<OnProgress>,
    /// Called at each phase.
    pub on_phase: Option<Box<dyn FnMut(Phase)>>,
}

impl Observer for Seen {
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

/// Pins what `created` is.
pub fn known(mut options: SessionOptions, created: &Created) -> SessionOptions {
    options.pins = IdentityPolicy::Known(created.facts.pins.clone());
    options
}

/// Fills `dir` with `files` files of about `bytes` bytes that nothing compresses or guesses.
pub fn fill(dir: &Path, files: usize, bytes: usize, seed: u64) {
    let mut state = seed | 1;
    let mut random = || {
        // xorshift64*: Marsaglia, "Xorshift RNGs".
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    };
    for index in 0..files {
        let folder = dir.join(format!("d{}", index % 7));
        fs::create_dir_all(&folder).unwrap();
        let mut content = Vec::with_capacity(bytes + 8);
        while content.len() < bytes {
            content.extend_from_slice(&random().to_le_bytes());
        }
        fs::write(folder.join(format!("f{index}")), content).unwrap();
    }
}

pub fn assert_exit<T: std::fmt::Debug>(result: Result<T, Failure>, exit: Exit) -> Failure {
    let failure = result.expect_err("must fail");
    assert_eq!(failure.exit, exit, "{failure:?}");
    failure
}
