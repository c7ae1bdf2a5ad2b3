//! btrfs behind the seam. Its super block is read without mounting it.
//!
//! Layout: fs/btrfs/accessors.h and include/uapi/linux/btrfs_tree.h, `struct btrfs_super_block`. The
//! bytes are foreign.

#[cfg(test)]
mod shared_tests;
#[cfg(test)]
pub(super) mod tests;
mod used;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sprat_attach::{
    AttachError, Attachment, BtrfsInode, BtrfsSpace, BtrfsTrees, MkfsOptions, MountOptions,
    ScrubReport, ScrubWhat,
};
use sprat_inside::{SharedSpace, SpaceTop};
use sprat_snapshot::{Cancel, InodeFacts, InodeVersion, Subvolumes};
use sprat_store::hex;

use crate::Failure;
use crate::file_system::ext4::crc32c;
use crate::file_system::xxhash::xxhash64;
use crate::file_system::{
    FileSystemCheck, FileSystemKind, FileSystemState, MetadataSpace, STAMP_BLOCK_BYTES, Stamp,
    VolumeRoom,
};

/// Where the super block lies (`BTRFS_SUPER_INFO_OFFSET`).
const SUPER_BLOCK_AT: u64 = 64 << 10;
/// The block that is the super block. Each commit changes it.
pub(super) const STAMP_RANGE: Range<u64> =
    SUPER_BLOCK_AT..SUPER_BLOCK_AT + STAMP_BLOCK_BYTES as u64;
/// Where its copies lie, as far as the volume reaches.
pub(super) const COPIES_AT: [u64; 2] = [64 << 20, 256 << 30];
/// A file's largest offset, which ends a volume before btrfs does.
pub(super) const VOLUME_BYTES_MAX: u64 = 1 << 62;

/// btrfs needs about 110 MiB, and more for the first snapshot to fit.
pub(super) const CONTAINER_BYTES_MIN: u64 = 256 << 20;

/// The kernel makes no device of a btrfs smaller than this (`btrfs_ioctl_resize`).
pub(super) const SHRUNK_VOLUME_BYTES_MIN: u64 = 256 << 20;

const MAGIC: &[u8; 8] = b"_BHRfS_M";
/// The checksum's place, before everything that it covers.
const CHECKSUM_BYTES: usize = 32;
const CHECKSUM_CRC32C: u16 = 0;
const CHECKSUM_XXHASH: u16 = 1;
const CHECKSUM_SHA256: u16 = 2;
const CHECKSUM_BLAKE2: u16 = 3;

/// Features without which a kernel can't mount a volume, as mkfs makes them: `mixed_backref`,
/// `extended_iref`, `skinny_metadata`, `no_holes`.
const INCOMPAT_MADE: u64 = 0x1 | 0x40 | 0x100 | 0x200;
/// Those that the kernel adds, or that another program may: `default_subvol`, `compress_lzo`,
/// `compress_zstd`, `big_metadata`, `metadata_uuid`.
const INCOMPAT_HARMLESS: u64 = 0x2 | 0x8 | 0x10 | 0x20 | INCOMPAT_METADATA_UUID;
const INCOMPAT_METADATA_UUID: u64 = 0x400;
/// The ID of the file system, and the place of that of its trees where they differ.
const FSID: Range<usize> = 0x20..0x30;
const METADATA_UUID_AT: usize = 0x23b;
/// `free_space_tree` and its mark that it is valid.
const COMPAT_RO_MADE: u64 = 0x1 | 0x2;
/// `verity`, `block_group_tree`.
const COMPAT_RO_HARMLESS: u64 = 0x4 | 0x8;
/// Names of other features, for messages: bit, name.
const INCOMPAT_NAMES: [(u64, &str); 7] = [
    (0x4, "mixed-bg"),
    (0x80, "raid56"),
    (0x800, "raid1c34"),
    (0x1000, "zoned"),
    (0x2000, "extent-tree-v2"),
    (0x4000, "raid-stripe-tree"),
    (0x1_0000, "squota"),
];

const NODE_BYTES: u32 = 16 << 10;
const SECTOR_BYTES: u32 = 4096;

