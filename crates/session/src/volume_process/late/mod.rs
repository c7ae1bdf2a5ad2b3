//! Detects late writes: digests of what sessions sent and wrote.
//!
//! A plain SFTP server carries out whatever is still in its pipes, even after another session has
//! taken the container over. A session that loses its lease leaves a *late-write list* beside the
//! container: what it may have sent. A session that writes while writes of an earlier one may still
//! arrive leaves a list of what it wrote. Every later opening, on any machine, reads those blocks
//! and compares.

mod begin;
mod compare;
mod digest;
mod file;
mod sent;

pub(super) use crate::volume_process::late::begin::{begin, explain_older};
pub(super) use crate::volume_process::late::digest::DigestKey;
#[cfg(test)]
pub(super) use crate::volume_process::late::digest::tests::key as some_key;
pub(super) use crate::volume_process::late::sent::{Replaced, Sent};

use sprat_volume::BLOCK_BYTES;

/// The length of a block. Its number is counted from the beginning of the container file.
const BLOCK: u64 = BLOCK_BYTES as u64;
/// The most blocks in one list: 16 GiB of the container, and 64 MiB for the list and in memory.
const BLOCKS_MAX: usize = 4 << 20;
