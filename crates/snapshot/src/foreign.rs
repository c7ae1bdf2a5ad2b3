//! Foreign objects that have names which sprat uses on the volume. Other machines and people write
//! there, too. Such objects never stop a job: they are renamed or avoided, and never removed.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, renameat, statat, unlinkat};
use rustix::io::Errno;

use crate::record::Warning;
use crate::text::escape_name;
use crate::walk::is_folder;

/// How many names are tried.
const NAMES_MAX: u32 = 100;

/// If `name` in `folder` is not a folder, renames it, so that a folder can be created. A symbolic link
/// is renamed, too. In the warning, `above` is put before the name.
pub(crate) fn rename_if_no_folder(
    folder: &OwnedFd,
    above: &str,
    name: &str,
) -> io::Result<Option<Warning>> {
    let stat = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if is_folder(&stat) {
        return Ok(None);
    }
    let new = (1..=NAMES_MAX)
        .map(|n| format!("{name}.foreign-{n}"))
        .find(|new| statat(folder, new, AtFlags::SYMLINK_NOFOLLOW).is_err())
        .ok_or_else(|| io::Error::from(io::ErrorKind::AlreadyExists))?;
    renameat(folder, name, folder, &new)?;
    Ok(Some(Warning::ForeignObject {
        path: format!("{above}{}", escape_name(name.as_bytes())),
        done: format!("renamed to {}", escape_name(new.as_bytes())),
    }))
}

/// Returns a free name in `folder`: `name`, after removing what an interrupted run left there, or `name`
/// with a number if a foreign folder has that name.
pub(crate) fn temporary_name(folder: &OwnedFd, name: &str) -> io::Result<String> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(name.to_owned()),
        // A folder, or a file that can't be removed.
        Err(Errno::ISDIR | Errno::PERM | Errno::ACCESS | Errno::BUSY) => {}
        Err(e) => return Err(e.into()),
    }
    (1..=NAMES_MAX)
        .map(|n| format!("{name}-{n}"))
        .find(|new| statat(folder, new, AtFlags::SYMLINK_NOFOLLOW).is_err())
        .ok_or_else(|| io::ErrorKind::AlreadyExists.into())
}
