//! The file system inside the volume: the only place that knows which kind it is.
//!
//! The rest of the crate asks [`FileSystemKind`] and [`SuperBlock`]. Each kind is one file beside
//! this one. A second kind is one more file and one more variant; the compiler then names each
//! question that it must answer. `attach` runs the programs and the system calls.

mod btrfs;
mod ext4;
pub mod inodes;
pub(crate) mod ranges;
mod room;
mod stamp;
mod xxhash;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sprat_attach::{AttachError, AttachOptions, Attachment, MountOptions};
use sprat_inside::SharedSpace;
use sprat_luks::{Header, SectorCipher};
use sprat_snapshot::{Cancel, Subvolumes};
use sprat_store::{ReadClass, StoreFile};

use crate::{Exit, Failure, text};

pub use room::{MetadataSpace, VolumeRoom, free_text};
pub use stamp::{Age, Stamp};

/// Reads the volume's plaintext: fills the buffer from an offset in bytes.
pub(crate) type Read<'r> = dyn FnMut(u64, &mut [u8]) -> Result<(), String> + 'r;

/// The read-ahead for e2fsck, which asks for most of what it needs in time: the kernel's default. A larger one reads what
/// nobody needs, four times as much as is needed in a small volume.
const CHECK_READ_AHEAD_BYTES: u64 = 128 << 10;

/// See [`FileSystemKind::extents`].
pub(crate) type Extents = dyn Fn(&File) -> io::Result<Vec<Range<u64>>>;

/// Length of a stamp block: one block of the volume.
pub(crate) const STAMP_BLOCK_BYTES: usize = sprat_volume::BLOCK_BYTES;

/// A kind of file system that sprat can have inside a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileSystemKind {
    /// Counter of its stamp: `s_kbytes_written`, the KiB written in the file system's whole life,
    /// which the kernel never lowers. Time: `s_wtime`.
    Ext4,
    /// Counter of its stamp: the generation, which grows with each commit. It has no time.
    Btrfs,
}

impl FileSystemKind {
    /// The kinds that a volume is searched for, in this order. btrfs is not among them yet: snapshots
    /// on it are not.
    pub(crate) const ALL: [Self; 2] = [Self::Ext4, Self::Btrfs];

    /// The kind that `init` makes. A volume in which no kind is recognised counts as this one: its
    /// mount then reports what is wrong.
    pub const DEFAULT: Self = Self::Ext4;

