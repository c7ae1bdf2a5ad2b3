//! The persistent cache's folder: its blocks, the marker of a clean close, and who may use it.
//!
//! | file | holds |
//! | --- | --- |
//! | `lock` | nothing; flocked, shared by sessions that only read |
//! | `blocks` | blocks of ciphertext, slot after slot, in no order |
//! | `clean` | where each block is, and for which state of the container; exists only after a clean close |
//!
//! `clean` is the table and the clean marker in one. Before a session that may write sends
//! anything, it removes the file and fsyncs the folder. After everything is durable, `blocks`
//! included, it creates the file by a rename. So the file is complete or absent. All numbers are
//! little endian:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `sprtblk1`: format and version; first, so that nothing is read of an unknown format |
//! | 8 | 8 | length of the container file |
//! | 16 | 8 | its time of modification, in seconds |
//! | 24 | 8 | offset of the volume in it |
//! | 32 | 4096 | the file system's stamp block ([`CacheOptions::stamp_offset_bytes`](crate::CacheOptions)), as ciphertext |
//! | 4128 | 8 | number of entries |
//! | 4136 | 24 each | block 8, digest 8, slot 4, kept 4; the longest unused first |
//! | at the end | 8 | digest of everything before it; last, because it is computed last |

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};

use sprat_store::{FileStat, ReadClass, StoreFile};

use crate::slots::{CachedBlock, Place, digest_of};
use crate::threads::named;
use crate::{BLOCK_BYTES, Geometry};

const MAGIC: &[u8; 8] = b"sprtblk1";
const HEAD_BYTES: usize = 4136;
const ENTRY_BYTES: usize = 24;
const LOCK: &str = "lock";
const BLOCKS: &str = "blocks";
const CLEAN: &str = "clean";
const UNFINISHED: &str = "clean.new";
/// The cache stops growing if its disk has less free space than this: the write journal beside it
/// needs space.
const SPACE_LEFT_BYTES_MIN: u64 = 1 << 30;

/// The state of a container that a cache belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CacheValidator {
    pub(crate) file_bytes: u64,
    pub(crate) modified_s: u64,
    pub(crate) offset_bytes: u64,
    pub(crate) stamp_block: Vec<u8>,
}

impl CacheValidator {
    /// Reads the current state of the container; `None` if the store gives no time of modification
    /// or does not answer.
    pub(crate) fn read(
        store: &dyn StoreFile,
        geometry: Geometry,
        stamp_offset_bytes: u64,
    ) -> Option<Self> {
        let at = geometry.offset_bytes + stamp_offset_bytes;
        let mut stamp_block = vec![0; BLOCK_BYTES];
        let (stat, read) = std::thread::scope(|scope| {
            // Without a second thread this takes one round trip more.
            let asked = named("stat").spawn_scoped(scope, || store.stat());
            let read = store.read_at(at, &mut stamp_block, ReadClass::Demand);
            let stat = match asked {
                Ok(asked) => asked.join().ok(),
                Err(_) => Some(store.stat()),
            };
            (stat, read)
        });
        read.ok()?;
        Self::of(&stat?.ok()?, stamp_block, geometry)
    }

    /// As [`read`](Self::read), from values that were read already.
    pub(crate) fn of(stat: &FileStat, stamp_block: Vec<u8>, geometry: Geometry) -> Option<Self> {
        Some(Self {
            file_bytes: stat.len,
            modified_s: stat.modified_s?,
            offset_bytes: geometry.offset_bytes,
            stamp_block,
        })
    }
}

/// The content of the clean marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CleanMarker {
    /// There is no marker, or it is incomplete or damaged.
    Missing,
    /// The marker is valid for another state of the container: another machine has written to it
    /// since.
    Outdated,
    /// The cached blocks of the container's current state.
    Valid(Vec<CachedBlock>),
}

/// The folder of one container's cache. It is ours while this value exists.
#[derive(Debug)]
pub(crate) struct CacheFile {
    dir: PathBuf,
    blocks: File,
    _lock: File,
}

