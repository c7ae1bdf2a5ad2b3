//! Secrets and volume keys. They are wiped when dropped, and never shown.

use std::fmt;

use zeroize::{Zeroize, Zeroizing};

/// The bytes of a key file or a passphrase, exactly as `cryptsetup` uses them.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// The longest secret in bytes: cryptsetup reads at most 8 MiB of a key file (`cryptsetup --help`,
    /// "maximum keyfile size").
    pub const LEN_MAX: usize = 8 * 1024 * 1024;

    /// The whole content of a key file, as with `cryptsetup --key-file`.
    #[must_use]
    pub fn key_file(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// A passphrase as typed, without the newline.
    #[must_use]
    pub fn passphrase(text: String) -> Self {
        Self(Zeroizing::new(text.into_bytes()))
    }

    /// The bytes. Pass them on only through a pipe, never through a file or an argument.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Clone for Secret {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The key of a container's sectors. In user mode it has 32 bytes (AES-128-XTS) or 64 (AES-256-XTS).
pub struct VolumeKey(Zeroizing<[u8; VolumeKey::LEN_MAX]>, usize);

impl VolumeKey {
    /// The longest volume key in bytes.
    pub(crate) const LEN_MAX: usize = 64;

    /// Copies a key of at most [`Self::LEN_MAX`] bytes.
    pub(crate) fn copy_of(bytes: &[u8]) -> Self {
        assert!(
            (16..=Self::LEN_MAX).contains(&bytes.len()),
            "a volume key's length"
        );
        let mut key = Self(Zeroizing::new([0; Self::LEN_MAX]), bytes.len());
        key.0[..bytes.len()].copy_from_slice(bytes);
        key
    }

    /// The key itself, for the kernel's dm-crypt.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0[..self.1]
    }

    /// The length of the key in bits.
    #[must_use]
    pub fn bits(&self) -> usize {
        self.1 * 8
    }
}

impl Drop for VolumeKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({} bits, ..)", self.bits())
    }
}
