//! How much room is left in a file system.

use serde::{Deserialize, Serialize};

/// Room in the file system in the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRoom {
    /// For files' content, in all.
    pub total_bytes: u64,
    /// For files' content, unused.
    pub available_bytes: u64,
    /// How many files and folders it can hold.
    pub inodes: u64,
    /// How many more.
    pub free_inodes: u64,
}

/// Below this part of its blocks or inodes a volume counts as nearly full.
const ROOM_LOW_PART: u64 = 20;

impl VolumeRoom {
    /// Whether the volume is nearly full.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.available_bytes < self.total_bytes / ROOM_LOW_PART
            || self.free_inodes < self.inodes / ROOM_LOW_PART
    }
}
