//! Files with keys, passphrases, headers and the config: opened without waiting, and checked for who
//! else could change them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

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

/// Who but root and this user can change what lies at `path`: the file itself, or a folder above it.
/// `None`: nobody. In a folder with the sticky bit, such as `/tmp`, others can't replace a file.
pub fn writable_by_others(path: &Path) -> io::Result<Option<String>> {
    let me = rustix::process::geteuid().as_raw();
    let real = path.canonicalize()?;
    // A symbolic link can be replaced as well as what it leads to.
    let named = path.ancestors().skip(1);
    for (at, place) in std::iter::once(real.as_path())
        .chain(real.ancestors().skip(1))
        .chain(named)
        .enumerate()
        .filter(|(_, place)| !place.as_os_str().is_empty())
    {
        let about = place.metadata()?;
        let what = if at == 0 { "it" } else { "the folder" };
        let shown = if at == 0 {
            String::new()
        } else {
            format!(" {}", place.display())
        };
        if about.uid() != 0 && about.uid() != me {
            return Ok(Some(format!(
                "{what}{shown} belongs to another user (UID {})",
                about.uid()
            )));
        }
        let sticky = about.is_dir() && about.mode() & 0o1000 != 0;
        if about.mode() & 0o022 != 0 && !sticky {
            return Ok(Some(format!(
                "others can write to {what}{shown} (mode {:04o})",
                about.mode() & 0o7777
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

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

    #[test]
    fn file_and_every_folder_above_it_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let file = inner.join("file");
        fs::write(&file, "x").unwrap();
        mode(&file, 0o600);
        mode(&inner, 0o755);
        assert_eq!(writable_by_others(&file).unwrap(), None);
        mode(&inner, 0o1777);
        assert_eq!(writable_by_others(&file).unwrap(), None);
        mode(&inner, 0o777);
        let why = writable_by_others(&file).unwrap().unwrap();
        assert!(why.contains("inner"), "{why}");
        mode(&inner, 0o700);
        mode(&file, 0o620);
        assert!(writable_by_others(&file).unwrap().is_some());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(writable_by_others(&link).unwrap().is_some());
    }
}
