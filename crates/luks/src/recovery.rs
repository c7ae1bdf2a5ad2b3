//! The recovery key: a passphrase that is easy to print, read and type.
//!
//! It has forty characters in ten groups of four, `xxxx-xxxx-…`. The first 36 are random: 22^36 is more
//! than 2^160. The last group is a checksum, which distinguishes a typing error from a wrong key. Dashes
//! and checksum are a part of the passphrase: `cryptsetup` accepts exactly what is printed.

use std::fmt;

use openssl::{rand::rand_priv_bytes, sha::sha256};
use zeroize::Zeroizing;

use crate::{LuksError, secret::Secret, text::big_endian_u64};

/// No two characters look alike, in print or in handwriting (no 0 o 1 i l 2 z 5 s 8-b 6-b 9-q-g u-v),
/// and all are on the same keys of QWERTY and QWERTZ keyboards (no y z).
const ALPHABET: &[u8; 22] = b"acdefhjkmnprtuwx346789";
const GROUP: usize = 4;
const RANDOM_CHARACTERS: usize = 36;
const CHARACTERS: usize = RANDOM_CHARACTERS + GROUP;
const DOMAIN: &[u8] = b"sprat recovery key checksum 1\0";

/// A recovery key. [`RecoveryKey::text`] is the form to print and type.
pub struct RecoveryKey(Zeroizing<String>);

/// The typed text is not a recovery key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "fields are named in the message")]
#[non_exhaustive]
pub enum RecoveryKeyError {
    /// Too few or too many characters.
    #[error(
        "a recovery key has {CHARACTERS} characters without its dashes, but this one has {found}"
    )]
    Length { found: usize },
    /// A character that recovery keys don't have.
    #[error(
        "group {group}: a recovery key has none of b, g, i, l, o, q, s, v, y, z, 0, 1, 2, 5, and no \
         other signs"
    )]
    Character { group: usize },
    /// All characters are allowed, but the checksum is wrong: a typing error.
    #[error("a typing error: the checksum in the last group does not match")]
    Checksum,
}

impl RecoveryKey {
    /// Makes a random key.
    pub fn generate() -> Result<Self, LuksError> {
        let mut characters = Zeroizing::new([0_u8; CHARACTERS]);
        let mut filled = 0;
        // The largest multiple of 22 in a byte. Larger values are rejected, so that all characters are
        // equally likely.
        let limit = 256 - 256 % ALPHABET.len();
        while filled < RANDOM_CHARACTERS {
            let mut byte = Zeroizing::new([0_u8; 1]);
            rand_priv_bytes(&mut *byte).map_err(|source| LuksError::Crypto {
                op: "make a recovery key",
                source,
            })?;
            let value = usize::from(byte[0]);
            if value < limit {
                characters[filled] = ALPHABET[value % ALPHABET.len()];
                filled += 1;
            }
        }
        let sum = checksum(&characters[..RANDOM_CHARACTERS]);
        characters[RANDOM_CHARACTERS..].copy_from_slice(&sum);
        Ok(Self::grouped(&characters))
    }

    /// Parses a typed key. Case, spaces and dashes are ignored.
    pub fn parse(typed: &str) -> Result<Self, RecoveryKeyError> {
        let mut characters = Zeroizing::new([0_u8; CHARACTERS]);
        let mut found = 0;
        for c in typed.chars() {
            if c.is_whitespace() || matches!(c, '-' | '‐' | '‑' | '–' | '—') {
                continue;
            }
            if found < CHARACTERS {
                let low = c.to_ascii_lowercase();
                characters[found] = ALPHABET
                    .iter()
                    .copied()
                    .find(|&known| char::from(known) == low)
                    .ok_or(RecoveryKeyError::Character {
                        group: found / GROUP + 1,
                    })?;
            }
            found += 1;
        }
        if found != CHARACTERS {
            return Err(RecoveryKeyError::Length { found });
        }
        if checksum(&characters[..RANDOM_CHARACTERS]) != characters[RANDOM_CHARACTERS..] {
            return Err(RecoveryKeyError::Checksum);
        }
        Ok(Self::grouped(&characters))
    }

    /// The printed form, which is the passphrase. For the recovery sheet and the terminal only.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The passphrase as a secret.
    #[must_use]
    pub fn secret(&self) -> Secret {
        Secret::key_file(self.0.as_bytes().to_vec())
    }

