//! The checksums of a volume's files, which this machine keeps from one check to the next.
//!
//! The file has 8 bytes `sprtchk1`, the number of the present check (4 bytes), entries of 20 bytes, and a
//! checksum of all that (8 bytes). Numbers are little endian. An entry:
//!
//! | bytes | |
//! | --- | --- |
//! | 0..8 | which file: a hash of inode, time of birth, size and modification time |
//! | 8..16 | its content: the first 8 bytes of its SHA-256 |
//! | 16..20 | the check that read it last |
//!
//! Names and content can't be reconstructed from it. A damaged file is replaced by an empty one.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use openssl::sha::sha256;
use serde::{Deserialize, Serialize};

use crate::local_file;

const MAGIC: &[u8; 8] = b"sprtchk1";
const HEAD_BYTES: usize = 12;
const ENTRY_BYTES: usize = 20;
/// The largest file that is read. ext4 has at most 2^32 inodes; a hundred million entries take 2 GB.
const FILE_BYTES_MAX: u64 = 4 << 30;

/// Identifies a file, whatever its names: also among the snapshots of a btrfs, where the inode numbers of
/// one are those of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Key(u64);

/// How a checksum compares with the known one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChecksumMatch {
    New,
    Same,
    Differs,
}

/// All known checksums.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// The number of the present check. All runs of one check have the same.
    check: u32,
    files: HashMap<Key, (u64, u32)>,
}

impl Key {
    /// If an inode is used for another file, the time of birth changes.
    pub(crate) fn of(stat: &Metadata) -> Self {
        let born = stat.created().ok();
        let born = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        let mut text = Vec::with_capacity(48);
        text.extend(stat.ino().to_le_bytes());
        text.extend(born.unwrap_or_default().as_nanos().to_le_bytes());
        text.extend(stat.len().to_le_bytes());
        text.extend(stat.mtime().to_le_bytes());
        text.extend(stat.mtime_nsec().to_le_bytes());
        Self(first_eight(&sha256(&text)))
    }

    /// Reads what [`key_text`] writes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        u64::from_str_radix(text, 16).ok().map(Self)
    }
}

/// serde: a [`Key`] as 16 hexadecimal digits. Many readers of JSON can't read a number as large as that.
pub(crate) mod key_text {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Key;

    pub(crate) fn serialize<S: Serializer>(key: &Key, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{:016x}", key.0))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Key, D::Error> {
        let text = String::deserialize(from)?;
        Key::parse(&text).ok_or_else(|| serde::de::Error::custom("no key of a file"))
    }
}

impl Known {
    /// Reads the checksums of earlier checks. A missing or damaged file counts as empty.
    pub(crate) fn load(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(file) => file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        Ok(Self::parse(&bytes).unwrap_or_default())
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (content, sum) = bytes.split_last_chunk::<8>()?;
        if u64::from_le_bytes(*sum) != first_eight(&sha256(content)) {
            return None;
        }
        let entries = content
            .strip_prefix(MAGIC)?
            .get(HEAD_BYTES - MAGIC.len()..)?;
        let mut files = HashMap::with_capacity(entries.len() / ENTRY_BYTES);
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let number = |at: usize| Some(u64::from_le_bytes(*entry.get(at..)?.first_chunk()?));
            let check = u32::from_le_bytes(*entry.get(16..)?.first_chunk()?);
            files.insert(Key(number(0)?), (number(8)?, check));
        }
        Some(Self {
            check: u32::from_le_bytes(*content.get(MAGIC.len()..)?.first_chunk()?),
            files,
        })
    }

    /// The checksum of the file's content, if an earlier check read it.
    pub(crate) fn checksum(&self, key: Key) -> Option<u64> {
        self.files.get(&key).map(|(digest, _)| *digest)
    }

    /// Whether the present check has read the file.
    pub(super) fn was_read(&self, key: Key) -> bool {
        matches!(self.files.get(&key), Some((_, check)) if *check == self.check)
    }

    /// Compares a checksum with the known one. The first one known stays, so that damaged content never
    /// becomes the reference.
    pub(super) fn put(&mut self, key: Key, digest: u64) -> ChecksumMatch {
        match self.files.get_mut(&key) {
            None => {
                self.files.insert(key, (digest, self.check));
                ChecksumMatch::New
            }
            // Marked as read by the last check. So the next run of this check reports it again, and no
            // later check takes the damaged content for that of a new file.
            Some((known, check)) if *known != digest => {
                *check = self.check.wrapping_sub(1);
                ChecksumMatch::Differs
            }
            Some((_, check)) => {
                *check = self.check;
                ChecksumMatch::Same
            }
        }
    }

    /// This checksum is proved to be right, whatever was known.
    pub(super) fn correct(&mut self, key: Key, digest: u64) {
        self.files.insert(key, (digest, self.check));
    }

    /// The file exists and can't be read, or is damaged. Its known checksum stays.
    pub(super) fn keep(&mut self, key: Key) {
        if let Some((_, check)) = self.files.get_mut(&key) {
            *check = self.check.wrapping_sub(1);
        }
    }

    /// Writes the file. If the check is finished, the next one begins, and files that no longer exist
    /// are dropped.
    pub(super) fn save(&mut self, path: &Path, finished: bool) -> io::Result<()> {
        let mut content = MAGIC.to_vec();
        let next = if finished {
            self.check.wrapping_add(1)
        } else {
            self.check
        };
        content.extend(next.to_le_bytes());
        for (key, (digest, check)) in &self.files {
            // Found neither by this check nor by the last one. A file that was found and could not be
            // read, or differed, counts as read by the last one.
            let old = self.check.wrapping_sub(*check) > 1;
            if !(finished && old) {
                content.extend(key.0.to_le_bytes());
                content.extend(digest.to_le_bytes());
                content.extend(check.to_le_bytes());
            }
        }
        content.extend(first_eight(&sha256(&content)).to_le_bytes());
        local_file::replace(path, |file| file.write_all(&content))
    }
}

