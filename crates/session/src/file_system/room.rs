//! How much room is left in a file system.

use serde::{Deserialize, Serialize};

use crate::text;

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
    /// Of btrfs, whose metadata has space of its own: names, attributes, and the content of small files.
    #[serde(default)]
    pub metadata: Option<MetadataSpace>,
}

/// Space for metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataSpace {
    /// As much fits, if files' content does not take more space.
    pub total_bytes: u64,
    /// How much more.
    pub available_bytes: u64,
}

/// Free bytes, files where their number is limited, and bytes for metadata where those are separate.
#[must_use]
pub fn free_text(bytes: u64, files: Option<u64>, metadata: Option<u64>) -> String {
    let files = files.map(|files| format!(" and {}", text::counted(files, "file", "files")));
    let metadata = metadata.map(|left| format!(" and {} for metadata", text::bytes(left)));
    text::bytes(bytes) + &files.unwrap_or_default() + &metadata.unwrap_or_default()
}

/// Below this part of its blocks or inodes a volume counts as nearly full.
const ROOM_LOW_PART: u64 = 20;

impl VolumeRoom {
    /// What is free, as text: bytes, and files where their number is limited.
    #[must_use]
    pub fn free_text(&self) -> String {
        let metadata = self.metadata.map(|metadata| metadata.available_bytes);
        free_text(self.available_bytes, self.files_left(), metadata)
    }

    /// How many more files and folders fit. `None`: as many as there is space for.
    #[must_use]
    pub fn files_left(&self) -> Option<u64> {
        (self.inodes > 0).then_some(self.free_inodes)
    }

    /// Whether nothing more fits.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.available_bytes == 0 || self.files_left() == Some(0)
    }

    /// Whether the volume is nearly full.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.available_bytes < self.total_bytes / ROOM_LOW_PART
            || self.free_inodes < self.inodes / ROOM_LOW_PART
            || self.metadata_is_low()
    }

    /// Whether the space for metadata is nearly full.
    #[must_use]
    pub fn metadata_is_low(&self) -> bool {
        let mut metadata = self.metadata.iter();
        metadata.any(|space| space.available_bytes < space.total_bytes / ROOM_LOW_PART)
    }
}
