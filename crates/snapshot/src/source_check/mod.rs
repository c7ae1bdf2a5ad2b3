//! Reads some unchanged files of a job's sources again, and compares them with the digests in the lists of changes.
//!
//! A backup copies a file if its size or its time is another one. Content that changes while both stay is not
//! copied: bit rot, or damage by a disk, a cable or memory. Each slice reads a part of the files, so that all of
//! them are read in turn. It reads the sources and this machine's copies of the lists, and nothing else.
//!
//! Always true:
//! - A file counts as changed silently only if its status change time (ctime) is older than the run that read it.
//!   No program can set that time: so nobody has written to the file since, and nobody has set its times.
//! - Nor if it was found so only once: the caller names it in the next slice, and it must have the same content.

mod choice;
mod read;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::change_list::{ListedFile, listed_files};
use crate::content::PIECE_BYTES;
use crate::error::SnapshotError;
use crate::mounts;
use crate::name::SnapshotName;
use crate::name_list::NameList;
use crate::old_content::OldContent;
use crate::text::{escape_path, unescape_path};
use choice::Choice;
use read::{Judged, Reader};

/// What a slice reads.
#[derive(Debug, Clone)]
pub struct SourceCheckSpec {
    /// This machine's copies of the lists of changes of the job.
    pub lists: PathBuf,
    /// The newest snapshot of the job in that container.
    pub snapshot: SnapshotName,
    /// The job's sources on this machine.
    pub sources: Vec<PathBuf>,
    /// Where the last slice ended.
    pub from: SourceCursor,
    /// The files are divided into so many parts.
    pub parts: u32,
    /// So many of the parts are read.
    pub parts_now: u32,
    /// After so many bytes no further file is read.
    pub bytes_max: u64,
    /// After this time nothing more is read.
    pub duration_max: Duration,
    /// How long a file must have been unchanged before the run that read it. Pages that a program has mapped
    /// and changed get their file a new time only when they are written to the disk and changed again.
    pub unchanged_for: Duration,
    /// Files that earlier slices found changed are read first.
    pub again: Vec<FoundChange>,
}

/// Where the next slice begins.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCursor {
    /// The number of the part.
    pub part: u32,
    /// The file in it, escaped; `None`: the first one.
    pub file: Option<String>,
    /// The piece of this file; `None`: the next file.
    pub piece: Option<u64>,
}

/// A file whose content is not what was backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundChange {
    /// The file as the snapshot has it.
    pub old: OldContent,
    /// The piece of a large file.
    pub piece: Option<u64>,
    /// Stands for what was read: the same content has the same text.
    pub found: String,
}

impl FoundChange {
    /// Whether both are the same change of one file.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let which = |one: &Self| (one.old.path.clone(), one.piece, one.found.clone());
        which(self) == which(other)
    }
}

/// What a slice found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceCheckReport {
    /// Where the next one begins.
    pub next: SourceCursor,
    /// Files that were read. A large file counts in each slice that reads a piece of it.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// All files of [`SourceCheckSpec::again`] were read, as far as they are still there.
    pub read_again: bool,
    /// Files that nobody has written to, and whose content is not what was backed up or can't be read.
    pub silent: Vec<FoundChange>,
    /// Of [`SourceCheckSpec::again`], by path: what was found to be right now.
    pub right_again: BTreeSet<String>,
    /// Of [`SourceCheckSpec::again`], by path: what has the content that an earlier slice found, and so has the
    /// backup. Its container got the file after the change, so nothing follows.
    pub backed_up_so: BTreeSet<String>,
    /// Files that somebody has written to since they were backed up, and then set back their time.
    pub rewritten: NameList,
}

/// Reads a slice.
///
/// # Errors
/// The lists can't be read.
pub fn check_sources(
    spec: &SourceCheckSpec,
    cancel: &Cancel,
) -> Result<SourceCheckReport, SnapshotError> {
    let mut choice = Choice::new(spec);
    listed_files(&spec.lists, spec.snapshot, &mut |file| choice.meet(file)).map_err(unusable)?;
    let mounts = mounts::mounts().map_err(|source| SnapshotError::System {
        op: "read the table of mounts",
        source,
    })?;
    let begun = Instant::now();
    let is_over = || cancel.is_cancelled() || begun.elapsed() >= spec.duration_max;
    let mut slice = Slice {
        spec,
        reader: Reader::new(&mounts, spec.unchanged_for),
        report: SourceCheckReport {
            next: spec.from.clone(),
            ..SourceCheckReport::default()
        },
        is_over: &is_over,
    };
    slice.report.read_again = slice.read_again(&choice.again);
    slice.read_parts(&choice);
    Ok(slice.report)
}