/// Fails if this machine has no btrfs.
pub(super) fn check_usable() -> Result<(), Failure> {
    let missing = |what: &str, hint: &str| {
        Failure::failed(format!("this machine can't make a btrfs: {what}")).with_hint(format!(
            "nothing was created. {hint}, or choose `--file-system ext4`"
        ))
    };
    if !sprat_attach::kernel_has_btrfs() {
        return Err(missing(
            "its kernel has no btrfs",
            "Use a kernel with btrfs (those of RHEL and Rocky have none)",
        ));
    }
    match sprat_attach::has_mkfs_btrfs() {
        true => Ok(()),
        false => Err(missing("there is no mkfs.btrfs", "Install btrfs-progs")),
    }
}

/// Without an fsync the server may write a commit's super block before its trees, and then crash.
pub(super) fn needs_fsync() -> Failure {
    Failure::failed("a btrfs needs a server that can make data durable, and this one has no fsync")
        .with_hint(
            "nothing was changed. Use an OpenSSH server. `--allow-no-fsync` has no effect on a btrfs: a \
             crash of the server could destroy all of it. A container with ext4 accepts the option",
        )
}

/// Makes the file system, and checks that it has the features that sprat asked for.
pub(super) fn make(device: &Path, label: Option<&str>) -> Result<(), Failure> {
    let options = MkfsOptions::labelled(label.unwrap_or_default());
    sprat_attach::make_btrfs(device, &options)?;
    let mut block = vec![0; STAMP_BLOCK_BYTES];
    File::open(device)
        .and_then(|device| device.read_exact_at(&mut block, SUPER_BLOCK_AT))
        .map_err(|error| Failure::failed("can't read the new file system").caused_by(&error))?;
    let made = SuperBlock::parse(&block)
        .ok_or_else(|| Failure::failed("mkfs.btrfs reported success, but there is no btrfs"))?;
    match made.differs_from_wanted() {
        None => Ok(()),
        Some(what) => Err(Failure::failed(
            "mkfs.btrfs has made a file system with other features than sprat asked for",
        )
        .because(what)
        .with_hint("install another version of btrfs-progs, or use ext4")),
    }
}

/// Subvolumes of the mounted volume, by ioctls.
pub(super) struct ByIoctl;

impl Subvolumes for ByIoctl {
    fn make(&self, path: &Path) -> io::Result<()> {
        sprat_attach::make_subvolume(path).map_err(plain)
    }

    fn snapshot(&self, of: &Path, path: &Path, read_only: bool) -> io::Result<()> {
        sprat_attach::snapshot_subvolume(of, path, read_only).map_err(plain)
    }

    fn delete(&self, path: &Path) -> io::Result<()> {
        sprat_attach::delete_subvolume(path).map_err(plain)
    }

    fn is_subvolume(&self, path: &Path) -> io::Result<bool> {
        let found = sprat_attach::subvolume_is_read_only(path).map_err(plain)?;
        Ok(found.is_some())
    }

    fn commit(&self, volume_root: &Path) -> io::Result<()> {
        sprat_attach::commit_btrfs(volume_root).map_err(plain)
    }

    fn deletions_pending(&self, volume_root: &Path) -> io::Result<bool> {
        let found = sprat_attach::deleted_subvolumes(volume_root).map_err(plain)?;
        Ok(found > 0)
    }

    fn inodes(&self, subvolume: &Path, meet: &mut dyn FnMut(InodeFacts) -> bool) -> io::Result<()> {
        let mut each = |inode: BtrfsInode| {
            meet(InodeFacts {
                number: inode.number,
                version: InodeVersion {
                    bytes: inode.bytes,
                    mode: inode.mode,
                    user: inode.user,
                    group: inode.group,
                    modified: inode.modified,
                    changed: inode.changed,
                },
            })
        };
        sprat_attach::each_btrfs_inode(subvolume, &mut each).map_err(plain)
    }
}

/// The error of the system call, whose number says whether the volume is full or has failed.
fn plain(error: AttachError) -> io::Error {
    match error {
        AttachError::Io { source, .. } | AttachError::NotRoot { source, .. } => source,
        other => io::Error::other(other),
    }
}

