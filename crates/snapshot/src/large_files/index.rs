//! The hashes of the blocks of a large file, on this machine. With them a run finds which blocks differ without
//! reading the old file over the connection.
//!
//! An index counts only for the file that it was made for: inode, size, time and change time must be equal. It becomes
//! durable after the snapshot, and in one step. A missing, damaged or older index is the same as none.
//!
//! | part | has |
//! | --- | --- |
//! | hashes | 16 bytes for each block of 4 KiB: the begin of SHA-256 of the key and the block. The last block may be shorter |
//! | end | JSON: [`End`] |
//! | 4 bytes | how many bytes the JSON has, little endian |
//! | 8 bytes | `SPRATBLK` |

use std::fs::{File, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use openssl::sha::{Sha256, sha256};
use serde::{Deserialize, Serialize};

use crate::local_file;
use crate::text::escape_path;

/// Of a block.
pub(super) const BLOCK_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"SPRATBLK";
const FORMAT: u32 = 1;
const ENDING: &str = ".blocks";
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
    key: Key,
}

/// Makes the hashes of one file. It is random: nobody who chooses the content of a file knows its hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key([u8; 32]);

impl Key {
    pub(super) fn random() -> io::Result<Self> {
        let mut key = [0; 32];
        openssl::rand::rand_bytes(&mut key).map_err(io::Error::other)?;
        Ok(Self(key))
    }

    pub(super) fn hash(&self, block: &[u8]) -> Hash {
        let mut all = Sha256::new();
        all.update(&self.0);
        all.update(block);
        let mut hash = [0; 16];
        hash.copy_from_slice(&all.finish()[..16]);
        hash
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
}

impl Hashes {
    /// The first `blocks` hashes of the file, which has them.
    pub(super) fn new(file: File, blocks: u64) -> Self {
        Self {
            file: BufReader::with_capacity(64 << 10, file),
            left: blocks,
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
        self.file.read_exact(&mut hash).ok()?;
        Some(hash)
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
        let blocks = end.file.bytes.div_ceil(BLOCK_BYTES as u64);
        if end.format != FORMAT || json_at != blocks * size_of::<Hash>() as u64 {
            return Err(damaged());
        }
        file.rewind()?;
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
        mut self,
        folder: &Path,
        path: &Path,
        file: Identity,
        pieces: u64,
    ) -> io::Result<()> {
        let end = End {
            format: FORMAT,
            path: escape_path(path),
            file,
            pieces,
            key: self.key,
        };
        let json = serde_json::to_vec(&end)?;
        self.file.write_all(&json)?;
        let json_bytes = u32::try_from(json.len()).map_err(io::Error::other)?;
        self.file.write_all(&json_bytes.to_le_bytes())?;
        self.file.write_all(MAGIC)?;
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        std::fs::rename(&self.path, place(folder, path, ENDING))?;
        File::open(folder)?.sync_all()
    }
}

/// Removes each index in `folder` that is not that of the present file. `present` returns the file of a source file.
pub(super) fn remove_others(folder: &Path, present: &dyn Fn(&str) -> Option<Identity>) {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let indexes = names.filter(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().ends_with(ENDING.as_bytes())
    });
    let others: Vec<PathBuf> = indexes
        .map(|entry| entry.path())
        .filter(|place| {
            let end = Index::read(place).map(|index| index.end);
            !end.is_ok_and(|end| present(&end.path).as_ref() == Some(&end.file))
        })
        .collect();
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
        for block in 0..blocks {
            draft.push(&key.hash(&block.to_le_bytes())).unwrap();
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
        for block in 0..3_u64 {
            assert_eq!(index.hashes.next(), Some(key.hash(&block.to_le_bytes())));
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
