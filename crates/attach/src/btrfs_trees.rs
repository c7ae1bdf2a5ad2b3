//! Reads the trees of a mounted btrfs from its device: which snapshots share which nodes and extents.
//!
//! The kernel has no call for this. A node that several snapshots share is read once. The trees of read-only
//! snapshots never change. Another tree may be written meanwhile: then a node is not what its parent
//! describes, and the whole answer is an error.
//!
//! Layout: include/uapi/linux/btrfs_tree.h. The bytes are foreign.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::btrfs::ROOT_TREE;
use crate::sys::{self, SearchKey};
use crate::{AttachError, ChunkMap, scrub};

/// The tree of the files that are in no subvolume.
const TOP_TREE: u64 = 5;
/// Items of the root tree: a tree, and a subvolume in another tree.
const ROOT_ITEM: u32 = 132;
const ROOT_REF: u32 = 156;
/// `struct btrfs_root_item`: `bytenr`, `generation`, `level`.
const ROOT_GENERATION_AT: usize = 160;
const ROOT_BYTENR_AT: usize = 176;
const ROOT_LEVEL_AT: usize = 238;
/// `struct btrfs_root_ref`: its name is behind `dirid`, `sequence` and `name_len`.
const REF_NAME_LEN_AT: usize = 16;
const REF_NAME_AT: usize = 18;
/// `struct btrfs_header`, `btrfs_key_ptr` and `btrfs_item`.
const HEADER_BYTES: usize = 101;
const POINTER_BYTES: usize = 33;
const ITEM_BYTES: usize = 25;
const KEY_BYTES: usize = 17;
const LEVEL_MAX: u8 = 8;
/// An item of a leaf: an extent of a file (`struct btrfs_file_extent_item`: `type`, `disk_bytenr`,
/// `disk_num_bytes`).
const EXTENT_DATA: u8 = 108;
const EXTENT_TYPE_AT: usize = 20;
const EXTENT_AT: usize = 21;
const EXTENT_BYTES_AT: usize = 29;
const EXTENT_INLINE: u8 = 0;
/// Nodes have this size in all volumes that sprat makes.
const NODE_BYTES: usize = 16 << 10;
/// What direct reads must be aligned to.
const ALIGNMENT: usize = 4096;
/// How many nodes are requested at once: each waits a round trip.
const READERS: usize = 32;

/// Where a tree begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeTop {
    /// The subvolume's folder: the inode of the one that it is in, and its name. `None`: it is in another
    /// subvolume, or it is the tree of what is in no subvolume.
    pub place: Option<(u64, OsString)>,
    /// The address of its highest node.
    pub node: u64,
    level: u8,
    generation: u64,
}

/// All trees of files in a btrfs.
#[derive(Debug, Default)]
pub struct BtrfsTrees {
    /// Where they begin.
    pub tops: Vec<TreeTop>,
    /// By its address, what each node takes on the device, and the addresses of the nodes and extents below
    /// it.
    pub nodes: HashMap<u64, (u64, Vec<u64>)>,
    /// By its address, what each extent takes on the device, with its checksums.
    pub extents: HashMap<u64, u64>,
}

/// A node that is to be read.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    address: u64,
    level: u8,
    generation: u64,
}

/// What a node holds.
#[derive(Debug)]
enum Node {
    Inner(Vec<Wanted>),
    /// Address and length of each extent.
    Leaf(Vec<(u64, u64)>),
}

