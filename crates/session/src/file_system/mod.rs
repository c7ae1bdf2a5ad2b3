//! The file system inside the volume.

pub(crate) mod ext4;
pub mod inodes;
