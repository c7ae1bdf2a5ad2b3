//! Which blocks of an ext4 file system are in use, by its own bitmaps. A copy of a container needs this
//! if nothing else shows where the container has data.
//!
//! A block that a copy leaves out is lost. So everything that the answer depends on must match its
//! checksum: super block, group descriptors and bitmaps. A wrong checksum or an unknown feature is an
//! error, and the caller then treats the whole container as in use.

use std::ops::Range;

use crate::file_system::Read;
use crate::file_system::ext4::{
    BG_BLOCK_UNINIT, BLOCK, RO_COMPAT_METADATA_CSUM, SuperBlock, bytes_at, crc32c,
};
use crate::file_system::ranges::{merged, without};

/// Features that do not change the meaning of the bitmaps (`EXT4_FEATURE_INCOMPAT_…` in fs/ext4/ext4.h):
/// `filetype`, `extent`, `64bit`, `mmp`, `flex_bg`, `ea_inode`, `metadata_csum_seed`, `large_dir`,
/// `inline_data`, `encrypt`, `casefold`.
const INCOMPAT_KNOWN: u32 =
    0x2 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;
/// `sparse_super`, `large_file`, `huge_file`, `dir_nlink`, `extra_isize`, `quota`, `metadata_csum`,
/// `project`, `verity`. Not `bigalloc`, where a bit stands for several blocks.
const RO_COMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x100 | 0x400 | 0x2000 | 0x8000;

/// A block group, by its descriptor.
struct Group {
    number: u64,
    first: u64,
    blocks: u64,
    bitmap: u64,
    bitmap_checksum: u32,
    /// Of `bitmap_checksum` only the lower half is kept in short descriptors.
    checksum_mask: u32,
    free: u64,
}

impl SuperBlock {
    /// Ranges of the volume, in bytes and in order, of all blocks that are in use, without the
    /// [disposable](Self::disposable_ranges) ones. `read` gets one call for each block; most of the blocks
    /// lie side by side.
    pub(in crate::file_system) fn used_ranges(
        &self,
        read: &mut Read<'_>,
    ) -> Result<Vec<Range<u64>>, String> {
        self.require_known_features()?;
        let mut used = Vec::new();
        let mut groups = Vec::new();
        self.each_descriptor(read, &mut |number, descriptor| {
            self.metadata_of(number, descriptor, &mut used);
            groups.extend(self.group(number, descriptor));
        })?;
        let mut bitmap = vec![0; 4096];
        for group in &groups {
            if group.bitmap >= self.blocks() {
                return Err(format!("block group {} has no bitmap", group.number));
            }
            read(group.bitmap * BLOCK, &mut bitmap)?;
            self.add_used(group, &bitmap, &mut used)?;
        }
        let used = merged(used);
        if used.last().is_some_and(|last| last.end > self.blocks()) {
            return Err("a block group is larger than the file system".to_owned());
        }
        Ok(without(
            &in_bytes(used),
            &merged(self.disposable_ranges(read)?),
        ))
    }

    fn require_known_features(&self) -> Result<(), String> {
        if self.u32(0x3fc) != crc32c(!0, &self.block[..0x3fc]) {
            return Err("the super block does not match its checksum".to_owned());
        }
        if self.has_errors() {
            return Err("the file system is marked as damaged".to_owned());
        }
        if self.needs_recovery() {
            return Err("the last session did not end, and its journal is not replayed".to_owned());
        }
        let (incompat, ro_compat) = (self.u32(0x60), self.u32(0x64));
        let known = incompat & !INCOMPAT_KNOWN == 0
            && ro_compat & !RO_COMPAT_KNOWN == 0
            && ro_compat & RO_COMPAT_METADATA_CSUM != 0
            // Blocks of 4096 bytes, the first of which is block 0.
            && self.u32(0x18) == 2
            && self.u32(0x14) == 0
            && (8..=8 * 4096).contains(&self.u32(0x20))
            && self.u32(0x20).is_multiple_of(8);
        match known {
            true => Ok(()),
            false => Err("the file system has features that sprat does not know".to_owned()),
        }
    }

    /// The group's bitmap. `None`: it was never written, so only metadata is in use.
    fn group(&self, number: u64, descriptor: &[u8]) -> Option<Group> {
        let low = |at: usize| u16::from_le_bytes(bytes_at(descriptor, at));
        let wide = descriptor.len() >= 64;
        let high = |at: usize| if wide { low(at) } else { 0 };
        if low(0x12) & BG_BLOCK_UNINIT != 0 {
            return None;
        }
        let per_group = u64::from(self.u32(0x20));
        let first = number * per_group;
        Some(Group {
            number,
            first,
            blocks: per_group.min(self.blocks().saturating_sub(first)),
            bitmap: block_number(descriptor, 0x0, 0x20),
            bitmap_checksum: u32::from(high(0x38)) << 16 | u32::from(low(0x18)),
            checksum_mask: if wide { !0 } else { 0xffff },
            free: u64::from(u32::from(high(0x2c)) << 16 | u32::from(low(0xc))),
        })
    }

