//! A key slot: its area, and the costs of opening it.

use std::ops::Range;

use openssl::sha::sha256;
use serde::Deserialize;

use crate::{
    LuksError,
    allowed_ciphers::{CIPHER, OpenedBy, check_cipher},
    digest::{message_digest, slot_number},
    text::{decode, hex, number, shown},
};

/// Twice the maximum of cryptsetup (1 GiB, `DEFAULT_LUKS2_MEMORY_KB`).
const ARGON2_MEMORY_KIB_MAX: u32 = 2 << 20;
/// Memory times passes: 64 GiB, about half a minute. cryptsetup's two seconds are about 4 GiB.
const ARGON2_WORK_KIB_MAX: u64 = 64 << 20;
/// cryptsetup uses at most 4 threads (lib/crypto_backend, `crypt_pbkdf_get_limits`).
const ARGON2_THREADS_MAX: u32 = 8;
/// About half a minute. cryptsetup's two seconds are at most 10 million.
const PBKDF2_ROUNDS_MAX: u32 = 100_000_000;
/// `LUKS_STRIPES` (cryptsetup: lib/luks2/luks2_keyslot_luks2.c); no other count works.
const STRIPES: u32 = 4000;
/// `LUKS_SALTSIZE` (same file).
const SALT_BYTES: usize = 32;
/// A 64-byte key takes 252 KiB.
const AREA_BYTES_MAX: u64 = 1 << 20;

/// A key slot of a supported type.
#[derive(Debug, Clone)]
pub(crate) struct Keyslot {
    pub number: u32,
    pub key_bytes: u32,
    /// The position of its 4000 stripes in the file.
    pub area: Range<u64>,
    pub kdf: Kdf,
    /// Identifies this slot among all that have or will have its number: a hash of its random salt.
    pub mark: String,
    /// The cipher of the area, if it is not the usual one.
    pub odd_cipher: Option<String>,
}

/// How the slot's key is derived from the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kdf {
    Pbkdf2 {
        hash: String,
        rounds: u32,
    },
    Argon2 {
        kind: String,
        passes: u32,
        memory_kib: u32,
        threads: u32,
    },
}

#[derive(Deserialize)]
pub(crate) struct RawKeyslot {
    #[serde(rename = "type")]
    kind: String,
    key_size: u32,
    area: Option<RawArea>,
    kdf: Option<RawKdf>,
    af: Option<RawAf>,
}

#[derive(Deserialize)]
struct RawArea {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    encryption: Option<String>,
    key_size: Option<u32>,
}

#[derive(Deserialize)]
struct RawKdf {
    #[serde(rename = "type")]
    kind: String,
    salt: Option<String>,
    hash: Option<String>,
    iterations: Option<u32>,
    time: Option<u32>,
    memory: Option<u32>,
    cpus: Option<u32>,
}

#[derive(Deserialize)]
struct RawAf {
    #[serde(rename = "type")]
    kind: String,
    stripes: Option<u32>,
    hash: Option<String>,
}

impl Keyslot {
    /// Checks one slot. `areas` is the space for key slots.
    pub(crate) fn read(
        name: &str,
        raw: &RawKeyslot,
        areas: &Range<u64>,
    ) -> Result<Self, LuksError> {
        let slot = slot_number(name)?;
        let invalid = |what: &str| LuksError::invalid(format!("key slot {slot}: {what}"));
        if raw.kind != "luks2" {
            return Err(LuksError::refused(format!(
                "a key slot of type {}, as an unfinished re-encryption has",
                shown(&raw.kind)
            )));
        }
        let area = raw.area.as_ref().ok_or_else(|| invalid("no area"))?;
        let af = raw.af.as_ref().ok_or_else(|| invalid("no splitter"))?;
        let kdf = raw.kdf.as_ref().ok_or_else(|| invalid("no derivation"))?;
        let hash_known = af
            .hash
            .as_deref()
            .is_some_and(|h| message_digest(h).is_some());
        if af.kind != "luks1" || af.stripes != Some(STRIPES) || !hash_known {
            return Err(invalid("an unknown splitter"));
        }
        // An unbound slot may contain any key. It must fit its area all the same.
        if raw.key_size == 0 || raw.key_size > 512 {
            return Err(invalid("a bad key size"));
        }
        let offset = number(&area.offset, "a key slot's offset")?;
        let size = number(&area.size, "a key slot's size")?;
        let end = offset.checked_add(size);
        let inside = offset >= areas.start && end.is_some_and(|end| end <= areas.end);
        let needed = u64::from(raw.key_size) * u64::from(STRIPES);
        if area.kind != "raw" || !inside || offset % 4096 != 0 {
            return Err(invalid("an area outside of the key slots' space"));
        }
        if size < needed.next_multiple_of(512) || size > AREA_BYTES_MAX.max(2 * needed) {
            return Err(invalid("an area of a wrong size"));
        }
        Ok(Self {
            number: slot,
            key_bytes: raw.key_size,
            area: offset..offset + size,
            mark: hex(&sha256(&decode(kdf.salt.as_deref(), "a key slot's salt")?)[..8]),
            kdf: Kdf::read(slot, kdf)?,
            odd_cipher: check_area_cipher(slot, area)?,
        })
    }

