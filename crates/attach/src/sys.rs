//! System calls without a safe wrapper. All `unsafe` code of the workspace is here.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::Mode;
use rustix::process::{Gid, Pid, Signal, Uid};
use rustix::thread::UnshareFlags;

use crate::loop_info::{LoopConfig, LoopInfo64};

const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const BLKRASET: libc::Ioctl = 0x1262;
const BLKRAGET: libc::Ioctl = 0x1263;

/// `struct dm_ioctl` (include/uapi/linux/dm-ioctl.h), followed by space for an answer.
#[repr(C)]
struct DmRequest {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
    payload: [u8; 712],
}

const DM_HEADER_BYTES: usize = 312;
const _: () = assert!(std::mem::offset_of!(DmRequest, payload) == DM_HEADER_BYTES);
const _: () = assert!(size_of::<DmRequest>() == 1024);

/// `_IOWR(DM_IOCTL, DM_GET_TARGET_VERSION_CMD, struct dm_ioctl)`, Linux 5.4.
const DM_GET_TARGET_VERSION: libc::Ioctl = (3 << 30) | (312 << 16) | (0xfd << 8) | 17;

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Sets an environment variable of this process and its children. The process must have a single thread.
pub(crate) fn set_variable(name: &str, value: &std::ffi::OsStr) {
    // SAFETY: the process has a single thread, so nothing else accesses the environment.
    unsafe { std::env::set_var(name, value) };
}

