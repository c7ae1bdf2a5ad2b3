//! Files and folders of this machine.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use sprat_store::hex;

use crate::Failure;

/// Makes a folder, and those above it, that only this user may enter.
pub(crate) fn make_private_folder(folder: &Path) -> Result<(), Failure> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| {
            Failure::failed(format!("can't make the folder {}", folder.display())).caused_by(&error)
        })
}

/// 64 bits of a hash, as part of a file's name: nobody makes another content for a given one.
pub(crate) fn short_hash(bytes: &[u8]) -> String {
    let hash = openssl::sha::sha256(bytes);
    hex(&hash[..8])
}
