//! Files of the state folder and folders of this machine.

use std::io::{self, Write as _};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sprat_snapshot::local_file;
use sprat_store::hex;

use crate::Failure;

/// Reads a JSON file. `None`: it is missing, or it has no usable content.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// As [`read_json`], but only a file that is missing is `None`.
pub(crate) fn read_json_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Failure> {
    let unread = |error: &dyn std::error::Error| {
        Failure::failed(format!("can't read {}", path.display())).caused_by(error)
    };
    match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unread(&error)),
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| unread(&error)),
    }
}

/// Writes `content` as JSON, by [`local_file::replace`].
pub fn write_json(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(content)?;
    text.push(b'\n');
    local_file::replace(path, |file| file.write_all(&text))
}

/// Writes `content` as JSON, by [`local_file::replace_even_if_full`]. A torn file counts as not known.
pub fn write_json_even_if_full(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(content)?;
    text.push(b'\n');
    local_file::replace_even_if_full(path, &text)
}

/// Makes a folder, and those above it, that only this user may enter.
pub(crate) fn make_private_folder(folder: &Path) -> Result<(), Failure> {
    local_file::make_private_folder(folder).map_err(|error| {
        Failure::failed(format!("can't make the folder {}", folder.display())).caused_by(&error)
    })
}

/// 64 bits of a hash, as part of a file's name: nobody makes another content for a given one.
pub(crate) fn short_hash(bytes: &[u8]) -> String {
    let hash = openssl::sha::sha256(bytes);
    hex(&hash[..8])
}
