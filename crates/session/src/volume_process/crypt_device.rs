//! The block device that FUSE serves: decrypts what is read from the volume and encrypts what is
//! written to it, unless the kernel does that.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use sprat_attach::BlockDevice;
use sprat_luks::SectorCipher;
use sprat_store::IgnorePoison;
use sprat_volume::{Flush, Volume};
use zeroize::Zeroize;

use crate::file_system::ranges::merged;
use crate::file_system::{FileSystemKind, FreeIsTrusted, STAMP_BLOCK_BYTES};

/// The volume as a block device: plaintext in user mode, ciphertext in kernel mode. Everything
/// below is ciphertext.
pub(crate) struct CryptDevice {
    volume: Arc<Volume>,
    cipher: Option<SectorCipher>,
    flush: Flush,
    kind: FileSystemKind,
    collected: Mutex<Option<Collected>>,
    refuses_writes: AtomicBool,
    /// The file system's stamp block as it was last written from above, before encryption here.
    stamp_block: Mutex<Option<Vec<u8>>>,
}

/// The most ranges that are kept at a time: 64 MiB of memory.
const RANGES_MAX: usize = 4 << 20;

/// The ranges that a file system, mounted read-only, reported as unneeded.
#[derive(Debug, Default)]
struct Collected {
    ranges: Vec<Range<u64>>,
    /// Shorter ranges are skipped, so that their number stays bounded.
    len_min: u64,
}

impl Collected {
    fn note(&mut self, range: Range<u64>) {
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if range.end - range.start < self.len_min => {}
            _ => self.ranges.push(range),
        }
        while self.ranges.len() > RANGES_MAX {
            self.len_min = (self.len_min * 2).max(8192);
            let len_min = self.len_min;
            self.ranges
                .retain(|range| range.end - range.start >= len_min);
        }
    }
}

impl CryptDevice {
    pub(crate) fn new(
        volume: Arc<Volume>,
        cipher: Option<SectorCipher>,
        flush: Flush,
        kind: FileSystemKind,
    ) -> Self {
        Self {
            volume,
            cipher,
            flush,
            kind,
            collected: Mutex::new(None),
            refuses_writes: AtomicBool::new(false),
            stamp_block: Mutex::new(None),
        }
    }

    /// Refuses every write from now on. For a volume that is mounted read-only and whose journal
    /// was replayed. The writes of a read-only session go to a local file that is discarded. So
    /// after `mount -o remount,rw` a user could write files that are gone at the end.
    pub(crate) fn refuse_writes(&self) {
        self.refuses_writes.store(true, Ordering::Release);
    }

    /// Refuses every write from now on, and collects the ranges that the file system does not need.
    /// The argument proves that the file system has no errors.
    pub(crate) fn begin_collecting(&self, _: &FreeIsTrusted) {
        *self.collected() = Some(Collected::default());
    }

    /// The collected ranges, in order. `None`: collecting was not begun. Writes stay refused.
    pub(crate) fn take_collected(&self) -> Option<Vec<Range<u64>>> {
        let mut collected = self.collected();
        let ranges = std::mem::take(&mut collected.as_mut()?.ranges);
        Some(merged(ranges))
    }

    /// The file system's stamp block as this session last wrote it: in plaintext, unless the kernel
    /// encrypts. `None`: it was not written.
    pub(crate) fn stamp_block(&self) -> Option<Vec<u8>> {
        let stamp_block = self.stamp_block.lock();
        stamp_block.ignore_poison().clone()
    }

    fn note_stamp_block(&self, offset: u64, data: &[u8]) {
        let range = self.kind.stamp_range();
        let at = range.start.checked_sub(offset);
        let at = at.and_then(|at| usize::try_from(at).ok());
        if let Some(block) = at.and_then(|at| data.get(at..at.checked_add(STAMP_BLOCK_BYTES)?)) {
            let stamp_block = self.stamp_block.lock();
            *stamp_block.ignore_poison() = Some(block.to_vec());
        }
    }

    fn collected(&self) -> MutexGuard<'_, Option<Collected>> {
        self.collected.lock().ignore_poison()
    }
}

impl BlockDevice for CryptDevice {
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
        // A range that was reported as unneeded must not come into use afterwards.
        if self.refuses_writes.load(Ordering::Acquire) || self.collected().is_some() {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.note_stamp_block(offset, data);
        let Some(cipher) = &self.cipher else {
            return self.volume.write_at(offset, data).map_err(io::Error::other);
        };
        thread_local! {
            /// One request's ciphertext. It grows to the largest request, 1 MiB.
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

    fn note_unneeded(&self, offset: u64, len: u64) -> bool {
        match &mut *self.collected() {
            Some(collected) => {
                collected.note(offset..offset + len);
                true
            }
            None => false,
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.volume.flush(self.flush).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collected_ranges_are_joined_and_short_ones_dropped_first() {
        let mut collected = Collected::default();
        for range in [8192..12288, 12288..16384, 0..4096] {
            collected.note(range);
        }
        assert_eq!(merged(collected.ranges), [0..4096, 8192..16384]);
        let mut collected = Collected::default();
        collected.note(0..1 << 30);
        for number in 1..=RANGES_MAX as u64 {
            let start = (1 << 30) + number * 8192;
            collected.note(start..start + 4096);
        }
        assert!(collected.ranges.len() <= RANGES_MAX);
        assert_eq!(collected.ranges[0], 0..1 << 30);
    }
}
