//! A container's header as loaded and judged.
use crate::{Copies, LuksError, Pins, Secret, SlotKind, VolumeKey};
use std::io;

/// Where a header's bytes come from.
#[allow(
    clippy::len_without_is_empty,
    reason = "the length of a file that may fail to tell"
)]
pub trait HeaderRead {
    /// Present length of the file in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Fills `buf` from `offset`, or fails.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// A run of bytes at its place in the container file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub offset: u64,
    /// What lies there.
    pub bytes: Vec<u8>,
}

/// One step of changing a header; to be done in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderWrite {
    /// Write this.
    Write(Extent),
    /// Make all before it durable (flush) before what follows is sent.
    Barrier,
}

/// Where the payload lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// Where it begins in the file; a multiple of 4096.
    pub offset_bytes: u64,
    /// Its length; a multiple of 4096.
    pub len_bytes: u64,
    /// Encryption sector: 512, 1024, 2048 or 4096.
    pub sector_bytes: u32,
}

/// A key slot that can hold the volume key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its number in the header.
    pub number: u32,
    /// Its key derivation in words, such as `argon2id, 1048576 KiB, 4 passes, 4 threads`.
    pub kdf: String,
}

/// A LUKS2 header that was found whole and acceptable.
pub struct Header {
    pins: Pins,
    copies: Copies,
}

impl Header {
    /// Fetches, checks and judges both header copies.
    pub fn load(source: &dyn HeaderRead) -> Result<Self, LuksError> {
        let _ = source;
        Err(LuksError::NotLuks)
    }
    /// Which of the two copies are good.
    #[must_use]
    pub fn copies(&self) -> &Copies {
        &self.copies
    }
    /// What to remember of this header.
    #[must_use]
    pub fn pins(&self) -> Pins {
        self.pins.clone()
    }
    /// UUID.
    #[must_use]
    pub fn uuid(&self) -> &str {
        &self.pins.uuid
    }
    /// Where the payload lies in a file of `file_len` bytes.
    pub fn geometry(&self, file_len: u64) -> Result<Payload, LuksError> {
        let _ = file_len;
        Err(LuksError::NotLuks)
    }
    /// The key slots.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        Vec::new()
    }
    /// Opens the volume key.
    pub fn unlock(&self, source: &dyn HeaderRead, secret: &Secret) -> Result<VolumeKey, LuksError> {
        let _ = (source, secret);
        Err(LuksError::WrongSecret { slots_tried: 0 })
    }
    /// The writes that make both copies good again, in order; empty where they are.
    pub fn repair(&self) -> Result<Vec<HeaderWrite>, LuksError> {
        Ok(Vec::new())
    }
    /// Adds a key slot; the writes to do, in order.
    pub fn add_slot(
        &self,
        source: &dyn HeaderRead,
        key: &VolumeKey,
        secret: &Secret,
        kind: SlotKind,
    ) -> Result<Vec<HeaderWrite>, LuksError> {
        let _ = (source, key, secret, kind);
        Ok(Vec::new())
    }
}