    /// All kinds, for a choice.
    #[must_use]
    pub fn names() -> Vec<&'static str> {
        Self::ALL.iter().map(|kind| kind.name()).collect()
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Btrfs => "btrfs",
        }
    }

    /// The kind of that name, for a container of `container_bytes`.
    ///
    /// # Errors
    /// It can't have that size, or a limit of `inodes`, or this machine can't make it.
    pub fn chosen(name: &str, container_bytes: u64, inodes: Option<u64>) -> Result<Self, Failure> {
        let mut all = Self::ALL.into_iter();
        let kind = all
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Failure::usage(format!("unknown file system {name}")))?;
        let min = kind.container_bytes_min();
        if container_bytes < min {
            return Err(Failure::usage(format!(
                "--size {} is too small: at least {} are needed",
                text::bytes(container_bytes),
                text::bytes(min)
            )));
        }
        if inodes.is_some() && kind.default_inodes(container_bytes).is_none() {
            return Err(Failure::usage(format!(
                "--inodes has no meaning for {name}: it takes as many files as there is space for"
            )));
        }
        kind.check_usable()?;
        Ok(kind)
    }

    /// Fails if this machine can't make or mount volumes of this kind. Checked before anything is created.
    pub(crate) fn check_usable(self) -> Result<(), Failure> {
        match self {
            Self::Ext4 => Ok(()),
            Self::Btrfs => btrfs::check_usable(),
        }
    }

    /// How many files fit into a new volume of `bytes`. `None`: as many as there is space for.
    #[must_use]
    pub fn default_inodes(self, bytes: u64) -> Option<u64> {
        match self {
            Self::Ext4 => Some(inodes::default_inodes(bytes)),
            Self::Btrfs => None,
        }
    }

    /// The smallest container file with a volume of this kind, in bytes.
    pub(crate) const fn container_bytes_min(self) -> u64 {
        match self {
            Self::Ext4 => crate::SIZE_BYTES_MIN,
            Self::Btrfs => btrfs::CONTAINER_BYTES_MIN,
        }
    }

    /// The smallest volume that one of this kind can be shrunk to, in bytes.
    pub(crate) const fn shrunk_volume_bytes_min(self) -> u64 {
        match self {
            // It can't be shrunk.
            Self::Ext4 => u64::MAX,
            Self::Btrfs => btrfs::SHRUNK_VOLUME_BYTES_MIN,
        }
    }

    /// Fails if a server without fsync could destroy volumes of this kind by a crash, whatever the user
    /// accepts.
    pub(crate) fn check_order(self, durable_flush: bool) -> Result<(), Failure> {
        match self {
            Self::Btrfs if !durable_flush => Err(btrfs::needs_fsync()),
            Self::Ext4 | Self::Btrfs => Ok(()),
        }
    }

    /// Where the stamp block lies in the volume, in bytes. It is one block of [`STAMP_BLOCK_BYTES`],
    /// and each session that writes changes it.
    ///
    /// The cache, the check of a read-only session and the memory of this machine compare this
    /// block. A session that does not yet know the kind reads the stamp blocks of all kinds.
    pub(crate) const fn stamp_range(self) -> Range<u64> {
        match self {
            Self::Ext4 => ext4::STAMP_RANGE,
            Self::Btrfs => btrfs::STAMP_RANGE,
        }
    }

    /// The largest volume of this kind, in bytes.
    pub(crate) const fn volume_bytes_max(self) -> u64 {
        match self {
            Self::Ext4 => ext4::VOLUME_BYTES_MAX,
            Self::Btrfs => btrfs::VOLUME_BYTES_MAX,
        }
    }

    /// Makes an empty file system on `device`. Overwrites what is there. `inodes`: as many files
    /// and folders it can hold; `None`: the kind's default.
    pub(crate) fn make(
        self,
        device: &Path,
        label: Option<&str>,
        inodes: Option<u64>,
    ) -> Result<(), Failure> {
        match self {
            Self::Ext4 => ext4::make(device, label, inodes),
            Self::Btrfs => btrfs::make(device, label),
        }
    }

    /// Mounts the file system of the attached device on `dir`.
    pub(crate) fn mount(
        self,
        attachment: &mut Attachment,
        dir: &Path,
        options: &MountOptions,
    ) -> Result<(), AttachError> {
        match self {
            Self::Ext4 => attachment.mount(dir, options),
            Self::Btrfs => attachment.mount_btrfs(dir, options),
        }
    }

    /// Checks the structures of the file system on the attached device, which is not mounted. It repairs
    /// nothing; a journal is replayed first. A kind that must be mounted for it is mounted on `dir`
    /// meanwhile. A cancel ends the check.
    pub(crate) fn check(
        self,
        attachment: &mut Attachment,
        dir: &Path,
        cancel: &Cancel,
    ) -> Result<FileSystemCheck, Failure> {
        match self {
            Self::Ext4 => {
                attachment.set_read_ahead(CHECK_READ_AHEAD_BYTES)?;
                let found = ext4::fsck::check(attachment.device(), cancel);
                attachment.set_read_ahead(AttachOptions::default().read_ahead_bytes)?;
                found
            }
            Self::Btrfs => btrfs::check(attachment, dir, cancel),
        }
    }

    /// Whether this process may grow a mounted file system of this kind.
    pub(crate) fn may_grow(self) -> bool {
        match self {
            Self::Ext4 => sprat_attach::may_grow(),
            Self::Btrfs => true,
        }
    }

    /// Grows the mounted file system to `volume_bytes`.
    pub(crate) fn grow(
        self,
        attachment: &Attachment,
        volume_bytes: u64,
    ) -> Result<(), AttachError> {
        match self {
            Self::Ext4 => attachment.grow(volume_bytes),
            Self::Btrfs => attachment.resize_btrfs(volume_bytes),
        }
    }

    /// Shrinks the mounted file system to `volume_bytes`.
    pub(crate) fn shrink(self, attachment: &Attachment, volume_bytes: u64) -> Result<(), Failure> {
        self.check_may_shrink()?;
        attachment.resize_btrfs(volume_bytes).map_err(|error| {
            let is_full = matches!(&error, AttachError::Io { source, .. }
                if source.kind() == io::ErrorKind::StorageFull);
            match is_full {
                true => Failure::failed(format!(
                    "what is in the volume does not fit into {}",
                    text::bytes(volume_bytes)
                ))
                .with_hint(
                    "the container works as before. Choose a larger size, or remove snapshots first: sprat prune",
                ),
                false => error.into(),
            }
        })
    }

    /// Refuses a kind that can't be shrunk while it is mounted.
    pub(crate) fn check_may_shrink(self) -> Result<(), Failure> {
        match self {
            Self::Btrfs => Ok(()),
            Self::Ext4 => Err(Failure::failed("a container with ext4 can't be made smaller").with_hint(
                "nothing was changed. The container takes only the space of its data, and `sprat trim` releases the \
                 space of deleted data. For a smaller limit, create a new container with `sprat init --size` and back \
                 up to it",
            )),
        }
    }

    /// What returns the byte ranges of the device that contain the content of a file of the file system
    /// that is mounted on `root`.
    pub(crate) fn extents(self, root: &Path) -> Result<Box<Extents>, AttachError> {
        Ok(match self {
            Self::Ext4 => Box::new(sprat_attach::extents),
            Self::Btrfs => {
                let map = sprat_attach::ChunkMap::read(root)?;
                Box::new(move |file| map.extents(file))
            }
        })
    }

    /// What the snapshots of the file system that is mounted on `root` share in parts of files. `None`: they
    /// share whole files only, or it can't be read.
    pub(crate) fn shared_space(self, root: &Path, cancel: &Cancel) -> Option<SharedSpace> {
        match self {
            Self::Ext4 => None,
            Self::Btrfs => btrfs::shared_space(root, cancel),
        }
    }

    /// How snapshots are made in a volume of this kind, if they are subvolumes. `None`: they share files by
    /// hard links.
    pub(crate) fn subvolumes(self) -> Option<&'static dyn Subvolumes> {
        match self {
            Self::Ext4 => None,
            Self::Btrfs => Some(&btrfs::ByIoctl),
        }
    }

    /// The free space and the free inodes of the file system that is mounted on `root`. Reads the
    /// kernel's memory only. `None`: not known.
    pub(crate) fn room(self, root: &Path) -> Option<VolumeRoom> {
        match self {
            Self::Ext4 => ext4::room(root),
            Self::Btrfs => btrfs::room(root),
        }
    }

    /// What a stamp's counter means in bytes that were written in the file system's whole life.
    /// `None`: the kind does not count them.
    const fn life_bytes(self, counter: u64) -> Option<u64> {
        match self {
            Self::Ext4 => Some(ext4::life_bytes(counter)),
            Self::Btrfs => None,
        }
    }
}

