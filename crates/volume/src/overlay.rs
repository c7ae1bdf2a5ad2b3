//! The local file that stores the writes of a read-only volume.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno;

use sprat_store::IgnorePoison;

use crate::plan::Block;
use crate::{BLOCK_BYTES, VolumeError};

/// Most memory that an overlay uses if no disk can store it. Replaying a journal writes no more
/// blocks than the journal has: 32 MiB in a container that sprat created.
const MEMORY_BYTES_MAX: u64 = 256 << 20;

/// With less free disk space than this, the overlay is kept in memory.
const ROOM_BYTES: u64 = 32 << 20;

/// Blocks in a file without a name, which is gone when the process exits.
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
        let (file, bytes_max) = match on_disk(dir) {
            Ok(file) => (file, bytes_max),
            // A restore must work on a machine with a full or read-only disk.
            Err(_) => (in_memory()?, bytes_max.min(MEMORY_BYTES_MAX)),
        };
        let blocks_max = bytes_max / BLOCK_BYTES as u64;
        Ok(Self {
            file,
            blocks_max,
            bytes_max,
            slots: Mutex::new(HashMap::new()),
        })
    }

    pub(crate) fn holds(&self, index: u64) -> bool {
        self.slots.lock().ignore_poison().contains_key(&index)
    }

    pub(crate) fn read(&self, index: u64) -> Result<Option<Block>, VolumeError> {
        let slots = self.slots.lock().ignore_poison();
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
        let mut slots = self.slots.lock().ignore_poison();
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

/// A file in `dir`; an error if it can't be created or there is no free space.
fn on_disk(dir: &Path) -> io::Result<File> {
    let file = tempfile::tempfile_in(dir)?;
    // Any other error comes from a file system without fallocate.
    if let Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) =
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, ROOM_BYTES)
    {
        return Err(errno.into());
    }
    file.set_len(0)?;
    Ok(file)
}

fn in_memory() -> Result<File, VolumeError> {
    rustix::fs::memfd_create("sprat-overlay", MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|errno| VolumeError::Overlay {
            op: "create",
            source: errno.into(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_is_kept_in_memory_without_a_folder() {
        let overlay = Overlay::new(Path::new("/nowhere"), 1 << 20).unwrap();
        overlay.write(7, &[9; BLOCK_BYTES]).unwrap();
        let block = overlay.read(7).unwrap().unwrap();
        assert!(block.iter().all(|byte| *byte == 9));
        assert!(overlay.read(8).unwrap().is_none());
    }
}