/// Lets a write beyond the limit on file size fail with EFBIG instead of ending the process. Child
/// processes inherit this.
pub(crate) fn ignore_file_size_signal() {
    // SAFETY: no handler of ours runs, and no other part of the program uses this signal.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Finds or creates a loop device that is free at this moment. Returns its number.
pub(crate) fn loop_free_number(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and touches no memory of ours.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    checked(result).map(c_int::cast_unsigned)
}

/// Sets a loop device on a file, with all settings in one step (Linux 5.8).
pub(crate) fn loop_configure(device: BorrowedFd<'_>, config: &LoopConfig) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `config` is and outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const *config) };
    checked(result).map(drop)
}

/// The settings of a loop device. ENXIO if it is free.
pub(crate) fn loop_status(device: BorrowedFd<'_>) -> io::Result<LoopInfo64> {
    let mut info = LoopInfo64::EMPTY;
    // SAFETY: LOOP_GET_STATUS64 writes one `struct loop_info64`, which `info` is; any bytes are
    // valid in its integer fields.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    checked(result).map(|_| info)
}

/// How many extents are requested at once.
const FIEMAP_EXTENTS_U32: u32 = 256;
/// The same number.
pub(crate) const FIEMAP_EXTENTS: usize = FIEMAP_EXTENTS_U32 as usize;

/// `struct fiemap_extent` (include/uapi/linux/fiemap.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct FiemapExtent {
    pub(crate) logical: u64,
    pub(crate) physical: u64,
    pub(crate) length: u64,
    reserved64: [u64; 2],
    pub(crate) flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` (include/uapi/linux/fiemap.h).
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; FIEMAP_EXTENTS],
}

const _: () = assert!(size_of::<FiemapExtent>() == 56);
const _: () = assert!(size_of::<Fiemap>() == 32 + 56 * FIEMAP_EXTENTS);

/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: libc::Ioctl = 0xC020_660B_u32 as libc::Ioctl;

/// The first extents of a file from `start` on.
pub(crate) fn fiemap(file: BorrowedFd<'_>, start: u64) -> io::Result<Vec<FiemapExtent>> {
    let mut request = Box::new(Fiemap {
        start,
        length: u64::MAX - start,
        flags: 0,
        mapped_extents: 0,
        extent_count: FIEMAP_EXTENTS_U32,
        reserved: 0,
        extents: [FiemapExtent::default(); FIEMAP_EXTENTS],
    });
    // SAFETY: FS_IOC_FIEMAP reads and writes one `struct fiemap` followed by `extent_count`
    // extents, which `request` is; any bytes are valid in its integer fields.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut *request) };
    checked(result)?;
    let mapped = FIEMAP_EXTENTS.min(request.mapped_extents as usize);
    Ok(request.extents[..mapped].to_vec())
}

/// Asks device-mapper for a target, which loads the target's module. Fails if there is none. `control`
/// is `/dev/mapper/control`. `target` has at most 15 bytes (drivers/md/dm-ioctl.c, `get_target_version`:
/// its name is in the field for a device's name).
pub(crate) fn dm_target_version(control: BorrowedFd<'_>, target: &str) -> io::Result<()> {
    let mut request = DmRequest {
        version: [4, 0, 0],
        data_size: 1024,
        data_start: 312,
        target_count: 0,
        open_count: 0,
        flags: 0,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
        payload: [0; 712],
    };
    request.name[..target.len()].copy_from_slice(target.as_bytes());
    // SAFETY: the ioctl reads and writes `data_size` bytes, which is the size of `request`; any
    // bytes are valid in its fields.
    let result =
        unsafe { libc::ioctl(control.as_raw_fd(), DM_GET_TARGET_VERSION, &raw mut request) };
    checked(result).map(drop)
}

/// Sets the read-ahead of a block device in sectors of 512 bytes.
pub(crate) fn set_read_ahead(device: BorrowedFd<'_>, sectors: libc::c_ulong) -> io::Result<()> {
    // SAFETY: BLKRASET takes its argument by value and touches no memory of ours.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKRASET, sectors) };
    checked(result).map(drop)
}

/// The read-ahead of a block device in sectors of 512 bytes.
pub(crate) fn read_ahead(device: BorrowedFd<'_>) -> io::Result<libc::c_ulong> {
    let mut sectors: libc::c_long = 0;
    // SAFETY: BLKRAGET writes one long, which `sectors` is.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKRAGET, &raw mut sectors) };
    checked(result).map(|_| sectors.cast_unsigned())
}

/// `struct fstrim_range` (include/uapi/linux/fs.h).
#[repr(C)]
struct TrimRange {
    start: u64,
    len: u64,
    min_len: u64,
}

/// `_IOWR('X', 121, struct fstrim_range)`
const FITRIM: libc::Ioctl = 0xC018_5879_u32 as libc::Ioctl;

/// Lets a mounted file system discard all unused ranges of at least `min_len` bytes. Returns the number
/// of bytes.
pub(crate) fn trim(folder: BorrowedFd<'_>, min_len: u64) -> io::Result<u64> {
    let mut range = TrimRange {
        start: 0,
        len: u64::MAX,
        min_len,
    };
    // SAFETY: FITRIM reads and writes one `struct fstrim_range`, which `range` is and outlives the
    // call.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), FITRIM, &raw mut range) };
    checked(result).map(|_| range.len)
}

/// `_IOW('f', 16, __u64)`
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;

/// Grows a mounted ext4 to `blocks` blocks. Needs `CAP_SYS_RESOURCE`.
pub(crate) fn resize_ext4(folder: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64, which `blocks` is and outlives the call.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    checked(result).map(drop)
}

/// `struct btrfs_ioctl_vol_args` (include/uapi/linux/btrfs.h).
#[repr(C)]
pub(crate) struct VolumeArgs {
    fd: i64,
    name: [u8; 4088],
}

impl VolumeArgs {
    /// With this name, path or size.
    pub(crate) fn named(name: &[u8]) -> io::Result<Box<Self>> {
        let mut args = Box::new(Self {
            fd: 0,
            name: [0; 4088],
        });
        fill_name(&mut args.name, name)?;
        Ok(args)
    }
}

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
pub(crate) struct SubvolumeArgs {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

impl SubvolumeArgs {
    /// For the subvolume of this name.
    pub(crate) fn named(name: &[u8]) -> io::Result<Box<Self>> {
        let mut args = Box::new(Self {
            fd: 0,
            transid: 0,
            flags: 0,
            unused: [0; 4],
            name: [0; 4040],
        });
        fill_name(&mut args.name, name)?;
        Ok(args)
    }

    /// What a snapshot is made of.
    pub(crate) fn set_source(&mut self, source: BorrowedFd<'_>, read_only: bool) {
        self.fd = i64::from(source.as_raw_fd());
        self.flags = if read_only { SUBVOLUME_READ_ONLY } else { 0 };
    }
}

/// Copies a name that must have an end.
fn fill_name(to: &mut [u8], name: &[u8]) -> io::Result<()> {
    if name.len() >= to.len() || name.contains(&0) {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    to[..name.len()].copy_from_slice(name);
    Ok(())
}

const _: () = assert!(size_of::<VolumeArgs>() == 4096);
const _: () = assert!(size_of::<SubvolumeArgs>() == 4096);

/// `BTRFS_SUBVOL_RDONLY`.
pub(crate) const SUBVOLUME_READ_ONLY: u64 = 2;

// `_IOW(0x94, …, struct btrfs_ioctl_vol_args)`, `…_v2` and so on.
const BTRFS_SPACE_INFO: libc::Ioctl = 0xC010_9414_u32 as libc::Ioctl;
const BTRFS_SUBVOL_GETFLAGS: libc::Ioctl = 0x8008_9419_u32 as libc::Ioctl;
const BTRFS_TREE_SEARCH_V2: libc::Ioctl = 0xC070_9411_u32 as libc::Ioctl;
const BTRFS_SCRUB: libc::Ioctl = 0xC400_941B_u32 as libc::Ioctl;
const BTRFS_DEV_INFO: libc::Ioctl = 0xD000_941E_u32 as libc::Ioctl;

/// What has no argument. The numbers are those of the ioctls.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum PlainCall {
    /// Commits, and wakes the kernel's thread that deletes subvolumes.
    Sync = 0x9408,
    /// Ends the scrub that runs. ENOTCONN if none does.
    CancelScrub = 0x941C,
}

/// What is done with a [`VolumeArgs`].
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum VolumeCall {
    /// Resizes the mounted btrfs to the size that is named, in bytes.
    Resize = 0x5000_9403,
    /// On `/dev/btrfs-control`: forgets a device that the kernel has seen and that is not mounted.
    Forget = 0x5000_9405,
}

/// What is done with a [`SubvolumeArgs`] in the folder that the subvolume is in.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum SubvolumeCall {
    /// Makes a snapshot, and commits. The source's descriptor is only looked up.
    Snapshot = 0x5000_9417,
    /// Makes an empty subvolume.
    Make = 0x5000_9418,
    /// Deletes a subvolume.
    Delete = 0x5000_943F,
}

/// Carries out a call on a mounted btrfs.
pub(crate) fn btrfs_plain(folder: BorrowedFd<'_>, call: PlainCall) -> io::Result<()> {
    // SAFETY: these ioctls take no argument and touch no memory of ours.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), call as u32 as libc::Ioctl) };
    checked(result).map(drop)
}

/// Carries out a call on a mounted btrfs, or on `/dev/btrfs-control`.
pub(crate) fn btrfs_volume(
    file: BorrowedFd<'_>,
    call: VolumeCall,
    args: &VolumeArgs,
) -> io::Result<()> {
    let number = call as u32 as libc::Ioctl;
    // SAFETY: these ioctls read one `struct btrfs_ioctl_vol_args`, which `args` is and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number, &raw const *args) };
    checked(result).map(drop)
}

/// Carries out a call in the folder `parent`.
pub(crate) fn btrfs_subvolume(
    parent: BorrowedFd<'_>,
    call: SubvolumeCall,
    args: &SubvolumeArgs,
) -> io::Result<()> {
    let number = call as u32 as libc::Ioctl;
    // SAFETY: these ioctls read one `struct btrfs_ioctl_vol_args_v2`, which `args` is and outlives the
    // call.
    let result = unsafe { libc::ioctl(parent.as_raw_fd(), number, &raw const *args) };
    checked(result).map(drop)
}

/// The flags of a subvolume. EINVAL if the folder is not the root of one.
pub(crate) fn btrfs_subvolume_flags(folder: BorrowedFd<'_>) -> io::Result<u64> {
    let mut flags = 0_u64;
    // SAFETY: the ioctl writes one u64, which `flags` is.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), BTRFS_SUBVOL_GETFLAGS, &raw mut flags) };
    checked(result).map(|_| flags)
}

/// `struct btrfs_ioctl_space_info`: chunks of one kind.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SpaceInfo {
    pub(crate) flags: u64,
    pub(crate) total_bytes: u64,
    pub(crate) used_bytes: u64,
}

/// There are data, metadata, system, and the global reserve; two of each while a balance converts them.
const SPACES_MAX: usize = 16;

/// `struct btrfs_ioctl_space_args`, with room for the answer.
#[repr(C)]
struct SpaceArgs {
    slots: u64,
    total: u64,
    spaces: [SpaceInfo; SPACES_MAX],
}

/// The chunks of a mounted btrfs.
pub(crate) fn btrfs_spaces(folder: BorrowedFd<'_>) -> io::Result<Vec<SpaceInfo>> {
    let mut args = SpaceArgs {
        slots: SPACES_MAX as u64,
        total: 0,
        spaces: [SpaceInfo::default(); SPACES_MAX],
    };
    // SAFETY: the ioctl reads `slots` and writes at most that many entries behind the head; any bytes
    // are valid in their integer fields.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), BTRFS_SPACE_INFO, &raw mut args) };
    checked(result)?;
    let found = usize::try_from(args.total).unwrap_or(SPACES_MAX);
    Ok(args.spaces[..found.min(SPACES_MAX)].to_vec())
}

/// `struct btrfs_ioctl_dev_info_args`.
#[repr(C)]
pub(crate) struct DeviceInfo {
    id: u64,
    uuid: [u8; 16],
    used_bytes: u64,
    /// The device's length, as the file system has it.
    pub(crate) total_bytes: u64,
    unused: [u64; 379],
    /// The device's name, with a NUL behind it.
    pub(crate) path: [u8; 1024],
}

const _: () = assert!(size_of::<DeviceInfo>() == 4096);

/// The only device of a mounted btrfs.
pub(crate) fn btrfs_device(folder: BorrowedFd<'_>) -> io::Result<Box<DeviceInfo>> {
    let mut info = Box::new(DeviceInfo {
        id: 1,
        uuid: [0; 16],
        used_bytes: 0,
        total_bytes: 0,
        unused: [0; 379],
        path: [0; 1024],
    });
    // SAFETY: the ioctl reads and writes one `struct btrfs_ioctl_dev_info_args`, which `info` is; any
    // bytes are valid in its integer fields.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), BTRFS_DEV_INFO, &raw mut *info) };
    checked(result).map(|_| info)
}

/// `struct btrfs_ioctl_search_key`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SearchKey {
    /// The tree (0: the subvolume of the folder), then the first and last object, offset and generation.
    pub(crate) bounds: [u64; 7],
    pub(crate) types: [u32; 2],
    items: u32,
    unused: [u32; 9],
}

impl SearchKey {
    /// The items of one type of `object`, from the offset `from` on.
    pub(crate) fn items(tree: u64, object: u64, kind: u32, from: u64) -> Self {
        Self {
            bounds: [tree, object, object, from, u64::MAX, 0, u64::MAX],
            types: [kind; 2],
            items: u32::MAX,
            unused: [0; 9],
        }
    }
}

/// How many bytes of items one search returns at most. The largest item has 16 KiB.
const SEARCH_BYTES: usize = 64 << 10;

/// `struct btrfs_ioctl_search_args_v2`, with the buffer behind it.
#[repr(C)]
struct SearchArgs {
    key: SearchKey,
    bytes: u64,
    found: [u8; SEARCH_BYTES],
}

const _: () = assert!(size_of::<SearchArgs>() == 112 + SEARCH_BYTES);

/// The first items of the trees that `key` selects: how many, and each with its head.
pub(crate) fn btrfs_search(folder: BorrowedFd<'_>, key: SearchKey) -> io::Result<(u32, Vec<u8>)> {
    let mut args = Box::new(SearchArgs {
        key,
        bytes: SEARCH_BYTES as u64,
        found: [0; SEARCH_BYTES],
    });
    // SAFETY: the ioctl reads and writes one `struct btrfs_ioctl_search_args_v2` and as many bytes behind it
    // as its field says, which `args` is; any bytes are valid in its fields.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), BTRFS_TREE_SEARCH_V2, &raw mut *args) };
    checked(result).map(|_| (args.key.items, args.found.to_vec()))
}

/// `struct btrfs_scrub_progress`: what one scrub has found, as 15 counters.
pub(crate) type ScrubProgress = [u64; 15];

/// `struct btrfs_ioctl_scrub_args`.
#[repr(C)]
struct ScrubArgs {
    device: u64,
    start: u64,
    end: u64,
    flags: u64,
    progress: ScrubProgress,
    unused: [u64; 109],
}

const _: () = assert!(size_of::<ScrubArgs>() == 1024);

/// `BTRFS_SCRUB_READONLY`.
const SCRUB_READ_ONLY: u64 = 1;

/// Scrubs the chunks that begin in a range of the only device. ECANCELED after
/// [`PlainCall::CancelScrub`].
pub(crate) fn btrfs_scrub(
    folder: BorrowedFd<'_>,
    range: std::ops::Range<u64>,
) -> io::Result<ScrubProgress> {
    let mut args = Box::new(ScrubArgs {
        device: 1,
        start: range.start,
        end: range.end,
        flags: SCRUB_READ_ONLY,
        progress: [0; 15],
        unused: [0; 109],
    });
    // SAFETY: the ioctl reads and writes one `struct btrfs_ioctl_scrub_args`, which `args` is; any bytes
    // are valid in its fields.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), BTRFS_SCRUB, &raw mut *args) };
    checked(result).map(|_| args.progress)
}

/// Moves the calling thread (or, for pids, its later children) into new namespaces.
/// Only `NEWNS` and `NEWPID` are accepted.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    let allowed = UnshareFlags::NEWNS | UnshareFlags::NEWPID;
    assert!(allowed.contains(flags), "only mount and pid namespaces");
    // SAFETY: unshare is unsafe because of CLONE_FILES, which separates the descriptor tables of
    // threads. The assertion above excludes it, and neither accepted flag implies it.
    let result = unsafe { rustix::thread::unshare_unsafe(flags) };
    result.map_err(io::Error::from)
}

/// Whether the page cache has all of `len` bytes of a file from `start`, which is a multiple of the page size.
pub(crate) fn is_cached(file: BorrowedFd<'_>, start: u64, len: usize) -> io::Result<bool> {
    let start = libc::off_t::try_from(start).map_err(io::Error::other)?;
    let mut pages = vec![0_u8; len.div_ceil(rustix::param::page_size())];
    let (anywhere, flags) = (std::ptr::null_mut(), libc::MAP_SHARED);
    // SAFETY: a new mapping, at an address that the kernel chooses. Nothing may be read or written in it.
    let at = unsafe {
        libc::mmap(
            anywhere,
            len,
            libc::PROT_NONE,
            flags,
            file.as_raw_fd(),
            start,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `at` and `len` are those of the mapping, and `pages` has a byte for each of its pages.
    let asked = checked(unsafe { libc::mincore(at, len, pages.as_mut_ptr()) });
    // SAFETY: the same mapping. Nothing refers to it.
    let unmapped = checked(unsafe { libc::munmap(at, len) });
    asked.and(unmapped)?;
    Ok(pages.iter().all(|page| page & 1 == 1))
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The old process, and the new one's pid.
    Parent(Pid),
}

/// Forks. The process must have a single thread.
pub(crate) fn fork_single_threaded() -> io::Result<Fork> {
    // SAFETY: with one thread no other thread can own a lock at the fork, so the child may use
    // everything, including the allocator.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(match Pid::from_raw(pid) {
        None => Fork::Child,
        Some(child) => Fork::Parent(child),
    })
}

/// Closes the descriptors `numbers`. For a process that then only waits and ends with [`exit_now`]:
/// their owners must not be used any more.
pub(crate) fn close_for_good(numbers: &[c_int]) {
    for &number in numbers {
        // SAFETY: no memory is accessed. The descriptor's owner in this process, if any, is never used
        // or dropped again: the caller only waits, and ends without running destructors. A number that
        // isn't open gives EBADF, which changes nothing.
        let _ = unsafe { libc::close(number) };
    }
}

/// Makes glibc return large blocks to the kernel when they are freed, and keep no free memory for each
/// thread. No effect with other C libraries.
pub(crate) fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in [
        (libc::M_MMAP_THRESHOLD, 256 << 10),
        (libc::M_TRIM_THRESHOLD, 1 << 20),
        (libc::M_ARENA_MAX, 4),
    ] {
        // SAFETY: mallopt takes two integers and may be called at any time, from any thread.
        let _ = unsafe { libc::mallopt(setting, value) };
    }
}

/// Ends the process without running destructors or exit handlers.
pub(crate) fn exit_now(status: c_int) -> ! {
    // SAFETY: `_exit` takes any status and doesn't return.
    unsafe { libc::_exit(status) }
}

/// Makes the child that `command` starts die with this process, and gives it a new session.
pub(crate) fn bind_child(command: &mut Command) {
    bind_child_of(rustix::process::getpid(), command);
}

/// As [`bind_child`], for a child of `parent`. In the child of any other process it fails with ESRCH.
fn bind_child_of(parent: Pid, command: &mut Command) {
    let bind = move || {
        rustix::process::setsid()?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // If the parent died before the line above, its signal never comes.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: between fork and exec the closure only makes system calls (no allocation, no lock;
    // `from_raw_os_error` stores an integer).
    unsafe { command.pre_exec(bind) };
}

/// Gives the child that `command` starts this umask and, if there are any, these IDs.
pub(crate) fn set_child_identity(command: &mut Command, umask: Mode, identity: Option<ChildIds>) {
    let set = move || {
        rustix::process::umask(umask);
        if let Some(ids) = &identity {
            // The child has a single thread, so that is the process.
            rustix::thread::set_thread_groups(&ids.groups)?;
            rustix::thread::set_thread_res_gid(ids.gid, ids.gid, ids.gid)?;
            rustix::thread::set_thread_res_uid(ids.uid, ids.uid, ids.uid)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls (no allocation, no lock).
    unsafe { command.pre_exec(set) };
}

/// The IDs of a child, ready for the kernel.
pub(crate) struct ChildIds {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
}

/// The largest error in microseconds that the kernel's clock may have (adjtimex(2)). Without a time
/// service the kernel says 16 s (kernel/time/ntp.c).
pub(crate) fn clock_error_micros() -> io::Result<i64> {
    // SAFETY: `timex` has only numbers, so all zeros are a value of it.
    let mut about: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: with `modes` 0 the kernel only fills in `about`.
    let state = unsafe { libc::adjtimex(&raw mut about) };
    checked(state)?;
    Ok(about.maxerror)
}

/// The calling thread waits with its reads and writes for those of all others (ioprio_set(2)).
pub(crate) fn idle_io() -> io::Result<()> {
    const THIS_THREAD: [libc::c_long; 2] = [1, 0];
    const IDLE: libc::c_long = 3 << 13;
    let [who, id] = THIS_THREAD;
    // SAFETY: the kernel gets three numbers.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, who, id, IDLE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_whose_parent_is_gone_does_not_run() {
        let mut command = Command::new("true");
        bind_child(&mut command);
        assert!(command.status().unwrap().success());
        // The child has another parent, as if the first one had died meanwhile.
        let mut command = Command::new("true");
        bind_child_of(Pid::INIT, &mut command);
        let orphan = command.status().unwrap_err();
        assert_eq!(orphan.raw_os_error(), Some(libc::ESRCH));
    }
}