/// The super block of a file system, read from the volume without mounting it.
#[derive(Debug, Clone)]
pub(crate) enum SuperBlock {
    Ext4(ext4::SuperBlock),
    Btrfs(btrfs::SuperBlock),
}

impl SuperBlock {
    /// The super block in the stamp block `block`, in plaintext. `None`: there is no file system of
    /// a known kind.
    pub(crate) fn recognise(block: &[u8]) -> Option<Self> {
        // btrfs first: its super block also names its own place.
        btrfs::SuperBlock::parse(block)
            .map(Self::Btrfs)
            .or_else(|| ext4::SuperBlock::parse(block).map(Self::Ext4))
    }

    /// Reads the super block. An error: there is no file system of a known kind.
    pub(crate) fn read(read: &mut Read<'_>) -> Result<Self, String> {
        let found = find_stamp_block(|kind| {
            let mut block = vec![0; STAMP_BLOCK_BYTES];
            read(kind.stamp_range().start, &mut block).map(|()| block)
        })?;
        found
            .and_then(|found| Self::recognise(&found.block))
            .ok_or_else(|| NOT_FOUND.to_owned())
    }

    const fn kind(&self) -> FileSystemKind {
        match self {
            Self::Ext4(_) => FileSystemKind::Ext4,
            Self::Btrfs(_) => FileSystemKind::Btrfs,
        }
    }

    /// The length of the file system in bytes. `None`: the super block has an impossible length.
    pub(crate) fn len_bytes(&self) -> Option<u64> {
        match self {
            Self::Ext4(block) => block.len_bytes(),
            Self::Btrfs(block) => Some(block.len_bytes()),
        }
    }

    /// Whether the file system is marked as having errors, and was not checked since.
    pub(crate) fn has_errors(&self) -> bool {
        match self {
            Self::Ext4(block) => block.has_errors(),
            Self::Btrfs(_) => false,
        }
    }

    /// Whether a mount must replay a journal first.
    pub(crate) fn needs_recovery(&self) -> bool {
        match self {
            Self::Ext4(block) => block.needs_recovery(),
            Self::Btrfs(block) => block.has_log(),
        }
    }

    /// Ranges of the volume, in bytes, that are allocated and whose content nobody needs. Empty where
    /// the file system has features that sprat does not know.
    pub(crate) fn disposable_ranges(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        match self {
            Self::Ext4(block) => block.disposable_ranges(read),
            Self::Btrfs(_) => Ok(Vec::new()),
        }
    }

