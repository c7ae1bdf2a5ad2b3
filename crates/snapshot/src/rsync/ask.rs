//! Examines files of the source while rsync runs, on a thread of its own. A file system that is gone, such as a
//! mount of a dead server, answers no call: what follows rsync and hears of a cancel must not wait for it.

use std::fs::{Metadata, symlink_metadata};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// So many files wait to be examined before rsync has to wait too.
const WAITING_MAX: usize = 1024;

/// Files that are being examined.
#[derive(Default)]
pub(super) struct Asked {
    asking: Option<(Sender<PathBuf>, Receiver<Answer>)>,
    waiting: usize,
}

type Answer = (PathBuf, Option<Metadata>);

impl Asked {
    /// Has `path` examined, as it is itself and not what a symbolic link points to.
    pub(super) fn ask(&mut self, path: PathBuf) {
        let (to, _) = self.asking.get_or_insert_with(|| {
            let (to, paths) = channel::<PathBuf>();
            let (back, answers) = channel();
            // Nobody waits for it: it ends with its channel, or with the process.
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

    /// Whether some should be answered before more are asked.
    pub(super) fn is_full(&self) -> bool {
        self.waiting >= WAITING_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// The next file that is there; waits for it, but no longer than `patience`.
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

/// Calls `ask`, which may wait for a file system that is gone, on a thread of its own. `None`: it did
/// not return in time.
pub(crate) fn within<T: Send + 'static>(
    patience: Duration,
    ask: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (to, answer) = channel();
    let asking = std::thread::Builder::new().spawn(move || {
        // It may be too late.
        let _ = to.send(ask());
    });
    asking.ok()?;
    answer.recv_timeout(patience).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_and_what_is_not_is_passed_over() {
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
    fn a_call_that_does_not_return_is_given_up() {
        let (hold, held) = channel::<()>();
        let answer = within(Duration::from_millis(20), move || held.recv().is_err());
        assert_eq!(answer, None);
        drop(hold);
        assert_eq!(within(Duration::from_secs(60), || 7), Some(7));
    }
}