impl CacheFile {
    /// Opens the cache and reads which blocks it has, if it belongs to the state `validator`. For a
    /// session that may write, a missing folder is created, and the marker is removed before this
    /// returns. `None` if another session uses the cache or, for a reader, if there is no marker.
    pub(crate) fn open(
        dir: &Path,
        validator: &CacheValidator,
        slots_max: u32,
        writing: bool,
    ) -> io::Result<Option<(Self, CleanMarker)>> {
        if writing {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        } else if !dir.join(CLEAN).try_exists()? {
            return Ok(None);
        }
        let open = |name: &str| {
            not_following()
                .read(true)
                .write(writing)
                .create(writing)
                .open(dir.join(name))
        };
        let lock = open(LOCK)?;
        let how = if writing {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        if let Err(errno) = flock(&lock, how) {
            return match errno {
                rustix::io::Errno::WOULDBLOCK => Ok(None),
                other => Err(other.into()),
            };
        }
        if lock.metadata()?.nlink() == 0 {
            // Another process has just removed the folder as unused.
            return Ok(None);
        }
        let marker = read_marker(dir, validator, slots_max).unwrap_or(CleanMarker::Missing);
        let empty = !matches!(marker, CleanMarker::Valid(_));
        if writing {
            remove_clean_marker(dir)?;
        }
        let blocks = open(BLOCKS)?;
        let bytes_max = u64::from(slots_max) * BLOCK_BYTES as u64;
        if writing && (empty || blocks.metadata()?.len() > bytes_max) {
            blocks.set_len(if empty { 0 } else { bytes_max })?;
        }
        let dir = dir.to_owned();
        let cache = Self {
            dir,
            blocks,
            _lock: lock,
        };
        Ok(Some((cache, marker)))
    }

    /// Returns the bytes of a block, if they are the ones that were written there.
    pub(crate) fn read(&self, index: u64, place: Place) -> Option<Vec<u8>> {
        let mut bytes = vec![0; BLOCK_BYTES];
        self.blocks
            .read_exact_at(&mut bytes, u64::from(place.slot) * BLOCK_BYTES as u64)
            .ok()?;
        (digest_of(index, &bytes) == place.digest).then_some(bytes)
    }

    pub(crate) fn write(&self, slot: u32, bytes: &[u8]) -> io::Result<()> {
        let offset = u64::from(slot) * BLOCK_BYTES as u64;
        if offset >= self.blocks.metadata()?.len() {
            let space = rustix::fs::fstatvfs(&self.blocks)?;
            if space.f_bavail.saturating_mul(space.f_frsize) < SPACE_LEFT_BYTES_MIN {
                return Err(ErrorKind::StorageFull.into());
            }
        }
        self.blocks.write_all_at(bytes, offset)
    }

    /// Writes the marker: from now on the blocks may be used while the container is in the state
    /// `validator`.
    pub(crate) fn mark_clean(
        &self,
        validator: &CacheValidator,
        held: &[CachedBlock],
    ) -> io::Result<()> {
        self.blocks.sync_all()?;
        let unfinished = self.dir.join(UNFINISHED);
        remove_if_there(&unfinished)?;
        let mut file = not_following()
            .write(true)
            .create_new(true)
            .open(&unfinished)?;
        file.write_all(&encode(validator, held))?;
        file.sync_all()?;
        fs::rename(&unfinished, self.dir.join(CLEAN))?;
        File::open(&self.dir)?.sync_all()
    }
}

/// Options that refuse a symbolic link: none of the files in the folder is one.
fn not_following() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    options.mode(0o600).custom_flags(flags);
    options
}

/// Removes the caches in `parent` that no session has written for `unused_for`: their containers
/// are most likely gone. A cache in use stays, and so does any folder with other files in it.
/// Errors are ignored: what stays only uses disk space.
pub fn remove_unused_caches(parent: &Path, unused_for: Duration) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        // `DirEntry` does not follow a symbolic link.
        let old = entry
            .metadata()
            .ok()
            .filter(Metadata::is_dir)
            .is_some_and(|folder| {
                // A clean close renames a file in the folder, which changes this time.
                let age = folder.modified().ok().and_then(|time| time.elapsed().ok());
                age.is_some_and(|age| age >= unused_for)
            });
        if old {
            let _ = remove_cache(&entry.path());
        }
    }
}

fn remove_cache(dir: &Path) -> io::Result<()> {
    let names: Vec<_> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<_>>()?;
    let ours = |name: &OsString| {
        [LOCK, BLOCKS, CLEAN, UNFINISHED]
            .iter()
            .any(|our| name == our)
    };
    if !names.iter().all(ours) || !names.iter().any(|name| name == LOCK) {
        return Ok(());
    }
    let lock = not_following().read(true).open(dir.join(LOCK))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    // The marker first, because without it the other files are not used. The lock last: a process
    // that waits for it then sees that it has no name any more.
    for name in [CLEAN, UNFINISHED, BLOCKS, LOCK] {
        remove_if_there(&dir.join(name))?;
    }
    fs::remove_dir(dir)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the marker of `dir` durably: the cache is not used any more.
pub(crate) fn remove_clean_marker(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(CLEAN)) {
        Ok(()) => File::open(dir)?.sync_all(),
        Err(error) => match error.kind() {
            // The process that removed it may have died before the removal was durable.
            ErrorKind::NotFound => match File::open(dir) {
                Ok(folder) => folder.sync_all(),
                Err(_) => Ok(()),
            },
            ErrorKind::NotADirectory => Ok(()),
            _ => Err(error),
        },
    }
}

fn encode(validator: &CacheValidator, held: &[CachedBlock]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + held.len() * ENTRY_BYTES + 8);
    bytes.extend_from_slice(MAGIC);
    for number in [
        validator.file_bytes,
        validator.modified_s,
        validator.offset_bytes,
    ] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&validator.stamp_block);
    bytes.extend_from_slice(&(held.len() as u64).to_le_bytes());
    for entry in held {
        bytes.extend_from_slice(&entry.index.to_le_bytes());
        bytes.extend_from_slice(&entry.place.digest.to_le_bytes());
        bytes.extend_from_slice(&entry.place.slot.to_le_bytes());
        bytes.extend_from_slice(&u32::from(entry.kept).to_le_bytes());
    }
    bytes.extend_from_slice(&digest_of(0, &bytes).to_le_bytes());
    bytes
}