    /// The metadata of a group: bitmaps and inode table, wherever they lie, and a copy of the super block.
    /// For a group without a written bitmap there is no other record of them (`ext4_init_block_bitmap` in
    /// fs/ext4/balloc.c).
    fn metadata_of(&self, number: u64, descriptor: &[u8], used: &mut Vec<Range<u64>>) {
        let one = |block: u64| block..block.saturating_add(1);
        used.push(one(block_number(descriptor, 0x0, 0x20)));
        used.push(one(block_number(descriptor, 0x4, 0x24)));
        let table = block_number(descriptor, 0x8, 0x28);
        let bytes = u64::from(self.u32(0x28)) * u64::from(self.u16(0x58));
        used.push(table..table.saturating_add(bytes.div_ceil(BLOCK)));
        if self.has_super(number) {
            let first = number * u64::from(self.u32(0x20));
            let descriptors = self.groups().div_ceil(4096 / descriptor.len() as u64);
            let grown = u64::from(self.u16(0xce));
            let end = first.saturating_add(1 + descriptors + grown);
            used.push(first..end.min(self.blocks()));
        }
    }

    /// Adds the blocks that the bitmap of a group marks as used. An error: the bitmap does not match its
    /// checksum or the count of free blocks in the descriptor.
    fn add_used(
        &self,
        group: &Group,
        bitmap: &[u8],
        used: &mut Vec<Range<u64>>,
    ) -> Result<(), String> {
        let damaged = || format!("the bitmap of block group {} is damaged", group.number);
        let bytes = self.u32(0x20) as usize / 8;
        let bitmap = bitmap.get(..bytes).ok_or_else(damaged)?;
        let checksum = crc32c(self.checksum_seed(), bitmap);
        if (checksum ^ group.bitmap_checksum) & group.checksum_mask != 0 {
            return Err(damaged());
        }
        let is_used = |block: u64| {
            let byte = usize::try_from(block / 8)
                .ok()
                .and_then(|at| bitmap.get(at));
            byte.is_none_or(|byte| byte >> (block % 8) & 1 == 1)
        };
        let (mut free, mut begin) = (0, None);
        for block in 0..group.blocks {
            match (is_used(block), begin) {
                (true, None) => begin = Some(block),
                (false, Some(from)) => {
                    used.push(group.first + from..group.first + block);
                    begin = None;
                }
                _ => {}
            }
            free += u64::from(!is_used(block));
        }
        if let Some(from) = begin {
            used.push(group.first + from..group.first + group.blocks);
        }
        match free == group.free {
            true => Ok(()),
            false => Err(damaged()),
        }
    }
}

/// Ranges of blocks as ranges of bytes.
pub(super) fn in_bytes(blocks: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let ranges = blocks.into_iter();
    ranges
        .map(|range| range.start * BLOCK..range.end * BLOCK)
        .collect()
}

