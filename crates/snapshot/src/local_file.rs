//! Files that sprat keeps on this machine: written whole or not at all, durable, readable for this user only.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use tempfile::NamedTempFile;

/// Makes a folder, and the folders above it, that only this user may enter.
pub fn make_private_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Replaces the file at `path` by what `fill` writes. Makes its folder if that is missing. After an error or
/// a crash the file has the old or the new content. The new content is durable when this returns.
pub fn replace(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    make_private_folder(folder_of(path))?;
    let part = filled(path, fill)?;
    part.persist(path).map_err(|error| error.error)?;
    File::open(folder_of(path))?.sync_all()
}

/// Writes a new file, as [`replace`] does, into a folder that exists. Fails with
/// [`io::ErrorKind::AlreadyExists`] if there is something at `path`.
pub fn create(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    if path.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let part = filled(path, fill)?;
    part.persist_noclobber(path).map_err(|error| error.error)?;
    File::open(folder_of(path))?.sync_all()
}

/// A file beside `path` with mode 0600. Its name shows that it is no file of its own.
fn filled(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<NamedTempFile> {
    let mut part = tempfile::Builder::new()
        .prefix(".")
        .suffix(".part")
        .tempfile_in(folder_of(path))?;
    fill(part.as_file_mut())?;
    part.as_file().sync_all()?;
    Ok(part)
}

fn folder_of(path: &Path) -> &Path {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    folder.unwrap_or(Path::new("."))
}
