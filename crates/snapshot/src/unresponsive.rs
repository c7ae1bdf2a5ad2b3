//! Accesses to a source that may not answer, such as a mount of a dead server. Each happens in a thread of its own.
//! The thread that waits for it checks for a cancel, and gives up when rsync would be stopped, too.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel, sync_channel};
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::progress::{Phase, Progress};
use crate::rsync::{REPORT_AFTER, STILL_MAX, file_of_thread};
use crate::text::escape_path;

const POLL: Duration = Duration::from_millis(100);
/// How much is read at once.
const CHUNK_BYTES: usize = 1 << 20;
/// How many chunks may wait.
const CHUNKS_MAX: usize = 2;

/// Asks the sources what is needed before or after rsync's run. As [`Waiting::ask`].
pub(crate) fn ask<T: Send + 'static>(
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
    ask: impl FnOnce() -> T + Send + 'static,
) -> Result<T, SnapshotError> {
    let progress = RefCell::new(progress);
    let report = |still_s| {
        (progress.borrow_mut())(Progress {
            still_s,
            ..Progress::begin(Phase::Checking)
        });
    };
    Waiting::new(cancel, &report).ask(ask)
}

/// Waits for a source.
pub(crate) struct Waiting<'a> {
    pub(crate) cancel: &'a Cancel,
    /// For how long there was no answer, if that is long enough to report.
    pub(crate) report: &'a dyn Fn(Option<u64>),
    pub(crate) still_max: Duration,
}

impl<'a> Waiting<'a> {
    pub(crate) fn new(cancel: &'a Cancel, report: &'a dyn Fn(Option<u64>)) -> Self {
        Self {
            cancel,
            report,
            still_max: STILL_MAX,
        }
    }

    /// Calls `ask` in another thread.
    ///
    /// # Errors
    /// A cancel, or no answer for a very long time. The thread is abandoned then: it ends with the call, or with the
    /// process.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, SnapshotError> {
        let (to, answer) = channel();
        let (thread_to, thread) = channel();
        let started = std::thread::Builder::new().spawn(move || {
            // The receivers may be gone.
            let _ = thread_to.send(own_thread());
            let _ = to.send(ask());
        });
        started.map_err(no_thread)?;
        self.wait(&answer, &thread.recv().ok().flatten())
    }

    /// `thread`: that of the answer, in `/proc`.
    fn wait<T>(&self, answer: &Receiver<T>, thread: &Option<PathBuf>) -> Result<T, SnapshotError> {
        let begun = Instant::now();
        let mut reported = false;
        loop {
            let received = answer.recv_timeout(POLL);
            let still = begun.elapsed();
            match received {
                Ok(received) => {
                    if reported {
                        (self.report)(None);
                    }
                    return Ok(received);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(no_thread(io::Error::other("the thread has panicked")));
                }
                Err(RecvTimeoutError::Timeout) if self.cancel.is_cancelled() => {
                    return Err(SnapshotError::Cancelled);
                }
                Err(RecvTimeoutError::Timeout) if still >= self.still_max => {
                    return Err(SnapshotError::StoodStill {
                        still_s: still.as_secs(),
                        at: thread
                            .as_deref()
                            .and_then(file_of_thread)
                            .map(|path| escape_path(&path)),
                    });
                }
                Err(RecvTimeoutError::Timeout) if still >= REPORT_AFTER => {
                    reported = true;
                    (self.report)(Some(still.as_secs()));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Reads the file `from` from its beginning, at most `bytes_max` of it.
    pub(crate) fn read(self, from: File, bytes_max: u64) -> Result<Reading<'a>, SnapshotError> {
        let (to, chunks) = sync_channel(CHUNKS_MAX);
        let (thread_to, thread) = channel();
        let started = std::thread::Builder::new().spawn(move || {
            let _ = thread_to.send(own_thread());
            let mut from = from.take(bytes_max);
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let read = read(&mut from, &mut chunk).map(|length| {
                    chunk.truncate(length);
                    chunk
                });
                let is_last = !matches!(&read, Ok(chunk) if !chunk.is_empty());
                if to.send(read).is_err() || is_last {
                    return;
                }
            }
        });
        started.map_err(no_thread)?;
        Ok(Reading {
            waiting: self,
            thread: thread.recv().ok().flatten(),
            chunks,
            chunk: Vec::new(),
            at: 0,
            is_over: false,
            failure: None,
        })
    }
}

fn read(from: &mut dyn Read, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The folder of this thread in `/proc`.
fn own_thread() -> Option<PathBuf> {
    Some(PathBuf::from("/proc").join(std::fs::read_link("/proc/thread-self").ok()?))
}

fn no_thread(source: io::Error) -> SnapshotError {
    SnapshotError::System {
        op: "start a thread",
        source,
    }
}

/// A file that another thread reads.
pub(crate) struct Reading<'a> {
    waiting: Waiting<'a>,
    thread: Option<PathBuf>,
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    at: usize,
    is_over: bool,
    /// Why a read failed, if it was not the source's error.
    pub(crate) failure: Option<SnapshotError>,
}

impl Read for Reading<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.at == self.chunk.len() && !self.is_over {
            match self.waiting.wait(&self.chunks, &self.thread) {
                Ok(chunk) => self.chunk = chunk?,
                Err(failure) => {
                    self.failure = Some(failure);
                    return Err(io::Error::other("the source does not answer"));
                }
            }
            self.at = 0;
            self.is_over = self.chunk.is_empty();
        }
        let length = to.len().min(self.chunk.len() - self.at);
        to[..length].copy_from_slice(&self.chunk[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_to_its_end_or_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content: Vec<u8> = (0..3_u32 << 18)
            .flat_map(u32::to_le_bytes)
            .chain([1; 5])
            .collect();
        std::fs::write(&path, &content).unwrap();
        let cancel = Cancel::new();
        for limit in [
            0,
            7,
            CHUNK_BYTES,
            2 * CHUNK_BYTES + 1,
            content.len(),
            content.len() + 9,
        ] {
            let waiting = Waiting::new(&cancel, &|_| {});
            let mut reading = waiting
                .read(File::open(&path).unwrap(), limit as u64)
                .unwrap();
            let mut found = Vec::new();
            reading.read_to_end(&mut found).unwrap();
            assert!(found == content[..limit.min(content.len())], "{limit}");
        }
    }

    #[test]
    fn a_source_that_does_not_answer_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        // It has a writer, so that the open succeeds and only the read blocks.
        let pipe = File::options().read(true).write(true).open(&path).unwrap();
        let cancel = Cancel::new();
        let mut waiting = Waiting::new(&cancel, &|_| {});
        waiting.still_max = Duration::from_millis(300);
        let mut reading = waiting.read(pipe.try_clone().unwrap(), 9).unwrap();
        reading.read(&mut [0; 9]).unwrap_err();
        let at = path.to_str().unwrap().to_owned();
        assert!(
            matches!(&reading.failure, Some(SnapshotError::StoodStill { at: Some(found), .. }) if *found == at),
            "{:?}",
            reading.failure
        );
        cancel.cancel();
        let waiting = Waiting::new(&cancel, &|_| {});
        let asked = waiting.ask(move || (&pipe).read(&mut [0; 9]).is_ok());
        assert!(matches!(asked, Err(SnapshotError::Cancelled)), "{asked:?}");
    }
}
