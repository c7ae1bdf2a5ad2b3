//! The FUSE file: opens `/dev/fuse` and mounts it, detached, where no path leads to.

use std::os::fd::OwnedFd;

use crate::AttachError;

/// Opens `/dev/fuse`, close-on-exec. The process that is to serve must become the only holder.
pub fn open_fuse() -> Result<OwnedFd, AttachError> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        AttachError::NoFuse {
            reason: "/dev/fuse can't be opened",
            source: e.into(),
        }
    })
}
