//! The checksums that this host keeps of the files in a volume, from one check to the next.
//!
//! 8 bytes `sprtchk1`, the number of the present check (4 bytes), then entries of 20 bytes, all
//! little endian, then a checksum of all before (8 bytes):
//!
//! | bytes | |
//! | --- | --- |
//! | 0..8 | which file: a hash of inode, time of birth, size and modification time |
//! | 8..16 | its content: the first 8 bytes of its SHA-256 |
//! | 16..20 | the check that read it last |
//!
//! Names and contents can't be got back out of it. One that is damaged is begun anew.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

use openssl::sha::{Sha256, sha256};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"sprtchk1";
const HEAD_BYTES: usize = 12;
const ENTRY_BYTES: usize = 20;
/// ext4 has no more inodes than 2^32; a volume with a hundred million files has 2 GB of them.
const FILE_BYTES_MAX: u64 = 4 << 30;

/// Which file, whatever its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Key(u64);

/// A checksum of a file's content.
pub(super) struct Hash(Sha256);

/// What a checksum says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    New,
    Same,
    Differs,
}

/// All that is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The present check; its runs share the number.
    check: u32,
    files: HashMap<Key, (u64, u32)>,
}

impl Key {
    /// An inode that was given to another file has another time of birth.
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
}

impl Hash {
    pub(super) fn new() -> Self {
        Self(Sha256::new())
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn finish(self) -> u64 {
        first_eight(&self.0.finish())
    }
}

impl Known {
    /// Reads what an earlier check left; nothing is known where nothing lies, or nothing usable.
    pub(super) fn load(path: &Path) -> io::Result<Self> {
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

    /// Whether the present check has read it.
    pub(super) fn was_read(&self, key: Key) -> bool {
        matches!(self.files.get(&key), Some((_, check)) if *check == self.check)
    }

    /// Notes a content. What was known of it first stays: damage doesn't become the truth.
    pub(super) fn put(&mut self, key: Key, digest: u64) -> Verdict {
        match self.files.get_mut(&key) {
            None => {
                self.files.insert(key, (digest, self.check));
                Verdict::New
            }
            // As if the last check had read it: this check's next run tells it again, and no later
            // check takes the damaged content for a new file's.
            Some((known, check)) if *known != digest => {
                *check = self.check.wrapping_sub(1);
                Verdict::Differs
            }
            Some((_, check)) => {
                *check = self.check;
                Verdict::Same
            }
        }
    }

    /// A file is there and can't be read: what was known of it stays known.
    pub(super) fn keep(&mut self, key: Key) {
        if let Some((_, check)) = self.files.get_mut(&key) {
            *check = self.check.wrapping_sub(1);
        }
    }

    /// Writes it, whole or not at all. After a finished check the next one begins anew, and files
    /// that were not met any more are forgotten.
    pub(super) fn save(&mut self, path: &Path, finished: bool) -> io::Result<()> {
        let mut content = MAGIC.to_vec();
        let next = if finished {
            self.check.wrapping_add(1)
        } else {
            self.check
        };
        content.extend(next.to_le_bytes());
        for (key, (digest, check)) in &self.files {
            // Met neither by this check nor by the last one. What was met and could not be read, or
            // differed, counts as read by the last one.
            let old = self.check.wrapping_sub(*check) > 1;
            if !(finished && old) {
                content.extend(key.0.to_le_bytes());
                content.extend(digest.to_le_bytes());
                content.extend(check.to_le_bytes());
            }
        }
        content.extend(first_eight(&sha256(&content)).to_le_bytes());
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let fresh = path.with_extension("new");
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&content)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        File::open(folder)?.sync_all()
    }
}

/// Has a container's checks begin with what those of a copy of it know, in a file of its own.
/// Nothing counts as read by the check that begins.
pub fn begin_known_from(copy: &Path, own: &Path) -> io::Result<()> {
    // As after that check's end, so that another one begins.
    Known::load(copy)?.save(own, true)
}

fn first_eight(hash: &[u8; 32]) -> u64 {
    hash.first_chunk().copied().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_known_until_the_check_is_over_and_its_checksum_after_that() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checks/x.sums");
        let mut known = Known::load(&path).unwrap();
        assert_eq!(known.put(Key(1), 10), Verdict::New);
        known.save(&path, false).unwrap();
        let mut known = Known::load(&path).unwrap();
        assert!(known.was_read(Key(1)) && !known.was_read(Key(2)));
        assert_eq!(known.put(Key(2), 20), Verdict::New);
        known.save(&path, true).unwrap();
        let mut known = Known::load(&path).unwrap();
        assert!(!known.was_read(Key(1)));
        assert_eq!(known.put(Key(1), 10), Verdict::Same);
        assert_eq!(known.put(Key(2), 21), Verdict::Differs);
        known.save(&path, true).unwrap();
        std::fs::write(&path, b"sprtchk1 torn").unwrap();
        assert_eq!(Known::load(&path).unwrap().put(Key(1), 11), Verdict::New);
    }

    #[test]
    fn damage_is_damage_at_every_later_check() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sums");
        let mut known = Known::load(&path).unwrap();
        known.put(Key(1), 10);
        known.put(Key(2), 20);
        known.save(&path, true).unwrap();
        for round in 0..5 {
            let mut known = Known::load(&path).unwrap();
            assert_eq!(known.put(Key(1), 11), Verdict::Differs, "check {round}");
            assert!(!known.was_read(Key(1)), "its next run tells it again");
            // One that can't be read is there all the same.
            known.keep(Key(2));
            known.save(&path, true).unwrap();
        }
        let mut known = Known::load(&path).unwrap();
        assert_eq!(known.put(Key(1), 10), Verdict::Same);
        assert_eq!(known.put(Key(2), 21), Verdict::Differs);
    }

    #[test]
    fn a_file_that_two_checks_did_not_meet_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sums");
        let mut known = Known::load(&path).unwrap();
        known.put(Key(1), 10);
        for _ in 0..3 {
            known.save(&path, true).unwrap();
            known = Known::load(&path).unwrap();
        }
        assert_eq!(known.put(Key(1), 11), Verdict::New);
    }
}