    fn grouped(characters: &[u8; CHARACTERS]) -> Self {
        let mut text = Zeroizing::new(String::with_capacity(CHARACTERS + CHARACTERS / GROUP));
        for (index, &c) in characters.iter().enumerate() {
            if index > 0 && index % GROUP == 0 {
                text.push('-');
            }
            text.push(char::from(c));
        }
        Self(text)
    }
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(..)")
    }
}

/// Four characters: one typing error in about 234,000 is not detected.
fn checksum(random: &[u8]) -> [u8; GROUP] {
    let mut input = Zeroizing::new(DOMAIN.to_vec());
    input.reserve_exact(random.len());
    input.extend_from_slice(random);
    let hash = Zeroizing::new(sha256(&input));
    let mut number = big_endian_u64(&*hash, 0);
    let base = ALPHABET.len() as u64;
    [(); GROUP].map(|()| {
        let digit = usize::try_from(number % base).expect("below 22");
        number /= base;
        ALPHABET[digit]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_key_is_parsed_however_it_is_typed() {
        let key = RecoveryKey::generate().unwrap();
        let text = key.text().to_owned();
        assert_eq!(text.len(), 49);
        assert_eq!(text.split('-').count(), 10);
        assert!(text.split('-').all(|group| group.len() == 4));
        for typed in [
            text.clone(),
            text.to_uppercase(),
            text.replace('-', ""),
            text.replace('-', " "),
            format!("  {}\n", text.replace('-', " – ")),
        ] {
            let read = RecoveryKey::parse(&typed).unwrap();
            assert_eq!(read.text(), text);
            assert_eq!(read.secret().expose(), text.as_bytes());
        }
    }

    #[test]
    fn every_single_typing_error_is_detected() {
        let text = RecoveryKey::generate().unwrap().text().to_owned();
        let mut undetected = 0;
        for at in 0..text.len() {
            if text.as_bytes()[at] == b'-' {
                continue;
            }
            for &other in ALPHABET.iter().filter(|&&c| c != text.as_bytes()[at]) {
                let mut typed = text.clone().into_bytes();
                typed[at] = other;
                let typed = String::from_utf8(typed).unwrap();
                match RecoveryKey::parse(&typed) {
                    Err(error) => assert_eq!(error, RecoveryKeyError::Checksum),
                    Ok(_) => undetected += 1,
                }
            }
        }
        // 840 errors. One in 234,000 is not detected.
        assert!(undetected <= 1, "{undetected} undetected in {text}");
    }

    #[test]
    fn invalid_recovery_keys_have_specific_errors() {
        let parse = |typed: &str| RecoveryKey::parse(typed).unwrap_err();
        assert_eq!(parse(""), RecoveryKeyError::Length { found: 0 });
        assert_eq!(parse("acde-fhjk"), RecoveryKeyError::Length { found: 8 });
        assert_eq!(
            parse(&"a".repeat(41)),
            RecoveryKeyError::Length { found: 41 }
        );
        assert_eq!(parse("acde-f0jk"), RecoveryKeyError::Character { group: 2 });
        assert_eq!(parse("passwörd"), RecoveryKeyError::Character { group: 1 });
    }

    #[test]
    fn the_text_of_a_known_key_never_changes() {
        // Sheets are printed once and read years later.
        let typed = "acdefhjkmnprtuwx346789acdefhjkmnprtu";
        let mut characters = [0; CHARACTERS];
        characters[..RANDOM_CHARACTERS].copy_from_slice(typed.as_bytes());
        let sum = checksum(typed.as_bytes());
        characters[RANDOM_CHARACTERS..].copy_from_slice(&sum);
        assert_eq!(
            RecoveryKey::grouped(&characters).text(),
            "acde-fhjk-mnpr-tuwx-3467-89ac-defh-jkmn-prtu-nach"
        );
    }

    #[test]
    fn a_recovery_key_is_random_and_not_shown() {
        let (one, two) = (
            RecoveryKey::generate().unwrap(),
            RecoveryKey::generate().unwrap(),
        );
        assert_ne!(one.text(), two.text());
        assert_eq!(format!("{one:?}"), "RecoveryKey(..)");
        assert_eq!(format!("{:?}", one.secret()), "Secret(..)");
        // 22^36 > 2^160.
        assert!(36.0 * 22_f64.log2() > 160.0);
    }
}
