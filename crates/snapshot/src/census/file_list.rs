//! The list of the files of a snapshot: 64 bits of a hash of each path, and 64 bits of a hash of its size and time.
//!
//! | bytes | are |
//! | --- | --- |
//! | 16 | [`MAGIC`] |
//! | 16 for each file | path and stamp, little-endian, in the order of the paths |

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::local_file;

const MAGIC: &[u8; 16] = b"sprat files 1\n\0\0";

/// A file: its path and its stamp.
pub(super) type Listed = (u64, u64);

/// The files of a snapshot, in the order of their hashes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FileList(Vec<Listed>);

/// Where a run writes the list of the snapshot that it makes.
pub(super) fn new_list(list: &Path) -> PathBuf {
    list.with_extension("new")
}

/// 64 bits of a hash.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    let hash = openssl::sha::sha256(bytes);
    hash[..8]
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl FileList {
    pub(super) fn of(mut files: Vec<Listed>) -> Self {
        files.sort_unstable();
        files.dedup_by_key(|(path, _)| *path);
        Self(files)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Listed> {
        self.0.iter()
    }

    /// The stamp of a path.
    pub(super) fn stamp(&self, path: u64) -> Option<u64> {
        let at = self.0.binary_search_by_key(&path, |(path, _)| *path);
        at.ok().map(|at| self.0[at].1)
    }

    /// Reads a list; `None`: it is missing or torn.
    pub(crate) fn read(list: &Path) -> Option<Self> {
        let mut bytes = Vec::new();
        std::fs::File::open(list)
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .ok()?;
        let entries = bytes.strip_prefix(MAGIC)?;
        let (entries, rest) = entries.as_chunks::<16>();
        if !rest.is_empty() {
            return None;
        }
        let number = |bytes: &[u8]| {
            bytes
                .iter()
                .rev()
                .fold(0, |n, byte| n << 8 | u64::from(*byte))
        };
        let files = entries
            .iter()
            .map(|entry| (number(&entry[..8]), number(&entry[8..])));
        Some(Self::of(files.collect()))
    }

    /// Writes it beside `list`.
    pub(crate) fn write_new(&self, list: &Path) -> io::Result<()> {
        local_file::replace(&new_list(list), |file| {
            let mut out = io::BufWriter::new(file);
            out.write_all(MAGIC)?;
            for (path, stamp) in &self.0 {
                out.write_all(&path.to_le_bytes())?;
                out.write_all(&stamp.to_le_bytes())?;
            }
            out.flush()
        })
    }

    /// Removes what an earlier run wrote beside `list`: its snapshot may not be durable.
    pub(crate) fn forget_new(list: &Path) {
        let _ = std::fs::remove_file(new_list(list));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::census::keep_list;

    #[test]
    fn list_counts_only_after_its_snapshot_is_durable() {
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("lists/home.files");
        assert_eq!(FileList::read(&list), None);
        let first = FileList::of(vec![(7, 1), (u64::MAX, 2), (3, 3)]);
        first.write_new(&list).unwrap();
        assert_eq!(FileList::read(&list), None);
        keep_list(&list).unwrap();
        assert_eq!(FileList::read(&list), Some(first.clone()));
        assert_eq!((first.stamp(7), first.stamp(8)), (Some(1), None));
        // Torn, or of another kind.
        let whole = std::fs::read(&list).unwrap();
        for bytes in [&whole[..whole.len() - 1], b"", b"sprat files 2"] {
            std::fs::write(&list, bytes).unwrap();
            assert_eq!(FileList::read(&list), None);
        }
        // A snapshot without a list leaves none that is too old.
        keep_list(&list).unwrap();
        assert!(!list.exists());
        keep_list(&list).unwrap();
    }
}
