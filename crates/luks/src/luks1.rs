//! LUKS1 headers, for kernel mode only, and a header of either version.
//!
//! There is one header copy. Numbers are big endian ("LUKS1 On-Disk Format Specification", 1.2.3):
//!
//! | from | bytes | field |
//! | --- | --- | --- |
//! | 0 | 6 | `LUKS` BA BE |
//! | 6 | 2 | version, 1 |
//! | 8 | 32 | cipher, such as `aes` |
//! | 40 | 32 | mode, such as `xts-plain64` |
//! | 72 | 32 | hash of key derivation and digest |
//! | 104 | 4 | payload's offset in sectors of 512 bytes |
//! | 108 | 4 | volume key in bytes |
//! | 112 | 20 | digest of the volume key |
//! | 132 | 32 | its salt |
//! | 164 | 4 | its rounds |
//! | 168 | 40 | UUID, as text |
//! | 208 | 8 × 48 | key slots: state, rounds, salt (32), offset of the area in sectors, stripes |

use std::collections::BTreeMap;
use std::ops::Range;

use openssl::sha::Sha256;

use crate::{
    LuksError,
    allowed_ciphers::{OpenedBy, check_cipher},
    copies::Copies,
    digest::message_digest,
    header::{Header, Payload},
    header_io::{Extent, HeaderRead, fetch},
    keyslot::Kdf,
    pins::Pins,
    reference::Reference,
    secret::{Secret, VolumeKey},
    text::{big_endian_u32, hex, shown},
    unlock::{Budget, UnlockOptions},
};

const HEADER_BYTES: usize = 592;
const SLOTS: usize = 8;
const SLOT_BYTES: usize = 48;
const SLOT_IN_USE: u32 = 0x00AC_71F3;
const SLOT_FREE: u32 = 0x0000_DEAD;
/// `LUKS_STRIPES`; no other count works.
const STRIPES: u32 = 4000;
/// As for LUKS2's digest: limits the time it takes.
const DIGEST_ROUNDS_MAX: u32 = 20_000_000;
/// Larger offsets don't occur. This limits the size of the file that libcryptsetup sees.
const PAYLOAD_OFFSET_MAX: u64 = 4 << 30;

/// A valid LUKS1 header that requests nothing that is refused.
#[derive(Debug)]
pub struct Luks1Header {
    bytes: Vec<u8>,
    pins: Pins,
    slots: Vec<Slot1>,
}

#[derive(Debug)]
struct Slot1 {
    number: u32,
    kdf: Kdf,
    area: Range<u64>,
}

impl Luks1Header {
    /// Fetches and checks the header: 592 bytes.
    pub fn load(source: &dyn HeaderRead) -> Result<Self, LuksError> {
        let mut bytes = vec![0; HEADER_BYTES];
        let failed = |error| LuksError::Read {
            offset: 0,
            len: HEADER_BYTES as u64,
            source: error,
        };
        let file_len = source.len().map_err(failed)?;
        if file_len < HEADER_BYTES as u64 {
            return Err(LuksError::NotLuks);
        }
        source.read_at(0, &mut bytes).map_err(failed)?;
        Self::read(bytes)
    }

