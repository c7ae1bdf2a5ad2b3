//! What a process does to itself before it serves or mounts: namespaces, death with its parent, memory.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Gid, Pid, Resource, Signal, Uid, WaitOptions};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::AttachError;
use crate::current_mounts::{self, keep_mounts_inside};
use crate::sys::{self, Fork};

/// Makes the child that `command` will start die (SIGKILL) with this process, and gives it a new
/// session, so that Ctrl-C in the terminal doesn't reach it.
///
/// The kernel ties the child to the *thread* that spawns it. Spawn it from a thread that lives as long
/// as the process, such as the main thread.
pub fn bind_to_this_process(command: &mut Command) {
    sys::bind_child(command);
}

/// Who a child is, instead of this process's user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildIdentity {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// All groups, that one too.
    pub groups: Vec<u32>,
}

/// Gives the child that `command` will start this umask and, with `identity`, another user. Only root
/// may do that; else the start fails with EPERM.
pub fn set_child_identity(command: &mut Command, umask: u32, identity: Option<ChildIdentity>) {
    let ids = identity.map(|identity| sys::ChildIds {
        uid: Uid::from_raw(identity.uid),
        gid: Gid::from_raw(identity.gid),
        groups: identity.groups.into_iter().map(Gid::from_raw).collect(),
    });
    sys::set_child_identity(command, Mode::from_raw_mode(umask), ids);
}

/// Whether a time service keeps the kernel's clock. As systemd sees it: the flag `STA_UNSYNC` alone is
/// also set by some drivers. False where the kernel does not say.
#[must_use]
pub fn clock_is_synchronised() -> bool {
    sys::clock_error_micros().is_ok_and(|error| error < 16_000_000)
}

/// From now on the calling thread's reads and writes wait for those of all others, where the disk's scheduler
/// knows priorities.
///
/// # Errors
/// The kernel refuses.
pub fn idle_io() -> io::Result<()> {
    sys::idle_io()
}

/// Asks the kernel to kill this process when its parent dies. [`bind_to_this_process`] does that without
/// a gap. This is for a process that was started without it, or that changed its credentials.
///
/// # Errors
///
/// `ParentGone` if the parent died during the call. A parent that died before can't be noticed here,
/// only by the end of the control socket.
pub fn die_with_parent() -> Result<(), AttachError> {
    die_with(rustix::process::getppid())
}

fn die_with(before: Option<Pid>) -> Result<(), AttachError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| AttachError::io("set", "the parent death signal", e))?;
    if rustix::process::getppid() == before {
        Ok(())
    } else {
        Err(AttachError::ParentGone)
    }
}

/// Moves the worker into its own pid and mount namespace. To be called first in the worker, while it has
/// one thread. Returns only in the inner process, which is pid 1 of the namespace. When it dies, all
/// processes that it started die, and the mounts end with the last of them. Its mounts are invisible
/// outside. Mounts made outside appear inside.
///
/// The outer process only waits. It ends with the exit status of the inner one (128 + n after signal n).
/// Killing the parent kills the outer process, and killing the outer process kills the inner one. Only
/// the inner process keeps the open descriptors, so the end of the control socket means its death. That
/// comes even while the last unmount waits for a volume that doesn't answer (then end the volume
/// process: nothing else frees it). `/proc` stays as it was. As pid 1 the inner process receives only
/// signals that it has a handler for, and SIGKILL and SIGSTOP from outside.
pub fn enter_private_namespaces() -> Result<(), AttachError> {
    require_one_thread("enter_private_namespaces")?;
    die_with_parent()?;
    // Fails only for a process that leads a group already, as `bind_to_this_process` made it.
    let _ = rustix::process::setsid();
    sys::unshare(UnshareFlags::NEWPID)
        .map_err(|e| AttachError::io("enter", "a new pid namespace", e))?;
    let (outer_lives, outer_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| AttachError::io("open", "a pipe", e))?;
    match sys::fork_single_threaded().map_err(|e| AttachError::io("fork", "the inner worker", e))? {
        Fork::Parent(inner) => {
            // It keeps only its end of the pipe: the control socket must end with the inner process.
            let others = open_descriptors()?
                .into_iter()
                .filter(|&number| number != outer_end.as_raw_fd());
            sys::close_for_good(&others.collect::<Vec<_>>());
            sys::exit_now(wait_for(inner))
        }
        Fork::Child => {
            drop(outer_end);
            die_with_outer(&outer_lives)?;
            // Our mounts don't appear outside. If `/` is shared, mounts and unmounts outside take effect
            // inside: otherwise sources below an automounter could not be read, and no disk could be
            // released.
            current_mounts::enter_copy()
        }
    }
}

fn open_descriptors() -> Result<Vec<RawFd>, AttachError> {
    let entries = std::fs::read_dir("/proc/self/fd")
        .map_err(|e| AttachError::io("list", "this process's open files", e))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// Ties the inner process to the outer one. In the namespace the parent's pid is 0, so the outer
/// process's end of a pipe shows whether it is alive. A dying process closes its files before its
/// children get another parent. So a process that missed the signal sees the closed pipe.
fn die_with_outer(outer_lives: &OwnedFd) -> Result<(), AttachError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| AttachError::io("set", "the parent death signal", e))?;
    let mut fds = [PollFd::new(outer_lives, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, Some(&now)) {
        Ok(0) => Ok(()),
        Ok(_) => Err(AttachError::ParentGone),
        Err(e) => Err(AttachError::io("check", "the outer worker", e)),
    }
}