/// What the snapshot `newest` has at these paths, escaped, where size, time and content are those of `like`.
/// `lists` is a folder as in [`SourceCheckSpec::lists`], of another container.
///
/// # Errors
/// The lists can't be read.
pub fn old_content_in(
    lists: &Path,
    newest: SnapshotName,
    like: &[FoundChange],
) -> Result<Vec<OldContent>, SnapshotError> {
    let mut found = Vec::new();
    listed_files(lists, newest, &mut |file| {
        let path = escape_path(&file.path);
        let is_it = |one: &FoundChange| one.old.path == path && one.old.is_version_of(&file);
        if like.iter().any(is_it) {
            found.push(OldContent::of(path, &file));
        }
    })
    .map_err(unusable)?;
    Ok(found)
}

fn unusable(source: io::Error) -> SnapshotError {
    SnapshotError::System {
        op: "read this machine's copies of the lists of changes",
        source,
    }
}

struct Slice<'s> {
    spec: &'s SourceCheckSpec,
    reader: Reader<'s>,
    report: SourceCheckReport,
    is_over: &'s dyn Fn() -> bool,
}

impl Slice<'_> {
    /// Reads what earlier slices found. False if there was no time for all of it.
    fn read_again(&mut self, files: &[ListedFile]) -> bool {
        for file in files {
            let path = escape_path(&file.path);
            let found = self.spec.again.iter().filter(|one| one.old.path == path);
            let pieces: BTreeSet<Option<u64>> = found.clone().map(|one| one.piece).collect();
            // A later version is not the content from before, which may be in old snapshots only.
            let mut is_right = found.clone().all(|one| one.old.is_version_of(file));
            for piece in pieces {
                match self.reader.judge(file, piece, self.is_over) {
                    Judged::Stopped => return false,
                    Judged::Same => {
                        let listed = read::listed(file, piece);
                        let mut of_piece = found.clone().filter(|one| one.piece == piece);
                        if of_piece.any(|one| Some(&one.found) == listed.as_ref()) {
                            is_right = false;
                            self.report.backed_up_so.insert(path.clone());
                        }
                    }
                    judged => {
                        is_right = false;
                        self.note(file, piece, judged);
                    }
                }
            }
            if is_right {
                self.report.right_again.insert(path);
            }
        }
        true
    }

    fn read_parts(&mut self, choice: &Choice<'_>) {
        let mut left = self.spec.bytes_max;
        for (number, files) in (0..).zip(&choice.parts) {
            let part = (self.spec.from.part + number) % self.spec.parts.max(1);
            for file in &files.files {
                let first = self.first_piece(number, file);
                for (piece, bytes) in pieces(file).skip(first) {
                    let at = |piece| SourceCursor {
                        part,
                        file: Some(escape_path(&file.path)),
                        piece,
                    };
                    self.report.next = at(Some(piece.unwrap_or(0)));
                    let is_first = self.report.bytes == 0;
                    if (self.is_over)() || (bytes > left && !is_first) {
                        return;
                    }
                    let judged = self.reader.judge(file, piece, self.is_over);
                    if matches!(judged, Judged::Stopped) {
                        // One that takes longer than a slice must not hold up all others.
                        if is_first {
                            self.report.next = at(piece.map(|piece| piece + 1));
                        }
                        return;
                    }
                    if self.note(file, piece, judged) {
                        left = left.saturating_sub(bytes);
                        self.report.files += u64::from(piece.is_none_or(|one| one == 0));
                        self.report.bytes += bytes;
                    }
                }
                self.report.next.piece = None;
            }
            if files.is_cut {
                return;
            }
            self.report.next = SourceCursor {
                part: (part + 1) % self.spec.parts.max(1),
                ..SourceCursor::default()
            };
        }
    }

    /// How many pieces of a file the last slice read.
    fn first_piece(&self, number: u32, file: &ListedFile) -> usize {
        let from = &self.spec.from;
        let is_it = number == 0
            && from
                .file
                .as_ref()
                .is_some_and(|path| unescape_path(path) == file.path);
        match is_it {
            true => usize::try_from(from.piece.unwrap_or(0)).unwrap_or(usize::MAX),
            false => 0,
        }
    }

    /// Notes what was found. True if the file was read.
    fn note(&mut self, file: &ListedFile, piece: Option<u64>, judged: Judged) -> bool {
        let path = escape_path(&file.path);
        match judged {
            Judged::Same => {}
            Judged::Rewritten => self.report.rewritten.push(path),
            Judged::Silent { found } => {
                let one = FoundChange {
                    old: OldContent::of(path, file),
                    piece,
                    found,
                };
                if !self.report.silent.contains(&one) {
                    self.report.silent.push(one);
                }
            }
            Judged::Unfit | Judged::Stopped => return false,
        }
        true
    }
}

/// The parts of a file that have a digest of their own, and their lengths.
fn pieces(file: &ListedFile) -> impl Iterator<Item = (Option<u64>, u64)> {
    let count = file.content.pieces.len() as u64;
    let whole = (count == 0).then_some((None, file.bytes));
    whole.into_iter().chain((0..count).map(move |piece| {
        let from = piece.saturating_mul(PIECE_BYTES);
        (
            Some(piece),
            file.bytes.saturating_sub(from).min(PIECE_BYTES),
        )
    }))
}
