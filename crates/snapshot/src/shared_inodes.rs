//! The inodes of a snapshot on a btrfs volume, to recognise the files that another tree shares with it.
//!
//! There, each snapshot is a file system of its own for `stat`, and a shared file has the same inode number and the
//! same time of its last change in both. To examine all files of both trees by their paths takes longer than
//! rsync's whole comparison. The attributes of one side come from its tree instead, all at once.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::Path;

use rustix::fs::{FileType, Stat};

use crate::cancel::Cancel;
use crate::subvolume_ops::{InodeVersion, Subvolumes};
use crate::tree::TreeFolder;
use crate::walk::Listed;

/// The inodes of one snapshot.
#[derive(Debug)]
pub struct SharedInodes {
    device: u64,
    hasher: RandomState,
    /// The number of each inode, and a hash of its attributes. Sorted. A hash, because a snapshot may have millions
    /// of files. Its key is random, so nobody can choose attributes with the same hash.
    known: Vec<(u64, u64)>,
}

impl SharedInodes {
    /// Reads the inodes of the snapshot at `path`. It is read-only, so its last commit has all of it. After a cancel
    /// some may be missing.
    pub(crate) fn read(
        subvolumes: &dyn Subvolumes,
        path: &Path,
        cancel: &Cancel,
    ) -> io::Result<Self> {
        let top = TreeFolder::of_machine(path)?.ok_or(io::ErrorKind::NotFound)?;
        let mut this = Self {
            device: top.device()?,
            hasher: RandomState::new(),
            known: Vec::new(),
        };
        subvolumes.inodes(path, &mut |inode| {
            let hash = this.hasher.hash_one(inode.version);
            this.known.push((inode.number, hash));
            !cancel.is_cancelled()
        })?;
        this.known.sort_unstable();
        Ok(this)
    }

    /// Whether the folder is one of the snapshot.
    pub(crate) fn has_folder(&self, folder: &TreeFolder) -> io::Result<bool> {
        Ok(folder.device()? == self.device)
    }

    /// Whether a file is the same in both trees: `old` is its name in a folder of the snapshot, `new` that in
    /// `folder`. False where that must be found out in another way.
    pub(crate) fn has(&self, old: &Listed, new: &Listed, folder: &TreeFolder) -> io::Result<bool> {
        let can_be =
            |entry: &Listed| matches!(entry.kind, FileType::RegularFile | FileType::Symlink);
        if old.inode != new.inode || !can_be(old) || !can_be(new) {
            return Ok(false);
        }
        let stat = folder.stat(&new.name)?;
        Ok(stat.is_some_and(|stat| stat.st_ino == old.inode && self.knows(&stat)))
    }

    fn knows(&self, stat: &Stat) -> bool {
        let Some(version) = version_of(stat) else {
            return false;
        };
        let inode = (stat.st_ino, self.hasher.hash_one(version));
        self.known.binary_search(&inode).is_ok()
    }
}

fn version_of(stat: &Stat) -> Option<InodeVersion> {
    Some(InodeVersion {
        bytes: u64::try_from(stat.st_size).ok()?,
        mode: stat.st_mode,
        user: stat.st_uid,
        group: stat.st_gid,
        modified: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).ok()?),
        changed: (stat.st_ctime, u32::try_from(stat.st_ctime_nsec).ok()?),
    })
}