fn wait_for(inner: Pid) -> i32 {
    loop {
        match rustix::process::waitpid(Some(inner), WaitOptions::empty()) {
            Ok(Some((_, status))) => {
                if let Some(code) = status.exit_status() {
                    return code;
                }
                if let Some(signal) = status.terminating_signal() {
                    return 128 + signal;
                }
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return 1,
        }
    }
}

pub(crate) fn require_one_thread(op: &'static str) -> Result<(), AttachError> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|e| AttachError::io("count", "the threads of this process", e))?
        .count();
    if threads == 1 {
        Ok(())
    } else {
        Err(AttachError::ManyThreads { op, threads })
    }
}

/// Marks this process as one that writes back data of a block device (PR_SET_IO_FLUSHER). Then its
/// memory allocations never wait for that device. This applies to this thread, to threads it starts
/// later, and to children: call it first. It needs CAP_SYS_RESOURCE, which containers often lack.
/// Without it a session works, but may stall when memory is very low.
pub fn become_io_flusher() -> Result<(), AttachError> {
    rustix::process::configure_io_flusher_behavior(true)
        .map_err(|e| AttachError::io("set", "PR_SET_IO_FLUSHER", e))
}

/// Keeps this process's memory out of swap, each page once it is used.
///
/// # Errors
///
/// Fails without CAP_IPC_LOCK unless locked memory is unlimited: with a limit, later allocations would
/// fail.
pub fn lock_memory() -> Result<(), AttachError> {
    let unlimited = rustix::process::getrlimit(Resource::Memlock)
        .current
        .is_none();
    if !unlimited && !has_capability(CapabilitySet::IPC_LOCK) {
        return Err(AttachError::NotRoot {
            op: "lock",
            object: "memory".into(),
            source: io::Error::from_raw_os_error(libc::EPERM),
        });
    }
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    rustix::mm::mlockall(flags).map_err(|e| AttachError::io("lock", "memory", e))
}

/// Makes freed memory go back to the kernel. For the volume process, to be called first: glibc otherwise
/// keeps up to 32 MiB of freed request buffers for each of 16 heaps.
pub fn return_freed_memory() {
    sys::return_freed_memory();
}

/// Protects this process's memory from other processes of the same user and from core dumps, until the
/// next exec.
pub fn hide_from_debuggers() -> Result<(), AttachError> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|e| AttachError::io("clear", "PR_SET_DUMPABLE", e))
}

/// Whether the capability is effective in this thread.
pub(crate) fn has_capability(capability: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// Checks whether new pid and mount namespaces are permitted, in a thread that ends at once.
pub(crate) fn probe_namespaces() -> Result<(), AttachError> {
    in_a_thread(|| {
        sys::unshare(UnshareFlags::NEWPID | UnshareFlags::NEWNS)
            .map_err(|e| AttachError::io("unshare", "mounts and pids", e))?;
        keep_mounts_inside()
    })
    .unwrap_or_else(|e| Err(AttachError::io("start", "a thread", e)))
}

/// Checks whether PR_SET_IO_FLUSHER is permitted, in a thread that ends at once.
pub(crate) fn probe_io_flusher() -> io::Result<()> {
    in_a_thread(|| rustix::process::configure_io_flusher_behavior(true).map_err(io::Error::from))?
}

fn in_a_thread<T: Send>(probe: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, probe)?;
        let panicked = |_| io::Error::other("the probing thread panicked");
        thread.join().map_err(panicked)
    })
}

#[cfg(test)]
mod tests {
    use sprat_testkit::{needs, requires};

    use super::*;

    #[test]
    fn thread_with_idle_io_has_the_idle_class() {
        requires!(needs::program("ionice"));
        let class = in_a_thread(|| {
            idle_io().unwrap();
            let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
            let asked = Command::new("ionice").args(["-p", &thread]).output();
            String::from_utf8(asked.unwrap().stdout)
        });
        assert_eq!(class.unwrap().unwrap().trim(), "idle");
    }

    #[test]
    fn entering_namespaces_is_refused_to_a_process_with_threads() {
        // The test runner itself has at least two.
        let refused = in_a_thread(|| require_one_thread("test"));
        assert!(refused.unwrap().is_err());
    }

    // The signal applies to the calling thread, and ends with it.

    #[test]
    fn a_parent_that_died_during_the_call_is_noticed() {
        let parent = rustix::process::getppid();
        assert!(in_a_thread(|| die_with(parent)).unwrap().is_ok());
        let other = Some(rustix::process::getpid());
        let gone = in_a_thread(|| die_with(other)).unwrap();
        assert!(matches!(gone, Err(AttachError::ParentGone)), "{gone:?}");
    }

    #[test]
    fn an_outer_process_that_died_before_the_call_is_noticed() {
        let (lives, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        assert!(in_a_thread(|| die_with_outer(&lives)).unwrap().is_ok());
        drop(end);
        let gone = in_a_thread(|| die_with_outer(&lives)).unwrap();
        assert!(matches!(gone, Err(AttachError::ParentGone)), "{gone:?}");
    }

    #[test]
    fn memory_is_locked_and_hidden() {
        requires!(needs::root());
        let locked_kib = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
            let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
            kib.parse().unwrap()
        };
        assert_eq!(locked_kib(), 0);
        lock_memory().unwrap();
        assert!(locked_kib() > 0);
        rustix::mm::munlockall().unwrap();
        // No core dumps and no debuggers.
        hide_from_debuggers().unwrap();
        assert_eq!(
            rustix::process::dumpable_behavior().unwrap(),
            DumpableBehavior::NotDumpable
        );
    }
}
