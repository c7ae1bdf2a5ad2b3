//! Keyed digests of blocks.

use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sha::Sha256;
use openssl::sign::Signer;
use sprat_luks::VolumeKey;
use zeroize::Zeroizing;

use crate::Failure;

/// What the key is for. Another purpose gets another key.
const PURPOSE: &[u8] = b"sprat: digests of written blocks, 1";

/// Derived from the volume key. So every machine that can open the container computes the same
/// digests, and its server computes none.
pub(crate) struct DigestKey(Zeroizing<[u8; 32]>);

impl DigestKey {
    pub(crate) fn of(key: &VolumeKey) -> Result<Self, Failure> {
        Ok(Self(Zeroizing::new(hmac(key.expose(), PURPOSE)?)))
    }

    /// The digest of a block's number and bytes. The length is fixed, so a key in front of them is
    /// enough.
    pub(super) fn digest(&self, block: u64, bytes: &[u8]) -> u64 {
        let mut hash = Sha256::new();
        hash.update(&*self.0);
        hash.update(&block.to_le_bytes());
        hash.update(bytes);
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finish()[..8]);
        u64::from_le_bytes(first)
    }

    /// Authenticates a list.
    pub(super) fn mac(&self, bytes: &[u8]) -> Result<[u8; 32], Failure> {
        hmac(&*self.0, bytes)
    }
}

fn hmac(key: &[u8], bytes: &[u8]) -> Result<[u8; 32], Failure> {
    let failed = |error| Failure::failed("can't compute a digest").caused_by(&error);
    let key = PKey::hmac(key).map_err(failed)?;
    let mut signer = Signer::new(MessageDigest::sha256(), &key).map_err(failed)?;
    let mut mac = [0; 32];
    signer.sign_oneshot(&mut mac, bytes).map_err(failed)?;
    Ok(mac)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The key of some volume.
    pub(crate) fn key(number: u8) -> DigestKey {
        DigestKey(Zeroizing::new([number; 32]))
    }

    #[test]
    fn digest_depends_on_key_block_and_bytes() {
        let block = [5; 4096];
        let one = key(1).digest(3, &block);
        assert_eq!(one, key(1).digest(3, &block));
        assert_ne!(one, key(2).digest(3, &block));
        assert_ne!(one, key(1).digest(4, &block));
        assert_ne!(one, key(1).digest(3, &[6; 4096]));
    }
}
