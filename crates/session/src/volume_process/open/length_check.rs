//! Checks that a container file is as long as the file system in it.

use sprat_luks::{Payload, SectorCipher};
use sprat_store::{StoreError, StoreErrorKind};

use crate::file_system::{FileSystemKind, FoundStamp, file_system_bytes, find_stamp_block};
use crate::volume_process::open::prefetch::InspectedFile;
use crate::volume_process::open::stamp_block::restored;
use crate::{Exit, Failure};

/// A LUKS2 payload reaches to the end of the file, so a file that was cut short opens all the same.
/// The file system inside knows its length. If its kind is not known, the mount reports that.
/// Returns the file system's stamp block. If that is damaged, it is made from its copy.
pub(super) fn check_not_truncated(
    inspected: &InspectedFile,
    payload: &Payload,
    cipher: &SectorCipher,
) -> Result<Option<FoundStamp>, Failure> {
    let file_bytes = inspected.file_bytes;
    let stamp = FileSystemKind::DEFAULT.stamp_range();
    if payload.len_bytes < stamp.end {
        return Err(truncated(file_bytes, payload.offset_bytes + stamp.end));
    }
    let found = find_stamp_block(|kind| {
        let range = kind.stamp_range();
        // A volume that ends before has no file system of this kind.
        if payload.len_bytes < range.end {
            return Ok(Vec::new());
        }
        let mut block = inspected
            .stamp_block(payload.offset_bytes, kind)
            .map_err(|error| super_block_unread(&error))?;
        cipher.decrypt(range.start, &mut block)?;
        Ok::<_, Failure>(block)
    })?;
    let found = match found {
        Some(found) if !found.is_damaged() => Some(found),
        found => restored(inspected, payload, cipher)?.or(found),
    };
    if let Some(needed) = found.as_ref().and_then(|it| file_system_bytes(&it.block))
        && needed > payload.len_bytes
    {
        return Err(truncated(
            file_bytes,
            payload.offset_bytes.saturating_add(needed),
        ));
    }
    Ok(found)
}

/// A server that answers but can't return the block has a disk that lost it.
fn super_block_unread(error: &StoreError) -> Failure {
    if error.kind() != StoreErrorKind::Failed {
        return error.into();
    }
    Failure::new(
        Exit::Damaged,
        "the first block of the volume, its file system's super block, can't be read",
    )
    .caused_by(error)
    .with_hint(
        "nothing was changed. Check the server's disk, and copy as much of the file as can be read to \
         another disk. File systems have copies of their super block (ext4: `e2fsck -b 32768`; btrfs: \
         `btrfs rescue super-recover`)",
    )
}

/// The container file is shorter than its content needs.
pub fn truncated(file_bytes: u64, needed_bytes: u64) -> Failure {
    Failure::new(
        Exit::Damaged,
        format!("the container is cut short: it has {file_bytes} bytes and needs {needed_bytes}"),
    )
    .with_hint(
        "nothing was changed. The data after the cut is lost on this server. Find a complete copy of \
         the file before you write to it again",
    )
}
