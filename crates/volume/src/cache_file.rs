//! The persistent cache's folder: its blocks, the mark of a clean close, and who may use it.
//!
//! | file | holds |
//! | --- | --- |
//! | `lock` | nothing; flocked, shared by sessions that only read |
//! | `blocks` | blocks of ciphertext, slot after slot, in no order |
//! | `clean` | what lies where, and of which state of the container; only there after a clean close |
//!
//! `clean` is the table and the mark in one. It is removed, and the folder fsynced, before a
//! session that may write sends anything; it is made after everything is durable, `blocks`
//! included, by a rename. So what it says is whole or absent. All numbers are little endian:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `sprtblk1`: format and version, first, so that nothing else is looked at |
//! | 8 | 8 | length of the container file |
//! | 16 | 8 | its time of modification, in seconds |
//! | 24 | 8 | offset of the volume in it |
//! | 32 | 4096 | the volume's first block (ext4's super block lies in it), as ciphertext |
//! | 4128 | 8 | number of entries |
//! | 4136 | 24 each | block 8, digest 8, slot 4, kept 4; the longest unused first |
//! | at the end | 8 | digest of everything before it: the last, as it is made last |

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};

use sprat_store::{FileStat, ReadClass, StoreFile};

use crate::slots::{Held, Place, digest_of};
use crate::threads::named;
use crate::{BLOCK_BYTES, Geometry};

const MAGIC: &[u8; 8] = b"sprtblk1";
const HEAD_BYTES: usize = 4136;
const ENTRY_BYTES: usize = 24;
const LOCK: &str = "lock";
const BLOCKS: &str = "blocks";
const CLEAN: &str = "clean";
const UNFINISHED: &str = "clean.new";
/// The cache does not grow while its disk has less left: the lock record beside it needs room.
const SPACE_LEFT_BYTES_MIN: u64 = 1 << 30;

/// The state of a container that a cache belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Basis {
    pub(crate) file_bytes: u64,
    pub(crate) modified_s: u64,
    pub(crate) offset_bytes: u64,
    pub(crate) first_block: Vec<u8>,
}

impl Basis {
    /// The present state of the container; `None` if the store gives no time of modification or does
    /// not answer.
    pub(crate) fn read(store: &dyn StoreFile, geometry: Geometry) -> Option<Self> {
        let mut first_block = vec![0; BLOCK_BYTES];
        let (stat, read) = std::thread::scope(|scope| {
            // Without a second thread it takes a round trip more.
            let asked = named("stat").spawn_scoped(scope, || store.stat());
            let read = store.read_at(geometry.offset_bytes, &mut first_block, ReadClass::Demand);
            let stat = match asked {
                Ok(asked) => asked.join().ok(),
                Err(_) => Some(store.stat()),
            };
            (stat, read)
        });
        read.ok()?;
        Self::of(&stat?.ok()?, first_block, geometry)
    }

    /// As [`read`](Self::read), of what was read already.
    pub(crate) fn of(stat: &FileStat, first_block: Vec<u8>, geometry: Geometry) -> Option<Self> {
        Some(Self {
            file_bytes: stat.len,
            modified_s: stat.modified_s?,
            offset_bytes: geometry.offset_bytes,
            first_block,
        })
    }
}

/// What the mark of a clean close says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mark {
    /// There is none, or none that is whole.
    Missing,
    /// It is whole, and of another state of the container: somebody has written to that since.
    Outdated,
    /// What is held of the container's present state.
    Held(Vec<Held>),
}

/// The folder of one container's cache, ours while this lives.
#[derive(Debug)]
pub(crate) struct CacheFile {
    dir: PathBuf,
    blocks: File,
    _lock: File,
}

impl CacheFile {
    /// Opens the cache and reads what it holds, if that belongs to `basis`. For a session that may
    /// write the folder is made where it is missing, and the mark is gone when this returns.
    /// `None` where another session uses it or, for a reader, where there is nothing to use.
    pub(crate) fn open(
        dir: &Path,
        basis: &Basis,
        slots_max: u32,
        writing: bool,
    ) -> io::Result<Option<(Self, Mark)>> {
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
            // Somebody has just removed the folder as unused.
            return Ok(None);
        }
        let mark = read_mark(dir, basis, slots_max).unwrap_or(Mark::Missing);
        let empty = !matches!(mark, Mark::Held(_));
        if writing {
            remove_mark(dir)?;
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
        Ok(Some((cache, mark)))
    }

    /// The bytes of a block, if they are what was written there for it.
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

    /// Makes the mark: from now on what is held may be used, as long as the container is in the
    /// state of `basis`.
    pub(crate) fn mark_clean(&self, basis: &Basis, held: &[Held]) -> io::Result<()> {
        self.blocks.sync_all()?;
        let unfinished = self.dir.join(UNFINISHED);
        remove_if_there(&unfinished)?;
        let mut file = not_following()
            .write(true)
            .create_new(true)
            .open(&unfinished)?;
        file.write_all(&encode(basis, held))?;
        file.sync_all()?;
        fs::rename(&unfinished, self.dir.join(CLEAN))?;
        File::open(&self.dir)?.sync_all()
    }
}

/// Whatever stands under a name in the folder, a symbolic link is none of ours.
fn not_following() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    options.mode(0o600).custom_flags(flags);
    options
}

