//! Extends the container file, under the lease, before the volume in it is opened.

use sprat_store::{StoreError, StoreFile};

use crate::volume_process::lease::ContainerLease;
use crate::{Failure, text};

/// Extends `file`, which has `file_bytes`, to `wanted_bytes`. The new length is durable when this
/// returns.
pub(crate) fn extend_file(
    file: &dyn StoreFile,
    lease: &ContainerLease,
    file_bytes: u64,
    wanted_bytes: u64,
) -> Result<(), Failure> {
    if wanted_bytes < file_bytes {
        return Err(Failure::usage(format!(
            "the container has {file_bytes} bytes already, more than {wanted_bytes}"
        ))
        .with_hint(
            "nothing was changed. The container takes only the space of its data, and `sprat trim` releases \
             the space of deleted data. `sprat shrink` makes a container with btrfs smaller",
        ));
    }
    if wanted_bytes == file_bytes {
        return Ok(());
    }
    lease.verify()?;
    // Pending writes of a dead session are recovered by the volume, not here.
    let others = lease.record().in_doubt();
    note_resize(lease)?;
    if let Err(error) = file.resize(wanted_bytes) {
        if !error.was_answered() {
            return Err(may_be_resized(&error));
        }
        if others.is_empty() {
            lease.all_resolved()?;
        }
        return Err(Failure::from(&error).with_hint(format!(
            "the container still has {}, and works as before. The server's file system may not \
             support a file of {}, or a quota may not allow it",
            text::bytes(file_bytes),
            text::bytes(wanted_bytes)
        )));
    }
    file.flush()?;
    Ok(())
}

/// Before the server is asked for another length of the file.
///
/// If the answer is lost, the server may resize the file late. The next session must wait for that, so a range
/// is recorded. The first block stands for it: it is no part of the volume, so nothing is written again. It is
/// resolved with everything else when the volume is closed.
pub(super) fn note_resize(lease: &ContainerLease) -> Result<(), Failure> {
    lease.before_own_write(std::slice::from_ref(&(0..4096)))
}

/// The server did not answer.
pub(super) fn may_be_resized(error: &StoreError) -> Failure {
    Failure::from(error).with_more_hint(
        "The container has either its old length or the new one, and works in both cases. Run the same \
         command again to finish",
    )
}
