//! Makes and mounts a volume's btrfs, and the operations on a mounted one that need an ioctl.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::ext4::{MkfsOptions, MountOptions, cut_label};
use crate::sys::{self, PlainCall, SearchKey, SubvolumeCall, VolumeCall};
use crate::{AttachError, keep_only, loop_device, program};

/// The longest label of btrfs, in bytes (`BTRFS_LABEL_SIZE` with its NUL).
const LABEL_BYTES_MAX: usize = 255;

/// Features that an old kernel knows: Linux 3.7, 3.10, 3.14 and, for the free space tree, 4.5.
const FEATURES: &str = "extref,skinny-metadata,no-holes";
const FREE_SPACE_TREE: &str = "free-space-tree";

/// Features that newer versions of mkfs.btrfs switch on by themselves, or may. mkfs.btrfs refuses a name
/// that it does not know, so only what it lists is switched off.
const UNWANTED: [&str; 8] = [
    "mixed-bg",
    "raid56",
    "quota",
    "squota",
    "zoned",
    "extent-tree-v2",
    "block-group-tree",
    "raid-stripe-tree",
];

/// How the volume is mounted. `subvolid=5`: somebody may have set another default subvolume.
/// `nodiscard`: Linux 6.2 and later would discard by themselves. `flushoncommit`: without it a commit can
/// have a file's size and time, but not its data, and the next run would trust the file. `notreelog`: only
/// commits change the super block. `commit=30`: a short run has no commit of its own. `ssd`: otherwise it
/// depends on a flag of the loop device.
const OPTIONS: &CStr = c"subvolid=5,nodiscard,flushoncommit,notreelog,compress=zstd:3,commit=30,\
skip_balance,ssd";

/// Makes a btrfs on `device` with the system's `mkfs.btrfs`: xxhash, metadata twice, sectors of 4 KiB and
/// nodes of 16 KiB.
///
/// It overwrites existing data without asking. Writes about 5 MB, whatever the size. The inodes of
/// `options` have no meaning here.
pub fn make_btrfs(device: &Path, options: &MkfsOptions) -> Result<(), AttachError> {
    // mkfs.btrfs compares loop devices by the names of their files. The file of every session has the same
    // name, so another volume that is mounted would count as this device.
    keep_only(&[device])?;
    let listed = [features("-O")?, features("-R")?];
    let [object, runtime] = &listed;
    let mut command = program::command("mkfs.btrfs")?;
    // -K: no discard. A discard of the whole volume is of no use in a new file.
    command
        .args(["-q", "-f", "-K", "-m", "dup", "-d", "single"])
        .args(["-s", "4096", "-n", "16384", "--csum", "xxhash"])
        .args(["-L", cut_label(&options.label, LABEL_BYTES_MAX)]);
    // `-R` is gone in newer versions, where all features belong to `-O`.
    let mut wanted = vec![FEATURES.to_owned()];
    if runtime.iter().any(|name| name == FREE_SPACE_TREE) {
        command.args(["-R", FREE_SPACE_TREE]);
    } else {
        wanted.push(FREE_SPACE_TREE.to_owned());
    }
    let off = UNWANTED
        .iter()
        .filter(|name| object.iter().any(|listed| listed == *name));
    wanted.extend(off.map(|name| format!("^{name}")));
    command.arg("-O").arg(wanted.join(",")).arg(device);
    program::run("mkfs.btrfs", command)
}

/// The features that the system's mkfs.btrfs knows for `option`. None if it does not know the option.
fn features(option: &str) -> Result<Vec<String>, AttachError> {
    let output = program::command("mkfs.btrfs")?
        .args([option, "list-all"])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| AttachError::io("start", "mkfs.btrfs", e))?;
    // The list goes to stderr, in some versions to stdout.
    let text = [output.stdout, output.stderr].concat();
    Ok(feature_names(&String::from_utf8_lossy(&text)))
}

/// Lines of a list of features: `extref              - increased hardlink limit …`.
fn feature_names(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| Some(line.split_once(" - ")?.0.trim_end().to_owned()))
        .filter(|name| !name.is_empty() && !name.contains(' '))
        .collect()
}

