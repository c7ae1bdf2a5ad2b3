//! A list of blocks as a file beside the container.
//!
//! One line of JSON; then 16 bytes for each block, little endian: its number, counted from the
//! beginning of the container file, and its digest; then 32 bytes of HMAC-SHA-256 of everything
//! before. A list that is torn, or that the server changed, is ignored.

use serde::{Deserialize, Serialize};
use sprat_store::{Access, FileName, ReadClass, Store, StoreError, StoreErrorKind};

use crate::Failure;
use crate::volume_process::late::BLOCKS_MAX;
use crate::volume_process::late::digest::DigestKey;

const FORMAT: u32 = 1;
const HEAD_BYTES_MAX: usize = 1024;
const ENTRY_BYTES: usize = 16;
const MAC_BYTES: usize = 32;
const BYTES_MAX: u64 = (HEAD_BYTES_MAX + BLOCKS_MAX * ENTRY_BYTES + MAC_BYTES) as u64;
/// Size of one write or read.
const PIECE_BYTES: usize = 256 << 10;

/// The kind of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// Writes that a session sent before it lost its lease. They may arrive late, or have arrived.
    Sent,
    /// Writes that a session made durable while writes of an earlier session could still arrive.
    Written,
}

/// The first line of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    format: u32,
    pub(super) kind: Kind,
    /// The number of the session's last lease, and its token.
    pub(super) lease: u64,
    pub(super) token: String,
    /// Another copy of the process continues with the same token.
    pub(super) twin: bool,
    blocks: u64,
}

/// A list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct List {
    pub(super) head: Head,
    /// Blocks and digests.
    pub(super) entries: Vec<(u64, u64)>,
}

impl List {
    pub(super) fn new(
        kind: Kind,
        (lease, token): (u64, String),
        twin: bool,
        entries: Vec<(u64, u64)>,
    ) -> Self {
        let head = Head {
            format: FORMAT,
            kind,
            lease,
            token,
            twin,
            blocks: entries.len() as u64,
        };
        Self { head, entries }
    }

    fn bytes(&self, key: &DigestKey) -> Result<Vec<u8>, Failure> {
        let mut bytes = serde_json::to_vec(&self.head)
            .map_err(|error| Failure::failed("can't write a list of blocks").caused_by(&error))?;
        bytes.push(b'\n');
        for (block, digest) in &self.entries {
            bytes.extend_from_slice(&block.to_le_bytes());
            bytes.extend_from_slice(&digest.to_le_bytes());
        }
        let mac = key.mac(&bytes)?;
        bytes.extend_from_slice(&mac);
        Ok(bytes)
    }

    fn parse(bytes: &[u8], key: &DigestKey) -> Option<Self> {
        let (checked, mac) = bytes.split_at_checked(bytes.len().checked_sub(MAC_BYTES)?)?;
        if !openssl::memcmp::eq(&key.mac(checked).ok()?, mac) {
            return None;
        }
        let line = checked.iter().take(HEAD_BYTES_MAX);
        let end = line.clone().position(|byte| *byte == b'\n')?;
        let head: Head = serde_json::from_slice(&checked[..end]).ok()?;
        let entries = &checked[end + 1..];
        let whole = entries.len() as u64 == head.blocks.checked_mul(ENTRY_BYTES as u64)?;
        if head.format != FORMAT || !whole {
            return None;
        }
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let entries = entries
            .chunks_exact(ENTRY_BYTES)
            .map(|entry| (number(&entry[..8]), number(&entry[8..])))
            .collect();
        Some(Self { head, entries })
    }

    /// Makes the file, durably.
    pub(super) fn write(
        &self,
        store: &dyn Store,
        name: &FileName,
        key: &DigestKey,
    ) -> Result<(), Failure> {
        let bytes = self.bytes(key)?;
        let file = store.create_new(name)?;
        let parts: Vec<(u64, &[u8])> = bytes
            .chunks(PIECE_BYTES)
            .enumerate()
            .map(|(nth, piece)| ((nth * PIECE_BYTES) as u64, piece))
            .collect();
        file.write_parts_at(&parts)?;
        for flushed in [file.flush(), store.flush_folder()] {
            match flushed {
                Err(error) if error.kind() == StoreErrorKind::Unsupported => {}
                flushed => flushed?,
            }
        }
        Ok(())
    }

    /// Reads a list. `None`: it is missing, torn, or not by a machine that has the volume key.
    pub(super) fn read(
        store: &dyn Store,
        name: &FileName,
        key: &DigestKey,
    ) -> Result<Option<Self>, StoreError> {
        let file = match store.open(name, Access::ReadOnly) {
            Ok(file) => file,
            Err(error)
                if matches!(
                    error.kind(),
                    StoreErrorKind::NotFound | StoreErrorKind::NotRegular
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let len = file.len()?;
        let Some(len) = usize::try_from(len).ok().filter(|_| len <= BYTES_MAX) else {
            return Ok(None);
        };
        let mut bytes = vec![0; len];
        let mut parts: Vec<(u64, &mut [u8])> = bytes
            .chunks_mut(PIECE_BYTES)
            .enumerate()
            .map(|(nth, piece)| ((nth * PIECE_BYTES) as u64, piece))
            .collect();
        match file.read_parts_at(&mut parts, ReadClass::Demand) {
            Err(StoreError::Truncated { .. }) => return Ok(None),
            read => read?,
        }
        Ok(Self::parse(&bytes, key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume_process::late::digest::tests::key;

    #[test]
    fn list_reads_back_and_a_changed_or_torn_one_is_ignored() {
        let store = sprat_testkit::memory::MemoryStore::new();
        let name = FileName::new("x.luks.late-0123456789abcdef").unwrap();
        let entries = vec![(4096, 7), (4097, u64::MAX)];
        let list = List::new(Kind::Written, (7, "ab".to_owned()), false, entries);
        list.write(&store, &name, &key(1)).unwrap();
        let read = |key| List::read(&store, &name, &key).unwrap();
        assert_eq!(read(key(1)), Some(list.clone()));
        assert_eq!(read(key(2)), None, "of another container");
        let bytes = list.bytes(&key(1)).unwrap();
        for end in 0..bytes.len() {
            assert_eq!(List::parse(&bytes[..end], &key(1)), None, "{end}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(List::parse(&changed, &key(1)), None, "{at}");
        }
        store.remove(&name).unwrap();
        assert_eq!(read(key(1)), None);
    }
}