impl BtrfsTrees {
    /// Reads all trees of the btrfs that is mounted on `root`. `None`: `goes_on` returned false.
    pub fn read(
        root: &Path,
        goes_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Self>, AttachError> {
        let failed =
            |e: io::Error| AttachError::io("read the trees of", root.display().to_string(), e);
        let chunks = ChunkMap::read(root)?;
        let folder = File::open(root).map_err(failed)?;
        let device = open_device(folder.as_fd()).map_err(failed)?;
        let mut found = Self {
            tops: tops(folder.as_fd()).map_err(failed)?,
            ..Self::default()
        };
        let mut wanted: Vec<Wanted> = found.tops.iter().map(TreeTop::wanted).collect();
        while !wanted.is_empty() {
            if !goes_on() {
                return Ok(None);
            }
            wanted.sort_unstable_by_key(|one| one.address);
            wanted.dedup_by_key(|one| one.address);
            wanted.retain(|one| !found.nodes.contains_key(&one.address));
            let read = read_nodes(&device, &chunks, &wanted, goes_on).map_err(failed)?;
            let mut next = Vec::new();
            for (one, node) in wanted.iter().zip(read) {
                let bytes = on_device(&chunks, one.address, NODE_BYTES as u64);
                let below = match node {
                    Node::Inner(children) => {
                        next.extend(&children);
                        children.iter().map(|child| child.address).collect()
                    }
                    Node::Leaf(extents) => {
                        let below = extents.iter().map(|(address, _)| *address).collect();
                        for (address, len) in extents {
                            let bytes = on_device(&chunks, address, len) + checksum_bytes(len);
                            found.extents.insert(address, bytes);
                        }
                        below
                    }
                };
                found.nodes.insert(one.address, (bytes, below));
            }
            wanted = next;
        }
        Ok(Some(found))
    }
}

impl TreeTop {
    fn wanted(&self) -> Wanted {
        Wanted {
            address: self.node,
            level: self.level,
            generation: self.generation,
        }
    }
}

/// What `bytes` at an address take with all copies.
fn on_device(chunks: &ChunkMap, address: u64, bytes: u64) -> u64 {
    let copies = chunks.places(address).map_or(1, |places| places.len());
    bytes.saturating_mul(copies as u64)
}

/// The checksums of content: 8 bytes for each 4096, twice.
fn checksum_bytes(bytes: u64) -> u64 {
    bytes / 4096 * 16
}

/// Opens the device. The cache of its node does not follow the file system's writes, so it is not used.
fn open_device(folder: BorrowedFd<'_>) -> io::Result<File> {
    let about = sys::btrfs_device(folder)?;
    let path = CStr::from_bytes_until_nul(&about.path).map_err(io::Error::other)?;
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let path = Path::new(OsStr::from_bytes(path.to_bytes()));
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

fn unknown() -> io::Error {
    io::Error::other("a tree is not as sprat knows it, or was written meanwhile")
}

/// All trees of files that are not deleted.
fn tops(folder: BorrowedFd<'_>) -> io::Result<Vec<TreeTop>> {
    let mut tops = vec![top(folder, TOP_TREE, None)?];
    let mut parents = vec![TOP_TREE];
    while let Some(parent) = parents.pop() {
        let mut from = 0;
        loop {
            let key = SearchKey::items(ROOT_TREE, parent, ROOT_REF, from);
            let (count, found) = sys::btrfs_search(folder, key)?;
            let found = scrub::items(count, &found).ok_or_else(unknown)?;
            let Some((last, _)) = found.last() else { break };
            from = last.checked_add(1).ok_or_else(unknown)?;
            for (tree, item) in found {
                let place = place(item).ok_or_else(unknown)?;
                let place = (parent == TOP_TREE).then_some(place);
                tops.push(top(folder, tree, place)?);
                parents.push(tree);
            }
        }
    }
    Ok(tops)
}

fn top(folder: BorrowedFd<'_>, tree: u64, place: Option<(u64, OsString)>) -> io::Result<TreeTop> {
    let key = SearchKey::items(ROOT_TREE, tree, ROOT_ITEM, 0);
    let (count, found) = sys::btrfs_search(folder, key)?;
    let found = scrub::items(count, &found).ok_or_else(unknown)?;
    let (_, item) = found.first().ok_or_else(unknown)?;
    Ok(TreeTop {
        place,
        node: number::<8>(item, ROOT_BYTENR_AT).ok_or_else(unknown)?,
        level: *item.get(ROOT_LEVEL_AT).ok_or_else(unknown)?,
        generation: number::<8>(item, ROOT_GENERATION_AT).ok_or_else(unknown)?,
    })
}

/// Where a subvolume is, by its item in the root tree.
fn place(item: &[u8]) -> Option<(u64, OsString)> {
    let len = usize::try_from(number::<2>(item, REF_NAME_LEN_AT)?).ok()?;
    let name = item.get(REF_NAME_AT..REF_NAME_AT.checked_add(len)?)?;
    Some((number::<8>(item, 0)?, OsString::from_vec(name.to_vec())))
}

/// Reads nodes, many at once.
fn read_nodes(
    device: &File,
    chunks: &ChunkMap,
    wanted: &[Wanted],
    goes_on: &(dyn Fn() -> bool + Sync),
) -> io::Result<Vec<Node>> {
    let part = wanted.len().div_ceil(READERS).max(1);
    std::thread::scope(|scope| {
        let readers: Vec<_> = wanted
            .chunks(part)
            .map(|part| {
                scope.spawn(move || -> io::Result<Vec<Node>> {
                    let mut buffer = vec![0; NODE_BYTES + ALIGNMENT];
                    let mut read = Vec::with_capacity(part.len());
                    for one in part {
                        if !goes_on() {
                            return Err(io::ErrorKind::Interrupted.into());
                        }
                        read.push(read_node(device, chunks, *one, &mut buffer)?);
                    }
                    Ok(read)
                })
            })
            .collect();
        let mut all = Vec::with_capacity(wanted.len());
        for reader in readers {
            let read = reader
                .join()
                .map_err(|_| io::Error::other("a reader died"))?;
            all.extend(read?);
        }
        Ok(all)
    })
}

/// Reads one node, by the first copy that is what its parent describes.
fn read_node(
    device: &File,
    chunks: &ChunkMap,
    wanted: Wanted,
    buffer: &mut [u8],
) -> io::Result<Node> {
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let node = buffer
        .get_mut(start..)
        .and_then(|from| from.get_mut(..NODE_BYTES))
        .ok_or_else(|| io::Error::other("the buffer can't be aligned"))?;
    for place in chunks.places(wanted.address).ok_or_else(unknown)? {
        device.read_exact_at(node, place)?;
        if let Some(found) = parse_node(node, wanted) {
            return Ok(found);
        }
    }
    Err(unknown())
}

/// What the node holds. `None`: it is another one.
fn parse_node(node: &[u8], wanted: Wanted) -> Option<Node> {
    let is_it = number::<8>(node, 48)? == wanted.address
        && number::<8>(node, 80)? == wanted.generation
        && node.get(100) == Some(&wanted.level)
        && wanted.level < LEVEL_MAX;
    if !is_it {
        return None;
    }
    let count = usize::try_from(number::<4>(node, 96)?).ok()?;
    if wanted.level > 0 {
        let children: Option<Vec<Wanted>> = (0..count)
            .map(|at| {
                let pointer = HEADER_BYTES + at.checked_mul(POINTER_BYTES)? + KEY_BYTES;
                Some(Wanted {
                    address: number::<8>(node, pointer)?,
                    level: wanted.level - 1,
                    generation: number::<8>(node, pointer + 8)?,
                })
            })
            .collect();
        return children.map(Node::Inner);
    }
    let mut extents = Vec::new();
    for at in 0..count {
        let head = HEADER_BYTES + at.checked_mul(ITEM_BYTES)?;
        if *node.get(head + 8)? != EXTENT_DATA {
            continue;
        }
        let data = usize::try_from(number::<4>(node, head + KEY_BYTES)?).ok()?;
        let item = node.get(HEADER_BYTES.checked_add(data)?..)?;
        if *item.get(EXTENT_TYPE_AT)? == EXTENT_INLINE {
            continue;
        }
        let (address, bytes) = (
            number::<8>(item, EXTENT_AT)?,
            number::<8>(item, EXTENT_BYTES_AT)?,
        );
        // Address 0: a hole.
        if address != 0 {
            extents.push((address, bytes));
        }
    }
    Some(Node::Leaf(extents))
}

/// The little-endian number of `N` bytes at a place.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let found = bytes.get(at..at.checked_add(N)?)?;
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(found);
    Some(u64::from_le_bytes(wide))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_of_another_place_or_time_and_damaged_items_are_refused() {
        let wanted = Wanted {
            address: 7 << 14,
            level: 0,
            generation: 5,
        };
        let mut node = vec![0; NODE_BYTES];
        node[48..56].copy_from_slice(&wanted.address.to_le_bytes());
        node[80] = 5;
        node[96] = 1;
        node[HEADER_BYTES + 8] = EXTENT_DATA;
        node[HEADER_BYTES + KEY_BYTES..][..4].copy_from_slice(&1000_u32.to_le_bytes());
        let item = HEADER_BYTES + 1000;
        node[item + EXTENT_TYPE_AT] = 1;
        node[item + EXTENT_AT + 2] = 1;
        node[item + EXTENT_BYTES_AT + 1] = 0x10;
        let found = parse_node(&node, wanted);
        assert!(
            matches!(&found, Some(Node::Leaf(all)) if *all == [(1 << 16, 4096)]),
            "{found:?}"
        );
        for (at, value) in [(48, 1), (80, 6), (100, 1), (97, 0xff)] {
            let mut other = node.clone();
            other[at] = value;
            assert!(parse_node(&other, wanted).is_none(), "byte {at}");
        }
        let mut outside = node.clone();
        outside[HEADER_BYTES + KEY_BYTES + 2] = 0xff;
        assert!(parse_node(&outside, wanted).is_none());
        assert!(parse_node(&node[..90], wanted).is_none());
    }
}
