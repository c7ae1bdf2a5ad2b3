//! What this host records about a copy under way: which pieces are durable, and which are verified.
//!
//! 8 bytes `sprtcpy1`, the length of the head (4 bytes), the head (JSON: the identity, and the
//! token that ties the note to one file), then entries of 56 bytes, little endian. The size is
//! fixed, so that a torn tail is found by its length or its checksum:
//!
//! | bytes | |
//! | --- | --- |
//! | 0..4 | CRC-32 of bytes 4..56 |
//! | 4..8 | kind: 1 durable at the destination, 2 read back, 3 to be copied again, 4 stage |
//! | 8..16 | number of the piece; for a stage its number |
//! | 16..24 | kind 1: the parts of 64 KiB that are not zero, a bit each |
//! | 24..56 | kind 1: SHA-256 of the piece as read from the source |
//!
//! An entry is written after it has become true. If it is lost, only that piece is done twice.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::piece::PIECE_BYTES;
use super::{COPY_BYTES_MAX, CopyError};
use crate::checksum::crc32;

const MAGIC: &[u8; 8] = b"sprtcpy1";
const ENTRY_BYTES: usize = 56;
/// Two targets, a UUID and some numbers; a longer one was not written by us.
const IDENTITY_BYTES_MAX: u32 = 64 << 10;
/// Random, as hexadecimal digits: no two notes have the same.
const TOKEN_DIGITS: usize = 16;
/// How many of the first pieces are kept in memory: the header and the start of the volume, which
/// is at 16 MiB.
const BEGINNING_PIECES: u64 = 5;

/// What is copied where. Another identity is another copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyIdentity {
    /// The source as a target.
    pub source: String,
    /// The destination as a target.
    pub destination: String,
    /// The container's UUID.
    pub uuid: String,
    /// The source's length in bytes.
    pub source_bytes: u64,
    /// When the source was last changed, by its server's clock, in seconds since the epoch.
    pub source_modified_s: Option<u64>,
    /// A digest of the header that the destination gets instead of the source's, if it is encrypted
    /// with another key: two copies with different keys have no piece in common.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_header: Option<String>,
}

/// The stage of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CopyStage {
    /// Pieces are copied and read back.
    Copying,
    /// Everything is durable and was read back; the destination may have its name by now.
    Verified,
    /// The destination has its name, durably.
    Published,
    /// Of a move: the source may be removed by now.
    Removing,
}

/// The start of a note.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Head {
    identity: CopyIdentity,
    token: String,
}

/// One piece that is durable at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub index: u64,
    /// The parts that are not zero, a bit each.
    pub parts: u64,
    pub digest: [u8; 32],
}

/// A set of pieces, a bit each.
#[derive(Debug, Clone, Default)]
pub(super) struct Bits(Vec<u64>);

/// The note of one copy. Only the process that has the destination's write journal uses it.
#[derive(Debug)]
pub struct CopyNote {
    path: PathBuf,
    file: File,
    head: Head,
    entries_at: u64,
    copied: Bits,
    verified: Bits,
    /// Copied again: an earlier entry of the same piece doesn't count.
    again: HashMap<u64, Option<Piece>>,
    beginning: BTreeMap<u64, Piece>,
    stage: CopyStage,
}

impl CopyNote {
    /// Reads the note at `path`; `None` if there is none, or none that can be used.
    pub fn open(path: &Path) -> Result<Option<Self>, CopyError> {
        let failed = |op| move |source| failed(op, path, source);
        let mut file = match File::options().read(true).append(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open")(error)),
        };
        let Some((head, entries_at)) = read_head(&mut file).map_err(failed("read"))? else {
            return Ok(None);
        };
        let mut note = Self::new(path, file, head, entries_at);
        let whole = note.replay().map_err(failed("read"))?;
        // A torn entry would hide what is appended after it.
        note.file.set_len(whole).map_err(failed("cut"))?;
        Ok(Some(note))
    }