/// Lets the kernel read all trees, both copies of each node, and check checksum, address and generation.
/// `btrfs check` would read them one by one, and needs memory for all of them.
pub(super) fn check(
    attachment: &mut Attachment,
    dir: &Path,
    cancel: &Cancel,
) -> Result<FileSystemCheck, Failure> {
    let mut output = damaged_copies(attachment.device())?;
    sprat_attach::keep_only(&[dir])?;
    let mut options = MountOptions::default();
    options.read_only = true;
    match attachment.mount_btrfs(dir, &options) {
        Ok(()) => {}
        Err(error @ AttachError::MountRefused { damaged: true, .. }) => {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            let _ = writeln!(output, "{error}: {}", source.unwrap_or_default());
            return Ok(FileSystemCheck {
                clean: false,
                output,
            });
        }
        Err(error) => return Err(error.into()),
    }
    let goes_on = || !cancel.is_cancelled();
    let scrubbed = sprat_attach::scrub_btrfs(dir, ScrubWhat::Metadata, &goes_on);
    attachment.unmount_file_system()?;
    match scrubbed? {
        Some(found) => {
            output.push_str(&scrub_text(&found));
            Ok(FileSystemCheck {
                clean: output.is_empty(),
                output,
            })
        }
        None => Err(Failure::interrupted().with_hint("nothing was changed")),
    }
}

/// Reports the copies of the super block that are damaged. A copy of an older commit is none: a power cut
/// leaves it.
fn damaged_copies(device: &Path) -> Result<String, Failure> {
    let failed = |error: io::Error| Failure::failed("can't read the volume").caused_by(&error);
    let mut device = File::open(device).map_err(failed)?;
    let device_bytes = device.seek(SeekFrom::End(0)).map_err(failed)?;
    let mut text = String::new();
    for at in COPIES_AT {
        if device_bytes < at + STAMP_BLOCK_BYTES as u64 {
            continue;
        }
        let mut block = vec![0; STAMP_BLOCK_BYTES];
        let read = device.read_exact_at(&mut block, at);
        let found = SuperBlock::parse_at(&block, at);
        let what = match (read, found.map(|found| found.checksum_fits())) {
            (Err(_), _) => "can't be read",
            (_, None | Some(Some(false))) => "is damaged",
            _ => continue,
        };
        let _ = writeln!(
            text,
            "the copy of the super block at {} {what}",
            crate::text::bytes(at)
        );
    }
    Ok(text)
}

fn scrub_text(found: &ScrubReport) -> String {
    if found.is_clean() {
        return String::new();
    }
    format!(
        "{} places of the metadata can't be read, and {} don't match their checksum, address or \
         generation. {} places have no right copy\n",
        found.read_errors, found.wrong, found.lost
    )
}

/// A backup that runs meanwhile writes to a tree, which then can't be read. It does so for moments only.
const READ_ATTEMPTS: usize = 5;

/// What the snapshots share, by their trees. `None`: that can't be read.
pub(super) fn shared_space(root: &Path, cancel: &Cancel) -> Option<SharedSpace> {
    let goes_on = || !cancel.is_cancelled();
    let read = (0..READ_ATTEMPTS).find_map(|_| BtrfsTrees::read(root, &goes_on).ok());
    let BtrfsTrees {
        tops,
        nodes,
        extents,
    } = read.flatten()?;
    let tops = tops.into_iter().map(|top| SpaceTop {
        place: top.place,
        part: top.node,
    });
    Some(SharedSpace {
        tops: tops.collect(),
        parts: nodes,
        ends: extents,
    })
}

/// The room of the mounted volume.
pub(super) fn room(root: &Path) -> Option<VolumeRoom> {
    sprat_attach::btrfs_space(root)
        .ok()
        .map(|space| room_of(&space))
}

/// The room for files' content: the free part of its chunks, and what belongs to no chunk yet. Of the
/// latter, as much as the metadata may need is left out: it is kept twice. If there is not so much, no
/// further file may fit.
fn room_of(space: &BtrfsSpace) -> VolumeRoom {
    let free_metadata = space
        .metadata
        .total_bytes
        .saturating_sub(space.metadata.used_bytes);
    let total_bytes = space.data.total_bytes + space.unallocated_bytes;
    let wanted = METADATA_ROOM_MAX.min(total_bytes / METADATA_ROOM_PART);
    let kept_back = 2 * wanted.saturating_sub(free_metadata);
    let free_data = space.data.total_bytes.saturating_sub(space.data.used_bytes);
    let unallocated = space.unallocated_bytes.checked_sub(kept_back);
    VolumeRoom {
        total_bytes,
        available_bytes: unallocated.map_or(0, |bytes| free_data + bytes),
        // It has no tables of inodes.
        inodes: 0,
        free_inodes: 0,
        metadata: Some(metadata_of(space)),
    }
}