    /// Ranges of the volume, in bytes and in order, of all that is in use, without the
    /// [disposable](Self::disposable_ranges) ones. An error: a checksum does not match, or the file
    /// system has features that sprat does not know.
    pub(crate) fn used_ranges(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        match self {
            Self::Ext4(block) => block.used_ranges(read),
            Self::Btrfs(block) => block.used_ranges(read),
        }
    }
}

/// A stamp block that was found, in plaintext.
#[derive(Debug, Clone)]
pub(crate) struct FoundStamp {
    pub kind: FileSystemKind,
    pub block: Vec<u8>,
    /// The block in the volume is damaged, and this one was made from its copy.
    pub restored: bool,
}

impl FoundStamp {
    /// Whether the block does not match its checksum, so that the kernel refuses it.
    pub(crate) fn is_damaged(&self) -> bool {
        match SuperBlock::recognise(&self.block) {
            Some(SuperBlock::Btrfs(found)) => found.checksum_fits() == Some(false),
            Some(SuperBlock::Ext4(_)) | None => false,
        }
    }

    /// The block that a session which only reads shows to the kernel instead, if it must be another one.
    pub(crate) fn for_reading(&self) -> Result<Option<Vec<u8>>, Failure> {
        match SuperBlock::recognise(&self.block) {
            Some(SuperBlock::Btrfs(found)) => {
                let mut id = [0; 16];
                openssl::rand::rand_bytes(&mut id)
                    .map_err(|error| Failure::failed("no random bytes").caused_by(&error))?;
                Ok(found.with_own_id(id))
            }
            Some(SuperBlock::Ext4(_)) | None => Ok(None),
        }
    }
}

/// Searches a volume for a file system. `read` returns the stamp block of a kind, in plaintext. It is
/// called until a kind is recognised. `None`: there is no file system of a known kind.
pub(crate) fn find_stamp_block<E>(
    mut read: impl FnMut(FileSystemKind) -> Result<Vec<u8>, E>,
) -> Result<Option<FoundStamp>, E> {
    for kind in FileSystemKind::ALL {
        let block = read(kind)?;
        if SuperBlock::recognise(&block).is_some_and(|found| found.kind() == kind) {
            let restored = false;
            return Ok(Some(FoundStamp {
                kind,
                block,
                restored,
            }));
        }
    }
    Ok(None)
}

/// Makes the stamp block of a volume from its copy. `read` returns the block at a place of the volume, in
/// plaintext.
pub(crate) fn restored_stamp_block<E>(
    mut read: impl FnMut(u64) -> Result<Vec<u8>, E>,
) -> Result<Option<FoundStamp>, E> {
    for kind in FileSystemKind::ALL {
        let copy = match kind {
            FileSystemKind::Ext4 => continue,
            FileSystemKind::Btrfs => read(btrfs::COPIES_AT[0])?,
        };
        if let Some(block) = btrfs::SuperBlock::restored_from(&copy) {
            let restored = true;
            return Ok(Some(FoundStamp {
                kind,
                block,
                restored,
            }));
        }
    }
    Ok(None)
}

const NOT_FOUND: &str = "no file system that sprat knows is on the volume";

/// Proof that blocks which the file system reports as free are free.
pub(crate) struct FreeIsTrusted(());

impl FreeIsTrusted {
    /// Fails if the file system is marked as damaged, or if its journal was not replayed.
    pub(crate) fn check(found: &SuperBlock) -> Result<Self, Failure> {
        if found.has_errors() {
            return Err(Failure::new(
                Exit::Damaged,
                "the file system in the container is marked as damaged",
            )
            .with_hint(
                "no space was released: blocks that a damaged file system reports as free can be in \
                 use. Restore the files that you need, then repair the file system",
            ));
        }
        // The mount before this has replayed the journal, or failed. This checks it all the same.
        if found.needs_recovery() {
            return Err(Failure::failed(
                "the journal was not replayed by the mount before",
            ));
        }
        Ok(Self(()))
    }
}

/// What the stamp block shows about the file system and its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystemState {
    /// The state of the volume.
    pub stamp: Stamp,
    /// How many errors the file system has met since it was last repaired.
    pub errors: Option<u32>,
    /// Bytes in use, as of the last unmount.
    pub used_bytes: u64,
    /// Why a session must not write to it.
    pub unsupported: Option<String>,
}

