//! What this machine knows of a container, and how it compares with what the server shows.
//!
//! `stamp` is the file system's own count of its writes, `compare` the file in the state folder.
//! A command learns the outcome of a comparison as a [`Finding`] and decides what to do with it.

pub mod checks;
mod compare;
pub mod file;
mod header;
pub mod headers;
pub mod history;
pub mod identity;
pub mod key_notes;
pub mod moved;
pub mod paths;
pub mod reserved_names;
mod stamp;

pub use crate::state::compare::{Finding, KnownState, older};
pub use crate::state::header::{check_slots, header_unreadable, is_known, opened_last};
pub use crate::state::stamp::FirstBlock;

use std::path::Path;

use sprat_luks::{Header, SectorCipher};
use sprat_store::{ReadClass, StoreFile};

use crate::Failure;
use crate::address::Target;
use crate::state::paths::StatePaths;

/// The volume's first block in plaintext, and the length of the container file in bytes.
pub fn first_block(
    file: &dyn StoreFile,
    header: &Header,
    cipher: &SectorCipher,
) -> Result<(Vec<u8>, u64), Failure> {
    let file_bytes = file.len()?;
    let offset = header.geometry(file_bytes)?.offset_bytes;
    let mut block = vec![0; 4096];
    file.read_at(offset, &mut block, ReadClass::Demand)?;
    cipher.decrypt(0, &mut block)?;
    Ok((block, file_bytes))
}

/// For what doesn't open the volume: refuses a container that is older than this machine knows it.
/// `first_block` is the volume's, in plaintext.
pub fn refuse_older(
    state_dir: &Path,
    target: &Target,
    uuid: &str,
    first_block: &[u8],
    file_bytes: u64,
) -> Result<(), Failure> {
    let found = FirstBlock::read(first_block, file_bytes);
    let known = KnownState::load(&StatePaths::new(state_dir, uuid, target));
    match known.compare(found.as_ref().map(|found| &found.stamp), false) {
        Finding::Older { known, found } => Err(older(&target.to_string(), &known, &found)),
        _ => Ok(()),
    }
}
