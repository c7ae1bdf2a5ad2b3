//! Scrubs a mounted btrfs: the kernel reads all copies of everything in some chunks, and checks checksum,
//! address and generation. It repairs nothing.
//!
//! The kernel's scrub has the device as its unit, or a range of it. The chunk tree says where the chunks
//! lie, so metadata can be scrubbed without the content of files. It also says where the content of a
//! file lies on the device.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::sys::{self, PlainCall, SearchKey};
use crate::{AttachError, btrfs, extents};

/// Tree, object and item type of chunks (include/uapi/linux/btrfs_tree.h).
const CHUNK_TREE: u64 = 3;
const FIRST_CHUNK_TREE: u64 = 256;
const CHUNK_ITEM: u32 = 228;
/// `struct btrfs_chunk` without its stripes, and each stripe.
const CHUNK_HEAD_BYTES: usize = 48;
const STRIPE_BYTES: usize = 32;
const SEARCH_HEAD_BYTES: usize = 32;
/// How often a request to stop is checked.
const CANCEL_INTERVAL: Duration = Duration::from_millis(20);

/// What to scrub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubWhat {
    /// The trees: names, attributes, checksums, and the content of small files.
    Metadata,
    /// The trees and the content of all files.
    Everything,
}

/// What a scrub has found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Bytes that were read. What is kept twice counts twice.
    pub bytes: u64,
    /// Places that the device could not read.
    pub read_errors: u64,
    /// Places whose content does not match its checksum, its address or its generation.
    pub wrong: u64,
    /// Of these, places of which no other copy is right.
    pub lost: u64,
}

impl ScrubReport {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.read_errors == 0 && self.wrong == 0 && self.lost == 0
    }
}

/// A chunk: what it holds, and the ranges of the device where its copies lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    logical: u64,
    bytes: u64,
    kind: u64,
    copies: Vec<u64>,
}

impl Chunk {
    /// The chunk at the address `logical`, by its item (`struct btrfs_chunk`). `None`: of a kind that sprat
    /// does not make.
    #[must_use]
    pub fn parse(logical: u64, item: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(*item.get(at..)?.first_chunk()?));
        let stripes = usize::from(u16::from_le_bytes(*item.get(44..)?.first_chunk()?));
        let copies: Option<Vec<u64>> = (0..stripes)
            .map(|stripe| number(CHUNK_HEAD_BYTES + stripe * STRIPE_BYTES + 8))
            .collect();
        let chunk = Self {
            logical,
            bytes: number(0)?,
            kind: number(24)?,
            copies: copies?,
        };
        // Of striped kinds a stripe is only a part. `single` and `dup` are not.
        let whole = chunk.kind & btrfs::CHUNK_STRIPED == 0;
        (whole && !chunk.copies.is_empty()).then_some(chunk)
    }

    /// The ranges of the device where its copies lie.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let copies = self.copies.iter();
        copies.map(|start| *start..start.saturating_add(self.bytes))
    }

    /// The places on the device of what lies at an address. `None`: not in this chunk.
    #[must_use]
    pub fn places(&self, logical: u64) -> Option<Vec<u64>> {
        let within = logical.checked_sub(self.logical)?;
        let copies = || self.copies.iter().map(|start| start.saturating_add(within));
        (within < self.bytes).then(|| copies().collect())
    }
}

/// Scrubs the btrfs that is mounted on `root`, also read-only. `None`: `goes_on` returned false.
pub fn scrub_btrfs(
    root: &Path,
    what: ScrubWhat,
    goes_on: &(dyn Fn() -> bool + Sync),
) -> Result<Option<ScrubReport>, AttachError> {
    let failed = |e: io::Error| AttachError::io("scrub", root.display().to_string(), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(root, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    let mut chunks = chunks(folder.as_fd()).map_err(failed)?;
    chunks.retain(|chunk| what == ScrubWhat::Everything || chunk.kind & btrfs::CHUNK_DATA == 0);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| cancel_when_asked(&folder, goes_on, &ended));
        let report = scrub_chunks(folder.as_fd(), &chunks, goes_on);
        ended.store(true, Ordering::Release);
        report.map_err(failed)
    })
}

/// Where the chunks of a mounted btrfs lie on its device.
#[derive(Debug)]
pub struct ChunkMap(Vec<Chunk>);

impl ChunkMap {
    /// The places on the device of what lies at an address: one for each copy.
    pub(crate) fn places(&self, logical: u64) -> Option<Vec<u64>> {
        self.0.iter().find_map(|chunk| chunk.places(logical))
    }

