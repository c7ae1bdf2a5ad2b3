//! Examines source files in a separate thread while rsync runs. A file system may not answer, such as a
//! mount of a dead server. The thread that follows rsync and checks for a cancel must not wait for it.

use std::fs::{Metadata, symlink_metadata};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How many files may wait to be examined before rsync has to wait, too.
const WAITING_MAX: usize = 1024;

/// The files that are being examined.
#[derive(Default)]
pub(super) struct Asked {
    asking: Option<(Sender<PathBuf>, Receiver<Answer>)>,
    waiting: usize,
}

type Answer = (PathBuf, Option<Metadata>);

impl Asked {
    /// Examines `path`, without following a symbolic link.
    pub(super) fn ask(&mut self, path: PathBuf) {
        let (to, _) = self.asking.get_or_insert_with(|| {
            let (to, paths) = channel::<PathBuf>();
            let (back, answers) = channel();
            // Not joined: it ends with its channel, or with the process.
            std::thread::spawn(move || {
                for path in paths {
                    let about = symlink_metadata(&path).ok();
                    if back.send((path, about)).is_err() {
                        return;
                    }
                }
            });
            (to, answers)
        });
        if to.send(path).is_ok() {
            self.waiting += 1;
        }
    }

    /// Whether answers must be fetched before more files are added.
    pub(super) fn is_full(&self) -> bool {
        self.waiting >= WAITING_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// The next file that exists. Waits for it at most `patience`.
    pub(super) fn next(&mut self, patience: Duration) -> Option<(PathBuf, Metadata)> {
        let (_, answers) = self.asking.as_ref()?;
        while self.waiting > 0 {
            match answers.recv_timeout(patience) {
                Ok((path, about)) => {
                    self.waiting -= 1;
                    if let Some(about) = about {
                        return Some((path, about));
                    }
                }
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => self.waiting = 0,
            }
        }
        None
    }
}

/// Calls `ask` in a separate thread, because its file system may not answer. `None` if it did not return
/// in time.
pub(crate) fn within<T: Send + 'static>(
    patience: Duration,
    ask: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (to, answer) = channel();
    let asking = std::thread::Builder::new().spawn(move || {
        // The receiver may be gone.
        let _ = to.send(ask());
    });
    asking.ok()?;
    answer.recv_timeout(patience).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn existing_files_are_found_and_missing_ones_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let mut asked = Asked::default();
        assert!(asked.is_empty());
        let file = dir.path().join("file");
        std::fs::write(&file, "abc").unwrap();
        for path in [dir.path().join("gone"), file.clone()] {
            asked.ask(path);
        }
        let (path, about) = asked.next(Duration::from_secs(60)).unwrap();
        assert_eq!((path, about.len()), (file, 3));
        assert!(asked.next(Duration::ZERO).is_none());
        assert!(asked.is_empty() && !asked.is_full());
    }

    #[test]
    fn a_call_that_does_not_return_is_abandoned() {
        let (sender, receiver) = channel::<()>();
        let answer = within(Duration::from_millis(20), move || receiver.recv().is_err());
        assert_eq!(answer, None);
        drop(sender);
        assert_eq!(within(Duration::from_secs(60), || 7), Some(7));
    }
}
