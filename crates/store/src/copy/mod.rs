//! Copies one large sparse file between two stores: pipelined, resumable, verified by reading back.
//!
//! The file is copied in pieces of 4 MiB. A [`CopyNote`] on this host records which of them are
//! durable at the destination, with a checksum of what was read from the source. So an interrupted
//! copy goes on where it stopped, and at the end the destination is compared with what the source
//! returned. Locks, names and keys are the caller's business.

mod data_map;
mod note;
mod piece;
mod remote_map;
mod threads;
mod transfer;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;
use std::{fmt, io};

pub use data_map::DataMap;
pub use note::{CopyIdentity, CopyNote, CopyStage};
pub use piece::PIECE_BYTES;
pub use remote_map::{RemoteMapError, read_remote_map};

use crate::{StoreError, StoreFile};

/// Longer files are not copied: the memory used grows with the length that a server reports.
pub const COPY_BYTES_MAX: u64 = 1 << 48;

/// If more pieces than this did not read back as written, they are not copied again.
const DIFFERING_MAX: usize = 1024;

/// The two ends of a copy.
pub struct CopySides {
    /// Read from; nothing may write to it meanwhile.
    pub source: Arc<dyn StoreFile>,
    /// It was empty when the note was created, and now has the length of the source.
    pub destination: Arc<dyn StoreFile>,
    /// Length of both in bytes; [`COPY_BYTES_MAX`] at most.
    pub len: u64,
    /// Where the source holds data. `None`: all of it is read, and blocks of zeros become holes.
    pub map: Option<DataMap>,
}

/// The current step of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStep {
    /// Reading from the source and writing to the destination.
    Copying,
    /// Reading back from the destination.
    Verifying,
}

/// The progress of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyProgress {
    /// The current step.
    pub step: CopyStep,
    /// Bytes of this step that this run has finished.
    pub done_bytes: u64,
    /// Bytes of this step that this run has to do.
    pub total_bytes: u64,
    /// Bytes read from the source by this run.
    pub read_bytes: u64,
    /// Bytes written to the destination by this run.
    pub written_bytes: u64,
    /// Bytes that this run read back and found correct.
    pub verified_bytes: u64,
}

impl CopyProgress {
    fn begin(step: CopyStep) -> Self {
        Self {
            step,
            done_bytes: 0,
            total_bytes: 0,
            read_bytes: 0,
            written_bytes: 0,
            verified_bytes: 0,
        }
    }
}

/// What remains to be written, without what is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyLeft {
    /// This many bytes.
    Bytes(u64),
    /// At most this many bytes, and perhaps none: the source doesn't tell holes from data.
    AtMost(u64),
}

/// Observes a copy, and may stop it.
pub trait CopyWatch {
    /// Called several times a second; false stops the copy cleanly ([`CopyError::Stopped`]).
    fn progress(&mut self, progress: &CopyProgress) -> bool;

    /// Called before what was written is made durable and recorded; false stops the copy without
    /// either.
    fn checkpoint(&mut self, left: CopyLeft) -> bool;
}

/// A copy did not finish.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum CopyError {
    /// The source could not be read.
    #[error("read from the source")]
    Source(#[source] StoreError),
    /// The destination could not be written, made durable or read.
    #[error("write to the destination")]
    Destination(#[source] StoreError),
    /// The note on this host could not be written or read.
    #[error("{op} the note of the copy, {}", path.display())]
    Note {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file is longer than [`COPY_BYTES_MAX`].
    #[error("a file of {len} bytes is too long to be copied")]
    TooLong { len: u64 },
    /// No thread could be started: a limit on processes or memory.
    #[error("start the threads of a copy")]
    Threads(#[source] io::Error),
    /// The caller stopped it.
    #[error("the copy was stopped")]
    Stopped,
    /// Pieces did not read back as written, twice.
    #[error(
        "{pieces} pieces of 4 MiB don't read back from the destination as they were written, \
         the first at offset {first_offset}"
    )]
    Differs { pieces: usize, first_offset: u64 },
}

/// Copies what the note doesn't list, makes it durable, reads all of it back and marks the note
/// [`CopyStage::Verified`]. Pieces that differ are copied once more.
pub fn copy(
    sides: &CopySides,
    note: &mut CopyNote,
    watch: &mut dyn CopyWatch,
) -> Result<CopyProgress, CopyError> {
    if sides.len > COPY_BYTES_MAX {
        return Err(CopyError::TooLong { len: sides.len });
    }
    let mut figures = CopyProgress::begin(CopyStep::Copying);
    for last_try in [false, true] {
        transfer::transfer(sides, note, watch, &mut figures)?;
        sides.destination.forget_cached();
        let differing = verify::verify(&*sides.destination, note, watch, &mut figures)?;
        let Some(first) = differing.first() else {
            note.mark(CopyStage::Verified)?;
            return Ok(figures);
        };
        if last_try || differing.len() > DIFFERING_MAX {
            return Err(CopyError::Differs {
                pieces: differing.len(),
                first_offset: first * PIECE_BYTES,
            });
        }
        note.void(&differing)?;
    }
    unreachable!("the last attempt returns")
}

/// Reads everything that the note lists back from `file`, even if it was read back before. `None`
/// if it differs from what was read from the source. For a file that may not be the one that the
/// note was created with.
pub fn read_back(
    file: &dyn StoreFile,
    note: &mut CopyNote,
    watch: &mut dyn CopyWatch,
) -> Result<Option<CopyProgress>, CopyError> {
    let mut figures = CopyProgress::begin(CopyStep::Verifying);
    note.forget_verified();
    file.forget_cached();
    let differing = verify::verify(file, note, watch, &mut figures)?;
    Ok(differing.is_empty().then_some(figures))
}

/// Whether the first recorded pieces still read the same from `file`, the source or the
/// destination; true if none is recorded. They contain the header and the file system's super
/// block, and every session changes at least one of these.
pub fn same_beginning(file: &dyn StoreFile, note: &CopyNote) -> Result<bool, StoreError> {
    for noted in note.beginning() {
        let mut bytes = vec![0; piece::len(noted.index, note.identity().source_bytes)];
        for range in piece::ranges(noted.parts, bytes.len()) {
            let at = noted.index * PIECE_BYTES + range.start as u64;
            file.read_at(at, &mut bytes[range], crate::ReadClass::Ahead)?;
        }
        if piece::digest(&bytes) != noted.digest {
            return Ok(false);
        }
    }
    Ok(true)
}

impl fmt::Debug for CopySides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopySides")
            .field("len", &self.len)
            .field("map", &self.map)
            .finish_non_exhaustive()
    }
}
