//! Repairs the ACL of a folder that has the sticky bit, as in `chmod 1770`, and of what has got other special bits.
//!
//! rsync sends the entry of the owning group only if it differs from the mask. On a new folder it sets the ACL before
//! the sticky bit, and until then without rights for group and others. It then completes the mask, and not that entry, so
//! the owning group has no rights (rsync 3.5, `change_sacl_perms`). The entry is copied here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Stat, XattrFlags, lgetxattr, lsetxattr, statat};
use rustix::io::Errno;

use crate::walk::{
    XATTR_BYTES_MAX, is_folder, listed, open_folder_at, open_folder_below, path_through,
};

const ACL: &str = "system.posix_acl_access";
const STICKY: u32 = 0o1000;
/// linux/posix_acl_xattr.h: a version, then entries of a tag, the rights and an id.
const VERSION_BYTES: usize = 4;
const ENTRY_BYTES: usize = 8;
/// `ACL_GROUP_OBJ`.
const OWNING_GROUP: [u8; 2] = [4, 0];

/// Whether rsync may have left the ACL of a folder with this mode wrong.
pub(crate) fn is_concerned(mode: u32) -> bool {
    mode & STICKY != 0
}

/// A name in a folder.
type Place<'a> = (BorrowedFd<'a>, &'a Path);

/// Repairs the ACL of `copy`, which rsync made from `source`.
pub(crate) fn repair(source: Place<'_>, copy: Place<'_>) -> io::Result<()> {
    let Some(found) = may_be_wrong(copy)? else {
        return Ok(());
    };
    match acl(source)? {
        Some(right) => correct(copy, &found, &right),
        None => Ok(()),
    }
}

/// The ACL of `copy`, if the owning group has no rights in it.
pub(crate) fn may_be_wrong(copy: Place<'_>) -> io::Result<Option<Vec<u8>>> {
    Ok(acl(copy)?.filter(|found| owning_group_has_no_rights(found)))
}

/// Gives `copy`, which has the ACL `found`, that of its source. Nothing is done if more than the owning group's entry
/// differs.
pub(crate) fn correct(copy: Place<'_>, found: &[u8], of_source: &[u8]) -> io::Result<()> {
    if lacks_owning_group(found, of_source) {
        let path = path_through(copy.0, copy.1);
        lsetxattr(path, ACL, of_source, XattrFlags::REPLACE)?;
    }
    Ok(())
}

/// Repairs the ACL of the folder `path` below `to`, which was made from that of `from`. What can't be read is left out.
pub(crate) fn repair_one(from: &Path, to: &Path, path: &Path) -> io::Result<()> {
    let (from, to) = (open_folder_at(from)?, OwnedFd::from(File::open(to)?));
    let (parent, name) = parent_and_name(path);
    if let Ok(source) = open_folder_below(from.as_fd(), parent)
        && folder_named(&source, name).is_some_and(|stat| is_concerned(stat.st_mode))
        && let Ok(copy) = open_folder_below(to.as_fd(), parent)
    {
        repair((source.as_fd(), name), (copy.as_fd(), name))?;
    }
    Ok(())
}

/// Whether something at the destination stays as it is: its path, what the snapshot has there, and what is there.
pub(crate) type Stays<'a> = dyn Fn(&Path, &Stat, &Stat) -> bool + 'a;

/// Repairs the ACL of `path`, and of all files and folders in it: rsync may have changed special bits of those that were
/// there.
pub(crate) fn repair_below(
    from: &Path,
    to: &Path,
    path: &Path,
    stays: &Stays<'_>,
) -> io::Result<()> {
    // The user may have named the destination by a symbolic link.
    let (from, to) = (open_folder_at(from)?, OwnedFd::from(File::open(to)?));
    let (parent, name) = parent_and_name(path);
    let mut waiting = Vec::new();
    if let Ok(source) = open_folder_below(from.as_fd(), parent)
        && let Ok(copy) = open_folder_below(to.as_fd(), parent)
    {
        repair_unless((source.as_fd(), name), (copy.as_fd(), name), path, stays)?;
        if folder_named(&source, name).is_some() {
            waiting.push(path.to_owned());
        }
    }
    while let Some(path) = waiting.pop() {
        let (Ok(folder), Ok(copy)) = (
            open_folder_below(from.as_fd(), &path),
            open_folder_below(to.as_fd(), &path),
        ) else {
            continue;
        };
        for entry in listed(folder.as_fd()).unwrap_or_default() {
            let may_be_folder = matches!(entry.kind, FileType::Directory | FileType::Unknown);
            if !may_be_folder && entry.kind != FileType::RegularFile {
                continue;
            }
            let (name, path) = (&entry.name, path.join(&entry.name));
            repair_unless((folder.as_fd(), name), (copy.as_fd(), name), &path, stays)?;
            if may_be_folder && folder_named(&folder, name).is_some() {
                waiting.push(path);
            }
        }
    }
    Ok(())
}