/// The space for metadata: its chunks, and half of what belongs to no chunk yet, because it is kept twice.
fn metadata_of(space: &BtrfsSpace) -> MetadataSpace {
    let total_bytes = space.metadata.total_bytes + space.unallocated_bytes / 2;
    MetadataSpace {
        total_bytes,
        available_bytes: total_bytes.saturating_sub(space.metadata.used_bytes),
    }
}

/// Metadata that a volume must still be able to take: 1 GiB, or this part of a smaller volume.
const METADATA_ROOM_MAX: u64 = 1 << 30;
const METADATA_ROOM_PART: u64 = 20;

/// The super block: 4096 bytes with the right magic, which say that they belong at this place.
#[derive(Debug, Clone)]
pub(crate) struct SuperBlock {
    block: Vec<u8>,
}

impl SuperBlock {
    /// The super block in the stamp block. `None`: that is no btrfs.
    pub(super) fn parse(block: &[u8]) -> Option<Self> {
        Self::parse_at(block, SUPER_BLOCK_AT)
    }

    /// [`Self::parse`] of a copy that lies `at` these bytes of the volume.
    fn parse_at(block: &[u8], at: u64) -> Option<Self> {
        let block = block.get(..STAMP_BLOCK_BYTES)?;
        let found = Self {
            block: block.to_vec(),
        };
        let here = &found.block[0x40..0x48] == MAGIC && found.u64(0x30) == at;
        here.then_some(found)
    }

    /// `total_bytes`.
    pub(super) fn len_bytes(&self) -> u64 {
        self.u64(0x70)
    }

    /// Whether there is a log of fsyncs. Only a mount without `notreelog` makes one.
    pub(super) fn has_log(&self) -> bool {
        self.u64(0x60) != 0
    }

    /// The state, with the length of the container file. `None`: the block does not match its checksum,
    /// and the kernel refuses it, too.
    pub(super) fn state(&self, file_bytes: u64) -> Option<FileSystemState> {
        if self.checksum_fits() == Some(false) {
            return None;
        }
        Some(FileSystemState {
            stamp: Stamp {
                file_system: FileSystemKind::Btrfs,
                file_bytes,
                counter: self.u64(0x48),
                written_s: 0,
                digest: hex(&openssl::sha::sha256(&self.block)),
                open: self.has_log(),
            },
            errors: None,
            used_bytes: self.u64(0x78),
            unsupported: self.unsupported(),
        })
    }

    /// Whether the block matches its checksum. `None`: it is of a kind that is not computed here.
    pub(super) fn checksum_fits(&self) -> Option<bool> {
        self.checksum_of(&self.block)
    }

    /// Whether a block of this file system, or a node of its trees, matches its checksum.
    fn checksum_of(&self, block: &[u8]) -> Option<bool> {
        let (found, covered) = block.split_at(CHECKSUM_BYTES);
        Some(match self.u16(0xc4) {
            CHECKSUM_CRC32C => found.starts_with(&(!crc32c(!0, covered)).to_le_bytes()),
            CHECKSUM_XXHASH => found.starts_with(&xxhash64(covered).to_le_bytes()),
            CHECKSUM_SHA256 => found == openssl::sha::sha256(covered),
            CHECKSUM_BLAKE2 => return None,
            _ => return Some(false),
        })
    }

    /// The block with another ID of the file system. Before Linux 6.7 the kernel mounts each ID once, so a
    /// session that reads would keep another one on this machine from writing a backup. The trees keep
    /// their ID, which the block then has as `metadata_uuid` (Linux 5.0). `None`: its checksum is of a
    /// kind that is not computed here.
    pub(super) fn with_own_id(&self, id: [u8; 16]) -> Option<Vec<u8>> {
        let mut block = self.block.clone();
        let incompat = self.u64(0xbc);
        if incompat & INCOMPAT_METADATA_UUID == 0 {
            block[METADATA_UUID_AT..METADATA_UUID_AT + 16].copy_from_slice(&self.block[FSID]);
            let incompat = incompat | INCOMPAT_METADATA_UUID;
            block[0xbc..0xc4].copy_from_slice(&incompat.to_le_bytes());
        }
        block[FSID].copy_from_slice(&id);
        self.sealed(block)
    }

