//! ext4 behind the seam. Its super block and tables are read without mounting it.
//!
//! Layout: Documentation/filesystems/ext4/{super,group_descr,journal}.rst. The bytes are foreign:
//! a structure that is not as it must be gives an error, or no range.

pub(super) mod fsck;
mod metadata;
mod used;

use std::ops::Range;
use std::path::Path;

use sprat_attach::MkfsOptions;
use sprat_store::hex;

use crate::Failure;
use crate::file_system::{
    FileSystemKind, FileSystemState, Read, STAMP_BLOCK_BYTES, Stamp, VolumeRoom,
};

/// The block that holds the super block, which each mount for writing changes.
pub(super) const STAMP_RANGE: Range<u64> = 0..STAMP_BLOCK_BYTES as u64;
/// ext4 with blocks of 4 KiB ends at 1 EiB.
pub(super) const VOLUME_BYTES_MAX: u64 = 1 << 60;

const BLOCK: u64 = 4096;
/// Where the super block begins in block 0, and its length. Both in bytes.
const SUPER_BLOCK_AT: usize = 1024;
const SUPER_BLOCK_BYTES: usize = 1024;
/// A file system of 1 EiB has fewer block groups.
const GROUPS_MAX: u64 = 1 << 33;

const MAGIC: u16 = 0xEF53;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const STATE_ERROR: u16 = 2;
const BG_INODE_UNINIT: u16 = 1;
const BG_BLOCK_UNINIT: u16 = 2;
const BG_INODE_ZEROED: u16 = 4;

/// Makes the file system.
pub(super) fn make(device: &Path, label: Option<&str>, inodes: Option<u64>) -> Result<(), Failure> {
    let mut options = MkfsOptions::labelled(label.unwrap_or_default());
    options.inodes = inodes;
    Ok(sprat_attach::make_file_system(device, &options)?)
}

/// Free space and inodes, as `statvfs` has them.
pub(super) fn room(root: &Path) -> Option<VolumeRoom> {
    let found = rustix::fs::statvfs(root).ok()?;
    Some(VolumeRoom {
        total_bytes: found.f_blocks * found.f_frsize,
        available_bytes: found.f_bavail * found.f_frsize,
        inodes: found.f_files,
        free_inodes: found.f_ffree,
        metadata: None,
    })
}

/// The counter is `s_kbytes_written`.
pub(super) const fn life_bytes(counter: u64) -> u64 {
    counter.saturating_mul(1024)
}

/// The super block: 1024 bytes with the right magic.
#[derive(Debug, Clone)]
pub(crate) struct SuperBlock {
    block: Vec<u8>,
}

impl SuperBlock {
    /// The super block in the volume's block 0. `None`: that is no ext4.
    pub(super) fn parse(block: &[u8]) -> Option<Self> {
        let block = block.get(SUPER_BLOCK_AT..SUPER_BLOCK_AT + SUPER_BLOCK_BYTES)?;
        let found = Self {
            block: block.to_vec(),
        };
        (found.u16(0x38) == MAGIC).then_some(found)
    }

    /// `s_blocks_count` times the block size.
    pub(super) fn len_bytes(&self) -> Option<u64> {
        let shift = self.u32(0x18);
        // 1 KiB << 6 = 64 KiB, ext4's largest block.
        (shift <= 6)
            .then(|| self.blocks().checked_mul(1024 << shift))
            .flatten()
    }

    pub(super) fn has_errors(&self) -> bool {
        self.u16(0x3a) & STATE_ERROR != 0
    }

    pub(super) fn needs_recovery(&self) -> bool {
        self.u32(0x60) & INCOMPAT_RECOVER != 0
    }

    /// The state, with the length of the container file.
    pub(super) fn state(&self, file_bytes: u64) -> FileSystemState {
        let used_blocks = self.blocks().saturating_sub(self.block_count(0xc, 0x158));
        let block_bytes = 1024_u64.checked_shl(self.u32(0x18)).unwrap_or(0);
        let wide = |low: usize| u64::from(self.u32(low)) | u64::from(self.u32(low + 4)) << 32;
        FileSystemState {
            used_bytes: used_blocks.saturating_mul(block_bytes),
            stamp: Stamp {
                file_system: FileSystemKind::Ext4,
                file_bytes,
                counter: wide(0x178),
                // `s_wtime_hi` has the upper 8 bits.
                written_s: u64::from(self.u32(0x30)) | u64::from(self.block[0x274]) << 32,
                digest: hex(&openssl::sha::sha256(&self.block)),
                open: self.needs_recovery(),
            },
            unsupported: None,
            errors: self.has_errors().then(|| self.u32(0x194).max(1)),
        }
    }