impl FileSystemState {
    /// Reads the stamp block `block`, in plaintext, of a container file of `file_bytes`. `None`:
    /// there is no file system of a known kind, or the block does not match its checksum.
    pub fn read(block: &[u8], file_bytes: u64) -> Option<Self> {
        match SuperBlock::recognise(block)? {
            SuperBlock::Ext4(block) => Some(block.state(file_bytes)),
            SuperBlock::Btrfs(block) => block.state(file_bytes),
        }
    }
}

/// The result of a check of the file system's structures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystemCheck {
    /// Nothing was found.
    pub clean: bool,
    /// The checking program's output, cut to a readable length.
    pub output: String,
}

/// The length in bytes of the file system that has this stamp block, in plaintext. `None`: there is
/// no file system of a known kind.
pub fn file_system_bytes(block: &[u8]) -> Option<u64> {
    SuperBlock::recognise(block)?.len_bytes()
}

/// Reads the stamp block of a container. Returns it in plaintext, with the length of the container
/// file in bytes. If no kind is recognised, it is the block that the default kind would have.
pub fn read_stamp_block(
    file: &dyn StoreFile,
    header: &Header,
    cipher: &SectorCipher,
) -> Result<(Vec<u8>, u64), Failure> {
    let file_bytes = file.len()?;
    let payload = header.geometry(file_bytes)?;
    let mut first = None;
    let found = find_stamp_block(|kind| {
        let range = kind.stamp_range();
        let mut block = vec![0; STAMP_BLOCK_BYTES];
        // A volume that ends before has no file system of this kind.
        if first.is_none() || range.end <= payload.len_bytes {
            file.read_at(
                payload.offset_bytes + range.start,
                &mut block,
                ReadClass::Demand,
            )?;
            cipher.decrypt(range.start, &mut block)?;
        }
        first.get_or_insert_with(|| block.clone());
        Ok::<_, Failure>(block)
    })?;
    let block = found.map(|found| found.block).or(first);
    Ok((block.unwrap_or_default(), file_bytes))
}

#[cfg(test)]
pub(crate) use ext4::tests::stamp_block;

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn free_blocks_are_trusted_only_without_errors_and_journal() {
        let check = |at: usize, value| {
            let mut block = stamp_block(1, 1, 0);
            block[1024 + at] = value;
            FreeIsTrusted::check(&SuperBlock::recognise(&block).unwrap()).map(drop)
        };
        check(0x3a, 1).unwrap();
        assert_eq!(check(0x3a, 3).unwrap_err().exit, Exit::Damaged);
        assert_eq!(check(0x60, 4).unwrap_err().exit, Exit::Failed);
    }

    /// Files that may name a kind of file system in code, and why. A folder ends with a slash.
    const ALLOWED: [(&str, &str); 9] = [
        ("session/src/file_system/", "the seam"),
        ("attach/", "runs mkfs, mount and the ioctls"),
        ("snapshot/", "knows the file systems of sources"),
        ("store/", "knows the file systems of servers"),
        ("agent/tests/", "makes the disks of servers"),
        ("cli/tests/", "inspects containers from outside"),
        ("inside/tests/", "compares with a file system of its own"),
        ("testkit-session/", "inspects containers from outside"),
        ("testkit/", "makes containers of both kinds"),
    ];

    fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rust_files(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }

    /// The code of a line, without its comment and the content of strings that end on it.
    fn code_of(line: &str) -> String {
        let line = line.split("//").next().unwrap_or_default();
        line.split('"').step_by(2).collect()
    }

    #[test]
    fn only_the_seam_and_attach_name_a_kind_of_file_system() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut files = Vec::new();
        rust_files(crates, &mut files);
        assert!(files.len() > 100, "{}", files.len());
        let mut found = Vec::new();
        for file in files {
            let name = file.strip_prefix(crates).unwrap().to_str().unwrap();
            if ALLOWED.iter().any(|(allowed, _)| name.starts_with(allowed)) {
                continue;
            }
            let text = std::fs::read_to_string(&file).unwrap();
            let mut in_string = false;
            for (number, line) in text.lines().enumerate() {
                // The lines of a string that goes on after its first line hold no code.
                let odd = line.matches('"').count() % 2 == 1;
                let code = if in_string {
                    String::new()
                } else {
                    code_of(line)
                };
                in_string ^= odd && (in_string || line.trim_end().ends_with('\\'));
                let code = code.to_lowercase();
                if ["ext4", "ext2", "0xef53", "e2fsck", "btrfs"]
                    .iter()
                    .any(|it| code.contains(it))
                {
                    found.push(format!("{name}:{}: {line}", number + 1));
                }
            }
        }
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