    fn read(bytes: Vec<u8>) -> Result<Self, LuksError> {
        if bytes[..8] != *b"LUKS\xba\xbe\0\x01" {
            return Err(LuksError::NotLuks);
        }
        let cipher = format!("{}-{}", text(&bytes, 8, 32)?, text(&bytes, 40, 32)?);
        check_cipher(&cipher, OpenedBy::Kernel)?;
        let hash = text(&bytes, 72, 32)?;
        if message_digest(&hash).is_none() {
            return Err(LuksError::unsupported(format!("the hash {}", shown(&hash))));
        }
        let payload_offset_bytes = u64::from(big_endian_u32(&bytes, 104)) * 512;
        let key_bytes = big_endian_u32(&bytes, 108);
        if !matches!(key_bytes, 16 | 24 | 32 | 48 | 64) {
            return Err(LuksError::unsupported(format!(
                "a volume key of {} bits",
                u64::from(key_bytes) * 8
            )));
        }
        let rounds = big_endian_u32(&bytes, 164);
        if !(1..=DIGEST_ROUNDS_MAX).contains(&rounds) {
            return Err(LuksError::refused(format!(
                "a digest of {rounds} rounds (at most {DIGEST_ROUNDS_MAX})"
            )));
        }
        let uuid = text(&bytes, 168, 40)?;
        if uuid::Uuid::try_parse(&uuid).map_or(true, |parsed| parsed.to_string() != uuid) {
            return Err(LuksError::invalid(format!("the UUID is {}", shown(&uuid))));
        }
        let slots = (0..SLOTS)
            .filter_map(|index| read_slot(&bytes, index, &hash, key_bytes).transpose())
            .collect::<Result<Vec<_>, _>>()?;
        let areas_end = slots.iter().map(|slot| slot.area.end).max();
        let Some(areas_end) = areas_end else {
            return Err(LuksError::invalid("no key slot has the volume key"));
        };
        if payload_offset_bytes < areas_end {
            return Err(LuksError::unsupported(format!(
                "a payload at offset {payload_offset_bytes}, before the header's end (a detached header)"
            )));
        }
        if payload_offset_bytes > PAYLOAD_OFFSET_MAX || payload_offset_bytes % 4096 != 0 {
            return Err(LuksError::unsupported(format!(
                "a payload at offset {payload_offset_bytes}"
            )));
        }
        let mut digest = Sha256::new();
        digest.update(b"sprat volume key digest of LUKS1\0");
        digest.update(hash.as_bytes());
        digest.update(b"\0");
        digest.update(&bytes[112..168]);
        let pins = Pins {
            cipher,
            key_bits: key_bytes * 8,
            sector_bytes: 512,
            payload_offset_bytes,
            iv_tweak: 0,
            volume_key_digest: hex(&digest.finish()),
            uuid,
            // LUKS1 has no sequence.
            sequence_id: 0,
        };
        Ok(Self { bytes, pins, slots })
    }

    /// The pins to store for this header.
    #[must_use]
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// As [`Header::unlock`].
    pub fn unlock(&self, source: &dyn HeaderRead, secret: &Secret) -> Result<VolumeKey, LuksError> {
        Ok(self
            .unlock_within(source, secret, &UnlockOptions::default())?
            .1)
    }

    /// As [`Header::unlock_within`].
    pub fn unlock_within(
        &self,
        source: &dyn HeaderRead,
        secret: &Secret,
        options: &UnlockOptions,
    ) -> Result<(u32, VolumeKey), LuksError> {
        let header = Extent {
            offset: 0,
            bytes: self.bytes.clone(),
        };
        let mut reference = Reference::load_luks1(&header, self.pins.payload_offset_bytes)?;
        let mut budget = Budget::new(options);
        let mut slots: Vec<_> = self.slots.iter().collect();
        budget.order(&mut slots, |slot| (slot.number, slot.kdf.cost()));
        for slot in slots {
            if let Some(reason) = slot.kdf.objection(slot.number) {
                budget.object(reason);
                continue;
            }
            if !budget.allows(slot.number, &slot.kdf) {
                continue;
            }
            reference.fill(&fetch(source, &slot.area)?)?;
            // libcryptsetup compares the key with the digest in the header that was checked here.
            if let Some(key) = reference.open_slot(slot.number, &slot.kdf, secret)?
                && key.bits() == self.pins.key_bits as usize
            {
                return Ok((slot.number, key));
            }
        }
        Err(budget.failed())
    }
}

/// A text field: printable ASCII up to a NUL.
fn text(bytes: &[u8], at: usize, len: usize) -> Result<String, LuksError> {
    let field = &bytes[at..at + len];
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(len);
    let (text, rest) = field.split_at(end);
    if !text.iter().all(u8::is_ascii_graphic) || rest.iter().any(|&byte| byte != 0) {
        return Err(LuksError::invalid(format!(
            "the text at offset {at} of a LUKS1 header"
        )));
    }
    Ok(text.iter().map(|&byte| char::from(byte)).collect())
}

