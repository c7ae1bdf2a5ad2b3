//! btrfs subvolumes. Each has its own device number without being mounted, and inode numbers of its own.
//!
//! In a source: a job that stays on one file system excludes them, and their folders are empty in the
//! snapshot. In a volume: each snapshot is one, so its files have the same inode numbers as those of the
//! others, whether they are the same files or not.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, fstat, statat};

use crate::paths::real_path;
use crate::walk::{is_folder, names_in, open_folder_at};

/// `BTRFS_SUPER_MAGIC` (linux/magic.h).
const BTRFS: i128 = 0x9123_683E;
/// `BTRFS_FIRST_FREE_OBJECTID` (linux/btrfs_tree.h): the inode number of each subvolume's folder.
const ROOT_INODE: u64 = 256;

/// The default of `max_inline` (btrfs(5)): a file of at most this size is in the tree, beside its inode.
const INLINE_BYTES_MAX: u64 = 2048;

/// How long files may be that are read with their inodes, in the folder at `root`.
pub(crate) fn inline_bytes_max(root: &Path) -> u64 {
    match is_btrfs(root) {
        true => INLINE_BYTES_MAX,
        false => 0,
    }
}

/// Whether the folder at `root` is on a btrfs.
pub(crate) fn is_btrfs(root: &Path) -> bool {
    rustix::fs::statfs(root).is_ok_and(|about| i128::from(about.f_type) == BTRFS)
}

/// The folders below `source` that are subvolumes and not `mounted` (real paths) there. `in_tree`: see
/// [`on_other_devices`].
pub(crate) fn inside(
    source: &Path,
    mounted: &[PathBuf],
    in_tree: &dyn Fn(&Path) -> bool,
) -> Vec<PathBuf> {
    if !is_btrfs(source) {
        return Vec::new();
    }
    let other = on_other_devices(source, in_tree).into_iter();
    let is_one = |(path, inode): &(PathBuf, u64)| {
        *inode == ROOT_INODE && !mounted.contains(&real_path(path))
    };
    let mut found: Vec<PathBuf> = other.filter(is_one).map(|(path, _)| path).collect();
    found.sort();
    found
}

/// The topmost folders below `source` with another device number, and their inode numbers. With
/// `--one-file-system`, rsync copies only the folder itself. `in_tree` returns whether a path is in the snapshot:
/// what patterns exclude is not searched.
pub(crate) fn on_other_devices(
    source: &Path,
    in_tree: &dyn Fn(&Path) -> bool,
) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let Ok(root) = open_folder_at(source) else {
        return found;
    };
    let Ok(own) = fstat(&root) else {
        return found;
    };
    let mut todo = vec![PathBuf::new()];
    while let Some(folder) = todo.pop() {
        let at = match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => &folder,
        };
        // rsync reports what can't be read.
        for (name, kind) in names_in(root.as_fd(), at).unwrap_or_default() {
            if !matches!(kind, FileType::Directory | FileType::Unknown) {
                continue;
            }
            let below = folder.join(name);
            let Ok(about) = statat(&root, &below, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let path = source.join(&below);
            if !is_folder(&about) || !in_tree(&path) {
                continue;
            }
            match about.st_dev == own.st_dev {
                true => todo.push(below),
                false => found.push((path, about.st_ino)),
            }
        }
    }
    found
}
