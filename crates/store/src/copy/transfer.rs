//! Copies pieces from the source to the destination, several reads and several writes at a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::{Duration, Instant};

use super::note::Piece;
use super::threads::start;
use super::{CopyError, CopyLeft, CopyNote, CopyProgress, CopySides, CopyStep, CopyWatch, piece};
use crate::{IgnorePoison, ReadClass};

/// Pieces under way from the source, and as many to the destination: more than the windows of the
/// usual channels (2 MiB each), so that none of them ever waits for work.
const READERS: usize = 4;
const WRITERS: usize = 4;
/// Pieces that wait between reading and writing.
const QUEUE_PIECES: usize = 2;
/// What an interruption costs at most, in addition to what is under way.
const CHECKPOINT_BYTES: u64 = 256 << 20;
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(20);
/// How often the observer is called.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// A piece that was read and is not all zeros.
struct Full {
    note: Piece,
    bytes: Vec<u8>,
    read_bytes: u64,
}

/// A piece that is at the destination.
struct Done {
    note: Piece,
    /// How many bytes the map or the file's length count for it.
    counted_bytes: u64,
    read_bytes: u64,
    written_bytes: u64,
}

/// What the threads share.
struct Shared<'a> {
    sides: &'a CopySides,
    next: Mutex<Box<dyn Iterator<Item = u64> + Send + 'a>>,
    stop: AtomicBool,
    /// Bytes of the pieces that use space at the destination by now, or may use it; counted as the
    /// progress is.
    begun_bytes: AtomicU64,
}

/// Copies every piece that the note lacks and that may hold data, and records it once it is
/// durable.
pub(super) fn transfer(
    sides: &CopySides,
    note: &mut CopyNote,
    watch: &mut dyn CopyWatch,
    figures: &mut CopyProgress,
) -> Result<(), CopyError> {
    let copied = note.copied().clone();
    let missing = |index: &u64| {
        !copied.contains(*index) && sides.map.as_ref().is_none_or(|map| map.piece(*index) != 0)
    };
    figures.step = CopyStep::Copying;
    figures.done_bytes = 0;
    let all = 0..piece::count(sides.len);
    let shared = Shared {
        sides,
        next: Mutex::new(Box::new(all.clone().filter(missing))),
        stop: AtomicBool::new(false),
        begun_bytes: AtomicU64::new(0),
    };
    let missing_bytes = all.filter(missing).map(|index| shared.counted_bytes(index));
    figures.total_bytes = missing_bytes.sum();
    let (done_to, done) = mpsc::channel();
    let (full_to, full) = mpsc::sync_channel(QUEUE_PIECES);
    let full = Mutex::new(full);
    std::thread::scope(|scope| {
        let (shared, full) = (&shared, &full);
        // Writers first: without a reader they end with the queue, but without a writer nothing
        // would be read.
        let started = start(scope, WRITERS, || {
            let done_to = done_to.clone();
            move || write_pieces(shared, full, &done_to)
        })
        .and_then(|()| {
            start(scope, READERS, || {
                let (full_to, done_to) = (full_to.clone(), done_to.clone());
                move || read_pieces(shared, &full_to, &done_to)
            })
        });
        drop((full_to, done_to));
        started.map_err(CopyError::Threads)?;
        let tracked = Tracker {
            shared,
            note,
            watch,
            figures,
            pending: Vec::new(),
            pending_bytes: 0,
            checkpoint_at: Instant::now(),
        }
        .run(&done);
        shared.stop.store(true, Ordering::SeqCst);
        // A thread that waits to pass something on must find this end closed.
        drop(done);
        tracked
    })
}

fn read_pieces(
    shared: &Shared<'_>,
    full: &SyncSender<Full>,
    done: &Sender<Result<Done, CopyError>>,
) {
    let sides = shared.sides;
    while !shared.stop.load(Ordering::SeqCst) {
        let next = {
            let mut next = shared.next.lock().ignore_poison();
            next.next()
        };
        let Some(index) = next else { return };
        let len = piece::len(index, sides.len);
        let wanted = sides.map.as_ref().map_or(u64::MAX, |map| map.piece(index));
        let mut bytes = vec![0; len];
        let mut read_bytes = 0;
        for range in piece::ranges(wanted, len) {
            let at = index * piece::PIECE_BYTES + range.start as u64;
            read_bytes += range.len() as u64;
            if let Err(error) = sides
                .source
                .read_at(at, &mut bytes[range], ReadClass::Ahead)
            {
                let _ = done.send(Err(CopyError::Source(error)));
                return;
            }
        }
        let note = Piece {
            index,
            parts: piece::parts_in_use(&bytes),
            digest: piece::digest(&bytes),
        };
        let handed_on = if note.parts == 0 {
            shared.begin(index);
            let all_zero = shared.done(note, read_bytes, 0);
            done.send(Ok(all_zero)).is_ok()
        } else {
            let piece = Full {
                note,
                bytes,
                read_bytes,
            };
            full.send(piece).is_ok()
        };
        if !handed_on {
            return;
        }
    }
}

