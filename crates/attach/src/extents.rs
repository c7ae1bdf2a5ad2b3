//! Finds the byte ranges of the device that contain a file's content.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use crate::sys::{FIEMAP_EXTENTS, FiemapExtent, fiemap};

/// `FIEMAP_EXTENT_LAST` (include/uapi/linux/fiemap.h).
const LAST: u32 = 0x1;
/// `FIEMAP_EXTENT_UNKNOWN` and `FIEMAP_EXTENT_DELALLOC`: not yet placed on the device.
const NO_PLACE: u32 = 0x2 | 0x4;
/// `FIEMAP_EXTENT_DATA_INLINE`.
const INLINE: u32 = 0x200;

/// The byte ranges of the device that contain a file's content, in file order (FIEMAP,
/// Documentation/filesystems/fiemap.rst). Fails if the file system can't report them.
pub fn extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    extents_without(file, NO_PLACE)
}

/// As [`extents`], of a file on a btrfs: the addresses of its content in the file system, not on the
/// device. Content that is in the trees has none.
pub(crate) fn logical_extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    extents_without(file, NO_PLACE | INLINE)
}

/// Skips extents with one of these flags.
fn extents_without(file: &File, skipped: u32) -> io::Result<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut start = 0;
    loop {
        let part = fiemap(file.as_fd(), start)?;
        let Some(last) = part.last() else {
            return Ok(found);
        };
        let next = last.logical.saturating_add(last.length);
        let ended = last.flags & LAST != 0 || part.len() < FIEMAP_EXTENTS || next <= start;
        let placed = part.iter().filter(|extent| extent.flags & skipped == 0);
        found.extend(placed.map(place_of));
        if ended {
            return Ok(found);
        }
        start = next;
    }
}

fn place_of(extent: &FiemapExtent) -> Range<u64> {
    extent.physical..extent.physical.saturating_add(extent.length)
}
