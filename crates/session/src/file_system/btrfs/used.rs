//! Which parts of a btrfs are in use, by its chunk tree. A copy of a container needs this if nothing else
//! shows where the container has data.
//!
//! A block that a copy leaves out is lost. So super block and chunk tree must match their checksums.
//! Anything unknown is an error, and the caller then treats the whole container as in use.

use std::ops::Range;

use sprat_attach::BtrfsChunk;

use super::{COPIES_AT, FSID, INCOMPAT_METADATA_UUID, METADATA_UUID_AT, NODE_BYTES, SuperBlock};
use crate::file_system::ranges::merged;
use crate::file_system::{Read, STAMP_BLOCK_BYTES};

/// What no chunk has: the super block and its surroundings (`BTRFS_BLOCK_RESERVED_1M_FOR_SUPER`).
const RESERVED_BYTES: u64 = 1 << 20;
/// `struct btrfs_super_block`: `chunk_root`, `sys_chunk_array_size`, `chunk_root_level`,
/// `sys_chunk_array`.
const CHUNK_ROOT_AT: usize = 0x58;
const SYSTEM_CHUNKS_BYTES_AT: usize = 0xa0;
const CHUNK_ROOT_LEVEL_AT: usize = 0xc7;
const SYSTEM_CHUNKS_AT: usize = 0x32b;
const SYSTEM_CHUNKS_BYTES_MAX: usize = 2048;
/// `struct btrfs_header`, `btrfs_disk_key`, `btrfs_key_ptr` and `btrfs_item`.
const HEADER_BYTES: usize = 101;
const KEY_BYTES: usize = 17;
const POINTER_BYTES: usize = 33;
const ITEM_BYTES: usize = 25;
/// `struct btrfs_chunk` with its first stripe, and each further stripe.
const CHUNK_BYTES: usize = 80;
const STRIPE_BYTES: usize = 32;
const CHUNK_ITEM: u8 = 228;
const LEVEL_MAX: u8 = 8;

impl SuperBlock {
    /// Ranges of the volume, in bytes and in order, of all chunks, with what lies outside of chunks.
    pub(in crate::file_system) fn used_ranges(
        &self,
        read: &mut Read<'_>,
    ) -> Result<Vec<Range<u64>>, String> {
        if self.checksum_fits() != Some(true) {
            return Err("the super block does not match its checksum".to_owned());
        }
        if let Some(why) = self.unsupported() {
            return Err(why);
        }
        if self.has_log() {
            return Err("its log of fsyncs is not replayed".to_owned());
        }
        if self.u32(0x94) != NODE_BYTES {
            return Err(format!("it has nodes of {} bytes", self.u32(0x94)));
        }
        let copies = COPIES_AT.map(|at| at..at + STAMP_BLOCK_BYTES as u64);
        let outside = std::iter::once(0..RESERVED_BYTES).chain(copies);
        let mut used: Vec<Range<u64>> = outside
            .filter(|range| range.end <= self.len_bytes())
            .collect();
        let system = self.system_chunks()?;
        let mut todo = vec![(self.u64(CHUNK_ROOT_AT), self.block[CHUNK_ROOT_LEVEL_AT])];
        while let Some((logical, level)) = todo.pop() {
            let node = self.node(logical, level, &system, read)?;
            let items = number::<4>(&node, 96).and_then(|count| usize::try_from(count).ok());
            for at in 0..items.ok_or_else(unknown)? {
                if level > 0 {
                    let pointer = HEADER_BYTES + at * POINTER_BYTES + KEY_BYTES;
                    let child = number::<8>(&node, pointer).ok_or_else(unknown)?;
                    todo.push((child, level - 1));
                } else if let Some(chunk) = chunk_of(&node, at).ok_or_else(unknown)? {
                    used.extend(chunk.ranges());
                }
            }
        }
        let used = merged(used);
        match used.last().is_some_and(|last| last.end > self.len_bytes()) {
            true => Err("a chunk lies behind the end of the file system".to_owned()),
            false => Ok(used),
        }
    }

    /// The chunks of the chunk tree itself.
    fn system_chunks(&self) -> Result<Vec<BtrfsChunk>, String> {
        let bytes = usize::try_from(self.u32(SYSTEM_CHUNKS_BYTES_AT)).unwrap_or(usize::MAX);
        if bytes > SYSTEM_CHUNKS_BYTES_MAX {
            return Err(unknown());
        }
        let mut rest = &self.block[SYSTEM_CHUNKS_AT..SYSTEM_CHUNKS_AT + bytes];
        let mut chunks = Vec::new();
        while !rest.is_empty() {
            let logical = number::<8>(rest, 9).ok_or_else(unknown)?;
            let item = rest.get(KEY_BYTES..).ok_or_else(unknown)?;
            let stripes = number::<2>(item, 44).ok_or_else(unknown)?;
            let stripes = usize::try_from(stripes).unwrap_or(usize::MAX);
            let len = CHUNK_BYTES + stripes.saturating_sub(1) * STRIPE_BYTES;
            chunks.push(BtrfsChunk::parse(logical, item).ok_or_else(unknown)?);
            rest = item.get(len..).ok_or_else(unknown)?;
        }
        Ok(chunks)
    }

