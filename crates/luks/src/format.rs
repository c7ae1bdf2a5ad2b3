//! Makes the header of a new container.
use crate::{Extent, LuksError, Pins, Secret, VolumeKey};

/// What a secret is, which decides how dear guessing it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// Thousands of random bytes: a cheap derivation, so that opening is fast.
    KeyFile,
    /// Made up by a person: argon2id.
    Passphrase,
    /// A [`crate::RecoveryKey`]: argon2id.
    Recovery,
}

/// How to make a container.
#[derive(Debug, Clone, Default)]
pub struct FormatOptions {
    /// UUID; a random one by default.
    pub uuid: Option<String>,
    /// LUKS2 label, at most 47 bytes. The server sees it.
    pub label: Option<String>,
    /// The least costs that LUKS2 allows. Never for real containers.
    pub fast_kdf_for_tests: bool,
}

/// A new container, not yet written anywhere.
#[derive(Debug)]
pub struct NewContainer {
    /// The header's used ranges in the order to write them; all else up to the payload is a hole.
    pub header: Vec<Extent>,
    /// Where the payload begins.
    pub payload_offset_bytes: u64,
    /// What to remember of it.
    pub pins: Pins,
    /// Its volume key.
    pub volume_key: VolumeKey,
}

/// Makes a header with a slot for each secret.
pub fn format(
    secrets: &[(Secret, SlotKind)],
    options: &FormatOptions,
) -> Result<NewContainer, LuksError> {
    let _ = (secrets, options);
    Err(LuksError::NotLuks)
}