    /// The super block by its first copy, which differs from it only in its place. `None`: the copy is
    /// damaged, too.
    pub(super) fn restored_from(copy: &[u8]) -> Option<Vec<u8>> {
        let found = Self::parse_at(copy, COPIES_AT[0])?;
        let mut block = found.block.clone();
        block[0x30..0x38].copy_from_slice(&SUPER_BLOCK_AT.to_le_bytes());
        match found.checksum_fits() {
            Some(true) => found.sealed(block),
            _ => None,
        }
    }

    /// The block with its checksum. `None`: that is of a kind that is not computed here.
    fn sealed(&self, mut block: Vec<u8>) -> Option<Vec<u8>> {
        let covered = &block[CHECKSUM_BYTES..];
        let checksum = match self.u16(0xc4) {
            CHECKSUM_CRC32C => (!crc32c(!0, covered)).to_le_bytes().to_vec(),
            CHECKSUM_XXHASH => xxhash64(covered).to_le_bytes().to_vec(),
            CHECKSUM_SHA256 => openssl::sha::sha256(covered).to_vec(),
            _ => return None,
        };
        block[..checksum.len()].copy_from_slice(&checksum);
        Some(block)
    }

    /// Why a session must not write to this file system.
    fn unsupported(&self) -> Option<String> {
        if self.u64(0x88) != 1 {
            return Some(format!("it has {} devices", self.u64(0x88)));
        }
        if self.u32(0x90) != SECTOR_BYTES {
            return Some(format!("it has sectors of {} bytes", self.u32(0x90)));
        }
        let incompat = self.u64(0xbc) & !(INCOMPAT_MADE | INCOMPAT_HARMLESS);
        let compat_ro = self.u64(0xb4) & !(COMPAT_RO_MADE | COMPAT_RO_HARMLESS);
        let mut names: Vec<String> = INCOMPAT_NAMES
            .iter()
            .filter(|(bit, _)| incompat & bit != 0)
            .map(|(_, name)| (*name).to_owned())
            .collect();
        let named: u64 = INCOMPAT_NAMES.iter().map(|(bit, _)| bit).sum();
        if incompat & !named != 0 {
            names.push(format!("incompat {:#x}", incompat & !named));
        }
        if compat_ro != 0 {
            names.push(format!("compat_ro {compat_ro:#x}"));
        }
        (!names.is_empty()).then(|| {
            format!(
                "it has features that sprat does not use: {}",
                names.join(", ")
            )
        })
    }

    /// In what a file system that was just made differs from what sprat asked for.
    fn differs_from_wanted(&self) -> Option<String> {
        // mkfs may set the marks that the first mount or the first compressed file would set.
        let incompat = self.u64(0xbc) & !(0x10 | 0x20);
        let found = [
            ("incompat", incompat, INCOMPAT_MADE),
            ("compat_ro", self.u64(0xb4), COMPAT_RO_MADE),
            (
                "checksum",
                u64::from(self.u16(0xc4)),
                u64::from(CHECKSUM_XXHASH),
            ),
            (
                "sector size",
                u64::from(self.u32(0x90)),
                u64::from(SECTOR_BYTES),
            ),
            (
                "node size",
                u64::from(self.u32(0x94)),
                u64::from(NODE_BYTES),
            ),
            ("devices", self.u64(0x88), 1),
        ];
        let differing = found.iter().find(|(_, found, wanted)| found != wanted);
        let text = differing
            .map(|(what, found, wanted)| format!("{what} is {found:#x} and must be {wanted:#x}"));
        match self.checksum_fits() {
            Some(true) => text,
            _ => Some("its super block does not match its checksum".to_owned()),
        }
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    /// Bytes of the block, which is long enough for every `at` here.
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.block[at..at + N]);
        bytes
    }
}