pub(super) fn block_number(descriptor: &[u8], low: usize, high: usize) -> u64 {
    let word = |at: usize| u64::from(u32::from_le_bytes(bytes_at(descriptor, at)));
    match descriptor.len() >= 64 {
        true => word(high) << 32 | word(low),
        false => word(low),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use sprat_testkit::{needs, requires};

    use super::*;

    pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
        let ran = Command::new(program)
            .args(arguments)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .unwrap();
        let said = [ran.stdout, ran.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(ran.status.success(), "{program} {arguments:?}: {said}");
        said
    }

    pub(crate) fn missing() -> Option<String> {
        let programs = ["mkfs.ext4", "e2fsck", "debugfs"];
        programs.into_iter().find_map(needs::program)
    }

    /// An image with files in it, as sprat makes them or with other features.
    pub(crate) fn image(size: &str, features: &str, extended: &str) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        let path = image.path().to_str().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for n in 0..40_u8 {
            std::fs::write(folder.path().join(format!("{n}")), vec![n + 1; 300_000]).unwrap();
        }
        let folder = folder.path().to_str().unwrap();
        let made = [
            "-q", "-F", "-b", "4096", "-O", features, "-E", extended, "-d", folder,
        ];
        run("mkfs.ext4", &[&made[..], &[path, size]].concat());
        // Free blocks between the used ones.
        for n in (0..40).step_by(3) {
            run("debugfs", &["-w", "-R", &format!("rm {n}"), path]);
        }
        image
    }

    fn super_block(read: &mut Read<'_>) -> Result<SuperBlock, String> {
        let mut first = vec![0; 4096];
        read(0, &mut first)?;
        SuperBlock::parse(&first).ok_or_else(|| "no super block".to_owned())
    }

    pub(crate) type Ranges = Result<Vec<Range<u64>>, String>;

    /// What `ask` finds by an image's super block.
    pub(crate) fn ranges_of(image: &File, ask: fn(&SuperBlock, &mut Read<'_>) -> Ranges) -> Ranges {
        let mut read = |at: u64, buf: &mut [u8]| {
            image
                .read_exact_at(buf, at)
                .map_err(|error| error.to_string())
        };
        ask(&super_block(&mut read)?, &mut read)
    }

    fn used_ranges(image: &File) -> Ranges {
        ranges_of(image, SuperBlock::used_ranges)
    }

    pub(crate) const OURS: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,\
                        sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
    pub(crate) const LAZY: &str = "lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1";

    #[test]
    fn file_system_of_its_used_blocks_alone_is_complete() {
        requires!(missing());
        let narrow = OURS.replace(",64bit", "");
        for (size, features, extended) in [
            ("700M", OURS, LAZY),
            ("9G", OURS, "lazy_itable_init=1"),
            ("300M", &narrow, "lazy_itable_init=0"),
        ] {
            let image = image(size, features, extended);
            let used = used_ranges(image.as_file()).unwrap();
            let bytes: u64 = used.iter().map(|range| range.end - range.start).sum();
            assert!(bytes < 150 << 20, "{bytes} of {size} with {features}");
            // All other bytes are noise: a reader that needs one of them notices.
            let copy = tempfile::NamedTempFile::new().unwrap();
            let len = image.as_file().metadata().unwrap().len();
            copy.as_file().set_len(len).unwrap();
            let mut at = 0;
            for range in used.iter().cloned().chain(std::iter::once(len..len)) {
                for noise in (at..range.start).step_by(1 << 20) {
                    let many = (range.start - noise).min(4096);
                    let noise_bytes = vec![0xA5; usize::try_from(many).unwrap()];
                    copy.as_file().write_all_at(&noise_bytes, noise).unwrap();
                }
                let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
                image
                    .as_file()
                    .read_exact_at(&mut bytes, range.start)
                    .unwrap();
                copy.as_file().write_all_at(&bytes, range.start).unwrap();
                at = range.end;
            }
            let path = copy.path().to_str().unwrap();
            run("e2fsck", &["-f", "-n", path]);
            let out = tempfile::tempdir().unwrap();
            for n in (1..40_u8).filter(|n| n % 3 != 0) {
                let to = out.path().join("file");
                let dump = format!("dump {n} {}", to.display());
                run("debugfs", &["-R", &dump, path]);
                assert!(
                    std::fs::read(&to).unwrap() == vec![n + 1; 300_000],
                    "{n} of {size}"
                );
            }
        }
    }

    #[test]
    fn wrong_checksum_or_state_gives_no_answer() {
        requires!(missing());
        let image = image("300M", OURS, LAZY);
        let file = image.as_file();
        used_ranges(file).unwrap();
        let mut read = |at: u64, buf: &mut [u8]| {
            file.read_exact_at(buf, at)
                .map_err(|error| error.to_string())
        };
        let found = super_block(&mut read).unwrap();
        let mut table = vec![0; 4096];
        read(BLOCK, &mut table).unwrap();
        let bitmap = block_number(&table[..64], 0x0, 0x20) * BLOCK;
        // Super block, descriptor, bitmap (a bit that removes a block, and a bit far behind).
        for at in [1024 + 0x80, BLOCK + 0xc, bitmap, bitmap + 2000] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            assert!(used_ranges(file).is_err(), "damage at {at} was not noticed");
            file.write_all_at(&byte, at).unwrap();
        }
        used_ranges(file).unwrap();
        // A wrong count with right checksums, for example of an older bitmap.
        let group = found.group(0, &table[..64]).unwrap();
        let mut older = vec![0; 4096];
        read(bitmap, &mut older).unwrap();
        let wrong = Group {
            free: group.free + 1,
            ..group
        };
        assert!(found.add_used(&wrong, &older, &mut Vec::new()).is_err());
        // Before the journal is replayed the bitmaps may be outdated. The second state marks damage.
        for (flag, value) in [
            ("feature needs_recovery", ""),
            ("set_super_value state", " 3"),
        ] {
            let path = image.path().to_str().unwrap();
            let command = format!("{flag}{value}");
            run("debugfs", &["-w", "-R", &command, path]);
            assert!(used_ranges(file).is_err(), "{flag}");
            run("debugfs", &["-w", "-R", "feature ^needs_recovery", path]);
        }
    }
}
