//! What an interrupted update had done. Without it an update that takes longer than the connection lasts would never
//! end.
//!
//! From time to time an update makes a part:
//!
//! 1. A clone of the file that is being written, at the top of `work`. Nobody writes to the clone. Its time is a random
//!    one, so no other file is taken for it.
//! 2. `syncfs`: the clone is durable.
//! 3. The hashes so far become durable on this machine, and then a file beside them, which says which clone has the
//!    blocks with these hashes.
//! 4. The clone before is removed.
//!
//! A crash between two steps leaves the part before: its hashes are in another file, or the beginning of this one. The
//! next run goes on with a clone of the clone. It reads all of the source, and writes the blocks whose hashes differ:
//! the source may have changed. Until it has done as much as the part, it makes no other one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use openssl::sha::Sha256;
use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use serde::{Deserialize, Serialize};

use super::index::{BLOCK_BYTES, Draft, Hash, Hashes, Identity, Index, Key, place};
use super::update::{CHUNK_BYTES, Old, Updated};
use crate::local_file;
use crate::long_path::lstat;
use crate::name::SnapshotName;
use crate::reflink;
use crate::text::{escape_path, unescape_path};

/// How much work an interruption can cost.
pub(super) const EVERY: Duration = Duration::from_secs(120);
/// What a piece of the file costs in the clone: no part is made until this much was written for each. Measured: a
/// file of 161,000 pieces costs 52 MB.
const PIECE_COST_BYTES: u64 = 400;
const FORMAT: u32 = 2;
const NOTE: &str = ".part";
const NOTE_BYTES_MAX: u64 = 64 << 10;
/// Of the hashes. The next update does not overwrite those of the part before.
const DRAFTS: [&str; 2] = [".0.draft", ".1.draft"];
/// Of the clone's name at the top of `work`. The next clone has the other one.
const CLONES: [&str; 2] = [".0.part", ".1.part"];

/// The file beside the hashes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    format: u32,
    /// The path in the source, escaped.
    path: String,
    /// The clone.
    file: Identity,
    /// So many blocks have the hashes of the draft.
    blocks: u64,
    /// The SHA-256 of these hashes.
    sha256: [u8; 32],
    /// See [`super::index::End::pieces`].
    pieces: u64,
    key: Key,
    rest: Rest,
    draft: usize,
}

/// Where the other blocks of the clone come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Rest {
    /// From the file that this index describes.
    Of(Identity),
    /// From a file without an index.
    File,
    /// There are none.
    None,
}

/// A part that an interrupted update has left.
#[derive(Debug)]
pub(crate) struct Part {
    /// At the top of `work`.
    pub(super) clone: PathBuf,
    note: Note,
    hashes: Hashes,
}

impl Part {
    pub(super) fn pieces(&self) -> u64 {
        self.note.pieces
    }

    /// What the part knows of its clone, and `index`, the index of the file before.
    pub(super) fn into_known(self, index: Option<Index>) -> Known {
        let Note { rest, key, .. } = self.note;
        let (old, rest) = match (rest, index) {
            (Rest::Of(file), Some(index)) if index.end.file == file && index.key() == key => {
                (Old::Index(Box::new(index)), Rest::Of(file))
            }
            (Rest::None, _) => (Old::New, Rest::None),
            _ => (Old::File, Rest::File),
        };
        Known {
            key,
            old: Old::Part(self.hashes, Box::new(old)),
            rest,
            blocks: self.note.blocks,
            clone: Some(self.clone),
        }
    }
}

/// What is known of the file that an update begins with.
pub(super) struct Known {
    pub(super) key: Key,
    pub(super) old: Old,
    pub(super) rest: Rest,
    /// How many blocks the part has.
    pub(super) blocks: u64,
    /// The clone that the update begins with.
    pub(super) clone: Option<PathBuf>,
}

/// Whether a name at the top of `work` is that of a clone.
pub(super) fn is_clone(name: &Path) -> bool {
    let slot = |end: &&str| name.to_str().and_then(|name| name.strip_suffix(*end));
    let mut slots = CLONES.iter().filter_map(slot);
    slots.any(|slot| SnapshotName::parse(slot).is_ok())
}

/// The draft of the source file `path`.
pub(super) fn draft_path(folder: &Path, path: &Path, draft: usize) -> PathBuf {
    place(folder, path, DRAFTS[draft])
}

/// The parts whose clones are among `names` of the top of `work`, by the path of the source.
pub(super) fn found(work: &Path, names: &[PathBuf], folder: &Path) -> BTreeMap<PathBuf, Part> {
    let clones: Vec<(&PathBuf, Identity)> = names
        .iter()
        .filter(|name| is_clone(name))
        .filter_map(|name| Some((name, Identity::of(&lstat(&work.join(name)).ok()?))))
        .collect();
    let mut parts = BTreeMap::new();
    if clones.is_empty() {
        return parts;
    }
    for note in files(folder, &[NOTE]).iter().filter_map(|path| read(path)) {
        let path = unescape_path(&note.path);
        let clone = clones.iter().find(|(_, file)| *file == note.file);
        let (Some((clone, _)), Some(hashes)) = (clone, hashes_of(folder, &path, &note)) else {
            continue;
        };
        let clone = (*clone).clone();
        parts.insert(
            path,
            Part {
                clone,
                note,
                hashes,
            },
        );
    }
    parts
}