    /// A node of the chunk tree, by the first copy that matches its checksum.
    fn node(
        &self,
        logical: u64,
        level: u8,
        system: &[BtrfsChunk],
        read: &mut Read<'_>,
    ) -> Result<Vec<u8>, String> {
        let mut node = vec![0; NODE_BYTES as usize];
        let places = system.iter().find_map(|chunk| chunk.places(logical));
        for place in places.ok_or_else(unknown)? {
            // Blocks of 4096 bytes, as the reader wants them.
            for (at, block) in (place..)
                .step_by(STAMP_BLOCK_BYTES)
                .zip(node.chunks_exact_mut(STAMP_BLOCK_BYTES))
            {
                read(at, block)?;
            }
            let right = self.checksum_of(&node) == Some(true)
                && node[32..48] == self.tree_id()[..]
                && number::<8>(&node, 48) == Some(logical)
                && node[100] == level
                && level < LEVEL_MAX;
            if right {
                return Ok(node);
            }
        }
        Err("the chunk tree does not match its checksum".to_owned())
    }

    /// The ID that is in each node.
    fn tree_id(&self) -> [u8; 16] {
        match self.u64(0xbc) & INCOMPAT_METADATA_UUID {
            0 => self.bytes(FSID.start),
            _ => self.bytes(METADATA_UUID_AT),
        }
    }
}

fn unknown() -> String {
    "the chunk tree has an item that sprat does not know".to_owned()
}

/// The little-endian number of `N` bytes at a place.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let found = bytes.get(at..at.checked_add(N)?)?;
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(found);
    Some(u64::from_le_bytes(wide))
}

/// The chunk in an item of a leaf. `Some(None)`: the item is no chunk.
fn chunk_of(leaf: &[u8], item: usize) -> Option<Option<BtrfsChunk>> {
    let at = HEADER_BYTES + item * ITEM_BYTES;
    if *leaf.get(at + 8)? != CHUNK_ITEM {
        return Some(None);
    }
    let logical = number::<8>(leaf, at + 9)?;
    let start = HEADER_BYTES + usize::try_from(number::<4>(leaf, at + KEY_BYTES)?).ok()?;
    let len = usize::try_from(number::<4>(leaf, at + KEY_BYTES + 4)?).ok()?;
    let content = leaf.get(start..start.checked_add(len)?)?;
    BtrfsChunk::parse(logical, content).map(Some)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use sprat_testkit::{needs, requires};

    use super::super::tests::{filled, image, run, super_block_of};
    use super::*;

    fn used_ranges(image: &Path) -> Result<Vec<Range<u64>>, String> {
        let file = File::open(image).unwrap();
        let mut read = |at: u64, buf: &mut [u8]| {
            file.read_exact_at(buf, at)
                .map_err(|error| error.to_string())
        };
        super_block_of(image).used_ranges(&mut read)
    }

    #[test]
    fn file_system_of_its_used_ranges_alone_is_complete() {
        requires!(
            needs::program("mkfs.btrfs"),
            needs::program("btrfs"),
            needs::root()
        );
        let folder = sprat_testkit::test_folder::TestFolder::new("sprat-btrfs-");
        let at = folder.path().join("mounted");
        std::fs::create_dir(&at).unwrap();
        let original = filled(folder.path(), 2 << 30, &at);
        let used = used_ranges(&original).unwrap();
        let bytes: u64 = used.iter().map(|range| range.end - range.start).sum();
        assert!(bytes < 1 << 30, "{bytes}");
        // All other bytes are noise: a reader that needs one of them notices.
        let copy = folder.path().join("copy");
        let (from, to) = (File::open(&original).unwrap(), File::create(&copy).unwrap());
        to.set_len(2 << 30).unwrap();
        let mut at_byte = 0;
        for range in used
            .iter()
            .cloned()
            .chain(std::iter::once(2 << 30..2 << 30))
        {
            for noise in (at_byte..range.start).step_by(1 << 20) {
                to.write_all_at(&[0xA5; 4096], noise).unwrap();
            }
            let mut part = vec![0; 1 << 20];
            for start in (range.start..range.end).step_by(1 << 20) {
                let many = usize::try_from((range.end - start).min(1 << 20)).unwrap();
                from.read_exact_at(&mut part[..many], start).unwrap();
                if part[..many].iter().any(|byte| *byte != 0) {
                    to.write_all_at(&part[..many], start).unwrap();
                }
            }
            at_byte = range.end;
        }
        std::fs::remove_file(&original).unwrap();
        run("btrfs", &[Path::new("check"), &copy]);
        run("mount", &[Path::new("-oloop,ro"), &copy, &at]);
        let found = std::fs::read(at.join("file")).unwrap();
        run("umount", &[&at]);
        assert!(found == super::super::tests::content());
    }

    #[test]
    fn damaged_chunk_tree_gives_no_answer() {
        requires!(needs::program("mkfs.btrfs"));
        let folder = tempfile::tempdir().unwrap();
        let image = image(folder.path(), 256 << 20);
        super::super::make(&image, None).unwrap();
        used_ranges(&image).unwrap();
        let found = super_block_of(&image);
        let system = found.system_chunks().unwrap();
        let places = system[0].places(found.u64(CHUNK_ROOT_AT)).unwrap();
        let file = File::options().write(true).open(&image).unwrap();
        // The second copy is used as long as it is right.
        for (place, right) in places.iter().zip([true, false]) {
            file.write_all_at(&[0x55; 4], place + 2000).unwrap();
            assert_eq!(used_ranges(&image).is_ok(), right);
        }
    }
}
