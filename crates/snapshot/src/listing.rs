//! Folder listings that end too early. The C library treats ENOENT while a folder is read as the end of
//! the folder (glibc, sysdeps/unix/sysv/linux/readdir.c), because a folder that was removed meanwhile
//! returns it. A network or FUSE file system may return it for any folder, and rsync sees an empty one.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::RawDir;

use crate::walk::{entry_is_folder, names_in, open_folder_at};

/// These return ENOENT only for a folder that was removed.
const LOCAL: [&str; 17] = [
    "ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "zfs", "f2fs", "vfat", "exfat",
    "ntfs3", "iso9660", "udf", "squashfs", "overlay", "bcachefs",
];
const BUFFER_BYTES: usize = 8 << 10;

/// Whether listings on a file system of this type may end too early.
pub(crate) fn may_end_early(kind: &str) -> bool {
    !LOCAL.contains(&kind)
}

/// The folders of the source below `place` that are empty in `tree` and can't be listed.
pub(crate) fn ended_early(tree: &Path, place: &Path) -> io::Result<Vec<PathBuf>> {
    let below = place.strip_prefix("/").unwrap_or(place);
    let root = match open_folder_at(&tree.join(below)) {
        Ok(root) => root,
        // A file, or nothing.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e),
    };
    let mut early = Vec::new();
    let mut todo = vec![PathBuf::from(".")];
    while let Some(folder) = todo.pop() {
        let names = names_in(root.as_fd(), &folder)?;
        let source = place.join(folder.strip_prefix(".").unwrap_or(&folder));
        if names.is_empty() && !can_be_listed(&source) {
            early.push(source);
        }
        for (name, kind) in names {
            let path = folder.join(name);
            if entry_is_folder(root.as_fd(), &path, kind)? {
                todo.push(path);
            }
        }
    }
    Ok(early)
}

/// Lists the folder with system calls alone. A folder that is gone now is no loss.
fn can_be_listed(folder: &Path) -> bool {
    let Ok(open) = open_folder_at(folder) else {
        return true;
    };
    let mut buffer = [MaybeUninit::<u8>::uninit(); BUFFER_BYTES];
    let mut entries = RawDir::new(&open, &mut buffer);
    while let Some(entry) = entries.next() {
        if entry.is_err() {
            // A folder that was removed while it was open returns the same error.
            return std::fs::symlink_metadata(folder).is_err();
        }
    }
    true
}
