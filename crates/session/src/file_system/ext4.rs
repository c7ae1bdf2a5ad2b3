//! What an ext4 file system says of itself, read without mounting it: whether it is in order, and
//! which of its blocks hold nothing though they are not free.
//!
//! Layout: Documentation/filesystems/ext4/{super,group_descr,journal}.rst. Foreign bytes: whatever
//! does not look as it must gives an error, or no range.

mod in_use;

use std::ops::Range;

const BLOCK: u64 = 4096;
/// More block groups than 1 EiB has are no ext4's.
const GROUPS_MAX: u64 = 1 << 33;

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

/// The super block, as far as it is used.
pub(crate) struct Super {
    block: Vec<u8>,
}

/// Fills the second argument from an offset of the volume, in plaintext.
pub(crate) type Read<'r> = dyn FnMut(u64, &mut [u8]) -> Result<(), String> + 'r;

impl Super {
    /// Reads it; an error where there is no ext4.
    pub(crate) fn read(read: &mut Read<'_>) -> Result<Self, String> {
        let mut first = vec![0; 4096];
        read(0, &mut first)?;
        let block = first.split_off(1024);
        let found = Self { block };
        if found.u16(0x38) != 0xEF53 {
            return Err("no ext4 file system is on the volume".to_owned());
        }
        Ok(found)
    }

    /// The file system was found to have errors and was not checked since.
    pub(crate) fn has_errors(&self) -> bool {
        self.u16(0x3a) & STATE_ERROR != 0
    }

    /// The journal holds what the file system lacks.
    pub(crate) fn needs_recovery(&self) -> bool {
        self.u32(0x60) & INCOMPAT_RECOVER != 0
    }

    /// Ranges, in bytes, that hold nothing that anybody reads, though they are not free: inode
    /// tables and bitmaps that were never initialised, and the log of a journal that is empty. What is not of
    /// the kind that sprat makes gives no range.
    pub(crate) fn hollow(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
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
        let high = if self.u32(0x60) & INCOMPAT_64BIT != 0 {
            u64::from(self.u32(0x150))
        } else {
            0
        };
        high << 32 | u64::from(self.u32(0x4))
    }

    /// The part of each group's inode table behind its last inode that was ever used
    /// (`bg_itable_unused`), where the table was not zeroed: nobody reads it before writing it. And
    /// the bitmaps that were never written, 8 KiB for each 128 MiB: 320 MiB of 5 TiB.
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

    /// Bytes of a group's descriptor; `None` where that is none that there can be.
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