    /// Reads the map of the btrfs that is mounted on `root`.
    pub fn read(root: &Path) -> Result<Self, AttachError> {
        let failed =
            |e: io::Error| AttachError::io("read the chunks of", root.display().to_string(), e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(root, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        chunks(folder.as_fd()).map(Self).map_err(failed)
    }

    /// The byte ranges of the device that contain the content of a file of this btrfs. Of compressed
    /// content they may be too long.
    pub fn extents(&self, file: &File) -> io::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        for logical in extents::logical_extents(file)? {
            let mut at = logical.start;
            while at < logical.end {
                let behind = self
                    .0
                    .partition_point(|chunk| chunk.logical + chunk.bytes <= at);
                let chunk = self.0.get(behind).filter(|chunk| chunk.logical <= at);
                let chunk = chunk.ok_or_else(|| io::Error::other("its content is in no chunk"))?;
                let end = logical.end.min(chunk.logical + chunk.bytes);
                for copy in &chunk.copies {
                    let start = copy + (at - chunk.logical);
                    found.push(start..start + (end - at));
                }
                at = end;
            }
        }
        Ok(found)
    }
}

fn cancel_when_asked(folder: &OwnedFd, goes_on: &(dyn Fn() -> bool + Sync), ended: &AtomicBool) {
    while !ended.load(Ordering::Acquire) {
        if !goes_on() {
            // No scrub may be running at this moment: it is asked again.
            let _ = sys::btrfs_plain(folder.as_fd(), PlainCall::CancelScrub);
        }
        std::thread::sleep(CANCEL_INTERVAL);
    }
}

fn scrub_chunks(
    folder: BorrowedFd<'_>,
    chunks: &[Chunk],
    goes_on: &(dyn Fn() -> bool + Sync),
) -> io::Result<Option<ScrubReport>> {
    let mut report = ScrubReport::default();
    for chunk in chunks {
        for start in &chunk.copies {
            if !goes_on() {
                return Ok(None);
            }
            let found = match sys::btrfs_scrub(folder, *start..start + chunk.bytes) {
                Err(e) if e.raw_os_error() == Some(libc::ECANCELED) => return Ok(None),
                found => found?,
            };
            // The order of `struct btrfs_scrub_progress`: extents of data and trees, their bytes, read,
            // checksum and verify errors, …, super block errors, …, uncorrectable errors. Super blocks are
            // not counted: each call reads all copies, and one of an older commit counts as an error, as
            // does one with another ID of the file system.
            let [
                _,
                _,
                data,
                trees,
                read,
                checksum,
                verify,
                _,
                _,
                _,
                _,
                lost,
                ..,
            ] = found;
            report.bytes += data + trees;
            report.read_errors += read;
            report.wrong += checksum + verify;
            report.lost += lost;
        }
    }
    Ok(Some(report))
}

/// All chunks of a mounted btrfs on one device.
fn chunks(folder: BorrowedFd<'_>) -> io::Result<Vec<Chunk>> {
    let unknown = || io::Error::other("the chunk tree has an item that sprat does not know");
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut from = 0;
    loop {
        let key = SearchKey::items(CHUNK_TREE, FIRST_CHUNK_TREE, CHUNK_ITEM, from);
        let (count, found) = sys::btrfs_search(folder, key)?;
        let found = items(count, &found).ok_or_else(unknown)?;
        let Some((last, _)) = found.last() else {
            return Ok(chunks);
        };
        from = match last.checked_add(1) {
            Some(next) => next,
            None => return Ok(chunks),
        };
        for (logical, item) in found {
            let unknown =
                || io::Error::other("the chunk tree has an item that sprat does not know");
            chunks.push(Chunk::parse(logical, item).ok_or_else(unknown)?);
        }
    }
}

/// The items of an answer: offset and content. See [`items_with_keys`].
pub(crate) fn items(count: u32, found: &[u8]) -> Option<Vec<(u64, &[u8])>> {
    let items = items_with_keys(count, found)?;
    Some(
        items
            .into_iter()
            .map(|(key, item)| (key.offset, item))
            .collect(),
    )
}

/// The key of an item in a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) object: u64,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
}

/// The items of an answer: key and content. `struct btrfs_ioctl_search_header` is before each: transid,
/// objectid, offset, type, len.
pub(crate) fn items_with_keys(count: u32, mut found: &[u8]) -> Option<Vec<(Key, &[u8])>> {
    let mut items = Vec::new();
    for _ in 0..count {
        let (head, behind) = found.split_first_chunk::<SEARCH_HEAD_BYTES>()?;
        let key = Key {
            object: u64::from_le_bytes(*head[8..].first_chunk()?),
            offset: u64::from_le_bytes(*head[16..].first_chunk()?),
            kind: u32::from_le_bytes(*head[24..].first_chunk()?),
        };
        let len = u32::from_le_bytes(*head[28..].first_chunk()?);
        let (item, behind) = behind.split_at_checked(usize::try_from(len).ok()?)?;
        items.push((key, item));
        found = behind;
    }
    Some(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_items_are_read_and_foreign_ones_refused() {
        let mut item = vec![0; 48 + 2 * 32];
        let mut put = |at: usize, bytes: &[u8]| item[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(8_u64 << 20).to_le_bytes());
        put(24, &0x24_u64.to_le_bytes());
        put(44, &2_u16.to_le_bytes());
        put(48 + 8, &(1_u64 << 20).to_le_bytes());
        put(48 + 32 + 8, &(9_u64 << 20).to_le_bytes());
        let found = Chunk::parse(5, &item).unwrap();
        assert_eq!((found.logical, found.bytes, found.kind), (5, 8 << 20, 0x24));
        assert_eq!(found.copies, [1 << 20, 9 << 20]);
        assert_eq!(Chunk::parse(5, &item[..item.len() - 20]), None);
        // RAID0.
        item[24] = 0x0c;
        assert_eq!(Chunk::parse(5, &item), None);
        assert_eq!(Chunk::parse(5, &[]), None);
    }
}
