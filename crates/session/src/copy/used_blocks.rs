//! Reads from the file system inside the container which of its blocks are in use, for a source
//! that has no other record of where it holds data.

use std::collections::BTreeMap;
use std::sync::Arc;

use sprat_luks::{Header, LuksError, Secret, SectorCipher, UnlockOptions};
use sprat_store::copy::DataMap;
use sprat_store::{ReadClass, StoreError, StoreFile};

use crate::connect::HeaderBytes;
use crate::file_system::SuperBlock;

/// Size of one read. The bitmaps and descriptors of a file system lie side by side, 4 KiB each.
const CHUNK_BYTES: u64 = 1 << 20;
/// How many chunks are kept.
const CHUNKS_MAX: usize = 16;

/// A container and the secret that opens it.
pub(super) struct UnlockedSource<'a> {
    pub header: &'a Header,
    pub secret: &'a Secret,
    /// The cipher, if the container was opened already.
    pub cipher: Option<Arc<SectorCipher>>,
    /// The key slot that opened the container the last time.
    pub last: Option<u32>,
}

/// What the file system says about its blocks.
pub(super) enum UsedBlocks {
    /// The header, and all blocks that the file system uses.
    Known(DataMap),
    /// The file system gives no answer, for this reason.
    Unknown(String),
}

/// Reads which blocks are in use. An error: the source could not be read.
pub(super) fn read(
    opened: &UnlockedSource<'_>,
    file: &dyn StoreFile,
) -> Result<UsedBlocks, StoreError> {
    let len = file.len()?;
    let mut plain = match PlainVolume::open(opened, file, len) {
        Ok(plain) => plain,
        Err(error) => return Ok(UsedBlocks::Unknown(error.to_string())),
    };
    let found = plain.ranges();
    if let Some(error) = plain.failed {
        return Err(error);
    }
    let ranges = match found {
        Ok(ranges) => ranges,
        Err(reason) => return Ok(UsedBlocks::Unknown(reason)),
    };
    let mut map = DataMap::empty(len);
    map.add(0..plain.offset);
    for range in ranges {
        map.add(plain.offset + range.start..plain.offset + range.end);
    }
    Ok(UsedBlocks::Known(map))
}

/// The volume in plaintext.
struct PlainVolume<'a> {
    file: &'a dyn StoreFile,
    cipher: Arc<SectorCipher>,
    offset: u64,
    len: u64,
    chunks: BTreeMap<u64, Vec<u8>>,
    /// The source could not be read, for this reason.
    failed: Option<StoreError>,
}

impl<'a> PlainVolume<'a> {
    fn open(
        opened: &UnlockedSource<'_>,
        file: &'a dyn StoreFile,
        file_bytes: u64,
    ) -> Result<Self, LuksError> {
        let payload = opened.header.geometry(file_bytes)?;
        let cipher = match &opened.cipher {
            Some(cipher) => Arc::clone(cipher),
            None => {
                let (source, options) = (
                    HeaderBytes(file),
                    UnlockOptions::beginning_with(opened.last),
                );
                let header = opened.header;
                let (_, key) = header.unlock_within(&source, opened.secret, &options)?;
                Arc::new(SectorCipher::new(&key, header)?)
            }
        };
        Ok(Self {
            file,
            cipher,
            offset: payload.offset_bytes,
            len: payload.len_bytes,
            chunks: BTreeMap::new(),
            failed: None,
        })
    }

    fn ranges(&mut self) -> Result<Vec<std::ops::Range<u64>>, String> {
        let len = self.len;
        let mut read = |at: u64, buf: &mut [u8]| self.read(at, buf);
        let ranges = SuperBlock::read(&mut read)?.used_ranges(&mut read)?;
        match ranges.last() {
            Some(last) if last.end > len => {
                Err("the file system is larger than the container".to_owned())
            }
            None => Err("the file system is empty".to_owned()),
            _ => Ok(ranges),
        }
    }

    /// Reads whole blocks of 4096 bytes, within one chunk.
    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<(), String> {
        let beyond = || "the file system points beyond the container".to_owned();
        let chunk = at / CHUNK_BYTES;
        if !self.chunks.contains_key(&chunk) {
            let start = chunk * CHUNK_BYTES;
            let len = self
                .len
                .checked_sub(start)
                .ok_or_else(beyond)?
                .min(CHUNK_BYTES);
            let mut bytes = vec![0; usize::try_from(len).map_err(|_| beyond())?];
            let read = self
                .file
                .read_at(self.offset + start, &mut bytes, ReadClass::Ahead);
            read.map_err(|error| {
                let text = error.to_string();
                self.failed.get_or_insert(error);
                text
            })?;
            self.cipher
                .decrypt(start, &mut bytes)
                .map_err(|error| error.to_string())?;
            if self.chunks.len() >= CHUNKS_MAX {
                self.chunks.pop_first();
            }
            self.chunks.insert(chunk, bytes);
        }
        let from = usize::try_from(at % CHUNK_BYTES).map_err(|_| beyond())?;
        let bytes = self
            .chunks
            .get(&chunk)
            .and_then(|bytes| bytes.get(from..from + buf.len()));
        buf.copy_from_slice(bytes.ok_or_else(beyond)?);
        Ok(())
    }
}
