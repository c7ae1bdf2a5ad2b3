//! The hashes of the blocks of a large file, on this machine. With them a run finds which blocks differ without
//! reading the old file over the connection.
//!
//! An index counts only for the file that it was made for: inode, size, time and change time must be equal. It becomes
//! durable after the snapshot, and in one step. A missing, damaged or older index is the same as none. That of a file that
//! rsync sent whole may be lost in a crash, or lose some hashes: it has a key of its own, so no block has the hash of
//! anything else that is in their place.
//!
//! | part | has |
//! | --- | --- |
//! | hashes | 16 bytes for each block of 4 KiB: its GMAC with the key (AES-256-GCM, a nonce of zeros). The last block may be shorter |
//! | end | JSON: [`End`] |
//! | 4 bytes | how many bytes the JSON has, little endian |
//! | 8 bytes | `SPRATBLK` |

use std::fs::{File, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use openssl::sha::{Sha256, sha256};
use serde::{Deserialize, Serialize};

use crate::local_file;
use crate::text::escape_path;

/// Of a block.
pub(super) const BLOCK_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"SPRATBLK";
const FORMAT: u32 = 2;
const ENDING: &str = ".blocks";
/// How long the indexes of files that rsync sent whole may be together: those of 64 GiB. Most large files never change.
pub(super) const WHOLE_BYTES_MAX: u64 = 256 << 20;
/// The JSON has one path in it.
const END_BYTES_MAX: u32 = 64 << 10;

/// Of the content of a block.
pub(super) type Hash = [u8; 16];

/// Identifies one state of a file of the volume. Whatever changes its content changes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    inode: u64,
    pub(super) bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Identity {
    pub(super) fn of(about: &Metadata) -> Self {
        let ns = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        Self {
            inode: about.ino(),
            bytes: about.len(),
            modified_ns: ns(about.mtime(), about.mtime_nsec()),
            changed_ns: ns(about.ctime(), about.ctime_nsec()),
        }
    }
}

/// What is known of the file as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    format: u32,
    /// The path in the source, escaped.
    pub(super) path: String,
    pub(super) file: Identity,
    /// About how many pieces the file consists of on the volume.
    pub(super) pieces: u64,
    /// rsync sent the file whole. No run has updated it yet.
    #[serde(default)]
    whole: bool,
    key: Key,
}

/// How many bytes the hashes of a file have.
pub(super) fn index_bytes(file_bytes: u64) -> u64 {
    file_bytes.div_ceil(BLOCK_BYTES as u64) * size_of::<Hash>() as u64
}

/// Makes the hashes of one file. It is random, and stays on this machine. Nobody can choose two blocks that have the same
/// hash: the probability is below 2^-119.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key([u8; 32]);

impl Key {
    pub(super) fn random() -> io::Result<Self> {
        let mut key = [0; 32];
        openssl::rand::rand_bytes(&mut key).map_err(io::Error::other)?;
        Ok(Self(key))
    }

    pub(super) fn hasher(&self) -> io::Result<Hasher> {
        let mut context = CipherCtx::new()?;
        context.encrypt_init(Some(Cipher::aes_256_gcm()), Some(&self.0), Some(&[0; 12]))?;
        Ok(Hasher {
            context,
            zeros: None,
        })
    }
}

/// Whether a block has only zeros.
pub(super) fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// Computes hashes with one key.
pub(super) struct Hasher {
    context: CipherCtx,
    /// That of a block of zeros. A sparse file has many of them.
    zeros: Option<Hash>,
}

impl Hasher {
    /// The GMAC of a block (NIST SP 800-38D). SHA-256 takes three times as long.
    ///
    /// All blocks have one nonce, so that equal blocks have equal hashes. As a signature that would be unsafe. Here nobody
    /// who may choose a block sees a hash or the key, and two given blocks then have the same hash with a chance of 2^-120.
    pub(super) fn hash(&mut self, block: &[u8]) -> io::Result<Hash> {
        if block.len() != BLOCK_BYTES || !is_zero(block) {
            return self.compute(block);
        }
        let hash = match self.zeros {
            Some(hash) => hash,
            None => self.compute(block)?,
        };
        self.zeros = Some(hash);
        Ok(hash)
    }