    /// Creates a note with a new token, replacing an existing one.
    pub fn begin(path: &Path, identity: CopyIdentity) -> Result<Self, CopyError> {
        let fresh = path.with_extension("new");
        let write = || -> io::Result<(File, Head, u64)> {
            let token = new_token()?;
            let head = Head { identity, token };
            let folder = path.parent().unwrap_or(Path::new("."));
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)?;
            match std::fs::remove_file(&fresh) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = File::options()
                .read(true)
                .append(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh)?;
            let text = serde_json::to_vec(&head)?;
            let len = u32::try_from(text.len()).map_err(io::Error::other)?;
            let bytes = [&MAGIC[..], &len.to_le_bytes()[..], &text[..]].concat();
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&fresh, path)?;
            File::open(folder)?.sync_all()?;
            Ok((file, head, bytes.len() as u64))
        };
        let (file, head, entries_at) = write().map_err(|source| failed("begin", path, source))?;
        Ok(Self::new(path, file, head, entries_at))
    }

    fn new(path: &Path, file: File, head: Head, entries_at: u64) -> Self {
        Self {
            path: path.to_owned(),
            file,
            head,
            entries_at,
            copied: Bits::default(),
            verified: Bits::default(),
            again: HashMap::new(),
            beginning: BTreeMap::new(),
            stage: CopyStage::Copying,
        }
    }

    /// What is copied where.
    #[must_use]
    pub fn identity(&self) -> &CopyIdentity {
        &self.head.identity
    }

    /// Digits that only this note has. Use them in the name of the file that is written to: the
    /// note is true of no other file.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.head.token
    }

    /// Whether `text` has the form of a [`token`](Self::token).
    #[must_use]
    pub fn is_token(text: &str) -> bool {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        text.len() == TOKEN_DIGITS && text.bytes().all(digit)
    }

    /// The stage of the copy.
    #[must_use]
    pub fn stage(&self) -> CopyStage {
        self.stage
    }

    /// Bytes of the pieces that need not be copied any more.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.copied.count() * PIECE_BYTES
    }

    /// Records a stage, durably.
    pub fn mark(&mut self, stage: CopyStage) -> Result<(), CopyError> {
        self.append(&encode(4, stage as u64, 0, &[0; 32]))?;
        self.stage = stage;
        let synced = self.file.sync_all();
        synced.map_err(|source| failed("sync", &self.path, source))
    }

    /// Removes the note: the copy has ended.
    pub fn remove(self) -> Result<(), CopyError> {
        let removed = std::fs::remove_file(&self.path);
        removed.map_err(|source| failed("remove", &self.path, source))
    }

    /// The first pieces, if they are recorded.
    pub(super) fn beginning(&self) -> impl Iterator<Item = Piece> + '_ {
        self.beginning.values().copied()
    }

    pub(super) fn copied(&self) -> &Bits {
        &self.copied
    }

    /// Records pieces as durable at the destination.
    pub(super) fn add(&mut self, pieces: &[Piece]) -> Result<(), CopyError> {
        let entries: Vec<u8> = pieces
            .iter()
            .flat_map(|piece| encode(1, piece.index, piece.parts, &piece.digest))
            .collect();
        self.append(&entries)?;
        pieces.iter().for_each(|piece| self.apply_piece(*piece));
        Ok(())
    }

    /// Records pieces as read back.
    pub(super) fn verified(&mut self, pieces: &[u64]) -> Result<(), CopyError> {
        let entries: Vec<u8> = pieces
            .iter()
            .flat_map(|index| encode(2, *index, 0, &[0; 32]))
            .collect();
        self.append(&entries)?;
        pieces
            .iter()
            .for_each(|index| self.verified.set(*index, true));
        Ok(())
    }

    /// Records that nothing counts as read back any more.
    pub(super) fn forget_verified(&mut self) {
        self.verified = Bits::default();
    }

    /// Records that pieces are not at the destination after all.
    pub(super) fn void(&mut self, pieces: &[u64]) -> Result<(), CopyError> {
        let entries: Vec<u8> = pieces
            .iter()
            .flat_map(|index| encode(3, *index, 0, &[0; 32]))
            .collect();
        self.append(&entries)?;
        pieces.iter().for_each(|index| self.apply_void(*index));
        Ok(())
    }

    /// The pieces that are not zero and were not read back yet, in the order of the note.
    pub(super) fn unverified(&self) -> Result<Pieces, CopyError> {
        let failed = |source| failed("read", &self.path, source);
        let mut file = File::open(&self.path).map_err(failed)?;
        let end = file.metadata().map_err(failed)?.len();
        file.seek(SeekFrom::Start(self.entries_at))
            .map_err(failed)?;
        Ok(Pieces {
            path: self.path.clone(),
            entries: BufReader::with_capacity(1 << 20, file.take(end - self.entries_at)),
            passed_over: self.verified.clone(),
            again: self.again.clone(),
        })
    }

    /// Reads every complete entry and returns where they end.
    fn replay(&mut self) -> io::Result<u64> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.entries_at))?;
        let mut entries = BufReader::with_capacity(1 << 20, file);
        let mut end = self.entries_at;
        let mut entry = [0; ENTRY_BYTES];
        while read_entry(&mut entries, &mut entry)? {
            let Some((kind, piece)) = parse(&entry) else {
                break;
            };
            let in_range = piece.index <= COPY_BYTES_MAX / PIECE_BYTES;
            match (kind, piece.index) {
                (1, _) if in_range => self.apply_piece(piece),
                (2, index) if in_range => self.verified.set(index, true),
                (3, index) if in_range => self.apply_void(index),
                (4, 1) => self.stage = CopyStage::Verified,
                (4, 2) => self.stage = CopyStage::Published,
                (4, 3) => self.stage = CopyStage::Removing,
                _ => break,
            }
            end += ENTRY_BYTES as u64;
        }
        Ok(end)
    }

    fn apply_piece(&mut self, piece: Piece) {
        self.copied.set(piece.index, true);
        if let Some(again) = self.again.get_mut(&piece.index) {
            *again = Some(piece);
        }
        if piece.index < BEGINNING_PIECES {
            self.beginning.insert(piece.index, piece);
        }
    }

    fn apply_void(&mut self, index: u64) {
        self.copied.set(index, false);
        self.verified.set(index, false);
        self.again.insert(index, None);
    }

    fn append(&mut self, entries: &[u8]) -> Result<(), CopyError> {
        let written = self.file.write_all(entries);
        written.map_err(|source| failed("append to", &self.path, source))
    }
}

