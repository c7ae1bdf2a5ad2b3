//! The operations on subvolumes of a btrfs volume. The snapshots of such a volume are subvolumes.

use std::io;
use std::path::Path;

/// What a btrfs volume can do with subvolumes. All paths are on the mounted volume.
///
/// The caller of this crate implements it with the kernel's ioctls.
pub trait Subvolumes: Sync {
    /// Makes an empty, writable subvolume.
    fn make(&self, path: &Path) -> io::Result<()>;

    /// Makes `path` a snapshot of the subvolume `of`. All that was written to the volume before is durable
    /// with it when this returns: it is one commit.
    fn snapshot(&self, of: &Path, path: &Path, read_only: bool) -> io::Result<()>;

    /// Deletes a subvolume, also a read-only one. Its name is gone at once, its space comes back later.
    fn delete(&self, path: &Path) -> io::Result<()>;

    /// Whether the folder is a subvolume.
    fn is_subvolume(&self, path: &Path) -> io::Result<bool>;

    /// Commits, and makes the kernel go on with the space of deleted subvolumes.
    fn commit(&self, volume_root: &Path) -> io::Result<()>;

    /// Whether deleted subvolumes still take space. The kernel frees it only in a session that lives long
    /// enough, after a [`commit`](Self::commit).
    fn deletions_pending(&self, volume_root: &Path) -> io::Result<bool>;

    /// Calls `meet` with each inode of a subvolume, until it returns false. What was changed since the last commit
    /// may be missing. An error costs time only: then each file is examined by its path.
    fn inodes(&self, subvolume: &Path, meet: &mut dyn FnMut(InodeFacts) -> bool) -> io::Result<()>;
}

/// What the tree of a subvolume has about an inode.
#[derive(Debug, Clone, Copy)]
pub struct InodeFacts {
    /// Its number.
    pub number: u64,
    /// The attributes that a change of the file changes.
    pub version: InodeVersion,
}

/// The attributes by which a file of one snapshot is the same in another one that has its inode. The time of the
/// last change of the inode alone would do; the others are compared to be safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InodeVersion {
    /// Its size.
    pub bytes: u64,
    /// Type and mode bits, as `st_mode` has them.
    pub mode: u32,
    /// The number of the owner.
    pub user: u32,
    /// The number of the group.
    pub group: u32,
    /// The time of the last change of the content: seconds and nanoseconds.
    pub modified: (i64, u32),
    /// The time of the last change of the inode.
    pub changed: (i64, u32),
}