    /// Ranges, in bytes, of inode tables and bitmaps that were never initialised, and of the log of an
    /// empty journal. They are allocated, and nobody reads them before they are written.
    pub(super) fn disposable_ranges(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        if self.u32(0x18) != 2 || self.needs_recovery() {
            return Ok(Vec::new());
        }
        let mut ranges = self.unused_inode_tables(read)?;
        ranges.extend(self.empty_log(read)?);
        Ok(ranges)
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(bytes_at(&self.block, at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(bytes_at(&self.block, at))
    }

    fn blocks(&self) -> u64 {
        self.block_count(0x4, 0x150)
    }

    /// A count of blocks in two halves. The upper half is there with the feature `64bit` only.
    fn block_count(&self, low: usize, high: usize) -> u64 {
        let high = match self.u32(0x60) & INCOMPAT_64BIT {
            0 => 0,
            _ => u64::from(self.u32(high)),
        };
        high << 32 | u64::from(self.u32(low))
    }

    /// Two kinds of ranges. First, the part of each group's inode table behind its last inode that
    /// was ever used (`bg_itable_unused`), where the table was not zeroed. Nobody reads that part
    /// before writing it. Second, the bitmaps that were never written: 8 KiB for each 128 MiB, which
    /// is 320 MiB of 5 TiB.
    fn unused_inode_tables(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        let known = self.u32(0x64) & RO_COMPAT_METADATA_CSUM != 0
            && self.u32(0x5c) & COMPAT_SPARSE_SUPER2 == 0
            && self.u32(0x20) > 0
            && self.descriptor_bytes().is_some()
            && (128..=4096).contains(&self.u16(0x58));
        if !known {
            return Ok(Vec::new());
        }
        let (inodes_per_group, inode_bytes) = (self.u32(0x28), u64::from(self.u16(0x58)));
        let mut ranges: Vec<Range<u64>> = Vec::new();
        self.each_descriptor(read, &mut |_, descriptor| {
            let table = unused_of(descriptor, inodes_per_group, inode_bytes);
            let unused = table.into_iter().chain(unwritten_bitmaps(descriptor));
            ranges.extend(unused.filter(|range| range.end <= self.blocks() * BLOCK));
        })?;
        Ok(ranges)
    }

    /// Length of a group descriptor in bytes. `None`: the super block has an impossible one.
    fn descriptor_bytes(&self) -> Option<usize> {
        let bytes = match self.u32(0x60) & INCOMPAT_64BIT {
            0 => 32,
            _ => usize::from(self.u16(0xfe)),
        };
        ((32..=1024).contains(&bytes) && bytes.is_power_of_two()).then_some(bytes)
    }

    fn groups(&self) -> u64 {
        self.blocks().div_ceil(u64::from(self.u32(0x20)).max(1))
    }

    /// Reads the descriptors of all groups. A descriptor that does not match its checksum is an error.
    fn each_descriptor(
        &self,
        read: &mut Read<'_>,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), String> {
        let Some(descriptor_bytes) = self.descriptor_bytes() else {
            return Err("the super block has an impossible size of descriptors".to_owned());
        };
        let groups = self.groups();
        if groups > GROUPS_MAX {
            return Err("the super block has an impossible size".to_owned());
        }
        let per_block = 4096 / descriptor_bytes as u64;
        let seed = self.checksum_seed();
        let mut table = vec![0; 4096];
        for number in 0..groups.div_ceil(per_block) {
            let at = self.descriptor_block(number, per_block, u64::from(self.u32(0x20)));
            read(at * BLOCK, &mut table)?;
            for (slot, descriptor) in table.chunks_exact(descriptor_bytes).enumerate() {
                let group = number * per_block + slot as u64;
                if group >= groups {
                    break;
                }
                if !checksum_fits(descriptor, seed, group) {
                    return Err(format!("the descriptor of block group {group} is damaged"));
                }
                visit(group, descriptor);
            }
        }
        Ok(())
    }

    /// Whether a group begins with a copy of the super block.
    fn has_super(&self, group: u64) -> bool {
        let sparse = self.u32(0x64) & RO_COMPAT_SPARSE_SUPER != 0;
        !sparse || group <= 1 || [3, 5, 7].iter().any(|base| is_power(group, *base))
    }

    /// Where the descriptors' block `number` lies (`descriptor_loc` in fs/ext4/super.c).
    fn descriptor_block(&self, number: u64, per_block: u64, blocks_per_group: u64) -> u64 {
        let meta_bg = self.u32(0x60) & INCOMPAT_META_BG != 0;
        if !meta_bg || number < u64::from(self.u32(0x104)) {
            return 1 + number;
        }
        let group = number * per_block;
        group * blocks_per_group + u64::from(self.has_super(group))
    }

    fn checksum_seed(&self) -> u32 {
        if self.u32(0x60) & INCOMPAT_CSUM_SEED != 0 {
            return self.u32(0x270);
        }
        crc32c(!0, &self.block[0x68..0x78])
    }

    /// The journal's blocks in ranges of bytes, by the super block's copy of the journal's block map (`s_jnl_blocks`).
    /// Empty where that map is not one level of extents.
    fn journal_extents(&self) -> Vec<Range<u64>> {
        const EXTENTS: usize = 1;
        let map = &self.block[0x10c..0x10c + 60];
        let of_map = |at: usize| u16::from_le_bytes(bytes_at(map, at));
        let known = usize::from(self.block[0xfd]) == EXTENTS
            && self.u32(0xe0) == 8
            && of_map(0) == 0xF30A
            && of_map(6) == 0
            && of_map(2) <= 4;
        if !known {
            return Vec::new();
        }
        let mut ranges = Vec::new();
        for extent in map[12..].chunks_exact(12).take(usize::from(of_map(2))) {
            let logical = u32::from_le_bytes(bytes_at(extent, 0));
            let count = u64::from(u16::from_le_bytes(bytes_at(extent, 4)));
            let high = u64::from(u16::from_le_bytes(bytes_at(extent, 6)));
            let start = high << 32 | u64::from(u32::from_le_bytes(bytes_at(extent, 8)));
            // A longer count marks an unwritten extent. A journal has none.
            if count > 0x8000
                || (ranges.is_empty() && logical != 0)
                || start + count > self.blocks()
            {
                return Vec::new();
            }
            ranges.push(start * BLOCK..(start + count) * BLOCK);
        }
        ranges
    }

    /// The journal's blocks behind its own super block, if the journal's super block says that the log
    /// is empty: all transactions there were replayed long ago.
    fn empty_log(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        let mut ranges = self.journal_extents();
        let Some(first) = ranges.first_mut() else {
            return Ok(Vec::new());
        };
        let mut journal = vec![0; 4096];
        read(first.start, &mut journal)?;
        let word = |at: usize| u32::from_be_bytes(bytes_at(&journal, at));
        // Magic, a super block of either version, blocks of 4096, and `s_start` 0: empty.
        let empty =
            word(0) == 0xC03B_3998 && matches!(word(4), 3 | 4) && word(12) == 4096 && word(28) == 0;
        // `s_first`: where the log begins. The journal's super block lies before it.
        let begin = u64::from(word(20)) * BLOCK;
        if !empty || begin == 0 || begin > first.end - first.start {
            return Ok(Vec::new());
        }
        first.start += begin;
        Ok(ranges)
    }
}

fn unused_of(descriptor: &[u8], inodes_per_group: u32, inode_bytes: u64) -> Option<Range<u64>> {
    let low = |at: usize| u16::from_le_bytes(bytes_at(descriptor, at));
    let wide = descriptor.len() >= 64;
    let flags = low(0x12);
    if flags & BG_INODE_ZEROED != 0 {
        return None;
    }
    let mut table = u64::from(u32::from_le_bytes(bytes_at(descriptor, 0x8)));
    let mut unused = u32::from(low(0x1c));
    if wide {
        table |= u64::from(u32::from_le_bytes(bytes_at(descriptor, 0x28))) << 32;
        unused |= u32::from(low(0x32)) << 16;
    }
    if flags & BG_INODE_UNINIT != 0 {
        unused = inodes_per_group;
    }
    let used = u64::from(inodes_per_group.checked_sub(unused)?) * inode_bytes;
    let whole = (u64::from(inodes_per_group) * inode_bytes).next_multiple_of(BLOCK);
    let table = table.checked_mul(BLOCK)?;
    let range = table + used.next_multiple_of(BLOCK)..table + whole;
    (!range.is_empty()).then_some(range)
}

/// The block bitmap and the inode bitmap of a group, if the flags say that they were never written.
/// The kernel then computes them instead of reading them (`ext4_read_block_bitmap_nowait` and
/// `ext4_read_inode_bitmap` in fs/ext4), and so does e2fsck.
fn unwritten_bitmaps(descriptor: &[u8]) -> Vec<Range<u64>> {
    let wide = descriptor.len() >= 64;
    let block_at = |low: usize, high: usize| {
        let high = if wide {
            u32::from_le_bytes(bytes_at(descriptor, high))
        } else {
            0
        };
        u64::from(high) << 32 | u64::from(u32::from_le_bytes(bytes_at(descriptor, low)))
    };
    let flags = u16::from_le_bytes(bytes_at(descriptor, 0x12));
    [
        (BG_BLOCK_UNINIT, block_at(0x0, 0x20)),
        (BG_INODE_UNINIT, block_at(0x4, 0x24)),
    ]
    .into_iter()
    .filter(|(flag, block)| flags & flag != 0 && *block > 0)
    .filter_map(|(_, block)| {
        let start = block.checked_mul(BLOCK)?;
        Some(start..start.checked_add(BLOCK)?)
    })
    .collect()
}

/// The descriptor's `bg_checksum` (fs/ext4/super.c: `ext4_group_desc_csum`).
fn checksum_fits(descriptor: &[u8], seed: u32, group: u64) -> bool {
    let Ok(group) = u32::try_from(group) else {
        return false;
    };
    let mut crc = crc32c(seed, &group.to_le_bytes());
    crc = crc32c(crc, &descriptor[..0x1e]);
    crc = crc32c(crc, &[0, 0]);
    crc = crc32c(crc, &descriptor[0x20..]);
    (crc & 0xffff) == u32::from(u16::from_le_bytes(bytes_at(descriptor, 0x1e)))
}

/// CRC-32C as ext4 uses it: no inversion at the end.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82F6_3B78
            } else {
                crc >> 1
            }
        })
    })
}

