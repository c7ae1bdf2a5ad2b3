//! What is mounted where, and how a mount that outlives its maker is ended (`sprat umount`).

use std::path::Path;

use crate::AttachError;

/// What lies at a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MountState {
    /// No volume of ours is mounted there.
    NotMounted,
    /// A volume is mounted and answers.
    Alive,
    /// A volume is mounted, but its volume process is gone: everything in it is EIO.
    Dead,
}

/// Finds out what lies at `dir`.
pub fn mount_state(dir: &Path) -> Result<MountState, AttachError> {
    let _ = dir;
    Ok(MountState::NotMounted)
}

/// Unmounts the volume at `dir` and waits until its loop device is free.
pub fn unmount_at(dir: &Path) -> Result<(), AttachError> {
    Err(AttachError::NotMounted { dir: dir.into() })
}

/// Takes a dead mount away from `dir` at once, though files may be open in it.
pub fn unmount_dead(dir: &Path) -> Result<(), AttachError> {
    Err(AttachError::NotMounted { dir: dir.into() })
}
