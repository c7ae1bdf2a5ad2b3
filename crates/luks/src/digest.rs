//! The digest of the volume key: verifies the key, and is a part of the pins.

use std::collections::BTreeMap;

use openssl::{hash::MessageDigest, memcmp, pkcs5::pbkdf2_hmac, sha::Sha256};
use serde::Deserialize;

use crate::{
    LuksError,
    secret::VolumeKey,
    text::{decode, hex, number, shown},
};

/// cryptsetup spends 125 ms on the digest (lib/luks2/luks2_digest_pbkdf2.c): less than 2 million rounds
/// on the fastest machines. The digest is computed once for each slot that is tried.
const ROUNDS_MAX: u32 = 20_000_000;
const SALT_BYTES_MAX: usize = 64;

/// A PBKDF2 digest of the volume key.
#[derive(Debug, Clone)]
pub(crate) struct Digest {
    /// The numbers of the slots that have the key.
    pub keyslots: Vec<u32>,
    hash: String,
    rounds: u32,
    salt: Vec<u8>,
    value: Vec<u8>,
}

#[derive(Deserialize)]
pub(crate) struct RawDigest {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: Option<String>,
    iterations: Option<u32>,
    salt: Option<String>,
    digest: Option<String>,
}

impl Digest {
    /// Finds the one digest of the segment.
    pub(crate) fn of_segment(
        digests: &BTreeMap<String, RawDigest>,
        segment: &str,
    ) -> Result<Self, LuksError> {
        let mut found = None;
        for digest in digests.values() {
            match digest.segments.as_slice() {
                [] => {}
                [one] if one == segment && found.is_none() => found = Some(digest),
                _ => {
                    return Err(LuksError::refused(
                        "more than one volume key, as an unfinished re-encryption has",
                    ));
                }
            }
        }
        let found = found.ok_or_else(|| LuksError::invalid("the segment has no digest"))?;
        Self::read(found)
    }

    fn read(raw: &RawDigest) -> Result<Self, LuksError> {
        if raw.kind != "pbkdf2" {
            return Err(LuksError::unsupported(format!(
                "a digest of type {}",
                shown(&raw.kind)
            )));
        }
        let hash = raw.hash.clone().unwrap_or_default();
        let Some(algorithm) = message_digest(&hash) else {
            return Err(LuksError::unsupported(format!(
                "a digest with the hash {}",
                shown(&hash)
            )));
        };
        let rounds = raw
            .iterations
            .filter(|rounds| (1..=ROUNDS_MAX).contains(rounds))
            .ok_or_else(|| {
                LuksError::refused(format!(
                    "a digest of {} rounds (at most {ROUNDS_MAX})",
                    raw.iterations.unwrap_or(0)
                ))
            })?;
        let salt = decode(raw.salt.as_deref(), "the digest's salt")?;
        let value = decode(raw.digest.as_deref(), "the digest")?;
        if salt.is_empty() || salt.len() > SALT_BYTES_MAX {
            return Err(LuksError::invalid(format!(
                "a digest's salt of {} bytes",
                salt.len()
            )));
        }
        // A shorter one would match many keys.
        if value.len() != algorithm.size() {
            return Err(LuksError::invalid(format!(
                "a digest of {} bytes",
                value.len()
            )));
        }
        let keyslots = raw
            .keyslots
            .iter()
            .map(|name| slot_number(name))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            keyslots,
            hash,
            rounds,
            salt,
            value,
        })
    }

    /// Whether this is the digest of `key`.
    pub(crate) fn fits(&self, key: &VolumeKey) -> Result<bool, LuksError> {
        let algorithm = message_digest(&self.hash).expect("checked when read");
        let mut found = vec![0; self.value.len()];
        pbkdf2_hmac(
            key.expose(),
            &self.salt,
            self.rounds as usize,
            algorithm,
            &mut found,
        )
        .map_err(|source| LuksError::Crypto {
            op: "check the volume key",
            source,
        })?;
        Ok(memcmp::eq(&found, &self.value))
    }

    /// SHA-256 in hexadecimal, for the pins.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"sprat volume key digest 1\0");
        hash.update(format!("{}\0{}\0{}\0", self.hash, self.rounds, self.salt.len()).as_bytes());
        hash.update(&self.salt);
        hash.update(&self.value);
        hex(&hash.finish())
    }
}

/// The secure hashes that cryptsetup offers.
pub(crate) fn message_digest(name: &str) -> Option<MessageDigest> {
    match name {
        "sha1" => Some(MessageDigest::sha1()),
        "sha224" => Some(MessageDigest::sha224()),
        "sha256" => Some(MessageDigest::sha256()),
        "sha384" => Some(MessageDigest::sha384()),
        "sha512" => Some(MessageDigest::sha512()),
        _ => None,
    }
}

/// Parses a slot number. `01` is invalid.
pub(crate) fn slot_number(name: &str) -> Result<u32, LuksError> {
    let value = number(name, "a key slot's number")?;
    u32::try_from(value)
        .ok()
        .filter(|slot| *slot < 32 && slot.to_string() == name)
        .ok_or_else(|| LuksError::invalid(format!("key slot {}", shown(name))))
}