fn hashes_of(folder: &Path, path: &Path, note: &Note) -> Option<Hashes> {
    if note.format != FORMAT || note.draft >= DRAFTS.len() {
        return None;
    }
    let mut file = File::open(draft_path(folder, path, note.draft)).ok()?;
    let bytes = note.blocks.checked_mul(size_of::<Hash>() as u64)?;
    let mut sum = Sha256::new();
    let mut left = (&file).take(bytes);
    let mut buffer = vec![0; 64 << 10];
    loop {
        match left.read(&mut buffer).ok()? {
            0 => break,
            length => sum.update(&buffer[..length]),
        }
    }
    if left.limit() > 0 || sum.finish() != note.sha256 {
        return None;
    }
    file.rewind().ok()?;
    Some(Hashes::new(file, note.blocks))
}

fn read(note: &Path) -> Option<Note> {
    let mut text = Vec::new();
    let file = File::open(note).ok()?;
    file.take(NOTE_BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The draft that no part of the source file `path` needs.
pub(super) fn free_draft(folder: &Path, path: &Path) -> usize {
    let note = read(&place(folder, path, NOTE));
    usize::from(note.is_some_and(|note| note.draft == 0))
}

fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_one = |name: &OsString| {
        let name = name.as_encoded_bytes();
        endings.iter().any(|end| name.ends_with(end.as_bytes()))
    };
    let entries = entries.filter(|entry| is_one(&entry.file_name()));
    entries.map(|entry| entry.path()).collect()
}

/// Removes what belongs to no update any more: the clones at the top of `work`, and what this machine knows of them.
pub(super) fn remove_all(
    top: &OwnedFd,
    names: &[PathBuf],
    folder: Option<&Path>,
) -> io::Result<()> {
    for name in names.iter().filter(|name| is_clone(name)) {
        reflink::keeping_time(top, || Ok(unlinkat(top, name, AtFlags::empty())?))?;
    }
    for path in folder.iter().flat_map(|folder| files(folder, &[NOTE])) {
        // It does no harm.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Removes the drafts that no update has finished.
pub(super) fn remove_drafts(folder: &Path) {
    for path in files(folder, &DRAFTS) {
        let _ = std::fs::remove_file(path);
    }
}

/// Opens a clone.
pub(super) fn open_clone(top: BorrowedFd<'_>, name: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(top, name, flags, Mode::empty())?.into())
}

/// Makes the parts of one update.
pub(super) struct Parts<'a> {
    pub(super) top: &'a OwnedFd,
    pub(super) run: SnapshotName,
    /// The file that is being written.
    pub(super) file: &'a File,
    /// The path in the source.
    pub(super) path: &'a Path,
    /// On this machine.
    pub(super) folder: &'a Path,
    pub(super) rest: Rest,
    pub(super) pieces_before: u64,
    /// The draft of this update.
    pub(super) draft: usize,
    /// So many blocks has the part with which the update began.
    pub(super) blocks: u64,
    /// The newest clone.
    pub(super) clone: Option<PathBuf>,
    /// How much was written when it was made, and when that was.
    pub(super) last: (u64, Instant),
    pub(super) every: Duration,
}

impl Parts<'_> {
    /// Makes a part, if it is time for it.
    pub(super) fn make_if_due(&mut self, done: Updated, draft: Option<&mut Draft>) {
        let (written, at) = self.last;
        let cost = PIECE_COST_BYTES * (self.pieces_before + 2 * done.pieces);
        if at.elapsed() >= self.every && done.written >= written + cost {
            self.make(done, draft);
        }
    }

    /// Makes a part. A failure costs only time.
    pub(super) fn make(&mut self, done: Updated, draft: Option<&mut Draft>) {
        let Some(draft) = draft else { return };
        let blocks = done.bytes / BLOCK_BYTES as u64;
        let is_whole = done.bytes.is_multiple_of(CHUNK_BYTES as u64);
        if done.written == self.last.0 || !is_whole || blocks < self.blocks {
            return;
        }
        match self.try_to_make(done, blocks, draft) {
            Ok(()) => self.last = (done.written, Instant::now()),
            Err(error) => {
                tracing::debug!(%error, "an interruption would cost more of a large file");
            }
        }
    }

    fn try_to_make(&mut self, done: Updated, blocks: u64, draft: &mut Draft) -> io::Result<()> {
        // Zeros at its end are not written.
        if self.file.metadata()?.len() < done.bytes {
            self.file.set_len(done.bytes)?;
        }
        let of = |ending: &str| PathBuf::from(format!("{}{ending}", self.run));
        let [one, other] = CLONES.map(of);
        let name = if self.clone.as_ref() == Some(&one) {
            other
        } else {
            one
        };
        let file = reflink::keeping_time(self.top, || {
            let _ = unlinkat(self.top, &name, AtFlags::empty());
            reflink::file(self.file, self.top.as_fd(), &name)
        });
        file?;
        let clone = open_clone(self.top.as_fd(), &name)?;
        let mut random = [0; 4];
        openssl::rand::rand_bytes(&mut random).map_err(io::Error::other)?;
        let nanosecond = i64::from(u32::from_le_bytes(random) % 1_000_000_000);
        reflink::set_time(clone.as_fd(), 0, nanosecond)?;
        // Opened before the first write, so it reports each that failed.
        rustix::fs::syncfs(self.top)?;
        draft.save()?;
        let note = Note {
            format: FORMAT,
            path: escape_path(self.path),
            file: Identity::of(&clone.metadata()?),
            blocks,
            sha256: draft.sum(),
            pieces: self.pieces_before + 2 * done.pieces,
            key: draft.key(),
            rest: self.rest.clone(),
            draft: self.draft,
        };
        let text = serde_json::to_vec(&note)?;
        let place = place(self.folder, self.path, NOTE);
        local_file::replace(&place, |file| io::Write::write_all(file, &text))?;
        if let Some(before) = self.clone.replace(name) {
            reflink::keeping_time(self.top, || {
                Ok(unlinkat(self.top, &before, AtFlags::empty())?)
            })?;
        }
        Ok(())
    }
}