/// Mounts the btrfs of `device` on `dir`.
pub(crate) fn mount(device: &Path, dir: &Path, options: &MountOptions) -> Result<(), AttachError> {
    forget_free_loops();
    let mut flags = MountFlags::NOATIME;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    if options.browse {
        flags |= MountFlags::NODEV | MountFlags::NOSUID;
    }
    rustix::mount::mount(device, dir, "btrfs", flags, OPTIONS)
        .map_err(|e| refused(device, dir, e))?;
    if !options.read_only {
        limit_dirty(device);
    }
    Ok(())
}

/// As [`LoopDevice::limit_dirty`](crate::loop_device::LoopDevice::limit_dirty): the dirty pages of a btrfs
/// do not count as those of its device. The settings end with the mount.
fn limit_dirty(device: &Path) {
    let mounted = std::fs::read_dir("/sys/fs/btrfs")
        .into_iter()
        .flatten()
        .flatten();
    let is_ours = |path: &Path| {
        let name = device.file_name();
        name.is_some_and(|name| path.join("devices").join(name).exists())
    };
    let Some(ours) = mounted.map(|found| found.path()).find(|path| is_ours(path)) else {
        return;
    };
    let bytes = loop_device::DIRTY_BYTES_MAX.to_string();
    if std::fs::write(ours.join("bdi/max_bytes"), bytes).is_ok() {
        let _ = std::fs::write(ours.join("bdi/strict_limit"), "1");
    }
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
        Errno::NODEV => "the kernel has no btrfs",
        // One file system ID is mounted once before Linux 6.7.
        Errno::EXIST => {
            "a copy of this file system is mounted, and this kernel mounts only one of them"
        }
        Errno::INVAL => {
            "no btrfs is on the volume, its super block is damaged, or it has features that this kernel \
             does not know"
        }
        Errno::UCLEAN | Errno::BADMSG => "the btrfs file system is damaged",
        Errno::IO => "the volume can't be read or written, or its btrfs is damaged",
        _ => "the kernel refused",
    };
    AttachError::MountRefused {
        device: device.display().to_string(),
        dir: dir.into(),
        reason,
        // The kernel returns EIO also for a failing device. The volume process reports that, and its
        // report has priority.
        damaged: matches!(e, Errno::INVAL | Errno::UCLEAN | Errno::BADMSG | Errno::IO),
        source: e.into(),
    }
}

/// Makes the kernel forget the file systems that it has seen on loop devices which are free by now.
/// Before Linux 6.7 it refuses an older copy of a file system that it has seen, even if the newer one is
/// not mounted any more. Best effort: if something is wrong, the mount fails.
fn forget_free_loops() {
    let Ok(control) = open(Path::new("/dev/btrfs-control"), OFlags::RDWR) else {
        return;
    };
    for device in loop_device::free_devices() {
        let _ = forget(control.as_fd(), &device);
    }
}

/// Makes the kernel forget the file system that it has seen on `device`, which is not mounted.
fn forget(control: BorrowedFd<'_>, device: &Path) -> io::Result<()> {
    let name = sys::VolumeArgs::named(device.as_os_str().as_bytes())?;
    sys::btrfs_volume(control, VolumeCall::Forget, &name)
}

fn open(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Grows or shrinks the mounted btrfs that `folder` is in to `bytes`, which is at most the length of the
/// device.
pub(crate) fn resize(folder: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    let size = sys::VolumeArgs::named(bytes.to_string().as_bytes())?;
    sys::btrfs_volume(folder, VolumeCall::Resize, &size)
}

/// What a mounted btrfs has in chunks of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChunkSpace {
    /// Bytes that these chunks can hold. Of metadata that is kept twice, each byte counts once.
    pub total_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
}

/// The space of a mounted btrfs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BtrfsSpace {
    /// The content of files.
    pub data: ChunkSpace,
    /// The trees.
    pub metadata: ChunkSpace,
    /// Bytes of the device that belong to no chunk yet.
    pub unallocated_bytes: u64,
}

