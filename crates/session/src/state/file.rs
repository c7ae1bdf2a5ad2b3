//! Writes a file of the state folder: whole or not at all, durable, for this user only.

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use serde::Serialize;

/// Writes `content` as JSON: whole or not at all, durable, mode 0600.
pub fn write(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(content)?;
    text.push(b'\n');
    write_bytes(path, &text)
}

/// Writes `content` in the place of what lies at `path`; its folder (0700) is made where missing.
/// Whatever fails or dies, the file holds what it held before or all of the new.
pub(crate) fn write_bytes(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    // Mode 0600 is tempfile's own.
    let mut part = tempfile::NamedTempFile::new_in(folder)?;
    part.write_all(content)?;
    part.as_file().sync_all()?;
    part.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}
