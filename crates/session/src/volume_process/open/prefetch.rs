//! Reads from a container before its lease is acquired, or while the lease is being confirmed. So
//! the round trips of a slow connection and the key derivation overlap.
//!
//! The order that must be kept:
//! 1. The pins are checked before the key is used: [`Unlocked::read`].
//! 2. A lease file is created only in a folder that has the container and can be written to.
//! 3. The handle for writing is opened after the lease file was created. Before that, another
//!    session could still put another file under the name.
//! 4. Length, super block and the state that the cache is compared with are also read after that.
//!    Behind a dead session they are read after its quiet time.
//! 5. A header that was read earlier counts only if a second read returns the same.
//! 6. Nothing is written before the second check of the leases has found nobody else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sprat_luks::{AnyHeader, HeaderRead, Secret, UnlockOptions, VolumeKey};
use sprat_store::{FileStat, ReadClass, Store, StoreError, StoreFile};
use sprat_volume::Seen;

use crate::connect::HeaderBytes;
use crate::file_system::{FileSystemKind, STAMP_BLOCK_BYTES};
use crate::protocol::messages::VolumeStart;
use crate::settings::IdentityPolicy;
use crate::volume_process::open::opened_by;
use crate::{Failure, state};

/// Both copies of a header of the usual size. A larger header has the first copy's checksum here
/// (LUKS2 on-disk format, `csum`), so every change of the header shows.
const COPIES_BYTES: usize = 32 << 10;
/// With the area of the first key slot: cryptsetup makes it 252 KiB.
const HEAD_BYTES: usize = COPIES_BYTES + (252 << 10);

/// A header that matches the pins, and its volume key.
pub(crate) struct Unlocked {
    pub header: AnyHeader,
    pub key: VolumeKey,
    /// The slot that opened.
    pub slot: u32,
}

impl Unlocked {
    /// Reads the header, checks the pins, opens the key.
    pub(crate) fn read(
        start: &VolumeStart,
        secret: &Secret,
        source: &dyn HeaderRead,
    ) -> Result<Self, Failure> {
        let state_dir = &start.settings.state_dir;
        let header = AnyHeader::load(source, opened_by(start)).map_err(|error| {
            state::header_unreadable(
                state_dir,
                &start.settings.target,
                &start.settings.pins,
                &error,
            )
        })?;
        let found = header.pins();
        match &start.settings.pins {
            IdentityPolicy::Known(pins) => header.check_pins(pins)?,
            IdentityPolicy::Expect(fingerprint) => header.check_fingerprint(fingerprint)?,
            IdentityPolicy::TrustOnce => {}
        }
        if !matches!(start.settings.pins, IdentityPolicy::Known(_)) {
            found.check_first()?;
        }
        if let Some(slots) = header
            .slot_digests()
            .filter(|_| !start.settings.accept_changed_keys)
        {
            state::check_slots(state_dir, &start.settings.target, &found.uuid, &slots)?;
        }
        let last = state::opened_last(state_dir, &start.settings.target, &found.uuid);
        let options = UnlockOptions::beginning_with(last);
        let (slot, key) = header.unlock_within(source, secret, &options)?;
        Ok(Self { header, key, slot })
    }
}

/// The part of the header that was read before the container was acquired.
pub(crate) struct Prefetch {
    /// Open for reading only.
    pub file: Arc<dyn StoreFile>,
    copies: Vec<u8>,
    unlocked: Result<Unlocked, Failure>,
}

impl Prefetch {
    /// Why the header doesn't open: a wrong key, or other pins.
    pub(crate) fn refusal(&self) -> Option<&Failure> {
        self.unlocked.as_ref().err()
    }

    /// Reads the header, unless `given_up` is set meanwhile. Errors are not reported: the read
    /// after acquiring the lease reports them.
    pub(crate) fn read(
        start: &VolumeStart,
        secret: &Secret,
        store: &dyn Store,
        given_up: &AtomicBool,
    ) -> Option<Self> {
        let file = store
            .open(&start.settings.target.name, sprat_store::Access::ReadOnly)
            .ok()?;
        let head = Head::read(&*file).ok()?;
        if given_up.load(Ordering::SeqCst) {
            return None;
        }
        let unlocked = Unlocked::read(start, secret, &head);
        let mut copies = head.bytes;
        copies.truncate(COPIES_BYTES);
        Some(Self {
            file,
            copies,
            unlocked,
        })
    }
}

