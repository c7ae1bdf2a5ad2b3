//! What arrives late all the same is noticed: digests of what sessions sent and wrote.
//!
//! A plain SFTP server carries out whatever still lies in its pipes, whoever has the container by
//! then. A session that loses its lease leaves a *list* of what it may have sent beside the
//! container. A session that writes while something of an earlier one may still arrive leaves one
//! of what it wrote. Every later opening, on any machine, reads those blocks and compares.

mod begin;
mod compare;
mod digest;
mod file;
mod sent;

pub(super) use crate::volume_process::late::begin::{Found, begin, why_older};
pub(super) use crate::volume_process::late::digest::DigestKey;
#[cfg(test)]
pub(super) use crate::volume_process::late::digest::tests::key as some_key;
pub(super) use crate::volume_process::late::sent::{Replaced, Sent};

use sprat_volume::BLOCK_BYTES;

/// The length of a block, and what its number counts: from the beginning of the container file.
const BLOCK: u64 = BLOCK_BYTES as u64;
/// Most blocks in one list: 16 GiB of the container, in 64 MiB of the list and of memory.
const BLOCKS_MAX: usize = 4 << 20;
