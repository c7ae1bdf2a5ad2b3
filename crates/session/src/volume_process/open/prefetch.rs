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
use sprat_store::{FileName, FileStat, ReadClass, Store, StoreError, StoreFile};
use sprat_volume::{CacheSample, Seen};

use crate::connect::HeaderBytes;
use crate::file_system::{FileSystemKind, STAMP_BLOCK_BYTES};
use crate::protocol::messages::VolumeStart;
use crate::settings::IdentityPolicy;
use crate::volume_process::cache::cache_sample;
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

    /// The areas of all key slots.
    fn slot_areas(&self) -> Vec<(u64, usize)> {
        match self.unlocked.as_ref().map(|unlocked| &unlocked.header) {
            Ok(AnyHeader::Luks2(header)) => header.slot_areas().collect(),
            _ => Vec::new(),
        }
    }

    /// Reads the header, unless `given_up` is set meanwhile. Errors are not reported: the read
    /// after acquiring the lease reports them.
    pub(crate) fn read(
        start: &VolumeStart,
        secret: &Secret,
        store: &dyn Store,
        given_up: &AtomicBool,
    ) -> Option<Self> {
        let head = Head::read(store, &start.settings.target.name).ok()?;
        if given_up.load(Ordering::SeqCst) {
            return None;
        }
        let unlocked = Unlocked::read(start, secret, &head);
        let mut copies = head.bytes;
        copies.truncate(COPIES_BYTES);
        Some(Self {
            file: head.file,
            copies,
            unlocked,
        })
    }
}

/// The first bytes of a container, kept. The rest of its header is read from the file.
struct Head {
    file: Arc<dyn StoreFile>,
    file_bytes: u64,
    bytes: Vec<u8>,
}

impl Head {
    fn read(store: &dyn Store, name: &FileName) -> Result<Self, StoreError> {
        let access = sprat_store::Access::ReadOnly;
        let read = store.open_and_read(name, access, &[(0, HEAD_BYTES)])?;
        let bytes = match read.ranges.into_iter().next() {
            Some(Err(StoreError::Truncated { .. })) | None => Vec::new(),
            Some(bytes) => bytes?,
        };
        Ok(Self {
            file: read.file,
            file_bytes: read.stat.len,
            bytes,
        })
    }
}

impl HeaderRead for Head {
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
    /// The stamp blocks of all kinds of file systems, as ciphertext, by their offsets in the file.
    stamp_blocks: Vec<(u64, Vec<u8>)>,
    /// Blocks of the persistent cache, read from the container.
    sample: Option<CacheSample>,
    /// Areas of key slots with their offsets.
    slot_areas: Vec<(u64, Vec<u8>)>,
}

impl InspectedFile {
    /// Opens the file and reads it, in as few round trips as possible.
    pub(crate) fn open(
        store: &dyn Store,
        name: &FileName,
        start: &VolumeStart,
    ) -> Result<Self, StoreError> {
        let wanted = Wanted::of(start);
        let access = start.settings.access.into();
        let read = store.open_and_read(name, access, &wanted.ranges())?;
        Ok(wanted.found(read.file, read.stat, read.ranges))
    }

