//! Makes and mounts the ext4 file system of a volume.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::AttachError;
use crate::program;

/// The longest label of ext4, in bytes.
const LABEL_BYTES_MAX: usize = 16;

/// How many blocks of an inode table are read at once: 1 MiB, 4096 inodes. On a slow connection one such
/// request costs hardly more than one of 4 KiB, and a walk of a snapshot needs the neighbours next.
const INODE_READ_AHEAD_BLOCKS: u32 = 256;

/// Exactly these features, whatever the machine's mke2fs.conf says. Linux 3.18 and e2fsprogs 1.43 (2016)
/// support them all, so an old rescue system can open the volume, too. With newer defaults
/// (`orphan_file`, `metadata_csum_seed`) e2fsck 1.46 could not.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,\
flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// No zeros need be sent: below the file system there is a cipher, so zeros become ciphertext. `lazy_…`
/// leaves inode tables and journal as they are, `nodiscard` sends no discard, and packed metadata is at
/// the front, where large reads and a cache work well. This writes 60 MiB on 5 TiB.
const EXTENDED: &str = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,packed_meta_blocks=1";

/// How to make the file system.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct MkfsOptions {
    /// The file system's label, at most 16 bytes. A longer one is cut at a character.
    pub label: String,
    /// How many files and folders the file system can have. `None`: the default of the system's
    /// mke2fs.conf, most often one for each 16 KiB.
    pub inodes: Option<u64>,
}

impl MkfsOptions {
    /// Options for a file system with this label.
    #[must_use]
    pub fn labelled(label: &str) -> Self {
        Self {
            label: label.into(),
            ..Self::default()
        }
    }
}

/// How to mount the file system.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct MountOptions {
    /// Mounts read-only. A dirty journal is still replayed *into the device*: give it a device whose
    /// writes go to an overlay.
    pub read_only: bool,
    /// For browsing: device nodes don't work and set-uid bits have no effect (`nodev,nosuid`). Both can
    /// still be read and copied.
    pub browse: bool,
    /// For growing. With `noinit_itable` the kernel zeroes the inode tables of every new block group
    /// before it uses the group (`ext4_setup_next_flex_gd` in fs/ext4/resize.c): 80 GiB for 5 TiB. With
    /// `init_itable` a thread does that, which ends with the mount. Here it waits 10,000 times as long
    /// as each group took.
    pub grow: bool,
}

/// The size of the journal, where mke2fs would make a larger one (1 GiB from 128 GiB on,
/// `ext2fs_default_journal_size` in lib/ext2fs/mkjournal.c). Its blocks are not written before they are
/// used. So on a server with a full disk even a deletion needs new blocks, at most as many as the
/// journal has. The reserve beside a container is twice that.
const JOURNAL_MIB_MAX: u64 = 32;
/// From this size on mke2fs would make a larger journal.
const LARGE_BYTES: u64 = 2 << 30;

/// Makes an ext4 file system on `device` with the system's `mkfs.ext4`.
///
/// It overwrites existing data without asking. Writes about 60 MiB on 5 TiB.
pub fn make_file_system(device: &Path, options: &MkfsOptions) -> Result<(), AttachError> {
    let mut command = program::command("mkfs.ext4")?;
    command
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0"])
        .args(["-O", FEATURES, "-E", EXTENDED])
        .args(["-L", cut_label(&options.label, LABEL_BYTES_MAX)]);
    let bytes = File::open(device)
        .and_then(|mut device| device.seek(SeekFrom::End(0)))
        .map_err(|error| AttachError::io("measure", device.display().to_string(), error))?;
    if bytes >= LARGE_BYTES {
        command.arg("-J").arg(format!("size={JOURNAL_MIB_MAX}"));
    }
    if let Some(inodes) = options.inodes {
        command.arg("-N").arg(inodes.to_string());
    }
    command.arg(device);
    program::run("mkfs.ext4", command)
}

/// The label, cut to its longest part of whole characters that has at most so many bytes.
pub(crate) fn cut_label(label: &str, bytes_max: usize) -> &str {
    let mut end = label.len().min(bytes_max);
    while !label.is_char_boundary(end) {
        end -= 1;
    }
    &label[..end]
}

/// Mounts the file system of `device` on `dir`.
pub(crate) fn mount(device: &Path, dir: &Path, options: &MountOptions) -> Result<(), AttachError> {
    let mut flags = MountFlags::NOATIME;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    if options.browse {
        flags |= MountFlags::NODEV | MountFlags::NOSUID;
    }
    // nodelalloc: with delayed allocation, files can have full size and time after a crash, but not
    // their data, and the next run would trust them. noinit_itable: the kernel would zero the inode
    // tables in the background, and all of that is uploaded. errors: a damaged volume is not written to.
    // commit: growing changes the same blocks many times (group descriptors and all their backups). If
    // the journal is written when it is full, and not every five seconds, it has each of them once.
    let itable = if options.grow {
        "init_itable=10000,commit=300"
    } else {
        "noinit_itable"
    };
    let data = format!(
        "{itable},nodelalloc,errors=remount-ro,inode_readahead_blks={INODE_READ_AHEAD_BLOCKS}\0"
    );
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).map_err(|_| {
        AttachError::OutOfOrder {
            op: "mount",
            reason: "mount options with a NUL",
        }
    })?;
    rustix::mount::mount(device, dir, "ext4", flags, data).map_err(|e| refused(device, dir, e))
}

fn refused(device: &Path, dir: &Path, e: Errno) -> AttachError {
    let reason = match e {
        Errno::BUSY => {
            return AttachError::Busy {
                op: "mount on",
                dir: dir.into(),
                users: Vec::new(),
            };
        }
        Errno::PERM | Errno::ACCESS => {
            return AttachError::io("mount on", dir.display().to_string(), e);
        }
        Errno::NOENT | Errno::NOTDIR => "the mount point isn't a folder",
        Errno::NODEV => "the kernel has no ext4",
        Errno::INVAL => "no ext4 file system is on the volume, or its super block is damaged",
        Errno::UCLEAN | Errno::BADMSG | Errno::NOTBLK => "the ext4 file system is damaged",
        Errno::IO => "the volume can't be read or written",
        _ => "the kernel refused",
    };
    AttachError::MountRefused {
        device: device.display().to_string(),
        dir: dir.into(),
        reason,
        // The kernel returns EIO also for a failing device. The volume process reports that, and its
        // report has priority.
        damaged: matches!(
            e,
            Errno::INVAL | Errno::UCLEAN | Errno::BADMSG | Errno::NOTBLK | Errno::IO
        ),
        source: e.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_cut_at_a_character_boundary() {
        let cut_label = |label| cut_label(label, LABEL_BYTES_MAX);
        assert_eq!(cut_label("laptop"), "laptop");
        assert_eq!(cut_label("0123456789abcdef-more"), "0123456789abcdef");
        assert_eq!(cut_label("0123456789abcdeü"), "0123456789abcde");
        assert_eq!(cut_label(""), "");
    }
}