fn is_power(number: u64, base: u64) -> bool {
    std::iter::successors(Some(base), |power| power.checked_mul(base))
        .take_while(|power| *power <= number)
        .any(|power| power == number)
}

/// Bytes of a block, which is long enough; zeros where it is not.
fn bytes_at<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some(found) = block.get(at..at + N) {
        bytes.copy_from_slice(found);
    }
    bytes
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    /// A volume's block 0 with these counters in its super block.
    pub(crate) fn stamp_block(counter: u64, written_s: u32, errors: u32) -> Vec<u8> {
        let mut block = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| {
            block[1024 + at..1024 + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0x38, &MAGIC.to_le_bytes());
        put(
            0x3a,
            &u16::from(errors > 0)
                .wrapping_mul(STATE_ERROR)
                .to_le_bytes(),
        );
        put(0x30, &written_s.to_le_bytes());
        put(0x178, &counter.to_le_bytes());
        put(0x194, &errors.to_le_bytes());
        block
    }

    #[test]
    fn checksum_is_crc32c() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(!crc32c(!0, &[0; 32]), 0x8A91_36AA);
    }

    #[test]
    fn backup_super_blocks_lie_in_powers_of_three_five_and_seven() {
        let has = |group: u64| [3, 5, 7].iter().any(|base| is_power(group, *base));
        let found: Vec<u64> = (0..130).filter(|group| has(*group)).collect();
        assert_eq!(found, [3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    /// Makes an image, fills its disposable ranges with noise, and runs e2fsck on it.
    fn survives_noise(size: &str, features: &[&str]) {
        sprat_testkit::requires!(
            sprat_testkit::needs::program("mkfs.ext4")
                .or_else(|| sprat_testkit::needs::program("e2fsck"))
        );
        let image = tempfile::NamedTempFile::new().unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-b", "4096"])
            .args(features)
            .arg(image.path())
            .arg(size)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .status();
        assert!(made.unwrap().success());
        let file = File::options()
            .read(true)
            .write(true)
            .open(image.path())
            .unwrap();
        let mut read = |at: u64, buf: &mut [u8]| {
            file.read_exact_at(buf, at)
                .map_err(|error| error.to_string())
        };
        let mut first = vec![0; 4096];
        read(0, &mut first).unwrap();
        let found = SuperBlock::parse(&first).unwrap();
        assert!(!found.has_errors() && !found.needs_recovery());
        let ranges = found.disposable_ranges(&mut read).unwrap();
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        assert!(bytes > 10 << 20, "{bytes} of {size} with {features:?}");
        assert!(
            ranges.iter().any(|range| range.end - range.start == BLOCK),
            "no bitmap is among {ranges:?}"
        );
        for range in &ranges {
            for at in (range.start..range.end).step_by(4096) {
                file.write_all_at(&[0xA5; 4096], at).unwrap();
            }
        }
        let checked = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(image.path())
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .unwrap();
        assert!(
            checked.status.success(),
            "{}",
            String::from_utf8_lossy(&checked.stdout)
        );
    }

    #[test]
    fn noise_in_disposable_ranges_harms_no_file_system() {
        let ours = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,\
                    sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
        let lazy = "lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1";
        survives_noise("1500M", &["-O", ours, "-E", lazy]);
        let meta_bg = ours.replace("resize_inode", "meta_bg");
        survives_noise("9G", &["-O", &meta_bg, "-E", "lazy_itable_init=1"]);
    }
}