/// Tree, object and item type of deleted subvolumes (include/uapi/linux/btrfs_tree.h,
/// `BTRFS_ORPHAN_OBJECTID`).
pub(crate) const ROOT_TREE: u64 = 1;
const ORPHAN_OBJECT: u64 = 5_u64.wrapping_neg();
const ORPHAN_ITEM: u32 = 48;

pub(crate) const CHUNK_DATA: u64 = 1;
const CHUNK_METADATA: u64 = 4;
/// Kinds of which each byte takes two bytes of the device: `RAID1`, `DUP` and `RAID10`.
const CHUNK_TWICE: u64 = 0x10 | 0x20 | 0x40;
/// Kinds of which each copy is spread over several stripes: `RAID0`, `RAID10`, `RAID5` and `RAID6`.
pub(crate) const CHUNK_STRIPED: u64 = 0x8 | 0x40 | 0x80 | 0x100;
/// Not chunks: what the kernel keeps back within the metadata (`BTRFS_SPACE_INFO_GLOBAL_RSV`).
const GLOBAL_RESERVE: u64 = 1 << 49;

/// The space of the btrfs that is mounted on `root`. Reads the kernel's memory only.
pub fn btrfs_space(root: &Path) -> Result<BtrfsSpace, AttachError> {
    let failed = |e: io::Error| AttachError::io("measure", root.display().to_string(), e);
    let folder = open(root, OFlags::RDONLY | OFlags::DIRECTORY).map_err(|e| failed(e.into()))?;
    let device = sys::btrfs_device(folder.as_fd()).map_err(failed)?;
    let spaces = sys::btrfs_spaces(folder.as_fd()).map_err(failed)?;
    Ok(space_of(device.total_bytes, &spaces))
}

fn space_of(device_bytes: u64, spaces: &[sys::SpaceInfo]) -> BtrfsSpace {
    let mut found = BtrfsSpace::default();
    let mut allocated = 0_u64;
    for space in spaces {
        if space.flags & GLOBAL_RESERVE != 0 {
            continue;
        }
        let copies = if space.flags & CHUNK_TWICE != 0 { 2 } else { 1 };
        allocated = allocated.saturating_add(space.total_bytes.saturating_mul(copies));
        for (kind, sum) in [
            (CHUNK_DATA, &mut found.data),
            (CHUNK_METADATA, &mut found.metadata),
        ] {
            if space.flags & kind != 0 {
                sum.total_bytes += space.total_bytes;
                sum.used_bytes += space.used_bytes;
            }
        }
    }
    found.unallocated_bytes = device_bytes.saturating_sub(allocated);
    found
}

/// Whether the kernel can mount btrfs. Loads the kernel's module.
#[must_use]
pub fn kernel_has_btrfs() -> bool {
    let known = || {
        let kinds = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        kinds.lines().any(|line| line.trim() == "btrfs")
    };
    if known() {
        return true;
    }
    if let Ok(mut command) = program::command("modprobe") {
        command.arg("btrfs");
        let _ = program::run("modprobe", command);
    }
    known()
}

/// Whether there is a mkfs.btrfs.
#[must_use]
pub fn has_mkfs_btrfs() -> bool {
    program::command("mkfs.btrfs").is_ok()
}

/// How many subvolumes of the mounted btrfs that `folder` is in are deleted, and still take space. Counts
/// some of them if there are many.
pub fn deleted_subvolumes(folder: &Path) -> Result<u32, AttachError> {
    let failed = |e: io::Error| AttachError::io("inspect", folder.display().to_string(), e);
    let folder = File::open(folder).map_err(failed)?;
    let key = SearchKey::items(ROOT_TREE, ORPHAN_OBJECT, ORPHAN_ITEM, 0);
    let found = sys::btrfs_search(folder.as_fd(), key).map_err(failed)?;
    Ok(found.0)
}

/// Makes an empty subvolume `path`, whose parent folder is in a mounted btrfs.
pub fn make_subvolume(path: &Path) -> Result<(), AttachError> {
    in_parent(path, "make the subvolume", |parent, name| {
        let args = sys::SubvolumeArgs::named(name)?;
        sys::btrfs_subvolume(parent, SubvolumeCall::Make, &args)
    })
}

