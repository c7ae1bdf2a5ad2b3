//! The file of a sheet: made for this user only, never over another file.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sprat_session::Failure;

/// Creates the file of a sheet or a page, before the secret exists: mode 0600, and never an existing file.
///
/// # Errors
/// Something has the name, or the folder can't be written.
pub fn create(path: &Path) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    file.map_err(|error| {
        if error.kind() == std::io::ErrorKind::AlreadyExists {
            return Failure::usage(format!("{} exists already", path.display()))
                .with_hint("sprat overwrites no file: give the name of a new file");
        }
        Failure::usage(format!("can't make {}", path.display()))
            .caused_by(&error)
            .with_hint("nothing was started")
    })
}

/// Writes a file that [`create`] made.
///
/// # Errors
/// Writing fails; then the file is removed.
pub fn write(mut file: &File, path: &Path, page: &str) -> Result<(), Failure> {
    let written = file
        .write_all(page.as_bytes())
        .and_then(|()| file.sync_all());
    written.map_err(|error| {
        // Half a page may contain the whole secret.
        let _ = std::fs::remove_file(path);
        Failure::failed(format!("can't write {}", path.display())).caused_by(&error)
    })
}
