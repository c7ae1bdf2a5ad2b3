//! Starts a program of the user: its account, environment, process group, and output.

use std::ffi::{OsStr, OsString};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::{User, getgrouplist};
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sprat_session::child_tree::ChildTree;
use sprat_session::trusted_file::writable_by_others;
use sprat_session::{ChildIdentity, set_child_identity};

/// The search path of programs that sprat starts for the user.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Files that a program makes are for its user only.
const UMASK: u32 = 0o077;
/// How often a child is looked after where the kernel has no pidfd (before 5.3).
const CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// How much is read of what a process wrote before this returns to its other duties.
const READ_BYTES_MAX: usize = 1 << 20;

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotStarted {
    #[error("there is no such program in {}", PATH)]
    NoProgram,
    #[error("{0}")]
    WritableByOthers(String),
    #[error("there is no user {0:?}")]
    NoUser(String),
    #[error("{what}")]
    System { what: String, source: io::Error },
}

/// The end of a pipe from which output is read without waiting.
pub(crate) struct Output(Option<PipeReader>);

impl Output {
    pub(crate) fn new(pipe: PipeReader) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&pipe)?;
        rustix::fs::fcntl_setfl(&pipe, flags | OFlags::NONBLOCK)?;
        Ok(Self(Some(pipe)))
    }

    /// `None` once all writers have closed it.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// Reads what is there, without waiting.
    pub(crate) fn read_available(&mut self, mut take: impl FnMut(&[u8])) {
        let mut buffer = [0; 16 << 10];
        let mut total = 0;
        while let Some(pipe) = &mut self.0
            && total < READ_BYTES_MAX
        {
            match pipe.read(&mut buffer) {
                Ok(0) => self.0 = None,
                Ok(count) => {
                    take(&buffer[..count]);
                    total += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.0 = None,
            }
        }
    }
}

/// How long to wait for events until the next check. `seen`: the exit is an event.
pub(crate) fn patience(seen: bool, left: Option<Duration>) -> Duration {
    let longest = match seen {
        true => Duration::from_secs(60),
        false => CHECK_INTERVAL,
    };
    left.map_or(longest, |left| left.min(longest))
}

/// Starts a prepared program.
pub(crate) fn spawn(mut command: Command) -> Result<(ChildTree, Option<OwnedFd>), NotStarted> {
    let child = command.spawn().map_err(|source| NotStarted::System {
        what: "it can't be started".to_owned(),
        source,
    })?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let exited = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    Ok((ChildTree::new(child, true), exited))
}

/// A program of these words, ready to be started but for its pipes.
pub(crate) fn prepare(
    words: &[OsString],
    user: Option<&str>,
    variables: &[(&'static str, String)],
) -> Result<Command, NotStarted> {
    let program = words.first().map(OsString::as_os_str).unwrap_or_default();
    let program = find(program).ok_or(NotStarted::NoProgram)?;
    let checked = writable_by_others(&program).map_err(|source| NotStarted::System {
        what: format!("can't check who can write to {}", program.display()),
        source,
    })?;
    if let Some(why) = checked {
        return Err(NotStarted::WritableByOthers(why));
    }
    let account = account(user)?;
    let mut command = Command::new(&program);
    if let Some(name) = words.first() {
        command.arg0(name);
    }
    command
        .args(&words[1..])
        .current_dir("/")
        .process_group(0)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", &account.home)
        .env("LANG", "C.UTF-8")
        .envs(variables.iter().map(|(name, value)| (name, value)));
    set_child_identity(&mut command, UMASK, account.change_to);
    Ok(command)
}

/// Who runs a program.
struct Account {
    home: PathBuf,
    /// `None`: the user of this process.
    change_to: Option<ChildIdentity>,
}

fn account(user: Option<&str>) -> Result<Account, NotStarted> {
    let system = |errno: nix::errno::Errno| NotStarted::System {
        what: "can't read the accounts of this machine".to_owned(),
        source: errno.into(),
    };
    let Some(name) = user else {
        let me = nix::unistd::geteuid();
        let home = User::from_uid(me).ok().flatten().map(|user| user.dir);
        return Ok(Account {
            home: home.unwrap_or_else(|| PathBuf::from(if me.is_root() { "/root" } else { "/" })),
            change_to: None,
        });
    };
    let found = User::from_name(name).map_err(system)?;
    let found = found.ok_or_else(|| NotStarted::NoUser(name.to_owned()))?;
    let c_name = std::ffi::CString::new(name).map_err(|_| NotStarted::NoUser(name.to_owned()))?;
    let groups = getgrouplist(&c_name, found.gid).map_err(system)?;
    let same = found.uid == nix::unistd::geteuid();
    let identity = ChildIdentity {
        uid: found.uid.as_raw(),
        gid: found.gid.as_raw(),
        groups: groups.iter().map(|group| group.as_raw()).collect(),
    };
    Ok(Account {
        home: found.dir,
        // A process that is not root may not even set the groups that it has.
        change_to: (!same).then_some(identity),
    })
}

/// The file of a program: a path as it is, from `/`; a name is searched for in [`PATH`].
pub(crate) fn find(program: &OsStr) -> Option<PathBuf> {
    if program.is_empty() {
        return None;
    }
    if program.as_bytes().contains(&b'/') {
        return Some(Path::new("/").join(program));
    }
    std::env::split_paths(PATH)
        .map(|folder| folder.join(program))
        .find(|path| {
            rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
        })
}
