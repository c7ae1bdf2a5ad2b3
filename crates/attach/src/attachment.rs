//! The chain of attachments in the worker: FUSE file, loop device, mounted file system.

use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::{AttachError, MountOptions};

/// How to attach.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AttachOptions {
    /// Read-ahead of the loop device in bytes (the file system's and the page cache's).
    pub read_ahead_bytes: u64,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            read_ahead_bytes: 4 << 20,
        }
    }
}

/// A volume on its way to being a mounted file system, seen from the worker.
///
/// Order: [`begin`](Self::begin), send the FUSE descriptor to the volume process and close the own
/// copy, [`attach_loop`](Self::attach_loop), then `make_file_system` or [`mount`](Self::mount),
/// then [`unmount`](Self::unmount) or [`leave_mounted`](Self::leave_mounted).
#[derive(Debug)]
pub struct Attachment {}

impl Attachment {
    /// Makes a FUSE mount over `fuse` that no path leads to. Doesn't wait for the server.
    pub fn begin(fuse: BorrowedFd<'_>, options: AttachOptions) -> Result<Self, AttachError> {
        let _ = (fuse, options);
        Ok(Self {})
    }

    /// Puts a loop device on the FUSE file; waits until the volume process serves it. The own copy
    /// of the FUSE descriptor must be closed by now, or the death of the server hangs this call.
    pub fn attach_loop(&mut self) -> Result<(), AttachError> {
        Ok(())
    }

    /// The loop device, `/dev/loopN`.
    ///
    /// # Panics
    /// Before [`attach_loop`](Self::attach_loop).
    #[must_use]
    pub fn device(&self) -> &Path {
        Path::new("")
    }

    /// Mounts the file system on `dir`, an existing folder.
    pub fn mount(&mut self, dir: &Path, options: &MountOptions) -> Result<(), AttachError> {
        let _ = (dir, options);
        Ok(())
    }

    /// Unmounts (if mounted) and waits, up to a limit, until the loop device is free; with it the FUSE
    /// file goes, which the volume process sees as the end of `Serving::wait`.
    pub fn unmount(self) -> Result<(), AttachError> {
        Ok(())
    }

    /// Gives up the own handles and leaves the file system mounted (`sprat mount`); it is ended
    /// with [`unmount_at`](crate::unmount_at).
    pub fn leave_mounted(self) -> Result<(), AttachError> {
        Ok(())
    }
}
