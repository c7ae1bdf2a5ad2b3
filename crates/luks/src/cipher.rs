//! Encrypts and decrypts whole sectors with AES-XTS, as dm-crypt's `aes-xts-plain64` does.
//!
//! The tweak of a sector is its number in units of **512 bytes**, whatever the sector size,
//! counted from the payload's beginning, plus `iv_tweak`, as a 64-bit little-endian number
//! followed by eight zero bytes (linux/drivers/md/dm-crypt.c, `crypt_iv_plain64_gen`; LUKS2 never
//! sets `iv_large_sectors`).

use std::sync::{Mutex, PoisonError};

use openssl::{
    cipher::Cipher,
    cipher_ctx::{CipherCtx, CipherCtxRef},
    error::ErrorStack,
};

use crate::{LuksError, allowed_ciphers::CIPHER, header::Header, pins::Pins, secret::VolumeKey};

/// The cipher of one volume. Any number of threads may call at once.
///
/// OpenSSL's contexts contain the expanded key. They are wiped when the cipher is dropped.
pub struct SectorCipher {
    key: VolumeKey,
    sector_bytes: usize,
    iv_tweak: u64,
    encrypting: Mutex<Vec<CipherCtx>>,
    decrypting: Mutex<Vec<CipherCtx>>,
}

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

impl SectorCipher {
    /// Makes the cipher of the container with this header.
    pub fn new(key: &VolumeKey, header: &Header) -> Result<Self, LuksError> {
        let pins = header.pins();
        assert_eq!(
            key.bits(),
            pins.key_bits as usize,
            "a key of another header's size"
        );
        Self::with_geometry(key, pins.sector_bytes as usize, pins.iv_tweak)
    }

    /// Makes the cipher that pins describe. `None` if only the kernel has it.
    pub fn of_pins(key: &VolumeKey, pins: &Pins) -> Result<Option<Self>, LuksError> {
        if pins.cipher != CIPHER || !matches!(key.bits(), 256 | 512) {
            return Ok(None);
        }
        Self::with_geometry(key, pins.sector_bytes as usize, pins.iv_tweak).map(Some)
    }

    pub(crate) fn with_geometry(
        key: &VolumeKey,
        sector_bytes: usize,
        iv_tweak: u64,
    ) -> Result<Self, LuksError> {
        assert!(matches!(sector_bytes, 512 | 1024 | 2048 | 4096));
        let cipher = Self {
            key: VolumeKey::copy_of(key.expose()),
            sector_bytes,
            iv_tweak,
            encrypting: Mutex::new(Vec::new()),
            decrypting: Mutex::new(Vec::new()),
        };
        // If no context can be made, this must fail here and not at the first write.
        for direction in [Direction::Encrypt, Direction::Decrypt] {
            let context = cipher.make_context(direction)?;
            cipher.give_back(direction, context);
        }
        Ok(cipher)
    }

    /// Sector size in bytes; offsets and lengths must be multiples of it.
    #[must_use]
    pub fn sector_bytes(&self) -> usize {
        self.sector_bytes
    }

    /// Encrypts `data`, which lies `offset` bytes into the payload, in place.
    ///
    /// Panics if offset or length is not a multiple of the sector size.
    pub fn encrypt(&self, offset: u64, data: &mut [u8]) -> Result<(), LuksError> {
        self.transform_in_place(Direction::Encrypt, offset, data)
    }

    /// Decrypts `data`, which lies `offset` bytes into the payload, in place.
    ///
    /// Panics if offset or length is not a multiple of the sector size.
    pub fn decrypt(&self, offset: u64, data: &mut [u8]) -> Result<(), LuksError> {
        self.transform_in_place(Direction::Decrypt, offset, data)
    }

    fn transform_in_place(
        &self,
        direction: Direction,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), LuksError> {
        let first = self.first_tweak(offset, data.len());
        self.with_context(direction, |context| {
            for (index, sector) in (0_u64..).zip(data.chunks_exact_mut(self.sector_bytes)) {
                let tweak = self.tweak(first, index);
                match direction {
                    Direction::Encrypt => context.encrypt_init(None, None, Some(&tweak))?,
                    Direction::Decrypt => context.decrypt_init(None, None, Some(&tweak))?,
                }
                let done = context.cipher_update_inplace(sector, self.sector_bytes)?;
                assert_eq!(done, self.sector_bytes, "XTS keeps lengths");
            }
            Ok(())
        })
    }

    /// Checks the range and returns the tweak of its first sector.
    fn first_tweak(&self, offset: u64, len: usize) -> u64 {
        let sector = self.sector_bytes as u64;
        assert!(
            offset.is_multiple_of(sector) && (len as u64).is_multiple_of(sector),
            "range {offset}+{len} is not made of whole sectors of {sector} bytes"
        );
        // dm-crypt's sector_t wraps, too.
        (offset / 512).wrapping_add(self.iv_tweak)
    }

    fn tweak(&self, first: u64, index: u64) -> [u8; 16] {
        let number = first.wrapping_add(index * (self.sector_bytes as u64 / 512));
        let mut tweak = [0; 16];
        tweak[..8].copy_from_slice(&number.to_le_bytes());
        tweak
    }

    /// Calls `work` with a context. A context that failed is not used again.
    fn with_context(
        &self,
        direction: Direction,
        work: impl FnOnce(&mut CipherCtxRef) -> Result<(), ErrorStack>,
    ) -> Result<(), LuksError> {
        let spare = self
            .pool(direction)
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut context = match spare {
            Some(context) => context,
            None => self.make_context(direction)?,
        };
        work(&mut context).map_err(|source| LuksError::Crypto {
            op: match direction {
                Direction::Encrypt => "encrypt sectors",
                Direction::Decrypt => "decrypt sectors",
            },
            source,
        })?;
        self.give_back(direction, context);
        Ok(())
    }

    fn pool(&self, direction: Direction) -> &Mutex<Vec<CipherCtx>> {
        match direction {
            Direction::Encrypt => &self.encrypting,
            Direction::Decrypt => &self.decrypting,
        }
    }

    /// The pool grows to the largest number of threads that ever worked at once.
    fn give_back(&self, direction: Direction, context: CipherCtx) {
        self.pool(direction)
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(context);
    }

    fn make_context(&self, direction: Direction) -> Result<CipherCtx, LuksError> {
        let key = self.key.expose();
        let kind = match key.len() {
            32 => Cipher::aes_128_xts(),
            _ => Cipher::aes_256_xts(),
        };
        let make = || -> Result<CipherCtx, ErrorStack> {
            let mut context = CipherCtx::new()?;
            match direction {
                Direction::Encrypt => context.encrypt_init(Some(kind), Some(key), None)?,
                Direction::Decrypt => context.decrypt_init(Some(kind), Some(key), None)?,
            }
            Ok(context)
        };
        make().map_err(|source| LuksError::Crypto {
            op: "set up AES-XTS",
            source,
        })
    }
}

impl std::fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SectorCipher({} bytes a sector, ..)", self.sector_bytes)
    }
}

#[cfg(test)]
#[path = "cipher_tests.rs"]
#[allow(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests;
