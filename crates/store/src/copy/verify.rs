//! Reads back what the note lists and compares it with the source's checksums.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::note::{Piece, Pieces};
use super::threads::start;
use super::{CopyError, CopyNote, CopyProgress, CopyStep, CopyWatch, piece};
use crate::{IgnorePoison, ReadClass, StoreFile};

const READERS: usize = 4;
/// Pieces that are recorded at once.
const BATCH_PIECES: usize = 64;
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// A piece that is read back.
struct Written<'a> {
    file: &'a dyn StoreFile,
    len: u64,
}

struct Compared {
    index: u64,
    same: bool,
    bytes: u64,
}

/// Returns the numbers of the pieces that differ; the others are recorded as verified. Pieces of
/// zeros were never written and are holes, which need no check.
pub(super) fn verify(
    destination: &dyn StoreFile,
    note: &mut CopyNote,
    watch: &mut dyn CopyWatch,
    figures: &mut CopyProgress,
) -> Result<Vec<u64>, CopyError> {
    let copy = Written {
        file: destination,
        len: note.identity().source_bytes,
    };
    figures.step = CopyStep::Verifying;
    figures.done_bytes = 0;
    figures.total_bytes = 0;
    for piece in note.unverified()? {
        let piece = piece?;
        figures.total_bytes += bytes_of(&piece, copy.len);
    }
    let pieces = Mutex::new(note.unverified()?);
    let stop = AtomicBool::new(false);
    let (compared_to, compared) = mpsc::channel();
    std::thread::scope(|scope| {
        let (copy, pieces, stop) = (&copy, &pieces, &stop);
        let started = start(scope, READERS, || {
            let compared_to = compared_to.clone();
            move || compare(copy, pieces, stop, &compared_to)
        });
        drop(compared_to);
        started.map_err(CopyError::Threads)?;
        let collected = collect(&compared, note, watch, figures);
        stop.store(true, Ordering::SeqCst);
        collected
    })
}

fn bytes_of(piece: &Piece, file_bytes: u64) -> u64 {
    let ranges = piece::ranges(piece.parts, piece::len(piece.index, file_bytes));
    ranges.iter().map(|range| range.len() as u64).sum()
}

fn compare(
    copy: &Written<'_>,
    pieces: &Mutex<Pieces>,
    stop: &AtomicBool,
    compared: &Sender<Result<Compared, CopyError>>,
) {
    while !stop.load(Ordering::SeqCst) {
        let next = {
            let mut pieces = pieces.lock().ignore_poison();
            pieces.next()
        };
        let outcome = match next {
            None => return,
            Some(Err(error)) => Err(error),
            Some(Ok(piece)) => read_back(copy, &piece),
        };
        let failed = outcome.is_err();
        if compared.send(outcome).is_err() || failed {
            return;
        }
    }
}

fn read_back(copy: &Written<'_>, note: &Piece) -> Result<Compared, CopyError> {
    let mut bytes = vec![0; piece::len(note.index, copy.len)];
    for range in piece::ranges(note.parts, bytes.len()) {
        let at = note.index * piece::PIECE_BYTES + range.start as u64;
        let read = copy.file.read_at(at, &mut bytes[range], ReadClass::Ahead);
        read.map_err(CopyError::Destination)?;
    }
    Ok(Compared {
        index: note.index,
        same: piece::digest(&bytes) == note.digest,
        bytes: bytes_of(note, copy.len),
    })
}

fn collect(
    compared: &Receiver<Result<Compared, CopyError>>,
    note: &mut CopyNote,
    watch: &mut dyn CopyWatch,
    figures: &mut CopyProgress,
) -> Result<Vec<u64>, CopyError> {
    let (mut differing, mut right) = (Vec::new(), Vec::new());
    let mut asked_at = Instant::now();
    loop {
        match compared.recv_timeout(WATCH_INTERVAL) {
            Ok(Err(error)) => {
                // The next attempt goes on after what was read back so far.
                note.verified(&right)?;
                return Err(error);
            }
            Ok(Ok(piece)) => {
                figures.done_bytes += piece.bytes;
                if piece.same {
                    figures.verified_bytes += piece.bytes;
                    right.push(piece.index);
                } else {
                    differing.push(piece.index);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if right.len() >= BATCH_PIECES {
            note.verified(&right)?;
            right.clear();
        }
        if asked_at.elapsed() >= WATCH_INTERVAL {
            asked_at = Instant::now();
            if !watch.progress(figures) {
                note.verified(&right)?;
                return Err(CopyError::Stopped);
            }
        }
    }
    watch.progress(figures);
    note.verified(&right)?;
    differing.sort_unstable();
    Ok(differing)
}
