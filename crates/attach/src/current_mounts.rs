//! The mounts of this machine as they are now, for one job of a worker.
//!
//! The worker's mount namespace is a copy. Where `/` is a shared mount, what is mounted outside later
//! shows in the copy. In containers, on rescue systems and under OpenRC it is often not: there the copy
//! stays as it was made, lacks later disks, and keeps busy what is unmounted outside. So each job gets a
//! new copy, and a copy keeps only what its user needs.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::mount_table::{MountLine, read_mounts};
use crate::{AttachError, sys};

/// File systems of the kernel's own: nobody unmounts them, and programs need them.
const KERNEL: [&str; 10] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "mqueue",
];

/// Where the system itself may be mounted. What lies elsewhere is somebody's disk.
const SYSTEM: [&str; 19] = [
    "/",
    "/bin",
    "/dev",
    "/dev/shm",
    "/etc",
    "/gnu",
    "/lib",
    "/lib64",
    "/nix",
    "/nix/store",
    "/opt",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/local",
    "/var",
    "/var/tmp",
];

/// Where this process came from.
static OUTSIDE: OnceLock<Outside> = OnceLock::new();

#[derive(Debug)]
struct Outside {
    namespace: OwnedFd,
    /// The root folder there: of a process in a chroot it is not the namespace's.
    root: OwnedFd,
    /// The mounts of the first copy.
    copied: HashSet<u32>,
}

/// Enters a mount namespace of its own, and notes how to see the one before.
pub(crate) fn enter_copy() -> Result<(), AttachError> {
    let open = |path, flags| {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| AttachError::io("open", path, e))
    };
    let namespace = open("/proc/thread-self/ns/mnt", OFlags::RDONLY)?;
    let root = open("/", OFlags::PATH | OFlags::DIRECTORY)?;
    sys::unshare(UnshareFlags::NEWNS)
        .map_err(|e| AttachError::io("enter", "a new mount namespace", e))?;
    keep_mounts_inside()?;
    let copied = read_mounts()?.iter().map(|mount| mount.id).collect();
    // A second call would be of a process that has entered one already.
    let _ = OUTSIDE.set(Outside {
        namespace,
        root,
        copied,
    });
    Ok(())
}

/// In a mount namespace of its own: what is mounted here shows nowhere else.
pub(crate) fn keep_mounts_inside() -> Result<(), AttachError> {
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", flags).map_err(|e| match e {
        // do_change_type in fs/namespace.c: the path is not the root of a mount. The mount that it
        // lies in can't be named from in here, and what is mounted would show outside.
        rustix::io::Errno::INVAL => AttachError::RootNotMounted,
        e => AttachError::io("keep inside", "the mounts", e),
    })
}

/// Lets go of the copied mounts that the paths `needed` don't lead through: an unmount outside frees
/// the disk then. Does nothing in a process that is in no copy.
pub fn keep_only(needed: &[&Path]) -> Result<(), AttachError> {
    match OUTSIDE.get() {
        Some(outside) => detach(needed, |mount| outside.copied.contains(&mount.id)),
        None => Ok(()),
    }
}

/// Runs `job` in a thread that sees the mounts as they are outside at this moment, as far as the paths
/// `needed` lead to or through them, and besides the file system that is mounted at `volume` here.
/// In a process that is in no copy, `job` runs as it is.
///
/// # Errors
/// Whatever the kernel refuses; `job` didn't run then.
pub fn with_current_mounts<T: Send>(
    volume: &Path,
    needed: &[&Path],
    job: impl FnOnce() -> T + Send,
) -> Result<T, AttachError> {
    let Some(outside) = OUTSIDE.get() else {
        return Ok(job());
    };
    std::thread::scope(|scope| {
        let run = || -> Result<T, AttachError> {
            enter_fresh_copy(outside, volume, needed)?;
            let done = job();
            // The copy goes with the thread; the volume must be free before, or its unmount would wait.
            let flags = UnmountFlags::NOFOLLOW;
            if unmount(volume, flags).is_err() {
                let _ = unmount(volume, flags | UnmountFlags::DETACH);
            }
            Ok(done)
        };
        let thread = std::thread::Builder::new()
            .name("job".to_owned())
            .spawn_scoped(scope, run)
            .map_err(|e| AttachError::io("start", "a thread", e))?;
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn enter_fresh_copy(outside: &Outside, volume: &Path, needed: &[&Path]) -> Result<(), AttachError> {
    let failed = |op: &'static str| {
        move |e: rustix::io::Errno| AttachError::io(op, "the mounts of this machine", e)
    };
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, volume, clone).map_err(failed("copy"))?;
    // The first time for a root and a working folder of its own, which `setns` asks for.
    sys::unshare(UnshareFlags::NEWNS).map_err(|e| AttachError::io("copy", "the mounts", e))?;
    move_into_link_name_space(outside.namespace.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(failed("return to"))?;
    rustix::process::fchdir(&outside.root).map_err(failed("return to"))?;
    rustix::process::chroot(".").map_err(failed("return to"))?;
    sys::unshare(UnshareFlags::NEWNS).map_err(|e| AttachError::io("copy", "the mounts", e))?;
    keep_mounts_inside()?;
    let needed: Vec<&Path> = needed.iter().copied().chain([volume]).collect();
    detach(&needed, |_| true)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree.as_fd(), "", CWD, volume, flags).map_err(failed("mount the volume among"))
}

fn detach(needed: &[&Path], may_go: impl Fn(&MountLine) -> bool) -> Result<(), AttachError> {
    let resolved: Vec<PathBuf> = needed.iter().map(|path| real(path)).collect();
    let is_needed = |mount: &MountLine| {
        let at = &mount.mount_point;
        let leads = |path: &PathBuf| path.starts_with(at) || at.starts_with(path);
        KERNEL.iter().any(|kind| mount.kind == kind.as_bytes())
            || SYSTEM.iter().any(|system| at == Path::new(system))
            || resolved.iter().any(leads)
    };
    let mounts = read_mounts()?;
    // The inner ones first: what is needed below an unneeded one would be lost with it, so that stays.
    for (number, mount) in mounts.iter().enumerate().rev() {
        let holds_needed = mounts.iter().enumerate().any(|(other, inner)| {
            other != number && inner.mount_point.starts_with(&mount.mount_point) && is_needed(inner)
        });
        if is_needed(mount) || holds_needed || !may_go(mount) {
            continue;
        }
        // One that is hidden by another can't be named; it goes with the namespace.
        let _ = unmount(
            &mount.mount_point,
            UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
        );
    }
    Ok(())
}

/// The real path of what is there of `path`.
fn real(path: &Path) -> PathBuf {
    let there = path.ancestors().find_map(|at| {
        let real: io::Result<PathBuf> = fs::canonicalize(at);
        Some((real.ok()?, path.strip_prefix(at).ok()?))
    });
    there.map_or_else(|| path.to_owned(), |(real, below)| real.join(below))
}
