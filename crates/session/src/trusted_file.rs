//! Files with keys, passphrases, headers and the config: opened without waiting, and checked for who
//! else could change them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use sprat_snapshot::local_file::writable_by_others;

/// Opens a regular file for reading; anything else is an error. A FIFO is not waited for, and no device
/// is read: reading one may never end.
pub fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    // A flag is a bit of a C int.
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    // A device may do something when it is opened, even without waiting.
    require_regular(&std::fs::metadata(path)?)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    require_regular(&file.metadata()?)?;
    Ok(file)
}

fn require_regular(about: &std::fs::Metadata) -> io::Result<()> {
    if about.is_file() {
        return Ok(());
    }
    let what = if about.is_dir() {
        "it is a folder"
    } else {
        "it is not a regular file"
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, what))
}

/// Why others can write to a folder that may not exist yet: to it, or to the nearest existing one above it.
#[must_use]
pub fn folder_writable_by_others(to: &Path) -> Option<String> {
    let there = to.ancestors().find(|folder| folder.is_dir())?;
    writable_by_others(there).ok().flatten()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_a_fifo_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        for other in [&fifo, folder.path(), Path::new("/dev/zero")] {
            assert!(open(other).is_err(), "{}", other.display());
        }
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(open(&file).is_ok());
    }
}