/// The first bytes of a container, kept. The rest of its header is read from the file.
struct Head<'a> {
    file: &'a dyn StoreFile,
    file_bytes: u64,
    bytes: Vec<u8>,
}

impl<'a> Head<'a> {
    fn read(file: &'a dyn StoreFile) -> Result<Self, StoreError> {
        let mut bytes = vec![0; HEAD_BYTES];
        let (file_bytes, read) = std::thread::scope(|scope| {
            let len = scope.spawn(|| file.len());
            let read = file.read_at(0, &mut bytes, ReadClass::Demand);
            (joined(len), read)
        });
        match read {
            Err(StoreError::Truncated { .. }) => bytes.clear(),
            other => other?,
        }
        Ok(Self {
            file,
            file_bytes: file_bytes?,
            bytes,
        })
    }
}

impl HeaderRead for Head<'_> {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.file_bytes)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let kept = start
            .checked_add(buf.len())
            .and_then(|end| self.bytes.get(start..end));
        if let Some(kept) = kept {
            buf.copy_from_slice(kept);
            return Ok(());
        }
        self.file
            .read_at(offset, buf, ReadClass::Demand)
            .map_err(std::io::Error::other)
    }
}

/// The container as it is while nobody else may change it.
pub(crate) struct InspectedFile {
    pub file: Arc<dyn StoreFile>,
    pub file_bytes: u64,
    stat: FileStat,
    copies: Vec<u8>,
    /// The file system's stamp block, as ciphertext, and where the volume was assumed to begin.
    stamp_block: Option<(u64, Vec<u8>)>,
}

impl InspectedFile {
    /// Sends all requests at once. The pins say where the volume begins, if they are known.
    pub(crate) fn at(file: Arc<dyn StoreFile>, start: &VolumeStart) -> Result<Self, StoreError> {
        let first_at = match &start.settings.pins {
            IdentityPolicy::Known(pins) => Some(pins.payload_offset_bytes),
            IdentityPolicy::Expect(_) | IdentityPolicy::TrustOnce => None,
        };
        let (stat, copies, stamp_block) = std::thread::scope(|scope| {
            let stat = scope.spawn(|| file.stat());
            let first = scope.spawn(|| {
                let offset = first_at?;
                Some((offset, read_stamp_block(&*file, offset).ok()?))
            });
            let copies = read_range(&*file, 0, COPIES_BYTES);
            (joined(stat), copies, joined(first))
        });
        let stat = stat?;
        Ok(Self {
            file_bytes: stat.len,
            stat,
            copies: copies.unwrap_or_default(),
            stamp_block,
            file,
        })
    }

    /// The prefetched header, if it is still valid. Otherwise it is read now.
    pub(crate) fn unlocked(
        &self,
        prefetch: Option<Prefetch>,
        start: &VolumeStart,
        secret: &Secret,
    ) -> Result<Unlocked, Failure> {
        match prefetch {
            Some(prefetch) if !self.copies.is_empty() && prefetch.copies == self.copies => {
                prefetch.unlocked
            }
            _ => Unlocked::read(start, secret, &HeaderBytes(&*self.file)),
        }
    }

    /// The state that a volume which begins at `offset` would otherwise read again.
    pub(crate) fn seen(&self, offset: u64) -> Option<Seen> {
        let (at, stamp_block) = self.stamp_block.as_ref()?;
        (*at == offset).then(|| Seen {
            stat: self.stat,
            stamp_block: stamp_block.clone(),
        })
    }

    /// The stamp block of a volume that begins at `offset`, as ciphertext.
    pub(crate) fn stamp_block(&self, offset: u64) -> Result<Vec<u8>, StoreError> {
        if let Some((at, bytes)) = &self.stamp_block
            && *at == offset
        {
            return Ok(bytes.clone());
        }
        read_stamp_block(&*self.file, offset)
    }
}

/// Reads the stamp block of a volume that begins at `offset`, as ciphertext.
fn read_stamp_block(file: &dyn StoreFile, offset: u64) -> Result<Vec<u8>, StoreError> {
    let range = FileSystemKind::DEFAULT.stamp_range();
    read_range(file, offset + range.start, STAMP_BLOCK_BYTES)
}

fn read_range(file: &dyn StoreFile, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0; len];
    file.read_at(offset, &mut bytes, ReadClass::Demand)?;
    Ok(bytes)
}

/// The result of a thread. A panic of the thread continues here.
pub(crate) fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
