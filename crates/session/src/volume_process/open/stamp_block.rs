//! The stamp block that a session uses in place of the one in the volume.

use sprat_luks::{Payload, SectorCipher};
use sprat_store::ReadClass;

use crate::Failure;
use crate::file_system::{FoundStamp, STAMP_BLOCK_BYTES, restored_stamp_block};
use crate::protocol::messages::VolumeStart;
use crate::settings::Access;
use crate::volume_process::open::prefetch::InspectedFile;

/// The stamp block by its copy.
pub(super) fn restored(
    inspected: &InspectedFile,
    payload: &Payload,
    cipher: &SectorCipher,
) -> Result<Option<FoundStamp>, Failure> {
    restored_stamp_block(|at| {
        let mut block = vec![0; STAMP_BLOCK_BYTES];
        if at + (STAMP_BLOCK_BYTES as u64) <= payload.len_bytes {
            let file = &inspected.file;
            file.read_at(payload.offset_bytes + at, &mut block, ReadClass::Demand)?;
            cipher.decrypt(at, &mut block)?;
        }
        Ok(block)
    })
}

/// The stamp block, as ciphertext, that is written before the kernel reads it: of a session that only
/// reads, into its overlay.
pub(super) fn shown_to_the_kernel(
    start: &VolumeStart,
    stamp: Option<&FoundStamp>,
    cipher: Option<&SectorCipher>,
) -> Result<Option<Vec<u8>>, Failure> {
    let (Some(stamp), Some(cipher)) = (stamp, cipher) else {
        return Ok(None);
    };
    let block = match start.settings.access {
        Access::ReadOnly => stamp.for_reading()?,
        Access::ReadWrite => stamp.restored.then(|| stamp.block.clone()),
    };
    let Some(mut block) = block else {
        return Ok(None);
    };
    cipher.encrypt(stamp.kind.stamp_range().start, &mut block)?;
    Ok(Some(block))
}