fn repair_unless(
    source: Place<'_>,
    copy: Place<'_>,
    path: &Path,
    stays: &Stays<'_>,
) -> io::Result<()> {
    if may_be_wrong(copy)?.is_none() {
        return Ok(());
    }
    let stat = |(folder, name): Place<'_>| statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
    match (stat(source), stat(copy)) {
        (Ok(ours), Ok(theirs))
            if FileType::from_raw_mode(ours.st_mode) == FileType::from_raw_mode(theirs.st_mode)
                && !stays(path, &ours, &theirs) =>
        {
            repair(source, copy)
        }
        _ => Ok(()),
    }
}

fn parent_and_name(path: &Path) -> (&Path, &Path) {
    let name = path.file_name().map_or(Path::new("."), Path::new);
    (path.parent().unwrap_or(Path::new("")), name)
}

fn folder_named(folder: &OwnedFd, name: &Path) -> Option<Stat> {
    let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
    stat.ok().filter(is_folder)
}

/// `None`: there is none.
pub(crate) fn acl((folder, name): Place<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0_u8; XATTR_BYTES_MAX];
    match lgetxattr(path_through(folder, name), ACL, &mut buffer[..]) {
        Ok(length) => Ok(Some(buffer[..length].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn owning_group_has_no_rights(acl: &[u8]) -> bool {
    let entries = acl.get(VERSION_BYTES..).unwrap_or_default();
    let mut entries = entries.chunks(ENTRY_BYTES);
    entries.any(|entry| entry.starts_with(&OWNING_GROUP) && entry.get(2..4) == Some(&[0, 0]))
}

/// Whether the owning group has no rights in `found`, has some in `right`, and nothing else differs.
fn lacks_owning_group(found: &[u8], right: &[u8]) -> bool {
    let mut lacks = false;
    let (found, right) = (
        found.split_at_checked(VERSION_BYTES),
        right.split_at_checked(VERSION_BYTES),
    );
    let (Some((version, found)), Some((its_version, right))) = (found, right) else {
        return false;
    };
    if version != its_version || found.len() != right.len() {
        return false;
    }
    for (one, other) in found.chunks(ENTRY_BYTES).zip(right.chunks(ENTRY_BYTES)) {
        if one == other {
            continue;
        }
        let is_group = one.starts_with(&OWNING_GROUP) && other.starts_with(&OWNING_GROUP);
        if !is_group || one.get(2..4) != Some(&[0, 0]) || one.get(4..) != other.get(4..) {
            return false;
        }
        lacks = true;
    }
    lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u8, u8)]) -> Vec<u8> {
        let entries = entries.iter();
        let entries = entries.flat_map(|(tag, rights)| [*tag, 0, *rights, 0, 255, 255, 255, 255]);
        [2, 0, 0, 0].into_iter().chain(entries).collect()
    }

    #[test]
    fn only_rights_of_the_owning_group_that_are_gone_are_repaired() {
        let right = acl(&[(1, 7), (2, 7), (4, 7), (16, 7), (32, 0)]);
        let lacks = |entries: &[(u8, u8)]| lacks_owning_group(&acl(entries), &right);
        assert!(lacks(&[(1, 7), (2, 7), (4, 0), (16, 7), (32, 0)]));
        assert!(!lacks(&[(1, 7), (2, 7), (4, 7), (16, 7), (32, 0)]));
        assert!(!lacks(&[(1, 7), (2, 7), (4, 1), (16, 7), (32, 0)]));
        assert!(!lacks(&[(1, 7), (2, 5), (4, 0), (16, 7), (32, 0)]));
        assert!(!lacks(&[(1, 7), (2, 7), (4, 0), (16, 5), (32, 0)]));
        assert!(!lacks(&[(1, 7), (4, 0), (32, 0)]));
        assert!(!lacks_owning_group(&[], &right));
    }
}
