//! Makes the container file longer, under the lock, before the volume in it is opened.

use sprat_store::StoreFile;
use sprat_volume::{Fenced, SessionHooks as _};

use crate::volume_process::lease::ContainerLease;
use crate::{Failure, text};

/// Gives `file`, which has `file_bytes`, the length `wanted_bytes`; durable when it returns.
pub(crate) fn lengthen(
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
            "nothing was changed. A container can't be made smaller in its place, and needs not: \
             it takes only what is written (`sprat trim` gives back what was deleted). To have a \
             smaller limit, make a new container with `sprat init --size` and back up to it",
        ));
    }
    if wanted_bytes == file_bytes {
        return Ok(());
    }
    lease.still_ours()?;
    // What a dead session had under way is settled by the volume, not by this.
    let others = lease.record().in_doubt();
    // Should the answer be lost, the server may do it late: the next session waits for that. The
    // first block stands for it; it is no part of the volume, so nothing is written anew. Settled
    // with all else when the volume is closed.
    lease
        .before_send(std::slice::from_ref(&(0..4096)))
        .map_err(|fenced| match fenced {
            Fenced::Lost(cause) => {
                Failure::failed("the container is no longer held").because(cause.to_string())
            }
            other => Failure::failed(other.to_string()),
        })?;
    if let Err(error) = file.resize(wanted_bytes) {
        if !error.was_answered() {
            return Err(Failure::from(&error).with_more_hint(
                "The container has its length as before, or the new one; it is used as before, and \
                 the same command again finishes",
            ));
        }
        if others.is_empty() {
            lease.all_settled()?;
        }
        return Err(Failure::from(&error).with_hint(format!(
            "the container has its {} as before, and is used as before. The server's file system \
             may not hold a file of {}, or its quota not allow it",
            text::bytes(file_bytes),
            text::bytes(wanted_bytes)
        )));
    }
    file.flush()?;
    Ok(())
}