/// Reads the marker; `None` if it is missing or damaged.
fn read_marker(dir: &Path, validator: &CacheValidator, slots_max: u32) -> Option<CleanMarker> {
    decode(&marker_bytes(dir, slots_max)?, validator)
}

/// The blocks of the cache in `dir`, whatever state of the container it belongs to. `None` if there
/// is no marker or it is damaged.
pub(crate) fn held_blocks(dir: &Path, bytes_max: u64) -> Option<Vec<CachedBlock>> {
    let slots_max = u32::try_from(bytes_max / BLOCK_BYTES as u64).unwrap_or(u32::MAX);
    held_in(entries_of(&marker_bytes(dir, slots_max)?)?.1)
}

fn marker_bytes(dir: &Path, slots_max: u32) -> Option<Vec<u8>> {
    // It was written by a cache of at most twice this size. A longer one is not worth its memory.
    let bytes_max = HEAD_BYTES as u64 + 2 * u64::from(slots_max) * ENTRY_BYTES as u64 + 8;
    let file = not_following().read(true).open(dir.join(CLEAN)).ok()?;
    if file.metadata().ok()?.len() > bytes_max {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn decode(bytes: &[u8], validator: &CacheValidator) -> Option<CleanMarker> {
    let (head, entries) = entries_of(bytes)?;
    let expected = encode(validator, &[]);
    if head[..HEAD_BYTES - 8] != expected[..HEAD_BYTES - 8] {
        return Some(CleanMarker::Outdated);
    }
    held_in(entries).map(CleanMarker::Valid)
}

/// Head and entries of an undamaged marker.
fn entries_of(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (body, digest) = bytes.split_last_chunk::<8>()?;
    if body.len() < HEAD_BYTES || digest_of(0, body).to_le_bytes() != *digest {
        return None;
    }
    let (head, entries) = body.split_at(HEAD_BYTES);
    let count = u64::from_le_bytes(*head.last_chunk()?);
    let whole = entries.len() as u64 == count.checked_mul(ENTRY_BYTES as u64)?;
    (head.starts_with(MAGIC) && whole).then_some((head, entries))
}

fn held_in(entries: &[u8]) -> Option<Vec<CachedBlock>> {
    let mut held = Vec::new();
    for entry in entries.chunks_exact(ENTRY_BYTES) {
        let (index, rest) = entry.split_first_chunk::<8>()?;
        let (digest, rest) = rest.split_first_chunk::<8>()?;
        let (slot, kept) = rest.split_first_chunk::<4>()?;
        held.push(CachedBlock {
            index: u64::from_le_bytes(*index),
            place: Place {
                slot: u32::from_le_bytes(*slot),
                digest: u64::from_le_bytes(*digest),
            },
            kept: kept != [0; 4],
        });
    }
    Some(held)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::slots::Slots;

    fn validator() -> CacheValidator {
        CacheValidator {
            file_bytes: 1 << 30,
            modified_s: 7,
            offset_bytes: 16 << 20,
            stamp_block: vec![3; BLOCK_BYTES],
        }
    }

    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.extend_from_slice(&digest_of(0, &bytes).to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn no_clean_marker_makes_the_parser_panic(
            noise in proptest::collection::vec(any::<u8>(), 0..300),
            entries in proptest::collection::vec((0u64..50, 0u32..50, any::<u32>()), 0..40),
            wrong_count in any::<u64>(),
        ) {
            prop_assert!(decode(&noise, &validator()).is_none());
            prop_assert!(decode(&sealed(noise), &validator()).is_none());
            // With the right digest, head and count the parser reaches everything behind them.
            let empty = encode(&validator(), &[]);
            let mut body = empty[..HEAD_BYTES - 8].to_vec();
            body.extend_from_slice(&(entries.len() as u64).to_le_bytes());
            for (index, slot, kept) in &entries {
                body.extend_from_slice(&index.to_le_bytes());
                body.extend_from_slice(&[9; 8]);
                body.extend_from_slice(&slot.to_le_bytes());
                body.extend_from_slice(&kept.to_le_bytes());
            }
            let Some(CleanMarker::Valid(held)) = decode(&sealed(body.clone()), &validator()) else {
                panic!("it is whole");
            };
            let later = CacheValidator { modified_s: 8, ..validator() };
            prop_assert_eq!(decode(&sealed(body.clone()), &later), Some(CleanMarker::Outdated));
            prop_assert_eq!(held.len(), entries.len());
            // Restored slots never give one slot to two blocks.
            if let Some(slots) = Slots::restored(40, &held) {
                let mut used: Vec<u32> = slots.held().iter().map(|held| held.place.slot).collect();
                let all = used.len();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(used.len(), all);
            }
            if wrong_count != entries.len() as u64 {
                body[HEAD_BYTES - 8..HEAD_BYTES].copy_from_slice(&wrong_count.to_le_bytes());
                prop_assert!(decode(&sealed(body), &validator()).is_none());
            }
        }
    }
}
