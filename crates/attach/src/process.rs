//! What a process does to itself before it serves or mounts: namespaces, death with its parent, memory.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Pid, Resource, Signal, WaitOptions};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::AttachError;
use crate::current_mounts::{self, keep_mounts_inside};
use crate::sys::{self, Fork};

/// Makes the child that `command` will start die (SIGKILL) with this process, and gives it a
/// session of its own, out of reach of the terminal's Ctrl-C.
///
/// The kernel ties the child to the *thread* that spawns it: spawn from one that lives as long as
/// the process, such as the main one.
pub fn bind_to_this_process(command: &mut Command) {
    sys::bind_child(command);
}

/// Asks the kernel to kill this process when its parent dies. [`bind_to_this_process`] does that
/// without a gap; this is for a process that was started without it, or that gave up credentials.
///
/// # Errors
/// `ParentGone` if the parent died during the call. One that died before it can't be seen here:
/// the end of the control socket tells.
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

/// Moves the worker into a pid and a mount namespace of its own. First thing in the worker, while
/// it has one thread. Returns in the inner process only, which is pid 1 of the namespace: when it
/// dies, everything it has started dies, and with the last of them the mounts. What it mounts shows
/// to nobody outside; what is mounted outside shows in here.
///
/// The outer process stays behind to wait: it ends with the inner one's exit status (128 + n after
/// signal n). Killing the parent kills the outer one, killing the outer one kills the inner one.
/// Open descriptors stay open in the inner process alone, so the end of the control socket is the
/// inner one's death; it comes even while the last unmount waits for a volume that doesn't answer
/// (end the volume process then: nothing else frees it). `/proc` stays as it was. As pid 1 the inner
/// process gets no signal that it has no handler for, save SIGKILL and SIGSTOP from outside.
pub fn enter_private_namespaces() -> Result<(), AttachError> {
    require_one_thread("enter_private_namespaces")?;
    die_with_parent()?;
    // Fails only for a process that leads a group already, which `bind_to_this_process` made so.
    let _ = rustix::process::setsid();
    sys::unshare(UnshareFlags::NEWPID)
        .map_err(|e| AttachError::io("enter", "a new pid namespace", e))?;
    let (outer_lives, outer_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| AttachError::io("open", "a pipe", e))?;
    match sys::fork_single_threaded().map_err(|e| AttachError::io("fork", "the inner worker", e))? {
        Fork::Parent(inner) => {
            // Only its end of the pipe stays: the control socket must end with the inner process.
            let others = open_descriptors()?
                .into_iter()
                .filter(|&number| number != outer_end.as_raw_fd());
            sys::close_for_good(&others.collect::<Vec<_>>());
            sys::exit_now(wait_for(inner))
        }
        Fork::Child => {
            drop(outer_end);
            die_with_outer(&outer_lives)?;
            // Ours don't show outside. What is mounted and unmounted outside still shows in here where
            // `/` is shared, or sources below an automounter couldn't be read, nor a disk be let go.
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

/// Ties the inner process to the outer one. Its parent's pid is 0 in here, so whether the outer one
/// still lives is told by its end of a pipe: a dying process closes its files before it hands its
/// children over, so whoever misses the signal sees the closed pipe.
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
        Err(e) => Err(AttachError::io("look at", "the outer worker", e)),
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

/// Tells the kernel that this process writes a block device's data back (PR_SET_IO_FLUSHER): its
/// allocations then never wait for that device. Holds for this thread and those it starts later,
/// and for children: call it first. Needs CAP_SYS_RESOURCE, which containers often lack; without
/// it the session works, but may stall when memory is very short.
pub fn become_io_flusher() -> Result<(), AttachError> {
    rustix::process::configure_io_flusher_behavior(true)
        .map_err(|e| AttachError::io("set", "PR_SET_IO_FLUSHER", e))
}

/// Keeps this process's memory out of swap, each page once it is touched. Best effort.
///
/// # Errors
/// Refuses without CAP_IPC_LOCK unless locked memory is unlimited: under a limit, later
/// allocations would fail.
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

/// Keeps this process small: what it frees goes back to the kernel. For the volume process, first
/// thing: glibc otherwise keeps up to 32 MiB of freed request buffers for each of 16 heaps.
pub fn return_freed_memory() {
    sys::return_freed_memory();
}

/// Keeps this process's memory from other processes of the same user and out of core dumps. Lasts
/// until the next exec.
pub fn hide_from_debuggers() -> Result<(), AttachError> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|e| AttachError::io("clear", "PR_SET_DUMPABLE", e))
}

/// Whether this thread has the capability in effect.
pub(crate) fn has_capability(capability: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// Whether new pid and mount namespaces may be made; tried in a thread that ends at once.
pub(crate) fn probe_namespaces() -> Result<(), AttachError> {
    in_a_thread(|| {
        sys::unshare(UnshareFlags::NEWPID | UnshareFlags::NEWNS)
            .map_err(|e| AttachError::io("unshare", "mounts and pids", e))?;
        keep_mounts_inside()
    })
    .unwrap_or_else(|e| Err(AttachError::io("start", "a thread", e)))
}

/// Whether PR_SET_IO_FLUSHER is allowed; tried in a thread that ends at once.
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
    fn entering_namespaces_is_refused_to_a_process_with_threads() {
        // The test runner itself has at least two.
        let refused = in_a_thread(|| require_one_thread("test"));
        assert!(refused.unwrap().is_err());
    }

    // The signal is set for the calling thread, and goes with it.

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
        // With core dumps and debuggers.
        hide_from_debuggers().unwrap();
        assert_eq!(
            rustix::process::dumpable_behavior().unwrap(),
            DumpableBehavior::NotDumpable
        );
    }
}