/// Removes the caches in `parent` that no session has written for `unused_for`: their containers are
/// most likely gone. One that is in use stays, and so does every folder that holds anything else.
/// Tells nothing: what stays costs room, no more.
pub fn remove_unused_caches(parent: &Path, unused_for: Duration) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        // `DirEntry` looks at a symbolic link itself.
        let old = entry
            .metadata()
            .ok()
            .filter(Metadata::is_dir)
            .is_some_and(|folder| {
                // A clean close renames a file in it.
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
    // The mark first: without it the rest means nothing. The lock last: who waits for it sees that
    // it has no name any more.
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

/// Removes the mark of `dir` durably: whatever lies there means nothing any more.
pub(crate) fn remove_mark(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(CLEAN)) {
        Ok(()) => File::open(dir)?.sync_all(),
        Err(error) => match error.kind() {
            // Whoever removed it may have died before that was durable.
            ErrorKind::NotFound => match File::open(dir) {
                Ok(folder) => folder.sync_all(),
                Err(_) => Ok(()),
            },
            ErrorKind::NotADirectory => Ok(()),
            _ => Err(error),
        },
    }
}

fn encode(basis: &Basis, held: &[Held]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + held.len() * ENTRY_BYTES + 8);
    bytes.extend_from_slice(MAGIC);
    for number in [basis.file_bytes, basis.modified_s, basis.offset_bytes] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&basis.first_block);
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

/// What the mark says, if it is there and whole.
fn read_mark(dir: &Path, basis: &Basis, slots_max: u32) -> Option<Mark> {
    // Made by a cache with twice this bound at most; a longer one is not worth its memory.
    let bytes_max = HEAD_BYTES as u64 + 2 * u64::from(slots_max) * ENTRY_BYTES as u64 + 8;
    let file = not_following().read(true).open(dir.join(CLEAN)).ok()?;
    if file.metadata().ok()?.len() > bytes_max {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes).ok()?;
    decode(&bytes, basis)
}

fn decode(bytes: &[u8], basis: &Basis) -> Option<Mark> {
    let (body, digest) = bytes.split_last_chunk::<8>()?;
    if body.len() < HEAD_BYTES || digest_of(0, body).to_le_bytes() != *digest {
        return None;
    }
    let (head, entries) = body.split_at(HEAD_BYTES);
    let expected = encode(basis, &[]);
    let same = head[..HEAD_BYTES - 8] == expected[..HEAD_BYTES - 8];
    let count = u64::from_le_bytes(*head.last_chunk()?);
    let ours = head.starts_with(MAGIC);
    if !ours || entries.len() as u64 != count.checked_mul(ENTRY_BYTES as u64)? {
        return None;
    }
    if !same {
        return Some(Mark::Outdated);
    }
    let mut held = Vec::new();
    for entry in entries.chunks_exact(ENTRY_BYTES) {
        let (index, rest) = entry.split_first_chunk::<8>()?;
        let (digest, rest) = rest.split_first_chunk::<8>()?;
        let (slot, kept) = rest.split_first_chunk::<4>()?;
        held.push(Held {
            index: u64::from_le_bytes(*index),
            place: Place {
                slot: u32::from_le_bytes(*slot),
                digest: u64::from_le_bytes(*digest),
            },
            kept: kept != [0; 4],
        });
    }
    Some(Mark::Held(held))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::slots::Slots;

    fn basis() -> Basis {
        Basis {
            file_bytes: 1 << 30,
            modified_s: 7,
            offset_bytes: 16 << 20,
            first_block: vec![3; BLOCK_BYTES],
        }
    }

    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.extend_from_slice(&digest_of(0, &bytes).to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_of_the_mark_panic(
            noise in proptest::collection::vec(any::<u8>(), 0..300),
            entries in proptest::collection::vec((0u64..50, 0u32..50, any::<u32>()), 0..40),
            wrong_count in any::<u64>(),
        ) {
            prop_assert!(decode(&noise, &basis()).is_none());
            prop_assert!(decode(&sealed(noise), &basis()).is_none());
            // Digest, head and count are right, so that everything behind them is reached.
            let empty = encode(&basis(), &[]);
            let mut body = empty[..HEAD_BYTES - 8].to_vec();
            body.extend_from_slice(&(entries.len() as u64).to_le_bytes());
            for (index, slot, kept) in &entries {
                body.extend_from_slice(&index.to_le_bytes());
                body.extend_from_slice(&[9; 8]);
                body.extend_from_slice(&slot.to_le_bytes());
                body.extend_from_slice(&kept.to_le_bytes());
            }
            let Some(Mark::Held(held)) = decode(&sealed(body.clone()), &basis()) else {
                panic!("it is whole");
            };
            let later = Basis { modified_s: 8, ..basis() };
            prop_assert_eq!(decode(&sealed(body.clone()), &later), Some(Mark::Outdated));
            prop_assert_eq!(held.len(), entries.len());
            // Whatever is taken over keeps what a cache holds to: no slot for two blocks.
            if let Some(slots) = Slots::restored(40, &held) {
                let mut used: Vec<u32> = slots.held().iter().map(|held| held.place.slot).collect();
                let all = used.len();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(used.len(), all);
            }
            if wrong_count != entries.len() as u64 {
                body[HEAD_BYTES - 8..HEAD_BYTES].copy_from_slice(&wrong_count.to_le_bytes());
                prop_assert!(decode(&sealed(body), &basis()).is_none());
            }
        }
    }
}