    fn compute(&mut self, block: &[u8]) -> io::Result<Hash> {
        let mut hash = Hash::default();
        let context = &mut self.context;
        // Without an output, the block is only authenticated.
        context.encrypt_init(None, None, Some(&[0; 12]))?;
        context.cipher_update(block, None)?;
        context.cipher_final(&mut [])?;
        context.tag(&mut hash)?;
        Ok(hash)
    }
}

/// The file with this ending in `folder` that belongs to the source file `path`.
pub(super) fn place(folder: &Path, path: &Path, ending: &str) -> PathBuf {
    let digest = sha256(path.as_os_str().as_bytes());
    let name: String = digest[..16].iter().map(|b| format!("{b:02x}")).collect();
    folder.join(format!("{name}{ending}"))
}

/// Hashes in a file, one after the other.
#[derive(Debug)]
pub(super) struct Hashes {
    file: BufReader<File>,
    left: u64,
    failed: bool,
}

impl Hashes {
    /// The first `blocks` hashes of the file, which has them.
    pub(super) fn new(file: File, blocks: u64) -> Self {
        Self {
            file: BufReader::with_capacity(64 << 10, file),
            left: blocks,
            failed: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }

    /// The next one. `None`: there is none, or it can't be read.
    pub(super) fn next(&mut self) -> Option<Hash> {
        self.left = self.left.checked_sub(1)?;
        let mut hash = Hash::default();
        // They are not over then: what comes after them, such as the hashes of an older file, must not stand for them.
        // After a failure the next one that can be read may be that of an earlier block.
        self.failed = self.failed || self.file.read_exact(&mut hash).is_err();
        (!self.failed).then_some(hash)
    }
}

/// An index that is read from its beginning.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) hashes: Hashes,
    pub(super) end: End,
}

impl Index {
    /// The index of the source file `path` in `folder`.
    pub(super) fn open(folder: &Path, path: &Path) -> Option<Self> {
        let index = Self::read(&place(folder, path, ENDING)).ok()?;
        (index.end.path == escape_path(path)).then_some(index)
    }

    fn read(place: &Path) -> io::Result<Self> {
        let damaged = || io::Error::from(io::ErrorKind::InvalidData);
        let mut file = File::open(place)?;
        let length = file.metadata()?.len();
        let tail_at = length.checked_sub(12).ok_or_else(damaged)?;
        file.seek(SeekFrom::Start(tail_at))?;
        let mut tail = [0; 12];
        file.read_exact(&mut tail)?;
        let (json_bytes, magic) = tail.split_at(4);
        let json_bytes = u32::from_le_bytes(json_bytes.try_into().map_err(|_| damaged())?);
        if magic != MAGIC || json_bytes > END_BYTES_MAX {
            return Err(damaged());
        }
        let json_at = tail_at.checked_sub(json_bytes.into()).ok_or_else(damaged)?;
        file.seek(SeekFrom::Start(json_at))?;
        let mut json = vec![0; json_bytes as usize];
        file.read_exact(&mut json)?;
        let end: End = serde_json::from_slice(&json)?;
        if end.format != FORMAT || json_at != index_bytes(end.file.bytes) {
            return Err(damaged());
        }
        file.rewind()?;
        let blocks = json_at / size_of::<Hash>() as u64;
        Ok(Self {
            hashes: Hashes::new(file, blocks),
            end,
        })
    }

    pub(super) fn key(&self) -> Key {
        self.end.key
    }
}

/// An index that is being written. Its file stays after an interruption: [`super::part`] knows what it is good for.
pub(super) struct Draft {
    file: BufWriter<File>,
    path: PathBuf,
    key: Key,
    sum: Sha256,
}

