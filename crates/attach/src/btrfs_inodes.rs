//! Lists the inodes of a btrfs subvolume from its tree. That is much quicker than to examine each file by its
//! path.
//!
//! Layout: include/uapi/linux/btrfs_tree.h, `struct btrfs_inode_item`. The bytes are foreign.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use crate::AttachError;
use crate::scrub;
use crate::sys::{self, SearchKey};

/// The first and the last object that can be an inode of a file (`BTRFS_FIRST_FREE_OBJECTID`,
/// `BTRFS_LAST_FREE_OBJECTID`).
const FIRST: u64 = 256;
const LAST: u64 = u64::MAX - 255;
const INODE_ITEM: u32 = 1;

/// An inode, as the last commit has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BtrfsInode {
    /// Its number.
    pub number: u64,
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

/// Calls `meet` with each inode of the subvolume `path`, in the order of their numbers, until it returns false. What
/// was changed since the last commit may be missing.
pub fn each_btrfs_inode(
    path: &Path,
    meet: &mut dyn FnMut(BtrfsInode) -> bool,
) -> Result<(), AttachError> {
    let failed = |e: io::Error| AttachError::io("read the tree of", path.display().to_string(), e);
    let folder = File::open(path).map_err(failed)?;
    let unknown = || failed(io::Error::other("it has an item that sprat does not know"));
    let mut next = FIRST;
    while next <= LAST {
        let mut key = SearchKey::items(0, next, 0, 0);
        key.bounds[2] = LAST;
        key.types[1] = u32::MAX;
        let (count, found) = sys::btrfs_search(folder.as_fd(), key).map_err(failed)?;
        let items = scrub::items_with_keys(count, &found).ok_or_else(unknown)?;
        for (key, item) in &items {
            if key.kind == INODE_ITEM && !meet(parse(key.object, item).ok_or_else(unknown)?) {
                return Ok(());
            }
        }
        let Some((last, _)) = items.last() else {
            return Ok(());
        };
        // The inode is the first item of its object. The others are skipped: a file may have many extents.
        next = last.object + 1;
    }
    Ok(())
}

fn parse(number: u64, item: &[u8]) -> Option<BtrfsInode> {
    let time = |at: usize| {
        let seconds = i64::from_le_bytes(*item.get(at..)?.first_chunk()?);
        let nanoseconds = u32::from_le_bytes(*item.get(at + 8..)?.first_chunk()?);
        Some((seconds, nanoseconds))
    };
    let word = |at: usize| Some(u32::from_le_bytes(*item.get(at..)?.first_chunk()?));
    Some(BtrfsInode {
        number,
        bytes: u64::from_le_bytes(*item.get(16..)?.first_chunk()?),
        user: word(44)?,
        group: word(48)?,
        mode: word(52)?,
        changed: time(124)?,
        modified: time(136)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_item_is_refused() {
        let item = [7; 160];
        assert!(parse(300, &item).is_some());
        assert!(parse(300, &item[..147]).is_none());
    }
}
