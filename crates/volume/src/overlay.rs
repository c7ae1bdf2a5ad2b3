//! The local file that takes the writes of a read-only volume.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use crate::plan::Block;
use crate::{BLOCK_BYTES, VolumeError};

/// Blocks in a file without a name: gone with the process, however that ends.
#[derive(Debug)]
pub(crate) struct Overlay {
    file: File,
    blocks_max: u64,
    bytes_max: u64,
    /// Slot of each block in the file.
    slots: Mutex<HashMap<u64, u64>>,
}

impl Overlay {
    pub(crate) fn new(dir: &Path, bytes_max: u64) -> Result<Self, VolumeError> {
        let file = tempfile::tempfile_in(dir).map_err(|source| VolumeError::Overlay {
            op: "create",
            source,
        })?;
        let blocks_max = bytes_max / BLOCK_BYTES as u64;
        Ok(Self {
            file,
            blocks_max,
            bytes_max,
            slots: Mutex::new(HashMap::new()),
        })
    }

    pub(crate) fn holds(&self, index: u64) -> bool {
        crate::engine::hold(&self.slots).contains_key(&index)
    }

    pub(crate) fn read(&self, index: u64) -> Result<Option<Block>, VolumeError> {
        let slots = crate::engine::hold(&self.slots);
        let Some(slot) = slots.get(&index) else {
            return Ok(None);
        };
        let mut bytes = [0; BLOCK_BYTES];
        self.file
            .read_exact_at(&mut bytes, slot * BLOCK_BYTES as u64)
            .map_err(|source| VolumeError::Overlay { op: "read", source })?;
        Ok(Some(Block::from(bytes)))
    }

    pub(crate) fn write(&self, first: u64, data: &[u8]) -> Result<(), VolumeError> {
        let mut slots = crate::engine::hold(&self.slots);
        for (index, bytes) in (first..).zip(data.chunks_exact(BLOCK_BYTES)) {
            let used = slots.len() as u64;
            let slot = slots.get(&index).copied().unwrap_or(used);
            if slot >= self.blocks_max {
                return Err(VolumeError::OverlayFull {
                    bytes_max: self.bytes_max,
                });
            }
            self.file
                .write_all_at(bytes, slot * BLOCK_BYTES as u64)
                .map_err(|source| VolumeError::Overlay {
                    op: "write",
                    source,
                })?;
            slots.insert(index, slot);
        }
        Ok(())
    }
}
