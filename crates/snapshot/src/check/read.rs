//! The threads of a check that read files, and what tells them to begin no more.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::known::{self, Key};
use super::source::{self, Compared, Source};
use crate::long_path;
use crate::spec::Cancel;

const BUFFER_BYTES: usize = 1 << 20;

/// A regular file to be read.
pub(super) struct Task {
    pub(super) path: PathBuf,
    pub(super) inode: u64,
    pub(super) key: Key,
    /// Compare with this one.
    pub(super) source: Option<Source>,
    /// Not to be begun after this.
    pub(super) until: Option<Instant>,
}

/// What became of one.
pub(super) enum Outcome {
    Read {
        bytes: u64,
        digest: u64,
    },
    Unreadable(io::Error),
    Compared {
        bytes: u64,
        is: Compared,
    },
    /// Not begun in time, or not read to its end because somebody wished to stop.
    Left,
}

/// The wish to stop in the middle of a file.
pub(super) struct Stop<'a>(pub(super) &'a Cancel);

impl Stop<'_> {
    pub(super) fn now(&self) -> bool {
        self.0.is_cancelled()
    }
}

/// Reads files until there are no more.
pub(super) fn read_tasks(
    tasks: &Mutex<Receiver<Task>>,
    done: &Sender<(Task, Outcome)>,
    stop: &Stop<'_>,
) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = next else { return };
        let late = task.until.is_some_and(|until| Instant::now() >= until);
        let outcome = match &task.source {
            _ if late || stop.now() => None,
            Some(source) => source::compare(&task.path, source, stop, &mut buffer),
            None => read_whole(&task.path, stop, &mut buffer),
        };
        if done.send((task, outcome.unwrap_or(Outcome::Left))).is_err() {
            return;
        }
    }
}

/// `None`: stopped.
fn read_whole(path: &Path, stop: &Stop<'_>, buffer: &mut [u8]) -> Option<Outcome> {
    let mut read = || -> io::Result<Option<Outcome>> {
        let mut file = long_path::open_regular(path)?;
        let mut hash = known::Hash::new();
        let mut bytes = 0;
        while !stop.now() {
            match file.read(buffer) {
                Ok(0) => {
                    let digest = hash.finish();
                    return Ok(Some(Outcome::Read { bytes, digest }));
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
