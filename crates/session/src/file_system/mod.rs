//! The file system inside the volume: the only place that knows which kind it is.
//!
//! The rest of the crate asks [`FileSystemKind`] and [`SuperBlock`]. Each kind is one file beside
//! this one. A second kind is one more file and one more variant; the compiler then names each
//! question that it must answer. `attach` runs the programs and the system calls.

mod ext4;
pub mod inodes;
pub(crate) mod ranges;
mod stamp;

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sprat_attach::{AttachError, Attachment, MountOptions};
use sprat_luks::{Header, SectorCipher};
use sprat_snapshot::Cancel;
use sprat_store::{ReadClass, StoreFile};

use crate::protocol::reports::VolumeRoom;
use crate::{Exit, Failure};

pub use stamp::{Age, Stamp};

/// Reads the volume's plaintext: fills the buffer from an offset in bytes.
pub(crate) type Read<'r> = dyn FnMut(u64, &mut [u8]) -> Result<(), String> + 'r;

/// Length of a stamp block: one block of the volume.
pub(crate) const STAMP_BLOCK_BYTES: usize = sprat_volume::BLOCK_BYTES;

/// A kind of file system that sprat can have inside a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileSystemKind {
    /// Counter of its stamp: `s_kbytes_written`, the KiB written in the file system's whole life,
    /// which the kernel never lowers. Time: `s_wtime`.
    Ext4,
}

impl FileSystemKind {
    /// The kind that `init` makes. While it is the only kind, every container has it.
    ///
    /// A session reads the stamp block before it has the key. A second kind must therefore be known
    /// from somewhere else than the volume, for example from the state folder.
    pub(crate) const DEFAULT: Self = Self::Ext4;

    /// Where the stamp block lies in the volume, in bytes. It is one block of [`STAMP_BLOCK_BYTES`],
    /// and each session that writes changes it.
    ///
    /// The cache, the check of a read-only session and the memory of this machine compare this
    /// block.
    pub(crate) const fn stamp_range(self) -> Range<u64> {
        match self {
            Self::Ext4 => ext4::STAMP_RANGE,
        }
    }

    /// The largest volume of this kind, in bytes.
    pub(crate) const fn volume_bytes_max(self) -> u64 {
        match self {
            Self::Ext4 => ext4::VOLUME_BYTES_MAX,
        }
    }

    /// Makes an empty file system on `device`. Overwrites what is there. `inodes`: as many files
    /// and folders it can hold; `None`: the kind's default.
    pub(crate) fn make(
        self,
        device: &Path,
        label: Option<&str>,
        inodes: Option<u64>,
    ) -> Result<(), AttachError> {
        match self {
            Self::Ext4 => ext4::make(device, label, inodes),
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
        }
    }

    /// Checks the structures of the file system on `device`, which is not mounted. It repairs
    /// nothing; a journal is replayed first. A cancel ends the check.
    pub(crate) fn check(self, device: &Path, cancel: &Cancel) -> Result<FileSystemCheck, Failure> {
        match self {
            Self::Ext4 => ext4::fsck::check(device, cancel),
        }
    }

    /// Whether this process may grow a mounted file system of this kind.
    pub(crate) fn may_grow(self) -> bool {
        match self {
            Self::Ext4 => sprat_attach::may_grow(),
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
        }
    }

    /// The free space and the free inodes of the file system that is mounted on `root`. Reads the
    /// kernel's memory only. `None`: not known.
    pub(crate) fn room(self, root: &Path) -> Option<VolumeRoom> {
        match self {
            Self::Ext4 => ext4::room(root),
        }
    }

    /// What a stamp's counter means in bytes that were written in the file system's whole life.
    const fn life_bytes(self, counter: u64) -> u64 {
        match self {
            Self::Ext4 => ext4::life_bytes(counter),
        }
    }
}

/// The super block of a file system, read from the volume without mounting it.
#[derive(Debug, Clone)]
pub(crate) enum SuperBlock {
    Ext4(ext4::SuperBlock),
}

impl SuperBlock {
    /// The super block in the stamp block `block`, in plaintext. `None`: there is no file system of
    /// a known kind.
    pub(crate) fn recognise(block: &[u8]) -> Option<Self> {
        ext4::SuperBlock::parse(block).map(Self::Ext4)
    }

    /// Reads the super block. An error: there is no file system of a known kind.
    pub(crate) fn read(read: &mut Read<'_>) -> Result<Self, String> {
        let range = FileSystemKind::DEFAULT.stamp_range();
        let mut block = vec![0; STAMP_BLOCK_BYTES];
        read(range.start, &mut block)?;
        Self::recognise(&block).ok_or_else(|| ext4::NOT_FOUND.to_owned())
    }

    /// The length of the file system in bytes. `None`: the super block has an impossible length.
    pub(crate) fn len_bytes(&self) -> Option<u64> {
        match self {
            Self::Ext4(block) => block.len_bytes(),
        }
    }

    /// Whether the file system is marked as having errors, and was not checked since.
    pub(crate) fn has_errors(&self) -> bool {
        match self {
            Self::Ext4(block) => block.has_errors(),
        }
    }

    /// Whether a mount must replay a journal first.
    pub(crate) fn needs_recovery(&self) -> bool {
        match self {
            Self::Ext4(block) => block.needs_recovery(),
        }
    }

    /// Ranges of the volume, in bytes, that are allocated and whose content nobody needs. Empty where
    /// the file system has features that sprat does not know.
    pub(crate) fn disposable_ranges(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        match self {
            Self::Ext4(block) => block.disposable_ranges(read),
        }
    }

    /// Ranges of the volume, in bytes and in order, of all that is in use, without the
    /// [disposable](Self::disposable_ranges) ones. An error: a checksum does not match, or the file
    /// system has features that sprat does not know.
    pub(crate) fn used_ranges(&self, read: &mut Read<'_>) -> Result<Vec<Range<u64>>, String> {
        match self {
            Self::Ext4(block) => block.used_ranges(read),
        }
    }
}

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
}

impl FileSystemState {
    /// Reads the stamp block `block`, in plaintext, of a container file of `file_bytes`. `None`:
    /// there is no file system of a known kind.
    pub fn read(block: &[u8], file_bytes: u64) -> Option<Self> {
        SuperBlock::recognise(block).map(|found| match found {
            SuperBlock::Ext4(block) => block.state(file_bytes),
        })
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
/// file in bytes.
pub fn read_stamp_block(
    file: &dyn StoreFile,
    header: &Header,
    cipher: &SectorCipher,
) -> Result<(Vec<u8>, u64), Failure> {
    let file_bytes = file.len()?;
    let range = FileSystemKind::DEFAULT.stamp_range();
    let mut block = vec![0; STAMP_BLOCK_BYTES];
    let at = header.geometry(file_bytes)?.offset_bytes + range.start;
    file.read_at(at, &mut block, ReadClass::Demand)?;
    cipher.decrypt(range.start, &mut block)?;
    Ok((block, file_bytes))
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
    const ALLOWED: [(&str, &str); 6] = [
        ("session/src/file_system/", "the seam"),
        ("attach/", "runs mkfs, mount and the ioctls"),
        ("snapshot/", "knows the file systems of sources"),
        ("store/", "knows the file systems of servers"),
        ("cli/tests/", "inspects containers from outside"),
        ("testkit-session/", "inspects containers from outside"),
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
                if ["ext4", "ext2", "0xef53", "e2fsck"]
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
