//! The FUSE file: opens `/dev/fuse`, mounts it without a path, and opens the one file in it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::AttachError;

/// The file's name in its file system; `losetup` shows it.
pub(crate) const FILE_NAME: &str = "sprat-volume";

/// The largest read or write in one request: 256 pages, the kernel's own limit
/// (`fs.fuse.max_pages_limit`).
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Major and minor number of the FUSE device (`MISC_MAJOR` and `FUSE_MINOR` in the kernel).
const FUSE_DEVICE: (u32, u32) = (10, 229);

/// Opens `/dev/fuse`, close-on-exec. The process that serves must become its only owner: the connection
/// ends when the last copy is closed.
pub fn open_fuse() -> Result<OwnedFd, AttachError> {
    let no_fuse = |reason, errno: Errno| AttachError::NoFuse {
        reason,
        source: errno.into(),
    };
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let device = rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(|errno| {
        let reason = match errno {
            Errno::NOENT => "/dev/fuse doesn't exist",
            Errno::NODEV | Errno::NXIO => "the kernel has no FUSE",
            Errno::PERM | Errno::ACCESS => "this user or container may not open /dev/fuse",
            _ => "/dev/fuse can't be opened",
        };
        no_fuse(reason, errno)
    })?;
    // A sandbox may put another device in its place, such as /dev/null.
    let kind = rustix::fs::fstat(&device)
        .map_err(|errno| no_fuse("/dev/fuse can't be examined", errno))?
        .st_rdev;
    if (rustix::fs::major(kind), rustix::fs::minor(kind)) != FUSE_DEVICE {
        return Err(no_fuse("/dev/fuse is another device", Errno::NODEV));
    }
    Ok(device)
}

/// A FUSE mount that no path leads to. It ends when this and all files opened through it are closed. No
/// other namespace, `umount -a` or backup sees it.
#[derive(Debug)]
pub(crate) struct DetachedMount(OwnedFd);

impl DetachedMount {
    /// Mounts over `fuse` without waiting for its server.
    pub(crate) fn new(fuse: BorrowedFd<'_>) -> Result<Self, AttachError> {
        let mount = mount_detached(fuse).map_err(|(op, e)| match e {
            Errno::NODEV => AttachError::NoFuse {
                reason: "the kernel has no FUSE",
                source: e.into(),
            },
            Errno::NOSYS => AttachError::NoFuse {
                reason: "the kernel (or a container's filter) has no fsopen; Linux 5.8 is needed",
                source: e.into(),
            },
            _ => AttachError::io(op, "the FUSE file system", e),
        })?;
        Ok(Self(mount))
    }

    /// Opens the file for reading and writing with direct I/O. Waits for the server.
    pub(crate) fn open_file(&self) -> Result<OwnedFd, AttachError> {
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        loop {
            match rustix::fs::openat(&self.0, FILE_NAME, flags, Mode::empty()) {
                Ok(file) => return Ok(file),
                Err(Errno::INTR) => {}
                Err(e @ (Errno::NOTCONN | Errno::CONNABORTED | Errno::CONNREFUSED)) => {
                    return Err(AttachError::ServerGone { source: e.into() });
                }
                Err(e) => return Err(AttachError::io("open", "the FUSE file", e)),
            }
        }
    }
}

fn mount_detached(fuse: BorrowedFd<'_>) -> Result<OwnedFd, (&'static str, Errno)> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| ("begin", e))?;
    let options = [
        ("source", "sprat".to_owned()),
        ("fd", fuse.as_raw_fd().to_string()),
        ("rootmode", "40500".to_owned()),
        ("user_id", "0".to_owned()),
        ("group_id", "0".to_owned()),
        ("max_read", REQUEST_BYTES_MAX.to_string()),
    ];
    for (key, value) in options {
        fsconfig_set_string(&context, key, value).map_err(|e| ("configure", e))?;
    }
    fsconfig_set_flag(&context, "default_permissions").map_err(|e| ("configure", e))?;
    fsconfig_create(&context).map_err(|e| ("create", e))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|e| ("mount", e))
}

/// Checks whether the kernel has the file system type. Loads its module if there is one.
pub(crate) fn is_known() -> io::Result<()> {
    rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)
        .map(drop)
        .map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use sprat_testkit::{needs, requires};

    use super::*;
    use crate::{current_mounts, sys};

    #[test]
    fn another_device_at_dev_fuse_is_refused() {
        requires!(needs::root());
        // The mount namespace ends with this thread.
        let refused = std::thread::spawn(|| {
            sys::unshare(rustix::thread::UnshareFlags::NEWNS).unwrap();
            current_mounts::keep_mounts_inside().unwrap();
            rustix::mount::mount_bind("/dev/null", "/dev/fuse").unwrap();
            open_fuse()
        });
        let refused = refused.join().unwrap().unwrap_err();
        assert!(
            matches!(refused, AttachError::NoFuse { reason, .. } if reason.contains("another")),
            "{refused:?}"
        );
    }
}
