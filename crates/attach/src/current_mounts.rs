//! The present mounts of this machine, for one job of a worker.
//!
//! The worker's mount namespace is a copy. If `/` is a shared mount, what is mounted outside later
//! appears in the copy. In containers, on rescue systems and under OpenRC `/` is often not shared: then
//! the copy never changes, lacks later disks, and keeps unmounted disks busy. So each job gets a new
//! copy, and a copy keeps only the mounts that it needs.

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

/// The kernel's own file systems. Programs need them, and nobody unmounts them.
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

/// Where the system itself may be mounted. A mount anywhere else may be a user's disk.
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

/// What gives the machine its time zone. In a container of Docker or LXC one of these is often a mount.
/// Without it, days would be those of UTC.
const TIME_ZONE: [&str; 2] = ["/etc/localtime", "/usr/share/zoneinfo"];

/// The namespace that this process came from.
static OUTSIDE: OnceLock<Outside> = OnceLock::new();

#[derive(Debug)]
struct Outside {
    namespace: OwnedFd,
    /// The root folder of the process there. In a chroot it differs from the root of the namespace.
    root: OwnedFd,
    /// The mounts of the first copy.
    copied: HashSet<u32>,
}

/// Enters a new mount namespace, and remembers the one before.
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
    // If it is set already, this process has entered a copy before.
    let _ = OUTSIDE.set(Outside {
        namespace,
        root,
        copied,
    });
    Ok(())
}

/// For a new mount namespace: what is mounted here must not appear outside.
pub(crate) fn keep_mounts_inside() -> Result<(), AttachError> {
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", flags).map_err(|e| match e {
        // do_change_type in fs/namespace.c: `/` is not the root of a mount. No path leads to the root of
        // that mount, and new mounts would appear outside.
        rustix::io::Errno::INVAL => AttachError::RootNotMounted,
        e => AttachError::io("keep inside", "the mounts", e),
    })
}

/// Detaches the copied mounts that the paths `needed` don't lead through, so that an unmount outside
/// frees the disk. Does nothing in a process that is not in a copy.
pub fn keep_only(needed: &[&Path]) -> Result<(), AttachError> {
    match OUTSIDE.get() {
        Some(outside) => detach(needed, |mount| outside.copied.contains(&mount.id)),
        None => Ok(()),
    }
}

/// Runs `job` in a thread that sees the present mounts outside, as far as the paths `needed` lead to or
/// through them, and in addition the file system that is mounted at `volume` here. In a process that is
/// not in a copy, just runs `job`.
///
/// # Errors
///
/// If the kernel refuses something. Then `job` did not run.
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
            // The copy ends with the thread. The volume must be unmounted in it before, or the unmount
            // of the volume would have to wait.
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
    // The first call gives the thread its own root and working folder, as `setns` requires.
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
    let needed = needed.iter().copied().chain(TIME_ZONE.map(Path::new));
    let resolved: Vec<PathBuf> = needed.map(real).collect();
    let is_needed = |mount: &MountLine| {
        let at = &mount.mount_point;
        let leads = |path: &PathBuf| path.starts_with(at) || at.starts_with(path);
        KERNEL.iter().any(|kind| mount.kind == kind.as_bytes())
            || SYSTEM.iter().any(|system| at == Path::new(system))
            || resolved.iter().any(leads)
    };
    let mounts = read_mounts()?;
    // The inner mounts first. A mount above one that is needed stays, because the inner one would be
    // detached with it.
    for (number, mount) in mounts.iter().enumerate().rev() {
        let holds_needed = mounts.iter().enumerate().any(|(other, inner)| {
            other != number && inner.mount_point.starts_with(&mount.mount_point) && is_needed(inner)
        });
        if is_needed(mount) || holds_needed || !may_go(mount) {
            continue;
        }
        // A mount that another one hides can't be reached by a path. It ends with the namespace.
        let _ = unmount(
            &mount.mount_point,
            UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
        );
    }
    Ok(())
}

/// The real path of `path`. The last parts need not exist.
fn real(path: &Path) -> PathBuf {
    let there = path.ancestors().find_map(|at| {
        let real: io::Result<PathBuf> = fs::canonicalize(at);
        Some((real.ok()?, path.strip_prefix(at).ok()?))
    });
    there.map_or_else(|| path.to_owned(), |(real, below)| real.join(below))
}

#[cfg(test)]
mod tests {
    use sprat_testkit::{needs, requires};

    use super::*;

    /// As `docker run --volume /etc/localtime:/etc/localtime:ro` mounts it.
    #[test]
    fn mounted_time_zone_is_kept_and_a_disk_of_the_user_is_not() {
        requires!(needs::root());
        let folder = tempfile::tempdir().unwrap();
        let zone = folder.path().join("zone");
        fs::write(&zone, "TZif").unwrap();
        let disk = folder.path().to_owned();
        // The mount namespace ends with this thread.
        let seen = std::thread::spawn(move || {
            sys::unshare(UnshareFlags::NEWNS).unwrap();
            keep_mounts_inside().unwrap();
            rustix::mount::mount_bind(&zone, "/etc/localtime").unwrap();
            rustix::mount::mount_bind(&disk, "/mnt").unwrap();
            detach(&[], |_| true).unwrap();
            (
                fs::read("/etc/localtime").unwrap(),
                Path::new("/mnt/zone").exists(),
            )
        });
        assert_eq!(seen.join().unwrap(), (b"TZif".to_vec(), false));
    }
}