fn write_pieces(
    shared: &Shared<'_>,
    full: &Mutex<Receiver<Full>>,
    done: &Sender<Result<Done, CopyError>>,
) {
    loop {
        let next = full.lock().ignore_poison().recv();
        let Ok(piece) = next else { return };
        if shared.stop.load(Ordering::SeqCst) {
            // Received all the same: readers may wait to pass theirs on.
            continue;
        }
        shared.begin(piece.note.index);
        let at = piece.note.index * piece::PIECE_BYTES;
        let parts: Vec<(u64, &[u8])> = piece::runs_in_use(&piece.bytes)
            .into_iter()
            .map(|run| (at + run.start as u64, &piece.bytes[run]))
            .collect();
        let written_bytes = parts.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let outcome = match shared.sides.destination.write_parts_at(&parts) {
            Ok(()) => Ok(shared.done(piece.note, piece.read_bytes, written_bytes)),
            Err(error) => Err(CopyError::Destination(error)),
        };
        // After a failure the results are not received any more.
        let _ = done.send(outcome);
    }
}

impl Shared<'_> {
    /// How many bytes the map or the file's length count for a piece.
    fn counted_bytes(&self, index: u64) -> u64 {
        match &self.sides.map {
            Some(map) => map.piece_bytes(index),
            None => piece::len(index, self.sides.len) as u64,
        }
    }

    fn begin(&self, index: u64) {
        let bytes = self.counted_bytes(index);
        self.begun_bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    fn done(&self, note: Piece, read_bytes: u64, written_bytes: u64) -> Done {
        Done {
            counted_bytes: self.counted_bytes(note.index),
            note,
            read_bytes,
            written_bytes,
        }
    }
}

/// Counts, calls the observer, makes durable and records.
struct Tracker<'a, 'b> {
    shared: &'a Shared<'b>,
    note: &'a mut CopyNote,
    watch: &'a mut dyn CopyWatch,
    figures: &'a mut CopyProgress,
    /// At the destination, not known to be durable.
    pending: Vec<Piece>,
    pending_bytes: u64,
    checkpoint_at: Instant,
}

impl Tracker<'_, '_> {
    fn run(mut self, done: &Receiver<Result<Done, CopyError>>) -> Result<(), CopyError> {
        let mut asked_at = Instant::now();
        loop {
            match done.recv_timeout(WATCH_INTERVAL) {
                Ok(Ok(piece)) => self.take(&piece),
                Ok(Err(error)) => {
                    self.stop_in_order(done);
                    return Err(error);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if asked_at.elapsed() >= WATCH_INTERVAL {
                asked_at = Instant::now();
                if !self.watch.progress(self.figures) {
                    self.stop_in_order(done);
                    return Err(CopyError::Stopped);
                }
            }
            let due = self.pending_bytes >= CHECKPOINT_BYTES
                || (!self.pending.is_empty()
                    && self.checkpoint_at.elapsed() >= CHECKPOINT_INTERVAL);
            if due {
                self.checkpoint()?;
            }
        }
        // First, because it reports that nothing is left to be written.
        self.checkpoint()?;
        self.watch.progress(self.figures);
        Ok(())
    }

    fn take(&mut self, piece: &Done) {
        self.figures.done_bytes += piece.counted_bytes;
        self.figures.read_bytes += piece.read_bytes;
        self.figures.written_bytes += piece.written_bytes;
        self.pending_bytes += piece.written_bytes;
        self.pending.push(piece.note);
    }

    /// Keeps what has arrived for the next run, if the destination still answers.
    fn stop_in_order(&mut self, done: &Receiver<Result<Done, CopyError>>) {
        self.shared.stop.store(true, Ordering::SeqCst);
        while let Ok(outcome) = done.recv() {
            if let Ok(piece) = outcome {
                self.take(&piece);
            }
        }
        // The failure that caused this counts, not one of this checkpoint.
        let _ = self.checkpoint();
    }

    /// A flush covers what was answered before it was sent: exactly what is pending.
    fn checkpoint(&mut self) -> Result<(), CopyError> {
        self.checkpoint_at = Instant::now();
        // A write under way has used its space already, or is about to.
        let begun = self.shared.begun_bytes.load(Ordering::SeqCst);
        let left = self.figures.total_bytes.saturating_sub(begun);
        let left = match self.shared.sides.map {
            Some(_) => CopyLeft::Bytes(left),
            None => CopyLeft::AtMost(left),
        };
        if !self.watch.checkpoint(left) {
            return Err(CopyError::Stopped);
        }
        let flushed = self.shared.sides.destination.flush();
        flushed.map_err(CopyError::Destination)?;
        self.note.add(&self.pending)?;
        self.pending.clear();
        self.pending_bytes = 0;
        Ok(())
    }
}