/// Reads pieces from a note.
#[derive(Debug)]
pub(super) struct Pieces {
    path: PathBuf,
    entries: BufReader<io::Take<File>>,
    passed_over: Bits,
    again: HashMap<u64, Option<Piece>>,
}

impl Iterator for Pieces {
    type Item = Result<Piece, CopyError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut entry = [0; ENTRY_BYTES];
        loop {
            match read_entry(&mut self.entries, &mut entry) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(source) => return Some(Err(failed("read", &self.path, source))),
            }
            let Some((1, mut piece)) = parse(&entry) else {
                continue;
            };
            if let Some(again) = self.again.get(&piece.index) {
                match again {
                    Some(newer) => piece = *newer,
                    None => continue,
                }
            }
            if piece.parts != 0 && !self.passed_over.contains(piece.index) {
                self.passed_over.set(piece.index, true);
                return Some(Ok(piece));
            }
        }
    }
}

impl Bits {
    pub(super) fn contains(&self, index: u64) -> bool {
        let word = usize::try_from(index / 64).ok();
        word.and_then(|word| self.0.get(word))
            .is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    fn set(&mut self, index: u64, value: bool) {
        let Ok(word) = usize::try_from(index / 64) else {
            return;
        };
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let bit = 1 << (index % 64);
        if value {
            self.0[word] |= bit;
        } else {
            self.0[word] &= !bit;
        }
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

fn new_token() -> io::Result<String> {
    let mut random = [0; TOKEN_DIGITS / 2];
    openssl::rand::rand_bytes(&mut random).map_err(io::Error::other)?;
    Ok(format!("{:016x}", u64::from_le_bytes(random)))
}

/// Returns the head, and where the entries start; `None` if the file is not a note.
fn read_head(file: &mut File) -> io::Result<Option<(Head, u64)>> {
    let mut head = [0; 12];
    match file.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    if !head.starts_with(MAGIC) || len > IDENTITY_BYTES_MAX {
        return Ok(None);
    }
    let mut text = vec![0; len as usize];
    match file.read_exact(&mut text) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let head: Option<Head> = serde_json::from_slice(&text).ok();
    let head = head.filter(|head| CopyNote::is_token(&head.token));
    Ok(head.map(|head| (head, 12 + u64::from(len))))
}

/// False at the end, or at a torn entry.
fn read_entry(from: &mut impl Read, entry: &mut [u8; ENTRY_BYTES]) -> io::Result<bool> {
    match from.read_exact(entry) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn encode(kind: u32, index: u64, parts: u64, digest: &[u8; 32]) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[4..8].copy_from_slice(&kind.to_le_bytes());
    entry[8..16].copy_from_slice(&index.to_le_bytes());
    entry[16..24].copy_from_slice(&parts.to_le_bytes());
    entry[24..].copy_from_slice(digest);
    let checksum = crc32(&entry[4..]);
    entry[..4].copy_from_slice(&checksum.to_le_bytes());
    entry
}

fn parse(entry: &[u8; ENTRY_BYTES]) -> Option<(u32, Piece)> {
    let checksum = u32::from_le_bytes(*entry.first_chunk()?);
    if checksum != crc32(&entry[4..]) {
        return None;
    }
    let number = |at: usize| Some(u64::from_le_bytes(*entry.get(at..)?.first_chunk()?));
    let kind = u32::from_le_bytes(*entry.get(4..)?.first_chunk()?);
    let piece = Piece {
        index: number(8)?,
        parts: number(16)?,
        digest: *entry.get(24..)?.first_chunk()?,
    };
    Some((kind, piece))
}

fn failed(op: &'static str, path: &Path, source: io::Error) -> CopyError {
    CopyError::Note {
        op,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> CopyIdentity {
        CopyIdentity {
            source: "/a/x.luks".to_owned(),
            destination: "host:x.luks".to_owned(),
            uuid: "u".to_owned(),
            source_bytes: 100 << 20,
            source_modified_s: Some(7),
            new_header: None,
        }
    }

    fn piece(index: u64, parts: u64, byte: u8) -> Piece {
        Piece {
            index,
            parts,
            digest: [byte; 32],
        }
    }

    fn unverified(note: &CopyNote) -> Vec<Piece> {
        note.unverified().unwrap().map(Result::unwrap).collect()
    }

    #[test]
    fn note_is_read_as_written_and_a_torn_tail_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copies/x.note");
        assert!(CopyNote::open(&path).unwrap().is_none());
        let mut note = CopyNote::begin(&path, identity()).unwrap();
        note.add(&[piece(0, 1, 1), piece(7, 0, 2), piece(9, 3, 3)])
            .unwrap();
        note.verified(&[0]).unwrap();
        note.mark(CopyStage::Verified).unwrap();
        let token = note.token().to_owned();
        drop(note);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..ENTRY_BYTES {
            std::fs::write(&path, [&whole[..], &[9; ENTRY_BYTES][..cut]].concat()).unwrap();
            let note = CopyNote::open(&path).unwrap().unwrap();
            assert_eq!(note.identity(), &identity());
            assert_eq!(note.token(), token);
            assert_eq!(note.stage(), CopyStage::Verified);
            assert_eq!(note.copied.count(), 3);
            assert_eq!(unverified(&note), [piece(9, 3, 3)]);
            assert_eq!(note.beginning().collect::<Vec<_>>(), [piece(0, 1, 1)]);
        }
        let mut note = CopyNote::open(&path).unwrap().unwrap();
        note.void(&[9]).unwrap();
        assert!(!note.copied().contains(9) && unverified(&note).is_empty());
        note.add(&[piece(9, 3, 4)]).unwrap();
        let note = CopyNote::open(&path).unwrap().unwrap();
        assert_eq!(unverified(&note), [piece(9, 3, 4)]);
    }

    #[test]
    fn every_note_has_a_token_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.note");
        let token = || {
            let note = CopyNote::begin(&path, identity()).unwrap();
            note.token().to_owned()
        };
        let (first, second) = (token(), token());
        assert!(CopyNote::is_token(&first) && CopyNote::is_token(&second));
        assert_ne!(first, second);
    }

    #[test]
    fn file_that_is_not_a_note_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.note");
        let with_head = |text: String| {
            let len = u32::try_from(text.len()).unwrap().to_le_bytes();
            [&MAGIC[..], &len[..], text.as_bytes()].concat()
        };
        let identity = serde_json::to_string(&identity()).unwrap();
        let without_token = with_head(identity.clone());
        let with_a_path = with_head(format!(
            r#"{{"identity": {identity}, "token": "../0123456789abc"}}"#
        ));
        for content in [
            &b""[..],
            b"sprtcpy1",
            b"sprtcpy1\xff\xff\xff\xff",
            b"sprtcpy1\x02\0\0\0{}",
            &without_token,
            &with_a_path,
        ] {
            std::fs::write(&path, content).unwrap();
            assert!(CopyNote::open(&path).unwrap().is_none());
        }
    }
}
