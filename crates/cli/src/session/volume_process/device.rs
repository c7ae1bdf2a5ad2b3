//! The edge: what FUSE serves is deciphered from, and enciphered into, the volume, unless the kernel does that.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use sprat_attach::BlockDevice;
use sprat_luks::SectorCipher;
use sprat_volume::{Flush, Volume};
use zeroize::Zeroize;

/// The volume: in user mode in plaintext, in kernel mode as it is. Below it everything is ciphertext.
pub(super) struct EdgeDevice {
    volume: Arc<Volume>,
    cipher: Option<SectorCipher>,
    flush: Flush,
}

impl EdgeDevice {
    pub(super) fn new(volume: Arc<Volume>, cipher: Option<SectorCipher>, flush: Flush) -> Self {
        Self {
            volume,
            cipher,
            flush,
        }
    }
}

impl BlockDevice for EdgeDevice {
    fn len(&self) -> u64 {
        self.volume.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.volume.read_at(offset, buf).map_err(io::Error::other)?;
        match &self.cipher {
            Some(cipher) => cipher.decrypt(offset, buf).map_err(io::Error::other),
            None => Ok(()),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let Some(cipher) = &self.cipher else {
            return self.volume.write_at(offset, data).map_err(io::Error::other);
        };
        thread_local! {
            /// One request's ciphertext; as large as the largest request, 1 MiB.
            static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        SEALED.with_borrow_mut(|sealed| {
            sealed.clear();
            sealed.extend_from_slice(data);
            if let Err(error) = cipher.encrypt(offset, sealed) {
                sealed.zeroize();
                return Err(io::Error::other(error));
            }
            self.volume
                .write_at(offset, sealed)
                .map_err(io::Error::other)
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.volume.flush(self.flush).map_err(io::Error::other)
    }
}
