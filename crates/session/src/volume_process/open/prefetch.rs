//! What of a container is read before it is held, or while its lock is still being settled, so
//! that a slow line's round trips and the key derivation pass together.
//!
//! What must follow what, however the rest overlaps:
//! 1. The pins are checked before the key is asked for anything: [`Unlocked::read`].
//! 2. A lock file is made only in a folder that holds the container and may be written to.
//! 3. The handle that is written through is opened after the lock file was made: before, another
//!    session could still have put another file at the name.
//! 4. Length, super block and the state that the cache is compared with are read after that, too,
//!    and, behind a dead session, after its quiet time.
//! 5. A header that was read earlier counts only if it reads the same then.
//! 6. Nothing is written before the lock's second look has found nobody else.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sprat_luks::{AnyHeader, HeaderRead, Secret, UnlockOptions, VolumeKey};
use sprat_store::{FileStat, ReadClass, Store, StoreError, StoreFile};
use sprat_volume::Seen;

use crate::protocol::messages::VolumeStart;
use crate::settings::IdentityPolicy;
use crate::volume_process::open::opened_by;
use crate::{Failure, state};

/// Both copies of a header of the usual size. Of larger ones the first copy's checksum lies in it
/// (LUKS2 on-disk format, `csum`), so that any change of the header shows.
const COPIES_BYTES: usize = 32 << 10;
/// With the area of the first key slot, cryptsetup's 252 KiB.
const HEAD_BYTES: usize = COPIES_BYTES + (252 << 10);
const BLOCK_BYTES: usize = 4096;

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
        let state_dir = Path::new(&start.state_dir);
        let header = AnyHeader::load(source, opened_by(start)).map_err(|error| {
            state::header_unreadable(state_dir, &start.target, &start.pins, &error)
        })?;
        let found = header.pins();
        match &start.pins {
            IdentityPolicy::Known(pins) => header.check_pins(pins)?,
            IdentityPolicy::Expect(fingerprint) => header.check_fingerprint(fingerprint)?,
            IdentityPolicy::TrustOnce => {}
        }
        if !matches!(start.pins, IdentityPolicy::Known(_)) {
            found.check_first()?;
        }
        if let Some(slots) = header.slot_digests().filter(|_| !start.accept_changed_keys) {
            state::check_slots(state_dir, &start.target, &found.uuid, &slots)?;
        }
        let last = state::opened_last(state_dir, &start.target, &found.uuid);
        let options = UnlockOptions::beginning_with(last);
        let (slot, key) = header.unlock_within(source, secret, &options)?;
        Ok(Self { header, key, slot })
    }
}

/// What was read of the header before the container was held.
pub(crate) struct Ahead {
    /// Open for reading only.
    pub file: Arc<dyn StoreFile>,
    copies: Vec<u8>,
    unlocked: Result<Unlocked, Failure>,
}

impl Ahead {
    /// Why it doesn't open: another key, or other pins.
    pub(crate) fn refusal(&self) -> Option<&Failure> {
        self.unlocked.as_ref().err()
    }

    /// Reads it, unless `given_up` meanwhile. Whatever can't be read will be told by those who
    /// read it again.
    pub(crate) fn read(
        start: &VolumeStart,
        secret: &Secret,
        store: &dyn Store,
        given_up: &AtomicBool,
    ) -> Option<Self> {
        let file = store
            .open(&start.target.name, sprat_store::Access::ReadOnly)
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

/// A container's first bytes, kept, and the rest of its header read from the file.
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
pub(crate) struct Looked {
    pub file: Arc<dyn StoreFile>,
    pub file_bytes: u64,
    stat: FileStat,
    copies: Vec<u8>,
    /// The volume's first block, as ciphertext, and where it was taken to lie.
    first_block: Option<(u64, Vec<u8>)>,
}

impl Looked {
    /// Asks for everything at once. Where the volume begins is known from the pins, or not yet.
    pub(crate) fn at(file: Arc<dyn StoreFile>, start: &VolumeStart) -> Result<Self, StoreError> {
        let first_at = match &start.pins {
            IdentityPolicy::Known(pins) => Some(pins.payload_offset_bytes),
            IdentityPolicy::Expect(_) | IdentityPolicy::TrustOnce => None,
        };
        let block = |offset: u64, len: usize| {
            let mut bytes = vec![0; len];
            file.read_at(offset, &mut bytes, ReadClass::Demand)
                .map(|()| bytes)
        };
        let (stat, copies, first_block) = std::thread::scope(|scope| {
            let stat = scope.spawn(|| file.stat());
            let first = scope.spawn(|| {
                let offset = first_at?;
                Some((offset, block(offset, BLOCK_BYTES).ok()?))
            });
            let copies = block(0, COPIES_BYTES);
            (joined(stat), copies, joined(first))
        });
        let stat = stat?;
        Ok(Self {
            file_bytes: stat.len,
            stat,
            copies: copies.unwrap_or_default(),
            first_block,
            file,
        })
    }

    /// What was found `ahead`, if it holds; else read now.
    pub(crate) fn unlocked(
        &self,
        ahead: Option<Ahead>,
        start: &VolumeStart,
        secret: &Secret,
    ) -> Result<Unlocked, Failure> {
        match ahead {
            Some(ahead) if !self.copies.is_empty() && ahead.copies == self.copies => ahead.unlocked,
            _ => Unlocked::read(
                start,
                secret,
                &crate::volume_process::connection::HeaderBytes(&*self.file),
            ),
        }
    }

    /// What a volume that begins there would otherwise ask for once more.
    pub(crate) fn seen(&self, offset: u64) -> Option<Seen> {
        let (at, first_block) = self.first_block.as_ref()?;
        (*at == offset).then(|| Seen {
            stat: self.stat,
            first_block: first_block.clone(),
        })
    }

    /// The volume's first block, as ciphertext.
    pub(crate) fn first_block(&self, offset: u64) -> Result<Vec<u8>, StoreError> {
        if let Some((at, bytes)) = &self.first_block
            && *at == offset
        {
            return Ok(bytes.clone());
        }
        let mut bytes = vec![0; BLOCK_BYTES];
        self.file
            .read_at(offset, &mut bytes, ReadClass::Demand)
            .map(|()| bytes)
    }
}

/// What a thread came to; its panic goes on here.
pub(crate) fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
