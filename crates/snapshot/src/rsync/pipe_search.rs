//! Lets go of an rsync that waits in `open` for the writer of a pipe.
//!
//! A file may become a pipe after rsync has examined it. A writer that comes and goes at once ends the
//! waiting. The search is a thread of its own: the file that rsync opens may also be one whose file system
//! doesn't answer.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::stillness::Stillness;

/// A search that may be under way.
#[derive(Debug, Default)]
pub(super) struct PipeSearch(Option<Receiver<Option<PathBuf>>>);

impl PipeSearch {
    /// Adds what was found to `pipes`, and searches again unless a search is under way.
    pub(super) fn go_on(&mut self, stillness: &Stillness, pipes: &mut Vec<PathBuf>) {
        self.take(Duration::ZERO, pipes);
        if self.0.is_some() {
            return;
        }
        let process = stillness.process();
        let (to, found) = sync_channel(1);
        let search = move || {
            let pipe = Stillness::pipe_waited_for(process).filter(|pipe| {
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                // Fails only where rsync waits no more.
                rustix::fs::open(pipe, flags, Mode::empty()).is_ok()
            });
            let _ = to.send(pipe);
        };
        let started = std::thread::Builder::new().spawn(search);
        self.0 = started.is_ok().then_some(found);
    }

    /// Adds what a search has found within this time to `pipes`.
    pub(super) fn take(&mut self, limit: Duration, pipes: &mut Vec<PathBuf>) {
        let Some(found) = &self.0 else { return };
        match found.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) => return,
            Ok(Some(pipe)) if !pipes.contains(&pipe) => pipes.push(pipe),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => {}
        }
        self.0 = None;
    }
}
