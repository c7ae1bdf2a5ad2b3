//! The threads of a check that read files.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::known::Key;
use super::source::{self, Compared, Source};
use crate::cancel::Cancel;
use crate::content::{ContentHash, Sums};
use crate::long_path;

const BUFFER_BYTES: usize = 1 << 20;

/// A regular file to be read, or a link that was read.
pub(super) struct Task {
    pub(super) path: PathBuf,
    pub(super) inode: u64,
    pub(super) key: Key,
    /// It is a symbolic link. Its target is its content.
    pub(super) is_link: bool,
    /// The source to compare it with.
    pub(super) source: Option<Source>,
    /// The file is not begun after this time.
    pub(super) until: Option<Instant>,
}

/// The result for one file.
pub(super) enum Outcome {
    Read {
        bytes: u64,
        sums: Sums,
    },
    Unreadable(io::Error),
    Compared {
        bytes: u64,
        is: Compared,
    },
    /// It was not begun in time, or not read to its end because of a cancel.
    Left,
}

/// Reads files until there are no more.
pub(super) fn read_tasks(
    tasks: &Mutex<Receiver<Task>>,
    done: &Sender<(Task, Outcome)>,
    cancel: &Cancel,
) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = next else { return };
        let late = task.until.is_some_and(|until| Instant::now() >= until);
        let outcome = match &task.source {
            _ if late || cancel.is_cancelled() => None,
            Some(source) => source::compare(&task.path, source, cancel, &mut buffer)
                .map(|(bytes, is)| Outcome::Compared { bytes, is }),
            None => read_whole(&task.path, cancel, &mut buffer),
        };
        if done.send((task, outcome.unwrap_or(Outcome::Left))).is_err() {
            return;
        }
    }
}

/// `None` if it was cancelled.
fn read_whole(path: &Path, cancel: &Cancel, buffer: &mut [u8]) -> Option<Outcome> {
    let mut read = || -> io::Result<Option<Outcome>> {
        let mut file = long_path::open_regular(path)?;
        let mut hash = ContentHash::new(file.metadata()?.len());
        let mut bytes = 0;
        while !cancel.is_cancelled() {
            match file.read(buffer) {
                Ok(0) => {
                    let sums = hash.finish();
                    return Ok(Some(Outcome::Read { bytes, sums }));
                }
                Ok(some) => {
                    bytes += some as u64;
                    hash.update(&buffer[..some]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    };
    match read() {
        Ok(outcome) => outcome,
        Err(error) => Some(Outcome::Unreadable(error)),
    }
}
