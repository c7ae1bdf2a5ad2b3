//! What this machine knows of a container, and how it compares with what the server shows.
//!
//! A stamp is the file system's own count of its writes ([`FileSystemState`]), `compare` the file in
//! the state folder.
//! A command learns the outcome of a comparison as a [`Finding`] and decides what to do with it.

pub mod checks;
mod compare;
mod header;
pub mod headers;
pub mod history;
pub mod identity;
pub(crate) mod journal;
pub mod key_notes;
pub mod missing;
pub mod moved;
pub mod paths;
pub mod reserved_names;
pub mod snapshots;

pub use crate::state::compare::{Finding, KnownState, older};
pub use crate::state::header::{check_slots, header_unreadable, is_known, opened_last};

use std::path::Path;

use crate::Failure;
use crate::address::Target;
use crate::file_system::FileSystemState;
use crate::state::paths::StatePaths;

/// For what doesn't open the volume: refuses a container that is older than this machine knows it.
/// `stamp_block` is in plaintext.
pub fn refuse_older(
    state_dir: &Path,
    target: &Target,
    uuid: &str,
    stamp_block: &[u8],
    file_bytes: u64,
) -> Result<(), Failure> {
    let found = FileSystemState::read(stamp_block, file_bytes);
    let known = KnownState::load(&StatePaths::new(state_dir, uuid, target));
    match known.compare(found.as_ref().map(|found| &found.stamp), false) {
        Finding::Older { known, found } => Err(older(&target.to_string(), &known, &found)),
        _ => Ok(()),
    }
}