    /// Why this slot is skipped, whatever the secret.
    pub(crate) fn objection(&self, opened_by: OpenedBy) -> Option<LuksError> {
        self.kdf.objection(self.number).or_else(|| {
            let cipher = self.odd_cipher.as_ref()?;
            if opened_by == OpenedBy::Kernel && check_cipher(cipher, opened_by).is_ok() {
                return None;
            }
            Some(LuksError::KernelOnly {
                what: format!("key slot {} with the cipher {}", self.number, shown(cipher)),
            })
        })
    }
}

/// With a null cipher a slot would open with any secret, and the key would be one that the server chose.
/// cryptsetup refuses that, too, unless the passphrase is empty.
fn check_area_cipher(slot: u32, area: &RawArea) -> Result<Option<String>, LuksError> {
    let name = area.encryption.clone().unwrap_or_default();
    let low = name.to_ascii_lowercase();
    if low.is_empty() || low.contains("null") || low.contains("ecb") {
        return Err(LuksError::refused(format!(
            "key slot {slot} with the cipher {}, which protects nothing",
            shown(&name)
        )));
    }
    let usual = name == CIPHER && matches!(area.key_size, Some(32 | 64));
    Ok((!usual).then_some(name))
}

impl Kdf {
    fn read(slot: u32, raw: &RawKdf) -> Result<Self, LuksError> {
        let missing = || {
            LuksError::invalid(format!(
                "key slot {slot}: an unknown or incomplete derivation {}",
                shown(&raw.kind)
            ))
        };
        if decode(raw.salt.as_deref(), "a key slot's salt")?.len() != SALT_BYTES {
            return Err(LuksError::invalid(format!(
                "key slot {slot}: a salt of a wrong size"
            )));
        }
        match raw.kind.as_str() {
            "pbkdf2" => Ok(Self::Pbkdf2 {
                hash: raw
                    .hash
                    .clone()
                    .filter(|hash| message_digest(hash).is_some())
                    .ok_or_else(missing)?,
                rounds: raw.iterations.ok_or_else(missing)?,
            }),
            "argon2i" | "argon2id" => Ok(Self::Argon2 {
                kind: raw.kind.clone(),
                passes: raw.time.ok_or_else(missing)?,
                memory_kib: raw.memory.ok_or_else(missing)?,
                threads: raw.cpus.ok_or_else(missing)?,
            }),
            _ => Err(missing()),
        }
    }

    /// A rough cost. The cheap slots are tried first.
    pub(crate) fn cost(&self) -> u64 {
        match self {
            // About 4 million rounds and 2 GiB of argon2 take a second.
            Self::Pbkdf2 { rounds, .. } => u64::from(*rounds) / 2,
            Self::Argon2 {
                passes, memory_kib, ..
            } => u64::from(*passes) * u64::from(*memory_kib),
        }
    }

    pub(crate) fn memory_kib(&self) -> u64 {
        match self {
            Self::Pbkdf2 { .. } => 0,
            Self::Argon2 { memory_kib, .. } => u64::from(*memory_kib),
        }
    }

    /// As text, for people.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Pbkdf2 { hash, rounds } => format!("pbkdf2-{hash}, {rounds} rounds"),
            Self::Argon2 {
                kind,
                passes,
                memory_kib,
                threads,
            } => format!("{kind}, {memory_kib} KiB, {passes} passes, {threads} threads"),
        }
    }

    pub(crate) fn objection(&self, slot: u32) -> Option<LuksError> {
        let limit = match self {
            Self::Pbkdf2 { rounds, .. } if *rounds > PBKDF2_ROUNDS_MAX => {
                format!("{PBKDF2_ROUNDS_MAX} rounds")
            }
            Self::Argon2 {
                memory_kib,
                threads,
                ..
            } if *memory_kib > ARGON2_MEMORY_KIB_MAX
                || *threads > ARGON2_THREADS_MAX
                || self.cost() > ARGON2_WORK_KIB_MAX =>
            {
                format!(
                    "{ARGON2_MEMORY_KIB_MAX} KiB, {ARGON2_THREADS_MAX} threads, \
                     {ARGON2_WORK_KIB_MAX} KiB times passes"
                )
            }
            _ => return None,
        };
        Some(LuksError::KdfTooCostly {
            slot,
            asks: self.describe(),
            limit,
        })
    }
}
