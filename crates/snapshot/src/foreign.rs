//! Objects of somebody else in the places that sprat uses on the volume: other machines and people
//! write there, too. They never stop a job. They are renamed or avoided, never removed.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, renameat, statat, unlinkat};
use rustix::io::Errno;

use crate::record::Warning;
use crate::text::escape_name;
use crate::walk::is_folder;

/// So many names are tried.
const NAMES_MAX: u32 = 100;

/// Renames what is called `name` in `folder` and is no folder, a symbolic link too, so that a folder can
/// be made there. `above` is put before the name in the warning.
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

/// A name in `folder` that is free: `name`, after what an interrupted run left there was removed; else
/// `name` with a number, where a folder of somebody else has that name.
pub(crate) fn temporary_name(folder: &OwnedFd, name: &str) -> io::Result<String> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(name.to_owned()),
        // A folder, or a file that must not be removed.
        Err(Errno::ISDIR | Errno::PERM | Errno::ACCESS | Errno::BUSY) => {}
        Err(e) => return Err(e.into()),
    }
    (1..=NAMES_MAX)
        .map(|n| format!("{name}-{n}"))
        .find(|new| statat(folder, new, AtFlags::SYMLINK_NOFOLLOW).is_err())
        .ok_or_else(|| io::ErrorKind::AlreadyExists.into())
}
