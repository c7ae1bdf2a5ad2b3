//! The free space of a file system that may be full.

use std::path::Path;

use crate::error::{SnapshotError, SpaceKind};

/// A file system with less free space counts as full, whatever failed.
const FULL_BELOW_BYTES: u64 = 1 << 20;

/// The free space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full {
    pub(crate) kind: SpaceKind,
    pub(crate) free_bytes: u64,
    pub(crate) free_inodes: u64,
}

impl Full {
    /// Whether the numbers alone prove that it is full.
    pub(super) fn is_certain(&self) -> bool {
        self.kind == SpaceKind::Inodes || self.free_bytes < FULL_BELOW_BYTES
    }

    /// `object`: the source file that did not fit.
    pub(crate) fn error(self, object: Option<String>) -> SnapshotError {
        SnapshotError::VolumeFull {
            kind: self.kind,
            free_bytes: self.free_bytes,
            free_inodes: self.free_inodes,
            object,
        }
    }
}

/// What the file system at `path` has run out of, after a call there reported that it is full.
pub(crate) fn room_at(path: &Path) -> Option<Full> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(Full {
        // File systems without a fixed number of inodes report 0 of 0.
        kind: if stat.f_files > 0 && stat.f_favail == 0 {
            SpaceKind::Inodes
        } else {
            SpaceKind::Blocks
        },
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        free_inodes: stat.f_favail,
    })
}

/// Distinguishes a full volume from a failing one. sprat's own files need space, too.
pub(crate) fn volume_full_or(error: SnapshotError, volume_root: &Path) -> SnapshotError {
    let SnapshotError::Volume { source, .. } = &error else {
        return error;
    };
    let no_room = [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT]
        .iter()
        .any(|errno| source.raw_os_error() == Some(errno.raw_os_error()));
    match room_at(volume_root).filter(|_| no_room) {
        Some(full) => full.error(None),
        None => error,
    }
}
