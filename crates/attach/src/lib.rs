//! Attaches a volume to the local kernel: FUSE file, loop device, dm-crypt, ext4 or btrfs, mounts and
//! namespaces.
//!
//! Above: the worker and volume processes of `session`.
//! Below: the kernel (FUSE, loop, dm-crypt, ext4, btrfs, namespaces), libcryptsetup, `mkfs`, and a [`BlockDevice`] given by the caller.
//!
//! Always true:
//! - The process that serves the device never mounts it, uses no file on it, and is never the last one in a
//!   mount namespace that has it mounted. So whatever process is killed, no two processes wait for each
//!   other.
//! - A read returns all bytes or EIO. fsync and flush reach the device. A discard never does.
//! - When worker and volume process are dead, none of their mounts, maps, loop devices or processes is left.
#![deny(unsafe_code)]

mod attachment;
mod btrfs;
mod btrfs_inodes;
mod btrfs_trees;
mod crypt_map;
mod current_mounts;
mod descriptor;
mod device;
mod device_node;
mod error;
mod ext4;
mod extents;
mod fuse_file;
mod host;
mod limits;
mod loop_device;
mod loop_info;
mod loop_name;
mod mount_table;
mod mounts;
mod page_cache;
mod process;
mod program;
mod scrub;
mod serve;
#[allow(unsafe_code)]
mod sys;
mod text;
mod users;
mod write_queue;

pub use attachment::{AttachOptions, Attachment};
pub use btrfs::{
    BtrfsSpace, ChunkSpace, btrfs_space, commit_btrfs, delete_subvolume, deleted_subvolumes,
    has_mkfs_btrfs, kernel_has_btrfs, make_btrfs, make_subvolume, snapshot_subvolume,
    subvolume_is_read_only,
};
pub use btrfs_inodes::{BtrfsInode, each_btrfs_inode};
pub use btrfs_trees::{BtrfsTrees, TreeTop};
pub use crypt_map::{CryptMapping, kernel_mode_works};
pub use current_mounts::{keep_only, with_current_mounts};
pub use descriptor::{receive_fd, send_fd};
pub use device::{BLOCK_BYTES, BlockDevice};
pub use error::AttachError;
pub use ext4::{MkfsOptions, MountOptions, make_file_system};
pub use extents::extents;
pub use fuse_file::open_fuse;
pub use host::{HostFinding, Severity, check_host, may_grow};
pub use limits::{lift_limits, memory_limit_too_low, open_files_limit_too_low};
pub use loop_device::DIRTY_BYTES_MAX;
pub use mounts::{MountState, mount_state, unmount_at, unmount_dead, unmount_only, volume_id};
pub use page_cache::is_cached;
pub use process::{
    ChildIdentity, become_io_flusher, bind_to_this_process, clock_is_synchronised, die_with_parent,
    enter_private_namespaces, hide_from_debuggers, idle_io, lock_memory, return_freed_memory,
    set_child_identity,
};
pub use program::find_system_programs;
pub use scrub::{Chunk as BtrfsChunk, ChunkMap, ScrubReport, ScrubWhat, scrub_btrfs};
pub use serve::{ServeOptions, Serving, serve};
pub use users::holders_of;