impl Draft {
    /// Begins it in the file `path`.
    pub(super) fn begin(path: PathBuf, key: Key) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            local_file::make_private_folder(folder)?;
        }
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        Ok(Self {
            file: BufWriter::with_capacity(64 << 10, options.open(&path)?),
            path,
            key,
            sum: Sha256::new(),
        })
    }

    /// Makes the hashes so far durable.
    pub(super) fn save(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_data()
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// The SHA-256 of the hashes so far.
    pub(super) fn sum(&self) -> [u8; 32] {
        self.sum.clone().finish()
    }

    pub(super) fn push(&mut self, hash: &Hash) -> io::Result<()> {
        self.sum.update(hash);
        self.file.write_all(hash)
    }

    /// Makes it the index of the source file `path`, whose file on the volume is `file`. It has got the hash of each
    /// of its blocks.
    pub(super) fn finish(
        self,
        folder: &Path,
        path: &Path,
        file: Identity,
        pieces: u64,
    ) -> io::Result<()> {
        self.end(path, file, pieces, false)?.put(folder, path)
    }

    /// Ends the index of a file that rsync sent whole.
    pub(super) fn end_of_whole(
        self,
        path: &Path,
        file: Identity,
        pieces: u64,
    ) -> io::Result<Ready> {
        self.end(path, file, pieces, true)
    }

    fn end(mut self, path: &Path, file: Identity, pieces: u64, whole: bool) -> io::Result<Ready> {
        let end = End {
            format: FORMAT,
            path: escape_path(path),
            file,
            pieces,
            whole,
            key: self.key,
        };
        let json = serde_json::to_vec(&end)?;
        self.file.write_all(&json)?;
        let json_bytes = u32::try_from(json.len()).map_err(io::Error::other)?;
        self.file.write_all(&json_bytes.to_le_bytes())?;
        self.file.write_all(MAGIC)?;
        self.file.flush()?;
        if !whole {
            self.file.get_ref().sync_all()?;
        }
        Ok(Ready {
            draft: self.path,
            whole,
        })
    }
}

/// A complete index that is not in its place. It is durable, unless rsync sent the file whole: a sync would wait for all
/// that this machine's disk has to write then.
pub(super) struct Ready {
    draft: PathBuf,
    whole: bool,
}

impl Ready {
    /// Puts it where the index of the source file `path` is.
    pub(super) fn put(self, folder: &Path, path: &Path) -> io::Result<()> {
        std::fs::rename(&self.draft, place(folder, path, ENDING))?;
        match self.whole {
            true => Ok(()),
            false => File::open(folder)?.sync_all(),
        }
    }
}

/// Removes each index in `folder` that is not that of the present file. `present` returns the file of a source file. Of
/// files that rsync sent whole, those that changed last keep theirs.
pub(super) fn remove_others(folder: &Path, present: &dyn Fn(&str) -> Option<Identity>) {
    remove_others_within(folder, present, WHOLE_BYTES_MAX);
}

