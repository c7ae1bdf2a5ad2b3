//! What a machine stores about a container's header, so that a server can't replace the header
//! unnoticed.

use openssl::sha::Sha256;
use serde::{Deserialize, Serialize};

use crate::{
    LuksError,
    copies::{SEQUENCE_FIRST_MAX, SEQUENCE_STEP_MAX},
    text::{hex, shown},
};

/// The fields of a header that never change, and the newest sequence seen.
///
/// Key slots, tokens and labels are not pinned, because they may change. If a server presents an older
/// header again, `sequence_id` reveals that on a machine that has stored it. A new machine can't notice
/// it: there an old header means at most that a removed passphrase still opens the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pins {
    /// The name as in dm-crypt. Always `aes-xts-plain64` in user mode.
    pub cipher: String,
    /// Size of the volume key in bits: 256 or 512 in user mode.
    pub key_bits: u32,
    /// Size of an encryption sector: 512, 1024, 2048 or 4096 bytes.
    pub sector_bytes: u32,
    /// The offset of the payload in the file.
    pub payload_offset_bytes: u64,
    /// The number added to each sector's number, in units of 512 bytes.
    pub iv_tweak: u64,
    /// SHA-256 (hexadecimal) of the volume key's digest: its hash, rounds, salt and value.
    pub volume_key_digest: String,
    /// The UUID in the header.
    pub uuid: String,
    /// The newest sequence seen, 0 for none. Not a part of the fingerprint.
    pub sequence_id: u64,
}

impl Pins {
    /// A short hash of everything but `sequence_id`, for the recovery sheet: five groups of four
    /// hexadecimal digits in capitals (80 bits).
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"sprat header pins 1\0");
        for field in [
            self.cipher.clone(),
            self.key_bits.to_string(),
            self.sector_bytes.to_string(),
            self.payload_offset_bytes.to_string(),
            self.iv_tweak.to_string(),
            self.volume_key_digest.clone(),
            self.uuid.clone(),
        ] {
            hash.update(field.as_bytes());
            hash.update(b"\0");
        }
        let hash = hash.finish();
        let mut text = String::new();
        for (index, pair) in hash[..10].chunks(2).enumerate() {
            if index > 0 {
                text.push('-');
            }
            text.push_str(&hex(pair).to_uppercase());
        }
        text
    }

    /// Whether `typed` is this fingerprint. Case, spaces and dashes are ignored.
    #[must_use]
    pub fn matches_fingerprint(&self, typed: &str) -> bool {
        let plain = |text: &str| {
            text.chars()
                .filter(|c| !c.is_whitespace() && *c != '-')
                .map(|c| c.to_ascii_uppercase())
                .collect::<String>()
        };
        plain(&self.fingerprint()) == plain(typed)
    }

    /// Compares the pins of a header with the stored ones.
    pub(crate) fn check(&self, found: &Self) -> Result<(), LuksError> {
        let fields = [
            ("cipher", shown(&self.cipher), shown(&found.cipher)),
            (
                "key size in bits",
                self.key_bits.to_string(),
                found.key_bits.to_string(),
            ),
            (
                "sector size",
                self.sector_bytes.to_string(),
                found.sector_bytes.to_string(),
            ),
            (
                "payload offset",
                self.payload_offset_bytes.to_string(),
                found.payload_offset_bytes.to_string(),
            ),
            (
                "IV tweak",
                self.iv_tweak.to_string(),
                found.iv_tweak.to_string(),
            ),
            (
                "volume key digest",
                self.volume_key_digest.clone(),
                found.volume_key_digest.clone(),
            ),
            ("UUID", shown(&self.uuid), shown(&found.uuid)),
        ];
        for (field, pinned, found) in fields {
            if pinned != found {
                return Err(LuksError::Pin {
                    field,
                    pinned,
                    found,
                });
            }
        }
        // Sequence 0 means that none is known.
        if self.sequence_id > 0
            && found.sequence_id - self.sequence_id.min(found.sequence_id) > SEQUENCE_STEP_MAX
        {
            return Err(LuksError::Sequence {
                known: self.sequence_id,
                found: found.sequence_id,
            });
        }
        if found.sequence_id < self.sequence_id {
            return Err(LuksError::OlderHeader {
                known: self.sequence_id,
                found: found.sequence_id,
            });
        }
        Ok(())
    }

    /// Refuses a sequence that is too high for later changes of keys: [`LuksError::Sequence`]. To be
    /// called before anything is pinned.
    pub fn check_first(&self) -> Result<(), LuksError> {
        if self.sequence_id > SEQUENCE_FIRST_MAX {
            return Err(LuksError::Sequence {
                known: 0,
                found: self.sequence_id,
            });
        }
        Ok(())
    }

    /// Compares these pins with a fingerprint that was typed from a recovery sheet.
    pub(crate) fn check_typed(&self, typed: &str) -> Result<(), LuksError> {
        if self.matches_fingerprint(typed) {
            return Ok(());
        }
        Err(LuksError::Fingerprint {
            typed: shown(typed),
            found: self.fingerprint(),
        })
    }
}
