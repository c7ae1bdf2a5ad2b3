//! Copies one large sparse file between two stores: pipelined, resumable, verified by reading back.
//!
//! The file goes over in pieces of 4 MiB. A [`CopyNote`] on this host says which of them are
//! durable at the destination, with a checksum of what was read from the source; so an interrupted
//! copy goes on where it stopped, and what the destination holds in the end is compared with what
//! the source gave. Nothing here knows of locks, names or keys: that is the caller's.

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

/// No longer file is copied: what is kept in memory grows with the length that a server tells.
pub const COPY_BYTES_MAX: u64 = 1 << 48;

/// Pieces that did not read back as they were written; more than so many are not tried again.
const DIFFERING_MAX: usize = 1024;

/// The two ends of a copy.
pub struct CopySides {
    /// Read from; nobody may write to it meanwhile.
    pub source: Arc<dyn StoreFile>,
    /// A file that was empty when the note began; as long as the source by now.
    pub destination: Arc<dyn StoreFile>,
    /// Length of both in bytes; [`COPY_BYTES_MAX`] at most.
    pub len: u64,
    /// Where the source holds data; `None`: all of it is read, and blocks of zeros become holes.
    pub map: Option<DataMap>,
}

/// What a copy does at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStep {
    /// Reading from the source and writing to the destination.
    Copying,
    /// Reading back from the destination.
    Verifying,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyProgress {
    /// What is done.
    pub step: CopyStep,
    /// Bytes of this step that are dealt with, by this run.
    pub done_bytes: u64,
    /// Bytes of this step that this run has to deal with.
    pub total_bytes: u64,
    /// Bytes read from the source by this run.
    pub read_bytes: u64,
    /// Bytes written to the destination by this run.
    pub written_bytes: u64,
    /// Bytes read back and found right by this run.
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

/// What is still to be written, what is under way not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyLeft {
    /// So many bytes.
    Bytes(u64),
    /// So many bytes at most, and perhaps none: the source doesn't tell holes from data.
    AtMost(u64),
}

/// Sees a copy, and may stop it.
pub trait CopyWatch {
    /// Called several times a second; false stops the copy in order ([`CopyError::Stopped`]).
    fn progress(&mut self, progress: &CopyProgress) -> bool;

    /// Called before what was written is made durable and noted; false stops the copy without
    /// either.
    fn checkpoint(&mut self, left: CopyLeft) -> bool;
}

/// A copy did not come to its end.
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
    /// The note on this host could not be kept.
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
    /// Not one thread could be started: a limit on processes or memory.
    #[error("start the threads of a copy")]
    Threads(#[source] io::Error),
    /// The caller said so.
    #[error("the copy was stopped")]
    Stopped,
    /// Twice what was written did not read back.
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
    unreachable!("the last try returns")
}

/// Reads back all that the note lists from `file`, whatever was read back before; `None` where it
/// is not what was read from the source. For a file of which it isn't sure that it is the one that
/// the note was made with.
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

/// Whether what the first pieces held when they were noted still reads the same from `file`, the
/// source or the destination; true where nothing is noted. The header and the file system's super
/// block lie there, and no session leaves both as they were.
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
