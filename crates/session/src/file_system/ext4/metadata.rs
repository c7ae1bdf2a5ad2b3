//! Which blocks e2fsck will read, and a request for all of them at once. Without it, a check over a slow connection
//! waits for them one after another.
//!
//! This only saves time. Where the file system is damaged or unknown, nothing is asked for, and e2fsck reads on its own.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Advice, fadvise};

use crate::file_system::Read;
use crate::file_system::ext4::{
    BG_BLOCK_UNINIT, BG_INODE_UNINIT, BLOCK, STAMP_RANGE, SuperBlock, bytes_at,
    used::{block_number, in_bytes},
};
use crate::file_system::ranges::merged;

/// At most this much is asked for. e2fsck reads the tables of a larger file system ahead on its own, and they should not
/// push each other out of memory.
const AHEAD_BYTES_MAX: u64 = 32 << 20;
/// The kernel asks for at most its read-ahead at a time.
const REQUEST_BYTES: u64 = 128 << 10;

/// Asks the kernel for what e2fsck will read on the device. The kernel keeps it while the returned file is open.
pub(super) fn read_ahead(device: &Path) -> Option<File> {
    let file = File::open(device).ok()?;
    let mut read = |at: u64, buf: &mut [u8]| {
        file.read_exact_at(buf, at)
            .map_err(|error| error.to_string())
    };
    let mut first = vec![0; usize::try_from(STAMP_RANGE.end).ok()?];
    read(STAMP_RANGE.start, &mut first).ok()?;
    let ranges = SuperBlock::parse(&first)?.metadata_ranges(&mut read).ok()?;
    // From the end to the beginning: the volume does not take this for a file that is read in order, and does not read
    // beyond it.
    for range in ranges.iter().rev() {
        let mut end = range.end;
        while end > range.start {
            let start = end.saturating_sub(REQUEST_BYTES).max(range.start);
            let length = std::num::NonZeroU64::new(end - start);
            let _ = fadvise(&file, start, length, Advice::WillNeed);
            end = start;
        }
    }
    Some(file)
}

impl SuperBlock {
    /// Ranges of the volume, in bytes and in order: super block and descriptors with the blocks reserved for growing,
    /// the bitmaps and parts of inode tables that were ever used, and the beginning of the journal. At most
    /// [`AHEAD_BYTES_MAX`].
    fn metadata_ranges(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        if self.u32(0x18) != 2 {
            return Err("blocks are not of 4096 bytes".to_owned());
        }
        let descriptor_bytes = self.descriptor_bytes().unwrap_or(64) as u64;
        let descriptors = (self.groups() * descriptor_bytes).div_ceil(BLOCK);
        let grown = u64::from(self.u16(0xce));
        let mut blocks: Vec<Range<u64>> = Vec::new();
        blocks.push(0..1 + descriptors + grown);
        blocks.extend(self.journal_extents().iter().take(1).map(|first| {
            let start = first.start / BLOCK;
            start..start + 1
        }));
        let inode_bytes = u64::from(self.u16(0x58));
        let inodes = self.u32(0x28);
        self.each_descriptor(read, &mut |_, descriptor| {
            let low = |at: usize| u16::from_le_bytes(bytes_at(descriptor, at));
            let high = |at: usize| if descriptor.len() >= 64 { low(at) } else { 0 };
            let flags = low(0x12);
            if flags & BG_BLOCK_UNINIT == 0 {
                let bitmap = block_number(descriptor, 0x0, 0x20);
                blocks.push(bitmap..bitmap.saturating_add(1));
            }
            if flags & BG_INODE_UNINIT == 0 {
                let bitmap = block_number(descriptor, 0x4, 0x24);
                let unused = u32::from(high(0x32)) << 16 | u32::from(low(0x1c));
                let used = u64::from(inodes.saturating_sub(unused)) * inode_bytes;
                let table = block_number(descriptor, 0x8, 0x28);
                blocks.push(bitmap..bitmap.saturating_add(1));
                blocks.push(table..table.saturating_add(used.div_ceil(BLOCK)));
            }
        })?;
        let mut left = AHEAD_BYTES_MAX / BLOCK;
        blocks.retain(|range| {
            let len = range.end - range.start;
            let fits = range.end <= self.blocks() && len <= left;
            left -= if fits { len } else { 0 };
            fits
        });
        Ok(in_bytes(merged(blocks)))
    }
}

#[cfg(test)]
mod tests {
    use sprat_testkit::requires;

    use super::super::used::tests::{LAZY, OURS, Ranges, image, missing, ranges_of, run};
    use super::*;

    fn metadata_ranges(image: &File) -> Ranges {
        ranges_of(image, SuperBlock::metadata_ranges)
    }

    #[test]
    fn bitmaps_and_inodes_are_in_the_ranges_and_little_else() {
        requires!(missing());
        for (size, features) in [("9G", OURS), ("300M", &OURS.replace(",64bit", ""))] {
            let image = image(size, features, LAZY);
            let ranges = metadata_ranges(image.as_file()).unwrap();
            let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
            assert!(bytes < 8 << 20, "{bytes} of {size}");
            let copy = tempfile::NamedTempFile::new().unwrap();
            let len = image.as_file().metadata().unwrap().len();
            copy.as_file().set_len(len).unwrap();
            for range in &ranges {
                let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
                image
                    .as_file()
                    .read_exact_at(&mut bytes, range.start)
                    .unwrap();
                copy.as_file().write_all_at(&bytes, range.start).unwrap();
            }
            let [whole, copy] = [&image, &copy].map(|file| file.path().to_str().unwrap());
            // Bitmaps with their checksums, and the inode of each file and of the journal (8).
            for asked in (8..54).map(|inode| format!("stat <{inode}>")) {
                let said = run("debugfs", &["-R", &asked, whole]);
                assert_eq!(run("debugfs", &["-R", &asked, copy]), said, "{size}");
            }
            assert_eq!(
                run("debugfs", &["-R", "freefrag", copy]).replace(copy, ""),
                run("debugfs", &["-R", "freefrag", whole]).replace(whole, "")
            );
            let journal = run("debugfs", &["-R", "logdump -S", copy]);
            assert!(journal.contains("Total journal size"), "{journal}");
        }
    }

    #[test]
    fn nothing_is_asked_for_where_a_descriptor_is_damaged() {
        requires!(missing());
        let image = image("300M", OURS, LAZY);
        assert!(read_ahead(image.path()).is_some());
        image
            .as_file()
            .write_all_at(&[0x5A; 8], BLOCK + 0x8)
            .unwrap();
        assert!(metadata_ranges(image.as_file()).is_err());
        assert!(read_ahead(image.path()).is_none());
    }
}