fn remove_others_within(
    folder: &Path,
    present: &dyn Fn(&str) -> Option<Identity>,
    whole_bytes_max: u64,
) {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let indexes = names.filter(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().ends_with(ENDING.as_bytes())
    });
    let mut others = Vec::new();
    let mut whole = Vec::new();
    for place in indexes.map(|entry| entry.path()) {
        let end = Index::read(&place).map(|index| index.end);
        match end {
            Ok(end) if present(&end.path).as_ref() == Some(&end.file) => {
                whole.extend(end.whole.then_some((end.file, place)));
            }
            _ => others.push(place),
        }
    }
    whole.sort_by_key(|(file, _)| std::cmp::Reverse(file.modified_ns));
    let mut bytes = 0;
    for (file, place) in whole {
        bytes += index_bytes(file.bytes);
        if bytes > whole_bytes_max {
            others.push(place);
        }
    }
    for place in others {
        // It does no harm.
        let _ = std::fs::remove_file(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(folder: &Path, path: &Path, blocks: u64) -> (Key, Identity) {
        let file = folder.join("file");
        File::create(&file)
            .unwrap()
            .set_len(blocks * BLOCK_BYTES as u64)
            .unwrap();
        let file = Identity::of(&file.metadata().unwrap());
        let key = Key::random().unwrap();
        let mut draft = Draft::begin(folder.join("draft"), key).unwrap();
        let mut hasher = key.hasher().unwrap();
        for block in 0..blocks {
            let hash = hasher.hash(&block.to_le_bytes()).unwrap();
            draft.push(&hash).unwrap();
        }
        draft.finish(folder, path, file.clone(), 7).unwrap();
        (key, file)
    }

    #[test]
    fn an_index_is_read_back_and_a_cut_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let (folder, path) = (folder.path(), Path::new("/vm.img"));
        let (key, file) = made(folder, path, 3);
        let mut index = Index::open(folder, path).unwrap();
        assert_eq!((&index.end.file, index.end.pieces), (&file, 7));
        let mut hasher = key.hasher().unwrap();
        for block in 0..3_u64 {
            let hash = hasher.hash(&block.to_le_bytes()).unwrap();
            assert_eq!(index.hashes.next(), Some(hash));
        }
        assert_eq!(index.hashes.next(), None);
        assert!(Index::open(folder, Path::new("/other.img")).is_none());
        let place = place(folder, path, ENDING);
        let whole = std::fs::read(&place).unwrap();
        for cut in [0, 11, 16, whole.len() - 1] {
            std::fs::write(&place, &whole[..cut]).unwrap();
            assert!(Index::open(folder, path).is_none(), "{cut}");
            // A hash is missing.
            std::fs::write(&place, &whole[whole.len() - cut..]).unwrap();
            assert!(Index::open(folder, path).is_none(), "{cut}");
        }
    }

    #[test]
    fn blocks_of_zeros_have_the_hash_of_zeros() {
        let mut hasher = Key::random().unwrap().hasher().unwrap();
        let mut others = vec![vec![0; BLOCK_BYTES - 1], vec![0], vec![7; BLOCK_BYTES]];
        others.push([&[0; BLOCK_BYTES - 1][..], &[1]].concat());
        for _ in 0..2 {
            let zeros = hasher.hash(&[0; BLOCK_BYTES]).unwrap();
            assert_eq!(zeros, hasher.compute(&[0; BLOCK_BYTES]).unwrap());
            for other in &others {
                assert_eq!(hasher.hash(other).unwrap(), hasher.compute(other).unwrap());
                assert_ne!(hasher.hash(other).unwrap(), zeros);
            }
        }
    }

    #[test]
    fn hashes_that_cannot_be_read_are_unknown_and_not_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hashes");
        std::fs::write(&path, [7; 24]).unwrap();
        let mut hashes = Hashes::new(File::open(&path).unwrap(), 3);
        assert_eq!(hashes.next(), Some([7; 16]));
        assert_eq!(hashes.next(), None);
        assert!(!hashes.is_over(), "others would stand for them");
        assert_eq!(hashes.next(), None);
        assert!(hashes.is_over());
    }

    #[test]
    fn files_that_changed_last_keep_their_indexes() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let file = folder.join("file");
        let mut present = std::collections::BTreeMap::new();
        for (name, seconds, whole) in [
            ("/2", 2, true),
            ("/3", 3, true),
            ("/1", 1, true),
            ("/0", 0, false),
        ] {
            std::fs::write(&file, [0; BLOCK_BYTES]).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            let open = File::options().write(true).open(&file).unwrap();
            open.set_modified(time).unwrap();
            let about = Identity::of(&file.metadata().unwrap());
            present.insert(name.to_owned(), about.clone());
            let mut draft = Draft::begin(folder.join("draft"), Key::random().unwrap()).unwrap();
            draft.push(&Hash::default()).unwrap();
            let path = Path::new(name);
            let ready = draft.end(path, about, 0, whole).unwrap();
            ready.put(folder, path).unwrap();
        }
        let left = |bytes| {
            remove_others_within(folder, &|path| present.get(path).cloned(), bytes);
            let left = present
                .keys()
                .filter(|path| Index::open(folder, Path::new(path)).is_some());
            left.cloned().collect::<String>()
        };
        assert_eq!(left(48), "/0/1/2/3");
        assert_eq!(left(47), "/0/2/3");
        assert_eq!(left(0), "/0");
    }

    #[test]
    fn the_index_of_another_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (_, kept) = made(folder, Path::new("/kept"), 2);
        made(folder, Path::new("/changed"), 3);
        made(folder, Path::new("/gone"), 3);
        remove_others(folder, &|path| match path {
            "/kept" | "/changed" => Some(kept.clone()),
            _ => None,
        });
        let left = |path: &str| Index::open(folder, Path::new(path)).is_some();
        assert!(left("/kept") && !left("/changed") && !left("/gone"));
    }
}