    /// Reads the descriptors of all groups; one that does not match its checksum is an error.
    fn each_descriptor(
        &self,
        read: &mut Read<'_>,
        meet: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), String> {
        let Some(descriptor_bytes) = self.descriptor_bytes() else {
            return Err("the super block has an impossible size of descriptors".to_owned());
        };
        let groups = self.groups();
        if groups > GROUPS_MAX {
            return Err("the super block tells an impossible size".to_owned());
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
                meet(group, descriptor);
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

    /// The journal's blocks behind its own super block, where that says that the log is empty: what
    /// lies there was carried out long ago. Found by the copy of the journal's map that the super
    /// block keeps (`s_jnl_blocks`), where that is one level of extents.
    fn empty_log(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        const EXTENTS: usize = 1;
        let map = &self.block[0x10c..0x10c + 60];
        let of_map = |at: usize| u16::from_le_bytes(bytes_at(map, at));
        let known = usize::from(self.block[0xfd]) == EXTENTS
            && self.u32(0xe0) == 8
            && of_map(0) == 0xF30A
            && of_map(6) == 0
            && of_map(2) <= 4;
        if !known {
            return Ok(Vec::new());
        }
        let mut ranges = Vec::new();
        for extent in map[12..].chunks_exact(12).take(usize::from(of_map(2))) {
            let logical = u32::from_le_bytes(bytes_at(extent, 0));
            let count = u64::from(u16::from_le_bytes(bytes_at(extent, 4)));
            let high = u64::from(u16::from_le_bytes(bytes_at(extent, 6)));
            let start = high << 32 | u64::from(u32::from_le_bytes(bytes_at(extent, 8)));
            // Unwritten extents have longer counts; a journal has none.
            if count > 0x8000
                || (ranges.is_empty() && logical != 0)
                || start + count > self.blocks()
            {
                return Ok(Vec::new());
            }
            ranges.push(start * BLOCK..(start + count) * BLOCK);
        }
        let Some(first) = ranges.first_mut() else {
            return Ok(Vec::new());
        };
        let mut journal = vec![0; 4096];
        read(first.start, &mut journal)?;
        let word = |at: usize| u32::from_be_bytes(bytes_at(&journal, at));
        // Magic, a super block of either version, blocks of 4096, and `s_start` 0: empty.
        let empty =
            word(0) == 0xC03B_3998 && matches!(word(4), 3 | 4) && word(12) == 4096 && word(28) == 0;
        // `s_first`: where the log begins; before it lies the super block (and fast commits behind).
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

/// The block bitmap and the inode bitmap of a group, where the flags say that they were never
/// written: the kernel then makes them up instead of reading them (`ext4_read_block_bitmap_nowait`
/// and `ext4_read_inode_bitmap` in fs/ext4), and so does e2fsck.
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
fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
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

/// Bytes of a block whose length is known to reach so far.
fn bytes_at<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some(found) = block.get(at..at + N) {
        bytes.copy_from_slice(found);
    }
    bytes
}

/// The length in bytes that an ext4 super block, at the start of `block`, gives the file system; `None` where it is none.
pub fn ext4_bytes(block: &[u8]) -> Option<u64> {
    let u32_at = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(block.get(at..at + 4)?.try_into().ok()?))
    };
    let magic = u16::from_le_bytes(block.get(0x38..0x3a)?.try_into().ok()?);
    if magic != 0xEF53 {
        return None;
    }
    let incompat_64bit = u32_at(0x60)? & 0x80 != 0;
    let high = if incompat_64bit { u32_at(0x150)? } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(u32_at(0x4)?);
    let shift = u32_at(0x18)?;
    // 1 KiB << 6 = 64 KiB, ext4's largest block.
    (shift <= 6)
        .then(|| blocks.checked_mul(1024 << shift))
        .flatten()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_checksum_is_the_castagnoli_one() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(!crc32c(!0, &[0; 32]), 0x8A91_36AA);
    }

    #[test]
    fn backup_super_blocks_lie_in_powers_of_three_five_and_seven() {
        let has = |group: u64| [3, 5, 7].iter().any(|base| is_power(group, *base));
        let found: Vec<u64> = (0..130).filter(|group| has(*group)).collect();
        assert_eq!(found, [3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    /// Makes an image, fills what is said to be hollow with noise, and has e2fsck look at it.
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
        let found = Super::read(&mut read).unwrap();
        assert!(!found.has_errors() && !found.needs_recovery());
        let hollow = found.hollow(&mut read).unwrap();
        let bytes: u64 = hollow.iter().map(|range| range.end - range.start).sum();
        assert!(bytes > 10 << 20, "{bytes} of {size} with {features:?}");
        assert!(
            hollow.iter().any(|range| range.end - range.start == BLOCK),
            "no bitmap is among {hollow:?}"
        );
        for range in &hollow {
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
    fn noise_in_what_is_hollow_harms_no_file_system() {
        let ours = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,\
                    sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
        let lazy = "lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1";
        survives_noise("1500M", &["-O", ours, "-E", lazy]);
        let meta_bg = ours.replace("resize_inode", "meta_bg");
        survives_noise("9G", &["-O", &meta_bg, "-E", "lazy_itable_init=1"]);
    }
}