/// Makes `path` a read-only snapshot of the subvolume `of`. Everything that was written to `of` before is
/// in it, and is durable with it when this returns.
pub fn snapshot_subvolume(of: &Path, path: &Path, read_only: bool) -> Result<(), AttachError> {
    let from = open(of, OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(|e| AttachError::io("open", of.display().to_string(), e))?;
    in_parent(path, "make the snapshot", |parent, name| {
        let mut args = sys::SubvolumeArgs::named(name)?;
        args.set_source(from.as_fd(), read_only);
        sys::btrfs_subvolume(parent, SubvolumeCall::Snapshot, &args)
    })
}

/// Deletes the subvolume `path`, also a read-only one. It is gone at once. Its space comes back later.
pub fn delete_subvolume(path: &Path) -> Result<(), AttachError> {
    in_parent(path, "delete the subvolume", |parent, name| {
        let args = sys::SubvolumeArgs::named(name)?;
        sys::btrfs_subvolume(parent, SubvolumeCall::Delete, &args)
    })
}

/// Whether the folder `path`, in a mounted btrfs, is a subvolume. `None`: it is a plain folder. `Some`:
/// whether it is read-only.
pub fn subvolume_is_read_only(path: &Path) -> Result<Option<bool>, AttachError> {
    let failed = |e: io::Error| AttachError::io("inspect", path.display().to_string(), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let folder = open(path, flags).map_err(|e| failed(e.into()))?;
    match sys::btrfs_subvolume_flags(folder.as_fd()) {
        Ok(flags) => Ok(Some(flags & sys::SUBVOLUME_READ_ONLY != 0)),
        // The kernel's answer for a folder that is not the root of a subvolume.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

/// Commits everything of the mounted btrfs that `folder` is in, and makes the kernel go on with the
/// deletion of subvolumes.
pub fn commit_btrfs(folder: &Path) -> Result<(), AttachError> {
    let failed = |e: io::Error| AttachError::io("commit", folder.display().to_string(), e);
    let folder = File::open(folder).map_err(failed)?;
    sys::btrfs_plain(folder.as_fd(), PlainCall::Sync).map_err(failed)
}

fn in_parent(
    path: &Path,
    op: &'static str,
    act: impl FnOnce(BorrowedFd<'_>, &[u8]) -> io::Result<()>,
) -> Result<(), AttachError> {
    let failed = |e: io::Error| AttachError::io(op, path.display().to_string(), e);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let parent = open(parent, flags).map_err(|e| failed(e.into()))?;
    act(parent.as_fd(), OsStr::as_bytes(name)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_list_of_mkfs_is_read() {
        let listed = "Filesystem features available:\n\
            mixed-bg            - mixed data and metadata block groups (compat=2.6.37)\n\
            no-holes            - no explicit hole extents for files (compat=3.14, safe=4.0)\n\
            block-group-tree    - block group tree - faster mounts (compat=6.1)\n";
        let names = feature_names(listed);
        assert_eq!(names, ["mixed-bg", "no-holes", "block-group-tree"]);
        assert!(feature_names("mkfs.btrfs: invalid option -- 'R'\n").is_empty());
    }

    #[test]
    fn metadata_that_is_kept_twice_takes_twice_its_size() {
        let space = |flags, total_bytes, used_bytes| sys::SpaceInfo {
            flags,
            total_bytes,
            used_bytes,
        };
        let found = space_of(
            1000,
            &[
                space(CHUNK_DATA, 300, 100),
                space(CHUNK_METADATA | 0x20, 100, 40),
                space(2 | 0x20, 8, 1),
                space(CHUNK_METADATA | GLOBAL_RESERVE, 60, 0),
            ],
        );
        assert_eq!(found.unallocated_bytes, 1000 - 300 - 200 - 16);
        assert_eq!((found.data.total_bytes, found.data.used_bytes), (300, 100));
        assert_eq!(
            (found.metadata.total_bytes, found.metadata.used_bytes),
            (100, 40)
        );
    }
}