/// Copies the checksums of a container's copy for the container itself. The check that begins counts
/// nothing as read.
pub fn begin_known_from(copy: &Path, own: &Path) -> io::Result<()> {
    // As at the end of that check, so that a new one begins.
    Known::load(copy)?.save(own, true)
}

fn first_eight(hash: &[u8; 32]) -> u64 {
    hash.first_chunk().copied().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_files_are_known_during_a_check_and_their_checksums_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checks/x.sums");
        let mut known = Known::load(&path).unwrap();
        assert_eq!(known.put(Key(1), 10), ChecksumMatch::New);
        known.save(&path, false).unwrap();
        let mut known = Known::load(&path).unwrap();
        assert!(known.was_read(Key(1)) && !known.was_read(Key(2)));
        assert_eq!(known.put(Key(2), 20), ChecksumMatch::New);
        known.save(&path, true).unwrap();
        let mut known = Known::load(&path).unwrap();
        assert!(!known.was_read(Key(1)));
        assert_eq!(known.put(Key(1), 10), ChecksumMatch::Same);
        assert_eq!(known.put(Key(2), 21), ChecksumMatch::Differs);
        known.save(&path, true).unwrap();
        std::fs::write(&path, b"sprtchk1 torn").unwrap();
        assert_eq!(
            Known::load(&path).unwrap().put(Key(1), 11),
            ChecksumMatch::New
        );
    }

    #[test]
    fn damage_is_reported_by_every_later_check() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sums");
        let mut known = Known::load(&path).unwrap();
        known.put(Key(1), 10);
        known.put(Key(2), 20);
        known.save(&path, true).unwrap();
        for round in 0..5 {
            let mut known = Known::load(&path).unwrap();
            assert_eq!(
                known.put(Key(1), 11),
                ChecksumMatch::Differs,
                "check {round}"
            );
            assert!(!known.was_read(Key(1)), "its next run reports it again");
            // A file that can't be read still exists.
            known.keep(Key(2));
            known.save(&path, true).unwrap();
        }
        let mut known = Known::load(&path).unwrap();
        assert_eq!(known.put(Key(1), 10), ChecksumMatch::Same);
        assert_eq!(known.put(Key(2), 21), ChecksumMatch::Differs);
    }

    #[test]
    fn a_file_that_two_checks_did_not_find_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sums");
        let mut known = Known::load(&path).unwrap();
        known.put(Key(1), 10);
        for _ in 0..3 {
            known.save(&path, true).unwrap();
            known = Known::load(&path).unwrap();
        }
        assert_eq!(known.put(Key(1), 11), ChecksumMatch::New);
    }
}