fn read_slot(
    bytes: &[u8],
    index: usize,
    hash: &str,
    key_bytes: u32,
) -> Result<Option<Slot1>, LuksError> {
    let at = 208 + index * SLOT_BYTES;
    let invalid = |what: &str| LuksError::invalid(format!("key slot {index}: {what}"));
    match big_endian_u32(bytes, at) {
        SLOT_IN_USE => {}
        SLOT_FREE => return Ok(None),
        _ => return Err(invalid("neither in use nor free")),
    }
    let offset = u64::from(big_endian_u32(bytes, at + 40)) * 512;
    if big_endian_u32(bytes, at + 44) != STRIPES || offset < HEADER_BYTES as u64 {
        return Err(invalid("an area of a wrong size or place"));
    }
    let len = (u64::from(key_bytes) * u64::from(STRIPES)).next_multiple_of(512);
    Ok(Some(Slot1 {
        number: u32::try_from(index).expect("at most 7"),
        kdf: Kdf::Pbkdf2 {
            hash: hash.to_owned(),
            rounds: big_endian_u32(bytes, at + 4),
        },
        area: offset..offset + len,
    }))
}

/// A header of either version. LUKS1 is supported only in kernel mode.
#[derive(Debug)]
pub enum AnyHeader {
    /// The usual one.
    Luks2(Box<Header>),
    /// Made by an old cryptsetup, or with `--type luks1`.
    Luks1(Luks1Header),
}

impl AnyHeader {
    /// Fetches and checks the header. This needs no key.
    pub fn load(source: &dyn HeaderRead, opened_by: OpenedBy) -> Result<Self, LuksError> {
        match Header::load_for(source, opened_by) {
            Err(LuksError::Luks1) if opened_by == OpenedBy::Kernel => {
                Luks1Header::load(source).map(Self::Luks1)
            }
            other => other.map(|header| Self::Luks2(Box::new(header))),
        }
    }

    /// The pins to store for this header.
    #[must_use]
    pub fn pins(&self) -> Pins {
        match self {
            Self::Luks2(header) => header.pins(),
            Self::Luks1(header) => header.pins.clone(),
        }
    }

    /// Which of a LUKS2 header's two copies are good.
    #[must_use]
    pub fn copies(&self) -> Option<&Copies> {
        match self {
            Self::Luks2(header) => Some(header.copies()),
            Self::Luks1(_) => None,
        }
    }

    /// As [`Header::slot_digests`]. `None` for LUKS1, whose slots are not compared.
    #[must_use]
    pub fn slot_digests(&self) -> Option<BTreeMap<u32, String>> {
        match self {
            Self::Luks2(header) => Some(header.slot_digests()),
            Self::Luks1(_) => None,
        }
    }

    /// As [`Header::check_pins`].
    pub fn check_pins(&self, pins: &Pins) -> Result<(), LuksError> {
        pins.check(&self.pins())
    }

    /// As [`Header::check_fingerprint`].
    pub fn check_fingerprint(&self, typed: &str) -> Result<(), LuksError> {
        self.pins().check_typed(typed)
    }

    /// As [`Header::geometry`].
    pub fn geometry(&self, file_len: u64) -> Result<Payload, LuksError> {
        match self {
            Self::Luks2(header) => header.geometry(file_len),
            Self::Luks1(header) => {
                let pins = &header.pins;
                Payload::new(pins.payload_offset_bytes, pins.sector_bytes, file_len)
            }
        }
    }

    /// As [`Header::unlock`].
    pub fn unlock(&self, source: &dyn HeaderRead, secret: &Secret) -> Result<VolumeKey, LuksError> {
        match self {
            Self::Luks2(header) => header.unlock(source, secret),
            Self::Luks1(header) => header.unlock(source, secret),
        }
    }

    /// As [`Header::unlock_within`].
    pub fn unlock_within(
        &self,
        source: &dyn HeaderRead,
        secret: &Secret,
        options: &UnlockOptions,
    ) -> Result<(u32, VolumeKey), LuksError> {
        match self {
            Self::Luks2(header) => header.unlock_within(source, secret, options),
            Self::Luks1(header) => header.unlock_within(source, secret, options),
        }
    }
}