    /// Reads the open file of `prefetch`. Sends all requests at once.
    pub(crate) fn again(prefetch: &Prefetch, start: &VolumeStart) -> Result<Self, StoreError> {
        let file = Arc::clone(&prefetch.file);
        let mut wanted = Wanted::of(start);
        if start.settings.verify_cache {
            wanted.slot_areas = prefetch.slot_areas();
        }
        let ranges = wanted.ranges();
        let (stat, read) = std::thread::scope(|scope| {
            let stat = scope.spawn(|| file.stat());
            let read = read_ranges(&*file, &ranges);
            (joined(stat), read)
        });
        Ok(wanted.found(file, stat?, read))
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
    pub(crate) fn seen(&self, offset: u64, kind: FileSystemKind) -> Option<Seen> {
        Some(Seen {
            stat: self.stat,
            stamp_block: self.kept_stamp_block(offset, kind)?.to_vec(),
            sample: self.sample.clone(),
        })
    }

    /// The stamp block of a volume that begins at `offset`, as ciphertext.
    pub(crate) fn stamp_block(
        &self,
        offset: u64,
        kind: FileSystemKind,
    ) -> Result<Vec<u8>, StoreError> {
        match self.kept_stamp_block(offset, kind) {
            Some(block) => Ok(block.to_vec()),
            None => read_range(
                &*self.file,
                offset.saturating_add(kind.stamp_range().start),
                STAMP_BLOCK_BYTES,
            ),
        }
    }

    fn kept_stamp_block(&self, offset: u64, kind: FileSystemKind) -> Option<&[u8]> {
        let wanted = offset.checked_add(kind.stamp_range().start)?;
        let mut kept = self.stamp_blocks.iter();
        kept.find(|(at, _)| *at == wanted)
            .map(|(_, block)| &block[..])
    }
}

/// What is read of a container while nobody else may change it.
#[derive(Default)]
struct Wanted {
    slot_areas: Vec<(u64, usize)>,
    /// Where the volume begins, if the pins say so.
    volume_at: Option<u64>,
    /// Blocks of the persistent cache.
    sample: Option<CacheSample>,
}

impl Wanted {
    fn of(start: &VolumeStart) -> Self {
        let IdentityPolicy::Known(pins) = &start.settings.pins else {
            return Self::default();
        };
        Self {
            slot_areas: Vec::new(),
            volume_at: Some(pins.payload_offset_bytes),
            sample: cache_sample(start, &pins.uuid),
        }
    }

    fn ranges(&self) -> Vec<(u64, usize)> {
        let mut ranges = vec![(0, COPIES_BYTES)];
        ranges.extend(&self.slot_areas);
        ranges.extend(self.stamp_places().map(|at| (at, STAMP_BLOCK_BYTES)));
        if let Some(offset) = self.volume_at {
            let sample = self.sample.iter().flat_map(CacheSample::ranges);
            ranges.extend(sample.map(|(at, len)| (offset.saturating_add(at), len)));
        }
        ranges
    }

    /// Where the file may have a stamp block: the key may not be known yet, so neither is the kind.
    fn stamp_places(&self) -> impl Iterator<Item = u64> {
        let offset = self.volume_at;
        FileSystemKind::ALL
            .into_iter()
            .filter_map(move |kind| offset?.checked_add(kind.stamp_range().start))
    }

    fn found(
        self,
        file: Arc<dyn StoreFile>,
        stat: FileStat,
        ranges: Vec<Result<Vec<u8>, StoreError>>,
    ) -> InspectedFile {
        let mut ranges = ranges.into_iter().map(Result::ok);
        let copies = ranges.next().flatten();
        let areas = self.slot_areas.iter().zip(ranges.by_ref());
        let areas = areas.filter_map(|((offset, _), area)| Some((*offset, area?)));
        let slot_areas = areas.collect();
        let stamp_blocks = self.stamp_places().zip(ranges.by_ref());
        let stamp_blocks = stamp_blocks.filter_map(|(at, block)| Some((at, block?)));
        let stamp_blocks = stamp_blocks.collect();
        InspectedFile {
            slot_areas,
            file_bytes: stat.len,
            stat,
            copies: copies.unwrap_or_default(),
            stamp_blocks,
            sample: self.sample.and_then(|sample| sample.read(ranges.flatten())),
            file,
        }
    }
}

/// Reads all ranges at once. If one of them can't be read, the others are read one by one.
fn read_ranges(file: &dyn StoreFile, ranges: &[(u64, usize)]) -> Vec<Result<Vec<u8>, StoreError>> {
    let mut read: Vec<Vec<u8>> = ranges.iter().map(|(_, len)| vec![0; *len]).collect();
    let mut parts: Vec<(u64, &mut [u8])> = ranges
        .iter()
        .zip(&mut read)
        .map(|((offset, _), bytes)| (*offset, &mut bytes[..]))
        .collect();
    match file.read_parts_at(&mut parts, ReadClass::Demand) {
        Ok(()) => read.into_iter().map(Ok).collect(),
        Err(_) => ranges
            .iter()
            .map(|(offset, len)| read_range(file, *offset, *len))
            .collect(),
    }
}

/// Areas of key slots were read already.
impl HeaderRead for InspectedFile {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.file_bytes)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let mut areas = self.slot_areas.iter();
        match areas.find(|(at, area)| *at == offset && area.len() == buf.len()) {
            Some((_, area)) => {
                buf.copy_from_slice(area);
                Ok(())
            }
            None => HeaderBytes(&*self.file).read_at(offset, buf),
        }
    }
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
